/* main.c -- the commands and their flags, progress, tables.  The only place that exits.
 *
 *   dsv4 COMMAND [flags]      stdout: the answer, and nothing else
 *                             stderr: progress, plans, tables, errors (one line each)
 *
 * Exit codes  0 done, 1 failed, 2 usage, 130 interrupted.
 * Contents    1 flags   2 files and output   3 progress and tables   4 the model behind a
 *             command   5 run   6 eval   7 check, help, version
 * Not here    anything that could be tested without a terminal                                 */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_USAGE = 2, EXIT_INTERRUPTED = 130, ANSWER_DEFAULT = 512, EVAL_ROWS = 16 };

static const uint64_t FILE_MAX = (uint64_t)1 << 30;   /* of text or ids given by a person */

/* Set by Ctrl-C, read many times a layer. */
static volatile sig_atomic_t interrupted;

static void on_signal(int sig) {
    (void)sig;
    interrupted = 1;
}

/* === 1. Flags ================================================================================= */

enum { CMD_RUN = 1, CMD_EVAL = 2, CMD_CHECK = 4, CMD_VERSION = 8, CMD_HELP = 16 };
enum { CMD_MODEL = CMD_RUN | CMD_EVAL };

typedef struct {                   /* everything a command line can say                         */
    const char *model, *prompt, *file, *ids, *logits, *stats, *operand;
    int64_t n_answer, ctx, decode_from, chunk, threads;
    uint64_t ram, seed;
    double temp, top_p;
    bool raw, print_ids, no_think, no_rounding, quiet;
} args;

typedef enum { ARG_TEXT, ARG_COUNT, ARG_SIZE, ARG_SEED, ARG_REAL, ARG_BOOL } arg_kind;

typedef struct {
    const char *name, *value;      /* "--temp", "T"; value NULL for a switch                    */
    const char *help;
    int commands;                  /* which take it                                             */
    arg_kind kind;
    size_t at;                     /* its place in args                                         */
    double lo, hi;                 /* of numbers                                                */
} flag;

#define AT(field) offsetof(args, field)
static const flag flags[] = {
    {"-m", "DIR", "the model's directory", CMD_MODEL, ARG_TEXT, AT(model), 0, 0},
    {"-p", "TEXT", "the prompt", CMD_RUN, ARG_TEXT, AT(prompt), 0, 0},
    {"-f", "FILE", "a text file, - for stdin", CMD_MODEL, ARG_TEXT, AT(file), 0, 0},
    {"--ids", "FILE", "a file of token ids, separated by white space", CMD_MODEL, ARG_TEXT,
     AT(ids), 0, 0},
    {"-n", "N", "tokens to generate at most (512)", CMD_RUN, ARG_COUNT, AT(n_answer), 1, 1e9},
    {"--raw", NULL, "continue the text instead of answering it", CMD_RUN, ARG_BOOL, AT(raw), 0,
     0},
    {"--no-think", NULL, "answer without thinking first", CMD_RUN, ARG_BOOL, AT(no_think), 0, 0},
    {"--temp", "T", "temperature, 0 for the likeliest token (1)", CMD_RUN, ARG_REAL, AT(temp), 0,
     1e3},
    {"--top-p", "P", "draw from the likeliest tokens that hold P (1)", CMD_RUN, ARG_REAL,
     AT(top_p), 0, 1},
    {"--seed", "S", "same seed, same text (0)", CMD_RUN, ARG_SEED, AT(seed), 0, 0},
    {"--print-ids", NULL, "print token ids instead of text", CMD_RUN, ARG_BOOL, AT(print_ids), 0,
     0},
    {"--logits", "OUT.npy", "write the logits, float32 [n, vocab]", CMD_EVAL, ARG_TEXT,
     AT(logits), 0, 0},
    {"--decode-from", "K", "ids from K on go one at a time", CMD_EVAL, ARG_COUNT,
     AT(decode_from), 0, 1e9},
    {"--no-rounding", NULL, "leave out the model's deliberate roundings", CMD_EVAL, ARG_BOOL,
     AT(no_rounding), 0, 0},
    {"--chunk", "N", "tokens to put through at once", CMD_EVAL, ARG_COUNT, AT(chunk), 1, 1e9},
    {"-t", "N", "threads (all processors); also --threads", CMD_MODEL, ARG_COUNT, AT(threads), 1,
     MAX_THREADS},
    {"--ram", "SIZE", "memory to use, as 512M or 16G (most of what is free)", CMD_MODEL,
     ARG_SIZE, AT(ram), 0, 0},
    {"--ctx", "N", "tokens of context to make room for (what is needed)", CMD_MODEL, ARG_COUNT,
     AT(ctx), 1, 1e9},
    {"--stats", "FILE", "write counters and times as JSON", CMD_MODEL, ARG_TEXT, AT(stats), 0,
     0},
    {"-q", NULL, "no progress, no tables", CMD_MODEL | CMD_CHECK, ARG_BOOL, AT(quiet), 0, 0},
};
enum { N_FLAGS = sizeof flags / sizeof *flags };

