/* test_ptx.c -- the PTX parser on what nvcc writes, on PTX by hand, and on damaged text.
 *
 *   .cu text, here  --nvcc -ptx-->  PTX  --sg_parse-->  sg_module: whole, and as the .cu says
 *   PTX by hand     ------------------------------->   known answers: branches, places, bits
 *   PTX with one word wrong  ---------------------->   an error with the word and its line
 *
 * Meeting points of branches are also found by trying: what cuts a branch from the end.          */
#include "../check.h"
#include "softgpu.h"

#include <unistd.h>

/* === 1. The .cu texts ========================================================================= */

static const char cu_flow[] =
    "extern __shared__ float dynamic[];\n"
    "__constant__ float table[4] = {1.f, 2.5f, -3e-7f, 4.f};\n"
    "__device__ int counter = 7;\n"
    "__device__ const char word[] = \"hello\";\n"
    "__device__ const char *word_at = word + 1;\n"
    "struct S { int a; float b; const float *p; char c; };\n"
    "__device__ __noinline__ float helper(float x, int n) {\n"
    "    float s = 0;\n"
    "    for (int i = 0; i < n; i++) s += __sinf(x + i);\n"
    "    return s;\n"
    "}\n"
    "__device__ __noinline__ float by_struct(S s, float x) { return s.a * x + s.b + s.c; }\n"
    "__device__ __noinline__ void by_pointer(float *p) { *p += 1; }\n"
    "template <int N, typename T> __device__ T sum(const T *x) {\n"
    "    T s = 0;\n"
    "    for (int i = 0; i < N; i++) s += x[i];\n"
    "    return s;\n"
    "}\n"
    "extern \"C\" __global__ void __launch_bounds__(128, 2)\n"
    "flow(float *x, const float *__restrict__ y, int n, S s) {\n"
    "    __shared__ float tile[32][4];\n"
    "    __shared__ __align__(16) unsigned char raw[1000];\n"
    "    int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
    "    if (i >= n) return;\n"
    "    tile[threadIdx.x & 31][0] = y[i];\n"
    "    raw[threadIdx.x] = (unsigned char)i;\n"
    "    dynamic[threadIdx.x] = x[i] * table[i & 3];\n"
    "    __syncthreads();\n"
    "    float v = dynamic[threadIdx.x ^ 1] + tile[(threadIdx.x + 1) & 31][0] + raw[i & 7];\n"
    "    if (i & 1) v = helper(v, i); else v = by_struct(s, v);\n"
    "    switch (i % 11) {\n"
    "    case 0: v += 1; break;\n"
    "    case 1: v *= 2;\n"
    "    case 2: v -= sinf(v); break;\n"
    "    case 3: v = x[2]; break;\n"
    "    case 4: v = sqrtf(v); break;\n"
    "    case 5: v = 1 / v; break;\n"
    "    default: v = expf(v);\n"
    "    }\n"
    "    float local[8];\n"
    "    for (int k = 0; k < 8; k++) local[k] = v * k;\n"
    "    by_pointer(local + (i & 7));\n"
    "    for (int k = 0; k < n; k++) {\n"
    "        v += local[(k + i) & 7];\n"
    "        if (v > 100) break;\n"
    "        if (v < -3) continue;\n"
    "        v *= 1.5f;\n"
    "    }\n"
    "    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);\n"
    "    atomicAdd(&counter, 1);\n"
    "    x[i] = v + sum<3>(x) + (float)word_at[i & 3];\n"
    "}\n";

static const char cu_asm[] =
    "#include <stdint.h>\n"
    "template <bool TRANS> __device__ void load2(unsigned *r, unsigned a) {\n"
    "    if (TRANS)\n"
    "        asm volatile(\"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\"\n"
    "        : \"=r\"(r[0]), \"=r\"(r[1]) : \"r\"(a));\n"
    "    else asm volatile(\"ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\"\n"
    "        : \"=r\"(r[0]), \"=r\"(r[1]) : \"r\"(a));\n"
    "}\n"
    "extern \"C\" __global__ void tensor(const uint4 *x, float *y) {\n"
    "    __shared__ uint4 s[64];\n"
    "    unsigned a = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x]), r[4], q[2];\n"
    "    asm volatile(\"cp.async.cg.shared.global [%0], [%1], 16;\" :: \"r\"(a), \"l\"(x));\n"
    "    asm volatile(\"cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;\"\n"
    "        :: \"r\"(a + 512), \"l\"(x + 1), \"r\"(4));\n"
    "    asm volatile(\"cp.async.commit_group;\");\n"
    "    asm volatile(\"cp.async.wait_group 0;\");\n"
    "    asm volatile(\"cp.async.wait_all;\");\n"
    "    asm volatile(\"bar.sync 1, 64;\");\n"
    "    asm volatile(\"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\"\n"
    "        : \"=r\"(r[0]), \"=r\"(r[1]), \"=r\"(r[2]), \"=r\"(r[3]) : \"r\"(a));\n"
    "    load2<true>(q, a);\n"
    "    load2<false>(q, a + q[1]);\n"
    "    float c[4] = {0, 0, 0, 0}, t;\n"
    "    asm volatile(\"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 \"\n"
    "        \"{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\"\n"
    "        : \"+f\"(c[0]), \"+f\"(c[1]), \"+f\"(c[2]), \"+f\"(c[3])\n"
    "        : \"r\"(r[0]), \"r\"(r[1]), \"r\"(r[2]), \"r\"(r[3]), \"r\"(q[0]), \"r\"(q[1]));\n"
    "#if __CUDA_ARCH__ >= 890\n"
    "    asm volatile(\"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 \"\n"
    "        \"{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\"\n"
    "        : \"+f\"(c[0]), \"+f\"(c[1]), \"+f\"(c[2]), \"+f\"(c[3])\n"
    "        : \"r\"(r[0]), \"r\"(r[1]), \"r\"(r[2]), \"r\"(r[3]), \"r\"(q[0]), \"r\"(q[1]));\n"
    "#endif\n"
    "    asm volatile(\"{ .reg .pred p; .reg .f32 q; setp.gt.f32 p, %1, 0f3F800000;\"\n"
    "        \"selp.f32 %0, %1, 0f00000000, p; mov.f32 q, 1.5;\"\n"
    "        \"@p bra L; add.f32 %0, %0, q; L: }\"\n"
    "        : \"=f\"(t) : \"f\"(c[0]));\n"
    "    asm volatile(\"{ .reg .pred p; setp.lt.f32 p, %0, 0.25;\"\n"
    "        \"@!p bra L; neg.f32 %0, %0; L: }\"\n"
    "        : \"+f\"(t));\n"
    "    y[threadIdx.x] = c[0] + c[1] + t;\n"
    "}\n";

