// A CUDA runtime without CUDA: the functions that the wheel's host code calls, each handed to one
// hook.
//
// `hook(name, values, count)` gets the arguments as 64-bit integers, may overwrite them with
// results, and returns a cudaError_t. Python installs it (runtime.py) and decides everything: what
// is logged, what fails, what a launch does. Without a hook every call returns
// cudaErrorInsufficientDriver (35), as the real runtime does on a machine without a driver. What
// nvcc's start-up code registers (kernels, variables) is kept here, since it happens when the
// library is loaded.
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <string.h>

typedef int (*Hook)(const char* name, int64_t* values, int count);
typedef struct {
  const void* host;
  const char* device_name;
} Registration;
enum { kMaxRegistrations = 4096 };

static Hook hook;
static Registration kernels[kMaxRegistrations];
static Registration variables[kMaxRegistrations];
static int kernel_count, variable_count;

#if defined(__cplusplus)
#error "compile as C"
#endif
#define INT(x) ((int64_t)(x))
#define POINTER(x) ((int64_t)(intptr_t)(x))
// Declares `values` (inputs, then room for results) and `error`.
#define CALL(name, ...)             \
  int64_t values[] = {__VA_ARGS__}; \
  const cudaError_t error = call(name, values, (int)(sizeof values / sizeof *values))

static cudaError_t call(const char* name, int64_t* values, int count) {
  return hook ? (cudaError_t)hook(name, values, count) : cudaErrorInsufficientDriver;
}

// For Python

void fake_set_hook(Hook function) {
  hook = function;
}
int fake_kernel_count(void) {
  return kernel_count;
}
int fake_variable_count(void) {
  return variable_count;
}
const Registration* fake_kernels(void) {
  return kernels;
}
const Registration* fake_variables(void) {
  return variables;
}

// What nvcc generates calls to

void** __cudaRegisterFatBinary(void* image) {
  static void* handle;
  (void)image;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) {
  (void)handle;
}
void __cudaUnregisterFatBinary(void** handle) {
  (void)handle;
}
char __cudaInitModule(void** handle) {
  return handle != NULL;
}

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                            int limit, uint3* tid, uint3* bid, dim3* block, dim3* grid, int* size) {
  (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid,
      (void)size;
  if (kernel_count < kMaxRegistrations) kernels[kernel_count++] = (Registration){host, name};
}

void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external,
                       size_t size, int constant, int global) {
  (void)handle, (void)device, (void)external, (void)size, (void)constant, (void)global;
  if (variable_count < kMaxRegistrations) variables[variable_count++] = (Registration){host, name};
}

static __thread struct {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared_bytes = shared_bytes;
  configuration.stream = (cudaStream_t)stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *(cudaStream_t*)stream = configuration.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  CALL("cudaLaunchKernel", POINTER(kernel), grid.x, grid.y, grid.z, block.x, block.y, block.z,
       POINTER(arguments), INT(shared_bytes), POINTER(stream));
  return error;
}

cudaError_t __cudaGetKernel(void** kernel, const void* host) {
  *kernel = (void*)host;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}

// Errors and devices

cudaError_t cudaGetLastError(void) {
  CALL("cudaGetLastError", 0);
  return error;
}
cudaError_t cudaPeekAtLastError(void) {
  CALL("cudaPeekAtLastError", 0);
  return error;
}
const char* cudaGetErrorName(cudaError_t code) {
  int64_t values[] = {code, 0};
  call("cudaGetErrorName", values, 2);
  return values[1] ? (const char*)(intptr_t)values[1] : "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t code) {
  int64_t values[] = {code, 0};
  call("cudaGetErrorString", values, 2);
  return values[1] ? (const char*)(intptr_t)values[1] : "unknown error";
}
cudaError_t cudaGetDevice(int* device) {
  CALL("cudaGetDevice", 0);
  if (!error) *device = (int)values[0];
  return error;
}
cudaError_t cudaSetDevice(int device) {
  CALL("cudaSetDevice", device);
  return error;
}
cudaError_t cudaGetDeviceCount(int* count) {
  CALL("cudaGetDeviceCount", 0);
  if (!error) *count = (int)values[0];
  return error;
}
cudaError_t cudaDeviceSynchronize(void) {
  CALL("cudaDeviceSynchronize", 0);
  return error;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  CALL("cudaDeviceGetAttribute", attribute, device, 0);
  if (!error) *value = (int)values[2];
  return error;
}