static int cmd_run(const args *a, dsv4_err *err);
static int cmd_eval(const args *a, dsv4_err *err);
static int cmd_check(const args *a, dsv4_err *err);
static int cmd_version(const args *a, dsv4_err *err);
static int cmd_help(const args *a, dsv4_err *err);

typedef struct {
    const char *name, *usage, *help;
    int bit;
    int (*run)(const args *a, dsv4_err *err);
} command;

static const command commands[] = {
    {"run", "-m DIR (-p TEXT | -f FILE | --ids FILE) [flags]", "answer or continue a text",
     CMD_RUN, cmd_run},
    {"eval", "-m DIR (-f FILE | --ids FILE) [flags]", "score a text: mean NLL and perplexity",
     CMD_EVAL, cmd_eval},
    {"check", "DIR", "say what a model is and whether it is whole", CMD_CHECK, cmd_check},
    {"version", "", "print the version", CMD_VERSION, cmd_version},
    {"help", "[COMMAND]", "print this, or a command's flags", CMD_HELP, cmd_help},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static const command *find_command(const char *name) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (!strcmp(name, commands[i].name)) return &commands[i];
    return NULL;
}

static const flag *find_flag(const char *name, int command_bit) {
    if (!strcmp(name, "--threads")) name = "-t";
    for (int i = 0; i < N_FLAGS; i++)
        if (!strcmp(name, flags[i].name) && (flags[i].commands & command_bit)) return &flags[i];
    return NULL;
}

/* "512M", "16G", "1.5G" or plain bytes. */
static bool parse_size(const char *text, uint64_t *out) {
    char *end;
    double v = strtod(text, &end);
    double unit = 1;
    if (*end == 'K' || *end == 'k') unit = 1 << 10;
    else if (*end == 'M' || *end == 'm') unit = 1 << 20;
    else if (*end == 'G' || *end == 'g') unit = 1 << 30;
    else if (*end == 'T' || *end == 't') unit = (double)((uint64_t)1 << 40);
    if (unit > 1) end++;
    if (end == text || *end || !(v > 0) || v * unit > 1e18) return false;
    *out = (uint64_t)(v * unit);
    return true;
}

static int flag_set(args *a, const flag *f, const char *value, dsv4_err *err) {
    char *place = (char *)a + f->at, *end = NULL;
    double real;
    switch (f->kind) {
    case ARG_TEXT: *(const char **)(void *)place = value; return 0;
    case ARG_BOOL: *(bool *)(void *)place = true; return 0;
    case ARG_SIZE:
        if (parse_size(value, (uint64_t *)(void *)place)) return 0;
        return fail(err, "%s %s is not a size; write it as 512M or 16G", f->name, value);
    case ARG_SEED:
        errno = 0;
        *(uint64_t *)(void *)place = strtoull(value, &end, 10);
        if (*value >= '0' && *value <= '9' && !*end && !errno) return 0;
        return fail(err, "%s %s is not a whole number from 0 up", f->name, value);
    case ARG_COUNT:
    case ARG_REAL: break;
    }
    real = strtod(value, &end);
    if (end == value || *end || !(real >= f->lo && real <= f->hi) ||
        (f->kind == ARG_COUNT && real != floor(real)))
        return fail(err, "%s %s is not a %snumber from %g to %g", f->name, value,
                    f->kind == ARG_COUNT ? "whole " : "", f->lo, f->hi);
    if (f->kind == ARG_REAL) *(double *)(void *)place = real;
    else *(int64_t *)(void *)place = (int64_t)real;
    return 0;
}

