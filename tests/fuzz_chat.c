/* fuzz_chat.c -- any JSON as a request: an error with a message, or a sound prompt.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_chat.c text.c ...
 *   ./fuzz_chat -max_len=4096 CORPUS tests/seeds/chat
 *
 * A prompt is valid UTF-8 and begins with BOS; its cuts are in order, inside the text and at the
 * ends of characters; outside of the cuts there stands only what we wrote: none of it changes
 * when every text of the request has one more letter.                                           */
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

/* The text that is not in a cut, to be freed; checks the cuts on the way. */
static char *own_text(const prompt *p, size_t *n) {
    char *own = malloc(p->len + 1);
    size_t at = 0;
    *n = 0;
    demand(own && p->n_cuts % 2 == 0, "an odd number of cuts");
    for (size_t k = 0; k <= p->n_cuts; k++) {
        size_t next = k < p->n_cuts ? p->cuts[k] : p->len;
        demand(next <= p->len && (k == 0 || next > at || k == p->n_cuts), "cuts out of order");
        demand(next == p->len || (p->text[next] & 0xc0) != 0x80, "a cut inside a character");
        if (k % 2 == 0) memcpy(own + *n, p->text + at, next - at), *n += next - at;
        at = next;
    }
    return own;
}

/* One letter more behind the texts of content and reasoning. */
static void lengthen(json_t *request) {
    static const char *const keys[] = {"content", "reasoning_content"};
    json_t *m;
    size_t i;
    json_array_foreach(json_object_get(request, "messages"), i, m) {
        for (int k = 0; k < 2; k++) {
            json_t *old = json_object_get(m, keys[k]);
            if (json_is_string(old) && json_string_length(old) > 0)
                json_object_set_new(m, keys[k], json_pack("s++", json_string_value(old), "x", ""));
        }
    }
}

static void use(json_t *request, generation gen) {
    dsv4_err err = {""};
    prompt p, longer;
    if (prompt_build(&p, request, gen, &err)) {
        demand(!p.text && !p.cuts && err.msg[0] && !strpbrk(err.msg, "\r\n"), "no line of error");
        return;
    }
    static const char bos[] = "<｜begin▁of▁sentence｜>";
    json_t *valid = json_stringn(p.text, p.len);
    demand(valid != NULL, "not UTF-8");
    json_decref(valid);
    demand(!strncmp(p.text, bos, strlen(bos)) && !(p.think && p.answered), "not a prompt");
    json_t *changed = json_deep_copy(request);
    lengthen(changed);
    demand(prompt_build(&longer, changed, gen, &err) == 0, "longer texts are refused");
    size_t n, n_longer;
    char *own = own_text(&p, &n), *own_longer = own_text(&longer, &n_longer);
    demand(n == n_longer && !memcmp(own, own_longer, n), "content outside of cuts");
    free(own);
    free(own_longer);
    json_decref(changed);
    prompt_free(&longer);
    prompt_free(&p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_t *request = json_loadb((const char *)data, size, JSON_DECODE_ANY, NULL);
    if (!request) return 0;
    use(request, GEN_V4);
    use(request, GEN_0731);
    json_decref(request);
    return 0;
}