static const char cu_types[] =
    "#include <cuda_fp16.h>\n"
    "#include <cuda_bf16.h>\n"
    "#include <cuda_fp8.h>\n"
    "#include <cuda_fp4.h>\n"
    "#include <assert.h>\n"
    "typedef unsigned long long u64;\n"
    "extern \"C\" __global__ void types(uint4 *x,\n"
    "      __half *h, __nv_bfloat16 *b, double *d, u64 *q) {\n"
    "    uint4 v = x[threadIdx.x];\n"
    "    v.x ^= v.y;\n"
    "    v.z = __funnelshift_l(v.x, v.y, 7);\n"
    "    v.w = __byte_perm(v.x, v.y, 0x3210) + __dp4a(v.x, v.y, v.z) + __ffs(v.x);\n"
    "    x[threadIdx.x + 32] = v;\n"
    "    h[1] = h[0] * h[2] + __float2half(3.0f);\n"
    "    b[1] = b[0] * b[2] + __float2bfloat16(1.25f);\n"
    "    *(__half2 *)h = __hfma2(*(__half2 *)h, *(__half2 *)h, *(__half2 *)h);\n"
    "    *(__nv_bfloat162 *)b = __hadd2(*(__nv_bfloat162 *)b, *(__nv_bfloat162 *)b);\n"
    "    *(float *)d = h[3] > h[4] ? hexp(h[5]) : __half(tanhf(h[6]));\n"
    "    d[0] = d[1] / d[2] + 1.5 * exp(d[3]) + rsqrt(d[5]) + log(d[6]) + pow(d[1], d[2]);\n"
    "    q[0] = q[1] / q[2] + __umul64hi(q[3], q[4]) + __popcll(q[1]) + __clzll(q[2]);\n"
    "    q[1] = __brevll(q[1]) % (q[2] | 1) + clock64();\n"
    "    q[2] = (u64)((long long)q[3] >> 3) + (q[4] << q[5]) + (q[2] > q[3]);\n"
    "    __nv_fp8_e4m3 e((float)d[8]);\n"
    "    __nv_fp8_e5m2 f((float)d[8]);\n"
    "    h[7] = (__half)e + (__half)f;\n"
    "    __nv_fp4_e2m1 g((float)d[9]);\n"
    "    d[9] = (float)g;\n"
    "    unsigned m = __ballot_sync(~0u, v.x > 3) + __match_any_sync(~0u, v.y) + __activemask();\n"
    "    m += __reduce_add_sync(~0u, v.x) + __reduce_max_sync(~0u, (int)v.y) +\n"
    "         __any_sync(~0u, v.z) + __all_sync(~0u, v.w) + __popc(__match_any_sync(1, q[3])) +\n"
    "         __syncthreads_count(v.x) + __syncthreads_or(v.y) + __isShared(x);\n"
    "    int all; m += __match_all_sync(~0u, v.x, &all); m += all;\n"
    "    atomicAdd((float *)h, 1.5f); atomicCAS(q, m, 2); atomicMax((int *)x, 3);\n"
    "    atomicAdd((unsigned *)x, m); atomicExch(&x[1].x, 5); atomicAnd(&x[1].y, m);\n"
    "    __threadfence(); __threadfence_block(); __threadfence_system(); __syncwarp();\n"
    "    __nanosleep(100);\n"
    "    q[9] = __ldg(q + 8) + __ldcg(q + 7) + m +\n"
    "        (u64)__float2int_rd(1.5f * m) + __sad(m, 1, 2);\n"
    "    d[10] = fmodf(m, 3.f) + sinf(m) + cosf(m) + powf(m, 1.1f) +\n"
    "        fmaxf(m, d[3]) + fabsf(d[4]);\n"
    "    d[11] = __fdividef(m, 3.f) + __expf(m) + __logf(m) + __frsqrt_rn(m) +\n"
    "        erff(m) + ldexpf(m, 3);\n"
    "    d[12] = rintf(m * .5f) + floorf(m * .7f) + (float)(signed char)m + (short)m +\n"
    "        isnan(d[3]);\n"
    "    assert(m != 77);\n"
    "    if (threadIdx.x > 1000) __trap();\n"
    "}\n";

/* A function with static and dynamic shared memory, called by two kernels. */
static const char cu_shared[] =
    "extern __shared__ __align__(64) int pool[];\n"
    "__shared__ int both[10];\n"
    "__device__ __noinline__ int common(int i) {\n"
    "    __shared__ int mine[3];\n"
    "    mine[i] = i;\n"
    "    pool[i] = 2;\n"
    "    __syncthreads();\n"
    "    return mine[2 - i] + pool[0];\n"
    "}\n"
    "extern \"C\" __global__ void small(int *x) { *x = common(*x); }\n"
    "extern \"C\" __global__ void large(int *x) {\n"
    "    __shared__ int more[100];\n"
    "    more[threadIdx.x] = 1; both[threadIdx.x] = 2;\n"
    "    __syncthreads();\n"
    "    *x = common(*x) + more[5] + both[5];\n"
    "}\n"
    "extern \"C\" __global__ void alone(int *x) {\n"
    "    both[threadIdx.x] = 2;\n"
    "    __syncthreads();\n"
    "    *x = both[5];\n"
    "}\n";

