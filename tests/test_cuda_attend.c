/* test_cuda_attend.c -- CUDA twins of experts, the indexer, its choice, and attention.
 *
 *   LD_LIBRARY_PATH=build/softgpu build/test_cuda_attend build/kernels.fatbin
 *
 * Goal and method as in test_cuda.c.  What must be left alone is filled and compared, too.       */
#include "gpu.h"

static void gpu_free(const CUdeviceptr *d, int n) {
    for (int i = 0; i < n; i++) OK(p_cuMemFree(d[i]));
}

static const void *on_gpu(CUdeviceptr d) { return (const void *)(uintptr_t)d; }

/* n bytes: codes of any kind below 255, or scales around `middle`; the caller frees them. */
static uint8_t *draw_bytes(size_t n, int middle) {
    uint8_t *x = malloc(n);
    for (size_t i = 0; i < n; i++)
        x[i] = (uint8_t)(middle == 0 ? draw(256) : draw(100) ? (uint32_t)middle + draw(9) - 4
                                                             : draw(255));
    return x;
}

/* The weights of a matrix at an odd address, and its scales. */
static dsv4_mat mat_to_gpu(const dsv4_mat *w, CUdeviceptr *d) {
    size_t n = (size_t)w->rows * (size_t)w->cols / 2;
    uint8_t *odd = malloc(n + 1);
    memcpy(odd + 1, w->data, n);
    odd[0] = 0;
    d[0] = to_gpu(odd, n + 1);
    d[1] = to_gpu(w->scale, n / 16);
    free(odd);
    return (dsv4_mat){w->dtype, w->rows, w->cols, on_gpu(d[0] + 1), on_gpu(d[1])};
}

static dsv4_mat draw_fp4(int rows, int cols) {
    size_t n = (size_t)rows * (size_t)cols / 2;
    return (dsv4_mat){DT_I8, rows, cols, draw_bytes(n, 0), draw_bytes(n / 16, 120)};
}

/* The twin's three launches; y and x are rows of 80 tokens. */
static void expert_on_gpu(float *y, const dsv4_ffn *w, const dsv4_acts *x, const int32_t *rows,
                          const float *weight, int m, float limit) {
    int dim = w->w1.cols, inter = w->w1.rows, on = x->code != NULL;
    size_t all = 80 * (size_t)dim, ma = (size_t)m * (size_t)inter;
    unsigned tiles = up(m, 8);
    CUdeviceptr d[13];
    dsv4_ffn gw = {mat_to_gpu(&w->w1, d), mat_to_gpu(&w->w2, d + 2), mat_to_gpu(&w->w3, d + 4)};
    d[6] = on ? to_gpu(x->code, all) : to_gpu(x->f32, all * 4);
    d[7] = on ? to_gpu(x->scale, 80 * up(dim, 128)) : room(4);
    d[8] = to_gpu(rows, (size_t)m * 4);
    d[9] = to_gpu(weight, (size_t)m * 4);
    d[10] = room(ma * 4);
    d[11] = room(ma);
    d[12] = room((size_t)m * up(inter, 128));
    CUdeviceptr dy = to_gpu(y, all * 4);
    dsv4_acts gx = {0}, ga = {0};
    if (on) {
        gx.code = on_gpu(d[6]), gx.scale = on_gpu(d[7]);
        ga.code = on_gpu(d[11]), ga.scale = on_gpu(d[12]);
    } else {
        gx.f32 = on_gpu(d[6]);
        ga.f32 = on_gpu(d[10]);
    }
    launch("expert_up_cuda", up(inter, 8), tiles, 256,
           ARGS(&d[10], &gw, &gx, &d[8], &d[9], &m, &limit));
    if (on)
        launch("act_codes_cuda", up(inter, 128), (unsigned)m, 32,
               ARGS(&d[11], &d[12], &d[10], &inter));
    launch("expert_down_cuda", up(dim, 8), tiles, 256, ARGS(&dy, &gw.w2, &ga, &d[8], &m));
    from_gpu(y, dy, all * 4);
    gpu_free(d, 13);
}

