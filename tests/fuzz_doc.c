/* fuzz_doc.c -- any bytes as a document: its text is UTF-8 without NULs, or there is a message.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_doc.c text.c ...
 *   ./fuzz_doc -max_len=4096 CORPUS tests/seeds/doc
 *
 * PDF is left out: what reads it is another program.                                             */
#define _GNU_SOURCE
#include "../dsv4.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void demand(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64];
    buffer out = {0};
    const char *note;
    dsv4_err err = {""};
    if (size >= 5 && !memcmp(data, "%PDF-", 5)) return 0;
    int fd = memfd_create("doc", 0);
    demand(fd >= 0 && write(fd, data, size) == (ssize_t)size, "memfd");
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int rc = doc_read(&out, path, &note, &err);
    demand(rc == 0 ? !*err.msg : *err.msg && !out.n, "a status without its message");
    demand(!out.n || !memchr(out.s, 0, out.n), "a NUL");
    json_t *text = out.n ? json_stringn(out.s, out.n) : NULL; /* refuses what is not UTF-8 */
    demand(!out.n || text, "text that is not UTF-8");
    json_decref(text);
    free(out.s);
    close(fd);
    return 0;
}
