"""Decoders for the end-to-end benchmarks: made once on disk, loaded by each system in its way.

    smollm2     SmolLM2-135M, real weights: the demo's model (needs the demo's packages)
    tinyllama   the shape of TinyLlama-1.1B, random weights
    llama7b     the shape of Llama-2-7B, random weights
    tiny        two small layers, random weights: to see that a benchmark runs

    halfbyte             NF4 base, PEFT's LoRA layers with halfbyte's fused forward pass
    PEFT + bitsandbytes  the same NF4 codes in bitsandbytes' layers, PEFT's own LoRA layers
    PEFT bf16            a dense bf16 base of the dequantized weights, PEFT's own LoRA layers

All three compute one function: the dense base holds what the packed bytes stand for, the head stays
dense in bf16, and adapters start from the same values.
"""

from __future__ import annotations

from pathlib import Path

import torch

SYSTEMS = ("halfbyte", "PEFT + bitsandbytes", "PEFT bf16")
SHAPES = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    },
}
NAMES = ("smollm2", *SHAPES)


def describe(model: str, layers: int | None) -> str:
    """The model's name in a table: says where it has fewer layers or no trained weights."""
    if model == "smollm2":
        return "SmolLM2-135M"
    all_layers = SHAPES[model]["num_hidden_layers"]
    return f"{model} shape, {layers or all_layers} of {all_layers} layers, random weights"


def load_smollm2():
    """(SmolLM2-135M dense in bfloat16, its tokenizer): the dequantized Q4_1 release."""
    from halfbyte.finetune import demo
    from halfbyte.integrations.model_sources import open_model
    from halfbyte.integrations.streaming import load_dense

    package = demo._package_folder(demo.MODEL_PACKAGE, demo.MODEL_REQUIREMENT)
    source = package / demo.MODEL_FILE
    return load_dense(source, torch.bfloat16), open_model(source).tokenizer()


def prepare(model: str, layers: int | None, folder: Path) -> Path:
    """A Hugging Face folder in bf16; random weights are written to `folder`."""
    import transformers

    if model == "smollm2":
        if layers:
            raise ValueError("smollm2 is a trained model: expected no --layers")
        dense, tokenizer = load_smollm2()
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    settings = SHAPES[model] | ({"num_hidden_layers": layers} if layers else {})
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.save_pretrained(folder)
    return folder


def load_base(system: str, folder: Path):
    """The base model of one system."""
    import transformers

    import halfbyte

    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    if system == "PEFT + bitsandbytes":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if system == "PEFT + bitsandbytes":
        return model
    halfbyte.quantize_(model)
    return _densify(model) if system == "PEFT bf16" else model


def _densify(model):
    """Every packed layer as a dense one with the weight that its bytes stand for."""
    from halfbyte.nn import NF4Linear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NF4Linear):
                setattr(parent, name, child.to_linear(torch.bfloat16))
    return model


def add_adapter(system: str, model, rank: int, started: bool = False):
    """LoRA on every linear layer but the head; `started`: B is not zero, as after training."""
    import peft

    from halfbyte.integrations import peft as bridge

    if system != "halfbyte":
        bridge.disable()
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = peft.get_peft_model(model, settings)
    bridge.enable()
    if started:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.02, generator=generator)
    return model
