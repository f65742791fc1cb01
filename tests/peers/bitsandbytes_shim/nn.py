"""bitsandbytes.nn's 4-bit modules: a weight is packed when it is moved to its device.

A dense `Params4bit` packs itself in `to`, `cpu` and `cuda`. `Linear4bit` computes
y = x deq(W)^T + bias in `compute_dtype` and returns it in x's dtype.
"""

from __future__ import annotations

import copy

import torch

import halfbyte
from bitsandbytes_shim.absent import absent
from bitsandbytes_shim.functional import QuantState, quantize_4bit

Linear8bitLt = absent("Linear8bitLt")
StableEmbedding = absent("StableEmbedding")

_NESTED = ("nested_absmax", "nested_quant_map")
_SETTINGS = (
    "blocksize", "compress_statistics", "quant_type", "quant_state", "quant_storage",
    "bnb_quantized", "module",
)  # fmt: skip


class Params4bit(torch.nn.Parameter):
    """A frozen weight: dense until it reaches its device, packed [bytes, 1] from then on."""

    def __new__(
        cls, data=None, requires_grad=False, quant_state=None, blocksize=64,
        compress_statistics=True, quant_type="fp4", quant_storage=torch.uint8, module=None,
        bnb_quantized=False,
    ):  # fmt: skip
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data.detach())
        self.requires_grad = requires_grad
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(cls, data, quantized_stats, requires_grad=False, device="cpu", **kwargs):
        state = QuantState.from_dict(quantized_stats, device)
        return cls(
            data.to(device), requires_grad, state, state.blocksize, state.nested,
            state.quant_type, data.dtype, bnb_quantized=True,
        )  # fmt: skip

    def _pack(self, device) -> Params4bit:
        packed, self.quant_state = quantize_4bit(
            self.data.to(device), None, None, self.blocksize, self.compress_statistics,
            self.quant_type, self.quant_storage,
        )  # fmt: skip
        self.data = packed
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = self.quant_state
        return self

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            return self._pack(device)
        if self.bnb_quantized:
            if device is not None:
                self.quant_state.to(device)
            dtype = None  # packed bytes are no numbers
        moved = super().to(*args, **kwargs) if dtype else super().to(device or self.device)
        return self._with_settings(moved)

    def __getattr__(self, name: str):
        # state dict keys are looked up as attributes: "weight.absmax", "weight.quant_map"
        state = self.__dict__.get("quant_state")
        if state is not None and name == "code":
            return state.code
        if state is not None and name in ("absmax", "quant_map", *_NESTED[: 2 * state.nested]):
            return state.as_dict(packed=True)[name]
        raise AttributeError(f"Params4bit has no attribute {name!r}")

    def cpu(self):
        return self.to("cpu")

    def cuda(self, device=None, non_blocking=False):
        return self.to("cuda" if device is None else device)

    def _with_settings(self, data) -> Params4bit:
        twin = torch.Tensor._make_subclass(type(self), data.detach())
        twin.requires_grad = self.requires_grad
        twin.__dict__.update({name: getattr(self, name) for name in _SETTINGS})
        return twin

    def __copy__(self):
        return self._with_settings(self.data)

    def __deepcopy__(self, memo):
        twin = self._with_settings(self.data.clone())
        twin.quant_state = copy.deepcopy(self.quant_state, memo)
        return twin

    def __reduce_ex__(self, protocol):
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return _rebuild, (self.data, self.requires_grad, settings)


def _rebuild(data, requires_grad, settings) -> Params4bit:
    param = Params4bit(data, requires_grad)
    param.__dict__.update(settings)
    return param


class Linear4bit(torch.nn.Linear):
    """y = x deq(W)^T + bias."""

    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None,
        compress_statistics=True, quant_type="fp4", quant_storage=torch.uint8, device=None,
    ):  # fmt: skip
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data, False, None, 64, compress_statistics, quant_type, quant_storage, self
        )
        self.compute_dtype = compute_dtype
        self.quant_state = None

    def forward(self, x):
        dtype = self.compute_dtype or x.dtype
        # torch.compile follows the module's attribute, not the Parameter's.
        state = self.weight.quant_state if self.quant_state is None else self.quant_state
        return halfbyte.nf4_linear(x.to(dtype), state.weight(self.weight), self.bias).to(x.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.quant_state is not None:
            for key, value in self.weight.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()


class LinearFP4(Linear4bit):
    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None,
        compress_statistics=True, quant_storage=torch.uint8, device=None,
    ):  # fmt: skip
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4",
            quant_storage, device,
        )  # fmt: skip


class LinearNF4(Linear4bit):
    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None,
        compress_statistics=True, quant_storage=torch.uint8, device=None,
    ):  # fmt: skip
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4",
            quant_storage, device,
        )  # fmt: skip
