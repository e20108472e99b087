"""uvicorn around the app. On TERM it takes no more requests, and lets those that run end."""

import asyncio
import socket

import uvicorn

from graftkit.errors import ConfigError
from graftkit.serve.answering import AnswerLimits
from graftkit.serve.app import create_app
from graftkit.serve.guard import GuardSettings
from graftkit.serve.models import ServedModels

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class PackServer(uvicorn.Server):
    """Serves until a signal.

    Args:
        grace: seconds that running answers have to end after the signal; then they are cut short,
            and their streams still end with [DONE].
    Raises: ConfigError for an address that others reach, without an API key.
    """

    def __init__(
        self,
        models: ServedModels,
        guard: GuardSettings,
        limits: AnswerLimits,
        host: str = "127.0.0.1",
        port: int = 8000,
        grace: float = 20.0,
    ):
        if host not in _LOOPBACK and guard.api_key is None:
            raise ConfigError(f"{host} is reached by others; set an API key first")
        self._engine, self._grace = models.engine, grace
        app, _ = create_app(models, limits, guard)
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                server_header=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=int(grace) + 5,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the engine's answers, then the connections."""
        ending = asyncio.create_task(asyncio.to_thread(self._engine.close, self._grace))
        await super().shutdown(sockets)
        await ending
