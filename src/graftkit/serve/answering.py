"""From a request to its answers: prompts as tokens, rows in the engine, parts as they come."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftkit.errors import BusyError, ConfigError
from graftkit.route import Route
from graftkit.rows import encode_question
from graftkit.rows.chat import write_messages
from graftkit.serve.engine import AnswerPart, EngineRow, GenerationRequest, PackLease
from graftkit.serve.models import ResolvedModel, ServedModels
from graftkit.serve.sampling import SampledToken, SamplingSettings
from graftkit.serve.style import GenerationStyle

Prompt = str | list[int] | list[dict[str, Any]]
"""Plain text, token ids, or messages."""


@dataclass(frozen=True)
class AnswerLimits:
    """Limits on one request.

    Attributes:
        prompt_tokens, answer_tokens: most tokens of a prompt, and of an answer.
        answers: most answers of a request: prompts times n.
        seconds: longest time of an answer.
    """

    prompt_tokens: int = 8_192
    answer_tokens: int = 2_048
    answers: int = 64
    seconds: float = 300.0


class RunningAnswers:
    """The answers of one request, and the parts that have come.

    Attributes:
        resolved: the packs of the first prompt.
        tokenizer: of the first prompt's packs.
        prompt_tokens: of all prompts, each once.
        answer_tokens: that have come so far.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.resolved = ResolvedModel({})
        self.tokenizer: Any = None
        self.prompt_tokens = 0
        self.answer_tokens = 0
        self.created = int(time.time())
        self._loop = loop
        self._parts: asyncio.Queue[tuple[int, AnswerPart]] = asyncio.Queue()
        self._rows: list[EngineRow] = []

    def submit(self, models: ServedModels, request: GenerationRequest) -> None:
        """Add an answer; its parts have the number of its place."""
        place = len(self._rows)
        self._rows.append(models.engine.submit(request, self._deliver_to(place)))

    def cancel(self) -> None:
        """End every answer that still runs."""
        for row in self._rows:
            row.cancel()

    @property
    def count(self) -> int:
        """Answers."""
        return len(self._rows)

    async def parts(self) -> AsyncIterator[tuple[int, AnswerPart]]:
        """The parts of all answers as they come, with the number of the answer."""
        open_answers = len(self._rows)
        try:
            while open_answers:
                place, part = await self._parts.get()
                self.answer_tokens += len(part.tokens)
                open_answers -= part.finish is not None
                yield place, part
        finally:
            self.cancel()

    async def whole(self) -> list["WholeAnswer"]:
        """All answers, when they have ended."""
        answers = [WholeAnswer("", [], "") for _ in self._rows]
        async for place, part in self.parts():
            own = answers[place]
            own.text += part.text
            own.tokens += part.tokens
            own.finish, own.error = part.finish or "", part.error
        return answers

    def _deliver_to(self, place: int) -> Callable[[AnswerPart], None]:
        def deliver(part: AnswerPart) -> None:
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (place, part))

        return deliver


@dataclass
class WholeAnswer:
    """An answer that has ended."""

    text: str
    tokens: list[SampledToken]
    finish: str
    error: str | None = None


def start_answers(
    models: ServedModels,
    limits: AnswerLimits,
    loop: asyncio.AbstractEventLoop,
    model: str,
    prompts: Sequence[Prompt],
    samplings: Callable[[int], Sequence[SamplingSettings]],
) -> RunningAnswers:
    """Submit the answers of a request; all of them or none.

    Args:
        samplings: for the most tokens of an answer, one for each answer to a prompt.
    Raises: ConfigError, RowsError for prompts that cannot be answered; UnknownModelError;
        BusyError.
    """
    answers = RunningAnswers(loop)
    try:
        for number, prompt in enumerate(prompts):
            resolved = models.resolve(model, _routed_text(models, prompt))
            with models.engine.lease(resolved.weights) as lease:
                lease, ids = _encode(lease, prompt)
                if not number:
                    answers.resolved, answers.tokenizer = resolved, lease.style.tokenizer
                answers.prompt_tokens += len(ids)
                room = _room(models, limits, ids)
                for sampling in samplings(room):
                    if answers.count >= limits.answers:
                        raise ConfigError(f"a request has at most {limits.answers} answers")
                    own = replace(sampling, max_tokens=min(sampling.max_tokens, room))
                    answers.submit(models, GenerationRequest(lease, ids, own, limits.seconds))
    except BaseException:
        answers.cancel()
        raise
    return answers


def route_object(route: Route | None) -> dict[str, Any] | None:
    """The router's choice as an answer shows it."""
    return None if route is None else {"packs": dict(route.weights), "scores": dict(route.scores)}


def check_answers(answers: Sequence[WholeAnswer]) -> None:
    """Raises: BusyError for answers that the shutdown or the time limit ended; RuntimeError for
    one that failed."""
    for answer in answers:
        if answer.finish == "error":
            raise RuntimeError(answer.error)
        if answer.finish in ("cancelled", "timeout"):
            raise BusyError(f"the answer was not finished: {answer.finish}")


def _routed_text(models: ServedModels, prompt: Prompt) -> str:
    """What routers read: a prompt without a template, of messages the last user's turn."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], dict):
        turns = [turn for turn in prompt if isinstance(turn, dict) and turn["role"] == "user"]
        return str(turns[-1]["content"]) if turns else ""
    return str(models.engine.tokenizer.decode(prompt))


def _encode(lease: PackLease, prompt: Prompt) -> tuple[PackLease, list[int]]:
    """Token ids of a prompt as its packs read it; the lease then ends answers accordingly.

    Raises: RowsError where the template fails; ConfigError for token ids that do not exist, or
        messages for a skill that reads plain text.
    """
    style = lease.style
    if isinstance(prompt, str):
        plain = style.raw()
        return replace(lease, style=plain), list(plain.encode(prompt))
    if not prompt or isinstance(prompt[0], int):
        return replace(lease, style=style.raw()), _checked_ids(style, prompt)
    messages = [turn for turn in prompt if isinstance(turn, dict)]
    if style.template is None:
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise ConfigError(
                "this model reads plain prompts, and no chat template: send one message of the "
                "user, or use /v1/completions"
            )
        return lease, list(encode_question(style.tokenizer, messages[0]["content"], chat=False))
    text = write_messages(style.tokenizer, messages, None, "messages", reply=True)
    return lease, list(style.tokenizer.encode(text, add_special_tokens=False))


def _checked_ids(style: GenerationStyle, ids: Sequence[Any]) -> list[int]:
    size = len(style.tokenizer)
    if not all(isinstance(token, int) and 0 <= token < size for token in ids):
        raise ConfigError(f"a token is not from 0 to {size - 1}")
    return list(ids)


def _room(models: ServedModels, limits: AnswerLimits, ids: Sequence[int]) -> int:
    """Most tokens of an answer to a prompt. Raises: ConfigError for a prompt that is too long."""
    models.engine.check_length(ids)
    if len(ids) > limits.prompt_tokens:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, and this server reads {limits.prompt_tokens}"
        )
    context = models.engine.decoder.context
    return min(
        limits.answer_tokens, limits.answer_tokens if context is None else context - len(ids)
    )
