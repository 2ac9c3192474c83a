/* dsv4.h -- the map of dsv4: every type and function that crosses a room.
 *
 *      main.c     commands, flags, progress, tables; the only place that exits
 *        |
 *      dsv4.c     the model: weights by name, the forward pass, sampling, MTP draft
 *        |    \
 *        |     text.c       bytes <-> tokens <-> prompt
 *        |
 *      dsv4_ops   about twenty operations; one table of function pointers per backend
 *        |    \
 *        |     kernels.cu   the book of ops: contract, plain-C reference (_ref), kernel (_cuda)
 *        |     kernels.c    the fast CPU twins (_cpu) and the thread pool
 *        |     cuda.c       a GPU: its driver, memory and launches
 *        |
 *      kv.c       rows of KV in RAM and in a file; parked context
 *        |
 *      offload.c  config.json, shards, io_uring, the expert cache
 *
 * Conventions
 *   - Functions that the outside world can break return 0, or -1 with one line in err->msg.
 *   - Asserts are for our own bugs and stay on in release builds.
 *   - Shapes are written slowest first: x [n][dim].  n is always a number of tokens.
 *   - Activations and hyper-connection streams are F32 between operations.
 *   - Every reduction has one fixed order that does not depend on n, on threads or on timing.
 *   - Names follow the checkpoint and config.json; MODEL.md sections are cited as M1..M4.
 *
 * Contents  1 errors and limits   2 number formats and matrices   3 config
 *           4 operations   5 offload: shards, reads, experts   6 KV   7 text   8 model
 */
#ifndef DSV4_H
#define DSV4_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define WEAK __attribute__((weak))
#ifdef __CUDACC__                  /* small functions that kernels of a GPU call, too           */
#define BOTH __host__ __device__
#else
#define BOTH
#endif

/* === 1. Errors and limits ===================================================================== */
#define DSV4_VERSION "0.1.0"

typedef struct { char msg[768]; } dsv4_err;

