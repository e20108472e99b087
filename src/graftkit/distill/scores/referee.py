"""What runs inside the sandbox: an answer in one process, its tests in another.

    python referee.py answer|tests SOCKET CPU_SECONDS MEMORY_BYTES    the source on standard input

The tests run in their own process. A name that they do not define is looked up in the answer's
process, and a function of the answer runs there. Plain data crosses the socket, as lines of JSON:
None, bool, numbers, text, bytes, lists, tuples, dicts and sets; exceptions as names of classes with
plain arguments. Any other object of the answer stays in its process, and the tests hold a
`Reference`, which can be called, iterated, indexed, and asked for attributes and its length. To
compare it, or to compute with it, is refused, and the verdict is REFUSED. The answer can request
nothing, so the worst that it can send is a wrong value.

The tests' process alone writes the verdict, to standard output: PASSED, REFUSED, or RAISED and
the class of the exception that ended the tests; nothing where the answer's process is gone. This
file imports nothing of graftkit, and the sandbox shows no other file of it.
"""

import _thread
import builtins
import importlib
import json
import operator
import os
import resource
import symtable
import sys
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

PASSED, REFUSED, RAISED = "passed", "refused", "raised "  # the last with a class, of any name
MESSAGE_BYTES = 2**26
FILES_BYTES, MOST_FILES = 2**26, 256  # of each process
BUILTINS = {name: value for name, value in vars(builtins).items() if name[0] != "_"}
TYPES = {name: value for name, value in BUILTINS.items() if isinstance(value, type)}
ERRORS = {name: value for name, value in TYPES.items() if issubclass(value, BaseException)}


class Refused(BaseException):
    """Something that cannot cross between the two processes."""


class PlainDataCodec:
    """The values of one request and its reply as JSON.

    Lists, dicts and sets are numbered in the order of the message, so that both processes know
    them again: a list that the answer sorts is sorted for the tests.

    Args:
        encode_other: JSON of what is not plain. Raises: Refused.
        decoders: functions of a codec and a content, by tag, beside those of plain data.
    """

    def __init__(
        self,
        encode_other: Callable[["PlainDataCodec", Any], Any],
        decoders: dict[str, Callable[["PlainDataCodec", Any], Any]],
    ):
        self._encode_other, self._decoders = encode_other, PLAIN_DECODERS | decoders
        self._numbers: dict[int, int] = {}
        self.containers: list[Any] = []

    def encode(self, value: Any) -> Any:
        """JSON of a value. Raises: Refused; RecursionError for what is nested too deep."""
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if -(2**63) < value < 2**63 else ["int", hex(value)]
        if kind is complex:
            return ["complex", [value.real, value.imag]]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind in (tuple, frozenset):
            return self._contents(value)
        if kind not in (list, dict, set):
            return self._encode_other(self, value)
        if id(value) in self._numbers:
            return ["same", self._numbers[id(value)]]
        self._add(value)
        return self._contents(value)

    def decode(self, encoded: Any) -> Any:
        """The value. Raises: LookupError, TypeError or ValueError for what is no message."""
        if isinstance(encoded, dict):
            raise TypeError("not a value")
        if not isinstance(encoded, list):
            return encoded
        tag, content = encoded
        if tag not in ("list", "dict", "set"):
            return self._decoders[tag](self, content)
        container = TYPES[tag]()
        self._add(container)
        self._fill(container, content)
        return container

    def states(self, count: int) -> list[Any]:
        """What the first `count` containers hold now, as JSON."""
        return [self._contents(container) for container in self.containers[:count]]

    def update(self, states: Any) -> None:
        """Give the containers of the request the states of the reply."""
        for container, (_, content) in zip(list(self.containers), states, strict=False):
            self._fill(container, content)

    def _add(self, container: Any) -> None:
        self._numbers[id(container)] = len(self.containers)
        self.containers.append(container)

    def _contents(self, value: Any) -> Any:
        if type(value) is dict:
            return ["dict", [[self.encode(key), self.encode(value[key])] for key in value]]
        return [type(value).__name__, [self.encode(item) for item in value]]

    def _fill(self, container: Any, content: Any) -> None:
        if isinstance(container, dict):
            items: Any = [(self.decode(key), self.decode(value)) for key, value in content]
        else:
            items = [self.decode(item) for item in content]
        container.clear()
        container.extend(items) if isinstance(container, list) else container.update(items)


