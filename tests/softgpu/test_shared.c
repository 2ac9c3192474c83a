/* test_shared.c -- shared.c alone: every check is fired by a planted bug, and not by the program
 * without it; what shfl and its like compute, against their definitions.
 *
 *   block of up to 4 warps  --hand-made sg_instr-->  shared.c  --> violations, counted below
 *   random accesses, syncs  --> shared.c, and an oracle that remembers every access: same verdict
 *
 * The rest of softgpu is played by the stand-ins of section 1.                                   */
#include "../check.h"
#include "softgpu.h"

#include <setjmp.h>
#include <stdarg.h>

/* === 1. Stand-ins and a block to play with ==================================================== */

enum { REGS = 16, SHARED = 4096, WARPS = 4 };

static char said[512];                     /* the last violation                                */
static uint64_t n_said;
static jmp_buf stopped;
static uint8_t global[4096];
static sg_type reg_type[REGS];
static const sg_func func = {.name = "k", .reg = reg_type, .n_regs = REGS};
static const char *files[] = {"", "dir/k.cu"};
static const sg_module module = {.file = files, .n_files = 2};
static sg_launch launch = {.module = &module, .func = &func, .block = {32 * WARPS, 1, 1}};
static uint64_t regs[WARPS][REGS][SG_LANES];
static uint8_t shared[SHARED];
static sg_block block;

unsigned sg_type_bytes(sg_type t) {
    return t == T_B64 ? 8 : t == T_B16 ? 2 : t == T_PRED || t == T_B8 ? 1 : 4;
}
bool sg_type_signed(sg_type t) { return t == T_S32; }
bool sg_type_float(sg_type t) { return t == T_F32; }

uint64_t sg_get(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_type t, int lane) {
    uint64_t x = o->kind == O_REG ? w->reg[o->reg * SG_LANES + lane] : o->imm;
    unsigned n = sg_type_bytes(t);
    (void)b;
    if (t == T_PRED) return (x & 1) ^ o->negate;
    return n == 8 ? x : x & ((1ull << 8 * n) - 1);
}

void sg_put(sg_warp *w, const sg_operand *o, sg_type t, int lane, uint64_t bits) {
    (void)t;
    if (o->kind == O_REG) w->reg[o->reg * SG_LANES + lane] = bits;
}

uint64_t sg_address(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_space *space,
                    int lane) {
    (void)b, (void)space;
    return (o->reg >= 0 ? w->reg[o->reg * SG_LANES + lane] : 0) + o->imm;
}

void *sg_global(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane, uint64_t address,
                unsigned bytes, sg_access kind) {
    (void)kind;
    if (address + bytes <= sizeof global) return global + address;
    sg_violation(b, w, i, lane, "global out of bounds");
    return NULL;
}

void sg_violation(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                  const char *fmt, ...) {
    va_list v;
    int n = snprintf(said, sizeof said, "line %d thread %d: ", i->line, w->id * 32 + lane);
    (void)b;
    va_start(v, fmt);
    vsnprintf(said + n, sizeof said - (size_t)n, fmt, v);
    va_end(v);
    n_said++;
}

_Noreturn void sg_stop(const sg_block *b, const sg_warp *w, const sg_instr *i, const char *fmt,
                       ...) {
    (void)b, (void)w, (void)i;
    snprintf(said, sizeof said, "stop: %s", fmt);
    longjmp(stopped, 1);
}

static void open_block(int threads) {
    memset(&block, 0, sizeof block);
    memset(regs, 0, sizeof regs);
    memset(shared, 0, sizeof shared);
    launch.block.x = (uint32_t)threads;
    block.launch = &launch;
    block.n_threads = threads;
    block.n_warps = (threads + 31) / 32;
    block.shared = shared;
    block.shared_bytes = SHARED;
    for (int v = 0; v < block.n_warps; v++) {
        int n = threads - 32 * v;
        block.warp[v] = (sg_warp){.id = v, .reg = &regs[v][0][0], .func = &func, .barrier = -1};
        block.warp[v].live = block.warp[v].active = n >= 32 ? ~0u : (1u << n) - 1;
    }
    sg_shared_open(&block);
    n_said = 0;
    said[0] = 0;
}

/* Violations since the block was opened or asked for the last time. */
static uint64_t told(void) {
    uint64_t n = n_said;
    n_said = 0;
    return n;
}
static bool says(const char *words) { return strstr(said, words) != NULL; }

static const sg_operand none = {.kind = O_NONE};
static sg_operand R(int r) { return (sg_operand){.kind = O_REG, .reg = r, .symbol = -1}; }
static sg_operand I(uint64_t x) { return (sg_operand){.kind = O_IMM, .imm = x}; }
static sg_operand A(int r) { return (sg_operand){.kind = O_ADDR, .reg = r, .symbol = -1}; }

/* An instruction that lives as long as the test: the shadow points to it. */
static sg_instr *make(sg_op op, int line, sg_operand a, sg_operand b, sg_operand c, sg_operand d) {
    static sg_instr pool[1 << 14];
    static unsigned next;
    sg_instr *i = &pool[next++ % (1 << 14)];
    *i = (sg_instr){.op = op, .type = {T_B32}, .n_types = 1, .guard = -1, .line = line, .file = 1,
                    .o = {a, b, c, d}};
    while (i->n < 4 && i->o[i->n].kind) i->n++;
    return i;
}
static sg_instr *with(sg_instr *i, sg_mod m) {
    i->mod[m / 64] |= 1ull << m % 64;
    return i;
}
static sg_instr *typed(sg_instr *i, sg_type t) {
    i->type[0] = (uint8_t)t;
    return i;
}

