/* dsv4.c -- the model: weights by name, the memory plan, the forward pass, sampling.
 *
 * One span of tokens goes through the layers like this (MODEL.md section 3):
 *
 *   embed -> h [n][hc][dim] --+--> layer 0 --> layer 1 --> ... --> head -> logits
 *                             |
 *   one layer:   for each chunk:    hc_pre  attention  hc_post
 *                for each chunk:    hc_pre  gate, route                     (choose)
 *                for each expert:   its tokens of the whole span            (each read once)
 *                for each chunk:    shared expert, hc_post
 *
 * Prefill and decode are the same code: decode is a span of one token.  Because every operation
 * keeps one order of summation per element, the results do not depend on span, chunk or split.
 *
 * Invariants  1 all memory is planned, told and taken in *_open; none after
 *             2 y adds experts in ascending id, the shared expert last
 *             3 positions < session->pos are in the KV; a failed forward needs a reset
 *             4 what the KV holds is exactly what MODEL.md section 2 stores
 *
 * Contents  1 arenas and time   2 weights by name   3 memory plan and engine   4 session
 *           5 attention   6 dense weights that do not fit   7 experts   8 forward   9 sampling
 *
 * Not here  what an operation computes (kernels.cu), how bytes arrive (offload.c)              */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
    CHUNK_DEFAULT = 128,           /* tokens through attention at once: amortizes the weights   */
    SPAN_MAX = 128 << 10,          /* tokens a span, DESIGN.md "The two loops"                  */
    LOAD_STEP_BYTES = 256 << 20,   /* of dense weights between two calls of progress             */
    EMBED_ROWS = 256,              /* of embed.weight read at once, where it is not resident    */
    OUT_ROWS = 16,                 /* of logits on a GPU at once                                */
    GPU_CHUNK_MAX = 4096,          /* tokens; times MAX_HC within what a launch can take        */
    RESERVE_BYTES = 1 << 30,       /* of VRAM left alone, or an eighth                          */
    LOOKAHEAD = 16,                /* experts asked for ahead of the one being computed         */
    INDEX_SCORES_MAX = 4 << 20,    /* floats of index scores held at once, if one row fits      */
};

const char *const op_class_name[OPC_N] = {
    "embed", "hyper-connections", "projections", "compressor", "indexer", "attention",
    "gate", "experts", "shared expert", "head", "mtp",
};

/* === 1. Arenas and time ======================================================================= */
void *arena_take(arena *a, uint64_t bytes) {
    uint64_t at = a->used;
    a->used += (bytes + 63) & ~(uint64_t)63;
    assert(!a->base || a->used <= a->size);
    return a->base ? a->base + at : NULL;
}

void *arena_take_blocks(arena *a, uint64_t bytes) {
    a->used = (a->used + 4095) & ~(uint64_t)4095;
    return arena_take(a, bytes);
}

static float *take_f32(arena *a, int64_t n) { return arena_take(a, (uint64_t)n * sizeof(float)); }
static int32_t *take_i32(arena *a, int64_t n) { return arena_take(a, (uint64_t)n * 4); }

