/* alu.c -- arithmetic, comparison, conversion: one instruction on the active lanes of a warp.
 *
 *   operands --fetch--> s[0..2], 32 lanes each --one tight loop--> out --commit, masked--> register
 *                           ^ ftz: subnormals to zero                 ^ ftz, sat
 *
 * The loop is chosen by a switch on operation and type, outside of it; every loop runs all 32
 * lanes, so that the compiler vectorizes it, and only commit() looks at the mask.  Results are
 * IEEE's: nearest by the host, the other modes by a result rounded to odd in double, which has
 * bits enough that rounding it once more is right.  Approximate functions are the double's,
 * rounded.  A NaN result is the GPU's: 0x7fffffff, 0x7fff.
 *
 * Contents   1 rounding and small floats   2 lanes: fetch and commit   3 integers   4 bits
 *            5 F32 and F64   6 F16 and BF16   7 compare and select   8 mov   9 cvt   10 sg_alu   */
#include "softgpu.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

#pragma GCC optimize("O3,no-math-errno,no-trapping-math,fp-contract=off")

__extension__ typedef __int128 i128;
__extension__ typedef unsigned __int128 u128;

/* === 1. Rounding and small floats ============================================================= */

static inline float as_f32(uint64_t u) {
    uint32_t v = (uint32_t)u;
    float f;
    memcpy(&f, &v, sizeof f);
    return f;
}