static sg_result sync_op(int v, uint32_t mask, const sg_instr *i) {
    sg_result r = sg_sync(&block, &block.warp[v], i, mask);
    block.warp[v].steps++;                 /* as in exec.c: a warp that waits is a step on */
    return r;
}
static sg_result bar(int v, int id, int count) {
    return sync_op(v, block.warp[v].live, make(OP_BAR_SYNC, 0, I((uint64_t)id),
                                               count ? I((uint64_t)count) : none, none, none));
}
static void bar_all(void) {
    for (int v = 0; v < block.n_warps; v++) bar(v, 0, 0);
}
static void syncwarp(int v, uint32_t mask) {
    sync_op(v, mask, make(OP_BAR_WARP, 0, I(mask), none, none, none));
}

/* One ld, st or atom by the lanes of a mask, each at base + stride * lane.  A st writes r1. */
static void go(int v, uint32_t mask, sg_access kind, int line, size_t base, size_t stride,
               unsigned bytes) {
    sg_warp *w = &block.warp[v];
    sg_instr *i = make(kind == SG_READ ? OP_LD : kind == SG_WRITE ? OP_ST : OP_ATOM, line, A(0),
                       R(1), none, none);
    typed(i, bytes == 1 ? T_B8 : bytes == 2 ? T_B16 : bytes == 8 ? T_B64 : T_B32);
    for (int l = 0; l < 32; l++) w->reg[l] = base + stride * (size_t)l;
    for (uint32_t m = mask; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        void *p = sg_shared(&block, w, i, l, w->reg[l], bytes, kind);
        if (kind == SG_WRITE) memcpy(p, &w->reg[32 + l], bytes);
    }
    w->steps++;
}
static void wr(int v, uint32_t mask, int line, size_t base) {
    go(v, mask, SG_WRITE, line, base, 4, 4);
}
static void rd(int v, uint32_t mask, int line, size_t base) {
    go(v, mask, SG_READ, line, base, 4, 4);
}

/* === 2. Bounds, initialization, races ========================================================= */

static void test_bounds_and_alignment(void) {
    open_block(32);
    go(0, 1, SG_WRITE, 1, SHARED - 4, 0, 4);
    CHECK(!told(), "%s", said);
    go(0, 1, SG_WRITE, 1, SHARED - 2, 0, 4);
    CHECK(told() == 1 && says("outside"), "%s", said);
    go(0, 1, SG_WRITE, 1, (size_t)-4, 0, 4);
    CHECK(told() == 1 && says("outside"), "%s", said);
    go(0, 1, SG_WRITE, 1, 4, 0, 8);
    CHECK(told() == 1 && says("aligned to 8"), "%s", said);
    sg_shared_close(&block);
}

static void test_never_written(void) {
    open_block(32);
    rd(0, 1, 7, 0);
    CHECK(told() == 1 && says("never written") && says("line 7 thread 0"), "%s", said);
    go(0, 1, SG_ATOMIC, 8, 64, 0, 4);
    CHECK(told() == 1 && says("atomic of shared byte 64, never written"), "%s", said);
    go(0, 1, SG_WRITE, 9, 128, 0, 2);
    go(0, 1, SG_READ, 9, 128, 0, 2);
    CHECK(!told(), "%s", said);
    go(0, 1, SG_READ, 9, 128, 0, 4);
    CHECK(told() == 1 && says("byte 130, never"), "%s", said);
    wr(0, 1, 1, 256);
    sg_shared_close(&block);
    open_block(32);                        /* the next block starts anew */
    rd(0, 1, 7, 256);
    CHECK(told() == 1, "%s", said);
    sg_shared_close(&block);
}

static void test_races_between_warps(void) {
    static const struct { sg_access a, b; bool race; } t[] = {
        {SG_WRITE, SG_READ, true},   {SG_READ, SG_WRITE, true},    {SG_WRITE, SG_WRITE, true},
        {SG_READ, SG_READ, false},   {SG_ATOMIC, SG_ATOMIC, false}, {SG_ATOMIC, SG_READ, true},
        {SG_READ, SG_ATOMIC, true},  {SG_ATOMIC, SG_WRITE, true},  {SG_WRITE, SG_ATOMIC, true}};
    for (size_t k = 0; k < sizeof t / sizeof *t; k++)
        for (int order = 0; order < 2; order++) {
            open_block(96);
            wr(0, ~0u, 1, 0);
            bar_all();
            go(1, 1u << 3, t[k].a, 10, 12, 0, 4);
            if (order) bar_all();
            go(2, 1u << 5, t[k].b, 20, 12, 0, 4);
            bool race = t[k].race && !order;
            CHECK(told() == race, "pair %zu order %d: %s", k, order, said);
            CHECK(!race || (says("thread (35,0,0)") && says("k.cu:10") &&
                            says("line 20 thread 69")), "%s", said);
            sg_shared_close(&block);
        }
}

static void test_last_of_many_readers_and_atomics(void) {
    open_block(128);
    wr(0, 1, 1, 0);
    bar_all();
    for (int v = 0; v < 3; v++) rd(v, 1, 2, 0);
    go(2, 1, SG_WRITE, 3, 0, 0, 4);        /* warps 0 and 1 still read */
    CHECK(told() == 1 && says("thread (0,0,0) read it"), "%s", said);
    sg_shared_close(&block);
    open_block(128);
    wr(0, 1, 1, 0);
    bar_all();
    for (int v = 0; v < 3; v++) go(v, 2, SG_ATOMIC, 2, 0, 0, 4);
    go(2, 2, SG_READ, 3, 0, 0, 4);         /* its own was the last, but not the only one */
    CHECK(told() == 1 && says("had an atomic on"), "%s", said);
    sg_shared_close(&block);
}

