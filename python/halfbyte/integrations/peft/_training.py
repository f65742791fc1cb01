"""What a 4-bit model needs before it is trained with adapters."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def prepare_model_for_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze `model` and switch gradient checkpointing on; call before `get_peft_model`.

    Every parameter stops requiring gradients. Dtypes are left as they are: packed weights have
    none to change, transformers' norms compute in float32 whatever dtype holds their weights, and a
    float32 embedding or norm weight would pull the layers after it to float32. (PEFT's
    `prepare_model_for_kbit_training` casts embeddings, norms and head to float32, and leaves
    checkpointing off for quantization methods that it does not know.)

    `gradient_checkpointing_kwargs` default to `{"use_reentrant": False}`. The embeddings' output is
    made to require gradients, so that reentrant checkpointing works too. Returns `model`. Raises
    ValueError for a model that has adapters already, or no gradient checkpointing.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("model: expected one without adapters; call this before get_peft_model")
    if use_gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            "model: expected a method gradient_checkpointing_enable, as transformers' models have, "
            f"got {type(model).__name__}; pass use_gradient_checkpointing=False"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_gradient_checkpointing:
        model.enable_input_require_grads()
        settings = gradient_checkpointing_kwargs or {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model
