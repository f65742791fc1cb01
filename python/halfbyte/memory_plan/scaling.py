"""The same step in several processes, one device each: bytes and communication under FSDP2 and DDP.

FSDP2 (`halfbyte.integrations.distributed.shard_model`) cuts every Parameter into N parts along its
first dimension, ceil(rows / N) rows each, the last ones shorter or empty; a unit is a decoder
layer, and one more holds embeddings, head and the last norm. Of S bytes in N equal parts:

    a process keeps       S / N of weights, adapters, gradients and optimizer state
    and gathers           the layer that runs and the next one; the root unit from start to end
    all-gather            S (N - 1) / N received, for a layer in forward and again in backward
    reduce-scatter        G (N - 1) / N received, G the gradients of the adapters
    DDP all-reduce        2 G (N - 1) / N received; everything else is whole in every process

Activations, loss and runtime are each process's own: batch and sequence are a process's. A step on
the roofline: the larger of the time for its multiplications and of the time for its bytes, at
`devices`' rates. Nodes have 8 devices; a node receives what lies in other nodes once, over the
network ports of all of them.

    multiplications = 2 x tokens x (2 packed + 2 head); with checkpointing packed once more, with
    the tiled loss head once more (recomputed); adapters and attention are left out
"""

from __future__ import annotations

import dataclasses

from halfbyte.memory_plan.devices import DEVICES, Device
from halfbyte.memory_plan.plan import Plan, Settings, packed_bytes, plan
from halfbyte.memory_plan.shapes import SHAPES, Shape

STRATEGIES = ("fsdp2", "ddp")
GPUS_A_NODE = 8
_UNITS_GATHERED = 2  # the layer that runs and the one that is gathered ahead of it

# The table of docs/scaling.md.
TABLE_MODELS = ("Llama-2-7B", "Llama-2-13B", "LLaMA-33B", "Llama-3.1-70B", "Llama-3.1-405B")
TABLE_RANKS = (1, 2, 4, 8, 16, 32, 64)
TABLE_SETTINGS = Settings(sequence=2048, checkpointing=True)
TABLE_DEVICE = "h100-80gb"
_CARDS = ("rtx4090", "a6000", "h100-80gb", "h200")


def shard_bytes(
    shape: Shape,
    ranks: int,
    rank: int = 0,
    block_size: int = 64,
    double_quant: bool = True,
) -> dict[str, int]:
    """Bytes of packed Parameters that process `rank` of `ranks` holds under FSDP2.

    Keys: "codes" (`weight`, uint8), "absmax" (uint8, or 4 bytes without double quantization),
    "nested" (`nested_absmax` and `nested_offset`, 4 bytes each). Each Parameter is cut along its
    first dimension as `torch.chunk` cuts: ceil(rows / ranks) rows a process, fewer or none at the
    end. Rank 0's share is what every process pads to while it gathers.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: expected 0 <= rank < {ranks}, got {rank}")
    found = {"codes": 0, "absmax": 0, "nested": 0}
    for n, k in shape.linears.values():
        blocks = -(-n * k // block_size)
        found["codes"] += _part(-(-n * k // 2), ranks, rank)
        found["absmax"] += _part(blocks, ranks, rank) * (1 if double_quant else 4)
        if double_quant:
            found["nested"] += 4 * (_part(-(-blocks // 256), ranks, rank) + _part(1, ranks, rank))
    return {name: shape.layers * size for name, size in found.items()}


def _part(rows: int, ranks: int, rank: int) -> int:
    size = -(-rows // ranks)
    return max(0, min(size, rows - rank * size))


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """One of `ranks` processes: its plan, what it gathers, and the bytes it receives in a step."""

    plan: Plan
    ranks: int
    strategy: str
    gathered: int
    all_gather: int
    reduce: int

    @property
    def peak(self) -> int:
        return self.plan.peak + self.gathered

    @property
    def received(self) -> int:
        return self.all_gather + self.reduce

    def communication_s(self, device: Device) -> float:
        """Seconds to receive the step's bytes: over the links in a node, or into the node."""
        inside = self.received / device.link
        nodes = -(-self.ranks // GPUS_A_NODE)
        if nodes == 1:
            return inside
        whole = self.received * self.ranks / (self.ranks - 1)
        into_node = whole * (nodes - 1) / nodes
        return max(inside, into_node / (GPUS_A_NODE * device.network))

    def compute_s(self, device: Device) -> float:
        """Seconds for the step's multiplications at the device's rate."""
        shape, settings = self.plan.shape, self.plan.settings
        packed = shape.linear_parameters * (3 if settings.checkpointing else 2)
        head = shape.vocab * shape.hidden * (3 if settings.loss == "tiled" else 2)
        return 2 * settings.tokens * (packed + head) / device.flops


def rank_plan(
    shape: Shape,
    settings: Settings,
    ranks: int,
    strategy: str = "fsdp2",
    device: str = "cuda",
    baseline: int | None = None,
) -> RankPlan:
    """The plan of the fullest process, rank 0 (arguments as `plan` takes them).

    Raises ValueError for a strategy that is not known, ranks under 1, or a method other than
    "qlora".
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected fsdp2 or ddp, got {strategy!r}")
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}")
    if settings.method != "qlora":
        raise ValueError(f"method: expected qlora in several processes, got {settings.method!r}")
    whole = plan(shape, settings, device, baseline)
    share = (ranks - 1) / ranks
    if strategy == "ddp" or ranks == 1:
        return RankPlan(whole, ranks, strategy, 0, 0, round(2 * whole.gradients * share))
    mine = dataclasses.replace(
        whole,
        packed=sum(
            shard_bytes(shape, ranks, 0, settings.block_size, settings.double_quant).values()
        ),
        **{
            name: -(-getattr(whole, name) // ranks)
            for name in ("dense", "adapters", "gradients", "optimizer")
        },
    )
    layer = sum(packed_bytes(n * k, settings) for n, k in shape.linears.values())
    layer += shape.layer_extras * settings.dense_item + whole.adapters // shape.layers
    root = shape.root_parameters * settings.dense_item
    # A layer's gradients are whole until they are reduced.
    gathered = _UNITS_GATHERED * (layer + whole.gradients // shape.layers) + root
    received = (2 * shape.layers * layer + root) * share
    return RankPlan(
        mine, ranks, strategy, gathered, round(received), round(whole.gradients * share)
    )  # fmt: skip


def scaling_table() -> str:
    """The table of docs/scaling.md, in Markdown; a test holds the page to it."""
    device = DEVICES[TABLE_DEVICE]
    lines = [
        "| model | GPUs | FSDP2: GB a GPU | smallest card | received a step, GB | ms for these "
        "bytes | ms for the products | DDP: GB a GPU | DDP: received a step, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in TABLE_MODELS:
        for ranks in TABLE_RANKS:
            fsdp = rank_plan(SHAPES[name], TABLE_SETTINGS, ranks)
            ddp = rank_plan(SHAPES[name], TABLE_SETTINGS, ranks, "ddp")
            cards = [c for c in _CARDS if fsdp.peak <= DEVICES[c].memory]
            lines.append(
                f"| {name} | {ranks} | {fsdp.peak / 1e9:.1f} | {cards[0] if cards else 'none'} "
                f"| {fsdp.received / 1e9:.2f} | {1e3 * fsdp.communication_s(device):.0f} "
                f"| {1e3 * fsdp.compute_s(device):.0f} | {ddp.peak / 1e9:.1f} "
                f"| {ddp.received / 1e9:.2f} |"
            )
    return "\n".join(lines) + "\n"
