"""`halfbyte bench`: runs, checks before it times, and refuses nonsense in one line."""

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli import bench
from halfbyte.cli.main import app


def test_a_small_run_shows_every_case():
    arguments = ["bench", "--shape", "96x64", "--rows", "1,20", "--rank", "4"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "roof" in result.output and "N = 96, K = 64" in result.output
    for column in ("forward ms", "of roof", "vs dense", "dX vs dense", "LoRA vs dense"):
        assert column in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "96"], "--shape: expected NxK"),
        (["--shape", "0x5"], "--shape: expected NxK"),
        (["--rows", "1,x"], "--rows: expected numbers"),
        (["--dtype", "int8"], "--dtype: expected bfloat16 or float32"),
    ],
)
def test_nonsense_is_one_line_and_code_2(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert f"error: {message}" in result.output and "Traceback" not in result.output


def test_a_wrong_result_is_not_timed():
    right = torch.randn(4, 4)
    bench.check_close("forward", right, right, 0.0)
    with pytest.raises(ValueError, match="forward: expected a relative error up to 1e-03, got"):
        bench.check_close("forward", right * 1.01, right, 1e-3)
    with pytest.raises(ValueError, match="got nan"):
        bench.check_close("forward", right * float("nan"), right, 1e-3)


def test_cold_weights_take_turns():
    rows = bench.cold_cases((2048, 1024), [1], torch.float32)
    assert [row["M"] for row in rows] == [1] and rows[0]["vs dense"] > 0


def test_the_roof_is_a_rate():
    assert bench.measured_roof(torch.float32) > 0.1
