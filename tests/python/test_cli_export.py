"""`halfbyte export`: files loaded again by transformers, with the logits of the folder's model."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import halfbyte
from cli_cases import error, load_dense, load_merged, run, save_adapter, save_base
from halfbyte.integrations.gguf_export import _rope_factors
from halfbyte.integrations.gguf_tokenizer import add_tokenizer
from tiny_model import CHATML, build_config, build_tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
TEXTS = ["What colour is the red thing?", "<|im_start|>user\nHi<|im_end|>\n", " 12 é\n\n x"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    save_base(folder / "base", **SHAPE)
    save_base(folder / "untied", torch.bfloat16, tie_word_embeddings=False, **SHAPE)
    save_base(folder / "odd")  # rows of 48 and 100
    save_adapter(folder / "adapter", folder / "base")
    return folder


def _export(files, out, base="base", *flags):
    run("export", "--base", files / base, "--format", "gguf", "--out", out, *flags)
    return AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 60)[None]).logits


def _stored(model, kind="F16"):
    """`model` with its matrices as the file can hold them; the rest, buffers too, in float32."""
    types = gguf.GGMLQuantizationType
    for name, parameter in model.float().named_parameters():
        if parameter.dim() == 2:
            ends = "embed_tokens" in name or "lm_head" in name
            chosen = types["Q8_0" if kind == "Q4_0" and ends else kind]
            data = gguf.quants.quantize(parameter.detach().numpy(), chosen)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(data, chosen).copy())
    return model


def _relative(model, expected) -> float:
    wanted = _logits(expected)
    return ((_logits(model) - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("base", ["base", "untied", "odd"])
def test_f16_has_the_logits_of_the_folder(files, tmp_path, base):
    loaded = _export(files, tmp_path / "m.gguf", base)
    expected = _stored(load_dense(files / base))
    assert _relative(loaded, expected) < 1e-5
    assert not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantized_types(files, tmp_path, kind):
    """Every weight within half a step of its block, and the logits of those weights."""
    loaded = _export(files, tmp_path / "m.gguf", "untied", "--type", kind)
    expected = load_dense(files / "untied").float()
    wanted = _stored(load_dense(files / "untied"), kind.upper())
    assert _relative(loaded, wanted) < 1e-5
    steps = {"q8_0": 127, "q4_0": 8}
    for (name, found), wanted in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        if wanted.dim() == 1:
            assert torch.equal(found, wanted), name
            continue
        levels = 127 if name in ("model.embed_tokens.weight", "lm_head.weight") else steps[kind]
        blocks = wanted.reshape(-1, 32).abs().amax(1, keepdim=True)
        # Scales are rounded to float16, 2^-11 of up to 127 steps. q4_0 has levels -8 to 7: the far
        # end of the other sign is a whole step away.
        allowed = blocks / levels * (0.57 if levels == 127 else 1.01)
        assert ((found - wanted).reshape(-1, 32).abs() <= allowed).all(), name
    tensors = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"] == kind.upper()
    assert tensors["token_embd.weight"] == tensors["output.weight"] == "Q8_0"
    assert tensors["blk.0.attn_norm.weight"] == "F32"


def test_an_adapter_is_merged(files, tmp_path):
    loaded = _export(files, tmp_path / "m.gguf", "base", "--adapter", files / "adapter")
    merged = load_merged(files / "base", files / "adapter")
    assert _relative(loaded, _stored(merged)) < 1e-5
    assert _relative(loaded, load_dense(files / "base")) > 0.1


def test_a_packed_base(files, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        files / "base", quantization_config=halfbyte.NF4Config(), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    build_tokenizer().save_pretrained(tmp_path / "nf4")
    loaded = _export(tmp_path, tmp_path / "m.gguf", "nf4")
    assert _relative(loaded, model) < 2e-3


def test_tokenizer_and_chat_template(files, tmp_path):
    _export(files, tmp_path / "m.gguf")
    ours = AutoTokenizer.from_pretrained(files / "base")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert theirs.chat_template == ours.chat_template == CHATML
    assert theirs.eos_token == ours.eos_token and theirs.pad_token == ours.pad_token
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text


def test_rotary_frequencies_of_llama_3():
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = build_config(hidden_size=512, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(torch.from_numpy(_rope_factors(config)), plain / scaled)
    assert _rope_factors(build_config()) is None


def test_an_adapter_alone(files, tmp_path):
    """alpha / R B A, rows of q and k put back, is PEFT's delta."""
    save_adapter(
        tmp_path / "lora", files / "base", r=4, use_rslora=True, rank_pattern={"v_proj": 3}
    )
    run(
        "export", "--base", files / "base", "--adapter", tmp_path / "lora", "--adapter-only",
        "--out", tmp_path / "lora.gguf",
    )  # fmt: skip
    reader = GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    before = load_dense(files / "base").state_dict()
    after = load_merged(files / "base", tmp_path / "lora").state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    adapted = [n for n in before if n.endswith("proj.weight")]
    assert len(tensors) == 2 * len(adapted) == 28
    for name in adapted:
        target = names.get_name(name, (".weight",))
        a, b = tensors[f"{target}.lora_a"], tensors[f"{target}.lora_b"]
        delta = alpha / a.shape[0] * (b @ a)
        heads = {"q": 4, "k": 2}.get(name.split(".")[-2][0]) if "self_attn" in name else None
        if heads:
            n, k = delta.shape
            delta = delta.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)
        wanted = (after[name] - before[name]).numpy()
        np.testing.assert_allclose(delta, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_modelfile(files, tmp_path):
    _export(files, tmp_path / "m.gguf", "base", "--modelfile")
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>')
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


def _sentencepiece_like(merges, **changes) -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [a + b for a, b in merges]
    pieces = list(dict.fromkeys([*pieces, "▁", *"abcd"]))
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True,
            fuse_unk=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_a_tokenizer_with_scores(files, tmp_path):
    merges = [("a", "b"), ("▁", "ab"), ("▁a", "b"), ("▁", "a"), ("c", "d"), ("ab", "cd")]
    ours = _sentencepiece_like(merges)
    load_dense(files / "base").save_pretrained(tmp_path / "base")
    ours.save_pretrained(tmp_path / "base")
    _export(tmp_path, tmp_path / "m.gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"].contents(), strict=True))
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert scores["ab"] > scores["▁ab"] > scores["▁a"] > scores["cd"] > scores["abcd"] > scores["a"]
    types = dict(zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    kind = gguf.TokenType
    assert [types[t] for t in ("<unk>", "<s>", "<0x0A>", "ab", "[PAD300]")] == [
        kind.UNKNOWN, kind.CONTROL, kind.BYTE, kind.NORMAL, kind.UNUSED,
    ]  # fmt: skip


def _refused(tokenizer) -> str:
    with pytest.raises(ValueError) as found:
        add_tokenizer(gguf.GGUFWriter(None, "llama"), tokenizer, 320)
    return str(found.value)


def test_tokenizers_that_llama_cpp_would_not_follow():
    assert "cannot be told by scores" in _refused(
        _sentencepiece_like([("a", "b"), ("▁", "a"), ("▁", "ab")])
    )
    assert "one rank of '▁ab'" in _refused(
        _sentencepiece_like([("a", "b"), ("▁", "a"), ("▁", "ab"), ("c", "d"), ("▁a", "b")])
    )
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert "got Punctuation and ByteLevel" in _refused(tokenizer)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    assert "expected BPE, got WordLevel" in _refused(words)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(80)])
    assert "expected ids below the model's 320" in _refused(tokenizer)


