/* mkmodel.c -- writes a DeepSeek-V4 checkpoint of any shape: official layout, random weights.
 *
 *   preset + flags -> list of tensors -> dealt out to shards -> model-%05d-of-%05d.safetensors
 *                          |                                    model.safetensors.index.json
 *            key = hash(seed, name): its random stream          config.json, tokenizer.json, ..
 *
 * The files have what published checkpoints have and a loader may stumble on: data that begins
 * at no particular alignment, __metadata__ in some shards only, a layer cut anywhere by a small
 * --shard-bytes, and with --split-experts an expert's tensors in six shards, in no order.
 * The weights are random but behave: streams stay of order one through any number of layers,
 * logits have a standard deviation of 2.5, a few experts of each layer are far busier than the
 * rest, and some swiglu inputs reach the clamp (1 in 8,000 with Flash's widths).
 *
 * Invariants  1 the bytes depend on the arguments only: value i of a tensor is a pure function
 *               of (seed, name, i), whichever thread writes it and when
 *             2 DIR is empty or absent at the start, so a failed run may remove all it wrote
 *             3 memory is the list of tensors and one piece per thread, never a tensor or shard
 * Contents    1 shape and flags   2 random values   3 the tensors of a checkpoint
 *             4 shards   5 JSON files   6 main
 * Not here    what the tensors mean (dsv4.c); DSpark blocks
 * Build       cc -std=c11 -O2 tests/mkmodel.c -o mkmodel -lpthread -lm                         */
#define _POSIX_C_SOURCE 200809L
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    LAYERS_MAX = 1000,         /* three digits in a tensor's name                              */
    EXPERTS_MAX = 4096,        /* bounds the tables on the stack in section 2                  */
    WIDTH_MAX = 1 << 15,       /* of the streams and of an expert; dsv4 takes no more          */
    SHARDS_MAX = 99999,        /* five digits in a shard's name                                */
    BLOCK_TENSORS_MAX = 64,    /* tensors of a block besides its routed experts (true: 40)     */
    PATH_BYTES = 4096,
    PIECE_BYTES = 4 << 20,     /* what a thread fills and writes at a time                     */
    N_THREADS = 2,             /* so that filling and writing overlap                         */
};

typedef struct { char msg[PATH_BYTES + 256]; } mk_err;

/* Say what went wrong, for main() to print.  Returns -1 so that callers can return it. */
__attribute__((format(printf, 2, 3)))
static int fail(mk_err *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->msg, sizeof err->msg, format, args);
    va_end(args);
    return -1;
}

/* === 1. Shape and flags ===================================================================== */

enum { HC_MULT = 4, QK_ROPE_HEAD_DIM = 64, FP8_BLOCK = 128, FP4_BLOCK = 32, N_SPECIAL = 8 };

/* The keys of config.json in which presets differ, and three things of our own. */
typedef struct {
    const char *name;
    int hidden_size, num_hidden_layers, num_attention_heads, head_dim;
    int q_lora_rank, o_lora_rank, o_groups, sliding_window;
    int index_n_heads, index_head_dim, index_topk;
    int n_routed_experts, num_experts_per_tok, moe_intermediate_size, num_hash_layers;
    int vocab_size, max_position_embeddings, original_max_position_embeddings;
    double routed_scaling_factor;
    int first_layers, first_ratio;  /* compress ratio of these layers; then 4, 128, 4, ..      */
    uint64_t shard_bytes;           /* a shard is closed before it would grow beyond this      */
    int special_id[N_SPECIAL];      /* ids of special_text[], ascending                        */
} shape;

static const shape presets[] = {
    {.name = "tiny", .hidden_size = 256, .num_hidden_layers = 6, .num_attention_heads = 8,
     .head_dim = 128, .q_lora_rank = 128, .o_lora_rank = 128, .o_groups = 2, .sliding_window = 16,
     .index_n_heads = 4, .index_head_dim = 64, .index_topk = 8, .n_routed_experts = 8,
     .num_experts_per_tok = 2, .moe_intermediate_size = 128, .num_hash_layers = 2,
     .vocab_size = 512, .max_position_embeddings = 1024, .original_max_position_embeddings = 64,
     .routed_scaling_factor = 1.5, .first_layers = 2, .first_ratio = 0, .shard_bytes = 3 << 20,
     .special_id = {0, 1, 2, 507, 508, 509, 510, 511}},
    {.name = "flash", .hidden_size = 4096, .num_hidden_layers = 43, .num_attention_heads = 64,
     .head_dim = 512, .q_lora_rank = 1024, .o_lora_rank = 1024, .o_groups = 8,
     .sliding_window = 128, .index_n_heads = 64, .index_head_dim = 128, .index_topk = 512,
     .n_routed_experts = 256, .num_experts_per_tok = 6, .moe_intermediate_size = 2048,
     .num_hash_layers = 3, .vocab_size = 129280, .max_position_embeddings = 1048576,
     .original_max_position_embeddings = 65536, .routed_scaling_factor = 1.5, .first_layers = 2,
     .first_ratio = 0,
     .shard_bytes = UINT64_C(4) << 30,
     .special_id = {0, 1, 2, 128803, 128804, 128821, 128822, 128825}},
    {.name = "pro", .hidden_size = 7168, .num_hidden_layers = 61, .num_attention_heads = 128,
     .head_dim = 512, .q_lora_rank = 1536, .o_lora_rank = 1024, .o_groups = 16,
     .sliding_window = 128, .index_n_heads = 64, .index_head_dim = 128, .index_topk = 1024,
     .n_routed_experts = 384, .num_experts_per_tok = 6, .moe_intermediate_size = 3072,
     .num_hash_layers = 3, .vocab_size = 129280, .max_position_embeddings = 1048576,
     .original_max_position_embeddings = 65536, .routed_scaling_factor = 2.5, .first_layers = 2,
     .first_ratio = 128, .shard_bytes = UINT64_C(4) << 30,
     .special_id = {0, 1, 2, 128803, 128804, 128821, 128822, 128825}},
    /* one layer of each kind, narrow enough for a million tokens in minutes */
    {.name = "1m", .hidden_size = 256, .num_hidden_layers = 3, .num_attention_heads = 4,
     .head_dim = 128, .q_lora_rank = 128, .o_lora_rank = 128, .o_groups = 2,
     .sliding_window = 128, .index_n_heads = 4, .index_head_dim = 64, .index_topk = 128,
     .n_routed_experts = 8, .num_experts_per_tok = 2, .moe_intermediate_size = 128,
     .num_hash_layers = 1, .vocab_size = 512, .max_position_embeddings = 1048576,
     .original_max_position_embeddings = 65536, .routed_scaling_factor = 1.5, .first_layers = 1,
     .first_ratio = 0, .shard_bytes = 3 << 20,
     .special_id = {0, 1, 2, 507, 508, 509, 510, 511}},
};

