import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from graftkit.distill.config import CodeRule
from graftkit.distill.records import Answer, Prompt
from graftkit.distill.scores import fence, jail, open_scorer
from graftkit.distill.scores.code import find_code
from graftkit.distill.scores.sandbox import WALLS, check_sandbox, run_tests
from graftkit.errors import ConfigError, RowsError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
MEMORY = 2**29
PLENTY_SECONDS = 30.0
DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4"


def failure(answer: str, tests: str = TESTS, timeout: float = PLENTY_SECONDS) -> str | None:
    return run_tests(answer, tests, timeout, MEMORY).failed


@pytest.fixture(scope="module")
def missing() -> tuple[str, ...]:
    return check_sandbox()


# Which part of an answer is its code.


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```python\nx = 1\n```\nbetter:\n```py\nx = 2\ny = 3\n```", "x = 2\ny = 3"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```\ntext\n```python\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\nx = 1", "x = 1"),
        ("  ```Python\n  x = 1\n  ```", "  x = 1"),
        ("", ""),
    ],
)
def test_the_last_block_of_python_is_the_code(text, code):
    assert find_code(text) == code


# Verdicts.


def test_an_answer_passes_when_the_tests_run_to_their_end():
    assert failure(DOUBLE) is None
    assert failure(DOUBLE.replace("2 *", "3 *")) == "AssertionError"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("def double(x:", "SyntaxError"),
        ("import nonsense", "ModuleNotFoundError"),
        ("class Mine(Exception): pass\nraise Mine", "another exception"),
        ("\ud800", "UnicodeEncodeError"),
        ("(" * 100_000, "SyntaxError"),
        ("", "NameError"),
    ],
)
def test_the_exception_is_the_reason(answer, reason):
    assert failure(answer) == reason


def test_honest_code_may_use_the_usual_library():
    answer = """
import asyncio, dataclasses, pickle, random, re, tempfile, threading, collections
@dataclasses.dataclass
class Point:
    x: int
async def later(): return 3
def double(x):
    with tempfile.TemporaryDirectory() as folder:
        open(folder + "/number", "w").write(str(x))
        x = int(open(folder + "/number").read())
    thread = threading.Thread(target=len, args=("",)); thread.start(); thread.join()
    assert pickle.loads(pickle.dumps(Point(x))) == Point(x)
    return asyncio.run(later()) - 3 + 2 * x
if __name__ == "__main__":
    print(double(1))
"""
    assert failure(answer) is None


def test_sets_of_strings_have_the_same_order_in_every_run():
    assert failure("", "assert hash('graft') == " + str(_hash_in_the_sandbox())) is None


def _hash_in_the_sandbox() -> int:
    command = [sys.executable, "-c", "print(hash('graft'))"]
    done = subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True)
    return int(done.stdout)


# Ways to look as if the tests had passed.


@pytest.mark.parametrize(
    "answer",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "def double(x):\n    import os\n    os._exit(0)",
        "def double(x):\n    raise SystemExit(0)",
        "x = '''",
        "if False:\n",
        "try:\n    pass\nfinally:\n    'unfinished",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *_: None",
        "import os\nos.write = lambda *_: 1\nos._exit = lambda *_: None",
        "import os\nfor number in range(20):\n    try: os.write(number, b'0' * 32)\n"
        "    except OSError: pass\nos._exit(0)",
        "import sys\nsys.excepthook = lambda *_: None",
        "import sys\nsys.settrace(lambda *_: None)",
        "import atexit\natexit.register(print, 'passed')",
        "AssertionError = ValueError",
    ],
)
def test_an_answer_that_only_pretends_does_not_pass(answer):
    assert failure(answer) is not None


def test_the_tests_are_nowhere_that_the_answer_can_look():
    answer = """
import gc, os, sys
seen = set()
def search(thing, depth=0):
    if isinstance(thing, str) and "4" + "711" in thing:
        raise SystemExit
    if isinstance(thing, (bytes, bytearray)) and b"4" + b"711" in thing:
        raise SystemExit
    if depth == 5 or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        [search(part, depth + 1) for part in list(thing.values())]
    elif isinstance(thing, (list, tuple, set)):
        [search(part, depth + 1) for part in list(thing)]
    elif hasattr(thing, "__dict__"):
        search(vars(thing), depth + 1)
def double(x):
    frame = sys._getframe(1)
    while frame is not None:
        search((dict(frame.f_locals), frame.f_globals, frame.f_code.co_consts, sys.argv))
        frame = frame.f_back
    search(sys.modules)
    for descriptor in range(3):
        try:
            search(os.pread(descriptor, 10_000, 0))
        except OSError:
            pass
    return 2 * x
"""
    assert failure(answer, "assert double(2) == 4 and 4711") is None
    assert failure(answer + "search('4711')", TESTS) == "SystemExit"
    for function in ("get_objects()", "get_referents(1)", "get_referrers(1)"):
        assert failure(f"import gc\ngc.{function}", "") == "PermissionError"
    assert failure("import sys\nsys._current_frames()", "") == "PermissionError"


