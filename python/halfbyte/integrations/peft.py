"""PEFT on a 4-bit base: its LoRA layer with the fused op as forward pass.

    y = x deq(W)^T + bias + scaling * (dropout(x) A^T) B^T

    x    [..., K]  fp32, bf16 or fp16
    W    [N, K]    packed 4-bit, inside `halfbyte.nn.NF4Linear`
    A    [R, K]    fp32 (PEFT keeps adapters in fp32 on an integer base)
    B    [N, R]    fp32

`enable()` is all a script needs: PEFT stores the layer it wraps as `base_layer`; torch tells of
every module that is registered, and when an `NF4Linear` goes into a PEFT `lora.Linear`, that
layer becomes a `LoraLinear` before its adapter is built. Nothing in PEFT is replaced, and adapter
files are PEFT's own.

The fused pass covers one active, unmerged, plain LoRA adapter; several adapters at once, mixed
batches and hooked submodules take PEFT's own path, which is correct and slower.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

import halfbyte
from halfbyte.nn import NF4Linear

# Initialisations that need no look at the base weight, as PEFT names them.
_PLAIN_INITS = (True, False, "gaussian", "eva")

_handle = None


def enable() -> None:
    """Give every PEFT LoRA layer built from now on over an NF4Linear the fused forward pass.

    Calling it again changes nothing. `disable()` undoes it for layers yet to be built.
    """
    global _handle
    if _handle is None:
        _handle = register_module_module_registration_hook(_adopt)


def disable() -> None:
    """Stop adopting layers; those already built keep the fused forward pass."""
    global _handle
    if _handle is not None:
        _handle.remove()
        _handle = None


def _adopt(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Registration hook: turn a PEFT lora.Linear that receives an NF4Linear into a LoraLinear."""
    if type(module) is PeftLoraLinear and name == "base_layer" and isinstance(submodule, NF4Linear):
        module.__class__ = LoraLinear


class LoraLinear(PeftLoraLinear):
    """PEFT's `lora.Linear` over an NF4Linear; see the module's docstring for shapes."""

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter. Raises for initialisations and variants that rewrite the base weight."""
        if config.init_lora_weights not in _PLAIN_INITS:
            raise NotImplementedError(
                f"init_lora_weights={config.init_lora_weights!r} rewrites the base weight, which "
                "is packed 4-bit and frozen; expected True, False, 'gaussian' or 'eva'"
            )
        if config.use_dora:
            raise NotImplementedError(
                "use_dora=True needs the norm of the base weight, which is packed 4-bit; "
                "expected use_dora=False"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """y [..., N] for x [..., K], fused where one plain adapter is active."""
        adapter = None if args or kwargs else self._fusable_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base, lora_a, lora_b, dropout = self._parts(adapter)
        # The dropout seed is drawn inside, from torch's default generator, whose state gradient
        # checkpointing restores: the recomputed forward pass gets the same mask.
        return halfbyte.lora_linear(
            x,
            base.nf4_weight,
            lora_a.weight,
            lora_b.weight,
            self.scaling[adapter],
            bias=base.bias,
            dropout=dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        )

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
        """The one active adapter if the fused op computes exactly what PEFT would, else None."""
        if self.disable_adapters or self.merged:
            return None
        adapters = self._modules["lora_A"]._modules
        active = [name for name in self.active_adapters if name in adapters]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        parts = base, lora_a, lora_b, dropout = self._parts(active[0])
        plain = (
            isinstance(base, NF4Linear)
            and type(lora_a) is nn.Linear
            and type(lora_b) is nn.Linear
            and lora_b.bias is None
            and type(dropout) in (nn.Dropout, nn.Identity)
        )
        return active[0] if plain and not any(map(_has_hooks, parts)) else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: adding to packed codes would corrupt them."""
        if not check_adapters_to_merge(self, adapter_names):
            return
        raise NotImplementedError(
            "merge_adapter() changes the base weight in place, and the base is packed 4-bit; "
            "use merge_and_unload(), which returns dense weights"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """What PEFT puts in this layer's place for unload() and merge_and_unload().

        merge=False gives the 4-bit base layer back, merge=True a dense nn.Linear
        W = deq(W) + sum of scaling * B A, summed in fp32, in the dtype the base was packed from.
        """
        if not merge:
            return self.base_layer
        dense = self.base_layer.to_linear(torch.float32)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_B[name].bias is not None:
                raise NotImplementedError(f"adapter {name!r}: only plain LoRA can be merged")
            dense.weight.data += self.get_delta_weight(name).detach().float()
            if safe_merge and not torch.isfinite(dense.weight).all():
                raise ValueError(f"adapter {name!r}: expected finite weights, got NaN or infinity")
        return dense.to(self.base_layer.weight_dtype)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
