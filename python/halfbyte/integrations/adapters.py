"""Adapters in PEFT's file format for models with `halfbyte.nn.LoraLinear`, without PEFT.

    folder/adapter_config.json         settings of LoRA; nulls and false switches mean nothing
    folder/adapter_model.safetensors   base_model.model.<layer>.lora_A.weight   [r, K]
                                       base_model.model.<layer>.lora_B.weight   [N, r]

`<layer>` is the layer's name in `model.named_modules()`. What `save_adapter` writes loads with
`PeftModel.from_pretrained`, and `load_adapter` reads what `PeftModel.save_pretrained` writes.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from halfbyte.nn import LoraLinear

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that say what an adapter is for or how it was made, not what it computes.
_INDIFFERENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_UNDERSTOOD = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weight as it was.
_PLAIN_INITS = (None, True, False, "eva", "gaussian", "loftq", "orthogonal")


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter in `folder` into the `LoraLinear` layers of `model`; returns `model`.

    Sets `lora_a`, `lora_b` (in the layer's dtypes) and `alpha`, so that alpha / r is the file's
    scaling; dropout stays as the layer has it. Raises ValueError, before anything is changed, for
    files that are not an adapter, a variant of LoRA (named), layers without tensors or tensors
    without a layer, and ranks or shapes that differ.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    layers = _layers(model)
    for name, layer in layers.items():
        rank = _setting(config, "r", "rank_pattern", name)
        if rank != layer.r:
            raise ValueError(f"{folder / CONFIG}: {name}: expected rank {layer.r}, got {rank}")
    tensors = _read_tensors(folder / WEIGHTS, layers)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_a.copy_(tensors[name, "lora_A"])
            layer.lora_b.copy_(tensors[name, "lora_B"])
            alpha = _setting(config, "lora_alpha", "alpha_pattern", name)
            layer.alpha = float(alpha * (math.sqrt(layer.r) if config.get("use_rslora") else 1))
    return model


def save_adapter(
    model: nn.Module, folder: str | Path, base_model_name_or_path: str | None = None
) -> None:
    """Write the adapter of `model`'s `LoraLinear` layers to `folder`, as PEFT does.

    `base_model_name_or_path` goes into the configuration, for tools that load the base too. Files
    are written aside, fsynced and renamed; the configuration last.
    """
    folder = Path(folder)
    layers = _layers(model)
    config = _config(model, layers, base_model_name_or_path)
    tensors = {}
    for name, layer in layers.items():
        for kind, parameter in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b)):
            key = f"{_PREFIX}{name}.{kind}.weight"
            tensors[key] = parameter.detach().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _layers(model: nn.Module) -> dict[str, LoraLinear]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    if not layers or "" in layers:
        raise ValueError(
            "model: expected a module that holds halfbyte.nn.LoraLinear layers, "
            f"got {type(model).__name__}"
        )
    return layers


# --- reading -------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected 'LORA', got {config.get('peft_type')!r}")
    # Null, false and empty: not used. `alora_invocation_tokens: []` and the like too.
    config = {k: v for k, v in config.items() if v is not None and v is not False and v != {}}
    for name, value in config.items():
        if name not in _INDIFFERENT | _UNDERSTOOD and value != []:
            raise ValueError(f"{path}: {name}={value!r}: a variant of LoRA that is not known here")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias: expected 'none', got {config['bias']!r}")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights={init!r}: this adapter belongs to a rewritten base weight; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    values: dict[str, Any] = {key: config[key] for key in ("r", "lora_alpha") if key in config}
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(setting, {})
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {setting}: expected an object, got {patterns!r}")
        for pattern, value in patterns.items():
            values[f"{setting}[{pattern!r}]"] = value
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path}: {setting}[{pattern!r}]: {error}") from None
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{path}: {name}: expected a finite number, got {value!r}")


def _setting(config: dict[str, Any], name: str, patterns: str, layer: str) -> int | float:
    """A layer's rank or alpha: the first pattern that fits its name counts, as in PEFT."""
    found = config.get(patterns, {}).items()
    matches = (value for key, value in found if re.match(rf"(.*\.)?({key})$", layer))
    return next(matches, config.get(name, 8))


def _read_tensors(path: Path, layers: dict[str, LoraLinear]) -> dict[tuple[str, str], torch.Tensor]:
    wanted = {}
    for name, layer in layers.items():
        wanted[f"{_PREFIX}{name}.lora_A.weight"] = (name, "lora_A"), layer.lora_a.shape
        wanted[f"{_PREFIX}{name}.lora_B.weight"] = (name, "lora_B"), layer.lora_b.shape
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if missing := wanted.keys() - keys:
                raise ValueError(f"{path}: no tensor {min(missing)!r}")
            if unexpected := keys - wanted.keys():
                raise ValueError(f"{path}: {min(unexpected)!r} fits no LoraLinear of the model")
            tensors = {}
            for key, (place, shape) in wanted.items():
                tensor = file.get_tensor(key)
                if tensor.shape != shape or not tensor.is_floating_point():
                    raise ValueError(
                        f"{path}: {key}: expected float {list(shape)}, "
                        f"got {tensor.dtype} {list(tensor.shape)}"
                    )
                tensors[place] = tensor
            return tensors
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


# --- writing -------------------------------------------------------------------------------------


def _config(model: nn.Module, layers: dict[str, LoraLinear], base: str | None) -> dict[str, Any]:
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _plain(layer.alpha) for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(layers.values())).dropout,
        "target_modules": _targets(model, list(layers)),
        # "^": PEFT takes a pattern for the end of a name otherwise.
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names, which PEFT compares with the ends of names; one expression if that is unclear."""
    ours = set(names)
    inside = tuple(f"{name}." for name in names)
    for other, _ in model.named_modules():
        clash = any(other.endswith(f".{name}") for name in names)
        if clash and other not in ours and not other.startswith(inside):
            return f"(?:{'|'.join(map(re.escape, names))})"
    return sorted(names)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`; fsync it and rename it to `path`."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
