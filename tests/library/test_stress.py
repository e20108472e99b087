"""A short run of benchmarks/library_stress.py; the long one is run by hand."""

from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.slow
def test_random_operations_of_every_kind_lose_nothing_and_leave_nothing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from library_stress import stress

    actual = stress(operations=120, seed=4)  # a seed that draws all twelve kinds
    assert len(actual["counts"]) == 12
    _, middle, last = actual["objects"]
    assert last < 1.02 * middle
