/* ptx.c -- PTX text to sg_module: what nvcc 13 writes for compute_80 .. 120, and nothing else.
 *
 *   text --next()--> token --declare, instruction--> sg_func --connect()--> reconvergence points
 *                               |                       |
 *                  names, one table with scopes         +-----lay_out()---> places in .shared
 *
 * One pass with one token of look-ahead.  The first thing that is not known or not right ends the
 * parse with its line and its word: fail() jumps to sg_parse().  The text is not trusted: every
 * count and size has a limit, nothing of it is a format or an index before it has been checked.
 *
 * Everything of the module lies in its own chunks of memory and is freed at once.  Arrays grow
 * outside of it and are copied into it when their length is known.
 *
 * Contents   1 tables   2 memory and failure   3 tokens   4 names   5 numbers   6 variables
 *            7 operands   8 instructions   9 control flow   10 functions   11 the module
 *            12 an instruction as text                                                          */
#define _GNU_SOURCE
#include "softgpu.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* === 1. Tables ================================================================================ */

enum { N_PATTERN = 12, MAX_REGS = 1 << 16, MAX_SYMBOLS = 1 << 16, MAX_FILES = 1 << 14,
       MAX_CODE = 1 << 22, MAX_SCOPES = 64, MAX_INIT = 256 << 20, MAX_FRAME = 1 << 20,
       MAX_SHARED = 1 << 30, N_BUCKETS = 4096 };
#define MAX_BYTES (1ull << 40)             /* of a variable                                     */

static const struct { const char *word; uint8_t bytes; bool is_signed, is_float; } types[T_N] = {
    [T_NONE] = {"", 0, 0, 0},          [T_PRED] = {"pred", 1, 0, 0},
    [T_B8] = {"b8", 1, 0, 0},          [T_B16] = {"b16", 2, 0, 0},
    [T_B32] = {"b32", 4, 0, 0},        [T_B64] = {"b64", 8, 0, 0},
    [T_B128] = {"b128", 16, 0, 0},     [T_U8] = {"u8", 1, 0, 0},
    [T_U16] = {"u16", 2, 0, 0},        [T_U32] = {"u32", 4, 0, 0},
    [T_U64] = {"u64", 8, 0, 0},        [T_S8] = {"s8", 1, 1, 0},
    [T_S16] = {"s16", 2, 1, 0},        [T_S32] = {"s32", 4, 1, 0},
    [T_S64] = {"s64", 8, 1, 0},        [T_F16] = {"f16", 2, 1, 1},
    [T_F16X2] = {"f16x2", 4, 1, 1},    [T_BF16] = {"bf16", 2, 1, 1},
    [T_BF16X2] = {"bf16x2", 4, 1, 1},  [T_TF32] = {"tf32", 4, 1, 1},
    [T_F32] = {"f32", 4, 1, 1},        [T_F64] = {"f64", 8, 1, 1},
    [T_F32X2] = {"f32x2", 8, 1, 1},    [T_E4M3] = {"e4m3", 1, 1, 1},
    [T_E5M2] = {"e5m2", 1, 1, 1},      [T_E4M3X2] = {"e4m3x2", 2, 1, 1},
    [T_E5M2X2] = {"e5m2x2", 2, 1, 1},  [T_E2M1X2] = {"e2m1x2", 1, 1, 1},
    [T_UE8M0X2] = {"ue8m0x2", 2, 0, 1},
};
unsigned sg_type_bytes(sg_type t) { return t < T_N ? types[t].bytes : 0; }
bool sg_type_signed(sg_type t) { return t < T_N && types[t].is_signed && !types[t].is_float; }
bool sg_type_float(sg_type t) { return t < T_N && types[t].is_float; }

static const char *const spaces[] = {"", "global", "shared", "local", "const", "param"};

static const char *const op_words[OP_N] = {
#define OP(name, text) [OP_##name] = text,
    SG_OPS(OP)
#undef OP
};
static const char *const mod_words[M_N] = {
#define MOD(name, text) [M_##name] = text,
    SG_MODS(MOD)
#undef MOD
};
const char *sg_op_name(sg_op op) { return op < OP_N ? op_words[op] : "?"; }

/* What an operation takes: how many types, then its operands in order.
 *   d register or _   D the same or a vector   e a second register behind |, if there is a |
 *   s register, immediate, special register, symbol   S the same or a vector   V a vector
 *   a address   l label   ? what follows may be missing   c a call's                           */
static const char *const patterns[OP_N] = {
    [OP_ABS] = "1ds", [OP_ACTIVEMASK] = "1d", [OP_ADD] = "1dss", [OP_ADDC] = "1dss",
    [OP_AND] = "1dss", [OP_ATOM] = "1das?s", [OP_BAR_ARRIVE] = "0ss", [OP_BAR_ARRIVE2] = "0ss",
    [OP_BAR_SYNC] = "0s?s", [OP_BARRIER_SYNC] = "0s?s", [OP_BAR_RED] = "1dss?s",
    [OP_BAR_WARP] = "0s", [OP_BFE] = "1dsss", [OP_BFI] = "1dssss", [OP_BFIND] = "1ds",
    [OP_BRA] = "0l", [OP_BREV] = "1ds", [OP_BRKPT] = "0", [OP_CALL] = "0c", [OP_CLZ] = "1ds",
    [OP_CNOT] = "1ds", [OP_COPYSIGN] = "1dss", [OP_COS] = "1ds", [OP_CP_ASYNC] = "0aas?s",
    [OP_CP_COMMIT] = "0", [OP_CP_WAIT] = "0s", [OP_CP_WAIT_ALL] = "0", [OP_CVT] = "2ds?s",
    [OP_CVTA] = "1ds", [OP_DIV] = "1dss", [OP_DP4A] = "2dsss", [OP_EX2] = "1ds", [OP_EXIT] = "0",
    [OP_FENCE] = "0", [OP_FMA] = "1dsss", [OP_ISSPACEP] = "0ds", [OP_LD] = "1Da",
    [OP_LDMATRIX] = "1Va", [OP_LDU] = "1Da", [OP_LG2] = "1ds", [OP_LOP3] = "1dssss",
    [OP_MAD] = "1dsss", [OP_MADC] = "1dsss", [OP_MAD24] = "1dsss", [OP_MATCH] = "1dess",
    [OP_MAX] = "1dss", [OP_MEMBAR] = "0", [OP_MIN] = "1dss", [OP_MMA] = "4VVVV",
    [OP_MOV] = "1DS", [OP_MUL] = "1dss", [OP_MUL24] = "1dss", [OP_NANOSLEEP] = "1s",
    [OP_NEG] = "1ds", [OP_NOT] = "1ds", [OP_OR] = "1dss", [OP_POPC] = "1ds",
    [OP_PREFETCH] = "0a", [OP_PRMT] = "1dsss", [OP_RCP] = "1ds", [OP_RED] = "1as",
    [OP_REDUX] = "1dss", [OP_REM] = "1dss", [OP_RET] = "0", [OP_RSQRT] = "1ds",
    [OP_SAD] = "1dsss", [OP_SELP] = "1dsss", [OP_SET] = "2dss?s", [OP_SETP] = "1dess?s",
    [OP_SHF] = "1dsss", [OP_SHFL] = "1dessss", [OP_SHL] = "1dss", [OP_SHR] = "1dss",
    [OP_SIN] = "1ds", [OP_SLCT] = "2dsss", [OP_SQRT] = "1ds", [OP_ST] = "1aS",
    [OP_SUB] = "1dss", [OP_SUBC] = "1dss", [OP_SZEXT] = "1dss", [OP_TANH] = "1ds",
    [OP_TESTP] = "1ds", [OP_TRAP] = "0", [OP_VOTE] = "1dss", [OP_XOR] = "1dss",
};

static const char *const specials[SR_N] = {
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
    "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid", "%smid",
    "%nsmid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge",
    "%clock", "%clock64", "%globaltimer", "%dynamic_smem_size", "%total_smem_size"
};

/* === 2. Memory and failure ==================================================================== */

typedef struct chunk { struct chunk *next; size_t used, size; } chunk;

enum { N_LOCS = 32, N_HEADERS = 256 };

typedef struct {                           /* behind every sg_module there are its chunks       */
    sg_module m;
    chunk *chunks;
} owner;

typedef struct { char kind; const char *s; uint32_t len; int line; } token;
enum { K_END = 0, K_WORD = 'w', K_NUMBER = '0', K_STRING = '"' };    /* else the character      */

typedef enum { N_REG, N_RANGE, N_SYMBOL, N_VARIABLE, N_FUNC, N_LABEL } name_kind;
typedef struct {
    const char *s;
    uint32_t len, hash;
    name_kind kind;
    int index;                             /* of a register, variable, function, instruction    */
    int count;                             /* N_RANGE: registers                                */
    int depth;                             /* of its scope                                      */
    int next, scope_next;                  /* in its bucket, in its scope                       */
} named;

typedef struct {                           /* a variable of the module or a demoted one         */
    sg_symbol s;                           /* offset: of those in .shared that functions share  */
    int module_symbol;                     /* in sg_module.symbol, or -1: in .shared            */
    int func, in_func;                     /* the function that named it last, and as what      */
    bool placed;
} variable;

typedef struct { int instr, line; const char *s; uint32_t len; } jump;

typedef struct { int names, first_jump; uint64_t param_top; } scope;

