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

static float *finite_floats(size_t n) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = draw_float();
    return x;
}

static void drop(const CUdeviceptr *d, size_t n) {
    for (size_t i = 0; i < n; i++) OK(p_cuMemFree(d[i]));
}
#define DROP(...)                                                                                \
    drop((CUdeviceptr[]){__VA_ARGS__}, sizeof(CUdeviceptr[]){__VA_ARGS__} / sizeof(CUdeviceptr))

static void check_bytes(const char *what, const uint8_t *got, const uint8_t *want, size_t n) {
    for (size_t i = 0; i < n; i++)
        CHECK(got[i] == want[i], "byte %zu of %s is %d, not %d", i, what, got[i], want[i]);
}

/* Random weights, and the same without their signs. */
static void draw_weights(uint8_t *data, uint8_t *plus, dsv4_dtype kind, size_t bytes) {
    size_t size = kind == DT_F32 ? 4 : kind == DT_F16 || kind == DT_BF16 ? 2 : 1;
    for (size_t i = 0; i < bytes; i += size) {
        float x = draw_float();
        uint16_t bf16 = f32_to_bf16(x), f16 = (uint16_t)(draw(0x4000) | draw(2) << 15);
        uint8_t byte = (uint8_t)(draw(127) | draw(2) << 7);  /* no NaN */
        memcpy(data + i, kind == DT_F32 ? (void *)&x : kind == DT_F16 ? (void *)&f16
                         : kind == DT_BF16 ? (void *)&bf16 : (void *)&byte, size);
        memcpy(plus + i, data + i, size);
        plus[i + size - 1] &= kind == DT_I8 ? 0x77 : 0x7f;
    }
}

static void test_cuda_linear_is_within_its_sums(void) {
    static const dsv4_dtype kinds[] = {DT_F32, DT_F16, DT_BF16, DT_F8_E4M3, DT_I8};
    static const size_t nibbles[] = {8, 4, 4, 2, 1};
    for (int round = 0; round < 15; round++) {
        dsv4_dtype kind = kinds[round % 5];
        int groups = 1 + (int)draw(3), rows = groups * (1 + (int)draw(120));
        int cols = 1 + (int)draw(400), n = round < 5 ? 1 : 1 + (int)draw(20);
        if (kind == DT_I8) cols = (cols + 31) / 32 * 32;
        size_t cells = (size_t)rows * (size_t)cols, bytes = cells * nibbles[round % 5] / 2;
        size_t token = (size_t)groups * (size_t)cols, nx = (size_t)n * token;
        size_t ny = (size_t)n * (size_t)rows, last = (size_t)(n - 1);
        size_t ns = kind == DT_I8 ? cells / 32 : (size_t)up(rows, 128) * up(cols, 128);
        uint8_t *data = malloc(bytes), *plus = malloc(bytes), *scale = malloc(ns);
        float *x = finite_floats(nx), *want = malloc(ny * 4), *sum = malloc(ny * 4);
        float *got = malloc(ny * 4), *alone = malloc((size_t)rows * 4);
        draw_weights(data, plus, kind, bytes);
        for (size_t i = 0; i < ns; i++) scale[i] = (uint8_t)(120 + draw(14));
        dsv4_mat w = {kind, rows, cols, data, scale}, abs_w = w, gpu_w = w;
        CUdeviceptr dw = to_gpu(data, bytes), ds = to_gpu(scale, ns), dx = to_gpu(x, nx * 4);
        CUdeviceptr dy = room(ny * 4), d1 = room((size_t)rows * 4), dx1 = dx + last * token * 4;
        gpu_w.data = (void *)(uintptr_t)dw;
        gpu_w.scale = (void *)(uintptr_t)ds;
        launch("linear_tile_cuda", up(rows, 16), up(n, 8), 128,
               ARGS(&dy, &gpu_w, &dx, &n, &groups));
        launch("linear_cuda", up(rows, 4), 1, 128, ARGS(&d1, &gpu_w, &dx1, &groups));
        from_gpu(got, dy, ny * 4);
        from_gpu(alone, d1, (size_t)rows * 4);
        DROP(dw, ds, dx);
        check_same("y of the last token alone", alone, got + last * (size_t)rows, (size_t)rows);
        ops_ref.linear(want, &w, x, n, groups, NULL);
        for (size_t i = 0; i < nx; i++) x[i] = fabsf(x[i]);
        abs_w.data = plus;
        ops_ref.linear(sum, &abs_w, x, n, groups, NULL);
        for (size_t i = 0; i < ny; i++)        /* roundings: a lane's, five of the tree, want's */
            CHECK(fabsf(got[i] - want[i]) <= (float)(up(cols, 32) + 6) * 0x1p-24f * sum[i],
                  "format %d: y[%zu] is %.9g, not %.9g", kind, i, (double)got[i], (double)want[i]);
        free(data), free(plus), free(scale), free(x), free(want), free(sum), free(got);
        free(alone);
    }
}

