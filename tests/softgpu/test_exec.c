/* test_exec.c -- exec.c: lanes that part and meet, calls, memory of all spaces, atomics, addresses,
 * warps in any order; against plain C.
 *
 *   PTX text --sg_parse--> kernel --sg_run, memory and barriers of this file--> out[] == C's
 *
 * The stand-ins: one block of global memory at GLOBAL, shared memory without races, bar.sync that
 * waits for all live warps.  Violations are noted and go on; sg_stop() ends the run.             */
#include "../check.h"

#include "softgpu.h"

#include <setjmp.h>
#include <stdarg.h>

/* === 1. Stand-ins ============================================================================= */

#define GLOBAL 0x700000000000ull
enum { BYTES = 1 << 20 };
static _Alignas(64) uint8_t global[BYTES];
static char said[3000];
static int violations;
static jmp_buf stopped;
static int order[4096], n_order;           /* warps in the order of their turns, from nanosleep  */

void sg_violation(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                  const char *fmt, ...) {
    va_list args;
    (void)b, (void)w, (void)i, (void)lane;
    va_start(args, fmt);
    if (!violations++) vsnprintf(said, sizeof said, fmt, args);
    va_end(args);
}
void sg_stop(const sg_block *b, const sg_warp *w, const sg_instr *i, const char *fmt, ...) {
    va_list args;
    (void)b, (void)w, (void)i;
    va_start(args, fmt);
    vsnprintf(said, sizeof said, fmt, args);
    va_end(args);
    longjmp(stopped, 1);
}
void *sg_global(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane, uint64_t address,
                unsigned bytes, sg_access kind) {
    (void)kind;
    if (address >= GLOBAL && address + bytes <= GLOBAL + BYTES) return global + (address - GLOBAL);
    sg_violation(b, w, i, lane, "global 0x%llx", (unsigned long long)address);
    return NULL;
}
uint64_t sg_symbol_address(const sg_module *m, int s) {
    (void)m;
    return GLOBAL + BYTES / 2 + 4096 * (uint64_t)s;
}
void *sg_shared(sg_block *b, sg_warp *w, const sg_instr *i, int lane, uint64_t offset,
                unsigned bytes, sg_access kind) {
    static uint8_t nothing[16];
    (void)kind;
    if (offset < b->shared_bytes && bytes <= b->shared_bytes - offset) return b->shared + offset;
    sg_violation(b, w, i, lane, "shared %llu", (unsigned long long)offset);
    return nothing;
}
void sg_shared_open(sg_block *b) { (void)b; }
void sg_shared_close(sg_block *b) { (void)b; }
void sg_barrier_text(const sg_block *b, int barrier, char *out, size_t size) {
    (void)b;
    snprintf(out, size, "barrier %d", barrier);
}
bool sg_tensor(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    (void)b, (void)w, (void)i, (void)mask;
    return false;
}
/* bar.sync, and activemask, by which tests see who runs. */
sg_result sg_sync(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    if (i->op == OP_ACTIVEMASK) {
        if (n_order < 4096) order[n_order++] = w->id;
        for (int l = 0; l < SG_LANES; l++) {
            if (mask >> l & 1) sg_put(w, &i->o[0], T_U32, l, mask);
        }
        return SG_DONE;
    }
    if (i->op != OP_BAR_SYNC) return SG_NOT_MINE;
    if (mask != w->live) sg_violation(b, w, i, 0, "divergent barrier");
    w->barrier = (int)sg_get(b, w, &i->o[0], T_U32, 0);
    return SG_WAIT;
}
bool sg_released(sg_block *b, sg_warp *w) {
    int id = w->barrier;
    for (int k = 0; k < b->n_warps; k++) {
        if (b->warp[k].live && b->warp[k].barrier != id) return false;
    }
    for (int k = 0; k < b->n_warps; k++) b->warp[k].barrier = -1;
    return true;
}

/* === 2. Running a kernel ====================================================================== */

#define HEAD ".version 9.0\n.target sm_89\n.address_size 64\n"
/* out is %out; %t the thread of the grid, its 64-bit sizes %o4 = 4 t. */
#define KERNEL                                                                                   \
    ".visible .entry k(.param .u64 k_param_0, .param .u32 k_param_1)\n{\n"                       \
    ".reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<30>;\n.reg .f32 %f<9>;\n"                 \
    ".reg .b64 %d<30>;\n.reg .b64 %out;\n.reg .b64 %o4;\n.reg .b32 %t;\n.reg .b32 %n;\n"         \
    ".reg .b64 %base;\n"                                                                         \
    "ld.param.u64 %base, [k_param_0];\ncvta.to.global.u64 %base, %base;\n"                       \
    "ld.param.u32 %n, [k_param_1];\n"                                                            \
    "mov.u32 %r20, %ctaid.x;\nmov.u32 %r21, %ntid.x;\nmov.u32 %r22, %tid.x;\n"                   \
    "mad.lo.s32 %t, %r20, %r21, %r22;\nmul.wide.u32 %o4, %t, 4;\nadd.s64 %out, %base, %o4;\n"
