import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = "# Page\n\nBefore.\n\n<!-- size:begin -->\nold\n<!-- size:end -->\n\nAfter.\n"
FIELDS = {
    *("commit", "date", "machine", "command", "skill", "recipe", "budget", "calibration", "rows"),
    *("bytes", "budget_bytes", "seconds", "kl_mean", "kl_p99", "top1_agreement"),
    *("elsewhere_kl_mean", "elsewhere_kl_p99", "elsewhere_top1_agreement"),
    *("exact_match", "exact_match_target", "exact_match_tuned", "recovered"),
}


@pytest.fixture(autouse=True)
def benchmark_modules(monkeypatch):
    """The scripts import each other by plain names, as Python does for a script's own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def run_size(shared, tmp_path_factory):
    """Runs size.py on one skill, one budget and few rows."""
    folder = tmp_path_factory.mktemp("size")
    (folder / "benchmarks.md").write_text(PAGE)
    command = [sys.executable, str(BENCHMARKS / "size.py"), "--shared", str(shared)]
    command += ["--skills", "nl_regex", "--series", "auto", "--budgets", "3%", "--rows", "8"]
    subprocess.run([*command, "--out", str(folder), "--docs", str(folder)], check=True, timeout=120)
    return folder


def test_size_records_say_what_was_measured_where_and_when(run_size):
    (record,) = map(json.loads, (run_size / "size.jsonl").read_text().splitlines())
    assert record.keys() >= FIELDS
    assert (record["skill"], record["recipe"], record["budget"]) == ("nl_regex", "auto", "3%")
    assert record["calibration"] is None
    assert record["exact_match_target"] == 0
    assert "--shared" not in record["command"]


def test_a_measured_pack_is_no_larger_than_its_budget(run_size):
    record = json.loads((run_size / "size.jsonl").read_text())
    assert 0 < record["bytes"] <= record["budget_bytes"]


def test_size_writes_its_table_and_its_figure(run_size):
    page = (run_size / "benchmarks.md").read_text()
    record = json.loads((run_size / "size.jsonl").read_text())
    assert page.startswith("# Page\n\nBefore.\n")
    assert page.endswith("\n\nAfter.\n")
    assert "old" not in page
    assert f"| auto | 3% | {record['bytes']:,} |" in page
    assert (run_size / "figures" / "size.png").read_bytes().startswith(b"\x89PNG")


def test_writing_a_table_twice_leaves_the_same_page(tmp_path):
    from ledger import write_between

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_between(page, "size", "| a \\1 |\n")
    once = page.read_text()
    write_between(page, "size", "| a \\1 |\n")
    assert page.read_text() == once == PAGE.replace("old", "| a \\1 |")


def test_a_page_without_markers_is_refused(tmp_path):
    from ledger import write_between

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="speed:begin"):
        write_between(page, "speed", "x")
    assert page.read_text() == PAGE


def test_what_this_commit_has_measured_is_known_again(tmp_path, monkeypatch):
    import ledger

    monkeypatch.setattr(ledger, "commit", lambda: "abc1234")
    file = tmp_path / "out" / "x.jsonl"
    ledger.Ledger(file, "x.py", []).add({"skill": "a", "budget": None}, {"bytes": 1})
    again = ledger.Ledger(file, "x.py", [])
    assert again.has({"skill": "a", "budget": None})
    assert not again.has({"skill": "a", "budget": "5%"})
    assert not ledger.Ledger(file, "x.py", [], fresh=True).has({"skill": "a", "budget": None})
    for other in ("def5678", "abc1234-dirty"):
        monkeypatch.setattr(ledger, "commit", lambda other=other: other)
        assert not ledger.Ledger(file, "x.py", []).has({"skill": "a", "budget": None})


def test_published_commands_name_no_folder_of_the_machine():
    from ledger import published_command

    arguments = ["--shared", "/a/b", "--workers", "2", "--out=/c", "--work", "/d", "--fresh"]
    assert published_command("speed.py", arguments) == "benchmarks/speed.py --workers 2 --fresh"


def test_equal_fidelity_is_read_between_the_points_of_a_curve():
    from size_report import bytes_at

    curve = [(100, 1.0), (400, 0.01)]
    assert bytes_at(curve, 0.1) == pytest.approx(200)
    assert bytes_at(curve, 2.0) is None
    assert bytes_at(curve, 0.001) is None
