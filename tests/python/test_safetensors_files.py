"""safetensors files: read and mapped as the library reads them; bad ones are refused."""

import json
import os
import random
import struct

import pytest
import safetensors.torch
import torch

from halfbyte.integrations import safetensors_files
from halfbyte.integrations.gguf_files import GgufFile
from halfbyte.integrations.safetensors_files import (
    CHECKSUM,
    DTYPES,
    INDEX,
    ModelFileError,
    SafetensorsFile,
    SafetensorsFolder,
    checksum,
    mapping_of,
)

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 4)]


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype in odd shapes."""
    torch.manual_seed(0)
    made = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            values = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
            made[f"{name}.{'x'.join(map(str, shape))}"] = values.to(dtype)
    return made


def write(path, header: dict | bytes, data: bytes = b"", length: int | None = None):
    """A file from its parts, fit or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    path.write_bytes(size + text + data)
    return path


def field(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("take", ["read", "map", "pieces"])
def test_every_dtype_and_shape(tmp_path, monkeypatch, take):
    monkeypatch.setattr(safetensors_files, "PIECE", 16)
    made = tensors()
    safetensors.torch.save_file(made, tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.entries.keys() == made.keys() and file.metadata == {"format": "pt"}
    for name, entry in file.entries.items():
        if take == "pieces":
            parts = [piece.clone() for piece in file.pieces(entry)]
            data = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
            found = data.view(entry.dtype).reshape(entry.shape)
        else:
            found = getattr(file, take)(entry)
        assert found.dtype == made[name].dtype and torch.equal(found, made[name]), name


def test_a_mapped_tensor_is_the_files_own_memory_and_writes_stay_here(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.arange(2000.0)}, path)
    file = SafetensorsFile(path)
    tensor = file.map(file.entries["w"])
    mapping, offset = mapping_of(tensor)
    assert mapping is file.mapping and offset == file.entries["w"].start
    assert mapping_of(file.read(file.entries["w"])) is None
    before = path.read_bytes()
    tensor[0] = 7.0
    assert path.read_bytes() == before and file.read(file.entries["w"])[0] == 0.0
    del file, mapping  # the tensor alone keeps the mapping
    assert tensor[0] == 7.0 and tensor[1999] == 1999.0


def test_a_tensor_off_its_alignment_is_copied(tmp_path):
    data = b"\x01" + struct.pack("<2f", 1.5, -2.5)
    header = {"a": field("U8", (1,), (0, 1)), "b": field("F32", (2,), (1, 9))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = SafetensorsFile(write(tmp_path / "x.safetensors", text, data))
    tensor = file.map(file.entries["b"])
    assert tensor.tolist() == [1.5, -2.5] and mapping_of(tensor) is None


def test_a_folder_of_shards(tmp_path):
    made = {f"t{i}": torch.full((3,), float(i)) for i in range(4)}
    placed = {}
    for i, name in enumerate(made):
        file = f"model-{i % 2}.safetensors"
        placed[name] = file
    for file in set(placed.values()):
        part = {n: t for n, t in made.items() if placed[n] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    (tmp_path / "other.safetensors").write_bytes(b"not named by the index")
    folder = SafetensorsFolder(tmp_path)
    assert folder.entries.keys() == made.keys()
    assert all(torch.equal(folder.map(n), made[n]) for n in made)


# --- checksums ------------------------------------------------------------------------------------


def test_a_checksum_covers_bytes_name_dtype_and_shape(tmp_path):
    tensor = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    sha = checksum("w", tensor.dtype, tensor.shape)
    sha.update(tensor.numpy())
    metadata = {CHECKSUM + "w": sha.hexdigest()}
    safetensors.torch.save_file({"w": tensor}, tmp_path / "model.safetensors", metadata)
    assert SafetensorsFolder(tmp_path).check("w") == ""
    for changed in (tensor.clone().index_fill_(0, torch.tensor([1]), 0), tensor.reshape(3, 2),
                    tensor.view(torch.bfloat16)):  # fmt: skip
        safetensors.torch.save_file({"w": changed}, tmp_path / "model.safetensors", metadata)
        assert "expected sha256" in SafetensorsFolder(tmp_path).check("w")
    safetensors.torch.save_file({"w": tensor}, tmp_path / "model.safetensors")
    assert SafetensorsFolder(tmp_path).check("w") == "has no checksum"


# --- what is refused ------------------------------------------------------------------------------

BAD = {
    "length over the file": ({"a": field()}, bytes(8), 2**63),
    "length of all ones": ({"a": field()}, bytes(8), 2**64 - 1),
    "length zero": ({"a": field()}, bytes(8), 0),
    "no JSON": (b"{" + b"\xff" * 20, b""),
    "an array": (b"[1, 2]  ", b""),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b""),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b""),
    "a name twice": (b'{"a":1,"a":2}', b""),
    "fields not an object": ({"a": [1]}, b""),
    "a field too few": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a dtype of another format": ({"a": field("Q4")}, bytes(8)),
    "a dtype that is no name": ({"a": field(["F32"])}, bytes(8)),
    "a negative size": ({"a": field(shape=(-2,))}, bytes(8)),
    "a size that is a fraction": ({"a": field(shape=(2.0,))}, bytes(8)),
    "a size that is true": ({"a": field("F64", (True,))}, bytes(8)),
    "a huge size": ({"a": field(shape=(2**62, 4))}, bytes(8)),
    "huge sizes times nothing": ({"a": field(shape=(0, 2**62, 4), offsets=(0, 0))}, b""),
    "sizes that overflow to fit": ({"a": field(shape=(2**32, 2**32, 2))}, bytes(8)),
    "more values than bytes": ({"a": field(shape=(3,))}, bytes(8)),
    "fewer values than bytes": ({"a": field(shape=(1,))}, bytes(8)),
    "offsets past the end": ({"a": field(offsets=(4, 12))}, bytes(8)),
    "offsets the wrong way": ({"a": field(offsets=(8, 0))}, bytes(8)),
    "negative offsets": ({"a": field(offsets=(-8, 0))}, bytes(8)),
    "one offset": ({"a": field(offsets=(8,))}, bytes(8)),
    "an overlap": ({"a": field(), "b": field(offsets=(4, 12))}, bytes(12)),
    "two in one place": ({"a": field(), "b": field()}, bytes(8)),
    "a gap": ({"a": field(), "b": field(offsets=(12, 20))}, bytes(20)),
    "bytes after the last": ({"a": field()}, bytes(9)),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": field()}, bytes(8)),
    "metadata a list": ({"__metadata__": [], "a": field()}, bytes(8)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_headers_are_refused_by_file(tmp_path, case):
    path = write(tmp_path / "x.safetensors", *BAD[case])
    with pytest.raises(ModelFileError, match=r"x\.safetensors"):
        SafetensorsFile(path)


def test_every_truncation_is_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}, whole)
    data = whole.read_bytes()
    for size in range(len(data)):
        (tmp_path / "x.safetensors").write_bytes(data[:size])
        with pytest.raises(ModelFileError):
            SafetensorsFile(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 10)
    with pytest.raises(ModelFileError, match=r"x\.safetensors: a: expected 4000 bytes"):
        file.read(file.entries["a"])


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "..", "", "sub/x.safetensors",
     "a\\x.safetensors", "x\0.safetensors", "x.bin", 3, None],
)  # fmt: skip
def test_an_index_never_leaves_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelFileError, match="a: expected the name of a .safetensors file"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: cannot be opened"),
        ('{"weight_map": {"b": "x.safetensors"}}', "b: named by the index, but not there"),
    ],
)
def test_bad_indexes(tmp_path, index, message):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ModelFileError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("x", "y"):
        safetensors.torch.save_file(
            {"a": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors"
        )
    placed = {"x": "x.safetensors", "y": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ModelFileError, match="a: is in .* as well"):
        SafetensorsFolder(tmp_path)


def test_mutated_files_read_equal_or_are_refused(tmp_path):
    """600 seeded mutations of the header: bytes flipped, set, cut out, doubled."""
    made = {"layer.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3)}
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(made, whole, {"format": "pt"})
    data = whole.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    path, refused = tmp_path / "x.safetensors", 0
    for _ in range(600):
        path.write_bytes(mutate(data, header, draw))
        try:
            file = SafetensorsFile(path)
            found = {name: file.map(entry) for name, entry in file.entries.items()}
        except ModelFileError as error:
            refused += 1
            assert "x.safetensors" in str(error)
            continue
        # A header that still fits: every value is where the library, too, would find it.
        stock = safetensors.torch.load_file(path)
        assert found.keys() == stock.keys()
        assert all(torch.equal(found[n].view(-1).view(torch.uint8),
                               stock[n].view(-1).view(torch.uint8)) for n in stock)  # fmt: skip
    assert refused > 300


def mutate(data: bytes, end: int, draw: random.Random) -> bytes:
    """One to three changes within the first `end` bytes."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(min(end, len(made)))
        kind = draw.randrange(4)
        if kind == 0:
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            made[at] = draw.choice([0, 0x7F, 0x80, 0xFF, *b'{}[]",:0-9'])
        elif kind == 2:
            del made[at : at + draw.randint(1, 8)]
        else:
            made[at:at] = made[at : at + draw.randint(1, 8)]
    return bytes(made)


@pytest.mark.parametrize("read", [SafetensorsFile, GgufFile])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(ModelFileError, match="expected a regular file"):
            read(path)