static void test_same_warp_needs_syncwarp(void) {
    for (int how = 0; how < 5; how++) {
        open_block(64);
        wr(0, ~0u, 10, 0);
        if (how == 1) syncwarp(0, ~0u);
        if (how == 2) bar_all();
        if (how == 3)
            sync_op(0, ~0u, with(make(OP_VOTE, 0, R(3), R(4), I(~0u), none), M_SYNC));
        if (how == 4) syncwarp(0, 0xffff);
        go(0, 1, SG_READ, 20, 4, 0, 4);    /* of its neighbour */
        bool race = how == 0 || how == 3;
        CHECK(told() == race, "how %d: %s", how, said);
        CHECK(!race || (says("same-warp exchange without __syncwarp") && says("(1,0,0)")), "%s",
              said);
        go(0, 1, SG_READ, 20, 4 * 20, 0, 4);   /* of lane 20, not in the half */
        CHECK(told() == (race || how == 4), "how %d: %s", how, said);
        sg_shared_close(&block);
    }
}

static void test_write_after_read_in_a_warp(void) {
    open_block(32);
    wr(0, ~0u, 1, 0);
    syncwarp(0, ~0u);
    go(0, 0x7fffffff, SG_READ, 2, 4, 4, 4);
    wr(0, ~0u, 3, 0);                      /* the neighbour may not have read yet */
    CHECK(told() == 31 && says("read it at k.cu:2"), "%s", said);
    sg_shared_close(&block);
}

static void test_part_of_a_warp_stays(void) {
    open_block(32);                        /* lanes 16.. exit; the rest goes on with its mask */
    wr(0, ~0u, 1, 0);
    block.warp[0].live = 0xffff;
    syncwarp(0, 0xffff);
    for (int n = 8; n; n /= 2) {
        uint32_t low = (1u << n) - 1;
        go(0, low, SG_READ, 2, 4 * (size_t)n, 4, 4);
        go(0, low, SG_READ, 2, 0, 4, 4);
        wr(0, low, 3, 0);
        syncwarp(0, 0xffff);
    }
    CHECK(!told(), "%s", said);
    go(0, 1, SG_READ, 4, 4 * 20, 0, 4);    /* of a lane that has exited */
    CHECK(told() == 1, "%s", said);
    sg_shared_close(&block);
}

static void test_bytes_of_a_word(void) {
    open_block(64);
    go(0, ~0u, SG_WRITE, 1, 0, 2, 2);      /* halves by neighbours, and in place */
    go(0, ~0u, SG_READ, 2, 0, 2, 2);
    go(0, ~0u, SG_WRITE, 3, 0, 2, 2);
    go(1, ~0u, SG_WRITE, 1, 64, 1, 1);
    CHECK(!told(), "%s", said);
    go(0, 1, SG_READ, 4, 0, 4, 4);         /* its own half and its neighbour's */
    CHECK(told() == 1 && says("byte 2"), "%s", said);
    bar_all();
    wr(0, 1, 5, 0);                        /* one writer of the whole again */
    go(0, 1, SG_READ, 6, 2, 0, 1);
    CHECK(!told(), "%s", said);
    go(1, 1, SG_READ, 7, 3, 0, 1);
    CHECK(told() == 1 && says("k.cu:5"), "%s", said);
    sg_shared_close(&block);
}

static void test_lanes_that_meet_in_a_store(void) {
    open_block(32);
    go(0, ~0u, SG_WRITE, 1, 0, 0, 4);      /* all write r1 = 0 */
    CHECK(!told(), "%s", said);
    syncwarp(0, ~0u);
    regs[0][1][7] = 5;
    go(0, ~0u, SG_WRITE, 2, 0, 0, 4);
    CHECK(told() == 2 && says("different values"), "%s", said);  /* 6 and 7, 7 and 8 */
    syncwarp(0, ~0u);
    sg_warp *w = &block.warp[0];
    sg_instr *i = make(OP_ST, 3, A(0), R(1), none, none);
    i->o[1] = (sg_operand){.kind = O_VEC, .n = 2, .vec = {2, -2}, .vec_imm = {0, 9}};
    w->steps++;
    regs[0][0][0] = 64, regs[0][0][1] = 64;
    for (int l = 0; l < 2; l++) sg_shared(&block, w, i, l, 64, 8, SG_WRITE);
    CHECK(!told(), "%s", said);
    regs[0][2][1] = 1;
    w->steps++;
    sg_shared(&block, w, i, 0, 64, 8, SG_WRITE);
    sg_shared(&block, w, i, 1, 64, 8, SG_WRITE);
    CHECK(told() == 2, "%s", said);        /* a store before, and now another value */
    sg_shared_close(&block);
}

/* === 3. Every race that an oracle finds, and no other ========================================= */

typedef struct { int thread; uint32_t at; size_t first, end; sg_access kind; } past;

enum { T = 96 };                           /* threads; the clock of each of all others          */
static uint32_t now_of[T], knows[T][T];

static void join(const int *t, int n) {
    uint32_t all[T] = {0};
    for (int k = 0; k < n; k++)
        for (int o = 0; o < T; o++) {
            uint32_t c = o == t[k] ? now_of[o] : knows[t[k]][o];
            if (all[o] < c) all[o] = c;
        }
    for (int k = 0; k < n; k++) memcpy(knows[t[k]], all, sizeof all);
    for (int k = 0; k < n; k++) now_of[t[k]]++;
}

