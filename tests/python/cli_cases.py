"""Folders and calls for the tests of commands that work on a base and its adapters."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from halfbyte.cli.main import app
from tiny_model import build_config, build_tokenizer


def save_base(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A tiny Llama with its tokenizer, in several files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(**changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    build_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1, **changes) -> Path:
    """A LoRA adapter with random factors, saved by PEFT."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_dense(base), LoraConfig(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def load_dense(base: Path):
    """The folder as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(base).eval()


def load_merged(base: Path, adapter: Path):
    """PEFT's own merge."""
    return PeftModel.from_pretrained(load_dense(base), adapter).merge_and_unload().eval()


def run(*arguments: object, code: int = 0, text: str | None = None) -> Result:
    """Run `halfbyte ...`; fails unless it ends with `code`."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=text)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    assert "Traceback" not in result.output
    return result


def error(*arguments: object, text: str | None = None) -> str:
    """The one line on stderr of a call that a user has to put right."""
    lines = run(*arguments, code=2, text=text).stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
