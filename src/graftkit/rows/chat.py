"""Conversations: checked, and written in the chat template of a tokenizer.

A template writes every special token itself, so its text is tokenized without adding any; otherwise
a BOS would come twice. Which tokens are the assistant's is found in one of two ways:

marks     of a template that has {% generation %} blocks, which say it
prefixes  for turn i, the text of the messages before it (with the header of an answer) and the text
          of the messages up to it must both begin the whole text; the turn lies between them

A template that rewrites earlier turns once later ones follow fails the second test and is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

from graftkit.errors import RowsError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message may have."""

Message = Mapping[str, Any]
TokenSpan = tuple[int, int]
"""Index of the first token and of the one behind the last."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: Any) -> str | None:
    """The template of plain conversations, as Jinja text; None where the tokenizer has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several by name
        template = template.get("default")
    return template or None


def template_digest(tokenizer: Any) -> str | None:
    """BLAKE3 of the chat template, 64 hexadecimal digits; None where there is none."""
    template = chat_template(tokenizer)
    return None if template is None else blake3(template.encode("utf-8", "replace")).hexdigest()


def encode_question(
    tokenizer: Any, prompt: str, chat: bool, system: str | None = None
) -> list[int]:
    """Token ids from which a model answers a prompt.

    Args:
        chat: write the prompt as a user's turn of the chat template, else as plain text.
        system: text of a system turn before it, of a chat.
    Raises: RowsError for a system turn of plain text, or a template that is missing or refuses.
    """
    if not chat:
        if system is not None:
            raise RowsError("a system text needs a chat template, and the prompt is given raw")
        return list(tokenizer.encode(prompt, add_special_tokens=True))
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": prompt})
    text = write_messages(tokenizer, turns, None, "the prompt", reply=True)
    if system is not None and system.strip() not in text:
        raise RowsError("the chat template does not write a system text; put it into the prompt")
    return list(tokenizer.encode(text, add_special_tokens=False))


def write_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    origin: str,
    *,
    reply: bool,
) -> str:
    """A conversation as text.

    Args:
        reply: end with the header of the assistant's next turn.
    Raises: RowsError where the template is missing, refuses the messages or fails.
    """
    return str(_apply(tokenizer, messages, tools, origin, add_generation_prompt=reply))


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    origin: str,
) -> tuple[list[int], list[TokenSpan]]:
    """Token ids of a conversation, and the spans that the assistant wrote, at least one.

    A span holds the words or tool calls of a turn and the special token that ends it.

    Raises: RowsError where the template is missing or fails, leaves out a tool call or the tools,
        or does not say what the assistant wrote.
    """
    template = chat_template(tokenizer)
    if template is not None and _GENERATION_BLOCK.search(template):
        ids, spans = _encode_by_marks(tokenizer, messages, tools, origin)
    else:
        ids, spans = _encode_by_prefixes(tokenizer, messages, tools, origin)
    spans = [_without_separator(tokenizer, ids, span) for span in spans]
    spans = [span for span in spans if span[0] < span[1]]
    if not spans:
        raise RowsError(f"{origin}: the assistant's turns have no tokens; give them some content")
    _check_written(tokenizer, ids, spans, messages, tools, origin)
    return ids, spans


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer; None where there is none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = write_messages(tokenizer, turns, None, "", reply=False)
    except RowsError:
        return None
    behind = tokenizer.encode(text.rpartition("ANSWER")[2].lstrip(), add_special_tokens=False)
    return behind[0] if behind and behind[0] in tokenizer.all_special_ids else None


