/* test_driver.c -- softgpu's driver and memory, as a program meets them: through dlopen().
 *
 *   test --fork--> child: SOFTGPU=..., dlopen(libcuda.so.1), cuGetProcAddress, a body of calls
 *     ^                      |
 *     +--- exit code, stderr +      0: right;  86: a violation;  87: stopped;  1: a MUST failed
 *
 * Every check is fired by a planted bug, and stays silent on the program without it, whatever the
 * seed.  Contents: 1 children   2 entry points   3 devices, images   4 launches   5 memory
 *                  6 blocks   7 streams   8 in flight   9 time                                   */
#include "../check.h"
#include "legacy.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* === 1. Children ============================================================================== */

#define ENTRY(name, since, function) static PFN_##name##_v##since function;
#define NONE(name, since, function)
SG_ENTRIES(ENTRY, NONE)
#undef ENTRY

static char library_path[512], fatbin_path[512], said[4096];
static void *library;
static uint8_t *fatbin;
static size_t fatbin_bytes;
static PFN_cuGetProcAddress_v12000 get_address;
static CUmodule module;
static CUcontext context;

#define MUST(cond)                                                                               \
    do {                                                                                         \
        if (!(cond)) {                                                                           \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                           \
            _exit(1);                                                                            \
        }                                                                                        \
    } while (0)
#define OK(call) MUST((call) == CUDA_SUCCESS)
#define GIVES(call, error) MUST((call) == CUDA_ERROR_##error)

