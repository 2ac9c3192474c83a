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
 * A layer's turn: kv_begin, kv_append (what is new), kv_gather (what a token chose); then kv_ahead
 * has the next layer's rows on their way while experts are computed.
 *
 * Invariants  1 rows only grow, until kv_reset()
 *             2 the file and the tail hold all rows, also of a layer that is staged
 *             3 a block that a frame holds is whole and is never written again
 *             4 no allocation after kv_open(); every byte of it is in kv_plan.ram
 * Contents    1 the plan   2 rows in RAM and in a file   3 parked context
 *             4 a session's parked context
 * Not here    what a row holds (kernels.cu), which rows are wanted (dsv4.c)                      */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

enum {
    BLOCK = 4096,                  /* what the file is read and written by                      */
    BOUNCE_BYTES = 256 << 10,      /* rows on their way between the file and elsewhere          */
};

/* === 1. The plan ============================================================================== */
enum { STAGE_INDEX, STAGE_ENTRIES, STAGES };

typedef struct {                   /* the entries or keys of one layer                          */
    size_t row_bytes;
    int64_t n, max;                /* rows that are in, and room for                            */
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

static uint64_t lesser(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t blocks_up(uint64_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }
static uint64_t blocks_down(uint64_t bytes) { return bytes / BLOCK * BLOCK; }

/* The rings of a layer, in the order of kv_state's: the window, then what its compressors have yet
 * to see again, coff * ratio tokens of coff * d numbers.  Their number. */
enum { MAX_RINGS = 5 };
typedef struct { size_t row; int64_t len; } ring_shape;
static_assert(sizeof(kv_state) == MAX_RINGS * sizeof(void *), "pointers to rings");

static int rings_of(const kv_cache *kv, int l, ring_shape ring[MAX_RINGS]) {
    const dsv4_config *c = kv->cfg;
    int ratio = c->compress_ratios[l], coff = ratio == 4 ? 2 : 1;
    size_t row = kv_row_bytes(c->head_dim, c->qk_rope_head_dim, kv->opts.packed);
    ring[0] = (ring_shape){row, c->sliding_window};
    for (int i = 1; i < MAX_RINGS; i++) {
        int d = i < 3 ? c->head_dim : c->index_head_dim;
        ring[i] = (ring_shape){(size_t)(coff * d) * sizeof(float), coff * ratio};
    }
    return ratio == 4 ? 5 : ratio ? 3 : 1;
}

/* Room for one kind of rows of a layer: all of them, or a tail, a place in the file, and in *stage
 * the largest that it must hold. */
static void take_rows(kv_cache *kv, kv_rows *r, arena *a, bool in_file, uint64_t *stage) {
    uint64_t bytes = (uint64_t)r->max * r->row_bytes, blocks = blocks_up(bytes);
    *(r->stage == STAGE_ENTRIES ? &kv->plan.entries : &kv->plan.index) += bytes;
    if (!in_file) {
        r->rows = arena_take(a, bytes);
        return;
    }
    r->tail = arena_take(a, BLOCK);
    r->off = kv->plan.file;
    kv->plan.file += blocks;
    if (*stage < blocks) *stage = blocks;
    r->page = kv->n_pages;
    if (r->stage == STAGE_ENTRIES) kv->n_pages += blocks / BLOCK;
}

/* Frames for what is left of kv.opts.ram, over the stage for entries, at least `least` bytes. */
static void take_frames(kv_cache *kv, arena *a, uint64_t least) {
    const uint64_t each = BLOCK + sizeof(kv_frame);
    kv->frame_of = arena_take(a, kv->n_pages * sizeof *kv->frame_of);
    uint64_t fixed = a->used + 2 * BLOCK;
    uint64_t fit = kv->opts.ram > fixed ? (kv->opts.ram - fixed) / each * BLOCK : 0;
    uint64_t bytes = lesser(fit, kv->n_pages * BLOCK);
    if (bytes < least) bytes = least;
    kv->n_frames = (uint32_t)(bytes / BLOCK);
    kv->frame = arena_take(a, kv->n_frames * sizeof *kv->frame);
    kv->stage[STAGE_ENTRIES] = arena_take_blocks(a, bytes);
}

/* Hand out memory; with an arena that only counts, this is the plan. */
static void lay_out(kv_cache *kv, arena *a, bool index_in_file, bool entries_in_file) {
    const dsv4_config *c = kv->cfg;
    kv_plan *p = &kv->plan;
    uint64_t stage[STAGES] = {0}, parked = 0, n_blocks = (uint64_t)kv->opts.n_blocks;
    size_t row = kv_row_bytes(c->head_dim, c->qk_rope_head_dim, kv->opts.packed);
    size_t key = index_row_bytes(c->index_head_dim, kv->opts.packed);
    *p = (kv_plan){.index_in_file = index_in_file, .entries_in_file = entries_in_file};
    kv->n_pages = 0;
    kv->state = arena_take(a, n_blocks * sizeof *kv->state);
    kv->rows = arena_take(a, n_blocks * sizeof *kv->rows);
    p->states = a->used;
    for (int l = 0; l < kv->opts.n_blocks; l++) {
        int ratio = c->compress_ratios[l], n_kinds = ratio == 4 ? 2 : ratio > 0;
        ring_shape ring[MAX_RINGS];
        void *at[MAX_RINGS] = {NULL};
        uint64_t before = a->used;
        for (int i = 0, n = rings_of(kv, l, ring); i < n; i++)
            at[i] = arena_take(a, ring[i].row * (uint64_t)ring[i].len);
        p->states += a->used - before;
        if (kv->state) memcpy(&kv->state[l], at, sizeof at);
        for (int k = 0; k < n_kinds; k++) {
            kv_rows r = {.row_bytes = k == KV_KEYS ? key : row, .max = kv->opts.ctx / ratio,
                         .stage = k == KV_ENTRIES && ratio == 4 ? STAGE_ENTRIES : STAGE_INDEX};
            bool in_file = r.stage == STAGE_ENTRIES ? entries_in_file : index_in_file;
            take_rows(kv, &r, a, in_file, &stage[r.stage]);
            p->token_bytes += (double)r.row_bytes / ratio;
            if (in_file) parked += (uint64_t)(SEGMENT_TOKENS / ratio + 1) * r.row_bytes;
            if (kv->rows) kv->rows[l][k] = r;
        }
    }
    if (kv->opts.park) {
        kv->key = arena_take(a, ((uint64_t)kv->opts.ctx / SEGMENT_TOKENS + 2) * sizeof *kv->key);
        kv->park_rows = arena_take(a, parked);
        kv->park_states = arena_take(a, p->states);
    }
    if (index_in_file || entries_in_file) kv->bounce = arena_take_blocks(a, BOUNCE_BYTES);
    if (index_in_file) kv->stage[STAGE_INDEX] = arena_take_blocks(a, stage[STAGE_INDEX]);
    if (entries_in_file) {
        /* all that a token may choose must find frames, each in as many blocks as it may touch */
        uint64_t chosen = (uint64_t)c->index_topk * (blocks_up(row) / BLOCK + 1) * BLOCK;
        if (stage[STAGE_ENTRIES] < chosen) stage[STAGE_ENTRIES] = chosen;
        kv->gathered = arena_take(a, (uint64_t)c->index_topk * row);
        take_frames(kv, a, stage[STAGE_ENTRIES]);
    }
    p->stage = stage[STAGE_INDEX] + stage[STAGE_ENTRIES];
    p->ram = a->used;
}

int kv_plan_make(kv_plan *p, const dsv4_config *cfg, const kv_opts *o, dsv4_err *err) {
    kv_cache kv = {.cfg = cfg, .opts = *o};
    arena least = {0}, count = {0};
    lay_out(&kv, &count, false, false);
    bool csa = kv.plan.entries > 0, any = kv.plan.index > 0;
    for (int files = 1; o->ram && count.used > o->ram && files <= csa + any; files++) {
        count = (arena){0};
        lay_out(&kv, &count, files == csa + 1, csa);
    }
    *p = kv.plan;
    kv.opts.ram = 1;                               /* the fewest frames */
    lay_out(&kv, &least, any, csa);
    p->least = lesser(least.used, p->ram);
    if (o->ram && p->ram > o->ram)
        return fail(err, "--kv-ram %.0fM is too small for a context of %lld tokens: at least %.0fM "
                    "are needed", (double)o->ram / (1 << 20), (long long)o->ctx,
                    (double)p->least / (1 << 20) + 1);
    if (p->file && !o->dir)
        return fail(err, "--kv-ram %.0fM holds not all of a context of %lld tokens and there is no "
                    "place for the rest: name a directory with --kv-dir",
                    (double)o->ram / (1 << 20), (long long)o->ctx);
    return 0;
}

/* === 2. Rows in RAM and in a file ============================================================= */
int kv_open(kv_cache **out, offload *off, const dsv4_config *cfg, const kv_opts *o,
            dsv4_err *err) {
    *out = NULL;
    kv_cache *kv = calloc(1, sizeof *kv);
    if (!kv) return fail(err, "out of memory for the KV cache");
    *kv = (kv_cache){.cfg = cfg, .opts = *o, .off = off, .file = -1,
                      .mem.gpu = o->gpu};
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
    if (!kv) return;
    if (kv->rows) kv_reset(kv);
    if (kv->file >= 0) offload_raw_close(kv->off, kv->file);
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
        for (int k = 0; k < KV_KINDS; k++) kv->rows[l][k].n = 0;
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

int kv_ahead(kv_cache *kv, int layer, int n, dsv4_err *err) {
    for (int k = 0; k < KV_KINDS; k++) {
        kv_rows *r = &kv->rows[layer][k];
        bool gather = n == 1 && r->stage == STAGE_ENTRIES;
        if (!r->max || r->rows || gather || kv->staged[r->stage] == r) continue;
        if (wait_for(kv, &kv->writing, err)) return -1;
        if (r->stage == STAGE_ENTRIES) frames_drop(kv);
        uint8_t *to = kv->stage[r->stage];
        uint64_t bytes = (uint64_t)r->n * r->row_bytes, whole = blocks_down(bytes);
        kv->staged[r->stage] = r;
        memcpy(to + whole, r->tail, bytes - whole);
        if (whole && file_move(kv, &kv->reading, to, r->off, whole, err)) return -1;
    }
    return 0;
}

/* Where all rows are: in RAM, in the stage; NULL: in the file. */
static uint8_t *rows_at(const kv_cache *kv, const kv_rows *r) {
    return r->rows ? r->rows : kv->staged[r->stage] == r ? kv->stage[r->stage] : NULL;
}

int kv_begin(kv_cache *kv, int layer, int n, kv_layer *out, dsv4_err *err) {
    if (kv_ahead(kv, layer, n, err) || wait_for(kv, &kv->reading, err)) return -1;
    const kv_rows *r = kv->rows[layer];
    *out = (kv_layer){rows_at(kv, &r[KV_ENTRIES]), rows_at(kv, &r[KV_KEYS])};
    return 0;
}

/* Rows from number r->n on: through the tail, whole blocks of it to the file. */
static int file_append(kv_cache *kv, kv_rows *r, const uint8_t *rows, int64_t n, dsv4_err *err) {
    uint64_t at = (uint64_t)r->n * r->row_bytes, end = at + (uint64_t)n * r->row_bytes;
    while (at < end) {
        uint64_t in_tail = at % BLOCK, take = lesser(end - at, BOUNCE_BYTES - in_tail);
        uint64_t whole = blocks_down(in_tail + take);
        if (wait_for(kv, &kv->writing, err)) return -1;
        memcpy(kv->bounce, r->tail, in_tail);
        memcpy(kv->bounce + in_tail, rows, take);
        memcpy(r->tail, kv->bounce + whole, in_tail + take - whole);
        if (whole && file_move(kv, &kv->writing, kv->bounce, r->off + at - in_tail, whole, err))
            return -1;
        rows += take;
        at += take;
    }
    return 0;
}

int kv_append(kv_cache *kv, int layer, kv_kind kind, const void *rows, int64_t n, dsv4_err *err) {
    kv_rows *r = &kv->rows[layer][kind];
    uint8_t *all = rows_at(kv, r), *at = all ? all + (uint64_t)r->n * r->row_bytes : NULL;
    assert(n >= 0 && n <= r->max - r->n);
    if (at && at != rows) memcpy(at, rows, (uint64_t)n * r->row_bytes);
    if (!r->rows && file_append(kv, r, rows, n, err)) return -1;
    r->n += n;
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
    for (int i = 0; i < count; i++) {
        uint64_t at = (uint64_t)(idx ? idx[i] : i) * r->row_bytes, end = at + r->row_bytes;
        for (uint64_t b = at / BLOCK; b * BLOCK < end && b * BLOCK < tail; b++)
            if (frame_need(kv, r, b, err)) return -1;
    }
    if (wait_for(kv, &kv->reading, err)) return -1;
    for (int i = 0; i < count; i++) {
        uint64_t at = (uint64_t)(idx ? idx[i] : i) * r->row_bytes, n;
        for (uint64_t done = 0; done < r->row_bytes; done += n, at += n) {
            n = lesser(BLOCK - at % BLOCK, r->row_bytes - done);
            const uint8_t *from = at >= tail ? r->tail : kv->stage[STAGE_ENTRIES] +
                                  (uint64_t)kv->frame_of[r->page + at / BLOCK] * BLOCK;
            memcpy(kv->gathered + (uint64_t)i * r->row_bytes + done, from + at % BLOCK, n);
        }
    }
    *rows = kv->gathered;
    return 0;
}

int kv_copy(kv_cache *kv, int layer, kv_kind kind, int64_t first, int64_t n, void *to,
            dsv4_err *err) {
    kv_rows *r = &kv->rows[layer][kind];
    uint64_t at = (uint64_t)first * r->row_bytes, bytes = (uint64_t)n * r->row_bytes;
    uint64_t tail = blocks_down((uint64_t)r->n * r->row_bytes);
    const uint8_t *from = rows_at(kv, r);
    assert(first >= 0 && n >= 0 && first + n <= r->n);
    if (from && from + at != to) memcpy(to, from + at, bytes);
    if (from || !bytes) return 0;
    if (wait_for(kv, &kv->writing, err)) return -1;
    for (uint8_t *p = to; bytes;) {
        uint64_t skip = at % BLOCK;
        uint64_t most = at >= tail ? BLOCK : lesser(tail - (at - skip), BOUNCE_BYTES);
        uint64_t take = lesser(bytes, most - skip);
        if (at < tail && (file_move(kv, &kv->reading, kv->bounce, r->off + at - skip,
                                    blocks_up(skip + take), err) ||
                          wait_for(kv, &kv->reading, err)))
            return -1;
        memcpy(p, (at < tail ? kv->bounce : r->tail) + skip, take);
        p += take, at += take, bytes -= take;
    }
    return 0;
}

/* === 3. Parked context ========================================================================
 *
 *   file    header with a table of frames | token ids | frame | frame ...
 *   frame   the caller's bytes, or one zstd frame of them where that saves 15%
 *
 * A file is written as ".dsv4-PID-N.part", locked as long as that takes, and renamed when all of
 * it is on the disk: what has a name of its own is whole, and a part that nobody has locked is
 * what a killed writer left.  Numbers lie as in memory, little-endian.                           */

enum {
    PARK_VERSION = 1,              /* of the layout of files                                    */
    PARK_NAME = 100,               /* bytes of a session's name                                 */
    PARK_LEVEL = 1,                /* of zstd: rows are noise of skewed bytes, so that all there
                                      is to gain is entropy coding, and more search is in vain  */
    PARK_ALIGN = 16,               /* of frames in one block, as malloc's own                   */
};
static const uint64_t park_magic = 0x6b72617034767364; /* "dsv4park"                              */

/* stored < bytes: zstd.  hash: XXH3-64 as stored, so that zstd never meets what was flipped.     */
typedef struct { uint64_t bytes, stored, hash; } park_slice;
typedef struct {
    uint64_t magic;
    uint64_t hash;                 /* XXH3-64 of what follows, the frames' slices included      */
    uint64_t version;
    park_info info;
    park_slice frame[PARK_FRAMES + 1]; /* the first holds token ids; info.n_frames more         */
} park_header;
static_assert(offsetof(park_header, frame) == 72 + MAX_NAME && sizeof(park_slice) == 24, "layout");

struct park {
    char *path;                    /* for messages                                              */
    int dir;
    uint64_t budget;
    ZSTD_CCtx *pack;
    ZSTD_DCtx *unpack;
    uint8_t *buf;                  /* [cap] one frame packed                                    */
    size_t cap, block;             /* block: bytes for tokens and frames of the file at hand    */
    park_header h;                 /* of the file at hand                                       */
};

typedef enum { PARK_OTHER, PARK_PART, PARK_SEGMENT, PARK_SESSION } park_kind;
typedef struct { char file[MAX_NAME]; park_kind kind; uint64_t bytes; int64_t used_ns; } parked;

static size_t header_bytes(int n_frames) {
    return offsetof(park_header, frame) + ((size_t)n_frames + 1) * sizeof(park_slice);
}

static uint64_t header_hash(const park_header *h) {
    const size_t from = offsetof(park_header, version);
    return XXH3_64bits((const char *)h + from, header_bytes(h->info.n_frames) - from);
}

park_key park_next(park_key before, const int32_t *tokens, int n) {
    XXH128_canonical_t both[2];    /* of one key's size, so that no state must be allocated     */
    memcpy(&both[0], &before, sizeof before);
    XXH128_canonicalFromHash(&both[1], XXH3_128bits(tokens, (size_t)n * sizeof *tokens));
    XXH128_canonicalFromHash(&both[0], XXH3_128bits(both, sizeof both));
    memcpy(&before, &both[0], sizeof before);
    return before;
}

/* --- names */

static void segment_file(char file[MAX_NAME], park_key key) {
    for (int i = 0; i < 16; i++) snprintf(file + 2 * i, 3, "%02x", key.byte[i]);
    strcpy(file + 32, ".seg");
}

static park_kind kind_of(const char *file) {
    const char *dot = strrchr(file, '.'), *end = dot ? dot : "";
    size_t n = (size_t)(dot ? dot - file : 0);
    if (!strcmp(end, ".part") && !strncmp(file, ".dsv4-", 6)) return PARK_PART;
    if (!strcmp(end, ".seg") && n == 32 && strspn(file, "0123456789abcdef") == n)
        return PARK_SEGMENT;
    for (size_t i = 0; i < n; i++)
        if (file[i] == '/' || iscntrl((unsigned char)file[i])) return PARK_OTHER;
    bool session = !strcmp(end, ".session") && n <= PARK_NAME && file[0] != '.';
    return session ? PARK_SESSION : PARK_OTHER;
}

static int session_file(char file[MAX_NAME], const char *name, dsv4_err *err) {
    snprintf(file, MAX_NAME, "%.*s.session", PARK_NAME + 1, name);
    if (kind_of(file) == PARK_SESSION) return 0;
    return fail(err, "a session's name has 1 to %d bytes, no slash, no control character and no "
                "dot in front", PARK_NAME);
}

/* --- reading */

/* All n bytes, through short transfers and signals; -1 with errno. */
static int park_io(int fd, bool write, void *buf, size_t n, uint64_t off) {
    for (size_t done = 0; done < n;) {
        char *at = (char *)buf + done;
        ssize_t got = write ? pwrite(fd, at, n - done, (off_t)(off + done))
                      : pread(fd, at, n - done, (off_t)(off + done));
        if (got < 0 && errno == EINTR) continue;
        if (got == 0) errno = ENODATA;             /* the file was cut while we read it */
        if (got <= 0) return -1;
        done += (size_t)got;
    }
    return 0;
}

/* The header of a file into p->h, and all checked that it says, so that what the table names lies
 * in the file.  As for all that read: err says what is wrong, not with which file. */
static int read_header(park *p, int fd, dsv4_err *err) {
    park_header *h = &p->h;
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) return fail(err, "it is not a regular file");
    uint64_t size = (uint64_t)st.st_size, end, bytes = 0;
    memset(h, 0, sizeof *h);
    if (park_io(fd, false, h, size < sizeof *h ? (size_t)size : sizeof *h, 0))
        return fail(err, "%s", strerror(errno));
    int n = h->info.n_frames;
    if (h->magic != park_magic || h->version != PARK_VERSION)
        return fail(err, "it is not parked context of format %d", PARK_VERSION);
    if (n < 0 || n > PARK_FRAMES || h->hash != header_hash(h))
        return fail(err, "its header is damaged");
    end = header_bytes(n);
    for (int i = 0; i <= n; i++) { /* no sum can wrap: none is above PARK_BYTES and a header    */
        const park_slice *f = &h->frame[i];
        if (f->stored > f->bytes || f->bytes > PARK_BYTES - bytes)
            return fail(err, "the size of frame %d is absurd", i);
        end += f->stored;
        bytes += f->bytes;
    }
    p->block = (size_t)bytes + ((size_t)n + 1) * PARK_ALIGN;
    if (end != size) return fail(err, "it is cut, or longer than it should be");
    if (h->info.pos < 0 || h->info.model[MAX_NAME - 1] ||
        h->frame[0].bytes != (uint64_t)h->info.n_tokens * sizeof(int32_t))
        return fail(err, "its header contradicts itself");
    for (char *c = h->info.model; *c; c++)         /* it will be printed */
        if (iscntrl((unsigned char)*c)) *c = '?';
    return 0;
}

static int park_room(park *p, size_t n) {
    if (n <= p->cap) return 0;
    free(p->buf);
    p->buf = malloc(n);
    p->cap = p->buf ? n : 0;
    return p->buf ? 0 : -1;
}

static int read_frame(park *p, int fd, int i, uint64_t off, void *dst, dsv4_err *err) {
    size_t stored = (size_t)p->h.frame[i].stored, bytes = (size_t)p->h.frame[i].bytes;
    bool packed = stored < bytes;
    if (packed && park_room(p, stored)) return fail(err, "out of memory");
    void *to = packed ? p->buf : dst;
    if (park_io(fd, false, to, stored, off)) return fail(err, "%s", strerror(errno));
    if (XXH3_64bits(to, stored) != p->h.frame[i].hash)
        return fail(err, "frame %d is damaged", i);
    if (packed && ZSTD_decompressDCtx(p->unpack, dst, bytes, to, stored) != bytes)
        return fail(err, "frame %d does not unpack", i);
    return 0;
}

/* Tokens and frames of the file at hand, as park_get() where `want`, else as park_load() says; but
 * *tokens is the caller's also where they are damaged. */
static int read_body(park *p, int fd, const park_info *want, int32_t **tokens, park_frame *frames,
                     dsv4_err *err) {
    const park_header *h = &p->h;
    const int n = h->info.n_frames;
    bool same = !want || (want->n_tokens == h->info.n_tokens && want->n_frames == n);
    for (int i = 0; want && same && i < n; i++) same = frames[i].bytes == h->frame[i + 1].bytes;
    if (!same) return fail(err, "it is of another model");
    uint8_t *block = malloc(want ? (size_t)h->frame[0].bytes + 1 : p->block), *at = block;
    uint64_t off = header_bytes(n);
    int rc = block ? 0 : fail(err, "out of memory");
    for (int i = 0; !rc && i <= n; i++) {
        size_t bytes = (size_t)h->frame[i].bytes;
        if (i && !want) frames[i - 1] = (park_frame){at, bytes};
        void *dst = i ? frames[i - 1].data : block;
        if (dst) rc = read_frame(p, fd, i, off, dst, err);
        off += h->frame[i].stored;
        if (!want) at += (bytes + PARK_ALIGN - 1) / PARK_ALIGN * PARK_ALIGN;
    }
    *tokens = (int32_t *)(void *)block;
    return rc;
}

/* Read a file: its header and, where `tokens`, its body.  1; 0: there is none; -1: err says what is
 * wrong, and a segment that is damaged is gone. */
static int park_take(park *p, const char *file, const park_info *want, int32_t **tokens,
                     park_frame *frames, dsv4_err *err) {
    dsv4_err why;
    char own[MAX_NAME];
    bool segment = kind_of(file) == PARK_SEGMENT;
    int fd = openat(p->dir, file, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    err->msg[0] = 0;
    if (fd < 0 && errno == ENOENT) return 0;
    if (fd < 0) return fail(err, "open %.300s/%s: %s", p->path, file, strerror(errno));
    (void)posix_fadvise(fd, 0, 0, tokens ? POSIX_FADV_SEQUENTIAL : POSIX_FADV_RANDOM);
    int rc = read_header(p, fd, &why);
    segment_file(own, p->h.info.key);
    if (!rc && segment && strcmp(file, own)) rc = fail(&why, "it is %s", own);
    if (!rc && tokens) rc = read_body(p, fd, want, tokens, frames, &why);
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);    /* memory is for experts */
    close(fd);
    if (rc && segment) (void)unlinkat(p->dir, file, 0);
    return rc ? fail(err, "%.300s/%s: %.300s", p->path, file, why.msg) : 1;
}

/* Segments are of no use without those before them, so the later one stands the older it counts:
 * a second each, which is more than reading one takes. */
static void mark_used(park *p, const char *file, int64_t pos) {
    struct timespec t[2];
    clock_gettime(CLOCK_REALTIME, t);
    t[0].tv_sec -= pos / SEGMENT_TOKENS;
    t[1] = t[0];
    (void)utimensat(p->dir, file, t, 0);   /* refused where we may not write, and not needed */
}

int park_get(park *p, const park_info *info, const int32_t *tokens, park_frame *frames,
             dsv4_err *err) {
    char file[MAX_NAME];
    int32_t *ids = NULL;
    segment_file(file, info->key);
    int rc = park_take(p, file, info, &ids, frames, err);
    if (rc > 0 && memcmp(ids, tokens, (size_t)info->n_tokens * sizeof *ids))
        rc = fail(err, "%.300s/%s: it has other tokens", p->path, file);
    if (rc > 0) mark_used(p, file, info->pos);
    free(ids);
    return rc > 0;
}

int park_load(park *p, const char *name, park_info *info, int32_t **tokens, park_frame *frames,
              dsv4_err *err) {
    char file[MAX_NAME];
    *tokens = NULL;
    if (session_file(file, name, err)) return -1;
    int rc = park_take(p, file, NULL, tokens, frames, err);
    *info = p->h.info;
    if (rc > 0) return mark_used(p, file, 0), rc;
    free(*tokens);
    *tokens = NULL;
    return rc;
}

bool park_has(const park *p, park_key key) {
    char file[MAX_NAME];
    segment_file(file, key);
    return !faccessat(p->dir, file, F_OK, 0);
}

/* --- the directory */

/* What a killed writer left has no lock any more. */
static bool sweep(park *p, const char *file) {
    int fd = openat(p->dir, file, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    bool gone = fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB) && !unlinkat(p->dir, file, 0);
    if (fd >= 0) close(fd);
    return gone;
}

static int by_use(const void *a, const void *b) {
    int64_t x = ((const parked *)a)->used_ns, y = ((const parked *)b)->used_ns;
    return (x > y) - (x < y);
}

/* Every file of ours and what is being written now, least recently used first; what killed writers
 * left is removed.  Their number; the caller frees *out. */
static int park_scan(park *p, parked **out, dsv4_err *err) {
    struct dirent **list;
    struct stat st;
    int found = scandirat(p->dir, ".", &list, NULL, NULL), n = 0;
    *out = NULL;
    if (found < 0) return fail(err, "read %.300s: %s", p->path, strerror(errno));
    parked *all = *out = calloc((size_t)found + 1, sizeof *all);
    for (int i = 0; i < found; i++) {
        const char *file = list[i]->d_name;
        park_kind kind = kind_of(file);
        if (all && kind != PARK_OTHER && !fstatat(p->dir, file, &st, AT_SYMLINK_NOFOLLOW) &&
            S_ISREG(st.st_mode) && !(kind == PARK_PART && sweep(p, file))) {
            all[n] = (parked){.kind = kind, .bytes = (uint64_t)st.st_size,
                              .used_ns = st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec};
            strcpy(all[n++].file, file);           /* d_name is as long */
        }
        free(list[i]);
    }
    free(list);
    if (!all) return fail(err, "out of memory");
    qsort(all, (size_t)n, sizeof *all, by_use);
    return n;
}

int park_open(park **out, const char *dir, uint64_t budget, dsv4_err *err) {
    parked *files = NULL;
    park *p = *out = calloc(1, sizeof *p);
    if (p) *p = (park){.path = strdup(dir), .dir = -1, .budget = budget,
                       .pack = ZSTD_createCCtx(), .unpack = ZSTD_createDCtx()};
    int rc = p && p->path && p->pack && p->unpack ? 0 : fail(err, "out of memory");
    if (!rc) (void)mkdir(dir, 0700);               /* what was said to a model is nobody else's */
    if (!rc && (p->dir = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        rc = fail(err, "open directory %.300s: %s", dir, strerror(errno));
    if (!rc) rc = park_scan(p, &files, err) < 0 ? -1 : 0;
    free(files);
    if (!rc) return 0;
    park_close(p);
    *out = NULL;
    return -1;
}

void park_close(park *p) {
    if (!p) return;
    if (p->dir >= 0) close(p->dir);
    ZSTD_freeCCtx(p->pack);
    ZSTD_freeDCtx(p->unpack);
    free(p->buf);
    free(p->path);
    free(p);
}

int park_list(park *p, bool verify, park_fn each, void *arg, dsv4_err *err) {
    parked *all;
    park_frame frames[PARK_FRAMES];
    int n = park_scan(p, &all, err), rc = n < 0 ? -1 : 0;
    while (!rc && n-- > 0) {
        parked *f = &all[n];
        dsv4_err fault;
        int32_t *tokens = NULL;
        int good = f->kind == PARK_PART ? 0
                   : park_take(p, f->file, NULL, verify ? &tokens : NULL, frames, &fault);
        free(tokens);
        if (!good) continue;       /* not there yet, or not any more */
        park_entry e = {.name = f->file, .session = f->kind == PARK_SESSION, .bytes = f->bytes,
                        .used = f->used_ns / 1000000000, .fault = fault.msg};
        if (good > 0) e.info = p->h.info;
        *strrchr(f->file, '.') = 0;
        if (each(arg, &e)) rc = fail(err, "interrupted");
    }
    free(all);
    return rc;
}

int park_remove(park *p, const char *name, dsv4_err *err) {
    char file[MAX_NAME];
    if (session_file(file, name, err)) return -1;
    if (!unlinkat(p->dir, file, 0)) return 0;
    snprintf(file, sizeof file, "%s.seg", name);
    if (errno == ENOENT && kind_of(file) == PARK_SEGMENT && !unlinkat(p->dir, file, 0)) return 0;
    return fail(err, "remove %s from %.300s: %s", name, p->path, strerror(errno));
}

/* --- writing */

/* What `key` ends was used now. */
static void mark_chain(park *p, park_key key) {
    char file[MAX_NAME];
    dsv4_err ignored;
    int64_t pos = INT64_MAX;       /* falls, so that no ring of files holds us                  */
    segment_file(file, key);
    while (park_take(p, file, NULL, NULL, NULL, &ignored) > 0 && p->h.info.pos < pos) {
        mark_used(p, file, pos = p->h.info.pos);
        segment_file(file, p->h.info.before);
    }
}

/* Keep the budget with `file`, whose part is in the directory already, at the cost of segments; but
 * not of those before it, of which `before` is the first that would go. */
static int make_room(park *p, const char *file, park_key before, dsv4_err *err) {
    parked *all;
    char last[MAX_NAME];
    uint64_t total = 0;
    int n = p->budget ? park_scan(p, &all, err) : 0, end = 0;
    if (n <= 0) return n;
    segment_file(last, before);
    for (int i = 0; i < n; i++) {
        if (!strcmp(all[i].file, file)) all[i].bytes = 0;  /* to be replaced */
        total += all[i].bytes;
    }
    for (; end < n && total > p->budget && strcmp(all[end].file, last); end++)
        if (all[end].kind == PARK_SEGMENT) total -= all[end].bytes;
    int rc = total <= p->budget ? 0 : fail(err, "%.300s: %.2f GB are too few to keep more",
                                           p->path, (double)p->budget / 1e9);
    for (int i = 0; !rc && i < end; i++)
        if (all[i].kind == PARK_SEGMENT) (void)unlinkat(p->dir, all[i].file, 0);
    free(all);
    return rc;
}

/* All of a file, on the disk; -1 with errno. */
static int write_file(park *p, int fd, const park_info *info, const int32_t *tokens,
                      const park_frame *frames) {
    park_header *h = &p->h;
    uint64_t off = header_bytes(info->n_frames), bytes = 0;
    *h = (park_header){.magic = park_magic, .version = PARK_VERSION, .info = *info};
    h->info.model[MAX_NAME - 1] = 0;
    for (int i = 0; i <= info->n_frames; i++) {
        park_frame f = i ? frames[i - 1]
                       : (park_frame){(void *)tokens, (size_t)info->n_tokens * sizeof *tokens};
        size_t room = f.bytes - f.bytes * 15 / 100, got = 0;
        errno = EFBIG;
        if (f.bytes > PARK_BYTES - bytes) return -1;
        if (f.bytes && !park_room(p, room))
            got = ZSTD_compressCCtx(p->pack, p->buf, room, f.data, f.bytes, PARK_LEVEL);
        bool packed = got && !ZSTD_isError(got) && got < f.bytes;  /* an error: it saves less */
        void *data = packed ? p->buf : f.data;
        size_t stored = packed ? got : f.bytes;
        h->frame[i] = (park_slice){f.bytes, stored, XXH3_64bits(data, stored)};
        if (park_io(fd, true, data, stored, off)) return -1;
        bytes += f.bytes;
        off += stored;
    }
    h->hash = header_hash(h);
    return park_io(fd, true, h, header_bytes(info->n_frames), 0) || fsync(fd) ? -1 : 0;
}

/* A new file of no name that counts, locked; -1 with errno. */
static int make_part(park *p, char part[MAX_NAME]) {
    struct stat st = {.st_nlink = 0};
    struct timespec t;
    int fd = -1;
    for (int i = 0; i < 64 && !st.st_nlink; i++) {         /* swept before it was locked? again */
        if (fd >= 0) close(fd);
        clock_gettime(CLOCK_MONOTONIC, &t);
        snprintf(part, MAX_NAME, ".dsv4-%ld-%09ld.part", (long)getpid(), t.tv_nsec);
        fd = openat(p->dir, part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0) return -1;
        (void)flock(fd, LOCK_EX);
        if (fstat(fd, &st)) break;
    }
    return fd;
}

int park_put(park *p, const char *name, const park_info *info, const int32_t *tokens,
             const park_frame *frames, dsv4_err *err) {
    char file[MAX_NAME], part[MAX_NAME];
    assert(info->n_frames >= 0 && info->n_frames <= PARK_FRAMES);
    assert(info->n_tokens >= 0 && info->pos >= 0);
    segment_file(file, info->key);
    if (name && session_file(file, name, err)) return -1;
    if (!name && park_has(p, info->key)) return mark_chain(p, info->key), 0;
    int fd = make_part(p, part);
    int rc = fd < 0 || write_file(p, fd, info, tokens, frames) ? -1 : 0, told = 0;
    if (!rc && !name) mark_used(p, part, info->pos);
    if (!rc) mark_chain(p, info->before);
    if (!rc) told = rc = make_room(p, file, info->before, err);
    if (!rc) rc = renameat(p->dir, part, p->dir, file) || fsync(p->dir) ? -1 : 0;
    if (rc && !told) fail(err, "write %.300s/%s: %s", p->path, file, strerror(errno));
    if (fd < 0) return -1;
    if (rc) (void)unlinkat(p->dir, part, 0);
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    return rc;
}

/* === 4. A session's parked context ============================================================
 * A segment's frames: entries and keys of each block, then one of all states at its end.  A tail is
 * a segment that ends early.  A saved session has the tail, and a file with the caller's own.    */

typedef enum { MOVE_COUNT, MOVE_SAVE, MOVE_LOAD, MOVE_LOADED } move_mode;

/* Move what layers l0 .. l1-1 carry beyond their rows, between their rings at position pos and
 * `at`: windows, and tokens that compressors want once more.  Returns the bytes: pos decides. */
static uint64_t states_move(const kv_cache *kv, int l0, int l1, int64_t pos, uint8_t *at,
                            move_mode mode) {
    uint64_t bytes = 0;
    for (int l = l0; l < l1; l++) {
        int ratio = kv->cfg->compress_ratios[l];
        ring_shape ring[MAX_RINGS];
        uint8_t *rows[MAX_RINGS];
        if (mode != MOVE_COUNT) memcpy(rows, &kv->state[l], sizeof rows);
        for (int i = 0, n = rings_of(kv, l, ring); i < n; i++) {
            int64_t len = ring[i].len, first = i ? pos / ratio * ratio - len + ratio : pos - len;
            for (int64_t j = first > 0 ? first : 0; j < pos; j++) {
                size_t row = ring[i].row, in_ring = (size_t)(j % len) * row;
                if (mode == MOVE_SAVE) memcpy(at + bytes, rows[i] + in_ring, row);
                if (mode == MOVE_LOAD) memcpy(rows[i] + in_ring, at + bytes, row);
                bytes += row;
            }
        }
    }
    return bytes;
}

uint64_t kv_mark_bytes(const dsv4_config *cfg, const kv_opts *o) {
    kv_cache kv = {.cfg = cfg, .opts = *o};
    return states_move(&kv, 0, o->n_blocks, o->ctx / SEGMENT_TOKENS * SEGMENT_TOKENS, NULL,
                       MOVE_COUNT);
}

void kv_mark(const kv_cache *kv, int layer, int64_t pos, uint8_t *mark) {
    if (!mark) mark = kv->park_states;
    mark += states_move(kv, 0, layer, pos, NULL, MOVE_COUNT);
    (void)states_move(kv, layer, layer + 1, pos, mark, MOVE_SAVE);
}

/* The frames of positions pos0 .. pos1-1 [2 * n_blocks + 1], rows in RAM where they are, those of
 * the file in kv.park_rows: copied there to be saved, and taken from there once they are loaded.
 * The last one, of states at pos1, is the caller's to place. */
static int rows_frames(kv_cache *kv, int64_t pos0, int64_t pos1, move_mode mode, park_frame *f,
                       dsv4_err *err) {
    uint8_t *at = kv->park_rows;
    for (int l = 0; l < kv->opts.n_blocks; l++)
        for (int k = 0; k < KV_KINDS; k++, f++) {
            const kv_rows *r = &kv->rows[l][k];
            int ratio = kv->cfg->compress_ratios[l];
            *f = (park_frame){0};
            if (!r->max) continue;
            int64_t first = pos0 / ratio, n = pos1 / ratio - first;
            *f = (park_frame){r->rows ? r->rows + (uint64_t)first * r->row_bytes : at,
                              (uint64_t)n * r->row_bytes};
            if (!r->rows) at += f->bytes;
            if (mode == MOVE_SAVE && kv_copy(kv, l, (kv_kind)k, first, n, f->data, err)) return -1;
            if (mode == MOVE_LOADED && kv_append(kv, l, (kv_kind)k, f->data, n, err)) return -1;
        }
    *f = (park_frame){NULL, states_move(kv, 0, kv->opts.n_blocks, pos1, NULL, MOVE_COUNT)};
    return 0;
}

/* What a file tells of segment number `segment`, or of its first n tokens. */
static park_info segment_info(kv_cache *kv, int64_t segment, const int32_t *tokens, int n) {
    park_info info = {.before = kv->key[segment], .pos = segment * SEGMENT_TOKENS, .n_tokens = n,
                      .n_frames = KV_KINDS * kv->opts.n_blocks + 1};
    memcpy(info.model, kv->cfg->name, sizeof info.model);
    info.key = park_next(info.before, tokens + info.pos, n);
    if (n == SEGMENT_TOKENS) kv->key[segment + 1] = info.key;
    return info;
}

/* Park a segment, or a tail of n tokens, with its states.  What is there already is left by
 * park_put(), too, but that would want a segment's rows first. */
static int segment_put(kv_cache *kv, int64_t segment, const int32_t *tokens, int n,
                       uint8_t *states, dsv4_err *err) {
    park_frame frame[PARK_FRAMES];
    park_info info = segment_info(kv, segment, tokens, n);
    if (n == SEGMENT_TOKENS && park_has(kv->opts.park, info.key)) return 0;
    if (rows_frames(kv, info.pos, info.pos + n, MOVE_SAVE, frame, err)) return -1;
    frame[info.n_frames - 1].data = states;
    return park_put(kv->opts.park, NULL, &info, tokens + info.pos, frame, err);
}

int kv_park(kv_cache *kv, const int32_t *tokens, int64_t pos0, int64_t pos1, uint8_t *marks,
            dsv4_err *err) {
    for (int64_t i = pos0 / SEGMENT_TOKENS; i < pos1 / SEGMENT_TOKENS; i++) {
        if (segment_put(kv, i, tokens, SEGMENT_TOKENS, marks, err)) return -1;
        marks += kv_mark_bytes(kv->cfg, &kv->opts);
    }
    return 0;
}

int kv_park_tail(kv_cache *kv, const int32_t *tokens, int64_t pos, dsv4_err *err) {
    int n = (int)(pos % SEGMENT_TOKENS);
    return n ? segment_put(kv, pos / SEGMENT_TOKENS, tokens, n, kv->park_states, err) : 0;
}

/* Read the rows of a segment or of a tail of n tokens, and maybe its states; 1: they are in, 0: it
 * is not to be had. */
static int segment_get(kv_cache *kv, int64_t segment, const int32_t *tokens, int n, bool states,
                       dsv4_err *err) {
    park_frame frame[PARK_FRAMES];
    park_info info = segment_info(kv, segment, tokens, n);
    int64_t end = info.pos + n;
    if (rows_frames(kv, info.pos, end, MOVE_LOAD, frame, err)) return -1;
    if (states) frame[info.n_frames - 1].data = kv->park_states;
    if (!park_get(kv->opts.park, &info, tokens + info.pos, frame, err)) return 0;
    if (states) states_move(kv, 0, kv->opts.n_blocks, end, kv->park_states, MOVE_LOAD);
    return rows_frames(kv, info.pos, end, MOVE_LOADED, frame, err) ? -1 : 1;
}

int64_t kv_parked(kv_cache *kv, const int32_t *tokens, int64_t n, int64_t tail) {
    int64_t most = 0;
    int rest = (int)(tail % SEGMENT_TOKENS);
    while (most < (n - 1) / SEGMENT_TOKENS &&
           park_has(kv->opts.park, segment_info(kv, most, tokens, SEGMENT_TOKENS).key))
        most++;
    if (rest && tail < n && tail / SEGMENT_TOKENS == most &&
        park_has(kv->opts.park, segment_info(kv, most, tokens, rest).key))
        return tail;
    return most * SEGMENT_TOKENS;
}

int64_t kv_resume(kv_cache *kv, const int32_t *tokens, int64_t n, int64_t tail, dsv4_err *err) {
    int64_t most = kv_parked(kv, tokens, n, tail), done;
    int got;
    do {                           /* where one is damaged, begin again and end before it */
        kv_reset(kv);
        for (done = 0, got = 1; got == 1 && done < most;) {
            int some = (int)lesser((uint64_t)(most - done), SEGMENT_TOKENS);
            got = segment_get(kv, done / SEGMENT_TOKENS, tokens, some, done + some == most, err);
            if (got == 1) done += some;
        }
        most = done;
    } while (got == 0);
    return got < 0 ? -1 : done;
}

/* The session's own file comes behind its tail, so that it is not at the tail's cost. */
int kv_save(kv_cache *kv, const char *name, const int32_t *tokens, int64_t pos, park_frame extra,
            dsv4_err *err) {
    (void)states_move(kv, 0, kv->opts.n_blocks, pos, kv->park_states, MOVE_SAVE);
    if (kv_park_tail(kv, tokens, pos, err)) return -1;
    park_info info = segment_info(kv, pos / SEGMENT_TOKENS, tokens, (int)(pos % SEGMENT_TOKENS));
    if (pos % SEGMENT_TOKENS) info.before = info.key;      /* the tail's */
    info.n_tokens = (int32_t)pos;
    info.n_frames = 1;
    return park_put(kv->opts.park, name, &info, tokens, &extra, err);
}

int64_t kv_load(kv_cache *kv, const char *name, int32_t **tokens, int64_t *n, park_frame *extra,
                dsv4_err *err) {
    park_frame frame[PARK_FRAMES] = {{0}};
    park_info info;
    int64_t pos = -1;
    int got = park_load(kv->opts.park, name, &info, tokens, frame, err);
    if (got <= 0) return got ? -1 : fail(err, "there is no session %s", name);
    *n = info.n_tokens;
    int64_t last = *n / SEGMENT_TOKENS;
    bool ours = info.n_frames == 1 && info.pos == last * SEGMENT_TOKENS, fits = *n < kv->opts.ctx;
    for (int64_t i = 0; ours && fits && i <= last; i++) {
        int some = i < last ? SEGMENT_TOKENS : (int)(*n - info.pos);
        park_key key = segment_info(kv, i, *tokens, some).key;
        ours = i < last || !memcmp(&key, &info.key, sizeof key);
    }
    if (!ours)
        fail(err, "session %s is of another model or of another version of dsv4", name);
    else if (!fits)
        fail(err, "session %s has %lld tokens and the context is %lld; raise --ctx", name,
             (long long)*n, (long long)kv->opts.ctx);
    else
        pos = kv_resume(kv, *tokens, *n + 1, *n, err);
    if (pos < 0) free(*tokens);
    else *extra = frame[0];
    return pos;
}
