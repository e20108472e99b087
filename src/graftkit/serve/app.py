"""The routes: the OpenAI API over one engine, and vLLM's two routes for packs."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from graftkit.config import VERSION
from graftkit.errors import BusyError, GraftError, UnknownModelError
from graftkit.serve import protocol
from graftkit.serve.answering import (
    AnswerLimits,
    Prompt,
    RunningAnswers,
    WholeAnswer,
    check_answers,
    route_object,
    start_answers,
)
from graftkit.serve.guard import GuardSettings, RequestGuard
from graftkit.serve.metrics import ServerMetrics
from graftkit.serve.models import AUTO, ServedModels
from graftkit.serve.sampling import SamplingSettings

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "The request is not valid."),
        (401, "No key, or a wrong one."),
        (403, "The admin key is needed."),
        (404, "No such model."),
        (413, "The body is too large."),
        (429, "Too many requests wait."),
        (503, "The server is shutting down."),
    )
}
_RETRY = {"Retry-After": "1"}


class ServerApp:
    """Everything behind the routes of one server."""

    def __init__(self, models: ServedModels, limits: AnswerLimits, metrics: ServerMetrics):
        self.models, self.limits, self.metrics = models, limits, metrics

    async def complete(self, body: protocol.CompletionBody, request: Request) -> Response:
        """/v1/completions."""

        def samplings(room: int) -> list[SamplingSettings]:
            most = body.max_tokens or room
            return [body.sampling(most, body.stop, body.logprobs, i) for i in range(body.n)]

        answers = await self._start(body, list(body.prompts), samplings)
        name = f"cmpl-{uuid.uuid4().hex}"
        head = self._head(body, answers, name, "text_completion")

        def choice(place: int, text: str, tokens: Any, finish: str | None) -> dict[str, Any]:
            logprobs = None
            if body.logprobs is not None:
                logprobs = protocol.completion_logprobs(answers.tokenizer, tokens)
            own = {"index": place, "text": text, "logprobs": logprobs}
            return own | {"finish_reason": finish}

        return await self._respond(body, request, answers, head, head, choice, choice)

    async def chat(self, body: protocol.ChatBody, request: Request) -> Response:
        """/v1/chat/completions."""
        top = (body.top_logprobs or 0) if body.logprobs else None

        def samplings(room: int) -> list[SamplingSettings]:
            most = body.max_completion_tokens or body.max_tokens or room
            return [body.sampling(most, body.stop, top, place) for place in range(body.n)]

        answers = await self._start(body, [body.checked_messages()], samplings)
        name = f"chatcmpl-{uuid.uuid4().hex}"
        begun: set[int] = set()

        def logprobs(tokens: Any) -> Any:
            return protocol.chat_logprobs(answers.tokenizer, tokens) if body.logprobs else None

        def whole(place: int, text: str, tokens: Any, finish: str | None) -> dict[str, Any]:
            message = {"role": "assistant", "content": text, "refusal": None}
            own = {"index": place, "message": message, "logprobs": logprobs(tokens)}
            return own | {"finish_reason": finish}

        def piece(place: int, text: str, tokens: Any, finish: str | None) -> dict[str, Any]:
            delta = {"content": text} if place in begun else {"role": "assistant", "content": text}
            begun.add(place)
            own = {"index": place, "delta": delta, "logprobs": logprobs(tokens)}
            return own | {"finish_reason": finish}

        return await self._respond(
            body,
            request,
            answers,
            self._head(body, answers, name, "chat.completion"),
            self._head(body, answers, name, "chat.completion.chunk"),
            whole,
            piece,
        )

    async def respond(self, body: protocol.ResponseBody, request: Request) -> Response:
        """/v1/responses."""

        def samplings(room: int) -> list[SamplingSettings]:
            return [body.sampling(body.max_output_tokens or room, None, None)]

        answers = await self._start(body, [body.checked_messages()], samplings)
        ids = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        if body.stream:
            return _event_stream(_response_events(body, answers, ids))
        [answer] = await _whole(answers, request)
        return JSONResponse(_response_object(body, answers, ids, answer.text, answer.finish))

    def list_models(self) -> list[dict[str, Any]]:
        """The target, every pack, and auto."""
        target = self.models.target_name
        own = {"object": "model", "created": 0, "owned_by": "graftkit"}
        packs = [
            own | {"id": name, "parent": target, "root": name, "digest": pack.digest}
            for name, pack in sorted(self.models.engine.packs.items())
        ]
        first = own | {"id": target, "parent": None, "root": target}
        return [first, *packs, own | {"id": AUTO, "parent": target, "root": AUTO}]

    async def _start(
        self,
        body: protocol.GenerationBody,
        prompts: Sequence[Prompt],
        samplings: Callable[[int], Sequence[SamplingSettings]],
    ) -> RunningAnswers:
        loop = asyncio.get_running_loop()
        answers = await run_in_threadpool(
            start_answers, self.models, self.limits, loop, body.model, prompts, samplings
        )
        if answers.resolved.route is not None:
            self.metrics.count_routed(answers.resolved.route.name)
        return answers

    def _head(
        self, body: protocol.GenerationBody, answers: RunningAnswers, name: str, kind: str
    ) -> dict[str, Any]:
        head = {"id": name, "object": kind, "created": answers.created, "model": body.model}
        route = route_object(answers.resolved.route)
        return head if route is None else head | {"route": route}

    async def _respond(
        self,
        body: protocol.CompletionBody | protocol.ChatBody,
        request: Request,
        answers: RunningAnswers,
        head: dict[str, Any],
        piece_head: dict[str, Any],
        whole: Callable[..., dict[str, Any]],
        piece: Callable[..., dict[str, Any]],
    ) -> Response:
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return _event_stream(_pieces(answers, piece_head, piece, with_usage))
        ended = await _whole(answers, request)
        choices = [whole(i, own.text, own.tokens, own.finish) for i, own in enumerate(ended)]
        counts = protocol.usage(answers.prompt_tokens, answers.answer_tokens)
        return JSONResponse(head | {"choices": choices, "usage": counts})


async def _whole(answers: RunningAnswers, request: Request) -> list[WholeAnswer]:
    """All answers; a client that goes away ends them."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        answers.cancel()

    watcher = asyncio.create_task(watch())
    try:
        ended = await answers.whole()
    finally:
        watcher.cancel()
    check_answers(ended)
    return ended