static bool oracle(const past *h, size_t n, past x, size_t same) {
    for (size_t k = 0; k < n; k++) {
        if (h[k].thread == x.thread || h[k].end <= x.first || h[k].first >= x.end) continue;
        if (h[k].kind == SG_READ && x.kind == SG_READ) continue;
        if (h[k].kind == SG_ATOMIC && x.kind == SG_ATOMIC) continue;
        if (k >= same && x.kind == SG_WRITE) continue;     /* same instruction, same value */
        if (knows[x.thread][h[k].thread] < h[k].at) return true;
    }
    return false;
}

static uint32_t roll(uint64_t *s, uint32_t n) {
    *s = *s * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(*s >> 33) % n;
}

/* A sync, in shared.c and in the oracle: of a block, a warp, or all eighths of a warp. */
static void random_sync(uint64_t *rng) {
    int t[T], what = (int)roll(rng, 5), v = (int)roll(rng, 3);
    for (int k = 0; k < T; k++) t[k] = k;
    if (what == 0) {
        bar_all();
        join(t, T);
    } else if (what == 1) {                /* two of the warps, at a barrier of their own */
        int u = (v + 1) % 3;
        bar(v, 3, 64), bar(u, 3, 64);
        for (int k = 0; k < 32; k++) t[k] = 32 * v + k, t[32 + k] = 32 * u + k;
        join(t, 64);
    } else if (what == 2) {                /* v tells u */
        int u = (v + 1) % 3;
        sync_op(v, ~0u, make(OP_BAR_ARRIVE, 0, I(4), I(64), none, none));
        bar(u, 4, 64);
        for (int k = 0; k < 32; k++) t[k] = 32 * u + k;
        for (int k = 0; k < 32; k++)
            for (int o = 0; o < T; o++)
                for (int l = 32 * v; l < 32 * v + 32; l++) {
                    uint32_t c = o == l ? now_of[o] : knows[l][o];
                    if (knows[t[k]][o] < c) knows[t[k]][o] = c;
                }
        join(t, 32);
        for (int k = 0; k < 32; k++) now_of[32 * v + k]++;
    } else if (what == 3) {
        syncwarp(v, ~0u);
        join(t + 32 * v, 32);
    } else {
        for (int e = 0; e < 32; e += 8) regs[v][5][e] = 0xffull << e;
        for (int l = 0; l < 32; l++) regs[v][5][l] = 0xffull << (l & ~7);
        sync_op(v, ~0u, make(OP_BAR_WARP, 0, R(5), none, none, none));
        for (int e = 0; e < 32; e += 8) join(t + 32 * v + e, 8);
    }
}

/* Random accesses until the first race; returns its number, or -1 where both agree on none. */
static int random_program(uint64_t seed, bool *agree) {
    enum { STEPS = 120, PAST = STEPS * 32 + T };
    static past h[PAST];
    size_t n = 0;
    uint64_t rng = seed * 977 + 1;
    static const unsigned size[] = {1, 2, 4, 4, 4, 8};
    open_block(T);
    for (int k = 0; k < T; k++) now_of[k] = 1;
    memset(knows, 0, sizeof knows);
    for (size_t at = 0; at < 1024; at += 128) wr(0, ~0u, 1, at);
    bar_all();
    for (int s = 0; s < STEPS; s++) {
        for (uint64_t k = roll(&rng, 3) ? seed % 4 : 1; k; k--) random_sync(&rng);
        int v = (int)roll(&rng, 3);
        unsigned bytes = size[roll(&rng, 6)];
        sg_access kind = (sg_access)(roll(&rng, 8) < 5 ? 0 : 1 + roll(&rng, 2));
        size_t base = 8 * roll(&rng, 64), stride = roll(&rng, 4) ? bytes : 0;
        uint32_t mask = roll(&rng, 3) ? 1u << roll(&rng, 32) : roll(&rng, 2) ? 0xff0 : ~0u;
        bool found = false;
        size_t same = n;
        for (uint32_t m = mask; m; m &= m - 1) {
            size_t at = base + stride * (size_t)__builtin_ctz(m);
            past x = {32 * v + __builtin_ctz(m), 0, at, at + bytes, kind};
            x.at = now_of[x.thread];
            found |= oracle(h, n, x, same);
            if (!stride && kind == SG_WRITE) n = same;     /* shared.c keeps the last of them */
            h[n++] = x;
        }
        go(v, mask, kind, s, base, stride, bytes);
        bool mine = told() > 0;
        *agree = mine == found;
        if (mine || found) return s;
    }
    *agree = true;
    return -1;
}

static void test_races_against_an_oracle(void) {
    int races = 0, longest = 0;
    for (uint64_t seed = 0; seed < 3000; seed++) {
        bool agree;
        int at = random_program(seed, &agree);
        races += at >= 0;
        if (longest < at) longest = at;
        CHECK(agree, "seed %llu step %d: %s", (unsigned long long)seed, at, said);
        sg_shared_close(&block);
        if (!agree) break;
    }
    NOTE("3000 programs, %d races, the latest at step %d", races, longest);
}

/* === 4. Barriers ============================================================================== */

