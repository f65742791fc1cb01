"""What every call says where no card can be used, and what the built library asks of a machine."""

import ctypes as C
import re
import subprocess
import sys

import pytest
import torch

import cuda_api as api


def every_call(library) -> dict[str, str]:
    """The sentence of each call that returns one, for empty launches."""
    where, arena = api.Where(0, None), C.c_void_p()
    table = library.api if hasattr(library, "api") else library
    bad = C.c_int64()
    launches = {
        "quantize_4bit": api.QuantizeLaunch(bad_index=C.pointer(bad)),
        "double_quantize": api.DoubleQuantizeLaunch(),
        "dequantize_4bit": api.DequantizeLaunch(),
        "lora_linear_forward": api.ForwardLaunch(),
        "lora_linear_backward": api.BackwardLaunch(),
        "adamw8_step": api.AdamW8Launch(),
        "adamw8_paged_step": api.PagedAdamW8Launch(),
    }
    said = {name: getattr(table, name)(C.byref(one), where) for name, one in launches.items()}
    said["arena_create"] = table.arena_create(64, 0, api.AUTO, C.byref(arena))
    said["why_not"] = table.why_not()
    said["device_description"] = table.device_description(0)
    assert table.device_count() == 0 and not arena.value
    assert table.lora_linear_forward_workspace(C.byref(launches["lora_linear_forward"]), where) == 0
    table.arena_destroy(None)
    return {name: sentence.decode() for name, sentence in said.items()}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"driver_missing": True}, "no NVIDIA driver was found (CUDA error 35: "),
        ({"device_count": 0}, "no NVIDIA device was found (CUDA error 100: "),
    ],
)
def test_without_a_device_every_call_says_why(fake, setting, sentence):
    gpu = fake()
    for name, value in setting.items():
        setattr(gpu.runtime, name, value)
    said = every_call(gpu)
    assert len(set(said.values())) == 1 and said["why_not"].startswith(sentence)
    row = api.VariantRow()
    for op in ("quantize_4bit", "dequantize_4bit", "lora_linear", "adamw8"):
        assert gpu.api.variant(op.encode(), 0, 0, C.byref(row))
        assert row.why_not.decode() == said["why_not"] and not row.chosen


def test_an_old_device_is_refused(fake):
    gpu = fake()
    gpu.runtime.attributes.update(computeCapabilityMajor=7, computeCapabilityMinor=5)
    said = set(every_call(gpu).values())
    assert said == {"compute capability 8.0 or later is needed, device 0 has 7.5"}


def test_device_description(fake):
    gpu = fake()
    assert gpu.api.device_count() == 1
    assert gpu.api.device_description(0) == b"fake device, compute capability 8.0, 16.0 GiB"


REAL = """
import ctypes, sys
sys.path[:0] = {paths!r}
import cuda_api, test_cuda_no_device
print(test_cuda_no_device.every_call(cuda_api.load_api(ctypes.CDLL({library!r}))))
"""


def test_the_real_library_loads_without_a_driver(built, tmp_path):
    """Static cudart, one exported symbol, no CUDA library needed; every call has its sentence."""
    if torch.cuda.is_available():
        pytest.skip("a driver is there")
    library = tmp_path / "libhalfbyte_cuda.so"
    objects = [str(each.object) for each in built]
    subprocess.run(
        ["nvcc", "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *objects, "-o",
         str(library)],
        check=True,
    )  # fmt: skip
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*cud", needed)
    dynamic = subprocess.run(["nm", "-D", "-C", "--defined-only", library],
                             capture_output=True, text=True).stdout  # fmt: skip
    assert [line.split()[-1] for line in dynamic.splitlines()] == ["halfbyte_cuda_api"]
    code = REAL.format(paths=sys.path, library=str(library))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = eval(done.stdout)
    assert len(set(said.values())) == 1
    assert said["why_not"].startswith("no NVIDIA driver was found (CUDA error 35")
