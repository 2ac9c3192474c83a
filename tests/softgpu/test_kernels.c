/* test_kernels.c -- softgpu end to end: kernels_test.cu, compiled by nvcc, under libcuda.so.1.
 *
 *   kernels_test.cu --nvcc--> test_kernels.fatbin --cuModuleLoadData--> kernel
 *     right one:    what it leaves in memory is what a plain loop here computes, for every seed
 *     NAME__BUG:    exit code 86, and the message names NAME__BUG and a line of the .cu file that
 *                   says "caught: BUG" (or "caught: BUG, below")
 *
 *   each in a process of its own, as a violation ends it.
 *
 * Contents  1 children   2 the driver   3 kernels against loops   4 planted bugs
 *           5 every barrier and wait of the right ones left out, one at a time
 * usage: test_kernels [DIR]  where libcuda.so.1 and test_kernels.fatbin are                      */
#define _GNU_SOURCE
#include "../check.h"

#include <cuda.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

/* === 1. Children ============================================================================== */

static char where[400], said[8192];
static char *source;                       /* kernels_test.cu                                   */
static char *fatbin;
static size_t fatbin_bytes;

#define MUST(cond, ...)                                                                          \
    do {                                                                                         \
        if (!(cond)) {                                                                           \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);                           \
            fprintf(stderr, __VA_ARGS__);                                                        \
            fputc('\n', stderr);                                                                 \
            _exit(1);                                                                            \
        }                                                                                        \
    } while (0)

static char *slurp(const char *dir, const char *name, size_t *bytes) {
    char path[600];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    MUST(f, "%s", path);
    (void)fseek(f, 0, SEEK_END);
    size_t n = (size_t)ftell(f);
    char *text = calloc(1, n + 1);
    rewind(f);
    MUST(text && fread(text, 1, n, f) == n, "%s", path);
    (void)fclose(f);
    *bytes = n;
    return text;
}

static const char *kernel;                 /* the one that the child launches                   */
static void open_driver(void);

