/* test_kv.c -- rows of KV in RAM and in a file, against arrays that the test keeps itself.
 *
 * kv.c is included with its transfers bent to hooks that count, and fail where they are told to.
 * The shape is not a real one: it makes pages few, rows odd and layers of every kind.           */
#define _GNU_SOURCE
static int hook_moves, hook_fail_at;   /* transfers so far; the one that fails, from 1          */
#include "../dsv4.h"
static int hook_add(offload *o, io_batch *b, int file, bool write, void *buf, uint64_t off,
                    size_t bytes, dsv4_err *err);
#define batch_add hook_add
#include "../kv.c"
#undef batch_add
#include "check.h"

enum { LAYERS = 6, CTX = 40000, ROUNDS = 120 };

static int hook_add(offload *o, io_batch *b, int file, bool write, void *buf, uint64_t off,
                    size_t bytes, dsv4_err *err) {
    if (++hook_moves == hook_fail_at) return fail(err, "the hook's fault");
    return batch_add(o, b, file, write, buf, off, bytes, err);
}

static uint32_t rng = 1;
static uint32_t draw(uint32_t n) {
    rng = rng * 1664525 + 1013904223;
    return (rng >> 8) % n;
}

static dsv4_config config(void) {
    dsv4_config c = {.num_hidden_layers = LAYERS, .head_dim = 136, .qk_rope_head_dim = 64,
                     .sliding_window = 16, .index_head_dim = 32, .index_topk = 5,
                     .compress_ratios = {0, 4, 128, 4, 7, 4}};
    strcpy(c.name, "test");
    return c;
}

typedef struct {                   /* what must be there                                        */
    uint8_t *row[LAYERS][KV_KINDS];
    int64_t n[LAYERS][KV_KINDS], pos;
} oracle;

typedef struct { dsv4_config cfg; ckpt *ck; offload *off; kv_cache *kv; oracle is; } rig;

static void rig_open(rig *r, uint64_t ram, park *p) {
    dsv4_err err;
    const char *note;
    *r = (rig){.cfg = config()};
    kv_opts o = {.ctx = CTX, .n_blocks = LAYERS, .packed = true, .ram = ram, .dir = "/tmp",
                 .park = p};
    if (ckpt_open(&r->ck, "tests/goldens/tiny-a", &err) ||
        offload_open(&r->off, r->ck, &note, &err) || kv_open(&r->kv, r->off, &r->cfg, &o, &err)) {
        printf("FAIL test_kv.c: %s\n", err.msg);
        exit(1);
    }
    for (int l = 0; l < LAYERS; l++)
        for (int k = 0; k < KV_KINDS; k++)
            r->is.row[l][k] = calloc(CTX, r->kv->rows[l][k].row_bytes);
}

static void rig_close(rig *r) {
    for (int l = 0; l < LAYERS; l++)
        for (int k = 0; k < KV_KINDS; k++) free(r->is.row[l][k]);
    kv_close(r->kv);
    offload_close(r->off);
    ckpt_close(r->ck);
}

/* Rows first.. of the oracle as `got` has them. */
static bool same(const rig *r, int l, int k, int64_t first, int64_t n, const uint8_t *got) {
    size_t row = r->kv->rows[l][k].row_bytes;
    return !memcmp(got, r->is.row[l][k] + (size_t)first * row, (size_t)n * row);
}

static void check_gather(rig *r, int l, dsv4_err *err) {
    int64_t n = r->is.n[l][KV_ENTRIES];
    int count = n < r->cfg.index_topk ? (int)n : r->cfg.index_topk;
    int32_t idx[8];
    const void *rows;
    size_t row = r->kv->rows[l][KV_ENTRIES].row_bytes;
    bool first = draw(4) == 0;
    for (int i = 0; i < count; i++) idx[i] = first ? i : (int32_t)draw((uint32_t)n);
    if (kv_gather(r->kv, l, first ? NULL : idx, count, &rows, err)) return;
    for (int i = 0; i < count; i++)
        CHECK(same(r, l, KV_ENTRIES, idx[i], 1, (const uint8_t *)rows + (size_t)i * row),
              "layer %d, row %d of %lld", l, idx[i], (long long)n);
}

