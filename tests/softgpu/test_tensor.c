/* test_tensor.c -- ldmatrix and mma.sync against their definitions.
 *
 *   random A, B, C  --the PTX ISA's formulas, written out here-->  registers  --sg_tensor-->
 *   registers  --the formulas for D-->  D  ==  A B + C as a plain loop
 *
 * What tensor.c calls of other files is replaced here; weak, where a file has come meanwhile.   */
#include "../check.h"
#include "softgpu.h"

#include <setjmp.h>
#include <stdarg.h>

/* === Stand-ins for exec.c, memory.c, alu.c ==================================================== */

#define STAND_IN __attribute__((weak))

static uint8_t shared_memory[4096];
static uint64_t registers[32][SG_LANES];
static uint32_t lanes_read;
static int violations;
static jmp_buf stopped;

STAND_IN uint64_t sg_address(const sg_block *b, const sg_warp *w, const sg_operand *o,
                             sg_space *space, int lane) {
    (void)b;
    if (*space == S_GENERIC) *space = S_GLOBAL;
    return w->reg[(size_t)o->reg * SG_LANES + (size_t)lane] + o->imm;
}

STAND_IN void *sg_memory(sg_block *b, sg_warp *w, const sg_instr *i, int lane, sg_space space,
                         uint64_t address, unsigned bytes, sg_access kind) {
    (void)b, (void)w, (void)i;
    CHECK(space == S_SHARED && kind == SG_READ && bytes == 16, "space %d, %u bytes", space, bytes);
    CHECK(address % 16 == 0 && address + bytes <= sizeof shared_memory, "a wild address");
    lanes_read |= 1u << lane;
    return shared_memory + address;
}

STAND_IN void sg_violation(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                           const char *fmt, ...) {
    (void)b, (void)w, (void)i, (void)lane, (void)fmt;
    violations++;
}

STAND_IN void sg_stop(const sg_block *b, const sg_warp *w, const sg_instr *i, const char *fmt,
                      ...) {
    (void)b, (void)w, (void)i, (void)fmt;
    longjmp(stopped, 1);
}

STAND_IN const char *sg_op_name(sg_op op) { return op == OP_MMA ? "mma" : "ldmatrix"; }

/* A number of `exponent` and `mantissa` bits, its bias 2^(exponent - 1) - 1. */
static double small_float(uint32_t bits, int exponent, int mantissa) {
    int bias = (1 << (exponent - 1)) - 1, e = (int)(bits >> mantissa) & ((1 << exponent) - 1);
    double m = bits & ((1u << mantissa) - 1u), sign = bits >> (exponent + mantissa) & 1 ? -1 : 1;
    if (!e) return sign * ldexp(m, 1 - bias - mantissa);
    return sign * ldexp(m + ldexp(1, mantissa), e - bias - mantissa);
}

STAND_IN float sg_f16_to_f32(uint16_t bits) { return (float)small_float(bits, 5, 10); }
STAND_IN float sg_bf16_to_f32(uint16_t bits) {
    return (bits & 0x7fff) == 0x7fc0 ? NAN : (float)small_float(bits, 8, 7);
}
STAND_IN float sg_e4m3_to_f32(uint8_t bits) {
    return (bits & 127) == 127 ? NAN : (float)small_float(bits, 4, 3);
}
STAND_IN float sg_e5m2_to_f32(uint8_t bits) { return (float)small_float(bits, 5, 2); }

/* === Instructions and registers =============================================================== */

enum { A0 = 0, B0 = 4, C0 = 8, D0 = 12, ADDRESS = 20 };

static uint64_t random_state = 0x9e3779b97f4a7c15u;
static uint32_t random_u32(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}

static void modify(sg_instr *i, sg_mod m) { i->mod[m / 64] |= 1ull << (m % 64); }

static sg_operand registers_from(int first, int n) {
    sg_operand o = {.kind = O_VEC, .n = (uint8_t)n, .reg = -1, .symbol = -1};
    for (int k = 0; k < n; k++) o.vec[k] = first + k;
    return o;
}

