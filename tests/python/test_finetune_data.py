"""JSONL rows: every way a line can be wrong, and the fixed split."""

from hashlib import sha256

import pytest

from halfbyte.finetune.data import read_rows, split_rows
from halfbyte.finetune.errors import FinetuneError
from tiny_model import write_jsonl

GOOD = '{"prompt": "a", "completion": "b"}\n'


def test_all_forms_are_read_and_blank_lines_skipped(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        GOOD
        + "\n"
        + '{"text": "c", "source": "ignored"}\n'
        + '{"messages": [{"role": "user", "content": "d"}, '
        + '{"role": "assistant", "content": "e\u2028f"}]}'
    )
    rows = read_rows(file)
    assert [(row.line, row.form) for row in rows] == [(1, "prompt"), (3, "text"), (4, "messages")]
    assert rows[2].content["messages"][1]["content"] == "e\u2028f"
    assert rows[0].place == "rows.jsonl, line 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "expected one JSON object, got {not json"),
        (b"[1, 2]", "expected one JSON object, got a list ([1, 2])"),
        (b'"text"', 'expected one JSON object, got text ("text")'),
        (b'{"text": "\xff"}', "expected UTF-8 text, got byte 0xff at 10"),
        (b"\x00\x00", r"expected one JSON object, got \x00\x00 (Expecting value at column 1)"),
        (b'{"text": "a\x00b"}', r'got {"text": "a\x00b"} (Invalid control character'),
        (b'{"text": "\\ud83d"}', r"expected text, got \ud83d, half of a character"),
        (b"[" * 99999, "(maximum recursion depth exceeded"),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "9999... (Exceeds the limit"),
        (b'"' + b"x" * 5_000_000, 'got "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... ('),
        (b'{"' + b"k" * 100_000 + b'": 1}', "kkk..."),
        (b"{}", "expected `messages`, `prompt` + `completion`, or `text`, got an empty object"),
        (b'{"input": "a"}', "or `text`, got 'input'"),
        (b'{"prompt": "a"}', "got no `completion`"),
        (b'{"completion": "a"}', "got no `prompt`"),
        (b'{"prompt": 1, "completion": "a"}', "`prompt`: expected text, got a number (1)"),
        (b'{"prompt": "a", "completion": " "}', "`completion`: expected text, got an empty one"),
        (b'{"text": null}', "`text`: expected text, got null"),
        (b'{"messages": []}', "`messages`: expected a list of messages, got a list ([])"),
        (b'{"messages": {"role": "user"}}', "`messages`: expected a list of messages, got an obj"),
        (b'{"messages": ["hi"]}', "`messages[0]`: expected `role` and `content`, got text"),
        (
            b'{"messages": [{"role": "bot", "content": "a"}]}',
            "`messages[0]`: `role`: expected one of system, developer, user, assistant, tool, "
            "got 'bot'",
        ),
        (
            b'{"messages": [{"role": "user", "content": ["a"]}]}',
            "`messages[0]`: `content`: expected text, got a list",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "expected an assistant message to learn from, got roles user",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected_and_what_came(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD.encode() + line + b"\n")
    with pytest.raises(FinetuneError) as caught:
        read_rows(file)
    assert str(caught.value).startswith("rows.jsonl, line 2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_empty_and_folder(tmp_path):
    with pytest.raises(FinetuneError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(FinetuneError, match="got a folder"):
        read_rows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(FinetuneError, match="at least one row, got an empty file"):
        read_rows(tmp_path / "empty.jsonl")


def _rows(tmp_path, prompts):
    rows = [{"prompt": prompt, "completion": str(i)} for i, prompt in enumerate(prompts)]
    return read_rows(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_split_is_fixed_and_by_prompt(tmp_path):
    prompts = [f"question {i % 100}" for i in range(200)]  # every prompt twice
    train, held_out = split_rows(_rows(tmp_path, prompts), 0.2)
    assert len(train) + len(held_out) == 200
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    expected = {p for p in prompts if int(sha256(p.encode()).hexdigest()[:16], 16) < 0.2 * 2**64}
    assert {row.prompt for row in held_out} == expected
    assert "question 13" in expected  # the hash fixes the membership for good
    grown, grown_held_out = split_rows(_rows(tmp_path, ["new question", *prompts]), 0.2)
    assert {row.prompt for row in held_out} <= {row.prompt for row in grown_held_out}
    assert {row.prompt for row in train} <= {row.prompt for row in grown}


def test_messages_with_the_same_opening_stay_together(tmp_path):
    def row(answer):
        user = {"role": "user", "content": "same"}
        return {"messages": [user, {"role": "assistant", "content": answer}]}

    rows = read_rows(write_jsonl(tmp_path / "rows.jsonl", [row("a"), row("b")]))
    assert rows[0].prompt == rows[1].prompt


def test_split_holds_out_at_least_one_prompt_and_leaves_one(tmp_path):
    train, held_out = split_rows(_rows(tmp_path, ["a", "b"]), 1e-9)
    assert len(train) == len(held_out) == 1
    train, held_out = split_rows(_rows(tmp_path, ["a", "b"]), 0.0)
    assert (len(train), len(held_out)) == (2, 0)
    with pytest.raises(FinetuneError, match="at least two different prompts, got 1"):
        split_rows(_rows(tmp_path, ["a", "a"]), 0.5)