int arena_open(arena *a, uint64_t size, const char *what, dsv4_err *err) {
    *a = (arena){.size = size ? size : 64, .gpu = a->gpu, .vram = a->vram};
    if (a->vram) return (a->base = cuda_alloc(a->gpu, a->size, what, err)) ? 0 : -1;
    void *p = mmap(NULL, a->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return fail(err, "no memory for %s: %.2f GB refused; lower --ram or --ctx", what,
                    (double)size / 1e9);
    a->base = p;
    madvise(p, a->size, MADV_HUGEPAGE);        /* advice: slower without, not wrong */
    return a->gpu ? cuda_pin(a->gpu, p, a->size, what, err) : 0;
}

void arena_close(arena *a) {
    if (a->base && a->vram) cuda_free(a->gpu, a->base);
    if (a->base && a->gpu && !a->vram) cuda_unpin(a->gpu, a->base);
    if (a->base && !a->vram) munmap(a->base, a->size);
    *a = (arena){0};
}

double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* === 2. Weights by name (M1) ================================================================== */
typedef struct {                   /* M3, compressor of width d                                 */
    dsv4_mat wkv, wgate;           /* [coff*d][dim]                                             */
    const float *ape, *norm;       /* [ratio][coff*d], [d]                                      */
} compressor_w;

typedef struct {
    int ratio;                     /* compress ratio: 0 window only, 4 CSA, else HCA            */
    const float *attn_norm, *ffn_norm, *q_norm, *kv_norm, *attn_sink;
    dsv4_hc hc_attn, hc_ffn;
    dsv4_mat wq_a, wq_b, wkv, wo_a, wo_b;
    compressor_w comp, index_comp;
    dsv4_mat index_wq_b, index_weights_proj;
    dsv4_mat gate;
    const float *gate_bias;        /* NULL in a hash layer                                      */
    const int32_t *tid2eid;        /* NULL in the others                                        */
    dsv4_ffn shared;
} layer_w;

typedef struct {                   /* the MTP block's own tensors around its layer              */
    dsv4_mat e_proj, h_proj;
    const float *enorm, *hnorm, *norm;
    dsv4_hc hc_head;
} mtp_w;

/* One tensor to load, and which pointer shall point to it. */
typedef enum { NEED_RAW, NEED_SCALE, NEED_F32, NEED_IDS } need_kind;
enum { RESIDENT = -1, UNIT_TABLE = -2 };               /* the tables are embed and head */
enum { W1, W2, W3, S1, S2, S3, EXPERT_PARTS };
typedef union {
    const void **raw;              /* a matrix as stored                                        */
    const uint8_t **scale;
    const float **f32;             /* small tensors, converted to F32                           */
    const int32_t **ids;           /* tid2eid, I64 converted to int32                           */
} need_dst;
typedef struct {
    const ckpt_tensor *t;          /* first: tensors_by_place() looks there                     */
    need_kind kind;
    bool mtp;
    int unit;                      /* layer that it can be streamed with, UNIT_TABLE, or RESIDENT */
    need_dst dst;
} need;

struct dsv4_weights {
    const dsv4_config *cfg;
    dsv4_mat embed, head;
    const float *norm;
    dsv4_hc hc_head;
    mtp_w mtp;
    layer_w *layer;                /* [num_hidden_layers + has_mtp]                             */
    read_group *expert_group;      /* [num_hidden_layers + has_mtp][n_routed_experts]           */
    const ckpt_tensor **expert_part;   /* what these point to [..][EXPERT_PARTS]                */
    need *needs;                   /* in the order of the files                                 */
    size_t n_needs;
    weights_bytes bytes;
    read_group *unit;              /* [n_units]: each layer's matrices, then blocks of head     */
    const ckpt_tensor **unit_part; /* what these point to                                       */
    ckpt_tensor *head_block;
    const ckpt_tensor *embed_tensor;
    int n_units, head_rows;        /* rows of a block of head                                   */
};

/* Binding keeps the first error and then does nothing, so that the list below reads as M1's. */
typedef struct {
    dsv4_weights *w;
    const ckpt *ck;
    const char *prefix;
    int unit;
    bool mtp, failed;
    dsv4_err *err;
} binder;

static const char *const dtype_name[DT_N] = {
    "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I8", "I64",
};

static const char *show_shape(char text[96], const int64_t *shape, int n_dims) {
    int at = snprintf(text, 96, "[");
    for (int i = 0; i < n_dims; i++)
        at += snprintf(text + at, 96 - (size_t)at, "%s%lld", i ? "," : "", (long long)shape[i]);
    return strcat(text, "]");
}

static bool is_float(dsv4_dtype t) { return t == DT_F32 || t == DT_F16 || t == DT_BF16; }

/* Find prefix+stem+end and demand its shape (d1 < 0: one dimension) and dtype (DT_F32 means any of
 * F32, F16, BF16); NULL after an error. */
static const ckpt_tensor *bind_find(binder *b, const char *stem, const char *end, dsv4_dtype want,
                                    int64_t d0, int64_t d1) {
    if (b->failed) return NULL;
    char name[MAX_NAME], what[256] = "is missing", is[96], not[96];
    int n_dims = d1 < 0 ? 1 : 2;
    snprintf(name, sizeof name, "%s%s%s", b->prefix, stem, end);
    const ckpt_tensor *t = ckpt_find(b->ck, name);
    if (t && (t->n_dims != n_dims || t->shape[0] != d0 || (d1 >= 0 && t->shape[1] != d1)))
        snprintf(what, sizeof what, "has shape %s and not %s", show_shape(is, t->shape, t->n_dims),
                 show_shape(not, (int64_t[]){d0, d1}, n_dims));
    else if (t && t->dtype != want && !(want == DT_F32 && is_float(t->dtype)))
        snprintf(what, sizeof what, "is %s and not %s", dtype_name[t->dtype],
                 want == DT_F32 ? "BF16, F16 or F32" : dtype_name[want]);
    else if (t) return t;
    b->failed = true;
    fail(b->err, "tensor %s %s; the checkpoint does not fit its config.json: download both again",
         name, what);
    return NULL;
}

/* Find a tensor that is to be loaded, and which pointer shall point to it; NULL after an error. */
static const ckpt_tensor *bind(binder *b, need_kind kind, need_dst dst, const char *stem,
                               const char *end, dsv4_dtype want, int64_t d0, int64_t d1) {
    dsv4_weights *w = b->w;
    const ckpt_tensor *t = bind_find(b, stem, end, want, d0, d1);
    if (!t) return NULL;
    bool whole = t->offset % (t->dtype == DT_F32 ? 4 : is_float(t->dtype) ? 2 : 1) == 0;
    bool matrix = (kind == NEED_RAW || kind == NEED_SCALE) && whole;   /* used where it lands */
    assert(w->n_needs < ckpt_n_tensors(b->ck));        /* each has another name */
    w->needs[w->n_needs++] = (need){t, kind, b->mtp, matrix ? b->unit : RESIDENT, dst};
    *(b->mtp ? &w->bytes.mtp : &w->bytes.dense) += t->bytes;
    return t;
}

static void bind_f32(binder *b, const float **dst, const char *stem, const char *end, int64_t d0,
                     int64_t d1) {
    bind(b, NEED_F32, (need_dst){.f32 = dst}, stem, end, DT_F32, d0, d1);
}

/* An unquantized matrix, kept in whichever float format it has. */
static void bind_float(binder *b, dsv4_mat *m, const char *stem, const char *end, int rows,
                       int cols) {
    const ckpt_tensor *t = bind(b, NEED_RAW, (need_dst){.raw = &m->data}, stem, end, DT_F32, rows,
                                cols);
    if (t) *m = (dsv4_mat){.dtype = t->dtype, .rows = rows, .cols = cols};
}

static void bind_fp8(binder *b, dsv4_mat *m, const char *stem, int rows, int cols) {
    *m = (dsv4_mat){.dtype = DT_F8_E4M3, .rows = rows, .cols = cols};
    bind(b, NEED_RAW, (need_dst){.raw = &m->data}, stem, ".weight", DT_F8_E4M3, rows, cols);
    bind(b, NEED_SCALE, (need_dst){.scale = &m->scale}, stem, ".scale", DT_F8_E8M0,
         (rows + 127) / 128, (cols + 127) / 128);
}

static void bind_hc(binder *b, dsv4_hc *hc, const char *stem, bool head) {
    const dsv4_config *c = b->w->cfg;
    int mixes = head ? c->hc_mult : (2 + c->hc_mult) * c->hc_mult;
    bind_f32(b, &hc->fn, stem, "_fn", mixes, c->hc_mult * c->hidden_size);
    bind_f32(b, &hc->base, stem, "_base", mixes, -1);
    bind_f32(b, &hc->scale, stem, "_scale", head ? 1 : 3, -1);
}

static void bind_compressor(binder *b, compressor_w *c, const char *stem, int ratio, int d) {
    int width = (ratio == 4 ? 2 : 1) * d;
    bind_float(b, &c->wkv, stem, ".wkv.weight", width, b->w->cfg->hidden_size);
    bind_float(b, &c->wgate, stem, ".wgate.weight", width, b->w->cfg->hidden_size);
    bind_f32(b, &c->ape, stem, ".ape", ratio, width);
    bind_f32(b, &c->norm, stem, ".norm.weight", d, -1);
}

static void bind_attention(binder *b, layer_w *l) {
    const dsv4_config *c = b->w->cfg;
    int dim = c->hidden_size, hd = c->head_dim, heads = c->num_attention_heads;
    bind_f32(b, &l->attn_norm, "attn_norm", ".weight", dim, -1);
    bind_hc(b, &l->hc_attn, "hc_attn", false);
    bind_fp8(b, &l->wq_a, "attn.wq_a", c->q_lora_rank, dim);
    bind_f32(b, &l->q_norm, "attn.q_norm", ".weight", c->q_lora_rank, -1);
    bind_fp8(b, &l->wq_b, "attn.wq_b", heads * hd, c->q_lora_rank);
    bind_fp8(b, &l->wkv, "attn.wkv", hd, dim);
    bind_f32(b, &l->kv_norm, "attn.kv_norm", ".weight", hd, -1);
    bind_f32(b, &l->attn_sink, "attn.attn_sink", "", heads, -1);
    bind_fp8(b, &l->wo_a, "attn.wo_a", c->o_groups * c->o_lora_rank, heads * hd / c->o_groups);
    bind_fp8(b, &l->wo_b, "attn.wo_b", dim, c->o_groups * c->o_lora_rank);
    if (l->ratio) bind_compressor(b, &l->comp, "attn.compressor", l->ratio, hd);
    if (l->ratio != 4) return;
    bind_fp8(b, &l->index_wq_b, "attn.indexer.wq_b", c->index_n_heads * c->index_head_dim,
             c->q_lora_rank);
    bind_float(b, &l->index_weights_proj, "attn.indexer.weights_proj", ".weight", c->index_n_heads,
               dim);
    bind_compressor(b, &l->index_comp, "attn.indexer.compressor", 4, c->index_head_dim);
}

static void bind_experts(binder *b, size_t layer) {
    static const char *const end[EXPERT_PARTS] = {
        ".w1.weight", ".w2.weight", ".w3.weight", ".w1.scale", ".w2.scale", ".w3.scale",
    };
    const dsv4_config *c = b->w->cfg;
    int dim = c->hidden_size, inter = c->moe_intermediate_size;
    uint64_t *bytes = b->mtp ? &b->w->bytes.mtp : &b->w->bytes.experts;
    for (int e = 0; e < c->n_routed_experts; e++) {
        size_t at = layer * (size_t)c->n_routed_experts + (size_t)e;
        const ckpt_tensor **part = b->w->expert_part + at * EXPERT_PARTS;
        char stem[32];
        snprintf(stem, sizeof stem, "ffn.experts.%d", e);
        for (int p = 0; p < EXPERT_PARTS; p++) {
            bool down = p == W2 || p == S2, weight = p < S1;
            int rows = down ? dim : inter, cols = down ? inter : dim;
            part[p] = bind_find(b, stem, end[p], weight ? DT_I8 : DT_F8_E8M0, rows,
                                cols / (weight ? 2 : 32));
            if (!part[p]) return;
            *bytes += part[p]->bytes;
        }
        b->w->expert_group[at] = (read_group){part, EXPERT_PARTS};
    }
}

static void bind_moe(binder *b, layer_w *l, bool hash) {
    const dsv4_config *c = b->w->cfg;
    int dim = c->hidden_size, inter = c->moe_intermediate_size;
    bind_f32(b, &l->ffn_norm, "ffn_norm", ".weight", dim, -1);
    bind_hc(b, &l->hc_ffn, "hc_ffn", false);
    bind_float(b, &l->gate, "ffn.gate", ".weight", c->n_routed_experts, dim);
    if (!hash)
        bind_f32(b, &l->gate_bias, "ffn.gate", ".bias", c->n_routed_experts, -1);
    else
        bind(b, NEED_IDS, (need_dst){.ids = &l->tid2eid}, "ffn.gate", ".tid2eid", DT_I64,
             c->vocab_size, c->num_experts_per_tok);
    bind_fp8(b, &l->shared.w1, "ffn.shared_experts.w1", inter, dim);
    bind_fp8(b, &l->shared.w2, "ffn.shared_experts.w2", dim, inter);
    bind_fp8(b, &l->shared.w3, "ffn.shared_experts.w3", inter, dim);
}

static void bind_mtp(binder *b, mtp_w *m) {
    int dim = b->w->cfg->hidden_size;
    b->unit = RESIDENT;            /* used outside of its layer */
    bind_fp8(b, &m->e_proj, "e_proj", dim, dim);
    bind_fp8(b, &m->h_proj, "h_proj", dim, dim);
    bind_f32(b, &m->enorm, "enorm", ".weight", dim, -1);
    bind_f32(b, &m->hnorm, "hnorm", ".weight", dim, -1);
    bind_f32(b, &m->norm, "norm", ".weight", dim, -1);
    bind_hc(b, &m->hc_head, "hc_head", true);
}

static void bind_layers(binder *b) {
    dsv4_weights *w = b->w;
    const dsv4_config *c = w->cfg;
    int n_layers = c->num_hidden_layers + w->bytes.has_mtp;
    for (int l = 0; l < n_layers && !b->failed; l++) {
        char prefix[32] = "mtp.0.";
        b->mtp = l == c->num_hidden_layers;
        b->unit = l;
        b->prefix = prefix;
        if (!b->mtp) snprintf(prefix, sizeof prefix, "layers.%d.", l);
        w->layer[l].ratio = c->compress_ratios[l];
        bind_attention(b, &w->layer[l]);
        bind_moe(b, &w->layer[l], l < c->num_hash_layers && !b->mtp);
        bind_experts(b, (size_t)l);
        if (b->mtp) bind_mtp(b, &w->mtp);
    }
}

/* What is read together: an expert, the matrices of a layer, a block of head.weight's rows as
 * large as the largest layer. */
static int units_make(dsv4_weights *w, const ckpt *c) {
    int n_layers = w->cfg->num_hidden_layers + w->bytes.has_mtp, vocab = w->cfg->vocab_size;
    const ckpt_tensor *head = ckpt_find(c, "head.weight");
    uint64_t bytes[MAX_LAYERS + 1] = {0}, row = head->bytes / (uint64_t)vocab, most = row;
    size_t n = 0;
    qsort(w->needs, w->n_needs, sizeof *w->needs, tensors_by_place);
    for (size_t i = 0; i < w->n_needs; i++) {
        int l = w->needs[i].unit;
        if (l < 0) continue;
        bytes[l] += w->needs[i].t->bytes;
        if (bytes[l] > most) most = bytes[l];
    }
    w->embed_tensor = ckpt_find(c, "embed.weight");
    w->head_rows = (int)(most / row);
    int n_blocks = (vocab + w->head_rows - 1) / w->head_rows;
    w->n_units = n_layers + n_blocks;
    w->unit = calloc((size_t)w->n_units, sizeof *w->unit);
    w->unit_part = calloc(w->n_needs + (size_t)n_blocks, sizeof *w->unit_part);
    w->head_block = calloc((size_t)n_blocks, sizeof *w->head_block);
    if (!w->unit || !w->unit_part || !w->head_block) return -1;
    for (int l = 0; l < n_layers; l++) {
        w->unit[l].part = w->unit_part + n;
        for (size_t i = 0; i < w->n_needs; i++) {
            if (w->needs[i].unit != l) continue;
            w->unit_part[n++] = w->needs[i].t;
            w->unit[l].n_parts++;
        }
        assert(w->unit[l].n_parts <= GROUP_PARTS);
    }
    uint64_t block = (uint64_t)w->head_rows * row;
    for (int k = 0; k < n_blocks; k++) {
        ckpt_tensor *t = &w->head_block[k];
        *t = *head;
        t->offset += (uint64_t)k * block;
        t->bytes -= (uint64_t)k * block;
        if (t->bytes > block) t->bytes = block;
        w->unit_part[n] = t;
        w->unit[n_layers + k] = (read_group){w->unit_part + n++, 1};
    }
    return 0;
}

int weights_bind(dsv4_weights **out, const ckpt *c, const dsv4_config *cfg, dsv4_err *err) {
    static const char no_memory[] = "out of memory for the table of weights";
    dsv4_weights *w = *out = calloc(1, sizeof *w);
    if (!w) return fail(err, no_memory);
    w->cfg = cfg;
    /* DSpark checkpoints have mtp.1.* and other tensors in mtp.0: no MTP block there (M3) */
    w->bytes.has_mtp = cfg->num_nextn_predict_layers > 0 && ckpt_find(c, "mtp.0.e_proj.weight") &&
                       !ckpt_find(c, "mtp.1.attn_norm.weight");
    size_t n_layers = (size_t)cfg->num_hidden_layers + w->bytes.has_mtp;
    size_t n_experts = n_layers * (size_t)cfg->n_routed_experts;
    w->layer = calloc(n_layers, sizeof *w->layer);
    w->expert_group = calloc(n_experts, sizeof *w->expert_group);
    w->expert_part = calloc(n_experts * EXPERT_PARTS, sizeof *w->expert_part);
    w->needs = calloc(ckpt_n_tensors(c) + 1, sizeof *w->needs);
    bool room = w->layer && w->expert_group && w->expert_part && w->needs;
    binder b = {.w = w, .ck = c, .prefix = "", .unit = UNIT_TABLE, .failed = !room, .err = err};
    int dim = cfg->hidden_size;
    bind_float(&b, &w->embed, "embed", ".weight", cfg->vocab_size, dim);
    bind_f32(&b, &w->norm, "norm", ".weight", dim, -1);
    bind_hc(&b, &w->hc_head, "hc_head", true);
    bind_float(&b, &w->head, "head", ".weight", cfg->vocab_size, dim);
    bind_layers(&b);
    room = room && (b.failed || !units_make(w, c));
    if (!room) fail(err, no_memory);
    if (!room || b.failed) {
        weights_close(w);
        *out = NULL;
        return -1;
    }
    for (size_t i = 0; i < ckpt_n_tensors(c); i++) w->bytes.unused += ckpt_at(c, i)->bytes;
    w->bytes.unused -= w->bytes.dense + w->bytes.experts + w->bytes.mtp;
    return 0;
}

void weights_close(dsv4_weights *w) {
    if (!w) return;
    free(w->unit);
    free(w->unit_part);
    free(w->head_block);
    free(w->expert_group);
    free(w->expert_part);
    free(w->layer);
    free(w->needs);
    free(w);
}

weights_bytes weights_count(const dsv4_weights *w) { return w->bytes; }

/* Bytes that a needed tensor takes in RAM: vectors grow to F32, tid2eid shrinks in place. */
static uint64_t need_bytes(const need *n) {
    if (n->kind != NEED_F32) return n->t->bytes;
    return n->t->bytes * (n->t->dtype == DT_F32 ? 1 : 2);
}

/* Turn what was read at `at` into what the graph uses, in place.  F16 and BF16 vectors were read
 * into the upper half of it, so that widening front to back never overwrites what is to be read. */
static int need_finish(const need *n, void *at, const dsv4_config *cfg, dsv4_err *err) {
    bool wider = n->kind == NEED_F32 && n->t->dtype != DT_F32;
    float *f = at;
    int32_t *ids = at;
    for (size_t i = 0; wider && i < n->t->bytes / 2; i++) {
        uint16_t bits;
        memcpy(&bits, (uint8_t *)f + n->t->bytes + 2 * i, 2);
        f[i] = n->t->dtype == DT_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    }
    for (size_t i = 0; n->kind == NEED_IDS && i < n->t->bytes / 8; i++) {
        int64_t id;
        memcpy(&id, (uint8_t *)ids + 8 * i, 8);
        if (id < 0 || id >= cfg->n_routed_experts)
            return fail(err, "tensor %s names expert %lld of %d: download the checkpoint again",
                        n->t->name, (long long)id, cfg->n_routed_experts);
        ids[i] = (int32_t)id;
    }
    return 0;
}

typedef struct { bool mtp, streamed; } dense_mode;

/* Is this one read at start and kept? */
static bool is_kept(const need *n, dense_mode mode) {
    return (mode.mtp || !n->mtp) && (!mode.streamed || n->unit == RESIDENT);
}

static uint64_t weights_size(const dsv4_weights *w, dense_mode mode) {
    arena a = {0};
    for (size_t i = 0; i < w->n_needs; i++)
        if (is_kept(&w->needs[i], mode)) arena_take(&a, need_bytes(&w->needs[i]));
    return a.used;
}

/* === 3. Memory plan and engine ================================================================ */
typedef struct {                   /* scratch of one chunk of attention or shared expert        */
    float *x, *xq;                 /* [chunk][dim] normalized input; the same after aq128       */
    float *qr, *qrq;               /* [chunk][q_lora]                                           */
    float *q, *o;                  /* [chunk][n_heads][head_dim]                                */
    float *oa;                     /* [chunk][o_groups*o_lora]                                  */
    float *kv;                     /* [chunk][head_dim or index_head_dim] window or compressed
                                      entries, or index keys, before they become rows           */
    uint8_t *kv_rows, *iq_rows;    /* [chunk], [chunk][index_n_heads]                           */
    uint8_t *new_rows;             /* [chunk] entries or keys that are finished                 */
    float *ckv, *cscore;           /* [chunk][2*head_dim or 2*index_head_dim] projections of the
                                      compressor at hand                                        */
    float *iq, *iw;                /* [chunk][index_n_heads][index_head_dim], [chunk][n_heads]  */
    float *scores;                 /* [index_block][ctx/4]                                      */
    int32_t *idx, *count;          /* [chunk][index_topk], [chunk]                              */
    float *g, *u;                  /* [chunk][moe_inter]                                        */
    float *logits;                 /* [chunk][n_experts]                                        */
    float *mtp_h, *mtp_norm;       /* [chunk][hc][dim], with an MTP block only                  */
    float *out;                    /* [OUT_ROWS][vocab], with a GPU only: logits                */
    int index_block;               /* tokens whose index scores fit at once                     */
} chunk_work;

typedef struct {                   /* what a span carries from gate to experts to shared expert */
    int32_t *tokens;               /* [span] of this forward                                    */
    float *h;                      /* [span][hc][dim] the streams                               */
    float *y;                      /* [span][dim] MoE sum                                       */
    uint8_t *code, *scale;         /* [span][dim], [span][dim/128] MoE input, e4m3              */
    float *x;                      /* [span][dim] MoE input when roundings are off              */
    float *post, *comb;            /* [span][hc], [span][hc][hc]; attention uses the first rows */
    int32_t *ids;                  /* [span][topk] experts, and their weights                   */
    float *weights;
    int32_t *rows, *start;         /* tokens sorted by expert [span*topk]; [n_experts+1]        */
    float *row_weight;             /* [span*topk] in the order of rows                          */
    int32_t *used;                 /* [n_used] experts that have tokens, ascending              */
    int n_used;
    void *expert_scratch;
    float *expert_y;               /* [topk][dim] of one token                                  */
    float *embed_rows;             /* [EMBED_ROWS][dim], where embed.weight is not resident     */
    uint8_t *marks;                /* states at the ends of segments, where context is parked   */
} span_work;

typedef struct { int unit, slot; } pinned_unit;  /* unit -1: none                               */

struct dsv4_engine {
    const dsv4_config *cfg;
    const dsv4_ops *op;
    dsv4_exec *ex, *pool;          /* where operations run: threads of the pool, or the GPU     */
    dsv4_weights *w;
    offload *off;
    dsv4_opts opts;
    dsv4_plan plan;
    dsv4_stats stats;
    cuda *gpu;                     /* or NULL: then op is ops_cpu                               */
    arena dense;                   /* on a GPU: VRAM for experts and work buffers, too          */
    const uint8_t **expert_at;     /* [n_experts_total][EXPERT_PARTS] in VRAM, or NULL          */
    cache *experts;                /* or NULL                                                   */
    cache *units;                  /* dense weights that do not fit: two slots; else NULL       */
    pinned_unit now, next;         /* in use; on its way                                        */
    float freq[2][MAX_HEAD_DIM / 2]; /* of rotation: in window-only layers, in the others       */
    const float *freq_at[2];       /* where operations see them                                 */
    uint64_t layer_uses[MAX_LAYERS + 1]; /* experts computed                                    */
    int n_blocks;                  /* layers, and one more with the MTP block                   */
    dsv4_hc_shape hc;
    double dense_macs;             /* of a token in all layers                                  */
    kv_opts kv_opts;               /* of a session                                              */
    char note[sizeof(dsv4_err) + 64]; /* on context that is not parked, or empty                */
    char runs_on[sizeof(dsv4_err) + 64]; /* and why not on a GPU                                */
};

struct dsv4_session {
    dsv4_engine *e;
    arena work_mem, host_mem;      /* host_mem: with a GPU, what the host sees of it            */
    kv_cache *kv;
    chunk_work c;
    span_work s;
    int32_t *tokens;               /* [ctx] all that went in, where context is parked           */
    float *mtp_pending;            /* [hc][dim] last streams, waiting for the next token        */
    int32_t mtp_drafted;           /* the next token that the MTP block has seen, or -1         */
    int64_t pos;
    int64_t tail;                  /* a position to be parked to the token, or 0                */
    int n_last;                    /* tokens of the last forward                                */
    bool broken;                   /* a forward failed: only a reset helps                      */
    progress_fn progress;
    void *progress_arg;
    double tick;                   /* when the current operation class began                    */
};

/* One session's KV; the MTP block's lags a token behind, so it is not parked. */
static kv_opts kv_opts_of(const dsv4_config *c, const dsv4_opts *o) {
    return (kv_opts){.ctx = o->ctx, .n_blocks = c->num_hidden_layers + o->mtp,
                     .packed = !o->no_rounding, .ram = o->kv_ram, .dir = o->kv_dir,
                     .park = o->mtp ? NULL : o->park};
}

/* Hand out a session's work memory; with arenas that only count, this is its size.  host is for
 * what the host reads or writes itself: with a GPU it is another arena than a. */
static void session_layout(dsv4_session *s, arena *a, arena *host, const dsv4_config *c,
                           const dsv4_opts *o, bool streamed, int64_t span, int64_t chunk) {
    kv_opts kv = kv_opts_of(c, o);
    int64_t dim = c->hidden_size, hc = c->hc_mult, topk = c->num_experts_per_tok, n = chunk;
    int64_t heads = (int64_t)c->num_attention_heads * c->head_dim, inter = c->moe_intermediate_size;
    int64_t entries = o->ctx / 4 + 1, block = INDEX_SCORES_MAX / entries;
    int d_max = c->head_dim > c->index_head_dim ? c->head_dim : c->index_head_dim;
    uint64_t row = kv_row_bytes(c->head_dim, c->qk_rope_head_dim, kv.packed);
    uint64_t key = index_row_bytes(c->index_head_dim, kv.packed);
    chunk_work *w = &s->c;
    *w = (chunk_work){.index_block = (int)(block < 1 ? 1 : min64(block, n))};
    w->x = take_f32(a, n * dim);
    w->xq = take_f32(a, n * dim);
    w->qr = take_f32(a, n * c->q_lora_rank);
    w->qrq = take_f32(a, n * c->q_lora_rank);
    w->q = take_f32(a, n * heads);
    w->o = take_f32(a, n * heads);
    w->oa = take_f32(a, n * c->o_groups * c->o_lora_rank);
    w->kv = take_f32(a, n * d_max);
    w->kv_rows = arena_take(a, (uint64_t)n * row);
    w->new_rows = arena_take(host, (uint64_t)n *
                                       kv_row_bytes(d_max, c->qk_rope_head_dim, kv.packed));
    w->ckv = take_f32(a, n * 2 * d_max);
    w->cscore = take_f32(a, n * 2 * d_max);
    w->iq = take_f32(a, n * c->index_n_heads * c->index_head_dim);
    w->iq_rows = arena_take(a, (uint64_t)(n * c->index_n_heads) * key);
    w->iw = take_f32(a, n * c->index_n_heads);
    w->scores = take_f32(a, w->index_block * entries);
    w->idx = take_i32(host, n * c->index_topk);
    w->count = take_i32(host, n);
    w->g = take_f32(a, n * inter);
    w->u = take_f32(a, n * inter);
    w->logits = take_f32(a, n * c->n_routed_experts);
    if (o->mtp) w->mtp_h = take_f32(a, n * dim * hc);
    if (o->mtp) w->mtp_norm = take_f32(a, n * dim * hc);
    if (host != a) w->out = take_f32(a, OUT_ROWS * c->vocab_size);

    span_work *m = &s->s;
    n = span;
    *m = (span_work){.h = take_f32(a, n * hc * dim), .tokens = take_i32(host, n)};
    m->y = take_f32(a, n * dim);
    if (kv.packed) m->code = arena_take(a, (uint64_t)(n * dim));
    if (kv.packed) m->scale = arena_take(a, (uint64_t)(n * ((dim + 127) / 128)));
    if (!kv.packed) m->x = take_f32(a, n * dim);
    m->post = take_f32(a, n * hc);
    m->comb = take_f32(a, n * hc * hc);
    m->ids = take_i32(host, n * topk);
    m->weights = take_f32(host, n * topk);
    m->rows = take_i32(host, n * topk);
    m->row_weight = take_f32(host, n * topk);
    m->start = take_i32(host, c->n_routed_experts + 1);
    m->used = take_i32(host, c->n_routed_experts);
    m->expert_scratch = arena_take(a, expert_scratch_bytes((int)dim, (int)inter));
    m->expert_y = take_f32(a, topk * dim);
    if (kv.park)
        m->marks = arena_take(host, (uint64_t)(n / SEGMENT_TOKENS + 1) * kv_mark_bytes(c, &kv));
    if (streamed)                              /* F32 is the widest that they may be */
        m->embed_rows = take_f32(a, min64(n, EMBED_ROWS) * dim);
    s->mtp_pending = take_f32(a, hc * dim);
    s->tokens = kv.park ? take_i32(host, o->ctx) : NULL;
}

/* Bytes of work memory for this span and chunk; *of_host: those of the host where a GPU has the
 * rest, or NULL. */
static uint64_t work_bytes(const dsv4_config *c, const dsv4_opts *o, bool streamed, int span,
                           int chunk, uint64_t *of_host) {
    arena a = {0}, host = {0};
    dsv4_session s;
    session_layout(&s, &a, of_host ? &host : &a, c, o, streamed, span, chunk);
    if (of_host) *of_host = host.used;
    return a.used;
}

/* What one decoded token reads. */
static void plan_token(dsv4_engine *e, dsv4_plan *p) {
    const dsv4_config *c = e->cfg;
    uint64_t experts = (uint64_t)c->num_hidden_layers * (uint64_t)c->num_experts_per_tok;
    p->token_experts = experts * p->slot_bytes;
    e->dense_macs = 0;
    for (size_t i = 0; i < e->w->n_needs; i++) {
        const need *n = &e->w->needs[i];
        if (n->mtp || n->kind != NEED_RAW || !strcmp(n->t->name, "embed.weight")) continue;
        p->token_dense += n->t->bytes;
        if (strcmp(n->t->name, "head.weight"))     /* a prompt needs that once */
            e->dense_macs += (double)n->t->shape[0] * (double)n->t->shape[1];
    }
}

/* The sum over positions 0 .. t-1 of min(position / ratio, most). */
static double seen_sum(double t, double ratio, double most) {
    double full = most * ratio;
    return t <= full ? t * t / (2 * ratio) : most * (t - full / 2);
}

static double expert_macs(const dsv4_config *c) {
    return 3.0 * c->hidden_size * c->moe_intermediate_size;
}

/* Positions t0 .. t1-1 in one layer, but for its experts. */
static void layer_work(const dsv4_engine *e, int layer, double t0, double t1, double *work) {
    const dsv4_config *c = e->cfg;
    int ratio = c->compress_ratios[layer];
    double row = 2.0 * c->num_attention_heads * c->head_dim, window = c->sliding_window;
    double most = ratio == 4 ? c->index_topk : HUGE_VAL;
    work[WORK_DENSE] += (t1 - t0) * e->dense_macs / c->num_hidden_layers;
    work[WORK_ATTEND] += row * (seen_sum(t1, 1, window) - seen_sum(t0, 1, window));
    if (!ratio) return;
    work[WORK_ATTEND] += row * (seen_sum(t1, ratio, most) - seen_sum(t0, ratio, most));
    if (ratio != 4) return;
    double from = fmax(t0, most * ratio), to = fmax(t1, most * ratio); /* before, all are chosen */
    work[WORK_INDEX] += (double)c->index_n_heads * c->index_head_dim * (to - from) * (to + from) /
                        (2 * ratio);
}

void engine_work(const dsv4_engine *e, double t0, double t1, double work[WORK_N]) {
    const dsv4_config *c = e->cfg;
    memset(work, 0, WORK_N * sizeof *work);
    for (int l = 0; l < c->num_hidden_layers; l++) layer_work(e, l, t0, t1, work);
    work[WORK_EXPERTS] = (t1 - t0) * c->num_hidden_layers * c->num_experts_per_tok * expert_macs(c);
}

void engine_work_s(const dsv4_engine *e, double seconds[WORK_N]) {
    static const work_kind kind[OPC_N] = { /* what is not named counts as dense */
        [OPC_ATTEND] = WORK_ATTEND, [OPC_INDEX] = WORK_INDEX, [OPC_EXPERTS] = WORK_EXPERTS,
    };
    memset(seconds, 0, WORK_N * sizeof *seconds);
    for (int i = 0; i < OPC_N; i++) seconds[kind[i]] += e->stats.op_s[i];
}

/* KV: all of it in RAM if that takes a quarter of the budget or somebody said so; else that
 * quarter, and the rest to the file. */
static int plan_kv(dsv4_engine *e, dsv4_err *err) {
    const dsv4_config *c = e->cfg;
    dsv4_plan *p = &e->plan;
    kv_opts *kv = &e->kv_opts;
    *kv = kv_opts_of(c, &e->opts);
    kv->gpu = e->gpu;
    if (kv_plan_make(&p->kv_plan, c, kv, err)) return -1;
    if (!kv->ram && kv->dir && p->kv_plan.ram > p->budget / 4) {
        kv->ram = p->budget / 4 > p->kv_plan.least ? p->budget / 4 : p->kv_plan.least;
        if (kv_plan_make(&p->kv_plan, c, kv, err)) return -1;
    }
    p->kv = p->kv_plan.ram;
    return 0;
}

/* The largest chunk, then span, whose work memory fits `room` (of the host: host_room). */
static int plan_steps(dsv4_engine *e, uint64_t room, uint64_t host_room, dsv4_err *err) {
    const dsv4_config *c = e->cfg;
    const dsv4_opts *o = &e->opts;
    dsv4_plan *p = &e->plan;
    uint64_t *host = e->gpu ? &p->host_work : NULL;
    int hint = (int)min64(o->span_hint > 0 ? o->span_hint : o->ctx, SPAN_MAX);
    int want = (int)min64(o->chunk > 0 ? o->chunk : CHUNK_DEFAULT, hint);
    if (e->gpu) want = (int)min64(want, GPU_CHUNK_MAX);
    for (p->chunk = want; p->chunk > 1; p->chunk = (p->chunk + 1) / 2)
        if (work_bytes(c, o, p->streamed, p->chunk, p->chunk, host) <= room &&
            p->host_work <= host_room)
            break;
    if (o->chunk > 0 && p->chunk < want)
        return fail(err, "--chunk %d does not fit --ram %.2fG: %d would", want,
                    (double)p->budget / (1 << 30), p->chunk);
    p->span = p->chunk;
    for (int step = SPAN_MAX; step > 0; step /= 2)           /* the longest span that fits */
        if (p->span + step <= hint &&
            work_bytes(c, o, p->streamed, p->span + step, p->chunk, host) <= room &&
            p->host_work <= host_room)
            p->span += step;
    p->work = work_bytes(c, o, p->streamed, p->span, p->chunk, host);
    return 0;
}

/* All weights in VRAM, and what is left of it to work memory; KV, and what the host sees of a
 * forward, in RAM. */
static int plan_gpu(dsv4_engine *e, dsv4_err *err) {
    const dsv4_config *c = e->cfg;
    dsv4_plan *p = &e->plan;
    const cuda_info *g = cuda_get_info(e->gpu);
    uint64_t host, reserve = g->free / 8 < RESERVE_BYTES ? g->free / 8 : RESERVE_BYTES;
    p->vram_budget = g->free - reserve;                      /* for the screen and others */
    p->dense = weights_size(e->w, (dense_mode){e->opts.mtp, false}) + sizeof e->freq;
    p->slots = (uint64_t)p->n_experts_total * p->slot_bytes;
    p->n_slots = p->n_experts_total;
    p->stage = LOAD_STEP_BYTES;
    for (size_t i = 0; i < e->w->n_needs; i++)
        if (need_bytes(&e->w->needs[i]) > p->stage) p->stage = need_bytes(&e->w->needs[i]);
    uint64_t weights = p->dense + p->slots, fixed = p->base + p->kv + p->stage;
    uint64_t least = weights + work_bytes(c, &e->opts, false, 1, 1, &host);
    if (least > p->vram_budget)
        return fail(err, "all weights must fit GPU %d so far: %.2f GB are needed and %.2f are "
                    "free; use --backend cpu", g->index, (double)least / 1e9,
                    (double)g->free / 1e9);
    if (fixed + host > p->budget)
        return fail(err, "--ram %.0fM is too small to load GPU %d: %.0fM are needed; raise it",
                    (double)p->budget / (1 << 20), g->index,
                    ceil((double)(fixed + host) / (1 << 20)));
    return plan_steps(e, p->vram_budget - weights, p->budget - fixed, err);
}

/* Divide the budget: dense weights and KV first, up to a quarter of the rest to work memory
 * (chunk, then span), the remainder to expert slots. */
static int plan_cpu(dsv4_engine *e, dsv4_err *err) {
    const dsv4_config *c = e->cfg;
    const dsv4_opts *o = &e->opts;
    dsv4_plan *p = &e->plan;
    const double mb = 1 << 20;
    uint64_t min_slot_bytes = 2 * (uint64_t)c->num_experts_per_tok * p->slot_bytes, fixed, least;
    for (int streamed = 0; streamed < 2; streamed++) {   /* resident if that fits */
        p->streamed = streamed;
        p->dense = weights_size(e->w, (dense_mode){o->mtp, streamed});
        if (streamed) p->dense += 2 * cache_slot_bytes(e->w->unit, (size_t)e->w->n_units);
        fixed = p->base + p->dense + p->kv;
        least = fixed + min_slot_bytes + work_bytes(c, o, streamed, 1, 1, NULL);
        if (least <= p->budget) break;
    }
    if (least > p->budget)
        return fail(err, "--ram %.0fM is too small: at least %.0fM are needed (program %.1fM, "
                    "dense weights %.1fM, KV %.1fM, buffers and the fewest expert slots %.1fM); "
                    "raise --ram or lower --ctx", (double)p->budget / mb, ceil((double)least / mb),
                    (double)p->base / mb, (double)p->dense / mb, (double)p->kv / mb,
                    (double)(least - fixed) / mb);
    if (plan_steps(e, (p->budget - fixed - min_slot_bytes) / 4, 0, err)) return -1;
    uint64_t slots = (p->budget - fixed - p->work) / p->slot_bytes;
    p->n_slots = slots > (uint64_t)p->n_experts_total ? p->n_experts_total : (int)slots;
    p->slots = (uint64_t)p->n_slots * p->slot_bytes;
    return 0;
}

static int plan_make(dsv4_engine *e, dsv4_err *err) {
    dsv4_plan *p = &e->plan;
    size_t n_experts = (size_t)e->n_blocks * (size_t)e->cfg->n_routed_experts;
    *p = (dsv4_plan){.budget = e->opts.ram_bytes, .chunk = 1, .span = 1};
    if (plan_kv(e, err)) return -1;
    machine_rss(&p->base, NULL);
    p->slot_bytes = cache_slot_bytes(e->w->expert_group, n_experts);
    p->n_experts_total = (int)n_experts;
    p->n_layers = e->n_blocks;
    plan_token(e, p);
    return e->gpu ? plan_gpu(e, err) : plan_cpu(e, err);
}

static int default_threads(void) {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n > MAX_THREADS ? MAX_THREADS : n;
}

/* Not on the GPU, for what stands in err. */
static int leave_gpu(dsv4_engine *e, dsv4_err *err) {
    snprintf(e->runs_on, sizeof e->runs_on, "the CPU: %s", err->msg);
    arena_close(&e->dense);
    free(e->expert_at);
    if (e->gpu) cuda_close(e->gpu);
    e->expert_at = NULL;
    e->gpu = NULL;
    e->op = &ops_cpu;
    e->ex = e->pool;
    return plan_make(e, err);
}

static int engine_start(dsv4_engine *e, const ckpt *c, dsv4_err *err) {
    const dsv4_config *cfg = e->cfg;
    const dsv4_opts *o = &e->opts;
    const char *note;              /* engine_note() tells it, and what comes up later */
    if (weights_bind(&e->w, c, cfg, err)) return -1;
    if (o->ctx < 1 || o->ctx > cfg->max_position_embeddings)
        return fail(err, "a context of %lld tokens: this model takes 1 to %lld; shorten the input "
                    "or lower -n or --ctx", (long long)o->ctx,
                    (long long)cfg->max_position_embeddings);
    if (o->ram_bytes > machine_ram_total())
        return fail(err, "--ram %.1fG is more than the %.1fG that this machine lets us have; lower "
                    "it", (double)o->ram_bytes / (1 << 30),
                    (double)machine_ram_total() / (1 << 30));
    if (o->mtp && !e->w->bytes.has_mtp)
        return fail(err, "%s has no MTP block to draft with", o->dir);
    e->n_blocks = cfg->num_hidden_layers + o->mtp;
    int threads = o->n_threads ? o->n_threads : default_threads();
    if (exec_open(&e->pool, threads, err) || offload_open(&e->off, c, &note, err)) return -1;
    e->ex = e->pool;
    rope_inv_freq(e->freq[0], cfg->qk_rope_head_dim, cfg->rope_theta, 1, 0, 0, 0);
    rope_inv_freq(e->freq[1], cfg->qk_rope_head_dim, cfg->compress_rope_theta,
                  cfg->yarn_factor, cfg->yarn_beta_fast, cfg->yarn_beta_slow, cfg->yarn_original);
    snprintf(e->runs_on, sizeof e->runs_on, "the CPU");
    if (o->backend == BACKEND_CPU) return plan_make(e, err);
    if (!cuda_open) {
        fail(err, "this dsv4 was built without CUDA");
    } else if (cuda_open(&e->gpu, o->gpu, err) == 0) {
        const cuda_info *g = cuda_get_info(e->gpu);
        snprintf(e->runs_on, sizeof e->runs_on, "GPU %d, %s (%d.%d)", g->index, g->name, g->sm / 10,
                 g->sm % 10);
        e->op = &ops_cuda;
        e->ex = cuda_exec(e->gpu);
        if (plan_make(e, err) == 0) return 0;
    }
    return o->backend == BACKEND_AUTO ? leave_gpu(e, err) : -1;
}

/* What KV depends on: the numbers of the config that go into it, and the small weights, all of them
 * trained, which come while they are loaded; the first number says how this program computes, a GPU
 * having other last bits, and changes when that does. */
static park_key fingerprint(const dsv4_engine *e) {
    const dsv4_config *c = e->cfg;
    double number[] = {e->gpu ? 2 : 1, e->opts.no_rounding, c->rope_theta, c->compress_rope_theta,
                       c->yarn_factor, c->yarn_beta_fast, c->yarn_beta_slow, c->yarn_original,
                       (double)c->swiglu_limit, (double)c->routed_scaling_factor, (double)c->hc_eps,
                       (double)c->rms_norm_eps, c->index_topk, c->num_experts_per_tok,
                       c->sliding_window, c->hc_sinkhorn_iters};
    int32_t word[2 * sizeof number / sizeof *number];
    memcpy(word, number, sizeof number);
    return park_next((park_key){{0}}, word, (int)(sizeof word / sizeof *word));
}

typedef struct {                   /* one thing to be read                                      */
    const ckpt_tensor *t;
    const need *of;                /* NULL: a part of an expert                                 */
    uint8_t *place;                /* where it goes,                                            */
    uint64_t bytes;                /* and what it takes there                                   */
} load_step;

/* What is to be read now: the dense weights that are kept and, on a GPU, all experts.  Hands out
 * their places and has everything point there; returns how many. */
static size_t load_list(dsv4_engine *e, load_step *step) {
    const dsv4_weights *w = e->w;
    dense_mode mode = {e->opts.mtp, e->plan.streamed};
    size_t n = 0, n_parts = e->gpu ? (size_t)e->plan.n_experts_total * EXPERT_PARTS : 0;
    for (size_t i = 0; i < w->n_needs; i++) {
        const need *d = &w->needs[i];
        if (!is_kept(d, mode)) continue;
        uint8_t *place = arena_take(&e->dense, need_bytes(d));
        memcpy((void *)d->dst.raw, &place, sizeof place);      /* pointers are all alike */
        step[n++] = (load_step){d->t, d, place, need_bytes(d)};
    }
    for (size_t i = 0; i < n_parts; i++) {
        const ckpt_tensor *t = w->expert_part[i];
        step[n++] = (load_step){t, NULL, arena_take(&e->dense, t->bytes), t->bytes};
        e->expert_at[i] = step[n - 1].place;
    }
    return n;
}

/* Read steps [n], which lie one behind the other: where they go, or by way of `stage` to a GPU. */
static int load_some(dsv4_engine *e, const load_step *step, size_t n, load_item *item,
                     uint8_t *stage, dsv4_err *err) {
    uint8_t *first = step[0].place, *base = stage ? stage : first;
    for (size_t i = 0; i < n; i++)
        item[i] = (load_item){step[i].t, base + (step[i].place - first) + step[i].bytes -
                                         step[i].t->bytes};
    if (offload_load(e->off, item, n, err)) return -1;
    for (size_t i = 0; i < n; i++) {
        uint8_t *at = base + (step[i].place - first);
        if (!step[i].of) continue;
        if (need_finish(step[i].of, at, e->cfg, err)) return -1;
        if (step[i].of->kind == NEED_F32 && !step[i].of->mtp)
            e->kv_opts.model = park_next(e->kv_opts.model, (const int32_t *)(const void *)at,
                                         (int)(step[i].bytes / sizeof(float)));
    }
    if (!stage) return 0;
    e->op->copy(first, stage, (size_t)(step[n - 1].place + step[n - 1].bytes - first), e->ex);
    return e->op->sync(e->ex, err);
}

/* Read all that stays, some at a time. */
static int load_all(dsv4_engine *e, progress_fn progress, void *arg, dsv4_err *err) {
    double t0 = now_s();
    size_t most = e->w->n_needs + (e->gpu ? (size_t)e->plan.n_experts_total * EXPERT_PARTS : 0);
    load_step *step = calloc(most + 1, sizeof *step);
    load_item *item = calloc(most + 1, sizeof *item);
    arena stage = {.gpu = e->gpu};
    if (e->gpu) e->expert_at = calloc(most, sizeof *e->expert_at);
    int rc = step && item && (!e->gpu || e->expert_at) ? 0 : fail(err, "out of memory for loading");
    if (rc == 0 && e->gpu) rc = arena_open(&stage, e->plan.stage, "loading", err);
    size_t n = rc ? 0 : load_list(e, step);
    for (size_t i = 0, end; i < n && rc == 0; i = end) {
        for (end = i + 1; end < n; end++)
            if ((uint64_t)(step[end].place - step[i].place) + step[end].bytes > LOAD_STEP_BYTES)
                break;
        if (progress && progress(arg, (double)i / (double)n)) rc = fail(err, "interrupted");
        else rc = load_some(e, step + i, end - i, item, stage.base, err);
    }
    e->stats.dense_bytes = offload_get_stats(e->off)->read_bytes;
    e->stats.load_s = now_s() - t0;
    arena_close(&stage);
    free(step);
    free(item);
    return rc;
}

/* Memory on the GPU, and all weights in it. */
static int load_gpu(dsv4_engine *e, progress_fn progress, void *arg, dsv4_err *err) {
    const dsv4_plan *p = &e->plan;
    e->dense = (arena){.gpu = e->gpu, .vram = true};
    if (arena_open(&e->dense, p->dense + p->slots + p->work, "the weights", err)) return -1;
    float *freq = arena_take(&e->dense, sizeof e->freq);
    e->op->copy(freq, e->freq, sizeof e->freq, e->ex);
    for (int i = 0; i < 2; i++) e->freq_at[i] = freq + i * MAX_HEAD_DIM / 2;
    return load_all(e, progress, arg, err);
}

/* Memory in RAM, the dense weights in it if they fit, and the experts' cache. */
static int load_cpu(dsv4_engine *e, progress_fn progress, void *arg, dsv4_err *err) {
    size_t n_units = (size_t)e->w->n_units, n_experts = (size_t)e->plan.n_experts_total;
    for (int i = 0; i < 2; i++) e->freq_at[i] = e->freq[i];
    if (arena_open(&e->dense, e->plan.dense, "the dense weights", err) ||
        load_all(e, progress, arg, err) ||
        (e->plan.streamed && cache_open(&e->units, e->off, e->w->unit, n_units, 2, err)) ||
        cache_open(&e->experts, e->off, e->w->expert_group, n_experts, e->plan.n_slots, err))
        return -1;
    if (e->opts.heat) cache_load_heat(e->experts, e->opts.heat);
    return 0;
}

/* Did the GPU fail (err says how), so that the CPU has to do? */
static bool gpu_is_lost(const dsv4_engine *e, dsv4_err *err) {
    return e->gpu && e->opts.backend == BACKEND_AUTO && e->op->sync(e->ex, err);
}

int engine_load(dsv4_engine *e, progress_fn progress, void *arg, dsv4_err *err) {
    e->kv_opts.model = fingerprint(e);
    if (!e->gpu) return load_cpu(e, progress, arg, err);
    if (!gpu_is_lost(e, err)) {            /* it is where session_recover() comes with it        */
        if (load_gpu(e, progress, arg, err) == 0) return 0;
        if (!gpu_is_lost(e, err)) return -1;
    }
    if (leave_gpu(e, err)) return -1;
    e->kv_opts.model = fingerprint(e);
    return load_cpu(e, progress, arg, err);
}

int engine_open(dsv4_engine **out, const dsv4_config *cfg, const ckpt *c, const dsv4_opts *opts,
                dsv4_err *err) {
    *out = NULL;
    dsv4_engine *e = calloc(1, sizeof *e);
    if (!e) return fail(err, "out of memory for the engine");
    *e = (dsv4_engine){.cfg = cfg, .op = &ops_cpu, .opts = *opts, .now = {-1, 0}, .next = {-1, 0}};
    e->hc = (dsv4_hc_shape){cfg->hc_mult, cfg->hidden_size, cfg->hc_sinkhorn_iters,
                            cfg->rms_norm_eps, cfg->hc_eps};
    if (!e->opts.ram_bytes) e->opts.ram_bytes = machine_ram_budget();
    if (engine_start(e, c, err)) {
        engine_close(e);
        return -1;
    }
    *out = e;
    return 0;
}

int engine_measure(dsv4_engine *e, const ckpt *c, double seconds, engine_rates *out,
                   dsv4_err *err) {
    uint64_t most = (e->plan.budget - e->plan.base) / 2;
    if (exec_measure(e->pool, most, seconds / 2, &out->exec, err)) return -1;
    return disk_measure(c, e->plan.slot_bytes, seconds / 2, &out->disk_bytes_s, err);
}

void engine_close(dsv4_engine *e) {
    if (!e) return;
    dsv4_err ignored;
    if (e->experts && e->opts.heat) (void)cache_save_heat(e->experts, e->opts.heat, &ignored);
    cache_close(e->experts);
    cache_close(e->units);
    offload_close(e->off);
    arena_close(&e->dense);
    weights_close(e->w);
    if (e->gpu) cuda_close(e->gpu);
    exec_close(e->pool);
    free(e->expert_at);
    free(e);
}

const dsv4_plan *engine_plan(const dsv4_engine *e) { return &e->plan; }
const dsv4_stats *engine_stats(const dsv4_engine *e) { return &e->stats; }
const char *engine_runs_on(const dsv4_engine *e) { return e->runs_on; }
const char *engine_note(const dsv4_engine *e) { return *e->note ? e->note : offload_note(e->off); }
const offload_stats *engine_offload_stats(const dsv4_engine *e) {
    return offload_get_stats(e->off);
}

const cache_stats *engine_expert_stats(const dsv4_engine *e) {
    static const cache_stats none;
    return e->experts ? cache_get_stats(e->experts) : &none;
}

group_uses engine_layer_uses(const dsv4_engine *e, int layer) {
    int n = e->cfg->n_routed_experts, first = layer * n;
    uint32_t misses = 0;           /* hits are the rest: some are asked for twice, see below */
    for (int i = first; e->experts && i < first + n; i++)
        misses += cache_uses(e->experts)[i].misses;
    return (group_uses){(uint32_t)e->layer_uses[layer] - misses, misses};
}

/* === 4. Session =============================================================================== */
/* At position `pos`, with that many tokens' KV in. */
static void session_at(dsv4_session *s, int64_t pos) {
    s->pos = pos;
    s->tail = 0;
    s->n_last = 0;
    s->mtp_drafted = -1;
    s->broken = false;
}

/* Behind an error or an interruption something may still be under way; what, nobody asks. */
static void settle(dsv4_session *s) {
    dsv4_err ignored;
    (void)s->e->op->sync(s->e->ex, &ignored);
}

int session_open(dsv4_session **out, dsv4_engine *e, progress_fn progress, void *arg,
                 dsv4_err *err) {
    *out = NULL;
    const dsv4_config *c = e->cfg;
    dsv4_session *s = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory for the session");
    *s = (dsv4_session){.e = e, .progress = progress, .progress_arg = arg};
    arena *host = e->gpu ? &s->host_mem : &s->work_mem;
    host->gpu = e->gpu;
    if (kv_open(&s->kv, e->off, c, &e->kv_opts, err) ||
        arena_open(host, e->gpu ? e->plan.host_work : e->plan.work, "the work buffers", err)) {
        session_close(s);
        return -1;
    }
    arena vram = {e->dense.base + e->dense.size - e->plan.work, e->plan.work, 0, NULL, false};
    session_layout(s, e->gpu ? &vram : host, host, c, &e->opts, e->plan.streamed, e->plan.span,
                   e->plan.chunk);
    session_at(s, 0);
    *out = s;
    return 0;
}

void session_close(dsv4_session *s) {
    if (!s) return;
    settle(s);
    kv_close(s->kv);
    arena_close(&s->work_mem);
    arena_close(&s->host_mem);
    free(s);
}

int session_recover(dsv4_session **s, dsv4_err *err) {
    dsv4_engine *e = (*s)->e;
    progress_fn progress = (*s)->progress;
    void *arg = (*s)->progress_arg;
    if (!gpu_is_lost(e, err)) return -1;
    session_close(*s);
    *s = NULL;
    return engine_load(e, progress, arg, err) || session_open(s, e, progress, arg, err) ? -1 : 0;
}

void session_reset(dsv4_session *s) {
    settle(s);
    kv_reset(s->kv);
    session_at(s, 0);
}

int64_t session_pos(const dsv4_session *s) { return s->pos; }
const kv_stats *session_kv_stats(const dsv4_session *s) { return kv_get_stats(s->kv); }

/* Charge the time since the last call to one class; a GPU is waited for, so that it is that class's
 * and not of what comes behind it. */
static void tick(dsv4_session *s, op_class c) {
    settle(s);
    double t = now_s();
    s->e->stats.op_s[c] += t - s->tick;
    s->tick = t;
}

/* === 5. Attention (M3) ======================================================================== */
/* Keep the last `len` tokens' rows in a ring: token t0+i at row (t0+i) % len. */
static void ring_put(const dsv4_engine *e, void *ring, int len, const void *rows, int n, size_t row,
                     int64_t t0) {
    for (int i = n > len ? n - len : 0, m; i < n; i += m) {
        int at = (int)((t0 + i) % len);
        m = n - i < len - at ? n - i : len - at;
        e->op->copy((uint8_t *)ring + (size_t)at * row, (const uint8_t *)rows + (size_t)i * row,
                    (size_t)m * row, e->ex);
    }
}

/* The rope frequencies of a layer (M3: plain where there is no compression). */
static const float *layer_freq(const dsv4_engine *e, const layer_w *l) {
    return e->freq_at[l->ratio != 0];
}

/* y = W aq128(x): xq receives the rounded input and may be x. */
static void linear_rounded(dsv4_session *s, float *y, const dsv4_mat *w, const float *x,
                           float *xq, int n) {
    const dsv4_engine *e = s->e;
    if (!e->opts.no_rounding) {
        e->op->act_quant(xq, x, n, w->cols, e->ex);
        x = xq;
    }
    e->op->linear(y, w, x, n, 1, e->ex);
}

/* The compressor of a layer's entries or keys on the chunk's normalized input: what is finished
 * becomes rows; the last tokens' projections stay in the rings. */
static int compress_chunk(dsv4_session *s, const layer_w *l, int layer, kv_kind kind, int n,
                          int64_t t0, dsv4_err *err) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    const chunk_work *w = &s->c;
    kv_state st = kv_get_state(s->kv, layer);
    bool keys = kind == KV_KEYS, packed = !e->opts.no_rounding;
    const compressor_w *comp = keys ? &l->index_comp : &l->comp;
    float *ring_kv = keys ? st.index_ring_kv : st.ring_kv;
    float *ring_score = keys ? st.index_ring_score : st.ring_score;
    int d = keys ? c->index_head_dim : c->head_dim, rope = c->qk_rope_head_dim;
    int coff = l->ratio == 4 ? 2 : 1;
    size_t row = (size_t)(coff * d) * sizeof(float);
    int64_t g0 = t0 / l->ratio;
    int n_groups = (int)((t0 + n) / l->ratio - g0);
    e->op->linear(w->ckv, &comp->wkv, w->x, n, 1, e->ex);
    e->op->linear(w->cscore, &comp->wgate, w->x, n, 1, e->ex);
    dsv4_compress in = {w->ckv, w->cscore, ring_kv, ring_score, comp->ape, l->ratio, d, t0};
    e->op->compress(w->kv, &in, g0, n_groups, e->ex);
    e->op->rmsnorm(w->kv, w->kv, comp->norm, n_groups, d, c->rms_norm_eps, e->ex);
    e->op->rope(w->kv, layer_freq(e, l), n_groups, 1, d, rope, g0 * l->ratio, l->ratio, false,
                e->ex);
    ring_put(e, ring_kv, coff * l->ratio, w->ckv, n, row, t0);
    ring_put(e, ring_score, coff * l->ratio, w->cscore, n, row, t0);
    if (keys) e->op->index_round(w->new_rows, w->kv, n_groups, d, packed, e->ex);
    else e->op->kv_round(w->new_rows, w->kv, n_groups, d, rope, packed, e->ex);
    if (n_groups == 0) return 0;
    if (e->op->sync(e->ex, err)) return -1;
    return kv_append(s->kv, layer, kind, w->new_rows, n_groups, err);
}

