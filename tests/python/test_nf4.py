"""Quantize, double quantize and dequantize: every variant bit-equal to the torch oracle."""

import dataclasses
import hashlib
import math

import pytest
import torch

import halfbyte
from formats import (
    BLOCK_SIZES,
    CODEBOOKS,
    FLOATS,
    levels_of,
    name_of,
    ranks_of,
    rough,
    same_bits,
    signed_map,
    thresholds_of,
    variant_params,
    zero_code_of,
)
from halfbyte import reference
from halfbyte._native import _C

QUANTIZE = variant_params("quantize_4bit")
DEQUANTIZE = variant_params("dequantize_4bit")
BY_CODEBOOK = pytest.mark.parametrize("codebook", CODEBOOKS)
BY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)

# sha256 of little-endian fp32 bytes, from the format's specification.
NF4_LEVELS = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
NF4_THRESHOLDS = "7cbff57806c8b116153fa1c7d72b341d99bebec9b393b8d3bdcd5a4125500e9a"
SIGNED_MAP = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"

# Mean absolute error of NF4 on standard normal data, by block size (the format's specification).
NF4_ERROR = {
    32: 0.06775,
    64: 0.07280,
    128: 0.07683,
    256: 0.08034,
    512: 0.08355,
    1024: 0.08661,
    2048: 0.08959,
    4096: 0.09255,
}


def _shapes(block: int) -> list[tuple[int, ...]]:
    """1, odd, one off a block, rows shorter than a block, rows that straddle blocks, empty."""
    return [
        (1,),
        (3,),
        (block - 1,),
        (block,),
        (block + 1,),
        (2 * block + 5,),
        (5, 7),
        (3, block - 1),
        (3, block + 1),
        (2, 3, 37),
        (0,),
        (0, 5),
        (3, 0),
    ]


def _expected(weight: torch.Tensor, codebook: str, block: int):
    return reference.quantize(weight, thresholds_of(codebook), ranks_of(codebook), block)


def _check_quantize(weight: torch.Tensor, codebook: str, block: int) -> None:
    got = halfbyte.quantize_4bit(weight, codebook, block, double_quant=False)
    packed, absmax = _expected(weight, codebook, block)
    what = f"{codebook} {weight.dtype} {list(weight.shape)} block {block}"
    assert got.shape == weight.shape and got.dtype == weight.dtype, what
    assert same_bits(got.absmax, absmax), what
    assert same_bits(got.packed, packed), what


@BY_DTYPE
@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_codes_and_absmax_equal_the_reference(variant, codebook, dtype):
    for block in BLOCK_SIZES:
        for seed, shape in enumerate(_shapes(block)):
            _check_quantize(rough(shape, seed, dtype), codebook, block)


@BY_DTYPE
@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_strided_and_unaligned_weights(variant, codebook, dtype):
    for block in (32, 64, 256):
        for offset in (1, 3, 7):
            _check_quantize(rough((1000,), offset, dtype)[offset:], codebook, block)
        matrix = rough((37, 90), 5, dtype)
        _check_quantize(matrix.t(), codebook, block)
        _check_quantize(matrix[:, ::2], codebook, block)
        _check_quantize(matrix[1:, 1:], codebook, block)
        _check_quantize(matrix[:1].expand(9, 90), codebook, block)


