/* gpu_bench.c -- how near each kernel comes to what this GPU can.
 *
 *   build/gpu_bench build/gpu_peak.fatbin [N]
 *
 * First the peaks: bytes a second of reading VRAM, F32 multiply-adds a second.  Then each
 * operation with V4-Flash's widths, for 1 and for N tokens (128): bytes that must move at least
 * and operations that must be done, the time of one call (median of 5 runs of as many calls as
 * take 20 ms), and the larger of the two shares of a peak.  A context of 64K tokens.             */
#include "gpu.h"

enum { DIM = 4096, HC = 4, HEADS = 64, HD = 512, ROPE = 64, Q_LORA = 1024, GROUPS = 8, INTER = 2048,
       I_HEADS = 64, I_DIM = 128, TOPK = 512, EXPERTS = 256, WINDOW = 128, CTX = 65536,
       VOCAB = 129280, RUNS = 5 };

static cuda *gpu;
static dsv4_exec *ex;
static double peak_bytes, peak_flops;

static void stop(const char *what) {
    printf("gpu_bench: %s\n", what);
    exit(1);
}

/* Memory with n random floats within +-1, or bytes that are no NaN as codes or scales. */
static void *take(size_t n, bool floats) {
    dsv4_err err;
    size_t bytes = floats ? 4 * n : n, piece = 1 << 20;
    void *p = cuda_alloc(gpu, bytes, "the bench", &err);
    if (!p) stop(err.msg);
    uint8_t *host = malloc(piece);
    for (size_t i = 0; i < piece; i += 4) {
        float x = draw_float() / 4;
        uint32_t codes = (draw(1 << 16) << 16 | draw(1 << 16)) & 0x77777777;
        memcpy(host + i, floats ? (void *)&x : (void *)&codes, 4);
    }
    for (size_t at = 0; at < bytes; at += piece)
        ops_cuda.copy((uint8_t *)p + at, host, bytes - at < piece ? bytes - at : piece, ex);
    if (ops_cuda.sync(ex, &err)) stop(err.msg);
    free(host);
    return p;
}

typedef void (*call_fn)(void *arg, int n);

static double seconds(call_fn call, void *arg, int n, int times) {
    dsv4_err err;
    double t = now_s();
    for (int i = 0; i < times; i++) call(arg, n);
    if (ops_cuda.sync(ex, &err)) stop(err.msg);
    p_cuCtxSynchronize();
    return (now_s() - t) / times;
}

