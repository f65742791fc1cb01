"""What the distributed workers share: a small 4-bit decoder in plain torch, a batch, and measures
of how far losses and gradients of several processes lie from those of one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import halfbyte

VOCABULARY, ROWS, LENGTH = 320, 8, 12


class Block(nn.Module):
    """x + LoRA MLP(norm(x)); inner sizes that neither blocks nor processes divide."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = halfbyte.nn.LoraLinear.from_linear(nn.Linear(width, inner, bias=False), r=3)
        self.down = halfbyte.nn.LoraLinear.from_linear(nn.Linear(inner, width, bias=False), r=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """Token ids [B, T] -> mean cross entropy of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 42)
        self.blocks = nn.ModuleList(Block(42, 107) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = x @ self.embed.weight.T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def decoder() -> Decoder:
    """The same in every process; its adapters train, and their B is not zero."""
    torch.manual_seed(0)
    model = Decoder().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            nn.init.normal_(parameter, std=0.1)
    return model


def batch() -> torch.Tensor:
    """[ROWS, LENGTH] token ids."""
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def mine(tokens: torch.Tensor) -> torch.Tensor:
    """This process's rows of a batch."""
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss over tokens; every row has as many."""
    inner = model.module if hasattr(model, "module") else model
    if isinstance(inner, Decoder):
        return model(tokens)
    return model(input_ids=tokens, labels=tokens).loss


def mean_over_processes(value: torch.Tensor) -> float:
    value = value.detach().double().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def gathered(value) -> list:
    """`value` of each process."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together again; a collective call."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, whole."""
    return {name: whole(parameter) for name, parameter in named_trainable(model).items()}


def reference(model: nn.Module, parts: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """One process, the whole batch: loss and gradients, the fp32 mean over `parts` of the rows."""
    losses, sums = [], {}
    for rows in batch().chunk(parts):
        model.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in named_trainable(model).items():
            sums[name] = sums.get(name, 0) + parameter.grad.float() / parts
    return sum(losses) / parts, sums


def compare(model: nn.Module, expected: tuple[float, dict[str, torch.Tensor]]) -> dict[str, float]:
    """Loss and gradients of all processes on their rows, beside those of one process.

    The distance is the largest |g - expected| / |expected| over the adapters' tensors.
    """
    loss = loss_of(model, mine(batch()))
    loss.backward()
    grads = {n: whole(p.grad).float() for n, p in named_trainable(model).items()}
    assert grads.keys() == expected[1].keys() and grads
    distances = [((grads[n] - g).norm() / g.norm()).item() for n, g in expected[1].items()]
    return {
        "loss": mean_over_processes(loss),
        "expected_loss": expected[0],
        "distance": max(distances),
    }


def train(model: nn.Module, optimizer, steps: int) -> list[float]:
    """Losses of `steps` steps on the batch."""
    losses = []
    for _ in range(steps):
        loss = loss_of(model, mine(batch()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(loss))
    return losses
