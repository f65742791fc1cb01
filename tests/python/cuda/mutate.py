"""How much the CUDA tests notice: small faults planted into the PTX of every kernel.

    python tests/python/cuda/mutate.py                          every fault: hours
    python tests/python/cuda/mutate.py --sample 40 --seed 1     40 of each kernel, and every
                                                                barrier, wait and commit
    python tests/python/cuda/mutate.py --kernel forward_sm80

A fault (ptx_interpreter/mutate.py) is given to those of the tests' own cases that execute its line,
until one fails. Prints the kill table and the survivors, and writes both to build/mutate_cuda.md.
Exit code 1 when a dropped barrier, wait or commit survives unexplained, or when less than 90 % of
a kernel's other faults are noticed or explained (EXPLAINED). Of a template, the instance that the
cases cover best stands for all.

PTX executed by an interpreter; not run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import cuda_api as api
import test_cuda_adamw8 as adamw8
import test_cuda_lora_linear as lora_linear
import test_cuda_nf4 as nf4
from adamw8_cases import new_case
from explained import EXPLAINED
from lora_linear_cases import CASES, RAGGED, Layer, check_bounds, check_exact
from ptx_interpreter import PtxError, Unsupported, build_library, handlers
from ptx_interpreter.launch import launch
from ptx_interpreter.mutate import KINDS, Mutation, mutations

STEP_LIMIT = 100_000  # of a launch; the unchanged kernels stay below
LEAST = 0.9  # of the faults that are no dropped barrier, wait or commit
OUTPUT = api.ROOT / "build/mutate_cuda.md"

# --- cases: those of the tests --------------------------------------------------------------------

Case = Callable[[api.Interpreted], object]


def on_a_small_card(case: Case) -> Case:
    """One multiprocessor: blocks of threads take several turns."""

    def run(gpu) -> None:
        attributes = dict(gpu.runtime.attributes)
        gpu.runtime.attributes["multiProcessorCount"] = 1
        try:
            case(gpu)
        finally:
            gpu.runtime.attributes = attributes

    return run


def bad_elements(gpu) -> None:
    """In every place of a lane, and several at once; of one load and of two."""
    for bad in ([0], [2100, 1999, 11], [63, 64], [2559], *([8 * i + i % 8] for i in range(17, 25))):
        weight = nf4.rough((2560,), seed=1, dtype=torch.bfloat16)
        weight[bad] = torch.inf
        for block_size in (64, 512):
            assert nf4.quantize(gpu, weight.clone(), "nf4", block_size)[2] == min(bad)


def nf4_cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    quantize = [
        partial(nf4.test_quantize_every_block_size, codebook=book, block_size=size)
        for book, size in (("nf4", 32), ("fp4", 64), ("int4", 256), ("nf4", 512), ("nf4", 4096))
    ]
    quantize += [
        partial(nf4.test_quantize_counts_and_types, count=count, dtype=dtype)
        for dtype in nf4.FLOATS
        for count in (*range(1, 9), 257, 2049)
    ]
    quantize += [
        partial(test, dtype=dtype, offset=offset)
        for test in (nf4.test_quantize_unaligned, nf4.test_quantize_tails_of_blocks_read_twice)
        for dtype, offset in ((bf16, 1), (torch.float16, 1), (fp32, 1), (bf16, 0))
    ]
    quantize += [partial(nf4.test_quantize_thresholds_and_their_neighbours, codebook="nf4")]
    quantize += [nf4.test_quantize_zero_and_subnormal_blocks]
    quantize += [bad_elements]
    many = partial(nf4.check_quantize, weight=nf4.rough((60 * 256 + 5,), seed=9), block_size=32)
    quantize += [on_a_small_card(many)]
    double = [
        partial(nf4.test_double_quantize, blocks=blocks, shifted=shifted)
        for blocks in (*range(1, 9), 257, 1000)
        for shifted in (0, 1)
    ]
    many = nf4.rough((13_000,), seed=4).abs()
    many = partial(nf4.check_double_quantize, absmax=many, offset=many.mean().reshape(1))
    double += [on_a_small_card(many)]
    double += [nf4.test_double_quantize_every_threshold, nf4.test_double_quantize_extremes]
    dequantize = [
        partial(nf4.check_dequantize, count=count, dtype=dtype, block_size=size, **options)
        for count, dtype, size, options in (
            (2500, bf16, 64, {}),
            (1025, bf16, 32, {"own": True}),
            (5001, bf16, 4096, {"double": False}),
            (2111, bf16, 64, {"packed_shift": 1}),
            (9549, bf16, 128, {"codebook": "fp4"}),
        )
    ]
    many = partial(nf4.check_dequantize, count=60 * 1024 + 1, dtype=bf16)
    dequantize += [on_a_small_card(many)]
    return quantize + double + dequantize


def many_tensors(gpu) -> None:
    cases = [
        new_case(1 + 331 * i % 2300, adamw8.ENCODINGS[i % 3], adamw8.FLOATS[i % 3], i)
        for i in range(14)
    ]
    adamw8.run_steps(gpu, cases, steps=1)


def far_apart(gpu) -> None:
    """The first of many bad gradients in a list of tensors, whichever warp finds it."""
    cases = [new_case(n, "float32", seed=n) for n in (1, 700, 70_000, 2048, 9, 4096, 5000)]
    for case in cases:
        case.grad = torch.zeros_like(case.param)
        adamw8.upload(gpu, case)
    launch, word = adamw8.make_launch(gpu, cases)
    for tensor, index in ((6, 3), (5, 4095), (3, 2047), (2, 69_999), (2, 40_000), (2, 7), (0, 0)):
        cases[tensor].device["grad"][index] = torch.nan
        gpu.call("adamw8_step", launch)
        assert word.item() == tensor << 40 | index


def adamw8_cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    steps = [
        partial(adamw8.test_several_steps, encoding=encoding, dtype=dtype)
        for encoding, dtype in (("ratio", fp32), ("moments", bf16), ("float32", torch.float16))
    ]
    steps += [partial(adamw8.test_unaligned, encoding="ratio", dtype=bf16, shift=1)]
    steps += [partial(adamw8.test_unaligned, encoding="float32", dtype=fp32, shift=3)]
    steps += [partial(adamw8.test_float32_gradients, encoding="moments", dtype=bf16)]
    steps += [partial(adamw8.test_extreme_gradients, encoding=e) for e in ("ratio", "moments")]
    steps += [adamw8.test_mixed_tensors_and_groups]
    steps += [on_a_small_card(many_tensors)]
    bad = [
        partial(adamw8.test_a_bad_gradient_changes_nothing, bad=torch.inf, dtype=dtype)
        for dtype in adamw8.FLOATS
    ]
    bad += [
        partial(adamw8.test_a_bad_gradient_anywhere_in_a_piece, dtype=dtype)
        for dtype in adamw8.FLOATS
    ]
    bad += [on_a_small_card(far_apart)]
    bad += [adamw8.test_a_bad_gradient_at_unaligned_addresses]
    return steps + bad + [adamw8.test_the_largest_finite_gradients_are_good]


def forced(variant: str, case: Case) -> Case:
    def run(gpu) -> None:
        with mock.patch.dict(os.environ, HALFBYTE_FORCE_VARIANT=f"lora_linear:{variant}"):
            case(gpu)

    return run


def lora_linear_cases() -> list[Case]:
    made: list[Case] = []

    def exactly(variant: str | None, shape: tuple, options: dict) -> None:
        layer = Layer(*shape, **{"p": 0.5, **options}, exact=True)
        for half in HALVES:
            case = partial(check_exact, layer=layer, **half)
            made.append(forced(variant, case) if variant else case)

    for shape in lora_linear.FAULTY.values():
        exactly(None, shape, {})
    for forward, _, shape, options in CASES.values():
        exactly(None, shape, {**options, "p": 0.5 if options.get("p") else 0.0})
        layer = Layer(*shape, **options)
        made.append(partial(check_bounds, layer=layer, rounded_levels=forward == "few_rows"))
    for case in RAGGED:
        exactly(*case)
    for variant in ("cuda_fma", "cuda_mma_any_shape"):
        for dtype in (torch.bfloat16, torch.float16):
            bounds = partial(check_bounds, layer=Layer(9, 16, 128, 3, dtype), rounded_levels=False)
            made.append(forced(variant, bounds))
    made += [
        partial(lora_linear.test_hashes_beside_the_threshold, dtype=dtype, K=K)
        for dtype, K in lora_linear.HASHED
    ]
    return made


HALVES = ({"backwards": False}, {"forwards": False})
GROUPS = {"adamw8": adamw8_cases, "lora_linear": lora_linear_cases, "nf4": nf4_cases}

# --- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """`update`, of adamw8; `entries` are the instances of a template."""

    name: str
    group: str
    entries: tuple[str, ...]


def short_name(entry: str) -> str:
    """forward_sm80 of _ZN..._cu_41a6f8f824lora_linear_forward_sm80I..."""
    length, rest = re.search(r"_cu_[0-9a-f]{8}(\d+)(\w+)", entry).groups()
    return rest[: int(length)].removeprefix("lora_linear_").removesuffix("_kernel")


def kernels(built: list[api.Built], arch: str) -> dict[str, Kernel]:
    """Every kernel of the library by its short name."""
    found: dict[str, Kernel] = {}
    for each in built:
        for entry in re.findall(r"\.entry (\w+)", each.ptx[arch].read_text()):
            name = short_name(entry)
            entries = found[name].entries if name in found else ()
            found[name] = Kernel(name, each.source.parent.name, (*entries, entry))
    return found


# --- one kernel's hunt ----------------------------------------------------------------------------


@dataclass
class Count:
    mutants: int = 0
    killed: int = 0
    explained: int = 0
    stillborn: int = 0  # not executable

    @property
    def score(self) -> float:
        looked_at = self.mutants - self.stillborn
        return (self.killed + self.explained) / looked_at if looked_at else 1.0


@dataclass
class Result:
    kernel: str
    counts: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in KINDS})
    survivors: list[tuple[str, str]] = field(default_factory=list)  # (kind, fault), unexplained
    reasons: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def others(self) -> Count:
        """All kinds but dropped barriers, waits and commits."""
        others = [count for kind, count in self.counts.items() if kind != "drop"]
        names = ("mutants", "killed", "explained", "stillborn")
        return Count(*(sum(getattr(count, name) for count in others) for name in names))

    @property
    def passed(self) -> bool:
        return not any(kind == "drop" for kind, _ in self.survivors) and self.others.score >= LEAST


class Session:
    """The library in the interpreter, and what each case of a group launches when all is well."""

    def __init__(self, built: list[api.Built], arch: str, group: str):
        self._scratch = tempfile.TemporaryDirectory()
        library = Path(self._scratch.name) / "library.so"
        shutil.copy(build_library([each.object for each in built]), library)
        self.gpu = api.Interpreted(built, arch, library)
        self.kernels = kernels(built, arch)
        timed = []
        for case in GROUPS[group]():
            start = time.perf_counter()
            launches = self.run(case)
            timed.append((time.perf_counter() - start, case, launches))
        timed.sort(key=lambda each: each[0])
        self.launches = [(case, launches) for _, case, launches in timed]  # fastest first

    def run(self, case: Case) -> list:
        """The case's launches; raises what it finds wrong."""
        runtime = self.gpu.runtime
        runtime.launches.clear(), runtime.log.clear()
        try:
            with mock.patch.object(handlers, "launch", partial(launch, step_limit=STEP_LIMIT)):
                case(self.gpu)
            return list(runtime.launches)
        finally:
            runtime.errors.clear()
            runtime.last_error = 0
            self.gpu.forget()


