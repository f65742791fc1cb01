// The table of api.h: every call asks for a device, makes it current for its time, and turns what
// goes wrong into a sentence.
#include "halfbyte/cuda/api.h"

#include <new>

#include "adamw8/adamw8.h"
#include "device/device_guard.h"
#include "device/error.h"
#include "lora_linear/lora_linear.h"
#include "memory/arena.h"
#include "memory/paged_adamw8.h"
#include "nf4/nf4.h"

namespace halfbyte::cuda {
namespace {

constexpr int kLeastCapability = 8;  // of the machine code and PTX in this library

struct Devices {
  int count = 0;
  char why_not[512] = "";  // "" when there is a device to run on
};

int capability(int device, cudaDeviceAttr part) {
  int value = 0;
  return failed(cudaDeviceGetAttribute(&value, part, device), "cudaDeviceGetAttribute") ? 0 : value;
}

// CUDA counts versions in thousands and tens: 13000 is 13.0.
const char* driver_problem(cudaError_t error) {
  cudaGetLastError();
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();
  if (driver == 0 || error == cudaErrorNoDevice)
    return say("no %s was found (CUDA error %d: %s)",
               driver == 0 ? "NVIDIA driver" : "NVIDIA device", static_cast<int>(error),
               cudaGetErrorString(error));
  if (error == cudaErrorInsufficientDriver)
    return say("the NVIDIA driver is for CUDA %d.%d, %d.0 or later is needed (CUDA error %d)",
               driver / 1000, driver % 1000 / 10, runtime / 1000, static_cast<int>(error));
  return say("the NVIDIA driver cannot be used (CUDA error %d: %s)", static_cast<int>(error),
             cudaGetErrorString(error));
}

const char* no_capable_device(int count) {
  for (int device = 0; device < count; ++device)
    if (capability(device, cudaDevAttrComputeCapabilityMajor) >= kLeastCapability) return nullptr;
  if (count == 0) return "no NVIDIA device was found";
  return say("compute capability %d.0 or later is needed, device 0 has %d.%d", kLeastCapability,
             capability(0, cudaDevAttrComputeCapabilityMajor),
             capability(0, cudaDevAttrComputeCapabilityMinor));
}

Devices probe() {
  Devices devices;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  const char* problem = error == cudaSuccess ? no_capable_device(count) : driver_problem(error);
  if (problem) {
    snprintf(devices.why_not, sizeof(devices.why_not), "%s", problem);
  } else {
    devices.count = count;
  }
  return devices;
}

const Devices& devices() {
  static const Devices found = probe();
  return found;
}

const char* why_not() {
  return devices().why_not;
}

int device_count() {
  return devices().count;
}

// body() with `device` current; its sentence, or why it could not run.
template <class Body>
const char* on_device(int device, Body&& body) {
  if (*why_not()) return why_not();
  if (device < 0 || device >= device_count())
    return say("device: expected 0 .. %d, got %d", device_count() - 1, device);
  const DeviceGuard guard(device);
  if (guard.problem()) return guard.problem();
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return "out of host memory";
  } catch (...) {
    return "an unexpected error in the CUDA library";
  }
}

template <class Launch, const char* (*run)(const Launch&, Where)>
const char* entry(const Launch& launch, Where where) {
  return on_device(where.device, [&] { return run(launch, where); });
}

// 0 when no device can be used; the call itself will say why.
template <class Launch, int64_t (*bytes)(const Launch&, Where)>
int64_t workspace_entry(const Launch& launch, Where where) {
  int64_t result = 0;
  on_device(where.device, [&] {
    result = bytes(launch, where);
    return kOk;
  });
  return result;
}

const char* device_description(int device) {
  return on_device(device, [&]() -> const char* {
    static thread_local cudaDeviceProp properties;
    if (const char* problem =
            failed(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties"))
      return problem;
    const double gib = static_cast<double>(properties.totalGlobalMem) / (1024.0 * 1024.0 * 1024.0);
    return say("%s, compute capability %d.%d, %.1f GiB", properties.name, properties.major,
               properties.minor, gib);
  });
}

bool variant(const char* op, int row, int device, VariantRow* out) {
  const struct {
    const char* op;
    bool (*list)(int, int, VariantRow*);
  } tables[] = {{"quantize_4bit", quantize_variant},
                {"dequantize_4bit", dequantize_variant},
                {"lora_linear", lora_linear_variant},
                {"adamw8", adamw8_variant}};
  for (const auto& table : tables) {
    if (strcmp(table.op, op) != 0 || !table.list(row, device, out)) continue;
    if (*why_not()) *out = {out->name, why_not(), false};
    return true;
  }
  return false;
}

const char* create(int64_t bytes, int device, ArenaKind kind, Arena** out) {
  *out = nullptr;
  return on_device(device, [&] { return arena_create(bytes, device, kind, out); });
}

void* arena_address(const Arena* arena) {
  return arena->base;
}

ArenaKind arena_kind(const Arena* arena) {
  return arena->kind;
}

const char* prefetch(Arena* arena, int64_t begin, int64_t end, bool to_device, Where where) {
  return on_device(where.device,
                   [&] { return arena_prefetch(arena, begin, end, to_device, where); });
}

constexpr Api kApi = {
    kApiVersion,
    why_not,
    device_count,
    device_description,
    entry<QuantizeLaunch, quantize_4bit>,
    entry<DoubleQuantizeLaunch, double_quantize>,
    entry<DequantizeLaunch, dequantize_4bit>,
    workspace_entry<ForwardLaunch, lora_linear_forward_workspace>,
    workspace_entry<BackwardLaunch, lora_linear_backward_workspace>,
    entry<ForwardLaunch, lora_linear_forward>,
    entry<BackwardLaunch, lora_linear_backward>,
    variant,
    entry<AdamW8Launch, adamw8_step>,
    entry<PagedAdamW8Launch, adamw8_paged_step>,
    create,
    arena_destroy,
    arena_address,
    arena_kind,
    prefetch,
};

}  // namespace
}  // namespace halfbyte::cuda

extern "C" __attribute__((visibility("default"))) const halfbyte::cuda::Api* halfbyte_cuda_api(
    int version) {
  return version == halfbyte::cuda::kApiVersion ? &halfbyte::cuda::kApi : nullptr;
}