static inline uint32_t f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline double as_f64(uint64_t u) {
    double f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint64_t f64_bits(double f) {
    uint64_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline uint32_t out_f32(float f) { return f != f ? 0x7fffffffu : f32_bits(f); }
static inline uint64_t out_f64(double f) {
    return f != f ? 0xfff8000000000000ull : f64_bits(f);
}

/* The exact value s + err, |err| at most half of s's last place, rounded to odd. */
static double odd(double s, double err) {
    uint64_t u = f64_bits(s);
    if (!(err < 0 || err > 0) || !isfinite(s) || u & 1) return s;
    return as_f64((err > 0) == (s > 0) ? u + 1 : u - 1);
}

static double odd_sum(double a, double b) {
    double s = a + b, t = s - a;
    return odd(s, (a - (s - t)) + (b - t));
}

static float round_f32(double x, sg_mod mode) {
    float r = (float)x;
    if (mode == M_RZ && fabs((double)r) > fabs(x)) r = nextafterf(r, 0);
    if (mode == M_RM && (double)r > x) r = nextafterf(r, -INFINITY);
    if (mode == M_RP && (double)r < x) r = nextafterf(r, INFINITY);
    return r;
}

typedef struct { unsigned mant; int least; uint32_t max, inf, nan, sign; } format;
static const format f16_format = {10, -14, 0x7bff, 0x7c00, 0x7fff, 0x8000};
static const format bf16_format = {7, -126, 0x7f7f, 0x7f80, 0x7fff, 0x8000};
static const format tf32_format = {10, -126, 0x3fbff, 0x3fc00, 0x3ffff, 0x40000};
static const format e4m3_format = {3, -6, 0x7e, 0x7f, 0x7f, 0x80};
static const format e5m2_format = {2, -14, 0x7b, 0x7c, 0x7f, 0x80};
static const format e2m1_format = {1, 0, 7, 8, 7, 8};

/* x in a small format, whose codes ascend with the magnitude. */
static uint32_t narrow(const format *f, double x, sg_mod mode, bool finite) {
    uint64_t u = f64_bits(x) & ~(1ull << 63), m = u & ((1ull << 52) - 1);
    bool neg = signbit(x) != 0, up;
    uint32_t sign = neg ? f->sign : 0, code;
    if (x != x) return f->nan;
    if (u >> 52 == 0x7ff) return sign | (finite ? f->max : f->inf);
    int e = (int)(u >> 52) - 1023;
    if (e == -1023) e = -1022;
    else m |= 1ull << 52;
    unsigned shift = 52 - f->mant + (unsigned)(e < f->least ? f->least - e : 0);
    if (e < f->least) e = f->least;
    if (shift > 60) {                       /* far below the least one: only not zero counts */
        m = m != 0;
        shift = 60;
    }
    uint64_t n = m >> shift, rest = m & ((1ull << shift) - 1), half = 1ull << (shift - 1);
    switch ((int)mode) {
    case M_RZ: up = false; break;
    case M_RM: up = neg && rest; break;
    case M_RP: up = !neg && rest; break;
    case M_RNA: up = rest >= half; break;
    default: up = rest > half || (rest == half && n & 1); break;
    }
    uint64_t full = ((uint64_t)(e - f->least) << f->mant) + n + up;
    bool away = mode == M_RP ? !neg : mode == M_RM ? neg : mode != M_RZ;
    if (full > f->max) code = finite || !away ? f->max : f->inf;
    else code = (uint32_t)full;
    return sign | code;
}

static inline float f16_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, mag = (uint32_t)(bits & 0x7fff) << 13;
    uint32_t u = f32_bits(as_f32(mag) * 0x1p112f);
    if ((bits & 0x7c00) == 0x7c00) u = mag | 0x7f800000;
    return as_f32(sign | u);
}

static inline float bf16_f32(uint16_t bits) { return as_f32((uint32_t)bits << 16); }

/* a shared library's own names may be replaced, and are not inlined */
float sg_f16_to_f32(uint16_t bits) { return f16_f32(bits); }
float sg_bf16_to_f32(uint16_t bits) { return bf16_f32(bits); }

float sg_e4m3_to_f32(uint8_t bits) {
    uint32_t mag = bits & 127;
    float f = mag == 127 ? NAN : as_f32(mag << 20) * 0x1p120f;
    return bits & 128 ? -f : f;
}

float sg_e5m2_to_f32(uint8_t bits) { return f16_f32((uint16_t)(bits << 8)); }

float sg_e2m1_to_f32(uint8_t nibble) {
    static const float v[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return nibble & 8 ? -v[nibble & 7] : v[nibble & 7];
}

/* The nearest code to an F32, without branches: a normal number's bits are rounded where they are
 * cut, a subnormal one is added to a number whose last place is the format's least step. */
static inline uint32_t nearest(uint32_t u, uint32_t mant, uint32_t bias, uint32_t max,
                               uint32_t nan) {
    uint32_t mag = u & 0x7fffffff, cut = 23 - mant;
    uint32_t one = (128 - bias) << 23, step = (127 + 1 - bias - mant + 23) << 23;
    uint32_t small = f32_bits(as_f32(mag) + as_f32(step)) - step;
    uint32_t normal = (mag + (1u << (cut - 1)) - 1 + (mag >> cut & 1) - (one - (1u << 23))) >> cut;
    uint32_t code = mag < one ? small : normal;
    code = code > max ? max : code;
    return mag > 0x7f800000 ? nan : code;
}

static inline uint16_t f16_nearest(uint32_t u) {
    uint32_t code = nearest(u, 10, 15, 0x7c00, 0x7fff);
    return (uint16_t)(code == 0x7fff ? code : code | (u >> 16 & 0x8000));
}

static inline uint8_t e4m3_nearest(uint32_t u) {
    uint32_t code = nearest(u, 3, 7, 0x7e, 0x7f);
    return (uint8_t)(code == 0x7f ? code : code | (u >> 24 & 0x80));
}

static inline uint8_t e5m2_nearest(uint32_t u) {
    uint32_t code = nearest(u, 2, 15, 0x7b, 0x7f);
    return (uint8_t)(code == 0x7f ? code : code | (u >> 24 & 0x80));
}

static inline uint16_t bf16_nearest(uint32_t u) {
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

uint16_t sg_f32_to_f16(float x, sg_mod mode) {
    if (mode == M_RN) return f16_nearest(f32_bits(x));
    return (uint16_t)narrow(&f16_format, (double)x, mode, false);
}

uint16_t sg_f32_to_bf16(float x, sg_mod mode) {
    if (mode == M_RN) return bf16_nearest(f32_bits(x));
    return (uint16_t)narrow(&bf16_format, (double)x, mode, false);
}

uint8_t sg_f32_to_e4m3(float x) { return e4m3_nearest(f32_bits(x)); }
uint8_t sg_f32_to_e5m2(float x) { return e5m2_nearest(f32_bits(x)); }
uint8_t sg_f32_to_e2m1(float x) { return (uint8_t)narrow(&e2m1_format, (double)x, M_RN, true); }

static sg_mod mode_of(const sg_instr *i) {
    if (sg_has(i, M_RZ)) return M_RZ;
    if (sg_has(i, M_RM)) return M_RM;
    if (sg_has(i, M_RP)) return M_RP;
    return sg_has(i, M_RNA) ? M_RNA : M_RN;
}

/* === 2. Lanes: fetch and commit =============================================================== */

typedef struct {
    sg_block *b;
    sg_warp *w;
    const sg_instr *i;
    uint32_t mask;
    const uint64_t *s[3];                   /* sources, 32 lanes each                           */
    uint64_t out[SG_LANES], tmp[3][SG_LANES];
} alu;

typedef void lane_fn(uint64_t *restrict d, const uint64_t *restrict x, const uint64_t *restrict y,
                     const uint64_t *restrict z);

#define B1 0xffull
#define B2 0xffffull
#define B4 0xffffffffull
const uint64_t sg_low_bits[T_N] = {
    [T_PRED] = 1, [T_B8] = B1, [T_U8] = B1, [T_S8] = B1, [T_E4M3] = B1, [T_E5M2] = B1,
    [T_E2M1X2] = B1, [T_B16] = B2, [T_U16] = B2, [T_S16] = B2, [T_F16] = B2, [T_BF16] = B2,
    [T_E4M3X2] = B2, [T_E5M2X2] = B2, [T_UE8M0X2] = B2, [T_B32] = B4, [T_U32] = B4, [T_S32] = B4,
    [T_F32] = B4, [T_TF32] = B4, [T_F16X2] = B4, [T_BF16X2] = B4, [T_B64] = ~0ull,
    [T_U64] = ~0ull, [T_S64] = ~0ull, [T_F64] = ~0ull, [T_F32X2] = ~0ull, [T_B128] = ~0ull,
};
static inline uint64_t low_bits(sg_type t) { return sg_low_bits[t]; }

/* Operand number `o` as source k.  Registers may hold more than t: the loops cut. */
static void fetch(alu *c, int k, int o, sg_type t) {
    const sg_operand *p = &c->i->o[o];
    uint64_t *v = c->tmp[k];
    c->s[k] = v;
    if (p->kind == O_REG && !p->negate) {
        c->s[k] = c->w->reg + (size_t)p->reg * SG_LANES;
    } else if (p->kind == O_IMM && !p->negate) {
        uint64_t u = p->imm & low_bits(t);
        for (int l = 0; l < SG_LANES; l++) v[l] = u;
    } else {
        for (int l = 0; l < SG_LANES; l++) v[l] = sg_get(c->b, c->w, p, t, l);
    }
}

static void fetch_all(alu *c, int first, int n, sg_type t) {
    for (int k = 0; k < n; k++) fetch(c, k, first + k, t);
    for (int k = n; k < 3; k++) c->s[k] = c->s[0];
}

static void commit_to(alu *c, const sg_operand *o, const uint64_t *v) {
    if (o->kind == O_SINK) return;
    if (o->kind != O_REG) sg_stop(c->b, c->w, c->i, "a result goes to no register");
    uint64_t *restrict d = c->w->reg + (size_t)o->reg * SG_LANES;
    if (c->mask == 0xffffffffu) {
        memcpy(d, v, SG_LANES * sizeof *d);
        return;
    }
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t on = -(uint64_t)(c->mask >> l & 1);
        d[l] = (v[l] & on) | (d[l] & ~on);
    }
}

static void commit(alu *c) { commit_to(c, &c->i->o[0], c->out); }

/* A signed result narrower than its register is extended to it. */
static void widen_signed(alu *c, sg_type t) {
    const sg_operand *o = &c->i->o[0];
    if (o->kind != O_REG || !sg_type_signed(t)) return;
    sg_type to = c->w->func->reg[o->reg];
    unsigned bits = 8 * sg_type_bytes(t);
    if (sg_type_bytes(to) <= sg_type_bytes(t)) return;
    for (int l = 0; l < SG_LANES; l++) {
        int64_t v = (int64_t)(c->out[l] << (64 - bits)) >> (64 - bits);
        c->out[l] = (uint64_t)v & low_bits(to);
    }
}

static void flush_f32(uint64_t *v) {
    for (int l = 0; l < SG_LANES; l++) {
        uint32_t u = (uint32_t)v[l];
        v[l] = u & 0x7f800000 ? u : u & 0x80000000;
    }
}

static void flush_sources(alu *c, int n) {
    for (int k = 0; k < n; k++) {
        if (c->s[k] != c->tmp[k]) memcpy(c->tmp[k], c->s[k], sizeof c->tmp[k]);
        c->s[k] = c->tmp[k];
        flush_f32(c->tmp[k]);
    }
}

static void saturate_f32(uint64_t *v) {
    for (int l = 0; l < SG_LANES; l++) {
        float f = as_f32(v[l]);
        v[l] = f32_bits(f > 0 ? f < 1 ? f : 1.0f : 0.0f);           /* a NaN becomes zero */
    }
}

#define BODY(T, U, expr)                                                                         \
    for (int l = 0; l < SG_LANES; l++) {                                                         \
        T a = (T)x[l], b = (T)y[l], c = (T)z[l];                                                 \
        (void)a, (void)b, (void)c;                                                               \
        d[l] = (uint64_t)(U)(expr);                                                              \
    }
#define LANES(name, T, U, expr)                                                                  \
    static void name(uint64_t *restrict d, const uint64_t *restrict x,                           \
                     const uint64_t *restrict y, const uint64_t *restrict z) {                   \
        BODY(T, U, expr)                                                                         \
    }

/* === 3. Integers ============================================================================== */

/* The six integer types in the order of int_kind(). */
#define INTS(name, e16, e32, e64)                                                                \
    LANES(name##_u16, uint16_t, uint16_t, e16) LANES(name##_s16, int16_t, uint16_t, e16)         \
    LANES(name##_u32, uint32_t, uint32_t, e32) LANES(name##_s32, int32_t, uint32_t, e32)         \
    LANES(name##_u64, uint64_t, uint64_t, e64) LANES(name##_s64, int64_t, uint64_t, e64)         \
    static lane_fn *const name[6] = {name##_u16, name##_s16, name##_u32,                         \
                                     name##_s32, name##_u64, name##_s64};
#define INTS1(name, e) INTS(name, e, e, e)
#define W(v) ((uint64_t)(v))                /* wraps, and never overflows                       */
#define NEG(v) ((v) < 1 && (v) != 0)        /* v < 0, also said of the unsigned                 */

INTS1(int_add, W(a) + W(b))
INTS1(int_sub, W(a) - W(b))
INTS1(int_mul, W(a) * W(b))
INTS1(int_mad, W(a) * W(b) + W(c))
INTS(int_mul_hi, (int64_t)a * b >> 16, (i128)a * b >> 32, NEG(a) || NEG(b)
     ? (uint64_t)((i128)a * (i128)b >> 64) : (uint64_t)((u128)W(a) * W(b) >> 64))
INTS1(int_min, a < b ? a : b)
INTS1(int_max, a > b ? a : b)
INTS1(int_neg, 0ul - W(a))
INTS1(int_abs, NEG(a) ? 0ul - W(a) : W(a))
INTS1(int_sad, W(c) + (a < b ? W(b) - W(a) : W(a) - W(b)))
#define M1(v) (NEG(v) && (v) + 1 == 0)
/* Division by zero was reported; the least number by -1 is itself. */
INTS1(int_div, b == 0 ? ~0ul : M1(b) && NEG(a) ? 0ul - W(a) : W(a / b))
INTS1(int_rem, b == 0 ? W(a) : M1(b) && NEG(a) ? 0 : W(a % b))

LANES(mul_hi_u32, uint32_t, uint32_t, W(a) * W(b) >> 32)
LANES(mul_hi_s32, int32_t, uint32_t, (int64_t)a * b >> 32)
LANES(wide_u16, uint16_t, uint32_t, W(a) * W(b))
LANES(wide_s16, int16_t, uint32_t, W(a) * W(b))
LANES(wide_u32, uint32_t, uint64_t, W(a) * W(b))
LANES(wide_s32, int32_t, uint64_t, W(a) * W(b))
static lane_fn *const int_wide[6] = {wide_u16, wide_s16, wide_u32, wide_s32, NULL, NULL};

static int64_t clamp_s32(int64_t v) {
    return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v;
}
LANES(sat_add, int32_t, uint32_t, clamp_s32((int64_t)a + b))
LANES(sat_sub, int32_t, uint32_t, clamp_s32((int64_t)a - b))
#define S24(v) ((int32_t)((uint32_t)(v) << 8) >> 8)
#define U24(v) ((uint32_t)(v) & 0xffffff)
LANES(mul24_u, uint32_t, uint32_t, W(U24(a)) * U24(b))
LANES(mul24_s, uint32_t, uint32_t, W(S24(a)) * W(S24(b)))
LANES(mul24_hi_u, uint32_t, uint32_t, W(U24(a)) * U24(b) >> 16)
LANES(mul24_hi_s, uint32_t, uint32_t, (int64_t)S24(a) * S24(b) >> 16)

static int int_kind(sg_type t) {
    switch ((int)t) {
    case T_B16: case T_U16: return 0;
    case T_S16: return 1;
    case T_B32: case T_U32: return 2;
    case T_S32: return 3;
    case T_B64: case T_U64: return 4;
    case T_S64: return 5;
    default: return -1;
    }
}

static lane_fn *pick_int(const sg_instr *i, int k) {
    bool hi = sg_has(i, M_HI), sat = sg_has(i, M_SAT), sign = k & 1;
    if (sat) return k != 3 ? NULL : i->op == OP_ADD ? sat_add : i->op == OP_SUB ? sat_sub : NULL;
    switch ((int)i->op) {
    case OP_ADD: return int_add[k];
    case OP_SUB: return int_sub[k];
    case OP_MUL: case OP_MAD:
        if (sg_has(i, M_WIDE)) return int_wide[k];
        return !hi ? int_mul[k] : k == 2 ? mul_hi_u32 : k == 3 ? mul_hi_s32 : int_mul_hi[k];
    case OP_MUL24: case OP_MAD24:
        if (k != 2 && k != 3) return NULL;
        return hi ? sign ? mul24_hi_s : mul24_hi_u : sign ? mul24_s : mul24_u;
    case OP_MIN: return int_min[k];
    case OP_MAX: return int_max[k];
    case OP_NEG: return int_neg[k];
    case OP_ABS: return int_abs[k];
    case OP_SAD: return int_sad[k];
    case OP_DIV: return int_div[k];
    case OP_REM: return int_rem[k];
    default: return NULL;
    }
}

static void check_divisor(alu *c, sg_type t) {
    uint64_t bits = low_bits(t);
    for (uint32_t m = c->mask; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        if (!(c->s[1][l] & bits)) {
            sg_violation(c->b, c->w, c->i, l, "integer division by zero: its result is undefined");
        }
    }
}

static bool do_int(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    int k = int_kind(t);
    lane_fn *fn = k < 0 ? NULL : pick_int(i, k);
    bool mad = i->op == OP_MAD || i->op == OP_MAD24, wide = sg_has(i, M_WIDE);
    if (!fn) return false;
    int sources = i->op == OP_NEG || i->op == OP_ABS ? 1 : mad || i->op == OP_SAD ? 3 : 2;
    if (i->n != sources + 1) return false;
    fetch_all(c, 1, sources, t);
    if (i->op == OP_DIV || i->op == OP_REM) check_divisor(c, t);
    if (mad && fn == int_mul[k]) fn = int_mad[k], mad = false;
    fn(c->out, c->s[0], c->s[1], c->s[2]);
    if (mad) {
        if (wide) fetch(c, 2, 3, k & 1 ? k == 1 ? T_S32 : T_S64 : k == 0 ? T_U32 : T_U64);
        uint64_t bits = low_bits(t);
        if (wide) bits = k < 2 ? 0xffffffff : ~0ull;
        for (int l = 0; l < SG_LANES; l++) c->out[l] = (c->out[l] + c->s[2][l]) & bits;
    }
    commit(c);
    return true;
}

/* add.cc, addc, sub.cc, subc, mad.lo.cc, madc.hi and the like: a carry bit a lane. */
static bool do_carry(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    bool in = i->op == OP_ADDC || i->op == OP_SUBC || i->op == OP_MADC;
    bool sub = i->op == OP_SUB || i->op == OP_SUBC, mad = i->op == OP_MAD || i->op == OP_MADC;
    unsigned size = 8 * sg_type_bytes(t);
    if (int_kind(t) < 2 || i->n != 3 + mad || sg_has(i, M_WIDE)) return false;
    fetch_all(c, 1, 2 + mad, t);
    uint32_t carries = 0;
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t a = c->s[0][l] & low_bits(t), b = c->s[1][l] & low_bits(t);
        if (mad) {
            i128 p = (i128)((u128)a * b);
            if (sg_type_signed(t)) {
                p = size == 32 ? (i128)(int32_t)a * (int32_t)b : (i128)(int64_t)a * (int64_t)b;
            }
            a = (uint64_t)(sg_has(i, M_HI) ? p >> size : p) & low_bits(t);
            b = c->s[2][l] & low_bits(t);
        }
        u128 r = in ? c->w->carry >> l & 1 : 0;
        r = sub ? (u128)a - b - r : (u128)a + b + r;
        c->out[l] = (uint64_t)r & low_bits(t);
        carries |= (uint32_t)(r >> size & 1) << l;
    }
    if (sg_has(i, M_CC)) c->w->carry = (c->w->carry & ~c->mask) | (carries & c->mask);
    commit(c);
    return true;
}

static bool do_dp4a(alu *c) {
    const sg_instr *i = c->i;
    bool sa = i->type[0] == T_S32, sb = i->n_types > 1 ? i->type[1] == T_S32 : sa;
    if (i->n != 4) return false;
    fetch_all(c, 1, 3, T_U32);
    for (int l = 0; l < SG_LANES; l++) {
        uint32_t a = (uint32_t)c->s[0][l], b = (uint32_t)c->s[1][l];
        int64_t sum = 0;
        for (int k = 0; k < 32; k += 8) {
            int x = sa ? (int8_t)(a >> k) : (uint8_t)(a >> k);
            int y = sb ? (int8_t)(b >> k) : (uint8_t)(b >> k);
            sum += x * y;
        }
        c->out[l] = (uint32_t)((uint64_t)sum + c->s[2][l]);
    }
    commit(c);
    return true;
}

/* === 4. Bits ================================================================================== */

LANES(bit_and, uint64_t, uint64_t, a & b)
LANES(bit_or, uint64_t, uint64_t, a | b)
LANES(bit_xor, uint64_t, uint64_t, a ^ b)
LANES(bit_not, uint64_t, uint64_t, ~a)
LANES(shl_16, uint64_t, uint16_t, (uint32_t)b > 15 ? 0 : a << (b & 15))
LANES(shl_32, uint64_t, uint32_t, (uint32_t)b > 31 ? 0 : a << (b & 31))
LANES(shl_64, uint64_t, uint64_t, (uint32_t)b > 63 ? 0 : a << (b & 63))
LANES(shr_u16, uint64_t, uint16_t, (uint32_t)b > 15 ? 0 : (a & 0xffff) >> (b & 15))
LANES(shr_u32, uint32_t, uint32_t, b > 31 ? 0 : a >> (b & 31))
LANES(shr_u64, uint64_t, uint64_t, (uint32_t)b > 63 ? 0 : a >> (b & 63))
LANES(shr_s16, uint32_t, uint16_t, (int16_t)a >> (b > 15 ? 15 : b))
LANES(shr_s32, uint32_t, uint32_t, (int32_t)a >> (b > 31 ? 31 : b))
LANES(shr_s64, uint64_t, uint64_t, (int64_t)a >> ((uint32_t)b > 63 ? 63 : b & 63))
LANES(cnot_fn, uint64_t, uint64_t, a == 0)
LANES(clz_32, uint32_t, uint32_t, a ? __builtin_clz(a) : 32)
LANES(clz_64, uint64_t, uint64_t, a ? __builtin_clzll(a) : 64)
LANES(popc_fn, uint64_t, uint64_t, __builtin_popcountll(a))

static uint64_t reverse(uint64_t v) {
    v = (v >> 1 & 0x5555555555555555ull) | (v & 0x5555555555555555ull) << 1;
    v = (v >> 2 & 0x3333333333333333ull) | (v & 0x3333333333333333ull) << 2;
    v = (v >> 4 & 0x0f0f0f0f0f0f0f0full) | (v & 0x0f0f0f0f0f0f0f0full) << 4;
    return __builtin_bswap64(v);
}
LANES(brev_32, uint64_t, uint64_t, reverse(a) >> 32)
LANES(brev_64, uint64_t, uint64_t, reverse(a))

static lane_fn *pick_bits(const sg_instr *i, sg_type t) {
    unsigned n = sg_type_bytes(t);
    bool sign = sg_type_signed(t);
    switch ((int)i->op) {
    case OP_AND: return bit_and;
    case OP_OR: return bit_or;
    case OP_XOR: return bit_xor;
    case OP_NOT: return bit_not;
    case OP_CNOT: return cnot_fn;
    case OP_SHL: return n == 8 ? shl_64 : n == 4 ? shl_32 : n == 2 ? shl_16 : NULL;
    case OP_SHR:
        if (sign) return n == 8 ? shr_s64 : n == 4 ? shr_s32 : n == 2 ? shr_s16 : NULL;
        return n == 8 ? shr_u64 : n == 4 ? shr_u32 : n == 2 ? shr_u16 : NULL;
    case OP_CLZ: return n == 8 ? clz_64 : clz_32;
    case OP_POPC: return popc_fn;
    case OP_BREV: return n == 8 ? brev_64 : brev_32;
    default: return NULL;
    }
}

static bool do_bits(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    lane_fn *fn = pick_bits(i, t);
    bool two = i->op == OP_AND || i->op == OP_OR || i->op == OP_XOR;
    bool shift = i->op == OP_SHL || i->op == OP_SHR;
    if (!fn || i->n != 2 + (two || shift)) return false;
    fetch(c, 0, 1, t);
    c->s[1] = c->s[2] = c->s[0];
    if (two || shift) fetch(c, 1, 2, shift ? T_U32 : t);
    fn(c->out, c->s[0], c->s[1], c->s[2]);
    if (i->op == OP_NOT) {
        uint64_t bits = low_bits(t);
        for (int l = 0; l < SG_LANES; l++) c->out[l] &= bits;
    }
    commit(c);
    return true;
}

/* The truth table is the same in all lanes: one conjunction of each of its set bits. */
static bool do_lop3(alu *c) {
    if (c->i->n != 5 || c->i->o[4].kind != O_IMM) return false;
    uint64_t lut = c->i->o[4].imm;
    fetch_all(c, 1, 3, T_B32);
    const uint64_t *restrict x = c->s[0], *restrict y = c->s[1], *restrict z = c->s[2];
    uint64_t *restrict d = c->out, on[8];
    for (int k = 0; k < 8; k++) on[k] = -(lut >> k & 1);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t a = x[l], b = y[l], e = z[l];
        uint64_t lo = (~b & ((~e & on[0]) | (e & on[1]))) | (b & ((~e & on[2]) | (e & on[3])));
        uint64_t hi = (~b & ((~e & on[4]) | (e & on[5]))) | (b & ((~e & on[6]) | (e & on[7])));
        d[l] = (uint32_t)((~a & lo) | (a & hi));
    }
    commit(c);
    return true;
}

static bool do_shf(alu *c) {
    const sg_instr *i = c->i;
    bool left = sg_has(i, M_L), wrap = sg_has(i, M_WRAP);
    if (i->n != 4 || (!left && !sg_has(i, M_R))) return false;
    fetch_all(c, 1, 3, T_B32);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t v = (c->s[1][l] << 32) | (uint32_t)c->s[0][l];
        uint32_t n = (uint32_t)c->s[2][l];
        n = wrap ? n & 31 : n > 32 ? 32 : n;
        c->out[l] = (uint32_t)(left ? v << n >> 32 : v >> n);
    }
    commit(c);
    return true;
}

static uint32_t prmt_selector(const sg_instr *i, uint32_t s) {
    static const uint16_t f4e[4] = {0x3210, 0x4321, 0x5432, 0x6543};
    static const uint16_t b4e[4] = {0x5670, 0x6701, 0x7012, 0x0123};
    static const uint16_t ecl[4] = {0x3210, 0x3211, 0x3222, 0x3333};
    static const uint16_t ecr[4] = {0x0000, 0x1110, 0x2210, 0x3210};
    uint32_t k = s & 3;
    if (sg_has(i, M_F4E)) return f4e[k];
    if (sg_has(i, M_B4E)) return b4e[k];
    if (sg_has(i, M_RC8)) return k * 0x1111;
    if (sg_has(i, M_ECL)) return ecl[k];
    if (sg_has(i, M_ECR)) return ecr[k];
    if (sg_has(i, M_RC16)) return k & 1 ? 0x3232 : 0x1010;
    return s;
}

static bool do_prmt(alu *c) {
    if (c->i->n != 4) return false;
    fetch_all(c, 1, 3, T_B32);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t v = (c->s[1][l] << 32) | (uint32_t)c->s[0][l];
        uint32_t s = prmt_selector(c->i, (uint32_t)c->s[2][l]), r = 0;
        for (int k = 0; k < 4; k++) {
            uint32_t one = s >> (4 * k), byte = (uint32_t)(v >> (8 * (one & 7))) & 255;
            if (one & 8) byte = byte & 128 ? 255 : 0;
            r |= byte << (8 * k);
        }
        c->out[l] = r;
    }
    commit(c);
    return true;
}

static uint64_t bit_field(uint64_t a, uint32_t pos, uint32_t len, unsigned size, bool sign) {
    pos &= 255, len &= 255;
    uint64_t v = pos >= size ? 0 : a >> pos, fill = 0;
    if (sign && len) {
        uint32_t top = pos + len - 1;
        fill = a >> (top < size - 1 ? top : size - 1) & 1;
    }
    if (len < 64) v &= (1ull << len) - 1;
    uint32_t real = pos >= size ? 0 : size - pos;
    if (real > len) real = len;
    if (fill && real < 64) v |= ~0ull << real;
    return v;
}

static bool do_bfe(alu *c) {
    sg_type t = c->i->type[0];
    unsigned size = 8 * sg_type_bytes(t);
    if (c->i->n != 4 || int_kind(t) < 2) return false;
    fetch(c, 0, 1, t);
    fetch(c, 1, 2, T_U32);
    fetch(c, 2, 3, T_U32);
    for (int l = 0; l < SG_LANES; l++) {
        c->out[l] = low_bits(t) & bit_field(c->s[0][l] & low_bits(t), (uint32_t)c->s[1][l],
                                            (uint32_t)c->s[2][l], size, sg_type_signed(t));
    }
    commit(c);
    return true;
}

/* bfi: four sources, the last of which is fetched by lane. */
static bool do_bfi(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    unsigned size = 8 * sg_type_bytes(t);
    if (i->n != 5) return false;
    fetch_all(c, 1, 3, t);
    for (int l = 0; l < SG_LANES; l++) {
        uint32_t pos = (uint32_t)c->s[2][l] & 255;
        uint32_t len = (uint32_t)sg_get(c->b, c->w, &i->o[4], T_U32, l) & 255;
        uint64_t m = len > 63 ? ~0ull : (1ull << len) - 1;
        m = pos >= size ? 0 : (m << pos) & low_bits(t);
        uint64_t a = pos >= size ? 0 : c->s[0][l] << pos;
        c->out[l] = (a & m) | (c->s[1][l] & low_bits(t) & ~m);
    }
    commit(c);
    return true;
}

static bool do_bfind(alu *c) {
    sg_type t = c->i->type[0];
    int size = 8 * (int)sg_type_bytes(t);
    if (c->i->n != 2) return false;
    fetch_all(c, 1, 1, t);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t v = c->s[0][l] & low_bits(t);
        if (sg_type_signed(t) && v >> (size - 1) & 1) v = ~v & low_bits(t);
        int at = v ? 63 - __builtin_clzll(v) : -1;
        if (at >= 0 && sg_has(c->i, M_SHIFTAMT)) at = size - 1 - at;
        c->out[l] = (uint32_t)at;
    }
    commit(c);
    return true;
}

static bool do_szext(alu *c) {
    const sg_instr *i = c->i;
    bool sign = i->type[0] == T_S32;
    if (i->n != 3) return false;
    fetch_all(c, 1, 2, T_U32);
    for (int l = 0; l < SG_LANES; l++) {
        uint32_t a = (uint32_t)c->s[0][l], n = (uint32_t)c->s[1][l];
        if (sg_has(i, M_WRAP)) n &= 31;
        if (n < 32) {
            uint32_t m = (1u << n) - 1;
            a = sign && n && a >> (n - 1) & 1 ? a | ~m : a & m;
        }
        c->out[l] = a;
    }
    commit(c);
    return true;
}

/* === 5. F32 and F64 =========================================================================== */

#define FLOATS(name, e)                                                                          \
    static void name(uint64_t *restrict d, const uint64_t *restrict x,                           \
                     const uint64_t *restrict y, const uint64_t *restrict z) {                   \
        for (int l = 0; l < SG_LANES; l++) {                                                     \
            float a = as_f32(x[l]), b = as_f32(y[l]), c = as_f32(z[l]);                          \
            (void)a, (void)b, (void)c;                                                           \
            d[l] = out_f32(e);                                                                   \
        }                                                                                        \
    }
#define DOUBLES(name, e)                                                                         \
    static void name(uint64_t *restrict d, const uint64_t *restrict x,                           \
                     const uint64_t *restrict y, const uint64_t *restrict z) {                   \
        for (int l = 0; l < SG_LANES; l++) {                                                     \
            double a = as_f64(x[l]), b = as_f64(y[l]), c = as_f64(z[l]);                         \
            (void)a, (void)b, (void)c;                                                           \
            d[l] = out_f64(e);                                                                   \
        }                                                                                        \
    }

/* A NaN loses against a number, -0 is less than +0. */
static inline float min_f32(float a, float b) {
    float both = as_f32(f32_bits(a) | f32_bits(b));
    return a != a ? b : b != b ? a : a < b ? a : b < a ? b : both;
}
static inline float max_f32(float a, float b) {
    float both = as_f32(f32_bits(a) & f32_bits(b));
    return a != a ? b : b != b ? a : a > b ? a : b > a ? b : both;
}
static inline double min_f64(double a, double b) {
    double both = as_f64(f64_bits(a) | f64_bits(b));
    return a != a ? b : b != b ? a : a < b ? a : b < a ? b : both;
}
static inline double max_f64(double a, double b) {
    double both = as_f64(f64_bits(a) & f64_bits(b));
    return a != a ? b : b != b ? a : a > b ? a : b > a ? b : both;
}

FLOATS(f_add, a + b)
FLOATS(f_sub, a - b)
FLOATS(f_mul, a * b)
FLOATS(f_fma, __builtin_fmaf(a, b, c))
FLOATS(f_div, a / b)
FLOATS(f_rcp, 1.0f / a)
FLOATS(f_sqrt, __builtin_sqrtf(a))
FLOATS(f_min, min_f32(a, b))
FLOATS(f_max, max_f32(a, b))
FLOATS(f_min_nan, a != a || b != b ? NAN : min_f32(a, b))
FLOATS(f_max_nan, a != a || b != b ? NAN : max_f32(a, b))
DOUBLES(d_add, a + b)
DOUBLES(d_sub, a - b)
DOUBLES(d_mul, a * b)
DOUBLES(d_fma, __builtin_fma(a, b, c))
DOUBLES(d_div, a / b)
DOUBLES(d_rcp, 1.0 / a)
DOUBLES(d_sqrt, __builtin_sqrt(a))
DOUBLES(d_min, min_f64(a, b))
DOUBLES(d_max, max_f64(a, b))
/* approximate: the double's, rounded */
FLOATS(f_rsqrt, (float)(1 / sqrt((double)a)))
FLOATS(f_sin, (float)sin((double)a))
FLOATS(f_cos, (float)cos((double)a))
FLOATS(f_lg2, (float)log2((double)a))
FLOATS(f_ex2, (float)exp2((double)a))
FLOATS(f_tanh, (float)tanh((double)a))
DOUBLES(d_rsqrt, 1 / sqrt(a))
/* the bits of a sign: also of NaNs */
LANES(f_neg, uint32_t, uint32_t, a ^ 0x80000000u)
LANES(f_abs, uint32_t, uint32_t, a & 0x7fffffffu)
LANES(d_neg, uint64_t, uint64_t, a ^ 1ull << 63)
LANES(d_abs, uint64_t, uint64_t, a & ~(1ull << 63))
LANES(f_copysign, uint32_t, uint32_t, (a & 0x80000000u) | (b & 0x7fffffffu))
LANES(d_copysign, uint64_t, uint64_t, (a & 1ull << 63) | (b & ~(1ull << 63)))

typedef struct { uint8_t sources; lane_fn *f32, *f64; } float_op;
static const float_op float_ops[OP_N] = {
    [OP_ADD] = {2, f_add, d_add}, [OP_SUB] = {2, f_sub, d_sub}, [OP_MUL] = {2, f_mul, d_mul},
    [OP_FMA] = {3, f_fma, d_fma}, [OP_MAD] = {3, f_fma, d_fma}, [OP_DIV] = {2, f_div, d_div},
    [OP_RCP] = {1, f_rcp, d_rcp}, [OP_SQRT] = {1, f_sqrt, d_sqrt},
    [OP_RSQRT] = {1, f_rsqrt, d_rsqrt}, [OP_MIN] = {2, f_min, d_min}, [OP_MAX] = {2, f_max, d_max},
    [OP_SIN] = {1, f_sin, NULL}, [OP_COS] = {1, f_cos, NULL}, [OP_LG2] = {1, f_lg2, NULL},
    [OP_EX2] = {1, f_ex2, NULL}, [OP_TANH] = {1, f_tanh, NULL}, [OP_NEG] = {1, f_neg, d_neg},
    [OP_ABS] = {1, f_abs, d_abs}, [OP_COPYSIGN] = {2, f_copysign, d_copysign},
};

/* One F32 result in a mode that is not the nearest: exact, or to odd, in double. */
static float directed_f32(int op, float x, float y, float z, sg_mod mode) {
    double a = (double)x, b = (double)y, s, u, v;
    switch (op) {
    case OP_MUL: return round_f32(a * b, mode);
    case OP_RCP: b = a, a = 1; /* fall through */
    case OP_DIV:
        s = a / b;
        u = fma(-s, b, a);
        return round_f32(s == 0 ? s : odd(s, signbit(b) ? -u : u), mode);
    case OP_SQRT:
        s = sqrt(a);
        return round_f32(odd(s, fma(-s, s, a)), mode);
    case OP_ADD: u = a, v = b; break;
    case OP_SUB: u = a, v = -b; break;
    default: u = a * b, v = (double)z; break;
    }
    s = odd_sum(u, v);
    if (s == 0 && mode == M_RM && (signbit(u) || signbit(v))) s = -0.0;
    return round_f32(s, mode);
}

/* F64 has nothing wider: the host's own modes. */
__attribute__((noinline, optimize("rounding-math,trapping-math")))
static double directed_f64(int op, double x, double y, double z, sg_mod mode) {
    volatile double a = x, b = y, c = z, r;
    fesetround(mode == M_RZ ? FE_TOWARDZERO : mode == M_RM ? FE_DOWNWARD : FE_UPWARD);
    switch (op) {
    case OP_ADD: r = a + b; break;
    case OP_SUB: r = a - b; break;
    case OP_MUL: r = a * b; break;
    case OP_DIV: r = a / b; break;
    case OP_RCP: r = 1 / a; break;
    case OP_SQRT: r = sqrt(a); break;
    default: r = fma(a, b, c); break;
    }
    fesetround(FE_TONEAREST);
    return r;
}

static void directed(alu *c, bool f64, sg_mod mode) {
    int op = (int)c->i->op;
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t a = c->s[0][l], b = c->s[1][l], z = c->s[2][l];
        if (!(c->mask >> l & 1)) continue;
        if (f64) c->out[l] = out_f64(directed_f64(op, as_f64(a), as_f64(b), as_f64(z), mode));
        else c->out[l] = out_f32(directed_f32(op, as_f32(a), as_f32(b), as_f32(z), mode));
    }
}