static void test_cuda_rope_turns_the_last_dims(void) {
    for (int round = 0; round < 8; round++) {
        int n = round < 2 ? 1 : 1 + (int)draw(4), heads = 1 + (int)draw(4);
        int rope_dim = 2 * (1 + (int)draw(50)), head_dim = rope_dim + (int)draw(40);
        int64_t pos0 = draw(1 << 20), step = round & 2 ? 4 : 1;
        bool inverse = round & 1;
        size_t nx = (size_t)n * (size_t)heads * (size_t)head_dim;
        float *x = finite_floats(nx), *want = malloc(nx * 4), *got = malloc(nx * 4), freq[64];
        rope_inv_freq(freq, rope_dim, 10000, 16, 32, 1, 4096);
        memcpy(want, x, nx * 4);
        ops_ref.rope(want, freq, n, heads, head_dim, rope_dim, pos0, step, inverse, NULL);
        CUdeviceptr dx = to_gpu(x, nx * 4), df = to_gpu(freq, (size_t)rope_dim * 2);
        launch("rope_cuda", (unsigned)heads, (unsigned)n, 32,
               ARGS(&dx, &df, &head_dim, &rope_dim, &pos0, &step, &inverse));
        from_gpu(got, dx, nx * 4);
        DROP(df);
        for (size_t i = 0; i < nx; i++) {      /* cos, sin and the result, off by one ulp each */
            bool turned = (int)(i % (size_t)head_dim) >= head_dim - rope_dim;
            CHECK(fabsf(got[i] - want[i]) <= (turned ? 8 * 3 * 0x1p-24f : 0),
                  "x[%zu] is %.9g, not %.9g", i, (double)got[i], (double)want[i]);
        }
        free(x), free(want), free(got);
    }
}

static void test_cuda_kv_rows_are_the_same_bits(void) {
    for (int round = 0; round < 16; round++) {
        int n = round < 2 ? 1 : 1 + (int)draw(4), rope_dim = 2 * (int)draw(40);
        int head_dim = rope_dim + (int)draw(300) + (rope_dim == 0);
        bool packed = round & 1;
        size_t nx = (size_t)n * (size_t)head_dim, bytes = kv_row_bytes(head_dim, rope_dim, packed);
        uint8_t *want = malloc((size_t)n * bytes), *got = malloc((size_t)n * bytes);
        float *x = draw_floats(nx);
        kv_round_ref(want, x, n, head_dim, rope_dim, packed, NULL);
        CUdeviceptr dx = to_gpu(x, nx * 4), dr = room((size_t)n * bytes);
        launch("kv_round_cuda", up(head_dim - rope_dim, 64) + 1, (unsigned)n, 32,
               ARGS(&dr, &dx, &head_dim, &rope_dim, &packed, &bytes));
        from_gpu(got, dr, (size_t)n * bytes);
        DROP(dx);
        check_bytes("rows", got, want, (size_t)n * bytes);
        free(want), free(got), free(x);
    }
}

