"""report.html: one page of a run, whole in itself: curves, answers, settings, versions."""

import io
import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot, ticker  # noqa: E402

from halfbyte.finetune.chart import GRID, HELD_OUT, INK, TRAIN, smooth  # noqa: E402
from halfbyte.finetune.files import write_text  # noqa: E402
from halfbyte.finetune.metrics import EvalRecord, StepRecord  # noqa: E402

TEMPLATE = "report.html.jinja"


def write_page(
    path: Path,
    title: str,
    summary: dict[str, Any],
    steps: list[StepRecord],
    evals: list[EvalRecord],
) -> None:
    """Write the page of a run, whose run.json is `summary`. It refers to nothing outside of it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("halfbyte.finetune", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title, run=summary, facts=_facts(summary), figures=_figures(steps, evals)
    )
    write_text(path, page)


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the top, as (name, value)."""
    facts = []
    before, after = run["held_out_before"], run["held_out_after"]
    if before and after:
        change = after["loss"] / before["loss"] - 1
        facts += [
            ("held-out loss", f"{before['loss']:.3f} → {after['loss']:.3f} ({change:+.0%})"),
            ("perplexity", f"{_exp(before['loss'])} → {_exp(after['loss'])}"),
        ]
    return [
        *facts,
        ("optimizer steps", f"{run['steps']:,}"),
        ("tokens", f"{run['tokens']:,}"),
        ("training", f"{run['train_s']:,.0f} s"),
        ("throughput", f"{run['tokens'] / run['train_s']:,.0f} tokens/s"),
        ("peak memory", f"{run['peak_rss_bytes'] / 1e9:.2f} GB"),
        ("processes", str(run["processes"])),
    ]


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.4g}"


def _figures(steps: list[StepRecord], evals: list[EvalRecord]) -> list[tuple[str, str]]:
    """(caption, SVG) of each curve. Steps that were skipped have no loss and no point."""
    learned = [record for record in steps if math.isfinite(record.loss)]
    x = [record.step for record in learned]
    loss = [record.loss for record in learned]
    smoothed = smooth(loss, [record.completion_tokens for record in learned])
    every = [record.step for record in steps]

    def losses(axes) -> None:
        axes.plot(x, loss, color=TRAIN, alpha=0.3, linewidth=1)
        axes.plot(x, smoothed, color=TRAIN, linewidth=2, label="training, smoothed")
        held_out = [record for record in evals if math.isfinite(record.loss)]
        axes.plot(
            [record.step for record in held_out], [record.loss for record in held_out],
            color=HELD_OUT, marker="o", linestyle="--", label="held-out",
        )  # fmt: skip
        axes.legend(frameon=False)

    def curve(values: list[float]):
        return lambda axes: axes.plot(every, values, color=TRAIN, linewidth=1.5)

    return [
        ("Loss, nats a completion token", _svg(losses)),
        ("Learning rate", _svg(curve([record.lr for record in steps]))),
        ("Gradient norm", _svg(curve([record.grad_norm for record in steps]))),
        ("Throughput, tokens a second", _svg(curve([record.tokens_per_s for record in steps]))),
        ("Peak memory so far, GB", _svg(curve([r.peak_rss_bytes / 1e9 for r in steps]))),
    ]


def _svg(draw) -> str:
    settings = {"font.size": 9, "axes.edgecolor": "#888888", "text.color": INK,
                "svg.fonttype": "none", "font.family": "sans-serif"}  # fmt: skip
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(4.8, 2.6), layout="constrained")
        draw(axes)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        pyplot.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]