typedef struct {
    owner *own;
    const char *at, *end;
    int line;
    token t;                               /* the one to be looked at                           */
    char *why;
    size_t why_size;
    jmp_buf out;
    named *names;                          /* those not in use are chained from free_name       */
    int n_names, cap_names, free_name, bucket[N_BUCKETS];
    scope scopes[MAX_SCOPES];
    int depth;                             /* of scopes; 0 is the module                        */
    variable *var;
    int n_var, cap_var;
    sg_func *func;
    int n_func, cap_func;
    sg_reloc *reloc;
    int n_reloc, cap_reloc;
    uint64_t init_bytes;
    int cap_files;
    sg_func f;                             /* the one being parsed, its arrays still growing    */
    int f_index, cap_code, cap_reg, cap_reg_name, cap_symbol;
    jump *jumps;
    int n_jumps, cap_jumps;
    int loc_file, loc_line;
    struct { int file, line, column, of_file, of_line; } loc[N_LOCS];  /* the last ones         */
    unsigned n_locs;
    bool header[N_HEADERS];                /* .file numbers of the toolkit's own headers        */
    uint64_t param_top;                    /* where the next .param of a call goes             */
} parser;

_Noreturn __attribute__((format(printf, 3, 4)))
static void fail(parser *p, int line, const char *fmt, ...) {
    va_list args;
    if (p->why_size) {
        int n = snprintf(p->why, p->why_size, "PTX line %d: ", line);
        va_start(args, fmt);
        if (n > 0 && (size_t)n < p->why_size)
            (void)vsnprintf(p->why + n, p->why_size - (size_t)n, fmt, args);
        va_end(args);
        for (char *c = p->why; *c; c++)
            if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    }
    longjmp(p->out, 1);
}
/* A piece of the text in a message: at most 60 of its characters. */
#define SHOWN(len) ((len) < 60 ? (int)(len) : 60)

static void *keep(parser *p, size_t bytes) {
    bytes = (bytes + 15) & ~(size_t)15;
    chunk *c = p->own->chunks;
    if (!c || c->size - c->used < bytes) {
        size_t size = bytes > 65536 ? bytes : 65536;
        c = calloc(1, sizeof *c + 16 + size);
        if (!c) fail(p, p->line, "out of memory");
        c->next = p->own->chunks;
        c->size = size;
        p->own->chunks = c;
    }
    char *at = (char *)c + ((sizeof *c + 15) & ~(size_t)15) + c->used;
    c->used += bytes;
    return at;
}

static void *keep_copy(parser *p, const void *from, size_t bytes) {
    void *to = keep(p, bytes + 1);         /* a 0 behind it, for names                          */
    if (bytes) memcpy(to, from, bytes);
    return to;
}

/* Room for element n of an array that grows outside of the module. */
static void *grow(parser *p, void *array, int n, int *cap, size_t size, int limit) {
    if (n < *cap) return array;
    if (n >= limit) fail(p, p->line, "more than %d of a kind", limit);
    int more = *cap ? 2 * *cap : 64;
    void *bigger = realloc(array, (size_t)more * size);
    if (!bigger) fail(p, p->line, "out of memory");
    memset((char *)bigger + (size_t)*cap * size, 0, (size_t)(more - *cap) * size);
    *cap = more;
    return bigger;
}
/* realloc may move the array before fail() frees it: the pointer is written back at once. */
#define GROW(p, array, n, cap, limit) \
    ((array) = grow(p, array, n, &(cap), sizeof *(array), limit))

/* === 3. Tokens ================================================================================ */

static bool word_char(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.';
}

static void skip_blanks(parser *p) {
    while (p->at < p->end) {
        size_t left = (size_t)(p->end - p->at);
        if (*p->at == '\n') {
            p->line++;
            p->at++;
        } else if (*p->at == ' ' || *p->at == '\t' || *p->at == '\r') {
            p->at++;
        } else if (left > 1 && p->at[0] == '/' && p->at[1] == '/') {
            while (p->at < p->end && *p->at != '\n') p->at++;
        } else if (left > 1 && p->at[0] == '/' && p->at[1] == '*') {
            int line = p->line;
            for (p->at += 2; p->end - p->at > 1 && (p->at[0] != '*' || p->at[1] != '/'); p->at++)
                p->line += *p->at == '\n';
            if (p->end - p->at < 2) fail(p, line, "a comment without end");
            p->at += 2;
        } else {
            break;
        }
    }
}

static void next(parser *p) {
    skip_blanks(p);
    const char *s = p->at;
    p->t = (token){.kind = K_END, .s = s, .line = p->line};
    if (s == p->end) return;
    if (*s == '"') {
        for (s++; s < p->end && *s != '"' && *s != '\n'; s++) continue;
        if (s == p->end || *s != '"') fail(p, p->line, "a string without end");
        p->t.kind = K_STRING;
        s++;
    } else if (isdigit((unsigned char)*s)) {
        bool decimal = *s != '0' || p->end - s < 2 || !isalpha((unsigned char)s[1]) || s[1] == 'e';
        while (s < p->end && (word_char(*s) || (decimal && (*s == '+' || *s == '-') &&
                                                (s[-1] == 'e' || s[-1] == 'E'))))
            s++;
        p->t.kind = K_NUMBER;
    } else if (word_char(*s)) {
        bool directive = *s++ == '.';      /* ".reg.b32" is two                                 */
        while (s < p->end && !(directive && *s == '.') && (word_char(*s) ||
               (*s == ':' && p->end - s > 2 && s[1] == ':')))
            s += *s == ':' ? 2 : 1;
        p->t.kind = K_WORD;
    } else {
        p->t.kind = *s++;
        if (p->t.kind == K_WORD || p->t.kind < 33) fail(p, p->line, "a strange character");
    }
    if (s - p->at > 1 << 16) fail(p, p->line, "a word of more than 65536 characters");
    p->t.len = (uint32_t)(s - p->at);
    p->at = s;
}

static bool is(const token *t, const char *word) {
    return t->len == strlen(word) && !memcmp(t->s, word, t->len);
}

_Noreturn static void unexpected(parser *p, const char *wanted) {
    if (p->t.kind == K_END) fail(p, p->t.line, "the text ends where %s should be", wanted);
    fail(p, p->t.line, "%.*s where %s should be", SHOWN(p->t.len), p->t.s, wanted);
}

static bool take(parser *p, const char *word) {
    if (!is(&p->t, word) || !p->t.len) return false;
    next(p);
    return true;
}

static void need(parser *p, const char *word) {
    if (!take(p, word)) unexpected(p, word);
}

static token need_word(parser *p, const char *what) {
    token t = p->t;
    if (t.kind != K_WORD) unexpected(p, what);
    next(p);
    return t;
}

/* What is left of the line behind the current token. */
static void skip_line(parser *p) {
    if (p->t.kind != K_END && p->t.line == p->line) {
        while (p->at < p->end && *p->at != '\n') p->at++;
        next(p);
    }
}

/* === 4. Names ================================================================================= */

static uint32_t hash(const char *s, uint32_t len) {
    uint32_t h = 2166136261u;
    for (uint32_t i = 0; i < len; i++) h = (h ^ (uint8_t)s[i]) * 16777619u;
    return h ^ h >> 15;
}

/* The innermost one; -1: there is none. */
static int find_name(const parser *p, const char *s, uint32_t len) {
    uint32_t h = hash(s, len);
    for (int i = p->bucket[h % N_BUCKETS]; i >= 0; i = p->names[i].next) {
        const named *n = &p->names[i];
        if (n->hash == h && n->len == len && n->kind != N_RANGE && !memcmp(n->s, s, len)) return i;
    }
    return -1;
}

/* Declares a name at a depth; a bucket holds inner scopes' names first. */
static named *add_name(parser *p, token t, name_kind kind, int index, int depth) {
    int at = p->free_name;
    if (at >= 0) {
        p->free_name = p->names[at].next;
    } else {
        GROW(p, p->names, p->n_names, p->cap_names, 1 << 24);
        at = p->n_names++;
    }
    uint32_t h = hash(t.s, t.len);
    named *n = &p->names[at];
    *n = (named){t.s, t.len, h, kind, index, 0, depth, -1, p->scopes[depth].names};
    int *link = &p->bucket[h % N_BUCKETS];
    while (*link >= 0 && p->names[*link].depth > depth) link = &p->names[*link].next;
    for (int i = *link; i >= 0 && p->names[i].depth == depth; i = p->names[i].next)
        if (p->names[i].hash == h && p->names[i].len == t.len &&
            (p->names[i].kind == N_RANGE) == (kind == N_RANGE) &&
            !memcmp(p->names[i].s, t.s, t.len))
            fail(p, t.line, "%.*s is declared twice", SHOWN(t.len), t.s);
    n->next = *link;
    *link = at;
    p->scopes[depth].names = at;
    return n;
}

static void open_scope(parser *p) {
    if (p->depth + 1 >= MAX_SCOPES) fail(p, p->t.line, "more than %d scopes", MAX_SCOPES);
    p->scopes[++p->depth] = (scope){-1, p->n_jumps, p->param_top};
}

/* Jumps to labels of the scope that ends become known; the others wait for the scope around it. */
static void close_scope(parser *p) {
    scope *s = &p->scopes[p->depth];
    int kept = s->first_jump;
    for (int i = kept; i < p->n_jumps; i++) {
        jump *j = &p->jumps[i];
        int n = find_name(p, j->s, j->len);
        if (n >= 0 && p->names[n].kind == N_LABEL && p->names[n].depth == p->depth)
            p->f.code[j->instr].o[0].reg = p->names[n].index;
        else
            p->jumps[kept++] = *j;
    }
    p->n_jumps = kept;
    for (int i = s->names; i >= 0;) {
        named *n = &p->names[i];
        int *link = &p->bucket[n->hash % N_BUCKETS], after = n->scope_next;
        while (*link != i) link = &p->names[*link].next;
        *link = n->next;
        n->next = p->free_name;
        p->free_name = i;
        i = after;
    }
    p->param_top = s->param_top;
    p->depth--;
}

