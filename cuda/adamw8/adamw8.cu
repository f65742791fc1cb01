// Cuts a step over any number of tensors into batches, each one launch.
//
// A batch closes when it is full: 800 gradients to look at, 380 tensors or 45 groups to update,
// 4,000 step counters. Empty tensors take no entry; their step is counted.
#include "adamw8/adamw8.h"

#include "adamw8/adamw8_impl.h"
#include "device/elements.cuh"
#include "device/launch.h"
#include "device/variant.h"

namespace halfbyte::cuda {
namespace {

struct UpdateLaunch {
  const AdamW8Launch* launch;
  const AdamW8Tensor* tensors;
  int64_t count;
};

unsigned long long* bad_of(const AdamW8Launch& launch) {
  return reinterpret_cast<unsigned long long*>(launch.bad);
}

cudaStream_t stream_of(Where where) {
  return static_cast<cudaStream_t>(where.stream);
}

// Eight elements of each array start at multiples of 16 bytes, of codes at multiples of 8.
bool fits_vectors(const AdamW8Tensor& t) {
  const uintptr_t moments = t.state == AdamW8State::kFloat32 ? 16 : 8;
  return is_aligned(t.param, 16) && is_aligned(t.grad, 16) && is_aligned(t.exp_avg, moments) &&
         is_aligned(t.exp_avg_sq, moments);
}

UpdateEntry make_entry(const AdamW8Tensor& t, int group) {
  UpdateEntry entry{};
  entry.param = t.param;
  entry.grad = t.grad;
  entry.exp_avg = t.exp_avg;
  entry.exp_avg_sq = t.exp_avg_sq;
  entry.exp_avg_absmax = t.exp_avg_absmax;
  entry.exp_avg_sq_absmax = t.exp_avg_sq_absmax;
  entry.step = t.step;
  entry.count = t.count;
  entry.param_dtype = static_cast<uint8_t>(t.param_dtype);
  entry.grad_dtype = static_cast<uint8_t>(t.grad_dtype);
  entry.state = static_cast<uint8_t>(t.state);
  entry.aligned = fits_vectors(t);
  entry.group = group;
  return entry;
}

// The hyperparameters that a batch holds so far, by their row in the launch.
class BatchGroups {
 public:
  // The row's place in the batch, -1 when there is no room left.
  int place(UpdateBatch& batch, const AdamW8GroupLaunch* groups, int64_t row) {
    for (int i = count_ - 1; i >= 0; --i)
      if (rows_[i] == row) return i;
    if (count_ == UpdateBatch::kGroups) return -1;
    rows_[count_] = row;
    batch.groups[count_] = groups[row];
    return count_++;
  }
  void clear() { count_ = 0; }

 private:
  int64_t rows_[UpdateBatch::kGroups];
  int count_ = 0;
};

const char* update_sm80(const UpdateLaunch& update, Where where) {
  UpdateBatch batch;
  batch.bad = bad_of(*update.launch);
  batch.tensors = 0;
  batch.first_block[0] = 0;
  BatchGroups groups;
  const auto flush = [&] {
    const char* problem = batch.tensors ? launch_update_sm80(batch, stream_of(where)) : kOk;
    batch.tensors = 0;
    groups.clear();
    return problem;
  };
  for (int64_t i = 0; i < update.count; ++i) {
    const AdamW8Tensor& t = update.tensors[i];
    if (t.count == 0) continue;
    int group = groups.place(batch, update.launch->groups, t.group);
    if (batch.tensors == UpdateBatch::kTensors || group < 0) {
      const char* problem = flush();
      if (*problem) return problem;
      group = groups.place(batch, update.launch->groups, t.group);
    }
    const int64_t blocks = ceil_div(t.count, kAdamW8Block);
    batch.entries[batch.tensors] = make_entry(t, group);
    batch.first_block[batch.tensors + 1] = batch.first_block[batch.tensors] + blocks;
    ++batch.tensors;
  }
  return flush();
}

const Variant<UpdateLaunch> kAdamW8Table[] = {
    {"sm80", always, update_sm80},
};

}  // namespace

const char* adamw8_check_gradients(const AdamW8Launch& launch, Where where) {
  const char* problem = launch_clear_bad(bad_of(launch), stream_of(where));
  GradientBatch batch;
  batch.bad = bad_of(launch);
  batch.tensors = 0;
  batch.first_piece[0] = 0;
  for (int64_t i = 0; i < launch.tensor_count && !*problem; ++i) {
    const AdamW8Tensor& t = launch.tensors[i];
    if (t.count == 0) continue;
    batch.entries[batch.tensors] = {t.grad, t.count, i, t.grad_dtype, is_aligned(t.grad, 16)};
    batch.first_piece[batch.tensors + 1] =
        batch.first_piece[batch.tensors] + ceil_div(t.count, kGradientPiece);
    if (++batch.tensors < GradientBatch::kTensors) continue;
    problem = launch_check_gradients(batch, stream_of(where));
    batch.tensors = 0;
  }
  if (!*problem && batch.tensors) problem = launch_check_gradients(batch, stream_of(where));
  return problem;
}

const char* adamw8_update(const AdamW8Launch& launch, const AdamW8Tensor* tensors, int64_t count,
                          Where where) {
  return run_selected("adamw8", kAdamW8Table, UpdateLaunch{&launch, tensors, count}, where);
}

const char* adamw8_count_step(const AdamW8Launch& launch, Where where) {
  const char* problem = kOk;
  StepBatch batch;
  batch.bad = bad_of(launch);
  for (int64_t begin = 0; begin < launch.tensor_count && !*problem; begin += StepBatch::kTensors) {
    const int64_t left = launch.tensor_count - begin;
    batch.tensors = left < StepBatch::kTensors ? left : StepBatch::kTensors;
    for (int64_t i = 0; i < batch.tensors; ++i) batch.steps[i] = launch.tensors[begin + i].step;
    problem = launch_count_step(batch, stream_of(where));
  }
  return problem;
}

const char* adamw8_step(const AdamW8Launch& launch, Where where) {
  const char* problem = adamw8_check_gradients(launch, where);
  if (!*problem) problem = adamw8_update(launch, launch.tensors, launch.tensor_count, where);
  if (!*problem) problem = adamw8_count_step(launch, where);
  return problem;
}

bool adamw8_variant(int row, int, VariantRow* out) {
  return list_row("adamw8", kAdamW8Table, UpdateLaunch{}, row, out);
}

}  // namespace halfbyte::cuda