async def _pieces(
    answers: RunningAnswers,
    head: dict[str, Any],
    piece: Callable[..., dict[str, Any]],
    with_usage: bool,
) -> AsyncIterator[str]:
    """A stream's data lines, for [DONE] at the end."""
    parts = answers.parts()
    try:
        async for place, part in parts:
            if part.finish in ("error", "cancelled", "timeout"):
                reason = part.error or f"the answer was not finished: {part.finish}"
                yield _data(protocol.error_object(500 if part.error else 503, reason))
                continue
            choice = piece(place, part.text, part.tokens, part.finish)
            yield _data(head | {"choices": [choice]})
        if with_usage:
            counts = protocol.usage(answers.prompt_tokens, answers.answer_tokens)
            yield _data(head | {"choices": [], "usage": counts})
        yield "data: [DONE]\n\n"
    finally:
        answers.cancel()


async def _response_events(
    body: protocol.ResponseBody, answers: RunningAnswers, ids: tuple[str, str]
) -> AsyncIterator[str]:
    """Events of a streamed response."""
    number = 0

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        data = {"type": kind, "sequence_number": number - 1, **fields}
        return f"event: {kind}\n{_data(data)}"

    place = {"item_id": ids[1], "output_index": 0, "content_index": 0}
    text, finish = "", ""
    try:
        yield event("response.created", response=_response_object(body, answers, ids, "", ""))
        async for _, part in answers.parts():
            text, finish = text + part.text, part.finish or finish
            if part.text:
                yield event("response.output_text.delta", delta=part.text, logprobs=[], **place)
        yield event("response.output_text.done", text=text, logprobs=[], **place)
        done = _response_object(body, answers, ids, text, finish)
        yield event(f"response.{done['status']}", response=done)
    finally:
        answers.cancel()


def _response_object(
    body: protocol.ResponseBody,
    answers: RunningAnswers,
    ids: tuple[str, str],
    text: str,
    finish: str,
) -> dict[str, Any]:
    status = {"": "in_progress", "stop": "completed", "length": "incomplete"}.get(finish, "failed")
    content = {"type": "output_text", "text": text, "annotations": []}
    message = {"id": ids[1], "type": "message", "role": "assistant", "status": "completed"}
    return {
        "id": ids[0],
        "object": "response",
        "created_at": answers.created,
        "model": body.model,
        "status": status,
        "error": {"code": "server_error", "message": finish} if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
        "instructions": body.instructions,
        "output": [message | {"content": [content]}] if finish else [],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "usage": {
            "input_tokens": answers.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answers.answer_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answers.prompt_tokens + answers.answer_tokens,
        },
        "route": route_object(answers.resolved.route),
    }


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _event_stream(lines: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


def create_app(
    models: ServedModels, limits: AnswerLimits, guard: GuardSettings
) -> tuple[RequestGuard, FastAPI]:
    """The guarded app, and the app behind it."""
    metrics = ServerMetrics(models.engine)
    server = ServerApp(models, limits, metrics)
    app = FastAPI(
        title="graftkit",
        version=VERSION,
        docs_url=None,  # its page would load scripts of others
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    _add_generation(app, server)
    _add_models(app, server)
    _add_state(app, server)
    _add_errors(app)
    return RequestGuard(app, guard, metrics), app


def _add_generation(app: FastAPI, server: ServerApp) -> None:
    @app.post("/v1/completions")
    async def completions(body: protocol.CompletionBody, request: Request) -> Response:
        return await server.complete(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: protocol.ChatBody, request: Request) -> Response:
        return await server.chat(body, request)

    @app.post("/v1/responses")
    async def responses(body: protocol.ResponseBody, request: Request) -> Response:
        return await server.respond(body, request)


def _add_models(app: FastAPI, server: ServerApp) -> None:
    models = server.models

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": server.list_models()}

    @app.get("/v1/models/{name}")
    async def get_model(name: str) -> dict[str, Any]:
        for model in server.list_models():
            if model["id"] == name:
                return model
        raise HTTPException(404, "no such model; /v1/models lists them")

    @app.post("/v1/load_lora_adapter")
    async def load(body: protocol.LoadBody) -> Response:
        await run_in_threadpool(models.load_file, body.lora_name, body.lora_path, body.load_inplace)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: protocol.UnloadBody) -> Response:
        await run_in_threadpool(models.unload, body.lora_name)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_state(app: FastAPI, server: ServerApp) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": VERSION}

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = server.models.engine.is_running
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, message: str, code: str | None = None) -> JSONResponse:
        headers = _RETRY if status in (429, 503) else None
        return JSONResponse(protocol.error_object(status, message, code), status, headers)

    @app.exception_handler(GraftError)
    async def refused(request: Request, error: GraftError) -> JSONResponse:
        if isinstance(error, UnknownModelError):
            return answer(404, str(error), "model_not_found")
        if isinstance(error, BusyError):
            return answer(429 if "wait already" in str(error) else 503, str(error))
        return answer(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return answer(400, f"{place}: {first['msg']}" if place else str(first["msg"]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the request failed in the server; its log says why")
