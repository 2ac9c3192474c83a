/* test_doc.c -- documents: bytes of any kind to text, and text to parts.
 *
 * Goal: what a file is shows in its bytes; its text comes out whole and nothing else does; parts
 * end where a reader would pause, are together the text, and none is too long.
 * Method: tables of small files; cutting by a tokenizer that has an id a byte, on random text.   */
#include "../dsv4.h"
#include "check.h"

#include <unistd.h>

static char doc_path[] = "/tmp/dsv4-doc-XXXXXX";

static int read_bytes(buffer *out, const char *bytes, size_t n, const char **note, dsv4_err *err) {
    FILE *f = fopen(doc_path, "wb");
    CHECK(f && fwrite(bytes, 1, n, f) == n, "cannot write %s", doc_path);
    if (f) fclose(f);
    return doc_read(out, doc_path, note, err);
}

typedef struct { const char *bytes; size_t n; const char *want, *note; } doc_case;
#define DOC(bytes, want, note) {bytes, sizeof bytes - 1, want, note}

static void check_docs(const doc_case *c, size_t n) {
    for (size_t i = 0; i < n; i++, c++) {
        buffer out = {0};
        const char *note = NULL;
        dsv4_err err = {""};
        put_text(&out, "<html>before\f");      /* what is there already is left as it is */
        int rc = read_bytes(&out, c->bytes, c->n, &note, &err);
        put_bytes(&out, "", 1);
        CHECK(rc == 0, "case %zu: %s", i, err.msg);
        CHECK(!strcmp(out.s + 13, c->want), "case %zu: \"%s\"", i, out.s + 13);
        CHECK(c->note ? note && strstr(note, c->note) : !note, "case %zu: note %s", i,
              note ? note : "none");
        free(out.s);
    }
}

static void test_doc_charsets(void) {
    static const doc_case cases[] = {
        DOC("plain\r\ntext\r\n", "plain\ntext\n", NULL),
        DOC("a\rb", "a\rb", NULL),
        DOC("\xef\xbb\xbfmit BOM \xc3\xbc", "mit BOM \xc3\xbc", NULL),
        DOC("\xff\xfeG\0r\0\xfc\0\xdf\0=\xd8\x00\xde", "Gr\xc3\xbc\xc3\x9f\xf0\x9f\x98\x80", NULL),
        DOC("\xfe\xff\0G\0\xfc", "G\xc3\xbc", NULL),
        DOC("\xff\xfeG\0\x00\xdcx\0", "G\xef\xbf\xbdx", NULL),     /* half of a pair */
        DOC("\xff\xfeG\0r", "G\xef\xbf\xbd", NULL),                /* half of a character */
        DOC("Gr\xfc\xdf \x93quoted\x94 \x81", "Gr\xc3\xbc\xc3\x9f \xe2\x80\x9cquoted\xe2\x80\x9d "
            "\xef\xbf\xbd", "Latin-1"),
        DOC("\xc3\xbc \xe2\x82\xac \xf0\x9f\x98", "\xc3\xbc \xe2\x82\xac \xef\xbf\xbd", "U+FFFD"),
    };
    check_docs(cases, sizeof cases / sizeof *cases);
}

static void test_doc_html(void) {
    static const doc_case cases[] = {
        DOC("<!DOCTYPE html><title>A &amp; B</title><style>p {}</style><p>One\n  two<p>Three "
            "<b>bold</b>ly <script>if (a < b) x();</script>four", "A & B\n\nOne two\n\nThree "
            "boldly four\n\n", NULL),
        DOC("  <HTML><body><ul><li>a<li>b</ul><table><tr><td>1<td>2<tr><th>3</table>",
            "- a\n- b\n\n1 | 2\n3\n\n", NULL),
        DOC("<html><pre>x\n  y</pre>caf&eacute; &#8364; &#x20ac; &nosuch; 1<br>2",
            "x\n  y\n\ncaf\xc3\xa9 \xe2\x82\xac \xe2\x82\xac &nosuch; 1\n2\n\n", NULL),
        DOC("<html><meta charset=iso-8859-5><p>\xb0\xb1", "\xc2\xb0\xc2\xb1\n\n", "Latin-1"),
        DOC("<html><meta charset=iso-8859-5><p>\xc3\xbc", "\xc3\xbc\n\n", NULL), /* it is UTF-8 */
        DOC("<html><p>open <i>and <b>never closed", "open and never closed\n\n", NULL),
        DOC("no <b>HTML</b>", "no <b>HTML</b>", NULL),
    };
    check_docs(cases, sizeof cases / sizeof *cases);
}

static void test_doc_html_however_deep(void) {
    buffer html = {0}, out = {0};
    const char *note;
    dsv4_err err = {""};
    put_text(&html, "<!doctype html>");
    for (int i = 0; i < 200000; i++) put_text(&html, "<div><b>");
    put_text(&html, "deep");
    int rc = read_bytes(&out, html.s, html.n, &note, &err);
    CHECK(rc == 0 || strstr(err.msg, "no text"), "%s", err.msg);
    free(html.s);
    free(out.s);
}

