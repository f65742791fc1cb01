"""GGUF files: every value as the gguf package and transformers read it; bad files are refused."""

import random
import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from halfbyte.integrations import gguf_files
from halfbyte.integrations.gguf_files import GgufFile
from halfbyte.integrations.gguf_models import GgufModel
from halfbyte.integrations.safetensors_files import ModelFileError
from test_safetensors_files import mutate
from tiny_model import save_gguf

QUANTIZED = [
    kind
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
                 "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0")
]  # fmt: skip


def raw_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random blocks whose scales are finite: every 16-bit field stays below an infinity."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(0)
    return draw.integers(0, 0x40, (rows, columns // block * size), dtype=np.uint8)


def write(path, tensors: dict, **metadata):
    """tensors: name -> float array, or (raw blocks, kind)."""
    writer = gguf.GGUFWriter(path, metadata.pop("arch", "llama"))
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(file: GgufFile, name: str, **options) -> torch.Tensor:
    parts = [piece.clone() for piece in file.pieces(name, **options)]
    return torch.cat(parts).reshape(file.tensors[name].shape)


@pytest.mark.parametrize("piece", [1, 5000, 1 << 20])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_types_in_pieces(tmp_path, monkeypatch, kind, piece):
    monkeypatch.setattr(gguf_files, "PIECE", piece)
    kind = gguf.GGMLQuantizationType[kind]
    raw = raw_blocks(kind, 37, 512)
    file = GgufFile(write(tmp_path / "x.gguf", {"w": (raw, kind)}))
    assert file.tensors["w"].shape == (37, 512) and file.tensors["w"].dtype == torch.float32
    expected = gguf.dequantize(raw, kind)
    assert np.array_equal(values(file, "w").numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4)])
def test_plain_types(tmp_path, monkeypatch, dtype, shape):
    monkeypatch.setattr(gguf_files, "PIECE", 40)
    array = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    found = values(GgufFile(write(tmp_path / "x.gguf", {"w": array})), "w")
    assert np.array_equal(found.numpy(), array if dtype != np.float64 else array.astype("f4"))
    assert found.dtype == (torch.float16 if dtype == np.float16 else torch.float32)


def test_bfloat16_keeps_its_bits(tmp_path):
    tensor = torch.randn(6, 10).bfloat16()
    raw = tensor.view(torch.uint8).numpy()
    kind = gguf.GGMLQuantizationType.BF16
    found = values(GgufFile(write(tmp_path / "x.gguf", {"w": (raw, kind)})), "w")
    assert found.dtype == torch.bfloat16 and torch.equal(found, tensor)


def test_metadata_is_what_the_gguf_package_reads(tmp_path):
    path = save_gguf(tmp_path / "x.gguf")
    file, stock = GgufFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in stock.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    assert {t.name: (t.data_offset, t.n_bytes) for t in stock.tensors} == {
        t.name: (t.start, t.nbytes) for t in file.tensors.values()
    }


# --- as a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def stock(tiny):
    """What transformers makes of it, dense."""
    return AutoModelForCausalLM.from_pretrained(
        tiny.parent,
        gguf_file=tiny.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_tensors_are_those_of_transformers(tiny, stock, monkeypatch, piece):
    """Names, and the order of the rows of q and k, whole heads at a time."""
    monkeypatch.setattr(gguf_files, "PIECE", piece)
    model = GgufModel(GgufFile(tiny))
    state = {n: t for n, t in stock.state_dict().items() if n != "lm_head.weight"}
    assert model.place(list(state)) == []
    for name, tensor in state.items():
        found = torch.cat([p.float() for p in model.pieces(name)]).reshape(model.shape(name))
        assert torch.equal(found, tensor), name


def test_the_configuration_is_that_of_transformers(tiny, stock):
    ours, theirs = GgufModel(GgufFile(tiny)).config.to_dict(), stock.config.to_dict()
    own = {"_name_or_path", "_model_name_or_path", "quantization_config", "dtype", "architectures"}
    differ = {k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)} - own
    assert not differ


def test_the_tokenizer_is_that_of_transformers(tiny):
    ours = GgufModel(GgufFile(tiny)).tokenizer()
    theirs = AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name)
    text = "<|im_start|>user\nWhat colour is the red thing?<|im_end|> é 12"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


LLAMA = {
    "context_length": 64,
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 64,
    "head_count": 4,
    "head_count_kv": 4,
    "layer_norm_rms_eps": 1e-5,
    "vocab_size": 32,
    "rope_freq_base": 500000.0,
}


def llama3_factors(factor: float, size: int) -> np.ndarray:
    """The loop of llama.cpp's converter, in its own words."""
    made = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / size)
        if wavelength < 8192 / 4:
            made.append(1.0)
        elif wavelength > 8192:
            made.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            made.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(made, dtype=np.float32)