/* Fill *a from the words behind the command; -1 is a usage error. */
static int parse_args(args *a, const command *c, int argc, char **argv, dsv4_err *err) {
    *a = (args){.n_answer = ANSWER_DEFAULT, .temp = 1, .top_p = 1, .decode_from = -1};
    bool takes_operand = c->bit & (CMD_CHECK | CMD_HELP);
    for (int i = 0; i < argc; i++) {
        if (argv[i][0] != '-' && takes_operand && !a->operand) {
            a->operand = argv[i];
            continue;
        }
        const flag *f = find_flag(argv[i], c->bit);
        if (!f) return fail(err, "%s does not take %s; see dsv4 help %s", c->name, argv[i],
                            c->name);
        if (f->value && i + 1 == argc)
            return fail(err, "%s needs %s behind it", argv[i], f->value);
        if (flag_set(a, f, f->value ? argv[++i] : NULL, err)) return -1;
    }
    if ((c->bit & CMD_MODEL) && !a->model) return fail(err, "%s needs -m DIR", c->name);
    if (c->bit == CMD_CHECK && !a->operand) return fail(err, "check needs a directory");
    int sources = !!a->prompt + !!a->file + !!a->ids;
    if ((c->bit & CMD_MODEL) && sources != 1)
        return fail(err, "%s needs one of %s-f FILE, --ids FILE", c->name,
                    c->bit == CMD_RUN ? "-p TEXT, " : "");
    return 0;
}

/* === 2. Files and output ====================================================================== */

typedef struct { char *bytes; size_t len; } text;

/* Read a whole file, "-" for stdin.  On 0 the caller frees out->bytes. */
static int read_text(text *out, const char *path, dsv4_err *err) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) return fail(err, "open %s: %s", path, strerror(errno));
    size_t cap = 1 << 16, len = 0, got;
    char *bytes = malloc(cap);
    while (bytes && (got = fread(bytes + len, 1, cap - len, f)) > 0) {
        len += got;
        if (len < cap) continue;
        char *grown = 2 * cap <= FILE_MAX ? realloc(bytes, cap *= 2) : NULL;
        if (!grown) free(bytes);
        bytes = grown;
    }
    int rc = 0;
    if (!bytes) rc = fail(err, "read %s: larger than memory or 1 GB allow; split it", path);
    else if (ferror(f)) rc = fail(err, "read %s: %s", path, strerror(errno));
    else if (len == 0) rc = fail(err, "%s is empty: nothing to do", path);
    if (f != stdin) fclose(f);
    if (rc) free(bytes);
    else *out = (text){bytes, len};
    return rc;
}

typedef struct { int32_t *id; size_t n; } id_list;

/* White-space-separated ids.  On 0 the caller frees out->id. */
static int read_ids(id_list *out, const char *path, dsv4_err *err) {
    text t;
    if (read_text(&t, path, err)) return -1;
    int32_t *id = malloc((t.len / 2 + 1) * sizeof *id);
    size_t n = 0;
    int rc = id ? 0 : fail(err, "out of memory for the ids of %s", path);
    for (size_t i = 0; i < t.len && rc == 0;) {
        unsigned char ch = (unsigned char)t.bytes[i];
        int64_t v = 0;
        size_t begin = i;
        if (strchr(" \t\r\n\v\f", ch) && ch) {
            i++;
            continue;
        }
        while (i < t.len && t.bytes[i] >= '0' && t.bytes[i] <= '9' && v <= INT32_MAX)
            v = 10 * v + (t.bytes[i++] - '0');
        if (i == begin || v > INT32_MAX || (i < t.len && (!t.bytes[i] ||
                                                          !strchr(" \t\r\n\v\f", t.bytes[i]))))
            rc = fail(err, "%s: byte %zu does not begin a token id; write ids as whole numbers "
                      "with spaces between", path, begin);
        else
            id[n++] = (int32_t)v;
    }
    free(t.bytes);
    if (rc == 0 && n == 0) rc = fail(err, "%s holds no ids: nothing to do", path);
    if (rc) free(id);
    else *out = (id_list){id, n};
    return rc;
}

/* A file that appears under its name only when it is whole. */
typedef struct { FILE *f; const char *path; char part[4096]; } out_file;

static int out_open(out_file *o, const char *path, dsv4_err *err) {
    o->path = path;
    if (snprintf(o->part, sizeof o->part, "%s.part", path) >= (int)sizeof o->part)
        return fail(err, "write %.80s...: the name is too long", path);
    o->f = fopen(o->part, "wb");
    return o->f ? 0 : fail(err, "write %s: %s", o->part, strerror(errno));
}

/* Finish (rc 0) or drop the file; gives rc, or -1 when finishing failed. */
static int out_close(out_file *o, int rc, dsv4_err *err) {
    if (!o->f) return rc;
    bool bad = ferror(o->f) != 0;
    bad |= fclose(o->f) != 0;
    o->f = NULL;
    if (rc == 0 && (bad || rename(o->part, o->path)))
        rc = fail(err, "write %s: %s", o->path, errno ? strerror(errno) : "failed");
    if (rc) unlink(o->part);
    return rc;
}

static int check_stdout(dsv4_err *err) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
    return fail(err, "write to stdout: %s", strerror(errno));
}