#define END "\nret;\n}\n"

static const sg_device device = {.cc = 89, .n_sms = 4, .warp_size = 32};

/* False: it does not parse, or stopped; said tells. */
static bool run_grid(const char *text, sg_dim grid, sg_dim block, uint32_t n, uint64_t seed,
                     uint32_t dynamic) {
    char why[300] = "";
    struct { uint64_t out; uint32_t n, pad; } param = {GLOBAL, n, 0};
    violations = 0, said[0] = 0, n_order = 0;
    memset(global, 0, sizeof global);
    sg_module *m = sg_parse(text, strlen(text), why, sizeof why);
    if (!m) {
        snprintf(said, sizeof said, "%s", why);
        return false;
    }
    sg_launch l = {.module = m, .func = sg_find(m, "k"), .device = &device, .grid = grid,
                   .block = block, .dynamic_shared = dynamic, .param = (const uint8_t *)&param,
                   .seed = seed};
    bool ok = !setjmp(stopped);
    if (ok) sg_run(&l);
    sg_module_free(m);
    return ok;
}

static bool run(const char *text, int blocks, int threads, uint32_t n, uint64_t seed) {
    return run_grid(text, (sg_dim){(uint32_t)blocks, 1, 1}, (sg_dim){(uint32_t)threads, 1, 1}, n,
                    seed, 0);
}

static uint32_t out32(int k) {
    uint32_t v;
    memcpy(&v, global + 4 * k, 4);
    return v;
}

/* Run with several seeds and compare out[] of all threads with want(t, n). */
static void check_all(const char *text, int blocks, int threads, uint32_t n,
                      uint32_t (*want)(uint32_t t, uint32_t n)) {
    for (uint64_t s = 0; s < 6; s++) {
        bool ok = run(text, blocks, threads, n, s);
        CHECK(ok && !violations, "%s", said);
        for (int t = 0; t < blocks * threads && ok; t++) {
            uint32_t w = want((uint32_t)t, n);
            CHECK(out32(t) == w, "thread %d, seed %d: %u, not %u", t, (int)s, out32(t), w);
        }
    }
}

/* === 3. Lanes that part ======================================================================= */

static uint32_t want_nested(uint32_t t, uint32_t n) {
    uint32_t v = t;
    if (t & 1) {
        if (t & 2) v = v * 3 + 1;
        else if (t & 4) v += 1000;
        v ^= 5;
    } else if (t % 3 == 0) {
        v = ~v;
    }
    return v + n;
}

static void test_nested_ifs(void) {
    check_all(HEAD KERNEL
              "mov.u32 %r1, %t;\n"
              "and.b32 %r2, %t, 1;\nsetp.eq.u32 %p1, %r2, 0;\n@%p1 bra EVEN;\n"
              "and.b32 %r2, %t, 2;\nsetp.ne.u32 %p1, %r2, 0;\n@%p1 bra TWO;\n"
              "and.b32 %r2, %t, 4;\nsetp.eq.u32 %p1, %r2, 0;\n@%p1 bra ODD;\n"
              "add.u32 %r1, %r1, 1000;\nbra.uni ODD;\n"
              "TWO:\nmad.lo.u32 %r1, %r1, 3, 1;\n"
              "ODD:\nxor.b32 %r1, %r1, 5;\nbra.uni DONE;\n"
              "EVEN:\nrem.u32 %r2, %t, 3;\nsetp.ne.u32 %p1, %r2, 0;\n@%p1 bra DONE;\n"
              "not.b32 %r1, %r1;\n"
              "DONE:\nactivemask.b32 %r3;\nadd.u32 %r1, %r1, %n;\nst.global.u32 [%out], %r1;\n"
              "setp.eq.u32 %p1, %r3, -1;\n@!%p1 trap;\n" END, 3, 64, 7, want_nested);
}

static uint32_t want_loops(uint32_t t, uint32_t n) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < t % n; i++) {
        for (uint32_t j = i; j < t % 5; j++) sum += i * j + 1;
        if (sum > 40) break;
        if (i & 1) continue;
        sum += 2;
    }
    return sum;
}

