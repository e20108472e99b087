"""A model behind an OpenAI-compatible endpoint: one request for each answer, with retries.

The server is not trusted: a response has a deadline and a largest size, and what it says is shown
without the API key. (The client's own timeouts count from one byte to the next, and it has no limit
for a body.)
"""

import asyncio
import base64
import json
import os
import random
import re
import threading
import time
import zlib
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from itertools import islice
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import openai

from graftkit.distill.config import EndpointSource
from graftkit.distill.records import Finish, Prompt, SourceAnswer
from graftkit.distill.sources import Replies, Reply, Unit, derive_seed, refused
from graftkit.errors import ConfigError, SourceError

MOST_REDIRECTS = 5
PACKINGS = ("gzip", "x-gzip", "deflate")  # Content-Encoding of servers that ignore the request
FEWEST_BYTES, BYTES_A_TOKEN, MOST_BYTES = 2**20, 2**10, 2**26  # of an answer
SHORTEST_SECRET = 8  # characters; a shorter key, such as EMPTY, may be a word of an answer


def largest_answer(max_tokens: int) -> int:
    """Largest size in bytes of a response with so many tokens."""
    return min(MOST_BYTES, FEWEST_BYTES + BYTES_A_TOKEN * max_tokens)


class UnreadableAnswerError(Exception):
    """A response is too large, or compressed in an unknown way."""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that reads bodies of at most `limit` bytes, also of errors and redirects.

    The limit holds for received and for decompressed bytes: 1 MB can decompress to gigabytes.
    """

    def __init__(self, limit: int, **options: Any):
        super().__init__(headers={"Accept-Encoding": "identity"}, **options)
        self.limit = limit

    async def send(self, request: Any, **options: Any) -> Any:
        """The response with its whole body, after redirects. Raises: UnreadableAnswerError."""
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(1 + MOST_REDIRECTS):
            response = await super().send(request, **options)
            try:
                content = await self._read(response)
            finally:
                await response.aclose()
            if response.next_request is None:
                return _with_body(response, content)
            request = response.next_request
        raise UnreadableAnswerError(
            f"more than {MOST_REDIRECTS} redirects; name the last one as url"
        )

    async def _read(self, response: Any) -> bytes:
        packing = response.headers.get("Content-Encoding", "identity").strip().lower()
        packed = packing not in ("", "identity")
        if packed and packing not in PACKINGS:
            raise UnreadableAnswerError(
                f"the answer is packed ({packing[:20]}), which was not requested"
            )
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed else None
        content, received = bytearray(), 0
        async for part in response.aiter_raw():
            received += len(part)
            room = self.limit + 1 - len(content)
            try:
                content += part if unpacker is None else unpacker.decompress(part, room)
            except zlib.error as error:
                raise UnreadableAnswerError(f"the answer does not unpack ({error})") from error
            if max(len(content), received) > self.limit:
                raise UnreadableAnswerError(f"the answer is larger than {self.limit:,} bytes")
        return bytes(content)


def _with_body(response: Any, content: bytes) -> Any:
    """A response with this body, decompressed and in UTF-8 (other charsets may be any codec)."""
    gone = ("content-encoding", "content-length", "transfer-encoding", "content-type")
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in gone]
    headers.append(("content-type", "application/json"))
    made = type(response)(
        response.status_code, headers=headers, content=content, request=response.request
    )
    made.history = response.history
    return made


def finish_within(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of asynchronous work, which is cancelled after so many seconds.

    Raises: TimeoutError, and what the work raises.
    """

    async def limited() -> Any:
        return await asyncio.wait_for(work, seconds)

    with _LOOP_LOCK:  # threads whose first requests come together share one loop
        loop = _start_loop(os.getpid())
    return asyncio.run_coroutine_threadsafe(limited(), loop).result()


_LOOP_LOCK = threading.Lock()


@cache
def _start_loop(process: int) -> asyncio.AbstractEventLoop:
    """One event loop for all requests of a process, because connections belong to a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoints", daemon=True).start()
    return loop


class KeyMask:
    """Replaces an API key in a text by ***: as it is, percent-encoded, or inside base64."""

    def __init__(self, key: str | None):
        self._long = key is not None and len(key) >= SHORTEST_SECRET
        forms = sorted(_forms(key), key=len, reverse=True) if key else ()
        words = "|".join(map(re.escape, forms))
        self._pattern = re.compile(words, re.IGNORECASE) if forms else None

    def message(self, text: str) -> str:
        """A message about a request, without the key."""
        return text if self._pattern is None else self._pattern.sub("***", text)

    def answer(self, text: str) -> str:
        """A model's answer, without the key unless it is so short that it may be a word."""
        return self.message(text) if self._long else text


