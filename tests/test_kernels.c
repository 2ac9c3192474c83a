/* test_kernels.c -- ops_cpu against ops_ref, against itself, and the thread pool.
 *
 *   case = an operation and its sizes  ->  run(table, tokens t .. t+n-1, threads)  ->  bytes
 *   twins      ops_cpu's bytes are ops_ref's, or as near as eps and the length of sums allow
 *   identity   the same bytes for any split of the tokens and any number of threads
 *
 * Inputs are read-only pools of random numbers; a case picks places in them, often odd ones.    */
#define _GNU_SOURCE
#include "../dsv4.h"
#include "check.h"

#include <assert.h>
#include <sys/mman.h>
#include <unistd.h>

/* === Inputs =================================================================================== */

enum { POOL = 1 << 20, MAX_N = 70, N_EXECS = 4 };

static float f32_pool[POOL];
static uint16_t bf16_pool[POOL], f16_pool[POOL];
static uint8_t fp8_pool[POOL], byte_pool[POOL], w_scale_pool[POOL], x_scale_pool[POOL];
static dsv4_exec *execs[N_EXECS];
static const int exec_threads[N_EXECS] = {1, 2, 3, 8};
static uint64_t random_state = 88172645463325252u;

static uint32_t random_u32(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}

static float random_f32(void) { return (float)(int32_t)random_u32() * 0x1p-31f; }

static uint8_t random_e4m3(void) {
    uint8_t code = (uint8_t)random_u32();
    return (code & 127) == 127 ? 0 : code;
}

static void fill_pools(void) {
    for (int i = 0; i < POOL; i++) {
        f32_pool[i] = random_f32();
        bf16_pool[i] = f32_to_bf16(f32_pool[i]);
        f16_pool[i] = (uint16_t)(random_u32() & 0xbbff);     /* below 2 */
        fp8_pool[i] = random_e4m3();
        byte_pool[i] = (uint8_t)random_u32();
        w_scale_pool[i] = (uint8_t)(118 + random_u32() % 6);
        x_scale_pool[i] = (uint8_t)(116 + random_u32() % 6);
    }
}

static void *room(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert(p);
    memset(p, 0xa5, (bytes + 127) / 64 * 64);
    return p;
}

/* Bytes alike; where both are NaN as floats, their bits may differ. */
static bool same_bytes(const uint8_t *a, const uint8_t *b, size_t bytes) {
    if (!memcmp(a, b, bytes)) return true;
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
        float x, y;
        memcpy(&x, a + i, 4);
        memcpy(&y, b + i, 4);
        if (memcmp(a + i, b + i, 4) && !(isnan(x) && isnan(y))) return false;
    }
    return true;
}

/* === Cases ==================================================================================== */

typedef struct op_case op_case;
/* Do tokens t .. t+n-1; their results are `stride` bytes a token, the first at out + t*stride. */
typedef void (*run_fn)(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex);
struct op_case {
    const char *name;
    run_fn run;
    int n;                         /* tokens                                                    */
    int size[8];                   /* as the run function says                                  */
    int sum;                       /* length of the longest sum; 0: the twins are equal         */
    size_t stride;                 /* bytes of a token's results                                */
};

static float *floats_at(const op_case *c, uint8_t *out, int t) {
    return (float *)(void *)(out + (size_t)t * c->stride);
}

static dsv4_mat make_mat(int dtype, int rows, int cols) {
    dsv4_mat w = {(dsv4_dtype)dtype, rows, cols, NULL, NULL};
    assert((size_t)rows * (size_t)cols < POOL - 8);
    switch (w.dtype) {
    case DT_F32: w.data = f32_pool + 5; break;
    case DT_F16: w.data = f16_pool + 3; break;
    case DT_BF16: w.data = bf16_pool + 1; break;
    case DT_F8_E4M3: w.data = fp8_pool + 3, w.scale = w_scale_pool + 1; break;
    default: w.data = byte_pool + 1, w.scale = w_scale_pool + 5; break;
    }
    return w;
}

/* size: dtype rows cols groups */
static void run_linear(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex) {
    dsv4_mat w = make_mat(c->size[0], c->size[1], c->size[2]);
    const float *x = f32_pool + 7777 + t * c->size[3] * c->size[2];
    if (n) ops->linear(floats_at(c, out, t), &w, x, n, c->size[3], ex);
}

/* size: d, whether there is a weight */
static void run_rmsnorm(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                        dsv4_exec *ex) {
    int d = c->size[0];
    ops->rmsnorm(floats_at(c, out, t), f32_pool + t * d, c->size[1] ? f32_pool + 999 : NULL, n, d,
                 1e-6f, ex);
}

/* Values that roundings find hard, one in four of them: zeros, halves, tiny and huge ones. */
static void rounding_inputs(float *x, size_t begin, size_t count) {
    static const float hard[16] = {0, -0.0f, 0.5f, -0.25f, 1.5f, 448, -448, 17, 19, 1e-9f, -1e-30f,
                                   3.5f, -2.5f, 1e20f, 0.0625f, 21};
    for (size_t i = 0; i < count; i++) {
        size_t k = (begin + i) % POOL;
        uint8_t b = byte_pool[k];
        float wide = ldexpf(f32_pool[k], byte_pool[k / 64] % 40 - 20);
        x[i] = b % 4 ? wide : hard[b / 4 % 16];
    }
}

/* The same, with a NaN or an infinity here and there. */
static void broken_inputs(float *x, size_t begin, size_t count) {
    rounding_inputs(x, begin, count);
    for (size_t i = 0; i < count; i++)
        if ((begin + i) % 397 == 396) x[i] = (begin + i) % 2 ? NAN : -INFINITY;
}

/* size: d */
static void run_act_quant(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                          dsv4_exec *ex) {
    size_t d = (size_t)c->size[0];
    float *y = floats_at(c, out, t);
    broken_inputs(y, (size_t)t * d, (size_t)n * d);
    ops->act_quant(y, y, n, c->size[0], ex);
}

/* size: d.  Codes, scales, and the values they stand for. */
static void run_act_codes(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                          dsv4_exec *ex) {
    size_t d = (size_t)c->size[0], blocks = (d + 127) / 128, rows = (size_t)n;
    float *x = room((rows + 1) * d * sizeof *x), *y = room((rows + 1) * d * sizeof *y);
    uint8_t *code = room((rows + 1) * d), *scale = room((rows + 1) * blocks);
    broken_inputs(x, (size_t)t * d, rows * d);
    ops->act_codes(code, scale, x, n, c->size[0], ex);
    ops->act_values(y, code, scale, n, c->size[0], ex);
    ops_ref.act_quant(x, x, n, c->size[0], NULL);
    for (size_t i = 0; i < rows; i++) {
        uint8_t *row = out + ((size_t)t + i) * c->stride;
        CHECK(same_bytes((uint8_t *)(x + i * d), (uint8_t *)(y + i * d), d * sizeof *x),
              "%s: act_values is not act_quant", ops->name);
        memcpy(row, y + i * d, d * sizeof *y);
        memcpy(row + d * sizeof *y, code + i * d, d);
        memcpy(row + d * sizeof *y + d, scale + i * blocks, blocks);
    }
    free(x), free(y), free(code), free(scale);
}

/* size: n_heads head_dim rope_dim pos0 step inverse */
static void run_rope(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                     dsv4_exec *ex) {
    const int *s = c->size;
    float *x = floats_at(c, out, t), inv_freq[256];
    rope_inv_freq(inv_freq, s[2], 10000, 16, 32, 1, 65536);
    memcpy(x, f32_pool + t * s[0] * s[1], (size_t)n * c->stride);
    ops->rope(x, inv_freq, n, s[0], s[1], s[2], s[3] + t * s[4], s[4], s[5], ex);
}

