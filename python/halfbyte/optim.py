"""AdamW with 8-bit state: 2.03 bytes a parameter, not 8, and one native pass over all parameters.

The update is torch's AdamW (decoupled decay, then the step), computed in fp32 from fresh moments;
between steps each moment is an 8-bit code with one fp32 scale a block of 256 (`ops/adamw8.py` and
the C++ header `adamw8_format.h` hold the formats).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from halfbyte.ops import adamw8

__all__ = ["AdamW8bit", "NonFiniteGradient"]


class NonFiniteGradient(RuntimeError):
    """A gradient holds an infinity or a NaN; names the parameter and the element."""


class _Kept:
    """A parameter's loaded state. torch's `load_state_dict` casts tensors to the parameter's dtype;
    what it does not know it leaves alone."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state


class AdamW8bit(Optimizer):
    """AdamW whose moments are kept in blocks of 8-bit codes.

        p <- p (1 - lr weight_decay)
        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer: float32,
            bfloat16 or float16 on the CPU, gradients in the same dtype or in float32, of any
            strides.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        state: "ratio" keeps m / sqrt(v) and sqrt(v), which follows fp32 AdamW most closely;
            "moments" keeps m and v.
        min_8bit_size: tensors with fewer elements keep fp32 moments.
        on_nonfinite: what a gradient with an infinity or a NaN does, before anything has changed:
            "raise" a NonFiniteGradient naming the parameter and the element, or "skip" the whole
            step and count it in `skipped_steps`.

    Each group may set its own lr, betas, eps, weight_decay, maximize, state and min_8bit_size.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: str = "ratio",
        min_8bit_size: int = 4096,
        on_nonfinite: str = "raise",
        maximize: bool = False,
    ):
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.skipped_steps = 0
        self._table: adamw8.StepTable | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state": state,
            "min_8bit_size": min_8bit_size,
            "block_size": adamw8.BLOCK,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options fall back to the optimizer's."""
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, param in enumerate(group["params"]):
            if param.dtype not in adamw8.PARAM_DTYPES:
                name = _describe(group, len(self.param_groups) - 1, i)
                self.param_groups.pop()
                raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {param.dtype}")

    def __getstate__(self) -> dict[str, Any]:
        kept = {"on_nonfinite": self.on_nonfinite, "skipped_steps": self.skipped_steps}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state.get("state", {})
        for key, value in loaded.items():
            if isinstance(value, _Kept):
                loaded[key] = value.state
        super().__setstate__(state)
        self._table = None

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, groups = self._with_gradients()
        if not params:
            return loss
        scalars = [_scalars(group) for group in self.param_groups]
        table = self._table_for(params, grads, groups)
        if table.takes(params, grads):
            row, index = table.run(params, grads, scalars)
        else:
            self._check_tensors(params, grads, groups)
            row, index = table.run_any(params, grads, scalars)
        if row < 0:
            torch.autograd.graph.increment_version(params)
        elif self.on_nonfinite == "skip":
            self.skipped_steps += 1
        else:
            raise NonFiniteGradient(
                self._nonfinite_message(params[row], grads[row], groups[row], index)
            )
        return loss

    def _with_gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        params, grads, groups = [], [], []
        for i, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    params.append(param)
                    grads.append(grad)
                    groups.append(i)
        return params, grads, groups

    def _check_tensors(self, params, grads, groups) -> None:
        for param, grad, group in zip(params, grads, groups, strict=True):
            problem = adamw8.tensor_problem(param, grad)
            if problem:
                raise ValueError(f"{self._name_of(param, group)}: {problem}")

    def _table_for(self, params, grads, groups) -> adamw8.StepTable:
        """The table of the last step where it still holds, otherwise a new one."""
        states = [self.state[param] for param in params]
        if self._table is not None and self._table.holds(params, states, groups):
            return self._table
        self._check_tensors(params, grads, groups)
        encodings = []
        for param, group, state in zip(params, groups, states, strict=True):
            options = self.param_groups[group]
            if not state:
                state.update(adamw8.new_state(param.shape, _encoding(param, options)))
            coded = state["exp_avg"].dtype == torch.uint8
            encoding = options["state"] if coded else "float32"
            problem = adamw8.state_problem(state, adamw8.state_layout(param.shape, encoding))
            if problem:
                raise ValueError(f"{self._name_of(param, group)}: its state: {problem}")
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and not (value.is_cpu and value.is_contiguous()):
                    state[name] = value.to("cpu").contiguous()
            encodings.append(encoding)
        self._table = adamw8.StepTable(params, states, groups, encodings)
        return self._table

    def _name_of(self, param: torch.Tensor, group: int) -> str:
        members = self.param_groups[group]["params"]
        index = next(i for i, member in enumerate(members) if member is param)
        return _describe(self.param_groups[group], group, index)

    def _nonfinite_message(self, param, grad, group: int, index: int) -> str:
        where = [int(i) for i in torch.unravel_index(torch.tensor(index), grad.shape)]
        value = grad[tuple(where)].item()
        return (
            f"{self._name_of(param, group)}: gradient is {value} at {where} (flat index {index}); "
            "nothing was changed"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit: codes stay uint8 and scales fp32 whatever
        the parameters' dtype. One that does not fit raises before anything changes."""
        # A pre-hook of our own, after the user's, shields the state from torch's casts.
        handle = self.register_load_state_dict_pre_hook(AdamW8bit._checked_state_dict)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _checked_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved_groups = state_dict["param_groups"]
        expected = [len(group["params"]) for group in self.param_groups]
        got = [len(saved["params"]) for saved in saved_groups]
        if got != expected:
            raise ValueError(
                f"load_state_dict: expected groups of {expected} parameters, got {got}"
            )
        loaded = dict(state_dict["state"])
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            _check_saved_group(saved, group, i)
            for j, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                if key in loaded:
                    layout = adamw8.state_layout(param.shape, _encoding(param, saved))
                    name = _describe(group, i, j)
                    loaded[key] = _Kept(_copied_state(loaded[key], layout, name))
        return {**state_dict, "state": loaded}


def _encoding(param: torch.Tensor, options: dict[str, Any]) -> str:
    return options["state"] if param.numel() >= options["min_8bit_size"] else "float32"


def _scalars(group: dict[str, Any]) -> tuple[float, float, float, float, float, bool]:
    beta1, beta2 = group["betas"]
    return (
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group["maximize"]),
    )