/* Choose the entries of each token of a CSA layer; qrq is the rounded low-rank query. */
static void attn_index(dsv4_session *s, const layer_w *l, const uint8_t *keys, const float *qrq,
                       int n, int64_t t0) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    chunk_work *w = &s->c;
    int heads = c->index_n_heads, d = c->index_head_dim;
    e->op->linear(w->iq, &l->index_wq_b, qrq, n, 1, e->ex);
    e->op->rope(w->iq, layer_freq(e, l), n, heads, d, c->qk_rope_head_dim, t0, 1, false, e->ex);
    bool packed = !e->opts.no_rounding;
    size_t q_bytes = (size_t)heads * index_row_bytes(d, packed);
    e->op->index_round(w->iq_rows, w->iq, n * heads, d, packed, e->ex);
    e->op->linear(w->iw, &l->index_weights_proj, w->x, n, 1, e->ex);
    float w_scale = (float)(1 / sqrt((double)d) / sqrt((double)heads));
    size_t stride = (size_t)((t0 + n) / l->ratio);
    for (int i = 0; i < n; i += w->index_block) {
        int m = (int)min64(w->index_block, n - i);
        dsv4_index in = {w->iq_rows + (size_t)i * q_bytes, w->iw + (size_t)i * (size_t)heads,
                         w_scale, keys, heads, d, l->ratio, packed, t0 + i, stride};
        e->op->index_scores(w->scores, &in, m, e->ex);
        e->op->topk(w->idx + (size_t)i * (size_t)c->index_topk, w->count + i, w->scores, stride,
                    m, c->index_topk, l->ratio, t0 + i, e->ex);
    }
}