static int add_reg(parser *p, token t, sg_type type, int depth) {
    GROW(p, p->f.reg, p->f.n_regs, p->cap_reg, MAX_REGS);
    GROW(p, p->f.reg_name, p->f.n_regs, p->cap_reg_name, MAX_REGS);
    p->f.reg[p->f.n_regs] = type;
    p->f.reg_name[p->f.n_regs] = keep_copy(p, t.s, t.len);
    add_name(p, t, N_REG, p->f.n_regs, depth);
    return p->f.n_regs++;
}

/* %f12 of ".reg .f32 %f<37>": registers of a range exist once they are named. */
static int reg_of_range(parser *p, token t) {
    uint32_t digits = t.len;
    while (digits > 1 && isdigit((unsigned char)t.s[digits - 1])) digits--;
    if (digits == t.len || t.len - digits > 7 || (t.s[digits] == '0' && t.len - digits > 1))
        return -1;
    int number = 0;
    for (uint32_t i = digits; i < t.len; i++) number = 10 * number + (t.s[i] - '0');
    uint32_t h = hash(t.s, digits);
    for (int i = p->bucket[h % N_BUCKETS]; i >= 0; i = p->names[i].next) {
        named *n = &p->names[i];
        if (n->kind == N_RANGE && n->hash == h && n->len == digits && number < n->count &&
            !memcmp(n->s, t.s, digits))
            return add_reg(p, t, (sg_type)n->index, n->depth);
    }
    return -1;
}

static int find_reg(parser *p, token t) {
    int n = find_name(p, t.s, t.len);
    if (n >= 0) return p->names[n].kind == N_REG ? p->names[n].index : -1;
    return reg_of_range(p, t);
}

static int need_reg(parser *p, const char *what) {
    token t = need_word(p, what);
    int r = find_reg(p, t);
    if (r < 0) fail(p, t.line, "%.*s is no register", SHOWN(t.len), t.s);
    return r;
}

/* === 5. Numbers =============================================================================== */

typedef struct { char kind; uint64_t bits; double value; } number; /* kind: i; f, d: by bits; '.' */

static int digit(char c) {
    if (isdigit((unsigned char)c)) return c - '0';
    return isxdigit((unsigned char)c) ? tolower((unsigned char)c) - 'a' + 10 : 99;
}

static bool digits(const char *s, uint32_t len, unsigned base, uint64_t *value) {
    *value = 0;
    for (uint32_t i = 0; i < len; i++) {
        unsigned d = (unsigned)digit(s[i]);
        if (d >= base || *value > (UINT64_MAX - d) / base) return false;
        *value = *value * base + d;
    }
    return len > 0;
}

static bool decimal(const token *t, double *value) {
    char text[64], *end;
    if (t->len >= sizeof text) return false;
    memcpy(text, t->s, t->len);
    text[t->len] = 0;
    if (strspn(text, "0123456789.eE+-") != t->len) return false;
    *value = strtod(text, &end);
    return !*end;
}

static number need_number(parser *p) {
    bool negative = take(p, "-");
    token t = p->t;
    if (t.kind != K_NUMBER) unexpected(p, "a number");
    number n = {'i', 0, 0};
    uint32_t len = t.len - (t.len > 1 && t.s[t.len - 1] == 'U');
    char second = len > 1 ? (char)tolower((unsigned char)t.s[1]) : 0;
    bool zero = t.s[0] == '0', ok;
    if (zero && (second == 'f' || second == 'd')) {
        n.kind = second;
        ok = t.len == (second == 'f' ? 10u : 18u) && digits(t.s + 2, t.len - 2, 16, &n.bits);
        if (negative) n.bits ^= second == 'f' ? 1ull << 31 : 1ull << 63;
        float single;
        memcpy(&single, &n.bits, 4);
        memcpy(&n.value, &n.bits, 8);
        if (second == 'f') n.value = (double)single;
    } else if (zero && (second == 'x' || second == 'b')) {
        ok = digits(t.s + 2, len - 2, second == 'x' ? 16 : 2, &n.bits);
    } else if (zero && len > 1 && isdigit((unsigned char)second)) {
        ok = digits(t.s + 1, len - 1, 8, &n.bits);
    } else if (memchr(t.s, '.', t.len) || memchr(t.s, 'e', t.len) || memchr(t.s, 'E', t.len)) {
        n.kind = '.';
        ok = decimal(&t, &n.value);
        if (negative) n.value = -n.value;
    } else {
        ok = digits(t.s, len, 10, &n.bits);
    }
    if (!ok) fail(p, t.line, "%.*s is no number", SHOWN(t.len), t.s);
    if (negative && n.kind == 'i') n.bits = 0 - n.bits;
    next(p);
    return n;
}

/* An integer of 0 .. most. */
static uint64_t need_count(parser *p, uint64_t most, const char *what) {
    token t = p->t;
    number n = need_number(p);
    if (n.kind != 'i' || n.bits > most)
        fail(p, t.line, "%s %.*s is not in 0..%llu", what, SHOWN(t.len), t.s,
             (unsigned long long)most);
    return n.bits;
}

/* The bits of a number as an operand of type t. */
static uint64_t number_bits(parser *p, int line, number n, sg_type t) {
    uint64_t bits = 0;
    float single = (float)n.value;
    bool wide = t == T_F64;
    if (n.kind == 'i') {
        if (t == T_F32 || t == T_F64 || t == T_F32X2)
            fail(p, line, "an integer where a number of type %s should be", types[t].word);
        return n.bits;
    }
    if (t == T_F64 || (t != T_F32 && n.kind == 'd')) wide = true;
    if (!wide && t != T_F32 && n.kind != 'f')
        fail(p, line, "a decimal fraction where a number of type %s should be", types[t].word);
    if (n.kind == (wide ? 'd' : 'f')) return n.bits;       /* as written: NaNs keep their bits */
    if (wide) memcpy(&bits, &n.value, 8);
    else memcpy(&bits, &single, 4);
    return bits;
}

/* === 6. Variables ============================================================================= */

typedef struct {
    token name;
    sg_type type;
    uint64_t bytes, align;
    bool open;                             /* x[]: as long as what is behind it                 */
} declared;

static sg_type find_type(const char *s, size_t len) {
    for (int t = T_NONE + 1; t < T_N; t++)
        if (strlen(types[t].word) == len && !memcmp(types[t].word, s, len)) return (sg_type)t;
    return T_NONE;
}

static sg_type need_type(parser *p) {
    token t = need_word(p, "a type");
    sg_type type = t.s[0] == '.' ? find_type(t.s + 1, t.len - 1) : T_NONE;
    if (type == T_NONE) fail(p, t.line, "unknown type or directive %.*s", SHOWN(t.len), t.s);
    return type;
}

static uint64_t need_align(parser *p) {
    int line = p->t.line;
    uint64_t a = need_count(p, 1 << 16, ".align");
    if (!a || (a & (a - 1))) fail(p, line, ".align is no power of two");
    return a;
}

/* "[.align 8] .b8 name[24]", behind the word of its space. */
static declared declare(parser *p) {
    declared d = {.align = 0};
    if (take(p, ".align")) d.align = need_align(p);
    d.type = need_type(p);
    if (d.type == T_PRED) fail(p, p->t.line, "a variable of type .pred");
    if (take(p, ".ptr")) {                 /* of a parameter: what it points to                 */
        if (!take(p, ".global") && !take(p, ".const") && !take(p, ".shared")) take(p, ".local");
        if (take(p, ".align")) (void)need_align(p);
    }
    if (!d.align) d.align = types[d.type].bytes;
    d.name = need_word(p, "a name");
    uint64_t n = 1;
    while (take(p, "[")) {
        if (take(p, "]")) {
            if (d.open || n != 1) fail(p, p->t.line, "an array of unknown lengths");
            d.open = true;
            continue;
        }
        uint64_t more = need_count(p, MAX_BYTES, "a length of");
        if (more && n > MAX_BYTES / more) fail(p, p->t.line, "an array too large");
        n *= more;
        need(p, "]");
    }
    if (n > MAX_BYTES / types[d.type].bytes) fail(p, p->t.line, "an array too large");
    d.bytes = d.open ? 0 : n * types[d.type].bytes;
    return d;
}

static uint64_t align_up(uint64_t x, uint64_t align) { return (x + align - 1) & ~(align - 1); }

static int add_symbol(parser *p, const sg_symbol *s) {
    GROW(p, p->f.symbol, p->f.n_symbols, p->cap_symbol, MAX_SYMBOLS);
    p->f.symbol[p->f.n_symbols] = *s;
    return p->f.n_symbols++;
}

/* A variable of the module in the function being parsed; until lay_out(), module_symbol is its
 * index in p->var. */
static int use_variable(parser *p, int index) {
    variable *v = &p->var[index];
    if (v->func != p->f_index) {
        sg_symbol s = v->s;
        s.module_symbol = index;
        v->in_func = add_symbol(p, &s);
        v->func = p->f_index;
    }
    return v->in_func;
}

