"""mov (with packing and unpacking), cvta, isspacep, and instructions without an effect here."""

import numpy as np

from ..decode import Decoder, Step
from ..errors import OutOfBounds
from ..memory import WINDOW_SHIFT, WINDOWS
from ..ptx_types import DTYPES, bits_of
from ..syntax import Vector
from . import instruction


@instruction("mov")
def mov(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.finish(2)
    destination, source = decoder.operands
    if isinstance(source, Vector):
        return _pack(decoder, destination, source, type_name)
    if isinstance(destination, Vector):
        return _unpack(decoder, destination, source, type_name)
    read, write = decoder.read(1, type_name), decoder.write(0, type_name)
    return lambda state, mask: write(state, mask, read(state))


def _pack(decoder: Decoder, destination, source: Vector, type_name: str) -> Step:
    """The first element is the lowest."""
    bits = bits_of(type_name)
    part = bits // len(source.items)
    dtype = DTYPES[f"u{bits}"].type
    reads = [decoder.read(item, f"b{part}") for item in source.items]
    write = decoder.write(destination, f"b{bits}")

    def step(state, mask):
        value = dtype(0)
        for i, read in enumerate(reads):
            value = value | (read(state).astype(dtype) << dtype(i * part))
        write(state, mask, value)

    return step


def _unpack(decoder: Decoder, destination: Vector, source, type_name: str) -> Step:
    bits = bits_of(type_name)
    part = bits // len(destination.items)
    narrow, dtype = DTYPES[f"u{part}"], DTYPES[f"u{bits}"].type
    read = decoder.read(source, f"b{bits}")
    writes = [decoder.write(item, f"b{part}") for item in destination.items]

    def step(state, mask):
        value = read(state).copy()
        for i, write in enumerate(writes):
            write(state, mask, (value >> dtype(i * part)).astype(narrow))

    return step


@instruction("cvta")
def cvta(decoder: Decoder) -> Step:
    """Offsets of shared, local and param space <-> generic addresses; global and const are
    equal."""
    to_space = decoder.has("to")
    space = decoder.one_of(
        "global", "const", "shared", "shared::cta", "local", "param"
    ).removesuffix("::cta")
    decoder.one_of("u64")
    decoder.finish(2)
    read, write = decoder.read(1, "u64"), decoder.write(0, "u64")
    window = np.uint64(WINDOWS.get(space, 0))
    if not to_space:
        return lambda state, mask: write(state, mask, read(state) + window)

    def step(state, mask):
        address = read(state)
        wrong = (address ^ window) >> np.uint64(WINDOW_SHIFT) != 0
        wrong = wrong if mask is None else wrong & mask
        if wrong.any():
            i = int(np.argmax(wrong))
            raise OutOfBounds(
                f"cvta.to.{space} of {int(np.broadcast_to(address, state.count)[i]):#x}, "
                "which is an address of another space",
                i,
            )
        write(state, mask, address - window)

    return step


@instruction("isspacep")
def is_space(decoder: Decoder) -> Step:
    space = decoder.one_of("global", "const", "shared", "shared::cta", "local", "param")
    decoder.finish(2)
    read, write = decoder.read(1, "u64"), decoder.write(0, "pred")
    window = np.uint64(WINDOWS.get(space.removesuffix("::cta"), 0) >> WINDOW_SHIFT)
    return lambda state, mask: write(
        state, mask, (read(state) >> np.uint64(WINDOW_SHIFT)) == window
    )


# Hints and orderings: memory here is sequentially consistent, so they have nothing to do.
WITHOUT_EFFECT = {
    "membar": ("cta", "gl", "sys"),
    "fence": ("sc", "acq_rel", "cta", "gpu", "sys", "cluster", "proxy", "async", "acquire",
              "release", "alias", "global", "shared::cta"),
    "nanosleep": ("u32",),
    "griddepcontrol": ("wait", "launch_dependents"),
    "pmevent": (),
    "nop": (),  # not PTX: what mutate.py leaves of a dropped instruction
}  # fmt: skip


@instruction(*WITHOUT_EFFECT)
def no_effect(decoder: Decoder) -> Step:
    for modifier in WITHOUT_EFFECT[decoder.instruction.opcode]:
        decoder.has(modifier)
    decoder.finish((0, 1))
    return lambda state, mask: None
