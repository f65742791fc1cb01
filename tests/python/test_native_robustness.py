"""The native layer as a guest in a process: trainings on several threads, forks and spawns, Ctrl-C
in the middle of a long call, memory that stays flat, tensors whose memory is gone."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from halfbyte._native import _C
from halfbyte.nf4_weight import quantize_4bit
from halfbyte.nn import LoraLinear
from halfbyte.optim import AdamW8bit

# Two threads a kernel, whatever the environment says: results do not depend on the number.
PRELUDE = "import torch; torch.set_num_threads(2)\n"


def training(seed: int):
    """Two adapted 4-bit layers: (a step of training, which returns the loss; what it trains).
    K = 72 is no multiple of the block; one adapter's matrices are large enough for 8-bit state."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    layers = []
    for n, k, rank in ((160, 72, 64), (24, 160, 3)):
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = draw(n, k) / k**0.5
        layer = LoraLinear.from_linear(linear, r=rank, alpha=8)
        layer.lora_a.data = draw(rank, k) / k**0.5
        layers.append(layer)
    model = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained, lr=1e-2)
    inputs, targets = draw(32, 72), draw(32, 24)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, trained


def train(seed: int, steps: int) -> list[torch.Tensor]:
    """The losses of a training, and what it trained."""
    step, trained = training(seed)
    losses = [step() for _ in range(steps)]
    assert losses[-1] < losses[0]
    return [torch.tensor(losses), *(p.detach() for p in trained)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def native_calls(threads: int) -> list[torch.Tensor]:
    """What two operations give on `threads` threads."""
    weight = torch.linspace(-2, 3, 512 * 512).reshape(512, 512)
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(weight.numel() // 64)
    _C.quantize_4bit(weight, "nf4", 64, packed, absmax, threads)
    parts = (packed, absmax, None, None, "nf4", None, None, 64)
    x, y = torch.linspace(-1, 1, 64 * 512).reshape(64, 512), torch.empty(64, 512)
    _C.lora_linear_forward(x, parts, 512, None, None, None, 1.0, 0.0, None, y, None, threads)
    return [packed, absmax, y]


# --- threads --------------------------------------------------------------------------------------


def test_two_trainings_at_once_give_what_one_after_the_other_gives():
    seeds, steps = (1, 2, 3), 40
    want = [train(seed, steps) for seed in seeds]
    got: dict[int, list[torch.Tensor]] = {}
    start = threading.Barrier(len(seeds))

    def run(seed: int) -> None:
        start.wait()
        got[seed] = train(seed, steps)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, reference in zip(seeds, want, strict=True):
        assert same(got[seed], reference), seed


# --- processes ------------------------------------------------------------------------------------


def exit_code_of(child: int, seconds: float = 60) -> int:
    """The exit code of a forked child; one that hangs is killed, and gives -9."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # torch's own operations do not survive a fork on several
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return child


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_on_several_threads_after_the_parent_did():
    want = native_calls(2)  # starts OpenMP's threads, which a fork leaves behind
    child = fork(lambda: same(native_calls(2), want) and same(native_calls(3), want))
    assert exit_code_of(child) == 0
    assert same(native_calls(2), want)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_childs_child_computes_too():
    want = native_calls(2)

    def work() -> bool:
        return exit_code_of(fork(lambda: same(native_calls(2), want))) == 0

    assert exit_code_of(fork(work)) == 0


def _train_and_send(connection) -> None:
    torch.set_num_threads(1)  # as in `fork`
    connection.send([tensor.numpy() for tensor in [*train(5, 3), *native_calls(2)]])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_multiprocessing_trains(method):
    want = [*train(5, 3), *native_calls(2)]
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train_and_send, args=(sender,), daemon=True)
    process.start()
    assert receiver.poll(120), "the child hangs"
    got = [torch.from_numpy(array) for array in receiver.recv()]
    process.join(60)
    assert process.exitcode == 0
    assert same(got, want)


def test_fork_right_after_import():
    code = PRELUDE + (
        "import os, halfbyte\n"
        "from test_native_robustness import exit_code_of, fork, native_calls, same\n"
        "child = fork(lambda: same(native_calls(2), native_calls(1)))\n"
        "assert exit_code_of(child) == 0\n"
    )
    run_python(code)


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, **options
    )
    assert result.returncode == 0, result.stderr
    return result


# --- Ctrl-C ---------------------------------------------------------------------------------------

# A call of many seconds: the portable variant, a product of 2^39 multiply-adds.
LONG_CALL = """
import os, signal, threading, time
os.environ["HALFBYTE_FORCE_VARIANT"] = "portable"
from halfbyte._native import _C
K = N = 4096
weight = (torch.zeros(N * K // 2, dtype=torch.uint8), torch.ones(N * K // 64), None, None, "nf4",
          None, None, 64)
x, y = torch.zeros(1 << 15, K), torch.zeros(1 << 15, N)
def long_call(threads):
    _C.lora_linear_forward(x, weight, N, None, None, None, 1.0, 0.0, None, y, None, threads)
sent = []
def send():
    time.sleep(0.5)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_native_call(threads):
    """Far from its end; how soon is measured, not asserted (well under a second)."""
    code = (
        PRELUDE
        + LONG_CALL
        + (
            "threading.Thread(target=send).start()\n"
            "try:\n"
            f"    long_call({threads})\n"
            "except KeyboardInterrupt:\n"
            "    print('after', time.monotonic() - sent[0])\n"
            "    assert y[-1].count_nonzero() == 0 and time.monotonic() - sent[0] < 30\n"
            "else:\n"
            "    raise SystemExit('the call ran to its end')\n"
        )
    )
    assert "after" in run_python(code).stdout


def test_a_handler_that_does_not_raise_lets_the_call_go_on():
    """It may use the native layer itself, in the middle of the call."""
    code = (
        PRELUDE
        + LONG_CALL
        + (
            "from test_native_robustness import native_calls, same\n"
            "x, y = x[: 1 << 10], y[: 1 << 10]\n"
            "want, seen = native_calls(1), []\n"
            "def handler(number, frame):\n"
            "    seen.append(same(native_calls(1), want))\n"
            "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "signal.signal(signal.SIGINT, handler)\n"
            "x += 1\n"
            "threading.Thread(target=send).start()\n"
            "long_call(1)\n"
            "inside = list(seen)\n"
            "again = y.clone()\n"
            "long_call(1)\n"
            "assert inside == [True] and torch.equal(again, y), inside\n"
        )
    )
    run_python(code)


def test_an_optimizer_step_is_never_left_half_done():
    """A signal that comes before a step is handled after it, not between its tasks."""
    params = [torch.zeros(1 << 22, requires_grad=True)]
    optimizer = AdamW8bit(params, lr=0.5, weight_decay=0)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    before = params[0].detach().clone()
    interrupted = False
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        optimizer.step()
        timer.join()
        time.sleep(0.1)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, previous)
    assert interrupted
    change = (params[0].detach() - before).unique()
    assert len(change) == 1


# --- memory ---------------------------------------------------------------------------------------


def resident_bytes() -> int:
    with open("/proc/self/statm") as statistics:
        return int(statistics.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


STEPS = int(os.environ.get("HALFBYTE_LEAK_STEPS", "2000"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_stays_flat_over_many_steps():
    """Forward, backward and optimizer; more steps than 2,000 with HALFBYTE_LEAK_STEPS. A step makes
    some fifty tensors of 300 bytes to 46 KB: losing the smallest in each step would show as 0.6 MB.
    """
    step, _ = training(7)
    for _ in range(1000):  # allocators and caches reach their size
        step()
    before = resident_bytes()
    for _ in range(STEPS):
        step()
    assert resident_bytes() - before < 512 << 10


# --- tensors without memory -----------------------------------------------------------------------


def test_a_tensor_whose_storage_was_released_is_an_error():
    weight = torch.randn(64, 64)
    packed = quantize_4bit(weight)
    released = torch.randn(64, 64)
    released.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight: expected memory for float32.64, 64., got none"):
        quantize_4bit(released)
    packed.packed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="packed: expected memory for uint8.*got none"):
        packed.dequantize()


def test_sizes_that_cannot_be_counted_are_errors():
    empty = torch.empty(0, dtype=torch.uint8)
    weight = (empty, torch.empty(0), None, None, "nf4", None, None, 64)
    x, y = torch.empty(0, 64), torch.empty(0, 1 << 58)
    with pytest.raises(ValueError, match="weight: expected a shape of 0 to .* elements"):
        _C.lora_linear_forward(x, weight, 1 << 58, None, None, None, 1.0, 0.0, None, y, None, 1)


@pytest.mark.parametrize("threads", [0, -1, -(2**31), 2**31 - 1])
def test_any_number_of_threads_is_taken(threads):
    assert same(native_calls(threads), native_calls(1))
