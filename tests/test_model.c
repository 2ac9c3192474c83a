/* test_model.c -- the whole model against the goldens, and what must not change its answers.
 *
 * Every row of goldens/README.md that concerns the whole network is a test here, held to that
 * table's tolerance; the units are in test_units.c.  argv[1] is the goldens' directory.
 * The model is tiny-a: 6 layers of all kinds, 8 experts, an MTP block.
 *
 *   test_model GOLDENS              on the CPU
 *   test_model GOLDENS cuda         the goldens on a GPU
 *   test_model GOLDENS cuda brief   64 tokens and 16 more: for a GPU in software               */
#define machine_rss test_rss       /* a plan that does not depend on this process's size        */
#include "../dsv4.c"
#undef machine_rss
#include "check.h"
#include "st.h"

void test_rss(uint64_t *now, uint64_t *peak);
void test_rss(uint64_t *now, uint64_t *peak) {
    if (now) *now = 1 << 20;
    if (peak) *peak = 1 << 20;
}

#define CLEAR_MARGIN 0.25f         /* of a row's rms, between its first and second logit       */
enum { VOCAB = 512, DIM = 256, HC = 4, N = 300, ROW = HC * DIM };

static const char *goldens = "tests/goldens";
static unsigned backend = BACKEND_CPU;

typedef struct { dsv4_config cfg; ckpt *ck; dsv4_engine *e; dsv4_session *s; } rig;

static void die(const dsv4_err *err) {
    printf("FAIL test_model.c: %s\n", err->msg);
    exit(1);
}

/* tiny-a with a context of 448 tokens, all in one chunk unless opts say otherwise. */
static void rig_open(rig *r, dsv4_opts o) {
    dsv4_err err;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/tiny-a", goldens);
    o.dir = dir;
    if (!o.ctx) o.ctx = 448;
    if (!o.chunk) o.chunk = 400;
    if (!o.span_hint) o.span_hint = 400;
    if (!o.ram_bytes) o.ram_bytes = (uint64_t)1 << 30;
    if (!o.n_threads) o.n_threads = 2;
    o.backend = backend;
    if (config_load(&r->cfg, dir, &err) || ckpt_open(&r->ck, dir, &err) ||
        engine_open(&r->e, &r->cfg, r->ck, &o, &err) || engine_load(r->e, NULL, NULL, &err) ||
        session_open(&r->s, r->e, NULL, NULL, &err))
        die(&err);
    r->e->opts.dir = "tiny-a";
}

static void rig_close(rig *r) {
    session_close(r->s);
    engine_close(r->e);
    ckpt_close(r->ck);
}

static void forward(rig *r, const int32_t *tokens, int n) {
    dsv4_err err;
    if (session_forward(r->s, tokens, n, &err)) die(&err);
}

/* To memory that operations see, and back: n floats. */
static void put(rig *r, float *to, const float *x, size_t n) {
    r->e->op->copy(to, x, n * sizeof *x, r->e->ex);
}
static void get(rig *r, float *x, const float *from, size_t n) {
    dsv4_err err;
    r->e->op->copy(x, from, n * sizeof *x, r->e->ex);
    if (r->e->op->sync(r->e->ex, &err)) die(&err);
}

static void logits_of(rig *r, int i0, int n, float *logits) {
    dsv4_err err;
    if (session_logits(r->s, i0, n, logits, &err)) die(&err);
}

static st_file golden(const char *name) {
    char path[512];
    st_file f;
    snprintf(path, sizeof path, "%s/%s", goldens, name);
    st_open(&f, path);
    return f;
}

static int32_t argmax(const float *x, int n) {
    int32_t id;
    argmax_ref(&id, x, 1, n, NULL);
    return id;
}

/* |x - y| / |y|, 2-norms over n values; NaN where anything is NaN. */
static double rel_rms(const float *x, const float *y, size_t n) {
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        s += (double)y[i] * y[i];
    }
    return sqrt(d / s);
}

/* The worst row of rel_rms; a NaN row is the worst of all. */
static double worst_row(const float *x, const float *y, size_t rows, size_t width) {
    double worst = 0;
    for (size_t i = 0; i < rows; i++) {
        double r = rel_rms(x + i * width, y + i * width, width);
        if (!(r <= worst)) worst = r;
    }
    return worst;
}

/* === End to end with the roundings off: sharp ================================================= */

/* Equal as sets; -1 pads the golden. */
static bool same_set(const int32_t *got, int n_got, const int32_t *want, int n_want) {
    int found = 0, real = 0;
    for (int i = 0; i < n_want; i++) {
        real += want[i] >= 0;
        for (int j = 0; j < n_got; j++) found += want[i] >= 0 && got[j] == want[i];
    }
    return found == real && real == n_got;
}

/* Index choice of the positions of layer l, whose chunk work is still in place. */
static void check_index(rig *r, const st_file *g, int l, const int32_t *positions, int n_pos) {
    char name[64];
    int k = r->cfg.index_topk;
    snprintf(name, sizeof name, "nq.layer%d.index_topk", l);
    int32_t *want = st_i32(g, name);
    for (int i = 0; i < n_pos; i++) {
        int p = positions[i];
        CHECK(same_set(r->s->c.idx + p * k, r->s->c.count[p], want + i * k, k),
              "layer %d position %d", l, p);
    }
    free(want);
}

static void check_layer(rig *r, const st_file *g, int l, const int32_t *positions, int n_pos,
                        double *worst) {
    char name[64];
    int k = r->cfg.num_experts_per_tok;
    snprintf(name, sizeof name, "nq.layer%d.streams", l);
    float *want = st_f32(g, name);
    snprintf(name, sizeof name, "nq.layer%d.expert_ids", l);
    int32_t *ids = st_i32(g, name);
    snprintf(name, sizeof name, "nq.layer%d.expert_weights", l);
    float *weights = st_f32(g, name), h[ROW];
    for (int i = 0; i < n_pos; i++) {
        int p = positions[i];
        get(r, h, r->s->s.h + p * ROW, ROW);
        double e = rel_rms(h, want + i * ROW, ROW);
        if (!(e <= *worst)) *worst = e;
        CHECK(e <= 1e-4, "layer %d position %d streams off by %g", l, p, e);
        for (int j = 0; j < k; j++) {
            CHECK(r->s->s.ids[p * k + j] == ids[i * k + j], "layer %d position %d expert %d", l,
                  p, j);
            CHECK(fabsf(r->s->s.weights[p * k + j] - weights[i * k + j]) <= 1e-4f,
                  "layer %d position %d weight %d", l, p, j);
        }
    }
    free(want);
    free(ids);
    free(weights);
}

