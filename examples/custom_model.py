"""A model of your own on halfbyte's functions alone: no transformers, no modules of halfbyte.

    python examples/custom_model.py

A small character model learns Python source in float32. Its projections are then packed to 4 bits,
and adapters learn another text, the Zen of Python, through the packed weights.
"""

import argparse
import codecs
import contextlib
import inspect
import io
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

import halfbyte

WIDTH, HEADS, LAYERS, CONTEXT, VOCABULARY = 64, 4, 2, 64, 128


class Projection(nn.Module):
    """y = x W^T; once packed, y = x W^T + (alpha / r) * (dropout(x) A^T) B^T with W in 4 bits."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.dense = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def pack(self, r: int, alpha: float, dropout: float) -> None:
        """Replace W by 4 bits and add A [r, K] and B [N, r]."""
        outputs, inputs = self.dense.shape
        self.weight = halfbyte.quantize_nf4(self.dense)
        self.dense = None
        self.a = nn.Parameter(torch.randn(r, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, r))
        self.scaling, self.dropout = alpha / r, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense is not None:
            return F.linear(x, self.dense)
        dropout = self.dropout if self.training else 0.0
        return halfbyte.lora_linear(x, self.weight, self.a, self.b, self.scaling, dropout=dropout)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = Projection(WIDTH, 3 * WIDTH), Projection(WIDTH, WIDTH)
        self.up, self.down = Projection(WIDTH, 4 * WIDTH), Projection(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1]) + self.position[: tokens.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def pack(model: Model, r: int = 8, alpha: float = 16, dropout: float = 0.05) -> None:
    """Freeze the model, pack its projections and give them adapters."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Projection):
            module.pack(r, alpha, dropout)


def train(model: Model, text: torch.Tensor, steps: int, lr: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = halfbyte.optim.AdamW8bit(trained, lr=lr)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (16,))
        loss = model.loss(torch.stack([text[i : i + CONTEXT] for i in starts]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure(model: Model, text: torch.Tensor) -> float:
    """Loss in nats a character over the text, without dropout."""
    model.eval()
    loss = model.loss(text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)).item()
    model.train()
    return loss


def characters(text: str) -> torch.Tensor:
    return torch.tensor([min(ord(c), VOCABULARY - 1) for c in text])


def zen() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each training")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    source, new = characters(inspect.getsource(textwrap)), characters(zen())
    model = Model()
    train(model, source, steps, lr=3e-3)
    print(f"dense: Python source {measure(model, source):.3f}, Zen {measure(model, new):.3f}")
    pack(model)
    bits = [m.weight.bits_per_parameter for m in model.modules() if isinstance(m, Projection)]
    print(
        f"packed, {sum(bits) / len(bits):.3f} bits a weight: "
        f"Python source {measure(model, source):.3f}, Zen {measure(model, new):.3f}"
    )
    train(model, new, steps, lr=3e-3)
    print(f"adapters trained: Zen {measure(model, new):.3f}")


if __name__ == "__main__":
    main()