/* "msg", "generic(msg)", "msg+4": an address, known when the module is loaded. */
static void initial_address(parser *p, int symbol, uint64_t offset, sg_type type) {
    bool generic = take(p, "generic");
    if (generic) need(p, "(");
    token t = need_word(p, "a name");
    int n = find_name(p, t.s, t.len);
    int target = n >= 0 && p->names[n].kind == N_VARIABLE ?
                     p->var[p->names[n].index].module_symbol : -1;
    if (target < 0) fail(p, t.line, "no address of %.*s is known here", SHOWN(t.len), t.s);
    if (generic) need(p, ")");
    if (types[type].bytes != 8) fail(p, t.line, "an address in a type of other than 64 bits");
    uint64_t addend = 0;
    if (take(p, "+")) addend = need_number(p).bits;
    GROW(p, p->reloc, p->n_reloc, p->cap_reloc, 1 << 20);
    p->reloc[p->n_reloc++] = (sg_reloc){symbol, target, offset, addend};
}

/* What follows "=": a value, or {values}, braces within braces as they come. */
static void initialize(parser *p, sg_symbol *s, sg_type type, int symbol) {
    int line = p->t.line, depth = 0;
    uint64_t at = 0, size = types[type].bytes;
    if (s->bytes > MAX_INIT - p->init_bytes) fail(p, line, "more than 256 MB of initial values");
    p->init_bytes += s->bytes;
    uint8_t *init = keep(p, s->bytes);
    do {
        if (take(p, "{")) {
            depth++;
            continue;
        }
        if (p->t.kind != '}') {
            if (at + size > s->bytes || size > 8) fail(p, p->t.line, "too many initial values");
            if (p->t.kind == K_WORD) {
                initial_address(p, symbol, at, type);
            } else {
                int number_line = p->t.line;
                uint64_t bits = number_bits(p, number_line, need_number(p), type);
                memcpy(init + at, &bits, size);
            }
            at += size;
        }
        while (depth && take(p, "}")) depth--;
        if (depth) need(p, ",");
    } while (depth);
    s->init = init;
}

/* .global, .const, .shared of the module, and .shared of a function ("demoted"). */
static void module_variable(parser *p, sg_space space, bool is_extern) {
    declared d = declare(p);
    if (d.open != (is_extern && space == S_SHARED))
        fail(p, d.name.line, "%.*s: only .extern .shared has no length, and always",
             SHOWN(d.name.len), d.name.s);
    if (!d.open && is_extern)
        fail(p, d.name.line, "%.*s is defined elsewhere", SHOWN(d.name.len), d.name.s);
    GROW(p, p->var, p->n_var, p->cap_var, 1 << 20);
    variable *v = &p->var[p->n_var];
    *v = (variable){.func = -1, .module_symbol = -1};
    v->s = (sg_symbol){keep_copy(p, d.name.s, d.name.len), space, 0, d.bytes, d.align, NULL, -1};
    if (space != S_SHARED) v->module_symbol = p->own->m.n_symbols++;
    int index = p->n_var++;
    add_name(p, d.name, N_VARIABLE, index, p->depth);
    if (p->t.kind == '=') {
        if (space == S_SHARED) fail(p, p->t.line, "shared memory has no initial values");
        next(p);
        initialize(p, &v->s, d.type, v->module_symbol);
    }
    if (p->depth) use_variable(p, index);
    need(p, ";");
}

/* .local and .param inside a function. */
static void function_variable(parser *p, sg_space space) {
    declared d = declare(p);
    if (d.open) fail(p, d.name.line, "%.*s has no length", SHOWN(d.name.len), d.name.s);
    uint64_t *top = space == S_LOCAL ? &p->f.local_bytes : &p->param_top;
    sg_symbol s = {keep_copy(p, d.name.s, d.name.len), space, align_up(*top, d.align), d.bytes,
                   d.align, NULL, -1};
    if (s.bytes > MAX_FRAME || s.offset > MAX_FRAME - s.bytes)
        fail(p, d.name.line, "more than %d bytes of .%s", MAX_FRAME, spaces[space]);
    *top = s.offset + s.bytes;
    if (p->param_top > p->f.param_bytes) p->f.param_bytes = p->param_top;
    add_name(p, d.name, N_SYMBOL, add_symbol(p, &s), p->depth);
    need(p, ";");
}

/* ".reg .f32 %f<37>, %a, %b;" */
static void registers(parser *p) {
    sg_type type = need_type(p);
    do {
        token t = need_word(p, "a register's name");
        if (take(p, "<")) {
            named *n = add_name(p, t, N_RANGE, (int)type, p->depth);
            n->count = (int)need_count(p, 1 << 24, "a range of");
            need(p, ">");
        } else {
            (void)add_reg(p, t, type, p->depth);
        }
    } while (take(p, ","));
    need(p, ";");
}

/* === 7. Operands ============================================================================== */

/* The type that an immediate stands for as operand k. */
static sg_type immediate_type(const sg_instr *i, int k) {
    if (i->op == OP_CVT || i->op == OP_SET) return (sg_type)i->type[1];
    if (i->op == OP_SLCT) return (sg_type)i->type[k == 3];
    return (sg_type)i->type[0];
}

static void immediate(parser *p, sg_instr *i, sg_operand *o, int k) {
    int line = p->t.line;
    o->kind = O_IMM;
    o->imm = number_bits(p, line, need_number(p), immediate_type(i, k));
}

/* +4, +-4, -4 behind a register or a symbol. */
static uint64_t offset(parser *p) {
    if (p->t.kind == '-' || take(p, "+")) {
        number n = need_number(p);
        if (n.kind != 'i') fail(p, p->t.line, "a fraction as an offset");
        return n.bits;
    }
    return 0;
}

/* A variable's index in the function's symbols, or -1. */
static int find_symbol(parser *p, token t) {
    int n = find_name(p, t.s, t.len);
    if (n < 0) return -1;
    if (p->names[n].kind == N_SYMBOL) return p->names[n].index;
    return p->names[n].kind == N_VARIABLE ? use_variable(p, p->names[n].index) : -1;
}

static void address(parser *p, sg_operand *o) {
    need(p, "[");
    o->kind = O_ADDR;
    if (p->t.kind == K_WORD) {
        token t = p->t;
        next(p);
        o->reg = find_reg(p, t);
        if (o->reg < 0) o->symbol = find_symbol(p, t);
        if (o->reg < 0 && o->symbol < 0)
            fail(p, t.line, "%.*s is not declared", SHOWN(t.len), t.s);
        o->imm = offset(p);
    } else {
        o->imm = need_count(p, UINT64_MAX, "an address");
    }
    need(p, "]");
}

static void vector(parser *p, sg_instr *i, sg_operand *o, int k) {
    need(p, "{");
    o->kind = O_VEC;
    do {
        if (o->n == SG_VEC_MAX)
            fail(p, p->t.line, "a vector of more than %d elements", SG_VEC_MAX);
        int e = o->n++, line = p->t.line;
        o->vec[e] = -1;
        if (p->t.kind != K_WORD) {
            o->vec[e] = -2;
            o->vec_imm[e] = number_bits(p, line, need_number(p), immediate_type(i, k));
        } else if (!take(p, "_")) {
            o->vec[e] = need_reg(p, "a register");
        }
    } while (take(p, ","));
    need(p, "}");
}

static void word_operand(parser *p, sg_operand *o) {
    token t = need_word(p, "an operand");
    o->reg = is(&t, "_") ? -1 : find_reg(p, t);
    if (o->reg >= 0) {
        o->kind = O_REG;
        return;
    }
    if (is(&t, "_")) {
        o->kind = O_SINK;
        return;
    }
    for (int s = 0; s < SR_N; s++)
        if (is(&t, specials[s])) {
            o->kind = O_SPECIAL;
            o->reg = s;
            return;
        }
    o->symbol = find_symbol(p, t);
    if (o->symbol < 0)
        fail(p, t.line, "%s %.*s", t.s[0] == '%' ? "unknown register" : "no operand is",
             SHOWN(t.len), t.s);
    o->kind = O_SYMBOL;
    o->imm = offset(p);
}

static void operand(parser *p, sg_instr *i, int k) {
    sg_operand *o = &i->o[k];
    *o = (sg_operand){.kind = O_NONE, .reg = -1, .symbol = -1};
    if (p->t.kind == '[') {
        address(p, o);
    } else if (p->t.kind == '{') {
        vector(p, i, o, k);
    } else if (p->t.kind == K_NUMBER) {
        immediate(p, i, o, k);
    } else if (p->t.kind == '-') {
        const char *behind = p->at;
        while (behind < p->end && (*behind == ' ' || *behind == '\t')) behind++;
        if (behind < p->end && isdigit((unsigned char)*behind)) {
            immediate(p, i, o, k);
        } else {
            next(p);
            o->negate = true;
            word_operand(p, o);
        }
    } else {
        o->negate = take(p, "!");
        word_operand(p, o);
    }
    if (o->negate && o->kind != O_REG) fail(p, p->t.line, "only a register can be negated");
}

static void label(parser *p, sg_instr *i) {
    token t = need_word(p, "a label");
    i->o[0] = (sg_operand){.kind = O_LABEL, .reg = -1, .symbol = -1};
    GROW(p, p->jumps, p->n_jumps, p->cap_jumps, MAX_CODE);
    p->jumps[p->n_jumps++] = (jump){p->f.n, t.line, t.s, t.len};
    i->n = 1;
}

/* "(a, b)" of a call: variables in .param. */
static void call_params(parser *p, sg_operand *o) {
    *o = (sg_operand){.kind = O_VEC, .reg = -1, .symbol = -1};
    if (!take(p, "(")) return;
    while (!take(p, ")")) {
        token t = need_word(p, "a parameter");
        int s = find_symbol(p, t);
        if (s < 0 || p->f.symbol[s].space != S_PARAM)
            fail(p, t.line, "%.*s is no .param variable", SHOWN(t.len), t.s);
        if (o->n == SG_VEC_MAX)
            fail(p, t.line, "a call with more than %d parameters", SG_VEC_MAX);
        o->vec[o->n++] = s;
        if (p->t.kind != ')') need(p, ",");
    }
}

