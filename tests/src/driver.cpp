// A CUDA driver that has memory and no GPU: it loads anything, copies what it is told to, and launches nothing.
//
// What it says of itself is set where it is compiled:
// VERSION, INIT (what cuInit gives), COUNT, MAJOR, MINOR, UNIFIED, TOTAL, FREE, KERNELS (whether modules have any).
#include <cstdlib>
#include <cstring>

extern "C" {
typedef int R;
typedef unsigned long long P;
typedef void* H;

R cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
R cuInit(unsigned) { return INIT; }
R cuGetErrorName(R code, const char** name) { *name = code == 34 ? "CUDA_ERROR_STUB_LIBRARY" : "CUDA_ERROR_OF_A_TEST"; return 0; }
R cuGetErrorString(R, const char** text) { *text = "an error of a test"; return 0; }
R cuDeviceGetCount(int* count) { *count = COUNT; return 0; }
R cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal < COUNT ? 0 : 101; }
R cuDeviceGetName(char* name, int len, int) { strncpy(name, "NVIDIA Nothing", len); return 0; }
R cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = TOTAL; return 0; }
R cuDeviceGetAttribute(int* value, int which, int) {
    *value = which == 16 ? 4 : which == 75 ? MAJOR : which == 76 ? MINOR : which == 18 ? UNIFIED : 0;
    return 0;
}
R cuDevicePrimaryCtxRetain(H* context, int) { *context = (H)1; return 0; }
R cuDevicePrimaryCtxRelease_v2(int) { return 0; }
R cuCtxSetCurrent(H) { return 0; }
R cuMemGetInfo_v2(size_t* free, size_t* total) { *free = FREE; *total = TOTAL; return 0; }
R cuMemAlloc_v2(P* at, size_t bytes) { *at = (P)calloc(bytes, 1); return *at ? 0 : 2; }
R cuMemFree_v2(P at) { free((void*)at); return 0; }
R cuMemHostRegister_v2(void*, size_t, unsigned) { return 0; }
R cuMemHostUnregister(void*) { return 0; }
R cuMemcpyHtoDAsync_v2(P to, const void* from, size_t bytes, H) { memcpy((void*)to, from, bytes); return 0; }
R cuMemcpyDtoHAsync_v2(void* to, P from, size_t bytes, H) { memcpy(to, (void*)from, bytes); return 0; }
R cuMemcpyDtoDAsync_v2(P to, P from, size_t bytes, H) { memmove((void*)to, (void*)from, bytes); return 0; }
R cuMemsetD8Async(P at, unsigned char byte, size_t bytes, H) { memset((void*)at, byte, bytes); return 0; }
R cuStreamCreate(H* stream, unsigned) { *stream = (H)2; return 0; }
R cuStreamSynchronize(H) { return 0; }
R cuStreamDestroy_v2(H) { return 0; }
R cuStreamBeginCapture_v2(H, int) { return 0; }
R cuStreamEndCapture(H, H* graph) { *graph = (H)3; return 0; }
R cuGraphInstantiateWithFlags(H* ready, H, P) { *ready = (H)4; return 0; }
R cuGraphDestroy(H) { return 0; }
R cuGraphExecDestroy(H) { return 0; }
R cuGraphLaunch(H, H) { return 0; }
R cuEventCreate(H* event, unsigned) { *event = (H)5; return 0; }
R cuEventDestroy_v2(H) { return 0; }
R cuEventRecord(H, H) { return 0; }
R cuEventRecordWithFlags(H, H, unsigned) { return 0; }
R cuEventQuery(H) { return 0; }
R cuEventSynchronize(H) { return 0; }
R cuEventElapsedTime_v2(float* ms, H, H) { *ms = 1; return 0; }
R cuModuleLoadData(H* module, const void*) { *module = (H)6; return 0; }
R cuModuleUnload(H) { return 0; }
R cuModuleGetFunction(H* function, H, const char*) { *function = (H)7; return KERNELS ? 0 : 500; }
R cuFuncSetAttribute(H, int, int) { return 0; }
R cuLaunchKernel(H, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, H, void**, void**) { return 0; }
R cuLaunchKernelEx(const void*, H, void**, void**) { return 0; }
}
