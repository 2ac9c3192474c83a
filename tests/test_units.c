/* test_units.c -- each operation alone against golden inputs and outputs, for both tables.
 *
 *   units.safetensors  ->  ops_ref and ops_cpu  ->  the tolerances of shared/goldens/README.md
 *
 * Shapes come from the file, so any file that tests/ref.py's `units` makes will do; the last test
 * demands that every name in it was used.
 * usage: test_units [units.safetensors]                                                         */
#include "../dsv4.h"
#include "check.h"
#include "st.h"

#include <limits.h>

enum { ROPE = 64, THREADS = 2 };
static const double TOL = 5e-6, TOL_LINEAR = 1e-5;           /* times the rms of the output      */

static st_file file;
static json_t *used;
static dsv4_exec *ex;
static const dsv4_ops *const tables[2] = {&ops_ref, &ops_cpu};

/* --- reading and comparing --- */

static st_tensor get(const char *name) {
    json_object_set_new(used, name, json_true());
    return st_get(&file, name);
}

static float *get_f32(const char *name) {
    (void)get(name);
    return st_f32(&file, name);
}

static int32_t *get_i32(const char *name) {
    (void)get(name);
    return st_i32(&file, name);
}

static int dim(const char *name, int i) { return (int)get(name).shape[i]; }

static void *room(size_t count, size_t size) {
    void *p = calloc(count + 1, size);
    assert(p);
    return p;
}

static float *copy_of(const float *x, size_t n) {
    float *y = room(n, sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

static double rms(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sqrt(sum / (double)n);
}

/* The largest error of got against the tensor `name`, in units of that tensor's rms. */
static void check_close(const dsv4_ops *ops, const char *name, const float *got, double tol) {
    float *want = get_f32(name);
    size_t n = get(name).count;
    double unit = rms(want, n), worst = 0;
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)got[i] - want[i]) / unit;
        if (!(error <= worst)) worst = error;                /* a NaN sticks */
        CHECK(error <= tol, "%s %s[%zu]: got %.9g want %.9g, %.2g rms", ops->name, name, i,
              (double)got[i], (double)want[i], error);
    }
    free(want);
}

/* Equal as values, NaN = NaN, -0 = 0. */
static void check_equal(const char *who, const char *name, const float *got) {
    float *want = get_f32(name);
    for (size_t i = 0; i < get(name).count; i++)
        CHECK(got[i] == want[i] || (isnan(got[i]) && isnan(want[i])),
              "%s %s[%zu]: got %.9g want %.9g", who, name, i, (double)got[i], (double)want[i]);
    free(want);
}

static void check_ids(const dsv4_ops *ops, const char *name, const int32_t *got) {
    int32_t *want = get_i32(name);
    for (size_t i = 0; i < get(name).count; i++)
        CHECK(got[i] == want[i], "%s %s[%zu]: got %d want %d", ops->name, name, i, got[i], want[i]);
    free(want);
}

static dsv4_mat f32_mat(const float *data, int rows, int cols) {
    return (dsv4_mat){DT_F32, rows, cols, data, NULL};
}

/* --- number formats and roundings --- */

static void test_units_number_formats(void) {
    /* Goal: every code's value, and every kind of rounding, bit by bit.  Method: the tables whole;
     * the rounding cases are all values, all halves between two, and their neighbours. */
    float e4m3[256], e2m1[16], e8m0[256];
    for (int i = 0; i < 256; i++) {
        e4m3[i] = e4m3_to_f32((uint8_t)i);
        e8m0[i] = e8m0_to_f32((uint8_t)i);
    }
    for (int i = 0; i < 16; i++) e2m1[i] = e2m1_to_f32((uint8_t)i);
    check_equal("formats", "e4m3.table", e4m3);
    check_equal("formats", "e2m1.table", e2m1);
    check_equal("formats", "e8m0.table", e8m0);
    const char *names[2][2] = {{"e4m3.round.x", "e4m3.round.y"}, {"e2m1.round.x", "e2m1.round.y"}};
    for (int f = 0; f < 2; f++) {
        float *x = get_f32(names[f][0]);
        for (size_t i = 0; i < get(names[f][0]).count; i++)
            x[i] = f ? e2m1_to_f32(f32_to_e2m1(x[i])) : e4m3_to_f32(f32_to_e4m3(x[i]));
        check_equal("formats", names[f][1], x);
        free(x);
    }
}

