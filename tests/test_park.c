/* test_park.c -- parked context: what is written comes back, and what is damaged never does.
 *
 * Faults   kv.c is included with pread, pwrite, fsync, renameat and flock bent to the hooks of
 *          section 1.
 * Usage    test_park [KILLS]   writers that are killed (20 without), and all else lasts longer   */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static ssize_t hook_pread(int fd, void *buf, size_t n, off_t off);
static ssize_t hook_pwrite(int fd, const void *buf, size_t n, off_t off);
static int hook_fsync(int fd);
static int hook_renameat(int from, const char *a, int to, const char *b);
static int hook_flock(int fd, int op);
#define pread hook_pread
#define pwrite hook_pwrite
#define fsync hook_fsync
#define renameat hook_renameat
#define flock hook_flock
#include "../kv.c"
#undef pread
#undef pwrite
#undef fsync
#undef renameat
#undef flock

#include "check.h"

/* === 1. Hooks ================================================================================= */

typedef enum { CALM, FAIL, PIECES } mood;      /* PIECES: short transfers, and signals          */

static struct {
    mood mood;
    int cause, nth, seen;          /* FAIL: the nth call, from 1, gives this errno              */
    bool reads;                    /* reads are counted, else all the others                    */
    uint64_t rng, read_bytes;
    int swept;                     /* parts that vanish before they are locked                  */
} hook;

static void set_mood(mood m, bool reads, int cause, int nth) {
    hook.mood = m;
    hook.reads = reads;
    hook.cause = cause;
    hook.nth = nth;
    hook.seen = 0;
    hook.rng = 1;
}

static uint64_t next_random(uint64_t *rng) {
    uint64_t x = *rng += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* What this call may transfer of n bytes; -1 with errno: it fails. */
static ssize_t bend(bool reads, size_t n) {
    if (hook.mood == FAIL && reads == hook.reads && ++hook.seen == hook.nth) {
        errno = hook.cause;
        return -1;
    }
    if (hook.mood != PIECES) return (ssize_t)n;
    errno = EINTR;
    return next_random(&hook.rng) % 3 ? 1 + (ssize_t)(next_random(&hook.rng) % n) : -1;
}

static ssize_t hook_pread(int fd, void *buf, size_t n, off_t off) {
    ssize_t some = bend(true, n);
    ssize_t got = some < 0 ? some : pread(fd, buf, (size_t)some, off);
    if (got > 0) hook.read_bytes += (uint64_t)got;
    return got;
}

static ssize_t hook_pwrite(int fd, const void *buf, size_t n, off_t off) {
    ssize_t some = bend(false, n);
    return some < 0 ? some : pwrite(fd, buf, (size_t)some, off);
}

static int hook_fsync(int fd) {
    return hook.mood == FAIL && bend(false, 1) < 0 ? -1 : fsync(fd);
}

static int hook_renameat(int from, const char *a, int to, const char *b) {
    return hook.mood == FAIL && bend(false, 1) < 0 ? -1 : renameat(from, a, to, b);
}

static int hook_flock(int fd, int op) {
    char link[64], path[PATH_MAX];
    if (hook.swept > 0 && op == LOCK_EX) {
        hook.swept--;
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, path, sizeof path - 1);
        if (n > 0) {
            path[n] = 0;
            unlink(path);
        }
    }
    return flock(fd, op);
}

/* === 2. Directories and samples =============================================================== */

static char top[PATH_MAX];
static int n_kills = 20;
static bool longer;

/* A fresh directory's name under top. */
static const char *fresh_dir(void) {
    static char dir[PATH_MAX + 32];
    static int n;
    snprintf(dir, sizeof dir, "%s/%d", top, n++);
    return dir;
}

static void remove_tree(const char *dir) {
    char command[PATH_MAX + 64];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    if (system(command)) printf("     could not remove %s\n", dir);
}

static bool one_line(const dsv4_err *err, const char *fragment) {
    return err->msg[0] && !strchr(err->msg, '\n') && strstr(err->msg, fragment);
}

static park *must_open(const char *dir, uint64_t budget) {
    park *p;
    dsv4_err err;
    if (!park_open(&p, dir, budget, &err)) return p;
    printf("FAIL park_open: %s\n", err.msg);
    exit(1);
}

/* How many files there are whose names end so. */
static int count_files(const char *dir, const char *end) {
    DIR *d = opendir(dir);
    int n = 0;
    for (const struct dirent *e; d && (e = readdir(d));) {
        size_t len = strlen(e->d_name), tail = strlen(end);
        n += len >= tail && !strcmp(e->d_name + len - tail, end) && strcmp(e->d_name, ".") &&
             strcmp(e->d_name, "..");
    }
    if (d) closedir(d);
    return n;
}

/* What a program would park: rows of which zstd saves a tenth, rows of which it saves more, zeros,
 * nothing, one byte. */
enum { N_SAMPLE = 5 };
static const size_t sample_bytes[N_SAMPLE] = {30000, 50000, 9000, 0, 1};
typedef struct {
    park_info info;
    int32_t tokens[SEGMENT_TOKENS];
    park_frame frames[N_SAMPLE];
    uint8_t data[5][50000];
} sample;

/* The segment of chain `root` whose place is i, as a pure function of both. */
static void fill(sample *s, int root, int i) {
    park_key key = {{(uint8_t)root, 1}};
    memset(s, 0, sizeof *s);
    for (int k = 0; k <= i; k++) {
        uint64_t rng = (uint64_t)root << 32 | (uint64_t)k;
        for (int t = 0; t < SEGMENT_TOKENS; t++)
            s->tokens[t] = (int32_t)(next_random(&rng) % 129280);
        s->info.before = key;
        s->info.key = key = park_next(key, s->tokens, SEGMENT_TOKENS);
    }
    snprintf(s->info.model, sizeof s->info.model, "model-%d", root);
    s->info.pos = (int64_t)i * SEGMENT_TOKENS;
    s->info.n_tokens = SEGMENT_TOKENS;
    s->info.n_frames = N_SAMPLE;
    uint64_t rng = ~((uint64_t)root << 32 | (uint64_t)i);
    for (int f = 0; f < N_SAMPLE; f++) {
        s->frames[f] = (park_frame){s->data[f], sample_bytes[f]};
        for (size_t b = 0; f != 2 && b < sample_bytes[f]; b++) {
            uint64_t x = next_random(&rng);
            s->data[f][b] = (uint8_t)(f == 1 ? (x & 7) * (x >> 8 & 3) : x % 150);
        }
    }
}