static lane_fn *pick_float(const sg_instr *i, const float_op *f, bool f64) {
    bool nan = sg_has(i, M_NAN_WINS);
    if (sg_has(i, M_XORSIGN)) return NULL;
    if (i->op == OP_MIN && nan) return f64 ? NULL : f_min_nan;
    if (i->op == OP_MAX && nan) return f64 ? NULL : f_max_nan;
    return f64 ? f->f64 : f->f32;
}

static bool do_float(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    bool f64 = t == T_F64, ftz = sg_has(i, M_FTZ), sat = sg_has(i, M_SAT);
    const float_op *f = &float_ops[i->op];
    lane_fn *fn = pick_float(i, f, f64);
    if (!fn || i->n != f->sources + 1 || (f64 && sat)) return false;
    fetch_all(c, 1, f->sources, t);
    if (ftz && !f64) flush_sources(c, f->sources);
    sg_mod mode = mode_of(i);
    if (mode == M_RN || sg_has(i, M_APPROX)) fn(c->out, c->s[0], c->s[1], c->s[2]);
    else directed(c, f64, mode);
    if (f64 && sg_has(i, M_APPROX)) {        /* rcp.approx.ftz.f64: the upper half only */
        for (int l = 0; l < SG_LANES; l++) c->out[l] &= 0xffffffff00000000ull;
    }
    if (ftz && !f64) flush_f32(c->out);
    if (sat) saturate_f32(c->out);
    commit(c);
    return true;
}