static void test_loops(void) {
    check_all(HEAD KERNEL
              "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nrem.u32 %r4, %t, %n;\nrem.u32 %r5, %t, 5;\n"
              "OUTER:\nsetp.ge.u32 %p1, %r2, %r4;\n@%p1 bra DONE;\nmov.u32 %r3, %r2;\n"
              "INNER:\nsetp.ge.u32 %p2, %r3, %r5;\n@%p2 bra BEHIND;\n"
              "mad.lo.u32 %r6, %r2, %r3, 1;\nadd.u32 %r1, %r1, %r6;\nadd.u32 %r3, %r3, 1;\n"
              "bra.uni INNER;\n"
              "BEHIND:\nsetp.gt.u32 %p1, %r1, 40;\n@%p1 bra DONE;\n"
              "and.b32 %r7, %r2, 1;\nsetp.ne.u32 %p1, %r7, 0;\n@%p1 bra NEXT;\n"
              "add.u32 %r1, %r1, 2;\n"
              "NEXT:\nadd.u32 %r2, %r2, 1;\nbra.uni OUTER;\n"
              "DONE:\nactivemask.b32 %r8;\nst.global.u32 [%out], %r1;\n"
              "setp.eq.u32 %p1, %r8, -1;\n@!%p1 trap;\n" END, 2, 96, 13, want_loops);
}

static uint32_t want_early(uint32_t t, uint32_t n) {
    if (t >= n) return 0;
    if (t % 2) {
        if (t % 3 == 0) return 77;
        t += 100;
    }
    return t + 1;
}

/* Lanes that return in a branch do not part those that stay: the barrier sees them together. */
static void test_early_return(void) {
    check_all(HEAD KERNEL
              "setp.ge.u32 %p1, %t, %n;\n@%p1 bra END;\nmov.u32 %r1, %t;\n"
              "and.b32 %r2, %t, 1;\nsetp.eq.u32 %p1, %r2, 0;\n@%p1 bra EVEN;\n"
              "rem.u32 %r2, %t, 3;\nsetp.ne.u32 %p1, %r2, 0;\n@%p1 bra ADD;\n"
              "mov.u32 %r1, 77;\nst.global.u32 [%out], %r1;\nret;\n"
              "ADD:\nadd.u32 %r1, %r1, 100;\n"
              "EVEN:\nbar.sync 0;\nadd.u32 %r1, %r1, 1;\nst.global.u32 [%out], %r1;\n"
              "END:\n" END, 1, 128, 80, want_early);
}

static uint32_t want_guarded(uint32_t t, uint32_t n) {
    if (t % 4 == 3) return 0;
    return t % 4 == 1 ? n * 2 : n;
}

static void test_guards(void) {
    check_all(HEAD KERNEL
              "and.b32 %r1, %t, 3;\nsetp.eq.u32 %p1, %r1, 3;\n@%p1 exit;\n"
              "setp.eq.u32 %p2, %r1, 1;\nmov.u32 %r2, %n;\n@%p2 shl.b32 %r2, %r2, 1;\n"
              "@!%p1 st.global.u32 [%out], %r2;\n" END, 1, 40, 21, want_guarded);
}

/* --- any program: made of statements at random, run as PTX and as it stands */

typedef enum { SET, IF, LOOP, BREAK, RETURN } what;
typedef struct node { what is; int id, a, b, c; struct node *body, *other, *next; } node;
static node nodes[4000];
static int n_nodes;
static uint64_t seed;

static int any(int n) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (int)((seed * 0x2545f4914f6cdd1dul >> 33) % (uint64_t)n);
}

static node *make(int depth, int loop) {
    node *first = NULL, **at = &first;
    for (int n = 1 + any(4); n > 0 && n_nodes < 3900; n--) {
        node *x = &nodes[n_nodes];
        int k = any(depth > 4 ? 3 : 12);
        *x = (node){.id = n_nodes++, .a = any(4), .b = any(4), .c = any(1000)};
        x->is = k < 4 ? SET : k < 8 ? IF : k < 10 ? LOOP : k == 10 && loop >= 0 ? BREAK : RETURN;
        if (x->is == RETURN && any(3)) x->is = SET;
        if (x->is == BREAK) x->b = loop;
        if (x->is == IF || x->is == LOOP) {
            x->body = make(depth + 1, x->is == LOOP ? x->id : loop);
        }
        if (x->is == IF && any(2)) x->other = make(depth + 1, loop);
        *at = x;
        at = &x->next;
    }
    return first;
}

static char program[400000];
static size_t length;
__attribute__((format(printf, 1, 2))) static void say(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    length += (size_t)vsnprintf(program + length, sizeof program - length, fmt, args);
    va_end(args);
}

