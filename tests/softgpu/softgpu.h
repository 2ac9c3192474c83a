/* softgpu.h -- a GPU in software, for tests: libcuda.so.1 that interprets the PTX of a fatbin.
 *
 *   program --cuGetProcAddress--> driver.c   contexts, modules, streams, events; work is deferred
 *                                    |       until somebody waits, then runs in a seeded order
 *                                 memory.c   allocations, what is initialized, who touched what
 *                                    |
 *   PTX text --> ptx.c --> sg_module |
 *                            \       |
 *                             exec.c         a grid: block by block, warp by warp, 32 lanes at once
 *                            /   |   \
 *                       alu.c shared.c tensor.c
 *
 *   alu.c      arithmetic, comparison, conversion: one instruction on the active lanes
 *   shared.c   shared memory and its races, barriers, shuffles and votes, cp.async
 *   tensor.c   ldmatrix, mma.sync
 *
 * Whatever is not known stops with its name and line: sg_stop().  What a program did wrong is a
 * violation: sg_violation() names kernel, source line, block and thread, and stops too, unless
 * SOFTGPU says keep=1.
 *
 * Conventions  registers hold 64 bits a lane; an operation reads and writes the low bits of its
 *              type, zero-extended, so that a register's upper bits are always zero.
 *              Lanes are 0..31, masks have bit l for lane l.  The machine is little-endian.      */
#ifndef SOFTGPU_H
#define SOFTGPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SG_LANES = 32, SG_WARPS_MAX = 32, SG_BARRIERS = 16, SG_VEC_MAX = 8 };

/* === 1. PTX as parsed (ptx.c) ================================================================= */

typedef enum {
    T_NONE, T_PRED, T_B8, T_B16, T_B32, T_B64, T_B128, T_U8, T_U16, T_U32, T_U64, T_S8, T_S16,
    T_S32, T_S64, T_F16, T_F16X2, T_BF16, T_BF16X2, T_TF32, T_F32, T_F64, T_F32X2, T_E4M3, T_E5M2,
    T_E4M3X2, T_E5M2X2, T_E2M1X2, T_UE8M0X2, T_N
} sg_type;
unsigned sg_type_bytes(sg_type t);         /* of a value: T_F16X2 is 4, T_E4M3X2 is 2, T_PRED 1 */
bool sg_type_signed(sg_type t);
bool sg_type_float(sg_type t);             /* also packed and small ones                        */

typedef enum {                             /* state spaces; S_GENERIC where none is named       */
    S_GENERIC, S_GLOBAL, S_SHARED, S_LOCAL, S_CONST, S_PARAM
} sg_space;

/* Opcodes: the first word of a mnemonic, but for those whose second word makes another operation.
 * OP(enum, "ptx words") -- longest match wins. */
#define SG_OPS(OP)                                                                               \
    OP(ABS, "abs") OP(ACTIVEMASK, "activemask") OP(ADD, "add") OP(ADDC, "addc") OP(AND, "and")   \
    OP(ATOM, "atom") OP(BAR_ARRIVE, "bar.arrive") OP(BAR_ARRIVE2, "barrier.arrive")              \
    OP(BAR_SYNC, "bar.sync") OP(BARRIER_SYNC, "barrier.sync") OP(BAR_RED, "bar.red")             \
    OP(BAR_WARP, "bar.warp.sync") OP(BFE, "bfe") OP(BFI, "bfi") OP(BFIND, "bfind")               \
    OP(BRA, "bra") OP(BREV, "brev") OP(BRKPT, "brkpt") OP(CALL, "call") OP(CLZ, "clz")           \
    OP(CNOT, "cnot") OP(COPYSIGN, "copysign") OP(COS, "cos")                                     \
    OP(CP_ASYNC, "cp.async") OP(CP_COMMIT, "cp.async.commit_group")                              \
    OP(CP_WAIT, "cp.async.wait_group") OP(CP_WAIT_ALL, "cp.async.wait_all")                      \
    OP(CVT, "cvt") OP(CVTA, "cvta") OP(DIV, "div") OP(DP4A, "dp4a") OP(EX2, "ex2")               \
    OP(EXIT, "exit") OP(FENCE, "fence") OP(FMA, "fma") OP(ISSPACEP, "isspacep") OP(LD, "ld")     \
    OP(LDMATRIX, "ldmatrix") OP(LDU, "ldu") OP(LG2, "lg2") OP(LOP3, "lop3") OP(MAD, "mad")       \
    OP(MADC, "madc") OP(MAD24, "mad24") OP(MATCH, "match") OP(MAX, "max") OP(MEMBAR, "membar")   \
    OP(MIN, "min") OP(MMA, "mma") OP(MOV, "mov") OP(MUL, "mul") OP(MUL24, "mul24")               \
    OP(NANOSLEEP, "nanosleep") OP(NEG, "neg") OP(NOT, "not") OP(OR, "or") OP(POPC, "popc")       \
    OP(PREFETCH, "prefetch") OP(PRMT, "prmt") OP(RCP, "rcp") OP(RED, "red") OP(REDUX, "redux")   \
    OP(REM, "rem") OP(RET, "ret") OP(RSQRT, "rsqrt") OP(SAD, "sad") OP(SELP, "selp")             \
    OP(SET, "set") OP(SETP, "setp") OP(SHF, "shf") OP(SHFL, "shfl") OP(SHL, "shl")               \
    OP(SHR, "shr") OP(SIN, "sin") OP(SLCT, "slct") OP(SQRT, "sqrt") OP(ST, "st") OP(SUB, "sub")  \
    OP(SUBC, "subc") OP(SZEXT, "szext") OP(TANH, "tanh") OP(TESTP, "testp") OP(TRAP, "trap")     \
    OP(VOTE, "vote") OP(XOR, "xor")
