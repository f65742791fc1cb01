"""What transformers calls for each weight while it loads a model that halfbyte packs.

    Pack     a dense weight, as it is read     -> the packed weight of its layer
    Unpack   the entries of a packed weight    -> the packed weight of its layer

The first failure is kept as `hf_quantizer.failure`, to be raised once loading is over: transformers
catches what an operation raises and leaves no more of it than a log line.
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from halfbyte import checkpoint
from halfbyte.integrations.experts import NF4Experts
from halfbyte.nn import NF4Linear


class _Operation(ConversionOps):
    """What the two operations share: the quantizer, and nothing of a weight."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> _Operation:
        return self  # transformers copies an operation for every weight that it reads

    @property
    def reverse_op(self) -> ConversionOps:
        return _Keep()


class _Keep(ConversionOps):
    """Saving: a state dict has the checkpoint's layout already."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


class Pack(_Operation):
    """A dense weight as it is read -> the packed weight of its layer."""

    def convert(
        self, input_dict: dict[str, Any], model=None, missing_keys=None, **kwargs: Any
    ) -> dict[str, Any]:
        quantizer = self.hf_quantizer
        quantizer.missing_keys = missing_keys
        result = {}
        for key, value in input_dict.items():
            module, name = get_module_from_name(model, key)
            if isinstance(module, NF4Experts):
                missing_keys.discard(key)  # the Parameter of that name is replaced here
            if quantizer.failure is not None:
                continue
            try:
                quantizer.pack(module, name, value[0] if isinstance(value, list) else value)
            except ValueError as error:
                quantizer.failure = ValueError(f"{key}: {error}")
                continue
            if isinstance(module, NF4Linear):
                _discard_statistics(missing_keys, key)
                result[key] = module.weight
        return result


class Unpack(_Operation):
    """The entries of one packed weight -> the packed weight of its layer."""

    def convert(
        self,
        input_dict: dict[str, Any],
        model=None,
        full_layer_name: str = "",
        missing_keys=None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        quantizer = self.hf_quantizer
        quantizer.missing_keys = missing_keys
        module, _ = get_module_from_name(model, full_layer_name)
        packed = isinstance(module, NF4Linear)
        if not packed and len(input_dict) == 1:
            return input_dict
        if quantizer.failure is not None:
            return {}
        prefix = full_layer_name.removesuffix("weight")
        state = {prefix + k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        try:
            if not packed:
                raise ValueError(
                    f"{full_layer_name}: expected a dense weight, as the config leaves this layer "
                    "dense, got a packed one"
                )
            weight = checkpoint.from_entries(state, full_layer_name)
            if weight.shape != (module.out_features, module.in_features):
                raise ValueError(
                    f"{full_layer_name}: expected a packed weight of [{module.out_features}, "
                    f"{module.in_features}], got {list(weight.shape)}"
                )
        except ValueError as error:
            quantizer.failure = error
            return {}
        module._set_weight(weight)
        _discard_statistics(missing_keys, full_layer_name)
        return {"weight": module.weight}


def _discard_statistics(missing_keys: set[str], key: str) -> None:
    """While accelerate's FSDP loads, a layer's statistics are listed beside its weight."""
    prefix = key.removesuffix("weight")
    missing_keys -= {prefix + name for name in ("absmax", "nested_absmax", "nested_offset")}
