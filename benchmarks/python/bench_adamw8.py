"""AdamW8bit against torch's fused fp32 AdamW, bitsandbytes and torchao, in turns in one process.

    python -m benchmarks.python.bench_adamw8 [--elements 20000] [--tensors 200] [--seconds 2]

First the check: one step from zero state must agree with torch. Then every optimizer steps its own
copy of the parameters with the same gradients. GB/s counts the bytes a step must move (parameters
and state read and written, gradients read once) at the minimum time; the roof is the measured rate
of copying in memory, as the other optimizers' turns leave little in the caches. Writes adamw8.csv.

Example: python -m benchmarks.python.bench_adamw8 --elements 4000000 --tensors 1
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.python import peers, timing
from halfbyte.cli.bench import COLD_BYTES
from halfbyte.optim import AdamW8bit

# Bytes a parameter: parameter read and written, gradient read, two states read and written.
BYTES = {"fp32": 4 * 2 + 4 + 8 * 2, "8 bit": 4 * 2 + 4 + 2.03125 * 2}
OURS = "halfbyte ratio"


def _moments(params):
    return AdamW8bit(params, state="moments")


def _fp32_moments(params):
    return AdamW8bit(params, min_8bit_size=1 << 62)


def _fused(params):
    return torch.optim.AdamW(params, fused=True)


def _foreach(params):
    return torch.optim.AdamW(params, foreach=True)


# Name -> (its state, what returns its constructor; a peer may be Unavailable).
OPTIMIZERS: dict[str, tuple[str, Callable[[], Callable]]] = {
    OURS: ("8 bit", lambda: AdamW8bit),
    "halfbyte moments": ("8 bit", lambda: _moments),
    "halfbyte fp32 moments": ("fp32", lambda: _fp32_moments),
    "torch fused fp32": ("fp32", lambda: _fused),
    "torch foreach fp32": ("fp32", lambda: _foreach),
    "bitsandbytes 8 bit": ("8 bit", peers.bitsandbytes_adamw8),
    "torchao 8 bit": ("8 bit", peers.torchao_adamw8),
}


def make_params(elements: int, tensors: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(elements, generator=generator) for _ in range(tensors)]
    for param in params:
        param.requires_grad_()
        param.grad = 1e-3 * torch.randn(elements, generator=generator)
    return params


def check(elements: int) -> None:
    """One step against torch's. Raises AssertionError."""
    ours, exact = make_params(elements, 2), make_params(elements, 2)
    AdamW8bit(ours).step()
    torch.optim.AdamW(exact).step()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def measure(elements: int, tensors: int, seconds: float) -> list[dict]:
    """One row an optimizer, `elements` parameters in each of `tensors` tensors."""
    steps, why_not = {}, {}
    for name, (_, constructor) in OPTIMIZERS.items():
        try:
            steps[name] = constructor()(make_params(elements, tensors)).step
        except peers.Unavailable as reason:
            why_not[name] = str(reason)
    taken = timing.sample(steps, turns=200, seconds=seconds)
    count = elements * tensors
    table = []
    for name, (state, _) in OPTIMIZERS.items():
        row = {"parameters": count, "tensors": tensors, "optimizer": name}
        if name in why_not:
            table.append(row | {"min ms": why_not[name]})
            continue
        best, moved = min(taken[name]), BYTES[state] * count
        roof = 1e-6 * moved / timing.memory_roof(max(int(moved), COLD_BYTES), "copy")
        row |= {
            "min ms": best,
            "median ms": statistics.median(taken[name]),
            "ns a parameter": 1e6 * best / count,
            "GB/s": 1e-6 * moved / best,
            "roof ms": roof,
            "of roof": roof / best,
            "times halfbyte": best / min(taken[OURS]),
        }
        table.append(row)
    return table


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    command.add_argument("--elements", type=int, default=20_000)
    command.add_argument("--tensors", type=int, default=200)
    command.add_argument("--seconds", type=float, default=2.0, help="time an optimizer, at least")
    options = command.parse_args(arguments)
    timing.print_birthplace()
    check(options.elements)
    table = measure(options.elements, options.tensors, options.seconds)
    timing.print_table("AdamW step", table)
    timing.write_csv(options.output / "adamw8.csv", table)


if __name__ == "__main__":
    main()
