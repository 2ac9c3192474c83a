/* mkpark.c -- parked context of any length at once: random rows, states and token ids.
 *
 *   mkpark MODEL_DIR KV_DIR N_TOKENS IDS_OUT      so that `dsv4 run --ids IDS_OUT` goes on behind
 *                                                 N_TOKENS that nobody put through the model
 *   mkpark --restore LAYERS MODEL_DIR KV_DIR N_TOKENS    the same for as many layers as a larger
 *                                                 model has, and how fast they come back
 *   mkpark --logits RAM KV_RAM MODEL_DIR KV_DIR N_TOKENS OUT    goes on behind what is parked:
 *                                                 every logit of it, as bytes, into OUT
 *
 * Rows are noise of variance 1, rounded by the model's own operations, so that every code and
 * scale in them is one that a prompt could have left.  Ids follow from their position alone: what
 * is parked for a long context serves every shorter one.  --restore prints a line "name value
 * unit" for each figure and repetition: .cold into fresh memory, .warm into the same once more.
 * --logits resumes with the ids that IDS_OUT has, then takes the likeliest token ANSWER times; its
 * lines tell the answer's ids, and where KV was: KV_RAM 0 is as dsv4 without --kv-ram.
 *
 * Contents  1 noise   2 parking   3 the model's key   4 restoring   5 going on   6 main          */
#define _GNU_SOURCE
#include <unistd.h>
#include <zstd.h>

static ssize_t count_pread(int fd, void *buf, size_t n, off_t off);
static size_t time_unpack(ZSTD_DCtx *ctx, void *dst, size_t room, const void *src, size_t n);
#include "../dsv4.c"
#define pread count_pread
#define ZSTD_decompressDCtx time_unpack
#include "../kv.c"
#undef pread
#undef ZSTD_decompressDCtx

enum {
    MORE_IDS = 8,                  /* behind what is parked                                     */
    ANSWER = 16,                   /* tokens, as bench_long.py has dsv4 say                     */
    REPETITIONS = 7,
    RAW_BYTES = 8 << 20,           /* of one direct read                                        */
};

static struct { double unpack_s; uint64_t read_bytes; } seen;

static ssize_t count_pread(int fd, void *buf, size_t n, off_t off) {
    ssize_t got = pread(fd, buf, n, off);
    if (got > 0) seen.read_bytes += (uint64_t)got;
    return got;
}

static size_t time_unpack(ZSTD_DCtx *ctx, void *dst, size_t room, const void *src, size_t n) {
    double begin = now_s();
    size_t got = ZSTD_decompressDCtx(ctx, dst, room, src, n);
    seen.unpack_s += now_s() - begin;
    return got;
}

/* === 1. Noise ================================================================================= */

typedef struct {                   /* a context that is being written                           */
    const dsv4_config *cfg;
    kv_opts opts;
    kv_cache *kv;
    dsv4_exec *ex;
    int32_t *ids;                  /* [ctx + MORE_IDS]                                          */
    float *x;                      /* noise, before it becomes rows                             */
    uint8_t *rows, *marks;
    uint64_t state;                /* of the noise                                              */
} writer;

/* splitmix64: any number of them from one counter. */
static uint64_t mix(uint64_t i) {
    i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9u;
    i = (i ^ i >> 27) * 0x94d049bb133111ebu;
    return i ^ i >> 31;
}

/* Sums of four bytes: near enough to normal, with variance 1. */
static void noise(writer *w, float *x, size_t n) {
    const uint64_t low = 0x00ff00ff00ff00ff;
    for (size_t i = 0; i < n; i++) {
        uint64_t word = mix(w->state += 0x9e3779b97f4a7c15u);
        uint64_t pair = (word & low) + (word >> 8 & low);
        x[i] = ((float)((pair & 0xffff) + (pair >> 16 & 0xffff)) - 510) / 147.8f;
    }
}

/* n rows of a kind into w->rows, or behind `to`. */
static void make_rows(writer *w, kv_kind kind, int n, uint8_t *to) {
    const dsv4_config *c = w->cfg;
    int d = kind == KV_KEYS ? c->index_head_dim : c->head_dim;
    noise(w, w->x, (size_t)n * (size_t)d);
    if (kind == KV_KEYS) ops_cpu.index_round(to, w->x, n, d, true, w->ex);
    else ops_cpu.kv_round(to, w->x, n, d, c->qk_rope_head_dim, true, w->ex);
}