/* Write one line into err->msg and return -1, so that callers can `return fail(err, ...)`. */
int fail(dsv4_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Seconds of a clock that only goes forward. */
double now_s(void);

/* One block of memory, handed out front to back; with base NULL it only counts, so that one layout
 * function serves the plan and the real thing.  With gpu set before arena_open() that GPU sees it,
 * too, and with vram only it does. */
typedef struct cuda cuda;
typedef struct { uint8_t *base; uint64_t size, used; cuda *gpu; bool vram; } arena;
int arena_open(arena *a, uint64_t size, const char *what, dsv4_err *err);
void arena_close(arena *a);
void *arena_take(arena *a, uint64_t bytes);        /* aligned to 64 bytes; NULL while counting */
void *arena_take_blocks(arena *a, uint64_t bytes); /* aligned to 4 KiB */

enum {
    MAX_LAYERS = 256,              /* V4-Pro has 61                                             */
    MAX_EXPERTS = 4096,            /* a layer; V4-Pro has 384                                   */
    MAX_TOPK = 64,                 /* experts a token; V4 has 6                                 */
    MAX_HC = 8,                    /* hyper-connection streams; V4 has 4                        */
    MAX_HEAD_DIM = 1024,           /* of the indexer too; V4 has 512 and 128                    */
    MAX_SHARDS = 4096,
    MAX_THREADS = 256,
    MAX_NAME = 256,                /* a tensor's or a file's name, with its end                 */
    MAX_HEADER_BYTES = 100 << 20,  /* of one safetensors file, the format's own limit           */
    EXPERT_ROWS = 64,              /* tokens that one expert_ffn call takes at most             */
};

/* === 2. Number formats and matrices (M1, "Number formats") ==================================== */
typedef enum {
    DT_F32, DT_F16, DT_BF16, DT_F8_E4M3, DT_F8_E8M0, DT_I8, DT_I64, DT_N
} dsv4_dtype;

/* A weight matrix in its stored format, row-major, borrowed.
 *   DT_F32, DT_F16, DT_BF16   data [rows][cols], aligned to its element; scale NULL
 *   DT_F8_E4M3                data [rows][cols]; scale e8m0 [ceil(rows/128)][ceil(cols/128)]
 *   DT_I8 (packed FP4 e2m1)   data [rows][cols/2], even column in the low nibble;
 *                             scale e8m0 [rows][cols/32]; cols % 32 == 0                         */
typedef struct {
    dsv4_dtype dtype;
    int rows, cols;
    const void *data;
    const uint8_t *scale;
} dsv4_mat;

BOTH float e4m3_to_f32(uint8_t code);    /* 0x7f and 0xff are NaN                                 */
BOTH uint8_t f32_to_e4m3(float x);       /* nearest, ties to even, within +-448; NaN stays NaN    */
BOTH float e2m1_to_f32(uint8_t nibble);  /* the low four bits                                     */
BOTH uint8_t f32_to_e2m1(float x);       /* nearest, ties to the even code, clamped to +-6        */
BOTH float e8m0_to_f32(uint8_t code);    /* 2^(code-127); 0xff is NaN                             */
BOTH uint8_t ceil_to_e8m0(float x);      /* the least power of two >= x, a positive normal number */
BOTH float bf16_to_f32(uint16_t bits);
BOTH uint16_t f32_to_bf16(float x);      /* nearest, ties to even; NaN stays NaN                  */
BOTH float f16_to_f32(uint16_t bits);
BOTH float exp_f32(float x);             /* our exp: fmaf only, one result on every machine; within
                                            2 ulp; 0 below -104, infinity above 88.73             */

/* === 3. Config (M1's table; names are config.json's keys) ===================================== */
typedef struct {
    char name[MAX_NAME];           /* the directory's last component                            */
    int hidden_size, num_hidden_layers, num_attention_heads, head_dim, qk_rope_head_dim;
    int q_lora_rank, o_lora_rank, o_groups, sliding_window;
    int index_n_heads, index_head_dim, index_topk;
    int n_routed_experts, num_experts_per_tok, n_shared_experts, moe_intermediate_size;
    int num_hash_layers, hc_mult, hc_sinkhorn_iters, vocab_size, num_nextn_predict_layers;
    int64_t max_position_embeddings;
    double rope_theta, compress_rope_theta;
    double yarn_factor, yarn_beta_fast, yarn_beta_slow, yarn_original;
    float swiglu_limit, routed_scaling_factor, hc_eps, rms_norm_eps;
    int bos_token_id, eos_token_id;
    int compress_ratios[MAX_LAYERS + 1]; /* of each layer, then of the MTP block (0 if absent)  */
} dsv4_config;

typedef struct {                   /* top_k 0, top_p 1, min_p 0, repetition_penalty 1: off      */
    float temperature, top_p, min_p, repetition_penalty;
    int top_k;
    uint64_t seed;
} sample_opts;

/* Read DIR/config.json.  Refuses another model_type by name, other values of expert_dtype,
 * norm_topk_prob, topk_method, scoring_func and rope_scaling.type, and absent or absurd sizes. */
int config_load(dsv4_config *cfg, const char *dir, dsv4_err *err);
/* The same from memory; `where` names the source in messages. */
int config_parse(dsv4_config *cfg, const char *json, size_t len, const char *where,
                 dsv4_err *err);
/* How the model's makers sample: DIR/generation_config.json, temperature 1 and all else off for
 * what it does not say or where there is no such file; do_sample false is temperature 0.  seed is
 * left alone. */
int config_sampling(sample_opts *o, const char *dir, dsv4_err *err);
/* The prompt format of a checkpoint's generation (M4). */
typedef enum { GEN_V4, GEN_0731 } generation;
int config_generation(generation *out, const char *dir, dsv4_err *err);

/* === 4. Operations ============================================================================
 * The contract of each stands in kernels.cu above its reference; arguments are named alike here.
 * `ex` is where an operation runs (the thread pool, or cuda_exec()); a reference ignores it.
 * On a GPU they are queued, and all that they point to is memory that the GPU sees: the host may
 * read what they write, and write what they read, behind sync() only.                           */

typedef struct dsv4_exec dsv4_exec;
/* Start n_threads - 1 workers; the caller of an operation is the last one. */
int exec_open(dsv4_exec **out, int n_threads, dsv4_err *err);
void exec_close(dsv4_exec *ex);
/* What this machine's threads reach in about `seconds`: bytes a second read from memory, of which
 * `most` are taken at most, and multiply-adds a second of an FP8 linear of 64 tokens. */
typedef struct { double read_bytes_s, macs_s; } exec_rates;
int exec_measure(dsv4_exec *ex, uint64_t most, double seconds, exec_rates *out, dsv4_err *err);

/* Rounded activations (M2, aq128) as codes, or plain F32 when the roundings are off. */
typedef struct {
    const uint8_t *code;           /* [n][dim] e4m3, NULL when off                              */
    const uint8_t *scale;          /* [n][ceil(dim/128)] e8m0                                   */
    const float *f32;              /* [n][dim], NULL when on                                    */
} dsv4_acts;

typedef struct { dsv4_mat w1, w2, w3; } dsv4_ffn; /* w1, w3 [inter][dim]; w2 [dim][inter]       */

/* Rows of KV (M2).  packed: as the model rounds them; else plain F32 (--no-rounding).
 *   window or compressed entry   rope dims as BF16 [rope_dim], then e4m3 [head_dim-rope_dim], then
 *                                e8m0 scales, one for 64 of these; padded to 8 bytes: 584 for Flash
 *   index key or query           e2m1 pairs [d/2], the even dim in the low nibble, then e8m0
 *                                scales, one for 32 dims; padded to 4 bytes: 68 for Flash
 * Padding is zero, so that rows can be compared and hashed.  Arrays of rows are aligned to 8.   */
BOTH size_t kv_row_bytes(int head_dim, int rope_dim, bool packed);
BOTH size_t index_row_bytes(int d, bool packed);
void kv_row_read(float *x, const void *row, int head_dim, int rope_dim, bool packed);

typedef struct {                   /* one sublayer's hyper-connection, or the head's (M3)       */
    const float *fn;               /* [(2+hc)*hc][hc*dim]; head: [hc][hc*dim]                   */
    const float *scale;            /* [3]; head: [1]                                            */
    const float *base;             /* [(2+hc)*hc]; head: [hc]                                   */
} dsv4_hc;

typedef struct {                   /* sizes that all hyper-connection operations share          */
    int hc, dim, sinkhorn_iters;
    float rms_eps, hc_eps;
} dsv4_hc_shape;

typedef struct {                   /* the compressor's input: projections of tokens (M3)        */
    const float *kv, *score;       /* [n][coff*d] wkv x and wgate x of tokens t0, t0+1, ...     */
    const float *ring_kv, *ring_score; /* [coff*ratio][coff*d] of earlier ones; token j lies in
                                          row j % (coff*ratio)                                  */
    const float *ape;              /* [ratio][coff*d]                                           */
    int ratio, d;                  /* coff is 2 when ratio is 4, else 1                         */
    int64_t t0;
} dsv4_compress;

typedef struct {                   /* attention of n tokens t0.. over all they may see (M3)     */
    const float *q;                /* [n][n_heads][head_dim]                                    */
    const void *kv;                /* [n] rows: window entries of tokens t0..t0+n-1             */
    const void *ring;              /* [window] rows of earlier ones, position p in row
                                      p % window                                                */
    const void *comp;              /* [..] rows: compressed entries; NULL when ratio is 0       */
    const int32_t *idx;            /* [n][topk] chosen entries, ascending; NULL: the first ones */
    const int32_t *count;          /* [n] entries that each token sees; NULL: all visible       */
    const float *sink;             /* [n_heads]                                                 */
    int n_heads, head_dim, rope_dim, window, ratio, topk;
    bool packed;                   /* the rows                                                  */
    int64_t t0;
} dsv4_attend;

/* Where item j of the list of token t0 + row lies. */
BOTH const void *attend_row(const dsv4_attend *in, int row, int64_t j);

typedef struct {                   /* index scores of n tokens t0.. (M3, indexer)               */
    const void *q;                 /* [n][n_heads] rows                                         */
    const float *w;                /* [n][n_heads] weights_proj x                               */
    float w_scale;                 /* times each w: index_head_dim^-0.5 * index_n_heads^-0.5    */
    const void *keys;              /* [..] rows                                                 */
    int n_heads, d, ratio;
    bool packed;                   /* the rows                                                  */
    int64_t t0;
    size_t stride;                 /* floats between the score rows of two tokens               */
} dsv4_index;

typedef struct {                   /* choosing experts (M3, MoE)                                */
    const float *logits;           /* [n][n_experts] gate x                                     */
    const float *bias;             /* [n_experts], or NULL in a hash layer                      */
    const int32_t *tid2eid;        /* [vocab][topk] in a hash layer, or NULL                    */
    const int32_t *tokens;         /* [n]                                                       */
    int n_experts, topk;
    float scale;                   /* routed_scaling_factor                                     */
} dsv4_route;

typedef struct dsv4_ops {
    const char *name;
    void (*embed)(float *h, const dsv4_mat *w, const int32_t *tokens, int n, int hc,
                  dsv4_exec *ex);
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, int d, float eps,
                    dsv4_exec *ex);
    void (*act_quant)(float *y, const float *x, int n, int d, dsv4_exec *ex);
    void (*act_codes)(uint8_t *code, uint8_t *scale, const float *x, int n, int d,
                      dsv4_exec *ex);
    void (*act_values)(float *y, const uint8_t *code, const uint8_t *scale, int n, int d,
                       dsv4_exec *ex);
    void (*linear)(float *y, const dsv4_mat *w, const float *x, int n, int groups,
                   dsv4_exec *ex);
    void (*rope)(float *x, const float *inv_freq, int n, int n_heads, int head_dim,
                 int rope_dim, int64_t pos0, int64_t step, bool inverse, dsv4_exec *ex);
    void (*kv_round)(void *rows, const float *x, int n, int head_dim, int rope_dim, bool packed,
                     dsv4_exec *ex);
    void (*index_round)(void *rows, float *x, int n, int d, bool packed, dsv4_exec *ex);
    void (*compress)(float *entries, const dsv4_compress *in, int64_t g0, int n_groups,
                     dsv4_exec *ex);
    void (*index_scores)(float *scores, const dsv4_index *in, int n, dsv4_exec *ex);
    void (*topk)(int32_t *idx, int32_t *count, const float *scores, size_t stride, int n,
                 int k, int ratio, int64_t t0, dsv4_exec *ex);
    void (*attend)(float *o, const dsv4_attend *in, int n, dsv4_exec *ex);
    void (*hc_pre)(float *x, float *post, float *comb, const float *h, const dsv4_hc *w,
                   const dsv4_hc_shape *s, int n, dsv4_exec *ex);
    void (*hc_post)(float *h, const float *y, const float *post, const float *comb,
                    const dsv4_hc_shape *s, int n, dsv4_exec *ex);
    void (*route)(int32_t *ids, float *weights, const dsv4_route *in, int n, dsv4_exec *ex);
    void (*swiglu)(float *a, const float *g, const float *u, int n, int d, float limit,
                   dsv4_exec *ex);
    void (*expert_ffn)(float *y, const dsv4_ffn *w, const dsv4_acts *x, const int32_t *rows,
                       const float *weight, int m, float limit, void *scratch, dsv4_exec *ex);
    void (*add)(float *y, const float *x, int n, int copies, int d, dsv4_exec *ex);
    void (*argmax)(int32_t *id, const float *x, int n, int d, dsv4_exec *ex);
    void (*copy)(void *dst, const void *src, size_t bytes, dsv4_exec *ex);
    void (*zero)(void *dst, size_t bytes, dsv4_exec *ex);
    int (*sync)(dsv4_exec *ex, dsv4_err *err); /* -1: something since the last one failed       */
} dsv4_ops;