@cache
def session(arch: str, group: str) -> Session:
    return Session(api.build_all(), arch, group)


class Hunt:
    """Plants faults into one kernel and runs the cases that execute them."""

    def __init__(self, session: Session, name: str):
        self.session, self.name = session, name
        lines = {entry: {} for entry in session.kernels[name].entries}
        for case, launches in session.launches:
            for each in launches:
                for line in each.report.coverage.lines_run if each.kernel in lines else ():
                    of_line = lines[each.kernel].setdefault(line, [])
                    if case not in of_line:
                        of_line.append(case)
        self.entry = max(lines, key=lambda entry: self.coverage(entry, lines[entry]))
        self.cases_of_line = lines[self.entry]
        self.modules = session.gpu.runtime.modules
        self.index = next(i for i, m in enumerate(self.modules) if self.entry in m.kernels)
        self.original = self.modules[self.index]

    def coverage(self, entry: str, lines_run) -> float:
        module = next(m for m in self.session.gpu.runtime.modules if entry in m.kernels)
        return len(lines_run) / len(module.syntax.entry(entry).instructions)

    def fate(self, mutation: Mutation) -> str:
        """The Count's field that the fault belongs to; "" when it survives or no case meets it."""
        cases = self.cases_of_line.get(mutation.line, ())
        self.modules[self.index] = mutation.module
        try:
            for case in cases:
                self.session.run(case)
        except Unsupported:
            return "stillborn"
        except (AssertionError, PtxError, RuntimeError):
            return "killed"
        finally:
            self.modules[self.index] = self.original
        return ""

    def result(self, kinds=KINDS, sample: int | None = None, seed: int = 0) -> Result:
        start, result = time.perf_counter(), Result(self.name)
        planted = list(mutations(self.original, self.entry, kinds))
        drops = [each for each in planted if each.kind == "drop"]
        others = [each for each in planted if each.kind != "drop"]
        if sample is not None and len(others) > sample:
            others = random.Random(seed).sample(others, sample)
        for mutation in (*drops, *others):
            self.tally(result, mutation, self.fate(mutation))
        result.seconds = time.perf_counter() - start
        return result

    def tally(self, result: Result, mutation: Mutation, fate: str) -> None:
        count = result.counts[mutation.kind]
        count.mutants += 1
        if not fate:
            short = re.sub(r"/\S*/([\w.]+:\d+)", r"\1", mutation.description)
            fault = f"{short} | {source_text(short)}"
            why = explanation(self.name, mutation.kind, fault)
            if why:
                result.reasons[why] += 1
                fate = "explained"
            else:
                result.survivors.append((mutation.kind, fault))
        if fate:
            setattr(count, fate, getattr(count, fate) + 1)


