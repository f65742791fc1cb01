"""halfbyte on a CUDA card: checked first, then timed with CUDA events against its peers.

    python -m benchmarks.python.cuda_bench              everything; writes cuda_<card>.csv
    python -m benchmarks.python.cuda_bench --dry-run    every case on small CPU tensors, no numbers

    quantize, dequantize        bitsandbytes
    forward, dX                 torch bf16; dequantize + matmul (cuBLAS); bitsandbytes
    LoRA forward, LoRA backward the same with rank 16
    AdamW8bit, PagedAdamW8bit   torch fused fp32; bitsandbytes; paged against unpaged

A time is the median of calls whose caches were flushed by a write of more than any L2 holds. GB/s
counts what a case must move at least; `of bandwidth` divides by a copy measured on the same card.
Without a card: one sentence and exit code 2. The torch-free harness is
build/benchmark/benchmarks/cuda/halfbyte_cuda_benchmarks; it is run as well when it is built.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

import halfbyte
from benchmarks.python import peers, timing
from halfbyte.cli.bench import check_close
from halfbyte.optim import AdamW8bit, PagedAdamW8bit

RANK, SCALING = 16, 2.0
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
TOLERANCE = {"bitsandbytes": 2e-2}  # its scales may differ by a code; the others: 1e-2
FLUSH = 256 << 20
HARNESS = timing.ROOT / "build/benchmark/benchmarks/cuda/halfbyte_cuda_benchmarks"
CASES = ("quantize", "dequantize", "forward", "dX", "LoRA forward", "LoRA backward", "AdamW8bit",
         "PagedAdamW8bit")  # fmt: skip

Calls = dict[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Calls that do the same, halfbyte's first, and the bytes they must move."""

    name: str
    shape: str
    rows: int | str
    moved: float
    calls: Calls
    checked: bool = True  # by comparing results


# --- clocks ---------------------------------------------------------------------------------------


