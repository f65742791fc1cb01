"""Executes the PTX that nvcc emits, in numpy, with checks a GPU does not make. See README.md.

from ptx_interpreter import Memory, launch, load_module
module = load_module(ptx_text)
report = launch(module, "kernel", grid=(4, 1, 1), block=(128, 1, 1), args=[x, y, 1.5, 512])
"""

from .errors import (
    Divergence,
    InFlightAccess,
    LaunchError,
    Misaligned,
    OutOfBounds,
    ParseError,
    PtxError,
    SharedRace,
    StepLimit,
    Trap,
    UninitialisedRead,
    Unsupported,
)
from .launch import Report, launch
from .memory import Memory
from .nvcc import compile_object, compile_ptx, compile_source, find_nvcc
from .program import LoadedModule, load_module
from .runtime import FakeRuntime, RuntimeFault, build_library

__all__ = [
    "Divergence",
    "FakeRuntime",
    "InFlightAccess",
    "LaunchError",
    "LoadedModule",
    "Memory",
    "Misaligned",
    "OutOfBounds",
    "ParseError",
    "PtxError",
    "Report",
    "RuntimeFault",
    "SharedRace",
    "StepLimit",
    "Trap",
    "UninitialisedRead",
    "Unsupported",
    "build_library",
    "compile_object",
    "compile_ptx",
    "compile_source",
    "find_nvcc",
    "launch",
    "load_module",
]