static bool put(park *p, const sample *s, dsv4_err *err) {
    return !park_put(p, NULL, &s->info, s->tokens, s->frames, err);
}

/* park_get() into fresh memory: 1 when all is in and equal, 0 when there is none, -1 when what came
 * is not what was put. */
static int get(park *p, const sample *s, dsv4_err *err) {
    static uint8_t data[N_SAMPLE][50000];
    park_frame frames[N_SAMPLE];
    memset(data, 0xee, sizeof data);
    for (int f = 0; f < s->info.n_frames; f++)
        frames[f] = (park_frame){data[f], s->frames[f].bytes};
    if (!park_get(p, &s->info, s->tokens, frames, err)) return 0;
    for (int f = 0; f < s->info.n_frames; f++)
        if (frames[f].bytes && memcmp(data[f], s->frames[f].data, frames[f].bytes)) return -1;
    return 1;
}

static void path_of(char path[PATH_MAX], const char *dir, const sample *s) {
    char file[MAX_NAME];
    segment_file(file, s->info.key);
    snprintf(path, PATH_MAX, "%.2000s/%s", dir, file);
}

static void set_used(park *p, const sample *s, int seconds_ago) {
    char file[MAX_NAME];
    struct timespec t[2] = {{.tv_sec = time(NULL) - seconds_ago}};
    t[1] = t[0];
    segment_file(file, s->info.key);
    CHECK(!utimensat(p->dir, file, t, 0), "no file %s", file);
}

static uint8_t *slurp(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    uint8_t *all = malloc(1 << 20);
    *n = f ? fread(all, 1, 1 << 20, f) : 0;
    if (f) fclose(f);
    return all;
}

static void write_bytes(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) {
        printf("FAIL cannot write %s\n", path);
        exit(1);
    }
}

/* === 3. What is written comes back ============================================================ */

static void test_park_segment_comes_back(void) {
    static sample s;
    dsv4_err err = {""};
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 3);
    CHECK(!park_has(p, s.info.key) && get(p, &s, &err) == 0 && !err.msg[0],
          "there is none, and that is no error: %s", err.msg);
    CHECK(put(p, &s, &err), "%s", err.msg);
    CHECK(p->h.frame[1].stored == p->h.frame[1].bytes, "a tenth is not worth it");
    CHECK(p->h.frame[2].stored < p->h.frame[2].bytes * 85 / 100, "skewed bytes are packed");
    CHECK(park_has(p, s.info.key) && get(p, &s, &err) == 1, "%s", err.msg);
    char path[PATH_MAX];
    struct stat st, again;
    path_of(path, dir, &s);
    set_used(p, &s, 1000);
    CHECK(!stat(path, &st) && put(p, &s, &err) && !stat(path, &again) && st.st_ino == again.st_ino,
          "twice is once: %s", err.msg);
    CHECK(again.st_mtime > st.st_mtime + 900, "and a use of it");
    park_close(p);
    p = must_open(dir, 0);         /* another process */
    CHECK(get(p, &s, &err) == 1, "%s", err.msg);
    s.info.n_frames = 0;           /* tokens alone */
    s.info.key.byte[0] ^= 1;
    CHECK(put(p, &s, &err) && get(p, &s, &err) == 1, "no frames: %s", err.msg);
    s.tokens[0]++;
    CHECK(!park_get(p, &s.info, s.tokens, NULL, &err) && one_line(&err, "other tokens"),
          "no frames: %s", err.msg);
    CHECK(count_files(dir, "") == 2, "nothing else in the directory");
    park_close(p);
    remove_tree(dir);
}

static void test_park_skipped_frames_are_not_read(void) {
    static sample s;
    dsv4_err err = {""};
    uint8_t one;
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    CHECK(put(p, &s, &err), "%s", err.msg);
    for (int f = 0; f < 4; f++) s.frames[f].data = NULL;
    s.frames[4].data = &one;
    hook.read_bytes = 0;
    CHECK(park_get(p, &s.info, s.tokens, s.frames, &err) == 1 && one == s.data[4][0], "%s",
          err.msg);
    CHECK(hook.read_bytes < 30000, "%llu bytes read", (unsigned long long)hook.read_bytes);
    park_close(p);
    remove_tree(dir);
}

static size_t cached_pages(const char *path) {
    unsigned char in[256];
    struct stat st;
    size_t n = 0;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &st)) return 0;
    void *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED && !mincore(at, (size_t)st.st_size, in))
        for (size_t i = 0; i < ((size_t)st.st_size + 4095) / 4096; i++) n += in[i] & 1;
    if (at != MAP_FAILED) munmap(at, (size_t)st.st_size);
    close(fd);
    return n;
}

static void test_park_leaves_the_page_cache(void) {
    static sample s;
    dsv4_err err = {""};
    char path[PATH_MAX];
    struct statfs fs;
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    path_of(path, dir, &s);
    CHECK(put(p, &s, &err), "%s", err.msg);
    size_t put_left = cached_pages(path);
    CHECK(get(p, &s, &err) == 1, "%s", err.msg);
    size_t get_left = cached_pages(path);
    bool memory = !statfs(dir, &fs) && fs.f_type == TMPFS_MAGIC;
    CHECK(memory || (put_left == 0 && get_left == 0), "%zu and %zu pages", put_left, get_left);
    park_close(p);
    remove_tree(dir);
}

