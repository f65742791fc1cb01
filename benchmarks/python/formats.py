"""Quantize and dequantize against bitsandbytes: same codes first, then the time of each.

    python -m benchmarks.python.formats [--shape 4096x4096] [--seconds 1]

Double quantization on both sides. GB/s counts the weight read or written and the packed bytes, at
halfbyte's time; the roof is the measured rate of reading (quantize) or writing (dequantize) the
dense weight in memory, as the turns of the others leave little in the caches. bitsandbytes has no
`out=` on the CPU. Writes formats.csv.

Example: python -m benchmarks.python.formats --shape 1536x576
"""

from __future__ import annotations

import argparse

import torch

import halfbyte
from benchmarks.python import peers, timing
from halfbyte.cli.bench import COLD_BYTES, check_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(mine: halfbyte.NF4Weight, codes: torch.Tensor, state, bnb) -> None:
    """The same codes; the same values, but for scales halfway between two codes."""
    if not torch.equal(mine.packed, codes.flatten()):
        raise ValueError("codes differ from bitsandbytes")
    theirs = bnb.functional.dequantize_4bit(codes, state)
    check_close("dequantize", mine.dequantize(theirs.dtype), theirs, 2e-3)


def compare(shape: tuple[int, int], seconds: float) -> list[dict]:
    """One row a conversion and dtype."""
    torch.manual_seed(0)
    source = torch.randn(shape) * 0.02
    try:
        bnb, why_not = peers.bitsandbytes(), ""
    except peers.Unavailable as reason:
        bnb, why_not = None, str(reason)
    table = []
    for dtype in DTYPES:
        weight = source.to(dtype)
        mine = halfbyte.quantize_nf4(weight)
        cases = {"quantize": {"halfbyte": lambda w=weight: halfbyte.quantize_nf4(w)}}
        cases["dequantize"] = {"halfbyte": lambda w=mine, d=dtype: w.dequantize(d)}
        out = torch.empty_like(weight)
        cases["dequantize, out="] = {"halfbyte": lambda w=mine, o=out: w.dequantize(out=o)}
        if bnb is not None:

            def quantize(w=weight):
                return bnb.functional.quantize_4bit(
                    w, blocksize=64, quant_type="nf4", compress_statistics=True
                )

            codes, state = quantize()
            _check(mine, codes, state, bnb)
            dequantize = lambda c=codes, s=state: bnb.functional.dequantize_4bit(c, s)  # noqa: E731
            cases["quantize"]["bitsandbytes"] = quantize
            cases["dequantize"]["bitsandbytes"] = dequantize
            cases["dequantize, out="]["bitsandbytes"] = dequantize
        moved = weight.nbytes + mine.nbytes
        for case, calls in cases.items():
            best = timing.fastest(calls, seconds=seconds, turns=40)
            theirs = best.get("bitsandbytes", "")
            kind = "read" if case == "quantize" else "write"
            roof = 1e-6 * weight.nbytes / timing.memory_roof(max(weight.nbytes, COLD_BYTES), kind)
            table.append(
                {
                    "case": case,
                    "dtype": str(dtype).removeprefix("torch."),
                    "N": shape[0],
                    "K": shape[1],
                    "halfbyte ms": best["halfbyte"],
                    "GB/s": moved / best["halfbyte"] / 1e6,
                    "roof ms": roof,
                    "of roof": roof / best["halfbyte"],
                    "bitsandbytes ms": theirs,
                    "vs bitsandbytes": theirs / best["halfbyte"] if theirs else why_not,
                }
            )
    return table


def write(table: list[dict], folder) -> None:
    """Table to the terminal, CSV to `folder`."""
    timing.print_table("NF4 with double quantization, to and from", table)
    timing.write_csv(folder / "formats.csv", table)


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NxK, got {text!r}") from None
    return n, k


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    command.add_argument("--shape", type=_shape, default=(4096, 4096), metavar="NxK")
    command.add_argument("--seconds", type=float, default=1.0, help="time a call, at least")
    options = command.parse_args(arguments)
    timing.print_birthplace()
    write(compare(options.shape, options.seconds), options.output)


if __name__ == "__main__":
    main()
