"""Every setting of a fine-tuning run, once: name, type, default, help text and its check.

The command line is generated from `FinetuneConfig`'s fields (`cli/finetune.py`), YAML files are
read against them, and `run.json` and `config.yaml` are written from them. Flags override the YAML
file, which overrides the defaults.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from halfbyte.finetune.errors import FinetuneError

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "bf16", "fp32")
LONG_SAMPLES = ("error", "truncate", "skip")
CODEBOOKS = ("nf4", "fp4", "int4")
NON_FINITE = ("stop", "skip")


def _setting(
    default: Any, help: str, panel: str, *, choices=None, low=None, high=None, above=None
) -> Any:
    """A dataclass field with help text, help panel and the range [low, high] or (above, ...)."""
    metadata = {
        "help": help, "panel": panel, "choices": choices, "low": low, "high": high, "above": above,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of one run. Construct with `FinetuneConfig.load`, which checks them."""

    base: Path | None = _setting(
        None, "Base model: a Hugging Face folder or a .gguf file.", "Input and output"
    )
    data: Path | None = _setting(
        None,
        "Training rows, JSONL: `messages`, `prompt` + `completion`, or `text`.",
        "Input and output",
    )
    out: Path | None = _setting(
        None, "Folder for the adapter, metrics.jsonl, loss.png and run.json.", "Input and output"
    )
    eval_data: Path | None = _setting(
        None, "Held-out rows, JSONL. Without it a part of --data is held out.", "Input and output"
    )
    eval_fraction: float = _setting(
        0.1,
        "Part of --data to hold out, chosen by a fixed hash of each prompt; 0 holds out nothing.",
        "Input and output", low=0.0, high=0.9,
    )  # fmt: skip
    overwrite: bool = _setting(
        False, "Replace the run that --out already holds.", "Input and output"
    )

    save_every: int = _setting(
        50,
        "Save a checkpoint in --out every N steps; 0: only when the run is interrupted.",
        "Checkpoints", low=0,
    )  # fmt: skip
    keep: int = _setting(2, "Checkpoints to keep, the newest ones.", "Checkpoints", low=1)
    resume: bool = _setting(
        False,
        "Go on from the newest checkpoint in --out, with its settings where no flag names them; "
        "start from the beginning if there is none yet.",
        "Checkpoints",
    )

    rank: int = _setting(16, "LoRA rank R.", "LoRA", low=1, high=512)
    alpha: float = _setting(32.0, "LoRA alpha; the update is scaled by alpha / R.", "LoRA", above=0)
    dropout: float = _setting(0.05, "Dropout on the LoRA input.", "LoRA", low=0.0, high=0.95)
    target_modules: tuple[str, ...] = _setting(
        (), "Linear layers to adapt, comma separated; default: all but the head.", "LoRA"
    )

    codebook: str = _setting("nf4", "4-bit code book of the base.", "4-bit base", choices=CODEBOOKS)
    block_size: int = _setting(64, "Weights that share one scale.", "4-bit base", low=32, high=4096)
    double_quant: bool = _setting(True, "Quantize the scales as well.", "4-bit base")

    calibrate: bool = _setting(
        False,
        "Choose codes and scales for what the layers see on the training rows: less damage by the "
        "4 bits. Runs the 16-bit model once.",
        "4-bit base",
    )

    lr: float = _setting(2e-4, "Peak learning rate.", "Training", above=0)
    schedule: str = _setting("cosine", "Learning-rate schedule.", "Training", choices=SCHEDULES)
    warmup: float = _setting(
        0.03, "Warm-up: a part of all steps if below 1, otherwise steps.", "Training", low=0.0
    )
    weight_decay: float = _setting(0.0, "AdamW weight decay.", "Training", low=0.0)
    max_grad_norm: float = _setting(1.0, "Clip gradients to this norm.", "Training", above=0)
    epochs: float = _setting(1.0, "Passes over the training rows.", "Training", above=0)
    steps: int | None = _setting(
        None, "Optimizer steps; set, it takes the place of --epochs.", "Training", low=1
    )
    batch: int = _setting(8, "Sequences a forward pass, in each process.", "Training", low=1)
    accumulation: int = _setting(1, "Forward passes an optimizer step.", "Training", low=1)
    non_finite: str = _setting(
        "stop",
        "When a step's loss or gradients are not finite: stop the run, or skip the step. Neither "
        "changes the adapter.",
        "Training", choices=NON_FINITE,
    )  # fmt: skip
    seed: int = _setting(
        0, "Seed of LoRA's initial values, row order and dropout.", "Training", low=0
    )

    max_length: int | None = _setting(
        None,
        "Longest sequence, in tokens; default: 1024, or the model's own limit if that is less.",
        "Sequences", low=2,
    )  # fmt: skip
    long_samples: str = _setting(
        "error", "What to do with a longer row.", "Sequences", choices=LONG_SAMPLES
    )
    chat_template: bool = _setting(
        True, "Render prompt + completion through the model's chat template.", "Sequences"
    )
    group_by_length: bool = _setting(
        True, "Batch rows of similar length: less padding, same rows.", "Sequences"
    )

    dtype: str = _setting(
        "auto",
        "Compute type; auto is bf16 where the processor multiplies it in hardware, else fp32.",
        "Speed and memory", choices=DTYPES,
    )  # fmt: skip
    gradient_checkpointing: bool = _setting(
        False, "Recompute activations in backward: less memory, more time.", "Speed and memory"
    )
    paged_optimizer: bool = _setting(
        False,
        "Keep the optimizer's state in a temporary file's pages, which the system may write out "
        "when memory is short.",
        "Speed and memory",
    )
    stream_layers: bool = _setting(
        False,
        "Read the layers of a packed base from disk as they are used: memory holds two of them.",
        "Speed and memory",
    )

    report: bool = _setting(
        False,
        "Write report.html too: curves, answers, settings and versions on one page.",
        "Report",
    )
    report_to: tuple[str, ...] = _setting(
        (), "Follow the run in tensorboard, wandb, ..., comma separated, if installed.", "Report"
    )
    eval_every: int | None = _setting(
        None, "Measure the held-out loss every N steps too, not only at both ends.", "Report", low=1
    )
    sample_prompt: str | None = _setting(
        None, "Prompt answered before and after; default: the first held-out one.", "Report"
    )
    sample_tokens: int = _setting(
        48, "Longest answer to it, in tokens; 0 generates none.", "Report", low=0, high=4096
    )

    @classmethod
    def load(cls, config_file: Path | None = None, **overrides: Any) -> "FinetuneConfig":
        """Merge defaults, a YAML file and `overrides` (those that are not None), and check them.

        Paths inside the YAML file are relative to its folder; overrides to the current one.
        Raises FinetuneError naming the setting, what was expected and what came.
        """
        values = _read_yaml(config_file) if config_file is not None else {}
        values |= {name: value for name, value in overrides.items() if value is not None}
        hints = get_type_hints(cls)
        config = cls(**{name: _coerce(name, value, hints[name]) for name, value in values.items()})
        config.validate()
        return config

    def validate(self) -> None:
        """Raise FinetuneError for the first setting out of its range, or required and absent."""
        for name in ("base", "data", "out"):
            if getattr(self, name) is None:
                raise FinetuneError(f"{name}: required; pass --{name} or set it in the YAML file")
        for field in dataclasses.fields(self):
            _check_range(field, getattr(self, field.name))
        if self.block_size & (self.block_size - 1):
            raise FinetuneError(f"block_size: expected a power of two, got {self.block_size}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML: absolute paths as strings, tuples as lists."""
        plain = dataclasses.asdict(self)
        for name, value in plain.items():
            if isinstance(value, Path):
                plain[name] = str(value.absolute())
            elif isinstance(value, tuple):
                plain[name] = list(value)
        return plain


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FinetuneError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise FinetuneError(f"--config {path}: not valid YAML: {reason}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise FinetuneError(f"--config {path}: expected `setting: value` lines, got {values!r:.60}")
    known = {field.name: field for field in dataclasses.fields(FinetuneConfig)}
    hints = get_type_hints(FinetuneConfig)
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise FinetuneError(f"--config {path}: unknown setting {str(name)!r}{hint}")
        if hints[name] == Path | None and isinstance(value, str):
            values[name] = path.parent / Path(value).expanduser()
    return {name: value for name, value in values.items() if value is not None}


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type. YAML reads `2e-4` as text, so numbers may come as strings."""
    optional = type(None) in getattr(hint, "__args__", ())
    kind = hint.__args__[0] if optional else hint
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    elif kind in (str, Path) and isinstance(value, str | Path):
        return kind(value)
    elif hint == tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(item.strip() for item in items if item.strip())
    expected = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"
    }.get(kind, "a list of names")  # fmt: skip
    raise FinetuneError(f"{name}: expected {expected}, got {value!r}")


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _check_range(field: dataclasses.Field, value: Any) -> None:
    limits = field.metadata
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        expected = "one of " + ", ".join(limits["choices"])
    elif limits["above"] is not None and value <= limits["above"]:
        expected = f"more than {limits['above']}"
    elif limits["low"] is not None and value < limits["low"]:
        expected = f"at least {limits['low']}"
    elif limits["high"] is not None and value > limits["high"]:
        expected = f"at most {limits['high']}"
    else:
        return
    raise FinetuneError(f"{field.name}: expected {expected}, got {value!r}")
