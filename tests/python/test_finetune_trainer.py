"""The trainer's shortcuts change no number: completion-only head, accumulation, checkpointing."""

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.encode import IGNORED
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.metrics import MetricsLog
from halfbyte.finetune.plan import check
from halfbyte.finetune.report import Report
from halfbyte.finetune.run import build_trainer, finetune, load
from halfbyte.finetune.trainer import MetricsCallback
from tiny_model import build_config, build_tokenizer, colour_rows, save_model, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


def _config(base, folder, **changes) -> FinetuneConfig:
    rows = colour_rows(12) + [{"messages": [
        {"role": "user", "content": "red?"}, {"role": "assistant", "content": "green"},
        {"role": "user", "content": "Sure? " * 5}, {"role": "assistant", "content": "no"},
    ]}]  # fmt: skip
    settings = {
        "base": base, "data": write_jsonl(folder / "rows.jsonl", rows), "out": folder / "out",
        "dtype": "fp32", "dropout": 0.0, "batch": 4, "steps": 3, "rank": 4, "lr": 1e-2,
        "warmup": 0.0, "sample_tokens": 0, "eval_fraction": 0.3,
    }  # fmt: skip
    return FinetuneConfig.load(None, **(settings | changes))


def _trainer(config, folder):
    plan = check(config, Report())
    model = load(plan, Report())
    log = MetricsLog(folder / "metrics.jsonl")
    return build_trainer(plan, model, MetricsCallback(log, Report(), None), str(folder)), log


def test_loss_and_gradients_equal_the_models_own(base, tmp_path):
    trainer, log = _trainer(_config(base, tmp_path), tmp_path)
    model = trainer.model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert 0 < learned < batch["labels"][:, 1:].numel()

    model(**batch).loss.backward()  # transformers' own loss over all logits
    expected_loss = model(**batch).loss.item()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert len(expected) == 2 * 7 * 2  # layers x linears x (A, B)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max()
        )
    total = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1))
    assert total.item() == pytest.approx(expected_loss * learned, rel=1e-5)
    log.abandon()


def test_held_out_loss_does_not_depend_on_batches(base, tmp_path):
    losses = []
    for batch in (1, 3, 8):
        trainer, log = _trainer(_config(base, tmp_path, batch=batch, overwrite=True), tmp_path)
        losses.append(trainer.held_out_loss())
        log.abandon()
    (first, tokens), *rest = losses
    for loss, count in rest:
        assert loss == pytest.approx(first, rel=1e-6)
        assert count == tokens


class Collected(Report):
    """Keeps the training losses."""

    def __init__(self) -> None:
        self.losses = []

    def record(self, record):
        if record.kind == "step":
            self.losses.append(record.loss)


def _losses(base, tmp_path, **changes):
    report = Collected()
    finetune(_config(base, tmp_path, overwrite=True, **changes), report)
    assert len(report.losses) == 3
    return report.losses


def test_accumulation_equals_a_larger_batch(base, tmp_path):
    rows = colour_rows(8)
    data = write_jsonl(tmp_path / "same.jsonl", rows)
    whole = {"data": data, "eval_data": data, "group_by_length": False}
    large = _losses(base, tmp_path, batch=8, **whole)
    accumulated = _losses(base, tmp_path, batch=2, accumulation=4, **whole)
    assert accumulated == pytest.approx(large, rel=1e-4)


def test_gradient_checkpointing_changes_nothing_even_with_dropout(base, tmp_path):
    kept = _losses(base, tmp_path, dropout=0.3)
    recomputed = _losses(base, tmp_path, dropout=0.3, gradient_checkpointing=True)
    assert recomputed == kept
    assert _losses(base, tmp_path, dropout=0.0) != kept  # dropout does act


def test_a_packed_base_streamed_and_a_paged_optimizer_change_nothing(tmp_path):
    base = save_model(tmp_path / "base")
    torch.manual_seed(0)
    large = build_config(hidden_size=128, intermediate_size=256)  # packed weights of whole pages
    LlamaForCausalLM(large).save_pretrained(base)
    packed = tmp_path / "packed"
    done = CliRunner().invoke(app, ["quantize", str(base), str(packed), "--dtype", "fp32"])
    assert done.exit_code == 0, done.output
    kept = _losses(base, tmp_path)
    assert _losses(packed, tmp_path, paged_optimizer=True) == kept
    assert _losses(packed, tmp_path, stream_layers=True) == kept
    for changes, message in (
        ({"base": base, "stream_layers": True}, "stream_layers: expected a packed base"),
        ({"base": packed, "block_size": 32}, "block_size: base .* is packed already"),
    ):
        with pytest.raises(FinetuneError, match=message):
            check(_config(**({"folder": tmp_path, "overwrite": True} | changes)), Report())


def test_a_calibrated_base_is_another_base_and_resumes_as_one(base, tmp_path):
    plain, calibrated = _losses(base, tmp_path), _losses(base, tmp_path, calibrate=True)
    assert calibrated != plain and calibrated == pytest.approx(plain, rel=0.1)
    assert _losses(base, tmp_path, calibrate=True) == calibrated


def test_the_seed_decides(base, tmp_path):
    first = _losses(base, tmp_path, dropout=0.3, seed=1)
    assert _losses(base, tmp_path, dropout=0.3, seed=1) == first
    assert _losses(base, tmp_path, dropout=0.3, seed=2) != first


def test_bf16_is_close_to_fp32(base, tmp_path):
    bf16, fp32 = (_losses(base, tmp_path, dtype=dtype, lr=1e-3) for dtype in ("bf16", "fp32"))
    assert bf16 == pytest.approx(fp32, rel=1.5e-2)  # 8 bits of mantissa through 2 layers
    assert bf16 != fp32


def test_a_pad_token_that_is_eos_hides_no_eos(tmp_path):
    """The attention mask, not the token id, says what is padding: eos keeps its label."""
    folder = save_model(tmp_path / "base", pad="<|im_end|>")
    trainer, log = _trainer(_config(folder, tmp_path), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    eos = build_tokenizer().eos_token_id
    labelled = (batch["labels"] == eos).sum(dim=1)
    assert (labelled >= 1).all()
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["input_ids"][padding] == eos).all()
    log.abandon()


def test_a_non_finite_gradient_is_one_plain_error(base, tmp_path, monkeypatch):
    backward = torch.Tensor.backward

    def poisoned(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        adapter = next(p for p in trainers[0].model.parameters() if p.grad is not None)
        adapter.grad.view(-1)[3] = float("inf")

    trainers = []
    evaluate = MetricsCallback.evaluate
    monkeypatch.setattr(
        MetricsCallback,
        "evaluate",
        lambda self, step: (trainers.append(self.trainer), evaluate(self, step))[1],
    )
    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    config = _config(base, tmp_path)
    with pytest.raises(FinetuneError, match=r"step 1: the gradient of \S*lora_\S* is inf at "):
        finetune(config)