/* In the order in which tensors stand in a shard: widest first, as safetensors sorts them. */
typedef enum { I64, F32, BF16, F16, F8_E8M0, F8_E4M3, I8 } dtype;
static const char *const dtype_name[] = {"I64", "F32", "BF16", "F16", "F8_E8M0", "F8_E4M3", "I8"};
static const uint64_t dtype_bytes[] = {8, 4, 2, 2, 1, 1, 1};

typedef struct {
    shape shape;
    const char *dir;
    uint64_t seed;
    dtype storage;           /* of the tensors that are BF16 in the official checkpoints */
    bool mtp, split_experts, no_index;
    bool even;               /* gates choose no expert much more often than another             */
} options;

/* The compress ratio of layer l, by the pattern that all published checkpoints share. */
static int compress_ratio(const shape *s, int l) {
    return l < s->first_layers ? s->first_ratio : (l - s->first_layers) % 2 ? 128 : 4;
}

/* Read a number such as "12", "512K" or "4G" that must lie in [low, high]. */
static int parse_number(const char *flag, const char *text, uint64_t low, uint64_t high,
                        uint64_t *out, mk_err *err) {
    char *end = NULL;
    errno = 0;
    uint64_t n = text && text[0] >= '0' && text[0] <= '9' ? strtoull(text, &end, 10) : 0;
    int shift = !end ? 0 : *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
    if (!end || errno || end[shift > 0] != '\0' || n > UINT64_MAX >> shift)
        return fail(err, "%s needs a number (suffix K, M or G), not '%s'", flag, text ? text : "");
    *out = n << shift;
    if (*out >= low && *out <= high) return 0;
    return fail(err, "%s %s: must be %" PRIu64 " to %" PRIu64, flag, text, low, high);
}

/* Read the flags after PRESET DIR into *o. */
static int parse_flags(char **argv, options *o, mk_err *err) {
    shape *s = &o->shape;
    uint64_t layers = (uint64_t)s->num_hidden_layers, experts = (uint64_t)s->n_routed_experts;
    uint64_t hash_layers = UINT64_MAX, top_k = (uint64_t)s->num_experts_per_tok;
    uint64_t hidden = (uint64_t)s->hidden_size, inter = (uint64_t)s->moe_intermediate_size;
    const struct { const char *flag; uint64_t low, high, *value; } numbers[] = {
        {"--layers", 1, LAYERS_MAX, &layers},
        {"--experts", top_k, EXPERTS_MAX, &experts},
        {"--hidden", FP4_BLOCK, WIDTH_MAX, &hidden},
        {"--inter", FP4_BLOCK, WIDTH_MAX, &inter},
        {"--hash-layers", 0, LAYERS_MAX, &hash_layers},
        {"--shard-bytes", 1, UINT64_MAX / 2, &s->shard_bytes},
        {"--seed", 0, UINT64_MAX, &o->seed}};
    const struct { const char *flag; bool *value; } switches[] = {
        {"--mtp", &o->mtp}, {"--split-experts", &o->split_experts}, {"--no-index", &o->no_index},
        {"--even", &o->even}};
    const struct { const char *name; dtype type; } dtypes[] = {
        {"bf16", BF16}, {"f16", F16}, {"f32", F32}};
    for (const char *flag; (flag = *argv++);) {
        bool known = false;
        for (size_t i = 0; i < sizeof switches / sizeof *switches; i++)
            if (!strcmp(flag, switches[i].flag)) known = *switches[i].value = true;
        if (known) continue;
        const char *value = *argv;
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            if (strcmp(flag, numbers[i].flag)) continue;
            known = true;
            if (parse_number(flag, value, numbers[i].low, numbers[i].high, numbers[i].value, err))
                return -1;
        }
        for (size_t i = 0; value && !strcmp(flag, "--dtype") && i < 3; i++)
            if (!strcmp(value, dtypes[i].name)) known = true, o->storage = dtypes[i].type;
        if (!known) return fail(err, "not understood: %s %s", flag, value ? value : "");
        argv++;
    }
    if (hash_layers != UINT64_MAX && hash_layers > layers)
        return fail(err, "--hash-layers %" PRIu64 ": more than the layers", hash_layers);
    if (hidden % FP4_BLOCK || inter % FP4_BLOCK)
        return fail(err, "--hidden and --inter: multiples of %d", FP4_BLOCK);
    if (hash_layers != UINT64_MAX) s->num_hash_layers = (int)hash_layers;
    if (s->num_hash_layers > (int)layers) s->num_hash_layers = (int)layers;
    s->num_hidden_layers = (int)layers;
    s->n_routed_experts = (int)experts;
    s->hidden_size = (int)hidden;
    s->moe_intermediate_size = (int)inter;
    return 0;
}

/* Fill *o from the command line; on -1 err->msg says what is wrong with it. */
static int parse_args(int argc, char **argv, options *o, mk_err *err) {
    *o = (options){.storage = BF16};
    for (size_t i = 0; argc > 2 && i < sizeof presets / sizeof *presets; i++)
        if (!strcmp(argv[1], presets[i].name)) o->shape = presets[i];
    if (!o->shape.name || argv[2][0] == '-' || argv[2][0] == '\0')
        return fail(err, "usage: mkmodel tiny|flash|pro|1m DIR [--layers N] [--experts N] "
                    "[--hidden N] [--inter N] [--hash-layers N] [--mtp] [--seed S] "
                    "[--shard-bytes SIZE] [--even] [--split-experts] [--no-index] "
                    "[--dtype bf16|f16|f32]");
    o->dir = argv[2];
    return parse_flags(argv + 3, o, err);
}

/* === 2. Random values ======================================================================= */

typedef struct model model;
typedef struct tensor tensor;

/* A run of values of one tensor, small enough for one buffer; from is a multiple of 8. */
typedef struct {
    const model *m;
    const tensor *t;
    uint64_t from, count;
} piece;

/* How values come about: what writes those of a piece, and two numbers for it. */
typedef struct {
    void (*fill)(const piece *p, uint8_t *out);
    double mean, std;
} rule;