/* === 2. nvcc and modules ====================================================================== */

static bool have_nvcc;
static char why[300];

static char *file_text(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    (void)fseek(f, 0, SEEK_END);
    long n = ftell(f);
    rewind(f);
    char *text = malloc((size_t)n + 1);
    *len = fread(text, 1, (size_t)n, f);
    text[*len] = 0;
    (void)fclose(f);
    return text;
}

/* The PTX of a .cu text for compute_CC. */
static char *ptx_of(const char *cu, int cc, size_t *len) {
    char dir[] = "/tmp/test_ptx.XXXXXX", path[100], out[100], command[400];
    if (!mkdtemp(dir)) return NULL;
    (void)snprintf(path, sizeof path, "%s/x.cu", dir);
    (void)snprintf(out, sizeof out, "%s/x.ptx", dir);
    FILE *f = fopen(path, "wb");
    if (!f) return NULL;
    (void)fputs(cu, f);
    (void)fclose(f);
    (void)snprintf(command, sizeof command,
                   "nvcc -ptx -arch=compute_%d -lineinfo -o %s %s 2>%s/err || cat %s/err", cc, out,
                   path, dir, dir);
    int failed = system(command);
    char *text = failed ? NULL : file_text(out, len);
    (void)snprintf(command, sizeof command, "rm -r %s", dir);
    if (system(command)) return NULL;
    return text;
}

static sg_module *parse(const char *text) { return sg_parse(text, strlen(text), why, sizeof why); }

/* A module of one entry "k" around a body. */
static sg_module *parse_body(const char *body) {
    char text[8192];
    (void)snprintf(text, sizeof text,
                   ".version 9.0\n.target sm_80\n.address_size 64\n"
                   ".visible .entry k(.param .u64 a, .param .u32 n)\n{\n"
                   ".reg .pred %%p<9>; .reg .b16 %%rs<9>; .reg .b32 %%r<9>; .reg .b64 %%rd<9>; "
                   ".reg .f32 %%f<9>; .reg .f64 %%fd<9>;\n%s\n}\n", body);
    sg_module *m = parse(text);
    CHECK(m != NULL, "%s", why);
    return m;
}

static const sg_func *func_named(const sg_module *m, const char *name) {
    for (int f = 0; f < m->n_funcs; f++)
        if (strstr(m->func[f].name, name)) return &m->func[f];
    return NULL;
}

static const sg_symbol *symbol_named(const sg_func *f, const char *name) {
    for (int s = 0; s < f->n_symbols; s++)
        if (strstr(f->symbol[s].name, name)) return &f->symbol[s];
    return NULL;
}

static int count_op(const sg_func *f, sg_op op) {
    int n = 0;
    for (int i = 0; i < f->n; i++) n += f->code[i].op == op;
    return n;
}

static void check_operand(const sg_module *m, const sg_func *f, const sg_instr *i,
                          const sg_operand *o) {
    bool call = i->op == OP_CALL;
    CHECK(o->kind >= O_REG && o->kind <= O_FUNC, "kind %d", o->kind);
    if (o->kind == O_REG) CHECK(o->reg >= 0 && o->reg < f->n_regs, "register %d", o->reg);
    if (o->kind == O_SPECIAL) CHECK(o->reg >= 0 && o->reg < SR_N, "special %d", o->reg);
    if (o->kind == O_LABEL) CHECK(o->reg >= 0 && o->reg < f->n, "label %d", o->reg);
    if (o->kind == O_FUNC) CHECK(o->reg >= 0 && o->reg < m->n_funcs, "function %d", o->reg);
    if (o->kind == O_SYMBOL || o->kind == O_ADDR)
        CHECK(o->symbol >= (o->kind == O_ADDR ? -1 : 0) && o->symbol < f->n_symbols, "symbol");
    if (o->kind == O_ADDR) CHECK(o->reg >= -1 && o->reg < f->n_regs, "base %d", o->reg);
    for (int e = 0; e < o->n; e++)
        CHECK(o->vec[e] >= -2 && o->vec[e] < (call ? f->n_symbols : f->n_regs), "element %d", e);
}

/* Everything that exec.c takes for granted. */
static void check_module(const sg_module *m) {
    for (int k = 0; k < m->n_funcs; k++) {
        const sg_func *f = &m->func[k];
        CHECK(f->n > 0, "%s is empty", f->name);
        CHECK(f->code[f->n - 1].op == OP_RET || f->code[f->n - 1].op == OP_EXIT, "%s", f->name);
        for (int i = 0; i < f->n; i++) {
            const sg_instr *c = &f->code[i];
            CHECK(c->guard >= -1 && c->guard < f->n_regs, "guard %d", c->guard);
            CHECK(c->reconverge >= -1 && c->reconverge < f->n, "reconverge %d", c->reconverge);
            CHECK(c->file >= 0 && c->file < (m->n_files ? m->n_files : 1), "file %d", c->file);
            for (int o = 0; o < c->n; o++) check_operand(m, f, c, &c->o[o]);
        }
        for (int s = 0; s < f->n_symbols; s++) {
            const sg_symbol *y = &f->symbol[s];
            bool named = y->space == S_GLOBAL || y->space == S_CONST;
            CHECK(named == (y->module_symbol >= 0) && y->module_symbol < m->n_symbols, "%s",
                  y->name);
            CHECK(y->offset % y->align == 0, "%s is not aligned", y->name);
            if (y->space == S_SHARED && f->entry)
                CHECK(y->offset + y->bytes <= f->shared_bytes, "%s is outside", y->name);
        }
    }
}

