/* shared.c -- one block's shared memory, who may touch it when, and what its threads say to each
 * other: barriers, shuffles and votes, asynchronous copies.
 *
 *   st.shared --sg_shared()--> word cell: last write, readers, atomics, copy under way
 *                                 |  (split into four byte cells by the first narrow access)
 *                                 v
 *        ordered?  other warp: clock[me][its] >= when      moved by bar.sync, bar.red, bar.arrive
 *                  same warp:  full[warp] or lane clock    moved by those and by bar.warp.sync
 *
 * "When" is the warp's own count of instructions (sg_warp.steps, + 1), so one number tells both
 * before and after a barrier and whether two lanes are in the same instruction.  A race is two
 * threads on a byte, one of them writing, and no barrier that both took part in between: that of
 * vector clocks, kept per warp, and per lane only within a warp.
 *
 * Exact, but for three things.  A barrier.sync that only a part of a warp joins orders the whole
 * warp towards others.  Of a warp's readers of a cell the latest step stands for all; where masks
 * of __syncwarp overlap without being equal, an older reader may be named a race.  Of lanes that
 * write the same value in one instruction only the last is remembered.
 * Only barriers order: not membar, not volatile, not shfl and vote.
 *
 * Contents  1 the shadow  2 races  3 sg_shared  4 barriers  5 member masks  6 shfl, vote, match,
 *           redux  7 cp.async  8 sg_sync, opening and closing
 * Not here  mbarrier, bulk copies, clusters: sg_sync() says SG_NOT_MINE.                         */
#include "softgpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BIT(l) (1u << (l))

/* === 1. The shadow ============================================================================ */

typedef struct {                           /* what a warp's lanes did to a cell                 */
    const sg_instr *i;                     /* the latest of it                                  */
    uint32_t step, lanes;                  /* lanes: since all lanes were last ordered          */
} mark;

typedef struct {
    const sg_instr *write;                 /* the last plain write                              */
    uint32_t step;                         /* of it; 0: never written                           */
    uint32_t serial;                       /* of the block that this is about                   */
    uint32_t readers, atoms;               /* warps with a mark since that write                */
    uint16_t thread;                       /* that wrote                                        */
    uint16_t copier;                       /* words: 1 + thread whose cp.async is under way     */
    uint16_t split;                        /* words: look at the four bytes instead             */
    uint16_t stale;                        /* marks are from before the write: kept for the
                                              other lanes of the same instruction               */
} cell;

typedef struct {                           /* words or bytes                                    */
    cell *cell;                            /* [n]                                               */
    mark *read, *atom;                     /* [warps][n], valid where the cell has the bit      */
    size_t n;
} grain;

typedef struct {
    uint32_t arrived, count;               /* threads; count 0: all that live                   */
    uint32_t lanes[SG_WARPS_MAX];          /* that arrived                                      */
    uint32_t warps, waiting;               /* masks: arrived, and of those that wait            */
    uint32_t clock[SG_WARPS_MAX];          /* what all that arrived had seen                    */
    uint32_t step[SG_WARPS_MAX];           /* of the warp, when it arrived                      */
    const sg_instr *instr[SG_WARPS_MAX];
    uint32_t yes, no;                      /* of bar.red: threads by their predicate            */
} barrier;

typedef struct {                           /* a cp.async under way                              */
    const sg_instr *i;
    uint32_t offset, bytes, group;
    int lane;
    uint8_t data[16];
} copy;

typedef struct {
    copy *at;                              /* [n] of room                                       */
    size_t n, room;
    uint32_t group[SG_LANES];              /* groups that the lane committed                    */
} copies;

struct sg_shadow {
    grain word, byte;
    int warps;                             /* room for                                          */
    uint32_t serial;
    uint32_t born[SG_WARPS_MAX];           /* lanes that exist                                  */
    uint32_t clock[SG_WARPS_MAX][SG_WARPS_MAX]; /* [me][other]: its steps that I have seen      */
    uint32_t full[SG_WARPS_MAX];           /* all lanes have seen each other's steps up to this */
    uint32_t lane[SG_WARPS_MAX][SG_LANES][SG_LANES]; /* [warp][me][other], behind partial syncs */
    bool partial[SG_WARPS_MAX];            /* lane[] is in use                                  */
    barrier bar[SG_BARRIERS];
    copies copy[SG_WARPS_MAX];
    uint8_t nowhere[256];                  /* where an access out of bounds goes                */
    sg_shadow *next;                       /* of those to use again                             */
};

static _Thread_local sg_shadow *spare;

static uint32_t step_of(const sg_warp *w) { return (uint32_t)w->steps + 1; }

static void *zeros(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) sg_stop(NULL, NULL, NULL, "no memory for the shadow of shared memory");
    return p;
}

static void grain_open(grain *g, size_t n, size_t warps) {
    free(g->cell), free(g->read), free(g->atom);
    g->cell = zeros(n, sizeof *g->cell);
    g->read = zeros(n * warps, sizeof *g->read);     /* pages never touched cost nothing */
    g->atom = zeros(n * warps, sizeof *g->atom);
    g->n = n;
}

static sg_shadow *shadow_for(size_t words, int warps) {
    sg_shadow *s = spare;
    if (s) spare = s->next;
    else s = zeros(1, sizeof *s);
    if (s->word.n < words || s->warps < warps || s->serial == UINT32_MAX) {
        if (words < s->word.n) words = s->word.n;
        if (warps < s->warps) warps = s->warps;
        s->warps = warps;
        s->serial = 0;
        grain_open(&s->word, words, (size_t)warps);
        grain_open(&s->byte, 4 * words, (size_t)warps);
    }
    s->serial++;
    return s;
}