/* Two F32 in a register: add, sub, mul, fma. */
static bool do_f32x2(alu *c) {
    const sg_instr *i = c->i;
    int sources = i->op == OP_FMA ? 3 : 2;
    if (i->n != sources + 1) return false;
    if (i->op != OP_ADD && i->op != OP_SUB && i->op != OP_MUL && i->op != OP_FMA) return false;
    fetch_all(c, 1, sources, T_B64);
    sg_mod mode = mode_of(i);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t r = 0;
        for (int h = 0; h < 64; h += 32) {
            uint64_t v[3];
            for (int k = 0; k < 3; k++) v[k] = (uint32_t)(c->s[k][l] >> h);
            if (sg_has(i, M_FTZ)) {
                for (int k = 0; k < 3; k++) v[k] &= v[k] & 0x7f800000 ? ~0ull : 0x80000000;
            }
            float f = directed_f32((int)i->op, as_f32(v[0]), as_f32(v[1]), as_f32(v[2]), mode);
            uint64_t u = out_f32(f);
            if (sg_has(i, M_FTZ) && !(u & 0x7f800000)) u &= 0x80000000;
            r |= u << h;
        }
        c->out[l] = r;
    }
    commit(c);
    return true;
}

/* === 6. F16 and BF16 ========================================================================== */