/* size: head_dim rope_dim packed */
static void run_kv_round(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                         dsv4_exec *ex) {
    size_t d = (size_t)c->size[0];
    float *x = room((size_t)n * d * sizeof *x);
    broken_inputs(x, (size_t)t * d, (size_t)n * d);
    CHECK(c->stride == kv_row_bytes(c->size[0], c->size[1], c->size[2]), "size of a row");
    ops->kv_round(out + (size_t)t * c->stride, x, n, c->size[0], c->size[1], c->size[2], ex);
    free(x);
}

/* size: d packed */
static void run_index_round(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                            dsv4_exec *ex) {
    size_t d = (size_t)c->size[0];
    float *x = room((size_t)n * d * sizeof *x);
    rounding_inputs(x, (size_t)t * d, (size_t)n * d);
    CHECK(c->stride == index_row_bytes(c->size[0], c->size[1]), "size of a row");
    ops->index_round(out + (size_t)t * c->stride, x, n, c->size[0], c->size[1], ex);
    free(x);
}

/* size: ratio d.  Tokens are groups; those in the ring end in the middle of group t. */
static void run_compress(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                         dsv4_exec *ex) {
    int ratio = c->size[0], d = c->size[1], coff = ratio == 4 ? 2 : 1;
    size_t width = (size_t)(coff * d), ring_rows = (size_t)(coff * ratio);
    int64_t t0 = (int64_t)t * ratio + ratio / 2;
    const float *kv = f32_pool + 11, *score = f32_pool + 300007;
    float *ring_kv = room(ring_rows * width * 4), *ring_score = room(ring_rows * width * 4);
    for (int64_t j = t0 < (int64_t)ring_rows ? 0 : t0 - (int64_t)ring_rows; j < t0; j++) {
        size_t to = (size_t)j % ring_rows * width, from = (size_t)j * width;
        memcpy(ring_kv + to, kv + from, width * 4);
        memcpy(ring_score + to, score + from, width * 4);
    }
    dsv4_compress in = {kv + (size_t)t0 * width, score + (size_t)t0 * width, ring_kv, ring_score,
                        f32_pool + 77, ratio, d, t0};
    ops->compress(floats_at(c, out, t), &in, t, n, ex);
    free(ring_kv), free(ring_score);
}

/* n rows of random index queries or keys. */
static void *index_rows(size_t at, size_t n, int d, bool packed) {
    size_t count = n * (size_t)d;
    float *x = room(count * sizeof *x);
    void *rows = room(n * index_row_bytes(d, packed));
    assert(at + count <= POOL);
    memcpy(x, f32_pool + at, count * sizeof *x);
    ops_ref.index_round(rows, x, (int)n, d, packed, NULL);
    free(x);
    return rows;
}

/* size: n_heads d ratio t0 packed.  A token's row has room for all entries; unseen ones are 0. */
static void run_index_scores(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                             dsv4_exec *ex) {
    const int *s = c->size;
    size_t stride = c->stride / sizeof(float), heads = (size_t)s[0], d = (size_t)s[1];
    void *q = index_rows(100 + (size_t)t * heads * d, (size_t)n * heads, s[1], s[4]);
    void *keys = index_rows(200001, (size_t)((s[3] + t + n) / s[2]), s[1], s[4]);
    memset(out + (size_t)t * c->stride, 0, (size_t)n * c->stride);
    dsv4_index in = {q, f32_pool + t * s[0], 0.3f, keys, s[0], s[1], s[2], s[4], s[3] + t, stride};
    ops->index_scores(floats_at(c, out, t), &in, n, ex);
    free(q), free(keys);
}

/* size: k ratio t0 distinct scores (0: all) */
static void run_topk(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                     dsv4_exec *ex) {
    const int *s = c->size;
    size_t stride = (size_t)((s[2] + c->n) / s[1] + 3), k = (size_t)s[0];
    float *scores = room(((size_t)n * stride + 1) * sizeof *scores);
    int32_t *idx = room((size_t)(n + 1) * k * sizeof *idx), *count = room((size_t)(n + 1) * 4);
    for (size_t i = 0; i < (size_t)n * stride; i++) {
        float x = f32_pool[(i + (size_t)t * stride) % POOL];
        scores[i] = s[3] ? roundf(x * (float)s[3]) : x;      /* makes -0 as well as 0 */
    }
    ops->topk(idx, count, scores, stride, n, s[0], s[1], s[2] + t, ex);
    for (int i = 0; i < n; i++) {
        uint8_t *row = out + (size_t)(t + i) * c->stride;
        memset(row, 0, c->stride);
        memcpy(row, &count[i], 4);
        memcpy(row + 4, idx + (size_t)i * k, (size_t)count[i] * 4);
    }
    free(scores), free(idx), free(count);
}

/* n random KV rows; rope_dim < 0: F32 */
static void *kv_rows(size_t at, int64_t n, int d, int rope_dim) {
    bool packed = rope_dim >= 0;
    void *rows = room((size_t)n * kv_row_bytes(d, rope_dim, packed));
    assert(at + (size_t)n * (size_t)d <= POOL);
    ops_ref.kv_round(rows, f32_pool + at, (int)n, d, packed ? rope_dim : 0, packed, NULL);
    return rows;
}

/* size: n_heads head_dim window ratio topk t0 rope_dim (< 0: rows of F32) gathered.
 * topk 0: all are visible; gathered: the first topk of comp are what was chosen */
static void run_attend(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex) {
    const int *s = c->size;
    size_t d = (size_t)s[1], window = (size_t)s[2], k = (size_t)s[4];
    int64_t t0 = s[5] + t, first = t0 < s[2] ? 0 : t0 - s[2];
    bool packed = s[6] >= 0;
    size_t bytes = kv_row_bytes(s[1], s[6], packed);
    uint8_t *kv = kv_rows(1 + (size_t)first * d, t0 + n - first, s[1], s[6]);
    uint8_t *comp = s[3] ? kv_rows(400009, (t0 + n) / s[3], s[1], s[6]) : NULL;
    uint8_t *ring = room(window * bytes), *now = kv + (size_t)(t0 - first) * bytes;
    int32_t *idx = room((size_t)(n + 1) * (k + 1) * 4), *count = room((size_t)(n + 1) * 4);
    for (int64_t p = first; p < t0; p++)
        memcpy(ring + (size_t)p % window * bytes, kv + (size_t)(p - first) * bytes, bytes);
    for (int i = 0; s[4] && i < n; i++) {
        int visible = (int)(t0 + i + 1) / s[3];
        count[i] = visible < s[4] ? visible : s[4];
        for (int j = 0; j < count[i]; j++)
            idx[(size_t)i * k + (size_t)j] = (int)((int64_t)j * visible / count[i]);
    }
    dsv4_attend in = {f32_pool + 3 + (size_t)t * (size_t)s[0] * d, now, ring, comp,
                      s[4] && !s[7] ? idx : NULL, s[4] ? count : NULL, f32_pool + 50, s[0], s[1],
                      packed ? s[6] : 0, s[2], s[3], s[4], packed, t0};
    if (n) ops->attend(floats_at(c, out, t), &in, n, ex);
    free(kv), free(comp), free(ring), free(idx), free(count);
}