static void load_entries(void) {
    library = dlopen(library_path, RTLD_NOW | RTLD_LOCAL);
    if (!library) fprintf(stderr, "%s\n", dlerror());
    MUST(library);
    *(void **)&get_address = dlsym(library, "cuGetProcAddress_v2");
    MUST(get_address);
    CUdriverProcAddressQueryResult status;
#define ENTRY(name, since, function)                                                             \
    OK(get_address(#name, (void **)&function, since, 0, &status));                               \
    MUST(function && status == CU_GET_PROC_ADDRESS_SUCCESS);
    SG_ENTRIES(ENTRY, NONE)
#undef ENTRY
}

static void begin(void) {
    OK(init(0));
    OK(primary_retain(&context, 0));
    OK(ctx_set(context));
    OK(module_load(&module, fatbin));
}

/* The exit code of a child that runs body; what it says on stderr is in said. */
static int child(const char *options, void (*body)(void)) {
    int fd[2], status = 0;
    fflush(stdout);
    if (pipe(fd)) abort();
    pid_t pid = fork();
    if (!pid) {
        dup2(fd[1], 2);
        close(fd[0]);
        setenv("SOFTGPU", options, 1);
        alarm(60);
        load_entries();
        body();
        exit(0);
    }
    close(fd[1]);
    size_t n = 0;
    ssize_t got;
    while ((got = read(fd[0], said + n, sizeof said - 1 - n)) > 0) n += (size_t)got;
    said[n] = 0;
    close(fd[0]);
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static void right_with(const char *options, void (*body)(void)) {
    int code = child(options, body);
    CHECK(code == 0 && !said[0], "SOFTGPU=%s: exit code %d: %s", options, code, said);
}

static void right(void (*body)(void)) {
    char options[32];
    for (int seed = 0; seed < 12; seed++) {
        snprintf(options, sizeof options, "mem=64M,seed=%d", seed);
        right_with(options, body);
    }
}

static void ends(const char *options, void (*body)(void), int want, const char *text) {
    int code = child(options, body);
    CHECK(code == want && strstr(said, text), "SOFTGPU=%s: exit code %d, not %d with \"%s\": %s",
          options, code, want, text, said);
}

/* Whatever the seed. */
static void wrong(void (*body)(void), const char *text) {
    char options[32];
    for (int seed = 0; seed < 12; seed++) {
        snprintf(options, sizeof options, "mem=64M,seed=%d", seed);
        ends(options, body, 86, text);
    }
}

static CUfunction function(const char *name) {
    CUfunction f;
    OK(module_function(&f, module, name));
    return f;
}

static CUdeviceptr device_bytes(size_t n) {
    CUdeviceptr p;
    OK(mem_alloc(&p, n));
    return p;
}

static CUdeviceptr device_zeros(size_t n) {
    CUdeviceptr p = device_bytes(n);
    OK(set_d8(p, 0, n));
    OK(ctx_synchronize());
    return p;
}

static void *pinned_bytes(size_t n) {
    void *p;
    OK(host_alloc(&p, n, 0));
    return p;
}

static CUstream new_stream(void) {
    CUstream s;
    OK(stream_create(&s, CU_STREAM_NON_BLOCKING));
    return s;
}

static CUevent new_event(void) {
    CUevent e;
    OK(event_create(&e, 0));
    return e;
}

static CUresult run(const char *name, unsigned blocks, unsigned threads, CUstream s,
                    void **params) {
    return launch(function(name), blocks, 1, 1, threads, 1, 1, 0, s, params, NULL);
}
#define ARGS(...) (void *[]){ __VA_ARGS__ }

static void put_at(CUdeviceptr x, float v, int at, CUstream s) {
    OK(run("put", 1, 32, s, ARGS(&x, &v, &at)));
}
static void get_at(CUdeviceptr y, CUdeviceptr x, int at, CUstream s) {
    OK(run("get", 1, 32, s, ARGS(&y, &x, &at)));
}

/* === 2. Entry points ========================================================================== */

static void call_legacy(void) {
    CUdeviceptr p;
    ((PFN_cuMemAlloc_v3020)dlsym(library, "cuMemAlloc_v2"))(&p, 4);
}
static void call_legacy_old(void) { ((PFN_cuInit_v2000)dlsym(library, "cuInit"))(0); }

static void test_legacy_symbols_are_traps(void) {
    ends("", call_legacy, 87,
         "softgpu: cuMemAlloc_v2 was called by its legacy symbol; use cuGetProcAddress");
    ends("", call_legacy_old, 87, "cuInit was called by its legacy symbol");
}

static void ask_for_addresses(void) {
    void *p = &p, *q;
    CUdriverProcAddressQueryResult status;
    GIVES(get_address("cuNoSuchThing", &p, 13000, 0, &status), NOT_FOUND);
    MUST(!p && status == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    GIVES(get_address("cuMemAlloc_v2", &p, 13000, 0, &status), NOT_FOUND);
    GIVES(get_address("cuMemAlloc", &p, 3010, 0, &status), NOT_FOUND);
    MUST(!p && status == CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
    GIVES(get_address("cuMemAlloc", &p, 13010, 0, NULL), INVALID_VALUE);
    GIVES(get_address(NULL, &p, 13000, 0, NULL), INVALID_VALUE);
    GIVES(get_address("cuMemAlloc", NULL, 13000, 0, NULL), INVALID_VALUE);
    GIVES(get_address("cuMemAlloc", &p, 13000, 4, NULL), INVALID_VALUE);
    OK(get_address("cuMemAlloc", &p, 13000, CU_GET_PROC_ADDRESS_LEGACY_STREAM, NULL));
    OK(get_address("cuCtxSynchronize", &p, 12090, 0, NULL));
    OK(get_address("cuCtxSynchronize", &q, 13000, 0, NULL));
    MUST(p != q);
    OK(get_address("cuGetProcAddress", &p, 11030, 0, NULL));
    OK(get_address("cuGetProcAddress", &q, 13000, 0, NULL));
    MUST(p == dlsym(library, "cuGetProcAddress") && q == dlsym(library, "cuGetProcAddress_v2"));
    OK(((PFN_cuGetProcAddress_v11030)p)("cuInit", &q, 2000, 0));
    MUST(q == (void *)init);
}

static void test_addresses_are_of_a_version(void) { right(ask_for_addresses); }

static void per_thread(void) {
    void *p;
    get_address("cuMemAlloc", &p, 13000, CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM, NULL);
}

static void order_of_calls(void) {
    CUdeviceptr p;
    CUdevice d;
    int n;
    const char *text;
    GIVES(device_count(&n), NOT_INITIALIZED);
    GIVES(mem_alloc(&p, 4), NOT_INITIALIZED);
    GIVES(init(1), INVALID_VALUE);
    OK(init(0));
    OK(device_count(&n));
    MUST(n == 1);
    GIVES(device_get(&d, 1), INVALID_DEVICE);
    OK(device_get(&d, 0));
    GIVES(mem_alloc(&p, 4), INVALID_CONTEXT);
    OK(primary_retain(&context, d));
    GIVES(mem_alloc(&p, 4), INVALID_CONTEXT);
    OK(ctx_set(context));
    OK(mem_alloc(&p, 4));
    OK(primary_release(d));
    GIVES(mem_alloc(&p, 4), INVALID_CONTEXT);
    OK(primary_retain(&context, d));       /* the same thread has it again, and nothing else */
    size_t left, total;
    OK(mem_info(&left, &total));
    MUST(left == total);
    OK(error_name(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, &text));
    MUST(!strcmp(text, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"));
    OK(error_string(CUDA_ERROR_OUT_OF_MEMORY, &text));
    MUST(!strcmp(text, "out of memory"));
    GIVES(error_string((CUresult)12345, &text), INVALID_VALUE);
    MUST(!text);
}

static void test_initialization_comes_first(void) {
    right(order_of_calls);
    ends("", per_thread, 87, "no per-thread default stream");
}

/* === 3. Devices and images ==================================================================== */

static int attribute(CUdevice_attribute a) {
    int x;
    OK(device_attribute(&x, a, 0));
    return x;
}

static void ask_80(void) {
    size_t total;
    char name[64];
    OK(init(0));
    MUST(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) == 8);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) == 0);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK) == 48 << 10);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) == 163 << 10);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) == 164 << 10);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) == 7);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING) == 1);
    MUST(attribute(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT) == 2);
    OK(device_total(&total, 0));
    MUST(total == 3ull << 29);
    OK(device_name(name, sizeof name, 0));
    MUST(!strcmp(name, "softgpu 8.0"));
    GIVES(device_attribute((int *)name, CU_DEVICE_ATTRIBUTE_MAX, 0), INVALID_VALUE);
}

