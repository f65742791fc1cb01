"""What cards hold, and the rates that bound a step on them.

`memory` is the total that the driver reports, in MiB; rates are the vendor's: bf16 multiplications
into fp32 without sparsity, and bytes a second that one card receives, from cards in its node
(`link`) and from other nodes (`network`: 400 Gb/s a card where the vendor's servers have it).
"""

from __future__ import annotations

import dataclasses

_MIB = 1 << 20
_TERA, _GIGA = 1e12, 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """A card: `memory` bytes; `flops` a second; `link`, `network` bytes a second."""

    name: str
    memory: int
    flops: float
    link: float
    network: float = 50 * _GIGA

    @property
    def gigabytes(self) -> float:
        return self.memory / 1e9


DEVICES = {
    name: Device(name, mib * _MIB, tera * _TERA, link * _GIGA)
    for name, mib, tera, link in (
        ("rtx3060-12gb", 12288, 51, 16),
        ("rtx3090", 24576, 71, 16),
        ("rtx4090", 24564, 165, 32),
        ("rtx5090", 32607, 209, 64),
        ("l4", 23034, 121, 32),
        ("a10g", 23028, 70, 32),
        ("a6000", 49140, 155, 32),
        ("l40s", 46068, 362, 32),
        ("a100-40gb", 40960, 312, 300),
        ("a100-80gb", 81920, 312, 300),
        ("h100-80gb", 81559, 989, 450),
        ("h200", 143771, 989, 450),
        ("b200", 183359, 2250, 900),
    )
}
