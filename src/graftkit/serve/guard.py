"""In front of every route: keys, and limits on the body. Plain ASGI, so that streams pass through.

Nothing of a request is parsed before its key is right, and no key is ever written anywhere.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from graftkit.serve.metrics import ServerMetrics
from graftkit.serve.protocol import error_body

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ADMIN_ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@dataclass(frozen=True)
class GuardSettings:
    """Keys and limits.

    Attributes:
        api_key: for every route; None where none is asked for.
        admin_key: for the routes that load and unload packs, and good for all others. Where there
            is an API key and no admin key, packs cannot be loaded or unloaded.
        body_bytes: most bytes of a body. body_seconds: longest time for it to come.
    """

    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    body_bytes: int = 2**20
    body_seconds: float = 10.0


class RequestGuard:
    """The app behind its keys and limits."""

    def __init__(self, app: Any, settings: GuardSettings, metrics: ServerMetrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 500

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._serve(scope, receive, watched)
        finally:
            self._metrics.count_request(scope["path"], status, time.perf_counter() - started)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._check_key(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = await self._read(receive)
        except TimeoutError:
            await _refuse(send, 408, "the body did not come in time")
            return
        if body is None:
            limit = self._settings.body_bytes
            await _refuse(send, 413, f"the body is larger than {limit:,} bytes")
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check_key(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason of a refusal, None where the request may pass."""
        own = self._settings
        is_admin = scope["path"].rstrip("/") in ADMIN_ROUTES
        if own.api_key is None and own.admin_key is None:
            return None
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        token = given[0] if len(given) == 1 else b""
        is_right = {
            name: key is not None and hmac.compare_digest(token, b"Bearer " + key.encode())
            for name, key in (("api", own.api_key), ("admin", own.admin_key))
        }
        if is_right["admin"]:
            return None
        if own.api_key is None and not is_admin:
            return None
        if not is_right["api"]:
            return 401, "no key, or a wrong one; send Authorization: Bearer KEY"
        return (403, "this route needs the admin key") if is_admin else None

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, None where it is too large."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._settings.body_bytes:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body again, then what comes: a disconnection."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(send: Send, status: int, message: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": error_body(status, message)})
