/* fuzz_tokenizer.c -- any bytes as tokenizer.json: an error or a tokenizer that works.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_tokenizer.c text.c ...
 *   ./fuzz_tokenizer -max_len=4096 CORPUS tests/seeds/tokenizer
 *
 * The input is a file as it is if it starts with '{'.  Else its lines are the parts of one that
 * has the 256 bytes in its vocabulary: settings of the model, more vocab, merges, added_tokens,
 * pre_tokenizer; all that follows is text to encode.
 *
 * What parses must encode every text or say why not, with ids in range and without loss: the bytes
 * of the ids are the (repaired) text again.                                                      */
#include "../dsv4.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void demand(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

/* Cut the next line off the input. */
static int next_line(const char **at, const char *end, const char **line) {
    const char *stop = memchr(*at, '\n', (size_t)(end - *at));
    if (!stop) stop = end;
    int len = (int)(stop - *at);
    *line = *at;
    *at = stop < end ? stop + 1 : end;
    return len;
}

/* A file from parts; *text is set to what follows them. */
static char *build(const char *data, size_t size, size_t *len, const char **text) {
    const char *end = data + size, *part[5], *at = data;
    int n[5];
    char *json = NULL;
    FILE *f = open_memstream(&json, len);
    demand(f != NULL, "no memory");
    for (int i = 0; i < 5; i++) n[i] = next_line(&at, end, &part[i]);
    fprintf(f, "{\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"type\": \"BPE\"%.*s, ", n[0],
            part[0]);
    fprintf(f, "\"merges\": [%.*s], \"vocab\": {", n[2], part[2]);
    for (int b = 0, next = 0x100; b < 256; b++) {
        bool printable = (b > ' ' && b < 0x7f) || (b > 0xa0 && b != 0xad);
        fprintf(f, "%s\"\\u%04x\": %d", b ? ", " : "", (unsigned)(printable ? b : next++), b);
    }
    fprintf(f, "%.*s}}, \"added_tokens\": [%.*s], \"pre_tokenizer\": %.*s}", n[1], part[1], n[3],
            part[3], n[4], part[4]);
    fclose(f);
    *text = at;
    return json;
}

static void round_trip(const tok *t, const char *text, size_t len, bool special) {
    dsv4_err err = {""};
    utf8_stream in = {0};
    id_list ids = {0};
    buffer want = {0};
    size_t n_bytes, at = 0;
    if (tok_encode(t, text, len, special, &ids, &err)) {
        demand(err.msg[0] != 0 && !ids.n, "an error without a message, or with ids");
        free(ids.id);
        return;
    }
    utf8_push(&in, text, len, &want);
    utf8_push(&in, NULL, 0, &want);
    demand(!want.failed, "no memory");
    for (size_t i = 0; i < ids.n; i++) {
        const char *bytes = tok_bytes(t, ids.id[i], &n_bytes);
        demand(ids.id[i] >= 0 && ids.id[i] < tok_n_ids(t), "an id out of range");
        demand(n_bytes > 0 && n_bytes <= want.n - at, "ids of too much or nothing");
        demand(memcmp(want.s + at, bytes, n_bytes) == 0, "another text came back");
        at += n_bytes;
    }
    demand(at == want.n, "text was lost");
    free(want.s);
    free(ids.id);
}

static void use(const tok *t, const char *more, size_t n_more) {
    static const char text[] = "Ab ab's  12345\r\n\t\xe4\xbd\xa0\xe5\xbd <x><xy>\xf0\x9f\x98\x80 "
                               "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\xff";
    dsv4_err err = {""};
    id_list ids = {0};
    prompt p;
    for (int special = 0; special < 2; special++) {
        round_trip(t, text, sizeof text - 1, special);
        round_trip(t, more, n_more, special);
    }
    json_t *request = json_pack("{s:[o]}", "messages", prompt_message("user", more, n_more));
    demand(request && prompt_build(&p, request, GEN_V4, &err) == 0, "no prompt");
    if (prompt_encode(t, &p, &ids, &err)) demand(err.msg[0] != 0, "an error without a message");
    free(ids.id);
    prompt_free(&p);
    json_decref(request);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *in = (const char *)data, *text = in + size;
    bool whole = size > 0 && *in == '{';
    size_t len = size;
    char *built = whole ? NULL : build(in, size, &len, &text);
    dsv4_err err = {""};
    tok *t;
    if (tok_parse(&t, whole ? in : built, len, "fuzz", &err) == 0) {
        use(t, text, (size_t)(in + size - text));
        tok_close(t);
    } else {
        demand(!t && err.msg[0] && !strpbrk(err.msg, "\r\n"), "no tokenizer and no line of error");
    }
    free(built);
    return 0;
}
