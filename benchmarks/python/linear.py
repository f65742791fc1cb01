"""The linear layer, halfbyte and peers: checked first, then timed in turns.

    forward            y = x W^T, without autograd
    dX                 backward of the bare layer
    LoRA forward       y = x W^T + 2 (x A^T) B^T, without autograd
    LoRA backward      dX, dA and dB
    LoRA step          LoRA forward and backward, as in training

Peers do the LoRA products separately, as PEFT does, with A and B in x's dtype. Warm: a layer runs
several times in a row. Cold: copies of the layer take turns until more bytes than any cache holds
have gone by. The roof is what the measured arithmetic rate and the measured reading rate of a
working set of this size allow; `bound` says which of the two it is.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

import halfbyte
from benchmarks.python import peers
from benchmarks.python.timing import fastest, memory_roof
from halfbyte.cli.bench import COLD_BYTES, check_close, measured_roof
from halfbyte.nn import NF4Linear

CASES = ("forward", "dX", "LoRA forward", "LoRA backward", "LoRA step")
BARE = {"LoRA forward": "forward", "LoRA backward": "dX"}
SCALING = 2.0
# Of results against torch on the same dequantized weight; against weights in other codes.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
OTHER_CODES = 0.15


@dataclasses.dataclass(frozen=True)
class Task:
    """A layer to measure and how long to measure it."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    peers: tuple[str, ...] = tuple(peers.LINEAR)
    cases: tuple[str, ...] = CASES
    seconds: float = 0.3
    turns: int = 60

    def weight(self) -> torch.Tensor:
        torch.manual_seed(0)
        return (torch.randn(self.shape) * 0.02).to(self.dtype)

    def describe(self) -> dict:
        n, k = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": self.name, "N": n, "K": k, "dtype": dtype}


def compute_roof(dtype: torch.dtype) -> float:
    """GFLOP/s, operands in cache, of the arithmetic that the chosen variant does on `dtype`."""
    rows = halfbyte.variants()[f"lora_linear ({str(dtype).removeprefix('torch.')})"]
    chosen = next(row["name"] for row in rows if row["chosen"])
    return measured_roof(dtype if chosen.endswith("bf16") else torch.float32)


def work(case: str, m: int, task: Task, packed: int) -> tuple[int, int]:
    """(floating-point operations, bytes) that a case must do and move, halfbyte's weight."""
    (n, k), r, size = task.shape, task.rank, task.dtype.itemsize
    product, thin, adapter = 2 * m * n * k, 2 * m * r * (n + k), r * (n + k) * size
    rows = m * (n + k) * size
    forward = (product, packed + rows)
    by_case = {
        "forward": forward,
        "dX": forward,
        "LoRA forward": (product + thin, packed + rows + adapter),
        "LoRA backward": (product + 2 * thin, packed + rows + m * k * size + 2 * adapter),
    }
    if case == "LoRA step":
        both = by_case["LoRA forward"], by_case["LoRA backward"]
        return both[0][0] + both[1][0], both[0][1] + both[1][1]
    return by_case[case]


def halfbyte_lora(layer: NF4Linear, x, a, b) -> torch.Tensor:
    return halfbyte.lora_linear(x, layer.nf4_weight, a, b, SCALING)


def separate_lora(layer: nn.Module, x, a, b) -> torch.Tensor:
    return layer(x) + SCALING * linear(linear(x, a), b)


class Operands:
    """x, dy, A and B of one number of rows, and the five cases as calls on a layer."""

    def __init__(self, m: int, task: Task) -> None:
        n, k = task.shape
        torch.manual_seed(1)
        self.x = torch.randn(m, k).to(task.dtype)
        self.dy = torch.randn(m, n).to(task.dtype)
        self.a = (torch.randn(task.rank, k) / k**0.5).to(task.dtype).requires_grad_()
        self.b = (torch.randn(n, task.rank) * 0.05).to(task.dtype).requires_grad_()
        self.x_grad = self.x.clone().requires_grad_()

    def call(self, case: str, layer: nn.Module, lora: Callable) -> Callable[[], object]:
        trained = (self.x_grad, self.a, self.b)

        @torch.no_grad()
        def forward():
            return layer(self.x)

        @torch.no_grad()
        def lora_forward():
            return lora(layer, self.x, self.a, self.b)

        def step():
            return torch.autograd.grad(lora(layer, *trained), trained, self.dy)

        if case in ("forward", "LoRA forward", "LoRA step"):
            return {"forward": forward, "LoRA forward": lora_forward, "LoRA step": step}[case]
        of = (self.x_grad,) if case == "dX" else trained
        y = layer(self.x_grad) if case == "dX" else lora(layer, *trained)
        return lambda: torch.autograd.grad(y, of, self.dy, retain_graph=True)


def _results(call: Callable) -> tuple[torch.Tensor, ...]:
    got = call()
    return got if isinstance(got, tuple) else (got,)


