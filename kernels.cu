/* kernels.cu -- the book of ops: what each operation computes, and its plain-C reference.
 *
 *      contract (a comment)  ->  NAME_ref, here  ->  NAME_cpu, in kernels.c
 *                                               ->  NAME_cuda, here, of the first simple ones
 *
 * A reference is the specification: scalar, sums in double, in MODEL.md's words, never optimised.
 * The fast twin is checked against it: `==` where a contract says BIT-DEFINED, else within a
 * tolerance that follows from the length of its sums.  BIT-DEFINED operations give the same bits
 * on every machine and backend, so their reference keeps F32 wherever the definition says F32.
 *
 * Invariants   1 nothing is allocated, nothing is kept between calls
 *              2 an output may alias an input only where its contract says so
 *              3 an assert means a caller's bug; the numbers in weights never trip one
 * Contents     1 number formats   2 exp and rotation frequencies   3 rounding blocks, rows of KV
 *              4..24 the operations of dsv4_ops, in its order   25 the table
 * Not here     SIMD and threads (kernels.c), the graph (dsv4.c)
 *
 * Built as C11 and, for a GPU, as C++17: the common subset of both.                             */
#include "dsv4.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* === 1. Number formats (M1) =================================================================== */

BOTH static uint32_t f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

BOTH static float bits_f32(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* The code, without sign, of x >= 0 in a small float format of `mant` mantissa bits, with
 * subnormals, whose least normal number is 2^(least - 127).  Nearest, ties to the even code.
 * Adding 2^(e + 23 - mant) makes the F32 addition itself round to the format's step at
 * exponent e; the sum's low bits then count steps.  x must not exceed the format's largest. */
BOTH static uint32_t small_code(float x, uint32_t least, uint32_t mant) {
    uint32_t e = f32_bits(x) >> 23;
    if (e < least) e = least;
    float big = bits_f32((e + 23 - mant) << 23);
    uint32_t steps = f32_bits(x + big) - f32_bits(big);
    return ((e - least) << mant) + steps;
}

/* 512 times the value of an e4m3 code, an integer: |m| <= 229376.  (A NaN code counts as 480.) */
BOTH static int32_t e4m3_int(uint8_t code) {
    int32_t mag = code & 127;
    int32_t m = mag < 8 ? mag : (8 + (mag & 7)) << ((mag >> 3) - 1);
    return code & 128 ? -m : m;
}

/* Twice the value of an e2m1 nibble, an integer: |w| <= 12. */
BOTH static int32_t e2m1_int(uint8_t nibble) {
    static const int8_t twice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    return nibble & 8 ? -twice[nibble & 7] : twice[nibble & 7];
}

BOTH float e4m3_to_f32(uint8_t code) {
    if ((code & 127) == 127) return NAN;
    float x = (float)e4m3_int(code) * 0x1p-9f;
    return code == 128 ? -0.0f : x;
}

BOTH uint8_t f32_to_e4m3(float x) {
    uint8_t sign = (uint8_t)(f32_bits(x) >> 24 & 128);
    if (isnan(x)) return 127;                                /* a NaN's sign differs by machine */
    return (uint8_t)(sign | small_code(fminf(fabsf(x), 448), 127 - 6, 3));
}

BOTH float e2m1_to_f32(uint8_t nibble) {
    float x = (float)e2m1_int(nibble) * 0.5f;
    return (nibble & 15) == 8 ? -0.0f : x;
}

BOTH uint8_t f32_to_e2m1(float x) {
    uint8_t sign = (uint8_t)(f32_bits(x) >> 28 & 8);
    return (uint8_t)(sign | small_code(fminf(fabsf(x), 6), 127, 1));
}

BOTH float e8m0_to_f32(uint8_t code) {
    if (code == 255) return NAN;
    return bits_f32(code ? (uint32_t)code << 23 : 1u << 22); /* 2^-127 is subnormal in F32 */
}

BOTH uint8_t ceil_to_e8m0(float x) {
    uint32_t u = f32_bits(x);
    return (uint8_t)((u >> 23) + ((u & 0x7fffff) != 0));
}

BOTH float bf16_to_f32(uint16_t bits) { return bits_f32((uint32_t)bits << 16); }

BOTH uint16_t f32_to_bf16(float x) {
    uint32_t u = f32_bits(x);
    if (isnan(x)) return (uint16_t)(u >> 16 | 0x40);         /* quiet, so that it stays NaN */
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

BOTH float f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t e = bits >> 10 & 31, mant = bits & 1023;
    if (e == 31) return bits_f32(sign | 0x7f800000 | mant << 13);
    if (e == 0) return (sign ? -1.0f : 1.0f) * (float)mant * 0x1p-24f;
    return bits_f32(sign | (e + 112) << 23 | mant << 13);
}

/* Element (r, c) of a weight matrix in any stored format, its scale multiplied in: exact. */
BOTH static float mat_at(const dsv4_mat *w, int r, int c) {
    size_t at = (size_t)r * (size_t)w->cols + (size_t)c;
    const uint8_t *bytes = (const uint8_t *)w->data;
    switch (w->dtype) {
    case DT_F32: return ((const float *)w->data)[at];
    case DT_F16: return f16_to_f32(((const uint16_t *)w->data)[at]);
    case DT_BF16: return bf16_to_f32(((const uint16_t *)w->data)[at]);
    case DT_F8_E4M3: {
        size_t s = (size_t)(r / 128) * (size_t)((w->cols + 127) / 128) + (size_t)(c / 128);
        return e4m3_to_f32(bytes[at]) * e8m0_to_f32(w->scale[s]);
    }
    case DT_I8: {
        uint8_t nibble = (uint8_t)(bytes[at / 2] >> (4 * (c & 1)) & 15);
        return e2m1_to_f32(nibble) * e8m0_to_f32(w->scale[at / 32]);
    }
    default: assert(0); return 0;                            /* no matrix has another dtype */
    }
}

/* === 2. exp and rotation frequencies ========================================================== */

/* exp_f32: BIT-DEFINED.  x = n ln 2 + r with |r| <= 0.35, exp r by its Taylor series to r^7
 * (error 5e-9), then times 2^n in two halves, so that subnormal results round only once and
 * too large ones overflow by themselves.  Adding 1.5 * 2^23 rounds x / ln 2 to the integer n.
 * ln 2 = 0.693147182464... - 1.90465e-9: the F32 nearest it, and the rest. */
BOTH float exp_f32(float x) {
    const float shift = 0x1.8p23f;
    x = x < -105.0f ? -105.0f : x;                           /* a NaN passes both             */
    x = x > 89.0f ? 89.0f : x;
    float shifted = fmaf(x, 1.44269504f, shift);
    float n = shifted - shift;
    float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x));
    const float rest[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    float p = 1.0f / 5040;
    for (int i = 0; i < 7; i++) p = fmaf(p, r, rest[i]);
    int32_t exponent = (int32_t)(f32_bits(shifted) - f32_bits(shift));
    int32_t half = exponent >> 1;
    float a = bits_f32((uint32_t)(half + 127) << 23);
    float b = bits_f32((uint32_t)(exponent - half + 127) << 23);
    return p * a * b;
}

/* rope_inv_freq (M3, YaRN): every step in F32 but the power, low and high.  factor 1: none. */
void rope_inv_freq(float *inv_freq, int rope_dim, double theta, double factor,
                   double beta_fast, double beta_slow, double original) {
    assert(rope_dim > 0 && rope_dim % 2 == 0);
    const double two_pi = 6.283185307179586;
    double per = rope_dim / (2 * log(theta)), last = rope_dim - 1;
    /* The pair that turns `beta` times within the original context, clamped to one there is. */
    double low = fmin(fmax(floor(per * log(original / (two_pi * beta_fast))), 0), last);
    double high = fmin(fmax(ceil(per * log(original / (two_pi * beta_slow))), 0), last);
    if (high == low) high += 0.001;
    for (int i = 0; i < rope_dim / 2; i++) {
        float f = 1.0f / (float)pow(theta, (double)(2 * i) / rope_dim);
        float ramp = ((float)i - (float)low) / (float)(high - low);
        ramp = fminf(fmaxf(ramp, 0), 1);
        inv_freq[i] = factor == 1 ? f : f / (float)factor * ramp + f * (1 - ramp);
    }
}

/* === 3. Rounding blocks and rows of KV (M2) =================================================== */

static float max_abs(const float *x, int n) {
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fmaxf(amax, fabsf(x[i]));
    return amax;
}

/* aq128's scale of one block: 2^ceil(log2(max(amax, 1e-4) / 448)), the product taken in F32. */
static uint8_t e4m3_block_scale(const float *x, int n) {
    return ceil_to_e8m0(fmaxf(max_abs(x, n), 1e-4f) * (1.0f / 448));
}

/* The codes [d] of x and their scales, one for `block` of them. */
static void e4m3_code_blocks(uint8_t *code, uint8_t *scale, const float *x, int d, int block) {
    for (int b = 0; b < d; b += block) {
        int len = d - b < block ? d - b : block;
        *scale = e4m3_block_scale(x + b, len);
        for (int i = b; i < b + len; i++) code[i] = f32_to_e4m3(x[i] / e8m0_to_f32(*scale));
        scale++;
    }
}

