/* test_alu.c -- alu.c: known answers for each kind of instruction, conversions of all small
 * numbers, roundings against an independent computation.
 *
 *   "add.s32 %r0, %r1, %r2;" + values --sg_parse, sg_alu--> %r0 of 32 lanes --> what is wanted
 *
 * Registers 1..3 of every class hold the values a, b, c, lane by lane; 0 takes the result.       */
#include "../check.h"

#include "softgpu.h"

#include <fenv.h>
#include <setjmp.h>
#include <stdarg.h>

/* === 1. One instruction ======================================================================= */

static uint64_t violations;
static jmp_buf stopped;

void sg_violation(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                  const char *fmt, ...) {
    (void)b, (void)w, (void)i, (void)lane, (void)fmt;
    violations++;
}
void sg_stop(const sg_block *b, const sg_warp *w, const sg_instr *i, const char *fmt, ...) {
    va_list args;
    (void)b, (void)w, (void)i;
    va_start(args, fmt);
    printf("     stop: ");
    vprintf(fmt, args);
    putchar('\n');
    va_end(args);
    longjmp(stopped, 1);
}
/* exec.c's: here only registers and immediates. */
uint64_t sg_get(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_type t, int lane) {
    unsigned bits = 8 * sg_type_bytes(t);
    (void)b;
    uint64_t v = o->kind == O_REG ? w->reg[o->reg * SG_LANES + lane] : o->imm;
    if (o->negate) v ^= 1;
    return t == T_PRED ? v & 1 : bits >= 64 ? v : v & ((1ull << bits) - 1);
}

typedef struct { sg_module *m; const sg_func *f; sg_warp w; uint64_t reg[64][SG_LANES]; } bench;

static bool bench_open(bench *x, const char *instr) {
    char text[1000], why[200];
    int n = snprintf(text, sizeof text,
                     ".version 9.0\n.target sm_120\n.address_size 64\n.visible .entry k()\n{\n"
                     ".reg .pred %%p<5>;\n.reg .b16 %%h<5>;\n.reg .b32 %%r<5>;\n"
                     ".reg .b64 %%d<5>;\n.reg .b8 %%b<5>;\n%s\nret;\n}\n", instr);
    memset(x, 0, sizeof *x);
    x->m = sg_parse(text, (size_t)n, why, sizeof why);
    if (!x->m) {
        printf("     %s: %s\n", instr, why);
        return false;
    }
    x->f = sg_find(x->m, "k");
    x->w = (sg_warp){.reg = x->reg[0], .func = x->f, .active = ~0u, .live = ~0u, .barrier = -1};
    return x->f->n_regs <= 64;
}

static void bench_set(bench *x, char number, int lane, uint64_t v) {
    for (int r = 0; r < x->f->n_regs; r++) {
        const char *name = x->f->reg_name[r];
        unsigned bits = 8 * sg_type_bytes(x->f->reg[r]);
        if (name[strlen(name) - 1] != number) continue;
        uint64_t low = x->f->reg[r] == T_PRED ? 1 : bits == 64 ? ~0ul : (1ul << bits) - 1;
        x->reg[r][lane] = v & low;
    }
}

/* Run all its instructions on the lanes of mask. */
static bool bench_run(bench *x, uint32_t mask) {
    if (setjmp(stopped)) return false;
    for (int k = 0; k < x->f->n - 1; k++) {
        if (!sg_alu(NULL, &x->w, &x->f->code[k], mask)) return false;
    }
    return true;
}

static uint64_t *result_of(bench *x) {
    const sg_operand *o = &x->f->code[x->f->n - 2].o[0];
    return x->reg[o->kind == O_VEC ? o->vec[0] : o->reg];
}

typedef struct { const char *text; uint64_t a, b, c, want; } row;

static void check_rows(const row *rows, size_t n) {
    for (size_t k = 0; k < n; k++) {
        const row *r = &rows[k];
        bench x;
        bool ok = bench_open(&x, r->text);
        CHECK(ok, "%s", r->text);
        if (!ok) continue;
        for (int l = 0; l < SG_LANES; l++) {
            bench_set(&x, '0', l, 0x5a5a5a5a5a5a5a5a);
            bench_set(&x, '1', l, r->a);
            bench_set(&x, '2', l, r->b);
            bench_set(&x, '3', l, r->c);
        }
        ok = bench_run(&x, 0x7fffffff);
        CHECK(ok, "%s is not known", r->text);
        uint64_t *got = result_of(&x), kept = got[31];
        CHECK(got[0] == r->want && got[30] == r->want, "%s of %llx %llx %llx: %llx, not %llx",
              r->text, (unsigned long long)r->a, (unsigned long long)r->b,
              (unsigned long long)r->c, (unsigned long long)got[0],
              (unsigned long long)r->want);
        CHECK((kept & 0xf) == 0xa || kept < 2, "%s writes a masked lane", r->text);
        sg_module_free(x.m);
    }
}
#define ROWS(rows) check_rows(rows, sizeof rows / sizeof *rows)

static uint32_t fbits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static float bitsf(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static uint64_t seed = 1;
static uint64_t rnd(void) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed * 0x2545f4914f6cdd1dull;
}

/* === 2. Known answers ========================================================================= */

#define F1 0x3f800000u
#define F2 0x40000000u
#define F3 0x40400000u
#define FNAN 0x7fffffffu
#define FINF 0x7f800000u
#define NEGF 0x80000000u