/* === 2. Races ================================================================================= */

typedef struct {                           /* one access by one lane                            */
    sg_block *b;
    sg_warp *w;
    const sg_instr *i;
    sg_shadow *s;
    int lane;
    uint32_t step;
    uint16_t thread;
    sg_access kind;
    bool told;                             /* one violation of an access is enough              */
} access;

static void source_text(const sg_block *b, const sg_instr *i, char *out, size_t size) {
    const sg_module *m = b->launch->module;
    const char *name = m && i && i->file >= 0 && i->file < m->n_files ? m->file[i->file] : NULL;
    const char *slash = name ? strrchr(name, '/') : NULL;
    if (!i) (void)snprintf(out, size, "an unknown line");
    else if (i->line && name)
        (void)snprintf(out, size, "%s:%d", slash ? slash + 1 : name, i->line);
    else if (i->line) (void)snprintf(out, size, "line %d", i->line);
    else (void)snprintf(out, size, "PTX line %d", i->ptx_line);
}

static void race(access *a, size_t offset, const char *did, unsigned thread, const sg_instr *i) {
    static const char *const doing[] = {"read", "write", "atomic"};
    const sg_dim d = a->b->launch->block;
    bool same = thread / SG_LANES == (unsigned)a->w->id;
    char where[300];
    if (a->told) return;
    a->told = true;
    source_text(a->b, i, where, sizeof where);
    sg_violation(a->b, a->w, a->i, a->lane,
                 "%s: %s of shared byte %zu, and thread (%u,%u,%u) %s it at %s, with no %s "
                 "between that both took part in",
                 same ? "same-warp exchange without __syncwarp" : "race",
                 doing[a->kind], offset, thread % d.x, thread / d.x % d.y, thread / d.x / d.y, did,
                 where, same ? "__syncwarp or barrier" : "barrier");
}

/* Has this lane seen step `when` of another thread? */
static inline bool seen(const access *a, unsigned warp, unsigned lane, uint32_t when) {
    const sg_shadow *s = a->s;
    if (warp != (unsigned)a->w->id) return s->clock[a->w->id][warp] >= when;
    return lane == (unsigned)a->lane || s->full[warp] >= when ||
           (s->partial[warp] && s->lane[warp][a->lane][lane] >= when);
}

/* All marks of a set, by others, must have been seen. */
static void check_marks(access *a, const grain *g, size_t at, uint32_t warps, const mark *marks,
                        size_t offset, const char *did) {
    for (; warps; warps &= warps - 1) {
        unsigned v = (unsigned)__builtin_ctz(warps);
        const mark *m = &marks[v * g->n + at];
        if (v != (unsigned)a->w->id) {
            if (seen(a, v, 0, m->step)) continue;
            race(a, offset, did, v * SG_LANES + (unsigned)__builtin_ctz(m->lanes), m->i);
            continue;
        }
        if (a->s->full[v] >= m->step) continue;
        for (uint32_t l = m->lanes & ~BIT(a->lane); l; l &= l - 1) {
            unsigned other = (unsigned)__builtin_ctz(l);
            if (!seen(a, v, other, m->step)) race(a, offset, did, v * SG_LANES + other, m->i);
        }
    }
}

/* Of the lanes of a mark, those whose access this lane has seen need no longer be kept: who is
 * ordered behind this access is ordered behind theirs. */
static void forget_seen(const access *a, mark *m) {
    for (uint32_t l = m->lanes; l; l &= l - 1)
        if (seen(a, (unsigned)a->w->id, (unsigned)__builtin_ctz(l), m->step)) m->lanes &= ~(l & -l);
}

static inline void put_mark(const access *a, uint32_t *warps, mark *m) {
    uint32_t me = BIT(a->w->id);
    if (!(*warps & me) || a->s->full[a->w->id] >= m->step) m->lanes = 0;
    else if (m->step != a->step && a->s->partial[a->w->id]) forget_seen(a, m);
    *warps |= me;
    m->lanes |= BIT(a->lane);
    m->step = a->step;
    m->i = a->i;
}

/* The byte that a lane's st writes at an offset of shared memory; -1: not a st. */
static int stored_byte(const access *a, int lane, size_t offset) {
    const sg_instr *i = a->i;
    sg_space space = (sg_space)i->space;
    if (i->op != OP_ST || i->n < 2 || !i->n_types) return -1;
    sg_type t = (sg_type)i->type[i->n_types - 1];
    unsigned each = sg_type_bytes(t);
    uint64_t from = sg_address(a->b, a->w, &i->o[0], &space, lane);
    size_t k = offset - (size_t)from;
    sg_operand one = i->o[1];
    if (from > offset || k / each >= SG_VEC_MAX) return -1;
    if (one.kind == O_VEC) {
        int32_t reg = one.vec[k / each];
        one = (sg_operand){.kind = reg == -2 ? O_IMM : O_REG, .reg = reg, .symbol = -1,
                           .imm = i->o[1].vec_imm[k / each]};
    }
    return (int)(sg_get(a->b, a->w, &one, t, lane) >> (8 * (k % each)) & 0xff);
}

