/* cuda.c -- the host side of CUDA: the driver, memory that a GPU sees, launches.
 *
 *   libcuda.so.1 --dlopen--> driver's entries     kernels.cu --nvcc--> fatbin, in this program
 *                                  \                 /
 *   ops_cuda.NAME(...) --> launch(NAME_cuda) --> one stream --> sync()
 *
 * Everything is queued on one stream, in the order of the calls, and nothing is waited for but in
 * sync().  Memory is of two kinds: the GPU's own (VRAM), and pinned memory of the host, which has
 * one address for both; the host may touch that when nothing queued does.
 *
 * Invariants  1 the first thing that goes wrong is kept, the next sync() tells it, and nothing
 *               runs any more
 *             2 a launch depends on shapes only
 *
 * Contents    1 the driver   2 a GPU   3 memory   4 launches   5 the table
 * Not here    what a kernel computes (kernels.cu), what lies where (dsv4.c)
 *
 * Without the CUDA toolkit this file is not built, and nothing here is there.                    */
#define _GNU_SOURCE
#include "dsv4.h"

#include <cuda.h>
#include <dlfcn.h>
#include <stdlib.h>


/* === 1. The driver ============================================================================ */

/* In versions as of CUDA 12.0: later ones of some take other arguments. */
enum { API_VERSION = 12000, LEAST_SM = 80 };
#define ENTRIES(X)                                                                               \
    X(cuInit) X(cuDriverGetVersion) X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName)        \
    X(cuDeviceTotalMem) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain)                      \
    X(cuDevicePrimaryCtxRelease) X(cuCtxSetCurrent) X(cuModuleLoadData) X(cuModuleUnload)        \
    X(cuModuleGetFunction) X(cuMemGetInfo) X(cuMemAlloc) X(cuMemFree) X(cuMemHostRegister)       \
    X(cuMemHostUnregister) X(cuMemHostGetDevicePointer) X(cuMemcpyAsync) X(cuMemsetD8Async)      \
    X(cuStreamCreate) X(cuStreamDestroy) X(cuStreamSynchronize) X(cuLaunchKernel)                \
    X(cuGetErrorName) X(cuGetErrorString)
#define X(name) static __typeof__(name) *p_##name;
ENTRIES(X)
#undef X

/* kernels.cu, built for some GPUs and as PTX for the others. */
__asm__(".pushsection .rodata\n.balign 64\n.hidden kernels_fatbin\n.globl kernels_fatbin\n"
        "kernels_fatbin: .incbin \"" FATBIN "\"\n.popsection\n");
extern const unsigned char kernels_fatbin[];

#define KERNELS(X)                                                                               \
    X(embed) X(rmsnorm) X(act_quant) X(act_codes) X(act_values) X(linear) X(linear_tile) X(rope) \
    X(kv_round) X(index_round) X(compress) X(index_scores) X(topk) X(attend) X(hc_pre)           \
    X(hc_post) X(route) X(swiglu) X(expert_up) X(expert_down) X(add) X(argmax)
#define X(name) K_##name,
typedef enum { KERNELS(X) N_KERNELS } kernel;
#undef X
#define X(name) #name "_cuda",
static const char *const kernel_name[] = { KERNELS(X) };
#undef X

static int driver_open(dsv4_err *err) {
    CUresult (*get)(const char *, void **, int, cuuint64_t) = NULL;
    int has = 0, needs = CUDA_VERSION / 1000;      /* a driver runs all of its major version */
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) return fail(err, "there is no NVIDIA driver (libcuda.so.1)");
    *(void **)&get = dlsym(lib, "cuGetProcAddress");
    if (get && !get("cuDriverGetVersion", (void **)&p_cuDriverGetVersion, 2020, 0))
        p_cuDriverGetVersion(&has);
    if (has < 1000 * needs)
        return fail(err, "the NVIDIA driver is for CUDA %s%d.%d and this dsv4 needs %d.0; update "
                    "the driver", has ? "" : "older than ", has ? has / 1000 : 11,
                    has ? has % 1000 / 10 : 3, needs);
