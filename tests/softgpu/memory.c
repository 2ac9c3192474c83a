/* memory.c -- softgpu's global memory: what is allocated, what was written, and who touched it.
 *
 *   address --> region --+-- host     the bytes
 *                        +-- written  a bit a byte
 *                        +-- touch    8 bytes for 4: the last writer and the last reader
 *                                        |
 *             27 bits of stamp, 1 atomic, 4 which of the 4 bytes
 *
 *   stamps      0 | older work ...          | work being run: base = several blocks of it
 *                 |        floor: all before |                 base + 1 + i = its block i
 *                 |        it is ordered     |
 *
 * Work takes stamps when it runs: one for each of its blocks.  An access is right when the last
 * writer (for a write also the last reader) is this block, or work that comes before this one:
 * one comparison with `floor`.  Else touch_slowly() looks closer, and where one writer and one
 * reader cannot tell what happened to 4 bytes, they get a list in region.list (`LISTED`).
 * One thing is not seen: of two reads of parts of 4 bytes by work in order, the older is forgotten.
 *
 * Contents: 1 the configuration   2 stopping   3 work and its order   4 regions
 *           5 who touched what    6 access     7 modules                                         */
#define _GNU_SOURCE
#include "softgpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const sg_work *current;             /* section 3: what runs                              */

/* === 1. The configuration ===================================================================== */

typedef struct { int cc, threads_sm, blocks_sm, shared_sm_kib; } model;
static const model models[] = {
    { 75, 1024, 16, 64 }, { 80, 2048, 32, 164 }, { 86, 1536, 16, 100 }, { 87, 1536, 16, 164 }, { 89, 1536, 24, 100 },
    { 90, 2048, 32, 228 }, { 100, 2048, 32, 228 }, { 120, 1536, 24, 100 },
};

static void set_model(sg_device *d, int cc) {
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        const model *m = &models[i];
        if (m->cc != cc) continue;
        d->cc = cc;
        d->max_threads_sm = m->threads_sm;
        d->max_blocks_sm = m->blocks_sm;
        d->shared_sm = (uint32_t)m->shared_sm_kib << 10;
        d->shared_optin = d->shared_sm - 1024;
        return;
    }
    sg_stop(NULL, NULL, NULL, "SOFTGPU: no model of compute capability %d.%d", cc / 10, cc % 10);
}

static void set_option(sg_config *c, const char *key, const char *value) {
    char *end;
    double x = strtod(value, &end);
    uint64_t n = strtoull(value, NULL, 10);
    int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : *end == 'T' ? 40 : 0;
    bool mem = !strcmp(key, "mem");
    if (end == value || x < 0 || end[shift != 0 && mem])
        sg_stop(NULL, NULL, NULL, "SOFTGPU: %s=%s is no number", key, value);
    if (mem) c->device.memory_bytes = (uint64_t)(x * (double)(1ull << shift));
    else if (!strcmp(key, "cc")) set_model(&c->device, (int)(x * 10 + 0.5));
    else if (!strcmp(key, "sms") && n) c->device.n_sms = (int)n;
    else if (!strcmp(key, "seed")) c->seed = n;
    else if (!strcmp(key, "driver")) c->device.driver_version = (int)n;
    else if (!strcmp(key, "lost")) c->lost = n;
    else if (!strcmp(key, "keep")) c->keep = n != 0;
    else sg_stop(NULL, NULL, NULL, "SOFTGPU: what is %s=%s?", key, value);
}

const sg_config *sg_get_config(void) {
    static sg_config c;
    static bool read;
    if (read) return &c;
    read = true;
    c.seed = 1;
    c.device = (sg_device){ .n_sms = 4, .warp_size = 32, .max_threads = 1024,
        .max_regs_block = 65536, .memory_bytes = 4ull << 30, .shared_block = 48 << 10,
        .max_grid = { 0x7fffffff, 65535, 65535 }, .max_block = { 1024, 1024, 64 },
        .driver_version = 13000 };
    set_model(&c.device, 89);
    const char *env = getenv("SOFTGPU");
    char *text = strdup(env ? env : ""), *at = text, *word;
    while ((word = strsep(&at, ",")) != NULL) {
        char *value = strchr(word, '=');
        if (!*word) continue;
        if (!value) sg_stop(NULL, NULL, NULL, "SOFTGPU: %s has no value", word);
        *value++ = 0;
        set_option(&c, word, value);
    }
    free(text);
    return &c;
}

