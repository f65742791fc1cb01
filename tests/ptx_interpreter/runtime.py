"""`FakeRuntime`: the wheel's own host code, linked against fake_runtime.c, its launches
interpreted.

    runtime = FakeRuntime(objects=["nf4.o"], ptx=[Path("nf4.ptx").read_text()])
    x = runtime.register(numpy_array)
    runtime.call("launch_something", ctypes.c_void_p(x), ctypes.c_int(512), None)
    runtime.log, runtime.launches, runtime.peak_managed_bytes

Execution is synchronous: streams and events are logged, not simulated. An exception inside a launch
is kept, makes the launch return cudaErrorLaunchFailure, and is raised by `check()`, which `call`
includes.
"""

import atexit
import ctypes
import hashlib
import os
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from . import device_model as model
from .errors import LaunchError
from .fake_memory import FakeMemory, RuntimeFault
from .handlers import Call, Handlers, Launch
from .memory import buffer_range
from .nvcc import CACHE, cuda_include, run
from .program import LoadedModule, load_module

HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int)
SOURCE = Path(__file__).parent / "fake_runtime.c"
# The names of anonymous namespaces carry hashes that may differ from one compilation to the next.
ANONYMOUS = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?)_cu_[0-9a-f]{8}")


class _Registration(ctypes.Structure):
    _fields_ = [("host", ctypes.c_void_p), ("name", ctypes.c_char_p)]


