/* test_kernels.c -- ops_cpu against ops_ref, against itself, and the thread pool.
 *
 *   case = an operation and its sizes  ->  run(table, tokens t .. t+n-1, threads)  ->  bytes
 *   twins      ops_cpu's bytes are ops_ref's, or as near as eps and the length of sums allow
 *   identity   the same bytes for any split of the tokens and any number of threads
 *
 * Inputs are read-only pools of random numbers; a case picks places in them, often odd ones.    */
#include "../dsv4.h"
#include "check.h"

#include <assert.h>

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

/* === Cases ==================================================================================== */

typedef struct op_case op_case;
/* Do tokens t .. t+n-1; their results are `stride` bytes a token, the first at out + t*stride. */
typedef void (*run_fn)(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex);
struct op_case {
    const char *name;
    run_fn run;
    int n;                         /* tokens                                                    */
    int size[6];                   /* as the run function says                                  */
    int sum;                       /* length of the longest sum; 0: the twins are equal         */
    size_t stride;                 /* filled by run with n = 0                                  */
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

/* size: d block */
static void run_act_quant(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                          dsv4_exec *ex) {
    size_t d = (size_t)c->size[0];
    float *y = floats_at(c, out, t);
    rounding_inputs(y, (size_t)t * d, (size_t)n * d);
    ops->act_quant(y, y, n, c->size[0], c->size[1], ex);
}

/* size: d.  Codes, scales, and the values they stand for. */
static void run_act_codes(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                          dsv4_exec *ex) {
    size_t d = (size_t)c->size[0], blocks = (d + 127) / 128, rows = (size_t)n;
    float *x = room((rows + 1) * d * sizeof *x), *y = room((rows + 1) * d * sizeof *y);
    uint8_t *code = room((rows + 1) * d), *scale = room((rows + 1) * blocks);
    rounding_inputs(x, (size_t)t * d, rows * d);
    ops->act_codes(code, scale, x, n, c->size[0], ex);
    ops->act_values(y, code, scale, n, c->size[0], ex);
    ops_ref.act_quant(x, x, n, c->size[0], 128, NULL);
    for (size_t i = 0; i < rows; i++) {
        uint8_t *row = out + ((size_t)t + i) * c->stride;
        CHECK(!memcmp(x + i * d, y + i * d, d * sizeof *x), "%s: act_values is not act_quant",
              ops->name);
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

/* size: head_dim rope_dim */
static void run_kv_round(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                         dsv4_exec *ex) {
    size_t d = (size_t)c->size[0];
    rounding_inputs(floats_at(c, out, t), (size_t)t * d, (size_t)n * d);
    ops->kv_round(floats_at(c, out, t), n, c->size[0], c->size[1], ex);
}

/* size: d rounding */
static void run_index_round(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                            dsv4_exec *ex) {
    size_t d = (size_t)c->size[0];
    rounding_inputs(floats_at(c, out, t), (size_t)t * d, (size_t)n * d);
    ops->index_round(floats_at(c, out, t), n, c->size[0], c->size[1], ex);
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

/* size: n_heads d ratio t0.  A token's row has room for all entries; unseen ones are 0. */
static void run_index_scores(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                             dsv4_exec *ex) {
    const int *s = c->size;
    size_t stride = c->stride / sizeof(float);
    memset(out + (size_t)t * c->stride, 0, (size_t)n * c->stride);
    dsv4_index in = {f32_pool + 100 + t * s[0] * s[1], f32_pool + t * s[0], 0.3f,
                     f32_pool + 200001, s[0], s[1], s[2], s[3] + t, stride};
    ops->index_scores(floats_at(c, out, t), &in, n, ex);
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

/* size: n_heads head_dim window ratio topk (0: all) t0 */
static void run_attend(const op_case *c, const dsv4_ops *ops, uint8_t *out, int t, int n,
                       dsv4_exec *ex) {
    const int *s = c->size;
    size_t d = (size_t)s[1], window = (size_t)s[2], k = (size_t)s[4];
    int64_t t0 = s[5] + t;
    const float *kv = f32_pool + 1;                          /* of every position */
    float *ring = room(window * d * sizeof *ring);
    int32_t *idx = room((size_t)(n + 1) * (k + 1) * 4), *count = room((size_t)(n + 1) * 4);
    for (int64_t p = t0 < s[2] ? 0 : t0 - s[2]; p < t0; p++)
        memcpy(ring + (size_t)p % window * d, kv + (size_t)p * d, d * sizeof *ring);
    for (int i = 0; s[4] && i < n; i++) {
        int visible = (int)(t0 + i + 1) / s[3];
        count[i] = visible < s[4] ? visible : s[4];
        for (int j = 0; j < count[i]; j++)
            idx[(size_t)i * k + (size_t)j] = (int)((int64_t)j * visible / count[i]);
    }
    dsv4_attend in = {f32_pool + 3 + (size_t)t * (size_t)s[0] * d, kv + (size_t)t0 * d, ring,
                      s[3] ? f32_pool + 400009 : NULL, s[4] ? idx : NULL, count, f32_pool + 50,
                      s[0], s[1], s[2], s[3], s[4], t0};
    if (n) ops->attend(floats_at(c, out, t), &in, n, ex);
    free(ring), free(idx), free(count);
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
    ops->hc_head(floats_at(c, out, t), f32_pool + 500000 + t * hc * dim, &w, &s, n, ex);
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
        float x = f32_pool[i + t * experts] * 40;
        logits[i] = (i & 1) ? roundf(x / 8) : x;
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
    dsv4_ffn w = {{DT_I8, inter, dim, byte_pool + 3, ws}, {DT_I8, dim, inter, byte_pool + 7, ws + 9},
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