/* size: hc dim */
static void run_hc_pre(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex) {
    int hc = c->size[0], dim = c->size[1];
    size_t x_bytes = (size_t)dim * 4, post_bytes = (size_t)hc * 4, rows = (size_t)n + 1;
    dsv4_hc_shape s = {hc, dim, 20, 1e-6f, 1e-6f};
    float *x = room(rows * x_bytes), *post = room(rows * post_bytes);
    float *comb = room(rows * post_bytes * (size_t)hc);
    dsv4_hc w = {f32_pool + 9, f32_pool + 3, f32_pool + 70};
    ops->hc_pre(x, post, comb, f32_pool + 500000 + t * hc * dim, &w, &s, n, ex);
    for (int i = 0; i < n; i++) {
        uint8_t *row = out + (size_t)(t + i) * c->stride;
        memcpy(row, x + i * dim, x_bytes);
        memcpy(row + x_bytes, post + i * hc, post_bytes);
        memcpy(row + x_bytes + post_bytes, comb + i * hc * hc, post_bytes * (size_t)hc);
    }
    free(x), free(post), free(comb);
}

/* size: hc dim */
static void run_hc_post(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                        dsv4_exec *ex) {
    int hc = c->size[0], dim = c->size[1];
    dsv4_hc_shape s = {hc, dim, 20, 1e-6f, 1e-6f};
    memcpy(floats_at(c, out, t), f32_pool + 5 + t * hc * dim, (size_t)n * c->stride);
    ops->hc_post(floats_at(c, out, t), f32_pool + 600 + t * dim, f32_pool + 44 + t * hc,
                 f32_pool + 33333 + t * hc * hc, &s, n, ex);
}

/* size: hc dim */
static void run_hc_head(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                        dsv4_exec *ex) {
    int hc = c->size[0], dim = c->size[1];
    dsv4_hc_shape s = {hc, dim, 20, 1e-6f, 1e-6f};
    dsv4_hc w = {f32_pool + 9, f32_pool + 3, f32_pool + 70};
    ops->hc_pre(floats_at(c, out, t), NULL, NULL, f32_pool + 500000 + t * hc * dim, &w, &s, n, ex);
}

/* size: n_experts topk hash */
static void run_route(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                      dsv4_exec *ex) {
    int experts = c->size[0], k = c->size[1];
    int32_t tokens[MAX_N], table[1024], *ids = room((size_t)(n + 1) * (size_t)k * 4);
    float *weights = room((size_t)(n + 1) * (size_t)k * 4), logits[4096];
    for (int i = 0; i < n; i++) tokens[i] = (t + i) % (1024 / k);
    for (int i = 0; i < 1024; i++) table[i] = (i * 7 + i / k) % experts;
    for (int i = 0; i < n * experts; i++) {                  /* many ties */
        int at = i + t * experts;
        float x = f32_pool[at] * 40;
        logits[i] = (at & 1) ? roundf(x / 8) : x;
    }
    static const float no_bias[512];
    dsv4_route in = {logits, c->size[2] ? NULL : no_bias, c->size[2] ? table : NULL, tokens,
                     experts, k, 2.5f};
    ops->route(ids, weights, &in, n, ex);
    for (int i = 0; i < n; i++) {
        uint8_t *row = out + (size_t)(t + i) * c->stride;
        memcpy(row, ids + i * k, (size_t)k * 4);
        memcpy(row + k * 4, weights + i * k, (size_t)k * 4);
    }
    free(ids), free(weights);
}

/* size: d.  Limits 1.5 and 10 in turn, so that clamps are met. */
static void run_swiglu(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex) {
    int d = c->size[0];
    float *a = floats_at(c, out, t);
    for (int i = 0; i < n * d; i++) a[i] = f32_pool[i + t * d] * 20;
    ops->swiglu(a, a, f32_pool + 40000 + t * d, n, d, c->n % 2 ? 0.5f : 10, ex);
}

/* size: dim inter rounding hard.  Tokens are rows of x, taken in descending order. */
static void run_expert(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex) {
    int dim = c->size[0], inter = c->size[1];
    bool hard = c->size[3];                                  /* scales out of every range */
    const uint8_t *ws = hard ? byte_pool + 1001 : w_scale_pool + 1;
    const uint8_t *xs = hard ? byte_pool + 5000 : x_scale_pool + 2;
    dsv4_ffn w = {{DT_I8, inter, dim, byte_pool + 3, ws},
                  {DT_I8, dim, inter, byte_pool + 7, ws + 9},
                  {DT_I8, inter, dim, byte_pool + 9001, ws + 77}};
    dsv4_acts x = {fp8_pool + 1, xs, NULL};
    if (!c->size[2]) x = (dsv4_acts){NULL, NULL, f32_pool + 8};
    int32_t rows[EXPERT_ROWS];
    float weight[EXPERT_ROWS], *y = floats_at(c, out, t);
    for (int i = 0; i < n; i++) {
        rows[i] = t + n - 1 - i;
        weight[i] = 1 + f32_pool[rows[i]];
    }
    memcpy(y, f32_pool + t * dim, (size_t)n * c->stride);
    void *scratch = room(expert_scratch_bytes(dim, inter));
    if (n) ops->expert_ffn(floats_at(c, out, 0), &w, &x, rows, weight, n, 10, scratch, ex);
    free(scratch);
}

/* size: dtype vocab dim hc */
static void run_embed(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                      dsv4_exec *ex) {
    dsv4_mat w = make_mat(c->size[0], c->size[1], c->size[2]);
    int32_t tokens[MAX_N];
    for (int i = 0; i < n; i++) tokens[i] = (t + i) * 11 % c->size[1];
    ops->embed(floats_at(c, out, t), &w, tokens, n, c->size[3], ex);
}

/* size: copies d */
static void run_add(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                    dsv4_exec *ex) {
    int copies = c->size[0], d = c->size[1];
    memcpy(floats_at(c, out, t), f32_pool + 5 + t * copies * d, (size_t)n * c->stride);
    ops->add(floats_at(c, out, t), f32_pool + 600 + t * d, n, copies, d, ex);
}

#define STRIDE(bytes) .stride = (size_t)(bytes)
#define LINEAR(dtype, rows, cols, groups, n) \
    {"linear", run_linear, n, {dtype, rows, cols, groups}, cols, STRIDE(4 * (rows))}
#define RMSNORM(d, weighted, n) {"rmsnorm", run_rmsnorm, n, {d, weighted}, d, STRIDE(4 * (d))}
#define ACT_QUANT(d, n) {"act_quant", run_act_quant, n, {d}, 0, STRIDE(4 * (d))}
#define ACT_CODES(d, n) \
    {"act_codes", run_act_codes, n, {d}, 0, STRIDE((5 * (d) + ((d) + 127) / 128 + 3) & ~3)}
#define ROPE(heads, d, rope, pos, step, inverse, n) \
    {"rope", run_rope, n, {heads, d, rope, pos, step, inverse}, 0, STRIDE(4 * (heads) * (d))}
#define KV_ROUND(d, rope, packed, n) \
    {"kv_round", run_kv_round, n, {d, rope, packed}, 0, \
     STRIDE((packed) ? ((d) + (rope) + ((d) - (rope) + 63) / 64 + 7) / 8 * 8 : 4 * (d))}
#define INDEX_ROUND(d, packed, n) \
    {"index_round", run_index_round, n, {d, packed}, 0, \
     STRIDE((packed) ? (((d) + 1) / 2 + ((d) + 31) / 32 + 3) / 4 * 4 : 4 * (d))}
#define COMPRESS(ratio, d, n) \
    {"compress", run_compress, n, {ratio, d}, 2 * (ratio), STRIDE(4 * (d))}
#define INDEX(heads, d, ratio, t0, packed, n) \
    {"index_scores", run_index_scores, n, {heads, d, ratio, t0, packed}, 0, \
     STRIDE(4 * (((t0) + (n)) / (ratio) + 5))}
