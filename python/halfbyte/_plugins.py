"""Hooks that third-party libraries find by themselves once halfbyte is imported.

PEFT keeps the layer that it adapts as `base_layer`. torch tells of every module that is registered;
when an `NF4Linear` becomes the `base_layer` of one of PEFT's tuner layers, that layer is handed to
`halfbyte.integrations.peft`, which is imported then and not before.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from halfbyte.nn import NF4Linear

_handle = None


def watch_peft() -> None:
    """Hand PEFT layers over NF4Linear to the integration from now on. Twice is once."""
    global _handle
    if _handle is None:
        _handle = register_module_module_registration_hook(_on_registration)


def ignore_peft() -> None:
    """Leave PEFT layers that are built from now on alone."""
    global _handle
    if _handle is not None:
        _handle.remove()
        _handle = None


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # Called for every module that anybody registers: the string comparison comes first.
    if name != "base_layer" or not type(module).__module__.startswith("peft.tuners."):
        return
    innermost = getattr(submodule, "get_base_layer", lambda: submodule)()
    if isinstance(innermost, NF4Linear):
        from halfbyte.integrations.peft import adopt

        adopt(module)
