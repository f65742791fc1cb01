// Host code for the tests of the fake runtime: launches, managed memory, streams, device queries.
#include <cuda_runtime.h>

__constant__ float kOffset[4];

namespace {

struct Scaled {
  const float* x;
  float* y;
  double factor;
  int count;
};

template <int kIndex>
__global__ void scale(Scaled p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) p.y[i] = p.x[i] * static_cast<float>(p.factor) + kOffset[kIndex];
}

__global__ void sum_in_shared(const float* x, float* y) {
  extern __shared__ float values[];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < static_cast<int>(blockDim.x); ++i) sum += values[i];
  *y = sum;
}

}  // namespace

extern "C" {

int scale_all(const float* x, float* y, int count, cudaStream_t stream) {
  const float offsets[4] = {1, 2, 3, 4};
  cudaError_t error =
      cudaMemcpyToSymbolAsync(kOffset, offsets, sizeof offsets, 0, cudaMemcpyHostToDevice, stream);
  if (error != cudaSuccess) return error;
  scale<2><<<(count + 127) / 128, 128, 0, stream>>>(Scaled{x, y, 2.0, count});
  return cudaGetLastError();
}

int sum_shared(const float* x, float* y, int threads, int bytes, int opt_in) {
  if (opt_in) {
    const cudaError_t error =
        cudaFuncSetAttribute(sum_in_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  sum_in_shared<<<1, threads, bytes>>>(x, y);
  return cudaGetLastError();
}

int allocate_managed(size_t bytes, void** pointer, cudaStream_t stream) {
  cudaError_t error = cudaMallocManaged(pointer, bytes);
  if (error != cudaSuccess) return error;
  const cudaMemLocation host{cudaMemLocationTypeHost, 0}, device{cudaMemLocationTypeDevice, 0};
  error = cudaMemAdvise(*pointer, bytes, cudaMemAdviseSetPreferredLocation, host);
  if (error != cudaSuccess) return error;
  return cudaMemPrefetchAsync(*pointer, bytes, device, 0, stream);
}

int prefetch(void* pointer, size_t bytes) {
  const cudaMemLocation device{cudaMemLocationTypeDevice, 0};
  return cudaMemPrefetchAsync(pointer, bytes, device, 0, nullptr);
}

int release(void* pointer) {
  return cudaFree(pointer);
}

int copy_through_device(const void* from, void* to, size_t bytes) {
  void* device = nullptr;
  cudaStream_t stream;
  cudaEvent_t event;
  if (const int error = cudaStreamCreate(&stream)) return error;
  if (const int error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming)) return error;
  if (const int error = cudaMallocAsync(&device, bytes, stream)) return error;
  cudaMemcpyAsync(device, from, bytes, cudaMemcpyHostToDevice, stream);
  cudaEventRecord(event, stream);
  cudaStreamWaitEvent(nullptr, event, 0);
  cudaMemcpyAsync(to, device, bytes, cudaMemcpyDeviceToHost, nullptr);
  cudaFreeAsync(device, stream);
  cudaEventDestroy(event);
  cudaStreamSynchronize(stream);
  return cudaStreamDestroy(stream);
}

int describe(int* count, int* major, int* shared, int* blocks) {
  cudaDeviceProp properties;
  if (const int error = cudaGetDeviceCount(count)) return error;
  if (const int error = cudaGetDeviceProperties(&properties, 0)) return error;
  *major = properties.major;
  *shared = static_cast<int>(properties.sharedMemPerBlockOptin);
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, sum_in_shared, 256, 40 << 10);
}

const char* last_error_name() {
  return cudaGetErrorName(cudaGetLastError());
}

}  // extern "C"