static sg_instr mma_of(sg_type a, sg_type b, sg_mod shape) {
    sg_instr i = {.op = OP_MMA, .type = {T_F32, (uint8_t)a, (uint8_t)b, T_F32}, .n_types = 4,
                  .n = 4, .vec = 1, .guard = -1};
    const sg_mod words[] = {M_SYNC, M_ALIGNED, M_ROW, M_COL, shape};
    for (size_t k = 0; k < sizeof words / sizeof *words; k++) modify(&i, words[k]);
    i.o[0] = registers_from(D0, 4);
    i.o[1] = registers_from(A0, 4);
    i.o[2] = registers_from(B0, 2);
    i.o[3] = registers_from(C0, 4);
    return i;
}

static sg_warp warp_of_all(void) {
    return (sg_warp){.live = ~0u, .active = ~0u, .reg = registers[0]};
}

/* === mma ====================================================================================== */

static double value_of(uint32_t bits, sg_type t) {
    if (t == T_F16) return small_float(bits, 5, 10);
    if (t == T_BF16) return small_float(bits, 8, 7);
    return t == T_E4M3 ? small_float(bits, 4, 3) : small_float(bits, 5, 2);
}

/* Bits of a random number of moderate size, never a NaN. */
static uint32_t random_bits(sg_type t) {
    uint32_t r = random_u32();
    if (t == T_F16) return (r & 0x83ff) | (10 + (r >> 16) % 9) << 10;
    if (t == T_BF16) return (r & 0x807f) | (120 + (r >> 16) % 14) << 7;
    if (t == T_E5M2) return (r & 0x83) | (8 + (r >> 16) % 14) << 2;
    return (r & 127) == 127 ? 0 : r & 255;
}

/* The PTX ISA's words for element i of lane `lane`: "row = ..., col = ...". */
static void place_a(int bits, int lane, int i, int *row, int *col) {
    int group = lane >> 2, in_group = lane % 4;
    if (bits == 16) {
        *row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
        *col = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    } else {
        *row = (0 <= i && i < 4) || (8 <= i && i < 12) ? group : group + 8;
        *col = i < 8 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
    }
}

static void place_b(int bits, int lane, int i, int *row, int *col) {
    int in_group = lane % 4;
    *col = lane >> 2;
    if (bits == 16) *row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    else *row = i < 4 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
}

static void place_c(int lane, int i, int *row, int *col) {
    *row = i < 2 ? lane >> 2 : (lane >> 2) + 8;
    *col = lane % 4 * 2 + (i & 1);
}

static uint32_t a_bits[16][32], b_bits[32][8];
static float c_value[16][8];

static void fill_fragments(sg_type ta, sg_type tb, int bits, int depth) {
    int per = 32 / bits, row, col;
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < depth; k++) a_bits[r][k] = random_bits(ta);
    for (int k = 0; k < depth; k++)
        for (int c = 0; c < 8; c++) b_bits[k][c] = random_bits(tb);
    memset(registers, 0, sizeof registers);
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4 * per; i++) {
            place_a(bits, lane, i, &row, &col);
            registers[A0 + i / per][lane] |= (uint64_t)a_bits[row][col] << (i % per * bits);
        }
        for (int i = 0; i < 2 * per; i++) {
            place_b(bits, lane, i, &row, &col);
            registers[B0 + i / per][lane] |= (uint64_t)b_bits[row][col] << (i % per * bits);
        }
        for (int i = 0; i < 4; i++) {
            uint32_t u;
            place_c(lane, i, &row, &col);
            c_value[row][col] = (float)(int32_t)random_u32() * 0x1p-28f;
            memcpy(&u, &c_value[row][col], 4);
            registers[C0 + i][lane] = u;
        }
    }
}

