/* kv.c -- where the rows of KV live: in RAM, in a file of one session, in files that outlive it.
 *
 * What a row holds is kernels.cu's; which rows are wanted is dsv4.c's.
 *
 * Contents  1 the plan   2 rows in RAM and in a file   3 parked context                          */
#define _GNU_SOURCE
#include "dsv4.h"

#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

/* === 1. The plan ============================================================================== */

/* === 2. Rows in RAM and in a file ============================================================= */

/* === 3. Parked context ========================================================================
 *
 *   file    header with a table of frames | token ids | frame | frame ...
 *   frame   the caller's bytes, or one zstd frame of them where that saves 15%
 *
 * A file is written as ".dsv4-PID-N.part", locked as long as that takes, and renamed when all of
 * it is on the disk: what has a name of its own is whole, and a part that nobody has locked is
 * what a killed writer left.  Numbers lie as in memory, little-endian.                           */

enum {
    PARK_VERSION = 1,              /* of the layout of files                                    */
    PARK_NAME = 100,               /* bytes of a session's name                                 */
    PARK_LEVEL = 1,                /* of zstd: rows are noise of skewed bytes, so that all there
                                      is to gain is entropy coding, and more search is in vain  */
    PARK_ALIGN = 16,               /* of frames in one block, as malloc's own                   */
};
static const uint64_t park_magic = 0x6b72617034767364; /* "dsv4park"                              */

/* stored < bytes: zstd.  hash: XXH3-64 as stored, so that zstd never meets what was flipped.     */
typedef struct { uint64_t bytes, stored, hash; } park_slice;
typedef struct {
    uint64_t magic;
    uint64_t hash;                 /* XXH3-64 of what follows, the frames' slices included      */
    uint64_t version;
    park_info info;
    park_slice frame[PARK_FRAMES + 1]; /* the first holds token ids; info.n_frames more         */
} park_header;
static_assert(offsetof(park_header, frame) == 72 + MAX_NAME && sizeof(park_slice) == 24, "layout");

struct park {
    char *path;                    /* for messages                                              */
    int dir;
    uint64_t budget;
    ZSTD_CCtx *pack;
    ZSTD_DCtx *unpack;
    uint8_t *buf;                  /* [cap] one frame packed                                    */
    size_t cap, block;             /* block: bytes for tokens and frames of the file at hand    */
    park_header h;                 /* of the file at hand                                       */
};

typedef enum { PARK_OTHER, PARK_PART, PARK_SEGMENT, PARK_SESSION } park_kind;
typedef struct { char file[MAX_NAME]; park_kind kind; uint64_t bytes; int64_t used_ns; } parked;

static size_t header_bytes(int n_frames) {
    return offsetof(park_header, frame) + ((size_t)n_frames + 1) * sizeof(park_slice);
}

static uint64_t header_hash(const park_header *h) {
    const size_t from = offsetof(park_header, version);
    return XXH3_64bits((const char *)h + from, header_bytes(h->info.n_frames) - from);
}

park_key park_next(park_key before, const int32_t *tokens, int n) {
    XXH128_canonical_t both[2];    /* of one key's size, so that no state must be allocated     */
    memcpy(&both[0], &before, sizeof before);
    XXH128_canonicalFromHash(&both[1], XXH3_128bits(tokens, (size_t)n * sizeof *tokens));
    XXH128_canonicalFromHash(&both[0], XXH3_128bits(both, sizeof both));
    memcpy(&before, &both[0], sizeof before);
    return before;
}

/* --- names */

static void segment_file(char file[MAX_NAME], park_key key) {
    for (int i = 0; i < 16; i++) snprintf(file + 2 * i, 3, "%02x", key.byte[i]);
    strcpy(file + 32, ".seg");
}

static park_kind kind_of(const char *file) {
    const char *dot = strrchr(file, '.'), *end = dot ? dot : "";
    size_t n = (size_t)(dot ? dot - file : 0);
    if (!strcmp(end, ".part") && !strncmp(file, ".dsv4-", 6)) return PARK_PART;
    if (!strcmp(end, ".seg") && n == 32 && strspn(file, "0123456789abcdef") == n)
        return PARK_SEGMENT;
    for (size_t i = 0; i < n; i++)
        if (file[i] == '/' || iscntrl((unsigned char)file[i])) return PARK_OTHER;
    bool session = !strcmp(end, ".session") && n <= PARK_NAME && file[0] != '.';
    return session ? PARK_SESSION : PARK_OTHER;
}

