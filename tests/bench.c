/* bench.c -- one repetition of each measurement asked for, a line "name value unit" each.
 *
 *   bench read fma fp4 fp4l2 fp8 fp8l2 bf16 gemm index raw DIR N SEED cache DIR N SEED start DIR
 *         run DIR RAM WINDOWS
 *
 * What is compared stands side by side on the command line, and tests/bench.py takes medians over
 * many runs: on a shared machine only neighbours in time can be compared.  Of kernels and of their
 * bounds alike the fastest window of a millisecond or two counts, for others take turns with us,
 * a few milliseconds each.
 * A name ends in .1 for one thread and in .n for all of them.
 *
 * Contents  1 time and memory   2 bounds   3 kernels   4 experts from disk   5 a run   6 main    */
#define _GNU_SOURCE
#include "../dsv4.h"

#include <fcntl.h>
#include <immintrin.h>
#include <liburing.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    DIM = 4096, INTER = 2048,      /* V4-Flash's experts                                        */
    ROWS = 8192,                   /* of a dense matrix with DIM columns                        */
    GEMM_ROWS = 64,
    INDEX_HEADS = 64, INDEX_DIM = 128, INDEX_KEYS = 1024, INDEX_TOKENS = 8,
    NEAR_DIM = 1024, NEAR_INTER = 512, NEAR_ROWS = 512, /* 1 MB of weights: in L2, or in a small
                                      L2's L3, which no kernel outruns; no padded rows          */
    IO_ALIGN = 4096, IO_PIECE = 1 << 20,       /* as in offload.c                               */
    IO_DEPTH = 128,                /* more than there: the drive's best                         */
    WINDOW = 12,                   /* experts pinned at once: the model asks for 6 to 16        */
    SLOTS = 16,
};
static const size_t ARENA = (size_t)256 << 20;     /* eight times an L3 of today */
static const double SLICE = 0.2, WINDOW_S = 0.001; /* seconds of one measurement, and of a window */

/* === 1. Time and memory ======================================================================= */

static _Noreturn void die(const char *what) {
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

static int n_processors(void) {
    int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return n < MAX_THREADS ? n : MAX_THREADS;
}

static void say(const char *name, int threads, double value, const char *unit) {
    printf("%s.%s %.6g %s\n", name, threads == 1 ? "1" : "n", value, unit);
}

static void *take(size_t bytes) {
    void *p = aligned_alloc(2 << 20, (bytes + (2 << 20) - 1) >> 21 << 21);
    if (!p) die("out of memory");
    (void)madvise(p, bytes, MADV_HUGEPAGE);        /* as the model's own arenas */
    return p;
}

/* Weights for every kernel: random bytes without bit 6 and bit 1, so that no FP8 code is a NaN
 * and no BF16 is large. */
static uint8_t *weights(void) {
    static uint8_t *base;
    if (base) return base;
    base = take(ARENA);
    uint64_t random = 0x9e3779b97f4a7c15u;
    for (size_t at = 0; at < ARENA; at += sizeof random) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        uint64_t word = random & 0xbdbdbdbdbdbdbdbdu;
        memcpy(base + at, &word, sizeof word);
    }
    return base;
}

/* Scales 2^-7, as many as anyone needs. */
static const uint8_t *scales(void) {
    static uint8_t s[1 << 16];
    memset(s, 120, sizeof s);
    return s;
}

/* === 2. Bounds ================================================================================ */

typedef void (*window_fn)(int id, int n, size_t round);

typedef struct {
    pthread_barrier_t *edge;
    window_fn work;
    int id, n;
    const bool *stop;
} worker;

static void *worker_main(void *arg) {
    const worker *w = arg;
    for (size_t round = 0;; round++) {
        pthread_barrier_wait(w->edge);
        if (*w->stop) return NULL;
        w->work(w->id, w->n, round);
        pthread_barrier_wait(w->edge);
    }
}