#define TOPK(k, ratio, t0, distinct, n) \
    {"topk", run_topk, n, {k, ratio, t0, distinct}, 0, STRIDE(4 * (k) + 4)}
#define ATTEND(heads, d, window, ratio, k, t0, rope, gathered, n) \
    {"attend", run_attend, n, {heads, d, window, ratio, k, t0, rope, gathered}, \
     (d) + (window) + (t0) + (n), STRIDE(4 * (heads) * (d))}
#define HC_PRE(hc, dim, n) \
    {"hc_pre", run_hc_pre, n, {hc, dim}, (hc) * (dim), STRIDE(4 * ((dim) + (hc) + (hc) * (hc)))}
#define HC_POST(hc, dim, n) {"hc_post", run_hc_post, n, {hc, dim}, hc, STRIDE(4 * (hc) * (dim))}
#define HC_HEAD(hc, dim, n) {"hc_head", run_hc_head, n, {hc, dim}, (hc) * (dim), STRIDE(4 * (dim))}
#define ROUTE(experts, k, hash, n) {"route", run_route, n, {experts, k, hash}, 0, STRIDE(8 * (k))}
#define SWIGLU(d, n) {"swiglu", run_swiglu, n, {d}, 0, STRIDE(4 * (d))}
#define EXPERT(dim, inter, on, hard, n) \
    {"expert_ffn", run_expert, n, {dim, inter, on, hard}, (on) ? 0 : (dim) + (inter), \
     STRIDE(4 * (dim))}
#define EMBED(dtype, vocab, dim, hc, n) \
    {"embed", run_embed, n, {dtype, vocab, dim, hc}, 0, STRIDE(4 * (dim) * (hc))}
#define ADD(copies, d, n) {"add", run_add, n, {copies, d}, 0, STRIDE(4 * (copies) * (d))}

