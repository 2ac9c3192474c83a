/* gpu_peak.cu -- what a GPU reaches at most: kernels that do nothing else. */

/* 2 * 16 * rounds operations a thread. */
extern "C" __global__ void peak_fma(float *out, int rounds) {
    float x[16], a = 1 + threadIdx.x * 1e-9f;
    for (int i = 0; i < 16; i++) x[i] = i;
    for (int r = 0; r < rounds; r++)
        #pragma unroll
        for (int i = 0; i < 16; i++) x[i] = __fmaf_rn(x[i], a, 1e-3f);
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    if (sum == 12345) out[0] = sum;              /* never; but the compiler cannot know */
}

/* Reads n vectors of 16 bytes. */
extern "C" __global__ void peak_read(float *out, const float4 *x, size_t n) {
    float4 sum = {0, 0, 0, 0};
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        float4 v = x[i];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    if (sum.x + sum.y + sum.z + sum.w == 12345) out[0] = sum.x;
}
