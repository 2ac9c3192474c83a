/* fuzz_segment.c -- any bytes as a file of parked context: park_load() must refuse it in one line,
 * or give tokens and frames that are all there; as a segment of its own key, park_get() and
 * park_list() must say the same, and what they refuse is gone.
 *
 *   input = mode | the file;  mode 1: the header's checksum is made to fit, 2: the frames' as well,
 *   so that changes get through to what is behind them                                           */
#define _GNU_SOURCE
#include "../dsv4.h"

#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

enum { AT_HASH = 8, AT_VERSION = 16, AT_KEY = 24, AT_FRAMES = 324, AT_TABLE = 328, SLICE = 24 };

static char dir[] = "/dev/shm/dsv4-fuzz-XX" "XX" "XX";
static char talk[sizeof dir + 16], segment[sizeof dir + 64];
static park *p;

static void clean_up(void) {
    unlink(talk);
    unlink(segment);
    rmdir(dir);
}

static void write_file(const char *path, const uint8_t *data, size_t n) {
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n) abort();
    close(fd);
}

static void make_fit(uint8_t *file, size_t n, int mode) {
    int32_t n_frames;
    if (n < AT_TABLE) return;
    memcpy(&n_frames, file + AT_FRAMES, sizeof n_frames);
    if (n_frames < 0 || n_frames > PARK_FRAMES) return;
    size_t end = AT_TABLE + ((size_t)n_frames + 1) * SLICE, off = end;
    if (n < end) return;
    for (int i = 0; mode == 2 && i <= n_frames; i++) {
        uint8_t *slice = file + AT_TABLE + (size_t)i * SLICE;
        uint64_t stored;
        memcpy(&stored, slice + 8, 8);
        if (stored > n - off) break;
        memcpy(slice + 16, &(XXH64_hash_t){XXH3_64bits(file + off, (size_t)stored)}, 8);
        off += (size_t)stored;
    }
    memcpy(file + AT_HASH, &(XXH64_hash_t){XXH3_64bits(file + AT_VERSION, end - AT_VERSION)}, 8);
}

static bool one_line(const char *msg) { return msg[0] && !strchr(msg, '\n'); }

static int see(void *arg, const park_entry *e) {
    *(bool *)arg = !e->fault[0];
    assert(!e->fault[0] || one_line(e->fault));
    assert(memchr(e->info.model, 0, sizeof e->info.model));
    return 0;
}

/* The file as a segment: is it found good by a reader who wants what it has? */
static void check_segment(const uint8_t *file, size_t n, const park_info *info,
                          const int32_t *tokens, park_frame *frames, bool good) {
    dsv4_err err;
    bool listed = false;
    char *at = segment + snprintf(segment, sizeof segment, "%s/", dir);
    for (int i = 0; i < 16; i++) at += sprintf(at, "%02x", file[AT_KEY + i]);
    strcpy(at, ".seg");
    write_file(segment, file, n);
    assert(park_list(p, true, see, &listed, &err) == 0);
    assert(listed == good && !access(segment, F_OK) == good);
    write_file(segment, file, n);
    assert(park_get(p, info, tokens, frames, &err) == good);
    assert(good ? !err.msg[0] : one_line(err.msg));
    assert(!access(segment, F_OK) == good);
    unlink(segment);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    dsv4_err err;
    park_info info;
    int32_t *tokens;
    static park_frame frames[PARK_FRAMES];
    if (!p) {
        if (!mkdtemp(dir) || park_open(&p, dir, 0, &err)) abort();
        snprintf(talk, sizeof talk, "%s/x.session", dir);
        atexit(clean_up);
    }
    if (n < 1) return 0;
    uint8_t *file = malloc(n);
    memcpy(file, data + 1, --n);
    if (data[0]) make_fit(file, n, data[0]);
    write_file(talk, file, n);
    int rc = park_load(p, "x", &info, &tokens, frames, &err);
    unlink(talk);
    assert(rc == 1 ? !err.msg[0] : rc == -1 && !tokens && one_line(err.msg));
    if (rc == 1) {
        uint64_t sum = XXH3_64bits(tokens, (size_t)info.n_tokens * sizeof *tokens);
        assert(info.n_frames >= 0 && info.n_frames <= PARK_FRAMES && info.pos >= 0);
        for (int i = 0; i < info.n_frames; i++)
            sum ^= XXH3_64bits(frames[i].data, frames[i].bytes);
        check_segment(file, n, &info, tokens, frames, true);
        for (int i = 0; i < info.n_frames; i++)    /* the same again: got is what was loaded */
            sum ^= XXH3_64bits(frames[i].data, frames[i].bytes);
        assert(sum == XXH3_64bits(tokens, (size_t)info.n_tokens * sizeof *tokens));
    } else if (n >= AT_KEY + 16) {
        info = (park_info){.n_frames = 0};
        memcpy(&info.key, file + AT_KEY, sizeof info.key);
        check_segment(file, n, &info, &(int32_t){0}, NULL, false);
    }
    free(tokens);
    free(file);
    return 0;
}
