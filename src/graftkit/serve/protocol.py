"""Requests and answers as the OpenAI API writes them; the bodies of vLLM for packs.

What a request asks for and is not done here is refused by its name, and not left out in silence.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftkit.rows.chat import parse_messages
from graftkit.serve.sampling import SampledToken, SamplingSettings

_REFUSED = (
    *("best_of", "suffix", "echo", "logit_bias", "presence_penalty", "frequency_penalty"),
    *("tools", "functions", "response_format", "audio", "previous_response_id", "background"),
)
_HARMLESS = {"best_of": 1, "response_format": {"type": "text"}}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

Stop = str | Annotated[list[str], Field(max_length=8)] | None


class GenerationBody(BaseModel):
    """What all three routes that generate share."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = Field(min_length=1, max_length=600, examples=["target"])
    """The target, a pack, a mixture, or auto."""
    stream: bool = False
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)

    @model_validator(mode="after")
    def _refuse(self) -> "GenerationBody":
        for name in _REFUSED:
            value = (self.model_extra or {}).get(name)
            if value and value != _HARMLESS.get(name):
                raise ValueError(f"{name} is not supported")
        return self

    def sampling(
        self, max_tokens: int, stop: Stop, logprobs: int | None, place: int = 0
    ) -> SamplingSettings:
        """Settings of the answer number `place` of several."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        seed = None if self.seed is None else (self.seed + place) % 2**63
        own = (self.temperature, self.top_p, self.top_k)
        return SamplingSettings(max_tokens, *own, seed, stops, logprobs)


class StreamOptions(BaseModel):
    """Whether the last piece of a stream counts tokens."""

    include_usage: bool = False


class CompletionBody(GenerationBody):
    """/v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(examples=["2 + 2 ="])
    max_tokens: int | None = Field(default=16, ge=1)
    n: int = Field(default=1, ge=1, le=16)
    stop: Stop = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(part, int) for part in self.prompt):
            return [[int(token) for token in self.prompt]]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatBody(GenerationBody):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(
        min_length=1, examples=[[{"role": "user", "content": "What is 2 + 2?"}]]
    )
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=16)
    stop: Stop = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    def checked_messages(self) -> list[dict[str, Any]]:
        """Raises: RowsError."""
        return parse_messages(self.messages, None, "messages")[0]


class ResponseBody(GenerationBody):
    """/v1/responses, in its basic form."""

    input: str | list[dict[str, Any]] = Field(examples=["What is 2 + 2?"])
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)

    def checked_messages(self) -> list[dict[str, Any]]:
        """Raises: RowsError."""
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            turns += [_plain_turn(turn) for turn in self.input]
        return parse_messages(turns, None, "input")[0]


def _plain_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of the responses API, whose parts of text have types of their own."""
    content = turn.get("content")
    if isinstance(content, list):
        content = [
            part | {"type": "text"}
            if isinstance(part, dict) and part.get("type") in ("input_text", "output_text")
            else part
            for part in content
        ]
    return {"role": turn.get("role"), "content": content}


class LoadBody(BaseModel):
    """/v1/load_lora_adapter, as vLLM has it."""

    lora_name: str = Field(min_length=1, max_length=64, examples=["math"])
    lora_path: str = Field(min_length=1, max_length=128, examples=["math.skillpack"])
    load_inplace: bool = False


class UnloadBody(BaseModel):
    """/v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str = Field(min_length=1, max_length=64, examples=["math"])


def error_object(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """The same as JSON."""
    return json.dumps(error_object(status, message, code)).encode()


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Token counts of one request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def completion_logprobs(tokenizer: Any, tokens: Sequence[SampledToken]) -> dict[str, Any]:
    """Log probabilities as /v1/completions writes them."""
    texts = [str(tokenizer.decode([token.id])) for token in tokens]
    offsets = [sum(map(len, texts[:place])) for place in range(len(texts))]
    tops = [{str(tokenizer.decode([id_])): value for id_, value in token.top} for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Any, tokens: Sequence[SampledToken]) -> dict[str, Any]:
    """Log probabilities as /v1/chat/completions writes them."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = str(tokenizer.decode([token]))
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            entry(token.id, token.logprob)
            | {"top_logprobs": [entry(id_, value) for id_, value in token.top]}
            for token in tokens
        ]
    }
