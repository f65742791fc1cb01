"""`halfbyte bench`: this machine's kernels against torch's dense layers, checked, then timed.

Everything that is compared runs interleaved in one process; times are minima. The measurements here
are also what the repository's longer benchmarks use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

SHAPES = {
    "SmolLM2-135M up": (1536, 576),
    "TinyLlama-1.1B up": (5632, 2048),
    "Llama-2-7B q": (4096, 4096),
}
COLD_BYTES = 96 << 20  # weights rotate through more than any cache holds


def command(
    shape: Annotated[
        str, typer.Option(help="NxK, or 'all' for a few shapes of known models.")
    ] = "4096x4096",
    rows: Annotated[str, typer.Option(help="Rows of x (M), comma separated.")] = "1,16,64,512",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA branch.")] = 16,
) -> None:
    """Time the linear layer on this machine: GFLOP/s, share of the roof, ratio to torch dense.

    Example: halfbyte bench --shape 5632x2048 --rows 1,512
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from halfbyte.cli.errors import plain_errors

    with plain_errors():
        shapes = _parse_shapes(shape)
        row_counts = _parse_rows(rows)
        kind = _parse_dtype(dtype)
    console = Console(highlight=False)
    roof = measured_roof(kind)
    console.print(
        f"{torch.get_num_threads()} threads, {dtype} roof {roof:.0f} GFLOP/s (operands in cache)"
    )
    for name, (n, k) in shapes.items():
        table = Table(title=f"{name}: N = {n}, K = {k}, NF4 block 64, double-quantized")
        table_rows = linear_cases((n, k), row_counts, kind, rank, roof)
        for column in table_rows[0]:
            table.add_column(column, justify="right")
        for row in table_rows:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    console.print("ratios: time of torch / time of halfbyte; LoRA: forward and backward of a step")


def _parse_shapes(text: str) -> dict[str, tuple[int, int]]:
    from halfbyte.finetune.errors import FinetuneError

    if text == "all":
        return SHAPES
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise FinetuneError(f"--shape: expected NxK such as 4096x4096, or 'all', got {text!r}")
    return {text: (int(parts[0]), int(parts[1]))}


def _parse_rows(text: str) -> list[int]:
    from halfbyte.finetune.errors import FinetuneError

    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise FinetuneError(f"--rows: expected numbers such as 1,16,512, got {text!r}")
    return [int(part) for part in parts]


def _parse_dtype(text: str) -> torch.dtype:
    import torch

    from halfbyte.finetune.errors import FinetuneError

    if text not in ("bfloat16", "float32"):
        raise FinetuneError(f"--dtype: expected bfloat16 or float32, got {text!r}")
    return getattr(torch, text)


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int = 15, seconds: float = 1.0
) -> dict[str, float]:
    """Minimum ms of each call, interleaved A B C A B C ..., `repeats` times or `seconds` a call."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    spent = 0.0
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            best[name] = min(best[name], elapsed * 1e3)
            spent += elapsed
        if spent > seconds * len(calls):
            break
    return best


def measured_roof(dtype: torch.dtype) -> float:
    """GFLOP/s of the inner kernel for `dtype` activations on torch's threads, operands in cache."""
    import torch

    from halfbyte._native import _C, thread_count

    kind = _C.DType.bfloat16 if dtype == torch.bfloat16 else _C.DType.float32
    return _C.peak_gflops(kind, thread_count())