static void test_park_session_comes_back(void) {
    static sample s;
    dsv4_err err = {""};
    park_info info;
    int32_t *tokens;
    park_frame frames[PARK_FRAMES];
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    for (int i = 0; i < 2; i++) {  /* the second replaces the first */
        fill(&s, 2 + i, 1);
        s.info.n_tokens = 77;
        CHECK(!park_put(p, "my talk", &s.info, s.tokens, s.frames, &err), "%s", err.msg);
    }
    CHECK(park_load(p, "my talk", &info, &tokens, frames, &err) == 1, "%s", err.msg);
    CHECK(!memcmp(&info, &s.info, sizeof info), "info");
    CHECK(!memcmp(tokens, s.tokens, 77 * sizeof *tokens), "tokens");
    for (int f = 0; f < N_SAMPLE; f++)
        CHECK(frames[f].bytes == sample_bytes[f] && (uintptr_t)frames[f].data % 16 == 0 &&
              !memcmp(frames[f].data, s.data[f], frames[f].bytes), "frame %d", f);
    free(tokens);
    s.info.n_tokens = s.info.n_frames = 0;
    CHECK(!park_put(p, "empty", &s.info, NULL, NULL, &err), "%s", err.msg);
    CHECK(park_load(p, "empty", &info, &tokens, frames, &err) == 1 && info.n_tokens == 0 &&
          info.n_frames == 0, "%s", err.msg);
    free(tokens);
    CHECK(park_load(p, "other", &info, &tokens, frames, &err) == 0 && !tokens && !err.msg[0],
          "there is none: %s", err.msg);
    park_close(p);
    remove_tree(dir);
}

static void test_park_keys_hang_on_all_before(void) {
    int32_t ids[3] = {7, 8, 9};
    park_key zero = {{0}}, a = park_next(zero, ids, 3), b = park_next(a, ids, 3);
    static const park_key want = {{0xde, 0x6b, 0x31, 0x5d, 0x04, 0xe0, 0x57, 0x26,
                                   0x4d, 0xad, 0xc4, 0x74, 0x1e, 0xed, 0x1f, 0x8d}};
    CHECK(!memcmp(&a, &want, 16), "XXH3-128 is the same everywhere");
    CHECK(memcmp(&a, &b, 16) != 0, "another place, another key");
    ids[2] = 10;
    b = park_next(zero, ids, 3);
    CHECK(memcmp(&a, &b, 16) != 0, "another token, another key");
    b = park_next(zero, ids, 2);
    CHECK(memcmp(&a, &b, 16) != 0, "fewer tokens, another key");
}

static void test_park_names(void) {
    static sample s;
    dsv4_err err = {""};
    char hundred[102];
    memset(hundred, 'x', 101);
    hundred[101] = 0;
    const char *bad[] = {"", ".", "..", ".hidden", "a/b", "/", "../x", "a\nb", "a\x7f", hundred};
    const char *good[] = {"a", "a.b", "x.seg", "caf\xc3\xa9 1", hundred + 1};
    park_info info;
    int32_t *tokens;
    static park_frame frames[PARK_FRAMES];
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(park_put(p, bad[i], &s.info, s.tokens, s.frames, &err) == -1 &&
              one_line(&err, "name"), "put %s: %s", bad[i], err.msg);
        CHECK(park_load(p, bad[i], &info, &tokens, frames, &err) == -1, "load %s", bad[i]);
        CHECK(park_remove(p, bad[i], &err) == -1, "remove %s", bad[i]);
    }
    CHECK(count_files(dir, "") == 0, "nothing was written");
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        CHECK(!park_put(p, good[i], &s.info, s.tokens, s.frames, &err), "%s: %s", good[i], err.msg);
        CHECK(park_load(p, good[i], &info, &tokens, frames, &err) == 1, "%s: %s", good[i], err.msg);
        free(tokens);
        CHECK(!park_remove(p, good[i], &err), "%s: %s", good[i], err.msg);
        CHECK(park_remove(p, good[i], &err) == -1 && one_line(&err, "No such"), "%s", err.msg);
    }
    CHECK(put(p, &s, &err), "%s", err.msg);
    char file[MAX_NAME];
    segment_file(file, s.info.key);
    file[32] = 0;
    CHECK(!park_remove(p, file, &err) && !park_has(p, s.info.key), "a segment: %s", err.msg);
    park_close(p);
    remove_tree(dir);
}

/* === 4. What is damaged does not ============================================================== */

/* One way of damage, by number; the file's new size. */
static size_t damage(uint8_t *file, size_t n, int way, uint64_t *rng) {
    size_t at = (size_t)(next_random(rng) % n);
    switch (way % 5) {
    case 0: file[at] ^= (uint8_t)(1 << next_random(rng) % 8); return n;
    case 1: file[at % 600] ^= (uint8_t)(1 << next_random(rng) % 8); return n;
    case 2: return at;             /* cut */
    case 3: memset(file + at, 0, n - at); file[n - 1] ^= 1; return n;  /* torn: a hole behind */
    default: file[n] = (uint8_t)at; return n + 1;
    }
}

static void test_park_damage_is_found(void) {
    static sample s;
    dsv4_err err = {""};
    park_info info;
    int32_t *tokens;
    static park_frame frames[PARK_FRAMES];
    char path[PATH_MAX], talk[PATH_MAX];
    uint64_t rng = 1;
    size_t n;
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 2);
    CHECK(put(p, &s, &err), "%s", err.msg);
    CHECK(!park_put(p, "talk", &s.info, s.tokens, s.frames, &err), "%s", err.msg);
    path_of(path, dir, &s);
    snprintf(talk, sizeof talk, "%.2000s/talk.session", dir);
    uint8_t *good = slurp(path, &n), *bad = malloc(n + 1);
    for (int way = 0; way < 1250; way++) {
        memcpy(bad, good, n);
        size_t size = damage(bad, n, way, &rng);
        write_bytes(path, bad, size);
        CHECK(get(p, &s, &err) == 0 && one_line(&err, ".seg: "), "way %d: %s", way, err.msg);
        CHECK(!park_has(p, s.info.key), "way %d: it is still there", way);
        write_bytes(talk, bad, size);
        CHECK(park_load(p, "talk", &info, &tokens, frames, &err) == -1 && !tokens &&
              one_line(&err, "talk.session: "), "way %d: %s", way, err.msg);
    }
    CHECK(!access(talk, F_OK), "a session is not removed");
    write_bytes(path, good, n);
    CHECK(get(p, &s, &err) == 1, "what is whole still comes: %s", err.msg);
    free(good);
    free(bad);
    park_close(p);
    remove_tree(dir);
}

