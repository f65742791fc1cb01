"""What halfbyte is measured against. Every peer but torch is optional.

A linear peer is an `nn.Module` on the weight [N, K]:

    dense                   nn.Linear on the dequantized weight: the same numbers, 16 or 32 bits
    bitsandbytes training   Linear4bit in training mode: dequantize, then multiply
    bitsandbytes eval       Linear4bit in eval mode: its AVX512-BF16 kernel on repacked weights;
                            inference only, bfloat16, N a multiple of 32, K of 64
    torchao nf4             NF4Tensor: dequantize, then multiply
    torchao int4            Int4OpaqueTensor: torch's int4 kernel on repacked weights; inference
                            only, affine int4 instead of NF4, bfloat16 (float32 and float16 take
                            a scalar loop), K a multiple of 64

`Unavailable` says in a few words why a peer cannot take part.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import nn

from halfbyte.nn import NF4Linear


class Unavailable(Exception):
    """Why a peer is not in the table, in words that fit a cell."""


@contextlib.contextmanager
def quiet():
    """Drops what a package prints and warns while it is imported."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@functools.cache
def _imported(package: str):
    try:
        with quiet():
            return __import__(package)
    except ImportError:
        return None


def bitsandbytes():
    """The package. Raises Unavailable."""
    module = _imported("bitsandbytes")
    if module is None:
        raise Unavailable("not installed")
    return module


def require_torchao() -> None:
    """Raises Unavailable unless torchao can be imported; `from torchao...` is quiet afterwards."""
    if _imported("torchao") is None:
        raise Unavailable("not installed")


def dense(weight: torch.Tensor, packed: NF4Linear) -> nn.Module:
    return packed.to_linear(weight.dtype).requires_grad_(False)


def bitsandbytes_training(weight: torch.Tensor, packed: NF4Linear | None = None) -> nn.Module:
    nn_4bit = bitsandbytes().nn
    n, k = weight.shape
    layer = nn_4bit.Linear4bit(
        k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = nn_4bit.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", module=layer
    )
    return layer.to("cpu").train()


def bitsandbytes_eval(weight: torch.Tensor, packed: NF4Linear | None = None) -> nn.Module:
    n, k = weight.shape
    if not bitsandbytes().functional.has_avx512bf16():
        raise Unavailable("no AVX512-BF16")
    if weight.dtype != torch.bfloat16:
        raise Unavailable("bfloat16 only")
    if n % 32 or k % 64:
        raise Unavailable("N % 32" if n % 32 else "K % 64")
    layer = bitsandbytes_training(weight).eval()
    with torch.no_grad():
        layer(weight.new_zeros(1, k))  # repacks
    if not on_fast_path(layer):
        raise Unavailable("not repacked")
    return layer


def on_fast_path(layer: nn.Module) -> bool:
    """Whether a bitsandbytes layer holds the repacked weight of its AVX512-BF16 kernel."""
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


class _TorchaoNF4(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

        self.weight, self.linear = to_nf4(weight), linear_nf4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x, self.weight)


def torchao_nf4(weight: torch.Tensor, packed: NF4Linear | None = None) -> nn.Module:
    require_torchao()
    blocks = weight.numel() // 64
    if weight.numel() % 64 or blocks % 256:
        raise Unavailable("N K % 16384")
    try:
        return _TorchaoNF4(weight)
    except ImportError:
        raise Unavailable("no NF4Tensor") from None


def torchao_int4(weight: torch.Tensor, packed: NF4Linear | None = None) -> nn.Module:
    require_torchao()
    n, k = weight.shape
    if weight.dtype != torch.bfloat16:
        raise Unavailable("scalar loop")
    if n % 16 or k % 64:
        raise Unavailable("N % 16" if n % 16 else "K % 64")
    try:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    except ImportError:
        raise Unavailable("no Int4OpaqueTensor") from None
    layer = nn.Linear(k, n, bias=False, device="meta")
    packed_weight = Int4OpaqueTensor.from_hp(weight, [1, 64])
    layer.weight = nn.Parameter(packed_weight, requires_grad=False)
    return layer


LINEAR: dict[str, Callable[[torch.Tensor, NF4Linear], nn.Module]] = {
    "dense": dense,
    "bitsandbytes eval": bitsandbytes_eval,
    "bitsandbytes training": bitsandbytes_training,
    "torchao nf4": torchao_nf4,
    "torchao int4": torchao_int4,
}
INFERENCE_ONLY = ("bitsandbytes eval", "torchao int4")
OWN_CODES = ("torchao nf4", "torchao int4")  # other levels or scales than halfbyte's


def build(
    weight: torch.Tensor, packed: NF4Linear, wanted: tuple[str, ...]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(layers by name, why not by name) of the peers `wanted`."""
    layers, why_not = {}, {}
    for name in wanted:
        try:
            layers[name] = LINEAR[name](weight, packed)
        except Unavailable as reason:
            why_not[name] = str(reason)
    return layers, why_not


def bitsandbytes_adamw8() -> Callable:
    return bitsandbytes().optim.AdamW8bit


def torchao_adamw8() -> Callable:
    """Compiled by torch at its first step: needs a C++ compiler. Raises Unavailable."""
    require_torchao()
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise Unavailable("no AdamW8bit") from None
    return AdamW8bit
