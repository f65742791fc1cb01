"""Host code against the fake CUDA runtime (kernels/host.cu)."""

import ctypes

import numpy as np
import pytest

from . import FakeRuntime, LaunchError, OutOfBounds, RuntimeFault, compile_object
from .conftest import KERNELS, line_of

POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t


def scale(runtime, count: int, size: int | None = None, stream: int = 0) -> np.ndarray:
    x = np.arange(count, dtype=np.float32)
    y = np.zeros(count, np.float32)
    runtime.register(x)
    runtime.register(y)
    pointers = POINTER(x.ctypes.data), POINTER(y.ctypes.data)
    assert runtime.call("scale_all", *pointers, size or count, POINTER(stream)) == 0
    return y


def test_a_launch_with_a_struct_a_template_and_a_constant(runtime):
    stream = runtime.new_stream()
    y = scale(runtime, 300, stream=stream)
    assert np.array_equal(y, np.arange(300) * 2 + 3)
    (launched,) = runtime.launches
    assert "scale" in launched.kernel and launched.stream == stream
    assert (launched.grid, launched.block, launched.shared_bytes) == ((3, 1, 1), (128, 1, 1), 0)
    assert launched.report.counters.instructions
    names = [call.name for call in runtime.log]
    assert names == ["cudaStreamCreate", "cudaMemcpyToSymbolAsync", "cudaLaunchKernel"]
    assert runtime.calls("cudaLaunchKernel")[0].grid == (3, 1, 1)


def test_a_fault_in_a_kernel_comes_out(runtime):
    with pytest.raises(OutOfBounds, match=f"host.cu:{line_of('host.cu', 'p.y[i] =')}"):
        scale(runtime, 300, size=301)
    runtime.check()  # raised once
    assert runtime.launches[0].report is None
    x = np.zeros(1, np.float32)
    runtime.library.scale_all(POINTER(x.ctypes.data), POINTER(x.ctypes.data), 1, None)
    with pytest.raises(OutOfBounds):  # not registered; seen at the next check
        runtime.check()


def test_an_unknown_stream(runtime):
    with pytest.raises(RuntimeFault, match="stream 0x1234"):
        scale(runtime, 3, stream=0x1234)


def test_dynamic_shared_memory_needs_the_attribute(runtime):
    x, y = np.ones(64, np.float32), np.zeros(1, np.float32)
    pointers = POINTER(runtime.register(x)), POINTER(runtime.register(y))
    assert runtime.call("sum_shared", *pointers, 64, 256, 0) == 0 and y[0] == 64
    assert runtime.call("sum_shared", *pointers, 64, 60 << 10, 0) == 1
    assert runtime.call("sum_shared", *pointers, 64, 60 << 10, 1) == 0
    assert runtime.call("sum_shared", *pointers, 64, 200 << 10, 1) == 1


def managed(runtime, size: int) -> tuple[int, int]:
    pointer = POINTER()
    code = runtime.call("allocate_managed", SIZE(size), ctypes.byref(pointer), None)
    return code, pointer.value or 0


def test_managed_memory_is_counted_and_logged(runtime):
    code, first = managed(runtime, 10_000)
    assert code == 0 and runtime.live_managed_bytes == 10_000
    _, second = managed(runtime, 5_000)
    runtime.call("release", POINTER(first))
    assert (runtime.live_managed_bytes, runtime.peak_managed_bytes) == (5_000, 15_000)
    assert runtime.memory.allocations["managed"] == 2 and runtime.live_allocations == 1
    advise, prefetch = runtime.log[1:3]
    assert (advise.name, advise.advice, advise.location) == (
        "cudaMemAdvise", "SetPreferredLocation", ("host", 0),
    )  # fmt: skip
    assert (prefetch.pointer, prefetch.bytes, prefetch.location) == (first, 10_000, ("device", 0))
    poisoned = np.frombuffer((ctypes.c_uint8 * 5_000).from_address(second), np.float32)
    assert np.isnan(poisoned).all()


