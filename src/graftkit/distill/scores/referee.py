"""The process of the tests: it requests what they call from the answer's, and writes the verdict.

    python -c SOURCE DESCRIPTOR FOLDER WALLS READABLE, with the tests on standard input

Standard output takes PASSED and the walls that stand where the tests came to their end, else the
name of the exception, or nothing where the answer's process was gone first. The answer has neither
this process, nor its source, nor its standard output. sandbox.py gives this source to a fresh
interpreter.
"""

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from graftkit.distill.scores.fence import enclose
from graftkit.distill.scores.wire import Wire

PASSED = "passed:"


def main() -> None:
    """Judge one answer, and end the process."""
    descriptor, folder, walls, readable = sys.argv[1:]
    with open(0, encoding="utf-8", closefd=False) as file:
        source = json.load(file)
    report = os.dup(1)
    os.dup2(2, 0)  # /dev/null
    os.dup2(2, 1)
    del sys.argv[1:]
    wire = Wire(int(descriptor), may_ask, lambda: os._exit(0))
    enclose(folder, json.loads(walls), json.loads(readable))
    try:
        wire.request("load")
        run_tests(source, wire)
        verdict = " ".join([PASSED, *json.loads(walls)])
    except BaseException as error:
        verdict = type(error).__name__
    os.write(report, verdict.encode(errors="replace")[:200])
    os._exit(0)


def run_tests(source: str, wire: Wire) -> None:
    """Execute tests where names that they do not have are those of the answer."""
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    tree = ast.parse(source, "<tests>")
    names = Names(wire, builtins_of_the_answer(tree))
    names.update(vars(program), __builtins__=builtins)
    exec(compile(tree, "<tests>", "exec"), names)


class Names(dict[str, Any]):
    """Global names of the tests; what they lack is the answer's, of built-in names only some."""

    def __init__(self, wire: Wire, from_the_answer: frozenset[str]):
        super().__init__()
        self._wire, self._from_the_answer = wire, from_the_answer

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self._from_the_answer:
            raise KeyError(name)
        return self._wire.request("name", name)


def builtins_of_the_answer(tree: ast.AST) -> frozenset[str]:
    """Built-in names that the answer may define, as `sum`: none, where the tests use another name.

    Otherwise an answer could bring its own `abs` or `all` to tests that use the real one.
    """
    used, bound = set(), set(_bound(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
    free = used - bound
    return frozenset(free) if all(hasattr(builtins, name) for name in free) else frozenset()


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def may_ask(operation: str, arguments: list[Any], ours: list[Any]) -> bool:
    """What the answer may do with objects of the tests that it was given.

    Functions can be called and iterators moved on; of an object whose class the tests define,
    attributes without an underscore can be looked at and set, and its operators work. From nothing
    of that does a way lead to a frame, a namespace or a module of the tests.
    """
    if not ours or not arguments:
        return False
    subject = arguments[0]
    if operation == "call":
        return subject is ours[0] and callable(subject)
    if operation in ("iter", "next") and hasattr(type(subject), "__next__"):
        return subject is ours[0]
    if operation in ("getattr", "setattr", "delattr"):
        name = arguments[1]
        return subject is ours[0] and _is_of_the_tests(subject) and type(name) is str \
            and not name.startswith("_")  # fmt: skip
    return operation not in ("load", "name", "finish") and all(map(_is_of_the_tests, ours))


def _is_of_the_tests(thing: Any) -> bool:
    return type(thing).__module__ == "__main__"