static int child(const char *options, void (*body)(void)) {
    int fd[2], status = 0;
    fflush(stdout);
    MUST(!pipe(fd), "pipe");
    pid_t pid = fork();
    if (!pid) {
        (void)dup2(fd[1], 2);
        (void)close(fd[0]);
        (void)setenv("SOFTGPU", options, 1);
        (void)alarm(60);
        open_driver();
        body();
        exit(0);
    }
    (void)close(fd[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(fd[0], said + n, sizeof said - 1 - n)) > 0;) n += (size_t)got;
    said[n] = 0;
    (void)close(fd[0]);
    (void)waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* === 2. The driver ============================================================================ */

static __typeof__(cuInit) *init;
static __typeof__(cuDevicePrimaryCtxRetain) *retain;
static __typeof__(cuCtxSetCurrent) *set_current;
static __typeof__(cuModuleLoadData) *load;
static __typeof__(cuModuleGetFunction) *get_function;
static __typeof__(cuMemAlloc) *alloc;
static __typeof__(cuMemcpyHtoD) *htod;
static __typeof__(cuMemcpyDtoH) *dtoh;
static __typeof__(cuLaunchKernel) *launch_kernel;
static __typeof__(cuCtxSynchronize) *synchronize;
static CUmodule module;

#define OK(call)                                                                                 \
    do {                                                                                         \
        CUresult result_ = (call);                                                               \
        MUST(result_ == CUDA_SUCCESS, "gives %d", (int)result_);                                 \
    } while (0)

static void open_driver(void) {
    char path[600];
    (void)snprintf(path, sizeof path, "%s/libcuda.so.1", where);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    MUST(library, "%s", dlerror());
    __typeof__(cuGetProcAddress) *get;
    *(void **)&get = dlsym(library, "cuGetProcAddress_v2");
    MUST(get, "cuGetProcAddress_v2");
    const struct { const char *name; void *at; } t[] = {
        {"cuInit", &init}, {"cuDevicePrimaryCtxRetain", &retain}, {"cuCtxSetCurrent", &set_current},
        {"cuModuleLoadData", &load}, {"cuModuleGetFunction", &get_function},
        {"cuMemAlloc", &alloc}, {"cuMemcpyHtoD", &htod}, {"cuMemcpyDtoH", &dtoh},
        {"cuLaunchKernel", &launch_kernel}, {"cuCtxSynchronize", &synchronize}};
    for (size_t k = 0; k < sizeof t / sizeof *t; k++) {
        CUdriverProcAddressQueryResult status;
        OK(get(t[k].name, t[k].at, 12000, 0, &status));
    }
    CUcontext context;
    OK(init(0));
    OK(retain(&context, 0));
    OK(set_current(context));
    OK(load(&module, fatbin));
}

/* Device memory with what is at `from`; NULL: never written. */
static CUdeviceptr device(size_t bytes, const void *from) {
    CUdeviceptr p;
    OK(alloc(&p, bytes));
    if (from) OK(htod(p, from, bytes));
    return p;
}

typedef struct { unsigned x, y; } extent;

static void launch(extent grid, extent block, unsigned shared, void **args) {
    CUfunction f;
    OK(get_function(&f, module, kernel));
    OK(launch_kernel(f, grid.x, grid.y, 1, block.x, block.y, 1, shared, NULL, args, NULL));
    OK(synchronize());
}
#define LAUNCH(gx, gy, bx, by, shared, ...)                                                      \
    launch((extent){gx, gy}, (extent){bx, by}, shared, (void *[]){__VA_ARGS__})

/* === 3. Kernels against loops ================================================================= */

static uint32_t draw(void) {
    static uint64_t s = 1;
    s = s * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(s >> 33);
}

/* Small whole numbers: any order of adding gives the same. */
static void fill_floats(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (float)(int)(draw() % 33) - 16;
}

/* What the device has at p are these n words, or all others of the block's. */
#define SAME(p, want, n)                                                                         \
    do {                                                                                         \
        __typeof__(*(want)) got_[n];                                                             \
        OK(dtoh(got_, p, sizeof got_));                                                          \
        for (size_t i_ = 0; i_ < (n); i_++)                                                      \
            MUST(got_[i_] == (want)[i_], "%zu: %g, not %g", i_, (double)got_[i_],                \
                 (double)(want)[i_]);                                                            \
    } while (0)

/* Blocks of n threads each sum 2 n floats. */
static void sums(unsigned blocks, unsigned n, unsigned each, unsigned shared) {
    float x[8192], want[16] = {0};
    fill_floats(x, blocks * each);
    for (unsigned i = 0; i < blocks * each; i++) want[i / each] += x[i];
    CUdeviceptr out = device(4 * blocks, NULL), in = device(4 * blocks * each, x);
    LAUNCH(blocks, 1, n, 1, shared, &out, &in);
    SAME(out, want, blocks);
}
static void sum_256(void) { sums(5, 256, 512, 1024); }
static void sum_1024(void) { sums(3, 1024, 2048, 0); }
static void sum_128(void) { sums(3, 128, 256, 0); }
static void sum_64_by_32(void) { sums(4, 32, 64, 0); }

static void sum_tiles(void) {
    int x[192], want[24] = {0};
    for (int i = 0; i < 192; i++) want[i / 8] += x[i] = (int)(draw() % 100);
    CUdeviceptr out = device(sizeof want, NULL), in = device(sizeof x, x);
    LAUNCH(2, 1, 96, 1, 0, &out, &in);
    SAME(out, want, 24);
}

static void scan(void) {
    enum { N = 500, W = 128 };
    int x[N], want[N], n = N;
    for (int i = 0; i < N; i++) {
        x[i] = (int)(draw() % 100);
        want[i] = x[i] + (i % W ? want[i - 1] : 0);
    }
    CUdeviceptr out = device(sizeof want, NULL), in = device(sizeof x, x);
    LAUNCH((N + W - 1) / W, 1, W, 1, 2 * W * 4, &out, &in, &n);
    SAME(out, want, N);
}

static void histogram(void) {
    enum { N = 3000 };
    unsigned x[N], want[256] = {0};
    int n = N, digit = 1;
    for (int i = 0; i < N; i++) {
        x[i] = draw() & draw() & 0x7f7f7f7f;
        want[x[i] >> 8 & 255]++;
    }
    unsigned zero[256] = {0};
    CUdeviceptr out = device(sizeof want, zero), in = device(sizeof x, x);
    LAUNCH(4, 1, 128, 1, 0, &out, &in, &n, &digit);
    SAME(out, want, 256);
}

static void compact(void) {
    enum { N = 200 };
    int x[N], want[N], n = N, limit = 40, kept = 0;
    for (int i = 0; i < N; i++)
        if ((x[i] = (int)(draw() % 100)) < limit) want[kept++] = x[i];
    CUdeviceptr out = device(sizeof want, NULL), n_out = device(4, NULL), in = device(sizeof x, x);
    LAUNCH(1, 1, 32, 1, 0, &out, &n_out, &in, &n, &limit);
    SAME(n_out, &kept, 1);
    SAME(out, want, (size_t)kept);
}

static void same_keys(void) {
    int key[64];
    unsigned want[64];
    for (int i = 0; i < 64; i++) key[i] = (int)(draw() % 7);
    for (int i = 0; i < 64; i++) {
        unsigned n[32] = {0}, first = 32, top = 0;
        for (int a = 0; a < 32; a++)
            for (int b = 0; b < 32; b++) n[a] += key[i / 32 * 32 + a] == key[i / 32 * 32 + b];
        for (int a = 31; a >= 0; a--)
            if (key[i / 32 * 32 + a] == key[i]) first = (unsigned)a;
        for (int a = 0; a < 32; a++) top = top < n[a] ? n[a] : top;
        want[i] = n[i % 32] | first << 8 | top << 16;
    }
    CUdeviceptr out = device(sizeof want, NULL), in = device(sizeof key, key);
    LAUNCH(2, 1, 32, 1, 0, &out, &in);
    SAME(out, want, 64);
}

static void matmul(void) {
    enum { M = 32, N = 48, K = 80 };
    static float a[M * K], b[K * N], want[M * N];
    int n = N, k = K;
    fill_floats(a, M * K);
    fill_floats(b, K * N);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++)
            for (int l = 0; l < K; l++) want[i * N + j] += a[i * K + l] * b[l * N + j];
    CUdeviceptr c = device(sizeof want, NULL), da = device(sizeof a, a), db = device(sizeof b, b);
    LAUNCH(N / 16, M / 16, 16, 16, 0, &c, &da, &db, &n, &k);
    SAME(c, want, M * N);
}

