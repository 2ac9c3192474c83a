/* exec.c -- runs a grid: block by block, warp by warp, 32 lanes at once.
 *
 *   sg_run --> block --> warp, a number of instructions --> another warp ...
 *                          |
 *                        frame of a function: registers, .param, and the paths that its lanes are
 *                        on.  The last path runs; a bra that splits it leaves
 *
 *                           {meet, outer meet, all} {else, meet, some} {then, meet, the others}
 *
 *                        and a path that has come to its meeting point is taken off.
 *
 * A path's lanes get strictly fewer with every split, so 2 * 32 + 1 paths are enough.  A frame's
 * lanes come back to the caller together; those that return early wait.  Warps of a block change
 * at seeded places, blocks run in a seeded order, each to its end before the next one begins.
 *
 * Contents   1 frames and paths   2 operands   3 memory   4 ld and st   5 atomics   6 addresses
 *            7 control   8 a warp   9 a block   10 sg_run
 * Not here   arithmetic (alu.c), barriers and shared memory (shared.c), matrices (tensor.c)      */
#include "softgpu.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint64_t sg_steps_max = 1ull << 36;

enum { PATHS = 2 * SG_LANES + 2, FRAMES = 64, QUANTUM = 4096 };

/* === 1. Frames and paths ====================================================================== */

typedef struct { int pc, meet; uint32_t mask; } path;   /* meet -1: when the function ends      */

struct sg_frame {
    sg_frame *up, *down;                   /* the caller; the next one down is kept for reuse   */
    const sg_func *func;
    uint64_t *reg;                         /* [n_regs][32]                                      */
    uint8_t *param;                        /* [32][param_bytes]                                 */
    size_t reg_room, param_room;
    uint64_t local_base, local_stride;     /* of this frame; of a lane                          */
    const sg_instr *call;                  /* that made it                                      */
    uint32_t called;                       /* lanes it was called with                          */
    int depth, n;
    path path[PATHS];
};

typedef struct {
    sg_block b;
    const sg_launch *l;
    uint64_t local_stride;                 /* bytes of .local a lane: data, then as many marks  */
    uint64_t random;                       /* 0: everything in order                            */
    uint64_t steps;                        /* lane instructions of this launch                  */
} machine;

static void *must(void *p) {
    if (p) return p;
    fputs("softgpu: out of memory\n", stderr);
    exit(87);
}

static uint64_t draw(machine *m) {
    m->random ^= m->random << 13;
    m->random ^= m->random >> 7;
    m->random ^= m->random << 17;
    return m->random * 0x9e3779b97f4a7c15ull >> 20;
}

/* What w->pc, active, reg and func are: of the path that runs. */
static void show(sg_warp *w) {
    const path *p = &w->frame->path[w->frame->n - 1];
    w->pc = p->pc;
    w->active = p->mask;
}

static void enter(sg_warp *w, sg_frame *f, const sg_func *func, uint32_t mask) {
    size_t regs = (size_t)func->n_regs * SG_LANES + 1, param = func->param_bytes * SG_LANES + 1;
    if (regs > f->reg_room) {
        free(f->reg);
        f->reg = must(aligned_alloc(64, (regs * sizeof *f->reg + 63) & ~(size_t)63));
        memset(f->reg, 0, regs * sizeof *f->reg);
        f->reg_room = regs;
    }
    if (param > f->param_room) {
        free(f->param);
        f->param = must(calloc(1, param));
        f->param_room = param;
    }
    f->func = func;
    f->n = 1;
    f->path[0] = (path){0, -1, mask};
    w->frame = f;
    w->func = func;
    w->reg = f->reg;
    show(w);
}

static void free_frames(sg_frame *f) {
    while (f) {
        sg_frame *down = f->down;
        free(f->reg);
        free(f->param);
        free(f);
        f = down;
    }
}

/* Lanes leave all paths of a frame. */
static void take_off(sg_frame *f, uint32_t lanes) {
    for (int k = 0; k < f->n; k++) f->path[k].mask &= ~lanes;
    while (f->n && !f->path[f->n - 1].mask) f->n--;
}

/* === 2. Operands ============================================================================== */

static inline uint64_t low_bits(sg_type t) { return sg_low_bits[t]; }