/* q and kv_rows of the chunk; returns the low-rank query as wq_b and the indexer see it. */
static const float *attn_project(dsv4_session *s, const layer_w *l, int n, int64_t t0) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    chunk_work *w = &s->c;
    int hd = c->head_dim, heads = c->num_attention_heads, rope = c->qk_rope_head_dim;
    const float *freq = layer_freq(e, l);
    linear_rounded(s, w->qr, &l->wq_a, w->x, w->xq, n);
    e->op->rmsnorm(w->qr, w->qr, l->q_norm, n, c->q_lora_rank, c->rms_norm_eps, e->ex);
    linear_rounded(s, w->q, &l->wq_b, w->qr, w->qrq, n);
    e->op->rmsnorm(w->q, w->q, NULL, n * heads, hd, c->rms_norm_eps, e->ex);
    e->op->rope(w->q, freq, n, heads, hd, rope, t0, 1, false, e->ex);
    /* wkv takes the same rounded input as wq_a did */
    e->op->linear(w->kv, &l->wkv, e->opts.no_rounding ? w->x : w->xq, n, 1, e->ex);
    e->op->rmsnorm(w->kv, w->kv, l->kv_norm, n, hd, c->rms_norm_eps, e->ex);
    e->op->rope(w->kv, freq, n, 1, hd, rope, t0, 1, false, e->ex);
    e->op->kv_round(w->kv_rows, w->kv, n, hd, rope, !e->opts.no_rounding, e->ex);
    return e->opts.no_rounding ? w->qr : w->qrq;
}