static void check_params(parser *p, const sg_func *f, const sg_operand *o, int first, int n) {
    bool same = o->n == n;
    for (int k = 0; same && k < n; k++)
        same = p->f.symbol[o->vec[k]].bytes == f->symbol[first + k].bytes;
    if (!same) fail(p, p->t.line, "a call of %.60s with other parameters than it has", f->name);
}

/* "call.uni (result), f, (arguments);", each in parentheses may be missing. */
static void call(parser *p, sg_instr *i) {
    call_params(p, &i->o[1]);
    if (i->o[1].n) need(p, ",");
    token t = need_word(p, "a function");
    int n = find_name(p, t.s, t.len);
    if (n < 0 || p->names[n].kind != N_FUNC)
        fail(p, t.line, "call of %.*s, which is no known function", SHOWN(t.len), t.s);
    int index = p->names[n].index;
    i->o[0] = (sg_operand){.kind = O_FUNC, .reg = index, .symbol = -1};
    bool more = take(p, ",");
    if (more && p->t.kind != '(') unexpected(p, "(");
    call_params(p, &i->o[2]);
    i->n = 3;
    const sg_func *f = index == p->f_index ? &p->f : &p->func[index];
    check_params(p, f, &i->o[1], f->n_params, f->n_results);
    check_params(p, f, &i->o[2], 0, f->n_params);
}

static void check_operand(parser *p, const sg_instr *i, int k, char want) {
    const sg_operand *o = &i->o[k];
    bool value = (o->kind == O_REG || o->kind == O_IMM || o->kind == O_SPECIAL ||
                  o->kind == O_SYMBOL);
    bool plain = (o->kind == O_REG || o->kind == O_SINK) && !o->negate;
    bool ok = false;
    if (want == 'd' || want == 'e') ok = plain;
    if (want == 'D') ok = plain || o->kind == O_VEC;
    if (want == 's') ok = value;
    if (want == 'S') ok = value || o->kind == O_VEC;
    if (want == 'V') ok = o->kind == O_VEC;
    if (want == 'a') ok = o->kind == O_ADDR;
    if (!ok)
        fail(p, i->ptx_line, "operand %d of %s is not what it should be", k + 1, op_words[i->op]);
    for (int e = 0; e < o->n; e++)
        if (o->vec[e] == -2 && (want == 'D' || i->op == OP_LDMATRIX))
            fail(p, i->ptx_line, "a constant cannot be written");
}

/* All operands by the operation's pattern. */
static void operands(parser *p, sg_instr *i, const char *pattern) {
    bool first = true, optional = false;
    for (; *pattern; pattern++) {
        if (*pattern == '?') {
            optional = true;
            continue;
        }
        if (*pattern == 'e') {
            if (!take(p, "|")) continue;
        } else if (p->t.kind == ';' && optional) {
            break;
        } else if (!first) {
            need(p, ",");
        }
        if (i->n == SG_OPERANDS) fail(p, p->t.line, "more than %d operands", SG_OPERANDS);
        operand(p, i, i->n);
        check_operand(p, i, i->n, *pattern);
        i->n++;
        first = false;
    }
}

/* === 8. Instructions ========================================================================== */

/* The operation that a mnemonic begins with; *len becomes the length of its words. */
static sg_op find_op(const char *s, size_t *len) {
    sg_op best = OP_N;
    size_t longest = 0;
    for (int op = 0; op < OP_N; op++) {
        size_t n = strlen(op_words[op]);
        if (n <= *len && n > longest && !memcmp(s, op_words[op], n) && (n == *len || s[n] == '.')) {
            longest = n;
            best = (sg_op)op;
        }
    }
    *len = longest;
    return best;
}

/* One word of a mnemonic behind its operation. */
static bool modify(sg_instr *i, const char *s, size_t len) {
    sg_type type = find_type(s, len);
    if (type != T_NONE) {
        if (i->n_types == 4) return false;
        i->type[i->n_types++] = (uint8_t)type;
        return true;
    }
    static const char cta[] = "shared::cta", entry[] = "param::entry", func[] = "param::func";
    if (len == strlen(cta) && !memcmp(s, cta, len)) len = 6;
    if ((len == strlen(entry) && !memcmp(s, entry, len)) ||
        (len == strlen(func) && !memcmp(s, func, len))) len = 5;
    for (int space = S_GLOBAL; space <= S_PARAM; space++)
        if (strlen(spaces[space]) == len && !memcmp(spaces[space], s, len)) {
            if (i->space == S_GENERIC) i->space = (uint8_t)space;
            return true;                   /* of cp.async the first: shared                     */
        }
    for (int m = 0; m < M_N; m++)
        if (strlen(mod_words[m]) == len && !memcmp(mod_words[m], s, len)) {
            i->mod[m / 64] |= 1ull << (m % 64);
            return true;
        }
    return false;
}

static void mnemonic(parser *p, sg_instr *i) {
    token t = need_word(p, "an instruction");
    size_t len = t.len;
    i->op = find_op(t.s, &len);
    if (i->op == OP_N) fail(p, t.line, "unknown opcode %.*s", SHOWN(t.len), t.s);
    const char *s = t.s + len, *end = t.s + t.len;
    while (s < end) {
        const char *word = ++s;
        while (s < end && *s != '.') s++;
        if (!modify(i, word, (size_t)(s - word)))
            fail(p, t.line, "unknown modifier %.*s of %.*s", SHOWN(s - word), word, SHOWN(t.len),
                 t.s);
    }
    if (i->n_types != patterns[i->op][0] - '0')
        fail(p, t.line, "%.*s has %d types, not %c", SHOWN(t.len), t.s, i->n_types,
             patterns[i->op][0]);
    i->vec = sg_has(i, M_V8) ? 8 : sg_has(i, M_V4) ? 4 : sg_has(i, M_V2) ? 2 : 1;
    bool memory = i->op == OP_LD || i->op == OP_LDU || i->op == OP_ST;
    if (i->vec > 1 && !memory)
        fail(p, t.line, "unknown: a vector form of %.*s", SHOWN(t.len), t.s);
}

static void guard(parser *p, sg_instr *i) {
    i->guard = -1;
    if (!take(p, "@")) return;
    i->guard_not = take(p, "!");
    int line = p->t.line;
    i->guard = need_reg(p, "a predicate");
    if (p->f.reg[i->guard] != T_PRED) fail(p, line, "a guard that is no predicate");
}

static void check_instr(parser *p, const sg_instr *i) {
    if (i->op == OP_LD || i->op == OP_LDU || i->op == OP_ST) {
        const sg_operand *o = &i->o[i->op == OP_ST];
        if ((o->kind == O_VEC ? o->n : 1) != i->vec)
            fail(p, i->ptx_line, "a vector of %d where %d should be", o->n, i->vec);
    }
    if (i->op == OP_MOV && i->o[0].kind == O_VEC && i->o[1].kind == O_VEC)
        fail(p, i->ptx_line, "unknown: mov from a vector to a vector");
    if (i->op == OP_ISSPACEP && i->space == S_GENERIC)
        fail(p, i->ptx_line, "isspacep without a space");
}

static void instruction(parser *p) {
    GROW(p, p->f.code, p->f.n, p->cap_code, MAX_CODE);
    sg_instr *i = &p->f.code[p->f.n];
    *i = (sg_instr){.ptx_line = p->t.line, .file = p->loc_file, .line = p->loc_line,
                    .reconverge = -1, .text = p->t.s};
    guard(p, i);
    mnemonic(p, i);
    const char *pattern = patterns[i->op] + 1;
    if (*pattern == 'l') label(p, i);
    else if (*pattern == 'c') call(p, i);
    else operands(p, i, pattern);
    if (p->t.kind != ';') unexpected(p, "; or the next operand");
    check_instr(p, i);
    i->text_len = (uint32_t)(p->t.s - i->text);
    next(p);
    p->f.n++;
}

/* === 9. Control flow ==========================================================================
 * Where the paths of a branch meet again: its immediate post-dominator in the graph of basic
 * blocks, found backwards from a node behind all ends [Cooper, Harvey, Kennedy 2001].
 *
 *         if (a) {             A ---> B ---> y ---> z ---> ret       Edges to a block that only
 *             if (b) return;   |      |             ^       ^        leaves do not count, if there
 *             y;               +------+-------------+       |        is another: its lanes never
 *         }                           +---------------------+        meet anybody again.  So A's
 *         z;                                                         paths meet at z, B's at y.
 *
 * A block also counts as leaving when only one branch leads to it, that branch's other way leads
 * elsewhere, and all that follows it are leaving blocks: "if (b) { x; return; }".               */

typedef struct {
    int first, last;                       /* instructions                                      */
    int to[2], n_to;                       /* blocks; n_blocks: the end                         */
    int n_from;                            /* edges that lead here                              */
    bool leaves, dropped[2], reaches;      /* dropped: that edge does not count                 */
} block;

static bool ends_path(const sg_instr *i) { return i->op == OP_RET || i->op == OP_EXIT; }

