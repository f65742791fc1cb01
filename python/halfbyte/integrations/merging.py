"""LoRA adapters merged into a model's folder, one tensor at a time.

    W' = W + sum_i weight_i scaling_i B_i A_i      in float32, rounded once

    W    [N, K]  a linear layer's weight, dense or 4-bit; transposed where the adapter says
                 `fan_in_fan_out` (Conv1D)
    A_i  [R, K], B_i [N, R]  from PEFT's files; scaling_i = alpha / R (rsLoRA: alpha / sqrt(R))

What is written is dense in 16 or 32 bits, or 4-bit again with the error that this adds:
||Q(W') - W'|| / ||W'|| (Frobenius), for each layer that was quantized and over all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from halfbyte import checkpoint
from halfbyte.integrations.adapters import CONFIG, WEIGHTS, _read_config, _setting
from halfbyte.integrations.model_folder import CONFIG as MODEL_CONFIG
from halfbyte.integrations.model_folder import SHARD_BYTES, ModelFolder, ShardWriter
from halfbyte.integrations.transformers import NF4Config, NF4Quantizer
from halfbyte.nf4_weight import NF4Weight, quantize_4bit
from halfbyte.nn import NF4Linear

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PANEL_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class AddedError:
    """||Q(W') - W'|| / ||W'|| over all weights that were quantized, and for each."""

    overall: float
    layers: dict[str, float]

    @property
    def worst(self) -> tuple[str, float] | None:
        """(name, error) of the layer with the largest error; None without layers."""
        return max(self.layers.items(), key=lambda item: item[1], default=None)


@dataclasses.dataclass(frozen=True)
class Written:
    """What a merge wrote: number of adapted weights, bytes of tensors, files, the added error."""

    adapted: int
    nbytes: int
    files: int
    error: AddedError | None = None


class LoraFile:
    """A LoRA adapter's files. Raises ValueError for variants of LoRA that are not known here.

    layers      names of the layers that it changes
    transposed  whether their weights are stored as [K, N]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder / CONFIG)
        self.transposed = bool(self.config.get("fan_in_fan_out"))
        path = self.folder / WEIGHTS
        try:
            self._file = safe_open(path, framework="pt")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        found: dict[str, set[str]] = {}
        for key in self._file.keys():
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"{path}: {key!r}: expected lora_A and lora_B of linear layers")
            found.setdefault(match[1], set()).add(match[2])
        for layer, kinds in found.items():
            if missing := {"A", "B"} - kinds:
                raise ValueError(f"{path}: {layer}: no lora_{min(missing)}")
        if not found:
            raise ValueError(f"{path}: expected lora_A and lora_B of linear layers, got none")
        self.layers = sorted(found)

    def rank(self, layer: str) -> int:
        """R of a layer, from its configuration."""
        return _setting(self.config, "r", "rank_pattern", layer)

    def scaling(self, layer: str) -> float:
        """What B A is multiplied by."""
        alpha, rank = _setting(self.config, "lora_alpha", "alpha_pattern", layer), self.rank(layer)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [R, K], B [N, R]) in float32."""
        a, b = (self._file.get_tensor(self._key(layer, kind)).float() for kind in "AB")
        return a, b

    def check(self, layer: str, shape: torch.Size) -> None:
        """ValueError unless the factors give a matrix of the stored weight's `shape`."""
        a, b = (self._file.get_slice(self._key(layer, kind)).get_shape() for kind in "AB")
        rank = self.rank(layer)
        n, k = reversed(shape) if self.transposed else shape
        if a != [rank, k] or b != [n, rank]:
            raise ValueError(
                f"{self.folder}: {layer}: expected A {[rank, k]} and B {[n, rank]}, got {a} and {b}"
            )

    @staticmethod
    def _key(layer: str, kind: str) -> str:
        return f"base_model.model.{layer}.lora_{kind}.weight"


class MergedWeights:
    """A base folder with adapters added as weights are asked for.

    adapters  (folder, weight) pairs; none: the base as it is

    Everything is checked here: ValueError for files that cannot be read, layers that the base
    lacks and shapes that differ.
    """

    def __init__(self, base: str | Path, adapters: Sequence[tuple[str | Path, float]] = ()) -> None:
        self.base = ModelFolder(base)
        self.names = self.base.names
        self.adapters = [(LoraFile(folder), weight) for folder, weight in adapters]
        self._changes: dict[str, list[tuple[LoraFile, float]]] = {}
        known = set(self.names)
        for adapter, weight in self.adapters:
            if not math.isfinite(weight):
                raise ValueError(
                    f"{adapter.folder}: weight: expected a finite number, got {weight}"
                )
            for layer in adapter.layers:
                name = f"{layer}.weight"
                if name not in known:
                    raise ValueError(f"{adapter.folder}: the base {base} has no weight {name!r}")
                shape = self.base.shape(name)
                if len(shape) != 2 or (adapter.transposed and self.base.is_packed(name)):
                    raise ValueError(f"{adapter.folder}: {layer}: expected a linear layer's weight")
                adapter.check(layer, shape)
                self._changes.setdefault(name, []).append((adapter, weight))

    @property
    def adapted(self) -> int:
        """How many weights are changed."""
        return len(self._changes)

    def is_adapted(self, name: str) -> bool:
        """Whether an adapter changes this weight."""
        return name in self._changes

    def dense(self, name: str) -> torch.Tensor:
        """W' in float32; ValueError if it is not finite."""
        weight = self.base.dense(name)
        for adapter, factor in self._changes.get(name, ()):
            layer = name.removesuffix(".weight")
            a, b = adapter.factors(layer)
            target = weight.T if adapter.transposed else weight
            scaling = factor * adapter.scaling(layer)
            rows = max(1, _PANEL_BYTES // (a.shape[1] * a.element_size()))
            for start in range(0, b.shape[0], rows):
                target[start : start + rows] += (b[start : start + rows] @ a) * scaling
        if self.is_adapted(name):
            check_finite(name, weight)
        return weight


def check_finite(name: str, weight: torch.Tensor) -> None:
    """ValueError if a merged weight holds an infinity or a NaN in its own dtype."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: expected finite merged values in {weight.dtype}, got others")


def write_dense(
    merged: MergedWeights,
    folder: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write W' dense to the empty `folder`, with the base's config and tokenizer.

    dtype  of all floating-point weights; None: as in the base, for 4-bit ones the dtype they were
           packed from
    """
    base = merged.base
    if base.packed and _has_conv1d(base.path):
        raise ValueError(f"{base.path}: Conv1D layers in 4 bits: expected linear layers only")
    writer = ShardWriter(folder, merged.names, shard_bytes)
    for name in merged.names:
        stored = base.load(name)
        target = stored.dtype
        if dtype is not None and (base.is_packed(name) or stored.is_floating_point()):
            target = dtype
        if merged.is_adapted(name) or base.is_packed(name):
            value = merged.dense(name).to(target)
        else:
            value = stored.to(target)
        if value.is_floating_point() and (merged.is_adapted(name) or target != stored.dtype):
            check_finite(name, value)
        writer.add({name: value})
    writer.close()
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    _finish(merged, folder, config)
    return Written(merged.adapted, writer.nbytes, writer.files)


def write_packed(
    merged: MergedWeights,
    folder: Path,
    settings: NF4Config | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write W' to the empty `folder` in bitsandbytes' 4-bit layout, with the added error.

    settings  for a dense base; None: NF4, block size 64, double quantization. A 4-bit base keeps
              its own format (ValueError with settings), and what no adapter changes its bytes.
    """
    base = merged.base
    config = dict(base.config)
    if base.packed:
        if settings is not None:
            raise ValueError(f"{base.path}: is in 4 bits already and keeps its format")
        packed = {name for name in merged.names if base.is_packed(name)}
    else:
        settings = settings or NF4Config()
        packed, config["quantization_config"] = _packing(base, settings)
    writer = ShardWriter(folder, merged.names, shard_bytes)
    squares: dict[str, tuple[float, float]] = {}
    for name in merged.names:
        stored = base.load(name)
        if name in packed and (merged.is_adapted(name) or not base.packed):
            wanted = merged.dense(name)
            weight = _quantize(wanted, stored, settings)
            squares[name.removesuffix(".weight")] = _squares(weight, wanted)
            writer.add(checkpoint.to_entries(weight, name))
        elif name in packed:
            writer.add(checkpoint.to_entries(stored, name))
        elif merged.is_adapted(name):
            value = merged.dense(name).to(stored.dtype)
            check_finite(name, value)
            writer.add({name: value})
        else:
            writer.add({name: stored})
    writer.close()
    _finish(merged, folder, config)
    return Written(merged.adapted, writer.nbytes, writer.files, _added_error(squares))


def _quantize(
    wanted: torch.Tensor, stored: torch.Tensor | NF4Weight, settings: NF4Config | None
) -> NF4Weight:
    """Q(wanted) in the format of `settings`, or else of the packed weight that was there."""
    source = settings or stored
    new = quantize_4bit(wanted, source.codebook, source.block_size, source.double_quant)
    return dataclasses.replace(new, dtype=stored.dtype)


def _squares(weight: NF4Weight, wanted: torch.Tensor) -> tuple[float, float]:
    """Squared Frobenius norms of Q(W') - W' and of W'."""
    error = norm = 0.0
    for rows, panel in weight.row_panels():
        error += (panel - wanted[rows]).square().sum(dtype=torch.float64).item()
        norm += wanted[rows].square().sum(dtype=torch.float64).item()
    return error, norm


def _added_error(squares: dict[str, tuple[float, float]]) -> AddedError:
    def ratio(error: float, norm: float) -> float:
        return math.sqrt(error / norm) if norm else 0.0

    overall = ratio(sum(e for e, _ in squares.values()), sum(n for _, n in squares.values()))
    return AddedError(overall, {name: ratio(*pair) for name, pair in squares.items()})


def _meta_model(folder: Path) -> torch.nn.Module:
    """The folder's causal language model without weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _has_conv1d(folder: Path) -> bool:
    return any(isinstance(module, Conv1D) for module in _meta_model(folder).modules())


def _packing(base: ModelFolder, settings: NF4Config) -> tuple[set[str], dict]:
    """The weights that `from_pretrained(..., quantization_config=settings)` would pack, and what
    config.json says of it."""
    model = _meta_model(base.path)
    quantizer = NF4Quantizer(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model)
    if quantizer.settings.packed_experts:
        raise ValueError(f"{base.path}: fused experts: expected linear layers only; write 16 bits")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    if any(layer.source_cls is Conv1D for layer in layers.values()):
        raise ValueError(f"{base.path}: Conv1D layers: expected linear layers only; write 16 bits")
    names = {f"{name}.weight" for name in layers}
    if lost := names - set(base.names):
        raise ValueError(f"{base.path}: expected a weight {min(lost)!r}, got none")
    return names, quantizer.settings.to_dict()


def _finish(merged: MergedWeights, folder: Path, config: dict) -> None:
    merged.base.copy_other_files(folder)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")