/* Headers that are whole by their checksum and yet untrue, as only malice writes them. */
static void test_park_headers_are_not_believed(void) {
    static sample s;
    dsv4_err err = {""};
    park_info info;
    int32_t *tokens;
    static park_frame frames[PARK_FRAMES];
    char path[PATH_MAX];
    size_t n;
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    CHECK(!park_put(p, "x", &s.info, s.tokens, s.frames, &err), "%s", err.msg);
    snprintf(path, sizeof path, "%.2000s/x.session", dir);
    uint8_t *file = slurp(path, &n);
    static park_header good, h;
    memcpy(&good, file, header_bytes(N_SAMPLE));
    static const char *const says[] = {
        "", "header is damaged", "header is damaged", "is cut", "contradicts", "contradicts",
        "contradicts", "contradicts", "absurd", "absurd", "absurd", "not unpack", "not unpack",
        "is cut", "absurd", "is cut", "format",
    };
    for (int way = 0; way < (int)(sizeof says / sizeof *says); way++) {
        h = good;
        switch (way) {
        case 0: h.info.before.byte[3]++; break;    /* is as good as any */
        case 1: h.info.n_frames = -1; break;
        case 2: h.info.n_frames = PARK_FRAMES + 1; break;
        case 3: h.info.n_frames--; break;
        case 4: h.info.n_tokens = -1; break;
        case 5: h.info.n_tokens--; break;
        case 6: h.info.pos = -1; break;
        case 7: memset(h.info.model, 'x', MAX_NAME); break;
        case 8: h.frame[1].bytes = UINT64_MAX; break;
        case 9: h.frame[1].bytes = h.frame[1].stored = UINT64_MAX - 70000; break;
        case 10: h.frame[2].bytes = PARK_BYTES; break;
        case 11: h.frame[2].bytes++; break;
        case 12: h.frame[3].bytes--; break;
        case 13: h.frame[1].stored--; break;
        case 14: h.frame[5].bytes = 0; break;
        case 15: h.frame[4].bytes = h.frame[4].stored = 100; break;
        case 16: h.version++; break;
        }
        if (h.info.n_frames <= PARK_FRAMES) h.hash = header_hash(&h);
        memcpy(file, &h, header_bytes(N_SAMPLE));
        write_bytes(path, file, n);
        int rc = park_load(p, "x", &info, &tokens, frames, &err);
        CHECK(rc == (way ? -1 : 1), "way %d: %d %s", way, rc, err.msg);
        CHECK(!way || (one_line(&err, says[way]) && !tokens), "way %d: %s", way, err.msg);
        free(tokens);
    }
    strcpy(good.info.model, "a\033[2Jb");         /* what is printed cannot move a cursor */
    good.hash = header_hash(&good);
    memcpy(file, &good, header_bytes(N_SAMPLE));
    write_bytes(path, file, n);
    CHECK(park_load(p, "x", &info, &tokens, frames, &err) == 1 && !strcmp(info.model, "a?[2Jb"),
          "%s %s", info.model, err.msg);
    free(tokens);
    memset(s.info.model, 'x', MAX_NAME);           /* we do not write what we would not read */
    CHECK(!park_put(p, "x", &s.info, s.tokens, s.frames, &err) &&
          park_load(p, "x", &info, &tokens, frames, &err) == 1, "%s", err.msg);
    free(tokens);
    free(file);
    park_close(p);
    remove_tree(dir);
}

static void test_park_foreign_segments(void) {
    static sample s, other;
    dsv4_err err = {""};
    char path[PATH_MAX], theirs[PATH_MAX];
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    fill(&other, 2, 0);
    path_of(path, dir, &s);
    path_of(theirs, dir, &other);
    CHECK(put(p, &other, &err), "%s", err.msg);
    CHECK(get(p, &s, &err) == 0 && !err.msg[0], "another model's key is another: %s", err.msg);
    CHECK(!rename(theirs, path) && get(p, &s, &err) == 0 && one_line(&err, ".seg: it is "), "%s",
          err.msg);
    CHECK(!park_has(p, s.info.key), "it is gone");
    for (int way = 0; way < 4; way++) {            /* of this key, and yet of another shape */
        sample *has = &other;
        *has = s;
        if (way == 0) has->info.n_frames--;
        if (way == 1) has->frames[1].bytes--;
        if (way == 2) has->info.n_tokens--;
        if (way == 3) has->tokens[5]++;
        CHECK(put(p, has, &err), "%s", err.msg);
        CHECK(get(p, &s, &err) == 0 && one_line(&err, "it "), "way %d: %s", way, err.msg);
        CHECK(park_has(p, s.info.key) == (way == 3), "way %d: it is gone", way);
        (void)unlink(path);
    }
    CHECK(put(p, &s, &err), "%s", err.msg);
    s.info.n_frames--;             /* no more frames come than there is room for */
    CHECK(get(p, &s, &err) == 0 && one_line(&err, "another model"), "%s", err.msg);
    CHECK(!mkfifo(path, 0600) && get(p, &s, &err) == 0 && one_line(&err, "regular"), "%s", err.msg);
    CHECK(!mkdir(path, 0700) && get(p, &s, &err) == 0 && one_line(&err, "regular"), "%s", err.msg);
    write_bytes(theirs, "", 0);
    CHECK(get(p, &other, &err) == 0, "an empty file");
    park_close(p);
    remove_tree(dir);
}

