"""The golden file made by bitsandbytes (see tests/golden): needs no bitsandbytes to check."""

import pytest
import torch
from safetensors import safe_open

import halfbyte
from formats import ROOT, same_bits
from halfbyte import checkpoint

FILE = ROOT / "tests/golden/bitsandbytes.safetensors"


def _tensors() -> dict[str, torch.Tensor]:
    with safe_open(FILE, "pt") as file:
        assert file.metadata() == {"made_by": "bitsandbytes 0.50.2, CPU"}
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


GOLDEN = _tensors()
CASES = sorted({key.split(".")[0] for key in GOLDEN})


def test_there_are_cases_of_every_kind():
    assert {case.split("_")[0] for case in CASES} == {"nf4", "fp4"}
    assert any(f"{case}.weight.nested_absmax" in GOLDEN for case in CASES)
    assert any(f"{case}.weight.nested_absmax" not in GOLDEN for case in CASES)


@pytest.mark.parametrize("case", CASES)
def test_golden_weights_load_and_dequantize(case):
    weight = checkpoint.from_entries(GOLDEN, f"{case}.weight")
    # Values, not bits: fp4 has a negative zero there.
    assert torch.equal(weight.dequantize(), GOLDEN[f"{case}.dequantized"])
    assert weight.dtype == GOLDEN[f"{case}.dense"].dtype
    assert weight.levels is None and weight.nested_map is None  # their tables are the standard ones


@pytest.mark.parametrize("case", CASES)
def test_quantizing_gives_the_golden_bytes(case):
    weight = checkpoint.from_entries(GOLDEN, f"{case}.weight")
    ours = halfbyte.quantize_4bit(
        GOLDEN[f"{case}.dense"], weight.codebook, weight.block_size, weight.double_quant
    )
    assert torch.equal(ours.packed, weight.packed)
    if not weight.double_quant:
        assert same_bits(ours.absmax, weight.absmax)
        return
    assert same_bits(ours.offset, weight.offset)
    assert same_bits(ours.nested_absmax, weight.nested_absmax)
    # Theirs come from a table of 65,536 bins and may be a neighbour of the nearest code.
    assert int((ours.absmax.int() - weight.absmax.int()).abs().max()) <= 1
