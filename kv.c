/* kv.c -- where the rows of KV live: in RAM, in a file of one session, in files that outlive it.
 *
 *   states    windows, and what compressors carry      RAM, always
 *   index     index keys, HCA entries                  RAM, else the file: staged whole, in order,
 *                                                      one layer at a time
 *   entries   CSA entries                              RAM, else the file: staged whole for a
 *                                                      prompt, gathered block by block for a token
 *
 *   the file's rows of one layer   [........ whole blocks ........][tail: the last block, in RAM]
 *   the pool in RAM                [stage of index][stage of entries, or frames of 4 KiB blocks]
 *
 * A layer's turn: kv_begin, kv_append (what is new), kv_gather (what a token chose), kv_end; then
 * kv_ahead has the next layer's rows on their way while experts are computed.
 *
 * Invariants  1 rows only grow, until kv_reset()
 *             2 the file and the tail hold all rows but those that a stage got since kv_begin()
 *             3 a block that a frame holds is whole and is never written again
 *             4 a stage is not read into before what was written from it has landed
 *             5 no allocation after kv_open(); every byte of it is in kv_plan.ram
 * Contents    1 the plan   2 rows in RAM and in a file   3 parked context
 *             4 a session's parked context
 * Not here    what a row holds (kernels.cu), which rows are wanted (dsv4.c)                      */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK = 4096,                  /* what the file is read and written by                      */
    BOUNCE_BYTES = 256 << 10,       /* rows on their way between the file and elsewhere          */
};

/* === 1. The plan ============================================================================== */

enum { STAGE_INDEX, STAGE_ENTRIES, STAGES };

typedef struct {                   /* the entries or keys of one layer                          */
    size_t row_bytes;
    int64_t n, max;                /* rows that are in, and room for                            */
    int64_t n_filed;               /* of these the file and the tail have: invariant 2          */
    int stage;                     /* which of the stages takes it                              */
    uint8_t *rows;                 /* all of them; NULL: they are in the file                   */
    uint64_t off;                  /* in the file, from here on                                 */
    uint8_t *tail;                 /* [BLOCK]                                                   */
    size_t page;                   /* number of its first block among those that frames hold    */
} kv_rows;

typedef struct { int32_t page; uint32_t stamp; bool used; } kv_frame; /* page -1: none */

struct kv_cache {
    const dsv4_config *cfg;
    kv_opts opts;
    kv_plan plan;
    kv_stats stats;
    arena mem;
    offload *off;
    int file;
    kv_state *state;               /* [n_blocks]                                                */
    kv_rows (*rows)[KV_KINDS];     /* [n_blocks]                                                */
    uint8_t *bounce;
    uint8_t *stage[STAGES];
    kv_rows *staged[STAGES];       /* whose rows are there, or on their way                     */
    io_batch reading, writing;
    uint8_t *gathered;             /* [index_topk] rows                                         */
    kv_frame *frame;               /* [n_frames]; bytes at stage[STAGE_ENTRIES]                 */
    int32_t *frame_of;             /* [n_pages], -1: none                                       */
    size_t n_pages;
    uint32_t n_frames, hand, stamp; /* the clock's hand; a number for each kv_gather            */
    park_key *key;                 /* [ctx/SEGMENT_TOKENS + 2] before each segment              */
    uint8_t *park_rows, *park_states; /* of a segment: rows that are in the file; states        */
};

static uint64_t blocks_up(uint64_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }
static uint64_t blocks_down(uint64_t bytes) { return bytes / BLOCK * BLOCK; }

/* What a layer's compressor has still to see again: coff * ratio tokens of coff * d numbers. */
static int64_t carry_floats(int ratio, int d) {
    int coff = ratio == 4 ? 2 : 1;
    return (int64_t)coff * ratio * coff * d;
}

static kv_state take_state(arena *a, const dsv4_config *c, int ratio, size_t row_bytes) {
    kv_state s = {.ring = arena_take(a, (uint64_t)c->sliding_window * row_bytes)};
    if (!ratio) return s;
    uint64_t bytes = (uint64_t)carry_floats(ratio, c->head_dim) * sizeof(float);
    s.ring_kv = arena_take(a, bytes);
    s.ring_score = arena_take(a, bytes);
    if (ratio != 4) return s;
    bytes = (uint64_t)carry_floats(ratio, c->index_head_dim) * sizeof(float);
    s.index_ring_kv = arena_take(a, bytes);
    s.index_ring_score = arena_take(a, bytes);
    return s;
}