/* Lanes of one st that meet must write the same. */
static void check_same_store(access *a, const cell *c, size_t offset, unsigned bytes) {
    int other = c->thread % SG_LANES;
    for (size_t at = offset; at < offset + bytes; at++) {
        int mine = stored_byte(a, a->lane, at), its = stored_byte(a, other, at);
        if (mine >= 0 && mine == its) continue;
        if (!a->told)
            sg_violation(a->b, a->w, a->i, a->lane,
                         "lanes %d and %d write different values to shared byte %zu in the same "
                         "instruction", other, a->lane, at);
        a->told = true;
    }
}

/* Another lane's write in the instruction that wrote the cell? */
static inline bool same_store(const access *a, const cell *c) {
    return a->kind == SG_WRITE && c->step == a->step &&
           c->thread / SG_LANES == (unsigned)a->w->id;
}

static inline void drop_stale(cell *c) {
    if (c->stale) c->readers = c->atoms = c->stale = 0;
}

/* One access to one cell that begins at byte `offset`. */
static inline void touch(access *a, grain *g, size_t at, size_t offset, unsigned bytes) {
    cell *c = &g->cell[at];
    size_t mine = (size_t)a->w->id * g->n + at;
    if (a->kind != SG_WRITE && !c->step) {
        if (!a->told)
            sg_violation(a->b, a->w, a->i, a->lane, "%s of shared byte %zu, never written",
                         a->kind == SG_READ ? "read" : "atomic", offset);
        a->told = true;
        c->step = a->step, c->thread = a->thread, c->write = a->i;
    }
    bool again = same_store(a, c);
    if (!again) drop_stale(c);
    if (c->step && c->thread != a->thread) {
        if (again) check_same_store(a, c, offset, bytes);
        else if (!seen(a, c->thread / SG_LANES, c->thread % SG_LANES, c->step))
            race(a, offset, "wrote", c->thread, c->write);
    }
    if (c->atoms && a->kind != SG_ATOMIC)
        check_marks(a, g, at, c->atoms, g->atom, offset, "had an atomic on");
    if (a->kind == SG_READ) {
        put_mark(a, &c->readers, &g->read[mine]);
        return;
    }
    if (c->readers) check_marks(a, g, at, c->readers, g->read, offset, "read");
    if (a->kind == SG_ATOMIC) {
        put_mark(a, &c->atoms, &g->atom[mine]);
        return;
    }
    c->write = a->i, c->step = a->step, c->thread = a->thread;
    c->stale = 1;
}

/* The bytes of a word get cells of their own, with what the word's says. */
static void split(sg_shadow *s, size_t word) {
    cell *c = &s->word.cell[word];
    drop_stale(c);
    for (size_t at = 4 * word; at < 4 * word + 4; at++) {
        s->byte.cell[at] = *c;
        for (uint32_t v = c->readers | c->atoms; v; v &= v - 1) {
            size_t k = (size_t)__builtin_ctz(v);
            s->byte.read[k * s->byte.n + at] = s->word.read[k * s->word.n + word];
            s->byte.atom[k * s->byte.n + at] = s->word.atom[k * s->word.n + word];
        }
    }
    c->split = 1;
}

static inline cell *word_cell(sg_shadow *s, size_t word) {
    cell *c = &s->word.cell[word];
    if (c->serial != s->serial) *c = (cell){.serial = s->serial};
    return c;
}

static void say_copying(access *a, const cell *c, size_t word) {
    const copies *q = &a->s->copy[(c->copier - 1) / SG_LANES];
    const sg_dim d = a->b->launch->block;
    unsigned t = c->copier - 1u;
    const sg_instr *i = NULL;
    char where[300];
    for (size_t k = 0; k < q->n; k++)
        if (word * 4 >= q->at[k].offset && word * 4 < q->at[k].offset + q->at[k].bytes)
            i = q->at[k].i;
    source_text(a->b, i, where, sizeof where);
    if (!a->told)
        sg_violation(a->b, a->w, a->i, a->lane,
                     "access to shared byte %zu, to which the cp.async of thread (%u,%u,%u) at %s "
                     "is still copying: that thread has not waited for it",
                     word * 4, t % d.x, t / d.x % d.y, t / d.x / d.y, where);
    a->told = true;
}

/* Bytes `first`..`first + n` of a word. */
static inline void touch_word(access *a, size_t word, unsigned first, unsigned n) {
    sg_shadow *s = a->s;
    cell *c = word_cell(s, word);
    if (c->copier) {
        say_copying(a, c, word);
        return;
    }
    if (c->split && c->stale && !same_store(a, c)) {   /* one writer again, and no readers */
        drop_stale(c);
        c->split = 0;
    }
    if (n < 4 && !c->split) split(s, word);
    if (!c->split) {
        touch(a, &s->word, word, 4 * word, 4);
        return;
    }
    for (unsigned k = first; k < first + n; k++)
        touch(a, &s->byte, 4 * word + k, 4 * word + k, 1);
    if (n == 4 && a->kind == SG_WRITE)
        c->write = a->i, c->step = a->step, c->thread = a->thread, c->stale = 1;
}

/* === 3. sg_shared ============================================================================= */

static access begin(sg_block *b, sg_warp *w, const sg_instr *i, int lane, sg_access kind) {
    return (access){.b = b, .w = w, .i = i, .s = b->shadow, .lane = lane, .step = step_of(w),
                    .thread = (uint16_t)(w->id * SG_LANES + lane), .kind = kind};
}

