"""Bytes of one training process on one device, by category, and their peak.

    peak = weights + adapters + gradients + optimizer state + activations
           + max(logits and loss, one layer's backward) + runtime

M tokens in a batch, s bytes of the compute dtype; H, I, V, q = heads d, kv = kv_heads d as in
`shapes`. What a layer keeps for backward, a token, with one fused LoRA node a linear layer:

    gate, up, silu(gate), their product    4 I s     the product is down's x; T below is fp32
    two norms, their fp32 input            2 H 4
    two normed inputs                      2 H s     x of q, k, v and of gate, up: saved once each
    attention: q, k, v, output             (2 q + 2 kv) s, and 4 bytes a head of log-sum-exp
    T = x A^T                              4 R a target

With checkpointing a layer keeps its input, H s, and one layer at a time is recomputed. Gradients
count in full beside activations: under accumulation they are there during the next forward pass.
Attention is torch's flash kernel: no [M, M] matrix. Loss:

    full     fp32 log-probabilities and two gradients of their size: 12 V M
    tiled    TRL's fused head: tiles of at most 4096 positions by 32768 words, s bytes an element,
             and 29 more on the CPU, where each tile goes through temporaries in fp32

Measured on a CPU, with freed blocks given back (`heap="returned"`): within a few percent of what a
step adds. Estimated, not derived: what else the runtime holds (the constants below).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from halfbyte.memory_plan.shapes import Shape
from halfbyte.ops.adamw8 import state_layout
from halfbyte.ops.lora_linear import PANEL_BYTES, PANEL_ROWS
from halfbyte.ops.nf4 import weight_bytes

METHODS = ("qlora", "lora", "full")
OPTIMIZERS = ("adamw8bit", "adamw32", "paged-adamw8bit", "paged-adamw32")
LOSSES = ("full", "tiled")
HEAPS = ("kept", "returned")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
CATEGORIES = (
    "4-bit weights",
    "dense weights",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "loss or one layer",
    "runtime",
)
MIN_8BIT_SIZE = 4096  # elements from which AdamW8bit keeps a tensor's state in 8 bits
_TILE = (4096, 32768)  # TRL: positions, words


# Estimates of what the runtime holds, in bytes.
LIBRARIES = (
    440_000_000  # Python, torch, transformers, PEFT after a first step: measured, torch 2.13
)
LAYER_OBJECTS = 33_000  # Python objects of an adapted linear layer: measured
CUDA_CONTEXT = 500_000_000  # with its libraries' workspaces: 0.3 to 0.6 GB on current drivers
# glibc before 2.38 cannot hand a freed block to an aligned request of the same size: what its heap
# keeps: a constant, a part for each adapted layer, a share of what a step allocates. Fitted to
# measured processes of 30 to 135 M parameters
HEAP_KEPT = (40_000_000, 200_000, 0.2)
HEAP_LIMIT = 32 << 20  # larger blocks are mappings of their own, which go back when freed
CUDA_CACHED = 0.05  # share of a step that torch's CUDA allocator holds in blocks of other sizes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, and how; the defaults are those of `halfbyte finetune`.

    targets: names of the layers with an adapter, empty: all linear layers but the head. adapter,
    gradient: bytes a trainable parameter (PEFT keeps adapters of a 4-bit base in fp32); with
    method "full", of the dtype's size. dense: bytes of an element that is not packed, None: the
    dtype's. heap: whether the CPU's allocator keeps freed blocks or returns them to the system.
    Raises ValueError naming the setting, what was expected and what came.
    """

    method: str = "qlora"
    sequence: int = 512
    batch: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ()
    block_size: int = 64
    double_quant: bool = True
    dtype: str = "bf16"
    checkpointing: bool = False
    optimizer: str = "adamw8bit"
    loss: str = "tiled"
    adapter: int = 4
    dense: int | None = None
    heap: str = "kept"

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("dtype", tuple(DTYPES)),
            ("optimizer", OPTIMIZERS),
            ("loss", LOSSES),
            ("heap", HEAPS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("sequence", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        size = self.block_size
        if not 32 <= size <= 4096 or size & (size - 1):
            raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {size}")

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def item(self) -> int:
        """Bytes of the compute dtype."""
        return DTYPES[self.dtype]

    @property
    def dense_item(self) -> int:
        return self.dense or self.item

    @property
    def trainable_item(self) -> int:
        return self.item if self.method == "full" else self.adapter

    @property
    def paged(self) -> bool:
        return self.optimizer.startswith("paged-")

    def adapted(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """(N, K) of the layers of `shape` that get an adapter. Raises ValueError on other names."""
        known = shape.linears
        if unknown := [name for name in self.targets if name not in known]:
            raise ValueError(f"targets: expected some of {', '.join(known)}, got {unknown[0]!r}")
        return {name: known[name] for name in self.targets or known}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one process; `device` is "cpu" or "cuda". `loss` and `layer` (backward of one layer,
    recomputed activations included) follow each other: the larger one counts."""

    shape: Shape
    settings: Settings
    device: str
    packed: int
    dense: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    layer: int
    runtime: int

    @property
    def categories(self) -> dict[str, int]:
        """Bytes by CATEGORIES; they add up to `peak`."""
        parts = (
            self.packed,
            self.dense,
            self.adapters,
            self.gradients,
            self.optimizer,
            self.activations,
            max(self.loss, self.layer),
            self.runtime,
        )
        return dict(zip(CATEGORIES, parts, strict=True))

    @property
    def peak(self) -> int:
        return sum(self.categories.values())

    @property
    def pageable(self) -> int:
        """Bytes that the system may move out of the way: the state of a paged optimizer."""
        return self.optimizer if self.settings.paged else 0

    @property
    def bits_per_parameter(self) -> float:
        """Of the packed layers."""
        return 8 * self.packed / self.shape.linear_parameters

    def fits(self, capacity: int) -> str:
        """ "yes", "paged" (with optimizer state moved to the host at the peak) or "no"."""
        if self.peak <= capacity:
            return "yes"
        return "paged" if self.peak - self.pageable <= capacity else "no"


def plan(
    shape: Shape,
    settings: Settings | None = None,
    device: str = "cpu",
    baseline: int | None = None,
) -> Plan:
    """The plan of one process that holds the whole model.

    `baseline`: bytes that the process holds before the model, measured; None: an
    estimate. Raises ValueError for a target that is no linear layer.
    """
    settings = settings or Settings()
    trained = trainable_tensors(shape, settings)
    count = sum(n * times for n, times in trained)
    full = settings.method == "full"
    packed = 0
    dense = shape.dense_parameters * settings.dense_item
    if settings.method == "qlora":
        packed = shape.layers * sum(
            packed_bytes(n * k, settings) for n, k in shape.linears.values()
        )
    else:
        dense += shape.linear_parameters * settings.dense_item
    layer = layer_activations(shape, settings)
    kept = shape.layers * layer
    working = backward_transient(shape, settings)
    if settings.checkpointing:
        kept = shape.layers * settings.tokens * shape.hidden * settings.item
        working += layer
    made = Plan(
        shape, settings, device, packed, dense,
        0 if full else count * settings.trainable_item, count * settings.trainable_item,
        sum(times * state_bytes(n, settings.optimizer) for n, times in trained),
        kept, loss_bytes(shape, settings, device), working, 0,
    )  # fmt: skip
    return dataclasses.replace(made, runtime=_runtime(made, baseline))


def packed_bytes(count: int, settings: Settings) -> int:
    """Bytes of a packed weight of `count` elements."""
    return weight_bytes(count, settings.block_size, settings.double_quant)


def trainable_tensors(shape: Shape, settings: Settings) -> list[tuple[int, int]]:
    """(elements, how many) of the tensors that train."""
    if settings.method != "full":
        adapted = settings.adapted(shape).values()
        return [(settings.rank * size, shape.layers) for pair in adapted for size in pair]
    linear = [(n * k, shape.layers) for n, k in shape.linears.values()]
    ends = [(shape.vocab * shape.hidden, 1 if shape.tied else 2), (shape.hidden, 1)]
    return [*linear, (shape.layer_extras, shape.layers), *ends]


def state_bytes(count: int, optimizer: str) -> int:
    """Bytes of AdamW's state of a tensor of `count` elements."""
    coded = optimizer.endswith("8bit") and count >= MIN_8BIT_SIZE
    layout = state_layout(torch.Size([count]), "ratio" if coded else "float32")
    return sum(dtype.itemsize * size.numel() for dtype, size in layout.values())


def layer_activations(shape: Shape, settings: Settings) -> int:
    """Bytes that a layer keeps for its backward pass (see the module's docstring)."""
    s, adapted = settings.item, settings.adapted(shape)
    full = settings.method == "full"
    a_token = 4 * shape.intermediate * s + 2 * 4 * shape.hidden + 2 * 4  # and rsqrt, fp32
    a_token += (2 * shape.query + 2 * shape.key_value) * s + 4 * shape.heads
    for readers in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if full or any(name in adapted for name in readers):
            a_token += shape.hidden * s
    if not full:
        a_token += 4 * settings.rank * len(adapted)
    if settings.method == "lora" and settings.adapter > s:
        a_token += sum(k * settings.adapter for _, k in adapted.values())  # PEFT: x as A's dtype
    return settings.tokens * a_token


def backward_transient(shape: Shape, settings: Settings) -> int:
    """Gradients of activations that are alive at once inside a layer: in the MLP."""
    a_token = 3 * shape.intermediate * settings.item + 2 * 4 * shape.hidden
    return settings.tokens * a_token


def loss_bytes(shape: Shape, settings: Settings, device: str) -> int:
    """From the head's product to the gradient of its input."""
    if settings.loss == "full":
        return 12 * settings.tokens * shape.vocab
    elements = math.prod(map(min, (settings.tokens, shape.vocab), _TILE))
    return elements * (settings.item + (29 if device == "cpu" else 0))


def _runtime(made: Plan, baseline: int | None) -> int:
    settings = made.settings
    step = made.gradients + made.optimizer + made.activations + max(made.loss, made.layer)
    if made.device == "cuda":
        held = CUDA_CONTEXT if baseline is None else baseline
        panel = PANEL_BYTES if settings.method == "qlora" and settings.tokens >= PANEL_ROWS else 0
        return held + panel + round(CUDA_CACHED * (step - made.optimizer))
    held = LIBRARIES if baseline is None else baseline
    layers = made.shape.layers * len(settings.adapted(made.shape))
    held += LAYER_OBJECTS * layers
    if settings.heap == "returned":
        return held
    constant, a_layer, share = HEAP_KEPT
    block = settings.tokens * made.shape.intermediate * settings.item
    held += constant + a_layer * layers
    return held + (round(share * step) if block <= HEAP_LIMIT else 0)