/* See dsv4.h, section 4. */
BOTH size_t kv_row_bytes(int head_dim, int rope_dim, bool packed) {
    size_t d = (size_t)head_dim, n_codes = (size_t)(head_dim - rope_dim);
    if (!packed) return d * sizeof(float);
    return (d + (size_t)rope_dim + (n_codes + 63) / 64 + 7) / 8 * 8;
}

BOTH size_t index_row_bytes(int d, bool packed) {
    size_t dims = (size_t)d;
    if (!packed) return dims * sizeof(float);
    return ((dims + 1) / 2 + (dims + 31) / 32 + 3) / 4 * 4;
}

BOTH static float kv_dim(const void *row, int c, int head_dim, int rope_dim, bool packed) {
    int n_codes = head_dim - rope_dim;
    const uint16_t *rope = (const uint16_t *)row;
    const uint8_t *code = (const uint8_t *)(rope + rope_dim);
    if (!packed) return ((const float *)row)[c];
    if (c >= n_codes) return bf16_to_f32(rope[c - n_codes]);
    return e4m3_to_f32(code[c]) * e8m0_to_f32(code[n_codes + c / 64]);
}

void kv_row_read(float *x, const void *row, int head_dim, int rope_dim, bool packed) {
    for (int c = 0; c < head_dim; c++) x[c] = kv_dim(row, c, head_dim, rope_dim, packed);
}

/* === 4. embed: every stream starts as the token's row ============================ M3, first line
 * out  h [n][hc][w.cols]
 * in   w F32, F16 or BF16 [vocab][dim]   tokens [n], each < w.rows (asserted)
 *      BIT-DEFINED (a copy)                                                                     */
void embed_ref(float *h, const dsv4_mat *w, const int32_t *tokens, int n, int hc,
               dsv4_exec *ex) {
    for (int t = 0; t < n; t++) {
        assert(tokens[t] >= 0 && tokens[t] < w->rows);
        for (int i = 0; i < hc; i++)
            for (int c = 0; c < w->cols; c++) *h++ = mat_at(w, tokens[t], c);
    }
}
#ifdef __CUDACC__
/* grid n.  w's pointers are the device's, as all of a twin's. */
extern "C" __global__ void embed_cuda(float *h, dsv4_mat w, const int32_t *tokens, int hc) {
    float *row = h + (size_t)blockIdx.x * hc * w.cols;
    for (int c = threadIdx.x; c < w.cols; c += blockDim.x) {
        float x = mat_at(&w, tokens[blockIdx.x], c);
        for (int i = 0; i < hc; i++) row[(size_t)i * w.cols + c] = x;
    }
}
#endif

/* === 5. rmsnorm: y = x / sqrt(mean(x^2) + eps) * w ================================= M3 =========
 * out  y [n][d]; may be x
 * in   x [n][d]   w [d], or NULL for no weight                                                  */
static void rmsnorm_ref(float *y, const float *x, const float *w, int n, int d, float eps,
                        dsv4_exec *ex) {
    for (int t = 0; t < n; t++, x += d, y += d) {
        double sum = 0;
        for (int c = 0; c < d; c++) sum += (double)x[c] * x[c];
        double r = 1 / sqrt(sum / d + eps);
        for (int c = 0; c < d; c++) y[c] = (float)(x[c] * r * (w ? w[c] : 1));
    }
}
#ifdef __CUDACC__
/* The sum over a block of up to 1,024 threads, in all of them: lanes, then warps. */
static __device__ float block_sum(float x) {
    __shared__ float sum[32];
    for (int far = 16; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
    if (threadIdx.x % 32 == 0) sum[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) x += sum[w];
    __syncthreads();
    return x;
}

/* grid n, block a multiple of 32.  Differs: F32 sums. */
extern "C" __global__ void rmsnorm_cuda(float *y, const float *x, const float *w, int d,
                                        float eps) {
    float sum = 0;
    x += (size_t)blockIdx.x * d;
    y += (size_t)blockIdx.x * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) sum += x[c] * x[c];
    float r = 1 / sqrtf(block_sum(sum) / d + eps);
    for (int c = threadIdx.x; c < d; c += blockDim.x) y[c] = x[c] * r * (w ? w[c] : 1);
}
#endif

/* === 6. act_quant: rounded activations, as F32 ===================================== M2, aq128 ==
 *   per block of 128: s = 2^ceil(log2(max(amax, 1e-4) * F32(1/448))), y = e4m3(x / s) * s
 * out  y [n][d]; may be x
 * in   x [n][d]; a shorter last block of a row is a block
 *      BIT-DEFINED.  A NaN stays one; an infinity makes its block NaN.                          */
static void act_quant_ref(float *y, const float *x, int n, int d, dsv4_exec *ex) {
    for (int t = 0; t < n; t++, x += d, y += d)
        for (int b = 0; b < d; b += 128) {
            int stop = d - b < 128 ? d : b + 128;
            float s = e8m0_to_f32(e4m3_block_scale(x + b, stop - b));
            for (int i = b; i < stop; i++) y[i] = e4m3_to_f32(f32_to_e4m3(x[i] / s)) * s;
        }
}
#ifdef __CUDACC__
/* e4m3_block_scale() of a warp's n <= 128 values. */
static __device__ uint8_t warp_scale(const float *x, int n) {
    float amax = 0;
    for (int i = threadIdx.x; i < n; i += 32) amax = fmaxf(amax, fabsf(x[i]));
    for (int far = 16; far; far /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, far));
    return ceil_to_e8m0(fmaxf(amax, 1e-4f) * (1.0f / 448));
}

/* grid (ceil(d/128), n), block 32. */
extern "C" __global__ void act_quant_cuda(float *y, const float *x, int d) {
    size_t at = (size_t)blockIdx.y * d + blockIdx.x * 128;
    int len = min(128, d - (int)blockIdx.x * 128);
    float s = e8m0_to_f32(warp_scale(x + at, len));
    __syncwarp();                  /* y may be x: all have read it */
    for (int i = threadIdx.x; i < len; i += 32)
        y[at + i] = e4m3_to_f32(f32_to_e4m3(x[at + i] / s)) * s;
}
#endif

/* === 7. act_codes: the same values as codes and scales ============================= M2, aq128 ==
 * out  code [n][d] e4m3   scale [n][ceil(d/128)] e8m0
 * in   x [n][d]
 *      BIT-DEFINED.  A NaN gets a NaN code; an infinity gives its whole block NaN codes.        */
static void act_codes_ref(uint8_t *code, uint8_t *scale, const float *x, int n, int d,
                          dsv4_exec *ex) {
    for (int t = 0; t < n; t++, x += d, code += d, scale += (d + 127) / 128)
        e4m3_code_blocks(code, scale, x, d, 128);
}
#ifdef __CUDACC__
/* grid (ceil(d/128), n), block 32. */
extern "C" __global__ void act_codes_cuda(uint8_t *code, uint8_t *scale, const float *x, int d) {
    size_t at = (size_t)blockIdx.y * d + blockIdx.x * 128;
    int len = min(128, d - (int)blockIdx.x * 128);
    uint8_t s = warp_scale(x + at, len);
    if (threadIdx.x == 0) scale[blockIdx.y * gridDim.x + blockIdx.x] = s;
    for (int i = threadIdx.x; i < len; i += 32)
        code[at + i] = f32_to_e4m3(x[at + i] / e8m0_to_f32(s));
}
#endif

/* === 8. act_values: the values of codes and scales ================================= M2, aq128 ==
 * out  y [n][d] = e4m3(code) * scale of its block of 128: act_quant's y, bit by bit
 * in   code [n][d] e4m3   scale [n][ceil(d/128)] e8m0
 *      BIT-DEFINED                                                                              */
static void act_values_ref(float *y, const uint8_t *code, const uint8_t *scale, int n, int d,
                           dsv4_exec *ex) {
    for (int t = 0; t < n; t++, y += d, code += d, scale += (d + 127) / 128)
        for (int i = 0; i < d; i++) y[i] = e4m3_to_f32(code[i]) * e8m0_to_f32(scale[i / 128]);
}
#ifdef __CUDACC__
/* grid (ceil(d/128), n), block 128. */
extern "C" __global__ void act_values_cuda(float *y, const uint8_t *code, const uint8_t *scale,
                                           int d) {
    int i = blockIdx.x * 128 + threadIdx.x;
    size_t row = (size_t)blockIdx.y * d;
    uint8_t s = scale[blockIdx.y * gridDim.x + blockIdx.x];
    if (i < d) y[row + i] = e4m3_to_f32(code[row + i]) * e8m0_to_f32(s);
}
#endif

/* === 9. linear: y = W x, per group of rows ========================================= M3 =========
 *   rows are cut in `groups` equal groups; group g sees its own columns of x:
 *   y[t][r] = sum_c w[r][c] * x[t][(r / (rows/groups)) * cols + c]
 *   groups 1 is the plain product; more is the grouped low-rank output projection wo_a.
 * out  y [n][rows]; must not alias x
 * in   w any of dsv4_mat's five formats   x [n][groups*cols], rounded by the caller where M2
 *      says so
 * req  rows % groups == 0   no NaN among codes and scales; these, and x times them, below 2^63
 *      An element's bits depend on its row and token only, never on n, on its neighbours or on
 *      threads.                                                                                 */