/* Seconds of the fastest window in which n threads each did `work` once. */
static double together(window_fn work, int n) {
    pthread_barrier_t edge;
    pthread_t thread[MAX_THREADS];
    worker w[MAX_THREADS];
    bool stop = false;
    double best = 1e9, until = now_s() + SLICE;
    pthread_barrier_init(&edge, NULL, (unsigned)n + 1);
    for (int i = 0; i < n; i++) {
        w[i] = (worker){&edge, work, i, n, &stop};
        if (pthread_create(&thread[i], NULL, worker_main, &w[i])) die("no thread");
    }
    while (!stop) {
        double begin = now_s();
        pthread_barrier_wait(&edge);
        pthread_barrier_wait(&edge);
        double end = now_s();
        if (end - begin < best) best = end - begin;
        stop = end > until;
    }
    pthread_barrier_wait(&edge);
    for (int i = 0; i < n; i++) pthread_join(thread[i], NULL);
    pthread_barrier_destroy(&edge);
    return best;
}

static volatile float sink[MAX_THREADS];           /* so that nobody leaves the work out */

enum { READ_BYTES = 32 << 20, FMA_STEPS = 1000000, FMA_CHAINS = 12 };

/* The next READ_BYTES of this thread's share of the arena, round and round: none are in L3. */
static void read_share(int id, int n, size_t round) {
    size_t share = ARENA / (size_t)n / 4096 * 4096;
    const uint8_t *base = weights() + share * (size_t)id;
    __m256i sum[4] = {_mm256_setzero_si256()};
    for (size_t i = 0, at = round * READ_BYTES % share; i < READ_BYTES; i += 128, at += 128) {
        if (at + 128 > share) at = 0;
        for (size_t j = 0; j < 4; j++)
            sum[j] = _mm256_xor_si256(sum[j],
                                      _mm256_load_si256((const void *)(base + at + 32 * j)));
    }
    sum[0] = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    sink[id] = (float)_mm256_extract_epi8(sum[0], 0);
}

/* Multiply-adds in F32: twelve chains hide the latency of any core so far. */
static void fma_chains(int id, int n, size_t round) {
    __m256 c[FMA_CHAINS], a = _mm256_set1_ps(1.0f - 1e-6f), b = _mm256_set1_ps(1e-6f);
    (void)n, (void)round;
    for (int j = 0; j < FMA_CHAINS; j++) c[j] = _mm256_set1_ps((float)j);
    for (int i = 0; i < FMA_STEPS; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < FMA_CHAINS; j++) c[j] = _mm256_fmadd_ps(c[j], a, b);
    }
    for (int j = 1; j < FMA_CHAINS; j++) c[0] = _mm256_add_ps(c[0], c[j]);
    sink[id] = _mm256_cvtss_f32(c[0]);
}

static void bench_read(dsv4_exec *ex, int threads) {
    (void)ex;
    (void)weights();
    double bytes = (double)READ_BYTES * threads;
    say("read", threads, bytes / together(read_share, threads) / 1e9, "GB/s");
}

static void bench_fma(dsv4_exec *ex, int threads) {
    (void)ex;
    double macs = (double)FMA_STEPS * FMA_CHAINS * 8 * threads;
    say("fma", threads, macs / together(fma_chains, threads) / 1e9, "GMAC/s");
}

/* === 3. Kernels =============================================================================== */

typedef struct {                   /* one kernel over several sets of weights in turn           */
    dsv4_exec *ex;
    int rows, cols, m, n_sets, next;
    dsv4_dtype dtype;              /* of linear                                                 */
    size_t bytes;                  /* of one set, scales included                               */
    float *x, *y;
    uint8_t *code;
    void *scratch;
} kernel;

/* Runs a second, in the fastest window. */
static double runs_per_s(kernel *k, void (*once)(kernel *k)) {
    once(k);                       /* touches x, y and scratch                                  */
    double best = 0, until = now_s() + SLICE, begin, end;
    do {
        int n = 0;
        begin = now_s();
        do once(k), n++, end = now_s();
        while (end - begin < WINDOW_S);
        if (n / (end - begin) > best) best = n / (end - begin);
    } while (end < until);
    return best;
}

