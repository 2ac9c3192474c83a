/* test_offload.c -- config, headers, checkpoint, reads and caches, through the public
 * calls, on files it writes itself; then the same with reads that fail in every way we know.
 *
 * Faults   offload.c is included with pread, pwrite, io_uring_cqe_get_data and what makes files
 *          bent to the hooks of section 1: what the kernel answered is changed where it arrives.
 * Files    byte `off` of shard s is byte_at(s, off), so every read can be checked by itself.
 * Usage    test_offload [real-headers.tar.xz]                                                   */
#define _GNU_SOURCE 1
#include <fcntl.h>
#include <liburing.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

static ssize_t hook_pread(int fd, void *buf, size_t n, off_t off);
static ssize_t hook_pwrite(int fd, const void *buf, size_t n, off_t off);
static int hook_open(const char *path, int flags, ...);
static int hook_fallocate(int fd, int mode, off_t off, off_t n);
static int hook_ring(unsigned entries, struct io_uring *ring, unsigned flags);
static int hook_wait(struct io_uring *ring, unsigned n);
static void *hook_cqe(struct io_uring_cqe *cqe);
static void hook_sqe(struct io_uring_sqe *sqe, void *req);
#define pread hook_pread
#define pwrite hook_pwrite
#define open hook_open
#define fallocate hook_fallocate
#define io_uring_queue_init hook_ring
#define io_uring_submit_and_wait hook_wait
#define io_uring_cqe_get_data hook_cqe
#define io_uring_sqe_set_data hook_sqe
#include "../offload.c"
#undef pread
#undef pwrite
#undef open
#undef fallocate
#undef io_uring_queue_init
#undef io_uring_submit_and_wait
#undef io_uring_cqe_get_data
#undef io_uring_sqe_set_data

#include "check.h"

/* === 1. Hooks ================================================================================= */

typedef enum { CALM, NTH, AT, SHORT, INTR, AGAIN, PLACE } mood;

typedef struct {
    const cache *c;                /* of a batch: NULL                                          */
    const cache_slot *slot;
    size_t id;
    bool background;
} logged;

static struct {
    pthread_mutex_t lock;          /* of the moods: reading threads are asked for theirs        */
    bool refuse_ring, refuse_direct, refuse_tmpfile;
    int refuse_room;               /* errno of fallocate, or 0                                  */
    const offload *raw;            /* whose raw files a write that is bent spoils               */
    int ring_waits;                /* -errno that the next waits give, or 0                     */
    int n_ring_waits;              /* how many of them                                          */
    mood mood;
    int answer;                    /* NTH, AT, PLACE: what the read gives, as the kernel would  */
    int nth;                       /* NTH, PLACE: which read, from 1                            */
    int times;                     /* PLACE: it and the next ones of the same place             */
    int shard, fd;                 /* AT: every read of this file that touches byte `at`        */
    uint64_t at;
    int place;                     /* PLACE: the file that was hit                              */
    atomic_int seen;               /* reads since the mood was set                              */
    atomic_uint rng;
    logged log[4096];              /* what the ring was asked for, in order                     */
    int n_log;
} hook = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void set_mood(mood m, int gives, int nth) {
    pthread_mutex_lock(&hook.lock);
    hook.mood = m;
    hook.answer = gives;
    hook.nth = nth;
    hook.times = INT_MAX;
    hook.place = -1;
    hook.seen = 0;
    hook.rng = 1;
    pthread_mutex_unlock(&hook.lock);
}

static uint32_t hook_random(void) {
    uint32_t x = atomic_fetch_add(&hook.rng, 0x9e3779b9u);
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

/* The n-th read, and its place in this file `times` times in all. */
static int bend_place(int file, uint64_t off, size_t n, int seen, int res) {
    if (seen == hook.nth) {
        hook.place = file;
        hook.at = off;
    } else if (file != hook.place || off > hook.at || off + n <= hook.at) {
        return res;
    }
    if (hook.times <= 0) return res;
    hook.times--;
    return hook.answer > 0 && res > 0 ? (int)(hook_random() % (uint32_t)res) + 1 : hook.answer;
}

/* What a read of n bytes that would give `res` gives in this mood. */
static int bend(int file, bool this_file, uint64_t off, size_t n, int res) {
    int seen = ++hook.seen;
    switch (hook.mood) {
    case NTH: return seen == hook.nth ? hook.answer : res;
    case AT: return this_file && off <= hook.at && hook.at < off + n ? hook.answer : res;
    case SHORT:                    /* now and then whole, as the last piece of a file must come */
        return res > 0 && hook_random() % 4 ? 1 + (int)(hook_random() % (uint32_t)res) : res;
    case INTR: return hook_random() % 2 ? -EINTR : res;
    case AGAIN: return -EAGAIN;
    case PLACE: return bend_place(file, off, n, seen, res);
    default: return res;
    }
}

static ssize_t hook_pread(int fd, void *buf, size_t n, off_t off) {
    if (hook.refuse_direct && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        errno = EINVAL;
        return -1;
    }
    int res = (int)pread(fd, buf, n, off);
    pthread_mutex_lock(&hook.lock);
    int bent = bend(fd, fd == hook.fd, (uint64_t)off, n, res);
    pthread_mutex_unlock(&hook.lock);
    if (bent < res) memset((char *)buf + (bent > 0 ? bent : 0), 0xee,
                           (size_t)(res - (bent > 0 ? bent : 0)));
    if (bent >= 0 || res < 0) return res < 0 ? res : bent;
    errno = -bent;
    return -1;
}

/* What a write of which `bent` of `res` bytes are acknowledged leaves behind: garbage from the last
 * whole block on. */
static void spoil(int fd, uint64_t off, int bent, int res) {
    static _Alignas(IO_ALIGN) uint8_t garbage[IO_PIECE];
    int from = bent > 0 ? bent / IO_ALIGN * IO_ALIGN : 0;
    memset(garbage, 0xee, sizeof garbage);
    if (bent >= res || pwrite(fd, garbage, (size_t)(res - from), (off_t)off + from) > 0) return;
    printf("FAIL cannot spoil a write\n");
    exit(1);
}

static ssize_t hook_pwrite(int fd, const void *buf, size_t n, off_t off) {
    if (hook.refuse_direct && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        errno = EINVAL;
        return -1;
    }
    int res = (int)pwrite(fd, buf, n, off);
    pthread_mutex_lock(&hook.lock);
    int bent = bend(fd, fd == hook.fd, (uint64_t)off, n, res);
    spoil(fd, (uint64_t)off, bent, res);
    pthread_mutex_unlock(&hook.lock);
    if (bent >= 0) return bent;
    errno = -bent;
    return -1;
}

static int hook_open(const char *path, int flags, ...) {
    if (hook.refuse_tmpfile && (flags & O_TMPFILE) == O_TMPFILE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return open(path, flags, 0600);
}

static int hook_fallocate(int fd, int mode, off_t off, off_t n) {
    errno = hook.refuse_room;
    return errno ? -1 : fallocate(fd, mode, off, n);
}

static int hook_ring(unsigned entries, struct io_uring *ring, unsigned flags) {
    return hook.refuse_ring ? -EPERM : io_uring_queue_init(entries, ring, flags);
}

static int hook_wait(struct io_uring *ring, unsigned n) {
    if (hook.n_ring_waits > 0) {
        hook.n_ring_waits--;
        return hook.ring_waits;
    }
    return io_uring_submit_and_wait(ring, n);
}

static void *hook_cqe(struct io_uring_cqe *cqe) {
    io_req *r = io_uring_cqe_get_data(cqe);
    int bent = bend(r->file, r->file == hook.shard, r->off + r->done, r->len - r->done, cqe->res);
    if (r->write) spoil(hook.raw->files[r->file].fd, r->off + r->done, bent, cqe->res);
    for (int i = bent > 0 ? bent : 0; i < cqe->res && !r->write; i++)
        r->buf[r->done + (uint32_t)i] = 0xee;
    cqe->res = bent;
    return r;
}

static void hook_sqe(struct io_uring_sqe *sqe, void *req) {
    const io_req *r = req;
    if (hook.n_log < (int)(sizeof hook.log / sizeof *hook.log))
        hook.log[hook.n_log++] = (logged){r->slot ? r->slot->c : NULL, r->slot,
                                          r->slot ? r->slot->id : 0, r->background};
    io_uring_sqe_set_data(sqe, req);
}

/* === 2. Files ================================================================================= */

static char top[PATH_MAX - 300];   /* our temporary directory                                   */
static const char *real_headers = "tests/goldens/real-headers.tar.xz";

/* Bytes off & ~7 and the next seven of a shard's file. */
static uint64_t word_at(int shard, uint64_t off) {
    uint64_t x = (off >> 3) * 0x9e3779b97f4a7c15u + (uint64_t)shard * 0xd1b54a32d192ed03u + 1;
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

static uint8_t byte_at(int shard, uint64_t off) {
    return (uint8_t)(word_at(shard, off) >> 8 * (off & 7));
}

static bool bytes_right(const uint8_t *p, int shard, uint64_t off, uint64_t n) {
    uint64_t i = 0;
    while (i < n) {
        uint64_t w = word_at(shard, off + i) >> 8 * ((off + i) & 7);
        do if (p[i++] != (uint8_t)w) return false;
        while (w >>= 8, i < n && (off + i) & 7);
    }
    return true;
}

static void write_file(const char *dir, const char *file, const void *data, size_t n) {
    char path[PATH_MAX + 256];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) {
        printf("FAIL cannot write %s\n", path);
        exit(1);
    }
}

/* A fresh empty directory under top. */
static const char *fresh_dir(void) {
    static char dir[PATH_MAX];
    static int n;
    snprintf(dir, sizeof dir, "%s/%d", top, n++);
    mkdir(dir, 0700);
    return dir;
}

/* A safetensors file: header as given, then data_bytes of byte_at(). */
static void write_shard(const char *dir, const char *file, int shard, const char *header,
                        size_t data_bytes) {
    size_t len = strlen(header), n = 8 + len + data_bytes;
    uint8_t *all = malloc(n);
    for (size_t i = 0; i < 8; i++) all[i] = (uint8_t)((uint64_t)len >> 8 * i);
    memcpy(all + 8, header, len);
    for (size_t i = 8 + len; i < n; i++) all[i] = byte_at(shard, i);
    write_file(dir, file, all, n);
    free(all);
}

typedef struct { char *text; size_t n, cap; } str;

static void put(str *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void put(str *s, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    if (s->n + 1024 > s->cap) s->text = realloc(s->text, s->cap = 2 * s->cap + 4096);
    s->n += (size_t)vsnprintf(s->text + s->n, 1024, fmt, ap);
    va_end(ap);
}

/* Remove a directory of files and of such directories. */
static void remove_tree(const char *dir) {
    char command[PATH_MAX + 32];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    if (system(command)) printf("     could not remove %s\n", dir);
}

static bool says(const dsv4_err *err, const char *fragment) {
    return strstr(err->msg, fragment) && !strchr(err->msg, '\n') && err->msg[0];
}

/* === 3. Config ================================================================================ */

static const char base_config[] =
    "{\"model_type\": \"deepseek_v4\", \"expert_dtype\": \"fp4\", \"norm_topk_prob\": true,"
    "\"topk_method\": \"noaux_tc\", \"scoring_func\": \"sqrtsoftplus\", \"hidden_size\": 256,"
    "\"num_hidden_layers\": 3, \"num_attention_heads\": 8, \"num_key_value_heads\": 1,"
    "\"head_dim\": 128, \"qk_rope_head_dim\": 64, \"q_lora_rank\": 128, \"o_lora_rank\": 128,"
    "\"o_groups\": 2, \"sliding_window\": 16, \"index_n_heads\": 4, \"index_head_dim\": 64,"
    "\"index_topk\": 8, \"n_routed_experts\": 8, \"num_experts_per_tok\": 2,"
    "\"n_shared_experts\": 1, \"moe_intermediate_size\": 128, \"num_hash_layers\": 2,"
    "\"hc_mult\": 4, \"hc_sinkhorn_iters\": 20, \"hc_eps\": 1e-6, \"rms_norm_eps\": 1e-6,"
    "\"vocab_size\": 512, \"num_nextn_predict_layers\": 1, \"max_position_embeddings\": 1024,"
    "\"rope_theta\": 10000, \"compress_rope_theta\": 160000.0, \"swiglu_limit\": 10,"
    "\"routed_scaling_factor\": 1.5, \"bos_token_id\": 0, \"eos_token_id\": 1,"
    "\"compress_ratios\": [0, 4, 128, 0, 0, 0],"
    "\"quantization_config\": {\"fmt\": \"e4m3\", \"scale_fmt\": \"ue8m0\","
    "  \"weight_block_size\": [128, 128], \"quant_method\": \"fp8\"},"
    "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 16, \"beta_fast\": 32, \"beta_slow\": 1,"
    "  \"original_max_position_embeddings\": 64}}";

/* The base with one key ("a" or "a.b") set to a JSON value, or removed. */
static int parse_edited(dsv4_config *cfg, const char *key, const char *value, dsv4_err *err) {
    json_t *root = json_loads(base_config, 0, NULL), *at = root;
    const char *dot = strchr(key, '.');
    char outer[64];
    snprintf(outer, sizeof outer, "%.*s", dot ? (int)(dot - key) : 0, key);
    if (dot) at = json_object_get(root, outer);
    if (value) json_object_set_new(at, dot ? dot + 1 : key,
                                   json_loads(value, JSON_DECODE_ANY, NULL));
    else json_object_del(at, dot ? dot + 1 : key);
    char *text = json_dumps(root, 0);
    int rc = config_parse(cfg, text, strlen(text), "cfg.json", err);
    free(text);
    json_decref(root);
    return rc;
}

static void test_config_reads_every_value(void) {
    dsv4_config c;
    dsv4_err err = {""};
    CHECK(!config_parse(&c, base_config, sizeof base_config - 1, "x", &err), "%s", err.msg);
    CHECK(c.hidden_size == 256 && c.num_hidden_layers == 3 && c.num_attention_heads == 8, "sizes");
    CHECK(c.head_dim == 128 && c.qk_rope_head_dim == 64 && c.q_lora_rank == 128, "sizes");
    CHECK(c.o_lora_rank == 128 && c.o_groups == 2 && c.sliding_window == 16, "sizes");
    CHECK(c.index_n_heads == 4 && c.index_head_dim == 64 && c.index_topk == 8, "sizes");
    CHECK(c.n_routed_experts == 8 && c.num_experts_per_tok == 2, "experts");
    CHECK(c.n_shared_experts == 1 && c.moe_intermediate_size == 128, "experts");
    CHECK(c.num_hash_layers == 2 && c.hc_mult == 4 && c.hc_sinkhorn_iters == 20, "hc");
    CHECK(c.vocab_size == 512 && c.num_nextn_predict_layers == 1, "vocab");
    CHECK(c.max_position_embeddings == 1024, "positions");
    CHECK(c.rope_theta == 10000 && c.compress_rope_theta == 160000, "theta");
    CHECK(c.yarn_factor == 16 && c.yarn_beta_fast == 32 && c.yarn_beta_slow == 1, "yarn");
    CHECK(c.yarn_original == 64 && c.swiglu_limit == 10 && c.routed_scaling_factor == 1.5f, "f");
    CHECK(c.hc_eps == 1e-6f && c.rms_norm_eps == 1e-6f, "eps");
    CHECK(c.bos_token_id == 0 && c.eos_token_id == 1, "tokens");
    CHECK(c.compress_ratios[1] == 4 && c.compress_ratios[2] == 128 && !c.compress_ratios[3], "r");
}

static void test_config_accepts_what_may_differ(void) {
    static const struct { const char *key, *value; } good[] = {
        {"rope_theta", "10000.5"}, {"quantization_config", NULL}, {"quantization_config", "null"},
        {"num_key_value_heads", NULL}, {"compress_ratios", "[4, 4, 128]"},
        {"compress_ratios", "[0, 2, 8192, 4, 1, -1]"}, {"num_hash_layers", "0"},
        {"quantization_config.fmt", NULL}, {"swiglu_limit", "7"}, {"bos_token_id", "511"},
        {"something_new", "{\"a\": [1, 2]}"}, {"num_nextn_predict_layers", "0"},
    };
    dsv4_config c;
    dsv4_err err = {""};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK(!parse_edited(&c, good[i].key, good[i].value, &err), "%s: %s", good[i].key, err.msg);
    /* rope_scaling may be null where nothing is compressed, and only there */
    json_t *root = json_loads(base_config, 0, NULL);
    json_object_set_new(root, "compress_ratios", json_loads("[0,0,0,0]", 0, NULL));
    json_object_set_new(root, "rope_scaling", json_null());
    char *text = json_dumps(root, 0);
    CHECK(!config_parse(&c, text, strlen(text), "x", &err), "%s", err.msg);
    CHECK(c.yarn_factor == 1, "factor %g", c.yarn_factor);
    free(text);
    json_decref(root);
}

static void test_config_refuses_by_name(void) {
    static const struct { const char *key, *value, *fragment; } bad[] = {
        {"model_type", "\"deepseek_v41\"",
         "deepseek_v41 is another architecture; this program runs deepseek_v4"},
        {"model_type", "\"llama\"", "llama is another architecture"},
        {"model_type", "\"a\\nb\"", "is another architecture"},
        {"model_type", NULL, "model_type is absent"}, {"model_type", "4", "model_type is 4"},
        {"expert_dtype", "\"fp8\"", "expert_dtype is \"fp8\"; accepted: \"fp4\""},
        {"expert_dtype", NULL, "expert_dtype is absent"},
        {"norm_topk_prob", "false", "norm_topk_prob is false; accepted: true"},
        {"norm_topk_prob", "1", "norm_topk_prob is 1"},
        {"topk_method", "\"greedy\"", "topk_method is \"greedy\""},
        {"scoring_func", "\"sigmoid\"", "scoring_func is \"sigmoid\""},
        {"n_shared_experts", "2", "n_shared_experts is 2"},
        {"num_key_value_heads", "8", "num_key_value_heads is 8; accepted: 1"},
        {"quantization_config.fmt", "\"e5m2\"", "quantization_config.fmt is \"e5m2\""},
        {"quantization_config.scale_fmt", "\"f32\"", "scale_fmt is \"f32\""},
        {"quantization_config.weight_block_size", "[64,128]", "weight_block_size is [64,128]"},
        {"rope_scaling.type", "\"linear\"", "rope_scaling.type is \"linear\""},
        {"rope_scaling.type", NULL, "rope_scaling.type is absent"},
        {"rope_scaling.factor", "0", "rope_scaling.factor is 0"},
        {"rope_scaling.factor", "\"16\"", "rope_scaling.factor is \"16\""},
        {"rope_scaling.beta_fast", "0.5", "beta_fast is 0.5; accepted: numbers from beta_slow"},
        {"rope_scaling.beta_slow", "-1", "beta_slow is -1"},
        {"rope_scaling.original_max_position_embeddings", NULL, "embeddings is absent"},
        {"rope_scaling", "null", "rope_scaling.type is absent"},
        {"rope_scaling", NULL, "rope_scaling.type is absent"},
        {"rope_theta", "1", "rope_theta is 1"}, {"rope_theta", "-5.0", "rope_theta is -5.0"},
        {"compress_rope_theta", "1e300", "compress_rope_theta is 1e300"},
        {"swiglu_limit", "0", "swiglu_limit is 0"}, {"hc_eps", "0", "hc_eps is 0"},
        {"rms_norm_eps", "1e-60", "rms_norm_eps is 1e-60"},
        {"rms_norm_eps", "\"x\"", "rms_norm_eps is \"x\""},
        {"routed_scaling_factor", "[1.5]", "routed_scaling_factor is [1.5]"},
    };
    dsv4_config c;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dsv4_err err = {""};
        int rc = parse_edited(&c, bad[i].key, bad[i].value, &err);
        CHECK(rc == -1 && says(&err, bad[i].fragment) && says(&err, "cfg.json: "),
              "%s = %s gave %d: %s", bad[i].key, bad[i].value, rc, err.msg);
    }
}

static void test_config_bounds_every_size(void) {
    /* each number: absent, a text, below and above its range; each whole one: a fraction */
    for (const field *f = config_fields; f->key; f++) {
        char below[32], above[32], fragment[128];
        snprintf(below, sizeof below, f->multiple ? "%.0f" : "%.17g",
                 f->multiple ? f->lo - 1 : f->lo * 0.999);
        snprintf(above, sizeof above, f->multiple ? "%.0f" : "%.17g",
                 f->multiple ? f->hi + f->multiple : f->hi * 1.001);
        snprintf(fragment, sizeof fragment, "%s is ", f->key);
        const char *bad[] = {NULL, "\"64\"", "true", "null", below, above, "-1e300",
                             f->multiple ? "1.5" : "1e300", "9223372036854775807"};
        for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
            dsv4_config c;
            dsv4_err err = {""};
            int rc = parse_edited(&c, f->key, bad[k], &err);
            CHECK(rc == -1 && says(&err, fragment), "%s = %s gave %d: %s", f->key, bad[k], rc,
                  err.msg);
        }
    }
}

static void test_config_refuses_contradictions(void) {
    static const struct { const char *key, *value, *fragment; } bad[] = {
        {"hidden_size", "250", "multiples of 32"},
        {"moe_intermediate_size", "100", "multiples of 32"},
        {"qk_rope_head_dim", "63", "multiples of 2"},
        {"qk_rope_head_dim", "128", "qk_rope_head_dim is 128; accepted: less than head_dim"},
        {"index_head_dim", "32", "qk_rope_head_dim is 64; accepted: at most index_head_dim"},
        {"index_head_dim", "96", "index_head_dim is 96; accepted: a power of two"},
        {"o_groups", "3", "o_groups is 3; accepted: a divisor"},
        {"num_experts_per_tok", "9", "accepted: at most n_routed_experts"},
        {"num_hash_layers", "4", "accepted: at most num_hidden_layers"},
        {"bos_token_id", "512", "bos_token_id is 512; accepted: less than vocab_size"},
        {"eos_token_id", "512", "eos_token_id is 512"},
        {"num_attention_heads", "32768", NULL},
        {"head_dim", "1025", "head_dim is 1025; accepted: whole numbers from 2 to 1024"},
        {"index_head_dim", "2048", "accepted: whole numbers from 1 to 1024"},
        {"hidden_size", "32768", NULL}, {"sliding_window", "32768", NULL},
        {"o_lora_rank", "32768", NULL}, {"max_position_embeddings", "0", "embeddings is 0"},
        {"max_position_embeddings", "4611686018427387904", "max_position_embeddings is 46"},
        {"compress_ratios", "[0, 4]", "one for each of num_hidden_layers"},
        {"compress_ratios", "4", "compress_ratios is 4"},
        {"compress_ratios", NULL, "compress_ratios is absent"},
        {"compress_ratios", "[0, 1, 0]", "compress_ratios[1] is 1"},
        {"compress_ratios", "[0, 0, -4]", "compress_ratios[2] is -4"},
        {"compress_ratios", "[0, 0, 0, 8193]", "compress_ratios[3] is 8193"},
        {"compress_ratios", "[0, \"4\", 0]", "compress_ratios[1] is \"4\""},
        {"compress_ratios", "[0, 4.0, 0]", "compress_ratios[1] is 4.0"},
    };
    dsv4_config c;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dsv4_err err = {""};
        int rc = parse_edited(&c, bad[i].key, bad[i].value, &err);
        if (!bad[i].fragment) {    /* large, but no product of it overflows                     */
            CHECK(rc == 0, "%s = %s gave %s", bad[i].key, bad[i].value, err.msg);
            continue;
        }
        CHECK(rc == -1 && says(&err, bad[i].fragment), "%s = %s gave %d: %s", bad[i].key,
              bad[i].value, rc, err.msg);
    }
}