#define X(name)                                                                                  \
    if (get(#name, (void **)&p_##name, API_VERSION, 0) || !p_##name)                             \
        return fail(err, "the NVIDIA driver lacks %s; update it", #name);
    ENTRIES(X)
#undef X
    return 0;
}

/* === 2. A GPU ================================================================================= */
struct cuda {
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUstream stream;
    CUfunction kernel[N_KERNELS];
    cuda_info info;
    bool failed;
    dsv4_err fault;                /* what failed first                                         */
};

dsv4_exec *cuda_exec(cuda *g) { return (dsv4_exec *)(void *)g; }
static cuda *gpu_of(dsv4_exec *ex) { return (cuda *)(void *)ex; }

/* Keep the first error; `what` was being done. */
static bool good(cuda *g, CUresult rc, const char *what) {
    const char *name = "an unknown error", *text = "";
    if (rc == CUDA_SUCCESS || g->failed) return !g->failed;
    g->failed = true;
    p_cuGetErrorName(rc, &name);
    p_cuGetErrorString(rc, &text);
    if (rc == CUDA_ERROR_OUT_OF_MEMORY)
        fail(&g->fault, "GPU %d has no memory left for %s; free some, or use --backend cpu",
             g->info.index, what);
    else
        fail(&g->fault, "GPU %d failed at %s: %s, %s; try again, or use --backend cpu",
             g->info.index, what, name, text);
    return false;
}

static int told(const cuda *g, dsv4_err *err) {
    if (!g->failed) return 0;
    *err = g->fault;
    return -1;
}

static int attribute(const cuda *g, CUdevice_attribute a) {
    int x = 0;
    return p_cuDeviceGetAttribute(&x, a, g->device) ? 0 : x;
}

static int gpu_open(cuda *g, int index, dsv4_err *err) {
    int n = 0;
    size_t total = 0, is_free = 0;
    CUresult rc = p_cuInit(0);
    if (rc == CUDA_SUCCESS) rc = p_cuDeviceGetCount(&n);
    if (rc == CUDA_ERROR_NO_DEVICE || (rc == CUDA_SUCCESS && n == 0))
        return fail(err, "there is no NVIDIA GPU");
    if (!good(g, rc, "its start")) return told(g, err);
    if (index >= n) return fail(err, "there is no GPU %d: %d found, numbered from 0", index, n);
    if (!good(g, p_cuDeviceGet(&g->device, index), "its start")) return told(g, err);
    p_cuDeviceGetName(g->info.name, sizeof g->info.name, g->device);
    g->info.sm = 10 * attribute(g, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                 attribute(g, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    if (g->info.sm < LEAST_SM)
        return fail(err, "GPU %d, %s, has compute capability %d.%d and 8.0 is needed", index,
                    g->info.name, g->info.sm / 10, g->info.sm % 10);
    if (good(g, p_cuDevicePrimaryCtxRetain(&g->context, g->device), "its context") &&
        good(g, p_cuCtxSetCurrent(g->context), "its context") &&
        good(g, p_cuModuleLoadData(&g->module, kernels_fatbin), "loading the kernels") &&
        good(g, p_cuStreamCreate(&g->stream, CU_STREAM_NON_BLOCKING), "its stream") &&
        good(g, p_cuMemGetInfo(&is_free, &total), "its memory"))
        for (int k = 0; k < N_KERNELS; k++)
            good(g, p_cuModuleGetFunction(&g->kernel[k], g->module, kernel_name[k]),
                 kernel_name[k]);
    g->info.total = total;
    g->info.free = is_free;
    return told(g, err);
}

int cuda_open(cuda **out, int index, dsv4_err *err) {
    *out = NULL;
    if (driver_open(err)) return -1;
    cuda *g = calloc(1, sizeof *g);
    if (!g) return fail(err, "out of memory for the GPU");
    g->info.index = index;
    if (gpu_open(g, index, err)) {
        cuda_close(g);
        return -1;
    }
    *out = g;
    return 0;
}

void cuda_close(cuda *g) {
    if (!g) return;
    if (g->stream) p_cuStreamDestroy(g->stream);
    if (g->module) p_cuModuleUnload(g->module);
    if (g->context) p_cuDevicePrimaryCtxRelease(g->device);
    free(g);
}

const cuda_info *cuda_get_info(const cuda *g) { return &g->info; }

/* === 3. Memory ================================================================================ */
void *cuda_alloc(cuda *g, uint64_t bytes, const char *what, dsv4_err *err) {
    CUdeviceptr p = 0;
    if (good(g, p_cuMemAlloc(&p, bytes), what)) return (void *)p;
    told(g, err);
    return NULL;
}

void cuda_free(cuda *g, void *p) { good(g, p_cuMemFree((CUdeviceptr)p), "giving memory back"); }

int cuda_pin(cuda *g, void *p, uint64_t bytes, const char *what, dsv4_err *err) {
    CUdeviceptr same = 0;
    unsigned how = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
    if (good(g, p_cuMemHostRegister(p, bytes, how), what) &&
        good(g, p_cuMemHostGetDevicePointer(&same, p, 0), what) && (void *)same != p)
        return fail(err, "GPU %d sees the host's memory at other addresses; use --backend cpu",
                    g->info.index);
    return told(g, err);
}

void cuda_unpin(cuda *g, void *p) { good(g, p_cuMemHostUnregister(p), "giving memory back"); }

static void copy_cuda(void *dst, const void *src, size_t bytes, dsv4_exec *ex) {
    cuda *g = gpu_of(ex);
    if (g->failed || !bytes) return;
    good(g, p_cuMemcpyAsync((CUdeviceptr)dst, (CUdeviceptr)src, bytes, g->stream), "a copy");
}

static void zero_cuda(void *dst, size_t bytes, dsv4_exec *ex) {
    cuda *g = gpu_of(ex);
    if (g->failed || !bytes) return;
    good(g, p_cuMemsetD8Async((CUdeviceptr)dst, 0, bytes, g->stream), "zeroing memory");
}

static int sync_cuda(dsv4_exec *ex, dsv4_err *err) {
    cuda *g = gpu_of(ex);
    if (!g->failed) good(g, p_cuStreamSynchronize(g->stream), "a computation");
    return told(g, err);
}

/* === 4. Launches ==============================================================================
 * Each as its kernel's comment wants it; the driver copies what the arguments' addresses hold.   */

static void launch(dsv4_exec *ex, kernel k, unsigned gx, unsigned gy, unsigned block,
                   void **args) {
    cuda *g = gpu_of(ex);
    if (g->failed || gx == 0 || gy == 0) return;
    good(g, p_cuLaunchKernel(g->kernel[k], gx, gy, 1, block, 1, 1, 0, g->stream, args, NULL),
         kernel_name[k]);
}
#define ARGS(...) (void *[]){__VA_ARGS__}
enum { TILE = 8 };                 /* tokens of a block, as kernels.cu has it                   */

static unsigned up(int64_t n, int by) { return (unsigned)((n + by - 1) / by); }

static void embed_launch(float *h, const dsv4_mat *w, const int32_t *tokens, int n, int hc,
                         dsv4_exec *ex) {
    dsv4_mat m = *w;
    launch(ex, K_embed, (unsigned)n, 1, 256, ARGS(&h, &m, &tokens, &hc));
}

static void rmsnorm_launch(float *y, const float *x, const float *w, int n, int d, float eps,
                           dsv4_exec *ex) {
    launch(ex, K_rmsnorm, (unsigned)n, 1, 256, ARGS(&y, &x, &w, &d, &eps));
}

static void act_quant_launch(float *y, const float *x, int n, int d, dsv4_exec *ex) {
    launch(ex, K_act_quant, up(d, 128), (unsigned)n, 32, ARGS(&y, &x, &d));
}

static void act_codes_launch(uint8_t *code, uint8_t *scale, const float *x, int n, int d,
                             dsv4_exec *ex) {
    launch(ex, K_act_codes, up(d, 128), (unsigned)n, 32, ARGS(&code, &scale, &x, &d));
}

static void act_values_launch(float *y, const uint8_t *code, const uint8_t *scale, int n, int d,
                              dsv4_exec *ex) {
    launch(ex, K_act_values, up(d, 128), (unsigned)n, 128, ARGS(&y, &code, &scale, &d));
}

static void linear_launch(float *y, const dsv4_mat *w, const float *x, int n, int groups,
                          dsv4_exec *ex) {
    dsv4_mat m = *w;
    if (n == 1) launch(ex, K_linear, up(m.rows, 4), 1, 128, ARGS(&y, &m, &x, &groups));
    else launch(ex, K_linear_tile, up(m.rows, 16), up(n, TILE), 128,
                ARGS(&y, &m, &x, &n, &groups));
}

static void rope_launch(float *x, const float *inv_freq, int n, int n_heads, int head_dim,
                        int rope_dim, int64_t pos0, int64_t step, bool inverse, dsv4_exec *ex) {
    launch(ex, K_rope, (unsigned)n_heads, (unsigned)n, 32,
           ARGS(&x, &inv_freq, &head_dim, &rope_dim, &pos0, &step, &inverse));
}

static void kv_round_launch(void *rows, const float *x, int n, int head_dim, int rope_dim,
                            bool packed, dsv4_exec *ex) {
    size_t bytes = kv_row_bytes(head_dim, rope_dim, packed);
    launch(ex, K_kv_round, up(head_dim - rope_dim, 64) + 1, (unsigned)n, 32,
           ARGS(&rows, &x, &head_dim, &rope_dim, &packed, &bytes));
}

static void index_round_launch(void *rows, float *x, int n, int d, bool packed, dsv4_exec *ex) {
    size_t bytes = index_row_bytes(d, packed);
    launch(ex, K_index_round, (unsigned)n, 1, d < 32 ? 32 : (unsigned)d,
           ARGS(&rows, &x, &d, &packed, &bytes));
}

static void compress_launch(float *entries, const dsv4_compress *in, int64_t g0, int n_groups,
                            dsv4_exec *ex) {
    dsv4_compress c = *in;
    launch(ex, K_compress, up(c.d, 128), (unsigned)n_groups, 128, ARGS(&entries, &c, &g0));
}

static void index_scores_launch(float *scores, const dsv4_index *in, int n, dsv4_exec *ex) {
    dsv4_index i = *in;
    launch(ex, K_index_scores, up((i.t0 + n) / i.ratio, 128), (unsigned)n, 128,
           ARGS(&scores, &i));
}

static void topk_launch(int32_t *idx, int32_t *count, const float *scores, size_t stride, int n,
                        int k, int ratio, int64_t t0, dsv4_exec *ex) {
    launch(ex, K_topk, (unsigned)n, 1, 512, ARGS(&idx, &count, &scores, &stride, &k, &ratio, &t0));
}

static void attend_launch(float *o, const dsv4_attend *in, int n, dsv4_exec *ex) {
    enum { HEADS = 8 };            /* that share what is read                                   */
    dsv4_attend a = *in;
    launch(ex, K_attend, (unsigned)n, up(a.n_heads, HEADS), 32 * HEADS, ARGS(&o, &a));
}

static void hc_pre_launch(float *x, float *post, float *comb, const float *h, const dsv4_hc *w,
                          const dsv4_hc_shape *s, int n, dsv4_exec *ex) {
    dsv4_hc hc = *w;
    dsv4_hc_shape shape = *s;
    launch(ex, K_hc_pre, (unsigned)n, 1, 1024, ARGS(&x, &post, &comb, &h, &hc, &shape));
}

static void hc_post_launch(float *h, const float *y, const float *post, const float *comb,
                           const dsv4_hc_shape *s, int n, dsv4_exec *ex) {
    int hc = s->hc, dim = s->dim;
    launch(ex, K_hc_post, up(dim, 256), (unsigned)n, 256, ARGS(&h, &y, &post, &comb, &hc, &dim));
}

static void route_launch(int32_t *ids, float *weights, const dsv4_route *in, int n,
                         dsv4_exec *ex) {
    dsv4_route r = *in;
    launch(ex, K_route, (unsigned)n, 1, 256, ARGS(&ids, &weights, &r));
}

static void swiglu_launch(float *a, const float *g, const float *u, int n, int d, float limit,
                          dsv4_exec *ex) {
    size_t nd = (size_t)n * (size_t)d;
    launch(ex, K_swiglu, up((int64_t)nd, 256), 1, 256, ARGS(&a, &g, &u, &nd, &limit));
}

static void expert_ffn_launch(float *y, const dsv4_ffn *w, const dsv4_acts *x,
                              const int32_t *rows, const float *weight, int m, float limit,
                              void *scratch, dsv4_exec *ex) {
    enum { ROWS = 8 };             /* of a block                                                */
    int dim = w->w1.cols, inter = w->w1.rows;
    dsv4_ffn f = *w;
    dsv4_acts in = *x, mid = {.f32 = scratch};
    float *a = scratch;
    launch(ex, K_expert_up, up(inter, ROWS), up(m, TILE), 256,
           ARGS(&a, &f, &in, &rows, &weight, &m, &limit));
    if (in.code) {
        uint8_t *code = (uint8_t *)(a + (size_t)m * (size_t)inter);
        uint8_t *scale = code + (size_t)m * (size_t)inter;
        mid = (dsv4_acts){.code = code, .scale = scale};
        act_codes_launch(code, scale, a, m, inter, ex);
    }
    launch(ex, K_expert_down, up(dim, ROWS), up(m, TILE), 256, ARGS(&y, &f.w2, &mid, &rows, &m));
}

static void add_launch(float *y, const float *x, int n, int copies, int d, dsv4_exec *ex) {
    launch(ex, K_add, up(d, 256), (unsigned)n, 256, ARGS(&y, &x, &copies, &d));
}

static void argmax_launch(int32_t *id, const float *x, int n, int d, dsv4_exec *ex) {
    launch(ex, K_argmax, (unsigned)n, 1, 1024, ARGS(&id, &x, &d));
}

/* === 5. The table ============================================================================= */
const dsv4_ops ops_cuda = {
    "cuda",        embed_launch, rmsnorm_launch,    act_quant_launch, act_codes_launch,
    act_values_launch, linear_launch, rope_launch,  kv_round_launch,  index_round_launch,
    compress_launch, index_scores_launch, topk_launch, attend_launch, hc_pre_launch,
    hc_post_launch, route_launch,   swiglu_launch,    expert_ffn_launch,
    add_launch,    argmax_launch, copy_cuda,        zero_cuda,        sync_cuda,
};
