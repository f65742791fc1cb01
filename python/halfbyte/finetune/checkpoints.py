"""The checkpoints a run leaves while it goes: OUT/checkpoints/step-N, each whole or invisible.

    adapter_config.json, adapter_model.safetensors   the adapter, PEFT's files
    optimizer.pt, scheduler.pt      torch's files, read with weights_only=True
    rng.safetensors                 torch's generators, uint8 [processes, bytes of one state]
    trainer_state.json              Trainer's: step, epoch
    config.yaml                     every setting, so that `--out OUT --resume` is enough
    checkpoint.json                 `Record`: what no other file holds, and every file's sha256

Folders exist while a run is unfinished and are removed when it is whole. `saving.py` writes and
restores them; this file finds, verifies and compares them and needs no tensor library.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.files import remove_leftovers

FOLDER, RECORD, SETTINGS = "checkpoints", "checkpoint.json", "config.yaml"
# Settings that change no number of a run. Base and data are compared by content.
FREE = frozenset({
    "base", "data", "eval_data", "out", "overwrite", "resume", "save_every", "keep", "eval_every",
    "non_finite", "paged_optimizer", "stream_layers", "report", "report_to",
})  # fmt: skip


@dataclass(frozen=True)
class Record:
    """checkpoint.json.

    step, steps  optimizer steps done, and of the whole run
    identity     what a run must share to go on from here: see `first_difference`
    metrics      bytes of the metrics that belong to these steps
    elapsed_s    training time so far
    answer       the sample answer of the untrained adapter
    generators   states of Python's and NumPy's generators, as JSON
    files        name -> sha256
    """

    step: int
    steps: int
    identity: dict[str, Any]
    metrics: int
    elapsed_s: float
    answer: str | None
    generators: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    record: Record


def root(out: Path) -> Path:
    """The folder of all checkpoints of the run in `out`."""
    return out / FOLDER


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies or will lie."""
    return root(out) / f"step-{step}"


def found(out: Path) -> list[Path]:
    """Checkpoint folders in `out`, oldest first."""
    numbered = []
    for path in root(out).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    return [path for _, path in sorted(numbered)]


def newest_settings(out: Path) -> Path | None:
    """config.yaml of the newest checkpoint in `out`, if there is one."""
    folders = found(out)
    return folders[-1] / SETTINGS if folders else None


def open_newest(out: Path) -> Checkpoint | None:
    """The newest checkpoint in `out`, verified. Raises FinetuneError if a file is damaged."""
    folders = found(out)
    if not folders:
        return None
    folder = folders[-1]
    record = _read_record(folder / RECORD)
    for name, expected in record.files.items():
        file = folder / Path(name).name
        actual = digest(file) if file.is_file() else "no such file"
        if actual != expected:
            raise FinetuneError(
                f"{file}: expected sha256 {expected}, got {actual}; remove {folder} to go on from "
                "the checkpoint before it"
            )
    return Checkpoint(folder, record)


def first_difference(record: Record, identity: dict[str, Any]) -> str | None:
    """The first thing in which a run is not the checkpoint's, in words; None if it can go on."""
    for name in [*record.identity, *(name for name in identity if name not in record.identity)]:
        before, now = record.identity.get(name), identity.get(name)
        if before != now:
            return f"{name}: the checkpoint has {before!r}, this run {now!r}"
    return None


def write_record(folder: Path, record: Record) -> None:
    """Write checkpoint.json with the digests of all other files in `folder`."""
    files = {file.name: digest(file) for file in sorted(folder.iterdir())}
    values = asdict(record) | {"files": files}
    (folder / RECORD).write_text(json.dumps(values) + "\n", encoding="utf-8")


def keep_newest(out: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints, and what a killed run wrote aside."""
    remove_leftovers(root(out), "step-*")
    for folder in found(out)[:-count]:
        _remove(folder)


def remove_all(out: Path) -> None:
    """Remove the checkpoints: the run is whole, or another one takes its place."""
    for folder in found(out):
        _remove(folder)
    shutil.rmtree(root(out), ignore_errors=True)


def digest(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Out of sight first: a removal that dies leaves no half checkpoint."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _read_record(file: Path) -> Record:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        record = Record(**{field.name: values[field.name] for field in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FinetuneError(
            f"{file}: not the record of a checkpoint ({type(error).__name__}: {reason:.100}); "
            f"remove {file.parent} to go on from the checkpoint before it"
        ) from None
    return record
