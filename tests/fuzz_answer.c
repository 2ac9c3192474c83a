/* fuzz_answer.c -- any bytes as what a model wrote: the same pieces for every split, nothing lost.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_answer.c text.c ...
 *   ./fuzz_answer -max_len=4096 CORPUS tests/seeds/answer
 *
 * Bit 0 of the first byte says whether the text begins inside its reasoning, the others are the
 * split.  In the text, bytes 1 to 9 stand for the tags, so that the fuzzer finds them easily.
 *
 * The pieces in order, with only structure left out between them, are the text again: walk() goes
 * through the text and skips </think>, openings, closings, white space in a block, and EOS, where
 * the grammar has them and nowhere else.                                                        */
#include "../dsv4.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OPEN "<｜DSML｜tool_calls>"
#define CLOSE "</｜DSML｜tool_calls>"
#define EOS "<｜end▁of▁sentence｜>"

static void demand(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

/* What came, as records "kind, text, 0": neighbours of one kind are one record. */
typedef struct { char *s; size_t n; FILE *f; int kind; bool utf8; } pieces;

static void hear(void *arg, const answer_piece *p) {
    pieces *all = arg;
    if (p->kind == ANSWER_CALL || all->kind != (int)p->kind)
        fprintf(all->f, "%s%c", all->kind < 0 ? "" : "\x7f", "rct"[p->kind]);
    all->kind = (int)p->kind;
    if (p->kind != ANSWER_CALL) {
        demand(p->len > 0, "an empty piece");
        fwrite(p->text, 1, p->len, all->f);
        return;
    }
    fwrite(p->raw, 1, p->raw_len, all->f);
    demand(p->name > p->raw && p->name + p->name_len < p->raw + p->raw_len, "a foreign name");
    json_t *object = json_loadb(p->text, p->len, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, NULL);
    bool nul = memchr(p->raw, 0, p->raw_len) != NULL; /* jansson wants none in a key */
    demand(json_is_object(object) || !all->utf8 || nul, "arguments are no JSON object");
    json_decref(object);
}

/* In steps that `split` is the seed of; 0: all at once. */
static pieces take_apart(const char *text, size_t len, bool think, unsigned split, bool utf8) {
    pieces all = {.kind = -1, .utf8 = utf8};
    dsv4_err err;
    answer *a;
    all.f = open_memstream(&all.s, &all.n);
    demand(all.f && answer_open(&a, think, hear, &all, &err) == 0, "no memory");
    for (size_t at = 0, step; at < len; at += step) {
        step = split == 0 ? len : split >> 31 ? 1 : 1 + (split >> 8) % 40;
        if (split) split = (split * 1664525u + 1013904223u) | 1;
        if (step > len - at) step = len - at;
        char *copy = malloc(step);
        demand(copy != NULL, "no memory");
        memcpy(copy, text + at, step);
        demand(answer_push(a, copy, step, &err) == 0, "no memory");
        free(copy);
    }
    demand(answer_end(a, &err) == 0, "no memory");
    answer_close(a);
    fclose(all.f);
    return all;
}

static bool skip(const char **at, const char *end, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(end - *at) < n || memcmp(*at, word, n) != 0) return false;
    *at += n;
    return true;
}

static const char *behind_white(const char *at, const char *end) {
    while (at < end && strchr(" \t\r\n", *at) && *at) at++;
    return at;
}

/* White space and a closing, where there is one. */
static bool skip_close(const char **at, const char *end) {
    const char *close = behind_white(*at, end);
    if (!skip(&close, end, CLOSE)) return false;
    *at = close;
    return true;
}

static void walk(const char *at, size_t len, bool think, const pieces *p) {
    const char *end = at + len, *s = p->s, *stop = p->s + p->n;
    bool in_block = false;
    while (s < stop) {
        char kind = *s++;
        const char *next = memchr(s, 0x7f, (size_t)(stop - s)); /* stands in no text, see below */
        size_t n = (size_t)((next ? next : stop) - s);
        if (kind != 'r' && think) think = !skip(&at, end, "</think>");
        demand((kind == 'r') == think, "reasoning at the wrong place");
        if (in_block) in_block = !skip_close(&at, end);
        if (kind == 't') {
            const char *opening = at;
            skip(&opening, end, "\n\n");
            if (skip(&at, end, OPEN)) in_block = true;
            else if (skip(&opening, end, OPEN)) at = opening, in_block = true;
            demand(in_block, "a call outside of a block");
            at = behind_white(at, end);
        } else {
            in_block = false;
        }
        demand((size_t)(end - at) >= n && !memcmp(at, s, n), "another text");
        at += n;
        s += n + (next != NULL);
    }
    if (think) skip(&at, end, "</think>");
    if (in_block && !skip_close(&at, end)) at = behind_white(at, end);
    skip(&at, end, EOS);
    demand(at == end, "text was lost");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const tags[] = {
        OPEN, CLOSE, "<｜DSML｜invoke name=\"f\">", "</｜DSML｜invoke>",
        "<｜DSML｜parameter name=\"p\" string=\"true\">",
        "<｜DSML｜parameter name=\"q\" string=\"false\">", "</｜DSML｜parameter>", EOS,
        "</think>"};
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    demand(f != NULL, "no memory");
    for (size_t i = 1; i < size; i++) {
        if (data[i] >= 1 && data[i] <= 8) fputs(tags[data[i] - 1], f);
        else if (data[i] == 11) fputs(tags[8], f);
        else fputc(data[i] == 0x7f ? '<' : data[i], f); /* 7f parts the records of pieces */
    }
    fclose(f);
    unsigned split = size ? data[0] : 0;
    bool think = split & 1;
    json_t *valid = json_stringn(text, len);
    pieces whole = take_apart(text, len, think, 0, valid != NULL);
    for (unsigned k = 0; k < 2; k++) {
        pieces other = take_apart(text, len, think, 1 + split + k * 2654435761u, valid != NULL);
        demand(other.n == whole.n && !memcmp(other.s, whole.s, whole.n), "the split shows");
        free(other.s);
    }
    walk(text, len, think, &whole);
    free(whole.s);
    json_decref(valid);
    free(text);
    return 0;
}