static block *find_blocks(parser *p, const sg_func *f, int *n_blocks, int *block_of) {
    for (int i = 0; i < f->n; i++) block_of[i] = i == 0;
    for (int i = 0; i < f->n; i++) {
        if (f->code[i].op == OP_BRA) block_of[f->code[i].o[0].reg] = 1;
        bool ends = f->code[i].op == OP_BRA || ends_path(&f->code[i]);
        if (ends && i + 1 < f->n) block_of[i + 1] = 1;
    }
    int n = 0;
    for (int i = 0; i < f->n; i++) {
        n += block_of[i];
        block_of[i] = n - 1;
    }
    block *b = keep(p, (size_t)n * sizeof *b);
    for (int i = f->n - 1; i >= 0; i--) {
        b[block_of[i]].first = i;
        if (i == f->n - 1 || block_of[i + 1] != block_of[i]) b[block_of[i]].last = i;
    }
    for (int k = 0; k < n; k++) {
        const sg_instr *last = &f->code[b[k].last];
        bool jumps = last->op == OP_BRA || ends_path(last);
        if (last->op == OP_BRA) b[k].to[b[k].n_to++] = block_of[last->o[0].reg];
        if (ends_path(last)) b[k].to[b[k].n_to++] = n;
        if (!jumps || last->guard >= 0) {
            int after = k + 1;
            if (!b[k].n_to || b[k].to[0] != after) b[k].to[b[k].n_to++] = after;
        }
    }
    for (int k = 0; k < n; k++)
        for (int e = 0; e < b[k].n_to; e++)
            if (b[k].to[e] < n) b[b[k].to[e]].n_from++;
    *n_blocks = n;
    return b;
}

static bool is_leaving(const block *b, int n, int k) { return k == n || b[k].leaves; }

/* Whether block k, reached only from block `from`, leaves as a whole. */
static bool leaves_too(const block *b, int n, int k, int from) {
    if (b[k].leaves || b[k].n_from != 1 || b[from].n_to != 2) return false;
    int other = b[from].to[b[from].to[0] == k];
    if (is_leaving(b, n, other)) return false;
    for (int e = 0; e < b[k].n_to; e++)
        if (!is_leaving(b, n, b[k].to[e])) return false;
    return true;
}

/* Marks the blocks that only leave; of two at one branch the shorter, so that the long one, with
 * the barriers, goes on. */
static void find_leaving(const sg_func *f, block *b, int n) {
    for (int k = 0; k < n; k++)
        b[k].leaves = b[k].first == b[k].last && ends_path(&f->code[b[k].first]) &&
                      f->code[b[k].first].guard < 0;
    for (int k = n - 1; k >= 0; k--) {
        int take_it = -1, size = 0;
        for (int e = 0; e < b[k].n_to; e++) {
            int t = b[k].to[e];
            if (t == n || !leaves_too(b, n, t, k)) continue;
            int t_size = b[t].last - b[t].first;
            if (take_it < 0 || t_size < size) take_it = t, size = t_size;
        }
        if (take_it >= 0) b[take_it].leaves = true;
    }
    for (int k = 0; k < n; k++)
        for (int e = 0; e < 2 && b[k].n_to == 2; e++)
            b[k].dropped[e] = is_leaving(b, n, b[k].to[e]) && !is_leaving(b, n, b[k].to[1 - e]);
}

/* Edges that count, backwards: list[from[k] .. from[k + 1]) are the blocks before k. */
static void edges_back(const block *b, int n, int *from, int *list) {
    memset(from, 0, (size_t)(n + 2) * sizeof *from);
    for (int k = 0; k < n; k++)
        for (int e = 0; e < b[k].n_to; e++)
            if (!b[k].dropped[e]) from[b[k].to[e] + 1]++;
    for (int k = 0; k <= n; k++) from[k + 1] += from[k];
    for (int k = 0; k < n; k++)
        for (int e = 0; e < b[k].n_to; e++)
            if (!b[k].dropped[e]) list[from[b[k].to[e]]++] = k;
    for (int k = n; k > 0; k--) from[k] = from[k - 1];
    from[0] = 0;
}

/* Post-order, from the end backwards: order[] of the blocks that reach it; returns their number.
 * stack and at are working space. */
static int post_order(block *b, int n, const int *from, const int *list, int *order, int *stack,
                      int *at) {
    int depth = 0, found = 0;
    for (int k = 0; k < n; k++) b[k].reaches = false;
    for (int k = 0; k <= n; k++) at[k] = from[k];
    stack[depth++] = n;
    while (depth) {
        int k = stack[depth - 1];
        if (at[k] == from[k + 1]) {
            order[found++] = k;
            depth--;
            continue;
        }
        int before = list[at[k]++];
        if (b[before].reaches) continue;
        b[before].reaches = true;
        stack[depth++] = before;
    }
    return found;
}

/* meet[k]: the immediate post-dominator of block k, n for the end, -1 where none is. */
static void post_dominators(const block *b, int n, const int *order, int found, int *rank,
                            int *meet) {
    for (int k = 0; k <= n; k++) meet[k] = -1;
    for (int r = 0; r < found; r++) rank[order[r]] = r;
    meet[n] = n;
    for (bool changed = true; changed;) {
        changed = false;
        for (int r = found - 2; r >= 0; r--) {
            int k = order[r], m = -1;
            for (int e = 0; e < b[k].n_to; e++) {
                int t = b[k].to[e];
                if (b[k].dropped[e] || meet[t] < 0) continue;
                while (m >= 0 && m != t) {
                    if (rank[m] < rank[t]) m = meet[m];
                    else t = meet[t];
                }
                m = t;
            }
            if (meet[k] != m) changed = true;
            meet[k] = m;
        }
    }
}

/* A loop that is only left by leaving: its way out counts after all, that of the last block first,
 * which is the end of the loop. */
static bool restore(block *b, int n, bool all) {
    bool any = false;
    for (int k = n - 1; k >= 0 && (all || !any); k--) {
        if (b[k].reaches || !(b[k].dropped[0] || b[k].dropped[1])) continue;
        b[k].dropped[0] = b[k].dropped[1] = false;
        any = true;
    }
    return any;
}

static void connect(parser *p, sg_func *f) {
    int n, count = f->n + 2;
    int *space = keep(p, (size_t)count * 9 * sizeof *space);
    int *block_of = space, *from = space + count, *list = space + 2 * count;
    int *order = space + 4 * count, *stack = space + 5 * count, *at = space + 6 * count;
    int *rank = space + 7 * count, *meet = space + 8 * count;
    block *b = find_blocks(p, f, &n, block_of);
    find_leaving(f, b, n);
    edges_back(b, n, from, list);
    int found = post_order(b, n, from, list, order, stack, at);
    for (int tries = 0; found < n + 1 && restore(b, n, tries == 64); tries++) {
        edges_back(b, n, from, list);
        found = post_order(b, n, from, list, order, stack, at);
    }
    post_dominators(b, n, order, found, rank, meet);
    for (int k = 0; k < n; k++) {
        int m = meet[k];
        if (f->code[b[k].last].op == OP_BRA && m >= 0 && m < n)
            f->code[b[k].last].reconverge = b[m].first;
    }
}

/* === 10. Functions ============================================================================ */

/* "(.param .b32 a, .param .align 8 .b8 b[24])"; returns how many. */
static int parameters(parser *p) {
    int n = 0;
    need(p, "(");
    while (!take(p, ")")) {
        need(p, ".param");
        declared d = declare(p);
        if (d.open) fail(p, d.name.line, "%.*s has no length", SHOWN(d.name.len), d.name.s);
        sg_symbol s = {keep_copy(p, d.name.s, d.name.len), S_PARAM, 0, d.bytes, d.align, NULL, -1};
        if (s.bytes > MAX_FRAME) fail(p, d.name.line, "a parameter too large");
        add_name(p, d.name, N_SYMBOL, add_symbol(p, &s), p->depth);
        n++;
        if (p->t.kind != ')') need(p, ",");
    }
    return n;
}

/* Parameters come first, in their order, then results: in the symbols and in their addresses. */
static void place_parameters(parser *p) {
    sg_func *f = &p->f;
    uint64_t top = 0;
    for (int i = 0; i < f->n_params + f->n_results; i++) {
        sg_symbol *s = &f->symbol[i];
        s->offset = align_up(top, s->align);
        top = s->offset + s->bytes;
        if (top > MAX_FRAME) fail(p, p->t.line, "more than %d bytes of .param", MAX_FRAME);
        if (i + 1 == f->n_params) f->args_bytes = top;
    }
    f->param_bytes = p->param_top = top;
}

/* Of functions, text has the results first. */
static void rotate_results(parser *p, int results) {
    sg_func *f = &p->f;
    int n = f->n_symbols;
    sg_symbol *s = keep(p, (size_t)(n + 1) * sizeof *s);
    for (int i = 0; i < n; i++) s[i] = f->symbol[(i + results) % n];
    if (n) memcpy(f->symbol, s, (size_t)n * sizeof *s);
    for (int i = p->scopes[p->depth].names; i >= 0; i = p->names[i].scope_next)
        p->names[i].index = (p->names[i].index + n - results) % n;
    f->n_results = results;
    f->n_params = n - results;
}

/* Between the parameters and the body. */
static void limits(parser *p) {
    for (;;) {
        if (take(p, ".maxntid") || take(p, ".reqntid")) {
            uint64_t n = 1;
            do n *= need_count(p, 1024, "threads"); while (take(p, ",") && n <= 1024);
            if (n > 1024) fail(p, p->t.line, "more than 1024 threads");
            p->f.max_threads = (int)n;
        } else if (take(p, ".minnctapersm")) {
            p->f.min_blocks = (int)need_count(p, 1024, ".minnctapersm");
        } else if (take(p, ".maxnreg")) {
            (void)need_count(p, 1024, ".maxnreg");
        } else if (take(p, ".pragma")) {
            while (p->t.kind != ';' && p->t.kind) next(p);
            need(p, ";");
        } else if (!take(p, ".noreturn")) {
            break;
        }
    }
}