/* Tell how far the forward is; -1 when the caller wants to stop. */
static int report(dsv4_session *s, int layer, double share_of_layer, dsv4_err *err) {
    double done = (layer + share_of_layer) / s->e->n_blocks;
    if (!s->progress || !s->progress(s->progress_arg, done)) return 0;
    return fail(err, "interrupted");
}

/* The attention sublayer on one chunk of the streams. */
static int attention(dsv4_session *s, int layer, const kv_layer *rows, float *h, int n,
                     int64_t t0, dsv4_err *err) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    const layer_w *l = &e->w->layer[layer];
    const span_work *m = &s->s;
    chunk_work *w = &s->c;
    int hd = c->head_dim, heads = c->num_attention_heads, rope = c->qk_rope_head_dim;
    bool packed = !e->opts.no_rounding;
    uint8_t *ring = kv_get_state(s->kv, layer).ring;
    e->op->hc_pre(w->x, m->post, m->comb, h, &l->hc_attn, &e->hc, n, e->ex);
    e->op->rmsnorm(w->x, w->x, l->attn_norm, n, c->hidden_size, c->rms_norm_eps, e->ex);
    tick(s, OPC_HC);
    const float *qrq = attn_project(s, l, n, t0);
    tick(s, OPC_PROJ);
    /* with few entries all are visible, and the indexer has nothing to choose */
    int64_t visible = l->ratio ? (t0 + n) / l->ratio : 0;
    bool choose = l->ratio == 4 && visible > c->index_topk;
    if (l->ratio && compress_chunk(s, l, layer, KV_ENTRIES, n, t0, err)) return -1;
    if (l->ratio == 4 && compress_chunk(s, l, layer, KV_KEYS, n, t0, err)) return -1;
    tick(s, OPC_COMPRESS);
    if (choose) attn_index(s, l, rows->keys, qrq, n, t0);
    tick(s, OPC_INDEX);
    dsv4_attend in = {.q = w->q, .kv = w->kv_rows, .ring = ring, .comp = rows->entries,
                      .idx = choose ? w->idx : NULL, .count = choose ? w->count : NULL,
                      .sink = l->attn_sink, .n_heads = heads, .head_dim = hd, .rope_dim = rope,
                      .window = c->sliding_window, .ratio = l->ratio, .topk = c->index_topk,
                      .packed = packed, .t0 = t0};
    if (visible && !in.comp) {             /* one token, and the entries in the file */
        if (e->op->sync(e->ex, err)) return -1;
        if (!choose) w->count[0] = (int32_t)visible;
        if (kv_gather(s->kv, layer, in.idx, w->count[0], &in.comp, err)) return -1;
        in.idx = NULL;
        in.count = w->count;
    }
    e->op->attend(w->o, &in, n, e->ex);
    ring_put(e, ring, c->sliding_window, w->kv_rows, n, kv_row_bytes(hd, rope, packed), t0);
    tick(s, OPC_ATTEND);
    e->op->rope(w->o, layer_freq(e, l), n, heads, hd, rope, t0, 1, true, e->ex);
    e->op->linear(w->oa, &l->wo_a, w->o, n, c->o_groups, e->ex);
    linear_rounded(s, w->x, &l->wo_b, w->oa, w->oa, n);
    tick(s, OPC_PROJ);
    e->op->hc_post(h, w->x, m->post, m->comb, &e->hc, n, e->ex);
    layer_work(e, layer, (double)t0, (double)(t0 + n), s->e->stats.work);
    tick(s, OPC_HC);
    return 0;
}