static void nothing(void) { OK(init(0)); }

static void test_the_device_is_as_configured(void) {
    right_with("cc=8.0,mem=1.5G,sms=7", ask_80);
    ends("cc=7.7", nothing, 87, "no model of compute capability 7.7");
    ends("what=1", nothing, 87, "what is what=1?");
    ends("seed=x", nothing, 87, "seed=x is no number");
}

static int arch(void) {
    int x = 0;
    begin();
    CUdeviceptr p = device_bytes(4);
    OK(run("which", 1, 1, NULL, ARGS(&p)));
    OK(copy_dtoh(&x, p, 4));
    return x;
}
static void arch_80(void) { MUST(arch() == 800); }
static void arch_89(void) { MUST(arch() == 890); }
static void arch_90(void) { MUST(arch() == 900); }

static void test_the_best_image_is_taken(void) {
    right_with("cc=8.0", arch_80);
    right_with("cc=8.6", arch_80);
    right_with("cc=8.9", arch_89);
    right_with("cc=9.0", arch_90);
    right_with("cc=12.0", arch_90);
}

/* The fatbin with bytes of its first entry replaced. */
static CUresult load_with(size_t at, uint64_t value, size_t bytes) {
    CUmodule m;
    uint8_t *copied = malloc(fatbin_bytes);
    memcpy(copied, fatbin, fatbin_bytes);
    memcpy(copied + at, &value, bytes);
    CUresult e = module_load(&m, copied);
    free(copied);
    return e;
}

static void bad_images(void) {
    CUmodule m;
    begin();
    GIVES(module_load(&m, NULL), INVALID_VALUE);
    GIVES(module_load(NULL, fatbin), INVALID_VALUE);
    GIVES(module_load(&m, ""), INVALID_IMAGE);
    GIVES(module_load(&m, "something else"), INVALID_IMAGE);
    GIVES(module_load(&m, "\177ELF-image"), NO_BINARY_FOR_GPU);
    GIVES(module_load(&m, ".version 99.0\n.target sm_80\n"), UNSUPPORTED_PTX_VERSION);
    GIVES(module_load(&m, ".version 8.0\n.target sm_120\n.address_size 64\n"),
          NO_BINARY_FOR_GPU);
    OK(module_load(&m, ".version 8.0\n.target sm_80\n.address_size 64\n"));
    OK(load_with(16 + 28, 120, 4));                /* another one is left */
    GIVES(load_with(6, 0, 2), INVALID_IMAGE);
    GIVES(load_with(8, UINT64_MAX, 8), INVALID_IMAGE);
    GIVES(load_with(8, 20, 8), INVALID_IMAGE);     /* less than an entry's header */
    GIVES(load_with(8, 0, 8), NO_BINARY_FOR_GPU);
    GIVES(load_with(16 + 4, 0, 4), INVALID_IMAGE);
    GIVES(load_with(16 + 4, UINT32_MAX, 4), INVALID_IMAGE);
    GIVES(load_with(16 + 8, UINT64_MAX, 8), INVALID_IMAGE);
    GIVES(load_with(16 + 8, fatbin_bytes, 8), INVALID_IMAGE);
}

static void only_newer(void) {
    CUmodule m;
    OK(init(0));
    OK(primary_retain(&context, 0));
    OK(ctx_set(context));
    GIVES(load_with(16 + 28, 89, 4), NO_BINARY_FOR_GPU);
    GIVES(load_with(16, 2, 2), NO_BINARY_FOR_GPU);
    OK(module_load(&m, fatbin));
}
static void packed(void) { begin(); load_with(16 + 40, 0x8011, 8); }
static void old_driver(void) {
    CUmodule m;
    OK(init(0));
    OK(primary_retain(&context, 0));
    OK(ctx_set(context));
    GIVES(module_load(&m, fatbin), UNSUPPORTED_PTX_VERSION);
}

static void test_images_are_not_trusted(void) {
    right_with("", bad_images);
    right_with("cc=8.0", only_newer);
    right_with("driver=12080", old_driver);
    ends("", packed, 87, "nvcc --no-compress");
}

static void symbols(void) {
    CUdeviceptr p;
    CUfunction f;
    CUlibrary l;
    CUkernel k;
    size_t n;
    int x = 0, times = 2;
    const char *name;
    begin();
    OK(module_global(&p, &n, module, "counter"));
    CUdeviceptr sum = device_zeros(4);
    OK(run("count", 3, 64, NULL, ARGS(&sum, &times)));
    OK(copy_dtoh(&x, p, 4));
    MUST(n == 4 && x == 7 + 3 * 64);
    OK(copy_dtoh(&x, sum, 4));
    MUST(x == 3 * 64 * 2);
    GIVES(module_global(&p, &n, module, "no"), NOT_FOUND);
    GIVES(module_function(&f, module, "no"), NOT_FOUND);
    OK(library_load(&l, fatbin, NULL, NULL, 0, NULL, NULL, 0));
    OK(library_kernel(&k, l, "count"));
    OK(kernel_function(&f, k));
    OK(func_name(&name, f));
    MUST(!strcmp(name, "count"));
    OK(library_unload(l));
    GIVES(func_name(&name, f), INVALID_HANDLE);
    OK(module_unload(module));
    GIVES(module_unload(module), INVALID_HANDLE);
}