static void check_product(sg_type ta, sg_type tb, int depth) {
    double largest = 0;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row, col;
            float got;
            place_c(lane, i, &row, &col);
            float ordered = c_value[row][col];
            double exact = ordered, size = fabs(exact);
            for (int k = 0; k < depth; k++) {
                double x = value_of(a_bits[row][k], ta), y = value_of(b_bits[k][col], tb);
                ordered = fmaf((float)x, (float)y, ordered);
                exact += x * y;
                size += fabs(x * y);
            }
            CHECK(registers[D0 + i][lane] >> 32 == 0, "upper bits are not zero");
            memcpy(&got, &registers[D0 + i][lane], 4);
            CHECK(!memcmp(&got, &ordered, 4), "lane %d, d%d: %g, not %g", lane, i, (double)got,
                  (double)ordered);
            largest = fmax(largest, fabs((double)got - exact) / size);
        }
    CHECK(largest < (depth + 1) * 0x1p-24, "relative error %g", largest);
}

static void check_mma(sg_type ta, sg_type tb, sg_mod shape, int bits, int depth) {
    sg_warp w = warp_of_all();
    sg_instr i = mma_of(ta, tb, shape);
    violations = 0;
    for (int trial = 0; trial < 50; trial++) {
        fill_fragments(ta, tb, bits, depth);
        CHECK(sg_tensor(NULL, &w, &i, ~0u), "is not its instruction");
        check_product(ta, tb, depth);
    }
    CHECK(!violations, "%d violations", violations);
}

static void test_mma_bf16(void) { check_mma(T_BF16, T_BF16, M_M16N8K16, 16, 16); }
static void test_mma_f16(void) { check_mma(T_F16, T_F16, M_M16N8K16, 16, 16); }
static void test_mma_e4m3(void) { check_mma(T_E4M3, T_E4M3, M_M16N8K32, 8, 32); }
static void test_mma_e5m2(void) { check_mma(T_E5M2, T_E5M2, M_M16N8K32, 8, 32); }
static void test_mma_e4m3_by_e5m2(void) { check_mma(T_E4M3, T_E5M2, M_M16N8K32, 8, 32); }

/* A matrix with one 1 finds each place by itself: D = A B picks one element. */
static void test_mma_one_element(void) {
    sg_warp w = warp_of_all();
    sg_instr instr = mma_of(T_E4M3, T_E4M3, M_M16N8K32);
    int row, col, wrong = 0;
    for (int k = 0; k < 32; k++) {
        memset(registers, 0, sizeof registers);
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 16; i++) {
                place_a(8, lane, i, &row, &col);
                if (row == k % 16 && col == k) registers[A0 + i / 4][lane] |= 0x38u << i % 4 * 8;
                if (i >= 8) continue;
                place_b(8, lane, i, &row, &col);
                if (row == k && col == k % 8) registers[B0 + i / 4][lane] |= 0x40u << i % 4 * 8;
            }
        (void)sg_tensor(NULL, &w, &instr, ~0u);
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                place_c(lane, i, &row, &col);
                bool here = row == k % 16 && col == k % 8;
                wrong += registers[D0 + i][lane] != (here ? 0x40000000u : 0u);
            }
    }
    CHECK(!wrong, "%d elements are wrong", wrong);
}

static void test_mma_in_place_and_nan(void) {
    sg_warp w = warp_of_all();
    sg_instr i = mma_of(T_BF16, T_BF16, M_M16N8K16);
    fill_fragments(T_BF16, T_BF16, 16, 16);
    (void)sg_tensor(NULL, &w, &i, ~0u);
    i.o[0] = registers_from(C0, 4);
    (void)sg_tensor(NULL, &w, &i, ~0u);
    CHECK(!memcmp(registers[C0], registers[D0], 4 * sizeof *registers), "D in place of C differs");
    registers[A0][0] = 0x7fc0;             /* A[0][0] is a NaN: row 0, held by lanes 0 to 3     */
    (void)sg_tensor(NULL, &w, &i, ~0u);
    for (int lane = 0; lane < 32; lane++)
        CHECK((registers[C0][lane] == 0x7fffffff) == (lane < 4), "lane %d", lane);
}

