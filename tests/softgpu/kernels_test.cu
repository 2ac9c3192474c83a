/* kernels_test.cu -- kernels of the kinds that dsv4 needs, for test_kernels.c: each right, and with
 * one bug at a time.
 *
 *   template <bug B> body        one text for both
 *   KERNEL(name)                 the right one
 *   KERNEL(name__bug)            what softgpu must name, at the line that is marked "caught: bug"
 *
 * No right one has a barrier or wait too many: each is left out once, in the PTX, and missed.
 *
 * The mark is at the line, or, "below", up to four lines above it (asm is named by its last line).
 * nvcc -fatbin -lineinfo for compute_80 and compute_89.                                          */
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>
#include <stdint.h>

namespace cg = cooperative_groups;

enum bug {
    NONE, NO_BARRIER, NO_SYNCWARP, OFF_BY_ONE, DIVERGENT, UNWRITTEN, CROSS_BLOCK, NO_WAIT,
    NO_SECOND, NO_LAST_WAIT, NO_ATOMIC, WRONG_MASK, NO_EMPTY, MISALIGNED
};

#define KERNEL extern "C" __global__ void

/* === Reductions: out[block] = sum of its x[2 * blockDim] ====================================== */

template <bug B> static __device__ __forceinline__ void sum_shared_of(float *out, const float *x) {
    extern __shared__ float s[];
    int t = threadIdx.x, n = blockDim.x;
    x += (size_t)blockIdx.x * 2 * n;
    if (B != UNWRITTEN || t != 5) s[t] = x[t] + x[t + n];
    __syncthreads();
    for (n /= 2; n; n /= 2) {
        if (t < n) {
            int other = t + n + (B == OFF_BY_ONE && n > 1);
            s[t] += s[other];                  /* caught: NO_BARRIER OFF_BY_ONE UNWRITTEN */
            if (B == DIVERGENT) __syncthreads();               /* caught: DIVERGENT */
        }
        if (B != NO_BARRIER && B != DIVERGENT) __syncthreads();
    }
    if (!t) out[B == CROSS_BLOCK ? 0 : blockIdx.x] = s[0]; /* caught: CROSS_BLOCK */
}
KERNEL sum_shared(float *out, const float *x) { sum_shared_of<NONE>(out, x); }
KERNEL sum_shared__NO_BARRIER(float *out, const float *x) { sum_shared_of<NO_BARRIER>(out, x); }
KERNEL sum_shared__OFF_BY_ONE(float *out, const float *x) { sum_shared_of<OFF_BY_ONE>(out, x); }
KERNEL sum_shared__UNWRITTEN(float *out, const float *x) { sum_shared_of<UNWRITTEN>(out, x); }
KERNEL sum_shared__DIVERGENT(float *out, const float *x) { sum_shared_of<DIVERGENT>(out, x); }
KERNEL sum_shared__CROSS_BLOCK(float *out, const float *x) { sum_shared_of<CROSS_BLOCK>(out, x); }

/* The same by shuffles, in blocks of up to 1024. */
template <bug B> static __device__ __forceinline__ void sum_shuffle_of(float *out, const float *x) {
    __shared__ float s[32];
    int t = threadIdx.x, n = blockDim.x;
    x += (size_t)blockIdx.x * 2 * n;
    float v = x[t] + x[t + n];
    for (int k = 16; k; k /= 2) v += __shfl_xor_sync(~0u, v, k);
    if (t % 32 == 0) s[t / 32] = v;
    if (B != NO_BARRIER) __syncthreads();
    if (t < n / 32) {
        v = s[t];                                          /* caught: NO_BARRIER */
        unsigned m = n / 32 == 32 ? ~0u : (1u << n / 32) - 1;
        for (int k = n / 64; k; k /= 2)
            v += __shfl_down_sync(B == WRONG_MASK ? ~0u : m, v, k, n / 32); /* caught: WRONG_MASK */
        if (!t) out[blockIdx.x] = v;
    }
}
KERNEL sum_shuffle(float *out, const float *x) { sum_shuffle_of<NONE>(out, x); }
KERNEL sum_shuffle__NO_BARRIER(float *out, const float *x) { sum_shuffle_of<NO_BARRIER>(out, x); }
KERNEL sum_shuffle__WRONG_MASK(float *out, const float *x) { sum_shuffle_of<WRONG_MASK>(out, x); }