/* One expert on m of 80 tokens, with roundings or without. */
static void check_expert(int dim, int inter, int m, bool on) {
    size_t all = 80 * (size_t)dim;
    dsv4_ffn w = {draw_fp4(inter, dim), draw_fp4(dim, inter), draw_fp4(inter, dim)};
    uint8_t *code = draw_bytes(all, 0), *scale = draw_bytes(80 * up(dim, 128), 119);
    float *f32 = malloc(all * 4), *want = draw_floats(all), *got = malloc(all * 4), weight[64];
    int32_t rows[64];
    dsv4_acts x = on ? (dsv4_acts){code, scale, NULL} : (dsv4_acts){NULL, NULL, f32};
    for (int i = 0; i < m; i++) rows[i] = i == 0 ? (int32_t)draw(16) : rows[i - 1] + 1;
    for (int i = 0; i < m / 2; i++) {                                  /* in no order, distinct */
        int j = (int)draw((uint32_t)m);
        int32_t r = rows[i];
        rows[i] = rows[j], rows[j] = r;
    }
    for (int i = 0; i < m; i++) weight[i] = draw_float();
    for (size_t i = 0; i < all; i++) f32[i] = draw_float();
    const dsv4_mat mats[] = {w.w1, w.w2, w.w3};
    for (int i = 0; i < 3 && !on; i++)                       /* of one size, for a bound on sums */
        memset((uint8_t *)(uintptr_t)mats[i].scale, 121, (size_t)dim * (size_t)inter / 32);
    for (size_t i = 0; i < all && !on; i++) want[i] = draw_float();
    memcpy(got, want, all * 4);
    void *scratch = aligned_alloc(64, (expert_scratch_bytes(dim, inter) + 63) / 64 * 64);
    ops_ref.expert_ffn(want, &w, &x, rows, weight, m, 7, scratch, NULL);
    expert_on_gpu(got, &w, &x, rows, weight, m, 7);
    if (on) check_same("y", got, want, all);
    for (size_t i = 0; i < all; i++) {
        /* |w2 a| <= inter * 6/64 * 7 * 7 * 4; F32 sums of dim and inter products, 32 apart */
        float most = (float)inter * 0.09375f * 7 * 7 * 4;
        CHECK(on || fabsf(got[i] - want[i]) <= most * (float)(dim / 32 + inter / 32) * 0x1p-24f,
              "y[%zu] is %.9g, not %.9g", i, (double)got[i], (double)want[i]);
    }
    const void *own[] = {w.w1.data, w.w1.scale, w.w2.data, w.w2.scale, w.w3.data, w.w3.scale,
                         code, scale, f32, want, got, scratch};
    for (int i = 0; i < 12; i++) free((void *)(uintptr_t)own[i]);
}

static void test_cuda_expert_is_the_same_bits(void) {
    check_expert(4096, 32, 1, true);                                       /* decode, long rows */
    check_expert(32, 2048, 1, true);
    check_expert(32, 32, EXPERT_ROWS, true);
    for (int i = 0; i < 8; i++)
        check_expert(32 * (1 + (int)draw(14)), 32 * (1 + (int)draw(14)), 1 + (int)draw(20), true);
}

static void test_cuda_expert_unrounded_is_within_its_sums(void) {
    check_expert(544, 96, 1, false);
    check_expert(96, 288, 11, false);
}

