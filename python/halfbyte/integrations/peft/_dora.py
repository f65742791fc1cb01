"""DoRA on a packed base: W' = diag(m / ||W + s B A||) (W + s B A), row norms, s = scaling.

    g = m / ||W + s B A||_row     [N], the norm held constant for the gradient (section 4.3)
    y = bias + g * (x W^T + s (x A^T) B^T)                                  without dropout
    y = bias + (x - d) W^T + g * (d W^T + s (d A^T) B^T),  d = dropout(x)   as PEFT defines it

The products are the fused LoRA operation. The norm takes W by panels of a few rows, dequantized one
after another, in float32; nothing is cached, so nothing goes stale. Source: Liu et al. 2024, DoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from halfbyte.nf4_weight import NF4Weight
from halfbyte.nn import NF4Linear


@torch.no_grad()
def adapted_row_norms(
    weight: NF4Weight, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||W[n] + scaling B[n] A|| for every row n, float32 [N]."""
    a, b = lora_a.float(), lora_b.float()
    norms = [
        torch.linalg.vector_norm(panel.addmm_(b[rows], a, alpha=scaling), dim=1)
        for rows, panel in weight.row_panels()
    ]
    return torch.cat(norms)


def dora_forward(
    x: torch.Tensor,
    base: NF4Linear,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    """y [..., N] in x's dtype (under autocast: autocast's); see the module's docstring."""
    norms = adapted_row_norms(base.nf4_weight, lora_a, lora_b, scaling)
    gain = magnitude / norms
    inside = nn.functional.dropout(x, dropout) if dropout else x
    y = base.lora_forward(inside, lora_a, lora_b, scaling)
    scaled = y * gain if base.bias is None else (y - base.bias) * gain
    if dropout:
        return (base.lora_forward(x - inside, None, None) + scaled).to(y.dtype)
    return (scaled if base.bias is None else scaled + base.bias).to(y.dtype)


class DoraVariant(DoraLinearVariant):
    """PEFT's variant with norms from packed weights, for what `dora_forward` does not cover."""

    @staticmethod
    def init(module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        base = module.get_base_layer()
        lora_a, lora_b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        if not isinstance(base, NF4Linear) or lora_a.is_meta or module.ephemeral_gpu_offload:
            DoraLinearVariant.init(module, adapter_name, **kwargs)
            return
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        norms = adapted_row_norms(base.nf4_weight, lora_a, lora_b, module.scaling[adapter_name])
        layer = DoraLinearLayer(fan_in_fan_out=False)
        layer.weight = nn.Parameter(norms)
        module.lora_magnitude_vector[adapter_name] = layer
