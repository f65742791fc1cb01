"""Tables, awkward tensors and variant lists that several test files share.

Tables come from the one place that holds them: levels from the compiled module, thresholds as their
fp32 midpoints, ranks from the C++ header.
"""

import re
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte._native import _C

ROOT = Path(__file__).resolve().parents[2]
CODEBOOKS = ("nf4", "fp4", "int4")
BLOCK_SIZES = tuple(2**i for i in range(5, 13))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def variant_params(*ops: str) -> list:
    """Every variant of `ops`, by name; one that cannot run here is skipped with its own sentence.

    For `parametrize("variant", variant_params(op), indirect=True)`: a variant that is added to a
    table is tested with no edit.
    """
    why_not: dict[str, str] = {}
    for op in ops:
        for row in halfbyte.variants()[op]:
            if why_not.get(row["name"]) != "":
                why_not[row["name"]] = row["why_not"]
    return [
        pytest.param(name, id=name, marks=[pytest.mark.skip(f"{name}: {why}")] if why else [])
        for name, why in why_not.items()
    ]


def levels_of(codebook: str) -> torch.Tensor:
    return torch.tensor(_C.codebook_levels(codebook), dtype=torch.float32)


def thresholds_of(codebook: str) -> torch.Tensor:
    """fp32 midpoints of neighbouring levels."""
    ascending = levels_of(codebook).sort().values
    return (ascending[1:] + ascending[:-1]) / 2


def ranks_of(codebook: str) -> torch.Tensor:
    """code_of_rank, from the header: the code of the i-th smallest level."""
    text = (ROOT / "cpp/include/halfbyte/codebook.h").read_text()
    entry = text[text.index(f'{{"{codebook}",') :]
    lists = re.findall(r"\{([0-9, ]+)\}", entry)
    ranks = [int(code) for code in lists[0].split(",")]
    assert len(ranks) == 16
    return torch.tensor(ranks)


def zero_code_of(codebook: str) -> int:
    """The code of x == 0."""
    return int(ranks_of(codebook)[int((thresholds_of(codebook) < 0).sum())])


def signed_map() -> torch.Tensor:
    return torch.tensor(_C.signed_dynamic_map(), dtype=torch.float32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; -0 differs from 0, a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def rough(shape, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values over many scales, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp2(torch.randint(-12, 3, tuple(shape), generator=generator))
    zero = torch.rand(tuple(shape), generator=generator)
    values = torch.where(zero < 0.05, 0.0, values)
    values = torch.where(zero > 0.97, -0.0, values)
    return values.to(dtype)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def bitsandbytes_values(weight) -> torch.Tensor:
    """What a `Params4bit` of bitsandbytes means, by its format: its own kernels for processors with
    AVX-512 take wrong scales where rows are not whole blocks."""
    state, flat = weight.quant_state, weight.data.view(torch.uint8).flatten()
    codes = torch.stack((flat >> 4, flat & 15), 1).flatten().int()
    absmax = state.absmax
    if state.nested:
        second = state.state2
        outer = second.absmax.repeat_interleave(second.blocksize)[: len(absmax)]
        absmax = second.code[absmax.int()] * outer + state.offset
    count = state.shape.numel()
    scales = absmax.repeat_interleave(state.blocksize)[:count]
    return (state.code[codes[:count]] * scales).view(state.shape).to(state.dtype)