@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_any_finite_bit_pattern(variant, codebook):
    """Random fp32 bits: every exponent, subnormals, absmax up to the largest float."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (8_000,), generator=generator).to(torch.int32)
    weight = bits.view(torch.float32)
    weight = torch.where(weight.isfinite(), weight, 0.0)
    shrink = torch.exp2(torch.randint(-149, 1, (250, 1), generator=generator).float())
    for block in (32, 128):
        _check_quantize(weight, codebook, block)
        _check_quantize((weight.view(250, 32) * shrink).view(-1), codebook, block)
    for dtype in (torch.bfloat16, torch.float16):
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        halves = halves[halves.isfinite()]
        _check_quantize(halves, codebook, 32)
        _check_quantize(halves[torch.randperm(len(halves), generator=generator)], codebook, 64)


@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_a_tie_goes_down(variant, codebook):
    """At each threshold, one ulp below it and one above: rank i, i, i + 1."""
    ranks = ranks_of(codebook)
    thresholds = thresholds_of(codebook)
    beyond = int((thresholds <= -1).sum())  # |x| <= 1: int4's lowest code is never reached
    thresholds = thresholds[beyond:]
    infinity = torch.tensor(math.inf)
    x = torch.stack(
        (thresholds, torch.nextafter(thresholds, -infinity), torch.nextafter(thresholds, infinity)),
        1,
    ).view(-1)
    count = len(thresholds)
    above = torch.tensor([0, 0, 1]).repeat(count)
    expected = ranks[torch.arange(beyond, 15).repeat_interleave(3) + above]
    for scale in (1.0, 2.0**40, 2.0**90):  # powers of two: x = w / absmax is exact
        weight = torch.cat((torch.ones(1), x, torch.zeros(63 - len(x)))) * scale
        packed = halfbyte.quantize_4bit(weight, codebook, 64, double_quant=False).packed
        codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)
        assert torch.equal(codes[1 : 1 + len(x)].long(), expected), f"scale {scale}"


@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_zeros_have_scale_zero_and_the_code_of_zero(variant, codebook):
    zero = zero_code_of(codebook)
    for weight in (torch.zeros(200), -torch.zeros(200)):
        got = halfbyte.quantize_4bit(weight, codebook, 64, double_quant=False)
        assert same_bits(got.absmax, torch.zeros(4))
        assert torch.equal(got.packed, torch.full((100,), zero << 4 | zero, dtype=torch.uint8))
        assert torch.equal(got.dequantize(), torch.zeros(200))
    mixed = torch.cat((torch.zeros(64), torch.randn(64), -torch.zeros(64)))
    _check_quantize(mixed, codebook, 64)


@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_the_pad_nibble_is_the_code_of_zero(variant, codebook):
    for count in (1, 3, 31, 33, 63, 65, 4097):
        weight = torch.rand(count) + 0.5
        packed = halfbyte.quantize_4bit(weight, codebook, 32, double_quant=False).packed
        assert len(packed) == (count + 1) // 2
        assert int(packed[-1]) & 15 == zero_code_of(codebook), count


@BY_CODEBOOK
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_subnormal_scales_keep_their_codes(variant, codebook):
    """1 / absmax overflows: the codes are those of the same block scaled up by 2^100."""
    generator = torch.Generator().manual_seed(11)
    for exponent in (-149, -140, -130, -128, -127):
        steps = torch.randint(-(2**20), 2**20, (256,), generator=generator).float()
        small = (steps.double() * 2.0**exponent / 2.0**20).float()
        if exponent == -149:
            small = torch.sign(steps) * 2.0**-149
        got = halfbyte.quantize_4bit(small, codebook, 64, double_quant=False)
        lifted = halfbyte.quantize_4bit(small * 2.0**100, codebook, 64, double_quant=False)
        assert torch.equal(got.packed, lifted.packed), exponent
        assert same_bits(got.absmax, small.view(-1, 64).abs().amax(1)), exponent
        _check_quantize(small, codebook, 64)


@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_threads_do_not_change_a_bit(variant):
    weight = rough((1 << 18 | 77,), 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = halfbyte.quantize_nf4(weight, 128)
        dense = one.dequantize(torch.bfloat16)
        torch.set_num_threads(2)
        two = halfbyte.quantize_nf4(weight, 128)
        assert same_bits(two.dequantize(torch.bfloat16), dense)
    finally:
        torch.set_num_threads(threads)
    for name, tensor in one.tensors().items():
        assert same_bits(tensor, two.tensors()[name]), name


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 1000])
def test_double_quantized_statistics_equal_the_reference(blocks):
    weight = rough((blocks * 32 - 5,), blocks)
    single = halfbyte.quantize_nf4(weight, 32, double_quant=False)
    double = halfbyte.quantize_nf4(weight, 32)
    offset = single.absmax.mean()
    codes, nested = reference.double_quantize(single.absmax, offset, signed_map())
    assert torch.equal(double.packed, single.packed)
    assert same_bits(double.offset, offset.reshape(1))
    assert same_bits(double.absmax, codes)
    assert same_bits(double.nested_absmax, nested)
    scales = reference.scales(codes, nested, offset, signed_map())
    expected = reference.dequantize(
        double.packed, scales, levels_of("nf4"), 32, weight.shape, torch.float32
    )
    assert same_bits(double.dequantize(), expected)


@pytest.mark.parametrize("size", [2.0**-149, 2.0**-140, 2.0**-126, 1e-30, 1e30])
def test_double_quantization_at_the_ends_of_the_range(size):
    """Nearest code of (absmax - offset) / nested_absmax, also where that reciprocal overflows."""
    absmax = torch.arange(1, 400).float() * size
    offset = absmax.mean().reshape(1)
    codes, nested = torch.ops.halfbyte.double_quantize(absmax, offset)
    expected = reference.double_quantize(absmax, offset, signed_map())
    assert torch.equal(codes, expected[0]) and same_bits(nested, expected[1])
    difference = (absmax - offset).double()
    for first in (0, 256):
        part = difference[first : first + 256]
        largest = part.abs().max()
        assert float(nested[first // 256]) == float(largest)
        decoded = signed_map()[codes[first : first + 256].long()].double() * largest
        best = (part[:, None] - signed_map().double() * largest).abs().amin(1)
        # fp32 rounding of the reciprocal and the product moves x by less than 2^-22
        assert bool(((part - decoded).abs() <= best + largest * 2.0**-22).all())
    equal = torch.full((300,), size)
    codes, nested = torch.ops.halfbyte.double_quantize(equal, equal[:1].clone())
    assert int(codes.min()) == int(codes.max()) == 127 and float(nested.max()) == 0


def test_double_quantization_maps_every_code_to_itself():
    """x = map[code] * 2 comes back as the same code: 0 as 127, 1 as 255."""
    values = signed_map()
    codes, nested = torch.ops.halfbyte.double_quantize(values * 2, torch.zeros(1))
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    assert nested.tolist() == [2.0]


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@BY_CODEBOOK
@pytest.mark.parametrize("variant", DEQUANTIZE, indirect=True)
def test_dequantize_equals_the_reference(variant, codebook, double_quant):
    for block in BLOCK_SIZES:
        for seed, shape in enumerate(_shapes(block)):
            weight = halfbyte.quantize_4bit(rough(shape, seed), codebook, block, double_quant)
            _check_dequantize(weight)


def _check_dequantize(weight, levels=None, nested_map=None) -> None:
    scales = reference.scales(
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        signed_map() if nested_map is None else nested_map,
    )
    levels = levels_of(weight.codebook) if levels is None else levels
    for dtype in FLOATS:
        expected = reference.dequantize(
            weight.packed, scales, levels, weight.block_size, weight.shape, dtype
        )
        assert same_bits(weight.dequantize(dtype), expected), f"{weight} {dtype}"


@pytest.mark.parametrize("variant", DEQUANTIZE, indirect=True)
def test_dequantize_rounds_to_nearest_even_at_every_exponent(variant):
    """Scales from 2^-149 to 2^127: subnormal and overflowing bfloat16 and float16 among them."""
    generator = torch.Generator().manual_seed(0)
    absmax = torch.exp2(torch.arange(-149, 128).double()).float()
    absmax *= 1 + torch.rand(absmax.shape, generator=generator) * (absmax < 2.0**127)
    count = 64 * len(absmax)
    packed = torch.randint(0, 256, (count // 2,), generator=generator, dtype=torch.uint8)
    weight = halfbyte.NF4Weight(packed, absmax, torch.Size([count]), torch.float32)
    _check_dequantize(weight)
    _check_dequantize(dataclasses.replace(weight, codebook="int4"))


@pytest.mark.parametrize("variant", DEQUANTIZE, indirect=True)
def test_stored_tables_are_honoured(variant):
    generator = torch.Generator().manual_seed(1)
    levels = torch.randn(16, generator=generator)
    nested_map = torch.randn(256, generator=generator)
    weight = halfbyte.quantize_nf4(rough((70, 33), 2), 32)
    _check_dequantize(dataclasses.replace(weight, levels=levels), levels)
    _check_dequantize(dataclasses.replace(weight, nested_map=nested_map), None, nested_map)
    both = dataclasses.replace(weight, levels=levels, nested_map=nested_map)
    _check_dequantize(both, levels, nested_map)
    dense = both.dequantize()
    bits = {
        name: getattr(both, name).view(torch.int32)
        for name in ("nested_absmax", "offset", "levels", "nested_map")
    }
    assert same_bits(dataclasses.replace(both, **bits).dequantize(), dense)


@pytest.mark.parametrize("variant", DEQUANTIZE, indirect=True)
def test_dequantize_from_unaligned_bytes(variant):
    weight = halfbyte.quantize_nf4(rough((501,), 2), 32, double_quant=False)
    for shift in (1, 2, 3, 5):
        packed = torch.zeros(251 + shift, dtype=torch.uint8)
        packed[shift:] = weight.packed
        absmax = torch.zeros(16 + shift)
        absmax[shift:] = weight.absmax
        _check_dequantize(dataclasses.replace(weight, packed=packed[shift:], absmax=absmax[shift:]))


def test_levels_and_maps_are_the_specification():
    def sha256(values: torch.Tensor) -> str:
        return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()

    assert sha256(levels_of("nf4")) == NF4_LEVELS
    assert sha256(thresholds_of("nf4")) == NF4_THRESHOLDS
    assert sha256(signed_map()) == SIGNED_MAP


def test_code_books_are_consistent():
    for codebook in CODEBOOKS:
        ordered = levels_of(codebook)[ranks_of(codebook)]
        assert bool((ordered[1:] >= ordered[:-1]).all()), codebook
        assert sorted(ranks_of(codebook).tolist()) == list(range(16)), codebook
    assert levels_of("int4").mul(7).round().tolist() == list(range(-8, 8))
    twelfths = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.allclose(levels_of("fp4")[:8] * 12, torch.tensor(twelfths), rtol=1e-6)
    assert torch.equal(levels_of("fp4")[8:].abs(), levels_of("fp4")[:8])


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_nf4_error_on_normal_data(block):
    weight = torch.randn(1 << 22, generator=torch.Generator().manual_seed(block))
    dense = halfbyte.quantize_nf4(weight, block, double_quant=False).dequantize()
    assert float((dense - weight).abs().mean()) == pytest.approx(NF4_ERROR[block], rel=0.01)


def test_bits_per_parameter():
    weight = torch.randn(1024, 1024)
    double = halfbyte.quantize_nf4(weight)
    offset_bits = 32 / weight.numel()
    assert double.bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + offset_bits)
    assert round(double.bits_per_parameter, 3) == 4.127
    assert halfbyte.quantize_nf4(weight, double_quant=False).bits_per_parameter == 4.5
    assert double.nbytes == sum(t.numel() * t.element_size() for t in double.tensors().values())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@BY_DTYPE
@pytest.mark.parametrize("variant", QUANTIZE, indirect=True)
def test_a_value_that_is_not_finite_is_named_with_its_index(variant, dtype, bad):
    for count, index in ((1, 0), (65, 64), (100, 37), (200_001, 131_072), (200_001, 200_000)):
        weight = rough((count,), 1, dtype)
        weight[index] = bad
        weight[min(index + 1, count - 1)] = bad
        with pytest.raises(ValueError, match=rf"weight: .*{bad}.* index {index} of .*\[{count}\]"):
            halfbyte.quantize_nf4(weight)


@pytest.mark.parametrize("block", [0, -64, 16, 48, 63, 8192, 64.0])
def test_a_bad_block_size_is_an_error(block):
    with pytest.raises(ValueError, match=f"block_size: .*32 to 4096, got {block}"):
        halfbyte.quantize_nf4(torch.ones(64), block)


def test_bad_code_books_and_dtypes_are_errors():
    with pytest.raises(ValueError, match="codebook: expected nf4, fp4 or int4, got 'nf5'"):
        halfbyte.quantize_4bit(torch.ones(64), "nf5")
    for dtype in (torch.float64, torch.int32, torch.uint8, torch.complex64):
        with pytest.raises(ValueError, match=f"weight: expected float32.* got {dtype}"):
            halfbyte.quantize_nf4(torch.ones(64, dtype=dtype))
    with pytest.raises(ValueError, match="dtype: expected float32.* got torch.float64"):
        halfbyte.quantize_nf4(torch.ones(64)).dequantize(torch.float64)
    with pytest.raises(ValueError, match="meta"):
        halfbyte.quantize_nf4(torch.ones(64, device="meta"))


def test_parts_that_do_not_fit_are_errors():
    weight = halfbyte.quantize_nf4(torch.randn(300), 64)
    wrong = {
        "packed": (weight.packed[1:], "packed: expected 150 bytes"),
        "absmax": (weight.absmax[1:], r"absmax: expected shape \[5\]"),
        "nested_absmax": (torch.zeros(2), r"nested_absmax: expected shape \[1\]"),
        "offset": (torch.zeros(2), r"offset: expected shape \[1\]"),
        "levels": (torch.zeros(15), r"levels: expected shape \[16\]"),
        "nested_map": (torch.zeros(255), r"nested_map: expected shape \[256\]"),
        "block_size": (48, "block_size: expected a power of two"),
        "codebook": ("nf5", "codebook: expected nf4"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(weight, **{name: value}).dequantize()


def test_an_unknown_forced_variant_is_an_error(monkeypatch):
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", "mmx")
    with pytest.raises(ValueError, match="HALFBYTE_FORCE_VARIANT: expected one of.*'mmx'"):
        halfbyte.quantize_nf4(torch.ones(64))


def test_inputs_are_left_alone_and_need_no_gradient():
    weight = torch.nn.Parameter(torch.randn(100))
    before = weight.detach().clone()
    packed = halfbyte.quantize_nf4(weight)
    assert torch.equal(weight, before) and not packed.packed.requires_grad
    bytes_before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    packed.dequantize(torch.bfloat16)
    for name, tensor in packed.tensors().items():
        assert same_bits(tensor, bytes_before[name])


def test_operators_pass_opcheck():
    weight = halfbyte.quantize_nf4(torch.randn(6, 50), 32)
    levels, nested_map = torch.randn(16), torch.randn(256)
    own = dataclasses.replace(weight, levels=levels, nested_map=nested_map)
    ops = torch.ops.halfbyte
    torch.library.opcheck(ops.quantize_4bit.default, (torch.randn(6, 51), "fp4", 64))
    torch.library.opcheck(ops.double_quantize.default, (torch.rand(300), torch.rand(1)))
    for each in (weight, own):
        for dtype in FLOATS:
            args = (*each.op_args(), list(each.shape), dtype)
            torch.library.opcheck(ops.dequantize_4bit.default, args)


def _available_gigabytes() -> float:
    with open("/proc/meminfo") as info:
        fields = dict(line.split(":") for line in info)
    return int(fields["MemAvailable"].split()[0]) / 2**20


# 2^31 elements: sizes and indices that do not fit 32 bits. bfloat16 zeros are untouched pages, so
# quantize takes the 1 GiB of codes; dequantize writes 4 GiB.
HUGE = 2**31 + 131
NEEDS_MEMORY = pytest.mark.skipif(
    _available_gigabytes() < 8, reason="needs 8 GB of free memory for more than 2^31 elements"
)


@NEEDS_MEMORY
def test_more_than_2_31_elements():
    weight = torch.zeros(HUGE, dtype=torch.bfloat16)
    tail = rough((8000,), 6, torch.bfloat16)
    weight[:100] = tail[:100]
    weight[-8000:] = tail
    packed = halfbyte.quantize_nf4(weight, 4096, double_quant=False)
    first_block = (HUGE - 8000) // 4096
    start = first_block * 4096
    codes, absmax = _expected(weight[start:], "nf4", 4096)
    assert same_bits(packed.packed[start // 2 :].clone(), codes)
    assert same_bits(packed.absmax[first_block:].clone(), absmax)
    assert packed.absmax[1:first_block].count_nonzero() == 0
    words = packed.packed[2048 : start // 2].view(torch.int64)
    assert int(words.min()) == int(words.max()) == 0x7777777777777777
    del weight
    dense = packed.dequantize()
    expected = reference.dequantize(
        codes, absmax, levels_of("nf4"), 4096, torch.Size([HUGE - start]), torch.bfloat16
    )
    assert same_bits(dense[start:].clone(), expected)
    halves = dense[4096 : start - start % 4].view(torch.int64)
    assert int(halves.min()) == int(halves.max()) == 0


@NEEDS_MEMORY
def test_a_bad_value_beyond_2_31_is_found():
    weight = torch.zeros(HUGE, dtype=torch.bfloat16)
    weight[2**31 + 70] = math.nan
    with pytest.raises(ValueError, match=f"index {2**31 + 70} of"):
        halfbyte.quantize_nf4(weight, 4096)


def test_the_module_lists_its_dynamic_map_sorted():
    values = torch.tensor(_C.signed_dynamic_map())
    assert bool((values[1:] > values[:-1]).all())
    assert float(values[127]) == 0 and float(values[-1]) == 1
    assert float(values[0]) == pytest.approx(-0.99296875)


@BY_DTYPE
def test_dequantize_into_a_given_tensor(dtype):
    weight = halfbyte.quantize_nf4(rough((33, 70), 5))
    out = torch.full((33, 70), float("nan"), dtype=dtype)
    assert weight.dequantize(out=out) is out
    assert same_bits(out, weight.dequantize(dtype))
    with pytest.raises(ValueError, match=r"out: expected float \[33, 70\], got .* \[70, 33\]"):
        weight.dequantize(out=out.view(70, 33))
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        weight.dequantize(out=torch.empty(70, 33, dtype=dtype).T)


def test_dequantize_into_passes_opcheck():
    weight = halfbyte.quantize_nf4(rough((8, 70), 6))
    args = (*weight.op_args(), torch.empty(8, 70))
    torch.library.opcheck(torch.ops.halfbyte.dequantize_4bit_into.default, args)


def test_scales_whose_mean_overflows_are_an_error():
    weight = torch.full((4, 64), 3e38)
    with pytest.raises(ValueError, match="finite mean, got inf .*double_quant=False"):
        halfbyte.quantize_nf4(weight)
    single = halfbyte.quantize_nf4(weight, double_quant=False)
    assert torch.equal(single.dequantize(torch.float32), weight)
