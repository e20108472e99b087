import json
import shutil
from pathlib import Path

import pytest
from commands import run
from library.conftest import NAMES, prompts_of

from graftkit.library import Library


@pytest.fixture
def reported(capsys):
    """What a command prints on stdout, as JSON."""

    def run_json(*arguments: object):
        capsys.readouterr()
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run_json


@pytest.fixture
def shown(capsys):
    """What a command prints for a person."""

    def run_plain(*arguments: object) -> str:
        capsys.readouterr()
        assert run(*arguments) == 0
        return capsys.readouterr().out

    return run_plain


@pytest.fixture
def refused(capsys):
    """The one line on stderr of a command that exits 1."""

    def run_refused(*arguments: object) -> str:
        capsys.readouterr()
        assert run(*arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        return line

    return run_refused


def rows_file(path: Path, prompts: list[str]) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": " 0"}) for prompt in prompts]
    path.write_text("\n".join(lines))
    return path


def test_a_library_is_made_filled_listed_and_emptied(world, tmp_path, reported):
    folder = tmp_path / "library"
    made = reported("library", "init", folder, "--target", world.target)
    assert made["target"]["reference"] == str(world.target)
    prompts = rows_file(tmp_path / "rows.jsonl", prompts_of("lower"))
    added = reported("library", "add", folder, world.plain, "--name", "plain", "--prompts", prompts)
    assert (added["name"], added["version"], added["has_key"]) == ("plain", 1, True)
    assert reported("library", "list", folder)["packs"] == [added]
    updated = reported(
        "library", "add", folder, world.packs["upper"], "--name", "plain", "--update"
    )
    assert updated["version"] == 2
    assert reported("library", "remove", folder, "plain") == {
        "removed": [added, updated],
        "remains": [],
    }
    assert reported("library", "list", folder)["packs"] == []


def test_prompts_without_completions_do_for_a_key_and_for_routing(
    world, folder, tmp_path, reported
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts_of("lower", seed=3)))
    added = reported("library", "add", folder, world.plain, "--name", "plain", "--prompts", prompts)
    assert added["has_key"]
    assert len(reported("library", "route", folder, "--rows", prompts)) == 30


def test_routes_come_in_order_with_the_score_of_every_pack(full, tmp_path, reported):
    prompts = [prompts_of(name, 1, seed=5)[0] for name in NAMES]
    rows = rows_file(tmp_path / "rows.jsonl", [*prompts, "", "!?!?;;"])
    actual = reported("library", "route", full, "--rows", rows)
    assert [row["route"] for row in actual][:4] == [*NAMES, "target"]
    assert all(row.keys() == {"route", "scores"} for row in actual)
    assert actual[0]["scores"].keys() == set(NAMES)


def test_packs_that_are_never_chosen_are_named(world, folder, tmp_path, capsys):
    run("library", "add", folder, world.plain, "--name", "plain")
    rows = rows_file(tmp_path / "rows.jsonl", ["0123"])
    capsys.readouterr()
    assert run("library", "route", folder, "--rows", rows, "--json") == 0
    assert "plain without a router key" in capsys.readouterr().err


def test_evaluation_reports_routed_oracle_and_target(full, tmp_path, reported, shown):
    arguments = ["library", "evaluate", full]
    for name in NAMES:
        rows = rows_file(tmp_path / f"{name}.jsonl", prompts_of(name, 3, seed=6))
        arguments += ["--rows", f"{name}={rows}"]
    rows = rows_file(tmp_path / "target.jsonl", ["!?;!?;!?", ""])
    refused_row = [*arguments, "--rows", f"target={rows}"]
    assert run(*refused_row, "--json") == 1  # an empty prompt cannot be answered
    actual = reported(*arguments)
    assert set(actual["confusion"]) == set(NAMES)
    assert actual["router"] == "keys"
    expected = {"rows", "accuracy", "interval", "routed", "oracle", "target", "regret"}
    assert all(score.keys() == expected for score in actual["skills"].values())
    assert " % of the rows routed right" in shown(*arguments)


