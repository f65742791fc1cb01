"""A tiny 4-bit Llama with PEFT's LoRA, the same in every process."""

import peft
import torch
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.integrations import peft as bridge
from tiny_model import build_config


def build(dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """2 layers, NF4 with double quantization, rank-4 LoRA in `dtype`, B not zero."""
    bridge.enable()
    torch.manual_seed(0)
    model = halfbyte.quantize_(LlamaForCausalLM(build_config()).requires_grad_(False))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def in_bf16() -> peft.PeftModel:
    """Floating-point parameters in bf16, as a mixed-precision policy gathers them; not buffers."""
    model = build()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model
