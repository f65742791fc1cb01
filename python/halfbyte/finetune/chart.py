"""The loss curve of a run as a PNG."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import patheffects, pyplot, ticker  # noqa: E402

from halfbyte.finetune.metrics import EvalRecord, StepRecord  # noqa: E402

TRAIN, HELD_OUT, INK, GRID = "#3b6fb6", "#c8502d", "#222222", "#e3e3e3"


def draw_loss_curve(
    path: Path, title: str, steps: list[StepRecord], evals: list[EvalRecord]
) -> None:
    """Draw training loss (each step, and smoothed) and held-out loss over optimizer steps.

    Steps that were skipped have no loss and no point.
    """
    steps = [record for record in steps if math.isfinite(record.loss)]
    evals = [record for record in evals if math.isfinite(record.loss)]
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": "#888888", "text.color": INK}):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
        x = [record.step for record in steps]
        y = [record.loss for record in steps]
        axes.plot(x, y, color=TRAIN, alpha=0.3, linewidth=1, marker="." if len(x) < 3 else None)
        weights = [record.completion_tokens for record in steps]
        axes.plot(x, smooth(y, weights), color=TRAIN, linewidth=2, label="training (smoothed)")
        if evals:
            _draw_held_out(axes, evals)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per completion token)")
        last = max(x, default=1)
        axes.set_xlim(-0.02 * last, (1.1 if evals else 1.02) * last)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        _limit_loss_axis(axes, y, [record.loss for record in evals])
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
        figure.savefig(path, format="png")
        pyplot.close(figure)


def smooth(values: list[float], weights: list[float], memory: float = 0.9) -> list[float]:
    """Weighted moving average: sum of memory^(t-i) w_i v_i over sum of memory^(t-i) w_i, i <= t.

    With completion tokens as weights it is a loss a token, like the held-out loss, however rows
    were grouped into batches.
    """
    total, weight, result = 0.0, 0.0, []
    for value, w in zip(values, weights, strict=True):
        total = memory * total + w * value
        weight = memory * weight + w
        result.append(total / weight)
    return result


def _draw_held_out(axes: pyplot.Axes, evals: list[EvalRecord]) -> None:
    """Points where it was measured, joined only if there are more than the two ends."""
    axes.plot(
        [record.step for record in evals],
        [record.loss for record in evals],
        color=HELD_OUT,
        linewidth=1.5,
        linestyle="--" if len(evals) > 2 else "none",
        marker="o",
        markersize=7,
        label="held-out",
        zorder=3,
    )
    for record in (evals[0], evals[-1]):
        axes.annotate(
            f"{record.loss:.3f}",
            (record.step, record.loss),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=HELD_OUT,
            fontweight="bold",
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
            zorder=4,
        )


def _limit_loss_axis(axes: pyplot.Axes, train: list[float], held_out: list[float]) -> None:
    """Show all held-out points and all but the wildest training steps."""
    ordered = sorted(train or held_out or [0.0])
    low = min(ordered[len(ordered) // 100], *held_out, max(ordered))
    high = max(ordered[len(ordered) * 99 // 100], *held_out, min(ordered))
    margin = 0.12 * (high - low) or 0.1
    axes.set_ylim(max(0.0, low - margin), high + margin)
