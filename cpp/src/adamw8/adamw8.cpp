// Checks, rounded scalars, hand-out of blocks to threads, and the variant table of 8-bit AdamW.
//
// The blocks of all tensors form one list, cut into tasks of 64 blocks: hundreds of small matrices
// cost what one large one costs. Blocks do not depend on each other, so results are the same for
// any thread count.
#include "halfbyte/adamw8.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>

#include "adamw8_cuda.h"
#include "adamw8_impl.h"
#include "support/cpu_features.h"
#include "support/parallel.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

constexpr int64_t kBlocksPerTask = 64;
constexpr int64_t kMostElements = INT64_MAX / 8;
constexpr float kMostSteps = 0x1p60f;  // what a stored count means at most: it must fit int64

struct AdamW8Run {
  const AdamW8Params* params = nullptr;
  std::vector<AdamW8Scalars> scalars;  // one a tensor
  std::vector<int64_t> first_block;    // running sum of blocks, tensors + 1 entries
  AdamW8Result* result = nullptr;
};

void check_group(const AdamW8Group& group, size_t i) {
  HALFBYTE_CHECK(std::isfinite(group.lr) && group.lr >= 0, "group ", i,
                 ": lr: expected a finite number >= 0, got ", group.lr);
  HALFBYTE_CHECK(group.beta1 >= 0 && group.beta1 < 1, "group ", i,
                 ": beta1: expected 0 <= beta1 < 1, got ", group.beta1);
  HALFBYTE_CHECK(group.beta2 >= 0 && group.beta2 < 1, "group ", i,
                 ": beta2: expected 0 <= beta2 < 1, got ", group.beta2);
  HALFBYTE_CHECK(std::isfinite(group.eps) && group.eps >= 0, "group ", i,
                 ": eps: expected a finite number >= 0, got ", group.eps);
  HALFBYTE_CHECK(std::isfinite(group.weight_decay) && group.weight_decay >= 0, "group ", i,
                 ": weight_decay: expected a finite number >= 0, got ", group.weight_decay);
}

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

void check_adamw8_tensor(const AdamW8Tensor& t, size_t i, size_t groups, const Place& place) {
  HALFBYTE_CHECK(t.count >= 0 && t.count <= kMostElements, "tensor ", i, ": count: expected 0 to ",
                 kMostElements, ", got ", t.count);
  HALFBYTE_CHECK(t.group >= 0 && t.group < static_cast<int64_t>(groups), "tensor ", i,
                 ": group: expected 0 .. ", groups - 1, ", got ", t.group);
  HALFBYTE_CHECK(is_float(t.param_dtype), "tensor ", i,
                 ": param: expected float32, bfloat16 or float16, got ", dtype_name(t.param_dtype));
  HALFBYTE_CHECK(t.grad_dtype == t.param_dtype || t.grad_dtype == DType::kFloat32, "tensor ", i,
                 ": grad: expected ", dtype_name(t.param_dtype), " or float32, got ",
                 dtype_name(t.grad_dtype));
  HALFBYTE_CHECK(t.step != nullptr && (place.is_cuda() || (*t.step >= 0 && std::isfinite(*t.step))),
                 "tensor ", i, ": step: expected a finite count >= 0");
  if (t.count == 0) return;
  HALFBYTE_CHECK(t.param && t.grad && t.exp_avg && t.exp_avg_sq, "tensor ", i,
                 ": param, grad, exp_avg and exp_avg_sq must all be given");
  const bool coded = t.state != AdamW8State::kFloat32;
  HALFBYTE_CHECK(
      (t.exp_avg_absmax != nullptr) == coded && (t.exp_avg_sq_absmax != nullptr) == coded,
      "tensor ", i, ": absmax: expected ",
      coded ? "both, for 8-bit state" : "none, for float32 state");
}

AdamW8Scalars scalars_of(const AdamW8Group& group, float steps_done) {
  return adamw8_scalars(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay,
                        group.maximize, static_cast<int64_t>(std::min(steps_done, kMostSteps)) + 1);
}

AdamW8Run prepare(const AdamW8Params& params, AdamW8Result* result) {
  AdamW8Run run;
  run.params = &params;
  run.result = result;
  const size_t count = params.tensors.size();
  run.scalars.reserve(count);
  run.first_block.assign(1, 0);
  run.first_block.reserve(count + 1);
  for (size_t i = 0; i < count; ++i) {
    const AdamW8Tensor& t = params.tensors[i];
    const AdamW8Tensor* previous = i ? &params.tensors[i - 1] : nullptr;
    if (previous && previous->group == t.group && *previous->step == *t.step) {
      run.scalars.push_back(run.scalars.back());
    } else {
      run.scalars.push_back(scalars_of(params.groups[t.group], *t.step));
    }
    run.first_block.push_back(run.first_block.back() + ceil_div(t.count, kAdamW8Block));
  }
  return run;
}