static void test_config_is_read_from_a_directory(void) {
    const char *dir = fresh_dir();
    char slash[PATH_MAX + 8];
    dsv4_config c;
    dsv4_err err = {""};
    CHECK(config_load(&c, dir, &err) == -1 && says(&err, "it has no config.json"), "%s",
          err.msg);
    write_file(dir, "config.json", base_config, sizeof base_config - 1);
    snprintf(slash, sizeof slash, "%s/./", dir);
    CHECK(!config_load(&c, slash, &err), "%s", err.msg);
    CHECK(!strcmp(c.name, strrchr(dir, '/') + 1), "name is %s", c.name);
    static const struct { const char *text, *fragment; } bad[] = {
        {"", "config.json: line"}, {"[1]", "holds [1], not a JSON object"},
        {"{\"a\": 1, \"a\": 2}", "duplicate object key"},
        {"{\"a\": \"x\ny\"}", "config.json: line"},
        {"{\"hidden_size\": 1e999}", "config.json: line"}, {"{} x", "config.json: line"},
        {"{\"hidden_size\": 99999999999999999999}", "config.json: line"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_file(dir, "config.json", bad[i].text, strlen(bad[i].text));
        CHECK(config_load(&c, dir, &err) == -1 && says(&err, bad[i].fragment), "%s: %s",
              bad[i].text, err.msg);
    }
}

/* === 4. Headers and checkpoints =============================================================== */

static int open_dir(const char *dir, dsv4_err *err) {
    ckpt *c;
    err->msg[0] = 0;
    int rc = ckpt_open(&c, dir, err);
    ckpt_close(c);
    return rc;
}

#define T(name, dtype, shape, offsets)                                                           \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", \"data_offsets\": " offsets "}"

static void test_header_accepts_the_format(void) {
    static const char header[] =
        "{\"__metadata__\": {\"format\": \"pt\"}," T("b", "F32", "[2,2]", "[0,16]") ","
        T("empty", "F32", "[0,7]", "[4,4]") "," T("a", "I8", "[3]", "[20,23]") ","
        T("scalar", "BF16", "[]", "[16,18]") "," T("five", "I8", "[1,1,1,1,2]", "[18,20]") ","
        T("strange", "F4_E2M1X7", "[3]", "[23,25]") "," T("u8", "U8", "[5]", "[25,30]")
        "}   ";
    const char *dir = fresh_dir();
    dsv4_err err = {""};
    ckpt *c;
    write_shard(dir, "x.safetensors", 0, header, 30 + 5);
    CHECK(!ckpt_open(&c, dir, &err), "%s", err.msg);
    if (!c) return;
    CHECK(ckpt_n_tensors(c) == 4 && ckpt_n_shards(c) == 1, "%zu tensors", ckpt_n_tensors(c));
    const char *order[] = {"a", "b", "empty", "scalar"};
    for (size_t i = 0; i < ckpt_n_tensors(c); i++)
        CHECK(!strcmp(ckpt_at(c, i)->name, order[i]), "tensor %zu is %s", i, ckpt_at(c, i)->name);
    const ckpt_tensor *b = ckpt_find(c, "b");
    CHECK(b && b->dtype == DT_F32 && b->n_dims == 2 && b->shape[0] == 2 && b->shape[1] == 2 &&
          b->bytes == 16 && b->offset == 8 + strlen(header) && b->shard == 0, "b");
    CHECK(!ckpt_find(c, "five") && !ckpt_find(c, "u8") && !ckpt_find(c, ""), "not ours");
    CHECK(strstr(ckpt_shard_path(c, 0), "/x.safetensors"), "%s", ckpt_shard_path(c, 0));
    ckpt_close(c);
}

static void test_header_refuses_damage(void) {
    static const struct { const char *header, *fragment; } bad[] = {
        {"{ ", "line 1"}, {"[]", "not a JSON object"}, {"{}}", "line 1"},
        {"{" T("a", "I8", "[4]", "[0,4]") "," T("a", "I8", "[4]", "[4,8]") "}", "duplicate"},
        {"{\"a\": 5}", "tensor a: dtype is absent"},
        {"{\"a\": {\"shape\": [4], \"data_offsets\": [0,4]}}", "tensor a: dtype is absent"},
        {"{\"a\": {\"dtype\": \"I8\", \"data_offsets\": [0,4]}}", "tensor a: shape is absent"},
        {"{\"a\": {\"dtype\": \"I8\", \"shape\": [4]}}", "tensor a: data_offsets is absent"},
        {"{" T("a", "I8", "4", "[0,4]") "}", "tensor a: shape is 4"},
        {"{" T("a", "I8", "[-4]", "[0,4]") "}", "tensor a: shape is [-4]"},
        {"{" T("a", "I8", "[4.0]", "[0,4]") "}", "tensor a: shape is [4.0]"},
        {"{" T("a", "I8", "[4]", "[4,0]") "}", "tensor a: data_offsets is [4,0]"},
        {"{" T("a", "I8", "[4]", "[-1,3]") "}", "tensor a: data_offsets is [-1,3]"},
        {"{" T("a", "I8", "[4]", "[0,4,8]") "}", "tensor a: data_offsets is [0,4,8]"},
        {"{" T("a", "I8", "[4]", "[0,\"4\"]") "}", "tensor a: data_offsets is [0,\"4\"]"},
        {"{" T("a", "I8", "[5]", "[0,4]") "}", "needs 5 bytes but data_offsets give 4"},
        {"{" T("a", "F32", "[2]", "[0,4]") "}", "shape [2] of F32 needs 8 bytes"},
        {"{" T("a", "F64", "[2]", "[0,8]") "}", "shape [2] of F64 needs 16 bytes"},
        {"{" T("a", "I8", "[1,1,1,1,9]", "[0,4]") "}", "needs 9 bytes"},
        {"{" T("a", "I8", "[4294967296,4294967296]", "[0,0]") "}", "fits 64 bits"},
        {"{" T("a", "I64", "[2305843009213693952]", "[0,0]") "}", "fits 64 bits"},
        {"{" T("a", "I8", "[9223372036854775808]", "[0,0]") "}", "line 1"},
        {"{" T("a", "I8", "[4]", "[0,4]") "," T("b", "I8", "[4]", "[3,7]") "}",
         "tensors a and b overlap"},
        {"{" T("a", "I8", "[8]", "[0,8]") "," T("z", "I8", "[0]", "[2,2]") ","
         T("b", "U8", "[1]", "[4,5]") "}", "tensors a and b overlap"},
        {"{" T("a", "I8", "[65]", "[0,65]") "}", "the file is cut short, download it again"},
        {"{" T("a", "WHAT", "[1]", "[0,65]") "}", "the file is cut short, download it again"},
        {"{" T("a", "WHAT", "[1]", "[9223372036854775000,9223372036854775807]") "}", "cut short"},
        {"{" T("", "I8", "[4]", "[0,4]") "}", "a tensor's name has 0 bytes"},
        {"{\"a\\u0000b\": 1}", "line 1"}, {"{\"\\ud800\": 1}", "line 1"},
        {"{\"\xff\": 1}", "line 1"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *dir = fresh_dir();
        dsv4_err err;
        write_shard(dir, "m.safetensors", 0, bad[i].header, 64);
        int rc = open_dir(dir, &err);
        CHECK(rc == -1 && says(&err, bad[i].fragment) && says(&err, "m.safetensors: "),
              "%s gave %d: %s", bad[i].header, rc, err.msg);
    }
    char longest[2 * MAX_NAME + 64], name[MAX_NAME + 1];
    for (int n = MAX_NAME - 1; n <= MAX_NAME; n++) {
        memset(name, 'n', MAX_NAME);
        const char *dir = fresh_dir();
        dsv4_err err;
        name[n] = 0;
        snprintf(longest, sizeof longest,
                 "{\"%s\": {\"dtype\": \"I8\", \"shape\": [4], \"data_offsets\": [0,4]}}", name);
        write_shard(dir, "m.safetensors", 0, longest, 4);
        int rc = open_dir(dir, &err);
        CHECK(n < MAX_NAME ? rc == 0 : says(&err, "name has 256 bytes"), "%d: %s", n, err.msg);
    }
}

static void test_header_length_is_bounded(void) {
    static const struct { const char *bytes; size_t n; const char *fragment; } bad[] = {
        {"", 0, "has 0 bytes"}, {"\2\0\0", 3, "has 3 bytes"},
        {"\0\0\0\0\0\0\0\0{}", 10, "header of 0 bytes"},
        {"\1\0\0\0\0\0\0\0{", 9, "header of 1 bytes"},
        {"\3\0\0\0\0\0\0\0{}", 10, "has 10 bytes but its header alone needs 11"},
        {"\1\0\100\6\0\0\0\0{}", 10, "header of 104857601 bytes"},
        {"\377\377\377\377\377\377\377\377{}", 10, "header of 18446744073709551615 bytes"},
    };
    dsv4_err err;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *dir = fresh_dir();
        write_file(dir, "m.safetensors", bad[i].bytes, bad[i].n);
        int rc = open_dir(dir, &err);
        CHECK(rc == -1 && says(&err, bad[i].fragment), "%zu gave %d: %s", i, rc, err.msg);
    }
    const char *dir = fresh_dir();
    write_file(dir, "m.safetensors", "\2\0\0\0\0\0\0\0{}", 10); /* the smallest there is */
    CHECK(open_dir(dir, &err) == 0, "%s", err.msg);
}

#define A4 "{" T("a", "I8", "[4]", "[0,4]") "}"
#define B4 "{" T("b", "U8", "[4]", "[0,4]") "}"

static void test_index_and_shards_agree(void) {
    static const struct { const char *index, *fragment; } tries[] = {
        {"{\"weight_map\": {\"a\": \"1.safetensors\", \"b\": \"2.safetensors\"}}", NULL},
        {"{\"weight_map\": {\"a\": \"1.safetensors\"}}", NULL}, /* 2 is then not ours            */
        {"{\"weight_map\": {\"a\": \"2.safetensors\", \"b\": \"2.safetensors\"}}",
         "index says that tensor a lies in 2.safetensors, but it lies in no shard"},
        {"{\"weight_map\": {\"b\": \"1.safetensors\", \"a\": \"2.safetensors\"}}",
         "lies in 1.safetensors, but it lies in 2.safetensors"},
        {"{\"weight_map\": {\"a\": \"1.safetensors\", \"c\": \"2.safetensors\"}}",
         "tensor c lies in 2.safetensors, but it lies in no shard"},
        {"{\"weight_map\": {\"a\": \"1.safetensors\", \"b\": \"1.safetensors\"}}",
         "tensor b lies in 1.safetensors, but it lies in no shard"},
        {"{\"weight_map\": {\"a\": \"2.safetensors\", \"b\": \"2.safetensors\", "
         "\"c\": \"1.safetensors\"}}", "but it lies in"},
        {"{\"weight_map\": {\"b\": \"3.safetensors\"}}", "but the index does not name it"},
        {"{\"weight_map\": {\"a\": \"1.safetensors\", \"b\": \"3.safetensors\"}}",
         "tensor a lies in two shards"},
        {"{\"weight_map\": {\"a\": \"1.safetensors\", \"b\": \"8.safetensors\","
         "\"c\": \"9.safetensors\", \"d\": \"9.safetensors\"}}",
         "2 of 3 shards are missing, the first 8.safetensors; go on with the download"},
        {"{\"weight_map\": {\"a\": \"../1.safetensors\"}}", "lies in \"../1.safetensors\""},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "tensor a lies in \"/etc/passwd\""},
        {"{\"weight_map\": {\"a\": \"..\"}}", "accepted: the name of a file"},
        {"{\"weight_map\": {\"a\": \"\"}}", "accepted: the name of a file"},
        {"{\"weight_map\": {\"a\": 7}}", "tensor a lies in 7"},
        {"{\"weight_map\": {\"a\": \"sub\"}}", "sub: it is not a regular file"},
        {"{\"weight_map\": {}}", "weight_map is {}"}, {"{}", "weight_map is absent"},
        {"{\"weight_map\": []}", "weight_map is []"}, {"{\"weight_map\":", "index.json: line"},
        {"{\"weight_map\": {\"a\": \"1.safetensors\", \"a\": \"2.safetensors\"}}", "duplicate"},
    };
    const char *dir = fresh_dir();
    char sub[PATH_MAX + 8];
    dsv4_err err;
    snprintf(sub, sizeof sub, "%s/sub", dir);
    mkdir(sub, 0700);
    write_shard(dir, "1.safetensors", 0, A4, 4);
    write_shard(dir, "2.safetensors", 1, B4, 4);
    write_shard(dir, "3.safetensors", 2, "{" T("a", "I8", "[4]", "[0,4]") ","
                T("b", "I8", "[4]", "[4,8]") "}", 8);
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        write_file(dir, "model.safetensors.index.json", tries[i].index, strlen(tries[i].index));
        int rc = open_dir(dir, &err);
        CHECK(tries[i].fragment ? rc == -1 && says(&err, tries[i].fragment) : rc == 0,
              "%s gave %d: %s", tries[i].index, rc, err.msg);
    }
}

static void test_ckpt_without_an_index(void) {
    const char *dir = fresh_dir();
    dsv4_err err;
    ckpt *c;
    CHECK(open_dir(dir, &err) == -1 && says(&err, "holds no *.safetensors file"), "%s", err.msg);
    CHECK(open_dir("/nonexistent-dir", &err) == -1 && says(&err, "No such file"), "%s", err.msg);
    write_file(dir, "notes.txt", "x", 1);
    write_shard(dir, "n.safetensors", 0, B4, 4);
    write_shard(dir, "m.safetensors", 1, A4, 4);
    CHECK(!ckpt_open(&c, dir, &err), "%s", err.msg);
    if (!c) return;
    CHECK(ckpt_n_shards(c) == 2 && strstr(ckpt_shard_path(c, 0), "/m.safetensors"), "order");
    ckpt_close(c);
    write_shard(dir, "o.safetensors", 2, A4, 4);
    CHECK(open_dir(dir, &err) == -1 && says(&err, "tensor a lies in two shards") &&
          says(&err, "m.safetensors") && says(&err, "o.safetensors"), "%s", err.msg);
}

