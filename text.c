/* text.c -- messages -> prompt <-> tokens <-> answer, by the byte-level BPE of tokenizer.json.
 *
 *   {"messages": [...]}          a request; its prompt, in which is known who wrote what  section 9
 *        |
 *   "x = 15<think>"              bytes; what is not UTF-8 becomes U+FFFD            section 1
 *        | added tokens first, longest first (only if the caller wants them)        section 6
 *   "x = 15"  128821
 *        | regex after regex, each cutting the pieces that the one before left      section 6
 *   "x" " =" " " "15"            words
 *        | one id a byte; the pair of neighbours with the lowest rank is merged,
 *        | the leftmost one on ties, until no pair has a rank                       section 5
 *   90 438 223 856  128821       ids, to the model and from it
 *        | bytes of ids, whole characters, until a stop word                  sections 7, 1, 10
 *   "why</think>because"         reasoning, content and tool calls                   section 10
 *
 * Invariants  1 a tok is never written after tok_parse: any number of threads may encode
 *             2 every one of the 256 bytes has an id, so no text is ever lost
 *             3 a regex only ever sees valid UTF-8, and only the piece it cuts
 *             4 time is near linear in the text, whatever the text: merging is O(n log n) a word
 *             5 the JSON tree is gone when tok_parse returns
 *             6 no text of people or tools ever becomes a special token of a prompt
 *             7 an answer's pieces do not depend on how its bytes were handed over
 *
 * Contents    1 bytes, UTF-8   2 the tables   3 patterns   4 reading tokenizer.json
 *             5 merging a word   6 cutting text   7 encoding, decoding
 *             8 writing JSON   9 the prompt   10 the answer   11 documents
 * Not here    HTTP, and running tools
 */
#define _GNU_SOURCE                /* vasprintf, memmem, memfd_create                           */

#include "dsv4.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <iconv.h>
#include <jansson.h>
#include <libxml/HTMLparser.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

enum {
    MAX_JSON_BYTES = 16 << 20,     /* V4's file has 6.4 MB; jansson may need 80 times as much   */
    MAX_IDS = 1 << 21,             /* V4 has 129,280                                            */
    MAX_ADDED_BYTES = 256,         /* bounds a look-up at one place of a text                   */
    MAX_TEXT_BYTES = 1 << 28,      /* so that 4 times a repaired text's places fit 32 bits      */
    N_PATTERNS = 3,                /* that V4 cuts text by                                      */
};

#define NO_RANK UINT32_MAX

/* === 1. Bytes, UTF-8 ==========================================================================
 * Broken text is repaired the way Python's bytes.decode(errors="replace") and Unicode (3.9, best
 * practice) do: one U+FFFD for each maximal piece that starts like a character and breaks off.
 *   f0 9f 98 'a'      one U+FFFD, then a        a character without its last byte
 *   ed a0 80          three                     no character starts with ed a0 (a surrogate), so
 *                                               each byte is broken for itself                 */

void put_bytes(buffer *b, const char *s, size_t n) {
    if (n > b->cap - b->n) {
        size_t cap = 2 * b->cap + n + 64; /* n is the size of something in memory, so this fits */
        char *grown = b->failed ? NULL : realloc(b->s, cap);
        b->failed = !grown;
        if (!grown) return;
        b->s = grown;
        b->cap = cap;
    }
    if (n > 0) memcpy(b->s + b->n, s, n);
    b->n += n;
}

void put_text(buffer *b, const char *s) { put_bytes(b, s, strlen(s)); }

void put_format(buffer *b, const char *fmt, ...) {
    char *s;
    va_list args;
    va_start(args, fmt);
    if (vasprintf(&s, fmt, args) < 0) s = NULL;
    va_end(args);
    if (s) put_text(b, s);
    b->failed |= !s;
    free(s);
}

typedef enum { CH_WHOLE, CH_BROKEN, CH_CUT } ch_state;

/* What do the n > 0 bytes at s begin with?  A whole character, a broken one, or the start of one
 * that n bytes do not finish; the length of any of these is returned. */
static size_t utf8_char(const unsigned char *s, size_t n, ch_state *state) {
    unsigned c = s[0], lo = 0x80, hi = 0xbf;
    size_t want = c < 0x80 ? 1 : c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    *state = want ? CH_WHOLE : CH_BROKEN;
    if (c == 0xe0) lo = 0xa0;      /* shorter forms exist                                       */
    if (c == 0xed) hi = 0x9f;      /* surrogates                                                */
    if (c == 0xf0) lo = 0x90;      /* shorter forms exist                                       */
    if (c == 0xf4) hi = 0x8f;      /* above U+10FFFF                                            */
    for (size_t i = 1; i < want; i++) {
        if (i == n || s[i] < lo || s[i] > hi) {
            *state = i == n ? CH_CUT : CH_BROKEN;
            return i;
        }
        lo = 0x80, hi = 0xbf;
    }
    return want ? want : 1;
}

static bool utf8_valid(const char *text, size_t len) {
    const unsigned char *s = (const unsigned char *)text;
    ch_state state = CH_WHOLE;
    for (size_t i = 0; i < len && state == CH_WHOLE;)
        i += s[i] < 0x80 ? 1 : utf8_char(s + i, len - i, &state);
    return state == CH_WHOLE;
}

void utf8_push(utf8_stream *s, const char *bytes, size_t len, buffer *out) {
    static const char replacement[] = "\xef\xbf\xbd";
    for (size_t i = 0; i < len; i++) {
        s->held[s->n_held++] = (unsigned char)bytes[i];
        /* What was held is the start of a character.  The new byte goes on with it, ends it, or
         * breaks it; then it is looked at once more, as a start of its own. */
        while (s->n_held > 0) {
            ch_state state;
            size_t n = utf8_char(s->held, (size_t)s->n_held, &state);
            if (state == CH_CUT) break;
            if (state == CH_WHOLE) put_bytes(out, (const char *)s->held, n);
            else put_text(out, replacement);
            s->n_held -= (int)n;
            memmove(s->held, s->held + n, (size_t)s->n_held);
        }
        assert(s->n_held < 4);
    }
    if (len > 0) return;
    put_text(out, s->n_held ? replacement : "");
    s->n_held = 0;
}

static void put_repaired(buffer *out, const char *text, size_t len) {
    utf8_stream s = {0};
    utf8_push(&s, text, len, out);
    utf8_push(&s, NULL, 0, out);
}

/* A message is one line of UTF-8, whatever names and files it quotes, and where it was cut off. */
int fail(dsv4_err *err, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, args);
    va_end(args);
    for (size_t i = 0, n, len = strlen(err->msg); i < len; i += n) {
        ch_state state;
        n = utf8_char((unsigned char *)err->msg + i, len - i, &state);
        if (state != CH_WHOLE || (unsigned char)err->msg[i] < ' ' || err->msg[i] == 0x7f)
            memset(err->msg + i, '?', n);
    }
    return -1;
}

int choice(const char *words, const char *word) {
    for (int i = 0; *words; i++) {
        size_t n = strcspn(words, ", ");
        if (strlen(word) == n && !memcmp(word, words, n)) return i;
        words += n + strspn(words + n, ", ");
        if (!strncmp(words, "or ", 3)) words += 3;
    }
    return -1;
}

static int oom(dsv4_err *err) { return fail(err, "out of memory in the tokenizer"); }

/* === 2. The tables ============================================================================
 * Everything an open tokenizer is.  For V4: 1.5 MB of pieces, 1 MB of bytes, 3.6 MB of merges. */

typedef struct { uint32_t at, len; } piece; /* of tok.bytes, what an id stands for; or len 0 */

typedef struct {                   /* an added token                                            */
    const char *s;                 /* in tok.bytes                                              */
    uint32_t len;
    int32_t id;
    int pass;                      /* see tok.added                                             */
} named;

typedef struct { uint32_t left, right, rank; } merge_slot; /* rank NO_RANK: empty               */

struct tok {
    int n_ids;
    piece *pieces;                 /* [n_ids]                                                   */
    char *bytes;                   /* [n_bytes] of all pieces                                   */
    size_t n_bytes, n_added;
    int32_t byte_id[256];          /* where every word starts: no byte is without one           */
    merge_slot *slots;             /* [slot_mask + 1] open addressing, at most half full        */
    uint32_t slot_mask;
    int32_t *merged;               /* [rank] the id that the pair of this rank becomes          */
    named *added;                  /* [n_added] in order of bytes.  `tokenizers` looks for those
                                      with "normalized" false in the whole text (pass 0), then
                                      for the others in what is left (pass 1)                   */
    bool starts[2][256];           /* an added token of this pass starts with this byte         */
    bool lengths[MAX_ADDED_BYTES + 1]; /* an added token has so many bytes                      */
    pcre2_code *split[N_PATTERNS]; /* in order, then NULL; compiled code is only read           */
};

void tok_close(tok *t) {
    if (!t) return;
    for (int i = 0; i < N_PATTERNS; i++) pcre2_code_free(t->split[i]);
    free(t->added);
    free(t->merged);
    free(t->slots);
    free(t->bytes);
    free(t->pieces);
    free(t);
}

/* The slot of a pair, or the empty one where it belongs.  This is the innermost look-up of
 * encoding: ids are small, so one multiplication (by 2^64 over the golden ratio) spreads them. */
