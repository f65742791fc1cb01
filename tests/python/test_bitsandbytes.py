"""The number formats against the installed bitsandbytes, where that is right.

Where it is not: its AVX-512 dequantization uses wrong scales when K % 16 == 0 and K is no multiple
of the block size; a short last block is divided by absmax, not multiplied by its reciprocal; the
8-bit codes of double quantization go through a table of 65,536 bins and are not always the nearest.
"""

import json

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

import halfbyte
from formats import BLOCK_SIZES, FLOATS, levels_of, name_of, same_bits, signed_map, thresholds_of
from halfbyte import checkpoint
from halfbyte.nn import NF4Linear

BY_CODEBOOK = pytest.mark.parametrize("codebook", ["nf4", "fp4"])
BY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
STATE = "quant_state.bitsandbytes__"


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its fallbacks; the plain ones are what is compared."""
    with torch.compiler.set_stance("force_eager"):
        yield


def normal(shape, dtype, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales_are_right(columns: int, block: int) -> bool:
    return columns % 16 != 0 or columns % block == 0


def test_the_version_that_the_tests_speak_of():
    assert bitsandbytes.__version__ == "0.50.2"


def test_the_tables_are_theirs():
    assert same_bits(functional.create_dynamic_map(), signed_map())
    for codebook in ("nf4", "fp4"):
        theirs = functional.get_4bit_type(codebook, device="cpu")
        assert torch.equal(theirs, levels_of(codebook)), codebook


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed >> 4, packed & 15), 1).view(-1)


@BY_DTYPE
@BY_CODEBOOK
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_codes_and_scales_are_theirs(block, codebook, dtype):
    for shape in ((3, 4096), (33, 100), (7, 9), (5, 1029), (40, 96), (1, 1)):
        weight = normal(shape, dtype, block)
        packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=codebook)
        ours = halfbyte.quantize_4bit(weight, codebook, block, double_quant=False)
        assert same_bits(ours.absmax, state.absmax), shape
        full = weight.numel() // block * block
        differs = codes_of(ours.packed) != codes_of(packed.view(-1))
        assert not differs[:full].any(), shape
        # In a short last block, only where the last bit of the division decides.
        tail = weight.view(-1)[full:].double() / state.absmax[-1].double()
        margin = (tail[:, None] - thresholds_of(codebook).double()).abs().amin(1)
        assert bool((margin[differs[full : weight.numel()]] <= 2.0**-23).all()), shape


@BY_DTYPE
@BY_CODEBOOK
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_dense_values_are_theirs(block, codebook, dtype):
    compared = 0
    for shape in ((3, 4096), (33, 100), (7, 9), (5, 1029), (40, 96)):
        if not scales_are_right(shape[1], block):
            continue
        weight = normal(shape, dtype, block)
        packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=codebook)
        ours = halfbyte.NF4Weight(
            packed.view(-1), state.absmax, weight.shape, dtype, block, codebook
        )
        # fp4 has two zeros, and theirs may be negative: equal values, not equal bits.
        assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state)), shape
        compared += 1
    assert compared >= 4


@BY_DTYPE
@pytest.mark.parametrize("shape", [(64, 64), (100, 640), (333, 1024), (1, 64)], ids=str)
def test_the_offset_of_double_quantization_is_theirs(shape, dtype):
    weight = normal(shape, dtype, 3)
    _, state = functional.quantize_nf4(weight, compress_statistics=True)
    ours = halfbyte.quantize_nf4(weight)
    assert same_bits(ours.offset.reshape(()), state.offset)
    assert same_bits(ours.nested_absmax, state.state2.absmax)
    if not ours.nested_absmax.count_nonzero():
        return  # every scale is the offset: any code decodes to it (theirs is 0 / 0)
    distance = (ours.absmax.int() - state.absmax.int()).abs()
    assert int(distance.max()) <= 1  # a neighbour, where theirs is not the nearest


def our_entries(weight) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    entries = {key: t.clone() for key, t in checkpoint.to_entries(weight, "weight").items()}
    packed = entries.pop("weight")
    return packed, {key.removeprefix("weight."): value for key, value in entries.items()}


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@BY_DTYPE
@BY_CODEBOOK
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_ours_load_there(block, codebook, dtype, double_quant):
    weight = halfbyte.quantize_4bit(normal((24, 4096), dtype), codebook, block, double_quant)
    packed, statistics = our_entries(weight)
    theirs = Params4bit.from_prequantized(packed, statistics, device="cpu")
    assert theirs.quant_state.nested == double_quant and theirs.quant_type == codebook
    assert theirs.quant_state.shape == weight.shape and theirs.quant_state.dtype == dtype
    dense = functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, weight.dequantize())


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@BY_DTYPE
@BY_CODEBOOK
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_theirs_load_here(block, codebook, dtype, double_quant):
    weight = normal((24, 4096), dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type=codebook, compress_statistics=double_quant
    )
    entries = {f"P.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = checkpoint.from_entries({"P.weight": packed, **entries}, "P.weight")
    assert ours.double_quant == double_quant
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))
    again = checkpoint.to_entries(ours, "P.weight")
    assert set(again) == {"P.weight", *entries}
    for key, value in entries.items():
        if STATE in key:
            mine, their = (json.loads(bytes(t.tolist())) for t in (again[key], value))
            assert mine == their
        else:
            assert same_bits(again[key], value), key


def their_layer(linear: nn.Linear, codebook="nf4", double_quant=True, **options) -> Linear4bit:
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=double_quant,
        quant_type=codebook,
        **options,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@BY_CODEBOOK
def test_state_dicts_of_layers_in_both_directions(codebook, double_quant):
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    theirs = their_layer(linear, codebook, double_quant)
    ours = NF4Linear.from_linear(nn.Linear(128, 48), 64, not double_quant)
    assert set(theirs.state_dict()) == set(
        NF4Linear.from_linear(linear, 64, double_quant, codebook).state_dict()
    )
    ours.load_state_dict(theirs.state_dict())
    dense = functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize(), dense)
    assert torch.equal(ours.bias, theirs.bias)
    x = torch.randn(5, 128)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    packed, statistics = our_entries(ours.nf4_weight)
    back = Params4bit.from_prequantized(packed, statistics, device="cpu")
    assert torch.equal(functional.dequantize_4bit(back.data, back.quant_state), dense)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=name_of)
def test_other_storage_dtypes_load(storage):
    """bnb_4bit_quant_storage: the same bytes in a container of another dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    theirs = their_layer(linear, quant_storage=storage)
    assert theirs.weight.dtype == storage
    ours = NF4Linear.from_linear(nn.Linear(128, 48))
    ours.load_state_dict(theirs.state_dict())
    plain = NF4Linear.from_linear(nn.Linear(128, 48))
    plain.load_state_dict(their_layer(linear).state_dict())
    assert torch.equal(ours.dequantize(), plain.dequantize())
    assert ours.weight.dtype == torch.uint8
