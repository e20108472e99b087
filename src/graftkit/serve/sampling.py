"""The next token of one row, and the text of an answer while it grows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_UNFINISHED = "\ufffd"  # what a tokenizer writes for a part of a character


@dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of an answer are chosen.

    Attributes:
        max_tokens: longest answer.
        temperature: 0 takes the most likely token.
        top_p: samples from the most likely tokens that hold this much probability.
        top_k: samples from so many; 0 for all.
        seed: of this answer's random numbers; None for a new one.
        stop: texts that end the answer; they are not part of it.
        logprobs: how many of the most likely tokens are reported with each; None for no report.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class SampledToken:
    """A token of an answer.

    Attributes:
        logprob: natural logarithm of its probability under the model, before temperature; None
            where it was not asked for.
        top: (token, logprob) of the most likely ones.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: SamplingSettings):
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def sample(self, logits: Tensor) -> SampledToken:
        """A token from logits (vocabulary,), float32. Raises: ValueError for NaN or infinity."""
        if not torch.isfinite(logits.max()):
            raise ValueError("the model's logits are not finite")
        token = self._choose(logits)
        if self._sampling.logprobs is None:
            return SampledToken(token)
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(self._sampling.logprobs, len(logits)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return SampledToken(token, float(logprobs[token]), top)

    def _choose(self, logits: Tensor) -> int:
        own = self._sampling
        if own.temperature == 0:
            return int(logits.argmax())
        # Shifted first, so that a tiny temperature cannot overflow.
        values, ids = ((logits - logits.max()) / own.temperature).cpu().sort(descending=True)
        probabilities = values.softmax(dim=-1)
        if own.top_k:
            probabilities = probabilities[: own.top_k]
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = probabilities[before < own.top_p * probabilities.sum()]
        return int(ids[torch.multinomial(kept, 1, generator=self._generator)])


class AnswerText:
    """The text of an answer, token by token.

    A part of a character, and what may be the beginning of a stop text, is held back.

    Attributes:
        tokens: so far.
        stopped: whether a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokens: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._window = (0, 0)  # decoded together with new tokens; the second is the first unread
        self._pending = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that it makes certain."""
        self.tokens.append(token)
        first, unread = self._window
        text, read = self._decode(first, None), self._decode(first, unread)
        if len(text) > len(read) and not text.endswith(_UNFINISHED):
            self._pending += text[len(read) :]
            self._window = (unread, len(self.tokens))
        return self._release(held=self._held())

    def finish(self) -> str:
        """The text that was held back, without a stop text."""
        if self.stopped:
            return ""
        first, unread = self._window
        self._pending += self._decode(first, None)[len(self._decode(first, unread)) :]
        return self._release(held=0)

    def _release(self, held: int) -> str:
        ends = [place for text in self._stop if (place := self._pending.find(text)) >= 0]
        if ends:
            self.stopped = True
            text, self._pending = self._pending[: min(ends)], ""
            return text
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _held(self) -> int:
        """Characters at the end that may begin a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                count
                for count in range(min(longest, len(self._pending)), 0, -1)
                if any(text.startswith(self._pending[-count:]) for text in self._stop)
            ),
            0,
        )

    def _decode(self, first: int, end: int | None) -> str:
        return str(self._tokenizer.decode(self.tokens[first:end], skip_special_tokens=True))