static void test_cuda_index_rows_are_the_same_bits(void) {
    for (int round = 0; round < 22; round++) {
        int n = round < 2 ? 1 : 1 + (int)draw(4), d = 1 << (round / 2);  /* to MAX_HEAD_DIM */
        bool packed = round & 1;
        size_t nx = (size_t)n * (size_t)d, bytes = index_row_bytes(d, packed);
        uint8_t *want = malloc((size_t)n * bytes), *got = malloc((size_t)n * bytes);
        float *x = finite_floats(nx), small[] = {1, 1, 1e-3f, 1e-39f, 0};
        for (size_t i = 0; i < nx; i++) x[i] *= small[(i / (size_t)d + (size_t)round / 5) % 5];
        CUdeviceptr dx = to_gpu(x, nx * 4), dr = room((size_t)n * bytes);
        launch("index_round_cuda", (unsigned)n, 1, d < 32 ? 32 : (unsigned)d,
               ARGS(&dr, &dx, &d, &packed, &bytes));
        from_gpu(got, dr, (size_t)n * bytes);
        DROP(dx);
        ops_ref.index_round(want, x, n, d, packed, NULL);
        check_bytes("rows", got, want, (size_t)n * bytes);
        free(want), free(got), free(x);
    }
}

/* kv and score of every token lie in one array; those before t0 that a ring holds are copied. */
static void test_cuda_compress_weighs_its_candidates(void) {
    for (int round = 0; round < 12; round++) {
        int ratio = (int[]){4, 128, 3}[round % 3], d = 1 + (int)draw(200), n = 1 + (int)draw(3);
        int coff = ratio == 4 ? 2 : 1, rows = coff * ratio;
        int64_t g0 = round < 3 ? 0 : draw(4);
        size_t width = (size_t)(coff * d), end = (size_t)((g0 + n) * ratio);
        size_t t0 = (size_t)(g0 * ratio + draw((uint32_t)ratio + 1)), ring = (size_t)rows * width;
        float *all = finite_floats(2 * end * width), *ape = finite_floats((size_t)ratio * width);
        float *rings = malloc(2 * ring * 4), *score = all + end * width;
        for (size_t i = 0; i < 2 * ring; i++) rings[i] = NAN;  /* where no token has been */
        for (size_t j = t0 < (size_t)rows ? 0 : t0 - (size_t)rows; j < t0; j++) {
            float *to = rings + j % (size_t)rows * width;
            memcpy(to, all + j * width, width * 4);
            memcpy(to + ring, score + j * width, width * 4);
        }
        dsv4_compress in = {all + t0 * width, score + t0 * width, rings, rings + ring, ape, ratio,
                            d, (int64_t)t0}, gpu_in = in;
        size_t ne = (size_t)n * (size_t)d;
        float *want = malloc(ne * 4), *got = malloc(ne * 4);
        CUdeviceptr da = to_gpu(all, 2 * end * width * 4), dr = to_gpu(rings, 2 * ring * 4);
        CUdeviceptr dp = to_gpu(ape, (size_t)ratio * width * 4), de = room(ne * 4);
        gpu_in.kv = (float *)(uintptr_t)da + t0 * width;
        gpu_in.score = gpu_in.kv + end * width;
        gpu_in.ring_kv = (float *)(uintptr_t)dr;
        gpu_in.ring_score = gpu_in.ring_kv + ring;
        gpu_in.ape = (float *)(uintptr_t)dp;
        launch("compress_cuda", up(d, 128), (unsigned)n, 128, ARGS(&de, &gpu_in, &g0));
        from_gpu(got, de, ne * 4);
        DROP(da, dr, dp);
        ops_ref.compress(want, &in, g0, n, NULL);
        for (size_t i = 0; i < ne; i++)        /* doubles that may round to neighbours */
            CHECK(fabsf(got[i] - want[i]) <= 0x1p-23f * fabsf(want[i]) + 1e-12f,
                  "entries[%zu] is %.9g, not %.9g", i, (double)got[i], (double)want[i]);
        free(all), free(ape), free(rings), free(want), free(got);
    }
}

static void check_near(const char *what, const float *got, const float *want, size_t n, float by) {
    for (size_t i = 0; i < n; i++)
        CHECK(fabsf(got[i] - want[i]) <= by, "%s[%zu] is %.9g, not %.9g", what, i, (double)got[i],
              (double)want[i]);
}

/* Rows of fn have means, as have the streams, so that mixes are up to 5; epsilons are large, so
 * that each of them shows.  head: fn has hc rows, and there is no post and comb. */
