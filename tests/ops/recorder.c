// A stand-in for the CUDA driver that writes down what it is asked, for tests/ops/recorder.py. It runs nothing.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOG_BYTES (1 << 16)
static __thread long current = 0;
static __thread int capture_mode = 0;
static char record[LOG_BYTES];
static size_t used = 0;
static char failing[64];
static int failure = 0;
static int sizes[64];
static int size_count = 0;
static int devices = 2;
static int lock = 0;

static void enter(void) { while (__sync_lock_test_and_set(&lock, 1)) {} }
static void leave(void) { __sync_lock_release(&lock); }
#define NOTE(...) do { enter(); if (used < LOG_BYTES - 2048) \
    used += (size_t)snprintf(record + used, LOG_BYTES - used, __VA_ARGS__); leave(); } while (0)
#define MAY_FAIL(name) do { if (strcmp(failing, name) == 0) return failure; } while (0)

void recorder_fail(const char *name, int error) { strncpy(failing, name, 63); failure = error; }
void recorder_sizes(int count, const int *given) {
    size_count = count;
    for (int i = 0; i < count; ++i) sizes[i] = given[i];
}
void recorder_devices(int count) { devices = count; }
size_t recorder_take(char *out) { size_t n = used; memcpy(out, record, n); out[n] = 0; used = 0; return n; }

int cuInit(unsigned f) { MAY_FAIL("cuInit"); return 0; }
int cuGetErrorName(int e, const char **t) {
    *t = e == 222 ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" : "CUDA_ERROR_TEST";
    return 0;
}
int cuGetErrorString(int e, const char **t) { *t = "a test's failure"; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *c) { MAY_FAIL("cuDeviceGetCount"); *c = devices; return 0; }
int cuDeviceGet(int *d, int o) { if (o < 0 || o >= devices) return 101; *d = 10 + o; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : 0; return 0; }
int cuDevicePrimaryCtxRetain(long *c, int d) {
    MAY_FAIL("cuDevicePrimaryCtxRetain");
    NOTE("retain %d\n", d);
    *c = 100 + d;
    return 0;
}
int cuDevicePrimaryCtxRelease_v2(int d) { NOTE("release %d\n", d); return 0; }
int cuCtxGetCurrent(long *c) { *c = current; return 0; }
int cuCtxPushCurrent_v2(long c) { NOTE("push %ld\n", c); current = c; return 0; }
int cuCtxPopCurrent_v2(long *c) { NOTE("pop %ld\n", current); *c = current; current = 0; return 0; }
int cuThreadExchangeStreamCaptureMode(int *mode) {
    MAY_FAIL("cuThreadExchangeStreamCaptureMode");
    int before = capture_mode;
    NOTE("captures %d\n", *mode);
    capture_mode = *mode;
    *mode = before;
    return 0;
}
int cuModuleLoadDataEx(long *m, const void *image, unsigned n, int *options, void **values) {
    if (strcmp(failing, "cuModuleLoadDataEx") == 0) {
        for (unsigned i = 0; i < n; ++i)
            if (options[i] == 5) snprintf((char *)values[i], 64, "line 1: the log");
        return failure;
    }
    NOTE("load in %ld\n", current);
    *m = 7;
    return 0;
}
int cuModuleUnload(long m) { NOTE("unload %ld\n", m); return 0; }
int cuModuleGetFunction(long *f, long m, const char *name) { if (strcmp(name, "missing") == 0) return 500; *f = 9; return 0; }
int cuFuncGetAttribute(int *v, int a, long f) { *v = a == 0 ? 1024 : a == 4 ? 77 : 5; return 0; }
int cuFuncSetAttribute(long f, int a, int v) { MAY_FAIL("cuFuncSetAttribute"); NOTE("set %d=%d\n", a, v); return 0; }
int cuLaunchKernel(long f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
    MAY_FAIL("cuLaunchKernel");
    char text[2048];
    size_t at = 0;
    for (int i = 0; i < size_count; ++i) {
        const unsigned char *p = arguments[i];
        for (int b = 0; b < sizes[i]; ++b) at += (size_t)snprintf(text + at, sizeof text - at, "%02x", p[b]);
        text[at++] = ' ';
    }
    text[at] = 0;
    if (size_count >= 0)
        NOTE("launch %ld grid %u %u %u block %u %u %u shared %u stream %lx extra %d context %ld args %s\n", f, gx, gy, gz, bx, by,
             bz, shared, (long)stream, extra != 0, current, text);
    return 0;
}

// What Triton's own launch asks for beside that (bench/test_launch.py).
int cuCtxGetDevice(int *d) { *d = 10; return 0; }
int cuCtxSetCurrent(long c) { current = c; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRelease(int d) { return cuDevicePrimaryCtxRelease_v2(d); }
int cuModuleLoadData(long *m, const void *image) { *m = 7; return 0; }
int cuFuncSetCacheConfig(long f, int config) { return 0; }
int cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
    *(unsigned long long *)value = pointer;
    return 0;
}
int cuOccupancyMaxActiveClusters(int *n, long f, const void *config) { *n = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 801; }
int cuTensorMapEncodeIm2col(void) { return 801; }
int cuLaunchKernelEx(const void *config, long f, void **arguments, void **extra) { return 0; }
