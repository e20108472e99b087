"""Rows of text on which a model is calibrated, trained and measured, as tokens.

A row comes in one of three formats. What counts in a loss is scored, everything else is context:

prompt_completion  the model sees prompt + completion + EOS; the completion and EOS are scored
messages           a conversation in the model's chat template; the assistant's turns are scored
text               the model sees text + EOS; every token is scored

This module knows tokenizers, but no model.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from graftkit.errors import RowsError
from graftkit.rows.chat import encode_conversation, parse_messages

RowFormat = Literal["prompt_completion", "messages", "text"]
_Item = TypeVar("_Item")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text, None where the vocabulary has none."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of one text."""


@dataclass(frozen=True)
class Row:
    """One row. Without further arguments it is a prompt and its completion, which starts with one
    blank; `of_messages` and `of_text` make the others.

    Attributes:
        prompt: plain text, by which a router chooses packs; of messages the last turn of the user
            that the assistant answers, of a text nothing.
        completion: of messages the assistant's last words; of a text the text.
        origin: where the row was read, such as rows.jsonl:12; error messages name it.
        conversation: of messages, JSON of `messages` and `tools`.
    """

    prompt: str
    completion: str
    origin: str = field(default="a row", compare=False)
    format: RowFormat = "prompt_completion"
    conversation: str = ""

    @classmethod
    def of_text(cls, text: str, origin: str = "a row") -> Self:
        """A text of which every token is scored."""
        return cls("", text, origin, "text")

    @classmethod
    def of_messages(
        cls, messages: Any, tools: Any = None, origin: str = "a row", *, answered: bool = True
    ) -> Self:
        """A conversation: [{"role": ..., "content": ...}, ...], and the tools it may call.

        Args:
            answered: whether a turn of the assistant has to follow one of another role.
        Raises: RowsError for messages that are none.
        """
        turns, tools = parse_messages(messages, tools, origin)
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if answered and last is None:
            raise RowsError(
                f"{origin}: no message of the assistant, and only those are scored; expected one"
            )
        if answered and all(turn["role"] == "assistant" for turn in turns[:last]):
            raise RowsError(
                f"{origin}: the conversation begins with the assistant; a prompt has to come first"
            )
        before = turns[:last] if answered else turns
        asked = [turn for turn in before if turn["role"] == "user"]
        conversation = {"messages": turns} | ({"tools": tools} if tools else {})
        return cls(
            prompt=asked[-1].get("content", "") if asked else "",
            completion="" if last is None else turns[last].get("content", ""),
            origin=origin,
            format="messages",
            conversation=json.dumps(conversation, ensure_ascii=False),
        )

    @property
    def content(self) -> list[str]:
        """What distinguishes this row from others; it can be written as JSON."""
        own = [self.prompt, self.completion]
        return own if self.format == "prompt_completion" else [*own, self.format, self.conversation]

    def single_turn(self) -> tuple[str, str]:
        """Prompt and completion. Raises: RowsError for a text and for other conversations."""
        roles = [turn["role"] for turn in self.turns]
        if self.format == "text" or roles not in ([], ["user"], ["user", "assistant"]):
            what = "a text" if self.format == "text" else f"the turns {', '.join(roles)}"
            raise RowsError(
                f"{self.origin}: {what}; expected one prompt, and at most one completion, because "
                "other models read them too"
            )
        return self.prompt, self.completion

    @property
    def turns(self) -> list[Mapping[str, Any]]:
        """The messages of a conversation; none in the other formats."""
        return list(json.loads(self.conversation)["messages"]) if self.conversation else []


@dataclass(frozen=True)
class EncodedRow:
    """Tokens of one row.

    Attributes:
        ids: all tokens, or the first ones.
        start: index of the first token that is scored; the number of tokens where none is.
        was_cut: the row had more tokens.
        skipped: spans (first, end) behind `start` that are not scored: the turns between two of the
            assistant, and what follows the last.
    """

    ids: list[int]
    start: int
    was_cut: bool = False
    skipped: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scored(self) -> list[bool]:
        """Whether each token is scored."""
        marks = [index >= self.start for index in range(len(self.ids))]
        for first, end in self.skipped:
            marks[first:end] = [False] * (min(end, len(marks)) - min(first, len(marks)))
        return marks

    @property
    def answer(self) -> tuple[int, int]:
        """The last span that is scored, (first, end)."""
        first, end = self.start, len(self.ids)
        for gap, gap_end in self.skipped:
            if gap_end == len(self.ids):
                end = gap
            else:
                first = gap_end
        return first, end

    def first_tokens(self, count: int) -> "EncodedRow":
        """The row cut to at most `count` tokens."""
        if len(self) <= count:
            return self
        skipped = tuple((first, min(end, count)) for first, end in self.skipped if first < count)
        return EncodedRow(self.ids[:count], min(self.start, count), True, skipped)


