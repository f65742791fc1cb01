"""PEFT on a 4-bit base, unasked: `import halfbyte`, then PEFT as ever.

    y = x deq(W)^T + bias + scaling * (dropout(x) A^T) B^T

    x    [..., K]  fp32, bf16 or fp16
    W    [N, K]    packed 4-bit, inside `halfbyte.nn.NF4Linear`
    A    [R, K]    fp32 (PEFT keeps adapters in fp32 on an integer base)
    B    [N, R]    fp32

PEFT stores the layer that it adapts as `base_layer`; where that is an `NF4Linear`, PEFT's layer
gets a subclass of its own class before its adapter is built. Nothing in PEFT is replaced, and
adapter files are PEFT's own.

    LoRA   one active adapter runs fused (`_lora.py`), DoRA too (`_dora.py`); several at once, mixed
           batches and variants take PEFT's own path on the packed base
    others run as PEFT wrote them, on the packed base or on its dequantized weight (`_packed.py`)
    all    `merge_and_unload` gives dense layers; `merge_adapter` re-quantizes, `unmerge_adapter`
           restores the bytes; what initialises from the base weight sees it dequantized
"""

from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import ParamWrapper
from torch import nn

from halfbyte._plugins import ignore_peft, watch_peft
from halfbyte.integrations.peft._loftq import LoftqError, loftq_initialize
from halfbyte.integrations.peft._lora import LoraLinear
from halfbyte.integrations.peft._packed import (
    PackedTunerLayer,
    RequantizationErrors,
    packed_class,
    requantization_errors,
)
from halfbyte.integrations.peft._training import prepare_model_for_training

__all__ = [
    "LoftqError",
    "LoraLinear",
    "PackedTunerLayer",
    "RequantizationErrors",
    "disable",
    "enable",
    "loftq_initialize",
    "prepare_model_for_training",
    "requantization_errors",
]


def enable() -> None:
    """Adopt PEFT layers again after `disable()`; `import halfbyte` has done it already."""
    watch_peft()


def disable() -> None:
    """Stop adopting layers; those already built keep what they have."""
    ignore_peft()


def adopt(layer: nn.Module) -> None:
    """Give a PEFT tuner layer, which is about to receive its packed base, its class here."""
    if isinstance(layer, ParamWrapper):
        raise TypeError(
            "target_parameters: expected float parameters, got the packed weight of a 4-bit layer; "
            "name the layer in target_modules"
        )
    if type(layer) is PeftLoraLinear:
        layer.__class__ = LoraLinear
    elif not isinstance(layer, PackedTunerLayer):
        layer.__class__ = packed_class(type(layer))
