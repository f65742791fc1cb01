"""metrics.jsonl: one JSON object a line, as training goes.

    step records   kind "step": step, loss, lr, grad_norm, tokens, completion_tokens,
                   tokens_per_s, peak_rss_bytes, elapsed_s
    eval records   kind "eval": step, loss (nats a completion token), tokens, elapsed_s

`loss` of a step is the mean over its completion tokens; `tokens` counts all tokens without
padding. In a run of several processes all counts and means are over all of them, and
`peak_rss_bytes` is the largest of theirs. A step that was skipped has null for loss and grad_norm
(nan in a record). Lines go to `metrics.jsonl.part`, which becomes `metrics.jsonl` when the run is
whole; a resumed run goes on where its checkpoint's records end.
"""

import contextlib
import json
import math
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.files import publish, replace_file


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    completion_tokens: int
    tokens_per_s: float
    peak_rss_bytes: int
    elapsed_s: float
    kind: str = "step"


@dataclass(frozen=True)
class EvalRecord:
    """One measurement of the held-out loss, after `step` optimizer steps."""

    step: int
    loss: float
    tokens: int
    elapsed_s: float
    kind: str = "eval"


class MetricsLog:
    """Appends records to `<path>.part`; `close()` fsyncs it and renames it to `path`.

    path None: records are kept in memory alone (a process that does not write).
    size: go on from the first `size` bytes of an earlier log (`sync`); what follows them is cut.
    """

    def __init__(self, path: Path | None, size: int = 0) -> None:
        self.path = path
        self.steps: list[StepRecord] = []
        self.evals: list[EvalRecord] = []
        self._part = path.with_name(path.name + ".part") if path else Path(os.devnull)
        if path is not None and size:
            self._keep(size)
        self._file = self._part.open("a" if size else "w", encoding="utf-8")

    def write(self, record: StepRecord | EvalRecord) -> None:
        """Append one record; the line is in the file when this returns."""
        self._add(record)
        values = {k: None if _is_nan(v) else v for k, v in asdict(record).items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """fsync what is written; returns its bytes."""
        if self.path is None:
            return 0
        os.fsync(self._file.fileno())
        return self._part.stat().st_size

    def _add(self, record: StepRecord | EvalRecord) -> None:
        (self.steps if isinstance(record, StepRecord) else self.evals).append(record)

    def _keep(self, size: int) -> None:
        """Read the first `size` bytes and make them all there is in the part.

        A run that was killed while it wrote its results has given the part its final name already.
        """
        source = self._part if self._part.exists() else self.path
        content = source.read_bytes()[:size] if source.exists() else b""
        if len(content) < size:
            raise FinetuneError(
                f"{source}: expected the checkpoint's {size} bytes of records, got {len(content)}"
            )
        for line in content.splitlines():
            values = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            self._add((StepRecord if values["kind"] == "step" else EvalRecord)(**values))
        with replace_file(self._part) as temporary:
            temporary.write_bytes(content)

    def close(self) -> None:
        """Give the file its final name."""
        self._file.close()
        if self.path is not None:
            publish(self._part, self.path)

    def abandon(self) -> None:
        """Close the file and leave the part that was written, to go on from or to look at."""
        with contextlib.suppress(OSError):  # a full disk has been told already
            self._file.close()


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