static int session_file(char file[MAX_NAME], const char *name, dsv4_err *err) {
    snprintf(file, MAX_NAME, "%.*s.session", PARK_NAME + 1, name);
    if (kind_of(file) == PARK_SESSION) return 0;
    return fail(err, "a session's name has 1 to %d bytes, no slash, no control character and no "
                "dot in front", PARK_NAME);
}

/* --- reading */

/* All n bytes, through short transfers and signals; -1 with errno. */
static int park_io(int fd, bool write, void *buf, size_t n, uint64_t off) {
    for (size_t done = 0; done < n;) {
        char *at = (char *)buf + done;
        ssize_t got = write ? pwrite(fd, at, n - done, (off_t)(off + done))
                      : pread(fd, at, n - done, (off_t)(off + done));
        if (got < 0 && errno == EINTR) continue;
        if (got == 0) errno = ENODATA;             /* the file was cut while we read it */
        if (got <= 0) return -1;
        done += (size_t)got;
    }
    return 0;
}

/* The header of a file into p->h, and all checked that it says, so that what the table names lies
 * in the file.  As for all that read: err says what is wrong, not with which file. */
static int read_header(park *p, int fd, dsv4_err *err) {
    park_header *h = &p->h;
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) return fail(err, "it is not a regular file");
    uint64_t size = (uint64_t)st.st_size, end, bytes = 0;
    memset(h, 0, sizeof *h);
    if (park_io(fd, false, h, size < sizeof *h ? (size_t)size : sizeof *h, 0))
        return fail(err, "%s", strerror(errno));
    int n = h->info.n_frames;
    if (h->magic != park_magic || h->version != PARK_VERSION)
        return fail(err, "it is not parked context of format %d", PARK_VERSION);
    if (n < 0 || n > PARK_FRAMES || h->hash != header_hash(h))
        return fail(err, "its header is damaged");
    end = header_bytes(n);
    for (int i = 0; i <= n; i++) { /* no sum can wrap: none is above PARK_BYTES and a header    */
        const park_slice *f = &h->frame[i];
        if (f->stored > f->bytes || f->bytes > PARK_BYTES - bytes)
            return fail(err, "the size of frame %d is absurd", i);
        end += f->stored;
        bytes += f->bytes;
    }
    p->block = (size_t)bytes + ((size_t)n + 1) * PARK_ALIGN;
    if (end != size) return fail(err, "it is cut, or longer than it should be");
    if (h->info.pos < 0 || h->info.model[MAX_NAME - 1] ||
        h->frame[0].bytes != (uint64_t)h->info.n_tokens * sizeof(int32_t))
        return fail(err, "its header contradicts itself");
    for (char *c = h->info.model; *c; c++)         /* it will be printed */
        if (iscntrl((unsigned char)*c)) *c = '?';
    return 0;
}

static int park_room(park *p, size_t n) {
    if (n <= p->cap) return 0;
    free(p->buf);
    p->buf = malloc(n);
    p->cap = p->buf ? n : 0;
    return p->buf ? 0 : -1;
}

static int read_frame(park *p, int fd, int i, uint64_t off, void *dst, dsv4_err *err) {
    size_t stored = (size_t)p->h.frame[i].stored, bytes = (size_t)p->h.frame[i].bytes;
    bool packed = stored < bytes;
    if (packed && park_room(p, stored)) return fail(err, "out of memory");
    void *to = packed ? p->buf : dst;
    if (park_io(fd, false, to, stored, off)) return fail(err, "%s", strerror(errno));
    if (XXH3_64bits(to, stored) != p->h.frame[i].hash)
        return fail(err, "frame %d is damaged", i);
    if (packed && ZSTD_decompressDCtx(p->unpack, dst, bytes, to, stored) != bytes)
        return fail(err, "frame %d does not unpack", i);
    return 0;
}