/* Room for one kind of rows of a layer: all of them, or a tail, a place in the file, and in *stage
 * the largest that it must hold. */
static void take_rows(kv_cache *kv, kv_rows *r, arena *a, bool in_file, uint64_t *stage) {
    uint64_t bytes = (uint64_t)r->max * r->row_bytes;
    if (!in_file) {
        r->rows = arena_take(a, bytes);
        return;
    }
    r->tail = arena_take(a, BLOCK);
    r->off = kv->plan.file;
    kv->plan.file += blocks_up(bytes);
    if (*stage < blocks_up(bytes)) *stage = blocks_up(bytes);
    if (r->stage != STAGE_ENTRIES) return;
    r->page = kv->n_pages;
    kv->n_pages += blocks_up(bytes) / BLOCK;
}

/* Frames for what is left of kv.opts.ram, over the stage for entries, at least `least` bytes. */
static void take_frames(kv_cache *kv, arena *a, uint64_t least) {
    const uint64_t each = BLOCK + sizeof(kv_frame), most = kv->n_pages * BLOCK;
    kv->frame_of = arena_take(a, kv->n_pages * sizeof *kv->frame_of);
    kv->gathered = arena_take(a, (uint64_t)kv->cfg->index_topk *
                                 kv_row_bytes(kv->cfg->head_dim, kv->cfg->qk_rope_head_dim,
                                              kv->opts.packed));
    uint64_t bytes = least, fixed = a->used + 2 * BLOCK;
    if (kv->opts.ram > fixed && (kv->opts.ram - fixed) / each * BLOCK > bytes)
        bytes = (kv->opts.ram - fixed) / each * BLOCK;
    if (bytes > most && most > least) bytes = most;
    kv->n_frames = (uint32_t)(bytes / BLOCK);
    kv->frame = arena_take(a, kv->n_frames * sizeof *kv->frame);
    kv->stage[STAGE_ENTRIES] = arena_take_blocks(a, bytes);
}

/* Hand out memory; with an arena that only counts, this is the plan. */
static void lay_out(kv_cache *kv, arena *a, bool index_in_file, bool entries_in_file) {
    const dsv4_config *c = kv->cfg;
    kv_plan *p = &kv->plan;
    uint64_t stage[STAGES] = {0}, rows[STAGES] = {0}, parked = 0;
    size_t row = kv_row_bytes(c->head_dim, c->qk_rope_head_dim, kv->opts.packed);
    size_t key = index_row_bytes(c->index_head_dim, kv->opts.packed);
    *p = (kv_plan){.index_in_file = index_in_file, .entries_in_file = entries_in_file};
    kv->n_pages = 0;
    kv->state = arena_take(a, (uint64_t)kv->opts.n_blocks * sizeof *kv->state);
    kv->rows = arena_take(a, (uint64_t)kv->opts.n_blocks * sizeof *kv->rows);
    for (int l = 0; l < kv->opts.n_blocks; l++) {
        kv_state s = take_state(a, c, c->compress_ratios[l], row);
        if (kv->state) kv->state[l] = s;
    }
    p->states = a->used;
    for (int l = 0; l < kv->opts.n_blocks; l++) {
        int ratio = c->compress_ratios[l];
        kv_rows r[KV_KINDS] = {{.row_bytes = row, .max = ratio ? kv->opts.ctx / ratio : 0,
                                .stage = ratio == 4 ? STAGE_ENTRIES : STAGE_INDEX},
                               {.row_bytes = key, .max = ratio == 4 ? kv->opts.ctx / ratio : 0,
                                .stage = STAGE_INDEX}};
        for (int k = 0; k < KV_KINDS; k++) {
            bool in_file = r[k].stage == STAGE_ENTRIES ? entries_in_file : index_in_file;
            if (r[k].max) take_rows(kv, &r[k], a, in_file, &stage[r[k].stage]);
            if (r[k].max && in_file) parked += (uint64_t)(SEGMENT_TOKENS / ratio + 1) * r[k].row_bytes;
            if (r[k].max) p->token_bytes += (double)r[k].row_bytes / ratio;
            rows[r[k].stage] += (uint64_t)r[k].max * r[k].row_bytes;
            if (kv->rows) kv->rows[l][k] = r[k];
        }
    }
    if (kv->opts.park) {
        kv->key = arena_take(a, ((uint64_t)kv->opts.ctx / SEGMENT_TOKENS + 2) * sizeof *kv->key);
        kv->park_rows = arena_take(a, parked);
        kv->park_states = arena_take(a, p->states);
    }
    p->index = rows[STAGE_INDEX];
    p->entries = rows[STAGE_ENTRIES];
    if (index_in_file || entries_in_file) kv->bounce = arena_take_blocks(a, BOUNCE_BYTES);
    if (index_in_file) kv->stage[STAGE_INDEX] = arena_take_blocks(a, stage[STAGE_INDEX]);
    /* all that a token may choose must find frames, each row in as many blocks as it may touch */
    uint64_t chosen = (uint64_t)c->index_topk * (blocks_up(row) / BLOCK + 1) * BLOCK;
    if (stage[STAGE_ENTRIES] < chosen) stage[STAGE_ENTRIES] = chosen;
    if (entries_in_file) take_frames(kv, a, stage[STAGE_ENTRIES]);
    p->stage = stage[STAGE_INDEX] * index_in_file + stage[STAGE_ENTRIES] * entries_in_file;
    p->ram = a->used;
}

