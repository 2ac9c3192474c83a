/* tokenize.c -- text.c as a filter, for test_tokenizer.py: one process, thousands of strings.
 *
 *   tokenize DIR encode|encode-special|decode  < records  > records
 *
 * A record is a u32 length, little-endian, and that many bytes.  encode reads text and writes u32
 * count and the ids as u32; decode reads ids as u32 and writes a record of UTF-8.
 */
#include "../dsv4.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put_u32(uint32_t x) {
    for (int i = 0; i < 4; i++) putchar((int)(x >> 8 * i & 0xff));
}

static uint32_t get_u32(const unsigned char *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The next record in a buffer that the caller frees, or NULL at the end of input. */
static unsigned char *next_record(uint32_t *len) {
    unsigned char head[4];
    if (fread(head, 1, 4, stdin) != 4) return NULL;
    *len = get_u32(head);
    unsigned char *buf = malloc((size_t)*len + 1);
    if (buf && fread(buf, 1, *len, stdin) == *len) return buf;
    free(buf);
    return NULL;
}

static int encode(const tok *t, const unsigned char *text, uint32_t len, bool special,
                  dsv4_err *err) {
    id_list ids = {0};
    if (tok_encode(t, (const char *)text, len, special, &ids, err)) return -1;
    put_u32((uint32_t)ids.n);
    for (size_t i = 0; i < ids.n; i++) put_u32((uint32_t)ids.id[i]);
    free(ids.id);
    return 0;
}

static int decode(const tok *t, const unsigned char *ids, uint32_t len, dsv4_err *err) {
    utf8_stream stream = {0};
    buffer out = {0};
    for (uint32_t i = 0; i + 4 <= len; i += 4) {
        size_t n_bytes;
        const char *bytes = tok_bytes(t, (int32_t)get_u32(ids + i), &n_bytes);
        if (n_bytes) utf8_push(&stream, bytes, n_bytes, &out);
    }
    utf8_push(&stream, NULL, 0, &out);
    if (out.failed) return fail(err, "out of memory");
    put_u32((uint32_t)out.n);
    fwrite(out.s, 1, out.n, stdout);
    free(out.s);
    return 0;
}

int main(int argc, char **argv) {
    dsv4_err err;
    tok *t;
    uint32_t len;
    int rc = 0;
    if (argc != 3) {
        fprintf(stderr, "usage: tokenize DIR encode|encode-special|decode\n");
        return 2;
    }
    if (tok_open(&t, argv[1], &err)) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    for (unsigned char *record; !rc && (record = next_record(&len)); free(record)) {
        if (strcmp(argv[2], "decode") == 0) rc = decode(t, record, len, &err);
        else rc = encode(t, record, len, strcmp(argv[2], "encode-special") == 0, &err);
    }
    if (rc) fprintf(stderr, "%s\n", err.msg);
    tok_close(t);
    return rc ? 1 : 0;
}
