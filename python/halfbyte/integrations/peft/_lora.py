"""PEFT's LoRA layer over a packed base, in one fused operation where one adapter is active.

    plain    y = x W^T + bias + scaling * (b_B + (dropout(x) A^T) B^T)      b_B: `lora_bias=True`
    DoRA     see `_dora.py`

Fused: one active, unmerged adapter of rank 512 at most, plain or DoRA, without hooks on its parts.
Several adapters at once, mixed batches (`adapter_names=`), other variants and hooked parts take
PEFT's own path, which calls the packed base and is correct and slower. A variant that this file
does not know runs on the dequantized weight.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import LoraConfig
from torch import nn

from halfbyte.integrations.peft._dora import DoraVariant, dora_forward
from halfbyte.integrations.peft._packed import PackedTunerLayer
from halfbyte.nn import NF4Linear

# Initialisations that need no look at the base weight, as PEFT names them.
_PLAIN_INITS = (True, False, "gaussian", "eva")
# Variants that never look at the base weight; DoRA here takes its norm from the packed one.
_PLAIN_VARIANTS = ("NoneType", "ALoraLinearVariant", "DoraVariant")
# Variants whose forward pass calls the base only, whatever their initialisation does.
_CALLING_VARIANTS = (
    "ALoraLinearVariant",
    "ArrowLinearVariant",
    "BdLoraLinearVariant",
    "DoraVariant",
    "KasaLinearVariant",
    "MiCALinearVariant",
    "MontecloraLinearVariant",
    "VeloraLinearVariant",
)
_MAX_RANK = 512


class LoraLinear(PackedTunerLayer, PeftLoraLinear):
    """PEFT's `lora.Linear` over an NF4Linear; see the module's docstring for the formula."""

    @property
    def lora_variants(self) -> dict:
        return super().lora_variants | {("use_dora",): DoraVariant}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter. Initialisations that look at the base weight see it dequantized; those
        that rewrite it (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA) leave Q(W - scaling B A), whose error
        `requantization_errors` tells.
        """
        if config.init_lora_weights == "loftq":
            warnings.warn(
                "init_lora_weights='loftq' needs the weights from before quantization, which a "
                "4-bit base no longer has; B starts at zero. Call "
                "halfbyte.integrations.peft.loftq_initialize(model, weights) with them.",
                stacklevel=2,
            )
        arguments = {"lora_alpha": lora_alpha, "config": config, **kwargs}
        variant = self.resolve_lora_variant(config=config)
        plain = config.init_lora_weights in (*_PLAIN_INITS, "loftq")
        if plain and type(variant).__name__ in _PLAIN_VARIANTS:
            PeftLoraLinear.update_layer(self, adapter_name, r, **arguments)
        else:
            super().update_layer(adapter_name, r, **arguments)

    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        """The start that needs no residual: A as PEFT draws it, B zero."""
        self.reset_lora_parameters(adapter_name, True)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """y [..., N] for x [..., K], fused where one plain or DoRA adapter is active."""
        adapter = None if args or kwargs else self._fusable_adapter()
        if adapter is None:
            return self._peft_forward(x, *args, **kwargs)
        base, lora_a, lora_b, dropout = self._parts(adapter)
        scaling = self.scaling[adapter]
        rate = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        if adapter in self.lora_variant:
            magnitude = self.lora_magnitude_vector[adapter].weight
            weights = (lora_a.weight, lora_b.weight)
            return dora_forward(x, base, *weights, scaling, magnitude, rate)
        # The dropout seed is drawn inside, from torch's default generator, whose state gradient
        # checkpointing restores: the recomputed forward pass gets the same mask.
        y = base.lora_forward(x, lora_a.weight, lora_b.weight, scaling, rate)
        return y if lora_b.bias is None else y + (lora_b.bias * scaling).to(y.dtype)

    def _peft_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        variants = {type(variant).__name__ for variant in self.lora_variant.values()}
        if not variants or self.merged or self.disable_adapters or self._packed_base() is None:
            return PeftLoraLinear.forward(self, x, *args, **kwargs)
        self._truncate_for_kasa()
        if variants.issubset(_CALLING_VARIANTS):
            return PeftLoraLinear.forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def _merge_into_dense(self, names: list[str], safe_merge: bool) -> tuple[nn.Linear, list[str]]:
        self._truncate_for_kasa()
        return super()._merge_into_dense(names, safe_merge)

    def _truncate_for_kasa(self) -> None:
        """KaSA truncates W at last, if its adapter was built without data (low_cpu_mem_usage)."""
        waiting = getattr(self, "_lora_kasa_truncation_deferred", None)
        if not waiting:
            return
        with self._rewritable_base():
            for adapter in list(waiting):
                self.lora_variant[adapter]._apply_deferred_truncation(self, adapter)

    def _parts(self, adapter: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """base_layer, A, B and dropout. Looked up where nn.Module keeps them: its attribute access
        costs as much as a small product when tokens are generated one by one."""
        modules = self._modules
        return (
            modules["base_layer"],
            modules["lora_A"]._modules[adapter],
            modules["lora_B"]._modules[adapter],
            modules["lora_dropout"]._modules[adapter],
        )

    def _fusable_adapter(self) -> str | None:
        """The one active adapter if a fused pass computes exactly what PEFT would, else None."""
        if self.disable_adapters or self.merged:
            return None
        adapters = self._modules["lora_A"]._modules
        active = [name for name in self.active_adapters if name in adapters]
        if len(active) != 1:
            return None
        variant = self.lora_variant.get(active[0])
        parts = base, lora_a, lora_b, dropout = self._parts(active[0])
        known = (
            (variant is None or (type(variant) is DoraVariant and lora_b.bias is None))
            and isinstance(base, NF4Linear)
            and type(lora_a) is nn.Linear
            and type(lora_b) is nn.Linear
            and lora_a.out_features <= _MAX_RANK
            and type(dropout) in (nn.Dropout, nn.Identity)
        )
        return active[0] if known and not any(map(_has_hooks, parts)) else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
