"""transformers on halfbyte: `from_pretrained(folder, quantization_config=halfbyte.NF4Config(...))`.

    before loading   linear layers become `NF4Linear` on the meta device, fused experts `NF4Experts`
    while loading    each tensor is packed as it is read: memory = packed model + one tensor
    saving           bitsandbytes' key layout and config, plus the key "halfbyte" in the config

A saved folder names "bitsandbytes" as its method, which stock transformers and bitsandbytes read;
the extra key makes it a halfbyte model where this module is imported. Packed experts and the int4
code book have no counterpart in bitsandbytes: such a folder names "halfbyte" alone.

Importing this module registers the method with transformers' own registries, and puts one entry
that tells the two kinds of folder apart in the place of "bitsandbytes_4bit"; what is not marked is
read as before.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte import checkpoint
from halfbyte.integrations.experts import PARAMETERS, NF4Experts, why_not_packed
from halfbyte.integrations.weight_operations import Pack, Unpack
from halfbyte.nf4_weight import CODEBOOKS, quantize_4bit
from halfbyte.nn import NF4Linear

METHOD = "halfbyte"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENTRIES = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map") + tuple(
    f".quant_state.bitsandbytes__{codebook}" for codebook in CODEBOOKS
)


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """How `from_pretrained` packs a model's linear layers.

    block_size     weights that share a scale: a power of two from 32 to 4096
    double_quant   scales in 8 bits: 4.127 bits a parameter at block size 64 instead of 4.5
    codebook       "nf4", "fp4" or "int4"
    compute_dtype  None: layers compute in their input's dtype (or autocast's); a dtype or its name:
                   inputs are cast to it and outputs back, as bitsandbytes does
    skip_modules   names of modules to leave dense, besides the head and tied weights, which always
                   stay so: a full name, its beginning or its end, or a regular expression

    Raises ValueError or TypeError for values that do not fit; a name in `skip_modules` that fits no
    module is an error when the model is loaded.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: str = "nf4",
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.block_size = block_size
        self.double_quant = double_quant
        self.codebook = codebook
        self.compute_dtype = _DTYPES.get(compute_dtype, compute_dtype)
        self.skip_modules = skip_modules
        # What a loaded model adds: the modules left dense, and whether experts are packed.
        self.left_dense: list[str] | None = None
        self.packed_experts = False
        self.post_init()

    def post_init(self) -> None:
        """Checks the values."""
        size = self.block_size
        if type(size) is not int or not 32 <= size <= 4096 or size.bit_count() != 1:
            raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {size!r}")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant: expected True or False, got {self.double_quant!r}")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook: expected nf4, fp4 or int4, got {self.codebook!r}")
        if self.compute_dtype not in (None, *_DTYPES.values()):
            raise ValueError(
                "compute_dtype: expected float32, bfloat16, float16 or None, "
                f"got {self.compute_dtype!r}"
            )
        names = self.skip_modules
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise TypeError(f"skip_modules: expected a list of names or None, got {names!r}")
        self.skip_modules = None if names is None else list(names)

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig) -> NF4Config:
        """The same settings from a `BitsAndBytesConfig(load_in_4bit=True, ...)`."""
        if not config.load_in_4bit:
            raise ValueError("config: expected load_in_4bit=True, got False")
        return cls(
            double_quant=config.bnb_4bit_use_double_quant,
            codebook=config.bnb_4bit_quant_type,
            compute_dtype=config.bnb_4bit_compute_dtype,
            skip_modules=config.llm_int8_skip_modules,
        )

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any):
        """From what `to_dict` gives, or from the arguments' names and values."""
        settings = config_dict.get(METHOD, config_dict)
        settings = {key: value for key, value in settings.items() if key != "quant_method"}
        return super().from_dict(settings, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: bitsandbytes' keys, and this config's own under "halfbyte"."""
        dtype = self.compute_dtype and str(self.compute_dtype).removeprefix("torch.")
        settings = {
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "codebook": self.codebook,
            "compute_dtype": dtype,
            "skip_modules": copy.copy(self.skip_modules),
        }
        if self.codebook == "int4" or self.packed_experts:
            return {"quant_method": METHOD, METHOD: settings}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.codebook,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": dtype or "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": copy.copy(self.left_dense) if self.skip_modules else None,
            METHOD: settings,
        }


class MarkedBitsAndBytesConfig(BitsAndBytesConfig):
    """Reads a folder's quantization config: an `NF4Config` where it is marked as halfbyte's."""

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any):
        target = NF4Config if METHOD in config_dict else BitsAndBytesConfig
        return target.from_dict(config_dict, return_unused_kwargs, **kwargs)


AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = MarkedBitsAndBytesConfig


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Packs a transformers model while it is loaded, and loads packed ones."""

    serialized_names = {"weight": [f"weight{entry}" for entry in _ENTRIES]}

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        # A copy: what one model adds to it must not reach the next that is loaded with it.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.failure: ValueError | None = None
        self.missing_keys: set[str] = set()

    @property
    def settings(self) -> NF4Config:
        return self.quantization_config

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device map that moves packed layers while the model runs."""
        places = {str(p) for p in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and places != {"cpu"}):
            raise ValueError(
                "device_map: expected accelerators or the CPU alone, got layers on "
                f"{sorted(places)}; packed layers are not moved between devices while a model runs"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Without one, the current accelerator where there is one, as bitsandbytes does."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    # --- before loading ---------------------------------------------------------------------------

    def modules_left_dense(self, model: nn.Module) -> list[str]:
        """Names of what stays dense: the head, tied weights and `skip_modules`."""
        skip = self.settings.skip_modules or []
        if lost := self.unknown_names(model, skip):
            raise ValueError(
                f"skip_modules: expected names of modules of {type(model).__name__}, got "
                f"{', '.join(map(repr, lost))}, which fits none"
            )
        return sorted({*get_keys_to_not_convert(model), *skip})

    def unknown_names(self, model: nn.Module, skip: list[str]) -> list[str]:
        """Those of `skip` that fit no module; none where a saved model's names are taken over."""
        if self.pre_quantized:
            return []
        names = [name for name, _ in model.named_modules() if name]
        return [s for s in skip if all(should_convert_module(name, [s]) for name in names)]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dense = self.modules_left_dense(model)
        if isinstance(self.quantization_config, NF4Config):
            self.quantization_config.left_dense = dense
        dense = [*dense, *(model._keep_in_fp32_modules or [])]
        layers: dict[int, NF4Linear] = {}
        refused: dict[str, str] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if not should_convert_module(name, dense):
                continue
            if type(module) in (nn.Linear, Conv1D):
                layer = layers.setdefault(id(module), self._empty_layer(module))
                model.set_submodule(name, layer)
            elif self.packs_experts(module):
                model.set_submodule(name, self._empty_experts(module))
                self.quantization_config.packed_experts = True
            elif isinstance(getattr(module, PARAMETERS[0], None), nn.Parameter):
                refused[type(module).__name__] = why_not_packed(module)
        for kind, reason in refused.items():
            logging.getLogger(__name__).warning(
                "%s: its fused experts stay dense: %s", kind, reason or "as in bitsandbytes"
            )
        return model

    def packs_experts(self, module: nn.Module) -> bool:
        """Whether `module` holds fused experts that are to be packed."""
        return why_not_packed(module) == ""

    def _empty_layer(self, module: nn.Module) -> NF4Linear:
        settings = self.settings
        transposed = isinstance(module, Conv1D)
        shape = module.weight.shape[::-1] if transposed else module.weight.shape
        weight = checkpoint.empty_weight(
            torch.Size(shape),
            module.weight.dtype,
            settings.block_size,
            settings.double_quant,
            settings.codebook,
        )
        layer = NF4Linear(weight, module.bias, settings.compute_dtype).train(module.training)
        layer.source_cls = type(module)  # a Conv1D holds [K, N]: transposed before it is packed
        layer._is_hf_initialized = True  # transformers must not draw random codes
        return layer

    def _empty_experts(self, module: nn.Module) -> NF4Experts:
        settings = self.settings
        experts = NF4Experts(
            module,
            settings.block_size,
            settings.double_quant,
            settings.codebook,
            settings.compute_dtype,
        )
        if self.pre_quantized:
            experts.allocate()
        experts._is_hf_initialized = True
        return experts

    # --- while loading ----------------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, NF4Experts):
            return name in PARAMETERS and not module.is_packed(name)
        return isinstance(module, NF4Linear) and name == "weight"

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, NF4Experts) and name in PARAMETERS and not module.is_packed(name):
            return 0.5
        return param.element_size()

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, no cast, for packed weights and their statistics: `dtype` is the model's, uint8."""
        return dtype if dtype is None or dtype.is_floating_point else None

    def get_quantize_ops(self) -> ConversionOps:
        return Pack(self)

    def get_load_operations(self) -> dict:
        return {"deserialize": Unpack}

    def pack(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Packs the dense `value` into `module`; ValueError where it cannot be."""
        if isinstance(module, NF4Experts):
            module.pack(name, value)
            return
        if module.source_cls is Conv1D:
            value = value.T.contiguous()
        settings = self.settings
        module._set_weight(
            quantize_4bit(value, settings.codebook, settings.block_size, settings.double_quant)
        )

    # --- after loading ----------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        lacking = []
        for name, module in model.named_modules():
            if not isinstance(module, NF4Linear | NF4Experts):
                continue
            missing = {n for n in module._parameters if f"{name}.{n}" in self.missing_keys}
            missing |= {n for n, p in module.named_parameters(recurse=False) if p.is_meta}
            if "bias" in missing:  # as transformers initialises a bias that a checkpoint lacks
                nn.init.zeros_(module.bias)
            lacking += [f"{name}.{n}" for n in sorted(missing - {"bias"})]
        if lacking:
            raise ValueError(f"checkpoint: expected the packed weights {lacking}, found none")
        self.missing_keys = set()
        # Merging single experts into one tensor cannot be undone on packed bytes.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions or []
            if not (
                isinstance(conversion, WeightConverter)
                and self._has_packed_experts
                and conversion.target_patterns[0].endswith(PARAMETERS)
            )
        ]
        return model

    # --- before saving ----------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict]:
        """The config follows what has become dense since loading, as layers of merged adapters do;
        a model without packed layers is saved as a dense one."""
        adapted = any("base_layer" in name for name, _ in model.named_modules())
        if not adapted:
            dense = self.modules_left_dense(model)
            merged = [
                name
                for name, module in model.named_modules()
                if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, dense)
            ]
            if not any(isinstance(m, NF4Linear | NF4Experts) for m in model.modules()):
                self.remove_quantization_config(model)
            elif merged:
                self.leave_dense(dense, merged)
        return None, {}

    def leave_dense(self, dense: list[str], merged: list[str]) -> None:
        """Notes in the config that besides `dense` the layers `merged` are dense."""
        self.quantization_config.skip_modules = [*(self.settings.skip_modules or []), *merged]
        self.quantization_config.left_dense = [*dense, *merged]

    @property
    def _has_packed_experts(self) -> bool:
        return getattr(self.quantization_config, "packed_experts", False)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, NF4Linear):
                dense = _dense_layer(module, dtype)
            elif isinstance(module, NF4Experts):
                dense = module.to_experts(dtype)
            else:
                continue
            if (hook := getattr(module, "_hf_hook", None)) is not None:
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(dense, hook)
            model.set_submodule(name, dense)
        if hasattr(model, "is_loaded_in_4bit"):
            del model.is_loaded_in_4bit
        return model


def _dense_layer(layer: NF4Linear, dtype: torch.dtype | None) -> nn.Module:
    linear = layer.to_linear(dtype)
    if getattr(layer, "source_cls", None) is not Conv1D:
        return linear
    with torch.device("meta"):
        dense = Conv1D(layer.out_features, layer.in_features)
    dense.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    dense.bias = linear.bias
    return dense.train(layer.training)