/* === 3. Where branches meet, by trying ======================================================== */

static int next_of(const sg_func *f, int i, int *to) {       /* f->n: the end                   */
    const sg_instr *c = &f->code[i];
    bool ends = c->op == OP_RET || c->op == OP_EXIT, jumps = c->op == OP_BRA;
    int n = 0;
    if (ends) to[n++] = f->n;
    if (jumps) to[n++] = c->o[0].reg;
    if ((!ends && !jumps) || c->guard >= 0) to[n++] = i + 1;
    return n;
}

/* Whether the end is reached from `from` without instruction `without`. */
static bool reaches_end(const sg_func *f, int from, int without, int *stack, uint8_t *seen) {
    int depth = 0, to[2];
    memset(seen, 0, (size_t)f->n + 1);
    stack[depth++] = from;
    while (depth) {
        int i = stack[--depth];
        if (i == f->n) return true;
        int n = next_of(f, i, to);
        for (int e = 0; e < n; e++)
            if (to[e] != without && !seen[to[e]]) {
                seen[to[e]] = 1;
                stack[depth++] = to[e];
            }
    }
    return false;
}

/* The nearest instruction that every path from i to the end passes, or -1. */
static int meets_at(const sg_func *f, int i, int *stack, uint8_t *seen) {
    int nearest = -1;
    if (!reaches_end(f, i, -1, stack, seen)) return -1;
    for (int k = 0; k < f->n; k++) {
        if (k == i || reaches_end(f, i, k, stack, seen)) continue;
        if (nearest < 0 || !reaches_end(f, k, nearest, stack, seen)) nearest = k;
    }
    return nearest;
}

static bool only_leaves(const sg_func *f, int i) {
    return i < 0 || ((f->code[i].op == OP_RET || f->code[i].op == OP_EXIT) &&
                     f->code[i].guard < 0);
}

/* All branches with a condition.  Where the definition says only "at the end", ptx.c may say
 * better; else they agree. */
static int check_meetings(const sg_func *f) {
    int *stack = malloc(((size_t)f->n + 2) * 2 * sizeof *stack), n = 0;
    uint8_t *seen = malloc((size_t)f->n + 2);
    for (int i = 0; i < f->n; i++) {
        if (f->code[i].op != OP_BRA || f->code[i].guard < 0) continue;
        int want = meets_at(f, i, stack, seen), got = f->code[i].reconverge;
        CHECK(only_leaves(f, want) || got == want, "%s: branch at %d meets at %d, not %d", f->name,
              i, want, got);
        n++;
    }
    free(stack);
    free(seen);
    return n;
}

/* Instruction k has label Lk; the i-th branch's answer. */
static void check_answers(const char *body, const int *answers) {
    sg_module *m = parse_body(body);
    if (!m) return;
    check_module(m);
    const sg_func *f = sg_find(m, "k");
    for (int i = 0, k = 0; i < f->n; i++) {
        if (f->code[i].op != OP_BRA || f->code[i].guard < 0) continue;
        CHECK(f->code[i].reconverge == answers[k], "branch %d: %d, not %d", k,
              f->code[i].reconverge, answers[k]);
        k++;
    }
    (void)check_meetings(f);
    sg_module_free(m);
}

static void test_branches_if_else(void) {
    check_answers("@%p1 bra A; mov.u32 %r1, 1; bra.uni B;\n"
                  "A: mov.u32 %r1, 2;\nB: mov.u32 %r2, %r1; ret;", (int[]){4});
}

static void test_branches_nested(void) {
    check_answers("@%p1 bra A; @!%p2 bra B; mov.u32 %r1, 1;\n"
                  "B: mov.u32 %r2, 2; @%p3 bra A; mov.u32 %r4, 4;\n"
                  "A: st.global.u32 [%rd1], %r1; ret;", (int[]){6, 3, 6});
}

static void test_branches_loop(void) {
    check_answers("mov.u32 %r1, 0; setp.eq.s32 %p1, %r2, 0; @%p1 bra D;\n"
                  "L: add.s32 %r1, %r1, 1; @%p2 bra D; @%p3 bra C; add.s32 %r3, %r3, 1;\n"
                  "C: setp.lt.s32 %p4, %r1, %r2; @%p4 bra L;\n"
                  "D: st.global.u32 [%rd1], %r1; ret;", (int[]){9, 9, 7, 9});
}

/* if (n) return; in the middle of an if, and at the top of all. */
static void test_branches_that_leave(void) {
    check_answers("@%p1 bra E; mov.u32 %r1, 1; bar.sync 0;\nE: ret;", (int[]){1});
    check_answers("@%p1 bra Z; @%p2 bra E; mov.u32 %r1, 1;\n"
                  "Z: mov.u32 %r2, 1; bar.sync 0;\nE: ret;", (int[]){3, 2});
    check_answers("@%p1 bra X; bra.uni Y;\nX: st.global.u32 [%rd1], 1; ret;\n"
                  "Y: mov.u32 %r2, 1; bar.sync 0; ret;", (int[]){1});
    check_answers("@%p1 ret; @%p2 bra A; mov.u32 %r1, 1; @%p3 exit;\nA: mov.u32 %r2, 1; ret;",
                  (int[]){4});
}