static void test_units_act_quant(void) {
    /* Goal: blocks of 128 and 64, their scales, and the codes.  Method: bit-exact, three ways;
     * blocks of 64 are those of a KV row without rotated dims. */
    for (int i = 0; i < 2; i++) {
        int n = dim("act_quant128.x", 0), d = dim("act_quant128.x", 1), blocks = (d + 127) / 128;
        size_t count = get("act_quant128.x").count;
        float *x = get_f32("act_quant128.x"), *y = room(count, sizeof *y);
        uint8_t *code = room(count, 1), *scale = room((size_t)(n * blocks), 1);
        float *scales = room((size_t)(n * blocks), sizeof *scales);
        tables[i]->act_quant(y, x, n, d, ex);
        check_equal(tables[i]->name, "act_quant128.y", y);
        tables[i]->act_codes(code, scale, x, n, d, ex);
        for (int b = 0; b < n * blocks; b++) scales[b] = e8m0_to_f32(scale[b]);
        check_equal(tables[i]->name, "act_quant128.scale", scales);
        tables[i]->act_values(y, code, scale, n, d, ex);
        check_equal(tables[i]->name, "act_quant128.y", y);
        free(x), free(y), free(code), free(scale), free(scales);

        n = dim("act_quant64.x", 0), d = dim("act_quant64.x", 1);
        size_t bytes = kv_row_bytes(d, 0, true);
        uint8_t *rows = room((size_t)n, bytes);
        x = get_f32("act_quant64.x");
        tables[i]->kv_round(rows, x, n, d, 0, true, ex);
        for (int t = 0; t < n; t++) kv_row_read(x + t * d, rows + (size_t)t * bytes, d, 0, true);
        check_equal(tables[i]->name, "act_quant64.y", x);
        free(x), free(rows);
    }
}

static void test_units_index_round(void) {
    /* Goal: Hadamard, and e2m1 in blocks of 32.  Method: rounding alone has no operation of its
     * own, so rows of 64 are rotated beforehand in double (the transform is its own inverse, with
     * a factor of 1/8).  Where they come back exactly, which zeros and ties do, the rounded row
     * must be exact; elsewhere a value may be a step of the row's scale off. */
    for (int i = 0; i < 2; i++) {
        float *x = get_f32("hadamard.x"), *y = room(get("hadamard.x").count, sizeof *y);
        tables[i]->index_round(y, x, dim("hadamard.x", 0), dim("hadamard.x", 1), false, ex);
        check_close(tables[i], "hadamard.y", y, TOL);
        free(x), free(y);
        int exact_rows = 0, n_off = 0;
        size_t count = get("fp4_act_quant.x").count;
        float *want = get_f32("fp4_act_quant.y");
        x = get_f32("fp4_act_quant.x");
        for (size_t row = 0; row < count; row += 64) {
            float turned[64], back[64], scratch[64];
            uint32_t packed[9];
            for (int c = 0; c < 64; c++) {
                double sum = 0;
                for (int k = 0; k < 64; k++)
                    sum += __builtin_parity((unsigned)(c & k)) ? -x[row + (size_t)k]
                                                               : x[row + (size_t)k];
                turned[c] = (float)(sum / 8);
            }
            memcpy(scratch, turned, sizeof scratch);
            tables[i]->index_round(back, scratch, 1, 64, false, ex);
            tables[i]->index_round(packed, turned, 1, 64, true, ex);
            index_row_read(turned, packed, 64);
            bool exact = !memcmp(back, x + row, sizeof back);
            exact_rows += exact;
            for (int c = 0; c < 64; c++) n_off += turned[c] != want[row + (size_t)c];
            for (int c = 0; exact && c < 64; c++)
                CHECK(turned[c] == want[row + (size_t)c], "%s row %zu dim %d: got %g want %g",
                      tables[i]->name, row / 64, c, (double)turned[c],
                      (double)want[row + (size_t)c]);
        }
        CHECK(exact_rows >= 1, "only %d rows of 64 come back exactly", exact_rows);
        CHECK(n_off <= (int)count / 200, "%s: %d of %zu values off", tables[i]->name, n_off, count);
        free(x), free(want);
    }
}