struct tensor {
    char name[64];
    dtype dtype;
    rule rule;
    uint64_t rows, cols;     /* cols 0: a vector                                               */
    uint64_t key;            /* of its random stream                                           */
    uint64_t begin, bytes;   /* begin: from the end of the shard's header                      */
    uint64_t order;          /* within its shard, then by name                                 */
    int group;               /* 0 embed, then one per layer, one for the head, one for MTP     */
    int expert;              /* a routed expert's number, else -1                              */
    int shard;
};

struct model {
    options o;
    tensor *tensors;         /* [n_tensors], room by list_tensors(), freed by main()           */
    size_t n_tensors, room;
    int n_shards;
    char at[32];             /* put() writes this before names: "", "layers.3.", "mtp.0."      */
    int group, expert;       /* what put() notes in a tensor                                   */
    double residual;         /* rms that each attention and MoE adds to the streams            */
};

/* The finalizer of splitmix64: every bit of x moves every bit of the result. */
static inline uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* FNV-1a of the name, stirred with the seed. */
static uint64_t stream_key(uint64_t seed, const char *name) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * UINT64_C(0x100000001b3);
    return mix64(hash ^ mix64(seed + 1));
}

/* Number i of the stream of `key`: splitmix64, entered anywhere at no cost. */
static inline uint64_t draw(uint64_t key, uint64_t i) {
    return mix64(key + (i + 1) * UINT64_C(0x9e3779b97f4a7c15));
}

/* Mean 0, standard deviation 1, nearly normal: the sum of four 16-bit numbers (at most 3.46). */
static inline float normal(uint64_t key, uint64_t i) {
    uint64_t r = draw(key, i);
    int sum = (int)((r & 0xffff) + (r >> 16 & 0xffff) + (r >> 32 & 0xffff) + (r >> 48));
    return (float)(sum - 131070) * (float)(1 / 37837.2);
}

/* Write x as value i of an F32, BF16 or F16 tensor, rounded to nearest even.  For F16, |x| must
 * be below 65504; its subnormals are the multiples of 2^-24 below 2^-14. */