PLAIN_DECODERS: dict[str, Callable[[PlainDataCodec, Any], Any]] = {
    "int": lambda _, text: int(text, 16),
    "complex": lambda _, parts: complex(*parts),
    "bytes": lambda _, text: bytes.fromhex(text),
    "tuple": lambda codec, items: tuple(map(codec.decode, items)),
    "frozenset": lambda codec, items: frozenset(map(codec.decode, items)),
    "same": lambda codec, number: codec.containers[number],
}


class Wire:
    """One end of the socket."""

    def __init__(self, descriptor: int):
        # Looked up now: code that is judged may replace them in the modules of its process.
        self._loads, self._dumps, self._exit = json.loads, json.dumps, os._exit
        self._reader = open(descriptor, "rb", closefd=False)  # noqa: SIM115
        self._writer = open(descriptor, "wb", closefd=False)  # noqa: SIM115

    def send(self, message: Any) -> None:
        """Raises: Refused for a message that is too large."""
        line = self._dumps(message).encode() + b"\n"
        if len(line) > MESSAGE_BYTES:
            raise Refused
        try:
            self._writer.write(line)
            self._writer.flush()
        except OSError:
            self.lost()

    def receive(self) -> Any:
        """The next message; a process whose other side is gone ends, without a verdict."""
        try:
            line = self._reader.readline(MESSAGE_BYTES)
            return self._loads(line) if line.endswith(b"\n") else self.lost()
        except (OSError, ValueError, RecursionError):
            self.lost()

    def lost(self) -> NoReturn:
        """End this process."""
        self._exit(0)
        raise SystemExit


# The process of the answer.


class AnswerProcess:
    """Executes the answer's code, and what the tests request of it."""

    def __init__(self, source: str, wire: Wire):
        self._wire, self._objects, self._handles = wire, list[Any](), dict[int, int]()
        sys.modules["__main__"] = program = types.ModuleType("__main__")
        names = vars(program)
        names["__builtins__"] = vars(builtins)
        self._operations: dict[str, Callable[..., Any]] = {
            "load": lambda: exec(compile(source, "<answer>", "exec"), names),
            "name": lambda name: names[name],
            "call": lambda function, arguments, named: function(*arguments, **named),
            **{"get": getattr, "set": setattr, "iter": iter, "next": next},
            **{"len": len, "item": operator.getitem},
        }

    def serve(self) -> NoReturn:
        """Reply to requests until the tests are over."""
        decoders: dict[str, Callable[[PlainDataCodec, Any], Any]] = {
            "object": lambda _, handle: self._objects[handle],
            "builtin": lambda _, name: BUILTINS[name],
        }
        while True:
            operation, encoded = self._wire.receive()
            codec = PlainDataCodec(self._encode_other, decoders)
            try:
                self._wire.send(self._reply(codec, operation, encoded))
            except (Refused, RecursionError):
                self._wire.send(["refused", None, []])

    def _reply(self, codec: PlainDataCodec, operation: str, encoded: list[Any]) -> list[Any]:
        arguments = [codec.decode(item) for item in encoded]
        count = len(codec.containers)
        try:
            result = self._operations[operation](*arguments)
        except BaseException as error:
            names = error_names(type(error))
            try:
                return ["raise", [names, codec.encode(list(error.args))], codec.states(count)]
            except Refused:
                return ["raise", [names, ["list", [str(error)]]], []]
        return ["value", codec.encode(result), codec.states(count)]

    def _encode_other(self, codec: PlainDataCodec, value: Any) -> Any:
        if value is ... or value is NotImplemented or isinstance(value, types.CoroutineType):
            raise Refused  # what tests do with them cannot be seen
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["error", error_names(value)]
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return ["builtin", value.__name__]
        if isinstance(value, types.ModuleType) and value.__name__ in sys.stdlib_module_names:
            return ["module", value.__name__]
        if type(value) in (Counter, OrderedDict, defaultdict):
            return ["copy", ["dict", codec.encode(dict(value))]]
        if type(value).__bases__ == (tuple,) and hasattr(value, "_fields"):
            return ["copy", ["tuple", codec.encode(tuple(value))]]
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._objects)
            self._objects.append(value)
        return ["object", [self._handles[id(value)], callable(value)]]


