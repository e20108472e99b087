"""One text, two tokenizers: which tokens of a source say something about a token of the target.

Both cut the same completion. A target token takes the distribution of the source token that starts
at the same character, if that token's piece begins with the target's own: up to there both have
read the same text, and what follows begins alike. This module knows tokenizers, but no model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from graftkit.errors import CheckpointError
from graftkit.rows import Row, encode_prompt

UNKNOWN = -1  # no token, no span

Span = tuple[int, int]
"""Characters of a text, from and to."""


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a completion.

    Attributes:
        ids: EOS last, where the tokenizer has one.
        spans: characters of each token of the text, without EOS; they cover what a tokenizer
            leaves out of its offsets, such as blanks. The bytes of one character may be several
            tokens, with the same span.
        length: characters of the text.
    """

    ids: list[int]
    spans: list[Span]
    length: int


def tokenize_completion(tokenizer: Any, text: str) -> TokenizedText:
    """Cut a completion as `graftkit.rows.encode_row` does.

    Raises: CheckpointError for a tokenizer that does not tell where its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{getattr(tokenizer, 'name_or_path', 'tokenizer')}: does not tell where its tokens "
            "lie in a text; save it with a tokenizer.json"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(found["input_ids"]), []
    end = 0
    for own_start, own_end in found["offset_mapping"]:
        start = min(own_start, end)
        end = max(own_end, end)
        spans.append((start, end))
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return TokenizedText(ids, spans, len(text))


def read_as_source(
    tokenizer: Any, row: Row, chat: bool, vocabulary: int
) -> tuple[list[int], TokenizedText]:
    """What a source reads of a row: the prompt's tokens and the completion's.

    Args:
        chat: the prompt is a user's turn of its chat template. vocabulary: embeddings of the model.
    Raises: CheckpointError where there is no usable template, or a token without an embedding.
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
    """For every token of the target that of the source that starts with it, else UNKNOWN.

    Args:
        vocabulary: target id of every source id, from `map_vocabulary`.
    """
    known = {place: index for index, place in enumerate(_places(source))}
    found = np.full(len(target.ids), UNKNOWN)
    for index, place in enumerate(_places(target)):
        other = known.get(place)
        if other is not None and vocabulary[source.ids[other]] == target.ids[index]:
            found[index] = other
    return found


def _places(tokens: TokenizedText) -> list[tuple[int, int]]:
    """Where each token starts: the character, and how many tokens started there before."""
    starts = [start for start, _ in tokens.spans]
    starts += [tokens.length] * (len(tokens.ids) - len(starts))
    seen: Counter[int] = Counter()
    places = []
    for start in starts:
        places.append((start, seen[start]))
        seen[start] += 1
    return places


def span_pools(source: Sequence[Span], target: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The smallest spans of text whose ends are borders in both: for every token its span's number.

    Numbers rise from 0, and each has a token on both sides. UNKNOWN behind the last common border.
    """
    ends = _borders(source), _borders(target)
    common = sorted(ends[0].keys() & ends[1].keys())
    return _numbers(ends[0], common, len(source)), _numbers(ends[1], common, len(target))


def _borders(spans: Sequence[Span]) -> dict[int, int]:
    """Characters where a token ends and none goes across: the tokens up to there."""
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
    """Target id of every source id, int64 (size,); UNKNOWN where there is none.

    The same piece, else the longest piece of the target that the source's begins with: whoever
    writes "12" or "words" writes "1" or "word" first. One vocabulary for both is left as it is.

    Args:
        source, target: tokenizers. size: logits of the source.
        ends: further source ids that end a text, such as the end of a turn.
    """
    if source.get_vocab() == target.get_vocab():
        same = np.arange(size)
        return np.where(same < len(target), same, UNKNOWN)
    pieces = {piece: token for token, piece in _pieces(target)}
    found = np.full(size, UNKNOWN)
    for token, piece in _pieces(source):
        if token < size:
            prefixes = (piece[:length] for length in range(len(piece), 0, -1))
            found[token] = next((pieces[p] for p in prefixes if p in pieces), UNKNOWN)
    if target.eos_token_id is not None:
        found[[end for end in {*ends, source.eos_token_id} if end in range(size)]] = (
            target.eos_token_id
        )
    return found


def _pieces(tokenizer: Any) -> list[tuple[int, bytes]]:
    """The bytes that every token stands for, highest id first; special tokens are left out."""
    spell = _spell_bytes if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else _spell
    special = set(tokenizer.all_special_ids)
    entries = sorted(((token, piece) for piece, token in tokenizer.get_vocab().items()))
    return [(token, spell(piece)) for token, piece in reversed(entries) if token not in special]


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level vocabularies (GPT-2): printable bytes as they are, others moved."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (byte for byte in range(256) if byte not in plain)
    letters = {chr(256 + index): byte for index, byte in enumerate(moved)}
    return letters | {chr(byte): byte for byte in plain}


_LETTERS = _byte_letters()


def _spell_bytes(piece: str) -> bytes:
    if all(letter in _LETTERS for letter in piece):
        return bytes(_LETTERS[letter] for letter in piece)
    return piece.encode()  # an added token is written as it is


def _spell(piece: str) -> bytes:
    """A piece of SentencePiece: ▁ for a blank, <0xE6> for a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode(errors="replace")