static uint64_t thread_axis(const sg_block *b, int thread, int axis) {
    sg_dim d = b->launch->block;
    uint32_t t = (uint32_t)thread;
    return axis == 0 ? t % d.x : axis == 1 ? t / d.x % d.y : t / d.x / d.y;
}

static uint64_t special(const sg_block *b, const sg_warp *w, int which, int lane) {
    const sg_launch *l = b->launch;
    int thread = w->id * SG_LANES + lane;
    uint32_t bit = 1u << lane;
    switch (which) {
    case SR_TID_X: case SR_TID_Y: case SR_TID_Z: return thread_axis(b, thread, which - SR_TID_X);
    case SR_NTID_X: return l->block.x;
    case SR_NTID_Y: return l->block.y;
    case SR_NTID_Z: return l->block.z;
    case SR_CTAID_X: return b->ctaid.x;
    case SR_CTAID_Y: return b->ctaid.y;
    case SR_CTAID_Z: return b->ctaid.z;
    case SR_NCTAID_X: return l->grid.x;
    case SR_NCTAID_Y: return l->grid.y;
    case SR_NCTAID_Z: return l->grid.z;
    case SR_LANEID: return (uint64_t)lane;
    case SR_WARPID: return (uint64_t)w->id;
    case SR_NWARPID: return (uint64_t)b->n_warps;
    case SR_SMID: return l->device->n_sms ? b->index % (uint64_t)l->device->n_sms : 0;
    case SR_NSMID: return (uint64_t)l->device->n_sms;
    case SR_LANEMASK_EQ: return bit;
    case SR_LANEMASK_LT: return bit - 1;
    case SR_LANEMASK_LE: return bit | (bit - 1);
    case SR_LANEMASK_GT: return (uint32_t) ~(bit | (bit - 1));
    case SR_LANEMASK_GE: return (uint32_t) ~(bit - 1);
    case SR_CLOCK: return (uint32_t)(w->steps * 4);
    case SR_CLOCK64: case SR_GLOBALTIMER: return w->steps * 4;
    case SR_DYNAMIC_SMEM_SIZE: return l->dynamic_shared;
    case SR_TOTAL_SMEM_SIZE: return b->shared_bytes;
    default: sg_stop(b, w, NULL, "special register %d is not known", which);
    }
}

static uint64_t symbol_address(const sg_block *b, const sg_warp *w, int32_t symbol) {
    const sg_symbol *s = &w->func->symbol[symbol];
    switch ((int)s->space) {
    case S_GLOBAL: case S_CONST: return sg_symbol_address(b->launch->module, s->module_symbol);
    case S_LOCAL: return s->offset + (w->frame ? w->frame->local_base : 0);
    default: return s->offset;
    }
}

uint64_t sg_get(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_type t, int lane) {
    uint64_t v;
    switch ((int)o->kind) {
    case O_REG: v = w->reg[(size_t)o->reg * SG_LANES + (size_t)lane]; break;
    case O_IMM: v = o->imm; break;
    case O_SPECIAL: v = special(b, w, o->reg, lane); break;
    case O_SYMBOL: v = symbol_address(b, w, o->symbol) + o->imm; break;
    default: sg_stop(b, w, NULL, "an operand of kind %d has no value", (int)o->kind);
    }
    if (o->negate) {
        uint64_t sign = sg_type_bytes(t) ? 1ull << (8 * sg_type_bytes(t) - 1) : 0;
        v = t == T_PRED ? v ^ 1 : sg_type_float(t) ? v ^ sign : 0 - v;
    }
    return v & low_bits(t);
}

void sg_put(sg_warp *w, const sg_operand *o, sg_type t, int lane, uint64_t bits) {
    if (o->kind != O_REG) return;
    w->reg[(size_t)o->reg * SG_LANES + (size_t)lane] = bits & low_bits(t);
}

static inline bool within(uint64_t address, uint64_t window) {
    return address - window < SG_WINDOW_BYTES;
}

static inline sg_space resolve(uint64_t *address) {
    static const uint64_t window[] = {SG_SHARED_WINDOW, SG_LOCAL_WINDOW, SG_PARAM_WINDOW};
    static const sg_space space[] = {S_SHARED, S_LOCAL, S_PARAM};
    if (*address < SG_SHARED_WINDOW) return S_GLOBAL;
    for (int k = 0; k < 3; k++) {
        if (!within(*address, window[k])) continue;
        *address -= window[k];
        return space[k];
    }
    return S_GLOBAL;
}