/* === 3. Progress and tables =================================================================== */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {                   /* the one status line, on a terminal only                   */
    bool on;
    int64_t n_done, n_total;       /* prompt tokens                                             */
    int n_now;                     /* tokens of the span under way                              */
    double began, shown;
} status_line;

static void status_clear(status_line *s) {
    if (s->on && s->shown > 0) fputs("\r\033[K", stderr);
    s->shown = 0;
}

/* While a prompt is read: how far, at which rate. */
static int on_progress(void *arg, double done) {
    status_line *s = arg;
    double t = now_s();
    if (s->on && s->n_now > 1 && t - s->shown > 0.2) {
        double tokens = (double)s->n_done + (double)s->n_now * done;
        double per_s = tokens / (t - s->began);
        fprintf(stderr, "\r\033[Kreading: token %.0f of %lld, %.1f tokens/s, %.0f s left", tokens,
                (long long)s->n_total, per_s, per_s > 0 ? ((double)s->n_total - tokens) / per_s
                                                        : 0);
        s->shown = t;
    }
    return interrupted;
}

/* "512.0M" or "16.00G", in the units that --ram takes. */
typedef struct { char text[16]; } size_text;
static size_text size_of(uint64_t bytes) {
    size_text s;
    bool giga = bytes >= (uint64_t)1 << 30;
    snprintf(s.text, sizeof s.text, giga ? "%.2fG" : "%.1fM",
             (double)bytes / (giga ? 1 << 30 : 1 << 20));
    return s;
}

static double rate(double amount, double seconds) { return seconds > 0 ? amount / seconds : 0; }

static void print_plan(const dsv4_engine *e) {
    const dsv4_plan *p = engine_plan(e);
    fprintf(stderr, "plan: RAM %s = program %s + dense weights %s + KV %s + buffers %s + "
            "%d of %d experts %s; %d tokens a span\n", size_of(p->budget).text,
            size_of(p->base).text, size_of(p->dense).text, size_of(p->kv).text,
            size_of(p->work).text, p->n_slots, p->n_experts_total, size_of(p->slots).text,
            p->span);
    if (engine_note(e)) fprintf(stderr, "note: %s\n", engine_note(e));
}

/* Where the bytes came from, and how fast. */
static void print_tiers(const dsv4_engine *e) {
    const dsv4_stats *s = engine_stats(e);
    const offload_stats *o = engine_offload_stats(e);
    const dsv4_plan *p = engine_plan(e);
    uint64_t peak, asked = o->hits + o->misses, streamed = o->read_bytes - s->dense_bytes;
    double expert = rate((double)streamed, (double)o->misses), busy = s->prefill_s + s->decode_s;
    machine_rss(NULL, &peak);
    fprintf(stderr, "\n%-10s %12s %8s %12s %10s\n", "tier", "experts", "share", "GB", "GB/s");
    fprintf(stderr, "%-10s %12llu %7.1f%% %12.3f %10s\n", "RAM", (unsigned long long)o->hits,
            100 * rate((double)o->hits, (double)asked), (double)o->hits * expert / 1e9, "-");
    fprintf(stderr, "%-10s %12llu %7.1f%% %12.3f %10.2f\n", "disk",
            (unsigned long long)o->misses, 100 * rate((double)o->misses, (double)asked),
            (double)streamed / 1e9, rate((double)streamed / 1e9, busy));
    fprintf(stderr, "%-10s %12s %8s %12.3f %10.2f\n\n", "at start", "dense", "",
            (double)s->dense_bytes / 1e9, rate((double)s->dense_bytes / 1e9, s->load_s));
    fprintf(stderr, "%-10s %12s %8s %12s\n", "phase", "tokens", "s", "tokens/s");
    fprintf(stderr, "%-10s %12llu %8.2f %12.2f\n", "prefill",
            (unsigned long long)s->prefill_tokens, s->prefill_s,
            rate((double)s->prefill_tokens, s->prefill_s));
    fprintf(stderr, "%-10s %12llu %8.2f %12.2f\n", "decode",
            (unsigned long long)s->decode_tokens, s->decode_s,
            rate((double)s->decode_tokens, s->decode_s));
    fprintf(stderr, "waited %.2f s for the disk; peak memory %s of %s\n", s->expert_wait_s,
            size_of(peak).text, size_of(p->budget).text);
}