/* Write the real checkpoint's 48 shards as sparse files: a header, then a hole. */
static size_t write_real_layout(const char *dir, int *n_shards) {
    char command[2 * PATH_MAX], path[PATH_MAX + 300];
    size_t header_bytes = 0;
    *n_shards = 0;
    snprintf(command, sizeof command, "tar xf '%s' -C '%s'", real_headers, dir);
    if (system(command)) return 0;
    struct dirent **found;
    int n = scandir(dir, &found, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        char *end = strstr(found[i]->d_name, ".safetensors.json");
        snprintf(path, sizeof path, "%s/%s", dir, found[i]->d_name);
        char *text;
        size_t len;
        dsv4_err err;
        if (end && !read_text(&text, &len, path, MAX_HEADER_BYTES, &err)) {
            json_t *root = json_loadb(text, len, 0, NULL), *v;
            const char *key;
            json_int_t data = 0;
            json_object_foreach(root, key, v) {
                json_int_t e = json_integer_value(
                    json_array_get(json_object_get(v, "data_offsets"), 1));
                if (data < e) data = e;
            }
            json_decref(root);
            text = realloc(text, len + 1);
            text[len] = 0;
            end[strlen(".safetensors")] = 0;
            write_shard(dir, found[i]->d_name, 0, text, 0);
            snprintf(path, sizeof path, "%s/%s", dir, found[i]->d_name);
            CHECK(!truncate(path, (off_t)(8 + len) + data), "truncate %s", path);
            header_bytes += 8 + len;
            ++*n_shards;
            free(text);
        }
        free(found[i]);
    }
    free(found);
    return header_bytes;
}

/* Bytes that this process has asked read() and pread() for so far. */
static uint64_t bytes_read(void) {
    unsigned long long n = 0;
    FILE *f = fopen("/proc/self/io", "r");
    if (f && fscanf(f, "rchar: %llu", &n) != 1) n = 0;
    if (f) fclose(f);
    return n;
}

static void test_ckpt_real_layout(void) {
    const char *dir = fresh_dir();
    int n_shards;
    size_t headers = write_real_layout(dir, &n_shards);
    CHECK(headers > 0, "%s", real_headers);
    if (!headers) return;
    char path[PATH_MAX + 64];
    struct stat st;
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    CHECK(!stat(path, &st), "%s", path);
    dsv4_err err = {""};
    ckpt *c;
    uint64_t before = bytes_read();
    double begin = now_s();
    int rc = ckpt_open(&c, dir, &err);
    double took = now_s() - begin;
    uint64_t read = bytes_read() - before;
    CHECK(rc == 0, "%s", err.msg);
    if (rc) return;
    CHECK(ckpt_n_tensors(c) == 45821 && ckpt_n_shards(c) == 48, "%zu tensors, %d shards",
          ckpt_n_tensors(c), ckpt_n_shards(c));
    CHECK(read < headers + (uint64_t)st.st_size + 16384, "%llu bytes read, %zu of headers",
          (unsigned long long)read, headers);
    CHECK(took < 2, "%.2f s", took);
    const ckpt_tensor *t = ckpt_find(c, "layers.42.ffn.experts.159.w2.weight");
    CHECK(t && t->dtype == DT_I8 && t->shape[0] == 4096 && t->shape[1] == 1024, "an expert");
    NOTE("%.0f ms, %.1f MB read", 1e3 * took, (double)read * 1e-6);
    ckpt_close(c);

    dsv4_config cfg;
    CHECK(!config_load(&cfg, dir, &err), "%s", err.msg);
    CHECK(cfg.num_hidden_layers == 43 && cfg.n_routed_experts == 160, "config");
    snprintf(path, sizeof path, "%s/model-00007-of-00048.safetensors", dir);
    CHECK(!truncate(path, 1000000000), "truncate");
    CHECK(open_dir(dir, &err) == -1 && says(&err, "has 1000000000 bytes") &&
          says(&err, "2284469890") && says(&err, "download it again"), "%s", err.msg);
    unlink(path);
    CHECK(open_dir(dir, &err) == -1 && says(&err, "1 of 48 shards are missing") &&
          says(&err, "model-00007-of-00048.safetensors"), "%s", err.msg);
    remove_tree(dir);
}

/* === 5. Reads ================================================================================= */

static void test_io_on_answer_decides(void) {
    enum { K = 1024, B = 4096, R = 0, W = 1 };
    static const struct {
        uint32_t len, want, done; int tries, io_errors, res;
        io_next next; uint32_t done_after; int cause; bool write;
    } cases[] = {
        {8 * B, 8 * B, 0, 0, 0, 8 * B, IO_DONE, 8 * B, 0, R},
        {8 * B, 7 * B + 1, 0, 0, 0, 7 * B + 1, IO_DONE, 7 * B + 1, 0, R}, /* at EOF: all in */
        {8 * B, 7 * B + 1, 0, 0, 0, 8 * B, IO_DONE, 8 * B, 0, R},
        {8 * B, 7 * B + 1, 0, 0, 0, 7 * B, IO_AGAIN, 7 * B, 0, R},
        {8 * B, 8 * B, 0, 0, 0, B + 5, IO_AGAIN, B, 0, R}, /* back to a block edge   */
        {8 * B, 8 * B, B, 9, 0, 2 * B + 1, IO_AGAIN, 3 * B, 0, R},
        {8 * B, 8 * B, B, 9, 0, 7 * B, IO_DONE, 8 * B, 0, R},
        {8 * B, 8 * B, B, 0, 0, B - 1, IO_AGAIN, B, 0, R}, /* no progress            */
        {8 * B, 8 * B, B, IO_TRIES_MAX, 0, B - 1, IO_FAILED, B, CAUSE_EOF, R},
        {8 * B, 8 * B, B, IO_TRIES_MAX, 0, B, IO_AGAIN, 2 * B, 0, R}, /* progress pardons       */
        {8 * B, 8 * B, 0, 0, 0, 0, IO_FAILED, 0, CAUSE_EOF, R},
        {8 * B, 8 * B, 3 * B, 0, 0, 0, IO_FAILED, 3 * B, CAUSE_EOF, R},
        {8 * B, 8 * B, 0, 0, 0, -EINTR, IO_AGAIN, 0, 0, R},
        {8 * B, 8 * B, 0, 0, 0, -EAGAIN, IO_AGAIN, 0, 0, R},
        {8 * B, 8 * B, 0, IO_TRIES_MAX, 0, -EAGAIN, IO_FAILED, 0, CAUSE_STUCK, R},
        {8 * B, 8 * B, 0, IO_TRIES_MAX, 0, -EINTR, IO_FAILED, 0, CAUSE_STUCK, R},
        {8 * B, 8 * B, B, 0, 0, -EIO, IO_AGAIN, B, 0, R},
        {8 * B, 8 * B, B, 0, 1, -EIO, IO_FAILED, B, EIO, R},
        {8 * B, 8 * B, 0, 0, 0, -EINVAL, IO_FAILED, 0, EINVAL, R},
        {8 * B, 8 * B, 0, 0, 0, -ENXIO, IO_FAILED, 0, ENXIO, R},
        {B, 1, 0, 0, 0, 1, IO_DONE, 1, 0, R},
        {8 * B, 8 * B, 0, 0, 0, 8 * B, IO_DONE, 8 * B, 0, W},
        {8 * B, 8 * B, B, 9, 0, 2 * B + 1, IO_AGAIN, 3 * B, 0, W},
        {8 * B, 8 * B, 0, 0, 0, 0, IO_AGAIN, 0, 0, W}, /* a write has no end     */
        {8 * B, 8 * B, B, IO_TRIES_MAX, 0, B - 1, IO_FAILED, B, CAUSE_STUCK, W},
        {8 * B, 8 * B, B, 0, 0, -ENOSPC, IO_FAILED, B, ENOSPC, W},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        io_req r = {.len = cases[i].len, .want = cases[i].want, .done = cases[i].done,
                    .tries = cases[i].tries, .io_errors = cases[i].io_errors,
                    .write = cases[i].write};
        io_next next = io_on_answer(&r, cases[i].res);
        CHECK(next == cases[i].next && r.done == cases[i].done_after &&
              (next != IO_FAILED || r.cause == cases[i].cause),
              "case %zu: next %d done %u cause %d", i, next, r.done, r.cause);
    }
}

/* Random tensors over n_shards shards: sizes from 0 to `largest`, gaps between some. */
static void write_random_shards(const char *dir, int n_shards, int n_each, uint32_t largest) {
    for (int s = 0; s < n_shards; s++) {
        str h = {0};
        uint32_t at = 0;
        put(&h, "{");
        for (int i = 0; i < n_each; i++) {
            uint32_t n = i % 7 == 3 ? 0 : hook_random() % (i % 5 ? 9000 : largest);
            at += hook_random() % 3 ? 0 : hook_random() % 5000;
            put(&h, "%s\"t%d.%d\": {\"dtype\": \"I8\", \"shape\": [%u], \"data_offsets\": [%u,%u]}",
                i ? "," : "", s, i, n, at, at + n);
            at += n;
        }
        put(&h, "}%*s", (int)(hook_random() % 50), "");
        char file[32];
        snprintf(file, sizeof file, "s%d.safetensors", s);
        write_shard(dir, file, s, h.text, at);
        free(h.text);
    }
}

typedef struct { ckpt *c; offload *o; load_item *items; size_t n; } loader;

static bool loader_open(loader *l, const char *dir) {
    dsv4_err err = {""};
    const char *note;
    *l = (loader){0};
    int rc = ckpt_open(&l->c, dir, &err) || offload_open(&l->o, l->c, &note, &err);
    CHECK(rc == 0, "%s", err.msg);
    if (rc) return false;
    l->n = ckpt_n_tensors(l->c);
    l->items = calloc(l->n, sizeof *l->items);
    for (size_t i = 0; i < l->n; i++) {
        const ckpt_tensor *t = ckpt_at(l->c, i);
        l->items[i] = (load_item){t, (uint8_t *)malloc(t->bytes + 8) + i % 8};
    }
    return true;
}

static void loader_close(loader *l) {
    for (size_t i = 0; i < l->n; i++) free((uint8_t *)l->items[i].dst - i % 8);
    free(l->items);
    offload_close(l->o);
    ckpt_close(l->c);
}

/* Load everything into wiped buffers; true if it said so and every byte is right. */
static bool loads_right(loader *l, dsv4_err *err) {
    for (size_t i = 0; i < l->n; i++) memset(l->items[i].dst, 0xdd, l->items[i].t->bytes);
    err->msg[0] = 0;
    if (offload_load(l->o, l->items, l->n, err)) return false;
    for (size_t i = 0; i < l->n; i++) {
        const ckpt_tensor *t = l->items[i].t;
        if (!bytes_right(l->items[i].dst, t->shard, t->offset, t->bytes)) {
            snprintf(err->msg, sizeof err->msg, "tensor %s holds other bytes", t->name);
            return false;
        }
    }
    return true;
}

static void reads_right(const char *dir, bool refuse_ring, bool refuse_direct, const char *said) {
    ckpt *c;
    offload *o;
    loader l;
    dsv4_err err = {""};
    const char *note = NULL;
    hook.refuse_ring = refuse_ring;
    hook.refuse_direct = refuse_direct;
    if (!ckpt_open(&c, dir, &err) && !offload_open(&o, c, &note, &err)) {
        CHECK(!said || (note && strstr(note, said) && !strchr(note, '\n')), "note: %s", note);
        CHECK(o->has_ring == !refuse_ring, "ring %d", o->has_ring);
        CHECK(!refuse_direct || !o->files[0].direct, "direct");
        offload_close(o);
    }
    ckpt_close(c);
    CHECK(!err.msg[0], "%s", err.msg);
    if (loader_open(&l, dir)) {
        bool right = loads_right(&l, &err);
        CHECK(right, "ring %d direct %d: %s", !refuse_ring, !refuse_direct, err.msg);
        CHECK(!offload_load(l.o, l.items, 0, &err), "nothing at all");
        loader_close(&l);
    }
    hook.refuse_ring = hook.refuse_direct = false;
}

static void test_load_every_way_of_reading(void) {
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_random_shards(dir, 3, 60, 3000000);
    reads_right(dir, false, false, NULL);
    reads_right(dir, true, false, "io_uring is refused");
    reads_right(dir, false, true, "O_DIRECT");
    reads_right(dir, true, true, "io_uring and O_DIRECT are both refused");
    char shm[] = "/dev/shm/dsv4-test-XX" "XX" "XX";
    if (mkdtemp(shm)) {
        write_random_shards(shm, 2, 30, 1000000);
        reads_right(shm, false, false, NULL);
        reads_right(shm, true, false, NULL);
        remove_tree(shm);
    }
    remove_tree(dir);
}

static void test_load_survives_bad_reads(void) {
    const char *dir = fresh_dir();
    dsv4_err err;
    set_mood(CALM, 0, 0);
    write_random_shards(dir, 2, 40, 2500000);
    for (int threads = 0; threads < 2; threads++) {
        loader l;
        hook.refuse_ring = threads;
        if (!loader_open(&l, dir)) return;
        uint64_t retries = l.o->stats.retries;
        CHECK(loads_right(&l, &err) && l.o->stats.retries == retries, "%s", err.msg);
        int reads = hook.seen;
        for (int nth = 1; nth <= 60; nth += 11) {   /* a drive that recovers                     */
            retries = l.o->stats.retries;
            set_mood(NTH, -EIO, nth);
            CHECK(loads_right(&l, &err), "EIO at read %d: %s", nth, err.msg);
            CHECK(l.o->stats.retries == retries + 1, "retries");
        }
        set_mood(SHORT, 0, 0);
        CHECK(loads_right(&l, &err), "short reads: %s", err.msg);
        CHECK(hook.seen > reads / 2, "%d reads", hook.seen);
        set_mood(INTR, 0, 0);
        CHECK(loads_right(&l, &err), "signals: %s", err.msg);
        set_mood(AGAIN, 0, 0);
        CHECK(!loads_right(&l, &err) && says(&err, "tried many times"), "%s", err.msg);
        const ckpt_tensor *t = ckpt_find(l.c, "t1.5");
        hook.shard = t->shard, hook.fd = l.o->files[t->shard].fd;
        hook.at = t->offset + t->bytes / 2;
        static const struct { int answer; const char *says; } bad[] = {
            {-EIO, "Input/output error"}, {0, "the file ends there"}, {-ENODEV, "No such device"},
        };
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            set_mood(AT, bad[i].answer, 0);
            CHECK(!loads_right(&l, &err) && says(&err, bad[i].says) && says(&err, "at byte ") &&
                  says(&err, "s1.safetensors") && says(&err, "(from tensor t1."), "%s", err.msg);
            set_mood(CALM, 0, 0);
            CHECK(loads_right(&l, &err), "after it: %s", err.msg);
        }
        loader_close(&l);
    }
    hook.refuse_ring = false;
    remove_tree(dir);
}

/* A ring that is out of memory for a moment, and one that breaks for good. */
static void test_load_when_the_ring_breaks(void) {
    const char *dir = fresh_dir();
    loader l;
    dsv4_err err;
    set_mood(CALM, 0, 0);
    write_random_shards(dir, 1, 40, 4000000);
    if (!loader_open(&l, dir)) return;
    hook.ring_waits = -EAGAIN, hook.n_ring_waits = 20;
    CHECK(loads_right(&l, &err), "%s", err.msg);
    hook.ring_waits = -EINTR, hook.n_ring_waits = 20;
    CHECK(loads_right(&l, &err), "%s", err.msg);
    hook.ring_waits = -EBADF, hook.n_ring_waits = 1;
    if (l.o->has_ring) {
        CHECK(!loads_right(&l, &err) && says(&err, "io_uring: Bad file descriptor"), "%s", err.msg);
        CHECK(!loads_right(&l, &err) && says(&err, "io_uring: Bad"), "it stays so: %s", err.msg);
    }
    loader_close(&l);              /* with reads on their way to nobody                         */
    hook.n_ring_waits = 0;
}

/* A shard that is cut between the check of its header and the read, for real. */
static void test_load_of_a_shrunken_file(void) {
    const char *dir = fresh_dir();
    loader l;
    dsv4_err err;
    char path[PATH_MAX + 32];
    set_mood(CALM, 0, 0);
    write_shard(dir, "x.safetensors", 0, "{" T("a", "I8", "[9000]", "[0,9000]") "}", 9000);
    if (!loader_open(&l, dir)) return;
    snprintf(path, sizeof path, "%s/x.safetensors", dir);
    CHECK(!truncate(path, 5000), "truncate");
    CHECK(!loads_right(&l, &err) && says(&err, "the file ends there; it was cut short"), "%s",
          err.msg);
    offload *o;
    const char *note;
    CHECK(offload_open(&o, l.c, &note, &err) == -1 && says(&err, "has 5000 bytes now"), "%s",
          err.msg);
    unlink(path);
    CHECK(offload_open(&o, l.c, &note, &err) == -1 && says(&err, "No such file"), "%s", err.msg);
    loader_close(&l);
}

/* === 6. Caches ================================================================================ */

enum { W1, W2, W3, S1, S2, S3, EXPERT_PARTS };

typedef enum { CONTIGUOUS, SPLIT, SHUFFLED } layout;

/* n experts in three shards.  CONTIGUOUS: as the official ones, all scales, then all weights;
 * SPLIT: each of the six parts alone; SHUFFLED: parts in any order, any shard, with gaps. */
static void write_experts(const char *dir, int n, int dim, int inter, layout how) {
    str h[3] = {{0}};
    uint32_t at[3] = {0};
    for (int s = 0; s < 3; s++) put(&h[s], "{");
    int n_parts = 6 * n, *order = malloc((size_t)n_parts * sizeof *order);
    for (int i = 0; i < n_parts; i++) {        /* scales of e are parts 3e..3e+2, then weights  */
        order[i] = i;
        int k = how == SHUFFLED ? (int)(hook_random() % (uint32_t)(i + 1)) : i;
        order[i] = order[k];
        order[k] = i;
    }
    for (int i = 0; i < n_parts; i++) {
        bool weight = order[i] >= 3 * n;
        int e = order[i] % (3 * n) / 3, w = order[i] % 3 + 1;
        int s = how == CONTIGUOUS ? e % 3 : how == SPLIT ? (e + order[i]) % 3
                                                       : (int)(hook_random() % 3);
        uint32_t bytes = (uint32_t)(dim * inter / (weight ? 2 : 32));
        at[s] += how == CONTIGUOUS ? 0 : how == SPLIT ? 1 : hook_random() % 3 * 77;
        put(&h[s], "%s\"e%d.%s%d\": {\"dtype\": \"I8\", \"shape\": [%u], \"data_offsets\": "
            "[%u,%u]}", h[s].n > 1 ? "," : "", e, weight ? "w" : "s", w, bytes, at[s],
            at[s] + bytes);
        at[s] += bytes;
    }
    for (int s = 0; s < 3; s++) {
        char file[32];
        put(&h[s], "}");
        snprintf(file, sizeof file, "s%d.safetensors", s);
        write_shard(dir, file, s, h[s].text, at[s]);
        free(h[s].text);
    }
    free(order);
}

typedef struct {                   /* a checkpoint of experts, and one cache of them            */
    ckpt *c;
    offload *o;
    cache *k;
    read_group *group;
    const ckpt_tensor **part;
    int n;
} bank;