/* Of numbers that have no more than 8 bits. */
static void to_bf16(uint16_t *to, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        to[i] = (uint16_t)(bits >> 16);
    }
}

static void matmul_bf16(void) {
    enum { M = 32, N = 24, K = 48 };
    static uint16_t a[M * K], b[N * K];
    static float fa[M * K], fb[N * K], want[M * N];
    int n = N, k = K;
    fill_floats(fa, M * K);
    fill_floats(fb, N * K);
    to_bf16(a, fa, M * K);
    to_bf16(b, fb, N * K);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++)
            for (int l = 0; l < K; l++) want[i * N + j] += fa[i * K + l] * fb[j * K + l];
    CUdeviceptr c = device(sizeof want, NULL), da = device(sizeof a, a), db = device(sizeof b, b);
    LAUNCH(N / 8, M / 16, 32, 1, 0, &c, &da, &db, &n, &k);
    SAME(c, want, M * N);
}

/* E4M3 by its definition: 4 bits of exponent, bias 7, 3 of mantissa. */
static float e4m3(uint8_t x) {
    int e = x >> 3 & 15, m = x & 7;
    float v = e ? ldexpf((float)(8 + m), e - 10) : ldexpf((float)m, -9);
    return x & 128 ? -v : v;
}

static void mma_e4m3(void) {
    uint8_t a[16 * 32], b[8 * 32];
    float want[128] = {0};
    for (size_t i = 0; i < sizeof a; i++) a[i] = (uint8_t)((draw() & 0xa7) + 0x18);  /* |x| < 8 */
    for (size_t i = 0; i < sizeof b; i++) b[i] = (uint8_t)((draw() & 0xa7) + 0x18);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            for (int l = 0; l < 32; l++)
                want[i * 8 + j] += e4m3(a[i * 32 + l]) * e4m3(b[j * 32 + l]);
    CUdeviceptr c = device(sizeof want, NULL), da = device(sizeof a, a), db = device(sizeof b, b);
    LAUNCH(1, 1, 32, 1, 0, &c, &da, &db);
    SAME(c, want, 128);
}

static void pipe_of_warps(void) {
    enum { N = 160 };
    int x[N], want[N], n = N;
    for (int i = 0; i < N; i++) x[i] = (int)(draw() % 1000);
    for (int i = 0; i < N; i++) want[i] = 2 * x[i / 32 * 32 + 31 - i % 32];
    CUdeviceptr out = device(sizeof want, NULL), in = device(sizeof x, x);
    LAUNCH(1, 1, 64, 1, 0, &out, &in, &n);
    SAME(out, want, N);
}