static void test_cuda_index_scores_are_the_same_bits_of_packed_rows(void) {
    for (int round = 0; round < 16; round++) {
        bool packed = round < 12;
        int n = round % 3 ? 1 : 1 + (int)draw(5), heads = 1 + (int)draw(9);
        int d = packed ? 32 << draw(3) : 1 + (int)draw(99), ratio = round & 1 ? 4 : 1;
        int64_t t0 = draw(300), entries = (t0 + n) / ratio;
        size_t bytes = index_row_bytes(d, packed), nh = (size_t)n * (size_t)heads;
        size_t kb = (size_t)(entries + 1) * bytes, stride = (size_t)entries + draw(7), ns;
        ns = (size_t)n * (stride += !stride);
        uint8_t *q = draw_bytes(nh * bytes, 0), *k = draw_bytes(kb, 0);
        for (size_t i = 0; packed && i < kb; i += bytes)                   /* no scale is NaN */
            for (int b = 0; b < d / 32; b++)
                k[i + (size_t)(d / 2 + b)] = (uint8_t)(draw(50) ? 100 + draw(50) : draw(255));
        for (size_t i = 0; packed && i < nh * bytes; i += bytes)
            for (int b = 0; b < d / 32; b++) q[i + (size_t)(d / 2 + b)] = (uint8_t)(100 + draw(50));
        for (size_t i = 0; !packed && i < kb; i += 4) memcpy(k + i, &(float){draw_float()}, 4);
        for (size_t i = 0; !packed && i < nh * bytes; i += 4)
            memcpy(q + i, &(float){draw_float()}, 4);
        float *w = malloc(nh * 4), *want = draw_floats(ns), *got = malloc(ns * 4);
        for (size_t i = 0; i < nh; i++) w[i] = draw_float();
        dsv4_index in = {q, w, 0.011f, k, heads, d, ratio, packed, t0, stride}, g = in;
        CUdeviceptr ds[3] = {to_gpu(q, nh * bytes), to_gpu(w, nh * 4), to_gpu(k, kb)};
        CUdeviceptr dscores = to_gpu(want, ns * 4);
        g.q = on_gpu(ds[0]), g.w = on_gpu(ds[1]), g.keys = on_gpu(ds[2]);
        ops_ref.index_scores(want, &in, n, NULL);
        launch("index_scores_cuda", up((int)entries + !entries, 128), (unsigned)n, 128,
               ARGS(&dscores, &g));
        from_gpu(got, dscores, ns * 4);
        gpu_free(ds, 3);
        if (packed) check_same("scores", got, want, ns);
        for (size_t i = 0; !packed && i < ns; i++)   /* heads * d products of 16 * 4 * w_scale */
            CHECK(same_float(got[i], want[i])
                      || fabsf(got[i] - want[i]) <= (float)(heads * d * d) * 0x1p-24f,
                  "scores[%zu] is %.9g, not %.9g", i, (double)got[i], (double)want[i]);
        free(q), free(k), free(w), free(want), free(got);
    }
}

/* n scores of a kind. */
static void draw_scores(float *s, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) {
        float x = draw_float();
        s[i] = kind == 0   ? x
             : kind == 1   ? roundf(x)                                 /* -0 and 0 as well     */
             : kind == 2   ? (i % 3 ? 0 : -0.0f)
             : kind == 3   ? -1.5f
             : kind == 4   ? (i % 997 ? -1 : x)                        /* the k-th among equals */
             : kind == 5   ? -(float)i
             : i % 5 == 0  ? -INFINITY
             : i % 11 == 0 ? INFINITY
                           : x * 1e-38f;                               /* subnormal ones        */
    }
}

static void check_topk(int n, int k, int ratio, int64_t t0, int kind, dsv4_exec *ex) {
    size_t stride = (size_t)((t0 + n) / ratio) + 3, nk = (size_t)n * (size_t)k;
    float *scores = malloc((size_t)n * stride * 4);
    int32_t *want = malloc(nk * 4), *got = malloc(nk * 4), n_want[8], n_got[8];
    memset(want, 255, nk * 4);
    draw_scores(scores, (size_t)n * stride, kind);
    CUdeviceptr ds = to_gpu(scores, (size_t)n * stride * 4), di = to_gpu(want, nk * 4);
    CUdeviceptr dc = room((size_t)n * 4);
    (ex ? &ops_cpu : &ops_ref)->topk(want, n_want, scores, stride, n, k, ratio, t0, ex);
    launch("topk_cuda", (unsigned)n, 1, 256 << draw(3),
           ARGS(&di, &dc, &ds, &stride, &k, &ratio, &t0));
    from_gpu(got, di, nk * 4);
    from_gpu(n_got, dc, (size_t)n * 4);
    gpu_free(&ds, 1);
    CHECK(!memcmp(n_want, n_got, (size_t)n * 4), "kind %d: %d of %d", kind, n_got[0], n_want[0]);
    for (size_t i = 0; i < nk; i++)
        CHECK(got[i] == want[i], "kind %d, %lld entries: idx[%zu] is %d, not %d", kind,
              (long long)t0, i, got[i], want[i]);
    free(scores), free(want), free(got);
}