/* Bounds and natural alignment; false after a violation. */
static bool inside(access *a, uint64_t offset, unsigned bytes) {
    if (offset > a->b->shared_bytes || bytes > a->b->shared_bytes - offset) {
        sg_violation(a->b, a->w, a->i, a->lane,
                     "shared bytes %llu to %llu are outside of the block's %u",
                     (unsigned long long)offset, (unsigned long long)(offset + bytes),
                     a->b->shared_bytes);
        return false;
    }
    if (bytes <= 16 && !(bytes & (bytes - 1)) && (offset & (bytes - 1))) {
        sg_violation(a->b, a->w, a->i, a->lane, "shared byte %llu is not aligned to %u",
                     (unsigned long long)offset, bytes);
        return false;
    }
    return true;
}

/* What most accesses are: whole words that the last write's thread made visible to this one.
 * false: nothing was done that touch() would not do again. */
static inline bool quick(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                         size_t word, size_t end, sg_access kind) {
    sg_shadow *s = b->shadow;
    uint32_t now = step_of(w), full = s->full[w->id], me = BIT(w->id);
    const uint32_t *clock = s->clock[w->id];
    if (kind == SG_ATOMIC || s->partial[w->id]) return false;
    for (; word < end; word++) {
        cell *c = &s->word.cell[word];
        unsigned warp = c->thread / SG_LANES;
        if (c->serial != s->serial || c->copier || c->split || !c->step) return false;
        if ((warp == (unsigned)w->id ? full : clock[warp]) < c->step) return false;
        if (c->stale) c->readers = c->atoms = c->stale = 0;
        if (c->atoms) return false;
        if (kind == SG_WRITE) {
            if (c->readers) return false;
            c->write = i, c->step = now, c->stale = 1;
            c->thread = (uint16_t)(w->id * SG_LANES + lane);
            continue;
        }
        mark *m = &s->word.read[(size_t)w->id * s->word.n + word];
        if (!(c->readers & me) || full >= m->step) m->lanes = 0;
        c->readers |= me;
        m->lanes |= BIT(lane);
        m->step = now;
        m->i = i;
    }
    return true;
}

void *sg_shared(sg_block *b, sg_warp *w, const sg_instr *i, int lane, uint64_t offset,
                unsigned bytes, sg_access kind) {
    uint64_t whole = offset + bytes;       /* naturally aligned words, in bounds */
    if ((bytes == 4 || bytes == 8 || bytes == 16) && !(offset & (bytes - 1)) &&
        offset < whole && whole <= b->shared_bytes &&
        quick(b, w, i, lane, offset / 4, whole / 4, kind))
        return b->shared + offset;
    access a = begin(b, w, i, lane, kind);
    if (!bytes) return b->shadow->nowhere;
    if (!inside(&a, offset, bytes)) {
        if (bytes > sizeof b->shadow->nowhere)
            sg_stop(b, w, i, "an access of %u bytes of shared memory", bytes);
        memset(b->shadow->nowhere, 0, bytes);
        return b->shadow->nowhere;
    }
    size_t word = offset / 4, end = offset + bytes;
    for (size_t at = offset; at < end; word++) {
        size_t stop = 4 * word + 4 < end ? 4 * word + 4 : end;
        touch_word(&a, word, (unsigned)(at % 4), (unsigned)(stop - at));
        at = stop;
    }
    return b->shared + offset;
}

/* === 4. Barriers ============================================================================== */

/* Lanes `mask` of a warp have met at its step `now`. */
static void meet(sg_shadow *s, int id, uint32_t now, uint32_t mask) {
    uint32_t joint[SG_LANES] = {0};
    if ((mask & s->born[id]) == s->born[id]) {
        s->full[id] = now;
        return;
    }
    s->partial[id] = true;
    for (uint32_t m = mask; m; m &= m - 1)
        for (int o = 0; o < SG_LANES; o++) {
            uint32_t c = s->lane[id][__builtin_ctz(m)][o];
            if (joint[o] < c) joint[o] = c;
        }
    for (uint32_t m = mask; m; m &= m - 1) joint[__builtin_ctz(m)] = now;
    for (uint32_t m = mask; m; m &= m - 1)
        memcpy(s->lane[id][__builtin_ctz(m)], joint, sizeof joint);
}

/* Threads that a barrier still waits for; 0: complete. */
static unsigned missing(const sg_block *b, const barrier *p) {
    unsigned n = 0;
    if (p->count) return p->arrived < p->count ? p->count - p->arrived : 0;
    for (int v = 0; v < b->n_warps; v++)
        n += (unsigned)__builtin_popcount(b->warp[v].live & ~p->lanes[v]);
    return n;
}

void sg_barrier_text(const sg_block *b, int id, char *out, size_t size) {
    const barrier *p = &b->shadow->bar[id];
    int n = snprintf(out, size, "barrier %d still waits for %u %s: there are warps", id,
                     missing(b, p), p->count ? "threads" : "live threads");
    for (int v = 0; v < b->n_warps; v++)
        if (p->warps >> v & 1 && n >= 0 && (size_t)n < size)
            n += snprintf(out + n, size - (size_t)n, " %d%s", v,
                          p->waiting >> v & 1 ? "" : "(arrived)");
}

static void reduce_result(const barrier *p, sg_warp *w) {
    const sg_instr *i = p->instr[w->id];
    uint64_t bits = sg_has(i, M_POPC) ? p->yes : sg_has(i, M_AND) ? !p->no : p->yes > 0;
    sg_type t = sg_has(i, M_POPC) ? T_U32 : T_PRED;
    for (uint32_t m = p->lanes[w->id]; m; m &= m - 1)
        sg_put(w, &i->o[0], t, __builtin_ctz(m), bits);
}