static void test_branches_without_end(void) {
    check_answers("L: add.s32 %r1, %r1, 1; @%p1 bra L; bra.uni L;", (int[]){-1});
    check_answers("L: @%p1 bra E; add.s32 %r1, %r1, 1; bra.uni L;\nE: ret;", (int[]){3});
    check_answers("@%p1 bra E; L: @%p2 bra M; mov.u32 %r1, 1; M: @%p3 bra L;\nE: ret;",
                  (int[]){1, 3, 4});
}

/* Random graphs, with everything that can be between branches. */
static void test_branches_at_random(void) {
    uint64_t state = 1;
    int n = 0;
    for (int trial = 0; trial < 3000; trial++) {
        char body[4096];
        size_t at = 0;
        int lines = 3 + trial % 30;
        for (int i = 0; i < lines; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            unsigned r = (unsigned)(state >> 33), to = r / 64 % (unsigned)lines;
            int kind = (int)(r % 16);
            const char *fmt = kind < 6 ? "L%d: @%%p1 bra L%u;\n" : kind < 8 ? "L%d: bra L%u;\n" :
                kind == 8 ? "L%d: ret;\n" : kind == 9 ? "L%d: @%%p2 ret;\n" : "L%d: add.s32 "
                "%%r1, %%r1, %u;\n";
            at += (size_t)snprintf(body + at, sizeof body - at, fmt, i, to);
        }
        sg_module *m = parse_body(body);
        if (!m) return;
        n += check_meetings(&m->func[0]);
        if (check_failed_here) printf("%s", body);
        sg_module_free(m);
        if (check_failed_here) return;
    }
    NOTE("%d branches", n);
}

/* === 4. What nvcc writes ====================================================================== */

static void check_flow(const sg_module *m) {
    const sg_func *k = sg_find(m, "flow"), *h = func_named(m, "helper");
    CHECK(k && h && !h->entry && !sg_find(m, h->name), "functions are missing");
    if (!k || !h) return;
    CHECK(k->max_threads == 128 && k->min_blocks == 2, "launch bounds %d %d", k->max_threads,
          k->min_blocks);
    CHECK(k->n_params == 4 && k->args_bytes == 48 && k->symbol[3].bytes == 24, "parameters");
    CHECK(h->n_params == 2 && h->n_results == 1 && h->symbol[2].offset == 8, "of a function");
    CHECK(k->local_bytes >= 32, "local memory: %d bytes", (int)k->local_bytes);
    CHECK(count_op(k, OP_CALL) >= 3 && count_op(k, OP_SHFL) == 5, "calls, shuffles");
    const sg_symbol *raw = symbol_named(k, "raw"), *d = symbol_named(k, "dynamic");
    CHECK(raw && d && raw->bytes == 1000 && d->bytes == 0 && d->offset == k->shared_bytes &&
          k->shared_bytes == 1520, "shared memory: %d bytes", (int)k->shared_bytes);
    for (int i = 0; i < m->n_symbols; i++) {
        const sg_symbol *y = &m->symbol[i];
        float f[4];
        if (!strcmp(y->name, "table")) {
            CHECK(y->space == S_CONST && y->bytes == 16 && y->init, "table");
            memcpy(f, y->init, 16);
            CHECK(f[1] == 2.5f && f[2] == -3e-7f, "%g %g", (double)f[1], (double)f[2]);
        }
        if (!strcmp(y->name, "counter")) CHECK(y->init && y->init[0] == 7, "counter");
        if (!strcmp(y->name, "word")) CHECK(!memcmp(y->init, "hello", 6), "word");
        if (!strcmp(y->name, "word_at")) {
            CHECK(m->n_relocs == 1 && m->reloc[0].symbol == i && m->reloc[0].addend == 1 &&
                  !strcmp(m->symbol[m->reloc[0].target].name, "word"), "word_at");
        }
    }
    int lines = 0;
    for (int i = 0; i < k->n; i++) lines += k->code[i].line >= 21 && k->code[i].line <= 55;
    CHECK(lines > k->n / 2, "lines of the .cu: %d of %d instructions", lines, k->n);
    CHECK(m->n_files > 1 && strstr(m->file[1], "x.cu"), "files");
}

static void check_asm(const sg_module *m) {
    const sg_func *k = sg_find(m, "tensor");
    CHECK(k != NULL, "no kernel");
    if (!k) return;
    CHECK(count_op(k, OP_MMA) == (m->cc >= 89 ? 2 : 1), "%d mma", count_op(k, OP_MMA));
    CHECK(count_op(k, OP_LDMATRIX) == 3 && count_op(k, OP_CP_ASYNC) == 2, "asm is missing");
    CHECK(count_op(k, OP_CP_COMMIT) == 1 && count_op(k, OP_CP_WAIT) == 1 &&
          count_op(k, OP_CP_WAIT_ALL) == 1 && count_op(k, OP_BAR_SYNC) == 1, "asm is missing");
    for (int i = 0; i < k->n; i++) {
        const sg_instr *c = &k->code[i];
        if (c->op == OP_MMA && c->type[1] == T_BF16)
            CHECK(c->o[1].n == 4 && c->o[2].n == 2 && sg_has(c, M_M16N8K16) && sg_has(c, M_COL) &&
                  c->type[3] == T_F32 && c->n == 4, "mma");
        if (c->op == OP_LDMATRIX)
            CHECK(c->space == S_SHARED && c->type[0] == T_B16 && c->o[1].kind == O_ADDR,
                  "ldmatrix");
        if (c->op == OP_CP_ASYNC && sg_has(c, M_CG))
            CHECK(c->n == 3 && c->o[2].imm == 16 && c->space == S_SHARED, "cp.async");
        if (c->op == OP_CP_ASYNC && sg_has(c, M_CA))
            CHECK(c->n == 4 && c->o[2].imm == 8 && sg_has(c, M_L2_128B), "cp.async");
        if (c->op == OP_MOV && c->o[1].kind == O_IMM && strstr(c->text, "1.5;") == c->text + 11)
            CHECK(c->o[1].imm == 0x3fc00000, "1.5 is %llx", (unsigned long long)c->o[1].imm);
    }
}