static void count_above(void) {
    int x[3 * 96], want[3 * 96], limit = 50;
    for (int i = 0; i < 3 * 96; i++)      /* block 0: some, block 1: all, block 2: none */
        x[i] = (int)(draw() % 100) + (i / 96 == 1 ? 100 : i / 96 == 2 ? -100 : 0);
    for (int b = 0; b < 3; b++) {
        int n = 0;
        for (int i = 0; i < 96; i++) n += x[b * 96 + i] > limit;
        for (int i = 0; i < 96; i++)
            want[b * 96 + i] = n + 10000 * (n == 96) + 20000 * (n > 0);
    }
    CUdeviceptr out = device(sizeof want, NULL), in = device(sizeof x, x);
    LAUNCH(3, 1, 96, 1, 0, &out, &in, &limit);
    SAME(out, want, 3 * 96);
}

static int halve(int n, int depth) { return depth > 3 || n % 2 ? n : halve(n / 2, depth + 1); }

static int collatz_of(int v, int i, int before) {
    int steps = 0, seen[8] = {0};
    for (; v > 1; steps++) {
        seen[v & 7]++;
        if (v % 4 == 0) {
            v = halve(v, 0);
            continue;
        }
        if (v % 3 == 1 && steps > 200) return before;
        v = v % 2 ? 3 * v + 1 : v / 2;
        if (steps == 300) {
            steps = -1;
            break;
        }
    }
    for (int k = 0; k < 8; k++) steps += ((k + 1) * seen[(k + i) & 7]) << 10;
    return steps;
}

static void collatz(void) {
    enum { N = 300 };
    int x[N], want[N], n = N;
    for (int i = 0; i < N; i++) x[i] = (int)(draw() % 100000);
    CUdeviceptr in = device(sizeof x, x), out = device(sizeof x, x);
    for (int i = 0; i < N; i++) want[i] = collatz_of(x[i], i, x[i]);
    LAUNCH(4, 1, 80, 1, 0, &out, &in, &n);
    SAME(out, want, N);
}

static void largest(void) {
    enum { N = 500 };
    static float x[4 * N], y[2 * N], want[2];
    static uint16_t by[2 * N];
    int n = N;
    fill_floats(x, 4 * N);
    fill_floats(y, 2 * N);
    to_bf16(by, y, 2 * N);
    x[777] = 16.5f, want[0] = want[1] = 16.5f;
    CUdeviceptr out = device(8, NULL), dx = device(sizeof x, x), dy = device(sizeof by, by);
    LAUNCH(1, 1, 128, 1, 0, &out, &dx, &dy, &n);
    SAME(out, want, 2);
}

/* === 4. Right, and with planted bugs ========================================================== */

static const struct { const char *name; void (*body)(void); const char *bugs; } kernels[] = {
    {"sum_shared", sum_256, "NO_BARRIER OFF_BY_ONE UNWRITTEN DIVERGENT CROSS_BLOCK"},
    {"sum_shuffle", sum_1024, ""},
    {"sum_shuffle", sum_128, "NO_BARRIER WRONG_MASK"},
    {"sum_warp", sum_64_by_32, "NO_SYNCWARP"},
    {"sum_tiles", sum_tiles, ""},
    {"scan", scan, "NO_BARRIER OFF_BY_ONE"},
    {"histogram", histogram, "NO_BARRIER NO_ATOMIC CROSS_BLOCK"},
    {"compact", compact, ""},
    {"same_keys", same_keys, ""},
    {"matmul", matmul, "NO_WAIT NO_LAST_WAIT NO_BARRIER NO_SECOND"},
    {"matmul_bf16", matmul_bf16, "NO_SYNCWARP UNWRITTEN MISALIGNED"},
    {"mma_e4m3", mma_e4m3, ""},
    {"pipe", pipe_of_warps, "NO_EMPTY"},
    {"count_above", count_above, ""},
    {"collatz", collatz, ""},
    {"largest", largest, ""},
};
enum { KERNELS = sizeof kernels / sizeof *kernels, SEEDS = 8 };

/* Each with the image for 8.0 and that for 8.9, in a few orders. */
static void test_kernels_against_loops(void) {
    for (size_t k = 0; k < KERNELS; k++)
        for (int seed = 0; seed < SEEDS; seed++) {
            bool e4m3_too = kernels[k].body == mma_e4m3, new = seed & 1 || e4m3_too;
            char options[64];
            kernel = kernels[k].name;
            (void)snprintf(options, sizeof options, "cc=%s,mem=64M,seed=%d", new ? "8.9" : "8.0",
                           seed);
            int code = child(options, kernels[k].body);
            CHECK(!code && !said[0], "%s, SOFTGPU=%s: exit code %d: %s", kernel, options, code,
                  said);
        }
    NOTE("%d kernels, %d seeds", KERNELS, SEEDS);
}