typedef enum {
#define OP(name, text) OP_##name,
    SG_OPS(OP)
#undef OP
    OP_N
} sg_op;

/* Every other word of a mnemonic that is no type and no space.  MOD(enum, "ptx word"). */
#define SG_MODS(MOD)                                                                             \
    MOD(EQ, "eq") MOD(NE, "ne") MOD(LT, "lt") MOD(LE, "le") MOD(GT, "gt") MOD(GE, "ge")          \
    MOD(EQU, "equ") MOD(NEU, "neu") MOD(LTU, "ltu") MOD(LEU, "leu") MOD(GTU, "gtu")              \
    MOD(GEU, "geu") MOD(NUM, "num") MOD(NAN, "nan") MOD(CMP_LO, "cmp_lo") MOD(LS, "ls")          \
    MOD(HS, "hs") MOD(AND, "and") MOD(OR, "or") MOD(XOR, "xor") MOD(POPC, "popc")                \
    MOD(RN, "rn") MOD(RZ, "rz") MOD(RM, "rm") MOD(RP, "rp") MOD(RNA, "rna") MOD(RNI, "rni")      \
    MOD(RZI, "rzi") MOD(RMI, "rmi") MOD(RPI, "rpi") MOD(SAT, "sat") MOD(FTZ, "ftz")              \
    MOD(SATFINITE, "satfinite") MOD(RELU, "relu") MOD(APPROX, "approx") MOD(FULL, "full")        \
    MOD(WIDE, "wide") MOD(HI, "hi") MOD(LO, "lo") MOD(UNI, "uni") MOD(SYNC, "sync")              \
    MOD(ALIGNED, "aligned") MOD(VOLATILE, "volatile") MOD(CC, "cc") MOD(TRANS, "trans")          \
    MOD(ALL, "all") MOD(ANY, "any") MOD(BALLOT, "ballot") MOD(UP, "up") MOD(DOWN, "down")        \
    MOD(BFLY, "bfly") MOD(IDX, "idx") MOD(L, "l") MOD(R, "r") MOD(CLAMP, "clamp")                \
    MOD(WRAP, "wrap") MOD(V2, "v2") MOD(V4, "v4") MOD(V8, "v8") MOD(TO, "to") MOD(CA, "ca")      \
    MOD(CG, "cg") MOD(CS, "cs") MOD(CV, "cv") MOD(LU, "lu") MOD(WB, "wb") MOD(WT, "wt")          \
    MOD(NC, "nc") MOD(RELAXED, "relaxed") MOD(ACQUIRE, "acquire") MOD(RELEASE, "release")        \
    MOD(ACQ_REL, "acq_rel") MOD(SC, "sc") MOD(CTA, "cta") MOD(GPU, "gpu") MOD(GL, "gl")          \
    MOD(SYS, "sys") MOD(CLUSTER, "cluster") MOD(ADD, "add") MOD(INC, "inc") MOD(DEC, "dec")      \
    MOD(MIN, "min") MOD(MAX, "max") MOD(EXCH, "exch") MOD(CAS, "cas") MOD(NOFTZ, "noftz")        \
    MOD(ROW, "row") MOD(COL, "col") MOD(X1, "x1") MOD(X2, "x2") MOD(X4, "x4")                    \
    MOD(M8N8, "m8n8") MOD(M16N8K8, "m16n8k8") MOD(M16N8K16, "m16n8k16")                          \
    MOD(M16N8K32, "m16n8k32") MOD(KIND_F8F6F4, "kind::f8f6f4") MOD(F4E, "f4e") MOD(B4E, "b4e")   \
    MOD(RC8, "rc8") MOD(ECL, "ecl") MOD(ECR, "ecr") MOD(RC16, "rc16") MOD(SHIFTAMT, "shiftamt")  \
    MOD(FINITE, "finite") MOD(INFINITE, "infinite") MOD(NUMBER, "number")                        \
    MOD(NOTANUMBER, "notanumber") MOD(NORMAL, "normal") MOD(SUBNORMAL, "subnormal")              \
    MOD(L2_64B, "L2::64B") MOD(L2_128B, "L2::128B") MOD(L2_256B, "L2::256B")                     \
    MOD(L1_NO_ALLOCATE, "L1::no_allocate") MOD(L1_EVICT_LAST, "L1::evict_last")                  \
    MOD(L1_EVICT_FIRST, "L1::evict_first") MOD(L1_EVICT_NORMAL, "L1::evict_normal")              \
    MOD(NAN_WINS, "NaN")                                                                         \
    MOD(UNIFIED, "unified") MOD(XORSIGN, "xorsign") MOD(WEAK, "weak") MOD(L1, "L1") MOD(L2, "L2")