static void kernel_open(kernel *k) {
    size_t wide = (size_t)(k->rows > k->cols ? k->rows : k->cols);
    k->n_sets = (int)(ARENA / k->bytes);
    k->x = take(wide * EXPERT_ROWS * sizeof *k->x);
    k->y = take(wide * EXPERT_ROWS * sizeof *k->y);
    k->code = take(wide * EXPERT_ROWS);
    k->scratch = take(expert_scratch_bytes(k->cols, k->rows));
    for (size_t i = 0; i < wide * EXPERT_ROWS; i++) k->x[i] = (float)((int)(i % 255) - 127);
    for (size_t i = 0; i < wide * EXPERT_ROWS; i++) k->code[i] = (uint8_t)(i % 113);
    memset(k->y, 0, wide * EXPERT_ROWS * sizeof *k->y);
}

static void kernel_close(kernel *k) {
    free(k->x);
    free(k->y);
    free(k->code);
    free(k->scratch);
}

/* As an expert lies in its slot: w1 w2 w3, then their scales. */
static void expert_once(kernel *k) {
    static int32_t row[EXPERT_ROWS];
    static float weight[EXPERT_ROWS];
    for (int i = 0; i < k->m; i++) row[i] = i, weight[i] = 0.25f;
    const uint8_t *w = weights() + k->bytes * (size_t)(k->next++ % k->n_sets);
    size_t part = (size_t)k->rows * (size_t)k->cols / 2, scale = part / 16;
    const uint8_t *s = w + 3 * part;
    dsv4_ffn f = {.w1 = {DT_I8, k->rows, k->cols, w, s},
                  .w2 = {DT_I8, k->cols, k->rows, w + part, s + scale},
                  .w3 = {DT_I8, k->rows, k->cols, w + 2 * part, s + 2 * scale}};
    dsv4_acts x = {k->code, scales(), NULL};
    ops_cpu.expert_ffn(k->y, &f, &x, row, weight, k->m, 10.0f, k->scratch, k->ex);
}

static void linear_once(kernel *k) {
    const uint8_t *data = weights() + k->bytes * (size_t)(k->next++ % k->n_sets);
    dsv4_mat w = {k->dtype, k->rows, k->cols, data, k->dtype == DT_F8_E4M3 ? scales() : NULL};
    ops_cpu.linear(k->y, &w, k->x, k->m, 1, k->ex);
}

static kernel expert_kernel(dsv4_exec *ex, int dim, int inter, int m) {
    size_t part = (size_t)dim * (size_t)inter / 2;
    return (kernel){.ex = ex, .rows = inter, .cols = dim, .m = m, .bytes = 3 * (part + part / 16)};
}

static kernel linear_kernel(dsv4_exec *ex, dsv4_dtype dtype, int rows, int cols, int m) {
    size_t element = dtype == DT_F8_E4M3 ? 1 : 2;
    return (kernel){.ex = ex, .rows = rows, .cols = cols, .m = m, .dtype = dtype,
                    .bytes = (size_t)rows * (size_t)cols * element};
}

static void weights_rate(const char *name, int threads, kernel k, void (*once)(kernel *k),
                         bool resident) {
    kernel_open(&k);
    if (resident) k.n_sets = 1;
    double runs = runs_per_s(&k, once);
    say(name, threads, runs * (double)k.bytes / 1e9, "GB/s");
    if (once == expert_once && !resident) {
        char each[32];
        snprintf(each, sizeof each, "%s.experts", name);
        say(each, threads, runs, "1/s");
    }
    kernel_close(&k);
}

static void macs_rate(const char *name, int threads, kernel k, void (*once)(kernel *k)) {
    kernel_open(&k);
    double macs = (double)k.rows * k.cols * k.m * (once == expert_once ? 3 : 1);
    say(name, threads, runs_per_s(&k, once) * macs / 1e9, "GMAC/s");
    kernel_close(&k);
}

static void bench_fp4(dsv4_exec *ex, int threads) {
    weights_rate("fp4", threads, expert_kernel(ex, DIM, INTER, 1), expert_once, false);
}

/* One small expert, which stays near; of several threads no one knows who has which rows. */
static void bench_fp4l2(dsv4_exec *ex, int threads) {
    if (threads == 1)
        weights_rate("fp4l2", 1, expert_kernel(ex, NEAR_DIM, NEAR_INTER, 1), expert_once, true);
}

