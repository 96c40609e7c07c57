/* A CUDA driver that does nothing: each call succeeds at once, and the last launch is remembered.
 *
 * Triton compiles for, loads onto and launches on the sm_90 GPU that it pretends to be, so what remains of a launch is its
 * cost on the host. Built and used by stub.py.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;
typedef void *Handle;

enum { MAX_PARAMETERS = 32 };

static struct {
    uint64_t launches;
    uint64_t function;
    uint64_t grid;
    uint64_t stream;
    uint64_t parameters[MAX_PARAMETERS];
} last;
static int n_parameters = 0; /* how many the next launches have: a driver learns it from the kernel's code */
static uintptr_t modules = 0;

void stub_expect(int n) { n_parameters = n < MAX_PARAMETERS ? n : MAX_PARAMETERS; }
const void *stub_last(void) { return &last; }

static Result remember(Handle function, unsigned grid, Handle stream, void **parameters) {
    last.launches++;
    last.function = (uintptr_t)function;
    last.grid = grid;
    last.stream = (uintptr_t)stream;
    for (int i = 0; i < n_parameters; i++)
        memcpy(&last.parameters[i], parameters[i], sizeof(uint64_t));
    return 0;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }

Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDevicePrimaryCtxRetain(Handle *context, int device) { *context = (Handle)1; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;    /* threads a block */
    case 8: *value = 49152; break;   /* shared memory a block */
    case 10: *value = 32; break;     /* warp size */
    case 12: *value = 65536; break;  /* registers a block */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability, major */
    case 76: *value = 0; break;      /* and minor */
    case 81: *value = 233472; break; /* shared memory a multiprocessor */
    case 97: *value = 232448; break; /* shared memory a block may opt in to */
    default: *value = 1;
    }
    return 0;
}

Result cuCtxGetCurrent(Handle *context) { *context = (Handle)1; return 0; }
Result cuCtxSetCurrent(Handle context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuStreamGetCtx(Handle stream, Handle *context) { *context = (Handle)1; return 0; }
Result cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }

/* Every module is another, and so is its function: two launches of one compilation are told by it. */
Result cuModuleLoadData(Handle *module, const void *image) { *module = (Handle)(0x1000 + 16 * ++modules); return 0; }
Result cuModuleUnload(Handle module) { return 0; }
Result cuModuleGetFunction(Handle *function, Handle module, const char *name) { *function = module; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, Handle function) { *value = attribute == 0 ? 1024 : 16; return 0; }
Result cuFuncSetAttribute(Handle function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(Handle function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, Handle function, const void *config) { *count = 1; return 0; }

/* The head of a CUlaunchConfig: three grid and three block dimensions, shared memory, stream. */
struct Config { unsigned grid[3], block[3], shared; Handle stream; };
Result cuLaunchKernelEx(const struct Config *config, Handle function, void **parameters, void **extra) {
    return remember(function, config->grid[0], config->stream, parameters);
}
Result cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared, Handle stream, void **parameters, void **extra) {
    return remember(function, grid_x, stream, parameters);
}

Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
Result cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t pointer) {
    for (unsigned i = 0; i < n; i++)
        *(uint64_t *)data[i] = pointer;
    return 0;
}
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuGetProcAddress(const char *symbol, Handle *pointer, int version, uint64_t flags) { return 1; }
Result cuGetProcAddress_v2(const char *symbol, Handle *pointer, int version, uint64_t flags, int *status) { return 1; }