static void linear_ref(float *y, const dsv4_mat *w, const float *x, int n, int groups,
                       dsv4_exec *ex) {
    assert(groups > 0 && w->rows % groups == 0);
    int group_rows = w->rows / groups;
    for (int t = 0; t < n; t++)
        for (int r = 0; r < w->rows; r++) {
            const float *xg = x + ((size_t)t * (size_t)groups + (size_t)(r / group_rows))
                                * (size_t)w->cols;
            double sum = 0;
            for (int c = 0; c < w->cols; c++) sum += (double)mat_at(w, r, c) * xg[c];
            *y++ = (float)sum;
        }
}
#ifdef __CUDACC__
enum { TILE = 8 };                 /* tokens that share a read of the weights                    */

/* By a warp: ROWS rows of w from r on, all of one group, times TOKENS tokens of x from t0 on, or as
 * many of either as there are. */
template <int ROWS, int TOKENS>
static __device__ void linear_rows(float *y, const dsv4_mat *w, const float *x, int n, int groups,
                                   int r, int t0) {
    int lane = threadIdx.x % 32, cols = w->cols, blocks = (cols + 127) / 128;
    size_t step = (size_t)groups * cols;
    const float *at[TOKENS];
    float sum[ROWS][TOKENS], a[ROWS], s[ROWS];
    for (int i = 0; i < TOKENS; i++) {                       /* beyond n: the last one once more  */
        at[i] = x + min(t0 + i, n - 1) * step + (size_t)(r / (w->rows / groups)) * cols;
        for (int k = 0; k < ROWS; k++) sum[k][i] = 0;
    }
    bool fp8 = w->dtype == DT_F8_E4M3;
    for (int b = 0; b < blocks; b++) {
        for (int k = 0; k < ROWS; k++)                       /* beyond w's rows likewise          */
            s[k] = fp8 ? e8m0_to_f32(w->scale[min(r + k, w->rows - 1) / 128 * blocks + b]) : 0;
        for (int c = 128 * b + lane; c < min(128 * b + 128, cols); c += 32) {
            for (int k = 0; k < ROWS; k++) {
                int row = min(r + k, w->rows - 1);
                uint8_t code = fp8 ? ((const uint8_t *)w->data)[(size_t)row * cols + c] : 0;
                a[k] = fp8 ? (float)e4m3_int(code) * (s[k] * 0x1p-9f) : mat_at(w, row, c);
            }
            for (int i = 0; i < TOKENS; i++) {
                float v = at[i][c];
                for (int k = 0; k < ROWS; k++) sum[k][i] = fmaf(a[k], v, sum[k][i]);
            }
        }
    }
    for (int i = 0; i < TOKENS; i++)
        for (int k = 0; k < ROWS; k++) {
            for (int far = 16; far; far /= 2) sum[k][i] += __shfl_xor_sync(~0u, sum[k][i], far);
            if (lane == 0 && t0 + i < n && r + k < w->rows)
                y[(size_t)(t0 + i) * w->rows + r + k] = sum[k][i];
        }
}

/* One token: grid ceil(rows/4), block 128, a warp a row.  Differs: F32 sums, one of each lane. */
extern "C" __global__ void linear_cuda(float *y, dsv4_mat w, const float *x, int groups) {
    int r = blockIdx.x * 4 + threadIdx.x / 32;
    if (r < w.rows) linear_rows<1, 1>(y, &w, x, 1, groups, r, 0);
}

/* The same bits for n tokens: grid (ceil(rows/16), ceil(n/TILE)), block 128, a warp four rows. */
extern "C" __global__ void linear_tile_cuda(float *y, dsv4_mat w, const float *x, int n,
                                            int groups) {
    int r = 4 * (blockIdx.x * 4 + threadIdx.x / 32), t0 = blockIdx.y * TILE;
    int group_rows = w.rows / groups, last = min(r + 3, w.rows - 1);
    if (r < w.rows && r / group_rows == last / group_rows)
        linear_rows<4, TILE>(y, &w, x, n, groups, r, t0);
    else
        for (; r <= last; r++) linear_rows<1, TILE>(y, &w, x, n, groups, r, t0);
}
#endif

/* === 10. rope: rotate adjacent pairs of the last rope_dim dims ====================== M3, YaRN ===
 *   token t stands at position pos0 + t*step; angle_i = double(position) * inv_freq[i];
 *   (a, b) -> (a cos - b sin, a sin + b cos) with cos and sin in F32; inverse: sin negated
 * i/o  x [n][n_heads][head_dim]
 * in   inv_freq [rope_dim/2]; rope_dim even, <= head_dim
 *      The products of two F32 are exact in double, so a compiler that fuses (GCC 12 makes
 *      vfmaddsub of F32 even with -ffp-contract=off) changes nothing                            */
BOTH static void rope_pair(float *pair, float c, float s) {
    double a = pair[0], b = pair[1];
    pair[0] = (float)(a * c - b * s);
    pair[1] = (float)(a * s + b * c);
}
static void rope_ref(float *x, const float *inv_freq, int n, int n_heads, int head_dim,
                     int rope_dim, int64_t pos0, int64_t step, bool inverse, dsv4_exec *ex) {
    assert(rope_dim % 2 == 0 && rope_dim <= head_dim);
    size_t token = (size_t)n_heads * (size_t)head_dim;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < rope_dim / 2; i++) {
            double angle = (double)(pos0 + t * step) * inv_freq[i];
            float c = (float)cos(angle), s = (float)sin(angle);
            if (inverse) s = -s;
            float *pair = x + (size_t)t * token + (head_dim - rope_dim + 2 * i);
            for (int h = 0; h < n_heads; h++, pair += head_dim) rope_pair(pair, c, s);
        }
}
#ifdef __CUDACC__
/* grid (n_heads, n).  Differs: CUDA's cos and sin. */
extern "C" __global__ void rope_cuda(float *x, const float *inv_freq, int head_dim, int rope_dim,
                                     int64_t pos0, int64_t step, bool inverse) {
    x += ((size_t)blockIdx.y * gridDim.x + blockIdx.x + 1) * head_dim - rope_dim;
    for (int i = threadIdx.x; i < rope_dim / 2; i += blockDim.x) {
        double c, s;
        sincos((double)(pos0 + blockIdx.y * step) * inv_freq[i], &s, &c);
        rope_pair(x + 2 * i, (float)c, (float)(inverse ? -s : s));
    }
}
#endif

/* === 11. kv_round: KV entries as the cache holds them =============================== M2 ========
 *   packed: the first head_dim - rope_dim dims as act_quant in blocks of 64, the others to BF16
 * out  rows [n], see dsv4.h; must not alias x
 * in   x [n][head_dim]
 *      BIT-DEFINED.  NaN and infinity as in act_codes.                                          */
void kv_round_ref(void *rows, const float *x, int n, int head_dim, int rope_dim, bool packed,
                  dsv4_exec *ex) {
    assert(rope_dim <= head_dim);
    size_t bytes = kv_row_bytes(head_dim, rope_dim, packed);
    int n_codes = head_dim - rope_dim;
    for (int t = 0; t < n; t++, x += head_dim) {
        uint16_t *rope = (uint16_t *)((uint8_t *)rows + (size_t)t * bytes);
        uint8_t *code = (uint8_t *)(rope + rope_dim);
        memset(rope, 0, bytes);
        if (!packed) {
            memcpy(rope, x, bytes);
            continue;
        }
        for (int c = 0; c < rope_dim; c++) rope[c] = f32_to_bf16(x[n_codes + c]);
        e4m3_code_blocks(code, code + n_codes, x, n_codes, 64);
    }
}
#ifdef __CUDACC__
/* grid (ceil((head_dim-rope_dim)/64) + 1, n), block 32; the last of a row's does what is not codes.
 * bytes: kv_row_bytes(). */
extern "C" __global__ void kv_round_cuda(void *rows, const float *x, int head_dim, int rope_dim,
                                         bool packed, size_t bytes) {
    int n_codes = head_dim - rope_dim, b = blockIdx.x * 64, lane = threadIdx.x;
    uint16_t *rope = (uint16_t *)((uint8_t *)rows + blockIdx.y * bytes);
    uint8_t *code = (uint8_t *)(rope + rope_dim), *end = (uint8_t *)rope + bytes;
    x += (size_t)blockIdx.y * head_dim;
    if (!packed) {
        for (int c = blockIdx.x * 32 + lane; c < head_dim; c += gridDim.x * 32)
            ((float *)rope)[c] = x[c];
    } else if (b < n_codes) {
        int stop = min(n_codes, b + 64);
        uint8_t s = warp_scale(x + b, stop - b);
        if (lane == 0) code[n_codes + blockIdx.x] = s;
        for (int i = b + lane; i < stop; i += 32) code[i] = f32_to_e4m3(x[i] / e8m0_to_f32(s));
    } else {
        for (int c = lane; c < rope_dim; c += 32) rope[c] = f32_to_bf16(x[n_codes + c]);
        for (uint8_t *pad = code + n_codes + blockIdx.x + lane; pad < end; pad += 32) *pad = 0;
    }
}
#endif

