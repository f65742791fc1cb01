// The cases, an operation each. A case builds its call twice from one seed, runs one as it comes
// and one on the reference variant, and compares.
#include "native_fuzz.h"

#include <functional>

#include "choices.h"
#include "halfbyte/adamw8.h"
#include "halfbyte/lora_linear.h"
#include "halfbyte/nf4.h"

namespace halfbyte::fuzz {
namespace {

using test::Buffer;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

void fill(Buffer& buffer, Choices& choices, DType dtype) {
  if (dtype == DType::kUInt8) {
    for (int64_t i = 0; i < buffer.bytes(); ++i)
      buffer.data()[i] = static_cast<uint8_t>(choices.bits());
  } else {
    buffer.fill_normal(choices.bits());
  }
}

// Buffers of a call; they live as long as it.
class Memory {
 public:
  explicit Memory(Choices& choices) : choices_(choices) {}

  Buffer& make(int64_t count, DType dtype) {
    buffers_.push_back(std::make_unique<Buffer>(count, dtype, choices_.below(3)));
    return *buffers_.back();
  }
  Buffer& filled(int64_t count, DType dtype) {
    Buffer& buffer = make(count, dtype);
    fill(buffer, choices_, dtype);
    return buffer;
  }
  bool guards_hold() {
    bool hold = true;
    for (const auto& buffer : buffers_) hold = buffer->guards_hold() && hold;
    return hold;
  }