extern const dsv4_ops ops_ref;     /* kernels.cu: plain C, wide sums, slow                      */
extern const dsv4_ops ops_cpu;     /* kernels.c                                                 */
extern const dsv4_ops ops_cuda WEAK; /* cuda.c, where that was built                            */
/* References that are fast enough for ops_cpu. */
void embed_ref(float *h, const dsv4_mat *w, const int32_t *tokens, int n, int hc, dsv4_exec *ex);
void argmax_ref(int32_t *id, const float *x, int n, int d, dsv4_exec *ex);
void copy_ref(void *dst, const void *src, size_t bytes, dsv4_exec *ex);
void zero_ref(void *dst, size_t bytes, dsv4_exec *ex);
int sync_ref(dsv4_exec *ex, dsv4_err *err);
void kv_round_ref(void *rows, const float *x, int n, int head_dim, int rope_dim, bool packed,
                  dsv4_exec *ex);

/* Bytes of scratch that expert_ffn needs for these sizes, on any backend. */
size_t expert_scratch_bytes(int dim, int inter);
/* Rotation frequencies [rope_dim/2] (M3, YaRN); factor 1 means none. */
void rope_inv_freq(float *inv_freq, int rope_dim, double theta, double factor,
                   double beta_fast, double beta_slow, double original);

/* A GPU in use, by number.  -1 says why there is none: no driver or one too old, no such GPU, or
 * one before compute capability 8.0.  A build without CUDA has none of these: they are NULL.     */
int cuda_open(cuda **out, int index, dsv4_err *err) WEAK;
void cuda_close(cuda *g) WEAK;     /* with all its memory given back */
typedef struct {
    char name[96];
    int index, sm;                 /* 89: compute capability 8.9                                */
    uint64_t total, free;          /* bytes of VRAM; free: when it was opened                   */
} cuda_info;
const cuda_info *cuda_get_info(const cuda *g) WEAK;
dsv4_exec *cuda_exec(cuda *g) WEAK; /* for ops_cuda */
/* VRAM, aligned to 256 bytes; `what` it is for stands in messages.  NULL: see err. */
void *cuda_alloc(cuda *g, uint64_t bytes, const char *what, dsv4_err *err) WEAK;
void cuda_free(cuda *g, void *p) WEAK;
/* Have the GPU see host memory, too, under the same address, until cuda_unpin(). */
int cuda_pin(cuda *g, void *p, uint64_t bytes, const char *what, dsv4_err *err) WEAK;
void cuda_unpin(cuda *g, void *p) WEAK;

/* === 5. Offload: shards, reads, experts ======================================================= */
typedef struct {
    const char *name;
    dsv4_dtype dtype;
    int n_dims;
    int64_t shape[4];
    int shard;
    uint64_t offset, bytes;        /* in the shard's file; checked to lie inside it             */
} ckpt_tensor;

/* For qsort(): pointers to tensors, or what begins with one, in the order of the files. */
int tensors_by_place(const void *a, const void *b);

typedef struct ckpt ckpt;
/* Open every shard of DIR (by model.safetensors.index.json, or every *.safetensors without one)
 * and validate every header: bounds, overlaps, sizes, duplicates, index against shards.  Only
 * headers are read.  Tensors of a dtype the model never uses are kept out of the table. */
int ckpt_open(ckpt **out, const char *dir, dsv4_err *err);
void ckpt_close(ckpt *c);
const ckpt_tensor *ckpt_find(const ckpt *c, const char *name); /* NULL when absent */
int ckpt_n_shards(const ckpt *c);
size_t ckpt_n_tensors(const ckpt *c);
const ckpt_tensor *ckpt_at(const ckpt *c, size_t i);           /* in order of name */
const char *ckpt_shard_path(const ckpt *c, int shard);