static double half_value(bool bf, uint32_t v) {
    return (double)(bf ? bf16_f32((uint16_t)v) : f16_f32((uint16_t)v));
}

static uint32_t half_min_max(bool bf, bool min, bool nan, uint32_t a, uint32_t b) {
    double x = half_value(bf, a), y = half_value(bf, b);
    if (nan ? x != x || y != y : x != x && y != y) return 0x7fff;
    if (x != x || y != y) return x != x ? b : a;
    if (x == y) return min ? a | b : a & b;
    return (x < y) == min ? a : b;
}

/* False: no operation on halves. */
static bool half_exact(int op, double x, double y, double z, double *r) {
    switch (op) {
    case OP_ADD: *r = odd_sum(x, y); return true;
    case OP_SUB: *r = odd_sum(x, -y); return true;
    case OP_MUL: *r = x * y; return true;
    case OP_FMA: *r = odd_sum(x * y, z); return true;
    case OP_EX2: *r = exp2(x); return true;
    case OP_TANH: *r = tanh(x); return true;
    default: return false;
    }
}

/* One half: the bits a, b, c of an F16 or BF16 each. */
static bool half_op(const sg_instr *i, bool bf, const uint32_t v[3], uint32_t *out) {
    bool ftz = sg_has(i, M_FTZ);
    uint32_t exponent = bf ? 0x7f80 : 0x7c00, a[3];
    for (int k = 0; k < 3; k++) a[k] = ftz && !(v[k] & exponent) ? v[k] & 0x8000 : v[k];
    uint32_t r;
    double x;
    if (i->op == OP_NEG) {
        r = a[0] ^ 0x8000;
    } else if (i->op == OP_ABS) {
        r = a[0] & 0x7fff;
    } else if (i->op == OP_MIN || i->op == OP_MAX) {
        r = half_min_max(bf, i->op == OP_MIN, sg_has(i, M_NAN_WINS), a[0], a[1]);
    } else {
        if (!half_exact((int)i->op, half_value(bf, a[0]), half_value(bf, a[1]),
                        half_value(bf, a[2]), &x)) return false;
        r = narrow(bf ? &bf16_format : &f16_format, x, M_RN, false);
    }
    if (ftz && !(r & exponent)) r &= 0x8000;
    double value = half_value(bf, r);
    if (sg_has(i, M_RELU) && value < 0) r = 0;
    if (sg_has(i, M_RELU) && r == 0x8000) r = 0;
    if (sg_has(i, M_SAT)) r = !(value > 0) ? 0 : value > 1 ? bf ? 0x3f80 : 0x3c00 : r;
    *out = r;
    return true;
}

/* The same without branches, for what has no modifiers: exact in double or to odd there, to odd
 * in F32, then the nearest half, which is right as both have more than two bits to spare. */
static inline uint32_t odd_f32(double s) {
    float f = (float)s;
    uint32_t u = f32_bits(f);
    uint32_t cut = (fabs((double)f) > fabs(s) ? u - 1 : u) | 1;
    return (double)f == s ? u : cut;
}

static inline double sum_to_odd(double a, double b) {
    double s = a + b, t = s - a, err = (a - (s - t)) + (b - t);
    uint64_t u = f64_bits(s), next = (err > 0) == (s > 0) ? u + 1 : u - 1;
    bool move = (err < 0 || err > 0) && !(u & 1);
    return as_f64(move ? next : u);
}