 private:
  Choices& choices_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

std::vector<double> values_of(Buffer& buffer) {
  std::vector<double> values(static_cast<size_t>(buffer.count()));
  for (int64_t i = 0; i < buffer.count(); ++i) values[static_cast<size_t>(i)] = buffer.get(i);
  return values;
}

// Something wrong with one of `views` or `integers`, about every second time.
void spoil(Choices& choices, std::vector<TensorView*> views, std::vector<int64_t*> integers) {
  if (choices.one_in(2)) return;
  const int64_t at = choices.below(static_cast<int64_t>(views.size() + integers.size()));
  if (at < static_cast<int64_t>(views.size())) {
    choices.spoil(*views[static_cast<size_t>(at)]);
  } else {
    *integers[static_cast<size_t>(at) - views.size()] = choices.hostile_integer();
  }
}

// Runs `call`, and notes what it threw. Anything but an `Error` is the caller's to see.
template <class Call>
bool succeeds(Call call, Outcome& outcome) {
  try {
    call();
    return true;
  } catch (const Error& error) {
    outcome.error = error.what();
    return false;
  }
}

CodebookId any_codebook(Choices& choices) {
  return static_cast<CodebookId>(choices.below(3));
}

// --- quantize, double quantize, dequantize
// --------------------------------------------------------

Outcome quantize_case(uint64_t seed) {
  Choices choices(seed);
  Memory memory(choices);
  const int64_t count = choices.one_in(20) ? choices.below(200000) : choices.below(5000);
  QuantizeParams p;
  p.block_size = choices.block_size();
  p.codebook = any_codebook(choices);
  p.threads = choices.threads();
  Buffer& weight = memory.filled(count, choices.any_float());
  if (count && choices.one_in(8))
    weight.put(choices.below(count), choices.one_in(2) ? NAN : -INFINITY);
  Buffer& packed = memory.make(ceil_div(count, 2), DType::kUInt8);
  Buffer& absmax = memory.make(ceil_div(count, p.block_size), DType::kFloat32);
  p.weight = weight.view();
  p.packed = packed.view();
  p.absmax = absmax.view();
  spoil(choices, {&p.weight, &p.packed, &p.absmax}, {&p.block_size});
  Outcome outcome;
  if (succeeds([&] { quantize_4bit(p); }, outcome))
    outcome.bytes = {packed.contents(), absmax.contents()};
  outcome.guards_hold = memory.guards_hold();
  return outcome;
}

Outcome double_quantize_case(uint64_t seed) {
  Choices choices(seed);
  Memory memory(choices);
  const int64_t blocks = choices.below(1200);
  DoubleQuantizeParams p;
  p.threads = choices.threads();
  Buffer& absmax = memory.filled(blocks, DType::kFloat32);
  Buffer& offset = memory.filled(1, DType::kFloat32);
  if (choices.one_in(8)) offset.put(0, static_cast<float>(choices.hostile_number()));
  if (blocks && choices.one_in(8))
    absmax.put(choices.below(blocks), static_cast<float>(choices.hostile_number()));
  Buffer& codes = memory.make(blocks, DType::kUInt8);
  Buffer& nested = memory.make(ceil_div(blocks, 256), DType::kFloat32);
  p.absmax = absmax.view();
  p.offset = offset.view();
  p.codes = codes.view();
  p.nested_absmax = nested.view();
  spoil(choices, {&p.absmax, &p.offset, &p.codes, &p.nested_absmax}, {});
  Outcome outcome;
  if (succeeds([&] { double_quantize(p); }, outcome))
    outcome.bytes = {codes.contents(), nested.contents()};
  outcome.guards_hold = memory.guards_hold();
  return outcome;
}

// A packed weight of `count` elements; scales of about `scale`.
QuantizedView any_weight(Choices& choices, Memory& memory, int64_t count, float scale) {
  QuantizedView w;
  w.block_size = choices.block_size();
  w.codebook = any_codebook(choices);
  const int64_t blocks = ceil_div(count, w.block_size);
  w.packed = memory.filled(ceil_div(count, 2), DType::kUInt8).view();
  if (choices.one_in(4)) w.packed.shape = {w.packed.shape[0], 1};
  const auto scales = [&](int64_t n) {
    Buffer& buffer = memory.make(n, DType::kFloat32);
    for (int64_t i = 0; i < n; ++i) buffer.put(i, scale * static_cast<float>(1 + i % 5));
    return buffer.view();
  };
  if (choices.one_in(2)) {
    w.absmax = scales(blocks);
  } else {
    w.absmax = memory.filled(blocks, DType::kUInt8).view();
    w.nested_absmax = scales(ceil_div(blocks, 256));
    w.offset = scales(1);
    if (choices.one_in(3)) w.nested_map = memory.filled(256, DType::kFloat32).view();
  }
  if (choices.one_in(3)) w.levels = memory.filled(16, DType::kFloat32).view();
  return w;
}

std::vector<TensorView*> views_of(QuantizedView& w) {
  return {&w.packed, &w.absmax, &w.nested_absmax, &w.offset, &w.levels, &w.nested_map};
}

Outcome dequantize_case(uint64_t seed) {
  Choices choices(seed);
  Memory memory(choices);
  const int64_t count = choices.one_in(20) ? choices.below(200000) : choices.below(5000);
  DequantizeParams p;
  p.threads = choices.threads();
  p.weight = any_weight(choices, memory, count, 0.5f);
  Buffer& out = memory.make(count, choices.any_float());
  p.out = out.view();
  std::vector<TensorView*> views = views_of(p.weight);
  views.push_back(&p.out);
  spoil(choices, views, {&p.weight.block_size});
  Outcome outcome;
  if (succeeds([&] { dequantize_4bit(p); }, outcome)) outcome.bytes = {out.contents()};
  outcome.guards_hold = memory.guards_hold();
  return outcome;
}

// --- the LoRA linear
// ------------------------------------------------------------------------------

struct Sizes {
  int64_t M, N, K, R;
  DType dtype;
};

Sizes any_sizes(Choices& choices) {
  Sizes s{choices.extent(), choices.extent(), choices.extent(), 0, choices.any_float()};
  if (choices.one_in(3)) s.M = choices.below(9);
  if (!choices.one_in(3)) s.R = 1 + choices.below(choices.one_in(4) ? 80 : 9);
  return s;
}

// Sums of values of any size come near infinity, on one side of it or the other.
bool comparable(const Choices& choices, double scaling) {
  return !choices.reinterpreted() && std::fabs(scaling) <= 10;
}

float weight_scale(const Sizes& s) {
  return 0.3f / std::sqrt(static_cast<float>(std::max<int64_t>(1, std::max(s.N, s.K))));
}

template <class Params>
void any_adapter(Choices& choices, Memory& memory, const Sizes& s, Params& p) {
  if (s.R) {
    Buffer& a = memory.make(s.R * s.K, choices.any_float());
    Buffer& b = memory.make(s.N * s.R, choices.any_float());
    a.fill_normal(choices.bits(), 0.1f);
    b.fill_normal(choices.bits(), 0.1f);
    p.lora_a = a.view({s.R, s.K});
    p.lora_b = b.view({s.N, s.R});
  }
  Buffer& seed = memory.make(1, DType::kInt64);
  *seed.as<int64_t>() = static_cast<int64_t>(choices.bits());
  p.seed = seed.view();
  p.scaling = choices.one_in(10) ? choices.hostile_number() : 1.5;
  constexpr double kDropouts[] = {0, 0, 0.1, 0.5, 1};
  p.dropout = choices.one_in(10) ? choices.hostile_number() : choices.of(kDropouts);
  p.threads = choices.threads();
}

Outcome forward_case(uint64_t seed) {
  Choices choices(seed);
  Memory memory(choices);
  const Sizes s = any_sizes(choices);
  LoraLinearParams p;
  p.x = memory.filled(s.M * s.K, s.dtype).view({s.M, s.K});
  p.weight = any_weight(choices, memory, s.N * s.K, weight_scale(s));
  p.out_features = s.N;
  if (choices.one_in(2)) p.bias = memory.filled(s.N, choices.any_float()).view();
  any_adapter(choices, memory, s, p);
  Buffer& y = memory.make(s.M * s.N, s.dtype);
  Buffer& t = memory.make(s.M * s.R, DType::kFloat32);
  p.y = y.view({s.M, s.N});
  if (s.R && !choices.one_in(3)) p.t = t.view({s.M, s.R});
  std::vector<TensorView*> views = views_of(p.weight);
  views.insert(views.end(), {&p.x, &p.bias, &p.lora_a, &p.lora_b, &p.seed, &p.y, &p.t});
  spoil(choices, views, {&p.weight.block_size, &p.out_features});
  Outcome outcome;
  if (succeeds([&] { lora_linear_forward(p); }, outcome) && comparable(choices, p.scaling))
    outcome.values = {values_of(y), values_of(t)};
  outcome.guards_hold = memory.guards_hold();
  return outcome;
}

Outcome backward_case(uint64_t seed) {
  Choices choices(seed);
  Memory memory(choices);
  const Sizes s = any_sizes(choices);
  LoraLinearBackwardParams p;
  p.dy = memory.filled(s.M * s.N, s.dtype).view({s.M, s.N});
  p.x = memory.filled(s.M * s.K, s.dtype).view({s.M, s.K});
  p.weight = any_weight(choices, memory, s.N * s.K, weight_scale(s));
  p.in_features = s.K;
  any_adapter(choices, memory, s, p);
  p.t = memory.filled(s.M * s.R, DType::kFloat32).view({s.M, s.R});
  Buffer& dx = memory.make(s.M * s.K, s.dtype);
  Buffer& da = memory.make(s.R * s.K, choices.any_float());
  Buffer& db = memory.make(s.N * s.R, choices.any_float());
  Buffer& dbias = memory.make(s.N, choices.any_float());
  if (!choices.one_in(4)) p.dx = dx.view({s.M, s.K});
  if (s.R && !choices.one_in(4)) p.d_lora_a = da.view({s.R, s.K});
  if (s.R && !choices.one_in(4)) p.d_lora_b = db.view({s.N, s.R});
  if (choices.one_in(2)) p.d_bias = dbias.view();
  std::vector<TensorView*> views = views_of(p.weight);
  views.insert(views.end(), {&p.dy, &p.x, &p.lora_a, &p.lora_b, &p.t, &p.seed, &p.dx, &p.d_lora_a,
                             &p.d_lora_b, &p.d_bias});
  spoil(choices, views, {&p.weight.block_size, &p.in_features});
  Outcome outcome;
  if (succeeds([&] { lora_linear_backward(p); }, outcome) && comparable(choices, p.scaling))
    outcome.values = {values_of(dx), values_of(da), values_of(db), values_of(dbias)};
  outcome.guards_hold = memory.guards_hold();
  return outcome;
}

// --- 8-bit AdamW
// ----------------------------------------------------------------------------------

AdamW8Tensor any_adamw8_tensor(Choices& choices, Memory& memory, std::vector<Buffer*>& changed) {
  AdamW8Tensor t;
  t.count = choices.one_in(10) ? choices.below(70000) : choices.below(1500);
  t.param_dtype = choices.any_float();
  t.grad_dtype = choices.one_in(2) ? DType::kFloat32 : t.param_dtype;
  t.state = static_cast<AdamW8State>(choices.below(3));
  const bool coded = t.state != AdamW8State::kFloat32;
  const int64_t blocks = ceil_div(t.count, kAdamW8Block);
  const DType moment = coded ? DType::kUInt8 : DType::kFloat32;
  Buffer& grad = memory.filled(t.count, t.grad_dtype);
  if (t.count && choices.one_in(10)) grad.put(choices.below(t.count), INFINITY);
  Buffer& param = memory.filled(t.count, t.param_dtype);
  Buffer& m = memory.filled(t.count, moment);
  Buffer& v = memory.filled(t.count, moment);
  if (!coded)
    for (int64_t i = 0; i < t.count; ++i) v.put(i, static_cast<float>(std::fabs(v.get(i))));
  Buffer& step = memory.make(1, DType::kFloat32);
  step.put(0, static_cast<float>(choices.one_in(10) ? choices.hostile_number() : 3));
  changed.insert(changed.end(), {&param, &m, &v, &step});
  t.param = param.data();
  t.grad = grad.data();
  t.exp_avg = m.data();
  t.exp_avg_sq = v.data();
  t.step = step.as<float>();
  if (!coded) return t;
  for (float** scales : {&t.exp_avg_absmax, &t.exp_avg_sq_absmax}) {
    Buffer& buffer = memory.make(blocks, DType::kFloat32);
    for (int64_t i = 0; i < blocks; ++i) buffer.put(i, 0.25f * static_cast<float>(i % 4));
    *scales = buffer.as<float>();
    changed.push_back(&buffer);
  }
  return t;
}

void spoil(Choices& choices, AdamW8Tensor& t) {
  constexpr int64_t kCounts[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 2};
  switch (choices.below(10)) {
    case 0:
      t.count = choices.of(kCounts);
      break;
    case 1:
      t.group = choices.hostile_integer();
      break;
    case 2:
      t.param = nullptr;
      break;
    case 3:
      t.grad = nullptr;
      break;
    case 4:
      t.exp_avg = nullptr;
      break;
    case 5:
      t.exp_avg_sq_absmax = nullptr;
      break;
    case 6:
      t.step = nullptr;
      break;
    case 7:
      t.param_dtype = DType::kUInt8;
      break;
    case 8:
      t.grad_dtype = DType::kInt64;
      break;
    default:
      t.exp_avg_absmax = nullptr;
  }
}

Outcome adamw8_case(uint64_t seed) {
  Choices choices(seed);
  Memory memory(choices);
  AdamW8Params p;
  AdamW8Group group;
  group.maximize = choices.one_in(2);
  for (double* number : {&group.lr, &group.beta1, &group.beta2, &group.eps, &group.weight_decay})
    if (choices.one_in(40)) *number = choices.hostile_number();
  p.groups = {group};
  p.threads = choices.threads();
  std::vector<Buffer*> changed;
  const int64_t tensors = choices.below(5);
  for (int64_t i = 0; i < tensors; ++i)
    p.tensors.push_back(any_adamw8_tensor(choices, memory, changed));
  if (tensors && choices.one_in(3)) spoil(choices, p.tensors[choices.below(tensors)]);
  AdamW8Result result;
  Outcome outcome;
  succeeds([&] { result = adamw8_step(p); }, outcome);
  for (Buffer* buffer : changed) outcome.bytes.push_back(buffer->contents());
  outcome.values = {{static_cast<double>(result.tensor), static_cast<double>(result.index)}};
  outcome.guards_hold = memory.guards_hold();
  return outcome;
}

struct Operation {
  const char* name;
  Outcome (*run)(uint64_t seed);
};

constexpr Operation kOperations[] = {
    {"quantize_4bit", quantize_case},        {"double_quantize", double_quantize_case},
    {"dequantize_4bit", dequantize_case},    {"lora_linear_forward", forward_case},
    {"lora_linear_backward", backward_case}, {"adamw8_step", adamw8_case},
};

// bf16 factors where the processor multiplies those, and the rounding of 16-bit outputs; what sums
// may differ by exactly is held by the operations' own tests.
constexpr double kTolerance = 0.06;

}  // namespace

std::string run_case(uint64_t seed) {
  const Operation& operation = kOperations[seed % std::size(kOperations)];
  const Outcome got = operation.run(seed);
  const test::Forced forced("reference");
  const std::string problem = compare(got, operation.run(seed), kTolerance);
  return problem.empty() ? "" : concat(operation.name, ", seed ", seed, ": ", problem);
}

}  // namespace halfbyte::fuzz
