"""The frame of a model that tensors are brought into one at a time.

model, quantizer = skeleton(opened, dtype, config)    on the meta device, linear layers replaced
names = plan(model, opened)                           what to bring; every shape checked
...
finish(model, quantizer, opened)                      ties, buffers that no checkpoint holds
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.integrations.experts import PARAMETERS, NF4Experts
from halfbyte.integrations.gguf_models import GgufModel
from halfbyte.integrations.model_sources import FolderModel
from halfbyte.integrations.safetensors_files import ModelFileError
from halfbyte.integrations.transformers import METHOD, NF4Config, NF4Quantizer
from halfbyte.nn import NF4Linear


class PackedAsStored(NF4Quantizer):
    """`NF4Quantizer` that packs the layers whose weights are packed in the folder, and no others.

    `dense_against_config`: where these are not the layers that the config would pack, the others.
    """

    def __init__(self, config: NF4Config, layers: Iterable[str]) -> None:
        super().__init__(config, pre_quantized=True)
        self.layers = sorted(layers)
        self.dense_against_config: list[str] | None = None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dense = self.quantization_config.left_dense = self.modules_left_dense(model)
        linear = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
        if {n for n in linear if should_convert_module(n, dense)} != set(self.layers):
            self.dense_against_config = sorted(set(linear) - set(self.layers))
        for name in self.layers:
            module = model.get_submodule(name)
            if type(module) not in (nn.Linear, Conv1D):
                raise ModelFileError(
                    f"{name}: expected a linear layer for a packed weight, got "
                    f"{type(module).__name__}"
                )
            model.set_submodule(name, self._empty_layer(module))
        return model


def skeleton(
    opened: FolderModel | GgufModel, dtype: torch.dtype, config: NF4Config | None
) -> tuple[PreTrainedModel, NF4Quantizer]:
    """The model without data, its layers to be packed in place as `NF4Linear`."""
    if type(opened.config) not in AutoModelForCausalLM._model_mapping:
        raise ModelFileError(
            f"{opened.path}: expected a causal language model, got {opened.config.model_type!r}"
        )
    stored = None
    if isinstance(opened, FolderModel):
        stored = vars(opened.config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(opened.config, dtype=dtype)
    except Exception as error:  # sizes that fit no model end in errors of any class
        reason = " ".join(str(error).split())
        raise ModelFileError(f"{opened.path}: no model of this configuration: {reason}") from None
    if isinstance(opened, FolderModel) and opened.packed:
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        names = [opened.model_name(k, known, model.base_model_prefix) for k in opened.packed]
        if lost := sorted(set(names) - known):
            raise ModelFileError(f"{opened.path}: {lost[0]}: the model has no such weight")
        layers = [name.removesuffix(".weight") for name in names]
        quantizer: NF4Quantizer = PackedAsStored(stored_config(stored, opened.path), layers)
    else:
        if stored is not None:
            raise ModelFileError(
                f"{opened.path / 'config.json'}: expected dense weights or 4-bit ones in "
                "bitsandbytes' layout, got a model that says it is quantized and holds none"
            )
        quantizer = NF4Quantizer(config or NF4Config(), pre_quantized=False)
    quantizer.preprocess_model(model, dtype=dtype)
    return model.eval(), quantizer


def stored_config(settings: Any, path: Path) -> NF4Config:
    """The folder's quantization config, as halfbyte or as bitsandbytes wrote it."""
    try:
        if not isinstance(settings, dict):
            settings = settings.to_dict() if settings is not None else {"load_in_4bit": True}
        if METHOD in settings:
            return NF4Config.from_dict(settings)
        return NF4Config.from_bitsandbytes(BitsAndBytesConfig.from_dict(settings))
    except (TypeError, ValueError) as error:
        raise ModelFileError(
            f"{path / 'config.json'}: quantization_config: expected a 4-bit one: {error}"
        ) from None


def why_transformers(
    model: PreTrainedModel, opened: FolderModel | GgufModel, dtype: torch.dtype
) -> str:
    """Why the checkpoint takes more than reading, "" where it does not."""
    stored = opened.folder.entries if isinstance(opened, FolderModel) else ()
    packed_experts = tuple(f"{name}_absmax" for name in PARAMETERS)
    if any(isinstance(module, NF4Experts) for module in model.modules()) or any(
        name.endswith(packed_experts) for name in stored
    ):
        return "its experts are fused"
    if model._get_dtype_plan(dtype):
        return f"some of its modules stay in float32 beside {dtype}"
    changes = get_model_conversion_mapping(model)
    merges = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    for name in stored:
        if rename_source_key(name, renamings, merges)[0] != name:
            return f"{name} is stored in another form than the model's"
    return ""


