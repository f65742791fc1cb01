"""`halfbyte info`: the same facts for people and for programs."""

import json

import peft
import torch
import transformers
import trl
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli.main import app


def _info(*flags):
    result = CliRunner().invoke(app, ["info", *flags], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_holds_versions_processor_variants_and_cuda():
    facts = json.loads(_info("--json"))
    assert facts["versions"]["halfbyte"] == halfbyte.__version__
    for module in (torch, transformers, peft, trl):
        assert facts["versions"][module.__name__] == module.__version__
    assert facts["processor"]["features"] == halfbyte.cpu_features()
    assert facts["cuda"] == halfbyte.cuda_status() != ""
    assert facts["cuda_devices"] == halfbyte.cuda_devices()
    assert facts["variants"] == halfbyte.variants()
    for op, variants in facts["variants"].items():
        chosen = [variant for variant in variants if variant["chosen"]]
        assert len(chosen) == 1, op
        assert chosen[0]["why_not"] == "", op


def test_every_variant_and_reason_is_shown():
    text = _info()
    for op, variants in halfbyte.variants().items():
        assert op in text
        for variant in variants:
            assert variant["name"] in text
            assert variant["why_not"] in text
    assert halfbyte.cuda_status() in text
    for name, present in halfbyte.cpu_features().items():
        line = next(line for line in text.splitlines() if f" {name}" in line)
        assert ("has" in line) if present else ("lacks" in line)


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.strip() == f"halfbyte {halfbyte.__version__}"