static const op_case cases[] = {
    EMBED(DT_BF16, 50, 24, 4, 9), EMBED(DT_F32, 7, 33, 2, 3), EMBED(DT_F16, 7, 31, 1, 3),
    RMSNORM(1, 0, 3), RMSNORM(7, 1, 5), RMSNORM(100, 1, 9), RMSNORM(4096, 1, 3),
    RMSNORM(512, 0, 65),
    ACT_QUANT(1, 5), ACT_QUANT(100, 9), ACT_QUANT(129, 20), ACT_QUANT(1024, 40),
    ACT_CODES(4, 7), ACT_CODES(127, 9), ACT_CODES(260, 11), ACT_CODES(1024, 30),
    LINEAR(DT_F32, 1, 1, 1, 1), LINEAR(DT_F32, 5, 7, 1, 4), LINEAR(DT_F32, 24, 2051, 1, 33),
    LINEAR(DT_F16, 3, 9, 1, 2), LINEAR(DT_F16, 66, 1030, 1, 5), LINEAR(DT_BF16, 130, 100, 1, 70),
    LINEAR(DT_BF16, 17, 2048, 1, 64), LINEAR(DT_F8_E4M3, 1, 129, 1, 3),
    LINEAR(DT_F8_E4M3, 130, 100, 1, 7), LINEAR(DT_F8_E4M3, 257, 1157, 1, 65),
    LINEAR(DT_F8_E4M3, 48, 130, 3, 9), LINEAR(DT_F8_E4M3, 258, 140, 2, 2), /* a tile: two scales */
    LINEAR(DT_BF16, 14, 40, 2, 5), LINEAR(DT_I8, 9, 32, 1, 4), LINEAR(DT_I8, 37, 1056, 1, 11),
    ROPE(3, 128, 64, 0, 1, false, 9), ROPE(1, 64, 64, 1000000, 4, false, 5),
    ROPE(2, 9, 4, 7, 128, true, 3),
    KV_ROUND(64, 64, 1, 2), KV_ROUND(128, 64, 1, 9), KV_ROUND(101, 10, 1, 40),
    KV_ROUND(512, 64, 1, 20), KV_ROUND(100, 36, 0, 9),
    INDEX_ROUND(1, 1, 3), INDEX_ROUND(8, 1, 9), INDEX_ROUND(64, 0, 9), INDEX_ROUND(128, 1, 70),
    COMPRESS(4, 128, 9), COMPRESS(4, 20, 5), COMPRESS(4, 1, 3), COMPRESS(8, 13, 4),
    COMPRESS(128, 72, 5), COMPRESS(1, 16, 6),
    INDEX(4, 64, 4, 0, 1, 40), INDEX(1, 16, 4, 1100, 0, 9), INDEX(5, 32, 4, 77, 0, 17),
    INDEX(64, 128, 4, 1500, 1, 6), INDEX(17, 32, 1, 600, 1, 19), INDEX(33, 1024, 4, 40, 1, 3),
    INDEX(7, 512, 2, 0, 1, 20),
    TOPK(8, 4, 0, 0, 60), TOPK(8, 4, 100, 3, 20), TOPK(512, 4, 2040, 0, 40),
    TOPK(64, 1, 3000, 2, 9), TOPK(1, 1, 0, 1, 30),
    ATTEND(4, 128, 16, 0, 0, 0, 64, 0, 40), ATTEND(1, 8, 1, 0, 0, 5, -1, 0, 3),
    ATTEND(3, 20, 7, 4, 0, 10, 6, 0, 30), ATTEND(9, 64, 16, 4, 8, 3, -1, 0, 50),
    ATTEND(8, 512, 128, 4, 64, 700, 64, 0, 6), ATTEND(17, 36, 64, 128, 0, 1000, 2, 0, 5),
    ATTEND(5, 7, 3, 8, 0, 900, -1, 0, 4), ATTEND(35, 80, 9, 4, 20, 300, 16, 1, 5),
    ATTEND(3, 20, 7, 4, 6, 90, -1, 1, 9),
    HC_PRE(4, 96, 70), HC_PRE(4, 1030, 3), HC_PRE(1, 5, 2), HC_PRE(8, 33, 5), HC_PRE(3, 7, 4),
    HC_POST(4, 96, 20), HC_POST(4, 1030, 3), HC_POST(1, 5, 2), HC_POST(8, 515, 3),
    HC_HEAD(4, 96, 66), HC_HEAD(2, 13, 3), HC_HEAD(8, 520, 2),
    ROUTE(16, 4, 0, 50), ROUTE(256, 6, 0, 9), ROUTE(37, 37, 0, 3), ROUTE(16, 4, 1, 50),
    SWIGLU(1, 3), SWIGLU(77, 8), SWIGLU(2048, 5),
    EXPERT(32, 32, 1, 0, 1), EXPERT(32, 64, 1, 0, 5), EXPERT(96, 160, 1, 0, 64),
    EXPERT(288, 320, 1, 0, 7), EXPERT(2080, 96, 1, 0, 3), EXPERT(64, 2112, 1, 0, 2),
    EXPERT(544, 96, 1, 1, 9), EXPERT(96, 160, 0, 0, 64), EXPERT(1056, 64, 0, 0, 3),
    ADD(1, 9, 5), ADD(4, 100, 20),
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* === Twins and identity ======================================================================= */

static void describe(const op_case *c, char *text, size_t room_for) {
    const int *s = c->size;
    snprintf(text, room_for, "%s n %d (%d %d %d %d %d %d %d %d)", c->name, c->n, s[0], s[1], s[2],
             s[3], s[4], s[5], s[6], s[7]);
}

static uint8_t *results(const op_case *c, const dsv4_ops *ops, int step, dsv4_exec *ex) {
    uint8_t *out = room((size_t)c->n * c->stride);
    for (int t = 0; t < c->n; t += step) {
        int n = c->n - t < step ? c->n - t : step;
        while (n > EXPERT_ROWS && c->run == run_expert) n--;
        c->run(c, ops, out, t, n, ex);
    }
    return out;
}

static void test_kernels_twins(void) {
    /* Goal: ops_cpu computes what ops_ref does.  Method: every case; equal bytes where the
     * contract defines bits.  Else, as each of the k additions of a sum rounds by at most eps/2 of
     * a partial sum, and these errors are independent, (8 + 4 sqrt(k)) * eps/2 in units of the
     * output's rms; a score's error acts on attend's and compress's weights as it is. */
    double worst_share = 0;
    for (int i = 0; i < N_CASES; i++) {
        const op_case *c = &cases[i];
        char text[200];
        describe(c, text, sizeof text);
        uint8_t *want = results(c, &ops_ref, c->n, NULL);
        uint8_t *got = results(c, &ops_cpu, c->n, execs[1]);
        size_t bytes = (size_t)c->n * c->stride, count = bytes / 4;
        if (!c->sum) CHECK(same_bytes(got, want, bytes), "%s: not equal", text);
        const float *w = (const float *)(void *)want, *g = (const float *)(void *)got;
        double square = 0, tol = (8 + 4 * sqrt(c->sum)) * 0x1p-24;
        for (size_t j = 0; c->sum && j < count; j++) square += (double)w[j] * w[j];
        double rms = sqrt(square / (double)count);
        for (size_t j = 0; c->sum && j < count; j++) {
            double error = fabs((double)g[j] - w[j]) / rms;
            CHECK(error <= tol, "%s [%zu]: got %.9g want %.9g: %.3g rms, allowed %.3g", text, j,
                  (double)g[j], (double)w[j], error, tol);
            worst_share = fmax(worst_share, error / tol);
        }
        free(want), free(got);
    }
    NOTE("worst error: %.2f of its tolerance", worst_share);
}

static void test_kernels_same_bits(void) {
    /* Goal: an element's bits depend on its row and token only.  Method: every case at once, token
     * by token and by sevens, on 1, 2, 3 and 8 threads, against one thread at once. */
    static const int steps[3] = {1, 7, MAX_N};
    for (int i = 0; i < N_CASES; i++) {
        const op_case *c = &cases[i];
        uint8_t *want = results(c, &ops_cpu, c->n, execs[0]);
        for (int e = 0; e < N_EXECS; e++)
            for (int s = 0; s < 3; s++) {
                uint8_t *got = results(c, &ops_cpu, steps[s], execs[e]);
                char text[200];
                describe(c, text, sizeof text);
                CHECK(!memcmp(got, want, (size_t)c->n * c->stride), "%s: %d at a time, %d threads",
                      text, steps[s], exec_threads[e]);
                free(got);
            }
        free(want);
    }
}

/* === Rows of KV =============================================================================== */

/* What M2 makes of a block x [len], in its own words. */
static void round_block(float *y, const float *x, int len, bool e2m1) {
    double amax = e2m1 ? 6 * 0x1p-126 : (double)1e-4f, top = e2m1 ? 6 : 448;
    int exponent;
    for (int i = 0; i < len; i++) amax = fmax(amax, fabs((double)x[i]));
    double s = e2m1 ? (double)((float)amax / 6) : (double)((float)amax * (1.0f / 448));
    s = frexp(s, &exponent) == 0.5 ? s : ldexp(1, exponent);
    for (int i = 0; i < len; i++) {
        float r = (float)(x[i] / s);
        CHECK(!(fabs(r) > top), "%g is beyond the format", (double)r);
        r = e2m1 ? e2m1_to_f32(f32_to_e2m1(r)) : e4m3_to_f32(f32_to_e4m3(r));
        y[i] = r * (float)s;
    }
}

/* Hard values for block number `block` of any row: of one magnitude, zeros, scales' edges. */
static void row_inputs(float *x, int n, int block) {
    rounding_inputs(x, (size_t)block * 97, (size_t)n);
    float edge = ldexpf(block % 3 ? 448 : 6, block % 240 - 149 + block % 2 * 20);
    for (int i = 0; i < n; i++) {
        if (block % 8 == 1) x[i] = i % 2 ? -0.0f : 0;
        if (block % 8 == 2) x[i] = edge * (i % 5 ? f32_pool[block + i] : 1);
        if (block % 8 == 3) x[i] = nextafterf(edge, i % 7 ? 0 : INFINITY);
        if (block % 8 == 4) x[i] = f32_pool[block + i] * 0x1p-126f;
        if (block % 8 == 5) x[i] = i % 64 ? f32_pool[block + i] * 3.2e38f : 3.2e38f;
    }
}

static void test_kernels_rows_hold_the_roundings(void) {
    /* Goal: a row read back is what M2 rounds to, at any size, -0 and subnormals included; and
     * attend sees the same values.  Method: the roundings in double, blocks of hard values; attend
     * with one entry and no sink gives that entry. */
    static const int dims[2] = {128, 512}, index_dims[3] = {32, 64, 128};
    float x[512], want[512], got[512], q[512] = {0}, sink = -INFINITY;
    uint8_t row[1024];
    double entry = (double)kv_row_bytes(512, 64, true), key = (double)index_row_bytes(128, true);
    CHECK(entry == 584 && key == 68, "Flash: %g and %g bytes", entry, key);
    CHECK((entry + key) / 4 * 21 + entry / 128 * 20 == 3514.25, "bytes a token of Flash");
    for (int round = 0; round < 2000; round++) {
        int d = dims[round % 2], cut = d - 64;
        row_inputs(x, d, round);
        for (int b = 0; b < cut; b += 64) round_block(want + b, x + b, 64, false);
        for (int c = cut; c < d; c++) want[c] = bf16_to_f32(f32_to_bf16(x[c]));
        memset(row, 0xa5, sizeof row);
        ops_cpu.kv_round(row, x, 1, d, 64, true, execs[0]);
        kv_row_read(got, row, d, 64, true);
        CHECK(!memcmp(got, want, (size_t)d * 4), "round %d", round);
        CHECK(!row[kv_row_bytes(d, 64, true) - 1], "round %d: padding", round);
        dsv4_attend in = {q, row, row, NULL, NULL, NULL, &sink, 1, d, 64, 1, 0, 0, true, 0};
        ops_cpu.attend(got, &in, 1, execs[0]);
        for (int c = 0; c < d; c++)
            CHECK(got[c] == want[c], "round %d dim %d: attend sees %g, not %g", round, c,
                  (double)got[c], (double)want[c]);

        d = index_dims[round % 3];
        row_inputs(x, d, round);
        for (int c = 0; c < d; c++) x[c] = fminf(fmaxf(x[c], -1e36f), 1e36f);
        memcpy(got, x, sizeof got);
        ops_ref.index_round(want, got, 1, d, false, NULL);
        for (int b = 0; b < d; b += 32) round_block(want + b, want + b, 32, true);
        memcpy(got, x, sizeof got);
        memset(row, 0xa5, sizeof row);
        ops_cpu.index_round(row, got, 1, d, true, execs[0]);
        index_row_read(got, row, d);
        CHECK(!memcmp(got, want, (size_t)d * 4), "index, round %d", round);
        CHECK(d == 128 || !row[index_row_bytes(d, true) - 1], "index, round %d: padding", round);
    }
}

static void test_kernels_rows_keep_nan(void) {
    /* Goal: a NaN in an entry is one in the attention over it, an infinity makes its block NaN, and
     * other dims stay as they are.  Method: one of them in each place. */
    enum { D = 128 };
    float x[D], want[D], got[D], q[D] = {0}, sink = -INFINITY;
    uint8_t row[256];
    for (int c = 0; c < D; c++)
        for (int inf = 0; inf < 2; inf++) {
            memcpy(x, f32_pool + c, sizeof x);
            x[c] = inf ? -INFINITY : NAN;
            ops_cpu.kv_round(row, x, 1, D, 32, true, execs[0]);
            dsv4_attend in = {q, row, row, NULL, NULL, NULL, &sink, 1, D, 32, 1, 0, 0, true, 0};
            ops_cpu.attend(got, &in, 1, execs[0]);
            kv_row_read(want, row, D, 32, true);
            for (int i = 0; i < D; i++) {
                bool nan = !inf ? i == c : c < 96 && i < 96 && i / 64 == c / 64;
                CHECK(isnan(want[i]) == nan, "dim %d, inf %d at %d: %g", i, inf, c,
                      (double)want[i]);
            }
            CHECK(isnan(got[c]), "%g", (double)got[c]);      /* q.k is one as well */
        }
}

static void test_kernels_index_any_row(void) {
    /* Goal: index scores are exact sums at their limits, and what their contract says of any row.
     * Method: values of 6 and -6 throughout; rows of random bytes, every scale code among them;
     * equal to the reference, NaN to NaN. */
    enum { HEADS = 5, D = 128, KEYS = 300, ROW = 68 };
    static uint8_t q[HEADS * ROW], keys[KEYS * ROW];
    static const uint8_t edge[4] = {0x77, 0xff, 0x7f, 0x07};
    float w[HEADS] = {1, -0.5f, 3e38f, -1e-30f, 0}, want[KEYS], got[KEYS];
    dsv4_index in = {q, w, 0.5f, keys, HEADS, D, 1, true, KEYS - 1, KEYS};
    for (int round = 0; round < 40; round++) {
        for (int i = 0; i < KEYS * ROW; i++)
            keys[i] = round < 16 ? i % ROW < 64 ? edge[round % 4] : 130 : (uint8_t)random_u32();
        for (int i = 0; i < HEADS * ROW; i++)
            q[i] = round < 16 ? i % ROW < 64 ? edge[round / 4] : 120 : (uint8_t)random_u32();
        ops_ref.index_scores(want, &in, 1, NULL);
        ops_cpu.index_scores(got, &in, 1, execs[round % N_EXECS]);
        CHECK(same_bytes((uint8_t *)got, (uint8_t *)want, sizeof got), "round %d: %g, not %g",
              round, (double)got[0], (double)want[0]);
    }
}

/* === exp ====================================================================================== */

static void test_kernels_exp(void) {
    /* Goal: within 2 ulp of exp everywhere, subnormal results included, and the promised ends.
     * Method: every 101st F32 from -110 to 90 against libm's double. */
    double worst = 0;
    for (uint32_t bits = 0; bits < 0x42dc0000u; bits += 101)
        for (uint32_t sign = 0; sign < 2; sign++) {
            uint32_t u = bits | sign << 31;
            float x;
            memcpy(&x, &u, 4);
            if (x > 90) continue;
            double want = exp((double)x);
            float got = exp_f32(x);
            if (want > 3.4028235e38) {
                CHECK(got >= 0x1.fffffcp127f, "exp(%.9g) = %g", (double)x, (double)got);
                continue;
            }
            int e;
            (void)frexp(want, &e);
            double ulp = ldexp(1, (e > -125 ? e : -125) - 24);
            double error = fabs((double)got - want) / ulp;
            CHECK(error <= 2, "exp(%.9g) = %.9g, %g ulp off", (double)x, (double)got, error);
            worst = fmax(worst, error);
        }
    CHECK(exp_f32(0) == 1 && exp_f32(-0.0f) == 1, "exp(0)");
    CHECK(exp_f32(-104.001f) == 0 && exp_f32(-INFINITY) == 0, "exp of little");
    CHECK(exp_f32(88.73f) > 3.4e38f && isinf(exp_f32(88.73f)) && isinf(exp_f32(INFINITY)),
          "exp of much");
    CHECK(isnan(exp_f32(NAN)), "exp of NaN");
    NOTE("worst error: %.2f ulp", worst);
}

static void test_kernels_exp_vector(void) {
    /* Goal: the vector exp gives exp_f32's bits.  Method: seen through swiglu, where u is 1, and
     * for exp(x) below 2^-25 bare through compress: with scores 0 and x and values 0 and 1 an
     * entry is exp(x) / (1 + exp(x)). */
    enum { N = 1 << 16 };
    static float g[N], u[N], a[N], b[N], kv[2 * N], score[2 * N], ape[2 * N];
    for (int round = 0; round < 16; round++) {
        for (int i = 0; i < N; i++) {
            g[i] = random_f32() * 110;
            u[i] = 1;
            kv[i] = 0, kv[N + i] = 1;
            score[i] = 0, score[N + i] = -fabsf(g[i]);
        }
        ops_ref.swiglu(a, g, u, 1, N, INFINITY, NULL);
        ops_cpu.swiglu(b, g, u, 1, N, INFINITY, execs[0]);
        CHECK(!memcmp(a, b, sizeof a), "swiglu shows another exp");
        dsv4_compress in = {kv, score, NULL, NULL, ape, 2, N, 0};
        ops_cpu.compress(b, &in, 0, 1, execs[0]);
        for (int i = 0; i < N; i++) {
            float p = exp_f32(score[N + i]);
            CHECK(b[i] == p / (1 + p), "compress shows exp(%.9g) = %.9g, not %.9g",
                  (double)score[N + i], (double)b[i], (double)p);
        }
    }
}

/* === Ties of experts, formats, experts at their limits, top-k at length ====================== */

static void test_kernels_bf16_f16(void) {
    /* Goal: BF16 and F16 both ways, ties and NaN included.  Method: every code; halves. */
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t code = (uint16_t)i;
        float x = bf16_to_f32(code), y = f16_to_f32(code);
        if (isnan(x)) {
            CHECK(isnan(bf16_to_f32(f32_to_bf16(x))), "bf16 %04x", i);
        } else {
            CHECK(f32_to_bf16(x) == code, "bf16 %04x", i);
            float half = x + (bf16_to_f32((uint16_t)(code + 1)) - x) / 2;
            if (isfinite(half))
                CHECK(f32_to_bf16(half) == code + (code & 1), "half above bf16 %04x", i);
        }
        int e = code >> 10 & 31, mant = code & 1023;
        double want = e ? ldexp(1024 + mant, e - 25) : ldexp(mant, -24);
        if (e == 31) want = mant ? NAN : INFINITY;
        want = code & 0x8000 ? -want : want;
        CHECK((double)y == want || (isnan(y) && isnan(want)), "f16 %04x is %g", i, (double)y);
    }
}