def plan(model: PreTrainedModel, opened: FolderModel | GgufModel) -> list[str]:
    """Names of the model's tensors to bring; ModelFileError for absent, left-over, unfit ones."""
    wanted = expected_shapes(model)
    tied = model.all_tied_weights_keys
    if isinstance(opened, FolderModel):
        left = opened.place([*wanted, *tied], model.base_model_prefix)
    else:
        left = opened.place([*wanted, *tied])
    for target, origin in tied.items():
        if origin not in opened.placed and target in opened.placed:
            opened.placed[origin] = opened.placed.pop(target)  # stored under its other name
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    left = [name for name in left if not any(re.search(p, name) for p in ignored)]
    missing = [name for name in wanted if name not in opened.placed]
    if missing or left:
        kind, names = ("absent", missing) if missing else ("not the model's", left)
        raise ModelFileError(
            f"{opened.path}: {len(names)} tensors are {kind}: {', '.join(names[:3])}"
            + (", ..." if len(names) > 3 else "")
        )
    for name in wanted:
        packed = isinstance(opened, FolderModel) and opened.is_packed(name)
        if not packed and opened.shape(name) != wanted[name]:
            raise ModelFileError(
                f"{opened.path}: {opened.placed[name]}: expected shape {list(wanted[name])}, "
                f"got {list(opened.shape(name))}"
            )
        if not packed and not opened.dtype(name).is_floating_point:
            raise ModelFileError(
                f"{opened.path}: {opened.placed[name]}: expected a floating-point tensor, "
                f"got {opened.dtype(name)}"
            )
    for target, origin in tied.items():
        if target in opened.placed:
            check_equal(opened, target, origin)
    return list(wanted)


def expected_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Dense shapes by name of what a checkpoint must hold: no tied copies, no statistics."""
    found: dict[str, torch.Size] = {}
    for prefix, module in model.named_modules():
        skip = module._non_persistent_buffers_set
        packed = isinstance(module, NF4Linear)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in skip or (packed and name not in ("weight", "bias")):
                continue
            shape = tensor.shape
            if packed and name == "weight":
                shape = torch.Size((module.out_features, module.in_features))
                if module.source_cls is Conv1D:
                    shape = shape[::-1]
            found[f"{prefix}.{name}" if prefix else name] = torch.Size(shape)
    tied = model.all_tied_weights_keys
    return {name: shape for name, shape in found.items() if name not in tied}


def check_equal(opened: FolderModel | GgufModel, one: str, other: str) -> None:
    """A tied weight that is stored all the same must be the one it is tied to."""
    same = opened.shape(one) == opened.shape(other) and opened.dtype(one) == opened.dtype(other)
    pairs = zip(opened.pieces(one), opened.pieces(other), strict=True)
    if not same or not all(torch.equal(a, b) for a, b in pairs):
        raise ModelFileError(
            f"{opened.path}: {opened.placed[one]}: expected the values of {opened.placed[other]}, "
            "which the configuration ties it to, got others; set tie_word_embeddings to false"
        )


def finish(
    model: PreTrainedModel, quantizer: NF4Quantizer, opened: FolderModel | GgufModel
) -> None:
    """What is left once every tensor is there; the model is then as `from_pretrained` gives it."""
    model.tie_weights()
    for path, module in model.named_modules():
        _compute_buffers(model, path, module)
    if lost := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise ModelFileError(f"{opened.path}: {lost[0]}: was not brought by any tensor")
    if isinstance(opened, FolderModel) and (opened.path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(opened.path)
        except Exception as error:  # whatever class transformers checks with
            where = opened.path / "generation_config.json"
            raise ModelFileError(f"{where}: {error}") from None
    model.config._name_or_path = str(opened.path)
    model._weight_conversions = []
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _compute_buffers(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    """The buffers that no checkpoint holds, such as rotary frequencies, as transformers does."""
    names = [
        name
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
    ]
    for name in names:
        buffer = module._buffers[name]
        # NaN where it can be: what `_init_weights` leaves alone is found below.
        value = float("nan") if buffer.is_floating_point() else 0
        module._buffers[name] = torch.full_like(buffer, value, device="cpu")
    if names:
        # A stand-in without data takes what `_init_weights` does to the module's own parameters.
        stand_in = copy.copy(module)
        stand_in._parameters = {
            name: None if p is None else nn.Parameter(p.to("meta"), requires_grad=False)
            for name, p in module._parameters.items()
        }
        with torch.no_grad():
            model._init_weights(stand_in)
    for name in names:
        if module._buffers[name].isnan().any():
            raise ValueError(f"{path}.{name}: cannot be computed, and no checkpoint holds it")