/* One call with one line for each shard of DIR that is missing, cut short or damaged
 * ("model-00002-of-00048.safetensors: missing"); their number, or -1: DIR is no model. */
typedef void (*line_fn)(void *arg, const char *line);
int ckpt_survey(const char *dir, line_fn each, void *arg, dsv4_err *err);

/* Called many times with the share that is done, 0 to 1.  Nonzero stops with -1 and err->msg
 * "interrupted". */
typedef int (*progress_fn)(void *arg, double done);

/* XXH3-128 of every shard, read whole.  `record` is a file that keeps what was found; each() gets
 * one line a shard: name, hash, and what the record had said ("new", "as on 2026-11-23", "CHANGED
 * since 2026-11-23").  On 0 *n_changed counts the changed ones. */
int ckpt_hash(const ckpt *c, const char *record, line_fn each, progress_fn progress, void *arg,
              int *n_changed, dsv4_err *err);

/* What a directory lies on.  sysfs is "/sys", or a test's copy. */
typedef struct {
    char fs[32], device[64];       /* "ext4", "nvme0n1"; device empty where there is none       */
    bool rotating, sata, network, fuse, encrypted;
} disk_info;
int disk_describe(disk_info *d, const char *dir, const char *sysfs, dsv4_err *err);
/* Bytes a second of O_DIRECT reads of `bytes` at random places of the shards, for `seconds`; takes
 * memory for eight. */
int disk_measure(const ckpt *c, uint64_t bytes, double seconds, double *bytes_s, dsv4_err *err);

typedef struct {                   /* counters since open                                       */
    uint64_t read_bytes, reads, retries; /* read_bytes: of shards                               */
    uint64_t raw_read, raw_written; /* bytes of raw files                                       */
} offload_stats;

typedef struct offload offload;
/* Ready the shards for reading: io_uring and O_DIRECT, or threads and buffered reads where these
 * are refused; then *note (static text, else NULL) says so in one line.  The ckpt is borrowed. */
int offload_open(offload **out, const ckpt *c, const char **note, dsv4_err *err);
void offload_close(offload *o);
const offload_stats *offload_get_stats(const offload *o);
/* The note of offload_open(), or one on what offload_raw_open() was refused since, or NULL. */
const char *offload_note(const offload *o);

typedef struct { const ckpt_tensor *t; void *dst; } load_item;
/* Read whole tensors into dst (t->bytes each), many at once; returns when all are in. */
int offload_load(offload *o, const load_item *items, size_t n, dsv4_err *err);

/* A raw file of ours beside the shards, of zeros: made in `dir` with room for `bytes` (a multiple
 * of 4096) and unlinked at once, so that nothing is left behind however we end.  Reads and writes
 * go through the same bounded depth, retries and fallbacks as those of shards, as demand.  Returns
 * the file's number, or -1 (ENOSPC: names dir, the bytes wanted and those free).  Four at most. */
int offload_raw_open(offload *o, const char *dir, uint64_t bytes, dsv4_err *err);
/* With nothing of it on its way; offload_close() closes what is left. */
void offload_raw_close(offload *o, int file);

typedef struct {                   /* the first transfer that failed                            */
    int cause;                     /* 0: none did                                               */
    int file;
    bool write;
    uint64_t off;
    const ckpt_tensor *t;          /* or NULL                                                   */
} io_fault;
/* Many transfers that are waited for together.  Zeroed at first. */
typedef struct { int in_flight; io_fault fault; } io_batch;
/* Read or write `bytes` at `off` of raw file `file`; off, bytes and buf are multiples of 4096.  It
 * is begun now (waits only while all of the depth is in use); buf is the file's until batch_wait().
 * Transfers of a batch may overtake each other.  -1: no more can be read or written at all. */
int batch_add(offload *o, io_batch *b, int file, bool write, void *buf, uint64_t off, size_t bytes,
              dsv4_err *err);
/* Wait for all of them.  On -1 the first fault is told (directory, offset, cause) and none is on
 * its way; the batch is as good as new either way. */
int batch_wait(offload *o, io_batch *b, dsv4_err *err);

/* What is read, kept and dropped together: one routed expert (six parts), or the matrices of one
 * layer.  Parts may lie in any shard; adjacent ones are read as one.  A part may be a piece of a
 * tensor: then its ckpt_tensor is the caller's. */
enum { GROUP_PARTS = 48 };
typedef struct { const ckpt_tensor *const *part; int n_parts; } read_group;

/* Equal slots in one arena, each large enough for any of the groups; least recently used goes
 * first.  Several caches share one offload and its bounded depth of reads. */
typedef struct cache cache;
typedef struct { uint64_t hits, misses, evictions, read_bytes; } cache_stats;
size_t cache_slot_bytes(const read_group *g, size_t n);        /* alignment included */
/* Allocate all of it now; groups [n] and what they point to are borrowed.  n_slots >= 1. */
int cache_open(cache **out, offload *o, const read_group *groups, size_t n, int n_slots,
               dsv4_err *err);
void cache_close(cache *c);
/* Ask for group `id`: returns its slot, pinned, its read on the way or done.  -1 with an empty
 * err->msg: every slot is pinned, unpin one first; -1 with text: an error.  Waits only where all
 * that is in the way are reads that nobody has pinned any more. */
int cache_get(cache *c, size_t id, dsv4_err *err);
/* The same for what many tokens come by once: what the cache holds is used in place and stays as
 * cold as it is; the rest is read into free slots, or into as many of the coldest as are pinned at
 * a time.  What lies in these goes first then. */
int cache_pass(cache *c, size_t id, dsv4_err *err);
/* Is `id` in, so that cache_get need not read? */
bool cache_holds(const cache *c, size_t id);
/* Read `id` into a free slot when nothing that was asked for by cache_get waits for the disk;
 * nothing happens where there is no free slot. */
void cache_ask(cache *c, size_t id);
/* Wait until a pinned slot's bytes are in.  After -1 the pin is still there. */
int cache_wait(cache *c, int slot, dsv4_err *err);
const void *cache_part(const cache *c, int slot, int part);    /* of a slot that is in */
/* Give a pin back.  A slot whose read is still on its way may be unpinned too. */
void cache_unpin(cache *c, int slot);
const cache_stats *cache_get_stats(const cache *c);
/* Hits and misses of each group since open [n]. */
typedef struct { uint32_t hits, misses; } group_uses;
const group_uses *cache_uses(const cache *c);
/* How often each group was used, kept in a file from run to run (halved each time, so that it
 * forgets).  Loading asks for the hottest groups, as many as there are slots, and is never an
 * error: what is absent or damaged is not used.  Saving writes a temporary file and renames. */