// Calls body(tensor, first, last) for the parts of the block list that task `task` owns.
template <class Body>
void for_parts(const AdamW8Run& run, int64_t task, Body&& body) {
  const std::vector<int64_t>& first_block = run.first_block;
  int64_t at = task * kBlocksPerTask;
  const int64_t end = std::min(at + kBlocksPerTask, first_block.back());
  size_t tensor =
      std::upper_bound(first_block.begin(), first_block.end(), at) - first_block.begin() - 1;
  for (; at < end; ++tensor) {
    const int64_t last = std::min(end, first_block[tensor + 1]);
    if (last > at) body(tensor, at - first_block[tensor], last - first_block[tensor]);
    at = std::max(at, last);
  }
}

int64_t task_count(const AdamW8Run& run) {
  return ceil_div(run.first_block.back(), kBlocksPerTask);
}

// Round to nearest, subnormals kept, whatever the calling thread had set; its setting returns.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

bool all_gradients_finite(const AdamW8Run& run, AdamW8Finite finite) {
  std::atomic<bool> good{true};
  parallel_for(task_count(run), run.params->threads, [&](int64_t task) {
    for_parts(run, task, [&](size_t tensor, int64_t first, int64_t last) {
      const AdamW8Tensor& t = run.params->tensors[tensor];
      const int64_t begin = first * kAdamW8Block;
      const int64_t count = std::min(last * kAdamW8Block, t.count) - begin;
      const char* grad = static_cast<const char*>(t.grad) + begin * dtype_size(t.grad_dtype);
      if (!finite(grad, t.grad_dtype, count)) good = false;
    });
  });
  return good;
}

AdamW8Result find_nonfinite(const AdamW8Params& params) {
  for (size_t i = 0; i < params.tensors.size(); ++i) {
    const AdamW8Tensor& t = params.tensors[i];
    for (int64_t j = 0; j < t.count; ++j)
      if (!std::isfinite(load_element(t.grad, t.grad_dtype, j)))
        return {static_cast<int64_t>(i), j};
  }
  return {};
}

template <AdamW8Finite finite, AdamW8Update update>
void run_step(const AdamW8Run& run) {
  const AdamW8Params& params = *run.params;
  if (!all_gradients_finite(run, finite)) {
    *run.result = find_nonfinite(params);
    return;
  }
  const AdamW8Tables& tables = adamw8_tables();
  const int64_t tasks = task_count(run);
  parallel_for(tasks, params.threads, [&](int64_t task) {
    const DefaultFloatEnvironment environment;
    // From the end: the gradients looked at last are still in cache.
    for_parts(run, tasks - 1 - task, [&](size_t tensor, int64_t first, int64_t last) {
      update({&params.tensors[tensor], &run.scalars[tensor], &tables, first, last});
    });
  });
  for (const AdamW8Tensor& t : params.tensors) *t.step += 1;
}

// Named after the build rule of its file; VBMI is what it uses, BF16 comes with the flags.
std::string needs_vbmi(const AdamW8Run&) {
  const CpuFeatures& cpu = cpu_features();
  return cpu.avx512_bf16 && cpu.avx512_vbmi ? "" : "needs AVX-512 VBMI and BF16";
}

const Variant<AdamW8Run> kAdamW8Table[] = {
#if defined(__x86_64__)
    {"avx512bf16", needs_vbmi, run_step<adamw8_finite_avx512bf16, adamw8_update_avx512bf16>},
    {"avx512", needs_avx512, run_step<adamw8_finite_avx512, adamw8_update_avx512>},
    {"avx2", needs_avx2, run_step<adamw8_finite_avx2, adamw8_update_avx2>},
#endif
    {"reference", always, run_step<adamw8_finite_reference, adamw8_update_reference>},
};

}  // namespace

void check_adamw8(const AdamW8Params& params) {
  for (size_t i = 0; i < params.groups.size(); ++i) check_group(params.groups[i], i);
  for (size_t i = 0; i < params.tensors.size(); ++i)
    check_adamw8_tensor(params.tensors[i], i, params.groups.size(), params.place);
}

AdamW8Result adamw8_step(const AdamW8Params& params) {
  AdamW8Result result;
  check_adamw8(params);
  if (params.place.is_cuda()) {
    adamw8_step_cuda(params);
    return result;
  }
  const AdamW8Run run = prepare(params, &result);
  select_variant("adamw8", kAdamW8Table, run).run(run);
  return result;
}

std::vector<VariantStatus> adamw8_variants() {
  return list_variants("adamw8", kAdamW8Table, AdamW8Run{});
}

}  // namespace halfbyte
