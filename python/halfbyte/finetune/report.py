"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere.

`Report` is the interface `run.py` talks to, and is silent; `ConsoleReport` prints. No other file
of this package prints.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from halfbyte.finetune.metrics import EvalRecord, StepRecord

if TYPE_CHECKING:
    from halfbyte.finetune.run import RunResult

PLAIN_LINE_EVERY_S = 15.0


class Report:
    """What a run tells while it goes. This one says nothing."""

    def stage(self, text: str) -> None:
        """A piece of work begins."""

    def fact(self, name: str, text: str) -> None:
        """Something found out, as a name and a value."""

    def train_begin(self, steps: int, done: int) -> None:
        """Training begins and will take `steps` optimizer steps, `done` of them by now."""

    def record(self, record: StepRecord | EvalRecord) -> None:
        """A step is done or a held-out loss measured."""

    def train_end(self) -> None:
        """Training is over, whole or not."""

    def finish(self, result: "RunResult") -> None:
        """All files are written."""


class ConsoleReport(Report):
    """Prints a run to a console; a live bar if it is a terminal, else a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._steps = self._done = 0
        self._begin = self._last_line = 0.0

    def stage(self, text: str) -> None:
        """Print what is being done."""
        self.console.print(f"[dim]{escape(text)} ...[/dim]")

    def fact(self, name: str, text: str) -> None:
        """Print a name and a value, values aligned."""
        self.console.print(f"[bold]{escape(name):<11}[/bold] {escape(text)}", soft_wrap=True)

    def train_begin(self, steps: int, done: int) -> None:
        """Open the progress bar."""
        self._steps, self._done = steps, done
        self._begin = self._last_line = time.perf_counter()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]train[/bold]"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                expand=True,
            )
            self._progress.start()
            self._progress.add_task("train", total=steps, completed=done, numbers="")

    def record(self, record: StepRecord | EvalRecord) -> None:
        """Move the bar, or print a line when the last one is a while ago."""
        if isinstance(record, EvalRecord):
            self.console.print(
                f"[bold]{'held-out':<11}[/bold] loss {record.loss:.3f} over {record.tokens:,} "
                f"completion tokens, after step {record.step}"
            )
            return
        elapsed = time.perf_counter() - self._begin
        left = elapsed / (record.step - self._done) * (self._steps - record.step)
        numbers = (
            f"loss {record.loss:.3f}  lr {record.lr:.1e}  {record.tokens_per_s:,.0f} tok/s  "
            f"peak {format_bytes(record.peak_rss_bytes)}  {format_time(left)} left"
        )
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=record.step, numbers=numbers
            )
            return
        now = time.perf_counter()
        ends = record.step in (self._done + 1, self._steps)
        if ends or now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            self.console.print(f"step {record.step}/{self._steps}  {numbers}", soft_wrap=True)

    def train_end(self) -> None:
        """Close the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def finish(self, result: "RunResult") -> None:
        """Print losses, the answers before and after, and where the files are."""
        self.console.print()
        if result.sample is not None:
            self.console.print(_sample_panel(result.sample))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in _result_rows(result):
            table.add_row(name, escape(value))
        self.console.print(table)


@dataclass(frozen=True)
class SampleAnswers:
    """One prompt and the model's greedy answers to it, before and after training."""

    prompt: str
    before: str
    after: str


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_time(seconds: float) -> str:
    """75 -> '1:15'; 4000 -> '1:06:40'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _sample_panel(sample: SampleAnswers) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in (
        ("prompt", sample.prompt), ("before", sample.before), ("after", sample.after)
    ):  # fmt: skip
        grid.add_row(name, escape(text.strip()) or "[dim](nothing)[/dim]")
    return Panel(grid, title="sample answer", title_align="left")


def _result_rows(result: "RunResult") -> list[tuple[str, str]]:
    rows = []
    if result.before is not None and result.after is not None:
        before, after = result.before.loss, result.after.loss
        rows.append(
            ("held-out", f"loss {before:.3f} -> {after:.3f} ({after / before - 1:+.1%}), "
             f"{result.after.tokens:,} completion tokens")
        )  # fmt: skip
    rows.append(("base", f"{result.base_name} ({result.base_origin}), packed to 4 bits"))
    rows.append(
        ("training", f"{result.steps} steps, {result.tokens:,} tokens in "
         f"{format_time(result.train_s)} ({result.tokens / result.train_s:,.0f} tok/s), "
         f"peak memory {format_bytes(result.peak_rss_bytes)}")
    )  # fmt: skip
    rows += [(name, str(path)) for name, path in result.files.items()]
    return rows
