/* offload.c -- from files to memory: config.json, shards, reads, caches, the disk.
 *
 *   config.json, generation_config.json --> config_*()      sizes and constants, all checked
 *   *.safetensors headers ----------------> ckpt_open()     table of tensors, in order of name
 *   *.safetensors bytes
 *        |  O_DIRECT, pieces of 1 MiB on 4 KiB edges, io_uring or a few threads
 *        +-- slot of an arena, in place     cache_*()       one group a slot: a routed expert, or
 *                                                           the matrices of one layer
 *                               --copy-->   stream()        all of a list, in order: dense
 *                                                           weights, once, at start
 *   raw files of ours <---- the same way ---- batch_*()       whole blocks, read and written
 *
 *   a piece    |....[payload ...........]....|   tensors begin anywhere, pieces on block edges:
 *              off  ^head           want ^   ^len  what is read around the payload is ignored
 *
 * Invariants  1 a slot with pins, or with a read on its way, is never given to another group
 *             2 at most IO_DEPTH in flight; what waits beyond them keeps its order, and
 *               cache_ask() waits for all that others asked for
 *             3 no allocation after cache_open(), but for files written and a load's slots
 *             4 every completion goes through io_on_answer(), whoever did the transfer
 *             5 what lies in a file is an error of theirs, never an assert of ours
 * Contents    1 text, files, JSON   2 config   3 headers   4 checkpoint   5 requests
 *             6 ring and threads    7 open, raw files      8 caches
 *             9 streams: loading, hashes, speed           10 this machine: memory, disks
 * Not here    which tensors the model needs and their shapes (dsv4.c), what experts compute     */
#define _GNU_SOURCE 1              /* O_DIRECT */
#include "dsv4.h"

#include <assert.h>
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdalign.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

enum {
    MAX_CONFIG_BYTES = 16 << 20,   /* real ones have 2 KB; pruned ones list what they kept      */
    MAX_INDEX_BYTES = 256 << 20,   /* real ones have 4 MB                                       */
    MAX_DIM = 1 << 15,             /* of any one axis: products of two are an int somewhere     */
    MAX_VOCAB = 1 << 22,
    MAX_RATIO = 1 << 13,           /* tokens of one compressed entry; times 4, times an axis    */
    IO_ALIGN = 4096,               /* what every O_DIRECT file accepts for offset, length, buffer */
    IO_PIECE = 1 << 20,            /* one read at most; larger ones gain nothing                */
    IO_DEPTH = 128,                /* in flight: a prompt's drive works on while we compute     */
    IO_GETS = 48,                  /* when cache_get() adds no more: drives saturate far below,
                                      and of more the one that is waited for comes later        */
    IO_BACKGROUND = 16,            /* of them for cache_ask(), which a get waits for            */
    IO_TRIES_MAX = 64,             /* tries of one request that bring nothing new               */
    RAW_FILES = 4,                 /* of ours beside the shards; KV needs two                   */
    IO_THREADS = 8,                /* where io_uring is refused                                 */
    STREAM_BYTES = 4 << 20,        /* one range of a stream                                     */
    STREAM_SLOTS = 8,              /* ranges in flight                                          */
    HASH_CHARS = 32,               /* XXH3-128 in hexadecimal                                   */
};

static_assert((int64_t)MAX_DIM * MAX_DIM <= INT_MAX, "what two axes give is an int");
static_assert((int64_t)4 * MAX_RATIO * MAX_DIM <= INT_MAX, "what a compressor carries is an int");

/* === 1. Text, files, JSON ===================================================================== */

/* A JSON value as text, cut to fit a message (and to be compared with a short constant). */
typedef struct { char text[96]; } shown;

static shown show(const json_t *v) {
    shown s = {"absent"};
    char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII |
                               JSON_REAL_PRECISION(15));
    if (text && snprintf(s.text, sizeof s.text, "%s", text) >= (int)sizeof s.text)
        memcpy(s.text + sizeof s.text - 4, "...", 4);
    free(text);
    return s;
}

static int join(char path[PATH_MAX], const char *dir, const char *file, dsv4_err *err) {
    int n = snprintf(path, PATH_MAX, "%s/%s", dir, file);
    return n > 0 && n < PATH_MAX ? 0 : fail(err, "%.200s...: the path is too long", dir);
}

/* Open a regular file for plain reading and tell its size; the caller closes *fd. */
static int open_file(int *fd, uint64_t *size, const char *path, dsv4_err *err) {
    struct stat st;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO of that name must not hang us */
    if (*fd < 0) return fail(err, "open %s: %s", path, strerror(errno));
    if (fstat(*fd, &st) || !S_ISREG(st.st_mode)) {
        close(*fd);
        return fail(err, "open %s: it is not a regular file", path);
    }
    *size = (uint64_t)st.st_size;
    return 0;
}

/* A JSON object from memory, no key twice.  NULL with err->msg set when it is none. */
static json_t *parse_object(const char *text, size_t len, const char *where, dsv4_err *err) {
    json_error_t bad;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &bad);
    if (!root) return fail(err, "%s: line %d: %s", where, bad.line, bad.text), NULL;
    if (json_is_object(root)) return root;
    fail(err, "%s: holds %s, not a JSON object", where, show(root).text);
    json_decref(root);
    return NULL;
}

/* n bytes of an open file, through short reads and signals. */
static int read_at(int fd, void *to, size_t n, uint64_t off, const char *path, dsv4_err *err) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char *)to + done, n - done, (off_t)(off + done));
        if (got > 0) done += (size_t)got;
        else if (got == 0 || errno != EINTR)
            return fail(err, "read %s at byte %" PRIu64 ": %s", path, off + done,
                        got ? strerror(errno) : "the file ends there");
    }
    return 0;
}

/* A whole small file; on 0 the caller frees *text. */
static int read_text(char **text, size_t *len, const char *path, size_t max, dsv4_err *err) {
    int fd, rc;
    uint64_t size;
    if (open_file(&fd, &size, path, err)) return -1;
    *len = (size_t)size;
    *text = size <= max ? malloc(*len + 1) : NULL;
    if (*text) rc = read_at(fd, *text, *len, 0, path, err);
    else if (size > max)
        rc = fail(err, "%s: has %" PRIu64 " bytes; accepted: at most %zu", path, size, max);
    else rc = fail(err, "%s: out of memory", path);
    if (rc) free(*text);
    close(fd);
    return rc;
}

/* The same from a file. */
static json_t *parse_file(const char *path, size_t max, dsv4_err *err) {
    char *text;
    size_t len;
    if (read_text(&text, &len, path, max, err)) return NULL;
    json_t *root = parse_object(text, len, path, err);
    free(text);
    return root;
}

/* Under its name there is always a whole file, the old one or the new one. */
static int write_json(const json_t *root, const char *file, dsv4_err *err) {
    char path[PATH_MAX + 32];      /* a longer one cannot be opened                             */
    snprintf(path, sizeof path, "%s.%ld", file, (long)getpid());
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    bool good = fd >= 0 && !json_dumpfd(root, fd, JSON_INDENT(1) | JSON_SORT_KEYS) && !fsync(fd);
    int rc = good && !rename(path, file) ? 0 : fail(err, "write %s: %s", file, strerror(errno));
    if (fd >= 0) close(fd);
    if (rc) unlink(path);
    return rc;
}

/* === 2. Config ================================================================================
 * A message names the file, the key, what it holds and what would be accepted.                   */

typedef struct {                   /* where values are looked up, and how the place is called   */
    const json_t *object;
    const char *where;             /* file                                                      */
    dsv4_err *err;
} config_in;

/* The value of a key, or of one in an object: "rope_scaling.type". */
static const json_t *look(const config_in *in, const char *key) {
    const char *dot = strchr(key, '.');
    const json_t *v = dot ? json_object_getn(in->object, key, (size_t)(dot - key)) : in->object;
    return json_object_get(v, dot ? dot + 1 : key);
}

static int refuse(const config_in *in, const char *key, const char *accepted) {
    return fail(in->err, "%s: %s is %s; accepted: %s", in->where, key, show(look(in, key)).text,
                accepted);
}

/* Numbers by key, where they go and what is accepted.  A whole one (a size, a count, an id: 4096.0
 * is none) is a multiple of `multiple`; a real one has multiple 0 and may be written without a
 * point, as rope_theta is.  And what the program computes in one way only, as JSON writes it. */
typedef struct {
    const char *key;
    size_t at;
    char type;                     /* of the struct's member: int, long (int64_t), float, double */
    int multiple;
    double lo, hi;
    const char *only;              /* the one value; NULL: a number                             */
    bool optional;                 /* absent or null leaves what is there                       */
} field;

static int want_fields(const config_in *in, const field *f, void *out) {
    for (; f->key; f++) {
        const json_t *v = look(in, f->key);
        double x = json_number_value(v);
        json_int_t whole = json_integer_value(v);
        bool fits = json_is_number(v) && x >= f->lo && x <= f->hi;
        char *at = (char *)out + f->at, accepted[96];
        if ((f->optional && (!v || json_is_null(v))) ||
            (f->only && !strcmp(show(v).text, f->only)))
            continue;
        if (f->only) return refuse(in, f->key, f->only);
        if (!fits || (f->multiple && (!json_is_integer(v) || whole % f->multiple))) {
            snprintf(accepted, sizeof accepted,
                     f->multiple ? "whole numbers from %.15g to %.15g, multiples of %d"
                                 : "numbers from %.15g to %.15g", f->lo, f->hi, f->multiple);
            return refuse(in, f->key, accepted);
        }
        if (f->type == 'i') memcpy(at, &(int){(int)whole}, sizeof(int));
        if (f->type == 'l') memcpy(at, &(int64_t){whole}, sizeof(int64_t));
        if (f->type == 'f') memcpy(at, &(float){(float)x}, sizeof(float));
        if (f->type == 'd') memcpy(at, &x, sizeof x);
    }
    return 0;
}

