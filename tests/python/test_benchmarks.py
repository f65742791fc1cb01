"""Every benchmark runs on a small case, checks before it times, and writes what it says."""

import argparse
import csv
import importlib
import time

import pytest
import torch
from benchmarks.python import (
    bench_adamw8,
    chart,
    compare,
    formats,
    generate,
    isa,
    linear,
    models,
    peers,
    processes,
    timing,
    train_step,
)
from torch import nn

import halfbyte
from halfbyte.nn import NF4Linear

MODULES = ("bench_adamw8", "chart", "compare", "formats", "generate", "isa", "train_step")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Roofs of this machine are not what is tested."""
    monkeypatch.setattr(timing, "memory_roof", lambda nbytes, kind="read": 10.0)
    monkeypatch.setattr(linear, "memory_roof", lambda nbytes: 10.0)
    monkeypatch.setattr(linear, "COLD_BYTES", 1 << 18)
    monkeypatch.setattr(timing, "named_shapes", lambda: {"small": (96, 128), "odd": (72, 80)})


def read(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def task(shape=(96, 128), **changes) -> linear.Task:
    return linear.Task("small", shape, seconds=0.0, turns=1, rank=4, **changes)


# --- measuring ------------------------------------------------------------------------------------


def test_calls_take_turns_and_are_called_once_before():
    order = []
    taken = timing.sample({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=2)
    assert order == list("ab" + "abab")
    assert [len(times) for times in taken.values()] == [2, 2]


def test_a_burst_repeats_short_calls_only():
    calls = {"short": lambda: None, "long": lambda: time.sleep(2e-3 + timing.LONG_MS / 1e3)}
    taken = timing.sample(calls, turns=3, burst=4)
    assert len(taken["short"]) == 12 and len(taken["long"]) == 3


def test_a_call_that_had_its_time_drops_out():
    taken = timing.sample({"a": lambda: time.sleep(2e-3), "b": lambda: None}, seconds=1e-3, turns=9)
    assert len(taken["a"]) == timing.MIN_TURNS and len(taken["b"]) == 9


def test_numbers_are_numbers():
    assert timing.numbers("1,16") == [1, 16]
    for wrong in ("1,x", "0", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected numbers such as 1,16,512"):
            timing.numbers(wrong)


def test_a_table_and_a_csv_hold_rows_of_different_columns(tmp_path, capsys):
    rows = [{"a": 1, "nothing": ""}, {"a": 2.5, "b": "not installed", "nothing": ""}]
    timing.print_table("Title", rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == ["### Title", "| a | b |", "|---|---|", "| 1 |  |", "| 2.50 | not installed |"]
    timing.write_csv(tmp_path / "new" / "rows.csv", rows)
    first, second = read(tmp_path / "new" / "rows.csv")
    assert list(first) == ["a", "nothing", "b", "machine", "commit"]
    assert first["b"] == "" and second["b"] == "not installed" and first["machine"]


def test_every_command_says_how_to_use_it(capsys):
    for name in MODULES:
        with pytest.raises(SystemExit) as exit_:
            importlib.import_module(f"benchmarks.python.{name}").main(["--help"])
        assert exit_.value.code == 0
        assert f"Example: python -m benchmarks.python.{name}" in capsys.readouterr().out


def test_a_process_without_a_result_is_an_error():
    with pytest.raises(RuntimeError, match="no result, exit code"):
        processes.run("benchmarks.python.isa", ["--shape", "unknown", "--child"])


# --- peers ----------------------------------------------------------------------------------------


def test_a_missing_peer_is_a_word_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "_imported", lambda package: None)
    rows = linear.warm(task(), [1], roof=100.0)
    forward = rows[0]
    assert forward["vs dense"] > 0
    for peer in set(peers.LINEAR) - {"dense"}:
        assert forward[f"vs {peer}"] == "not installed" and forward[f"{peer} ms"] == ""
    assert formats.compare((64, 64), 0.0)[0]["vs bitsandbytes"] == "not installed"
    by_name = {row["optimizer"]: row for row in bench_adamw8.measure(100, 2, 0.0)}
    assert by_name["bitsandbytes 8 bit"]["min ms"] == "not installed"
    assert by_name["torchao 8 bit"]["min ms"] == "not installed"


@pytest.mark.parametrize(("shape", "reason"), [((72, 128), "N % 32"), ((96, 80), "K % 64")])
def test_a_shape_that_a_peer_cannot_take(shape, reason):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not bitsandbytes.functional.has_avx512bf16():
        reason = "no AVX512-BF16"
    weight = torch.randn(shape, dtype=torch.bfloat16)
    with pytest.raises(peers.Unavailable, match=reason):
        peers.bitsandbytes_eval(weight)


def test_bitsandbytes_runs_the_path_that_its_column_names():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 128, dtype=torch.bfloat16)
    assert not peers.on_fast_path(peers.bitsandbytes_training(weight))
    if bitsandbytes.functional.has_avx512bf16():
        assert peers.on_fast_path(peers.bitsandbytes_eval(weight))


def test_a_wrong_layer_is_not_timed(monkeypatch):
    def wrong(weight, packed):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        return layer.requires_grad_(False)

    monkeypatch.setitem(peers.LINEAR, "wrong", wrong)
    with_wrong = task(peers=("dense", "wrong"))
    for row in linear.warm(with_wrong, [2], 100.0) + linear.cold(with_wrong, [2], 100.0):
        assert row["vs wrong"] == "wrong result" and row["wrong ms"] == "" and row["vs dense"] > 0
    monkeypatch.setattr(halfbyte, "lora_linear", lambda x, *_: torch.zeros(len(x), 96).to(x))
    with pytest.raises(ValueError, match="halfbyte, LoRA forward, result 0: expected a relative"):
        linear.warm(task(peers=("dense",), cases=("LoRA forward",)), [2], 100.0)


# --- what each benchmark writes -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_linear_rows(dtype):
    rows = linear.warm(task(dtype=dtype, peers=("dense",)), [1, 5], roof=100.0)
    assert [(row["M"], row["case"]) for row in rows] == [
        (m, case) for m in (1, 5) for case in linear.CASES
    ]
    for row in rows:
        assert row["halfbyte ms"] > 0 and row["vs dense"] > 0 and row["of roof"] > 0
        assert (row["over bare"] != "") == (row["case"] in linear.BARE)
        assert row["bound"] in ("arithmetic", "memory")
    cold = linear.cold(task(dtype=dtype, peers=("dense",)), [1], roof=100.0)
    assert [(row["weights"], row["case"]) for row in cold] == [("cold", "forward")]


def test_the_work_of_a_case_counts_the_adapter():
    small = task()
    m, n, k, r = 8, *small.shape, small.rank
    assert linear.work("forward", m, small, 100)[0] == 2 * m * n * k
    assert linear.work("LoRA step", m, small, 100)[0] == 4 * m * n * k + 6 * m * r * (n + k)


def test_compare_writes_csv(tmp_path, capsys):
    compare.main(
        ["--only", "linear", "--shape", "small", "--shape", "odd", "--rows", "1,40"]
        + ["--peers", "dense,bitsandbytes eval", "--seconds", "0", "--output", str(tmp_path)]
    )
    rows = read(tmp_path / "linear.csv")
    assert {row["shape"] for row in rows} == {"small", "odd"}
    assert {(row["weights"], row["M"]) for row in rows} == {
        ("warm", "1"),
        ("warm", "40"),
        ("cold", "1"),
    }
    assert {"halfbyte ms", "of roof", "dense ms", "vs bitsandbytes eval", "commit"} <= set(rows[0])
    printed = capsys.readouterr().out
    assert "### small, torch.bfloat16, warm weights: LoRA step" in printed


def test_instruction_sets_run_in_their_own_process(tmp_path, monkeypatch):
    rows = {row["name"]: row["why_not"] for row in halfbyte.variants()["lora_linear (float32)"]}
    if rows.get("avx2", "no x86-64"):
        pytest.skip(f"needs AVX2: {rows.get('avx2')}")
    arguments = ["--isa", "avx2", "--shape", "smollm2-135m.q_proj", "--rows", "1"]
    isa.main([*arguments, "--dtypes", "float32", "--seconds", "0", "--output", str(tmp_path)])
    rows = read(tmp_path / "isa.csv")
    assert [row["case"] for row in rows] == list(isa.CASES)
    assert {row["instruction set"] for row in rows} == {"avx2"}


def test_formats_write_csv(tmp_path):
    formats.main(["--shape", "64x128", "--seconds", "0", "--output", str(tmp_path)])
    rows = read(tmp_path / "formats.csv")
    assert len(rows) == 9 and {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {"GB/s", "of roof", "vs bitsandbytes"} <= set(rows[0])


def test_adamw_writes_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "torchao_adamw8", _not_here)
    monkeypatch.setitem(bench_adamw8.OPTIMIZERS, "torchao 8 bit", ("8 bit", _not_here))
    arguments = ["--elements", "300", "--tensors", "2", "--seconds", "0"]
    bench_adamw8.main([*arguments, "--output", str(tmp_path)])
    rows = {row["optimizer"]: row for row in read(tmp_path / "adamw8.csv")}
    assert list(rows) == list(bench_adamw8.OPTIMIZERS)
    assert float(rows["halfbyte ratio"]["times halfbyte"]) == 1.0
    assert rows["torchao 8 bit"]["min ms"] == "not here"


def _not_here():
    raise peers.Unavailable("not here")


def test_train_step_writes_csv(tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments = ["--model", "tiny", "--sequence", "16", "--rank", "4", "--steps", "1"]
    train_step.main([*arguments, "--output", str(tmp_path)])
    rows = read(tmp_path / "train_step.csv")
    assert [row["system"] for row in rows] == ["halfbyte", "PEFT + bitsandbytes", "PEFT bf16"]
    for row in rows:
        assert float(row["tokens/s"]) > 0 and float(row["step peak MB"]) > 0
        assert row["model"] == "tiny shape, 2 of 2 layers, random weights"


def test_both_losses_are_the_same_loss(tmp_path):
    folder = models.prepare("tiny", 1, tmp_path)
    model = models.add_adapter("halfbyte", models.load_base("halfbyte", folder), rank=4)
    tokens = torch.arange(20).reshape(1, 20)
    chunked = train_step.loss_of(model, tokens, "linear_cross_entropy")
    expected = train_step.loss_of(model, tokens, "model")
    torch.testing.assert_close(chunked.float(), expected.float(), rtol=0.02, atol=0)
    chunked.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_first_losses_must_agree():
    results = {"PEFT bf16": {"first": 5.0}, "halfbyte": {"first": 5.2}}
    with pytest.raises(ValueError, match="halfbyte: expected a first loss of 5.0000, got 5.2000"):
        train_step.check(results, 5e-3)


def test_generate_writes_csv(tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments = ["--model", "tiny", "--tokens", "3", "--prompt", "4", "--rank", "4"]
    generate.main([*arguments, "--rounds", "1", "--output", str(tmp_path)])
    rows = read(tmp_path / "generate.csv")
    assert [(row["adapter"], row["system"]) for row in rows] == [
        (adapter, system)
        for adapter in ("none", "r=4")
        for system in ("halfbyte", "PEFT + bitsandbytes", "PEFT bf16")
    ]
    for row in rows:
        assert float(row["tokens/s"]) > 0 and float(row["logits error"]) < 0.05


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (train_step, ["--model", "gpt"], "--model: expected some of smollm2,tinyllama"),
        (generate, ["--model", "gpt"], "--model: expected some of smollm2,tinyllama"),
        (compare, ["--peers", "lora"], "--peers: expected some of dense,"),
        (compare, ["--dtypes", "int8"], "--dtypes: expected some of bfloat16,"),
        (compare, ["--only", "format"], "--only: expected some of formats,"),
    ],
)
def test_an_unknown_name_is_one_line(module, arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        module.main(arguments)
    assert sentence in capsys.readouterr().err


def test_chart_draws_what_it_finds(tmp_path):
    results = tmp_path / "results"
    with pytest.raises(SystemExit, match="no results"):
        chart.main(["--results", str(results)])
    formats.main(["--shape", "64x64", "--seconds", "0", "--output", str(results)])
    picture = tmp_path / "speed.png"
    chart.main(["--results", str(results), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_chart_names_every_machine_and_commit_and_says_fewer_layers(tmp_path):
    row = {"model": "llama7b shape, 2 of 32 layers, random weights", "system": "halfbyte"}
    row |= {"sequence": 512, "vs PEFT + bitsandbytes": 1.5}
    timing.write_csv(tmp_path / "train_step.csv", [row])
    other = {"optimizer": "bitsandbytes 8 bit", "times halfbyte": 2.0}
    timing.write_csv(tmp_path / "adamw8.csv", [other])
    text = (tmp_path / "adamw8.csv").read_text().replace(timing.commit(), "0000000")
    (tmp_path / "adamw8.csv").write_text(text)
    where = chart.birthplace(tmp_path)
    assert "commit 0000000" in where and f"commit {timing.commit()}" in where
    assert any("2 of 32 layers" in label for label, _ in chart.bars(tmp_path))


def test_a_common_prefix():
    a = torch.tensor([1, 2, 3])
    assert generate.common_prefix(a, a) == 3
    assert generate.common_prefix(a, torch.tensor([1, 5, 3])) == 1


def test_the_dense_peer_is_the_packed_weight():
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    packed = NF4Linear(halfbyte.quantize_nf4(weight))
    assert torch.equal(peers.dense(weight, packed).weight, packed.dequantize(torch.bfloat16))