/* One JSON object with every counter (DESIGN.md, "Numbers always at hand"). */
static int write_stats(FILE *f, const dsv4_engine *e, dsv4_err *err) {
    const dsv4_stats *s = engine_stats(e);
    const offload_stats *o = engine_offload_stats(e);
    const dsv4_plan *p = engine_plan(e);
    double op_total = 0;
    uint64_t peak;
    machine_rss(NULL, &peak);
    json_t *ops = json_object();
    for (int i = 0; i < OPC_N; i++) {
        json_object_set_new(ops, op_class_name[i], json_real(s->op_s[i]));
        op_total += s->op_s[i];
    }
    json_t *root = json_pack(
        "{s:{s:I,s:I}, s:{s:f,s:f,s:f}, s:o, s:{s:I,s:I,s:I}, s:{s:I,s:I,s:I,s:I,s:I},"
        " s:I, s:{s:I}, s:I, s:{s:I,s:I,s:I,s:I,s:I,s:I}, s:{s:f,s:f}}",
        "tokens", "prefill", (json_int_t)s->prefill_tokens, "decode",
        (json_int_t)s->decode_tokens,
        "seconds", "load", s->load_s, "prefill", s->prefill_s, "decode", s->decode_s,
        "op_seconds", ops,
        "bytes_read", "dense_from_disk", (json_int_t)s->dense_bytes, "experts_from_disk",
        (json_int_t)(o->read_bytes - s->dense_bytes), "reads", (json_int_t)o->reads,
        "experts", "ram_hits", (json_int_t)o->hits, "disk_reads", (json_int_t)o->misses,
        "evictions", (json_int_t)o->evictions, "uses", (json_int_t)s->expert_uses, "rows",
        (json_int_t)s->expert_rows,
        "passes", (json_int_t)s->passes, "kv_bytes", "ram", (json_int_t)p->kv,
        "peak_rss", (json_int_t)peak,
        "plan", "budget", (json_int_t)p->budget, "dense", (json_int_t)p->dense, "buffers",
        (json_int_t)p->work, "slots", (json_int_t)p->n_slots, "slot_bytes",
        (json_int_t)p->slot_bytes, "span", (json_int_t)p->span,
        "io", "wait_seconds", s->expert_wait_s, "compute_seconds", op_total - s->expert_wait_s);
    if (!root) return fail(err, "out of memory for the statistics");
    json_dumpf(root, f, JSON_INDENT(2));       /* out_close sees what could not be written */
    fputc('\n', f);
    json_decref(root);
    return 0;
}

/* === 4. The model behind a command ============================================================ */

typedef struct {
    dsv4_config cfg;
    ckpt *ck;
    tok *tok;                      /* NULL when ids go in and out                               */
    dsv4_engine *e;
    dsv4_session *s;
    float *logits;                 /* [EVAL_ROWS][vocab]                                        */
    status_line status;
    out_file stats;                /* opened before the work, so that a bad name costs nothing  */
} model;

static int model_open_files(model *m, const char *dir, bool with_text, dsv4_err *err) {
    *m = (model){0};
    if (config_load(&m->cfg, dir, err) || (with_text && tok_open(&m->tok, dir, err)) ||
        ckpt_open(&m->ck, dir, err))
        return -1;
    if (m->tok && tok_n_ids(m->tok) > m->cfg.vocab_size)
        return fail(err, "%s/tokenizer.json has ids up to %d, config.json a vocabulary of %d: "
                    "they are of two models", dir, tok_n_ids(m->tok) - 1, m->cfg.vocab_size);
    m->logits = malloc((size_t)EVAL_ROWS * (size_t)m->cfg.vocab_size * sizeof(float));
    return m->logits ? 0 : fail(err, "out of memory for logits");
}

/* Plan, load, and open a session with room for `ctx` tokens, `prompt` of them at once. */
static int model_start(model *m, const args *a, int64_t prompt, int64_t ctx, dsv4_err *err) {
    dsv4_opts o = {.dir = a->model, .n_threads = (int)a->threads, .ram_bytes = a->ram,
                   .ctx = a->ctx ? a->ctx : ctx, .chunk = (int)a->chunk,
                   .no_rounding = a->no_rounding};
    o.span_hint = (int)(a->chunk && a->chunk < prompt ? a->chunk : prompt);
    if (o.chunk > prompt) o.chunk = (int)prompt;
    m->status = (status_line){.on = !a->quiet && isatty(STDERR_FILENO), .n_total = prompt};
    if (prompt > o.ctx)
        return fail(err, "the text has %lld tokens and --ctx %lld is a smaller context; raise it",
                    (long long)prompt, (long long)o.ctx);
    if (a->stats && out_open(&m->stats, a->stats, err)) return -1;
    if (engine_open(&m->e, &m->cfg, m->ck, &o, err)) return -1;
    if (!a->quiet) print_plan(m->e);
    return session_open(&m->s, m->e, on_progress, &m->status, err);
}

