"""The table of opcodes. Each module registers builders: `@instruction("add")` takes a `Decoder` and
returns the closure that executes one instruction for all threads of a chunk."""

from collections.abc import Callable

from ..decode import Decoder, Step

BUILDERS: dict[str, Callable[[Decoder], Step]] = {}
# Opcodes that need every thread named by a membermask (or the whole warp) to arrive together; the
# function gives, from the decoder, a closure for the membermask.
COLLECTIVES: dict[str, Callable] = {}


def instruction(*opcodes: str):
    """Registers the builder of these opcodes."""

    def register(builder):
        for opcode in opcodes:
            assert opcode not in BUILDERS, opcode
            BUILDERS[opcode] = builder
        return builder

    return register


def collective(*opcodes: str):
    """Registers, for warp collectives, the builder of the membermask closure."""

    def register(membermask):
        for opcode in opcodes:
            COLLECTIVES[opcode] = membermask
        return membermask

    return register


from . import (  # noqa: E402, F401
    atomics,
    bits,
    compare,
    convert,
    copy_async,
    floating,
    halves,
    integer,
    load_store,
    matrix,
    move,
    warp,
)