void cache_load_heat(cache *c, const char *path);
int cache_save_heat(const cache *c, const char *path, dsv4_err *err);

/* === 6. KV ====================================================================================
 * kv.c: where rows lie and how they move.  What a row holds is M2's and kernels.cu's.            */

typedef struct park park;          /* see below                                                 */
typedef struct { uint8_t byte[16]; } park_key;
typedef struct {
    int64_t ctx;                   /* tokens of context to make room for                        */
    int n_blocks;                  /* layers, and one more with the MTP block                   */
    bool packed;                   /* rows as M2 rounds them, else F32                          */
    uint64_t ram;                  /* bytes that may be taken; 0: all that it needs             */
    const char *dir;               /* for what does not fit; NULL: all must fit                 */
    park *park;                    /* for kv_park() and the like, borrowed; or NULL             */
    cuda *gpu;                     /* which is to see the rows, or NULL                         */
    park_key model;                /* fingerprint of weights and numerics                       */
} kv_opts;

/* What goes where, in this order of precedence.  States are windows and what compressors carry.  */
typedef struct {
    uint64_t states, index, entries; /* bytes: index keys and HCA entries; CSA entries          */
    uint64_t stage;                /* of one layer that is in the file: in RAM while in use      */
    uint64_t ram, file, least;     /* taken of each, and the least that ram may be               */
    double token_bytes;            /* of index and entries, a token of a long context            */
    bool index_in_file, entries_in_file;
} kv_plan;
/* -1: opts.ram is less than plan->least, or something must go to a file and dir is NULL. */
int kv_plan_make(kv_plan *p, const dsv4_config *cfg, const kv_opts *o, dsv4_err *err);

typedef struct kv_cache kv_cache;  /* the KV of one session                                     */
typedef enum { KV_ENTRIES, KV_KEYS, KV_KINDS } kv_kind;
typedef struct {                   /* of a layer; rings hold position p at p % len              */
    uint8_t *ring;                 /* [sliding_window] rows                                     */
    float *ring_kv, *ring_score;   /* [coff*ratio][coff*head_dim] the compressor's last tokens  */
    float *index_ring_kv, *index_ring_score; /* [2*ratio][2*index_head_dim]                     */
} kv_state;
typedef struct { const uint8_t *entries, *keys; } kv_layer; /* all rows of a layer, in order    */
typedef struct {                   /* counters since open                                       */
    uint64_t read_bytes, written_bytes, blocks_read, blocks_hit; /* blocks: of kv_gather()      */
    double wait_s;
} kv_stats;

/* Takes plan.ram bytes now and nothing later.  `off` is borrowed. */
int kv_open(kv_cache **out, offload *off, const dsv4_config *cfg, const kv_opts *o, dsv4_err *err);
void kv_close(kv_cache *kv);
void kv_reset(kv_cache *kv);                   /* no rows; states are the caller's */
const kv_plan *kv_get_plan(const kv_cache *kv);
const kv_stats *kv_get_stats(const kv_cache *kv);
kv_state kv_get_state(const kv_cache *kv, int layer);
/* Have a layer's rows in place for the next n tokens; valid until kv_ahead() or another kv_begin().
 * entries is NULL where they are in the file and n is 1: then kv_gather() has those wanted.
 * After -1 (a fault of the file) only kv_reset() helps. */
int kv_begin(kv_cache *kv, int layer, int n, kv_layer *out, dsv4_err *err);
/* n rows behind those that are in, in the file too, which is not waited for. */
int kv_append(kv_cache *kv, int layer, kv_kind kind, const void *rows, int64_t n, dsv4_err *err);
/* *rows = rows idx[0..count-1] of a layer's entries (idx NULL: 0, 1, ...), one behind the other,
 * valid until the next call; count <= index_topk. */
int kv_gather(kv_cache *kv, int layer, const int32_t *idx, int count, const void **rows,
              dsv4_err *err);
/* Begin reading what kv_begin(layer, n) will want, once the layer before it is done with. */
int kv_ahead(kv_cache *kv, int layer, int n, dsv4_err *err);
/* Copy rows out, to [n] rows. */
int kv_copy(kv_cache *kv, int layer, kv_kind kind, int64_t first, int64_t n, void *to,
            dsv4_err *err);

/* Parked context: a directory of files that any number of processes may use at once.  A file holds
 * the KV of SEGMENT_TOKENS tokens and what a session needs to go on behind them ("segment"; shorter
 * at its end: "tail"), or the tokens of a conversation that was saved under a name ("session").
 * Files appear whole or not at all and every byte of them is checked: what is torn, truncated,
 * foreign or flipped is never used. */
enum {
    SEGMENT_TOKENS = 4096,
    PARK_FRAMES = 2 * (MAX_LAYERS + 1) + 2,
    PARK_BYTES = 1 << 30,          /* of all frames of a file together, unpacked                */
};
typedef struct {                   /* what a file says of itself                                */
    park_key key, before;          /* of this one, and of the one whose tokens come before      */
    char model[MAX_NAME];          /* for people                                                */
    int64_t pos;                   /* tokens before this file's                                 */
    int32_t n_tokens;
    int n_frames;
} park_info;
typedef struct { void *data; size_t bytes; } park_frame;

/* `dir` is made where it is missing; what killed writers left in it is removed.  budget: bytes that
 * park_put() keeps it under by removing the segments that were used least recently, of a chain the
 * last one first (sessions stay); 0: no limit.  One thread at a time may use a park. */
int park_open(park **out, const char *dir, uint64_t budget, dsv4_err *err);
void park_close(park *p);
/* XXH3-128 of `before` and the ids: the key of what comes behind `before`.  The first `before` is
 * the fingerprint of model and numerics. */
park_key park_next(park_key before, const int32_t *tokens, int n);
bool park_has(const park *p, park_key key);
/* Write a file: name NULL is the segment info->key, else session `name`.  frames [info->n_frames].
 * Writes a temporary file, fsyncs it, renames it.  A segment that is there already is left.  -1
 * also where the budget could only be kept at the cost of segments that this file continues. */
int park_put(park *p, const char *name, const park_info *info, const int32_t *tokens,
             const park_frame *frames, dsv4_err *err);
/* Read frames into frames[i].data (NULL: skip it); frames[i].bytes must be the file's, and key,
 * tokens and n_tokens those of info, else it is foreign.  1: all are in; 0: there is none, or, with
 * a line in err->msg, it was damaged and is removed (data is garbage then).  Marks it as used. */
