"""Which tensor of a training step was the first that is not finite.

A loss of inf or nan comes from a parameter or from the first layer whose output is not finite;
gradients are looked at in the order of the parameters, before clipping spreads one bad element to
all of them.
"""

from typing import Any

import torch
from torch import nn

from halfbyte.ops import adamw8


def bad_gradient(model: nn.Module) -> str | None:
    """The first element of all gradients that is not finite, in words; None if there is none."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    row, index = adamw8.first_nonfinite([grad for _, grad in named])
    if (row, index) == adamw8.FINITE:
        return None
    name, grad = named[row]
    return f"the gradient of {name} {_element(grad, index)}"


def bad_tensor(backbone: nn.Module, inputs: dict[str, Any]) -> str | None:
    """The first parameter, or else the first layer's output, that is not finite, in words.

    Runs the backbone once more, without gradients and without moving torch's generator; None if
    all is finite (then it is the head or the loss).
    """
    for name, parameter in backbone.named_parameters():
        found = _first(parameter)
        if found is not None:
            return f"the parameter {name} {found}"
    found_in: list[str] = []
    hooks = [
        module.register_forward_hook(_look(name, found_in))
        for name, module in backbone.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    return found_in[0] if found_in else None


def _look(name: str, found_in: list[str]):
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and not found_in:
            found = _first(first)
            if found is not None:
                found_in.append(f"the output of {name} {found}")

    return hook


def _first(tensor: torch.Tensor) -> str | None:
    if not tensor.is_floating_point():
        return None
    _, index = bad = adamw8.first_nonfinite([tensor.detach()])
    return None if bad == adamw8.FINITE else _element(tensor, index)


def _element(tensor: torch.Tensor, index: int) -> str:
    where = [int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape)]
    return f"is {tensor.detach()[tuple(where)].item()} at {where}"