static void test_integers(void) {
    static const row rows[] = {
        {"add.s32 %r0, %r1, %r2;", 0x7fffffff, 1, 0, 0x80000000},
        {"add.u16 %h0, %h1, %h2;", 0xffff, 2, 0, 1},
        {"add.s64 %d0, %d1, -1;", 0, 0, 0, ~0ull},
        {"add.sat.s32 %r0, %r1, %r2;", 0x7fffffff, 1, 0, 0x7fffffff},
        {"sub.sat.s32 %r0, %r1, %r2;", 0x80000000, 1, 0, 0x80000000},
        {"sub.u32 %r0, %r1, %r2;", 1, 2, 0, 0xffffffff},
        {"mul.lo.s32 %r0, %r1, %r2;", 0xffffffff, 7, 0, 0xfffffff9},
        {"mul.lo.u16 %h0, %h1, %h2;", 0xffff, 0xffff, 0, 1},
        {"mul.hi.u32 %r0, %r1, %r2;", 0xffffffff, 0xffffffff, 0, 0xfffffffe},
        {"mul.hi.s32 %r0, %r1, %r2;", 0x80000000, 2, 0, 0xffffffff},
        {"mul.hi.u64 %d0, %d1, %d2;", ~0ull, ~0ull, 0, ~1ull},
        {"mul.hi.s64 %d0, %d1, %d2;", ~0ull, 5, 0, ~0ull},
        {"mul.hi.s16 %h0, %h1, %h2;", 0x8000, 0x8000, 0, 0x4000},
        {"mul.wide.s32 %d0, %r1, %r2;", 0xffffffff, 3, 0, 0xfffffffffffffffdull},
        {"mul.wide.u32 %d0, %r1, %r2;", 0xffffffff, 3, 0, 0x2fffffffdull},
        {"mul.wide.s16 %r0, %h1, %h2;", 0xffff, 3, 0, 0xfffffffd},
        {"mul.wide.u16 %r0, %h1, 8;", 0xffff, 0, 0, 0x7fff8},
        {"mad.lo.s32 %r0, %r1, %r2, %r3;", 5, 7, 0xffffffff, 34},
        {"mad.hi.u32 %r0, %r1, %r2, %r3;", 0xffffffff, 0xffffffff, 3, 1},
        {"mad.wide.s32 %d0, %r1, %r2, %d3;", 0xffffffff, 3, 10, 7},
        {"mad.wide.u16 %r0, %h1, %h2, %r3;", 0xffff, 0xffff, 0xffffffff, 0xfffe0000},
        {"mad.lo.s64 %d0, %d1, %d2, %d3;", 1ull << 40, 1ull << 20, 9, (1ull << 60) + 9},
        {"mul24.lo.s32 %r0, %r1, %r2;", 0xffffff, 5, 0, 0xfffffffb},
        {"mul24.lo.u32 %r0, %r1, %r2;", 0x01ffffff, 2, 0, 0x1fffffe},
        {"mad24.lo.u32 %r0, %r1, %r2, %r3;", 3, 4, 5, 17},
        {"div.s32 %r0, %r1, %r2;", 0xfffffff9, 2, 0, 0xfffffffd},
        {"div.s32 %r0, %r1, %r2;", 0x80000000, 0xffffffff, 0, 0x80000000},
        {"div.u32 %r0, %r1, %r2;", 0xfffffff9, 2, 0, 0x7ffffffc},
        {"rem.s32 %r0, %r1, %r2;", 0xfffffff9, 2, 0, 0xffffffff},
        {"rem.s32 %r0, %r1, %r2;", 0x80000000, 0xffffffff, 0, 0},
        {"rem.u64 %d0, %d1, %d2;", 1ull << 63, 1000, 0, 808},
        {"div.s64 %d0, %d1, %d2;", ~0ull, 1, 0, ~0ull},
        {"abs.s32 %r0, %r1;", 0xfffffffb, 0, 0, 5},
        {"abs.s64 %d0, %d1;", ~0ull, 0, 0, 1},
        {"neg.s32 %r0, %r1;", 5, 0, 0, 0xfffffffb},
        {"neg.s16 %h0, %h1;", 1, 0, 0, 0xffff},
        {"min.s32 %r0, %r1, %r2;", 0xffffffff, 1, 0, 0xffffffff},
        {"min.u32 %r0, %r1, %r2;", 0xffffffff, 1, 0, 1},
        {"max.s16 %h0, %h1, %h2;", 0xffff, 1, 0, 1},
        {"max.u64 %d0, %d1, %d2;", ~0ull, 1, 0, ~0ull},
        {"max.s64 %d0, %d1, %d2;", ~0ull, 1, 0, 1},
        {"sad.s32 %r0, %r1, %r2, %r3;", 0xffffffff, 1, 10, 12},
        {"sad.u32 %r0, %r1, %r2, %r3;", 3, 9, 1, 7},
        {"dp4a.u32.u32 %r0, %r1, %r2, %r3;", 0xff020304, 0x01010101, 5, 269},
        {"dp4a.s32.s32 %r0, %r1, %r2, %r3;", 0xff020304, 0x01010101, 0, 8},
        {"dp4a.u32.s32 %r0, %r1, %r2, %r3;", 0xff000000, 0xff000000, 0, 0xffffff01},
        {"add.cc.u32 %r0, %r1, %r2; addc.u32 %r0, %r3, 0;", 0xffffffff, 1, 7, 8},
        {"sub.cc.u32 %r0, %r1, %r2; subc.u32 %r0, %r3, 0;", 0, 1, 7, 6},
        {"add.cc.u64 %d0, %d1, %d2; addc.u64 %d0, %d3, 0;", ~0ull, 1, 7, 8},
        {"mad.lo.cc.u32 %r0, %r1, %r2, %r3; madc.hi.u32 %r0, %r1, %r2, 0;", 0x80000000, 2,
         0xffffffff, 1},
    };
    ROWS(rows);
    violations = 0;
    static const row zero[] = {{"div.u32 %r0, %r1, %r2;", 5, 0, 0, 0xffffffff}};
    ROWS(zero);
    CHECK(violations == 31, "a division by zero in each of 31 lanes: %d", (int)violations);
}

static void test_bits(void) {
    static const row rows[] = {
        {"and.b32 %r0, %r1, %r2;", 0xff00ff00, 0x0ff00ff0, 0, 0x0f000f00},
        {"or.b64 %d0, %d1, %d2;", 1ull << 63, 1, 0, (1ull << 63) | 1},
        {"xor.b16 %h0, %h1, %h2;", 0xffff, 0x00ff, 0, 0xff00},
        {"not.b32 %r0, %r1;", 0xffff0000, 0, 0, 0x0000ffff},
        {"not.pred %p0, %p1;", 1, 0, 0, 0},
        {"xor.pred %p0, %p1, %p2;", 1, 0, 0, 1},
        {"cnot.b32 %r0, %r1;", 0, 0, 0, 1},
        {"cnot.b32 %r0, %r1;", 4, 0, 0, 0},
        {"shl.b32 %r0, %r1, %r2;", 1, 31, 0, 0x80000000},
        {"shl.b32 %r0, %r1, %r2;", 1, 32, 0, 0},
        {"shl.b16 %h0, %h1, %r2;", 0xffff, 8, 0, 0xff00},
        {"shl.b64 %d0, %d1, %r2;", 1, 63, 0, 1ull << 63},
        {"shl.b64 %d0, %d1, %r2;", 1, 64, 0, 0},
        {"shr.u32 %r0, %r1, %r2;", 0x80000000, 31, 0, 1},
        {"shr.u32 %r0, %r1, %r2;", 0x80000000, 0xffffffff, 0, 0},
        {"shr.s32 %r0, %r1, %r2;", 0x80000000, 99, 0, 0xffffffff},
        {"shr.s16 %h0, %h1, 4;", 0x8000, 0, 0, 0xf800},
        {"shr.s64 %d0, %d1, 60;", 1ull << 63, 0, 0, 0xfffffffffffffff8ull},
        {"shf.l.wrap.b32 %r0, %r1, %r2, %r3;", 0x80000001, 0x40000000, 33, 0x80000001},
        {"shf.l.clamp.b32 %r0, %r1, %r2, %r3;", 0x80000001, 0x40000000, 33, 0x80000001},
        {"shf.r.wrap.b32 %r0, %r1, %r2, %r3;", 0x80000001, 0x3, 1, 0xc0000000},
        {"shf.r.clamp.b32 %r0, %r1, %r2, %r3;", 0x80000001, 0x3, 40, 0x3},
        {"lop3.b32 %r0, %r1, %r2, %r3, 0x96;", 0xf0, 0xcc, 0xaa, 0x96},
        {"lop3.b32 %r0, %r1, %r2, %r3, 0xca;", 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0xcacacaca},
        {"lop3.b32 %r0, %r1, %r2, %r3, 0x1;", 0xf0, 0xcc, 0xaa, 0xffffff01},
        {"prmt.b32 %r0, %r1, %r2, %r3;", 0x33221100, 0x77665544, 0x0246, 0x00224466},
        {"prmt.b32 %r0, %r1, %r2, 0x9180;", 0x332281ff, 0, 0, 0xff81ffff},
        {"prmt.b32.f4e %r0, %r1, %r2, %r3;", 0x33221100, 0x77665544, 1, 0x44332211},
        {"prmt.b32.b4e %r0, %r1, %r2, %r3;", 0x33221100, 0x77665544, 1, 0x66770011},
        {"bfe.u32 %r0, %r1, 8, 4;", 0x00000f00, 0, 0, 0xf},
        {"bfe.s32 %r0, %r1, 8, 4;", 0x00000f00, 0, 0, 0xffffffff},
        {"bfe.s32 %r0, %r1, 28, 8;", 0x80000000, 0, 0, 0xfffffff8},
        {"bfe.u64 %d0, %d1, 60, 8;", ~0ull, 0, 0, 0xf},
        {"bfe.u32 %r0, %r1, 3, 0;", ~0ull, 0, 0, 0},
        {"bfi.b32 %r0, %r1, %r2, 4, 8;", 0x1ab, 0xffffffff, 0, 0xfffffabf},
        {"bfi.b64 %d0, %d1, %d2, 32, 32;", 0x12345678, 1, 0, 0x1234567800000001ull},
        {"bfind.u32 %r0, %r1;", 0x10, 0, 0, 4},
        {"bfind.s32 %r0, %r1;", 0xffffffff, 0, 0, 0xffffffff},
        {"bfind.shiftamt.u32 %r0, %r1;", 0x10, 0, 0, 27},
        {"bfind.u64 %r0, %d1;", 1ull << 40, 0, 0, 40},
        {"brev.b32 %r0, %r1;", 1, 0, 0, 0x80000000},
        {"brev.b64 %d0, %d1;", 0xf, 0, 0, 0xf000000000000000ull},
        {"clz.b32 %r0, %r1;", 1, 0, 0, 31},
        {"clz.b32 %r0, %r1;", 0, 0, 0, 32},
        {"clz.b64 %r0, %d1;", 1, 0, 0, 63},
        {"popc.b32 %r0, %r1;", 0xf0f0, 0, 0, 8},
        {"popc.b64 %r0, %d1;", ~0ull, 0, 0, 64},
        {"szext.wrap.s32 %r0, %r1, 8;", 0x1ff, 0, 0, 0xffffffff},
        {"szext.clamp.u32 %r0, %r1, %r2;", 0x1ff, 8, 0, 0xff},
    };
    ROWS(rows);
}