static void test_kernels_expert_extremes(void) {
    /* Goal: the integer sums hold at their limits.  Method: all weights 6, or -6, or 0; all codes
     * 448, -448, the least, or taking turns; equal to the reference bit by bit. */
    enum { DIM = 320, INTER = 288 };
    static uint8_t weights[DIM * INTER / 2], scales[DIM * INTER / 32], code[DIM], x_scale[3];
    static const uint8_t patterns[5] = {0x77, 0xff, 0x7f, 0x00, 0x91};
    static const uint8_t codes[5][2] = {{126, 126}, {254, 254}, {126, 254}, {1, 129}, {119, 1}};
    float y[2][DIM], weight = 1.25f;
    int32_t row = 0;
    void *scratch = room(expert_scratch_bytes(DIM, INTER));
    memset(scales, 121, sizeof scales);
    memset(x_scale, 110, sizeof x_scale);
    dsv4_ffn w = {{DT_I8, INTER, DIM, weights, scales}, {DT_I8, DIM, INTER, weights, scales},
                  {DT_I8, INTER, DIM, weights, scales}};
    dsv4_acts x = {code, x_scale, NULL};
    for (int p = 0; p < 25; p++) {
        memset(weights, patterns[p % 5], sizeof weights);
        for (int i = 0; i < DIM; i++) code[i] = codes[p / 5][i % 2];
        memset(y, 0, sizeof y);
        ops_ref.expert_ffn(y[0], &w, &x, &row, &weight, 1, 10, scratch, NULL);
        ops_cpu.expert_ffn(y[1], &w, &x, &row, &weight, 1, 10, scratch, execs[1]);
        CHECK(!memcmp(y[0], y[1], sizeof y[0]), "weights %02x codes %d %d: got %g want %g",
              patterns[p % 5], codes[p / 5][0], codes[p / 5][1], (double)y[1][0], (double)y[0][0]);
    }
    free(scratch);
}