static void test_functions_and_globals_are_found(void) { right(symbols); }

/* === 4. Launches ============================================================================== */

static CUresult shape(const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned bz,
                      unsigned shared) {
    static CUdeviceptr p;
    static int n = 1;
    if (!p) p = device_bytes(1 << 20);
    return launch(function(name), gx, gy, 1, bx, 1, bz, shared, NULL, ARGS(&p, &n), NULL);
}

static void limits(void) {
    CUfunction f;
    int x;
    begin();
    GIVES(shape("which", 0, 1, 1, 1, 0), INVALID_VALUE);
    GIVES(shape("which", 1, 1, 0, 1, 0), INVALID_VALUE);
    GIVES(shape("which", 0x80000000u, 1, 1, 1, 0), INVALID_VALUE);
    GIVES(shape("which", 1, 65536, 1, 1, 0), INVALID_VALUE);
    GIVES(shape("which", 1, 1, 1025, 1, 0), INVALID_VALUE);
    GIVES(shape("which", 1, 1, 512, 3, 0), INVALID_VALUE);
    GIVES(shape("which", 1, 1, 1, 65, 0), INVALID_VALUE);
    GIVES(shape("bounded", 1, 1, 129, 1, 0), LAUNCH_OUT_OF_RESOURCES);
    OK(shape("bounded", 1, 1, 128, 1, 0));
    f = function("shared_sum");
    OK(func_get(&x, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, f));
    MUST(x == 48 << 10);
    GIVES(shape("shared_sum", 1, 1, 32, 1, (48 << 10) + 1), INVALID_VALUE);
    GIVES(func_set(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 100 << 10), INVALID_VALUE);
    OK(func_set(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 99 << 10));
    OK(shape("shared_sum", 1, 1, 32, 1, 99 << 10));
    OK(func_get(&x, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function("bounded")));
    MUST(x == 128);
    OK(occupancy(&x, f, 256, 40 << 10));
    MUST(x == 2);
    OK(occupancy(&x, f, 1024, 0));
    MUST(x == 1);
    OK(ctx_synchronize());
    GIVES(launch(NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL), INVALID_HANDLE);
    GIVES(launch(f, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL), INVALID_VALUE);
    GIVES(launch(f, 1, 1, 1, 1, 1, 1, 0, (CUstream)&x, NULL, NULL), INVALID_HANDLE);
}

static void by_extra(void) {
    int x = 0, n = 10;
    begin();
    struct { CUdeviceptr p; int n; } packed_args = { device_bytes(4), n };
    size_t size = 12;
    void *extra[] = { CU_LAUNCH_PARAM_BUFFER_POINTER, &packed_args, CU_LAUNCH_PARAM_BUFFER_SIZE,
                      &size, CU_LAUNCH_PARAM_END };
    OK(launch(function("shared_sum"), 1, 1, 1, 4, 1, 1, 40, NULL, NULL, extra));
    OK(copy_dtoh(&x, packed_args.p, 4));
    MUST(x == 45);
    size = 8;
    GIVES(launch(function("shared_sum"), 1, 1, 1, 4, 1, 1, 40, NULL, NULL, extra), INVALID_VALUE);
}

static void test_launch_limits(void) {
    right_with("", limits);
    right(by_extra);
}

/* === 5. Memory ================================================================================ */

static void amounts(void) {
    CUdeviceptr p, q;
    size_t left, total;
    begin();
    OK(mem_info(&left, &total));
    MUST(total == 1 << 20 && left < total && left > total - 4096);
    GIVES(mem_alloc(&p, 1 << 20), OUT_OF_MEMORY);
    GIVES(mem_alloc(&p, SIZE_MAX), OUT_OF_MEMORY);
    GIVES(mem_alloc(&p, 0), INVALID_VALUE);
    GIVES(mem_alloc(NULL, 4), INVALID_VALUE);
    OK(mem_alloc(&p, left));
    GIVES(mem_alloc(&q, 1), OUT_OF_MEMORY);
    GIVES(mem_free(p + 256), INVALID_VALUE);
    OK(mem_free(p));
    GIVES(mem_free(p), INVALID_VALUE);
    OK(mem_alloc(&q, 1));
    MUST(p % 256 == 0 && q % 256 == 0 && q >= p + left);
}