/* Every call that writes, in turn. */
static void test_park_writing_may_fail(void) {
    static sample s;
    dsv4_err err = {""};
    static const int causes[] = {EIO, ENOSPC, EDQUOT};
    char path[PATH_MAX];
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    path_of(path, dir, &s);
    for (int c = 0; c < 3; c++) {
        int nth = 0;
        bool done = false;
        while (!done && nth < 50) {
            set_mood(FAIL, false, causes[c], ++nth);
            done = put(p, &s, &err);
            bool reached = hook.seen >= nth;
            set_mood(CALM, false, 0, 0);
            CHECK(done == !reached, "call %d failed and nobody heard", nth);
            CHECK(done || one_line(&err, strerror(causes[c])), "call %d: %s", nth, err.msg);
            CHECK(count_files(dir, ".part") == 0, "call %d: a part is left", nth);
            CHECK(!park_has(p, s.info.key) || get(p, &s, &err) == 1, "call %d: %s", nth, err.msg);
            (void)unlink(path);
        }
        CHECK(nth == 10, "5 frames that are not empty, header, fsync, rename, fsync: %d", nth);
    }
    park_close(p);
    remove_tree(dir);
}

static void test_park_reading_may_fail(void) {
    static sample s;
    dsv4_err err = {""};
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    int nth = 0, rc = 0;
    while (rc == 0 && nth < 50) {
        CHECK(put(p, &s, &err), "%s", err.msg);
        set_mood(FAIL, true, EIO, ++nth);
        rc = get(p, &s, &err);
        set_mood(CALM, false, 0, 0);
        CHECK(rc == 1 || (one_line(&err, strerror(EIO)) && !park_has(p, s.info.key)), "call %d: %s",
              nth, err.msg);
    }
    CHECK(rc == 1 && nth == 7, "header, 5 frames that are not empty; %d", nth);
    struct rlimit was, none = {0};
    CHECK(!getrlimit(RLIMIT_NOFILE, &was), "getrlimit");
    none.rlim_max = was.rlim_max;
    CHECK(!setrlimit(RLIMIT_NOFILE, &none), "setrlimit");
    rc = get(p, &s, &err);
    CHECK(!setrlimit(RLIMIT_NOFILE, &was), "setrlimit");
    CHECK(rc == 0 && one_line(&err, strerror(EMFILE)) && get(p, &s, &err) == 1,
          "what could not be opened is not damaged: %s", err.msg);
    park_close(p);
    remove_tree(dir);
}

static void test_park_in_pieces(void) {
    static sample s;
    dsv4_err err = {""};
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    set_mood(PIECES, false, 0, 0);
    CHECK(put(p, &s, &err) && get(p, &s, &err) == 1, "%s", err.msg);
    set_mood(CALM, false, 0, 0);
    CHECK(get(p, &s, &err) == 1, "%s", err.msg);
    park_close(p);
    remove_tree(dir);
}

/* A file system that is full, then one that may only be read; real ones where we may mount. */
static void test_park_full_and_read_only(void) {
    static sample s;
    dsv4_err err = {""};
    const char *dir = fresh_dir();
    int n = 0;
    mkdir(dir, 0700);
    bool mounted = !mount("none", dir, "tmpfs", 0, "size=400k");
    park *p = must_open(dir, 0);
    for (bool room = true; mounted && room && n < 20; n += room) {
        fill(&s, n, 0);
        room = put(p, &s, &err);
    }
    CHECK(!mounted || (n > 2 && n < 10 && one_line(&err, strerror(ENOSPC))), "%d: %s", n, err.msg);
    CHECK(count_files(dir, "") == n, "nothing is left of what did not fit");
    fill(&s, 0, 0);
    CHECK(mounted || put(p, &s, &err), "%s", err.msg);
    if (mounted) CHECK(!mount("none", dir, "tmpfs", MS_REMOUNT | MS_RDONLY, NULL), "remount");
    else CHECK(!chmod(dir, 0500), "chmod");
    CHECK(get(p, &s, &err) == 1, "what is there can be read: %s", err.msg);
    fill(&s, 99, 0);
    bool root = !mounted && geteuid() == 0;        /* to whom no directory is unwritable */
    CHECK(root || (!put(p, &s, &err) && one_line(&err, mounted ? strerror(EROFS)
                                                 : strerror(EACCES))), "%s", err.msg);
    park_close(p);
    p = must_open(dir, 0);
    park_close(p);
    if (mounted) CHECK(!umount2(dir, MNT_DETACH), "umount");
    else (void)chmod(dir, 0700);
    NOTE("%s", mounted ? "on a full tmpfs" : "without a mount");
    remove_tree(dir);
}

static void test_park_open_makes_or_says(void) {
    dsv4_err err = {""};
    char deep[PATH_MAX + 64], file[PATH_MAX + 64];
    park *p;
    struct stat st;
    const char *dir = fresh_dir();
    CHECK(!mkdir(dir, 0700), "mkdir");
    snprintf(deep, sizeof deep, "%s/a", dir);
    CHECK(!park_open(&p, deep, 0, &err), "%s", err.msg);
    park_close(p);
    CHECK(!stat(deep, &st) && (st.st_mode & 0777) == 0700, "nobody else may read it");
    snprintf(file, sizeof file, "%s/file", dir);
    write_bytes(file, "x", 1);
    CHECK(park_open(&p, file, 0, &err) == -1 && !p && one_line(&err, file), "%s", err.msg);
    strcat(file, "/below");
    CHECK(park_open(&p, file, 0, &err) == -1 && !p && one_line(&err, file), "%s", err.msg);
    CHECK(park_open(&p, "", 0, &err) == -1 && !p, "%s", err.msg);
    park_close(NULL);
    remove_tree(dir);
}

/* === 5. The directory ========================================================================= */

static uint64_t file_bytes(const char *path) {
    struct stat st;
    return stat(path, &st) ? 0 : (uint64_t)st.st_size;
}

