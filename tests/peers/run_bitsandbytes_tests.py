"""Runs bitsandbytes' own tests of 4-bit weights and of AdamW over halfbyte, through a thin shim.

    python tests/peers/run_bitsandbytes_tests.py [--sdist FILE | --tests FOLDER] [-k EXPRESSION]

The tests come from bitsandbytes' source package on PyPI (0.42.0, the last one that holds them), or
from a checkout's `tests` folder; they are copied to a temporary folder, and never kept. Those of
the package are written for CUDA: without it, they are put on the CPU.
`bitsandbytes_expected.toml` says which tests are run and which of them are expected to fail, each
with its reason. Exit code 1 when another one fails, or when none is run.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
VERSION = "0.42.0"
SUBMODULES = ("cextension", "functional", "nn", "optim", "utils")
# Imported by the test files for tests of other things.
UNUSED = {"lion_pytorch": ["Lion"], "einops": [], "scipy": [], "scipy.stats": ["norm"]}


@dataclass
class Expectations:
    run: list[str]
    failing: list[dict[str, str]]
    cuda: list[list[str]]

    @classmethod
    def load(cls) -> Expectations:
        data = tomllib.loads((HERE / "bitsandbytes_expected.toml").read_text())
        return cls(data["run"], data["failing"], data["cuda_to_cpu"])

    def runs(self, test: str) -> bool:
        return any(fnmatch.fnmatchcase(test.split("[")[0], pattern) for pattern in self.run)

    def failing_entry(self, test: str) -> dict[str, str] | None:
        """The first entry whose file::function and every word of its parameters fit."""
        name, _, parameters = test.partition("[")
        for entry in self.failing:
            words = entry.get("parameters", "").split()
            if fnmatch.fnmatchcase(name, entry["test"]) and all(
                any(fnmatch.fnmatchcase(f"[{parameters}", f"*{w}*") for w in word.split("|"))
                for word in words
            ):
                return entry
        return None


@dataclass
class Recorder:
    """A pytest plugin: chooses the tests, seeds each, keeps outcome and last line of the error."""

    expectations: Expectations
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, config, items):
        chosen = [item for item in items if self.expectations.runs(_short(item.nodeid))]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_setup(self, item):
        import numpy
        import torch

        # Theirs are not seeded. Some bounds are two standard deviations wide: seed 0 misses them.
        torch.manual_seed(3)
        numpy.random.seed(3)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            if report.skipped and isinstance(report.longrepr, tuple):
                crash = report.longrepr[2]
            first = str(crash).strip().splitlines()[:1]
            self.outcomes[_short(report.nodeid)] = (report.outcome, first[0] if first else "")


def _short(nodeid: str) -> str:
    """file::function[parameters], without folders."""
    name, bracket, rest = nodeid.partition("[")
    return name.rsplit("/", 1)[-1] + bracket + rest


def source_archive(folder: Path) -> Path:
    """bitsandbytes' source package, through pip."""
    name = f"bitsandbytes-{VERSION}.tar.gz"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
             "--disable-pip-version-check", "-d", str(folder), f"bitsandbytes=={VERSION}"],
            check=True,
        )  # fmt: skip
    return folder / name


def copy_tests(source: Path, target: Path, replacements: list[list[str]]) -> list[Path]:
    """The test files of an archive or a folder, on the CPU where there is no GPU."""
    target.mkdir()
    files = {}
    if source.is_dir():
        files = {path.name: path.read_text() for path in source.glob("*.py")}
    else:
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                if re.fullmatch(r"[^/]+/tests/\w+\.py", member.name):
                    files[Path(member.name).name] = archive.extractfile(member).read().decode()
    for name, text in files.items():
        for pattern, replacement in replacements:
            text = re.sub(pattern, replacement, text)
        (target / name).write_text(text)
    return sorted(target.glob("test_*.py"))


def only_named(files: list[Path], patterns: list[str]) -> list[Path]:
    """Files that some pattern of tests to run names; others may not even import."""
    named = {pattern.split("::")[0] for pattern in patterns}
    return [path for path in files if path.name in named]


def install_shim() -> None:
    """`import bitsandbytes` gives the shim from here on."""
    sys.path.insert(0, str(HERE))
    for name in ("", *(f".{name}" for name in SUBMODULES)):
        sys.modules["bitsandbytes" + name] = importlib.import_module("bitsandbytes_shim" + name)
    absent = importlib.import_module("bitsandbytes_shim.absent").absent
    for name, members in UNUSED.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            continue
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, absent(member))
        sys.modules[name] = module


def report(outcomes: dict[str, tuple[str, str]], expectations: Expectations) -> int:
    """Prints a table by test function; returns the number of tests that should not have failed."""
    rows: dict[str, Counter] = {}
    reasons: Counter = Counter()
    surprises, stale = [], []
    for test, (outcome, message) in sorted(outcomes.items()):
        row = rows.setdefault(test.split("[")[0], Counter())
        entry = expectations.failing_entry(test)
        if outcome == "failed" and entry is not None:
            row["expected"] += 1
            reasons[entry["kind"], entry["reason"]] += 1
        elif outcome == "failed":
            row["FAILED"] += 1
            surprises.append((test, message))
        else:
            row[outcome] += 1
            stale += [test] if outcome == "passed" and entry is not None else []
    width = max(map(len, rows), default=0)
    columns = ("passed", "expected", "skipped", "FAILED")
    print(
        f"\n{'test':{width}}  {'passed':>7} {'expected to fail':>17} {'skipped':>8} {'FAILED':>7}"
    )
    for name, row in [*rows.items(), ("all", sum(rows.values(), Counter()))]:
        cells = [row[column] for column in columns]
        print(f"{name:{width}}  {cells[0]:7} {cells[1]:17} {cells[2]:8} {cells[3]:7}")
    print("\nexpected failures:")
    for (kind, reason), count in sorted(reasons.items()):
        print(f"  {count:4}  {kind}: {reason}")
    for test in stale:
        print(f"passed, though expected to fail: {test}")
    for test, message in surprises:
        print(f"FAILED {test}\n       {message}")
    return len(surprises)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="bitsandbytes' source package, downloaded")
    parser.add_argument("--tests", type=Path, help="a folder of bitsandbytes' tests instead")
    parser.add_argument("-k", default="", help="pytest's selection expression")
    options = parser.parse_args()
    install_shim()
    import pytest
    import torch

    expectations = Expectations.load()
    source = options.tests or options.sdist or source_archive(ROOT / "build/peers")
    on_cuda = options.tests or torch.cuda.is_available()  # a checkout's tests choose their devices
    replacements = [] if on_cuda else expectations.cuda
    recorder = Recorder(expectations)
    with tempfile.TemporaryDirectory() as folder:
        files = copy_tests(source, Path(folder) / "tests", replacements)
        files = only_named(files, expectations.run)
        sys.path.insert(0, folder)
        arguments = ["-q", "-p", "no:cacheprovider", "--tb=no", "--rootdir", folder, "-W", "ignore"]
        arguments += ["-o", "addopts=", "-k", options.k]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = pytest.main([*arguments, *map(str, files)], plugins=[recorder])
    if code not in (0, 1) or not recorder.outcomes:
        print(output.getvalue())
        return 1
    return int(report(recorder.outcomes, expectations) > 0)


if __name__ == "__main__":
    sys.exit(main())
