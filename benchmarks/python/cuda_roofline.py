"""What the CUDA kernels should take on cards that nobody here has: predicted, not measured.

    python -m benchmarks.python.cuda_roofline

Every kernel is executed by the PTX interpreter of the tests at two small shapes, which gives what a
block costs to start and finish and what each of its steps costs (for elementwise kernels: each
element): warp instructions, mma, wavefronts of shared memory, sectors of global memory. A real
shape has so many blocks and so many steps; the time of a launch on a card is

    max(memory, L2, L1, tensor, shared, issue) + launch

    memory   bytes that must come from or go to DRAM once / (bandwidth * MEMORY_EFFICIENCY)
    L2       what the tiles read and write, again for every tile, and partial sums, which by design
             are at most 17 MB / L2 bandwidth
    L1       counted sectors, four a clock
    L1, tensor, shared, issue
             of the multiprocessor with most blocks, so that a last wave that is not full costs as
             much as a full one; shared: a wavefront a clock; issue: four warp instructions a
             clock, two for integers

and a call is the sum of its launches. From 2,048 rows on, what a user gets is cuBLAS on panels that
are dequantized into L2 (forward) or on all of W dequantized (backward): `large M`; the fused
kernel's time is in the table as well. The times are
bounds: latency, ptxas, clocks under load and the overlap of launches are not in the model, and PTX
instructions are not machine instructions.

Compares with the marks; writes cuda_roofline.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.python import timing

MEMORY_EFFICIENCY = 0.92  # of the data sheet's bandwidth; a copy's share in public measurements
LAUNCH = 1e-6  # s: the gap between launches that follow each other on a stream
SHAPES = ("llama-2-7b.q_proj", "llama-2-7b.down_proj", "llama-3.2-3b.up_proj")
OPTIMIZED = "40,000,000 parameters"
PANEL = 8 << 20  # weights dequantized at a time from PANEL_ROWS rows on
PANEL_ROWS = 2048
ROWS = (1, 4, 16, 64, 128, 512, 1024, 2048, 4096)
LABEL = "predicted, not measured"


@dataclasses.dataclass(frozen=True)
class Card:
    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes / s
    l2_bandwidth: float  # bytes / s
    tensor: float  # bf16 FLOP / s, dense, fp32 sums, by mma.sync
    matmul: float  # bf16 FLOP / s that cuBLAS is taken to reach on large shapes
    shared_bytes: int  # a multiprocessor

    def seconds(self, cycles: float) -> float:
        return cycles / self.clock


# Multiprocessors, clocks, bandwidths and tensor rates: NVIDIA A100 Tensor Core GPU Architecture
# (2020) and the A100 80GB SXM data sheet; NVIDIA H100 Tensor Core GPU Architecture (2022) and the
# H100 SXM data sheet; NVIDIA Ada GPU Architecture (2022). L2: 5,120 bytes a clock in the A100
# paper, taken for the H100 as well; about 5 TB/s for the 4090 as measured by Chips and Cheese
# (2022). mma.sync on Hopper reaches 63 % of the peak of wgmma: Luo et al., Benchmarking and
# Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking (2024). `matmul` follows the
# public figures behind kPanelRows in cuda/lora_linear/lora_linear.cu.
CARDS = (
    Card("A100 80GB", 108, 1.41e9, 2.039e12, 7.2e12, 312e12, 255e12, 164 << 10),
    Card("H100 SXM", 132, 1.83e9, 3.35e12, 9.3e12, 0.63 * 989e12, 700e12, 228 << 10),
    Card("RTX 4090", 128, 2.52e9, 1.008e12, 5.0e12, 165e12, 160e12, 100 << 10),
)

# --- counts ---------------------------------------------------------------------------------------

COUNTS = ("instructions", "integer", "mma", "wavefronts", "sectors")
MMA_FLOP = 2 * 16 * 8 * 16  # a tf32 one does half of it at half the rate
INTEGER = ("add.s", "add.u", "sub.s", "sub.u", "mul.wide", "mul.lo", "mad.lo", "mad.wide", "and",
           "or.b", "xor", "not", "shl", "shr", "shf", "prmt", "bfe", "bfi", "lop3", "min.s",
           "min.u", "max.s", "max.u", "setp.lt.s", "setp.gt.s", "setp.ge.s", "setp.le.s",
           "setp.eq.s", "setp.ne.s", "setp.lt.u", "setp.gt.u")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    instructions: float
    integer: float
    mma: float
    wavefronts: float
    sectors: float

    @staticmethod
    def of(counters) -> Counts:
        by_name = counters.instructions
        return Counts(
            sum(by_name.values()),
            sum(n for name, n in by_name.items() if name.startswith(INTEGER)),
            counters.mma,
            counters.shared_wavefronts,
            counters.global_read.sectors + counters.global_written.sectors,
        )

    def combine(self, other: Counts, own: float, others: float) -> Counts:
        """own * self + others * other"""
        return Counts(*(own * getattr(self, c) + others * getattr(other, c) for c in COUNTS))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel costs: a block, and a step of a block."""

    block: Counts
    step: Counts
    resident: int  # blocks a multiprocessor, by its launch bounds and its shared memory
    shared_bytes: int

    def total(self, blocks: int, steps: float) -> Counts:
        return self.block.combine(self.step, blocks, steps)