/* === 12. index_round: indexer queries and keys ====================================== M2 ========
 *   Walsh-Hadamard (Sylvester order) in F32: butterflies of distance 1, 2, 4 .. d/2, then times
 *   F32(d^-0.5); packed: per block of 32 (a shorter last one is a block):
 *   s = 2^ceil(log2(max(amax, 6*2^-126) / 6)), e2m1(x / s)
 * out  rows [n], see dsv4.h; must not alias x
 * i/o  x [n][d] finite, d a power of two; garbage afterwards
 *      BIT-DEFINED                                                                              */
static void index_round_ref(void *rows, float *x, int n, int d, bool packed, dsv4_exec *ex) {
    assert(d > 0 && (d & (d - 1)) == 0);
    float norm = (float)(1 / sqrt((double)d));
    size_t bytes = index_row_bytes(d, packed);
    for (int t = 0; t < n; t++, x += d) {
        uint8_t *pairs = (uint8_t *)rows + (size_t)t * bytes, *scale = pairs + (d + 1) / 2;
        for (int dist = 1; dist < d; dist *= 2)
            for (int i = 0; i < d; i++) {
                if (i & dist) continue;
                float a = x[i], b = x[i + dist];
                x[i] = a + b;
                x[i + dist] = a - b;
            }
        for (int i = 0; i < d; i++) x[i] *= norm;
        memset(pairs, 0, bytes);
        if (!packed) memcpy(pairs, x, bytes);
        for (int b = 0; packed && b < d; b += 32) {
            int len = d - b < 32 ? d - b : 32;
            scale[b / 32] = ceil_to_e8m0(fmaxf(max_abs(x + b, len), 6 * 0x1p-126f) / 6);
            for (int i = b; i < b + len; i++) {
                uint8_t nibble = f32_to_e2m1(x[i] / e8m0_to_f32(scale[b / 32]));
                pairs[i / 2] = (uint8_t)(pairs[i / 2] | nibble << (4 * (i & 1)));
            }
        }
    }
}
#ifdef __CUDACC__
/* grid n, block max(d, 32), a thread a dim; x is left alone.  bytes: index_row_bytes(). */
extern "C" __global__ void index_round_cuda(void *rows, const float *x, int d, bool packed,
                                            size_t bytes) {
    __shared__ float v[MAX_HEAD_DIM];
    int i = threadIdx.x;
    uint8_t *pairs = (uint8_t *)rows + blockIdx.x * bytes, *scale = pairs + (d + 1) / 2;
    float a = i < d ? x[(size_t)blockIdx.x * d + i] : 0;
    for (int dist = 1; dist < d; dist *= 2) {
        v[i] = a;
        __syncthreads();
        a = i & dist ? v[i ^ dist] - a : a + v[i ^ dist];
        __syncthreads();
    }
    a *= (float)(1 / sqrt((double)d));
    if (!packed) {
        if (i < d) ((float *)pairs)[i] = a;
        return;
    }
    float amax = fabsf(a);
    for (int far = 16; far; far /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, far));
    uint8_t s = ceil_to_e8m0(fmaxf(amax, 6 * 0x1p-126f) / 6);
    int nibble = f32_to_e2m1(a / e8m0_to_f32(s)), next = __shfl_down_sync(~0u, nibble, 1);
    if (i < d && i % 2 == 0) pairs[i / 2] = (uint8_t)(nibble | next << 4);
    if (i < d && i % 32 == 0) scale[i / 32] = s;
    uint8_t *pad = scale + (d + 31) / 32 + i;                /* fewer than four                  */
    if (pad < pairs + bytes) *pad = 0;
}
#endif

/* === 13. compress: entries of the KV or index compressor ============================ M3 ========
 *   Entry g is, per dim, a softmax-weighted mean of its candidates.  ratio 4: tokens of group
 *   g-1 through channels 0..d-1 (absent for g = 0), then of group g through channels d..2d-1;
 *   another ratio: tokens of group g, channels 0..d-1.  A candidate's logit is its score plus
 *   ape[token % ratio] of the same channel.
 * out  entries [n_groups][d], groups g0..; before norm, rope and rounding
 * in   see dsv4_compress: token j's rows are kv, score [j - t0] if j >= t0, else the rings'
 *      row j % (coff*ratio)
 * req  every token of the groups asked for is in kv or in the rings                             */
BOTH static double compress_ref_dim(const dsv4_compress *in, int64_t g, int c) {
    int coff = in->ratio == 4 ? 2 : 1;
    size_t width = (size_t)(coff * in->d);
    double top = -INFINITY, sum = 0, mean = 0;
    for (int pass = 0; pass < 2; pass++)                     /* first the maximum, then the sums */
        for (int64_t j = (g - coff + 1) * in->ratio; j < (g + 1) * in->ratio; j++) {
            if (j < 0) continue;                             /* group -1 does not exist */
            bool now = j >= in->t0;
            size_t row = (size_t)(now ? j - in->t0 : j % (coff * in->ratio));
            size_t ch = (size_t)(c + (coff == 2 && j >= g * in->ratio ? in->d : 0));
            double s = (double)(now ? in->score : in->ring_score)[row * width + ch]
                     + in->ape[(size_t)(j % in->ratio) * width + ch];
            if (pass == 0) {
                top = fmax(top, s);
            } else {
                sum += exp(s - top);
                mean += exp(s - top) * (now ? in->kv : in->ring_kv)[row * width + ch];
            }
        }
    return mean / sum;
}

static void compress_ref(float *entries, const dsv4_compress *in, int64_t g0, int n_groups,
                         dsv4_exec *ex) {
    assert(in->ratio > 0 && g0 >= 0);
    for (int64_t g = g0; g < g0 + n_groups; g++)
        for (int c = 0; c < in->d; c++) *entries++ = (float)compress_ref_dim(in, g, c);
}
#ifdef __CUDACC__
/* grid (ceil(d/128), n_groups), block 128, a thread a dim.  Differs: CUDA's exp. */
extern "C" __global__ void compress_cuda(float *entries, dsv4_compress in, int64_t g0) {
    int c = blockIdx.x * 128 + threadIdx.x;
    if (c >= in.d) return;
    entries[(size_t)blockIdx.y * in.d + c] = (float)compress_ref_dim(&in, g0 + blockIdx.y, c);
}
#endif

/* === 14. index_scores: how much each token wants each visible entry ================= M3, indexer
 *   scores[t][e] = sum_h w[t][h] * w_scale * relu(q[t][h] . keys[e]), e < (t0 + t + 1) / ratio
 * out  scores rows `stride` floats apart; entries that are not visible are left alone
 * in   see dsv4_index
 * req  packed: d % 32 == 0
 *
 * Packed: BIT-DEFINED.  In F32, over blocks b of 32 dims ascending, then over h ascending, from +0:
 *   sum_b = sum over 32 dims of (2 * e2m1) * (2 * e2m1), an exact integer
 *   dot   = fma(sum_b * key_scale, q_scale, dot), scales e8m0
 *   score = fma(w * (w_scale / 4), dot > 0 ? dot : 0, score)                                     */
BOTH static float index_dot(const uint8_t *q, const uint8_t *k, int d) {
    float dot = 0;
    for (int b = 0; b < d / 32; b++) {
        int32_t sum = 0;
        for (int i = 16 * b; i < 16 * b + 16; i++)
            sum += e2m1_int(q[i] & 15) * e2m1_int(k[i] & 15)
                 + e2m1_int(q[i] >> 4) * e2m1_int(k[i] >> 4);
        dot = fmaf((float)sum * e8m0_to_f32(k[d / 2 + b]), e8m0_to_f32(q[d / 2 + b]), dot);
    }
    return dot;
}

static void index_scores_ref(float *scores, const dsv4_index *in, int n, dsv4_exec *ex) {
    size_t bytes = index_row_bytes(in->d, in->packed);
    assert(!in->packed || in->d % 32 == 0);
    for (int t = 0; t < n; t++) {
        int64_t visible = (in->t0 + t + 1) / in->ratio;
        assert((size_t)visible <= in->stride || n == 1);
        for (int64_t e = 0; e < visible; e++) {
            float score = 0;
            double sum = 0;
            for (int h = 0; h < in->n_heads; h++) {
                size_t head = (size_t)t * (size_t)in->n_heads + (size_t)h;
                const uint8_t *q = (const uint8_t *)in->q + head * bytes;
                const uint8_t *k = (const uint8_t *)in->keys + (size_t)e * bytes;
                if (in->packed) {
                    float dot = index_dot(q, k, in->d);
                    score = fmaf(in->w[head] * (in->w_scale / 4), dot > 0 ? dot : 0, score);
                    continue;
                }
                double dot = 0;
                for (int c = 0; c < in->d; c++)
                    dot += (double)((const float *)q)[c] * ((const float *)k)[c];
                sum += (double)in->w[head] * in->w_scale * fmax(dot, 0);
            }
            scores[(size_t)t * in->stride + (size_t)e] = in->packed ? score : (float)sum;
        }
    }
}
#ifdef __CUDACC__
/* grid (ceil(entries/128) of the last token, n), block 128, a thread an entry.  Differs: F32 sums
 * of plain rows. */
