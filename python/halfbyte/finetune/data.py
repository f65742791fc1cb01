"""JSONL rows, checked line by line, and the fixed split into training and held-out rows.

A row is one JSON object with one of

    messages            [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]
    prompt, completion  two texts
    text                one text

other keys are ignored, blank lines are skipped. `encode.py` turns rows into token ids.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.finetune.errors import FinetuneError

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = "`messages`, `prompt` + `completion`, or `text`"


@dataclass(frozen=True)
class Row:
    """One row of a JSONL file.

    form     "messages", "prompt" or "text"
    content  the row's JSON object, checked
    """

    file: Path
    line: int
    form: str
    content: dict[str, Any]

    @property
    def place(self) -> str:
        """Where the row stands, for messages to a person."""
        return f"{self.file.name}, line {self.line}"

    @property
    def prompt(self) -> str:
        """What comes before the first answer; rows that share it stay on one side of a split."""
        if self.form == "prompt":
            return self.content["prompt"]
        if self.form == "text":
            return self.content["text"]
        opening = []
        for message in self.content["messages"]:
            if message["role"] == "assistant":
                break
            opening.append(message)
        return json.dumps(opening, sort_keys=True, ensure_ascii=False)


def read_rows(path: Path) -> list[Row]:
    """Read and check a JSONL file. Raises FinetuneError at the first line that does not fit."""
    if not path.exists():
        raise FinetuneError(f"{path}: no such file")
    if not path.is_file():
        raise FinetuneError(f"{path}: expected a JSONL file, got a folder")
    rows = []
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                rows.append(_parse_row(path, line, raw))
    if not rows:
        raise FinetuneError(f"{path}: expected at least one row, got an empty file")
    return rows


def split_rows(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): a row is held out if sha256(prompt) < fraction * 2^64.

    The split depends on nothing but each row's prompt: adding rows moves no other row, and equal
    prompts are never on both sides. If no hash is that small, the smallest one is held out.
    """
    if fraction == 0.0:
        return rows, []
    hashes = [_hash(row.prompt) for row in rows]
    limit = max(fraction * 2.0**64, min(hashes))
    train = [row for row, value in zip(rows, hashes, strict=True) if value > limit]
    held_out = [row for row, value in zip(rows, hashes, strict=True) if value <= limit]
    if not train:
        raise FinetuneError(
            f"{rows[0].file}: holding out a part needs at least two different prompts, "
            f"got {len(set(hashes))}; pass --eval-data or --eval-fraction 0"
        )
    return train, held_out


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def _parse_row(path: Path, line: int, raw: bytes) -> Row:
    place = f"{path.name}, line {line}"
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FinetuneError(
            f"{place}: expected UTF-8 text, got byte 0x{raw[error.start]:02x} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise FinetuneError(
            f"{place}: expected one JSON object, got {_shorten(raw.decode('utf-8-sig').strip())}"
            f" ({error.msg} at column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise FinetuneError(
            f"{place}: expected one JSON object, got {_shorten(raw.decode('utf-8-sig').strip())}"
            f" ({_shorten(str(error), 80)})"
        ) from None
    if not isinstance(content, dict):
        raise FinetuneError(f"{place}: expected one JSON object, got {_kind(content)}")
    _check_surrogates(place, raw, content)
    if "messages" in content:
        _check_messages(place, content["messages"])
        return Row(path, line, "messages", content)
    if "prompt" in content or "completion" in content:
        _check_text(place, content, "prompt")
        _check_text(place, content, "completion")
        return Row(path, line, "prompt", content)
    if "text" in content:
        _check_text(place, content, "text")
        return Row(path, line, "text", content)
    keys = _shorten(", ".join(map(repr, content)), 80) or "an empty object"
    raise FinetuneError(f"{place}: expected {FORMS}, got {keys}")


def _check_surrogates(place: str, raw: bytes, content: dict) -> None:
    """JSON can escape half of a character (\\ud83d alone), which is no text."""
    if b"\\ud" not in raw.lower():
        return
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise FinetuneError(f"{place}: expected text, got {half}, half of a character") from None


def _check_text(place: str, content: dict, key: str) -> None:
    value = content.get(key)
    if key not in content:
        raise FinetuneError(f"{place}: expected {FORMS}, got no `{key}`")
    if not isinstance(value, str):
        raise FinetuneError(f"{place}: `{key}`: expected text, got {_kind(value)}")
    if not value.strip():
        raise FinetuneError(f"{place}: `{key}`: expected text, got an empty one")


def _check_messages(place: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise FinetuneError(
            f"{place}: `messages`: expected a list of messages, got {_kind(messages)}"
        )
    for index, message in enumerate(messages):
        where = f"{place}: `messages[{index}]`"
        if not isinstance(message, dict):
            raise FinetuneError(f"{where}: expected `role` and `content`, got {_kind(message)}")
        if message.get("role") not in ROLES:
            raise FinetuneError(
                f"{where}: `role`: expected one of {', '.join(ROLES)}, got "
                f"{_shorten(repr(message.get('role')))}"
            )
        if not isinstance(message.get("content"), str):
            raise FinetuneError(
                f"{where}: `content`: expected text, got {_kind(message.get('content'))}"
            )
    answers = [m for m in messages if m["role"] == "assistant" and m["content"].strip()]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise FinetuneError(
            f"{place}: `messages`: expected an assistant message to learn from, got roles {roles}"
        )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean"}
    name = names.get(type(value), "a number")
    return f"{name} ({_shorten(json.dumps(value, ensure_ascii=False))})"


def _shorten(text: str, length: int = 40) -> str:
    """At most `length` characters, those that do not print as escapes."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