/* === 2. Stopping ============================================================================== */

enum { SHOWN = 50 };                       /* with keep=1: the others are only counted          */
static uint64_t violations;

static sg_dim dim_of(uint64_t index, sg_dim d) {
    return (sg_dim){ (uint32_t)(index % d.x), (uint32_t)(index / d.x % d.y),
                     (uint32_t)(index / d.x / d.y) };
}

static void say(const char *what, const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                const char *fmt, va_list ap) {
    char text[400] = "", line[1800];
    size_t n = 0, size = sizeof line;
#define ADD(...) (n += (size_t)snprintf(line + n, n < size ? size - n : 0, __VA_ARGS__), \
                  n = n < size ? n : size - 1)
    ADD("softgpu: %s", what);
    if (b) ADD(" in %s", b->launch->func->name);
    if (b && i) {
        const sg_module *m = b->launch->module;
        bool known = i->file > 0 && i->file < m->n_files && m->file[i->file];
        if (i->line) ADD(" at %s:%d", known ? m->file[i->file] : "?", i->line);
        if (w && w->func) sg_text(w->func, i, text, sizeof text);
        ADD(" (PTX %d: %s)", i->ptx_line, text);
    }
    if (b) ADD(", block (%u,%u,%u)", b->ctaid.x, b->ctaid.y, b->ctaid.z);
    if (b && w && lane >= 0) {
        sg_dim t = dim_of((uint64_t)(w->id * SG_LANES + lane), b->launch->block);
        ADD(", thread (%u,%u,%u)", t.x, t.y, t.z);
    }
    ADD(": ");
    n += (size_t)vsnprintf(line + n, size - n, fmt, ap);
    fflush(stdout);
    fprintf(stderr, "%s\n", line);
    fflush(stderr);
#undef ADD
}

void sg_violation(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                  const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    if (violations++ < SHOWN) say("VIOLATION", b, w, i, lane, fmt, ap);
    va_end(ap);
    if (!sg_get_config()->keep) _exit(86);
}

uint64_t sg_violations(void) { return violations; }

_Noreturn void sg_stop(const sg_block *b, const sg_warp *w, const sg_instr *i, const char *fmt,
                       ...) {
    va_list ap;
    va_start(ap, fmt);
    say("STOP", b, w, i, -1, fmt, ap);
    va_end(ap);
    _exit(87);
}

__attribute__((destructor)) static void say_violations(void) {
    if (violations) fprintf(stderr, "softgpu: %llu violations\n", (unsigned long long)violations);
}

/* === 3. Work and its order ==================================================================== */

enum { STAMP = (1 << 27) - 1, ATOMIC = 1 << 27, MASK_AT = 28 };
#define LISTED 0xffffffffu                 /* touch.writer: the others are in region.list       */

typedef struct { uint32_t base, last; sg_work work; } past;
static past *done;                         /* [n_done] what ran and may not be ordered, by base */
static int n_done, cap_done;
static uint32_t base = 1, floor_stamp = 1, next_stamp = 3;
static uint32_t settled = 1;               /* older ones are before all that is to come         */

static void renumber(uint32_t less);

/* All that ran with this stamp or later is not surely before what is to come. */
static uint32_t oldest(void) { return n_done ? done[0].base : next_stamp; }

void sg_work_begin(const sg_work *w, uint64_t blocks) {
    if (blocks + 2 >= STAMP - next_stamp) {
        renumber(oldest() - 1);
        if (blocks + 2 >= STAMP - next_stamp)
            sg_stop(NULL, NULL, NULL, "%s: more blocks than can be told apart", w->name);
    }
    settled = oldest();
    base = floor_stamp = next_stamp;
    next_stamp += (uint32_t)blocks + 1;
    for (int i = n_done - 1; i >= 0; i--)
        if (done[i].work.seq > w->clock.seq[done[i].work.stream]) floor_stamp = done[i].base;
    if (n_done == cap_done) {
        cap_done = cap_done ? 2 * cap_done : 64;
        done = realloc(done, sizeof *done * (size_t)cap_done);
        if (!done) sg_stop(NULL, NULL, NULL, "no host memory for the list of work");
    }
    done[n_done] = (past){ base, next_stamp - 1, *w };
    current = &done[n_done++].work;
}