static void test_floats(void) {
    static const row rows[] = {
        {"add.f32 %r0, %r1, %r2;", F1, F2, 0, F3},
        {"add.rn.f32 %r0, %r1, %r2;", FINF, FINF | NEGF, 0, FNAN},
        {"add.f32 %r0, %r1, 0f40000000;", F1, 0, 0, F3},
        {"sub.f32 %r0, %r1, %r2;", F1, F3, 0, F2 | NEGF},
        {"add.rm.f32 %r0, %r1, %r2;", F1, F1 | NEGF, 0, NEGF},
        {"add.rn.f32 %r0, %r1, %r2;", F1, F1 | NEGF, 0, 0},
        {"mul.f32 %r0, %r1, %r2;", F3, F2 | NEGF, 0, 0xc0c00000},
        {"mul.ftz.f32 %r0, %r1, %r2;", 1, F1, 0, 0},
        {"mul.f32 %r0, %r1, %r2;", 1, F1, 0, 1},
        {"add.sat.f32 %r0, %r1, %r2;", F1, F2, 0, F1},
        {"add.sat.f32 %r0, %r1, %r2;", FNAN, F2, 0, 0},
        {"fma.rn.f32 %r0, %r1, %r2, %r3;", 0x3f800001, 0x3f800001, 0xbf800002, 0x28800000},
        {"fma.rn.ftz.f32 %r0, %r1, %r2, %r3;", 1, F1, NEGF | 1, 0},
        {"div.rn.f32 %r0, %r1, %r2;", F1, F3, 0, 0x3eaaaaab},
        {"div.rz.f32 %r0, %r1, %r2;", F1, F3, 0, 0x3eaaaaaa},
        {"div.full.f32 %r0, %r1, %r2;", F3, F2, 0, 0x3fc00000},
        {"rcp.rn.f32 %r0, %r1;", F2, 0, 0, 0x3f000000},
        {"rcp.approx.ftz.f32 %r0, %r1;", F3, 0, 0, 0x3eaaaaab},
        {"rcp.rn.f32 %r0, %r1;", NEGF, 0, 0, FINF | NEGF},
        {"sqrt.rn.f32 %r0, %r1;", F2, 0, 0, 0x3fb504f3},
        {"sqrt.rp.f32 %r0, %r1;", F2, 0, 0, 0x3fb504f4},
        {"sqrt.rn.f32 %r0, %r1;", F1 | NEGF, 0, 0, FNAN},
        {"rsqrt.approx.f32 %r0, %r1;", 0x40800000, 0, 0, 0x3f000000},
        {"sin.approx.f32 %r0, %r1;", F1, 0, 0, 0x3f576aa4},
        {"cos.approx.f32 %r0, %r1;", F1, 0, 0, 0x3f0a5140},
        {"lg2.approx.f32 %r0, %r1;", 0x41000000, 0, 0, F3},
        {"ex2.approx.ftz.f32 %r0, %r1;", F3, 0, 0, 0x41000000},
        {"tanh.approx.f32 %r0, %r1;", FINF, 0, 0, F1},
        {"neg.f32 %r0, %r1;", F1, 0, 0, F1 | NEGF},
        {"abs.f32 %r0, %r1;", F1 | NEGF, 0, 0, F1},
        {"min.f32 %r0, %r1, %r2;", FNAN, F1, 0, F1},
        {"min.NaN.f32 %r0, %r1, %r2;", FNAN, F1, 0, FNAN},
        {"min.f32 %r0, %r1, %r2;", 0, NEGF, 0, NEGF},
        {"max.f32 %r0, %r1, %r2;", NEGF, 0, 0, 0},
        {"max.f32 %r0, %r1, %r2;", 0xffc00000, 0x7fc00000, 0, FNAN},
        {"copysign.f32 %r0, %r1, %r2;", NEGF, F1, 0, F1 | NEGF},
        {"testp.finite.f32 %p0, %r1;", FINF, 0, 0, 0},
        {"testp.notanumber.f32 %p0, %r1;", FNAN, 0, 0, 1},
        {"testp.subnormal.f32 %p0, %r1;", 7, 0, 0, 1},
        {"add.f64 %d0, %d1, %d2;", 0x3ff0000000000000, 0x3ff0000000000000, 0, 0x4000000000000000},
        {"fma.rn.f64 %d0, %d1, %d2, %d3;", 0x4000000000000000, 0x4000000000000000,
         0x3ff0000000000000, 0x4014000000000000},
        {"div.rn.f64 %d0, %d1, %d2;", 0x3ff0000000000000, 0x4008000000000000, 0,
         0x3fd5555555555555},
        {"div.rp.f64 %d0, %d1, %d2;", 0x3ff0000000000000, 0x4008000000000000, 0,
         0x3fd5555555555556},
        {"sqrt.rn.f64 %d0, %d1;", 0x4000000000000000, 0, 0, 0x3ff6a09e667f3bcd},
        {"neg.f64 %d0, %d1;", 0, 0, 0, 1ull << 63},
        {"min.f64 %d0, %d1, %d2;", 0, 1ull << 63, 0, 1ull << 63},
        {"add.rn.f32x2 %d0, %d1, %d2;", 0x3f80000040000000, 0x400000003f800000, 0,
         0x4040000040400000},
        {"fma.rn.f32x2 %d0, %d1, %d2, %d3;", 0x3f80000040000000, 0x400000003f800000, 0,
         0x4000000040000000},
    };
    ROWS(rows);
}