/* --- products and norms --- */

static void test_units_linear(void) {
    /* Goal: FP8 and FP4 weights, with and without rounded inputs.  Method: 1e-5 of the rms. */
    const char *names[2][5] = {
        {"fp8_linear.weight", "fp8_linear.scale", "fp8_linear.x", "fp8_linear.y",
         "fp8_linear.y_noquant"},
        {"fp4_linear.weight", "fp4_linear.scale", "fp4_linear.x", "fp4_linear.y",
         "fp4_linear.y_noquant"}};
    for (int f = 0; f < 2; f++)
        for (int i = 0; i < 2; i++) {
            st_tensor weight = get(names[f][0]);
            int rows = (int)weight.shape[0], n = dim(names[f][2], 0), cols = dim(names[f][2], 1);
            dsv4_mat w = {f ? DT_I8 : DT_F8_E4M3, rows, cols, weight.data, get(names[f][1]).data};
            float *x = get_f32(names[f][2]), *y = room((size_t)(n * rows), sizeof *y);
            tables[i]->linear(y, &w, x, n, 1, ex);
            check_close(tables[i], names[f][4], y, TOL);
            tables[i]->act_quant(x, x, n, cols, ex);
            tables[i]->linear(y, &w, x, n, 1, ex);
            check_close(tables[i], names[f][3], y, TOL_LINEAR);
            free(x), free(y);
        }
}

static void test_units_rmsnorm(void) {
    /* Goal: with and without a weight.  Method: 5e-6 of the rms. */
    for (int i = 0; i < 2; i++) {
        int n = dim("rmsnorm.x", 0), d = dim("rmsnorm.x", 1);
        float *x = get_f32("rmsnorm.x"), *w = get_f32("rmsnorm.weight");
        float *y = room((size_t)(n * d), sizeof *y);
        tables[i]->rmsnorm(y, x, w, n, d, 1e-6f, ex);
        check_close(tables[i], "rmsnorm.y", y, TOL);
        tables[i]->rmsnorm(x, x, NULL, n, d, 1e-6f, ex);
        check_close(tables[i], "rmsnorm.y_no_weight", x, TOL);
        free(x), free(w), free(y);
    }
}

/* --- rope --- */

static void frequencies(float *inv_freq, bool compressed) {
    if (compressed)
        rope_inv_freq(inv_freq, ROPE, 160000, 16, 32, 1, 65536);
    else
        rope_inv_freq(inv_freq, ROPE, 10000, 1, 32, 1, 65536);
}

static char *rope_name(bool compressed, const char *what) {
    static char name[MAX_NAME];
    snprintf(name, sizeof name, "rope.%s.%s", compressed ? "compressed" : "plain", what);
    return name;
}

/* Rows that the golden made from F32 angles are only good where those are exact enough. */
static bool angle_is_safe(int32_t pos) { return pos == 0 || pos == 1 || pos == 65536; }

static void rope_rows(const dsv4_ops *ops, const float *inv_freq, bool compressed, bool inverse) {
    const char *what = inverse ? "inverse" : "forward";
    int32_t *pos = get_i32("rope.positions");
    float *x = get_f32(rope_name(compressed, "x")), *want = get_f32(rope_name(compressed, what));
    int n = dim(rope_name(compressed, "x"), 0), heads = dim(rope_name(compressed, "x"), 1);
    int d = dim(rope_name(compressed, "x"), 2);
    size_t row = (size_t)heads * (size_t)d;
    double unit = rms(want, (size_t)n * row);
    for (int t = 0; t < n; t++) {
        float *xt = x + (size_t)t * row;
        if (!angle_is_safe(pos[t])) continue;
        ops->rope(xt, inv_freq, 1, heads, d, ROPE, pos[t], 1, inverse, ex);
        for (size_t c = 0; c < row; c++)
            CHECK(fabs((double)xt[c] - want[(size_t)t * row + c]) <= TOL * unit,
                  "%s rope %s position %d [%zu]: got %g want %g", ops->name, what, pos[t], c,
                  (double)xt[c], (double)want[(size_t)t * row + c]);
    }
    free(x), free(want), free(pos);
}

