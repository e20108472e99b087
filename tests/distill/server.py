"""A small OpenAI-compatible server for tests: real HTTP on a local port, answers from a function.

It answers from the request alone, so the same request has the same answer, before and after a
restart. `fault` decides by the number of the request, from 0, whether something goes wrong first.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch

from graftkit.models import load_model, load_tokenizer


@dataclass(frozen=True)
class Reply:
    """What a model says. text None: no content at all."""

    text: str | None
    finish: str = "stop"
    prompt_tokens: int = 5
    completion_tokens: int = 3


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request: a status, a raw body, a dropped connection, or a delay."""

    status: int = 200
    message: str = "something is wrong"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    drop: bool = False
    delay_seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """One request as it came in. headers: by lower-case name. seconds: on the monotonic clock."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    seconds: float

    @property
    def prompt(self) -> str:
        """The text that was asked, of either kind of completion."""
        text: str = self.body["prompt"] if "prompt" in self.body else self.messages[-1]["content"]
        return text

    @property
    def messages(self) -> list[dict[str, str]]:
        """Turns of a chat."""
        turns: list[dict[str, str]] = self.body["messages"]
        return turns


Answering = Callable[[Request], Reply | str]


def echo(request: Request) -> Reply:
    """The prompt and the seed: an answer that shows which request it belongs to."""
    return Reply(f"{request.prompt} #{request.body.get('seed')}")


def model_answers(folder: Path) -> Answering:
    """Answers of a model directory, drawn by the request's seed."""
    model: Any = load_model(folder, torch.float32)
    tokenizer: Any = load_tokenizer(folder)
    end = tokenizer.eos_token_id
    one_at_a_time = threading.Lock()  # torch's random numbers belong to the process

    def answer(request: Request) -> Reply:
        body = request.body
        if "messages" in body:
            ids = tokenizer.apply_chat_template(
                request.messages, add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer.encode(request.prompt)
        sampling = {"temperature": body["temperature"], "top_p": body["top_p"], "top_k": 0}
        with one_at_a_time, torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(body["seed"])
            output = model.generate(
                torch.tensor([ids]),
                max_new_tokens=body["max_tokens"],
                **({"do_sample": True, **sampling} if body["temperature"] else {}),
            )[0, len(ids) :].tolist()
        text = tokenizer.decode(output, skip_special_tokens=True)
        finish = "stop" if output[-1] == end else "length"
        return Reply(text, finish, len(ids), len(output))

    return answer


class CompletionServer:
    """POST /v1/chat/completions and /v1/completions; use it as a context manager.

    Attributes: url; requests: all that came in, in order; most_at_once: requests in work together.
    """

    def __init__(
        self,
        answer: Answering = echo,
        fault: Callable[[int, Request], Fault | None] = lambda number, request: None,
        port: int = 0,
    ):
        self.answer, self.fault = answer, fault
        self.requests: list[Request] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.owner = self
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        # The pause between two looks for a shutdown; half a second otherwise.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if killed: open connections break, new ones are refused."""
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._connections:
                _close(connection)

    def opened(self, connection: socket.socket) -> None:
        """Remember a connection, so that it can be broken."""
        with self._lock:
            self._connections.add(connection)

    def respond(self, handler: "_Handler", request: Request) -> None:
        """Answer one request, or fail as told."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            fault = self.fault(number, request) or Fault()
            time.sleep(fault.delay_seconds)
            if fault.drop:
                _close(handler.connection)
            elif fault.raw is not None:
                handler.send(fault.status, fault.raw, {"Content-Type": "text/html"})
            elif fault.status != 200:
                error = {"error": {"message": fault.message, "type": "test", "code": None}}
                handler.send(fault.status, json.dumps(error).encode(), fault.headers)
            else:
                reply = self.answer(request)
                body = _completion(request, Reply(reply) if isinstance(reply, str) else reply)
                handler.send(200, json.dumps(body).encode(), fault.headers)
        finally:
            with self._lock:
                self.at_once -= 1


class _Server(ThreadingHTTPServer):
    owner: CompletionServer
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are wanted here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.owner.opened(self.connection)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, json.loads(content), time.monotonic())
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            return self.send(404, b'{"error": {"message": "no such page"}}', {})
        return self.server.owner.respond(self, request)

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """One whole response."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""


def _completion(request: Request, reply: Reply) -> dict[str, Any]:
    chat = request.path.endswith("/chat/completions")
    content = {"message": {"role": "assistant", "content": reply.text}} if chat else {}
    return {
        "id": "completion",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.body["model"],
        "choices": [
            {"index": 0, "finish_reason": reply.finish, **(content or {"text": reply.text})}
        ],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