/* Is the line that the message names one that says it catches this bug?  Looked for between the
 * template that the kernel is made of and the kernel. */
static bool names_line(const char *name, const char *bug) {
    const char *at = strstr(said, "kernels_test.cu:"), *end = strstr(source, name), *from = source;
    if (!at || !end) return false;
    int named = atoi(at + strlen("kernels_test.cu:")), line = 1;
    for (const char *s = source; (s = strstr(s, "template <bug B>")) && s < end; s++) from = s;
    for (const char *s = source; s < end; s++) {
        if (*s != '\n') continue;
        line++;
        const char *stop = strchr(s + 1, '\n'), *mark = strstr(s, "caught: ");
        const char *word = mark ? strstr(mark, bug) : NULL;
        if (s < from || !mark || !word || mark > stop || word > stop) continue;
        const char *below = strstr(mark, "below");     /* of an asm the last line is named */
        int last = line + (below && below < stop ? 4 : 0);
        if (line <= named && named <= last) return true;
    }
    return false;
}

static void test_planted_bugs(void) {
    int planted = 0;
    for (size_t k = 0; k < KERNELS; k++) {
        char bugs[200], *next = bugs;
        (void)snprintf(bugs, sizeof bugs, "%s", kernels[k].bugs);
        for (char *bug; (bug = strsep(&next, " ")) && *bug; planted++)
            for (int seed = 0; seed < SEEDS; seed++) {
                char name[100], options[64];
                (void)snprintf(name, sizeof name, "%s__%s", kernels[k].name, bug);
                (void)snprintf(options, sizeof options, "cc=8.9,mem=64M,seed=%d", seed);
                kernel = name;
                int code = child(options, kernels[k].body);
                bool named = strstr(said, name) && names_line(name, bug);
                CHECK(code == 86 && named, "%s, SOFTGPU=%s: exit code %d: %s", name, options, code,
                      said);
            }
    }
    NOTE("%d bugs, %d seeds", planted, SEEDS);
}

/* === 5. Every barrier and wait left out ======================================================= */

static bool synchronizes(const char *line) {
    static const char *const words[] = {"bar.sync", "bar.warp.sync", "bar.arrive", "barrier.sync",
                                        "cp.async.wait_group"};
    line += strspn(line, " \t");
    for (size_t k = 0; k < sizeof words / sizeof *words; k++)
        if (!strncmp(line, words[k], strlen(words[k]))) return true;
    return false;
}

static void test_each_barrier_left_out(void) {
    char *ptx = memmem(fatbin, fatbin_bytes, ".target sm_89", 13), name[100] = "";
    void (*body)(void) = NULL;
    int left_out = 0;
    MUST(ptx, "no PTX for 8.9 in the fatbin, or compressed");
    for (char *line = ptx, *end; (end = strchr(line, '\n')); line = end + 1) {
        if (sscanf(line, ".visible .entry %99[A-Za-z0-9_](", name) == 1) {
            body = NULL;
            for (size_t k = 0; k < KERNELS; k++)
                if (!strcmp(name, kernels[k].name)) body = kernels[k].body;
        }
        if (!body || !synchronizes(line)) continue;
        left_out++;
        kernel = name;
        for (int seed = 0; seed < 3; seed++) {
            char options[64], was[2] = {line[0], line[1]};
            (void)snprintf(options, sizeof options, "cc=8.9,mem=64M,seed=%d", seed);
            memcpy(line, "//", 2);
            int code = child(options, body);
            memcpy(line, was, 2);
            CHECK(code == 86 && strstr(said, name), "%s without %.*s, SOFTGPU=%s: exit code %d: %s",
                  name, (int)(end - line), line, options, code, said);
        }
    }
    CHECK(left_out >= 20, "%d barriers", left_out);
    NOTE("%d left out, 3 seeds", left_out);
}

int main(int argc, char **argv) {
    char cu_dir[] = __FILE__, *slash = strrchr(argv[0], '/');
    (void)snprintf(where, sizeof where, "%.*s", slash ? (int)(slash - argv[0]) : 1,
                   slash ? argv[0] : ".");
    if (argc > 1) (void)snprintf(where, sizeof where, "%s", argv[1]);
    char *last = strrchr(cu_dir, '/');
    if (last) *last = 0;
    size_t n;
    source = slurp(last ? cu_dir : ".", "kernels_test.cu", &n);
    fatbin = slurp(where, "test_kernels.fatbin", &fatbin_bytes);
    RUN(test_kernels_against_loops);
    RUN(test_planted_bugs);
    RUN(test_each_barrier_left_out);
    return check_done();
}