static void test_barrier_waits_for_all(void) {
    open_block(80);                        /* the last warp has 16 lanes */
    CHECK(bar(0, 0, 0) == SG_WAIT && block.warp[0].barrier == 0, "first");
    CHECK(!sg_released(&block, &block.warp[0]), "two are missing");
    char text[200];
    sg_barrier_text(&block, 0, text, sizeof text);
    CHECK(!strcmp(text, "barrier 0 still waits for 48 live threads: there are warps 0"), "%s",
          text);
    CHECK(bar(2, 0, 0) == SG_WAIT, "second");
    block.warp[1].live = 0;                /* exits: it is missed no more */
    CHECK(sg_released(&block, &block.warp[0]) && sg_released(&block, &block.warp[2]), "released");
    CHECK(bar(0, 0, 0) == SG_WAIT && bar(2, 0, 0) == SG_DONE, "again");
    CHECK(block.warp[0].barrier == -1 && !told(), "%s", said);
    sg_shared_close(&block);
    CHECK(!told(), "%s", said);
}

static void test_barrier_operands(void) {
    open_block(80);
    bar(0, 16, 0);
    CHECK(told() == 1 && says("barrier 16"), "%s", said);
    static const int bad[] = {33, 16, 128};
    for (int k = 0; k < 3; k++) {
        bar(0, 1, bad[k]);
        CHECK(told() == 1 && says("thread count"), "%d: %s", bad[k], said);
    }
    regs[0][2][9] = 1;
    sync_op(0, ~0u, make(OP_BAR_SYNC, 0, R(2), none, none, none));
    CHECK(told() == 1 && says("barrier 1, but lane 0 has 0"), "%s", said);
    sg_shared_close(&block);
    CHECK(told() == 1 && says("barrier 0 incomplete"), "%s", said);
}

static void test_divergent_barrier(void) {
    open_block(64);
    sync_op(0, 0xffff, make(OP_BAR_SYNC, 5, I(0), none, none, none));
    CHECK(told() == 1 && says("line 5") && says("divergent barrier") && says("ffff0000"), "%s",
          said);
    bar(1, 0, 0);
    sync_op(0, 0xffff, with(make(OP_BARRIER_SYNC, 5, I(0), none, none, none), M_ALIGNED));
    CHECK(told() == 1 && says("divergent"), "%s", said);
    sg_shared_close(&block);
    open_block(64);                        /* half of each warp: 32 threads, non-aligned */
    const sg_instr *i = make(OP_BARRIER_SYNC, 5, I(2), I(32), none, none);
    CHECK(sync_op(0, 0xffff, i) == SG_WAIT && sync_op(1, 0xffff, i) == SG_DONE && !told(), "%s",
          said);
    block.warp[0].live = 0xff;             /* those that have exited are not missing */
    CHECK(bar(0, 0, 0) == SG_WAIT && bar(1, 0, 0) == SG_DONE && !told(), "%s", said);
    sg_shared_close(&block);
}

static void test_named_barriers(void) {
    open_block(96);
    CHECK(bar(0, 1, 64) == SG_WAIT && bar(1, 1, 64) == SG_DONE && !told(), "%s", said);
    bar(0, 2, 64);
    bar(1, 2, 96);
    CHECK(told() == 1 && says("for 96 threads, but warp 0 is at it for 64"), "%s", said);
    sg_shared_close(&block);
    told();
    open_block(96);
    const sg_instr *full = make(OP_BAR_ARRIVE, 3, I(3), I(64), none, none);
    wr(0, ~0u, 2, 0);
    CHECK(sync_op(0, ~0u, full) == SG_DONE && bar(1, 3, 64) == SG_DONE, "producer, consumer");
    rd(1, ~0u, 4, 0);
    CHECK(!told(), "%s", said);
    rd(2, ~0u, 4, 0);                      /* was at neither */
    CHECK(told() == 32 && says("k.cu:2"), "%s", said);
    wr(0, ~0u, 5, 0);                      /* without waiting for the consumer */
    CHECK(told() == 32 && says("k.cu:4"), "%s", said);
    sync_op(0, ~0u, full), sync_op(0, ~0u, full);
    CHECK(told() == 1 && says("again"), "%s", said);
    sg_shared_close(&block);
    open_block(96);
    sync_op(0, ~0u, full);
    sg_shared_close(&block);
    CHECK(told() == 1 && says("line 3") && says("32 are missing"), "%s", said);
}

static void test_barrier_reductions(void) {
    for (int k = 0; k < 30; k++) {
        sg_mod op = (sg_mod[]){M_POPC, M_AND, M_OR}[k % 3];
        uint64_t rng = (uint64_t)k, yes = 0;
        open_block(70);
        for (int t = 0; t < 70; t++) {
            uint64_t x = k < 3 ? 1 : k < 6 ? 0 : roll(&rng, 2);
            regs[t / 32][2][t % 32] = x;
            yes += x;
        }
        const sg_instr *i = with(make(OP_BAR_RED, 0, R(3), I(0), R(2), none), op);
        for (int v = 0; v < 3; v++) sync_op(v, block.warp[v].live, i);
        uint64_t want = op == M_POPC ? yes : op == M_AND ? yes == 70 : yes > 0;
        for (int t = 0; t < 70; t++)
            CHECK(regs[t / 32][3][t % 32] == want, "%d: thread %d has %llu", k, t,
                  (unsigned long long)regs[t / 32][3][t % 32]);
        CHECK(!told(), "%s", said);
        i = make(OP_BAR_RED, 0, R(3), I(0), I(64), R(2));
        for (int v = 0; v < 2; v++) sync_op(v, ~0u, with((sg_instr *)(uintptr_t)i, op));
        CHECK(block.warp[0].barrier < 0 && !told(), "%s", said);
        bar(0, 0, 0);
        sync_op(1, ~0u, with(make(OP_BAR_RED, 0, R(3), I(0), R(2), none), op));
        CHECK(told() == 1 && says("another operation"), "%s", said);
        sg_shared_close(&block);
        told();
    }
}