static void test_halves(void) {
    static const row rows[] = {
        {"add.f16 %h0, %h1, %h2;", 0x3c00, 0x4000, 0, 0x4200},
        {"add.rn.bf16 %h0, %h1, %h2;", 0x3f80, 0x4000, 0, 0x4040},
        {"add.f16 %h0, %h1, %h2;", 0x7bff, 0x7bff, 0, 0x7c00},
        {"sub.f16x2 %r0, %r1, %r2;", 0x3c004000, 0x3c003c00, 0, 0x00003c00},
        {"mul.f16x2 %r0, %r1, %r2;", 0x3c004000, 0x40004000, 0, 0x40004400},
        {"mul.rn.bf16x2 %r0, %r1, %r2;", 0x3f804000, 0x40004000, 0, 0x40004080},
        {"fma.rn.f16 %h0, %h1, %h2, %h3;", 0x3c01, 0x3c01, 0xbc02, 0x0010},
        {"fma.rn.f16x2 %r0, %r1, %r2, %r3;", 0x3c004000, 0x40004000, 0x3c003c00, 0x42004500},
        {"fma.rn.bf16x2 %r0, %r1, %r2, %r3;", 0x3f804000, 0x40004000, 0x3f803f80, 0x404040a0},
        {"fma.rn.relu.bf16x2 %r0, %r1, %r2, %r3;", 0xbf804000, 0x40004000, 0, 0x00004080},
        {"fma.rn.sat.f16 %h0, %h1, %h2, %h3;", 0x4000, 0x4000, 0, 0x3c00},
        {"min.bf16x2 %r0, %r1, %r2;", 0x7fff4000, 0x3f80bf80, 0, 0x3f80bf80},
        {"max.NaN.f16 %h0, %h1, %h2;", 0x7e00, 0x3c00, 0, 0x7fff},
        {"max.f16 %h0, %h1, %h2;", 0x8000, 0, 0, 0},
        {"neg.bf16x2 %r0, %r1;", 0x3f80bf80, 0, 0, 0xbf803f80},
        {"abs.f16x2 %r0, %r1;", 0xbc00bc00, 0, 0, 0x3c003c00},
        {"setp.lt.f16 %p0, %h1, %h2;", 0xbc00, 0x3c00, 0, 1},
        {"setp.gt.bf16 %p0, %h1, %h2;", 0xbf80, 0x3f80, 0, 0},
        {"setp.lt.f16x2 %p0|%p4, %r1, %r2;", 0x3c00bc00, 0x00000000, 0, 1},
        {"setp.lt.f16x2 %p4|%p0, %r1, %r2; mov.pred %p0, %p0;", 0x3c00bc00, 0, 0, 0},
        {"ex2.approx.f16 %h0, %h1;", 0x4200, 0, 0, 0x4800},
        {"tanh.approx.bf16x2 %r0, %r1;", 0x7f80ff80, 0, 0, 0x3f80bf80},
    };
    ROWS(rows);
}

static void test_compare_and_select(void) {
    static const row rows[] = {
        {"setp.lt.s32 %p0, %r1, %r2;", 0xffffffff, 0, 0, 1},
        {"setp.lt.u32 %p0, %r1, %r2;", 0xffffffff, 0, 0, 0},
        {"setp.hs.u32 %p0, %r1, %r2;", 0xffffffff, 0, 0, 1},
        {"setp.eq.b16 %p0, %h1, 0;", 0, 0, 0, 1},
        {"setp.ge.s64 %p0, %d1, %d2;", ~0ull, 0, 0, 0},
        {"setp.ne.s32 %p0|%p4, %r1, %r2;", 1, 1, 0, 0},
        {"setp.lt.and.s32 %p0, %r1, %r2, %p3;", 1, 2, 0, 0},
        {"setp.lt.or.s32 %p0, %r1, %r2, %p3;", 3, 2, 1, 1},
        {"setp.lt.and.s32 %p0, %r1, %r2, !%p3;", 1, 2, 0, 1},
        {"setp.lt.xor.s32 %p4|%p0, %r1, %r2, %p3; mov.pred %p0, %p0;", 1, 2, 1, 1},
        {"setp.lt.f32 %p0, %r1, %r2;", FNAN, F1, 0, 0},
        {"setp.ltu.f32 %p0, %r1, %r2;", FNAN, F1, 0, 1},
        {"setp.ne.f32 %p0, %r1, %r2;", FNAN, F1, 0, 0},
        {"setp.neu.f32 %p0, %r1, %r2;", FNAN, FNAN, 0, 1},
        {"setp.num.f32 %p0, %r1, %r2;", F2, F1, 0, 1},
        {"setp.nan.f32 %p0, %r1, %r2;", FNAN, F1, 0, 1},
        {"setp.eq.f32 %p0, %r1, %r2;", NEGF, 0, 0, 1},
        {"setp.gt.ftz.f32 %p0, %r1, %r2;", 1, 0, 0, 0},
        {"setp.gt.f64 %p0, %d1, %d2;", 0x3ff0000000000000, 0, 0, 1},
        {"set.gt.u32.f32 %r0, %r1, %r2;", F2, F1, 0, 0xffffffff},
        {"set.gt.f32.s32 %r0, %r1, %r2;", 2, 1, 0, F1},
        {"set.eq.f16.f16 %h0, %h1, %h2;", 0x8000, 0, 0, 0x3c00},
        {"set.lt.bf16.bf16 %h0, %h1, %h2;", 0xbf80, 0, 0, 0x3f80},
        {"set.lt.f16x2.f16x2 %r0, %r1, %r2;", 0xbc003c00, 0, 0, 0x3c000000},
        {"set.gt.u32.bf16x2 %r0, %r1, %r2;", 0xbf803f80, 0, 0, 0x0000ffff},
        {"selp.b32 %r0, %r1, %r2, %p3;", 5, 6, 1, 5},
        {"selp.f64 %d0, %d1, %d2, %p3;", 5, 6, 0, 6},
        {"selp.b16 %h0, 7, %h2, %p3;", 0, 6, 1, 7},
        {"slct.s32.s32 %r0, %r1, %r2, %r3;", 5, 6, 0xffffffff, 6},
        {"slct.u64.f32 %d0, %d1, %d2, %r3;", 5, 6, NEGF, 5},
        {"mov.b32 %r0, %r1;", 5, 0, 0, 5},
        {"mov.u32 %r0, 77;", 0, 0, 0, 77},
        {"mov.b32 %r0, {%h1, %h2};", 0x1234, 0x5678, 0, 0x56781234},
        {"mov.b64 %d0, {%r1, %r2};", 0x12345678, 0x9abcdef0, 0, 0x9abcdef012345678},
        {"mov.b32 {%h0, %h4}, %r1;", 0x56781234, 0, 0, 0x1234},
        {"mov.b64 {%r0, _}, %d1;", 0x9abcdef012345678, 0, 0, 0x12345678},
        {"mov.b64 {_, %r4}, %d1; mov.b32 %r0, %r4;", 0x9abcdef012345678, 0, 0, 0x9abcdef0},
        {"mov.b64 %d0, {%h1, %h2, %h3, %h1};", 1, 2, 3, 0x0001000300020001},
    };
    ROWS(rows);
}

