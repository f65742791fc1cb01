"""Killed or out of disk at any moment: what is saved is whole, and the run goes on to the bit.

The kills happen in children that a process of its own (this file as a program) forks after it has
imported everything: a child counts its moments (each step, and each call that makes a file durable
or visible) and sends itself SIGKILL at a chosen one.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from distributed import launch
from finetune_cases import At, assert_same, run, save_inputs
from halfbyte.finetune import checkpoints, saving
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.run import finetune
from halfbyte.finetune.trainer import CompletionTrainer

KILLS = 8
SETTINGS = {"steps": 6, "save_every": 2, "eval_every": 3, "keep": 1}
MOMENTS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir")]
MOMENTS += [(CompletionTrainer, "training_step"), (torch, "save")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def test_killed_at_many_moments(inputs, tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(inputs), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=launch.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["killed"] >= KILLS and len(set(summary["in"])) >= 3, summary
    run(inputs, tmp_path / "whole", **SETTINGS)
    for out in summary["out"]:
        assert_same(Path(out), tmp_path / "whole")


def kill_many(inputs: Path, folder: Path) -> None:
    """Runs until KILLS kills are done, each run to its end after four of them."""
    draw = random.Random(0)
    moments = in_child(inputs, folder / "counted", None, folder)[1]
    shutil.rmtree(folder / "counted")
    killed, where, outs = 0, [], []
    while killed < KILLS:
        out = folder / f"out-{len(outs)}"
        outs.append(str(out))
        for _ in range(4):
            status, last = in_child(inputs, out, draw.randrange(moments), folder)
            if os.WIFSIGNALED(status):
                killed += 1
                where.append(last)
                whole_or_invisible(out)
            else:
                assert status == 0 and (out / "run.json").exists(), status
                shutil.rmtree(out)
        assert in_child(inputs, out, None, folder)[0] == 0
    print(json.dumps({"killed": killed, "in": where, "out": outs}))


def whole_or_invisible(out: Path) -> None:
    for path in checkpoints.found(out):
        assert (path / checkpoints.RECORD).exists(), path
    if out.exists():
        checkpoints.open_newest(out)


def in_child(inputs: Path, out: Path, fatal: int | None, folder: Path):
    """(wait status, what the child was doing when killed, or how many moments there were)."""
    note = folder / "note"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            count = armed(fatal, note)
            go_on(inputs, out)
            note.write_text(json.dumps(count[0]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return status, json.loads(note.read_text())


def go_on(inputs: Path, out: Path) -> None:
    try:
        run(inputs, out, resume=True, **SETTINGS)
    except FinetuneError as error:  # killed when only checkpoints were left to be removed
        if "the run is finished" not in str(error):
            raise


def armed(fatal: int | None, note: Path) -> list[int]:
    """Wraps every moment: the one with this number is the last. torch.save dies half written."""
    count = [0]

    def wrap(owner, name):
        original = getattr(owner, name)

        def moment(*args, **kwargs):
            count[0] += 1
            if count[0] - 1 == fatal:
                with note.open("w") as file:
                    file.write(json.dumps(name))
                if name == "save":
                    Path(args[1]).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, moment)

    for owner, name in MOMENTS:
        wrap(owner, name)
    return count


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_told_before_anything_is_written(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(inputs, tmp_path / "whole", **SETTINGS)
    free = {"bytes": 1 << 40}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free["bytes"]))
    with pytest.raises(FinetuneError) as caught:
        run(inputs, out, At(3, lambda: free.update(bytes=1000)), **SETTINGS)
    assert "checkpoint of step 4: needs 1.1 MiB in" in str(caught.value)
    assert str(caught.value).endswith("1000 B are free; step-2 is whole, --resume goes on from it")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    run(inputs, out, resume=True, **SETTINGS)
    assert_same(out, tmp_path / "whole")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (saving, "save_file")])
def test_a_disk_that_fills_up_meanwhile(inputs, tmp_path, monkeypatch, owner, name):
    out = tmp_path / "out"
    report = At(3, lambda: monkeypatch.setattr(owner, name, full))
    with pytest.raises(FinetuneError, match=r"checkpoint of step 4: needs .* step-2 is whole"):
        run(inputs, out, report, **SETTINGS)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    checkpoints.open_newest(out)


def test_a_disk_that_is_full_for_the_records(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = json.dumps

    def dumps(value, *args, **kwargs):
        return full() if isinstance(value, dict) and value.get("step") == 3 else whole(value)

    report = At(2, lambda: monkeypatch.setattr(json, "dumps", dumps))
    with pytest.raises(FinetuneError, match=r"the disk is full: .* step-2 is whole"):
        run(inputs, out, report, **SETTINGS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.4 MB, where the user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("mounting a small file system needs the right to")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_fills_up(inputs, small_disk, monkeypatch):
    """Another program fills it while torch's writer, which names no cause, is at work."""
    out = small_disk / "out"
    save = CompletionTrainer._save_optimizer_and_scheduler

    def meanwhile(self, folder):
        if self.state.global_step == 4:
            free = shutil.disk_usage(small_disk).free
            with (small_disk / "other").open("wb") as file:
                file.write(bytes(free - 8192))
        save(self, folder)

    monkeypatch.setattr(CompletionTrainer, "_save_optimizer_and_scheduler", meanwhile)
    with pytest.raises(FinetuneError, match=r"checkpoint of step 4: needs .* step-2 is whole"):
        run(inputs, out, **SETTINGS)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    (small_disk / "other").unlink()
    monkeypatch.undo()
    finetune(FinetuneConfig.load(checkpoints.newest_settings(out), resume=True))
    assert (out / "run.json").exists()


if __name__ == "__main__":
    kill_many(Path(sys.argv[1]), Path(sys.argv[2]))