static void test_units_rope(void) {
    /* Goal: YaRN's frequencies, and angles in double up to position 2^20.  Method: the pair (1, 0)
     * turns into (cos, sin); random heads at the positions whose golden is sharp. */
    for (int compressed = 0; compressed < 2; compressed++)
        for (int i = 0; i < 2; i++) {
            float inv_freq[ROPE / 2];
            int n = dim("rope.positions", 0);
            size_t count = (size_t)n * (ROPE / 2);
            int32_t *pos = get_i32("rope.positions");
            float *cosine = room(count, sizeof *cosine), *sine = room(count, sizeof *sine);
            frequencies(inv_freq, compressed);
            check_close(tables[i], rope_name(compressed, "inv_freq"), inv_freq, TOL);
            for (int t = 0; t < n; t++) {
                float x[ROPE] = {0};
                for (int c = 0; c < ROPE; c += 2) x[c] = 1;
                tables[i]->rope(x, inv_freq, 1, 1, ROPE, ROPE, pos[t], 1, false, ex);
                for (int c = 0; c < ROPE / 2; c++) {
                    cosine[t * (ROPE / 2) + c] = x[2 * c];
                    sine[t * (ROPE / 2) + c] = x[2 * c + 1];
                }
            }
            check_close(tables[i], rope_name(compressed, "cos_f64angle"), cosine, TOL);
            check_close(tables[i], rope_name(compressed, "sin_f64angle"), sine, TOL);
            rope_rows(tables[i], inv_freq, compressed, false);
            rope_rows(tables[i], inv_freq, compressed, true);
            free(pos), free(cosine), free(sine);
        }
}

/* --- compressor, indexer, attention --- */

/* Up to 0.5% of the values may be a quantization step off; rotated dims went through BF16. */
static void check_entries(const dsv4_ops *ops, const char *name, const float *got, int d,
                          int n_rotated) {
    float *want = get_f32(name);
    size_t count = get(name).count, n_off = 0;
    double unit = rms(want, count), bf16 = 1.0 / 256;
    for (size_t i = 0; i < count; i++) {
        double error = fabs((double)got[i] - want[i]);
        bool rotated = (int)(i % (size_t)d) >= d - n_rotated;
        CHECK(error <= fabs(want[i]) + unit, "%s %s[%zu]: got %g want %g", ops->name, name, i,
              (double)got[i], (double)want[i]);
        n_off += !(error <= TOL * unit + (rotated ? bf16 * fabs(want[i]) : 0));
    }
    CHECK(n_off <= count / 200, "%s %s: %zu of %zu values off", ops->name, name, n_off, count);
    free(want);
}

static void compressor(const dsv4_ops *ops, const char *op) {
    char name[6][MAX_NAME];
    const char *part[6] = {"x", "wkv", "wgate", "ape", "norm", "entries_noquant"};
    for (int i = 0; i < 6; i++) snprintf(name[i], MAX_NAME, "compressor.%s.%s", op, part[i]);
    int n = dim(name[0], 0), cols = dim(name[0], 1), width = dim(name[1], 0);
    int ratio = dim(name[3], 0), d = dim(name[4], 0), n_groups = n / ratio;
    float *x = get_f32(name[0]), *wkv = get_f32(name[1]), *wgate = get_f32(name[2]);
    float *ape = get_f32(name[3]), *norm = get_f32(name[4]), inv_freq[ROPE / 2];
    float *kv = room((size_t)(n * width), sizeof *kv), *score = room((size_t)(n * width), 4);
    float *entries = room((size_t)(n_groups * d), sizeof *entries);
    dsv4_mat mkv = f32_mat(wkv, width, cols), mgate = f32_mat(wgate, width, cols);
    ops->linear(kv, &mkv, x, n, 1, ex);
    ops->linear(score, &mgate, x, n, 1, ex);
    dsv4_compress in = {.kv = kv, .score = score, .ape = ape, .ratio = ratio, .d = d};
    ops->compress(entries, &in, 0, n_groups, ex);
    ops->rmsnorm(entries, entries, norm, n_groups, d, 1e-6f, ex);
    frequencies(inv_freq, true);
    ops->rope(entries, inv_freq, n_groups, 1, d, ROPE, 0, ratio, false, ex);
    bool indexer = !strcmp(op, "indexer");
    float *exact = copy_of(entries, (size_t)(n_groups * d));
    float *scratch = copy_of(entries, (size_t)(n_groups * d));
    if (indexer) ops->index_round(exact, scratch, n_groups, d, false, ex);
    check_close(ops, name[5], exact, TOL);
    size_t bytes = indexer ? index_row_bytes(d, true) : kv_row_bytes(d, ROPE, true);
    uint8_t *rows = room((size_t)n_groups, bytes);
    if (indexer)
        ops->index_round(rows, entries, n_groups, d, true, ex);
    else
        ops->kv_round(rows, entries, n_groups, d, ROPE, true, ex);
    for (int g = 0; g < n_groups; g++) {
        const uint8_t *row = rows + (size_t)g * bytes;
        if (indexer)
            index_row_read(entries + g * d, row, d);
        else
            kv_row_read(entries + g * d, row, d, ROPE, true);
    }
    snprintf(name[5], MAX_NAME, "compressor.%s.entries", op);
    check_entries(ops, name[5], entries, d, indexer ? 0 : ROPE);
    free(x), free(wkv), free(wgate), free(ape), free(norm), free(kv), free(score);
    free(entries), free(exact), free(scratch), free(rows);
}