static void test_conversions(void) {
    static const row rows[] = {
        {"cvt.u32.u16 %r0, %h1;", 0xfedc, 0, 0, 0xfedc},
        {"cvt.s32.s16 %r0, %h1;", 0xfedc, 0, 0, 0xfffffedc},
        {"cvt.s64.s32 %d0, %r1;", 0x80000000, 0, 0, 0xffffffff80000000},
        {"cvt.u64.u32 %d0, %r1;", 0x80000000, 0, 0, 0x80000000},
        {"cvt.u32.u64 %r0, %d1;", 0x123456789abcdef0, 0, 0, 0x9abcdef0},
        {"cvt.s32.s8 %r0, %r1;", 0x1280, 0, 0, 0xffffff80},
        {"cvt.s16.s8 %h0, %r1;", 0x80, 0, 0, 0xff80},
        {"cvt.u16.u8 %h0, %h1;", 0x1280, 0, 0, 0x80},
        {"cvt.s8.s32 %r0, %r1;", 0x1280, 0, 0, 0xffffff80},
        {"cvt.u8.u32 %r0, %r1;", 0x1280, 0, 0, 0x80},
        {"cvt.sat.u8.s32 %r0, %r1;", 0x1280, 0, 0, 0xff},
        {"cvt.sat.s8.s32 %r0, %r1;", 0xffff0000, 0, 0, 0xffffff80},
        {"cvt.sat.u32.s32 %r0, %r1;", 0xffff0000, 0, 0, 0},
        {"cvt.rn.f32.s32 %r0, %r1;", 0xffffffff, 0, 0, F1 | NEGF},
        {"cvt.rn.f32.u32 %r0, %r1;", 0xffffffff, 0, 0, 0x4f800000},
        {"cvt.rz.f32.u32 %r0, %r1;", 0xffffffff, 0, 0, 0x4f7fffff},
        {"cvt.rn.f32.u64 %r0, %d1;", 0x8000008000000001, 0, 0, 0x5f000001},
        {"cvt.rn.f32.s64 %r0, %d1;", ~0ull, 0, 0, F1 | NEGF},
        {"cvt.rn.f64.s32 %d0, %r1;", 0xffffffff, 0, 0, 0xbff0000000000000},
        {"cvt.rp.f64.u64 %d0, %d1;", ~0ull, 0, 0, 0x43f0000000000000},
        {"cvt.rz.f64.u64 %d0, %d1;", ~0ull, 0, 0, 0x43efffffffffffff},
        {"cvt.rzi.s32.f32 %r0, %r1;", 0xc02ccccd, 0, 0, 0xfffffffe},
        {"cvt.rni.s32.f32 %r0, %r1;", 0x40200000, 0, 0, 2},
        {"cvt.rpi.s32.f32 %r0, %r1;", 0x40200000, 0, 0, 3},
        {"cvt.rmi.s32.f32 %r0, %r1;", 0xc0200000, 0, 0, 0xfffffffd},
        {"cvt.rzi.s32.f32 %r0, %r1;", 0x7f000000, 0, 0, 0x7fffffff},
        {"cvt.rzi.s32.f32 %r0, %r1;", FNAN, 0, 0, 0},
        {"cvt.rzi.u32.f32 %r0, %r1;", 0xbf800000, 0, 0, 0},
        {"cvt.rzi.u8.f32 %r0, %r1;", 0x43fa0000, 0, 0, 0xff},
        {"cvt.rzi.s64.f32 %d0, %r1;", FNAN, 0, 0, 1ull << 63},
        {"cvt.rzi.u64.f64 %d0, %d1;", 0x43efffffffffffff, 0, 0, 0xfffffffffffff800},
        {"cvt.rzi.s32.f64 %r0, %d1;", 0x7ff8000000000000, 0, 0, 0x80000000},
        {"cvt.rni.f32.f32 %r0, %r1;", 0xbf000000, 0, 0, NEGF},
        {"cvt.rmi.f32.f32 %r0, %r1;", 0xbf000000, 0, 0, F1 | NEGF},
        {"cvt.rzi.f64.f64 %d0, %d1;", 0x4004000000000000, 0, 0, 0x4000000000000000},
        {"cvt.sat.f32.f32 %r0, %r1;", F2, 0, 0, F1},
        {"cvt.sat.f32.f32 %r0, %r1;", FNAN, 0, 0, 0},
        {"cvt.ftz.f64.f32 %d0, %r1;", 1, 0, 0, 0},
        {"cvt.f64.f32 %d0, %r1;", F2, 0, 0, 0x4000000000000000},
        {"cvt.rn.f32.f64 %r0, %d1;", 0x3ff0000010000000, 0, 0, F1},
        {"cvt.rp.f32.f64 %r0, %d1;", 0x3ff0000010000000, 0, 0, F1 + 1},
        {"cvt.rn.f16.f32 %h0, %r1;", 0x477ff000, 0, 0, 0x7c00},
        {"cvt.rz.f16.f32 %h0, %r1;", 0x477ff000, 0, 0, 0x7bff},
        {"cvt.rn.satfinite.f16.f32 %h0, %r1;", FINF, 0, 0, 0x7bff},
        {"cvt.rn.bf16.f32 %h0, %r1;", 0x3f808000, 0, 0, 0x3f80},
        {"cvt.rn.bf16.f32 %h0, %r1;", 0x3f818000, 0, 0, 0x3f82},
        {"cvt.rz.bf16.f32 %h0, %r1;", 0x3f81ffff, 0, 0, 0x3f81},
        {"cvt.rn.relu.bf16.f32 %h0, %r1;", F1 | NEGF, 0, 0, 0},
        {"cvt.rna.tf32.f32 %r0, %r1;", 0x3f801000, 0, 0, 0x3f802000},
        {"cvt.rn.tf32.f32 %r0, %r1;", 0x3f801000, 0, 0, 0x3f800000},
        {"cvt.rn.f16.s32 %h0, %r1;", 3, 0, 0, 0x4200},
        {"cvt.rzi.s32.f16 %r0, %h1;", 0xc200, 0, 0, 0xfffffffd},
    };
    ROWS(rows);
}

