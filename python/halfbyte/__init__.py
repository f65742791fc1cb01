"""halfbyte: 4-bit QLoRA fine-tuning, native on CPU and CUDA.

weight = halfbyte.quantize_nf4(w)                      # 4.127 bits a parameter
y = halfbyte.lora_linear(x, weight, a, b, scaling=2.0)  # fused forward, fused backward
halfbyte.quantize_(model)                              # every linear layer of a model, in place
optimizer = halfbyte.optim.AdamW8bit(adapter_parameters)
"""

import importlib
from typing import Any

from halfbyte import nn, optim
from halfbyte._native import _C
from halfbyte._plugins import watch_peft
from halfbyte.autograd import LoraLinearFunction, lora_linear, nf4_linear
from halfbyte.nf4_weight import NF4Weight, quantize_4bit, quantize_nf4
from halfbyte.nn import quantize_
from halfbyte.variants import cpu_features, cuda_devices, cuda_status, variants

watch_peft()


def __getattr__(name: str) -> Any:
    """`NF4Config`, with transformers, when it is first asked for."""
    if name == "NF4Config":
        return importlib.import_module("halfbyte.integrations.transformers").NF4Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = _C.__version__
__all__ = [
    "LoraLinearFunction",
    "NF4Weight",
    "cpu_features",
    "cuda_devices",
    "cuda_status",
    "lora_linear",
    "nf4_linear",
    "nn",
    "optim",
    "quantize_",
    "quantize_4bit",
    "quantize_nf4",
    "variants",
]
