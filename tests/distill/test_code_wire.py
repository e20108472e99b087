"""An answer and its tests in two processes: honest tests of many kinds pass, forgeries do not."""

import sys

import pytest

from graftkit.distill.scores.sandbox import run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


def failure(answer: str, tests: str) -> str | None:
    return run_tests(answer, tests, 60.0, 2**29).failed


def assert_each(answer: str, tests: list[str], *, passes: bool) -> None:
    """Many tests of one answer, each with names of its own, in one run of the sandbox."""
    each = f"""
import collections
wrong = []
for tests in {tests!r}:
    try:
        names = type(globals())(globals()._wire, frozenset())
        names["__name__"] = "__main__"
        exec(tests, names)
    except Exception as error:
        passed = False
    else:
        passed = True
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
    @classmethod
    def zero(cls): return cls(0, 0)
class Node:
    def __init__(self, value): self.value, self.next = value, None
total = 0
def same(x): return x
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
def drain(items): return sum(items)
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
        {1: {2}}, frozenset({3}), bytearray(b'y'), range(3), ...):
    if v is not ...:
        assert same(v) == v, v
        assert type(same(v)) is type(v)
---
assert same(float('nan')) != same(float('nan')) and str(same(-0.0)) == '-0.0'
---
import datetime, decimal, fractions, collections
for v in (decimal.Decimal('.1'), fractions.Fraction(1, 3), datetime.date(2024, 1, 2),
        datetime.timedelta(1), collections.deque([1], 2)):
    assert same(v) == v
---
import datetime
assert when() == datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc)
---
v = Vector(1, 2) + Vector(2, 2)
assert v == Vector(3, 4) and v != Vector(0, 0) and abs(v) == 5
assert repr(v) == 'Vector(3, 4)'
assert f'{v}' == 'Vector(3, 4)'
assert [*v] == [3, 4]
assert len(v) == 2
---
assert Vector(1, 2) * 3 == Vector(3, 6) and 3 * Vector(1, 2) == Vector(3, 6)
assert (Vector(1, 2) * 3).x == 3
---
assert isinstance(Vector(1, 2), Vector)
assert not isinstance(3, Vector)
assert Vector.zero().x == 0
assert issubclass(Vector, Vector)
assert Vector.__name__ == 'Vector'
assert hasattr(Vector, 'zero')
assert not hasattr(Vector, 'one')
---
v = Vector(1, 2)
v.x = 7
assert v.x == 7 and sorted([v, Vector(0, 0)])[0] == Vector(0, 0)
---
with Vector(1, 2) as v:
    assert v.x == 1
    raise ValueError
---
a, b = Node(1), Node(2)
a.next = b
assert length(a) == 2 and a.next is not None and a.next.value == 2
---
class Own:
    next = None
a, b = Own(), Own()
a.next = b
assert length(a) == 2
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
assert every(lambda x: 2 * x, [1, 2]) == [2, 4]
assert every(len, ['a', '']) == [1, 0]
assert every(str, [1]) == ['1']
---
assert list(numbers(3)) == [0, 1, 2]
assert next(numbers(2)) == 0
assert drain(x for x in (1, 2)) == 3
---
try:
    fail(7)
except ValueError as error:
    assert error.args == (7,) and error.code == 7 and str(error) == '7'
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
import asyncio
assert asyncio.run(later(1)) == 2
---
assert adder(2)(3) == 5 and callable(adder)
---
assert pairs('aab') == {'a': 2, 'b': 1} and pairs('aab').most_common(1) == [('a', 2)]
---
assert pair() == (1, 2)
assert pair().x == 1
assert (1, 2) == pair()
assert isinstance(pair(), tuple)
x, y = pair()
assert y == 2
---
assert colour() == 1
assert colour() + 1 == 2
assert colour().name == 'RED'
assert colour() is not None
---
assert len(points()) == 1 and Vector(1, 2) in points()
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


def test_honest_answers_pass_tests_of_every_style():
    assert_each(HONEST_ANSWER, HONEST_TESTS.split("---\n"), passes=True)


def test_arrays_are_copied():
    pytest.importorskip("numpy")
    answer = "import numpy as np\ndef double(x): return 2 * np.asarray(x)\n"
    answer += "def total(x): return np.float32(sum(x))"
    tests = (
        "import numpy as np\nassert (double([1, 2]) == np.array([2, 4])).all() and total([1]) == 1"
    )
    assert run_tests(answer, tests, 60.0, 2**32).failed is None


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


REMOTE = "import graftkit.distill.scores.remote as w"


@pytest.mark.parametrize(
    ("reach", "argument"),
    [
        ("given.__globals__.clear()", "lambda: 1"),
        ("given.__code__", "lambda: 1"),
        ("given.gi_frame.f_back.f_locals.clear()", "(x for x in 'a')"),
        ("given.method.__func__", "Own()"),
        ("given.f_back", "sys._getframe()"),
        ("given.modules", "sys.modules.__class__"),
        ("given.exc.__traceback__.tb_frame", "Own()"),
        (f"{REMOTE}; w.own(given, '_wire').request('load')", "Own()"),
        (
            f"{REMOTE}; wire = w.own(given, '_wire'); wire.request('call', w.Remote(wire, -1, 0))",
            "Own()",
        ),
    ],
)  # fmt: skip
def test_no_way_leads_from_an_argument_into_the_process_of_the_tests(reach, argument):
    answer = f"def double(given):\n    {reach}\n    return 'reached'"
    tests = f"""
import sys
class Own:
    def __init__(self):
        self.exc = ValueError()
    def method(self):
        pass
try:
    result = double({argument})
except Exception:
    result = ""
assert result != "reached"
"""
    assert failure(answer, tests) in (None, "ended early")


@pytest.mark.parametrize(
    "sent",
    [
        "struct.pack('=I', 2**31)",
        "struct.pack('=I', 5) + b'[1,2]'",
        "frame(['value', ['list', []], []])",
        "frame(['value', ['own error', 1, 'E', []], []])",
        "frame(['value', ['yours', 0], []])",
        "frame(['value', ['module', 'graftkit'], []])",
        "frame(['value', ['array', 'O', ['list', [1]]], []])",
        "frame(['raise', 1, [], None])",
        "frame(['ask', 'load', []])",
        "frame(['ask', 'call', [['type', 'object']]])",
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


def test_what_the_tests_swallow_does_not_hide_that_the_answer_has_gone():
    tests = "try:\n    double(2)\nexcept BaseException:\n    pass"
    assert failure("def double(x):\n    import os\n    os._exit(0)", tests) == "ended early"
    assert failure("def double(x):\n    raise SystemExit", tests) is None