extern "C" __global__ void index_scores_cuda(float *scores, dsv4_index in) {
    int64_t e = (int64_t)blockIdx.x * 128 + threadIdx.x;
    if (e >= (in.t0 + blockIdx.y + 1) / in.ratio) return;
    size_t bytes = index_row_bytes(in.d, in.packed), head = (size_t)blockIdx.y * in.n_heads;
    const uint8_t *q = (const uint8_t *)in.q + head * bytes;
    const uint8_t *k = (const uint8_t *)in.keys + e * bytes;
    float score = 0;
    for (int h = 0; h < in.n_heads; h++, q += bytes) {
        float dot = in.packed ? index_dot(q, k, in.d) : 0;
        for (int c = 0; !in.packed && c < in.d; c++)
            dot = fmaf(((const float *)q)[c], ((const float *)k)[c], dot);
        score = fmaf(in.w[head + h] * (in.w_scale / (in.packed ? 4 : 1)), dot > 0 ? dot : 0, score);
    }
    scores[blockIdx.y * in.stride + e] = score;
}
#endif

/* === 15. topk: the best entries of each token ======================================= M3, indexer
 *   of scores[t][0..(t0+t+1)/ratio) the k largest, equal ones by the lower entry; -0 equals 0
 * out  idx [n][k] ascending, the first count[t] set   count [n] = min(k, visible entries)
 * in   scores rows `stride` floats apart, no NaN
 *      BIT-DEFINED                                                                              */
static void topk_ref(int32_t *idx, int32_t *count, const float *scores, size_t stride, int n,
                     int k, int ratio, int64_t t0, dsv4_exec *ex) {
    for (int t = 0; t < n; t++, idx += k, scores += stride) {
        int64_t visible = (t0 + t + 1) / ratio;
        assert(visible <= INT32_MAX);
        count[t] = 0;
        for (int32_t e = 0; e < visible; e++) {
            int32_t better = 0;                              /* entries that go before e */
            for (int32_t o = 0; o < visible; o++)
                better += scores[o] > scores[e] || (scores[o] == scores[e] && o < e);
            if (better < k && count[t] < k) idx[count[t]++] = e;
        }
    }
}
#ifdef __CUDACC__
/* The bits of x, turned so that they order as numbers do; above 0, as x is no NaN. */
static __device__ uint32_t order_bits(float x) {
    uint32_t u = f32_bits(x + 0.0f);                         /* -0 becomes 0 */
    return u >> 31 ? ~u : u | 1u << 31;
}

/* The bits of the need-th largest score, digit by digit; *need becomes how many equal to it are
 * to be taken. */
static __device__ uint32_t topk_bits(const float *scores, uint32_t visible, uint32_t *need) {
    __shared__ uint32_t many[256], digit, rest;
    uint32_t bits = 0, i = threadIdx.x;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (i < 256) many[i] = 0;
        __syncthreads();
        for (uint32_t e = i; e < visible; e += blockDim.x) {
            uint32_t d = (order_bits(scores[e]) ^ bits) >> shift;
            if (d < 256) atomicAdd(&many[d], 1);             /* the digits above it are those */
        }
        __syncthreads();
        uint32_t above = 0;
        for (uint32_t d = i + 1; d < 256; d++) above += many[d];
        if (i < 256 && above < *need && above + many[i] >= *need) {
            digit = i;
            rest = *need - above;
        }
        __syncthreads();
        bits |= digit << shift;
        *need = rest;
    }
    return bits;
}

/* grid n, block a multiple of 32, at least 256.  A radix select, then the chosen in order: an
 * entry's place is the number of larger ones before it, and of equal ones that were taken. */
extern "C" __global__ void topk_cuda(int32_t *idx, int32_t *count, const float *scores,
                                     size_t stride, int k, int ratio, int64_t t0) {
    __shared__ uint32_t found[32];                           /* a warp's larger << 16 | equal */
    uint32_t visible = (uint32_t)((t0 + blockIdx.x + 1) / ratio), need = min((uint32_t)k, visible);
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, larger = 0, equal = 0;
    scores += blockIdx.x * stride;
    idx += (size_t)blockIdx.x * k;
    if (threadIdx.x == 0) count[blockIdx.x] = (int32_t)need;
    if (need == 0) return;
    uint32_t bits = topk_bits(scores, visible, &need);
    for (uint32_t e0 = 0; e0 < visible; e0 += blockDim.x) {
        uint32_t e = e0 + threadIdx.x, u = e < visible ? order_bits(scores[e]) : 0;
        uint32_t more = __ballot_sync(~0u, u > bits), same = __ballot_sync(~0u, u == bits);
        if (lane == 0) found[warp] = __popc(more) << 16 | __popc(same);
        __syncthreads();
        uint32_t lower = (1u << lane) - 1, all = 0;
        uint32_t before = __popc(more & lower) << 16 | __popc(same & lower);
        for (uint32_t w = 0; w < blockDim.x / 32; w++) {
            before += w < warp ? found[w] : 0;
            all += found[w];
        }
        uint32_t equal_before = equal + (before & 0xffff);
        if (u > bits || (u == bits && equal_before < need))
            idx[larger + (before >> 16) + min(equal_before, need)] = (int32_t)e;
        larger += all >> 16;
        equal += all & 0xffff;
        __syncthreads();
    }
}
#endif

/* === 16. attend: softmax attention over what each token sees ======================== M3 ========
 *   Token t = t0 + row sees a list: window positions max(0, t-window+1)..t ascending, then, if
 *   ratio is not 0, count[row] compressed entries, or (t+1)/ratio if count is NULL: idx[row][0..]
 *   if idx is set, else 0, 1, ...  A list item k is key and value of all heads:
 *   score = q.k * head_dim^-0.5; p = exp(score) / (sum exp(score) + exp(sink)); o = sum p k
 * out  o [n][n_heads][head_dim], before the inverse rope; must not alias q
 * in   see dsv4_attend: position p's row is kv[p - t0] if p >= t0, else ring[p % window]        */
BOTH const void *attend_row(const dsv4_attend *in, int row, int64_t j) {
    int64_t t = in->t0 + row, first = t - in->window + 1 > 0 ? t - in->window + 1 : 0;
    int64_t p = first + j, at = p - t - 1;
    const void *rows = in->comp;
    if (p <= t) {
        rows = p >= in->t0 ? in->kv : in->ring;
        at = p >= in->t0 ? p - in->t0 : p % in->window;
    } else if (in->idx) {
        at = in->idx[(size_t)row * (size_t)in->topk + (size_t)at];
    }
    size_t bytes = kv_row_bytes(in->head_dim, in->rope_dim, in->packed);
    return (const uint8_t *)rows + (size_t)at * bytes;
}

/* Items of the list of token t0 + row. */
BOTH static int64_t attend_items(const dsv4_attend *in, int row) {
    int64_t t = in->t0 + row, n_items = t + 1 < in->window ? t + 1 : in->window;
    if (in->ratio) n_items += in->count ? in->count[row] : (t + 1) / in->ratio;
    return n_items;
}

static void attend_ref_head(float *o, const dsv4_attend *in, int row, const float *q, double sink,
                            int64_t n_items) {
    double sum[MAX_HEAD_DIM], top = sink, denominator = 0;
    float k[MAX_HEAD_DIM];
    memset(sum, 0, sizeof sum);
    for (int pass = 0; pass < 2; pass++)                     /* first the maximum, then the sums */
        for (int64_t j = 0; j < n_items; j++) {
            double score = 0;
            kv_row_read(k, attend_row(in, row, j), in->head_dim, in->rope_dim, in->packed);
            for (int c = 0; c < in->head_dim; c++) score += (double)q[c] * k[c];
            score /= sqrt((double)in->head_dim);
            if (pass == 0) {
                top = fmax(top, score);
                continue;
            }
            double p = exp(score - top);
            denominator += p;
            for (int c = 0; c < in->head_dim; c++) sum[c] += p * k[c];
        }
    denominator += exp(sink - top);
    for (int c = 0; c < in->head_dim; c++) o[c] = (float)(sum[c] / denominator);
}

static void attend_ref(float *o, const dsv4_attend *in, int n, dsv4_exec *ex) {
    assert(in->head_dim <= MAX_HEAD_DIM && in->window > 0);
    for (int row = 0; row < n; row++)
        for (int h = 0; h < in->n_heads; h++) {
            size_t at = ((size_t)row * (size_t)in->n_heads + (size_t)h) * (size_t)in->head_dim;
            attend_ref_head(o + at, in, row, in->q + at, in->sink[h], attend_items(in, row));
        }
}
#ifdef __CUDACC__
/* grid (n, ceil(n_heads/W)), block 32*W, a warp a head, W at will; all heads of a block share what
 * is read.  Differs: F32 sums and exp_f32, in one pass: when a larger score comes, what was summed
 * up shrinks. */
