"""metrics.jsonl: one JSON object a line, as training goes.

    step records   kind "step": step, loss, lr, grad_norm, tokens, completion_tokens,
                   tokens_per_s, peak_rss_bytes, elapsed_s
    eval records   kind "eval": step, loss (nats a completion token), tokens, elapsed_s

`loss` of a step is the mean over its completion tokens; `tokens` counts all tokens without
padding. In a run of several processes all counts and means are over all of them, and
`peak_rss_bytes` is the largest of theirs. Lines go to `metrics.jsonl.part`, which becomes
`metrics.jsonl` when the run is whole.
"""

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.finetune.files import publish


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
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.steps: list[StepRecord] = []
        self.evals: list[EvalRecord] = []
        self._part = path.with_name(path.name + ".part") if path else Path(os.devnull)
        self._file = self._part.open("w", encoding="utf-8")

    def write(self, record: StepRecord | EvalRecord) -> None:
        """Append one record; the line is in the file when this returns."""
        (self.steps if isinstance(record, StepRecord) else self.evals).append(record)
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Give the file its final name."""
        self._file.close()
        if self.path is not None:
            publish(self._part, self.path)

    def abandon(self) -> None:
        """Close the file and leave the part that was written, for a look at what went wrong."""
        self._file.close()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