/* Tokens and frames of the file at hand, as park_get() where `want`, else as park_load() says. */
static int read_body(park *p, int fd, const park_info *want, int32_t **tokens, park_frame *frames,
                     dsv4_err *err) {
    const park_header *h = &p->h;
    bool same = !want || (want->n_tokens == h->info.n_tokens && want->n_frames == h->info.n_frames);
    for (int i = 0; want && same && i < want->n_frames; i++)
        same = frames[i].bytes == h->frame[i + 1].bytes;
    if (!same) return fail(err, "it is of another model");
    uint8_t *block = malloc(want ? (size_t)h->frame[0].bytes + 1 : p->block);
    uint64_t off = header_bytes(h->info.n_frames);
    int rc = block ? 0 : fail(err, "out of memory");
    for (size_t i = 0, at = 0; !rc && i <= (size_t)h->info.n_frames; i++) {
        size_t bytes = (size_t)h->frame[i].bytes;
        if (i && !want) frames[i - 1] = (park_frame){block + at, bytes};
        void *dst = i ? frames[i - 1].data : block;
        if (dst) rc = read_frame(p, fd, (int)i, off, dst, err);
        off += h->frame[i].stored;
        at += (bytes + PARK_ALIGN - 1) / PARK_ALIGN * PARK_ALIGN;
    }
    if (rc) free(block);
    *tokens = rc ? NULL : (int32_t *)(void *)block;
    return rc;
}

/* Read a file: its header and, where `tokens`, its body.  1; 0: there is none; -1: err says what is
 * wrong, and a segment that is damaged is gone. */
static int park_take(park *p, const char *file, const park_info *want, int32_t **tokens,
                     park_frame *frames, dsv4_err *err) {
    dsv4_err why;
    char own[MAX_NAME];
    bool segment = kind_of(file) == PARK_SEGMENT;
    int fd = openat(p->dir, file, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    err->msg[0] = 0;
    if (fd < 0 && errno == ENOENT) return 0;
    if (fd < 0) return fail(err, "open %.300s/%s: %s", p->path, file, strerror(errno));
    (void)posix_fadvise(fd, 0, 0, tokens ? POSIX_FADV_SEQUENTIAL : POSIX_FADV_RANDOM);
    int rc = read_header(p, fd, &why);
    segment_file(own, p->h.info.key);
    if (!rc && segment && strcmp(file, own)) rc = fail(&why, "it is %s", own);
    if (!rc && tokens) rc = read_body(p, fd, want, tokens, frames, &why);
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);    /* memory is for experts */
    close(fd);
    if (rc && segment) (void)unlinkat(p->dir, file, 0);
    return rc ? fail(err, "%.300s/%s: %.300s", p->path, file, why.msg) : 1;
}

/* Segments are of no use without those before them, so the later one stands the older it counts:
 * a second each, which is more than reading one takes. */
static void mark_used(park *p, const char *file, int64_t pos) {
    struct timespec t[2];
    clock_gettime(CLOCK_REALTIME, t);
    t[0].tv_sec -= pos / SEGMENT_TOKENS;
    t[1] = t[0];
    (void)utimensat(p->dir, file, t, 0);   /* refused where we may not write, and not needed */
}

int park_get(park *p, const park_info *info, const int32_t *tokens, park_frame *frames,
             dsv4_err *err) {
    char file[MAX_NAME];
    int32_t *ids = NULL;
    segment_file(file, info->key);
    int rc = park_take(p, file, info, &ids, frames, err);
    if (rc > 0 && memcmp(ids, tokens, (size_t)info->n_tokens * sizeof *ids))
        rc = fail(err, "%.300s/%s: it has other tokens", p->path, file);
    if (rc > 0) mark_used(p, file, info->pos);
    free(ids);
    return rc > 0;
}

int park_load(park *p, const char *name, park_info *info, int32_t **tokens, park_frame *frames,
              dsv4_err *err) {
    char file[MAX_NAME];
    *tokens = NULL;
    if (session_file(file, name, err)) return -1;
    int rc = park_take(p, file, NULL, tokens, frames, err);
    if (rc > 0) mark_used(p, file, 0);
    *info = p->h.info;
    return rc;
}

bool park_has(const park *p, park_key key) {
    char file[MAX_NAME];
    segment_file(file, key);
    return !faccessat(p->dir, file, F_OK, 0);
}

/* --- the directory */

/* What a killed writer left has no lock any more. */
static bool sweep(park *p, const char *file) {
    int fd = openat(p->dir, file, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    bool gone = fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB) && !unlinkat(p->dir, file, 0);
    if (fd >= 0) close(fd);
    return gone;
}

static int by_use(const void *a, const void *b) {
    int64_t x = ((const parked *)a)->used_ns, y = ((const parked *)b)->used_ns;
    return (x > y) - (x < y);
}

static int is_ours(const struct dirent *e) { return kind_of(e->d_name) != PARK_OTHER; }

/* Every file of ours and what is being written now, least recently used first; what killed writers
 * left is removed.  Their number; the caller frees *out. */
