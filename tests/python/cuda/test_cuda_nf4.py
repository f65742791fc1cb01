"""Quantize, double quantize and dequantize on CUDA: every bit is the CPU reference's.

Without a GPU: PTX executed by an interpreter; not run on a GPU.
"""

import ctypes as C

import pytest
import torch

import cuda_api as api
from formats import BLOCK_SIZES, CODEBOOKS, FLOATS, levels_of, rough, same_bits, signed_map

POISON = 0xA5


def unaligned(tensor: torch.Tensor, offset: int = 1) -> torch.Tensor:
    """The same values, `offset` elements past a 64-byte boundary."""
    room = torch.zeros(tensor.numel() + offset + 64 // tensor.element_size(), dtype=tensor.dtype)
    start = -room.data_ptr() % 64 // tensor.element_size() + offset
    room[start : start + tensor.numel()] = tensor
    return room[start : start + tensor.numel()]


def quantize(gpu, weight, codebook="nf4", block_size=64, shifted=0):
    """(packed, absmax, bad index)."""
    count = weight.numel()
    packed = unaligned(torch.full(((count + 1) // 2,), POISON, dtype=torch.uint8), shifted)
    absmax = torch.full((-(-count // block_size),), float("nan"))
    weight, packed, absmax = gpu.put(weight), gpu.put(packed), gpu.put(absmax)
    bad = C.c_int64(7)
    launch = api.QuantizeLaunch(
        api.operand(weight), count, block_size, api.CODEBOOKS[codebook], api.address(packed),
        api.address(absmax), C.pointer(bad),
    )  # fmt: skip
    gpu.call("quantize_4bit", launch)
    return packed.cpu(), absmax.cpu(), bad.value


def check_quantize(gpu, weight, codebook="nf4", block_size=64, shifted=0):
    want = torch.ops.halfbyte.quantize_4bit(weight, codebook, block_size)
    packed, absmax, bad = quantize(gpu, weight, codebook, block_size, shifted)
    assert bad == -1
    assert same_bits(packed, want[0]) and same_bits(absmax, want[1])


def dequantize(gpu, weight, count, dtype, codebook="nf4", block_size=64, out_shift=0, force=""):
    """`weight`: packed, absmax, then nested_absmax, offset, levels, nested_map or None."""
    weight = [None if part is None else gpu.put(part) for part in weight]
    packed, absmax, nested, offset, levels, nested_map = weight
    double = absmax.dtype == torch.uint8
    out = gpu.put(unaligned(torch.full((count,), float("nan"), dtype=dtype), out_shift))
    bits = api.Nf4Bits(
        packed=api.address(packed), count=count, block_shift=block_size.bit_length() - 1,
        absmax=None if double else api.address(absmax),
        absmax_codes=api.address(absmax) if double else None, nested_absmax=api.address(nested),
        nested_map=api.address(nested_map), offset=api.address(offset), levels=api.address(levels),
    )  # fmt: skip
    launch = api.DequantizeLaunch(api.Weight(bits, api.CODEBOOKS[codebook]), api.operand(out))
    with pytest.MonkeyPatch.context() as patch:  # the CPU's dispatcher does not know these names
        patch.setenv("HALFBYTE_FORCE_VARIANT", force)
        gpu.call("dequantize_4bit", launch)
    return out.cpu()


def double_quantized(absmax):
    offset = absmax.mean().reshape(1)
    codes, nested = torch.ops.halfbyte.double_quantize(absmax, offset)
    return codes, nested, offset


def check_dequantize(
    gpu, count, dtype, codebook="nf4", block_size=64, double=True, own=False, packed_shift=0, **at
):
    source = rough((count,), seed=count + block_size)
    packed, absmax = torch.ops.halfbyte.quantize_4bit(source, codebook, block_size)
    nested = offset = levels = nested_map = None
    if double:
        absmax, nested, offset = double_quantized(absmax)
    if own:  # a checkpoint's own tables
        levels, nested_map = levels_of(codebook) * 1.25, signed_map() * 0.75
    want = torch.ops.halfbyte.dequantize_4bit(
        packed, absmax, nested, offset, codebook, levels, nested_map, block_size, [count], dtype
    )
    packed = unaligned(packed, packed_shift)
    weight = [packed, absmax, nested, offset, levels, nested_map]
    got = dequantize(gpu, weight, count, dtype, codebook, block_size, **at)
    assert same_bits(got, want)


# --- quantize -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_every_block_size(gpu, codebook, block_size):
    """Blocks in a part of a warp, a warp, several passes; a short last block, an odd count."""
    count = 3 * max(block_size, 256) + 37
    check_quantize(gpu, rough((count,), seed=block_size), codebook, block_size)


@pytest.mark.parametrize("count", [*range(1, 9), 31, 33, 63, 64, 65, 255, 257, 2049])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_counts_and_types(gpu, count, dtype):
    check_quantize(gpu, rough((count,), seed=count, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_quantize_unaligned(gpu, dtype, offset):
    weight = unaligned(rough((777,), seed=offset, dtype=dtype), offset)
    check_quantize(gpu, weight, block_size=128, shifted=offset)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_quantize_tails_of_blocks_read_twice(gpu, dtype, offset):
    """Blocks above 256 elements are loaded once for absmax and once for the codes."""
    for rest in range(1, 9):
        weight = unaligned(rough((512 + 256 + 8 + rest,), seed=rest, dtype=dtype), offset)
        check_quantize(gpu, weight, block_size=512, shifted=offset)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize_thresholds_and_their_neighbours(gpu, codebook):
    """absmax 1 makes x the weight itself: ties go down."""
    levels = levels_of(codebook).sort().values
    middles = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    values = torch.cat(
        [middles.nextafter(torch.tensor(s)) for s in (-9.0, 9.0)] + [middles, levels.clamp(-1, 1)]
    )
    blocks = torch.zeros(-(-values.numel() // 31), 32)
    for i, part in enumerate(values.split(31)):
        blocks[i, : len(part)] = part.clamp(-1, 1)
        blocks[i, 31] = 1.0
    check_quantize(gpu, blocks.flatten(), codebook, 32)


def test_quantize_zero_and_subnormal_blocks(gpu):
    """1 / absmax overflows below 2^-128: both factors are lifted by 2^100."""
    tiny = torch.tensor(2.0**-149)
    blocks = [
        torch.zeros(64),
        -torch.zeros(64),
        rough((64,), 1).abs() * 2.0**-130,
        tiny * torch.arange(-32, 32),
        torch.full((64,), 2.0**-149),
        torch.full((64,), 2.0**-126),
        torch.finfo(torch.float32).max * torch.linspace(-1, 1, 64),
    ]
    for codebook in CODEBOOKS:
        check_quantize(gpu, torch.cat(blocks), codebook)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_reports_the_first_bad_index(gpu, value, dtype):
    single = [[8 * i + i % 8] for i in (17, 18, 19, 20, 21, 22, 23)]  # every place of a lane
    for bad in ([0], [5000, 4999, 11], [63, 64], [5119], [2100, 4000], *single):
        weight = rough((5120,), seed=1, dtype=dtype)
        weight[bad] = value
        for block_size in (32, 64, 4096):
            assert quantize(gpu, weight.clone(), "nf4", block_size)[2] == min(bad)


def test_quantize_many_spans_a_warp(gpu):
    """More spans than warps are started: the loop over the grid."""
    check_quantize(gpu, rough((300 * 256 + 5,), seed=9), block_size=32)


def test_quantize_nothing(gpu):
    assert quantize(gpu, torch.empty(0))[2] == -1


# --- double quantize ------------------------------------------------------------------------------


def check_double_quantize(gpu, absmax, offset, shifted=0):
    want = torch.ops.halfbyte.double_quantize(absmax, offset)
    blocks = absmax.numel()
    absmax = gpu.put(unaligned(absmax, shifted))
    offset = gpu.put(offset)
    codes = gpu.put(unaligned(torch.full((blocks,), POISON, dtype=torch.uint8), shifted))
    nested = gpu.put(torch.full((-(-blocks // 256),), float("nan")))
    gpu.call(
        "double_quantize",
        api.DoubleQuantizeLaunch(blocks=blocks, absmax=api.address(absmax),
                                 offset=api.address(offset), codes=api.address(codes),
                                 nested_absmax=api.address(nested)),
    )  # fmt: skip
    assert same_bits(codes.cpu(), want[0]) and same_bits(nested.cpu(), want[1])


@pytest.mark.parametrize("blocks", [*range(1, 9), 255, 256, 257, 1000])
@pytest.mark.parametrize("shifted", [0, 1])
def test_double_quantize(gpu, blocks, shifted):
    absmax = rough((blocks,), seed=blocks).abs()
    check_double_quantize(gpu, absmax, absmax.mean().reshape(1), shifted)


def test_double_quantize_every_threshold(gpu):
    """Each midpoint of the signed map, and the floats beside it, of both signs."""
    values = signed_map()
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    probes = torch.cat(
        [middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))]
        + [values, torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-22, -(2.0**-22)])]
    )
    rows = torch.zeros(-(-probes.numel() // 255), 256)
    for i, part in enumerate(probes.split(255)):
        rows[i, : len(part)] = part
        rows[i, 255] = 1.0  # the block's absmax: x is the value itself
    check_double_quantize(gpu, rows.flatten(), torch.zeros(1))


def test_double_quantize_extremes(gpu):
    rows = [
        torch.zeros(256),
        torch.linspace(0, 1, 256) * 2.0**-130,
        torch.linspace(-1, 1, 256) * 3e38,
        torch.cat([torch.full((255,), 1e-9), torch.ones(1)]),
    ]
    check_double_quantize(gpu, torch.cat(rows), torch.zeros(1))
    check_double_quantize(gpu, torch.full((300,), 0.5), torch.full((1,), 0.5))


# --- dequantize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_every_block_size(gpu, dtype, block_size):
    """Whole tiles of 1,024, then a tail with an odd count."""
    check_dequantize(gpu, 9 * 1024 + 333, dtype, block_size=block_size)


@pytest.mark.parametrize("count", [1, 2, 63, 65, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("double", [False, True])
def test_dequantize_counts(gpu, count, double):
    check_dequantize(gpu, count, torch.bfloat16, double=double)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_dequantize_tables(gpu, codebook, own, double):
    check_dequantize(gpu, 2500, torch.float32, codebook, 32, double, own)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shifts", [(1, 0), (0, 1), (8, 8)])
def test_dequantize_unaligned(gpu, dtype, shifts):
    at = {"packed_shift": shifts[0], "out_shift": shifts[1]}
    check_dequantize(gpu, 2111, dtype, **at)


@pytest.mark.parametrize("variant", ["sm80", "portable"])
def test_dequantize_variants(gpu, variant):
    check_dequantize(gpu, 3000, torch.float16, force=f"dequantize_4bit:{variant}")


def test_dequantize_many_tiles_a_warp(gpu):
    """More tiles than warps are started on the made-up card."""
    check_dequantize(gpu, 300 * 1024 + 1, torch.bfloat16)


def test_dequantize_rounds_subnormals_and_overflow(gpu):
    """float16 out of range and below its normal numbers, as the CPU rounds them."""
    for scale in (1e-6, 1e-8, 7e4, 1e-39):
        source = rough((2048,), seed=2) * scale
        packed, absmax = torch.ops.halfbyte.quantize_4bit(source, "nf4", 64)
        for dtype in FLOATS:
            want = torch.ops.halfbyte.dequantize_4bit(
                packed, absmax, None, None, "nf4", None, None, 64, [2048], dtype
            )
            got = dequantize(gpu, [packed, absmax, None, None, None, None], 2048, dtype)
            assert same_bits(got, want)


# --- the table ------------------------------------------------------------------------------------


def rows(gpu, op):
    found, row = [], api.VariantRow()
    while gpu.api.variant(op.encode(), len(found), 0, C.byref(row)):
        found.append((row.name.decode(), row.why_not.decode(), row.chosen))
    return found


def test_variant_rows(gpu):
    assert rows(gpu, "quantize_4bit") == [("sm80", "", True)]
    assert rows(gpu, "dequantize_4bit") == [("sm80", "", True), ("portable", "", False)]
    assert rows(gpu, "no such op") == []


def test_forced_variants(gpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_FORCE_VARIANT", "avx2,dequantize_4bit:portable")
        assert [row[2] for row in rows(gpu, "dequantize_4bit")] == [False, True]
        assert [row[2] for row in rows(gpu, "quantize_4bit")] == [True]
    with pytest.raises(RuntimeError, match="dequantize_4bit has no CUDA variant 'nothing'"):
        check_dequantize(gpu, 64, torch.float32, force="dequantize_4bit:nothing")
    with pytest.raises(RuntimeError, match="variant 'sm80' cannot run: packed and out must start"):
        check_dequantize(gpu, 64, torch.float32, force="dequantize_4bit:sm80", packed_shift=1)
