"""Text of others reaches a terminal as it is: never as markup, never as a control."""

import ast
import json
import math
import re
import sys
from pathlib import Path

import pytest
from commands import run
from rich.console import Console

import graftkit
from graftkit.cli import show
from graftkit.cli.distilling import print_run
from graftkit.cli.generating import print_answers
from graftkit.cli.library import _print_routes, _print_scores
from graftkit.cli.packing import print_export
from graftkit.errors import ConfigError, printable
from graftkit.fuse.interference import Interference, PackPair, draw_interference

NASTY = "zz[/x] [bold]b :smile: \x1b]0;t\x07\x1b[2J\r\n\x85\x9b\u2028\u202eabc\x7f\ud800"
SHOWN = r"zz[/x] [bold]b :smile: \x1b]0;t\x07\x1b[2J\r\n\x85\x9b\u2028\u202eabc\x7f\ud800"


def test_controls_are_escaped_and_other_letters_stay():
    assert printable(NASTY) == SHOWN
    kept = "é ß 漢字\u3000नमस्ते 👩\u200d👧 \\x1b $a_b$ \N{NO-BREAK SPACE}"
    assert printable(kept) == kept
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


@pytest.fixture
def said(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    monkeypatch.setenv("TERM", "xterm")

    def output():
        text = capsys.readouterr()
        return text.out + text.err

    return output


NUMBERS = {"sign conflicts": 1.0}
SCORE = {"rows": 1, "accuracy": 1.0, "routed": 1.0, "oracle": 1.0, "target": 1.0, "regret": 0.0}
SCORE |= {"interval": (0.0, 1.0)}
TABLES = {
    "routes": lambda: _print_routes([NASTY[:30]], [{"route": NASTY, "scores": {NASTY: 1.0}}]),
    "scores": lambda: _print_scores(
        {"skills": {NASTY: SCORE}, "confusion": {NASTY: {NASTY: 1}}, "accuracy": 1.0}
        | {"false_acceptance": None, "milliseconds_per_prompt": 1.0}
    ),
    "stages": lambda: print_run({"output": NASTY, "stages": {NASTY: {"seconds": 1.0, NASTY: 1}}}),
    "export": lambda: print_export(
        {"output": NASTY, "rank": 1, "adapter_bytes": 1, "modules": [], "relative_error": 0.0}
        | {"relative_error_overall": 0.0, "fidelity": None}
        | {"left_out": [{"kind": NASTY, "energy_share": 0.1}]}
    ),
    "answers": lambda: print_answers([{"pack": NASTY, "text": NASTY}] * 2),
    "line": lambda: show.line(NASTY),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_what_a_command_shows_holds_no_control_and_interprets_no_markup(table, said):
    table()
    text = re.sub(r"\x1b\[[0-9;]*m", "", said())  # the styles of Rich's own headers
    assert "zz[/x] [bold]b" in text
    assert [c for c in text if c not in "\n\t" and not c.isprintable()] == []


def test_a_foreign_line_break_makes_no_line_of_its_own(said):
    show.line("name: x\n  verified  yes\u2028more\x85end")
    assert said().splitlines() == [r"name: x\n  verified  yes\u2028more\x85end"]


def test_steps_of_a_progress_bar_are_no_markup(said, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show.progress() as report:
        report("sample [/x]\x1b[2J", 1, 2)
    assert r"sample [/x]\x1b[2J" in said()


def test_an_error_is_one_line_without_controls(said, monkeypatch):
    def fail(*_):
        raise ConfigError(f"{NASTY} is not\nwhat was expected")

    monkeypatch.setattr("graftkit.cli.packing.verify_file", fail)
    assert run("verify", "a", "--target", "b") == 1
    (line,) = said().splitlines()
    assert line.startswith(r"graftkit: zz[/x] [bold]b :smile: \x1b]0;t\x07\x1b[2J")


def test_json_stays_json_whatever_is_in_it(said):
    show.json_or(True, {"name": NASTY, "kl": math.inf, "rows": [math.nan, 1.5]}, lambda: None)
    text = said()
    assert "\x1b" not in text
    value = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert value == {"name": NASTY, "kl": None, "rows": [None, 1.5]}


def test_help_shows_its_square_brackets(said):
    assert run("pack", "--help") == 0
    assert "id[@rev]" in said()


@pytest.mark.slow
def test_a_picture_takes_names_with_dollar_signs(tmp_path):
    pytest.importorskip("matplotlib")
    name = r"$\frac{$ \x1b"
    pair = PackPair(
        0, 1, {f"{name}.weight": Interference(1.0, 1.0, 1.0)}, {f"{name}.weight": "mlp"}
    )
    draw_interference([pair], [name, "$$$\x1b"], tmp_path / "i.png")
    assert (tmp_path / "i.png").stat().st_size > 0


def test_commands_print_through_one_place():
    folder = Path(graftkit.__file__).parent / "cli"
    for file in folder.glob("*.py"):
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        if file.name != "show.py":
            assert not names & {"print", "typer.echo", "RichTable", "sys.stdout.write"}, file.name