static void ranges(void) {
    uint8_t bytes[64] = { 0 };
    begin();
    CUdeviceptr p = device_bytes(64), q = device_bytes(64);
    GIVES(copy_htod(p + 1, bytes, 64), INVALID_VALUE);
    GIVES(copy_htod(p, (void *)(uintptr_t)q, 64), INVALID_VALUE);
    GIVES(copy_dtoh(bytes, (CUdeviceptr)(uintptr_t)bytes, 64), INVALID_VALUE);
    GIVES(copy_dtod(p, q + 32, 64), INVALID_VALUE);
    GIVES(copy_htod(0, bytes, 64), INVALID_VALUE);
    GIVES(set_d32(p + 2, 1, 4), INVALID_VALUE);
    GIVES(set_d8(p, 1, 65), INVALID_VALUE);
    OK(set_d32(p, 0x01020304, 16));
    OK(copy_dtod(q, p, 64));
    OK(copy_dtoh(bytes, q, 64));
    MUST(bytes[0] == 4 && bytes[63] == 1);
    OK(copy((CUdeviceptr)(uintptr_t)(bytes + 1), q, 4));
    MUST(bytes[1] == 4 && bytes[4] == 1);
}

static void pins(void) {
    CUdeviceptr d;
    begin();
    char *p = pinned_bytes(128), *own = malloc(128);
    OK(host_register(own, 128, 0));
    GIVES(host_register(own + 50, 10, 0), HOST_MEMORY_ALREADY_REGISTERED);
    GIVES(host_free(own), INVALID_VALUE);
    GIVES(host_unregister(p), HOST_MEMORY_NOT_REGISTERED);
    OK(host_pointer(&d, own, 0));
    put_at(d, 2, 0, NULL);
    OK(ctx_synchronize());
    OK(host_unregister(own));
    GIVES(host_pointer(&d, own, 0), INVALID_VALUE);
    OK(host_free(p));
    GIVES(host_free(p), INVALID_VALUE);
}

static void unpinned_early(void) {
    CUdeviceptr d;
    begin();
    void *p = pinned_bytes(128);
    OK(host_pointer(&d, p, 0));
    put_at(d, 2, 0, NULL);
    OK(host_free(p));
    ctx_synchronize();
}

static void zero_copy(void) {
    CUdeviceptr d;
    begin();
    float *p = pinned_bytes(256);
    OK(host_pointer(&d, p, 0));
    put_at(d, 2, 0, NULL);
    OK(ctx_synchronize());
    MUST(p[0] == 2 && p[31] == 2);
}

static void beyond(void) { begin(); put_at(device_bytes(127), 1, 0, NULL); ctx_synchronize(); }
static void in_front(void) { begin(); put_at(device_bytes(256), 1, -1, NULL); ctx_synchronize(); }
static void unwritten(void) {
    begin();
    CUdeviceptr x = device_bytes(128), y = device_bytes(128);
    OK(set_d8(x, 0, 124));
    get_at(y, x, 0, NULL);
    ctx_synchronize();
}
static void unwritten_to_host(void) {
    char bytes[128];
    begin();
    CUdeviceptr x = device_bytes(128), y = device_bytes(128);
    OK(set_d8(x, 0, 100));
    OK(copy_dtod(y, x, 128));
    copy_dtoh(bytes, y, 100);
    copy_dtoh(bytes, y, 101);
}
static void after_free(void) {
    begin();
    CUdeviceptr x = device_zeros(128), y = device_bytes(128);
    OK(mem_free(x));
    get_at(y, x, 0, NULL);
    ctx_synchronize();
}
static void write_constant(void) {
    CUdeviceptr p;
    begin();
    OK(module_global(&p, NULL, module, "table"));
    OK(run("which", 1, 1, NULL, ARGS(&p)));
    ctx_synchronize();
}
static void dereference(void) { begin(); *(volatile char *)(uintptr_t)device_bytes(4) = 1; }
static void kept(void) { beyond(); OK(ctx_synchronize()); }

static void test_memory(void) {
    right_with("mem=1M", amounts);
    right(ranges);
    right_with("", zero_copy);
    right(pins);
    wrong(unpinned_early, "out of bounds: 4 bytes written at 0x");
    wrong(beyond, "out of bounds: 4 bytes written at 0x7d");
    wrong(in_front, "out of bounds");
    wrong(unwritten, "read before it was written");
    wrong(unwritten_to_host, "never written to the host: byte 100 of 101");
    wrong(after_free, "use after free: read at");
    wrong(write_constant, "a constant is written");
    CHECK(child("", dereference) == 1000 + SIGSEGV, "a device address is also the host's");
}

static void test_violations_name_their_place(void) {
    ends("", beyond, 86, "softgpu: VIOLATION in put at ");
    CHECK(strstr(said, "driver_test.cu:"), "no source line: %s", said);
    CHECK(strstr(said, "st.global"), "no instruction: %s", said);
    CHECK(strstr(said, "block (0,0,0), thread (31,0,0): "), "no thread: %s", said);
    CHECK(strstr(said, "(127 bytes)"), "no allocation: %s", said);
    ends("keep=1", kept, 0, "softgpu: 1 violations");
}

/* === 6. Blocks ================================================================================ */