/* === ldmatrix ================================================================================= */

static sg_instr ldmatrix_of(sg_mod count, int n, bool trans) {
    sg_instr i = {.op = OP_LDMATRIX, .type = {T_B16}, .n_types = 1, .space = S_SHARED, .n = 2,
                  .vec = 1, .guard = -1};
    const sg_mod words[] = {M_SYNC, M_ALIGNED, M_M8N8, count};
    for (size_t k = 0; k < sizeof words / sizeof *words; k++) modify(&i, words[k]);
    if (trans) modify(&i, M_TRANS);
    i.o[0] = registers_from(D0, n);
    i.o[1] = (sg_operand){.kind = O_ADDR, .reg = ADDRESS, .symbol = -1, .imm = 32};
    return i;
}

static uint16_t element(const int *rows, int m, int row, int col) {
    uint16_t x;
    memcpy(&x, shared_memory + 32 + 16 * rows[8 * m + row] + 2 * col, 2);
    return x;
}

static void check_ldmatrix(sg_mod count, int n, bool trans) {
    sg_warp w = warp_of_all();
    sg_instr instr = ldmatrix_of(count, n, trans);
    int rows[32], wrong = 0;
    for (size_t k = 0; k < sizeof shared_memory; k++) shared_memory[k] = (uint8_t)random_u32();
    for (int trial = 0; trial < 20; trial++) {
        memset(registers, 0xa5, sizeof registers);
        for (int lane = 0; lane < 32; lane++) {
            rows[lane] = (int)(random_u32() % 200);
            registers[ADDRESS][lane] = lane < 8 * n ? (uint64_t)(16 * rows[lane]) : 1;
        }
        lanes_read = 0;
        violations = 0;
        CHECK(sg_tensor(NULL, &w, &instr, ~0u), "is not its instruction");
        CHECK(lanes_read == (uint32_t)((1ull << 8 * n) - 1), "addresses of lanes %x", lanes_read);
        for (int m = 0; m < n; m++)
            for (int lane = 0; lane < 32; lane++)
                for (int h = 0; h < 2; h++) {
                    int r = lane / 4, c = lane % 4 * 2 + h;
                    uint16_t want = trans ? element(rows, m, c, r) : element(rows, m, r, c);
                    wrong += (uint16_t)(registers[D0 + m][lane] >> 16 * h) != want;
                }
        CHECK(registers[D0 + n][0] == 0xa5a5a5a5a5a5a5a5u, "writes more than it should");
        CHECK(registers[D0][5] >> 32 == 0, "upper bits are not zero");
    }
    CHECK(!wrong && !violations, "%d wrong, %d violations", wrong, violations);
}

static void test_ldmatrix_x1(void) { check_ldmatrix(M_X1, 1, false); }
static void test_ldmatrix_x2(void) { check_ldmatrix(M_X2, 2, false); }
static void test_ldmatrix_x4(void) { check_ldmatrix(M_X4, 4, false); }
static void test_ldmatrix_x1_trans(void) { check_ldmatrix(M_X1, 1, true); }
static void test_ldmatrix_x2_trans(void) { check_ldmatrix(M_X2, 2, true); }
static void test_ldmatrix_x4_trans(void) { check_ldmatrix(M_X4, 4, true); }

