"""Answers and their tests in two processes: honest tests of many kinds pass, forgeries do not."""

import pytest
from distill.sandboxed import failure, require_sandbox

from graftkit.distill.scores.code import run_tests

UNJUDGED = "error: the tests use more of the answer than plain values"


def assert_each(answer: str, tests: list[str], *, passes: bool) -> None:
    """Many tests of one answer, each with names of its own, in one run of the sandbox."""
    each = f"""
import collections
wrong = []
for tests in {tests!r}:
    names = type(globals())(globals().tests, frozenset())
    names["__name__"] = "__main__"
    try:
        exec(tests, names)
    except BaseException as error:
        passed = False
    else:
        passed = not names.tests.refused
    type(names.tests).refused = False
    if passed is not {passes}:
        wrong.append(tests)
assert not wrong
"""
    if failure(answer, each) is not None:
        wrong = [one for one in tests if (failure(answer, one) is None) is not passes]
        raise AssertionError(f"{wrong} should {'pass' if passes else 'fail'}")


HONEST_ANSWER = """
import collections, datetime, decimal, enum, fractions, math
Pair = collections.namedtuple("Pair", "x y")
class Colour(enum.IntEnum):
    RED = 1
class Broke(ValueError):
    def __init__(self, code):
        super().__init__(code)
        self.code = code
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
    def __mul__(self, by): return Vector(self.x * by, self.y * by)
    __rmul__ = __mul__
    def __eq__(self, other): return isinstance(other, Vector) and [*self] == [*other]
    def __lt__(self, other): return self.x < other.x
    def __hash__(self): return hash((self.x, self.y))
    def __repr__(self): return f"Vector({self.x}, {self.y})"
    def __abs__(self): return math.hypot(self.x, self.y)
    def __len__(self): return 2
    def __iter__(self): return iter((self.x, self.y))
    def __enter__(self): return self
    def __exit__(self, *how): return True
    def norm(self): return math.hypot(self.x, self.y)
    def moved(self, by): return Vector(self.x + by, self.y)
    @classmethod
    def zero(cls): return cls(0, 0)
class Node:
    def __init__(self, value): self.value, self.next = value, None
total = 0
def same(x): return x
def double(x): return 2 * x
def count(by=1):
    global total
    total += by
    return total
def sort_it(items): items.sort()
def grow(table): table["new"] = [1]; table["old"].append(2); return table["old"]
def every(function, items): return [function(item) for item in items]
def numbers(n):
    for i in range(n): yield i
def fail(code): raise Broke(code)
def divide(a, b): return a / b
def length(node):
    count = 0
    while node: count, node = count + 1, node.next
    return count
async def later(x): return x + 1
def adder(n): return lambda x: x + n
def pairs(text): return collections.Counter(text)
def pair(): return Pair(1, 2)
def colour(): return Colour.RED
def points(): return {Vector(1, 2), Vector(1, 2)}
def when(): return datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc)
"""


HONEST_TESTS = r"""
for v in (None, True, 1, -2**70, .1, 1e999, 2j, 'é\ud800', b'x', (1, (2,)), [1, [2]],
        {1: {2}}, frozenset({3}), {(1, 'a'): [None]}):
    assert same(v) == v, v
    assert type(same(v)) is type(v)
---
assert same(float('nan')) != same(float('nan')) and str(same(-0.0)) == '-0.0'
---
v = Vector(1, 2)
assert v.x == 1 and v.norm() == v.norm() and len(v) == 2 and [*v] == [1, 2]
assert Vector.zero().x == 0 and v is not None
assert Vector.__name__ == 'Vector'
assert hasattr(Vector, 'zero')
assert not hasattr(Vector, 'one')
---
v = Vector(1, 2)
v.x = 7
assert v.x == 7 and v.moved(1).x == 8
---
a, b = Node(1), Node(2)
a.next = b
assert length(a) == 2 and a.next is b and a.next.value == 2 and b.next is None
---
assert count() == 1 and count(by=2) == 3 and total == 3
---
items = [3, 1, 2]
sort_it(items)
assert items == [1, 2, 3]
---
old = []
table = {'old': old}
assert grow(table) is old and old == [2] and table == {'old': [2], 'new': [1]}
---
loop = []
loop.append(loop)
assert same(loop) is loop
---
assert every(len, ['a', '']) == [1, 0]
assert every(str, [1]) == ['1']
assert every(double, [1]) == [2]
---
assert list(numbers(3)) == [0, 1, 2]
assert next(numbers(2)) == 0
assert sum(numbers(4)) == 6 and 2 in list(numbers(3))
---
try:
    fail(7)
except ValueError as error:
    assert error.args == (7,) and str(error) == '7'
else:
    raise TypeError
---
try:
    fail(7)
except Broke:
    pass
assert issubclass(Broke, ValueError)
---
try:
    divide(1, 0)
except ZeroDivisionError as error:
    assert 'division' in str(error)
---
assert adder(2)(3) == 5 and callable(adder) and not callable(Vector(1, 2))
---
assert pairs('aab') == {'a': 2, 'b': 1} and pairs('aab')['a'] == 2
---
assert pair() == (1, 2)
assert (1, 2) == pair()
assert isinstance(pair(), tuple)
x, y = pair()
assert y == 2
---
assert colour().name == 'RED' and colour() is not None
---
def check(candidate):
    assert candidate(3) == 3
    assert abs(candidate(.5) - .5) < 1e-9
check(same)
---
import unittest
class Case(unittest.TestCase):
    def test(self):
        with self.assertRaises(Broke):
            fail(1)
        self.assertEqual(same([1]), [1])
runner, loader = unittest.TextTestRunner(), unittest.defaultTestLoader
assert runner.run(loader.loadTestsFromTestCase(Case)).wasSuccessful()
---
assert math.isclose(same(1), 1)
---
result = [same(i) for i in range(300)]
assert result == list(range(300))
"""