static void write_ptx(const node *x) {
    for (; x; x = x->next) {
        int d = x->id;
        if (x->is == SET) {
            say("mad.lo.u32 %%r%d, %%r%d, %d, %%r%d;\n", x->a, x->b, 2 * x->c + 1,
                (x->a + 1) % 4);
            continue;
        }
        if (x->is == LOOP) {
            say("rem.u32 %%m%d, %%r%d, 5;\nmov.u32 %%c%d, 0;\nL%d:\n", d, x->a, d, d);
            say("setp.ge.u32 %%p1, %%c%d, %%m%d;\n@%%p1 bra E%d;\n", d, d, d);
            write_ptx(x->body);
            say("add.u32 %%c%d, %%c%d, 1;\nbra.uni L%d;\nE%d:\n", d, d, d, d);
            continue;
        }
        say("shr.u32 %%r9, %%r%d, 3;\nand.b32 %%r9, %%r9, 3;\n", x->a);
        say("setp.eq.u32 %%p1, %%r9, %d;\n", x->c % 4);
        if (x->is == BREAK) {
            say("@%%p1 bra E%d;\n", x->b);
        } else if (x->is == RETURN) {
            say("@!%%p1 bra N%d;\nst.global.u32 [%%out], %%r%d;\nret;\nN%d:\n", d, x->b, d);
        } else {
            say("@!%%p1 bra N%d;\n", d);
            write_ptx(x->body);
            if (x->other) say("bra.uni F%d;\n", d);
            say("N%d:\n", d);
            write_ptx(x->other);
            if (x->other) say("F%d:\n", d);
        }
    }
}

/* 0: on, 1: out of loop *out, 2: returned *out. */
static int interpret(const node *x, uint32_t v[4], uint32_t *out) {
    for (; x; x = x->next) {
        bool yes = (v[x->a] >> 3 & 3) == (uint32_t)x->c % 4;
        int r = 0;
        if (x->is == SET) {
            v[x->a] = v[x->b] * (2 * (uint32_t)x->c + 1) + v[(x->a + 1) % 4];
        } else if (x->is == LOOP) {
            for (uint32_t k = 0, n = v[x->a] % 5; k < n && !r; k++) r = interpret(x->body, v, out);
            if (r == 1 && *out == (uint32_t)x->id) r = 0;
        } else if (yes && x->is == BREAK) {
            *out = (uint32_t)x->b;
            return 1;
        } else if (yes && x->is == RETURN) {
            *out = v[x->b];
            return 2;
        } else if (x->is == IF) {
            r = interpret(yes ? x->body : x->other, v, out);
        }
        if (r) return r;
    }
    return 0;
}

static void test_any_program(void) {
    int parted = 0;
    for (uint64_t s = 1; s <= 300; s++) {
        seed = s * 0x9e3779b97f4a7c15ul;
        n_nodes = 0, length = 0;
        const node *top = make(0, -1);
        say("%s", HEAD KERNEL ".reg .b32 %c<4000>;\n.reg .b32 %m<4000>;\nmov.u32 %r0, %t;\n"
            "mul.lo.u32 %r1, %t, 40503;\nxor.b32 %r2, %t, %n;\nnot.b32 %r3, %t;\n");
        write_ptx(top);
        say("%s", "st.global.u32 [%out], %r0;\n" END);
        bool ok = run(program, 1, 80, (uint32_t)s, s % 3);
        CHECK(ok && !violations, "program %d: %s", (int)s, said);
        for (uint32_t t = 0; t < 80 && ok; t++) {
            uint32_t v[4] = {t, t * 40503, t ^ (uint32_t)s, ~t}, want = 0;
            if (interpret(top, v, &want) != 2) want = v[0];
            parted += want != v[0];
            CHECK(out32((int)t) == want, "program %d, thread %u: %u, not %u", (int)s, t,
                  out32((int)t), want);
        }
    }
    CHECK(parted > 1000, "threads return early: %d", parted);
}

/* === 4. Calls ================================================================================= */

#define FIB                                                                                      \
    ".func (.param .b32 func_retval0) fib(.param .b32 fib_param_0)\n{\n"                         \
    ".reg .pred %p<2>;\n.reg .b32 %r<9>;\nld.param.u32 %r8, [fib_param_0];\n"                    \
    "setp.lt.s32 %p1, %r8, 2;\n@%p1 bra SMALL;\nadd.s32 %r4, %r8, -1;\n"                         \
    "{\n.param .b32 param0;\nst.param.b32 [param0+0], %r4;\n.param .b32 retval0;\n"              \
    "call.uni (retval0), fib, (param0);\nld.param.b32 %r5, [retval0+0];\n}\n"                    \
    "add.s32 %r6, %r8, -2;\n"                                                                    \
    "{\n.param .b32 param0;\nst.param.b32 [param0+0], %r6;\n.param .b32 retval0;\n"              \
    "call.uni (retval0), fib, (param0);\nld.param.b32 %r7, [retval0+0];\n}\n"                    \
    "add.s32 %r8, %r7, %r5;\nSMALL:\nst.param.b32 [func_retval0+0], %r8;\nret;\n}\n"