def test_rules_for_words():
    from halfbyte.integrations.gguf_tokenizer import _words_rule

    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    for steps, name in (([level], "gpt-2"), ([digits, level], "smollm")):
        sequence = {"type": "Sequence", "pretokenizers": steps}
        assert _words_rule({"normalizer": None, "pre_tokenizer": sequence}) == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"format": "onnx"}, "--format: expected gguf, got 'onnx'"),
        ({"type": "q5_k"}, "--type: expected one of f16, q8_0, q4_0, got 'q5_k'"),
        ({"out": "m.bin"}, "expected the name of a .gguf file"),
        ({"out": "there.gguf"}, "exists already; pass --overwrite"),
        ({"base": "absent"}, "base absent: no such folder"),
        ({"adapter": "absent"}, "adapter absent: no such folder"),
        ({"adapter-only": ""}, "--adapter-only: expected --adapter, and no --modelfile"),
        ({"base": "biased"}, "attention_bias: expected False, got True"),
        ({"base": "other"}, "expected a model of llama or mistral, got qwen2"),
    ],
)
def test_mistakes(files, monkeypatch, flags, message):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    monkeypatch.chdir(files)
    (files / "there.gguf").touch()
    if flags.get("base") == "biased":
        save_base(files / "biased", attention_bias=True, **SHAPE)
    if flags.get("base") == "other":
        Qwen2ForCausalLM(
            Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1)
        ).save_pretrained(files / "other")  # fmt: skip
    flags = {"base": "base", "out": "m.gguf"} | flags
    arguments = [x for k, v in flags.items() for x in ([f"--{k}", v] if v != "" else [f"--{k}"])]
    assert message in error("export", *arguments)
    assert not (files / "m.gguf").exists()
