"""Linear layers on a 4-bit weight.

    NF4Linear    y = x W^T + bias
    LoraLinear   y = x W^T + bias + (alpha / r) * (dropout(x) A^T) B^T
    quantize_    every linear layer of a model, in place

Codes and statistics are frozen integer Parameters (float32 statistics as int32 bit patterns): the
one storage that dtype casts, autocast, DDP and FSDP leave alone. Forward never changes or repacks
them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn

from halfbyte import checkpoint
from halfbyte.autograd import lora_linear
from halfbyte.nf4_weight import NF4Weight, quantize_4bit


@overload
def _frozen(tensor: torch.Tensor) -> nn.Parameter: ...
@overload
def _frozen(tensor: None) -> None: ...
def _frozen(tensor: torch.Tensor | None) -> nn.Parameter | None:
    """An integer Parameter over `tensor`'s memory: float32 becomes int32 bit patterns."""
    if tensor is None:
        return None
    bits = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
    return nn.Parameter(bits, requires_grad=False)


def _accelerate_shards() -> bool:
    """Whether accelerate will send rank 0's state dict into a model that it sharded on the meta
    device (FSDP2 with cpu_ram_efficient_loading). It matches the two by Parameter names, and says
    what it will do in the environment, where transformers looks too."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and all(os.environ.get(name, "").lower() in ("true", "1") for name in names)


class NF4Linear(nn.Linear):
    """A linear layer whose weight lies in 4 bits and is frozen: y = x W^T + bias.

    x [..., K] float32, bfloat16 or float16; y [..., N] in x's dtype (under autocast: autocast's).
    Parameters: `weight` uint8 [ceil(N K / 2), 1]; `absmax` uint8 or int32; `nested_absmax`,
    `nested_offset` int32; `quant_map`, `nested_quant_map` int32 or None (the standard tables);
    `bias`. The state dict is in bitsandbytes' layout (see `halfbyte.checkpoint`); once the
    Parameters are sharded, and while accelerate's FSDP loads, it holds them under their own names.
    Both load. Make one with `from_linear` or from an `NF4Weight`.

    `compute_dtype`: None computes in x's dtype (or autocast's); a dtype casts x to it and y back.
    """

    def __init__(
        self,
        weight: NF4Weight,
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"compute_dtype: expected float32, bfloat16, float16 or None, got {compute_dtype}"
            )
        if len(weight.shape) != 2:
            raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias: expected shape [{self.out_features}], got {list(bias.shape)}")
        self._set_weight(weight)
        self.compute_dtype = compute_dtype
        bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.bias = bias  # type: ignore[assignment]  # nn.Linear declares a Parameter, and sets None

    def _set_weight(self, weight: NF4Weight) -> None:
        self.codebook = weight.codebook
        self.block_size = weight.block_size
        self.weight_dtype = weight.dtype
        self.weight = _frozen(weight.packed.reshape(-1, 1))
        self.absmax = _frozen(weight.absmax)
        self.nested_absmax = _frozen(weight.nested_absmax)
        self.nested_offset = _frozen(weight.offset)
        self.quant_map = _frozen(weight.levels)
        self.nested_quant_map = _frozen(weight.nested_map)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: str = "nf4",
    ) -> NF4Linear:
        """Quantizes the weight of `linear`, which is left as it is; the bias is shared."""
        layer = cls(quantize_4bit(linear.weight, codebook, block_size, double_quant), linear.bias)
        return layer.train(linear.training)

    @property
    def nf4_weight(self) -> NF4Weight:
        """The packed weight; shares this layer's memory."""
        return NF4Weight(
            packed=self.weight,
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.weight_dtype,
            block_size=self.block_size,
            codebook=self.codebook,
            nested_absmax=self.nested_absmax,
            offset=self.nested_offset,
            levels=self.quant_map,
            nested_map=self.nested_quant_map,
        )

    @property
    def W_q(self) -> torch.Tensor:
        """The packed bytes. Where this attribute is, PEFT calls `dequantize()` for the weight."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [N, K], in `dtype` or in the dtype it was quantized from."""
        return self.nf4_weight.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense layer with the dequantized weight."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype))
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        raise RuntimeError("NF4Linear: a packed weight cannot be re-initialised")

    def requires_grad_(self, requires_grad: bool = True) -> NF4Linear:
        """Of the bias; the packed weight stays frozen."""
        if self.bias is not None:
            self.bias.requires_grad_(requires_grad)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_forward(x, None, None)

    def lora_forward(
        self,
        x: torch.Tensor,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """`halfbyte.lora_linear` on this layer's weight and bias, in its `compute_dtype`."""
        dtype = self.compute_dtype
        inner = x if dtype is None else x.to(dtype)
        y = lora_linear(inner, self.nf4_weight, lora_a, lora_b, scaling, self.bias, dropout)
        return y if dtype is None else y.to(x.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if hasattr(self.weight, "placements") or _accelerate_shards():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        if self.weight.is_meta:  # no statistics to write yet: what a dense layer would list
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        else:
            entries = checkpoint.to_entries(self.nf4_weight, prefix + "weight")
            destination.update(
                entries if keep_vars else {k: t.detach() for k, t in entries.items()}
            )
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if prefix + "absmax" in state_dict:  # the Parameters under their own names
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict,
                missing_keys, unexpected_keys, error_msgs,
            )  # fmt: skip
            return
        names = checkpoint.entry_names(state_dict, prefix + "weight")
        if names:
            self._load_weight(state_dict, prefix + "weight", local_metadata, error_msgs)
        elif strict:
            missing_keys.append(prefix + "weight")
        if (bias := state_dict.get(prefix + "bias")) is not None and self.bias is not None:
            self._load_bias(bias, prefix + "bias", local_metadata, error_msgs)
        elif (bias is None) != (self.bias is None) and strict:
            (missing_keys if bias is None else unexpected_keys).append(prefix + "bias")
        if strict:
            known = {*names, prefix + "bias"}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]

    def _load_weight(self, state_dict, key, local_metadata, error_msgs) -> None:
        try:
            weight = checkpoint.from_entries(state_dict, key)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if weight.shape != (self.out_features, self.in_features):
            error_msgs.append(
                f"{key}: expected a packed weight of [{self.out_features}, {self.in_features}], "
                f"got {list(weight.shape)}"
            )
            return
        if local_metadata.get("assign_to_params_buffers", False) or self.weight.is_meta:
            self._set_weight(weight)
            return
        mine = self.nf4_weight
        same = {n: t.shape for n, t in mine.tensors().items()} == {
            n: t.reshape(-1, 1).shape if n == "packed" else t.shape
            for n, t in weight.tensors().items()
        }
        if not same or mine.absmax.dtype.itemsize != weight.absmax.dtype.itemsize:
            moved: dict[str, Any] = {
                n: t.clone().to(self.weight.device) for n, t in weight.tensors().items()
            }
            self._set_weight(dataclasses.replace(weight, **moved))
            return
        self.codebook, self.block_size = weight.codebook, weight.block_size
        self.weight_dtype = weight.dtype
        with torch.no_grad():
            for name, tensor in mine.tensors().items():
                source = getattr(weight, name)
                tensor.copy_(source.view(tensor.dtype).reshape(tensor.shape))

    def _load_bias(self, bias, key, local_metadata, error_msgs) -> None:
        if bias.shape != self.bias.shape:
            error_msgs.append(
                f"{key}: expected shape {list(self.bias.shape)}, got {list(bias.shape)}"
            )
        elif local_metadata.get("assign_to_params_buffers", False) or self.bias.is_meta:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)

    def extra_repr(self) -> str:
        kind = f"{self.codebook}, block_size={self.block_size}"
        kind += ", double_quant=True" if self.nested_absmax is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {kind}"
        )


