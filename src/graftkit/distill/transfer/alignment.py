"""Which token of a source predicts which token of the target, for the same text.

Both tokenizers cut the same completion. A target token takes the distribution of the source token
that starts at the same character, if that token's text begins with the target token's: both models
have read the same text, and the text that follows begins alike. This module uses tokenizers only.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from graftkit.errors import CheckpointError
from graftkit.rows import Row, encode_prompt

UNKNOWN = -1  # no token, or no span

Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a completion.

    Attributes:
        ids: the tokens, with EOS at the end if the tokenizer has one.
        spans: the characters of each token, without EOS. They include characters that the
            tokenizer leaves out of its offsets, such as blanks. Tokens that are bytes of one
            character have the same span.
        length: number of characters of the text.
    """

    ids: list[int]
    spans: list[Span]
    length: int


def tokenize_completion(tokenizer: Any, text: str) -> TokenizedText:
    """Tokenize a completion as `graftkit.rows.encode_row` does, with the place of every token.

    Raises: CheckpointError for a tokenizer that does not give offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{getattr(tokenizer, 'name_or_path', 'tokenizer')}: does not tell where its tokens "
            "lie in a text; save it with a tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(encoded["input_ids"]), []
    end = 0
    for token_start, token_end in encoded["offset_mapping"]:
        start = min(token_start, end)
        end = max(token_end, end)
        spans.append((start, end))
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return TokenizedText(ids, spans, len(text))


def read_as_source(
    tokenizer: Any, row: Row, chat: bool, vocabulary: int
) -> tuple[list[int], TokenizedText]:
    """A row as a source reads it: the prompt's tokens, and the completion's.

    Args:
        chat: whether the prompt is written as a user's turn in the source's chat template.
        vocabulary: number of embeddings of the source.
    Raises: CheckpointError for a template that is missing or fails, or an unknown token.
    """
    name = tokenizer.name_or_path
    if not chat:
        prompt = encode_prompt(tokenizer, row)
    elif not tokenizer.chat_template:
        raise CheckpointError(f"{name}: no chat template; set chat = false for this source")
    else:
        turns = [{"role": "user", "content": row.prompt}]
        try:
            prompt = list(
                tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            )
        except TemplateError as error:
            raise CheckpointError(
                f"{name}: the chat template fails ({error}); correct it, or set chat = false"
            ) from error
    completion = tokenize_completion(tokenizer, row.completion)
    largest = max(prompt + completion.ids, default=0)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{name}: gives token {largest}, but the model has {vocabulary} embeddings; use the "
            "tokenizer that belongs to this model"
        )
    return prompt, completion


def match_tokens(
    source: TokenizedText, target: TokenizedText, vocabulary: np.ndarray
) -> np.ndarray:
    """For every target token, the index of the source token that starts with it, else UNKNOWN.

    Args:
        vocabulary: target id of every source id, from `map_vocabulary`.
    """
    source_indices = {place: index for index, place in enumerate(_places(source))}
    matches = np.full(len(target.ids), UNKNOWN)
    for index, place in enumerate(_places(target)):
        other = source_indices.get(place)
        if other is not None and vocabulary[source.ids[other]] == target.ids[index]:
            matches[index] = other
    return matches


def _places(tokens: TokenizedText) -> list[tuple[int, int]]:
    """Where each token starts: the character, and the number of earlier tokens that start there."""
    starts = [start for start, _ in tokens.spans]
    starts += [tokens.length] * (len(tokens.ids) - len(starts))
    seen: Counter[int] = Counter()
    places = []
    for start in starts:
        places.append((start, seen[start]))
        seen[start] += 1
    return places


def span_pools(source: Sequence[Span], target: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The smallest spans of text that both tokenizers cut, as the span's number for every token.

    Numbers rise from 0, and every span has tokens of both. UNKNOWN after the last common border.
    """
    ends = _borders(source), _borders(target)
    common = sorted(ends[0].keys() & ends[1].keys())
    return _numbers(ends[0], common, len(source)), _numbers(ends[1], common, len(target))


def _borders(spans: Sequence[Span]) -> dict[int, int]:
    """The number of tokens up to every character where one ends and none crosses."""
    next_starts = [start for start, _ in spans[1:]] + [spans[-1][1]] if spans else []
    return {
        end: index + 1
        for index, ((_, end), start) in enumerate(zip(spans, next_starts, strict=True))
        if end <= start
    }


def _numbers(ends: dict[int, int], common: Sequence[int], tokens: int) -> list[int]:
    numbers: list[int] = []
    for number, character in enumerate(common):
        numbers += [number] * (ends[character] - len(numbers))
    return numbers + [UNKNOWN] * (tokens - len(numbers))


def map_vocabulary(source: Any, target: Any, size: int, ends: Iterable[int] = ()) -> np.ndarray:
    """Target id of every source id, int64 (size,); UNKNOWN if there is none.

    A source token maps to the target token of the same text, else to the longest one that its text
    begins with: who writes "12" or "words" writes "1" or "word" first. Equal vocabularies map to
    themselves.

    Args:
        source, target: tokenizers.
        size: number of logits of the source.
        ends: further source ids that end a text, such as the end of a turn.
    """
    if source.get_vocab() == target.get_vocab():
        same = np.arange(size)
        return np.where(same < len(target), same, UNKNOWN)
    pieces = {piece: token for token, piece in _pieces(target)}
    mapped = np.full(size, UNKNOWN)
    for token, piece in _pieces(source):
        if token < size:
            prefixes = (piece[:length] for length in range(len(piece), 0, -1))
            mapped[token] = next((pieces[p] for p in prefixes if p in pieces), UNKNOWN)
    if target.eos_token_id is not None:
        mapped[[end for end in {*ends, source.eos_token_id} if end in range(size)]] = (
            target.eos_token_id
        )
    return mapped


def _pieces(tokenizer: Any) -> list[tuple[int, bytes]]:
    """Id and bytes of every token, highest id first, without special tokens."""
    spell = _spell_bytes if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else _spell
    special = set(tokenizer.all_special_ids)
    entries = sorted(((token, piece) for piece, token in tokenizer.get_vocab().items()))
    return [(token, spell(piece)) for token, piece in reversed(entries) if token not in special]


def _byte_letters() -> dict[str, int]:
    """Byte of every letter of byte-level vocabularies (GPT-2), which move unprintable bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (byte for byte in range(256) if byte not in plain)
    letters = {chr(256 + index): byte for index, byte in enumerate(moved)}
    return letters | {chr(byte): byte for byte in plain}


_LETTERS = _byte_letters()


def _spell_bytes(piece: str) -> bytes:
    if all(letter in _LETTERS for letter in piece):
        return bytes(_LETTERS[letter] for letter in piece)
    return piece.encode()  # an added token


def _spell(piece: str) -> bytes:
    """Bytes of a token of SentencePiece: ▁ is a blank, <0xE6> a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode(errors="replace")