void sg_work_forget(const sg_clock *c) {
    int n = 0;
    for (int i = 0; i < n_done; i++)
        if (done[i].work.seq > c->seq[done[i].work.stream]) done[n++] = done[i];
    n_done = n;
    current = NULL;
}

static const past *work_of(uint32_t stamp) {
    int lo = 0, hi = n_done;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (done[mid].base <= stamp) lo = mid + 1;
        else hi = mid;
    }
    return lo ? &done[lo - 1] : NULL;
}

/* Does what has this stamp come before `mine`, a block of the work being run? */
static bool before(uint32_t stamp, uint32_t mine) {
    if (stamp < floor_stamp || stamp == mine) return true;
    if (stamp >= base) return false;
    const past *p = work_of(stamp);
    /* forgotten work was before all that came later */
    if (!p || stamp > p->last || !current) return true;
    return p->work.seq <= current->clock.seq[p->work.stream];
}

/* === 4. Regions =============================================================================== */

typedef struct { uint32_t writer, reader; } touch;

enum { LIST = 13 };
#define NO_LIST 0xffffffffu
typedef struct {                           /* of 4 bytes: all that touched them and count yet   */
    uint32_t n, writes;                    /* bit i of writes: who[i] wrote                     */
    uint32_t who[LIST + 1];
} list;

struct sg_region {
    uint64_t base, bytes, map_bytes, number;
    uint8_t *host, *map;
    uint8_t *written;                      /* bits; NULL: everything (pinned memory)            */
    touch *touch;
    list *list;
    uint32_t n_lists, cap_lists;
    uint32_t free_list;                    /* the next one is its who[0]; or NO_LIST            */
    sg_region_kind kind;
    bool live;
};

/* Below where Linux puts mappings; reserved, so that a host that follows one of them crashes. */
#define FIRST_ADDRESS 0x7d0000000000ull
#define ADDRESS_BYTES 0x010000000000ull
enum { ALIGN = 256, GUARD = 4096 };

static sg_region **region;                 /* [n_regions] by base, also freed ones              */
static int n_regions, cap_regions;
static sg_region nowhere, *last = &nowhere;
static uint64_t next_address, used, next_number;

static int region_index(uint64_t address) {     /* the last one whose base <= address, or -1 */
    int lo = 0, hi = n_regions;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (region[mid]->base <= address) lo = mid + 1;
        else hi = mid;
    }
    return lo - 1;
}

static bool inside(const sg_region *r, uint64_t address, uint64_t bytes) {
    uint64_t off = address - r->base;
    return r->live && off < r->bytes && bytes <= r->bytes - off;
}

sg_region *sg_region_at(uint64_t address, uint64_t bytes) {
    int i = region_index(address);
    return i >= 0 && inside(region[i], address, bytes) ? region[i] : NULL;
}

sg_region_kind sg_region_what(const sg_region *r) { return r->kind; }
uint64_t sg_region_base(const sg_region *r) { return r->base; }
uint64_t sg_region_bytes(const sg_region *r) { return r->bytes; }
uint64_t sg_memory_used(void) { return used; }
bool sg_device_address(uint64_t a) { return a - FIRST_ADDRESS < ADDRESS_BYTES; }

static uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static void *map_bytes(void *where, uint64_t bytes, int prot, int flags) {
    void *p = mmap(where, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static uint64_t take_address(uint64_t bytes) {
    if (!next_address) {
        next_address = FIRST_ADDRESS;
        void *at = (void *)(uintptr_t)next_address;
        map_bytes(at, ADDRESS_BYTES, PROT_NONE, MAP_FIXED_NOREPLACE);
    }
    uint64_t a = next_address;
    next_address = round_up(a + bytes + GUARD, ALIGN);
    if (next_address > FIRST_ADDRESS + ADDRESS_BYTES)
        sg_stop(NULL, NULL, NULL, "the device's addresses are used up");
    return a;
}

static void insert(sg_region *r) {
    if (n_regions == cap_regions) {
        cap_regions = cap_regions ? 2 * cap_regions : 256;
        region = realloc(region, sizeof *region * (size_t)cap_regions);
        if (!region) sg_stop(NULL, NULL, NULL, "no host memory for the list of allocations");
    }
    int at = region_index(r->base) + 1;
    memmove(region + at + 1, region + at, sizeof *region * (size_t)(n_regions - at));
    region[at] = r;
    n_regions++;
}

sg_region *sg_region_new(sg_region_kind kind, uint64_t bytes, void *host) {
    bool pinned = kind == SG_PINNED;
    uint64_t room = sg_get_config()->device.memory_bytes - used;
    if (!pinned && (bytes > room || round_up(bytes, ALIGN) > room)) return NULL;
    uint64_t data = pinned ? 0 : round_up(bytes, 64);
    uint64_t bits = pinned ? 0 : round_up(bytes / 8 + 9, 64);
    sg_region *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->map_bytes = data + bits + (bytes / 4 + 2) * sizeof *r->touch;
    r->map = map_bytes(NULL, r->map_bytes, PROT_READ | PROT_WRITE, 0);
    if (!r->map) { free(r); return NULL; }
    r->host = pinned ? host : r->map;
    r->written = pinned ? NULL : r->map + data;
    r->touch = (touch *)(void *)(r->map + data + bits);
    r->free_list = NO_LIST;
    r->kind = kind;
    r->bytes = bytes;
    r->live = true;
    r->number = ++next_number;
    r->base = pinned ? (uint64_t)(uintptr_t)host : take_address(bytes);
    if (!pinned) used += round_up(bytes, ALIGN);
    insert(r);
    return r;
}

void sg_region_free(sg_region *r) {
    munmap(r->map, r->map_bytes);
    free(r->list);
    r->list = NULL;
    r->host = r->map = r->written = NULL;
    r->touch = NULL;
    r->live = false;
    if (last == r) last = &nowhere;
    if (r->kind != SG_PINNED) { used -= round_up(r->bytes, ALIGN); return; }
    int at = region_index(r->base);        /* the host may get this address again */
    memmove(region + at, region + at + 1, sizeof *region * (size_t)(--n_regions - at));
    free(r);
}

void sg_region_free_all(void) {
    for (int i = 0; i < n_regions; i++)
        if (region[i]->live && region[i]->kind == SG_DEVICE_MEMORY) sg_region_free(region[i]);
}

/* === 5. Who touched what ====================================================================== */

typedef struct { bool found, write, atomic; uint32_t stamp; } conflict;

static uint32_t shifted(uint32_t word, uint32_t less) {
    uint32_t stamp = word & STAMP;
    return stamp > less ? word - less : 0;
}

static void renumber(uint32_t less) {
    for (int i = 0; i < n_regions; i++) {
        sg_region *r = region[i];
        if (!r->live) continue;
        for (uint64_t g = 0; g < r->bytes / 4 + 2; g++) {
            touch *t = &r->touch[g];
            if (t->writer == LISTED || !(t->writer | t->reader)) continue;
            *t = (touch){ shifted(t->writer, less), shifted(t->reader, less) };
        }
        for (uint32_t l = 0; l < r->n_lists; l++)
            for (uint32_t k = 0; k < r->list[l].n; k++)
                r->list[l].who[k] = shifted(r->list[l].who[k], less);
    }
    for (int i = 0; i < n_done; i++) {
        done[i].base -= less;
        done[i].last -= less;
    }
    next_stamp -= less;
}

static void put_list(sg_region *r, touch *t, const list *l) {
    int writes = __builtin_popcount(l->writes);
    if (writes <= 1 && l->n - (uint32_t)writes <= 1) {
        if (t->writer == LISTED) {
            r->list[t->reader] = (list){ .who = { r->free_list } };
            r->free_list = t->reader;
        }
        *t = (touch){ 0, 0 };
        for (uint32_t k = 0; k < l->n; k++) {
            if (l->writes >> k & 1) t->writer = l->who[k];
            else t->reader = l->who[k];
        }
        return;
    }
    if (t->writer != LISTED && r->free_list != NO_LIST) {
        *t = (touch){ LISTED, r->free_list };
        r->free_list = r->list[r->free_list].who[0];
    } else if (t->writer != LISTED) {
        if (r->n_lists == r->cap_lists) {
            r->cap_lists = r->cap_lists ? 2 * r->cap_lists : 64;
            r->list = realloc(r->list, sizeof *r->list * r->cap_lists);
            if (!r->list) sg_stop(NULL, NULL, NULL, "no host memory for lists of accesses");
        }
        *t = (touch){ LISTED, r->n_lists++ };
    }
    r->list[t->reader] = *l;
}

static void get_list(const sg_region *r, const touch *t, list *l) {
    *l = (list){ 0 };
    if (t->writer == LISTED) { *l = r->list[t->reader]; return; }
    if (t->writer >> MASK_AT) { l->who[l->n++] = t->writer; l->writes = 1; }
    if (t->reader >> MASK_AT) l->who[l->n++] = t->reader;
}

static void remove_entry(list *l, uint32_t k) {
    uint32_t low = (1u << k) - 1;
    memmove(l->who + k, l->who + k + 1, sizeof *l->who * (l->n - k - 1));
    l->writes = (l->writes & low) | ((l->writes >> 1) & ~low);
    l->n--;
}

/* Is this access already told by entry k, or can it be by making that one of several blocks? */
static bool told(list *l, uint32_t k, uint32_t mine, uint32_t mask, sg_access kind) {
    uint32_t who = l->who[k], stamp = who & STAMP, has = who >> MASK_AT;
    bool wrote = l->writes >> k & 1, atomic = (who & ATOMIC) != 0;
    if (kind == SG_ATOMIC && wrote && !atomic && stamp == mine) return !(mask & ~has);
    if (wrote != (kind != SG_READ) || atomic != (kind == SG_ATOMIC)) return false;
    if (stamp == base || stamp == mine) {
        if (!(mask & ~has)) return true;
        if (stamp == mine) { l->who[k] |= mask << MASK_AT; return true; }
        return false;
    }
    if (kind == SG_WRITE || stamp < base || has != mask) return false;
    l->who[k] = base | (who & ~(uint32_t)STAMP);
    return true;
}

static conflict touch_slowly(sg_region *r, touch *t, uint32_t mine, uint32_t mask,
                             sg_access kind) {
    list l;
    conflict c = { 0 };
    get_list(r, t, &l);
    bool known = false;
    for (uint32_t k = 0; k < l.n; k++) {
        uint32_t who = l.who[k], stamp = who & STAMP;
        bool wrote = l.writes >> k & 1, atomic = (who & ATOMIC) != 0;
        if (!(who >> MASK_AT & mask) || (!wrote && kind == SG_READ)) continue;
        if ((atomic && kind == SG_ATOMIC) || before(stamp, mine) || c.found) continue;
        c = (conflict){ true, wrote, atomic, stamp };
    }
    for (uint32_t k = 0; k < l.n && !known; k++) known = told(&l, k, mine, mask, kind);
    for (uint32_t k = l.n; k-- > 0;) {      /* what this one stands for from now on */
        uint32_t stamp = l.who[k] & STAMP;
        bool wrote = l.writes >> k & 1, atomic = (l.who[k] & ATOMIC) != 0;
        if (stamp == mine || !before(stamp, mine)) continue;
        bool same = kind == SG_READ ? !wrote : kind == SG_WRITE || atomic;
        if (!same && stamp >= settled) continue;
        l.who[k] &= ~(mask << MASK_AT);
        if (!(l.who[k] >> MASK_AT)) remove_entry(&l, k);
    }
    if (!known) {
        if (l.n == LIST) remove_entry(&l, 0);
        if (kind != SG_READ) l.writes |= 1u << l.n;
        l.who[l.n++] = mine | (kind == SG_ATOMIC ? ATOMIC : 0) | mask << MASK_AT;
    }
    put_list(r, t, &l);
    return c;
}

/* One access to the bytes `mask` of 4: false where touch_slowly() must look. */
static inline bool touch_fast(touch *t, uint32_t mine, uint32_t mask, sg_access kind) {
    uint32_t w = t->writer, r = t->reader, ws = w & STAMP, rs = r & STAMP;
    if (kind == SG_READ) {
        if (ws >= floor_stamp && ws != mine) return false;
        if (rs == mine) t->reader = r | mask << MASK_AT;
        else if (rs < floor_stamp) t->reader = mine | mask << MASK_AT;
        else if (rs == base) return !(mask & ~(r >> MASK_AT));
        else if (rs > base && mask == r >> MASK_AT) t->reader = base | (r & ~(uint32_t)STAMP);
        else return false;
        return true;
    }
    if (rs >= floor_stamp && rs != mine) return false;
    if (kind == SG_WRITE) {
        if (ws == mine && !(w & ATOMIC)) t->writer = w | mask << MASK_AT;
        else if (ws < floor_stamp) t->writer = mine | mask << MASK_AT;
        else return false;
        return true;
    }
    if (ws == mine && (w & ATOMIC || !(mask & ~(w >> MASK_AT)))) t->writer = w | mask << MASK_AT;
    else if (ws < settled || (ws < floor_stamp && w & ATOMIC))
        t->writer = mine | ATOMIC | mask << MASK_AT;   /* no atomic stands for a plain write */
    else if (w == LISTED || !(w & ATOMIC)) return false;
    else if (ws == base) return !(mask & ~(w >> MASK_AT));
    else if (ws > base && mask == w >> MASK_AT) t->writer = base | (w & ~(uint32_t)STAMP);
    else return false;
    return true;
}

static void touch_again(sg_region *r, uint64_t g, uint32_t mine, uint32_t mask, sg_access kind,
                        conflict *first, uint64_t *where) {
    conflict c = touch_slowly(r, &r->touch[g], mine, mask, kind);
    if (!c.found || first->found) return;
    *first = c;
    *where = g;
}

/* Whole granules g..end; `kind` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void
touch_whole(sg_region *r, uint64_t g, uint64_t end, uint32_t mine, sg_access kind,
            conflict *first, uint64_t *where) {
    touch *t = r->touch;
    for (; g < end; g++)
        if (__builtin_expect(!touch_fast(&t[g], mine, 15, kind), 0))
            touch_again(r, g, mine, 15, kind, first, where);
}

/* Bytes off..off+n of a region; the first conflict. */
static inline conflict touch_range(sg_region *r, uint64_t off, uint64_t n, uint32_t mine,
                                   sg_access kind, uint64_t *where) {
    conflict c = { 0 };
    uint64_t shift = r->base & 3, a = off + shift, end = a + n, first = (a + 3) / 4, at = 0;
    if (a & 3) {
        uint32_t mask = 15u << (a & 3) & 15;
        if (end < first * 4) mask &= 15u >> (first * 4 - end);
        if (!touch_fast(&r->touch[a / 4], mine, mask, kind))
            touch_again(r, a / 4, mine, mask, kind, &c, &at);
    }
    if (kind == SG_READ) touch_whole(r, first, end / 4, mine, SG_READ, &c, &at);
    else if (kind == SG_WRITE) touch_whole(r, first, end / 4, mine, SG_WRITE, &c, &at);
    else touch_whole(r, first, end / 4, mine, SG_ATOMIC, &c, &at);
    if (end & 3 && end / 4 >= first) {
        uint32_t mask = 15u >> (4 - (end & 3));
        if (!touch_fast(&r->touch[end / 4], mine, mask, kind))
            touch_again(r, end / 4, mine, mask, kind, &c, &at);
    }
    if (c.found) *where = at * 4 < a ? off : at * 4 - shift;
    return c;
}

/* === 6. Access ================================================================================ */

static const char *did(sg_access kind) {
    return kind == SG_READ ? "read" : kind == SG_WRITE ? "written" : "changed atomically";
}

static void place_text(const sg_region *r, uint64_t off, char *out, size_t size) {
    static const char *const what[] = { "allocation", "global", "constant", "pinned host memory" };
    snprintf(out, size, "0x%llx, byte %llu of %s %llu (%llu bytes)",
             (unsigned long long)(r->base + off), (unsigned long long)off, what[r->kind],
             (unsigned long long)r->number, (unsigned long long)r->bytes);
}

static void say_nowhere(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                        uint64_t address, uint64_t bytes, sg_access kind) {
    int at = region_index(address);
    const sg_region *r = at >= 0 ? region[at] : NULL;
    char place[160];
    if (r) place_text(r, address - r->base, place, sizeof place);
    if (r && !r->live && address - r->base < r->bytes)
        sg_violation(b, w, i, lane, "use after free: %s at %s", did(kind), place);
    else if (r && address - r->base < r->bytes + GUARD)
        sg_violation(b, w, i, lane, "out of bounds: %llu bytes %s at %s",
                     (unsigned long long)bytes, did(kind), place);
    else
        sg_violation(b, w, i, lane, "out of bounds: %llu bytes %s at 0x%llx, where no memory is",
                     (unsigned long long)bytes, did(kind), (unsigned long long)address);
}

static void say_conflict(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane,
                         const char *place, sg_access kind, conflict c) {
    const char *by = did(!c.write ? SG_READ : c.atomic ? SG_ATOMIC : SG_WRITE);
    if (c.stamp == base) {
        sg_violation(b, w, i, lane, "%s by several blocks of this launch, then %s by this block: "
                     "%s", by, did(kind), place);
    } else if (c.stamp > base && b) {
        sg_dim d = dim_of(c.stamp - base - 1, b->launch->grid);
        sg_violation(b, w, i, lane, "%s by block (%u,%u,%u), then %s by this block of the same "
                     "launch: %s", by, d.x, d.y, d.z, did(kind), place);
    } else {
        const past *p = work_of(c.stamp);
        sg_violation(b, w, i, lane, "%s by %s, then %s by %s, and no event path orders the two: %s",
                     by, p ? p->work.name : "earlier work", did(kind),
                     current ? current->name : "this work", place);
    }
}

/* The written bits of n <= 56 bytes from off. */
static inline uint64_t bits_at(const sg_region *r, uint64_t off, unsigned n) {
    uint64_t x;
    memcpy(&x, r->written + off / 8, 8);
    return x >> (off & 7) & ((1ull << n) - 1);
}

static inline void set_bits(sg_region *r, uint64_t off, unsigned n) {
    uint64_t x;
    memcpy(&x, r->written + off / 8, 8);
    x |= ((1ull << n) - 1) << (off & 7);
    memcpy(r->written + off / 8, &x, 8);
}

void *sg_global(const sg_block *b, const sg_warp *w, const sg_instr *i, int lane, uint64_t address,
                unsigned bytes, sg_access kind) {
    sg_region *r = last;
    char place[160];
    if (!inside(r, address, bytes)) {
        r = sg_region_at(address, bytes);
        if (!r) { say_nowhere(b, w, i, lane, address, bytes, kind); return NULL; }
        last = r;
    }
    uint64_t off = address - r->base, where = off;
    if (r->written && kind != SG_WRITE && bits_at(r, off, bytes) != (1ull << bytes) - 1) {
        place_text(r, off, place, sizeof place);
        sg_violation(b, w, i, lane, "%s before it was written: %s", did(kind), place);
        return NULL;
    }
    if (kind != SG_READ && r->kind == SG_CONSTANTS) {
        place_text(r, off, place, sizeof place);
        sg_violation(b, w, i, lane, "a constant is %s: %s", did(kind), place);
        return NULL;
    }
    conflict c = touch_range(r, off, bytes, base + 1 + (uint32_t)b->index, kind, &where);
    if (kind != SG_READ && r->written) set_bits(r, off, bytes);
    if (!c.found) return r->host + off;
    place_text(r, where, place, sizeof place);
    say_conflict(b, w, i, lane, place, kind, c);
    return NULL;
}

static void set_written(sg_region *r, uint64_t off, uint64_t n) {
    if (!r->written) return;
    for (; n && off & 7; off++, n--) set_bits(r, off, 1);
    memset(r->written + off / 8, 0xff, n / 8);
    if (n & 7) set_bits(r, off + (n & ~7ull), n & 7);
}

uint8_t *sg_range(uint64_t address, uint64_t bytes, sg_access kind) {
    sg_region *r = sg_region_at(address, bytes);
    if (!r) {
        say_nowhere(NULL, NULL, NULL, -1, address, bytes, kind);
        return NULL;
    }
    uint64_t off = address - r->base, where = off;
    char place[160];
    conflict c = touch_range(r, off, bytes, base + 1, kind, &where);
    if (kind != SG_READ) set_written(r, off, bytes);
    if (c.found) {
        place_text(r, where, place, sizeof place);
        say_conflict(NULL, NULL, NULL, -1, place, kind, c);
    }
    return r->host + off;
}

uint64_t sg_unwritten(uint64_t address, uint64_t bytes) {
    const sg_region *r = sg_region_at(address, bytes);
    uint64_t off = r ? address - r->base : 0;
    if (!r || !r->written) return bytes;
    for (uint64_t k = 0; k < bytes; k++) {
        if (!((off + k) & 7) && bytes - k >= 8 && r->written[(off + k) / 8] == 0xff) k += 7;
        else if (!bits_at(r, off + k, 1)) return k;
    }
    return bytes;
}

void sg_copy_written(uint64_t to, uint64_t from, uint64_t bytes) {
    sg_region *t = sg_region_at(to, bytes);
    const sg_region *f = sg_region_at(from, bytes);
    if (!t || !f || !t->written || !f->written) return;
    uint64_t a = to - t->base;
    for (uint64_t k = 0; (k += sg_unwritten(from + k, bytes - k)) < bytes; k++) {
        t->written[(a + k) / 8] &= (uint8_t)~(1u << ((a + k) & 7));
    }
}

/* === 7. Modules =============================================================================== */

typedef struct { const sg_module *m; sg_region **r; } placed;
static placed *module;
static int n_modules, last_module;

static int module_index(const sg_module *m) {
    if (last_module < n_modules && module[last_module].m == m) return last_module;
    for (int i = 0; i < n_modules; i++)
        if (module[i].m == m) return last_module = i;
    return -1;
}

bool sg_module_place(const sg_module *m) {
    placed *grown = realloc(module, sizeof *module * (size_t)(n_modules + 1));
    if (!grown) return false;
    module = grown;
    module[n_modules] = (placed){ m, calloc((size_t)m->n_symbols + 1, sizeof(sg_region *)) };
    if (!module[n_modules].r) return false;
    n_modules++;
    for (int i = 0; i < m->n_symbols; i++) {
        const sg_symbol *s = &m->symbol[i];
        sg_region_kind kind = s->space == S_CONST ? SG_CONSTANTS : SG_GLOBALS;
        sg_region *r = s->bytes ? sg_region_new(kind, s->bytes, NULL) : NULL;
        if (!r && s->bytes) { sg_module_remove(m); return false; }
        module[n_modules - 1].r[i] = r;
        if (!r) continue;
        if (s->init) memcpy(r->host, s->init, s->bytes);
        set_written(r, 0, s->bytes);
    }
    for (int i = 0; i < m->n_relocs; i++) {
        const sg_reloc *l = &m->reloc[i];
        uint64_t value = sg_symbol_address(m, l->target) + l->addend;
        memcpy(module[n_modules - 1].r[l->symbol]->host + l->offset, &value, sizeof value);
    }
    return true;
}

void sg_module_remove(const sg_module *m) {
    int at = module_index(m);
    if (at < 0) return;
    for (int i = 0; i < m->n_symbols; i++)
        if (module[at].r[i]) sg_region_free(module[at].r[i]);
    free(module[at].r);
    module[at] = module[--n_modules];
}

uint64_t sg_symbol_address(const sg_module *m, int module_symbol) {
    int at = module_index(m);
    if (at < 0 || module_symbol < 0 || module_symbol >= m->n_symbols) return 0;
    sg_region *r = module[at].r[module_symbol];
    return r ? r->base : 0;
}
