"""The house rules, read from the source: who may know whom, where a constant lives, what an
instruction-set file may hold."""

import ast
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from formats import ROOT

CPP = ROOT / "cpp"
PACKAGE = ROOT / "python/halfbyte"
CPP_SUFFIXES = {".h", ".cpp", ".inc", ".cu", ".cuh"}
ISA = re.compile(r"_(avx2|avx512\w*|amx\w*|sse\w*|neon\w*)$")
FOREIGN = (
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "bitsandbytes",
    "gguf",
    "tokenizers",
    "huggingface_hub",
    "matplotlib",
    "yaml",
    "typer",
    "rich",
)


def sources(*folders: Path) -> list[Path]:
    found = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix in CPP_SUFFIXES]
    assert found, folders
    return found


def is_isa(path: Path) -> bool:
    return ISA.search(path.stem) is not None and path.suffix in (".cpp", ".inc")


def code_of(path: Path) -> str:
    """The source without comments and string contents."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', code_of(path), re.M)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def ids(paths: list[Path]) -> list[str]:
    return [relative(path) for path in paths]


ISA_UNITS = [path for path in sources(CPP / "src") if is_isa(path) and path.suffix == ".cpp"]
# What the kernels share, compiled for several instruction sets.
SHARED_INC = [path for path in sources(CPP / "src") if path.suffix == ".inc"]
KERNELS = (
    ISA_UNITS
    + SHARED_INC
    + [
        path
        for path in sources(CPP / "src")
        if path.stem.endswith(("_reference", "_portable")) or path.name.endswith("_impl.h")
    ]
)
FORMAT_HEADER = re.compile(r"halfbyte/(\w+_format|codebook|dtype)\.h")
C_HEADERS = {"stdint.h", "string.h", "math.h", "stddef.h", "stdlib.h", "float.h", "limits.h"}
INTRINSICS = {"immintrin.h", "arm_neon.h"}


# --- C++ -----------------------------------------------------------------------------------------


def test_there_are_instruction_set_files():
    assert {"nf4_avx2.cpp", "nf4_avx512.cpp", "lora_linear_avx512bf16.cpp"} <= {
        path.name for path in ISA_UNITS
    }


@pytest.mark.parametrize("path", KERNELS, ids=ids(KERNELS))
def test_kernels_include_only_their_own_room(path):
    """Own _impl.h, format headers, the simd vocabulary, C headers, intrinsics."""
    op = path.parent.name
    for name in includes(path):
        allowed = (
            name in C_HEADERS
            or (name in INTRINSICS and is_isa(path))
            or FORMAT_HEADER.fullmatch(name)
            or re.fullmatch(rf"({op}/)?{op}_\w+\.(h|inc)", name)
            or re.fullmatch(r"simd/\w+\.(h|inc)", name)
            or re.fullmatch(r"nf4/nf4_\w+\.inc", name)  # the decoder, shared by source
            or name == "support/scalar.h"
        )
        assert allowed, f"{relative(path)} includes {name}"


@pytest.mark.parametrize("path", ISA_UNITS + SHARED_INC, ids=ids(ISA_UNITS + SHARED_INC))
def test_instruction_set_files_use_no_std_templates(path):
    assert "std::" not in code_of(path)
    assert "static_assert" in code_of(path) or not re.search(r"\bassert\s*\(", code_of(path))


def without_blocks(text: str, opening: str) -> str:
    """`text` less every brace block that starts with `opening`."""
    while (start := text.find(opening)) >= 0:
        depth, at = 1, text.index("{", start) + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        text = text[:start] + text[at:]
    return text


@pytest.mark.parametrize("path", ISA_UNITS, ids=ids(ISA_UNITS))
def test_only_entry_points_leave_the_anonymous_namespace(path):
    outside = without_blocks(code_of(path), "namespace {")
    assert "template" not in outside, relative(path)
    names = re.findall(r"^[\w:&*<> ]+?\b(\w+)\([^;]*?\)\s*\{", outside, re.M)
    isa = ISA.search(path.stem).group(1)
    assert names and all(name.endswith(isa) for name in names), names


def test_public_headers_know_only_public_headers():
    standard = re.compile(r"[a-z_]+(\.h)?")
    for path in sources(CPP / "include"):
        for name in includes(path):
            known = name.startswith("halfbyte/") and (CPP / "include" / name).exists()
            assert known or standard.fullmatch(name), f"{relative(path)} includes {name}"
    plain_c = [p for p in sources(CPP / "include") if FORMAT_HEADER.fullmatch(f"halfbyte/{p.name}")]
    assert len(plain_c) >= 5
    for path in plain_c:
        for name in includes(path):
            allowed = FORMAT_HEADER.fullmatch(name) or name in C_HEADERS | {"cstdint"}
            assert allowed, f"{relative(path)} includes {name}"


def test_format_headers_do_not_know_operations():
    operations = {"nf4.h", "lora_linear.h", "adamw8.h", "paged.h"}
    base = {"check.h", "tensor_view.h", "variant.h", "device.h"}
    for path in sources(CPP / "include"):
        if path.name in base or path.name.endswith("_format.h"):
            known = {Path(name).name for name in includes(path)}
            assert not known & operations, relative(path)


def test_the_core_knows_no_torch_and_no_python():
    for path in sources(CPP / "include", CPP / "src", ROOT / "cuda", ROOT / "tests/cpp"):
        for name in includes(path):
            assert not re.search(r"torch|aten|ATen|c10|pybind11|Python\.h", name), relative(path)


def test_operations_know_each_other_only_by_public_headers():
    """One op's folder includes another's only through halfbyte/*.h; the nf4 decoder is source."""
    operations = {path.name for path in (CPP / "src").iterdir()} - {"support", "simd"}
    for path in sources(CPP / "src"):
        for name in includes(path):
            other = re.match(r"(\w+)/", name)
            if other and other.group(1) in operations - {path.parent.name}:
                assert re.fullmatch(r"nf4/nf4_\w+\.inc", name), f"{relative(path)}: {name}"
            assert "bindings" not in name and "tests" not in name, f"{relative(path)}: {name}"
        if path.parent.name in ("support", "simd"):
            assert not any(
                name.startswith(f"{op}/") for op in operations for name in includes(path)
            )


def test_bindings_are_the_only_code_that_knows_python():
    for path in sources(CPP / "bindings"):
        for name in includes(path):
            ours = name.startswith("halfbyte/") or name == "views.h"
            assert ours or name.startswith("pybind11/"), f"{relative(path)} includes {name}"


def test_the_core_meets_cuda_where_the_file_name_says_so():
    """<op>_cuda.cpp hands calls to the CUDA library; paged state exists on CUDA only."""
    support = {CPP / "src/support/cuda_library.h", CPP / "src/support/cuda_library.cpp"}
    for path in sources(CPP):
        if any("cuda_library.h" in name or "halfbyte/cuda/" in name for name in includes(path)):
            named = path.stem.endswith("_cuda") or path.parent.name == "paged"
            assert named or path in support, relative(path)


def test_device_headers_know_only_each_other_and_formats():
    """cuda/device: one instruction or one idea each; what crosses the border is api.h."""
    for path in sources(ROOT / "cuda/device"):
        for name in includes(path):
            allowed = (
                name.startswith(("device/", "cuda_"))
                or name in C_HEADERS | {"stdarg.h", "stdio.h"}
                or FORMAT_HEADER.fullmatch(name)
                or name == "halfbyte/cuda/api.h"
            )
            assert allowed, f"{relative(path)} includes {name}"


def test_openmp_lives_in_one_file():
    for path in sources(CPP, ROOT / "cuda"):
        uses = re.search(
            r"#\s*pragma\s+omp|\bomp_\w+\(|<omp\.h>|std::thread|pthread", code_of(path)
        )
        assert not uses or path == CPP / "src/support/parallel.cpp", relative(path)


def test_library_code_never_prints_and_never_exits():
    forbidden = re.compile(r"std::c(out|err)|\b(f?printf|puts|exit|abort|_exit|quick_exit)\s*\(")
    for path in sources(CPP / "include", CPP / "src", CPP / "bindings", ROOT / "cuda"):
        assert not forbidden.search(code_of(path)), relative(path)


def test_the_nf4_table_exists_once():
    """As bit patterns or as decimals (also rounded ones), anywhere but in tests."""
    patterns = re.compile(
        r"BF3239B1|BF066B30|BECA32A0|0\.69619\d|0\.52507\d|0\.39491\d|0\.7229\d|0\.5626\d", re.I
    )
    files = sources(CPP, ROOT / "cuda") + sorted(PACKAGE.rglob("*.py"))
    files += [p for p in (ROOT / "tests").rglob("*") if p.suffix in CPP_SUFFIXES | {".py"}]
    files.remove(Path(__file__).resolve())
    holders = {relative(path) for path in files if patterns.search(path.read_text())}
    assert holders == {"cpp/include/halfbyte/codebook.h"}


def test_every_source_file_opens_with_what_it_is():
    for path in sources(CPP, ROOT / "cuda"):
        text = path.read_text().lstrip()
        if path.suffix == ".h" or path.parent.parent.name == "src":
            assert text.startswith(("//", "#include", "#pragma")), relative(path)
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), relative(path)


# --- the file name is the build rule, and what comes out -----------------------------------------


def cmake_flags() -> dict[str, list[str]]:
    """isa -> flags, from the set(flags_<isa> ...) lines."""
    text = re.sub(r"#[^\n]*", "", (CPP / "CMakeLists.txt").read_text())
    flags: dict[str, list[str]] = {}
    for isa, value in re.findall(r"set\(flags_(\w+)\s+([^)]*)\)", text):
        words = []
        for word in value.split():
            reference = re.fullmatch(r"\$\{flags_(\w+)\}", word)
            words += flags[reference.group(1)] if reference else [word]
        flags[isa] = words
    return flags


def test_every_instruction_set_file_has_flags_and_no_other_has():
    flags = cmake_flags()
    text = (CPP / "CMakeLists.txt").read_text()
    listed = re.search(r"foreach\(isa ([\w ]+)\)", text).group(1).split()
    assert sorted(listed) == sorted(flags)
    for path in ISA_UNITS:
        assert ISA.search(path.stem).group(1) in flags, relative(path)
    for isa, words in flags.items():
        assert any(word.startswith("-m") for word in words), isa
        assert any(path.stem.endswith(f"_{isa}") for path in ISA_UNITS), f"no file for {isa}"
    rest = re.sub(r"set\(flags_\w+[^)]*\)", "", text)
    assert not re.search(r"-m(avx|fma|f16c|arch|tune|native)", rest)
    for other in (ROOT / "CMakeLists.txt", ROOT / "CMakePresets.json", ROOT / "pyproject.toml"):
        assert not re.search(r"-m(avx|fma|f16c|arch|native)", other.read_text()), relative(other)


def test_contraction_is_off_for_the_whole_core():
    assert "-ffp-contract=off" in (CPP / "CMakeLists.txt").read_text()
    assert "-ffast-math" not in (CPP / "CMakeLists.txt").read_text()


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[Path, Path]:
    """Every instruction-set file and every file that links beside it, compiled as in a release."""
    if os.uname().machine not in ("x86_64", "amd64"):
        pytest.skip(f"instruction-set files are for x86-64, this is {os.uname().machine}")
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler and shutil.which("nm"), "needs a C++ compiler and nm"
    folder = tmp_path_factory.mktemp("objects")
    flags = cmake_flags()

    def build(path: Path) -> tuple[Path, Path]:
        target = folder / f"{path.stem}.o"
        isa = flags[ISA.search(path.stem).group(1)]
        common = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
        where = [f"-I{CPP / 'include'}", f"-I{CPP / 'src'}"]
        command = [compiler, *common, *isa, *where, "-c", str(path), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return path, target

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, ISA_UNITS))


@pytest.mark.parametrize("path", ISA_UNITS, ids=ids(ISA_UNITS))
def test_objects_of_instruction_set_files_hold_no_weak_symbol(objects, path):
    """A weak symbol may be kept from here for the whole program: illegal on an older processor."""
    lines = subprocess.run(
        ["nm", "-C", str(objects[path])], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    symbols = [re.fullmatch(r"[0-9a-f]*\s+(\w) (.*)", line).groups() for line in lines]
    weak = [name for kind, name in symbols if kind in "VWvwu"]
    assert not weak
    isa = ISA.search(path.stem).group(1)
    defined = [name for kind, name in symbols if kind in "TDRB"]
    assert defined and all(re.search(rf"{isa}(\(|$)", name) for name in defined), defined
    foreign = {name for kind, name in symbols if kind == "U" and "std::" in name}
    assert not foreign


def test_every_variant_name_is_known_to_the_dispatcher():
    """Names in the tables are those that HALFBYTE_FORCE_VARIANT accepts."""
    text = code_of(CPP / "src/support/variant.cpp")
    listed = re.search(r"kKnownNames\[\]\s*=\s*\{([^}]*)\}", text).group(1)
    known = set(re.findall(r'"(\w+)"', listed))
    used = set()
    for path in sources(CPP / "src"):
        tables = re.findall(r"Variant<\w+> k\w+Table\[\]\s*=\s*\{(.*?)\n\};", code_of(path), re.S)
        for table in tables:
            names = re.findall(r'\{"(\w+)"', table)
            assert names and names[-1] == "reference", relative(path)
            used |= set(names)
    assert used == known


# --- Python --------------------------------------------------------------------------------------

# Each may import those before it, and itself.
LADDER = ("_C", "_native", "ops", "autograd", "nn", "integrations", "finetune", "cli")
# Modules beside the ladder: what they may know of halfbyte.
BESIDE = {
    "__main__": {"cli"},
    "_plugins": {"nn", "integrations"},  # a hook that imports an integration when it is called for
    "reference": set(),
    "variants": {"_C", "_native"},
    "nf4_weight": {"_C", "_native", "ops"},
    "checkpoint": {"_C", "_native", "ops", "nf4_weight"},
    "paging": {"_C", "_native"},
    "optim": {"_C", "_native", "ops", "paging"},
    "calibrate": {"_C", "_native", "ops", "nf4_weight"},
    "memory_plan": {"ops"},
    "__init__": {
        "_C",
        "_native",
        "ops",
        "autograd",
        "nn",
        "optim",
        "nf4_weight",
        "variants",
        "checkpoint",
        "_plugins",
        "integrations",  # when NF4Config is asked for
    },
}
# Which of those a rung may use, besides the rungs below it.
HELPERS = {
    "_C": set(),
    "_native": set(),
    "ops": set(),
    "autograd": {"nf4_weight"},
    "nn": {"nf4_weight", "checkpoint"},
    "integrations": {
        "nf4_weight",
        "checkpoint",
        "calibrate",
        "optim",
        "variants",
        "__init__",
        "_plugins",
    },
    "finetune": {"nf4_weight", "checkpoint", "optim", "variants", "__init__"},
    "cli": {"nf4_weight", "checkpoint", "memory_plan", "optim", "variants", "__init__"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def rooms_known(path: Path) -> set[str]:
    """Rooms of halfbyte that a file imports from; the package itself is `__init__`."""
    rooms = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "halfbyte":
            here = parts[1] if len(parts) > 1 else "__init__"
            exists = (PACKAGE / here).is_dir() or (PACKAGE / f"{here}.py").exists() or here == "_C"
            rooms.add(here if exists else "__init__")
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_modules_know_only_what_is_below_them(path):
    room = room_of(path)
    if room in LADDER:
        allowed = set(LADDER[: LADDER.index(room) + 1]) | HELPERS[room]
    else:
        assert room in BESIDE, f"{relative(path)}: where does this module stand? Say so in BESIDE"
        allowed = BESIDE[room] | {room}
    unknown = rooms_known(path) - allowed
    assert not unknown, f"{relative(path)} imports {sorted(unknown)}"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_third_parties_stay_outside(path):
    tops = {name.split(".")[0] for name in imports(path)}
    if room_of(path) not in ("integrations", "finetune", "cli"):
        assert not tops & set(FOREIGN), relative(path)
    assert not tops & {"tests", "benchmarks", "pytest", "numpy"} or room_of(path) in (
        "finetune",
        "cli",
        "integrations",
    ), relative(path)
    assert not tops & {"tests", "benchmarks", "pytest"}, relative(path)


def test_the_oracle_imports_torch_only():
    tops = {name.split(".")[0] for name in imports(PACKAGE / "reference.py")}
    assert tops == {"torch", "__future__"}


def test_only_one_module_imports_the_compiled_one():
    for path in MODULES:
        direct = {name for name in imports(path) if name.startswith("halfbyte._C")}
        direct |= {name for name in imports(path) if name == "halfbyte._C"}
        assert not direct or path.name == "_native.py", relative(path)


def test_library_code_does_not_print():
    """Printing is for the command line."""
    for path in MODULES:
        if room_of(path) in ("cli", "finetune"):
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "exit")
        ]
        assert not calls, relative(path)


def test_tests_are_named_after_sources():
    """tests/cpp/<op>_test.cpp for every operation."""
    operations = {path.name for path in (CPP / "src").iterdir()} - {"support", "simd"}
    for op in operations:
        assert (ROOT / f"tests/cpp/{op}_test.cpp").exists(), op