static int by_value(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* Median seconds of a call. */
static double timed(call_fn call, void *arg, int n) {
    double t[RUNS], once = seconds(call, arg, n, 2);
    once = seconds(call, arg, n, 1);
    int times = once < 0.02 ? (int)(0.02 / once) + 1 : 1;
    for (int i = 0; i < RUNS; i++) t[i] = seconds(call, arg, n, times);
    qsort(t, RUNS, sizeof *t, by_value);
    return t[RUNS / 2];
}

static void show(const char *name, call_fn call, void *arg, int n, double bytes, double flops) {
    double s = timed(call, arg, n), b = bytes / s, f = flops / s;
    double share_b = b / peak_bytes, share_f = f / peak_flops;
    printf("%-22s %5d %10.3f %10.1f %10.3f %9.1f %9.2f  %5.1f%% of %s\n", name, n, bytes / 1e6,
           flops / 1e6, s * 1e6, b / 1e9, f / 1e12, 100 * (share_b > share_f ? share_b : share_f),
           share_b > share_f ? "bytes" : "F32");
    fflush(stdout);
}

/* What the operations work on, for up to N tokens. */
static struct {
    float *h, *x, *y, *q, *o, *post, *comb, *freq, *scores, *logits, *weights, *sink, *kv, *ape;
    uint8_t *code, *scale, *rows, *keys, *irows;
    int32_t *tokens, *idx, *count, *ids;
    dsv4_mat embed, wq_b, wo_a, comp, head, gate;
    dsv4_ffn expert;
    dsv4_hc hc;
    dsv4_hc_shape shape;
    void *scratch;
} b;

static dsv4_mat matrix(dsv4_dtype t, int rows, int cols) {
    size_t cells = (size_t)rows * (size_t)cols;
    dsv4_mat m = {.dtype = t, .rows = rows, .cols = cols};
    m.data = take(t == DT_I8 ? cells / 2 : t == DT_BF16 ? 2 * cells : cells, false);
    if (t != DT_BF16) m.scale = take(t == DT_I8 ? cells / 32 : cells / 16384 + 1, false);
    return m;
}

static void indices(int32_t *to, size_t n, uint32_t step, uint32_t below) {
    int32_t *host = malloc(n * 4);
    dsv4_err err;
    for (size_t i = 0; i < n; i++) host[i] = (int32_t)((uint32_t)i * step % below);
    ops_cuda.copy(to, host, n * 4, ex);
    if (ops_cuda.sync(ex, &err)) stop(err.msg);
    free(host);
}

static void setup(size_t n) {
    size_t entries = CTX / 4;
    b.h = take(n * HC * DIM, true), b.x = take(n * HEADS * HD, true), b.y = take(n * VOCAB, true);
    b.q = take(n * HEADS * HD, true), b.o = take(n * HEADS * HD, true);
    b.post = take(n * HC, true), b.comb = take(n * HC * HC, true), b.freq = take(ROPE, true);
    b.scores = take(n * (entries + n), true), b.logits = take(n * EXPERTS, true);
    b.weights = take(n * 8, true), b.sink = take(HEADS, true), b.ape = take(4 * 2 * HD, true);
    b.kv = take((n + 8) * 2 * HD, true), b.code = take(n * DIM, false);
    b.scale = take(n * DIM / 128, false), b.rows = take((entries + 2 * n + WINDOW) * 584, false);
    b.keys = take((entries + n) * 68, false), b.irows = take(n * I_HEADS * 68, false);
    b.tokens = take(4 * n, false), b.idx = take(4 * n * TOPK, false), b.count = take(4 * n, false);
    b.ids = take(4 * n * 8, false);
    indices(b.tokens, n, 1, (uint32_t)n);
    for (size_t t = 0; t < n; t++) indices(b.idx + t * TOPK, TOPK, 31, (uint32_t)entries);
    int32_t all = TOPK;
    for (size_t t = 0; t < n; t++) ops_cuda.copy(b.count + t, &all, 4, ex);
    b.embed = matrix(DT_BF16, 1024, DIM), b.wq_b = matrix(DT_F8_E4M3, HEADS * HD, Q_LORA);
    b.wo_a = matrix(DT_F8_E4M3, GROUPS * 1024, HEADS * HD / GROUPS);
    b.comp = matrix(DT_BF16, 2 * HD, DIM), b.head = matrix(DT_BF16, VOCAB, DIM);
    b.gate = matrix(DT_BF16, EXPERTS, DIM);
    b.expert = (dsv4_ffn){matrix(DT_I8, INTER, DIM), matrix(DT_I8, DIM, INTER),
                          matrix(DT_I8, INTER, DIM)};
    b.hc = (dsv4_hc){take((2 + HC) * HC * HC * DIM, true), take(4, true), take(64, true)};
    b.shape = (dsv4_hc_shape){HC, DIM, 20, 1e-6f, 1e-6f};
    b.scratch = take(expert_scratch_bytes(DIM, INTER), false);
}

#define CALL(name, ...)                                                                          \
    static void call_##name(void *arg, int n) { (void)arg; ops_cuda.__VA_ARGS__; }
CALL(embed, embed(b.h, &b.embed, b.tokens, n, HC, ex))
CALL(rmsnorm, rmsnorm(b.y, b.x, NULL, n, DIM, 1e-6f, ex))
CALL(act_quant, act_quant(b.y, b.x, n, DIM, ex))
CALL(act_codes, act_codes(b.code, b.scale, b.x, n, DIM, ex))
CALL(act_values, act_values(b.y, b.code, b.scale, n, DIM, ex))
CALL(wq_b, linear(b.q, &b.wq_b, b.x, n, 1, ex))
CALL(wo_a, linear(b.y, &b.wo_a, b.o, n, GROUPS, ex))
CALL(comp, linear(b.y, &b.comp, b.x, n, 1, ex))
CALL(gate, linear(b.logits, &b.gate, b.x, n, 1, ex))
CALL(head, linear(b.y, &b.head, b.x, n, 1, ex))
CALL(rope, rope(b.q, b.freq, n, HEADS, HD, ROPE, CTX, 1, false, ex))
CALL(kv_round, kv_round(b.rows, b.x, n, HD, ROPE, true, ex))
CALL(index_round, index_round(b.irows, b.x, n * I_HEADS, I_DIM, true, ex))
CALL(topk, topk(b.idx, b.count, b.scores, CTX / 4 + (size_t)n, n, TOPK, 4, CTX, ex))
CALL(hc_pre, hc_pre(b.y, b.post, b.comb, b.h, &b.hc, &b.shape, n, ex))
CALL(hc_post, hc_post(b.h, b.x, b.post, b.comb, &b.shape, n, ex))
CALL(swiglu, swiglu(b.y, b.x, b.q, n, INTER, 10, ex))
CALL(add, add(b.y, b.x, n, 1, DIM, ex))
CALL(argmax, argmax(b.ids, b.y, n, VOCAB, ex))

static void call_compress(void *arg, int n) {
    dsv4_compress in = {b.kv, b.kv, b.kv, b.kv, b.ape, 4, HD, CTX - 4};
    (void)arg;
    ops_cuda.compress(b.y, &in, CTX / 4 - 1, (n + 3) / 4, ex);
}
static void call_index_scores(void *arg, int n) {
    dsv4_index in = {b.irows, b.x, 0.01f, b.keys, I_HEADS, I_DIM, 4, true, CTX,
                     CTX / 4 + (size_t)n};
    (void)arg;
    ops_cuda.index_scores(b.scores, &in, n, ex);
}
static void call_attend(void *arg, int n) {
    dsv4_attend in = {b.q, b.rows, b.rows, b.rows, b.idx, b.count, b.sink, HEADS, HD, ROPE, WINDOW,
                      4, TOPK, true, CTX};
    (void)arg;
    ops_cuda.attend(b.o, &in, n, ex);
}
static void call_route(void *arg, int n) {
    dsv4_route in = {b.logits, b.sink, NULL, b.tokens, EXPERTS, 6, 1.5f};
    (void)arg;
    in.bias = b.logits;
    ops_cuda.route(b.ids, b.weights, &in, n, ex);
}
static void call_expert(void *arg, int n) {
    dsv4_acts x = {b.code, b.scale, NULL};
    (void)arg;
    for (int i = 0; i < n; i += EXPERT_ROWS)
        ops_cuda.expert_ffn(b.y, &b.expert, &x, b.tokens + i, b.weights,
                            n - i < EXPERT_ROWS ? n - i : EXPERT_ROWS, 10, b.scratch, ex);
}

static void call_fma(void *arg, int n) {
    CUdeviceptr out = (CUdeviceptr)arg;
    CUfunction f = NULL;
    OK(p_cuModuleGetFunction(&f, gpu_module, "peak_fma"));
    OK(p_cuLaunchKernel(f, 4096, 1, 1, 256, 1, 1, 0, NULL, ARGS(&out, &n), NULL));
}
static void call_read(void *arg, int n) {
    CUdeviceptr x = (CUdeviceptr)arg;
    size_t vectors = (size_t)n << 16;
    CUfunction f = NULL;
    OK(p_cuModuleGetFunction(&f, gpu_module, "peak_read"));
    OK(p_cuLaunchKernel(f, 8192, 1, 1, 256, 1, 1, 0, NULL, ARGS(&x, &x, &vectors), NULL));
}

/* Bytes are what must move once; n tokens. */
static void table(int tokens) {
    double n = tokens, row = 584, entries = CTX / 4.0;
#define SHOW(name, bytes, flops) show(#name, call_##name, NULL, tokens, bytes, flops)
    SHOW(embed, n * DIM * (2 + 4 * HC), 0);
    SHOW(rmsnorm, n * DIM * 8, 0);
    SHOW(act_quant, n * DIM * 8, 0);
    SHOW(act_codes, n * DIM * 5, 0);
    SHOW(act_values, n * DIM * 5, 0);
    SHOW(wq_b, 1.0 * HEADS * HD * Q_LORA, 2 * n * HEADS * HD * Q_LORA);
    SHOW(wo_a, 1.0 * HEADS * HD * 1024, 2 * n * HEADS * HD * 1024);
    SHOW(comp, 2.0 * 2 * HD * DIM, 2 * n * 2 * HD * DIM);
    SHOW(gate, 2.0 * EXPERTS * DIM, 2 * n * EXPERTS * DIM);
    SHOW(head, 2.0 * VOCAB * DIM, 2 * n * VOCAB * DIM);
    SHOW(rope, n * HEADS * ROPE * 8, 0);
    SHOW(kv_round, n * (HD * 4 + row), 0);
    SHOW(index_round, n * I_HEADS * (I_DIM * 4 + 68), 0);
    SHOW(compress, n / 4 * 8 * 2 * HD * 4, 0);
    SHOW(index_scores, entries * (68 + 4 * n), 2 * n * I_HEADS * I_DIM * entries);
    SHOW(topk, n * entries * 4, 0);
    SHOW(attend, n * (TOPK + WINDOW) * row, 4 * n * HEADS * HD * (TOPK + WINDOW));
    SHOW(hc_pre, n * HC * DIM * 4 + 4.0 * 24 * HC * DIM, 2 * n * 25 * HC * DIM);
    SHOW(hc_post, n * HC * DIM * 8, 0);
    SHOW(route, n * EXPERTS * 4, 0);
    SHOW(swiglu, n * INTER * 12, 0);
    SHOW(expert, 3.0 * DIM * INTER * 17 / 32, 2 * n * 3 * DIM * INTER);
    SHOW(add, n * DIM * 12, 0);
    SHOW(argmax, n * VOCAB * 4, 0);
}

int main(int argc, char **argv) {
    enum { ROUNDS = 4096, MIB = 1024 };
    dsv4_err err;
    int n = argc > 2 ? atoi(argv[2]) : 128;
    if (argc < 2 || n < 1 || gpu_open(argv[1])) stop("no GPU, or no fatbin of peaks named");
    if (cuda_open(&gpu, 0, &err)) stop(err.msg);
    const cuda_info *g = cuda_get_info(gpu);
    ex = cuda_exec(gpu);
    OK(p_cuCtxSetCurrent(gpu_context));
    void *big = take((size_t)MIB << 20, false);
    peak_bytes = (double)MIB * 1048576 / timed(call_read, big, MIB);
    peak_flops = 2.0 * 16 * ROUNDS * 4096 * 256 / timed(call_fma, big, ROUNDS);
    cuda_free(gpu, big);
    printf("%s (%d.%d): reads %.0f GB/s, F32 %.1f Tflop/s\n", g->name, g->sm / 10, g->sm % 10,
           peak_bytes / 1e9, peak_flops / 1e12);
    printf("%-22s %5s %10s %10s %10s %9s %9s\n", "operation", "n", "MB", "Mflop", "us", "GB/s",
           "Tflop/s");
    setup((size_t)n);
    table(1);
    if (n > 1) table(n);
    cuda_close(gpu);
    return 0;
}
