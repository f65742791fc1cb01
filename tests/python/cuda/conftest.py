"""Where CUDA tests run: in the PTX interpreter, or on a card when torch sees one."""

import shutil

import pytest
import torch

import cuda_api

DESCRIPTIONS: set[str] = set()


@pytest.fixture(scope="session")
def built():
    """The compiled sources of the library."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: the CUDA kernels cannot be compiled here")
    return cuda_api.build_all()


@pytest.fixture(scope="session")
def fake_library(built):
    """The library's objects linked to the fake runtime."""
    from ptx_interpreter.runtime import build_library

    return build_library([each.object for each in built])


@pytest.fixture
def fake(built, fake_library, tmp_path):
    """A function that makes a library of its own on a fresh fake runtime."""
    made = []

    def make(arch: str = "compute_80", **options) -> cuda_api.Interpreted:
        copy = tmp_path / f"library{len(made)}.so"
        shutil.copy(fake_library, copy)
        made.append(cuda_api.Interpreted(built, arch, copy, **options))
        return made[-1]

    yield make
    for each in made:
        each.runtime.close()


@pytest.fixture(scope="session", params=["card"] if torch.cuda.is_available() else cuda_api.ARCHS)
def gpu_session(request, tmp_path_factory):
    if request.param == "card":
        found = list((cuda_api.ROOT / "python/halfbyte").glob("libhalfbyte_cuda.so"))
        assert found, "a card is there, the CUDA library is not: build it first"
        session = cuda_api.Card(found[0])
    else:
        built = request.getfixturevalue("built")
        copy = tmp_path_factory.mktemp(request.param) / "library.so"
        shutil.copy(request.getfixturevalue("fake_library"), copy)
        session = cuda_api.Interpreted(built, request.param, copy)
    DESCRIPTIONS.add(session.description)
    return session


@pytest.fixture
def gpu(gpu_session):
    """The device of the tests: `put` tensors on it, `call` the library."""
    yield gpu_session
    gpu_session.forget()


def pytest_terminal_summary(terminalreporter):
    for description in sorted(DESCRIPTIONS):
        terminalreporter.write_line(f"CUDA: {description}")
