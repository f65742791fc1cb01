"""AdamW8bit against torch's fused fp32 AdamW, bitsandbytes and torchao, interleaved in one process.

    python -m benchmarks.python.bench_adamw8 [--elements 20000] [--tensors 200] [--repeats 100]

First the check: one step from zero state must agree with torch. Then every optimizer steps its own
copy of the parameters, A B C A B C ..., with the same gradients. GB/s counts the bytes a step must
move (parameters and state read and written, gradients read once) at the minimum time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.python.timing import ROOT, commit, machine, print_table, write_csv
from halfbyte.optim import AdamW8bit

BYTES = {"fp32": 4 * 2 + 4 + 8 * 2, "8 bit": 4 * 2 + 4 + 2.03125 * 2}


def optimizers() -> dict[str, tuple[Callable, str, int]]:
    """Name -> (constructor, state, steps are timed every so many rounds)."""
    found = {
        "halfbyte ratio": (AdamW8bit, "8 bit", 1),
        "halfbyte moments": (lambda params: AdamW8bit(params, state="moments"), "8 bit", 1),
        "halfbyte fp32 moments": (
            lambda params: AdamW8bit(params, min_8bit_size=1 << 62),
            "fp32",
            1,
        ),
        "torch fused fp32": (lambda params: torch.optim.AdamW(params, fused=True), "fp32", 1),
        "torch foreach fp32": (lambda params: torch.optim.AdamW(params, foreach=True), "fp32", 10),
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(ImportError):
            import bitsandbytes

            found["bitsandbytes 8 bit"] = (bitsandbytes.optim.AdamW8bit, "8 bit", 10)
        with contextlib.suppress(ImportError):
            from torchao.optim import AdamW8bit as TorchAo

            found["torchao 8 bit"] = (TorchAo, "8 bit", 10)
    return found


def make_params(elements: int, tensors: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(elements, generator=generator) for _ in range(tensors)]
    for param in params:
        param.requires_grad_()
        param.grad = 1e-3 * torch.randn(elements, generator=generator)
    return params


def check(elements: int) -> None:
    ours, exact = make_params(elements, 2), make_params(elements, 2)
    AdamW8bit(ours).step()
    torch.optim.AdamW(exact).step()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def measure(elements: int, tensors: int, repeats: int) -> list[dict]:
    """One row an optimizer, `elements` parameters in each of `tensors` tensors."""
    steppers, samples = {}, {}
    for name, (make, state, every) in optimizers().items():
        optimizer = make(make_params(elements, tensors))
        optimizer.step()
        steppers[name] = (optimizer.step, state, every)
        samples[name] = []
    for i in range(repeats):
        for name, (step, _, every) in steppers.items():
            if i % every == 0:
                start = time.perf_counter()
                step()
                samples[name].append(1e3 * (time.perf_counter() - start))
    best = {name: min(times) for name, times in samples.items()}
    count = elements * tensors
    return [
        {
            "parameters": count,
            "tensors": tensors,
            "optimizer": name,
            "min ms": best[name],
            "median ms": statistics.median(samples[name]),
            "ns a parameter": 1e6 * best[name] / count,
            "GB/s": BYTES[state] * count / best[name] / 1e6,
            "times halfbyte": best[name] / best["halfbyte ratio"],
        }
        for name, (_, state, _) in steppers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=20_000)
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    print(f"machine: {machine()}; commit {commit()}; torch {torch.__version__}")
    check(options.elements)
    rows = measure(options.elements, options.tensors, options.repeats)
    print_table("AdamW step", rows)
    write_csv(options.output / "adamw8.csv", rows)


if __name__ == "__main__":
    main()