typedef enum {
#define MOD(name, text) M_##name,
    SG_MODS(MOD)
#undef MOD
    M_N
} sg_mod;
_Static_assert(M_N <= 128, "sg_instr.mod has a bit for each");

typedef enum {
    O_NONE, O_REG, O_IMM, O_SPECIAL, O_SYMBOL, O_ADDR, O_VEC, O_SINK, O_LABEL, O_FUNC
} sg_kind;

typedef enum {                             /* special registers                                 */
    SR_TID_X, SR_TID_Y, SR_TID_Z, SR_NTID_X, SR_NTID_Y, SR_NTID_Z, SR_CTAID_X, SR_CTAID_Y,
    SR_CTAID_Z, SR_NCTAID_X, SR_NCTAID_Y, SR_NCTAID_Z, SR_LANEID, SR_WARPID, SR_NWARPID, SR_SMID,
    SR_NSMID, SR_LANEMASK_EQ, SR_LANEMASK_LT, SR_LANEMASK_LE, SR_LANEMASK_GT, SR_LANEMASK_GE,
    SR_CLOCK, SR_CLOCK64, SR_GLOBALTIMER, SR_DYNAMIC_SMEM_SIZE, SR_TOTAL_SMEM_SIZE, SR_N
} sg_special;

typedef struct {
    uint8_t kind;                          /* sg_kind                                           */
    bool negate;                           /* !%p, -%r                                          */
    uint8_t n;                             /* of O_VEC: elements; else 0                        */
    int32_t reg;                           /* O_REG: its index in the function's registers;
                                              O_ADDR: base register, or -1; O_SPECIAL: which;
                                              O_LABEL: instruction; O_FUNC: index in functions  */
    int32_t symbol;                        /* O_SYMBOL, O_ADDR: index in sg_func.symbol, or -1  */
    uint64_t imm;                          /* O_IMM: the bits, floats as of the type of the
                                              instruction; O_ADDR, O_SYMBOL: offset             */
    int32_t vec[SG_VEC_MAX];               /* O_VEC: registers, -1 for _                        */
    uint64_t vec_imm[SG_VEC_MAX];          /* where vec[i] is -2: an immediate                  */
} sg_operand;

enum { SG_OPERANDS = 6 };
typedef struct {
    sg_op op;
    uint8_t type[4];                       /* sg_type, in the order of the mnemonic             */
    uint8_t n_types, space, n;             /* space: sg_space; n: operands                      */
    uint8_t vec;                           /* 1, 2, 4, 8 elements of ld and st                  */
    uint64_t mod[2];                       /* a bit each, see sg_has()                          */
    int32_t guard;                         /* predicate register of @%p, or -1                  */
    bool guard_not;                        /* @!%p                                              */
    sg_operand o[SG_OPERANDS];             /* in the order of the text: destination first.  A
                                              second destination (%r|%p) is o[1].  call: O_FUNC,
                                              then O_VECs of symbols: results, arguments        */
    int32_t reconverge;                    /* of a bra: where its paths meet again (immediate
                                              post-dominator), or -1: only at the end.  A path
                                              that only leaves is none: see ptx.c, part 9       */
    int32_t file, line;                    /* of .loc: innermost; 0 where there is none         */
    int32_t ptx_line;
    uint32_t text_len;
    const char *text;                      /* [text_len] as it stands in the PTX, or NULL       */
} sg_instr;
static inline bool sg_has(const sg_instr *i, sg_mod m) { return i->mod[m / 64] >> (m % 64) & 1; }