static void bench_fp8(dsv4_exec *ex, int threads) {
    weights_rate("fp8", threads, linear_kernel(ex, DT_F8_E4M3, ROWS, DIM, 1), linear_once, false);
}

static void bench_fp8l2(dsv4_exec *ex, int threads) {
    if (threads == 1)
        weights_rate("fp8l2", 1, linear_kernel(ex, DT_F8_E4M3, NEAR_ROWS, 2 * NEAR_DIM, 1),
                     linear_once, true);
}

static void bench_bf16(dsv4_exec *ex, int threads) {
    weights_rate("bf16", threads, linear_kernel(ex, DT_BF16, ROWS, DIM, 1), linear_once, false);
}

static void bench_gemm(dsv4_exec *ex, int threads) {
    macs_rate("gemm4", threads, expert_kernel(ex, DIM, INTER, GEMM_ROWS), expert_once);
    macs_rate("gemm8", threads, linear_kernel(ex, DT_F8_E4M3, ROWS, DIM, GEMM_ROWS), linear_once);
}

/* Index scores; rows of queries, then of keys. */
static void index_once(kernel *k) {
    dsv4_index in = {.q = k->code, .w = k->x, .w_scale = 1, .n_heads = INDEX_HEADS,
                     .d = INDEX_DIM, .ratio = 1, .packed = true, .t0 = INDEX_KEYS - INDEX_TOKENS,
                     .stride = INDEX_KEYS};
    in.keys = k->code + INDEX_TOKENS * INDEX_HEADS * index_row_bytes(INDEX_DIM, true);
    ops_cpu.index_scores(k->y, &in, INDEX_TOKENS, k->ex);
}

static void bench_index(dsv4_exec *ex, int threads) {
    kernel k = {.ex = ex, .rows = INDEX_KEYS, .cols = INDEX_HEADS * INDEX_DIM, .bytes = ARENA};
    kernel_open(&k);
    ops_cpu.index_round(k.code, k.x, INDEX_TOKENS * INDEX_HEADS + INDEX_KEYS, INDEX_DIM, true, ex);
    double macs = (double)k.rows * k.cols * INDEX_TOKENS;
    say("index", threads, runs_per_s(&k, index_once) * macs / 1e9, "GMAC/s");
    kernel_close(&k);
}

/* === 4. Experts from disk ===================================================================== */

typedef struct {                   /* every routed expert of a checkpoint                       */
    dsv4_config cfg;
    ckpt *c;
    size_t n;
    read_group *group;             /* [n]                                                       */
    const ckpt_tensor **part;      /* [n][6]                                                    */
} experts;

static void experts_open(experts *x, const char *dir) {
    static const char *const name[6] = {"w1.weight", "w2.weight", "w3.weight",
                                        "w1.scale", "w2.scale", "w3.scale"};
    dsv4_err err;
    if (config_load(&x->cfg, dir, &err) || ckpt_open(&x->c, dir, &err)) die(err.msg);
    size_t each = (size_t)x->cfg.n_routed_experts;
    x->n = each * (size_t)x->cfg.num_hidden_layers;
    x->group = calloc(x->n, sizeof *x->group);
    x->part = calloc(x->n * 6, sizeof(ckpt_tensor *));
    if (!x->group || !x->part) die("out of memory");
    for (size_t i = 0; i < x->n; i++) {
        for (size_t p = 0; p < 6; p++) {
            char full[96];
            snprintf(full, sizeof full, "layers.%zu.ffn.experts.%zu.%s", i / each, i % each,
                     name[p]);
            if (!(x->part[i * 6 + p] = ckpt_find(x->c, full))) die(full);
        }
        x->group[i] = (read_group){x->part + i * 6, 6};
    }
}

static void experts_close(experts *x) {
    free(x->group);
    free(x->part);
    ckpt_close(x->c);
}