int park_get(park *p, const park_info *info, const int32_t *tokens, park_frame *frames,
             dsv4_err *err);
/* A session by name: info, its tokens [info->n_tokens] (check them: an id may be any number) and
 * frames [PARK_FRAMES].  1: the caller frees *tokens, and with it all frames, which lie behind in
 * the same block; 0: there is none; -1: damaged, err->msg says how. */
int park_load(park *p, const char *name, park_info *info, int32_t **tokens, park_frame *frames,
              dsv4_err *err);

typedef struct {
    const char *name;              /* of a session, or a segment's key in hexadecimal           */
    bool session;
    park_info info;                /* zeros where there is a fault in the header                */
    uint64_t bytes;
    int64_t used;                  /* seconds since 1970                                        */
    const char *fault;             /* what is wrong with it (a segment is gone then), or ""     */
} park_entry;
typedef int (*park_fn)(void *arg, const park_entry *e);    /* nonzero stops                     */
/* One call for each file, most recently used first; `verify` reads and checks all of it, else only
 * its header is. */
int park_list(park *p, bool verify, park_fn each, void *arg, dsv4_err *err);
/* Remove the session, or else the segment, of that name. */
int park_remove(park *p, const char *name, dsv4_err *err);

/* What a session parks of itself and begins with.  All need opts.park. */
/* Copy a layer's state at position pos into the mark of that position, while the layer stands
 * there.  The caller has the marks of segments' ends [kv_mark_bytes()]; that of a tail's end is
 * here (mark NULL). */
uint64_t kv_mark_bytes(const dsv4_config *cfg, const kv_opts *o);
void kv_mark(const kv_cache *kv, int layer, int64_t pos, uint8_t *mark);
/* Park the segments that end in (pos0, pos1]; their marks lie one behind the other; tokens are all
 * of the context, [pos1].  On -1 some are not parked; nothing else is wrong. */
int kv_park(kv_cache *kv, const int32_t *tokens, int64_t pos0, int64_t pos1, uint8_t *marks,
            dsv4_err *err);
/* Park what lies behind the last whole segment before pos, whose states were marked. */
int kv_park_tail(kv_cache *kv, const int32_t *tokens, int64_t pos, dsv4_err *err);
/* Where kv_resume() would begin, by the names of files alone: of tokens [n], of which at least one
 * is left to do, the end of the last parked segment, or `tail` (0: none) where that was parked. */
int64_t kv_parked(kv_cache *kv, const int32_t *tokens, int64_t n, int64_t tail);
/* Begin with that; returns the position, less where a file was damaged, or -1 (only kv_reset()
 * helps). */
int64_t kv_resume(kv_cache *kv, const int32_t *tokens, int64_t n, int64_t tail, dsv4_err *err);
/* Save where the session stands, at position pos, under a name, with `extra` of the caller's. */
int kv_save(kv_cache *kv, const char *name, const int32_t *tokens, int64_t pos, park_frame extra,
            dsv4_err *err);
/* Go on from there: returns the position, n if nothing was lost meanwhile, else less: then tokens
 * from there on are to be put in again.  The caller frees *tokens [*n], unless -1; extra->data lies
 * behind them in the same block. */
int64_t kv_load(kv_cache *kv, const char *name, int32_t **tokens, int64_t *n, park_frame *extra,
                dsv4_err *err);

/* === 7. Text ================================================================================== */
/* Bytes that grow as they are written to.  Once there is no memory nothing more goes in and
 * `failed` stays set, so that many writes need one look.  Zeroed at first; the owner frees s. */