static void check_rows(const st_file *g, const char *name, const float *got, double *worst) {
    st_tensor t = st_get(g, name);
    float *want = st_f32(g, name);
    double e = worst_row(got, want, (size_t)t.shape[0], t.count / (size_t)t.shape[0]);
    if (!(e <= *worst)) *worst = e;
    CHECK(e <= 1e-4, "%s off by %g", name, e);
    free(want);
}

/* Goal: prefill of 300 tokens, layer by layer: streams, experts, index choice, KV, logits. */
static void nq_layers(const dsv4_ops *op) {
    st_file g = golden("tiny-a/golden.safetensors");
    rig r;
    rig_open(&r, (dsv4_opts){.no_rounding = true});
    r.e->op = op;
    int32_t *ids = st_i32(&g, "prompt.tokens"), *positions = st_i32(&g, "positions");
    const int32_t *tokens = tokens_in(r.s, ids, N);
    double worst = 0;
    dsv4_err err;
    op->embed(r.s->s.h, &r.e->w->embed, tokens, N, HC, r.e->ex);
    for (int l = 0; l < r.cfg.num_hidden_layers; l++) {
        if (layer_forward(r.s, l, r.s->s.h, tokens, N, 0, &err)) die(&err);
        check_layer(&r, &g, l, positions, 10, &worst);
        if (r.cfg.compress_ratios[l] == 4) check_index(&r, &g, l, positions, 10);
    }
    float *rows = malloc(N * 128 * sizeof *rows);      /* they are plain F32 here */
    if (kv_copy(r.s->kv, 2, KV_ENTRIES, 0, N / 4, rows, &err)) die(&err);
    check_rows(&g, "nq.layer2.compressed", rows, &worst);
    if (kv_copy(r.s->kv, 2, KV_KEYS, 0, N / 4, rows, &err)) die(&err);
    check_rows(&g, "nq.layer2.index_keys", rows, &worst);
    if (kv_copy(r.s->kv, 3, KV_ENTRIES, 0, N / 128, rows, &err)) die(&err);
    check_rows(&g, "nq.layer3.compressed", rows, &worst);
    free(rows);
    float *logits = malloc(N * VOCAB * sizeof *logits);
    r.s->n_last = N;
    logits_of(&r, 0, N, logits);
    check_rows(&g, "nq.logits", logits, &worst);
    NOTE("worst row %.1e", worst);
    free(logits);
    free(ids);
    free(positions);
    rig_close(&r);
    st_close(&g);
}
static void test_model_nq_every_layer_matches_golden(void) {
    nq_layers(backend == BACKEND_CPU ? &ops_cpu : &ops_cuda);
}
static void test_model_nq_references_make_the_same_model(void) { nq_layers(&ops_ref); }

/* Feed the golden's decode tokens behind its prompt: every row of logits within 1e-4, and each
 * argmax is the next token. */
static void nq_decode(const char *file, int n, int n_decode) {
    st_file g = golden(file);
    rig r;
    rig_open(&r, (dsv4_opts){.no_rounding = true});
    int32_t *tokens = st_i32(&g, "prompt.tokens"), *next = st_i32(&g, "nq.decode.tokens");
    float *want = st_f32(&g, "nq.decode.logits"), got[VOCAB];
    double worst = 0;
    forward(&r, tokens, n);
    logits_of(&r, n - 1, 1, got);
    for (int i = 0; i < n_decode; i++) {
        CHECK(argmax(got, VOCAB) == next[i], "token %d: %d and not %d", i, argmax(got, VOCAB),
              next[i]);
        forward(&r, next + i, 1);
        logits_of(&r, 0, 1, got);
        double e = rel_rms(got, want + i * VOCAB, VOCAB);
        if (!(e <= worst)) worst = e;
        CHECK(e <= 1e-4, "decode %d off by %g", i, e);
    }
    NOTE("worst row %.1e", worst);
    free(tokens);
    free(next);
    free(want);
    rig_close(&r);
    st_close(&g);
}
static void test_model_nq_decode_matches_golden(void) {
    nq_decode("tiny-a/golden.safetensors", N, 40);
}
/* This one completes an HCA entry while decoding, at position 383. */
static void test_model_nq_decode_over_hca_boundary(void) {
    nq_decode("tiny-a/golden-cross.safetensors", 370, 30);
}

/* Goal: the MTP block, run over the prompt, drafts what the golden drafts; in one span, in spans
 * of 7, and token by token. */
static void test_model_nq_mtp_draft_matches_golden(void) {
    st_file g = golden("tiny-a/golden.safetensors");
    int32_t *tokens = st_i32(&g, "prompt.tokens"), *next = st_i32(&g, "nq.mtp.next_token");
    float *want = st_f32(&g, "nq.mtp.logits_last"), got[VOCAB], first[VOCAB];
    static const int steps[] = {N, 7, 1};
    dsv4_err err;
    int n_steps = backend == BACKEND_CPU ? 3 : 2;      /* two minutes each in software        */
    for (int k = 0; k < n_steps; k++) {
        rig r;
        rig_open(&r, (dsv4_opts){.no_rounding = true, .mtp = true});
        for (int i = 0; i < N; i += steps[k])
            forward(&r, tokens + i, (int)min64(steps[k], N - i));
        if (session_draft(r.s, *next, got, &err)) die(&err);
        double e = rel_rms(got, want, VOCAB);
        CHECK(e <= 1e-4, "steps of %d: off by %g", steps[k], e);
        if (k == 0) memcpy(first, got, sizeof got);
        CHECK(!memcmp(first, got, sizeof got), "steps of %d change bits", steps[k]);
        NOTE("%.1e", e);
        /* the draft leaves the session as it was: the next token's logits do not move */
        forward(&r, next, 1);
        if (session_draft(r.s, 5, got, &err)) die(&err);
        rig_close(&r);
    }
    free(tokens);
    free(next);
    free(want);
    st_close(&g);
}

