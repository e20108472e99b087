"""HTTP of an endpoint that is not trusted: an answer has a deadline, a size, and no secrets.

openai's own timeouts count from one byte to the next, and nothing there limits a body.
"""

import asyncio
import base64
import os
import re
import threading
import zlib
from collections.abc import Coroutine
from functools import cache
from typing import Any
from urllib.parse import quote, quote_plus

import openai

MOST_REDIRECTS = 5
PACKINGS = ("gzip", "x-gzip", "deflate")  # Content-Encoding of servers that heed no request
FEWEST_BYTES, BYTES_A_TOKEN, MOST_BYTES = 2**20, 2**10, 2**26  # of an answer
SHORTEST_SECRET = 8  # characters; a shorter key, such as EMPTY, is a word of answers too


def largest_answer(max_tokens: int) -> int:
    """Bytes that an answer of so many tokens may have, with all that servers put around it."""
    return min(MOST_BYTES, FEWEST_BYTES + BYTES_A_TOKEN * max_tokens)


class UnreadableAnswerError(Exception):
    """A body is larger than an answer can be, or packed in a way that nobody wants."""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """Reads bodies of at most `limit` bytes, of errors and redirects as well.

    Bytes are counted as they come and as they unpack: a compressed body of 1 MB can hold gigabytes.
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
    """As if the body had come at once, unpacked, and in UTF-8: charset=hex is a codec of Python."""
    gone = ("content-encoding", "content-length", "transfer-encoding", "content-type")
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in gone]
    headers.append(("content-type", "application/json"))
    made = type(response)(
        response.status_code, headers=headers, content=content, request=response.request
    )
    made.history = response.history
    return made


def finish_within(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of asynchronous work; whatever it waits for, it is over after so many seconds.

    Raises: TimeoutError, and what the work raises.
    """

    async def limited() -> Any:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run_coroutine_threadsafe(limited(), _loop(os.getpid())).result()


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """One event loop for all requests of a process, as connections belong to their loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoints", daemon=True).start()
    return loop


class Mask:
    """Puts *** where a text repeats a key, as it is, percent-encoded, or inside base64."""

    def __init__(self, key: str | None):
        self._long = key is not None and len(key) >= SHORTEST_SECRET
        forms = sorted(_forms(key), key=len, reverse=True) if key else ()
        words = "|".join(map(re.escape, forms))
        self._pattern = re.compile(words, re.IGNORECASE) if forms else None

    def message(self, text: str) -> str:
        """Words about a request, without the key."""
        return text if self._pattern is None else self._pattern.sub("***", text)

    def answer(self, text: str) -> str:
        """What a model says, without a key that is too long to be a word."""
        return self.message(text) if self._long else text


def _forms(key: str) -> set[str]:
    forms = {key, quote(key, safe=""), quote_plus(key)}
    if len(key) < SHORTEST_SECRET:
        return forms
    for shift in range(3):
        # Of base64 of a text that holds the key: the characters that no neighbour decides.
        whole = base64.b64encode(b"\0" * shift + key.encode()).decode()
        inner = whole[-(-shift * 8 // 6) : (shift + len(key)) * 8 // 6]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return forms