static int64_t attribute_of(enum cudaDeviceAttr attribute, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  CALL("cudaGetDeviceProperties", device, 0, 0);
  if (error) return error;
  memset(properties, 0, sizeof *properties);
  strncpy(properties->name, (const char*)(intptr_t)values[1], sizeof properties->name - 1);
  properties->totalGlobalMem = (size_t)values[2];
#define COPY(field, attribute) properties->field = attribute_of(cudaDevAttr##attribute, device)
  COPY(major, ComputeCapabilityMajor);
  COPY(minor, ComputeCapabilityMinor);
  COPY(multiProcessorCount, MultiProcessorCount);
  COPY(warpSize, WarpSize);
  COPY(maxThreadsPerBlock, MaxThreadsPerBlock);
  COPY(regsPerBlock, MaxRegistersPerBlock);
  COPY(regsPerMultiprocessor, MaxRegistersPerMultiprocessor);
  COPY(sharedMemPerBlock, MaxSharedMemoryPerBlock);
  COPY(sharedMemPerBlockOptin, MaxSharedMemoryPerBlockOptin);
  COPY(sharedMemPerMultiprocessor, MaxSharedMemoryPerMultiprocessor);
  COPY(reservedSharedMemPerBlock, ReservedSharedMemoryPerBlock);
  COPY(maxThreadsPerMultiProcessor, MaxThreadsPerMultiProcessor);
  COPY(maxBlocksPerMultiProcessor, MaxBlocksPerMultiprocessor);
  COPY(l2CacheSize, L2CacheSize);
  COPY(memoryBusWidth, GlobalMemoryBusWidth);
  COPY(managedMemory, ManagedMemory);
  COPY(concurrentManagedAccess, ConcurrentManagedAccess);
  COPY(pageableMemoryAccess, PageableMemoryAccess);
  COPY(unifiedAddressing, UnifiedAddressing);
#undef COPY
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  CALL("cudaDriverGetVersion", 0);
  if (!error) *version = (int)values[0];
  return error;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Memory

static cudaError_t allocate(const char* name, void** pointer, size_t bytes, int64_t extra) {
  CALL(name, INT(bytes), extra, 0);
  if (!error) *pointer = (void*)(intptr_t)values[2];
  return error;
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate("cudaMalloc", pointer, bytes, 0);
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) {
  return allocate("cudaMallocAsync", pointer, bytes, POINTER(stream));
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return allocate("cudaMallocHost", pointer, bytes, 0);
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return allocate("cudaHostAlloc", pointer, bytes, flags);
}
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned flags) {
  return allocate("cudaMallocManaged", pointer, bytes, flags);
}
cudaError_t cudaFree(void* pointer) {
  CALL("cudaFree", POINTER(pointer));
  return error;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  CALL("cudaFreeAsync", POINTER(pointer), POINTER(stream));
  return error;
}
cudaError_t cudaFreeHost(void* pointer) {
  CALL("cudaFreeHost", POINTER(pointer));
  return error;
}
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned flags) {
  CALL("cudaHostRegister", POINTER(pointer), INT(bytes), flags);
  return error;
}
cudaError_t cudaHostUnregister(void* pointer) {
  CALL("cudaHostUnregister", POINTER(pointer));
  return error;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  CALL("cudaMemGetInfo", 0, 0);
  if (!error) *available = (size_t)values[0], *total = (size_t)values[1];
  return error;
}
cudaError_t cudaMemAdvise(const void* pointer, size_t bytes, enum cudaMemoryAdvise advice,
                          struct cudaMemLocation location) {
  CALL("cudaMemAdvise", POINTER(pointer), INT(bytes), advice, location.type, location.id);
  return error;
}
cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, struct cudaMemLocation location,
                                 unsigned flags, cudaStream_t stream) {
  CALL("cudaMemPrefetchAsync", POINTER(pointer), INT(bytes), location.type, location.id, flags,
       POINTER(stream));
  return error;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  CALL("cudaMemcpyAsync", POINTER(to), POINTER(from), INT(bytes), kind, POINTER(stream));
  return error;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  CALL("cudaMemcpy", POINTER(to), POINTER(from), INT(bytes), kind, 0);
  return error;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  CALL("cudaMemsetAsync", POINTER(pointer), value, INT(bytes), POINTER(stream));
  return error;
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  CALL("cudaMemset", POINTER(pointer), value, INT(bytes), 0);
  return error;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                    size_t offset, enum cudaMemcpyKind kind, cudaStream_t stream) {
  CALL("cudaMemcpyToSymbolAsync", POINTER(symbol), POINTER(from), INT(bytes), INT(offset), kind,
       POINTER(stream));
  return error;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaMemcpyToSymbolAsync(symbol, from, bytes, offset, kind, NULL);
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  CALL("cudaGetSymbolAddress", POINTER(symbol), 0);
  if (!error) *pointer = (void*)(intptr_t)values[1];
  return error;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes,
                                     const void* pointer) {
  CALL("cudaPointerGetAttributes", POINTER(pointer), 0, 0);
  if (error) return error;
  memset(attributes, 0, sizeof *attributes);
  attributes->type = (enum cudaMemoryType)values[1];
  attributes->device = (int)values[2];
  if (attributes->type != cudaMemoryTypeUnregistered) {
    attributes->hostPointer = attributes->type == cudaMemoryTypeDevice ? NULL : (void*)pointer;
    attributes->devicePointer = (void*)pointer;
  }
  return cudaSuccess;
}