/* Let go of all that wait, once nobody is missing. */
static bool complete(sg_block *b, int id) {
    sg_shadow *s = b->shadow;
    barrier *p = &s->bar[id];
    if (missing(b, p)) return false;
    for (uint32_t v = p->waiting; v; v &= v - 1) {
        int k = __builtin_ctz(v);
        sg_warp *w = &b->warp[k];
        for (int o = 0; o < b->n_warps; o++)
            if (s->clock[k][o] < p->clock[o]) s->clock[k][o] = p->clock[o];
        meet(s, k, p->step[k], p->lanes[k]);
        if (p->instr[k]->op == OP_BAR_RED) reduce_result(p, w);
        w->barrier = -1;
    }
    *p = (barrier){0};
    return true;
}

bool sg_released(sg_block *b, sg_warp *w) { return w->barrier < 0 || complete(b, w->barrier); }

/* The value of an operand that must be the same in all lanes. */
static uint32_t uniform(sg_block *b, sg_warp *w, const sg_instr *i, const sg_operand *o,
                        uint32_t mask, const char *what) {
    int first = __builtin_ctz(mask);
    uint32_t x = (uint32_t)sg_get(b, w, o, T_B32, first);
    if (o->kind == O_IMM) return x;
    for (uint32_t m = mask & (mask - 1); m; m &= m - 1) {
        int l = __builtin_ctz(m);
        uint32_t y = (uint32_t)sg_get(b, w, o, T_B32, l);
        if (x == y) continue;
        sg_violation(b, w, i, l, "%s %u, but lane %d has %u", what, y, first, x);
        break;
    }
    return x;
}

/* What the instruction says of the barrier: its number and count (0: none); false: wrong. */
static bool barrier_operands(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask,
                             uint32_t *id, uint32_t *count) {
    int a = i->op == OP_BAR_RED, l = __builtin_ctz(mask);
    bool counted = i->n > a + 1 + a;       /* bar.red's predicate comes last */
    uint32_t block = (uint32_t)b->n_warps * SG_LANES;
    *id = uniform(b, w, i, &i->o[a], mask, "barrier");
    *count = counted ? uniform(b, w, i, &i->o[a + 1], mask, "thread count") : 0;
    if (*id >= SG_BARRIERS) {
        sg_violation(b, w, i, l, "barrier %u: there are %d", *id, SG_BARRIERS);
        return false;
    }
    if (counted && (!*count || *count % SG_LANES || *count > block)) {
        sg_violation(b, w, i, l, "thread count %u of barrier %u: not a multiple of %d from %d to "
                     "the block's %u", *count, *id, SG_LANES, SG_LANES, block);
        return false;
    }
    return true;
}

/* Violations of an arrival; the barrier is in use where p->warps. */
static void check_arrival(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask,
                          const barrier *p, uint32_t id, uint32_t count) {
    int l = __builtin_ctz(mask);
    bool aligned = i->op == OP_BAR_SYNC || i->op == OP_BAR_ARRIVE || i->op == OP_BAR_RED ||
                   sg_has(i, M_ALIGNED);
    if (aligned && mask != w->live)
        sg_violation(b, w, i, l, "divergent barrier: lanes %08x of the warp are here, lanes %08x "
                     "are not", mask, w->live & ~mask);
    if (!p->warps) return;
    int other = __builtin_ctz(p->warps);
    const sg_instr *its = p->instr[other];
    if (p->lanes[w->id] & mask)
        sg_violation(b, w, i, l, "arrives at barrier %u again before it is complete", id);
    if (p->count != count)
        sg_violation(b, w, i, l, "barrier %u for %u threads, but warp %d is at it for %u "
                     "(0: all)", id, count, other, p->count);
    if ((its->op == OP_BAR_RED) != (i->op == OP_BAR_RED) ||
        (i->op == OP_BAR_RED && (its->mod[0] != i->mod[0] || its->mod[1] != i->mod[1])))
        sg_violation(b, w, i, l, "another operation of barrier %u than that of warp %d", id,
                     other);
}

static sg_result arrive(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    sg_shadow *s = b->shadow;
    uint32_t id, count;
    if (w->steps > INT32_MAX) sg_stop(b, w, i, "more than 2^31 instructions in a warp");
    if (!barrier_operands(b, w, i, mask, &id, &count)) return SG_DONE;
    barrier *p = &s->bar[id];
    bool waits = i->op != OP_BAR_ARRIVE && i->op != OP_BAR_ARRIVE2;
    check_arrival(b, w, i, mask, p, id, count);
    if (i->op != OP_BARRIER_SYNC && i->op != OP_BAR_ARRIVE2) mask = w->live;
    if (i->op == OP_BAR_RED)
        for (uint32_t m = mask; m; m &= m - 1) {
            bool x = sg_get(b, w, &i->o[i->n - 1], T_PRED, __builtin_ctz(m)) & 1;
            *(x ? &p->yes : &p->no) += 1;
        }
    p->count = count;
    p->arrived += mask == w->live ? SG_LANES : (uint32_t)__builtin_popcount(mask);
    p->lanes[w->id] |= mask;
    p->warps |= BIT(w->id);
    p->instr[w->id] = i;
    p->step[w->id] = s->clock[w->id][w->id] = step_of(w);
    for (int o = 0; o < b->n_warps; o++)
        if (p->clock[o] < s->clock[w->id][o]) p->clock[o] = s->clock[w->id][o];
    if (waits) {
        p->waiting |= BIT(w->id);
        w->barrier = (int)id;
    }
    bool done = complete(b, (int)id);
    return done || !waits ? SG_DONE : SG_WAIT;
}

