"""What can go wrong: one exception class per kind of fault, all of them `PtxError`.

An instruction raises `ThreadFault`s that know only thread indices and values; the machine adds the
kernel, the PTX line, the source line and the block and thread (`PtxError.locate`).
"""


class PtxError(Exception):
    """Base of everything the interpreter raises. `where` is filled in by the machine."""

    def __init__(self, message: str, thread: int | None = None):
        super().__init__(message)
        self.message = message
        self.thread = thread  # index in the chunk of blocks that is executed at once
        self.where = ""

    def locate(self, where: str) -> "PtxError":
        """Adds the place; the innermost place wins."""
        if not self.where:
            self.where = where
            self.args = (f"{self.message}\n  {where}",)
        return self


class ParseError(PtxError):
    """The text is not PTX that the parser knows."""


class Unsupported(PtxError):
    """An opcode, modifier or operand that the interpreter does not implement."""


class LaunchError(PtxError):
    """A bad launch: unknown kernel, wrong arguments, impossible grid or shared memory size."""


class OutOfBounds(PtxError):
    """An access outside every registered allocation, or outside shared, local or param memory."""


class Misaligned(PtxError):
    """An address that is not a multiple of the size of the access."""


class UninitialisedRead(PtxError):
    """A register or a byte of shared or local memory is read before anything was written there."""


class SharedRace(PtxError):
    """Two threads touch one shared location, one of them writing, with no barrier in between."""


class InFlightAccess(PtxError):
    """Shared memory is touched while a cp.async may still be writing it."""


class Divergence(PtxError):
    """A barrier or a warp collective is not reached by every thread that it names."""


class Trap(PtxError):
    """`trap`, a division by zero, or another thing no correct kernel does."""


class StepLimit(PtxError):
    """More instructions than the launch allows: an endless loop, or a wait that cannot end."""