static void test_units_compressor(void) {
    /* Goal: both ratios, the group that does not exist, norm, rope, and both roundings.  Method:
     * the operations in MODEL.md's order, before and after the rounding. */
    for (int i = 0; i < 2; i++) {
        compressor(tables[i], "overlap");
        compressor(tables[i], "plain");
        compressor(tables[i], "indexer");
    }
}

static void test_units_indexer(void) {
    /* Goal: scores and the best eight.  Method: ratio 1 makes the last token see all entries. */
    for (int i = 0; i < 2; i++) {
        int n = dim("index.q", 0), heads = dim("index.q", 1), d = dim("index.q", 2);
        int entries = dim("index.k", 0);
        float *q = get_f32("index.q"), *k = get_f32("index.k"), *w = get_f32("index.w");
        float *scores = room((size_t)(n * entries), sizeof *scores);
        int32_t *best = room((size_t)n * 8, sizeof *best), count;
        for (int t = 0; t < n; t++) {
            dsv4_index in = {.q = q + (size_t)t * (size_t)(heads * d),
                             .w = w + (size_t)t * (size_t)heads, .w_scale = 1, .keys = k,
                             .n_heads = heads, .d = d, .ratio = 1, .t0 = entries - 1,
                             .stride = (size_t)entries};
            tables[i]->index_scores(scores + t * entries, &in, 1, ex);
            tables[i]->topk(best + t * 8, &count, scores + t * entries, (size_t)entries, 1, 8, 1,
                            entries - 1, ex);
            CHECK(count == 8, "%s: %d chosen", tables[i]->name, count);
        }
        check_close(tables[i], "index.scores", scores, TOL);
        check_ids(tables[i], "index.top8", best);
        free(q), free(k), free(w), free(scores), free(best);
    }
}

static int by_value(const void *a, const void *b) {
    return *(const int32_t *)a - *(const int32_t *)b;
}

static void test_units_attention(void) {
    /* Goal: attention over chosen rows with a sink.  Method: the first row of a token's list is
     * its window of one, the others are chosen compressed entries. */
    for (int i = 0; i < 2; i++) {
        int n = dim("attention.q", 0), heads = dim("attention.q", 1), d = dim("attention.q", 2);
        int rows = dim("attention.kv", 0), width = dim("attention.idx", 1);
        float *q = get_f32("attention.q"), *kv = get_f32("attention.kv");
        float *sink = get_f32("attention.sink"), *o = room((size_t)(n * heads * d), sizeof *o);
        int32_t *idx = get_i32("attention.idx");
        for (int t = 0; t < n; t++) {
            int32_t *list = idx + t * width, count = 0;
            while (count + 1 < width && list[count + 1] >= 0) count++;
            qsort(list + 1, (size_t)count, sizeof *list, by_value);
            dsv4_attend in = {.q = q + (size_t)t * (size_t)(heads * d),
                              .kv = kv + (size_t)list[0] * (size_t)d, .comp = kv, .idx = list + 1,
                              .count = &count, .sink = sink, .n_heads = heads, .head_dim = d,
                              .window = 1, .ratio = 1, .topk = width - 1, .t0 = rows - 1};
            tables[i]->attend(o + (size_t)t * (size_t)(heads * d), &in, 1, ex);
        }
        check_close(tables[i], "attention.o", o, TOL);
        free(q), free(kv), free(sink), free(o), free(idx);
    }
}