/* === With the roundings on ==================================================================== */

/* Goal: ten prompts of six tokens; the last three rows of logits, one norm a prompt. */
static void test_model_short_prompts_match_golden(void) {
    st_file g = golden("tiny-a/golden-ropebf16.safetensors");
    rig r;
    rig_open(&r, (dsv4_opts){0});
    int32_t *tokens = st_i32(&g, "short.tokens");
    float *want = st_f32(&g, "short.logits_last3"), got[3 * VOCAB];
    int good = 0;
    for (int i = 0; i < 10; i++) {
        session_reset(r.s);
        forward(&r, tokens + 6 * i, 6);
        logits_of(&r, 3, 3, got);
        good += rel_rms(got, want + 3 * VOCAB * i, 3 * VOCAB) <= 1e-4;
    }
    CHECK(good >= 8, "%d of 10 prompts within 1e-4", good);
    NOTE("%d of 10 within 1e-4", good);
    free(tokens);
    free(want);
    rig_close(&r);
    st_close(&g);
}

/* Rows of one block within 2e-4 (a share) and 0.25 (all). */
static double block_share(const char *what, const float *got, const float *want, int rows,
                          size_t width) {
    int good = 0;
    for (int i = 0; i < rows; i++) {
        double e = rel_rms(got + (size_t)i * width, want + (size_t)i * width, width);
        good += e <= 2e-4;
        CHECK(e <= 0.25, "%s row %d off by %g", what, i, e);
    }
    return (double)good / rows;
}

enum { L_TOKENS = 144, L_ROWS = 40 };

static void gather(rig *r, float *out, const float *h, const int32_t *positions) {
    for (int i = 0; i < L_ROWS; i++) get(r, out + i * ROW, h + positions[i] * ROW, ROW);
}

/* Goal: each block alone on given streams, fresh state: 95% of rows in six of seven blocks and
 * 80% in the other; after attention where the file has it. */
static void test_model_blocks_match_layer_file(void) {
    st_file g = golden("tiny-a-layers-ropebf16.safetensors");
    rig r;
    rig_open(&r, (dsv4_opts){.mtp = true});
    int32_t *tokens = st_i32(&g, "tokens"), *next = st_i32(&g, "mtp.next_tokens"),
            *positions = st_i32(&g, "positions");
    float *input = st_f32(&g, "input_streams"), *h = r.s->s.h,
          *got = malloc(L_ROWS * ROW * sizeof *got);
    int full = 0, most = 0;
    dsv4_err err;
    for (int l = 0; l < 7; l++) {
        char name[64];
        snprintf(name, sizeof name, "out.layer%d.after_attn", l);
        put(&r, h, input, L_TOKENS * ROW);
        session_reset(r.s);
        if (l < 6 && json_object_get(g.header, name)) {
            float *after = st_f32(&g, name);
            if (attention_span(r.s, l, h, L_TOKENS, 0, &err)) die(&err);
            session_reset(r.s);
            gather(&r, got, h, positions);
            CHECK(block_share(name, got, after, L_ROWS, ROW) >= 0.8, "%s", name);
            put(&r, h, input, L_TOKENS * ROW);
            free(after);
        }
        int rc = l < 6 ? layer_forward(r.s, l, h, tokens_in(r.s, tokens, L_TOKENS), L_TOKENS, 0,
                                       &err)
                       : mtp_forward(r.s, h, next, L_TOKENS, 0, &err);
        if (rc) die(&err);
        gather(&r, got, l < 6 ? h : r.s->c.mtp_h, positions);
        snprintf(name, sizeof name, l < 6 ? "out.layer%d" : "out.mtp0", l);
        float *want = st_f32(&g, name);
        double share = block_share(name, got, want, L_ROWS, ROW);
        full += share >= 0.95;
        most += share >= 0.8;
        free(want);
    }
    CHECK(full >= 6, "%d of 7 blocks have 95%% of rows within 2e-4", full);
    CHECK(most == 7, "%d of 7 blocks have 80%% of rows within 2e-4", most);
    NOTE("%d of 7 blocks at 95%%, %d at 80%%", full, most);
    free(tokens);
    free(next);
    free(positions);
    free(input);
    free(got);
    rig_close(&r);
    st_close(&g);
}

/* Goal: the head alone, and the MTP block's head, on the layer file's streams. */
static void test_model_heads_match_layer_file(void) {
    st_file g = golden("tiny-a-layers-ropebf16.safetensors");
    rig r;
    rig_open(&r, (dsv4_opts){.mtp = true});
    float *input = st_f32(&g, "input_streams"), *want = st_f32(&g, "head_every4th"),
          *want_mtp = st_f32(&g, "mtp0.logits_every4th"), *logits;
    int32_t *next = st_i32(&g, "mtp.next_tokens"), *positions = st_i32(&g, "positions");
    int good = 0;
    dsv4_err err;
    logits = malloc(L_TOKENS * VOCAB * sizeof *logits);
    float *h = r.s->s.h;
    put(&r, h, input, L_TOKENS * ROW);
    if (head_logits(r.s, h, &r.e->w->hc_head, r.e->w->norm, L_TOKENS, logits, &err)) die(&err);
    for (int i = 0; i < 10; i++) {
        double e = rel_rms(logits + positions[4 * i] * VOCAB, want + i * VOCAB, VOCAB);
        CHECK(e <= 2e-4, "head row %d off by %g", i, e);
    }
    if (mtp_forward(r.s, h, next, L_TOKENS, 0, &err)) die(&err);
    if (head_logits(r.s, r.s->c.mtp_h, &r.e->w->mtp.hc_head, r.e->w->mtp.norm, L_TOKENS, logits,
                    &err))
        die(&err);
    for (int i = 0; i < 10; i++) {
        double e = rel_rms(logits + positions[4 * i] * VOCAB, want_mtp + i * VOCAB, VOCAB);
        good += e <= 2e-4;
        CHECK(e <= 0.25, "mtp row %d off by %g", i, e);
    }
    CHECK(good >= 8, "%d of 10 mtp rows within 2e-4", good);
    free(input);
    free(want);
    free(want_mtp);
    free(next);
    free(positions);
    free(logits);
    rig_close(&r);
    st_close(&g);
}

