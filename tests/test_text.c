/* test_text.c -- text.c on small tokenizers written here; test_tokenizer.py has the real one.
 *
 * Goal: merges go by rank and from the left, added tokens are found as the library finds them,
 * broken files and broken UTF-8 cannot break anything, and no text or regex takes for ever.
 * Method: tables, and random input against a second, naive implementation of the same rule.     */
#include "../dsv4.h"
#include "check.h"

#include <jansson.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* === Small tokenizers =========================================================================
 * JSON is written with ' for ", here and in the tables.                                          */

#define NO_SPLIT "{'type': 'ByteLevel', 'add_prefix_space': false, 'use_regex': false}"
#define SPLIT(pattern)                                                                           \
    "{'type': 'Sequence', 'pretokenizers': [{'type': 'Split', 'pattern': {'Regex': '" \
    pattern "'}, 'behavior': 'Isolated', 'invert': false}, " NO_SPLIT "]}"
/* Two of V4's patterns, quotes escaped. */
#define NUMBERS "\\\\p{N}{1,3}"
#define WORDS                                                                                    \
    "[!\\u0022#$%&\\u0027()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+" \
    "|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*" \
    "|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

/* Characters that stand for the bytes 0..255, as GPT-2's bytes_to_unicode() lists them. */
static void byte_char(int byte, char out[3]) {
    int c = byte;
    bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    if (!printable) {
        c = 256;
        for (int b = 0; b < byte; b++)
            c += !((b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae);
    }
    memset(out, 0, 3);
    if (c < 0x80) out[0] = (char)c;
    else out[0] = (char)(0xc0 | c >> 6), out[1] = (char)(0x80 | (c & 63));
}

/* ' becomes "; the copy is the caller's to free. */
static char *quoted(const char *s) {
    char *copy = strdup(s);
    for (char *p = copy; p && *p; p++)
        if (*p == '\'') *p = '"';
    return copy;
}

/* A tokenizer.json to be freed: byte b has id b; `vocab` (", 'ab': 256") is appended. */
static char *make_json(const char *vocab, const char *merges, const char *added, const char *pre,
                       const char *more_model) {
    char *text = NULL, c[3];
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    fprintf(f, "{'normalizer': null, 'decoder': {'type': 'ByteLevel'}, "
               "'added_tokens': [%s],\n'pre_tokenizer': %s, 'model': {'type': 'BPE'%s, "
               "'merges': [%s],\n'vocab': {", added, pre, more_model, merges);
    for (int b = 0; b < 256; b++) {
        byte_char(b, c);
        if (strchr("'\"\\", c[0])) fprintf(f, "%s'\\u%04x': %d", b ? ", " : "", (unsigned)b, b);
        else fprintf(f, "%s'%s': %d", b ? ", " : "", c, b);
    }
    fprintf(f, "%s}}}", vocab);
    fclose(f);
    char *json = quoted(text);
    free(text);
    return json;
}

static tok *make_tok(const char *vocab, const char *merges, const char *added, const char *pre,
                     const char *more_model) {
    char *json = make_json(vocab, merges, added, pre, more_model);
    dsv4_err err = {""};
    tok *t;
    int rc = tok_parse(&t, json, strlen(json), "inline", &err);
    CHECK(rc == 0, "%s", err.msg);
    free(json);
    return t;
}

/* Does text have the wanted ids ("97 256")? */
static void check_ids(const tok *t, const char *text, size_t len, bool special, const char *want) {
    dsv4_err err = {""};
    id_list ids = {0};
    char got[1024];
    int used = 0;
    CHECK(t != NULL, "no tokenizer");
    if (!t) return;
    int rc = tok_encode(t, text, len, special, &ids, &err);
    CHECK(rc == 0, "%s", err.msg);
    got[0] = 0;
    for (size_t i = 0; i < ids.n && used < 1000; i++)
        used += snprintf(got + used, sizeof got - (size_t)used, "%s%d", i ? " " : "", ids.id[i]);
    CHECK(strcmp(got, want) == 0, "\"%.*s\" gives %s, not %s", (int)len, text, got, want);
    free(ids.id);
}

static uint32_t rng_state = 12345;
static uint32_t rnd(uint32_t n) { /* below n */
    rng_state = rng_state * 1664525u + 1013904223u;
    return (rng_state >> 8) % n;
}

/* === Merges =================================================================================== */

#define LETTERS ", 'ab': 256, 'bc': 257, 'abc': 258, 'aa': 259, 'aaaa': 260, 'Ġa': 261"

static void test_text_merges_by_rank_then_from_the_left(void) {
    static const struct { const char *merges, *text, *want; } cases[] = {
        {"", "abc", "97 98 99"},
        {"'b c', 'a b'", "abc", "97 257"},
        {"'a b', 'b c'", "abc", "256 99"},
        {"'b c', 'a b', 'a bc'", "abc", "258"},
        {"['a', 'b'], ['ab', 'c']", "abcab", "258 256"},
        {"'a a'", "aaaaa", "259 259 97"},
        {"'a a', 'aa aa'", "aaaaaaa", "260 259 97"},
        {"'aa aa', 'a a'", "aaaaaaa", "260 259 97"},
        {"'Ġ a', 'a a'", " aaa", "261 259"},
        {"'a a'", "", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tok *t = make_tok(LETTERS, cases[i].merges, "", NO_SPLIT, "");
        check_ids(t, cases[i].text, strlen(cases[i].text), true, cases[i].want);
        tok_close(t);
    }
}

enum { NAIVE_MERGES = 40 };
typedef struct { char s[40]; } short_string;

/* Merge as the rule says: look at all pairs, merge the leftmost of the lowest rank, again. */
static void naive_bpe(const short_string pairs[][2], int n_pairs, const char *text, char *out) {
    short_string part[64];
    int n = 0;
    for (; text[n]; n++) snprintf(part[n].s, sizeof part[n].s, "%c", text[n]);
    for (;;) {
        int best = n_pairs, at = -1;
        for (int i = 0; i + 1 < n; i++)
            for (int m = 0; m < best; m++)
                if (!strcmp(part[i].s, pairs[m][0].s) && !strcmp(part[i + 1].s, pairs[m][1].s))
                    best = m, at = i;
        if (at < 0) break;
        size_t end = strlen(part[at].s), more = strlen(part[at + 1].s) + 1;
        CHECK(end + more <= sizeof part[at].s, "piece of %zu bytes", end + more);
        memcpy(part[at].s + end, part[at + 1].s, more);
        memmove(&part[at + 1], &part[at + 2], (size_t)(n-- - at - 2) * sizeof *part);
    }
    *out = 0;
    for (int i = 0; i < n; i++) strcat(strcat(out, i ? "|" : ""), part[i].s);
}

/* Random merges over a and b, in any order, also such as could not have been learned. */
static void test_text_merges_like_the_naive_rule(void) {
    for (int round = 0; round < 200; round++) {
        short_string pairs[NAIVE_MERGES][2], pieces[NAIVE_MERGES + 2] = {{"a"}, {"b"}};
        char vocab[4096] = "", merges[4096] = "";
        int n_pieces = 2, n = 0;
        for (int tries = 0; tries < NAIVE_MERGES; tries++) {
            const char *l = pieces[rnd((uint32_t)n_pieces)].s;
            const char *r = pieces[rnd((uint32_t)n_pieces)].s;
            char both[80];
            bool known = false, twice = false;
            snprintf(both, sizeof both, "%s%s", l, r);
            for (int i = 0; i < n; i++)
                twice |= !strcmp(pairs[i][0].s, l) && !strcmp(pairs[i][1].s, r);
            if (strlen(both) > 12 || twice) continue;
            for (int i = 0; i < n_pieces; i++) known |= !strcmp(pieces[i].s, both);
            strcpy(pairs[n][0].s, l);
            strcpy(pairs[n++][1].s, r);
            if (known) continue;
            sprintf(vocab + strlen(vocab), ", '%s': %d", both, 300 + n_pieces);
            memcpy(pieces[n_pieces++].s, both, 13);
        }
        for (int i = n - 1; i > 0; i--) { /* shuffled: a part's rank may be above its whole's */
            int j = (int)rnd((uint32_t)i + 1);
            for (int k = 0; k < 2; k++) {
                short_string swap = pairs[i][k];
                pairs[i][k] = pairs[j][k];
                pairs[j][k] = swap;
            }
        }
        for (int i = 0; i < n; i++)
            sprintf(merges + strlen(merges), "%s'%s %s'", i ? ", " : "", pairs[i][0].s,
                    pairs[i][1].s);
        tok *t = make_tok(vocab, merges, "", NO_SPLIT, "");
        for (int i = 0; i < 20 && t; i++) {
            char text[50] = "", want[256], got[256] = "";
            dsv4_err err;
            id_list ids = {0};
            size_t len;
            for (uint32_t k = rnd(40); k > 0; k--) strcat(text, rnd(3) ? "a" : "b");
            naive_bpe((const short_string(*)[2])pairs, n, text, want);
            int rc = tok_encode(t, text, strlen(text), true, &ids, &err);
            CHECK(rc == 0, "%s", err.msg);
            for (size_t k = 0; k < ids.n; k++) {
                const char *bytes = tok_bytes(t, ids.id[k], &len);
                strncat(strcat(got, k ? "|" : ""), bytes, len);
            }
            CHECK(!strcmp(got, want), "%s: %s, not %s, merges %s", text, got, want, merges);
            free(ids.id);
        }
        tok_close(t);
    }
}

/* === Added tokens and pieces ================================================================== */

#define ADDED(id, content, normalized, special)                                                  \
    "{'id': " #id ", 'content': '" content "', 'single_word': false, 'lstrip': false, " \
    "'rstrip': false, 'normalized': " #normalized ", 'special': " #special "}"

static void test_text_finds_added_tokens_leftmost_and_longest_first(void) {
    static const char added[] = ADDED(300, "<a", false, true) ", " ADDED(301, "<ab>", false, false)
        ", " ADDED(302, "<a><", false, true) ", " ADDED(305, "x<", true, false)
        ", " ADDED(306, "<ab>c", true, false);
    tok *t = make_tok(LETTERS, "'a b'", added, NO_SPLIT, "");
    check_ids(t, "<ab><a><ab", 10, true, "301 302 256");
    check_ids(t, "<ab<a", 5, true, "300 98 300");
    check_ids(t, "b<a>", 4, true, "98 300 62");
    check_ids(t, "<", 1, true, "60");
    /* Those with "normalized" true come second, even where they start further left. */
    check_ids(t, "x<ab", 4, true, "120 300 98");
    check_ids(t, "x<b", 3, true, "305 98");
    check_ids(t, "<ab>c", 5, true, "301 99");
    check_ids(t, "<ab>x<", 6, false, "60 256 62 120 60");
    CHECK(tok_special(t, "<ab>") == 301 && tok_special(t, "<ab") == -1 && tok_special(t, "a") == -1,
          "found wrong ids");
    tok_close(t);
}

static void test_text_knows_the_bytes_of_every_id(void) {
    tok *t = make_tok(", 'Ġa': 400, '<｜x｜>': 402, ' ': 403", "",
                      ADDED(402, "<｜x｜>", true, true) ", " ADDED(500, "é ", false, true),
                      NO_SPLIT, "");
    static const struct { int32_t id; const char *want; } cases[] = {
        {97, "a"}, {0xe4, "\xe4"}, {32, " "}, {400, " a"}, {402, "<｜x｜>"}, {403, " "},
        {500, "é "},
        {401, ""}, {-1, ""}, {501, ""}, {1 << 30, ""}};
    size_t len;
    for (size_t i = 0; t && i < sizeof cases / sizeof *cases; i++) {
        const char *got = tok_bytes(t, cases[i].id, &len);
        CHECK(len == strlen(cases[i].want) && !memcmp(got, cases[i].want, len), "id %d: '%.*s'",
              cases[i].id, (int)len, got);
    }
    for (int b = 0; t && b < 256; b++) {
        const char *got = tok_bytes(t, b, &len);
        CHECK(len == 1 && (unsigned char)*got == b, "byte %d", b);
    }
    CHECK(t && tok_n_ids(t) == 501, "n_ids");
    check_ids(t, " \xad", 2, true, "32 239 191 189"); /* not 403, which is no byte's token */
    tok_close(t);
}

static void test_text_cuts_by_each_regex_in_turn(void) {
    static const char pre[] = "{'type': 'Sequence', 'pretokenizers': [{'type': 'Split', "
        "'pattern': {'Regex': '" NUMBERS "'}, 'behavior': 'Isolated', 'invert': false}, "
        "{'type': 'Split', 'pattern': {'Regex': '" WORDS "'}, 'behavior': 'Isolated'}, "
        NO_SPLIT "]}";
    tok *t = make_tok(", 'aa': 256, '11': 257, '1111': 258, '.a': 259, 'a.': 260, '1a': 261, "
                      "'a1': 262, 'ĠĠ': 263, 'Ġa': 264",
                      "'1 1', '11 11', '. a', 'a .', '1 a', 'a 1', 'a a', 'Ġ Ġ', 'Ġ a'", "",
                      pre, "");
    check_ids(t, "1111", 4, true, "257 49 49");
    check_ids(t, "1aa.a", 5, true, "49 256 259");
    check_ids(t, "a.1a", 4, true, "97 46 49 97");
    check_ids(t, "   a  ", 6, true, "263 264 263");    /* the look-ahead leaves one space */
    tok_close(t);
}

/* Words of a text are remembered while it is encoded: that must not show either. */
static void test_text_encodes_a_word_alike_wherever_it_stands(void) {
    tok *t = make_tok(LETTERS, "'a b', 'b c', 'a a'", "", SPLIT(WORDS), "");
    enum { N_WORDS = 3000 };
    char text[8 * N_WORDS];
    size_t len = 0, at = 0;
    id_list ids = {0};
    dsv4_err err = {""};
    for (int i = 0; i < N_WORDS; i++) {
        for (uint32_t k = 2 + rnd(5); k > 0; k--) text[len++] = "abc"[rnd(3)];
        text[len++] = '\n';
    }
    if (!t || tok_encode(t, text, len, true, &ids, &err)) {
        CHECK(false, "%s", err.msg);
        tok_close(t);
        return;
    }
    for (size_t i = 0, end; i < len; i = end) { /* each word, and the line's end, alone */
        end = (size_t)((char *)memchr(text + i, '\n', len - i) - text) + 1;
        id_list word = {0};
        int rc = tok_encode(t, text + i, end - i, true, &word, &err);
        CHECK(rc == 0 && at + word.n <= ids.n
                  && !memcmp(word.id, ids.id + at, word.n * sizeof *word.id),
              "\"%.*s\" at %zu", (int)(end - i), text + i, i);
        at += word.n;
        free(word.id);
    }
    CHECK(at == ids.n, "%zu ids, not %zu", ids.n, at);
    free(ids.id);
    tok_close(t);
}

/* === UTF-8 ==================================================================================== */

/* The whole string at once, by Unicode's table 3-7 of well-formed byte sequences: the longest
 * match of a row's first n columns is replaced when it is not a whole row. */
static size_t replace_naively(const unsigned char *s, size_t len, char *out) {
    static const unsigned char rows[][8] = {
        {0x00, 0x7f}, {0xc2, 0xdf, 0x80, 0xbf}, {0xe0, 0xe0, 0xa0, 0xbf, 0x80, 0xbf},
        {0xe1, 0xec, 0x80, 0xbf, 0x80, 0xbf}, {0xed, 0xed, 0x80, 0x9f, 0x80, 0xbf},
        {0xee, 0xef, 0x80, 0xbf, 0x80, 0xbf}, {0xf0, 0xf0, 0x90, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {0xf1, 0xf3, 0x80, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {0xf4, 0xf4, 0x80, 0x8f, 0x80, 0xbf, 0x80, 0xbf}};
    static const size_t columns[] = {1, 2, 3, 3, 3, 3, 4, 4, 4};
    size_t n_out = 0;
    for (size_t i = 0; i < len;) {
        size_t longest = 1;
        bool whole = false;
        for (int r = 0; r < 9; r++) {
            size_t n = 0;
            while (n < columns[r] && i + n < len && s[i + n] >= rows[r][2 * n]
                   && s[i + n] <= rows[r][2 * n + 1]) n++;
            if (n > longest) longest = n;
            if (n == columns[r]) whole = true;
        }
        memcpy(out + n_out, whole ? (const char *)s + i : "\xef\xbf\xbd", whole ? longest : 3);
        n_out += whole ? longest : 3;
        i += longest;
    }
    return n_out;
}

static void test_text_utf8_push_equals_replacing_the_whole(void) {
    static const unsigned char likely[] = {0x80, 0xbf, 0x9f, 0xa0, 0x8f, 0x90, 0xc2, 0xc1, 0xe0,
                                           0xe4, 0xed, 0xef, 0xf0, 0xf1, 0xf4, 0xf5, 0xff, 'a'};
    for (int round = 0; round < 200000; round++) {
        unsigned char text[24];
        char want[3 * 28];
        size_t len = rnd(sizeof text + 1);
        buffer got = {0};
        utf8_stream s = {0};
        for (size_t i = 0; i < len; i++)
            text[i] = rnd(4) ? likely[rnd(sizeof likely)] : (unsigned char)rnd(256);
        for (size_t at = 0; at < len;) {
            size_t step = 1 + rnd((uint32_t)(rnd(2) ? 3 : len - at));
            if (step > len - at) step = len - at;
            utf8_push(&s, (const char *)text + at, step, &got);
            at += step;
            /* What is out already is whole characters, and as much as can be known. */
            size_t known = replace_naively(text, at, want);
            CHECK(got.n == known || got.n + 3 == known, "held back %zu of %zu", known - got.n,
                  known);
            CHECK(got.n == 0 || memcmp(got.s, want, got.n) == 0, "early output differs");
        }
        utf8_push(&s, NULL, 0, &got);
        size_t n_want = replace_naively(text, len, want);
        CHECK(got.n == n_want && (n_want == 0 || memcmp(got.s, want, n_want) == 0),
              "%zu bytes, not %zu", got.n, n_want);
        CHECK(s.n_held == 0, "still held: %d", s.n_held);
        free(got.s);
    }
}

static void test_text_repairs_broken_utf8_before_encoding(void) {
    static const struct { const char *broken, *repaired; } cases[] = {
        {"\xe4\xb8", "\xef\xbf\xbd"}, {"a\xf0\x9f\x98z", "a\xef\xbf\xbdz"},
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},
        {"<a\xff>", "<a\xef\xbf\xbd>"}, {"\xffx<", "\xef\xbf\xbdx<"}};
    tok *t = make_tok("", "", ADDED(300, "x<", true, false), SPLIT(WORDS), "");
    for (size_t i = 0; t && i < sizeof cases / sizeof *cases; i++) {
        char want[256] = "";
        id_list ids = {0};
        dsv4_err err;
        int rc = tok_encode(t, cases[i].repaired, strlen(cases[i].repaired), true, &ids, &err);
        CHECK(rc == 0, "%s", err.msg);
        for (size_t k = 0; k < ids.n; k++)
            sprintf(want + strlen(want), "%s%d", k ? " " : "", ids.id[k]);
        check_ids(t, cases[i].broken, strlen(cases[i].broken), true, want);
        free(ids.id);
    }
    tok_close(t);
}

/* === Prompt =================================================================================== */

static int encode_user_turn(const tok *t, const char *text, bool think, id_list *ids,
                            dsv4_err *err) {
    json_t *message = prompt_message("user", text, strlen(text));
    json_t *request = json_pack("{s:[o], s:b}", "messages", message, "thinking", think);
    prompt p;
    int rc = prompt_build(&p, request, GEN_V4, err);
    CHECK(rc == 0, "%s", err->msg);
    if (!rc) rc = prompt_encode(t, &p, ids, err);
    prompt_free(&p);
    json_decref(request);
    return rc;
}

static void test_text_prompt_of_a_user_turn(void) {
    static const char bos[] = ADDED(300, "<｜begin▁of▁sentence｜>", false, true);
    static const char user[] = ADDED(301, "<｜User｜>", true, false);
    static const char rest[] = ADDED(302, "<｜Assistant｜>", true, false) ", "
        ADDED(303, "<think>", true, false) ", " ADDED(304, "</think>", true, false);
    char added[2048];
    dsv4_err err = {""};
    snprintf(added, sizeof added, "%s, %s, %s", bos, user, rest);
    tok *t = make_tok(LETTERS, "'a b'", added, NO_SPLIT, "");
    for (int think = 0; t && think < 2; think++) {
        const int32_t want[] = {300, 301, 256, 60, 116, 104, 105, 110, 107, 62, 302,
                                think ? 303 : 304};
        id_list ids = {0};
        int rc = encode_user_turn(t, "ab<think>", think, &ids, &err);
        CHECK(rc == 0, "%s", err.msg);
        CHECK(ids.n == 12 && !memcmp(ids.id, want, sizeof want), "wrong ids, %zu of them", ids.n);
        free(ids.id);
    }
    tok_close(t);
    snprintf(added, sizeof added, "%s, %s", bos, rest);
    t = make_tok("", "", added, NO_SPLIT, "");
    id_list none = {0};
    int rc = t ? encode_user_turn(t, "a", false, &none, &err) : 0;
    CHECK(rc == -1 && strstr(err.msg, "<｜User｜>") && !none.n, "%s", err.msg);
    tok_close(t);
}

/* Tokens of both passes, and cuts that end inside, beside and around them. */
static void test_text_finds_added_tokens_outside_of_cuts(void) {
    static const char added[] = ADDED(300, "<｜begin▁of▁sentence｜>", false, true) ", "
        ADDED(301, "<｜User｜>", true, false) ", "
        ADDED(302, "<｜Assistant｜>", true, false) ", "
        ADDED(303, "<think>", true, false) ", " ADDED(304, "</think>", true, false) ", "
        ADDED(305, "ab", false, true) ", " ADDED(306, "abc", false, true) ", "
        ADDED(307, "ca", true, false);
    static const struct { const char *text; size_t n_cuts, cuts[4]; const char *want; } cases[] = {
        {"abcab", 0, {0}, "306 305"}, {"abcab", 2, {0, 5}, "97 98 99 97 98"},
        {"abcab", 2, {2, 3}, "305 99 305"}, {"abcab", 2, {0, 1}, "97 98 99 305"},
        {"abcab", 2, {1, 2}, "97 98 99 305"}, {"abcab", 2, {3, 4}, "306 97 98"},
        {"abcab", 2, {4, 5}, "306 97 98"}, {"abcab", 4, {0, 1, 4, 5}, "97 98 307 98"},
        {"abcab", 4, {0, 2, 3, 5}, "97 98 99 97 98"}, {"xcab", 2, {0, 1}, "120 99 305"},
        {"xcax", 2, {0, 1}, "120 307 120"}, {"xcax", 2, {3, 4}, "120 307 120"},
        {"xcax", 2, {2, 3}, "120 99 97 120"},
    };
    tok *t = make_tok("", "", added, NO_SPLIT, "");
    for (size_t i = 0; t && i < sizeof cases / sizeof *cases; i++) {
        char text[8], got[64] = "";
        size_t cuts[4];
        id_list ids = {0};
        dsv4_err err = {""};
        memcpy(cuts, cases[i].cuts, sizeof cuts);
        prompt p = {strcpy(text, cases[i].text), strlen(text), cuts, cases[i].n_cuts, false, false};
        int rc = prompt_encode(t, &p, &ids, &err);
        CHECK(rc == 0, "%s", err.msg);
        for (size_t k = 0; k < ids.n; k++)
            sprintf(got + strlen(got), "%s%d", k ? " " : "", ids.id[k]);
        CHECK(!strcmp(got, cases[i].want), "case %zu: %s, not %s", i, got, cases[i].want);
        free(ids.id);
    }
    tok_close(t);
}

/* === Hostile texts and files ================================================================== */

/* CPU seconds, so that a busy machine fails nothing. */
static double seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

/* V4's third regex, and merges that double. */
static void test_text_long_line_of_one_character(void) {
    enum { LEN = 10000000 };
    tok *t = make_tok(", 'aa': 256, 'aaaa': 257, 'ĠĠ': 258, 'ĠĠĠĠ': 259",
                      "'a a', 'aa aa', 'Ġ Ġ', 'ĠĠ ĠĠ'", "", SPLIT(WORDS), "");
    static const struct { char c, last; size_t n_ids; } cases[] = {
        {'a', 'a', LEN / 4}, {' ', ' ', LEN / 4}, {' ', 'a', LEN / 4 + 2}, {'=', '=', LEN},
        {'7', '7', LEN}};
    char *text = malloc(LEN), note[128] = "";
    for (size_t i = 0; t && text && i < sizeof cases / sizeof *cases; i++) {
        id_list ids = {0};
        dsv4_err err = {""};
        memset(text, cases[i].c, LEN);
        text[LEN - 1] = cases[i].last;
        double start = seconds();
        int rc = tok_encode(t, text, LEN, true, &ids, &err);
        double took = seconds() - start;
        CHECK(rc == 0, "%s", err.msg);
        CHECK(ids.n == cases[i].n_ids, "case %zu: %zu ids, not %zu", i, ids.n, cases[i].n_ids);
        CHECK(took < 100, "case %zu took %.1f s", i, took);
        sprintf(note + strlen(note), "%s%.2f", i ? ", " : "", took);
        free(ids.id);
    }
    NOTE("CPU seconds for 10 MB: %s", note);
    free(text);
    tok_close(t);
}

/* Swap the first `old` in a sound file for `new`, and expect a message with this fragment. */
static void check_refused(const char *old_text, const char *new_text, const char *fragment_text) {
    char *json = make_json(LETTERS, "'a b', 'b c'", ADDED(300, "<x>", false, true),
                           SPLIT(NUMBERS), "");
    char *old = quoted(old_text), *new = quoted(new_text), *fragment = quoted(fragment_text);
    char *changed = NULL;
    size_t len = 0;
    dsv4_err err = {""};
    tok *t = (tok *)&err;
    FILE *f = open_memstream(&changed, &len);
    const char *at = strstr(json, old);
    CHECK(at != NULL, "the file has no %s", old);
    if (at) fprintf(f, "%.*s%s%s", (int)(at - json), json, new, at + strlen(old));
    fclose(f);
    int rc = tok_parse(&t, changed, len, "x/tokenizer.json", &err);
    CHECK(rc == -1 && !t, "%s -> %s was accepted", old, new);
    CHECK(strstr(err.msg, fragment), "%s -> %s: %s, not %s", old, new, err.msg, fragment);
    CHECK(strncmp(err.msg, "x/tokenizer.json: ", 18) == 0, "no file: %s", err.msg);
    CHECK(!strpbrk(err.msg, "\r\n\t\033") && strlen(err.msg) < 700, "not one line: %s", err.msg);
    free(changed);
    free(fragment);
    free(new);
    free(old);
    free(json);
}

static void test_text_refuses_bad_settings_and_vocab_by_name(void) {
    static const struct { const char *old, *new, *fragment; } cases[] = {
        {"{", "[", "line "},
        {"{'normalizer': null", "[], {'a': 1", "line "},
        {"'normalizer': null", "'a': '\xff'", "line "},
        {"'normalizer': null", "'normalizer': {'type': 'NFC\\n\\u001b'}", "NFC"},
        {"'normalizer': null", "'normalizer': {'type': 'Sequence', 'normalizers': [{'type': "
         "'Lowercase'}]}", "Lowercase"},
        {"'normalizer': null", "'normalizer': 7", "normalizer"},
        {"'normalizer': null", "'truncation': {'max_length': 5}", "truncation"},
        {"'normalizer': null", "'padding': {}", "padding"},
        {"'decoder': {'type': 'ByteLevel'}", "'decoder': {'type': 'Metaspace'}", "Metaspace"},
        {"'decoder': {'type': 'ByteLevel'}", "'decoder': null", "decoder"},
        {"'BPE'", "'Unigram'", "Unigram"},
        {"'BPE'", "'BPE', 'dropout': 0.1", "dropout"},
        {"'BPE'", "'BPE', 'byte_fallback': true", "byte_fallback"},
        {"'BPE'", "'BPE', 'ignore_merges': true", "ignore_merges"},
        {"'BPE'", "'BPE', 'end_of_word_suffix': '</w>'", "end_of_word_suffix"},
        {"'model': {", "'model': {'type': 1}, 'x': {", "model.type"},
        {"'vocab': {", "'vocab': 5, 'x': {", "model.vocab"},
        {"'vocab': {", "'vocab': {'a': 97, ", "line "},
        {"'vocab': {", "'vocab': {'zz': 97, ", "has another string"},
        {"'vocab': {", "'vocab': {'zz': -1, ", "'zz'"},
        {"'vocab': {", "'vocab': {'zz': 16777216, ", "'zz'"},
        {"'vocab': {", "'vocab': {'zz': 99999999999999999999, ", "line "},
        {"'vocab': {", "'vocab': {'zz': 256.0, ", "'zz'"},
        {"'vocab': {", "'vocab': {'zz': '5', ", "'zz'"},
        {"'vocab': {", "'vocab': {'': 700, ", "empty"},
        {"'vocab': {", "'vocab': {'\\u0000': 700, ", "line "},
        {"'Ā': 0", "'Āx': 0", "byte 0x00"},
        {"'ÿ': 255", "'ż': 255", "byte 0xff"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_refused(cases[i].old, cases[i].new, cases[i].fragment);
}

static void test_text_refuses_bad_merges_tokens_and_splits_by_name(void) {
    static const struct { const char *old, *new, *fragment; } cases[] = {
        {"'merges': [", "'merges': 5, 'x': [", "model.merges"},
        {"'a b'", "'a  b'", "model.merges: "},
        {"'a b'", "'ab'", "model.merges: "},
        {"'a b'", "5", "model.merges: "},
        {"'a b'", "['a']", "model.merges: "},
        {"'a b'", "['a', 'b', 'c']", "model.merges: "},
        {"'a b'", "['a', 5]", "model.merges: "},
        {"'b c'", "'b zz'", "vocab, in parts or whole: 'b zz'"},
        {"'b c'", "'zz c'", "vocab, in parts or whole: 'zz c'"},
        {"'b c'", "'b a'", "vocab, in parts or whole: 'b a'"},
        {"'b c'", "'a b'", "comes twice: 'a b'"},
        {"'added_tokens': [", "'added_tokens': {}, 'x': [", "added_tokens"},
        {"'added_tokens': [", "'added_tokens': [5, ", "added_tokens: no content"},
        {"'id': 300", "'id': '300'", "an id that is none"},
        {"'id': 300", "'id': 16777216", "an id that is none"},
        {"'id': 300", "'id': 97", "contradicts"},
        {"'<x>'", "'ab'", "contradicts"},
        {"'id': 300, 'content': '<x>'", "'id': 233, 'content': 'é'", "contradicts"},
        {"'<x>'", "''", "added_tokens: no content"},
        {"'<x>'", "17", "added_tokens: no content"},
        {"'lstrip': false", "'lstrip': true", "lstrip"},
        {"'rstrip': false", "'rstrip': true", "rstrip"},
        {"'single_word': false", "'single_word': true", "single_word"},
        {"'added_tokens': [", "'added_tokens': [{'id': 900, 'content': '<x>', 'normalized': "
         "true}, ", "twice"},
        {"'added_tokens': [", "'added_tokens': [{'id': 300, 'content': '<y>'}, ", "comes twice"},
        {"'pre_tokenizer'", "'x'", "ByteLevel"},
        {"'Sequence'", "'Digits'", "Digits"},
        {"'pretokenizers': [", "'pretokenizers': [], 'x': [", "ByteLevel"},
        {"'Split'", "'Punctuation'", "Punctuation"},
        {"'Isolated'", "'MergedWithPrevious'", "MergedWithPrevious"},
        {"'behavior': 'Isolated',", "", "another step"},
        {"'invert': false", "'invert': true", "invert"},
        {"'add_prefix_space': false", "'add_prefix_space': true", "add_prefix_space"},
        {", " NO_SPLIT, "", "ByteLevel"},
        {NO_SPLIT, NO_SPLIT ", " NO_SPLIT, "ByteLevel"},
        {"'use_regex': false", "'use_regex': true", "use_regex"},
        {"{'Regex': '" NUMBERS "'}", "'x'", "another step"},
        {"{'Regex': '" NUMBERS "'}", "{'String': 'a'}", "another step"},
        {NUMBERS, "\\\\p{N}{1,2}", "{N}{1,2}"},
        {NUMBERS, "", "another step"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_refused(cases[i].old, cases[i].new, cases[i].fragment);
}

/* Files that cost much: deep nesting, many splits, long patterns and tokens. */
static void test_text_bounds_what_a_file_can_cost(void) {
    enum { DEEP = 100000 };
    static const char split[] = "{'type': 'Split', 'pattern': {'Regex': '" NUMBERS "'}, "
                                "'behavior': 'Isolated'}, ";
    char *big = calloc(1, DEEP + 64);
    if (!big) return;
    memset(big, '[', DEEP);
    check_refused("null", big, "line ");
    memset(big, '"', 1);
    memset(big + 1, 'a', 300);
    strcpy(big + 301, "'");
    check_refused("'<x>'", big, "1 to 256 bytes");
    *big = 0;
    for (int i = 0; i < 3; i++) strcat(big, split);
    strcat(big, "{'type': 'Split'");
    check_refused("{'type': 'Split'", big, "another step");
    free(big);
}

static void test_text_refuses_too_large_a_text(void) {
    tok *t = make_tok("", "", "", NO_SPLIT, "");
    id_list ids = {0};
    dsv4_err err = {""};
    int rc = t ? tok_encode(t, "", (size_t)1 << 30, true, &ids, &err) : 0;
    CHECK(rc == -1 && strstr(err.msg, "limit"), "%s", err.msg);
    tok_close(t);
}

static void test_text_opens_a_directory(void) {
    char dir[] = "/tmp/dsv4-text-XXXXXX", path[64];
    dsv4_err err = {""};
    tok *t;
    CHECK(mkdtemp(dir) != NULL, "mkdtemp");
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    CHECK(tok_open(&t, dir, &err) == -1 && !t && strstr(err.msg, path), "%s", err.msg);
    CHECK(mkdir(path, 0700) == 0, "mkdir");
    CHECK(tok_open(&t, dir, &err) == -1 && strstr(err.msg, path), "%s", err.msg);
    rmdir(path);
    FILE *f = fopen(path, "w");
    CHECK(f && ftruncate(fileno(f), 40 << 20) == 0, "no sparse file");
    CHECK(tok_open(&t, dir, &err) == -1 && strstr(err.msg, "limit"), "%s", err.msg);
    char *json = make_json("", "", "", NO_SPLIT, "");
    if (f) {
        CHECK(ftruncate(fileno(f), 0) == 0 && fputs(json, f) >= 0, "write");
        fclose(f);
    }
    CHECK(tok_open(&t, dir, &err) == 0 && t && tok_n_ids(t) == 256, "%s", err.msg);
    tok_close(t);
    tok_close(NULL);
    free(json);
    unlink(path);
    rmdir(dir);
}

int main(void) {
    RUN(test_text_merges_by_rank_then_from_the_left);
    RUN(test_text_merges_like_the_naive_rule);
    RUN(test_text_finds_added_tokens_leftmost_and_longest_first);
    RUN(test_text_knows_the_bytes_of_every_id);
    RUN(test_text_cuts_by_each_regex_in_turn);
    RUN(test_text_encodes_a_word_alike_wherever_it_stands);
    RUN(test_text_utf8_push_equals_replacing_the_whole);
    RUN(test_text_repairs_broken_utf8_before_encoding);
    RUN(test_text_prompt_of_a_user_turn);
    RUN(test_text_finds_added_tokens_outside_of_cuts);
    RUN(test_text_long_line_of_one_character);
    RUN(test_text_refuses_bad_settings_and_vocab_by_name);
    RUN(test_text_refuses_bad_merges_tokens_and_splits_by_name);
    RUN(test_text_bounds_what_a_file_can_cost);
    RUN(test_text_refuses_too_large_a_text);
    RUN(test_text_opens_a_directory);
    return check_done();
}
