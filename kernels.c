/* kernels.c -- the CPU twins of the operations in kernels.cu, and the threads they run on.
 *
 *      operation  ->  exec_for: blocks of items, handed out by a counter  ->  item function
 *                          one item = a tile of rows, a token, or a block of entries
 *
 * The contracts stand in kernels.cu; here a comment says only how a twin differs.
 *
 * Invariants   1 the bits of an output element depend on its row and token only: an item computes
 *                whole elements, and each sum has one order (eight lanes, then sum8's tree)
 *              2 no allocation outside exec_open and exec_measure, no state outside dsv4_exec
 *              3 the same bits with AVX2 and without: lanes are lanes of GCC vectors, and each
 *                helper of section 1 that has two bodies computes the same in both
 * Contents     1 vectors   2 thread pool   3 exp and rounding   4 cheap operations
 *              5 dot products   6 linear   7 compress   8 four bits   9 index scores and top-k
 *              10 attend   11 hyper-connections   12 experts   13 measuring   14 the table      */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* === 1. Vectors ===============================================================================
 * Eight lanes.  Operators come from GCC's vector extension, the functions below do the rest.    */

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

/* What depends on constant arguments, or on what stays in registers. */
#define INLINE static inline __attribute__((always_inline))

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline size_t scales_of(int d) { return (size_t)(d + 127) / 128; }

/* What needs no more than GCC's vectors:
 *   load8, load_halves          anything of 32 bytes at any address; 16 bytes at lo and 16 at hi
 *   load_upto8, store_upto8     the first n floats, the rest zeros; all eight if n is larger
 *   abs8                        the sign bit cleared, of NaN and -0 too
 *   max_lane8                   the largest lane; for a maximum the order does not matter
 *   sum8                        ((v0 + v4) + (v2 + v6)) + ((v1 + v5) + (v3 + v7)), this tree always
 *   prefetch                    ask for the cache lines of `bytes` bytes at p, soon to be read */
static inline f32x8 splat8(float x) { return (f32x8){x, x, x, x, x, x, x, x}; }
static inline f32x8 load8(const void *p) {
    f32x8 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store8(float *p, f32x8 v) { memcpy(p, &v, sizeof v); }
static inline u32x8 load_halves(const uint8_t *lo, const uint8_t *hi) {
    u32x4 a, b;
    memcpy(&a, lo, sizeof a);
    memcpy(&b, hi, sizeof b);
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}
static inline f32x8 load_upto8(const float *p, int n) {
    f32x8 v = splat8(0);
    if (n >= 8) return load8(p);
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}
static inline void store_upto8(float *p, f32x8 v, int n) {
    if (n >= 8) store8(p, v);
    else memcpy(p, &v, (size_t)n * sizeof *p);
}
static inline f32x8 abs8(f32x8 v) { return (f32x8)((u32x8)v & 0x7fffffff); }
static inline float max_lane8(f32x8 v) {
    float top = v[0];
    for (int i = 1; i < 8; i++) top = v[i] > top ? v[i] : top;
    return top;
}
static inline float sum8(f32x8 v) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    return v[0] + v[1];
}
static inline void prefetch(const uint8_t *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* What GCC does not make of vectors by itself, first with AVX2, then in plain C:
 *   fma8                    a*b + c, rounded once
 *   min8, max8              a < b ? a : b and a > b ? a : b, so that a NaN in b passes
 *   clamp8                  x between lo and hi
 *   i8_load8                eight bytes, as -128..127
 *   bf16_load8              eight numbers, exactly
 *   look_up                 table[code] of each code below 16
 *   pair_dots               of neighbours: u0 * s0 + u1 * s1, u unsigned, s signed, in int16
 *   pair_sums               of neighbours: (v0 + v1) * k */
#ifdef __AVX2__
static inline f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
static inline f32x8 min8(f32x8 a, f32x8 b) { return _mm256_min_ps(a, b); }
static inline f32x8 max8(f32x8 a, f32x8 b) { return _mm256_max_ps(a, b); }
static inline i32x8 clamp8(i32x8 x, i32x8 lo, i32x8 hi) {
    return (i32x8)_mm256_min_epi32(_mm256_max_epi32((__m256i)x, (__m256i)lo), (__m256i)hi);
}
static inline i32x8 i8_load8(const uint8_t *p) {
    return (i32x8)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
static inline f32x8 bf16_load8(const uint16_t *p) {
    __m128i v = _mm_loadu_si128((const __m128i *)p);
    return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
}
static inline u8x32 look_up(const uint8_t table[16], u8x32 code) {
    __m128i half = _mm_loadu_si128((const __m128i *)table);
    return (u8x32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), (__m256i)code);
}
static inline u16x16 pair_dots(u8x32 u, u8x32 s) {
    return (u16x16)_mm256_maddubs_epi16((__m256i)u, (__m256i)s);
}
static inline i32x8 pair_sums(u16x16 v, int16_t k) {
    return (i32x8)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(k));
}
#else
static inline f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
    for (int i = 0; i < 8; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
static inline i32x8 pick8(i32x8 m, i32x8 a, i32x8 b) { return (m & a) | (~m & b); }
static inline f32x8 min8(f32x8 a, f32x8 b) { return (f32x8)pick8(a < b, (i32x8)a, (i32x8)b); }
static inline f32x8 max8(f32x8 a, f32x8 b) { return (f32x8)pick8(a > b, (i32x8)a, (i32x8)b); }
static inline i32x8 clamp8(i32x8 x, i32x8 lo, i32x8 hi) {
    return pick8(x < lo, lo, pick8(x > hi, hi, x));
}
static inline i32x8 i8_load8(const uint8_t *p) {
    return ((i32x8){p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]} ^ 128) - 128;
}
static inline f32x8 bf16_load8(const uint16_t *p) {
    u32x8 v = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    return (f32x8)(v << 16);
}
static inline u8x32 look_up(const uint8_t table[16], u8x32 code) {
    for (int i = 0; i < 32; i++) code[i] = table[code[i]];
    return code;
}
static inline u16x16 pair_dots(u8x32 u, u8x32 s) {
    u16x16 a = (u16x16)u, b = (u16x16)s;
    return (a & 255) * (u16x16)((i16x16)(b << 8) >> 8) + (a >> 8) * (u16x16)((i16x16)b >> 8);
}
static inline i32x8 pair_sums(u16x16 v, int16_t k) {
    return (((i32x8)((u32x8)v << 16) >> 16) + ((i32x8)v >> 16)) * k;
}
#endif

/* 2^-120 of eight e4m3 numbers: their bits, moved to where F32 has its sign, exponent and mantissa,
 * are F32 numbers, subnormals too.  A NaN code counts as 480. */
static inline f32x8 e4m3_load8(const uint8_t *p) {
    return (f32x8)((u32x8)i8_load8(p) << 20 & 0x87f00000);
}

/* === 2. Thread pool ===========================================================================
 *
 *   caller                                        worker
 *   write the job, next = 0                       sleep until the bell changes
 *   gate = OPEN, ring the bell, wake some         join: gate + 1, if it is OPEN
 *   take blocks until there are none              take blocks until there are none
 *   gate - OPEN: nobody joins any more            leave: gate - 1; the last one of a closed
 *   wait until gate is 0                          gate wakes the caller
 *
 * A worker that comes late finds the gate closed and sleeps again: a small job ends as soon as
 * the caller has done it.  Every wait spins for a few microseconds, then sleeps in the kernel. */

enum { SPINS = 60 };               /* pauses of 40 to 140 cycles each: a few microseconds       */
#define OPEN 0x80000000u           /* in gate; the other bits count workers inside */

/* Do one item of a grid.  Called by several threads at once with the same arg. */
typedef struct { int64_t row; int col; } place;
typedef void (*item_fn)(const void *arg, place at);

struct dsv4_exec {
    int n_workers;
    pthread_t worker[MAX_THREADS];
    item_fn fn;                    /* the job; written while the gate is shut and nobody inside */
    const void *arg;
    int64_t n_items, n_cols, grain;
    _Atomic bool stop;             /* told once, by exec_close                                  */
    /* Each on a cache line of its own, for each is written while others are waited on. */
    alignas(64) _Atomic int64_t next;   /* first item that nobody has taken                     */
    alignas(64) _Atomic uint32_t gate;  /* OPEN, and how many workers are inside                */
    alignas(64) _Atomic uint32_t bell;  /* grows by one a job; workers sleep on it              */
};

