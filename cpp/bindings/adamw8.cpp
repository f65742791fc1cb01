// 8-bit AdamW for Python. A step over hundreds of tensors must not build hundreds of views, so the
// tensors come as one table of int64: a row a tensor, the columns of `Column`, in this order.
#include "views.h"

#include "halfbyte/adamw8.h"

namespace py = pybind11;

namespace halfbyte {
namespace {

enum Column {
  kCount,
  kParam,
  kGrad,
  kParamDType,
  kGradDType,
  kState,
  kExpAvg,
  kExpAvgSq,
  kExpAvgAbsmax,
  kExpAvgSqAbsmax,
  kStep,
  kGroup,
  kColumns
};

const char* const kColumnNames[kColumns] = {
    "count",   "param",      "grad",           "param_dtype",       "grad_dtype", "state",
    "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "step",       "group"};

template <class T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

AdamW8Tensor tensor_of_row(const int64_t* row) {
  AdamW8Tensor t;
  t.count = row[kCount];
  t.param = address<void>(row[kParam]);
  t.grad = address<void>(row[kGrad]);
  t.param_dtype = static_cast<DType>(row[kParamDType]);
  t.grad_dtype = static_cast<DType>(row[kGradDType]);
  HALFBYTE_CHECK(row[kState] >= 0 && row[kState] <= static_cast<int64_t>(AdamW8State::kRatio),
                 "state: expected 0, 1 or 2, got ", row[kState]);
  t.state = static_cast<AdamW8State>(row[kState]);
  t.exp_avg = address<void>(row[kExpAvg]);
  t.exp_avg_sq = address<void>(row[kExpAvgSq]);
  t.exp_avg_absmax = address<float>(row[kExpAvgAbsmax]);
  t.exp_avg_sq_absmax = address<float>(row[kExpAvgSqAbsmax]);
  t.step = address<float>(row[kStep]);
  t.group = row[kGroup];
  return t;
}

std::vector<AdamW8Tensor> tensors_of_table(const py::buffer& table) {
  const py::buffer_info info = table.request();
  HALFBYTE_CHECK(
      info.ndim == 1 && info.itemsize == 8 && info.strides[0] == 8 && info.size % kColumns == 0,
      "table: expected contiguous int64 rows of ", int(kColumns), " columns, got ", info.size,
      " items of ", info.itemsize, " bytes");
  const int64_t* rows = static_cast<const int64_t*>(info.ptr);
  std::vector<AdamW8Tensor> tensors;
  tensors.reserve(info.size / kColumns);
  for (py::ssize_t at = 0; at < info.size; at += kColumns)
    tensors.push_back(tensor_of_row(rows + at));
  return tensors;
}

}  // namespace

AdamW8Params adamw8_params(const py::buffer& table, const std::vector<AdamW8GroupTuple>& groups,
                           int threads, int device, uintptr_t stream, TensorView bad) {
  AdamW8Params params;
  params.tensors = tensors_of_table(table);
  for (const auto& [lr, beta1, beta2, eps, weight_decay, maximize] : groups)
    params.groups.push_back({lr, beta1, beta2, eps, weight_decay, maximize});
  params.threads = threads;
  if (device >= 0) params.place = {Device::kCuda, device};
  params.stream = stream_of(stream);
  params.bad = std::move(bad);
  return params;
}

void bind_adamw8(py::module_& module) {
  py::list columns;
  for (const char* name : kColumnNames) columns.append(name);
  module.attr("adamw8_columns") = py::tuple(columns);
  py::enum_<AdamW8State>(module, "AdamW8State")
      .value("float32", AdamW8State::kFloat32)
      .value("moments", AdamW8State::kMoments)
      .value("ratio", AdamW8State::kRatio);

  // groups: (lr, beta1, beta2, eps, weight_decay, maximize). Returns (row, index) of the first
  // non-finite gradient element, or (-1, -1). On CUDA (`device` >= 0) `bad` learns it, later.
  module.def(
      "adamw8_step",
      [](const py::buffer& table, const std::vector<AdamW8GroupTuple>& groups, int threads,
         int device, uintptr_t stream, const TensorView& bad) {
        const AdamW8Params params = adamw8_params(table, groups, threads, device, stream, bad);
        AdamW8Result result;
        {
          py::gil_scoped_release release;  // no interruption: a step is done wholly or not at all
          result = adamw8_step(params);
        }
        return py::make_tuple(result.tensor, result.index);
      },
      py::arg("table"), py::arg("groups"), py::arg("threads"), py::arg("device") = -1,
      py::arg("stream") = 0, py::arg("bad") = py::none());
  module.def("adamw8_variants", [] { return variant_rows(adamw8_variants()); });
}

}  // namespace halfbyte
