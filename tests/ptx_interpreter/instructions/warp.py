"""Warp collectives without memory: shfl vote match redux elect activemask, and bar.warp.sync.

The machine runs a collective only when every thread that its membermask names has arrived.
"""

import numpy as np

from ..decode import Decoder, Step
from ..errors import Divergence
from ..state import WARP
from ..syntax import Pair
from . import collective, instruction

LANES = np.arange(WARP, dtype=np.uint32)
BITS = np.uint32(1) << LANES


def by_warp(value: np.ndarray, state) -> np.ndarray:
    """Values of all threads as (warps, 32)."""
    return np.broadcast_to(value, state.count).reshape(-1, WARP)


def warp_bits(flags: np.ndarray) -> np.ndarray:
    """(warps, 32) booleans -> one uint32 for each warp."""
    return np.packbits(flags, axis=1, bitorder="little").view(np.uint32)[:, 0]


def executing(state, mask) -> np.ndarray:
    """For each warp, the bits of the threads that execute now."""
    return warp_bits((state.alive if mask is None else mask).reshape(-1, WARP))


@collective("shfl")
def shfl_members(decoder: Decoder):
    return decoder.read(4, "u32") if "sync" in decoder.instruction.modifiers else None


@collective("vote", "match", "redux")
def third_operand_members(decoder: Decoder):
    return decoder.read(2, "u32")


@collective("elect")
def elect_members(decoder: Decoder):
    return decoder.read(1, "u32")


@instruction("shfl")
def shuffle(decoder: Decoder) -> Step:
    """d|p = a of another lane; p tells whether that lane is inside the segment."""
    decoder.one_of("sync")
    mode = decoder.one_of("up", "down", "bfly", "idx")
    decoder.one_of("b32")
    decoder.finish(5)
    destination = decoder.operands[0]
    pair = isinstance(destination, Pair)
    write = decoder.write(destination.first if pair else destination, "b32")
    write_inside = decoder.write(destination.second, "pred") if pair else None
    a, b, c = decoder.read(1, "b32"), decoder.read(2, "u32"), decoder.read(3, "u32")
    members = decoder.read(4, "u32")

    def step(state, mask):
        lane, five = state.lane, np.uint32(31)
        control, distance = c(state), b(state) & five
        segment = (control >> np.uint32(8)) & five
        last = (lane & segment) | (control & five & ~segment)
        if mode == "up":
            source = lane - distance
            inside = source.view(np.int32) >= last.astype(np.int32)
        elif mode == "down":
            source = lane + distance
            inside = source <= last
        elif mode == "bfly":
            source = lane ^ distance
            inside = source <= last
        else:
            source = (lane & segment) | (distance & ~segment)
            inside = source <= last
        source = np.where(inside, source, lane)
        _check_source(state, mask, members(state), source)
        index = np.arange(state.count, dtype=np.int64) - lane + source
        write(state, mask, np.broadcast_to(a(state), state.count)[index])
        if write_inside is not None:
            write_inside(state, mask, inside)

    return step


def _check_source(state, mask, members, source) -> None:
    """Reading from a lane that is not a member gives an undefined value."""
    if mask is None and np.all(members == np.uint32(0xFFFFFFFF)):
        return
    absent = (members >> source) & np.uint32(1) == 0
    absent &= state.alive if mask is None else mask
    if absent.any():
        thread = int(np.argmax(absent))
        raise Divergence(
            f"shfl.sync reads lane {source[thread]}, which membermask "
            f"{int(np.broadcast_to(members, state.count)[thread]):#010x} does not name",
            thread,
        )


@instruction("vote")
def vote(decoder: Decoder) -> Step:
    decoder.one_of("sync")
    mode = decoder.one_of("all", "any", "uni", "ballot")
    decoder.one_of("b32" if mode == "ballot" else "pred")
    decoder.finish(3)
    write = decoder.write(0, "b32" if mode == "ballot" else "pred")
    flag, members = decoder.read(1, "pred"), decoder.read(2, "u32")

    def step(state, mask):
        flags = by_warp(flag(state), state) & (state.alive if mask is None else mask).reshape(
            -1, WARP
        )
        named = by_warp(members(state), state)
        ballot = warp_bits(flags)[:, None] & named
        if mode == "ballot":
            result = ballot
        elif mode == "all":
            result = ballot == named
        elif mode == "any":
            result = ballot != 0
        else:
            result = (ballot == named) | (ballot == 0)
        write(state, mask, np.ascontiguousarray(result).reshape(-1))

    return step


@instruction("match")
def match(decoder: Decoder) -> Step:
    """any: the lanes with my value; all: the members (and true) if all agree, else 0."""
    mode = decoder.one_of("any", "all")
    decoder.one_of("sync")
    type_name = decoder.one_of("b32", "b64")
    decoder.finish(3)
    destination = decoder.operands[0]
    pair = isinstance(destination, Pair)
    write = decoder.write(destination.first if pair else destination, "b32")
    write_same = decoder.write(destination.second, "pred") if pair else None
    a, members = decoder.read(1, type_name), decoder.read(2, "u32")

    def step(state, mask):
        value, named = by_warp(a(state), state), by_warp(members(state), state)
        equal = value[:, :, None] == value[:, None, :]
        bits = (equal * BITS).sum(axis=2, dtype=np.uint32) & named
        same = bits == named
        if mode == "all":
            bits = np.where(same, named, np.uint32(0))
        write(state, mask, bits.reshape(-1))
        if write_same is not None:
            write_same(state, mask, same.reshape(-1))

    return step


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux")
def reduce(decoder: Decoder) -> Step:
    decoder.one_of("sync")
    ufunc = REDUCTIONS[decoder.one_of(*REDUCTIONS)]
    type_name = decoder.one_of("u32", "s32", "b32")
    decoder.finish(3)
    a, members, write = (
        decoder.read(1, type_name),
        decoder.read(2, "u32"),
        decoder.write(0, type_name),
    )

    def step(state, mask):
        value, named = by_warp(a(state), state), by_warp(members(state), state)
        result = np.empty(value.shape, value.dtype)
        for lanes in np.unique(named if mask is None else named.reshape(-1)[mask]):
            chosen = (lanes & BITS) != 0
            if chosen.any():
                total = ufunc.reduce(value[:, chosen], axis=1, dtype=value.dtype)
                result = np.where(named == lanes, total[:, None], result)
        write(state, mask, result.reshape(-1))

    return step


@instruction("elect")
def elect(decoder: Decoder) -> Step:
    """d|p: the lowest member lane; p is true there."""
    decoder.one_of("sync")
    decoder.finish(2)
    destination = decoder.operands[0]
    write, write_elected = (
        decoder.write(destination.first, "b32"),
        decoder.write(destination.second, "pred"),
    )
    members = decoder.read(1, "u32")

    def step(state, mask):
        named = np.broadcast_to(members(state), state.count)
        leader = np.bitwise_count((named & (~named + np.uint32(1))) - np.uint32(1)).astype(
            np.uint32
        )
        write(state, mask, leader)
        write_elected(state, mask, state.lane == leader)

    return step


@instruction("activemask")
def active_mask(decoder: Decoder) -> Step:
    decoder.one_of("b32")
    decoder.finish(1)
    write = decoder.write(0, "b32")
    return lambda state, mask: write(state, mask, np.repeat(executing(state, mask), WARP))


def sync_warp(decoder: Decoder) -> Step:
    """bar.warp.sync: orders the shared accesses of the threads it names."""
    decoder.finish(1)
    return lambda state, mask: state.shadow and state.shadow.sync_warp(state, mask)