/* Which files are the toolkit's: the .file lines come last. */
static void find_headers(parser *p, const char *text, size_t len) {
    const char *at = text, *end = text + len;
    while ((at = memmem(at, (size_t)(end - at), ".file\t", 6))) {
        char line[512] = "";
        at += 6;
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        size_t n = (size_t)((stop ? stop : end) - at);
        memcpy(line, at, n < sizeof line - 1 ? n : sizeof line - 1);
        int file_number = atoi(line);
        if (file_number >= 0 && file_number < N_HEADERS)
            p->header[file_number] = strstr(line, "/include/") != NULL;
    }
}

/* What is inlined from a header of the toolkit (__shfl_sync, say) counts as the line that calls. */
static void location(parser *p) {
    int here = p->t.line, at_file, at_line, at_column;
    int file = (int)need_count(p, MAX_FILES, "file");
    uint64_t line = need_count(p, INT32_MAX, "line");
    int column = (int)need_count(p, INT32_MAX, "column"), of_file = file, of_line = (int)line;
    if (p->t.line == here && file < N_HEADERS && p->header[file]) {
        const char *stop = memchr(p->at, '\n', (size_t)(p->end - p->at));
        const char *in = memmem(p->at, (size_t)((stop ? stop : p->end) - p->at), "inlined_at", 10);
        if (in && sscanf(in + 10, "%d %d %d", &at_file, &at_line, &at_column) == 3) {
            of_file = at_file;
            of_line = at_line;
            for (unsigned k = p->n_locs; k-- && p->n_locs - k <= N_LOCS;) {
                if (p->loc[k % N_LOCS].file != at_file || p->loc[k % N_LOCS].line != at_line ||
                    p->loc[k % N_LOCS].column != at_column) continue;
                of_file = p->loc[k % N_LOCS].of_file;
                of_line = p->loc[k % N_LOCS].of_line;
                break;
            }
        }
    }
    unsigned k = p->n_locs++ % N_LOCS;
    p->loc[k].file = file, p->loc[k].line = (int)line, p->loc[k].column = column;
    p->loc[k].of_file = of_file, p->loc[k].of_line = of_line;
    if (line) {                            /* 0: made by the compiler, as the line before it    */
        p->loc_file = of_file;
        p->loc_line = of_line;
    }
    if (p->t.line == here) skip_line(p);
}

static bool at_label(parser *p) {
    const char *s = p->at;
    while (s < p->end && (*s == ' ' || *s == '\t')) s++;
    return p->t.kind == K_WORD && p->t.s[0] != '.' && s < p->end && *s == ':';
}

static void body_directive(parser *p) {
    token t = need_word(p, "an instruction");
    if (is(&t, ".reg")) registers(p);
    else if (is(&t, ".loc")) location(p);
    else if (is(&t, ".local")) function_variable(p, S_LOCAL);
    else if (is(&t, ".param")) function_variable(p, S_PARAM);
    else if (is(&t, ".shared")) module_variable(p, S_SHARED, false);
    else if (is(&t, ".global")) module_variable(p, S_GLOBAL, false);
    else if (is(&t, ".const")) module_variable(p, S_CONST, false);
    else if (is(&t, ".pragma")) {
        while (p->t.kind != ';' && p->t.kind) next(p);
        need(p, ";");
    } else fail(p, t.line, "unknown directive %.*s", SHOWN(t.len), t.s);
}

/* "{ ... }" with scopes in it. */
static void body(parser *p) {
    int outside = p->depth;
    do {
        if (take(p, "{")) {
            open_scope(p);
        } else if (p->t.kind == '}') {
            close_scope(p);
            if (p->depth > outside) next(p);
        } else if (at_label(p)) {
            add_name(p, p->t, N_LABEL, p->f.n, p->depth);
            next(p);
            next(p);
        } else if (p->t.kind == K_WORD && p->t.s[0] == '.') {
            body_directive(p);
        } else if (!take(p, ";")) {
            instruction(p);
        }
    } while (p->depth > outside);
    if (p->n_jumps)
        fail(p, p->jumps[0].line, "no label %.*s", SHOWN(p->jumps[0].len), p->jumps[0].s);
}

/* Every path ends in an instruction that ends it: one more, if need be. */
static void add_end(parser *p, sg_op op) {
    GROW(p, p->f.code, p->f.n, p->cap_code, MAX_CODE + 2);
    p->f.code[p->f.n++] = (sg_instr){.op = op, .guard = -1, .reconverge = -1, .ptx_line = p->t.line,
                    .file = p->loc_file, .line = p->loc_line, .vec = 1};
}

static bool needs_end(const sg_func *f) {
    if (!f->n || !ends_path(&f->code[f->n - 1]) || f->code[f->n - 1].guard >= 0) return true;
    for (int i = 0; i < f->n; i++)
        if (f->code[i].op == OP_BRA && f->code[i].o[0].reg == f->n) return true;
    return false;
}

/* What grew moves into the module. */
static void keep_function(parser *p) {
    sg_func *f = &p->f, *to = &p->func[p->f_index];
    *to = *f;
    to->code = keep_copy(p, f->code, (size_t)f->n * sizeof *f->code);
    to->reg = keep_copy(p, f->reg, (size_t)f->n_regs * sizeof *f->reg);
    to->reg_name = keep_copy(p, f->reg_name, (size_t)f->n_regs * sizeof *f->reg_name);
    to->symbol = keep_copy(p, f->symbol, (size_t)f->n_symbols * sizeof *f->symbol);
}

static bool same_parameters(const sg_func *a, const sg_func *b) {
    if (a->n_params != b->n_params || a->n_results != b->n_results) return false;
    for (int i = 0; i < a->n_params + a->n_results; i++)
        if (a->symbol[i].bytes != b->symbol[i].bytes || a->symbol[i].align != b->symbol[i].align)
            return false;
    return true;
}

/* The function's place among those known; a declaration may come before the definition. */
static int function_index(parser *p, token t) {
    int n = find_name(p, t.s, t.len);
    if (n >= 0 && p->names[n].kind == N_FUNC) return p->names[n].index;
    GROW(p, p->func, p->n_func, p->cap_func, 1 << 20);
    p->func[p->n_func] = (sg_func){.name = keep_copy(p, t.s, t.len), .external = true};
    add_name(p, t, N_FUNC, p->n_func, 0);
    return p->n_func++;
}

/* ".entry name (params) limits { body }"; ".func (results) name (params) ...", or ";". */
static void function(parser *p, bool entry) {
    sg_func *f = &p->f;
    f->n = f->n_regs = f->n_symbols = 0;
    *f = (sg_func){.code = f->code, .reg = f->reg, .reg_name = f->reg_name, .symbol = f->symbol,
                   .entry = entry};
    p->n_jumps = 0;
    p->param_top = 0;
    p->loc_file = p->loc_line = 0;
    open_scope(p);
    int results = !entry && p->t.kind == '(' ? parameters(p) : 0;
    token t = need_word(p, "a function's name");
    int known = p->n_func;
    p->f_index = function_index(p, t);
    sg_func *before = &p->func[p->f_index];
    f->name = before->name;
    if (p->t.kind == '(') (void)parameters(p);
    rotate_results(p, results);
    place_parameters(p);
    if (p->f_index < known) {
        if (!same_parameters(before, f) || before->entry != entry)
            fail(p, t.line, "%.60s was declared otherwise", f->name);
        if (!before->external && p->t.kind == '{')
            fail(p, t.line, "%.60s is defined twice", f->name);
    }
    limits(p);
    if (p->t.kind == '{') {
        before->entry = entry;             /* a call of itself sees what it is                  */
        body(p);
        if (needs_end(f)) add_end(p, OP_RET);
        keep_function(p);
        connect(p, &p->func[p->f_index]);
        close_scope(p);
        next(p);
    } else {
        close_scope(p);
        f->external = true;
        add_end(p, OP_TRAP);
        add_end(p, OP_RET);
        if (p->func[p->f_index].external) keep_function(p);
        need(p, ";");
    }
}

/* === 11. The module =========================================================================== */

static void skip_section(parser *p) {
    while (p->t.kind && p->t.kind != '{') next(p);
    for (int depth = 0; p->t.kind;) {
        depth += (p->t.kind == '{') - (p->t.kind == '}');
        next(p);
        if (!depth) return;
    }
    fail(p, p->t.line, "a section without end");
}

static void file(parser *p) {
    sg_module *m = &p->own->m;
    int n = (int)need_count(p, MAX_FILES - 1, ".file");
    if (p->t.kind != K_STRING) unexpected(p, "a file's name");
    if (n >= p->cap_files) {               /* in the module: few                                */
        int cap = 2 * n + 16;
        const char **files = keep(p, (size_t)cap * sizeof *files);
        for (int i = 0; i < cap; i++) files[i] = i < m->n_files ? m->file[i] : "?";
        m->file = files;
        p->cap_files = cap;
    }
    m->file[n] = keep_copy(p, p->t.s + 1, p->t.len - 2);
    if (n >= m->n_files) m->n_files = n + 1;
    skip_line(p);
}

static void target(parser *p) {
    token t = need_word(p, "sm_80 or the like");
    uint64_t cc = 0;
    uint32_t len = t.len;
    while (len > 3 && !isdigit((unsigned char)t.s[len - 1])) len--;
    if (t.len < 5 || memcmp(t.s, "sm_", 3) || !digits(t.s + 3, len - 3, 10, &cc) || cc > 999)
        fail(p, t.line, "unknown target %.*s", SHOWN(t.len), t.s);
    p->own->m.cc = (int)cc;
    while (take(p, ",")) (void)need_word(p, "a target's option");
}