/* Bytes that a segment of these samples has, about. */
static uint64_t segment_bytes(void) {
    static sample s;
    dsv4_err err = {""};
    char path[PATH_MAX];
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    fill(&s, 1, 0);
    CHECK(put(p, &s, &err), "%s", err.msg);
    path_of(path, dir, &s);
    uint64_t bytes = file_bytes(path);
    park_close(p);
    remove_tree(dir);
    return bytes;
}

static void test_park_least_recently_used_goes(void) {
    static sample s[5];
    dsv4_err err = {""};
    uint64_t one = segment_bytes();
    const char *dir = fresh_dir();
    park *p = must_open(dir, one * 9 / 2);
    for (int i = 0; i < 5; i++) fill(&s[i], i, 0);
    for (int i = 0; i < 3; i++) {
        CHECK(put(p, &s[i], &err), "%s", err.msg);
        set_used(p, &s[i], 1000 - i);
    }
    CHECK(!park_put(p, "talk", &s[0].info, s[0].tokens, s[0].frames, &err), "%s", err.msg);
    CHECK(park_has(p, s[0].info.key) && park_has(p, s[1].info.key), "all fit");
    CHECK(get(p, &s[0], &err) == 1, "%s", err.msg);
    CHECK(put(p, &s[3], &err), "%s", err.msg);
    CHECK(!park_has(p, s[1].info.key), "the one that was used first goes");
    CHECK(park_has(p, s[0].info.key) && park_has(p, s[2].info.key) && park_has(p, s[3].info.key),
          "the others stay");
    park_close(p);
    p = must_open(dir, one * 5 / 2);               /* less than what is there */
    CHECK(put(p, &s[4], &err), "%s", err.msg);
    CHECK(park_has(p, s[4].info.key) && count_files(dir, ".seg") == 1 &&
          count_files(dir, ".session") == 1, "the new one and the session are what is left");
    CHECK(!park_put(p, "talk", &s[0].info, s[0].tokens, s[0].frames, &err), "%s", err.msg);
    CHECK(park_has(p, s[4].info.key), "what is replaced does not count twice");
    park_close(p);
    p = must_open(dir, one * 3 / 2);
    CHECK(!put(p, &s[0], &err) && one_line(&err, "too few"), "sessions stay: %s", err.msg);
    CHECK(park_has(p, s[4].info.key) && count_files(dir, "") == 2, "in vain, so nothing goes");
    park_close(p);
    remove_tree(dir);
}

static void test_park_chains_go_from_behind(void) {
    static sample s[4], other;
    dsv4_err err = {""};
    uint64_t one = segment_bytes();
    const char *dir = fresh_dir();
    park *p = must_open(dir, one * 9 / 2);
    for (int i = 0; i < 4; i++) {  /* a prefill of minutes a segment */
        fill(&s[i], 7, i);
        CHECK(put(p, &s[i], &err), "%s", err.msg);
        for (int k = 0; i < 3 && k <= i; k++) set_used(p, &s[k], 1000 - 300 * i - k);
    }
    for (int i = 3; i > 0; i--) {
        fill(&other, 10 + i, 0);
        CHECK(put(p, &other, &err), "%s", err.msg);
        for (int k = 0; k < 4; k++) CHECK(park_has(p, s[k].info.key) == (k < i), "%d of %d", k, i);
        CHECK(i == 1 || get(p, &s[0], &err) == 1, "%s", err.msg);
        for (int k = 1; k < i; k++) CHECK(get(p, &s[k], &err) == 1, "%s", err.msg);
    }
    park_close(p);
    remove_tree(dir);
    p = must_open(dir, one * 5 / 2);
    for (int i = 0; i < 3; i++)
        CHECK(put(p, &s[i], &err) == (i < 2), "%d: %s", i, err.msg);
    CHECK(one_line(&err, "too few") && park_has(p, s[0].info.key) && park_has(p, s[1].info.key) &&
          count_files(dir, "") == 2, "its own beginning is never given up: %s", err.msg);
    park_close(p);
    remove_tree(dir);
}

static void test_park_sweeps_what_the_dead_left(void) {
    static sample s;
    dsv4_err err = {""};
    char path[PATH_MAX + 64];
    const char *dir = fresh_dir();
    mkdir(dir, 0700);
    static const char *files[] = {".dsv4-1-2.part", ".dsv4-3-4.part", ".mine.part", "a.part",
                                  "x.seg", "0123456789abcdef0123456789ABCDEF.seg"};
    int fd = -1;
    for (int i = 0; i < 6; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        write_bytes(path, "half", 4);
        if (i == 1) fd = open(path, O_WRONLY);
    }
    CHECK(fd >= 0 && !flock(fd, LOCK_EX), "lock");
    park *p = must_open(dir, 0);
    for (int i = 0; i < 6; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        CHECK(!access(path, F_OK) == (i > 0), "%s", files[i]);
    }
    close(fd);
    park_close(p);
    p = must_open(dir, 0);
    CHECK(count_files(dir, "") == 4, "its writer is dead now");
    fill(&s, 1, 0);
    hook.swept = 2;                /* by one who opens the directory between two calls of ours  */
    CHECK(put(p, &s, &err) && hook.swept == 0 && get(p, &s, &err) == 1, "%s", err.msg);
    hook.swept = 0;
    park_close(p);
    remove_tree(dir);
}

typedef struct {
    int n, faults, stop_at;
    park_entry e[8];
    char name[8][MAX_NAME], fault[768];
} seen;

static int see(void *arg, const park_entry *e) {
    seen *all = arg;
    if (all->n < 8) {
        all->e[all->n] = *e;
        snprintf(all->name[all->n], MAX_NAME, "%s", e->name);
    }
    if (e->fault[0]) {
        all->faults++;
        snprintf(all->fault, sizeof all->fault, "%s", e->fault);
    }
    return ++all->n == all->stop_at;
}