def fitted(kernel: str, first, second, steps: tuple[float, float], module) -> Kernel:
    """From two launches of `kernel` on equal numbers of blocks, with so many steps in all."""
    a, b = Counts.of(first.report.counters), Counts.of(second.report.counters)
    blocks = [x.grid[0] * x.grid[1] * x.grid[2] for x in (first, second)]
    assert blocks[0] == blocks[1], (kernel, blocks)
    step = b.combine(a, 1 / (steps[1] - steps[0]), -1 / (steps[1] - steps[0]))
    program = module.program(kernel)
    bound = program.entry.tuning.get(".minnctapersm", "1")
    per_block = a.combine(step, 1 / blocks[0], -steps[0] / blocks[0])
    return Kernel(per_block, step, int(bound), program.static_shared)


class Interpreter:
    """The CUDA library in the interpreter, and the tests' calls of it."""

    def __init__(self) -> None:
        for folder in ("tests", "tests/python", "tests/python/cuda"):
            sys.path.insert(0, str(timing.ROOT / folder))
        import cuda_api
        from ptx_interpreter import build_library

        built = cuda_api.build_all()
        self._scratch = tempfile.TemporaryDirectory()
        library = Path(self._scratch.name) / "library.so"
        shutil.copy(build_library([each.object for each in built]), library)
        self.gpu = cuda_api.Interpreted(built, "compute_80", library, checks=False)
        self.gpu.runtime.measure = True
        self.gpu.runtime.attributes["multiProcessorCount"] = 1

    def launches(self, call) -> list:
        self.gpu.runtime.launches.clear()
        call()
        self.gpu.forget()
        return list(self.gpu.runtime.launches)

    def fit(self, part: str, first, second, steps: tuple[float, float]) -> Kernel:
        """The kernel whose name has `part`, from two calls."""
        pair = [
            next(x for x in self.launches(call) if part in x.kernel) for call in (first, second)
        ]
        name = pair[0].kernel
        module = next(m for m in self.gpu.runtime.modules if name in m.kernels)
        return fitted(name, *pair, steps, module)


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every kernel of the model by name."""
    run = Interpreter()
    import adamw8_cases
    import lora_linear_cases as lora
    import test_cuda_nf4 as nf4

    gpu, bf16 = run.gpu, torch.bfloat16

    def forward(m, n, k, r=0):
        return lambda: lora.forward(gpu, lora.Layer(m, n, k, r))

    def backward(m, n, k, r=0):
        layer = lora.Layer(m, n, k, r)
        t = torch.zeros(m, r) if r else None
        return lambda: lora.gradients(gpu, layer, t)

    def adamw(elements):
        case = adamw8_cases.new_case(elements)
        case.grad = torch.ones(elements)
        adamw8_cases.upload(gpu, case)
        launch, _ = adamw8_cases.make_launch(gpu, [case])
        gpu.call("adamw8_step", launch)

    made = {}
    for rows in (64, 128):
        for r in (0, 16):
            suffix = f"{rows} rows, r={r}"
            made[f"forward, {suffix}"] = run.fit(
                "forward_sm80", forward(rows, 128, 64, r), forward(rows, 128, 192, r), (1, 3)
            )
            made[f"backward, {suffix}"] = run.fit(
                "backward_sm80", backward(rows, 64, 128, r), backward(rows, 192, 128, r), (1, 3)
            )
    for tokens in (8, 16):
        for r in (0, 16):
            made[f"few rows, {tokens} tokens, r={r}"] = run.fit(
                "few_rowsI", forward(tokens, 16, 1024, r), forward(tokens, 16, 3072, r), (8, 24)
            )
    made["skinny"] = run.fit("skinny_mmaI", forward(64, 8, 64, 16), forward(64, 8, 96, 16), (2, 3))
    made["sum partials"] = run.fit(
        "sum_partials", forward(64, 64, 512), forward(64, 64, 768), (16 * 2, 16 * 3)
    )

    def sized(call, small, large):
        return (lambda: call(small)), (lambda: call(large))

    def dequantize(elements):
        nf4.check_dequantize(gpu, elements, bf16)

    def quantize(elements):
        nf4.quantize(gpu, nf4.rough((elements,), seed=1, dtype=bf16))

    small, large = 1 << 16, 1 << 17  # every block of one multiprocessor has its share
    for name, part, call in (
        ("dequantize", "dequantize_4bit", dequantize),
        ("quantize", "quantize_4bit", quantize),
        ("adamw8 update", "update_kernel", adamw),
        ("adamw8 check", "check_gradients", adamw),
    ):
        made[name] = run.fit(part, *sized(call, small, large), (small, large))
    return made


# --- time -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    steps: float  # of all blocks; elements of an elementwise kernel
    dram: float  # bytes that must move
    l2: float  # bytes that the blocks ask for


def parts(launch: Launch, card: Card) -> dict[str, float]:
    """Seconds by resource."""
    kernel = kernels()[launch.kernel]
    total = kernel.total(launch.blocks, launch.steps)
    fits = card.shared_bytes // max(kernel.shared_bytes, 1)
    resident = max(1, min(kernel.resident, fits))
    full, rest = divmod(launch.blocks, card.multiprocessors * resident)
    busiest = full * resident + -(-rest // card.multiprocessors)  # blocks of one multiprocessor
    share = busiest / launch.blocks
    per_clock_mma = card.tensor / MMA_FLOP / card.multiprocessors / card.clock
    return {
        "memory": launch.dram / (card.bandwidth * MEMORY_EFFICIENCY),
        "L2": launch.l2 / card.l2_bandwidth,
        "L1": card.seconds(share * total.sectors / 4),
        "tensor": card.seconds(share * total.mma / per_clock_mma),
        "shared": card.seconds(share * total.wavefronts),
        "issue": card.seconds(share * max(total.instructions / 4, total.integer / 2)),
    }


def predicted(launches: list[Launch], card: Card) -> tuple[float, str]:
    """Seconds of a call, and what bounds its longest launch."""
    by_launch = [parts(launch, card) for launch in launches]
    longest = max(by_launch, key=lambda each: max(each.values()))
    seconds = sum(max(each.values()) + LAUNCH for each in by_launch)
    return seconds, max(longest, key=longest.get)


# --- calls: the launches of cuda/*/*.cu -----------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def split_count(tiles: int, steps: int, least: int, most: int) -> int:
    """lora_linear_impl.h"""
    return max(1, min(steps // least, ceil_div(256, tiles), most))


def weight_bytes(n: int, k: int) -> float:
    """Codes, scales in 8 bits, their scales."""
    return n * k * (1 / 2 + 1 / 64 + 4 / (64 * 256))


def product(direction: str, m: int, j: int, d: int, r: int) -> list[Launch]:
    """The product with the packed weight: [m, d] by [d, j]."""
    codes, left, out = weight_bytes(j, d), 2 * m * d, 2 * m * j
    if direction == "forward" and m <= 16:
        rows, columns, steps, least = m, 16, ceil_div(d, 128), 16
        name = f"few rows, {8 if m <= 8 else 16} tokens, r={r}"
    else:
        rows, columns, steps, least = 128 if m > 64 else 64, 128, ceil_div(d, 64), 4
        name = f"{direction}, {rows} rows, r={r}"
    row_tiles, column_tiles = ceil_div(m, rows), ceil_div(j, columns)
    tiles = row_tiles * column_tiles
    splits = split_count(tiles, steps, least, 16)
    asked = row_tiles * codes + column_tiles * left + out
    partials = 4 * splits * m * j if splits > 1 else 0
    dram = codes + left + out + 4 * r * (m + j)
    made = [Launch(name, tiles * splits, tiles * steps, dram, asked + partials)]
    return made + sum_partials(m * j, splits)


def sum_partials(outputs: int, splits: int) -> list[Launch]:
    blocks = ceil_div(outputs, 256)
    launch = Launch("sum partials", blocks, blocks * splits, 0, (4 * splits + 2) * outputs)
    return [launch] if splits > 1 else []


def skinny(i: int, d: int, r: int) -> list[Launch]:
    """T, U, dA or dB of rank r <= 64: an activation [i, d] or [d, i] is read once."""
    tiles, steps = ceil_div(i, 64), ceil_div(d, 32)
    splits = split_count(tiles, steps, 4, 64)
    dram, asked = 2 * i * d + 4 * r * (i + d), 2 * i * d + 4 * r * (i * splits + tiles * d)
    made = [Launch("skinny", tiles * splits, tiles * steps, dram, asked)]
    return made + sum_partials(i * r, splits)


def linear(direction: str, m: int, n: int, k: int, r: int = 0) -> list[Launch]:
    if direction == "forward":
        return (skinny(m, k, r) if r else []) + product("forward", m, n, k, r)
    lora = skinny(m, n, r) + skinny(k, m, r) + skinny(n, m, r) if r else []
    return lora + product("backward", m, k, n, r)


def elementwise(kernel: str, elements: int, moved: float, card: Card, per_block: int) -> Launch:
    """At most as many blocks as a card holds at once."""
    resident = card.multiprocessors * kernels()[kernel].resident
    blocks = min(resident, ceil_div(elements, per_block))
    return Launch(kernel, blocks, elements, moved, moved)


def dequantize(n: int, k: int, card: Card) -> list[Launch]:
    moved = weight_bytes(n, k) + 2 * n * k
    return [elementwise("dequantize", n * k, moved, card, 8 * 1024)]


def adamw8(elements: int, card: Card) -> list[Launch]:
    """fp32 parameters and gradients; the gradient is read by the check and by the update."""
    return [
        elementwise("adamw8 check", elements, 4 * elements, card, 8 * 2048),
        elementwise("adamw8 update", elements, (12 + 4 + 4 / 64) * elements, card, 12 * 256),
    ]


def matmul(m: int, n: int, k: int, card: Card) -> float:
    """bf16 cuBLAS, in seconds."""
    moved = 2 * (m * k + n * k + m * n) / (card.bandwidth * MEMORY_EFFICIENCY)
    return max(2 * m * n * k / card.matmul, moved) + LAUNCH


def panelled(m: int, n: int, k: int, card: Card) -> float:
    """Panels dequantized into L2 and multiplied by cuBLAS, one after the other, in seconds."""
    panels = ceil_div(n * k, PANEL)
    whole = elementwise("dequantize", n * k, weight_bytes(n, k), card, 8 * 1024)
    whole = dataclasses.replace(whole, l2=whole.l2 + 2 * n * k)
    return predicted([whole], card)[0] + matmul(m, n, k, card) + 2 * (panels - 1) * LAUNCH


# --- tables ---------------------------------------------------------------------------------------


def row(card: Card, case: str, shape: str, m, launches: list[Launch], **more) -> dict:
    seconds, bound = predicted(launches, card)
    moved = sum(launch.dram for launch in launches)
    return {
        "label": LABEL, "card": card.name, "case": case, "shape": shape, "M": m,
        "predicted us": 1e6 * seconds, "bound": bound,
        "of bandwidth": moved / card.bandwidth / seconds, **more,
    }  # fmt: skip


def table(card: Card) -> list[dict]:
    rows = []
    for shape in SHAPES:
        n, k = timing.named_shapes()[shape]
        rows.append(row(card, "dequantize", shape, "", dequantize(n, k, card)))
        quantize = elementwise("quantize", n * k, 2.5 * n * k + n * k / 16, card, 8 * 256)
        rows.append(row(card, "quantize", shape, "", [quantize]))
        for direction in ("forward", "backward"):
            for m in ROWS:
                bare, _ = predicted(linear(direction, m, n, k), card)
                dense = matmul(m, n, k, card)
                both = predicted(dequantize(n, k, card), card)[0] + dense
                ratios = {"vs dense": dense / bare, "vs dequantize + matmul": both / bare}
                if m >= PANEL_ROWS:
                    large = panelled(m, n, k, card) if direction == "forward" else both
                    ratios["large M vs dense"] = dense / large
                launches = linear(direction, m, n, k)
                rows.append(row(card, direction, shape, m, launches, **ratios))
                lora, _ = predicted(linear(direction, m, n, k, 16), card)
                launches = linear(direction, m, n, k, 16)
                more = {"LoRA adds": lora / bare - 1}
                rows.append(row(card, f"LoRA {direction}", shape, m, launches, **more))
    rows.append(row(card, "AdamW8bit step", OPTIMIZED, "", adamw8(40_000_000, card)))
    return rows


# (mark, case, M, column, least; negative: at most)
MARKS = (
    ("dequantize at 85 % of bandwidth", "dequantize", "", "of bandwidth", 0.85),
    ("M = 1 at 75 % of bandwidth", "forward", 1, "of bandwidth", 0.75),
    ("M = 1 3.5x torch bf16", "forward", 1, "vs dense", 3.5),
    ("M = 512 1.2x dequantize + cuBLAS", "forward", 512, "vs dequantize + matmul", 1.2),
    ("M = 512 1.2x, backward", "backward", 512, "vs dequantize + matmul", 1.2),
    ("M = 2048 0.9x bf16 cuBLAS", "forward", 2048, "large M vs dense", 0.9),
    ("M = 2048 0.9x, backward", "backward", 2048, "large M vs dense", 0.9),
    ("M = 4096 0.95x bf16 cuBLAS", "forward", 4096, "large M vs dense", 0.95),
    ("M = 4096 0.95x, backward", "backward", 4096, "large M vs dense", 0.95),
    ("LoRA r=16 adds at most 5 %, M = 512", "LoRA forward", 512, "LoRA adds", -0.05),
    ("LoRA r=16 adds at most 5 %, M = 4096", "LoRA forward", 4096, "LoRA adds", -0.05),
    ("AdamW8bit at 80 % of bandwidth", "AdamW8bit step", "", "of bandwidth", 0.8),
)


def marks(rows: list[dict]) -> list[dict]:
    """Which marks are predicted to be met, on the shape of llama-2-7b.down_proj."""
    shape = SHAPES[1]
    found = []
    for card in dict.fromkeys(r["card"] for r in rows):
        for mark, case, m, column, least in MARKS:
            value = next(
                r[column]
                for r in rows
                if (r["card"], r["case"], r["M"]) == (card, case, m)
                and r["shape"] in (shape, OPTIMIZED)
            )
            met = value >= least if least > 0 else value <= -least
            found.append(
                {"card": card, "mark": mark, "predicted": value, "": "met" if met else "missed"}
            )
    return found


def write(path: Path, rows: list[dict]) -> None:
    """No machine made these numbers: the column is the label's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*timing.columns(rows), "commit"])
        writer.writeheader()
        for each in rows:
            rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in each.items()}
            writer.writerow({**rounded, "commit": timing.commit()})


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    options = command.parse_args(arguments)
    if shutil.which("nvcc") is None:
        command.error("nvcc is not on PATH: there is no PTX to count")
    rows = [each for card in CARDS for each in table(card)]
    for card in CARDS:
        chosen = [
            r for r in rows if r["card"] == card.name and r["shape"] in (SHAPES[0], OPTIMIZED)
        ]
        shown = [
            {k: v for k, v in r.items() if k not in ("label", "card", "shape")} for r in chosen
        ]
        timing.print_table(f"{card.name}, {SHAPES[0]}: {LABEL}", shown)
    timing.print_table(f"Marks: {LABEL}", marks(rows))
    write(options.output / "cuda_roofline.csv", rows)


if __name__ == "__main__":
    main()