/* What an address has in common in all lanes. */
typedef struct { const uint64_t *reg; uint64_t add, cut; sg_space space; } base;

static inline base base_of(const sg_block *b, const sg_warp *w, const sg_operand *o,
                           sg_space space) {
    static const uint64_t zero[SG_LANES];
    base x = {zero, o->imm, ~0ull, space};
    if (o->symbol >= 0) {
        x.add += symbol_address(b, w, o->symbol);
        if (space == S_GENERIC) x.space = w->func->symbol[o->symbol].space;
    } else if (o->reg >= 0) {
        x.reg = w->reg + (size_t)o->reg * SG_LANES;
        x.cut = low_bits(w->func->reg[o->reg]);
    }
    return x;
}

static inline uint64_t address_at(const base *x, sg_space *space, int lane) {
    uint64_t a = (x->reg[lane] + x->add) & x->cut;
    *space = x->space;
    if (x->space == S_GENERIC) *space = resolve(&a);
    return a;
}

uint64_t sg_address(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_space *space,
                    int lane) {
    base x = base_of(b, w, o, *space);
    return address_at(&x, space, lane);
}

/* === 3. Memory ================================================================================ */

static void *local_memory(sg_block *b, sg_warp *w, const sg_instr *i, int lane, uint64_t address,
                          unsigned bytes, sg_access kind) {
    uint64_t stride = w->frame->local_stride;
    uint8_t *p = w->local + (size_t)lane * stride, *mark = p + SG_LANES * stride;
    uint64_t end = w->frame->local_base + w->func->local_bytes;
    if (address >= end || bytes > end - address) {
        sg_violation(b, w, i, lane, "%u bytes at .local %llu, of %llu", bytes,
                     (unsigned long long)address, (unsigned long long)end);
        return NULL;
    }
    for (unsigned k = 0; k < bytes && kind != SG_WRITE; k++) {
        if (mark[address + k]) continue;
        sg_violation(b, w, i, lane, "reads .local %llu, which was never written",
                     (unsigned long long)(address + k));
        break;
    }
    if (kind != SG_READ) memset(mark + address, 1, bytes);
    return p + address;
}

/* Kernel parameters are the launch's, whoever reads them through a generic address. */
static void *param_memory(sg_block *b, sg_warp *w, const sg_instr *i, int lane, uint64_t address,
                          unsigned bytes, sg_access kind) {
    const sg_frame *f = w->frame;
    const sg_func *entry = b->launch->func;
    bool kernel = i->space != S_PARAM || (!f->up && address < entry->args_bytes);
    uint64_t end = kernel ? entry->args_bytes : f->func->param_bytes;
    if (address >= end || bytes > end - address) {
        sg_violation(b, w, i, lane, "%u bytes at .param %llu, of %llu", bytes,
                     (unsigned long long)address, (unsigned long long)end);
        return NULL;
    }
    if (!kernel) return f->param + (size_t)lane * f->func->param_bytes + address;
    if (kind == SG_READ) return (void *)(uintptr_t)(b->launch->param + address);
    sg_violation(b, w, i, lane, "writes to a kernel parameter");
    return NULL;
}

static inline void *memory(sg_block *b, sg_warp *w, const sg_instr *i, int lane, sg_space space,
                           uint64_t address, unsigned bytes, sg_access kind) {
    if (address & (bytes - 1)) {
        sg_violation(b, w, i, lane, "address 0x%llx is not aligned to the %u bytes of the access",
                     (unsigned long long)address, bytes);
        return NULL;
    }
    switch ((int)space) {
    case S_SHARED: return sg_shared(b, w, i, lane, address, bytes, kind);
    case S_LOCAL: return local_memory(b, w, i, lane, address, bytes, kind);
    case S_PARAM: return param_memory(b, w, i, lane, address, bytes, kind);
    default: return sg_global(b, w, i, lane, address, bytes, kind);
    }
}

void *sg_memory(sg_block *b, sg_warp *w, const sg_instr *i, int lane, sg_space space,
                uint64_t address, unsigned bytes, sg_access kind) {
    return memory(b, w, i, lane, space, address, bytes, kind);
}