def test_llama_3_factors_become_rope_parameters_and_others_are_refused(tmp_path):
    factors = llama3_factors(32.0, 64)
    tensors = {"token_embd.weight": np.ones((32, 64), np.float32), "rope_freqs.weight": factors}
    path = write(tmp_path / "x.gguf", tensors, **LLAMA)
    model = GgufModel(GgufFile(path))
    found = model.config.rope_parameters
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("llama3", 32.0, 500000.0)
    assert model.place(["model.embed_tokens.weight"]) == []
    factors[3] *= 1.5
    path = write(tmp_path / "x.gguf", tensors | {"rope_freqs.weight": factors}, **LLAMA)
    with pytest.raises(ModelFileError, match="rope_freqs.weight: expected Llama 3's factors"):
        GgufModel(GgufFile(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "mamba"}, "expected an architecture among llama.*'mamba'"),
        ({"block_count": 2**31}, "block_count: expected 1 to 1"),
        ({"block_count": 0}, "block_count: expected 1 to 1"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "rope.scaling.type: expected none"),
    ],
)
def test_configurations_that_are_refused(tmp_path, changes, message):
    tensors = {"token_embd.weight": np.ones((32, 64), np.float32)}
    path = write(tmp_path / "x.gguf", tensors, **(LLAMA | changes))
    with pytest.raises(ModelFileError, match=message):
        GgufModel(GgufFile(path))


# --- what is refused ------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name="w", sizes=(4,), kind=0, offset=0) -> bytes:
    made = text(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    return made + struct.pack("<IQ", kind, offset)


def assemble(pairs=(), tensors=(), data=b"", version=3, counts=None, magic=b"GGUF") -> bytes:
    """A GGUF file from its parts, fit or not."""
    counts = (len(tensors), len(pairs)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


BAD = {
    "another magic": assemble(magic=b"GGML"),
    "version 1": assemble(version=1),
    "the other byte order": assemble(version=0x03000000),
    "more tensors than bytes": assemble(counts=(2**60, 0)),
    "more pairs than bytes": assemble(counts=(0, 2**63)),
    "a key longer than the file": assemble([struct.pack("<Q", 2**40) + bytes(30)]),
    "a key that is not UTF-8": assemble([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20)]),
    "a key twice": assemble([pair("a", 4, bytes(4)), pair("a", 4, bytes(4))]),
    "a value of no type": assemble([pair("a", 77, bytes(8))]),
    "a string longer than the file": assemble([pair("a", 8, struct.pack("<Q", 2**62))]),
    "an array longer than the file": assemble([pair("a", 9, struct.pack("<IQ", 4, 2**61))]),
    "strings more than the file": assemble([pair("a", 9, struct.pack("<IQ", 8, 2**50))]),
    "an array of arrays": assemble([pair("a", 9, struct.pack("<IQ", 9, 1) + bytes(12))]),
    "alignment zero": assemble([pair("general.alignment", 4, bytes(4))], [tensor()], bytes(16)),
    "alignment 24": assemble([pair("general.alignment", 4, b"\x18\0\0\0")], [tensor()], bytes(16)),
    "alignment a string": assemble([pair("general.alignment", 8, text("32"))], [tensor()]),
    "no sizes": assemble(tensors=[tensor(sizes=())], data=bytes(16)),
    "five sizes": assemble(tensors=[tensor(sizes=(1,) * 5)], data=bytes(16)),
    "sizes without end": assemble(tensors=[text("w") + struct.pack("<I", 2**32 - 1)]),
    "a size of zero": assemble(tensors=[tensor(sizes=(0, 4))], data=bytes(16)),
    "sizes that overflow": assemble(tensors=[tensor(sizes=(2**40, 2**40))], data=bytes(16)),
    "an unknown type": assemble(tensors=[tensor(kind=99)], data=bytes(16)),
    "a type that was removed": assemble(tensors=[tensor(kind=4)], data=bytes(16)),
    "whole numbers": assemble(tensors=[tensor(kind=26)], data=bytes(16)),
    "a row of half a block": assemble(tensors=[tensor(sizes=(48,), kind=2)], data=bytes(64)),
    "past the end": assemble(tensors=[tensor(sizes=(5,))], data=bytes(16)),
    "an offset past the end": assemble(tensors=[tensor(offset=2**63)], data=bytes(16)),
    "an offset off the grid": assemble(tensors=[tensor(offset=8)], data=bytes(32)),
    "an overlap": assemble(
        tensors=[tensor(sizes=(16,)), tensor("v", sizes=(8,), offset=32)], data=bytes(64)
    ),
    "a name twice": assemble(tensors=[tensor(), tensor(offset=32)], data=bytes(64)),
}


def test_the_parts_make_a_file_that_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(assemble([pair("a", 7, b"\1")], [tensor()], struct.pack("<4f", 1, 2, 3, 4)))
    file = GgufFile(path)
    assert file.metadata == {"a": True} and values(file, "w").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(tmp_path, case):
    path = tmp_path / "x.gguf"
    path.write_bytes(BAD[case])
    with pytest.raises(ModelFileError, match=r"x\.gguf"):
        GgufFile(path)


def test_every_truncation_of_the_header_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    whole = assemble([pair("a", 8, text("b"))], [tensor()], bytes(16))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            GgufFile(path)


def test_mutated_files_read_equal_or_are_refused(tmp_path):
    """500 seeded mutations of everything ahead of the data; no read outside the file."""
    array = np.arange(64, dtype=np.float32).reshape(2, 32)
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = gguf.quantize(array, kind)
    data = write(tmp_path / "whole.gguf", {"a": array, "b": (raw, kind)}, **LLAMA).read_bytes()
    start = GgufFile(tmp_path / "whole.gguf").data_start
    draw = random.Random(0)
    path, refused = tmp_path / "x.gguf", 0
    for _ in range(500):
        path.write_bytes(mutate(data, start, draw))
        try:
            file = GgufFile(path)
            for name in file.tensors:
                values(file, name)
            GgufModel(file)
        except ModelFileError as error:
            refused += 1
            assert "x.gguf" in str(error)
    assert refused > 250
