"""Starts several processes of a worker by torchrun, as a person does."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """Workers find what the tests find; one thread each; no look at a network."""
    paths = [str(HERE.parent), *filter(None, sys.path)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip


def torchrun(processes: int, *command: object, timeout: int = 240) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node processes command`, to its end; output as text."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *map(str, command)],
        capture_output=True, text=True, timeout=timeout, env=environment(),
    )  # fmt: skip


def run_worker(name: str, processes: int, folder: Path, *arguments: object) -> None:
    """Runs a worker of this folder; its own account of what went wrong is the failure."""
    done = torchrun(processes, HERE / name, folder, *arguments)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