typedef struct {                           /* anything with an address and a name               */
    const char *name;
    sg_space space;
    uint64_t offset;                       /* in its space: S_PARAM, S_LOCAL, S_SHARED: of the
                                              function; S_GLOBAL, S_CONST: set by the loader    */
    uint64_t bytes, align;                 /* bytes 0: extern shared, behind all other          */
    const uint8_t *init;                   /* [bytes], or NULL: zeros                           */
    int module_symbol;                     /* of S_GLOBAL, S_CONST: index in sg_module.symbol   */
} sg_symbol;

typedef struct {                           /* an address in an initializer: the loader puts the */
    int symbol, target;                    /* 8 bytes "address of symbol[target] + addend" at   */
    uint64_t offset, addend;               /* symbol[symbol] + offset, behind copying init      */
} sg_reloc;

typedef struct {
    const char *name;
    bool entry;
    sg_instr *code;                        /* [n]; the last one is OP_RET or OP_EXIT            */
    int n;
    sg_type *reg;                          /* [n_regs] types                                    */
    const char **reg_name;                 /* [n_regs] for messages                             */
    int n_regs;
    sg_symbol *symbol;                     /* [n_symbols] all that its code names; the first
                                              n_params are its parameters, then n_results       */
    int n_symbols, n_params, n_results;
    uint64_t param_bytes, shared_bytes, local_bytes; /* static; each symbol aligned             */
    uint64_t args_bytes;                   /* of the parameters alone, the first of param_bytes;
                                              then come results and the .param of call scopes   */
    bool external;                         /* declared only: its code is one trap               */
    int max_threads, min_blocks;           /* .maxntid x*y*z, .minnctapersm; 0: not said        */
} sg_func;

typedef struct {
    int cc;                                /* of .target: 80, 89                                */
    const char **file;                     /* [n_files] by .file number                         */
    int n_files;
    sg_func *func;                         /* [n_funcs] */
    int n_funcs;
    sg_symbol *symbol;                     /* [n_symbols] of the module: .global, .const        */
    int n_symbols;
    sg_reloc *reloc;                       /* [n_relocs] */
    int n_relocs;
} sg_module;

/* Parse text [len]; NULL with a message of one line in why[size] that names the line.  The module
 * owns all; sg_module_free() frees it. */
sg_module *sg_parse(const char *text, size_t len, char *why, size_t size);
void sg_module_free(sg_module *m);
const sg_func *sg_find(const sg_module *m, const char *name);      /* an entry, or NULL */
const char *sg_op_name(sg_op op);
/* The instruction as text, for messages: "ld.global.f32 %f6, [%rd6]". */
void sg_text(const sg_func *f, const sg_instr *i, char *out, size_t size);

/* === 2. Running a grid (exec.c) =============================================================== */

/* Where generic addresses of a block's shared and a thread's local memory begin; global memory and
 * constants lie below them. */
#define SG_SHARED_WINDOW 0x0100000000000000ull
#define SG_LOCAL_WINDOW  0x0200000000000000ull
#define SG_PARAM_WINDOW  0x0300000000000000ull   /* cvta.param: kernel parameters */
#define SG_WINDOW_BYTES  0x0000000100000000ull

typedef struct { uint32_t x, y, z; } sg_dim;

typedef struct {                           /* what the configured device is                     */
    int cc;                                /* 80, 86, 89, 90, 120                               */
    int n_sms, warp_size, max_threads, max_threads_sm, max_blocks_sm, max_regs_block;
    uint64_t memory_bytes;
    uint32_t shared_block, shared_optin, shared_sm; /* bytes: without and with opting in, of an SM */
    sg_dim max_grid, max_block;
    int driver_version;                    /* 13000                                             */
} sg_device;

typedef struct sg_shadow sg_shadow;        /* shared.c: of one block's shared memory            */
typedef struct sg_frame sg_frame;          /* exec.c: a function being run by a warp            */