static bool bank_open(bank *b, const char *dir, int n, int n_slots) {
    dsv4_err err = {""};
    const char *note;
    *b = (bank){.n = n};
    int rc = ckpt_open(&b->c, dir, &err) || offload_open(&b->o, b->c, &note, &err);
    b->group = calloc((size_t)n, sizeof *b->group);
    b->part = calloc((size_t)n * EXPERT_PARTS, sizeof *b->part);
    for (int i = 0; i < n * EXPERT_PARTS && !rc; i++) {
        char name[32];
        int p = i % EXPERT_PARTS;
        snprintf(name, sizeof name, "e%d.%s%d", i / EXPERT_PARTS, p < S1 ? "w" : "s", p % 3 + 1);
        b->part[i] = ckpt_find(b->c, name);
        if (!b->part[i]) rc = fail(&err, "no %s", name);
        b->group[i / EXPERT_PARTS] = (read_group){b->part + i - p, EXPERT_PARTS};
    }
    if (!rc) rc = cache_open(&b->k, b->o, b->group, (size_t)n, n_slots, &err);
    CHECK(rc == 0, "%s", err.msg);
    return rc == 0;
}

static void bank_close(bank *b) {
    cache_close(b->k);
    offload_close(b->o);
    ckpt_close(b->c);
    free(b->group);
    free(b->part);
}

/* Leave n of the offload's free requests: a ring of that depth. */
static void narrow(offload *o, int n) {
    io_req *last = o->free_reqs;
    while (--n) last = last->next;
    last->next = NULL;
}

static void drain(offload *o) {
    dsv4_err err = {""};
    while (o->in_flight) CHECK(!io_reap(o, true, &err), "%s", err.msg);
}

static bool group_right(const cache *k, int id, int slot) {
    const read_group *g = &k->groups[id];
    for (int p = 0; p < g->n_parts; p++) {
        const ckpt_tensor *t = g->part[p];
        const uint8_t *begin = k->arena.base + k->slot_bytes * (size_t)slot;
        const uint8_t *at = cache_part(k, slot, p);
        if (at < begin || at + t->bytes > begin + k->slot_bytes) return false;
        if (!bytes_right(at, t->shard, t->offset, t->bytes)) return false;
    }
    return true;
}

/* A cache's own bookkeeping: every slot is in exactly one place. */
static bool cache_sound(const cache *k) {
    const offload *o = k->o;
    int idle = 0, n = 0, pinned_ones = 0, orphans = 0, in_flight = 0;
    const slot_list *const lists[] = {&k->free, &k->passing, &k->idle};
    for (int way = 0; way < 3; way++) {
        const slot_list *l = lists[way];
        const cache_slot *last = NULL;
        for (const cache_slot *s = l->first; s; last = s, s = s->next) {
            if (s->in_flight || s->list != l || s->prev != last || ++n > k->n_slots) return false;
            if (s->state != (way ? SLOT_READY : SLOT_FREE) || (!way && s->pins)) return false;
            if (way && (s->rank == PASSING) != (way == 1)) return false;
            idle += s->pins == 0;
        }
        if (l->last != last) return false;
    }
    for (int i = 0; i < k->n_slots; i++) {
        const cache_slot *s = &k->slots[i];
        bool queued = s->list == &o->demand || s->list == &o->background;
        pinned_ones += s->pins > 0;
        in_flight += s->in_flight;
        orphans += s->pins == 0 && s->state == SLOT_READING;
        if (queued != (s->state == SLOT_READING && s->run < s->n_runs)) return false;
        if (s->in_flight && s->list && !queued) return false;
        if (s->pins && s->list == &o->background) return false;
        if (!s->pins && !s->list && !s->in_flight) return false;
        bool mapped = s->state == SLOT_READING || s->state == SLOT_READY;
        if (mapped && k->slot_of[s->id] != s) return false;
    }
    for (size_t e = 0; e < k->n_groups; e++)
        if (k->slot_of[e] && k->slot_of[e]->id != e) return false;
    return orphans == k->n_orphans && in_flight == k->in_flight &&
           idle + pinned_ones + orphans == k->n_slots;
}

/* Get, wait, compare, give back; true if right. */
static bool use_group(cache *k, int id, dsv4_err *err) {
    int slot = cache_get(k, (size_t)id, err);
    if (slot < 0) return false;
    bool right = !cache_wait(k, slot, err) && group_right(k, id, slot);
    cache_unpin(k, slot);
    return right;
}

static void test_cache_of_every_layout(void) {
    set_mood(CALM, 0, 0);
    for (int how = CONTIGUOUS; how <= SHUFFLED; how++) {
        for (int large = 0; large < 2; large++) {
            int n = large ? 5 : 24, dim = large ? 1056 : 64, inter = large ? 2080 : 96;
            const char *dir = fresh_dir();
            write_experts(dir, n, dim, inter, (layout)how);
            for (int way = 0; way < 4; way++) {
                bank b;
                dsv4_err err = {""};
                hook.refuse_ring = way & 1;
                hook.refuse_direct = way & 2;
                if (bank_open(&b, dir, n, 3)) {
                    for (int e = 0; e < n; e++)
                        CHECK(use_group(b.k, e, &err), "layout %d expert %d: %s", how, e, err.msg);
                    for (int e = n - 1; e >= 0; e--)
                        CHECK(use_group(b.k, e, &err), "layout %d expert %d: %s", how, e, err.msg);
                    const cache_stats *s = cache_get_stats(b.k);
                    CHECK(s->hits == 3 && s->misses == (uint64_t)(2 * n - 3), "%d", (int)s->hits);
                    for (int e = 0; e < n; e++)
                        CHECK(cache_uses(b.k)[e].hits == (e >= n - 3) &&
                              cache_uses(b.k)[e].misses == (e >= n - 3 ? 1 : 2), "uses of %d", e);
                    slot_run runs[GROUP_PARTS];
                    int n_runs;
                    size_t bytes = lay_out(&b.group[0], runs, &n_runs);
                    CHECK(how == CONTIGUOUS ? n_runs == 2 : n_runs > 2, "%d runs", n_runs);
                    CHECK(bytes <= cache_slot_bytes(b.group, (size_t)n), "slot");
                }
                bank_close(&b);
            }
            remove_tree(dir);
        }
    }
    hook.refuse_ring = hook.refuse_direct = false;
}

/* Empty parts, pieces of tensors that touch, overlap or lie twice, many parts, none at all. */
static void test_cache_of_odd_groups(void) {
    enum { N = 64, SIZE = 3000000, ROUNDS = 10 };
    const char *dir = fresh_dir();
    ckpt *c;
    offload *o;
    dsv4_err err = {""};
    const char *note;
    set_mood(CALM, 0, 0);
    for (int s = 0; s < 2; s++)
        write_shard(dir, s ? "b.safetensors" : "a.safetensors", s, s ? "{}     " : "{}", SIZE);
    if (ckpt_open(&c, dir, &err) || offload_open(&o, c, &note, &err)) {
        CHECK(false, "%s", err.msg);
        return;
    }
    static ckpt_tensor tensor[N][GROUP_PARTS];
    static const ckpt_tensor *part[N][GROUP_PARTS];
    read_group group[N];
    for (int round = 0; round < ROUNDS; round++) {
        for (int g = 0; g < N; g++) {
            int n = g == 0 ? 0 : g == 1 ? GROUP_PARTS : (int)(hook_random() % (GROUP_PARTS + 1));
            uint64_t at = 16 + hook_random() % (SIZE / 2);
            for (int p = 0; p < n; p++) {
                uint32_t dice = hook_random() % 8, most = dice == 7 ? SIZE / 2 : 9000;
                ckpt_tensor *t = &tensor[g][p];
                uint64_t bytes = dice == 0 || g == 2 ? 0 : 1 + hook_random() % most;
                if (dice == 1) at -= hook_random() % at;
                if (dice == 2) at += hook_random() % 5000;
                if (at < 16 || at >= SIZE - 16) at = 16; /* not the header         */
                if (bytes > SIZE - at) bytes = SIZE - at;
                *t = (ckpt_tensor){.shard = dice == 3, .offset = at, .bytes = bytes};
                if (dice != 4) at += bytes;    /* else the next one overlaps                    */
                part[g][p] = t;
            }
            group[g] = (read_group){part[g], n};
        }
        cache *k;
        CHECK(!cache_open(&k, o, group, N, 5, &err), "%s", err.msg);
        for (int g = 0; g < N; g++) CHECK(use_group(k, g, &err), "%d.%d: %s", round, g, err.msg);
        cache_ask(k, 0);           /* not in: all slots are taken, nothing happens              */
        CHECK(!cache_holds(k, 0) && cache_holds(k, N - 1) && cache_sound(k), "%d", round);
        cache_close(k);
        CHECK(!cache_open(&k, o, group, N, 5, &err), "%s", err.msg);
        cache_ask(k, 0);
        CHECK(cache_holds(k, 0) && cache_sound(k), "nothing to read");
        cache_close(k);
    }
    CHECK(cache_open(&(cache *){NULL}, o, group, N, INT_MAX, &err) == -1 &&
          says(&err, "lower the memory budget"), "%s", err.msg);
    CHECK(o->n_caches == 0, "%d caches", o->n_caches);
    offload_close(o);
    ckpt_close(c);
}

/* One trace against a model that fits a page: stamp[e] is when e was last given back. */
static void test_cache_evicts_the_least_recently_used(void) {
    enum { N = 40, SLOTS = 7, STEPS = 3000 };
    const char *dir = fresh_dir();
    bank b;
    dsv4_err err = {""};
    uint64_t stamp[N] = {0}, now = 0, hits = 0, misses = 0, evictions = 0;
    int pins[N] = {0}, slot_of[N], cached = 0;
    set_mood(CALM, 0, 0);
    write_experts(dir, N, 64, 96, CONTIGUOUS);
    if (!bank_open(&b, dir, N, SLOTS)) return;
    size_t heap = mallinfo2().uordblks;
    for (int e = 0; e < N; e++) slot_of[e] = -1;
    for (int step = 0; step < STEPS; step++) {
        int e = (int)(hook_random() % N * (hook_random() % N) / N); /* small ones more often     */
        if (pins[e] > 0 && hook_random() % 3) {
            cache_unpin(b.k, slot_of[e]);
            if (--pins[e] == 0) stamp[e] = ++now;
            continue;
        }
        int coldest = -1;
        for (int i = 0; i < N; i++)
            if (slot_of[i] >= 0 && !pins[i] && (coldest < 0 || stamp[i] < stamp[coldest]))
                coldest = i;
        bool hit = slot_of[e] >= 0, full = !hit && cached == SLOTS && coldest < 0;
        CHECK(cache_holds(b.k, (size_t)e) == hit, "step %d", step);
        int slot = cache_get(b.k, (size_t)e, &err);
        CHECK(full ? slot == -1 && !err.msg[0] : slot >= 0, "step %d: %s", step, err.msg);
        if (slot < 0) continue;
        hits += hit;
        misses += !hit;
        if (!hit && cached == SLOTS) {
            CHECK(slot == slot_of[coldest], "step %d evicted another one", step);
            slot_of[coldest] = -1;
            evictions++;
        } else if (!hit) {
            cached++;
        }
        slot_of[e] = slot;
        pins[e]++;
        CHECK(!cache_wait(b.k, slot, &err) && group_right(b.k, e, slot), "step %d", step);
        CHECK(cache_sound(b.k), "step %d", step);
    }
    const cache_stats *s = cache_get_stats(b.k);
    CHECK(s->hits == hits && s->misses == misses && s->evictions == evictions, "counters");
    CHECK(mallinfo2().uordblks == heap, "allocated after start");
    NOTE("%d hits, %d misses", (int)hits, (int)misses);
    bank_close(&b);
}

/* Many asked for and given back in any order, waited for or not: bytes stay right. */
static void test_cache_random_pins(void) {
    enum { N = 30, SLOTS = 9, HELD = 12 };
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_experts(dir, N, 512, 544, SHUFFLED);
    for (int way = 0; way < 4; way++) {
        bank b;
        dsv4_err err = {""};
        int held[HELD], of[HELD], n = 0;
        hook.refuse_ring = way & 1;
        if (!bank_open(&b, dir, N, SLOTS)) break;
        if (way & 2) narrow(b.o, 1);
        for (int step = 0; step < 600; step++) {
            uint32_t dice = hook_random();
            if (n < HELD && dice % 2) {
                int e = (int)(hook_random() % N), slot = cache_get(b.k, (size_t)e, &err);
                CHECK(slot >= 0 || !err.msg[0], "%s", err.msg);
                if (slot >= 0) held[n] = slot, of[n++] = e;
            } else if (n > 0) {
                int i = (int)(hook_random() % (uint32_t)n);
                if (dice % 3)
                    CHECK(!cache_wait(b.k, held[i], &err) && group_right(b.k, of[i], held[i]),
                          "way %d step %d: %s", way, step, err.msg);
                cache_unpin(b.k, held[i]);
                held[i] = held[--n], of[i] = of[n];
            }
            CHECK(cache_sound(b.k), "way %d step %d", way, step);
        }
        bank_close(&b);            /* with reads on their way and pins held                     */
    }
    hook.refuse_ring = false;
    remove_tree(dir);
}

static void test_cache_all_pinned(void) {
    const char *dir = fresh_dir();
    bank b;
    dsv4_err err = {"old"};
    set_mood(CALM, 0, 0);
    write_experts(dir, 4, 64, 64, CONTIGUOUS);
    for (int n_slots = 1; n_slots <= 2; n_slots++) {
        if (!bank_open(&b, dir, 4, n_slots)) return;
        int slot = -1;
        for (int i = 0; i < n_slots; i++) slot = cache_get(b.k, (size_t)i, &err);
        CHECK(cache_get(b.k, 3, &err) == -1 && !err.msg[0], "%s", err.msg);
        CHECK(cache_get(b.k, (size_t)n_slots - 1, &err) == slot, "a second pin");
        cache_unpin(b.k, slot);
        CHECK(cache_get(b.k, 3, &err) == -1 && !err.msg[0], "%s", err.msg);
        cache_unpin(b.k, slot);    /* perhaps still on its way: then get waits for it           */
        CHECK(cache_get(b.k, 3, &err) == slot, "%s", err.msg);
        CHECK(!cache_wait(b.k, slot, &err) && group_right(b.k, 3, slot), "%s", err.msg);
        bank_close(&b);
    }
    CHECK(bank_open(&b, dir, 4, 9) && use_group(b.k, 0, &err), "more slots than experts");
    bank_close(&b);
}

/* Reads of one part fail for ever: that expert fails by name, the others do not, and once the
 * drive is well again everything is. */
static void test_cache_survives_bad_reads(void) {
    enum { N = 12, DIM = 1056, INTER = 2080 }; /* 7 is evicted by the last four */
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_experts(dir, N, DIM, INTER, CONTIGUOUS);
    for (int way = 0; way < 4; way++) {
        bank b;
        dsv4_err err = {""};
        hook.refuse_ring = way & 1;
        if (!bank_open(&b, dir, N, 4)) break;
        if (way & 2) narrow(b.o, 1);
        for (int p = W1; p < EXPERT_PARTS; p += 2) {
            const ckpt_tensor *t = b.group[7].part[p];
            int slot[3];
            hook.shard = t->shard, hook.fd = b.o->files[t->shard].fd;
            hook.at = t->offset + t->bytes / 2;
            set_mood(AT, -EIO, 0);
            for (int i = 0; i < 3; i++) slot[i] = cache_get(b.k, (size_t)(6 + i), &err);
            for (int i = 2; i >= 0; i -= 2)
                CHECK(!cache_wait(b.k, slot[i], &err) && group_right(b.k, 6 + i, slot[i]), "%s",
                      err.msg);
            for (int i = 0; i < 2; i++) {          /* it says so each time                      */
                err.msg[0] = 0;
                CHECK(cache_wait(b.k, slot[1], &err) == -1 &&
                      says(&err, "(from tensor e7.") && says(&err, ".safetensors at byte ") &&
                      says(&err, "Input/output error"), "%s", err.msg);
            }
            for (int i = 0; i < 3; i++) cache_unpin(b.k, slot[i]);
            int s = cache_get(b.k, 7, &err);       /* fails with nobody waiting                 */
            CHECK(s >= 0, "%s", err.msg);
            cache_unpin(b.k, s);
            drain(b.o);
            CHECK(cache_sound(b.k) && b.k->slots[s].state == SLOT_FREE, "part %d", p);
            cache_ask(b.k, 7);                     /* and so it does in the background          */
            drain(b.o);
            CHECK(cache_sound(b.k) && !cache_holds(b.k, 7) && b.k->free.first, "part %d", p);
            set_mood(CALM, 0, 0);
            for (int e = 0; e < N; e++) CHECK(use_group(b.k, e, &err), "%d: %s", e, err.msg);
            CHECK(cache_sound(b.k), "part %d", p);
        }
        static const mood moods[] = {NTH, SHORT, INTR};
        for (size_t m = 0; m < sizeof moods / sizeof *moods; m++)
            for (int e = 0; e < N; e++) {
                set_mood(moods[m], -EIO, 1 + e % 3);
                CHECK(use_group(b.k, e, &err), "mood %d expert %d: %s", moods[m], e, err.msg);
            }
        bank_close(&b);
    }
    hook.refuse_ring = false;
    set_mood(CALM, 0, 0);
    remove_tree(dir);
}

/* A ring that breaks with reads on their way: every call says so from then on, and closing in
 * this state neither hangs nor touches what is gone. */
static void test_cache_when_the_ring_breaks(void) {
    const char *dir = fresh_dir();
    bank b;
    dsv4_err err = {""};
    set_mood(CALM, 0, 0);
    write_experts(dir, 12, 1056, 2080, CONTIGUOUS);
    if (!bank_open(&b, dir, 12, 8)) return;
    for (int i = 6; i < 12 && b.o->has_ring; i++) cache_ask(b.k, (size_t)i);
    int slot = cache_get(b.k, 0, &err);
    if (b.o->has_ring) {
        int rc = 0;
        hook.ring_waits = -EBADF, hook.n_ring_waits = 1000;
        for (int i = 1; (rc = cache_wait(b.k, slot, &err)) == 0 && i < 6; i++) {
            cache_unpin(b.k, slot);    /* it came before anybody had to wait: another one */
            slot = cache_get(b.k, (size_t)i, &err);
        }
        CHECK(rc == -1 && says(&err, "io_uring: Bad file"), "%s", err.msg);
        hook.n_ring_waits = 0;
        CHECK(cache_wait(b.k, slot, &err) == -1 && says(&err, "io_uring: Bad"), "%s", err.msg);
        CHECK(cache_get(b.k, 11, &err) == -1 && says(&err, "io_uring: Bad"), "%s", err.msg);
        cache_ask(b.k, 2);
        CHECK(cache_sound(b.k), "sound");
    }
    cache_unpin(b.k, slot);
    bank_close(&b);
}

