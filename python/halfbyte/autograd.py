"""Differentiable functions on packed 4-bit weights: public `torch.autograd.Function`s and the two
calls that choose their arguments.

    lora_linear   y = x W^T + bias + scaling * (dropout(x) A^T) B^T
    nf4_linear    y = x W^T + bias

Gradients reach x, A, B and bias; the packed weight is frozen. Saved for backward: x (only when A
needs a gradient), A, B, and T = dropout(x) A^T [M, R]. The dropout mask is a function of (seed,
row, column) and is recomputed.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

import halfbyte.ops.lora_linear  # noqa: F401  (registers the operators)
from halfbyte.nf4_weight import NF4Weight

_SEED_RANGE = 2**63 - 1
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LoraLinearFunction(torch.autograd.Function):
    """`apply(x, *weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed) -> y`.

    `weight` is `NF4Weight.op_args()`; bias, lora_a, lora_b and seed may be None. See
    `lora_linear` for shapes.
    """

    @staticmethod
    def forward(ctx, x, *args):
        *weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed = args
        y, t = torch.ops.halfbyte.lora_linear(
            x, *weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed
        )
        need_x, need_bias, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 10, 11, 12))
        packed, absmax, nested_absmax, offset, codebook, levels, nested_map, block_size = weight
        ctx.save_for_backward(
            x if need_a else None,
            packed,
            absmax,
            nested_absmax,
            offset,
            levels,
            nested_map,
            lora_a,
            lora_b,
            t if need_b else None,
            seed,
        )
        ctx.constants = (
            codebook,
            block_size,
            x.shape[-1],
            bias.dtype if need_bias else None,
            scaling,
            dropout,
            [need_x, need_a, need_b, need_bias],
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, packed, absmax, nested_absmax, offset, levels, nested_map, lora_a, lora_b, t, seed = (
            ctx.saved_tensors
        )
        codebook, block_size, in_features, bias_dtype, scaling, dropout, wanted = ctx.constants
        grads = torch.ops.halfbyte.lora_linear_backward(
            dy,
            x,
            packed,
            absmax,
            nested_absmax,
            offset,
            codebook,
            levels,
            nested_map,
            block_size,
            in_features,
            bias_dtype,
            lora_a,
            lora_b,
            t,
            scaling,
            dropout,
            seed,
            wanted,
        )
        dx, da, db, dbias = (
            grad if want else None for grad, want in zip(grads, wanted, strict=True)
        )
        return (dx, *[None] * 9, dbias, da, db, None, None, None)


def new_seed(device: torch.device | str = "cpu") -> torch.Tensor:
    """A dropout seed, int64 [1], drawn from torch's default generator."""
    return torch.randint(_SEED_RANGE, (1,), dtype=torch.int64, device=device)


def lora_linear(
    x: torch.Tensor,
    weight: NF4Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T, W read from its packed bytes.

    ======  ===========================  ======================================
    x       [..., K]                     float32, bfloat16 or float16
    weight  [N, K]                       packed, frozen
    lora_a  [R, K], 1 <= R <= 512        any float; None with lora_b: no adapter
    lora_b  [N, R]                       any float
    bias    [N]                          any float
    y       [..., N]                     x's dtype (under autocast: autocast's)
    ======  ===========================  ======================================

    `dropout` is a probability. `seed` (an int, an int64 [1] tensor, or None for a draw from torch's
    default generator) fixes its mask, which depends on nothing else but row and column.
    Differentiable once, by autograd: not by `torch.func`, whose `vmap` takes it without gradients.
    Arithmetic: W in bfloat16 for bfloat16 x, in float32 otherwise; sums in float32. Raises
    ValueError on shapes and dtypes that do not fit. Source: Hu et al. 2021 (LoRA), Dettmers et al.
    2023 (QLoRA).
    """
    if x.dtype not in _FLOATS:
        raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if lora_a is None or dropout == 0.0:
        dropout, seed = 0.0, None
    elif seed is None:
        seed = new_seed(x.device)
    elif not isinstance(seed, torch.Tensor):
        if not -_SEED_RANGE <= seed <= _SEED_RANGE:
            raise ValueError(f"seed: expected -2**63 < seed < 2**63, got {seed}")
        seed = torch.tensor([seed], dtype=torch.int64, device=x.device)
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight: expected an NF4Weight, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x: expected a last dimension of {in_features} for a weight "
            f"[{out_features}, {in_features}], got {list(x.shape)}"
        )
    args = (
        x,
        *weight.op_args(),
        out_features,
        bias,
        lora_a,
        lora_b,
        float(scaling),
        float(dropout),
        seed,
    )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b)
    ):
        return LoraLinearFunction.apply(*args)
    return torch.ops.halfbyte.lora_linear(*args)[0]


def nf4_linear(
    x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x W^T + bias, W read from its packed bytes; shapes and dtypes as in `lora_linear`."""
    return lora_linear(x, weight, None, None, 1.0, bias)
