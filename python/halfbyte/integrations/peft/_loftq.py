"""LoftQ: adapters that start at the quantization error instead of at zero.

    minimise over Q, A, B     ||W - (deq(Q) + s B A)||_F,   s = scaling, rank r

alternately, from s B A = 0:   Q = quantize(W - s B A);   s B A = rank-r part of W - deq(Q).
Q keeps the base's format. Layer by layer: one dense float32 weight and its residual at a time.
Source: Li et al. 2023, LoftQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from halfbyte.integrations.peft._lora import LoraLinear
from halfbyte.integrations.peft._packed import quantize_like, set_weight

# Columns beyond the rank and power iterations of the randomized SVD (Halko et al. 2011): a
# quantization residual has a flat spectrum, where both matter.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


class LoftqError(NamedTuple):
    """Relative Frobenius error of one layer, ||W - W'|| / ||W||."""

    zero_init: float
    loftq: float


def loftq_initialize(
    model: nn.Module,
    weights: str | Path | Mapping[str, torch.Tensor] | nn.Module,
    iterations: int = 1,
    adapter_name: str = "default",
) -> dict[str, LoftqError]:
    """Re-quantize the bases of `model` and start their adapters so that W - (Q + s B A) is small.

    `model`: with plain, unmerged LoRA adapters on 4-bit layers (a PeftModel, or a model that got
    them by `add_adapter`). `weights`: the model's 16- or 32-bit weights, a folder of safetensors
    files (read one tensor at a time), a mapping from names to tensors, or the dense model.
    `iterations`: quantizations a layer, 1 or more; the best of them is kept. The truncated SVD is
    torch's randomized one, which draws from torch's default generator.

    Returns each layer's error with Q alone (B = 0, as `init_lora_weights=True` starts) and with the
    adapter. Save and load the adapter together with this base: after loading the packed base again
    from the same weights with `iterations=1` it fits, with more it needs the re-quantized one.

    Raises ValueError, before anything is changed, for a layer whose weight is missing or does not
    fit, and for adapters that are merged or a variant.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(f"model: expected LoRA layers on 4-bit bases with {adapter_name!r}")
    for name, layer in layers.items():
        if layer.merged or adapter_name in layer.lora_variant:
            state = "merged" if layer.merged else type(layer.lora_variant[adapter_name]).__name__
            raise ValueError(f"{name}: expected a plain, unmerged LoRA adapter, got {state}")
    source = _Source(weights)
    names = {name: source.find(name, layer.base_layer) for name, layer in layers.items()}
    return {
        name: _initialize(layer, adapter_name, source.read(names[name]), iterations)
        for name, layer in layers.items()
    }


@torch.no_grad()
def _initialize(
    layer: LoraLinear, adapter: str, dense: torch.Tensor, iterations: int
) -> LoftqError:
    base = layer.base_layer
    weight = dense.to(base.weight.device, torch.float32)
    rank, scaling = layer.r[adapter], layer.scaling[adapter]
    low_rank: torch.Tensor | float = 0.0
    zero_init = None
    best_error, best = float("inf"), None
    for _ in range(iterations):
        packed = quantize_like(base, weight - low_rank)
        residual = weight - packed.dequantize(torch.float32)
        if zero_init is None:
            zero_init = residual.norm().item()
        left, right = _low_rank_factors(residual, rank)
        low_rank = left @ right
        error = (residual - low_rank).norm().item()
        if error < best_error:
            best_error, best = error, (packed, left, right)
    packed, left, right = best
    set_weight(base, packed)
    lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    lora_a.copy_(right)
    lora_b.copy_(left / scaling)
    norm = max(weight.norm().item(), torch.finfo(torch.float32).tiny)
    return LoftqError(zero_init / norm, best_error / norm)


def _low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L [N, r] and R [r, K], L R the rank-r part of `matrix`, singular values shared evenly."""
    columns = min(rank + _OVERSAMPLING, *matrix.shape)
    u, s, v = torch.svd_lowrank(matrix, q=columns, niter=_POWER_ITERATIONS)
    root = s[:rank].sqrt()
    left = matrix.new_zeros(matrix.shape[0], rank)
    right = matrix.new_zeros(rank, matrix.shape[1])
    left[:, : len(root)] = u[:, :rank] * root
    right[: len(root)] = (v[:, :rank] * root).t()
    return left, right


class _Source:
    """Dense weights by name: from safetensors files, a mapping or a model."""

    def __init__(self, weights: str | Path | Mapping[str, torch.Tensor] | nn.Module) -> None:
        if isinstance(weights, nn.Module):
            weights = weights.state_dict()
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        self._shapes: dict[str, list[int]] = {}
        if isinstance(weights, Mapping):
            self.place = "weights"
            for name, tensor in weights.items():
                if isinstance(tensor, torch.Tensor):
                    self._readers[name] = lambda tensor=tensor: tensor
                    self._shapes[name] = list(tensor.shape)
        else:
            self.place = str(weights)
            self._index_files(Path(weights))

    def _index_files(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: expected a folder with *.safetensors files, found none")
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
            for name in opened.keys():  # noqa: SIM118  (safe_open has no other way to list)
                self._readers[name] = lambda opened=opened, name=name: opened.get_tensor(name)
                self._shapes[name] = opened.get_slice(name).get_shape()

    def find(self, layer_name: str, base: nn.Linear) -> str:
        """The name under which the weight of the layer `layer_name` of a PEFT model is here."""
        name = layer_name.removeprefix("base_model.model.") + ".weight"
        # A base model inside a task model ("model.", "transformer."), or the other way round.
        inside = [known for known in self._shapes if known.endswith("." + name)]
        candidates = [name, name.partition(".")[2], *(inside if len(inside) == 1 else [])]
        found = next((c for c in candidates if c in self._shapes), None)
        if found is None:
            raise ValueError(f"{self.place}: no tensor {name!r} for layer {layer_name!r}")
        if self._shapes[found] != [base.out_features, base.in_features]:
            raise ValueError(
                f"{self.place}: {found}: expected [{base.out_features}, {base.in_features}], "
                f"got {self._shapes[found]}"
            )
        return found

    def read(self, name: str) -> torch.Tensor:
        return self._readers[name]()
