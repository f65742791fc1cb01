// The CUDA library on a card, timed by CUDA events. No torch, no Python.
//
//   halfbyte_cuda_benchmarks benchmarks/shapes.csv
//
// One line a case: microseconds (the median of calls whose caches were flushed), GB/s of the bytes
// that must move, and their share of a copy's rate on the same card. What the kernels compute is
// the tests' business; here inputs are any bytes that are valid codes and finite numbers.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "halfbyte/cuda/api.h"

namespace {

using namespace halfbyte;
using namespace halfbyte::cuda;

constexpr int64_t kRank = 16, kFlushBytes = 256 << 20;
constexpr int kTurns = 30;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

void require(const char* sentence) {
  if (!*sentence) return;
  fprintf(stderr, "%s\n", sentence);
  exit(1);
}

// Device memory of one byte value: 0x3C3C is a small float16 and bfloat16, 0x3C3C3C3C a float.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int value = 0x3C) {
    require(cudaMalloc(&data_, bytes), "cudaMalloc");
    require(cudaMemset(data_, value, bytes), "cudaMemset");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// --- time ----------------------------------------------------------------------------------------

class Clock {
 public:
  Clock() : flush_(kFlushBytes) {
    require(cudaEventCreate(&start_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
    const Buffer source(kFlushBytes), target(kFlushBytes);
    const double us = microseconds([&] {
      require(cudaMemcpyAsync(target.as(), source.as(), kFlushBytes, cudaMemcpyDeviceToDevice),
              "cudaMemcpyAsync");
    });
    copy_rate_ = 2 * kFlushBytes / us;
    printf("copy %.0f GB/s\n", 1e-3 * copy_rate_);
  }
  ~Clock() {
    cudaEventDestroy(start_);
    cudaEventDestroy(end_);
  }

  void report(const std::string& name, double bytes, const std::function<void()>& call) {
    const double us = microseconds(call);
    printf("%-48s %10.2f us %8.0f GB/s %5.0f %% of a copy\n", name.c_str(), us, 1e-3 * bytes / us,
           100 * bytes / us / copy_rate_);
    fflush(stdout);
  }

 private:
  double microseconds(const std::function<void()>& call) {
    std::vector<float> taken;
    for (int turn = 0; turn < kTurns + 3; ++turn) {
      require(cudaMemsetAsync(flush_.as(), turn, kFlushBytes), "cudaMemsetAsync");
      require(cudaEventRecord(start_), "cudaEventRecord");
      call();
      require(cudaEventRecord(end_), "cudaEventRecord");
      require(cudaEventSynchronize(end_), "cudaEventSynchronize");
      float ms = 0;
      require(cudaEventElapsedTime(&ms, start_, end_), "cudaEventElapsedTime");
      if (turn >= 3) taken.push_back(ms);
    }
    std::sort(taken.begin(), taken.end());
    return 1e3 * taken[taken.size() / 2];
  }

  Buffer flush_;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
  double copy_rate_ = 0;  // bytes a microsecond
};

// --- a layer -------------------------------------------------------------------------------------

struct Layer {
  int64_t N, K;
  int64_t blocks() const { return (N * K + 63) / 64; }
  Buffer packed{(N * K + 1) / 2}, codes{blocks()}, nested{4 * ((blocks() + 255) / 256)}, offset{4};
  Buffer absmax{4 * blocks()}, dense{4 * N * K};
  Buffer lora_a{4 * kRank * K}, lora_b{4 * kRank * N};

  Layer(int64_t n, int64_t k) : N(n), K(k) {}

  Weight weight() const {
    Weight weight{};
    weight.bits.packed = packed.as<uint8_t>();
    weight.bits.absmax_codes = codes.as<uint8_t>();
    weight.bits.nested_absmax = nested.as<float>();
    weight.bits.offset = offset.as<float>();
    weight.bits.count = N * K;
    weight.bits.block_shift = 6;
    weight.codebook = CodebookId::kNf4;
    return weight;
  }
  double packed_bytes() const { return N * K / 2.0 + blocks() + blocks() / 64.0; }
};

const Where kHere = {0, nullptr};

void formats(const Api& api, Clock& clock, const Layer& layer, const std::string& shape) {
  const double count = static_cast<double>(layer.N * layer.K);
  int64_t bad = 0;
  QuantizeLaunch quantize{};
  quantize.weight = {layer.dense.as(), DType::kBFloat16};
  quantize.count = layer.N * layer.K;
  quantize.block_size = 64;
  quantize.codebook = CodebookId::kNf4;
  quantize.packed = layer.packed.as<uint8_t>();
  quantize.absmax = layer.absmax.as<float>();
  quantize.bad_index = &bad;
  clock.report(shape + " quantize bf16", 2.5 * count + count / 16,
               [&] { require(api.quantize_4bit(quantize, kHere)); });
  const DequantizeLaunch dequantize{layer.weight(), {layer.dense.as(), DType::kBFloat16}};
  clock.report(shape + " dequantize bf16", 2 * count + layer.packed_bytes(),
               [&] { require(api.dequantize_4bit(dequantize, kHere)); });
}

void linear(const Api& api, Clock& clock, const Layer& layer, const std::string& shape, int64_t M,
            int64_t R) {
  const int64_t N = layer.N, K = layer.K;
  const Buffer x(2 * M * K), y(2 * M * N), t(4 * M * kRank), d_a(4 * kRank * K), d_b(4 * kRank * N);
  const Operand a = {R ? layer.lora_a.as() : nullptr, DType::kFloat32};
  const Operand b = {R ? layer.lora_b.as() : nullptr, DType::kFloat32};
  ForwardLaunch forward{};
  forward.M = M, forward.N = N, forward.K = K, forward.R = R;
  forward.x = {x.as(), DType::kBFloat16};
  forward.weight = layer.weight();
  forward.lora_a = a, forward.lora_b = b, forward.scaling = 2.0f;
  forward.y = {y.as(), DType::kBFloat16};
  forward.t = t.as<float>();
  BackwardLaunch backward{};
  backward.M = M, backward.N = N, backward.K = K, backward.R = R;
  backward.dy = {y.as(), DType::kBFloat16};
  backward.x = {x.as(), DType::kBFloat16};
  backward.weight = layer.weight();
  backward.lora_a = a, backward.lora_b = b, backward.scaling = 2.0f;
  backward.t = t.as<float>();
  backward.dx = {x.as(), DType::kBFloat16};
  if (R) {
    backward.d_lora_a = {d_a.as(), DType::kFloat32};
    backward.d_lora_b = {d_b.as(), DType::kFloat32};
  }
  const int64_t bytes = std::max(api.lora_linear_forward_workspace(forward, kHere),
                                 api.lora_linear_backward_workspace(backward, kHere));
  const Buffer workspace(std::max<int64_t>(bytes, 1));
  forward.workspace = backward.workspace = workspace.as();

  const double moved = layer.packed_bytes() + 2.0 * M * (N + K) + 4.0 * R * (N + K);
  const std::string suffix = (R ? " LoRA" : "") + std::string(" M=") + std::to_string(M);
  clock.report(shape + " forward" + suffix, moved,
               [&] { require(api.lora_linear_forward(forward, kHere)); });
  clock.report(shape + " backward" + suffix, moved,
               [&] { require(api.lora_linear_backward(backward, kHere)); });
}

// --- AdamW ---------------------------------------------------------------------------------------

constexpr int64_t kElements = 200'000, kTensors = 200, kStateBlocks = (kElements + 255) / 256;
constexpr int64_t kStateBytes = (2 * kElements + 8 * kStateBlocks + 255) / 256 * 256;

// Tensors whose state lies one after another at `state`.
std::vector<AdamW8Tensor> tensors(const Buffer& params, const Buffer& grads, const Buffer& steps,
                                  char* state) {
  std::vector<AdamW8Tensor> made(kTensors);
  for (int64_t i = 0; i < kTensors; ++i, state += kStateBytes) {
    AdamW8Tensor& t = made[i];
    t.count = kElements;
    t.param = params.as<float>() + i * kElements;
    t.grad = grads.as<float>() + i * kElements;
    t.param_dtype = t.grad_dtype = DType::kFloat32;
    t.state = AdamW8State::kRatio;
    t.exp_avg = state;
    t.exp_avg_sq = state + kElements;
    t.exp_avg_absmax = reinterpret_cast<float*>(state + 2 * kElements);
    t.exp_avg_sq_absmax = t.exp_avg_absmax + kStateBlocks;
    t.step = steps.as<float>() + i;
  }
  return made;
}

void adamw8(const Api& api, Clock& clock) {
  const Buffer params(4 * kElements * kTensors), grads(4 * kElements * kTensors);
  const Buffer steps(4 * kTensors, 0), state(kStateBytes * kTensors, 0), bad(8);
  const AdamW8GroupLaunch group = {1e-3, 0.9, 0.999, 1e-8, 1e-2, false};
  const double moved = (12 + 2 * 2.03125) * kElements * kTensors;
  const auto launch_over = [&](const std::vector<AdamW8Tensor>& all) {
    return AdamW8Launch{all.data(), kTensors, &group, 1, bad.as<int64_t>()};
  };
  const auto own = tensors(params, grads, steps, state.as<char>());
  const AdamW8Launch launch = launch_over(own);
  clock.report("AdamW 8 bit, 40 M parameters", moved,
               [&] { require(api.adamw8_step(launch, kHere)); });
  for (const auto& [name, kind] :
       {std::pair{"managed", ArenaKind::kManaged}, std::pair{"pinned", ArenaKind::kPinned}}) {
    Arena* arena = nullptr;
    const char* problem = api.arena_create(kStateBytes * kTensors, 0, kind, &arena);
    if (*problem) {
      printf("paged AdamW, %s: %s\n", name, problem);
      continue;
    }
    char* base = static_cast<char*>(api.arena_address(arena));
    std::fill(base, base + kStateBytes * kTensors, 0);
    const auto paged = tensors(params, grads, steps, base);
    std::vector<PageRange> pages;
    constexpr int64_t kPerPage = 20;
    for (int64_t first = 0; first < kTensors; first += kPerPage)
      pages.push_back(
          {arena, first * kStateBytes, (first + kPerPage) * kStateBytes, first, kPerPage});
    const PagedAdamW8Launch step = {launch_over(paged), pages.data(),
                                    static_cast<int64_t>(pages.size()), 1, false};
    clock.report(std::string("AdamW 8 bit, paged, ") + name, moved,
                 [&] { require(api.adamw8_paged_step(step, kHere)); });
    api.arena_destroy(arena);
  }
}

struct Shape {
  std::string name;
  int64_t N, K;
};

std::vector<Shape> read_shapes(const char* path) {
  std::ifstream file(path);
  std::vector<Shape> shapes;
  std::string line;
  std::getline(file, line);  // name,N,K
  while (std::getline(file, line)) {
    std::replace(line.begin(), line.end(), ',', ' ');
    std::istringstream words(line);
    Shape shape;
    if (words >> shape.name >> shape.N >> shape.K) shapes.push_back(shape);
  }
  return shapes;
}

}  // namespace

int main(int count, char** arguments) {
  const Api* api = halfbyte_cuda_api(kApiVersion);
  if (*api->why_not()) {
    fprintf(stderr, "no CUDA card: %s\n", api->why_not());
    return 2;
  }
  const std::vector<Shape> shapes = read_shapes(count > 1 ? arguments[1] : "benchmarks/shapes.csv");
  if (shapes.empty()) {
    fprintf(stderr, "usage: halfbyte_cuda_benchmarks benchmarks/shapes.csv\n");
    return 1;
  }
  printf("%s\n", api->device_description(0));
  Clock clock;
  for (const Shape& shape : shapes) {
    const Layer layer(shape.N, shape.K);
    formats(*api, clock, layer, shape.name);
    for (int64_t M = 1; M <= 4096; M *= M < 16 ? 4 : 2)
      for (const int64_t R : {int64_t{0}, kRank}) linear(*api, clock, layer, shape.name, M, R);
  }
  adamw8(*api, clock);
  return 0;
}
