"""Runs nvcc for the tests: PTX and object files, cached by content in build/ptx."""

import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from .errors import LaunchError

CACHE = Path(__file__).parents[2] / "build" / "ptx"
STANDARD = ("-std=c++17", "-lineinfo")
HEADERS = ("*.h", "*.cuh", "*.inc", "*.hpp")


@cache
def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


@cache
def _version() -> str:
    if find_nvcc() is None:
        raise LaunchError("nvcc is not on PATH")
    return run([find_nvcc(), "--version"])


def run(command: list) -> str:
    """Output of a command; LaunchError with its messages if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return done.stdout


@cache
def cuda_include() -> Path:
    """The include folder of the CUDA toolkit that nvcc belongs to."""
    _version()
    dry = subprocess.run(
        [find_nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    return Path(top.group(1).strip()) / "include"


def compile_ptx(source, arch: int, include=(), flags=()) -> str:
    """PTX of a .cu file for compute_{arch}, with line numbers."""
    options = ["-ptx", f"-arch=compute_{arch}", *STANDARD, *flags]
    return _compiled(Path(source), options, include, ".ptx").read_text()


def compile_object(source, arch: int, include=(), flags=()) -> Path:
    """Object file of a .cu file, whose host code is to be linked with the fake runtime."""
    code = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    options = ["-c", code, *STANDARD, "-Xcompiler=-fPIC", *flags]
    return _compiled(Path(source), options, include, ".o")


def _compiled(source: Path, options: list[str], include, suffix: str) -> Path:
    digest = hashlib.sha256(repr((_version(), options)).encode())
    folders = [Path(folder) for folder in include]
    headers = [h for f in (source.parent, *folders) for p in HEADERS for h in sorted(f.rglob(p))]
    for each in (source, *headers):
        digest.update(str(each).encode() + b"\0" + each.read_bytes())
    output = CACHE / f"{source.stem}.{digest.hexdigest()[:20]}{suffix}"
    if not output.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = output.with_name(f"{output.name}.{os.getpid()}{suffix}")
        run([find_nvcc(), *options, *[f"-I{f}" for f in folders], source, "-o", made])
        os.replace(made, output)
    return output