/* === 5. Member masks, shfl, vote, match, redux ================================================ */

static sg_instr *vote_of(sg_mod op) {
    return with(with(make(OP_VOTE, 4, R(3), R(4), R(5), none), M_SYNC), op);
}

static void test_member_masks(void) {
    static const struct { uint32_t active, live, member; const char *words; } t[] = {
        {~0u, ~0u, ~0u, NULL},
        {0xff, ~0u, 0xff, NULL},
        {0xff, ~0u, ~0u, "ffffff00, which are not active"},
        {0xff, 0xff, ~0u, "have exited or do not exist"},
        {0xff, ~0u, 0xfe, "lane 0 is not in its own"},
        {0x3, ~0u, 0x7, "which are not active"}};
    for (size_t k = 0; k < sizeof t / sizeof *t; k++)
        for (int op = 0; op < 5; op++) {
            open_block(32);
            block.warp[0].live = t[k].live;
            for (int l = 0; l < 32; l++) regs[0][5][l] = t[k].member;
            sg_instr *i = op == 0   ? make(OP_BAR_WARP, 4, R(5), none, none, none)
                          : op == 1 ? vote_of(M_ANY)
                          : op == 2 ? with(make(OP_MATCH, 4, R(3), R(4), R(5), none), M_ANY)
                          : op == 3 ? with(make(OP_REDUX, 4, R(3), R(4), R(5), none), M_ADD)
                                    : with(make(OP_SHFL, 4, R(3), R(4), I(0), I(31)), M_BFLY);
            if (op == 4) i->o[i->n++] = R(5);
            sync_op(0, t[k].active, i);
            uint64_t n = told();
            CHECK(t[k].words ? n >= 1 : !n, "case %zu op %d: %s", k, op, said);
            CHECK(!t[k].words || op == 4 || says(t[k].words), "case %zu op %d: %s", k, op, said);
            sg_shared_close(&block);
        }
    open_block(32);                        /* eighths with a mask each, then one that is wrong */
    for (int l = 0; l < 32; l++) regs[0][5][l] = 0xffu << (l & ~7);
    sync_op(0, ~0u, vote_of(M_ALL));
    CHECK(!told(), "%s", said);
    regs[0][5][9] = ~0u;
    sync_op(0, ~0u, vote_of(M_ALL));
    CHECK(told() == 1 && says("have another mask"), "%s", said);
    sg_shared_close(&block);
}

/* One shfl as the manual writes it down, on lane numbers. */
static int shfl_by_the_book(sg_mod mode, int lane, int b, int c, int *valid) {
    int bval = b & 31, cval = c & 31, mask = c >> 8 & 31, j = 0;
    int max = (lane & mask) | (cval & ~mask), min = lane & mask;
    switch ((int)mode) {
    case M_UP: j = lane - bval, *valid = j >= max; break;
    case M_DOWN: j = lane + bval, *valid = j <= max; break;
    case M_BFLY: j = lane ^ bval, *valid = j <= max; break;
    default: j = min | (bval & ~mask), *valid = j <= max;
    }
    return *valid ? j : lane;
}

static void test_shfl(void) {
    static const sg_mod modes[] = {M_UP, M_DOWN, M_BFLY, M_IDX};
    uint64_t rng = 5;
    for (int k = 0; k < 4000; k++) {
        sg_mod mode = modes[k % 4];
        int width = 1 << roll(&rng, 6), c = (32 - width) << 8 | (mode == M_UP ? 0 : 31);
        open_block(32);
        uint32_t a[32], by[32];
        for (int l = 0; l < 32; l++) {
            regs[0][1][l] = a[l] = roll(&rng, 1u << 31);
            regs[0][2][l] = by[l] = roll(&rng, 40);
        }
        bool second = roll(&rng, 2);
        sg_instr *i = with(make(OP_SHFL, 4, R(1), second ? R(3) : R(1), second ? R(1) : R(2),
                                second ? R(2) : I((uint64_t)c)), mode);
        if (second) i->o[i->n++] = I((uint64_t)c);
        i->o[i->n++] = I(~0u);
        sync_op(0, ~0u, i);
        for (int l = 0; l < 32; l++) {
            int valid, from = shfl_by_the_book(mode, l, (int)by[l], c, &valid);
            CHECK(regs[0][1][l] == a[from], "run %d lane %d", k, l);
            CHECK(!second || regs[0][3][l] == (uint64_t)valid, "run %d lane %d", k, l);
        }
        CHECK(!told(), "%s", said);
        sg_shared_close(&block);
    }
    open_block(32);                        /* reads beyond its half, which is not here */
    sg_instr *i = with(make(OP_SHFL, 4, R(1), R(1), I(16), I(31)), M_BFLY);
    i->o[i->n++] = I(0xffff);
    sync_op(0, 0xffff, i);
    CHECK(told() == 16 && says("reads lane 31"), "%s", said);
    sg_shared_close(&block);
}