static inline uint64_t read_bits(const uint8_t *p, unsigned bytes) {
    uint16_t h;
    uint32_t s;
    uint64_t d;
    switch (bytes) {
    case 1: return *p;
    case 2: memcpy(&h, p, 2); return h;
    case 4: memcpy(&s, p, 4); return s;
    default: memcpy(&d, p, 8); return d;
    }
}

static inline void write_bits(uint8_t *p, unsigned bytes, uint64_t v) {
    switch (bytes) {
    case 1: memcpy(p, &v, 1); break;
    case 2: memcpy(p, &v, 2); break;
    case 4: memcpy(p, &v, 4); break;
    default: memcpy(p, &v, 8); break;
    }
}

/* === 4. ld and st ============================================================================= */

/* A signed value is extended to the width of its register. */
static uint64_t extended(uint64_t v, unsigned bytes, sg_type reg) {
    unsigned cut = 64 - 8 * bytes;
    return (uint64_t)((int64_t)(v << cut) >> cut) & low_bits(reg);
}

static inline void load_lane(sg_warp *w, const sg_instr *i, int lane, const uint8_t *p,
                             unsigned bytes, bool sign) {
    const sg_operand *o = &i->o[0];
    int n = o->kind == O_VEC ? o->n : 1;
    for (int k = 0; k < n; k++) {
        int32_t reg = o->kind == O_VEC ? o->vec[k] : o->kind == O_REG ? o->reg : -1;
        if (reg < 0) continue;
        uint64_t v = p ? read_bits(p + (unsigned)k * bytes, bytes) : 0;
        if (sign) v = extended(v, bytes, w->func->reg[reg]);
        w->reg[(size_t)reg * SG_LANES + (size_t)lane] = v;
    }
}

static unsigned access_bytes(machine *m, sg_warp *w, const sg_instr *i, const sg_operand *value,
                             unsigned *one) {
    *one = sg_type_bytes(i->type[0]);
    unsigned n = value->kind == O_VEC ? value->n : 1;
    if (!*one || *one > 8) sg_stop(&m->b, w, i, "this type is not known here");
    if (i->vec > 1 ? n != i->vec : n != 1) sg_stop(&m->b, w, i, "a vector of other length");
    return *one * n;
}

static void load(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    unsigned one, bytes = access_bytes(m, w, i, &i->o[0], &one);
    bool sign = sg_type_signed(i->type[0]);
    base x = base_of(&m->b, w, &i->o[1], (sg_space)i->space);
    const uint8_t *p = NULL;
    uint64_t before = 0;                   /* all lanes at one place are one look at it         */
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        sg_space space;
        uint64_t a = address_at(&x, &space, lane);
        if (space != S_GLOBAL || a != before || !p) {
            p = memory(&m->b, w, i, lane, space, a, bytes, SG_READ);
        }
        before = space == S_GLOBAL ? a : 0;
        load_lane(w, i, lane, p, one, sign);
    }
}

static void store(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    const sg_operand *o = &i->o[1];
    unsigned one, bytes = access_bytes(m, w, i, o, &one);
    base x = base_of(&m->b, w, &i->o[0], (sg_space)i->space);
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        sg_space space;
        uint64_t a = address_at(&x, &space, lane);
        uint8_t *p = memory(&m->b, w, i, lane, space, a, bytes, SG_WRITE);
        if (!p) continue;
        if (o->kind != O_VEC) {
            write_bits(p, one, sg_get(&m->b, w, o, i->type[0], lane));
            continue;
        }
        for (unsigned k = 0; k < o->n; k++) {
            uint64_t v = o->vec[k] < 0 ? o->vec_imm[k]
                                       : w->reg[(size_t)o->vec[k] * SG_LANES + (size_t)lane];
            write_bits(p + k * one, one, v);
        }
    }
}

/* === 5. Atomics =============================================================================== */

static bool less(sg_type t, uint64_t a, uint64_t b) {
    unsigned cut = 64 - 8 * sg_type_bytes(t);
    if (!sg_type_signed(t)) return a < b;
    return (int64_t)(a << cut) < (int64_t)(b << cut);
}

