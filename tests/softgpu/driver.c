/* driver.c -- softgpu's libcuda.so.1: the CUDA driver API over an interpreter.
 *
 *   cuLaunchKernel ---> | piece | piece | piece |  stream 0 (legacy: after and before all blocking
 *   cuMemcpyHtoDAsync   | piece |                  stream 1                           streams)
 *   cuEventRecord       | piece | piece |          stream 2
 *                           \
 *   cuStreamSynchronize -----> drain(): ready heads of the streams, in a seeded order, until what
 *                              the caller waits for has run
 *
 * Nothing runs before somebody waits.  A piece's clock says what of every stream comes before it:
 * its stream's older work, events waited for, the legacy stream, what the host had waited for.
 * It decides both when a piece may run and (memory.c) whether two pieces may touch the same bytes.
 *
 * Pinned host memory is in flight while a copy of it is queued: the host sees poison at a copy's
 * destination, and a hash of its source shows whether the host changed it.  The device sees the
 * true bytes: drain() puts them back first, and poisons again what is still in flight behind it.
 *
 * Contents: 1 state   2 streams and their work   3 in flight   4 running   5 devices, contexts
 *           6 images, modules   7 functions, launches   8 memory   9 copies   10 streams, events
 *           11 entry points                                                                      */
#define _GNU_SOURCE
#include "softgpu.h"
#include "legacy.h"

#include <cuda.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

/* === 1. State ================================================================================= */

typedef enum { P_KERNEL, P_COPY, P_FILL, P_HOST, P_EVENT } piece_kind;
typedef struct piece {                     /* of work                                           */
    struct piece *next;
    sg_work work;
    piece_kind kind;
    CUfunction function;                   /* P_KERNEL                                          */
    sg_dim grid, block;
    uint32_t shared;
    uint8_t *param;
    uint64_t to, from, bytes;              /* P_COPY, P_FILL: device addresses, or              */
    uint8_t *host_to, *host_from;          /* host memory that is not pinned                    */
    uint8_t *staged;                       /* owned: what host_from held                        */
    uint32_t value;
    unsigned width;                        /* P_FILL: bytes of value                            */
    bool in_source, in_target;             /* pinned and in flight                              */
    uint64_t hash;
    uint8_t *saved;                        /* what the poison lies over                         */
    CUhostFn call;                         /* P_HOST                                            */
    void *data;
    CUevent event;                         /* P_EVENT                                           */
} piece;

struct CUstream_st {
    int id;
    bool live, blocking;
    uint64_t queued, done;                 /* pieces                                            */
    sg_clock clock;                        /* what the next piece comes after                   */
    piece *head, *tail;
};
struct CUevent_st {
    CUevent next;
    bool live, timed;
    int pending;                           /* pieces that name it                               */
    uint64_t op;                           /* of the last record; 0: never                      */
    sg_clock clock;
    double time;                           /* ms                                                */
};
struct CUfunc_st { CUmodule module; const sg_func *f; int dynamic, carveout; };
struct CUmod_st { CUmodule next; sg_module *m; struct CUfunc_st *function; };
struct CUctx_st { int retained; unsigned flags; };

typedef struct pinned { struct pinned *next; sg_region *region; bool registered; } pinned;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread bool holds, in_callback;
static __thread CUcontext current;
static bool initialized;
static struct CUctx_st primary;
static struct CUstream_st stream[SG_STREAMS] = { { .live = true, .blocking = true } };
static int n_streams = 1;
static sg_clock host;                      /* what the host has waited for                      */
static CUevent events;
static CUmodule modules;
static pinned *pins;
static uint64_t n_ops, staged_bytes, rng_state;
static bool lost;                          /* the device is                                     */

enum { NEED_NOTHING, NEED_INIT, NEED_CONTEXT };

static int enter(int need) {
    if (in_callback) return CUDA_ERROR_NOT_PERMITTED;
    pthread_mutex_lock(&lock);
    holds = true;
    if (need >= NEED_INIT && !initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (need >= NEED_CONTEXT && lost) return CUDA_ERROR_LAUNCH_FAILED;
    if (need >= NEED_CONTEXT && (!current || !primary.retained)) return CUDA_ERROR_INVALID_CONTEXT;
    return 0;
}

static void leave(const int *entered) {
    (void)entered;
    if (!holds) return;
    holds = false;
    pthread_mutex_unlock(&lock);
}

/* The rest of the function holds the lock. */
#define ENTER(need)                                                                              \
    __attribute__((cleanup(leave))) int entered = enter(need);                                   \
    if (entered) return (CUresult)entered
#define DEMAND(cond, error) do { if (!(cond)) return CUDA_ERROR_##error; } while (0)

static const sg_device *device(void) { return &sg_get_config()->device; }

static void *need_memory(void *p) {
    if (!p) sg_stop(NULL, NULL, NULL, "no host memory for the driver's own lists");
    return p;
}

/* === 2. Streams and their work ================================================================ */

static void join(sg_clock *to, const sg_clock *from) {
    for (int i = 0; i < n_streams; i++)
        if (from->seq[i] > to->seq[i]) to->seq[i] = from->seq[i];
}

static bool reached(const sg_clock *c) {
    for (int i = 0; i < n_streams; i++)
        if (stream[i].done < c->seq[i]) return false;
    return true;
}

/* NULL where the handle is none. */
static CUstream stream_of(CUstream s) {
    if (s == NULL || s == CU_STREAM_LEGACY) return &stream[0];
    if (s == CU_STREAM_PER_THREAD) sg_stop(NULL, NULL, NULL, "CU_STREAM_PER_THREAD is not known");
    for (int i = 1; i < n_streams; i++)
        if (s == &stream[i]) return s->live ? s : NULL;
    return NULL;
}

/* All that work queued in this stream now comes after. */
static sg_clock clock_of(const struct CUstream_st *s) {
    sg_clock c = s->clock;
    join(&c, &host);
    if (s->id && s->blocking) join(&c, &stream[0].clock);
    if (!s->id)
        for (int i = 1; i < n_streams; i++)
            if (stream[i].blocking) join(&c, &stream[i].clock);
    return c;
}

static piece *new_piece(CUstream s, piece_kind kind, const char *name) {
    piece *p = need_memory(calloc(1, sizeof *p));
    p->kind = kind;
    p->work.op = ++n_ops;
    p->work.stream = s->id;
    snprintf(p->work.name, sizeof p->work.name, "%.80s (work %llu, stream %d)", name,
             (unsigned long long)n_ops, s->id);
    p->work.seq = ++s->queued;
    p->work.clock = clock_of(s);
    p->work.clock.seq[s->id] = p->work.seq;
    s->clock = p->work.clock;
    if (s->tail) s->tail->next = p;
    else s->head = p;
    return s->tail = p;
}

/* === 3. In flight ============================================================================= */

enum { POISON = 0xcb };
static piece **flight;                     /* [n_flights] copies of pinned memory, by op        */
static int n_flights, cap_flights;

static uint64_t hash_of(const uint8_t *p, uint64_t n) {
    uint64_t h[4] = { n, 2, 3, 4 }, x[4], k = 0;
    const uint64_t mul = 0x9e3779b97f4a7c15ull;
    for (; k + 32 <= n; k += 32) {
        memcpy(x, p + k, 32);
        for (int i = 0; i < 4; i++) h[i] = ((h[i] ^ x[i]) * mul) ^ (h[i] >> 29);
    }
    for (; k < n; k++) h[k & 3] = ((h[k & 3] ^ p[k]) * mul) ^ (h[k & 3] >> 29);
    return h[0] ^ (h[1] * 3) ^ (h[2] * 5) ^ (h[3] * 7);
}

static uint8_t *pinned_bytes(uint64_t address) { return (uint8_t *)(uintptr_t)address; }

static bool all_poison(const uint8_t *p, uint64_t n) {
    return !n || (p[0] == POISON && !memcmp(p, p + 1, n - 1));
}

static void poison(piece *p) {
    memcpy(p->saved, pinned_bytes(p->to), p->bytes);
    memset(pinned_bytes(p->to), POISON, p->bytes);
}

static void check_source(const piece *p) {
    if (p->in_source && hash_of(pinned_bytes(p->from), p->bytes) != p->hash)
        sg_violation(NULL, NULL, NULL, -1, "host memory written while a copy is in flight: the "
                     "source of %s, %llu bytes at 0x%llx", p->work.name,
                     (unsigned long long)p->bytes, (unsigned long long)p->from);
}

/* Before work runs: the device sees what is under the poison. */
static void flights_land(void) {
    for (int i = 0; i < n_flights; i++) check_source(flight[i]);
    for (int i = n_flights; i-- > 0;) {
        piece *p = flight[i];
        if (!p->in_target) continue;
        if (!all_poison(pinned_bytes(p->to), p->bytes))
            sg_violation(NULL, NULL, NULL, -1, "host memory written while a copy is in flight: "
                         "the destination of %s, %llu bytes at 0x%llx", p->work.name,
                         (unsigned long long)p->bytes, (unsigned long long)p->to);
        memcpy(pinned_bytes(p->to), p->saved, p->bytes);
    }
}

static void flights_take_off(void) {
    for (int i = 0; i < n_flights; i++)
        if (flight[i]->in_target) poison(flight[i]);
    for (int i = 0; i < n_flights; i++)
        if (flight[i]->in_source)
            flight[i]->hash = hash_of(pinned_bytes(flight[i]->from), flight[i]->bytes);
}

/* What is queued never happens; the host's memory is as it was. */
static void lose_device(void) {
    flights_land();
    n_flights = 0;
    lost = true;
}

static void add_flight(piece *p) {
    if (!p->in_source && !p->in_target) return;
    if (n_flights == cap_flights) {
        cap_flights = cap_flights ? 2 * cap_flights : 64;
        flight = need_memory(realloc(flight, sizeof *flight * (size_t)cap_flights));
    }
    if (p->in_source) p->hash = hash_of(pinned_bytes(p->from), p->bytes);
    flight[n_flights++] = p;
    if (!p->in_target) return;
    p->saved = need_memory(malloc(p->bytes));
    /* the poison changes sources that it lies over, which is not the host's doing */
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < n_flights; i++) {
            piece *q = flight[i];
            if (!q->in_source || q->from >= p->to + p->bytes || p->to >= q->from + q->bytes)
                continue;
            if (pass) q->hash = hash_of(pinned_bytes(q->from), q->bytes);
            else check_source(q);
        }
        if (!pass) poison(p);
    }
}

