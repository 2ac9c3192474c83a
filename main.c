/* main.c -- the commands and their flags, progress, tables.  The only place that exits.
 *
 *   dsv4 COMMAND [flags]      stdout: the answer, and nothing else
 *                             stderr: thoughts, progress, plans, tables, errors (one line each)
 *
 * One table of flags and one of commands make the parser and the help; tests/manual.sh makes the
 * manual page and the completions of both shells from the help.
 *
 * Exit codes  0 done, 1 failed, 2 usage, 130 interrupted.
 * Contents    1 flags   2 files and output   3 progress and tables   4 the model behind a
 *             command   5 the answer   6 run   7 chat   8 eval   9 prompt, tokenize
 *             10 plan, check   11 bench   12 help
 * Not here    anything that could be tested without a terminal                                 */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <errno.h>
#include <histedit.h>
#include <jansson.h>
#include <langinfo.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <wchar.h>

enum {
    EXIT_USAGE = 2, EXIT_INTERRUPTED = 130,
    ANSWER_DEFAULT = 4096,         /* tokens of one answer, thinking included                   */
    CHAT_CTX = 32768,              /* tokens of a conversation where nobody said                */
    EVAL_ROWS = 16,
    BENCH_PROMPT = 64, BENCH_TOKENS = 64,
    HISTORY_LINES = 1000,
    PLAIN_SECONDS = 10,            /* at most, between two progress lines without a terminal    */
    TURN_TOKENS = 100,             /* of an ordinary chat turn                                  */
    MUCH_SECONDS = 10,             /* a turn that takes longer is announced                     */
};

static const uint64_t FILE_MAX = (uint64_t)1 << 30;   /* of text or ids given by a person */

/* Ctrl-C and SIGTERM, read many times a layer; a resized terminal. */
static volatile sig_atomic_t interrupted, terminated, resized;

static void on_signal(int sig) {
    if (sig == SIGWINCH) {
        resized = 1;
    } else {
        interrupted++;
        terminated |= sig == SIGTERM;
    }
}

/* === 1. Flags ================================================================================= */

enum {
    CMD_RUN = 1, CMD_CHAT = 2, CMD_EVAL = 4, CMD_PROMPT = 8, CMD_TOKENIZE = 16, CMD_PLAN = 32,
    CMD_CHECK = 64, CMD_VERSION = 128, CMD_HELP = 256, CMD_BENCH = 512,
    CMD_ANSWER = CMD_RUN | CMD_CHAT,
    CMD_ENGINE = CMD_ANSWER | CMD_EVAL | CMD_BENCH,
    CMD_BUDGET = CMD_ENGINE | CMD_PLAN,
};

typedef struct { const char *word[MAX_STOPS]; int n; } word_list;

typedef struct {                   /* everything a command line can say                         */
    const char *model, *prompt, *file, *ids, *logits, *stats, *operand, *system, *effort, *gen;
    const char *trace;
    word_list stop;
    int64_t n_answer, n_bench, ctx, decode_from, chunk, threads, top_k;
    uint64_t ram, seed;
    double temp, top_p, min_p, penalty;                /* -1: as the model's makers say         */
    bool raw, print_ids, no_think, no_rounding, no_loop_guard, quiet, decode, as_ids, json, hash;
} args;

typedef enum { ARG_TEXT, ARG_LIST, ARG_COUNT, ARG_SIZE, ARG_SEED, ARG_REAL, ARG_BOOL } arg_kind;

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
    {"-m", "DIR", "the model's directory", CMD_BUDGET | CMD_PROMPT | CMD_TOKENIZE, ARG_TEXT,
     AT(model), 0, 0},
    {"-p", "TEXT", "the prompt", CMD_RUN, ARG_TEXT, AT(prompt), 0, 0},
    {"-f", "FILE", "a text file, - for stdin", CMD_RUN | CMD_EVAL | CMD_TOKENIZE, ARG_TEXT,
     AT(file), 0, 0},
    {"--ids", "FILE", "a file of token ids, separated by white space", CMD_RUN | CMD_EVAL,
     ARG_TEXT, AT(ids), 0, 0},
    {"--ids", NULL, "write the token ids (needs -m)", CMD_PROMPT, ARG_BOOL, AT(as_ids), 0, 0},
    {"--decode", NULL, "from ids to text", CMD_TOKENIZE, ARG_BOOL, AT(decode), 0, 0},
    {"-n", "N", "tokens of an answer at most, thoughts included (4096)", CMD_ANSWER, ARG_COUNT,
     AT(n_answer), 1, 1e9},
    {"--system", "TEXT", "the system prompt", CMD_ANSWER, ARG_TEXT, AT(system), 0, 0},
    {"--no-think", NULL, "answer without thinking first", CMD_ANSWER, ARG_BOOL, AT(no_think), 0,
     0},
    {"--effort", "LEVEL", "how hard to think: low, high or max", CMD_ANSWER, ARG_TEXT,
     AT(effort), 0, 0},
    {"--raw", NULL, "continue the text instead of answering it", CMD_RUN, ARG_BOOL, AT(raw), 0,
     0},
    {"--temp", "T", "temperature, 0 for the likeliest token (the model's, else 1)", CMD_ANSWER,
     ARG_REAL, AT(temp), 0, 1e3},
    {"--top-p", "P", "draw from the likeliest tokens that hold P (the model's, else 1)",
     CMD_ANSWER, ARG_REAL, AT(top_p), 0, 1},
    {"--top-k", "K", "draw from the K likeliest tokens, 0 for all (the model's, else 0)",
     CMD_ANSWER, ARG_COUNT, AT(top_k), 0, 1e9},
    {"--min-p", "P", "drop tokens below P times the likeliest (the model's, else 0)", CMD_ANSWER,
     ARG_REAL, AT(min_p), 0, 1},
    {"--repetition-penalty", "X", "divide the logits of tokens already there (the model's, else 1)",
     CMD_ANSWER, ARG_REAL, AT(penalty), 0.01, 100},
    {"--seed", "S", "same seed, same text (0)", CMD_ANSWER, ARG_SEED, AT(seed), 0, 0},
    {"--stop", "TEXT", "end the answer where TEXT begins; up to 8 times", CMD_ANSWER, ARG_LIST,
     AT(stop), 0, 0},
    {"--no-loop-guard", NULL, "go on when the answer goes round in circles", CMD_ANSWER, ARG_BOOL,
     AT(no_loop_guard), 0, 0},
    {"--print-ids", NULL, "print token ids instead of text", CMD_RUN, ARG_BOOL, AT(print_ids), 0,
     0},
    {"--tokens", "N", "tokens to decode (64)", CMD_BENCH, ARG_COUNT, AT(n_bench), 1, 1e6},
    {"--trace", "FILE", "write token, layer and experts of each step", CMD_BENCH, ARG_TEXT,
     AT(trace), 0, 0},
    {"--logits", "OUT.npy", "write the logits, float32 [n, vocab]", CMD_EVAL, ARG_TEXT,
     AT(logits), 0, 0},
    {"--decode-from", "K", "ids from K on go one at a time", CMD_EVAL, ARG_COUNT,
     AT(decode_from), 0, 1e9},
    {"--no-rounding", NULL, "leave out the model's deliberate roundings", CMD_EVAL, ARG_BOOL,
     AT(no_rounding), 0, 0},
    {"--chunk", "N", "tokens to put through at once", CMD_EVAL, ARG_COUNT, AT(chunk), 1, 1e9},
    {"--generation", "GEN", "v4 or 0731, the two prompt formats (the model's, else v4)",
     CMD_PROMPT, ARG_TEXT, AT(gen), 0, 0},
    {"-t", "N", "threads (all processors); also --threads", CMD_BUDGET, ARG_COUNT, AT(threads), 1,
     MAX_THREADS},
    {"--ram", "SIZE", "memory to use, as 512M or 16G (most of what is free)", CMD_BUDGET,
     ARG_SIZE, AT(ram), 0, 0},
    {"--ctx", "N", "tokens of context to make room for (what is needed; chat and plan: 32768)",
     CMD_BUDGET, ARG_COUNT, AT(ctx), 1, 1e9},
    {"--stats", "FILE", "write counters and times as JSON", CMD_ENGINE, ARG_TEXT, AT(stats), 0,
     0},
    {"--hash", NULL, "read every shard whole and compare with the last time", CMD_CHECK, ARG_BOOL,
     AT(hash), 0, 0},
    {"--json", NULL, "one JSON object instead of a table", CMD_CHECK | CMD_PLAN, ARG_BOOL,
     AT(json), 0, 0},
    {"-q", NULL, "no progress, no tables, no thoughts", CMD_ENGINE | CMD_CHECK, ARG_BOOL,
     AT(quiet), 0, 0},
};
enum { N_FLAGS = sizeof flags / sizeof *flags };

static int cmd_run(const args *a, dsv4_err *err);
static int cmd_chat(const args *a, dsv4_err *err);
static int cmd_eval(const args *a, dsv4_err *err);
static int cmd_prompt(const args *a, dsv4_err *err);
static int cmd_tokenize(const args *a, dsv4_err *err);
static int cmd_plan(const args *a, dsv4_err *err);
static int cmd_check(const args *a, dsv4_err *err);
static int cmd_bench(const args *a, dsv4_err *err);
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
    {"chat", "-m DIR [flags]", "talk with the model; /help lists what it understands", CMD_CHAT,
     cmd_chat},
    {"eval", "-m DIR (-f FILE | --ids FILE) [flags]", "score a text: mean NLL and perplexity",
     CMD_EVAL, cmd_eval},
    {"prompt", "[-m DIR] [--generation GEN] [--ids]",
     "turn an OpenAI-style request on stdin into the model's prompt", CMD_PROMPT, cmd_prompt},
    {"tokenize", "-m DIR [-f FILE] [--decode]", "turn text into token ids, or ids into text",
     CMD_TOKENIZE, cmd_tokenize},
    {"plan", "-m DIR [--ram SIZE] [--ctx N] [--json]",
     "say what would live where, and how fast that can be here", CMD_PLAN, cmd_plan},
    {"check", "DIR [--hash] [--json]", "say what a model is and whether it is whole", CMD_CHECK,
     cmd_check},
    {"bench", "-m DIR [--ram SIZE] [--tokens N] [--trace FILE]",
     "measure decode against memory, processor and disk", CMD_BENCH, cmd_bench},
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

