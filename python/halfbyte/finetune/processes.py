"""A run in several processes, as torchrun and `accelerate launch` start them.

Each process holds the whole model (DDP): each takes `batch` rows a forward pass, gradients are
averaged over all tokens of all processes, and every process makes the same step. Process 0 alone
prints and writes.

A process that ends takes the run with it: the others meet a closed connection at their next
exchange, or the launcher's signal before that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from halfbyte.finetune.errors import FinetuneError

# Mistakes in settings or data are found by all processes at about the same time.
FIRST_SPEAKS_WITHIN_S = 3.0
_CLOSED = ("closed by peer", "reset by peer", "broken pipe", "gloo::", "[gloo")


class LostProcess(FinetuneError):
    """Another process of this run has ended."""


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes, if any, and leaves them when all is done.

    An exchange that fails because another process has ended raises LostProcess.
    """
    if count() == 1:
        yield
        return
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=True)
    try:
        yield
        dist.barrier()  # process 0 has written
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise LostProcess(f"process {rank()}: {LOST}") from None
    dist.destroy_process_group()


LOST = "another process of this run has ended, so this one stops; no results were written"


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """An error that all processes find is told by process 0 alone.

    The others give it time to speak; where it has nothing to say, they do, by number.
    """
    try:
        yield
    except LostProcess:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, that all is lost: said
        raise
    except FinetuneError as error:
        if is_first():
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, as process 0 has spoken
        time.sleep(FIRST_SPEAKS_WITHIN_S)
        raise FinetuneError(f"process {rank()}: {error}") from None


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or any(word in text for word in _CLOSED)