int kv_plan_make(kv_plan *p, const dsv4_config *cfg, const kv_opts *o, dsv4_err *err) {
    kv_cache kv = {.cfg = cfg, .opts = *o};
    bool csa = false, other = false;
    for (int l = 0; l < o->n_blocks; l++) {
        csa |= cfg->compress_ratios[l] == 4;
        other |= cfg->compress_ratios[l] > 0;
    }
    kv.opts.ram = 1;                               /* the fewest frames */
    arena least = {0}, count;
    lay_out(&kv, &least, other, csa);
    kv.opts.ram = o->ram;
    for (int files = 0; files <= csa + other; files++) {
        count = (arena){0};
        lay_out(&kv, &count, files == csa + 1, csa && files > 0);
        if (!o->ram || count.used <= o->ram) break;
    }
    *p = kv.plan;
    p->least = least.used < p->ram ? least.used : p->ram;
    if (o->ram && p->ram > o->ram)
        return fail(err, "--kv-ram %.0fM is too small for a context of %lld tokens: at least %.0fM "
                    "are needed", (double)o->ram / (1 << 20), (long long)o->ctx,
                    (double)p->least / (1 << 20) + 1);
    if (p->file && !o->dir)
        return fail(err, "--kv-ram %.0fM holds not all of a context of %lld tokens and there is no "
                    "place for the rest: name a directory with --kv-dir", (double)o->ram / (1 << 20),
                    (long long)o->ctx);
    return 0;
}

/* === 2. Rows in RAM and in a file ============================================================= */

int kv_open(kv_cache **out, offload *off, const dsv4_config *cfg, const kv_opts *o,
            dsv4_err *err) {
    *out = NULL;
    kv_cache *kv = calloc(1, sizeof *kv);
    if (!kv) return fail(err, "out of memory for the KV cache");
    *kv = (kv_cache){.cfg = cfg, .opts = *o, .off = off, .file = -1};
    kv_plan p;
    if (kv_plan_make(&p, cfg, o, err) || arena_open(&kv->mem, p.ram, "the KV cache", err)) goto bad;
    lay_out(kv, &kv->mem, p.index_in_file, p.entries_in_file);
    assert(kv->plan.ram == p.ram);
    kv->plan.least = p.least;
    if (p.file && (kv->file = offload_raw_open(off, o->dir, p.file, err)) < 0) goto bad;
    if (o->park) kv->key[0] = o->model;
    kv_reset(kv);
    *out = kv;
    return 0;
bad:
    kv_close(kv);
    return -1;
}

void kv_close(kv_cache *kv) {
    dsv4_err ignored;
    if (!kv) return;
    (void)batch_wait(kv->off, &kv->reading, &ignored);
    (void)batch_wait(kv->off, &kv->writing, &ignored);
    arena_close(&kv->mem);
    free(kv);
}

static void frames_drop(kv_cache *kv) {
    for (uint32_t i = 0; i < kv->n_frames; i++) kv->frame[i] = (kv_frame){.page = -1};
    for (size_t i = 0; i < kv->n_pages; i++) kv->frame_of[i] = -1;
}

