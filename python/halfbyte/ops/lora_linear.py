"""The LoRA linear on a packed weight (maths: C++ header `lora_linear.h`).

    forward    T = drop(x) A^T               y = x W^T + bias + scaling * T B^T
    backward   dx, dA, dB, dbias, straight from the packed bytes

x [..., K]; W [N, K] packed; bias [N]; A [R, K]; B [N, R]; y [..., N]; T [M, R] (M = product of the
leading dimensions) float32. What is not wanted or not there
is an empty tensor.
"""

from __future__ import annotations

import torch

from halfbyte._native import _C, thread_count
from halfbyte.ops import define
from halfbyte.ops.nf4 import WEIGHT_SCHEMA


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[M, features], contiguous: the leading dimensions as one."""
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward_outputs(x, out_features, lora_a):
    y = x.new_empty(*x.shape[:-1], out_features)
    if lora_a is None:
        return y, x.new_empty(0)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return y, x.new_empty(rows, lora_a.shape[0], dtype=torch.float32)


def _forward(x, *args):
    *weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed = args
    y, t = _forward_outputs(x, out_features, lora_a)
    rows, bias = _rows(x), _contiguous(bias)
    lora_a, lora_b = _contiguous(lora_a), _contiguous(lora_b)
    _C.lora_linear_forward(
        rows,
        weight,
        out_features,
        bias,
        lora_a,
        lora_b,
        scaling,
        dropout,
        seed,
        _rows(y),
        t if lora_a is not None else None,
        thread_count(),
    )
    return y, t


def _forward_fake(x, *args):
    out_features, _, lora_a = args[8:11]
    return _forward_outputs(x, out_features, lora_a)


def _backward_outputs(dy, in_features, bias_dtype, lora_a, lora_b, wanted):
    want_dx, want_da, want_db, want_dbias = wanted
    nothing = (0,)
    return (
        dy.new_empty((*dy.shape[:-1], in_features) if want_dx else nothing),
        torch.empty_like(lora_a, memory_format=torch.contiguous_format)
        if want_da
        else dy.new_empty(nothing),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format)
        if want_db
        else dy.new_empty(nothing),
        dy.new_empty((dy.shape[-1],) if want_dbias else nothing, dtype=bias_dtype or dy.dtype),
    )


def _backward(dy, x, *args):
    (*weight, in_features, bias_dtype, lora_a, lora_b, t, scaling, dropout, seed, wanted) = args
    outputs = _backward_outputs(dy, in_features, bias_dtype, lora_a, lora_b, wanted)
    dx, da, db, dbias = (out if want else None for out, want in zip(outputs, wanted, strict=True))
    rows = _rows(dy)
    x_rows = _rows(x) if da is not None else None
    lora_a, lora_b = _contiguous(lora_a), _contiguous(lora_b)
    _C.lora_linear_backward(
        rows,
        x_rows,
        weight,
        in_features,
        lora_a,
        lora_b,
        t if db is not None else None,
        scaling,
        dropout,
        seed,
        None if dx is None else _rows(dx),
        da,
        db,
        dbias,
        thread_count(),
    )
    return outputs


def _backward_fake(dy, x, *args):
    in_features, bias_dtype, lora_a, lora_b = args[8:12]
    return _backward_outputs(dy, in_features, bias_dtype, lora_a, lora_b, args[-1])


define(
    f"lora_linear(Tensor x, {WEIGHT_SCHEMA}, SymInt out_features, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, float scaling, float dropout, Tensor? seed) -> (Tensor y, Tensor t)",
    _forward,
    _forward_fake,
)
define(
    f"lora_linear_backward(Tensor dy, Tensor? x, {WEIGHT_SCHEMA}, SymInt in_features, "
    "ScalarType? bias_dtype, Tensor? lora_a, Tensor? lora_b, Tensor? t, float scaling, "
    "float dropout, Tensor? seed, bool[4] wanted) "
    "-> (Tensor dx, Tensor d_lora_a, Tensor d_lora_b, Tensor d_bias)",
    _backward,
    _backward_fake,
)