/* Wake up to n sleepers on *word. */
static void futex_wake(_Atomic uint32_t *word, int n) {
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

/* Return once *word is (or was for a moment) not `old`. */
static void wait_change(_Atomic uint32_t *word, uint32_t old) {
    for (int64_t i = 0; atomic_load(word) == old; i++) {
        if (i >= SPINS) (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#if defined __x86_64__
        else __builtin_ia32_pause();
#elif defined __aarch64__
        else __asm__ volatile("isb");
#endif
    }
}

/* Work until every item is taken.  The counter may pass n_items by a grain a thread. */
static void take_blocks(dsv4_exec *ex) {
    for (;;) {
        int64_t begin = atomic_fetch_add(&ex->next, ex->grain);
        int64_t end = min_i64(begin + ex->grain, ex->n_items);
        if (begin >= end) return;
        for (int64_t i = begin; i < end; i++)
            ex->fn(ex->arg, (place){i / ex->n_cols, (int)(i % ex->n_cols)});
    }
}

/* A job may have come and gone, or a newer one begun, between hearing the bell and joining: either
 * is fine, for the gate alone decides, and the job's fields do not change while it is open. */
static void *worker_main(void *arg) {
    dsv4_exec *ex = arg;
    uint32_t heard = 0;                                      /* the bell as last looked at */
    for (;;) {
        wait_change(&ex->bell, heard);
        heard = atomic_load(&ex->bell);
        if (atomic_load(&ex->stop)) return NULL;
        uint32_t gate = atomic_load(&ex->gate);
        while (gate & OPEN && !atomic_compare_exchange_weak(&ex->gate, &gate, gate + 1)) {}
        if (!(gate & OPEN)) continue;
        take_blocks(ex);
        if (atomic_fetch_sub(&ex->gate, 1) == 1) futex_wake(&ex->gate, 1);
    }
}

/* fn at each place of a grid, once, row by row; the caller takes part, and alone does what is a
 * single block.  Blocks let each thread take several, and have at most `most` items.  One job at a
 * time, never from inside one. */
static void exec_for(dsv4_exec *ex, int64_t n_rows, int n_cols, int64_t most, item_fn fn,
                     const void *arg) {
    int64_t n_items = n_rows * n_cols, grain = n_items / (4 * (ex->n_workers + 1));
    grain = grain < 1 ? 1 : min_i64(grain, most);            /* 4: a late thread costs little */
    int64_t n_more = min_i64(ex->n_workers, (n_items - 1) / grain);
    assert(atomic_load(&ex->gate) == 0);
    ex->fn = fn, ex->arg = arg, ex->n_items = n_items, ex->grain = grain, ex->n_cols = n_cols;
    atomic_store(&ex->next, 0);
    if (n_more > 0) {
        atomic_store(&ex->gate, OPEN);
        atomic_fetch_add(&ex->bell, 1);
        futex_wake(&ex->bell, (int)n_more);
    }
    take_blocks(ex);
    uint32_t inside = atomic_fetch_and(&ex->gate, ~OPEN) & ~OPEN;
    for (; inside; inside = atomic_load(&ex->gate)) wait_change(&ex->gate, inside);
}

int exec_open(dsv4_exec **out, int n_threads, dsv4_err *err) {
    assert(n_threads > 0 && n_threads <= MAX_THREADS);
    dsv4_exec *ex = aligned_alloc(64, sizeof *ex);
    if (!ex) return fail(err, "no memory for the thread pool");
    memset(ex, 0, sizeof *ex);
    for (int i = 0, rc; i < n_threads - 1; i++, ex->n_workers++)
        if ((rc = pthread_create(&ex->worker[i], NULL, worker_main, ex)) != 0) {
            exec_close(ex);                                  /* ends those already started */
            return fail(err, "start thread %d of %d: %s; use fewer threads", i + 2, n_threads,
                        strerror(rc));
        }
    *out = ex;
    return 0;
}

void exec_close(dsv4_exec *ex) {
    if (!ex) return;
    atomic_store(&ex->stop, true);
    atomic_fetch_add(&ex->bell, 1);
    futex_wake(&ex->bell, MAX_THREADS);
    for (int i = 0; i < ex->n_workers; i++) (void)pthread_join(ex->worker[i], NULL);
    free(ex);
}

/* === 3. exp and rounding ====================================================================== */
/* exp_f32's twin, lane by lane: the same steps, so the same bits. */
static inline f32x8 exp8(f32x8 x) {
    const f32x8 shift = splat8(0x1.8p23f);                   /* rounds to an integer when added */
    x = min8(splat8(89), max8(splat8(-105), x));
    f32x8 shifted = fma8(x, splat8(1.44269504f), shift);
    f32x8 n = shifted - shift;
    f32x8 r = fma8(n, splat8(1.90465421e-9f), fma8(n, splat8(-0.693147182f), x));
    f32x8 p = splat8(1.0f / 5040);
    static const float rest[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++) p = fma8(p, r, splat8(rest[i]));
    i32x8 exponent = (i32x8)shifted - (i32x8)shift, half = exponent >> 1;
    f32x8 a = (f32x8)((u32x8)(half + 127) << 23);
    f32x8 b = (f32x8)((u32x8)(exponent - half + 127) << 23);
    return p * a * b;
}

/* Eight values as e4m3 (values, or codes in the low bytes of lanes), as small_code in kernels.cu
 * makes them.  A NaN stays one. */
static inline f32x8 e4m3_round8(f32x8 x, u32x8 *code) {
    u32x8 sign = (u32x8)x & (u32x8)(x == x) & 0x80000000u;
    f32x8 mag = min8(splat8(448), abs8(x));
    u32x8 exponent = (u32x8)max8(mag, splat8(0x1p-6f)) >> 23;
    f32x8 big = (f32x8)((exponent + (23 - 3)) << 23), sum = mag + big;
    u32x8 steps = ((exponent - (127 - 6)) << 3) + ((u32x8)sum - (u32x8)big);
    *code = ((steps | (u32x8)(x != x)) & 127) | sign >> 24;
    return (f32x8)((u32x8)(sum - big) | sign);
}

/* x [d] rounded through e4m3 in blocks of 128: values y (which may be x), or codes [d] and scales
 * [ceil(d/128)].  x / scale is x times its inverse exactly, both being powers of two. */
INLINE void e4m3_row(float *y, uint8_t *code, uint8_t *scale, const float *x, int d) {
    for (int b = 0; b < d; b += 128) {
        int stop = min_int(b + 128, d);
        f32x8 top = splat8(1e-4f);                           /* NaNs do not count */
        for (int i = b; i < stop; i += 8) top = max8(abs8(load_upto8(x + i, stop - i)), top);
        uint8_t s = ceil_to_e8m0(max_lane8(top) * (1.0f / 448));
        f32x8 factor = splat8(e8m0_to_f32(s)), inverse = splat8(1) / factor;
        for (int i = b; i < stop; i += 8) {
            u32x8 c;
            f32x8 v = e4m3_round8(load_upto8(x + i, stop - i) * inverse, &c);
            u8x8 codes = __builtin_convertvector(c, u8x8);
            if (code) memcpy(code + i, &codes, (size_t)min_int(8, stop - i));
            else store_upto8(y + i, v * factor, stop - i);
        }
        if (scale) scale[b / 128] = s;
    }
}

/* === 4. Cheap operations: an item is a row ====================================================
 * NAME_cpu, the twin, names the arguments; row_item does a row of any of these operations.
 * rmsnorm differs: F32, the sum of squares in eight lanes.  act_quant, act_codes and swiglu do
 * not, to the bit.  Where time does not matter a row is left to the reference; embed and kv_round
 * are, as they stand in the table.                                                              */

enum row_op { RMSNORM, ACT_QUANT, ACT_CODES, ACT_VALUES, INDEX_ROUND, SWIGLU, ADD, ROPE, ROUTE };

typedef struct {
    enum row_op op;
    float *y;                      /* [n][heads][d]                                             */
    const float *x, *w;
    uint8_t *code, *scale;         /* [n][d] or index rows [n], [n][ceil(d/128)], written       */
    const uint8_t *from, *from_scale; /* [n][d], [n][ceil(d/128)], read                         */
    int32_t *ids;
    const dsv4_route *route;
    int d, heads, rope_dim;
    int64_t pos0, step;
    float eps, limit;
    bool packed, inverse;
} row_args;

/* The sum of squares of x [d]. */
static inline float sum_squares(const float *x, int d) {
    f32x8 sum = splat8(0);
    for (int c = 0; c < d; c += 8) {
        f32x8 v = load_upto8(x + c, d - c);
        sum = fma8(v, v, sum);
    }
    return sum8(sum);
}

static void rmsnorm_one(float *y, const float *x, const float *w, int d, float eps) {
    float r = 1 / sqrtf(sum_squares(x, d) / (float)d + eps);
    for (int c = 0; c < d; c++) y[c] = w ? x[c] * r * w[c] : x[c] * r;
}

/* a [d] = swiglu(g, u); a may be g or u. */
static void swiglu_one(float *a, const float *g, const float *u, int d, float limit) {
    for (int c = 0; c < d; c += 8) {
        f32x8 gate = min8(splat8(limit), load_upto8(g + c, d - c));
        f32x8 up = max8(splat8(-limit), min8(splat8(limit), load_upto8(u + c, d - c)));
        store_upto8(a + c, gate / (splat8(1) + exp8(-gate)) * up, d - c);
    }
}

static void row_item(const void *arg, place at) {
    const row_args *a = arg;
    int d = a->d;
    int64_t t = at.row, i = t * d, scale = t * (int64_t)scales_of(d);
    switch (a->op) {
    case RMSNORM: rmsnorm_one(a->y + i, a->x + i, a->w, d, a->eps); break;
    case ACT_QUANT: e4m3_row(a->y + i, NULL, NULL, a->x + i, d); break;
    case ACT_CODES: e4m3_row(NULL, a->code + i, a->scale + scale, a->x + i, d); break;
    case ACT_VALUES:
        ops_ref.act_values(a->y + i, a->from + i, a->from_scale + scale, 1, d, NULL);
        break;
    case INDEX_ROUND:
        ops_ref.index_round(a->code + (size_t)t * index_row_bytes(d, a->packed), a->y + i, 1, d,
                            a->packed, NULL);
        break;
    case SWIGLU: swiglu_one(a->y + i, a->x + i, a->w + i, d, a->limit); break;
    case ADD: ops_ref.add(a->y + i * a->heads, a->x + i, 1, a->heads, d, NULL); break;
    case ROPE:
        ops_ref.rope(a->y + i * a->heads, a->w, 1, a->heads, d, a->rope_dim, a->pos0 + t * a->step,
                     a->step, a->inverse, NULL);
        break;
    case ROUTE: {
        dsv4_route in = *a->route;
        in.logits += t * in.n_experts;
        if (in.tokens) in.tokens += t;
        ops_ref.route(a->ids + t * in.topk, a->y + t * in.topk, &in, 1, NULL);
    }
    }
}

static void rows_run(dsv4_exec *ex, int n, row_args a) {
    exec_for(ex, n, 1, a.op == ROPE || a.op == ROUTE ? 1 : 16, row_item, &a);
}

static void rmsnorm_cpu(float *y, const float *x, const float *w, int n, int d, float eps,
                        dsv4_exec *ex) {
    rows_run(ex, n, (row_args){RMSNORM, .y = y, .x = x, .w = w, .d = d, .eps = eps});
}
static void act_quant_cpu(float *y, const float *x, int n, int d, dsv4_exec *ex) {
    rows_run(ex, n, (row_args){ACT_QUANT, .y = y, .x = x, .d = d});
}
static void act_codes_cpu(uint8_t *code, uint8_t *scale, const float *x, int n, int d,
                          dsv4_exec *ex) {
    rows_run(ex, n, (row_args){ACT_CODES, .code = code, .scale = scale, .x = x, .d = d});
}
static void act_values_cpu(float *y, const uint8_t *code, const uint8_t *scale, int n, int d,
                           dsv4_exec *ex) {
    rows_run(ex, n, (row_args){ACT_VALUES, .y = y, .from = code, .from_scale = scale, .d = d});
}
static void index_round_cpu(void *rows, float *x, int n, int d, bool packed, dsv4_exec *ex) {
    rows_run(ex, n, (row_args){INDEX_ROUND, .code = rows, .y = x, .d = d, .packed = packed});
}
static void swiglu_cpu(float *a, const float *g, const float *u, int n, int d, float limit,
                       dsv4_exec *ex) {
    rows_run(ex, n, (row_args){SWIGLU, .y = a, .x = g, .w = u, .d = d, .limit = limit});
}
static void add_cpu(float *y, const float *x, int n, int copies, int d, dsv4_exec *ex) {
    rows_run(ex, n, (row_args){ADD, .y = y, .x = x, .heads = copies, .d = d});
}
static void rope_cpu(float *x, const float *inv_freq, int n, int n_heads, int head_dim,
                     int rope_dim, int64_t pos0, int64_t step, bool inverse, dsv4_exec *ex) {
    rows_run(ex, n, (row_args){ROPE, .y = x, .w = inv_freq, .heads = n_heads, .d = head_dim,
                               .rope_dim = rope_dim, .pos0 = pos0, .step = step,
                               .inverse = inverse});
}
static void route_cpu(int32_t *ids, float *weights, const dsv4_route *in, int n, dsv4_exec *ex) {
    rows_run(ex, n, (row_args){ROUTE, .ids = ids, .y = weights, .route = in});
}

/* === 5. Dot products ==========================================================================
 * Everything that multiplies F32 rows goes through dot_tile: four rows times up to three vectors.
 *
 *             x[0]  x[1]  x[2]       an accumulator of eight lanes a pair: 12 registers, 3 for x,
 *      w[0]    .     .     .         one for w; each load of w serves three vectors, each load
 *      ..                            of x four rows
 *      w[3]    .     .     .
 *
 * An element is eight fma lanes, k ascending, then sum8's tree, in whatever company it stands: this
 * is what makes the bits of every product independent of n.  Rows are read as they are stored and
 * become F32 in registers, or decode_row does the same before: either way it is one product.
 *
 * A scale is a power of two, so it is multiplied in where that costs least: 2^64 times it into x,
 * once for four rows, or into a decoded row.  With rest_of a format, into the sum, this makes up
 * for the power of two by which load_cols is off.                                               */

enum { TILE_ROWS = 4, TILE_VECS = 3 }; /* accumulators, and what they need, fill 16 registers */

typedef struct {                   /* TILE_ROWS rows of a matrix from some column on, as stored */
    const void *data[TILE_ROWS];
    const uint8_t *scale[TILE_ROWS]; /* of FP8 and FP4, else unused                             */
    size_t ahead;                  /* bytes from a row to the one wanted next; 0: do not ask    */
} tile_rows;

/* The last tile may be ragged; bytes are of n numbers. */
static inline int tiles_of(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
static inline size_t bytes_of(dsv4_dtype t, size_t n) {
    return t == DT_F32 ? 4 * n : t == DT_F8_E4M3 ? n : t == DT_I8 ? n / 2 : 2 * n;
}
static inline bool has_scale(dsv4_dtype t) { return t == DT_F8_E4M3 || t == DT_I8; }
static inline float rest_of(dsv4_dtype t) {
    return t == DT_F8_E4M3 ? 0x1p56f : t == DT_I8 ? 0x1p62f : 1;
}
static inline f32x8 scale_64(uint8_t code) { return (f32x8)(((u32x8){0} + code + 64) << 23); }

/* Columns c .. c+7 of a row as F32, zeros after the first n.  Of FP8 2^-120 of them and of FP4
 * 2^-126: their bits, moved to where F32 has its own.  (t is a constant where inlined.) */
INLINE f32x8 load_cols(dsv4_dtype t, const void *row, int c, int n) {
    alignas(32) uint8_t last[32];
    const void *p = (const uint8_t *)row + bytes_of(t, (size_t)c);
    if (n < 8)                                               /* read no further */
        p = memcpy(memset(last, 0, sizeof last), p, bytes_of(t, (size_t)n));
    if (t == DT_F16) {                                       /* seldom seen, and slow */
        f32x8 v;
        for (int i = 0; i < 8; i++) v[i] = f16_to_f32(((const uint16_t *)p)[i]);
        return v;
    }
    if (t == DT_BF16) return bf16_load8(p);
    if (t == DT_F8_E4M3) return e4m3_load8(p);
    if (t == DT_F32) return load8(p);
    uint32_t word;
    memcpy(&word, p, sizeof word);
    u32x8 nibble = ((u32x8){0} + word) >> (u32x8){0, 4, 8, 12, 16, 20, 24, 28};
    return (f32x8)((nibble & 7) << 22 | (nibble & 8) << 28);
}

/* Add columns c .. c+n-1, n <= 8, of four rows times n_vecs vectors times scale. */
INLINE void dot_step(f32x8 (*acc)[TILE_ROWS], dsv4_dtype t, const tile_rows *w, int c, int n,
                     f32x8 scale, const float *x, size_t ldx, int n_vecs) {
    f32x8 xs[TILE_VECS];
    for (int v = 0; v < n_vecs; v++) xs[v] = load_upto8(x + (size_t)v * ldx + c, n) * scale;
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; r++) {
        f32x8 wr = load_cols(t, w->data[r], c, n);
        for (int v = 0; v < n_vecs; v++) acc[v][r] = fma8(wr, xs[v], acc[v][r]);
    }
}

/* out[v][r] = w[r] . x[v*ldx ..], len long, for n_vecs vectors, but for rest_of.  FP8 rows have
 * their scales in common, FP4 rows come decoded. */
INLINE void dot_tile_n(float (*out)[TILE_ROWS], const tile_rows *w, dsv4_dtype t, const float *x,
                       size_t ldx, int len, int n_vecs) {
    f32x8 acc[TILE_VECS][TILE_ROWS] = {{{0}}}, scale = splat8(1);
    for (int c = 0, stop; c < len; c = stop) {
        stop = t == DT_F32 ? len : min_int(c + 128, len);
        for (int r = 0; r < TILE_ROWS; r++)
            if (w->ahead && t != DT_F32)                     /* F32 streams are wide enough */
                prefetch((const uint8_t *)w->data[r] + bytes_of(t, (size_t)c) + w->ahead,
                         bytes_of(t, 128));
        if (has_scale(t)) scale = scale_64(w->scale[0][c / 128]);
        for (; c + 8 <= stop; c += 8) dot_step(acc, t, w, c, 8, scale, x, ldx, n_vecs);
        if (c < stop) dot_step(acc, t, w, c, stop - c, scale, x, ldx, n_vecs);
    }
    for (int v = 0; v < n_vecs; v++)
        for (int r = 0; r < TILE_ROWS; r++) out[v][r] = sum8(acc[v][r]);
}

/* The first of n_vecs vectors, as many as fit in a tile; returns how many. */
INLINE int dot_tile(float (*out)[TILE_ROWS], const tile_rows *w, dsv4_dtype t, const float *x,
                    size_t ldx, int len, int n_vecs) {
    if (has_scale(t) && n_vecs > 2) n_vecs = 2;              /* three scaled x would spill */
    switch (n_vecs) {
    case 1: dot_tile_n(out, w, t, x, ldx, len, 1); return 1;
    case 2: dot_tile_n(out, w, t, x, ldx, len, 2); return 2;
    default: dot_tile_n(out, w, t, x, ldx, len, TILE_VECS); return TILE_VECS;
    }
}

/* === 6. linear ================================================================================
 * Differs: F32.  A work item is a tile of four rows for TOKEN_BLOCK tokens, TILE_COLS columns at a
 * time; an element adds its column blocks in ascending order.  For more tokens than dot_tile takes
 * the tile is decoded to F32 first, for fewer in registers.                                     */

enum {
    TILE_COLS = 1024,              /* a decoded tile is 16 KB and stays in the first cache; a
                                      multiple of 128, so that FP8 scales do not straddle it    */
    TOKEN_BLOCK = 64,              /* tokens that use a decoded tile before it is dropped       */
};

/* Columns 0 .. len-1 of a row as F32, but for rest_of, and zeros up to a whole vector.  By fma,
 * since plain products of subnormals are slow on some processors. */
INLINE void decode_row(dsv4_dtype t, float *dst, const void *row, const uint8_t *scale, int len) {
    for (int c = 0, stop; c < len; c = stop) {
        int block = t == DT_I8 ? 32 : 128;
        f32x8 s = has_scale(t) ? scale_64(scale[c / block]) : splat8(1);
        stop = min_int(c + block, len);
#pragma GCC unroll 4
        for (; c + 8 <= stop; c += 8)
            store8(dst + c, fma8(load_cols(t, row, c, 8), s, splat8(0)));
        if (c < stop) store8(dst + c, load_cols(t, row, c, stop - c) * s);
    }
}

typedef struct { float *y; const dsv4_mat *w; const float *x; int n, groups; } linear_args;

/* n_rows rows r0.. of w from column c0 on; a ragged tile repeats its last row. */
INLINE tile_rows tile_at(const dsv4_mat *w, dsv4_dtype t, int r0, int n_rows, int c0) {
    bool more = r0 + 2 * TILE_ROWS <= w->rows; /* the hardware does not see four streams as one */
    tile_rows tile = {.ahead = more ? bytes_of(t, TILE_ROWS * (size_t)w->cols) : 0};
    for (int i = 0; i < TILE_ROWS; i++) {
        size_t r = (size_t)(r0 + min_int(i, n_rows - 1)), at = r * (size_t)w->cols + (size_t)c0;
        tile.data[i] = (const uint8_t *)w->data + bytes_of(t, at);
        tile.scale[i] = t == DT_F8_E4M3 ? w->scale + r / 128 * scales_of(w->cols) + c0 / 128
                      : t == DT_I8 ? w->scale + at / 32 : NULL;
    }
    return tile;
}

/* A tile of rows of a block of tokens; the tiles of a block follow each other, so that its x is in
 * the cache.  y is set by the first columns and added to by the others. */
INLINE void linear_tile(const linear_args *a, dsv4_dtype type, place at) {
    alignas(64) float wbuf[TILE_ROWS][TILE_COLS];
    const dsv4_mat *w = a->w;
    int group_rows = w->rows / a->groups, g = at.col / tiles_of(group_rows);
    int t0 = (int)at.row * TOKEN_BLOCK, t1 = min_int(t0 + TOKEN_BLOCK, a->n);
    int first = at.col % tiles_of(group_rows) * TILE_ROWS, row0 = g * group_rows + first;
    int n_rows = min_int(TILE_ROWS, group_rows - first);
    size_t ldx = (size_t)a->groups * (size_t)w->cols;
    for (int c0 = 0; c0 < w->cols; c0 += TILE_COLS) {
        int len = min_int(TILE_COLS, w->cols - c0);
        const float *x = a->x + (size_t)g * (size_t)w->cols + c0;
        tile_rows tile = tile_at(w, type, row0, n_rows, c0);
        bool direct = t1 - t0 <= TILE_VECS && type != DT_I8
                   && tile.scale[0] == tile.scale[TILE_ROWS - 1];
        for (int r = 0; !direct && r < TILE_ROWS; r++) {
            const uint8_t *row = tile.data[r];
            if (tile.ahead) prefetch(row + tile.ahead, bytes_of(type, (size_t)len));
            decode_row(type, wbuf[r], row, tile.scale[r], len);
            tile.data[r] = wbuf[r];
        }
        for (int t = t0, n_vecs; t < t1; t += n_vecs) {
            float out[TILE_VECS][TILE_ROWS];
            const float *xt = x + (size_t)t * ldx;
            n_vecs = direct ? dot_tile(out, &tile, type, xt, ldx, len, t1 - t)
                            : dot_tile(out, &tile, DT_F32, xt, ldx, len, t1 - t);
            for (int v = 0; v < n_vecs; v++) {
                float *y = a->y + (size_t)(t + v) * (size_t)w->rows + row0;
                for (int r = 0; r < n_rows; r++)             /* -0 changes no sum */
                    y[r] = (c0 ? y[r] : -0.0f) + out[v][r] * rest_of(type);
            }
        }
    }
}

static void linear_item(const void *arg, place at) {
    const linear_args *a = arg;
    switch (a->w->dtype) {
    case DT_F32: linear_tile(a, DT_F32, at); break;
    case DT_F16: linear_tile(a, DT_F16, at); break;
    case DT_BF16: linear_tile(a, DT_BF16, at); break;
    case DT_F8_E4M3: linear_tile(a, DT_F8_E4M3, at); break;
    case DT_I8: linear_tile(a, DT_I8, at); break;
    default: assert(0);                                      /* no matrix has another dtype */
    }
}

static void linear_cpu(float *y, const dsv4_mat *w, const float *x, int n, int groups,
                       dsv4_exec *ex) {
    assert(groups > 0 && w->rows % groups == 0);
    exec_for(ex, (n + TOKEN_BLOCK - 1) / TOKEN_BLOCK, groups * tiles_of(w->rows / groups), 16,
             linear_item, &(linear_args){y, w, x, n, groups});
}

/* === 7. compress ==============================================================================
 * Differs: F32.  An item is eight dims of an entry.                                             */

typedef struct { float *entries; const dsv4_compress *in; int64_t g0; } compress_args;

/* Lanes past d are zeros throughout and harmless. */
static void compress_item(const void *arg, place at) {
    const compress_args *a = arg;
    const dsv4_compress *in = a->in;
    int coff = in->ratio == 4 ? 2 : 1, c = 8 * at.col, len = in->d - c;
    size_t width = (size_t)(coff * in->d);
    int64_t own = (a->g0 + at.row) * in->ratio, first = own - (coff - 1) * in->ratio;
    f32x8 top = splat8(-INFINITY), sum = splat8(0), mean = splat8(0);
    for (int pass = 0; pass < 2; pass++)                     /* first the maximum, then the sums */
        for (int64_t j = first < 0 ? 0 : first; j < own + in->ratio; j++) {
            size_t ch = (size_t)(c + (coff == 2 && j >= own ? in->d : 0));
            bool now = j >= in->t0;
            size_t from = (size_t)(now ? j - in->t0 : j % (coff * in->ratio)) * width + ch;
            f32x8 s = load_upto8((now ? in->score : in->ring_score) + from, len)
                    + load_upto8(in->ape + (size_t)(j % in->ratio) * width + ch, len);
            if (pass == 0) {
                top = max8(s, top);
                continue;
            }
            f32x8 p = exp8(s - top);
            sum += p;
            mean = fma8(p, load_upto8((now ? in->kv : in->ring_kv) + from, len), mean);
        }
    store_upto8(a->entries + at.row * in->d + c, mean / sum, len);
}

static void compress_cpu(float *entries, const dsv4_compress *in, int64_t g0, int n_groups,
                         dsv4_exec *ex) {
    assert(in->ratio > 0 && g0 >= 0);
    exec_for(ex, n_groups, (in->d + 7) / 8, 8, compress_item, &(compress_args){entries, in, g0});
}

/* === 8. Four bits =============================================================================
 * Exact products of FP4 numbers are sums of bytes' products, of which one factor must be unsigned:
 * u = 2*e2m1 + 12.  Where the other factors sum up to S, 12 * S is subtracted again.
 *
 * Eight blocks of 32 numbers are unpacked at once, a block in each dword of a vector, so that a sum
 * over a block is one vector for all eight:
 *
 *   blocks           in pairs, a vector each: 0 and 1, 2 and 3, ..
 *   u[k], u[4 + k]   numbers 8k .. 8k+7 of each block, the even ones and the odd ones, as pairs of
 *                    nibbles lie; dword i belongs to block 0 2 4 6 1 3 5 7                       */

enum { PACK_BLOCKS = 8, PACK = 32 * PACK_BLOCKS }; /* blocks, and numbers, unpacked at once */

static const uint8_t e2m1_twice[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                       12, 11, 10, 9,  8,  6,  4,  0};

/* Four vectors of four dwords a block become four of one dword a block. */
INLINE void fp4_unpack(u8x32 u[8], u32x8 v[4]) {
    u32x8 t[4];
    for (int i = 0; i < 4; i += 2) {
        t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; i++) {
        v[2 * i] = __builtin_shufflevector(t[i], t[2 + i], 0, 1, 8, 9, 4, 5, 12, 13);
        v[2 * i + 1] = __builtin_shufflevector(t[i], t[2 + i], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int k = 0; k < 4; k++) {
        u[k] = look_up(e2m1_twice, (u8x32)v[k] & 15);
        u[4 + k] = look_up(e2m1_twice, (u8x32)v[k] >> 4);
    }
}

/* === 9. Index scores and top-k ================================================================
 * Packed rows: an item is SCORE_BLOCK keys for SCORE_TOKENS tokens.  Keys are decoded once, eight
 * at a time.
 *
 *   u                of eight keys, as fp4_unpack leaves them
 *   q[k], q[4 + k]   of one head dims 8k .. 8k+7, the even and the odd ones: 2*e2m1; 12 * their sum
 *                    is subtracted
 *
 * F32 rows are left to the reference.                                                           */

enum {
    SCORE_BLOCK = 256,             /* keys of an item: 36 KB decoded, for Flash                 */
    SCORE_TOKENS = 8,
    SCORE_HEADS = 16,              /* heads decoded at once                                     */
};

typedef struct { u8x32 u[8]; f32x8 scale; } key_block;       /* 32 dims of eight keys           */
typedef struct { int32_t q[8], offset; float scale; } head_block; /* offset: in the low 16 bits */

typedef struct { float *scores; const dsv4_index *in; int n; size_t row; } index_args;

/* The sums of u * q over a block, plus q's offset, for eight keys.  In 16 bits: an offset is at
 * most 12 * 12 * 32 = 4608, and so are sixteen products of at most 24 * 12. */
INLINE i32x8 block_dot(const u8x32 u[8], const head_block *h) {
    u16x16 sum = (u16x16)((i32x8){0} + h->offset);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) sum += pair_dots(u[i], (u8x32)((i32x8){0} + h->q[i]));
    return pair_sums(sum, 1);
}

/* Block b of the n keys whose rows begin at `rows`; the last one stands for those up to eight. */
static void key_decode(key_block *k, const uint8_t *rows, size_t row, int d, int b, int n) {
    const uint8_t *key[8];
    u32x8 pairs[4], code;
    for (int r = 0; r < 8; r++) {
        key[r] = rows + (size_t)min_int(r, n - 1) * row;
        code[r] = key[r][d / 2 + b];
    }
    for (int i = 0; i < 4; i++) pairs[i] = load_halves(key[i] + 16 * b, key[4 + i] + 16 * b);
    fp4_unpack(k->u, pairs);
    u32x8 ends = (u32x8)((code == 0) | (code == 255)) & 1u << 22; /* which mean 2^-127 and NaN */
    k->scale = (f32x8)(code << 23 | ends);
}

/* Block b of a head's row. */
static void head_decode(head_block *h, const uint8_t *row, int d, int b) {
    static const u32x8 shift = {0, 0, 0, 0, 4, 4, 4, 4};
    u32x8 pairs = load_halves(row + 16 * b, row + 16 * b);
    u8x32 ones[8], q = look_up(e2m1_twice, (u8x32)(pairs >> shift & 0x0f0f0f0f)) - 12;
    memset(ones, 1, sizeof ones);
    memcpy(h->q, &q, sizeof h->q);
    h->offset = 0;
    h->offset = (uint16_t)(-12 * block_dot(ones, h)[0]);
    h->scale = e8m0_to_f32(row[d / 2 + b]);
}

/* Scores of decoded keys, as many as the one token sees. */
static void score_token(float *scores, const dsv4_index *in, const key_block *keys, size_t row) {
    const uint8_t *q = in->q;
    int n = (int)in->t0 + 1, n_blocks = in->d / 32;
    head_block head[SCORE_HEADS * (MAX_HEAD_DIM / 32)];
    f32x8 total[SCORE_BLOCK / 8] = {{0}};
    for (int h0 = 0; h0 < in->n_heads; h0 += SCORE_HEADS) {
        int n_now = min_int(SCORE_HEADS, in->n_heads - h0);
        for (int h = 0; h < n_now; h++, q += row)
            for (int b = 0; b < n_blocks; b++) head_decode(&head[h * n_blocks + b], q, in->d, b);
        for (int k = 0; k < (n + 7) / 8; k++) {
            f32x8 sum[SCORE_HEADS] = {{0}};
            for (int b = 0; b < n_blocks; b++) {
                const key_block key = keys[k * n_blocks + b];
                for (int h = 0; h < n_now; h++) {
                    const head_block *q_block = &head[h * n_blocks + b];
                    i32x8 dot = block_dot(key.u, q_block);
                    sum[h] = fma8(__builtin_convertvector(dot, f32x8) * key.scale,
                                  splat8(q_block->scale), sum[h]);
                }
            }
            for (int h = 0; h < n_now; h++)
                total[k] = fma8(splat8(in->w[h0 + h] * (in->w_scale / 4)),
                                max8(sum[h], splat8(0)), total[k]);
        }
    }
    memcpy(scores, total, (size_t)n * sizeof *scores);
}

/* Item: a block of keys, a group of tokens. */
static void score_item(const void *arg, place at) {
    const index_args *a = arg;
    const dsv4_index *in = a->in;
    key_block keys[SCORE_BLOCK / 8 * (MAX_HEAD_DIM / 32)];
    int n_blocks = in->d / 32, t = at.col * SCORE_TOKENS, end = min_int(t + SCORE_TOKENS, a->n);
    int64_t e0 = at.row * SCORE_BLOCK, visible = (in->t0 + end) / in->ratio;
    const uint8_t *rows = (const uint8_t *)in->keys + (size_t)e0 * a->row;
    for (int k = 0, n = (int)min_i64(SCORE_BLOCK, visible - e0); in->packed && k < n; k += 8)
        for (int b = 0; b < n_blocks; b++)
            key_decode(&keys[k / 8 * n_blocks + b], rows + (size_t)k * a->row, a->row, in->d, b,
                       n - k);
    for (; t < end; t++) {
        int n = (int)min_i64(SCORE_BLOCK, (in->t0 + t + 1) / in->ratio - e0);
        size_t head = (size_t)t * (size_t)in->n_heads;
        float *scores = a->scores + (size_t)t * in->stride + e0;
        dsv4_index part = {(const uint8_t *)in->q + head * a->row, in->w + head, in->w_scale, rows,
                           in->n_heads, in->d, 1, in->packed, n - 1, 0};
        if (n <= 0) continue;
        if (in->packed) score_token(scores, &part, keys, a->row);
        else ops_ref.index_scores(scores, &part, 1, NULL);
    }
}

/* Differs: nothing, to the bit. */
static void index_scores_cpu(float *scores, const dsv4_index *in, int n, dsv4_exec *ex) {
    index_args a = {scores, in, n, index_row_bytes(in->d, in->packed)};
    int64_t most = (in->t0 + n) / in->ratio;
    assert((size_t)most <= in->stride || n == 1);
    assert(!in->packed || (in->d % 32 == 0 && in->d <= MAX_HEAD_DIM));
    exec_for(ex, (most + SCORE_BLOCK - 1) / SCORE_BLOCK, (n + SCORE_TOKENS - 1) / SCORE_TOKENS, 1,
             score_item, &a);
}

typedef struct {
    int32_t *idx, *count; const float *scores; size_t stride; int k, ratio; int64_t t0;
} topk_args;

/* Bits of scores e .. e+7, or to n, that sort as the numbers do; -0 becomes 0. */
static inline u32x8 sort_keys(const float *s, int64_t e, int64_t n) {
    u32x8 u = (u32x8)(load_upto8(s + e, (int)min_i64(8, n - e)) + splat8(0));
    return u ^ ((u32x8)((i32x8)u >> 31) | 0x80000000u);
}

/* Is any lane of a comparison true? */
static inline bool any8(i32x8 v) {
    u64x4 q = (u64x4)v;
    return (q[0] | q[1] | q[2] | q[3]) != 0;
}

/* The key of the k-th largest of n > k scores, found 11 bits at a time from the top;
 * *n_equal says how many with that very key belong to the k.  Two counts take turns, for equal
 * scores in a row would wait for each other. */
static uint32_t kth_key(const float *s, int64_t n, int k, int *n_equal) {
    static const int shift[3] = {21, 10, 0};
    uint32_t found = 0, known = 0;                           /* the bits found, and their mask  */
    for (int pass = 0; pass < 3; pass++) {
        uint32_t count[2][2048] = {{0}}, digits = pass == 2 ? 1023 : 2047, digit = digits;
        for (int64_t e = 0; e < n; e += 8) {
            u32x8 key = sort_keys(s, e, n);
            i32x8 match = (i32x8)((key & known) == found);
            if (!any8(match)) continue;
            for (int j = 0; j < (int)min_i64(8, n - e); j++)
                count[j & 1][key[j] >> shift[pass] & digits] -= (uint32_t)match[j];
        }
        for (; count[0][digit] + count[1][digit] < (uint32_t)k; digit--)
            k -= (int)(count[0][digit] + count[1][digit]);
        found |= digit << shift[pass];
        known |= digits << shift[pass];
    }
    *n_equal = k;
    return found;
}

/* Item: a token.  The last pass takes what is above the k-th key, and of its equals the first. */
static void topk_row(const void *arg, place at) {
    const topk_args *a = arg;
    int64_t t = at.row;
    const float *s = a->scores + (size_t)t * a->stride;
    assert((a->t0 + t + 1) / a->ratio <= INT32_MAX - 8);
    int32_t *idx = a->idx + t * a->k, visible = (int32_t)((a->t0 + t + 1) / a->ratio), n = 0;
    int n_equal = a->k;
    a->count[t] = min_int(visible, a->k);
    uint32_t least = visible > a->k ? kth_key(s, visible, a->k, &n_equal) : 0;
    for (int32_t e = 0; n < a->count[t]; e += 8) {
        u32x8 key = sort_keys(s, e, visible);
        if (!any8((i32x8)(key >= least))) continue;
        for (int j = 0; j < min_int(8, visible - e); j++)
            if (key[j] > least || (key[j] == least && n_equal-- > 0)) idx[n++] = e + j;
    }
}

/* Differs: a radix select, three passes over the scores however large k is. */
static void topk_cpu(int32_t *idx, int32_t *count, const float *scores, size_t stride, int n,
                     int k, int ratio, int64_t t0, dsv4_exec *ex) {
    exec_for(ex, n, 1, 1, topk_row, &(topk_args){idx, count, scores, stride, k, ratio, t0});
}

/* === 10. attend ================================================================================
 * Differs: F32, in one pass.  An item is a group of heads of a token.  The list is taken in
 * blocks of ATTEND_BLOCK items, whose rows become F32 once for all these heads; with m the largest
 * score so far, o and the denominator l are kept relative to exp(m) and scaled down when m grows.
 * The sink is where m and l begin.                                                              */

enum {
    HEAD_GROUP = 16,               /* heads, at most, that share a row once it is decoded       */
    ATTEND_BLOCK = 64,             /* items between two looks at the maximum                    */
};

typedef struct { float *o; const dsv4_attend *in; int group; } attend_args;

/* One block: list items, padded to a multiple of TILE_ROWS by repeating the last, and each head's
 * scores, then probabilities. */
typedef struct {
    int padded;
    const void *item[ATTEND_BLOCK]; /* rows of F32: the caller's, or in x                       */
    alignas(32) float p[HEAD_GROUP][ATTEND_BLOCK];
    float x[ATTEND_BLOCK * MAX_HEAD_DIM];
} attend_block;

/* kv_row_read for packed rows.  Left to it: odd sizes, NaN, and scales that times 256 overflow. */
static void kv_decode(float *x, const uint8_t *row, int head_dim, int rope_dim) {
    const uint16_t *rope = (const uint16_t *)(const void *)row;
    int n_codes = head_dim - rope_dim, c = 0;
    const uint8_t *code = row + 2 * rope_dim, *scale = code + n_codes;
    bool rare = n_codes % 8 || rope_dim % 8;
    f32x8 top = splat8(0);
#pragma GCC unroll 4
    for (int stop = rare ? 0 : n_codes; c < stop; c += 8) {
        f32x8 v = e4m3_load8(code + c) * splat8(0x1p112f);
        rare |= scale[c / 64] > 254 - 8;
        top = max8(abs8(v), top);
        store8(x + c, v * (f32x8)(((u32x8){0} + scale[c / 64] + 8) << 23));
    }
    if (rare || max_lane8(top) > 448 * 0x1p-8f) kv_row_read(x, row, head_dim, rope_dim, true);
    else for (; c < head_dim; c += 8) store8(x + c, bf16_load8(rope + c - n_codes));
}

/* The items j0 .. of the list of token t0 + row, which has n_items, and b->p, their scores of heads
 * q [n_heads][head_dim]; -inf up to ATTEND_BLOCK. */
static void attend_scores(attend_block *b, const dsv4_attend *in, int row, int64_t j0,
                          int64_t n_items, const float *q, int n_heads) {
    int n = (int)min_i64(ATTEND_BLOCK, n_items - j0), d = in->head_dim;
    float scale = (float)(1 / sqrt((double)d));
    b->padded = tiles_of(n) * TILE_ROWS;
    for (int h = 0; h < n_heads; h++)
        for (int i = n; i < ATTEND_BLOCK; i++) b->p[h][i] = -INFINITY;
    for (int i = 0; i < b->padded; i++) {
        const void *stored = attend_row(in, row, j0 + min_int(i, n - 1));
        if (in->packed) kv_decode(b->x + i * d, stored, d, in->rope_dim);
        b->item[i] = in->packed ? b->x + i * d : stored;
    }
    for (int i = 0; i < n; i += TILE_ROWS) {
        tile_rows k = {.ahead = 0};
        memcpy(k.data, b->item + i, sizeof k.data);
        for (int h = 0, n_vecs; h < n_heads; h += n_vecs) {
            float dot[TILE_VECS][TILE_ROWS];
            n_vecs = dot_tile(dot, &k, DT_F32, q + h * d, (size_t)d, d, n_heads - h);
            for (int v = 0; v < n_vecs; v++)
                for (int r = 0; r < min_int(TILE_ROWS, n - i); r++)
                    b->p[h + v][i + r] = dot[v][r] * scale;
        }
    }
}

/* Turn one head's scores into probabilities relative to exp(*m), raising *m and scaling *l and
 * o [d] down if a score is larger; their sum joins *l. */
static void attend_softmax(float *p, float *m, float *l, float *o, int d) {
    f32x8 top8 = load8(p), sum = splat8(0);
    for (int i = 8; i < ATTEND_BLOCK; i += 8) top8 = max8(load8(p + i), top8);
    float top = max_lane8(top8);
    if (top > *m) {
        float shrink = exp_f32(*m - top);
        *m = top;
        *l *= shrink;
        for (int c = 0; c < d; c++) o[c] *= shrink;
    }
    for (int i = 0; i < ATTEND_BLOCK; i += 8) {
        f32x8 e = exp8(load8(p + i) - splat8(*m));
        sum += e;
        store8(p + i, e);
    }
    *l += sum8(sum);
}

/* Of both heads, o[c ..] += sum over four items of p * item[c ..], eight dims, or len if fewer. */
INLINE void attend_mix_dims(float *const o[2], const void *const *item, f32x8 (*p)[TILE_ROWS],
                            int c, int len) {
    f32x8 sum[2] = {load_upto8(o[0] + c, len), load_upto8(o[1] + c, len)};
    for (int r = 0; r < TILE_ROWS; r++) {
        f32x8 k = load_upto8((const float *)item[r] + c, len);
        for (int h = 0; h < 2; h++) sum[h] = fma8(p[h][r], k, sum[h]);
    }
    for (int h = 0; h < 2; h++) store_upto8(o[h] + c, sum[h], len);
}

/* o [n_heads][d] += p times the block's items, ascending, two heads at a time; one that is alone
 * goes twice, and both times the same is stored. */
static void attend_mix(float *o, attend_block *b, int n_heads, int d) {
    for (int i = 0; i < b->padded; i += TILE_ROWS)
        for (int h = 0, c = 0; h < n_heads; h += 2, c = 0) {
            int next = min_int(h + 1, n_heads - 1);
            float *two[2] = {o + h * d, o + next * d};
            f32x8 p[2][TILE_ROWS];
            for (int r = 0; r < TILE_ROWS; r++)
                p[0][r] = splat8(b->p[h][i + r]), p[1][r] = splat8(b->p[next][i + r]);
            for (; c + 8 <= d; c += 8) attend_mix_dims(two, b->item + i, p, c, 8);
            if (c < d) attend_mix_dims(two, b->item + i, p, c, d - c);
        }
}

/* Item: a token, a group of heads. */
static void attend_item(const void *arg, place where) {
    const attend_args *a = arg;
    const dsv4_attend *in = a->in;
    int row = (int)where.row, h0 = where.col * a->group;
    int d = in->head_dim, n_heads = min_int(a->group, in->n_heads - h0);
    int64_t t = in->t0 + row, n_items = min_i64(t + 1, in->window);
    if (in->ratio) n_items += in->count ? in->count[row] : (t + 1) / in->ratio;
    size_t at = ((size_t)row * (size_t)in->n_heads + (size_t)h0) * (size_t)d;
    float *o = a->o + at, m[HEAD_GROUP], l[HEAD_GROUP];      /* sums, maximum, denominator */
    memset(o, 0, (size_t)n_heads * (size_t)d * sizeof *o);
    for (int h = 0; h < n_heads; h++) m[h] = in->sink[h0 + h], l[h] = 1;
    attend_block b;
    for (int64_t j = 0; j < n_items; j += ATTEND_BLOCK) {
        attend_scores(&b, in, row, j, n_items, in->q + at, n_heads);
        for (int h = 0; h < n_heads; h++) attend_softmax(b.p[h], &m[h], &l[h], o + h * d, d);
        attend_mix(o, &b, n_heads, d);
    }
    for (int h = 0; h < n_heads; h++)
        for (int c = 0; c < d; c++) o[h * d + c] /= l[h];
}

static void attend_cpu(float *o, const dsv4_attend *in, int n, dsv4_exec *ex) {
    assert(in->window > 0 && in->head_dim <= MAX_HEAD_DIM);
    int group = HEAD_GROUP, n_heads = in->n_heads;           /* something for every thread */
    while (group > 2 && (int64_t)n * ((n_heads + group - 1) / group) <= ex->n_workers) group /= 2;
    exec_for(ex, n, (n_heads + group - 1) / group, 1, attend_item, &(attend_args){o, in, group});
}

/* === 11. Hyper-connections ====================================================================
 * Differs: F32.  fn . h is a linear over TOKEN_BLOCK tokens, so that one token uses all threads. */

enum {
    MAX_MIX = (2 + MAX_HC) * MAX_HC, /* rows of fn                                              */
    HC_POST_DIMS = 1024,           /* dims of an item of hc_post                                */
};

typedef struct {
    float *x, *post, *comb;        /* post, comb NULL for the head                              */
    const float *h, *mix;          /* streams; fn . h, not yet divided by the streams' rms      */
    const dsv4_hc *w;
    const dsv4_hc_shape *s;
    int t0;                        /* the first token that mix is of                            */
} hc_args;

static inline float sigmoid(float x) { return 1 / (1 + exp_f32(-x)); }

/* Divide the rows (by_row), or the columns, of C [hc][hc] by their sum + eps. */
static void sinkhorn_step(float *C, int hc, bool by_row, float eps) {
    int line_step = by_row ? hc : 1, step = by_row ? 1 : hc;
    for (int line = 0; line < hc; line++) {
        float sum = 0;
        for (int i = 0; i < hc; i++) sum += C[line * line_step + i * step];
        for (int i = 0; i < hc; i++) C[line * line_step + i * step] /= sum + eps;
    }
}

/* comb C [hc][hc] of one token: r is what its mixes m are still to be multiplied with. */
static void hc_comb(float *C, const float *m, float r, const dsv4_hc *w, const dsv4_hc_shape *s) {
    int hc = s->hc;
    for (int i = 0; i < hc; i++) {
        float top = -INFINITY, sum = 0, *row = C + i * hc;
        for (int j = 0; j < hc; j++) {
            int at = (2 + i) * hc + j;
            row[j] = m[at] * r * w->scale[2] + w->base[at];
            top = row[j] > top ? row[j] : top;
        }
        for (int j = 0; j < hc; j++) sum += row[j] = exp_f32(row[j] - top);
        for (int j = 0; j < hc; j++) row[j] = row[j] / sum + s->hc_eps;
    }
    for (int i = 1; i < 2 * s->sinkhorn_iters; i++) sinkhorn_step(C, hc, i % 2 == 0, s->hc_eps);
}

/* Item: a token.  Mixes to pre, post and comb, and the sum of the streams. */
static void hc_mix_row(const void *arg, place at) {
    const hc_args *a = arg;
    int64_t t = a->t0 + at.row;
    int hc = a->s->hc, dim = a->s->dim, len = hc * dim, n_mix = a->post ? (2 + hc) * hc : hc;
    const float *h = a->h + t * len, *m = a->mix + at.row * n_mix;
    float pre[MAX_HC], *x = a->x + t * dim;
    float r = 1 / sqrtf(sum_squares(h, len) / (float)len + a->s->rms_eps);
    for (int i = 0; i < hc; i++) {
        pre[i] = sigmoid(m[i] * r * a->w->scale[0] + a->w->base[i]) + a->s->hc_eps;
        if (!a->post) continue;
        a->post[t * hc + i] = 2 * sigmoid(m[hc + i] * r * a->w->scale[1] + a->w->base[hc + i]);
    }
    if (a->comb) hc_comb(a->comb + t * hc * hc, m, r, a->w, a->s);
    for (int c = 0; c < dim; c += 8) {
        f32x8 sum = splat8(0);
        for (int i = 0; i < hc; i++)
            sum = fma8(splat8(pre[i]), load_upto8(h + i * dim + c, dim - c), sum);
        store_upto8(x + c, sum, dim - c);
    }
}

static void hc_pre_cpu(float *x, float *post, float *comb, const float *h, const dsv4_hc *w,
                       const dsv4_hc_shape *s, int n, dsv4_exec *ex) {
    float mix[TOKEN_BLOCK * MAX_MIX];
    int hc = s->hc, len = hc * s->dim;
    assert(hc > 0 && hc <= MAX_HC);
    dsv4_mat fn = {DT_F32, post ? (2 + hc) * hc : hc, len, w->fn, NULL};
    for (int t = 0; t < n; t += TOKEN_BLOCK) {
        int n_now = min_int(TOKEN_BLOCK, n - t);
        linear_cpu(mix, &fn, h + (size_t)t * (size_t)len, n_now, 1, ex);
        exec_for(ex, n_now, 1, 1, hc_mix_row, &(hc_args){x, post, comb, h, mix, w, s, t});
    }
}

typedef struct { float *h; const float *y, *post, *comb; int hc, dim; } hc_post_args;

/* Item: a token, a chunk of the dims. */
static void hc_post_item(const void *arg, place at) {
    const hc_post_args *a = arg;
    int64_t t = at.row;
    int hc = a->hc, dim = a->dim, c = at.col * HC_POST_DIMS, stop = min_int(c + HC_POST_DIMS, dim);
    float *h = a->h + t * hc * dim;
    const float *y = a->y + t * dim, *post = a->post + t * hc, *comb = a->comb + t * hc * hc;
    for (; c < stop; c += 8) {
        f32x8 old[MAX_HC], yc = load_upto8(y + c, stop - c);
        for (int i = 0; i < hc; i++) old[i] = load_upto8(h + i * dim + c, stop - c);
        for (int j = 0; j < hc; j++) {
            f32x8 sum = splat8(post[j]) * yc;
            for (int i = 0; i < hc; i++) sum = fma8(splat8(comb[i * hc + j]), old[i], sum);
            store_upto8(h + j * dim + c, sum, stop - c);
        }
    }
}

/* Differs: F32. */
static void hc_post_cpu(float *h, const float *y, const float *post, const float *comb,
                        const dsv4_hc_shape *s, int n, dsv4_exec *ex) {
    assert(s->hc > 0 && s->hc <= MAX_HC);
    exec_for(ex, n, (s->dim + HC_POST_DIMS - 1) / HC_POST_DIMS, 1, hc_post_item,
             &(hc_post_args){h, y, post, comb, s->hc, s->dim});
}

/* === 12. Experts ==============================================================================
 * Roundings on, an x row is packed once: each e4m3 integer m (18 bits and sign) is cut into three
 * signed limbs, m = l0 + 64 l1 + 4096 l2, that fit pair_dots, and laid out as fp4_unpack leaves the
 * weights; padded with zeros to whole groups of PACK columns.
 *
 * A work item is a tile of four rows, whose weights are unpacked once for all m tokens.         */

enum { PIECE = 8 };                /* groups unpacked at a time: 9 KB for four rows             */

typedef struct {                   /* of x                                                      */
    u8x32 limb[8][3];              /* signed                                                    */
    i32x8 offset;                  /* 12 * sum(m)                                               */
    i32x8 exponent;                /* scale code - 264 + 127; w's code comes to it              */
} x_group;

typedef struct { u8x32 u[8]; i32x8 scale; } w_group; /* of a row of weights; codes              */

static inline int n_groups_of(int cols) { return (cols + PACK - 1) / PACK; }

/* One group, or the cols that are left, of e4m3 codes and their scales, one for 128 columns. */
static void pack_group(x_group *x, const uint8_t *code, const uint8_t *scale, int cols) {
    memset(x, 0, sizeof *x);
    for (int b = 0; b < cols / 32; b++) {
        i32x8 sum = {0};
        for (int k = 0; k < 4; k++) {
            f32x8 value = e4m3_load8(code + 32 * b + 8 * k) * splat8(0x1p64f) * splat8(0x1p65f);
            i32x8 m = __builtin_convertvector(value, i32x8);
            sum += m;
            for (int l = 0; l < 3; l++, m /= 64) {
                i32x8 limb = m % 64;
                for (int i = 0; i < 8; i++)
                    x->limb[k + i % 2 * 4][l][4 * (b % 2 * 4 + b / 2) + i / 2] = (uint8_t)limb[i];
            }
        }
        for (int i = 0; i < 8; i++) x->offset[b] += 12 * sum[i];
        x->exponent[b] = scale[b / 4] - 264 + 127;
    }
}

/* Group g of row r of w, padded with zeros. */
INLINE void fp4_decode(w_group *out, const dsv4_mat *w, int r, int g) {
    int row_blocks = w->cols / 32, n_blocks = row_blocks - g * PACK_BLOCKS;
    size_t at = (size_t)r * (size_t)row_blocks + (size_t)(g * PACK_BLOCKS);
    const uint8_t *src = (const uint8_t *)w->data + at * 16, *scale = w->scale + at;
    uint8_t last[PACK / 2], last_scale[PACK_BLOCKS];
    if (r + TILE_ROWS < w->rows) prefetch(src + (size_t)row_blocks * 16 * TILE_ROWS, PACK / 2);
    if (n_blocks < PACK_BLOCKS) {                            /* read no further than the row */
        memset(last, 0, sizeof last), memset(last_scale, 0, sizeof last_scale);
        for (int b = 0; b < PACK_BLOCKS; b++)                /* a call would empty registers */
            if (b < n_blocks) memcpy(last + 16 * b, src + 16 * b, 16), last_scale[b] = scale[b];
        src = last, scale = last_scale;
    }
    out->scale = i8_load8(scale) & 255;
    u32x8 v[4];
    for (int i = 0; i < 4; i++) v[i] = (u32x8)load8(src + 32 * i);
    fp4_unpack(out->u, v);
}

typedef struct {                   /* one or two matrices times packed rows                     */
    const dsv4_mat *w[2];          /* of one shape                                              */
    float *out[2];                 /* [m][rows], overwritten; or y, with rows                   */
    const int32_t *rows;           /* if set, add to out's row rows[t] instead                  */
    const x_group *x;              /* [m][groups of cols]                                       */
    int m;
} fp4_args;

/* Add a group to the lanes.  The sums of u * m over each block are exact: pair_dots adds two
 * products of at most 24 * 63, and in int16 the eight come to 24192; pair_sums then adds lanes in
 * pairs and puts the limbs together: 24 * 229376 * 32 < 2^28 in all.  Conversion to F32 rounds a
 * block's sum, the power of two, clamped to those of normal numbers, is exact.  Blocks of padding
 * add +0, which changes no lane. */
INLINE f32x8 fp4_dot(f32x8 lanes, const w_group *w, const x_group *x) {
    i32x8 sums = {0}, e = clamp8(w->scale + x->exponent, sums + 1, sums + 254);
    u16x16 sum[3] = {{0}};
    for (int h = 0; h < 8; h++)
        for (int l = 0; l < 3; l++) {
            sum[l] += pair_dots(w->u[h], x->limb[h][l]);
#ifdef __AVX2__
            __asm__("" : "+x"(sum[l]));                      /* or GCC reorders, and spills */
#endif
        }
    for (int l = 0; l < 3; l++) sums += pair_sums(sum[l], (int16_t)(1 << 6 * l));
    sums = __builtin_shufflevector(sums, sums, 0, 4, 1, 5, 2, 6, 3, 7) - x->offset;
    return lanes + __builtin_convertvector(sums, f32x8) * (f32x8)(e << 23);
}

/* Item: a matrix, a tile of its rows, times all tokens.  For one token a group is used in the
 * registers where it was decoded; for more, each product's lanes wait on the stack between pieces
 * of PIECE groups, so that a piece is decoded once for all. */
static void fp4_tile(const void *arg, place at) {
    const fp4_args *a = arg;
    const dsv4_mat *w = a->w[at.row];
    int r0 = at.col * TILE_ROWS, n_rows = min_int(TILE_ROWS, w->rows - r0);
    int n_groups = n_groups_of(w->cols);
    f32x8 lanes[EXPERT_ROWS][TILE_ROWS];
    w_group piece[TILE_ROWS][PIECE];
    memset(lanes, 0, (size_t)a->m * sizeof lanes[0]);
    for (int r = 0; a->m == 1 && r < n_rows; r++)
        for (int g = 0; g < n_groups; g++) {
            w_group one;
            fp4_decode(&one, w, r0 + r, g);
            lanes[0][r] = fp4_dot(lanes[0][r], &one, &a->x[g]);
        }
    for (int g = 0; a->m > 1 && g < n_groups; g += PIECE) {
        int n_now = min_int(PIECE, n_groups - g);
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_now; i++) fp4_decode(&piece[r][i], w, r0 + r, g + i);
        for (int t = 0; t < a->m; t++)
            for (int r = 0; r < n_rows; r++)
                for (int i = 0; i < n_now; i++)
                    lanes[t][r] = fp4_dot(lanes[t][r], &piece[r][i], &a->x[t * n_groups + g + i]);
    }
    for (int t = 0; t < a->m; t++) {
        float *y = a->out[at.row] + (size_t)(a->rows ? a->rows[t] : t) * (size_t)w->rows + r0;
        for (int r = 0; r < n_rows; r++) y[r] = sum8(lanes[t][r]) + (a->rows ? y[r] : 0);
    }
}

typedef struct {
    float *g, *u;                  /* in the caller's scratch, EXPERT_ROWS rows of each: [inter] */
    x_group *x, *a;                /* with roundings on, packed x and a                         */
    const dsv4_acts *in;
    const int32_t *rows;
    const float *weight;
    int dim, inter;
    float limit;
} expert_args;

size_t expert_scratch_bytes(int dim, int inter) {
    size_t on = (size_t)(n_groups_of(dim) + n_groups_of(inter)) * sizeof(x_group);
    size_t off = 2 * sizeof(float) * (size_t)dim, both = 2 * sizeof(float) * (size_t)inter;
    return EXPERT_ROWS * (both + (on > off ? on : off));
}

/* Item: a token, a group of its x row. */
static void expert_pack(const void *arg, place at) {
    const expert_args *e = arg;
    size_t c = (size_t)at.col * PACK, row = (size_t)e->rows[at.row];
    pack_group(&e->x[at.row * n_groups_of(e->dim) + at.col], e->in->code + row * (size_t)e->dim + c,
               e->in->scale + row * scales_of(e->dim) + c / 128, min_int(PACK, e->dim - (int)c));
}

/* Item: a token, a group.  g becomes a = swiglu(g, u) * weight and, with the roundings, is packed
 * for w2. */
static void expert_activate(const void *arg, place at) {
    const expert_args *e = arg;
    int c = at.col * PACK, len = min_int(PACK, e->inter - c);
    float *g = e->g + at.row * e->inter + c;
    uint8_t code[PACK], scale[PACK / 128];
    swiglu_one(g, g, e->u + at.row * e->inter + c, len, e->limit);
    for (int j = 0; j < len; j++) g[j] *= e->weight[at.row];
    if (!e->in->code) return;
    e4m3_row(NULL, code, scale, g, len);
    pack_group(&e->a[at.row * n_groups_of(e->inter) + at.col], code, scale, len);
}

/* Differs: nothing with roundings on; F32 sums in linear's order with roundings off. */
static void expert_ffn_cpu(float *y, const dsv4_ffn *w, const dsv4_acts *x, const int32_t *rows,
                           const float *weight, int m, float limit, void *scratch,
                           dsv4_exec *ex) {
    int dim = w->w1.cols, inter = w->w1.rows;
    assert(m <= EXPERT_ROWS && dim % 32 == 0 && inter % 32 == 0);
    assert((x->code != NULL) != (x->f32 != NULL));
    assert((uintptr_t)scratch % 64 == 0);
    float *g = scratch, *u = g + EXPERT_ROWS * (size_t)inter;
    float *f32 = u + EXPERT_ROWS * (size_t)inter;            /* off, x gathered and w2's result */
    float *out = f32 + EXPERT_ROWS * (size_t)dim;
    x_group *packed = (x_group *)(void *)f32;                /* on, in their place, x and a */
    expert_args e = {g, u, packed, packed + EXPERT_ROWS * n_groups_of(dim), x, rows, weight, dim,
                     inter, limit};
    if (x->code) {
        fp4_args up = {{&w->w1, &w->w3}, {g, u}, NULL, e.x, m};
        fp4_args down = {{&w->w2}, {y}, rows, e.a, m};
        exec_for(ex, m, n_groups_of(dim), 16, expert_pack, &e);
        exec_for(ex, 2, tiles_of(inter), 16, fp4_tile, &up);
        exec_for(ex, m, n_groups_of(inter), 16, expert_activate, &e);
        exec_for(ex, 1, tiles_of(dim), 16, fp4_tile, &down);
        return;
    }
    for (int i = 0; i < m; i++)
        memcpy(f32 + i * dim, x->f32 + (size_t)rows[i] * (size_t)dim, (size_t)dim * sizeof(float));
    linear_cpu(g, &w->w1, f32, m, 1, ex);
    linear_cpu(u, &w->w3, f32, m, 1, ex);
    exec_for(ex, m, n_groups_of(inter), 16, expert_activate, &e);
    linear_cpu(out, &w->w2, g, m, 1, ex);
    for (int i = 0; i < m; i++)
        add_cpu(y + (size_t)rows[i] * (size_t)dim, out + (size_t)i * (size_t)dim, 1, 1, dim, ex);
}

/* === 13. Measuring ============================================================================
 * One buffer, larger than any cache, is read, and is matrix, scales, x and y of a linear; its bytes
 * are alike: in any format a number, and none of the sums overflows or is subnormal.  The linear
 * alone takes 5 MB.                                                                             */

enum { MEASURE_MB = 512, MEASURE_LEAST_MB = 6, MEASURE_TOKENS = 64, MEASURE_DIM = 2048 };

/* Item: a megabyte. */
static void measure_read(const void *arg, place mb) {
    const u32x8 *v = (const u32x8 *)arg + ((size_t)mb.row << 20) / sizeof *v;
    u32x8 sum[4] = {{0}};
    for (size_t at = 0; at < (1 << 20) / sizeof *v; at += 4)
        for (size_t j = 0; j < 4; j++) sum[j] += v[at + j];
    volatile u32x8 all = sum[0] + sum[1] + sum[2] + sum[3];  /* or the reading is left out */
    (void)all;
}

int exec_measure(dsv4_exec *ex, uint64_t most, double seconds, exec_rates *out, dsv4_err *err) {
    uint64_t n_mb = most >> 20;
    n_mb = n_mb > MEASURE_MB ? MEASURE_MB : n_mb < MEASURE_LEAST_MB ? MEASURE_LEAST_MB
                                                                    : n_mb / 2 * 2;
    uint8_t *base = aligned_alloc(2 << 20, n_mb << 20);
    if (!base) return fail(err, "no memory to measure with: %d MB", (int)n_mb);
    (void)madvise(base, n_mb << 20, MADV_HUGEPAGE);          /* as the model's own arenas */
    memset(base, 0x70, n_mb << 20);
    float *x = (float *)(void *)(base + (4 << 20)), *y = x + MEASURE_TOKENS * MEASURE_DIM;
    dsv4_mat w = {DT_F8_E4M3, MEASURE_DIM, MEASURE_DIM, base, base};
    double best[2] = {INFINITY, INFINITY};                   /* seconds: to read, to multiply */
    for (int i = 0; i < 2; i++) {
        double stop = now_s() + seconds / 2, begin;
        do {
            begin = now_s();
            if (i == 0) exec_for(ex, (int64_t)n_mb, 1, 1, measure_read, base);
            else linear_cpu(y, &w, x, MEASURE_TOKENS, 1, ex);
            best[i] = fmin(best[i], now_s() - begin);
        } while (now_s() < stop);
    }
    out->read_bytes_s = (double)(n_mb << 20) / best[0];
    out->macs_s = (double)MEASURE_TOKENS * MEASURE_DIM * MEASURE_DIM / best[1];
    free(base);
    return 0;
}

/* === 14. The table ============================================================================ */
const dsv4_ops ops_cpu = {
    "cpu",       embed_ref,    rmsnorm_cpu,     act_quant_cpu, act_codes_cpu,    act_values_cpu,
    linear_cpu,  rope_cpu,     kv_round_ref,    index_round_cpu, compress_cpu,   index_scores_cpu,
    topk_cpu,    attend_cpu,   hc_pre_cpu,      hc_post_cpu,   route_cpu,
    swiglu_cpu,  expert_ffn_cpu, add_cpu,       argmax_ref,    copy_ref,         zero_ref,
    sync_ref,
};