/* What a layer carries beyond its rows. */
static void make_state(writer *w, int layer) {
    const dsv4_config *c = w->cfg;
    kv_state s = kv_get_state(w->kv, layer);
    ring_shape ring[MAX_RINGS];
    float *at[MAX_RINGS];
    memcpy(at, &s, sizeof at);
    make_rows(w, KV_ENTRIES, c->sliding_window, s.ring);
    for (int i = 1, n = rings_of(w->kv, layer, ring); i < n; i++)
        noise(w, at[i], ring[i].row / sizeof(float) * (size_t)ring[i].len);
}

/* === 2. Parking =============================================================================== */

/* Those of n parked tokens and MORE_IDS; the caller frees them. */
static int32_t *make_ids(const dsv4_config *c, int64_t n) {
    int32_t *ids = malloc((size_t)(n + MORE_IDS) * sizeof *ids);
    for (int64_t i = 0; ids && i < n + MORE_IDS; i++)  /* special ones lie at both ends: none */
        ids[i] = 3 + (int32_t)(mix((uint64_t)i + 1) % (unsigned)(c->vocab_size / 2));
    return ids;
}

static int writer_open(writer *w, const char *kv_dir, dsv4_err *err) {
    const dsv4_config *c = w->cfg;
    size_t rows = (size_t)(c->sliding_window > SEGMENT_TOKENS ? c->sliding_window : SEGMENT_TOKENS);
    if (park_open(&w->opts.park, kv_dir, 0, err) || exec_open(&w->ex, default_threads(), err) ||
        kv_open(&w->kv, NULL, c, &w->opts, err))
        return -1;
    w->ids = make_ids(c, w->opts.ctx);
    w->x = malloc(rows * MAX_HEAD_DIM * sizeof *w->x);
    w->rows = aligned_alloc(64, rows * MAX_HEAD_DIM * sizeof(float));
    w->marks = malloc(kv_mark_bytes(c, &w->opts));
    if (!w->ids || !w->x || !w->rows || !w->marks) return fail(err, "out of memory");
    for (int l = 0; l < w->opts.n_blocks; l++) make_state(w, l);
    return 0;
}

static void writer_close(writer *w) {
    kv_close(w->kv);
    exec_close(w->ex);
    park_close(w->opts.park);
    free(w->ids);
    free(w->x);
    free(w->rows);
    free(w->marks);
}

/* The rows that a segment adds to a layer. */
static int append_rows(writer *w, int layer, int64_t pos, dsv4_err *err) {
    int ratio = w->cfg->compress_ratios[layer];
    for (int k = 0; k < KV_KINDS; k++) {
        bool has = k == KV_KEYS ? ratio == 4 : ratio > 0;
        int n = has ? (int)((pos + SEGMENT_TOKENS) / ratio - pos / ratio) : 0;
        if (!n) continue;
        make_rows(w, (kv_kind)k, n, w->rows);
        if (kv_append(w->kv, layer, (kv_kind)k, w->rows, n, err)) return -1;
    }
    return 0;
}

static int park_all(writer *w, dsv4_err *err) {
    for (int64_t pos = 0, end; pos < w->opts.ctx; pos = end) {
        end = pos + SEGMENT_TOKENS;
        for (int l = 0; l < w->opts.n_blocks; l++) {
            if (append_rows(w, l, pos, err)) return -1;
            kv_mark(w->kv, l, end, w->marks);
        }
        if (kv_park(w->kv, w->ids, pos, end, w->marks, err)) return -1;
        if (end == w->opts.ctx || end % (1 << 17) == 0)
            fprintf(stderr, "mkpark: parked %lld of %lld tokens\n", (long long)end,
                    (long long)w->opts.ctx);
    }
    return 0;
}

/* === 3. The model's key ======================================================================= */

/* As an engine has it: it takes the small weights only. */
static int model_key(park_key *key, const dsv4_config *cfg, const char *dir, dsv4_err *err) {
    const dense_mode small = {.streamed = true};
    const char *note;
    ckpt *c = NULL;
    dsv4_engine *e = calloc(1, sizeof *e);
    if (!e) return fail(err, "out of memory");
    e->cfg = cfg;
    int rc = ckpt_open(&c, dir, err) || weights_bind(&e->w, c, cfg, err) ||
             offload_open(&e->off, c, &note, err) ||
             arena_open(&e->dense, weights_size(e->w, small), "the small weights", err) ||
             weights_load(e->w, e->off, &e->dense, small, NULL, NULL, err) ? -1 : 0;
    if (rc == 0) *key = fingerprint(e);
    engine_close(e);
    ckpt_close(c);
    return rc;
}