def test_wrong_frees_and_ranges(runtime):
    _, pointer = managed(runtime, 4096)
    assert runtime.call("prefetch", POINTER(pointer + 100), SIZE(3996)) == 0
    with pytest.raises(RuntimeFault, match="not inside one managed allocation"):
        runtime.call("prefetch", POINTER(pointer + 100), SIZE(3997))
    with pytest.raises(RuntimeFault, match="never allocated"):
        runtime.call("release", POINTER(pointer + 16))
    runtime.call("release", POINTER(pointer))
    with pytest.raises(RuntimeFault, match="a second time"):
        runtime.call("release", POINTER(pointer))
    assert runtime.call("release", None) == 0


def test_injected_failures(runtime):
    runtime.fail_next("cudaMallocManaged", 2)
    assert managed(runtime, 100)[0] == 2
    assert runtime.live_managed_bytes == 0
    assert runtime.call("last_error_name", restype=ctypes.c_char_p) == b"cudaErrorMemoryAllocation"
    assert runtime.call("last_error_name", restype=ctypes.c_char_p) == b"cudaSuccess"
    assert managed(runtime, 100)[0] == 0
    runtime.fail_next("cudaLaunchKernel", 719)
    with pytest.raises(AssertionError):
        scale(runtime, 10)


def test_without_concurrent_managed_access(runtime):
    runtime.attributes["concurrentManagedAccess"] = 0
    assert managed(runtime, 100)[0] == 101


def test_device_queries(runtime):
    values = [ctypes.c_int() for _ in range(4)]
    assert runtime.call("describe", *map(ctypes.byref, values)) == 0
    # 164 KB of shared memory a multiprocessor hold 4 blocks of 40 KB + 1 KB.
    assert [v.value for v in values] == [1, 8, 163 << 10, 4]
    runtime.attributes["computeCapabilityMajor"] = 12
    runtime.call("describe", *map(ctypes.byref, values))
    assert values[1].value == 12
    runtime.device_count = 0
    assert runtime.call("describe", *map(ctypes.byref, values)) == 100


def test_streams_events_and_copies(runtime):
    source = np.arange(100, dtype=np.uint8)
    target = np.zeros(100, np.uint8)
    pointers = POINTER(source.ctypes.data), POINTER(target.ctypes.data)
    assert runtime.call("copy_through_device", *pointers, SIZE(100)) == 0
    assert np.array_equal(source, target)
    names = [call.name for call in runtime.log]
    assert names == [
        "cudaStreamCreate", "cudaEventCreate", "cudaMallocAsync", "cudaMemcpyAsync",
        "cudaEventRecord", "cudaStreamWaitEvent", "cudaMemcpyAsync", "cudaFreeAsync",
        "cudaEventDestroy", "cudaStreamSynchronize", "cudaStreamDestroy",
    ]  # fmt: skip
    assert runtime.live_allocations == 0
    assert not {"stream", "event"} & set(runtime.handles.values())


def test_without_a_driver_every_call_returns_35(runtime):
    runtime.driver_missing = True
    assert managed(runtime, 100)[0] == 35
    assert (
        runtime.call("last_error_name", restype=ctypes.c_char_p) == b"cudaErrorInsufficientDriver"
    )
    assert runtime.call("scale_all", None, None, 1, None) == 35
    runtime.close()
    assert runtime.library.release(None) == 35
    assert not runtime.log


def test_kernels_without_ptx(nvcc):
    runtime = FakeRuntime(objects=[compile_object(KERNELS / "host.cu", 80)])
    x = np.ones(4, np.float32)
    runtime.register(x)
    with pytest.raises(LaunchError, match="no PTX was given"):
        runtime.call("sum_shared", POINTER(x.ctypes.data), POINTER(x.ctypes.data), 4, 16, 0)
    runtime.close()


def test_runtimes_do_not_share_state(nvcc, runtime):
    other = FakeRuntime(objects=[compile_object(KERNELS / "host.cu", 80)])
    managed(runtime, 100)
    assert other.live_managed_bytes == 0 and runtime.live_managed_bytes == 100
    other.close()
    assert managed(runtime, 100)[0] == 0
