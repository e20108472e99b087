"""benchmarks/continual.py at its smallest size, and the report on records made up."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = "# Page\n\nBefore.\n\n<!-- continual:begin -->\nold\n<!-- continual:end -->\n\nAfter.\n"
WAYS = ("full fine-tuning", "lora", "opcm", "library, oracle", "library, centroid")
STAMP = {"commit": "abc1234", "date": "2026-01-01T00:00:00+00:00", "steps": 7}


@pytest.fixture(autouse=True)
def benchmark_modules(monkeypatch):
    """The scripts import each other by plain names, as Python does for a script's own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def quick_run(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    (folder / "benchmarks.md").write_text(PAGE)
    options = ["--quick", "--shared", str(shared), "--ways", *WAYS]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from continual import main

        main([*options, "--out", str(folder), "--docs", str(folder)])
    return folder


@pytest.fixture(scope="module")
def records(quick_run):
    lines = (quick_run / "continual.jsonl").read_text().splitlines()
    return {(line["way"], line["learned"]): line for line in map(json.loads, lines)}


def test_every_way_is_measured_on_every_skill_after_every_skill(records):
    one, both = "nl_regex", "nl_regex+clinc150_intent"
    sorted_both = "clinc150_intent+nl_regex"
    ordered = ("full fine-tuning", "lora", "opcm")
    expected = {("target", "")} | {(way, one) for way in WAYS}
    expected |= {(way, both if way in ordered else sorted_both) for way in WAYS}
    assert records.keys() == expected
    for line in records.values():
        assert line["scores"].keys() == {"clinc150_intent", "nl_regex"}


def test_storage_grows_with_packs_and_not_with_a_memory(records):
    one, both = "nl_regex", "nl_regex+clinc150_intent"
    assert records["full fine-tuning", one]["bytes"] == records["full fine-tuning", both]["bytes"]
    assert records["lora", one]["bytes"] == records["lora", both]["bytes"]
    assert abs(records["opcm", one]["bytes"] - records["opcm", both]["bytes"]) < 1000
    library = records["library, centroid", "clinc150_intent+nl_regex"]["bytes"]
    assert records["library, centroid", one]["bytes"] < library < 2 * 0.051 * 15.8e6


def test_a_routed_library_answers_as_the_oracle_where_it_routes_right(records):
    routed = records["library, centroid", "clinc150_intent+nl_regex"]
    oracle = records["library, oracle", "clinc150_intent+nl_regex"]
    assert oracle["routed_right"] == 1
    if routed["routed_right"] == 1:
        assert routed["scores"] == oracle["scores"]


def test_the_run_writes_its_table_and_its_figure(quick_run):
    page = (quick_run / "benchmarks.md").read_text()
    assert "old" not in page
    assert all(f"| {way} |" in page for way in WAYS)
    assert (quick_run / "figures" / "continual.png").read_bytes().startswith(b"\x89PNG")


def line(way, learned, scores, size):
    return {**STAMP, "machine": _machine(), "way": way, "learned": learned} | {
        "scores": dict(zip("ab", scores, strict=True)),
        "bytes": size,
    }


def _machine():
    from ledger import machine

    return machine()


def test_the_report_counts_what_the_metrics_say(tmp_path):
    from continual_report import write_report

    (tmp_path / "benchmarks.md").write_text(PAGE)
    lines = [
        line("target", "", (0.0, 0.1), 0),
        line("full", "a", (0.8, 0.3), 10**6),
        line("full", "b", (0.1, 0.6), 10**6),
        line("full", "a+b", (0.2, 0.7), 2 * 10**6),
        line("full", "b+a", (0.9, 0.3), 2 * 10**6),
        line("unfinished", "a", (1.0, 1.0), 1),
    ]
    ordered = {"full": True, "unfinished": True}
    write_report(lines, [("a", "b"), ("b", "a")], 7, ordered, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| full | 0.525 | 0.450 to 0.600 | -0.450 (-0.600 to -0.300) |" in page
    assert "| +0.150 (+0.100 to +0.200) | 2.0 | – |" in page
    orders = (tmp_path / "results" / "continual-orders.csv").read_text().splitlines()
    assert orders[1:] == ['full,"0.450, -0.600","0.600, -0.300"']
    assert "unfinished" not in page


def test_states_that_do_not_depend_on_the_order_are_measured_once():
    from continual import ORDERS, todo

    actual = todo(["ties", "full fine-tuning", "joint training"], ORDERS)
    assert len(actual) == len(set(actual))
    assert [state for way, state in actual if way == "joint training"] == [tuple(sorted(ORDERS[0]))]
    assert len([1 for way, _ in actual if way == "full fine-tuning"]) == 12
    assert len([1 for way, _ in actual if way == "ties"]) == 10