typedef struct {
    int id;                                /* in the block                                      */
    uint32_t live;                         /* lanes that exist and have not exited              */
    uint32_t active;                       /* lanes that run now                                */
    uint64_t *reg;                         /* [n_regs][32] of the function being run            */
    const sg_func *func;
    int pc;
    int barrier;                           /* waits at this one, or -1                          */
    sg_frame *frame;
    uint8_t *local;                        /* [32][local bytes]                                 */
    uint64_t sync_count;                   /* of __syncwarp, shfl and the like: see shared.c    */
    uint64_t steps;                        /* instructions so far                               */
    uint32_t carry;                        /* .cc: a bit a lane                                 */
} sg_warp;

typedef struct {                           /* one launch                                        */
    const sg_module *module;
    const sg_func *func;
    const sg_device *device;
    sg_dim grid, block;
    uint32_t dynamic_shared;
    const uint8_t *param;                  /* [func->param_bytes]                               */
    uint64_t op;                           /* the driver's number of this piece of work         */
    uint64_t seed;                         /* orders blocks and warps; 0: in order              */
} sg_launch;

typedef struct {                           /* one block being run                               */
    const sg_launch *launch;
    sg_dim ctaid;
    uint64_t index;                        /* of the block in the grid                          */
    int n_threads, n_warps;
    sg_warp warp[SG_WARPS_MAX];
    uint8_t *shared;                       /* [shared_bytes] static, then dynamic               */
    uint32_t shared_bytes;
    sg_shadow *shadow;
} sg_block;

/* Lane instructions that a launch may take before it counts as endless: 2^36. */
extern uint64_t sg_steps_max;

/* Run all blocks.  Violations and what is unknown end the process (section 6). */
void sg_run(const sg_launch *l);

/* A value of an operand for one lane, masked to the bytes of type t. */
uint64_t sg_get(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_type t, int lane);
/* Write the low bytes of t to a register (O_REG; O_SINK: nothing). */
void sg_put(sg_warp *w, const sg_operand *o, sg_type t, int lane, uint64_t bits);
/* The address that an O_ADDR operand names for a lane, in the space of the instruction; for
 * S_GENERIC *space becomes the space that it lies in and the result an address in that. */
uint64_t sg_address(const sg_block *b, const sg_warp *w, const sg_operand *o, sg_space *space,
                    int lane);
/* n bytes of any space but registers, checked: bounds, alignment to `align`, initialization, races;
 * through section 3 and shared.c.  kind as there. */
typedef enum { SG_READ, SG_WRITE, SG_ATOMIC } sg_access;
void *sg_memory(sg_block *b, sg_warp *w, const sg_instr *i, int lane, sg_space space,
                uint64_t address, unsigned bytes, sg_access kind);

/* === 3. Global memory (memory.c) ==============================================================
 * Device addresses are not host addresses: what the host dereferences crashes, as it should.      */

/* Where n bytes at a device address lie on the host; NULL, after a violation: not in one live
 * allocation, read before it was written, written by another block of this launch (or read by one
 * before it is written), or by work that no event orders before this.  Called for each lane. */
void *sg_global(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane, uint64_t address,
                unsigned bytes, sg_access kind);
/* Addresses of a module's globals and constants (sg_symbol.module_symbol), set when it is loaded. */
uint64_t sg_symbol_address(const sg_module *m, int module_symbol);

/* === 4. Parts of exec.c ======================================================================= */

/* Arithmetic of all active lanes in `mask`; false: not one of alu.c's. */
bool sg_alu(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask);
/* ldmatrix, mma. */
bool sg_tensor(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask);
/* Barriers, shfl, vote, match, redux, activemask, bar.warp.sync, cp.async*.  SG_WAIT: the warp has
 * arrived at a barrier (w->barrier) and goes on behind it once sg_released() says so. */
typedef enum { SG_NOT_MINE, SG_DONE, SG_WAIT } sg_result;
sg_result sg_sync(sg_block *b, sg_warp *w, const sg_instr *i, uint32_t mask);
bool sg_released(sg_block *b, sg_warp *w);
/* Of a deadlock: who is at a barrier (sg_warp.barrier), and how many it still waits for. */
void sg_barrier_text(const sg_block *b, int barrier, char *out, size_t size);
/* Checked access to shared memory: bounds, initialization, races between barriers and, within a
 * warp, between __syncwarps; bytes that a cp.async is still to write.  Never NULL. */
void *sg_shared(sg_block *b, sg_warp *w, const sg_instr *i, int lane, uint64_t offset,
                unsigned bytes, sg_access kind);