def _forms(key: str) -> set[str]:
    forms = {key, quote(key, safe=""), quote_plus(key)}
    if len(key) < SHORTEST_SECRET:
        return forms
    for shift in range(3):
        # The characters of the base64 that do not depend on the text around the key.
        whole = base64.b64encode(b"\0" * shift + key.encode()).decode()
        inner = whole[-(-shift * 8 // 6) : (shift + len(key)) * 8 // 6]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return forms


FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 0.5, 60.0  # before a further attempt; it doubles
MOST_RETRY_AFTER_SECONDS = 900.0  # a server that asks for a longer wait ends the run
REASON_CHARACTERS = 300  # of a server's message
MOST_TOKENS = 10**9  # a server's count beyond it is not believed
REFUSED_PROMPT = (400, 413, 422)  # the server refuses this one prompt
RETRIED = (408, 409, 425, 429)  # another attempt may succeed, as with 500 and above
GO_ON = "what is finished is kept; run the same command to go on"


class EndpointModel:
    """Answers of a served model. Every request has its own seed, which servers may ignore.

    Raises: ConfigError for a key that is not in the environment, or a URL without http.
    """

    identity = ""

    def __init__(self, settings: EndpointSource, seed: int):
        self.settings, self.seed = settings, seed
        self._client = Client(settings)

    def units(self, prompts: Sequence[Prompt]) -> list[Unit]:
        """One request for each sample; at temperature 0 one sample for each prompt."""
        samples = self.settings.samples if self.settings.temperature > 0 else 1
        return [Unit((prompt,), (sample,)) for prompt in prompts for sample in range(samples)]

    def answer(self, units: Mapping[int, Unit]) -> Replies:
        """Send `concurrency` requests at once. When one fails, those under way are still returned.

        Raises: SourceError when the endpoint refuses the key or the model, or does not respond.
        """
        todo, pending = iter(units.items()), dict[Future[Reply], int]()
        failure: BaseException | None = None
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            while True:
                room = 0 if failure else self.settings.concurrency - len(pending)
                for number, unit in islice(todo, room):
                    pending[pool.submit(self._reply, unit, stopped)] = number
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    number, error = pending.pop(future), future.exception()
                    if error is None:
                        yield number, future.result()
                    else:
                        stopped.set()
                        failure = failure or error
        finally:
            # Also after Ctrl-C: requests under way end, and none begins.
            stopped.set()
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _reply(self, unit: Unit, stopped: threading.Event) -> Reply:
        (prompt,), (sample,) = unit.prompts, unit.samples
        completion = self._client.complete(self._body(prompt, sample), stopped)
        name, text = self.settings.name, completion.text
        finishes: dict[str | None, Finish] = {"stop": "stop", "length": "length"}
        finish = finishes.get(completion.finish)
        if text is None or finish is None:
            reason = completion.reason or f"no text (finish_reason {completion.finish})"
            answer = refused(prompt, name, sample, reason)
        else:
            tokens = completion.tokens_out
            answer = SourceAnswer(
                prompt.id, prompt.text, name, sample, text.strip(), tokens, finish
            )
        return Reply((answer,), completion.tokens_in, completion.tokens_out)

    def _body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        settings = self.settings
        body: dict[str, Any] = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": derive_seed(self.seed, settings.name, prompt.id, sample),
        }
        if settings.repetition_penalty != 1:
            # Not in OpenAI's interface; vLLM and others read it.
            body["extra_body"] = {"repetition_penalty": settings.repetition_penalty}
        if settings.chat:
            return {"messages": [{"role": "user", "content": prompt.text}], **body}
        return {"prompt": prompt.text, **body}


@dataclass(frozen=True)
class Completion:
    """A server's response to one request.

    Attributes:
        text: the completion; None if there is none.
        finish: its finish_reason.
        reason: why there is no text.
        tokens_in, tokens_out: of prompt and completion; 0 if the server does not say.
    """

    text: str | None
    finish: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    reason: str | None = None


class Client:
    """Requests to one endpoint, from several threads. Attempts that may succeed later are repeated.

    Raises: ConfigError for a key that is not in the environment, or a URL without http.
    """

    def __init__(self, settings: EndpointSource):
        self.settings = settings
        key = _key(settings)
        _check_url(settings, key)
        self._mask = KeyMask(key)
        self._pace = RequestPace(settings.requests_per_minute)
        client: Any = openai.AsyncOpenAI(
            base_url=settings.url,
            api_key=key or "none",
            max_retries=0,
            timeout=settings.timeout_seconds,
            http_client=BoundedClient(largest_answer(settings.max_new_tokens)),
        )
        completions = client.chat.completions if settings.chat else client.completions
        self._create = completions.with_raw_response.create

    def complete(self, body: dict[str, Any], stopped: threading.Event) -> Completion:
        """One completion, or the reason why the server refuses this prompt.

        Args:
            body: the request without the model.
            stopped: an event that ends the waiting.
        Raises: SourceError for a wrong key or model, or when the last attempt fails too.
        """
        attempt = 0
        while True:
            _pause(self._pace.turn(), stopped)
            retry_after = 0.0
            try:
                request = self._create(model=self.settings.model, **body)
                response = finish_within(self.settings.timeout_seconds, request)
                completion = self._completion(response.http_response.content)
                if completion is not None:
                    return completion
                failure = "the answer holds no completion"
            except openai.APIStatusError as error:
                if error.status_code in REFUSED_PROMPT:
                    return Completion(None, reason=self._shown(_status_text(error)))
                if error.status_code not in RETRIED and error.status_code < 500:
                    raise self._refused(error) from None  # its text may hold the key
                failure = self._shown(_status_text(error))
                retry_after = _retry_after(error.response.headers)
            except (openai.APITimeoutError, TimeoutError):
                failure = f"no answer within {self.settings.timeout_seconds:g} s"
            except (openai.OpenAIError, UnreadableAnswerError, OSError) as error:
                failure = self._shown(_cause(error))
            except (ValueError, LookupError, RecursionError) as error:
                # The openai client reads the bodies of errors, which may be anything.
                failure = f"an answer that cannot be read ({type(error).__name__})"
            attempt += 1
            if attempt > self.settings.retries or retry_after > MOST_RETRY_AFTER_SECONDS:
                patience = f", and it asks to wait {retry_after:.0f} s" if retry_after else ""
                raise SourceError(
                    f"{self.settings.url}: {failure} (attempt {attempt}{patience}); see that the "
                    f"server runs there, {GO_ON}"
                )
            _pause(max(retry_after, _back_off(attempt)), stopped)

    def _refused(self, error: openai.APIStatusError) -> SourceError:
        if error.status_code in (401, 403):
            key = self.settings.key_env
            advice = f"check the key in {key}" if key else "name its variable in key_env"
        else:
            advice = f"expected an OpenAI-compatible server with a model {self.settings.model!r}"
        return SourceError(
            f"{self.settings.url}: {self._shown(_status_text(error))}; {advice}; {GO_ON}"
        )

    def _shown(self, message: str) -> str:
        """A server's words in one line, without the key, which some servers repeat."""
        line = " ".join(self._mask.message(_readable(message)).split())
        return self._mask.message(line)[:REASON_CHARACTERS]

    def _completion(self, content: bytes) -> Completion | None:
        """The completion in a response; None if there is none."""
        try:
            response = json.loads(content)
            choice, usage = response["choices"][0], response.get("usage") or {}
            message = choice.get("message") or {"content": choice.get("text")}
            text, refusal, finish = (
                message["content"],
                message.get("refusal"),
                choice["finish_reason"],
            )
            counts = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
            reason = self._shown(str(refusal)) if refusal else None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(text, str | None) or not isinstance(finish, str | None):
            return None
        shown = None if text is None else self._mask.answer(_readable(text))
        return Completion(shown, finish and self._shown(finish), *counts, reason=reason)


class RequestPace:
    """Spreads requests evenly over a minute; without a limit, none waits."""

    def __init__(self, per_minute: int | None):
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def turn(self) -> float:
        """Reserve the next request. Returns: seconds to wait for it."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        return turn - now


def _check_url(settings: EndpointSource, key: str | None) -> None:
    """Raises: ConfigError for a URL without http, or with a secret, because cards show the URL."""
    try:
        parts = urlsplit(settings.url)
        secret = (
            "@" in parts.netloc or bool(parts.query) or (key is not None and key in settings.url)
        )
    except ValueError:
        parts, secret = urlsplit(""), False
    if secret:
        raise ConfigError(
            f"source {settings.name}: the url holds a password, a query or the key; write it "
            "without, and name the variable of the key in key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"source {settings.name}: url is {settings.url!r}; expected a base URL such as "
            "http://localhost:8000/v1"
        )


def _key(settings: EndpointSource) -> str | None:
    if settings.key_env is None:
        return None
    key = os.environ.get(settings.key_env, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        fault = "characters that no key has in" if key else "no"
        raise ConfigError(
            f"source {settings.name}: the environment has {fault} {settings.key_env}; set it to "
            f"the API key for {settings.url}"
        )
    return key


def _status_text(error: openai.APIStatusError) -> str:
    """Status and message of a server; the whole body if it holds no message."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return f"{error.status_code} {message or error.body or ''}"


def _cause(error: BaseException) -> str:
    """The first cause of a connection error, as text."""
    while not isinstance(error, UnreadableAnswerError):
        inner = error.__cause__ or error.__context__
        if isinstance(error, BaseExceptionGroup):
            inner = error.exceptions[0]
        if inner is None:
            break
        error = inner
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error) or type(error).__name__


def _count(tokens: Any) -> int:
    """A number of tokens; 0 for anything else, or a number that is too large."""
    return tokens if type(tokens) is int and 0 < tokens <= MOST_TOKENS else 0


def _readable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON allows and UTF-8 does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of the header Retry-After (RFC 9110, 10.2.3); 0 without it."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date: datetime = parsedate_to_datetime(value)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _back_off(attempt: int) -> float:
    """Seconds before attempt `attempt` + 1; random, so that clients do not retry all at once."""
    longest = min(MOST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 30))
    return longest * random.uniform(0.5, 1)


def _pause(seconds: float, stopped: threading.Event) -> None:
    """Wait. Raises: SourceError when stopped, which ends the attempts of this thread."""
    if stopped.wait(seconds):
        raise SourceError(f"stopped; {GO_ON}")
