"""bitsandbytes.optim's Adam family over halfbyte's AdamW; Adam is AdamW without decay.

State is shown under bitsandbytes' names: `state1` and `state2` are the two moments, as fp32 or as
8-bit codes with `qmap1`, `absmax1`, `qmap2`, `absmax2`. 8-bit state is kept as the classic pair
(`state="moments"`), because that is what those names mean.
"""

from __future__ import annotations

import types

import torch

from bitsandbytes_shim.absent import NotOffered, absent
from bitsandbytes_shim.functional import create_dynamic_map
from halfbyte import optim

_NAMES = {
    "state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg_absmax",
    "absmax2": "exp_avg_sq_absmax", "step": "step",
}  # fmt: skip


class _State:
    """A parameter's state under bitsandbytes' names."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self._state = state

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in ("qmap1", "qmap2"):
            return create_dynamic_map(signed=name == "qmap1")
        return self._state[_NAMES[name]]


class _States:
    def __init__(self, states):
        self._states = states

    def __getitem__(self, param) -> _State:
        return _State(self._states[param])


class _Adam:
    """A halfbyte optimizer behind bitsandbytes' arguments."""

    weight_decay = 0.0
    optim_bits = 32
    paged = False

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=None, amsgrad=False,
        optim_bits=None, args=None, min_8bit_size=4096, percentile_clipping=100, block_wise=True,
        is_paged=None,
    ):  # fmt: skip
        if amsgrad or percentile_clipping != 100 or not block_wise:
            raise NotOffered("amsgrad, percentile_clipping and one scale a tensor")
        bits = self.optim_bits if optim_bits is None else optim_bits
        options = {"lr": lr, "betas": betas, "eps": eps}
        options["weight_decay"] = self.weight_decay if weight_decay is None else weight_decay
        options["paged"] = self.paged if is_paged is None else is_paged
        if bits == 8:
            options |= {"state": "moments", "min_8bit_size": min_8bit_size}
        kind = optim.AdamW8bit if bits == 8 else optim.AdamW32bit
        self._optimizer = kind(params, **options)

    @property
    def state(self) -> _States:
        return _States(self._optimizer.state)

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name)


def _family(name: str, weight_decay: float) -> None:
    for paged in (False, True):
        for suffix, bits in (("", 32), ("32bit", 32), ("8bit", 8)):
            full = f"{'Paged' if paged else ''}{name}{suffix}"
            settings = {"weight_decay": weight_decay, "optim_bits": bits, "paged": paged}
            globals()[full] = type(full, (_Adam,), settings)


_family("Adam", 0.0)
_family("AdamW", 1e-2)

for _name in ("Lion", "SGD", "RMSprop", "LAMB", "LARS", "Adagrad", "AdEMAMix"):
    for _prefix in ("", "Paged"):
        for _suffix in ("", "32bit", "8bit"):
            _full = _prefix + _name + _suffix
            globals()[_full] = absent(_full)

PytorchLARS = absent("PytorchLARS")
ademamix = types.SimpleNamespace(_ReferenceAdEMAMix=absent("_ReferenceAdEMAMix"))
GlobalOptimManager = absent("GlobalOptimManager")
GlobalOptimManager.get_instance = staticmethod(GlobalOptimManager)
