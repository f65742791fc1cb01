"""PEFT's LoRA on packed experts, named by `LoraConfig(target_parameters=[...])`.

    y = x W[e]^T + scaling * (x A[e]^T) B[e]^T       W [E, N, K], A [E, R, K], B [E, N, R]

PEFT wraps the experts module in a `ParamWrapper` for each parameter and adds the product B A to the
dense parameter while the module runs. Over packed experts the subclass here hands A and B to the
module instead, which runs each expert's matrix and adapter in one fused operation. Parameters,
initialisation and adapter files are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from halfbyte.integrations.experts import PARAMETERS, NF4Experts

MAX_RANK = 512  # of the fused operation


class ParamWrapper(PeftParamWrapper):
    """PEFT's `ParamWrapper` over an `NF4Experts`; PEFT looks for the class by this name."""

    def get_param(self) -> torch.Tensor:
        """A stand-in of the parameter's dense shape, on its device, that takes no memory.

        It is uint8, as the packed bytes are, so that PEFT keeps adapters in float32.
        """
        if self.parameter_name not in PARAMETERS:
            raise ValueError(
                f"target_parameters: expected one of {PARAMETERS} of packed experts, "
                f"got {self.parameter_name!r}"
            )
        experts = self._experts()
        packed = getattr(experts, self.parameter_name)
        return packed.new_zeros(()).expand(experts.shapes[self.parameter_name])

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        """Add an adapter; ValueError for a rank above 512 and for initialisations that read the
        base weight."""
        if r > MAX_RANK:
            raise ValueError(f"r: expected a rank of 1 to {MAX_RANK}, got {r}")
        if config.init_lora_weights not in (True, False, "gaussian", "eva"):
            raise ValueError(
                "init_lora_weights: expected True, False, 'gaussian' or 'eva' on packed experts, "
                f"got {config.init_lora_weights!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _experts(self) -> NF4Experts:
        return self.get_base_layer()

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [E, R, K] and B [E, N, R], scaling in B; PEFT stacks experts differently in each."""
        lora_a, lora_b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        lora_a = lora_a.reshape(self.num_experts, -1, lora_a.shape[-1])
        lora_b = lora_b.reshape(lora_b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return lora_a, lora_b * self.scaling[adapter]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Hands the adapters to the experts while they run; several are one of their ranks' sum."""
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        parts = [self._factors(name) for name in adapters]
        lora_a = torch.cat([a for a, _ in parts], 1)
        lora_b = torch.cat([b for _, b in parts], 2)
        if lora_a.shape[1] > MAX_RANK:
            raise ValueError(
                f"adapters {adapters}: expected ranks of {MAX_RANK} at most in sum, "
                f"got {lora_a.shape[1]}"
            )
        active = self._experts().adapters
        active[self.parameter_name] = (lora_a, lora_b, 1.0)
        try:
            yield
        finally:
            del active[self.parameter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: adding to packed codes would corrupt them."""
        if check_adapters_to_merge(self, adapter_names):
            raise NotImplementedError(
                "merge_adapter() changes packed experts in place; use merge_and_unload(), which "
                "returns dense experts"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The packed experts for unload(); for merge_and_unload() dense ones with
        W[e] + sum of scaling * B[e] A[e], summed in float32, in the dtype they were packed from."""
        packed = self._experts()
        if not merge:
            return packed
        dense = packed.to_experts(torch.float32)
        wrapper: nn.Module = self
        while isinstance(wrapper, ParamWrapper):
            weight = getattr(dense, wrapper.parameter_name)
            for name in check_adapters_to_merge(wrapper, adapter_names):
                if name in wrapper.lora_A:
                    lora_a, lora_b = wrapper._factors(name)
                    weight.data += (lora_b.float() @ lora_a.float()).detach()
            wrapper = wrapper.base_layer
        if safe_merge and not all(p.isfinite().all() for p in dense.parameters()):
            raise ValueError(f"adapters {adapter_names}: the merged experts are not finite")
        return dense.to(packed.weight_dtype)