#define HALF(v, h) (uint16_t)((v) >> (h))
#define HALVES(name, widen, nearest, e)                                                          \
    static inline uint32_t name##_one(uint16_t x, uint16_t y, uint16_t z) {                      \
        double a = (double)widen(x), b = (double)widen(y), c = (double)widen(z);                 \
        (void)c;                                                                                 \
        return nearest(odd_f32(e));                                                              \
    }                                                                                            \
    LANES(name, uint32_t, uint32_t, name##_one(HALF(a, 0), HALF(b, 0), HALF(c, 0)) |             \
          name##_one(HALF(a, 16), HALF(b, 16), HALF(c, 16)) << 16)
HALVES(f16_add, f16_f32, f16_nearest, sum_to_odd(a, b))
HALVES(f16_sub, f16_f32, f16_nearest, sum_to_odd(a, -b))
HALVES(f16_mul, f16_f32, f16_nearest, a * b)
HALVES(f16_fma, f16_f32, f16_nearest, sum_to_odd(a * b, c))
HALVES(bf16_add, bf16_f32, bf16_nearest, sum_to_odd(a, b))
HALVES(bf16_sub, bf16_f32, bf16_nearest, sum_to_odd(a, -b))
HALVES(bf16_mul, bf16_f32, bf16_nearest, a * b)
HALVES(bf16_fma, bf16_f32, bf16_nearest, sum_to_odd(a * b, c))

static lane_fn *pick_half(const sg_instr *i, bool bf) {
    if (sg_has(i, M_FTZ) || sg_has(i, M_SAT) || sg_has(i, M_RELU)) return NULL;
    switch ((int)i->op) {
    case OP_ADD: return bf ? bf16_add : f16_add;
    case OP_SUB: return bf ? bf16_sub : f16_sub;
    case OP_MUL: return bf ? bf16_mul : f16_mul;
    case OP_FMA: return bf ? bf16_fma : f16_fma;
    default: return NULL;
    }
}

static bool do_half(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    bool bf = t == T_BF16 || t == T_BF16X2, two = t == T_F16X2 || t == T_BF16X2;
    int sources = i->n - 1, want = i->op == OP_FMA ? 3 : 2;
    if (i->op == OP_NEG || i->op == OP_ABS || i->op == OP_EX2 || i->op == OP_TANH) want = 1;
    if (sources != want || sg_has(i, M_XORSIGN)) return false;
    fetch_all(c, 1, sources, t);
    lane_fn *fn = pick_half(i, bf);
    if (fn) fn(c->out, c->s[0], c->s[1], c->s[2]);
    for (int l = 0; l < SG_LANES && !fn; l++) {
        c->out[l] = 0;
        for (int h = 0; h < (two ? 32 : 16); h += 16) {
            uint32_t v[3], r;
            for (int k = 0; k < 3; k++) v[k] = (uint32_t)(c->s[k][l] >> h) & 0xffff;
            if (!half_op(i, bf, v, &r)) return false;
            c->out[l] |= (uint64_t)r << h;
        }
    }
    commit(c);
    return true;
}

/* === 7. Compare and select ==================================================================== */

typedef struct { uint8_t mod, less, equal, greater, unordered; } relation;
static const relation relations[] = {
    {M_EQ, 0, 1, 0, 0}, {M_NE, 1, 0, 1, 0}, {M_LT, 1, 0, 0, 0}, {M_LE, 1, 1, 0, 0},
    {M_GT, 0, 0, 1, 0}, {M_GE, 0, 1, 1, 0}, {M_EQU, 0, 1, 0, 1}, {M_NEU, 1, 0, 1, 1},
    {M_LTU, 1, 0, 0, 1}, {M_LEU, 1, 1, 0, 1}, {M_GTU, 0, 0, 1, 1}, {M_GEU, 0, 1, 1, 1},
    {M_NUM, 1, 1, 1, 0}, {M_NAN, 0, 0, 0, 1}, {M_LO, 1, 0, 0, 0}, {M_LS, 1, 1, 0, 0},
    {M_HI, 0, 0, 1, 0}, {M_HS, 0, 1, 1, 0},
};

static const relation *relation_of(const sg_instr *i) {
    for (unsigned k = 0; k < sizeof relations / sizeof *relations; k++) {
        if (sg_has(i, (sg_mod)relations[k].mod)) return &relations[k];
    }
    return NULL;
}

#define COMPARE(name, T, get)                                                                    \
    static void name(uint64_t *restrict d, const uint64_t *restrict x,                           \
                     const uint64_t *restrict y, const relation *r) {                            \
        uint64_t less = r->less, equal = r->equal, greater = r->greater, un = r->unordered;      \
        for (int l = 0; l < SG_LANES; l++) {                                                     \
            T a = get(x[l]), b = get(y[l]);                                                      \
            d[l] = a < b ? less : a == b ? equal : a > b ? greater : un;                         \
        }                                                                                        \
    }
#define TO_U16(v) ((uint16_t)(v))
#define TO_S16(v) ((int16_t)(v))
#define TO_U32(v) ((uint32_t)(v))
#define TO_S32(v) ((int32_t)(v))
#define TO_U64(v) (v)
#define TO_S64(v) ((int64_t)(v))
#define TO_F16(v) f16_f32((uint16_t)(v))
#define TO_BF16(v) bf16_f32((uint16_t)(v))
COMPARE(cmp_u16, uint16_t, TO_U16)
COMPARE(cmp_s16, int16_t, TO_S16)
COMPARE(cmp_u32, uint32_t, TO_U32)
COMPARE(cmp_s32, int32_t, TO_S32)
COMPARE(cmp_u64, uint64_t, TO_U64)
COMPARE(cmp_s64, int64_t, TO_S64)
COMPARE(cmp_f32, float, as_f32)
COMPARE(cmp_f64, double, as_f64)
COMPARE(cmp_f16, float, TO_F16)
COMPARE(cmp_bf16, float, TO_BF16)

/* c->out[l] = s[0] REL s[1], 0 or 1. */
static bool compare(alu *c, sg_type t) {
    const relation *r = relation_of(c->i);
    if (!r) return false;
    if (sg_has(c->i, M_FTZ) && t != T_F32) return false;
    if (sg_has(c->i, M_FTZ)) flush_sources(c, 2);
    uint64_t *d = c->out;
    const uint64_t *x = c->s[0], *y = c->s[1];
    switch ((int)t) {
    case T_B16: case T_U16: cmp_u16(d, x, y, r); return true;
    case T_S16: cmp_s16(d, x, y, r); return true;
    case T_B32: case T_U32: cmp_u32(d, x, y, r); return true;
    case T_S32: cmp_s32(d, x, y, r); return true;
    case T_B64: case T_U64: cmp_u64(d, x, y, r); return true;
    case T_S64: cmp_s64(d, x, y, r); return true;
    case T_F32: cmp_f32(d, x, y, r); return true;
    case T_F64: cmp_f64(d, x, y, r); return true;
    case T_F16: cmp_f16(d, x, y, r); return true;
    case T_BF16: cmp_bf16(d, x, y, r); return true;
    default: return false;
    }
}

static uint64_t joined(const sg_instr *i, uint64_t a, uint64_t b) {
    return sg_has(i, M_AND) ? a & b : sg_has(i, M_OR) ? a | b : a ^ b;
}

/* setp of a pair of halves: %p of the lower ones, %q of the upper ones. */
static bool do_setp_pair(alu *c, bool bf) {
    const sg_instr *i = c->i;
    if (i->n != 4) return false;
    for (int h = 0; h < 2; h++) {
        fetch_all(c, 2, 2, T_B32);
        for (int k = 0; k < 2; k++) {
            for (int l = 0; l < SG_LANES; l++) c->tmp[k][l] = c->s[k][l] >> (16 * h) & 0xffff;
            c->s[k] = c->tmp[k];
        }
        if (!compare(c, bf ? T_BF16 : T_F16)) return false;
        commit_to(c, &i->o[h], c->out);
    }
    return true;
}

static bool do_setp(alu *c) {
    const sg_instr *i = c->i;
    bool join = sg_has(i, M_AND) || sg_has(i, M_OR) || sg_has(i, M_XOR);
    int first = i->n - 2 - join;
    sg_type t = i->type[0];
    if (t == T_F16X2 || t == T_BF16X2) return !join && do_setp_pair(c, t == T_BF16X2);
    if (first != 1 && first != 2) return false;
    fetch_all(c, first, 2, t);
    if (join) fetch(c, 2, first + 2, T_PRED);
    if (!compare(c, t)) return false;
    if (first == 2) {
        uint64_t other[SG_LANES];
        for (int l = 0; l < SG_LANES; l++) {
            other[l] = join ? joined(i, c->out[l] ^ 1, c->s[2][l]) : c->out[l] ^ 1;
        }
        if (join) {
            for (int l = 0; l < SG_LANES; l++) c->out[l] = joined(i, c->out[l], c->s[2][l]);
        }
        commit_to(c, &i->o[1], other);
    } else if (join) {
        for (int l = 0; l < SG_LANES; l++) c->out[l] = joined(i, c->out[l], c->s[2][l]);
    }
    commit(c);
    return true;
}

/* What set writes for true: all ones, or a one. */
static uint64_t set_true(sg_type to, bool pair) {
    switch ((int)to) {
    case T_F32: return f32_bits(1.0f);
    case T_F16: case T_F16X2: return 0x3c00;
    case T_BF16: case T_BF16X2: return 0x3f80;
    case T_U16: case T_S16: return 0xffff;
    case T_U32: case T_S32: return pair ? 0xffff : 0xffffffff;
    default: return 0;
    }
}

static bool do_set_pair(alu *c, bool bf, uint64_t yes) {
    uint64_t both[SG_LANES] = {0};
    if (c->i->n != 3) return false;
    for (unsigned h = 0; h < 32; h += 16) {
        fetch_all(c, 1, 2, T_B32);
        for (int k = 0; k < 2; k++) {
            for (int l = 0; l < SG_LANES; l++) c->tmp[k][l] = c->s[k][l] >> h & 0xffff;
            c->s[k] = c->tmp[k];
        }
        if (!compare(c, bf ? T_BF16 : T_F16)) return false;
        for (int l = 0; l < SG_LANES; l++) both[l] |= (c->out[l] ? yes : 0) << h;
    }
    commit_to(c, &c->i->o[0], both);
    return true;
}

static bool do_set(alu *c) {
    const sg_instr *i = c->i;
    bool join = sg_has(i, M_AND) || sg_has(i, M_OR) || sg_has(i, M_XOR);
    sg_type from = i->type[1];
    bool pair = from == T_F16X2 || from == T_BF16X2;
    uint64_t yes = set_true(i->type[0], pair);
    if (i->n_types != 2 || i->n != 3 + join || !yes) return false;
    if (pair) return do_set_pair(c, from == T_BF16X2, yes);
    fetch_all(c, 1, 2, from);
    if (join) fetch(c, 2, 3, T_PRED);
    if (!compare(c, from)) return false;
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t on = join ? joined(i, c->out[l], c->s[2][l]) : c->out[l];
        c->out[l] = on ? yes : 0;
    }
    commit(c);
    return true;
}

static bool do_selp(alu *c) {
    if (c->i->n != 4) return false;
    sg_type t = c->i->type[0];
    fetch(c, 0, 1, t);
    fetch(c, 1, 2, t);
    fetch(c, 2, 3, T_PRED);
    const uint64_t *restrict x = c->s[0], *restrict y = c->s[1], *restrict p = c->s[2];
    uint64_t *restrict d = c->out, bits = low_bits(t);
    for (int l = 0; l < SG_LANES; l++) d[l] = (p[l] ? x[l] : y[l]) & bits;
    commit(c);
    return true;
}

static bool do_slct(alu *c) {
    const sg_instr *i = c->i;
    if (i->n != 4 || i->n_types != 2) return false;
    sg_type t = i->type[0];
    fetch(c, 0, 1, t);
    fetch(c, 1, 2, t);
    fetch(c, 2, 3, i->type[1]);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t v = c->s[2][l];
        bool first = i->type[1] == T_F32 ? as_f32(v) >= 0 : (int32_t)v >= 0;
        c->out[l] = (first ? c->s[0][l] : c->s[1][l]) & low_bits(t);
    }
    commit(c);
    return true;
}

static bool do_testp(alu *c) {
    const sg_instr *i = c->i;
    bool f64 = i->type[0] == T_F64;
    if (i->n != 2 || (!f64 && i->type[0] != T_F32)) return false;
    fetch_all(c, 1, 1, i->type[0]);
    for (int l = 0; l < SG_LANES; l++) {
        uint64_t v = c->s[0][l];
        int k = f64 ? fpclassify(as_f64(v)) : fpclassify(as_f32(v));
        bool nan = k == FP_NAN, inf = k == FP_INFINITE;
        c->out[l] = sg_has(i, M_FINITE) ? !nan && !inf : sg_has(i, M_INFINITE) ? inf
                  : sg_has(i, M_NUMBER) ? !nan : sg_has(i, M_NOTANUMBER) ? nan
                  : sg_has(i, M_NORMAL) ? k == FP_NORMAL : k == FP_SUBNORMAL;
    }
    commit(c);
    return true;
}

/* === 8. mov =================================================================================== */

