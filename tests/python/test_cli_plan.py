"""`halfbyte plan`: the same figures for people and for programs, and an exit code for scripts."""

import json

import pytest
from typer.testing import CliRunner

from halfbyte import memory_plan
from halfbyte.cli.main import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "160"})


def facts(*arguments) -> dict:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_holds_the_calculators_figures():
    found = facts("Llama-2-7B", "--seq", "1024", "--rank", "64", "--checkpointing")
    shape = memory_plan.SHAPES["Llama-2-7B"]
    settings = memory_plan.Settings(sequence=1024, rank=64, checkpointing=True)
    for key, device in (("cpu", "cpu"), ("gpu", "cuda")):
        made = memory_plan.plan(shape, settings, device)
        assert found[key] == made.categories | {"peak": made.peak}
    assert found["model"]["parameters"] == shape.parameters
    assert found["model"]["bits_per_packed_parameter"] == pytest.approx(4.127, abs=5e-4)
    assert [row["device"] for row in found["devices"]] == [
        "this machine",
        *memory_plan.DEVICES,
    ]


def test_every_flag_reaches_the_calculator():
    flags = "--batch 2 --targets q_proj,v_proj --block-size 128 --no-double-quant --dtype fp16"
    flags += " --optimizer paged-adamw32 --method lora --loss full"
    found = facts("SmolLM2-135M", *flags.split())
    settings = memory_plan.Settings(
        method="lora", batch=2, targets=("q_proj", "v_proj"), block_size=128, double_quant=False,
        dtype="fp16", optimizer="paged-adamw32", loss="full",
    )  # fmt: skip
    made = memory_plan.plan(memory_plan.SHAPES["SmolLM2-135M"], settings, "cuda")
    assert found["gpu"] == made.categories | {"peak": made.peak}
    assert found["model"]["bits_per_packed_parameter"] is None


def test_several_gpus():
    for flag in ("--gpus", "--ranks"):
        found = facts("Llama-3.1-70B", "--checkpointing", flag, "4")
        settings = memory_plan.Settings(checkpointing=True)
        made = memory_plan.rank_plan(memory_plan.SHAPES["Llama-3.1-70B"], settings, 4)
        assert found["gpu"]["peak"] == made.peak
        assert found["gpu"]["gathered layers"] == made.gathered


def test_the_exit_code_says_whether_it_fits():
    assert invoke("SmolLM2-135M", "--gpu", "rtx4090").exit_code == 0
    result = invoke("Llama-3.1-8B", "--seq", "2048", "--batch", "2", "--gpu", "rtx4090")
    assert result.exit_code == 1
    assert "--checkpointing (" in result.stdout
    paged = invoke("LLaMA-33B", "--checkpointing", "--rank", "64", "--gpu", "rtx4090",
                   "--optimizer", "paged-adamw32")  # fmt: skip
    assert paged.exit_code in (0, 1)


def test_a_paged_optimizer_is_told_apart():
    shape = memory_plan.SHAPES["LLaMA-13B"]
    settings = memory_plan.Settings(
        rank=256, checkpointing=True, optimizer="paged-adamw32", sequence=4096
    )
    made = memory_plan.plan(shape, settings, "cuda")
    card = next(d for d in memory_plan.DEVICES.values() if made.fits(d.memory) == "paged")
    flags = ["--rank", "256", "--checkpointing", "--optimizer", "paged-adamw32", "--seq", "4096"]
    result = invoke("LLaMA-13B", *flags, "--gpu", card.name)
    assert result.exit_code == 0
    assert "moves to the host" in result.stdout


def test_the_table_shows_categories_and_devices():
    result = invoke("Llama-2-7B")
    assert result.exit_code == 0
    for word in (*memory_plan.CATEGORIES, *memory_plan.DEVICES, "this machine", "peak"):
        assert word in result.stdout, word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "model 'no-such-model': expected a folder"),
        (["Llama-2-7B", "--gpu", "abacus"], "gpu: expected one of"),
        (["Llama-2-7B", "--gpus", "0"], "gpus: expected at least 1, got 0"),
        (["Llama-2-7B", "--rank", "0"], "rank: expected at least 1, got 0"),
        (["Llama-2-7B", "--method", "full", "--gpus", "2"], "method: expected qlora"),
        (["Llama-2-7B", "--targets", "wte"], "targets: expected some of"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_help_has_an_example():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Example: halfbyte plan" in result.stdout
