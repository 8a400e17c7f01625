/* Stands in for libcuda and libamdhip64: every call is written down, and any call can be made to fail.
 *
 * A binary is accepted when it begins as an ELF file does, and holds the functions whose names follow in its text.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where the vendors' headers are at hand, what the driver module takes from them is compared with them. */
#ifdef WITH_CUDA_H
#include <cuda.h>
_Static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75, "major");
_Static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == 76, "minor");
_Static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8, "dynamic shared memory");
#define TAKES(name, ...) _Static_assert(__builtin_types_compatible_p(__typeof__(name), CUresult(__VA_ARGS__)), #name)
TAKES(cuInit, unsigned int);
TAKES(cuDriverGetVersion, int *);
TAKES(cuDeviceGet, CUdevice *, int);
TAKES(cuDeviceGetName, char *, int, CUdevice);
TAKES(cuDeviceGetAttribute, int *, CUdevice_attribute, CUdevice);
TAKES(cuDevicePrimaryCtxRetain, CUcontext *, CUdevice);
TAKES(cuCtxGetCurrent, CUcontext *);
TAKES(cuCtxPushCurrent_v2, CUcontext);
TAKES(cuCtxPopCurrent_v2, CUcontext *);
TAKES(cuModuleLoadData, CUmodule *, const void *);
TAKES(cuModuleGetFunction, CUfunction *, CUmodule, const char *);
TAKES(cuFuncSetAttribute, CUfunction, CUfunction_attribute, int);
TAKES(cuOccupancyMaxActiveBlocksPerMultiprocessor, int *, CUfunction, int, size_t);
TAKES(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
      void **, void **);
TAKES(cuGetErrorName, CUresult, const char **);
TAKES(cuGetErrorString, CUresult, const char **);
#elif defined(WITH_HIP_H)
#define __HIP_PLATFORM_AMD__
#include <stdbool.h>
#include <hip/hip_runtime_api.h>
_Static_assert(offsetof(hipDeviceProp_tR0600, name) == 0, "name");
_Static_assert(offsetof(hipDeviceProp_tR0600, gcnArchName) == 1160, "gcnArchName");
_Static_assert(sizeof(hipDeviceProp_tR0600) <= 8192, "size");
_Static_assert(sizeof(((hipDeviceProp_tR0600 *)0)->name) == 256, "length of a name");
#define TAKES(name, ...) _Static_assert(__builtin_types_compatible_p(__typeof__(name), hipError_t(__VA_ARGS__)), #name)
TAKES(hipInit, unsigned int);
TAKES(hipDriverGetVersion, int *);
TAKES(hipGetDevicePropertiesR0600, hipDeviceProp_tR0600 *, int);
TAKES(hipGetDevice, int *);
TAKES(hipSetDevice, int);
TAKES(hipModuleLoadData, hipModule_t *, const void *);
TAKES(hipModuleGetFunction, hipFunction_t *, hipModule_t, const char *);
TAKES(hipModuleOccupancyMaxActiveBlocksPerMultiprocessor, int *, hipFunction_t, int, size_t);
TAKES(hipModuleLaunchKernel, hipFunction_t, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
      hipStream_t, void **, void **);
#else

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char journal[1 << 20];
static size_t used;
static char failing[64], architecture[64] = "gfx942:sramecc+:xnack-";
static int failing_code, failing_after, failing_times, arguments, major = 9, minor, blocks = 2, refused_shared = 232448;
static char *images[256];
static int image_count;
static struct { int arguments; char name[128]; } functions[1024], known[256];
static int known_count;
static int function_count;
static _Thread_local intptr_t current;

void stub_reset(void) {
    used = 0, journal[0] = 0, failing[0] = 0, arguments = 0, major = 9, minor = 0, blocks = 2, image_count = 0;
    function_count = 0, known_count = 0, current = 0, refused_shared = 232448;
    strcpy(architecture, "gfx942:sramecc+:xnack-");
}
const char *stub_journal(void) { return journal; }
/* The call of that name fails with `code`, `times` in a row, after it has succeeded `after` times. */
void stub_fail(const char *call, int code, int after, int times) {
    snprintf(failing, sizeof failing, "%s", call), failing_code = code, failing_after = after, failing_times = times;
}
void stub_capability(int a, int b) { major = a, minor = b; }
void stub_architecture(const char *name) { snprintf(architecture, sizeof architecture, "%s", name); }
/* How many arguments a launch reads, of any function and of one of that name. */
void stub_arguments(int count) { arguments = count; }
void stub_arguments_of(const char *name, int count) {
    known[known_count].arguments = count;
    snprintf(known[known_count++].name, 128, "%s", name);
}
void stub_blocks(int count) { blocks = count; }

static int note(const char *call, const char *format, ...) {
    pthread_mutex_lock(&lock);
    va_list list;
    va_start(list, format);
    used += snprintf(journal + used, sizeof journal - used, "%s ", call);
    used += vsnprintf(journal + used, sizeof journal - used, format, list);
    used += snprintf(journal + used, sizeof journal - used, "\n");
    va_end(list);
    int code = strcmp(call, failing) == 0 && failing_after-- <= 0 && failing_times-- > 0 ? failing_code : 0;
    pthread_mutex_unlock(&lock);
    return code;
}

static int load(const char *call, intptr_t *module, const char *image, int invalid) {
    int code = note(call, "context=%ld", (long)current);
    if (code) return code;
    if (memcmp(image, "\x7f" "ELF", 4)) return invalid;
    images[image_count] = strdup(image);
    *module = 0x1000 + image_count++;
    return 0;
}