static void model_close(model *m) {
    session_close(m->s);
    engine_close(m->e);
    ckpt_close(m->ck);
    tok_close(m->tok);
    free(m->logits);
}

static int model_finish(model *m, const args *a, int rc, dsv4_err *err) {
    status_clear(&m->status);
    if (rc == 0 && a->stats) rc = write_stats(m->stats.f, m->e, err);
    rc = out_close(&m->stats, rc, err);
    if (rc == 0 && !a->quiet) print_tiers(m->e);
    model_close(m);
    return rc;
}

/* BOS and the text as it is, special tokens in it included. */
static int encode_raw(const model *m, const char *s, size_t len, id_list *out, dsv4_err *err) {
    if (tok_encode(m->tok, s, len, true, &out->id, &out->n, err)) return -1;
    int32_t *grown = realloc(out->id, (out->n + 1) * sizeof *grown);
    if (!grown) {
        free(out->id);
        return fail(err, "out of memory for the prompt");
    }
    memmove(grown + 1, grown, out->n * sizeof *grown);
    grown[0] = m->cfg.bos_token_id;
    *out = (id_list){grown, out->n + 1};
    return 0;
}

/* The prompt's ids, from whichever source the flags name.  On 0 the caller frees out->id. */
static int prompt_ids(const model *m, const args *a, bool raw, id_list *out, dsv4_err *err) {
    if (a->ids) return read_ids(out, a->ids, err);
    text t = {0};
    const char *bytes = a->prompt;
    if (!bytes && read_text(&t, a->file, err)) return -1;
    size_t len = bytes ? strlen(bytes) : t.len;
    if (!bytes) bytes = t.bytes;
    int rc = raw ? encode_raw(m, bytes, len, out, err)
                 : prompt_user_turn(m->tok, bytes, len, !a->no_think, &out->id, &out->n, err);
    free(t.bytes);
    return rc;
}

/* Put ids through the model in spans of at most `step`. */
static int feed(model *m, const int32_t *ids, int64_t n, int64_t step, dsv4_err *err) {
    m->status.began = now_s();
    for (int64_t i = 0; i < n; i += step) {
        m->status.n_now = (int)(n - i < step ? n - i : step);
        m->status.n_done = i;
        if (session_forward(m->s, ids + i, m->status.n_now, err)) return -1;
    }
    m->status.n_now = 1;
    return 0;
}

/* === 5. run =================================================================================== */

static void print_token(const model *m, const args *a, int32_t id, bool first, utf8_stream *u) {
    if (a->print_ids) {
        printf("%s%d", first ? "" : " ", id);
    } else {
        char out[4096];
        size_t len;
        const char *bytes = tok_bytes(m->tok, id, &len);
        for (size_t i = 0, part; i < len; i += part) {     /* whatever length a piece has */
            part = len - i < 1024 ? len - i : 1024;
            fwrite(out, 1, utf8_push(u, bytes + i, part, out), stdout);
        }
    }
    fflush(stdout);
}

/* Sample up to n tokens behind the prompt, stop at EOS. */
static int generate(model *m, const args *a, int64_t n, dsv4_err *err) {
    const sample_opts o = {(float)a->temp, (float)a->top_p, a->seed};
    sample_rng rng;
    utf8_stream u = {0};
    char tail[16];
    int32_t *scratch = malloc((size_t)m->cfg.vocab_size * sizeof *scratch);
    if (!scratch) return fail(err, "out of memory for sampling");
    sample_seed(&rng, o.seed);
    int rc = 0;
    int last = (int)((session_pos(m->s) - 1) % engine_plan(m->e)->span);
    for (int64_t i = 0; i < n && rc == 0; i++) {
        session_logits(m->s, last, 1, m->logits);
        int32_t id = sample(m->logits, m->cfg.vocab_size, &o, &rng, scratch);
        if (id == m->cfg.eos_token_id) break;
        print_token(m, a, id, i == 0, &u);
        rc = check_stdout(err);
        last = 0;
        if (rc == 0 && i + 1 < n) rc = session_forward(m->s, &id, 1, err);
    }
    if (!a->print_ids) fwrite(tail, 1, utf8_push(&u, "", 0, tail), stdout);
    putchar('\n');
    free(scratch);
    return rc ? rc : check_stdout(err);
}

