// Python hands torch tensors straight to the core: the casters below read address, dtype, shape and
// device through Python attributes, so that nothing here links to torch.
//
//   tensor or None                                       -> TensorView
//   (packed, absmax, nested_absmax, offset, codebook,    -> QuantizedView; statistics are float32
//   or
//    levels, nested_map, block_size)                        int32 bit patterns
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "halfbyte/adamw8.h"
#include "halfbyte/interruption.h"
#include "halfbyte/nf4.h"
#include "halfbyte/tensor_view.h"

namespace halfbyte {

void bind_nf4(pybind11::module_& module);
void bind_lora_linear(pybind11::module_& module);
void bind_adamw8(pybind11::module_& module);
void bind_paged(pybind11::module_& module);
void bind_calibrate(pybind11::module_& module);
void bind_views(pybind11::module_& module);

// Runs Python's handlers of signals that have come; throws what they raise.
void check_signals();

enum class Statistics { kNo, kYes };
TensorView view_of(pybind11::handle tensor, Statistics statistics = Statistics::kNo);
QuantizedView quantized_view_of(pybind11::handle weight);
// `torch.cuda.Stream.cuda_stream`, an address; 0 on the CPU.
inline void* stream_of(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

// The GIL released around an operation that a Python signal handler may end by raising, Ctrl-C's
// KeyboardInterrupt above all. Its outputs are unfinished then: not around steps that update.
class ReleaseGil {
  pybind11::gil_scoped_release release_;
  Interruptible interruptible_{&check_signals};
};

// A step on CUDA device `device`, or on the CPU where it is negative (bindings/adamw8.cpp).
using AdamW8GroupTuple = std::tuple<double, double, double, double, double, bool>;
AdamW8Params adamw8_params(const pybind11::buffer& table,
                           const std::vector<AdamW8GroupTuple>& groups, int threads, int device,
                           uintptr_t stream, TensorView bad);

// (name, why_not, chosen) rows for Python.
template <class Rows>
pybind11::list variant_rows(const Rows& rows) {
  pybind11::list list;
  for (const auto& row : rows) list.append(pybind11::make_tuple(row.name, row.why_not, row.chosen));
  return list;
}

}  // namespace halfbyte

namespace pybind11::detail {

template <>
struct type_caster<halfbyte::TensorView> {
  PYBIND11_TYPE_CASTER(halfbyte::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = halfbyte::view_of(source);
    return true;
  }
};

template <>
struct type_caster<halfbyte::QuantizedView> {
  PYBIND11_TYPE_CASTER(halfbyte::QuantizedView, const_name("tuple"));
  bool load(handle source, bool) {
    value = halfbyte::quantized_view_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
