"""Runs nvcc for the tests: PTX and object files, cached by content in build/ptx."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "ptx"
STANDARD = ("-std=c++17", "-lineinfo", "-Xcompiler=-fPIC")


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


@dataclass(frozen=True)
class Compiled:
    """What one run of nvcc made of a source."""

    source: Path
    object: Path  # its host code, to be linked with the fake runtime, and PTX
    ptx: dict[str, Path]  # by architecture, "compute_80"


def compile_source(source, archs, flags) -> Compiled:
    """A .cu file's object and its PTX for `archs`, with line numbers.

    Made once for the source, the flags, nvcc, and every file of ours that the source includes: a
    list that nvcc writes and that is kept for the next time.
    """
    source, archs = Path(source), tuple(archs)
    options = [*flags, *[f"-gencode=arch={arch},code={arch}" for arch in archs]]
    command = hashlib.sha256(repr((_version(), str(source), options)).encode()).hexdigest()
    included = CACHE / f"{source.stem}.{command[:20]}.included"
    if included.exists():
        made = _folder(source, command, included.read_text().splitlines())
        if made is not None and made.exists():
            return _products(source, archs, made)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        ready = Path(scratch) / "ready"
        ready.mkdir()
        products = _products(source, archs, ready)
        target, rule = Path(scratch) / products.object.name, Path(scratch) / "rule"
        keep = ["--keep", "--keep-dir", scratch, "-MD", "-MF", rule]
        run([find_nvcc(), "-c", *options, *keep, source, "-o", target])
        for part in (products.object, *products.ptx.values()):
            shutil.copy(Path(scratch) / part.name, part)
        ours = [name for name in _prerequisites(rule.read_text()) if ROOT in Path(name).parents]
        made = _folder(source, command, ours)
        if not made.exists():
            os.replace(ready, made)
        listed = Path(scratch) / "included"
        listed.write_text("\n".join(ours))
        os.replace(listed, included)
    return _products(source, archs, made)


def _prerequisites(rule: str) -> list[str]:
    """Absolute paths of a make rule's prerequisites."""
    names = rule.split(":", 1)[1].replace("\\\n", " ").split()
    return sorted({os.path.abspath(name) for name in names})


def _folder(source: Path, command: str, included: list[str]) -> Path | None:
    """Where the products for these contents lie; None when a file is gone."""
    digest = hashlib.sha256(command.encode())
    for name in included:
        if not Path(name).exists():
            return None
        digest.update(name.encode() + b"\0" + Path(name).read_bytes())
    return CACHE / f"{source.stem}-{digest.hexdigest()[:20]}"


def _products(source: Path, archs: tuple[str, ...], folder: Path) -> Compiled:
    """nvcc's names for what it keeps."""
    stem = source.stem
    names = {a: f"{stem}.{a}.ptx" if len(archs) > 1 else f"{stem}.ptx" for a in archs}
    return Compiled(
        source, folder / f"{stem}.o", {arch: folder / name for arch, name in names.items()}
    )


def compile_ptx(source, arch: int, include=(), flags=()) -> str:
    """PTX of a .cu file for compute_{arch}."""
    return _compiled(source, arch, include, flags).ptx[f"compute_{arch}"].read_text()


def compile_object(source, arch: int, include=(), flags=()) -> Path:
    """Object file of a .cu file, whose host code is to be linked with the fake runtime."""
    return _compiled(source, arch, include, flags).object


def _compiled(source, arch: int, include, flags) -> Compiled:
    folders = [f"-I{folder}" for folder in include]
    return compile_source(source, [f"compute_{arch}"], [*STANDARD, *flags, *folders])
