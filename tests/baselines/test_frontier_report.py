"""What the page says follows from the records alone, and names every case where auto loses."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = (
    "Before.\n<!-- frontier:begin -->\nold\n<!-- frontier:end -->\n"
    "<!-- lossless:begin -->\nold\n<!-- lossless:end -->\nAfter.\n"
)
MACHINE = {
    name: "x" for name in ("cpu", "cores", "ram_gib", "system", "python", "torch", "transformers")
}
STAMP = {"commit": "abc1234", "machine": MACHINE, "date": "2026-01-01T00:00:00", "command": "x"}


@pytest.fixture(autouse=True)
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def record(method, budget, nbytes, kl, seed=0, recovered=1.0):
    values = {"bytes": nbytes, "kl_mean": kl, "elsewhere_kl_mean": 2 * kl, "base_kl_mean": kl}
    key = {"method": method, "skill": "nl_regex", "budget": budget, "seed": seed, "rows": 200}
    return {**STAMP, **key, **values, "recovered": recovered, "cpu_seconds": 1.0}


RECORDS = [
    record("auto, rows", "5%", 1_000, 0.2, seed=0),
    record("auto, rows", "5%", 1_000, 0.2, seed=1),
    record("auto, rows", "10%", 10_000, 0.002, recovered=0.9),
    record("graftllm, rows", "10%", 10_000, 0.02),
    record("graftllm, rows", "5%", 1_000, 0.1),
    {**STAMP, "method": "svd", "skill": "nl_regex", "budget": "5%", "seed": 0, "refused": "no"},
    {
        **STAMP, "method": "ZipNN", "skill": "nl_regex", "budget": None, "seed": 0,
        "restored": True, "bytes": 1_234_567,
    },
]  # fmt: skip


@pytest.fixture
def page(tmp_path):
    from frontier_report import write_report

    (tmp_path / "benchmarks.md").write_text(PAGE)
    write_report(RECORDS, tmp_path)
    assert (tmp_path / "figures" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    return (tmp_path / "benchmarks.md").read_text()


@pytest.fixture
def results(page, tmp_path):
    """The tables beside the page, by name."""
    return {file.stem: file.read_text().splitlines() for file in (tmp_path / "results").iterdir()}


def test_the_page_keeps_what_stands_around_the_tables(page):
    assert page.startswith("Before.\n")
    assert page.endswith("After.\n")
    assert "old" not in page


def test_equal_fidelity_is_read_off_the_frontier_of_auto(results):
    # 0.02 is half way from 0.2 to 0.002 in logarithms, as is 3,162 from 1,000 to 10,000 bytes.
    assert '"graftllm, rows",nl_regex,0.32,1.41,–' in results["frontier-equal-bytes"]


def test_every_loss_is_listed(results):
    lost = results["frontier-lost"]
    assert 'KL,nl_regex,5%,0.2,"graftllm, rows",0.1' in lost
    assert 'recovered,nl_regex,10%,0.9,"graftllm, rows",1.00' in lost
    assert not [line for line in lost if line.startswith("KL,nl_regex,10%")]


def test_refused_budgets_and_lossless_bytes_are_shown(page, results):
    assert "svd,5%,nl_regex" in results["frontier-out-of-reach"]
    assert "| ZipNN | 1,234,567 |" in page