static void test_doc_refuses_by_name(void) {
    static const struct { const char *bytes; size_t n; const char *why; } cases[] = {
        {"", 0, "it is empty"}, {"a\0b", 3, "byte 1 is a NUL"}, {" \n\t", 3, "no text"},
        {"\xff\xfe\0\0a\0\0\0", 8, "NUL"}, {"<html><script>x</script>", 24, "no text"},
    };
    const char *note;
    dsv4_err err;
    buffer out = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int rc = read_bytes(&out, cases[i].bytes, cases[i].n, &note, &err);
        CHECK(rc == -1 && strstr(err.msg, cases[i].why) && strstr(err.msg, doc_path),
              "case %zu: %s", i, rc ? err.msg : "taken");
        CHECK(out.n == 0, "case %zu left %zu bytes", i, out.n);
    }
    CHECK(truncate(doc_path, (off_t)1 << 30) == 0, "truncate");
    CHECK(doc_read(&out, doc_path, &note, &err) == -1 && strstr(err.msg, "split it"), "%s",
          err.msg);
    CHECK(doc_read(&out, "/tmp", &note, &err) == -1 && strstr(err.msg, "directory"), "%s", err.msg);
    CHECK(doc_read(&out, "/nowhere/x", &note, &err) == -1 && strstr(err.msg, "No such file"), "%s",
          err.msg);
    free(out.s);
}

/* One id a byte. */
static tok *byte_tok(void) {
    buffer json = {0};
    dsv4_err err = {""};
    tok *t = NULL;
    put_text(&json, "{\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                    "\"use_regex\": false}, \"decoder\": {\"type\": \"ByteLevel\"}, "
                    "\"added_tokens\": [], \"model\": {\"type\": \"BPE\", \"merges\": [], "
                    "\"vocab\": {");
    for (int b = 0, next = 256; b < 256; b++) {
        bool same = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        put_format(&json, "%s\"\\u%04x\": %d", b ? ", " : "", same ? b : next++, b);
    }
    put_text(&json, "}}}");
    CHECK(tok_parse(&t, json.s, json.n, "bytes", &err) == 0, "%s", err.msg);
    free(json.s);
    return t;
}

static void test_doc_parts_end_where_one_pauses(void) {
    static const struct { const char *text; int most; const char *first; } cases[] = {
        {"short", 5, "short"},
        {"aaaa bbbb.\n\ncccc dddd\nee", 20, "aaaa bbbb.\n\n"},
        {"aaaa bbbb cc\ndd eeee ffff", 20, "aaaa bbbb cc\n"},
        {"aaaa bbbb. cc dd eeee ff", 20, "aaaa bbbb. "},
        {"aaaa bbbb cccc dddd eeee", 20, "aaaa bbbb "},
        {"aaaaaaaaaaaaaaaaaaaaaaaa", 20, "aaaaaaaaaaaa"},
        {"\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc", 11, "\xc3\xbc\xc3\xbc\xc3\xbc"},
    };
    tok *t = byte_tok();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        doc_parts p = {0};
        dsv4_err err = {""};
        size_t n = strlen(cases[i].text);
        int rc = doc_cut(t, cases[i].text, n, cases[i].most, &p, &err);
        CHECK(rc == 0 && p.n > 0, "case %zu: %s", i, err.msg);
        CHECK(p.n_tokens == (int64_t)n, "case %zu: %lld tokens", i, (long long)p.n_tokens);
        CHECK(p.n > 0 && p.end[0] == strlen(cases[i].first), "case %zu: the first part has %zu", i,
              p.n > 0 ? p.end[0] : 0);
        free(p.end);
    }
    tok_close(t);
}

static void test_doc_parts_are_the_text_and_none_is_too_long(void) {
    tok *t = byte_tok();
    uint64_t rng = 1;
    for (int round = 0; round < 300; round++) {
        char text[2000];
        doc_parts p = {0};
        dsv4_err err = {""};
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        size_t n = rng >> 33, most = 10 + (rng >> 20) % 300, fewest, last = 0;
        n = n % sizeof text + 1;
        for (size_t i = 0; i < n; i++) {
            rng = rng * 6364136223846793005u + 1442695040888963407u;
            text[i] = "abcde. .\n\n"[(rng >> 33) % 10];
        }
        CHECK(doc_cut(t, text, n, (int64_t)most, &p, &err) == 0, "%s", err.msg);
        fewest = (n + most - 1) / most;
        CHECK((size_t)p.n >= fewest && (size_t)p.n <= fewest * 3 / 2 + 1, "%d parts of %zu", p.n,
              fewest);
        for (int i = 0; i < p.n; last = p.end[i++])
            CHECK(p.end[i] > last && p.end[i] - last <= most, "part %d has %zu of %zu", i,
                  p.end[i] - last, most);
        CHECK(last == n, "the parts have %zu of %zu bytes", last, n);
        free(p.end);
    }
    tok_close(t);
}

int main(void) {
    int fd = mkstemp(doc_path);
    CHECK(fd >= 0, "mkstemp");
    RUN(test_doc_charsets);
    RUN(test_doc_html);
    RUN(test_doc_html_however_deep);
    RUN(test_doc_refuses_by_name);
    RUN(test_doc_parts_end_where_one_pauses);
    RUN(test_doc_parts_are_the_text_and_none_is_too_long);
    close(fd);
    unlink(doc_path);
    return check_done();
}