def encode_row(tokenizer: Tokenizer, row: Row, max_tokens: int | None = None) -> EncodedRow:
    """The tokens of a row.

    A prompt carries the special tokens of the tokenizer, a completion none. The two are tokenized
    apart, so that a generation which starts from the prompt sees exactly the ids that a completion
    was scored after. EOS ends completions and texts; it is left out where the tokenizer has none.
    A conversation has the special tokens that its template writes, and no others.

    Raises: RowsError when the row has more than `max_tokens` tokens, or its conversation cannot be
        written in the tokenizer's chat template, or the assistant's turns cannot be told from it.
    """
    encoded = _ENCODERS[row.format](tokenizer, row)
    if max_tokens is not None and len(encoded) > max_tokens:
        raise RowsError(
            f"{row.origin}: the row has {len(encoded)} tokens ({encoded.start} in the prompt), but "
            f"the model reads at most {max_tokens}; shorten the row or leave it out"
        )
    return encoded


def encode_prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """Token ids that a generation for this row starts from.

    Raises: RowsError for a text, which has no prompt, and for a conversation as in `encode_row`.
    """
    if row.format == "prompt_completion":
        return list(tokenizer.encode(row.prompt, add_special_tokens=True))
    check_answerable(row)
    encoded = encode_row(tokenizer, row)
    return encoded.ids[: encoded.answer[0]]


def check_answerable(row: Row) -> None:
    """Raises: RowsError for a text, which has no prompt that a model could answer."""
    if row.format == "text":
        raise RowsError(
            f"{row.origin}: a text has no prompt to answer; expected prompt and completion, or "
            "messages"
        )


def _encode_pair(tokenizer: Tokenizer, row: Row) -> EncodedRow:
    prompt = encode_prompt(tokenizer, row)
    ids = prompt + list(tokenizer.encode(row.completion, add_special_tokens=False))
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return EncodedRow(ids, len(prompt))


def _encode_text(tokenizer: Tokenizer, row: Row) -> EncodedRow:
    ids = list(tokenizer.encode(row.completion, add_special_tokens=True))
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return EncodedRow(ids, 0)


def _encode_messages(tokenizer: Tokenizer, row: Row) -> EncodedRow:
    written = json.loads(row.conversation)
    ids, spans = encode_conversation(
        tokenizer, written["messages"], written.get("tools"), row.origin
    )
    ends = [*(first for first, _ in spans[1:]), len(ids)]
    gaps = [(end, then) for (_, end), then in zip(spans, ends, strict=True) if end < then]
    return EncodedRow(ids, spans[0][0], skipped=tuple(gaps))


_ENCODERS: Mapping[RowFormat, Callable[[Any, Row], EncodedRow]] = {
    "prompt_completion": _encode_pair,
    "messages": _encode_messages,
    "text": _encode_text,
}


def sample_rows(
    rows: Sequence[_Item], tokens_limit: int, seed: int, length: Callable[[_Item], int]
) -> list[_Item]:
    """A random sample of at most `tokens_limit` tokens, but at least one row, in file order.

    The choice depends on `seed` and the number of rows only; where all fit, all are taken.

    Args:
        length: tokens of one row; called for the chosen rows and the first that is not chosen.
    """
    generator = random.Random(seed)
    # random() is promised to stay the same between Python versions, shuffle() is not.
    keys = [generator.random() for _ in rows]
    chosen: list[int] = []
    tokens = 0
    for index in sorted(range(len(rows)), key=keys.__getitem__):
        tokens += length(rows[index])
        if chosen and tokens > tokens_limit:
            break
        chosen.append(index)
    return [rows[index] for index in sorted(chosen)]


def batches_by_length(lengths: Sequence[int], tokens_limit: int) -> list[list[int]]:
    """Indices of rows of similar length, shortest first; every row is in one batch.

    A batch holds at most `tokens_limit` tokens after padding to its longest row; a longer row
    stands alone. Rows of one length keep their order, so the batches are deterministic.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens_limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_batch(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of one batch, both (rows, longest row) int64; mask 1 = real."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        span = slice(longest - len(row), longest) if left else slice(len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.int64)
        mask[index, span] = 1
    return ids, mask