class CardClock:
    """Median milliseconds by CUDA events."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._flush = torch.empty(FLUSH // 4, device="cuda")

    def time(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        first = self._once(call)
        turns = max(5, min(100, int(1e3 * self.seconds / max(first, 1e-3))))
        return sorted(self._once(call) for _ in range(turns))[turns // 2]

    def _once(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.fill_(1.0)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def bandwidth(self) -> float:
        """Bytes a second of a copy."""
        source = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * FLUSH / (1e-3 * self.time(lambda: target.copy_(source)))


class DryClock:
    """Calls once; there is nothing to measure."""

    def time(self, call: Callable[[], object]) -> float:
        call()
        return float("nan")

    def bandwidth(self) -> float:
        return float("nan")


# --- cases ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    device: str
    shapes: dict[str, tuple[int, int]]
    rows: list[int]
    elements: int  # of a parameter of the optimizers
    tensors: int


def bnb():
    """bitsandbytes, or None."""
    try:
        return peers.bitsandbytes()
    except peers.Unavailable:
        return None


def format_cases(shape: str, weight: torch.Tensor, packed: halfbyte.NF4Weight) -> Iterator[Case]:
    out = torch.empty_like(weight)
    moved = weight.nbytes + packed.nbytes
    quantize: Calls = {"halfbyte": lambda: halfbyte.quantize_nf4(weight).dequantize()}
    dequantize: Calls = {"halfbyte": lambda: packed.dequantize(out=out)}
    module = bnb()
    if module is not None:
        functional = module.functional
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        codes, state = functional.quantize_4bit(weight, **options)
        dequantize["bitsandbytes"] = lambda: functional.dequantize_4bit(codes, state)
        quantize["bitsandbytes"] = lambda: functional.dequantize_4bit(
            *functional.quantize_4bit(weight, **options)
        )
    yield Case("dequantize", shape, "", moved, dequantize)
    # There and back, so that results can be compared; `dequantize` says what the way back takes.
    yield Case("quantize", shape, "", 2 * moved, quantize)


def linear_cases(
    shape: str, weight: torch.Tensor, packed: halfbyte.NF4Weight, m: int
) -> Iterator[Case]:
    n, k = weight.shape
    dtype, dense = weight.dtype, packed.dequantize(weight.dtype)
    make = {"device": weight.device, "dtype": dtype}
    x, dy = torch.randn(m, k, **make), torch.randn(m, n, **make)
    a = (torch.randn(RANK, k, **make) / k**0.5).requires_grad_()
    b = (torch.randn(n, RANK, **make) * 0.05).requires_grad_()
    leaf = x.clone().requires_grad_()
    products: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch bf16": lambda x: linear(x, dense),
        "dequantize + matmul": lambda x: Dequantized.apply(x, packed),
    }
    if bnb() is not None:
        layer = peers.bitsandbytes_training(weight.cpu()).to(weight.device)
        products["bitsandbytes"] = layer

    def ours(x, *lora):
        return halfbyte.lora_linear(x, packed, *(lora or (None, None)), SCALING)

    def with_lora(product):
        return lambda x, a, b: product(x) + SCALING * linear(linear(x, a), b)

    adapted = {"halfbyte": ours} | {name: with_lora(f) for name, f in products.items()}
    bare = {"halfbyte": ours} | products
    thin = RANK * (n + k) * dtype.itemsize
    moved = packed.nbytes + m * (n + k) * dtype.itemsize

    def forward(product, *operands):
        return torch.no_grad()(lambda: product(*operands))

    def backward(product, *operands):
        y = product(*operands)
        return lambda: torch.autograd.grad(y, operands, dy, retain_graph=True)

    for name, run, layers, operands, bytes_moved in (
        ("forward", forward, bare, (x,), moved),
        ("dX", backward, bare, (leaf,), moved),
        ("LoRA forward", forward, adapted, (x, a, b), moved + thin),
        ("LoRA backward", backward, adapted, (leaf, a, b), moved + 2 * thin + x.nbytes),
    ):
        calls = {peer: run(product, *operands) for peer, product in layers.items()}
        yield Case(name, shape, m, bytes_moved, calls)


class Dequantized(torch.autograd.Function):
    """Dequantizes all of W, then multiplies, both ways."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return linear(x, packed.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.packed.dequantize(dy.dtype), None


def optimizer_cases(plan: Plan) -> Iterator[Case]:
    def step(constructor) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(plan.elements, generator=generator) for _ in range(plan.tensors)]
        params = [each.to(plan.device).requires_grad_() for each in made]
        for param in params:
            param.grad = 1e-3 * torch.ones_like(param)
        return constructor(params).step

    count = plan.elements * plan.tensors
    shape = f"{plan.tensors} x {plan.elements}"
    calls = {
        "halfbyte": step(AdamW8bit),
        "torch fused fp32": step(lambda params: torch.optim.AdamW(params, fused=True)),
    }
    paged = {"halfbyte": step(PagedAdamW8bit), "unpaged": calls["halfbyte"]}
    module = bnb()
    if module is not None:
        calls["bitsandbytes"] = step(module.optim.AdamW8bit)
        if plan.device != "cpu":
            paged["bitsandbytes"] = step(module.optim.PagedAdamW8bit)
    moved = count * (4 * 2 + 4 + 2.03125 * 2)
    yield Case("AdamW8bit", shape, "", moved, calls, checked=False)
    yield Case("PagedAdamW8bit", shape, "", moved, paged, checked=False)