static void test_cuda_topk_chooses_the_same(void) {
    for (int round = 0; round < 42; round++)
        check_topk(1 + (int)draw(5), 1 + (int)draw(90), round & 1 ? 4 : 1, draw(700), round % 7,
                   NULL);
    for (int i = 0; i < 3; i++) check_topk(1, 1500, 1, 2999, i, NULL);
    check_topk(8, 16, 4, 0, 0, NULL);                                   /* tokens that see none */
}

static void test_cuda_topk_chooses_the_same_of_many(void) {
    /* More entries than 49,140, 232,436 and 779,424 tokens have, and than these numbers. */
    static const int counts[] = {12286, 58110, 194857, 49141, 232437, 779425};
    dsv4_exec *ex = NULL;
    dsv4_err err;
    CHECK(exec_open(&ex, 1, &err) == 0, "%s", err.msg);
    for (int i = 0; i < 6; i++) check_topk(1, 512, 1, counts[i] - 1, i, ex);
    check_topk(1, 512, 1, 49140, 6, ex);
    exec_close(ex);
}

/* n rows of KV of values up to 4, packed or not, of which the last `unset` are NaN. */
static uint8_t *draw_rows(size_t n, size_t unset, int d, int rope, bool packed) {
    size_t bytes = kv_row_bytes(d, rope, packed);
    uint8_t *rows = malloc(n * bytes);
    float x[MAX_HEAD_DIM];
    for (size_t r = 0; r < n; r++) {
        for (int c = 0; c < d; c++) {
            float value = draw_float() / (float)(1 << c / 64 % 4);     /* blocks of many scales */
            x[c] = r + unset < n ? value : NAN;
        }
        kv_round_ref(rows + r * bytes, x, 1, d, rope, packed, NULL);
    }
    return rows;
}