@pytest.mark.slow
def test_an_audit_says_what_changes_and_proves_the_removal(full, tmp_path, reported, shown):
    rows = rows_file(tmp_path / "rows.jsonl", ["0123", "!?;;"])
    actual = reported("library", "audit", full, "digits", "--prove", rows)
    assert actual["pack"]["name"] == "digits"
    assert actual["proof"]["holds"]
    assert actual["leans"].keys() == {"upper@1", "lower@1"}
    text = shown("library", "audit", full, "digits", "--prove", rows)
    assert "equal to those of a library that never had it, bit for bit" in text
    assert "lm_head.weight: 96 of 96 rows move" in text


def test_tables_are_printed_for_people(folder, tmp_path, shown):
    assert "digits@1" in shown("library", "list", folder)
    rows = rows_file(tmp_path / "rows.jsonl", prompts_of("upper", 1, seed=5))
    assert "upper" in shown("library", "route", folder, "--rows", rows)
    learned = folder / "learning" / "digits"
    learned.mkdir(parents=True)
    text = shown("library", "remove", folder, "digits")
    assert "removed digits@1" in text
    assert "are still here" in text


def test_generate_takes_a_library_and_routes(full, reported):
    prompt = prompts_of("upper", 1, seed=5)[0]
    actual = reported("generate", "--library", full, "--prompt", prompt, "--max-new-tokens", 4)
    assert actual["answers"][0]["pack"] == "upper"
    by_name = reported(
        *("generate", "--library", full, "--prompt", prompt, "--max-new-tokens", 4),
        *("--route", "upper"),
    )
    assert by_name == actual


@pytest.mark.slow
def test_generate_routes_among_packs_by_their_keys(world, reported, refused):
    prompt = prompts_of("lower", 1, seed=5)[0]
    packs = [argument for file in world.packs.values() for argument in ("--pack", file)]
    command = ["generate", world.target, *packs, "--prompt", prompt, "--max-new-tokens", 4]
    answers = {answer["pack"]: answer["text"] for answer in reported(*command)["answers"]}
    (routed,) = reported(*command, "--route", "auto")["answers"]
    assert routed["pack"] == "lower.skillpack"
    assert routed["text"] == answers["lower.skillpack"]
    (target,) = reported(*command, "--route", "target")["answers"]
    assert target["pack"] is None
    assert "no pack is called 'nobody'" in refused(*command, "--route", "nobody")
    plain = ["generate", world.target, "--pack", world.plain, "--prompt", prompt]
    assert "no pack carries a router key" in refused(*plain, "--route", "auto")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("library list {nowhere}", "no library here"),
        ("library remove {full} nobody", "no pack 'nobody' here"),
        ("library add {full} {plain} --name target", "stands for no pack at all"),
        ("library add {full} {foreign} --name foreign", "made for other"),
        ("library add {full} {plain} --name digits", "say --update"),
        ("library init {full} --target {target}", "a library already"),
        ("library evaluate {full} --rows digits", "is not NAME=FILE"),
        ("library route {full} --rows {nowhere}", "cannot be read"),
        ("library audit {full} nobody", "no pack 'nobody' here"),
        ("generate --prompt x", "name a target"),
        ("generate {target} --library {full} --prompt x", "name a target"),
    ],
)
def test_mistakes_are_one_line(world, full, tmp_path, refused, command, message):
    places = {"full": full, "nowhere": tmp_path / "nowhere", "target": world.target}
    places |= {"plain": world.plain, "foreign": world.foreign}
    assert message in refused(*(word.format(**places) for word in command.split()))


def test_a_missing_pack_file_is_named(folder, tmp_path, refused):
    entry = Library.open(folder).index.find("upper")
    shutil.copy(folder / entry.file, tmp_path)
    (folder / entry.file).unlink()
    rows = rows_file(tmp_path / "rows.jsonl", ["0123"])
    assert "listed in library.toml but missing" in refused(
        "library", "route", folder, "--rows", rows
    )