static void test_votes_matches(void) {
    uint64_t rng = 6;
    for (int k = 0; k < 4000; k++) {
        open_block(32);
        uint32_t part = k % 4 ? ~0u : roll(&rng, 1u << 31) | 1, g[32], yes = 0;
        int size = 32 >> (k % 4);          /* groups of lanes with their own masks */
        uint32_t few = 1 + roll(&rng, 4);
        for (int l = 0; l < 32; l++) {
            g[l] = size == 32 ? part : ((1u << size) - 1) << (l & -size);
            regs[0][5][l] = g[l];
            regs[0][4][l] = roll(&rng, few);
            regs[0][6][l] = roll(&rng, few) * 0x100000001ull;
            yes |= (uint32_t)(regs[0][4][l] & 1) << l;
        }
        static const sg_mod ops[] = {M_ALL, M_ANY, M_UNI, M_BALLOT};
        uint64_t got[4][32];
        for (int o = 0; o < 4; o++) {
            sync_op(0, part, vote_of(ops[o]));
            memcpy(got[o], regs[0][3], sizeof got[o]);
        }
        sync_op(0, part, typed(with(make(OP_MATCH, 4, R(3), R(6), R(5), none), M_ANY), T_B64));
        sync_op(0, part, with(make(OP_MATCH, 4, R(7), R(8), R(6), R(5)), M_ALL));
        for (int l = 0; l < 32; l++) {
            if (!(part >> l & 1)) continue;
            uint32_t y = yes & g[l], alike = 0;
            for (int o = 0; o < 32; o++)
                if (g[l] >> o & 1 && regs[0][6][o] == regs[0][6][l]) alike |= 1u << o;
            CHECK(got[0][l] == (y == g[l]) && got[1][l] == (y > 0), "run %d lane %d", k, l);
            CHECK(got[2][l] == (y == g[l] || !y) && got[3][l] == y, "run %d lane %d", k, l);
            CHECK(regs[0][3][l] == alike, "run %d lane %d", k, l);
            CHECK(regs[0][7][l] == (alike == g[l] ? g[l] : 0), "run %d lane %d", k, l);
            CHECK(regs[0][8][l] == (alike == g[l]), "run %d lane %d", k, l);
        }
        CHECK(!told(), "%s", said);
        sg_shared_close(&block);
    }
}

static void test_redux_and_activemask(void) {
    static const struct { sg_mod op; sg_type t; } ops[] = {
        {M_ADD, T_U32}, {M_ADD, T_S32}, {M_MIN, T_U32}, {M_MIN, T_S32}, {M_MAX, T_U32},
        {M_MAX, T_S32}, {M_AND, T_B32}, {M_OR, T_B32}, {M_XOR, T_B32}};
    uint64_t rng = 7;
    for (int k = 0; k < 4500; k++) {
        sg_mod op = ops[k % 9].op;
        sg_type t = ops[k % 9].t;
        uint32_t mask = k % 2 ? ~0u : roll(&rng, 1u << 31) | 1;
        open_block(32);
        bool begun = false;
        int64_t want = 0;
        for (int l = 0; l < 32; l++) {
            uint32_t x = roll(&rng, 1u << 31) * 2 + roll(&rng, 2);
            int64_t y = t == T_S32 ? (int32_t)x : (int64_t)x;
            regs[0][4][l] = x;
            regs[0][5][l] = mask;
            if (!(mask >> l & 1)) continue;
            want = !begun        ? y
                   : op == M_ADD ? want + y
                   : op == M_MIN ? (y < want ? y : want)
                   : op == M_MAX ? (y > want ? y : want)
                   : op == M_AND ? (want & y)
                   : op == M_OR  ? (want | y)
                                 : (want ^ y);
            begun = true;
        }
        sync_op(0, mask, typed(with(make(OP_REDUX, 4, R(3), R(4), R(5), none), op), t));
        sync_op(0, mask, make(OP_ACTIVEMASK, 4, R(6), none, none, none));
        for (int l = 0; l < 32; l++) {
            bool in = mask >> l & 1;
            CHECK(regs[0][3][l] == (in ? (uint32_t)want : 0), "run %d lane %d", k, l);
            CHECK(regs[0][6][l] == (in ? mask : 0), "run %d lane %d", k, l);
        }
        CHECK(!told(), "%s", said);
        sg_shared_close(&block);
    }
}

/* === 6. cp.async ============================================================================== */

/* Lanes copy `bytes` each, from global 0.. to shared base.. */
static void copy_op(int v, uint32_t mask, int line, size_t base, unsigned bytes, sg_operand src) {
    sg_instr *i = with(make(OP_CP_ASYNC, line, A(8), A(9), I(bytes), src),
                       bytes == 16 ? M_CG : M_CA);
    for (size_t l = 0; l < 32; l++) regs[v][8][l] = base + bytes * l, regs[v][9][l] = bytes * l;
    sync_op(v, mask, i);
}
static void commit(int v) { sync_op(v, ~0u, make(OP_CP_COMMIT, 0, none, none, none, none)); }
static void await(int v, int n) {
    sync_op(v, ~0u, make(OP_CP_WAIT, 0, I((uint64_t)n), none, none, none));
}

static void test_copies_land_at_the_wait(void) {
    for (size_t k = 0; k < sizeof global; k++) global[k] = (uint8_t)(k * 7 + k / 256);
    open_block(64);
    copy_op(0, ~0u, 10, 0, 16, none);
    commit(0);
    copy_op(0, ~0u, 11, 512, 8, none);
    commit(0);
    memset(global, 0, 16);                 /* has been read already */
    CHECK(shared[100] == 0xff && shared[600] == 0xff, "poisoned");
    go(0, 1, SG_READ, 20, 0, 0, 4);
    CHECK(told() == 1 && says("line 20") && says("k.cu:10 is still copying"), "%s", said);
    go(1, 1, SG_WRITE, 20, 512 + 8, 0, 4);
    CHECK(told() == 1 && says("(1,0,0) at k.cu:11"), "%s", said);
    await(0, 1);
    CHECK(shared[1] == 7 && shared[511] == (uint8_t)(511 * 7 + 1) && shared[600] == 0xff, "one");
    go(0, ~0u, SG_READ, 21, 0, 16, 16);
    CHECK(!told(), "%s", said);
    go(0, 1, SG_READ, 21, 16, 0, 2);       /* another lane's, and no __syncwarp */
    CHECK(told() == 1 && says("same-warp") && says("k.cu:10"), "%s", said);
    go(1, 1, SG_READ, 22, 512, 0, 4);
    CHECK(told() == 1 && says("still copying"), "%s", said);
    await(0, 0);
    bar_all();
    go(1, ~0u, SG_READ, 23, 512, 2, 2);
    CHECK(!told() && shared[520] == 8 * 7, "%s", said);
    sg_shared_close(&block);
    CHECK(!told(), "%s", said);
}

