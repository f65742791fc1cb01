"""One method for each runtime function: its C arguments in, an error code (and results) out.

A method returns None or 0 for success, an error code, or `(code, {position: value})` to write
results into the C side's array of values. Methods that change something put one `Call` into the
log.
"""

import ctypes
from dataclasses import dataclass, field

from . import device_model as model
from .fake_memory import RuntimeFault
from .launch import Report, launch

DEFAULT_SHARED = 48 << 10  # what a kernel may use without cudaFuncSetAttribute


@dataclass
class Call:
    """One call of a runtime function that did something, in order."""

    name: str
    arguments: dict
    result: int = 0

    def __getattr__(self, key):
        try:
            return self.__dict__["arguments"][key]
        except KeyError:
            raise AttributeError(key) from None


@dataclass
class Launch:
    """One kernel launch; `report` is None if it failed."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    report: Report | None = field(default=None, repr=False)


class Handlers:
    """Mixed into FakeRuntime, which has the state."""

    def _note(self, name: str, **arguments) -> None:
        self.log.append(Call(name, arguments))

    # Devices

    def cudaGetDevice(self, _):
        return 0, {0: self.device}

    def cudaSetDevice(self, device):
        if not 0 <= device < self.device_count:
            return model.INVALID_DEVICE
        self._note("cudaSetDevice", device=device)
        self.device = device

    def cudaGetDeviceCount(self, _):
        return 0, {0: self.device_count}

    def cudaDeviceSynchronize(self, _):
        self._note("cudaDeviceSynchronize")

    def cudaDeviceGetAttribute(self, attribute, device, _):
        if not 0 <= device < self.device_count:
            return model.INVALID_DEVICE
        name = model.ATTRIBUTE_NAMES.get(attribute)
        if name is None:
            raise RuntimeFault(f"device attribute {attribute} is unknown to the fake runtime")
        return 0, {2: self.attributes[name]}

    def cudaGetDeviceProperties(self, device, *_):
        if not 0 <= device < self.device_count:
            return model.INVALID_DEVICE
        return 0, {1: self._string(self.device_name), 2: self.device_memory}

    def cudaMemGetInfo(self, *_):
        used = self.memory.live["device"] + self.memory.live["managed"]
        return 0, {0: max(self.device_memory - used, 0), 1: self.device_memory}

    # Allocation

    def _allocate(self, name: str, kind: str, size: int, **arguments):
        limited = kind == "device"
        if limited and self.memory.live["device"] + size > self.device_memory:
            return model.OUT_OF_MEMORY
        pointer = self.memory.allocate(size, kind)
        self._note(name, pointer=pointer, bytes=size, **arguments)
        return 0, {2: pointer}

    def cudaMalloc(self, size, *_):
        return self._allocate("cudaMalloc", "device", size)

    def cudaMallocAsync(self, size, stream, _):
        return self._allocate("cudaMallocAsync", "device", size, stream=self._stream(stream))

    def cudaMallocHost(self, size, *_):
        return self._allocate("cudaMallocHost", "host", size)

    def cudaHostAlloc(self, size, flags, _):
        return self._allocate("cudaHostAlloc", "host", size, flags=flags)

    def cudaMallocManaged(self, size, flags, _):
        if size == 0 or flags not in (1, 2):
            return model.INVALID_VALUE
        if not self.attributes["managedMemory"]:
            return 801
        return self._allocate("cudaMallocManaged", "managed", size, flags=flags)

    def cudaFree(self, pointer):
        self._free("cudaFree", pointer, ("device", "managed"))

    def cudaFreeAsync(self, pointer, stream):
        self._free("cudaFreeAsync", pointer, ("device",), stream=self._stream(stream))

    def cudaFreeHost(self, pointer):
        self._free("cudaFreeHost", pointer, ("host",))

    def _free(self, name: str, pointer: int, kinds, **arguments) -> None:
        block = self.memory.blocks.get(pointer)
        self._note(name, pointer=pointer, bytes=block.size if block else 0, **arguments)
        self.memory.free(pointer, kinds)

    def cudaHostRegister(self, pointer, size, flags):
        self._note("cudaHostRegister", pointer=pointer, bytes=size, flags=flags)
        self.memory.registry.add(pointer, size, "registered host memory")

    def cudaHostUnregister(self, pointer):
        self._note("cudaHostUnregister", pointer=pointer)
        self.memory.registry.remove(pointer)

    def cudaPointerGetAttributes(self, pointer, *_):
        block = self.memory.block_of(pointer)
        kind = block.kind if block else "unregistered"
        if block is None and self.memory.registry.covers(pointer, 1):
            kind = "device"
        return 0, {1: model.MEMORY_TYPES[kind], 2: self.device}

    # Managed memory

    def _location(self, kind: int, number: int):
        name = model.LOCATIONS.get(kind, "invalid")
        if name == "device" and not 0 <= number < self.device_count:
            raise RuntimeFault(f"memory location: device {number} of {self.device_count}")
        return (name, number) if name == "device" else (name, 0)

    def cudaMemAdvise(self, pointer, size, advice, kind, number):
        location = self._location(kind, number)
        name = model.ADVICE.get(advice)
        self._note("cudaMemAdvise", pointer=pointer, bytes=size, advice=name, location=location)
        if name is None:
            return model.INVALID_VALUE
        self.memory.managed_range(pointer, size)
        needs_concurrent = name.endswith(("PreferredLocation", "AccessedBy"))
        if needs_concurrent and location[0] == "device":
            if not self.attributes["concurrentManagedAccess"]:
                return model.INVALID_DEVICE

    def cudaMemPrefetchAsync(self, pointer, size, kind, number, flags, stream):
        location = self._location(kind, number)
        self._note(
            "cudaMemPrefetchAsync",
            pointer=pointer,
            bytes=size,
            location=location,
            stream=self._stream(stream),
        )
        if flags or location[0] == "invalid":
            return model.INVALID_VALUE
        self.memory.managed_range(pointer, size)
        if not self.attributes["concurrentManagedAccess"]:
            return model.INVALID_DEVICE

    # Copies

    def _copy(self, name: str, to, source, size, kind, stream, **arguments) -> None:
        direction = model.MEMCPY_KINDS.get(kind)
        self._note(
            name, to=to, source=source, bytes=size, kind=direction, stream=stream, **arguments
        )
        if direction is None:
            raise RuntimeFault(f"{name}: kind {kind}")
        if direction in ("host_to_device", "device_to_device"):
            self.memory.require_known(to, size, name)
        if direction in ("device_to_host", "device_to_device"):
            self.memory.require_known(source, size, name)
        if size:
            ctypes.memmove(to, source, size)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        self._copy("cudaMemcpyAsync", to, source, size, kind, self._stream(stream))

    def cudaMemcpy(self, to, source, size, kind, _):
        self._copy("cudaMemcpy", to, source, size, kind, 0)

    def cudaMemsetAsync(self, pointer, value, size, stream):
        self._set("cudaMemsetAsync", pointer, value, size, self._stream(stream))

    def cudaMemset(self, pointer, value, size, _):
        self._set("cudaMemset", pointer, value, size, 0)

    def _set(self, name: str, pointer, value, size, stream) -> None:
        self._note(name, pointer=pointer, value=value, bytes=size, stream=stream)
        self.memory.require_known(pointer, size, name)
        if size:
            ctypes.memset(pointer, value & 0xFF, size)

    def _symbol(self, symbol: int) -> tuple[int, int]:
        """Address and size of the variable in the interpreted module."""
        module, name = self._find_variable(symbol)
        return module.storage.addresses[name], module.storage.variables[name].size

    def cudaMemcpyToSymbolAsync(self, symbol, source, size, offset, kind, stream):
        address, limit = self._symbol(symbol)
        self._note("cudaMemcpyToSymbolAsync", bytes=size, offset=offset, stream=stream)
        if offset < 0 or offset + size > limit or kind not in (1, 3, 4):
            return model.INVALID_VALUE
        ctypes.memmove(address + offset, source, size)

    def cudaGetSymbolAddress(self, symbol, _):
        return 0, {1: self._symbol(symbol)[0]}

    # Streams and events

    def _create(self, name: str, kind: str, **arguments):
        self.created += 1
        handle = 0x5000_0000 + 16 * self.created
        self.handles[handle] = kind
        self._note(name, handle=handle, **arguments)
        return 0, {2: handle}

    def _stream(self, handle: int) -> int:
        """0, 1 (legacy) and 2 (per thread) are the default streams; others must exist or be the
        test's own (see `new_stream`)."""
        if handle not in (0, 1, 2) and self.handles.get(handle) != "stream":
            raise RuntimeFault(f"stream {handle:#x} does not exist")
        return handle

    def _event(self, handle: int) -> int:
        if self.handles.get(handle) != "event":
            raise RuntimeFault(f"event {handle:#x} does not exist")
        return handle

    def cudaStreamCreate(self, flags, priority, _):
        return self._create("cudaStreamCreate", "stream", flags=flags, priority=priority)

    def cudaEventCreate(self, flags, *_):
        return self._create("cudaEventCreate", "event", flags=flags)

    def cudaStreamDestroy(self, stream):
        self._note("cudaStreamDestroy", stream=self._stream(stream))
        self.handles.pop(stream, None)

    def cudaEventDestroy(self, event):
        self._note("cudaEventDestroy", event=self._event(event))
        del self.handles[event]

    def cudaStreamSynchronize(self, stream):
        self._note("cudaStreamSynchronize", stream=self._stream(stream))

    def cudaStreamQuery(self, stream):
        self._stream(stream)

    def cudaStreamIsCapturing(self, stream):
        self._stream(stream)

    def cudaStreamWaitEvent(self, stream, event, flags):
        self._note("cudaStreamWaitEvent", stream=self._stream(stream), event=self._event(event))

    def cudaEventRecord(self, event, stream):
        self._note("cudaEventRecord", event=self._event(event), stream=self._stream(stream))

    def cudaEventSynchronize(self, event):
        self._note("cudaEventSynchronize", event=self._event(event))

    def cudaEventQuery(self, event):
        self._event(event)

    def cudaEventElapsedTime(self, start, end):
        self._event(start), self._event(end)

    # Kernels

    def cudaFuncSetAttribute(self, function, attribute, value):
        _, kernel = self._find_kernel(function)
        self._note("cudaFuncSetAttribute", kernel=kernel, attribute=attribute, value=value)
        if attribute == model.FUNCTION_SHARED_CARVEOUT:
            return 0 if -1 <= value <= 100 else model.INVALID_VALUE
        if attribute != model.FUNCTION_MAX_DYNAMIC_SHARED:
            raise RuntimeFault(f"function attribute {attribute} is unknown to the fake runtime")
        static = self._static_shared(function)
        if not 0 <= value <= self.attributes["maxSharedMemoryPerBlockOptin"] - static:
            return model.INVALID_VALUE
        self.dynamic_shared_limit[kernel] = value

    def _static_shared(self, function: int) -> int:
        module, kernel = self._find_kernel(function)
        return module.program(kernel).static_shared

    def _dynamic_limit(self, function: int) -> int:
        _, kernel = self._find_kernel(function)
        default = DEFAULT_SHARED - self._static_shared(function)
        return max(default, self.dynamic_shared_limit.get(kernel, 0))

    def cudaFuncGetAttributes(self, function, *_):
        return 0, {
            1: self._static_shared(function),
            2: self.attributes["maxThreadsPerBlock"],
            3: self._dynamic_limit(function),
        }

    def cudaOccupancyMaxActiveBlocksPerMultiprocessor(self, function, block_size, dynamic, *_):
        """By threads and shared memory; registers are not known here."""
        limits = self.attributes
        if not 0 < block_size <= limits["maxThreadsPerBlock"]:
            return model.INVALID_VALUE
        used = self._static_shared(function) + dynamic + limits["reservedSharedMemoryPerBlock"]
        blocks = min(
            limits["maxThreadsPerMultiProcessor"] // block_size,
            limits["maxSharedMemoryPerMultiprocessor"] // used,
            limits["maxBlocksPerMultiprocessor"],
        )
        return 0, {4: blocks}

    def cudaLaunchKernel(self, function, *rest):
        grid, block = tuple(rest[:3]), tuple(rest[3:6])
        arguments, shared_bytes, stream = rest[6], rest[7], self._stream(rest[8])
        module, kernel = self._find_kernel(function)
        record = Launch(kernel, grid, block, shared_bytes, stream)
        self.launches.append(record)
        self._note(
            "cudaLaunchKernel",
            kernel=kernel,
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            stream=stream,
        )
        if not self._fits(function, grid, block, shared_bytes):
            return model.INVALID_VALUE
        program = module.program(kernel)
        content = bytearray(program.param_bytes)
        pointers = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
        for i, parameter in enumerate(program.entry.parameters):
            end = parameter.offset + parameter.size
            content[parameter.offset : end] = ctypes.string_at(pointers[i], parameter.size)
        record.report = launch(
            module, kernel, grid, block, bytes(content), shared_bytes, self.checks, self.measure,
            memory=self.memory.registry,
        )  # fmt: skip

    def _fits(self, function: int, grid, block, shared_bytes: int) -> bool:
        """What the real runtime refuses with cudaErrorInvalidValue / InvalidConfiguration."""
        limits = self.attributes
        if any(
            not 1 <= n <= limits[f"maxGridDim{axis}"] for n, axis in zip(grid, "XYZ", strict=True)
        ):
            return False
        if any(
            not 1 <= n <= limits[f"maxBlockDim{axis}"] for n, axis in zip(block, "XYZ", strict=True)
        ):
            return False
        if block[0] * block[1] * block[2] > limits["maxThreadsPerBlock"]:
            return False
        return shared_bytes <= self._dynamic_limit(function)