/* False: not one that is known. */
static bool combine(const sg_instr *i, uint64_t old, uint64_t b, uint64_t c, uint64_t *out) {
    sg_type t = i->type[0];
    if (sg_has(i, M_ADD)) *out = old + b;
    else if (sg_has(i, M_MIN)) *out = less(t, b, old) ? b : old;
    else if (sg_has(i, M_MAX)) *out = less(t, old, b) ? b : old;
    else if (sg_has(i, M_AND)) *out = old & b;
    else if (sg_has(i, M_OR)) *out = old | b;
    else if (sg_has(i, M_XOR)) *out = old ^ b;
    else if (sg_has(i, M_EXCH)) *out = b;
    else if (sg_has(i, M_CAS)) *out = old == b ? c : old;
    else if (sg_has(i, M_INC)) *out = old >= b ? 0 : old + 1;
    else if (sg_has(i, M_DEC)) *out = old == 0 || old > b ? b : old - 1;
    else return false;
    return true;
}

/* Lanes take their turns: in order, or from a seeded one on. */
static void atomic(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    int has = i->op == OP_ATOM;                        /* red has no result */
    unsigned bytes = sg_type_bytes(i->type[0]);
    int first = m->random ? (int)(draw(m) % SG_LANES) : 0;
    bool cas = sg_has(i, M_CAS);
    if (sg_type_float(i->type[0])) {
        sg_stop(&m->b, w, i, "floating-point atomics: their order changes results");
    }
    if (i->vec > 1 || bytes > 8 || bytes < (cas ? 2 : 4) || i->n != 2 + has + cas) {
        sg_stop(&m->b, w, i, "this atomic is not known");
    }
    base x = base_of(&m->b, w, &i->o[has], (sg_space)i->space);
    for (int k = 0; k < SG_LANES; k++) {
        int lane = (first + k) % SG_LANES;
        if (!(mask >> lane & 1)) continue;
        sg_space space;
        uint64_t a = address_at(&x, &space, lane), next, old;
        uint64_t b = sg_get(&m->b, w, &i->o[has + 1], i->type[0], lane);
        uint64_t c = cas ? sg_get(&m->b, w, &i->o[has + 2], i->type[0], lane) : 0;
        uint8_t *p = memory(&m->b, w, i, lane, space, a, bytes, SG_ATOMIC);
        if (!p) continue;
        old = read_bits(p, bytes);
        if (!combine(i, old, b, c, &next)) sg_stop(&m->b, w, i, "this atomic is not known");
        write_bits(p, bytes, next);
        if (has) sg_put(w, &i->o[0], i->type[0], lane, old);
    }
}

/* === 6. Addresses ============================================================================= */

static uint64_t window_of(machine *m, sg_warp *w, const sg_instr *i) {
    switch ((int)i->space) {
    case S_SHARED: return SG_SHARED_WINDOW;
    case S_LOCAL: return SG_LOCAL_WINDOW;
    case S_PARAM: return SG_PARAM_WINDOW;
    case S_GLOBAL: case S_CONST: return 0;
    default: sg_stop(&m->b, w, i, "this space is not known");
    }
}

static void cvta(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    uint64_t window = window_of(m, w, i);
    bool to = sg_has(i, M_TO);
    for (; mask; mask &= mask - 1) {
        int lane = __builtin_ctz(mask);
        uint64_t a = sg_get(&m->b, w, &i->o[1], i->type[0], lane);
        sg_put(w, &i->o[0], i->type[0], lane, to ? a - window : a + window);
    }
}

static void isspacep(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    uint64_t window = window_of(m, w, i);
    if (i->space == S_CONST) sg_stop(&m->b, w, i, "constants lie in global memory here");
    for (; mask; mask &= mask - 1) {
        int lane = __builtin_ctz(mask);
        uint64_t a = sg_get(&m->b, w, &i->o[1], T_U64, lane);
        bool in = window ? within(a, window) : a < SG_SHARED_WINDOW;
        sg_put(w, &i->o[0], T_PRED, lane, in);
    }
}

/* === 7. Control =============================================================================== */

static inline uint32_t true_lanes(const uint64_t *p) {
    uint32_t mask = 0;
#ifdef __AVX2__
    for (int k = 0; k < 8; k++) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(p + 4 * k));
        v = _mm256_slli_epi64(v, 63);
        mask |= (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(v)) << (4 * k);
    }
#else
    for (int l = 0; l < SG_LANES; l++) mask |= (uint32_t)(p[l] & 1) << l;
#endif
    return mask;
}