static void test_cuda_hc_pre_and_hc_head_are_within_their_sums(void) {
    for (int round = 0; round < 12; round++) {
        bool head = round % 3 == 2;
        int n = round < 3 ? 1 : 1 + (int)draw(3), hc = 1 + (int)draw(MAX_HC);
        int dim = 1 + (int)draw(300), len = hc * dim, rows = head ? hc : (2 + hc) * hc;
        dsv4_hc_shape s = {hc, dim, 1 + (int)draw(20), 0.1f, 0.01f};
        size_t nh = (size_t)n * (size_t)len, nx = (size_t)n * (size_t)dim;
        size_t nf = (size_t)rows * (size_t)len, np = (size_t)(n * hc), nc = np * (size_t)hc;
        unsigned threads = 128u << draw(4);
        float *h = finite_floats(nh), *fn = finite_floats(nf), scale[] = {0.9f, -0.8f, 1};
        float *base = finite_floats((size_t)rows), *want = malloc((nx + np + nc) * 4);
        float *got = malloc((nx + np + nc) * 4), mean = 0;
        for (size_t i = 0; i < nh; i++) h[i] += 2;
        for (size_t i = 0; i < nf; i++) {
            if (i % (size_t)len == 0) mean = draw_float();
            fn[i] = (mean + fn[i] / 4) / (float)len;
        }
        for (int r = 2 * hc; round == 1 && r < rows; r++) base[r] += 100; /* exp() overflows */
        dsv4_hc w = {fn, scale, base}, gpu_w;
        CUdeviceptr dh = to_gpu(h, nh * 4), df = to_gpu(fn, nf * 4);
        CUdeviceptr ds = to_gpu(scale, head ? 4 : 12), db = to_gpu(base, (size_t)rows * 4);
        CUdeviceptr dx = room(nx * 4), dp = room(np * 4), dc = room(nc * 4), none = 0;
        gpu_w = (dsv4_hc){(void *)(uintptr_t)df, (void *)(uintptr_t)ds, (void *)(uintptr_t)db};
        launch("hc_pre_cuda", (unsigned)n, 1, threads,
               ARGS(&dx, head ? &none : &dp, head ? &none : &dc, &dh, &gpu_w, &s));
        from_gpu(got, dx, nx * 4);
        /* A mix is off by its roundings: a lane's, the tree's, some that follow. */
        float e = (float)(up(len, 32) + 5 + 40) * 5 * 0x1p-24f;
        if (head) ops_ref.hc_pre(want, NULL, NULL, h, &w, &s, n, NULL);
        else ops_ref.hc_pre(want, want + nx, want + nx + np, h, &w, &s, n, NULL);
        check_near("x", got, want, nx, 2 * e * (float)hc); /* sigmoids e / 4, streams up to 6 */
        if (!head) {
            from_gpu(got + nx, dp, np * 4);
            from_gpu(got + nx + np, dc, nc * 4);
            check_near("post", got + nx, want + nx, np, e);
            check_near("comb", got + nx + np, want + nx + np, nc, 4 * e);
        }
        DROP(dh, df, ds, db);
        if (head) DROP(dp, dc);
        free(h), free(fn), free(base), free(want), free(got);
    }
}

