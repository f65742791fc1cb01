"""The base model: found, checked and only then loaded.

A base is a Hugging Face folder (config.json, safetensors, tokenizer) or a GGUF file. A GGUF file
is dequantized once into a bf16 safetensors folder in a cache, keyed by the file's sha256, and
that folder is used from then on.

    HALFBYTE_CACHE   the cache folder; default ~/.cache/halfbyte
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.files import replace_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    source  what the user named: a folder or a .gguf file
    folder  the Hugging Face folder to load; None for a GGUF file not converted yet
    """

    source: Path
    folder: Path | None

    @property
    def name(self) -> str:
        """Short name for titles."""
        return self.source.stem if self.source.suffix == ".gguf" else self.source.resolve().name

    @property
    def origin(self) -> str:
        """What the 16-bit weights are, to be said wherever their quality is quoted."""
        if self.source.suffix != ".gguf":
            return "released weights"
        quantization = self.source.stem.rpartition(".")[2]
        return f"dequantized {quantization} release used as the 16-bit base"


def open_base(path: Path) -> Base:
    """Find the base and check its files without loading it. Raises FinetuneError."""
    if not path.exists():
        raise FinetuneError(f"base {path}: no such file or folder")
    if path.is_dir():
        _check_folder(path)
        return Base(path, path)
    if path.suffix != ".gguf":
        raise FinetuneError(f"base {path}: expected a Hugging Face folder or a .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise FinetuneError(f"base {path}: expected a GGUF file, got first bytes {magic!r}")
    converted = _cache_folder(path)
    return Base(path, converted if (converted / "config.json").is_file() else None)


def load_config(base: Base) -> PretrainedConfig:
    """The model's configuration. Raises FinetuneError if it is no causal language model."""
    with _plain_errors(base):
        config = AutoConfig.from_pretrained(*_location(base), **_options(base))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise FinetuneError(
            f"base {base.source}: expected a causal language model, got {config.model_type!r}"
        )
    if base.folder is not None and getattr(config, "quantization_config", None) is not None:
        raise FinetuneError(
            f"base {base.source}: expected 16- or 32-bit weights, got a quantized model"
        )
    return config


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    with _plain_errors(base):
        return AutoTokenizer.from_pretrained(*_location(base), **_options(base))


def linear_names(config: PretrainedConfig) -> tuple[list[str], str | None]:
    """(names of all linear layers but the head, name of the head), from a model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
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


def convert(base: Base) -> Base:
    """Dequantize a GGUF base into the cache (bf16 safetensors); returns the converted base."""
    if base.folder is not None:
        return base
    target = _cache_folder(base.source)
    with _plain_errors(base):
        tokenizer = load_tokenizer(base)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
            model = AutoModelForCausalLM.from_pretrained(
                *_location(base),
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                **_options(base),
            )
    _clear_quantization(model)
    with replace_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Base(base.source, target)


def load_model(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """Load the dense model in `dtype`. Raises FinetuneError if tensors are absent or unfit."""
    assert base.folder is not None, "convert() a GGUF base first"
    with _plain_errors(base):
        model, loading = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise FinetuneError(
            f"base {base.source}: {len(missing)} tensors are absent, the first is {missing[0]}"
        )
    _clear_quantization(model)
    return model


def _location(base: Base) -> tuple[Path]:
    return (base.folder if base.folder is not None else base.source.absolute().parent,)


def _options(base: Base) -> dict[str, object]:
    options: dict[str, object] = {"local_files_only": True}
    if base.folder is None:
        options["gguf_file"] = base.source.name
    return options


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        hint = ""
        if (path / "adapter_config.json").is_file():
            hint = "; this is an adapter, name the model it was trained on"
        raise FinetuneError(f"base {path}: expected a config.json in it, got none{hint}")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise FinetuneError(f"base {path}: config.json is not valid JSON: {error}") from None
    files = sorted(path.glob("*.safetensors"))
    if not files and not list(path.glob("pytorch_model*.bin")):
        raise FinetuneError(f"base {path}: expected *.safetensors weights in it, got none")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except Exception as error:  # the bindings raise their own class
            raise FinetuneError(f"base {file}: not a readable safetensors file: {error}") from None


def _cache_folder(gguf: Path) -> Path:
    root = os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte"
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Path(root) / "gguf" / f"{gguf.stem}-{digest[:16]}-bf16"


def _clear_quantization(model: PreTrainedModel) -> None:
    """Drop the flags a GGUF load leaves behind: the weights are dense, and Trainer looks here."""
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config


@contextlib.contextmanager
def _plain_errors(base: Base) -> Iterator[None]:
    """Whatever a third-party reader raises over a bad file becomes one line."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FinetuneError(f"base {base.source}: cannot be read: {reason:.300}") from error