static int write_ids(const writer *w, const char *path, dsv4_err *err) {
    FILE *f = fopen(path, "w");
    if (!f) return fail(err, "write %s: %s", path, strerror(errno));
    for (int64_t i = 0; i < w->opts.ctx + MORE_IDS; i++) fprintf(f, "%d\n", w->ids[i]);
    bool bad = ferror(f);
    return fclose(f) || bad ? fail(err, "write %s: %s", path, strerror(errno)) : 0;
}

/* === 4. Restoring ============================================================================= */

/* Bytes a second of plain direct reads of the same files. */
static int raw_rate(const writer *w, double *bytes_s, dsv4_err *err) {
    char file[MAX_NAME];
    uint8_t *buf = aligned_alloc(BLOCK, RAW_BYTES);
    uint64_t bytes = 0;
    double begin = now_s();
    for (int64_t i = 1; buf && i <= w->opts.ctx / SEGMENT_TOKENS; i++) {
        segment_file(file, w->kv->key[i]);
        int fd = openat(w->opts.park->dir, file, O_RDONLY | O_DIRECT | O_CLOEXEC);
        ssize_t got;
        for (off_t at = 0; fd >= 0 && (got = pread(fd, buf, RAW_BYTES, at)) > 0; at += got)
            bytes += (uint64_t)got;
        if (fd >= 0) close(fd);
    }
    *bytes_s = (double)bytes / (now_s() - begin);
    free(buf);
    return bytes ? 0 : fail(err, "nothing can be read around the page cache");
}

static int restore_once(const writer *w, kv_cache *kv, const char *name, dsv4_err *err) {
    seen.read_bytes = 0, seen.unpack_s = 0;
    double begin = now_s();
    int64_t pos = kv_resume(kv, w->ids, w->opts.ctx + 1, 0, err);
    double took = now_s() - begin;
    if (pos < 0) return -1;
    if (pos != w->opts.ctx) return fail(err, "only %lld tokens came back", (long long)pos);
    printf("restore.%s %.6g s\nunpack.%s %.6g s\nread.%s %.6g bytes\n", name, took, name,
           seen.unpack_s, name, (double)seen.read_bytes);
    return 0;
}

static int restore(const writer *w, dsv4_err *err) {
    kv_cache *kv;
    double raw;
    int rc = 0;
    for (int i = 0; i < REPETITIONS && rc == 0; i++) {
        if (raw_rate(w, &raw, err) || kv_open(&kv, NULL, w->cfg, &w->opts, err)) return -1;
        printf("raw %.6g bytes/s\n", raw);
        rc = restore_once(w, kv, "cold", err) || restore_once(w, kv, "warm", err) ? -1 : 0;
        kv_close(kv);
    }
    return rc;
}

/* === 5. Going on ============================================================================== */

/* Behind n parked tokens of ids [n + MORE_IDS]: the logits of all that follow, into out. */
static int say_more(dsv4_session *s, const int32_t *ids, int64_t n, int vocab, FILE *out,
                    dsv4_err *err) {
    const sample_opts likeliest = {.top_p = 1, .repetition_penalty = 1};
    sampler *pick = NULL;
    float *logits = malloc((size_t)MORE_IDS * (size_t)vocab * sizeof *logits);
    int rc = logits ? sampler_open(&pick, &likeliest, vocab, err) : fail(err, "out of memory");
    int64_t pos = rc ? -1 : session_resume(s, ids, n + MORE_IDS, 0, err);
    if (pos >= 0 && pos != n) rc = fail(err, "only %lld tokens came back", (long long)pos);
    if (pos < 0) rc = -1;
    const int32_t *in = ids + n;
    int32_t next;
    for (int i = 0, m = MORE_IDS; i < ANSWER && rc == 0; i++, in = &next, m = 1) {
        rc = session_forward(s, in, m, err) || session_logits(s, 0, m, logits, err) ? -1 : 0;
        if (rc) break;
        fwrite(logits, sizeof *logits, (size_t)m * (size_t)vocab, out);
        next = sampler_next(pick, logits + (size_t)(m - 1) * (size_t)vocab);
        printf("id %d token\n", next);
    }
    sampler_close(pick);
    free(logits);
    return rc;
}

