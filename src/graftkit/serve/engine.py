"""The engine: one thread that runs every request on one model, each row with its own packs.

Other threads put requests and calls into queues; the model, its cache and its packs are touched by
the engine's thread alone, between two passes. A step is one pass over all rows that generate, one
token each, and then one over a chunk of the prompts of rows that have just come. So a long prompt
delays the others by a chunk at a time, and rows come and go with every step.

    with Engine(model, tokenizer, checkpoint) as engine:
        engine.load("math", SkillPack.load("math.skillpack"))
        with engine.lease({"math": 0.7}) as lease:
            engine.submit(GenerationRequest(lease, ids, SamplingSettings(64)), print)
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from graftkit.attachment import attach
from graftkit.attachment.configuration import reads_chat
from graftkit.checkpoint import Checkpoint
from graftkit.errors import BusyError, ConfigError, GraftError, UnknownModelError, nearest_name
from graftkit.serve.decoder import Decoder, PassRow
from graftkit.serve.sampling import AnswerText, SampledToken, SamplingSettings, TokenSampler
from graftkit.serve.style import GenerationStyle, SettingsProcessors, pack_style
from graftkit.skillpack import SkillPack

CHUNK = 128  # most tokens of one prompt in a pass
_PASS_TOKENS = 512  # most tokens of all prompts in a pass, padding included

_Result = TypeVar("_Result")


@dataclass(eq=False)
class ServedPack:
    """A pack beside the model.

    Attributes:
        index: the attachment's. nbytes: in memory.
        uses: leases and requests that hold it; a retired pack is dropped with the last.
    """

    name: str
    digest: str
    index: int
    nbytes: int
    style: GenerationStyle
    uses: int = 0
    retired: bool = False


@dataclass(frozen=True)
class PackLease:
    """The packs of a request; they stay in memory while it is held.

    Attributes:
        style: how they read prompts together; the target's way where they differ.
    """

    packs: tuple[tuple[ServedPack, float], ...]
    style: GenerationStyle

    @property
    def choice(self) -> dict[int, float]:
        """As `Attachment.route` takes it."""
        return {pack.index: weight for pack, weight in self.packs}


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate.

    Attributes:
        ids: token ids of the prompt, at least one.
        seconds: longest time from its submission; None for no limit.
    """

    lease: PackLease
    ids: Sequence[int]
    sampling: SamplingSettings
    seconds: float | None = None


@dataclass(frozen=True)
class AnswerPart:
    """What a step adds to an answer.

    Attributes:
        finish: "stop", "length", "cancelled", "timeout" or "error" with the last part.
        error: why it failed.
    """

    text: str
    tokens: tuple[SampledToken, ...] = ()
    finish: str | None = None
    error: str | None = None


Deliver = Callable[[AnswerPart], None]


class EngineRow:
    """A request from its submission to its last part. `cancel` may be called by any thread."""

    def __init__(self, request: GenerationRequest, deliver: Deliver, processors: Any):
        self.request = request
        self.slot = -1
        self.cancelled = False
        self._deliver = deliver
        self._processors = processors
        self._cached = 0  # tokens whose keys and values lie in the slot
        self._sequence = list(request.ids)
        self._sampler = TokenSampler(request.sampling)
        self._text = AnswerText(request.lease.style.tokenizer, request.sampling.stop)
        limit = request.seconds
        self._deadline = None if limit is None else time.monotonic() + limit

    def cancel(self) -> None:
        """End the answer with the next step."""
        self.cancelled = True

    @property
    def overdue(self) -> str | None:
        """Why the row must end now, None where it may go on."""
        if self.cancelled:
            return "cancelled"
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        return "timeout" if is_late else None

    @property
    def pending(self) -> int:
        """Tokens that the model has not read yet; 1 while it generates."""
        return len(self._sequence) - self._cached

    def next_pass(self, limit: int) -> PassRow:
        """At most so many tokens that it reads next."""
        return PassRow(self.slot, self._cached, self._sequence[self._cached : self._cached + limit])

    def advance(self, count: int, logits: Tensor) -> str | None:
        """Take the result of a pass over `count` tokens; returns the reason where this ends it."""
        self._cached += count
        if self.pending:
            return None
        if self._processors:
            ids = torch.tensor([self._sequence], device=logits.device)
            logits = self._processors(ids, logits.unsqueeze(0))[0]
        token = self._sampler.sample(logits)
        self._sequence.append(token.id)
        if token.id in self.request.lease.style.ends:
            return self.end("stop", token)
        text = self._text.push(token.id)
        if self._text.stopped:
            return self.end("stop", token, text)
        if len(self._text.tokens) >= self.request.sampling.max_tokens:
            return self.end("length", token, text)
        self._deliver(AnswerPart(text, (token,)))
        return None

    def end(
        self,
        finish: str,
        token: SampledToken | None = None,
        text: str = "",
        error: str | None = None,
    ) -> str:
        """Deliver the last part."""
        text += self._text.finish()
        self._deliver(AnswerPart(text, () if token is None else (token,), finish, error))
        return finish