/* All chunks of the span through a layer's attention, none across the end of a segment or tail that
 * is to be parked: what the layer's state is there is kept. */
static int attention_span(dsv4_session *s, int layer, float *h, int n, int64_t t0,
                          dsv4_err *err) {
    const dsv4_engine *e = s->e;
    size_t row = (size_t)e->cfg->hc_mult * (size_t)e->cfg->hidden_size;
    uint8_t *mark = s->s.marks;
    kv_layer rows;
    if (kv_begin(s->kv, layer, n, &rows, err)) return -1;
    tick(s, OPC_ATTEND);               /* what waiting for rows took */
    for (int i = 0, m; i < n; i += m) {
        m = (int)min64(e->plan.chunk, n - i);
        if (mark) m = (int)min64(m, SEGMENT_TOKENS - (t0 + i) % SEGMENT_TOKENS);
        if (s->tail > t0 + i) m = (int)min64(m, s->tail - t0 - i);
        if (attention(s, layer, &rows, h + (size_t)i * row, m, t0 + i, err)) return -1;
        bool whole = mark && (t0 + i + m) % SEGMENT_TOKENS == 0, tail = t0 + i + m == s->tail;
        if ((whole || tail) && e->op->sync(e->ex, err)) return -1;
        if (whole) {
            kv_mark(s->kv, layer, t0 + i + m, mark);
            mark += kv_mark_bytes(e->cfg, &e->kv_opts);
        }
        if (tail) kv_mark(s->kv, layer, s->tail, NULL);
        if (report(s, layer, 0.5 * i / n, err)) return -1;
    }
    return e->op->sync(e->ex, err);                    /* rows may move now */
}

/* === 6. Dense weights that do not fit =========================================================
 * Two slots: the layer (or block of head) in use, and the next one on its way.                   */

/* Pin `unit` (-1: none) in place of what p pins. */
static int unit_pin(dsv4_engine *e, pinned_unit *p, int unit, dsv4_err *err) {
    if (p->unit == unit) return 0;
    if (p->unit >= 0) cache_unpin(e->units, p->slot);
    p->unit = -1;
    if (unit < 0) return 0;
    p->slot = cache_get(e->units, (size_t)unit, err);
    if (p->slot < 0) return -1;
    p->unit = unit;
    return 0;
}

/* Have unit's matrices in place, and ask for `next` (-1: nothing is known to follow). */
static int unit_use(dsv4_engine *e, int unit, int next, dsv4_err *err) {
    if (!e->units) return 0;
    dsv4_weights *w = e->w;
    double t = now_s();
    if (unit_pin(e, &e->now, -1, err) || unit_pin(e, &e->next, unit, err)) return -1;
    e->now = e->next;
    e->next.unit = -1;
    if (next != unit && unit_pin(e, &e->next, next, err)) return -1;
    if (cache_wait(e->units, e->now.slot, err)) return -1;
    e->stats.dense_wait_s += now_s() - t;
    int part = 0;
    for (size_t i = 0; i < w->n_needs; i++) {
        const need *n = &w->needs[i];
        if (n->unit != unit) continue;
        const void *data = cache_part(e->units, e->now.slot, part++);
        if (n->kind == NEED_RAW) *n->dst.raw = data;
        else *n->dst.scale = data;
    }
    return 0;
}

/* h [n][copies][dim] = the tokens' rows of embed.weight. */
static int embed_tokens(dsv4_session *s, float *h, const int32_t *tokens, int n, int copies,
                        dsv4_err *err) {
    dsv4_engine *e = s->e;
    dsv4_mat m = e->w->embed;
    if (!e->units) {
        e->op->embed(h, &m, tokens, n, copies, e->ex);
        return 0;
    }
    ckpt_tensor row[EMBED_ROWS];
    load_item item[EMBED_ROWS];
    int32_t id[EMBED_ROWS];
    uint64_t bytes = e->w->embed_tensor->bytes / (uint64_t)m.rows;
    m.data = s->s.embed_rows;
    for (int i = 0; i < n; i += m.rows) {
        m.rows = (int)min64(EMBED_ROWS, n - i);
        for (int j = 0; j < m.rows; j++) {
            row[j] = *e->w->embed_tensor;
            row[j].offset += (uint64_t)tokens[i + j] * bytes;
            row[j].bytes = bytes;
            item[j] = (load_item){&row[j], (uint8_t *)s->s.embed_rows + (uint64_t)j * bytes};
            id[j] = j;
        }
        if (offload_load(e->off, item, (size_t)m.rows, err)) return -1;
        e->op->embed(h + (size_t)i * (size_t)(copies * m.cols), &m, id, m.rows, copies, e->ex);
    }
    return 0;
}

/* logits [n][vocab] = x [n][dim] by head.weight. */
static int head_linear(dsv4_session *s, float *logits, const float *x, int n, dsv4_err *err) {
    dsv4_engine *e = s->e;
    const dsv4_weights *w = e->w;
    if (!e->units) {
        e->op->linear(logits, &w->head, x, n, 1, e->ex);
        return 0;
    }
    int n_layers = e->cfg->num_hidden_layers + w->bytes.has_mtp;
    for (int u = n_layers; u < w->n_units; u++) {
        if (unit_use(e, u, u + 1 < w->n_units ? u + 1 : 0, err)) return -1;
        dsv4_mat m = w->head;
        int first = (u - n_layers) * w->head_rows;
        m.rows = (int)min64(w->head_rows, w->head.rows - first);
        m.data = cache_part(e->units, e->now.slot, 0);
        for (int i = 0; i < n; i++)
            e->op->linear(logits + (size_t)i * (size_t)w->head.rows + first, &m,
                          x + (size_t)i * (size_t)m.cols, 1, 1, e->ex);
    }
    return 0;
}

/* === 7. Mixture of experts (M3) =============================================================== */
/* Tokens i..i+n-1 of the span: the MoE input, rounded, and which experts take it. */
static void moe_choose(dsv4_session *s, const layer_w *l, const float *h, const int32_t *tokens,
                       int i, int n) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    chunk_work *w = &s->c;
    span_work *m = &s->s;
    int hc = c->hc_mult, topk = c->num_experts_per_tok;
    size_t at = (size_t)i, dim = (size_t)c->hidden_size;
    e->op->hc_pre(w->x, m->post + at * (size_t)hc, m->comb + at * (size_t)(hc * hc),
                  h + at * (size_t)hc * dim, &l->hc_ffn, &e->hc, n, e->ex);
    e->op->rmsnorm(w->x, w->x, l->ffn_norm, n, c->hidden_size, c->rms_norm_eps, e->ex);
    tick(s, OPC_HC);
    e->op->linear(w->logits, &l->gate, w->x, n, 1, e->ex);
    dsv4_route in = {w->logits, l->gate_bias, l->tid2eid, tokens + i, c->n_routed_experts, topk,
                     c->routed_scaling_factor};
    e->op->route(m->ids + at * (size_t)topk, m->weights + at * (size_t)topk, &in, n, e->ex);
    if (e->opts.no_rounding)
        e->op->copy(m->x + at * dim, w->x, (size_t)n * dim * sizeof(float), e->ex);
    else
        e->op->act_codes(m->code + at * dim, m->scale + at * ((dim + 127) / 128), w->x, n,
                         c->hidden_size, e->ex);
    tick(s, OPC_GATE);
}

