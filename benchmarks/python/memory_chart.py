"""Draws the memory picture of docs/scaling.md from the calculator: four ways to fine-tune 7B, 65B.

    python -m benchmarks.python.memory_chart [--output docs/images/memory.png]

Full fine-tuning, LoRA on a 16-bit base, QLoRA, and QLoRA with paged optimizer state (moved to the
host when memory is short: drawn hatched, above what must stay). Rank 64 on all linear layers, batch
1, sequence 512, gradient checkpointing, AdamW with fp32 state, as in the QLoRA paper.

Example: python -m benchmarks.python.memory_chart --output memory.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.python.timing import ROOT  # noqa: E402
from halfbyte.memory_plan import DEVICES, SHAPES, Plan, Settings, plan  # noqa: E402

MODELS = {"LLaMA-7B": 30.0, "LLaMA-65B": 160.0}  # and where the axis ends, GB
CARDS = {"24 GB card": "rtx4090", "48 GB card": "a6000", "80 GB card": "h100-80gb"}
METHODS = {
    "full\nfine-tuning": Settings(method="full", optimizer="adamw32", checkpointing=True),
    "LoRA on a\n16-bit base": Settings(
        method="lora", rank=64, optimizer="adamw32", checkpointing=True
    ),
    "QLoRA": Settings(rank=64, optimizer="adamw32", checkpointing=True),
    "QLoRA\n+ paging": Settings(rank=64, optimizer="paged-adamw32", checkpointing=True),
}
# Drawn parts, from the bottom up: label, color, categories of the plan.
PARTS = (
    ("base weights", "#1f4e79", ("4-bit weights", "dense weights")),
    ("adapters", "#2a9d8f", ("adapters",)),
    ("gradients", "#8ab17d", ("gradients",)),
    ("activations and loss", "#e9c46a", ("activations", "loss or one layer")),
    ("CUDA context, caches", "#a7b0b8", ("runtime",)),
    ("optimizer state", "#d1603d", ("optimizer state",)),
)
INK, MUTED = "#22303c", "#7a8691"
GB = 1e9


def parts_of(made: Plan) -> list[tuple[str, str, float]]:
    """(label, color, GB) from the bottom up; they add up to the peak."""
    sizes = made.categories
    return [(name, color, sum(sizes[c] for c in which) / GB) for name, color, which in PARTS]


def panel(axes: plt.Axes, model: str, top: float) -> None:
    """The four ways; a bar that is higher than `top` is cut there and says so by a white gap."""
    plans = {name: plan(SHAPES[model], s, "cuda") for name, s in METHODS.items()}
    for i, made in enumerate(plans.values()):
        bottom = 0.0
        for label, color, size in parts_of(made):
            paged = label == "optimizer state" and made.pageable
            style = {"color": color, "edgecolor": "white"}
            if paged:
                style = {"facecolor": "white", "edgecolor": color, "hatch": "/////"}
            axes.bar(i, size, 0.62, bottom, linewidth=0.6, zorder=2, **style)
            bottom += size
        text = f"{bottom:.0f}" if bottom >= 100 else f"{bottom:.1f}"
        if made.pageable:
            text = f"{(made.peak - made.pageable) / GB:.1f} to {text}"
        if bottom > top:
            axes.bar(i, 0.012 * top, 0.7, 0.93 * top, color="white", zorder=3)
        height = min(bottom, top) + 0.012 * top
        axes.text(
            i, height, f"{text} GB", ha="center", va="bottom", fontweight="bold", zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    above = []
    for name, card in CARDS.items():
        height = DEVICES[card].gigabytes
        if height > top:
            above.append(name)
            continue
        axes.axhline(height, color=INK, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1, alpha=0.7)
        axes.annotate(
            name, (1.0, height), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=MUTED, fontsize=9,
        )  # fmt: skip
    if above:
        text = " and ".join(above) + ": above"
        axes.text(0.995, 0.985, text, transform=axes.transAxes, ha="right", va="top", color=MUTED)
    axes.set_title(
        f"{model.removeprefix('LLaMA-')} parameters", loc="left", fontweight="bold", pad=22
    )
    axes.set_xticks(range(len(plans)), list(plans), fontsize=9.5)
    axes.set_xlim(-0.5, len(plans) - 0.45)
    axes.set_ylim(0, top)
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#e9ecef", linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw(path: Path) -> None:
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.edgecolor": MUTED}):
        figure, panels = plt.subplots(1, 2, figsize=(11.5, 5.6), dpi=150)
        for axes, (model, top) in zip(panels, MODELS.items(), strict=True):
            panel(axes, model, top)
        panels[0].set_ylabel("peak memory of one GPU process, GB")
        handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color, _ in PARTS]
        labels = [label for label, _, _ in PARTS]
        hatch = plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=PARTS[-1][1], hatch="////")
        figure.legend(
            [*handles, hatch], [*labels, "optimizer state that can move to the host"], ncol=4,
            frameon=False, loc="lower center", fontsize=9.5,
        )  # fmt: skip
        figure.suptitle(
            "Memory of a fine-tuning step (predicted by halfbyte plan)", x=0.012, ha="left",
            fontsize=13, fontweight="bold",
        )  # fmt: skip
        figure.tight_layout(rect=(0, 0.09, 1, 1), w_pad=2.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "memory.png")
    draw(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