static void test_kernels_expert_clamps(void) {
    /* Goal: exponents are clamped, not wrapped.  Method: w2's scales 0, so that a sum of tiny terms
     * must not vanish; then zeros times the largest scales, which must not become NaN. */
    enum { DIM = 64, INTER = 64 };
    static uint8_t weights[2][DIM * INTER / 2], scales[3][DIM * INTER / 32], code[DIM], x_scale[1];
    float y[2][DIM], weight = 1;
    int32_t row = 0;
    void *scratch = room(expert_scratch_bytes(DIM, INTER));
    memset(weights[1], 0x23, sizeof weights[1]);
    memset(scales[1], 121, sizeof scales[1]);
    memset(scales[2], 254, sizeof scales[2]);
    memset(code, 100, sizeof code);
    for (int high = 0; high < 2; high++) {
        const uint8_t *up = weights[!high], *up_scale = scales[high ? 2 : 1];
        dsv4_ffn w = {{DT_I8, INTER, DIM, up, up_scale},
                      {DT_I8, DIM, INTER, weights[1], scales[high]},
                      {DT_I8, INTER, DIM, up, up_scale}};
        dsv4_acts x = {code, x_scale, NULL};
        x_scale[0] = high ? 254 : 118;
        memset(y, 0, sizeof y);
        ops_ref.expert_ffn(y[0], &w, &x, &row, &weight, 1, 10, scratch, NULL);
        ops_cpu.expert_ffn(y[1], &w, &x, &row, &weight, 1, 10, scratch, execs[1]);
        CHECK(!memcmp(y[0], y[1], sizeof y[0]), "got %g want %g", (double)y[1][0], (double)y[0][0]);
        CHECK(high ? y[1][0] == 0 : y[1][0] > 0, "%g", (double)y[1][0]);
    }
    free(scratch);
}

/* A copy behind which nothing may be read, for as long as the test runs. */
static const void *fenced(const void *from, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char *p = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert(p != MAP_FAILED);
    CHECK(mprotect(p + whole, page, PROT_NONE) == 0, "no fence");
    return memcpy(p + whole - bytes, from, bytes);
}

static void test_kernels_reads_within(void) {
    /* Goal: no operation reads behind a matrix.  Method: matrices of odd sizes, each before a page
     * that may not be read; the same results as elsewhere, for few and for many tokens. */
    static const struct { dsv4_dtype t; int rows, cols; size_t bytes; } mats[6] = {
        {DT_F32, 5, 13, 260}, {DT_F16, 3, 1031, 6186}, {DT_BF16, 6, 9, 108}, {DT_F8_E4M3, 1, 7, 7},
        {DT_F8_E4M3, 131, 139, 18209}, {DT_I8, 7, 96, 336},
    };
    static float want[64 * 131], got[64 * 131];
    for (int i = 0; i < 6; i++)
        for (int n = 1; n < 6; n += 4) {
            dsv4_mat w = make_mat((int)mats[i].t, mats[i].rows, mats[i].cols), fence = w;
            fence.data = fenced(w.data, mats[i].bytes);
            if (w.scale) fence.scale = fenced(w.scale, w.dtype == DT_I8 ? 21 : w.rows > 1 ? 4 : 1);
            ops_cpu.linear(want, &w, f32_pool, n, 1, execs[0]);
            ops_cpu.linear(got, &fence, f32_pool, n, 1, execs[0]);
            CHECK(!memcmp(want, got, (size_t)(n * w.rows) * 4), "matrix %d, %d tokens", i, n);
        }
    enum { D = 288 };                                        /* nine blocks: a group and a half */
    void *scratch = room(expert_scratch_bytes(D, D));
    dsv4_mat w = {DT_I8, D, D, fenced(byte_pool, D * D / 2),
                  fenced(w_scale_pool, D * D / 32)};
    dsv4_mat plain = {DT_I8, D, D, byte_pool, w_scale_pool};
    dsv4_ffn fence = {w, w, w}, ffn = {plain, plain, plain};
    dsv4_acts x = {fp8_pool, x_scale_pool, NULL};
    int32_t rows[3] = {0, 1, 2};
    float weight[3] = {1, 2, 3};
    for (int m = 1; m < 4; m += 2) {
        memset(want, 0, sizeof want), memset(got, 0, sizeof got);
        ops_cpu.expert_ffn(want, &ffn, &x, rows, weight, m, 10, scratch, execs[0]);
        ops_cpu.expert_ffn(got, &fence, &x, rows, weight, m, 10, scratch, execs[0]);
        CHECK(!memcmp(want, got, sizeof want), "expert, %d tokens", m);
    }
    free(scratch);
}

static void test_kernels_rows_read_within(void) {
    /* Goal: nothing is read behind rows.  Method: keys and queries, and entries of even and odd
     * sizes, each before a page that may not be read; the same results as elsewhere. */
    static const int dims[4][2] = {{128, 64}, {512, 64}, {39, 4}, {50, 18}};
    enum { N = 13, D = 64, HEADS = 3 };
    float want[HEADS * 512], got[HEADS * 512], w[HEADS] = {1, 2, -3};
    size_t bytes = index_row_bytes(D, true);
    void *keys = index_rows(5, N, D, true), *q = index_rows(77777, HEADS, D, true);
    dsv4_index in = {q, w, 1, keys, HEADS, D, 1, true, N - 1, N}, near = in;
    near.q = fenced(q, HEADS * bytes), near.keys = fenced(keys, N * bytes);
    ops_cpu.index_scores(want, &in, 1, execs[0]);
    ops_cpu.index_scores(got, &near, 1, execs[0]);
    CHECK(!memcmp(want, got, N * 4), "keys");
    free(keys), free(q);
    for (int i = 0; i < 4; i++) {
        int d = dims[i][0], rope = dims[i][1];
        size_t row = kv_row_bytes(d, rope, true);
        void *kv = kv_rows(9, N, d, rope);
        for (int far = 0; far < 2; far++) {
            const uint8_t *ring = far ? kv : fenced(kv, N * row), *now = ring + (N - 1) * row;
            dsv4_attend at = {f32_pool, now, ring, NULL, NULL, NULL, w, HEADS, d, rope, N, 0, 0,
                              true, N - 1};
            ops_cpu.attend(far ? want : got, &at, 1, execs[0]);
        }
        CHECK(!memcmp(want, got, (size_t)(HEADS * d) * 4), "entries of %d dims", d);
        free(kv);
    }
}

static const float *sort_scores;