/* Logits are of few values, so that ties abound; one round's are nearly all NaN. */
static void test_cuda_route_takes_the_best(void) {
    for (int round = 0; round < 16; round++) {
        bool hash = round % 4 == 3, nan = round == 2;
        int n = round < 4 ? 1 : 1 + (int)draw(4), experts = round == 1 ? 1500 : 1 + (int)draw(400);
        int topk = 1 + (int)draw(experts < MAX_TOPK ? (uint32_t)experts : MAX_TOPK);
        if (nan) topk = experts = MAX_TOPK;
        size_t nl = (size_t)n * (size_t)experts, nk = (size_t)n * (size_t)topk;
        float *logits = finite_floats(nl), *bias = finite_floats((size_t)experts);
        int32_t table[10 * MAX_TOPK], tokens[4], ids[4 * MAX_TOPK], got_ids[4 * MAX_TOPK];
        float want[4 * MAX_TOPK], got[4 * MAX_TOPK];
        for (size_t i = 0; i < nl; i++) logits[i] = nan && i % 7 != 3 ? NAN : roundf(logits[i] * 4);
        for (int e = 0; e < experts; e++) bias[e] = roundf(bias[e]) / 4;
        for (int i = 0; i < 10 * topk; i++) table[i] = (int32_t)draw((uint32_t)experts);
        for (int t = 0; t < n; t++) tokens[t] = (int32_t)draw(10);
        dsv4_route in = {logits, hash ? NULL : bias, hash ? table : NULL, tokens, experts, topk,
                         2.5f}, gpu_in = in;
        CUdeviceptr dl = to_gpu(logits, nl * 4), db = to_gpu(bias, (size_t)experts * 4);
        CUdeviceptr dt = to_gpu(table, (size_t)topk * 40), dn = to_gpu(tokens, (size_t)n * 4);
        CUdeviceptr di = room(nk * 4), dw = room(nk * 4);
        gpu_in.logits = (void *)(uintptr_t)dl;
        gpu_in.bias = hash ? NULL : (void *)(uintptr_t)db;
        gpu_in.tid2eid = hash ? (void *)(uintptr_t)dt : NULL;
        gpu_in.tokens = (void *)(uintptr_t)dn;
        launch("route_cuda", (unsigned)n, 1, 64u << draw(4), ARGS(&di, &dw, &gpu_in));
        from_gpu(got_ids, di, nk * 4);
        from_gpu(got, dw, nk * 4);
        DROP(dl, db, dt, dn);
        ops_ref.route(ids, want, &in, n, NULL);
        for (size_t i = 0; i < nk; i++) {
            int same = 0;                      /* ids of the token that are this one */
            for (size_t j = i - i % (size_t)topk, k = 0; k < (size_t)topk; j++, k++)
                same += got_ids[j] == got_ids[i];
            CHECK(got_ids[i] >= 0 && got_ids[i] < experts, "id %d of %d", got_ids[i], experts);
            CHECK(hash || same == 1, "expert %d was taken %d times", got_ids[i], same);
            if (nan) continue;
            CHECK(got_ids[i] == ids[i], "ids[%zu] is %d, not %d", i, got_ids[i], ids[i]);
            CHECK(fabsf(got[i] - want[i]) <= 0x1p-22f * want[i], "weights[%zu] is %.9g, not %.9g",
                  i, (double)got[i], (double)want[i]);
        }
        free(logits), free(bias);
    }
}

/* Few values, so that ties abound. */
static void test_cuda_argmax_is_the_first_of_equals(void) {
    for (int round = 0; round < 12; round++) {
        int n = 1 + (int)draw(3), d = 1 + (int)draw(round % 2 ? 5000 : 100);
        float *x = malloc((size_t)n * (size_t)d * 4);
        int32_t want[3], got[3];
        for (int i = 0; i < n * d; i++) x[i] = (float)draw(round < 6 ? 3 : 1 << 20) - 2;
        argmax_ref(want, x, n, d, NULL);
        CUdeviceptr dx = to_gpu(x, (size_t)n * (size_t)d * 4), di = room((size_t)n * 4);
        launch("argmax_cuda", (unsigned)n, 1, 64u << draw(5), ARGS(&di, &dx, &d));
        from_gpu(got, di, (size_t)n * 4);
        DROP(dx);
        for (int t = 0; t < n; t++) CHECK(got[t] == want[t], "%d, not %d", got[t], want[t]);
        free(x);
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
    RUN(test_cuda_linear_is_within_its_sums);
    RUN(test_cuda_rope_turns_the_last_dims);
    RUN(test_cuda_kv_rows_are_the_same_bits);
    RUN(test_cuda_index_rows_are_the_same_bits);
    RUN(test_cuda_compress_weighs_its_candidates);
    RUN(test_cuda_hc_pre_and_hc_head_are_within_their_sums);
    RUN(test_cuda_route_takes_the_best);
    RUN(test_cuda_argmax_is_the_first_of_equals);
    return check_done();
}