def test_tests_have_built_in_names_of_their_own():
    answer = "import builtins\nbuiltins.all = __builtins__['all'] = lambda _: True\n" + DOUBLE
    assert failure(answer, "assert all([double(2) == 5])") == "AssertionError"


# Ways to do harm, or to hang.


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("while True: pass", "timeout"),
        ("while True: print('x' * 10_000)", "timeout"),
        (
            "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.setsid()\n"
            "while True: pass",
            "timeout",
        ),
        ("import time\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass", "timeout"),
        ("10 ** 10 ** 10", "timeout"),
    ],
)
def test_what_does_not_end_is_ended(answer, reason):
    begin = time.monotonic()
    assert failure(answer, timeout=0.5) == reason
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "answer",
    [
        "parts = []\nwhile True: parts.append(bytearray(2**24))",
        "import os\nwhile True: os.fork()",
        "import threading, time\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()",
        "file = open('large', 'wb')\nwhile True: file.write(bytes(2**24))",
        "import subprocess\nsubprocess.run(['ls'])",
        "import os\nos.system('ls')",
        "import os\nos.execv('/bin/ls', ['ls'])",
        "import _posixsubprocess\n_posixsubprocess.fork_exec()",
        "import sys\ndel sys.modules['_posixsubprocess']\nimport _posixsubprocess",
        "import ctypes",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.kill(os.getppid(), 9)",
        "def f(): f()\nf()",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os\nos.listdir('/')",
        "import os\nassert os.environ.get('GRAFTKIT_TEST_SECRET')",
        "input()",
    ],
)
def test_harm_is_refused_and_does_not_pass(answer, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_TEST_SECRET", "secret")
    begin = time.monotonic()
    assert failure(answer, "") not in (None, "timeout")
    assert time.monotonic() - begin < 10


def test_files_elsewhere_are_neither_written_nor_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for harm in (f"open({str(victim)!r}, 'w')", f"import os\nos.remove({str(victim)!r})"):
        assert failure(harm, "") is not None
    assert failure("open('own', 'w').write('x')\nimport os\nos.chmod('.', 0)", "") is None
    assert victim.read_text() == "whole"
    assert os.listdir(tmp_path) == ["victim"]


def test_nothing_outlives_a_killed_run(tmp_path):
    code = f"from graftkit.distill.scores.sandbox import run_tests as run\nrun('import time; \
time.sleep(60)', '', 60, {MEMORY})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as run:
        inside = _wait_for_processes(psutil.Process(run.pid), 4)
        run.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(inside, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def _wait_for_processes(parent: psutil.Process, count: int) -> list[psutil.Process]:
    for _ in range(500):
        found = parent.children(recursive=True)
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError("the sandbox did not start")


# Each line of defence alone.


def run_in_jail(folder: Path, code: str) -> str:
    """What a plain Python prints behind the kernel's walls, without the fence."""
    limits = ["5", str(MEMORY)]
    command = [
        sys.executable,
        "-P",
        jail.__file__,
        str(folder),
        *limits,
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env={})
    return done.stdout.strip()


ATTEMPT = """
import os, socket
def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return print("refused")
    print("done")
"""


@pytest.mark.parametrize(
    "harm",
    [
        "attempt(open, '/etc/passwd')",
        "attempt(open, '/proc/self/environ')",
        "attempt(os.listdir, '/')",
        "attempt(open, {elsewhere!r}, 'w')",
        "attempt(os.symlink, '/etc/passwd', 'link') or attempt(open, 'link')",
        "attempt(os.execv, '/bin/true', ['true'])",
    ],
)
def test_the_kernel_alone_keeps_off_other_files(tmp_path, missing, harm):
    if "landlock" in missing:
        pytest.skip("this kernel has no Landlock")
    folder = tmp_path / "work"
    folder.mkdir()
    code = ATTEMPT + harm.format(elsewhere=str(tmp_path / "elsewhere"))
    assert run_in_jail(folder, code).endswith("refused")
    assert os.listdir(tmp_path) == ["work"]


def test_the_kernel_alone_keeps_off_the_network_and_other_processes(tmp_path, missing):
    if "namespaces" in missing:
        pytest.skip("this machine gives no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        code = (
            f"attempt(socket.create_connection, {address}, 1)\nattempt(os.kill, {os.getpid()}, 0)"
        )
        assert run_in_jail(tmp_path, ATTEMPT + code) == "refused\nrefused"


def test_processes_that_leave_their_group_end_with_the_first(tmp_path, missing):
    if "namespaces" in missing:
        pytest.skip("this machine gives no namespaces")
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(3600)"
    before = {p.pid for p in psutil.process_iter()}
    run_in_jail(tmp_path, code)
    time.sleep(0.1)
    late = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    assert not [p for p in late if "time.sleep(3600)" in " ".join(p.info["cmdline"] or [])]


def run_in_fence(folder: Path, answer: str) -> str:
    """ "passed", or the exception, where the kernel gives no walls at all."""
    source = Path(fence.__file__).read_text()
    source += "\nimport json\nenclose(sys.argv[1], [], json.loads(sys.argv[2]))\n"
    source += "try:\n    exec(sys.argv[3], {'__name__': '__main__'})\nexcept Exception as error:\n"
    source += "    print(type(error).__name__)\nelse:\n    print('passed')"
    readable = json.dumps([sys.base_prefix, sys.prefix, "/usr/lib"])
    command = [sys.executable, "-P", "-s", "-B", "-c", source, str(folder), readable, answer]
    (folder.parent / "request").write_text("not for the answer")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "answer",
    [
        "open('/etc/passwd')",
        "open('../request')",
        "open('/usr/lib/../../etc/passwd')",
        "open(b'/etc/passwd')",
        "import pathlib\npathlib.Path('/etc/passwd').read_text()",
        "class Path(str):\n    def __contains__(self, _): return False\n"
        "    def startswith(self, _): return True\nopen(Path('/etc/passwd'))",
        "import os\nos.listdir('/')",
        "import os\nos.open('/', os.O_RDONLY)",
        "import os\nos.symlink('/etc/passwd', 'link')",
        "import os\nos.chdir('/')",
        "import os, sys\nopen(os.path.join(sys.prefix, 'harm'), 'w')",
        "import os\nos.rename('../request', 'request')",
        "import os\nos.truncate('../request', 0)",
        "import sqlite3\nsqlite3.connect('/etc/passwd')",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import os\nos.fork()",
        "import sys\ntry:\n    open('/etc/passwd')\nexcept PermissionError as error:\n"
        "    frame = error.__traceback__.tb_next.tb_frame\n"
        "    frame.f_globals.update(FORBIDDEN=(), HARMLESS=('os.chdir',))\n"
        "import os\nos.chdir('/')",
    ],
)
def test_without_the_kernels_walls_the_fence_still_refuses(tmp_path, answer):
    folder = tmp_path / "work"
    folder.mkdir()
    assert run_in_fence(folder, answer) == "PermissionError"


def test_without_the_kernels_walls_honest_code_still_works(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    code = "import os, json, random\nopen('own', 'w').write('x')\nassert os.listdir() == ['own']\n\
os.rename('own', 'mine')\nos.remove('mine')\nassert not os.listdir('.')"
    assert run_in_fence(folder, code) == "passed"


# The rule.


def answer(text: str, prompt_id: int = 0, sample: int = 0) -> Answer:
    return Answer(prompt_id, "Write double.", "mini", sample, text, tokens=9, finish="stop")


def test_the_rule_runs_the_tests_of_each_answers_prompt():
    prompts = {0: Prompt(0, "", tests=TESTS), 1: Prompt(1, "", tests="assert double(2) == 5")}
    answers = [answer(f"Here:\n```python\n{DOUBLE}```", 0), answer(DOUBLE, 1), answer("no", 0, 1)]
    scorer = open_scorer(CodeRule(kind="code"), Path())
    verdicts = dict(scorer.score(answers, prompts, ()))
    assert verdicts == {0: 1.0, 1: "AssertionError", 2: "NameError"}
    assert dict(scorer.score(answers, prompts, {0, 1})) == {2: "NameError"}


def test_a_prompt_without_tests_is_named():
    scorer = open_scorer(CodeRule(kind="code"), Path())
    with pytest.raises(RowsError, match=r"prompt 7 \(from 0\): no tests; expected Python"):
        list(scorer.score([answer(DOUBLE, 7)], {7: Prompt(7, "")}, ()))


def test_missing_walls_are_said(monkeypatch, caplog):
    monkeypatch.setattr("graftkit.distill.scores.code.check_sandbox", lambda: WALLS)
    open_scorer(CodeRule(kind="code"), Path())
    assert "gives the sandbox no namespaces and no landlock" in caplog.text


def test_other_systems_than_linux_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="darwin found; expected Linux"):
        check_sandbox()