typedef struct { char *s; size_t n, cap; bool failed; } buffer;
void put_bytes(buffer *b, const char *s, size_t n);
void put_text(buffer *b, const char *s);
void put_format(buffer *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The place of a word among words like "low, high or max", or -1. */
int choice(const char *words, const char *word);

/* Append a file ("-": stdin), and behind it a 0 that out->n does not count.  Of one with more than
 * `most` bytes some more than that come. */
int read_file(buffer *out, const char *path, size_t most, dsv4_err *err);

/* Tokens, likewise. */
typedef struct { int32_t *id; size_t n, cap; } id_list;
int ids_push(id_list *l, int32_t id, dsv4_err *err);

typedef struct tok tok;
/* Read DIR/tokenizer.json: byte-level BPE (M4). */
int tok_open(tok **out, const char *dir, dsv4_err *err);
/* The same from memory; `where` names the source in messages. */
int tok_parse(tok **out, const char *json, size_t len, const char *where, dsv4_err *err);
void tok_close(tok *t);
int tok_n_ids(const tok *t);       /* highest id + 1 */
/* Append the ids of len bytes of text, all or none; invalid UTF-8 becomes U+FFFD first, as Python's
 * errors="replace".  `special`: added tokens in the text are matched as such, else they are plain
 * text. */
int tok_encode(const tok *t, const char *text, size_t len, bool special, id_list *out,
               dsv4_err *err);
/* The bytes that id stands for (empty for an unknown id); borrowed.  May split a character. */
const char *tok_bytes(const tok *t, int32_t id, size_t *len);
int32_t tok_special(const tok *t, const char *content); /* id of an added token, or -1 */

/* Cuts a stream of bytes at character ends, so that what is printed is always valid UTF-8. */
typedef struct { unsigned char held[4]; int n_held; } utf8_stream;
/* Feed len bytes; whole characters are added to out, broken ones as U+FFFD.  len 0 ends the stream:
 * what is held comes out. */
void utf8_push(utf8_stream *s, const char *bytes, size_t len, buffer *out);

/* Cuts a stream of bytes off where one of n_words strings begins.  Zeroed but for words. */
enum { MAX_STOPS = 8, MAX_STOP_BYTES = 256 };
typedef struct {
    const char *const *words;      /* [n_words], each 1 to MAX_STOP_BYTES - 1 bytes, borrowed   */
    int n_words;
    char held[MAX_STOP_BYTES];     /* the start of a word, maybe                                */
    size_t n_held;
    bool hit;
} stop_filter;
/* Feed len bytes; what is certain is added to out.  After a hit nothing more comes.  len 0 ends the
 * stream: what is held comes out. */
void stop_push(stop_filter *f, const char *bytes, size_t len, buffer *out);

struct json_t;                     /* jansson's; a request is OpenAI-shaped JSON                */

/* A prompt's text.  What people and tools wrote stands in [cuts[0], cuts[1]), [cuts[2], cuts[3])
 * and so on: special tokens are matched outside of these only, so that no document can end a turn
 * or open a tool call. */
typedef struct {
    char *text;
    size_t len, *cuts, n_cuts;     /* n_cuts is even                                            */
    bool think;                    /* the answer begins inside its reasoning                    */
    bool answered;                 /* the last message is the assistant's: nothing to generate  */
} prompt;
/* Write a request {messages, tools, response_format, thinking, reasoning_effort} as the prompt
 * that the model was trained on (M4).  `thinking` is {"type": "enabled"|"disabled"} or a boolean;
 * unknown keys are ignored; what is malformed is named by its path ("messages[2].role").  On 0
 * the caller frees *out. */
int prompt_build(prompt *out, const struct json_t *request, generation gen, dsv4_err *err);
void prompt_free(prompt *p);
/* Append its ids, all or none. */
int prompt_encode(const tok *t, const prompt *p, id_list *out, dsv4_err *err);
/* A message {"role": role, "content": text}, invalid UTF-8 in it replaced; NULL: out of memory. */
struct json_t *prompt_message(const char *role, const char *text, size_t len);

/* What the model wrote behind the prompt, taken apart while it comes.  Pieces of reasoning and
 * content come as soon as they are certain, a tool call when it is whole.  Text that only looks
 * like a tool call comes as content, unchanged: nothing is lost and nothing is added. */
typedef enum { ANSWER_REASONING, ANSWER_CONTENT, ANSWER_CALL } answer_kind;
typedef struct {
    answer_kind kind;
    const char *text;              /* [len]; of a call: its arguments, JSON                     */
    size_t len;
    const char *name, *raw;        /* of a call: the tool; its DSML as written [raw_len]        */
    size_t name_len, raw_len;
} answer_piece;
typedef void (*answer_fn)(void *arg, const answer_piece *piece);
typedef struct answer answer;
/* `think`: the text begins inside the reasoning (prompt.think). */
int answer_open(answer **out, bool think, answer_fn each, void *arg, dsv4_err *err);
int answer_push(answer *a, const char *bytes, size_t len, dsv4_err *err);
int answer_end(answer *a, dsv4_err *err);      /* no more comes: what was held back goes out */
void answer_close(answer *a);

/* A document's text, from a file ("-": stdin) of plain text, HTML or PDF, in UTF-8, UTF-16 with a
 * byte order mark, or Latin-1; appended to out as UTF-8 without \r\n.  *note (static text, else
 * NULL) says what was guessed. */
enum { DOC_BYTES = 64 << 20 };
int doc_read(buffer *out, const char *path, const char **note, dsv4_err *err);

typedef struct { size_t *end; int n; int64_t n_tokens; } doc_parts; /* end [n]; of all, tokens */
/* Cut text [len <= DOC_BYTES] into as few parts of at most `most` tokens as it takes, of about one
 * size, behind paragraphs, or else behind lines, sentences, words.  The caller frees out->end. */
int doc_cut(const tok *t, const char *text, size_t len, int64_t most, doc_parts *out,
            dsv4_err *err);

/* === 8. Model ================================================================================= */
typedef struct dsv4_weights dsv4_weights;
/* Find every tensor the graph needs in the checkpoint and check its dtype and shape; reads
 * nothing.  The ckpt is borrowed and must outlive *out.  Names the first tensor that is wrong. */
int weights_bind(dsv4_weights **out, const ckpt *c, const dsv4_config *cfg, dsv4_err *err);
void weights_close(dsv4_weights *w);
/* Bytes in the checkpoint: what stays resident, what is streamed, and what the graph never
 * touches (MTP of another generation). */
typedef struct { uint64_t dense, experts, mtp, unused; bool has_mtp; } weights_bytes;
weights_bytes weights_count(const dsv4_weights *w);

typedef enum {                     /* where the time goes                                       */
    OPC_EMBED, OPC_HC, OPC_PROJ, OPC_COMPRESS, OPC_INDEX, OPC_ATTEND, OPC_GATE, OPC_EXPERTS,
    OPC_SHARED, OPC_HEAD, OPC_MTP, OPC_N
} op_class;
extern const char *const op_class_name[OPC_N];

/* Multiply-adds, by kind: projections and the like, attention, indexer, routed experts. */
typedef enum { WORK_DENSE, WORK_ATTEND, WORK_INDEX, WORK_EXPERTS, WORK_N } work_kind;

typedef struct {
    uint64_t prefill_tokens, decode_tokens, reused_tokens; /* reused: found parked             */
    double load_s, prefill_s, decode_s, op_s[OPC_N], expert_wait_s, dense_wait_s;
    uint64_t dense_bytes;          /* read at start                                             */
    uint64_t expert_uses;          /* (layer, expert) pairs computed                            */
    double work[WORK_N];           /* done, as engine_work() counts                             */
    uint64_t passes;               /* spans put through the layers by prefill                   */
} dsv4_stats;

/* What a program may take of this machine's memory when nobody said:
 * min(70% of MemAvailable, the cgroup's limit, MemTotal - 8 GB), at least 1 GB. */
uint64_t machine_ram_budget(void);
/* All there is: MemTotal, or the cgroup's limit where that is less. */
uint64_t machine_ram_total(void);
/* Resident bytes of this process now, and the most there ever were. */
void machine_rss(uint64_t *now, uint64_t *peak);

typedef struct {                   /* what will live where, in bytes; told before work          */
    uint64_t budget, base, dense, kv, work, slots, slot_bytes;
    uint64_t vram_budget;          /* 0: no GPU.  Else it holds dense, slots and work,          */
    uint64_t host_work, stage;     /* and RAM these; the stage while loading only               */
    kv_plan kv_plan;
    uint64_t token_dense, token_experts; /* read by one decode step                             */
    int n_slots, n_experts_total, n_layers, span, chunk;
    bool streamed;                 /* dense weights do not fit and are read layer by layer      */
} dsv4_plan;

/* Which experts a decoded token takes in a layer, ascending. */
typedef void (*trace_fn)(void *arg, int64_t pos, int layer, const int32_t *experts, int n);

typedef struct {
    const char *dir;
    enum { BACKEND_AUTO, BACKEND_CPU, BACKEND_CUDA } backend; /* auto: CUDA, else the CPU       */
    int gpu;                       /* its number                                                */
    int n_threads;                 /* 0: every processor this process may use                   */
    uint64_t ram_bytes;            /* 0: machine_ram_budget()                                   */
    int64_t ctx;                   /* tokens of context to make room for                        */
    int span_hint;                 /* tokens the caller means to prefill at once; 0: ctx        */
    int chunk;                     /* tokens through attention at once; 0: chosen               */
    uint64_t kv_ram;               /* of ram_bytes, for KV; 0: as much as that allows           */
    const char *kv_dir;            /* for KV that does not fit, or NULL                         */
    park *park;                    /* to park context in and resume it from, borrowed; or NULL  */
    const char *heat;              /* file that remembers which experts are used, or NULL       */
    trace_fn trace;                /* or NULL                                                   */
    void *trace_arg;
    bool no_rounding;              /* M2's roundings off, KV in F32                             */
    bool mtp;                      /* load the MTP block and keep its KV                        */
} dsv4_opts;

typedef struct dsv4_engine dsv4_engine;
/* Plan the memory, and refuse with the numbers when it cannot work; reads and takes nothing yet.
 * cfg and ckpt are borrowed and must outlive the engine. */
int engine_open(dsv4_engine **out, const dsv4_config *cfg, const ckpt *c, const dsv4_opts *opts,
                dsv4_err *err);
/* Take the memory and read the dense weights; once, before the first session. */
int engine_load(dsv4_engine *e, progress_fn progress, void *arg, dsv4_err *err);
void engine_close(dsv4_engine *e);
const dsv4_plan *engine_plan(const dsv4_engine *e);
const dsv4_stats *engine_stats(const dsv4_engine *e);
const offload_stats *engine_offload_stats(const dsv4_engine *e);
const cache_stats *engine_expert_stats(const dsv4_engine *e);
/* What tokens [t0, t1) of a context take (M3). */
void engine_work(const dsv4_engine *e, double t0, double t1, double work[WORK_N]);
/* Seconds that each kind of work took so far. */
void engine_work_s(const dsv4_engine *e, double seconds[WORK_N]);
group_uses engine_layer_uses(const dsv4_engine *e, int layer);     /* of its routed experts */
/* What this machine reaches, measured now for about `seconds`; before engine_load(), as memory is
 * taken for it. */
typedef struct { exec_rates exec; double disk_bytes_s; } engine_rates;
int engine_measure(dsv4_engine *e, const ckpt *c, double seconds, engine_rates *out,
                   dsv4_err *err);
/* "GPU 0, NAME (8.9)", or "the CPU", with the reason where a GPU was asked for. */
const char *engine_runs_on(const dsv4_engine *e);
const char *engine_note(const dsv4_engine *e); /* one line on a slower path taken, or NULL */

typedef struct dsv4_session dsv4_session;
/* One sequence: KV and position.  The engine must outlive it; one session at a time. */
int session_open(dsv4_session **out, dsv4_engine *e, progress_fn progress, void *arg,
                 dsv4_err *err);
void session_close(dsv4_session *s);
/* After -1 of another function: where the backend is auto and the GPU is what failed, go on with
 * the CPU, from position 0.  -1: something else failed, and err is left alone, or this did. */
int session_recover(dsv4_session **s, dsv4_err *err);
void session_reset(dsv4_session *s);           /* to position 0 */
int64_t session_pos(const dsv4_session *s);    /* tokens in so far */
const kv_stats *session_kv_stats(const dsv4_session *s);

/* Put n tokens (1 <= n <= plan.span) through the model at the session's position.  One token
 * after a prompt is decode; there is one path for both.  After -1 the session must be reset. */
int session_forward(dsv4_session *s, const int32_t *tokens, int n, dsv4_err *err);
/* Begin anew with the longest parked prefix of tokens [n]; returns the position: tokens from there
 * on are to be put in, at least one.  0 without opts.park.  Whole segments are parked as they come;
 * at position `tail` (0: nowhere) the context is parked to the token, and begun with next time. */
int64_t session_resume(dsv4_session *s, const int32_t *tokens, int64_t n, int64_t tail,
                       dsv4_err *err);
/* Where that would begin, by a look at the names of files. */
int64_t session_parked(dsv4_session *s, const int32_t *tokens, int64_t n, int64_t tail);
/* Save where the session stands under a name, and go on from there (kv_save(), kv_load()). */
int session_save(dsv4_session *s, const char *name, park_frame extra, dsv4_err *err);
int64_t session_load(dsv4_session *s, const char *name, int32_t **tokens, int64_t *n,
                     park_frame *extra, dsv4_err *err);
/* logits [n][vocab_size] of tokens i0..i0+n-1 of the last session_forward. */
int session_logits(dsv4_session *s, int i0, int n, float *logits, dsv4_err *err);
/* The first of the largest logits of token i of the last session_forward.  They may come to logits
 * [vocab_size], or stay on a GPU. */
int session_argmax(dsv4_session *s, int i, float *logits, int32_t *id, dsv4_err *err);
/* MTP (M3): given the token that follows the last one, the logits of the one after it.
 * Needs opts.mtp; next_token must then be the first one of the next session_forward. */
int session_draft(dsv4_session *s, int32_t next_token, float *logits, dsv4_err *err);

/* The graph in pieces, for those who look inside (tests): streams h [n][hc_mult][hidden_size].
 * layer num_hidden_layers is the MTP block's own block. */
int layer_forward(dsv4_session *s, int layer, float *h, const int32_t *tokens, int n,
                  int64_t t0, dsv4_err *err);

typedef struct sampler sampler;
/* Draws tokens: repetition penalty, temperature, top-k, top-p, min-p, in this order.  Temperature 0
 * is the argmax; ties always go to the lower id.  Same seed and logits, same tokens. */
int sampler_open(sampler **out, const sample_opts *o, int n_vocab, dsv4_err *err);
void sampler_close(sampler *s);
/* A token of the context, for the repetition penalty; sampler_next accepts its own result. */
void sampler_accept(sampler *s, int32_t token);
int32_t sampler_next(sampler *s, const float *logits);

enum { LOOP_PERIOD_MAX = 256, LOOP_TOKENS = 512, LOOP_TURNS = 16 };
/* Notices a generation that goes round: one cycle of at most LOOP_PERIOD_MAX tokens, at least
 * LOOP_TURNS times and LOOP_TOKENS tokens over.  Zeroed at first. */
typedef struct {
    int32_t last[LOOP_PERIOD_MAX]; /* a ring                                                    */
    int run[LOOP_PERIOD_MAX + 1];  /* tokens in a row that equal the one `period` before        */
    int64_t n;
} loop_guard;
/* Take one token; the period of the cycle it is caught in, or 0. */
int loop_push(loop_guard *g, int32_t token);
/* -log softmax(logits)[token], in double. */
double token_nll(const float *logits, int n_vocab, int32_t token);

#ifdef __cplusplus
}
#endif
#endif
