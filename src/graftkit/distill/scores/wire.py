"""Values and operations between the process of an answer and the process of its tests.

Plain values (numbers, text, bytes, containers of them, dates, decimals, arrays) are copied; a
mutable argument takes on what the other side made of it. Everything else stays where it is: the
other side holds a `Remote`, whose operators, attributes and calls are requests. Messages are JSON,
so reading one runs nothing. Both processes load this file.
"""

import json
import os
import struct
from collections.abc import Callable
from typing import Any, NoReturn

from graftkit.distill.scores.remote import NOTHING, OPERATIONS, Remote
from graftkit.distill.scores.values import ERRORS, Packing, Unpacking, assign

MESSAGE_BYTES = 2**26


class Wire:
    """One end of the connection.

    Args:
        descriptor: a stream socket. allowed: whether the other side may request this operation
            with these arguments, of which the second list are objects of ours. broken: called, and
            not to return, when the other side is gone or sends what is no message. operations:
            further ones, by name.
    """

    def __init__(
        self,
        descriptor: int,
        allowed: Callable[[str, list[Any], list[Any]], bool],
        broken: Callable[[], NoReturn],
        **operations: Callable[..., Any],
    ):
        self._descriptor, self._allowed, self._broken = descriptor, allowed, broken
        self._operations = {**OPERATIONS, **operations}
        self._own: list[Any] = []  # objects of ours that the other side holds, by handle
        self._handles: dict[int, int] = {}
        self._errors: dict[int, type[BaseException]] = {}
        # Looked up now, as the code that is judged may change the modules of its process.
        self._read, self._write = os.read, os.write
        self._loads, self._dumps = json.loads, json.dumps

    def request(self, operation: str, *arguments: Any) -> Any:
        """The result of an operation of the other side. Raises: what it raises there."""
        packing = Packing(self)
        self._send(["ask", operation, [packing.encode(item) for item in arguments]])
        while True:
            kind, *content = self._receive()
            if kind == "ask":
                self._serve(*content)
                continue
            try:
                unpacking = Unpacking(self, packing.containers)
                value = unpacking.decode(content[0])
                states = [unpacking.contents(state) for state in content[1]]
                for container, state in zip(packing.containers, states, strict=False):
                    assign(container, state)
                error = self._error(value, content[2]) if kind == "raise" else None
            except (LookupError, ValueError, TypeError, AttributeError):
                self._broken()
            if error is not None:
                raise error
            return value

    def serve(self) -> NoReturn:
        """Answer requests until the other side is gone."""
        while True:
            kind, *content = self._receive()
            if kind != "ask":
                self._broken()
            self._serve(*content)

    def _serve(self, operation: str, encoded: list[Any]) -> None:
        unpacking = Unpacking(self, [])
        try:
            arguments = [unpacking.decode(item) for item in encoded]
            known = list(unpacking.containers)
            if not self._allowed(operation, arguments, unpacking.ours):
                raise PermissionError(f"no {operation} on an object of the tests")
            result = self._operations[operation](*arguments)
            reply = ["value", *Packing(self, known).reply(result)]
        except BaseException as error:
            try:
                told = Packing(self, unpacking.containers).reply([type(error), list(error.args)])
                reply = ["raise", *told, self.handle(error)]
            except BaseException:
                name = next(
                    kind.__name__ for kind in type(error).__mro__ if kind in ERRORS.values()
                )
                reply = ["raise", ["list", [["error", name], ["list", []]]], [], None]
        self._send(reply)

    def handle(self, thing: Any) -> int:
        """The number of an object of ours, which from now on lives as long as the process."""
        if id(thing) not in self._handles:
            self._handles[id(thing)] = len(self._own)
            self._own.append(thing)
        return self._handles[id(thing)]

    def own(self, handle: int) -> Any:
        """An object of ours. Raises: LookupError, TypeError."""
        if handle < 0:
            raise LookupError("no such object")
        return self._own[handle]

    def error_class(
        self, handle: int, name: str, bases: tuple[type[BaseException], ...]
    ) -> type[BaseException]:
        """A class of ours that stands for an exception of the other side."""
        if handle not in self._errors:
            namespace = {"__getattr__": _error_attribute, "_handle": handle}
            self._errors[handle] = type(name, bases, namespace)
        return self._errors[handle]

    def _error(self, value: Any, handle: int | None) -> BaseException:
        kind, arguments = value
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError("no exception")
        try:
            error = kind.__new__(kind, *arguments)
        except Exception:
            error = Exception(kind.__name__)
        error.args = tuple(arguments)
        if type(error) not in ERRORS.values() and handle is not None:
            error._remote = Remote(self, handle, NOTHING)  # type: ignore[attr-defined]
        return error

    def _send(self, message: list[Any]) -> None:
        content = self._dumps(message).encode()
        if len(content) > MESSAGE_BYTES:
            raise MemoryError("a value too large to be passed on")
        view = memoryview(struct.pack("=I", len(content)) + content)
        try:
            while view:
                view = view[self._write(self._descriptor, view) :]
        except OSError:
            self._broken()

    def _receive(self) -> list[Any]:
        (length,) = struct.unpack("=I", self._read_exactly(4))
        if length > MESSAGE_BYTES:
            self._broken()
        try:
            message = self._loads(self._read_exactly(length))
        except (ValueError, RecursionError):
            self._broken()
        sizes = {"ask": 3, "value": 3, "raise": 4}
        if not isinstance(message, list) or not message or not isinstance(message[0], str) \
                or sizes.get(message[0]) != len(message):  # fmt: skip
            self._broken()
        return message

    def _read_exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._read(self._descriptor, count - len(parts))
            except OSError:
                self._broken()
            if not part:
                self._broken()
            parts += part
        return bytes(parts)


def _error_attribute(error: BaseException, name: str) -> Any:
    if name[:2] == "__" or "_remote" not in vars(error):
        raise AttributeError(name)
    return getattr(vars(error)["_remote"], name)
