/* tensor.c -- what a warp does as one: ldmatrix and mma.sync, with the PTX ISA's fragments.
 *
 *   ldmatrix   lane 8m + r names row r of the 8 x 8 matrix m of 16-bit elements, 16 aligned bytes;
 *              register m of lane 4r + c then holds elements 2c and 2c + 1 of that row, or, with
 *              .trans, of that column.
 *
 *   mma        D[16][8] = A[16][K] * B[K][8] + C[16][8]      lane = 4 g + t; E elements a register
 *
 *              A: register r holds row g + 8 (r % 2), k = K/2 (r / 2) + E t ..      4 registers
 *              B: register r holds column g,          k = K/2 r + E t ..            2 registers
 *              C, D: register r holds row g + 8 (r / 2), column 2 t + r % 2         4 registers
 *
 * Sums       start with C and take the exact products in the order of k, rounding each sum to F32
 *            (a fused multiply-add).  A GPU adds groups of products in a fixed-point sum whose
 *            width is its own: results differ from ours in the last bits.  A NaN is 0x7fffffff.
 *
 * Contents   1 registers   2 ldmatrix   3 mma                                                    */
#include "softgpu.h"

#include <string.h>

#define ALL_LANES 0xffffffffu

/* === 1. Registers ============================================================================= */

static uint32_t get(const sg_warp *w, const sg_operand *o, int element, int lane) {
    int reg = o->vec[element];
    if (reg < 0) return reg == -2 ? (uint32_t)o->vec_imm[element] : 0;
    return (uint32_t)w->reg[(size_t)reg * SG_LANES + (size_t)lane];
}

static void put(sg_warp *w, const sg_operand *o, int element, int lane, uint32_t bits) {
    int reg = o->vec[element];
    if (reg >= 0) w->reg[(size_t)reg * SG_LANES + (size_t)lane] = bits;
}

static uint64_t bit_of(sg_mod m, unsigned word) { return m / 64 == word ? 1ull << (m % 64) : 0; }

/* Whether the instruction has these modifiers and no others; `free` may be there (M_N: none). */
static bool has_only(const sg_instr *i, const sg_mod *need, int n, sg_mod free) {
    for (unsigned word = 0; word < 2; word++) {
        uint64_t want = 0;
        for (int k = 0; k < n; k++) want |= bit_of(need[k], word);
        if ((i->mod[word] & ~bit_of(free, word)) != want) return false;
    }
    return true;
}

static void check_lanes(const sg_block *b, const sg_warp *w, const sg_instr *i, uint32_t mask) {
    if (mask == ALL_LANES) return;
    sg_violation(b, w, i, __builtin_ctz(~mask), "%s needs all 32 lanes, but only 0x%08x run it",
                 sg_op_name(i->op), mask);
}

/* === 2. ldmatrix ============================================================================== */

static int matrices(const sg_instr *i) {
    static const sg_mod count[] = {M_X1, M_X2, M_X4};
    for (int k = 0; k < 3; k++) {
        const sg_mod need[] = {M_SYNC, M_ALIGNED, M_M8N8, count[k]};
        if (has_only(i, need, 4, M_TRANS) && i->type[0] == T_B16 && i->n_types == 1 &&
            i->o[0].n == 1 << k)
            return 1 << k;
    }
    return 0;
}

static void load_matrices(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    int n = matrices(i);
    uint16_t row[SG_LANES][8] = {{0}};
    if (!n) sg_stop(b, w, i, "a form of ldmatrix that is not known");
    check_lanes(b, w, i, mask);
    for (int lane = 0; lane < 8 * n; lane++) {
        if (!(mask >> lane & 1)) continue;
        sg_space space = (sg_space)i->space;
        uint64_t address = sg_address(b, w, &i->o[1], &space, lane);
        if (space != S_SHARED) {
            sg_violation(b, w, i, lane, "ldmatrix from what is not shared memory");
            continue;
        }
        const void *from = sg_memory(b, w, i, lane, space, address, sizeof row[0], SG_READ);
        if (from) memcpy(row[lane], from, sizeof row[0]);
    }
    bool trans = sg_has(i, M_TRANS);
    for (int m = 0; m < n; m++)
        for (int lane = 0; lane < SG_LANES; lane++) {
            int line = lane / 4, first = 2 * (lane % 4);
            uint16_t low = trans ? row[8 * m + first][line] : row[8 * m + line][first];
            uint16_t high = trans ? row[8 * m + first + 1][line] : row[8 * m + line][first + 1];
            if (mask >> lane & 1) put(w, &i->o[0], m, lane, (uint32_t)high << 16 | low);
        }
}