extern "C" __global__ void attend_cuda(float *o, dsv4_attend in) {
    enum { ITEMS = 8, DIMS = MAX_HEAD_DIM / 32 };            /* rows at a time, a lane's dims */
    __shared__ float k[ITEMS][MAX_HEAD_DIM];
    int row = blockIdx.x, lane = threadIdx.x % 32, d = in.head_dim;
    int h = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    bool mine = h < in.n_heads;                              /* the last block may have too many */
    size_t at = ((size_t)row * in.n_heads + h) * d + lane;
    float q[DIMS], sum[DIMS], top = mine ? in.sink[h] : 0, below = 1;
    for (int i = 0; i < DIMS; i++) {
        q[i] = mine && 32 * i + lane < d ? in.q[at + 32 * i] : 0;
        sum[i] = 0;
    }
    int64_t n_items = attend_items(&in, row);
    for (int64_t j0 = 0; j0 < n_items; j0 += ITEMS) {
        int len = (int)min((int64_t)ITEMS, n_items - j0);
        __syncthreads();
        for (int j = 0; j < len; j++) {
            const void *r = attend_row(&in, row, j0 + j);
            for (int c = threadIdx.x; c < d; c += blockDim.x)
                k[j][c] = kv_dim(r, c, d, in.rope_dim, in.packed);
        }
        __syncthreads();
        for (int j = 0; mine && j < len; j++) {
            float score = 0, old = top;
            for (int i = 0; i < DIMS; i++)
                if (32 * i + lane < d) score = fmaf(q[i], k[j][32 * i + lane], score);
            for (int far = 16; far; far /= 2) score += __shfl_xor_sync(~0u, score, far);
            score /= sqrtf(d);
            top = fmaxf(top, score);
            float keep = exp_f32(old - top), p = exp_f32(score - top);
            below = fmaf(below, keep, p);
            for (int i = 0; i < DIMS; i++)
                if (32 * i + lane < d) sum[i] = fmaf(p, k[j][32 * i + lane], sum[i] * keep);
        }
    }
    for (int i = 0; i < DIMS; i++)
        if (mine && 32 * i + lane < d) o[at + 32 * i] = sum[i] / below;
}
#endif

/* === 17. hc_pre: what a sublayer sees of the streams ================================ M3 ========
 *   m = (fn . concat(h)) / sqrt(mean(h^2) + rms_eps), then, with hc = s.hc,
 *   pre_i  = sigmoid(m_i * scale0 + base_i) + hc_eps
 *   post_i = 2 * sigmoid(m_[hc+i] * scale1 + base_[hc+i])
 *   C_ij   = m_[2hc+i*hc+j] * scale2 + base_[..]: softmax over j, + hc_eps, columns divided by
 *            (sum + hc_eps), then sinkhorn_iters - 1 times rows, then columns, so divided
 * out  x [n][dim] = sum_i pre_i h_i   post [n][hc]   comb [n][hc][hc]; the head (M3) has post and
 *      comb NULL
 * in   h [n][hc][dim]   w: fn [(2+hc)*hc][hc*dim], scale [3], base [(2+hc)*hc]; head: fn [hc][..],
 *      scale [1], base [hc]                                                                     */
static double sigmoid_ref(double x) { return 1 / (1 + exp(-x)); }

/* m [rows of fn] of one token's streams h [hc*dim] */
static void hc_mix_ref(double *m, const float *h, const float *fn, int rows,
                       const dsv4_hc_shape *s) {
    int len = s->hc * s->dim;
    double square = 0;
    for (int c = 0; c < len; c++) square += (double)h[c] * h[c];
    for (int r = 0; r < rows; r++, fn += len) {
        m[r] = 0;
        for (int c = 0; c < len; c++) m[r] += (double)fn[c] * h[c];
        m[r] /= sqrt(square / len + s->rms_eps);
    }
}

/* Divide the rows (by_row), or the columns, of C [hc][hc] by their sum + eps. */
static void sinkhorn_ref(double *C, int hc, bool by_row, double eps) {
    int line_step = by_row ? hc : 1, step = by_row ? 1 : hc;
    for (int line = 0; line < hc; line++) {
        double sum = 0;
        for (int i = 0; i < hc; i++) sum += C[line * line_step + i * step];
        for (int i = 0; i < hc; i++) C[line * line_step + i * step] /= sum + eps;
    }
}

/* comb [hc][hc] of one token's mixes */
static void hc_comb_ref(float *comb, const double *m, const dsv4_hc *w, const dsv4_hc_shape *s) {
    int hc = s->hc;
    double C[MAX_HC * MAX_HC];
    for (int i = 0; i < hc; i++) {
        double sum = 0;
        for (int j = 0; j < hc; j++) {
            int at = (2 + i) * hc + j;
            sum += C[i * hc + j] = exp(m[at] * w->scale[2] + w->base[at]);
        }
        for (int j = 0; j < hc; j++) C[i * hc + j] = C[i * hc + j] / sum + s->hc_eps;
    }
    sinkhorn_ref(C, hc, false, s->hc_eps);
    for (int it = 1; it < s->sinkhorn_iters; it++) {
        sinkhorn_ref(C, hc, true, s->hc_eps);
        sinkhorn_ref(C, hc, false, s->hc_eps);
    }
    for (int i = 0; i < hc * hc; i++) comb[i] = (float)C[i];
}

static void hc_pre_ref(float *x, float *post, float *comb, const float *h, const dsv4_hc *w,
                       const dsv4_hc_shape *s, int n, dsv4_exec *ex) {
    int hc = s->hc;
    assert(hc > 0 && hc <= MAX_HC);
    for (int t = 0; t < n; t++, h += (size_t)hc * (size_t)s->dim, x += s->dim) {
        double m[(2 + MAX_HC) * MAX_HC], pre[MAX_HC];
        hc_mix_ref(m, h, w->fn, post ? (2 + hc) * hc : hc, s);
        for (int i = 0; i < hc; i++)
            pre[i] = sigmoid_ref(m[i] * w->scale[0] + w->base[i]) + s->hc_eps;
        for (int i = hc; post && i < 2 * hc; i++)
            *post++ = (float)(2 * sigmoid_ref(m[i] * w->scale[1] + w->base[i]));
        if (comb) hc_comb_ref(comb + t * hc * hc, m, w, s);
        for (int c = 0; c < s->dim; c++) {
            double sum = 0;
            for (int i = 0; i < hc; i++) sum += pre[i] * h[i * s->dim + c];
            x[c] = (float)sum;
        }
    }
}
#ifdef __CUDACC__
static __device__ float sigmoid_cuda(float x) { return 1 / (1 + exp_f32(-x)); }

/* Element threadIdx.x of comb, with m the logits [hc][hc]; the other threads meet its barriers. */
static __device__ float hc_comb_cuda(const float *m, const dsv4_hc_shape *s) {
    __shared__ float C[MAX_HC * MAX_HC];
    int hc = s->hc, i = threadIdx.x, row = i / hc * hc, col = i % hc;
    bool mine = i < hc * hc;
    float c = 0, top = -INFINITY;
    for (int j = 0; mine && j < hc; j++) top = fmaxf(top, m[row + j]);
    if (mine) c = exp_f32(m[i] - top);
    for (int step = 0; step < 2 * s->sinkhorn_iters; step++) { /* rows, columns, rows, ..         */
        float sum = 0;
        if (mine) C[i] = c;
        __syncthreads();
        for (int j = 0; mine && j < hc; j++) sum += C[step % 2 ? j * hc + col : row + j];
        if (mine) c = step ? c / (sum + s->hc_eps) : c / sum + s->hc_eps;
        __syncthreads();
    }
    return c;
}

/* grid n, block a multiple of 32, at least (2+hc)*hc.  A warp sums up one row of fn at a time, or
 * the square.  Differs: F32 sums, exp_f32. */