/* Sort the span's (token, expert) pairs by expert, tokens ascending: a counting sort. */
static void moe_sort(span_work *m, int n, int topk, int n_experts) {
    memset(m->start, 0, (size_t)(n_experts + 1) * sizeof *m->start);
    for (int i = 0; i < n * topk; i++) m->start[m->ids[i] + 1]++;
    for (int e = 0; e < n_experts; e++) m->start[e + 1] += m->start[e];
    for (int i = 0; i < n * topk; i++) {               /* start[e] runs to where e+1 begins ... */
        int32_t at = m->start[m->ids[i]]++;
        m->rows[at] = i / topk;
        m->row_weight[at] = m->weights[i];
    }
    for (int e = n_experts; e > 0; e--) m->start[e] = m->start[e - 1];   /* ... and goes back   */
    m->start[0] = m->n_used = 0;
    for (int e = 0; e < n_experts; e++)
        if (m->start[e] < m->start[e + 1]) m->used[m->n_used++] = e;
}

static size_t expert_id(const dsv4_engine *e, int layer, int expert) {
    return (size_t)layer * (size_t)e->cfg->n_routed_experts + (size_t)expert;
}

/* Wait for an expert's bytes (on a GPU they are in); y += what it makes of its tokens. */
static int expert_run(dsv4_session *s, int layer, int expert, int slot, float *y, dsv4_err *err) {
    dsv4_engine *e = s->e;
    const span_work *m = &s->s;
    int dim = e->cfg->hidden_size, inter = e->cfg->moe_intermediate_size;
    int first = m->start[expert], end = m->start[expert + 1];
    double t = now_s();
    if (!e->gpu && cache_wait(e->experts, slot, err)) return -1;
    e->stats.expert_wait_s += now_s() - t;
    const void *part[EXPERT_PARTS];
    for (int p = 0; p < EXPERT_PARTS; p++)
        part[p] = e->gpu ? e->expert_at[expert_id(e, layer, expert) * EXPERT_PARTS + (size_t)p]
                         : cache_part(e->experts, slot, p);
    dsv4_ffn w = {.w1 = {DT_I8, inter, dim, part[W1], part[S1]},
                  .w2 = {DT_I8, dim, inter, part[W2], part[S2]},
                  .w3 = {DT_I8, inter, dim, part[W3], part[S3]}};
    dsv4_acts x = {m->code, m->scale, m->x};
    for (int i = first; i < end; i += EXPERT_ROWS)
        e->op->expert_ffn(y, &w, &x, m->rows + i, m->row_weight + i,
                          (int)min64(EXPERT_ROWS, end - i), e->cfg->swiglu_limit,
                          m->expert_scratch, e->ex);
    e->stats.expert_uses++;
    e->layer_uses[layer]++;
    e->stats.work[WORK_EXPERTS] += (end - first) * expert_macs(e->cfg);
    return 0;
}

/* The shared expert's y of tokens i..i+n-1, in w->x. */
static void moe_shared(dsv4_session *s, const layer_w *l, int i, int n) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    chunk_work *w = &s->c;
    const span_work *m = &s->s;
    size_t at = (size_t)i, dim = (size_t)c->hidden_size;
    const float *x = w->xq;
    if (e->opts.no_rounding) x = m->x + at * dim;
    else e->op->act_values(w->xq, m->code + at * dim, m->scale + at * ((dim + 127) / 128), n,
                           c->hidden_size, e->ex);
    e->op->linear(w->g, &l->shared.w1, x, n, 1, e->ex);
    e->op->linear(w->u, &l->shared.w3, x, n, 1, e->ex);
    e->op->swiglu(w->g, w->g, w->u, n, c->moe_intermediate_size, c->swiglu_limit, e->ex);
    linear_rounded(s, w->x, &l->shared.w2, w->g, w->g, n);
    tick(s, OPC_SHARED);
}

/* One token: all its experts are asked for at once; those that are in and the shared one are
 * computed while the others are read, each into its own y.  These are added in ascending id, so
 * that the order in which they came cannot show. */
static int moe_decode(dsv4_session *s, const layer_w *l, int layer, dsv4_err *err) {
    dsv4_engine *e = s->e;
    const span_work *m = &s->s;
    int slot[MAX_TOPK], n = m->n_used, asked = 0, rc = 0, dim = e->cfg->hidden_size;
    bool held[MAX_TOPK];
    for (int i = 0; i < n; i++)
        held[i] = cache_holds(e->experts, expert_id(e, layer, m->used[i]));
    if (e->opts.trace) e->opts.trace(e->opts.trace_arg, s->pos, layer, m->used, n);
    for (; asked < n && rc == 0; asked += rc == 0)
        if ((slot[asked] = cache_get(e->experts, expert_id(e, layer, m->used[asked]), err)) < 0)
            rc = -1;
    memset(m->expert_y, 0, (size_t)n * (size_t)dim * sizeof(float));
    for (int pass = 0; pass < 2; pass++) {             /* the hits, then the others */
        for (int i = 0; i < n && rc == 0; i++) {
            float *y = m->expert_y + (size_t)i * (size_t)dim;
            if (held[i] == (pass == 0)) rc = expert_run(s, layer, m->used[i], slot[i], y, err);
        }
        tick(s, OPC_EXPERTS);
        if (pass == 0) moe_shared(s, l, 0, 1);
    }
    for (int i = 0; i < asked; i++) cache_unpin(e->experts, slot[i]);
    for (int i = 0; i < n && rc == 0; i++)
        e->op->add(m->y, m->expert_y + (size_t)i * (size_t)dim, 1, 1, dim, e->ex);
    return rc;
}

/* On a GPU, where all experts are: y += every chosen one in ascending id. */
static int moe_resident(dsv4_session *s, int layer, int n, dsv4_err *err) {
    const dsv4_engine *e = s->e;
    const span_work *m = &s->s;
    if (e->opts.trace && n == 1)
        e->opts.trace(e->opts.trace_arg, s->pos, layer, m->used, m->n_used);
    for (int i = 0; i < m->n_used; i++)
        if (expert_run(s, layer, m->used[i], -1, m->y, err)) return -1;
    return report(s, layer, 0.9, err);
}

/* y += every chosen expert in ascending id, each asked for once, the next ones on their way.  A
 * prompt comes by all of them: what decode has learned to keep must stay. */
static int moe_experts(dsv4_session *s, int layer, dsv4_err *err) {
    dsv4_engine *e = s->e;
    const span_work *m = &s->s;
    int slot_of[LOOKAHEAD], asked = 0, done = 0, rc = 0;
    while (done < m->n_used && rc == 0) {
        while (asked < m->n_used && asked - done < LOOKAHEAD) {
            err->msg[0] = 0;
            int slot = cache_pass(e->experts, expert_id(e, layer, m->used[asked]), err);
            if (slot < 0 && err->msg[0]) rc = -1;
            if (slot < 0) break;
            slot_of[asked++ % LOOKAHEAD] = slot;
        }
        if (rc) break;
        assert(asked > done);                          /* the plan gave at least 2 x topk slots */
        int slot = slot_of[done % LOOKAHEAD], expert = m->used[done++];
        rc = expert_run(s, layer, expert, slot, m->y, err);
        cache_unpin(e->experts, slot);
        double share = (double)m->start[expert + 1] / m->start[e->cfg->n_routed_experts];
        tick(s, OPC_EXPERTS);
        if (rc == 0) rc = report(s, layer, 0.5 + 0.5 * share, err);
    }
    for (; done < asked; done++) cache_unpin(e->experts, slot_of[done % LOOKAHEAD]);
    return rc;
}

/* === 8. Forward and MTP ======================================================================= */
int layer_forward(dsv4_session *s, int layer, float *h, const int32_t *tokens, int n, int64_t t0,
                  dsv4_err *err) {
    dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    const layer_w *l = &e->w->layer[layer];
    span_work *m = &s->s;
    int chunk = e->plan.chunk;
    size_t dim = (size_t)c->hidden_size, hc = (size_t)c->hc_mult;
    assert(layer < e->n_blocks && n <= e->plan.span);
    s->tick = now_s();
    bool last = layer + 1 >= c->num_hidden_layers;     /* then head, if it is one token's turn */
    int after = !last ? layer + 1 : n == 1 ? c->num_hidden_layers + e->w->bytes.has_mtp : -1;
    if (unit_use(e, layer, after, err)) return -1;
    if (attention_span(s, layer, h, n, t0, err)) return -1;
    /* the next layer's KV comes while experts are computed */
    if (!last && kv_ahead(s->kv, layer + 1, n, err)) return -1;
    for (int i = 0; i < n; i += chunk)
        moe_choose(s, l, h, tokens, i, (int)min64(chunk, n - i));
    if (e->op->sync(e->ex, err)) return -1;
    moe_sort(m, n, c->num_experts_per_tok, c->n_routed_experts);
    e->op->zero(m->y, (size_t)n * dim * sizeof(float), e->ex);
    int rc = e->gpu ? moe_resident(s, layer, n, err)
           : n == 1 ? moe_decode(s, l, layer, err) : moe_experts(s, layer, err);
    tick(s, OPC_EXPERTS);
    for (int i = 0; i < n && rc == 0; i += chunk) {
        size_t at = (size_t)i;
        int some = (int)min64(chunk, n - i);
        if (n > 1 || e->gpu) moe_shared(s, l, i, some);
        e->op->add(m->y + at * dim, s->c.x, some, 1, c->hidden_size, e->ex);
        e->op->hc_post(h + at * hc * dim, m->y + at * dim, m->post + at * hc,
                       m->comb + at * hc * hc, &e->hc, some, e->ex);
        tick(s, OPC_HC);
    }
    return rc ? rc : report(s, layer, 1, err);
}

/* The tokens of a forward, where operations see them. */
static const int32_t *tokens_in(dsv4_session *s, const int32_t *tokens, int n) {
    return memcpy(s->s.tokens, tokens, (size_t)n * sizeof *tokens);
}

/* The MTP block at positions p0..p0+n-1 (n <= chunk), whose streams are h and whose next tokens
 * are `next`; leaves its output streams in mtp_h. */
static int mtp_forward(dsv4_session *s, const float *h, const int32_t *next, int n, int64_t p0,
                       dsv4_err *err) {
    dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    const mtp_w *m = &e->w->mtp;
    chunk_work *w = &s->c;
    int dim = c->hidden_size, hc = c->hc_mult;
    next = tokens_in(s, next, n);
    if (embed_tokens(s, w->x, next, n, 1, err)) return -1;
    e->op->rmsnorm(w->x, w->x, m->enorm, n, dim, c->rms_norm_eps, e->ex);
    linear_rounded(s, w->xq, &m->e_proj, w->x, w->x, n);
    e->op->rmsnorm(w->mtp_norm, h, m->hnorm, n * hc, dim, c->rms_norm_eps, e->ex);
    linear_rounded(s, w->mtp_h, &m->h_proj, w->mtp_norm, w->mtp_norm, n * hc);
    e->op->add(w->mtp_h, w->xq, n, hc, dim, e->ex);
    tick(s, OPC_MTP);
    return layer_forward(s, c->num_hidden_layers, w->mtp_h, next, n, p0, err);
}

/* Run the MTP block over every position whose next token is known now: the pending one before
 * t0, and t0..t0+n-2.  Keep the last streams for later. */
static int mtp_follow(dsv4_session *s, const int32_t *tokens, int n, int64_t t0, dsv4_err *err) {
    const dsv4_config *c = s->e->cfg;
    size_t row = (size_t)c->hc_mult * (size_t)c->hidden_size;
    if (t0 > 0 && s->mtp_drafted != tokens[0] &&
        mtp_forward(s, s->mtp_pending, tokens, 1, t0 - 1, err))
        return -1;
    /* of a window-only block nothing further back is ever seen */
    int64_t first = c->compress_ratios[c->num_hidden_layers] ? 0 : n - 1 - c->sliding_window;
    for (int i = first > 0 ? (int)first : 0; i < n - 1; i += s->e->plan.chunk) {
        int m = (int)min64(s->e->plan.chunk, n - 1 - i);
        if (mtp_forward(s, s->s.h + (size_t)i * row, tokens + i + 1, m, t0 + i, err)) return -1;
    }
    s->e->op->copy(s->mtp_pending, s->s.h + (size_t)(n - 1) * row, row * sizeof(float), s->e->ex);
    s->mtp_drafted = -1;
    return 0;
}

/* Before a token starts, its experts in hash layers are known: have them read, as long as they do
 * not push each other out. */