#define INT(name, lo, hi, multiple) \
    {#name, offsetof(dsv4_config, name), 'i', multiple, lo, hi, NULL, false}
#define REAL(key, name, type, lo, hi) \
    {key, offsetof(dsv4_config, name), type, 0, lo, hi, NULL, false}
#define ONLY(key, value, optional) {key, 0, 0, 0, 0, 0, value, optional}
#define END {.key = NULL}

static const field constants[] = {
    ONLY("expert_dtype", "\"fp4\"", false), ONLY("scoring_func", "\"sqrtsoftplus\"", false),
    ONLY("topk_method", "\"noaux_tc\"", false), ONLY("norm_topk_prob", "true", false),
    ONLY("num_key_value_heads", "1", true), ONLY("quantization_config.fmt", "\"e4m3\"", true),
    ONLY("quantization_config.scale_fmt", "\"ue8m0\"", true),
    ONLY("quantization_config.weight_block_size", "[128,128]", true), END,
};

/* What says which architecture this is.  model_type comes first: of another one, nothing else
 * need make sense. */
static int config_kind(const config_in *in) {
    const json_t *type = look(in, "model_type");
    if (!json_is_string(type)) return refuse(in, "model_type", "\"deepseek_v4\"");
    if (strcmp(json_string_value(type), "deepseek_v4") != 0)
        return fail(in->err, "%s: model_type %.64s is another architecture; this program runs "
                    "deepseek_v4", in->where, json_string_value(type));
    return want_fields(in, constants, NULL);
}

/* Every number that the model needs.  One that is a size is bounded, so that what is computed from
 * it later cannot overflow; F32 holds the ranges of reals whole, above zero. */
static const field config_fields[] = {
    INT(hidden_size, 32, MAX_DIM, 32), INT(moe_intermediate_size, 32, MAX_DIM, 32), /* FP4 scales */
    INT(num_hidden_layers, 1, MAX_LAYERS, 1), INT(num_attention_heads, 1, MAX_DIM, 1),
    INT(head_dim, 2, MAX_HEAD_DIM, 1), INT(qk_rope_head_dim, 2, MAX_DIM, 2), /* turns pairs      */
    INT(q_lora_rank, 1, MAX_DIM, 1), INT(o_lora_rank, 1, MAX_DIM, 1), INT(o_groups, 1, MAX_DIM, 1),
    INT(sliding_window, 1, MAX_DIM, 1), INT(index_n_heads, 1, MAX_DIM, 1),
    INT(index_head_dim, 1, MAX_HEAD_DIM, 1), INT(index_topk, 1, MAX_DIM, 1),
    INT(n_routed_experts, 1, MAX_EXPERTS, 1), INT(num_experts_per_tok, 1, MAX_TOPK, 1),
    INT(n_shared_experts, 1, 1, 1),                /* the graph has exactly one                 */
    INT(num_hash_layers, 0, MAX_LAYERS, 1), INT(num_nextn_predict_layers, 0, MAX_LAYERS, 1),
    INT(hc_mult, 1, MAX_HC, 1), INT(hc_sinkhorn_iters, 1, 1000, 1),
    INT(vocab_size, 1, MAX_VOCAB, 1), INT(bos_token_id, 0, MAX_VOCAB, 1),
    INT(eos_token_id, 0, MAX_VOCAB, 1),
    {"max_position_embeddings", offsetof(dsv4_config, max_position_embeddings), 'l', 1, 1, 1 << 30,
     NULL, false},
    REAL("rope_theta", rope_theta, 'd', 2, 1e15),  /* ln(theta) is divided by                   */
    REAL("compress_rope_theta", compress_rope_theta, 'd', 2, 1e15),
    REAL("swiglu_limit", swiglu_limit, 'f', 1e-6, 1e6), REAL("hc_eps", hc_eps, 'f', 1e-30, 1),
    REAL("routed_scaling_factor", routed_scaling_factor, 'f', 1e-6, 1e6),
    REAL("rms_norm_eps", rms_norm_eps, 'f', 1e-30, 1), END,
}, yarn_fields[] = {
    ONLY("rope_scaling.type", "\"yarn\"", false),
    REAL("rope_scaling.factor", yarn_factor, 'd', 1, 1e6),
    REAL("rope_scaling.beta_slow", yarn_beta_slow, 'd', 1e-6, 1e6),
    REAL("rope_scaling.beta_fast", yarn_beta_fast, 'd', 1e-6, 1e6),
    REAL("rope_scaling.original_max_position_embeddings", yarn_original, 'd', 1, 1e12), END,
};

/* One ratio a layer, then the MTP block's; what later checkpoints add behind it is not ours. */
static int config_ratios(dsv4_config *cfg, const config_in *in) {
    const json_t *list = look(in, "compress_ratios");
    size_t n = json_array_size(list), layers = (size_t)cfg->num_hidden_layers;
    if (n < layers) return refuse(in, "compress_ratios", "one for each of num_hidden_layers");
    for (size_t l = 0; l <= layers && l < n; l++) {
        const json_t *v = json_array_get(list, l);
        json_int_t ratio = json_integer_value(v);
        if (!json_is_integer(v) || ratio < 0 || ratio == 1 || ratio > MAX_RATIO)
            return fail(in->err, "%s: compress_ratios[%zu] is %s; accepted: 0, or 2 to %d",
                        in->where, l, show(v).text, MAX_RATIO);
        cfg->compress_ratios[l] = (int)ratio;
    }
    return 0;
}

static int config_yarn(dsv4_config *cfg, const config_in *in) {
    const json_t *rope = look(in, "rope_scaling");
    bool compressed = false;
    for (int l = 0; l <= cfg->num_hidden_layers; l++) compressed |= cfg->compress_ratios[l] != 0;
    cfg->yarn_factor = cfg->yarn_beta_fast = cfg->yarn_beta_slow = cfg->yarn_original = 1;
    if (!compressed && (!rope || json_is_null(rope))) return 0;
    if (want_fields(in, yarn_fields, cfg)) return -1;
    if (cfg->yarn_beta_fast >= cfg->yarn_beta_slow) return 0;
    return refuse(in, "rope_scaling.beta_fast", "numbers from beta_slow on");
}

/* What two keys say together. */
static int config_check(const dsv4_config *c, const config_in *in) {
    int hadamard = c->index_head_dim, rope = c->qk_rope_head_dim;
    bool csa = false;              /* ratio 4 brings the indexer                                */
    for (int l = 0; l <= c->num_hidden_layers; l++) csa |= c->compress_ratios[l] == 4;
    const struct { bool ok; const char *key, *accepted; } rules[] = {
        {rope < c->head_dim, "qk_rope_head_dim", "less than head_dim"},
        {rope <= c->index_head_dim, "qk_rope_head_dim", "at most index_head_dim"},
        {!csa || (hadamard % 32 == 0 && (hadamard & (hadamard - 1)) == 0), "index_head_dim",
         "a power of two from 32, for the Hadamard transform and its blocks of 32"},
        {c->num_attention_heads * c->head_dim % c->o_groups == 0, "o_groups",
         "a divisor of num_attention_heads * head_dim"},
        {c->num_experts_per_tok <= c->n_routed_experts, "num_experts_per_tok",
         "at most n_routed_experts"},
        {c->num_hash_layers <= c->num_hidden_layers, "num_hash_layers",
         "at most num_hidden_layers"},
        {c->bos_token_id < c->vocab_size, "bos_token_id", "less than vocab_size"},
        {c->eos_token_id < c->vocab_size, "eos_token_id", "less than vocab_size"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (!rules[i].ok) return refuse(in, rules[i].key, rules[i].accepted);
    return 0;
}

/* From what was read, which is given up; NULL: it could not be. */
static int config_take(dsv4_config *cfg, json_t *root, const char *where, dsv4_err *err) {
    const config_in in = {root, where, err};
    *cfg = (dsv4_config){.name = ""};
    if (!root) return -1;
    int rc = config_kind(&in) || want_fields(&in, config_fields, cfg) ||
             config_ratios(cfg, &in) || config_yarn(cfg, &in) || config_check(cfg, &in);
    json_decref(root);
    return rc ? -1 : 0;
}

int config_parse(dsv4_config *cfg, const char *json, size_t len, const char *where,
                 dsv4_err *err) {
    return config_take(cfg, parse_object(json, len, where, err), where, err);
}

int config_load(dsv4_config *cfg, const char *dir, dsv4_err *err) {
    char path[PATH_MAX];
    if (join(path, dir, "config.json", err)) return -1;
    if (access(dir, F_OK)) return fail(err, "%s: %s", dir, strerror(errno));
    if (access(path, F_OK)) return fail(err, "%s is no model: it has no config.json", dir);
    int rc = config_take(cfg, parse_file(path, MAX_CONFIG_BYTES, err), path, err);
    /* The model is called as its directory, also where that was given as "." or "models/x/". */
    if (!rc && realpath(dir, path)) snprintf(cfg->name, MAX_NAME, "%s", strrchr(path, '/') + 1);
    return rc;
}

/* F32 must neither round these to 0 nor to 1 where that means something else. */
static const field sampling_fields[] = {
#define MAY(name, type, multiple, lo, hi) \
    {#name, offsetof(sample_opts, name), type, multiple, lo, hi, NULL, true}
    MAY(temperature, 'f', 0, 0, 1e6), MAY(top_p, 'f', 0, 1e-6, 1), MAY(top_k, 'i', 1, 0, MAX_VOCAB),
    MAY(min_p, 'f', 0, 0, 0.999999), MAY(repetition_penalty, 'f', 0, 1e-6, 1e6), END,
};

int config_sampling(sample_opts *o, const char *dir, dsv4_err *err) {
    char path[PATH_MAX];
    *o = (sample_opts){.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = o->seed};
    if (join(path, dir, "generation_config.json", err)) return -1;
    if (access(path, F_OK) && errno == ENOENT) return 0;
    json_t *root = parse_file(path, MAX_CONFIG_BYTES, err);
    const config_in in = {root, path, err};
    const json_t *on = look(&in, "do_sample");
    int rc = root ? want_fields(&in, sampling_fields, o) : -1;
    if (!rc && on && !json_is_null(on) && !json_is_boolean(on))
        rc = refuse(&in, "do_sample", "true or false");
    if (json_is_false(on)) o->temperature = 0;
    json_decref(root);
    return rc;
}

/* === 3. Headers ===============================================================================
 *   u64 length | JSON: name -> {dtype, shape, data_offsets} | data; offsets count from its begin
 * What a header says is checked before it is used; the JSON is freed, the table keeps about 130
 * bytes a tensor.                                                                                */

typedef struct {
    const char *path;              /* DIR/FILE, ours                                            */
    const char *file;              /* FILE, in path                                             */
    uint64_t size;                 /* of the file when its header was read                      */
} ckpt_shard;

struct ckpt {
    ckpt_shard shards[MAX_SHARDS]; /* [n_shards]                                                */
    int n_shards;
    ckpt_tensor *tensors;          /* in order of name once open; names are ours                */
    size_t n_tensors;
    json_t *map;                   /* weight_map of the index, until open; NULL: there is none  */
};

/* Types of the safetensors format by size; DT_N marks those the model never uses.  Of one that is
 * not here no size is known. */
static const struct stored_type { const char *name; dsv4_dtype dtype; uint64_t bytes; } types[] = {
    {"F32", DT_F32, 4}, {"F16", DT_F16, 2}, {"BF16", DT_BF16, 2}, {"F8_E4M3", DT_F8_E4M3, 1},
    {"F8_E8M0", DT_F8_E8M0, 1}, {"I8", DT_I8, 1}, {"I64", DT_I64, 8},
    {"F64", DT_N, 8}, {"F8_E5M2", DT_N, 1}, {"I32", DT_N, 4}, {"I16", DT_N, 2}, {"U8", DT_N, 1},
    {"U16", DT_N, 2}, {"U32", DT_N, 4}, {"U64", DT_N, 8}, {"BOOL", DT_N, 1}, {NULL, DT_N, 0},
};

static bool whole(const json_t *v) { return json_is_integer(v) && json_integer_value(v) >= 0; }

static int bad_entry(const ckpt_tensor *t, const char *path, const json_t *entry, const char *key,
                     const char *wanted, dsv4_err *err) {
    return fail(err, "%s: tensor %s: %s is %s, not %s", path, t->name, key,
                show(json_object_get(entry, key)).text, wanted);
}

/* One entry of a header.  Its end is checked by header_parse(), once for the whole file. */
static int entry_parse(ckpt_tensor *t, const char *path, const json_t *v, uint64_t data_at,
                       dsv4_err *err) {
    const json_t *type = json_object_get(v, "dtype"), *shape = json_object_get(v, "shape");
    json_t *range = json_object_get(v, "data_offsets");
    json_int_t begin, end;
    size_t n = strlen(t->name);    /* JSON with a NUL inside a name is refused already          */
    if (n == 0 || n >= MAX_NAME)
        return fail(err, "%s: a tensor's name has %zu bytes; accepted: 1 to %d: %.64s...", path, n,
                    MAX_NAME - 1, t->name);
    if (!json_is_string(type)) return bad_entry(t, path, v, "dtype", "a string", err);
    if (json_unpack(range, "[I,I!]", &begin, &end) || begin < 0 || begin > end)
        return bad_entry(t, path, v, "data_offsets", "[begin,end]", err);
    t->offset = data_at + (uint64_t)begin;
    t->bytes = (uint64_t)(end - begin);

    const struct stored_type *stored = types;
    while (stored->name && strcmp(json_string_value(type), stored->name)) stored++;
    uint64_t bytes = stored->bytes;            /* of one element, then of all                   */
    bool fits = json_is_array(shape);
    n = json_array_size(shape);
    for (size_t d = 0; d < n && fits; d++) {
        const json_t *size = json_array_get(shape, d);
        fits = whole(size) &&
               !__builtin_mul_overflow(bytes, (uint64_t)json_integer_value(size), &bytes);
        if (d < 4) t->shape[d] = (int64_t)json_integer_value(size);
    }
    if (!fits)
        return bad_entry(t, path, v, "shape", "a list of sizes whose product fits 64 bits", err);
    if (stored->name && bytes != t->bytes)
        return fail(err, "%s: tensor %s: shape %s of %s needs %" PRIu64 " bytes but data_offsets "
                    "give %" PRIu64, path, t->name, show(shape).text, stored->name, bytes,
                    t->bytes);
    t->n_dims = (int)(n > 4 ? 4 : n);
    t->dtype = n > 4 ? DT_N : stored->dtype;   /* no tensor of the model has so many axes       */
    return 0;
}

static int by_offset(const void *a, const void *b) {
    const ckpt_tensor *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Sort the n tensors of one shard as they lie in it: none may begin before another one ends.
 * Empty tensors cover nothing and may lie anywhere; so may gaps. */
static int check_overlaps(ckpt_tensor *t, size_t n, const ckpt_shard *s, dsv4_err *err) {
    const ckpt_tensor *last = NULL;
    if (n) qsort(t, n, sizeof *t, by_offset);
    for (size_t i = 0; i < n; i++) {
        if (t[i].bytes == 0) continue;
        if (last && t[i].offset < last->offset + last->bytes)
            return fail(err, "%s: tensors %s and %s overlap at byte %" PRIu64, s->path,
                        last->name, t[i].name, t[i].offset);
        last = &t[i];
    }
    return 0;
}

/* Add the tensors of one header to the table.  The shard's path and size are set; `text` follows
 * the file's first eight bytes.  Types unknown to us go in as DT_N: the index may name them. */
static int header_parse(ckpt *c, int which, const char *text, size_t len, dsv4_err *err) {
    ckpt_shard *s = &c->shards[which];
    json_t *root = parse_object(text, len, s->path, err), *value;
    if (!root) return -1;
    const char *name;
    size_t first = c->n_tensors;
    uint64_t data_at = 8 + (uint64_t)len, need = data_at;
    ckpt_tensor *all = realloc(c->tensors, (first + json_object_size(root) + 1) * sizeof *all);
    if (all) c->tensors = all;
    int rc = all ? 0 : fail(err, "%s: out of memory for %zu tensors", s->path, first);
    json_object_foreach(root, name, value) {
        if (rc) break;
        if (!strcmp(name, "__metadata__")) continue; /* notes of whoever wrote the file         */
        ckpt_tensor *t = &c->tensors[c->n_tensors];
        *t = (ckpt_tensor){.name = strdup(name), .shard = which};
        c->n_tensors += t->name != NULL;
        rc = t->name ? entry_parse(t, s->path, value, data_at, err)
                     : fail(err, "%s: out of memory for its names", s->path);
        if (!rc && need < t->offset + t->bytes) need = t->offset + t->bytes;
    }
    json_decref(root);
    if (rc) return -1;
    if (need > s->size)
        return fail(err, "%s: has %" PRIu64 " bytes but its header describes %" PRIu64 ": the "
                    "file is cut short, download it again", s->path, s->size, need);
    return check_overlaps(c->tensors + first, c->n_tensors - first, s, err);
}

/* Read one shard's header, and nothing behind it.  A file with fewer than the first eight bytes is
 * read as if these ended in zeros. */
static int shard_read(ckpt *c, int which, dsv4_err *err) {
    ckpt_shard *s = &c->shards[which];
    uint64_t len = 0;
    char *text = NULL;
    int fd;
    if (open_file(&fd, &s->size, s->path, err)) return -1;
    int rc = read_at(fd, &len, s->size < 8 ? (size_t)s->size : 8, 0, s->path, err);
    len = le64toh(len);
    if (!rc && s->size >= 8 && (len < 2 || len > MAX_HEADER_BYTES)) {
        rc = fail(err, "%s: header of %" PRIu64 " bytes; accepted: 2 to %d: this is no "
                  "safetensors file, or it is damaged", s->path, len, MAX_HEADER_BYTES);
    } else if (!rc && (s->size < 8 || len > s->size - 8)) {
        rc = fail(err, "%s: has %" PRIu64 " bytes but its header alone needs %" PRIu64 ": the "
                  "file is cut short, download it again", s->path, s->size, len + 8);
    }
    if (!rc && !(text = malloc(len))) rc = fail(err, "%s: out of memory", s->path);
    if (!rc) rc = read_at(fd, text, len, 8, s->path, err);
    if (!rc) rc = header_parse(c, which, text, len, err);
    close(fd);
    free(text);
    return rc;
}

/* === 4. Checkpoint ============================================================================ */

/* Of tensors and of shards: what they are called comes first in both. */
static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Without an index: every *.safetensors of the directory. */
static int list_dir(json_t *files, const char *dir, dsv4_err *err) {
    const struct dirent *e;
    DIR *d = opendir(dir);
    if (!d) return fail(err, "open %s: %s", dir, strerror(errno));
    while ((e = readdir(d))) {
        const char *dot = strrchr(e->d_name, '.');
        if (dot && !strcmp(dot, ".safetensors"))
            json_object_set_new_nocheck(files, e->d_name, json_true());
    }
    closedir(d);
    return 0;
}

/* With one: every file that it names.  A name must stay inside the directory. */
static int list_index(ckpt *c, json_t *files, const char *path, dsv4_err *err) {
    const char *name;
    json_t *value, *root = parse_file(path, MAX_INDEX_BYTES, err);
    if (!root) return -1;
    c->map = json_incref(json_object_get(root, "weight_map"));
    json_decref(root);
    if (!json_object_size(c->map))
        return fail(err, "%s: weight_map is %s; accepted: an object that names at least one "
                    "tensor", path, show(c->map).text);
    json_object_foreach(c->map, name, value) {
        const char *file = json_string_value(value);
        if (!file || !*file || strlen(file) >= MAX_NAME || strchr(file, '/') ||
            !strcmp(file, ".") || !strcmp(file, ".."))
            return fail(err, "%s: tensor %.200s lies in %s; accepted: the name of a file beside "
                        "the index", path, name, show(value).text);
        json_object_set_new(files, file, json_true());
    }
    return 0;
}

/* A table without its tensors: the shards of a directory in order of name, be they all there or
 * not, by the index where there is one. */
static ckpt *list_shards(const char *dir, dsv4_err *err) {
    char path[PATH_MAX];
    const char *file;
    ckpt *c = calloc(1, sizeof *c);
    json_t *files = json_object(), *value;
    int rc = c && files ? join(path, dir, "model.safetensors.index.json", err)
                        : fail(err, "%s: out of memory", dir);
    if (!rc) rc = access(path, F_OK) && errno == ENOENT ? list_dir(files, dir, err)
                                                        : list_index(c, files, path, err);
    size_t n = json_object_size(files);
    if (!rc && n > MAX_SHARDS) rc = fail(err, "%s: more than %d shards", dir, MAX_SHARDS);
    json_object_foreach(files, file, value) {
        if (rc || (rc = join(path, dir, file, err))) break;
        const char *copy = strdup(path);
        if (!copy) rc = fail(err, "%s: out of memory", dir);
        else c->shards[c->n_shards++] = (ckpt_shard){.path = copy, .file = copy + strlen(dir) + 1};
    }
    if (!rc) qsort(c->shards, n, sizeof *c->shards, by_name);
    json_decref(files);
    if (!rc) return c;
    ckpt_close(c);
    return NULL;
}

/* Name the shards that a partial download has not brought, before anything is read. */
static int check_missing(const ckpt *c, const char *dir, dsv4_err *err) {
    const char *first = NULL;
    int n = 0;
    if (!c->n_shards) return fail(err, "%s: holds no *.safetensors file", dir);
    for (int i = 0; i < c->n_shards; i++) {
        if (!access(c->shards[i].path, F_OK) || errno != ENOENT) continue;
        if (n++ == 0) first = c->shards[i].file;
    }
    return n == 0 ? 0 : fail(err, "%s: %d of %d shards are missing, the first %s; go on with the "
                             "download", dir, n, c->n_shards, first);
}

/* Every tensor once (the table is in order of name), and where the index says, both ways. */
static int check_table(const ckpt *c, dsv4_err *err) {
    const char *name;
    json_t *value;
    for (size_t i = 1; i < c->n_tensors; i++) {
        const ckpt_tensor *a = &c->tensors[i - 1], *b = &c->tensors[i];
        if (!strcmp(a->name, b->name))
            return fail(err, "tensor %s lies in two shards, %s and %s", a->name,
                        c->shards[a->shard].path, c->shards[b->shard].file);
    }
    json_object_foreach(c->map, name, value) {
        const char *file = json_string_value(value);
        const ckpt_tensor *t = ckpt_find(c, name);
        if (!t || strcmp(c->shards[t->shard].file, file) != 0)
            return fail(err, "the index says that tensor %.255s lies in %s, but it lies in %s; "
                        "download both again", name, file,
                        t ? c->shards[t->shard].file : "no shard");
    }
    for (size_t i = 0; c->map && i < c->n_tensors; i++)
        if (!json_object_get(c->map, c->tensors[i].name))
            return fail(err, "tensor %s lies in %s, but the index does not name it; download "
                        "both again", c->tensors[i].name,
                        c->shards[c->tensors[i].shard].path);
    return 0;
}

int ckpt_open(ckpt **out, const char *dir, dsv4_err *err) {
    ckpt *c = *out = list_shards(dir, err);
    int rc = c ? check_missing(c, dir, err) : -1;
    for (int i = 0; !rc && i < c->n_shards; i++) rc = shard_read(c, i, err);
    if (!rc && c->n_tensors) qsort(c->tensors, c->n_tensors, sizeof *c->tensors, by_name);
    if (!rc) rc = check_table(c, err);
    if (rc) {
        ckpt_close(c);
        *out = NULL;
        return -1;
    }
    size_t n = 0;                  /* checks are done: keep only what the model can use         */
    for (size_t i = 0; i < c->n_tensors; i++) {
        if (c->tensors[i].dtype != DT_N) c->tensors[n++] = c->tensors[i];
        else free((char *)c->tensors[i].name);
    }
    c->n_tensors = n;
    json_decref(c->map);
    c->map = NULL;
    return 0;
}

void ckpt_close(ckpt *c) {
    if (!c) return;
    json_decref(c->map);
    for (size_t i = 0; i < c->n_tensors; i++) free((char *)c->tensors[i].name);
    for (int i = 0; i < c->n_shards; i++) free((char *)c->shards[i].path);
    free(c->tensors);
    free(c);
}

const ckpt_tensor *ckpt_find(const ckpt *c, const char *name) {
    ckpt_tensor key = {.name = name};
    if (!c->n_tensors) return NULL;
    return bsearch(&key, c->tensors, c->n_tensors, sizeof key, by_name);
}

int ckpt_n_shards(const ckpt *c) { return c->n_shards; }
size_t ckpt_n_tensors(const ckpt *c) { return c->n_tensors; }

const ckpt_tensor *ckpt_at(const ckpt *c, size_t i) {
    assert(i < c->n_tensors);
    return &c->tensors[i];
}

const char *ckpt_shard_path(const ckpt *c, int which) {
    assert(which >= 0 && which < c->n_shards);
    return c->shards[which].path;
}

/* The official code says which prompts a checkpoint was trained on; where it was left out, the
 * second generation's further MTP blocks do. */
int config_generation(generation *out, const char *dir, dsv4_err *err) {
    static const char key[] = "REASONING_EFFORT_PROMPTS", second[] = "mtp.1.";
    char path[PATH_MAX], *text;
    size_t len;
    bool found = false;
    if (join(path, dir, "encoding/encoding_dsv4.py", err)) return -1;
    if (!access(path, F_OK) || errno == EACCES) {
        if (read_text(&text, &len, path, MAX_CONFIG_BYTES, err)) return -1;
        *out = memmem(text, len, key, sizeof key - 1) ? GEN_0731 : GEN_V4;
        free(text);
        return 0;
    }
    const char *name;
    json_t *value;
    ckpt *c = list_shards(dir, err);
    int rc = c ? 0 : -1;
    for (int i = 0; !rc && !c->map && i < c->n_shards; i++) rc = shard_read(c, i, err);
    json_object_foreach(c ? c->map : NULL, name, value)
        found |= !strncmp(name, second, sizeof second - 1);
    for (size_t i = 0; c && i < c->n_tensors; i++)
        found |= !strncmp(c->tensors[i].name, second, sizeof second - 1);
    *out = found ? GEN_0731 : GEN_V4;
    ckpt_close(c);
    return rc;
}

int ckpt_survey(const char *dir, line_fn each, void *arg, dsv4_err *err) {
    char line[sizeof(dsv4_err) + MAX_NAME];
    int n = 0;
    ckpt *c = list_shards(dir, err);
    for (int i = 0; c && i < c->n_shards; i++) {
        const ckpt_shard *s = &c->shards[i];
        dsv4_err why = {"missing"};
        if ((!access(s->path, F_OK) || errno != ENOENT) && !shard_read(c, i, &why)) continue;
        size_t path = strlen(s->path); /* most reasons begin with it: not twice                 */
        snprintf(line, sizeof line, "%s: %s", s->file,
                 strncmp(why.msg, s->path, path) ? why.msg : why.msg + path + 2);
        each(arg, line);
        n++;
    }
    ckpt_close(c);
    return c ? n : -1;
}

/* === 5. Requests ==============================================================================
 * A request is one piece of a file on its way into memory.  There are IO_DEPTH of them, made at
 * open; the ring and the threads know nothing else, and io_on_answer() decides for both.
 *
 *   slot_feed, transfer ---> io_begin --> ring or threads --> io_reap
 *           ^                   ^                                |
 *           |                   +---- IO_AGAIN ---- io_complete <+
 *     free requests <--- slot_piece_in <--- IO_DONE, IO_FAILED --+
 *
 * All of it runs in the thread that calls us, whenever it calls; only the transfer itself does not.
 * So there is no lock: requests go to threads and come back through two pipes.                   */

enum { CAUSE_EOF = -1, CAUSE_STUCK = -2 };

typedef struct io_req {
    struct io_req *next;           /* in the free list                                          */
    uint8_t *buf;                  /* on a 4 KiB edge                                           */
    int file;                      /* a shard, or a raw file behind these                       */
    bool write;
    uint64_t off;                  /* in the file, on a 4 KiB edge                              */
    uint32_t len;                  /* bytes to read, whole blocks: the last may lie beyond EOF  */
    uint32_t want;                 /* bytes to the end of the payload: these must come          */
    uint32_t done;                 /* bytes in, whole blocks unless all came                    */
    const ckpt_tensor *t;          /* what this is a piece of; of a run, the first one; or NULL */
    io_batch *batch;               /* who asked: this,                                          */
    struct cache_slot *slot;       /* or this                                                   */
    bool background;               /* counts in n_background                                    */
    int tries, io_errors;          /* in a row without progress; EIO so far                     */
    int res;                       /* a thread's answer: bytes or -errno, as io_uring gives it  */
    int cause;                     /* set by IO_FAILED                                          */
} io_req;

typedef enum { IO_DONE, IO_AGAIN, IO_FAILED } io_next;

/* What does one completion mean?  Pure: no ring, no clock, no system call.
 *   short         go on from the last whole block (O_DIRECT knows nothing else)
 *   end of file   right behind the payload, an error before its end; a file that was cut inside
 *                 a block shows as the same few bytes every time; a write has none
 *   EINTR, EAGAIN once more, a bounded number of times in a row
 *   EIO           once more: drives do recover; then it is the caller's                          */
static io_next io_on_answer(io_req *r, int res) {
    assert(r->done < r->want);
    assert(r->want <= r->len);
    assert(res <= (int)(r->len - r->done));
    r->cause = -res;
    if (res == -EIO && r->io_errors++ == 0) return IO_AGAIN;
    if (res < 0 && res != -EAGAIN && res != -EINTR) return IO_FAILED;
    r->cause = CAUSE_EOF;
    if (res == 0 && !r->write) return IO_FAILED;
    if (res > 0) {
        uint32_t in = r->done + (uint32_t)res;
        uint32_t edge = in & ~(uint32_t)(IO_ALIGN - 1);
        if (edge > r->done) r->tries = 0;
        r->done = in >= r->want ? in : edge;
    }
    if (r->done >= r->want) return IO_DONE;
    r->cause = res > 0 && !r->write ? CAUSE_EOF : CAUSE_STUCK;
    return ++r->tries > IO_TRIES_MAX ? IO_FAILED : IO_AGAIN;
}

typedef struct {                   /* parts of a group that touch in their file                 */
    const ckpt_tensor *first;
    uint64_t bytes;                /* of all of them                                            */
    size_t region;                 /* in the slot; payload from region + first->offset % 4096   */
} slot_run;

/* FREE --get, ask--> READING --all pieces in--> READY --coldest, no pins--> FREE again
 *          ^             +--one failed, the others in--> FAILED --last pin given back--> FREE
 *          +--ask only, and none of its reads has begun: another one needs the slot            */
typedef enum { SLOT_FREE, SLOT_READING, SLOT_READY, SLOT_FAILED } slot_state;

typedef enum {                     /* where a slot goes when it is READY and has no pin         */
    USED,                          /* the hot end of the idle ones                              */
    ASKED,                         /* the cold end: nobody came for it yet                      */
    PASSING,                       /* before all idle ones, the last one first                  */
} slot_rank;

typedef struct { struct cache_slot *first, *last; } slot_list;

typedef struct cache_slot {
    cache *c;
    slot_list *list;               /* the one it is in, or NULL                                 */
    struct cache_slot *prev, *next;
    slot_state state;
    int pins;
    slot_rank rank;
    size_t id;                     /* group; not of a FREE slot                                 */
    int n_runs, run;               /* the cursor: run, and bytes of it asked for                */
    uint64_t at;
    int in_flight;                 /* pieces                                                    */
    io_fault fault;
    slot_run runs[GROUP_PARTS];    /* [n_runs]                                                  */
} cache_slot;

struct cache {
    offload *o;
    const read_group *groups;      /* [n_groups], as the next three                             */
    cache_slot **slot_of;          /* NULL: none                                                */
    group_uses *uses;
    uint32_t *heat;                /* of earlier runs                                           */
    size_t n_groups;
    arena arena;                   /* [n_slots][slot_bytes]                                     */
    size_t slot_bytes;
    cache_slot *slots;
    int n_slots, n_orphans;        /* orphans: READING without a pin                            */
    int in_flight;                 /* pieces                                                    */
    slot_list free, passing, idle; /* the last two: READY, in the order in which they go; with
                                      pins only where cache_pass() found them there             */
    cache_stats stats;
};

typedef struct {
    int fd;
    const char *path;              /* NULL: there is none; of a raw file: its name, ours        */
    uint64_t size;
    bool direct;                   /* past the page cache                                       */
} io_file;

struct offload {
    const ckpt *c;
    io_file files[MAX_SHARDS + RAW_FILES]; /* [n_shards + RAW_FILES]                            */
    offload_stats stats;
    const char *note;
    io_req *free_reqs;
    int in_flight, n_background;   /* the second are of the first                               */
    slot_list demand, background;  /* slots with pieces to ask for, in order of get and of ask  */
    int n_caches;
    bool batch_waits;              /* for a request: the background does not get it             */

    bool has_ring;
    int ring_error;                /* errno: it broke, and every call from then on says so      */
    struct io_uring ring;
    pthread_t threads[IO_THREADS]; /* else                                                      */
    int n_threads, work[2], answers[2]; /* pipes of pointers to requests                        */

    io_req reqs[IO_DEPTH];
};

static void slot_piece_in(cache_slot *s);
static void slot_feed(offload *o);

/* === 6. Ring and threads ====================================================================== */

/* One attempt at what is missing of a request, on its way to whoever reads. */
static void io_start(offload *o, io_req *r) {
    uint32_t n = r->len - r->done;
    uint64_t at = r->off + r->done;
    int fd = o->files[r->file].fd;
    offload_stats *s = &o->stats;
    *(r->file < o->c->n_shards ? &s->read_bytes : r->write ? &s->raw_written : &s->raw_read) += n;
    s->reads += !r->write;
    if (r->slot) r->slot->c->stats.read_bytes += n;
    if (o->has_ring) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&o->ring);
        assert(sqe);               /* as many entries as requests                               */
        if (r->write) io_uring_prep_write(sqe, fd, r->buf + r->done, n, at);
        else io_uring_prep_read(sqe, fd, r->buf + r->done, n, at);
        io_uring_sqe_set_data(sqe, r);
        return;
    }
    ssize_t sent = write(o->work[1], &r, sizeof r);
    assert(sent == sizeof r);      /* there is room for all requests, so it never waits         */
}

/* One piece of the `left` bytes from what.off on, with the first of the free requests, which there
 * must be; returns the piece's bytes, whole blocks. */
static uint32_t io_begin(offload *o, io_req what, uint64_t left) {
    io_req *r = o->free_reqs;
    o->free_reqs = r->next;
    *r = what;
    r->want = left < IO_PIECE ? (uint32_t)left : IO_PIECE;
    r->len = (r->want + IO_ALIGN - 1) & ~(uint32_t)(IO_ALIGN - 1);
    o->in_flight++;
    o->n_background += r->background;
    io_start(o, r);
    return r->len;
}

static void give_req(offload *o, io_req *r) {
    r->next = o->free_reqs;
    o->free_reqs = r;
}

/* The one path of every completion: again, or to whoever asked. */
static void io_complete(offload *o, io_req *r, int res) {
    io_next next = io_on_answer(r, res);
    if (next == IO_AGAIN) {
        o->stats.retries++;
        io_start(o, r);
        return;
    }
    o->in_flight--;
    o->n_background -= r->background;
    const io_file *f = &o->files[r->file];
    if (!f->direct)                /* the page cache must not fill up with what we keep         */
        (void)posix_fadvise(f->fd, (off_t)r->off, r->len, POSIX_FADV_DONTNEED);
    io_fault *fault = r->slot ? &r->slot->fault : &r->batch->fault;
    if (next == IO_FAILED && !fault->cause)    /* the first failure of many is kept             */
        *fault = (io_fault){r->cause, r->file, r->write, r->off + r->done, r->t};
    if (r->slot) slot_piece_in(r->slot);
    else r->batch->in_flight--;
    give_req(o, r);
}

/* With `wait` sleep until the ring has a completion.  Signals wake us: the caller looks and comes
 * back. */
static void ring_reap(offload *o, bool wait) {
    struct io_uring_cqe *cqe;
    bool sleep = wait && !io_uring_cq_ready(&o->ring);
    int rc = sleep ? io_uring_submit_and_wait(&o->ring, 1) : 0;
    for (int n = 0; (rc == -EAGAIN || rc == -EBUSY) && n < IO_TRIES_MAX; n++) {
        (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* the kernel lacks memory */
        rc = io_uring_submit_and_wait(&o->ring, 1);
    }
    if (rc < 0 && rc != -EINTR) o->ring_error = -rc;
    while (!io_uring_peek_cqe(&o->ring, &cqe)) {
        io_req *r = io_uring_cqe_get_data(cqe);
        io_complete(o, r, cqe->res);
        io_uring_cqe_seen(&o->ring, cqe);
    }
}

/* Handle the answers that are there; with `wait` sleep until there is one, or a signal. */
static void threads_reap(offload *o, bool wait) {
    struct pollfd any = {.fd = o->answers[0], .events = POLLIN};
    for (int ms = wait ? -1 : 0; poll(&any, 1, ms) > 0; ms = 0) {
        io_req *r;
        ssize_t n = read(o->answers[0], &r, sizeof r);
        assert(n == sizeof r);
        io_complete(o, r, r->res);
    }
}

/* Ask for what there is room for.  What the ring leaves is submitted next time. */
static void io_kick(offload *o) {
    slot_feed(o);
    if (o->has_ring) (void)io_uring_submit(&o->ring);
}

/* Handle the completions that are there (with `wait`: at least one, or a signal), and ask for
 * what they made room for.  A failed submission shows here, when somebody waits for it; a ring
 * that broke is not looked at again, so that no late answer finds its asker gone. */
static int io_reap(offload *o, bool wait, dsv4_err *err) {
    assert(!wait || o->in_flight > 0);
    if (o->has_ring && !o->ring_error) ring_reap(o, wait);
    else if (!o->has_ring) threads_reap(o, wait);
    if (o->ring_error) return fail(err, "io_uring: %s", strerror(o->ring_error));
    io_kick(o);
    return 0;
}

/* One of the threads: takes the oldest request, makes one attempt, answers as the ring would. */
static void *io_thread(void *arg) {
    const offload *o = arg;
    io_req *r;
    while (read(o->work[0], &r, sizeof r) == sizeof r) {
        int fd = o->files[r->file].fd;
        uint8_t *buf = r->buf + r->done;
        off_t at = (off_t)(r->off + r->done);
        ssize_t n = r->write ? pwrite(fd, buf, r->len - r->done, at)
                             : pread(fd, buf, r->len - r->done, at);
        r->res = n < 0 ? -errno : (int)n;
        n = write(o->answers[1], &r, sizeof r);
        assert(n == sizeof r);
    }
    return NULL;
}

/* Where io_uring is refused; a few threads keep most drives busy.  One is enough to go on. */
static int threads_open(offload *o, dsv4_err *err) {
    sigset_t all, before;
    int rc = pipe2(o->work, O_CLOEXEC) || pipe2(o->answers, O_CLOEXEC) ? errno : 0;
    sigfillset(&all);              /* signals are for the program's own threads                 */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (o->n_threads < IO_THREADS && !rc) {
        rc = pthread_create(&o->threads[o->n_threads], NULL, io_thread, o);
        if (!rc) o->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return o->n_threads ? 0 : fail(err, "start a reading thread: %s", strerror(rc));
}

/* === 7. Open and raw files ==================================================================== */

/* Go past the page cache if one block goes that way: flags promise, transfers tell.  The block of a
 * file to be written is new, so there is nothing in it. */
static bool go_direct(int fd, bool written) {
    alignas(IO_ALIGN) uint8_t page[IO_ALIGN] = {0};
    int flags = fcntl(fd, F_GETFL) & ~O_NONBLOCK;      /* with it io_uring gives up: EAGAIN     */
    if (!fcntl(fd, F_SETFL, flags | O_DIRECT) &&
        (!written || pwrite(fd, page, sizeof page, 0) > 0) && pread(fd, page, sizeof page, 0) > 0)
        return true;
    (void)fcntl(fd, F_SETFL, flags);
    return false;
}

int offload_open(offload **out, const ckpt *c, const char **note, dsv4_err *err) {
    static const char *const notes[2][2] = { /* [ring][direct] */
        {"io_uring and O_DIRECT are both refused here: reading with threads through the page "
         "cache, which is slower; a local ext4 or XFS disk outside the container is not",
         "io_uring is refused here (by a container's seccomp profile, or kernel.io_uring_disabled)"
         ": reading with threads, which is slower; allow io_uring_setup to change that"},
        {"the checkpoint's file system refuses O_DIRECT: reading through the page cache, which is "
         "slower; a local ext4 or XFS disk does not refuse", NULL},
    };
    offload *o = *out = calloc(1, sizeof *o);
    bool direct = true;
    int rc = 0;
    *note = NULL;
    if (!o) return fail(err, "out of memory");
    o->c = c;
    o->work[0] = o->work[1] = o->answers[0] = o->answers[1] = -1;
    for (int i = IO_DEPTH - 1; i >= 0; i--) give_req(o, &o->reqs[i]);
    for (int i = 0; !rc && i < c->n_shards; i++) {
        const ckpt_shard *s = &c->shards[i];
        io_file *f = &o->files[i];
        if ((rc = open_file(&f->fd, &f->size, s->path, err))) break;
        f->path = s->path;
        direct &= f->direct = go_direct(f->fd, false);
        if (f->size != s->size)
            rc = fail(err, "%s: has %" PRIu64 " bytes now and had %" PRIu64 " a moment ago; is it "
                      "still being downloaded?", s->path, f->size, s->size);
    }
    if (!rc) o->has_ring = !io_uring_queue_init(IO_DEPTH, &o->ring, 0);
    if (o->has_ring && !(o->ring.features & IORING_FEAT_RW_CUR_POS)) { /* Linux before 5.6      */
        io_uring_queue_exit(&o->ring);
        o->has_ring = false;
    }
    if (!rc && !o->has_ring) rc = threads_open(o, err);
    if (!rc) o->note = *note = notes[o->has_ring][direct];
    if (!rc) return 0;
    offload_close(o);
    *out = NULL;
    return -1;
}

void offload_close(offload *o) {
    if (!o) return;
    dsv4_err ignored;
    assert(o->n_caches == 0);
    while (o->in_flight > 0 && !io_reap(o, true, &ignored)) continue; /* of a broken-off load   */
    if (o->work[1] >= 0) close(o->work[1]);    /* the threads end when nothing more can come    */
    for (int i = 0; i < o->n_threads; i++) pthread_join(o->threads[i], NULL);
    const int pipes[] = {o->work[0], o->answers[0], o->answers[1]};
    for (int i = 0; i < 3; i++) if (pipes[i] >= 0) close(pipes[i]);
    if (o->has_ring) io_uring_queue_exit(&o->ring);
    for (int i = 0; i < o->c->n_shards; i++) if (o->files[i].path) close(o->files[i].fd);
    for (int i = o->c->n_shards; i < o->c->n_shards + RAW_FILES; i++)
        if (o->files[i].path) offload_raw_close(o, i);
    free(o);
}

const offload_stats *offload_get_stats(const offload *o) { return &o->stats; }
const char *offload_note(const offload *o) { return o->note; }

/* One failure as one line.  Which tensor of a run was hit is not known, only its first one. */
static int fault_message(const offload *o, const io_fault *f, dsv4_err *err) {
    const char *cause = f->cause == CAUSE_EOF     ? "the file ends there; it was cut short"
                        : f->cause == CAUSE_STUCK ? "tried many times, nothing comes"
                                                  : strerror(f->cause);
    const char *name = f->t ? f->t->name : NULL;
    assert(f->cause);
    return fail(err, "%s %s at byte %" PRIu64 "%s%s%s: %s%s", f->write ? "write" : "read",
                o->files[f->file].path, f->off, name ? " (from tensor " : "", name ? name : "",
                name ? " on)" : "", cause, f->cause == ENOSPC ? "; free some there" : "");
}

/* Make room for all of a file; 0 or errno.  What is free is asked first: an attempt would fill
 * the disk for a while. */
static int raw_reserve(int fd, uint64_t bytes, uint64_t *room) {
    struct statvfs fs;
    int rc;
    *room = !fstatvfs(fd, &fs) && fs.f_blocks ? (uint64_t)fs.f_bavail * fs.f_frsize : bytes;
    if (bytes > *room) return ENOSPC;
    do rc = fallocate(fd, 0, 0, (off_t)bytes);
    while (rc && errno == EINTR);
    if (rc && errno == EOPNOTSUPP) rc = ftruncate(fd, (off_t)bytes);
    return rc ? errno : 0;
}

int offload_raw_open(offload *o, const char *dir, uint64_t bytes, dsv4_err *err) {
    static const char what[] = "a temporary file in ";
    int file = o->c->n_shards;
    uint64_t room = 0;
    char *name;
    assert(bytes > 0 && bytes % IO_ALIGN == 0);
    while (o->files[file].path) file++;
    assert(file < o->c->n_shards + RAW_FILES);
    if (asprintf(&name, "%s%s/dsv4-XX" "XX" "XX", what, dir) < 0) return fail(err, "out of memory");
    char *path = name + strlen(what);
    int fd = mkostemp(path, O_CLOEXEC);
    int why = fd < 0 || unlink(path) ? errno : raw_reserve(fd, bytes, &room);
    *strrchr(path, '/') = 0;       /* messages call it by what it is and by its directory       */
    if (!why) {
        io_file *f = &o->files[file];
        *f = (io_file){.fd = fd, .path = name, .size = bytes, .direct = go_direct(fd, true)};
        if (!f->direct && !o->note)
            o->note = "the file system that KV is moved to refuses O_DIRECT: it goes through the "
                      "page cache, which is slower; a local ext4 or XFS disk does not refuse";
        return file;
    }
    if (fd >= 0) close(fd);
    free(name);
    if (why == ENOSPC)
        return fail(err, "%s has no room for a file of %" PRIu64 " bytes, only for %" PRIu64
                    "; free some there, or choose another directory", dir, bytes, room);
    return fail(err, "make a file of %" PRIu64 " bytes in %s: %s; choose another directory", bytes,
                dir, strerror(why));
}

void offload_raw_close(offload *o, int file) {
    io_file *f = &o->files[file];
    assert(file >= o->c->n_shards && f->path);
    close(f->fd);
    free((char *)f->path);
    *f = (io_file){.path = NULL};
}

/* Begin `bytes` from r.off on, for r.batch.  Demand like a slot's: what waits for a request already
 * has it first, the background last. */
static int transfer(offload *o, io_req r, uint64_t bytes, dsv4_err *err) {
    for (uint64_t at = 0; at < bytes; at += IO_PIECE) {
        int rc = 0;
        o->batch_waits = true;
        while (!o->free_reqs && !rc) rc = io_reap(o, true, err);
        o->batch_waits = false;
        if (rc) return -1;
        r.batch->in_flight++;
        uint32_t n = io_begin(o, r, bytes - at);
        r.buf += n;
        r.off += n;
    }
    io_kick(o);
    return 0;
}

int batch_add(offload *o, io_batch *b, int file, bool write, void *buf, uint64_t off, size_t bytes,
              dsv4_err *err) {
    assert(file >= o->c->n_shards && o->files[file].path);
    assert(off % IO_ALIGN == 0 && bytes % IO_ALIGN == 0 && (uintptr_t)buf % IO_ALIGN == 0);
    assert(off <= o->files[file].size && bytes <= o->files[file].size - off);
    return transfer(o, (io_req){.file = file, .write = write, .buf = buf, .off = off, .batch = b},
                    bytes, err);
}

int batch_wait(offload *o, io_batch *b, dsv4_err *err) {
    int rc = 0;
    while (b->in_flight > 0 && !rc) rc = io_reap(o, true, err);
    if (!rc && b->fault.cause) rc = fault_message(o, &b->fault, err);
    *b = (io_batch){.in_flight = 0};
    return rc;
}

/* === 8. Caches ================================================================================
 * One arena of equal slots, each large enough for any group.  Reads land in place, so a run lies
 * in its slot as in its file, whole blocks, its payload off the edge by as much:
 *
 *   slot   |..[w1 w2 w3 .................].|..[s1 s2 s3 ...].|   two runs in the official shards,
 *          region 0                        region 1              six where nothing touches
 *
 * slot_of[] finds a group's slot.  A slot is in one list at most: its cache's free or idle ones,
 * or a queue of those whose pieces are not all asked for yet, which all caches share.  Each step
 * costs the same and none allocates.                                                             */

static void list_take(cache_slot *s) {
    assert(s->list);
    *(s->prev ? &s->prev->next : &s->list->first) = s->next;
    *(s->next ? &s->next->prev : &s->list->last) = s->prev;
    s->list = NULL;
}

static void list_put(slot_list *l, cache_slot *s, bool first) {
    assert(!s->list);
    s->list = l;
    s->prev = first ? NULL : l->last;
    s->next = first ? l->first : NULL;
    *(s->prev ? &s->prev->next : &l->first) = s;
    *(s->next ? &s->next->prev : &l->last) = s;
}

int tensors_by_place(const void *a, const void *b) {
    const ckpt_tensor *x = *(const ckpt_tensor *const *)a, *y = *(const ckpt_tensor *const *)b;
    return x->shard != y->shard ? x->shard - y->shard : by_offset(x, y);
}

/* Lay out one group: sort its parts as they lie in the files, merge those that touch, give each
 * run whole blocks of the slot.  Empty parts lie nowhere.  Returns the bytes of all. */
static size_t lay_out(const read_group *g, slot_run *runs, int *n_runs) {
    const ckpt_tensor *part[GROUP_PARTS];
    int n_parts = 0, n = 0;
    size_t used = 0;
    assert(g->n_parts <= GROUP_PARTS);
    for (int i = 0; i < g->n_parts; i++)
        if (g->part[i]->bytes > 0) part[n_parts++] = g->part[i];
    if (n_parts) qsort(part, (size_t)n_parts, sizeof *part, tensors_by_place);
    for (int i = 0; i < n_parts; n++) {
        const ckpt_tensor *first = part[i];
        uint64_t begin = first->offset, end = begin;
        for (; i < n_parts && part[i]->shard == first->shard && part[i]->offset <= end; i++)
            if (end < part[i]->offset + part[i]->bytes) end = part[i]->offset + part[i]->bytes;
        runs[n] = (slot_run){first, end - begin, used};
        used += (size_t)((begin % IO_ALIGN + (end - begin) + IO_ALIGN - 1) / IO_ALIGN * IO_ALIGN);
    }
    *n_runs = n;
    return used;
}

size_t cache_slot_bytes(const read_group *g, size_t n) {
    size_t most = IO_ALIGN;        /* also where all that there is are empty parts              */
    for (size_t i = 0; i < n; i++) {
        slot_run runs[GROUP_PARTS];
        int n_runs;
        size_t bytes = lay_out(&g[i], runs, &n_runs);
        if (most < bytes) most = bytes;
    }
    return most;
}

int cache_open(cache **out, offload *o, const read_group *groups, size_t n, int n_slots,
               dsv4_err *err) {
    assert(n >= 1);
    assert(n_slots >= 1);
    size_t slot_bytes = cache_slot_bytes(groups, n), bytes;
    bool fits = !__builtin_mul_overflow(slot_bytes, (size_t)n_slots, &bytes);
    cache *c = *out = fits ? calloc(1, sizeof *c) : NULL;
    if (c) {
        *c = (cache){.o = o, .groups = groups, .n_groups = n, .slot_bytes = slot_bytes};
        o->n_caches++;
    }
    if (c && !arena_open(&c->arena, bytes, "slots", err)) {
        c->slot_of = calloc(n, sizeof(cache_slot *));
        c->uses = calloc(n, sizeof *c->uses);
        c->heat = calloc(n, sizeof *c->heat);
        c->slots = calloc((size_t)n_slots, sizeof *c->slots);
    }
    if (!c || !c->slot_of || !c->uses || !c->heat || !c->slots) {
        cache_close(c);
        *out = NULL;
        return fail(err, "no memory for %d slots of %zu bytes; lower the memory budget", n_slots,
                    slot_bytes);
    }
    c->n_slots = n_slots;
    for (int i = 0; i < n_slots; i++) {
        c->slots[i].c = c;
        list_put(&c->free, &c->slots[i], false);
    }
    return 0;
}

/* What is on its way must land first.  Where the ring broke, the arena is left to reads that may
 * still come. */
void cache_close(cache *c) {
    if (!c) return;
    dsv4_err ignored;
    offload *o = c->o;
    for (int i = 0; i < c->n_slots; i++)
        if (c->slots[i].list == &o->demand || c->slots[i].list == &o->background)
            list_take(&c->slots[i]);
    while (c->in_flight > 0 && !io_reap(o, true, &ignored)) continue;
    if (!c->in_flight) arena_close(&c->arena);
    o->n_caches--;
    free(c->slots);
    free(c->heat);
    free(c->uses);
    free(c->slot_of);
    free(c);
}

/* Ask for pieces of queued slots, in order, while there are free requests.  The background has its
 * turn when nothing else is left to ask for. */
static void slot_feed(offload *o) {
    while (o->free_reqs && !o->ring_error) {
        cache_slot *s = o->demand.first;
        if (!s && !o->batch_waits && o->n_background < IO_BACKGROUND) s = o->background.first;
        if (!s || (s->rank == USED && o->in_flight >= IO_GETS)) return;
        cache *c = s->c;
        const slot_run *run = &s->runs[s->run];
        const ckpt_tensor *t = run->first;
        size_t which = (size_t)(s - c->slots);
        uint64_t begin = t->offset / IO_ALIGN * IO_ALIGN + s->at, end = t->offset + run->bytes;
        assert(s->state == SLOT_READING && begin < end);
        io_req r = {.file = t->shard, .off = begin, .t = t, .slot = s,
                    .buf = c->arena.base + c->slot_bytes * which + run->region + s->at,
                    .background = s->list == &o->background};
        s->in_flight++;
        c->in_flight++;
        s->at += io_begin(o, r, end - begin);
        if (t->offset / IO_ALIGN * IO_ALIGN + s->at < end) continue;
        s->at = 0;
        if (++s->run == s->n_runs) list_take(s);
    }
}

/* No pin and nothing on its way: its place among those that may go.  A slot that cache_pass() found
 * there has never left it. */
static void slot_rest(cache_slot *s) {
    cache *c = s->c;
    if (s->state == SLOT_FAILED) s->state = SLOT_FREE;
    slot_list *l = s->state == SLOT_FREE ? &c->free : s->rank == PASSING ? &c->passing : &c->idle;
    if (!s->list) list_put(l, s, s->rank != USED);
}

/* All that was asked for has come or failed.  A group that failed is forgotten: the next get reads
 * it anew. */
static void slot_settle(cache_slot *s) {
    s->state = s->fault.cause ? SLOT_FAILED : SLOT_READY;
    if (s->fault.cause) s->c->slot_of[s->id] = NULL;
    if (s->pins) return;
    s->c->n_orphans--;
    slot_rest(s);
}

/* A piece has come or failed.  The last one settles the slot; until then even a failed slot
 * stays READING, since the others still land in it. */
static void slot_piece_in(cache_slot *s) {
    assert(s->state == SLOT_READING);
    assert(s->in_flight > 0);
    s->in_flight--;
    s->c->in_flight--;
    if (s->fault.cause) {          /* ask for nothing more                                      */
        if (s->list) list_take(s);
        s->run = s->n_runs;
    }
    if (s->in_flight == 0 && s->run == s->n_runs) slot_settle(s);
}

static cache_slot *first_unpinned(const slot_list *l) {
    cache_slot *s = l->first;
    while (s && s->pins) s = s->next;
    return s;
}

/* A slot to fill: a free one; else what passes; else the last one that was asked for in the
 * background, if none of its reads has begun; else the coldest idle one; else NULL. */
static cache_slot *slot_take(cache *c) {
    cache_slot *s = c->free.first ? c->free.first : first_unpinned(&c->passing);
    if (!s)
        for (s = c->o->background.last; s && (s->c != c || s->run || s->at);) s = s->prev;
    if (!s) s = first_unpinned(&c->idle);
    if (!s) return NULL;
    c->n_orphans -= s->state == SLOT_READING;
    c->stats.evictions += s->list == &c->idle;
    list_take(s);
    assert(s->pins == 0);              /* never while somebody may still read it                */
    assert(s->in_flight == 0);         /* never while a read is landing in it                   */
    return s;
}

/* Fill a slot that was taken. */
static void slot_fill(cache_slot *s, size_t id, slot_rank rank) {
    cache *c = s->c;
    size_t bytes = lay_out(&c->groups[id], s->runs, &s->n_runs);
    assert(bytes <= c->slot_bytes);
    if (s->state != SLOT_FREE) c->slot_of[s->id] = NULL;
    s->state = SLOT_READING;
    s->rank = rank;
    s->pins = rank != ASKED;
    s->id = id;
    s->run = 0;
    s->at = 0;
    s->fault.cause = 0;
    c->slot_of[id] = s;
    c->n_orphans += !s->pins;
    if (s->n_runs) list_put(s->pins ? &c->o->demand : &c->o->background, s, false);
    else slot_settle(s);
    io_kick(c->o);
}

/* The whole policy, in this order: a hit, a slot to fill, a wait, a refusal.  What the background
 * has read, or has begun to, is a hit too: this get need not ask for it. */
static int slot_get(cache *c, size_t id, slot_rank rank, dsv4_err *err) {
    offload *o = c->o;
    assert(id < c->n_groups);
    err->msg[0] = 0;
    if (io_reap(o, false, err)) return -1;
    cache_slot *s = c->slot_of[id];
    if (s) {
        c->stats.hits++;
        c->uses[id].hits++;
        if (rank == USED) s->rank = USED;
        if (s->list == &o->background) { /* what is left of it, behind all that came before     */
            list_take(s);
            list_put(&o->demand, s, false);
            io_kick(o);
        }
        if (s->state == SLOT_READY && s->list && rank == USED) list_take(s);
        if (s->pins++ == 0 && s->state == SLOT_READING) c->n_orphans--;
        return (int)(s - c->slots);
    }
    /* Slots without a pin but with a read on its way: the caller has nothing to give back, so
     * waiting for the first of them is the only way on. */
    while (!(s = slot_take(c)) && c->n_orphans > 0)
        if (io_reap(o, true, err)) return -1;
    if (!s) return -1;
    c->stats.misses++;
    c->uses[id].misses++;
    slot_fill(s, id, rank);
    return (int)(s - c->slots);
}

int cache_get(cache *c, size_t id, dsv4_err *err) { return slot_get(c, id, USED, err); }
int cache_pass(cache *c, size_t id, dsv4_err *err) { return slot_get(c, id, PASSING, err); }

bool cache_holds(const cache *c, size_t id) {
    assert(id < c->n_groups);
    return c->slot_of[id] && c->slot_of[id]->state == SLOT_READY;
}

void cache_ask(cache *c, size_t id) {
    assert(id < c->n_groups);
    cache_slot *s = c->free.first;
    if (c->slot_of[id] || !s || c->o->ring_error) return;
    list_take(s);
    slot_fill(s, id, ASKED);
}

static cache_slot *pinned(const cache *c, int slot) {
    assert(slot >= 0 && slot < c->n_slots);
    assert(c->slots[slot].pins > 0);
    return &c->slots[slot];
}

int cache_wait(cache *c, int slot, dsv4_err *err) {
    cache_slot *s = pinned(c, slot);
    while (s->state == SLOT_READING) if (io_reap(c->o, true, err)) return -1;
    if (s->state == SLOT_FAILED) return fault_message(c->o, &s->fault, err);
    assert(s->state == SLOT_READY);
    return 0;
}

const void *cache_part(const cache *c, int slot, int part) {
    const cache_slot *s = pinned(c, slot);
    const read_group *g = &c->groups[s->id];
    assert(s->state == SLOT_READY);
    assert(part >= 0 && part < g->n_parts);
    const ckpt_tensor *t = g->part[part];
    const slot_run *run = s->runs, *end = s->runs + s->n_runs;
    const uint8_t *at = c->arena.base + c->slot_bytes * (size_t)slot;
    if (t->bytes == 0) return at;
    while (run < end && (run->first->shard != t->shard || t->offset < run->first->offset ||
                         t->offset >= run->first->offset + run->bytes))
        run++;
    assert(run < end);
    return at + run->region + run->first->offset % IO_ALIGN + (t->offset - run->first->offset);
}

void cache_unpin(cache *c, int slot) {
    cache_slot *s = pinned(c, slot);
    if (--s->pins > 0) return;
    if (s->state == SLOT_READING) c->n_orphans++;
    else slot_rest(s);
}

const cache_stats *cache_get_stats(const cache *c) { return &c->stats; }
const group_uses *cache_uses(const cache *c) { return c->uses; }

/* Places in heat[]: descending by what stands there, ties go to the lower id. */
static int by_heat(const void *a, const void *b) {
    const uint32_t *x = *(uint32_t *const *)a, *y = *(uint32_t *const *)b;
    return *x != *y ? (*x < *y) - (*x > *y) : (x > y) - (x < y);
}

/* {"heat": [n]}.  Groups that were never used are not asked for. */
void cache_load_heat(cache *c, const char *path) {
    dsv4_err ignored;
    size_t n = c->n_groups;
    json_t *root = parse_file(path, MAX_CONFIG_BYTES, &ignored);
    const json_t *heat = json_object_get(root, "heat");
    uint32_t **order = calloc(n, sizeof *order);
    bool good = order && json_array_size(heat) == n;
    for (size_t i = 0; good && i < n; i++) {
        const json_t *v = json_array_get(heat, i);
        good = whole(v) && json_integer_value(v) <= UINT32_MAX;
        c->heat[i] = (uint32_t)json_integer_value(v);
        order[i] = &c->heat[i];
    }
    if (good) qsort(order, n, sizeof *order, by_heat);
    else memset(c->heat, 0, n * sizeof *c->heat);
    for (size_t i = 0; good && i < n && *order[i]; i++) cache_ask(c, (size_t)(order[i] - c->heat));
    free(order);
    json_decref(root);
}

int cache_save_heat(const cache *c, const char *path, dsv4_err *err) {
    json_t *heat = json_array(), *root = json_pack("{s:o}", "heat", heat);
    int bad = root ? 0 : -1;
    for (size_t i = 0; i < c->n_groups; i++) {
        uint64_t sum = (uint64_t)c->heat[i] / 2 + c->uses[i].hits + c->uses[i].misses;
        bad |= json_array_append_new(heat, json_integer(sum < UINT32_MAX ? (json_int_t)sum
                                                        : UINT32_MAX));
    }
    int rc = bad ? fail(err, "write %s: out of memory", path) : write_json(root, path, err);
    json_decref(root);
    return rc;
}

/* === 9. Streams =============================================================================== */

typedef struct {                   /* some of an item's bytes                                   */
    const load_item *item;
    uint64_t at, n;                /* from its byte `at` on, n bytes                            */
    const uint8_t *data;
    io_batch batch;
} stream_range;
typedef int (*range_fn)(void *arg, const stream_range *r); /* nonzero stops */

/* Hand the bytes of items [n] to each(), all in order; the next ranges are on their way meanwhile.
 * Returns what each() did when it stopped. */
static int stream(offload *o, const load_item *items, size_t n, range_fn each, void *arg,
                  dsv4_err *err) {
    uint64_t most = 1;             /* bytes of a range                                          */
    for (size_t i = 0; i < n; i++) if (items[i].t->bytes > most) most = items[i].t->bytes;
    if (most > STREAM_BYTES) most = STREAM_BYTES;
    const size_t slot_bytes = (most + 3 * IO_ALIGN) / IO_ALIGN * IO_ALIGN;
    stream_range range[STREAM_SLOTS];
    dsv4_err ignored;
    arena map = {0};
    size_t asked = 0, taken = 0;
    uint64_t at = 0;
    int rc = arena_open(&map, STREAM_SLOTS * slot_bytes, "reading", err);
    while (!rc && (n > 0 || taken < asked)) {
        if (n == 0 || asked - taken == STREAM_SLOTS) {
            stream_range *r = &range[taken++ % STREAM_SLOTS];
            rc = batch_wait(o, &r->batch, err);
            if (!rc) rc = each(arg, r);
            continue;
        }
        const ckpt_tensor *t = items->t;
        stream_range *r = &range[asked % STREAM_SLOTS];
        uint8_t *slot = map.base + slot_bytes * (asked++ % STREAM_SLOTS);
        uint64_t left = t->bytes - at, off = t->offset + at, skip = off % IO_ALIGN;
        *r = (stream_range){items, at, left < most ? left : most, slot + skip, {0}};
        rc = transfer(o, (io_req){.file = t->shard, .off = off - skip, .buf = slot, .t = t,
                                  .batch = &r->batch}, skip + r->n, err);
        at += r->n;
        if (at == t->bytes) items++, n--, at = 0;
    }
    while (taken < asked) (void)batch_wait(o, &range[taken++ % STREAM_SLOTS].batch, &ignored);
    if (!o->ring_error) arena_close(&map);     /* else reads may still come                     */
    return rc;
}

static int load_range(void *arg, const stream_range *r) {
    (void)arg;
    memcpy((char *)r->item->dst + r->at, r->data, r->n);
    return 0;
}

int offload_load(offload *o, const load_item *items, size_t n, dsv4_err *err) {
    return stream(o, items, n, load_range, NULL, err);
}

/* What an earlier ckpt_hash() found: {NAME: "HASH DATE"}, the first date on which it was so. */
static json_t *record_read(const char *record, line_fn each, void *arg) {
    dsv4_err ignored;
    const char *name;
    json_t *value, *root = parse_file(record, MAX_CONFIG_BYTES, &ignored);
    bool good = root != NULL;
    json_object_foreach(root, name, value) good &= json_string_length(value) > HASH_CHARS;
    if (good) return root;
    if (!access(record, F_OK)) each(arg, "the record is damaged and counts for nothing");
    json_decref(root);
    return json_object();
}

/* Tell one shard's hash, and put it into the record.  1 where that said something else. */
static int record_shard(json_t *record, const char *file, const char *hash, line_fn each,
                        void *arg) {
    char now[HASH_CHARS + 16], line[2 * MAX_NAME + 64];
    time_t t = time(NULL);
    struct tm tm;
    const char *old = json_string_value(json_object_get(record, file));
    bool same = old && !strncmp(old, hash, HASH_CHARS);
    snprintf(line, sizeof line, "%.255s  %s  %s%.32s", file, hash, !old ? "new"
             : same ? "as on " : "CHANGED since ", old ? old + HASH_CHARS + 1 : "");
    each(arg, line);
    size_t n = (size_t)snprintf(now, sizeof now, "%s ", hash);
    strftime(now + n, sizeof now - n, "%Y-%m-%d", localtime_r(&t, &tm));
    if (!same) json_object_set_new(record, file, json_string(now));
    return old && !same;
}

typedef struct {
    XXH3_state_t *state;
    double done, total;            /* bytes                                                     */
    progress_fn progress;
    void *arg;
} hashing;

static int hash_range(void *arg, const stream_range *r) {
    hashing *h = arg;
    if (r->at == 0) XXH3_128bits_reset(h->state);
    XXH3_128bits_update(h->state, r->data, r->n);
    h->done += (double)r->n;
    return h->progress(h->arg, h->done / h->total);
}

/* The record is written after each shard: hours of reading survive whatever comes. */
int ckpt_hash(const ckpt *c, const char *record, line_fn each, progress_fn progress, void *arg,
              int *n_changed, dsv4_err *err) {
    hashing h = {XXH3_createState(), 0, 0, progress, arg};
    offload *o = NULL;
    const char *note;              /* a slower way of reading was told when the model opened    */
    json_t *root = record_read(record, each, arg);
    int rc = !h.state || !root ? fail(err, "out of memory") : offload_open(&o, c, &note, err);
    for (int i = 0; i < c->n_shards; i++) h.total += (double)c->shards[i].size;
    *n_changed = 0;
    for (int i = 0; !rc && i < c->n_shards; i++) {
        const ckpt_shard *shard = &c->shards[i];
        ckpt_tensor whole = {.shard = i, .bytes = shard->size};
        char hex[HASH_CHARS + 1];
        rc = stream(o, &(load_item){&whole, NULL}, 1, hash_range, &h, err);
        if (rc > 0) fail(err, "interrupted");
        if (rc) break;
        XXH128_hash_t hash = XXH3_128bits_digest(h.state);
        snprintf(hex, sizeof hex, "%016" PRIx64 "%016" PRIx64, hash.high64, hash.low64);
        *n_changed += record_shard(root, shard->file, hex, each, arg);
        rc = write_json(root, record, err);
    }
    offload_close(o);
    XXH3_freeState(h.state);
    json_decref(root);
    return rc ? -1 : 0;
}

typedef struct { double begin, now, limit, bytes; } measuring;

static int measure_range(void *arg, const stream_range *r) {
    measuring *m = arg;
    m->bytes += (double)r->n;
    m->now = now_s() - m->begin;
    return m->now > m->limit;
}

int disk_measure(const ckpt *c, uint64_t bytes, double limit, double *bytes_s, dsv4_err *err) {
    enum { MOST = 1024 };
    ckpt_tensor t[MOST];
    load_item items[MOST];
    offload *o;
    uint64_t total = 0, asked = 0;
    unsigned short rng[3] = {0};
    const char *note;
    size_t n = 0;
    for (int i = 0; i < c->n_shards; i++) total += c->shards[i].size;
    for (; n < MOST && asked < 2 * total; asked += t[n++].bytes) {
        int i = 0;                 /* each byte is as likely as another                         */
        uint64_t at = (uint64_t)(erand48(rng) * (double)total), size;
        for (; at >= (size = c->shards[i].size); i++) at -= size;
        uint64_t some = size < bytes ? size : bytes;
        if (at > size - some) at = size - some;
        t[n] = (ckpt_tensor){.shard = i, .offset = at / IO_ALIGN * IO_ALIGN, .bytes = some};
        items[n] = (load_item){&t[n], NULL};
    }
    if (offload_open(&o, c, &note, err)) return -1;
    measuring m = {now_s(), 0, limit, 0};
    int rc = stream(o, items, n, measure_range, &m, err);
    *bytes_s = m.bytes / m.now;
    offload_close(o);
    return rc < 0 ? -1 : 0;
}

/* === 10. This machine ========================================================================= */

enum { LINE = 2 * PATH_MAX };      /* mountinfo's have two paths and more                       */

/* The first line of a file that begins with `key`: what follows it there. */
static bool find_line(char rest[LINE], const char *path, const char *key) {
    bool found = false;
    FILE *f = fopen(path, "r");
    while (f && !found && fgets(rest, LINE, f)) found = !strncmp(rest, key, strlen(key));
    if (f) fclose(f);
    if (found) memmove(rest, rest + strlen(key), strcspn(rest + strlen(key), "\n") + 1);
    if (found) rest[strcspn(rest, "\n")] = 0;
    return found;
}

static uint64_t proc_number(const char *path, const char *key) {
    char rest[LINE];
    return find_line(rest, path, key) ? strtoull(rest, NULL, 10) : 0;
}

static uint64_t meminfo(const char *key) { return proc_number("/proc/meminfo", key) << 10; }

/* The memory limit of this process's cgroup (version 2) or of one above it; UINT64_MAX: none. */
static uint64_t cgroup_limit(void) {
    char group[LINE], path[LINE + 64], text[LINE];
    uint64_t least = UINT64_MAX;
    if (!find_line(group, "/proc/self/cgroup", "0::")) return least;
    for (;; *strrchr(group, '/') = 0) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", group);
        if (find_line(text, path, "") && *text >= '0' && *text <= '9' && /* else "max"        */
            strtoull(text, NULL, 10) < least)
            least = strtoull(text, NULL, 10);
        if (!strchr(group, '/')) return least;
    }
}

uint64_t machine_ram_total(void) {
    uint64_t total = meminfo("MemTotal:"), limit = cgroup_limit();
    return limit < total ? limit : total;
}

uint64_t machine_ram_budget(void) {
    uint64_t available = meminfo("MemAvailable:");
    uint64_t total = meminfo("MemTotal:"), gb = (uint64_t)1 << 30;
    uint64_t budget = available / 10 * 7, limit = cgroup_limit();
    if (limit < budget) budget = limit;
    if (total > 9 * gb && total - 8 * gb < budget) budget = total - 8 * gb;
    return budget > gb ? budget : gb;
}

void machine_rss(uint64_t *now, uint64_t *peak) {
    if (now) *now = proc_number("/proc/self/status", "VmRSS:") << 10;
    if (peak) *peak = proc_number("/proc/self/status", "VmHWM:") << 10;
}

/* A file of sysfs begins with this text. */
static bool sys_begins(const char *node, const char *file, const char *text) {
    char path[PATH_MAX + 32], rest[LINE];
    snprintf(path, sizeof path, "%s/%s", node, file);
    return find_line(rest, path, text);
}

/* A block device by its directory in sysfs: what it lies on is looked at, down to the drives.  Of a
 * partition the disk around it knows. */
static void describe_node(disk_info *d, const char *dir) {
    char node[PATH_MAX], path[PATH_MAX + 32];
    glob_t slaves;
    if (!realpath(dir, node)) return;
    d->encrypted |= sys_begins(node, "dm/uuid", "CRYPT-");
    snprintf(path, sizeof path, "%s/{,../}slaves/*", node);
    if (!glob(path, GLOB_BRACE, NULL, &slaves)) {
        for (size_t i = 0; i < slaves.gl_pathc; i++) describe_node(d, slaves.gl_pathv[i]);
        globfree(&slaves);
        return;
    }
    d->rotating |= sys_begins(node, "queue/rotational", "1") ||
                   sys_begins(node, "../queue/rotational", "1");
    d->sata |= strstr(node, "/ata") != NULL;
    if (!d->device[0]) snprintf(d->device, sizeof d->device, "%s", strrchr(node, '/') + 1);
}

/* The mount's own name of its file system says more than statfs(): "fuse.sshfs". */
static void describe_fs(disk_info *d) {
    static const char *const network[] = {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "lustre", "beegfs", "gpfs",
        "fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs", "fuse.glusterfs",
    };
    d->fuse = !strncmp(d->fs, "fuse", 4);
    for (size_t i = 0; i < sizeof network / sizeof *network; i++)
        d->network |= !strcmp(d->fs, network[i]);
}

int disk_describe(disk_info *d, const char *dir, const char *sysfs, dsv4_err *err) {
    char path[PATH_MAX], line[LINE], source[PATH_MAX] = "";
    struct statx at;
    struct stat disk;
    *d = (disk_info){.fs = "unknown"};
    if (statx(AT_FDCWD, dir, 0, STATX_MNT_ID, &at))
        return fail(err, "open %s: %s", dir, strerror(errno));
    dev_t dev = makedev(at.stx_dev_major, at.stx_dev_minor);
    snprintf(path, sizeof path, "%" PRIu64 " ", (uint64_t)at.stx_mnt_id);
    bool found = find_line(line, "/proc/self/mountinfo", path);
    const char *tail = found ? strstr(line, " - ") : NULL;     /* optional fields end there     */
    if (tail) sscanf(tail, " - %31s %4095s", d->fs, source);
    describe_fs(d);
    /* btrfs and the like have a device number of their own: their source may be a disk's */
    if (!major(dev) && !strncmp(source, "/dev/", 5) && !stat(source, &disk)) dev = disk.st_rdev;
    snprintf(path, sizeof path, "%s/dev/block/%u:%u", sysfs, major(dev), minor(dev));
    if (major(dev)) describe_node(d, path);
    return 0;
}