/* === 3. mma =================================================================================== */

enum { ROWS = 16, COLS = 8, DEPTH_MAX = 32 };

static float e4m3[256], e5m2[256];         /* two decoders are called 768 times an mma          */

__attribute__((constructor)) static void fill_tables(void) {
    for (int code = 0; code < 256; code++) {
        e4m3[code] = sg_e4m3_to_f32((uint8_t)code);
        e5m2[code] = sg_e5m2_to_f32((uint8_t)code);
    }
}

/* The elements of one register, E of them; stride: between their places in x. */
static void decode(uint32_t bits, sg_type t, float *x, int stride) {
    if (t == T_BF16 || t == T_F16) {
        for (int e = 0; e < 2; e++) {
            uint16_t half = (uint16_t)(bits >> (16 * e));
            x[e * stride] = t == T_BF16 ? sg_bf16_to_f32(half) : sg_f16_to_f32(half);
        }
    } else {
        const float *table = t == T_E4M3 ? e4m3 : e5m2;
        for (int e = 0; e < 4; e++) x[e * stride] = table[bits >> (8 * e) & 255];
    }
}

/* K of a form that is known, or 0. */
static int mma_depth(const sg_instr *i) {
    static const sg_mod k16[] = {M_SYNC, M_ALIGNED, M_ROW, M_COL, M_M16N8K16};
    static const sg_mod k32[] = {M_SYNC, M_ALIGNED, M_ROW, M_COL, M_M16N8K32};
    if (i->n_types != 4 || i->type[0] != T_F32 || i->type[3] != T_F32) return 0;
    if (i->o[0].n != 4 || i->o[1].n != 4 || i->o[2].n != 2 || i->o[3].n != 4) return 0;
    int a = i->type[1], b = i->type[2];
    if (a == b && (a == T_BF16 || a == T_F16)) return has_only(i, k16, 5, M_N) ? 16 : 0;
    bool fp8 = (a == T_E4M3 || a == T_E5M2) && (b == T_E4M3 || b == T_E5M2);
    return fp8 && has_only(i, k32, 5, M_N) ? 32 : 0;
}

/* sum[i][j] += a[i][k] b[k][j], k in order: eight columns at once. */
static void multiply(float sum[ROWS][COLS], float a[ROWS][DEPTH_MAX], float b[DEPTH_MAX][COLS],
                     int depth) {
    for (int i = 0; i < ROWS; i++) {
        float s[COLS];
        memcpy(s, sum[i], sizeof s);
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < COLS; j++) s[j] = __builtin_fmaf(a[i][k], b[k][j], s[j]);
        memcpy(sum[i], s, sizeof s);
    }
}

static void multiply_add(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    float x[ROWS][DEPTH_MAX], y[DEPTH_MAX][COLS], sum[ROWS][COLS];
    int depth = mma_depth(i);
    if (!depth) sg_stop(b, w, i, "a form of mma that is not known");
    check_lanes(b, w, i, mask);
    for (int lane = 0; lane < SG_LANES; lane++) {
        int g = lane / 4, t = lane % 4, first = depth / 8 * t;     /* E is 2 or 4: depth / 8    */
        for (int r = 0; r < 4; r++)
            decode(get(w, &i->o[1], r, lane), (sg_type)i->type[1],
                   &x[g + 8 * (r % 2)][depth / 2 * (r / 2) + first], 1);
        for (int r = 0; r < 2; r++)
            decode(get(w, &i->o[2], r, lane), (sg_type)i->type[2],
                   &y[depth / 2 * r + first][g], COLS);
        for (int r = 0; r < 4; r++) {
            uint32_t bits = get(w, &i->o[3], r, lane);
            memcpy(&sum[g + 8 * (r / 2)][2 * t + r % 2], &bits, sizeof bits);
        }
    }
    multiply(sum, x, y, depth);
    for (int lane = 0; lane < SG_LANES; lane++)
        for (int r = 0; r < 4; r++) {
            float value = sum[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            if (value != value) bits = 0x7fffffff;
            if (mask >> lane & 1) put(w, &i->o[0], r, lane, bits);
        }
}

bool sg_tensor(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask) {
    if (i->op == OP_LDMATRIX) load_matrices(b, w, i, mask);
    else if (i->op == OP_MMA) multiply_add(b, w, i, mask);
    else return false;
    return true;
}