static void test_pairs(void) {
    static const row rows[] = {
        {"cvt.rn.bf16x2.f32 %r0, %r1, %r2;", F1, F2, 0, 0x3f804000},
        {"cvt.rn.relu.bf16x2.f32 %r0, %r1, %r2;", F1 | NEGF, F2, 0, 0x00004000},
        {"cvt.rz.f16x2.f32 %r0, %r1, %r2;", 0x3f801fff, F2, 0, 0x3c004000},
        {"cvt.rn.satfinite.e4m3x2.f32 %h0, %r1, %r2;", F1, 0x447a0000, 0, 0x387e},
        {"cvt.rn.satfinite.e4m3x2.f32 %h0, %r1, %r2;", FNAN, FINF | NEGF, 0, 0x7ffe},
        {"cvt.rn.satfinite.e5m2x2.f32 %h0, %r1, %r2;", F1, FINF, 0, 0x3c7b},
        {"cvt.rn.satfinite.e4m3x2.f16x2 %h0, %r1;", 0x3c004000, 0, 0, 0x3840},
        {"cvt.rn.f16x2.e4m3x2 %r0, %h1;", 0x3840, 0, 0, 0x3c004000},
        {"cvt.rn.f16x2.e5m2x2 %r0, %h1;", 0x3c40, 0, 0, 0x3c004000},
        {"cvt.rz.satfinite.ue8m0x2.f32 %h0, %r1, %r2;", 0x3fc00000, FINF, 0, 0x7ffe},
        {"cvt.rp.satfinite.ue8m0x2.f32 %h0, %r1, %r2;", 0x3fc00000, F2, 0, 0x8080},
        {"cvt.rp.satfinite.ue8m0x2.bf16x2 %h0, %r1;", 0x3fc04000, 0, 0, 0x8080},
        {"cvt.rn.bf16x2.ue8m0x2 %r0, %h1;", 0x7f80, 0, 0, 0x3f804000},
        {"{ .reg .b8 %e0; cvt.rn.satfinite.e2m1x2.f32 %e0, %r1, %r2; cvt.u32.u8 %r0, %e0; }", F1,
         0x40d00000, 0, 0x27},
        {"{ .reg .b8 %e1; cvt.u8.u32 %e1, %r1; cvt.rn.f16x2.e2m1x2 %r0, %e1; }", 0x2f, 0, 0,
         0x3c00c600},
    };
    ROWS(rows);
}

/* === 3. All small numbers ===================================================================== */

/* A small format's numbers by code, from its definition; the codes of those >= 0 ascend. */
typedef struct { int n, inf; double v[32769]; } table;   /* [n] is what would come next */
static table f16_table, bf16_table, e4m3_table, e5m2_table, e2m1_table;

static void fill(table *t, int codes, int mant, int bias) {
    t->n = codes;
    for (int c = 0; c <= codes; c++) {
        int e = c >> mant, m = c & ((1 << mant) - 1);
        t->v[c] = e ? ldexp(1 + ldexp(m, -mant), e - bias) : ldexp(m, 1 - bias - mant);
    }
}

static void fill_tables(void) {
    fill(&f16_table, 0x7c00, 10, 15);
    fill(&bf16_table, 0x7f80, 7, 127);
    fill(&e4m3_table, 0x7f, 3, 7);
    fill(&e5m2_table, 0x7c, 2, 15);
    fill(&e2m1_table, 8, 1, 1);
}

/* The code of x >= 0, not infinite: by search; t->n where it rounds beyond the largest. */
static int search(const table *t, __float128 x, sg_mod mode) {
    int lo = 0, hi = t->n;
    if (x >= t->v[t->n]) return mode == M_RZ || mode == M_RM ? t->n - 1 : t->n;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (t->v[mid] <= x) lo = mid;
        else hi = mid;
    }
    if (x == t->v[lo] || mode == M_RZ || mode == M_RM) return lo;
    if (mode == M_RP) return hi;
    __float128 below = x - t->v[lo], above = t->v[hi] - x;
    if (below != above) return below < above ? lo : hi;
    return mode == M_RNA || lo & 1 ? hi : lo;
}

static void test_small_values(void) {
    fill_tables();
    for (int c = 0; c < 65536; c++) {
        int m = c & 0x7fff;
        double sign = c & 0x8000 ? -1 : 1;
        float f = sg_f16_to_f32((uint16_t)c), b = sg_bf16_to_f32((uint16_t)c);
        if (m > 0x7c00) CHECK(isnan(f), "f16 %x", c);
        else if (m == 0x7c00) CHECK(isinf(f) && f * sign > 0, "f16 %x", c);
        else CHECK(f == sign * f16_table.v[m] && !signbit(f) == (c < 0x8000), "f16 %x: %g", c, f);
        if (m > 0x7f80) CHECK(isnan(b), "bf16 %x", c);
        else if (m == 0x7f80) CHECK(isinf(b) && b * sign > 0, "bf16 %x", c);
        else CHECK(b == sign * bf16_table.v[m], "bf16 %x: %g", c, b);
    }
    for (int c = 0; c < 256; c++) {
        int m = c & 127;
        double sign = c & 128 ? -1 : 1;
        float e4 = sg_e4m3_to_f32((uint8_t)c), e5 = sg_e5m2_to_f32((uint8_t)c);
        if (m == 127) CHECK(isnan(e4), "e4m3 %x", c);
        else CHECK(e4 == sign * e4m3_table.v[m] && !signbit(e4) == (c < 128), "e4m3 %x", c);
        if (m > 124) CHECK(isnan(e5), "e5m2 %x", c);
        else if (m == 124) CHECK(isinf(e5), "e5m2 %x", c);
        else CHECK(e5 == sign * e5m2_table.v[m], "e5m2 %x", c);
        if (c < 16) {
            CHECK(sg_e2m1_to_f32((uint8_t)c) == (c & 8 ? -1 : 1) * e2m1_table.v[c & 7], "e2m1");
        }
    }
}

static uint32_t narrow_any(int format, float x, sg_mod mode) {
    switch (format) {
    case 0: return sg_f32_to_f16(x, mode);
    case 1: return sg_f32_to_bf16(x, mode);
    case 2: return sg_f32_to_e4m3(x);
    case 3: return sg_f32_to_e5m2(x);
    default: return sg_f32_to_e2m1(x);
    }
}

static void check_narrow(int format, float x) {
    static const table *const tables[] = {&f16_table, &bf16_table, &e4m3_table, &e5m2_table,
                                          &e2m1_table};
    static const uint32_t sign[] = {0x8000, 0x8000, 0x80, 0x80, 8};
    static const sg_mod modes[] = {M_RN, M_RZ, M_RM, M_RP, M_RNA};
    const table *t = tables[format];
    for (int k = 0; k < (format < 2 ? 5 : 1); k++) {
        sg_mod mode = modes[k], mirror = mode;
        if (signbit(x)) mirror = mode == M_RM ? M_RP : mode == M_RP ? M_RM : mode;
        uint32_t want = (uint32_t)search(t, fabs((double)x), mirror);
        if (format > 1 && want >= (uint32_t)t->n) want = (uint32_t)t->n - 1;
        if (signbit(x)) want |= sign[format];
        uint32_t got = narrow_any(format, x, mode);
        CHECK(got == want, "format %d mode %d of %a: %x, not %x", format, (int)mode, (double)x,
              got, want);
    }
}