/* n different experts in an order that follows from the seed. */
static size_t *draw(const experts *x, size_t n, uint64_t seed) {
    size_t *id = calloc(x->n, sizeof *id);
    if (!id || n > x->n) die("too few experts");
    for (size_t i = 0; i < x->n; i++) id[i] = i;
    for (size_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t j = i + (size_t)((seed >> 33) % (x->n - i)), t = id[i];
        id[i] = id[j], id[j] = t;
    }
    return id;
}

typedef struct { int shard; uint64_t off; unsigned len; } piece;

static int by_place(const void *a, const void *b) {
    const ckpt_tensor *x = *(const ckpt_tensor *const *)a, *y = *(const ckpt_tensor *const *)b;
    if (x->shard != y->shard) return x->shard < y->shard ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Cut one expert as offload.c does: parts that touch are one run, whole blocks, 1 MiB at most. */
static size_t cut(const read_group *g, piece *out, double *payload) {
    const ckpt_tensor *t[6];
    size_t n = 0;
    memcpy(t, g->part, sizeof t);
    qsort(t, 6, sizeof *t, by_place);
    for (int i = 0; i < 6;) {
        int shard = t[i]->shard;
        uint64_t begin = t[i]->offset, end = begin;
        for (; i < 6 && t[i]->shard == shard && t[i]->offset == end; i++) end += t[i]->bytes;
        *payload += (double)(end - begin);
        for (begin = begin / IO_ALIGN * IO_ALIGN; begin < end; begin += IO_PIECE) {
            uint64_t len = end - begin < IO_PIECE ? end - begin : IO_PIECE;
            len = (len + IO_ALIGN - 1) / IO_ALIGN * IO_ALIGN;
            out[n++] = (piece){shard, begin, (unsigned)len};
        }
    }
    return n;
}

typedef struct { const experts *x; struct io_uring ring; uint8_t *buf; } raw_loop;

static void raw_open(raw_loop *r, const experts *x) {
    int fd[MAX_SHARDS], n = ckpt_n_shards(x->c);
    struct iovec iov[IO_DEPTH];
    *r = (raw_loop){.x = x, .buf = take((size_t)IO_DEPTH * IO_PIECE)};
    for (int i = 0; i < n; i++) {
        fd[i] = open(ckpt_shard_path(x->c, i), O_RDONLY | O_DIRECT);
        if (fd[i] < 0) die("O_DIRECT is refused");
    }
    for (size_t i = 0; i < IO_DEPTH; i++)
        iov[i] = (struct iovec){r->buf + i * IO_PIECE, IO_PIECE};
    if (io_uring_queue_init(IO_DEPTH, &r->ring, 0) ||
        io_uring_register_files(&r->ring, fd, (unsigned)n) ||
        io_uring_register_buffers(&r->ring, iov, IO_DEPTH))
        die("io_uring is refused");
    for (int i = 0; i < n; i++) close(fd[i]);
}

static void raw_close(raw_loop *r) {
    io_uring_queue_exit(&r->ring);
    free(r->buf);
}

/* Seconds to read them all, always as many in flight as there may be. */
static double read_pieces(struct io_uring *ring, const piece *p, size_t n, uint8_t *buf) {
    int free_buf[IO_DEPTH], n_free = IO_DEPTH;
    size_t next = 0, in = 0;
    for (int i = 0; i < IO_DEPTH; i++) free_buf[i] = i;
    double begin = now_s();
    while (in < n) {
        for (; next < n && n_free; next++) {
            struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
            if (!sqe) break;
            int b = free_buf[--n_free];
            io_uring_prep_read_fixed(sqe, p[next].shard, buf + (size_t)b * IO_PIECE, p[next].len,
                                     p[next].off, b);
            sqe->flags |= IOSQE_FIXED_FILE;
            io_uring_sqe_set_data64(sqe, (unsigned)b);
        }
        if (io_uring_submit_and_wait(ring, 1) < 0) die("io_uring broke");
        struct io_uring_cqe *cqe;
        while (!io_uring_peek_cqe(ring, &cqe)) {
            if (cqe->res <= 0) die("a read failed");
            free_buf[n_free++] = (int)io_uring_cqe_get_data64(cqe);
            io_uring_cqe_seen(ring, cqe);
            in++;
        }
    }
    return now_s() - begin;
}

/* Bytes a second of these experts, read in one go. */
static double raw_rate(raw_loop *r, const size_t *id, size_t n) {
    double payload = 0;
    size_t n_pieces = 0, most = 6 * 2;             /* run ends                                  */
    for (int p = 0; p < 6; p++) most += r->x->part[p]->bytes / IO_PIECE + 1;
    piece *p = calloc(n * most, sizeof *p);
    if (!p) die("out of memory");
    for (size_t i = 0; i < n; i++) n_pieces += cut(&r->x->group[id[i]], p + n_pieces, &payload);
    double rate = payload / read_pieces(&r->ring, p, n_pieces, r->buf);
    free(p);
    return rate;
}

static void bench_raw(const char *dir, size_t n, uint64_t seed) {
    experts x;
    raw_loop r;
    experts_open(&x, dir);
    size_t *id = draw(&x, n, seed);
    raw_open(&r, &x);
    printf("raw %.6g GB/s\n", raw_rate(&r, id, n) / 1e9);
    raw_close(&r);
    free(id);
    experts_close(&x);
}

/* Come by experts with a window of pinned ones, each waited for in order. */
static void stream_experts(cache *c, const size_t *id, size_t n) {
    int slot[WINDOW];
    dsv4_err err;
    for (size_t i = 0; i < n + WINDOW; i++) {
        int *s = &slot[i % WINDOW];
        if (i >= WINDOW && i - WINDOW < n) {
            if (cache_wait(c, *s, &err)) die(err.msg);
            cache_unpin(c, *s);
        }
        if (i < n && (*s = cache_pass(c, id[i], &err)) < 0) die(err.msg);
    }
}

static void bench_cache(const char *dir, size_t n, uint64_t seed) {
    experts x;
    offload *o;
    cache *c;
    const char *note;
    dsv4_err err;
    experts_open(&x, dir);
    size_t *id = draw(&x, n + SLOTS, seed);
    if (offload_open(&o, x.c, &note, &err) ||
        cache_open(&c, o, x.group, x.n, SLOTS, &err)) die(err.msg);
    if (note) die(note);
    stream_experts(c, id + n, SLOTS);              /* all slots touched, their pages made */
    double begin = now_s(), bytes = (double)cache_get_stats(c)->read_bytes;
    stream_experts(c, id, n);
    double took = now_s() - begin;
    bytes = (double)cache_get_stats(c)->read_bytes - bytes;
    printf("cache %.6g GB/s\n", bytes / took / 1e9);
    cache_close(c);
    offload_close(o);
    free(id);
    experts_close(&x);
}

/* From nothing to the first expert in memory, the model's tensors found and checked on the way. */
static void bench_start(const char *dir) {
    experts x;
    offload *o;
    cache *c;
    dsv4_weights *w;
    const char *note;
    dsv4_err err;
    double begin = now_s();
    experts_open(&x, dir);
    if (weights_bind(&w, x.c, &x.cfg, &err) || offload_open(&o, x.c, &note, &err) ||
        cache_open(&c, o, x.group, x.n, 4 * SLOTS, &err)) die(err.msg);
    int slot = cache_get(c, 0, &err);
    if (slot < 0 || cache_wait(c, slot, &err)) die(err.msg);
    printf("start %.6g s\n", now_s() - begin);
    cache_unpin(c, slot);
    cache_close(c);
    offload_close(o);
    weights_close(w);
    experts_close(&x);
}

/* === 5. A run =================================================================================
 * Windows of decoding, each next to a raw loop, and then the same experts asked for in the same
 * order from a cache of as many slots, with nothing computed between.  Nobody knows when a read
 * lands while nobody looks, so reading is judged where there is nothing else to do.              */

enum { WINDOW_TOKENS = 4, WARM_TOKENS = 200, RAW_EXPERTS = 50 };

typedef struct {                   /* one layer of one token, up to the next layer's experts    */
    size_t id[MAX_TOPK];
    int n;
    double dense, compute;         /* seconds                                                   */
    double read;                   /* bytes                                                     */
} step;

typedef struct {
    const dsv4_engine *e;
    size_t n_experts;              /* a layer                                                   */
    step *steps;
    size_t n;
    double dense, compute, read;   /* when the last one began                                   */
} run_log;

/* What came since the last call belongs to the step that began there. */
static void step_end(run_log *g) {
    const dsv4_stats *s = engine_stats(g->e);
    double dense = 0, compute = s->op_s[OPC_EXPERTS] - s->expert_wait_s;
    double read = (double)engine_expert_stats(g->e)->read_bytes;
    for (int i = 0; i < OPC_N; i++) dense += i == OPC_EXPERTS ? 0 : s->op_s[i];
    if (g->n) {
        step *last = &g->steps[g->n - 1];
        last->dense += dense - g->dense;
        last->compute += compute - g->compute;
        last->read += read - g->read;
    }
    g->dense = dense, g->compute = compute, g->read = read;
}

static void on_step(void *arg, int64_t pos, int layer, const int32_t *expert, int n) {
    run_log *g = arg;
    (void)pos;
    step_end(g);
    step *s = &g->steps[g->n++];
    *s = (step){.n = n};
    for (int i = 0; i < n; i++) s->id[i] = (size_t)layer * g->n_experts + (size_t)expert[i];
}

/* Seconds of n tokens, drawn evenly. */
static double decode(dsv4_session *s, run_log *g, const dsv4_config *c, float *logits, int n) {
    static uint64_t seed = 1;
    dsv4_err err;
    double begin = now_s();
    for (int i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        int32_t id = (int32_t)((seed >> 33) % (uint64_t)c->vocab_size);
        if (session_forward(s, &id, 1, &err) || session_logits(s, 0, 1, logits, &err))
            die(err.msg);
    }
    step_end(g);
    return now_s() - begin;
}

/* Decode until every slot was used, then in windows.  Leaves in edge[i] where window i begins; the
 * number of slots is returned. */
static int run_windows(const char *dir, uint64_t ram, const experts *x, run_log *g, size_t *edge,
                       size_t n_windows) {
    raw_loop raw;
    dsv4_session *s;
    dsv4_engine *e;
    dsv4_err err;
    const int64_t ctx = WARM_TOKENS + WINDOW_TOKENS * (int64_t)n_windows;
    dsv4_opts o = {.dir = dir, .ram_bytes = ram, .ctx = ctx, .trace = on_step, .trace_arg = g};
    if (engine_open(&e, &x->cfg, x->c, &o, &err) || engine_load(e, NULL, NULL, &err) ||
        session_open(&s, e, NULL, NULL, &err)) die(err.msg);
    g->e = e;
    float *logits = take((size_t)x->cfg.vocab_size * sizeof *logits);
    for (int i = 0; i < WARM_TOKENS && !engine_expert_stats(e)->evictions; i++)
        (void)decode(s, g, &x->cfg, logits, 1);
    raw_open(&raw, x);
    for (size_t i = 0; i < n_windows; i++) {
        edge[i] = g->n;
        double wall = decode(s, g, &x->cfg, logits, WINDOW_TOKENS), least = 0;
        size_t *id = draw(x, RAW_EXPERTS, i + 1);
        double rate = raw_rate(&raw, id, RAW_EXPERTS);
        for (const step *t = g->steps + edge[i]; t < g->steps + g->n; t++)
            least += t->dense + (t->compute > t->read / rate ? t->compute : t->read / rate);
        printf("decode.wall %.6g s\ndecode.least %.6g s\n", wall, least);
        free(id);
    }
    edge[n_windows] = g->n;
    int n_slots = engine_plan(e)->n_slots;
    raw_close(&raw);
    free(logits);
    session_close(s);
    engine_close(e);
    return n_slots;
}

/* Ask for a step's experts and wait for them, as decoding does. */
static void replay_step(cache *c, const step *s) {
    int slot[MAX_TOPK];
    dsv4_err err;
    for (int i = 0; i < s->n; i++)
        if ((slot[i] = cache_get(c, s->id[i], &err)) < 0) die(err.msg);
    for (int i = 0; i < s->n; i++) {
        if (cache_wait(c, slot[i], &err)) die(err.msg);
        cache_unpin(c, slot[i]);
    }
}

static void replay(const experts *x, const run_log *g, const size_t *edge, size_t n_windows,
                   int n_slots) {
    raw_loop raw;
    offload *o;
    cache *c;
    const char *note;
    dsv4_err err;
    if (offload_open(&o, x->c, &note, &err) || cache_open(&c, o, x->group, x->n, n_slots, &err))
        die(err.msg);
    for (size_t i = 0; i < edge[0]; i++) replay_step(c, &g->steps[i]);
    raw_open(&raw, x);
    for (size_t i = 0; i < n_windows; i++) {
        double begin = now_s(), bytes = (double)cache_get_stats(c)->read_bytes;
        for (size_t j = edge[i]; j < edge[i + 1]; j++) replay_step(c, &g->steps[j]);
        double took = now_s() - begin;
        bytes = (double)cache_get_stats(c)->read_bytes - bytes;
        size_t n = (size_t)(bytes / (double)cache_slot_bytes(x->group, 1));
        size_t *id = draw(x, n, n_windows + i + 1);
        printf("replay %.6g GB/s\nreplay.raw %.6g GB/s\n", bytes / took / 1e9,
               raw_rate(&raw, id, n) / 1e9);
        free(id);
    }
    raw_close(&raw);
    cache_close(c);
    offload_close(o);
}

static void bench_run(const char *dir, uint64_t ram, size_t n_windows) {
    experts x;
    experts_open(&x, dir);
    run_log g = {.n_experts = (size_t)x.cfg.n_routed_experts};
    size_t tokens = WARM_TOKENS + WINDOW_TOKENS * n_windows;
    g.steps = calloc(tokens * (size_t)x.cfg.num_hidden_layers, sizeof *g.steps);
    size_t *edge = calloc(n_windows + 1, sizeof *edge);
    if (!g.steps || !edge) die("out of memory");
    int n_slots = run_windows(dir, ram, &x, &g, edge, n_windows);
    replay(&x, &g, edge, n_windows, n_slots);
    free(edge);
    free(g.steps);
    experts_close(&x);
}

/* === 6. Main ================================================================================== */

static const struct { const char *name; void (*run)(dsv4_exec *ex, int threads); } kernels[] = {
    {"read", bench_read}, {"fma", bench_fma}, {"fp4", bench_fp4}, {"fp4l2", bench_fp4l2},
    {"fp8", bench_fp8}, {"fp8l2", bench_fp8l2}, {"bf16", bench_bf16}, {"gemm", bench_gemm},
    {"index", bench_index},
};
static const struct { const char *name; void (*run)(const char *, size_t, uint64_t); } disks[] = {
    {"raw", bench_raw}, {"cache", bench_cache},
};

/* How many arguments it took. */
static int measure(char **arg, int n_args, dsv4_exec *one, dsv4_exec *all) {
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (!strcmp(arg[0], kernels[i].name)) {
            kernels[i].run(one, 1);
            if (n_processors() > 1) kernels[i].run(all, n_processors());
            return 1;
        }
    for (size_t i = 0; i < sizeof disks / sizeof *disks; i++)
        if (!strcmp(arg[0], disks[i].name) && n_args >= 4) {
            disks[i].run(arg[1], strtoul(arg[2], NULL, 10), strtoul(arg[3], NULL, 10));
            return 4;
        }
    if (!strcmp(arg[0], "run") && n_args >= 4) {
        bench_run(arg[1], strtoull(arg[2], NULL, 10), strtoul(arg[3], NULL, 10));
        return 4;
    }
    if (strcmp(arg[0], "start") || n_args < 2) die("usage: see the top of tests/bench.c");
    bench_start(arg[1]);
    return 2;
}

int main(int argc, char **argv) {
    dsv4_exec *one, *all;
    dsv4_err err;
    if (exec_open(&one, 1, &err) || exec_open(&all, n_processors(), &err)) die(err.msg);
    for (int i = 1; i < argc;) i += measure(argv + i, argc - i, one, all);
    exec_close(all);
    exec_close(one);
    return 0;
}