@dataclass
class EngineCounts:
    """What an engine has done so far."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """A model with packs beside it, serving requests until `close`.

    Args:
        model, tokenizer, checkpoint: the target.
        slots: most rows in a pass. queue: most requests that wait for a slot.
        chunk: most tokens of one prompt in a pass.
    Raises: AttachError for a model that cannot be served.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        checkpoint: Checkpoint,
        *,
        slots: int = 16,
        queue: int = 256,
        chunk: int = CHUNK,
    ):
        self.model, self.tokenizer, self.checkpoint = model, tokenizer, checkpoint
        self.decoder = Decoder(model, slots)
        self.counts = EngineCounts()
        self.slots = slots
        self._queue, self._chunk = queue, chunk
        self._attachment = attach(model, [], mode="side")
        self._style = GenerationStyle.of(tokenizer, model.generation_config, reads_chat(tokenizer))
        self._processors = SettingsProcessors(model)
        # Guards what follows; the engine's thread waits on it.
        self._changed = threading.Condition()
        self._packs: dict[str, ServedPack] = {}
        self._waiting: deque[EngineRow] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        # Of the engine's thread alone.
        self._rows: list[EngineRow] = []
        self._free = list(range(slots))
        self._routed: tuple[list[dict[int, float]], bool] | None = None
        self._thread = threading.Thread(target=self._run, name="graftkit-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._closing

    @property
    def packs(self) -> dict[str, ServedPack]:
        """The packs that requests may name, by name."""
        with self._changed:
            return dict(self._packs)

    @property
    def load_counts(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        with self._changed:
            return len(self._rows), len(self._waiting)

    def load(self, name: str, pack: SkillPack, replace: bool = False) -> None:
        """Put a pack beside the model, between two passes.

        Args:
            replace: a name that is taken then stands for the new pack; requests that hold the old
                one end with it.
        Raises: ConfigError for a name that is taken; AttachError, PackMismatchError,
            CorruptPackError for a pack that cannot be served beside others.
        """
        if name in self.packs and not replace:
            raise self._taken(name)
        style = pack_style(self.checkpoint, self.model, self.tokenizer, pack)
        index, nbytes = self.call(lambda: self._add(pack))
        served = ServedPack(name, pack.digest, index, nbytes, style)
        with self._changed:
            before = self._packs.get(name)
            is_free = before is None or replace
            if is_free:
                self._packs[name] = served
        if not is_free:
            self._retire(served)
            raise self._taken(name)
        if before is not None:
            self._retire(before)

    def unload(self, name: str) -> None:
        """Accept no more requests for a pack; it leaves memory when the last one ends.

        Raises: UnknownModelError.
        """
        with self._changed:
            self._check_served(name)
            pack = self._packs.pop(name)
        self._retire(pack)

    @contextmanager
    def lease(self, weights: Mapping[str, float]) -> Iterator[PackLease]:
        """Hold packs for the length of a block, in which requests for them are submitted.

        Args:
            weights: by name; none for the target.
        Raises: UnknownModelError for a name that is not served.
        """
        with self._changed:
            for name in weights:
                self._check_served(name)
            chosen = tuple((self._packs[name], weight) for name, weight in weights.items())
            self._hold(chosen)
        styles = {pack.style for pack, _ in chosen}
        lease = PackLease(chosen, styles.pop() if len(styles) == 1 else self._style)
        try:
            yield lease
        finally:
            self._release(lease)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> EngineRow:
        """Queue a request whose lease is held.

        Args:
            deliver: gets every part of the answer, in the engine's thread; it must not wait.
        Raises: ConfigError for a prompt without tokens or beyond the context; BusyError where too
            many requests wait.
        """
        self.check_length(request.ids)
        processors = self._processors.of(request.lease.style, request.ids)
        row = EngineRow(request, deliver, processors)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise BusyError("the server is shutting down")
            if len(self._waiting) >= self._queue:
                raise BusyError(f"{self._queue} requests wait already; try again later")
            self._hold(request.lease.packs)
            self._waiting.append(row)
            self._changed.notify()
        return row

    def check_length(self, ids: Sequence[int]) -> None:
        """Raises: ConfigError for a prompt that cannot be continued."""
        if not ids:
            raise ConfigError("the prompt has no tokens, and a model needs one to start from")
        context = self.decoder.context
        if context is not None and len(ids) >= context:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, and the target reads {context} in all"
            )

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Run a function in the engine's thread, between two passes, and wait for its result."""
        future: Future[_Result] = Future()
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise BusyError("the server is shutting down")
            self._calls.append((function, future))
            self._changed.notify()
        return future.result()

    def close(self, seconds: float = 0.0) -> None:
        """Accept nothing more, end what runs after so many seconds, and detach all packs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            for row in (*self._rows, *self._waiting):
                row.cancel()
        self._thread.join()
        self._attachment.detach()

    # What follows runs in the engine's thread, except _hold, _release, _retire and _unknown.

    def _run(self) -> None:
        try:
            while self._wait():
                self._run_calls()
                self._end_overdue()
                self._admit()
                self._step()
        finally:
            with self._changed:
                self._closing = True
                calls, left = list(self._calls), [*self._rows, *self._waiting]
                self._calls.clear()
            for _, future in calls:
                future.set_exception(BusyError("the server is shutting down"))
            for row in left:
                self._finish(row, partial(row.end, "error", error="the server stopped"))

    def _wait(self) -> bool:
        """Wait for work; False where there will be none."""
        with self._changed:
            while not (self._calls or self._waiting or self._rows or self._closing):
                self._changed.wait()
            return bool(self._calls or self._waiting or self._rows)

    def _run_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _end_overdue(self) -> None:
        with self._changed:
            rows = [(row, row.overdue) for row in (*self._rows, *self._waiting)]
        for row, why in rows:
            if why is not None:
                self._finish(row, partial(row.end, why))

    def _admit(self) -> None:
        with self._changed:
            while self._free and self._waiting:
                row = self._waiting.popleft()
                row.slot = heapq.heappop(self._free)
                self._rows.append(row)
                self.counts.prompt_tokens += len(row.request.ids)

    def _step(self) -> None:
        generating = [row for row in self._rows if row.pending == 1]
        reading = [row for row in self._rows if row.pending > 1]
        if generating:
            self._pass(generating, 1)
        if reading:
            width = min(self._chunk, reading[0].pending)
            self._pass(reading[: max(1, _PASS_TOKENS // width)], width)

    def _pass(self, rows: list[EngineRow], width: int) -> None:
        """Run rows together. Where that fails, run them apart: a bad one fails alone."""
        rows = sorted(rows, key=lambda row: row.slot)
        passed = [row.next_pass(width) for row in rows]
        try:
            self._route([row.request.lease.choice for row in rows], stacked=width == 1)
            logits = self.decoder.run(passed)
        except Exception as error:
            self._routed = None
            if len(rows) > 1:
                for fewer in _smaller(rows):
                    self._pass(fewer, width)
                return
            reason = str(error) if isinstance(error, GraftError) else type(error).__name__
            self._finish(rows[0], partial(rows[0].end, "error", error=reason))
            return
        for row, part, own in zip(rows, passed, logits, strict=True):
            self._finish(row, partial(row.advance, len(part.tokens), own))

    def _route(self, choices: list[dict[int, float]], stacked: bool) -> None:
        if (choices, stacked) != self._routed:
            self._attachment.route(choices, stacked)
            self._routed = choices, stacked

    def _finish(self, row: EngineRow, work: Callable[[], str | None]) -> None:
        """Let a row work on, and remove it where it ends or fails."""
        before = len(row._text.tokens)
        try:
            finish = work()
        except Exception as error:  # of a reader that is gone, or a row's own settings
            finish = "error"
            _deliver_failure(row, error)
        self.counts.answer_tokens += len(row._text.tokens) - before
        if finish is None:
            return
        self.counts.finished[finish] = self.counts.finished.get(finish, 0) + 1
        with self._changed:
            if row in self._rows:
                self._rows.remove(row)
                heapq.heappush(self._free, row.slot)
            else:
                self._waiting.remove(row)
        self._release(row.request.lease)

    def _hold(self, packs: tuple[tuple[ServedPack, float], ...]) -> None:
        for pack, _ in packs:
            pack.uses += 1

    def _release(self, lease: PackLease) -> None:
        with self._changed:
            for pack, _ in lease.packs:
                pack.uses -= 1
            unused = [pack for pack, _ in lease.packs if pack.retired and not pack.uses]
            self._drop(unused)

    def _retire(self, pack: ServedPack) -> None:
        with self._changed:
            pack.retired = True
            self._drop([] if pack.uses else [pack])

    def _drop(self, packs: list[ServedPack]) -> None:
        """Let the engine's thread forget packs that nobody holds; the caller has the lock."""
        for pack in packs:
            self._calls.append((partial(self._forget, pack), Future()))
        self._changed.notify()

    def _add(self, pack: SkillPack) -> tuple[int, int]:
        index = self._attachment.add(pack)
        return index, self._attachment.nbytes(index)

    def _forget(self, pack: ServedPack) -> None:
        self._routed = None
        self._attachment.drop(pack.index)

    def _taken(self, name: str) -> ConfigError:
        return ConfigError(f"a pack {name!r} is served already; unload it first, or replace it")

    def _check_served(self, name: str) -> None:
        if name not in self._packs:
            near = nearest_name(name, self._packs)
            raise UnknownModelError(f"no pack {name!r} is served{near}; /v1/models lists them")


def _smaller(rows: list[EngineRow]) -> list[list[EngineRow]]:
    """Rows by their packs; one by one where all have the same."""
    groups: dict[Any, list[EngineRow]] = {}
    for row in rows:
        groups.setdefault(tuple(sorted(row.request.lease.choice.items())), []).append(row)
    return list(groups.values()) if len(groups) > 1 else [[row] for row in rows]


def _deliver_failure(row: EngineRow, error: Exception) -> None:
    reason = str(error) if isinstance(error, (GraftError, ValueError)) else type(error).__name__
    try:
        row.end("error", error=reason)
    except Exception:  # the reader itself failed; nobody is left to tell
        return