static int by_value(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* Goal: end to end with roundings, in the golden's own chaos: median, 90% and argmax bounds. */
static void test_model_q_logits_within_bounds(void) {
    st_file g = golden("tiny-a/golden-ropebf16.safetensors");
    rig r;
    rig_open(&r, (dsv4_opts){0});
    int32_t *tokens = st_i32(&g, "prompt.tokens"), *next = st_i32(&g, "q.decode.tokens");
    float *want = st_f32(&g, "q.logits"), *want_decode = st_f32(&g, "q.decode.logits"),
          *got = malloc((N + 40) * VOCAB * sizeof *got);
    double e[N + 40];
    int same = 0;
    forward(&r, tokens, N);
    logits_of(&r, 0, N, got);
    for (int i = 0; i < 40; i++) {
        forward(&r, next + i, 1);
        logits_of(&r, 0, 1, got + (N + i) * VOCAB);
    }
    for (int i = 0; i < N + 40; i++) {
        const float *w = i < N ? want + i * VOCAB : want_decode + (i - N) * VOCAB;
        e[i] = rel_rms(got + i * VOCAB, w, VOCAB);
        same += argmax(got + i * VOCAB, VOCAB) == argmax(w, VOCAB);
        CHECK(e[i] <= 10, "row %d: %g", i, e[i]);      /* a NaN would sort anywhere */
    }
    qsort(e, N + 40, sizeof *e, by_value);
    double share = (double)same / (N + 40);
    CHECK(e[170] <= 0.25, "median %g", e[170]);
    CHECK(e[306] <= 0.7, "90%% of rows within %g", e[306]);
    CHECK(share >= 0.55, "argmax equal at %g", share);
    NOTE("median %.3f, 90%% within %.3f, argmax equal at %.0f%%", e[170], e[306], 100 * share);
    free(tokens);
    free(next);
    free(want);
    free(want_decode);
    free(got);
    rig_close(&r);
    st_close(&g);
}

/* === On a GPU ================================================================================= */

enum { BRIEF = 64, MORE = 16, ROUNDED = 40 };

/* logits [n] of n tokens: n_prefill at once, then one at a time. */
static void logits_from(rig *r, const int32_t *tokens, int n_prefill, int n, float *logits) {
    session_reset(r->s);
    forward(r, tokens, n_prefill);
    logits_of(r, 0, n_prefill, logits);
    for (int i = n_prefill; i < n; i++) {
        forward(r, tokens + i, 1);
        logits_of(r, 0, 1, logits + i * VOCAB);
    }
}

/* Goal: 64 tokens of prefill and 16 of decode behind them are the golden's rows, roundings off. */
static void test_model_brief_nq_matches_golden(void) {
    st_file g = golden("tiny-a/golden.safetensors");
    rig r;
    rig_open(&r, (dsv4_opts){.no_rounding = true});
    int32_t *tokens = st_i32(&g, "prompt.tokens");
    float *want = st_f32(&g, "nq.logits"), *got = malloc((BRIEF + MORE) * VOCAB * sizeof *got);
    logits_from(&r, tokens, BRIEF, BRIEF + MORE, got);
    double e = worst_row(got, want, BRIEF + MORE, VOCAB);
    CHECK(e <= 1e-4, "off by %g", e);
    NOTE("worst row %.1e", e);
    free(tokens);
    free(want);
    free(got);
    rig_close(&r);
    st_close(&g);
}

/* Goal: roundings on, prefill and decode write the same bits, and where the CPU's first token is
 * ahead by more than the goldens' chaos the GPU's is the same. */
static void test_model_brief_prefill_and_decode_are_one(void) {
    st_file g = golden("tiny-a/golden-ropebf16.safetensors");
    int32_t *tokens = st_i32(&g, "prompt.tokens");
    float *one, *two, *cpu;
    const size_t bytes = ROUNDED * VOCAB * sizeof *one;
    one = malloc(bytes), two = malloc(bytes), cpu = malloc(bytes);
    int clear = 0, n = ROUNDED;
    rig r;
    rig_open(&r, (dsv4_opts){0});
    logits_from(&r, tokens, n, n, one);
    logits_from(&r, tokens, n / 2, n * 2 / 3, two);
    CHECK(!memcmp(one, two, (size_t)(n * 2 / 3) * VOCAB * sizeof *one), "decode changes bits");
    rig_close(&r);
    unsigned gpu = backend;
    backend = BACKEND_CPU;
    rig_open(&r, (dsv4_opts){0});
    logits_from(&r, tokens, n, n, cpu);
    rig_close(&r);
    backend = gpu;
    for (int i = 0; i < n; i++) {
        const float *row = cpu + i * VOCAB;
        int first = argmax(row, VOCAB), other = first;
        float second = -INFINITY, square = 0;
        for (int v = 0; v < VOCAB; v++) {
            square += row[v] * row[v];
            if (v != first) second = fmaxf(second, row[v]);
        }
        if (row[first] - second < CLEAR_MARGIN * sqrtf(square / VOCAB)) continue;
        other = argmax(one + i * VOCAB, VOCAB);
        CHECK(other == first, "position %d: %d and not %d", i, other, first);
        clear++;
    }
    CHECK(clear >= n / 8, "only %d of %d positions are clear", clear, n);
    NOTE("%d of %d positions are clear", clear, n);
    free(tokens);
    free(one), free(two), free(cpu);
    st_close(&g);
}

/* === What must not change a bit =============================================================== */

typedef struct { float *logits; uint8_t *kv; size_t kv_bytes; } outcome;

/* All rows and states of a session that is at position N. */
static void keep_kv(rig *r, outcome *out) {
    const kv_plan *p = kv_get_plan(r->s->kv);
    dsv4_err err;
    out->kv_bytes = (size_t)r->e->n_blocks * p->states + p->index + p->entries;
    uint8_t *at = out->kv = calloc(out->kv_bytes, 1);
    for (int l = 0; l < r->e->n_blocks; l++, at += p->states) kv_mark(r->s->kv, l, N, at);
    for (int l = 0; l < r->cfg.num_hidden_layers; l++) {
        int ratio = r->cfg.compress_ratios[l];
        bool packed = !r->e->opts.no_rounding;
        size_t row = kv_row_bytes(r->cfg.head_dim, r->cfg.qk_rope_head_dim, packed);
        if (ratio && kv_copy(r->s->kv, l, KV_ENTRIES, 0, N / ratio, at, &err)) die(&err);
        if (ratio) at += (size_t)(N / ratio) * row;
        if (ratio == 4 && kv_copy(r->s->kv, l, KV_KEYS, 0, N / 4, at, &err)) die(&err);
        if (ratio == 4) at += N / 4 * index_row_bytes(r->cfg.index_head_dim, packed);
    }
}

static int index_block;            /* if set, tokens whose index scores are held at once        */

/* Logits of all N tokens and the whole KV: n_prefill tokens in forwards of `step`, then one at
 * a time. */
static outcome run_all(dsv4_opts o, const int32_t *tokens, int n_prefill, int step) {
    rig r;
    rig_open(&r, o);
    if (index_block) r.s->c.index_block = index_block;
    outcome out = {.logits = malloc(N * VOCAB * sizeof(float))};
    for (int i = 0, n; i < N; i += n) {
        n = i < n_prefill ? (int)min64(step, n_prefill - i) : 1;
        forward(&r, tokens + i, n);
        logits_of(&r, 0, n, out.logits + i * VOCAB);
    }
    keep_kv(&r, &out);
    rig_close(&r);
    return out;
}

static void check_same(const outcome *a, outcome b, const char *what, int value) {
    CHECK(!memcmp(a->logits, b.logits, N * VOCAB * sizeof(float)), "%s %d changes logits", what,
          value);
    CHECK(a->kv_bytes == b.kv_bytes && !memcmp(a->kv, b.kv, a->kv_bytes), "%s %d changes the KV",
          what, value);
    free(b.logits);
    free(b.kv);
}

static const int chunks[] = {1, 3, 7, 64, 127, 128, 129};
enum { N_CHUNKS = sizeof chunks / sizeof *chunks };

static void for_both_roundings(void (*test)(dsv4_opts base, const int32_t *, const outcome *)) {
    st_file g = golden("tiny-a/golden.safetensors");
    int32_t *tokens = st_i32(&g, "prompt.tokens");
    for (int off = 0; off < 2; off++) {
        dsv4_opts base = {.no_rounding = off};
        outcome whole = run_all(base, tokens, N, N);
        test(base, tokens, &whole);
        free(whole.logits);
        free(whole.kv);
    }
    free(tokens);
    st_close(&g);
}

static void same_for_chunks(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    for (int i = 0; i < N_CHUNKS; i++) {
        check_same(whole, run_all(base, tokens, N, chunks[i]), "forwards of", chunks[i]);
        dsv4_opts o = base;
        o.chunk = chunks[i];
        check_same(whole, run_all(o, tokens, N, N), "chunks of", chunks[i]);
    }
}
static void test_model_same_bits_for_any_chunking(void) { for_both_roundings(same_for_chunks); }

static void same_for_index_blocks(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    static const int blocks[] = {1, 3, 128};
    for (int i = 0; i < 3; i++) {
        index_block = blocks[i];
        check_same(whole, run_all(base, tokens, N, N), "index blocks of", blocks[i]);
    }
    index_block = 0;
}
static void test_model_same_bits_for_any_index_block(void) {
    for_both_roundings(same_for_index_blocks);
}

static void same_for_threads(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    static const int threads[] = {1, 2, 3, 8};
    for (int i = 0; i < 4; i++) {
        dsv4_opts o = base;
        o.n_threads = threads[i];
        check_same(whole, run_all(o, tokens, 200, 200), "threads", threads[i]);
    }
}
static void test_model_same_bits_for_any_threads(void) { for_both_roundings(same_for_threads); }

static void same_for_splits(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    static const int splits[] = {0, 1, 5, 127, 128, 255, 256, 299};
    for (int i = 0; i < 8; i++)
        check_same(whole, run_all(base, tokens, splits[i], N), "prefill of", splits[i]);
}
static void test_model_same_bits_for_any_split(void) { for_both_roundings(same_for_splits); }

/* A session that is saved at any position and loaded into a new one goes on to the bit. */
static void same_for_saved(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    static const int at[] = {1, 3, 16, 127, 128, 200, 299};
    for (int i = 0; i < 7; i++) {
        rig r;
        dsv4_opts o = base;
        dsv4_err err;
        char dir[] = "/tmp/dsv4-park-XXXXXX", path[64];
        int32_t *saved;
        int64_t n;
        park_frame extra = {"words", 5}, got;
        CHECK(mkdtemp(dir) && !park_open(&o.park, dir, 0, &err), "%s", err.msg);
        rig_open(&r, o);
        forward(&r, tokens, at[i]);
        CHECK(!session_save(r.s, "name", extra, &err), "%s", err.msg);
        rig_close(&r);
        rig_open(&r, o);
        CHECK(session_load(r.s, "name", &saved, &n, &got, &err) == at[i], "%s", err.msg);
        CHECK(n == at[i] && !memcmp(saved, tokens, (size_t)n * 4), "other tokens");
        CHECK(got.bytes == 5 && !memcmp(got.data, "words", 5), "other words");
        outcome out = {.logits = malloc(N * VOCAB * sizeof(float))};
        memcpy(out.logits, whole->logits, (size_t)(at[i] * VOCAB) * sizeof(float));
        forward(&r, tokens + at[i], N - at[i]);
        logits_of(&r, 0, N - at[i], out.logits + at[i] * VOCAB);
        keep_kv(&r, &out);
        check_same(whole, out, "saved at", at[i]);
        free(saved);
        rig_close(&r);
        CHECK(!park_remove(o.park, "name", &err), "%s", err.msg);
        park_close(o.park);
        snprintf(path, sizeof path, "rm -r %s", dir);
        CHECK(!system(path), "%s stays", dir);
    }
}
static void test_model_same_bits_for_a_saved_session(void) { for_both_roundings(same_for_saved); }

/* Cache sizes from 2 x topk up: the budget is set so that just these slots fit. */
static void same_for_slots(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    static const int slots[] = {4, 5, 9, 30};
    rig r;
    rig_open(&r, base);
    dsv4_plan p = r.e->plan;
    uint64_t least_work = work_bytes(&r.cfg, &r.e->opts, false, 1, 1, NULL);
    rig_close(&r);
    for (int i = 0; i < 4; i++) {
        dsv4_opts o = base;
        o.chunk = o.span_hint = 1;
        o.ram_bytes = p.base + p.dense + p.kv + least_work + (uint64_t)slots[i] * p.slot_bytes;
        rig_open(&r, o);
        CHECK(r.e->plan.n_slots == slots[i], "%d slots and not %d", r.e->plan.n_slots, slots[i]);
        rig_close(&r);
        check_same(whole, run_all(o, tokens, N, 1), "slots", slots[i]);
    }
}
static void test_model_same_bits_for_any_cache_size(void) { for_both_roundings(same_for_slots); }

/* Dense weights that do not fit are read layer by layer: one token at a time, and whole. */
static void same_for_streaming(dsv4_opts base, const int32_t *tokens, const outcome *whole) {
    static const int step[] = {1, 8};
    rig r;
    rig_open(&r, base);
    uint64_t fixed = r.e->plan.base + r.e->plan.kv + 4 * r.e->plan.slot_bytes +
                     weights_size(r.e->w, (dense_mode){base.mtp, true}) +
                     2 * cache_slot_bytes(r.e->w->unit, (size_t)r.e->w->n_units);
    for (int i = 0; i < 2; i++) {
        dsv4_opts o = base;
        o.chunk = o.span_hint = step[i];
        o.ram_bytes = fixed + (1 << 20) + 4 * work_bytes(&r.cfg, &o, true, step[i], step[i], NULL);
        rig q;
        rig_open(&q, o);
        CHECK(q.e->plan.streamed, "%d: the dense weights fit", step[i]);
        rig_close(&q);
        check_same(whole, run_all(o, tokens, N, step[i]), "streamed, step", step[i]);
    }
    rig_close(&r);
}
static void test_model_same_bits_when_dense_weights_stream(void) {
    for_both_roundings(same_for_streaming);
}

/* Goal: a prompt leaves in the cache what decode had there, but for the slots that it borrowed (not
 * more than a layer has experts here), and comes by each expert once in a span. */
static void test_model_prefill_leaves_the_cache_as_it_is(void) {
    enum { SLOTS = 20, SPAN = 100, DECODED = 40 };
    rig r;
    dsv4_err err;
    st_file f = golden("tiny-a/golden.safetensors");
    int32_t *tokens = st_i32(&f, "prompt.tokens");
    rig_open(&r, (dsv4_opts){.span_hint = SPAN, .chunk = 50});
    dsv4_engine *e = r.e;
    size_t n = (size_t)e->plan.n_experts_total, lost = 0, was = 0;
    bool *in = calloc(n, sizeof *in);
    group_uses *used = calloc(n, sizeof *used);
    cache_close(e->experts);
    if (cache_open(&e->experts, e->off, e->w->expert_group, n, SLOTS, &err)) die(&err);
    for (int i = 0; i < DECODED; i++) forward(&r, tokens + i, 1);
    memcpy(used, cache_uses(e->experts), n * sizeof *used);
    for (size_t g = 0; g < n; g++) was += in[g] = cache_holds(e->experts, g);
    uint64_t passes = e->stats.passes;
    session_reset(r.s);
    for (int at = 0; at < N; at += SPAN) forward(&r, tokens + at, SPAN);
    CHECK(e->stats.passes - passes == (N + SPAN - 1) / SPAN, "%d passes",
          (int)(e->stats.passes - passes));
    for (size_t g = 0; g < n; g++) {
        group_uses now = cache_uses(e->experts)[g];
        uint32_t times = now.hits + now.misses - used[g].hits - used[g].misses;
        CHECK(times <= e->stats.passes - passes, "expert %zu was asked for %u times", g, times);
        lost += in[g] && !cache_holds(e->experts, g);
    }
    CHECK(was == SLOTS && lost > 0 && lost <= (size_t)r.cfg.n_routed_experts, "%zu of %zu lost",
          lost, was);
    free(in);
    free(used);
    free(tokens);
    st_close(&f);
    rig_close(&r);
}

/* === Refusals ================================================================================= */

/* Goal: the plan refuses one byte too little with the numbers, and takes the least; one byte less
 * than what keeps the dense weights resident has them streamed. */
static void test_model_plan_refuses_too_little(void) {
    rig r;
    rig_open(&r, (dsv4_opts){0});
    dsv4_plan p = r.e->plan;
    dsv4_opts o = r.e->opts;
    dsv4_engine *e;
    dsv4_err err;
    o.chunk = 0;
    for (int streamed = 1; streamed >= 0; streamed--) {
        uint64_t dense = streamed ? weights_size(r.e->w, (dense_mode){false, true}) + 2 *
                         cache_slot_bytes(r.e->w->unit, (size_t)r.e->w->n_units) : p.dense;
        o.ram_bytes = p.base + dense + p.kv + work_bytes(&r.cfg, &o, streamed, 1, 1, NULL) +
                      4 * p.slot_bytes;
        CHECK(!engine_open(&e, &r.cfg, r.ck, &o, &err) && !engine_load(e, NULL, NULL, &err),
              "%s", err.msg);
        CHECK(e->plan.streamed == streamed, "%d", streamed);
        CHECK(e->plan.base + e->plan.dense + e->plan.kv + e->plan.work + e->plan.slots <=
              o.ram_bytes, "the plan breaks its budget");
        engine_close(e);
        o.ram_bytes--;
        int rc = engine_open(&e, &r.cfg, r.ck, &o, &err);
        CHECK(streamed ? rc == -1 : rc == 0 && e->plan.streamed, "took too little");
        engine_close(e);
        if (streamed)
            CHECK(strstr(err.msg, "too small") && strstr(err.msg, "--ram"), "%s", err.msg);
    }
    o.ctx = r.cfg.max_position_embeddings + 1;
    CHECK(engine_open(&e, &r.cfg, r.ck, &o, &err) == -1 && strstr(err.msg, "context"), "%s",
          err.msg);
    rig_close(&r);
}

/* Goal: a tensor of the wrong shape, dtype or name is named. */
static void test_model_weights_bind_names_what_is_wrong(void) {
    rig r;
    rig_open(&r, (dsv4_opts){0});
    dsv4_config c = r.cfg;
    dsv4_weights *w;
    dsv4_err err;
    c.q_lora_rank = 256;
    CHECK(weights_bind(&w, r.ck, &c, &err) && strstr(err.msg, "layers.0.attn.wq_a.weight") &&
          strstr(err.msg, "[128,256] and not [256,256]"), "%s", err.msg);
    c = r.cfg;
    c.num_hidden_layers = 8;
    c.compress_ratios[6] = c.compress_ratios[7] = 0;
    CHECK(weights_bind(&w, r.ck, &c, &err) && strstr(err.msg, "layers.6.") &&
          strstr(err.msg, "is missing"), "%s", err.msg);
    c = r.cfg;
    c.num_hash_layers = 3;
    CHECK(weights_bind(&w, r.ck, &c, &err) && strstr(err.msg, "layers.2.ffn.gate.tid2eid"), "%s",
          err.msg);
    rig_close(&r);
}

/* Goal: bad ids and a full context are errors, and the session goes on after them. */
static void test_model_forward_refuses_bad_tokens(void) {
    rig r;
    rig_open(&r, (dsv4_opts){.ctx = 16, .chunk = 8, .span_hint = 8});
    int32_t good[8] = {1, 2, 3, 4, 5, 6, 7, 8}, bad[2] = {5, VOCAB}, negative = -1;
    dsv4_err err;
    CHECK(session_forward(r.s, bad, 2, &err) && strstr(err.msg, "512"), "%s", err.msg);
    CHECK(session_forward(r.s, &negative, 1, &err) && strstr(err.msg, "-1"), "%s", err.msg);
    forward(&r, good, 8);
    forward(&r, good, 8);
    CHECK(session_forward(r.s, good, 1, &err) && strstr(err.msg, "--ctx"), "%s", err.msg);
    CHECK(session_pos(r.s) == 16, "position %lld", (long long)session_pos(r.s));
    rig_close(&r);
}

static int stop_at_half(void *arg, double done) {
    *(int *)arg += done >= 0.5;
    return done >= 0.5;
}

/* Goal: a nonzero progress callback stops at once with "interrupted"; a reset heals. */
static void test_model_progress_interrupts(void) {
    rig r;
    rig_open(&r, (dsv4_opts){0});
    int calls = 0;
    int32_t tokens[3] = {1, 2, 3};
    dsv4_err err;
    r.s->progress = stop_at_half;
    r.s->progress_arg = &calls;
    CHECK(session_forward(r.s, tokens, 3, &err) && !strcmp(err.msg, "interrupted"), "%s",
          err.msg);
    CHECK(calls == 1, "%d calls", calls);
    r.s->progress = NULL;
    session_reset(r.s);
    forward(&r, tokens, 3);
    rig_close(&r);
}

/* === Sampling ================================================================================= */

static sampler *sampler_of(sample_opts o, int n_vocab) {
    sampler *s;
    dsv4_err err;
    CHECK(sampler_open(&s, &o, n_vocab, &err) == 0, "%s", err.msg);
    return s;
}

/* Goal: temperature 0 is the argmax, ties to the lower id; the penalty changes who that is. */
static void test_sample_greedy_takes_first_of_equals(void) {
    const float logits[5] = {1, 3, 3, -2, 3};
    sampler *s = sampler_of((sample_opts){.top_p = 1, .repetition_penalty = 1}, 5);
    CHECK(sampler_next(s, logits) == 1 && sampler_next(s, logits) == 1, "not the first");
    sampler_close(s);
    s = sampler_of((sample_opts){.top_p = 1, .repetition_penalty = 1.5f}, 5);
    sampler_accept(s, 2);
    CHECK(sampler_next(s, logits) == 1 && sampler_next(s, logits) == 4, "not the one not seen");
    CHECK(sampler_next(s, logits) == 1, "all three seen: the first again");
    sampler_close(s);
}

/* Goal: a seen token's logit is divided by the penalty when positive, multiplied when negative. */
static void test_sample_penalty_pushes_both_signs_down(void) {
    static const float logits[2][2] = {{3, 1.4f}, {-1, -1.9f}};
    for (int k = 0; k < 2; k++) {
        sampler *s = sampler_of((sample_opts){.top_p = 1, .repetition_penalty = 2}, 2);
        int32_t a = sampler_next(s, logits[k]), b = sampler_next(s, logits[k]);
        CHECK(a == 0 && b == (k == 0 ? 0 : 1), "set %d: %d, %d", k, a, b);
        sampler_close(s);
    }
}

typedef struct { sample_opts o; int kept[6]; double quantile; } sample_case;

/* Goal: drawn frequencies follow softmax(logits / T) inside of what the cuts keep, and nothing
 * else comes.  Method: 20,000 draws, chi-square against the exact shares, 99.9% quantiles. */
static void test_sample_follows_distribution(void) {
    static const float logits[6] = {0, 1, 2, -1, 1, 0.5f};
    static const sample_case cases[] = {
        {{0.7f, 1, 0, 1, 0, 42}, {1, 1, 1, 1, 1, 1}, 20.5},
        {{1.3f, 0.6f, 0, 1, 0, 42}, {0, 1, 1, 0, 1, 0}, 13.8},       /* ids 2, 1, 4 hold 60%   */
        {{1, 1, 0, 1, 2, 7}, {0, 1, 1, 0, 0, 0}, 10.8},              /* a tie goes to the lower */
        {{1, 1, 0, 1, 4, 7}, {0, 1, 1, 0, 1, 1}, 16.3},
        {{1, 1, 0.2f, 1, 0, 9}, {0, 1, 1, 0, 1, 1}, 16.3},           /* shares e^-1, e^-1.5     */
        {{2, 1, 0.3f, 1, 0, 9}, {1, 1, 1, 0, 1, 1}, 18.5},           /* at T = 2: e^-1 stays    */
        {{1, 0.99f, 0.1f, 1, 5, 3}, {1, 1, 1, 0, 1, 1}, 18.5},       /* top-p of the five left  */
        {{1, 0.7f, 0, 1, 3, 3}, {0, 1, 1, 0, 0, 0}, 10.8},           /* 0.58 + 0.21 of three    */
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        int seen[6] = {0};
        double share[6], total = 0, chi = 0;
        sampler *s = sampler_of(cases[k].o, 6);
        for (int i = 0; i < 20000; i++) seen[sampler_next(s, logits)]++;
        sampler_close(s);
        for (int i = 0; i < 6; i++) {
            share[i] = cases[k].kept[i]
                           ? exp((double)logits[i] / (double)cases[k].o.temperature) : 0;
            total += share[i];
        }
        for (int i = 0; i < 6; i++) {
            double want = 20000 * share[i] / total;
            if (want > 0) chi += (seen[i] - want) * (seen[i] - want) / want;
            else CHECK(seen[i] == 0, "case %zu: id %d was cut off", k, i);
        }
        CHECK(chi <= cases[k].quantile, "case %zu: chi-square %g", k, chi);
    }
}

/* Goal: same seed, same draws; another seed, others. */
static void test_sample_same_seed_same_draws(void) {
    float logits[64];
    int32_t got[3][32];
    for (int i = 0; i < 64; i++) logits[i] = (float)(i % 7);
    for (int k = 0; k < 3; k++) {
        sampler *s = sampler_of((sample_opts){1, 1, 0, 1, 0, k == 2 ? 6 : 5}, 64);
        for (int i = 0; i < 32; i++) got[k][i] = sampler_next(s, logits);
        sampler_close(s);
    }
    CHECK(!memcmp(got[0], got[1], sizeof got[0]), "same seed, other draws");
    CHECK(memcmp(got[0], got[2], sizeof got[0]), "other seed, same draws");
}

/* The token at which the guard first speaks when `period` tokens go round behind 100 others, and
 * one strange token stands at `odd` (-1: none). */
static int guard_speaks_at(int period, int odd, int n, int *found) {
    loop_guard g = {0};
    for (int i = 0; i < n; i++) {
        int32_t id = i < 100 ? 1000 + i : i == odd ? 9999 : (i - 100) % period;
        *found = loop_push(&g, id);
        if (*found) return i;
    }
    return -1;
}

/* Goal: the guard speaks behind LOOP_TOKENS and LOOP_TURNS of a cycle, names its period, and not
 * a token earlier; one other token begins the count anew. */
static void test_loop_guard_speaks_when_a_cycle_is_long(void) {
    static const int period[] = {1, 2, 31, 32, 33, 255, 256};
    for (size_t k = 0; k < sizeof period / sizeof *period; k++) {
        int p = period[k], turns = p * LOOP_TURNS, found;
        int run = turns > LOOP_TOKENS ? turns : LOOP_TOKENS;
        int at = guard_speaks_at(p, -1, 10000, &found);
        CHECK(at == 100 + p + run - 1 && found == p, "period %d: %d at token %d", p, found, at);
        at = guard_speaks_at(p, 100 + p + run - 1, 100 + p + run + p, &found);
        CHECK(at == -1, "period %d: %d at token %d in spite of another token", p, found, at);
    }
    int found;
    CHECK(guard_speaks_at(257, -1, 20000, &found) == -1, "a period that is no cycle: %d", found);
}

int main(int argc, char **argv) {
    if (argc > 1) goldens = argv[1];
    if (argc > 2 && !strcmp(argv[2], "cuda")) backend = BACKEND_CUDA;
    bool on_gpu = backend == BACKEND_CUDA;
    if (on_gpu) RUN(test_model_brief_nq_matches_golden);
    if (on_gpu) RUN(test_model_brief_prefill_and_decode_are_one);
    if (on_gpu && argc > 3) return check_done();
    RUN(test_model_nq_every_layer_matches_golden);
    if (!on_gpu) RUN(test_model_nq_references_make_the_same_model);
    RUN(test_model_nq_decode_matches_golden);
    RUN(test_model_nq_decode_over_hca_boundary);
    RUN(test_model_nq_mtp_draft_matches_golden);
    RUN(test_model_short_prompts_match_golden);
    RUN(test_model_blocks_match_layer_file);
    RUN(test_model_heads_match_layer_file);
    RUN(test_model_q_logits_within_bounds);
    if (on_gpu) return check_done();
    RUN(test_model_same_bits_for_any_chunking);
    RUN(test_model_same_bits_for_any_index_block);
    RUN(test_model_same_bits_for_any_threads);
    RUN(test_model_same_bits_for_any_split);
    RUN(test_model_same_bits_for_any_cache_size);
    RUN(test_model_same_bits_for_a_saved_session);
    RUN(test_model_prefill_leaves_the_cache_as_it_is);
    RUN(test_model_same_bits_when_dense_weights_stream);
    RUN(test_model_plan_refuses_too_little);
    RUN(test_model_weights_bind_names_what_is_wrong);
    RUN(test_model_forward_refuses_bad_tokens);
    RUN(test_model_progress_interrupts);
    RUN(test_sample_greedy_takes_first_of_equals);
    RUN(test_sample_penalty_pushes_both_signs_down);
    RUN(test_sample_follows_distribution);
    RUN(test_sample_same_seed_same_draws);
    RUN(test_loop_guard_speaks_when_a_cycle_is_long);
    return check_done();
}