static void ask_hash_experts(dsv4_engine *e, int32_t token) {
    const dsv4_config *c = e->cfg;
    int topk = c->num_experts_per_tok;
    for (int l = 0; l < c->num_hash_layers && (l + 2) * topk <= e->plan.n_slots; l++)
        for (int k = 0; k < topk; k++) {
            dsv4_err err;                              /* shows when they are waited for */
            int expert = e->w->layer[l].tid2eid[(size_t)token * (size_t)topk + (size_t)k];
            int slot = cache_get(e->experts, expert_id(e, l, expert), &err);
            if (slot >= 0) cache_unpin(e->experts, slot);
        }
}

/* Remember what went in, and park the segments that are whole now, and the tail.  What goes wrong
 * with that is a note, not an error: the answer does not need it. */
static void session_keep(dsv4_session *s, const int32_t *tokens, int n) {
    dsv4_engine *e = s->e;
    dsv4_err err;
    if (!s->tokens) return;
    memcpy(s->tokens + s->pos, tokens, (size_t)n * sizeof *tokens);
    bool tail = s->tail > s->pos && s->tail <= s->pos + n;
    if (!*e->note && (kv_park(s->kv, s->tokens, s->pos, s->pos + n, s->s.marks, &err) ||
                      (tail && kv_park_tail(s->kv, s->tokens, s->tail, &err))))
        snprintf(e->note, sizeof e->note, "context is not parked any more: %s", err.msg);
}

int64_t session_parked(dsv4_session *s, const int32_t *tokens, int64_t n, int64_t tail) {
    return s->tokens ? kv_parked(s->kv, tokens, min64(n, s->e->opts.ctx), tail) : 0;
}

/* Stand behind tokens [pos] whose KV came parked; -1: it did not come. */
static void session_reuse(dsv4_session *s, const int32_t *tokens, int64_t pos) {
    s->broken = pos < 0;
    if (s->broken) return;
    memcpy(s->tokens, tokens, (size_t)pos * sizeof *tokens);
    session_at(s, pos);
    s->e->stats.reused_tokens += (uint64_t)pos;
}

int64_t session_resume(dsv4_session *s, const int32_t *tokens, int64_t n, int64_t tail,
                       dsv4_err *err) {
    session_reset(s);
    if (!s->tokens) return 0;
    session_reuse(s, tokens, kv_resume(s->kv, tokens, min64(n, s->e->opts.ctx), tail, err));
    s->tail = tail;
    return s->broken ? -1 : s->pos;
}

int session_save(dsv4_session *s, const char *name, park_frame extra, dsv4_err *err) {
    assert(!s->broken);
    if (!s->tokens) return fail(err, "nothing can be saved: parked context is off");
    return kv_save(s->kv, name, s->tokens, s->pos, extra, err);
}

int64_t session_load(dsv4_session *s, const char *name, int32_t **tokens, int64_t *n,
                     park_frame *extra, dsv4_err *err) {
    if (!s->tokens) return fail(err, "nothing can be loaded: parked context is off");
    int64_t pos = kv_load(s->kv, name, tokens, n, extra, err);
    session_reuse(s, pos < 0 ? NULL : *tokens, pos);
    return pos;
}

int session_forward(dsv4_session *s, const int32_t *tokens, int n, dsv4_err *err) {
    dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    assert(n >= 1 && n <= e->plan.span && !s->broken);
    double begin = now_s();
    if (s->pos + n > e->opts.ctx)
        return fail(err, "the context of %lld tokens is full at %lld and %d more; raise --ctx",
                    (long long)e->opts.ctx, (long long)s->pos, n);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->vocab_size)
            return fail(err, "token id %d at position %lld is outside of the vocabulary of %d",
                        tokens[i], (long long)s->pos + i, c->vocab_size);
    s->broken = true;                      /* until all layers are through */
    s->tick = begin;
    const int32_t *seen = tokens_in(s, tokens, n);
    if (embed_tokens(s, s->s.h, seen, n, c->hc_mult, err)) return -1;
    if (n == 1 && !e->gpu) ask_hash_experts(e, tokens[0]);
    tick(s, OPC_EMBED);
    for (int l = 0; l < c->num_hidden_layers; l++)
        if (layer_forward(s, l, s->s.h, seen, n, s->pos, err)) return -1;
    if (e->opts.mtp && mtp_follow(s, tokens, n, s->pos, err)) return -1;
    if (e->op->sync(e->ex, err)) return -1;
    s->broken = false;
    bool decode = n == 1 && s->pos > 0;
    session_keep(s, tokens, n);
    s->pos += n;
    s->n_last = n;
    *(decode ? &e->stats.decode_tokens : &e->stats.prefill_tokens) += (uint64_t)n;
    *(decode ? &e->stats.decode_s : &e->stats.prefill_s) += now_s() - begin;
    e->stats.passes += !decode;
    return 0;
}

/* logits = head rmsnorm(hc_pre(h)) for n rows of streams.  On a GPU they stay there, for at most
 * OUT_ROWS, where logits is NULL. */
static int head_logits(dsv4_session *s, const float *h, const dsv4_hc *hc, const float *norm,
                       int n, float *logits, dsv4_err *err) {
    const dsv4_engine *e = s->e;
    const dsv4_config *c = e->cfg;
    int most = e->gpu ? (int)min64(OUT_ROWS, e->plan.chunk) : e->plan.chunk;
    size_t vocab = (size_t)c->vocab_size;
    s->tick = now_s();
    for (int i = 0; i < n; i += most) {
        int m = (int)min64(most, n - i);
        float *to = e->gpu ? s->c.out : logits + (size_t)i * vocab;
        e->op->hc_pre(s->c.x, NULL, NULL, h + (size_t)i * (size_t)(c->hc_mult * c->hidden_size),
                      hc, &e->hc, m, e->ex);
        e->op->rmsnorm(s->c.x, s->c.x, norm, m, c->hidden_size, c->rms_norm_eps, e->ex);
        if (head_linear(s, to, s->c.x, m, err)) return -1;
        if (e->gpu && logits)
            e->op->copy(logits + (size_t)i * vocab, to, (size_t)m * vocab * sizeof *to, e->ex);
        if (e->op->sync(e->ex, err)) return -1;
    }
    tick(s, OPC_HEAD);
    return 0;
}

/* The streams of token i of the last forward. */
static const float *streams_at(const dsv4_session *s, int i) {
    return s->s.h + (size_t)i * (size_t)(s->e->cfg->hc_mult * s->e->cfg->hidden_size);
}

int session_logits(dsv4_session *s, int i0, int n, float *logits, dsv4_err *err) {
    const dsv4_weights *w = s->e->w;
    assert(i0 >= 0 && n >= 0 && i0 + n <= s->n_last && !s->broken);
    return head_logits(s, streams_at(s, i0), &w->hc_head, w->norm, n, logits, err);
}

int session_argmax(dsv4_session *s, int i, float *logits, int32_t *id, dsv4_err *err) {
    const dsv4_engine *e = s->e;
    const dsv4_weights *w = e->w;
    assert(i >= 0 && i < s->n_last && !s->broken);
    if (e->gpu) logits = NULL;
    if (head_logits(s, streams_at(s, i), &w->hc_head, w->norm, 1, logits, err)) return -1;
    e->op->argmax(s->c.count, logits ? logits : s->c.out, 1, e->cfg->vocab_size, e->ex);
    if (e->op->sync(e->ex, err)) return -1;
    *id = s->c.count[0];
    return 0;
}

int session_draft(dsv4_session *s, int32_t next_token, float *logits, dsv4_err *err) {
    const dsv4_engine *e = s->e;
    assert(e->opts.mtp && s->pos > 0 && !s->broken);
    assert(next_token >= 0 && next_token < e->cfg->vocab_size);
    s->tick = now_s();
    s->broken = mtp_forward(s, s->mtp_pending, &next_token, 1, s->pos - 1, err);
    if (s->broken) return -1;
    s->mtp_drafted = next_token;
    return head_logits(s, s->c.mtp_h, &e->w->mtp.hc_head, e->w->mtp.norm, 1, logits, err);
}

/* === 9. Sampling ============================================================================== */
struct sampler {
    sample_opts o;
    int n_vocab, n_popped;
    uint64_t state;                /* of the random numbers                                     */
    float *x;                      /* [n_vocab] logits behind the penalty; all in one block     */
    int32_t *heap;                 /* [n_vocab] ids: a heap, then behind it those taken off it  */
    bool *seen;                    /* [n_vocab] in the context already                          */
};

int sampler_open(sampler **out, const sample_opts *o, int n_vocab, dsv4_err *err) {
    size_t n = (size_t)n_vocab;
    sampler *s = *out = calloc(1, sizeof *s + n * (sizeof *s->x + sizeof *s->heap +
                                                   sizeof *s->seen));
    if (!s) return fail(err, "out of memory for sampling");
    *s = (sampler){.o = *o, .n_vocab = n_vocab, .state = o->seed, .x = (float *)(s + 1)};
    s->heap = (int32_t *)(s->x + n);
    s->seen = (bool *)(s->heap + n);
    return 0;
}

void sampler_close(sampler *s) { free(s); }

void sampler_accept(sampler *s, int32_t token) {
    assert(token >= 0 && token < s->n_vocab);
    s->seen[token] = true;
}

/* A uniform double in [0, 1): splitmix64 (Steele, Lea, Flood 2014). */
static double rng_next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53;
}

/* Order by falling logit, ties by rising id: a total order, so every sort gives the same. */
static bool before(const float *logits, int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

/* Restore a binary heap of ids (first in order on top) below place i. */
static void heap_down(int32_t *heap, int n, int i, const float *logits) {
    for (;;) {
        int c = 2 * i + 1;
        if (c >= n) return;
        if (c + 1 < n && before(logits, heap[c + 1], heap[c])) c++;
        if (!before(logits, heap[c], heap[i])) return;
        int32_t t = heap[c];
        heap[c] = heap[i];
        heap[i] = t;
        i = c;
    }
}

/* The i-th likeliest token. */
static int32_t nth_token(sampler *s, int i) {
    for (; s->n_popped <= i; s->n_popped++) {
        int last = s->n_vocab - 1 - s->n_popped;
        int32_t id = s->heap[0];
        s->heap[0] = s->heap[last];
        s->heap[last] = id;
        heap_down(s->heap, last, 0, s->x);
    }
    return s->heap[s->n_vocab - 1 - i];
}

/* Keep the top_k likeliest; of these the shortest prefix that holds top_p; of these the ones with
 * min_p times the share of the first; and draw.  Nothing cut off: go down until the draw is met. */
int32_t sampler_next(sampler *s, const float *logits) {
    const sample_opts *o = &s->o;
    int n = s->n_vocab, limit = o->top_k > 0 && o->top_k < n ? o->top_k : n;
    for (int i = 0; i < n; i++) {
        float worse = logits[i] > 0 ? logits[i] / o->repetition_penalty
                                    : logits[i] * o->repetition_penalty;
        s->x[i] = s->seen[i] ? worse : logits[i];
        s->heap[i] = i;
    }
    int32_t first, id;
    argmax_ref(&first, s->x, 1, n, NULL);
    id = first;
    if (o->temperature > 0) {
        double scale = 1 / (double)o->temperature, total = 0, taken = 0, at = 0;
        double top = (double)s->x[first];
        s->n_popped = 0;
        for (int i = n / 2; i >= 0; i--) heap_down(s->heap, n, i, s->x);
        for (int i = 0; i < limit; i++)
            total += exp(((double)s->x[limit < n ? nth_token(s, i) : i] - top) * scale);
        bool cut = limit < n || o->top_p < 1 || o->min_p > 0;
        double u = rng_next(&s->state), share = total * (cut ? (double)o->top_p : u);
        int kept = 0;
        do {
            id = nth_token(s, kept);
            double w = exp(((double)s->x[id] - top) * scale);
            if (w < (double)o->min_p) break;
            taken += w;
        } while (++kept < limit && taken <= share);
        for (int i = 0; cut && i < kept; i++) {
            id = nth_token(s, i);
            at += exp(((double)s->x[id] - top) * scale);
            if (at > u * taken) break;
        }
    }
    sampler_accept(s, id);
    return id;
}

int loop_push(loop_guard *g, int32_t token) {
    int found = 0;
    for (int p = 1; p <= LOOP_PERIOD_MAX && p <= g->n; p++) {
        bool same = g->last[(g->n - p) % LOOP_PERIOD_MAX] == token;
        g->run[p] = same ? g->run[p] + 1 : 0;
        if (!found && g->run[p] >= LOOP_TOKENS && g->run[p] >= LOOP_TURNS * p) found = p;
    }
    g->last[g->n++ % LOOP_PERIOD_MAX] = token;
    return found;
}

double token_nll(const float *logits, int n_vocab, int32_t token) {
    int32_t first;
    argmax_ref(&first, logits, 1, n_vocab, NULL);
    double top = (double)logits[first], sum = 0;
    for (int i = 0; i < n_vocab; i++) sum += exp((double)logits[i] - top);
    return log(sum) + top - (double)logits[token];
}
