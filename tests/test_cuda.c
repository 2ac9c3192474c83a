/* test_cuda.c -- CUDA twins against their references, through the driver API.
 *
 *   LD_LIBRARY_PATH=build/softgpu build/test_cuda build/kernels.fatbin
 *
 * Goal: each NAME_cuda does what NAME_ref says, on shapes with ragged edges: == where the contract
 * says BIT-DEFINED, else within what F32 sums of that length may differ from double.
 * Method: random input in device memory, the kernel, and the reference on the same input.  On a
 * machine without libcuda the tests are skipped, with a line.                                    */
#include "gpu.h"

static void test_cuda_embed_copies_rows(void) {
    for (int round = 0; round < 8; round++) {
        int rows = 1 + (int)draw(40), cols = 1 + (int)draw(300), n = 1 + (int)draw(9);
        int hc = 1 + (int)draw(4);
        size_t n_w = (size_t)rows * (size_t)cols, n_h = (size_t)n * (size_t)hc * (size_t)cols;
        uint16_t *data = malloc(n_w * 2);
        for (size_t i = 0; i < n_w; i++) data[i] = f32_to_bf16(draw_float());
        int32_t tokens[16];
        for (int t = 0; t < n; t++) tokens[t] = (int32_t)draw((uint32_t)rows);
        dsv4_mat w = {DT_BF16, rows, cols, data, NULL}, gpu_w = w;
        float *want = malloc(n_h * 4), *got = malloc(n_h * 4);
        embed_ref(want, &w, tokens, n, hc, NULL);
        CUdeviceptr dw = to_gpu(data, n_w * 2), dt = to_gpu(tokens, (size_t)n * 4);
        CUdeviceptr dh = room(n_h * 4);
        gpu_w.data = (const void *)(uintptr_t)dw;
        launch("embed_cuda", (unsigned)n, 1, 128, ARGS(&dh, &gpu_w, &dt, &hc));
        from_gpu(got, dh, n_h * 4);
        check_same("h", got, want, n_h);
        OK(p_cuMemFree(dw));
        OK(p_cuMemFree(dt));
        free(data), free(want), free(got);
    }
}

static void test_cuda_rmsnorm_is_within_its_sums(void) {
    for (int round = 0; round < 10; round++) {
        int n = 1 + (int)draw(5), d = 1 + (int)draw(2000), weighted = round & 1;
        size_t nd = (size_t)n * (size_t)d;
        float eps = 1e-6f, *x = malloc(nd * 4), *w = malloc((size_t)d * 4);
        float *want = malloc(nd * 4), *got = malloc(nd * 4);
        for (size_t i = 0; i < nd; i++) x[i] = draw_float();
        for (int c = 0; c < d; c++) w[c] = draw_float();
        ops_ref.rmsnorm(want, x, weighted ? w : NULL, n, d, eps, NULL);
        CUdeviceptr dx = to_gpu(x, nd * 4), dw = to_gpu(w, (size_t)d * 4), none = 0;
        launch("rmsnorm_cuda", (unsigned)n, 1, 64 << draw(4),
               ARGS(&dx, &dx, weighted ? &dw : &none, &d, &eps));           /* y is x */
        from_gpu(got, dx, nd * 4);
        OK(p_cuMemFree(dw));
        for (size_t i = 0; i < nd; i++)
            CHECK(fabsf(got[i] - want[i]) <= 4e-6f * fabsf(want[i]), "y[%zu] is %.9g, not %.9g", i,
                  (double)got[i], (double)want[i]);
        free(x), free(w), free(want), free(got);
    }
}

static void test_cuda_activations_are_the_same_bits(void) {
    for (int round = 0; round < 12; round++) {
        int n = 1 + (int)draw(4), d = 1 + (int)draw(700);
        size_t nd = (size_t)n * (size_t)d, blocks = up(d, 128), ns = (size_t)n * blocks;
        float *x = draw_floats(nd), *want = malloc(nd * 4), *got = malloc(nd * 4);
        uint8_t *code = malloc(nd), *scale = malloc(ns), *gcode = malloc(nd), *gscale = malloc(ns);
        CUdeviceptr dx = to_gpu(x, nd * 4), dc = room(nd), ds = room(ns), dy = room(nd * 4);
        ops_ref.act_codes(code, scale, x, n, d, NULL);
        launch("act_codes_cuda", (unsigned)blocks, (unsigned)n, 32, ARGS(&dc, &ds, &dx, &d));
        launch("act_values_cuda", (unsigned)blocks, (unsigned)n, 128, ARGS(&dy, &dc, &ds, &d));
        launch("act_quant_cuda", (unsigned)blocks, (unsigned)n, 32, ARGS(&dx, &dx, &d));
        from_gpu(gcode, dc, nd);
        from_gpu(gscale, ds, ns);
        CHECK(!memcmp(code, gcode, nd) && !memcmp(scale, gscale, ns), "codes or scales differ");
        ops_ref.act_values(want, code, scale, n, d, NULL);
        from_gpu(got, dy, nd * 4);
        check_same("values", got, want, nd);
        ops_ref.act_quant(want, x, n, d, NULL);
        from_gpu(got, dx, nd * 4);
        check_same("rounded", got, want, nd);
        free(x), free(want), free(got), free(code), free(scale), free(gcode), free(gscale);
    }
}