static int by_score(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = sort_scores[i], y = sort_scores[j];
    return x != y ? (x < y ? 1 : -1) : (i > j) - (i < j);
}

static int by_id(const void *a, const void *b) {
    return *(const int32_t *)a - *(const int32_t *)b;
}

static void test_kernels_route_ties(void) {
    /* Goal: experts in descending order of score plus bias, equal ones by the lower id.  Method:
     * logits and biases of few different values, against a plain sort. */
    enum { EXPERTS = 64, K = 12 };
    float logits[EXPERTS], bias[EXPERTS], biased[EXPERTS], weights[K];
    int32_t order[EXPERTS], ids[K];
    for (int round = 0; round < 50; round++) {
        for (int e = 0; e < EXPERTS; e++) {
            logits[e] = roundf(random_f32() * 2);
            bias[e] = roundf(random_f32());
            biased[e] = (float)sqrt(log1p(exp((double)logits[e]))) + bias[e];
            order[e] = e;
        }
        sort_scores = biased;
        qsort(order, EXPERTS, sizeof *order, by_score);
        dsv4_route in = {logits, bias, NULL, NULL, EXPERTS, K, 1};
        for (int i = 0; i < 2; i++) {
            (i ? &ops_cpu : &ops_ref)->route(ids, weights, &in, 1, execs[0]);
            CHECK(!memcmp(ids, order, sizeof ids), "round %d: first %d, not %d", round, ids[0],
                  order[0]);
        }
    }
}

/* Scores of a kind, n of them. */
static void topk_scores(float *s, int n, int kind) {
    for (int i = 0; i < n; i++) {
        float x = random_f32();
        switch (kind) {
        case 0: s[i] = x; break;
        case 1: s[i] = roundf(x * 1000); break;              /* many -0 and 0 as well */
        case 2: s[i] = roundf(x * 1.5f); break;
        case 3: s[i] = -1.5f; break;
        case 4: s[i] = i % 3 ? 0 : -0.0f; break;
        case 5: s[i] = x < 0 ? -1 : 1; break;
        case 6: s[i] = i % 997 ? 0 : x + 2; break;           /* the 512th may lie among zeros */
        default: s[i] = (float)(kind == 7 ? i : n - i);      /* ascending, descending */
        }
    }
}

static void test_kernels_topk_long(void) {
    /* Goal: right for any number of entries.  Method: those of a little more than 49,140, 232,436
     * and 779,424 tokens and of a million, and as many entries as that; distinct scores, and equal
     * ones with the k-th in a run of them; against a plain sort. */
    static const int counts[] = {513, 12286, 58110, 194857, 262144, 49141, 232437, 779425, 1 << 20};
    enum { K = 512, KINDS = 9, MOST = 1 << 20 };
    static float scores[MOST];
    static int32_t order[MOST];
    int32_t idx[K], count;
    for (int c = 0; c < 9; c++)
        for (int kind = c > 5 ? c % 2 : 0; kind < KINDS; kind += c > 5 ? 2 : 1) {
            int n = counts[c];
            topk_scores(scores, n, kind);
            for (int i = 0; i < n; i++) order[i] = i;
            sort_scores = scores;
            qsort(order, (size_t)n, sizeof *order, by_score);
            qsort(order, K, sizeof *order, by_id);
            ops_cpu.topk(idx, &count, scores, (size_t)n, 1, K, 1, n - 1, execs[0]);
            CHECK(count == K && !memcmp(idx, order, sizeof idx), "%d entries, kind %d", n, kind);
        }
}

/* === Thread pool ============================================================================== */

static void test_kernels_pool_covers(void) {
    /* Goal: each item of a region is done once, before it returns.  Method: `add` of ones has an
     * item a token; after each of many small and some large regions every sum is right. */
    enum { LARGE = 5000 };
    static const int sizes[8] = {0, 1, 2, 3, 7, 8, 100, LARGE};
    static float ones[LARGE], y[LARGE];
    for (int i = 0; i < LARGE; i++) ones[i] = 1;
    for (int e = 0; e < N_EXECS; e++)
        for (int s = 0; s < 8; s++) {
            int repeats = sizes[s] == LARGE ? 5 : 300;
            memset(y, 0, sizeof y);
            for (int r = 1; r <= repeats; r++) {
                ops_cpu.add(y, ones, sizes[s], 1, 1, execs[e]);
                for (int i = 0; i < sizes[s]; i++)
                    CHECK(y[i] == (float)r, "%d threads, item %d of %d: %g after %d regions",
                          exec_threads[e], i, sizes[s], (double)y[i], r);
            }
            for (int i = sizes[s]; i < LARGE; i++) CHECK(y[i] == 0, "item %d was not asked for", i);
        }
}

static void test_kernels_pool_opens(void) {
    /* Goal: pools of any size start, work once or never, and end.  Method: open, perhaps use, and
     * close, with up to 64 threads. */
    static float ones[64], y[64];
    for (int threads = 1; threads <= 64; threads = threads * 2 + threads % 3)
        for (int used = 0; used < 2; used++) {
            dsv4_exec *ex;
            dsv4_err err;
            CHECK(exec_open(&ex, threads, &err) == 0, "%d threads", threads);
            if (used) ops_cpu.add(y, ones, 64, 1, 1, ex);
            exec_close(ex);
        }
    exec_close(NULL);
}

static void test_kernels_measure(void) {
    /* Goal: rates that can be, for any number of threads and however little time.  Method: finite,
     * positive, and below what any machine reads or multiplies; the pool works afterwards. */
    for (int e = 0; e < N_EXECS; e++) {
        exec_rates rates = {NAN, NAN};
        dsv4_err err;
        CHECK(exec_measure(execs[e], 64 << 20, e == 1 ? 0.2 : 0, &rates, &err) == 0, "%s", err.msg);
        CHECK(rates.read_bytes_s > 1e7 && rates.read_bytes_s < 1e12, "%g bytes a second",
              rates.read_bytes_s);
        CHECK(rates.macs_s > 1e6 && rates.macs_s < 1e14, "%g multiply-adds a second", rates.macs_s);
        if (e == 1)
            NOTE("%d threads: %.1f GB/s, %.1f GMAC/s", exec_threads[e], rates.read_bytes_s / 1e9,
                 rates.macs_s / 1e9);
    }
    static float ones[64], y[64];
    for (int i = 0; i < 64; i++) ones[i] = 1;
    ops_cpu.add(y, ones, 64, 1, 1, execs[2]);
    for (int i = 0; i < 64; i++) CHECK(y[i] == 1, "item %d after measuring", i);
}

int main(void) {
    dsv4_err err;
    fill_pools();
    for (int e = 0; e < N_EXECS; e++)
        if (exec_open(&execs[e], exec_threads[e], &err)) return printf("FAIL %s\n", err.msg), 1;
    RUN(test_kernels_twins);
    RUN(test_kernels_same_bits);
    RUN(test_kernels_rows_hold_the_roundings);
    RUN(test_kernels_rows_keep_nan);
    RUN(test_kernels_index_any_row);
    RUN(test_kernels_exp);
    RUN(test_kernels_exp_vector);
    RUN(test_kernels_bf16_f16);
    RUN(test_kernels_expert_extremes);
    RUN(test_kernels_expert_clamps);
    RUN(test_kernels_reads_within);
    RUN(test_kernels_rows_read_within);
    RUN(test_kernels_route_ties);
    RUN(test_kernels_topk_long);
    RUN(test_kernels_pool_covers);
    RUN(test_kernels_pool_opens);
    RUN(test_kernels_measure);
    for (int e = 0; e < N_EXECS; e++) exec_close(execs[e]);
    return check_done();
}
