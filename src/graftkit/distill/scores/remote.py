"""An object of another process: its operators, attributes and calls are requests to it.

Loaded in both processes of a verdict (wire.py); it needs no other file of graftkit.
"""

import builtins
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftkit.distill.scores.wire import Wire

NOTHING: Any = object()  # no plain value
SHOWN_NAMES = ("__name__", "__qualname__", "__doc__", "__dict__")

ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift",
              "rshift", "and_", "or_", "xor")  # fmt: skip
ORDER = ("eq", "ne", "lt", "le", "gt", "ge")
AS_NUMBER = ("abs", "bool", "int", "float", "complex", "index", "round")
OTHERS = ("neg", "pos", "invert", "getitem", "setitem", "delitem", "contains", "len", "iter",
          "next", "reversed", "hash", "str", "repr", "format", "enter", "exit")  # fmt: skip


def _enter(manager: Any) -> Any:
    return type(manager).__enter__(manager)


def _exit(manager: Any, *how: Any) -> Any:
    return type(manager).__exit__(manager, *how)


def _call(function: Any, arguments: Any, named: Any) -> Any:
    return function(*arguments, **named)


def _finish(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


_NAMES = (*ARITHMETIC, *ORDER, *AS_NUMBER, *OTHERS)
_ATTRIBUTES = ("getattr", "setattr", "delattr", "isinstance", "issubclass")
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in _NAMES if hasattr(operator, name)},
    **{n: getattr(builtins, n) for n in (*_NAMES, *_ATTRIBUTES) if hasattr(builtins, n)},
    **{"call": _call, "enter": _enter, "exit": _exit, "finish": _finish},
}


class Remote:
    """One object. What it is equal to, the other process may not decide alone.

    Beside a plain value it is what it is as a plain value (of a class that inherits from int: that
    int), and without one equal to no plain value and in no order with one. An operator that joins
    it with a plain number gives an object of the other process again, which stands for no number:
    otherwise an object that gives 0 for every difference would pass a test of closeness.
    """

    def __init__(self, wire: "Wire", handle: int, plain: Any, informed: bool = False):
        own = object.__getattribute__(self, "__dict__")
        own.update(_wire=wire, _handle=handle, _plain=plain, _informed=informed)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            plain = own(self, "_plain")
            return Remote if plain is NOTHING else type(plain)
        if name[:2] == "__" and name not in SHOWN_NAMES:
            return object.__getattribute__(self, name)
        return own(self, "_wire").request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own(self, "_wire").request("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        own(self, "_wire").request("delattr", self, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the call returns in the other process."""
        return own(self, "_wire").request("call", self, arguments, named)

    def __instancecheck__(self, thing: Any) -> Any:
        return own(self, "_wire").request("isinstance", thing, self)

    def __subclasscheck__(self, kind: Any) -> Any:
        return own(self, "_wire").request("issubclass", kind, self)


def own(remote: Remote, name: str) -> Any:
    """What is kept about an object here: _wire, _handle, _plain or _informed."""
    return object.__getattribute__(remote, "__dict__")[name]


def is_remote(value: Any) -> bool:
    """Whether it stands for an object of the other process; isinstance would ask its class."""
    return type(value) is Remote


def _compares(name: str) -> Callable[[Remote, Any], Any]:
    def compare(self: Remote, other: Any) -> Any:
        plain = own(self, "_plain")
        if is_remote(other):
            return own(self, "_wire").request(name, self, other)
        return NotImplemented if plain is NOTHING else OPERATIONS[name](plain, other)

    return compare


def _joins(name: str, reflected: bool) -> Callable[[Remote, Any], Any]:
    def join(self: Remote, other: Any) -> Any:
        plain, operands = own(self, "_plain"), (other, self) if reflected else (self, other)
        if plain is not NOTHING and not is_remote(other):
            return OPERATIONS[name](*((other, plain) if reflected else (plain, other)))
        result = own(self, "_wire").request(name, *operands)
        if not isinstance(other, int | float | complex) or is_remote(other):
            return result
        if not is_remote(result):
            raise TypeError(f"{name} of an object and a number gives a {type(result).__name__}")
        vars_of = object.__getattribute__(result, "__dict__")
        return Remote(vars_of["_wire"], vars_of["_handle"], NOTHING, informed=True)

    return join


def _does(name: str) -> Callable[..., Any]:
    def do(self: Remote, *arguments: Any) -> Any:
        if name in AS_NUMBER and own(self, "_informed"):
            raise TypeError(f"{name} of what an object and a number gave")
        plain = own(self, "_plain")
        if plain is not NOTHING and name in (*AS_NUMBER, "hash"):
            return OPERATIONS[name](plain, *arguments)
        return own(self, "_wire").request(name, self, *arguments)

    return do


for _name in ORDER:
    setattr(Remote, f"__{_name}__", _compares(_name))
for _name in ARITHMETIC:
    _bare = _name.rstrip("_")
    setattr(Remote, f"__{_bare}__", _joins(_name, reflected=False))
    setattr(Remote, f"__r{_bare}__", _joins(_name, reflected=True))
for _name in (*AS_NUMBER, *OTHERS):
    setattr(Remote, f"__{_name}__", _does(_name))