/* What was on its way and failed concerns nobody any more. */
void kv_reset(kv_cache *kv) {
    dsv4_err ignored;
    (void)batch_wait(kv->off, &kv->reading, &ignored);
    (void)batch_wait(kv->off, &kv->writing, &ignored);
    for (int l = 0; l < kv->opts.n_blocks; l++)
        for (int k = 0; k < KV_KINDS; k++) kv->rows[l][k].n = kv->rows[l][k].n_filed = 0;
    kv->staged[STAGE_INDEX] = kv->staged[STAGE_ENTRIES] = NULL;
    frames_drop(kv);
}

const kv_plan *kv_get_plan(const kv_cache *kv) { return &kv->plan; }
const kv_stats *kv_get_stats(const kv_cache *kv) { return &kv->stats; }
kv_state kv_get_state(const kv_cache *kv, int layer) { return kv->state[layer]; }

static int file_move(kv_cache *kv, io_batch *b, void *buf, uint64_t off, uint64_t bytes,
                     dsv4_err *err) {
    bool write = b == &kv->writing;
    *(write ? &kv->stats.written_bytes : &kv->stats.read_bytes) += bytes;
    return batch_add(kv->off, b, kv->file, write, buf, off, bytes, err);
}

static int wait_for(kv_cache *kv, io_batch *b, dsv4_err *err) {
    double begin = now_s();
    int rc = batch_wait(kv->off, b, err);
    kv->stats.wait_s += now_s() - begin;
    return rc;
}

/* Have all rows of r on their way to its stage. */
static int stage_load(kv_cache *kv, kv_rows *r, dsv4_err *err) {
    if (kv->staged[r->stage] == r) return 0;
    if (wait_for(kv, &kv->writing, err)) return -1;
    if (r->stage == STAGE_ENTRIES) frames_drop(kv);
    uint8_t *to = kv->stage[r->stage];
    uint64_t bytes = (uint64_t)r->n * r->row_bytes, whole = blocks_down(bytes);
    assert(r->n == r->n_filed);
    kv->staged[r->stage] = r;
    memcpy(to + whole, r->tail, bytes - whole);
    return whole ? file_move(kv, &kv->reading, to, r->off, whole, err) : 0;
}

int kv_ahead(kv_cache *kv, int layer, int n, dsv4_err *err) {
    for (int k = 0; k < KV_KINDS; k++) {
        kv_rows *r = &kv->rows[layer][k];
        bool gather = n == 1 && r->stage == STAGE_ENTRIES;
        if (r->max && !r->rows && !gather && stage_load(kv, r, err)) return -1;
    }
    return 0;
}

/* Where all rows are: in RAM, in the stage; NULL: in the file. */
static uint8_t *rows_at(const kv_cache *kv, const kv_rows *r) {
    return r->rows ? r->rows : kv->staged[r->stage] == r ? kv->stage[r->stage] : NULL;
}

int kv_begin(kv_cache *kv, int layer, int n, kv_layer *out, dsv4_err *err) {
    if (kv_ahead(kv, layer, n, err)) return -1;
    if (wait_for(kv, &kv->reading, err)) {
        kv->staged[STAGE_INDEX] = kv->staged[STAGE_ENTRIES] = NULL;
        return -1;
    }
    const kv_rows *r = kv->rows[layer];
    *out = (kv_layer){rows_at(kv, &r[KV_ENTRIES]), rows_at(kv, &r[KV_KEYS])};
    return 0;
}

/* Behind what the file has: through the tail, whole blocks of it to the file. */
static int file_append(kv_cache *kv, kv_rows *r, const uint8_t *rows, uint64_t bytes,
                       dsv4_err *err) {
    uint64_t at = (uint64_t)r->n_filed * r->row_bytes;
    while (bytes) {
        uint64_t in_tail = at % BLOCK;
        uint64_t take = bytes < BOUNCE_BYTES - in_tail ? bytes : BOUNCE_BYTES - in_tail;
        uint64_t whole = blocks_down(in_tail + take);
        if (wait_for(kv, &kv->writing, err)) return -1;
        memcpy(kv->bounce, r->tail, in_tail);
        memcpy(kv->bounce + in_tail, rows, take);
        memcpy(r->tail, kv->bounce + whole, in_tail + take - whole);
        if (whole && file_move(kv, &kv->writing, kv->bounce, r->off + at - in_tail, whole, err))
            return -1;
        rows += take, bytes -= take, at += take;
    }
    return 0;
}

