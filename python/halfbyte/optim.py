"""AdamW as one native pass over all parameters, with 8-bit or fp32 state, on the CPU and on CUDA.

    class                state a parameter    where it lies
    AdamW8bit            2.03 bytes           with the parameter
    AdamW32bit           8 bytes              with the parameter
    PagedAdamW8bit       2.03 bytes           pageable memory: `halfbyte.paging`
    PagedAdamW32bit      8 bytes              pageable memory

The update is torch's AdamW (decoupled decay, then the step), computed in fp32 from fresh moments;
between 8-bit steps each moment is a code with one fp32 scale a block of 256 (`ops/adamw8.py` and
the C++ header `adamw8_format.h` hold the formats).

    p <- p (1 - lr weight_decay)
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch.optim import Optimizer

from halfbyte.ops import adamw8
from halfbyte.ops import adamw8_shards as shards
from halfbyte.paging import PagedMemory

__all__ = [
    "AdamW8bit",
    "AdamW32bit",
    "NonFiniteGradient",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
]


class NonFiniteGradient(RuntimeError):
    """A gradient holds an infinity or a NaN; names the parameter and the element."""


class _Kept:
    """A parameter's loaded state. torch's `load_state_dict` casts tensors to the parameter's dtype;
    what it does not know it leaves alone."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state


