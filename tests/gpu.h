/* gpu.h -- what tests of CUDA twins share: the driver's entries, device memory, launches, input.
 *
 *   int main(int argc, char **argv) {
 *       if (gpu_open(argc > 1 ? argv[1] : "build/kernels.fatbin")) { skip, with a line }
 *       RUN(test_...);
 *   }                                                                                            */
#ifndef GPU_H
#define GPU_H

#include "check.h"

#include <cuda.h>
#include <dlfcn.h>

#pragma GCC diagnostic ignored "-Wunused-function"   /* nobody needs all of it */

/* Entries of the driver, as of CUDA 12.0: later versions of some take other arguments. */
enum { API_VERSION = 12000 };
#define ENTRIES(X)                                                                               \
    X(cuInit) X(cuDeviceGet) X(cuDevicePrimaryCtxRetain) X(cuCtxSetCurrent) X(cuModuleLoadData)  \
    X(cuModuleGetFunction) X(cuMemAlloc) X(cuMemFree) X(cuMemcpyHtoD) X(cuMemcpyDtoH)            \
    X(cuLaunchKernel) X(cuCtxSynchronize) X(cuGetErrorName)
#define X(name) static __typeof__(name) *p_##name;
ENTRIES(X)
#undef X

static CUmodule gpu_module;
static CUcontext gpu_context;
static uint64_t gpu_rng = 1;

#define OK(call)                                                                                 \
    do {                                                                                         \
        CUresult rc_ = (call);                                                                   \
        const char *name_ = "?";                                                                 \
        if (rc_) p_cuGetErrorName(rc_, &name_);                                                  \
        CHECK(rc_ == 0, "%s", name_);                                                            \
    } while (0)

static uint32_t draw(uint32_t below) {
    gpu_rng = gpu_rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((gpu_rng >> 33) % below);
}

static float draw_float(void) { return ((float)draw(1 << 20) / (1 << 19) - 1) * 4; }

/* n floats, some of them extreme; the caller frees them. */
static float *draw_floats(size_t n) {
    static const float odd[] = {0, -0.0f, 1e-30f, -1e30f, 448, 460, 3e-5f, INFINITY, NAN};
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = draw(300) ? draw_float() : odd[draw(9)];
    return x;
}

static CUdeviceptr to_gpu(const void *data, size_t bytes) {
    CUdeviceptr d = 0;
    OK(p_cuMemAlloc(&d, bytes));
    OK(p_cuMemcpyHtoD(d, data, bytes));
    return d;
}

static CUdeviceptr room(size_t bytes) {
    CUdeviceptr d = 0;
    OK(p_cuMemAlloc(&d, bytes));
    return d;
}

/* Copy out and free. */
static void from_gpu(void *data, CUdeviceptr d, size_t bytes) {
    OK(p_cuMemcpyDtoH(data, d, bytes));
    OK(p_cuMemFree(d));
}

static void launch(const char *name, unsigned gx, unsigned gy, unsigned threads, void **args) {
    CUfunction f = NULL;
    OK(p_cuModuleGetFunction(&f, gpu_module, name));
    OK(p_cuLaunchKernel(f, gx, gy, 1, threads, 1, 1, 0, NULL, args, NULL));
    OK(p_cuCtxSynchronize());
}
#define ARGS(...) (void *[]){__VA_ARGS__}

static bool same_float(float a, float b) {
    return !memcmp(&a, &b, sizeof a) || (isnan(a) && isnan(b));
}

static void check_same(const char *what, const float *got, const float *want, size_t n) {
    for (size_t i = 0; i < n; i++)
        CHECK(same_float(got[i], want[i]), "%s[%zu] is %.9g, not %.9g", what, i, (double)got[i],
              (double)want[i]);
}

static unsigned up(int n, int by) { return (unsigned)((n + by - 1) / by); }

/* 1: there is no driver here. */
static int gpu_open(const char *fatbin) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    CUdevice device = 0;
    buffer image = {0};
    dsv4_err err;
    if (!lib) return 1;
    __typeof__(cuGetProcAddress) *get = NULL;
    *(void **)&get = dlsym(lib, "cuGetProcAddress_v2");
    CHECK(get != NULL, "%s", dlerror());
#define X(name)                                                                                  \
    CHECK(get && get(#name, (void **)&p_##name, API_VERSION, 0, NULL) == 0, "no %s", #name);
    ENTRIES(X)
#undef X
    CHECK(read_file(&image, fatbin, 1 << 28, &err) == 0, "%s", err.msg);
    OK(p_cuInit(0));
    OK(p_cuDeviceGet(&device, 0));
    OK(p_cuDevicePrimaryCtxRetain(&gpu_context, device));
    OK(p_cuCtxSetCurrent(gpu_context));
    OK(p_cuModuleLoadData(&gpu_module, image.s));
    free(image.s);
    return 0;
}

#endif