/* --- hyper-connections --- */

static void test_units_hc(void) {
    /* Goal: hc_pre, hc_post and hc_head.  Method: the whole of each on random streams. */
    for (int i = 0; i < 2; i++) {
        int n = dim("hc.streams", 0), hc = dim("hc.streams", 1), d = dim("hc.streams", 2);
        dsv4_hc_shape s = {hc, d, 20, 1e-6f, 1e-6f};
        float *h = get_f32("hc.streams"), *y = get_f32("hc.sublayer_out");
        float *fn = get_f32("hc.fn"), *scale = get_f32("hc.scale"), *base = get_f32("hc.base");
        float *x = room((size_t)(n * d), sizeof *x), *post = room((size_t)(n * hc), sizeof *post);
        float *comb = room((size_t)(n * hc * hc), sizeof *comb);
        dsv4_hc w = {fn, scale, base};
        tables[i]->hc_pre(x, post, comb, h, &w, &s, n, ex);
        check_close(tables[i], "hc.mixed_in", x, TOL);
        tables[i]->hc_post(h, y, post, comb, &s, n, ex);
        check_close(tables[i], "hc.new_streams", h, TOL);
        free(h), free(y), free(fn), free(scale), free(base), free(post), free(comb);

        h = get_f32("hc_head.streams"), fn = get_f32("hc_head.fn");
        scale = get_f32("hc_head.scale"), base = get_f32("hc_head.base");
        dsv4_hc head = {fn, scale, base};
        tables[i]->hc_pre(x, NULL, NULL, h, &head, &s, n, ex);
        check_close(tables[i], "hc_head.y", x, TOL);
        free(h), free(fn), free(scale), free(base), free(x);
    }
}

static void test_units_sinkhorn(void) {
    /* Goal: pre, post and comb of given mixes.  Method: stream i is 2 at dim i and 0 elsewhere, so
     * the mean square is 1, fn's row holds mix / 2 at the first dim, and x shows 2 * pre. */
    enum { HC = 4, ROWS = (2 + HC) * HC };
    for (int i = 0; i < 2; i++) {
        int n = dim("sinkhorn.mixes", 0);
        float *mixes = get_f32("sinkhorn.mixes"), *scale = get_f32("sinkhorn.scale");
        float *base = get_f32("sinkhorn.base"), *fn = room(ROWS * HC * HC, sizeof *fn);
        float *pre = room((size_t)n * HC, sizeof *pre), *post = room((size_t)n * HC, sizeof *post);
        float *comb = room((size_t)n * HC * HC, sizeof *comb), h[HC * HC] = {0};
        dsv4_hc_shape s = {HC, HC, 20, 0, 1e-6f};
        dsv4_hc w = {fn, scale, base};
        for (int k = 0; k < HC; k++) h[k * HC + k] = 2;
        for (int t = 0; t < n; t++) {
            for (int r = 0; r < ROWS; r++) fn[r * HC * HC] = mixes[t * ROWS + r] / 2;
            tables[i]->hc_pre(pre + t * HC, post + t * HC, comb + t * HC * HC, h, &w, &s, 1, ex);
            for (int k = 0; k < HC; k++) pre[t * HC + k] /= 2;
        }
        check_close(tables[i], "sinkhorn.pre", pre, TOL);
        check_close(tables[i], "sinkhorn.post", post, TOL);
        check_close(tables[i], "sinkhorn.comb", comb, TOL);
        free(mixes), free(scale), free(base), free(fn), free(pre), free(post), free(comb);
    }
}

/* --- MoE --- */