/* Letters to insert, drop or change between two short words. */
static int edit_distance(const char *a, const char *b) {
    int row[64], n = (int)strnlen(b, 63);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; a[i]; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 1; j <= n; j++) {
            int best = diagonal + (a[i] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[n];
}

/* Keep the word nearest to `asked` so far, if it is near at all. */
static void nearer(const char *asked, const char *word, const char **best, int *distance) {
    int d = edit_distance(asked, word), near = (int)strlen(asked) / 2;
    if (d > near || (*best && d >= *distance)) return;
    *best = word;
    *distance = d;
}

static int unknown_flag(const command *c, const char *name, dsv4_err *err) {
    const char *best = NULL;
    int distance = 0;
    for (int i = 0; i < N_FLAGS; i++)
        if (flags[i].commands & c->bit) nearer(name, flags[i].name, &best, &distance);
    return fail(err, "%s does not take %s%s%s; see dsv4 help %s", c->name, name,
                best ? ", perhaps " : "", best ? best : "", c->name);
}

static int unknown_command(const char *name, dsv4_err *err) {
    const char *best = NULL;
    int distance = 0;
    for (int i = 0; i < N_COMMANDS; i++) nearer(name, commands[i].name, &best, &distance);
    return fail(err, "no command %s%s%s; see dsv4 help", name, best ? ", perhaps " : "",
                best ? best : "");
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
    void *place = (char *)a + f->at;
    char *end = NULL;
    word_list *list = place;
    double real;
    switch (f->kind) {
    case ARG_TEXT: *(const char **)place = value; return 0;
    case ARG_BOOL: *(bool *)place = true; return 0;
    case ARG_LIST:
        if (!*value || strlen(value) >= MAX_STOP_BYTES)
            return fail(err, "%s takes 1 to %d bytes", f->name, MAX_STOP_BYTES - 1);
        if (list->n == MAX_STOPS) return fail(err, "%s at most %d times", f->name, MAX_STOPS);
        list->word[list->n++] = value;
        return 0;
    case ARG_SIZE:
        if (parse_size(value, place)) return 0;
        return fail(err, "%s %s is not a size; write it as 512M or 16G", f->name, value);
    case ARG_SEED:
        errno = 0;
        *(uint64_t *)place = strtoull(value, &end, 10);
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
    if (f->kind == ARG_REAL) *(double *)place = real;
    else *(int64_t *)place = (int64_t)real;
    return 0;
}

static int args_check(const args *a, const command *c, dsv4_err *err) {
    static const char *const efforts = " low high max ", *const gens = " v4 0731 ";
    char word[32];
    if ((c->bit & (CMD_BUDGET | CMD_TOKENIZE)) && !a->model)
        return fail(err, "%s needs -m DIR", c->name);
    if (a->as_ids && !a->model) return fail(err, "prompt --ids needs -m DIR for its tokenizer");
    if (c->bit == CMD_CHECK && !a->operand) return fail(err, "check needs a directory");
    int sources = !!a->prompt + !!a->file + !!a->ids;
    if ((c->bit & (CMD_RUN | CMD_EVAL)) && sources != 1)
        return fail(err, "%s needs one of %s-f FILE, --ids FILE", c->name,
                    c->bit == CMD_RUN ? "-p TEXT, " : "");
    snprintf(word, sizeof word, " %.20s ", a->effort ? a->effort : "low");
    if (!strstr(efforts, word)) return fail(err, "--effort %s is not low, high or max", a->effort);
    snprintf(word, sizeof word, " %.20s ", a->gen ? a->gen : "v4");
    if (!strstr(gens, word)) return fail(err, "--generation %s is not v4 or 0731", a->gen);
    return 0;
}

/* Fill *a from the words behind the command; -1 is a usage error. */
static int parse_args(args *a, const command *c, int argc, char **argv, dsv4_err *err) {
    *a = (args){.n_answer = ANSWER_DEFAULT, .n_bench = BENCH_TOKENS, .temp = -1, .top_p = -1,
                .min_p = -1, .penalty = -1, .top_k = -1, .decode_from = -1};
    bool takes_operand = c->bit & (CMD_CHECK | CMD_HELP);
    for (int i = 0; i < argc; i++) {
        if (argv[i][0] != '-' && takes_operand && !a->operand) {
            a->operand = argv[i];
            continue;
        }
        const flag *f = find_flag(argv[i], c->bit);
        if (!f) return unknown_flag(c, argv[i], err);
        if (f->value && i + 1 == argc)
            return fail(err, "%s needs %s behind it", argv[i], f->value);
        if (flag_set(a, f, f->value ? argv[++i] : NULL, err)) return -1;
    }
    return args_check(a, c, err);
}

/* === 2. Files and output ====================================================================== */

typedef struct { char *bytes; size_t len, cap; } text;

/* Append n bytes; -1: memory or FILE_MAX do not allow it. */
static int text_add(text *t, const char *bytes, size_t n, dsv4_err *err) {
    if (n > FILE_MAX || t->len + n > FILE_MAX)
        return fail(err, "a text of more than 1 GB: split it");
    if (t->len + n > t->cap) {
        size_t cap = 2 * (t->len + n) + 4096;
        char *grown = realloc(t->bytes, cap);
        if (!grown) return fail(err, "out of memory for a text of %zu bytes", t->len + n);
        t->bytes = grown;
        t->cap = cap;
    }
    if (n) memcpy(t->bytes + t->len, bytes, n);
    t->len += n;
    return 0;
}

/* Read a whole file, "-" for stdin.  On 0 the caller frees out->bytes. */
static int read_text(text *out, const char *path, dsv4_err *err) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) return fail(err, "open %s: %s", path, strerror(errno));
    char part[1 << 16];
    size_t got;
    int rc = 0;
    *out = (text){0};
    while (rc == 0 && (got = fread(part, 1, sizeof part, f)) > 0)
        rc = text_add(out, part, got, err);
    if (rc == 0 && ferror(f)) rc = fail(err, "read %s: %s", path, strerror(errno));
    else if (rc == 0 && out->len == 0) rc = fail(err, "%s is empty: nothing to do", path);
    if (f != stdin) fclose(f);
    if (rc) free(out->bytes);
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

/* $VAR/dsv4/NAME or ~/FALLBACK/dsv4/NAME, its directories made; false without a home. */
static bool user_path(char *out, size_t size, const char *var, const char *fallback,
                      const char *name) {
    const char *base = getenv(var), *home = getenv("HOME");
    int n = base && *base == '/' ? snprintf(out, size, "%s/dsv4/%s", base, name)
            : home && *home      ? snprintf(out, size, "%s/%s/dsv4/%s", home, fallback, name)
                                 : -1;
    if (n < 0 || (size_t)n >= size) return false;
    for (char *slash = strchr(out + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(out, 0700);
        *slash = '/';
    }
    return true;
}

/* The file in the user's cache that remembers `what` of a model's directory: its name is made of
 * the directory's path (FNV-1a).  False where there is no such place. */
static bool model_path(char *out, size_t size, const char *what, const char *dir) {
    char real[4096], name[64];
    uint64_t h = 0xcbf29ce484222325u;
    if (!realpath(dir, real)) return false;
    for (const char *c = real; *c; c++) h = (h ^ (uint8_t)*c) * 0x100000001b3u;
    snprintf(name, sizeof name, "%s-%016llx.json", what, (unsigned long long)h);
    return user_path(out, size, "XDG_CACHE_HOME", ".cache", name);
}

/* === 3. Progress and tables =================================================================== */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double rate(double amount, double seconds) { return seconds > 0 ? amount / seconds : 0; }

/* Does stderr understand control codes? */
static bool on_terminal(void) {
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) && term && strcmp(term, "dumb");
}

typedef struct {                   /* the one status: a bar on a terminal, else a line at times */
    bool on, bar;
    bool patient;                  /* decode in chat: one Ctrl-C waits for the token's end      */
    const char *phase;             /* "reading"                                                 */
    const dsv4_engine *e;          /* for the disk's rate, may be NULL                          */
    uint64_t read_before;
    int64_t n_done, n_now, n_total; /* tokens done, under way, in all; n_total 0: no tokens     */
    double began, shown;
} status_line;

static void status_begin(status_line *s, const char *phase, int64_t n_total) {
    s->phase = phase;
    s->n_total = n_total;
    s->n_done = s->n_now = 0;
    s->began = s->shown = now_s();
    s->read_before = s->e ? engine_offload_stats(s->e)->read_bytes : 0;
}

static void status_clear(status_line *s) {
    if (s->on && s->bar && s->shown > s->began) fputs("\r\033[K", stderr);
    s->shown = s->began;
}

/* "[=====>    ] reading 42%: 1234 of 5678 tokens, 12.3 tokens/s, 1.90 GB/s, 0:42 left" */
static void status_draw(status_line *s, double share, double t) {
    char line[256];
    double spent = t - s->began, left = share > 0 ? spent / share * (1 - share) : 0;
    double tokens = share * (double)s->n_total;
    int n = snprintf(line, sizeof line, "%s %.0f%%:", s->phase, 100 * share);
    if (s->n_total)
        n += snprintf(line + n, sizeof line - (size_t)n, " %.0f of %lld tokens, %.1f tokens/s,",
                      tokens, (long long)s->n_total, rate(tokens, spent));
    if (s->e)
        n += snprintf(line + n, sizeof line - (size_t)n, " %.2f GB/s,", rate((double)(
                      engine_offload_stats(s->e)->read_bytes - s->read_before) / 1e9, spent));
    n += snprintf(line + n, sizeof line - (size_t)n, " %.0f:%02.0f left", floor(left / 60),
                  floor(fmod(left, 60)));
    if (!s->bar) {
        fprintf(stderr, "%s\n", line);
        return;
    }
    struct winsize w = {0};
    int columns = ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col ? w.ws_col : 80;
    int wide = columns - n - 4 < 30 ? columns - n - 4 : 30, full = (int)(share * wide);
    fputs("\r\033[K", stderr);
    if (wide >= 5) {
        fputc('[', stderr);
        for (int i = 0; i < wide; i++) fputc(i < full ? '=' : i == full ? '>' : ' ', stderr);
        fputs("] ", stderr);
    }
    fprintf(stderr, "%.*s", columns - 1, line);
}

/* A progress_fn: how far, at which rate; and whether to stop. */
static int on_progress(void *arg, double done) {
    status_line *s = arg;
    double t = now_s(), pause = 0.25 + s->shown - s->began;    /* first after 0.25, 0.75, 1.75 s */
    if (pause > PLAIN_SECONDS) pause = PLAIN_SECONDS;
    if (s->on && t - s->shown > (s->bar ? 0.2 : pause)) {
        if (s->n_total) done = ((double)s->n_done + (double)s->n_now * done) / (double)s->n_total;
        s->shown = t;
        status_draw(s, done, t);
    }
    return terminated || interrupted > s->patient;
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

static void print_plan(const dsv4_engine *e) {
    const dsv4_plan *p = engine_plan(e);
    fprintf(stderr, "plan: RAM %s = program %s + dense weights %s%s + KV %s + buffers %s + "
            "%d of %d experts %s; %d tokens a span\n", size_of(p->budget).text,
            size_of(p->base).text, size_of(p->dense).text,
            p->streamed ? " (read layer by layer)" : "", size_of(p->kv).text,
            size_of(p->work).text, p->n_slots, p->n_experts_total, size_of(p->slots).text,
            p->span);
    if (engine_note(e)) fprintf(stderr, "note: %s\n", engine_note(e));
}

/* Where the bytes came from, and how fast. */
static void print_tiers(const dsv4_engine *e) {
    const dsv4_stats *s = engine_stats(e);
    const cache_stats *x = engine_expert_stats(e);
    const dsv4_plan *p = engine_plan(e);
    uint64_t peak, hits = s->expert_uses - x->misses;
    uint64_t dense = engine_offload_stats(e)->read_bytes - s->dense_bytes - x->read_bytes;
    double busy = s->prefill_s + s->decode_s, asked = (double)s->expert_uses;
    machine_rss(NULL, &peak);
    fprintf(stderr, "\n%-10s %12s %8s %12s %10s\n", "tier", "experts", "share", "GB", "GB/s");
    fprintf(stderr, "%-10s %12llu %7.1f%% %12.3f %10s\n", "RAM", (unsigned long long)hits,
            100 * rate((double)hits, asked), (double)hits * (double)p->slot_bytes / 1e9, "-");
    fprintf(stderr, "%-10s %12llu %7.1f%% %12.3f %10.2f\n", "disk",
            (unsigned long long)x->misses, 100 * rate((double)x->misses, asked),
            (double)x->read_bytes / 1e9, rate((double)x->read_bytes / 1e9, busy));
    if (p->streamed)
        fprintf(stderr, "%-10s %12s %8s %12.3f %10.2f\n", "disk", "dense", "",
                (double)dense / 1e9, rate((double)dense / 1e9, busy));
    fprintf(stderr, "%-10s %12s %8s %12.3f %10.2f\n\n", "at start", "dense", "",
            (double)s->dense_bytes / 1e9, rate((double)s->dense_bytes / 1e9, s->load_s));
    fprintf(stderr, "%-10s %12s %8s %12s\n", "phase", "tokens", "s", "tokens/s");
    fprintf(stderr, "%-10s %12llu %8.2f %12.2f\n", "prefill",
            (unsigned long long)s->prefill_tokens, s->prefill_s,
            rate((double)s->prefill_tokens, s->prefill_s));
    fprintf(stderr, "%-10s %12llu %8.2f %12.2f\n", "decode",
            (unsigned long long)s->decode_tokens, s->decode_s,
            rate((double)s->decode_tokens, s->decode_s));
    fprintf(stderr, "waited %.2f s for the disk; peak memory %s of %s\n",
            s->expert_wait_s + s->dense_wait_s,
            size_of(peak).text, size_of(p->budget).text);
}

/* One JSON object with every counter (DESIGN.md, "Numbers always at hand"). */
static int write_stats(FILE *f, const dsv4_engine *e, dsv4_err *err) {
    const dsv4_stats *s = engine_stats(e);
    const offload_stats *o = engine_offload_stats(e);
    const cache_stats *x = engine_expert_stats(e);
    const dsv4_plan *p = engine_plan(e);
    json_t *layers = json_array();
    double op_total = 0;
    uint64_t peak;
    machine_rss(NULL, &peak);
    json_t *ops = json_object();
    for (int i = 0; i < OPC_N; i++) {
        json_object_set_new(ops, op_class_name[i], json_real(s->op_s[i]));
        op_total += s->op_s[i];
    }
    for (int l = 0; l < p->n_layers; l++) {
        group_uses u = engine_layer_uses(e, l);
        json_array_append_new(layers, json_real(rate(u.hits, (double)u.hits + u.misses)));
    }
    json_t *root = json_pack(
        "{s:{s:I,s:I}, s:{s:f,s:f,s:f}, s:o, s:{s:I,s:I,s:I,s:I}, s:{s:I,s:I,s:I,s:I,s:I,s:o},"
        " s:I, s:{s:I}, s:I, s:{s:I,s:I,s:b,s:I,s:I,s:I,s:I}, s:{s:f,s:f,s:f}}",
        "tokens", "prefill", (json_int_t)s->prefill_tokens, "decode",
        (json_int_t)s->decode_tokens,
        "seconds", "load", s->load_s, "prefill", s->prefill_s, "decode", s->decode_s,
        "op_seconds", ops,
        "bytes_read", "dense_from_disk", (json_int_t)s->dense_bytes, "dense_streamed",
        (json_int_t)(o->read_bytes - s->dense_bytes - x->read_bytes), "experts_from_disk",
        (json_int_t)x->read_bytes, "reads", (json_int_t)o->reads,
        "experts", "ram_hits", (json_int_t)(s->expert_uses - x->misses), "disk_reads",
        (json_int_t)x->misses, "evictions", (json_int_t)x->evictions, "uses",
        (json_int_t)s->expert_uses, "rows", (json_int_t)s->expert_rows, "hit_rate_by_layer",
        layers,
        "passes", (json_int_t)s->passes, "kv_bytes", "ram", (json_int_t)p->kv,
        "peak_rss", (json_int_t)peak,
        "plan", "budget", (json_int_t)p->budget, "dense", (json_int_t)p->dense,
        "dense_streamed", p->streamed, "buffers", (json_int_t)p->work, "slots",
        (json_int_t)p->n_slots, "slot_bytes",
        (json_int_t)p->slot_bytes, "span", (json_int_t)p->span,
        "io", "wait_seconds", s->expert_wait_s + s->dense_wait_s, "expert_wait_seconds",
        s->expert_wait_s, "compute_seconds",
        op_total - s->expert_wait_s - s->dense_wait_s);
    if (!root) return fail(err, "out of memory for the statistics");
    json_dumpf(root, f, JSON_INDENT(2));       /* out_close sees what could not be written */
    fputc('\n', f);
    json_decref(root);
    return 0;
}

/* === 4. The model behind a command ============================================================ */

typedef struct {
    dsv4_config cfg;
    generation gen;
    ckpt *ck;
    tok *tok;                      /* NULL when ids go in and out                               */
    dsv4_engine *e;
    dsv4_session *s;
    float *logits;                 /* [EVAL_ROWS][vocab]                                        */
    int last;                      /* the row of the last token in the last forward             */
    FILE *trace;                   /* of bench, or NULL                                         */
    const char *note;              /* told with the plan                                        */
    char heat[4096];               /* remembers which experts are used                          */
    status_line status;
    out_file stats;                /* opened before the work, so that a bad name costs nothing  */
} model;

static int model_open_files(model *m, const char *dir, bool with_text, dsv4_err *err) {
    *m = (model){0};
    if (config_load(&m->cfg, dir, err) || (with_text && tok_open(&m->tok, dir, err)) ||
        ckpt_open(&m->ck, dir, err) || config_generation(&m->gen, dir, err))
        return -1;
    if (m->tok && tok_n_ids(m->tok) > m->cfg.vocab_size)
        return fail(err, "%s/tokenizer.json has ids up to %d, config.json a vocabulary of %d: "
                    "they are of two models", dir, tok_n_ids(m->tok) - 1, m->cfg.vocab_size);
    m->logits = malloc((size_t)EVAL_ROWS * (size_t)m->cfg.vocab_size * sizeof(float));
    return m->logits ? 0 : fail(err, "out of memory for logits");
}

static void on_trace(void *arg, int64_t pos, int layer, const int32_t *experts, int n) {
    fprintf(arg, "%lld %d", (long long)pos, layer);
    for (int i = 0; i < n; i++) fprintf(arg, " %d", experts[i]);
    fputc('\n', arg);
}

/* Plan, load, and open a session with room for `ctx` tokens, `n_prompt` of them at once. */
static int model_start(model *m, const args *a, int64_t n_prompt, int64_t ctx, dsv4_err *err) {
    dsv4_opts o = {.dir = a->model, .n_threads = (int)a->threads, .ram_bytes = a->ram,
                   .ctx = a->ctx ? a->ctx : ctx, .chunk = (int)a->chunk,
                   .no_rounding = a->no_rounding};
    o.span_hint = (int)(a->chunk && a->chunk < n_prompt ? a->chunk : n_prompt);
    if (o.chunk > n_prompt) o.chunk = (int)n_prompt;
    if (m->trace) o.trace = on_trace, o.trace_arg = m->trace;
    if (model_path(m->heat, sizeof m->heat, "heat", a->model)) o.heat = m->heat;
    m->status.on = !a->quiet;
    m->status.bar = on_terminal();
    if (n_prompt > o.ctx)
        return fail(err, "the text has %lld tokens and --ctx %lld is a smaller context; raise it",
                    (long long)n_prompt, (long long)o.ctx);
    if (a->stats && out_open(&m->stats, a->stats, err)) return -1;
    if (engine_open(&m->e, &m->cfg, m->ck, &o, err)) return -1;
    if (!a->quiet) print_plan(m->e);
    m->note = engine_note(m->e);
    m->status.e = m->e;
    status_begin(&m->status, "loading", 0);
    int rc = engine_load(m->e, on_progress, &m->status, err);
    status_clear(&m->status);
    return rc ? rc : session_open(&m->s, m->e, on_progress, &m->status, err);
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
    if (rc == 0 && !a->quiet && engine_note(m->e) && engine_note(m->e) != m->note)
        fprintf(stderr, "note: %s\n", engine_note(m->e));     /* it came up during the work */
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

/* The ids of a conversation.  On 0 the caller frees out->id. */
static int encode_messages(const model *m, json_t *messages, bool think, const char *effort,
                           id_list *out, dsv4_err *err) {
    prompt p;
    json_t *request = json_pack("{s:O, s:b, s:s?}", "messages", messages, "thinking", think,
                                "reasoning_effort", effort);
    if (!request) return fail(err, "out of memory for the prompt");
    int rc = prompt_build(&p, request, m->gen, err);
    json_decref(request);
    if (rc) return rc;
    rc = prompt_encode(m->tok, &p, &out->id, &out->n, err);
    prompt_free(&p);
    return rc;
}

/* A system prompt, if any, and one turn. */
static int encode_turn(const model *m, const args *a, const char *s, size_t len, id_list *out,
                       dsv4_err *err) {
    json_t *messages = json_array();
    int rc = a->system ? json_array_append_new(messages, prompt_message("system", a->system,
                                                                        strlen(a->system))) : 0;
    if (rc == 0) rc = json_array_append_new(messages, prompt_message("user", s, len));
    rc = rc ? fail(err, "out of memory for the prompt")
            : encode_messages(m, messages, !a->no_think, a->effort, out, err);
    json_decref(messages);
    return rc;
}

/* The prompt's ids, from whichever source the flags name.  On 0 the caller frees out->id. */
static int prompt_ids(const model *m, const args *a, bool raw, id_list *out, dsv4_err *err) {
    if (a->ids) return read_ids(out, a->ids, err);
    text t = {0};
    const char *bytes = a->prompt;
    if (!bytes && read_text(&t, a->file, err)) return -1;
    size_t len = bytes ? strlen(bytes) : t.len;
    if (!bytes) bytes = t.bytes;
    int rc = raw ? encode_raw(m, bytes, len, out, err) : encode_turn(m, a, bytes, len, out, err);
    free(t.bytes);
    return rc;
}

/* Put ids through the model, a span at a time. */
static int feed(model *m, const int32_t *ids, int64_t n, dsv4_err *err) {
    int64_t span = engine_plan(m->e)->span;
    int rc = 0;
    status_begin(&m->status, "reading", n);
    for (int64_t i = 0; i < n && rc == 0; i += span) {
        m->status.n_now = n - i < span ? n - i : span;
        m->status.n_done = i;
        m->last = (int)m->status.n_now - 1;
        rc = session_forward(m->s, ids + i, (int)m->status.n_now, err);
    }
    status_clear(&m->status);
    return rc;
}

/* === 5. The answer ============================================================================ */

typedef enum { END_EOS, END_LENGTH, END_STOP, END_LOOP, END_INTERRUPTED } ending;

typedef struct {                   /* from tokens to what a person sees                         */
    const model *m;
    const args *a;
    answer *parser;                /* NULL: the text as it comes                                */
    utf8_stream thought, content;
    stop_filter stop;
    bool show_thoughts, dim, thinking; /* `thinking`: thoughts were the last thing printed      */
    text *kept;                    /* the content, for the next turn; NULL: not needed          */
    int64_t n_content;             /* bytes                                                     */
    int failed;
    dsv4_err *err;
} speaker;

static void speak_thought(speaker *sp, const char *bytes, size_t n) {
    if (n && sp->show_thoughts) {
        if (!sp->thinking && sp->dim) fputs("\033[2m", stderr);
        fwrite(bytes, 1, n, stderr);
        sp->thinking = true;
    }
}

static void speak_content(speaker *sp, const char *bytes, size_t n, bool last) {
    char out[1024 + MAX_STOP_BYTES];
    size_t got = n || last ? stop_push(&sp->stop, bytes, n, out) : 0;
    if (got && sp->thinking) fputs(sp->dim ? "\033[0m\n\n" : "\n\n", stderr);
    if (got) sp->thinking = false;
    fwrite(out, 1, got, stdout);
    sp->n_content += (int64_t)got;
    if (sp->kept && !sp->failed) sp->failed = text_add(sp->kept, out, got, sp->err);
}

/* Bytes of either kind, whole characters at a time. */
static void speak_bytes(speaker *sp, bool thought, const char *bytes, size_t n) {
    char out[1024];
    for (size_t i = 0, part; i < n; i += part) {
        part = n - i < 256 ? n - i : 256;
        size_t got = utf8_push(thought ? &sp->thought : &sp->content, bytes + i, part, out);
        if (thought) speak_thought(sp, out, got);
        else speak_content(sp, out, got, false);
    }
}

static void on_piece(void *arg, const answer_piece *p) {
    if (p->kind == ANSWER_CALL) speak_bytes(arg, false, p->raw, p->raw_len);
    else speak_bytes(arg, p->kind == ANSWER_REASONING, p->text, p->len);
}

static int speak_token(speaker *sp, int32_t id, bool first) {
    if (sp->a->print_ids) {
        printf("%s%d", first ? "" : " ", id);
    } else {
        size_t len;
        const char *bytes = tok_bytes(sp->m->tok, id, &len);
        if (!sp->parser) speak_bytes(sp, false, bytes, len);
        else if (answer_push(sp->parser, bytes, len, sp->err)) sp->failed = -1;
    }
    return sp->failed ? sp->failed : check_stdout(sp->err);
}

/* No more tokens come: what was held back goes out. */
static int speak_end(speaker *sp) {
    char out[16];
    if (sp->parser && answer_end(sp->parser, sp->err)) sp->failed = -1;
    speak_thought(sp, out, utf8_push(&sp->thought, "", 0, out));
    speak_content(sp, out, utf8_push(&sp->content, "", 0, out), false);
    speak_content(sp, "", 0, true);
    if (sp->thinking) fputs(sp->dim ? "\033[0m\n" : "\n", stderr);
    putchar('\n');
    return sp->failed ? sp->failed : check_stdout(sp->err);
}

/* Sample up to n tokens behind what the session holds.  `fed` (may be NULL) collects those that
 * went into it. */
static int generate(model *m, speaker *sp, sampler *draw, int64_t n, id_list *fed, ending *end) {
    loop_guard guard = {0};
    bool shown = m->status.on;
    int rc = 0;
    *end = END_LENGTH;
    m->status.on = false;          /* the answer itself shows how far it is */
    for (int64_t i = 0; i < n && rc == 0; i++) {
        rc = session_logits(m->s, m->last, 1, m->logits, sp->err);
        if (rc) break;
        int32_t id = sampler_next(draw, m->logits);
        if (id == m->cfg.eos_token_id) {
            *end = END_EOS;
            break;
        }
        rc = speak_token(sp, id, i == 0);
        if (!sp->a->no_loop_guard && loop_push(&guard, id)) *end = END_LOOP;
        if (sp->stop.hit) *end = END_STOP;
        if (m->status.patient && interrupted) *end = END_INTERRUPTED;
        if (rc || *end != END_LENGTH || i + 1 == n) break;
        m->last = 0;
        rc = session_forward(m->s, &id, 1, sp->err);
        if (rc == 0 && fed) fed->id[fed->n++] = id;
    }
    m->status.on = shown;
    return rc;
}

/* What a person should know about how it ended. */
static void print_ending(const speaker *sp, ending end, int64_t n) {
    if (end == END_LOOP)
        fprintf(stderr, "note: stopped, the answer goes round in circles (--no-loop-guard lets "
                "it)\n");
    if (sp->a->quiet || end != END_LENGTH || sp->a->print_ids || sp->a->raw) return;
    fprintf(stderr, "note: cut at %lld tokens%s; -n and --ctx set how many\n", (long long)n,
            sp->n_content ? "" : ", before the answer began");
}

/* Flags over generation_config.json over plain sampling. */
static int sampling_of(const args *a, sample_opts *o, dsv4_err *err) {
    if (config_sampling(o, a->model, err)) return -1;
    if (a->temp >= 0) o->temperature = (float)a->temp;
    if (a->top_p >= 0) o->top_p = (float)a->top_p;
    if (a->min_p >= 0) o->min_p = (float)a->min_p;
    if (a->penalty >= 0) o->repetition_penalty = (float)a->penalty;
    if (a->top_k >= 0) o->top_k = a->top_k > INT32_MAX ? INT32_MAX : (int)a->top_k;
    o->seed = a->seed;
    return 0;
}

/* One answer to what the session holds; ids [n_ids] is all of the context. */
static int answer_turn(model *m, const args *a, bool think, const id_list *ids, int64_t n,
                       text *content, id_list *fed, ending *end, dsv4_err *err) {
    sample_opts o;
    sampler *draw = NULL;
    speaker sp = {.m = m, .a = a, .err = err, .kept = content,
                  .stop = {.words = a->stop.word, .n_words = a->stop.n}};
    sp.show_thoughts = !a->quiet && isatty(STDERR_FILENO);
    sp.dim = on_terminal() && !getenv("NO_COLOR");
    int rc = sampling_of(a, &o, err);
    if (rc == 0) rc = sampler_open(&draw, &o, m->cfg.vocab_size, err);
    if (rc == 0 && !a->raw && !a->ids) rc = answer_open(&sp.parser, think, on_piece, &sp, err);
    for (size_t i = 0; i < ids->n && rc == 0; i++) sampler_accept(draw, ids->id[i]);
    if (rc == 0) rc = generate(m, &sp, draw, n, fed, end);
    if (rc == 0) rc = speak_end(&sp);
    else if (sp.thinking && sp.dim) fputs("\033[0m\n", stderr);
    if (rc == 0) print_ending(&sp, *end, n);
    answer_close(sp.parser);
    sampler_close(draw);
    return rc;
}

/* === 6. run =================================================================================== */

static int cmd_run(const args *a, dsv4_err *err) {
    model m;
    id_list ids = {0};
    ending end;
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
    if (rc == 0) rc = feed(&m, ids.id, (int64_t)ids.n, err);
    if (rc == 0) rc = answer_turn(&m, a, !a->no_think, &ids, n, NULL, NULL, &end, err);
    free(ids.id);
    return model_finish(&m, a, rc, err);
}

/* === 7. chat ================================================================================== */

typedef struct {
    model m;
    const args *a;
    json_t *messages;              /* all of the conversation                                   */
    bool think;
    const char *effort;            /* NULL: the model's own                                     */
    id_list fed;                   /* what the session has seen; room for the whole context     */
    int64_t ctx;
    text attached;                 /* files for the next message                                */
    EditLine *el;                  /* NULL: stdin is no terminal                                */
    History *history;
    char *piped;                   /* getline's                                                 */
    size_t piped_cap;
    text *pastes;                  /* of several lines; the line edited holds their names       */
    int n_pastes;
} chat;

enum { C_THINK, C_NOTHINK, C_EFFORT, C_FILE, C_SYSTEM, C_CLEAR, C_STATS, C_HELP, C_QUIT };
static const struct { const char *name, *usage, *help; } chat_commands[] = {
    [C_THINK] = {"/think", "", "think before answering"},
    [C_NOTHINK] = {"/nothink", "", "answer at once"},
    [C_EFFORT] = {"/effort", "low|high|max", "how hard to think"},
    [C_FILE] = {"/file", "PATH", "send a text file along with the next message"},
    [C_SYSTEM] = {"/system", "TEXT", "set the system prompt"},
    [C_CLEAR] = {"/clear", "", "begin a new conversation"},
    [C_STATS] = {"/stats", "", "where the bytes came from, and how fast"},
    [C_HELP] = {"/help", "", "this list"},
    [C_QUIT] = {"/quit", "", "leave, as Ctrl-D does; Ctrl-C stops an answer"},
};
enum { N_CHAT_COMMANDS = sizeof chat_commands / sizeof *chat_commands };

/* --- reading a line --- */

/* One character for libedit.  A resized terminal is redrawn; Ctrl-C ends the line. */
static int on_getc(EditLine *el, wchar_t *out) {
    mbstate_t state = {0};
    for (;;) {
        struct pollfd in = {STDIN_FILENO, POLLIN, 0};
        char byte;
        if (resized) {
            resized = 0;
            el_resize(el);
        }
        if (interrupted) return -1;
        if (poll(&in, 1, 500) <= 0) continue;
        ssize_t got = read(STDIN_FILENO, &byte, 1);
        if (got == 0) return 0;
        if (got < 0 && errno != EINTR) return -1;
        size_t n = got < 0 ? (size_t)-2 : mbrtowc(out, &byte, 1, &state);
        if (n == (size_t)-2) continue;
        if (n == (size_t)-1) *out = 0xfffd;
        return 1;
    }
}

/* The terminal says that a paste begins: take it whole.  Several lines stand in the line as
 * "[paste 1: 20 lines]" until it is sent. */
static unsigned char on_paste(EditLine *el, int key) {
    static const char end[] = "\033[201~";
    chat *c;
    text t = {0};
    wchar_t wide;
    dsv4_err err;
    int lines = 1;
    (void)key;
    el_get(el, EL_CLIENTDATA, &c);
    while (el_wgetc(el, &wide) == 1) {
        char bytes[MB_LEN_MAX];
        int n = wctomb(bytes, wide == '\r' ? '\n' : wide);
        lines += wide == '\r' || wide == '\n';
        if (n > 0 && text_add(&t, bytes, (size_t)n, &err)) break;
        if (t.len >= sizeof end - 1 && !memcmp(t.bytes + t.len - sizeof end + 1, end,
                                               sizeof end - 1)) {
            t.len -= sizeof end - 1;
            break;
        }
    }
    text *grown = lines > 1 ? realloc(c->pastes, (size_t)(c->n_pastes + 1) * sizeof *grown) : NULL;
    if (grown) {
        char name[64];
        c->pastes = grown;
        c->pastes[c->n_pastes++] = t;
        snprintf(name, sizeof name, "[paste %d: %d lines]", c->n_pastes, lines);
        el_insertstr(el, name);
    } else if (text_add(&t, "", 1, &err) == 0) {
        el_insertstr(el, t.bytes);
        free(t.bytes);
    }
    return CC_REFRESH;
}

static char *on_prompt(EditLine *el) {
    (void)el;
    static char prompt_text[] = "> ";
    return prompt_text;
}

/* Replace the names of pastes by what they stand for. */
static int add_with_pastes(chat *c, text *out, const char *line, size_t len, dsv4_err *err) {
    for (size_t i = 0; i < len;) {
        int which, lines, used = 0;
        bool named = line[i] == '[' && sscanf(line + i, "[paste %d: %d lines]%n", &which, &lines,
                                              &used) == 2 && used && which >= 1 &&
                     which <= c->n_pastes;
        const text *t = named ? &c->pastes[which - 1] : NULL;
        if (text_add(out, t ? t->bytes : line + i, t ? t->len : 1, err)) return -1;
        i += named ? (size_t)used : 1;
    }
    return 0;
}

/* The next line without its end: 1, 0 at the end of input, -1 after an error; Ctrl-C gives an
 * empty line. */
static int chat_line(chat *c, text *out, dsv4_err *err) {
    out->len = 0;
    if (!c->el) {
        ssize_t n = getline(&c->piped, &c->piped_cap, stdin);
        if (n > 0 && c->piped[n - 1] == '\n') n--;
        return n < 0 ? 0 : text_add(out, c->piped, (size_t)n, err) ? -1 : 1;
    }
    int got;
    HistEvent ev;
    interrupted = 0;
    fputs("\033[?2004h", stderr);                      /* say where pastes begin and end */
    const char *typed = el_gets(c->el, &got);
    fputs("\033[?2004l", stderr);
    if (terminated) return 0;
    if (!typed || got <= 0) {
        fputc('\n', stderr);
        if (!interrupted) return 0;
        interrupted = 0;
        return 1;
    }
    if (got > 1) history(c->history, &ev, H_ENTER, typed);
    if (typed[got - 1] == '\n') got--;
    return add_with_pastes(c, out, typed, (size_t)got, err) ? -1 : 1;
}

static int editor_open(chat *c, dsv4_err *err) {
    HistEvent ev;
    char path[4096];
    c->el = el_init("dsv4", stdin, stderr, stderr);
    c->history = history_init();
    if (!c->el || !c->history) return fail(err, "the line editor does not start on this terminal");
    history(c->history, &ev, H_SETSIZE, HISTORY_LINES);
    history(c->history, &ev, H_SETUNIQUE, 1);
    if (user_path(path, sizeof path, "XDG_STATE_HOME", ".local/state", "chat_history"))
        history(c->history, &ev, H_LOAD, path);
    el_set(c->el, EL_CLIENTDATA, c);
    el_set(c->el, EL_PROMPT, on_prompt);
    el_set(c->el, EL_EDITOR, "emacs");
    el_set(c->el, EL_HIST, history, c->history);
    el_set(c->el, EL_GETCFN, on_getc);
    el_set(c->el, EL_ADDFN, "dsv4-paste", "take a paste whole", on_paste);
    el_source(c->el, NULL);
    el_set(c->el, EL_BIND, "\033[200~", "dsv4-paste", NULL);
    return 0;
}

static void editor_close(chat *c) {
    HistEvent ev;
    char path[4096];
    if (c->history &&
        user_path(path, sizeof path, "XDG_STATE_HOME", ".local/state", "chat_history"))
        history(c->history, &ev, H_SAVE, path);
    if (c->history) history_end(c->history);
    if (c->el) el_end(c->el);
}

/* --- commands --- */

static int attach_file(chat *c, const char *path, dsv4_err *err) {
    char full[4096];
    text t;
    id_list ids;
    const char *home = getenv("HOME"), *name = strrchr(path, '/');
    if (!*path) return fail(err, "/file needs a path");
    snprintf(full, sizeof full, "%s%s", !strncmp(path, "~/", 2) && home ? home : "",
             !strncmp(path, "~/", 2) && home ? path + 1 : path);
    if (read_text(&t, full, err)) return -1;
    char head[4200];
    int n = snprintf(head, sizeof head, "[file name]: %s\n[file content begin]\n",
                     name ? name + 1 : path);
    int rc = tok_encode(c->m.tok, t.bytes, t.len, false, &ids.id, &ids.n, err);
    if (rc == 0 && (text_add(&c->attached, head, (size_t)n, err) ||
                    text_add(&c->attached, t.bytes, t.len, err) ||
                    text_add(&c->attached, "\n[file content end]\n", 20, err)))
        rc = -1;
    if (rc == 0) {
        fprintf(stderr, "%s: %zu tokens, goes with your next message\n", full, ids.n);
        free(ids.id);
    }
    free(t.bytes);
    return rc;
}

static bool has_system(const chat *c) {
    json_t *first = json_array_get(c->messages, 0);
    const char *role = json_string_value(json_object_get(first, "role"));
    return role && !strcmp(role, "system");
}

static int set_system(chat *c, const char *words, dsv4_err *err) {
    json_t *now = prompt_message("system", words, strlen(words));
    if (has_system(c)) json_array_remove(c->messages, 0);
    return json_array_insert_new(c->messages, 0, now) ? fail(err, "out of memory") : 0;
}

static int set_effort(chat *c, const char *level, dsv4_err *err) {
    static const char *const levels[] = {"low", "high", "max"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(level, levels[i])) continue;
        c->effort = levels[i];
        c->think = true;
        return 0;
    }
    return fail(err, "/effort %s is not low, high or max", level);
}

/* Run one /command; 1 to leave. */
static int chat_command(chat *c, char *line, dsv4_err *err) {
    char *words = line + strcspn(line, " ");
    size_t keep = has_system(c);
    int which = 0;
    if (*words) *words++ = 0;
    words += strspn(words, " ");
    for (size_t n = strlen(words); n && words[n - 1] == ' '; n--) words[n - 1] = 0;
    while (which < N_CHAT_COMMANDS && strcmp(line, chat_commands[which].name)) which++;
    switch (which) {
    case C_THINK:
    case C_NOTHINK: c->think = which == C_THINK; return 0;
    case C_EFFORT: return set_effort(c, words, err);
    case C_FILE: return attach_file(c, words, err);
    case C_SYSTEM: return set_system(c, words, err);
    case C_CLEAR:
        while (json_array_size(c->messages) > keep)
            json_array_remove(c->messages, json_array_size(c->messages) - 1);
        return 0;
    case C_STATS:
        print_tiers(c->m.e);
        fprintf(stderr, "context: %lld of %lld tokens\n", (long long)session_pos(c->m.s),
                (long long)c->ctx);
        return 0;
    case C_HELP:
        for (int i = 0; i < N_CHAT_COMMANDS; i++)
            fprintf(stderr, "  %-8s %-14s %s\n", chat_commands[i].name, chat_commands[i].usage,
                    chat_commands[i].help);
        return 0;
    case C_QUIT: return 1;
    }
    const char *best = NULL;
    int distance = 0;
    for (int i = 0; i < N_CHAT_COMMANDS; i++)
        nearer(line, chat_commands[i].name, &best, &distance);
    return fail(err, "no command %s%s%s; /help lists them", line, best ? ", perhaps " : "",
                best ? best : "");
}

/* --- a turn --- */

/* Which share of all experts n tokens read at once need, where each takes its own evenly. */
static double share_touched(const dsv4_config *c, int64_t n) {
    return 1 - pow(1 - (double)c->num_experts_per_tok / c->n_routed_experts, (double)n);
}

/* Say what reading n tokens costs, where that is much: most experts are touched by a few dozen
 * tokens, and what is not in a slot comes from the disk. */
static void announce(const chat *c, int64_t n) {
    const dsv4_plan *p = engine_plan(c->m.e);
    const dsv4_stats *s = engine_stats(c->m.e);
    int64_t passes = (n + p->span - 1) / p->span, span = n < p->span ? n : p->span;
    double touched = share_touched(&c->m.cfg, span);
    double cold = 1 - (double)p->n_slots / p->n_experts_total;
    if (engine_expert_stats(c->m.e)->misses == 0) cold = 1;
    double bytes = (double)passes * touched * cold * p->n_experts_total * (double)p->slot_bytes;
    double per_s = rate((double)s->dense_bytes, s->load_s);
    if (c->a->quiet || rate(bytes, per_s) < MUCH_SECONDS) return;
    fprintf(stderr, "note: %lld tokens touch about %.0f%% of the experts: %.1f GB from disk, about "
            "%.0f s at the %.2f GB/s of loading\n", (long long)n, 100 * touched, bytes / 1e9,
            bytes / per_s, per_s / 1e9);
}

/* Read what is new of `ids`; where the session holds something else, all of it. */
static int chat_feed(chat *c, const id_list *ids, dsv4_err *err) {
    size_t same = 0;
    while (same < c->fed.n && same < ids->n && c->fed.id[same] == ids->id[same]) same++;
    if (same < c->fed.n || same == ids->n) {
        session_reset(c->m.s);
        same = 0;
    }
    c->fed.n = 0;
    announce(c, (int64_t)(ids->n - same));
    if (feed(&c->m, ids->id + same, (int64_t)(ids->n - same), err)) {
        session_reset(c->m.s);
        return -1;
    }
    memcpy(c->fed.id, ids->id, ids->n * sizeof *ids->id);
    c->fed.n = ids->n;
    return 0;
}

static int chat_answer(chat *c, dsv4_err *err) {
    id_list ids = {0};
    text content = {0};
    ending end = END_EOS;
    if (encode_messages(&c->m, c->messages, c->think, c->effort, &ids, err)) return -1;
    int64_t room = c->ctx - (int64_t)ids.n, n = c->a->n_answer < room ? c->a->n_answer : room;
    int rc = room > 0 ? 0
                      : fail(err, "the conversation has %zu tokens and the context holds %lld with "
                             "the answer; /clear, or start with a larger --ctx", ids.n,
                             (long long)c->ctx);
    c->m.status.patient = false;
    if (rc == 0) rc = chat_feed(c, &ids, err);
    c->m.status.patient = true;
    if (rc == 0)
        rc = answer_turn(&c->m, c->a, c->think, &ids, n, &content, &c->fed, &end, err);
    if (rc) c->fed.n = 0;
    if (rc) session_reset(c->m.s);
    if (rc == 0 && json_array_append_new(c->messages, prompt_message("assistant", content.bytes
                                                                     ? content.bytes : "",
                                                                     content.len)))
        rc = fail(err, "out of memory for the conversation");
    if (end == END_INTERRUPTED) fprintf(stderr, "note: stopped\n");
    free(content.bytes);
    free(ids.id);
    return rc;
}

/* One message and its answer; what fails is taken back. */
static int chat_turn(chat *c, const text *line, dsv4_err *err) {
    if (text_add(&c->attached, line->bytes, line->len, err)) return -1;
    json_t *message = prompt_message("user", c->attached.bytes, c->attached.len);
    size_t before = json_array_size(c->messages);
    if (json_array_append_new(c->messages, message)) return fail(err, "out of memory");
    size_t files = c->attached.len - line->len;
    interrupted = 0;
    int rc = chat_answer(c, err);
    while (rc && json_array_size(c->messages) > before)
        json_array_remove(c->messages, json_array_size(c->messages) - 1);
    c->attached.len = rc ? files : 0;
    interrupted = 0;
    return rc;
}

static int chat_loop(chat *c, dsv4_err *err) {
    text line = {0};
    int got = 0, failed = 0;
    while (!terminated && (got = chat_line(c, &line, err)) > 0) {
        int rc = 0;
        if (line.len == 0) continue;
        if (text_add(&line, "", 1, err)) break;        /* the end that commands look for */
        line.len--;
        if (line.bytes[0] == '/') rc = chat_command(c, line.bytes, err);
        else rc = chat_turn(c, &line, err);
        if (rc > 0) break;
        if (rc == 0) continue;
        fprintf(stderr, "dsv4: %s\n", err->msg);
        failed = 1;
    }
    free(line.bytes);
    if (terminated) return fail(err, "terminated");
    if (got < 0) return -1;
    return failed && !c->el ? fail(err, "not every line was answered") : 0;
}

static int cmd_chat(const args *a, dsv4_err *err) {
    chat c = {.a = a, .think = !a->no_think, .effort = a->effort, .messages = json_array()};
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGINT, &sa, NULL);              /* again and again, not only once */
    sigaction(SIGWINCH, &sa, NULL);
    int rc = model_open_files(&c.m, a->model, true, err);
    c.ctx = a->ctx ? a->ctx : CHAT_CTX < c.m.cfg.max_position_embeddings
                                  ? CHAT_CTX : c.m.cfg.max_position_embeddings;
    if (rc == 0) c.fed.id = malloc((size_t)c.ctx * sizeof *c.fed.id);
    if (rc == 0 && !c.fed.id) rc = fail(err, "out of memory for %lld ids", (long long)c.ctx);
    if (rc == 0 && a->system) rc = set_system(&c, a->system, err);
    if (rc) {
        model_close(&c.m);
        return rc;
    }
    rc = model_start(&c.m, a, c.ctx, c.ctx, err);
    if (rc == 0 && isatty(STDIN_FILENO)) rc = editor_open(&c, err);
    if (rc == 0 && c.el)
        fprintf(stderr, "%s. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.\n",
                c.m.cfg.name);
    if (rc == 0) rc = chat_loop(&c, err);
    editor_close(&c);
    for (int i = 0; i < c.n_pastes; i++) free(c.pastes[i].bytes);
    free(c.pastes);
    free(c.attached.bytes);
    free(c.piped);
    free(c.fed.id);
    json_decref(c.messages);
    return model_finish(&c.m, a, rc, err);
}

/* === 8. eval ================================================================================== */

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
static int score_rows(model *m, scores *sc, int n, dsv4_err *err) {
    int vocab = m->cfg.vocab_size;
    for (int i = 0; i < n; i += EVAL_ROWS) {
        int rows = n - i < EVAL_ROWS ? n - i : EVAL_ROWS;
        if (session_logits(m->s, i, rows, m->logits, err)) return -1;
        if (sc->out) fwrite(m->logits, sizeof(float), (size_t)rows * (size_t)vocab, sc->out);
        for (int r = 0; r < rows; r++, sc->at++)
            if (sc->at + 1 < (int64_t)sc->ids->n)
                sc->nll += token_nll(m->logits + (size_t)r * (size_t)vocab, vocab,
                                     sc->ids->id[sc->at + 1]);
    }
    return 0;
}

static int eval_all(model *m, const args *a, scores *sc, dsv4_err *err) {
    int64_t n = (int64_t)sc->ids->n, span = engine_plan(m->e)->span;
    int64_t decode_from = a->decode_from < 0 || a->decode_from > n ? n : a->decode_from;
    for (int64_t i = 0, step; i < n; i += step) {
        step = i >= decode_from ? 1 : decode_from - i < span ? decode_from - i : span;
        m->status.n_now = step;
        m->status.n_done = i;
        if (session_forward(m->s, sc->ids->id + i, (int)step, err)) return -1;
        if (score_rows(m, sc, (int)step, err)) return -1;
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
    if (rc == 0) status_begin(&m.status, "scoring", (int64_t)ids.n);
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

/* === 9. prompt, tokenize ====================================================================== */

static int print_ids(const id_list *ids, dsv4_err *err) {
    for (size_t i = 0; i < ids->n; i++) printf("%s%d", i ? " " : "", ids->id[i]);
    putchar('\n');
    return check_stdout(err);
}

static int cmd_prompt(const args *a, dsv4_err *err) {
    text t;
    json_error_t where;
    prompt p = {0};
    tok *tk = NULL;
    id_list ids = {0};
    generation gen = a->gen && !strcmp(a->gen, "0731") ? GEN_0731 : GEN_V4;
    if (a->model && !a->gen && config_generation(&gen, a->model, err)) return -1;
    if (read_text(&t, "-", err)) return -1;
    json_t *request = json_loadb(t.bytes, t.len, 0, &where);
    free(t.bytes);
    if (!request)
        return fail(err, "stdin is not JSON: line %d, column %d: %s", where.line, where.column,
                    where.text);
    int rc = prompt_build(&p, request, gen, err);
    json_decref(request);
    if (rc == 0 && a->as_ids) {
        rc = tok_open(&tk, a->model, err);
        if (rc == 0) rc = prompt_encode(tk, &p, &ids.id, &ids.n, err);
        if (rc == 0) rc = print_ids(&ids, err);
    } else if (rc == 0) {
        fwrite(p.text, 1, p.len, stdout);
        rc = check_stdout(err);
    }
    free(ids.id);
    tok_close(tk);
    prompt_free(&p);
    return rc;
}

static int cmd_tokenize(const args *a, dsv4_err *err) {
    const char *file = a->file ? a->file : "-";
    text t = {0};
    id_list ids = {0};
    tok *tk;
    if (tok_open(&tk, a->model, err)) return -1;
    int rc = a->decode ? read_ids(&ids, file, err) : read_text(&t, file, err);
    if (rc == 0 && !a->decode) rc = tok_encode(tk, t.bytes, t.len, true, &ids.id, &ids.n, err);
    if (rc == 0 && !a->decode) rc = print_ids(&ids, err);
    for (size_t i = 0; i < ids.n && rc == 0 && a->decode; i++) {
        size_t len;
        const char *bytes = tok_bytes(tk, ids.id[i], &len);
        if (ids.id[i] >= tok_n_ids(tk))
            rc = fail(err, "token id %d at position %zu is outside of the vocabulary of %d",
                      ids.id[i], i, tok_n_ids(tk));
        else
            fwrite(bytes, 1, len, stdout);
    }
    free(t.bytes);
    free(ids.id);
    tok_close(tk);
    return rc ? rc : check_stdout(err);
}

/* === 10. plan, check ========================================================================== */

static void on_survey_line(void *first, const char *line) {
    fprintf(stderr, "%s\n", line);
    if (!*(char *)first) snprintf(first, MAX_NAME, "%s", line);
}

/* Open the shards; where that fails because a download is not done, say of every shard how far
 * it is. */
static int open_whole(ckpt **out, const char *dir, dsv4_err *err) {
    dsv4_err survey;
    char first[MAX_NAME] = "";
    if (ckpt_open(out, dir, err) == 0) return 0;
    int n = ckpt_survey(dir, on_survey_line, first, &survey);
    return n > 0 ? fail(err, "%s: %d shard%s missing or cut short, the first %s; resume the "
                        "download", dir, n, n > 1 ? "s are" : " is", first) : -1;
}

typedef struct {                   /* what bounds a phase: seconds of each resource             */
    double memory, compute, disk, tokens;
} bound;

static double bound_s(const bound *b) {
    double most = b->memory > b->compute ? b->memory : b->compute;
    return b->disk > most ? b->disk : most;
}

static const char *bound_name(const bound *b) {
    double s = bound_s(b);
    return s <= b->disk ? "the disk" : s <= b->compute ? "the processor" : "memory";
}

/* Experts chosen evenly: what a cache of n_slots does then, real text does better. */
static bound decode_bound(const dsv4_plan *p, const engine_rates *r) {
    double miss = 1 - (double)p->n_slots / p->n_experts_total;
    return (bound){
        .memory = (double)(p->token_dense + p->token_experts) / r->exec.read_bytes_s,
        .compute = (double)p->token_macs / r->exec.macs_s,
        .disk = (miss * (double)p->token_experts + (p->streamed ? (double)p->token_dense : 0)) /
                r->disk_bytes_s, .tokens = 1};
}

/* Every expert is read once a span. */
static bound prefill_bound(const dsv4_plan *p, const engine_rates *r, int64_t n) {
    double spans = ceil((double)n / p->span);
    double experts = spans * p->n_experts_total * (double)p->slot_bytes;
    double dense = p->streamed ? spans * (double)p->token_dense : 0;
    return (bound){.memory = (experts + spans * (double)p->token_dense) / r->exec.read_bytes_s,
                   .compute = (double)n * (double)p->token_macs / r->exec.macs_s,
                   .disk = (experts + dense) / r->disk_bytes_s, .tokens = (double)n};
}

static void print_bound(const char *name, const bound *b) {
    printf("%-10s %8.2f tokens/s  %s binds (%.3g s of memory, %.3g s of processor, %.3g s of "
           "disk for %.0f token%s)\n", name, b->tokens / bound_s(b), bound_name(b), b->memory,
           b->compute, b->disk, b->tokens, b->tokens > 1 ? "s" : "");
}

static void print_place(const char *what, uint64_t bytes, const char *where, const char *more) {
    printf("%-14s %9s  %s%s%s\n", what, size_of(bytes).text, where, *more ? "   " : "", more);
}

static void print_plan_table(const dsv4_config *c, const dsv4_plan *p, const weights_bytes *b,
                             int64_t ctx, const engine_rates *r) {
    char more[96];
    printf("--ram %s holds\n", size_of(p->budget).text);
    print_place("program", p->base, "RAM", "");
    print_place("dense weights", p->dense, "RAM", p->streamed ? "read layer by layer" : "");
    snprintf(more, sizeof more, "%lld tokens of context, %.0f bytes each", (long long)ctx,
             (double)p->kv / (double)ctx);
    print_place("KV", p->kv, "RAM", more);
    snprintf(more, sizeof more, "for spans of %d tokens", p->span);
    print_place("buffers", p->work, "RAM", more);
    snprintf(more, sizeof more, "%d of %d experts", p->n_slots, p->n_experts_total);
    print_place("expert slots", p->slots, "RAM", more);
    print_place("experts", b->experts, "disk", "");
    printf("\nmeasured now\n%-10s %8.2f GB/s\n%-10s %8.2f GMAC/s (FP8, 64 tokens at once)\n"
           "%-10s %8.2f GB/s\n", "memory", r->exec.read_bytes_s / 1e9, "processor",
           r->exec.macs_s / 1e9, "disk", r->disk_bytes_s / 1e9);
    bound d = decode_bound(p, r), f = prefill_bound(p, r, ctx);
    printf("\npredicted bounds, experts taken as chosen evenly, attention left out\n");
    print_bound("decode", &d);
    print_bound("prefill", &f);
    double touched = share_touched(c, TURN_TOKENS);
    double bytes = touched * p->n_experts_total * (double)p->slot_bytes;
    printf("a chat turn of %d tokens touches %.0f%% of the experts: %.1f GB, %.1f s of disk\n",
           TURN_TOKENS, 100 * touched, bytes / 1e9, bytes / r->disk_bytes_s);
}

static const double ROTATING_GB_S = 0.3;       /* none is faster */

static void print_disk_warnings(const disk_info *d, double bytes_s) {
    const char *name = d->device[0] ? d->device : d->fs;
    double gb = bytes_s / 1e9;
    if (d->rotating && gb < ROTATING_GB_S)     /* virtual disks say so, too */
        fprintf(stderr, "warning: %s is a rotating disk, %.2f GB/s: move the model to an NVMe "
                "drive\n", name, gb);
    else if (d->sata)
        fprintf(stderr, "warning: %s is on SATA, %.2f GB/s: NVMe drives read 5 to 20 times as "
                "fast\n", name, gb);
    if (d->network)
        fprintf(stderr, "warning: %s is a network file system, %.2f GB/s: copy the model to a "
                "local drive\n", d->fs, gb);
    if (d->fuse)
        fprintf(stderr, "warning: %s is a FUSE file system, %.2f GB/s: copy the model to a local "
                "drive\n", d->fs, gb);
    if (d->encrypted)
        fprintf(stderr, "warning: %s is encrypted, %.2f GB/s as measured: an unencrypted volume "
                "may be faster\n", name, gb);
}

static json_t *bound_json(const bound *b) {
    return json_pack("{s:f, s:s, s:f, s:f, s:f, s:f}", "tokens_per_s", b->tokens / bound_s(b),
                     "binds", bound_name(b), "tokens", b->tokens, "memory_s", b->memory,
                     "processor_s", b->compute, "disk_s", b->disk);
}

static int print_json(json_t *root, dsv4_err *err) {
    if (!root) return fail(err, "out of memory for the JSON output");
    json_dumpf(root, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(root);
    return check_stdout(err);
}

static int cmd_plan(const args *a, dsv4_err *err) {
    dsv4_config cfg;
    ckpt *ck = NULL;
    dsv4_weights *w = NULL;
    dsv4_engine *e = NULL;
    engine_rates r;
    disk_info d;
    int rc = config_load(&cfg, a->model, err) || open_whole(&ck, a->model, err) ||
             weights_bind(&w, ck, &cfg, err) ? -1 : 0;
    int64_t ctx = a->ctx ? a->ctx : CHAT_CTX;
    if (!a->ctx && rc == 0 && ctx > cfg.max_position_embeddings) ctx = cfg.max_position_embeddings;
    const dsv4_opts o = {.dir = a->model, .n_threads = (int)a->threads, .ram_bytes = a->ram,
                         .ctx = ctx};
    if (rc == 0) rc = engine_open(&e, &cfg, ck, &o, err);
    if (rc == 0) rc = engine_measure(e, ck, 3, &r, err);
    if (rc == 0) rc = disk_describe(&d, a->model, "/sys", err);
    if (rc == 0) {
        const dsv4_plan *p = engine_plan(e);
        weights_bytes b = weights_count(w);
        bound dec = decode_bound(p, &r), pre = prefill_bound(p, &r, ctx);
        print_disk_warnings(&d, r.disk_bytes_s);
        if (engine_note(e)) fprintf(stderr, "note: %s\n", engine_note(e));
        if (!a->json) print_plan_table(&cfg, p, &b, ctx, &r);
        else rc = print_json(json_pack(
            "{s:s, s:I, s:I, s:I, s:I, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:i, s:i,"
            " s:{s:s, s:s, s:b, s:b, s:b, s:b, s:b}, s:{s:f, s:f, s:f}, s:o, s:o}",
            "model", cfg.name, "ram", (json_int_t)p->budget, "ctx", (json_int_t)ctx, "program",
            (json_int_t)p->base, "kv", (json_int_t)p->kv, "kv_per_token",
            (double)p->kv / (double)ctx, "dense", (json_int_t)p->dense, "buffers",
            (json_int_t)p->work, "slots", (json_int_t)p->slots, "slot_bytes",
            (json_int_t)p->slot_bytes, "experts", (json_int_t)b.experts, "token_bytes",
            (json_int_t)(p->token_dense + p->token_experts), "n_slots", p->n_slots, "n_experts",
            p->n_experts_total, "span", p->span,
            "disk", "fs", d.fs, "device", d.device, "rotating", d.rotating, "sata", d.sata,
            "network", d.network, "fuse", d.fuse, "encrypted", d.encrypted,
            "measured", "memory_bytes_s", r.exec.read_bytes_s, "processor_macs_s", r.exec.macs_s,
            "disk_bytes_s", r.disk_bytes_s, "decode", bound_json(&dec), "prefill",
            bound_json(&pre)), err);
    }
    engine_close(e);
    weights_close(w);
    ckpt_close(ck);
    return rc ? rc : check_stdout(err);
}

typedef struct { uint64_t n[3]; } layer_kinds;         /* window only, CSA, HCA */

static layer_kinds kinds_of(const dsv4_config *c) {
    layer_kinds k = {{0}};
    for (int l = 0; l < c->num_hidden_layers; l++)
        k.n[c->compress_ratios[l] == 0 ? 0 : c->compress_ratios[l] == 4 ? 1 : 2]++;
    return k;
}

static void print_check(const dsv4_config *c, const ckpt *ck, const weights_bytes *b) {
    layer_kinds k = kinds_of(c);
    printf("%-12s %s\n", "model", c->name);
    printf("%-12s %d: %d window, %d CSA, %d HCA; %d route by token id\n", "layers",
           c->num_hidden_layers, (int)k.n[0], (int)k.n[1], (int)k.n[2], c->num_hash_layers);
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

static json_t *check_json(const dsv4_config *c, const ckpt *ck, const weights_bytes *b) {
    layer_kinds k = kinds_of(c);
    return json_pack(
        "{s:s, s:i, s:I, s:I, s:I, s:i, s:i, s:i, s:i, s:I, s:i, s:i, s:b, s:i, s:I, s:I, s:I,"
        " s:I, s:I}", "model", c->name, "layers", c->num_hidden_layers, "window",
        (json_int_t)k.n[0], "csa", (json_int_t)k.n[1], "hca", (json_int_t)k.n[2], "hash_layers",
        c->num_hash_layers, "dim", c->hidden_size, "heads", c->num_attention_heads, "head_dim",
        c->head_dim, "context", (json_int_t)c->max_position_embeddings, "experts_a_layer",
        c->n_routed_experts, "experts_a_token", c->num_experts_per_tok, "mtp", b->has_mtp,
        "shards", ckpt_n_shards(ck), "tensors", (json_int_t)ckpt_n_tensors(ck), "dense_bytes",
        (json_int_t)b->dense, "expert_bytes", (json_int_t)b->experts, "mtp_bytes",
        (json_int_t)b->mtp, "unused_bytes", (json_int_t)b->unused);
}

/* What both callbacks of ckpt_hash get; on_progress takes it for the status it begins with. */
typedef struct { status_line status; json_t *lines; } hash_report;

static void on_hash_line(void *arg, const char *line) {
    hash_report *h = arg;
    status_clear(&h->status);
    if (h->lines) json_array_append_new(h->lines, json_string(line));
    else printf("%s\n", line);
    fflush(stdout);
}

static int check_hash(const args *a, const ckpt *ck, json_t *lines, dsv4_err *err) {
    char record[4096];
    hash_report h = {.status = {.on = !a->quiet, .bar = on_terminal()}, .lines = lines};
    int n_changed = 0;
    if (!model_path(record, sizeof record, "hash", a->operand))
        return fail(err, "nowhere to remember hashes: set HOME or XDG_CACHE_HOME");
    status_begin(&h.status, "hashing", 0);
    int rc = ckpt_hash(ck, record, on_hash_line, on_progress, &h, &n_changed, err);
    status_clear(&h.status);
    if (rc == 0 && n_changed)
        rc = fail(err, "%d shard%s changed since the last time (%s)", n_changed,
                  n_changed > 1 ? "s" : "", record);
    return rc;
}

static int cmd_check(const args *a, dsv4_err *err) {
    dsv4_config cfg;
    ckpt *ck = NULL;
    dsv4_weights *w = NULL;
    json_t *root = NULL, *lines = a->json && a->hash ? json_array() : NULL;
    int rc = config_load(&cfg, a->operand, err) || open_whole(&ck, a->operand, err) ||
             weights_bind(&w, ck, &cfg, err) ? -1 : 0;
    if (rc == 0) {
        weights_bytes b = weights_count(w);
        if (a->json) root = check_json(&cfg, ck, &b);
        else if (!a->quiet) print_check(&cfg, ck, &b);
    }
    if (rc == 0 && a->hash) rc = check_hash(a, ck, lines, err);
    if (root && lines) json_object_set(root, "hashes", lines);
    if (rc == 0 && a->json) rc = print_json(root, err);
    else json_decref(root);
    json_decref(lines);
    weights_close(w);
    ckpt_close(ck);
    return rc ? rc : check_stdout(err);
}

/* === 11. bench ================================================================================ */

static void print_ratio(const char *what, double got, const char *unit, const char *of,
                        double most) {
    printf("%-24s %9.2f %-8s %-24s %9.2f %6.1f%%\n", what, got, unit, of, most,
           100 * rate(got, most));
}

/* Decode n tokens drawn evenly, one by one, and compare with what the machine reaches. */
static int bench_decode(model *m, const args *a, const engine_rates *r, dsv4_err *err) {
    const dsv4_plan *p = engine_plan(m->e);
    const dsv4_stats *s = engine_stats(m->e), before = *s;
    const offload_stats *o = engine_offload_stats(m->e), read = *o;
    double n = (double)a->n_bench;
    uint64_t draw = a->seed;
    for (int64_t i = 0; i < a->n_bench; i++) {
        draw = draw * 6364136223846793005u + 1442695040888963407u;
        int32_t id = (int32_t)((draw >> 33) % (uint64_t)m->cfg.vocab_size);
        if (session_forward(m->s, &id, 1, err) || session_logits(m->s, 0, 1, m->logits, err))
            return -1;
    }
    double op[OPC_N], all = 0, wait = s->expert_wait_s - before.expert_wait_s;
    double idle = s->dense_wait_s - before.dense_wait_s;
    for (int i = 0; i < OPC_N; i++) all += op[i] = s->op_s[i] - before.op_s[i];
    double experts = op[OPC_EXPERTS] - wait, matrices = op[OPC_PROJ] + op[OPC_COMPRESS] +
                     op[OPC_GATE] + op[OPC_SHARED] + op[OPC_HEAD] - idle;
    double memory = r->exec.read_bytes_s / 1e9, disk = r->disk_bytes_s / 1e9;
    double got = (double)(o->read_bytes - read.read_bytes) / 1e9;
    double rest = all - op[OPC_EXPERTS] - idle, reading = rate(got, disk);
    double most = rest + (experts > reading ? experts : reading);
    printf("%-24s %9s %-8s %-24s %9s %7s\n", "what", "measured", "", "bound", "", "ratio");
    print_ratio("experts, computed", n * (double)p->token_experts / 1e9 / experts, "GB/s",
                "memory read, GB/s", memory);
    print_ratio("dense weights, computed", n * (double)p->token_dense / 1e9 / matrices, "GB/s",
                "memory read, GB/s", memory);
    print_ratio("reads, over all of it", rate(got, all), "GB/s", "disk alone, GB/s", disk);
    print_ratio("decode", n / all, "tokens/s", "dense + max(experts, disk)", n / most);
    return check_stdout(err);
}

static int cmd_bench(const args *a, dsv4_err *err) {
    model m;
    engine_rates r;
    out_file trace = {0};
    int32_t prompt_ids[BENCH_PROMPT];
    int64_t ctx = BENCH_PROMPT + a->n_bench;
    int rc = model_open_files(&m, a->model, false, err);
    for (int i = 0; i < BENCH_PROMPT; i++)
        prompt_ids[i] = rc ? 0 : (int32_t)((uint64_t)i * 7919 % (uint64_t)m.cfg.vocab_size);
    if (rc == 0 && a->trace) rc = out_open(&trace, a->trace, err);
    m.trace = trace.f;
    if (rc == 0) rc = model_start(&m, a, BENCH_PROMPT, ctx, err);
    if (rc == 0) rc = engine_measure(m.e, m.ck, 4, &r, err);
    if (rc == 0) rc = feed(&m, prompt_ids, BENCH_PROMPT, err);
    m.status.on = false;
    if (rc == 0) rc = bench_decode(&m, a, &r, err);
    rc = out_close(&trace, rc, err);
    return model_finish(&m, a, rc, err);
}

/* === 12. help ================================================================================= */

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
        printf("  %-23s %s\n", left, flags[i].help);
    }
}

static int cmd_help(const args *a, dsv4_err *err) {
    const command *c = a->operand ? find_command(a->operand) : NULL;
    if (a->operand && !c) return unknown_command(a->operand, err);
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
    setlocale(LC_CTYPE, "");
    if (strcmp(nl_langinfo(CODESET), "UTF-8")) setlocale(LC_CTYPE, "C.UTF-8");
    const char *name = argc > 1 ? argv[1] : "help";
    if (!strcmp(name, "--help") || !strcmp(name, "-h")) name = "help";
    if (!strcmp(name, "--version")) name = "version";
    const command *c = find_command(name);
    args a;
    if (!c || parse_args(&a, c, argc > 2 ? argc - 2 : 0, argv + 2, &err)) {
        if (!c) unknown_command(name, &err);
        fprintf(stderr, "dsv4: %s\n", err.msg);
        return EXIT_USAGE;
    }
    int rc = (c->bit & CMD_BUDGET) && !cpu_fits()
                 ? fail(&err, "this processor lacks AVX2, FMA or F16C, which dsv4 needs on x86-64")
                 : c->run(&a, &err);
    if (rc == 0) return 0;
    fprintf(stderr, "dsv4: %s\n", err.msg);
    return interrupted ? EXIT_INTERRUPTED : 1;
}