UNJUDGED_TESTS = r"""
assert Vector(1, 2) == Vector(1, 2)
---
assert Vector(1, 2) + Vector(2, 2)
---
assert Vector(1, 2)
---
assert abs(Vector(3, 4)) == 5
---
assert repr(Vector(1, 2)) == 'Vector(1, 2)'
---
assert f'{Vector(1, 2)}' == 'Vector(1, 2)'
---
assert isinstance(Vector(1, 2), Vector)
---
assert sorted([Vector(1, 2), Vector(0, 0)])
---
with Vector(1, 2) as v:
    pass
---
assert len(points()) == 1
---
class Own: pass
same(Own())
---
assert every(lambda x: 2 * x, [1, 2]) == [2, 4]
---
assert same(x for x in 'a')
---
try:
    fail(7)
except ValueError as error:
    assert error.code == 7
---
import asyncio
assert asyncio.run(later(1)) == 2
---
assert pairs('aab').most_common(1) == [('a', 2)]
---
assert pairs('aab')['z'] == 0
---
assert pair().x == 1
---
assert colour() == 1
---
assert str(pair()) == 'Pair(x=1, y=2)'
---
import datetime
assert when() == datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc)
---
import decimal
assert same(decimal.Decimal('.1')) == decimal.Decimal('.1')
---
assert same(bytearray(b'y')) == b'y'
---
assert same(...) is ...
---
try:
    assert Vector(1, 2) == 1
except BaseException:
    pass
"""


def test_honest_answers_pass_tests_of_every_style():
    assert_each(HONEST_ANSWER, HONEST_TESTS.split("---\n"), passes=True)


def test_what_cannot_cross_is_refused_and_judged_neither_right_nor_wrong():
    each = f"""
import collections
judged = []
for tests in {UNJUDGED_TESTS.split(chr(45) * 3)!r}:
    names = type(globals())(globals().tests, frozenset())
    names["__name__"] = "__main__"
    try:
        exec(tests, names)
    except BaseException as error:
        pass
    if not names.tests.refused:
        judged.append(tests)
    type(names.tests).refused = False
assert not judged
"""
    assert failure(HONEST_ANSWER, each) is None
    assert failure(HONEST_ANSWER, "assert Vector(1, 2) == Vector(1, 2)") == UNJUDGED


def test_an_array_is_refused():
    answer = "import numpy as np\ndef double(x): return 2 * np.asarray(x)\n"
    tests = "import numpy as np\nassert (double([1, 2]) == np.array([2, 4])).all()"
    require_sandbox()
    assert run_tests(answer, tests, 60.0, 2**32) == UNJUDGED


def test_an_answer_may_have_the_name_of_a_builtin_that_its_tests_call():
    assert failure("def sum(a, b):\n    return a + b + 1", "assert sum(10, 15) == 26") is None


FORGED = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __gt__(self, other): return True
    def __sub__(self, other): return {difference}
    def __rsub__(self, other): return {difference}
    def __abs__(self): return 0.0
    def __round__(self, digits=0): return Yes()
    def __contains__(self, other): return True
    def __getattr__(self, name): return Yes()
    def __call__(self, *_): return Yes()
    def __hash__(self): return hash(4)
    def __len__(self): return 1
    def __iter__(self): return iter([Yes()])
