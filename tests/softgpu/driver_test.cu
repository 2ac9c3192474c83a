/* driver_test.cu -- kernels for test_driver.c, each right or with one bug that softgpu names. */
#include <stdint.h>

__device__ int counter = 7;
__constant__ float table[4] = {1, 2, 3, 4};

extern "C" {

__global__ void which(int *out) { *out = __CUDA_ARCH__; }

__global__ void add(float *y, const float *x, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) y[i] += x[i] * table[1];
}

/* Odd numbers of 2-byte elements a block: neighbours share 4 bytes. */
__global__ void halves(uint16_t *y, const uint16_t *x) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    y[i] = (uint16_t)(x[i] + x[0]);
}

__global__ void count(int *sum, int times) {
    for (int k = 0; k < times; k++) atomicAdd(sum, 1);
    atomicAdd(&counter, 1);
}

/* Bugs: each block also touches element 0. */
__global__ void write_write(int *x) { x[0] = x[blockIdx.x + 1] = 1; }
__global__ void read_other(int *x, int *y) { y[blockIdx.x] = x[0]; x[blockIdx.x] = 1; }
__global__ void atomic_read(int *sum, int *y) { atomicAdd(sum, 1); y[blockIdx.x] = *sum; }

__global__ void put(float *x, float v, int at) { x[at + (int)threadIdx.x] = v; }
__global__ void get(float *y, const float *x, int at) { y[threadIdx.x] = x[at + (int)threadIdx.x]; }

__global__ void __launch_bounds__(128) bounded(int *x) { x[threadIdx.x] = 1; }

__global__ void shared_sum(int *out, int n) {
    extern __shared__ int s[];
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) s[i] = i;
    __syncthreads();
    if (threadIdx.x) return;
    int sum = 0;
    for (int i = 0; i < n; i++) sum += s[i];
    *out = sum;
}

}