static void blocks_of(const char *name, int kind) {
    int times = 3, n = 4 * 33;
    begin();
    CUdeviceptr x = device_zeros(1024), y = device_zeros(1024);
    for (int k = 0; k < 2; k++) {          /* a second launch may touch what the first one did */
        if (kind == 0) OK(run(name, 4, 33, NULL, ARGS(&x, &y)));
        if (kind == 1) OK(run(name, 4, 33, NULL, ARGS(&x, &times)));
        if (kind == 2) OK(run(name, 4, 33, NULL, ARGS(&x, &y, &n)));
    }
    OK(ctx_synchronize());
}
static void by_halves(void) { blocks_of("halves", 0); }
static void by_add(void) { blocks_of("add", 2); }
static void by_atomics(void) { blocks_of("count", 1); }
static void by_write_write(void) { blocks_of("write_write", 0); }
static void by_read_other(void) { blocks_of("read_other", 0); }
static void by_atomic_read(void) { blocks_of("atomic_read", 0); }

static void test_blocks_of_a_launch(void) {
    right(by_halves);
    right(by_add);
    right(by_atomics);
    wrong(by_write_write, "of the same launch");
    wrong(by_read_other, "this block");
    wrong(by_atomic_read, "this block");
}

/* === 7. Streams =============================================================================== */

enum { N = 32 };

/* One stream writes, another one reads: ordered in this way. */
static void ordered(int how) {
    begin();
    CUdeviceptr x = device_zeros(4 * N), y = device_bytes(4 * N);
    float got[N];
    CUstream a = new_stream(), b = new_stream();
    CUevent e = new_event();
    if (how == 4) OK(stream_create(&a, 0));
    put_at(x, 1, 0, how == 5 ? NULL : a);
    if (how == 0) { OK(event_record(e, a)); OK(stream_wait(b, e, 0)); }
    if (how == 1) OK(stream_synchronize(a));
    if (how == 2) { OK(event_record(e, a)); OK(event_synchronize(e)); }
    if (how == 3) { OK(event_record(e, a)); while (event_query(e)) continue; }
    if (how == 6) while (stream_query(a)) continue;
    if (how == 7) { OK(event_record(e, a)); OK(event_record(e, b)); OK(stream_wait(b, e, 0)); }
    if (how == 8) OK(stream_wait(b, e, 0));        /* never recorded */
    get_at(y, x, 0, how == 4 ? NULL : b);
    OK(how == 4 ? stream_synchronize(NULL) : stream_synchronize(b));
    OK(copy_dtoh(got, y, sizeof got));
    if (how == 1) OK(stream_destroy(a));
    OK(ctx_synchronize());
    MUST(got[0] == 1 && got[N - 1] == 1);
}
static void by_event(void) { ordered(0); }
static void by_stream_synchronize(void) { ordered(1); }
static void by_event_synchronize(void) { ordered(2); }
static void by_event_query(void) { ordered(3); }
static void by_default_stream(void) { ordered(4); }
static void by_stream_query(void) { ordered(6); }
static void not_by_default_stream(void) { ordered(5); }
static void not_by_other_event(void) { ordered(7); }
static void not_by_empty_event(void) { ordered(8); }

/* Both streams only read x, then one of them writes: it must wait for the other one's read. */
static void read_twice(bool wait) {
    begin();
    CUdeviceptr x = device_zeros(4 * N), y = device_bytes(4 * N), z = device_bytes(4 * N);
    CUstream a = new_stream(), b = new_stream();
    CUevent e = new_event();
    get_at(y, x, 0, a);
    OK(event_record(e, a));
    get_at(z, x, 0, b);
    if (wait) OK(stream_wait(b, e, 0));
    put_at(x, 1, 0, b);
    OK(ctx_synchronize());
}
static void read_twice_right(void) { read_twice(true); }
static void read_twice_wrong(void) { read_twice(false); }

static void copy_and_kernel(void) {
    begin();
    CUdeviceptr x = device_bytes(4 * N);
    CUstream a = new_stream(), b = new_stream();
    float *p = pinned_bytes(4 * N);
    OK(copy_htod_async(x, p, 4 * N, a));
    put_at(x, 1, 0, b);
    OK(ctx_synchronize());
}

static void pageable_is_not_waited_for(void) {
    begin();
    float from[N] = { 1 };
    CUdeviceptr x = device_zeros(4 * N), y = device_bytes(4 * N);
    OK(copy_htod(x, from, sizeof from));
    get_at(y, x, 0, new_stream());
    OK(ctx_synchronize());
}

static void test_streams(void) {
    void (*good[])(void) = { by_event, by_stream_synchronize, by_event_synchronize,
        by_event_query, by_default_stream, by_stream_query, read_twice_right };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) right(good[i]);
    void (*bad[])(void) = { not_by_default_stream, not_by_other_event, not_by_empty_event,
        read_twice_wrong, copy_and_kernel, pageable_is_not_waited_for };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        wrong(bad[i], "no event path orders the two");
    ends("seed=0", not_by_empty_event, 86, "read by kernel get (work ");
    CHECK(strstr(said, "written by kernel put (work "), "does not name both: %s", said);
}