/* Every code, every middle between two, the floats beside them, and any float. */
static void test_small_rounding(void) {
    static const table *const tables[] = {&f16_table, &bf16_table, &e4m3_table, &e5m2_table,
                                          &e2m1_table};
    fill_tables();
    for (int f = 0; f < 5; f++) {
        for (int c = 0; c < tables[f]->n; c++) {
            float x = (float)tables[f]->v[c], m = (float)((tables[f]->v[c] +
                                                           tables[f]->v[c + 1]) / 2);
            float at[] = {x, nextafterf(x, INFINITY), m, nextafterf(m, 0), nextafterf(m, INFINITY)};
            for (int k = 0; k < 5; k++) {
                if (isinf(at[k])) continue;
                check_narrow(f, at[k]);
                check_narrow(f, -at[k]);
            }
        }
        for (int k = 0; k < 100000; k++) {
            float x = bitsf((uint32_t)rnd());
            if (isfinite(x)) check_narrow(f, x);
        }
        CHECK(narrow_any(f, NAN, M_RN) == (f < 2 ? 0x7fffu : f < 4 ? 0x7fu : 7u), "NaN of %d", f);
    }
    CHECK(sg_f32_to_f16(-INFINITY, M_RZ) == 0xfc00 && sg_f32_to_bf16(INFINITY, M_RM) == 0x7f80,
          "infinities stay");
}

typedef struct { const char *name; int bits; bool sign; } int_type;
static const int_type int_types[] = {{"u8", 8, 0}, {"s8", 8, 1}, {"u16", 16, 0}, {"s16", 16, 1},
                                     {"u32", 32, 0}, {"s32", 32, 1}, {"u64", 64, 0},
                                     {"s64", 64, 1}};

static const char *reg_of(int bits) {
    return bits <= 8 ? "%b" : bits == 16 ? "%h" : bits == 32 ? "%r" : "%d";
}

static double rounded(const char *mode, double x) {
    return !strcmp(mode, "rni") ? nearbyint(x) : !strcmp(mode, "rzi") ? trunc(x)
         : !strcmp(mode, "rmi") ? floor(x) : ceil(x);
}

/* Of a NaN: 0, or into 64 bits only the sign bit. */
static uint64_t int_wanted(const int_type *t, const char *mode, double x) {
    uint64_t mask = t->bits == 64 ? ~0ull : (1ull << t->bits) - 1, least = 1ull << (t->bits - 1);
    if (isnan(x)) return t->bits == 64 ? least : 0;
    x = rounded(mode, x);
    double top = ldexp(1, t->bits - t->sign), low = t->sign ? -ldexp(1, t->bits - 1) : 0;
    if (x >= top) return t->sign ? least - 1 : mask;
    if (x <= low) return t->sign ? least : 0;
    return (x < 0 ? (uint64_t)(int64_t)x : (uint64_t)x) & mask;
}

/* cvt.MODE.INT.f16 and .bf16 of all 65536 numbers. */
static void test_small_to_int(void) {
    static const char *const modes[] = {"rni", "rzi", "rmi", "rpi"};
    for (int k = 0; k < 8 * 4 * 2; k++) {
        const int_type *t = &int_types[k / 8];
        const char *mode = modes[k / 2 % 4];
        char text[100];
        snprintf(text, sizeof text, "cvt.%s.%s.%s %s0, %%h1;", mode, t->name,
                 k & 1 ? "bf16" : "f16", reg_of(t->bits));
        bench x;
        bool ok = bench_open(&x, text);
        CHECK(ok, "%s", text);
        if (!ok) continue;
        for (uint32_t at = 0; at < 65536; at += SG_LANES) {
            for (int l = 0; l < SG_LANES; l++) bench_set(&x, '1', l, at + (uint32_t)l);
            ok = bench_run(&x, ~0u);
            CHECK(ok, "%s is not known", text);
            for (int l = 0; l < SG_LANES; l++) {
                uint16_t code = (uint16_t)(at + (uint32_t)l);
                double v = (double)(k & 1 ? sg_bf16_to_f32(code) : sg_f16_to_f32(code));
                uint64_t want = int_wanted(t, mode, v), got = result_of(&x)[l];
                CHECK(got == want, "%s of %x: %llx, not %llx", text, code,
                      (unsigned long long)got, (unsigned long long)want);
            }
        }
        sg_module_free(x.m);
    }
}

/* cvt.rn.F.INT of all 8- and 16-bit integers, and between integers, with and without .sat. */
static void int_to_all(const int_type *from, const char *text, const int_type *to, bool sat,
                       const table *t, int exact_bits) {
    bench x;
    bool ok = bench_open(&x, text);
    CHECK(ok, "%s", text);
    if (!ok) return;
    for (int at = 0; at < 1 << from->bits; at++) {
        int l = at % SG_LANES, v = from->sign ? from->bits == 8 ? (int8_t)at : (int16_t)at : at;
        bench_set(&x, '1', l, (uint64_t)at);
        if (l < SG_LANES - 1) continue;
        ok = bench_run(&x, ~0u);
        CHECK(ok, "%s is not known", text);
        for (l = 0; l < SG_LANES; l++) {
            uint64_t got = result_of(&x)[l], want;
            int u = v - SG_LANES + 1 + l;
            double d = u;
            float f = (float)d;
            uint64_t low = to && to->bits < 64 ? (1ul << to->bits) - 1 : ~0ul;
            if (to) want = sat ? int_wanted(to, "rzi", d) : (uint64_t)(int64_t)u & low;
            else if (t) want = (uint64_t)search(t, fabs(d), M_RN) | (u < 0 ? 0x8000 : 0);
            else if (exact_bits == 32) want = fbits(f);
            else memcpy(&want, &d, 8);
            CHECK(got == want, "%s of %d: %llx, not %llx", text, u, (unsigned long long)got,
                  (unsigned long long)want);
        }
    }
    sg_module_free(x.m);
}

static void test_small_ints(void) {
    static const char *const floats[] = {"f16", "bf16", "f32", "f64"};
    char text[100];
    fill_tables();
    for (int k = 0; k < 4; k++) {
        const int_type *from = &int_types[k];
        for (int f = 0; f < 4; f++) {
            int bits = f < 2 ? 16 : f == 2 ? 32 : 64;
            snprintf(text, sizeof text, "cvt.rn.%s.%s %s0, %s1;", floats[f], from->name,
                     reg_of(bits), reg_of(from->bits));
            int_to_all(from, text, NULL, false, f == 0 ? &f16_table : f == 1 ? &bf16_table : NULL,
                       bits);
        }
        for (int to = 0; to < 16; to++) {
            const int_type *t = &int_types[to / 2];
            snprintf(text, sizeof text, "cvt%s.%s.%s %s0, %s1;", to & 1 ? ".sat" : "", t->name,
                     from->name, reg_of(t->bits), reg_of(from->bits));
            int_to_all(from, text, t, to & 1, NULL, 0);
        }
    }
}

