"""The smoothed loss curve is a loss a token, and short runs can be drawn too."""

import pytest
from PIL import Image

from halfbyte.finetune.chart import draw_loss_curve, smooth
from halfbyte.finetune.metrics import EvalRecord, StepRecord


def test_smoothing_weighs_by_tokens():
    assert smooth([3.0, 3.0, 3.0], [1, 50, 7]) == pytest.approx([3.0, 3.0, 3.0])
    values = smooth([1.0, 5.0], [10, 30], memory=0.5)
    assert values == pytest.approx([1.0, (0.5 * 10 * 1.0 + 30 * 5.0) / (0.5 * 10 + 30)])


@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize("evals", [0, 2])
def test_any_run_can_be_drawn(tmp_path, steps, evals):
    records = [StepRecord(i + 1, 3.0, 1e-4, 1.0, 9, 4, 9.0, 1, 1.0) for i in range(steps)]
    points = [EvalRecord(i * steps, 3.0 - i, 4, 0.0) for i in range(evals)]
    draw_loss_curve(tmp_path / "loss.png", "title", records, points)
    with Image.open(tmp_path / "loss.png") as image:
        image.load()
        assert image.format == "PNG"