extern "C" __global__ void hc_pre_cuda(float *x, float *post, float *comb, const float *h,
                                       dsv4_hc w, dsv4_hc_shape s) {
    __shared__ float m[(2 + MAX_HC) * MAX_HC + 1];
    int hc = s.hc, len = hc * s.dim, t = blockIdx.x, i = threadIdx.x, lane = i % 32;
    int rows = post ? (2 + hc) * hc : hc;
    h += (size_t)t * len;
    for (int row = i / 32; row <= rows; row += blockDim.x / 32) {
        const float *f = row < rows ? w.fn + (size_t)row * len : h;
        float sum = 0;
        for (int c = lane; c < len; c += 32) sum = fmaf(f[c], h[c], sum);
        for (int far = 16; far; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
        if (lane == 0) m[row] = sum;
    }
    __syncthreads();
    float r = 1 / sqrtf(m[rows] / len + s.rms_eps);
    if (i < rows) m[i] = m[i] * r * w.scale[min(i / hc, 2)] + w.base[i];
    __syncthreads();
    if (i < hc) m[i] = sigmoid_cuda(m[i]) + s.hc_eps;        /* pre */
    if (i < hc && post) post[t * hc + i] = 2 * sigmoid_cuda(m[hc + i]);
    if (comb) {
        float c = hc_comb_cuda(m + 2 * hc, &s);
        if (i < hc * hc) comb[(size_t)t * hc * hc + i] = c;
    }
    __syncthreads();
    for (int c = i; c < s.dim; c += blockDim.x) {
        float sum = 0;
        for (int j = 0; j < hc; j++) sum = fmaf(m[j], h[(size_t)j * s.dim + c], sum);
        x[(size_t)t * s.dim + c] = sum;
    }
}
#endif

/* === 18. hc_post: the sublayer's output goes back into the streams ================== M3 ========
 *   new h_j = post_j * y + sum_i comb_ij h_i
 * i/o  h [n][hc][dim]
 * in   y [n][dim]   post [n][hc]   comb [n][hc][hc]                                             */
static void hc_post_ref(float *h, const float *y, const float *post, const float *comb,
                        const dsv4_hc_shape *s, int n, dsv4_exec *ex) {
    int hc = s->hc, dim = s->dim;
    assert(hc > 0 && hc <= MAX_HC);
    for (int t = 0; t < n; t++, h += (size_t)hc * (size_t)dim, y += dim, post += hc,
             comb += hc * hc)
        for (int c = 0; c < dim; c++) {
            double fresh[MAX_HC];
            for (int j = 0; j < hc; j++) {
                fresh[j] = (double)post[j] * y[c];
                for (int i = 0; i < hc; i++) fresh[j] += (double)comb[i * hc + j] * h[i * dim + c];
            }
            for (int j = 0; j < hc; j++) h[j * dim + c] = (float)fresh[j];
        }
}
#ifdef __CUDACC__
/* grid (ceil(dim/256), n), block 256, a thread a column.  Differs: F32 sums. */
extern "C" __global__ void hc_post_cuda(float *h, const float *y, const float *post,
                                        const float *comb, int hc, int dim) {
    int c = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
    float old[MAX_HC];
    if (c >= dim) return;
    h += (size_t)t * hc * dim + c;
    for (int i = 0; i < MAX_HC; i++) old[i] = i < hc ? h[(size_t)i * dim] : 0;
    for (int j = 0; j < hc; j++) {
        float fresh = post[t * hc + j] * y[(size_t)t * dim + c];
        for (int i = 0; i < MAX_HC; i++)
            if (i < hc) fresh += comb[(t * hc + i) * hc + j] * old[i];
        h[(size_t)j * dim] = fresh;
    }
}
#endif

/* === 19. route: the experts of each token, and their weights ======================== M3, MoE ===
 *   s_e = F32 of sqrt(softplus(logit_e)); chosen: tid2eid[token] in its order if tid2eid is set,
 *   else the topk largest s_e + bias_e (an F32 sum), descending, ties to the lower expert;
 *   weight = s_e / sum(s of the chosen) * scale
 * out  ids, weights [n][topk]
 * in   see dsv4_route; n_experts <= MAX_EXPERTS, topk <= n_experts, tid2eid's ids < n_experts
 *      (asserted: the loader checks the table)
 *      ids are BIT-DEFINED up to the last bit of libm's exp and log1p                           */
BOTH static float route_score(double logit) {
    return (float)sqrt(fmax(logit, 0.0) + log1p(exp(-fabs(logit))));
}
static void route_ref_choose(int32_t *ids, const dsv4_route *in, const float *s, int token) {
    if (in->tid2eid) {
        const int32_t *row = in->tid2eid + (size_t)in->tokens[token] * (size_t)in->topk;
        memcpy(ids, row, (size_t)in->topk * sizeof *ids);
        return;
    }
    for (int i = 0; i < in->topk; i++) {
        int best = -1;
        for (int e = 0; e < in->n_experts; e++) {
            bool taken = false;
            for (int j = 0; j < i; j++) taken |= ids[j] == e;
            if (!taken && (best < 0 || s[e] + in->bias[e] > s[best] + in->bias[best])) best = e;
        }
        ids[i] = best;
    }
}

static void route_ref(int32_t *ids, float *weights, const dsv4_route *in, int n, dsv4_exec *ex) {
    assert(in->n_experts <= MAX_EXPERTS && in->topk <= in->n_experts);
    for (int t = 0; t < n; t++, ids += in->topk, weights += in->topk) {
        float s[MAX_EXPERTS];
        for (int e = 0; e < in->n_experts; e++)
            s[e] = route_score(in->logits[(size_t)t * (size_t)in->n_experts + (size_t)e]);
        route_ref_choose(ids, in, s, t);
        double sum = 0;
        for (int i = 0; i < in->topk; i++) {
            assert(ids[i] >= 0 && ids[i] < in->n_experts);
            sum += s[ids[i]];
        }
        for (int i = 0; i < in->topk; i++) weights[i] = (float)(s[ids[i]] / sum * in->scale);
    }
}
#ifdef __CUDACC__
/* grid n, block at least topk.  An expert's place is the number of better ones; a NaN is the worst,
 * so that each place is taken once.  Differs: CUDA's exp and log1p. */
extern "C" __global__ void route_cuda(int32_t *ids, float *weights, dsv4_route in) {
    __shared__ float key[MAX_EXPERTS], s[MAX_TOPK];
    const float *logit = in.logits + (size_t)blockIdx.x * in.n_experts;
    int i = threadIdx.x, n = in.tid2eid ? 0 : in.n_experts;
    double sum = 0;
    ids += blockIdx.x * in.topk;
    for (int e = i; e < n; e += blockDim.x)
        key[e] = fmaxf(route_score(logit[e]) + in.bias[e], -INFINITY);
    __syncthreads();
    for (int e = i; e < n; e += blockDim.x) {
        int place = 0;
        for (int j = 0; j < n; j++) place += key[j] > key[e] || (key[j] == key[e] && j < e);
        if (place < in.topk) ids[place] = e;
    }
    if (in.tid2eid && i < in.topk)
        ids[i] = in.tid2eid[(size_t)in.tokens[blockIdx.x] * in.topk + i];
    __syncthreads();
    if (i < in.topk) s[i] = route_score(logit[ids[i]]);
    __syncthreads();
    for (int j = 0; j < in.topk; j++) sum += s[j];
    if (i < in.topk) weights[blockIdx.x * in.topk + i] = (float)(s[i] / sum * in.scale);
}
#endif

/* === 20. swiglu: an expert's activation ============================================= M3, MoE ===
 *   g = min(g, limit), u = clamp(u, -limit, limit), a = (g / (1 + exp_f32(-g))) * u, all in F32
 * out  a [n][d]; may be g or u
 * in   g, u [n][d]
 *      BIT-DEFINED.  A NaN stays one.                                                          */
BOTH static float swiglu_one(float g, float u, float limit) {
    float gate = g > limit ? limit : g, up = u > limit ? limit : u;
    up = up < -limit ? -limit : up;
    return gate / (1 + exp_f32(-gate)) * up;
}
static void swiglu_ref(float *a, const float *g, const float *u, int n, int d, float limit,
                       dsv4_exec *ex) {
    for (size_t i = 0; i < (size_t)n * (size_t)d; i++) a[i] = swiglu_one(g[i], u[i], limit);
}
#ifdef __CUDACC__
/* grid ceil(n*d/256), block 256. */
extern "C" __global__ void swiglu_cuda(float *a, const float *g, const float *u, size_t nd,
                                       float limit) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < nd) a[i] = swiglu_one(g[i], u[i], limit);
}
#endif

/* === 21. expert_ffn: one routed expert on the tokens that chose it ================== M3, MoE ===
 *   for i < m, with x row rows[i]:  a = swiglu(w1 x, w3 x) * weight[i];  y[rows[i]] += w2 aq128(a)
 * i/o  y [..][dim] F32, only rows named in `rows` are touched
 * in   w1, w3 [inter][dim], w2 [dim][inter]: DT_I8; at any byte address
 *      x: code and scale set (roundings on), or f32 alone (off)   rows [m], distinct
 *      weight [m]   limit: swiglu's
 *      scratch: expert_scratch_bytes(dim, inter) bytes, aligned to 64
 * req  m <= EXPERT_ROWS; dim % 32 == 0, inter % 32 == 0
 *
 * Roundings on: BIT-DEFINED.  A row times a vector, for block b of 32 columns:
 *   sum_b  = sum over i < 32 of (2 * e2m1) * (512 * e4m3), an exact integer; to F32, to nearest
 *   term_b = sum_b * 2^k, k = w's scale code + x's scale code - 264, clamped to [-126, 127]
 *   lane[b % 8] += term_b in F32, b ascending, lanes from +0;
 *   result = ((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7))
 * then swiglu, an F32 product with weight, act_codes, w2 in the same way, an F32 sum into y.
 * Codes and scales that mean NaN are not looked for; they count as 480 and 2^128.
 * Roundings off: the same without act_codes, products as in linear.                             */
BOTH static int32_t fp4_sum(const uint8_t *pairs, const uint8_t *code, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += e2m1_int((uint8_t)(pairs[i / 2] >> (4 * (i & 1)))) * e4m3_int(code[i]);
    return sum;
}

BOTH static float fp4_term(int32_t sum, int w_scale, int x_scale) {
    int k = w_scale + x_scale - 264;
    k = k < -126 ? -126 : k > 127 ? 127 : k;
    return (float)sum * bits_f32((uint32_t)(k + 127) << 23);
}

static float fp4_dot_ref(const dsv4_mat *w, int r, const uint8_t *code, const uint8_t *scale) {
    float lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int b = 0; b < w->cols / 32; b++) {
        size_t block = (size_t)r * (size_t)(w->cols / 32) + (size_t)b;
        const uint8_t *pairs = (const uint8_t *)w->data + block * 16;
        int32_t sum = fp4_sum(pairs, code + 32 * b, 32);
        lane[b % 8] += fp4_term(sum, w->scale[block], scale[b / 4]);
    }
    return ((lane[0] + lane[4]) + (lane[2] + lane[6]))
         + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* y = w times one vector: codes and scales if code is set, else f32. */