static void test_park_list(void) {
    static sample s[2];
    dsv4_err err = {""};
    char path[PATH_MAX], hex[MAX_NAME];
    size_t n;
    const char *dir = fresh_dir();
    park *p = must_open(dir, 0);
    for (int i = 0; i < 2; i++) fill(&s[i], i, 0);
    CHECK(put(p, &s[0], &err) && put(p, &s[1], &err), "%s", err.msg);
    s[1].info.n_tokens = 9;
    CHECK(!park_put(p, "talk", &s[1].info, s[1].tokens, s[1].frames, &err), "%s", err.msg);
    set_used(p, &s[0], 100);
    set_used(p, &s[1], 200);
    snprintf(path, sizeof path, "%.2000s/.dsv4-1-2.part", dir);
    write_bytes(path, "half", 4);
    int part = open(path, O_RDWR);
    CHECK(part >= 0 && !flock(part, LOCK_EX), "lock");
    seen all = {0}, some = {.stop_at = 2}, bad = {0}, left = {0};
    CHECK(!park_list(p, false, see, &all, &err) && all.n == 3 && !all.faults, "%s", err.msg);
    CHECK(all.e[0].session && !strcmp(all.name[0], "talk") && all.e[0].info.n_tokens == 9 &&
          !strcmp(all.e[0].info.model, "model-1"), "the session");
    segment_file(hex, s[0].info.key);
    path_of(path, dir, &s[0]);
    hex[32] = 0;
    CHECK(!all.e[1].session && !strcmp(all.name[1], hex) && all.e[1].bytes == file_bytes(path) &&
          !memcmp(&all.e[1].info, &s[0].info, sizeof s[0].info), "a segment");
    CHECK(llabs(all.e[1].used - (time(NULL) - 100)) < 50, "its last use");
    CHECK(park_list(p, true, see, &some, &err) == -1 && some.n == 2, "the caller stops it");
    uint8_t *file = slurp(path, &n);
    file[n - 1] ^= 1;              /* of the last frame */
    write_bytes(path, file, n);
    free(file);
    CHECK(!park_list(p, false, see, &left, &err) && left.n == 3 && !left.faults, "not looked for");
    CHECK(!park_list(p, true, see, &bad, &err) && bad.n == 3 && bad.faults == 1 &&
          strstr(bad.fault, "frame 5 is damaged"), "%d %s", bad.faults, bad.fault);
    CHECK(!park_has(p, s[0].info.key), "it is gone");
    close(part);
    park_close(p);
    remove_tree(dir);
}

/* === 6. Many processes ======================================================================== */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void writer(const char *dir, uint64_t seed, int n_roots, uint64_t budget, double seconds) {
    static sample s;
    dsv4_err err;
    uint64_t rng = seed;
    park *p = must_open(dir, budget);
    double end = now() + seconds;
    do {
        fill(&s, (int)(next_random(&rng) % (uint64_t)n_roots), 0);
        if (!put(p, &s, &err)) {
            printf("     writer: %s\n", err.msg);
            fflush(stdout);
            _exit(1);
        }
    } while (now() < end);
    _exit(0);
}

static void test_park_killed_writers(void) {
    dsv4_err err = {""};
    uint64_t rng = 5, budget = segment_bytes() * 30;
    const char *dir = fresh_dir();
    int left = 0, most = 0;
    for (int i = 0; i < n_kills; i++) {
        pid_t pid = fork();
        if (pid == 0) writer(dir, (uint64_t)i, 1000, budget, 60);
        usleep(2000 + (useconds_t)(next_random(&rng) % 30000));
        CHECK(pid > 0 && !kill(pid, SIGKILL) && waitpid(pid, NULL, 0) == pid, "kill");
        left += count_files(dir, ".part");
        park *p = must_open(dir, budget);
        CHECK(count_files(dir, ".part") == 0, "kill %d: a part is left", i);
        seen all = {0};
        CHECK(!park_list(p, true, see, &all, &err) && !all.faults, "kill %d: %s", i, all.fault);
        if (all.n > most) most = all.n;
        park_close(p);
    }
    CHECK(most > 5 && left > n_kills / 4, "killed too soon: %d files, %d parts", most, left);
    NOTE("%d killed, %d of them left a part", n_kills, left);
    remove_tree(dir);
}

static void test_park_processes_share(void) {
    static sample s;
    enum { ROOTS = 40, WRITERS = 3 };
    dsv4_err err = {""};
    uint64_t rng = 9, budget = segment_bytes() * 12;
    double seconds = longer ? 20 : 1.5;
    const char *dir = fresh_dir();
    int hits = 0, misses = 0, status, alive = WRITERS;
    park *p = must_open(dir, budget);
    for (int i = 0; i < WRITERS; i++)
        if (fork() == 0) writer(dir, i == 2 ? 1 : (uint64_t)i, ROOTS, budget, seconds);
    while (alive > 0) {            /* two of the three write the same ones at the same time */
        fill(&s, (int)(next_random(&rng) % ROOTS), 0);
        int rc = get(p, &s, &err);
        CHECK(rc >= 0 && !err.msg[0], "%d %s", rc, err.msg);
        *(rc ? &hits : &misses) += 1;
        while (alive > 0 && waitpid(-1, &status, WNOHANG) > 0) {
            CHECK(status == 0, "a writer failed");
            alive--;
        }
    }
    CHECK(hits > 10 && misses > 10, "%d hits, %d misses", hits, misses);
    fill(&s, ROOTS, 0);
    CHECK(put(p, &s, &err), "%s", err.msg);
    seen all = {0};
    CHECK(!park_list(p, true, see, &all, &err) && !all.faults && all.n <= 12 && all.n > 8,
          "%d files, %s", all.n, all.fault);
    CHECK(count_files(dir, ".part") == 0, "a part is left");
    NOTE("%d hits, %d misses", hits, misses);
    park_close(p);
    remove_tree(dir);
}

/* === 7. Speed ================================================================================= */

enum { FLASH_LAYERS = 20, FLASH_FRAMES = 3 * FLASH_LAYERS + 1 };

/* Flash's frames of a segment: CSA entries, index keys and HCA entries of each layer, then states.
 * Rows are noise as quantized rows are; `packs` leaves bytes that zstd makes a quarter smaller. */