def _describe(group: dict[str, Any], group_index: int, index: int) -> str:
    names = group.get("param_names")
    name = f" ('{names[index]}')" if names else ""
    return f"parameter {index} of group {group_index}{name}"


def _check_options(options: dict[str, Any]) -> None:
    lr, beta1, beta2, eps, weight_decay, _ = _scalars(options)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    for i, beta in enumerate((beta1, beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, got {beta}")
    if options["state"] not in adamw8.ENCODINGS:
        raise ValueError(f"state: expected 'ratio' or 'moments', got {options['state']!r}")
    if options["min_8bit_size"] < 0:
        raise ValueError(f"min_8bit_size: expected >= 0, got {options['min_8bit_size']}")
    if options["block_size"] != adamw8.BLOCK:
        raise ValueError(f"block_size: expected {adamw8.BLOCK}, got {options['block_size']}")


def _check_saved_group(saved: dict[str, Any], group: dict[str, Any], index: int) -> None:
    for name in ("lr", "betas", "eps", "weight_decay", "maximize", "state", "min_8bit_size"):
        if name not in saved:
            raise ValueError(
                f"load_state_dict: group {index} has no {name!r}: not a state dict of AdamW8bit"
            )
    for name in ("state", "block_size"):
        if saved.get(name) != group[name]:
            raise ValueError(
                f"load_state_dict: group {index}: {name}: expected {group[name]!r}, "
                f"got {saved.get(name)!r}"
            )
    _check_options(saved)


def _copied_state(saved, layout, name: str) -> dict[str, torch.Tensor]:
    if isinstance(saved, dict) and isinstance(saved.get("step"), (int, float)):
        saved = {**saved, "step": torch.tensor(float(saved["step"]))}
    problem = adamw8.state_problem(saved, layout)
    if not problem and saved.keys() != layout.keys():
        problem = f"expected {sorted(layout)}, got {sorted(saved)}"
    if problem:
        raise ValueError(f"load_state_dict: {name}: {problem}")
    return {
        key: saved[key].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key in layout
    }