/* As `dsv4 run` does it, but that nothing ends the answer. */
static int go_on(const dsv4_config *cfg, const dsv4_opts *o, int64_t n, const char *path,
                 dsv4_err *err) {
    ckpt *c = NULL;
    dsv4_engine *e = NULL;
    dsv4_session *s = NULL;
    int32_t *ids = make_ids(cfg, n);
    FILE *out = fopen(path, "wb");
    int rc = !ids ? fail(err, "out of memory") : 0;
    if (rc == 0 && !out) rc = fail(err, "write %s: %s", path, strerror(errno));
    if (rc == 0)
        rc = ckpt_open(&c, o->dir, err) || engine_open(&e, cfg, c, o, err) ||
             engine_load(e, NULL, NULL, err) || session_open(&s, e, NULL, NULL, err) ||
             say_more(s, ids, n, cfg->vocab_size, out, err) ? -1 : 0;
    if (rc == 0) {
        const kv_plan *p = &engine_plan(e)->kv_plan;
        const kv_stats *k = session_kv_stats(s);
        printf("kv.ram %.0f bytes\nkv.file %.0f bytes\nkv.read %.0f bytes\nkv.blocks %.0f read\n",
               (double)p->ram, (double)p->file, (double)k->read_bytes, (double)k->blocks_read);
    }
    bool bad = out && ferror(out);
    if (out && (fclose(out) || bad) && rc == 0) rc = fail(err, "write %s: it failed", path);
    session_close(s);
    engine_close(e);
    ckpt_close(c);
    free(ids);
    return rc;
}

/* === 6. Main ================================================================================== */

/* As published: what follows the first two layers is CSA and HCA in turn. */
static void more_layers(dsv4_config *c, int n) {
    for (int l = c->num_hidden_layers; l < n; l++) c->compress_ratios[l] = l % 2 ? 128 : 4;
    c->compress_ratios[n] = 0;
    c->num_hidden_layers = n;
}

/* Park n tokens, then either what --restore measures (layers > 0) or the ids. */
static int main_park(dsv4_config *cfg, char **arg, int layers, int64_t n, dsv4_err *err) {
    writer w = {.cfg = cfg, .opts = {.ctx = n, .packed = true}, .state = 1};
    int rc = 0;
    if (layers) more_layers(cfg, layers);
    else rc = model_key(&w.opts.model, cfg, arg[0], err);
    w.opts.n_blocks = cfg->num_hidden_layers;
    if (rc == 0) rc = writer_open(&w, arg[1], err);
    if (rc == 0) rc = park_all(&w, err);
    if (rc == 0) rc = layers ? restore(&w, err) : write_ids(&w, arg[3], err);
    writer_close(&w);
    return rc;
}

static int main_logits(const dsv4_config *cfg, char **arg, const char *ram, const char *kv_ram,
                       int64_t n, dsv4_err *err) {
    dsv4_opts o = {.dir = arg[0], .ram_bytes = strtoull(ram, NULL, 10), .kv_dir = arg[1],
                   .kv_ram = strtoull(kv_ram, NULL, 10), .ctx = n + MORE_IDS + ANSWER,
                   .span_hint = MORE_IDS};
    if (park_open(&o.park, arg[1], 0, err)) return -1;
    int rc = go_on(cfg, &o, n, arg[3], err);
    park_close(o.park);
    return rc;
}

int main(int argc, char **argv) {
    dsv4_config cfg;
    dsv4_err err;
    bool again = argc == 6 && !strcmp(argv[1], "--restore");
    bool logits = argc == 8 && !strcmp(argv[1], "--logits");
    char **arg = argv + (logits ? 4 : again ? 3 : 1);
    int layers = again ? atoi(argv[2]) : 0;
    int64_t n = logits || again || argc == 5 ? atoll(arg[2]) : 0;
    bool sane = !again || (layers > 0 && layers <= MAX_LAYERS);
    if (!sane || n < SEGMENT_TOKENS || n % SEGMENT_TOKENS) {
        fprintf(stderr, "usage: see the top of tests/mkpark.c; N_TOKENS is a multiple of %d\n",
                SEGMENT_TOKENS);
        return 2;
    }
    int rc = config_load(&cfg, arg[0], &err);
    if (rc == 0) rc = logits ? main_logits(&cfg, arg, argv[2], argv[3], n, &err)
                             : main_park(&cfg, arg, layers, n, &err);
    if (rc) fprintf(stderr, "mkpark: %s\n", err.msg);
    return rc ? 1 : 0;
}
