"""The LoRA linear on a packed weight (maths: C++ header `lora_linear.h`).

    forward    T = drop(x) A^T               y = x W^T + bias + scaling * T B^T
    backward   dx, dA, dB, dbias, straight from the packed bytes

x [..., K]; W [N, K] packed; bias [N]; A [R, K]; B [N, R]; y [..., N]; T [M, R] (M = product of the
leading dimensions) float32. What is not wanted or not there is an empty tensor.

The fused kernels decode W in registers. On CUDA, many rows go through torch's matmul instead, over
panels of W that are dequantized just before.
"""

from __future__ import annotations

import math

import torch

from halfbyte._native import _C, stream_of, thread_count
from halfbyte.ops import define
from halfbyte.ops.nf4 import DOUBLE_QUANT_BLOCK, WEIGHT_SCHEMA

# Rows from which panels are taken on CUDA: `kPanelRows` of cuda/lora_linear/lora_linear.cu, which
# holds the evidence (a test compares the two).
PANEL_ROWS = 2048
# Bytes of a dequantized panel: read back by the matmul while it is in L2 (A100 40 MB, H100 50 MB,
# RTX 4090 72 MB), and large enough to fill the device.
PANEL_BYTES = 16 << 20


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[M, features], contiguous: the leading dimensions as one."""
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


# --- operators ------------------------------------------------------------------------------------


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
    run = _fused_forward if rows.is_cpu or not _wants_panels(rows) else panel_forward
    run(
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
    run = _fused_backward if rows.is_cpu or not _wants_panels(rows) else panel_backward
    run(
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
    )
    return outputs


def _backward_fake(dy, x, *args):
    in_features, bias_dtype, lora_a, lora_b = args[8:12]
    return _backward_outputs(dy, in_features, bias_dtype, lora_a, lora_b, args[-1])


# --- one native call ------------------------------------------------------------------------------


def _fused_forward(x, *args):
    if x.is_cpu:
        _C.lora_linear_forward(x, *args, thread_count())  # type: ignore[call-arg]
    else:
        _on_cuda(_C.lora_linear_forward, _C.lora_linear_forward_workspace, x, *args)


def _fused_backward(dy, *args):
    if dy.is_cpu:
        _C.lora_linear_backward(dy, *args, thread_count())  # type: ignore[call-arg]
    else:
        _on_cuda(_C.lora_linear_backward, _C.lora_linear_backward_workspace, dy, *args)


def _on_cuda(run, workspace_bytes, first, *args):
    args = (first, *args, 1, stream_of(first))
    size = workspace_bytes(*args)
    run(*args, torch.empty(size, dtype=torch.uint8, device=first.device) if size else None)


# --- many rows on CUDA ----------------------------------------------------------------------------


def _wants_panels(rows: torch.Tensor) -> bool:
    forced = _C.forced_variant("lora_linear")
    if forced.startswith("cuda_"):
        return forced == "cuda_panels"
    return rows.shape[0] >= PANEL_ROWS


@torch.no_grad()
def panel_forward(x, weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed, y, t):
    """`lora_linear` by panels: y[:, n] = x W[n]^T + (bias + scaling T B^T)[:, n], each panel n of W
    dequantized into one scratch. T comes from the fused kernels, with their dropout mask. y is
    rounded once more than theirs: the adapter's part is stored before the base's is added.
    """
    args = (x, weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed, y, t)
    _C.lora_linear_forward_workspace(*args, 1)  # its checks
    bias = None if bias is None else bias.to(x.dtype)
    if lora_a is not None:
        narrow = _low_rank_rows(x, weight, lora_a, dropout, seed, t)
        _product(bias, narrow, _scaled(lora_b, scaling, x.dtype).t(), out=y)
    for columns, panel in _panels(weight, out_features, x.shape[1], x.dtype):
        if lora_a is not None:
            y[:, columns].addmm_(x, panel.t())
        else:
            _product(None if bias is None else bias[columns], x, panel.t(), out=y[:, columns])


@torch.no_grad()
def panel_backward(
    dy, x, weight, in_features, lora_a, lora_b, t, scaling, dropout, seed, dx, da, db, dbias
):
    """`lora_linear_backward` with dx = dy W + drop'(U A) over a dequantized W: whole, since sums
    over panels of its rows would round dx once a panel, and read and write as many bytes as they
    save. dA, dB and dbias come from the fused kernels, which read no weight for them.
    """
    args = (x, weight, in_features, lora_a, lora_b, t, scaling, dropout, seed)
    if any(out is not None for out in (da, db, dbias)):
        _fused_backward(dy, *args, None, da, db, dbias)
    if dx is None:
        return
    _C.lora_linear_backward_workspace(dy, *args, dx, da, db, dbias, 1)  # its checks
    dense = dy.new_empty(dy.shape[1], in_features)
    _C.dequantize_4bit(weight, dense, thread_count(), stream_of(dense))
    if lora_a is None:
        torch.mm(dy, dense, out=dx)
        return
    u = dy @ _scaled(lora_b, scaling, dy.dtype)
    _add_up_rank(u, weight, lora_a, dropout, seed, dx)
    dx.addmm_(dy, dense)


def _low_rank_rows(x, weight, lora_a, dropout, seed, t):
    """T = drop(x) A^T into `t`, and rounded to x's dtype: the fused forward of 0 + T I^T."""
    rank = lora_a.shape[0]
    narrow = x.new_empty(x.shape[0], rank)
    zero, one = _zero_weight(rank * x.shape[1], weight, x), torch.eye(rank).to(x)
    _fused_forward(x, zero, rank, None, lora_a, one, 1.0, dropout, seed, narrow, t)
    return narrow


