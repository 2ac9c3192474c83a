/* fuzz_header.c -- any bytes as the front of a safetensors file: ckpt_open() must refuse it in
 * one line, or make a table in order of name whose tensors lie inside the file, disjoint.
 *
 *   input = u32 more | the file's first bytes;  the file has a hole of `more` bytes behind them
 *   `more` with its top bit set: the header's length is made to fit, so that changes of the JSON
 *   get through to the parser                                                                    */
#define _GNU_SOURCE 1
#include "../dsv4.h"

#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char dir[] = "/dev/shm/dsv4-fuzz-XX" "XX" "XX", file[sizeof dir + 32];

static void clean_up(void) {
    unlink(file);
    rmdir(dir);
}

static int by_offset(const void *a, const void *b) {
    const ckpt_tensor *x = *(ckpt_tensor *const *)a, *y = *(ckpt_tensor *const *)b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static void check(const ckpt *c, uint64_t size) {
    size_t n = ckpt_n_tensors(c);
    const ckpt_tensor **sorted = calloc(n + 1, sizeof *sorted);
    for (size_t i = 0; i < n; i++) {
        const ckpt_tensor *t = sorted[i] = ckpt_at(c, i);
        assert(strlen(t->name) > 0 && strlen(t->name) < MAX_NAME);
        assert(i == 0 || strcmp(ckpt_at(c, i - 1)->name, t->name) < 0);
        assert(ckpt_find(c, t->name) == t);
        assert((int)t->dtype >= 0 && t->dtype < DT_N);
        assert(t->n_dims >= 0 && t->n_dims <= 4);
        assert(t->offset >= 10 && t->offset <= size && t->bytes <= size - t->offset);
        for (int d = 0; d < t->n_dims; d++) assert(t->shape[d] >= 0);
    }
    uint64_t end = 0;
    qsort(sorted, n, sizeof *sorted, by_offset);
    for (size_t i = 0; i < n; i++) {
        if (sorted[i]->bytes == 0) continue;
        assert(sorted[i]->offset >= end);
        end = sorted[i]->offset + sorted[i]->bytes;
    }
    free(sorted);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static int fd = -1;
    uint32_t more;
    if (fd < 0) {
        if (!mkdtemp(dir)) abort();
        snprintf(file, sizeof file, "%s/x.safetensors", dir);
        fd = open(file, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        atexit(clean_up);
    }
    if (n < sizeof more) return 0;
    memcpy(&more, data, sizeof more);
    data += sizeof more;
    n -= sizeof more;
    uint64_t fitting = (uint64_t)n - 8, size = (uint64_t)n + (more & 0x7fffffff);
    if (ftruncate(fd, 0) || pwrite(fd, data, n, 0) != (ssize_t)n || ftruncate(fd, (off_t)size))
        abort();
    if (more >> 31 && n >= 8 && pwrite(fd, &fitting, 8, 0) != 8) abort();
    dsv4_err err = {""};
    ckpt *c;
    int rc = ckpt_open(&c, dir, &err);
    assert(rc == 0 ? c != NULL : c == NULL && err.msg[0] && !strchr(err.msg, '\n'));
    if (c) check(c, size);
    ckpt_close(c);
    return 0;
}
