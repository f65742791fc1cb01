"""Token ids and labels: the loss is on completions only, token by token."""

import pytest

from halfbyte.finetune.data import read_rows
from halfbyte.finetune.encode import (
    IGNORED,
    encode_row,
    encode_rows,
    prepare_tokenizer,
    render_prompt,
)
from halfbyte.finetune.errors import FinetuneError
from tiny_model import CHATML, END, build_tokenizer, write_jsonl


def _row(tmp_path, content):
    return read_rows(write_jsonl(tmp_path / "rows.jsonl", [content]))[0]


def _learned(sample, tokenizer) -> str:
    """The labelled tokens as text, unlabelled stretches as '~'."""
    pieces, hidden = [], False
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        if label == IGNORED:
            if not hidden:
                pieces.append("~")
            hidden = True
        else:
            assert label == token
            pieces.append(tokenizer.decode([token]))
            hidden = False
    return "".join(pieces)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


def test_prompt_completion_goes_through_the_chat_template(tmp_path, tokenizer):
    row = _row(tmp_path, {"prompt": "What colour?", "completion": "It is red."})
    sample = encode_row(row, tokenizer)
    assert tokenizer.decode(sample.input_ids) == (
        "<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nIt is red.<|im_end|>\n"
    )
    # The end token is learned, the newline behind it is not.
    assert _learned(sample, tokenizer) == "~It is red.<|im_end|>~"


def test_exact_labels(tmp_path, tokenizer):
    sample = encode_row(_row(tmp_path, {"prompt": "What", "completion": "red"}), tokenizer)
    prompt, special = render_prompt("What", tokenizer)
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    answer_ids = tokenizer("red<|im_end|>", add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert sample.input_ids == prompt_ids + answer_ids + newline
    assert sample.labels == [IGNORED] * len(prompt_ids) + answer_ids + [IGNORED]


def test_every_assistant_turn_is_learned(tmp_path, tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        _user("red"), _assistant("red"), _user("red"), _assistant("no,\nblue"),
    ]  # fmt: skip
    sample = encode_row(_row(tmp_path, {"messages": messages}), tokenizer)
    assert _learned(sample, tokenizer) == "~red<|im_end|>~no,\nblue<|im_end|>~"


def test_a_conversation_may_open_with_the_assistant(tmp_path, tokenizer):
    messages = [_assistant("hello red"), _user("blue"), _assistant("green")]
    sample = encode_row(_row(tmp_path, {"messages": messages}), tokenizer)
    assert _learned(sample, tokenizer) == "~hello red<|im_end|>~green<|im_end|>~"


def test_text_is_learned_whole_but_for_the_first_token(tmp_path, tokenizer):
    sample = encode_row(_row(tmp_path, {"text": "The red thing."}), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "The red thing.<|im_end|>"
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]


def test_without_a_template_prompt_and_completion_are_joined(tmp_path):
    plain = build_tokenizer(template=None)
    row = _row(tmp_path, {"prompt": "Colour:", "completion": " red \U0001f534"})
    for sample in (
        encode_row(row, plain),
        encode_row(row, build_tokenizer(), chat_template=False),
    ):
        assert plain.decode(sample.input_ids) == "Colour: red \U0001f534<|im_end|>"
        labels = [label for label in sample.labels if label != IGNORED]
        assert plain.decode(labels) == " red \U0001f534<|im_end|>"


def test_messages_need_a_template(tmp_path):
    row = _row(tmp_path, {"messages": [_user("a"), _assistant("b")]})
    with pytest.raises(FinetuneError, match="line 1: `messages` need a chat template"):
        encode_row(row, build_tokenizer(template=None))


def test_a_template_that_refuses_a_row_is_a_plain_error(tmp_path):
    refusing = build_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    row = _row(tmp_path, {"messages": [_user("a"), _assistant("b")]})
    with pytest.raises(FinetuneError, match="line 1: the chat template refuses it: roles must alt"):
        encode_row(row, refusing)


# A template that shows reasoning only in the last assistant turn, as some model families do.
THINKING = CHATML.replace(
    "message['content'] ",
    "('<think></think>' if loop.last and message['role'] == 'assistant' else '') "
    "+ message['content'] ",
)


def test_a_template_that_rewrites_earlier_turns_still_gets_their_tokens_right(tmp_path):
    thinking = build_tokenizer(template=THINKING)
    messages = [_user("red"), _assistant("blue"), _user("pink"), _assistant("grey")]
    sample = encode_row(_row(tmp_path, {"messages": messages}), thinking)
    assert _learned(sample, thinking) == "~blue<|im_end|>~<think></think>grey<|im_end|>~"


def test_a_template_that_hides_a_turn_is_refused(tmp_path):
    hiding = CHATML.replace("message['content'] ", "('' if loop.first else message['content']) ")
    messages = [_assistant("blue"), _user("pink"), _assistant("grey")]
    with pytest.raises(FinetuneError, match=r"`messages\[0\]`: the chat template does not show"):
        encode_row(_row(tmp_path, {"messages": messages}), build_tokenizer(template=hiding))


def _long_rows(tmp_path):
    short = {"prompt": "red", "completion": "blue"}
    long_answer = {"prompt": "red", "completion": "blue " * 40}
    long_prompt = {"prompt": "red " * 40, "completion": "blue"}
    return read_rows(write_jsonl(tmp_path / "rows.jsonl", [short, long_answer, long_prompt]))


def test_a_long_row_is_an_error_that_names_line_and_length(tmp_path, tokenizer):
    rows = _long_rows(tmp_path)
    length = len(encode_row(rows[1], tokenizer).input_ids)
    assert length > 32
    with pytest.raises(FinetuneError) as caught:
        encode_rows(rows, tokenizer, max_length=32)
    assert str(caught.value) == (
        f"rows.jsonl, line 2: {length} tokens, expected at most 32 (and 1 more rows); "
        "raise --max-length, or pass --truncate or --skip-long"
    )


def test_skip_and_truncate(tmp_path, tokenizer):
    rows = _long_rows(tmp_path)
    skipped = encode_rows(rows, tokenizer, max_length=32, long_samples="skip")
    assert [sample.row.line for sample in skipped.samples] == [1]
    assert (skipped.skipped, skipped.truncated) == (2, 0)
    cut = encode_rows(rows, tokenizer, max_length=32, long_samples="truncate")
    # Line 3 keeps nothing to learn and is left out.
    assert [sample.row.line for sample in cut.samples] == [1, 2]
    assert (cut.skipped, cut.truncated) == (1, 1)
    assert len(cut.samples[1].input_ids) == len(cut.samples[1].labels) == 32
    exact = len(cut.samples[0].input_ids)
    assert encode_rows(rows[:1], tokenizer, max_length=exact).skipped == 0


def test_no_row_left(tmp_path, tokenizer):
    with pytest.raises(FinetuneError, match="no row is left: all 3 are longer"):
        encode_rows(_long_rows(tmp_path), tokenizer, max_length=4, long_samples="skip")


def test_pad_token():
    same = build_tokenizer(pad=END)
    prepare_tokenizer(same)
    assert same.pad_token_id == same.eos_token_id
    lacking = build_tokenizer(pad=None)
    prepare_tokenizer(lacking)
    assert lacking.pad_token == END
    with pytest.raises(FinetuneError, match="neither a pad token nor an end-of-sequence token"):
        prepare_tokenizer(build_tokenizer(pad=None, eos=None))
