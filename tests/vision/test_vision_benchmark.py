"""The benchmark of the vision branch, on a few images."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = "<!-- vision:begin -->\n<!-- vision:end -->\n"


@pytest.mark.slow
@pytest.mark.timeout(1000)  # minutes where other tests run beside it
def test_a_quick_run_measures_frozen_and_fine_tuned_rootstocks(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Not by its name, which is that of this folder.
    spec = importlib.util.spec_from_file_location("vision_benchmark", BENCHMARKS / "vision.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    (tmp_path / "benchmarks.md").write_text(PAGE)
    options = ["--quick", "--shared", str(shared), "--no-features"]
    options += ["--runs", "frozen, 0.6 MB", "fine-tuned, 0.6 MiB"]
    benchmark.main([*options, "--out", str(tmp_path), "--docs", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "vision.jsonl").read_text().splitlines()]
    assert [record["run"] for record in records] == [
        "frozen, 0.6 MB", "fine-tuned, 0.6 MiB", "margin"
    ]  # fmt: skip
    assert records[0]["bytes"] <= 600_000
    assert records[1]["bytes"] <= 0.6 * 2**20
    assert records[1]["baselines"]["fine-tuned donor"]["parameters"] > 2_000_000
    assert all(record["test_accuracy"] > 0.3 for record in records[:2])  # 1 in 12 by chance
    low, high = records[2]["lead_interval"]
    assert low < records[2]["lead"] < high
    assert [len(orders) for orders in records[2]["lines"].values()] == [1, 1]
    assert records[2]["lines"]["rootstock"][0]["bytes"] == records[1]["bytes"]
    assert (tmp_path / "benchmarks.md").read_text() == PAGE  # quick numbers are for no page


def test_the_report_shows_every_run_with_its_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from vision_report import write_report

    numbers = {
        "parameters": 1234, "trunk_parameters": 1000, "bytes": 5678, "macs": 2_000_000,
        "p50_ms": 0.5, "val_accuracy": 0.9, "val_loss": 0.3, "test_accuracy": 0.875,
        "test_interval": [0.84, 0.9],
    }  # fmt: skip
    line = {
        "run": "frozen, 1 MB", "rule": "all", "scion": [{"layer": "f.7"}], "seconds": 61.2,
        "int8": {"val_accuracy": 0.89, "test_accuracy": 0.87, "p50_ms": 0.4}, "int8_bytes": 2000,
        "draws": [0.86, 0.88], "baselines": {"donor, last layer": numbers},
        "date": "2026-01-02T00:00:00+00:00", "commit": "abc1234",
        "machine": {
            "cpu": "c", "cores": 2, "ram_gib": 24, "system": "Linux", "python": "3", "torch": "2",
            "transformers": "5",
        },
        **numbers,
    }  # fmt: skip
    order = {"val": 0.9, "test": 0.8, "bytes": 4321}
    margin = {key: line[key] for key in ("date", "commit", "machine")} | {
        "run": "margin", "lead": 0.0123, "lead_interval": [-0.001, 0.0256],
        "lines": {"rootstock": [order, order], "paper's scion": [order, order | {"test": 0.7}]},
    }  # fmt: skip
    page = tmp_path / "benchmarks.md"
    page.write_text(PAGE)
    write_report([line, line | {"run": "fine-tuned, 0.6 MiB"}, margin], tmp_path)
    text, results = page.read_text(), tmp_path / "results"
    numbers_shown = "5,678 | 2.0 | 0.50 | 0.9000 | 0.8750 | 0.840 to 0.900 |"
    assert f"| frozen, 1 MB | **rootstock** | {numbers_shown}" in text
    assert f"| fine-tuned, 0.6 MiB | donor, last layer | {numbers_shown}" in text
    assert "| frozen, 1 MB | donor, last layer |" not in text  # the page shows one run whole
    assert "by 1.2 points of test accuracy, 95 % interval -0.1 to 2.6" in text
    networks = (results / "vision-networks.csv").read_text()
    assert '"frozen, 1 MB",rootstock,1234,1000,5678,2.0,0.50,0.9000,0.300,0.8750,' in networks
    assert '"frozen, 1 MB","donor, last layer",1234,' in networks
    assert ",0.8700,0.0141,61" in (results / "vision-int8.csv").read_text()
    orders = (results / "vision-orders.csv").read_text()
    assert "paper's scion,4321,0.9000,0.8000,0.9000,0.7000,0.7500" in orders