int kv_append(kv_cache *kv, int layer, kv_kind kind, const void *rows, int64_t n, dsv4_err *err) {
    kv_rows *r = &kv->rows[layer][kind];
    uint8_t *at = rows_at(kv, r);
    assert(n >= 0 && n <= r->max - r->n);
    uint64_t bytes = (uint64_t)n * r->row_bytes;
    if (at) memcpy(at + (uint64_t)r->n * r->row_bytes, rows, bytes);
    else if (file_append(kv, r, rows, bytes, err)) return -1;
    r->n += n;
    if (!at) r->n_filed = r->n;
    return 0;
}

int kv_end(kv_cache *kv, int layer, dsv4_err *err) {
    for (int k = 0; k < KV_KINDS; k++) {
        kv_rows *r = &kv->rows[layer][k];
        if (r->rows || r->n_filed == r->n) continue;
        uint8_t *stage = kv->stage[r->stage];
        uint64_t from = blocks_down((uint64_t)r->n_filed * r->row_bytes);
        uint64_t end = (uint64_t)r->n * r->row_bytes, whole = blocks_down(end);
        assert(kv->staged[r->stage] == r);
        memcpy(r->tail, stage + whole, end - whole);
        r->n_filed = r->n;
        if (whole > from && file_move(kv, &kv->writing, stage + from, r->off + from, whole - from,
                                      err))
            return -1;
    }
    return 0;
}

/* The frame of a block, whose read is begun if it is not in; the clock's hand passes those that
 * this gather uses, and once those that were used since it last came by. */
static int frame_need(kv_cache *kv, const kv_rows *r, uint64_t block, dsv4_err *err) {
    int32_t *f = &kv->frame_of[r->page + block];
    bool missing = *f < 0;
    if (missing) {
        kv_frame *at;
        while ((at = &kv->frame[kv->hand])->stamp == kv->stamp || at->used) {
            at->used = false;
            kv->hand = (kv->hand + 1) % kv->n_frames;
        }
        if (at->page >= 0) kv->frame_of[at->page] = -1;
        *f = (int32_t)kv->hand;
        at->page = (int32_t)(r->page + block);
    }
    kv->frame[*f].used = true;
    kv->frame[*f].stamp = kv->stamp;
    kv->stats.blocks_hit += !missing;
    kv->stats.blocks_read += missing;
    return missing ? file_move(kv, &kv->reading, kv->stage[STAGE_ENTRIES] + (uint64_t)*f * BLOCK,
                               r->off + block * BLOCK, BLOCK, err) : 0;
}

int kv_gather(kv_cache *kv, int layer, const int32_t *idx, int count, const void **rows,
              dsv4_err *err) {
    kv_rows *r = &kv->rows[layer][KV_ENTRIES];
    uint64_t tail = blocks_down((uint64_t)r->n * r->row_bytes);
    assert(!rows_at(kv, r) && count <= kv->cfg->index_topk);
    if (wait_for(kv, &kv->writing, err)) return -1;
    kv->staged[STAGE_ENTRIES] = NULL;
    kv->stamp++;
    int rc = 0;
    for (int i = 0; i < count && !rc; i++) {
        uint64_t at = (uint64_t)(idx ? idx[i] : i) * r->row_bytes, end = at + r->row_bytes;
        for (uint64_t b = at / BLOCK; b * BLOCK < end && b * BLOCK < tail && !rc; b++)
            rc = frame_need(kv, r, b, err);
    }
    dsv4_err late;
    if (wait_for(kv, &kv->reading, rc ? &late : err)) rc = -1;
    if (rc) frames_drop(kv);       /* some of them hold nothing */
    for (int i = 0; i < count && !rc; i++) {
        uint64_t at = (uint64_t)(idx ? idx[i] : i) * r->row_bytes, n;
        for (uint64_t done = 0; done < r->row_bytes; done += n, at += n) {
            n = BLOCK - at % BLOCK < r->row_bytes - done ? BLOCK - at % BLOCK
                                                         : r->row_bytes - done;
            const uint8_t *from = at >= tail ? r->tail : kv->stage[STAGE_ENTRIES] +
                                  (uint64_t)kv->frame_of[r->page + at / BLOCK] * BLOCK;
            memcpy(kv->gathered + (uint64_t)i * r->row_bytes + done, from + at % BLOCK, n);
        }
    }
    *rows = kv->gathered;
    return rc;
}

