"""halfbyte against torch and bitsandbytes: formats and linear layers, checked first, then timed.

    python -m benchmarks.python.compare [--shape NAME] [--rows 1,16,512] [--output FOLDER]

Prints Markdown tables and writes CSV. Ratios are baseline time / halfbyte time, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
from pathlib import Path

import torch
from torch.nn.functional import linear

import halfbyte
from benchmarks.python.timing import ROOT, commit, interleaved, machine, print_table, write_csv


def _bitsandbytes():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import bitsandbytes
    return bitsandbytes


def compare_formats(shape: tuple[int, int]) -> list[dict]:
    """Quantize (double-quantized) and dequantize one weight."""
    bnb = _bitsandbytes()
    weight = torch.randn(shape) * 0.02
    mine = halfbyte.quantize_nf4(weight)
    theirs, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(mine.packed, theirs.flatten()), "codes differ from bitsandbytes"
    rows = []
    cases = {
        "quantize float32 -> NF4 + double quantization": (
            lambda: halfbyte.quantize_nf4(weight),
            lambda: bnb.functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=True
            ),
        ),
        "dequantize -> bfloat16": (
            lambda: mine.dequantize(torch.bfloat16),
            lambda: bnb.functional.dequantize_4bit(theirs, _as_bfloat16(state)),
        ),
    }
    for name, (ours, baseline) in cases.items():
        best = interleaved({"halfbyte": ours, "bitsandbytes": baseline})
        rows.append(
            {
                "case": f"{name}, {shape[0]} x {shape[1]}",
                "halfbyte ms": best["halfbyte"],
                "bitsandbytes ms": best["bitsandbytes"],
                "ratio": best["bitsandbytes"] / best["halfbyte"],
            }
        )
    return rows


def _as_bfloat16(state):
    state.dtype = torch.bfloat16
    return state


def _check(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def compare_linear(
    name: str, shape: tuple[int, int], rows_list: list[int], dtype: torch.dtype, rank: int = 16
) -> list[dict]:
    """Forward and backward of one layer: bare base, and LoRA training as PEFT does it."""
    n, k = shape
    weight = halfbyte.quantize_nf4((torch.randn(n, k) * 0.02).to(dtype))
    dense = weight.dequantize(dtype)
    a = (torch.randn(rank, k) / k**0.5).to(dtype).requires_grad_()
    b = (torch.randn(n, rank) * 0.05).to(dtype).requires_grad_()
    only_dx = [True, False, False, False]
    frozen_weight = (*weight.op_args(), k, None, None, None, None, 1.0, 0.0, None, only_dx)
    table = []
    for m in rows_list:
        x = torch.randn(m, k, dtype=dtype, requires_grad=True)
        dy = torch.randn(m, n, dtype=dtype)
        frozen = x.detach()

        def fused(x=x, dy=dy):
            y = halfbyte.lora_linear(x, weight, a, b, 2.0)
            return torch.autograd.grad(y, (x, a, b), dy)

        def separate(x=x, dy=dy):
            y = linear(x, dense) + 2.0 * linear(linear(x, a), b)
            return torch.autograd.grad(y, (x, a, b), dy)

        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        _check("forward", halfbyte.nf4_linear(frozen, weight), linear(frozen, dense), tolerance)
        for got, expected in zip(fused(), separate(), strict=True):
            _check("gradient", got, expected, tolerance)

        best = interleaved(
            {
                "forward": lambda x=frozen: halfbyte.nf4_linear(x, weight),
                "dense forward": lambda x=frozen: linear(x, dense),
                "backward": lambda dy=dy: torch.ops.halfbyte.lora_linear_backward(
                    dy, None, *frozen_weight
                ),
                "dense backward": lambda dy=dy: dy @ dense,
                "fused": fused,
                "separate": separate,
            }
        )
        flops = 2.0 * m * n * k
        table.append(
            {
                "shape": name,
                "dtype": str(dtype).removeprefix("torch."),
                "M": m,
                "forward ms": best["forward"],
                "GFLOP/s": flops / best["forward"] / 1e6,
                "vs dense": best["dense forward"] / best["forward"],
                "backward dX ms": best["backward"],
                "dX vs dense": best["dense backward"] / best["backward"],
                f"LoRA r={rank} fwd+bwd ms": best["fused"],
                "vs dense + LoRA": best["separate"] / best["fused"],
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="a name from benchmarks/shapes.csv")
    parser.add_argument("--rows", default="1,4,16,64,128,512,2048")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"machine: {machine()}; commit {commit()}; torch {torch.__version__}")

    with (ROOT / "benchmarks" / "shapes.csv").open() as file:
        shapes = {row["name"]: (int(row["N"]), int(row["K"])) for row in csv.DictReader(file)}
    formats = compare_formats((4096, 4096))
    print_table("Formats", formats)
    write_csv(options.output / "formats.csv", formats)

    names = options.shape or ["llama-2-7b.q_proj", "smollm2-135m.up_proj"]
    rows = [int(m) for m in options.rows.split(",")]
    table = []
    for name in names:
        table += compare_linear(name, shapes[name], rows, getattr(torch, options.dtype))
    print_table("Linear", table)
    write_csv(options.output / f"linear_{options.dtype}.csv", table)


if __name__ == "__main__":
    main()
