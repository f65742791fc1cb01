"""The compiled core. Tensors are contiguous, those of a call on one device, the CPU or CUDA; errors
are `Error`, a ValueError. `stream` is the address of a CUDA stream, 0 on the CPU.

A packed weight is (packed, absmax, nested_absmax, offset, codebook, levels, nested_map,
block_size), as `NF4Weight.op_args()` returns it.
"""

from array import array
from collections.abc import Sequence
from enum import Enum

from torch import Tensor, dtype

PackedWeight = Sequence[Tensor | str | int | None]
Groups = Sequence[tuple[float, float, float, float, float, bool]]
VariantRow = tuple[str, str, bool]  # name, why not ("" when usable), chosen

__version__: str

class Error(ValueError): ...

class DType(Enum):
    float32 = ...
    bfloat16 = ...
    float16 = ...
    uint8 = ...
    int64 = ...

    def __int__(self) -> int: ...

class Arena:
    """Pageable memory of one CUDA device, a writable buffer. Freed once the device is done with it.

    `kind`: "managed", "pinned", or "auto" for managed where the device can fault pages in.
    """

    def __init__(self, bytes: int, device: int, kind: str = "auto") -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def address(self) -> int: ...
    def __buffer__(self, flags: int) -> memoryview: ...

# (arena, begin, end, first row, rows): the rows' state lies in these bytes of the arena.
PageRow = tuple[Arena | None, int, int, int, int]

class AdamW8State(Enum):
    float32 = ...
    moments = ...
    ratio = ...

    def __int__(self) -> int: ...

adamw8_columns: tuple[str, ...]

def register_dtypes(dtypes: tuple[dtype, ...]) -> None: ...
def cpu_features() -> dict[str, bool]: ...
def cuda_why_not() -> str: ...
def cuda_devices() -> list[str]: ...
def cuda_variants(op: str, device: int) -> list[VariantRow]: ...
def forced_variant(op: str) -> str: ...
def advise_huge_pages(memory: Tensor) -> None: ...
def codebook_levels(name: str) -> list[float]: ...
def signed_dynamic_map() -> list[float]: ...
def quantize_4bit(
    weight: Tensor,
    codebook: str,
    block_size: int,
    packed: Tensor,
    absmax: Tensor,
    threads: int,
    stream: int = 0,
) -> None: ...
def double_quantize(
    absmax: Tensor,
    offset: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    threads: int,
    stream: int = 0,
) -> None: ...
def dequantize_4bit(weight: PackedWeight, out: Tensor, threads: int, stream: int = 0) -> None: ...
def search_scales(
    weight: Tensor, moments: Tensor, codebook: str, block_size: int, scales: Tensor, threads: int
) -> None: ...
def feedback_codes(
    weight: Tensor,
    scales: Tensor,
    coefficients: Tensor,
    order: Tensor,
    triangular: bool,
    codebook: str,
    block_size: int,
    errors: Tensor,
    codes: Tensor,
    threads: int,
) -> None: ...
def lora_linear_forward(
    x: Tensor,
    weight: PackedWeight,
    out_features: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    y: Tensor,
    t: Tensor | None,
    threads: int,
    stream: int = 0,
    workspace: Tensor | None = None,
) -> None: ...
def lora_linear_forward_workspace(
    x: Tensor,
    weight: PackedWeight,
    out_features: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    y: Tensor,
    t: Tensor | None,
    threads: int,
    stream: int = 0,
    workspace: Tensor | None = None,
) -> int: ...
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: PackedWeight,
    in_features: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    dx: Tensor | None,
    d_lora_a: Tensor | None,
    d_lora_b: Tensor | None,
    d_bias: Tensor | None,
    threads: int,
    stream: int = 0,
    workspace: Tensor | None = None,
) -> None: ...
def lora_linear_backward_workspace(
    dy: Tensor,
    x: Tensor | None,
    weight: PackedWeight,
    in_features: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    dx: Tensor | None,
    d_lora_a: Tensor | None,
    d_lora_b: Tensor | None,
    d_bias: Tensor | None,
    threads: int,
    stream: int = 0,
    workspace: Tensor | None = None,
) -> int: ...
def adamw8_step(
    table: array[int] | memoryview,
    groups: Groups,
    threads: int,
    device: int = -1,
    stream: int = 0,
    bad: Tensor | None = None,
) -> tuple[int, int]: ...
def adamw8_paged_step(
    table: array[int] | memoryview,
    groups: Groups,
    pages: Sequence[PageRow],
    look_ahead: int,
    evict: bool,
    device: int,
    stream: int,
    bad: Tensor,
) -> None: ...
def peak_gflops(dtype: DType, threads: int) -> float: ...
def quantize_variants() -> list[VariantRow]: ...
def dequantize_variants() -> list[VariantRow]: ...
def lora_linear_variants(dtype: DType) -> list[VariantRow]: ...
def adamw8_variants() -> list[VariantRow]: ...
def search_scales_variants() -> list[VariantRow]: ...
def feedback_codes_variants() -> list[VariantRow]: ...
