"""halfbyte against torch and bitsandbytes: formats and linear layers, checked first, then timed.

    python -m benchmarks.python.compare [--shape NAME ...] [--rows 1,16,512] [--output FOLDER]

Prints Markdown tables and writes CSV. Ratios are time of the peer / time of halfbyte, in one
process. Shapes are named in benchmarks/shapes.csv. `halfbyte bench` is the short form.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
from pathlib import Path

import torch

import halfbyte
from benchmarks.python.timing import ROOT, commit, machine, print_table, write_csv
from halfbyte.cli.bench import cold_cases, interleaved, linear_cases, measured_roof


def _bitsandbytes():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import bitsandbytes
    return bitsandbytes


def compare_formats(shape: tuple[int, int]) -> list[dict]:
    """Quantize (double-quantized) and dequantize; bitsandbytes has no `out=` on the CPU."""
    bnb = _bitsandbytes()
    weight = torch.randn(shape) * 0.02
    mine = halfbyte.quantize_nf4(weight)

    def their_quantize():
        return bnb.functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        )

    theirs, state = their_quantize()
    if not torch.equal(mine.packed, theirs.flatten()):
        raise ValueError("codes differ from bitsandbytes")
    state.dtype = torch.bfloat16

    def their_dequantize():
        return bnb.functional.dequantize_4bit(theirs, state)

    out = torch.empty(shape, dtype=torch.bfloat16)
    cases = {
        "quantize float32 -> NF4 + double quantization": (
            lambda: halfbyte.quantize_nf4(weight),
            their_quantize,
            weight.nbytes,
        ),
        "dequantize -> bfloat16": (
            lambda: mine.dequantize(torch.bfloat16),
            their_dequantize,
            out.nbytes,
        ),
        "dequantize -> bfloat16 (halfbyte: out=)": (
            lambda: mine.dequantize(out=out),
            their_dequantize,
            out.nbytes,
        ),
    }
    rows = []
    for name, (ours, baseline, moved) in cases.items():
        best = interleaved({"halfbyte": ours, "bitsandbytes": baseline})
        rows.append(
            {
                "case": f"{name}, {shape[0]} x {shape[1]}",
                "halfbyte ms": best["halfbyte"],
                "GB/s": moved / best["halfbyte"] / 1e6,
                "bitsandbytes ms": best["bitsandbytes"],
                "ratio": best["bitsandbytes"] / best["halfbyte"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="a name from benchmarks/shapes.csv")
    parser.add_argument("--rows", default="1,4,16,32,64,128,512,2048")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    roof = measured_roof(dtype)
    print(f"machine: {machine()}; commit {commit()}; torch {torch.__version__}")
    print(f"roof, operands in cache: {roof:.0f} GFLOP/s in {options.dtype}")

    with (ROOT / "benchmarks" / "shapes.csv").open() as file:
        shapes = {row["name"]: (int(row["N"]), int(row["K"])) for row in csv.DictReader(file)}
    formats = compare_formats((4096, 4096))
    print_table("Formats", formats)
    write_csv(options.output / "formats.csv", formats)

    rows = [int(m) for m in options.rows.split(",")]
    warm, cold = [], []
    for name in options.shape or ["llama-2-7b.q_proj", "smollm2-135m.up_proj"]:
        shape = {"shape": f"{name} {shapes[name][0]} x {shapes[name][1]}"}
        cases = linear_cases(shapes[name], rows, dtype, options.rank, roof)
        warm += [shape | case for case in cases]
        few = [m for m in rows if m <= 32]
        cold += [shape | case for case in cold_cases(shapes[name], few, dtype)] if few else []
    print_table(f"Linear, {options.dtype}, LoRA rank {options.rank}", warm)
    write_csv(options.output / f"linear_{options.dtype}.csv", warm)
    if cold:
        print_table(f"Linear, {options.dtype}, weights from memory", cold)
        write_csv(options.output / f"linear_{options.dtype}_cold.csv", cold)


if __name__ == "__main__":
    main()