static void remove_flight(const piece *p) {
    for (int i = 0; i < n_flights; i++) {
        if (flight[i] != p) continue;
        memmove(flight + i, flight + i + 1, sizeof *flight * (size_t)(--n_flights - i));
        return;
    }
}

/* Is a copy in flight that reads or writes these bytes of the host? */
static const piece *flight_over(uint64_t address, uint64_t bytes) {
    for (int i = 0; i < n_flights; i++) {
        const piece *p = flight[i];
        if (p->in_source && p->from < address + bytes && address < p->from + p->bytes) return p;
        if (p->in_target && p->to < address + bytes && address < p->to + p->bytes) return p;
    }
    return NULL;
}

/* === 4. Running =============================================================================== */

static uint64_t random_bits(void) {
    uint64_t z = rng_state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void run_kernel(const piece *p) {
    uint64_t seed = sg_get_config()->seed;
    sg_launch l = { .module = p->function->module->m, .func = p->function->f, .device = device(),
        .grid = p->grid, .block = p->block, .dynamic_shared = p->shared, .param = p->param,
        .op = p->work.op, .seed = seed ? (seed * 0x9e3779b97f4a7c15ull + p->work.op) | 1 : 0 };
    sg_work_begin(&p->work, (uint64_t)p->grid.x * p->grid.y * p->grid.z);
    sg_run(&l);
}

static void run_copy(const piece *p) {
    sg_work_begin(&p->work, 1);
    if (!p->host_from && !p->staged && !p->host_to && p->from < p->to + p->bytes &&
        p->to < p->from + p->bytes)
        sg_violation(NULL, NULL, NULL, -1, "%s: source and destination overlap", p->work.name);
    const uint8_t *from = p->staged ? p->staged : p->host_from;
    uint8_t *to = p->host_to;
    uint64_t written = p->bytes;
    if (!from) {
        written = sg_unwritten(p->from, p->bytes);
        from = sg_range(p->from, p->bytes, SG_READ);
    }
    if (!to) to = sg_range(p->to, p->bytes, SG_WRITE);
    if (!from || !to) return;
    memmove(to, from, p->bytes);
    if (written == p->bytes) return;
    if (p->host_to || sg_region_what(sg_region_at(p->to, 1)) == SG_PINNED)
        sg_violation(NULL, NULL, NULL, -1, "%s copies memory that was never written to the host: "
                     "byte %llu of %llu, at 0x%llx", p->work.name, (unsigned long long)written,
                     (unsigned long long)p->bytes, (unsigned long long)(p->from + written));
    else sg_copy_written(p->to, p->from, p->bytes);
}

static void run_fill(const piece *p) {
    sg_work_begin(&p->work, 1);
    uint8_t *to = sg_range(p->to, p->bytes, SG_WRITE);
    if (!to) return;
    for (uint64_t k = 0; k < p->bytes; k += p->width) memcpy(to + k, &p->value, p->width);
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void run_event(const piece *p) {
    CUevent e = p->event;
    e->pending--;
    if (e->op == p->work.op) e->time = now_ms();
    if (e->live || e->pending) return;
    CUevent *at = &events;
    while (*at != e) at = &(*at)->next;
    *at = e->next;
    free(e);
}

/* The head of its stream. */
static void run_piece(piece *p) {
    CUstream s = &stream[p->work.stream];
    remove_flight(p);
    if (p->kind == P_EVENT) run_event(p);
    else if (lost) {}
    else if (p->kind == P_KERNEL) run_kernel(p);
    else if (p->kind == P_COPY) run_copy(p);
    else if (p->kind == P_FILL) run_fill(p);
    else {
        in_callback = true;
        p->call(p->data);
        in_callback = false;
    }
    if (p->staged) staged_bytes -= p->bytes;
    s->done++;
    s->head = p->next;
    if (!s->head) s->tail = NULL;
    free(p->param);
    free(p->staged);
    free(p->saved);
    free(p);
}

/* The next piece on the way to `target`, or one beside it; NULL: nothing is left to run for it. */
static piece *pick(const sg_clock *target) {
    piece *needed[SG_STREAMS], *any[SG_STREAMS];
    unsigned n_needed = 0, n_any = 0;
    for (int i = 0; i < n_streams; i++) {
        piece *p = stream[i].head;
        if (!p) continue;
        sg_clock c = p->work.clock;
        c.seq[i]--;
        if (!reached(&c)) continue;
        any[n_any++] = p;
        if (p->work.seq > target->seq[i]) continue;
        needed[n_needed++] = p;
    }
    if (!n_needed) return NULL;
    if (sg_get_config()->seed) {
        uint64_t r = random_bits();
        return r & 3 ? needed[(r >> 8) % n_needed] : any[(r >> 8) % n_any];
    }
    piece *oldest = needed[0];
    for (unsigned k = 1; k < n_needed; k++)
        if (needed[k]->work.op < oldest->work.op) oldest = needed[k];
    return oldest;
}

/* Run work until `target` is reached, for a host that waits for it; else one piece. */
static void drain(const sg_clock *target, bool wait) {
    if (!rng_state) rng_state = sg_get_config()->seed;
    flights_land();
    while (!reached(target)) {
        piece *p = pick(target);
        if (!p) sg_stop(NULL, NULL, NULL, "the driver waits for work that cannot run");
        run_piece(p);
        if (!wait) break;
    }
    flights_take_off();
    sg_clock all = host;
    if (wait) join(&all, target);
    for (int i = 0; i < n_streams; i++)
        for (const piece *p = stream[i].head; p; p = p->next)
            for (int k = 0; k < n_streams; k++)
                if (p->work.clock.seq[k] < all.seq[k]) all.seq[k] = p->work.clock.seq[k];
    sg_work_forget(&all);
}

/* The host waits. */
static void wait_for(const sg_clock *target) {
    drain(target, true);
    join(&host, target);
}

static void wait_for_all(void) {
    sg_clock all = { { 0 } };
    for (int i = 0; i < n_streams; i++) all.seq[i] = stream[i].queued;
    wait_for(&all);
}

/* The host looks: it learns of what is done, and work goes on by a piece. */
static CUresult query(const sg_clock *target) {
    if (reached(target)) {
        join(&host, target);
        return CUDA_SUCCESS;
    }
    drain(target, false);
    return CUDA_ERROR_NOT_READY;
}

/* === 5. Devices and contexts ================================================================== */

static const struct { CUresult code; const char *name, *text; } errors[] = {
#define E(name, text) { name, #name, text }
    E(CUDA_SUCCESS, "no error"),
    E(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    E(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    E(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    E(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    E(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    E(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    E(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    E(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    E(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    E(CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
      "the provided PTX was compiled with an unsupported toolchain."),
    E(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    E(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    E(CUDA_ERROR_NOT_READY, "device not ready"),
    E(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    E(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    E(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
      "part or all of the requested memory range is already mapped"),
    E(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,
      "pointer does not correspond to a registered memory region"),
    E(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    E(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    E(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    E(CUDA_ERROR_UNKNOWN, "unknown error"),
#undef E
};

static CUresult error_text(CUresult code, const char **out, bool name) {
    DEMAND(out, INVALID_VALUE);
    *out = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) *out = name ? errors[i].name : errors[i].text;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
static CUresult error_name(CUresult code, const char **out) { return error_text(code, out, true); }
static CUresult error_string(CUresult code, const char **out) {
    return error_text(code, out, false);
}

static CUresult init(unsigned flags) {
    ENTER(NEED_NOTHING);
    DEMAND(!flags, INVALID_VALUE);
    sg_get_config();
    initialized = true;
    return CUDA_SUCCESS;
}

static CUresult driver_version(int *out) {
    DEMAND(out, INVALID_VALUE);
    *out = device()->driver_version;
    return CUDA_SUCCESS;
}

static CUresult device_count(int *out) {
    ENTER(NEED_INIT);
    DEMAND(out, INVALID_VALUE);
    *out = 1;
    return CUDA_SUCCESS;
}

static CUresult device_get(CUdevice *out, int ordinal) {
    ENTER(NEED_INIT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(!ordinal, INVALID_DEVICE);
    *out = 0;
    return CUDA_SUCCESS;
}

static CUresult device_name(char *out, int size, CUdevice d) {
    ENTER(NEED_INIT);
    DEMAND(out && size > 0, INVALID_VALUE);
    DEMAND(!d, INVALID_DEVICE);
    snprintf(out, (size_t)size, "softgpu %d.%d", device()->cc / 10, device()->cc % 10);
    return CUDA_SUCCESS;
}

static CUresult device_uuid(CUuuid *out, CUdevice d) {
    ENTER(NEED_INIT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(!d, INVALID_DEVICE);
    memcpy(out->bytes, "softgpu, not one", sizeof out->bytes);
    return CUDA_SUCCESS;
}

static CUresult device_total(size_t *out, CUdevice d) {
    ENTER(NEED_INIT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(!d, INVALID_DEVICE);
    *out = device()->memory_bytes;
    return CUDA_SUCCESS;
}

/* What is not named here is 0: not supported. */
static const struct { CUdevice_attribute a; int value; } attributes[] = {
#define A(name, value) { CU_DEVICE_ATTRIBUTE_##name, value }
    A(TOTAL_CONSTANT_MEMORY, 65536), A(MAX_PITCH, 0x7fffffff), A(CLOCK_RATE, 1500000),
    A(TEXTURE_ALIGNMENT, 512), A(GPU_OVERLAP, 1), A(CAN_MAP_HOST_MEMORY, 1),
    A(CONCURRENT_KERNELS, 1), A(MEMORY_CLOCK_RATE, 8000000), A(GLOBAL_MEMORY_BUS_WIDTH, 256),
    A(L2_CACHE_SIZE, 32 << 20), A(ASYNC_ENGINE_COUNT, 2), A(UNIFIED_ADDRESSING, 1),
    A(STREAM_PRIORITIES_SUPPORTED, 1), A(GLOBAL_L1_CACHE_SUPPORTED, 1),
    A(LOCAL_L1_CACHE_SUPPORTED, 1), A(MAX_REGISTERS_PER_MULTIPROCESSOR, 65536),
    A(CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1), A(HOST_REGISTER_SUPPORTED, 1),
    A(RESERVED_SHARED_MEMORY_PER_BLOCK, 1024), A(PCI_BUS_ID, 1),
#undef A
};

static CUresult device_attribute(int *out, CUdevice_attribute a, CUdevice dev) {
    ENTER(NEED_INIT);
    const sg_device *d = device();
    DEMAND(out && a > 0 && a < CU_DEVICE_ATTRIBUTE_MAX, INVALID_VALUE);
    DEMAND(!dev, INVALID_DEVICE);
    *out = 0;
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i].a == a) *out = attributes[i].value;
#define A(name, value) case CU_DEVICE_ATTRIBUTE_##name: *out = (int)(value); break
    switch (a) {
    A(MAX_THREADS_PER_BLOCK, d->max_threads);
    A(MAX_BLOCK_DIM_X, d->max_block.x);
    A(MAX_BLOCK_DIM_Y, d->max_block.y);
    A(MAX_BLOCK_DIM_Z, d->max_block.z);
    A(MAX_GRID_DIM_X, d->max_grid.x);
    A(MAX_GRID_DIM_Y, d->max_grid.y);
    A(MAX_GRID_DIM_Z, d->max_grid.z);
    A(MAX_SHARED_MEMORY_PER_BLOCK, d->shared_block);
    A(WARP_SIZE, d->warp_size);
    A(MAX_REGISTERS_PER_BLOCK, d->max_regs_block);
    A(MULTIPROCESSOR_COUNT, d->n_sms);
    A(MAX_THREADS_PER_MULTIPROCESSOR, d->max_threads_sm);
    A(COMPUTE_CAPABILITY_MAJOR, d->cc / 10);
    A(COMPUTE_CAPABILITY_MINOR, d->cc % 10);
    A(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, d->shared_sm);
    A(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, d->shared_optin);
    A(MAX_BLOCKS_PER_MULTIPROCESSOR, d->max_blocks_sm);
    default: break;
    }
#undef A
    return CUDA_SUCCESS;
}

static CUresult primary_retain(CUcontext *out, CUdevice d) {
    ENTER(NEED_INIT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(!d, INVALID_DEVICE);
    primary.retained++;
    *out = &primary;
    return CUDA_SUCCESS;
}

static void unload(CUmodule mod);
static void unpin(pinned *p);

/* What the context owned ends with it. */
static void end_context(void) {
    wait_for_all();
    while (modules) unload(modules);
    while (pins) unpin(pins);
    sg_region_free_all();
    for (int i = 1; i < n_streams; i++) stream[i].live = false;
    while (events) {
        CUevent e = events;
        events = e->next;
        free(e);
    }
}

static CUresult primary_release(CUdevice d) {
    ENTER(NEED_INIT);
    DEMAND(!d, INVALID_DEVICE);
    DEMAND(primary.retained, INVALID_CONTEXT);
    if (!--primary.retained) end_context();
    return CUDA_SUCCESS;
}

static CUresult primary_flags(CUdevice d, unsigned flags) {
    ENTER(NEED_INIT);
    DEMAND(!d, INVALID_DEVICE);
    DEMAND(!(flags & ~(unsigned)CU_CTX_FLAGS_MASK), INVALID_VALUE);
    primary.flags = flags;
    return CUDA_SUCCESS;
}

static CUresult primary_state(CUdevice d, unsigned *flags, int *active) {
    ENTER(NEED_INIT);
    DEMAND(flags && active, INVALID_VALUE);
    DEMAND(!d, INVALID_DEVICE);
    *flags = primary.flags;
    *active = primary.retained > 0;
    return CUDA_SUCCESS;
}

static CUresult ctx_set(CUcontext c) {
    ENTER(NEED_INIT);
    DEMAND(!c || (c == &primary && primary.retained), INVALID_CONTEXT);
    current = c;
    return CUDA_SUCCESS;
}

static CUresult ctx_get(CUcontext *out) {
    ENTER(NEED_INIT);
    DEMAND(out, INVALID_VALUE);
    *out = current;
    return CUDA_SUCCESS;
}

static CUresult ctx_device(CUdevice *out) {
    ENTER(NEED_CONTEXT);
    DEMAND(out, INVALID_VALUE);
    *out = 0;
    return CUDA_SUCCESS;
}

static CUresult ctx_device_of(CUdevice *out, CUcontext c) {
    ENTER(c ? NEED_INIT : NEED_CONTEXT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(!c || c == &primary, INVALID_CONTEXT);
    *out = 0;
    return CUDA_SUCCESS;
}

static CUresult ctx_synchronize(void) {
    ENTER(NEED_CONTEXT);
    wait_for_all();
    return CUDA_SUCCESS;
}

static CUresult ctx_synchronize_of(CUcontext c) {
    ENTER(c ? NEED_INIT : NEED_CONTEXT);
    DEMAND(!c || c == &primary, INVALID_CONTEXT);
    wait_for_all();
    return CUDA_SUCCESS;
}

static CUresult priority_range(int *least, int *greatest) {
    ENTER(NEED_CONTEXT);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

/* === 6. Images and modules ====================================================================
 * A fatbin: 16 bytes of header, then entries, each a header and its padded image:
 *     u32 magic  u16 version  u16 header bytes  u64 bytes of the entries
 *     u16 kind (1 PTX, 2 ELF)  u16  u32 header bytes  u64 image bytes  u32 packed bytes
 *     ... u32 capability at 28 ... u64 flags at 40                                               */

enum { FATBIN = 0xba55ed50, FATBIN_HEAD = 16, ENTRY_HEAD = 64, KIND_PTX = 1 };
enum { FLAG_LZ4 = 0x2000, FLAG_ZSTD = 0x8000, FLAG_ARCH_ONLY = 0x100000 };  /* sm_90a */
#define FATBIN_MAX (1ull << 31)

static uint64_t little(const uint8_t *p, unsigned bytes) {
    uint64_t x = 0;
    memcpy(&x, p, bytes);
    return x;
}

/* The PTX of the highest capability that this device can run. */
static CUresult find_ptx(const uint8_t *p, const char **text, size_t *len) {
    uint64_t head = little(p + 6, 2), total = little(p + 8, 8), at = head;
    int best = -1;
    DEMAND(head >= FATBIN_HEAD && total <= FATBIN_MAX, INVALID_IMAGE);
    total += head;
    while (at < total) {
        DEMAND(total - at >= ENTRY_HEAD, INVALID_IMAGE);
        const uint8_t *e = p + at;
        uint64_t skip = little(e + 4, 4), bytes = little(e + 8, 8), flags = little(e + 40, 8);
        DEMAND(skip >= ENTRY_HEAD && skip <= total - at && bytes <= total - at - skip,
               INVALID_IMAGE);
        at += skip + bytes;
        int cc = (int)little(e + 28, 4);
        if (little(e, 2) != KIND_PTX || cc > device()->cc || cc <= best) continue;
        if (flags & FLAG_ARCH_ONLY && cc != device()->cc) continue;
        if (flags & (FLAG_LZ4 | FLAG_ZSTD))
            sg_stop(NULL, NULL, NULL, "the fatbin's PTX is compressed: nvcc --no-compress");
        best = cc;
        *text = (const char *)e + skip;
        *len = strnlen(*text, bytes);
    }
    return best < 0 ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

/* The CUDA version that brought a PTX version, 0 where the text names none. */
static int version_of(const char *text, size_t len) {
    const char *at = memmem(text, len, ".version", 8);
    int major = 0, minor = 0;
    char line[32] = "";
    if (!at) return 0;
    size_t n = len - (size_t)(at - text) - 8;
    memcpy(line, at + 8, n < sizeof line ? n : sizeof line - 1);
    if (sscanf(line, "%d.%d", &major, &minor) != 2) return 0;
    if (major >= 9) return (major + 4) * 1000 + minor * 10;
    if (major == 8 && minor >= 6) minor++;        /* 8.6 came with 12.7 */
    return (major + 4) * 1000 + minor * 10;
}

static CUresult load(CUmodule *out, const void *image) {
    const char *text = image;
    size_t len = 0;
    uint32_t magic;
    DEMAND(out && image, INVALID_VALUE);
    DEMAND(strnlen(image, 4) == 4, INVALID_IMAGE);
    memcpy(&magic, image, 4);
    if (magic == FATBIN) {
        CUresult e = find_ptx(image, &text, &len);
        if (e) return e;
    } else {
        DEMAND(memcmp(image, "\177ELF", 4), NO_BINARY_FOR_GPU);
        len = strlen(text);
    }
    int version = version_of(text, len);
    DEMAND(version, INVALID_IMAGE);
    DEMAND(version <= device()->driver_version, UNSUPPORTED_PTX_VERSION);
    char why[300];
    sg_module *m = sg_parse(text, len, why, sizeof why);
    if (!m) sg_stop(NULL, NULL, NULL, "cuModuleLoadData: %s", why);
    CUresult e = CUDA_SUCCESS;
    if (m->cc > device()->cc) e = CUDA_ERROR_NO_BINARY_FOR_GPU;
    for (int i = 0; i < m->n_funcs; i++)
        if (m->func[i].shared_bytes > device()->shared_block) e = CUDA_ERROR_INVALID_PTX;
    if (!e && !sg_module_place(m)) e = CUDA_ERROR_OUT_OF_MEMORY;
    if (e) { sg_module_free(m); return e; }
    CUmodule mod = need_memory(calloc(1, sizeof *mod));
    mod->m = m;
    mod->function = need_memory(calloc((size_t)m->n_funcs + 1, sizeof *mod->function));
    for (int i = 0; i < m->n_funcs; i++) {
        const sg_func *f = &m->func[i];
        int dynamic = (int)(device()->shared_block - f->shared_bytes);
        mod->function[i] = (struct CUfunc_st){ mod, f, dynamic, -1 };
    }
    mod->next = modules;
    modules = mod;
    *out = mod;
    return CUDA_SUCCESS;
}

static CUresult module_load(CUmodule *out, const void *image) {
    ENTER(NEED_CONTEXT);
    return load(out, image);
}

static CUresult module_load_ex(CUmodule *out, const void *image, unsigned n, CUjit_option *option,
                               void **value) {
    ENTER(NEED_CONTEXT);
    DEMAND(!n || (option && value), INVALID_VALUE);
    return load(out, image);
}

static bool module_valid(CUmodule mod) {
    for (CUmodule m = modules; m; m = m->next)
        if (m == mod) return true;
    return false;
}

static void unload(CUmodule mod) {
    CUmodule *at = &modules;
    while (*at != mod) at = &(*at)->next;
    *at = mod->next;
    sg_module_remove(mod->m);
    sg_module_free(mod->m);
    free(mod->function);
    free(mod);
}

static CUresult module_unload(CUmodule mod) {
    ENTER(NEED_CONTEXT);
    DEMAND(module_valid(mod), INVALID_HANDLE);
    wait_for_all();
    unload(mod);
    return CUDA_SUCCESS;
}

static CUresult find_function(CUfunction *out, CUmodule mod, const char *name) {
    DEMAND(out && name, INVALID_VALUE);
    DEMAND(module_valid(mod), INVALID_HANDLE);
    const sg_func *f = sg_find(mod->m, name);
    DEMAND(f, NOT_FOUND);
    *out = &mod->function[f - mod->m->func];
    return CUDA_SUCCESS;
}

static CUresult module_function(CUfunction *out, CUmodule mod, const char *name) {
    ENTER(NEED_CONTEXT);
    return find_function(out, mod, name);
}

static CUresult find_global(CUdeviceptr *out, size_t *bytes, CUmodule mod, const char *name) {
    DEMAND(name && (out || bytes), INVALID_VALUE);
    DEMAND(module_valid(mod), INVALID_HANDLE);
    for (int i = 0; i < mod->m->n_symbols; i++) {
        const sg_symbol *s = &mod->m->symbol[i];
        if (strcmp(s->name, name)) continue;
        if (out) *out = sg_symbol_address(mod->m, i);
        if (bytes) *bytes = s->bytes;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

static CUresult module_global(CUdeviceptr *out, size_t *bytes, CUmodule mod, const char *name) {
    ENTER(NEED_CONTEXT);
    return find_global(out, bytes, mod, name);
}

/* A library is its module, a kernel its function. */
static CUresult library_load(CUlibrary *out, const void *code, CUjit_option *jit, void **jit_value,
                             unsigned n_jit, CUlibraryOption *option, void **value, unsigned n) {
    ENTER(NEED_CONTEXT);
    DEMAND((!n_jit || (jit && jit_value)) && (!n || option), INVALID_VALUE);
    (void)value;
    return load((CUmodule *)out, code);
}

static CUresult library_unload(CUlibrary l) { return module_unload((CUmodule)l); }

static CUresult library_kernel(CUkernel *out, CUlibrary l, const char *name) {
    ENTER(NEED_INIT);
    return find_function((CUfunction *)out, (CUmodule)l, name);
}

static CUresult library_global(CUdeviceptr *out, size_t *bytes, CUlibrary l, const char *name) {
    ENTER(NEED_CONTEXT);
    return find_global(out, bytes, (CUmodule)l, name);
}

/* === 7. Functions and launches ================================================================ */

static bool function_valid(CUfunction f) {
    for (CUmodule m = modules; m; m = m->next)
        for (int i = 0; i < m->m->n_funcs; i++)
            if (f == &m->function[i]) return true;
    return false;
}

static CUresult kernel_function(CUfunction *out, CUkernel k) {
    ENTER(NEED_CONTEXT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(function_valid((CUfunction)k), INVALID_HANDLE);
    *out = (CUfunction)k;
    return CUDA_SUCCESS;
}

/* PTX has no count of real registers: all its virtual ones, as far as the limits let ptxas. */
static int registers(const sg_func *f) {
    int n = 0, cap = f->max_threads ? device()->max_regs_block / f->max_threads : 64;
    for (int i = 0; i < f->n_regs; i++) n += f->reg[i] != T_PRED;
    cap = cap > 255 ? 255 : cap & ~7;
    return n < 16 ? 16 : n > cap ? cap : n;
}

static int max_threads(const sg_func *f) {
    return f->max_threads && f->max_threads < device()->max_threads ? f->max_threads
                                                                     : device()->max_threads;
}

static CUresult func_get(int *out, CUfunction_attribute a, CUfunction fn) {
    ENTER(NEED_CONTEXT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(function_valid(fn), INVALID_HANDLE);
    const sg_func *f = fn->f;
    uint64_t constants = 0;
    for (int i = 0; i < f->n_symbols; i++)
        if (f->symbol[i].space == S_CONST) constants += f->symbol[i].bytes;
    switch ((int)a) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *out = max_threads(f); break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *out = (int)f->shared_bytes; break;
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES: *out = (int)constants; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *out = (int)f->local_bytes; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *out = registers(f); break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: *out = fn->module->m->cc; break;
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *out = device()->cc; break;
    case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA: *out = 0; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *out = fn->dynamic; break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: *out = fn->carveout; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

static CUresult func_set(CUfunction fn, CUfunction_attribute a, int value) {
    ENTER(NEED_CONTEXT);
    DEMAND(function_valid(fn), INVALID_HANDLE);
    if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        int most = (int)(device()->shared_optin - fn->f->shared_bytes);
        DEMAND(value >= 0 && value <= most, INVALID_VALUE);
        fn->dynamic = value;
    } else if (a == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
        DEMAND(value >= -1 && value <= 100, INVALID_VALUE);
        fn->carveout = value;
    } else return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

static CUresult func_name(const char **out, CUfunction fn) {
    ENTER(NEED_CONTEXT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(function_valid(fn), INVALID_HANDLE);
    *out = fn->f->name;
    return CUDA_SUCCESS;
}

static CUresult occupancy(int *out, CUfunction fn, int threads, size_t dynamic) {
    ENTER(NEED_CONTEXT);
    DEMAND(out && threads > 0, INVALID_VALUE);
    DEMAND(function_valid(fn), INVALID_HANDLE);
    const sg_device *d = device();
    uint64_t shared = fn->f->shared_bytes + dynamic, warps = ((uint64_t)threads + 31) / 32;
    uint64_t by_threads = (uint64_t)d->max_threads_sm / 32 / warps;
    uint64_t by_shared = d->shared_sm / (shared + 1024);
    uint64_t by_registers = 65536 / ((uint64_t)registers(fn->f) * warps * 32);
    uint64_t n = (uint64_t)d->max_blocks_sm;
    if (by_threads < n) n = by_threads;
    if (by_shared < n) n = by_shared;
    if (by_registers < n) n = by_registers;
    if (threads > max_threads(fn->f) || dynamic > (size_t)fn->dynamic) n = 0;
    *out = (int)n;
    return CUDA_SUCCESS;
}

static CUresult check_launch(CUfunction fn, sg_dim grid, sg_dim block, unsigned shared) {
    const sg_device *d = device();
    sg_dim g = d->max_grid, b = d->max_block;
    DEMAND(grid.x && grid.y && grid.z && block.x && block.y && block.z, INVALID_VALUE);
    DEMAND(grid.x <= g.x && grid.y <= g.y && grid.z <= g.z, INVALID_VALUE);
    DEMAND(block.x <= b.x && block.y <= b.y && block.z <= b.z, INVALID_VALUE);
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    DEMAND(threads <= (uint64_t)d->max_threads, INVALID_VALUE);
    DEMAND(shared <= (unsigned)fn->dynamic, INVALID_VALUE);
    /* what the device could do, but not with this function */
    DEMAND(threads <= (uint64_t)max_threads(fn->f), LAUNCH_OUT_OF_RESOURCES);
    uint64_t warps = (threads + 31) / 32;
    DEMAND((uint64_t)registers(fn->f) * warps * 32 <= (uint64_t)d->max_regs_block,
           LAUNCH_OUT_OF_RESOURCES);
    return CUDA_SUCCESS;
}

/* The packed arguments of kernelParams or extra; NULL where neither gives them. */
static uint8_t *arguments(const sg_func *f, void **params, void **extra) {
    uint8_t *out = need_memory(calloc(1, f->param_bytes + 16));
    const void *buffer = NULL;
    size_t size = 0;
    bool ok = true;
    for (int i = 0; params && i < f->n_params; i++) {
        const sg_symbol *s = &f->symbol[i];
        if (!params[i]) ok = false;
        else memcpy(out + s->offset, params[i], s->bytes);
    }
    for (int i = 0; !params && extra && extra[i] != CU_LAUNCH_PARAM_END; i += 2) {
        if (extra[i] == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = extra[i + 1];
        else if (extra[i] == CU_LAUNCH_PARAM_BUFFER_SIZE) size = *(size_t *)extra[i + 1];
        else ok = false;
    }
    if (!params && f->n_params) {
        if (!buffer || size < f->args_bytes) ok = false;
        else memcpy(out, buffer, f->args_bytes);
    }
    if (ok) return out;
    free(out);
    return NULL;
}

static CUresult launch(CUfunction fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                       unsigned by, unsigned bz, unsigned shared, CUstream hs, void **params,
                       void **extra) {
    ENTER(NEED_CONTEXT);
    CUstream s = stream_of(hs);
    DEMAND(s && function_valid(fn), INVALID_HANDLE);
    DEMAND(!params || !extra, INVALID_VALUE);
    sg_dim grid = { gx, gy, gz }, block = { bx, by, bz };
    CUresult e = check_launch(fn, grid, block, shared);
    if (e) return e;
    static uint64_t launched;
    if (sg_get_config()->lost && launched++ == sg_get_config()->lost) lose_device();
    if (lost) return CUDA_ERROR_LAUNCH_FAILED;
    uint8_t *param = arguments(fn->f, params, extra);
    DEMAND(param, INVALID_VALUE);
    char name[100];
    snprintf(name, sizeof name, "kernel %s", fn->f->name);
    piece *p = new_piece(s, P_KERNEL, name);
    p->function = fn;
    p->grid = grid;
    p->block = block;
    p->shared = shared;
    p->param = param;
    return CUDA_SUCCESS;
}

static CUresult launch_host(CUstream hs, CUhostFn call, void *data) {
    ENTER(NEED_CONTEXT);
    CUstream s = stream_of(hs);
    DEMAND(s, INVALID_HANDLE);
    DEMAND(call, INVALID_VALUE);
    piece *p = new_piece(s, P_HOST, "host function");
    p->call = call;
    p->data = data;
    return CUDA_SUCCESS;
}

/* === 8. Memory ================================================================================ */

static CUresult mem_alloc(CUdeviceptr *out, size_t bytes) {
    ENTER(NEED_CONTEXT);
    DEMAND(out && bytes, INVALID_VALUE);
    sg_region *r = sg_region_new(SG_DEVICE_MEMORY, bytes, NULL);
    DEMAND(r, OUT_OF_MEMORY);
    *out = sg_region_base(r);
    return CUDA_SUCCESS;
}

static CUresult mem_free(CUdeviceptr p) {
    ENTER(NEED_CONTEXT);
    sg_region *r = sg_region_at(p, 1);
    DEMAND(r && sg_region_base(r) == p && sg_region_what(r) == SG_DEVICE_MEMORY, INVALID_VALUE);
    wait_for_all();
    sg_region_free(r);
    return CUDA_SUCCESS;
}

static CUresult mem_info(size_t *free_bytes, size_t *total) {
    ENTER(NEED_CONTEXT);
    DEMAND(free_bytes && total, INVALID_VALUE);
    *total = device()->memory_bytes;
    *free_bytes = device()->memory_bytes - sg_memory_used();
    return CUDA_SUCCESS;
}

static CUresult pin(void *p, size_t bytes, bool registered) {
    sg_region *r = sg_region_new(SG_PINNED, bytes, p);
    DEMAND(r, OUT_OF_MEMORY);
    pinned *n = need_memory(calloc(1, sizeof *n));
    *n = (pinned){ pins, r, registered };
    pins = n;
    return CUDA_SUCCESS;
}

static void unpin(pinned *p) {
    uint64_t base = sg_region_base(p->region), bytes = sg_region_bytes(p->region);
    const piece *q = flight_over(base, bytes);
    if (q) {
        sg_violation(NULL, NULL, NULL, -1, "pinned memory at 0x%llx is freed or unregistered "
                     "while a copy is in flight: %s", (unsigned long long)base, q->work.name);
        wait_for_all();
    }
    pinned **at = &pins;
    while (*at != p) at = &(*at)->next;
    *at = p->next;
    sg_region_free(p->region);
    if (!p->registered) free(pinned_bytes(base));
    free(p);
}

static pinned *find_pin(const void *address, bool registered) {
    for (pinned *p = pins; p; p = p->next)
        if (sg_region_base(p->region) == (uint64_t)(uintptr_t)address &&
            p->registered == registered) return p;
    return NULL;
}

static CUresult host_alloc(void **out, size_t bytes, unsigned flags) {
    ENTER(NEED_CONTEXT);
    DEMAND(out && bytes && flags < 8, INVALID_VALUE);
    DEMAND(bytes < SIZE_MAX / 2, OUT_OF_MEMORY);
    void *p = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    DEMAND(p, OUT_OF_MEMORY);
    memset(p, POISON, bytes);
    CUresult e = pin(p, bytes, false);
    if (e) free(p);
    else *out = p;
    return e;
}

static CUresult alloc_host(void **out, size_t bytes) { return host_alloc(out, bytes, 0); }

static CUresult host_free(void *p) {
    ENTER(NEED_CONTEXT);
    pinned *n = find_pin(p, false);
    DEMAND(n, INVALID_VALUE);
    unpin(n);
    return CUDA_SUCCESS;
}

static CUresult host_register(void *p, size_t bytes, unsigned flags) {
    ENTER(NEED_CONTEXT);
    DEMAND(p && bytes && flags < 16 && bytes < SIZE_MAX / 2, INVALID_VALUE);
    DEMAND(!(flags & CU_MEMHOSTREGISTER_IOMEMORY), NOT_SUPPORTED);
    DEMAND(!sg_device_address((uint64_t)(uintptr_t)p), INVALID_VALUE);
    for (const pinned *n = pins; n; n = n->next) {
        uint64_t base = sg_region_base(n->region), at = (uint64_t)(uintptr_t)p;
        DEMAND(at >= base + sg_region_bytes(n->region) || base >= at + bytes,
               HOST_MEMORY_ALREADY_REGISTERED);
    }
    return pin(p, bytes, true);
}

static CUresult host_unregister(void *p) {
    ENTER(NEED_CONTEXT);
    DEMAND(p, INVALID_VALUE);
    pinned *n = find_pin(p, true);
    DEMAND(n, HOST_MEMORY_NOT_REGISTERED);
    unpin(n);
    return CUDA_SUCCESS;
}

static CUresult host_pointer(CUdeviceptr *out, void *p, unsigned flags) {
    ENTER(NEED_CONTEXT);
    DEMAND(out && p && !flags, INVALID_VALUE);
    const sg_region *r = sg_region_at((uint64_t)(uintptr_t)p, 1);
    DEMAND(r && sg_region_what(r) == SG_PINNED, INVALID_VALUE);
    *out = (CUdeviceptr)(uintptr_t)p;
    return CUDA_SUCCESS;
}

/* === 9. Copies ================================================================================ */

typedef enum { ANY, HOST, DEVICE } side;
enum { STAGED_MAX = 256 << 20 };

/* What bytes at an address are: the device's, pinned, or (*pageable) the host's own. */
static CUresult classify(uint64_t at, uint64_t bytes, side want, bool *pageable, bool *pins_it) {
    const sg_region *r = sg_region_at(at, bytes);
    *pins_it = r && sg_region_what(r) == SG_PINNED;
    *pageable = !r;
    if (r) return want == HOST && !*pins_it ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    DEMAND(want != DEVICE && !sg_device_address(at) && !sg_region_at(at, 1), INVALID_VALUE);
    return CUDA_SUCCESS;
}

/* How long the host waits: a copy to pageable memory until it is done; one from it until its bytes
 * are staged (a synchronous one also for the stream's older work); among pinned and device memory
 * a synchronous one until it is done, but from device to device not at all. */
static CUresult queue_copy(const char *name, uint64_t to, side to_side, uint64_t from,
                           side from_side, uint64_t bytes, CUstream hs, bool async) {
    CUstream s = stream_of(hs);
    bool page_to, page_from, pin_to, pin_from;
    DEMAND(s, INVALID_HANDLE);
    if (!bytes) return CUDA_SUCCESS;
    DEMAND(to && from && bytes < SIZE_MAX / 2, INVALID_VALUE);
    CUresult e = classify(to, bytes, to_side, &page_to, &pin_to);
    if (!e) e = classify(from, bytes, from_side, &page_from, &pin_from);
    if (e) return e;
    piece *p = new_piece(s, P_COPY, name);
    sg_clock until = p->work.clock;
    p->to = to;
    p->from = from;
    p->bytes = bytes;
    if (page_to) p->host_to = pinned_bytes(to);
    if (page_from && !page_to) {
        if (!async || staged_bytes > STAGED_MAX) {
            sg_clock older = until;
            older.seq[s->id]--;
            wait_for(&older);
        }
        p->staged = need_memory(malloc(bytes));
        memcpy(p->staged, pinned_bytes(from), bytes);
        staged_bytes += bytes;
        return CUDA_SUCCESS;
    }
    if (page_from) p->host_from = pinned_bytes(from);
    p->in_source = pin_from;
    p->in_target = pin_to;
    bool waits = page_to || (!async && (pin_to || pin_from));
    if (!waits) add_flight(p);
    else wait_for(&until);
    return CUDA_SUCCESS;
}

static uint64_t address_of(const void *p) { return (uint64_t)(uintptr_t)p; }

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t n) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpy", to, ANY, from, ANY, n, NULL, false);
}
static CUresult copy_htod(CUdeviceptr to, const void *from, size_t n) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyHtoD", to, DEVICE, address_of(from), HOST, n, NULL, false);
}
static CUresult copy_dtoh(void *to, CUdeviceptr from, size_t n) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyDtoH", address_of(to), HOST, from, DEVICE, n, NULL, false);
}
static CUresult copy_dtod(CUdeviceptr to, CUdeviceptr from, size_t n) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyDtoD", to, DEVICE, from, DEVICE, n, NULL, false);
}
static CUresult copy_async(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyAsync", to, ANY, from, ANY, n, s, true);
}
static CUresult copy_htod_async(CUdeviceptr to, const void *from, size_t n, CUstream s) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyHtoDAsync", to, DEVICE, address_of(from), HOST, n, s, true);
}
static CUresult copy_dtoh_async(void *to, CUdeviceptr from, size_t n, CUstream s) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyDtoHAsync", address_of(to), HOST, from, DEVICE, n, s, true);
}
static CUresult copy_dtod_async(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    ENTER(NEED_CONTEXT);
    return queue_copy("cuMemcpyDtoDAsync", to, DEVICE, from, DEVICE, n, s, true);
}

/* Also a synchronous one does not keep the host waiting, but for pinned memory. */
static CUresult queue_fill(const char *name, CUdeviceptr to, uint32_t value, unsigned width,
                           size_t n, CUstream hs, bool async) {
    CUstream s = stream_of(hs);
    bool pageable, pins_it;
    DEMAND(s, INVALID_HANDLE);
    if (!n) return CUDA_SUCCESS;
    DEMAND(n < SIZE_MAX / 8 && to % width == 0, INVALID_VALUE);
    CUresult e = classify(to, n * width, DEVICE, &pageable, &pins_it);
    if (e) return e;
    piece *p = new_piece(s, P_FILL, name);
    p->to = to;
    p->bytes = n * width;
    p->value = value;
    p->width = width;
    p->in_target = pins_it && async;
    sg_clock until = p->work.clock;
    if (pins_it && !async) wait_for(&until);
    else add_flight(p);
    return CUDA_SUCCESS;
}

static CUresult set_d8(CUdeviceptr to, unsigned char c, size_t n) {
    ENTER(NEED_CONTEXT);
    return queue_fill("cuMemsetD8", to, c, 1, n, NULL, false);
}
static CUresult set_d32(CUdeviceptr to, unsigned x, size_t n) {
    ENTER(NEED_CONTEXT);
    return queue_fill("cuMemsetD32", to, x, 4, n, NULL, false);
}
static CUresult set_d8_async(CUdeviceptr to, unsigned char c, size_t n, CUstream s) {
    ENTER(NEED_CONTEXT);
    return queue_fill("cuMemsetD8Async", to, c, 1, n, s, true);
}
static CUresult set_d32_async(CUdeviceptr to, unsigned x, size_t n, CUstream s) {
    ENTER(NEED_CONTEXT);
    return queue_fill("cuMemsetD32Async", to, x, 4, n, s, true);
}

/* === 10. Streams and events =================================================================== */

static CUresult stream_create_priority(CUstream *out, unsigned flags, int priority) {
    ENTER(NEED_CONTEXT);
    DEMAND(out && flags <= CU_STREAM_NON_BLOCKING, INVALID_VALUE);
    (void)priority;                        /* a hint, clamped to the range */
    int id = n_streams;
    if (id == SG_STREAMS)                  /* an old one again, whose work is all done */
        for (id = 1; id < SG_STREAMS && (stream[id].live || stream[id].head);) id++;
    if (id == SG_STREAMS) sg_stop(NULL, NULL, NULL, "more than %d streams", SG_STREAMS);
    CUstream s = &stream[id];
    if (id == n_streams) n_streams++;
    s->id = id;
    s->live = true;
    s->blocking = flags != CU_STREAM_NON_BLOCKING;
    s->clock = (sg_clock){ { 0 } };
    s->clock.seq[id] = s->queued;
    *out = s;
    return CUDA_SUCCESS;
}

static CUresult stream_create(CUstream *out, unsigned flags) {
    return stream_create_priority(out, flags, 0);
}

static CUresult stream_destroy(CUstream s) {       /* its work goes on */
    ENTER(NEED_CONTEXT);
    DEMAND(stream_of(s) && stream_of(s)->id, INVALID_HANDLE);
    s->live = false;
    return CUDA_SUCCESS;
}

static CUresult stream_synchronize(CUstream hs) {
    ENTER(NEED_CONTEXT);
    CUstream s = stream_of(hs);
    DEMAND(s, INVALID_HANDLE);
    sg_clock c = clock_of(s);
    wait_for(&c);
    return CUDA_SUCCESS;
}

static CUresult stream_query(CUstream hs) {
    ENTER(NEED_CONTEXT);
    CUstream s = stream_of(hs);
    DEMAND(s, INVALID_HANDLE);
    sg_clock c = clock_of(s);
    return query(&c);
}

static bool event_valid(CUevent e) {
    for (CUevent k = events; k; k = k->next)
        if (k == e) return k->live;
    return false;
}

static CUresult stream_wait(CUstream hs, CUevent e, unsigned flags) {
    ENTER(NEED_CONTEXT);
    CUstream s = stream_of(hs);
    DEMAND(s && event_valid(e), INVALID_HANDLE);
    DEMAND(flags <= CU_EVENT_WAIT_EXTERNAL, INVALID_VALUE);
    if (e->op) join(&s->clock, &e->clock);
    return CUDA_SUCCESS;
}

static CUresult event_create(CUevent *out, unsigned flags) {
    ENTER(NEED_CONTEXT);
    DEMAND(out && flags <= 7, INVALID_VALUE);
    DEMAND(!(flags & CU_EVENT_INTERPROCESS), NOT_SUPPORTED);
    CUevent e = need_memory(calloc(1, sizeof *e));
    e->live = true;
    e->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    e->next = events;
    events = e;
    *out = e;
    return CUDA_SUCCESS;
}

static CUresult event_record(CUevent e, CUstream hs) {
    ENTER(NEED_CONTEXT);
    CUstream s = stream_of(hs);
    DEMAND(s && event_valid(e), INVALID_HANDLE);
    piece *p = new_piece(s, P_EVENT, "event");
    p->event = e;
    e->pending++;
    e->op = p->work.op;
    e->clock = p->work.clock;
    return CUDA_SUCCESS;
}

static CUresult event_synchronize(CUevent e) {
    ENTER(NEED_CONTEXT);
    DEMAND(event_valid(e), INVALID_HANDLE);
    if (!e->op) return CUDA_SUCCESS;
    sg_clock c = e->clock;
    wait_for(&c);
    return CUDA_SUCCESS;
}

static CUresult event_query(CUevent e) {
    ENTER(NEED_CONTEXT);
    DEMAND(event_valid(e), INVALID_HANDLE);
    if (!e->op) return CUDA_SUCCESS;
    sg_clock c = e->clock;
    return query(&c);
}

static CUresult event_elapsed(float *out, CUevent a, CUevent b) {
    ENTER(NEED_CONTEXT);
    DEMAND(out, INVALID_VALUE);
    DEMAND(event_valid(a) && event_valid(b) && a->op && b->op, INVALID_HANDLE);
    DEMAND(a->timed && b->timed, INVALID_HANDLE);
    DEMAND(reached(&a->clock) && reached(&b->clock), NOT_READY);
    *out = (float)(b->time - a->time);
    return CUDA_SUCCESS;
}

static CUresult event_destroy(CUevent e) {         /* a record that is queued keeps it */
    ENTER(NEED_CONTEXT);
    DEMAND(event_valid(e), INVALID_HANDLE);
    e->live = false;
    if (e->pending) return CUDA_SUCCESS;
    CUevent *at = &events;
    while (*at != e) at = &(*at)->next;
    *at = e->next;
    free(e);
    return CUDA_SUCCESS;
}

/* === 11. Entry points ========================================================================= */

EXPORT CUresult get_address(const char *name, void **out, int version, cuuint64_t flags)
    __asm__("cuGetProcAddress");
EXPORT CUresult get_address_v2(const char *name, void **out, int version, cuuint64_t flags,
                               CUdriverProcAddressQueryResult *status)
    __asm__("cuGetProcAddress_v2");

typedef struct { const char *name; int since; void *function; } entry;
#define ENTRY(name, since, function) { #name, since, (void *)function },
static const entry entries[] = {
    SG_ENTRIES(ENTRY, ENTRY)
    { "cuGetProcAddress", 11030, (void *)get_address },
    { "cuGetProcAddress", 12000, (void *)get_address_v2 },
};
#undef ENTRY

CUresult get_address_v2(const char *name, void **out, int version, cuuint64_t flags,
                        CUdriverProcAddressQueryResult *status) {
    int since = 0;
    bool known = false;
    DEMAND(name && out, INVALID_VALUE);
    *out = NULL;
    DEMAND(flags <= 3 && version <= device()->driver_version, INVALID_VALUE);
    if (flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM)
        sg_stop(NULL, NULL, NULL, "cuGetProcAddress(%s): no per-thread default stream", name);
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        const entry *e = &entries[i];
        if (strcmp(e->name, name)) continue;
        known = true;
        if (e->since > version || e->since < since) continue;
        since = e->since;
        *out = e->function;
    }
    if (status)
        *status = *out ? CU_GET_PROC_ADDRESS_SUCCESS
                : known ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                        : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult get_address(const char *name, void **out, int version, cuuint64_t flags) {
    return get_address_v2(name, out, version, flags, NULL);
}

__attribute__((used)) _Noreturn static void legacy_called(const char *name) __asm__("sg_legacy");
static void legacy_called(const char *name) {
    fprintf(stderr, "softgpu: %s was called by its legacy symbol; use cuGetProcAddress\n", name);
    fflush(stderr);
    _Exit(87);
}

#define TRAP(symbol)                                                                             \
    __asm__(".pushsection .rodata\n1: .asciz \"" symbol "\"\n.popsection\n"                      \
            ".globl " symbol "\n.type " symbol ", @function\n"                                   \
            symbol ": leaq 1b(%rip), %rdi\nandq $-16, %rsp\ncall sg_legacy\n"                    \
            ".size " symbol ", .-" symbol "\n");
#define TRAPS(name, since, function) TRAP(#name) TRAP(#name "_v2")
#define NONE(name, since, function)
__asm__(".text\n");
SG_ENTRIES(TRAPS, NONE)