/* === 5. Member masks ========================================================================== */

/* Each lane's member mask into member[]; violations of it.  What is left of it are lanes that are
 * here.  true: all lanes have the same, which is member[lowest lane]. */
static bool members(sg_block *b, sg_warp *w, const sg_instr *i, const sg_operand *o,
                    uint32_t mask, uint32_t member[SG_LANES]) {
    int first = __builtin_ctz(mask);
    bool same = true;
    for (uint32_t m = mask; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        member[l] = o->kind == O_IMM && l != first ? member[first]
                                                   : (uint32_t)sg_get(b, w, o, T_B32, l);
        same &= member[l] == member[first];
    }
    if (same && member[first] == mask) return true;
    for (uint32_t m = mask; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        uint32_t its = member[l], away = its & ~mask, other = 0;
        for (uint32_t k = its & mask; k; k &= k - 1)
            if (member[__builtin_ctz(k)] != its) other |= k & -k;
        if (!(its >> l & 1))
            sg_violation(b, w, i, l, "lane %d is not in its own member mask %08x", l, its);
        else if (away & ~w->live)
            sg_violation(b, w, i, l, "member mask %08x has lanes %08x, which have exited or do "
                         "not exist", its, away & ~w->live);
        else if (away)
            sg_violation(b, w, i, l, "member mask %08x has lanes %08x, which are not active here "
                         "(active are %08x)", its, away, mask);
        else if (other)
            sg_violation(b, w, i, l, "member mask %08x, but lanes %08x of it have another mask",
                         its, other);
        else continue;
        break;
    }
    for (uint32_t m = mask; m; m &= m - 1) member[__builtin_ctz(m)] &= mask;
    return false;
}

/* Lanes that share member[lowest lane of rest], and are in rest. */
static uint32_t group_of(uint32_t rest, const uint32_t member[SG_LANES]) {
    uint32_t g = 0, its = member[__builtin_ctz(rest)];
    for (uint32_t m = rest; m; m &= m - 1)
        if (member[__builtin_ctz(m)] == its) g |= m & -m;
    return g;
}

static void sync_warp(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    uint32_t member[SG_LANES];
    bool same = members(b, w, i, &i->o[0], mask, member);
    w->sync_count++;
    if (same) {
        meet(b->shadow, w->id, step_of(w), mask);
        return;
    }
    for (uint32_t rest = mask, g; rest; rest &= ~g) {
        g = group_of(rest, member);
        meet(b->shadow, w->id, step_of(w), g);
    }
}

/* === 6. shfl, vote, match, redux ============================================================== */

static void values_of(sg_block *b, sg_warp *w, const sg_operand *o, sg_type t, uint32_t mask,
                      uint64_t x[SG_LANES]) {
    for (uint32_t m = mask; m; m &= m - 1)
        x[__builtin_ctz(m)] = sg_get(b, w, o, t, __builtin_ctz(m));
}

/* The lane that a shfl reads, and whether it is in range (else it is the lane itself). */
static int shfl_source(const sg_instr *i, int lane, uint32_t by, uint32_t c, bool *in_range) {
    int step = (int)(by & 31), clamp = (int)(c & 31), segment = (int)(c >> 8 & 31);
    int low = lane & segment, high = low | (clamp & ~segment), j;
    if (sg_has(i, M_UP)) {
        j = lane - step;
        *in_range = j >= high;
    } else {
        j = sg_has(i, M_DOWN)   ? lane + step
            : sg_has(i, M_BFLY) ? lane ^ step
                                : low | (step & ~segment);
        *in_range = j <= high;
    }
    return *in_range ? j : lane;
}

static void shfl(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    const sg_operand *o = &i->o[i->n == 6];        /* o[1] = a, b, c, members */
    uint64_t a[SG_LANES];
    uint32_t member[SG_LANES];
    if (i->n < 5) sg_stop(b, w, i, "shfl without .sync");
    (void)members(b, w, i, &o[4], mask, member);
    values_of(b, w, &o[1], T_B32, mask, a);
    int from[SG_LANES];
    bool in_range[SG_LANES];
    for (uint32_t m = mask; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        uint32_t by = (uint32_t)sg_get(b, w, &o[2], T_B32, l);
        uint32_t c = (uint32_t)sg_get(b, w, &o[3], T_B32, l);
        from[l] = shfl_source(i, l, by, c, &in_range[l]);
        if (member[l] >> from[l] & 1) continue;
        sg_violation(b, w, i, l, "shfl reads lane %d, which is not active here or not in the "
                     "member mask", from[l]);
        from[l] = l;
    }
    for (uint32_t m = mask; m; m &= m - 1) {       /* only now: d may be a, b or c */
        int l = __builtin_ctz(m);
        sg_put(w, &i->o[0], T_B32, l, a[from[l]]);
        if (i->n == 6) sg_put(w, &i->o[1], T_PRED, l, in_range[l]);
    }
}