static void check_types(const sg_module *m) {
    const sg_func *k = sg_find(m, "types"), *a = func_named(m, "__assertfail");
    CHECK(k && a && a->external && a->code[0].op == OP_TRAP && !a->entry, "functions");
    if (k) NOTE("%d instructions", k->n);
}

static void check_shared(const sg_module *m) {
    const sg_func *small = sg_find(m, "small"), *large = sg_find(m, "large");
    const sg_func *alone = sg_find(m, "alone"), *common = func_named(m, "common");
    CHECK(small && large && alone && common, "functions");
    if (!small || !large || !alone || !common) return;
    const sg_symbol *mine = symbol_named(common, "mine"), *pool = symbol_named(common, "pool");
    const sg_symbol *more = symbol_named(large, "more"), *both = symbol_named(large, "both");
    CHECK(mine && pool && more && both, "variables");
    if (!mine || !pool || !more || !both) return;
    CHECK(pool->offset == small->shared_bytes && pool->offset == large->shared_bytes,
          "dynamic memory lies at %d, %d, %d", (int)pool->offset, (int)small->shared_bytes,
          (int)large->shared_bytes);
    CHECK(mine->offset + 12 <= more->offset || more->offset + 400 <= mine->offset, "overlap");
    CHECK(both->offset + 40 <= more->offset || more->offset + 400 <= both->offset, "overlap");
    CHECK(alone->shared_bytes == 40, "alone has %d", (int)alone->shared_bytes);
}

static void check_cu(const char *cu, void (*check)(const sg_module *)) {
    static const int ccs[] = {80, 89, 120};
    if (!have_nvcc) {
        NOTE("skipped: no nvcc");
        return;
    }
    int branches = 0;
    for (int c = 0; c < 3; c++) {
        size_t len = 0;
        char *text = ptx_of(cu, ccs[c], &len);
        CHECK(text != NULL, "nvcc fails for compute_%d", ccs[c]);
        sg_module *m = text ? sg_parse(text, len, why, sizeof why) : NULL;
        CHECK(m != NULL, "compute_%d: %s", ccs[c], why);
        if (m) {
            CHECK(m->cc == ccs[c], "cc is %d", m->cc);
            check_module(m);
            for (int f = 0; f < m->n_funcs; f++)
                if (m->func[f].n < 1000) branches += check_meetings(&m->func[f]);
            check(m);
        }
        sg_module_free(m);
        free(text);
    }
    if (!check_note[0]) NOTE("%d branches", branches);
}

static void test_nvcc_flow(void) { check_cu(cu_flow, check_flow); }
static void test_nvcc_asm(void) { check_cu(cu_asm, check_asm); }
static void test_nvcc_types(void) { check_cu(cu_types, check_types); }
static void test_nvcc_shared(void) { check_cu(cu_shared, check_shared); }

/* === 5. Numbers, text, scopes ================================================================= */

static void test_immediates_are_bits_of_the_type(void) {
    static const struct { const char *text; int operand; uint64_t bits; } cases[] = {
        {"mov.f32 %f1, 0f3FC00000;", 1, 0x3fc00000},
        {"mov.f32 %f1, 1.5;", 1, 0x3fc00000},
        {"add.f32 %f1, %f2, -2.5e-1;", 2, 0xbe800000},
        {"mov.f64 %fd1, 1.5;", 1, 0x3ff8000000000000},
        {"mov.f64 %fd1, 0d3FF8000000000000;", 1, 0x3ff8000000000000},
        {"mov.f64 %fd1, 0f3FC00000;", 1, 0x3ff8000000000000},
        {"mov.b32 %f1, 0f7F800001;", 1, 0x7f800001},
        {"mov.b16 %rs1, 0x8000U;", 1, 0x8000},
        {"add.s32 %r1, %r1, -4;", 2, (uint64_t)-4},
        {"or.b32 %r1, %r1, 0b101;", 2, 5},
        {"or.b32 %r1, %r1, 017;", 2, 15},
        {"or.b64 %rd1, %rd1, 0xffffffffffffffff;", 2, UINT64_MAX},
        {"cvt.f64.f32 %fd1, 0.5;", 1, 0x3f000000},
        {"setp.gt.f32 %p1, %f1, 0f3F800000;", 2, 0x3f800000},
        {"selp.f64 %fd1, 0.5, %fd2, %p1;", 1, 0x3fe0000000000000},
        {"slct.f64.f32 %fd1, %fd2, %fd3, 1.0;", 3, 0x3f800000},
        {"st.global.f32 [%rd1+-4], 0fBF800000;", 1, 0xbf800000},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        sg_module *m = parse_body(cases[k].text);
        if (!m) return;
        const sg_operand *o = &m->func[0].code[0].o[cases[k].operand];
        CHECK(o->kind == O_IMM && o->imm == cases[k].bits, "%s: %llx", cases[k].text,
              (unsigned long long)o->imm);
        sg_module_free(m);
    }
}