def build_library(objects, output: Path | str | None = None) -> Path:
    """Links object files (or a static library) with the fake runtime into a shared library."""
    objects = [Path(o) for o in objects]
    if output is None:
        digest = hashlib.sha256(SOURCE.read_bytes())
        for each in objects:
            digest.update(each.read_bytes())
        CACHE.mkdir(parents=True, exist_ok=True)
        output = CACHE / f"fake_runtime.{digest.hexdigest()[:20]}.so"
        if output.exists():
            return output
    output = Path(output)
    with tempfile.TemporaryDirectory() as scratch:
        runtime = Path(scratch) / "fake_runtime.o"
        made = Path(scratch) / "library.so"
        include = cuda_include()
        run(["gcc", "-std=c11", "-O1", "-fPIC", f"-I{include}", "-c", SOURCE, "-o", runtime])
        inputs = [
            part
            for each in objects
            for part in (
                ["-Wl,--whole-archive", each, "-Wl,--no-whole-archive"]
                if each.suffix == ".a"
                else [each]
            )
        ]
        options = ["-shared", "-fPIC", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-lm", "-ldl"]
        run(["g++", *inputs, runtime, "-o", made, *options, "-lpthread"])
        shutil.copy(made, output.with_suffix(f".{os.getpid()}.tmp"))
        os.replace(output.with_suffix(f".{os.getpid()}.tmp"), output)
    return output


class FakeRuntime(Handlers):
    """A library of host code with its launches in the interpreter. See the module's docstring.

    `objects`: .o files or a .a made by nvcc (no cudart). `library`: an already linked library
    instead (made by `build_library`), used in place, so that it may also be a Python extension or a
    dependency. `ptx`: texts, or paths of .ptx files, for the kernels. `checks` and `measure` as for
    `launch`.
    """

    def __init__(self, objects=(), ptx=(), library=None, checks=True, measure=False):
        self.checks, self.measure = checks, measure
        self.memory = FakeMemory()
        self.attributes = dict(model.DEFAULT_ATTRIBUTES)
        self.device_count = 1
        self.device_name = "fake device"
        self.device_memory = 16 << 30
        self.driver_missing = False
        self.log: list[Call] = []
        self.launches: list[Launch] = []
        self.device = 0
        self.last_error = 0
        self.errors: list[Exception] = []
        self.failures: dict[str, list[int]] = defaultdict(list)
        self.handles: dict[int, str] = {}
        self.created = 0  # handles so far: none is given out twice
        self.dynamic_shared_limit: dict[str, int] = {}
        self.modules = [load_module(_ptx_text(each)) for each in ptx]
        self._strings: dict[str, ctypes.Array] = {}
        if library is None:
            self.library_path = _private_copy(build_library(objects))
        else:
            self.library_path = Path(library)
        self.library = ctypes.CDLL(str(self.library_path))
        self._hook = HOOK(self._on_call)
        self.library.fake_set_hook(self._hook)
        atexit.register(self.close)
        self._kernels = self._registered("kernel")
        self._variables = self._registered("variable")

    def close(self) -> None:
        """From now on every call of the runtime returns 35."""
        self.library.fake_set_hook(HOOK(0))
        atexit.unregister(self.close)

    # For tests

    def register(self, array, name: str = "", writable: bool = True) -> int:
        """Makes a test's buffer device memory, with exact bounds; returns its address."""
        return self.memory.registry.register(array, name, writable)

    def new_stream(self) -> int:
        """A stream handle that the test owns, as torch would own it."""
        return self.cudaStreamCreate(0, 0, 0)[1][2]

    def unregister(self, array) -> None:
        self.memory.registry.remove(buffer_range(array)[0])

    def fail_next(self, function: str, code: int, times: int = 1) -> None:
        """The next calls of that runtime function return `code` and do nothing."""
        self.failures[function] += [code] * times

    def check(self) -> None:
        """Raises the first fault since the last check: in a kernel, or of the host code."""
        if self.errors:
            first = self.errors[0]
            self.errors.clear()
            raise first

    def call(self, function: str, *arguments, restype=ctypes.c_int):
        """Calls an exported C function of the library, then `check()`."""
        self.check()
        exported = getattr(self.library, function)
        exported.restype = restype
        result = exported(*arguments)
        self.check()
        return result

    def calls(self, *names: str) -> list[Call]:
        """The log, of these functions only."""
        return [call for call in self.log if call.name in names]

    @property
    def live_managed_bytes(self) -> int:
        return self.memory.live["managed"]

    @property
    def peak_managed_bytes(self) -> int:
        return self.memory.peak["managed"]

    @property
    def live_allocations(self) -> int:
        return len(self.memory.blocks)

    # What the library calls

    def _on_call(self, name: bytes, values, count: int) -> int:
        """Never lets an exception into C: it is kept for `check` and becomes an error code."""
        function = name.decode()
        try:
            code = self._dispatch(function, values, count)
        except RuntimeFault as fault:
            self.errors.append(fault)
            code = model.INVALID_VALUE
        except BaseException as error:
            self.errors.append(error)
            code = model.LAUNCH_FAILURE
        if code and function not in ("cudaGetLastError", "cudaPeekAtLastError"):
            self.last_error = code
        return code

    def _dispatch(self, function: str, values, count: int) -> int:
        if function in ("cudaGetErrorName", "cudaGetErrorString"):
            text = model.ERRORS.get(values[0], model.ERRORS[999])[function == "cudaGetErrorString"]
            values[1] = self._string(text)
            return 0
        if function == "cudaDriverGetVersion":
            values[0] = 0 if self.driver_missing else model.DRIVER_VERSION
            return 0
        if self.driver_missing:
            return model.NO_DRIVER
        if function == "cudaGetLastError":
            code, self.last_error = self.last_error, 0
            return code
        if function == "cudaPeekAtLastError":
            return self.last_error
        if self.failures[function]:
            code = self.failures[function].pop(0)
            self.log.append(Call(function, {"injected": True}, code))
            return code
        if self.device_count == 0:
            return model.NO_DEVICE
        handler = getattr(self, function, None)
        if handler is None:
            raise RuntimeFault(f"{function} is not implemented by the fake runtime")
        inputs = [values[i] for i in range(count)]
        logged = len(self.log)
        result = handler(*inputs)
        code, outputs = result if isinstance(result, tuple) else (result or 0, {})
        for position, value in outputs.items():
            values[position] = value
        if len(self.log) > logged:
            self.log[logged].result = code
        return code

    def _string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = ctypes.create_string_buffer(text.encode())
        return ctypes.addressof(self._strings[text])

    def _registered(self, what: str) -> dict[int, str]:
        table = getattr(self.library, f"fake_{what}s")
        table.restype = ctypes.POINTER(_Registration)
        entries = table()
        count = getattr(self.library, f"fake_{what}_count")()
        return {entries[i].host: entries[i].name.decode() for i in range(count)}

    def _find_kernel(self, function: int) -> tuple[LoadedModule, str]:
        name = self._kernels.get(function % 2**64)
        if name is None:
            raise RuntimeFault(f"launch of {function:#x}, which is not a kernel of the library")
        for module in self.modules:
            found = _by_name(name, module.kernels)
            if found is not None:
                return module, found
        raise LaunchError(f"no PTX was given for kernel {name}")

    def _find_variable(self, symbol: int) -> tuple[LoadedModule, str]:
        name = self._variables.get(symbol % 2**64, "?")
        for module in self.modules:
            found = _by_name(name, module.storage.addresses)
            if found is not None:
                return module, found
        raise RuntimeFault(f"symbol {name} at {symbol:#x} is in no PTX that was given")


def _by_name(name: str, names) -> str | None:
    """The name itself, or the one that differs only in hashes of anonymous namespaces."""
    if name in names:
        return name
    plain = ANONYMOUS.sub(r"\1", name)
    return next((each for each in names if ANONYMOUS.sub(r"\1", each) == plain), None)


def _ptx_text(ptx) -> str:
    """A path is read; a text is PTX itself."""
    if isinstance(ptx, Path) or "\n" not in ptx:
        return Path(ptx).read_text()
    return ptx


def _private_copy(library: Path) -> Path:
    """A copy of the file, so that each FakeRuntime has its own static variables."""
    folder = tempfile.TemporaryDirectory(prefix="fake_runtime_")
    atexit.register(folder.cleanup)
    return Path(shutil.copy(library, folder.name))