/* Sums, products and both of halves, against numbers of 113 bits. */
static void half_op(const char *op, bool bf, const char *more) {
    const table *t = bf ? &bf16_table : &f16_table;
    char text[100];
    bench x;
    bool fma = !strcmp(op, "fma");
    snprintf(text, sizeof text, "%s.rn%s.%s %%h0, %%h1, %%h2%s;", op, more, bf ? "bf16" : "f16",
             fma ? ", %h3" : "");
    bool ok = bench_open(&x, text);
    CHECK(ok, "%s", text);
    for (int k = 0; k < 6000 && ok; k++) {
        uint16_t v[3][SG_LANES];
        for (int l = 0; l < SG_LANES; l++) {
            for (int n = 0; n < 3; n++) {
                uint64_t r = rnd(), range = bf && k % 4 ? 0x800 : (uint64_t)t->n;
                uint64_t first = bf && k % 4 ? 0x3c00 : 0;
                v[n][l] = (uint16_t)((first + (r >> 20) % range) | (r & 0x8000));
                bench_set(&x, (char)('1' + n), l, v[n][l]);
            }
        }
        ok = bench_run(&x, ~0u);
        CHECK(ok, "%s is not known", text);
        for (int l = 0; l < SG_LANES; l++) {
            __float128 a[3];
            for (int n = 0; n < 3; n++) {
                a[n] = bf ? sg_bf16_to_f32(v[n][l]) : sg_f16_to_f32(v[n][l]);
            }
            __float128 s = *op == 'a' ? a[0] + a[1] : *op == 's' ? a[0] - a[1] : a[0] * a[1];
            if (fma && (s + a[2]) - s != a[2]) continue;         /* more than 113 bits */
            if (fma) s = s + a[2];
            if (s == 0) continue;
            uint32_t want = (uint32_t)search(t, s < 0 ? -s : s, M_RN) | (s < 0 ? 0x8000u : 0);
            if (*more) want = s < 0 ? 0 : want;                  /* .relu: the other way */
            uint64_t got = result_of(&x)[l];
            CHECK(got == want, "%s of %x %x %x: %llx, not %x", text, v[0][l], v[1][l], v[2][l],
                  (unsigned long long)got, want);
        }
    }
    if (ok) sg_module_free(x.m);
}

static void test_half_operations(void) {
    fill_tables();
    for (int bf = 0; bf < 2; bf++) {
        half_op("add", bf, "");
        half_op("sub", bf, "");
        half_op("mul", bf, "");
        half_op("fma", bf, "");
        half_op("fma", bf, ".relu");
    }
}

/* === 4. Roundings against the host's modes ==================================================== */

static const struct { const char *name; int host; } host_modes[] = {
    {"rn", FE_TONEAREST}, {"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}};

static float any_float(void) {
    static const uint32_t edge[] = {0, NEGF, 1, NEGF | 1, 0x007fffff, 0x00800000, F1, F1 | NEGF,
                                    F1 - 1, F1 + 1, 0x7f7fffff, FINF, FINF | NEGF, FNAN};
    uint64_t r = rnd();
    if (r % 8 == 0) return bitsf(edge[r / 8 % (sizeof edge / sizeof *edge)]);
    if (r % 8 < 4) return bitsf((uint32_t)(r >> 32) % 0x0a000000u + 0x3a000000u);
    return bitsf((uint32_t)(r >> 32));
}

__attribute__((noinline, optimize("O1,rounding-math,trapping-math")))
static float host_f32(int op, int host, float x, float y, float z) {
    volatile float a = x, b = y, c = z, r;
    fesetround(host);
    switch (op) {
    case 0: r = a + b; break;
    case 1: r = a - b; break;
    case 2: r = a * b; break;
    case 3: r = a / b; break;
    case 4: r = sqrtf(a); break;
    case 5: r = 1 / a; break;
    default: r = fmaf(a, b, c); break;
    }
    fesetround(FE_TONEAREST);
    return r;
}

static void test_f32_modes(void) {
    static const char *const ops[] = {"add", "sub", "mul", "div", "sqrt", "rcp", "fma"};
    for (int k = 0; k < 7 * 4; k++) {
        int op = k / 4, sources = op == 4 || op == 5 ? 1 : op == 6 ? 3 : 2;
        char text[100];
        snprintf(text, sizeof text, "%s.%s.f32 %%r0, %%r1%s%s;", ops[op], host_modes[k % 4].name,
                 sources > 1 ? ", %r2" : "", sources > 2 ? ", %r3" : "");
        bench x;
        bool ok = bench_open(&x, text);
        CHECK(ok, "%s", text);
        for (int n = 0; n < 4000 && ok; n++) {
            float v[3][SG_LANES];
            for (int l = 0; l < SG_LANES; l++) {
                for (int s = 0; s < 3; s++) {
                    v[s][l] = any_float();
                    if (op == 6 && s == 2 && n & 1) v[2][l] = -v[0][l] * v[1][l];
                    bench_set(&x, (char)('1' + s), l, fbits(v[s][l]));
                }
            }
            ok = bench_run(&x, ~0u);
            CHECK(ok, "%s is not known", text);
            for (int l = 0; l < SG_LANES; l++) {
                float want = host_f32(op, host_modes[k % 4].host, v[0][l], v[1][l], v[2][l]);
                uint32_t got = (uint32_t)result_of(&x)[l], w = isnan(want) ? FNAN : fbits(want);
                CHECK(got == w, "%s of %a %a %a: %a, not %a", text, (double)v[0][l],
                      (double)v[1][l], (double)v[2][l], (double)bitsf(got), (double)want);
            }
        }
        if (ok) sg_module_free(x.m);
    }
}

__attribute__((noinline, optimize("O1,rounding-math,trapping-math")))
static float host_int(int host, uint64_t v, bool sign) {
    volatile uint64_t u = v;
    volatile float r;
    fesetround(host);
    if (sign) r = (float)(int64_t)u;
    else r = (float)u;
    fesetround(FE_TONEAREST);
    return r;
}

static void test_int_to_f32(void) {
    for (int k = 0; k < 8; k++) {
        char text[100];
        bench x;
        snprintf(text, sizeof text, "cvt.%s.f32.%s %%r0, %%d1;", host_modes[k / 2].name,
                 k & 1 ? "s64" : "u64");
        bool ok = bench_open(&x, text);
        CHECK(ok, "%s", text);
        for (int n = 0; n < 3000 && ok; n++) {
            uint64_t v[SG_LANES];
            for (int l = 0; l < SG_LANES; l++) {
                v[l] = rnd() >> (rnd() % 40);
                if (rnd() & 1) v[l] &= ~0ull << (rnd() % 40);
                bench_set(&x, '1', l, v[l]);
            }
            CHECK(bench_run(&x, ~0u), "%s", text);
            for (int l = 0; l < SG_LANES; l++) {
                float want = host_int(host_modes[k / 2].host, v[l], k & 1);
                CHECK(result_of(&x)[l] == fbits(want), "%s of %llx: %llx", text,
                      (unsigned long long)v[l], (unsigned long long)result_of(&x)[l]);
            }
        }
        if (ok) sg_module_free(x.m);
    }
}

/* What is not known says so instead of guessing. */
static void test_unknown(void) {
    static const char *const texts[] = {"add.sat.u32 %r0, %r1, %r2;", "mul.sat.s32 %r0, %r1, %r2;",
                                        "add.cc.f32 %r0, %r1, %r2;",
                                        "setp.gt.ftz.f16 %p0, %h1, %h2;"};
    for (int k = 0; k < 4; k++) {
        bench x;
        if (!bench_open(&x, texts[k])) continue;             /* the parser may stop first */
        CHECK(!bench_run(&x, ~0u), "%s", texts[k]);
        sg_module_free(x.m);
    }
}

int main(void) {
    RUN(test_integers);
    RUN(test_bits);
    RUN(test_floats);
    RUN(test_halves);
    RUN(test_compare_and_select);
    RUN(test_conversions);
    RUN(test_pairs);
    RUN(test_small_values);
    RUN(test_small_rounding);
    RUN(test_small_to_int);
    RUN(test_small_ints);
    RUN(test_half_operations);
    RUN(test_f32_modes);
    RUN(test_int_to_f32);
    RUN(test_unknown);
    return check_done();
}