/* A pipeline over three streams and two buffers, right under any order. */
static void pipeline(void) {
    enum { ROUNDS = 20 };
    begin();
    CUstream in = new_stream(), work = new_stream(), out = new_stream();
    CUevent full[2] = { new_event(), new_event() }, done[2] = { new_event(), new_event() };
    CUevent empty[2] = { new_event(), new_event() };
    float *from[2] = { pinned_bytes(4 * N), pinned_bytes(4 * N) };
    float *to = pinned_bytes(ROUNDS * 4 * N);
    CUdeviceptr x[2] = { device_bytes(4 * N), device_bytes(4 * N) };
    CUdeviceptr y[2] = { device_bytes(4 * N), device_bytes(4 * N) };
    for (int r = 0; r < ROUNDS; r++) {
        int k = r & 1;
        OK(event_synchronize(full[k]));
        for (int i = 0; i < N; i++) from[k][i] = (float)(r * 100 + i);
        OK(stream_wait(in, done[k], 0));
        OK(copy_htod_async(x[k], from[k], 4 * N, in));
        OK(event_record(full[k], in));
        OK(stream_wait(work, full[k], 0));
        OK(stream_wait(work, empty[k], 0));
        get_at(y[k], x[k], 0, work);
        OK(event_record(done[k], work));
        OK(stream_wait(out, done[k], 0));
        OK(copy_dtoh_async(to + r * N, y[k], 4 * N, out));
        OK(event_record(empty[k], out));
    }
    OK(stream_synchronize(out));
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < N; i++) MUST(to[r * N + i] == (float)(r * 100 + i));
    OK(ctx_synchronize());
}

static int calls;
static void called(void *data) {
    CUdeviceptr p;
    calls += *(int *)data;
    GIVES(mem_alloc(&p, 4), NOT_PERMITTED);
}

static void events_and_calls(void) {
    float ms;
    int one = 1;
    begin();
    CUevent a = new_event(), b = new_event();
    GIVES(event_elapsed(&ms, a, b), INVALID_HANDLE);
    OK(event_record(a, NULL));
    OK(launch_host(NULL, called, &one));
    OK(event_record(b, NULL));
    MUST(!calls);
    GIVES(event_elapsed(&ms, a, b), NOT_READY);
    GIVES(event_query(b), NOT_READY);
    OK(event_synchronize(b));
    MUST(calls == 1);
    OK(event_elapsed(&ms, a, b));
    MUST(ms >= 0 && ms < 1000);
    OK(event_record(a, NULL));
    OK(event_destroy(a));
    GIVES(event_query(a), INVALID_HANDLE);
    OK(ctx_synchronize());
    GIVES(stream_destroy(NULL), INVALID_HANDLE);
    CUstream s = new_stream();
    OK(stream_destroy(s));
    GIVES(stream_synchronize(s), INVALID_HANDLE);
    for (int i = 0; i < 500; i++) OK(stream_destroy(new_stream()));
}

static void *one_thread(void *unused) {
    (void)unused;
    CUdeviceptr p;
    GIVES(mem_alloc(&p, 4), INVALID_CONTEXT);      /* a context is current to a thread */
    OK(ctx_set(context));
    CUstream s = new_stream();
    float *to = pinned_bytes(4 * N);
    CUdeviceptr x = device_bytes(4 * N), y = device_bytes(4 * N);
    for (int r = 0; r < 50; r++) {
        put_at(x, (float)r, 0, s);
        get_at(y, x, 0, s);
        OK(copy_dtoh_async(to, y, 4 * N, s));
        OK(stream_synchronize(s));
        MUST(to[0] == (float)r && to[N - 1] == (float)r);
    }
    OK(stream_destroy(s));
    OK(mem_free(x));
    return NULL;
}

static void by_threads(void) {
    pthread_t t[4];
    begin();
    for (int i = 0; i < 4; i++) MUST(!pthread_create(&t[i], NULL, one_thread, NULL));
    for (int i = 0; i < 4; i++) MUST(!pthread_join(t[i], NULL));
}

static void test_work_is_ordered_by_events_alone(void) {
    right(by_threads);
    right(pipeline);
    right(events_and_calls);
}

/* === 8. In flight ============================================================================= */

static void read_early(void) {
    begin();
    CUdeviceptr x = device_zeros(64);
    CUstream s = new_stream();
    uint8_t *p = pinned_bytes(64);
    memset(p, 1, 64);
    OK(copy_dtoh_async(p, x, 64, s));
    for (int i = 0; i < 64; i++) MUST(p[i] == 0xcb);
    OK(stream_synchronize(s));
    for (int i = 0; i < 64; i++) MUST(p[i] == 0);
}