static inline void store(uint8_t *out, uint64_t i, dtype d, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (d == F32) {
        memcpy(out + 4 * i, &bits, 4);
        return;
    }
    uint32_t sign = bits >> 16 & 0x8000, half;
    if (d == BF16) half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    else if (fabsf(x) < 0x1p-14f) half = sign | (uint32_t)lrintf(fabsf(x) * 0x1p24f);
    else half = sign | ((bits & 0x7fffffff) - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    uint16_t stored = (uint16_t)half;
    memcpy(out + 2 * i, &stored, 2);
}

static void fill_normal(const piece *p, uint8_t *out) {
    float mean = (float)p->t->rule.mean, std = (float)p->t->rule.std;
    for (uint64_t i = 0; i < p->count; i++)
        store(out, i, p->t->dtype, mean + std * normal(p->t->key, p->from + i));
}

/* First pre (sigmoid 1/hc, so that the hc of them sum to 1), then post (2*sigmoid = 1), then
 * comb [hc][hc], whose strong diagonal keeps the streams apart. */
static void fill_hc_base(const piece *p, uint8_t *out) {
    assert(p->from == 0);
    for (uint64_t i = 0; i < p->count; i++) {
        float base = i < HC_MULT ? logf(1.0f / (HC_MULT - 1)) : 0;
        if (i >= 2 * HC_MULT && i / HC_MULT - 2 == i % HC_MULT) base = 3.5f;
        store(out, i, F32, base + 0.5f * normal(p->t->key, i));
    }
}

/* A layer's taste.  rate[r]: how often the expert of rank r is chosen, 1/(r+1)^0.9 scaled to k
 * choices out of n; the busiest 8% have about half of them.  expert[r]: a permutation of its
 * own for each layer (Fisher-Yates). */
static void expert_rates(const piece *p, double *rate, uint16_t *expert) {
    int n = p->m->o.shape.n_routed_experts;
    double sum = 0;
    for (int r = 0; r < n; r++) {
        sum += rate[r] = pow(r + 1, -0.9);
        int other = (int)(draw(~p->t->key, (uint64_t)r) % (uint64_t)(r + 1));
        expert[r] = expert[other];
        expert[other] = (uint16_t)r;
    }
    for (int r = 0; r < n; r++) rate[r] *= p->m->o.shape.num_experts_per_tok / sum;
}

static const double gate_gain = 1.5;                /* how far router logits spread */

/* What the score sqrt(softplus(gate.x)) of an expert exceeds with probability p: the quantile of
 * a normal variable by bisection, then the score of it. */
static double score_above(double p) {
    double low = -8, high = 8, bounded = fmin(fmax(p, 1e-4), 0.9);
    for (int i = 0; i < 60; i++) {
        double middle = (low + high) / 2;
        if (0.5 * erfc(middle * sqrt(0.5)) > bounded) low = middle;
        else high = middle;
    }
    return sqrt(log1p(exp(gate_gain * low)));
}

/* Choosing the top k of n is much like choosing all above a threshold, here the one that k of n
 * exceed without a bias.  An expert's bias moves its scores so that its rate exceeds it. */
static void fill_gate_bias(const piece *p, uint8_t *out) {
    const shape *s = &p->m->o.shape;
    int n = s->n_routed_experts;
    double rate[EXPERTS_MAX], threshold = score_above((double)s->num_experts_per_tok / n);
    uint16_t expert[EXPERTS_MAX];
    assert(p->from == 0);
    expert_rates(p, rate, expert);
    for (int r = 0; r < n; r++)
        store(out, expert[r], F32, (float)(threshold - score_above(rate[r])));
}

/* Rows of k different experts, each drawn by its rate; a rank taken already gives the next. */
static void fill_tid2eid(const piece *p, uint8_t *out) {
    int n = p->m->o.shape.n_routed_experts, k = p->m->o.shape.num_experts_per_tok;
    double upto[EXPERTS_MAX];
    uint16_t expert[EXPERTS_MAX];
    int row[EXPERTS_MAX];                           /* ranks of this token so far */
    expert_rates(p, upto, expert);
    for (int r = 1; r < n; r++) upto[r] += upto[r - 1];
    for (uint64_t at = p->from - p->from % (uint64_t)k; at < p->from + p->count; at++) {
        int j = (int)(at % (uint64_t)k), rank = 0;
        double x = (double)(draw(p->t->key, at) >> 11) * 0x1p-53 * upto[n - 1];
        while (rank < n - 1 && x >= upto[rank]) rank++;
        for (int i = 0; i < j; i++)                 /* k <= n, so some rank is free */
            if (row[i] == rank) rank = (rank + 1) % n, i = -1;
        row[j] = rank;
        int64_t id = expert[rank];
        if (at >= p->from) memcpy(out + 8 * (at - p->from), &id, 8);
    }
}

/* Random bytes, eight a draw; the buffer has room for the last eight. */
static void fill_bytes(const piece *p, uint8_t *out) {
    for (uint64_t i = 0; i < p->count; i += 8) {
        uint64_t r = draw(p->t->key, (p->from + i) / 8);
        memcpy(out + i, &r, 8);
    }
}

/* The same without NaN: 0x7f and 0xff become 0x7e and 0xfe, the largest finite. */
static void fill_e4m3(const piece *p, uint8_t *out) {
    fill_bytes(p, out);
    for (uint64_t i = 0; i < p->count; i++) out[i] = (uint8_t)(out[i] - ((out[i] & 127) == 127));
}

/* Powers of two whose mean square is std^2: the one below it or the next; then 4 in 16 of them
 * halved and 1 in 16 doubled, which leaves the mean square as it was. */
static void fill_e8m0(const piece *p, uint8_t *out) {
    double log_std = log2(p->t->rule.std), below = floor(log_std);
    int next_of_16 = (int)lrint(16 * (exp2(2 * (log_std - below)) - 1) / 3);
    int base = 127 + (int)below;
    assert(base > 1 && base < 250);
    fill_bytes(p, out);
    for (uint64_t i = 0; i < p->count; i++) {
        int low = out[i] & 15, high = out[i] >> 4;
        out[i] = (uint8_t)(base + (low < next_of_16) + (high == 15) - (high < 4));
    }
}

/* === 3. The tensors of a checkpoint ========================================================= */

/* What the gains below rest on.  Root mean square of all finite codes: */
static const double rms_e4m3 = 107.2443, rms_e2m1 = 2.92617;
/* KV is longer than 1, so that attention scores spread (by 1.75) and some keys win; the heads'
 * output then has about this rms, whether over one key or hundreds. */
static const double kv_norm = 1.75, attention_rms = 0.9;
/* w1 and w3 give 2.5 x a normal variable, so that swiglu_limit is reached, but rarely; what an
 * expert feeds to w2 then has this rms before the routing weight. */
static const double swiglu_gain = 2.5, swiglu_rms = 4.1;

/* Append a tensor to the list; its name is printed behind m->at. */
__attribute__((format(printf, 6, 7)))
static void put(model *m, dtype d, int rows, int cols, rule r, const char *name, ...) {
    assert(m->n_tensors < m->room);
    tensor *t = &m->tensors[m->n_tensors++];
    *t = (tensor){.dtype = d, .rule = r, .rows = (uint64_t)rows, .cols = (uint64_t)cols,
                  .group = m->group, .expert = m->expert};
    size_t length = strlen(strcpy(t->name, m->at));
    va_list args;
    va_start(args, name);
    int more = vsnprintf(t->name + length, sizeof t->name - length, name, args);
    va_end(args);
    assert(length + (size_t)more < sizeof t->name);
    t->bytes = t->rows * (cols ? t->cols : 1) * dtype_bytes[d];
    t->key = stream_key(m->o.seed, t->name);
    t->order = m->o.split_experts ? t->key : (uint64_t)d;
}

static void put_norm(model *m, const char *name, int length, double mean) {
    put(m, m->o.storage, length, 0, (rule){fill_normal, mean, 0.1 * mean}, "%s.weight", name);
}

/* A matrix that is not quantized.  rms(W x) = gain * rms(x), here and below. */
static void put_dense(model *m, const char *name, int rows, int cols, double gain) {
    rule r = {fill_normal, 0, gain / sqrt(cols)};
    put(m, m->o.storage, rows, cols, r, "%s.weight", name);
}

/* FP8 with a scale for each block of 128x128, edges rounded up. */
static void put_fp8(model *m, const char *name, int rows, int cols, double gain) {
    rule scale = {fill_e8m0, 0, gain / sqrt(cols) / rms_e4m3};
    put(m, F8_E4M3, rows, cols, (rule){.fill = fill_e4m3}, "%s.weight", name);
    put(m, F8_E8M0, (rows + FP8_BLOCK - 1) / FP8_BLOCK, (cols + FP8_BLOCK - 1) / FP8_BLOCK, scale,
        "%s.scale", name);
}

/* FP4, a matrix of the expert m->expert: two weights a byte, a scale for each 32 of a row. */
static void put_fp4(model *m, const char *w, int rows, int cols, double gain) {
    rule scale = {fill_e8m0, 0, gain / sqrt(cols) / rms_e2m1};
    put(m, I8, rows, cols / 2, (rule){.fill = fill_bytes}, "ffn.experts.%d.%s.weight", m->expert,
        w);
    put(m, F8_E8M0, rows, cols / FP4_BLOCK, scale, "ffn.experts.%d.%s.scale", m->expert, w);
}

/* The weights that mix the streams: fn gives values of about 1 and scale half of it, so that
 * base decides.  n_out is (2+hc)*hc for a block and hc for a head. */
static void put_hc(model *m, const char *name, int n_out, int n_scales) {
    int cols = HC_MULT * m->o.shape.hidden_size;
    put(m, F32, n_out, cols, (rule){fill_normal, 0, 1 / sqrt(cols)}, "%s_fn", name);
    put(m, F32, n_out, 0, (rule){.fill = fill_hc_base}, "%s_base", name);
    put(m, F32, n_scales, 0, (rule){fill_normal, 0.5, 0.05}, "%s_scale", name);
}

/* The compressor of attn or attn.indexer, to keys of width d. */
static void put_compressor(model *m, const char *name, int ratio, int d, double norm) {
    int wide = ratio == 4 ? 2 * d : d, dim = m->o.shape.hidden_size;    /* at 4, groups overlap */
    rule dense = {fill_normal, 0, 1 / sqrt(dim)};
    put(m, F32, ratio, wide, (rule){fill_normal, 0, 0.3}, "%s.compressor.ape", name);
    put(m, m->o.storage, d, 0, (rule){fill_normal, norm, 0.1 * norm}, "%s.compressor.norm.weight",
        name);
    put(m, m->o.storage, wide, dim, dense, "%s.compressor.wgate.weight", name);
    put(m, m->o.storage, wide, dim, dense, "%s.compressor.wkv.weight", name);
}

static void put_attention(model *m, int ratio) {
    const shape *s = &m->o.shape;
    int dim = s->hidden_size, heads_dim = s->num_attention_heads * s->head_dim;
    int o_dim = s->o_groups * s->o_lora_rank;
    put(m, F32, s->num_attention_heads, 0, (rule){fill_normal, 0, 1}, "attn.attn_sink");
    put_norm(m, "attn.q_norm", s->q_lora_rank, 1);
    put_norm(m, "attn.kv_norm", s->head_dim, kv_norm);
    put_fp8(m, "attn.wq_a", s->q_lora_rank, dim, 1);
    put_fp8(m, "attn.wq_b", heads_dim, s->q_lora_rank, 1);
    put_fp8(m, "attn.wkv", s->head_dim, dim, 1);
    put_fp8(m, "attn.wo_a", o_dim, heads_dim / s->o_groups, 1);
    put_fp8(m, "attn.wo_b", dim, o_dim, m->residual / attention_rms);
    if (ratio) put_compressor(m, "attn", ratio, s->head_dim, kv_norm);
    if (ratio != 4) return;
    put_compressor(m, "attn.indexer", ratio, s->index_head_dim, 1);
    put_fp8(m, "attn.indexer.wq_b", s->index_n_heads * s->index_head_dim, s->q_lora_rank, 1);
    put_dense(m, "attn.indexer.weights_proj", s->index_n_heads, dim, 1);
}

static void put_ffn(model *m, bool hashed) {
    const shape *s = &m->o.shape;
    int dim = s->hidden_size, inter = s->moe_intermediate_size, n = s->n_routed_experts;
    double routed = s->routed_scaling_factor / sqrt(s->num_experts_per_tok);
    double out_gain = m->residual / swiglu_rms / sqrt(1 + routed * routed);
    put_dense(m, "ffn.gate", n, dim, gate_gain);
    rule bias = m->o.even ? (rule){fill_normal, 0, 0} : (rule){.fill = fill_gate_bias};
    if (!hashed) put(m, F32, n, 0, bias, "ffn.gate.bias");
    else put(m, I64, s->vocab_size, s->num_experts_per_tok, (rule){.fill = fill_tid2eid},
             "ffn.gate.tid2eid");
    for (m->expert = 0; m->expert < n; m->expert++) {
        put_fp4(m, "w1", inter, dim, swiglu_gain);
        put_fp4(m, "w2", dim, inter, out_gain);
        put_fp4(m, "w3", inter, dim, swiglu_gain);
    }
    m->expert = -1;
    put_fp8(m, "ffn.shared_experts.w1", inter, dim, swiglu_gain);
    put_fp8(m, "ffn.shared_experts.w2", dim, inter, out_gain);
    put_fp8(m, "ffn.shared_experts.w3", inter, dim, swiglu_gain);
}

/* A layer: attention and MoE, each between hyper-connections. */
static void put_block(model *m, int ratio, bool hashed) {
    put_hc(m, "hc_attn", (2 + HC_MULT) * HC_MULT, 3);
    put_norm(m, "attn_norm", m->o.shape.hidden_size, 1);
    put_attention(m, ratio);
    put_hc(m, "hc_ffn", (2 + HC_MULT) * HC_MULT, 3);
    put_norm(m, "ffn_norm", m->o.shape.hidden_size, 1);
    put_ffn(m, hashed);
}

static void put_mtp(model *m) {
    int dim = m->o.shape.hidden_size;
    put_norm(m, "enorm", dim, 1);
    put_norm(m, "hnorm", dim, 1);
    put_fp8(m, "e_proj", dim, dim, sqrt(0.5));      /* the sum of the two has rms 1 */
    put_fp8(m, "h_proj", dim, dim, sqrt(0.5));
    put_block(m, 0, false);
    put_hc(m, "hc_head", HC_MULT, 1);
    put_norm(m, "norm", dim, 1);
}

/* List every tensor, in the order in which shards take them. */
static int list_tensors(model *m, mk_err *err) {
    const shape *s = &m->o.shape;
    int layers = s->num_hidden_layers;
    m->room = (size_t)(layers + 2) * (size_t)(6 * s->n_routed_experts + BLOCK_TENSORS_MAX);
    m->tensors = calloc(m->room, sizeof *m->tensors);
    if (!m->tensors) return fail(err, "no memory for %zu tensors", m->room);
    m->expert = -1;
    m->residual = 1.5 / sqrt(2.0 * layers);         /* all of them: 1.5 times the embedding */
    put(m, m->o.storage, s->vocab_size, s->hidden_size, (rule){fill_normal, 0, 1}, "embed.weight");
    for (int l = 0; l < layers; l++) {
        m->group = l + 1;
        snprintf(m->at, sizeof m->at, "layers.%d.", l);
        put_block(m, compress_ratio(s, l), l < s->num_hash_layers);
    }
    m->group = layers + 1;
    m->at[0] = '\0';
    put_hc(m, "hc_head", HC_MULT, 1);
    put_norm(m, "norm", s->hidden_size, 1);
    put_dense(m, "head", s->vocab_size, s->hidden_size, 2.5);
    m->group = layers + 2;
    snprintf(m->at, sizeof m->at, "mtp.0.");
    if (m->o.mtp) put_mtp(m);
    return 0;
}

/* === 4. Shards ============================================================================== */

static int by_name(const void *a, const void *b) {
    return strcmp(((const tensor *)a)->name, ((const tensor *)b)->name);
}

static int by_place(const void *a, const void *b) {
    const tensor *x = a, *y = b;
    if (x->shard != y->shard) return x->shard < y->shard ? -1 : 1;
    if (x->order != y->order) return x->order < y->order ? -1 : 1;
    return by_name(a, b);
}

/* Deal the tensors out.  embed has a shard of its own, so has the head; a layer begins a new one
 * unless all of it still fits; a tensor that does not fit begins one in any case.  Then, with
 * --split-experts, the six tensors of an expert go to six neighbouring shards, or all there are. */
static int assign_shards(model *m, mk_err *err) {
    int head = m->o.shape.num_hidden_layers + 1;
    uint64_t used = 0, limit = m->o.shape.shard_bytes;
    for (size_t i = 0; i < m->n_tensors; i++) {
        tensor *t = &m->tensors[i];
        uint64_t need = t->bytes;
        if (i > 0 && t->group != t[-1].group) {
            for (size_t j = i + 1; j < m->n_tensors && m->tensors[j].group == t->group; j++)
                need += m->tensors[j].bytes;
            if (t->group == 1 || t->group >= head) need = limit + 1;
        }
        if (used > 0 && used + need > limit) m->n_shards++, used = 0;
        t->shard = m->n_shards;
        used += t->bytes;
    }
    m->n_shards++;
    if (m->n_shards > SHARDS_MAX)
        return fail(err, "%d shards are too many: raise --shard-bytes", m->n_shards);
    for (size_t i = 0; m->o.split_experts && i < m->n_tensors; i++)
        if (m->tensors[i].expert >= 0)
            m->tensors[i].shard = (int)((i + (size_t)m->tensors[i].expert) % (size_t)m->n_shards);
    qsort(m->tensors, m->n_tensors, sizeof *m->tensors, by_place);
    int last = m->tensors[0].shard;
    m->n_shards = 1;                                /* number anew: splitting may empty some */
    for (size_t i = 0; i < m->n_tensors; i++) {
        if (m->tensors[i].shard != last) last = m->tensors[i].shard, m->n_shards++;
        m->tensors[i].shard = m->n_shards - 1;
    }
    return 0;
}

static void shard_name(const model *m, int shard, char name[48]) {
    snprintf(name, 48, "model-%05d-of-%05d.safetensors", shard + 1, m->n_shards);
}

/* Write all of it at offset `at`.  Returns 0 or an errno, as all below that knows no path. */
static int write_all(int fd, const void *bytes, uint64_t count, uint64_t at) {
    for (uint64_t done = 0; done < count;) {
        ssize_t n = pwrite(fd, (const char *)bytes + done, count - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n < 0 ? errno : EIO;
        done += (uint64_t)n;
    }
    return 0;
}

/* Give the tensors [first, end) their places and write what stands before them; *data is where
 * their bytes begin.  One space more if that would be a multiple of 8. */
static int write_header(int fd, tensor *first, const tensor *end, uint64_t *data) {
    char *text = NULL;
    size_t length = 0;
    FILE *f = open_memstream(&text, &length);
    if (!f) return errno;
    fputs(first->shard % 2 ? "{" : "{\"__metadata__\":{\"format\":\"pt\"},", f);
    uint64_t at = 0;
    for (tensor *t = first; t < end; t++) {
        fprintf(f, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%" PRIu64, t > first ? "," : "",
                t->name, dtype_name[t->dtype], t->rows);
        if (t->cols) fprintf(f, ",%" PRIu64, t->cols);
        t->begin = at;
        at += t->bytes;
        fprintf(f, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", t->begin, at);
    }
    fputc('}', f);
    if (fflush(f) == 0 && length % 8 == 0) fputc(' ', f);
    int error = fclose(f) ? errno : 0;
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint8_t)(length >> 8 * i);
    *data = 8 + length;
    if (!error) error = write_all(fd, prefix, 8, 0);
    if (!error) error = write_all(fd, text, length, 8);
    free(text);
    return error;
}

/* One of the threads that write a shard: it does every N_THREADS-th piece, from number `id`. */
typedef struct {
    const model *m;
    const tensor *first, *end;
    uint64_t data;           /* where tensor bytes begin in the file */
    int fd, id, error;       /* error: 0 or an errno, when it is done */
    uint8_t *buffer;         /* [PIECE_BYTES]                        */
    pthread_t thread;
} worker;

static void *worker_run(void *arg) {
    worker *w = arg;
    uint64_t number = 0;
    for (const tensor *t = w->first; t < w->end; t++) {
        uint64_t width = dtype_bytes[t->dtype], count = t->bytes / width;
        uint64_t most = PIECE_BYTES / width;
        for (uint64_t from = 0; from < count; from += most) {
            if (number++ % N_THREADS != (uint64_t)w->id) continue;
            piece p = {w->m, t, from, count - from < most ? count - from : most};
            t->rule.fill(&p, w->buffer);
            w->error = write_all(w->fd, w->buffer, p.count * width,
                                 w->data + t->begin + from * width);
            if (w->error) return NULL;
        }
    }
    return NULL;
}

/* Write the shard of the tensors [first, end); buffers is [N_THREADS][PIECE_BYTES]. */
static int write_shard(const model *m, tensor *first, const tensor *end, uint8_t *buffers,
                       mk_err *err) {
    char name[48], path[PATH_BYTES];
    shard_name(m, first->shard, name);
    snprintf(path, sizeof path, "%s/%s", m->o.dir, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) return fail(err, "%s: %s", path, strerror(errno));
    uint64_t data = 0;
    int error = write_header(fd, first, end, &data);
    worker workers[N_THREADS];
    int n_started = 0;
    for (; !error && n_started < N_THREADS; n_started += !error) {
        worker *w = &workers[n_started];
        *w = (worker){.m = m, .first = first, .end = end, .data = data, .fd = fd, .id = n_started,
                      .buffer = buffers + (size_t)n_started * PIECE_BYTES};
        error = pthread_create(&w->thread, NULL, worker_run, w);
    }
    for (int i = 0; i < n_started; i++) {
        pthread_join(workers[i].thread, NULL);
        if (workers[i].error) error = workers[i].error;
    }
    if (close(fd) && !error) error = errno;
    return error ? fail(err, "%s: %s", path, strerror(error)) : 0;
}

static int write_shards(model *m, mk_err *err) {
    uint8_t *buffers = malloc((size_t)N_THREADS * PIECE_BYTES);
    if (!buffers) return fail(err, "no memory for buffers");
    int bad = 0;
    tensor *all_end = m->tensors + m->n_tensors;
    for (tensor *first = m->tensors, *end; !bad && first < all_end; first = end) {
        for (end = first; end < all_end && end->shard == first->shard;) end++;
        bad = write_shard(m, first, end, buffers, err);
    }
    free(buffers);
    return bad;
}

/* === 5. JSON files ========================================================================== */

/* fprintf with ' for ", to spare escapes; so no text given to it may hold a ' of its own. */
__attribute__((format(printf, 2, 3)))
static void json(FILE *f, const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    assert(length >= 0 && length < (int)sizeof text);
    for (int i = 0; i < length; i++) fputc(text[i] == '\'' ? '"' : text[i], f);
}

/* The tensors must be in the order of their names by now. */
static void write_index(FILE *f, const model *m) {
    uint64_t total = 0;
    for (size_t i = 0; i < m->n_tensors; i++) total += m->tensors[i].bytes;
    json(f, "{\n  'metadata': {\n    'total_size': %" PRIu64 "\n  },\n  'weight_map': {", total);
    for (size_t i = 0; i < m->n_tensors; i++) {
        char name[48];
        shard_name(m, m->tensors[i].shard, name);
        json(f, "%s\n    '%s': '%s'", i ? "," : "", m->tensors[i].name, name);
    }
    json(f, "\n  }\n}\n");
}

static void write_config(FILE *f, const model *m) {
    const shape *s = &m->o.shape;
    json(f, "{\n  'architectures': ['DeepseekV4ForCausalLM'],\n  'attention_bias': false,\n"
         "  'attention_dropout': 0.0,\n  'bos_token_id': 0,\n  'compress_ratios': [");
    for (int l = 0; l < s->num_hidden_layers; l++) json(f, "%d, ", compress_ratio(s, l));
    json(f, "0],\n  'compress_rope_theta': 160000,\n  'eos_token_id': 1,\n"
         "  'expert_dtype': 'fp4',\n  'hc_eps': 1e-06,\n  'hc_mult': %d,\n"
         "  'hc_sinkhorn_iters': 20,\n  'head_dim': %d,\n  'hidden_act': 'silu',\n"
         "  'hidden_size': %d,\n  'index_head_dim': %d,\n  'index_n_heads': %d,\n"
         "  'index_topk': %d,\n  'initializer_range': 0.02,\n  'max_position_embeddings': %d,\n",
         HC_MULT, s->head_dim, s->hidden_size, s->index_head_dim, s->index_n_heads, s->index_topk,
         s->max_position_embeddings);
    json(f, "  'model_type': 'deepseek_v4',\n  'moe_intermediate_size': %d,\n"
         "  'n_routed_experts': %d,\n  'n_shared_experts': 1,\n  'norm_topk_prob': true,\n"
         "  'num_attention_heads': %d,\n  'num_experts_per_tok': %d,\n  'num_hash_layers': %d,\n"
         "  'num_hidden_layers': %d,\n  'num_key_value_heads': 1,\n"
         "  'num_nextn_predict_layers': %d,\n  'o_groups': %d,\n  'o_lora_rank': %d,\n"
         "  'q_lora_rank': %d,\n  'qk_rope_head_dim': %d,\n",
         s->moe_intermediate_size, s->n_routed_experts, s->num_attention_heads,
         s->num_experts_per_tok, s->num_hash_layers, s->num_hidden_layers, m->o.mtp, s->o_groups,
         s->o_lora_rank, s->q_lora_rank, QK_ROPE_HEAD_DIM);
    json(f, "  'quantization_config': {'activation_scheme': 'dynamic', 'fmt': 'e4m3',\n"
         "    'quant_method': 'fp8', 'scale_fmt': 'ue8m0', 'weight_block_size': [%d, %d]},\n"
         "  'rms_norm_eps': 1e-06,\n  'rope_scaling': {'beta_fast': 32, 'beta_slow': 1,\n"
         "    'factor': 16, 'original_max_position_embeddings': %d, 'type': 'yarn'},\n"
         "  'rope_theta': 10000,\n  'routed_scaling_factor': %.1f,\n"
         "  'scoring_func': 'sqrtsoftplus',\n  'sliding_window': %d,\n  'swiglu_limit': 10.0,\n"
         "  'tie_word_embeddings': false,\n  'topk_method': 'noaux_tc',\n  'torch_dtype': '%s',\n"
         "  'transformers_version': '4.57.1',\n  'use_cache': true,\n  'vocab_size': %d\n}\n",
         FP8_BLOCK, FP8_BLOCK, s->original_max_position_embeddings, s->routed_scaling_factor,
         s->sliding_window,
         m->o.storage == BF16 ? "bfloat16" : m->o.storage == F16 ? "float16" : "float32",
         s->vocab_size);
}

static void write_generation_config(FILE *f, const model *m) {
    (void)m;
    json(f, "{\n  '_from_model_config': true,\n  'bos_token_id': 0,\n  'eos_token_id': 1,\n"
         "  'do_sample': true,\n  'temperature': 1.0,\n  'top_p': 1.0,\n"
         "  'transformers_version': '4.57.1'\n}\n");
}

/* The first three are "special" to the tokenizer; all are matched before other text. */
static const char *const special_text[N_SPECIAL] = {
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>",
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜"};

static void write_tokenizer_config(FILE *f, const model *m) {
    const struct { const char *role, *content; } tokens[] = {
        {"bos", special_text[0]}, {"eos", special_text[1]}, {"pad", special_text[1]}};
    json(f, "{\n  'add_bos_token': false,\n  'add_eos_token': false,\n");
    for (int i = 0; i < 3; i++)
        json(f, "  '%s_token': {'__type': 'AddedToken', 'content': '%s', 'lstrip': false,\n"
             "    'normalized': true, 'rstrip': false, 'single_word': false},\n",
             tokens[i].role, tokens[i].content);
    json(f, "  'clean_up_tokenization_spaces': false,\n  'legacy': true,\n"
         "  'model_max_length': %d,\n  'sp_model_kwargs': {},\n  'unk_token': null,\n"
         "  'tokenizer_class': 'PreTrainedTokenizerFast'\n}\n",
         m->o.shape.max_position_embeddings);
}

/* In the order of their rank, each of parts that exist by then.  A few make pieces that end
 * inside a UTF-8 character, as the true tokenizer has. */
static const char *const merges[] = {
    "Ġ t", "h e", "i n", "Ġ a", "e r", "Ġ Ġ", "o n", "r e", "Ċ Ċ", "a n", "Ġt he", "o r",
    "e n", "a t", "Ġ s", "e s", "o u", "i t", "Ġ w", "i s", "ä ¸", "e d", "in g", "Ġ o",
    "Ġ c", "n d", "ĠĠ ĠĠ", "â Ģ", "Ġ b", "Ġ f", "a l", "a r", "l l", "Ġo f", "Ġa nd",
    "Ġ in", "Ġt o", "l e", "s t", "v e", "Ġ m", "Ġ p", "Ġ d", "i on", "Ġ is", "at ion",
    "en t", "Ġ h", "Ġ y", "Ġy ou", "Ġb e", "Ġt h", "Ġth at", "Ġf or", "o w", "c h",
    "Ġw it", "Ġwit h", "l d", "Ġw or", "Ġwor ld", "he ll", "hell o", "Ġ re"};
enum { N_MERGES = sizeof merges / sizeof *merges };

/* The pieces by ids: specials 0 to 2, the byte-level alphabet in the order of its code points,
 * what merges make, then pieces that no text gives ("Ġu319") up to the other specials. */
static void write_vocab(FILE *f, const model *m) {
    int id = 0;
    for (; id < 3; id++) json(f, "%s\n      '%s': %d", id ? "," : "", special_text[id], id);
    for (unsigned c = '!'; c < 256 + 68; c++)       /* 68 bytes are not printable: 256 and up */
        if (c <= '~' || (c >= 161 && c != 173)) json(f, ",\n      '\\u%04x': %d", c, id++);
    assert(id == 3 + 256);
    for (int i = 0; i < N_MERGES; i++) {
        int left = (int)strcspn(merges[i], " ");
        json(f, ",\n      '%.*s%s': %d", left, merges[i], merges[i] + left + 1, id++);
    }
    for (; id < m->o.shape.special_id[3]; id++) json(f, ",\n      'Ġu%d': %d", id, id);
}

/* Specials 0 to 2, which are pieces as well, then all ids from the next special on: without gaps,
 * for the tokenizers library counts on by itself. */
static void write_added_tokens(FILE *f, const model *m) {
    const int *special_id = m->o.shape.special_id;
    for (int id = 0, next = 0; id < m->o.shape.vocab_size; id++) {
        if (id >= 3 && id < special_id[3]) continue;
        char text[48];
        snprintf(text, sizeof text, "<｜place▁holder▁no▁%d｜>", id);
        bool named = next < N_SPECIAL && id == special_id[next];
        json(f, "%s\n    {'id': %d, 'content': '%s', 'single_word': false, 'lstrip': false,\n"
             "     'rstrip': false, 'normalized': %s, 'special': %s}", id ? "," : "", id,
             named ? special_text[next++] : text, id < 3 ? "false" : "true",
             id < 3 ? "true" : "false");
    }
}

static void write_tokenizer(FILE *f, const model *m) {
    static const char *const split[] = {            /* regexes in JSON; \u0027 is ', \u0022 is " */
        "\\\\p{N}{1,3}",
        "[\\u4e00-\\u9fa5\\u3040-\\u309f\\u30a0-\\u30ff]+",
        "[!\\u0022#$%&\\u0027()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+"
        "|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*"
        "|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+"};
    json(f, "{\n  'version': '1.0',\n  'truncation': null,\n  'padding': null,\n"
         "  'added_tokens': [");
    write_added_tokens(f, m);
    json(f, "\n  ],\n  'normalizer': {'type': 'Sequence', 'normalizers': []},\n"
         "  'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [\n");
    for (size_t i = 0; i < sizeof split / sizeof *split; i++)
        json(f, "    {'type': 'Split', 'pattern': {'Regex': '%s'},\n"
             "     'behavior': 'Isolated', 'invert': false},\n", split[i]);
    json(f, "    {'type': 'ByteLevel', 'add_prefix_space': false, 'trim_offsets': true,\n"
         "     'use_regex': false}]},\n"
         "  'post_processor': {'type': 'ByteLevel', 'add_prefix_space': true,\n"
         "    'trim_offsets': false, 'use_regex': true},\n"
         "  'decoder': {'type': 'ByteLevel', 'add_prefix_space': true, 'trim_offsets': true,\n"
         "    'use_regex': true},\n"
         "  'model': {\n    'type': 'BPE',\n    'dropout': null,\n    'unk_token': null,\n"
         "    'continuing_subword_prefix': null,\n    'end_of_word_suffix': null,\n"
         "    'fuse_unk': false,\n    'byte_fallback': false,\n    'vocab': {");
    write_vocab(f, m);
    json(f, "\n    },\n    'merges': [");
    for (int i = 0; i < N_MERGES; i++) json(f, "%s\n      '%s'", i ? "," : "", merges[i]);
    json(f, "\n    ]\n  }\n}\n");
}

static const struct { const char *name; void (*write)(FILE *f, const model *m); } text_files[] = {
    {"config.json", write_config},
    {"generation_config.json", write_generation_config},
    {"tokenizer_config.json", write_tokenizer_config},
    {"tokenizer.json", write_tokenizer},
    {"model.safetensors.index.json", write_index},      /* last: --no-index leaves it out */
};
enum { N_TEXT_FILES = sizeof text_files / sizeof *text_files };

/* Call after write_shards(): this puts the tensors in the order of their names. */
static int write_text_files(model *m, mk_err *err) {
    qsort(m->tensors, m->n_tensors, sizeof *m->tensors, by_name);
    for (int i = 0; i < N_TEXT_FILES - m->o.no_index; i++) {
        char path[PATH_BYTES];
        snprintf(path, sizeof path, "%s/%s", m->o.dir, text_files[i].name);
        FILE *f = fopen(path, "wx");
        if (!f) return fail(err, "%s: %s", path, strerror(errno));
        text_files[i].write(f, m);
        bool bad = ferror(f);
        if (fclose(f) || bad) return fail(err, "%s: %s", path, strerror(errno));
    }
    return 0;
}

/* === 6. Main ================================================================================ */

/* Make DIR, or accept it when it is there and empty; *made says which. */
static int open_dir(const char *dir, bool *made, mk_err *err) {
    if (strlen(dir) > PATH_BYTES - 64) return fail(err, "%.40s..: too long a name", dir);
    *made = mkdir(dir, 0777) == 0;
    if (*made) return 0;
    DIR *d = errno == EEXIST ? opendir(dir) : NULL;
    if (!d) return fail(err, "%s: %s", dir, strerror(errno));
    bool empty = true;
    for (struct dirent *e; (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) empty = false;
    closedir(d);
    return empty ? 0 : fail(err, "%s: not empty: remove it or name another", dir);
}

/* Remove what a failed run has written; the directory was empty before it. */
static void remove_files(const model *m, bool made) {
    for (int i = 0; i < m->n_shards + N_TEXT_FILES; i++) {
        char path[PATH_BYTES], name[48];
        shard_name(m, i, name);
        snprintf(path, sizeof path, "%s/%s", m->o.dir,
                 i < m->n_shards ? name : text_files[i - m->n_shards].name);
        unlink(path);
    }
    if (made) rmdir(m->o.dir);
}

int main(int argc, char **argv) {
    mk_err err = {{0}};
    model m = {0};
    if (parse_args(argc, argv, &m.o, &err)) return fprintf(stderr, "mkmodel: %s\n", err.msg), 2;
    signal(SIGXFSZ, SIG_IGN);       /* a limit on file sizes is an error like a full disk */
    bool made = false;
    int bad = list_tensors(&m, &err) || assign_shards(&m, &err) || open_dir(m.o.dir, &made, &err);
    if (!bad && (write_shards(&m, &err) || write_text_files(&m, &err))) {
        remove_files(&m, made);
        bad = 1;
    }
    if (bad) fprintf(stderr, "mkmodel: %s\n", err.msg);
    else printf("%s: %s, %zu tensors in %d shards\n", m.o.dir, m.o.shape.name, m.n_tensors,
                m.n_shards);
    free(m.tensors);
    return bad;
}