static uint32_t fib(uint32_t n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static uint32_t want_fib(uint32_t t, uint32_t n) { return t % 3 == 2 ? 5 : fib(t % n); }

static void test_calls(void) {
    check_all(HEAD FIB KERNEL
              "mov.u32 %r2, 5;\nrem.u32 %r3, %t, 3;\nsetp.eq.u32 %p1, %r3, 2;\n@%p1 bra OUT;\n"
              "rem.u32 %r1, %t, %n;\n"
              "{\n.param .b32 param0;\nst.param.b32 [param0+0], %r1;\n.param .b32 retval0;\n"
              "call.uni (retval0), fib, (param0);\nld.param.b32 %r2, [retval0+0];\n}\n"
              "OUT:\nst.global.u32 [%out], %r2;\n" END, 1, 64, 12, want_fib);
}

static uint32_t want_exits(uint32_t t, uint32_t n) {
    if (t % 4 == 0) return 0;              /* exits in the function                             */
    return t % 4 == 1 ? 1 : (t + n) * 2 + (t % 4 == 2 ? 1 : 0);
}

/* Of a call some lanes exit, some return early, with a struct of 12 bytes and .local of its own. */
static void test_exit_in_call(void) {
    check_all(HEAD
              ".func (.param .align 4 .b8 func_retval0[12]) f(.param .align 4 .b8 f_param_0[12])\n"
              "{\n.local .align 8 .b8 depot[16];\n.reg .pred %p<3>;\n.reg .b32 %r<9>;\n"
              ".reg .b64 %d<4>;\n"
              "ld.param.u32 %r1, [f_param_0];\nld.param.u32 %r2, [f_param_0+8];\n"
              "mov.u64 %d1, depot;\nst.local.u32 [%d1+4], %r1;\n"
              "and.b32 %r3, %r1, 3;\nsetp.eq.u32 %p1, %r3, 0;\n@%p1 exit;\n"
              "setp.eq.u32 %p1, %r3, 1;\n@%p1 bra ONE;\n"
              "ld.local.u32 %r4, [%d1+4];\nadd.u32 %r4, %r4, %r2;\n"
              "st.param.b32 [func_retval0+4], %r4;\nret;\n"
              "ONE:\nmov.u32 %r5, 0;\nst.param.b32 [func_retval0+4], %r5;\nret;\n}\n"
              KERNEL
              "setp.ne.u32 %p4, %r22, %r22;\nand.b32 %r3, %t, 3;\nsetp.eq.u32 %p2, %r3, 3;\n"
              "{\n.param .align 4 .b8 param0[12];\nst.param.b32 [param0+0], %t;\n"
              "st.param.b32 [param0+8], %n;\n.param .align 4 .b8 retval0[12];\n"
              "call.uni (retval0), f, (param0);\nld.param.b32 %r2, [retval0+4];\n}\n"
              "bar.sync 0;\nshl.b32 %r2, %r2, 1;\n@!%p2 add.u32 %r2, %r2, 1;\n"
              "st.global.u32 [%out], %r2;\n" END, 2, 64, 9, want_exits);
}

static void test_endless_recursion(void) {
    bool ok = run(HEAD ".func g()\n{\n.reg .b32 %r1;\ncall.uni g;\nret;\n}\n" KERNEL "call.uni g;\n"
                  END, 1, 32, 0, 0);
    CHECK(!ok && violations == 1, "%s", said);
}

/* === 5. Memory ================================================================================ */

static uint32_t want_local(uint32_t t, uint32_t n) {
    uint32_t a[10];
    for (uint32_t k = 0; k < 10; k++) a[k] = k * t + n;
    return a[(t * 7) % 10];
}

static void test_local(void) {
    check_all(HEAD KERNEL
              ".local .align 16 .b8 depot[40];\nmov.u32 %r1, 0;\n"
              "mov.u64 %d1, depot;\ncvta.local.u64 %d2, %d1;\n"
              "FILL:\nmad.lo.u32 %r2, %r1, %t, %n;\nmul.wide.u32 %d3, %r1, 4;\n"
              "add.s64 %d4, %d2, %d3;\nst.u32 [%d4], %r2;\nadd.u32 %r1, %r1, 1;\n"
              "setp.lt.u32 %p1, %r1, 10;\n@%p1 bra FILL;\n"
              "mul.lo.u32 %r3, %t, 7;\nrem.u32 %r3, %r3, 10;\nmul.wide.u32 %d3, %r3, 4;\n"
              "add.s64 %d4, %d1, %d3;\nld.local.u32 %r4, [%d4];\n"
              "st.global.u32 [%out], %r4;\n" END, 2, 48, 3, want_local);
    bool ok = run(HEAD KERNEL ".local .align 4 .b8 depot[8];\nmov.u64 %d1, depot;\n"
                  "st.local.u32 [%d1], %t;\nld.local.u32 %r1, [%d1+4];\n" END, 1, 1, 0, 0);
    CHECK(ok && violations == 1 && strstr(said, "never written"), "%s", said);
    ok = run(HEAD KERNEL ".local .align 4 .b8 depot[8];\nmov.u64 %d1, depot;\n"
             "st.local.u32 [%d1+8], %t;\n" END, 1, 1, 0, 0);
    CHECK(ok && violations == 1, "%s", said);
}

static uint32_t want_shared(uint32_t t, uint32_t n) {
    uint32_t block = t / 64, tid = t % 64;
    return block * 64 + (63 - tid) + n + 1000;
}

static void test_shared(void) {
    check_all(HEAD KERNEL
              ".shared .align 4 .b8 s[256];\n"
              "mov.u32 %r1, s;\nshl.b32 %r2, %r22, 2;\nadd.u32 %r3, %r1, %r2;\n"
              "add.u32 %r4, %t, %n;\nst.shared.u32 [%r3], %r4;\nbar.sync 0;\n"
              "mov.u64 %d1, s;\ncvta.shared.u64 %d2, %d1;\nsub.u32 %r5, 63, %r22;\n"
              "mul.wide.u32 %d3, %r5, 4;\nadd.s64 %d4, %d2, %d3;\nld.u32 %r6, [%d4];\n"
              "bar.sync 0;\nadd.u32 %r6, %r6, 1000;\nst.global.u32 [%out], %r6;\n" END,
              4, 64, 17, want_shared);
    bool ok = run_grid(HEAD ".extern .shared .align 16 .b8 dyn[];\n" KERNEL
                       ".shared .align 4 .b8 s[4];\nmov.u64 %d1, dyn;\nst.shared.u32 [s], %n;\n"
                       "st.shared.u32 [%d1+60], %t;\nld.shared.u32 %r1, [dyn+60];\n"
                       "ld.shared.u32 %r2, [s];\nadd.u32 %r1, %r1, %r2;\nadd.u32 %r1, %r1, 1;\n"
                       "st.global.u32 [%out], %r1;\n" END,
                       (sg_dim){1, 1, 1}, (sg_dim){1, 1, 1}, 5, 0, 64);
    CHECK(ok && !violations && out32(0) == 6, "%s: %u", said, out32(0));
}

static void test_vectors(void) {
    bool ok = run(HEAD KERNEL
                  "mov.u32 %r1, 1;\nmov.u32 %r2, 2;\nmov.u32 %r3, 3;\n"
                  "st.global.v4.u32 [%base+16], {%r1, %r2, %r3, %n};\n"
                  "ld.global.v2.u64 {%d1, %d2}, [%base+16];\n"
                  "st.global.v2.u64 [%base+32], {%d2, %d1};\n"
                  "ld.global.v4.u32 {%r5, _, %r6, %r7}, [%base+32];\n"
                  "st.global.v2.u32 [%base+48], {%r7, %r5};\n"
                  "ld.global.v4.u8 {%h1, %h2, %h3, %h4}, [%base+16];\n"
                  "st.global.v2.u16 [%base+56], {%h1, %h2};\n"
                  "ld.global.s8 %r8, [%base+64];\nst.global.u32 [%base+60], %r8;\n"
                  "mov.u32 %r9, 0xffff80;\nst.global.u8 [%base+64], %r9;\n"
                  "ld.global.s8 %r10, [%base+64];\nst.global.u32 [%base+68], %r10;\n"
                  "ld.global.s8 %h5, [%base+64];\nst.global.u16 [%base+72], %h5;\n"
                  "ld.global.s32 %d5, [%base+68];\nst.global.u64 [%base+80], %d5;\n" END,
                  1, 1, 9, 0);
    uint64_t wide;
    memcpy(&wide, global + 80, 8);
    CHECK(ok && !violations, "%s", said);
    CHECK(out32(4) == 1 && out32(7) == 9, "v4: %u %u", out32(4), out32(7));
    CHECK(out32(8) == 3 && out32(9) == 9 && out32(10) == 1 && out32(11) == 2, "v2.u64");
    CHECK(out32(12) == 2 && out32(13) == 3, "v4 with a sink: %u %u", out32(12), out32(13));
    CHECK(out32(14) == 1, "v4.u8: %x", out32(14));
    CHECK(out32(16) == 0x80 && out32(17) == 0xffffff80 && out32(18) == 0xff80, "s8");
    CHECK(wide == 0xffffffffffffff80ull, "s32 into 64 bits: %llx", (unsigned long long)wide);
}

static void test_wrong_addresses(void) {
    static const struct { const char *text, *says; } bad[] = {
        {HEAD KERNEL "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%base+8];\n" END, "aligned"},
        {HEAD KERNEL "ld.global.u16 %h1, [%base+1];\n" END, "aligned"},
        {HEAD KERNEL "mov.u64 %d1, 64;\nst.global.u32 [%d1], %t;\n" END, "global 0x40"},
        {HEAD KERNEL "st.shared.u32 [1024], %t;\n" END, "shared 1024"},
        {HEAD KERNEL "mov.u64 %d1, 0x0100000000000400;\nst.u32 [%d1], %t;\n" END, "shared 1024"},
        {HEAD KERNEL "trap;\n" END, "trap"},
    };
    for (int k = 0; k < 6; k++) {
        bool ok = run(bad[k].text, 1, 1, 0, 0);
        CHECK(ok && violations == 1 && strstr(said, bad[k].says), "%d: %s", k, said);
    }
}

static void test_generic(void) {
    bool ok = run(HEAD ".global .align 4 .b8 table[8];\n.const .align 4 .b8 c[8];\n" KERNEL
                  ".shared .align 4 .b8 s[8];\n.local .align 4 .b8 depot[8];\n"
                  "mov.u64 %d1, s;\ncvta.shared.u64 %d2, %d1;\ncvta.to.shared.u64 %d3, %d2;\n"
                  "isspacep.shared %p1, %d2;\nisspacep.global %p2, %d2;\n"
                  "isspacep.global %p3, %out;\nmov.u64 %d4, depot;\ncvta.local.u64 %d4, %d4;\n"
                  "isspacep.local %p4, %d4;\n"
                  "selp.b32 %r1, 1, 0, %p1;\nselp.b32 %r2, 2, 0, %p2;\nselp.b32 %r3, 4, 0, %p3;\n"
                  "selp.b32 %r4, 8, 0, %p4;\nadd.u32 %r1, %r1, %r2;\nadd.u32 %r1, %r1, %r3;\n"
                  "add.u32 %r1, %r1, %r4;\nst.global.u32 [%out], %r1;\n"
                  "setp.eq.u64 %p5, %d1, %d3;\n@!%p5 trap;\n"
                  "st.global.u32 [table+4], %n;\nmov.u64 %d5, table;\n"
                  "cvta.global.u64 %d6, %d5;\nld.u32 %r5, [%d6+4];\nst.global.u32 [%out+4], %r5;\n"
                  "mov.b64 %d7, k_param_1;\ncvta.param.u64 %d8, %d7;\nld.u32 %r6, [%d8];\n"
                  "st.global.u32 [%out+8], %r6;\nld.const.u32 %r7, [c+4];\n"
                  "st.global.u32 [%out+12], %r7;\n" END, 1, 1, 31, 0);
    CHECK(ok && !violations, "%s", said);
    CHECK(out32(0) == 13 && out32(1) == 31 && out32(2) == 31, "%u %u %u", out32(0), out32(1),
          out32(2));
}

/* === 6. Atomics, special registers, order ===================================================== */

static void test_atomics(void) {
    bool ok = true;
    for (uint64_t s = 0; s < 4 && ok; s++) {
        ok = run(HEAD KERNEL
                 "mov.u32 %r1, 1;\natom.global.add.u32 %r2, [%base], %r1;\n"
                 "red.global.max.u32 [%base+4], %t;\nred.global.min.s32 [%base+8], -5;\n"
                 "shl.b32 %r3, 1, %r22;\nred.global.or.b32 [%base+12], %r3;\n"
                 "red.global.xor.b32 [%base+16], 3;\nmov.u32 %r4, 9;\n"
                 "atom.global.inc.u32 %r5, [%base+20], %r4;\n"
                 "atom.global.dec.u32 %r5, [%base+24], %r4;\n"
                 "mov.u64 %d1, 1;\nred.global.add.u64 [%base+32], %d1;\n"
                 "atom.global.cas.b32 %r6, [%base+40], 0, %r4;\n"
                 "atom.global.exch.b32 %r7, [%base+44], %t;\n"
                 "red.global.and.b32 [%base+48], %r3;\n"
                 "mul.wide.u32 %d2, %r2, 4;\nadd.s64 %d2, %d2, %base;\n"
                 "st.global.u32 [%d2+64], %r1;\natom.add.relaxed.gpu.u32 %r8, [%base+52], 2;\n"
                 END, 3, 40, 0, s);
        CHECK(ok && !violations, "%s", said);
        uint64_t wide;
        memcpy(&wide, global + 32, 8);
        CHECK(out32(0) == 120 && out32(1) == 119 && out32(2) == 0xfffffffb, "add max min");
        CHECK(out32(3) == 0xffffffff && out32(4) == 0, "or xor: %x %x", out32(3), out32(4));
        CHECK(out32(5) == 0 && out32(6) == 0, "inc dec: %u %u", out32(5), out32(6));
        CHECK(wide == 120 && out32(10) == 9 && out32(12) == 0 && out32(13) == 240, "u64 cas");
        for (int k = 0; k < 120; k++) CHECK(out32(16 + k) == 1, "each lane another result: %d", k);
    }
    ok = run(HEAD KERNEL "atom.global.add.f32 %f1, [%base], 0f3f800000;\n" END, 1, 1, 0, 0);
    CHECK(!ok && strstr(said, "floating-point"), "%s", said);
}

static void test_special_registers(void) {
    bool ok = run_grid(HEAD KERNEL
                       "mov.u32 %r1, %tid.y;\nmov.u32 %r2, %tid.z;\nmov.u32 %r3, %ntid.y;\n"
                       "mov.u32 %r4, %laneid;\nmov.u32 %r5, %ctaid.y;\nmov.u32 %r6, %nctaid.x;\n"
                       "mad.lo.u32 %r7, %r2, %r3, %r1;\nmad.lo.u32 %r7, %r7, %r21, %r22;\n"
                       "mad.lo.u32 %r8, %r5, %r6, %r20;\nmad.lo.u32 %r8, %r8, 48, %r7;\n"
                       "mul.wide.u32 %d1, %r8, 4;\nadd.s64 %d1, %d1, %base;\n"
                       "mov.u32 %r9, %lanemask_lt;\npopc.b32 %r9, %r9;\nsub.u32 %r9, %r9, %r4;\n"
                       "mov.u32 %r10, %warpid;\nshl.b32 %r10, %r10, 5;\nadd.u32 %r10, %r10, %r4;\n"
                       "sub.u32 %r10, %r10, %r7;\nadd.u32 %r9, %r9, %r10;\n"
                       "add.u32 %r9, %r9, %r8;\nadd.u32 %r9, %r9, 1;\nst.global.u32 [%d1], %r9;\n"
                       END, (sg_dim){3, 2, 1}, (sg_dim){4, 3, 4}, 0, 3, 0);
    CHECK(ok && !violations, "%s", said);
    for (uint32_t k = 0; k < 6 * 48; k++) CHECK(out32((int)k) == k + 1, "%u: %u", k, out32((int)k));
}

/* A seed changes warps in the midst, the same seed at the same places. */
static void test_orders(void) {
    static int first[4096];
    const char *text = HEAD KERNEL "mov.u32 %r1, 0;\nL:\nactivemask.b32 %r2;\n"
                       "add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 400;\n@%p1 bra L;\n" END;
    int switches[3] = {0};
    for (int s = 0; s < 3; s++) {
        bool ok = run(text, 1, 128, 0, (uint64_t)s);
        CHECK(ok && n_order == 1600, "%s", said);
        for (int k = 1; k < n_order; k++) switches[s] += order[k] != order[k - 1];
        memcpy(first, order, sizeof first);
        ok = run(text, 1, 128, 0, (uint64_t)s);
        CHECK(ok && !memcmp(first, order, sizeof first), "seed %d: another order", s);
    }
    CHECK(switches[0] == 3, "in order: %d", switches[0]);
    CHECK(switches[1] > 6 && switches[2] > 6 && switches[1] != switches[2], "%d %d", switches[1],
          switches[2]);
}

static void test_endings(void) {
    bool ok = run(HEAD KERNEL "setp.lt.u32 %p1, %t, 32;\n@%p1 bra A;\nbar.sync 1;\nbra.uni B;\n"
                  "A:\nbar.sync 2;\nB:\n" END, 1, 64, 0, 0);
    CHECK(ok && violations && strstr(said, "deadlock") && strstr(said, "barrier 2"), "%s", said);
    sg_steps_max = 100000;
    ok = run(HEAD KERNEL "L:\nbra.uni L;\n" END, 1, 64, 0, 0);
    CHECK(!ok && strstr(said, "endless"), "%s", said);
    sg_steps_max = 1ull << 36;
}

int main(void) {
    RUN(test_nested_ifs);
    RUN(test_loops);
    RUN(test_early_return);
    RUN(test_guards);
    RUN(test_any_program);
    RUN(test_calls);
    RUN(test_exit_in_call);
    RUN(test_endless_recursion);
    RUN(test_local);
    RUN(test_shared);
    RUN(test_vectors);
    RUN(test_wrong_addresses);
    RUN(test_generic);
    RUN(test_atomics);
    RUN(test_special_registers);
    RUN(test_orders);
    RUN(test_endings);
    return check_done();
}