/* What a cache must do, in one page: which groups are in, how often pinned, which goes next. */
typedef struct { int id[64], n; } row;         /* what goes first comes first                   */
typedef struct {
    cache *k;
    int n, n_used;
    int pins[64], slot[64];
    slot_rank rank[64];
    row passing, idle;             /* pinned ones among them were found there by cache_pass()   */
    bool in[64];
} model;

static void row_put(row *r, int id, bool first) {
    if (first) memmove(r->id + 1, r->id, (size_t)r->n * sizeof *r->id);
    r->id[first ? 0 : r->n] = id;
    r->n++;
}

static bool row_take(row *r, int id) {
    int i = 0;
    while (i < r->n && r->id[i] != id) i++;
    if (i == r->n) return false;
    memmove(r->id + i, r->id + i + 1, (size_t)(--r->n - i) * sizeof *r->id);
    return true;
}

/* The first without a pin leaves the row: its id, or -1. */
static int row_next(row *r, const int *pins) {
    for (int i = 0; i < r->n; i++)
        if (!pins[r->id[i]]) {
            int id = r->id[i];
            row_take(r, id);
            return id;
        }
    return -1;
}

/* With nothing in flight the model knows everything; else it knows what is pinned. */
static void model_get(model *m, int id, bool pass, bool exact) {
    dsv4_err err = {"old"};
    int n_pinned = 0;
    uint64_t evictions = m->k->stats.evictions, hits = m->k->stats.hits;
    bool held = cache_holds(m->k, (size_t)id), was = m->in[id];
    for (int g = 0; g < m->n; g++) n_pinned += m->pins[g] > 0;
    int slot = (pass ? cache_pass : cache_get)(m->k, (size_t)id, &err);
    bool refused = !m->pins[id] && n_pinned == m->k->n_slots;
    CHECK(refused ? slot == -1 && !err.msg[0] : slot >= 0, "slot %d: %s", slot, err.msg);
    CHECK(!m->pins[id] || slot == m->slot[id], "a pinned group moved");
    if (slot < 0) return;
    CHECK(!held || m->k->stats.hits == hits + 1, "held, but no hit");
    for (int g = 0; g < m->n; g++)
        CHECK(g == id || !m->pins[g] || m->slot[g] != slot, "a pinned slot was given away");
    if (exact) {
        int out = -1;
        bool evicts = false;
        if (was && !pass) (void)(row_take(&m->passing, id) || row_take(&m->idle, id));
        else if (!was && m->n_used < m->k->n_slots) m->n_used++;
        else if (!was && (out = row_next(&m->passing, m->pins)) < 0)
            evicts = (out = row_next(&m->idle, m->pins)) >= 0;
        CHECK((m->k->stats.hits == hits + 1) == was, "hit");
        CHECK(m->k->stats.evictions == evictions + evicts, "evictions");
        if (out >= 0) m->in[out] = false;
        if (!was || !pass) m->rank[id] = pass ? PASSING : USED;
        m->in[id] = true;
    }
    m->pins[id]++;
    m->slot[id] = slot;
}

static void model_unpin(model *m, int id) {
    row *r = m->rank[id] == PASSING ? &m->passing : &m->idle;
    cache_unpin(m->k, m->slot[id]);
    if (--m->pins[id] > 0) return;
    bool there = false;
    for (int i = 0; i < r->n; i++) there |= r->id[i] == id;
    if (!there) row_put(r, id, m->rank[id] != USED);
}

static void model_step(model *m, bool exact) {
    uint32_t dice = hook_random() % 9;
    int id = (int)(hook_random() % (uint32_t)m->n);
    dsv4_err err = {""};
    if (dice < 4) {
        model_get(m, id, dice < 2, exact);
    } else if (dice < 6) {
        bool room = m->n_used < m->k->n_slots && !m->in[id];
        cache_ask(m->k, (size_t)id);
        if (exact && room) {
            row_put(&m->idle, id, true);
            m->rank[id] = ASKED;
            m->in[id] = true;
            m->n_used++;
        }
    } else {
        for (int tries = 0; tries < m->n && !m->pins[id]; tries++) id = (id + 1) % m->n;
        if (!m->pins[id]) return;
        if (dice < 8)
            CHECK(!cache_wait(m->k, m->slot[id], &err) && group_right(m->k, id, m->slot[id]),
                  "group %d: %s", id, err.msg);
        model_unpin(m, id);
    }
}

/* Two caches of other shapes and a loader over one offload, in any order.  `exact`: after each
 * step everything lands, and then the model tells what is in, and what goes. */
static void share(const char *dir, uint32_t seed, int depth, bool exact) {
    enum { N = 24, LAYERS = 7, EACH = 20 };
    bank b;
    model m[2];
    dsv4_err err = {""};
    read_group layer[LAYERS];
    const ckpt_tensor *part[LAYERS * EACH];
    if (!bank_open(&b, dir, N, 6)) return;
    for (int i = 0; i < LAYERS * EACH; i++) part[i] = b.part[i];
    for (int l = 0; l < LAYERS; l++) layer[l] = (read_group){part + l * EACH, EACH};
    m[0] = (model){.k = b.k, .n = N};
    m[1] = (model){.n = LAYERS};
    CHECK(!cache_open(&m[1].k, b.o, layer, LAYERS, 3, &err), "%s", err.msg);
    if (depth) narrow(b.o, depth);
    hook.rng = seed;
    for (int step = 0; step < 500; step++) {
        model *one = &m[hook_random() % 2];
        model_step(one, exact);
        if (!exact) m[0].idle.n = m[1].idle.n = m[0].passing.n = m[1].passing.n = 0;
        if (exact) drain(b.o);
        if (step % 50 == 49) {     /* a load between                                            */
            const ckpt_tensor *t = b.part[hook_random() % (N * EXPERT_PARTS)];
            uint8_t *dst = malloc(t->bytes);
            CHECK(!offload_load(b.o, &(load_item){t, dst}, 1, &err) &&
                  bytes_right(dst, t->shard, t->offset, t->bytes), "%s", err.msg);
            free(dst);
        }
        for (int i = 0; i < 2; i++) {
            CHECK(cache_sound(m[i].k), "seed %u depth %d step %d", seed, depth, step);
            CHECK(b.o->n_background <= IO_BACKGROUND, "%d", b.o->n_background);
            for (int g = 0; g < m[i].n && exact; g++)
                CHECK(cache_holds(m[i].k, (size_t)g) == m[i].in[g], "step %d group %d", step, g);
        }
    }
    for (int i = 0; i < 2; i++) {
        uint64_t hits = 0, misses = 0;
        for (int g = 0; g < m[i].n; g++) {
            hits += cache_uses(m[i].k)[g].hits, misses += cache_uses(m[i].k)[g].misses;
            if (m[i].pins[g])
                CHECK(!cache_wait(m[i].k, m[i].slot[g], &err) &&
                      group_right(m[i].k, g, m[i].slot[g]), "at the end: %s", err.msg);
        }
        CHECK(hits == m[i].k->stats.hits && misses == m[i].k->stats.misses, "uses");
    }
    if (seed % 2) bank_close(&(bank){.k = m[1].k});
    else cache_close(b.k), b.k = m[1].k;
    bank_close(&b);                /* with reads on their way and pins held                     */
}

static void test_caches_share_an_offload(void) {
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_experts(dir, 24, 512, 544, SHUFFLED);
    for (uint32_t seed = 1; seed <= 12; seed++) {
        hook.refuse_ring = seed % 3 == 0;
        share(dir, seed, seed % 4 == 1 ? 1 : seed % 4 == 2 ? 5 : 0, seed > 6);
    }
    hook.refuse_ring = false;
    remove_tree(dir);
}

/* The order in which groups are asked for, as a text: "a" a piece of group 0, "A" the same in the
 * background, "=" one of a batch. */
static const char *order_of(const cache *k, int from) {
    static char text[sizeof hook.log / sizeof *hook.log + 1];
    int n = 0;
    for (int i = from; i < hook.n_log; i++) {
        const logged *l = &hook.log[i];
        text[n++] = !l->c ? '=' : l->c != k ? '.' : (char)((l->background ? 'A' : 'a') +
                                                           (char)l->id);
    }
    text[n] = 0;
    return text;
}

/* Groups of four pieces (3 and 1).  What a get asks for goes before all that the background has
 * not asked for yet; the background never has more than its half. */
static void test_background_never_delays(void) {
    enum { N = 26, DIM = 1536, INTER = 3072 };
    const char *dir = fresh_dir();
    bank b;
    dsv4_err err = {""};
    set_mood(CALM, 0, 0);
    write_experts(dir, N, DIM, INTER, CONTIGUOUS);
    if (!bank_open(&b, dir, N, N)) return;
    if (!b.o->has_ring) {          /* the order is the same, but threads do not tell it         */
        bank_close(&b);
        return;
    }
    CHECK(cache_slot_bytes(b.group, 1) > 7 * IO_PIECE, "8 pieces of weights or more");
    hook.n_log = 0;
    for (int i = 0; i < 20; i++) cache_ask(b.k, (size_t)i);
    CHECK(hook.n_log == IO_BACKGROUND && b.o->n_background == IO_BACKGROUND, "%d", hook.n_log);
    int slot = cache_get(b.k, 25, &err);       /* nothing has been reaped but by this call      */
    const char *order = order_of(b.k, IO_BACKGROUND);
    size_t pieces = strspn(order + strcspn(order, "z"), "z");
    CHECK(pieces > 7, "%s", order);
    CHECK(!cache_wait(b.k, slot, &err) && group_right(b.k, 25, slot), "%s", err.msg);
    cache_unpin(b.k, slot);
    for (int i = 0; i < 20; i++) CHECK(use_group(b.k, i, &err), "%s", err.msg);
    CHECK(b.k->stats.hits == 20 && b.k->stats.misses == 1, "the background's are hits");
    bank_close(&b);

    for (int pass = 0; pass < 2; pass++) {     /* what a prompt comes by is more in flight      */
        if (!bank_open(&b, dir, N, N)) return;
        for (int i = 0; i < N; i++)
            (void)(pass ? cache_pass : cache_get)(b.k, (size_t)i, &err);
        CHECK(b.o->in_flight <= (pass ? IO_DEPTH : IO_GETS), "%d", b.o->in_flight);
        for (int i = 0; i < N; i++)
            CHECK(!cache_wait(b.k, i, &err) && group_right(b.k, i, i), "%s", err.msg);
        bank_close(&b);
    }

    if (!bank_open(&b, dir, N, 8)) return;
    narrow(b.o, 1);
    hook.n_log = 0;
    for (int i = 0; i < 3; i++) cache_ask(b.k, (size_t)i);     /* a, b, c                       */
    CHECK(!strcmp(order_of(b.k, 0), "A"), "%s", order_of(b.k, 0));
    int d = cache_get(b.k, 3, &err), c = cache_get(b.k, 2, &err), e = cache_get(b.k, 4, &err);
    uint8_t *dst = malloc(b.group[9].part[0]->bytes);
    CHECK(!offload_load(b.o, &(load_item){b.group[9].part[0], dst}, 1, &err), "%s", err.msg);
    CHECK(!cache_wait(b.k, e, &err) && !cache_wait(b.k, c, &err) && !cache_wait(b.k, d, &err),
          "%s", err.msg);
    CHECK(!cache_get(b.k, 0, &err), "what is left of a");
    drain(b.o);
    CHECK(cache_holds(b.k, 0) && cache_holds(b.k, 1), "in");
    order = order_of(b.k, 0);      /* A.. d, c, e; the load fits in where it comes; a, B        */
    char seen[N + 2] = "";
    for (size_t i = 0, n = 0; order[i] && n <= N; i++)
        if (order[i] != '=' && (!n || seen[n - 1] != order[i])) seen[n++] = order[i], seen[n] = 0;
    CHECK(!strcmp(seen, "AdceAaB") || !strcmp(seen, "AdceaB"), "%s: %s", seen, order);
    free(dst);
    for (int i = 0; i < 5; i++) CHECK(use_group(b.k, i, &err), "%s", err.msg);
    bank_close(&b);
    remove_tree(dir);
}

/* A get takes the slot of what was asked for last and not begun, before it evicts or waits. */
static void test_background_gives_slots_back(void) {
    const char *dir = fresh_dir();
    bank b;
    dsv4_err err = {""};
    set_mood(CALM, 0, 0);
    write_experts(dir, 12, 1056, 2080, CONTIGUOUS);
    for (int way = 0; way < 2; way++) {
        hook.refuse_ring = way;
        if (!bank_open(&b, dir, 12, 4)) return;
        narrow(b.o, 1);
        CHECK(use_group(b.k, 11, &err), "%s", err.msg);
        for (int i = 0; i < 5; i++) cache_ask(b.k, (size_t)i); /* 3 and 4 find no free slot     */
        for (int i = 0; i < 5; i++) CHECK(!b.k->slot_of[i] == (i > 2), "group %d", i);
        cache_ask(b.k, 0);                     /* a second time: nothing                        */
        CHECK(b.k->n_orphans == 3 && cache_sound(b.k), "%d", b.k->n_orphans);
        int x = cache_get(b.k, 9, &err);
        CHECK(x >= 0 && !b.k->slot_of[2] && b.k->slot_of[1] && cache_holds(b.k, 11), "2 goes");
        int y = cache_get(b.k, 10, &err);
        CHECK(y >= 0 && !b.k->slot_of[1] && b.k->slot_of[0] && cache_holds(b.k, 11), "1 goes");
        CHECK(b.k->stats.evictions == 0 && cache_sound(b.k), "no evictions");
        int z = cache_get(b.k, 8, &err);       /* 0 has begun: 11 goes                          */
        CHECK(z >= 0 && !cache_holds(b.k, 11) && b.k->slot_of[0], "11 goes");
        CHECK(b.k->stats.evictions == 1 && cache_sound(b.k), "an eviction");
        int w = cache_get(b.k, 7, &err);       /* and now 0, when it is in                      */
        CHECK(w >= 0 && !b.k->slot_of[0] && cache_sound(b.k), "0 goes: %s", err.msg);
        CHECK(cache_get(b.k, 6, &err) == -1 && !err.msg[0], "all pinned: %s", err.msg);
        CHECK(!cache_wait(b.k, x, &err) && group_right(b.k, 9, x), "%s", err.msg);
        CHECK(!cache_wait(b.k, y, &err) && group_right(b.k, 10, y), "%s", err.msg);
        CHECK(!cache_wait(b.k, z, &err) && group_right(b.k, 8, z), "%s", err.msg);
        CHECK(!cache_wait(b.k, w, &err) && group_right(b.k, 7, w), "%s", err.msg);
        bank_close(&b);
    }
    hook.refuse_ring = false;
    remove_tree(dir);
}

/* What many tokens come by once: the cache holds what it held, but for as many of the coldest as
 * were pinned at a time, and goes on in the same order. */
static void test_passing_leaves_the_cache_as_it_is(void) {
    enum { N = 24, SLOTS = 10, AHEAD = 3 };
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_experts(dir, N, 512, 544, CONTIGUOUS);
    for (int way = 0; way < 2; way++) {
        bank b;
        dsv4_err err = {""};
        int slot[N];
        hook.refuse_ring = way;
        if (!bank_open(&b, dir, N, SLOTS)) return;
        for (int i = 0; i < SLOTS; i++) CHECK(use_group(b.k, 2 * i, &err), "%s", err.msg);
        for (int round = 0; round < 3; round++) {
            cache_stats before = b.k->stats;
            for (int i = 0; i < N; i++) {
                slot[i] = cache_pass(b.k, (size_t)i, &err);
                int done = i - AHEAD + 1;
                CHECK(slot[i] >= 0, "%s", err.msg);
                if (done < 0) continue;
                CHECK(!cache_wait(b.k, slot[done], &err) && group_right(b.k, done, slot[done]),
                      "%s", err.msg);
                cache_unpin(b.k, slot[done]);
            }
            for (int i = N - AHEAD + 1; i < N; i++) cache_unpin(b.k, slot[i]);
            drain(b.o);
            int lost = 0;
            for (int i = 0; i < SLOTS; i++) {
                bool in = cache_holds(b.k, (size_t)(2 * i));
                CHECK(in || i < AHEAD, "round %d: %d is out", round, 2 * i);
                lost += !in;
            }
            const cache_stats *x = &b.k->stats;
            CHECK(lost > 0 && x->evictions == (uint64_t)lost && cache_sound(b.k), "%d", lost);
            CHECK(x->hits + x->misses == before.hits + before.misses + N, "counted");
            CHECK(x->read_bytes > before.read_bytes, "counted");
        }
        uint64_t evictions = b.k->stats.evictions;
        for (int i = 0; i < AHEAD; i++) CHECK(use_group(b.k, 2 * i + 1, &err), "%s", err.msg);
        CHECK(b.k->stats.evictions == evictions, "what passed goes first");
        for (int i = AHEAD; i < SLOTS; i++) {  /* then the coldest                              */
            CHECK(cache_holds(b.k, (size_t)(2 * i)), "%d", i);
            CHECK(use_group(b.k, 2 * i + 1, &err), "%s", err.msg);
            CHECK(!cache_holds(b.k, (size_t)(2 * i)) && cache_sound(b.k), "%d", i);
        }
        bank_close(&b);

        if (!bank_open(&b, dir, N, SLOTS)) return;     /* an empty cache keeps what comes first */
        for (int round = 0; round < 2; round++)
            for (int i = 0; i < N; i++) {
                int at = cache_pass(b.k, (size_t)i, &err);
                CHECK(at >= 0 && !cache_wait(b.k, at, &err) && group_right(b.k, i, at), "%s",
                      err.msg);
                cache_unpin(b.k, at);
            }
        CHECK(b.k->stats.hits == SLOTS - 1 && b.k->stats.evictions == 0, "%d hits",
              (int)b.k->stats.hits);
        bank_close(&b);
    }
    hook.refuse_ring = false;
    remove_tree(dir);
}

/* Closing waits for what is on its way, asks for nothing more, and leaves the other cache alone. */
static void test_cache_close_waits(void) {
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_experts(dir, 12, 1056, 2080, CONTIGUOUS);
    for (int way = 0; way < 4; way++) {
        bank b;
        cache *k;
        dsv4_err err = {""};
        hook.refuse_ring = way & 1;
        if (!bank_open(&b, dir, 12, 6)) return;
        CHECK(!cache_open(&k, b.o, b.group, 12, 6, &err), "%s", err.msg);
        if (way & 2) narrow(b.o, 1);
        for (int i = 0; i < 3; i++) cache_get(k, (size_t)i, &err);
        for (int i = 3; i < 6; i++) cache_ask(k, (size_t)i);
        cache_ask(b.k, 7);         /* waits behind all of these                                 */
        CHECK(b.o->in_flight == k->in_flight + b.k->in_flight && k->in_flight, "in flight");
        set_mood(CALM, 0, 0);
        cache_close(k);
        CHECK(b.o->in_flight == b.k->in_flight && !b.o->demand.first, "%d", b.o->in_flight);
        CHECK(!(way & 2) || hook.seen <= 3, "%d reads", hook.seen);
        drain(b.o);
        CHECK(cache_holds(b.k, 7) && cache_sound(b.k) && use_group(b.k, 7, &err), "%s", err.msg);
        bank_close(&b);
    }
    hook.refuse_ring = false;
    remove_tree(dir);
}