static void expert_ref_product(float *y, const dsv4_mat *w, const uint8_t *code,
                               const uint8_t *scale, const float *f32) {
    if (!code) linear_ref(y, w, f32, 1, 1, NULL);
    for (int r = 0; code && r < w->rows; r++) y[r] = fp4_dot_ref(w, r, code, scale);
}

static void expert_ffn_ref(float *y, const dsv4_ffn *w, const dsv4_acts *x, const int32_t *rows,
                           const float *weight, int m, float limit, void *scratch,
                           dsv4_exec *ex) {
    int dim = w->w1.cols, inter = w->w1.rows;
    assert(m <= EXPERT_ROWS && dim % 32 == 0 && inter % 32 == 0);
    assert((x->code != NULL) != (x->f32 != NULL));
    float *a = (float *)scratch, *u = a + inter, *out = u + inter; /* one token at a time        */
    uint8_t *code = (uint8_t *)(out + dim), *scale = code + inter;
    for (int i = 0; i < m; i++) {
        size_t at = (size_t)rows[i] * (size_t)dim;
        const uint8_t *xc = x->code ? x->code + at : NULL;
        const uint8_t *xs = xc ? x->scale + (size_t)rows[i] * (size_t)((dim + 127) / 128) : NULL;
        const float *xf = xc ? NULL : x->f32 + at;
        expert_ref_product(a, &w->w1, xc, xs, xf);
        expert_ref_product(u, &w->w3, xc, xs, xf);
        swiglu_ref(a, a, u, 1, inter, limit, ex);
        for (int c = 0; c < inter; c++) a[c] *= weight[i];
        if (xc) act_codes_ref(code, scale, a, 1, inter, ex);
        expert_ref_product(out, &w->w2, xc ? code : NULL, scale, a);
        for (int c = 0; c < dim; c++) y[at + (size_t)c] += out[c];
    }
}
#ifdef __CUDACC__
/* For tokens t = t0 + i < m, i < TILE: w's row r, of each warp another, times row rows[t], or t, of
 * x; thread i of the warp gets the i-th.  256 columns of the tokens at a time lie in v, as integers
 * or as F32, for all warps.  Thread 4*l + j works on quarter j of the blocks of the contract's lane
 * l, that is on 8 columns; with plain x each sums up its own products. */
static __device__ float fp4_dots(const dsv4_mat *w, int r, const dsv4_acts *x,
                                 const int32_t *rows, int t0, int m) {
    __shared__ int32_t v[TILE][8][32];
    int thread = threadIdx.x % 32, cols = w->cols, n_blocks = cols / 32;
    float dot[TILE] = {0}, mine = 0;
    for (int b0 = 0; b0 < n_blocks; b0 += 8) {
        __syncthreads();
        for (int k = threadIdx.x; k < TILE * 256; k += blockDim.x) {
            int i = k / 256, c = 32 * b0 + k % 256;
            bool real = t0 + i < m && c < cols;
            size_t at = (size_t)(real && rows ? rows[t0 + i] : t0 + i) * cols + c;
            v[i][k % 8][k % 256 / 8] = !real ? 0 : x->code ? e4m3_int(x->code[at])
                                                           : (int32_t)f32_bits(x->f32[at]);
        }
        __syncthreads();
        int b = b0 + thread / 4, a[8];
        bool real = b < n_blocks;
        size_t block = (size_t)r * n_blocks + (real ? b : 0);
        const uint8_t *pairs = (const uint8_t *)w->data + block * 16 + thread % 4 * 4;
        #pragma unroll
        for (int c = 0; c < 8; c++) a[c] = e2m1_int((uint8_t)(pairs[c / 2] >> (4 * (c & 1))));
        float half = e8m0_to_f32(w->scale[block]) / 2;
        #pragma unroll
        for (int i = 0; i < TILE; i++) {
            if (t0 + i >= m) continue;
            int32_t sum = 0;
            for (int c = 0; x->code && c < 8; c++) sum += a[c] * v[i][c][thread];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            size_t t = rows ? rows[t0 + i] : t0 + i;
            if (real && x->code)
                dot[i] += fp4_term(sum, w->scale[block],
                                   x->scale[t * ((cols + 127) / 128) + b / 4]);
            for (int c = 0; real && x->f32 && c < 8; c++)
                dot[i] = fmaf((float)a[c] * half, bits_f32((uint32_t)v[i][c][thread]), dot[i]);
        }
    }
    #pragma unroll
    for (int i = 0; i < TILE; i++) {
        for (int far = 16; far >= (x->code ? 4 : 1); far /= 2)
            dot[i] += __shfl_xor_sync(~0u, dot[i], far);
        if (thread == i) mine = dot[i];
    }
    return mine;
}

/* grid (inter/8, ceil(m/TILE)), block 256, a warp a row: a [m][inter].  With roundings on,
 * act_codes_cuda goes between this and expert_down_cuda.  Differs, roundings off: F32 sums. */
extern "C" __global__ void expert_up_cuda(float *a, dsv4_ffn w, dsv4_acts x, const int32_t *rows,
                                          const float *weight, int m, float limit) {
    int r = blockIdx.x * 8 + threadIdx.x / 32, t0 = blockIdx.y * TILE, i = threadIdx.x % 32;
    float g = fp4_dots(&w.w1, r, &x, rows, t0, m), u = fp4_dots(&w.w3, r, &x, rows, t0, m);
    if (i < TILE && t0 + i < m)
        a[(size_t)(t0 + i) * w.w1.rows + r] = swiglu_one(g, u, limit) * weight[t0 + i];
}

/* grid (dim/8, ceil(m/TILE)), block 256; a [m][inter] as codes and scales, or F32. */
extern "C" __global__ void expert_down_cuda(float *y, dsv4_mat w2, dsv4_acts a,
                                            const int32_t *rows, int m) {
    int r = blockIdx.x * 8 + threadIdx.x / 32, t0 = blockIdx.y * TILE, i = threadIdx.x % 32;
    float out = fp4_dots(&w2, r, &a, NULL, t0, m);
    if (i < TILE && t0 + i < m) y[(size_t)rows[t0 + i] * w2.rows + r] += out;
}
#endif

/* === 22. add: y[t][c][:] += x[t][:] for c < copies ==============================================
 * i/o  y [n][copies][d]
 * in   x [n][d]
 *      BIT-DEFINED                                                                              */
static void add_ref(float *y, const float *x, int n, int copies, int d, dsv4_exec *ex) {
    for (int t = 0; t < n; t++, x += d)
        for (int c = 0; c < copies; c++)
            for (int i = 0; i < d; i++) *y++ += x[i];
}
#ifdef __CUDACC__
/* grid (ceil(d/256), n), block 256. */
extern "C" __global__ void add_cuda(float *y, const float *x, int copies, int d) {
    int i = blockIdx.x * 256 + threadIdx.x;
    for (int c = 0; c < copies && i < d; c++)
        y[((size_t)blockIdx.y * copies + c) * d + i] += x[(size_t)blockIdx.y * d + i];
}
#endif

/* === 23. argmax: the first of a row's largest ===================================================
 * out  id [n]
 * in   x [n][d], no NaN
 *      BIT-DEFINED                                                                              */
void argmax_ref(int32_t *id, const float *x, int n, int d, dsv4_exec *ex) {
    for (int t = 0; t < n; t++, x += d) {
        id[t] = 0;
        for (int i = 1; i < d; i++)
            if (x[i] > x[id[t]]) id[t] = i;
    }
}
#ifdef __CUDACC__
/* grid n, block a power of two, at most 1,024. */
extern "C" __global__ void argmax_cuda(int32_t *id, const float *x, int d) {
    __shared__ int best[1024];
    int i = threadIdx.x, at = i < d ? i : 0;
    x += (size_t)blockIdx.x * d;
    for (int c = i; c < d; c += blockDim.x)
        if (x[c] > x[at]) at = c;
    best[i] = at;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        int other = best[min(i + half, (int)blockDim.x - 1)];
        if (i < half && (x[other] > x[at] || (x[other] == x[at] && other < at)))
            best[i] = at = other;
    }
    if (i == 0) id[blockIdx.x] = at;
}
#endif

/* === 24. copy, zero, sync: for memory that only the backend may touch ===========================
 * sync: what was called before has happened.                                                     */
void copy_ref(void *dst, const void *src, size_t bytes, dsv4_exec *ex) { memcpy(dst, src, bytes); }
void zero_ref(void *dst, size_t bytes, dsv4_exec *ex) { memset(dst, 0, bytes); }
int sync_ref(dsv4_exec *ex, dsv4_err *err) { return 0; }

/* === 25. The table ============================================================================ */

const dsv4_ops ops_ref = {
    "ref",       embed_ref,    rmsnorm_ref,     act_quant_ref, act_codes_ref,    act_values_ref,
    linear_ref,  rope_ref,     kv_round_ref,    index_round_ref, compress_ref,   index_scores_ref,
    topk_ref,    attend_ref,   hc_pre_ref,      hc_post_ref,   route_ref,
    swiglu_ref,  expert_ffn_ref, add_ref,       argmax_ref,    copy_ref,         zero_ref,
    sync_ref,
};
