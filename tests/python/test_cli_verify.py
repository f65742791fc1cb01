"""`halfbyte verify`: changed bytes are found and named, whole folders pass."""

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.integrations.packed_folder import write_packed_folder
from halfbyte.integrations.safetensors_files import CHECKSUM, INDEX
from tiny_model import build_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    dense, path = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    LlamaForCausalLM(build_config(tie_word_embeddings=False)).save_pretrained(dense)
    write_packed_folder(dense, path, shard_bytes=100_000)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "folder")


def verify(folder, *flags):
    return CliRunner().invoke(app, ["verify", str(folder), *flags])


def verdict(folder, code: int = 1) -> dict:
    result = verify(folder, "--json")
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def header_of(file) -> tuple[int, dict]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


def rewrite(file, header: dict) -> None:
    """The file with another header in the room of the old one."""
    start, _ = header_of(file)
    text = json.dumps(header).encode()
    assert len(text) <= start - 8
    data = file.read_bytes()
    file.write_bytes(data[:8] + text.ljust(start - 8) + data[start:])


def test_a_whole_folder_passes(whole):
    result = verify(whole)
    assert result.exit_code == 0 and "all whole" in result.stdout
    facts = verdict(whole, 0)
    assert facts["ok"] and facts["damage"] == [] and len(shards(whole)) > 1
    stored = sum(len(header_of(f)[1]) - 1 for f in shards(whole))
    assert facts["tensors"] == stored and facts["nbytes"] > 0


def test_every_tensor_is_covered(folder):
    """One bit flipped in the middle of each tensor in turn: that one is named, alone."""
    for file in shards(folder):
        start, header = header_of(file)
        data = bytearray(file.read_bytes())
        for name, fields in header.items():
            if name == "__metadata__" or "layers.1." in name:
                continue
            at = start + sum(fields["data_offsets"]) // 2
            data[at] ^= 0x10
            file.write_bytes(data)
            (damage,) = verdict(folder)["damage"]
            assert (damage["file"], damage["tensor"]) == (file.name, name)
            data[at] ^= 0x10
        file.write_bytes(data)
    assert verdict(folder, 0)["ok"]


def test_the_plain_output_names_the_tensor(folder):
    file = shards(folder)[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = verify(folder)
    assert result.exit_code == 1 and "1 damaged" in result.stdout
    assert result.stderr.startswith(f"damaged: {file.name}: ")
    assert result.stderr.strip().endswith("its checksum does not fit its bytes")


@pytest.mark.parametrize(
    "change", ["dtype", "shape", "name", "no checksum", "checksum", "no header", "index", "cut"]
)
def test_changed_headers_are_found(folder, change):
    file = shards(folder)[0]
    start, header = header_of(file)
    name = next(n for n in header if n.endswith("q_proj.weight"))
    metadata = header["__metadata__"]
    if change == "dtype":
        header[name]["dtype"] = "I8"
    elif change == "shape":
        header[name]["shape"] = header[name]["shape"][::-1]
    elif change == "name":
        header[name.replace("q_proj", "Q_proj")] = header.pop(name)
    elif change == "no checksum":
        del metadata[CHECKSUM + name]
    elif change == "checksum":
        metadata[CHECKSUM + name] = "0" * 64
    if change == "no header":
        file.write_bytes(b"\0" * 100)
    elif change == "index":
        (folder / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}')
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        rewrite(file, header)
    damage = verdict(folder)["damage"]
    assert damage
    if change in ("dtype", "shape", "no checksum", "checksum"):
        assert [d["tensor"] for d in damage] == [name]
    if change == "name":
        assert name in [d["tensor"] for d in damage]


def test_nothing_to_check_is_exit_code_2(tmp_path):
    assert verify(tmp_path / "absent").exit_code == 2
    result = verify(tmp_path)
    assert result.exit_code == 2 and "expected *.safetensors in it" in result.stderr
    LlamaForCausalLM(build_config()).save_pretrained(tmp_path)
    result = verify(tmp_path)
    assert result.exit_code == 2 and "expected checksums in it, got none" in result.stderr
