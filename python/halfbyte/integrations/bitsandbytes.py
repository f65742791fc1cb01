"""Scripts and checkpoints written for bitsandbytes' 4-bit layers, run on halfbyte.

    from halfbyte.integrations import bitsandbytes
    bitsandbytes.take_over()

From then on `BitsAndBytesConfig(load_in_4bit=True, ...)` and folders saved with it, in NF4 or FP4,
load as halfbyte models, also where bitsandbytes is not installed. Checkpoints keep their bytes, and
what is saved is what bitsandbytes would have saved. 8-bit configs are left to bitsandbytes.

One entry of transformers' registry of quantizers is exchanged; `give_back()` puts the old one back,
and `with taken_over():` does so at the end.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import is_bitsandbytes_available

from halfbyte.integrations.transformers import NF4Config, NF4Quantizer

_KEY = "bitsandbytes_4bit"
_stock = AUTO_QUANTIZER_MAPPING[_KEY]


class BitsAndBytesQuantizer(NF4Quantizer):
    """`NF4Quantizer` for a `BitsAndBytesConfig`: the same layers are packed as bitsandbytes packs.

    Its rules, so that folders fit both ways: `llm_int8_skip_modules` takes the place of the
    defaults (the head) rather than adding to them, and fused experts stay dense. Block size 64.
    """

    def __init__(self, quantization_config, **kwargs) -> None:
        super().__init__(quantization_config, **kwargs)
        self._settings = NF4Config.from_bitsandbytes(quantization_config)
        self.quantization_config.bnb_4bit_quant_storage = torch.uint8  # how packed bytes are held

    @property
    def settings(self) -> NF4Config:
        return self._settings

    def modules_left_dense(self, model: nn.Module) -> list[str]:
        skip = self.settings.skip_modules
        if skip is None:
            return super().modules_left_dense(model)
        if lost := self.unknown_names(model, skip):
            logging.getLogger(__name__).warning(
                "llm_int8_skip_modules: %s fits no module of %s",
                ", ".join(map(repr, lost)),
                type(model).__name__,
            )
        tied = [key for pair in model.all_tied_weights_keys.items() for key in pair]
        return [*skip, *(key.removesuffix(".weight") for key in tied)]

    def leave_dense(self, dense: list[str], merged: list[str]) -> None:
        self.quantization_config.llm_int8_skip_modules = [*dense, *merged]
        self._settings.skip_modules = self.quantization_config.llm_int8_skip_modules

    def packs_experts(self, module: nn.Module) -> bool:
        return False

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        # Scripts look for it; but with it `num_parameters()` imports bitsandbytes.
        if is_bitsandbytes_available():
            model.is_loaded_in_4bit = True
        return model


def take_over() -> None:
    """Load 4-bit bitsandbytes configs and folders on halfbyte from now on. Twice is once."""
    AUTO_QUANTIZER_MAPPING[_KEY] = BitsAndBytesQuantizer


def give_back() -> None:
    """Leave them to bitsandbytes again; models loaded meanwhile stay as they are."""
    AUTO_QUANTIZER_MAPPING[_KEY] = _stock


@contextlib.contextmanager
def taken_over() -> Iterator[None]:
    """`take_over()` for a while; afterwards all is as it was before."""
    before = AUTO_QUANTIZER_MAPPING[_KEY]
    take_over()
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[_KEY] = before
