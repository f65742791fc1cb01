"""atom and red on global and shared memory.

The threads of one instruction are served in thread order, so the result (and the order of float
sums) is defined; on a GPU the order is not.
"""

import numpy as np

from .. import rounding
from ..decode import Decoder, Step, threads_of
from ..memory import UNSIGNED
from ..ptx_types import DTYPES, SIZES
from . import instruction
from .halves import on_halves
from .load_store import active, take_space

ORDERS = ("relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys")


def _increment(old, limit, _):
    return np.where(old >= limit, 0, old + 1).astype(old.dtype)


def _decrement(old, limit, _):
    return np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype)


OPERATIONS = {
    "add": lambda old, b, _: old + b,
    "min": lambda old, b, _: np.minimum(old, b),
    "max": lambda old, b, _: np.maximum(old, b),
    "and": lambda old, b, _: old & b,
    "or": lambda old, b, _: old | b,
    "xor": lambda old, b, _: old ^ b,
    "exch": lambda old, b, _: b,
    "cas": lambda old, b, c: np.where(old == b, c, old),
    "inc": _increment,
    "dec": _decrement,
}


def _operation(name: str, type_name: str):
    """The new value from (old, b, c), on values of `type_name`."""
    if name == "add" and type_name in ("f16", "bf16", "f16x2", "bf16x2"):
        half = type_name.removesuffix("x2")

        def add(a, b):
            a, b = rounding.half_to_f64(a, half), rounding.half_to_f64(b, half)
            return rounding.f64_to_half(rounding.sum_to_odd(a, b), half)

        both = on_halves(type_name, add)
        return lambda old, b, _: both(old, b)
    return OPERATIONS[name]


@instruction("atom", "red")
def atomic(decoder: Decoder) -> Step:
    returns = decoder.instruction.opcode == "atom"
    for word in ORDERS:
        decoder.has(word)
    policy = decoder.has("L2::cache_hint")
    decoder.has("noftz")
    space = take_space(decoder)
    name = decoder.one_of(*OPERATIONS)
    type_name = decoder.take_type()
    expected = 2 + returns + (name == "cas") + policy
    decoder.finish(expected)
    first = 1 if returns else 0
    bits = f"u{8 * SIZES[type_name]}"
    value_type = bits if type_name.startswith(("f16", "bf16", "b")) else type_name
    address = decoder.address(first)
    b = decoder.read(first + 1, value_type)
    c = decoder.read(first + 2, value_type) if name == "cas" else None
    write = decoder.write_at(decoder.operands[0], value_type) if returns else None
    operate = _operation(name, type_name)
    dtype = DTYPES[value_type]
    counting = name == "add" and type_name[0] in "us"

    def step(state, mask):
        threads = threads_of(mask)
        places = address(state, threads)
        segments = state.spaces.get(space).segments(
            state, threads, places, dtype.itemsize, "atomic"
        )
        values = active(b(state), state, threads)
        others = active(c(state), state, threads) if c is not None else values
        old = np.empty(len(places), dtype)
        for selector, view, offsets in segments:
            words = view.view(UNSIGNED[dtype.itemsize]).view(dtype)
            where = slice(None) if selector is None else selector
            index = offsets // dtype.itemsize
            if counting:
                old[where] = _add_in_order(words, index, values[where])
            else:
                old[where] = _in_order(words, index, operate, values[where], others[where])
        if write is not None:
            write(state, threads, old)

    return step


def _ranks(index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order that groups equal indices, start of each lane's group, rank in the group), sorted."""
    order = np.argsort(index, kind="stable")
    grouped = index[order]
    first = np.ones(len(index), np.bool_)
    first[1:] = grouped[1:] != grouped[:-1]
    start = np.maximum.accumulate(np.where(first, np.arange(len(index)), 0))
    return order, start, np.arange(len(index)) - start


def _add_in_order(words: np.ndarray, index: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Integer sums do not depend on the order: old values from prefix sums."""
    order, start, _ = _ranks(index)
    grouped = values[order]
    before = np.cumsum(grouped, dtype=words.dtype) - grouped
    old = np.empty_like(values)
    old[order] = words[index[order]] + (before - before[start])
    np.add.at(words, index, values)
    return old


def _in_order(words, index, operate, values, others) -> np.ndarray:
    """Round r serves the r-th thread at each address."""
    order, _, rank = _ranks(index)
    old = np.empty_like(values)
    for turn in range(int(rank.max(initial=-1)) + 1):
        lanes = order[rank == turn]
        old[lanes] = words[index[lanes]]
        words[index[lanes]] = operate(old[lanes], values[lanes], others[lanes])
    return old
