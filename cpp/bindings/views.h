// Python hands tensors to the core as TensorView(address, dtype, shape, device): no torch here.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "halfbyte/tensor_view.h"

namespace halfbyte {

void bind_nf4(pybind11::module_& module);
void bind_lora_linear(pybind11::module_& module);
void bind_adamw8(pybind11::module_& module);

// (name, why_not, chosen) rows for Python.
template <class Rows>
pybind11::list variant_rows(const Rows& rows) {
  pybind11::list list;
  for (const auto& row : rows) list.append(pybind11::make_tuple(row.name, row.why_not, row.chosen));
  return list;
}

}  // namespace halfbyte
