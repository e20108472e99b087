import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distill.sandboxed import MEMORY, failure, require_sandbox

from graftkit.distill.config import CodeRule
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.distill.scores import code, open_scorer
from graftkit.distill.scores.code import check_sandbox, find_code
from graftkit.errors import ConfigError, RowsError, SourceError

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4"


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


@pytest.mark.slow
def test_an_answer_passes_when_the_tests_run_to_their_end():
    assert failure(DOUBLE, TESTS) is None
    assert failure(DOUBLE.replace("2 *", "3 *"), TESTS) == "AssertionError"


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
    assert failure(answer, TESTS) == reason


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
    assert failure(answer, TESTS) is None


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
    assert failure(answer, TESTS) is not None


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


def test_tests_have_built_in_names_of_their_own():
    answer = "import builtins\nbuiltins.all = __builtins__['all'] = lambda _: True\n" + DOUBLE
    assert failure(answer, "assert all([double(2) == 5])") == "AssertionError"


# Ways to do harm, or to hang.


@pytest.mark.slow
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
    assert failure(answer, TESTS, timeout=0.5) == reason
    assert time.monotonic() - begin < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "parts = []\nwhile True: parts.append(bytearray(2**24))",
        "import os\nwhile True: os.fork()",
        "import threading, time\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()",
        "file = open('large', 'wb')\nwhile True: file.write(bytes(2**24))",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.posix_spawn('/usr/bin/true', ['true'], {})",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.kill(PROCESS_OF_THE_TESTS, 0)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "def f(): f()\nf()",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os, sys\nopen(os.path.join(sys.prefix, 'harm'), 'w')",
        "open('/harm', 'w')",
        "import os\nos.symlink('/etc/passwd', 'link')\nopen('link')",
        "import os\nassert os.environ.get('GRAFTKIT_TEST_SECRET')",
        "input()",
    ],
)
def test_harm_is_refused_and_does_not_pass(answer, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_TEST_SECRET", "secret")
    begin = time.monotonic()
    answer = answer.replace("PROCESS_OF_THE_TESTS", str(os.getpid()))
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


@pytest.mark.slow
def test_nothing_outlives_a_killed_run(tmp_path):
    require_sandbox()
    code = f"from graftkit.distill.scores.code import run_tests as run\nrun('import time; \
time.sleep(60)', '', 60, {MEMORY})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as run:
        inside = _wait_for_processes(psutil.Process(run.pid), 4)
        run.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(inside, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def _wait_for_processes(parent: psutil.Process, count: int) -> list[psutil.Process]:
    for _ in range(500):
        actual = parent.children(recursive=True)
        if len(actual) >= count:
            return actual
        time.sleep(0.02)
    raise AssertionError("the sandbox did not start")


def test_the_network_of_the_machine_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection({server.getsockname()}, 1)"
        assert failure(connect, "") not in (None, "timeout")


def test_the_sandbox_shows_python_and_an_empty_folder_only():
    answer = """
import os
def entries(path): return sorted(os.listdir(path))
def shows(path): return os.path.exists(path)
def descriptors():
    found = []
    for number in range(256):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    return len(found)
"""
    here = str(Path(__file__))
    # Where Python itself is installed below /tmp, its folder is there to read.
    python = {Path(p).parts[2] for p in (sys.prefix, sys.base_prefix) if p.startswith("/tmp/")}
    tests = f"""
assert entries("/tmp") == entries(".") == {sorted(python)!r}
assert not shows({here!r}) and not shows("/proc/self") and not shows("/etc/passwd")
assert entries("/dev") == ["null"]
assert descriptors() == 5
"""
    assert failure(answer, tests) is None


# The rule.


def answer(text: str, prompt_id: int = 0, sample: int = 0) -> SourceAnswer:
    return SourceAnswer(prompt_id, "Write double.", "mini", sample, text, tokens=9, finish="stop")


@pytest.mark.slow
def test_the_rule_runs_the_tests_of_each_answers_prompt():
    require_sandbox()
    prompts = {0: Prompt(0, "", tests=TESTS), 1: Prompt(1, "", tests="assert double(2) == 5")}
    answers = [answer(f"Here:\n```python\n{DOUBLE}```", 0), answer(DOUBLE, 1), answer("no", 0, 1)]
    scorer = open_scorer(CodeRule(kind="code"), Path())
    verdicts = dict(scorer.score(answers, prompts, ()))
    assert verdicts == {0: 1.0, 1: "AssertionError", 2: "NameError"}
    assert dict(scorer.score(answers, prompts, {0, 1})) == {2: "NameError"}


def test_a_prompt_without_tests_is_named():
    require_sandbox()
    scorer = open_scorer(CodeRule(kind="code"), Path())
    with pytest.raises(RowsError, match=r"prompt 7 \(from 0\): no tests; expected Python"):
        list(scorer.score([answer(DOUBLE, 7)], {7: Prompt(7, "")}, ()))


def test_an_answer_that_cannot_be_judged_is_an_error_and_no_wrong_answer():
    require_sandbox()
    prompts = {0: Prompt(0, "", tests="assert point() == 1")}
    answers = [answer("class P: pass\ndef point(): return P()")]
    scorer = open_scorer(CodeRule(kind="code"), Path())
    (verdict,) = dict(scorer.score(answers, prompts, ())).values()
    assert verdict == "error: the tests use more of the answer than plain values"


def test_other_systems_than_linux_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"darwin .* found; expected Linux"):
        check_sandbox()


def test_a_processor_without_a_filter_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="riscv64 found; expected Linux on x86_64 or aarch64"):
        check_sandbox()


def test_without_bubblewrap_the_rule_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="bubblewrap, which is not installed; install it"):
        check_sandbox()


def test_where_no_namespaces_can_be_made_the_rule_is_refused(monkeypatch, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(bwrap))
    code._bubblewrap.cache_clear()
    with pytest.raises(SourceError, match=r"No permissions .* you may make namespaces"):
        check_sandbox()
    code._bubblewrap.cache_clear()