class _AdamW(Optimizer):
    """What the four have in common; `AdamW8bit` documents the arguments."""

    _encodings: tuple[str, ...]  # what `state` may be, the default first
    _paged = False  # the default of `paged`

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: str | None = None,
        min_8bit_size: int = 4096,
        on_nonfinite: str = "raise",
        maximize: bool = False,
        paged: bool | None = None,
        page_bytes: int = 64 << 20,
        look_ahead: int = 2,
        evict: bool = False,
        page_dir: str | os.PathLike | None = None,
    ):
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.skipped_steps = 0
        memory = PagedMemory(page_bytes, look_ahead, evict, page_dir)
        self._memory = memory if (self._paged if paged is None else paged) else None
        self._parts: list[_Part] = []
        self._unread: list[adamw8.StepTable] = []  # steps on CUDA whose verdict nobody has read
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state": self._encodings[0] if state is None else state,
            "min_8bit_size": min_8bit_size,
            "block_size": adamw8.BLOCK,
        }
        super().__init__(params, defaults)

    @property
    def paged(self) -> bool:
        """Whether the state lies in pageable memory."""
        return self._memory is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options fall back to the optimizer's."""
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group}, self._encodings)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, param in enumerate(group["params"]):
            if param.dtype not in adamw8.PARAM_DTYPES:
                name = _describe(group, len(self.param_groups) - 1, i)
                self.param_groups.pop()
                raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {param.dtype}")

    def __getstate__(self) -> dict[str, Any]:
        self._finish()
        names = ("on_nonfinite", "skipped_steps", "_memory")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state.get("state", {})
        for key, value in loaded.items():
            if isinstance(value, _Kept):
                loaded[key] = value.state
        super().__setstate__(state)
        self._parts = []
        self._unread = []
        self._place([param for group in self.param_groups for param in group["params"]])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's loss, if any.

        On CUDA nothing waits for the device, and a gradient that is not finite is reported late:
        the device leaves everything as it was, and the next `step` or `state_dict` raises or
        counts. Where parameters lie on several devices, all gradients are looked at before any
        device steps, which waits for the devices. A step on CUDA can be captured in a CUDA graph
        once one has run, unless the state is paged; a replay keeps the hyperparameters of the
        capture.

        Of sharded parameters (DTensors) each process steps its own part, once all have agreed that
        every gradient is finite: then all of them step or none, and that waits for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._unread and not torch.cuda.is_current_stream_capturing():
            self._read_verdicts()
        owners, grads, groups = self._with_gradients()
        if not owners:
            return loss
        params, grads = shards.locals_of(owners), shards.locals_of(grads)
        parts = self._parts_for(owners, params, grads, groups)
        scalars = [_scalars(group) for group in self.param_groups]
        if params is not owners and self._bad_in_a_shard(owners, params, grads):
            return loss
        if len(parts) == 1:
            row, index = self._run(parts[0][0], params, grads, scalars)
        else:
            row, index = self._run_on_devices(parts, params, grads, scalars)
        if row < 0:
            torch.autograd.graph.increment_version(params)
        elif self.on_nonfinite == "skip":
            self.skipped_steps += 1
        else:
            raise NonFiniteGradient(self._nonfinite_message(params[row], grads, row, index))
        return loss

    def _bad_in_a_shard(self, owners, params, grads) -> bool:
        """Whether some process's shard of a gradient is not finite: then none of them steps."""
        row, index = adamw8.first_nonfinite(grads)
        if not shards.anyone(row >= 0, owners):
            return False
        if self.on_nonfinite == "skip":
            self.skipped_steps += 1
            return True
        if row >= 0:
            raise NonFiniteGradient(self._nonfinite_message(params[row], grads, row, index))
        raise NonFiniteGradient(
            "a gradient is not finite in another process's shard; nothing was changed"
        )

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

    def _run(self, table: adamw8.StepTable, params, grads, scalars) -> tuple[int, int]:
        if table.takes(params, grads):
            bad = table.run(params, grads, scalars)
        else:
            self._check_tensors(params, grads)
            bad = table.run_any(params, grads, scalars)
        if table.verdict is not None and table not in self._unread:
            self._unread.append(table)
        return bad

    def _run_on_devices(self, parts, params, grads, scalars) -> tuple[int, int]:
        self._check_tensors(params, grads)
        bad = adamw8.first_nonfinite(grads)
        if bad == adamw8.FINITE:
            for table, rows in parts:
                self._run(table, _pick(params, rows), _pick(grads, rows), scalars)
        return bad

    def _check_tensors(self, params, grads) -> None:
        for param, grad in zip(params, grads, strict=True):
            problem = adamw8.tensor_problem(param, grad)
            if problem:
                raise ValueError(f"{self._name_of(param)}: {problem}")

    def _parts_for(self, owners, params, grads, groups) -> list[_Part]:
        """A table a device: those of the last step where they still hold, otherwise new ones.

        `owners` are the optimizer's parameters, `params` what of them lies in this process.
        """
        states = [self.state[owner] for owner in owners]
        if self._hold(params, states, groups):
            return self._parts
        self._check_tensors(params, grads)
        by_device = _by_device(params)
        parts = []
        for device, rows in by_device.items():
            chosen = _pick(params, rows), _pick(states, rows), _pick(groups, rows)
            self._create(_pick(owners, rows), *chosen[1:], device)
            encodings = [self._checked_encoding(*each) for each in zip(*chosen, strict=True)]
            self._place(_pick(owners, rows))
            table = adamw8.StepTable(*chosen, encodings, self._memory)
            parts.append((table, rows if len(by_device) > 1 else None))
        self._parts = parts
        return parts

    def _hold(self, params, states, groups) -> bool:
        if len(self._parts) == 1:
            return self._parts[0][0].holds(params, states, groups)
        return sum(len(table.params) for table, _ in self._parts) == len(params) and all(
            table.holds(_pick(params, rows), _pick(states, rows), _pick(groups, rows))
            for table, rows in self._parts
        )

    def _create(self, owners, states, groups, device: torch.device) -> None:
        """State for those that have none."""
        missing = [i for i, state in enumerate(states) if not state]
        layouts = [_layout(owners[i], self.param_groups[groups[i]]) for i in missing]
        for i, fresh in zip(missing, self._allocate(layouts, device), strict=True):
            adamw8.clear(fresh)
            states[i].update(fresh)

    def _checked_encoding(self, param, state, group: int) -> str:
        coded = isinstance(state.get("exp_avg"), torch.Tensor) and adamw8.is_coded(state)
        encoding = self.param_groups[group]["state"] if coded else "float32"
        problem = adamw8.state_problem(state, adamw8.state_layout(param.shape, encoding))
        if problem:
            raise ValueError(f"{self._name_of(param)}: its state: {problem}")
        return encoding

    def _allocate(self, layouts: Sequence[adamw8.Layout], device: torch.device):
        allocate = adamw8.allocate if self._memory is None else self._memory.allocate
        return allocate(layouts, device)

    def _place(self, params: Sequence[torch.Tensor]) -> None:
        """Moves state that does not lie where it belongs."""
        holds = adamw8.holds if self._memory is None else self._memory.holds
        astray = [p for p in params if self.state.get(p) and not holds(self.state[p], p.device)]
        for device, rows in _by_device(astray).items():
            states = [self.state[astray[row]] for row in rows]
            for state, moved in zip(states, self._copies(states, device), strict=True):
                state.update(moved)

    def _copies(self, states: Sequence[Mapping[str, Any]], device: torch.device):
        """These states' tensors where this optimizer keeps those of parameters on `device`."""
        tensors = [
            {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            for state in states
        ]
        layouts = [{name: (t.dtype, t.shape) for name, t in each.items()} for each in tensors]
        copies = self._allocate(layouts, device)
        for copy, source in zip(copies, tensors, strict=True):
            for name, value in copy.items():
                value.copy_(source[name])
        return copies

    def _received(self, params, states) -> list[dict[str, torch.Tensor]]:
        """`_copies` of `states` for `params`: over state of the same layout that is there already,
        so that loading takes no second room."""
        homes = [self.state.get(param, {}) for param in params]
        own = {_memory_of(value) for home in homes for value in home.values()} - {None}
        holds = adamw8.holds if self._memory is None else self._memory.holds

        def fits(param, home, state) -> bool:
            alone = own.isdisjoint(map(_memory_of, state.values()))
            return alone and _same_layout(home, state) and holds(home, param.device)

        kept = [fits(*each) for each in zip(params, homes, states, strict=True)]
        for device, rows in _by_device(params).items():
            rows = [row for row in rows if not kept[row]]
            for row, fresh in zip(rows, self._copies(_pick(states, rows), device), strict=True):
                homes[row] = fresh
        for home, state in compress(zip(homes, states, strict=True), kept):
            for name, value in home.items():
                value.copy_(state[name])
        return homes

    def _name_of(self, param: torch.Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, member in enumerate(group["params"]):
                if shards.local(member) is param:
                    return _describe(group, i, j)
        return "a parameter that left the optimizer"

    def _nonfinite_message(self, param, grads, row: int, index: int) -> str:
        where = _coordinates(index, grads[row].shape)
        spread = all(not torch.isfinite(grad).any() for grad in grads)
        return (
            f"{self._name_of(param)}: gradient is {grads[row][tuple(where)].item()} at {where} "
            f"(flat index {index}); nothing was changed"
        ) + (
            "; no gradient is finite anywhere: clipping by a norm that is not finite spreads it"
            if spread and len(grads) > 1
            else ""
        )

    def _read_verdicts(self) -> None:
        """Raises or counts what the last step on CUDA found, waiting for that step only."""
        unread = self._unread
        self._unread = [t for t in unread if t.verdict is not None and t.verdict.captured]
        for table in unread:
            assert table.verdict is not None, "only steps on CUDA are unread"
            row, index = table.verdict.wait()
            if row < 0:
                continue
            if self.on_nonfinite == "skip":
                self.skipped_steps += 1
                continue
            param = table.params[row]
            raise NonFiniteGradient(
                f"{self._name_of(param)}: gradient of the last step was not finite at "
                f"{_coordinates(index, param.shape)} (flat index {index}); the step was skipped on "
                "the device, nothing was changed"
            )

    def _finish(self) -> None:
        """What was enqueued is done and known; paged state can be read."""
        self._read_verdicts()
        self._settle()

    def _settle(self) -> None:
        """No device is at work on paged state."""
        if self._memory is not None:
            for table, _ in self._parts:
                if table.verdict is not None:
                    torch.cuda.synchronize(table.device)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: the tensors are the optimizer's own, and its next step changes them.

        Waits for the last step on CUDA, and raises or counts what it found; where the state is
        paged, for the device. Paged tensors can be saved and loaded like any: they keep their arena
        alive, and load into optimizers that are not paged too. The state of sharded parameters is
        sharded with them (DTensors, as torch.distributed.checkpoint takes them).
        """
        self._finish()
        return shards.whole_state_dict(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit: codes stay uint8 and scales fp32 whatever
        the parameters' dtype, straight into paged memory where this optimizer is paged, over the
        state that is there already if it has the same layout. One that does not fit, or whose
        scales are not finite, raises before anything changes."""
        # A pre-hook of our own, after the user's, shields the state from torch's casts.
        hook: Any = _AdamW._checked_state_dict
        handle = self.register_load_state_dict_pre_hook(hook)
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
        kept = state_dict["state"]
        keys, params, states = [], [], []
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            self._check_saved_group(saved, group, i)
            for j, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                if key in kept:
                    name, layout = _describe(group, i, j), _layout(param, saved)
                    _check_shards(param, saved, layout, name)
                    own = shards.part(kept[key], layout)
                    states.append(_checked_state(own, layout, name))
                    keys.append(key)
                    params.append(param)
        self._settle()
        copies = map(_Kept, self._received(params, states))
        loaded = {**kept, **dict(zip(keys, copies, strict=True))}
        groups = [{k: v for k, v in saved.items() if k != "shards"} for saved in saved_groups]
        return {**state_dict, "state": loaded, "param_groups": groups}

    def _check_saved_group(self, saved: dict[str, Any], group: dict[str, Any], index: int) -> None:
        for name in ("lr", "betas", "eps", "weight_decay", "maximize", "state", "min_8bit_size"):
            if name not in saved:
                raise ValueError(
                    f"load_state_dict: group {index} has no {name!r}: "
                    f"not a state dict of {type(self).__name__}"
                )
        for name in ("state", "block_size"):
            if saved.get(name) != group[name]:
                raise ValueError(
                    f"load_state_dict: group {index}: {name}: expected {group[name]!r}, "
                    f"got {saved.get(name)!r}"
                )
        _check_options(saved, self._encodings)


class AdamW8bit(_AdamW):
    """AdamW whose moments are kept in blocks of 8-bit codes.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer: float32,
            bfloat16 or float16, on the CPU and on CUDA devices; gradients in the same dtype or in
            float32, of any strides.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        state: "ratio" (the default) keeps m / sqrt(v) and sqrt(v), which follows fp32 AdamW most
            closely; "moments" keeps m and v.
        min_8bit_size: tensors with fewer elements keep fp32 moments.
        on_nonfinite: what a gradient with an infinity or a NaN does, before anything has changed:
            "raise" a NonFiniteGradient naming the parameter and the element, or "skip" the whole
            step and count it in `skipped_steps`. On CUDA the next `step` or `state_dict` does so.
        paged: keep the state in pageable memory (see `halfbyte.paging`): a shortage of memory moves
            it away instead of ending the run. The results are the same, bit for bit.
        page_bytes: bytes of state that travel together; a larger tensor travels alone.
        look_ahead: pages fetched ahead of the one that is updated.
        evict: send each page away after its update, rather than leave that to a shortage.
        page_dir: folder of the file that holds the paged state of parameters on the CPU; None: the
            system's for temporary files. It is no help in a file system that lies in memory.

    Each group may set its own lr, betas, eps, weight_decay, maximize, state and min_8bit_size.
    Raises OSError when paged state does not fit its disk, `halfbyte._C.Error` when CUDA is out of
    memory: both when state is made, at the first step or on loading.
    """

    _encodings = ("ratio", "moments")


class AdamW32bit(_AdamW):
    """AdamW whose moments are kept in fp32; arguments as for `AdamW8bit`, of which `state` and
    `min_8bit_size` have nothing to choose."""

    _encodings = ("float32",)


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` that is paged unless told otherwise."""

    _paged = True


class PagedAdamW32bit(AdamW32bit):
    """`AdamW32bit` that is paged unless told otherwise."""

    _paged = True


# Rows of a step on one device, None for all, and their table.
_Part = tuple[adamw8.StepTable, list[int] | None]


def _pick(items: list, rows: list[int] | None) -> list:
    return items if rows is None else [items[row] for row in rows]


def _by_device(params: Sequence[torch.Tensor]) -> dict[torch.device, list[int]]:
    rows: dict[torch.device, list[int]] = {}
    for row, param in enumerate(params):
        rows.setdefault(param.device, []).append(row)
    return rows


def _memory_of(value: Any) -> int | None:
    """Where a tensor's storage begins; None without one."""
    filled = isinstance(value, torch.Tensor) and value.numel() > 0
    return value.untyped_storage().data_ptr() if filled else None


def _same_layout(home: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> bool:
    return home.keys() == state.keys() and all(
        isinstance(home[name], torch.Tensor)
        and home[name].dtype == value.dtype
        and home[name].shape == value.shape
        for name, value in state.items()
    )


def _coordinates(index: int, shape: torch.Size) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]


def _layout(param: torch.Tensor, options: dict[str, Any]) -> adamw8.Layout:
    """Of the state of `param`, or of its shard: all shards are coded alike, however small."""
    encoding = options["state"] if param.numel() >= options["min_8bit_size"] else "float32"
    return adamw8.state_layout(shards.local(param).shape, encoding)


def _check_shards(param, saved_group: dict[str, Any], layout: adamw8.Layout, name: str) -> None:
    """8-bit state has its blocks where the shards were cut."""
    expected, got = shards.count(param), saved_group.get("shards", 1)
    if "exp_avg_absmax" in layout and expected != got:
        raise ValueError(
            f"load_state_dict: {name}: expected 8-bit state in {expected} shards, got {got}: its "
            "blocks belong to the shards they were made for; start the optimizer anew, or load "
            "it with as many processes"
        )


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


def _check_options(options: dict[str, Any], encodings: tuple[str, ...]) -> None:
    lr, beta1, beta2, eps, weight_decay, _ = _scalars(options)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    for i, beta in enumerate((beta1, beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, got {beta}")
    if options["state"] not in encodings:
        expected = " or ".join(map(repr, encodings))
        raise ValueError(f"state: expected {expected}, got {options['state']!r}")
    if options["min_8bit_size"] < 0:
        raise ValueError(f"min_8bit_size: expected >= 0, got {options['min_8bit_size']}")
    if options["block_size"] != adamw8.BLOCK:
        raise ValueError(f"block_size: expected {adamw8.BLOCK}, got {options['block_size']}")


def _checked_state(saved, layout: adamw8.Layout, name: str) -> dict[str, torch.Tensor]:
    if isinstance(saved, dict) and isinstance(saved.get("step"), (int, float)):
        saved = {**saved, "step": torch.tensor(float(saved["step"]))}
    problem = adamw8.state_problem(saved, layout)
    if not problem and saved.keys() != layout.keys():
        problem = f"expected {sorted(layout)}, got {sorted(saved)}"
    problem = problem or adamw8.step_problem(saved["step"]) or adamw8.scale_problem(saved)
    if problem:
        raise ValueError(f"load_state_dict: {name}: {problem}")
    return saved