static void module_directive(parser *p) {
    token t = need_word(p, "a directive");
    bool is_extern = false;
    while (is(&t, ".visible") || is(&t, ".extern") || is(&t, ".weak")) {
        is_extern |= is(&t, ".extern");
        t = need_word(p, "a directive");
    }
    if (is(&t, ".version")) (void)need_number(p);
    else if (is(&t, ".target")) target(p);
    else if (is(&t, ".address_size")) {
        if (need_number(p).bits != 64) fail(p, t.line, ".address_size is not 64");
    }
    else if (is(&t, ".entry")) function(p, true);
    else if (is(&t, ".func")) function(p, false);
    else if (is(&t, ".global")) module_variable(p, S_GLOBAL, is_extern);
    else if (is(&t, ".const")) module_variable(p, S_CONST, is_extern);
    else if (is(&t, ".shared")) module_variable(p, S_SHARED, is_extern);
    else if (is(&t, ".file")) file(p);
    else if (is(&t, ".section")) skip_section(p);
    else if (is(&t, ".pragma")) {
        while (p->t.kind != ';' && p->t.kind) next(p);
        need(p, ";");
    } else fail(p, t.line, "unknown directive %.*s", SHOWN(t.len), t.s);
}

/* Marks what function f reaches by calls, itself included.  A stack of at most all functions. */
static void mark_reached(const parser *p, int f, uint8_t *reached, int *stack) {
    int depth = 0;
    memset(reached, 0, (size_t)p->n_func);
    reached[f] = 1;
    stack[depth++] = f;
    while (depth) {
        const sg_func *at = &p->func[stack[--depth]];
        for (int i = 0; i < at->n; i++) {
            if (at->code[i].op != OP_CALL || reached[at->code[i].o[0].reg]) continue;
            reached[at->code[i].o[0].reg] = 1;
            stack[depth++] = at->code[i].o[0].reg;
        }
    }
}

static bool is_shared(const sg_symbol *s, bool dynamic) {
    return s->space == S_SHARED && !s->bytes == dynamic;
}

/* Variables in .shared that functions other than entries name have one place for all entries: at
 * the beginning.  Returns their bytes. */
static uint64_t place_common(parser *p) {
    uint64_t top = 0;
    for (int f = 0; f < p->n_func; f++)
        for (int s = 0; s < p->func[f].n_symbols && !p->func[f].entry; s++) {
            if (!is_shared(&p->func[f].symbol[s], false)) continue;
            variable *v = &p->var[p->func[f].symbol[s].module_symbol];
            if (!v->placed) v->s.offset = align_up(top, v->s.align), top = v->s.offset + v->s.bytes;
            v->placed = true;
            if (top > MAX_SHARED) fail(p, p->line, "too much .shared");
        }
    return top;
}

/* Places an entry's own variables behind the common ones, if it reaches any of those; dynamic
 * memory comes last, aligned as its strictest name wants. */
static void place_entry(parser *p, sg_func *e, uint64_t common, const uint8_t *reached) {
    uint64_t align = 1, top = 0;
    for (int f = 0; f < p->n_func; f++)
        for (int s = 0; reached[f] && s < p->func[f].n_symbols; s++) {
            const sg_symbol *y = &p->func[f].symbol[s];
            if (is_shared(y, false) && p->var[y->module_symbol].placed) top = common;
            if (is_shared(y, true) && y->align > align) align = y->align;
        }
    for (int s = 0; s < e->n_symbols; s++) {
        sg_symbol *y = &e->symbol[s];
        if (!is_shared(y, false)) continue;
        const variable *v = &p->var[y->module_symbol];
        y->offset = v->placed ? v->s.offset : align_up(top, y->align);
        if (!v->placed) top = y->offset + y->bytes;
        if (top > MAX_SHARED) fail(p, p->line, "too much .shared");
    }
    e->shared_bytes = align_up(top, align);
}

/* A function that names dynamic memory has one place for it, whoever calls it: such entries get
 * the static bytes of the largest of them. */
static void place_dynamic(parser *p, uint8_t *reached, int *stack, uint64_t *dynamic, bool set) {
    for (int e = 0; e < p->n_func; e++) {
        bool shares = false;
        if (!p->func[e].entry) continue;
        mark_reached(p, e, reached, stack);
        for (int f = 0; f < p->n_func; f++)
            for (int s = 0; reached[f] && !p->func[f].entry && s < p->func[f].n_symbols; s++)
                shares |= is_shared(&p->func[f].symbol[s], true);
        if (!shares) continue;
        if (set) p->func[e].shared_bytes = *dynamic;
        else if (p->func[e].shared_bytes > *dynamic) *dynamic = p->func[e].shared_bytes;
    }
}

static void lay_out(parser *p) {
    uint8_t *reached = keep(p, (size_t)p->n_func + 1);
    int *stack = keep(p, ((size_t)p->n_func + 1) * sizeof *stack);
    uint64_t common = place_common(p), dynamic = 0;
    for (int e = 0; e < p->n_func; e++)
        if (p->func[e].entry) {
            mark_reached(p, e, reached, stack);
            place_entry(p, &p->func[e], common, reached);
        }
    place_dynamic(p, reached, stack, &dynamic, false);
    dynamic = align_up(dynamic, 1024);     /* aligned for each of them                          */
    place_dynamic(p, reached, stack, &dynamic, true);
    for (int f = 0; f < p->n_func; f++)
        for (int s = 0; s < p->func[f].n_symbols; s++) {
            sg_symbol *y = &p->func[f].symbol[s];
            if (y->module_symbol < 0) continue;
            const variable *v = &p->var[y->module_symbol];
            if (is_shared(y, false) && !p->func[f].entry) y->offset = v->s.offset;
            if (is_shared(y, true) && p->func[f].entry) y->offset = p->func[f].shared_bytes;
            else if (is_shared(y, true)) y->offset = dynamic;
            y->init = v->s.init;
            y->module_symbol = v->module_symbol;
        }
}

static void keep_module(parser *p) {
    sg_module *m = &p->own->m;
    for (int f = 0; f < p->n_func; f++)
        for (int i = 0; i < p->func[f].n; i++) {             /* .file follows the functions     */
            sg_instr *c = &p->func[f].code[i];
            if (c->file >= m->n_files) c->file = c->line = 0;
        }
    m->symbol = keep(p, ((size_t)m->n_symbols + 1) * sizeof *m->symbol);
    for (int v = 0; v < p->n_var; v++) {
        int at = p->var[v].module_symbol;
        if (at < 0) continue;
        m->symbol[at] = p->var[v].s;
        m->symbol[at].module_symbol = at;
    }
    m->func = keep_copy(p, p->func, (size_t)p->n_func * sizeof *m->func);
    m->n_funcs = p->n_func;
    m->reloc = keep_copy(p, p->reloc, (size_t)p->n_reloc * sizeof *m->reloc);
    m->n_relocs = p->n_reloc;
}

static void parse(parser *p, const char *text, size_t len) {
    if (len > 1u << 28) fail(p, 0, "more than 256 MB of text");
    p->at = keep_copy(p, text, len);       /* instructions keep their text                      */
    while (len && !p->at[len - 1]) len--;  /* of a C string                                     */
    p->end = p->at + len;
    next(p);
    while (p->t.kind) {
        if (p->t.kind != K_WORD || p->t.s[0] != '.') unexpected(p, "a directive");
        module_directive(p);
    }
    if (!p->own->m.cc) fail(p, p->line, "no .target");
    lay_out(p);
    keep_module(p);
}

sg_module *sg_parse(const char *text, size_t len, char *why, size_t size) {
    owner *own = calloc(1, sizeof *own);
    parser *p = calloc(1, sizeof *p);
    if (size) why[0] = 0;
    if (!own || !p) {
        if (size) (void)snprintf(why, size, "out of memory");
        free(own);
        free(p);
        return NULL;
    }
    p->own = own;
    p->why = why;
    p->why_size = size;
    p->line = 1;
    p->free_name = p->scopes[0].names = -1;
    memset(p->bucket, -1, sizeof p->bucket);
    volatile bool ok = false;
    if (!setjmp(p->out)) {
        find_headers(p, text, len);
        parse(p, text, len);
        ok = true;
    }
    void *grown[] = {p->names, p->var, p->func, p->reloc, p->jumps, p->f.code, p->f.reg,
                     p->f.reg_name, p->f.symbol, p};
    for (size_t i = 0; i < sizeof grown / sizeof *grown; i++) free(grown[i]);
    if (ok) return &own->m;
    sg_module_free(&own->m);
    return NULL;
}

void sg_module_free(sg_module *m) {
    owner *own = (owner *)m;
    if (!own) return;
    for (chunk *c = own->chunks, *after; c; c = after) {
        after = c->next;
        free(c);
    }
    free(own);
}

const sg_func *sg_find(const sg_module *m, const char *name) {
    for (int f = 0; f < m->n_funcs; f++)
        if (m->func[f].entry && !m->func[f].external && !strcmp(m->func[f].name, name))
            return &m->func[f];
    return NULL;
}

/* === 12. An instruction as text =============================================================== */

/* As it stands in the PTX, each run of blanks one blank. */
void sg_text(const sg_func *f, const sg_instr *i, char *out, size_t size) {
    (void)f;
    size_t n = 0;
    if (!size) return;
    if (!i->text) {
        (void)snprintf(out, size, "%s", sg_op_name(i->op));
        return;
    }
    for (uint32_t k = 0; k < i->text_len && n + 1 < size; k++) {
        bool blank = isspace((unsigned char)i->text[k]);
        if (blank && (!n || out[n - 1] == ' ')) continue;
        out[n++] = blank ? ' ' : i->text[k];
    }
    if (n + 1 < size) out[n++] = ';';
    out[n] = 0;
}