def check_optimizers(device: str) -> None:
    """Three steps of each of ours against torch's. Raises AssertionError."""
    for optimizer in (AdamW8bit, PagedAdamW8bit):
        ours = [torch.ones(5000, device=device, requires_grad=True) for _ in range(2)]
        exact = [p.detach().clone().requires_grad_() for p in ours]
        for made, params in ((optimizer(ours), ours), (torch.optim.AdamW(exact), exact)):
            for param in params:
                param.grad = torch.full_like(param, 0.01)
            for _ in range(3):
                made.step()
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def cases(plan: Plan) -> Iterator[Case]:
    for shape, (n, k) in plan.shapes.items():
        torch.manual_seed(0)
        weight = (torch.randn(n, k, device=plan.device) * 0.02).to(torch.bfloat16)
        packed = halfbyte.quantize_nf4(weight)
        yield from format_cases(shape, weight, packed)
        for m in plan.rows:
            yield from linear_cases(shape, weight, packed, m)
    check_optimizers(plan.device)
    yield from optimizer_cases(plan)


# --- measuring ------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Every result against halfbyte's. Raises ValueError."""
    expected = _results(case.calls["halfbyte"])
    for peer, call in case.calls.items():
        for i, (one, other) in enumerate(zip(_results(call), expected, strict=True)):
            label = f"{case.name}, {case.shape}, M = {case.rows}: {peer}, result {i}"
            check_close(label, one, other, TOLERANCE.get(peer, 1e-2))


def _results(call: Callable[[], object]) -> tuple[torch.Tensor, ...]:
    got = call()
    return got if isinstance(got, tuple) else (got,)


def measure(case: Case, clock, bandwidth: float) -> dict:
    if case.checked:
        check(case)
    ms = {peer: clock.time(call) for peer, call in case.calls.items()}
    ours = ms.pop("halfbyte")
    row = {"case": case.name, "shape": case.shape, "M": case.rows, "halfbyte ms": ours}
    row |= {"GB/s": 1e-6 * case.moved / ours, "of bandwidth": 1e3 * case.moved / ours / bandwidth}
    for peer, time in ms.items():
        row |= {f"{peer} ms": time, f"vs {peer}": time / ours}
    return row


def file_name(card: str) -> str:
    return f"cuda_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.csv"


def dry_run() -> None:
    """Every case and every check on small CPU tensors."""
    plan = Plan("cpu", {"small": (96, 128)}, [1, 17], 3000, 2)
    walked = [measure(case, DryClock(), float("nan")) for case in cases(plan)]
    for row in walked:
        print(f"dry run, not measured: {row['case']} {row['shape']} {row['M']}")


def main(arguments: list[str] | None = None) -> int:
    command = timing.parser(__doc__)
    command.add_argument("--dry-run", action="store_true", help="walk all cases on the CPU")
    command.add_argument("--shape", action="append", choices=list(timing.named_shapes()))
    command.add_argument("--rows", type=timing.numbers, default=ROWS, metavar="M,M")
    command.add_argument("--seconds", type=float, default=0.3, help="time a call, about")
    options = command.parse_args(arguments)
    if options.dry_run:
        dry_run()
        return 0
    if not torch.cuda.is_available():
        print(
            "no CUDA card: torch sees none; --dry-run walks the cases on the CPU", file=sys.stderr
        )
        return 2
    card = torch.cuda.get_device_name()
    print(f"card: {card}; commit {timing.commit()}; torch {torch.__version__}", flush=True)
    if HARNESS.exists():
        subprocess.run([HARNESS, timing.ROOT / "benchmarks/shapes.csv"], check=True)
    shapes = timing.named_shapes()
    plan = Plan("cuda", {s: shapes[s] for s in options.shape or shapes}, options.rows, 200_000, 200)
    clock = CardClock(options.seconds)
    bandwidth = clock.bandwidth()
    rows = []
    for case in cases(plan):
        rows.append({"card": card, **measure(case, clock, bandwidth)})
        print(f"{case.name} {case.shape} {case.rows}: {rows[-1]['halfbyte ms']:.4f} ms", flush=True)
    timing.print_table(f"{card}, copy {1e-9 * bandwidth:.0f} GB/s", rows)
    timing.write_csv(options.output / file_name(card), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