/* Gets, asks and a load of two caches.  Each comes out right, or as an error that names its file;
 * the number of errors, or -1 for anything else. */
static int fixed_script(const bank *b, cache *layers) {
    int slot[4], errors = 0;
    dsv4_err err = {""};
    const ckpt_tensor *t = b->group[5].part[1];
    uint8_t *dst = malloc(t->bytes);
    cache_ask(b->k, 4);
    for (int i = 0; i < 3; i++) slot[i] = cache_get(b->k, (size_t)i, &err);
    slot[3] = cache_get(layers, 0, &err);
    cache_ask(layers, 1);
    for (int i = 0; i < 4; i++) {
        cache *k = i < 3 ? b->k : layers;
        err.msg[0] = 0;
        if (slot[i] < 0) return -1;
        if (cache_wait(k, slot[i], &err)) errors++;
        else if (!group_right(k, i % 3, slot[i])) return -1;
        if (err.msg[0] && (!says(&err, ".safetensors at byte ") || !says(&err, "tensor e")))
            return -1;
        cache_unpin(k, slot[i]);
    }
    err.msg[0] = 0;
    if (offload_load(b->o, &(load_item){t, dst}, 1, &err)) errors++;
    else if (!bytes_right(dst, t->shard, t->offset, t->bytes)) errors = -1;
    if (err.msg[0] && !says(&err, ".safetensors at byte ")) errors = -1;
    free(dst);
    drain(b->o);
    for (int i = 0; i < 6 && errors >= 0; i++) { /* what the background says it has is right    */
        if (!cache_holds(b->k, (size_t)i)) continue;
        int s = cache_get(b->k, (size_t)i, &err);
        if (s < 0 || cache_wait(b->k, s, &err) || !group_right(b->k, i, s)) errors = -1;
        cache_unpin(b->k, s);
    }
    return cache_sound(b->k) && cache_sound(layers) ? errors : -1;
}

/* For every read of a run, and every way in which it can go wrong. */
static void test_every_read_may_fail(void) {
    static const struct { int answer, times; bool right; } faults[] = {
        {-EIO, INT_MAX, false}, {-EIO, 1, true}, {-EIO, 2, false}, {1, 1, true}, {1, 4, true},
        {-EINTR, 1, true}, {-EAGAIN, 3, true}, {0, INT_MAX, false}, {0, 1, false},
    };
    const char *dir = fresh_dir();
    int n_reads[2] = {0}, failed = 0;
    set_mood(CALM, 0, 0);
    write_experts(dir, 12, 768, 1024, CONTIGUOUS);
    alarm(300);                    /* a hang ends the test                                      */
    for (int way = 0; way < 2; way++) {
        for (size_t f = 0; f < sizeof faults / sizeof *faults; f++) {
            for (int nth = 1; nth == 1 || nth <= n_reads[way]; nth++) {
                bank b;
                cache *layers;
                dsv4_err err = {""};
                const ckpt_tensor *part[12];
                read_group layer[2] = {{part, 6}, {part + 6, 6}};
                hook.refuse_ring = way;
                if (!bank_open(&b, dir, 12, 4)) return;
                for (int i = 0; i < 12; i++) part[i] = b.part[i + 50];
                CHECK(!cache_open(&layers, b.o, layer, 2, 2, &err), "%s", err.msg);
                set_mood(PLACE, faults[f].answer, nth);
                hook.times = faults[f].times;
                int errors = fixed_script(&b, layers), reads = hook.seen;
                if (faults[f].times == 1 && faults[f].answer == -EIO) n_reads[way] = reads - 1;
                if (!n_reads[way]) n_reads[way] = reads;
                CHECK(faults[f].right ? errors == 0 : errors >= 0, "way %d fault %zu read %d: %d",
                      way, f, nth, errors);
                failed += errors > 0;
                set_mood(CALM, 0, 0);
                CHECK(!fixed_script(&b, layers), "afterwards: way %d fault %zu read %d", way, f,
                      nth);
                cache_close(layers);
                bank_close(&b);
            }
        }
    }
    alarm(0);
    CHECK(failed > n_reads[0] && n_reads[0] > 15, "%d failed of %d reads", failed, n_reads[0]);
    NOTE("%d reads, %d runs failed", n_reads[0], failed);
    hook.refuse_ring = false;
    remove_tree(dir);
}

static json_t *heat_of(const char *path) {
    json_t *root = json_load_file(path, 0, NULL);
    json_t *heat = json_incref(json_object_get(root, "heat"));
    CHECK(json_array_size(heat) == 12, "groups");
    json_decref(root);
    return heat;
}

/* Which groups are in or on their way, as a bit each. */
static unsigned known(const cache *k) {
    unsigned set = 0;
    for (size_t i = 0; i < k->n_groups; i++) set |= (unsigned)!!k->slot_of[i] << i;
    return set;
}

static unsigned load_text(const char *dir, const char *model_dir, const char *text, int n_slots,
                          bank *b) {
    char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/heat.json", dir);
    if (text) write_file(dir, "heat.json", text, strlen(text));
    if (!bank_open(b, model_dir, 12, n_slots)) return 0;
    cache_load_heat(b->k, path);
    return known(b->k);
}

static void test_heat_is_kept(void) {
    static const char *const bad[] = {
        "", "[]", "{", "{}", "{\"heat\": 12}",
        "{\"heat\": [1,1,1,1,1,1,1,1,1,1,1,1,1]}",
        "{\"heat\": [1,1,1,1,1,1,1,1,1,1,1]}",
        "{\"heat\": [1,1,1,1,1,1,1,1,1,1,1,-1]}",
        "{\"heat\": [1,1,1,1,1,1,1,1,1,1,1,1.0]}",
        "{\"heat\": [1,1,1,1,1,1,1,1,1,1,1,4294967296]}",
        "{\"heat\": [1,1,1,1,1,1,1,1,1,1,1,null]}",
    };
    static const char good[] = "{\"heat\": [5,0,9,4294967295,9,0,1,2,9,0,0,7]}";
    char dir[PATH_MAX], path[PATH_MAX + 64];
    bank b;
    dsv4_err err = {""};
    set_mood(CALM, 0, 0);
    snprintf(dir, sizeof dir, "%s", fresh_dir());
    const char *model_dir = fresh_dir();
    write_experts(model_dir, 12, 64, 96, CONTIGUOUS);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(load_text(dir, model_dir, bad[i], 6, &b) == 0, "%s", bad[i]);
        for (int g = 0; g < 12; g++) CHECK(b.k->heat[g] == 0, "%s", bad[i]);
        bank_close(&b);
    }
    static const unsigned hottest[] = {0, 8, 0xc, 0x1c, 0x11c, 0x91c, 0x91d, 0x99d, 0x9dd, 0x9dd};
    for (int n = 1; n < 10; n++) { /* 3; 2 4 8; 11; 0; 7; 6: never the ones without heat        */
        unsigned set = load_text(dir, model_dir, good, n, &b);
        CHECK(set == hottest[n], "%d slots: %x", n, set);
        drain(b.o);
        CHECK(cache_sound(b.k), "sound");
        bank_close(&b);
    }
    CHECK(load_text(dir, model_dir, good, 4, &b) == 0x11c, "asked for");
    drain(b.o);                    /* the least hot goes first                                  */
    if (b.o->has_ring)
        CHECK(use_group(b.k, 0, &err) && cache_holds(b.k, 3) && cache_holds(b.k, 0), "%s", err.msg);
    else CHECK(use_group(b.k, 0, &err), "%s", err.msg);
    CHECK(use_group(b.k, 3, &err) && use_group(b.k, 3, &err) && use_group(b.k, 1, &err), "3 and 1");
    snprintf(path, sizeof path, "%s/heat", dir);
    for (int twice = 0; twice < 2; twice++) {
        static const json_int_t want[] = {3, 1, 4, 2147483649, 4, 0, 0, 1, 4, 0, 0, 3};
        CHECK(!cache_save_heat(b.k, path, &err), "%s", err.msg);
        json_t *heat = heat_of(path);
        for (size_t g = 0; g < 12; g++)
            CHECK(json_integer_value(json_array_get(heat, g)) == want[g], "group %zu", g);
        json_decref(heat);
    }
    b.k->uses[0].hits = b.k->uses[0].misses = UINT32_MAX;
    CHECK(!cache_save_heat(b.k, path, &err), "%s", err.msg);
    json_t *heat = heat_of(path);
    CHECK(json_integer_value(json_array_get(heat, 0)) == UINT32_MAX, "it stays loadable");
    json_decref(heat);
    CHECK(cache_save_heat(b.k, "/proc/no/such", &err) == -1 && says(&err, "/proc/no"), "%s",
          err.msg);
    bank_close(&b);
    remove_tree(dir);
}

/* === 7. Raw files ============================================================================= */

enum { RAW_BLOCKS = 900 };         /* of each file: 3.7 MB                                      */

typedef struct {                   /* an offload with raw files, and what these must hold       */
    ckpt *c;
    offload *o;
    int n, file[RAW_FILES];
    uint8_t *want[RAW_FILES], *buf[RAW_FILES];
} raws;

static bool raws_open(raws *r, const char *dir, int n, dsv4_err *err) {
    const char *note;
    *r = (raws){.n = n};
    int rc = ckpt_open(&r->c, dir, err) || offload_open(&r->o, r->c, &note, err);
    for (int i = 0; i < n && !rc; i++) {
        r->file[i] = offload_raw_open(r->o, dir, RAW_BLOCKS * IO_ALIGN, err);
        rc = r->file[i] != ckpt_n_shards(r->c) + i;
        r->want[i] = calloc(RAW_BLOCKS, IO_ALIGN);
        r->buf[i] = aligned_alloc(IO_ALIGN, RAW_BLOCKS * IO_ALIGN);
    }
    CHECK(!rc, "%s", err->msg);
    hook.raw = r->o;
    return !rc;
}

static void raws_close(raws *r) {
    for (int i = 0; i < r->n; i++) free(r->want[i]), free(r->buf[i]);
    offload_close(r->o);
    ckpt_close(r->c);
}

/* Write blocks [at, at + n) of file i anew, with what it must hold from then on. */
static int raws_write(raws *r, io_batch *b, int i, size_t at, size_t n, dsv4_err *err) {
    uint32_t seed = hook_random();
    for (size_t k = at * IO_ALIGN; k < (at + n) * IO_ALIGN; k++)
        r->want[i][k] = r->buf[i][k] = byte_at((int)seed & 0xffff, k);
    return batch_add(r->o, b, r->file[i], true, r->buf[i] + at * IO_ALIGN, at * IO_ALIGN,
                     n * IO_ALIGN, err);
}

/* Read all of every file in pieces of `step` blocks; true if it said so and all is right. */
static bool raws_right(raws *r, size_t step, dsv4_err *err) {
    io_batch b = {0};
    err->msg[0] = 0;
    for (int i = 0; i < r->n; i++) {
        memset(r->buf[i], 0xdd, RAW_BLOCKS * IO_ALIGN);
        for (size_t at = 0; at < RAW_BLOCKS; at += step)
            if (batch_add(r->o, &b, r->file[i], false, r->buf[i] + at * IO_ALIGN, at * IO_ALIGN,
                          (RAW_BLOCKS - at < step ? RAW_BLOCKS - at : step) * IO_ALIGN, err))
                return false;
    }
    if (batch_wait(r->o, &b, err)) return false;
    for (int i = 0; i < r->n; i++)
        if (memcmp(r->buf[i], r->want[i], RAW_BLOCKS * IO_ALIGN))
            return fail(err, "file %d holds other bytes", i) == 0;
    return true;
}

/* Fill every file by one batch, in ranges of random sizes. */
static int raws_fill(raws *r, dsv4_err *err) {
    io_batch b = {0};
    int rc = 0;
    err->msg[0] = 0;
    for (int i = 0; i < r->n; i++)
        for (size_t at = 0, n; at < RAW_BLOCKS && !rc; at += n) {
            n = 1 + hook_random() % 600;
            if (n > RAW_BLOCKS - at) n = RAW_BLOCKS - at;
            rc = raws_write(r, &b, i, at, n, err);
        }
    return batch_wait(r->o, &b, err) || rc ? -1 : 0;
}

static bool dir_holds(const char *dir, const char *only) {
    const struct dirent *e;
    DIR *d = opendir(dir);
    bool good = true;
    while ((e = readdir(d))) good &= e->d_name[0] == '.' || !strcmp(e->d_name, only);
    closedir(d);
    return good;
}

static const char *raw_dir(void) {
    const char *dir = fresh_dir();
    set_mood(CALM, 0, 0);
    write_shard(dir, "x.safetensors", 0, "{" T("a", "I8", "[9000]", "[0,9000]") "}", 9000);
    return dir;
}

static void test_raw_files_keep_what_is_written(void) {
    const char *dir = raw_dir();
    for (int way = 0; way < 16; way++) {
        raws r;
        dsv4_err err = {""};
        hook.refuse_ring = way & 1;
        hook.refuse_direct = way & 2;
        hook.refuse_tmpfile = way & 4;
        hook.refuse_room = way & 4 ? EOPNOTSUPP : 0;
        if (!raws_open(&r, dir, RAW_FILES, &err)) break;
        if (way & 8) narrow(r.o, way & 1 ? 1 : 3);
        CHECK(dir_holds(dir, "x.safetensors"), "it has a name");
        CHECK(!r.o->files[r.file[0]].direct == (way & 2) / 2, "%d", way);
        CHECK(!offload_note(r.o) == !(way & 3), "%d %s", way, offload_note(r.o));
        CHECK(raws_right(&r, 7, &err), "holes are zeros: %s", err.msg);
        for (int round = 0; round < 3; round++) {
            CHECK(!raws_fill(&r, &err) && raws_right(&r, 1 + hook_random() % 700, &err), "%d: %s",
                  way, err.msg);
            io_batch b = {0};
            for (int i = 0; i < r.n; i++)
                CHECK(!raws_write(&r, &b, i, hook_random() % RAW_BLOCKS, 1, &err), "%s", err.msg);
            CHECK(!batch_wait(r.o, &b, &err) && raws_right(&r, 300, &err), "%d: %s", way, err.msg);
        }
        const offload_stats *s = offload_get_stats(r.o);
        uint64_t all = (uint64_t)r.n * RAW_BLOCKS * IO_ALIGN;
        CHECK(s->read_bytes == 0 && s->raw_read == 7 * all, "read %g", (double)s->raw_read);
        CHECK(s->raw_written == 3 * (all + (uint64_t)r.n * IO_ALIGN), "%g", (double)s->raw_written);
        CHECK(!batch_wait(r.o, &(io_batch){0}, &err), "nothing at all");
        raws_close(&r);
    }
    hook.refuse_ring = hook.refuse_direct = hook.refuse_tmpfile = false;
    hook.refuse_room = 0;
    remove_tree(dir);
}

static void test_raw_files_are_refused_by_name(void) {
    const char *dir = raw_dir();
    char missing[PATH_MAX + 16], bytes[32];
    raws r;
    io_batch b = {0};
    dsv4_err err = {""};
    if (!raws_open(&r, dir, 1, &err)) return;
    CHECK(offload_raw_open(r.o, dir, 1ull << 60, &err) == -1 && says(&err, dir) &&
          says(&err, " 1152921504606846976 bytes, only for "), "%s", err.msg);
    hook.refuse_room = ENOSPC;
    snprintf(bytes, sizeof bytes, " %d bytes", 123 * IO_ALIGN);
    CHECK(offload_raw_open(r.o, dir, 123 * IO_ALIGN, &err) == -1 && says(&err, dir) &&
          says(&err, bytes) && says(&err, "only for ") && says(&err, "free some"), "%s", err.msg);
    hook.refuse_room = EIO;
    CHECK(offload_raw_open(r.o, dir, IO_ALIGN, &err) == -1 && says(&err, dir) &&
          says(&err, "Input/output error"), "%s", err.msg);
    hook.refuse_room = 0;
    CHECK(dir_holds(dir, "x.safetensors"), "something is left");
    snprintf(missing, sizeof missing, "%s/none", dir);
    CHECK(offload_raw_open(r.o, missing, IO_ALIGN, &err) == -1 && says(&err, missing) &&
          says(&err, "No such file"), "%s", err.msg);
    snprintf(missing, sizeof missing, "%s/x.safetensors", dir);
    CHECK(offload_raw_open(r.o, missing, IO_ALIGN, &err) == -1 && says(&err, missing) &&
          says(&err, "Not a directory"), "%s", err.msg);
    for (int i = 1; i < RAW_FILES; i++)
        CHECK(offload_raw_open(r.o, dir, IO_ALIGN, &err) == r.file[0] + i, "%s", err.msg);
    CHECK(!raws_fill(&r, &err) && raws_right(&r, 100, &err), "%s", err.msg);
    for (int i = 0; i < 9; i++) {  /* a place of one that was closed                            */
        offload_raw_close(r.o, r.file[0] + 1);
        CHECK(offload_raw_open(r.o, dir, IO_ALIGN, &err) == r.file[0] + 1, "%s", err.msg);
        memset(r.buf[0], i + 1, IO_ALIGN);
        CHECK(!batch_add(r.o, &b, r.file[0] + 1, true, r.buf[0], 0, IO_ALIGN, &err) &&
              !batch_wait(r.o, &b, &err), "%s", err.msg);
        memset(r.buf[0], 0, IO_ALIGN);
        CHECK(!batch_add(r.o, &b, r.file[0] + 1, false, r.buf[0], 0, IO_ALIGN, &err) &&
              !batch_wait(r.o, &b, &err) && r.buf[0][IO_ALIGN - 1] == i + 1, "%s", err.msg);
    }
    CHECK(raws_right(&r, 100, &err), "the others are as they were: %s", err.msg);
    raws_close(&r);
    remove_tree(dir);
}