/* Lanes in `taken` go to the target, the others of the path on; which side runs first is open. */
static void branch(machine *m, sg_warp *w, const sg_instr *i, uint32_t taken) {
    sg_frame *f = w->frame;
    path *p = &f->path[f->n - 1];
    int target = i->o[0].reg, next = w->pc + 1, meet = i->reconverge;
    uint32_t rest = w->active & ~taken;
    if (!rest || !taken) {
        p->pc = w->pc = rest ? next : target;
        return;
    }
    if (meet < 0) meet = p->meet;
    if (meet == p->meet) f->n--;             /* the path below is there already, or the end is */
    else p->pc = meet;
    path go = {target, meet, taken}, on = {next, meet, rest};
    bool flip = m->random && draw(m) & 1;
    if (f->n + 2 > PATHS) sg_stop(&m->b, w, i, "too many paths");
    const path *first = flip ? &on : &go, *second = flip ? &go : &on;
    if (meet < 0 || first->pc != meet) f->path[f->n++] = *first;
    if (meet < 0 || second->pc != meet) f->path[f->n++] = *second;
    show(w);
}

static void copy_param(const sg_frame *from, const sg_symbol *s, sg_frame *to,
                       const sg_symbol *d, uint32_t mask) {
    for (; mask; mask &= mask - 1) {
        size_t lane = (size_t)__builtin_ctz(mask);
        memcpy(to->param + lane * to->func->param_bytes + d->offset,
               from->param + lane * from->func->param_bytes + s->offset, d->bytes);
    }
}

static void call(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    sg_frame *f = w->frame, *g = f->down;
    if (i->o[0].kind != O_FUNC) sg_stop(&m->b, w, i, "calls through pointers are not known");
    const sg_func *to = &m->l->module->func[i->o[0].reg];
    if (to->external) sg_stop(&m->b, w, i, "calls %s, which has no code", to->name);
    if (f->depth + 1 == FRAMES) {
        sg_violation(&m->b, w, i, __builtin_ctz(mask), "%d calls deep: endless?", FRAMES);
        sg_stop(&m->b, w, i, "no deeper calls");
    }
    if (!g) {
        g = f->down = must(calloc(1, sizeof *g));
        g->up = f;
        g->depth = f->depth + 1;
    }
    g->call = i;
    g->called = mask;
    g->local_stride = f->local_stride;
    g->local_base = (f->local_base + f->func->local_bytes + 15) & ~15ull;
    f->path[f->n - 1].pc = w->pc + 1;
    enter(w, g, to, mask);
    for (int k = 0; k < to->n_params; k++) {
        copy_param(f, &f->func->symbol[i->o[2].vec[k]], g, &to->symbol[k], mask);
    }
    for (uint32_t rest = to->local_bytes ? mask : 0; rest; rest &= rest - 1) {
        size_t lane = SG_LANES + (size_t)__builtin_ctz(rest);
        memset(w->local + lane * g->local_stride + g->local_base, 0, to->local_bytes);
    }
}

/* All of a function's lanes have returned or exited: back to its caller, with the results. */
static void leave(sg_warp *w) {
    sg_frame *g = w->frame, *f = g->up;
    const sg_symbol *from = g->func->symbol + g->func->n_params;
    w->frame = f;
    w->func = f->func;
    w->reg = f->reg;
    for (int k = 0; k < g->func->n_results; k++) {
        copy_param(g, &from[k], f, &f->func->symbol[g->call->o[1].vec[k]], g->called & w->live);
    }
}

/* ret of lanes: out of the function; of the kernel, or exit: for good. */
static void leave_lanes(sg_warp *w, uint32_t lanes, bool for_good) {
    sg_frame *f = w->frame;
    f->path[f->n - 1].pc = w->pc + 1;
    take_off(f, lanes);
    if (for_good || !f->up) {
        w->live &= ~lanes;
        while ((f = f->up)) take_off(f, lanes);
    }
    while (!w->frame->n && w->frame->up) leave(w);
    if (w->frame->n) show(w);
    else w->active = 0;
}

/* === 8. A warp ================================================================================ */

static void trap(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    sg_violation(&m->b, w, i, __builtin_ctz(mask), "trap");
    leave_lanes(w, mask, true);
}

/* What moves w->pc itself; false: nothing of that. */
static bool control(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    switch ((int)i->op) {
    case OP_BRA: branch(m, w, i, mask); return true;
    case OP_RET: leave_lanes(w, mask, false); return true;
    case OP_EXIT: leave_lanes(w, mask, true); return true;
    case OP_CALL: call(m, w, i, mask); return true;
    case OP_TRAP: trap(m, w, i, mask); return true;
    default: return false;
    }
}