static bool do_mov(alu *c) {
    const sg_instr *i = c->i;
    sg_type t = i->type[0];
    const sg_operand *to = &i->o[0], *from = &i->o[1];
    uint64_t bits = low_bits(t);
    if (i->n != 2 || t == T_B128) return false;
    if (from->kind == O_VEC) {
        unsigned size = 8 * sg_type_bytes(t) / from->n;
        uint64_t part = (1ull << size) - 1;
        memset(c->out, 0, sizeof c->out);
        for (unsigned k = 0; k < from->n; k++) {
            const uint64_t *v = c->w->reg + (ptrdiff_t)from->vec[k] * SG_LANES;
            bool imm = from->vec[k] == -2;
            for (int l = 0; l < SG_LANES; l++) {
                c->out[l] |= ((imm ? from->vec_imm[k] : v[l]) & part) << (size * k);
            }
        }
        commit(c);
        return true;
    }
    fetch(c, 0, 1, t);
    if (to->kind != O_VEC) {
        for (int l = 0; l < SG_LANES; l++) c->out[l] = c->s[0][l] & bits;
        commit(c);
        return true;
    }
    unsigned size = 8 * sg_type_bytes(t) / to->n;
    uint64_t copy[SG_LANES];                 /* the source may be one of the destinations */
    memcpy(copy, c->s[0], sizeof copy);
    for (unsigned k = 0; k < to->n; k++) {
        if (to->vec[k] < 0) continue;
        sg_operand one = {.kind = O_REG, .reg = to->vec[k]};
        for (int l = 0; l < SG_LANES; l++) {
            c->out[l] = copy[l] >> (size * k) & ((1ull << size) - 1);
        }
        commit_to(c, &one, c->out);
    }
    return true;
}

/* === 9. cvt =================================================================================== */

LANES(cvt_from_u8, uint8_t, uint64_t, a)
LANES(cvt_from_s8, int8_t, uint64_t, a)
LANES(cvt_from_u16, uint16_t, uint64_t, a)
LANES(cvt_from_s16, int16_t, uint64_t, a)
LANES(cvt_from_u32, uint32_t, uint64_t, a)
LANES(cvt_from_s32, int32_t, uint64_t, a)
LANES(cvt_from_u64, uint64_t, uint64_t, a)
LANES(cvt_s32_f32, int32_t, uint32_t, f32_bits((float)a))
LANES(cvt_u32_f32, uint32_t, uint32_t, f32_bits((float)(int64_t)a))
LANES(cvt_f32_f64, uint32_t, uint64_t, out_f64((double)as_f32(a)))
LANES(cvt_f64_f32, uint64_t, uint32_t, out_f32((float)as_f64(a)))
LANES(cvt_f16_f32, uint16_t, uint32_t, out_f32(f16_f32(a)))
LANES(cvt_bf16_f32, uint16_t, uint32_t, out_f32(bf16_f32(a)))
LANES(cvt_f32_bf16, uint32_t, uint16_t, bf16_nearest(a))
LANES(cvt_f32_f16, uint32_t, uint16_t, f16_nearest(a))
LANES(cvt_f32_bf16x2, uint32_t, uint32_t, (uint32_t)bf16_nearest(a) << 16 | bf16_nearest(b))
LANES(cvt_f32_f16x2, uint32_t, uint32_t, (uint32_t)f16_nearest(a) << 16 | f16_nearest(b))
LANES(cvt_f32_e4m3x2, uint32_t, uint16_t, e4m3_nearest(a) << 8 | e4m3_nearest(b))
LANES(cvt_f32_e5m2x2, uint32_t, uint16_t, e5m2_nearest(a) << 8 | e5m2_nearest(b))


/* A float cut to 32 bits: what does not fit becomes the nearest that does, a NaN 0. */
static inline int32_t cut_s32(float a) {
    bool fits = a >= -0x1p31f && a < 0x1p31f;
    int32_t v = (int32_t)(fits ? a : 0);
    return fits ? v : a > 0 ? INT32_MAX : a < 0 ? INT32_MIN : 0;
}
LANES(cvt_rzi_s32, uint32_t, uint32_t, cut_s32(as_f32(a)))
LANES(cvt_rni_s32, uint32_t, uint32_t, cut_s32(__builtin_nearbyintf(as_f32(a))))

static lane_fn *pick_int_cvt(sg_type from) {
    bool sign = sg_type_signed(from);
    switch (sg_type_bytes(from)) {
    case 1: return sign ? cvt_from_s8 : cvt_from_u8;
    case 2: return sign ? cvt_from_s16 : cvt_from_u16;
    case 4: return sign ? cvt_from_s32 : cvt_from_u32;
    default: return cvt_from_u64;
    }
}

/* The loops for what kernels do most: no saturation, flushing, relu, and the nearest. */
static lane_fn *pick_cvt(const sg_instr *i, sg_type to, sg_type from) {
    static const sg_mod slow[] = {M_SAT, M_FTZ, M_RELU, M_SATFINITE, M_RZ, M_RM, M_RP, M_RNA,
                                  M_RMI, M_RPI};
    for (unsigned k = 0; k < sizeof slow / sizeof *slow; k++) {
        if (sg_has(i, slow[k])) return NULL;
    }
    if (!sg_type_float(to) && !sg_type_float(from)) return pick_int_cvt(from);
    if (sg_has(i, M_RZI)) return to == T_S32 && from == T_F32 ? cvt_rzi_s32 : NULL;
    if (sg_has(i, M_RNI)) return to == T_S32 && from == T_F32 ? cvt_rni_s32 : NULL;
    if (to == T_F32) {
        if (from == T_S32) return cvt_s32_f32;
        if (from == T_U32) return cvt_u32_f32;
        return from == T_F64 ? cvt_f64_f32 : from == T_F16 ? cvt_f16_f32
             : from == T_BF16 ? cvt_bf16_f32 : NULL;
    }
    if (from != T_F32) return NULL;
    return to == T_F64 ? cvt_f32_f64 : to == T_BF16 ? cvt_f32_bf16
         : to == T_F16 ? cvt_f32_f16 : NULL;
}

static bool widen(sg_type t, uint64_t u, double *v) {
    switch ((int)t) {
    case T_F64: *v = as_f64(u); return true;
    case T_F32: case T_TF32: *v = (double)as_f32(u); return true;
    case T_F16: *v = (double)f16_f32((uint16_t)u); return true;
    case T_BF16: *v = (double)bf16_f32((uint16_t)u); return true;
    case T_E4M3: *v = (double)sg_e4m3_to_f32((uint8_t)u); return true;
    case T_E5M2: *v = (double)sg_e5m2_to_f32((uint8_t)u); return true;
    default: return false;
    }
}

static i128 int_value(sg_type t, uint64_t u) {
    unsigned n = 64 - 8 * sg_type_bytes(t);
    return sg_type_signed(t) ? (i128)((int64_t)(u << n) >> n) : (i128)(u << n >> n);
}

static i128 clamp_int(sg_type t, i128 v) {
    unsigned n = 8 * sg_type_bytes(t);
    i128 low = sg_type_signed(t) ? -((i128)1 << (n - 1)) : 0;
    i128 high = ((i128)1 << (sg_type_signed(t) ? n - 1 : n)) - 1;
    return v < low ? low : v > high ? high : v;
}

static double integral(const sg_instr *i, double v) {
    if (sg_has(i, M_RNI)) return nearbyint(v);
    if (sg_has(i, M_RZI)) return trunc(v);
    if (sg_has(i, M_RMI)) return floor(v);
    return sg_has(i, M_RPI) ? ceil(v) : v;
}

static uint64_t float_to_int(const sg_instr *i, sg_type to, sg_type from, double v) {
    unsigned bits = 8 * sg_type_bytes(to);
    if (v != v) return from != T_F64 && bits < 64 ? 0 : 1ull << (bits - 1);
    v = trunc(integral(i, v));
    if (fabs(v) > 0x1p70) v = copysign(0x1p70, v);
    return (uint64_t)clamp_int(to, (i128)v);
}

/* A number in double, exact or to odd, as the bits of a float type. */
static uint64_t to_float(const sg_instr *i, sg_type to, double v) {
    bool finite = sg_has(i, M_SATFINITE);
    sg_mod mode = mode_of(i);
    if (sg_has(i, M_SAT)) v = v > 0 ? v < 1 ? v : 1 : 0;
    if (sg_has(i, M_RELU) && !(v > 0) && v == v) v = 0;
    switch ((int)to) {
    case T_F64: return out_f64(v);
    case T_F32: return out_f32(round_f32(v, mode));
    case T_F16: return narrow(&f16_format, v, mode, finite);
    case T_BF16: return narrow(&bf16_format, v, mode, finite);
    case T_E4M3: return narrow(&e4m3_format, v, mode, true);
    case T_E5M2: return narrow(&e5m2_format, v, mode, true);
    case T_TF32:
        if (v != v) return 0x7fffffff;
        return (uint64_t)narrow(&tf32_format, v, mode, finite) << 13;
    default: return 0;
    }
}

static double int_to_double(const sg_instr *i, sg_type to, i128 v) {
    double s = (double)v, err = (double)(v - (i128)s);
    if (to != T_F64) return odd(s, err);
    sg_mod mode = mode_of(i);
    if (mode == M_RZ) mode = v < 0 ? M_RP : M_RM;
    if (mode == M_RM && err < 0) return nextafter(s, -INFINITY);
    if (mode == M_RP && err > 0) return nextafter(s, INFINITY);
    return s;
}

static bool cvt_lane(const sg_instr *i, sg_type to, sg_type from, uint64_t u, uint64_t *out) {
    bool ftz = sg_has(i, M_FTZ);
    double v;
    if (!sg_type_float(from)) {
        i128 n = int_value(from, u);
        if (sg_type_float(to)) *out = to_float(i, to, int_to_double(i, to, n));
        else *out = (uint64_t)(sg_has(i, M_SAT) ? clamp_int(to, n) : n);
    } else {
        if (!widen(from, u, &v)) return false;
        if (ftz && from == T_F32 && fabs(v) < 0x1p-126) v = copysign(0, v);
        if (sg_type_float(to)) *out = to_float(i, to, integral(i, v));
        else *out = float_to_int(i, to, from, v);
    }
    if (ftz && to == T_F32 && !(*out & 0x7f800000)) *out &= 0x80000000;
    *out &= low_bits(to);
    return true;
}

/* f16x2, bf16x2, e4m3x2, e5m2x2, e2m1x2, ue8m0x2: the type of a half, and its bits. */
static unsigned pair_bits(sg_type t) {
    switch ((int)t) {
    case T_F16X2: case T_BF16X2: return 16;
    case T_E4M3X2: case T_E5M2X2: case T_UE8M0X2: return 8;
    case T_E2M1X2: return 4;
    default: return 0;
    }
}