/* Before a block runs and after it has: also checks barriers that wait for nobody. */
void sg_shared_open(sg_block *b);
void sg_shared_close(sg_block *b);

extern const uint64_t sg_low_bits[T_N];    /* alu.c: the bits of a register that a type has     */

/* === 5. Small floats (alu.c), also for tensor.c =============================================== */

float sg_f16_to_f32(uint16_t bits);
float sg_bf16_to_f32(uint16_t bits);
float sg_e4m3_to_f32(uint8_t bits);
float sg_e5m2_to_f32(uint8_t bits);
float sg_e2m1_to_f32(uint8_t nibble);
/* mode: M_RN, M_RZ, M_RM, M_RP, M_RNA. */
uint16_t sg_f32_to_f16(float x, sg_mod mode);
uint16_t sg_f32_to_bf16(float x, sg_mod mode);
uint8_t sg_f32_to_e4m3(float x);           /* rn.satfinite */
uint8_t sg_f32_to_e5m2(float x);
uint8_t sg_f32_to_e2m1(float x);

/* === 6. Stopping (memory.c) ===================================================================
 * b, w and i may be NULL where there is none.  Lines on stderr begin with "softgpu: ".           */

/* "softgpu: VIOLATION in KERNEL at FILE:LINE (PTX LINE: TEXT), block (x,y,z), thread (x,y,z): ..."
 * and exit code 86, or, with keep=1, go on; sg_violations() counts. */
void sg_violation(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                  const char *fmt, ...) __attribute__((format(printf, 5, 6)));
uint64_t sg_violations(void);
/* What this program does not know: the same, exit code 87, always. */
_Noreturn void sg_stop(const sg_block *b, const sg_warp *w, const sg_instr *i, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* SOFTGPU="cc=8.9,mem=1G,sms=4,seed=3,driver=13000,keep=1,lost=100": read once.  lost: kernels that
 * are launched before the device is lost, so that every call fails; 0: it never is. */
typedef struct { sg_device device; uint64_t seed, lost; bool keep; } sg_config;
const sg_config *sg_get_config(void);

/* === 7. The driver's side of memory (memory.c) ================================================
 * Every piece of work has a place in its stream and a clock: what of every stream it comes after.
 * Work touches memory between its sg_work_begin() and the next one's.                            */

enum { SG_STREAMS = 64 };
typedef struct { uint64_t seq[SG_STREAMS]; } sg_clock;
typedef struct {
    uint64_t op;                           /* sg_launch.op                                      */
    int stream;
    uint64_t seq;                          /* the seq-th piece of work of its stream            */
    sg_clock clock;                        /* what it comes after; of its own stream: seq       */
    char name[120];                        /* for messages: "kernel add (work 7, stream 2)"     */
} sg_work;
void sg_work_begin(const sg_work *w, uint64_t blocks);
void sg_work_forget(const sg_clock *c);    /* all work to come is after this                    */

/* A stretch of memory that the device can reach. */
typedef enum { SG_DEVICE_MEMORY, SG_GLOBALS, SG_CONSTANTS, SG_PINNED } sg_region_kind;
typedef struct sg_region sg_region;
/* bytes of it; of SG_PINNED: at `host`, whose address is also the device's.  NULL: none left. */
sg_region *sg_region_new(sg_region_kind kind, uint64_t bytes, void *host);
void sg_region_free(sg_region *r);         /* what touches it from now on is a use after free   */
void sg_region_free_all(void);             /* the SG_DEVICE_MEMORY                              */
/* The live one that holds all of address..address+bytes, or NULL. */
sg_region *sg_region_at(uint64_t address, uint64_t bytes);
sg_region_kind sg_region_what(const sg_region *r);
uint64_t sg_region_base(const sg_region *r);
uint64_t sg_region_bytes(const sg_region *r);
uint64_t sg_memory_used(void);
bool sg_device_address(uint64_t address);  /* one that no host memory has                       */
/* The work that has begun reads or writes bytes within one region: where they lie on the host. */
uint8_t *sg_range(uint64_t address, uint64_t bytes, sg_access kind);
/* Never-written bytes stay that when copied from one place to another; how many are there? */
void sg_copy_written(uint64_t to, uint64_t from, uint64_t bytes);
uint64_t sg_unwritten(uint64_t address, uint64_t bytes);  /* of the first one, or bytes         */

/* Give a module's globals and constants their memory (false: none left), and take it back. */
bool sg_module_place(const sg_module *m);
void sg_module_remove(const sg_module *m);

#endif