static void test_instructions_in_detail(void) {
    sg_module *m = parse_body(
        "shfl.sync.bfly.b32 \t%r1|%p1, %r2,\n 1, 31, -1;\n"
        "@!%p2 ld.volatile.global.v4.u32 {%r1, _, %r3, %r4}, [%rd1+16];\n"
        "setp.lt.and.s32 %p1, %tid.x, %r1, !%p2;\n"
        "ld.param.u64 %rd1, [a+4];\nmov.b64 {%r1, %r2}, %rd1;\nmov.b64 %rd1, {%r1, 7};\n"
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f2;\natom.global.add.u32 _, [%rd1], 1;");
    if (!m) return;
    const sg_func *f = sg_find(m, "k");
    const sg_instr *c = f->code;
    char text[100];
    sg_text(f, &c[0], text, sizeof text);
    CHECK(!strcmp(text, "shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;"), "%s", text);
    sg_text(f, &c[0], text, 10);
    CHECK(!strcmp(text, "shfl.sync"), "%s", text);
    CHECK(c[0].n == 6 && f->reg[c[0].o[1].reg] == T_PRED && c[0].o[5].imm == UINT64_MAX, "shfl");
    CHECK(c[1].guard >= 0 && c[1].guard_not && c[1].vec == 4 && c[1].space == S_GLOBAL &&
          c[1].type[0] == T_U32 && sg_has(&c[1], M_VOLATILE), "ld");
    CHECK(c[1].o[0].n == 4 && c[1].o[0].vec[1] == -1 && c[1].o[1].imm == 16, "ld's operands");
    CHECK(c[2].n == 4 && c[2].o[1].kind == O_SPECIAL && c[2].o[3].negate && sg_has(&c[2], M_LT) &&
          sg_has(&c[2], M_AND), "setp");
    CHECK(c[3].o[1].symbol == 0 && c[3].o[1].reg == -1 && c[3].o[1].imm == 4, "ld.param");
    CHECK(c[4].o[0].n == 2 && c[5].o[1].vec[1] == -2 && c[5].o[1].vec_imm[1] == 7, "mov");
    CHECK(c[6].n == 3 && c[6].type[0] == T_E4M3X2 && c[6].type[1] == T_F32 &&
          sg_has(&c[6], M_SATFINITE), "cvt");
    CHECK(c[7].o[0].kind == O_SINK, "atom");
    CHECK(f->n == 9 && c[8].op == OP_RET && c[7].ptx_line == 15, "ends at %d, line %d", f->n,
          c[7].ptx_line);
    CHECK(!strcmp(f->reg_name[c[0].o[0].reg], "%r1"), "%s", f->reg_name[c[0].o[0].reg]);
    CHECK(!sg_find(m, "a") && sg_type_bytes(T_F16X2) == 4 && sg_type_bytes(T_E4M3X2) == 2 &&
          sg_type_signed(T_S8) && !sg_type_signed(T_F32) && sg_type_float(T_BF16), "types");
    sg_module_free(m);
}

static void test_scopes_hide_names(void) {
    sg_module *m = parse_body("{ .reg .b32 t; mov.u32 t, 1; bra L; { .reg .b64 t; mov.u64 t, 2;\n"
                              "L: } mov.u32 t, 3; L: mov.u32 t, 4; }\n"
                              "{ .reg .b32 t; bra L; L: mov.u32 t, 5; }");
    if (!m) return;
    const sg_func *f = &m->func[0];
    const sg_instr *c = f->code;
    CHECK(c[0].o[0].reg == c[3].o[0].reg && c[0].o[0].reg != c[2].o[0].reg &&
          c[0].o[0].reg != c[6].o[0].reg && f->reg[c[2].o[0].reg] == T_B64, "registers");
    CHECK(c[1].o[0].reg == 4 && c[5].o[0].reg == 6, "labels %d %d", c[1].o[0].reg, c[5].o[0].reg);
    sg_module_free(m);
}

/* === 6. What is not known, and damage ========================================================= */

static void test_unknown_words_are_named_with_their_line(void) {
    static const struct { const char *text, *says; } cases[] = {
        {"\nfrobnicate.b32 %r1;", "PTX line 8: unknown opcode frobnicate.b32"},
        {"add.wild.s32 %r1, %r1, 1;", "unknown modifier wild of add.wild.s32"},
        {"cp.async.bulk.shared.global [%rd1], [%rd2], 16;", "unknown modifier bulk"},
        {"wgmma.fence.sync.aligned;", "unknown opcode wgmma"},
        {"brx.idx %r1, L;", "unknown opcode brx.idx"},
        {"ld.shared::cluster.u32 %r1, [%r2];", "unknown modifier shared::cluster"},
        {".branchtargets L;", "PTX line 7: unknown directive .branchtargets"},
        {".reg .q32 %q;", "unknown type or directive .q32"},
        {"mov.u32 %r1, %zork;", "unknown register %zork"},
        {"mov.u32 %r1, %r9;", "unknown register %r9"},
        {"mov.u32 %r1, %tid.w;", "unknown register %tid.w"},
        {"mov.u32 %r1, thing;", "no operand is thing"},
        {"ld.global.u32 %r1, [thing];", "thing is not declared"},
        {"bra.uni NOWHERE;", "no label NOWHERE"},
        {"call.uni nobody, ();", "call of nobody"},
        {"add.s32 %r1, %r2;", "; where , should be"},
        {"add.s32 %r1, %r2, %r3, %r4;", ", where ; or the next operand should be"},
        {"add %r1, %r2, %r3;", "add has 0 types, not 1"},
        {"add.f32.bf16 %f1, %f2, %f3;", "add.f32.bf16 has 2 types"},
        {"ld.global.u32 %r1, %r2;", "operand 2 of ld"},
        {"st.global.v2.u32 [%rd1], %r2;", "a vector of 0 where 2 should be"},
        {"ld.global.v2.u32 {%r1, %r2, %r3}, [%rd1];", "a vector of 3 where 2"},
        {"atom.global.v2.add.f32 {%f1, %f2}, [%rd1], {%f1, %f2};", "vector form of atom"},
        {"mov.f32 %f1, 1;", "an integer where a number of type f32"},
        {"mov.u32 %r1, 1.5;", "a decimal fraction"},
        {"mov.u32 %r1, 0f123;", "0f123 is no number"},
        {"mov.u64 %rd1, 99999999999999999999;", "is no number"},
        {"mov.u32 5, %r1;", "operand 1 of mov"},
        {"@%r1 bra L; L:", "a guard that is no predicate"},
        {"mov.u32 %r1, -%tid.x;", "only a register can be negated"},
        {".local .b8 x[2000000];", "more than 1048576 bytes of .local"},
        {".local .b8 x[99999999999999999999];", "is no number"},
        {".reg .b32 x; .reg .b32 x;", "x is declared twice"},
        {"mov.u32 %r1, 1; /* no end", "PTX line 7: a comment without end"},
        {".global .u32 x = {1, 2};", "too many initial values"},
        {".pragma \"nounroll", "a string without end"},
        {"} } {", "} where a directive should be"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        char text[1000];
        (void)snprintf(text, sizeof text,
                       ".version 9.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 a)\n{\n"
                       ".reg .b32 %%r<9>; .reg .b64 %%rd<4>; .reg .f32 %%f<4>; .reg .pred %%p<2>;\n"
                       "%s\n}\n", cases[k].text);
        sg_module *m = parse(text);
        CHECK(!m, "parsed: %s", cases[k].text);
        CHECK(strstr(why, cases[k].says), "%s: %s", cases[k].text, why);
        sg_module_free(m);
    }
}

static void test_unknown_words_outside_functions(void) {
    static const struct { const char *text, *says; } cases[] = {
        {"", "no .target"},
        {".version 9.0\n.target quantum_1\n", "PTX line 2: unknown target quantum_1"},
        {".target sm_80\n.address_size 32\n", "not 64"},
        {".target sm_80\n\n.alias a, b;\n", "PTX line 3: unknown directive .alias"},
        {".target sm_80\n.global .texref t;", "unknown type or directive .texref"},
        {".target sm_80\n.extern .global .u32 x;", "x is defined elsewhere"},
        {".target sm_80\n.global .u64 x = nobody;", "no address of nobody"},
        {".target sm_80\n.global .b8 x[1099511627776][1099511627776];", "an array too large"},
        {".target sm_80\n.global .b8 x[999999999] = {1};", "256 MB"},
        {".target sm_80\n.global .align 3 .b8 x;", ".align is no power of two"},
        {".target sm_80\n.entry k() .cake 1 { ret; }", ".cake where"},
        {".target sm_80\n.entry k() { ret; } .entry k() { ret; }", "k is defined twice"},
        {".target sm_80\n.func f(.param .b32 a);\n.func f(.param .b64 a) { ret; }", "otherwise"},
        {".target sm_80\n.func f(.param .b32 a) { ret; }\n.entry k() { call.uni f; }",
         "PTX line 3: a call of f with other parameters"},
        {".target sm_80\n.section .debug { .b8 1", "a section without end"},
        {".target sm_80\n.entry k(.param .b8 a[2000000]) { ret; }", "a parameter too large"},
        {".target sm_80\n.entry k() {", "the text ends"},
        {".target sm_80\n\001", "a strange character"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        sg_module *m = parse(cases[k].text);
        CHECK(!m, "parsed: %s", cases[k].text);
        CHECK(strstr(why, cases[k].says), "%s: %s", cases[k].text, why);
        sg_module_free(m);
    }
}

/* Damaged text: any answer, but no crash (the test also runs under ASan). */
static void test_damaged_text(void) {
    static const char *const by[] = {"{", "}", ";", "[", "<99999>", "%r1", ".reg", "0x", "@", "L:",
                                     "ret;", "(", ",", "-", ".param", "\"", "4294967295", "|"};
    size_t len = 0;
    char *text = have_nvcc ? ptx_of(cu_flow, 80, &len) : NULL;
    uint64_t state = 7;
    int parsed = 0;
    if (!text) {
        NOTE("skipped: no nvcc");
        return;
    }
    char *bad = malloc(len + 100);
    for (int trial = 0; trial < 400; trial++) {
        size_t n = len;
        memcpy(bad, text, len);
        for (int k = 0; k < 1 + trial % 3; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            const char *with = by[(state >> 20) % (sizeof by / sizeof *by)];
            size_t at = (state >> 33) % (n - 20), size = strlen(with), cut = (state >> 28) % 8;
            if (trial % 4 == 3) bad[at] ^= (char)(1 << (state >> 60) % 7);
            else if (trial % 40 == 0) n = at + 20;
            else if (n - cut + size < len + 100) {
                memmove(bad + at + size, bad + at + cut, n - at - cut);
                memcpy(bad + at, with, size);
                n = n - cut + size;
            }
        }
        char *exact = malloc(n);           /* no byte behind it                                 */
        memcpy(exact, bad, n);
        sg_module *m = sg_parse(exact, n, why, sizeof why);
        free(exact);
        if (m) check_module(m);
        else CHECK(!strncmp(why, "PTX line ", 9), "%s", why);
        parsed += m != NULL;
        sg_module_free(m);
    }
    NOTE("%d of 400 parsed", parsed);
    free(bad);
    free(text);
}

int main(void) {
    have_nvcc = !system("nvcc --version >/dev/null 2>&1");
    RUN(test_branches_if_else);
    RUN(test_branches_nested);
    RUN(test_branches_loop);
    RUN(test_branches_that_leave);
    RUN(test_branches_without_end);
    RUN(test_branches_at_random);
    RUN(test_nvcc_flow);
    RUN(test_nvcc_asm);
    RUN(test_nvcc_types);
    RUN(test_nvcc_shared);
    RUN(test_immediates_are_bits_of_the_type);
    RUN(test_instructions_in_detail);
    RUN(test_scopes_hide_names);
    RUN(test_unknown_words_are_named_with_their_line);
    RUN(test_unknown_words_outside_functions);
    RUN(test_damaged_text);
    return check_done();
}
