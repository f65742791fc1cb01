"""Measurements that need a process of their own: its peak memory, its instruction set."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.python.timing import ROOT

_MARK = "RESULT "


def run(module: str, arguments: list[str], environment: Mapping[str, str] = {}):
    """What `python -m module arguments` gave to `report`. Raises RuntimeError if nothing."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    what = f"{module} {' '.join(arguments)}"
    raise RuntimeError(f"{what}: no result, exit code {done.returncode}\n{done.stderr[-2000:]}")


def report(result: object) -> None:
    """Hands `result` to the process that started this one."""
    print(_MARK + json.dumps(result), flush=True)


def forget_peak() -> None:
    """`peak_memory` counts from here on, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Most bytes of memory that this process has held since `forget_peak`, or since its start."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if found := re.search(r"VmHWM:\s+(\d+) kB", status):
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
