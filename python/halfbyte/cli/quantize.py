"""`halfbyte quantize SRC DST`: a model's linear layers packed to 4 bits, once, into a folder that
loads without being read."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from halfbyte.integrations.gguf_models import GgufModel
    from halfbyte.integrations.model_sources import FolderModel
    from halfbyte.integrations.transformers import NF4Config

DTYPES = ("bf16", "fp16", "fp32")
# What the command line says when nothing is said: a source that is packed keeps its own settings.
PACKED_ALREADY = {
    "block_size": 64,
    "double_quant": True,
    "codebook": "nf4",
    "skip_modules": None,
}
DEFAULT_TEXT = "default"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def command(
    src: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face folder (dense, or 4-bit bitsandbytes) or a .gguf file."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales too.")] = True,
    codebook: Annotated[str, typer.Option(help="nf4, fp4 or int4.")] = "nf4",
    skip: Annotated[
        list[str] | None, typer.Option(help="A module to leave dense; can be given several times.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Choose codes and scales for what the layers see when the model reads TEXT: a "
            "text file like those it is for, a .jsonl of training rows, or the word default.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of what stays dense: bf16, fp16, fp32; the source's own if not given."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Tensors worked on at a time.")] = 2,
    shard_size: Annotated[str, typer.Option(help="Largest file: 5GB, 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it is there.")] = False,
) -> None:
    """Pack a model to 4 bits, tensor by tensor, into a folder that loads in an instant.

    The folder is in bitsandbytes' layout, with a checksum for every tensor (halfbyte verify).
    --calibrate makes the same format lose far less; it runs the model on the text, so it needs
    memory for the dense model, and minutes.

    Examples: halfbyte quantize ./my-model ./my-model-nf4

              halfbyte quantize ./my-model ./my-model-nf4 --calibrate my-texts.txt
    """
    from halfbyte.cli.errors import plain_errors
    from halfbyte.finetune.errors import FinetuneError

    with plain_errors():
        limit = parse_size(shard_size)
        kind = parse_dtype(dtype)
        if threads < 1:
            raise FinetuneError(f"threads: expected at least 1, got {threads}")
        if dst.exists() and not overwrite:
            raise FinetuneError(f"{dst}: is there already; name another folder or use --overwrite")
        if dst.exists() and (not dst.is_dir() or dst.resolve() == src.resolve()):
            raise FinetuneError(f"{dst}: expected a folder other than the source")
        settings = {"block_size": block_size, "double_quant": double_quant, "codebook": codebook}
        settings["skip_modules"] = skip or None
        try:
            pack(src, dst, settings, calibrate, dtype=kind, shard_bytes=limit, threads=threads)
        except (ValueError, TypeError) as error:
            raise FinetuneError(" ".join(str(error).split())) from None
        except OSError as error:
            raise FinetuneError(f"{dst}: cannot be written: {error.strerror or error}") from None


def pack(
    src: Path, dst: Path, settings: dict[str, Any], calibrate: str | None, **options: Any
) -> None:
    """Writes the folder aside, puts it in place, and says what it did."""
    from rich.console import Console

    from halfbyte.finetune.files import replace_folder
    from halfbyte.integrations.model_sources import FolderModel, open_model
    from halfbyte.integrations.packed_folder import write_packed_folder
    from halfbyte.integrations.transformers import NF4Config

    console = Console(highlight=False)
    start = time.perf_counter()
    config: NF4Config | None = NF4Config(**settings)
    opened = open_model(src)
    if isinstance(opened, FolderModel) and opened.packed:
        if settings != PACKED_ALREADY or calibrate is not None:
            raise ValueError(
                f"{src}: is packed already: expected no --block-size, --no-double-quant, "
                "--codebook, --skip or --calibrate"
            )
        config = None
    with contextlib.ExitStack() as stack:
        packed, bytes_before = src, None
        if calibrate is not None:
            windows = calibration_windows(calibrate, opened)
            # Packed in memory and saved beside; what is saved is then copied tensor by tensor.
            dst.parent.mkdir(parents=True, exist_ok=True)
            aside = tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent)
            packed = Path(stack.enter_context(aside))
            bytes_before = save_calibrated(opened, packed, config, windows, options, console)
            config = None
        folder = stack.enter_context(replace_folder(dst))
        report = stack.enter_context(progress_bar(console, "packing"))
        written = write_packed_folder(packed, folder, config=config, progress=report, **options)
    console.print(
        f"{dst}: {written.packed} of {written.tensors} tensors packed, "
        f"{(bytes_before or written.bytes_before) / 1e9:.2f} GB to "
        f"{written.bytes_after / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s"
        + (f", calibrated with {windows.numel():,} tokens" if calibrate is not None else "")
    )


def calibration_windows(text: str, opened: FolderModel | GgufModel) -> torch.Tensor:
    """Tokens, int64 [windows, length], of a text file, a .jsonl of training rows or "default"."""
    from halfbyte.finetune.data import read_rows
    from halfbyte.finetune.encode import encode_row, prepare_tokenizer
    from halfbyte.finetune.errors import FinetuneError
    from halfbyte.integrations.calibrate import default_text, row_windows, token_windows

    path = Path(text)
    if text != DEFAULT_TEXT and not path.is_file():
        raise FinetuneError(f"calibrate {path}: expected a text file or the word default")
    tokenizer = opened.tokenizer()
    if text == DEFAULT_TEXT:
        return token_windows(default_text(), tokenizer)
    if path.suffix == ".jsonl":
        prepare_tokenizer(tokenizer)
        return row_windows(encode_row(row, tokenizer).input_ids for row in read_rows(path))
    try:
        return token_windows(path.read_text(encoding="utf-8"), tokenizer)
    except UnicodeDecodeError as error:
        raise FinetuneError(f"calibrate {path}: expected UTF-8: {error}") from None


def save_calibrated(
    opened: FolderModel | GgufModel,
    folder: Path,
    config: NF4Config,
    windows: torch.Tensor,
    options: dict[str, Any],
    console: Console,
) -> int:
    """Saves the calibrated model and its tokenizer in `folder`; the dense model's bytes."""
    from halfbyte.cli.models import quiet
    from halfbyte.integrations.calibrate import calibrate_model
    from halfbyte.integrations.streaming import load_dense

    with quiet():
        model = load_dense(opened.path, options["dtype"])
        bytes_before = sum(parameter.nbytes for parameter in model.parameters())
        with progress_bar(console, "calibrating", of_layers=True) as report:
            calibrate_model(model, windows, config=config, progress=report)
        model.save_pretrained(folder)
    opened.save_tokenizer(folder)
    return bytes_before


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500MB" or a plain number."""
    from halfbyte.finetune.errors import FinetuneError

    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,3})?)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise FinetuneError(f"shard-size: expected a size such as 5GB or 500MB, got {text!r}")
    return size


def parse_dtype(name: str | None) -> Any:
    """A torch dtype, or None for the source's own."""
    from halfbyte.finetune.errors import FinetuneError

    if name is not None and name not in DTYPES:
        raise FinetuneError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    import torch

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return None if name is None else kinds[name]


class progress_bar:
    """A bar over bytes, or layers, as a context manager; yields the function that moves it."""

    def __init__(self, console: Console, title: str, of_layers: bool = False) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn() if of_layers else DownloadColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[name]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=None, name="")

    def __enter__(self):
        self.bar.start()
        return self.report

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def report(self, done: int, total: int, name: str) -> None:
        self.bar.update(self.task, completed=done, total=total, name=name)