static int cmd_run(const args *a, dsv4_err *err) {
    model m;
    id_list ids = {0};
    int rc = model_open_files(&m, a->model, !a->ids || !a->print_ids, err);
    if (rc == 0) rc = prompt_ids(&m, a, a->raw, &ids, err);
    if (rc) {
        model_close(&m);
        return rc;
    }
    int64_t most = a->ctx ? a->ctx : m.cfg.max_position_embeddings, n = a->n_answer;
    if ((int64_t)ids.n >= most)
        rc = fail(err, "the prompt has %zu tokens and the context holds %lld with the answer; "
                  "shorten it or raise --ctx", ids.n, (long long)most);
    if (n > most - (int64_t)ids.n) n = most - (int64_t)ids.n;
    if (rc == 0) rc = model_start(&m, a, (int64_t)ids.n, (int64_t)ids.n + n, err);
    if (rc == 0) rc = feed(&m, ids.id, (int64_t)ids.n, engine_plan(m.e)->span, err);
    status_clear(&m.status);
    if (rc == 0) rc = generate(&m, a, n, err);
    free(ids.id);
    return model_finish(&m, a, rc, err);
}

/* === 6. eval ================================================================================== */

/* The header of a NumPy file, version 1.0: float32, C order, shape [n, vocab]. */
static void npy_header(FILE *f, int64_t n, int vocab) {
    char dict[118];
    int len = snprintf(dict, sizeof dict,
                       "{'descr': '<f4', 'fortran_order': False, 'shape': (%lld, %d), }",
                       (long long)n, vocab);
    memset(dict + len, ' ', sizeof dict - (size_t)len);
    dict[sizeof dict - 1] = '\n';
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f);
    fwrite(dict, 1, sizeof dict, f);
}

typedef struct { const id_list *ids; FILE *out; double nll; int64_t at; } scores;

/* Score and write the rows of the forward just done. */
static void score_rows(model *m, scores *sc, int n) {
    int vocab = m->cfg.vocab_size;
    for (int i = 0; i < n; i += EVAL_ROWS) {
        int rows = n - i < EVAL_ROWS ? n - i : EVAL_ROWS;
        session_logits(m->s, i, rows, m->logits);
        if (sc->out) fwrite(m->logits, sizeof(float), (size_t)rows * (size_t)vocab, sc->out);
        for (int r = 0; r < rows; r++, sc->at++)
            if (sc->at + 1 < (int64_t)sc->ids->n)
                sc->nll += token_nll(m->logits + (size_t)r * (size_t)vocab, vocab,
                                     sc->ids->id[sc->at + 1]);
    }
}

static int eval_all(model *m, const args *a, scores *sc, dsv4_err *err) {
    int64_t n = (int64_t)sc->ids->n, span = engine_plan(m->e)->span;
    int64_t decode_from = a->decode_from < 0 || a->decode_from > n ? n : a->decode_from;
    for (int64_t i = 0, step; i < n; i += step) {
        step = i >= decode_from ? 1 : decode_from - i < span ? decode_from - i : span;
        m->status.n_now = (int)step;
        m->status.n_done = i;
        if (session_forward(m->s, sc->ids->id + i, (int)step, err)) return -1;
        score_rows(m, sc, (int)step);
    }
    return 0;
}

static int cmd_eval(const args *a, dsv4_err *err) {
    model m;
    id_list ids = {0};
    out_file out = {0};
    int rc = model_open_files(&m, a->model, !a->ids, err);
    if (rc == 0) rc = prompt_ids(&m, a, true, &ids, err);
    for (size_t i = 0; i < ids.n && rc == 0; i++)      /* they index logits below */
        if (ids.id[i] >= m.cfg.vocab_size)
            rc = fail(err, "token id %d at position %zu is outside of the vocabulary of %d",
                      ids.id[i], i, m.cfg.vocab_size);
    if (rc == 0) rc = model_start(&m, a, (int64_t)ids.n, (int64_t)ids.n, err);
    if (rc == 0 && a->logits) rc = out_open(&out, a->logits, err);
    scores sc = {.ids = &ids, .out = out.f};
    if (rc == 0 && out.f) npy_header(out.f, (int64_t)ids.n, m.cfg.vocab_size);
    m.status.began = now_s();
    if (rc == 0) rc = eval_all(&m, a, &sc, err);
    rc = out_close(&out, rc, err);
    if (rc == 0) {
        double nll = ids.n > 1 ? sc.nll / (double)(ids.n - 1) : 0;
        status_clear(&m.status);
        printf("tokens %zu  nll %.6f  perplexity %.4f\n", ids.n, nll, exp(nll));
        rc = check_stdout(err);
    }
    free(ids.id);
    return model_finish(&m, a, rc, err);
}

/* === 7. check, help, version ================================================================== */