static int park_scan(park *p, parked **out, dsv4_err *err) {
    struct dirent **list;
    struct stat st;
    int found = scandirat(p->dir, ".", &list, is_ours, NULL), n = 0;
    *out = NULL;
    if (found < 0) return fail(err, "read %.300s: %s", p->path, strerror(errno));
    parked *all = *out = calloc((size_t)found + 1, sizeof *all);
    for (int i = 0; i < found; i++) {
        const char *file = list[i]->d_name;
        park_kind kind = kind_of(file);
        if (all && !fstatat(p->dir, file, &st, AT_SYMLINK_NOFOLLOW) && S_ISREG(st.st_mode) &&
            !(kind == PARK_PART && sweep(p, file))) {
            snprintf(all[n].file, sizeof all[n].file, "%s", file);
            all[n].kind = kind;
            all[n].bytes = (uint64_t)st.st_size;
            all[n++].used_ns = st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
        }
        free(list[i]);
    }
    free(list);
    if (!all) return fail(err, "out of memory");
    qsort(all, (size_t)n, sizeof *all, by_use);
    return n;
}

int park_open(park **out, const char *dir, uint64_t budget, dsv4_err *err) {
    parked *files = NULL;
    park *p = *out = calloc(1, sizeof *p);
    if (p) *p = (park){.path = strdup(dir), .dir = -1, .budget = budget,
                       .pack = ZSTD_createCCtx(), .unpack = ZSTD_createDCtx()};
    int rc = p && p->path && p->pack && p->unpack ? 0 : fail(err, "out of memory");
    for (char *s = rc ? NULL : p->path; s;) {      /* what cannot be made shows in open() */
        s = *s ? strchr(s + 1, '/') : NULL;
        if (s) *s = 0;
        (void)mkdir(p->path, 0700);                /* what was said to a model is nobody else's */
        if (s) *s = '/';
    }
    if (!rc && (p->dir = open(p->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        rc = fail(err, "open directory %.300s: %s", p->path, strerror(errno));
    if (!rc) rc = park_scan(p, &files, err) < 0 ? -1 : 0;
    free(files);
    if (!rc) return 0;
    park_close(p);
    *out = NULL;
    return -1;
}

void park_close(park *p) {
    if (!p) return;
    if (p->dir >= 0) close(p->dir);
    ZSTD_freeCCtx(p->pack);
    ZSTD_freeDCtx(p->unpack);
    free(p->buf);
    free(p->path);
    free(p);
}

int park_list(park *p, bool verify, park_fn each, void *arg, dsv4_err *err) {
    parked *all;
    park_frame frames[PARK_FRAMES];
    int n = park_scan(p, &all, err), rc = n < 0 ? -1 : 0;
    while (!rc && n-- > 0) {
        parked *f = &all[n];
        dsv4_err fault;
        int32_t *tokens = NULL;
        int good = f->kind == PARK_PART ? 0
                   : park_take(p, f->file, NULL, verify ? &tokens : NULL, frames, &fault);
        free(tokens);
        if (!good) continue;       /* not there yet, or not any more */
        park_entry e = {.name = f->file, .session = f->kind == PARK_SESSION, .bytes = f->bytes,
                        .used = f->used_ns / 1000000000, .fault = fault.msg};
        if (good > 0) e.info = p->h.info;
        *strrchr(f->file, '.') = 0;
        if (each(arg, &e)) rc = fail(err, "interrupted");
    }
    free(all);
    return rc;
}

int park_remove(park *p, const char *name, dsv4_err *err) {
    char file[MAX_NAME];
    if (session_file(file, name, err)) return -1;
    if (!unlinkat(p->dir, file, 0)) return 0;
    snprintf(file, sizeof file, "%s.seg", name);
    if (errno == ENOENT && kind_of(file) == PARK_SEGMENT && !unlinkat(p->dir, file, 0)) return 0;
    return fail(err, "remove %s from %.300s: %s", name, p->path, strerror(errno));
}

/* --- writing */

/* What `key` ends was used now. */
static void mark_chain(park *p, park_key key) {
    char file[MAX_NAME];
    dsv4_err ignored;
    int64_t pos = INT64_MAX;       /* falls, so that no ring of files holds us                  */
    segment_file(file, key);
    while (park_take(p, file, NULL, NULL, NULL, &ignored) > 0 && p->h.info.pos < pos) {
        mark_used(p, file, pos = p->h.info.pos);
        segment_file(file, p->h.info.before);
    }
}

/* Keep the budget with `file`, whose part is in the directory already, at the cost of segments; but
 * not of those before it, of which `before` is the first that would go. */
static int make_room(park *p, const char *file, park_key before, dsv4_err *err) {
    parked *all;
    char last[MAX_NAME];
    uint64_t total = 0;
    int n = p->budget ? park_scan(p, &all, err) : 0, end = 0;
    if (n <= 0) return n;
    segment_file(last, before);
    for (int i = 0; i < n; i++) {
        if (!strcmp(all[i].file, file)) all[i].bytes = 0;  /* to be replaced */
        total += all[i].bytes;
    }
    for (; end < n && total > p->budget && strcmp(all[end].file, last); end++)
        if (all[end].kind == PARK_SEGMENT) total -= all[end].bytes;
    int rc = total <= p->budget ? 0 : fail(err, "%.300s: %.2f GB are too few to keep more",
                                           p->path, (double)p->budget / 1e9);
    for (int i = 0; !rc && i < end; i++)
        if (all[i].kind == PARK_SEGMENT) (void)unlinkat(p->dir, all[i].file, 0);
    free(all);
    return rc;
}

/* All of a file, on the disk; -1 with errno. */
static int write_file(park *p, int fd, const park_info *info, const int32_t *tokens,
                      const park_frame *frames) {
    park_header *h = &p->h;
    uint64_t off = header_bytes(info->n_frames), bytes = 0;
    *h = (park_header){.magic = park_magic, .version = PARK_VERSION, .info = *info};
    h->info.model[MAX_NAME - 1] = 0;
    for (int i = 0; i <= info->n_frames; i++) {
        park_frame f = i ? frames[i - 1]
                       : (park_frame){(void *)tokens, (size_t)info->n_tokens * sizeof *tokens};
        size_t room = f.bytes - f.bytes * 15 / 100, got = 0;
        errno = EFBIG;
        if (f.bytes > PARK_BYTES - bytes) return -1;
        if (f.bytes && !park_room(p, room))
            got = ZSTD_compressCCtx(p->pack, p->buf, room, f.data, f.bytes, PARK_LEVEL);
        bool packed = got && !ZSTD_isError(got) && got < f.bytes;  /* an error: it saves less */
        void *data = packed ? p->buf : f.data;
        size_t stored = packed ? got : f.bytes;
        h->frame[i] = (park_slice){f.bytes, stored, XXH3_64bits(data, stored)};
        if (park_io(fd, true, data, stored, off)) return -1;
        bytes += f.bytes;
        off += stored;
    }
    h->hash = header_hash(h);
    return park_io(fd, true, h, header_bytes(info->n_frames), 0) || fsync(fd) ? -1 : 0;
}

/* A new file of no name that counts, locked; -1 with errno. */
static int make_part(park *p, char part[MAX_NAME]) {
    struct stat st = {.st_nlink = 0};
    struct timespec t;
    int fd = -1;
    for (int i = 0; i < 64 && !st.st_nlink; i++) {         /* swept before it was locked? again */
        if (fd >= 0) close(fd);
        clock_gettime(CLOCK_MONOTONIC, &t);
        snprintf(part, MAX_NAME, ".dsv4-%ld-%09ld.part", (long)getpid(), t.tv_nsec);
        fd = openat(p->dir, part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0) return -1;
        (void)flock(fd, LOCK_EX);
        if (fstat(fd, &st)) break;
    }
    return fd;
}

int park_put(park *p, const char *name, const park_info *info, const int32_t *tokens,
             const park_frame *frames, dsv4_err *err) {
    char file[MAX_NAME], part[MAX_NAME];
    assert(info->n_frames >= 0 && info->n_frames <= PARK_FRAMES);
    assert(info->n_tokens >= 0 && info->pos >= 0);
    segment_file(file, info->key);
    if (name && session_file(file, name, err)) return -1;
    if (!name && park_has(p, info->key)) return mark_chain(p, info->key), 0;
    int fd = make_part(p, part);
    int rc = fd < 0 || write_file(p, fd, info, tokens, frames) ? -1 : 0, told = 0;
    if (!rc) {
        if (!name) mark_used(p, part, info->pos);
        mark_chain(p, info->before);
        told = rc = make_room(p, file, info->before, err);
    }
    if (!rc) rc = renameat(p->dir, part, p->dir, file) || fsync(p->dir) ? -1 : 0;
    if (rc && !told) fail(err, "write %.300s/%s: %s", p->path, file, strerror(errno));
    if (fd < 0) return -1;
    if (rc) (void)unlinkat(p->dir, part, 0);
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    return rc;
}
