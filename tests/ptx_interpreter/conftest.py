"""Fixtures of the interpreter's own tests: PTX and objects of kernels/*.cu, made once by nvcc."""

from pathlib import Path

import pytest

from . import FakeRuntime, compile_object, compile_ptx, find_nvcc, load_module

KERNELS = Path(__file__).parent / "kernels"
ARCHITECTURES = (80, 120)  # two code generators


def line_of(source: str, text: str) -> int:
    """The number of the first line of kernels/`source` that contains the text."""
    lines = (KERNELS / source).read_text().split("\n")
    return 1 + next(i for i, line in enumerate(lines) if text in line)


@pytest.fixture(scope="session")
def nvcc():
    """Skips, with a reason, what needs nvcc."""
    if find_nvcc() is None:
        pytest.skip("nvcc is not on PATH: compiled kernels are not tested")


@pytest.fixture(scope="session", params=ARCHITECTURES, ids=lambda arch: f"compute_{arch}")
def arch(request, nvcc) -> int:
    return request.param


@pytest.fixture(scope="session")
def gemm(arch):
    return load_module(compile_ptx(KERNELS / "gemm_bf16.cu", arch))


@pytest.fixture(scope="session")
def elementwise(arch):
    return load_module(compile_ptx(KERNELS / "elementwise.cu", arch))


@pytest.fixture
def runtime(nvcc):
    """A fresh fake runtime around kernels/host.cu."""
    source = KERNELS / "host.cu"
    made = FakeRuntime(objects=[compile_object(source, 80)], ptx=[compile_ptx(source, 80)])
    yield made
    made.close()