/* A scale 2^(code - 127): the exponent of |x|, with M_RP the next one unless x is a power. */
static uint64_t to_ue8m0(const sg_instr *i, double x) {
    uint32_t u = f32_bits((float)x) & 0x7fffffff, code = u >> 23;
    if (x != x) return 0xff;
    if (sg_has(i, M_RP) && u & 0x7fffff && u > 0x400000 && u < 0x7f800000) code++;
    return code == 0xff && sg_has(i, M_SATFINITE) ? 0xfe : code;
}

static uint64_t half_of_pair(const sg_instr *i, sg_type to, double v) {
    if (sg_has(i, M_RELU) && !(v > 0) && v == v) v = 0;
    switch ((int)to) {
    case T_F16X2: return to_float(i, T_F16, v);
    case T_BF16X2: return to_float(i, T_BF16, v);
    case T_E4M3X2: return to_float(i, T_E4M3, v);
    case T_E5M2X2: return to_float(i, T_E5M2, v);
    case T_UE8M0X2: return to_ue8m0(i, v);
    default: return narrow(&e2m1_format, v, M_RN, true);
    }
}

static double pair_value(sg_type from, uint64_t u) {
    switch ((int)from) {
    case T_F32: return (double)as_f32(u);
    case T_F16X2: return (double)f16_f32((uint16_t)u);
    case T_BF16X2: return (double)bf16_f32((uint16_t)u);
    case T_E4M3X2: return (double)sg_e4m3_to_f32((uint8_t)u);
    case T_E5M2X2: return (double)sg_e5m2_to_f32((uint8_t)u);
    case T_E2M1X2: return (double)sg_e2m1_to_f32((uint8_t)u);
    default: return (u & 255) == 255 ? NAN : ldexp(1, (int)(u & 255) - 127);
    }
}

/* The loops of what kernels do most; eight bits always saturate. */
static lane_fn *pick_pair(const sg_instr *i, sg_type to) {
    if (sg_has(i, M_RELU) || mode_of(i) != M_RN) return NULL;
    if (to == T_E4M3X2) return cvt_f32_e4m3x2;
    if (to == T_E5M2X2) return cvt_f32_e5m2x2;
    if (sg_has(i, M_SATFINITE)) return NULL;
    return to == T_BF16X2 ? cvt_f32_bf16x2 : to == T_F16X2 ? cvt_f32_f16x2 : NULL;
}

/* Two numbers at once: from two F32, the first into the upper half, or from a pair. */
static bool do_cvt_pair(alu *c) {
    const sg_instr *i = c->i;
    sg_type to = i->type[0], from = i->type[1];
    unsigned size = pair_bits(to), in = pair_bits(from);
    bool two = from == T_F32;
    if (!size || (!two && !in) || i->n != 2 + two) return false;
    lane_fn *fn = two ? pick_pair(i, to) : NULL;
    if (sg_has(i, M_FTZ)) return false;
    if (two) fetch(c, 0, 2, from), fetch(c, 1, 1, from);
    else fetch(c, 0, 1, from);
    if (fn) fn(c->out, c->s[1], c->s[0], c->s[0]);
    for (int l = 0; l < SG_LANES && !fn; l++) {
        uint64_t a = c->s[0][l], b = two ? c->s[1][l] : a >> in;
        c->out[l] = half_of_pair(i, to, pair_value(from, a))
                  | half_of_pair(i, to, pair_value(from, b)) << size;
    }
    commit(c);
    return true;
}

static bool do_cvt(alu *c) {
    const sg_instr *i = c->i;
    if (i->n_types != 2) return false;
    sg_type to = i->type[0], from = i->type[1];
    if (pair_bits(to) || pair_bits(from)) return do_cvt_pair(c);
    if (i->n != 2) return false;
    lane_fn *fn = pick_cvt(i, to, from);
    fetch_all(c, 1, 1, from);
    if (fn) {
        fn(c->out, c->s[0], c->s[0], c->s[0]);
        uint64_t bits = low_bits(to);
        for (int l = 0; l < SG_LANES; l++) c->out[l] &= bits;
    } else {
        for (int l = 0; l < SG_LANES; l++) {
            if (!cvt_lane(i, to, from, c->s[0][l], &c->out[l])) return false;
        }
    }
    widen_signed(c, to);
    commit(c);
    return true;
}

/* === 10. sg_alu =============================================================================== */

/* The modifiers that the operations here know; another one stops, so that none is passed over. */
typedef struct { uint8_t op; sg_mod mod[24]; int n; } known;
#define KNOWN(op, ...)                                                                           \
    {OP_##op, {__VA_ARGS__}, (int)(sizeof((sg_mod[]){__VA_ARGS__}) / sizeof(sg_mod))}
#define ROUND M_RN, M_RZ, M_RM, M_RP
#define RELATIONS M_EQ, M_NE, M_LT, M_LE, M_GT, M_GE, M_EQU, M_NEU, M_LTU, M_LEU, M_GTU, M_GEU,  \
                  M_NUM, M_NAN, M_LO, M_LS, M_HI, M_HS, M_AND, M_OR, M_XOR, M_FTZ
static const known knows[] = {
    KNOWN(ADD, ROUND, M_FTZ, M_SAT, M_CC), KNOWN(SUB, ROUND, M_FTZ, M_SAT, M_CC),
    KNOWN(MUL, ROUND, M_FTZ, M_SAT, M_LO, M_HI, M_WIDE),
    KNOWN(MAD, ROUND, M_FTZ, M_SAT, M_LO, M_HI, M_WIDE, M_CC),
    KNOWN(FMA, ROUND, M_FTZ, M_SAT, M_RELU), KNOWN(DIV, ROUND, M_FTZ, M_APPROX, M_FULL),
    KNOWN(RCP, ROUND, M_FTZ, M_APPROX), KNOWN(SQRT, ROUND, M_FTZ, M_APPROX),
    KNOWN(RSQRT, M_FTZ, M_APPROX), KNOWN(SIN, M_FTZ, M_APPROX), KNOWN(COS, M_FTZ, M_APPROX),
    KNOWN(LG2, M_FTZ, M_APPROX), KNOWN(EX2, M_FTZ, M_APPROX), KNOWN(TANH, M_APPROX),
    KNOWN(MIN, M_FTZ, M_NAN_WINS), KNOWN(MAX, M_FTZ, M_NAN_WINS), KNOWN(NEG, M_FTZ),
    KNOWN(ABS, M_FTZ),
    KNOWN(MUL24, M_LO, M_HI), KNOWN(MAD24, M_LO, M_HI), KNOWN(ADDC, M_CC), KNOWN(SUBC, M_CC),
    KNOWN(MADC, M_CC, M_LO, M_HI), KNOWN(SETP, RELATIONS), KNOWN(SET, RELATIONS),
    KNOWN(SLCT, M_FTZ), KNOWN(SHF, M_L, M_R, M_WRAP, M_CLAMP),
    KNOWN(PRMT, M_F4E, M_B4E, M_RC8, M_ECL, M_ECR, M_RC16), KNOWN(BFIND, M_SHIFTAMT),
    KNOWN(SZEXT, M_WRAP, M_CLAMP),
    KNOWN(TESTP, M_FINITE, M_INFINITE, M_NUMBER, M_NOTANUMBER, M_NORMAL, M_SUBNORMAL),
    KNOWN(CVT, ROUND, M_RNA, M_RNI, M_RZI, M_RMI, M_RPI, M_SAT, M_FTZ, M_RELU, M_SATFINITE),
};

static bool knows_modifiers(const sg_instr *i) {
    static uint64_t may[OP_N][2];
    static bool ready;
    if (!ready) {
        for (unsigned k = 0; k < sizeof knows / sizeof *knows; k++) {
            for (int m = 0; m < knows[k].n; m++) {
                may[knows[k].op][knows[k].mod[m] / 64] |= 1ull << (knows[k].mod[m] % 64);
            }
        }
        ready = true;
    }
    return !(i->mod[0] & ~may[i->op][0]) && !(i->mod[1] & ~may[i->op][1]);
}

static bool by_type(alu *c) {
    switch ((int)c->i->type[0]) {
    case T_F32: case T_F64: return do_float(c);
    case T_F16: case T_F16X2: case T_BF16: case T_BF16X2: return do_half(c);
    case T_F32X2: return do_f32x2(c);
    default: return do_int(c);
    }
}

bool sg_alu(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    alu c;
    c.b = b, c.w = w, c.i = i, c.mask = mask;
    if (!knows_modifiers(i)) return false;
    switch ((int)i->op) {
    case OP_MOV: return do_mov(&c);
    case OP_ADD: case OP_SUB: case OP_MAD:
        return sg_has(i, M_CC) ? do_carry(&c) : by_type(&c);
    case OP_MUL: case OP_FMA: case OP_DIV: case OP_REM: case OP_MIN: case OP_MAX: case OP_NEG:
    case OP_ABS: case OP_SAD: case OP_MUL24: case OP_MAD24: case OP_RCP: case OP_SQRT:
    case OP_RSQRT: case OP_SIN: case OP_COS: case OP_LG2: case OP_EX2: case OP_TANH:
    case OP_COPYSIGN:
        return by_type(&c);
    case OP_ADDC: case OP_SUBC: case OP_MADC: return do_carry(&c);
    case OP_AND: case OP_OR: case OP_XOR: case OP_NOT: case OP_CNOT: case OP_SHL: case OP_SHR:
    case OP_CLZ: case OP_POPC: case OP_BREV:
        return do_bits(&c);
    case OP_SETP: return do_setp(&c);
    case OP_SET: return do_set(&c);
    case OP_SELP: return do_selp(&c);
    case OP_SLCT: return do_slct(&c);
    case OP_TESTP: return do_testp(&c);
    case OP_CVT: return do_cvt(&c);
    case OP_LOP3: return do_lop3(&c);
    case OP_SHF: return do_shf(&c);
    case OP_PRMT: return do_prmt(&c);
    case OP_BFE: return do_bfe(&c);
    case OP_BFI: return do_bfi(&c);
    case OP_BFIND: return do_bfind(&c);
    case OP_SZEXT: return do_szext(&c);
    case OP_DP4A: return do_dp4a(&c);
    default: return false;
    }
}
