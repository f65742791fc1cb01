"""The base model: found, checked and only then loaded.

A base is a Hugging Face folder (config.json, safetensors, tokenizer), in 16 or 32 bits or packed
by halfbyte or bitsandbytes, or a GGUF file. Its tensors are read one at a time and packed as they
come.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from halfbyte.finetune.errors import FinetuneError
from halfbyte.integrations import streaming
from halfbyte.integrations.gguf_models import GgufModel
from halfbyte.integrations.model_sources import FolderModel, open_model
from halfbyte.integrations.safetensors_files import ModelFileError
from halfbyte.integrations.transformers import NF4Config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    source  what the user named: a folder or a .gguf file
    opened  its configuration and the places of its tensors
    """

    source: Path
    opened: FolderModel | GgufModel

    @property
    def name(self) -> str:
        """Short name for titles."""
        return self.source.stem if self.is_gguf else self.source.resolve().name

    @property
    def is_gguf(self) -> bool:
        return isinstance(self.opened, GgufModel)

    @property
    def is_packed(self) -> bool:
        """Whether the linear layers are in 4 bits already."""
        return isinstance(self.opened, FolderModel) and bool(self.opened.packed)

    @property
    def origin(self) -> str:
        """What the 16-bit weights are, to be said wherever their quality is quoted."""
        if self.is_packed:
            return "packed to 4 bits before"
        if not self.is_gguf:
            return "released weights"
        quantization = self.source.stem.rpartition(".")[2]
        return f"dequantized {quantization} release used as the 16-bit base"


def open_base(path: Path) -> Base:
    """Find the base and check its files without loading it. Raises FinetuneError."""
    if not path.exists():
        raise FinetuneError(f"base {path}: no such file or folder")
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
            raise FinetuneError(
                f"base {path}: expected a config.json in it, got none; this is an adapter, name "
                "the model it was trained on"
            )
    elif path.suffix != ".gguf":
        raise FinetuneError(f"base {path}: expected a Hugging Face folder or a .gguf file")
    with _plain_errors(path):
        base = Base(path, open_model(path))
    if type(base.opened.config) not in AutoModelForCausalLM._model_mapping:
        kind = base.opened.config.model_type
        raise FinetuneError(f"base {path}: expected a causal language model, got {kind!r}")
    if not base.is_packed and getattr(base.opened.config, "quantization_config", None) is not None:
        raise FinetuneError(
            f"base {path}: expected 16- or 32-bit weights or packed 4-bit ones, got a quantized "
            "model"
        )
    return base


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    with _plain_errors(base.source):
        return base.opened.tokenizer()


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The dense model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_names(model: PreTrainedModel) -> tuple[list[str], str | None]:
    """(names of all linear layers but the head, name of the head)."""
    head = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules()}
    linear = [
        name
        for name, module in names.items()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    return linear, next((name for name, module in names.items() if module is head), None)


def check_targets(targets: tuple[str, ...], linear: list[str], head: str | None) -> None:
    """Check that each target names a linear layer the way PEFT matches: whole name or its end."""
    if not linear:
        raise FinetuneError("base: expected linear layers to adapt, got a model without any")
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if head is not None and (head == target or head.endswith("." + target)):
            raise FinetuneError(f"target_modules: {target!r} is the head, which stays as it is")
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise FinetuneError(
                f"target_modules: expected linear layers ({', '.join(known)}), got {target!r}"
            )


def load_model(base: Base, dtype: torch.dtype, config: NF4Config | None = None) -> PreTrainedModel:
    """The model with its linear layers in 4 bits as `config` says; a packed base, which takes none,
    is mapped. Raises FinetuneError for whatever does not fit."""
    with _plain_errors(base.source):
        return streaming.load_model(base.source, dtype=dtype, config=config)


def load_dense(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """The model with no layer packed. Raises FinetuneError for whatever does not fit."""
    with _plain_errors(base.source):
        return streaming.load_dense(base.source, dtype)


@contextlib.contextmanager
def _plain_errors(source: Path) -> Iterator[None]:
    """Whatever a reader raises over a bad file becomes one line."""
    try:
        yield
    except ModelFileError as error:  # names the file
        raise FinetuneError(f"base {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FinetuneError(f"base {source}: cannot be read: {reason:.300}") from error