static void test_copies_are_writes(void) {
    open_block(64);
    wr(0, ~0u, 1, 0);
    bar_all();
    rd(1, ~0u, 2, 0);
    copy_op(0, 1, 3, 0, 16, none);         /* warp 1 may still be reading */
    CHECK(told() == 1 && says("read it at k.cu:2"), "%s", said);
    copy_op(0, 1, 3, 0, 16, none);
    CHECK(told() == 1 && says("still copying"), "%s", said);
    sync_op(0, ~0u, make(OP_CP_WAIT_ALL, 0, none, none, none, none));   /* without a commit */
    go(0, 1, SG_READ, 4, 0, 0, 16);
    CHECK(!told(), "%s", said);
    copy_op(0, 2, 9, 1024, 4, none);
    sg_shared_close(&block);
    CHECK(told() == 1 && says("line 9 thread 1") && says("never waited"), "%s", said);
}

static void test_copies_fill_with_zeros(void) {
    for (size_t k = 0; k < sizeof global; k++) global[k] = 1;
    open_block(32);
    reg_type[4] = T_PRED;
    copy_op(0, ~0u, 1, 0, 16, I(6));
    for (int l = 0; l < 32; l++) regs[0][4][l] = l & 1, regs[0][5][l] = l & 1 ? 4 : 0;
    copy_op(0, ~0u, 1, 512, 4, R(4));      /* ignored where the predicate holds */
    copy_op(0, ~0u, 1, 640, 4, R(5));      /* a size of each lane's own */
    commit(0);
    await(0, 0);
    for (int k = 0; k < 512; k++) CHECK(shared[k] == (k % 16 < 6), "byte %d", k);
    for (int k = 0; k < 128; k++) CHECK(shared[512 + k] == !(k / 4 & 1), "byte %d", k);
    for (int k = 0; k < 128; k++) CHECK(shared[640 + k] == (k / 4 & 1), "byte %d", k);
    CHECK(!told(), "%s", said);
    syncwarp(0, ~0u);
    sg_instr *i = with(make(OP_CP_ASYNC, 1, A(8), A(9), I(16), I(0)), M_CG);
    regs[0][8][0] = 0, regs[0][9][0] = 1ull << 40;
    sync_op(0, 1, i);                      /* of no bytes: the address is not looked at */
    CHECK(!told(), "%s", said);
    i->o[3] = I(17);
    regs[0][8][0] = 16, regs[0][9][0] = 0;
    sync_op(0, 1, i);
    CHECK(told() == 1 && says("from a source of 17"), "%s", said);
    regs[0][8][0] = 36, regs[0][9][0] = 0, i->o[3] = I(16);
    sync_op(0, 1, i);
    CHECK(told() == 1 && says("not aligned to 16"), "%s", said);
    regs[0][8][0] = 48, regs[0][9][0] = 8;
    sync_op(0, 1, i);
    CHECK(told() == 1 && says("address 8, not aligned"), "%s", said);
    regs[0][8][0] = SHARED, regs[0][9][0] = 0;
    sync_op(0, 1, i);
    CHECK(told() == 1 && says("outside"), "%s", said);
    sync_op(0, ~0u, make(OP_CP_WAIT_ALL, 0, none, none, none, none));
    sg_shared_close(&block);
}

static void test_what_is_not_known(void) {
    open_block(32);
    CHECK(sync_op(0, ~0u, make(OP_ADD, 0, R(1), R(2), R(3), none)) == SG_NOT_MINE, "add");
    CHECK(sync_op(0, ~0u, make(OP_MEMBAR, 0, none, none, none, none)) == SG_NOT_MINE, "membar");
    volatile bool back = setjmp(stopped) != 0;
    if (!back)
        sync_op(0, ~0u, typed(with(make(OP_REDUX, 4, R(3), R(4), R(5), none), M_MIN), T_F32));
    CHECK(back && says("stop: redux"), "%s", said);
    sg_shared_close(&block);
}

int main(void) {
    RUN(test_bounds_and_alignment);
    RUN(test_never_written);
    RUN(test_races_between_warps);
    RUN(test_last_of_many_readers_and_atomics);
    RUN(test_same_warp_needs_syncwarp);
    RUN(test_write_after_read_in_a_warp);
    RUN(test_part_of_a_warp_stays);
    RUN(test_bytes_of_a_word);
    RUN(test_lanes_that_meet_in_a_store);
    RUN(test_races_against_an_oracle);
    RUN(test_barrier_waits_for_all);
    RUN(test_barrier_operands);
    RUN(test_divergent_barrier);
    RUN(test_named_barriers);
    RUN(test_barrier_reductions);
    RUN(test_member_masks);
    RUN(test_shfl);
    RUN(test_votes_matches);
    RUN(test_redux_and_activemask);
    RUN(test_copies_land_at_the_wait);
    RUN(test_copies_are_writes);
    RUN(test_copies_fill_with_zeros);
    RUN(test_what_is_not_known);
    return check_done();
}
