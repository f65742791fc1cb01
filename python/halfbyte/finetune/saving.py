"""Writes a run's checkpoints and takes a run back to one: `checkpoints.py` says what is in them.

A run that goes on from a checkpoint has the bits of one that was never interrupted: adapter,
optimizer, scheduler, generators (dropout's seeds are drawn from torch's), data position and
records are those of the step.
"""

import contextlib
import errno
import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import yaml
from safetensors.torch import load_file, save_file

from halfbyte.finetune import checkpoints, processes
from halfbyte.finetune.checkpoints import Checkpoint, Record
from halfbyte.finetune.encode import EncodedRows
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.files import is_disk_full, replace_folder
from halfbyte.finetune.metrics import MetricsLog
from halfbyte.finetune.plan import Plan
from halfbyte.finetune.report import format_bytes

if TYPE_CHECKING:
    from halfbyte.finetune.trainer import CompletionTrainer

RNG = "rng.safetensors"
_SAMPLE = 1 << 20  # bytes of a weights file's head and tail that stand for its content
_OVERHEAD = 1 << 20  # bytes of a checkpoint that are not tensors


class Saver:
    """Saves one run. `answer` is the sample answer before training, which is not repeated."""

    def __init__(self, plan: Plan, log: MetricsLog, identity: dict[str, Any]) -> None:
        self.plan = plan
        self.answer: str | None = None
        self._log = log
        self._identity = identity

    def save(
        self, trainer: "CompletionTrainer", elapsed_s: float, metrics: int | None = None
    ) -> None:
        """Save the trainer's state after its last step. All processes call it.

        metrics: bytes of the log that belong to the steps; None: all there is. Raises FinetuneError
        if the disk has no room; earlier checkpoints stay as they are.
        """
        out, step = self.plan.config.out, trainer.state.global_step
        folder = checkpoints.folder_of(out, step)
        torch_states = trainer.accelerator.gather(torch.get_rng_state()[None])
        if not processes.is_first() or folder.exists():
            return
        needed = _bytes_of(trainer)
        with self._room(step, needed), replace_folder(folder) as aside:
            with _told_as_full(aside, needed):
                record = Record(
                    step, trainer.state.max_steps, self._identity,
                    self._log.sync() if metrics is None else metrics, elapsed_s, self.answer,
                    _generators(), {},
                )  # fmt: skip
                trainer.model.save_pretrained(aside, save_embedding_layers=False)
                (aside / "README.md").unlink(missing_ok=True)  # PEFT's card of empty headings
                trainer._save_optimizer_and_scheduler(str(aside))
                save_file({"torch": torch_states.contiguous()}, aside / RNG)
                trainer.state.save_to_json(str(aside / "trainer_state.json"))
                settings = self.plan.config.as_dict() | {"resume": False}
                (aside / checkpoints.SETTINGS).write_text(yaml.safe_dump(settings), "utf-8")
                checkpoints.write_record(aside, record)
        checkpoints.keep_newest(out, self.plan.config.keep)

    @contextlib.contextmanager
    def _room(self, step: int, needed: int) -> Iterator[None]:
        """Checks that `needed` bytes are free; a disk that fills up meanwhile is the same error."""
        place = self.plan.config.out
        free = shutil.disk_usage(place).free
        try:
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            free = min(free, shutil.disk_usage(place).free)
            raise FinetuneError(
                f"checkpoint of step {step}: needs {format_bytes(needed)} in {place}, "
                f"{format_bytes(free)} are free; {last_checkpoint(place)}"
            ) from None


def last_checkpoint(out: Path) -> str:
    """What is saved, and how to go on from it, in words."""
    folders = checkpoints.found(out)
    if not folders:
        return "no checkpoint was written yet"
    return f"{folders[-1].name} is whole, --resume goes on from it"


def find(plan: Plan, identity: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that `--resume` asks for; None if it was not asked for or there is none yet.

    Raises FinetuneError if it is damaged or belongs to another run.
    """
    checkpoint = checkpoints.open_newest(plan.config.out) if plan.config.resume else None
    if checkpoint is not None:
        difference = checkpoints.first_difference(checkpoint.record, identity)
        if difference is not None:
            raise FinetuneError(f"--resume: {checkpoint.folder}: {difference}")
    return checkpoint


def identity_of(plan: Plan) -> dict[str, Any]:
    """What two runs must share to be one: settings, what they resolved to, and the inputs."""
    settings = {k: v for k, v in plan.config.as_dict().items() if k not in checkpoints.FREE}
    return settings | {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "processes": processes.count(),
        "base": _digest_of_base(plan),
        "training rows": _digest_of_rows(plan.train),
        "held-out rows": _digest_of_rows(plan.held_out),
    }


def restore_generators(checkpoint: Checkpoint) -> None:
    """Put Python's, NumPy's and this process's torch generator where the checkpoint left them."""
    version, state, gauss = checkpoint.record.generators["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, *rest = checkpoint.record.generators["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(load_file(checkpoint.folder / RNG)["torch"][processes.rank()].clone())


def _generators() -> dict[str, Any]:
    name, keys, *rest = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _bytes_of(trainer: "CompletionTrainer") -> int:
    tensors = [p for p in trainer.model.parameters() if p.requires_grad]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) + _OVERHEAD


@contextlib.contextmanager
def _told_as_full(folder: Path, needed: int) -> Iterator[None]:
    """torch's writer says only that it failed: whether for want of room is seen by looking."""
    try:
        yield
    except RuntimeError as error:
        written = sum(file.stat().st_size for file in folder.iterdir())
        if shutil.disk_usage(folder).free >= needed - written:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _digest_of_rows(rows: EncodedRows | None) -> str | None:
    if rows is None:
        return None
    content = hashlib.sha256()
    for sample in rows.samples:
        content.update(repr((sample.input_ids, sample.labels)).encode())
    return content.hexdigest()


def _digest_of_base(plan: Plan) -> str:
    """Of each weights file its size, first and last MiB."""
    source = plan.base.source
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.safetensors"))
    content = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        content.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            content.update(stream.read(_SAMPLE))
            stream.seek(max(0, size - _SAMPLE))
            content.update(stream.read(_SAMPLE))
    return content.hexdigest()