int kv_copy(kv_cache *kv, int layer, kv_kind kind, int64_t first, int64_t n, void *to,
            dsv4_err *err) {
    kv_rows *r = &kv->rows[layer][kind];
    uint64_t at = (uint64_t)first * r->row_bytes, bytes = (uint64_t)n * r->row_bytes;
    uint64_t tail = blocks_down((uint64_t)r->n * r->row_bytes);
    const uint8_t *from = rows_at(kv, r);
    assert(first >= 0 && n >= 0 && first + n <= r->n);
    if (from) memcpy(to, from + at, bytes);
    if (from || !bytes) return 0;
    if (wait_for(kv, &kv->writing, err)) return -1;
    for (uint8_t *p = to; bytes;) {
        uint64_t skip = at % BLOCK, most = at >= tail ? BLOCK : tail - (at - skip);
        if (most > BOUNCE_BYTES) most = BOUNCE_BYTES;
        uint64_t take = bytes < most - skip ? bytes : most - skip;
        if (at < tail && (file_move(kv, &kv->reading, kv->bounce, r->off + at - skip,
                                    blocks_up(skip + take), err) ||
                          wait_for(kv, &kv->reading, err)))
            return -1;
        memcpy(p, (at < tail ? kv->bounce : r->tail) + skip, take);
        p += take, at += take, bytes -= take;
    }
    return 0;
}

/* === 3. Parked context ======================================================================== */

/* === 4. A session's parked context ============================================================
 * A segment's frames: entries and keys of each block, then one of all states at its end.  A saved
 * session has the rows behind its last segment, the states where it stands, and the caller's own. */

typedef enum { MOVE_COUNT, MOVE_SAVE, MOVE_LOAD } move_mode;

/* Move what a layer carries beyond its rows, between its rings at position pos and `at`: the window,
 * and the tokens that its compressors want once more.  Returns its bytes, which pos decides. */
static uint64_t state_move(const kv_cache *kv, int layer, int64_t pos, uint8_t *at,
                           move_mode mode) {
    const dsv4_config *c = kv->cfg;
    const kv_state none = {NULL}, *s = mode == MOVE_COUNT ? &none : &kv->state[layer];
    int ratio = c->compress_ratios[layer], coff = ratio == 4 ? 2 : 1;
    int64_t window = c->sliding_window, group = ratio ? (pos / ratio - coff + 1) * ratio : pos;
    size_t main = (size_t)(coff * c->head_dim) * sizeof(float);
    size_t index = (size_t)(coff * c->index_head_dim) * sizeof(float);
    const struct { void *ring; size_t row; int64_t len, first; } part[] = {
        {s->ring, kv_row_bytes(c->head_dim, c->qk_rope_head_dim, kv->opts.packed), window,
         pos - window},
        {s->ring_kv, main, coff * ratio, group}, {s->ring_score, main, coff * ratio, group},
        {s->index_ring_kv, index, coff * ratio, group},
        {s->index_ring_score, index, coff * ratio, group},
    };
    uint64_t bytes = 0;
    int n_parts = !ratio ? 1 : ratio == 4 ? 5 : 3;
    for (int i = 0; i < n_parts; i++)
        for (int64_t j = part[i].first > 0 ? part[i].first : 0; j < pos; j++) {
            if (mode == MOVE_COUNT) {
                bytes += part[i].row;
                continue;
            }
            uint8_t *row = (uint8_t *)part[i].ring + (uint64_t)(j % part[i].len) * part[i].row;
            if (mode == MOVE_SAVE) memcpy(at + bytes, row, part[i].row);
            if (mode == MOVE_LOAD) memcpy(row, at + bytes, part[i].row);
            bytes += part[i].row;
        }
    return bytes;
}

static uint64_t states_move(const kv_cache *kv, int64_t pos, uint8_t *at, move_mode mode) {
    uint64_t bytes = 0;
    for (int l = 0; l < kv->opts.n_blocks; l++)
        bytes += state_move(kv, l, pos, mode == MOVE_COUNT ? NULL : at + bytes, mode);
    return bytes;
}

uint64_t kv_mark_bytes(const dsv4_config *cfg, const kv_opts *o) {
    kv_cache kv = {.cfg = cfg, .opts = *o};
    return states_move(&kv, o->ctx / SEGMENT_TOKENS * SEGMENT_TOKENS, NULL, MOVE_COUNT);
}

void kv_mark(const kv_cache *kv, int layer, int64_t pos, uint8_t *mark) {
    for (int l = 0; l < layer; l++) mark += state_move(kv, l, pos, NULL, MOVE_COUNT);
    (void)state_move(kv, layer, pos, mark, MOVE_SAVE);
}