/* One layer's turn with n more tokens; -1: a fault. */
static int turn(rig *r, int l, int n, dsv4_err *err) {
    int ratio = r->cfg.compress_ratios[l];
    int64_t pos = r->is.pos;
    kv_layer at;
    if (kv_begin(r->kv, l, n, &at, err)) return -1;
    for (int k = 0; k < KV_KINDS; k++) {
        kv_rows *rows = &r->kv->rows[l][k];
        int64_t *have = &r->is.n[l][k], more = rows->max ? (pos + n) / ratio - *have : 0;
        uint8_t *fresh = r->is.row[l][k] + (size_t)*have * rows->row_bytes;
        for (size_t i = 0; i < (size_t)more * rows->row_bytes; i++) fresh[i] = (uint8_t)draw(256);
        if (rows->max && kv_append(r->kv, l, (kv_kind)k, fresh, more, err)) return -1;
        *have += more;
        const uint8_t *all = k == KV_KEYS ? at.keys : at.entries;
        if (rows->max && (k == KV_KEYS || ratio != 4 || n > 1)) CHECK(all, "layer %d: none", l);
        if (all && rows->max) CHECK(same(r, l, k, 0, *have, all), "layer %d kind %d", l, k);
    }
    err->msg[0] = 0;
    if (ratio && !at.entries) check_gather(r, l, err);
    if (err->msg[0]) return -1;
    return kv_ahead(r->kv, (l + 1) % LAYERS, n, err);
}

/* Any part of any layer, copied out. */
static int copy_some(rig *r, dsv4_err *err) {
    int l = (int)draw(LAYERS), k = (int)draw(KV_KINDS);
    int64_t n = r->is.n[l][k], first = n ? draw((uint32_t)n) : 0;
    int64_t count = n ? draw((uint32_t)(n - first)) + 1 : 0;
    uint8_t *out = malloc(CTX / 4 * 256);
    int rc = kv_copy(r->kv, l, (kv_kind)k, first, count, out, err);
    if (!rc) CHECK(same(r, l, k, first, count, out), "copy of layer %d kind %d", l, k);
    free(out);
    return rc;
}

/* Random spans until the context is full; -1 at the first fault. */
static int walk(rig *r, int rounds, dsv4_err *err) {
    for (int i = 0; i < rounds && r->is.pos < CTX; i++) {
        int n = draw(3) ? 1 : 1 + (int)draw(3000);
        if (n > CTX - r->is.pos) n = (int)(CTX - r->is.pos);
        for (int l = 0; l < LAYERS; l++)
            if (turn(r, l, n, err)) return -1;
        r->is.pos += n;
        if (draw(5) == 0 && copy_some(r, err)) return -1;
    }
    return 0;
}

static kv_plan plan_of(uint64_t ram) {
    dsv4_config c = config();
    dsv4_err err;
    kv_plan p;
    kv_opts o = {.ctx = CTX, .n_blocks = LAYERS, .packed = true, .ram = ram, .dir = "/tmp"};
    if (kv_plan_make(&p, &c, &o, &err)) printf("FAIL test_kv.c: %s\n", err.msg), exit(1);
    return p;
}

/* Goal: what was appended is there, bit by bit, wherever it lies, in any order of spans; twice,
 * since a reset must leave nothing. */
static void test_kv_rows_are_the_same_wherever_they_lie(void) {
    kv_plan all = plan_of(0);
    const uint64_t ram[] = {0, all.least, all.least + all.index, all.ram - 1};
    for (size_t i = 0; i < 4; i++) {
        rig r;
        dsv4_err err;
        rig_open(&r, ram[i], NULL);
        CHECK(r.kv->plan.entries_in_file == (i > 0), "%zu: entries", i);
        CHECK(r.kv->plan.index_in_file == (i == 1), "%zu: index", i);
        for (int twice = 0; twice < 2; twice++) {
            CHECK(!walk(&r, ROUNDS, &err), "%s", err.msg);
            kv_reset(r.kv);
            r.is.pos = 0;
            memset(r.is.n, 0, sizeof r.is.n);
        }
        CHECK(i == 0 || r.kv->stats.blocks_read > 0, "nothing was gathered from the file");
        rig_close(&r);
    }
}

/* Goal: a token reads the blocks that its choice names, once; what a frame has, never again. */
static void test_kv_gather_reads_only_what_is_chosen(void) {
    rig r;
    dsv4_err err;
    const void *rows;
    const int32_t idx[] = {0, 1, 200, 201, 7000};
    rig_open(&r, plan_of(0).least, NULL);
    for (int l = 0; l < LAYERS; l++) CHECK(!turn(&r, l, CTX, &err), "%s", err.msg);
    size_t row = r.kv->rows[1][KV_ENTRIES].row_bytes, blocks = 0;
    for (size_t b = 0; b < CTX / 4 * row / BLOCK; b++)
        for (int i = 0; i < 5; i++)
            if ((size_t)idx[i] * row / BLOCK <= b &&
                ((size_t)(idx[i] + 1) * row - 1) / BLOCK >= b) {
                blocks++;
                break;
            }
    uint64_t read = r.kv->stats.read_bytes;
    CHECK(!kv_gather(r.kv, 1, idx, 5, &rows, &err), "%s", err.msg);
    CHECK(r.kv->stats.blocks_read == blocks, "%llu blocks and not %zu",
          (unsigned long long)r.kv->stats.blocks_read, blocks);
    CHECK(r.kv->stats.read_bytes - read == blocks * BLOCK, "other bytes");
    CHECK(!kv_gather(r.kv, 1, idx, 5, &rows, &err), "%s", err.msg);
    CHECK(r.kv->stats.blocks_read == blocks, "read again");
    rig_close(&r);
}

