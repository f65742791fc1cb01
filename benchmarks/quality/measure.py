"""SmolLM2-135M and its loss on held-out text: what every quality benchmark measures with.

The 16-bit base is the dequantized Q4_1 release (see halfbyte.finetune.demo). Losses are mean
cross-entropies in nats a token over windows of the held-out part. The model computes in bfloat16,
its logits in float32; with all of it in float32 the gaps are the same within 0.0015 nats.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import torch

from benchmarks.python import timing
from benchmarks.quality import texts
from halfbyte.integrations.calibrate import token_windows


def parser(documentation: str) -> argparse.ArgumentParser:
    """A command's parser with what all have in common."""
    command = timing.parser(documentation)
    command.add_argument(
        "--texts", type=Path, required=True, metavar="FOLDER", help="see benchmarks.quality.texts"
    )
    command.add_argument("--windows", type=int, default=8, help="held-out windows a text")
    command.add_argument("--length", type=int, default=512, help="tokens a window")
    command.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that are there; they take this machine's and commit's name",
    )
    command.add_argument("--image", type=Path, metavar="PNG", help="draw the result there")
    return command


def save_figure(figure, axes, title: str, output: Path) -> None:
    """The look that the figures share, and the file."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=11)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def held_out(tokenizer, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Windows of each text's held-out part."""
    return {
        name: token_windows(
            texts.read(options.texts, name, "held-out"), tokenizer, options.windows, options.length
        )
        for name in texts.SCORED
    }


@torch.inference_mode()
def loss(model, windows: torch.Tensor) -> float:
    """Mean cross-entropy of each window's tokens but its first."""
    total, head = 0.0, model.get_output_embeddings().weight.float()
    for window in windows:
        hidden = model.base_model(window[None], use_cache=False).last_hidden_state[0, :-1]
        logits = hidden.float() @ head.T
        total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return total / len(windows)


def losses(model, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss by text."""
    return {name: loss(model, part) for name, part in windows.items()}


def columns(found: dict[str, float]) -> dict[str, float]:
    """Loss and perplexity by text, as a table's columns."""
    return {f"{name} loss": round(value, 4) for name, value in found.items()} | {
        f"{name} perplexity": round(math.exp(value), 3) for name, value in found.items()
    }


def read_rows(path: Path) -> list[dict]:
    """Rows that an earlier run has written; numbers as numbers."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    birthplace = ("machine", "commit")
    return [{k: _number(v) for k, v in row.items() if k not in birthplace} for row in rows]


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """What `halfbyte.quantize_` packs: every linear layer but the head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    }
