/* quality.c -- how often the MTP block's draft is the token that comes.
 *
 *   quality DIR <PROMPTS      one prompt's ids a line; prints "drafts N accepted M"
 *
 * Each prompt is answered greedily to its end.  Once a token is chosen, the block drafts the one
 * after it; the draft is accepted when the model then chooses the same.                          */
#define _GNU_SOURCE
#include "../dsv4.h"

#include <stdio.h>
#include <stdlib.h>

enum { PROMPT_MAX = 512, ANSWER_MAX = 64 };        /* tokens */

static _Noreturn void die(const char *what) {
    fprintf(stderr, "quality: %s\n", what);
    exit(1);
}

static int32_t likeliest(const float *logits, int n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* The ids of a line; how many. */
static int read_ids(int32_t *ids, const char *line, const dsv4_config *c) {
    int n = 0;
    for (char *end;; line = end) {
        long id = strtol(line, &end, 10);
        if (end == line) return n;
        if (n == PROMPT_MAX || id < 0 || id >= c->vocab_size) die("no prompt, or one too long");
        ids[n++] = (int32_t)id;
    }
}

/* Answer one prompt: drafts, of which *accepted came true. */
static int follow(dsv4_session *s, const dsv4_config *c, const int32_t *ids, int n, float *logits,
                  int *accepted) {
    dsv4_err err;
    int32_t next, after;
    int drafts = 0;
    session_reset(s);
    if (session_forward(s, ids, n, &err) || session_argmax(s, n - 1, logits, &next, &err))
        die(err.msg);
    for (; next != c->eos_token_id && drafts < ANSWER_MAX; next = after, drafts++) {
        if (session_draft(s, next, logits, &err)) die(err.msg);
        int32_t draft = likeliest(logits, c->vocab_size);
        if (session_forward(s, &next, 1, &err) || session_argmax(s, 0, logits, &after, &err))
            die(err.msg);
        *accepted += draft == after;
    }
    return drafts;
}

int main(int argc, char **argv) {
    dsv4_config c;
    ckpt *ck;
    dsv4_engine *e;
    dsv4_session *s;
    dsv4_err err;
    if (argc != 2) die("usage: see the top of tests/quality.c");
    dsv4_opts o = {.dir = argv[1], .backend = BACKEND_CPU, .ctx = PROMPT_MAX + ANSWER_MAX,
                   .mtp = true};
    if (config_load(&c, o.dir, &err) || ckpt_open(&ck, o.dir, &err) ||
        engine_open(&e, &c, ck, &o, &err) || engine_load(e, NULL, NULL, &err) ||
        session_open(&s, e, NULL, NULL, &err)) die(err.msg);
    float *logits = calloc((size_t)c.vocab_size, sizeof *logits);
    if (!logits) die("out of memory");
    char *line = NULL;
    size_t room = 0;
    int drafts = 0, accepted = 0;
    while (getline(&line, &room, stdin) > 0) {
        int32_t ids[PROMPT_MAX];
        int n = read_ids(ids, line, &c);
        if (n) drafts += follow(s, &c, ids, n, logits, &accepted);
    }
    printf("drafts %d accepted %d\n", drafts, accepted);
    free(line);
    free(logits);
    session_close(s);
    engine_close(e);
    ckpt_close(ck);
    return 0;
}