/* Goal: frames fewer than blocks: the hand goes round and what it takes is read again, right. */
static void test_kv_frames_are_taken_from_what_was_not_used(void) {
    rig r;
    dsv4_err err;
    rig_open(&r, plan_of(0).least, NULL);
    CHECK(r.kv->n_frames < r.kv->n_pages, "all blocks fit");
    for (int l = 0; l < LAYERS; l++) CHECK(!turn(&r, l, CTX, &err), "%s", err.msg);
    for (int i = 0; i < 2000; i++) {
        err.msg[0] = 0;
        check_gather(&r, i ? 1 + 2 * (int)draw(3) : 1, &err); /* the first frees the stage */
        CHECK(!err.msg[0], "%s", err.msg);
    }
    CHECK(r.kv->stats.blocks_read > r.kv->n_pages, "nothing was read again");
    CHECK(r.kv->stats.blocks_hit > 0, "nothing was kept");
    rig_close(&r);
}

/* Goal: whichever transfer fails, it is told; and after a reset all is well. */
static void test_kv_every_fault_is_told(void) {
    int n_faults = 0;
    for (int at = 1; ; at++) {
        rig r;
        dsv4_err err;
        rig_open(&r, plan_of(0).least, NULL);
        rng = 7;
        hook_moves = 0;
        hook_fail_at = at;
        int rc = walk(&r, 12, &err);
        bool failed = hook_moves >= at;
        hook_fail_at = 0;
        CHECK(rc == (failed ? -1 : 0), "transfer %d: %d", at, rc);
        if (rc) CHECK(!strcmp(err.msg, "the hook's fault"), "%s", err.msg);
        kv_reset(r.kv);
        r.is.pos = 0;
        memset(r.is.n, 0, sizeof r.is.n);
        CHECK(!walk(&r, 6, &err), "after a fault: %s", err.msg);
        rig_close(&r);
        if (!failed) break;
        n_faults++;
    }
    CHECK(n_faults > 20, "only %d transfers", n_faults);
    NOTE("%d transfers", n_faults);
}

/* Goal: Flash's sizes at a million tokens, by hand; what a budget refuses, and what it names. */
static void test_kv_plan_is_the_arithmetic_of_the_formats(void) {
    dsv4_config c = {.num_hidden_layers = 43, .head_dim = 512, .qk_rope_head_dim = 64,
                     .sliding_window = 128, .index_head_dim = 128, .index_topk = 512};
    for (int l = 2; l < 43; l++) c.compress_ratios[l] = l % 2 ? 128 : 4;
    kv_opts o = {.ctx = 1 << 20, .n_blocks = 43, .packed = true};
    kv_plan p;
    dsv4_err err;
    CHECK(!kv_plan_make(&p, &c, &o, &err), "%s", err.msg);
    CHECK(p.token_bytes == (584 + 68) / 4. * 21 + 584 / 128. * 20, "%g", p.token_bytes);
    CHECK(p.entries == 21ull * (1 << 18) * 584, "%llu", (unsigned long long)p.entries);
    CHECK(p.index == 21ull * (1 << 18) * 68 + 20ull * (1 << 13) * 584, "index");
    CHECK(p.ram < p.states + p.index + p.entries + (1 << 20), "more than there is");
    o.ram = p.least;
    CHECK(kv_plan_make(&p, &c, &o, &err) && strstr(err.msg, "--kv-dir"), "%s", err.msg);
    o.dir = "/tmp";
    CHECK(!kv_plan_make(&p, &c, &o, &err) && p.ram <= o.ram, "%s", err.msg);
    CHECK(p.index_in_file && p.entries_in_file, "the least keeps something in RAM");
    NOTE("%.0f bytes a token; at 1M %.2f GiB, at least %.2f GiB of it in RAM", p.token_bytes,
         (double)(p.index + p.entries) / (1 << 30), (double)p.least / (1 << 30));
    o.ram--;
    CHECK(kv_plan_make(&p, &c, &o, &err) && strstr(err.msg, "--kv-ram"), "%s", err.msg);
}

int main(void) {
    RUN(test_kv_plan_is_the_arithmetic_of_the_formats);
    RUN(test_kv_rows_are_the_same_wherever_they_lie);
    RUN(test_kv_gather_reads_only_what_is_chosen);
    RUN(test_kv_frames_are_taken_from_what_was_not_used);
    RUN(test_kv_every_fault_is_told);
    return check_done();
}