static void test_raw_files_survive_bad_transfers(void) {
    static const struct { bool write; int answer; const char *says; } bad[] = {
        {true, -ENOSPC, "No space left on device; free some there"}, {true, -EIO, "Input/output"},
        {true, 0, "tried many times"}, {false, -EIO, "Input/output error"},
        {false, 0, "the file ends there"}, {false, -ENODEV, "No such device"},
    };
    const char *dir = raw_dir();
    for (int way = 0; way < 4; way++) {
        raws r;
        dsv4_err err = {""};
        hook.refuse_ring = way & 1;
        hook.refuse_direct = way & 2;
        if (!raws_open(&r, dir, 2, &err)) break;
        static const mood moods[] = {NTH, SHORT, INTR};
        for (size_t m = 0; m < sizeof moods / sizeof *moods; m++) {
            set_mood(moods[m], -EIO, 3);
            CHECK(!raws_fill(&r, &err), "way %d mood %d: %s", way, moods[m], err.msg);
            CHECK(hook.seen >= 4, "%d writes", hook.seen);
            set_mood(moods[m], -EIO, 3);
            CHECK(raws_right(&r, 33, &err), "way %d mood %d: %s", way, moods[m], err.msg);
        }
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            char where[PATH_MAX + 64];
            hook.shard = r.file[1], hook.fd = r.o->files[r.file[1]].fd;
            hook.at = 600 * IO_ALIGN + 9;
            set_mood(AT, bad[i].answer, 0);
            bool went = bad[i].write ? !raws_fill(&r, &err) : raws_right(&r, 1, &err);
            snprintf(where, sizeof where, "%s a temporary file in %s at byte ",
                     bad[i].write ? "write" : "read", dir);
            CHECK(!went && says(&err, bad[i].says) && says(&err, where), "%zu: %s", i, err.msg);
            CHECK(bad[i].write || says(&err, " 2457600: "), "%s", err.msg);
            CHECK(r.o->in_flight == 0, "%d in flight", r.o->in_flight);
            set_mood(CALM, 0, 0);
            CHECK(!raws_fill(&r, &err) && raws_right(&r, 50, &err), "after it: %s", err.msg);
        }
        set_mood(AGAIN, 0, 0);
        CHECK(raws_fill(&r, &err) && says(&err, "tried many times"), "%s", err.msg);
        set_mood(CALM, 0, 0);
        raws_close(&r);
    }
    hook.refuse_ring = hook.refuse_direct = false;
    remove_tree(dir);
}

/* For every transfer of a run, and every way in which it can go wrong: an error that says where, or
 * exact bytes; then all is well again. */
static void test_every_transfer_may_fail(void) {
    static const struct { int answer, times; bool right; } faults[] = {
        {-EIO, INT_MAX, false}, {-EIO, 1, true}, {-EIO, 2, false}, {1, 1, true}, {1, 4, true},
        {-EINTR, 1, true}, {-EAGAIN, 3, true}, {0, INT_MAX, false}, {-ENOSPC, 1, false},
    };
    const char *dir = raw_dir();
    int failed = 0, n = 0;
    alarm(300);                    /* a hang ends the test                                      */
    for (int way = 0; way < 2; way++) {
        raws r;
        dsv4_err err = {""};
        hook.refuse_ring = way;
        if (!raws_open(&r, dir, 2, &err)) break;
        for (size_t f = 0; f < sizeof faults / sizeof *faults; f++)
            for (int nth = 1; nth == 1 || nth <= n; nth++) {
                set_mood(PLACE, faults[f].answer, nth);
                hook.times = faults[f].times;
                hook.rng = 7;      /* the same ranges each time                                 */
                bool right = !raws_fill(&r, &err) && raws_right(&r, 250, &err);
                if (f == 1 && nth == 1) n = hook.seen - 1;
                CHECK(right || (says(&err, "a temporary file in ") && says(&err, " at byte ")),
                      "way %d fault %zu transfer %d: %s", way, f, nth, err.msg);
                CHECK(right == faults[f].right, "way %d fault %zu transfer %d: %s", way, f, nth,
                      err.msg);
                CHECK(r.o->in_flight == 0, "%d in flight", r.o->in_flight);
                failed += !right;
                set_mood(CALM, 0, 0);
                CHECK(!raws_fill(&r, &err) && raws_right(&r, 250, &err), "afterwards: %s", err.msg);
            }
        raws_close(&r);
    }
    alarm(0);
    CHECK(n > 15 && failed > 4 * n, "%d failed of %d transfers", failed, n);
    NOTE("%d transfers, %d runs failed", n, failed);
    hook.refuse_ring = false;
    remove_tree(dir);
}

/* With one request: behind what a get has asked for, before what the background has. */
static void test_batches_precede_the_background(void) {
    enum { N = 12 };
    const char *dir = fresh_dir();
    bank b;
    dsv4_err err = {""};
    io_batch batch = {0};
    set_mood(CALM, 0, 0);
    write_experts(dir, N, 1056, 2080, CONTIGUOUS);
    if (!bank_open(&b, dir, N, 6)) return;
    int file = offload_raw_open(b.o, dir, 4 * IO_PIECE, &err);
    uint8_t *buf = aligned_alloc(IO_ALIGN, 4 * IO_PIECE);
    CHECK(file == 3, "%s", err.msg);
    hook.raw = b.o;
    if (b.o->has_ring) {
        narrow(b.o, 1);
        hook.n_log = 0;
        cache_ask(b.k, 0);
        cache_ask(b.k, 1);
        int slot = cache_get(b.k, 2, &err);
        memset(buf, 7, 4 * IO_PIECE);
        CHECK(!batch_add(b.o, &batch, file, true, buf, 0, 4 * IO_PIECE, &err) &&
              !batch_wait(b.o, &batch, &err), "%s", err.msg);
        const char *order = order_of(b.k, 0);
        size_t c = 1 + strspn(order + 1, "c"), batched = strspn(order + c, "=");
        CHECK(order[0] == 'A' && c > 1 && batched == 4, "%s", order);
        drain(b.o);
        CHECK(cache_holds(b.k, 0) && cache_holds(b.k, 1), "the background comes last");
        CHECK(!cache_wait(b.k, slot, &err) && group_right(b.k, 2, slot), "%s", err.msg);
    }
    free(buf);
    bank_close(&b);
    remove_tree(dir);
}

/* === 8. Sampling, generation, survey ========================================================== */

/* What each() was told, a line each. */
static struct { char text[1 << 15]; size_t n; int lines; } told;

static void tell(void *arg, const char *line) {
    (void)arg;
    CHECK(!strchr(line, '\n'), "%s", line);
    told.n += (size_t)snprintf(told.text + told.n, sizeof told.text - told.n, "%s\n", line);
    told.lines++;
}

static void forget(void) {
    told.n = 0;
    told.lines = 0;
    told.text[0] = 0;
}

static void make_dir(const char *dir, const char *name) {
    char path[PATH_MAX + 256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    mkdir(path, 0700);
}

static void remove_file(const char *dir, const char *name) {
    char path[PATH_MAX + 256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (remove(path)) printf("     could not remove %s\n", path);
}

#define NONE {0, 0, 0, 0, 0, 0}

static void test_sampling_is_what_the_makers_say(void) {
    static const struct { const char *json; sample_opts want; const char *fragment; } tries[] = {
        {NULL, {1, 1, 0, 1, 0, 7}, NULL}, {"{}", {1, 1, 0, 1, 0, 7}, NULL},
        {"{\"temperature\": 0.6, \"top_p\": 0.95, \"top_k\": 20, \"min_p\": 0.05,"
         "\"repetition_penalty\": 1.1, \"do_sample\": true, \"seed\": 9, \"eos_token_id\": 1}",
         {.6f, .95f, .05f, 1.1f, 20, 7}, NULL},
        {"{\"temperature\": 1, \"top_p\": 1, \"top_k\": null, \"do_sample\": null}",
         {1, 1, 0, 1, 0, 7}, NULL},
        {"{\"temperature\": 0.6, \"do_sample\": false, \"top_k\": 5}", {0, 1, 0, 1, 5, 7}, NULL},
        {"{\"temperature\": 0}", {0, 1, 0, 1, 0, 7}, NULL},
        {"{\"temperature\": -0.1}", NONE, "temperature is -0.1; accepted: numbers from 0"},
        {"{\"temperature\": \"1\"}", NONE, "temperature is \"1\""},
        {"{\"temperature\": true}", NONE, "temperature is true"},
        {"{\"top_p\": 0}", NONE, "top_p is 0"}, {"{\"top_p\": 1.01}", NONE, "top_p is 1.01"},
        {"{\"top_p\": 1e-60}", NONE, "top_p is 1e-60"},
        {"{\"top_k\": -1}", NONE, "top_k is -1"}, {"{\"top_k\": 2.0}", NONE, "top_k is 2.0"},
        {"{\"top_k\": 1e9}", NONE, "top_k is 1"}, {"{\"min_p\": 1}", NONE, "min_p is 1"},
        {"{\"min_p\": 0.999999999}", NONE, "min_p is 0.999999999"},
        {"{\"min_p\": -0.5}", NONE, "min_p is -0.5"},
        {"{\"repetition_penalty\": 0}", NONE, "repetition_penalty is 0"},
        {"{\"repetition_penalty\": -2}", NONE, "repetition_penalty is -2"},
        {"{\"do_sample\": 0}", NONE, "do_sample is 0; accepted: true or false"},
        {"[]", NONE, "not a JSON object"}, {"{", NONE, "line 1"}, {"", NONE, "line 1"},
    };
    const char *dir = fresh_dir();
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        sample_opts o = {9, 9, 9, 9, 9, 7}, w = tries[i].want;
        dsv4_err err = {""};
        const char *json = tries[i].json;
        if (json) write_file(dir, "generation_config.json", json, strlen(json));
        int rc = config_sampling(&o, dir, &err);
        if (tries[i].fragment)
            CHECK(rc == -1 && says(&err, tries[i].fragment) &&
                  says(&err, "generation_config.json: "), "%s gave %d: %s", json, rc, err.msg);
        else
            CHECK(!rc && o.temperature == w.temperature && o.top_p == w.top_p &&
                  o.min_p == w.min_p && o.repetition_penalty == w.repetition_penalty &&
                  o.top_k == w.top_k && o.seed == 7, "%s: %s", json, err.msg);
    }
    remove_file(dir, "generation_config.json");
    make_dir(dir, "generation_config.json");
    sample_opts o;
    dsv4_err err = {""};
    CHECK(config_sampling(&o, dir, &err) == -1 && says(&err, "not a regular file"), "%s", err.msg);
}

static void generation_is(const char *dir, int want, const char *why) {
    dsv4_err err = {""};
    generation g = (generation)9;
    int rc = config_generation(&g, dir, &err);
    CHECK(want < 0 ? rc == -1 && err.msg[0] : !rc && (int)g == want, "%s: %d %d %s", why, rc,
          (int)g, err.msg);
}

static void test_generation_of_a_checkpoint(void) {
    static const char old[] = "X = {\"max\": 1}", new[] = "a\0REASONING_EFFORT_PROMPTS = {";
    static const char index_old[] = "{\"weight_map\": {\"mtp.0.x\": \"a\", \"xmtp.1.\": \"a\"}}";
    static const char index_new[] = "{\"weight_map\": {\"a\": \"a\", \"mtp.1.x\": \"b\"}}";
    const char *dir = fresh_dir();
    generation_is(dir, GEN_V4, "an empty directory");
    generation_is("/nonexistent-dir", -1, "no directory");
    write_shard(dir, "m.safetensors", 0, A4, 4);
    generation_is(dir, GEN_V4, "no mtp.1");
    write_shard(dir, "n.safetensors", 0, "{" T("mtp.1.b", "U8", "[4]", "[0,4]") "}", 4);
    generation_is(dir, GEN_0731, "mtp.1 in a shard");
    write_file(dir, "n.safetensors", "xx", 2);
    generation_is(dir, -1, "a damaged shard");
    write_file(dir, "model.safetensors.index.json", index_old, sizeof index_old - 1);
    generation_is(dir, GEN_V4, "the index has no mtp.1");
    write_file(dir, "model.safetensors.index.json", index_new, sizeof index_new - 1);
    generation_is(dir, GEN_0731, "the index has mtp.1");
    make_dir(dir, "encoding");
    generation_is(dir, GEN_0731, "no file in encoding");
    write_file(dir, "encoding/encoding_dsv4.py", old, sizeof old - 1);
    generation_is(dir, GEN_V4, "encoding of the first generation");
    write_file(dir, "encoding/encoding_dsv4.py", new, sizeof new - 1);
    write_file(dir, "model.safetensors.index.json", index_old, sizeof index_old - 1);
    generation_is(dir, GEN_0731, "encoding of the second generation");
    write_file(dir, "encoding/encoding_dsv4.py", new, sizeof new - 3 - 20);
    generation_is(dir, GEN_V4, "a name cut off");
    char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/encoding/encoding_dsv4.py", dir);
    CHECK(!truncate(path, (off_t)1 << 30), "truncate");
    generation_is(dir, -1, "1 GB of it");
}

static int survey(const char *dir, dsv4_err *err) {
    forget();
    err->msg[0] = 0;
    return ckpt_survey(dir, tell, NULL, err);
}

#define CUT(file, have, part, all) file ".safetensors: has " have " bytes but its header " part \
    " " all ": the file is cut short, download it again\n"
#define BIG "{" T("a", "U8", "[3456789012]", "[0,3456789012]") "}"

#define CUT3 CUT("m-3", "1299999999", "describes", "3456789097")

static void test_survey_names_what_is_not_there(void) {
    static const char index[] =
        "{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-2.safetensors\","
        "\"c\": \"m-3.safetensors\", \"d\": \"m-4.safetensors\", \"e\": \"m-3.safetensors\"}}";
    static const struct { const char *file, *bytes; size_t n; int64_t size; const char *want; }
    steps[] = {
        {"m-3.safetensors", "\115\0\0\0\0\0\0\0" BIG, 8 + sizeof BIG - 1, 1299999999,
         "m-1.safetensors: missing\nm-2.safetensors: missing\n"
         CUT3 "m-4.safetensors: missing\n"},
        {"m-1.safetensors", "\2\0\0\0\0\0\0\0{}", 10, -1, "m-2.safetensors: missing\n"
         CUT3 "m-4.safetensors: missing\n"},
        {"m-2.safetensors", "\2\0\0\0\0\0\0\0{", 9, -1, CUT("m-2", "9", "alone needs", "10")
         CUT3 "m-4.safetensors: missing\n"},
        {"m-2.safetensors", "\2\0\0", 3, -1, CUT("m-2", "3", "alone needs", "10")
         CUT3 "m-4.safetensors: missing\n"},
        {"m-2.safetensors", "", 0, -1, CUT("m-2", "0", "alone needs", "8")
         CUT3 "m-4.safetensors: missing\n"},
        {"m-2.safetensors", "\0\0\0\0\0\0\0\0\0\0", 10, -1, "m-2.safetensors: header of 0 bytes; "
         "accepted: 2 to 104857600: this is no safetensors file, or it is damaged\n"
         CUT3 "m-4.safetensors: missing\n"},
        {"m-2.safetensors", "\2\0\0\0\0\0\0\0{}", 10, -1,
         CUT3 "m-4.safetensors: missing\n"},
        {"m-3.safetensors", NULL, 0, 8 + 77 + 3456789011,
         CUT("m-3", "3456789096", "describes", "3456789097") "m-4.safetensors: missing\n"},
        {"m-3.safetensors", NULL, 0, 8 + 77 + 3456789012, "m-4.safetensors: missing\n"},
        {"m-4.safetensors", "\101\0\0\0\0\0\0\0{" T("a", "I8", "[2000]", "[0,2000]") "}", 1000, -1,
         CUT("m-4", "1000", "describes", "2073")},
        {"m-4.safetensors", "\2\0\0\0\0\0\0\0{}", 10, -1, ""},
    };
    const char *dir = fresh_dir();
    dsv4_err err;
    char path[PATH_MAX + 256], zeros[1100] = {0};
    write_file(dir, "model.safetensors.index.json", index, sizeof index - 1);
    write_file(dir, "z.safetensors", "of no index", 11);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        if (steps[i].bytes) {      /* a text is shorter than the file it begins                 */
            size_t text = steps[i].n > 500 ? 8 + 65 : steps[i].n;
            memcpy(memset(zeros, 0, sizeof zeros), steps[i].bytes, text);
            write_file(dir, steps[i].file, zeros, steps[i].n);
        }
        snprintf(path, sizeof path, "%s/%s", dir, steps[i].file);
        CHECK(steps[i].size < 0 || !truncate(path, steps[i].size), "truncate %s", path);
        int n = survey(dir, &err), want = 0;
        for (const char *p = steps[i].want; *p; p++) want += *p == '\n';
        CHECK(n == want && !strcmp(told.text, steps[i].want), "step %zu: %d %s%s", i, n, err.msg,
              told.text);
    }
    remove_tree(dir);
}

static void test_survey_of_no_model(void) {
    const char *dir = fresh_dir();
    dsv4_err err;
    CHECK(survey(dir, &err) == 0 && !told.lines, "%s", told.text);
    CHECK(survey("/nonexistent-dir", &err) == -1 && says(&err, "/nonexistent-dir: No such"), "%s",
          err.msg);
    write_shard(dir, "b.safetensors", 0, A4, 4);
    CHECK(survey(dir, &err) == 0 && !told.lines, "%s", told.text);
    write_shard(dir, "a.safetensors", 0, A4, 3);
    make_dir(dir, "c.safetensors");
    CHECK(survey(dir, &err) == 2 && !strncmp(told.text, "a.safetensors: has ", 19) &&
          strstr(told.text, "\nc.safetensors: open ") && strstr(told.text, "not a regular file"),
          "%s", told.text);
    write_file(dir, "model.safetensors.index.json", "{}", 2);
    CHECK(survey(dir, &err) == -1 && says(&err, "weight_map is absent"), "%s", err.msg);
}

enum { RANGE = 3 * STREAM_BYTES };

/* === 9. Hashes and disks ====================================================================== */

static struct {
    int calls, lines;
    bool down;
    double stop, last, silence, then;
} seen;

/* Stops at a share.  Silence is the longest between two calls, but for the record's fsync. */
static int watch(void *arg, double done) {
    double now = now_s();
    (void)arg;
    seen.down |= done < seen.last || done > 1;
    if (seen.calls++ && seen.lines == told.lines && seen.silence < now - seen.then)
        seen.silence = now - seen.then;
    seen.then = now;
    seen.last = done;
    seen.lines = told.lines;
    return done >= seen.stop;
}

static int hash_dir(const char *dir, const char *record, double stop, int *changed, dsv4_err *err) {
    ckpt *c;
    forget();
    memset(&seen, 0, sizeof seen);
    seen.stop = stop;
    *changed = -1;
    err->msg[0] = 0;
    if (ckpt_open(&c, dir, err)) return -2;
    int rc = ckpt_hash(c, record, tell, watch, NULL, changed, err);
    ckpt_close(c);
    return rc;
}

static bool told_all(const char *const *want) {
    const char *at = told.text;
    for (; *want; want++) {
        const char *hit = strstr(at, *want);
        if (!hit) return false;
        at = hit + strlen(*want);
    }
    return true;
}

/* Byte 9 of a file becomes this one; the size stays. */
static void flip(const char *dir, const char *file, char byte, long at) {
    char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    FILE *f = fopen(path, "r+b");
    CHECK(f && !fseek(f, at, SEEK_SET) && fputc(byte, f) == byte && !fclose(f), "%s", path);
}

static void age_record(const char *record) {
    json_t *root = json_load_file(record, 0, NULL), *v;
    const char *name;
    json_object_foreach(root, name, v)
        json_object_set_new(root, name, json_sprintf("%.32s 2001-02-03", json_string_value(v)));
    CHECK(!json_dump_file(root, record, 0), "%s", record);
    json_decref(root);
}