def check_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raises ValueError where the relative Frobenius error exceeds `tolerance`."""
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= tolerance:
        raise ValueError(
            f"{name}: expected a relative error up to {tolerance:.0e}, got {error:.2e}"
        )


def linear_cases(
    shape: tuple[int, int], row_counts: list[int], dtype: torch.dtype, rank: int, roof: float
) -> list[dict]:
    """One row a number of rows M: forward, backward dX, and a LoRA layer's forward + backward.

    Checked against torch on the dequantized weight, then timed against it; the dense LoRA layer
    does its three products separately, as PEFT does. Weights are warm; `cold_cases` has cold ones.
    """
    import torch
    from torch.nn.functional import linear

    import halfbyte

    n, k = shape
    torch.manual_seed(0)
    weight = halfbyte.quantize_nf4((torch.randn(n, k) * 0.02).to(dtype))
    dense = weight.dequantize(dtype)
    a = (torch.randn(rank, k) / k**0.5).to(dtype).requires_grad_()
    b = (torch.randn(n, rank) * 0.05).to(dtype).requires_grad_()
    dx_of = (*weight.op_args(), k, None, None, None, None, 1.0, 0.0, None, [True] + [False] * 3)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5

    table = []
    for m in row_counts:
        x = torch.randn(m, k, dtype=dtype, requires_grad=True)
        frozen, dy = x.detach(), torch.randn(m, n, dtype=dtype)

        def fused(x=x, dy=dy):
            return torch.autograd.grad(halfbyte.lora_linear(x, weight, a, b, 2.0), (x, a, b), dy)

        def separate(x=x, dy=dy):
            y = linear(x, dense) + 2.0 * linear(linear(x, a), b)
            return torch.autograd.grad(y, (x, a, b), dy)

        def forward(x=frozen):
            return halfbyte.nf4_linear(x, weight)

        def backward(dy=dy):
            return torch.ops.halfbyte.lora_linear_backward(dy, None, *dx_of)[0]

        check_close("forward", forward(), linear(frozen, dense), tolerance)
        check_close("dX", backward(), dy @ dense, tolerance)
        for name, got, expected in zip(("dX", "dA", "dB"), fused(), separate(), strict=True):
            check_close(f"LoRA {name}", got, expected, tolerance)
        best = interleaved(
            {
                "forward": forward,
                "dense": lambda x=frozen: linear(x, dense),
                "dX": backward,
                "dense dX": lambda dy=dy: dy @ dense,
                "fused": fused,
                "separate": separate,
            }
        )
        rate = 2e-6 * m * n * k / best["forward"]
        table.append(
            {
                "M": m,
                "forward ms": best["forward"],
                "GFLOP/s": round(rate),
                "of roof": f"{rate / roof:.0%}",
                "vs dense": best["dense"] / best["forward"],
                "dX ms": best["dX"],
                "dX vs dense": best["dense dX"] / best["dX"],
                "LoRA ms": best["fused"],
                "LoRA vs dense": best["separate"] / best["fused"],
            }
        )
    return table


def cold_cases(shape: tuple[int, int], row_counts: list[int], dtype: torch.dtype) -> list[dict]:
    """Forward with weights that no cache holds: copies take turns until COLD_BYTES have passed."""
    import itertools

    import torch
    from torch.nn.functional import linear

    import halfbyte

    n, k = shape
    torch.manual_seed(0)
    first = halfbyte.quantize_nf4(torch.randn(n, k) * 0.02)
    packed = [first] + [
        halfbyte.quantize_nf4(torch.randn(n, k) * 0.02) for _ in range(COLD_BYTES // first.nbytes)
    ]
    dense = first.dequantize(dtype)
    copies = [dense] + [dense.clone() for _ in range(COLD_BYTES // (n * k * dtype.itemsize))]
    table = []
    for m in row_counts:
        x = torch.randn(m, k, dtype=dtype)
        next_packed, next_dense = itertools.cycle(packed), itertools.cycle(copies)
        best = interleaved(
            {
                "forward": lambda x=x, w=next_packed: halfbyte.nf4_linear(x, next(w)),
                "dense": lambda x=x, w=next_dense: linear(x, next(w)),
            },
            repeats=60,
        )
        table.append(
            {
                "M": m,
                "forward ms": best["forward"],
                "GB/s of packed bytes": first.nbytes / best["forward"] / 1e6,
                "vs dense": best["dense"] / best["forward"],
            }
        )
    return table
