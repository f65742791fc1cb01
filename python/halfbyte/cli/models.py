"""What the commands that work on a model and its adapters share: errors, adapters, loading."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.errors import plain_errors
from halfbyte.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.finetune.base import Base

NO_ADAPTER = "none"


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """`plain_errors`, and the same for a ValueError: a library's word for what does not fit."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with plain_errors():
        try:
            yield
        except FinetuneError:
            raise
        except ValueError as error:
            raise FinetuneError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, advice or warnings from the libraries."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers_logging.enable_progress_bar()


def check_target(path: Path, overwrite: bool, *sources: Path) -> None:
    """FinetuneError if `path` is one of the sources, or is there and is not to be replaced."""
    if any(path.resolve() == source.resolve() for source in sources):
        raise FinetuneError(f"out {path}: expected another place than what is read")
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FinetuneError(f"out {path}: exists already; pass --overwrite")


def check_adapter(path: Path) -> None:
    """FinetuneError unless `path` is a folder with an adapter in it."""
    if not path.is_dir():
        raise FinetuneError(f"adapter {path}: no such folder")
    if not (path / "adapter_config.json").is_file():
        raise FinetuneError(f"adapter {path}: expected an adapter_config.json in it, got none")


def named_adapters(arguments: list[str]) -> dict[str, Path]:
    """{name: folder} from NAME=FOLDER or FOLDER, whose name is then that of the folder."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, given, path = argument.partition("=")
        if not given:
            name, path = Path(argument).resolve().name, argument
        if not re.fullmatch(r"[\w-]+", name) or name == NO_ADAPTER:
            raise FinetuneError(
                f"--adapter {argument}: expected NAME=FOLDER with letters, digits, - and _ in the "
                f"name, not {NO_ADAPTER!r}"
            )
        if name in found:
            raise FinetuneError(f"--adapter {argument}: the name {name!r} is taken")
        check_adapter(Path(path))
        found[name] = Path(path)
    return found


def load_model(
    base: Base, adapters: dict[str, Path], dtype: str, block_size: int | None, dense: bool = False
) -> PreTrainedModel:
    """The base with its linear layers in 4 bits (dense: as they are stored) and frozen adapters.

    A folder in bitsandbytes' layout is run as it is. The first adapter is active.
    """
    from peft import PeftModel

    from halfbyte.finetune import base as bases
    from halfbyte.finetune.plan import compute_dtype
    from halfbyte.integrations.transformers import NF4Config

    kind = compute_dtype(dtype)
    if base.is_packed and (dense or block_size is not None):
        raise FinetuneError(f"base {base.source}: is quantized already and keeps its format")
    if dense:
        model = bases.load_dense(base, kind)
    else:
        packing = None if base.is_packed else NF4Config(block_size=block_size or 64)
        model = bases.load_model(base, kind, packing)
    for name, path in adapters.items():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(path, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
        except (RuntimeError, KeyError, TypeError) as error:  # names or shapes that differ
            reason = " ".join(str(error).split())
            raise FinetuneError(f"adapter {path}: does not fit the base: {reason:.300}") from None
    return model.eval()
