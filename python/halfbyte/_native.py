"""The compiled module, and tensors as it takes them: address, dtype, shape, device.

torch is imported before `_C` so that both share torch's OpenMP runtime and its threads.
"""

from __future__ import annotations

import torch

from halfbyte import _C

__all__ = ["_C", "float_view", "thread_count", "view"]

_DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
    torch.uint8: _C.DType.uint8,
    torch.int64: _C.DType.int64,
}
_NOTHING = _C.TensorView()


def _view(tensor: torch.Tensor, dtype: _C.DType) -> _C.TensorView:
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()}")
    device = _C.Device.cpu if tensor.device.type == "cpu" else _C.Device.cuda
    return _C.TensorView(tensor.data_ptr(), dtype, tensor.shape, device)


def view(tensor: torch.Tensor | None) -> _C.TensorView:
    """A borrowed view of a contiguous `tensor`; the caller keeps the tensor alive."""
    if tensor is None:
        return _NOTHING
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        known = ", ".join(str(name) for name in _DTYPES)
        raise ValueError(f"expected a tensor of {known}, got {tensor.dtype}")
    return _view(tensor, dtype)


def float_view(tensor: torch.Tensor | None) -> _C.TensorView:
    """A float32 view of statistics, which modules hold as int32 bit patterns (or as float32)."""
    if tensor is not None and tensor.dtype == torch.int32:
        return _view(tensor, _C.DType.float32)
    return view(tensor)


def thread_count() -> int:
    """Threads a kernel may use: torch's own setting."""
    return torch.get_num_threads()