static void test_units_gate(void) {
    /* Goal: scores, choice with ties, weights, and hash layers.  Method: choosing all experts at
     * a scale equal to the sum of the golden's scores makes each weight a score. */
    for (int i = 0; i < 2; i++) {
        int n = dim("gate.x", 0), cols = dim("gate.x", 1), experts = dim("gate.weight", 0);
        int k = dim("gate.ids", 1);
        float *x = get_f32("gate.x"), *weight = get_f32("gate.weight");
        float *bias = get_f32("gate.bias"), *want = get_f32("gate.scores");
        float *scores = room((size_t)(n * experts), 4);
        float *logits = room((size_t)(n * experts), 4), *weights = room((size_t)(n * experts), 4);
        int32_t *ids = room((size_t)(n * experts), sizeof *ids);
        int32_t *table = get_i32("gate_hash.tid2eid"), *tokens = get_i32("gate_hash.tokens");
        dsv4_mat gate = f32_mat(weight, experts, cols);
        tables[i]->linear(logits, &gate, x, n, 1, ex);
        dsv4_route in = {logits, bias, NULL, tokens, experts, k, 1.5f};
        tables[i]->route(ids, weights, &in, n, ex);
        check_ids(tables[i], "gate.ids", ids);
        check_close(tables[i], "gate.weights", weights, TOL);
        dsv4_route hash = {logits, NULL, table, tokens, experts, k, 1.5f};
        tables[i]->route(ids, weights, &hash, n, ex);
        check_ids(tables[i], "gate_hash.ids", ids);
        check_close(tables[i], "gate_hash.weights", weights, TOL);
        for (int t = 0; t < n; t++) {
            dsv4_route all = {logits + t * experts, bias, NULL, tokens, experts, experts, 0};
            for (int e = 0; e < experts; e++) all.scale += want[t * experts + e];
            tables[i]->route(ids, weights, &all, 1, ex);
            for (int e = 0; e < experts; e++) scores[t * experts + ids[e]] = weights[e];
        }
        check_close(tables[i], "gate.scores", scores, TOL);
        free(x), free(weight), free(bias), free(want), free(scores), free(logits), free(weights);
        free(ids), free(table), free(tokens);
    }
}

static void test_units_swiglu(void) {
    /* Goal: both clamps, the gate's on one side.  Method: 5e-6 of the rms, with and without. */
    for (int i = 0; i < 2; i++) {
        int n = dim("swiglu.gate", 0), d = dim("swiglu.gate", 1);
        float *g = get_f32("swiglu.gate"), *u = get_f32("swiglu.up");
        float *limit = get_f32("swiglu.limit"), *a = room((size_t)(n * d), sizeof *a);
        tables[i]->swiglu(a, g, u, n, d, limit[0], ex);
        check_close(tables[i], "swiglu.y", a, TOL);
        tables[i]->swiglu(g, g, u, n, d, INFINITY, ex);
        check_close(tables[i], "swiglu.y_nolimit", g, TOL);
        free(g), free(u), free(limit), free(a);
    }
}

static void test_units_all_used(void) {
    /* Goal: no golden goes unread.  Method: every name was asked for; rope's `cos` and `sin` are
     * from F32 angles and only for information. */
    const char *name;
    json_t *value;
    json_object_foreach(file.header, name, value) {
        size_t len = strlen(name);
        bool info = len > 4 && (!strcmp(name + len - 4, ".cos") || !strcmp(name + len - 4, ".sin"));
        if (info || !strcmp(name, "__metadata__")) continue;
        CHECK(json_object_get(used, name), "%s was not used", name);
    }
}

int main(int argc, char **argv) {
    dsv4_err err;
    st_open(&file, argc > 1 ? argv[1] : "tests/goldens/units.safetensors");
    used = json_object();
    if (exec_open(&ex, THREADS, &err)) {
        printf("FAIL exec_open: %s\n", err.msg);
        return 1;
    }
    RUN(test_units_number_formats);
    RUN(test_units_act_quant);
    RUN(test_units_index_round);
    RUN(test_units_linear);
    RUN(test_units_rmsnorm);
    RUN(test_units_rope);
    RUN(test_units_compressor);
    RUN(test_units_indexer);
    RUN(test_units_attention);
    RUN(test_units_hc);
    RUN(test_units_sinkhorn);
    RUN(test_units_gate);
    RUN(test_units_swiglu);
    RUN(test_units_all_used);
    exec_close(ex);
    json_decref(used);
    st_close(&file);
    return check_done();
}