static void test_hash_remembers(void) {
    const char *dir = fresh_dir();
    char record[PATH_MAX + 64], today[32];
    dsv4_err err;
    int changed;
    set_mood(CALM, 0, 0);
    make_dir(dir, "new");
    make_dir(dir, "new/deep");
    snprintf(record, sizeof record, "%s/new/deep/record.json", dir);
    write_file(dir, "a.safetensors", "\2\0\0\0\0\0\0\0{}", 10);
    write_shard(dir, "long-name.safetensors", 1, B4, 4);
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0, "%s", err.msg);
    CHECK(told.lines == 2 && told_all((const char *const[]){ /* by xxhsum -H2 */
          "a.safetensors  19aae81a9fc6b75c6d333529e3c47542  new\nlong-name.safetensors  ",
          "  new\n", NULL}), "%s", told.text);
    CHECK(seen.last == 1 && !seen.down && seen.calls >= 2, "%d calls", seen.calls);
    time_t now = time(NULL);
    strftime(today, sizeof today, "as on %Y-%m-%d\n", localtime(&now));
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 && told.lines == 2 &&
          told_all((const char *const[]){today, today, NULL}), "%s%s", err.msg, told.text);
    age_record(record);
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 && told.lines == 2 &&
          told_all((const char *const[]){"as on 2001-02-03\n", "as on 2001-02-03\n", NULL}), "%s",
          told.text);
    flip(dir, "long-name.safetensors", 'x', 70);
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 1 && told.lines == 2 &&
          told_all((const char *const[]){"as on 2001-02-03\n", "CHANGED since 2001-02-03\n", NULL}),
          "%d %s", changed, told.text);
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 &&
          told_all((const char *const[]){"as on 2001-02-03\n", today, NULL}), "%s", told.text);
    remove_file(dir, "a.safetensors");
    write_shard(dir, "b.safetensors", 0, A4, 4);
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 && told.lines == 2 &&
          told_all((const char *const[]){"b.safetensors  ", "  new\nlong-name", today,
          NULL}), "%d %s", changed, told.text);
    CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 && told.lines == 2 &&
          told_all((const char *const[]){today, today, NULL}), "%s", told.text);
    static const char *const damage[] = {
        "{\"b.safetensors\"", "[]", "", "{\"b.safetensors\": 5}",
        "{\"b.safetensors\": \"0123456789abcdef0123456789abcdef\"}",
    };
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        write_file(dir, "new/deep/record.json", damage[i], strlen(damage[i]));
        CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 && told.lines == 3 &&
              told_all((const char *const[]){"the record is damaged", "new\n", "new\n", NULL}),
              "%s: %d %s%s", damage[i], changed, err.msg, told.text);
    }
    DIR *d = opendir(strcat(strcpy(record, dir), "/new/deep"));
    int files = 0;
    while (d && readdir(d)) files++;
    if (d) closedir(d);
    CHECK(files == 3, "%d files beside the record", files - 3);
    snprintf(record, sizeof record, "%s/b.safetensors/x/record", dir);
    CHECK(hash_dir(dir, record, 2, &changed, &err) == -1 && says(&err, "b.safetensors"), "%s",
          err.msg);
    snprintf(record, sizeof record, "%s/new", dir);
    CHECK(hash_dir(dir, record, 2, &changed, &err) == -1 && says(&err, "write "), "%s", err.msg);
}

/* The hash of a file by one call, all of it in memory. */
static void hash_of(const char *dir, const char *file, char hex[33]) {
    char path[PATH_MAX + 64], *text;
    size_t len = 0;
    dsv4_err err = {""};
    snprintf(path, sizeof path, "%s/%s", dir, file);
    CHECK(!read_text(&text, &len, path, 1 << 30, &err), "%s", err.msg);
    XXH128_hash_t h = XXH3_128bits(text, len);
    snprintf(hex, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
    free(text);
}

static void test_hash_every_way_of_reading(void) {
    static const uint32_t sizes[] = {2 * RANGE, 30000000, 1, 4096, 3 * RANGE + 4095};
    enum { N = sizeof sizes / sizeof *sizes };
    const char *dir = fresh_dir(), *want[N + 1] = {NULL};
    char record[PATH_MAX + 64], header[128], hex[N][33], file[32];
    dsv4_err err;
    int changed;
    snprintf(record, sizeof record, "%s/record", dir);
    for (int i = 0; i < N; i++) {  /* the first ends where a range does                         */
        uint32_t n = i ? sizes[i] : sizes[i] - 8 - 72;
        snprintf(header, sizeof header, "{\"t%d\": {\"dtype\": \"I8\", \"shape\": [%u], "
                 "\"data_offsets\": [0,%u]}}", i, n, n);
        snprintf(header + strlen(header), 8, "%*s", i ? 0 : 72 - (int)strlen(header), "");
        snprintf(file, sizeof file, "s%d.safetensors", i);
        write_shard(dir, file, i, header, n);
        hash_of(dir, file, hex[i]);
        want[i] = hex[i];
    }
    for (int way = 0; way < 4; way++) {
        static const mood moods[] = {CALM, NTH, SHORT, INTR};
        hook.refuse_ring = way & 1;
        hook.refuse_direct = way & 2;
        for (size_t m = 0; m < sizeof moods / sizeof *moods; m++) {
            set_mood(moods[m], -EIO, 20); /* not one of the headers                             */
            CHECK(!hash_dir(dir, record, 2, &changed, &err) && changed == 0 && told.lines == N &&
                  told_all(want), "way %d mood %zu: %d %s %s", way, m, changed, err.msg, told.text);
            CHECK(!seen.down && seen.last == 1, "%g", seen.last);
            CHECK(seen.silence < 5, "%.3f s", seen.silence);  /* others use this machine */
        }
        set_mood(CALM, 0, 0);
        remove_file(dir, "record");
        CHECK(hash_dir(dir, record, 0.7, &changed, &err) == -1 && told.lines > 1 &&
              !strcmp(err.msg, "interrupted") && told.lines < N, "%s", err.msg);
        json_t *root = json_load_file(record, 0, NULL);
        int lines = (int)json_object_size(root);
        CHECK(lines == told.lines, "%d of %d recorded", lines, told.lines);
        json_decref(root);
        CHECK(hash_dir(dir, record, 0, &changed, &err) == -1 && !strcmp(err.msg, "interrupted") &&
              !told.lines, "%s", err.msg);
        hook.shard = 1, hook.at = 20000000;
        if (!(way & 1)) {          /* the threads' fd is not known before                        */
            set_mood(AT, -EIO, 0);
            CHECK(hash_dir(dir, record, 2, &changed, &err) == -1 && told.lines == 1 &&
                  says(&err, "s1.safetensors at byte ") && says(&err, ": Input/output error") &&
                  !strstr(err.msg, "tensor ") , "%s", err.msg);
        }
        set_mood(CALM, 0, 0);
    }
    hook.refuse_ring = hook.refuse_direct = false;
    remove_tree(dir);
}

static void link_to(const char *top_dir, const char *target, const char *name) {
    char path[PATH_MAX + 256];
    snprintf(path, sizeof path, "%s/%s", top_dir, name);
    CHECK(!symlink(target, path), "symlink %s", path);
}

/* mkdir -p of a path below dir, and its files "queue/rotational" and "dm/uuid" where given. */
static void make_disk(const char *dir, const char *name, const char *rotational, const char *uuid) {
    char path[PATH_MAX + 64];
    for (const char *p = name; (p = strchr(p, '/')); p++) {
        snprintf(path, sizeof path, "%.*s", (int)(p - name), name);
        make_dir(dir, path);
    }
    make_dir(dir, name);
    const struct { const char *sub, *file, *text; } parts[] = {
        {"queue", "queue/rotational", rotational}, {"dm", "dm/uuid", uuid}};
    for (int i = 0; i < 2; i++) {
        if (!parts[i].text) continue;
        snprintf(path, sizeof path, "%s/%s", name, parts[i].sub);
        make_dir(dir, path);
        snprintf(path, sizeof path, "%s/%s", name, parts[i].file);
        write_file(dir, path, parts[i].text, strlen(parts[i].text));
    }
    snprintf(path, sizeof path, "%s/slaves", name);
    if (rotational) make_dir(dir, path);
}

static void test_disk_by_sysfs(void) {
    char path[PATH_MAX + 64];
#define PCI "devices/pci0000:00/0000:00:17.0/"
    static const struct { const char *node, *rotational, *uuid; } disks[] = {
        {PCI "nvme/nvme0/nvme0n1", "0\n", NULL}, {PCI "nvme/nvme0/nvme0n1/nvme0n1p2", NULL, NULL},
        {PCI "ata1/host0/target0:0:0/0:0:0:0/block/sda", "0\n", NULL},
        {PCI "ata1/host0/target0:0:0/0:0:0:0/block/sda/sda3", NULL, NULL},
        {PCI "usb2/2-1/host3/block/sdb", "1\n", NULL},
        {"devices/virtual/block/dm-0", "0\n", "CRYPT-LUKS2-0123-luks\n"},
        {"devices/virtual/block/dm-1", "0\n", "CRYPT-LUKS2-4567-luks\n"},
        {"devices/virtual/block/dm-2", "0\n", "LVM-abcdef\n"},
        {"devices/virtual/block/md0", "0\n", NULL}, {"devices/virtual/block/md0/md0p1", NULL, NULL},
        {"devices/virtual/block/dm-3", "0\n", "mpath-CRYPT-\n"},
    };
    static const struct { const char *from, *to; } links[] = {
        {"dev/block/259:2", "../../" PCI "nvme/nvme0/nvme0n1/nvme0n1p2"},
        {"dev/block/259:0", "../../" PCI "nvme/nvme0/nvme0n1"},
        {"dev/block/8:3", "../../" PCI "ata1/host0/target0:0:0/0:0:0:0/block/sda/sda3"},
        {"dev/block/8:16", "../../" PCI "usb2/2-1/host3/block/sdb"},
        {"dev/block/254:0", "../../devices/virtual/block/dm-0"},
        {"dev/block/254:2", "../../devices/virtual/block/dm-2"},
        {"dev/block/9:1", "../../devices/virtual/block/md0/md0p1"},
        {"dev/block/254:3", "../../devices/virtual/block/dm-3"},
        {"devices/virtual/block/dm-0/slaves/nvme0n1p2",
         "../../../../../" PCI "nvme/nvme0/nvme0n1/nvme0n1p2"},
        {"devices/virtual/block/dm-1/slaves/sda3",
         "../../../../../" PCI "ata1/host0/target0:0:0/0:0:0:0/block/sda/sda3"},
        {"devices/virtual/block/dm-2/slaves/dm-1", "../../dm-1"},
        {"devices/virtual/block/dm-3/slaves/sdb", "../../../../../" PCI "usb2/2-1/host3/block/sdb"},
        {"devices/virtual/block/md0/slaves/sdb", "../../../../../" PCI "usb2/2-1/host3/block/sdb"},
        {"devices/virtual/block/md0/slaves/dm-2", "../../dm-2"},
    };
    static const struct { unsigned major, minor; const char *device; bool rot, sata, crypt; }
    want[] = {
        {259, 2, "nvme0n1p2", false, false, false}, {259, 0, "nvme0n1", false, false, false},
        {8, 3, "sda3", false, true, false}, {8, 16, "sdb", true, false, false},
        {254, 0, "nvme0n1p2", false, false, true}, {254, 2, "sda3", false, true, true},
        {9, 1, NULL, true, true, true}, {254, 3, "sdb", true, false, false},
        {7, 7, "", false, false, false},
    };
    const char *dir = fresh_dir();
    for (size_t i = 0; i < sizeof disks / sizeof *disks; i++)
        make_disk(dir, disks[i].node, disks[i].rotational, disks[i].uuid);
    make_disk(dir, "dev/block", NULL, NULL);
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        link_to(dir, links[i].to, links[i].from);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        disk_info d = {.fs = ""};
        snprintf(path, sizeof path, "%s/dev/block/%u:%u", dir, want[i].major, want[i].minor);
        describe_node(&d, path);
        CHECK((!want[i].device || !strcmp(d.device, want[i].device)) &&
              d.rotating == want[i].rot && d.sata == want[i].sata &&
              d.encrypted == want[i].crypt, "%u:%u is %s%s%s%s", want[i].major, want[i].minor,
              d.device, d.rotating ? " rotating" : "", d.sata ? " sata" : "",
              d.encrypted ? " encrypted" : "");
    }
}

static void test_disk_by_mount(void) {
    static const struct { const char *fs; bool network, fuse; } kinds[] = {
        {"ext4", false, false}, {"nfs4", true, false}, {"fuse.sshfs", true, true},
        {"fuseblk", false, true}, {"fuse", false, true}, {"9p", true, false},
        {"cifs", true, false}, {"xfs", false, false}, {"nfsd", false, false},
    };
    disk_info d;
    dsv4_err err = {""};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        d = (disk_info){.fs = ""};
        snprintf(d.fs, sizeof d.fs, "%s", kinds[i].fs);
        describe_fs(&d);
        CHECK(d.network == kinds[i].network && d.fuse == kinds[i].fuse, "%s", kinds[i].fs);
    }
    CHECK(!disk_describe(&d, "/proc", "/sys", &err) && !strcmp(d.fs, "proc") && !d.device[0] &&
          !d.network, "%s %s %s", d.fs, d.device, err.msg);
    if (!access("/dev/shm", F_OK))
        CHECK(!disk_describe(&d, "/dev/shm", "/sys", &err) && strstr(d.fs, "tmpfs"), "%s", d.fs);
    CHECK(!disk_describe(&d, top, "/nonexistent", &err) && d.fs[0] && !d.device[0], "%s", d.fs);
    bool rooted = !system("grep -q '^[^ ]* [^ ]* [^ ]* [^ ]* / ' /proc/self/mountinfo");
    CHECK(!disk_describe(&d, top, "/sys", &err) && rooted == !!strcmp(d.fs, "unknown"), "%s", d.fs);
    NOTE("%s on '%s'", d.fs, d.device);
    CHECK(disk_describe(&d, "/nonexistent-dir", "/sys", &err) == -1 && says(&err, "No such"), "%s",
          err.msg);
}

static double measure(const char *dir, double limit, uint64_t *read, dsv4_err *err) {
    ckpt *c;
    double rate = -1;
    err->msg[0] = 0;
    if (ckpt_open(&c, dir, err)) return -2;
    uint64_t before = bytes_read();
    if (disk_measure(c, RANGE, limit, &rate, err)) rate = -1;
    *read = bytes_read() - before;
    ckpt_close(c);
    return rate;
}

static void test_disk_measure(void) {
    const char *dir = fresh_dir();
    char header[128];
    dsv4_err err;
    uint64_t read, size = 0;
    for (int i = 0; i < 3; i++) {
        uint32_t n = i == 2 ? 5000 : 40000000;
        char file[32];
        snprintf(header, sizeof header, "{\"t%d\": {\"dtype\": \"I8\", \"shape\": [%u], "
                 "\"data_offsets\": [0,%u]}}", i, n, n);
        snprintf(file, sizeof file, "s%d.safetensors", i);
        write_shard(dir, file, i, header, n);
        size += 8 + strlen(header) + n;
    }
    set_mood(CALM, 0, 0);
    for (int way = 0; way < 4; way++) {
        hook.refuse_ring = way & 1;
        hook.refuse_direct = way & 2;
        hook.seen = 0;
        double begin = now_s(), rate = measure(dir, 5, &read, &err), took = now_s() - begin;
        CHECK(rate > 1e6 && rate < 1e12, "way %d: %g %s", way, rate, err.msg);
        CHECK(hook.seen >= (int)(2 * size >> 20) && hook.seen < (int)(2 * size >> 20) + 60,
              "way %d: %d reads", way, hook.seen);
        CHECK(took < 5, "%.1f s", took);
        if (!way) NOTE("%.2f GB/s", rate * 1e-9);
        hook.seen = 0;             /* a time that is too short for all of it                    */
        rate = measure(dir, 0.002, &read, &err);
        CHECK(rate > 0 && hook.seen < (int)(size >> 20), "%g, %d reads", rate, hook.seen);
        set_mood(NTH, -EIO, 14);
        CHECK(measure(dir, 5, &read, &err) > 0, "a drive that recovers: %s", err.msg);
        hook.shard = 0, hook.at = 20000000;
        set_mood(AT, -EAGAIN, 0);
        if (!(way & 1))            /* the threads' fd is not known before                       */
            CHECK(measure(dir, 5, &read, &err) == -1 && says(&err, "tried many times"), "%s",
                  err.msg);
        set_mood(CALM, 0, 0);
    }
    hook.refuse_ring = hook.refuse_direct = false;
    char shm[] = "/dev/shm/dsv4-test-XX" "XX" "XX";
    if (mkdtemp(shm)) {
        write_file(shm, "m.safetensors", "\2\0\0\0\0\0\0\0{}", 10);
        CHECK(measure(shm, 1, &read, &err) > 0, "the smallest model: %s", err.msg);
        remove_tree(shm);
    }
    remove_tree(dir);
}

int main(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    if (argc > 1) real_headers = argv[1];
    snprintf(top, sizeof top, "%.2000s/dsv4-test-XX" "XX" "XX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(top)) {
        printf("FAIL cannot make %s\n", top);
        return 1;
    }
    RUN(test_config_reads_every_value);
    RUN(test_config_accepts_what_may_differ);
    RUN(test_config_refuses_by_name);
    RUN(test_config_bounds_every_size);
    RUN(test_config_refuses_contradictions);
    RUN(test_config_is_read_from_a_directory);
    RUN(test_header_accepts_the_format);
    RUN(test_header_refuses_damage);
    RUN(test_header_length_is_bounded);
    RUN(test_index_and_shards_agree);
    RUN(test_ckpt_without_an_index);
    RUN(test_ckpt_real_layout);
    RUN(test_io_on_answer_decides);
    RUN(test_load_every_way_of_reading);
    RUN(test_load_survives_bad_reads);
    RUN(test_load_when_the_ring_breaks);
    RUN(test_load_of_a_shrunken_file);
    RUN(test_cache_of_every_layout);
    RUN(test_cache_of_odd_groups);
    RUN(test_cache_evicts_the_least_recently_used);
    RUN(test_cache_random_pins);
    RUN(test_cache_all_pinned);
    RUN(test_cache_survives_bad_reads);
    RUN(test_cache_when_the_ring_breaks);
    RUN(test_caches_share_an_offload);
    RUN(test_background_never_delays);
    RUN(test_background_gives_slots_back);
    RUN(test_passing_leaves_the_cache_as_it_is);
    RUN(test_cache_close_waits);
    RUN(test_every_read_may_fail);
    RUN(test_heat_is_kept);
    RUN(test_raw_files_keep_what_is_written);
    RUN(test_raw_files_are_refused_by_name);
    RUN(test_raw_files_survive_bad_transfers);
    RUN(test_every_transfer_may_fail);
    RUN(test_batches_precede_the_background);
    RUN(test_sampling_is_what_the_makers_say);
    RUN(test_generation_of_a_checkpoint);
    RUN(test_survey_names_what_is_not_there);
    RUN(test_survey_of_no_model);
    RUN(test_hash_remembers);
    RUN(test_hash_every_way_of_reading);
    RUN(test_disk_by_sysfs);
    RUN(test_disk_by_mount);
    RUN(test_disk_measure);
    remove_tree(top);
    return check_done();
}
