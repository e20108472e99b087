"""Values of the messages between an answer and its tests, as JSON: reading it runs nothing.

Plain values (numbers, text, bytes, containers of them, dates, decimals, arrays) are copied. Objects
of any other class stay where they are, and are a number here. Loaded in both processes of a verdict
(wire.py).
"""

import builtins
import importlib
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.distill.scores.remote import NOTHING, Remote, own

if TYPE_CHECKING:
    from graftkit.distill.scores.wire import Wire

ARRAYS = "biufcU"  # kinds of numpy's dtypes that are passed on
ERRORS = {
    k: v for k, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)
}
TYPES = {k: v for k, v in vars(builtins).items() if isinstance(v, type) and k not in ERRORS}
COPIED = {"range": "builtins", "Decimal": "decimal", "Fraction": "fractions"} | dict.fromkeys(
    ("date", "time", "datetime", "timedelta", "timezone"), "datetime"
)
PLAIN = (int, float, complex, str, bytes, tuple, frozenset, list, dict, set, bytearray)


class Packing:
    """Values of one message as JSON; mutable containers are numbered in the order they are met."""

    def __init__(self, wire: "Wire", known: Sequence[Any] = ()):
        self.wire, self.containers = wire, list[Any]()
        self._numbers: dict[int, int] = {}
        for container in known:
            self._number(container)

    def _number(self, container: Any) -> None:
        self._numbers[id(container)] = len(self.containers)
        self.containers.append(container)

    def reply(self, value: Any) -> list[Any]:
        """A result, and what became of the containers that both sides had before."""
        arguments = list(self.containers)
        return [self.encode(value), [self._contents(container) for container in arguments]]

    def encode(self, value: Any) -> Any:
        """As JSON. Raises: RecursionError for what is nested too deep."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -(2**63) < value < 2**63 else ["int", hex(value)]
        if kind is float:
            return ["float", value.hex()]
        if kind is Remote:
            return ["yours", own(value, "_handle")]
        if kind in (list, dict, set, bytearray):
            if id(value) in self._numbers:
                return ["same", self._numbers[id(value)]]
            self._number(value)
            return self._contents(value)
        if kind in PLAIN:
            return self._contents(value)
        if kind is deque:
            return ["deque", [self.encode(item) for item in value], value.maxlen]
        if COPIED.get(kind.__name__) == kind.__module__ and _is_copied(value):
            return ["copied", kind.__name__, [self.encode(part) for part in value.__reduce__()[1]]]
        return self._named(value, kind)

    def _contents(self, value: Any) -> Any:
        if isinstance(value, bytes | bytearray):
            return [_base(value).__name__, value.hex()]
        if isinstance(value, complex):
            return ["complex", value.real.hex(), value.imag.hex()]
        if isinstance(value, dict):
            pairs = dict.items(value)
            return ["dict", [[self.encode(key), self.encode(each)] for key, each in pairs]]
        base: Any = _base(value)
        return [base.__name__, [self.encode(item) for item in base.__iter__(value)]]

    def _named(self, value: Any, kind: type) -> Any:
        if isinstance(value, type):
            if TYPES.get(value.__name__) is value:
                return ["type", value.__name__]
            if issubclass(value, BaseException):
                return self._error_class(value)
        if kind is types.ModuleType and value.__name__ in sys.stdlib_module_names:
            return ["module", value.__name__]
        if kind.__module__ == "numpy" and hasattr(value, "tolist") and value.dtype.kind in ARRAYS:
            if not value.ndim:
                return self.encode(value.item())
            return ["array", str(value.dtype), self.encode(value.tolist())]
        if kind is types.CoroutineType:
            return ["coroutine", self.wire.handle(value)]
        base = _base(value)
        plain = None if base is None else Packing(self.wire).encode(_plain(value, base))
        return ["object", self.wire.handle(value), plain]

    def _error_class(self, kind: type) -> Any:
        if ERRORS.get(kind.__name__) is kind:
            return ["error", kind.__name__]
        if "_handle" in vars(kind):
            return ["yours", vars(kind)["_handle"]]
        bases = [self._error_class(b) for b in kind.__bases__ if issubclass(b, BaseException)]
        return ["own error", self.wire.handle(kind), kind.__name__, bases]


class Unpacking:
    """JSON of one message as values; containers are numbered as `Packing` numbers them.

    Raises: LookupError, ValueError, TypeError or AttributeError for what is no message.
    """

    def __init__(self, wire: "Wire", containers: Sequence[Any]):
        self.wire, self.containers = wire, list(containers)
        self.ours: list[Any] = []

    def decode(self, encoded: Any) -> Any:
        """The value, or what stands for it here."""
        if not isinstance(encoded, list):
            if encoded is None or isinstance(encoded, bool | int | str):
                return encoded
            raise TypeError("no value")
        tag, *rest = encoded
        return _DECODERS[tag](self, *rest)

    def contents(self, encoded: Any) -> Any:
        """What a container that has its number already holds now."""
        tag, items = encoded
        return bytes.fromhex(items) if tag == "bytearray" else self._filled(tag, items)

    def _filled(self, tag: str, items: Any) -> Any:
        if tag == "dict":
            return {self.decode(key): self.decode(value) for key, value in items}
        return {"list": list, "set": set}[tag](map(self.decode, items))

    def _container(self, tag: str, items: Any) -> Any:
        container: Any = {"list": list, "dict": dict, "set": set}[tag]()
        self.containers.append(container)
        assign(container, self._filled(tag, items))
        return container

    def _own(self, handle: int) -> Any:
        self.ours.append(self.wire.own(handle))
        return self.ours[-1]

    def _bytearray(self, text: str) -> bytearray:
        content = bytearray.fromhex(text)
        self.containers.append(content)
        return content

    def _copied(self, name: str, parts: list[Any]) -> Any:
        kind = getattr(importlib.import_module(COPIED[name]), name)
        return kind(*map(self.decode, parts))

    def _array(self, dtype: str, nested: Any) -> Any:
        import numpy

        kind = numpy.dtype(dtype)
        if kind.kind not in ARRAYS:
            raise TypeError(dtype)
        return numpy.array(self.decode(nested), dtype=kind)

    def _module(self, name: str) -> Any:
        if name not in sys.stdlib_module_names:
            raise LookupError(name)
        return importlib.import_module(name)

    def _object(self, handle: int, plain: Any) -> Remote:
        value = NOTHING if plain is None else Unpacking(self.wire, []).decode(plain)
        return Remote(self.wire, handle, value)

    def _coroutine(self, handle: int) -> Any:
        async def finish() -> Any:
            return self.wire.request("finish", Remote(self.wire, handle, NOTHING))

        return finish()

    def _own_error(self, handle: int, name: str, bases: list[Any]) -> type[BaseException]:
        return self.wire.error_class(handle, name, tuple(self.decode(base) for base in bases))


_DECODERS: dict[str, Callable[..., Any]] = {
    "int": lambda _, text: int(text, 16),
    "float": lambda _, text: float.fromhex(text),
    "complex": lambda _, real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "bytes": lambda _, text: bytes.fromhex(text),
    "bytearray": Unpacking._bytearray,
    "tuple": lambda self, items: tuple(map(self.decode, items)),
    "frozenset": lambda self, items: frozenset(map(self.decode, items)),
    "list": lambda self, items: self._container("list", items),
    "dict": lambda self, items: self._container("dict", items),
    "set": lambda self, items: self._container("set", items),
    "deque": lambda self, items, most: deque(map(self.decode, items), most),
    "same": lambda self, number: self.containers[number],
    "yours": Unpacking._own,
    "type": lambda _, name: TYPES[name],
    "error": lambda _, name: ERRORS[name],
    "own error": Unpacking._own_error,
    "copied": Unpacking._copied,
    "array": Unpacking._array,
    "module": Unpacking._module,
    "object": Unpacking._object,
    "coroutine": Unpacking._coroutine,
}


def assign(container: Any, state: Any) -> None:
    """Make a container hold what another of its kind holds."""
    if isinstance(container, list | bytearray):
        container[:] = state
    else:
        container.clear()
        container.update(state)


def _is_copied(value: Any) -> bool:
    """Not a time in a zone of another class."""
    return type(getattr(value, "tzinfo", None)).__name__ in ("NoneType", "timezone")


def _base(value: Any) -> Any:
    """The built-in type of a plain value, or of an object whose class inherits from one."""
    return next((base for base in PLAIN if isinstance(value, base)), None)


def _plain(value: Any, base: Any) -> Any:
    """As the built-in type holds it, whatever methods its class has."""
    if issubclass(base, int | float):
        return base.__pos__(value) if base is float else int.__index__(value)
    if base is str:
        return str.__str__(value)
    if base is dict:
        return dict(dict.items(value))
    if base is complex:
        return complex(value.real, value.imag)
    return base(base.__iter__(value))