/* A row-major A tile by ldmatrix.x4 and a row-major B[k][n] by .x2.trans are mma's fragments. */
static void test_ldmatrix_feeds_mma(void) {
    sg_warp w = warp_of_all();
    sg_instr load_a = ldmatrix_of(M_X4, 4, false), load_b = ldmatrix_of(M_X2, 2, true);
    fill_fragments(T_BF16, T_BF16, 16, 16);
    uint64_t a[4][SG_LANES], b[2][SG_LANES];
    memcpy(a, registers[A0], sizeof a);
    memcpy(b, registers[B0], sizeof b);
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++) memcpy(shared_memory + 32 + 32 * r + 2 * k, &a_bits[r][k], 2);
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < 8; c++) memcpy(shared_memory + 1056 + 16 * k + 2 * c, &b_bits[k][c], 2);
    for (int lane = 0; lane < 32; lane++)
        registers[ADDRESS][lane] = (uint64_t)(32 * (lane % 16) + 16 * (lane / 16));
    (void)sg_tensor(NULL, &w, &load_a, ~0u);
    CHECK(!memcmp(registers[D0], a, sizeof a), "A's fragments differ");
    for (int lane = 0; lane < 32; lane++)
        registers[ADDRESS][lane] = (uint64_t)(1024 + 16 * (lane % 16));
    (void)sg_tensor(NULL, &w, &load_b, ~0u);
    CHECK(!memcmp(registers[D0], b, sizeof b), "B's fragments differ");
}

/* === What is wrong or not known =============================================================== */

static void test_missing_lanes_are_a_violation(void) {
    sg_warp w = warp_of_all();
    sg_instr i = mma_of(T_BF16, T_BF16, M_M16N8K16), load = ldmatrix_of(M_X1, 1, false);
    memset(registers, 0, sizeof registers);
    registers[D0][7] = 99;
    violations = 0;
    (void)sg_tensor(NULL, &w, &i, ~(1u << 7));
    CHECK(violations == 1, "%d violations of mma", violations);
    CHECK(registers[D0][7] == 99, "a lane that did not run was written");
    (void)sg_tensor(NULL, &w, &load, 0xffff);
    CHECK(violations == 2, "%d violations with ldmatrix", violations);
    load.space = S_GENERIC;                /* the stand-in says: global                         */
    (void)sg_tensor(NULL, &w, &load, ~0u);
    CHECK(violations == 10, "%d violations with ldmatrix from elsewhere", violations);
}

static bool stops(sg_instr i) {
    sg_warp w = warp_of_all();
    if (setjmp(stopped)) return true;
    (void)sg_tensor(NULL, &w, &i, ~0u);
    return false;
}

static void test_unknown_forms_stop(void) {
    sg_instr i = mma_of(T_TF32, T_TF32, M_M16N8K8);
    CHECK(stops(i), "tf32 ran");
    i = mma_of(T_BF16, T_F16, M_M16N8K16);
    CHECK(stops(i), "bf16 by f16 ran");
    i = mma_of(T_BF16, T_BF16, M_M16N8K32);
    CHECK(stops(i), "bf16 of k32 ran");
    i = mma_of(T_F16, T_F16, M_M16N8K16);
    i.type[0] = T_F16;
    CHECK(stops(i), "F16 sums ran");
    i = mma_of(T_F16, T_F16, M_M16N8K16);
    modify(&i, M_SATFINITE);
    CHECK(stops(i), "satfinite ran");
    i = ldmatrix_of(M_X2, 4, false);
    CHECK(stops(i), ".x2 into 4 registers ran");
    i = (sg_instr){.op = OP_ADD};
    sg_warp w = warp_of_all();
    CHECK(!sg_tensor(NULL, &w, &i, ~0u), "add is no tensor instruction");
}

int main(void) {
    RUN(test_mma_bf16);
    RUN(test_mma_f16);
    RUN(test_mma_e4m3);
    RUN(test_mma_e5m2);
    RUN(test_mma_e4m3_by_e5m2);
    RUN(test_mma_one_element);
    RUN(test_mma_in_place_and_nan);
    RUN(test_ldmatrix_x1);
    RUN(test_ldmatrix_x2);
    RUN(test_ldmatrix_x4);
    RUN(test_ldmatrix_x1_trans);
    RUN(test_ldmatrix_x2_trans);
    RUN(test_ldmatrix_x4_trans);
    RUN(test_ldmatrix_feeds_mma);
    RUN(test_missing_lanes_are_a_violation);
    RUN(test_unknown_forms_stop);
    return check_done();
}
