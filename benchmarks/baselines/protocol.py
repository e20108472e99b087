"""What every baseline shares: one file within a budget, decoded from the target and itself alone.

A file has three parts. The vectors (norms, biases) are exact for everybody, the embedding comes
from embedding.py for everybody, and only the linear matrices are a method's own. How much of the
budget the embedding gets, and every free choice of a method, is decided by KL on calibration rows.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from baselines.embedding import decode_embedding
from baselines.problem import Problem, TargetSide
from graftkit.compress.exact import decode_exact, encode_exact

EMBEDDING_SHARES = (0.0, 0.05, 0.15, 0.30, 0.50, 0.70)
"""Shares of the room that the embedding may get; the best on the calibration rows wins."""

_MAGIC = b"GKB1"
_LENGTH = struct.Struct("<I")
_UNBOUNDED = 2**40
_START_SHARE = 2  # place in EMBEDDING_SHARES where the search begins


class UnreachableError(Exception):
    """No file of this method is as small as the budget."""


class Method(Protocol):
    """How one method stores the linear matrices."""

    name: str
    takes_rest: bool
    """Whether the matrices have one size only, so that the embedding gets all that is left."""

    draft: "Method | None"
    """A cheaper method on which shares and variants are compared, None for itself."""

    def variants(self) -> Sequence[Any]:
        """Free choices, the usual one first."""
        ...

    def encode(self, problem: Problem, room: int, variant: Any, embedding: bytes) -> bytes:
        """At most `room` bytes for all matrices. Raises: UnreachableError."""
        ...

    def decode(self, side: TargetSide, payload: bytes) -> dict[str, Tensor]:
        """δ̂ of every matrix, float32."""
        ...


def encode(method: Method, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
    """Write the best file of at most `budget_bytes`; None asks for the smallest linear part alone.

    Returns: what was chosen, for the record.
    Raises: UnreachableError saying what is too small.
    """
    vectors = encode_vectors(problem)
    fixed = len(_MAGIC) + 3 * _LENGTH.size + len(vectors)
    room = _UNBOUNDED if budget_bytes is None else budget_bytes - fixed
    if room <= 0:
        raise UnreachableError(f"norms and headers alone take {fixed:,} of {budget_bytes:,} bytes")
    search = _Search(method.draft or method, problem, vectors, room)
    if method.takes_rest:
        search.fill_rest()
    else:
        search.climb()
    content, choice = search.best()
    if method.draft is not None:
        search = _Search(method, problem, vectors, room)
        search.repeat(choice)
        content, choice = search.best()
    if budget_bytes is not None and len(content) > budget_bytes:
        raise AssertionError(f"{method.name}: {len(content):,} of {budget_bytes:,} bytes")
    file.write_bytes(content)
    return choice


def decode(method: Method, side: TargetSide, file: Path) -> dict[str, Tensor]:
    """Every tensor of the packed model, in the target's dtype, from the file alone."""
    content = file.read_bytes()
    if content[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{file}: not a baseline's file")
    return _decode(method, side, content)


class _Search:
    """Candidates of one budget, compared on the calibration rows."""

    def __init__(self, method: Method, problem: Problem, vectors: bytes, room: int):
        self.method, self.problem, self.vectors, self.room = method, problem, vectors, room
        self.results: list[tuple[float, bytes, Any]] = []
        self.scores: dict[tuple[int, int], float] = {}
        self.reason = ""

    def climb(self) -> None:
        """Shares, then variants, then shares again, each uphill from what won last."""
        variants = self.method.variants()
        variant, place = self.problem.hints.get(self.method.name, (0, _START_SHARE))
        shares = len(EMBEDDING_SHARES)
        place = _uphill(lambda p: self._score(variant, p), shares, place)
        variant = _uphill(lambda v: self._score(v, place), len(variants), variant, reach=2)
        place = _uphill(lambda p: self._score(variant, p), shares, place)
        self.problem.hints[self.method.name] = (variant, place)

    def fill_rest(self) -> None:
        """The embedding gets everything that the matrices leave; the first budget chooses."""
        variants, hints = self.method.variants(), self.problem.hints
        smallest = len(self.method.encode(self.problem, self.room, variants[-1], b""))
        # Without a budget the matrices are all there is.
        rest = 0 if self.room == _UNBOUNDED else self.room - smallest
        embedding = self.problem.pair.embedding(rest)
        known = hints.get(self.method.name)
        places = [known[0]] if known else list(range(len(variants)))
        scores = {v: self.try_embedding(embedding, float(rest > 0), variants[v]) for v in places}
        hints[self.method.name] = (min(places, key=lambda v: scores[v]), 0)

    def repeat(self, choice: Mapping[str, Any]) -> None:
        """What a draft chose, for good."""
        embedding = self.problem.pair.embedding(int(choice["embedding_share"] * self.room))
        self.try_embedding(embedding, choice["embedding_share"], choice["variant"])

    def best(self) -> tuple[bytes, Any]:
        """The content that wins. Raises: UnreachableError."""
        if not self.results:
            raise UnreachableError(self.reason)
        _, content, choice = min(self.results, key=lambda item: item[0])
        return content, choice

    def try_embedding(self, embedding: bytes, share: float, variant: Any) -> float:
        """KL of one candidate on the calibration rows, infinite where it does not fit."""
        try:
            room = self.room - len(embedding)
            linears = self.method.encode(self.problem, room, variant, embedding)
        except UnreachableError as error:
            self.reason = str(error)
            return float("inf")
        parts = (embedding, self.vectors, linears)
        content = _MAGIC + b"".join(_LENGTH.pack(len(part)) + part for part in parts)
        score = self.problem.score(_decode(self.method, self.problem.pair.side, content))
        choice = {"embedding_share": share, "embedding_bytes": len(embedding), "variant": variant}
        self.results.append((score, content, choice))
        return score

    def _score(self, variant: int, place: int) -> float:
        if (variant, place) not in self.scores:
            share = EMBEDDING_SHARES[place]
            embedding = self.problem.pair.embedding(int(share * self.room))
            chosen = self.method.variants()[variant]
            self.scores[variant, place] = self.try_embedding(embedding, share, chosen)
        return self.scores[variant, place]


def _uphill(score: Callable[[int], float], count: int, place: int, reach: int = 1) -> int:
    """The place of 0 to count - 1 whose neighbours score no lower, walking from `place`."""
    if score(place) == float("inf"):
        # A small budget may have no room for the matrices beside much of an embedding.
        fits = [p for p in range(count) if score(p) < float("inf")]
        if not fits:
            return place
        place = fits[-1]
    while True:
        near = range(max(0, place - reach), min(count, place + reach + 1))
        best = min(near, key=lambda p: (score(p), p != place))
        if best == place:
            return place
        place = best


def _decode(method: Method, side: TargetSide, content: bytes) -> dict[str, Tensor]:
    offset, parts = len(_MAGIC), []
    for _ in range(3):
        (length,) = _LENGTH.unpack_from(content, offset)
        parts.append(content[offset + _LENGTH.size : offset + _LENGTH.size + length])
        offset += _LENGTH.size + length
    before = side.before
    result = {
        name: (before[name].float() + delta).to(before[name].dtype)
        for name, delta in method.decode(side, parts[2]).items()
    }
    if side.embedding is not None:
        result[side.embedding] = decode_embedding(parts[0], before[side.embedding])
    return result | _decode_vectors(side, parts[1])


def encode_vectors(problem: Problem) -> bytes:
    """Norms and biases, exactly: entropy-coded given the target, or their words as they are."""
    before = _joined(problem.pair.side.before, problem.pair.side.vectors)
    after = _joined(problem.pair.after, problem.pair.side.vectors)
    coded = encode_exact(after, before)
    words = after.view(torch.uint8).numpy().tobytes()
    return b"\1" + coded if len(coded) < len(words) else b"\0" + words


def _decode_vectors(side: TargetSide, payload: bytes) -> dict[str, Tensor]:
    before = _joined(side.before, side.vectors)
    if payload[:1] == b"\1":
        flat = decode_exact(memoryview(payload)[1:], before)
    else:
        flat = torch.frombuffer(bytearray(payload[1:]), dtype=before.dtype)
    sizes = [side.before[name].numel() for name in side.vectors]
    parts = flat.split(sizes)
    return {
        name: part.reshape(side.before[name].shape)
        for name, part in zip(side.vectors, parts, strict=True)
    }


def _joined(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in names])


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Payloads of all matrices in the order of names, each behind its length."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def split_parts(payload: bytes) -> list[bytes]:
    """Inverse of `join_parts`."""
    parts, offset = [], 0
    while offset < len(payload):
        (length,) = _LENGTH.unpack_from(payload, offset)
        offset += _LENGTH.size
        parts.append(payload[offset : offset + length])
        offset += length
    return parts


def parts_overhead(count: int) -> int:
    """Bytes that `join_parts` adds to `count` parts."""
    return count * _LENGTH.size