def error_names(kind: type[BaseException]) -> list[str]:
    """Names of an exception's class and its parents, up to the first built-in one."""
    names: list[str] = []
    for parent in kind.__mro__:
        names.append(parent.__name__)
        if ERRORS.get(parent.__name__) is parent:
            break
    return names


# The process of the tests.


def refuse(*_: Any, **__: Any) -> NoReturn:
    """A method that cannot cross. Raises: Refused, which is remembered where tests catch it."""
    Tests.refused = True
    raise Refused


def refuse_attribute(_: Any, name: str) -> NoReturn:
    """An attribute that only the original of a copy has."""
    if name.startswith("__"):
        raise AttributeError(name)
    refuse()


BINARY = "add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor"
OTHERS = (
    "eq ne lt le gt ge hash bool repr str format setitem delitem contains reversed abs neg pos "
    "invert int float complex index round trunc floor ceil enter exit instancecheck subclasscheck "
    "mro_entries await aiter anext aenter aexit bytes delattr"
)
OPERATORS = [*OTHERS.split(), *(form + n for n in BINARY.split() for form in ("", "r", "i"))]
SHOWING = dict.fromkeys(("__repr__", "__str__", "__format__"), refuse)
DICT_METHODS = dict.fromkeys(("__missing__", "__add__", "__sub__", "__and__", "__or__"), refuse)
# Copies of Counters and their like, and of named tuples; what a dict or tuple lacks is refused.
COPIES = {
    "dict": type("dict", (dict,), SHOWING | DICT_METHODS | {"__getattr__": refuse_attribute}),
    "tuple": type("tuple", (tuple,), SHOWING | {"__getattr__": refuse_attribute}),
}