def _add_up_rank(u, weight, lora_a, dropout, seed, dx):
    """dx = drop'(U A): the fused backward of dy = U, B = I over a weight of zeros."""
    rank, in_features = lora_a.shape
    zero, one = _zero_weight(lora_a.numel(), weight, u), torch.eye(rank).to(u)
    args = (None, zero, in_features, lora_a, one, None, 1.0, dropout, seed)
    _fused_backward(u, *args, dx, None, None, None)


def _zero_weight(count: int, weight, like: torch.Tensor) -> list:
    """A packed weight of `count` zeros, in blocks of `weight`'s size."""
    block_size = weight[-1]
    packed = like.new_zeros(-(-count // 2), dtype=torch.uint8)
    absmax = like.new_zeros(-(-count // block_size), dtype=torch.float32)
    return [packed, absmax, None, None, "nf4", None, None, block_size]


def _scaled(lora_b, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    return (lora_b.float() * scaling).to(dtype)


def _product(bias, left, right, out) -> None:
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def _panels(weight, out_features: int, in_features: int, dtype: torch.dtype):
    """(slice of W's rows, those rows dense): each valid until the next."""
    scratch = None
    for rows, part in row_parts(weight, out_features, in_features, dtype.itemsize):
        if scratch is None:  # the first part is the largest
            scratch = weight[0].new_empty(rows.stop, in_features, dtype=dtype)
        panel = scratch[: rows.stop - rows.start]
        _C.dequantize_4bit(part, panel, thread_count(), stream_of(panel))
        yield rows, panel


def row_parts(weight, out_features: int, in_features: int, itemsize: int):
    """(slice of W's rows, those rows as a packed weight), each of PANEL_BYTES when dense. A part
    starts where a block of scales does, so that its packed bytes and scales are slices of W's.
    """
    packed, absmax, nested_absmax, offset, codebook, levels, nested_map, block_size = weight
    nested_block = block_size * DOUBLE_QUANT_BLOCK
    step = block_size if nested_absmax is None else nested_block
    rows = step // math.gcd(step, in_features)
    rows *= max(1, PANEL_BYTES // (rows * in_features * itemsize))
    packed = packed.reshape(-1)
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        begin, end = first * in_features, last * in_features
        nested = None
        if nested_absmax is not None:
            nested = nested_absmax[begin // nested_block : -(-end // nested_block)]
        part = (
            packed[begin // 2 : -(-end // 2)],
            absmax[begin // block_size : -(-end // block_size)],
            nested,
            *(offset, codebook, levels, nested_map, block_size),
        )
        yield slice(first, last), part


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