static int get_function(const char *call, intptr_t *function, intptr_t module, const char *name, int missing) {
    int code = note(call, "module=%lx name=%s", (long)module, name);
    if (code) return code;
    if (!strstr(images[module - 0x1000] + 4, name)) return missing;
    functions[function_count].arguments = -1;
    for (int i = 0; i < known_count; i++)
        if (!strcmp(known[i].name, name)) functions[function_count].arguments = known[i].arguments;
    snprintf(functions[function_count].name, 128, "%s", name);
    *function = 0x2000 + function_count++;
    return 0;
}

static int launch(const char *call, intptr_t f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                  unsigned bz, unsigned shared, void *stream, void **values) {
    char text[4096];
    size_t n = 0;
    text[0] = 0;
    int count = functions[f - 0x2000].arguments;
    for (int i = 0; i < (count < 0 ? arguments : count); i++) {
        uint64_t value;
        memcpy(&value, values[i], 8);
        n += snprintf(text + n, sizeof text - n, "%s%016llx", i ? "," : "", (unsigned long long)value);
    }
    return note(call, "context=%ld function=%s grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%lx arguments=%s",
                (long)current, functions[f - 0x2000].name, gx, gy, gz, bx, by, bz, shared, (long)stream, text);
}

int cuInit(unsigned flags) { return note("cuInit", "%u", flags); }
int cuDriverGetVersion(int *version) { *version = 12080; return note("cuDriverGetVersion", ""); }
int cuDeviceGet(int *device, int index) { *device = index; return index > 1 ? 101 : note("cuDeviceGet", "%d", index); }
int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "Stub GPU");
    return note("cuDeviceGetName", "%d", device);
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? major : attribute == 76 ? minor : -1;
    return note("cuDeviceGetAttribute", "%d %d", attribute, device);
}
int cuDevicePrimaryCtxRetain(intptr_t *context, int device) {
    *context = 100 + device;
    return note("cuDevicePrimaryCtxRetain", "%d", device);
}
int cuCtxGetCurrent(intptr_t *context) { *context = current; return 0; }
int cuCtxPushCurrent_v2(intptr_t context) { current = context; return note("cuCtxPushCurrent", "%ld", (long)context); }
int cuCtxPopCurrent_v2(intptr_t *context) { *context = current; current = 0; return note("cuCtxPopCurrent", ""); }
int cuModuleLoadData(intptr_t *module, const char *image) { return load("cuModuleLoadData", module, image, 200); }
int cuModuleGetFunction(intptr_t *function, intptr_t module, const char *name) {
    return get_function("cuModuleGetFunction", function, module, name, 500);
}
int cuFuncSetAttribute(intptr_t function, int attribute, int value) {
    int code = note("cuFuncSetAttribute", "%lx %d %d", (long)function, attribute, value);
    return value > refused_shared ? 1 : code;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, intptr_t function, int threads, size_t shared) {
    *count = blocks;
    return note("cuOccupancyMaxActiveBlocksPerMultiprocessor", "%lx %d %zu", (long)function, threads, shared);
}
int cuLaunchKernel(intptr_t f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **values, void **extra) {
    return launch("cuLaunchKernel", f, gx, gy, gz, bx, by, bz, shared, stream, values) + (extra ? 1 : 0);
}
static const struct { int code; const char *name, *text; } errors[] = {
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
};
int cuGetErrorName(int code, const char **name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return *name = errors[i].name, 0;
    return *name = NULL, 1;
}
int cuGetErrorString(int code, const char **text) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return *text = errors[i].text, 0;
    return *text = NULL, 1;
}

int hipInit(unsigned flags) { return note("hipInit", "%u", flags); }
int hipDriverGetVersion(int *version) { *version = 60443484; return note("hipDriverGetVersion", ""); }
int hipGetDevicePropertiesR0600(char *properties, int device) {
    memset(properties, 0, 1472);
    strcpy(properties, "Stub Instinct");
    strcpy(properties + 1160, architecture);
    return device > 1 ? 101 : note("hipGetDeviceProperties", "%d", device);
}
int hipGetDevice(int *device) { *device = (int)current; return 0; }
int hipSetDevice(int device) { current = device; return note("hipSetDevice", "%d", device); }
int hipModuleLoadData(intptr_t *module, const char *image) { return load("hipModuleLoadData", module, image, 209); }
int hipModuleGetFunction(intptr_t *function, intptr_t module, const char *name) {
    return get_function("hipModuleGetFunction", function, module, name, 500);
}
int hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int *count, intptr_t function, int threads, size_t shared) {
    *count = blocks;
    return note("hipModuleOccupancyMaxActiveBlocksPerMultiprocessor", "%lx %d %zu", (long)function, threads, shared);
}
int hipModuleLaunchKernel(intptr_t f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **values, void **extra) {
    return launch("hipModuleLaunchKernel", f, gx, gy, gz, bx, by, bz, shared, stream, values) + (extra ? 1 : 0);
}
int hipGetLastError(void) { return note("hipGetLastError", ""); }
const char *hipGetErrorName(int code) { return code == 209 ? "hipErrorNoBinaryForGpu" : "hipErrorOther"; }
const char *hipGetErrorString(int code) {
    return code == 209 ? "no kernel image is available for execution on the device" : "another error";
}
#endif
