import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = "# Page\n\nBefore.\n\n<!-- frontier:begin -->\nold\n<!-- frontier:end -->\n\nAfter.\n"
FIELDS = {
    *("commit", "date", "machine", "command", "skill", "method", "budget", "seed", "rows"),
    *("bytes", "budget_bytes", "seconds", "cpu_seconds", "kl_mean", "kl_p99", "top1_agreement"),
    *("elsewhere_kl_mean", "elsewhere_kl_p99", "elsewhere_top1_agreement", "base_kl_mean"),
    *("exact_match", "exact_match_target", "exact_match_tuned", "recovered"),
}


@pytest.fixture(autouse=True)
def benchmark_modules(monkeypatch):
    """The scripts import each other by plain names, as Python does for a script's own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def run_frontier(shared, tmp_path_factory):
    """Runs frontier.py on one skill, one method, one budget and few rows."""
    folder = tmp_path_factory.mktemp("frontier")
    (folder / "benchmarks.md").write_text(PAGE)
    options = ["--shared", str(shared), "--skills", "nl_regex", "--methods", "auto"]
    options += ["--budgets", "5%", "--rows", "8", "--seeds", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from frontier import main

        main([*options, "--out", str(folder), "--docs", str(folder)])
    return folder


def test_frontier_records_say_what_was_measured_where_and_when(run_frontier):
    (record,) = map(json.loads, (run_frontier / "frontier.jsonl").read_text().splitlines())
    assert record.keys() >= FIELDS
    assert (record["skill"], record["method"], record["budget"]) == ("nl_regex", "auto", "5%")
    assert record["exact_match_target"] == 0
    assert "--shared" not in record["command"]


def test_a_measured_pack_is_no_larger_than_its_budget(run_frontier):
    record = json.loads((run_frontier / "frontier.jsonl").read_text())
    assert 0 < record["bytes"] <= record["budget_bytes"]


def test_frontier_writes_its_tables_and_its_figure(run_frontier):
    from frontier_report import number

    page = (run_frontier / "benchmarks.md").read_text()
    record = json.loads((run_frontier / "frontier.jsonl").read_text())
    divergence, kept = number(record["kl_mean"]), number(record["recovered"])
    assert page.startswith("# Page\n\nBefore.\n")
    assert page.endswith("\n\nAfter.\n")
    assert "old" not in page
    assert f"| auto | {divergence} | {kept} | {record['cpu_seconds']:.1f} |" in page
    means = (run_frontier / "results" / "frontier-means.csv").read_text().splitlines()
    assert means[:2] == ["measure,skills,method,5%", f"KL,all,auto,{divergence}"]
    assert (run_frontier / "figures" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_writing_a_table_twice_leaves_the_same_page(tmp_path):
    from ledger import write_between

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_between(page, "frontier", "| a \\1 |\n")
    once = page.read_text()
    write_between(page, "frontier", "| a \\1 |\n")
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
    from frontier_report import bytes_at

    curve = [(100, 1.0), (400, 0.01)]
    assert bytes_at(curve, 0.1) == pytest.approx(200)
    assert bytes_at(curve, 2.0) is None
    assert bytes_at(curve, 0.001) is None


def line(method, skill, budget, divergence, recovered, size=100, **others):
    stamp = {"date": "2026-01-02", "commit": "abc1234", "machine": MACHINE}
    out = {"elsewhere_kl_mean": 2 * divergence, "base_kl_mean": 3 * divergence}
    values = {"kl_mean": divergence, "recovered": recovered, "cpu_seconds": 4.0, "bytes": size}
    key = {"method": method, "skill": skill, "budget": budget, "seed": 0, "rows": 8}
    return {**stamp, **key, **values, **out, **others}


@pytest.mark.slow
def test_the_frontier_names_what_is_lost_out_of_reach_and_equal(tmp_path):
    from frontier_report import write_report

    page = tmp_path / "benchmarks.md"
    page.write_text(PAGE + "<!-- lossless:begin -->\n<!-- lossless:end -->\n")
    stamp = {"date": "2026-01-02", "commit": "abc1234", "machine": MACHINE, "seed": 0, "rows": 8}
    lossless = {"skill": "a", "budget": None, "bytes": 1234, "restored": True}
    refusal = {"method": "svd", "skill": "b", "budget": "1%", "refused": "too small"}
    records = [
        line("auto, rows", "a", "1%", 0.4, 0.5, size=100),
        line("auto, rows", "a", "5%", 0.1, 0.9, size=400),
        line("auto, rows", "b", "5%", 0.2, 0.8),
        line("svd", "a", "5%", 0.2, 0.95, size=400),
        stamp | refusal,
        stamp | {"method": "ZipNN"} | lossless,
        stamp | {"method": "other", **lossless, "restored": False},
    ]
    write_report(records, tmp_path)
    text, results = page.read_text(), tmp_path / "results"
    assert "| method | KL, 1% | KL, 5% | kept, 1% | kept, 5% | CPU s |" in text
    assert "| auto, rows | 0.4 (1 of 2) | 0.14 | 0.5 (1 of 2) | 0.85 | 4.0 |" in text
    assert "| ZipNN | 1,234 |" in text
    assert "| other | 1,234 NOT RESTORED |" in text
    assert "recovered,a,5%,0.9,svd,0.95" in (results / "frontier-lost.csv").read_text()
    assert "svd,1%,b" in (results / "frontier-out-of-reach.csv").read_text()
    equal = (results / "frontier-equal-bytes.csv").read_text().splitlines()
    assert "best other method,a,–,0.50 (svd),–" in equal
    skills = (results / "frontier-skills.csv").read_text()
    assert 'a,"auto, rows",1,0.4,0.1' in skills


def test_routing_tells_forms_of_prompts_apart(tmp_path):
    from routing_report import write_report

    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- routing:begin -->\n<!-- routing:end -->\n")
    stamp = {"date": "2026-01-02", "commit": "abc1234", "machine": MACHINE, "rows": 8}
    shares = {
        "right": {"a": 0.5, "b": 1.0}, "wrong": {"a": 0.25, "b": 0.0},
        "rejected": {"a": 0.25, "b": 0.0}, "accepted": {"books": 0.1, "python": 0.3},
    }  # fmt: skip
    answers = {
        "routed": 0.6, "oracle": 0.8, "as_alone": 1.0, "route_ms": 1.0, "answer_ms": 50.0,
        "rejected_rows": 4, "rejected_bit_identical": 4,
    }  # fmt: skip
    records = [
        {**stamp, "router": "centroid", "form": "as they are", **shares, **answers},
        {**stamp, "router": "centroid", "form": "in one template", **shares},
    ]
    write_report(records, tmp_path)
    text = page.read_text()
    assert "| as they are | centroid | 0.750 | 0.125 | 0.125 | 0.200 | 0.750 | 2.0 % |" in text
    assert "| in one template | centroid | 0.750 | 0.125 | 0.125 | 0.200 | – | – |" in text
    foreign = (tmp_path / "results" / "routing-foreign.csv").read_text().splitlines()
    assert foreign[:2] == ["prompts,router,books,python", "as they are,centroid,0.10,0.30"]
    (_, row) = (tmp_path / "results" / "routing-answers.csv").read_text().splitlines()
    assert row == "as they are,centroid,0.775,0.600,0.750,1.000,4 of 4,1.0"


def test_speed_puts_packing_and_use_of_one_pack_into_one_line(tmp_path):
    from speed_report import write_report

    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- speed:begin -->\n<!-- speed:end -->\n")
    stamp = {"date": "2026-01-02", "commit": "abc1234", "machine": MACHINE, "load_before": 0.5}
    setting = {
        "case": "nursery", "recipe": "auto", "calibrated": False, "budget": "5%", "servable": False,
    }  # fmt: skip
    packed = {
        "seconds": 2.0, "cpu_seconds": 3.0, "largest": 10**6, "peak_rss": 512_000_000,
        "bytes": 1000, "stages": {"reading": 0.5}, "peaks": {"reading": 400_000_000},
    }  # fmt: skip
    used = {
        "read_tuned_ms": 10.0, "load_ms": 1.0, "attach_merged_ms": 200.0, "attach_side_ms": 50.0,
        "detach_merged_ms": 2.0,
    }  # fmt: skip
    write_report(
        [
            {**stamp, **setting, "task": "pack", "workers": 1, **packed},
            {**stamp, **setting, "task": "use", "workers": None, **used},
        ],
        tmp_path,
    )
    text = page.read_text()
    cells = "3.0 | 512 | 0.50 | 1,000 | 1.0 | 200 | 50.0 | 2.0 | 10.0"
    assert f"| nursery, 7.9 M | auto 5% | 1 | {cells} |" in text
    steps = (tmp_path / "results" / "speed-steps.csv").read_text().splitlines()
    assert steps[1:] == ["nursery,auto 5%,1,reading,0.50,400"]


def test_a_report_without_markers_leaves_no_raw_tables(tmp_path):
    from ledger import publish

    (tmp_path / "benchmarks.md").write_text(PAGE)
    with pytest.raises(ValueError, match="speed:begin"):
        publish(tmp_path, "speed", "x", {"speed-steps": (["a"], [["1"]])})
    assert not (tmp_path / "results").exists()


MACHINE = {
    **{"cpu": "C", "cores": 2, "ram_gib": 4, "system": "Linux"},
    **{"python": "3.11", "torch": "2", "transformers": "5"},
}
