"""Any PEFT tuner layer over a packed base: PEFT's own maths on the dequantized weight.

PEFT's methods read and write `base_layer.weight` as a float matrix. Here they run with a stand-in:
for the length of a call, an `nn.Linear` with the float32 dequantized weight takes the place of the
packed layer. What comes out goes back into 4 bits where it has to:

    initialise     an initialisation that rewrites the base weight W (PiSSA, OLoRA, CorDA, KaSA)
                   leaves Q(W - scaling B A); its error is in `requantization_errors`
    merge          Q(W + delta); the packed bytes of W are kept
    unmerge        those bytes, bit for bit
    unload, merge  a dense layer W + delta, nothing re-quantized

Q is the base's own format: code book, block size, double quantization.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import skip_init_on_device
from torch import nn

from halfbyte.nf4_weight import NF4Weight, quantize_4bit
from halfbyte.nn import NF4Linear

# PEFT's methods that a stand-in for the layer serves. (Others size their adapters elsewhere, from
# `weight.shape`, which is that of the packed bytes.) True: the layer only calls an unmerged base;
# False: it may read the weight, and gets it dequantized.
_METHODS = {
    "adalora": True,
    "boft": False,
    "delora": False,
    "fourierft": False,
    "hira": False,
    "hra": False,
    "ia3": True,
    "loha": False,
    "lokr": False,
    "miss": False,
    "oft": False,
    "randlora": False,
    "road": False,
    "shira": False,
    "vblora": False,
    "vera": True,
}
# What PEFT's calibration leaves on a layer for an initialisation to use up.
_CALIBRATION = ("eigens", "_peft_loraga_grad")


@dataclasses.dataclass(frozen=True)
class _Requantization:
    """Squared Frobenius norms: of Q(W') - W', and of W'."""

    error: float
    norm: float


@dataclasses.dataclass(frozen=True)
class RequantizationErrors:
    """||Q(W') - W'|| / ||W'|| (Frobenius), W' what a base weight should have become."""

    overall: float
    layers: dict[str, float]


def requantization_errors(model: nn.Module) -> RequantizationErrors:
    """The relative error of every base weight of `model` that stands re-quantized: merged by
    `merge_adapter`, or rewritten by the adapter's initialisation."""
    found = {
        name: module.requantization
        for name, module in model.named_modules()
        if isinstance(module, PackedTunerLayer) and module.requantization is not None
    }
    error = sum(r.error for r in found.values())
    norm = sum(r.norm for r in found.values())
    layers = {name: _ratio(r.error, r.norm) for name, r in found.items()}
    return RequantizationErrors(_ratio(error, norm), layers)


def _ratio(error: float, norm: float) -> float:
    return (error / norm) ** 0.5 if norm > 0 else 0.0


class PackedTunerLayer:
    """Mix-in before a PEFT tuner layer class whose `base_layer` is an `NF4Linear`."""

    # Whether the unmerged layer calls its base, and never looks at the weight.
    _calls_the_base_only = False
    requantization: _Requantization | None = None
    _initial: _Requantization | None = None
    # While merged: the base's packed weight and bias as they were.
    _unmerged: tuple[NF4Weight, torch.Tensor | None] | None = None

    # --- the stand-in ---

    def _packed_base(self) -> NF4Linear | None:
        """The packed layer, or None while the stand-in has its place."""
        base = self._modules["base_layer"]
        if isinstance(base, BaseTunerLayer):
            raise NotImplementedError(
                f"{type(self).__name__} around {type(base).__name__} on a 4-bit base: expected one "
                "PEFT method a layer; unload the inner one first"
            )
        return base if isinstance(base, NF4Linear) else None

    @contextmanager
    def _dense_base(self, dtype: torch.dtype = torch.float32) -> Iterator[nn.Linear]:
        packed = self._modules["base_layer"]
        dense = nn.Linear(packed.in_features, packed.out_features, device="meta")
        # Past register_parameter, which PEFT's low_cpu_mem_usage sends to the meta device.
        weight = packed.dequantize(dtype)
        dense._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        dense._parameters["bias"] = packed.bias
        for name in _CALIBRATION:
            if hasattr(packed, name):
                setattr(dense, name, getattr(packed, name))
        self._modules["base_layer"] = dense
        try:
            yield dense
        finally:
            self._modules["base_layer"] = packed

    @contextmanager
    def _rewritable_base(self) -> Iterator[None]:
        """The stand-in; what the block made of its weight is packed afterwards."""
        packed = self._modules["base_layer"]
        with self._dense_base() as dense:
            yield
        for name in _CALIBRATION:
            if hasattr(packed, name) and not hasattr(dense, name):
                delattr(packed, name)
        weight = dense.weight.detach()
        if torch.equal(weight, packed.dequantize(torch.float32)):
            return
        self._initial = self.requantization = _store(packed, quantize_like(packed, weight), weight)

    # --- what PEFT calls ---

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; the base weight is there as float32 for initialisations that use it."""
        if self._packed_base() is None or self._calls_the_base_only:
            super().update_layer(*args, **kwargs)
            return
        if self.merged:
            raise ValueError(
                "an adapter that initialises from the base weight: expected an unmerged base, got "
                f"one with {self.merged_adapters} merged; call unmerge_adapter() first"
            )
        with self._rewritable_base():
            super().update_layer(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's forward pass, on the dequantized weight if this method may read it."""
        plain = self._calls_the_base_only or self.merged or self.disable_adapters
        if plain or self._packed_base() is None:
            return super().forward(x, *args, **kwargs)
        with self._dense_base(x.dtype):
            return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- Q(W + delta), from the weight before any merge; `unmerge` restores its bytes.

        Raises ValueError, and changes nothing, if the merged weight is not finite.
        """
        packed = self._packed_base()
        if packed is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        dense, merged = self._merge_into_dense(self.merged_adapters + names, safe_merge)
        if merged == self.merged_adapters:
            return
        weight = quantize_like(packed, dense.weight)
        if self._unmerged is None:
            bias = None if packed.bias is None else packed.bias.detach().clone()
            self._unmerged = packed.nf4_weight, bias
        self.requantization = _store(packed, weight, dense.weight)
        if packed.bias is not None:
            packed.bias.data = dense.bias.detach().to(packed.bias.dtype)
        self.merged_adapters = merged
        # One text for all layers: Python shows it once.
        warnings.warn(
            "merging into a 4-bit base re-quantizes it, so outputs change a little; "
            "halfbyte.integrations.peft.requantization_errors(model) says by how much, "
            "unmerge_adapter() restores it exactly, and merge_and_unload() gives dense layers",
            stacklevel=2,
        )

    def unmerge(self) -> None:
        """Restore the packed weight and the bias from before `merge`, bit for bit."""
        packed = self._packed_base()
        if packed is None or self._unmerged is None:
            super().unmerge()
            return
        weight, bias = self._unmerged
        set_weight(packed, weight)
        if bias is not None:
            packed.bias.data = bias.to(packed.bias.device)
        self._unmerged, self.requantization = None, self._initial
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """What PEFT puts in this layer's place for `unload()` and `merge_and_unload()`.

        merge=False gives the 4-bit base layer back; merge=True a dense nn.Linear, W and the deltas
        summed in fp32, in the dtype the base was packed from.
        """
        packed = self._packed_base()
        if not merge:
            return packed
        names = self.merged_adapters + check_adapters_to_merge(self, adapter_names)
        dense, _ = self._merge_into_dense(names, safe_merge)
        # Some of PEFT's models take the weight from here, whatever is returned.
        self._modules["base_layer"] = dense.to(packed.weight_dtype).train(packed.training)
        return dense

    def _merge_into_dense(self, names: list[str], safe_merge: bool) -> tuple[nn.Linear, list[str]]:
        """A float32 layer with `names` merged into the unmerged base, and those it really took."""
        already, self.merged_adapters = self.merged_adapters, []
        weight, bias = self._unmerged or (None, self._modules["base_layer"].bias)
        try:
            with torch.no_grad(), self._dense_base() as dense:
                if weight is not None:
                    dense.weight.data = weight.dequantize(torch.float32).to(dense.weight.device)
                if bias is not None:  # PEFT adds to it in place
                    bias = bias.detach().to(torch.float32, copy=True)
                    dense._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
                if names:
                    super().merge(safe_merge=safe_merge, adapter_names=names)
            return dense, self.merged_adapters
        finally:
            self.merged_adapters = already
            for name in names:
                getattr(self, "_caches", {}).pop(f"{name}-weight_norm", None)


def quantize_like(packed: NF4Linear, weight: torch.Tensor) -> NF4Weight:
    double_quant = packed.nested_absmax is not None
    new = quantize_4bit(weight, packed.codebook, packed.block_size, double_quant)
    return dataclasses.replace(new, dtype=packed.weight_dtype)


def _store(packed: NF4Linear, weight: NF4Weight, wanted: torch.Tensor) -> _Requantization:
    """Put `weight` into the layer; how far it is from `wanted`."""
    error = norm = 0.0
    for rows, panel in weight.row_panels():
        error += (panel - wanted[rows]).square().sum().item()
        norm += wanted[rows].square().sum().item()
    set_weight(packed, weight)
    return _Requantization(error, norm)


@skip_init_on_device  # PEFT's low_cpu_mem_usage sends new Parameters to the meta device
def set_weight(packed: NF4Linear, weight: NF4Weight) -> None:
    device = packed.weight.device
    here = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    packed._set_weight(dataclasses.replace(weight, **here))


@functools.cache
def packed_class(peft_class: type) -> type:
    """`peft_class` with `PackedTunerLayer` before it; its instances pickle by `peft_class`."""
    method = peft_class.__module__.removeprefix("peft.tuners.").split(".")[0]
    if method not in _METHODS:
        raise NotImplementedError(
            f"PEFT's {method} on a 4-bit layer: expected lora, {', '.join(_METHODS)} or a method "
            "that leaves linear layers alone; dequantize the model for others"
        )
    members = {
        "_calls_the_base_only": _METHODS[method],
        "__reduce_ex__": lambda self, protocol: (_empty_layer, (peft_class,), self.__dict__),
    }
    return type(f"Packed{peft_class.__name__}", (PackedTunerLayer, peft_class), members)


def _empty_layer(peft_class: type) -> nn.Module:
    layer_class = packed_class(peft_class)
    return layer_class.__new__(layer_class)