def _check(task: Task, case: str, name: str, got: Callable, expected: Callable) -> None:
    tolerance = TOLERANCE[task.dtype]
    if name == "bitsandbytes training":  # scales halfway between two codes may differ
        tolerance = max(tolerance, 5e-3)
    if name == "bitsandbytes eval":  # block scales in bfloat16
        tolerance *= 2
    if name in peers.OWN_CODES:
        tolerance = OTHER_CODES
    for i, (one, other) in enumerate(zip(_results(got), _results(expected), strict=True)):
        check_close(f"{name}, {case}, result {i}", one, other, tolerance)


def check(task: Task, case: str, calls: dict[str, Callable]) -> list[str]:
    """Results against torch's on the dequantized weight: the peers whose are wrong.

    Raises ValueError when halfbyte's are.
    """
    wrong = []
    for name, call in calls.items():
        try:
            _check(task, case, name, call, calls["dense"])
        except ValueError:
            if name == "halfbyte":
                raise
            wrong.append(name)
    return wrong


def _row(task: Task, weights: str, case: str, m: int, packed: int, roof: float, best, why_not):
    """One line of the table: halfbyte's time, its rates and its roof, and every peer."""
    ours = best["halfbyte", case]
    operations, moved = work(case, m, task, packed)
    arithmetic = 1e-6 * operations / roof
    reading = 1e-6 * moved / memory_roof(COLD_BYTES if weights == "cold" else moved)
    row = task.describe() | {
        "rank": task.rank if case.startswith("LoRA") else "",
        "weights": weights,
        "case": case,
        "M": m,
        "halfbyte ms": ours,
        "GFLOP/s": 1e-6 * operations / ours,
        "GB/s": 1e-6 * moved / ours,
        "roof ms": max(arithmetic, reading),
        "bound": "arithmetic" if arithmetic > reading else "memory",
        "of roof": max(arithmetic, reading) / ours,
        "over bare": ours / best["halfbyte", BARE[case]] - 1
        if ("halfbyte", BARE.get(case)) in best
        else "",
    }
    for peer in task.peers:
        time = best.get((peer, case), "")
        row[f"{peer} ms"] = time
        row[f"vs {peer}"] = time / ours if time else why_not.get(peer, "")
    return row


def warm(task: Task, rows: list[int], roof: float) -> list[dict]:
    """One row a case and number of rows, layers that run several times in a row."""
    weight = task.weight()
    ours = NF4Linear(halfbyte.quantize_nf4(weight))
    layers, why_not = peers.build(weight, ours, task.peers)
    table = []
    for m in rows:
        operands, calls = Operands(m, task), {}
        for case in task.cases:
            of_case = {"halfbyte": operands.call(case, ours, halfbyte_lora)}
            for name, layer in layers.items():
                if name not in peers.INFERENCE_ONLY or case in ("forward", "LoRA forward"):
                    of_case[name] = operands.call(case, layer, separate_lora)
            for name in check(task, case, of_case):
                del of_case[name], layers[name]
                why_not[name] = "wrong result"
            calls |= {(name, case): call for name, call in of_case.items()}
        best = fastest(calls, turns=task.turns, seconds=task.seconds, burst=4)
        packed = ours.nf4_weight.nbytes
        table += [_row(task, "warm", case, m, packed, roof, best, why_not) for case in task.cases]
    return table


def short(rows: list[dict], *kept: str) -> list[dict]:
    """The rows for a table to read: without peers' times, and what they share unless `kept`."""
    own = ("halfbyte ms", "roof ms")
    left_out = {"shape", "N", "K", "dtype", "rank", "weights", "case"} - set(kept)
    return [
        {
            name: value
            for name, value in row.items()
            if name not in left_out and (name in own or not name.endswith(" ms"))
        }
        for row in rows
    ]


def _copies(layer: nn.Module, nbytes: float) -> itertools.cycle:
    return itertools.cycle(
        [layer, *(copy.deepcopy(layer) for _ in range(int(COLD_BYTES / nbytes)))]
    )


def cold(task: Task, rows: list[int], roof: float) -> list[dict]:
    """Forward with weights that no cache holds."""
    weight = task.weight()
    ours = NF4Linear(halfbyte.quantize_nf4(weight))
    layers, why_not = peers.build(weight, ours, task.peers)
    operands = Operands(1, task)
    everyone = {"halfbyte": ours, **layers}
    calls = {name: operands.call("forward", it, separate_lora) for name, it in everyone.items()}
    for name in check(task, "forward", calls):
        del layers[name]
        why_not[name] = "wrong result"
    packed = ours.nf4_weight.nbytes
    rotating = {"halfbyte": _copies(ours, packed)}
    for name, layer in layers.items():
        rotating[name] = _copies(layer, weight.nbytes if name == "dense" else weight.numel() / 2)
    table = []
    for m in rows:
        x = Operands(m, task).x
        calls = {}
        for name, turn in rotating.items():
            calls[name, "forward"] = lambda turn=turn, x=x: next(turn)(x)
        with torch.no_grad():
            best = fastest(calls, turns=4 * task.turns, seconds=task.seconds)
        table.append(_row(task, "cold", "forward", m, packed, roof, best, why_not))
    return table