static void test_cuda_hc_post_is_within_its_sums(void) {
    for (int round = 0; round < 8; round++) {
        int n = 1 + (int)draw(4), dim = 1 + (int)draw(600), hc = 1 + (int)draw(MAX_HC);
        dsv4_hc_shape s = {.hc = hc, .dim = dim};
        size_t nh = (size_t)n * (size_t)hc * (size_t)dim, ny = (size_t)n * (size_t)dim;
        size_t np = (size_t)n * (size_t)hc, nc = np * (size_t)hc;
        float *all = malloc((nh + ny + np + nc) * 4), *h = all, *y = h + nh, *post = y + ny;
        float *comb = post + np, *got = malloc(nh * 4);
        for (size_t i = 0; i < nh + ny + np + nc; i++) all[i] = draw_float();
        CUdeviceptr dh = to_gpu(h, nh * 4), dy = to_gpu(y, ny * 4), dp = to_gpu(post, np * 4);
        CUdeviceptr dc = to_gpu(comb, nc * 4);
        ops_ref.hc_post(h, y, post, comb, &s, n, NULL);
        launch("hc_post_cuda", up(dim, 256), (unsigned)n, 256, ARGS(&dh, &dy, &dp, &dc, &hc, &dim));
        from_gpu(got, dh, nh * 4);
        OK(p_cuMemFree(dy));
        OK(p_cuMemFree(dp));
        OK(p_cuMemFree(dc));
        for (size_t i = 0; i < nh; i++)        /* up to nine products of at most 16, each rounded */
            CHECK(fabsf(got[i] - h[i]) <= 9 * 9 * 16 * 0x1p-24f, "h[%zu] is %.9g, not %.9g", i,
                  (double)got[i], (double)h[i]);
        free(all), free(got);
    }
}

static void test_cuda_swiglu_and_add_are_the_same_bits(void) {
    for (int round = 0; round < 8; round++) {
        int n = 1 + (int)draw(4), d = 1 + (int)draw(600), copies = 1 + (int)draw(4);
        size_t nd = (size_t)n * (size_t)d, ny = nd * (size_t)copies;
        float limit = 7, *g = draw_floats(nd), *u = draw_floats(nd), *y = draw_floats(ny);
        float *want = malloc(nd * 4), *got = malloc(ny * 4);
        CUdeviceptr dg = to_gpu(g, nd * 4), du = to_gpu(u, nd * 4), dy = to_gpu(y, ny * 4);
        launch("add_cuda", up(d, 256), (unsigned)n, 256, ARGS(&dy, &dg, &copies, &d));
        launch("swiglu_cuda", up((int)nd, 256), 1, 256, ARGS(&dg, &dg, &du, &nd, &limit));
        ops_ref.swiglu(want, g, u, n, d, limit, NULL);
        ops_ref.add(y, g, n, copies, d, NULL);
        from_gpu(got, dy, ny * 4);
        check_same("y", got, y, ny);
        from_gpu(got, dg, nd * 4);
        check_same("a", got, want, nd);
        OK(p_cuMemFree(du));
        free(g), free(u), free(y), free(want), free(got);
    }
}

int main(int argc, char **argv) {
    if (gpu_open(argc > 1 ? argv[1] : "build/kernels.fatbin")) {
        printf("skip test_cuda.c: no libcuda.so.1 here\n");
        return 0;
    }
    RUN(test_cuda_embed_copies_rows);
    RUN(test_cuda_rmsnorm_is_within_its_sums);
    RUN(test_cuda_activations_are_the_same_bits);
    RUN(test_cuda_hc_post_is_within_its_sums);
    RUN(test_cuda_swiglu_and_add_are_the_same_bits);
    return check_done();
}