/* Copies through the same pinned bytes, one after the other: each is right when it runs. */
static void through_pinned(void) {
    begin();
    CUdeviceptr x = device_bytes(64), y = device_zeros(64), z = device_bytes(64);
    CUstream s = new_stream();
    uint8_t *p = pinned_bytes(64), got[64];
    memset(p, 5, 64);
    OK(copy_htod_async(x, p, 64, s));
    OK(copy_dtoh_async(p, y, 64, s));
    OK(copy_htod_async(z, p, 64, s));
    OK(copy_dtoh_async(p, x, 64, s));
    CUstream other = new_stream();
    OK(set_d8_async(device_bytes(64), 1, 64, other));
    OK(stream_synchronize(other));
    OK(stream_synchronize(s));
    MUST(p[0] == 5 && p[63] == 5);
    OK(copy_dtoh(got, z, 64));
    MUST(got[0] == 0 && got[63] == 0);
}

static void staged(void) {
    begin();
    CUstream s = new_stream();
    CUdeviceptr x = device_bytes(64), y = device_bytes(64);
    uint8_t from[64], got[64];
    memset(from, 3, 64);
    OK(copy_htod_async(x, from, 64, s));
    memset(from, 4, 64);                   /* it is staged: this is allowed */
    OK(copy_dtoh_async(got, x, 64, s));    /* this waits */
    MUST(got[0] == 3 && got[63] == 3);
    OK(copy_htod(y, from, 64));
    memset(from, 5, 64);
    OK(copy_dtoh(got, y, 64));
    MUST(got[0] == 4 && got[63] == 4);
}

static void disturb(int how) {
    begin();
    CUstream s = new_stream();
    CUdeviceptr x = device_zeros(64);
    uint8_t *p = pinned_bytes(64), *own = malloc(64);
    OK(host_register(own, 64, 0));
    if (how == 0) { OK(copy_htod_async(x, p, 64, s)); p[63]++; }
    if (how == 1) { OK(copy_dtoh_async(p, x, 64, s)); p[0] = 0; }
    if (how == 2) { OK(copy_htod_async(x, own, 64, s)); own[0]++; }
    if (how == 3) { OK(copy_htod_async(x, p, 64, s)); OK(host_free(p)); }
    if (how == 4) { OK(copy_dtoh_async(own, x, 64, s)); OK(host_unregister(own)); }
    OK(stream_synchronize(s));
}
static void change_source(void) { disturb(0); }
static void change_target(void) { disturb(1); }
static void change_registered(void) { disturb(2); }
static void free_early(void) { disturb(3); }
static void unregister_early(void) { disturb(4); }

static void test_in_flight(void) {
    right(read_early);
    right(through_pinned);
    right(staged);
    wrong(change_source, "host memory written while a copy is in flight: the source of cuMemcpyH");
    wrong(change_target, "while a copy is in flight: the destination of cuMemcpyDtoHAsync (work");
    wrong(change_registered, "host memory written while a copy is in flight");
    wrong(free_early, "freed or unregistered while a copy is in flight");
    wrong(unregister_early, "freed or unregistered while a copy is in flight");
}

/* === 9. Time ================================================================================== */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void measure(void) {
    int n = 1 << 22;
    begin();
    CUdeviceptr x = device_zeros(4u << 22), y = device_zeros(4u << 22);
    double begun = seconds();
    OK(run("add", 1 << 14, 256, NULL, ARGS(&y, &x, &n)));
    OK(ctx_synchronize());
    double kernel = seconds() - begun;
    begun = seconds();
    OK(copy_dtod(x, y, 4u << 22));
    OK(ctx_synchronize());
    fprintf(stderr, "%.0f ns a thread of add (4 accesses), copies %.1f GB/s", kernel * 1e9 / n,
            (4u << 22) * 1e-9 / (seconds() - begun));
}

static void test_time(void) {
    CHECK(child("", measure) == 0, "%s", said);
    NOTE("%.200s", said);
}

int main(int argc, char **argv) {
    const char *slash = strrchr(argv[0], '/');
    int n = slash ? (int)(slash - argv[0]) : 1;
    snprintf(library_path, sizeof library_path, "%.*s/libcuda.so.1", n, slash ? argv[0] : ".");
    snprintf(fatbin_path, sizeof fatbin_path, "%.*s/test_driver.fatbin", n, slash ? argv[0] : ".");
    FILE *f = fopen(argc > 1 ? argv[1] : fatbin_path, "rb");
    fatbin = malloc(1 << 20);
    if (!f || !(fatbin_bytes = fread(fatbin, 1, 1 << 20, f))) {
        perror(fatbin_path);
        return 1;
    }
    fclose(f);
    RUN(test_legacy_symbols_are_traps);
    RUN(test_addresses_are_of_a_version);
    RUN(test_initialization_comes_first);
    RUN(test_the_device_is_as_configured);
    RUN(test_the_best_image_is_taken);
    RUN(test_images_are_not_trusted);
    RUN(test_functions_and_globals_are_found);
    RUN(test_launch_limits);
    RUN(test_memory);
    RUN(test_violations_name_their_place);
    RUN(test_blocks_of_a_launch);
    RUN(test_streams);
    RUN(test_work_is_ordered_by_events_alone);
    RUN(test_in_flight);
    RUN(test_time);
    return check_done();
}