def explanation(kernel: str, kind: str, fault: str) -> str:
    for each in EXPLAINED:
        if all(map(re.search, (each.kernel, each.kind, each.fault), (kernel, kind, fault))):
            return each.why
    return ""


@cache
def _source(name: str) -> list[str]:
    found = next(iter(api.CUDA.rglob(name)), None) or next(
        iter((api.ROOT / "cpp/include").rglob(name)), None
    )
    return found.read_text().splitlines() if found else []


def source_text(description: str) -> str:
    """The source line, and the line it was inlined at, of a mutation's description."""
    places = re.findall(r"([\w.]+\.\w+):(\d+)", description.split("): ")[0])
    texts = [_source(name)[int(line) - 1 : int(line)] for name, line in places]
    return " <- ".join(text[0].strip() for text in texts if text)


# --- command --------------------------------------------------------------------------------------


def hunt(name: str, arch: str, kinds=KINDS, sample: int | None = None, seed: int = 0) -> Result:
    """One kernel's result."""
    group = kernels(api.build_all(), arch)[name].group
    return Hunt(session(arch, group), name).result(kinds, sample, seed)


def table(results: list[Result]) -> str:
    """The kill table, in Markdown; what survived and what is explained below it."""
    lines = [
        "| kernel | kind | mutants | killed | explained | survived | not executable |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for kind, count in result.counts.items():
            if not count.mutants:
                continue
            survived = sum(each == kind for each, _ in result.survivors)
            cells = (count.mutants, count.killed, count.explained, survived, count.stillborn)
            lines.append(f"| {result.kernel} | {kind} | " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    for result in results:
        others = result.others
        lines.append(
            f"{result.kernel}: {100 * others.score:.0f} % of {others.mutants} other faults noticed "
            f"or explained, {result.seconds:.0f} s; {'passed' if result.passed else 'FAILED'}"
        )
        lines += [f"    explained {count}x: {why}" for why, count in result.reasons.items()]
        lines += [f"    survived ({kind}): {fault}" for kind, fault in result.survivors]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--kernel", action="append", help="of these kernels only")
    command.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    command.add_argument("--sample", type=int, help="at most so many of a kernel's other faults")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--arch", choices=api.ARCHS, default=api.ARCHS[0])
    command.add_argument("--jobs", type=int, default=2)
    command.add_argument("--output", type=Path, default=OUTPUT)
    options = command.parse_args(arguments)
    known = kernels(api.build_all(), options.arch)
    names = options.kernel or sorted(known)
    if unknown := set(names) - set(known):
        command.error(f"no such kernel: {', '.join(unknown)}; there are {', '.join(known)}")
    one = partial(
        hunt, arch=options.arch, kinds=options.kinds, sample=options.sample, seed=options.seed
    )
    results = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for result in pool.map(one, names):
            print(f"{result.kernel}: {result.seconds:.0f} s", file=sys.stderr, flush=True)
            results.append(result)
    text = (
        f"PTX of {options.arch} executed by an interpreter; not run on a GPU.\n\n{table(results)}"
    )
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