static void vote(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    uint64_t a[SG_LANES];
    uint32_t member[SG_LANES], yes = 0;
    if (!sg_has(i, M_SYNC) || i->n != 3) sg_stop(b, w, i, "vote without .sync");
    (void)members(b, w, i, &i->o[2], mask, member);
    values_of(b, w, &i->o[1], T_PRED, mask, a);
    for (uint32_t m = mask; m; m &= m - 1)
        if (a[__builtin_ctz(m)] & 1) yes |= m & -m;
    for (uint32_t rest = mask, g; rest; rest &= ~g) {
        g = group_of(rest, member);
        uint32_t y = yes & g;
        sg_type t = sg_has(i, M_BALLOT) ? T_B32 : T_PRED;
        uint32_t d = sg_has(i, M_BALLOT) ? y
                     : sg_has(i, M_ALL)  ? y == g
                     : sg_has(i, M_ANY)  ? y != 0
                                         : y == g || !y;
        for (uint32_t m = g; m; m &= m - 1) sg_put(w, &i->o[0], t, __builtin_ctz(m), d);
    }
}

static void match(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    const sg_operand *o = &i->o[i->n == 4];        /* o[1] = a, members */
    sg_type t = i->n_types ? (sg_type)i->type[0] : T_B32;
    uint64_t a[SG_LANES];
    uint32_t member[SG_LANES];
    (void)members(b, w, i, &o[2], mask, member);
    values_of(b, w, &o[1], t, mask, a);
    for (uint32_t rest = mask, g; rest; rest &= ~g) {
        g = group_of(rest, member);
        for (uint32_t m = g; m; m &= m - 1) {
            int l = __builtin_ctz(m);
            uint32_t alike = 0;
            for (uint32_t k = g; k; k &= k - 1)
                if (a[__builtin_ctz(k)] == a[l]) alike |= k & -k;
            if (sg_has(i, M_ALL) && alike != g) alike = 0;
            sg_put(w, &i->o[0], T_B32, l, alike);
            if (i->n == 4) sg_put(w, &i->o[1], T_PRED, l, alike != 0);
        }
    }
}

static uint32_t reduce(const sg_instr *i, uint32_t x, uint32_t y) {
    bool s = sg_type_signed((sg_type)i->type[0]);
    if (sg_has(i, M_ADD)) return x + y;
    if (sg_has(i, M_AND)) return x & y;
    if (sg_has(i, M_OR)) return x | y;
    if (sg_has(i, M_XOR)) return x ^ y;
    bool less = s ? (int32_t)x < (int32_t)y : x < y;
    return less == sg_has(i, M_MIN) ? x : y;
}

static void redux(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    uint64_t a[SG_LANES];
    uint32_t member[SG_LANES];
    bool wide = sg_type_bytes((sg_type)i->type[0]) != 4 || sg_type_float((sg_type)i->type[0]);
    if (wide) sg_stop(b, w, i, "redux of this type");
    (void)members(b, w, i, &i->o[2], mask, member);
    values_of(b, w, &i->o[1], T_B32, mask, a);
    for (uint32_t rest = mask, g; rest; rest &= ~g) {
        g = group_of(rest, member);
        uint32_t x = (uint32_t)a[__builtin_ctz(g)];
        for (uint32_t m = g & (g - 1); m; m &= m - 1)
            x = reduce(i, x, (uint32_t)a[__builtin_ctz(m)]);
        for (uint32_t m = g; m; m &= m - 1) sg_put(w, &i->o[0], T_B32, __builtin_ctz(m), x);
    }
}

/* === 7. cp.async ============================================================================== */

static copy *copy_new(copies *q) {
    if (q->n == q->room) {
        q->room = q->room ? 2 * q->room : 256;
        q->at = realloc(q->at, q->room * sizeof *q->at);
        if (!q->at) sg_stop(NULL, NULL, NULL, "no memory for a cp.async");
    }
    return &q->at[q->n++];
}

/* Bytes that a lane's cp.async reads: all, src-size, or none where its ignore-src holds. */
static unsigned source_bytes(sg_block *b, sg_warp *w, const sg_instr *i, int lane, unsigned size) {
    const sg_operand *o = &i->o[3];
    if (i->n < 4) return size;
    if (o->kind == O_REG && w->func && w->func->reg[o->reg] == T_PRED)
        return sg_get(b, w, o, T_PRED, lane) & 1 ? 0 : size;
    uint32_t n = (uint32_t)sg_get(b, w, o, T_B32, lane);
    if (n <= size) return n;
    sg_violation(b, w, i, lane, "cp.async of %u bytes from a source of %u", size, n);
    return size;
}

/* The source is read now, the destination given up until the wait. */
static void copy_begin(sg_block *b, sg_warp *w, const sg_instr *i, int lane, unsigned size) {
    sg_shadow *s = b->shadow;
    access a = begin(b, w, i, lane, SG_WRITE);
    sg_space to = S_SHARED, from = S_GLOBAL;
    uint64_t offset = sg_address(b, w, &i->o[0], &to, lane);
    uint64_t source = sg_address(b, w, &i->o[1], &from, lane);
    unsigned n = source_bytes(b, w, i, lane, size);
    copy c = {.i = i, .offset = (uint32_t)offset, .bytes = size, .lane = lane,
              .group = s->copy[w->id].group[lane]};
    if (source % size)
        sg_violation(b, w, i, lane, "cp.async from address %llx, not aligned to %u",
                     (unsigned long long)source, size);
    else if (n) {
        const void *p = sg_global(b, w, i, lane, source, n, SG_READ);
        if (p) memcpy(c.data, p, n);
    }
    if (!inside(&a, offset, size)) return;
    for (size_t word = offset / 4; word < (offset + size) / 4; word++) {
        touch_word(&a, word, 0, 4);
        s->word.cell[word].copier = (uint16_t)(a.thread + 1);
    }
    memset(b->shared + offset, 0xff, size);        /* NaN, as floats of any size go */
    *copy_new(&s->copy[w->id]) = c;
}

