"""Rows of text on which a model is calibrated and measured.

A `rows.jsonl` file holds one JSON object a line, {"prompt": str, "completion": str}. The model sees
prompt + completion + EOS. This module knows files and tokenizers, but no model.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.errors import RowsError

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
    """One prompt and the completion that belongs to it; a completion starts with one blank."""

    prompt: str
    completion: str
    origin: str = field(default="a row", compare=False)
    """Where the row was read, such as rows.jsonl:12; error messages name it."""


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """Read every row of a rows.jsonl file; extra keys and blank lines are ignored.

    Raises: RowsError with file and line when the file is missing, empty or not UTF-8, when a line
        is no JSON object, or when its prompt or completion is missing or no string.
    """
    rows = [
        Row(text_field(record, "prompt", origin), text_field(record, "completion", origin), origin)
        for record, origin in read_records(path)
    ]
    if not rows:
        raise RowsError(
            f"{path}: the file holds no rows; expected one JSON object a line, "
            '{"prompt": "...", "completion": "..."}'
        )
    return tuple(rows)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a rows.jsonl file; rows without a completion will do.

    Raises: RowsError with file and line when the file is missing, empty or not UTF-8, when a line
        is no JSON object, or when its prompt is missing or no string.
    """
    prompts = tuple(text_field(record, "prompt", origin) for record, origin in read_records(path))
    if not prompts:
        raise RowsError(f'{path}: the file holds no rows; expected one {{"prompt": "..."}} a line')
    return prompts


def read_records(path: str | Path) -> Iterator[tuple[dict[str, object], str]]:
    """The objects of a JSON Lines file, each with its place, such as rows.jsonl:12.

    Raises: RowsError with file and line when the file is missing or not UTF-8, or a line is no JSON
        object.
    """
    for number, line in enumerate(_lines(Path(path)), start=1):
        if line.strip():
            origin = f"{path}:{number}"
            yield _parse_line(line, origin), origin


def rows_digest(path: str | Path) -> str:
    """BLAKE3 of the file's bytes, 64 hexadecimal digits. Raises: RowsError if it is unreadable."""
    return blake3(_read_bytes(Path(path))).hexdigest()


def encode_row(
    tokenizer: Tokenizer, row: Row, max_tokens: int | None = None
) -> tuple[list[int], int]:
    """Token ids of prompt + completion + EOS, and the index where the completion starts.

    The prompt carries the special tokens of the tokenizer, the completion none; EOS is left out
    where the tokenizer has none. The two are tokenized apart, so that a generation which starts
    from the prompt sees exactly the ids that a completion was scored after.

    Raises: RowsError when the row has more than `max_tokens` tokens.
    """
    prompt = encode_prompt(tokenizer, row)
    ids = prompt + tokenizer.encode(row.completion, add_special_tokens=False)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if max_tokens is not None and len(ids) > max_tokens:
        raise RowsError(
            f"{row.origin}: the row has {len(ids)} tokens ({len(prompt)} in the prompt), but the "
            f"model reads at most {max_tokens}; shorten the row or leave it out"
        )
    return ids, len(prompt)


def encode_prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """Token ids that a generation for this row starts from."""
    return list(tokenizer.encode(row.prompt, add_special_tokens=True))


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


def _lines(path: Path) -> list[bytes]:
    """Lines of the file, without the byte order mark that some editors write."""
    # Only LF ends a line of JSON Lines; str.splitlines would also cut inside a string at U+2028.
    return _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError as error:
        raise RowsError(f"{path}: a directory; expected a rows.jsonl file") from error
    except OSError as error:
        raise RowsError(
            f"{path}: cannot be read ({error.strerror}); expected a rows.jsonl file"
        ) from error


def _parse_line(line: bytes, origin: str) -> dict[str, object]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowsError(
            f"{origin}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RowsError(
            f"{origin}: not JSON ({error}); expected one object a line, "
            '{"prompt": "...", "completion": "..."}'
        ) from error
    if not isinstance(record, dict):
        raise RowsError(f"{origin}: {type(record).__name__} found; expected a JSON object")
    return record


def text_field(record: dict[str, object], key: str, origin: str) -> str:
    """A string of a record. Raises: RowsError where it is missing or no text."""
    if key not in record:
        keys = ", ".join(map(repr, sorted(record)[:5])) or "none"
        raise RowsError(f'{origin}: key "{key}" is missing (keys found: {keys}); add it')
    text = record[key]
    if not isinstance(text, str):
        raise RowsError(f'{origin}: "{key}" is {type(text).__name__}; expected a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowsError(
            f'{origin}: "{key}" holds half of a surrogate pair at character {error.start + 1}; '
            "write the whole character"
        ) from error
    return text
