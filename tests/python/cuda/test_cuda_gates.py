"""What is asked of the CUDA sources as a whole: machine code without spills on every generation,
the build's own flags in the tests, and tests that notice planted faults."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cuda_api as api
import explained
import mutate

GENERATIONS = (80, 86, 89, 90, 100, 120)
# At most, by kernel: for the blocks of threads a multiprocessor is to hold.
REGISTERS = {
    "any_shape": 128,
    "few_rows": 128,
    "few_rows_fma": 128,
    "fp32": 128,
    "skinny": 168,
    "skinny_mma": 128,
}
MOST_REGISTERS = 255  # the hardware's, with nothing spilled

# --- machine code ---------------------------------------------------------------------------------


def assembler_report(built: api.Built) -> str:
    """What ptxas says of every kernel of a file, for all generations; kept beside its PTX."""
    flags = api.FLAGS + api.FILE_FLAGS.get(built.source.name, [])
    codes = [f"-gencode=arch=compute_{g},code=sm_{g}" for g in GENERATIONS]
    wanted = [*flags, *codes, "-Xptxas=-v"]
    key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:12]
    log = built.object.with_name(f"ptxas-{key}.log")
    if not log.exists():
        command = ["nvcc", "-c", *wanted, *api.INCLUDES, str(built.source), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log.write_text(done.stderr)
    return log.read_text()


@pytest.fixture(scope="module")
def machine_code(built) -> list[dict]:
    """One row a kernel and generation: what ptxas counted."""
    with ThreadPoolExecutor(2) as pool:
        report = "".join(pool.map(assembler_report, built))
    found = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report, re.S,
    )  # fmt: skip
    return [
        {"kernel": mutate.short_name(name), "generation": int(generation), "stack": int(stack),
         "spills": int(stores) + int(loads), "registers": int(registers)}
        for name, generation, stack, stores, loads, registers in found
    ]  # fmt: skip


def test_every_kernel_is_compiled_for_every_generation(built, machine_code):
    entries = sum(each.ptx["compute_80"].read_text().count(".entry ") for each in built)
    assert len(machine_code) == entries * len(GENERATIONS)
    assert {row["generation"] for row in machine_code} == set(GENERATIONS)


def test_no_kernel_spills_or_uses_local_memory(machine_code):
    assert not [row for row in machine_code if row["spills"] or row["stack"]]


def test_registers_stay_within_their_bounds(machine_code):
    most = {row["kernel"]: REGISTERS.get(row["kernel"], MOST_REGISTERS) for row in machine_code}
    assert not [row for row in machine_code if row["registers"] > most[row["kernel"]]]


# --- the build ------------------------------------------------------------------------------------


def test_sources_are_tested_as_they_are_built(built):
    """cuda/CMakeLists.txt and cuda_api.py give a source the same code-generation flags."""
    folder = api.ROOT / "build/cuda_gate"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed: the build's flags cannot be asked for")
    options = ["-DHALFBYTE_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80", "-DHALFBYTE_TESTS=OFF"]
    done = subprocess.run(
        [cmake, "-S", api.ROOT, "-B", folder, *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = {
        Path(each["file"]): each["command"]
        for each in json.loads((folder / "compile_commands.json").read_text())
    }
    for each in built:
        words = commands[each.source].split()
        assert "-O3" in words and "-std=c++17" in words, each.source
        contracts = [word for word in words if word.startswith("-fmad")]
        assert contracts == api.FILE_FLAGS.get(each.source.name, []), each.source


# --- planted faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["update", "dequantize_4bit", "quantize_4bit"])
def test_planted_faults_are_noticed(built, kernel):
    """Every barrier, and a sample of the rest that is too small for the 90 % of the whole; the LoRA
    linear's are in test_cuda_lora_linear.py."""
    result = mutate.hunt(kernel, "compute_80", sample=16, seed=1)
    assert result.counts["drop"].killed == result.counts["drop"].mutants > 0
    assert result.others.score >= 0.7, mutate.table([result])


def test_survivors_are_told_from_explained_ones(monkeypatch):
    result = mutate.Result("one")
    result.counts["immediate"] = mutate.Count(mutants=11, killed=8, explained=1)
    assert result.others.score == 9 / 11 and not result.passed
    result.counts["immediate"].killed = 10
    assert result.passed
    result.survivors.append(("drop", "dropped `bar.sync 0`"))
    assert not result.passed and "survived (drop): dropped" in mutate.table([result])
    row = explained.Explained("^one$", "drop", r"bar\.sync 0.*read", "a single step")
    monkeypatch.setattr(mutate, "EXPLAINED", (row,))
    assert mutate.explanation("one", "drop", "`bar.sync 0` | has been read") == "a single step"
    assert mutate.explanation("two", "drop", "`bar.sync 0` | has been read") == ""


def test_every_kernel_has_cases(built):
    for arch in api.ARCHS:
        found = mutate.kernels(built, arch)
        assert {kernel.group for kernel in found.values()} == set(mutate.GROUPS)