static void copy_start(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    if (i->n < 3 || i->n > 4 || i->o[2].kind != O_IMM)
        sg_stop(b, w, i, "this form of cp.async");
    unsigned size = (unsigned)i->o[2].imm;
    if ((size != 4 && size != 8 && size != 16) || (sg_has(i, M_CG) && size != 16))
        sg_stop(b, w, i, "cp.async of %u bytes", size);
    for (uint32_t m = mask; m; m &= m - 1) copy_begin(b, w, i, __builtin_ctz(m), size);
}

/* The bytes are there, as if the thread had written them at its wait. */
static void copy_land(sg_block *b, const sg_warp *w, const copy *c) {
    sg_shadow *s = b->shadow;
    memcpy(b->shared + c->offset, c->data, c->bytes);
    for (size_t word = c->offset / 4; word < (c->offset + c->bytes) / 4; word++)
        s->word.cell[word] = (cell){.write = c->i, .step = step_of(w), .serial = s->serial,
                                    .thread = (uint16_t)(w->id * SG_LANES + c->lane)};
}

/* Lanes wait for all of their groups but the last `left`; all: also for what has no group yet. */
static void copy_wait(sg_block *b, sg_warp *w, uint32_t mask, uint64_t left, bool all) {
    copies *q = &b->shadow->copy[w->id];
    size_t kept = 0;
    for (size_t k = 0; k < q->n; k++) {
        const copy *c = &q->at[k];
        bool covered = all || c->group + left < q->group[c->lane];
        if (mask >> c->lane & 1 && covered) copy_land(b, w, c);
        else if (kept != k) q->at[kept++] = *c;
        else kept++;
    }
    q->n = kept;
}

static void copy_commit(sg_block *b, sg_warp *w, uint32_t mask) {
    for (; mask; mask &= mask - 1) b->shadow->copy[w->id].group[__builtin_ctz(mask)]++;
}

/* === 8. sg_sync, opening and closing ========================================================== */

sg_result sg_sync(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    switch (i->op) {
    case OP_BAR_SYNC: case OP_BARRIER_SYNC: case OP_BAR_ARRIVE: case OP_BAR_ARRIVE2:
    case OP_BAR_RED:
        return mask ? arrive(b, w, i, mask) : SG_DONE;
    case OP_BAR_WARP:
        if (mask) sync_warp(b, w, i, mask);
        return SG_DONE;
    case OP_SHFL:
        if (mask) shfl(b, w, i, mask);
        return SG_DONE;
    case OP_VOTE:
        if (mask) vote(b, w, i, mask);
        return SG_DONE;
    case OP_MATCH:
        if (mask) match(b, w, i, mask);
        return SG_DONE;
    case OP_REDUX:
        if (mask) redux(b, w, i, mask);
        return SG_DONE;
    case OP_ACTIVEMASK:
        for (uint32_t m = mask; m; m &= m - 1)
            sg_put(w, &i->o[0], T_B32, __builtin_ctz(m), mask);
        return SG_DONE;
    case OP_CP_ASYNC:
        copy_start(b, w, i, mask);
        return SG_DONE;
    case OP_CP_COMMIT:
        copy_commit(b, w, mask);
        return SG_DONE;
    case OP_CP_WAIT:
        if (i->o[0].kind != O_IMM) sg_stop(b, w, i, "this form of cp.async.wait_group");
        copy_wait(b, w, mask, i->o[0].imm, false);
        return SG_DONE;
    case OP_CP_WAIT_ALL:
        copy_wait(b, w, mask, 0, true);
        return SG_DONE;
    default:
        return SG_NOT_MINE;
    }
}

void sg_shared_open(sg_block *b) {
    sg_shadow *s = shadow_for((b->shared_bytes + 3u) / 4, b->n_warps);
    for (int v = 0; v < b->n_warps; v++) {
        int n = b->n_threads - v * SG_LANES;
        s->born[v] = n >= SG_LANES ? UINT32_MAX : n > 0 ? BIT(n) - 1 : 0;
        s->full[v] = 0;
        if (s->partial[v]) memset(s->lane[v], 0, sizeof s->lane[v]);
        s->partial[v] = false;
        memset(s->clock[v], 0, sizeof s->clock[v]);
        memset(s->copy[v].group, 0, sizeof s->copy[v].group);
        s->copy[v].n = 0;
    }
    memset(s->bar, 0, sizeof s->bar);
    b->shadow = s;
}

void sg_shared_close(sg_block *b) {
    sg_shadow *s = b->shadow;
    if (!s) return;
    for (int v = 0; v < b->n_warps; v++) {
        const copies *q = &s->copy[v];
        if (!q->n) continue;
        sg_violation(b, &b->warp[v], q->at[0].i, q->at[0].lane,
                     "the block ends, and the thread has never waited for this cp.async (nor for "
                     "%zu more of its warp)", q->n - 1);
    }
    for (int id = 0; id < SG_BARRIERS; id++) {
        const barrier *p = &s->bar[id];
        if (!p->warps) continue;
        int v = __builtin_ctz(p->warps);
        sg_violation(b, &b->warp[v], p->instr[v], __builtin_ctz(p->lanes[v]),
                     "the block ends with barrier %d incomplete: %u threads arrived, %u are "
                     "missing", id, p->arrived, missing(b, p));
    }
    s->next = spare;
    spare = s;
    b->shadow = NULL;
}