/* size: heads, d, rope (< 0: rows of F32), window, ratio, topk, t0, n, warps of a block */
static void check_attend(const int *size, float scale, float *worst) {
    int heads = size[0], d = size[1], rope = abs(size[2]), window = size[3], ratio = size[4];
    int topk = size[5], n = size[7];
    int64_t t0 = size[6], entries = ratio ? (t0 + n) / ratio : 0;
    bool packed = size[2] >= 0;
    size_t bytes = kv_row_bytes(d, rope, packed), no = (size_t)n * (size_t)(heads * d);
    size_t empty = (size_t)(t0 < window ? window - t0 : 0), ne = (size_t)entries + 1;
    uint8_t *kv = draw_rows((size_t)n, 0, d, rope, packed);
    uint8_t *comp = draw_rows(ne, 1, d, rope, packed);
    uint8_t *ring = draw_rows((size_t)window, empty, d, rope, packed);
    float *q = malloc(no * 4), *want = malloc(no * 4), *got = malloc(no * 4), sink[128];
    int32_t *idx = malloc((size_t)(n * topk + 1) * 4), count[16];
    for (size_t i = 0; i < no; i++) q[i] = draw_float() * 0.25f * scale;
    for (int h = 0; h < heads; h++) sink[h] = h % 3 ? draw_float() : h % 2 ? -40 : 6;
    for (int t = 0; t < n; t++) {
        int64_t visible = ratio ? (t0 + t + 1) / ratio : 0;
        count[t] = 0;
        for (int e = 0; e < visible && count[t] < topk; e++)
            if (draw(2)) idx[t * topk + count[t]++] = e;
    }
    dsv4_attend in = {q, kv, ring, ratio ? comp : NULL, topk ? idx : NULL, topk ? count : NULL,
                      sink, heads, d, rope, window, ratio, topk, packed, t0}, g = in;
    CUdeviceptr dev[7] = {to_gpu(q, no * 4), to_gpu(kv, (size_t)n * bytes),
                          to_gpu(ring, (size_t)window * bytes), to_gpu(comp, ne * bytes),
                          to_gpu(idx, (size_t)(n * topk + 1) * 4), to_gpu(count, (size_t)n * 4),
                          to_gpu(sink, (size_t)heads * 4)}, out = room(no * 4);
    g.q = on_gpu(dev[0]), g.kv = on_gpu(dev[1]), g.ring = on_gpu(dev[2]), g.sink = on_gpu(dev[6]);
    g.comp = in.comp ? on_gpu(dev[3]) : NULL, g.idx = topk ? on_gpu(dev[4]) : NULL;
    g.count = topk ? on_gpu(dev[5]) : NULL;
    ops_ref.attend(want, &in, n, NULL);
    launch("attend_cuda", (unsigned)n, up(heads, size[8]), 32 * (unsigned)size[8], ARGS(&out, &g));
    from_gpu(got, out, no * 4);
    gpu_free(dev, 7);
    /* A score errs by d/32 + 8 roundings of partial sums, of random signs, which stay below
     * 4 * sqrt(d) * scale, over sqrt(d); the sums by one an item; values are up to 4, or so. */
    float score = ((float)d / 32 + 8) * 4 * scale * 0x1p-24f;
    float most = 4.5f * (2 * score + (float)(window + entries + 8) * 0x1p-24f);
    for (size_t i = 0; i < no; i++) {
        float e = fabsf(got[i] - want[i]);
        CHECK(e <= most, "o[%zu] is %.9g, not %.9g", i, (double)got[i], (double)want[i]);
        if (e / most > *worst) *worst = e / most;
    }
    free(kv), free(comp), free(ring), free(q), free(want), free(got), free(idx);
}

static void test_cuda_attend_is_within_its_sums(void) {
    static const int sizes[][9] = {
        {4, 512, 64, 128, 4, 512, 900, 1, 4},          /* Flash: chosen entries, decode         */
        {9, 512, 64, 16, 128, 0, 700, 3, 4},           /* all entries; a ragged group of heads  */
        {3, 512, -64, 16, 4, 24, 100, 2, 8},           /* F32 rows; fewer heads than warps      */
        {2, 512, 64, 8, 0, 0, 30, 12, 1},              /* no compressed entries, past the ring  */
        {5, 20, -6, 5, 4, 0, 0, 9, 2},                 /* from the start, no multiple of 32     */
        {5, 84, 20, 7, 4, 3, 0, 16, 2},
        {1, 1024, 128, 4, 2, 0, 3, 2, 1},
        {1, 96, 32, 1, 0, 0, 0, 1, 3},                 /* one token sees itself                 */
    };
    float worst = 0;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 2; j++) check_attend(sizes[i], j ? 16 : 1, &worst);
    NOTE("at most %.2g of what is allowed", (double)worst);
}

int main(int argc, char **argv) {
    if (gpu_open(argc > 1 ? argv[1] : "build/kernels.fatbin")) {
        printf("skip test_cuda_attend.c: no libcuda.so.1 here\n");
        return 0;
    }
    RUN(test_cuda_expert_is_the_same_bits);
    RUN(test_cuda_expert_unrounded_is_within_its_sums);
    RUN(test_cuda_index_scores_are_the_same_bits_of_packed_rows);
    RUN(test_cuda_topk_chooses_the_same);
    RUN(test_cuda_topk_chooses_the_same_of_many);
    RUN(test_cuda_attend_is_within_its_sums);
    return check_done();
}