class Reference:
    """An object of the answer's process. One object has one reference."""

    def __init__(self, tests: "Tests", handle: int):
        object.__setattr__(self, "_reference", (tests, handle))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return self._reference[0].request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._reference[0].request("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._reference[0].request("item", self, key)

    def __len__(self) -> Any:
        return self._reference[0].request("len", self)

    def __iter__(self) -> Any:
        return self._reference[0].request("iter", self)

    def __next__(self) -> Any:
        return self._reference[0].request("next", self)


class CallableReference(Reference):
    """A function, method or class of the answer's process."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the call returns there, or raises."""
        return self._reference[0].request("call", self, list(arguments), named)


for _name in OPERATORS:
    setattr(Reference, f"__{_name}__", refuse)


class Tests:
    """Executes the tests, and requests from the answer's process what they use of it."""

    refused = False  # whether anything was, even where the tests caught it

    def __init__(self, wire: Wire):
        self._wire = wire
        self._references: dict[int, Reference] = {}
        self._errors: dict[tuple[str, type], type] = {}
        self._decoders: dict[str, Callable[[PlainDataCodec, Any], Any]] = {
            "object": lambda _, content: self._reference(*content),
            "copy": lambda codec, content: COPIES[content[0]](codec.decode(content[1])),
            "error": lambda _, names: self._error_class(names),
            "builtin": lambda _, name: TYPES[name],
            "module": lambda _, name: _standard_module(name),
        }

    def run(self, source: str) -> str:
        """Execute the answer, then the tests. Returns: the verdict."""
        sys.modules["__main__"] = program = types.ModuleType("__main__")
        try:
            self.request("load")
            names = Names(self, builtins_of_the_answer(source))
            names.update(vars(program), __builtins__=builtins)
            exec(compile(source, "<tests>", "exec"), names)
            verdict = PASSED
        except BaseException as error:
            verdict = RAISED + type(error).__name__
        return REFUSED if Tests.refused else verdict

    def request(self, operation: str, *arguments: Any) -> Any:
        """The result of an operation in the answer's process. Raises: what it raises there."""
        codec = PlainDataCodec(self._encode_other, self._decoders)
        try:
            self._wire.send([operation, [codec.encode(item) for item in arguments]])
        except (Refused, RecursionError):
            refuse()
        try:
            kind, content, states = self._wire.receive()
            if kind == "raise":
                value: Any = self._error_class(content[0]), codec.decode(content[1])
            else:
                value = codec.decode(content)
            codec.update(states)
        except (LookupError, ValueError, TypeError, AttributeError, RecursionError, ImportError):
            self._wire.lost()
        if kind == "refused":
            refuse()
        if kind == "raise":
            raise _make_error(*value)
        return value

    def _encode_other(self, _: PlainDataCodec, value: Any) -> Any:
        if isinstance(value, Reference):
            return ["object", value._reference[1]]
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and BUILTINS.get(name) is value:
            return ["builtin", name]
        raise Refused

    def _reference(self, handle: int, is_callable: bool) -> Reference:
        if handle not in self._references:
            kind = CallableReference if is_callable else Reference
            self._references[handle] = kind(self, handle)
        return self._references[handle]

    def _error_class(self, names: Sequence[str]) -> Any:
        kind = ERRORS[names[-1]]
        for name in reversed(names[:-1]):
            if (name, kind) not in self._errors:
                namespace = {"__getattr__": refuse_attribute}
                self._errors[name, kind] = type(name, (kind,), namespace)
            kind = self._errors[name, kind]
        return kind


def _make_error(kind: Any, arguments: Any) -> BaseException:
    try:
        error: BaseException = kind(*arguments)
    except Exception:
        refuse()
    return error


def _standard_module(name: str) -> types.ModuleType:
    if name not in sys.stdlib_module_names:
        raise LookupError(name)
    return importlib.import_module(name)


class Names(dict[str, Any]):
    """Global names of the tests; what they lack is the answer's."""

    def __init__(self, tests: Tests, from_the_answer: frozenset[str]):
        super().__init__()
        self.tests, self.from_the_answer = tests, from_the_answer

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.from_the_answer:
            raise KeyError(name)
        return self.tests.request("name", name)


def builtins_of_the_answer(source: str) -> frozenset[str]:
    """Built-in names that the answer may define, as `sum`: none where the tests use another name.

    Otherwise an answer could bring its own `abs` or `all` to tests that use the real one.
    """
    tables = [symtable.symtable(source, "<tests>", "exec")]
    used, bound = set[str](), set[str]()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() or table.get_type() == "module":
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                binds = symbol.is_assigned() or symbol.is_imported()
                bound |= {symbol.get_name()} if binds else set()
    free = used - bound
    return frozenset(free) if all(hasattr(builtins, name) for name in free) else frozenset()


def main() -> None:
    """Limit this process, then run the answer or the tests."""
    part, descriptor, cpu_seconds, memory_bytes = sys.argv[1:]
    _limit({
        resource.RLIMIT_CPU: int(cpu_seconds),
        resource.RLIMIT_AS: int(memory_bytes),
        resource.RLIMIT_FSIZE: FILES_BYTES,
        resource.RLIMIT_NOFILE: MOST_FILES,
        resource.RLIMIT_CORE: 0,
    })  # fmt: skip
    os.closerange(3, int(descriptor))
    os.closerange(int(descriptor) + 1, MOST_FILES)
    wire, report = Wire(int(descriptor)), os.dup(1)
    control = open(os.dup(0), "rb")  # noqa: SIM115
    source = json.loads(control.readline())
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    # graftkit holds the other end open: when it is gone, so is this process.
    _thread.start_new_thread(lambda leave: leave(len(control.read(1))), (os._exit,))
    del sys.argv[1:]
    if part == "answer":
        os.close(report)
        AnswerProcess(source, wire).serve()
    write, leave = os.write, os._exit
    write(report, Tests(wire).run(source).encode(errors="replace")[:200])
    leave(0)


def _limit(limits: dict[int, int]) -> None:
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (least, least))


if __name__ == "__main__":
    main()