static void print_check(const dsv4_config *c, const ckpt *ck, const weights_bytes *b) {
    int kinds[3] = {0};            /* window only, CSA, HCA */
    for (int l = 0; l < c->num_hidden_layers; l++)
        kinds[c->compress_ratios[l] == 0 ? 0 : c->compress_ratios[l] == 4 ? 1 : 2]++;
    printf("%-12s %s\n", "model", c->name);
    printf("%-12s %d: %d window, %d CSA, %d HCA; %d route by token id\n", "layers",
           c->num_hidden_layers, kinds[0], kinds[1], kinds[2], c->num_hash_layers);
    printf("%-12s dim %d, %d heads of %d, vocabulary %d, context %lld\n", "sizes",
           c->hidden_size, c->num_attention_heads, c->head_dim, c->vocab_size,
           (long long)c->max_position_embeddings);
    printf("%-12s %d a layer, %d a token, and a shared one\n", "experts", c->n_routed_experts,
           c->num_experts_per_tok);
    printf("%-12s %s\n", "MTP block", b->has_mtp ? "yes" : "none");
    printf("%-12s %d, %zu tensors\n", "shards", ckpt_n_shards(ck), ckpt_n_tensors(ck));
    printf("%-12s %10.3f GB\n%-12s %10.3f GB\n", "dense", (double)b->dense / 1e9, "experts",
           (double)b->experts / 1e9);
    if (b->mtp) printf("%-12s %10.3f GB\n", "MTP", (double)b->mtp / 1e9);
    if (b->unused) printf("%-12s %10.3f GB\n", "not used", (double)b->unused / 1e9);
    printf("every tensor that the graph needs is there\n");
}

static int cmd_check(const args *a, dsv4_err *err) {
    dsv4_config cfg;
    ckpt *ck = NULL;
    dsv4_weights *w = NULL;
    int rc = config_load(&cfg, a->operand, err) || ckpt_open(&ck, a->operand, err) ||
             weights_bind(&w, ck, &cfg, err) ? -1 : 0;
    if (rc == 0 && !a->quiet) {
        weights_bytes b = weights_count(w);
        print_check(&cfg, ck, &b);
    }
    weights_close(w);
    ckpt_close(ck);
    return rc ? rc : check_stdout(err);
}

static int cmd_version(const args *a, dsv4_err *err) {
    (void)a;
    printf("dsv4 %s\n", DSV4_VERSION);
    return check_stdout(err);
}

static void print_flags(const command *c) {
    printf("dsv4 %s %s\n\n%s.\n\n", c->name, c->usage, c->help);
    for (int i = 0; i < N_FLAGS; i++) {
        char left[40];
        if (!(flags[i].commands & c->bit)) continue;
        snprintf(left, sizeof left, "%s %s", flags[i].name, flags[i].value ? flags[i].value : "");
        printf("  %-18s %s\n", left, flags[i].help);
    }
}

static int cmd_help(const args *a, dsv4_err *err) {
    const command *c = a->operand ? find_command(a->operand) : NULL;
    if (a->operand && !c) return fail(err, "no command %s; see dsv4 help", a->operand);
    if (c) {
        print_flags(c);
    } else {
        printf("dsv4 runs DeepSeek-V4 from its official checkpoint.\n\n");
        for (int i = 0; i < N_COMMANDS; i++)
            printf("  dsv4 %-8s %-52s %s\n", commands[i].name, commands[i].usage,
                   commands[i].help);
        printf("\ndsv4 help COMMAND lists its flags.\n");
    }
    return check_stdout(err);
}

/* Does this processor have what kernels.c was built for? */
static bool cpu_fits(void) {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

int main(int argc, char **argv) {
    dsv4_err err = {""};
    struct sigaction sa = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &sa, NULL);          /* a second Ctrl-C ends at once */
    sigaction(SIGTERM, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);              /* a closed pipe is a write error, not a death */
    const char *name = argc > 1 ? argv[1] : "help";
    if (!strcmp(name, "--help") || !strcmp(name, "-h")) name = "help";
    if (!strcmp(name, "--version")) name = "version";
    const command *c = find_command(name);
    args a;
    if (!c || parse_args(&a, c, argc > 2 ? argc - 2 : 0, argv + 2, &err)) {
        if (!c) fail(&err, "no command %s; see dsv4 help", name);
        fprintf(stderr, "dsv4: %s\n", err.msg);
        return EXIT_USAGE;
    }
    int rc = (c->bit & CMD_MODEL) && !cpu_fits()
                 ? fail(&err, "this processor lacks AVX2, FMA or F16C, which dsv4 needs on x86-64")
                 : c->run(&a, &err);
    if (rc == 0) return 0;
    fprintf(stderr, "dsv4: %s\n", err.msg);
    return interrupted ? EXIT_INTERRUPTED : 1;
}