/* The same by one warp in shared memory: out[block] = sum of 64 of x. */
template <bug B> static __device__ __forceinline__ void sum_warp_of(float *out, const float *x) {
    __shared__ volatile float s[64];
    int t = threadIdx.x;
    x += (size_t)blockIdx.x * 64;
    s[31 - t] = x[t];
    s[63 - t] = x[t + 32];
    __syncwarp();
    for (int n = 32; n; n /= 2) {
        if (t < n) s[t] = s[t] + s[t + n];                 /* caught: NO_SYNCWARP */
        if (B != NO_SYNCWARP && n > 1) __syncwarp();
    }
    if (!t) out[blockIdx.x] = s[0];
}
KERNEL sum_warp(float *out, const float *x) { sum_warp_of<NONE>(out, x); }
KERNEL sum_warp__NO_SYNCWARP(float *out, const float *x) { sum_warp_of<NO_SYNCWARP>(out, x); }

/* By tiles of 8 lanes: out[i / 8] = sum of x[i]. */
KERNEL sum_tiles(int *out, const int *x) {
    __shared__ int s[256];
    auto tile = cg::tiled_partition<8>(cg::this_thread_block());
    int i = blockIdx.x * blockDim.x + threadIdx.x, v;
    s[threadIdx.x] = x[i];
    tile.sync();                           /* a member mask of each tile's own */
    v = s[threadIdx.x ^ 7];
    for (int k = 4; k; k /= 2) v += tile.shfl_down(v, k);
    if (tile.thread_rank() == 0) out[i / 8] = v;
}

/* === Scan: out[i] = x[0] + .. + x[i] of its block ============================================= */

template <bug B> static __device__ __forceinline__ void scan_of(int *out, const int *x, int n) {
    extern __shared__ int two[];
    int t = threadIdx.x, w = blockDim.x, i = blockIdx.x * w + t, in = 0;
    two[t] = i < n ? x[i] : 0;
    __syncthreads();
    for (int k = 1; k < w; k *= 2) {
        int *from = two + in * w, *to = two + (in ^= 1) * w;
        to[t] = t >= k ? from[t] + from[t - k] : from[t];  /* caught: NO_BARRIER */
        if (B != NO_BARRIER) __syncthreads();
    }
    if (i < n + (B == OFF_BY_ONE)) out[i] = two[in * w + t]; /* caught: OFF_BY_ONE */
}
KERNEL scan(int *out, const int *x, int n) { scan_of<NONE>(out, x, n); }
KERNEL scan__NO_BARRIER(int *out, const int *x, int n) { scan_of<NO_BARRIER>(out, x, n); }
KERNEL scan__OFF_BY_ONE(int *out, const int *x, int n) { scan_of<OFF_BY_ONE>(out, x, n); }

/* === Radix histogram: count[d] += how many of x[n] have d as their byte `digit` =============== */

template <bug B>
static __device__ __forceinline__ void histogram_of(unsigned *count, const unsigned *x, int n,
                                                    int digit) {
    __shared__ unsigned s[256];
    for (int k = threadIdx.x; k < 256; k += blockDim.x)
        s[k] = 0;                                          /* caught: NO_BARRIER */
    if (B != NO_BARRIER) __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        unsigned d = x[i] >> 8 * digit & 255;
        if (B == NO_ATOMIC) s[d]++;                        /* caught: NO_ATOMIC */
        else atomicAdd(&s[d], 1);                          /* caught: NO_BARRIER */
    }
    __syncthreads();
    for (int k = threadIdx.x; k < 256; k += blockDim.x)
        if (B == CROSS_BLOCK) count[k] += s[k];            /* caught: CROSS_BLOCK */
        else if (s[k]) atomicAdd(&count[k], s[k]);
}
KERNEL histogram(unsigned *c, const unsigned *x, int n, int d) { histogram_of<NONE>(c, x, n, d); }
KERNEL histogram__NO_BARRIER(unsigned *c, const unsigned *x, int n, int d) {
    histogram_of<NO_BARRIER>(c, x, n, d);
}
KERNEL histogram__NO_ATOMIC(unsigned *c, const unsigned *x, int n, int d) {
    histogram_of<NO_ATOMIC>(c, x, n, d);
}
KERNEL histogram__CROSS_BLOCK(unsigned *c, const unsigned *x, int n, int d) {
    histogram_of<CROSS_BLOCK>(c, x, n, d);
}

/* === Compaction by ballot: out[] = the x[i] < limit, in order; of one warp ==================== */

KERNEL compact(int *out, int *n_out, const int *x, int n, int limit) {
    int lane = threadIdx.x, at = 0;
    for (int i = lane; i - lane < n; i += 32) {
        bool keep = i < n && x[i] < limit;
        unsigned m = __ballot_sync(~0u, keep);
        if (keep) out[at + __popc(m & ((1u << lane) - 1))] = x[i];
        at += __popc(m);
    }
    if (!lane) *n_out = at;
}

