"""`import halfbyte` costs next to nothing on top of torch and does nothing but define things."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import halfbyte
from halfbyte._native import _C

# What an import must not pull in: third parties, and torch's own slow corners.
HEAVY = (
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "bitsandbytes",
    "gguf",
    "tokenizers",
    "huggingface_hub",
    "matplotlib",
    "yaml",
    "typer",
    "rich",
    "pandas",
    "pytest",
    "torch._inductor",
    "torch.testing._internal",
    "halfbyte.integrations",
    "halfbyte.finetune",
    "halfbyte.cli",
    "requests",
    "urllib3",
    "http.client",
)


def run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=True,
    )


def test_nothing_is_printed_and_nothing_heavy_is_imported():
    code = (
        "import sys, torch; before = set(sys.modules); import halfbyte; import json;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = run(code)
    assert result.stderr == "" and result.stdout.count("\n") == 1
    added = json.loads(result.stdout)
    assert "halfbyte" in added and "halfbyte._C" in added
    for name in added:
        assert not name.startswith(HEAVY), name
        assert name.split(".")[0] in {"halfbyte", "torch"} | set(sys.stdlib_module_names), name


def test_import_is_quiet():
    result = run("import halfbyte")
    assert (result.stdout, result.stderr) == ("", "")


def test_import_alone_brings_torch_and_works():
    code = "import halfbyte, torch; print(halfbyte.quantize_nf4(torch.ones(2, 64)).nbytes)"
    assert run(code).stdout.strip() == str(64 + 2 + 4 + 4)


def test_no_gpu_and_no_network_is_touched():
    """No CUDA context; a socket that is opened while importing raises."""
    code = """
import socket, sys, torch
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket = refuse
def audit(event, args):
    if event.startswith("socket."):
        raise AssertionError(event)
sys.addaudithook(audit)
import halfbyte
halfbyte.variants(), halfbyte.cuda_status(), halfbyte.cpu_features()
assert not torch.cuda.is_initialized()
"""
    run(code)


def test_torch_settings_are_left_alone():
    code = """
import torch
def settings():
    return (torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
            torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().sum().item())
before = settings()
import halfbyte
assert settings() == before
"""
    run(code)


def test_import_takes_little_on_top_of_torch():
    """Median of three. The goal is 0.2 s on a quiet machine; three times that is a regression."""
    code = (
        "import time, torch; start = time.perf_counter(); import halfbyte;"
        "print(time.perf_counter() - start)"
    )
    seconds = statistics.median(float(run(code).stdout) for _ in range(3))
    assert seconds < 0.6, f"import halfbyte added {seconds:.2f} s to import torch"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_compute():
    """Data loaders fork after the parent has used threads and compute on one thread themselves."""
    code = """
import os, sys, torch, halfbyte
w = torch.randn(512, 512)
want = halfbyte.quantize_nf4(w).packed          # threads have run in the parent
x = torch.randn(64, 512)
y = halfbyte.nf4_linear(x, halfbyte.quantize_nf4(w))
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    packed = halfbyte.quantize_nf4(w)
    same = torch.equal(packed.packed, want) and torch.equal(halfbyte.nf4_linear(x, packed), y)
    os._exit(0 if same else 3)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    start = time.monotonic()
    run(code)
    assert time.monotonic() - start < 60


def test_the_stub_names_what_the_compiled_module_has():
    stub = Path(halfbyte.__file__).with_name("_C.pyi").read_text()
    named = set(re.findall(r"^(?:def|class) (\w+)|^(\w+):", stub, re.MULTILINE))
    named = {a or b for a, b in named}
    present = {n for n in dir(_C) if not n.startswith("__")} | {"__version__"}
    assert named == present