class LoraLinear(nn.Module):
    """A frozen 4-bit linear layer with a trainable low-rank adapter, in one fused operation.

    y = x W^T + bias + (alpha / r) * (dropout(x) A^T) B^T

    `lora_a` [r, K] starts uniform in +-1/sqrt(K) (Kaiming, a = sqrt 5) and `lora_b` [N, r] at
    zero, so that training starts from the base. Both are float32 unless `dtype` says otherwise.
    Dropout acts in training mode only, with a fresh seed from torch's default generator a call.
    """

    def __init__(
        self,
        base: NF4Linear,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 1 <= r <= 512:
            raise ValueError(f"r: expected a rank of 1 to 512, got {r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected 0 <= p < 1, got {dropout}")
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha}")
        self.base = base
        self.r = r
        self.alpha = float(r if alpha is None else alpha)
        self.dropout = dropout
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        base.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        block_size: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> LoraLinear:
        """An adapter on `linear`, quantized first unless it already is an `NF4Linear`.

        A dense `linear` is left as it is: the adapter freezes a copy of its bias.
        """
        if isinstance(linear, NF4Linear):
            base = linear
        else:
            base = NF4Linear.from_linear(linear, block_size, double_quant)
            if base.bias is not None:
                base.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        return cls(base, r, alpha, dropout, dtype).train(linear.training)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.base.lora_forward(x, self.lora_a, self.lora_b, self.scaling, dropout)

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense layer with W + (alpha / r) B A, summed in float32."""
        linear = self.base.to_linear(torch.float32)
        with torch.no_grad():
            linear.weight += self.scaling * (self.lora_b.float() @ self.lora_a.float())
        return linear.to(dtype or self.base.weight_dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def quantize_(
    model: nn.Module,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    codebook: str = "nf4",
    skip_modules: Iterable[str] = ("lm_head",),
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replaces every `nn.Linear` of `model` by an `NF4Linear`, in place, and returns `model`.

    Layer by layer: each dense weight is freed once its packed form is there. Left dense: layers
    whose name, or last part of it, is in `skip_modules`, the model's output head
    (`get_output_embeddings`), and weights tied to another module. Hooks move to the packed layer;
    an `nn.TransformerEncoderLayer` takes torch's slow path, as the fast one reads dense weights.
    `progress(done, total, name)` is called after each layer.

    Raises ValueError for a name in `skip_modules` that fits no module ("lm_head", the usual head,
    may be absent), for a layer whose `forward` was replaced, and, naming the layer, on a weight
    that cannot be quantized; layers done by then stay quantized.
    """
    if isinstance(skip_modules, str):
        raise TypeError(f"skip_modules: expected names in a list, got the string {skip_modules!r}")
    if type(model) is nn.Linear:
        raise TypeError(
            "model: expected a module that holds linear layers, got a linear layer; "
            "use NF4Linear.from_linear"
        )
    skip = set(skip_modules)
    _check_names(model, skip - {"lm_head"})
    targets = _linear_layers(model, skip)
    _leave_fast_path(model, {id(parent) for places in targets.values() for parent, _ in places})
    for done, (name, places) in enumerate(targets.items(), 1):
        linear = getattr(*places[0])
        try:
            packed = NF4Linear.from_linear(linear, block_size, double_quant, codebook)
            _move_hooks(linear, packed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        del linear
        for parent, attribute in places:
            setattr(parent, attribute, packed)
        if progress is not None:
            progress(done, len(targets), name)
    return model


def _check_names(model: nn.Module, names: set[str]) -> None:
    known: set[str] = set()
    for name, _ in model.named_modules(remove_duplicate=False):
        known |= {name, name.rpartition(".")[2]}
    if unknown := sorted(names - known):
        raise ValueError(
            f"skip_modules: expected names of modules of {type(model).__name__}, got "
            f"{', '.join(map(repr, unknown))}, which fits none"
        )


def _leave_fast_path(model: nn.Module, parents: set[int]) -> None:
    """Sets torch's own switches to the slow path of its encoder layers, which calls the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and id(module) in parents:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            if any(id(part) in parents for part in module.modules()):
                module.use_nested_tensor = False


def _move_hooks(linear: nn.Linear, packed: NF4Linear) -> None:
    """The hooks of `linear`, the dictionaries themselves: handles of their owners stay valid."""
    if "forward" in vars(linear):
        raise ValueError(
            "forward: expected nn.Linear's own, got one set on the layer (as accelerate's hooks "
            "do); quantize before it is set"
        )
    vars(packed).update({name: value for name, value in vars(linear).items() if "_hook" in name})


def _linear_layers(model: nn.Module, skip: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Dense linear layers to quantize: first name -> every (parent, attribute) that holds it."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    names: dict[int, str] = {}
    targets: dict[str, list[tuple[nn.Module, str]]] = {}
    for parent_name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if type(child) is not nn.Linear or child is head:
                continue
            name = f"{parent_name}.{attribute}" if parent_name else attribute
            if name in skip or attribute in skip or len(owners[id(child.weight)]) > 1:
                continue
            first = names.setdefault(id(child), name)
            targets.setdefault(first, []).append((parent, attribute))
    return targets