def parse_messages(
    messages: Any, tools: Any, origin: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools with plain text as their content.

    Tools may be JSON text, and so may the arguments of a call, as some data sets and APIs write
    them. A content of several texts is joined.

    Raises: RowsError for anything else, and for text that is no Unicode.
    """
    if not isinstance(messages, list) or not messages:
        what = "empty" if messages == [] else type(messages).__name__
        raise RowsError(
            f'{origin}: "messages" is {what}; expected a list of {{"role": ..., "content": ...}}'
        )
    turns = [_parse_message(turn, f"{origin}: message {i}") for i, turn in enumerate(messages, 1)]
    if isinstance(tools, str):
        tools = _parse_json(tools, f'{origin}: "tools"')
    tools = [] if tools is None else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowsError(f'{origin}: "tools" is {type(tools).__name__}; expected a list of objects')
    try:
        json.dumps([turns, tools], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowsError(
            f"{origin}: a message holds half of a surrogate pair; write the whole character"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RowsError(f"{origin}: a message is no JSON ({error}); expected text") from error
    return turns, tools


def _parse_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowsError(f"{where} is {type(message).__name__}; expected an object")
    turn = {key: value for key, value in message.items() if value is not None}
    role = turn.get("role")
    if role not in ROLES:
        raise RowsError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if "tool_calls" in turn:
        turn["tool_calls"] = [
            _parse_call(call, where) for call in _as_list(turn["tool_calls"], where)
        ]
        if not turn["tool_calls"]:
            del turn["tool_calls"]
    content = turn.get("content", "" if "tool_calls" in turn else None)
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowsError(f'{where}: "content" is {type(content).__name__}; expected a string')
    return turn | {"content": content}


def _text_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RowsError(f"{where} has a part of type {kind}; only text is read")
    return str(part["text"])


def _as_list(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        raise RowsError(f'{where}: "tool_calls" is {type(calls).__name__}; expected a list')
    return calls


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    """A call with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowsError(
            f'{where} has a tool call without a name; expected {{"function": {{"name": ..., '
            '"arguments": ...}}}'
        )
    if isinstance(function.get("arguments"), str):
        function = function | {"arguments": _parse_json(function["arguments"], f"{where}: a call")}
    return call | {"function": function} if "function" in call else function


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowsError(f"{what} is text that is not JSON ({error})") from error


def _apply(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    origin: str,
    **options: Any,
) -> Any:
    where = f"{origin}: " if origin else ""
    if getattr(tokenizer, "chat_template", None) is None:
        raise RowsError(
            f"{where}messages need a chat template, and the tokenizer has none; give prompt and "
            "completion, or use a model for chats"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, **{"tokenize": False} | options
        )
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RowsError(
            f"{where}the chat template does not take these messages ({reason[:200]}); see that "
            "their roles and fields are those that it expects"
        ) from error


def _encode_by_marks(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    origin: str,
) -> tuple[list[int], list[TokenSpan]]:
    output = _apply(
        tokenizer,
        messages,
        tools,
        origin,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marks = [0, *output["assistant_masks"], 0]
    edges = [i for i in range(len(marks) - 1) if marks[i] != marks[i + 1]]
    return list(output["input_ids"]), list(zip(edges[::2], edges[1::2], strict=True))


def _encode_by_prefixes(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    origin: str,
) -> tuple[list[int], list[TokenSpan]]:
    text = write_messages(tokenizer, messages, tools, origin, reply=False)
    cuts: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = write_messages(tokenizer, messages[:index], tools, origin, reply=True)
        turn = write_messages(tokenizer, messages[: index + 1], tools, origin, reply=False)
        if not (turn.startswith(before) and text.startswith(turn)):
            raise RowsError(
                f"{origin}: the chat template writes message {index + 1} otherwise when more "
                "follow, so what the assistant wrote cannot be told; give one row for each of its "
                "turns, which ends there, or a template with generation blocks"
            )
        cuts += [len(before), len(turn)]
    ids, places = _tokenize_cut(tokenizer, text, cuts)
    return ids, list(zip(places[::2], places[1::2], strict=True))


def _tokenize_cut(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens of a text, and how many of them lie before each cut.

    The text is tokenized whole where that gives a prefix the tokens of its own, as generation from
    it sees them. Where a token would reach across a cut, the parts are tokenized apart.
    """

    def tokens(part: str) -> list[int]:
        return list(tokenizer.encode(part, add_special_tokens=False))

    whole, heads = tokens(text), [tokens(text[:cut]) for cut in cuts]
    if all(whole[: len(head)] == head for head in heads):
        return whole, [len(head) for head in heads]
    ids: list[int] = []
    places = []
    for first, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        ids += tokens(text[first:end])
        places.append(len(ids))
    return ids, places[:-1]


def _without_separator(tokenizer: Any, ids: Sequence[int], span: TokenSpan) -> TokenSpan:
    """The span up to the special token that ends the turn: no model writes the blanks behind it."""
    first, end = span
    special = set(tokenizer.all_special_ids)
    last = max((i for i in range(first, end) if ids[i] in special), default=end - 1)
    behind = tokenizer.decode(ids[last + 1 : end])
    return (first, end) if behind.strip() else (first, last + 1)


def _check_written(
    tokenizer: Any,
    ids: Sequence[int],
    spans: Sequence[TokenSpan],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    origin: str,
) -> None:
    """Raises: RowsError where the template leaves out a tool call, or the tools."""
    written = "".join(tokenizer.decode(ids[first:end]) for first, end in spans)
    for what, names, text in (
        ("call of the tool", _called(messages), written),
        ("description of the tool", _names(tools or ()), tokenizer.decode(ids)),
    ):
        for name in names:
            if name not in text:
                raise RowsError(
                    f"{origin}: the chat template does not write the {what} {name!r}; use a model "
                    "whose template knows tools, or write it into the content"
                )


def _called(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message["role"] == "assistant":
            yield from _names(message.get("tool_calls", ()))


def _names(tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]