static void fill_flash(park_frame frames[FLASH_FRAMES], bool packs) {
    uint64_t rng = 1;
    for (int f = 0; f < FLASH_FRAMES; f++) {
        size_t n = f == FLASH_FRAMES - 1 ? 5 << 20
                   : f % 3 == 0 ? 1024 * 584 : f % 3 == 1 ? 1024 * 68 : 32 * 584;
        frames[f] = (park_frame){malloc(n), n};
        for (size_t b = 0; b < n; b++) {
            uint64_t x = next_random(&rng);
            ((uint8_t *)frames[f].data)[b] = (uint8_t)(packs ? (x & 63) + (x >> 8 & 15) : x);
        }
    }
}

/* Bytes a second of large reads past the cache, of all segments in `dir`; 0: not possible here. */
static double direct_rate(const char *dir, const park_key *keys, int n) {
    enum { PIECE = 4 << 20 };
    char file[MAX_NAME], path[PATH_MAX];
    void *buf = aligned_alloc(4096, PIECE);
    double t = now();
    uint64_t bytes = 0;
    for (int i = 0; i < n; i++) {
        segment_file(file, keys[i]);
        snprintf(path, sizeof path, "%.2000s/%s", dir, file);
        int fd = open(path, O_RDONLY | O_DIRECT);
        for (ssize_t got; fd >= 0 && (got = read(fd, buf, PIECE)) > 0;) bytes += (uint64_t)got;
        if (fd >= 0) close(fd);
    }
    free(buf);
    return (double)bytes / (now() - t);
}

static void test_park_restore_is_fast(void) {
    static int32_t tokens[SEGMENT_TOKENS];
    static park_key keys[25];
    park_frame frames[FLASH_FRAMES], into[FLASH_FRAMES];
    park_info info = {.n_tokens = SEGMENT_TOKENS, .n_frames = FLASH_FRAMES};
    dsv4_err err = {""};
    int n = longer ? 25 : 3;
    char note[256] = "";
    for (int packs = 0; packs < 2; packs++) {
        const char *dir = fresh_dir();
        park *p = must_open(dir, 0);
        uint64_t bytes = 0;
        fill_flash(frames, packs);
        fill_flash(into, false);
        double t = now(), put_s, get_s = 0, unpack_s = 0;
        for (int i = 0; i < n; i++) {
            info.before = info.key;
            tokens[0] = i;
            keys[i] = info.key = park_next(info.before, tokens, SEGMENT_TOKENS);
            info.pos = i * SEGMENT_TOKENS;
            CHECK(!park_put(p, NULL, &info, tokens, frames, &err), "%s", err.msg);
        }
        put_s = now() - t;
        double rate = direct_rate(dir, keys, n);
        void *states = into[FLASH_FRAMES - 1].data;
        hook.read_bytes = 0;
        for (int i = 0; i < n; i++) {
            info.key = keys[i];
            tokens[0] = i;
            info.pos = i * SEGMENT_TOKENS;
            into[FLASH_FRAMES - 1].data = i < n - 1 ? NULL : states;
            t = now();
            CHECK(park_get(p, &info, tokens, into, &err), "%s", err.msg);
            get_s += now() - t;
        }
        for (int f = 0; f < FLASH_FRAMES; f++) {
            bytes += frames[f].bytes;
            CHECK(!memcmp(frames[f].data, into[f].data, frames[f].bytes), "frame %d", f);
        }
        void *packed = malloc(1 << 20);
        size_t size = ZSTD_compressCCtx(p->pack, packed, 1 << 20, frames[0].data, frames[0].bytes,
                                        PARK_LEVEL);
        t = now();
        for (int i = 0; packs && !ZSTD_isError(size) && i < n * FLASH_LAYERS; i++)
            ZSTD_decompressDCtx(p->unpack, into[0].data, into[0].bytes, packed, size);
        unpack_s = (now() - t) * 13.7 / 12;        /* the other frames are alike */
        double disk_s = rate > 0 ? (double)hook.read_bytes / rate : 0;
        snprintf(note + strlen(note), sizeof note - strlen(note),
                 "%s%d of %.1f MB, %.0f%% read: put %.2f s, get %.2f s, disk %.2f + unpack %.2f",
                 packs ? "; " : "", n, (double)bytes / 1e6,
                 100 * (double)hook.read_bytes / (double)bytes / n, put_s, get_s, disk_s, unpack_s);
        for (int f = 0; f < FLASH_FRAMES; f++) free(frames[f].data);
        for (int f = 0; f < FLASH_FRAMES - 1; f++) free(into[f].data);
        free(states);
        free(packed);
        park_close(p);
        remove_tree(dir);
    }
    NOTE("%s", note);
}

int main(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    longer = argc > 1;
    if (longer) n_kills = atoi(argv[1]);
    snprintf(top, sizeof top, "%.2000s/dsv4-test-XX" "XX" "XX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(top)) {
        printf("FAIL cannot make %s\n", top);
        return 1;
    }
    RUN(test_park_segment_comes_back);
    RUN(test_park_skipped_frames_are_not_read);
    RUN(test_park_leaves_the_page_cache);
    RUN(test_park_session_comes_back);
    RUN(test_park_keys_hang_on_all_before);
    RUN(test_park_names);
    RUN(test_park_damage_is_found);
    RUN(test_park_headers_are_not_believed);
    RUN(test_park_foreign_segments);
    RUN(test_park_writing_may_fail);
    RUN(test_park_reading_may_fail);
    RUN(test_park_in_pieces);
    RUN(test_park_full_and_read_only);
    RUN(test_park_open_makes_or_says);
    RUN(test_park_least_recently_used_goes);
    RUN(test_park_chains_go_from_behind);
    RUN(test_park_sweeps_what_the_dead_left);
    RUN(test_park_list);
    RUN(test_park_killed_writers);
    RUN(test_park_processes_share);
    RUN(test_park_restore_is_fast);
    remove_tree(top);
    return check_done();
}