/* One instruction that is no control; false: the warp waits. */
static bool plain(machine *m, sg_warp *w, const sg_instr *i, uint32_t mask) {
    switch ((int)i->op) {
    case OP_LD: case OP_LDU: load(m, w, i, mask); return true;
    case OP_ST: store(m, w, i, mask); return true;
    case OP_ATOM: case OP_RED: atomic(m, w, i, mask); return true;
    case OP_CVTA: cvta(m, w, i, mask); return true;
    case OP_ISSPACEP: isspacep(m, w, i, mask); return true;
    case OP_MEMBAR: case OP_FENCE: case OP_PREFETCH: case OP_NANOSLEEP: return true;
    case OP_LDMATRIX: case OP_MMA:
        if (!sg_tensor(&m->b, w, i, mask)) break;
        return true;
    case OP_ACTIVEMASK: case OP_BAR_ARRIVE: case OP_BAR_ARRIVE2: case OP_BAR_SYNC:
    case OP_BARRIER_SYNC: case OP_BAR_RED: case OP_BAR_WARP: case OP_CP_ASYNC: case OP_CP_COMMIT:
    case OP_CP_WAIT: case OP_CP_WAIT_ALL: case OP_MATCH: case OP_REDUX: case OP_SHFL:
    case OP_VOTE: {
        sg_result r = sg_sync(&m->b, w, i, mask);
        if (r == SG_NOT_MINE) break;
        return r == SG_DONE;
    }
    default:
        if (!sg_alu(&m->b, w, i, mask)) break;
        return true;
    }
    sg_stop(&m->b, w, i, "this instruction is not known");
}

/* Run a warp for some instructions, until it waits or ends. */
static void run_warp(machine *m, sg_warp *w, int quantum) {
    while (quantum-- > 0 && w->live) {
        sg_frame *f = w->frame;
        if (w->pc == f->path[f->n - 1].meet) {
            do f->n--;
            while (!f->path[f->n - 1].mask);
            show(w);
            continue;
        }
        const sg_instr *i = &w->func->code[w->pc];
        uint32_t mask = w->active;
        if (i->guard >= 0) {
            uint32_t on = true_lanes(w->reg + (size_t)i->guard * SG_LANES);
            mask &= i->guard_not ? ~on : on;
        }
        m->steps += (uint64_t)__builtin_popcount(w->active);
        if (mask && control(m, w, i, mask)) {
            w->steps++;
            continue;
        }
        bool on = !mask || plain(m, w, i, mask);
        w->steps++;
        w->pc++;
        if (!on) return;
    }
}

/* === 9. A block =============================================================================== */

static void open_warp(machine *m, sg_warp *w, int id) {
    int threads = m->b.n_threads - id * SG_LANES;
    sg_frame *f = w->frame;
    while (f->up) f = f->up;
    w->id = id;
    w->live = threads >= SG_LANES ? 0xffffffffu : (1u << threads) - 1;
    w->barrier = -1;
    w->sync_count = w->steps = 0;
    w->carry = 0;
    f->local_stride = m->local_stride;
    f->local_base = 0;
    enter(w, f, m->l->func, w->live);
    for (size_t lane = SG_LANES; m->l->func->local_bytes && lane < 2 * SG_LANES; lane++) {
        memset(w->local + lane * m->local_stride, 0, m->l->func->local_bytes);
    }
}

static void deadlock(machine *m) {
    char text[2000] = "";
    size_t n = 0;
    const sg_warp *first = NULL;
    uint32_t told = 0;
    for (int k = 0; k < m->b.n_warps && n < sizeof text - 256; k++) {
        const sg_warp *w = &m->b.warp[k];
        if (!w->live || w->barrier < 0) continue;
        if (!first) first = w;
        if (told >> w->barrier & 1) continue;
        told |= 1u << w->barrier;
        n += (size_t)snprintf(text + n, sizeof text - n, "; PTX line %d: ",
                              w->func->code[w->pc - 1].ptx_line);
        sg_barrier_text(&m->b, w->barrier, text + n, sizeof text - n);
        n += strlen(text + n);
    }
    if (!first) return;
    sg_violation(&m->b, first, &first->func->code[first->pc - 1], __builtin_ctz(first->active),
                 "deadlock: every warp waits%s", text);
}

