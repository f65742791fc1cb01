"""The README's library example runs as it stands, and trains what it says it trains."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

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


def test_the_library_example():
    code = README.read_text().split("```python\n")[1].split("```")[0]
    names = {"MyTransformer": MyTransformer, "tokens": torch.randint(0, 50, (2, 9))}
    exec(compile(code, str(README), "exec"), names)
    model, adapters = names["model"], names["adapters"]
    assert len(adapters) == 4 and all(p.grad is not None for p in adapters)
    assert type(model.lm_head) is nn.Linear
    assert float(names["loss"]) > 0