static merge_slot *merge_find(const tok *t, uint32_t left, uint32_t right) {
    uint32_t at = (uint32_t)(((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u >> 32);
    for (;; at++) {
        merge_slot *slot = &t->slots[at & t->slot_mask];
        if (slot->rank == NO_RANK || (slot->left == left && slot->right == right)) return slot;
    }
}

/* For qsort and bsearch: in order of bytes, a prefix before what it begins. */
static int by_bytes(const void *a, const void *b) {
    const named *x = a, *y = b;
    int order = memcmp(x->s, y->s, x->len < y->len ? x->len : y->len);
    return order ? order : (x->len > y->len) - (x->len < y->len);
}

/* === 3. Patterns ==============================================================================
 * V4 cuts text by three regexes, and any other is refused: `tokenizers` runs them with Oniguruma,
 * we with PCRE2, and what they do alike is known of these.  Two things are rewritten:
 *   \s       PCRE2's also takes U+180E: Oniguruma's 25 characters are written out;
 *   \p{L}    has the letters of the library's Unicode version.  Distributions ship PCRE2 with
 *            Unicode 14; what 15 and 16 added (some 10,000 characters, among them the pink heart
 *            emoji) is added to the class.  For a later PCRE2 the addition says nothing new.
 * Each runs in linear time: where one has gone over a run of characters, it matches there.       */

static const char *const patterns[N_PATTERNS] = {
    "\\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"};

static const char classes[] =      /* a letter, and its ranges up to the next letter            */
    "s9-d 20 85 a0 1680 2000-200a 2028-2029 202f 205f 3000 "
    "L1c89-1c8a a7cb-a7cd a7da-a7dc 105c0-105f3 10d4a-10d65 10d6f-10d85 10ec2-10ec4 1123f-11240 "
    "11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11bc0-11be0 11f02 11f04-11f10 "
    "11f12-11f33 1342f 13441-13446 13460-143fa 16100-1611d 16d40-16d6c 18cff 1b132 1b155 "
    "1df25-1df2a 1e030-1e06d 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af "
    "M897 cf3 ece 10d69-10d6d 10efc-10eff 11241 113b8-113c0 113c2 113c5 113c7-113ca 113cc-113d0 "
    "113d2 113e1-113e2 11f00-11f01 11f03 11f34-11f3a 11f3e-11f42 11f5a 13440 13447-13455 "
    "1611e-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef "
    "N10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 "
    "1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa "
    "P1b4e-1b4f 1b7f 10d6e 113d4-113d5 113d7-113d8 11b00-11b09 11be1 11f43-11f4f 16d6d-16d6f 1e5ff "
    "S2427-2429 2ffc-2fff 31e4-31e5 31ef 10d8e-10d8f 1cc00-1ccef 1cd00-1ceb3 1f6dc 1f774-1f776 "
    "1f77b-1f77f 1f7d9 1f8b2-1f8bb 1f8c0-1f8c1 1fa75-1fa77 1fa87-1fa89 1fa8f 1faad-1faaf "
    "1fabb-1fabf 1fac6 1face-1facf 1fada-1fadc 1fadf 1fae8-1fae9 1faf7-1faf8 1fbcb-1fbef Z";

/* A pattern as PCRE2 is to have it. */
static void put_pattern(buffer *out, const char *pattern) {
    bool in_brackets = false;
    size_t len;
    for (const char *s = pattern; *s; s += len) {
        char escaped = *s == '\\' ? s[1] : 0;
        len = escaped == 'p' ? strlen("\\p{L}") : escaped ? 2 : 1;
        if (!escaped || !strchr("psS", escaped)) {
            in_brackets = *s == '[' || (in_brackets && *s != ']');
            put_bytes(out, s, len);
            continue;
        }
        put_text(out, in_brackets ? "" : escaped == 'S' ? "[^" : "[");
        put_bytes(out, s, escaped == 'p' ? len : 0);
        const char *range = strchr(classes, escaped == 'p' ? s[3] : 's') + 1;
        for (int n; (n = (int)strspn(range, "0123456789abcdef")) > 0; range += n + 1)
            put_format(out, "\\x{%.*s}%s", n, range, range[n] == '-' ? "-" : "");
        put_text(out, in_brackets ? "" : "]");
    }
}

/* === 4. Reading tokenizer.json ================================================================
 *   vocab {string: id}         -> pieces, bytes, byte_id   strings in GPT-2's byte alphabet
 *   merges ["a b", ...]        -> slots, merged            in order of rank
 *   added_tokens [{id, ...}]   -> added                    strings as they are
 *   pre_tokenizer {...}        -> split
 * The file is not trusted: every id, pair and size is checked, and a setting that could change
 * ids and is not known here is refused by name rather than passed over.                         */

/* Absent, null, false or "": a setting that does nothing. */
static bool is_off(const json_t *v) {
    const char *s = json_string_value(v);
    return !v || json_is_null(v) || json_is_false(v) || (s && !*s);
}

/* "" where there is no text. */
static const char *text_at(const json_t *v, const char *key) {
    const char *text = json_string_value(json_object_get(v, key));
    return text ? text : "";
}

static bool is_type(const json_t *v, const char *type) { return !strcmp(text_at(v, "type"), type); }

/* Say what of the file is not known here, as far as there is room for it. */
static int refuse(const char *what, const json_t *v, dsv4_err *err) {
    char text[200] = "";
    json_dumpb(v, text, sizeof text - 1, JSON_ENCODE_ANY);
    return fail(err, "%s %s is not supported", what, *text ? text : "(none)");
}

/* The settings around the tables.  post_processor is left alone: it adds tokens that the prompt
 * format (M4) places itself. */
static int check_settings(const json_t *root, const json_t *model, dsv4_err *err) {
    static const char *const off[] = {"truncation", "padding", "dropout", "byte_fallback",
        "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"};
    const json_t *normalizer = json_object_get(root, "normalizer"), *v;
    const json_t *steps = json_object_get(normalizer, "normalizers");
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        if (!is_off(v = json_object_get(i < 2 ? root : model, off[i])))
            return refuse(off[i], v, err);
    if (!is_off(normalizer) && (!json_is_array(steps) || json_array_size(steps) > 0))
        return refuse("normalizer", normalizer, err);
    if (!is_type(model, "BPE")) return refuse("model.type", json_object_get(model, "type"), err);
    v = json_object_get(root, "decoder");
    return is_type(v, "ByteLevel") ? 0 : refuse("decoder", v, err);
}

/* An id of the file as a number, or -1. */
static int32_t id_of(const json_t *v) {
    json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;
    return id >= 0 && id < MAX_IDS ? (int32_t)id : -1;
}

/* Decode s from GPT-2's alphabet: printable Latin-1 characters stand for their own bytes, U+0100 up
 * for the other 68 in order (00 to 20, 7f to a0, ad).  Its length; 0: there are others in it. */
static size_t from_byte_level(char *out, const char *s) {
    size_t n = 0;
    for (const unsigned char *p = (const unsigned char *)s; *p; n++) {
        int c = *p++;              /* jansson checked UTF-8; beyond 2 bytes all is foreign      */
        if (c >= 0x80) c = c < 0xe0 ? (c & 0x1f) << 6 | (*p++ & 0x3f) : INT32_MAX;
        if (c >= 0x100) c = c <= 0x120 ? c - 0x100 : c <= 0x142 ? c - 0xa2 : c == 0x143 ? 0xad : -1;
        else if (c <= ' ' || (c >= 0x7f && c <= 0xa0) || c == 0xad) c = -1;
        if (c < 0) return 0;
        out[n] = (char)c;
    }
    return n;
}

/* Give id the n bytes that were just written behind those in use. */
static void place(tok *t, int32_t id, size_t n) {
    t->pieces[id] = (piece){(uint32_t)t->n_bytes, (uint32_t)n};
    t->n_bytes += n;
    if (id >= t->n_ids) t->n_ids = id + 1;
}

/* Strings outside the alphabet (V4 lists its first special tokens in vocab too) are no result of
 * merging bytes; they only stand for themselves.  There is room for any id and for all bytes of
 * the file: what is not written to costs no memory. */
static int read_vocab(tok *t, const json_t *model, size_t file_len, dsv4_err *err) {
    json_t *vocab = json_object_get(model, "vocab"), *value;
    const char *key;
    if (!json_is_object(vocab)) return fail(err, "model.vocab is not an object");
    t->pieces = calloc(MAX_IDS, sizeof *t->pieces);
    t->bytes = malloc(file_len);
    if (!t->pieces || !t->bytes) return oom(err);
    memset(t->byte_id, 0xff, sizeof t->byte_id); /* -1 */
    json_object_foreach(vocab, key, value) {
        int32_t id = id_of(value);
        char *s = t->bytes + t->n_bytes;
        size_t n = from_byte_level(s, key);
        if (id < 0 || !*key || t->pieces[id].len)
            return fail(err, "model.vocab \"%.60s\": empty, or its id is not in 0..%d or has "
                        "another string too", key, MAX_IDS - 1);
        if (n == 1) t->byte_id[(unsigned char)*s] = id;
        if (n == 0) memcpy(s, key, n = strlen(key));
        place(t, id, n);
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0) return fail(err, "model.vocab has no token for byte 0x%02x", b);
    return 0;
}

/* A merge is "left right", or ["left", "right"] as newer files have it.  jansson's hash is seeded,
 * so no file can make the look-ups of its strings slow. */
static int read_merges(tok *t, const json_t *model, dsv4_err *err) {
    json_t *merges = json_object_get(model, "merges"), *vocab = json_object_get(model, "vocab"), *v;
    size_t n_slots = 2, i, n;
    char *both = t->bytes + t->n_bytes; /* there is room: this merge stands in the file too     */
    if (!json_is_array(merges)) return fail(err, "model.merges is not an array");
    while (n_slots < 2 * json_array_size(merges)) n_slots *= 2;
    t->slots = malloc(n_slots * sizeof *t->slots);
    t->merged = malloc((json_array_size(merges) + 1) * sizeof *t->merged);
    if (!t->slots || !t->merged) return oom(err);
    memset(t->slots, 0xff, n_slots * sizeof *t->slots); /* all NO_RANK */
    t->slot_mask = (uint32_t)(n_slots - 1);
    json_array_foreach(merges, i, v) {
        const char *left = json_string_value(v), *right = left ? strchr(left, ' ') : NULL;
        if (right) n = (size_t)(right++ - left);
        else if (json_unpack(v, "[s%s!]", &left, &n, &right))
            return refuse("model.merges: no pair of strings:", v, err);
        memcpy(both, left, n);
        both[n] = 0;
        int32_t l = id_of(json_object_get(vocab, both)), r = id_of(json_object_get(vocab, right));
        strcpy(both + n, right);
        t->merged[i] = id_of(json_object_get(vocab, both));
        if (l < 0 || r < 0 || t->merged[i] < 0)
            return refuse("model.merges: not in vocab, in parts or whole:", v, err);
        merge_slot *slot = merge_find(t, (uint32_t)l, (uint32_t)r);
        if (slot->rank != NO_RANK) return refuse("model.merges: a pair that comes twice:", v, err);
        *slot = (merge_slot){(uint32_t)l, (uint32_t)r, (uint32_t)i};
    }
    return 0;
}

/* An added token stands for its content as it is written, never for bytes of the alphabet. */
static int read_added(tok *t, const json_t *root, const json_t *model, dsv4_err *err) {
    json_t *added = json_object_get(root, "added_tokens"), *v, *id_value;
    json_t *vocab = json_object_get(model, "vocab");
    size_t i, n;
    if (!is_off(added) && !json_is_array(added)) return fail(err, "added_tokens is not an array");
    t->added = calloc(json_array_size(added) + 1, sizeof *t->added);
    if (!t->added) return oom(err);
    json_array_foreach(added, i, v) {
        const char *s;
        int lstrip = 0, rstrip = 0, single_word = 0, special = 0, normalized = -1;
        if (json_unpack(v, "{s:s%, s:o, s?b, s?b, s?b, s?b, s?b}", "content", &s, &n, "id",
                        &id_value, "special", &special, "normalized", &normalized, "lstrip",
                        &lstrip, "rstrip", &rstrip, "single_word", &single_word) ||
            n == 0 || n > MAX_ADDED_BYTES || lstrip || rstrip || single_word)
            return refuse("added_tokens: no content of 1 to 256 bytes, or one that takes what is "
                          "around it:", v, err);
        int32_t id = id_of(id_value);
        /* It may stand in vocab too, but then as the same id for the same bytes. */
        const json_t *in_vocab = json_object_get(vocab, s);
        const piece known = id < 0 ? (piece){0, 0} : t->pieces[id];
        bool same = id_of(in_vocab) == id && known.len == n && !memcmp(t->bytes + known.at, s, n);
        if (id < 0 || !(known.len ? same : !in_vocab))
            return refuse("added_tokens: an id that is none, contradicts vocab or comes twice:", v,
                          err);
        if (json_object_set(vocab, s, v)) return oom(err); /* no id: refused if it comes again */
        int pass = normalized < 0 ? !special : normalized;
        s = memcpy(t->bytes + t->n_bytes, s, n);
        place(t, id, n);
        t->added[t->n_added++] = (named){s, (uint32_t)n, id, pass};
        t->starts[pass][(unsigned char)*s] = t->lengths[n] = true;
    }
    qsort(t->added, t->n_added, sizeof *t->added, by_bytes);
    return 0;
}

/* Splits by V4's patterns in a Sequence that ends in ByteLevel, or ByteLevel alone.  What that
 * does to text, bytes to GPT-2's alphabet, is undone in the tables; its settings are true where
 * they are absent. */
static int read_pre_tokenizer(tok *t, const json_t *root, dsv4_err *err) {
    const json_t *step = json_object_get(root, "pre_tokenizer");
    const json_t *steps = json_object_get(step, "pretokenizers");
    size_t n = is_type(step, "Sequence") ? json_array_size(steps) : 0, at;
    for (size_t i = 0; i + 1 < n; i++) {
        const char *regex = text_at(json_object_get(step = json_array_get(steps, i), "pattern"),
                                    "Regex");
        buffer text = {0};
        int known = 0, code;
        while (known < N_PATTERNS && strcmp(regex, patterns[known])) known++;
        if (known == N_PATTERNS || i == N_PATTERNS || !is_type(step, "Split") ||
            strcmp(text_at(step, "behavior"), "Isolated") ||
            !is_off(json_object_get(step, "invert")))
            return refuse("pre_tokenizer: another step than V4's:", step, err);
        put_pattern(&text, regex);
        if (!text.failed)
            t->split[i] = pcre2_compile((PCRE2_SPTR)text.s, text.n, PCRE2_UTF, &code, &at, NULL);
        free(text.s);
        if (!t->split[i]) return oom(err);
        pcre2_jit_compile(t->split[i], PCRE2_JIT_COMPLETE); /* where it fails, it is interpreted */
    }
    if (n) step = json_array_get(steps, n - 1);
    if (is_type(step, "ByteLevel") && json_is_false(json_object_get(step, "use_regex")) &&
        json_is_false(json_object_get(step, "add_prefix_space"))) return 0;
    return refuse("pre_tokenizer: another end than V4's ByteLevel:", step, err);
}

int tok_parse(tok **out, const char *json, size_t len, const char *where, dsv4_err *err) {
    json_error_t why;
    *out = NULL;
    if (len > MAX_JSON_BYTES)
        return fail(err, "%s: %zu bytes, over the limit of %d", where, len, MAX_JSON_BYTES);
    json_t *root = json_loadb(json, len, JSON_REJECT_DUPLICATES, &why);
    const json_t *model = json_object_get(root, "model");
    tok *t = calloc(1, sizeof *t);
    int rc = !t ? oom(err) : !root ? fail(err, "line %d: %s", why.line, why.text) :
             check_settings(root, model, err) || read_vocab(t, model, len, err) ||
             read_merges(t, model, err) || read_added(t, root, model, err) ||
             read_pre_tokenizer(t, root, err) ? -1 : 0;
    json_decref(root);
#ifdef __GLIBC__
    malloc_trim(0);                /* the tree was 250,000 small blocks; glibc would keep them  */
#endif
    if (rc) {
        dsv4_err what = *err;
        tok_close(t);
        return fail(err, "%s: %s", where, what.msg);
    }
    *out = t;
    return 0;
}

static void read_stream(buffer *out, FILE *f, size_t most) {
    char part[1 << 16];
    size_t got;
    while (out->n <= most && !out->failed && (got = fread(part, 1, sizeof part, f)) > 0)
        put_bytes(out, part, got);
}

int read_file(buffer *out, const char *path, size_t most, dsv4_err *err) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rbe") : stdin;
    if (!f) return fail(err, "open %s: %s", path, strerror(errno));
    read_stream(out, f, most);
    int rc = ferror(f) ? fail(err, "read %s: %s", path, strerror(errno)) : 0;
    if (f != stdin) fclose(f);
    put_bytes(out, "", 1);
    if (out->failed) return fail(err, "out of memory for %s", path);
    out->n--;
    return rc;
}

int tok_open(tok **out, const char *dir, dsv4_err *err) {
    char path[4096];
    buffer json = {0};
    *out = NULL;
    if (snprintf(path, sizeof path, "%s/tokenizer.json", dir) >= (int)sizeof path)
        return fail(err, "%s: path is too long", dir);
    int rc = read_file(&json, path, MAX_JSON_BYTES, err)
             || tok_parse(out, json.s, json.n, path, err) ? -1 : 0;
    free(json.s);
    return rc;
}

/* === 5. Merging a word ========================================================================
 * A word is a list of symbols, at first one a byte, linked by place.  Ranks of some pairs:
 *
 *   l 40 o 70 w - e 12 r        the pair (e, r) has the lowest rank: it is merged
 *   l 40 o 70 w 90 er           its left neighbour now makes a new pair, (w, er)
 *   lo 55 w 90 er               and so on, until no pair has a rank
 *
 * A heap holds every pair as rank << 32 | place, so its top is the lowest rank, and the leftmost
 * of several.  A merge changes at most two pairs and pushes them anew.  Their old entries stay in
 * the heap; one whose rank is no longer its symbol's is stale and is skipped.  n symbols start
 * with n - 1 entries and each of at most n - 1 merges takes one and adds two: 2n are enough.    */

typedef struct {                   /* a part of the word that is being merged                   */
    int32_t id;
    uint32_t rank;                 /* of the pair that it makes with the next part, or NO_RANK  */
    uint32_t prev, next;           /* parts, or the word's length where there is none           */
} symbol;

typedef struct {                   /* one tok_encode                                            */
    const tok *t;
    const char *text;              /* all of it, valid UTF-8                                    */
    const size_t *cuts;            /* [n_cuts] as in a prompt: no added token touches these     */
    size_t n_cuts, cut[2];         /* and how many of them each pass has behind it              */
    id_list *ids;
    symbol *sym;                   /* [n_sym] of the word that is merged                        */
    uint64_t *heap;                /* [2 * n_sym] its pairs: rank << 32 | place                 */
    size_t n_sym, n_heap;
    pcre2_match_data *match;
    pcre2_match_context *limits;
    dsv4_err *err;
} encoder;

static void heap_push(encoder *e, uint64_t entry) {
    size_t i = e->n_heap++;
    for (; i > 0 && e->heap[(i - 1) / 2] > entry; i = (i - 1) / 2)
        e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = entry;
}

static uint64_t heap_pop(encoder *e) {
    uint64_t top = e->heap[0], last = e->heap[--e->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->n_heap; i = child) {
        if (child + 1 < e->n_heap && e->heap[child + 1] < e->heap[child]) child++;
        if (e->heap[child] >= last) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

/* Look up the pair of symbol i and the next one; if it has a rank, into the heap with it. */
static void offer_pair(encoder *e, uint32_t i, uint32_t n) {
    symbol *s = &e->sym[i];
    s->rank = s->next == n ? NO_RANK
              : merge_find(e->t, (uint32_t)s->id, (uint32_t)e->sym[s->next].id)->rank;
    if (s->rank != NO_RANK) heap_push(e, (uint64_t)s->rank << 32 | i);
}

/* The ids of one word, in O(len log len) and 32 bytes of memory a byte of it. */
static int word(encoder *e, const char *s, size_t len) {
    uint32_t n = (uint32_t)len;
    if (e->n_sym < len) {
        free(e->sym);
        free(e->heap);
        e->n_sym = len < 256 ? 256 : len;
        e->sym = malloc(e->n_sym * sizeof *e->sym);
        e->heap = malloc(e->n_sym * 2 * sizeof *e->heap);
        if (!e->sym || !e->heap) return oom(e->err);
    }
    assert(e->n_heap == 0);
    for (uint32_t i = n; i-- > 0; offer_pair(e, i, n)) /* symbol 0 has none before it: prev is n */
        e->sym[i] = (symbol){e->t->byte_id[(unsigned char)s[i]], NO_RANK, i ? i - 1 : n, i + 1};
    while (e->n_heap > 0) {
        uint64_t entry = heap_pop(e);
        uint32_t rank = (uint32_t)(entry >> 32), i = (uint32_t)entry;
        symbol *left = &e->sym[i];
        if (left->rank != rank) continue;
        symbol *right = &e->sym[left->next];
        left->id = e->t->merged[rank];
        left->next = right->next;
        right->rank = NO_RANK;     /* it is gone: its entries are stale                         */
        if (left->next != n) e->sym[left->next].prev = i;
        offer_pair(e, i, n);
        if (left->prev != n) offer_pair(e, left->prev, n);
    }
    for (uint32_t i = 0; i != n; i = e->sym[i].next)
        if (ids_push(e->ids, e->sym[i].id, e->err)) return -1;
    return 0;
}

/* === 6. Cutting text ==========================================================================
 * Each stage hands its pieces to the next one at once, so that no list of pieces is ever made:
 *   cut_added(pass 0) -> cut_added(pass 1) -> cut_regex(0) -> ... -> word()
 * The recursion is as deep as there are stages, whatever the text.                              */

/* Matches of split i, and what lies between them, go to split i + 1 ("Isolated").  Each piece is
 * a text of its own: a look-ahead such as \s+(?!\S) sees an end where the piece ends. */
static int cut_regex(encoder *e, int i, const char *s, size_t len) {
    if (i == N_PATTERNS || !e->t->split[i]) return word(e, s, len);
    for (size_t done = 0; done < len;) {
        int rc = pcre2_match(e->t->split[i], (PCRE2_SPTR)s, len, done, PCRE2_NO_UTF_CHECK, e->match,
                             e->limits);
        if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
            return fail(e->err, "tokenizer: error %d of PCRE2 in regex %d", rc, i);
        const size_t *span = pcre2_get_ovector_pointer(e->match);
        size_t from = rc < 0 ? len : span[0], to = rc < 0 ? len : span[1];
        if (from > done && cut_regex(e, i + 1, s + done, from - done)) return -1;
        if (to > from && cut_regex(e, i + 1, s + from, to - from)) return -1;
        done = to;
    }
    return 0;
}

/* The longest added token of this pass that the text starts with, or NULL. */
static const named *longest_added(const tok *t, int pass, const char *s, size_t len) {
    named text = {.s = s, .len = len < MAX_ADDED_BYTES ? (uint32_t)len : MAX_ADDED_BYTES};
    for (; text.len > 0; text.len--) {
        const named *found = !t->lengths[text.len] ? NULL
            : bsearch(&text, t->added, t->n_added, sizeof text, by_bytes);
        if (found && found->pass == pass) return found;
    }
    return NULL;
}

/* Added tokens of this pass become their ids, but for what would touch a cut; what lies between
 * them goes on, as one text.  Each pass goes from the left to the right, so all its calls together
 * look at each cut once. */
static int cut_added(encoder *e, int pass, const char *s, size_t len) {
    if (pass == 2) return cut_regex(e, 0, s, len);
    size_t base = (size_t)(s - e->text), *k = &e->cut[pass], done = 0;
    for (size_t i = 0; i < len;) {
        const named *added = NULL;
        size_t end = len;          /* of what is free at i                                      */
        while (*k < e->n_cuts && e->cuts[*k + 1] <= base + i) *k += 2;
        if (*k < e->n_cuts && e->cuts[*k] <= base + i) {
            i = e->cuts[*k + 1] - base;
            continue;
        }
        if (*k < e->n_cuts && e->cuts[*k] < base + len) end = e->cuts[*k] - base;
        for (; i < end && !added; i += !added)
            if (e->t->starts[pass][(unsigned char)s[i]])
                added = longest_added(e->t, pass, s + i, end - i);
        if (!added) continue;
        if (i > done && cut_added(e, pass + 1, s + done, i - done)) return -1;
        if (ids_push(e->ids, added->id, e->err)) return -1;
        done = i += added->len;
    }
    return done < len ? cut_added(e, pass + 1, s + done, len - done) : 0;
}

/* === 7. Encoding, decoding ==================================================================== */

int ids_push(id_list *l, int32_t id, dsv4_err *err) {
    if (l->n == l->cap) {
        size_t cap = 2 * l->cap + 64;
        int32_t *grown = realloc(l->id, cap * sizeof *grown);
        if (!grown) return oom(err);
        l->id = grown;
        l->cap = cap;
    }
    l->id[l->n++] = id;
    return 0;
}

static int encode(encoder *e, size_t len) {
    buffer repaired = {0};
    size_t before = e->ids->n;
    if (len > MAX_TEXT_BYTES)
        return fail(e->err, "text of %zu bytes is over the limit of %d", len, MAX_TEXT_BYTES);
    if (!utf8_valid(e->text, len)) {
        put_repaired(&repaired, e->text, len);
        e->text = repaired.s;
        len = repaired.n;
    }
    e->match = pcre2_match_data_create(1, NULL);
    e->limits = pcre2_match_context_create(NULL);
    int rc = e->match && e->limits && !repaired.failed ? 0 : oom(e->err);
    if (!rc) pcre2_set_match_limit(e->limits, UINT32_MAX); /* a long run takes many steps */
    if (!rc) rc = cut_added(e, 0, e->text, len);
    if (rc) e->ids->n = before;
    pcre2_match_context_free(e->limits);
    pcre2_match_data_free(e->match);
    free(e->heap);
    free(e->sym);
    free(repaired.s);
    return rc;
}

int tok_encode(const tok *t, const char *text, size_t len, bool special, id_list *out,
               dsv4_err *err) {
    const size_t all[2] = {0, SIZE_MAX}; /* where nothing may be special, all of it is cut out  */
    return encode(&(encoder){.t = t, .text = text, .cuts = all, .n_cuts = special ? 0 : 2,
                             .ids = out, .err = err}, len);
}

int prompt_encode(const tok *t, const prompt *p, id_list *out, dsv4_err *err) {
    static const char *const frame[] = {"<｜begin▁of▁sentence｜>", "<｜User｜>",
                                        "<｜Assistant｜>", "<think>", "</think>"};
    for (size_t i = 0; i < sizeof frame / sizeof *frame; i++)
        if (tok_special(t, frame[i]) < 0) return fail(err, "the tokenizer has no %s", frame[i]);
    assert(utf8_valid(p->text, p->len)); /* for what is repaired the cuts are not */
    return encode(&(encoder){.t = t, .text = p->text, .cuts = p->cuts, .n_cuts = p->n_cuts,
                             .ids = out, .err = err}, p->len);
}

int tok_n_ids(const tok *t) { return t->n_ids; }

const char *tok_bytes(const tok *t, int32_t id, size_t *len) {
    const piece p = id >= 0 && id < t->n_ids ? t->pieces[id] : (piece){0, 0};
    *len = p.len;
    return t->bytes + p.at;
}

int32_t tok_special(const tok *t, const char *content) {
    const named key = {.s = content, .len = (uint32_t)strlen(content)};
    const named *added = bsearch(&key, t->added, t->n_added, sizeof key, by_bytes);
    return added ? added->id : -1;
}

/* === 8. Writing JSON ==========================================================================
 * As Python's json.dumps(ensure_ascii=False) writes it, for the model was trained on that.       */

/* Of valid UTF-8 only what JSON wants escaped is. */
static void put_json_string(buffer *b, const char *s, size_t n) {
    static const char plain[] = "\"\\\n\r\t\b\f", escaped[] = "\"\\nrtbf";
    put_text(b, "\"");
    for (size_t i = 0; i < n; i++) {
        const char *short_form = s[i] ? strchr(plain, s[i]) : NULL;
        if (short_form) put_format(b, "\\%c", escaped[short_form - plain]);
        else if ((unsigned char)s[i] < ' ') put_format(b, "\\u%04x", (unsigned)s[i]);
        else put_bytes(b, s + i, 1);
    }
    put_text(b, "\"");
}

/* Python's repr: the fewest digits that give x again, with an exponent only when that is below
 * -4 or above 15. */
static void put_json_real(buffer *b, double x) {
    char s[40];
    int digits = 0;
    do {                           /* below a power of two the numbers are closer together, and */
        snprintf(s, sizeof s, "%.*e", digits, x); /* so the fewest digits may be a little above */
        if (strtod(s, NULL) != x) snprintf(s, sizeof s, "%.*Le", digits, x * (1 + 0x1p-54L));
    } while (++digits < 17 && strtod(s, NULL) != x);
    int exponent = (int)strtol(strchr(s, 'e') + 1, NULL, 10), decimals = digits - 1 - exponent;
    if (exponent >= -4 && exponent < 16)
        snprintf(s, sizeof s, "%.*f", decimals > 0 ? decimals : 1, x);
    put_text(b, s);
}

/* As deep as v, and jansson reads 2048 levels at most. */
static void put_json(buffer *b, json_t *v) {
    const char *key, *sep = "";
    char word[32];                 /* 17, true, null                                            */
    json_t *item;
    size_t i;
    if (json_is_string(v)) put_json_string(b, json_string_value(v), json_string_length(v));
    else if (json_is_real(v)) put_json_real(b, json_real_value(v));
    else if (json_is_array(v) || json_is_object(v)) put_text(b, json_is_array(v) ? "[" : "{");
    else put_bytes(b, word, json_dumpb(v, word, sizeof word, JSON_ENCODE_ANY));
    json_array_foreach(v, i, item) {
        put_text(b, i ? ", " : "");
        put_json(b, item);
    }
    json_object_foreach(v, key, item) {
        put_text(b, sep);
        put_json_string(b, key, strlen(key));
        put_text(b, ": ");
        put_json(b, item);
        sep = ", ";
    }
    put_text(b, json_is_array(v) ? "]" : json_is_object(v) ? "}" : "");
}

/* === 9. The prompt ============================================================================
 *   BOS [effort] { system [tools] [format] | <｜User｜> part { \n\n part } | reminder
 *                | <｜Assistant｜> [<think> reasoning] </think> content [calls] EOS }
 *       [<｜Assistant｜> (<think> | </think>)]   unless the last message is the assistant's */

#define EOS "<｜end▁of▁sentence｜>"
#define CALLS_OPEN "<｜DSML｜tool_calls>"
#define CALLS_CLOSE "</｜DSML｜tool_calls>"
#define INVOKE_OPEN "<｜DSML｜invoke name=\""
#define INVOKE_CLOSE "</｜DSML｜invoke>"
#define PARAMETER_OPEN "<｜DSML｜parameter name=\""
#define PARAMETER_TRUE "\" string=\"true\">"
#define PARAMETER_FALSE "\" string=\"false\">"
#define PARAMETER_CLOSE "</｜DSML｜parameter>"

static const char effort_first[] =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough "
    "in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\nExplicitly write out your entire deliberation process, documenting "
    "every intermediate step, considered alternative, and rejected hypothesis to ensure "
    "absolutely no assumption is left unchecked.\n\n";
static const char effort_0731[] =
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou MUST "
    "reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively "
    "decompose the problem into its most fundamental components, trace every causal chain to its "
    "root, and resolve the underlying cause rather than any surface symptom.\nDo not stop "
    "reasoning until you have independently verified the solution from multiple angles and are "
    "certain that no assumption remains unchecked and no error remains undiscovered.\n\n";
static const char first_tool[] =
    "\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question. You "
    "can invoke tools by writing a \"" CALLS_OPEN "\" block like the following:\n\n"
    CALLS_OPEN "\n" INVOKE_OPEN "$TOOL_NAME\">\n" PARAMETER_OPEN "$PARAMETER_NAME\" string=\"true|"
    "false\">$PARAMETER_VALUE" PARAMETER_CLOSE "\n...\n" INVOKE_CLOSE "\n"
    INVOKE_OPEN "$TOOL_NAME2\">\n...\n" INVOKE_CLOSE "\n" CALLS_CLOSE "\n\n"
    "String parameters should be specified as is and set `string=\"true\"`. For all other types "
    "(numbers, booleans, arrays, objects), pass the value in JSON format and set "
    "`string=\"false\"`.\n\nIf thinking_mode is enabled (triggered by <think>), you MUST output "
    "your complete reasoning inside <think>...</think> BEFORE any tool calls or final response."
    "\n\nOtherwise, output directly after </think> with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n%j";
static const char after_tools[] = "\n\nYou MUST strictly follow the above defined tool name and "
    "parameter schemas to invoke tool calls.\n";
static const char response_format[] =
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

typedef struct {
    buffer text, cuts;             /* cuts holds size_t                                         */
    const json_t *request, *messages;
    char *roles;                   /* [n_messages] the first letter of each role, and a 0       */
    uint64_t *results;             /* [n_messages] for put_turn()                               */
    char at[40];                   /* "messages[2].": the one that is being looked at           */
    const char *where;             /* `at`, or "" in the request itself                         */
    json_t *order;                 /* {id: place} of the last assistant's tool calls            */
    int rc;                        /* -1 once something was wrong                               */
    dsv4_err *err;
} writer;

/* Something in the request is malformed: the first such thing is told, by its path.  Writing goes
 * on, so that nobody need look, and is thrown away in the end. */
__attribute__((format(printf, 2, 3)))
static void wrong(writer *w, const char *fmt, ...) {
    char what[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    if (!w->rc) w->rc = fail(w->err, "%s%s", w->where, what);
}

/* A cut begins or ends here.  An empty one, or one that goes on where the last one ended, is two
 * equal places in a row: neither is kept. */
static void cut(writer *w) {
    size_t last = 0, n = w->cuts.n;
    if (n) memcpy(&last, w->cuts.s + n - sizeof last, sizeof last);
    if (n && last == w->text.n) w->cuts.n -= sizeof last;
    else put_bytes(&w->cuts, (const char *)&w->text.n, sizeof last);
}

/* Our own text; what others wrote stands where it says %s (a string) or %j (JSON, but of a string
 * the text), and in a cut.  Nothing else writes to a prompt. */
static void emit(writer *w, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    for (const char *p; (p = strchr(fmt, '%')); fmt = p + 2) {
        put_bytes(&w->text, fmt, (size_t)(p - fmt));
        json_t *v = p[1] == 'j' ? va_arg(args, json_t *) : NULL;
        cut(w);
        if (p[1] == 's') put_text(&w->text, va_arg(args, const char *));
        else if (json_is_string(v))
            put_bytes(&w->text, json_string_value(v), json_string_length(v));
        else put_json(&w->text, v);
        cut(w);
    }
    va_end(args);
    put_text(&w->text, fmt);
}

/* Message i, which errors now name. */
static const json_t *message_at(writer *w, size_t i) {
    snprintf(w->at, sizeof w->at, "messages[%zu].", i);
    w->where = w->at;
    return json_array_get(w->messages, i);
}

/* An array of the request or of a message, or nothing. */
static json_t *list_of(writer *w, const json_t *in, const char *key) {
    json_t *list = json_object_get(in, key);
    if (!is_off(list) && !json_is_array(list)) wrong(w, "%s is not an array", key);
    return list;
}

/* Text, nothing, or a list of parts. */
static void put_content(writer *w, const json_t *message, const char *key) {
    json_t *content = json_object_get(message, key), *part;
    size_t i;
    if (json_is_string(content)) emit(w, "%j", content);
    else if (content && !json_is_null(content) && !json_is_array(content))
        wrong(w, "%s is not text", key);
    json_array_foreach(content, i, part) {
        const char *field = is_type(part, "text") ? "text" : "type";
        json_t *text = json_object_get(part, field);
        if (!json_is_string(text)) wrong(w, "%s[%zu].%s is not text", key, i, field);
        emit(w, i ? "\n\n" : "");
        emit(w, strcmp(field, "text") == 0 ? "%j" : "[Unsupported %j]", text);
    }
}

/* One tool call.  Its arguments are an object or the JSON of one; other text stands for itself.
 * Strings are written bare, so that the model need not escape what it quotes from them. */
static void put_call(writer *w, const json_t *call, size_t i) {
    const json_t *function = json_object_get(call, "function");
    json_t *name = json_object_get(function, "name"), *value, *object;
    json_t *arguments = json_object_get(function, "arguments");
    const char *key, *sep = "", *text = json_string_value(arguments);
    if (!json_is_string(name)) wrong(w, "tool_calls[%zu].function.name is not text", i);
    if (arguments && !text && !json_is_null(arguments) && !json_is_object(arguments))
        wrong(w, "tool_calls[%zu].function.arguments is neither text nor an object", i);
    object = text ? json_loadb(text, json_string_length(arguments), JSON_ALLOW_NUL, NULL)
                  : json_incref(arguments);
    if (text && !json_is_object(object)) {
        json_decref(object);
        object = json_pack("{s:O}", "arguments", arguments);
        if (!object) w->rc = oom(w->err);
    }
    emit(w, INVOKE_OPEN "%j\">\n", name);
    json_object_foreach(object, key, value) {
        emit(w, sep);
        emit(w, json_is_string(value) ? PARAMETER_OPEN "%s" PARAMETER_TRUE "%j" PARAMETER_CLOSE
                                      : PARAMETER_OPEN "%s" PARAMETER_FALSE "%j" PARAMETER_CLOSE,
             key, value);
        sep = "\n";
    }
    emit(w, "\n" INVOKE_CLOSE);
    json_decref(object);
}

/* A past answer, as the model once wrote it; without `reasoning` as if it had not thought. */
static void put_assistant(writer *w, const json_t *message, bool reasoning) {
    json_t *calls = list_of(w, message, "tool_calls"), *call;
    size_t i;
    emit(w, reasoning ? "<｜Assistant｜><think>" : "<｜Assistant｜>");
    if (reasoning) put_content(w, message, "reasoning_content");
    emit(w, "</think>");
    put_content(w, message, "content");
    json_object_clear(w->order);   /* results belong to the calls just before them              */
    json_array_foreach(calls, i, call) {
        const char *id = text_at(call, "id");
        if (*id && json_object_set_new(w->order, id, json_integer((json_int_t)i)))
            w->rc = oom(w->err);
        emit(w, i ? "\n" : "\n\n" CALLS_OPEN "\n");
        put_call(w, call, i);
    }
    emit(w, json_array_size(calls) ? "\n" CALLS_CLOSE EOS : EOS);
}

/* A system message, or the empty one (NULL).  The first one carries what the request says. */
static void put_system(writer *w, const json_t *message, bool first) {
    json_t *format = first ? json_object_get(w->request, "response_format") : NULL, *tool;
    json_t *schema = json_object_get(json_object_get(format, "json_schema"), "schema");
    size_t n_tools = 0, i;
    put_content(w, message, "content");
    for (int own = !first; own < 2; own++) {
        w->where = own ? w->at : "";
        json_array_foreach(list_of(w, own ? message : w->request, "tools"), i, tool) {
            json_t *function = json_object_get(tool, "function");
            if (!json_is_object(function ? function : tool))
                wrong(w, "tools[%zu] is not an object", i);
            emit(w, n_tools++ ? "\n%j" : first_tool, function ? function : tool);
        }
    }
    emit(w, n_tools ? after_tools : "");
    if (is_off(format) || is_type(format, "text")) return;
    emit(w, response_format);
    if (is_type(format, "json_object")) emit(w, "{\"type\": \"object\"}");
    else emit(w, "%j", schema && is_type(format, "json_schema") ? schema : format);
}

static int by_value(const void *a, const void *b) {
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Messages [from, to) as one turn of the user.  Where the tools speak stays; which result stands
 * at which of these places goes by the order of the calls, those of no known call last. */
static void put_turn(writer *w, size_t from, size_t to) {
    size_t n = 0, next = 0;
    for (size_t i = from; i < to; i++) { /* place of its call << 32 | message */
        const char *id = text_at(json_array_get(w->messages, i), "tool_call_id");
        const json_t *place = json_object_get(w->order, id);
        uint64_t high = place ? (uint64_t)json_integer_value(place) : UINT32_MAX;
        if (w->roles[i] == 't') w->results[n++] = high << 32 | i;
    }
    qsort(w->results, n, sizeof *w->results, by_value);
    emit(w, "<｜User｜>");
    for (size_t i = from; i < to; i++) {
        bool tool = w->roles[i] == 't';
        emit(w, i > from ? "\n\n" : "");
        emit(w, tool ? "<tool_result>" : "");
        put_content(w, message_at(w, tool ? w->results[next++] & UINT32_MAX : i), "content");
        emit(w, tool ? "</tool_result>" : "");
    }
}

/* The place of the text that `in` has there among words, as choice() has it. */
static int chosen(writer *w, const json_t *in, const char *key, const char *words) {
    const char *word = text_at(in, key), *shown = *word && strlen(word) < 60 ? word : "...";
    int which = choice(words, word);
    if (which < 0) wrong(w, "%s \"%s\" is not one of %s", key, shown, words);
    return which;
}

/* How hard to think; false for not at all. */
static bool put_effort(writer *w, generation gen) {
    const json_t *thinking = json_object_get(w->request, "thinking");
    const json_t *effort = json_object_get(w->request, "reasoning_effort");
    bool think = !json_is_false(thinking) && !is_type(thinking, "disabled");
    if (think && !is_off(thinking) && !json_is_true(thinking) && !is_type(thinking, "enabled"))
        wrong(w, "thinking is neither a boolean nor of type enabled or disabled");
    if (!effort || json_is_null(effort)) return think;
    int i = chosen(w, w->request, "reasoning_effort",
                   "none, minimal, low, medium, high, xhigh, max");
    think &= i > 0;                /* "none"; up to "medium" there is nothing to say            */
    if (think && (i > 4 || (i == 4 && gen == GEN_0731)))
        emit(w, i > 4 && gen == GEN_0731 ? effort_0731 : effort_first);
    return think;
}

static void put_prompt(writer *w, generation gen, prompt *out) {
    size_t n = json_array_size(w->messages), last_turn = 0;
    bool tools = json_array_size(json_object_get(w->request, "tools")) > 0;
    /* Whether reasoning is kept depends on messages behind it, so all are looked at first. */
    if (n == 0) wrong(w, "messages is not an array with messages in it");
    for (size_t i = 0; i < n; i++) {
        const json_t *m = message_at(w, i);
        w->roles[i] = *text_at(m, "role");
        chosen(w, m, "role", "system, user, assistant, tool, developer, latest_reminder");
        if (strspn(w->roles + i, "utd")) last_turn = i;
        tools |= w->roles[i] == 's' && json_array_size(json_object_get(m, "tools")) > 0;
    }
    w->where = "";
    emit(w, "<｜begin▁of▁sentence｜>");
    bool think = put_effort(w, gen);
    const char *system = strchr(w->roles, 's');
    if (!system) put_system(w, NULL, true);
    for (size_t i = 0, turn; i < n && !w->rc; i += turn ? turn : 1) {
        const json_t *m = message_at(w, i);
        turn = strspn(w->roles + i, "utd");
        if (turn) {
            put_turn(w, i, i + turn);
        } else if (w->roles[i] == 's') {
            put_system(w, m, w->roles + i == system);
        } else if (w->roles[i] == 'a') {
            put_assistant(w, m, think && (tools || i >= last_turn));
        } else {
            emit(w, "<｜latest_reminder｜>");
            put_content(w, m, "content");
        }
    }
    out->answered = n > 0 && w->roles[n - 1] == 'a';
    out->think = think && !out->answered;
    if (!out->answered) emit(w, think ? "<｜Assistant｜><think>" : "<｜Assistant｜></think>");
}

int prompt_build(prompt *out, const struct json_t *request, generation gen, dsv4_err *err) {
    size_t n = json_array_size(json_object_get(request, "messages"));
    writer w = {.request = request, .messages = json_object_get(request, "messages"),
                .roles = calloc(n + 1, 1), .results = calloc(n + 1, sizeof *w.results),
                .where = "", .order = json_object(), .err = err};
    bool room = w.roles && w.results && w.order;
    *out = (prompt){0};
    if (room) put_prompt(&w, gen, out);
    if (!room || w.text.failed || w.cuts.failed) w.rc = oom(err);
    json_decref(w.order);
    free(w.results);
    free(w.roles);
    out->text = w.text.s;
    out->len = w.text.n;
    out->cuts = (size_t *)(void *)w.cuts.s;
    out->n_cuts = w.cuts.n / sizeof *out->cuts;
    if (w.rc) prompt_free(out);
    return w.rc;
}

void prompt_free(prompt *p) {
    free(p->text);
    free(p->cuts);
    *p = (prompt){0};
}

struct json_t *prompt_message(const char *role_name, const char *text, size_t len) {
    buffer repaired = {0};
    put_repaired(&repaired, text, len);
    json_t *message = NULL;
    if (!repaired.failed)
        message = json_pack("{s:s, s:s%}", "role", role_name, "content",
                            repaired.n ? repaired.s : "", repaired.n);
    free(repaired.s);
    return message;
}

/* === 10. The answer ===========================================================================
 *   "Text.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="sh">\n ... </｜DSML｜invoke>\n ..."
 *    CONTENT  ------ held --------- INVOKE ---------------- PARAMETER, VALUE ...  INVOKE
 * Bytes are taken one by one, so that no split of them can show.  What may yet turn out to be
 * structure is held.  When it is not, all up to the end of the last whole tag is content, and the
 * few bytes behind it are looked at once more; these hold no '<' but their first and maybe their
 * last, so nothing is ever looked at a third time.                                               */

typedef enum { DIFFERS, BEGINS, WHOLE } likeness;

/* Is word what the n bytes at s start with, or may it be once there are more? */
static likeness like(const char *s, size_t n, const char *word) {
    size_t len = strlen(word);
    return memcmp(s, word, n < len ? n : len) ? DIFFERS : n < len ? BEGINS : WHOLE;
}

static bool ends(const char *s, size_t n, const char *word) {
    size_t len = strlen(word);
    return n >= len && memcmp(s + n - len, word, len) == 0;
}

static bool is_white(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

void stop_push(stop_filter *f, const char *bytes, size_t len, buffer *out) {
    size_t i = 0;
    do {
        if (i < len && !f->hit) f->held[f->n_held++] = bytes[i];
        while (f->n_held > 0) {    /* the same again from each place, until one may be a word   */
            likeness is, best = DIFFERS;
            for (int k = 0; k < f->n_words; k++)
                if ((is = like(f->held, f->n_held, f->words[k])) > best) best = is;
            f->hit = best == WHOLE;
            if (f->hit) f->n_held = 0;
            if (f->hit || (best == BEGINS && len > 0)) break;
            put_bytes(out, f->held, 1);
            memmove(f->held, f->held + 1, --f->n_held);
        }
    } while (++i < len);
}

struct answer {
    enum { REASONING, CONTENT, INVOKE, PARAMETER, VALUE } state; /* the last three: in a block  */
    buffer held;                   /* what is not certain; in a block, all since the last call  */
    buffer out;                    /* certain, not handed over yet                              */
    buffer arguments;              /* of the call that is being read                            */
    size_t item, tag;              /* in held: behind the last whole tag; and its white space   */
    size_t invoke, name_len;       /* in held: a call; how long its name is                     */
    bool string, called;           /* the value is text, not JSON; this block gave a call       */
    answer_fn each;
    void *arg;
};

int answer_open(answer **out, bool think, answer_fn each, void *arg, dsv4_err *err) {
    *out = malloc(sizeof **out);
    if (!*out) return oom(err);
    **out = (answer){.state = think ? REASONING : CONTENT, .each = each, .arg = arg};
    return 0;
}

void answer_close(answer *a) {
    if (!a) return;
    free(a->held.s);
    free(a->out.s);
    free(a->arguments.s);
    free(a);
}

/* Call back with what is certain; before the state changes, for that decides what it is. */
static void hand_over(answer *a) {
    answer_kind kind = a->state == REASONING ? ANSWER_REASONING : ANSWER_CONTENT;
    if (a->out.n) a->each(a->arg, &(answer_piece){.kind = kind, .text = a->out.s, .len = a->out.n});
    a->out.n = 0;
}

/* The first n bytes that are held are certain. */
static void release(answer *a, size_t n) {
    put_bytes(&a->out, a->held.s, n);
    a->held.n -= n;
    if (a->held.n) memmove(a->held.s, a->held.s + n, a->held.n);
}

/* Outside of a block: what cannot begin anything goes out.  Only the last byte can have made
 * something whole, for this is asked at each. */
static void settle(answer *a) {
    likeness is = DIFFERS;
    size_t at = 0;
    for (; at < a->held.n; at++) {
        const char *s = a->held.s + at;
        size_t n = a->held.n - at;
        is = like(s, n, a->state == REASONING ? "</think>" : CALLS_OPEN);
        if (!is && a->state == CONTENT) is = like(s, n, "\n\n" CALLS_OPEN);
        if (!is && n <= strlen(EOS) && like(s, n, EOS)) is = BEGINS; /* maybe the very end */
        if (is) break;
    }
    release(a, at);
    if (is != WHOLE) return;
    if (a->state == REASONING) {
        hand_over(a);
        a->state = CONTENT;
        a->held.n = 0;
    } else {
        a->state = INVOKE;
        a->item = a->tag = a->held.n;
        a->called = false;
    }
}

/* The last byte ended a value. */
static void end_value(answer *a) {
    const char *s = a->held.s + a->tag;
    size_t n = a->held.n - a->tag - strlen(PARAMETER_CLOSE), from = 0, to = n;
    /* Integers are looked at as reals, so that they may have more than 64 bits. */
    size_t flags = JSON_DECODE_ANY | JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL;
    while (from < to && is_white(s[from])) from++;
    while (to > from && is_white(s[to - 1])) to--;
    json_t *json = a->string ? NULL : json_loadb(s + from, to - from, flags, NULL);
    if (json) put_bytes(&a->arguments, s + from, to - from);
    else put_json_string(&a->arguments, s, n);
    json_decref(json);
    a->state = PARAMETER;
}

/* An opening tag is whole; s [n] is what follows its name=".  Is it right? */
static bool end_open_tag(answer *a, const char *s, size_t n) {
    a->string = a->state == PARAMETER && ends(s, n, PARAMETER_TRUE);
    const char *close = a->state == INVOKE ? "\">" : a->string ? PARAMETER_TRUE : PARAMETER_FALSE;
    if (!ends(s, n, close)) return false;
    n -= strlen(close);
    if (memchr(s, '"', n) || (a->state == INVOKE && n == 0)) return false;
    if (a->state == INVOKE) {
        a->invoke = a->tag;
        a->name_len = n;
        a->arguments.n = 0;
        put_text(&a->arguments, "{");
        a->state = PARAMETER;
    } else {
        put_text(&a->arguments, a->arguments.n > 1 ? ", " : "");
        put_json_string(&a->arguments, s, n);
        put_text(&a->arguments, ": ");
        a->state = VALUE;
    }
    return true;
}

/* A closing tag is whole: of a call, or of the block.  A block without a call is none. */
static bool end_close_tag(answer *a) {
    if (a->state == INVOKE && !a->called) return false;
    a->called = a->state == PARAMETER;
    a->state = a->called ? INVOKE : CONTENT;
    put_text(&a->arguments, "}");
    hand_over(a);
    if (a->called && !a->arguments.failed)
        a->each(a->arg, &(answer_piece){
            ANSWER_CALL, a->arguments.s, a->arguments.n,
            a->held.s + a->invoke + strlen(INVOKE_OPEN), a->held.s + a->invoke, a->name_len,
            a->held.n - a->invoke});
    a->held.n = 0;
    return true;
}

/* In a block, one more byte. */
static void block_byte(answer *a) {
    const char *open = a->state == INVOKE ? INVOKE_OPEN : PARAMETER_OPEN;
    const char *close = a->state == INVOKE ? CALLS_CLOSE : INVOKE_CLOSE;
    const char *s = a->held.s + a->tag, last = a->held.s[a->held.n - 1];
    size_t n = a->held.n - a->tag, name = strlen(open);
    bool right = false;
    if (a->state == VALUE) {       /* its closing tag is looked for only where '>' comes        */
        if (last != '>' || !ends(s, n, PARAMETER_CLOSE)) return;
        end_value(a);
        right = true;
    } else if (n == 1 && is_white(*s)) {
        a->tag++;
        return;
    } else if (like(s, n, close) == WHOLE) {
        right = end_close_tag(a);
    } else if (like(s, n, open) == WHOLE) {
        if (last != '<' && last != '>') return; /* in the name */
        right = last == '>' && end_open_tag(a, s + name, n - name);
    } else if (like(s, n, close) || like(s, n, open) || (like(s, n, EOS) && n <= strlen(EOS))) {
        return;
    }
    if (right) {
        a->item = a->tag = a->held.n;
    } else {                       /* no block after all                                        */
        release(a, a->item);
        a->state = CONTENT;
        settle(a);
    }
}

static int answer_check(const answer *a, dsv4_err *err) {
    return a->held.failed || a->out.failed || a->arguments.failed ? oom(err) : 0;
}

/* Once there was no memory, the answer is of no more use: indices may point to what is not held. */
int answer_push(answer *a, const char *bytes, size_t len, dsv4_err *err) {
    for (size_t i = 0; i < len; i++) {
        put_bytes(&a->held, bytes + i, 1);
        if (answer_check(a, err)) return -1;
        if (a->state == REASONING || a->state == CONTENT) settle(a);
        else block_byte(a);
    }
    hand_over(a);
    return 0;
}

int answer_end(answer *a, dsv4_err *err) {
    if (ends(a->held.s, a->held.n, EOS)) a->held.n -= strlen(EOS);
    /* A block that was not closed: its calls stand, and so does nothing else. */
    if (a->state == INVOKE && a->called && a->tag == a->held.n) a->held.n = 0;
    release(a, a->held.n);
    hand_over(a);
    return answer_check(a, err);
}

/* === 11. Documents ============================================================================
 * A file of any kind as UTF-8 text: PDF by the program pdftotext, HTML by libxml2's parser, else as
 * it is.  What a file is shows in its first bytes, not in its name.                              */

/* Append n bytes of `charset`, whose characters have `unit` bytes at least, as UTF-8. */
static int put_converted(buffer *out, const char *bytes, size_t n, const char *charset, size_t unit,
                         dsv4_err *err) {
    char *at = (char *)(uintptr_t)bytes, part[4096];
    iconv_t cd = iconv_open("UTF-8", charset);
    if (cd == (iconv_t)-1) return fail(err, "iconv does not know the charset %s", charset);
    while (n > 0) {
        char *to = part;
        size_t room = sizeof part, rc = iconv(cd, &at, &n, &to, &room);
        put_bytes(out, part, sizeof part - room);
        if (rc != (size_t)-1 || errno == E2BIG) continue;
        put_text(out, "\xef\xbf\xbd");             /* a broken character, or the start of one */
        at += n < unit ? n : unit;
        n -= n < unit ? n : unit;
    }
    iconv_close(cd);
    return 0;
}

static bool starts_with(const buffer *b, const char *s) {
    size_t n = strlen(s);
    return b->n >= n && !strncasecmp(b->s, s, n);
}

/* Append a file's bytes as UTF-8.  Those of no charset that we can know are Latin-1, as Windows
 * writes it, unless most of what is no ASCII is UTF-8 nevertheless: then the rest is broken. */
static int put_decoded(buffer *out, const buffer *in, const char **note, dsv4_err *err) {
    size_t good = 0, bad = 0, bom = starts_with(in, "\xef\xbb\xbf") ? 3 : 0;
    if (starts_with(in, "\xff\xfe") || starts_with(in, "\xfe\xff"))
        return put_converted(out, in->s, in->n, "UTF-16", 2, err);
    for (size_t i = 0, len; i < in->n; i += len) {
        ch_state state;
        len = utf8_char((unsigned char *)in->s + i, in->n - i, &state);
        good += state == CH_WHOLE && len > 1;
        bad += state != CH_WHOLE;
    }
    if (bad) *note = good > bad ? "some bytes of it are no UTF-8 and became U+FFFD"
                                : "it is not UTF-8 and was read as Latin-1";
    if (bad && good <= bad) return put_converted(out, in->s, in->n, "CP1252", 1, err);
    put_repaired(out, in->s + bom, in->n - bom);
    return 0;
}

/* --- HTML */

typedef struct { buffer *out; int hidden, pre; } html_text;

static bool one_of(const char *names, const xmlChar *name) {
    return choice(names, (const char *)name) >= 0;
}

static const char html_hides[] = "script style noscript template svg";
static const char html_breaks[] =
    "title body p div section article header footer main aside nav figure figcaption form h1 h2 h3 "
    "h4 h5 h6 ul ol dl table blockquote pre hr address details summary";

/* End the line, and with n = 2 the paragraph. */
static void html_gap(buffer *out, size_t n) {
    size_t ends = 0;
    for (; out->n && strchr(" \n", out->s[out->n - 1]); out->n--)
        ends += out->s[out->n - 1] == '\n';
    if (out->n) put_bytes(out, "\n\n", ends > n ? 2 : n);
}

static void html_start(void *arg, const xmlChar *name, const xmlChar **attributes) {
    html_text *h = arg;
    (void)attributes;
    h->hidden += one_of(html_hides, name);
    h->pre += one_of("pre", name);
    if (one_of(html_breaks, name)) html_gap(h->out, 2);
    else if (one_of("br li tr dt dd", name)) html_gap(h->out, 1);
    if (one_of("li", name)) put_text(h->out, "- ");
    if (one_of("td th", name) && h->out->n && h->out->s[h->out->n - 1] != '\n')
        put_text(h->out, " | ");
}

static void html_end(void *arg, const xmlChar *name) {
    html_text *h = arg;
    h->hidden -= one_of(html_hides, name) && h->hidden;
    h->pre -= one_of("pre", name) && h->pre;
    if (one_of(html_breaks, name)) html_gap(h->out, 2);
}

static void html_characters(void *arg, const xmlChar *text, int len) {
    html_text *h = arg;
    for (int i = 0; i < len && !h->hidden; i++) {
        bool white = strchr(" \t\n\r\f", text[i]) && text[i], first = !h->out->n;
        char last = first ? '\n' : h->out->s[h->out->n - 1];
        if (h->pre || !white) put_bytes(h->out, (const char *)text + i, 1);
        else if (last != ' ' && last != '\n') put_text(h->out, " ");
    }
}

/* Append the text of HTML that is UTF-8. */
static int put_html(buffer *out, const buffer *html, dsv4_err *err) {
    html_text h = {.out = out};
    htmlSAXHandler sax = {.startElement = html_start, .endElement = html_end,
                          .characters = html_characters, .ignorableWhitespace = html_characters};
    htmlParserCtxtPtr p = htmlCreatePushParserCtxt(&sax, &h, NULL, 0, NULL, XML_CHAR_ENCODING_UTF8);
    if (!p) return fail(err, "out of memory for HTML");
    htmlCtxtUseOptions(p, HTML_PARSE_NOERROR | HTML_PARSE_NOWARNING | HTML_PARSE_IGNORE_ENC);
    (void)htmlParseChunk(p, html->s, (int)html->n, 1);     /* of broken HTML, what there is */
    htmlFreeParserCtxt(p);
    return 0;
}

/* --- PDF */

/* The file is handed to pdftotext in memory: its name may be anything, or it was a pipe. */
static int put_pdf(buffer *out, const buffer *pdf, dsv4_err *err) {
    char command[128];
    int fd = memfd_create("dsv4-pdf", 0);
    bool written = fd >= 0 && write(fd, pdf->s, pdf->n) == (ssize_t)pdf->n;
    snprintf(command, sizeof command, "pdftotext -q -enc UTF-8 /proc/self/fd/%d - 2>/dev/null", fd);
    FILE *in = written ? popen(command, "re") : NULL;
    if (!in) fail(err, "run pdftotext: %s", strerror(errno));
    if (in) read_stream(out, in, DOC_BYTES);
    int status = in ? pclose(in) : -1;
    if (fd >= 0) close(fd);
    if (!in) return -1;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        return fail(err, "it is a PDF: install pdftotext (Debian: poppler-utils)");
    if (status) return fail(err, "pdftotext does not read it (status %d)", status);
    for (size_t i = 0; i < out->n; i++)
        if (out->s[i] == '\f') out->s[i] = '\n';           /* between pages */
    return 0;
}

/* --- files */

/* Lines end by \n alone; what has NULs or no words is no text. */
static int tidy(buffer *b, dsv4_err *err) {
    size_t n = 0, words = 0;
    for (size_t i = 0; i < b->n; i++) {
        char c = b->s[i];
        if (!c) return fail(err, "byte %zu is a NUL: no text, or UTF-16 without its mark", i);
        if (c == '\r' && i + 1 < b->n && b->s[i + 1] == '\n') continue;
        words += !isspace((unsigned char)c);
        b->s[n++] = c;
    }
    b->n = n;
    return words ? 0 : fail(err, "there is no text in it");
}

static int doc_decode(buffer *out, const buffer *raw, const char **note, dsv4_err *err) {
    buffer html = {0};
    if (raw->n > DOC_BYTES) return fail(err, "over %d MB: split it", DOC_BYTES >> 20);
    if (!raw->n) return fail(err, "it is empty");
    if (starts_with(raw, "%PDF-")) {
        if (put_pdf(out, raw, err)) return -1;
        return tidy(out, err) ? fail(err, "there is no text in this PDF: a scan needs OCR first")
                              : 0;
    }
    if (put_decoded(out, raw, note, err)) return -1;
    html = *out;
    while (html.n && isspace((unsigned char)*html.s)) html.s++, html.n--;
    if (starts_with(&html, "<!doctype html") || starts_with(&html, "<html")) {
        html = *out;
        *out = (buffer){0};
        int rc = put_html(out, &html, err);
        free(html.s);
        if (rc) return rc;
    }
    return tidy(out, err);
}

int doc_read(buffer *out, const char *path, const char **note, dsv4_err *err) {
    buffer raw = {0}, text = {0};
    dsv4_err why;
    *note = NULL;
    if (read_file(&raw, path, DOC_BYTES, err)) return free(raw.s), -1;
    int rc = doc_decode(&text, &raw, note, &why);
    if (text.failed) rc = fail(&why, "out of memory");     /* a part of it is no document */
    if (!rc) put_bytes(out, text.s, text.n);
    free(raw.s);
    free(text.s);
    return rc ? fail(err, "%s: %s", strcmp(path, "-") ? path : "stdin", why.msg) : 0;
}

/* --- parts */

/* How good is it to cut before byte i?  4: behind a paragraph, then a line, a sentence, a word, a
 * character; -1: within one. */
static int cut_rank(const char *s, size_t i) {
    char last = s[i - 1], before = i > 1 ? s[i - 2] : 0;
    if (((unsigned char)s[i] & 0xc0) == 0x80) return -1;
    if (last == '\n') return before == '\n' ? 4 : 3;
    return last != ' ' ? 0 : before && strchr(".!?", before) ? 2 : 1;
}

/* Where to end the part that begins at s[0]: between lo and hi bytes, as near to aim as may be. */
static size_t cut_place(const char *s, size_t lo, size_t aim, size_t hi) {
    size_t at = hi;
    int best = -2;
    for (size_t i = hi; i >= lo && i > 0; i--) {
        int rank = cut_rank(s, i);
        bool nearer = (i > aim ? i - aim : aim - i) < (at > aim ? at - aim : aim - at);
        if (rank > best || (rank == best && nearer)) at = i, best = rank;
    }
    return at;
}

int doc_cut(const tok *t, const char *text, size_t len, int64_t most, doc_parts *out,
            dsv4_err *err) {
    id_list ids = {0};
    size_t first = 0, at = 0, sum = 0, bytes;      /* of the part: its first token and byte */
    int rc = 0;
    assert(most > 0 && len <= DOC_BYTES);
    *out = (doc_parts){0};
    if (tok_encode(t, text, len, false, &ids, err)) return -1;
    out->n_tokens = (int64_t)ids.n;
    for (size_t i = 0; i < ids.n; i++) {           /* from here on, where each token ends */
        (void)tok_bytes(t, ids.id[i], &bytes);
        ids.id[i] = (int32_t)(sum += bytes);
    }
    while (at < len && !rc) {
        size_t left = ids.n - first, n = (left + (size_t)most - 1) / (size_t)most;
        size_t target = n ? (left + n - 1) / n : 0;
        if (n < 2) at = len;
        else at += cut_place(text + at, (size_t)ids.id[first + target - target / 4 - 1] - at,
                             (size_t)ids.id[first + target - 1] - at,
                             (size_t)ids.id[first + (size_t)most - 1] - at);
        while (first < ids.n && (size_t)ids.id[first] <= at) first++;
        size_t *grown = realloc(out->end, (size_t)(out->n + 1) * sizeof *grown);
        if (!grown) rc = fail(err, "out of memory for parts");
        if (grown) out->end = grown, grown[out->n++] = at;
    }
    free(ids.id);
    return rc;
}