/* The frames of positions pos0 .. pos1-1 [2 * n_blocks], rows in RAM where they are, those of the
 * file in kv.park_rows and copied there to be saved. */
static int rows_frames(kv_cache *kv, int64_t pos0, int64_t pos1, move_mode mode, park_frame *f,
                       dsv4_err *err) {
    uint8_t *at = kv->park_rows;
    for (int l = 0; l < kv->opts.n_blocks; l++)
        for (int k = 0; k < KV_KINDS; k++, f++) {
            const kv_rows *r = &kv->rows[l][k];
            int ratio = kv->cfg->compress_ratios[l];
            int64_t first = ratio ? pos0 / ratio : 0, n = ratio ? pos1 / ratio - first : 0;
            *f = (park_frame){NULL, r->max ? (uint64_t)n * r->row_bytes : 0};
            if (mode == MOVE_COUNT || !f->bytes) continue;
            f->data = r->rows ? r->rows + (uint64_t)first * r->row_bytes : at;
            if (r->rows) continue;
            at += f->bytes;
            if (mode == MOVE_SAVE && kv_copy(kv, l, (kv_kind)k, first, n, f->data, err)) return -1;
        }
    return 0;
}

/* Rows that came as frames are in now. */
static int rows_accept(kv_cache *kv, const park_frame *f, dsv4_err *err) {
    for (int l = 0; l < kv->opts.n_blocks; l++)
        for (int k = 0; k < KV_KINDS; k++, f++) {
            kv_rows *r = &kv->rows[l][k];
            int64_t n = r->max ? (int64_t)(f->bytes / r->row_bytes) : 0;
            if (r->rows) r->n += n, r->n_filed = r->n;
            else if (n && kv_append(kv, l, (kv_kind)k, f->data, n, err)) return -1;
        }
    return 0;
}

/* What a file tells of segment number `segment`, or of its first n tokens. */
static park_info segment_info(kv_cache *kv, int64_t segment, const int32_t *tokens, int n) {
    park_info info = {.before = kv->key[segment], .pos = segment * SEGMENT_TOKENS, .n_tokens = n,
                      .n_frames = KV_KINDS * kv->opts.n_blocks + 1};
    memcpy(info.model, kv->cfg->name, sizeof info.model);
    info.key = kv->key[segment + 1] = park_next(info.before, tokens + info.pos, n);
    return info;
}

int kv_park(kv_cache *kv, const int32_t *tokens, int64_t pos0, int64_t pos1, uint8_t *marks,
            dsv4_err *err) {
    park_frame frame[PARK_FRAMES];
    for (int64_t i = pos0 / SEGMENT_TOKENS; i < pos1 / SEGMENT_TOKENS; i++) {
        park_info info = segment_info(kv, i, tokens, SEGMENT_TOKENS);
        int64_t end = info.pos + SEGMENT_TOKENS;
        park_frame *states = &frame[info.n_frames - 1];
        *states = (park_frame){marks, states_move(kv, end, NULL, MOVE_COUNT)};
        marks += kv_mark_bytes(kv->cfg, &kv->opts);
        if (park_has(kv->opts.park, info.key)) continue;
        if (rows_frames(kv, info.pos, end, MOVE_SAVE, frame, err) ||
            park_put(kv->opts.park, NULL, &info, tokens + info.pos, frame, err))
            return -1;
    }
    return 0;
}

/* Read a segment's rows, its states, or both; 1: they are in, 0: it is not to be had. */
static int segment_get(kv_cache *kv, int64_t segment, const int32_t *tokens, bool rows,
                       bool states, dsv4_err *err) {
    park_frame frame[PARK_FRAMES];
    park_info info = segment_info(kv, segment, tokens, SEGMENT_TOKENS);
    int64_t end = info.pos + SEGMENT_TOKENS;
    if (rows_frames(kv, info.pos, end, rows ? MOVE_LOAD : MOVE_COUNT, frame, err)) return -1;
    frame[info.n_frames - 1] = (park_frame){states ? kv->park_states : NULL,
                                            states_move(kv, end, NULL, MOVE_COUNT)};
    int got = park_get(kv->opts.park, &info, tokens + info.pos, frame, err);
    if (got == 1 && rows && rows_accept(kv, frame, err)) return -1;
    if (got == 1 && states) states_move(kv, end, kv->park_states, MOVE_LOAD);
    return got;
}