// Streams and events

static cudaError_t create(const char* name, void** handle, int64_t flags, int64_t priority) {
  CALL(name, flags, priority, 0);
  if (!error) *handle = (void*)(intptr_t)values[2];
  return error;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return create("cudaStreamCreate", (void**)stream, 0, 0);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return create("cudaStreamCreate", (void**)stream, flags, 0);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return create("cudaStreamCreate", (void**)stream, flags, priority);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  CALL("cudaStreamDestroy", POINTER(stream));
  return error;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CALL("cudaStreamSynchronize", POINTER(stream));
  return error;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  CALL("cudaStreamQuery", POINTER(stream));
  return error;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  CALL("cudaStreamWaitEvent", POINTER(stream), POINTER(event), flags);
  return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  CALL("cudaStreamIsCapturing", POINTER(stream));
  if (!error) *status = cudaStreamCaptureStatusNone;
  return error;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return create("cudaEventCreate", (void**)event, 0, 0);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return create("cudaEventCreate", (void**)event, flags, 0);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  CALL("cudaEventDestroy", POINTER(event));
  return error;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CALL("cudaEventRecord", POINTER(event), POINTER(stream));
  return error;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CALL("cudaEventSynchronize", POINTER(event));
  return error;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  CALL("cudaEventQuery", POINTER(event));
  return error;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  CALL("cudaEventElapsedTime", POINTER(start), POINTER(end));
  if (!error) *milliseconds = 0.0f;
  return error;
}

// Kernels

cudaError_t cudaFuncSetAttribute(const void* kernel, enum cudaFuncAttribute attribute, int value) {
  CALL("cudaFuncSetAttribute", POINTER(kernel), attribute, value);
  return error;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* kernel) {
  CALL("cudaFuncGetAttributes", POINTER(kernel), 0, 0, 0);
  if (error) return error;
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = (size_t)values[1];
  attributes->maxThreadsPerBlock = (int)values[2];
  attributes->maxDynamicSharedSizeBytes = (int)values[3];
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel,
                                                                   int block_size,
                                                                   size_t shared_bytes,
                                                                   unsigned flags) {
  CALL("cudaOccupancyMaxActiveBlocksPerMultiprocessor", POINTER(kernel), block_size,
       INT(shared_bytes), flags, 0);
  if (!error) *blocks = (int)values[4];
  return error;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int block_size, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, block_size,
                                                                shared_bytes, 0);
}