def double(x): return {result}
"""


EQUAL_TO_FOUR = [
    "assert double(2) == 4",
    "assert 4 == double(2)",
    "assert not double(2) != 4",
    "assert double(2) in (4, 5, 6) and double(2) != 5",
    "assert {4: 1}.get(double(2))",
    "assert [double(2)] == [4]",
    "assert 3 < double(2) < 5",
    "import math\nassert math.isclose(double(2), 4)",
    "assert round(double(2), 2) == 4.0",
]


@pytest.mark.parametrize(
    "result", ["Yes()", "[Yes()]", "type('I', (int, Yes), {'__eq__': Yes.__eq__})(5)"]
)
def test_an_object_that_says_yes_to_everything_is_equal_to_no_plain_value(result):
    assert_each(FORGED.format(result=result, difference="0"), EQUAL_TO_FOUR, passes=False)


NEAR_FOUR = ["assert abs(double(2) - 4) < 1e-6", "assert -1 < 4 - double(2) < 1"]


@pytest.mark.parametrize("difference", ["0", "Yes()", "type('F', (float,), {})(0)"])
def test_an_object_without_a_value_is_near_no_number(difference):
    assert_each(FORGED.format(result="Yes()", difference=difference), NEAR_FOUR, passes=False)


@pytest.mark.parametrize(
    "answer",
    [
        "def abs(x): return 0\ndef double(x): return 5",
        "def all(x): return True\ndef double(x): return 5",
        "import builtins\nbuiltins.abs = lambda x: 0\ndef double(x): return 5",
        "import math\nmath.isclose = lambda *_, **__: True\ndef double(x): return 5",
        "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\ndef double(x): return 5",
        "AssertionError = SystemExit\ndef double(x): return 5",
    ],
)
def test_changed_names_and_modules_stay_in_the_answers_process(answer):
    tests = """
import math, unittest
assert all([abs(double(2) - 4) < 0.1, math.isclose(double(2), 4)])
unittest.TestCase().assertEqual(double(2), 4)
"""
    assert failure(answer, tests) == "AssertionError"


@pytest.mark.parametrize(
    "argument",
    ["Own()", "lambda: 1", "(x for x in 'a')", "sys._getframe()", "sys.modules", "ValueError('a')"],
)
def test_no_object_of_the_tests_reaches_the_answer(argument):
    tests = f"""
import sys
class Own: pass
try:
    given({argument})
except BaseException:
    pass
assert not count()
"""
    answer = "calls = 0\ndef given(x):\n    global calls\n    calls += 1\ndef count(): return calls"
    assert failure(answer, tests.replace("assert not count()", "")) == UNJUDGED
    assert failure(answer, tests.replace("not count()", "count()")) == UNJUDGED


@pytest.mark.parametrize(
    "sent",
    [
        "struct.pack('=I', 2**31)",
        "struct.pack('=I', 5) + b'[1,2]'",
        "frame(['value', ['list', [], 1], []])",
        "frame(['value', ['error', ['E']], []])",
        "frame(['value', ['error', []], []])",
        "frame(['value', ['same', 9], []])",
        "frame(['value', ['module', 'graftkit'], []])",
        "frame(['value', ['builtin', 'exec'], []])",
        "frame(['value', ['copy', ['object', 1]], []])",
        "frame(['value', ['object', ['x', True]], []])",
        "frame(['value', {'a': 1}, []])",
        "frame(['value', ['dict', [[['list', []], 1]]], []])",
        "frame(['raise', 1, []])",
        "frame(['raise', [['AssertionError', 'BaseException'], []], []])",
        "frame(['load', []])",
        "frame(['value', 4, [['list', [1]]] * 9])",
        "b'[' * 100_000",
        "struct.pack('=I', 200_000) + b'[' * 200_000",
    ],
)
def test_forged_messages_are_no_verdict(sent):
    answer = f"""
import json, os, struct
def frame(message):
    text = json.dumps(message).encode()
    return struct.pack("=I", len(text)) + text
def double(x):
    for number in range(3, 30):
        try:
            os.write(number, {sent} + frame(["value", True, []]) * 9)
        except OSError:
            pass
    os._exit(0)
"""
    assert failure(answer, "assert double(2) == 4\nassert double(3) == 6") is not None


@pytest.mark.parametrize("name", ["passed", "passed:", "refused", "", "raised ", "timeout"])
def test_the_name_of_an_exception_is_no_verdict(name):
    answer = f"error = type({name!r}, (Exception,), {{}})\ndef double(x): raise error"
    assert failure(answer, "assert double(2) == 4") == "another exception"
    assert failure(answer + "\nraise error", "assert double(2) == 4") == "another exception"


@pytest.mark.parametrize(
    "harm",
    [
        "os.closerange(0, 256)",
        "[os.dup2(os.open('/dev/null', os.O_RDWR), number) for number in range(3, 9)]",
        "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(60)",
        "os.kill(os.getpid(), 9)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_an_answer_that_breaks_its_process_does_not_pass(harm):
    answer = f"import os, sys, threading, time\ndef double(x):\n    {harm}\n    return 4"
    assert failure(answer, "assert double(2) == 4\nassert double(3) == 6") is not None


def test_what_the_tests_swallow_does_not_hide_that_the_answer_has_gone():
    tests = "try:\n    double(2)\nexcept BaseException:\n    pass"
    assert failure("def double(x):\n    import os\n    os._exit(0)", tests) == "ended early"
    assert failure("def double(x):\n    raise SystemExit", tests) is None
