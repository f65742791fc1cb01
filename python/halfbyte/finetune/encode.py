"""Rows -> token ids and labels, with the loss on completions only.

A row is rendered to one text and the spans of it that are answers; the text is tokenized once,
and a token carries a label exactly if it overlaps a span:

    form       text                                     spans
    messages   chat template                            every assistant turn, its end token included
    prompt     chat template (as one user and one       the completion, its end token included
               assistant turn), or prompt + completion
               + eos without a template
    text       text + eos                               everything

Labels of all other tokens are -100 (ignored by the loss). Padding is added per batch and masked
by the attention mask, so a pad token that equals eos never hides a real eos.
"""

import re
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from halfbyte.finetune.data import Row
from halfbyte.finetune.errors import FinetuneError

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """input_ids [T] and labels [T] (the id where it is learned, -100 elsewhere)."""

    row: Row
    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """Tokens that carry a loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class EncodedRows:
    """Samples and what happened to the rows that were too long."""

    samples: list[Sample] = field(default_factory=list)
    truncated: int = 0
    skipped: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def learned(self) -> int:
        """Tokens that carry a loss."""
        return sum(sample.learned for sample in self.samples)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token if it lacks one, and check that offsets can be had."""
    if not tokenizer.is_fast:
        raise FinetuneError(
            f"tokenizer: expected one that reports offsets, got {type(tokenizer).__name__}; "
            "save the model with a tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise FinetuneError(
                "tokenizer: it has neither a pad token nor an end-of-sequence token; set "
                "`pad_token` and `eos_token` in the model's tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token


def encode_rows(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    long_samples: str = "error",
    chat_template: bool = True,
) -> EncodedRows:
    """Tokenize all rows; rows over `max_length` raise, are cut or are left out.

    Raises FinetuneError naming the line and its length, before anything heavy is done.
    """
    encoded = EncodedRows()
    too_long = []
    for row in rows:
        sample = encode_row(row, tokenizer, chat_template=chat_template)
        if len(sample.input_ids) > max_length:
            too_long.append(sample)
            if long_samples != "truncate":
                continue
            sample = Sample(row, sample.input_ids[:max_length], sample.labels[:max_length])
        if sample.learned:
            encoded.samples.append(sample)
        elif len(sample.input_ids) == max_length:
            encoded.skipped += 1
        else:
            raise FinetuneError(f"{row.place}: expected a token to learn, got none")
    if too_long and long_samples == "error":
        more = f" (and {len(too_long) - 1} more rows)" if len(too_long) > 1 else ""
        raise FinetuneError(
            f"{too_long[0].row.place}: {len(too_long[0].input_ids)} tokens, expected at most "
            f"{max_length}{more}; raise --max-length, or pass --truncate or --skip-long"
        )
    if long_samples == "truncate":
        encoded.truncated = len(too_long) - encoded.skipped
    else:
        encoded.skipped = len(too_long)
    if not encoded.samples:
        raise FinetuneError(
            f"{rows[0].file}: no row is left: all {len(rows)} are longer than --max-length "
            f"{max_length}"
        )
    return encoded


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True
) -> Sample:
    """Tokenize one row and label the tokens of its answers (never token 0: nothing predicts it)."""
    text, spans, special = _render(row, tokenizer, chat_template)
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    labels = [IGNORED] * len(ids)
    for first, last in spans:
        inside = [
            index
            for index, (start, end) in enumerate(encoding["offset_mapping"])
            if start < last and end > first and start < end
        ]
        # A template may put a newline after the end-of-turn token; nothing follows it when the
        # model answers, so it is not learned.
        ends = [index for index in inside if ids[index] == tokenizer.eos_token_id]
        for index in inside:
            if index > 0 and (not ends or index <= ends[-1]):
                labels[index] = ids[index]
    return Sample(row, ids, labels)


def render_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True
) -> tuple[str, bool]:
    """(text to be completed, whether special tokens are still to be added)."""
    if tokenizer.chat_template and chat_template:
        return _chat([{"role": "user", "content": prompt}], tokenizer, True), False
    return prompt, True


def _render(
    row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> tuple[str, list[tuple[int, int]], bool]:
    """(text, answer spans in characters, whether special tokens are still to be added)."""
    eos = tokenizer.eos_token or ""
    if row.form == "text":
        text = row.content["text"]
        text = text if eos and text.endswith(eos) else text + eos
        return text, [(0, len(text))], True
    if row.form == "prompt" and not (tokenizer.chat_template and chat_template):
        prompt, completion = row.content["prompt"], row.content["completion"]
        text = prompt + completion
        text = text if eos and text.endswith(eos) else text + eos
        return text, [(len(prompt), len(text))], True
    if row.form == "prompt":
        messages = [
            {"role": "user", "content": row.content["prompt"]},
            {"role": "assistant", "content": row.content["completion"]},
        ]
    else:
        messages = row.content["messages"]
    if not tokenizer.chat_template:
        raise FinetuneError(
            f"{row.place}: `messages` need a chat template and the model has none; add a "
            "chat_template.jinja to its folder, or write `prompt` + `completion` rows"
        )
    try:
        text, spans = _chat_spans(messages, tokenizer)
    except FinetuneError as error:
        raise FinetuneError(f"{row.place}: {error}") from None
    except Exception as error:  # Jinja templates raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FinetuneError(f"{row.place}: the chat template refuses it: {reason}") from None
    return text, spans, False


def _chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase, open_answer: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=open_answer
    )


def _chat_spans(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find each assistant turn in it: (text, character spans)."""
    text = _chat(messages, tokenizer, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            spans.append(_turn_span(text, messages, index, tokenizer))
    return text, spans


def _turn_span(
    text: str, messages: list[dict], index: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """The characters of assistant turn `index` in the rendered conversation `text`.

    They lie between the end of render(messages[:index] + open answer) and the end of
    render(messages[:index + 1]). Some templates render a turn differently once others follow
    (they drop the reasoning); then it is the turn's own content and the eos behind it.
    """
    content = messages[index]["content"].strip()
    before = _chat(messages[:index], tokenizer, True) if index else ""
    through = _chat(messages[: index + 1], tokenizer, False)
    start, end = _common_prefix(before, text), _common_prefix(through, text)
    if index and _squeeze(content) in _squeeze(text[start:end]):
        return start, end
    start = text.find(content, start) if start == len(before) else -1
    if start < 0:
        raise FinetuneError(
            f"`messages[{index}]`: the chat template does not show this turn as written, so its "
            "tokens cannot be told apart; write one row a turn"
        )
    end = start + len(content)
    eos = re.compile(r"\s*" + re.escape(tokenizer.eos_token or "")).match(text, end)
    return start, eos.end() if eos else end


def _common_prefix(left: str, right: str) -> int:
    if right.startswith(left):
        return len(left)
    return next(
        i for i, (a, b) in enumerate(zip(left + "\0", right + "\1", strict=False)) if a != b
    )


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)