int64_t kv_resume(kv_cache *kv, const int32_t *tokens, int64_t n, dsv4_err *err) {
    int64_t most = 0, done = 0;
    int got = 1;
    kv_reset(kv);
    while (most < (n - 1) / SEGMENT_TOKENS &&
           park_has(kv->opts.park, segment_info(kv, most, tokens, SEGMENT_TOKENS).key))
        most++;
    while (done < most && (got = segment_get(kv, done, tokens, true, done + 1 == most, err)) == 1)
        done++;
    if (got == 0 && done)          /* one was damaged: go on from the end of the one before it */
        got = segment_get(kv, done - 1, tokens, false, true, err);
    if (got < 0) return -1;
    if (got == 0) {
        done = 0;
        kv_reset(kv);
    }
    return done * SEGMENT_TOKENS;
}

int kv_save(kv_cache *kv, const char *name, const int32_t *tokens, int64_t pos, park_frame extra,
            dsv4_err *err) {
    park_frame frame[PARK_FRAMES];
    int64_t segment = pos / SEGMENT_TOKENS;
    park_info info = segment_info(kv, segment, tokens, (int)(pos % SEGMENT_TOKENS));
    info.n_tokens = (int32_t)pos;
    info.n_frames++;
    frame[info.n_frames - 2] = (park_frame){kv->park_states, states_move(kv, pos, kv->park_states,
                                                                         MOVE_SAVE)};
    frame[info.n_frames - 1] = extra;
    if (rows_frames(kv, info.pos, pos, MOVE_SAVE, frame, err)) return -1;
    return park_put(kv->opts.park, name, &info, tokens, frame, err);
}

/* The rows and states of a session behind its last segment, where they are of the right sizes. */
static int tail_accept(kv_cache *kv, int64_t pos, int64_t n, const park_frame *f, dsv4_err *err) {
    park_frame want[PARK_FRAMES];
    int n_rows = KV_KINDS * kv->opts.n_blocks;
    if (rows_frames(kv, pos, n, MOVE_COUNT, want, err)) return -1;
    want[n_rows].bytes = states_move(kv, n, NULL, MOVE_COUNT);
    for (int i = 0; i <= n_rows; i++)
        if (f[i].bytes != want[i].bytes) return fail(err, "its frames have other sizes");
    for (int i = 0; i < n_rows; i++) {
        const kv_rows *r = &kv->rows[i / KV_KINDS][i % KV_KINDS];
        int64_t rows = r->max ? (int64_t)(f[i].bytes / r->row_bytes) : 0;
        if (rows && kv_append(kv, i / KV_KINDS, (kv_kind)(i % KV_KINDS), f[i].data, rows, err))
            return -1;
    }
    states_move(kv, n, f[n_rows].data, MOVE_LOAD);
    return 0;
}

int64_t kv_load(kv_cache *kv, const char *name, int32_t **tokens, int64_t *n, park_frame *extra,
                dsv4_err *err) {
    park_frame frame[PARK_FRAMES] = {{0}};
    park_info info;
    int64_t pos = -1, segment = 0;
    int got = park_load(kv->opts.park, name, &info, tokens, frame, err), last = info.n_frames - 1;
    if (got < 0) return -1;
    if (got == 0) return fail(err, "there is no session %s", name);
    *n = info.n_tokens;
    bool ours = last == KV_KINDS * kv->opts.n_blocks + 1 && info.pos >= 0 &&
                info.pos == *n / SEGMENT_TOKENS * SEGMENT_TOKENS;
    if (ours && *n >= kv->opts.ctx) {
        fail(err, "session %s has %lld tokens and the context is %lld; raise --ctx", name,
             (long long)*n, (long long)kv->opts.ctx);
    } else {
        for (; ours && segment < info.pos / SEGMENT_TOKENS; segment++)
            (void)segment_info(kv, segment, *tokens, SEGMENT_TOKENS);
        park_key key = ours ? segment_info(kv, segment, *tokens, (int)(*n - info.pos)).key
                            : (park_key){{0}};
        if (!ours || memcmp(&key, &info.key, sizeof key))
            fail(err, "session %s is of another model or of another version of dsv4", name);
        else if ((pos = kv_resume(kv, *tokens, info.pos + 1, err)) == info.pos)
            pos = tail_accept(kv, pos, *n, frame, err) ? -1 : *n;
    }
    for (int i = 0; i <= last; i++)
        if (i < last || pos < 0) free(frame[i].data);
    if (pos < 0) free(*tokens);
    else *extra = frame[last];
    return pos;
}
