/* test_memory.c -- memory.c against an oracle that remembers every access to every byte.
 *
 *   random work of 3 streams, random blocks, reads, writes, atomics --> sg_global(): verdict
 *                                                                   --> oracle: the same verdict
 *
 * Whole granules: exactly the same.  Parts of them: never a violation that is none; what of older
 * reads is forgotten (see memory.c) may hide one, and is counted.                               */
#include "../check.h"
#include "softgpu.h"

enum { BYTES = 48, WORKS = 40, STREAMS = 3, PAST = 4096, KINDS = 3 };

typedef struct { int work; uint64_t block; sg_access kind; uint64_t off; unsigned bytes; } access;

static uint64_t state = 1;
static unsigned random_below(unsigned n) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)(state >> 33) % n;
}

void sg_text(const sg_func *f, const sg_instr *i, char *out, size_t size) {
    (void)f; (void)i;
    snprintf(out, size, "?");
}

static sg_work work[WORKS];
static access past[PAST];
static int n_past;
static sg_clock host;

static bool oracle(const access *a) {
    for (int k = 0; k < n_past; k++) {
        const access *p = &past[k];
        if (p->off >= a->off + a->bytes || a->off >= p->off + p->bytes) continue;
        if (p->kind == SG_READ && a->kind == SG_READ) continue;
        if (p->kind == SG_ATOMIC && a->kind == SG_ATOMIC) continue;
        const sg_work *w = &work[p->work];
        if (p->work == a->work ? p->block != a->block
                               : w->seq > work[a->work].clock.seq[w->stream]) return true;
    }
    return false;
}

static void join(sg_clock *to, const sg_clock *from) {
    for (int i = 0; i < STREAMS; i++)
        if (from->seq[i] > to->seq[i]) to->seq[i] = from->seq[i];
}

/* Work number n: behind its stream, perhaps behind another one, and behind what the host saw. */
static void next_work(int n, sg_clock stream[STREAMS], bool calm) {
    int s = (int)random_below(STREAMS);
    sg_work *w = &work[n];
    *w = (sg_work){ .op = (uint64_t)n, .stream = s };
    for (int i = 0; i < STREAMS; i++)
        if (random_below(calm ? 20 : 3)) join(&stream[s], &stream[i]);
    if (!random_below(8)) {
        join(&host, &stream[random_below(STREAMS)]);
        sg_work_forget(&host);
    }
    join(&stream[s], &host);
    w->seq = ++stream[s].seq[s];
    w->clock = stream[s];
    snprintf(w->name, sizeof w->name, "work %d", n);
    sg_work_begin(w, random_below(10) ? 4 : 1 << 22);
}

/* Until the first conflict; false: the verdicts differ in a way that they may not. */
static bool one_history(bool whole, int *found, int *hidden, int *accesses_made) {
    sg_clock stream[STREAMS] = { { { 0 } } };
    sg_func f = { .name = "k" };
    sg_launch l = { .func = &f, .grid = { 1 << 22, 1, 1 }, .block = { 32, 1, 1 } };
    sg_region *r = sg_region_new(SG_DEVICE_MEMORY, BYTES, NULL);
    memset(&host, 0, sizeof host);
    sg_work none = { .seq = 0 };
    sg_work_begin(&none, 1);
    sg_range(sg_region_base(r), BYTES, SG_WRITE);      /* never read before written */
    sg_work_forget(&host);
    n_past = 0;
    bool same = true, over = false, calm = random_below(2);
    for (int n = 0; n < WORKS && !over; n++) {
        next_work(n, stream, calm);
        unsigned accesses = 1 + random_below(6);
        for (unsigned k = 0; k < accesses && !over; k++) {
            unsigned bytes = whole ? 4u << random_below(3) : 1u << random_below(5);
            uint64_t block = random_below(calm ? 40 : 3) ? 0 : random_below(4);
            access a = { n, block, (sg_access)random_below(KINDS),
                         bytes * random_below(BYTES / bytes), bytes };
            if (random_below(calm ? 2 : 4)) a.kind = SG_READ;
            sg_block b = { .launch = &l, .index = a.block };
            bool want = oracle(&a);
            bool got = !sg_global(&b, NULL, NULL, 0, sg_region_base(r) + a.off, bytes, a.kind);
            past[n_past++] = a;
            ++*accesses_made;
            *found += got;
            if (want && !got && !whole) ++*hidden;
            else if (want != got) same = false;
            over = want || got;
        }
    }
    for (int s = 0; s < STREAMS; s++) join(&host, &stream[s]);
    sg_work_forget(&host);
    sg_region_free(r);
    return same;
}

static void histories(bool whole) {
    enum { HISTORIES = 40000 };
    int found = 0, hidden = 0, differ = 0, made = 0;
    for (int i = 0; i < HISTORIES; i++) differ += !one_history(whole, &found, &hidden, &made);
    CHECK(!differ, "%d of %d histories differ", differ, HISTORIES);
    CHECK(hidden * 10 < found, "%d hidden, %d found", hidden, found);
    NOTE("%d accesses, %d violations found, %d hidden", made, found, hidden);
}

static void test_whole_granules_as_the_oracle(void) { histories(true); }
static void test_parts_of_granules(void) { histories(false); }

static void test_written_bytes(void) {
    enum { MANY = 300 };
    sg_region *a = sg_region_new(SG_DEVICE_MEMORY, MANY, NULL);
    sg_region *b = sg_region_new(SG_DEVICE_MEMORY, MANY, NULL);
    sg_work w = { .op = 1 };
    for (int round = 0; round < 2000; round++) {
        uint64_t off = random_below(MANY), n = 1 + random_below((unsigned)(MANY - off));
        sg_work_begin(&w, 1);
        uint64_t k = sg_unwritten(sg_region_base(a) + off, n), at = sg_region_base(b) + off;
        sg_range(at, n, SG_WRITE);
        sg_copy_written(at, sg_region_base(a) + off, n);
        CHECK(sg_unwritten(at, n) == k, "%llu written of %llu", (unsigned long long)k,
              (unsigned long long)n);
        off = random_below(MANY - 8);
        if (round % 100 == 0) sg_range(sg_region_base(a) + off, 1 + random_below(8), SG_WRITE);
        sg_work_forget(&w.clock);
    }
    sg_region_free(a);
    sg_region_free(b);
}

int main(void) {
    setenv("SOFTGPU", "keep=1,mem=64M", 1);
    if (!freopen("/dev/null", "w", stderr)) return 1;
    RUN(test_whole_granules_as_the_oracle);
    RUN(test_parts_of_granules);
    RUN(test_written_bytes);
    return check_done();
}