/* Lanes that have the same key elect the first; counts by match. */
KERNEL same_keys(unsigned *out, const int *key) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned m = __match_any_sync(~0u, key[i]);
    unsigned top = __reduce_max_sync(~0u, (unsigned)__popc(m));
    out[i] = (unsigned)__popc(m) | (unsigned)(__ffs((int)m) - 1) << 8 | top << 16;
}

/* === Matrix product through cp.async, double-buffered: C[m][n] = A[m][k] @ B[k][n] ============ */

template <bug B> static __device__ __forceinline__ void matmul_of(float *c, const float *a,
                                                                 const float *b, int n, int k) {
    enum { T = 16 };
    __shared__ __align__(16) float sa[2][T][T], sb[2][T][T];
    int tx = threadIdx.x, ty = threadIdx.y, row = blockIdx.y * T, col = blockIdx.x * T;
    float sum = 0;
    auto fetch = [&](int k0, int at) {
        if (tx % 4 == 0) {
            /* caught: NO_SECOND, below */
            __pipeline_memcpy_async(&sa[at][ty][tx], &a[(size_t)(row + ty) * k + k0 + tx], 16);
            /* caught: NO_SECOND, below */
            __pipeline_memcpy_async(&sb[at][ty][tx], &b[(size_t)(k0 + ty) * n + col + tx], 16);
        }
        __pipeline_commit();
    };
    fetch(0, 0);
    for (int k0 = 0, at = 0; k0 < k; k0 += T, at ^= 1) {
        if (k0 + T < k) fetch(k0 + T, at ^ 1);
        if (k0 + T < k) __pipeline_wait_prior(B == NO_WAIT ? 2 : 1);
        else if (B != NO_LAST_WAIT) __pipeline_wait_prior(0);
        if (B != NO_BARRIER) __syncthreads();
        for (int j = 0; j < T; j++)
            /* caught: NO_WAIT NO_LAST_WAIT NO_BARRIER NO_SECOND, below */
            sum += sa[at][ty][j] * sb[at][j][tx];
        if (B != NO_SECOND) __syncthreads();
    }
    c[(size_t)(row + ty) * n + col + tx] = sum;
}
#define MATMUL(name, bug)                                                                        \
    KERNEL name(float *c, const float *a, const float *b, int n, int k) {                        \
        matmul_of<bug>(c, a, b, n, k);                                                           \
    }
MATMUL(matmul, NONE)
MATMUL(matmul__NO_WAIT, NO_WAIT)
MATMUL(matmul__NO_LAST_WAIT, NO_LAST_WAIT)
MATMUL(matmul__NO_BARRIER, NO_BARRIER)
MATMUL(matmul__NO_SECOND, NO_SECOND)

/* === The same on tensor cores: C[m][n] = A[m][k] @ B[n][k]^T, a warp for 16 x 8 =============== */

static __device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

template <bug B>
static __device__ __forceinline__ void matmul_bf16_of(float *c, const __nv_bfloat16 *a,
                                                      const __nv_bfloat16 *b, int n, int k) {
    __shared__ __align__(16) __nv_bfloat16 sa[16][24], sb[8][24];
    int lane = threadIdx.x, row = blockIdx.y * 16, col = blockIdx.x * 8;
    float d[4] = {0, 0, 0, 0};
    for (int k0 = 0; k0 < k; k0 += 16) {
        for (int i = lane; i < 256; i += 32)
            sa[i / 16][i % 16] = a[(size_t)(row + i / 16) * k + k0 + i % 16];
        for (int i = lane; i < 128 - (B == UNWRITTEN); i += 32)
            sb[i / 16][i % 16] = b[(size_t)(col + i / 16) * k + k0 + i % 16];
        if (B != NO_SYNCWARP) __syncwarp();
        unsigned fa[4], fb[2];
        const __nv_bfloat16 *pa = &sa[lane % 16][lane / 16 * 8 + (B == MISALIGNED)];
        const __nv_bfloat16 *pb = &sb[lane % 8][lane / 8 % 2 * 8];
        /* caught: NO_SYNCWARP MISALIGNED, below */
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                     : "r"(shared_address(pa)));
        /* caught: UNWRITTEN, below */
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(fb[0]), "=r"(fb[1]) : "r"(shared_address(pb)));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
        __syncwarp();
    }
    for (int q = 0; q < 4; q++)
        c[(size_t)(row + lane / 4 + q / 2 * 8) * n + col + lane % 4 * 2 + q % 2] = d[q];
}
#define MATMUL_BF16(name, bug)                                                                   \
    KERNEL name(float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b, int n, int k) {        \
        matmul_bf16_of<bug>(c, a, b, n, k);                                                      \
    }