/* A quantum of any size: often few instructions, sometimes thousands. */
static int quantum(machine *m) {
    if (!m->random) return QUANTUM;
    uint64_t r = draw(m);
    return 1 + (int)(r >> 8 & ((2ull << (r % 12)) - 1));
}

static void run_block(machine *m) {
    sg_block *b = &m->b;
    for (int k = 0; k < b->n_warps; k++) open_warp(m, &b->warp[k], k);
    sg_shared_open(b);
    for (bool alive = true, moved = true; alive;) {
        if (!moved) {
            deadlock(m);
            break;
        }
        alive = moved = false;
        int first = m->random ? (int)(draw(m) % (uint64_t)b->n_warps) : 0;
        for (int k = 0; k < b->n_warps; k++) {
            sg_warp *w = &b->warp[(first + k) % b->n_warps];
            if (!w->live) continue;
            alive = true;
            if (w->barrier >= 0 && !sg_released(b, w)) continue;
            w->barrier = -1;
            moved = true;
            run_warp(m, w, quantum(m));
            if (m->steps > sg_steps_max) {
                sg_stop(b, w, &w->func->code[w->pc], "%llu lane instructions: endless?",
                        (unsigned long long)m->steps);
            }
        }
    }
    sg_shared_close(b);
}

/* === 10. sg_run =============================================================================== */

/* .local of a lane: the kernel's, and for calls as deep as they may go the largest. */
static uint64_t local_room(const sg_launch *l) {
    uint64_t most = 0;
    for (int k = 0; k < l->module->n_funcs; k++) {
        const sg_func *f = &l->module->func[k];
        if (!f->entry && f->local_bytes > most) most = f->local_bytes;
    }
    uint64_t room = (l->func->local_bytes + 15) & ~15ull;
    return room + (most ? FRAMES * ((most + 15) & ~15ull) : 0);
}

static uint64_t common_divisor(uint64_t a, uint64_t b) {
    while (b) {
        uint64_t r = a % b;
        a = b, b = r;
    }
    return a;
}

static void open_machine(machine *m, const sg_launch *l) {
    sg_block *b = &m->b;
    m->l = l;
    m->random = l->seed ? (l->seed + 1) * 0x9e3779b97f4a7c15ull | 1 : 0;
    m->local_stride = local_room(l);
    b->launch = l;
    b->n_threads = (int)(l->block.x * l->block.y * l->block.z);
    b->n_warps = (b->n_threads + SG_LANES - 1) / SG_LANES;
    if (b->n_warps < 1 || b->n_warps > SG_WARPS_MAX) {
        sg_stop(b, NULL, NULL, "%s: a block of %d threads", l->func->name, b->n_threads);
    }
    b->shared_bytes = (uint32_t)l->func->shared_bytes + l->dynamic_shared;
    b->shared = must(calloc(1, (size_t)b->shared_bytes + 16));
    for (int k = 0; k < b->n_warps; k++) {
        b->warp[k].frame = must(calloc(1, sizeof(sg_frame)));
        b->warp[k].local = must(calloc(2 * SG_LANES, m->local_stride + 1));
    }
}

void sg_run(const sg_launch *l) {
    machine *m = must(calloc(1, sizeof *m));
    sg_block *b = &m->b;
    open_machine(m, l);
    uint64_t blocks = (uint64_t)l->grid.x * l->grid.y * l->grid.z, step = 1, at = 0;
    if (m->random && blocks > 1) {
        step = 1 + draw(m) % (blocks - 1);
        while (common_divisor(step, blocks) != 1) step = step % blocks + 1;
        at = draw(m) % blocks;
    }
    for (uint64_t k = 0; k < blocks; k++, at = (at + step) % blocks) {
        b->index = at;
        b->ctaid.x = (uint32_t)(at % l->grid.x);
        b->ctaid.y = (uint32_t)(at / l->grid.x % l->grid.y);
        b->ctaid.z = (uint32_t)(at / l->grid.x / l->grid.y);
        run_block(m);
    }
    for (int k = 0; k < b->n_warps; k++) {
        sg_frame *f = b->warp[k].frame;
        while (f->up) f = f->up;
        free_frames(f);
        free(b->warp[k].local);
    }
    free(b->shared);
    free(m);
}
