"""The README's examples run as they stand, and train what they say they train."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from torch import nn

import halfbyte.integrations.peft
import tiny_model
from halfbyte.nn import NF4Linear

README = Path(__file__).resolve().parents[2] / "README.md"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(64, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        return self.out(torch.tanh(self.query(x)))


class MyTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 50)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(x)
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        )


def example(sign: str) -> str:
    """The first Python block that holds `sign`."""
    blocks = [part.split("```")[0] for part in README.read_text().split("```python\n")[1:]]
    return next(block for block in blocks if sign in block)


def test_the_library_example():
    code = example("MyTransformer")
    names = {"MyTransformer": MyTransformer, "tokens": torch.randint(0, 50, (2, 9))}
    exec(compile(code, str(README), "exec"), names)
    model, adapters = names["model"], names["adapters"]
    assert len(adapters) == 4 and all(p.grad is not None for p in adapters)
    assert type(model.lm_head) is nn.Linear
    assert float(names["loss"]) > 0


def test_the_trainer_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_model(tmp_path / "my-model")
    dataset = datasets.Dataset.from_dict({"text": ["red is a colour"] * 8})
    names = {"dataset": dataset}
    exec(compile(example("SFTTrainer"), str(README), "exec"), names)
    model, optimizer = names["trainer"].model, names["trainer"].optimizer.optimizer
    assert type(optimizer) is halfbyte.optim.PagedAdamW8bit and len(optimizer.state) > 0
    layers = dict(model.named_modules())
    fused = [m for n, m in layers.items() if n.endswith("q_proj")]
    assert fused and all(type(m) is halfbyte.integrations.peft.LoraLinear for m in fused)
    assert all(isinstance(m.base_layer, NF4Linear) and m.lora_B.default.weight.any() for m in fused)