MATMUL_BF16(matmul_bf16, NONE)
MATMUL_BF16(matmul_bf16__NO_SYNCWARP, NO_SYNCWARP)
MATMUL_BF16(matmul_bf16__UNWRITTEN, UNWRITTEN)
MATMUL_BF16(matmul_bf16__MISALIGNED, MISALIGNED)

/* E4M3: C[16][8] = A[16][32] @ B[8][32]^T, fragments loaded by hand. */
KERNEL mma_e4m3(float *c, const unsigned *a, const unsigned *b) {
#if __CUDA_ARCH__ >= 890
    int g = threadIdx.x / 4, q = threadIdx.x % 4;
    unsigned fa[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
    unsigned fb[2] = {b[g * 8 + q], b[g * 8 + q + 4]};
    float d[4] = {0, 0, 0, 0};
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    for (int k = 0; k < 4; k++) c[(g + k / 2 * 8) * 8 + q * 2 + k % 2] = d[k];
#endif
}

/* === Named barriers: warp 0 produces, warp 1 consumes; out[i] = 2 * x[i] ====================== */

template <bug B> static __device__ __forceinline__ void pipe_of(int *out, const int *x, int n) {
    __shared__ int s[32];
    int lane = threadIdx.x % 32;
    bool producer = threadIdx.x < 32;
    for (int i = lane; i < n; i += 32) {
        if (producer) {
            if (B != NO_EMPTY && i >= 32) asm volatile("bar.sync 2, 64;" ::: "memory");
            s[lane] = 2 * x[i];                            /* caught: NO_EMPTY */
            asm volatile("bar.arrive 1, 64;" ::: "memory");    /* caught: NO_EMPTY */
        } else {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            out[i] = s[31 - lane];                             /* caught: NO_EMPTY */
            if (B != NO_EMPTY && i + 32 < n) asm volatile("bar.arrive 2, 64;" ::: "memory");
        }
    }
}
KERNEL pipe(int *out, const int *x, int n) { pipe_of<NONE>(out, x, n); }
KERNEL pipe__NO_EMPTY(int *out, const int *x, int n) { pipe_of<NO_EMPTY>(out, x, n); }

/* A barrier that also counts. */
KERNEL count_above(int *out, const int *x, int limit) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int n = __syncthreads_count(x[i] > limit);
    int all = __syncthreads_and(x[i] > limit), any = __syncthreads_or(x[i] > limit);
    out[i] = n + 10000 * all + 20000 * any;
}

/* === Control flow and small things ============================================================ */

/* Steps of n to 1, with all the ways out of a loop; calls with a stack of their own. */
static __device__ __noinline__ int halve(int n, int depth) {
    if (depth > 3 || n % 2) return n;
    return halve(n / 2, depth + 1);
}
KERNEL collatz(int *out, const int *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, steps = 0, seen[8] = {0};
    if (i >= n) return;
    for (int v = x[i];; steps++) {
        if (v <= 1) break;
        seen[v & 7]++;
        if (v % 4 == 0) {
            v = halve(v, 0);
            continue;
        }
        switch (v % 3) {
        case 0: v = v % 2 ? 3 * v + 1 : v / 2; break;
        case 1: if (steps > 200) return; /* and leaves out[i] as it was */
        default: v = v & 1 ? 3 * v + 1 : v >> 1;
        }
        if (steps == 300) { steps = -1; break; }
    }
    for (int k = 0; k < 8; k++) steps += (k + 1) * seen[(k + i) & 7] << 10;
    out[i] = steps;
}

/* Largest by atomicMax and by compare-and-swap in shared memory, of bf16 pairs and float4s. */
KERNEL largest(float *out, const float4 *x, const __nv_bfloat162 *y, int n) {
    __shared__ unsigned top, top_by_cas;
    __shared__ __nv_bfloat16 half[128];
    if (threadIdx.x == 0) top = top_by_cas = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float4 v = x[i];
        float2 w = __bfloat1622float2(y[i]);
        float m = fmaxf(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)), fmaxf(w.x, w.y)); /* as bits */
        m = fmaxf(m, 0);                               /* positive ones order as their bits */
        half[threadIdx.x] = __float2bfloat16(m);       /* of its own: two lanes share a word */
        m = fmaxf(m, __bfloat162float(half[threadIdx.x]));
        atomicMax(&top, __float_as_uint(m));
        for (unsigned old = 0, now;; old = now) {
            if (__uint_as_float(old) >= m) break;
            now = atomicCAS(&top_by_cas, old, __float_as_uint(m));
            if (now == old) break;
        }
    }
    __syncthreads();
    if (threadIdx.x < 2) out[threadIdx.x] = __uint_as_float(threadIdx.x ? top_by_cas : top);
}
