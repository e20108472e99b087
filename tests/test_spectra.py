from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def measures(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import spectra_measures

    return spectra_measures


def test_singular_values_are_those_of_the_weighted_delta(measures):
    delta = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs, outputs = measures.white_noise((9, 20), 2), measures.white_noise((6, 30), 3)
    h, g = inputs @ inputs.T, outputs @ outputs.T
    halves = [_half(g), _half(h)]
    expected = torch.linalg.svdvals(halves[0] @ delta @ halves[1])
    actual = measures.singular_values(delta, measures.root(h), measures.root(g).T)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(measures.singular_values(delta), torch.linalg.svdvals(delta))


def test_a_flat_spectrum_needs_all_components_and_a_power_law_shows_its_exponent(measures):
    flat = measures.shape_of(torch.ones(200, dtype=torch.float64))
    assert flat == pytest.approx(
        {"rank90": 0.9, "rank99": 0.99, "top1": 0.01, "top10": 0.1, "spike": 1, "decay": 0},
        abs=0.006,
    )
    law = torch.arange(1, 201, dtype=torch.float64) ** -0.7
    assert measures.shape_of(law)["decay"] == pytest.approx(0.7)


def test_spikes_on_a_bulk_are_counted_and_noise_has_none(measures):
    noise = measures.white_noise((100, 150), 4)
    values = measures.singular_values(noise)
    other = measures.singular_values(measures.white_noise((100, 150), 5))
    assert measures.spikes_of(values, values)["spikes"] == 0
    spiked = noise + 100 * torch.outer(torch.ones(100) / 10, torch.ones(150) / 150**0.5)
    actual = measures.spikes_of(measures.singular_values(spiked), other)
    assert actual["spikes"] == 1
    assert actual["spike_energy"] == pytest.approx(0.4, abs=0.05)


def test_unchanged_words_cost_nothing_and_zeros_of_both_signs_differ(measures):
    target = torch.tensor([1.0, -1.0, 0.0, 3.0] * 8).bfloat16()
    assert measures.words_of(target, target) == {"unchanged": 1.0, "exact_bits": 0.0}
    tuned = target.clone()
    tuned[2] = -0.0
    actual = measures.words_of(target, tuned)
    assert actual["unchanged"] == 31 / 32
    # Only zeros share the exponent of the changed word: 8 of 32 words, one of which differs.
    assert actual["exact_bits"] == pytest.approx(8 / 32 * 0.543564, abs=1e-5)


def test_entries_of_a_sparse_delta_show_it(measures):
    delta = torch.zeros(100, 100)
    delta[:5] = measures.white_noise((5, 100), 6).float()
    actual = measures.entries_of(delta)
    assert actual["still_rows"] == 0.95
    assert actual["row10"] == pytest.approx(1.0)
    assert actual["kurtosis"] > 30


def test_a_shift_that_all_rows_share_is_told_from_what_they_do_not(measures):
    noise = measures.white_noise((50, 8), 9)
    inputs = measures.white_noise((8, 8), 10)
    assert measures.common_shift(noise - noise.mean(0), inputs) == pytest.approx(0)
    assert measures.common_shift(torch.ones(50, 8), inputs) == pytest.approx(1)


def test_entries_coded_one_by_one_cost_the_gaussian_limit_with_and_without_feedback(measures):
    noise = measures.white_noise((4000, 12), 7)
    assert measures.dense_rates(noise, None, (0.25, 0.0625)) == pytest.approx([1, 2], abs=0.03)
    mixed = measures.white_noise((12, 40), 8)
    covariance = mixed @ mixed.T
    # White rows: ½ log2 of variance over error, both as the geometric mean of the input sees them.
    lower = torch.linalg.cholesky(covariance).diagonal().square()
    total = covariance.trace()
    expected = float((12 * lower / (0.0625 * total)).log2().mean()) / 2
    assert measures.dense_rates(noise, covariance, (0.0625,)) == pytest.approx([expected], abs=0.05)


def test_a_component_costs_its_two_vectors(measures):
    # One component: two vectors with error d each and 2d - d² = .1 together.
    one = torch.tensor([1.0] + [0.0] * 9, dtype=torch.float64)
    d = 1 - 0.9**0.5
    expected = 15 / 2 * torch.tensor(1 / d).log2() / 50
    assert measures.lowrank_rate(one, (10, 5), 0.1) == pytest.approx(float(expected), rel=1e-3)
    tighter = [measures.lowrank_rate(one + 0.3, (10, 10), error) for error in (0.5, 0.1, 0.01)]
    assert tighter == sorted(tighter)


def test_the_page_shows_linear_matrices_and_the_raw_tables_every_kind(measures, tmp_path):
    from spectra_report import write_tables

    (tmp_path / "benchmarks.md").write_text("<!-- spectra:begin -->\n<!-- spectra:end -->\n")
    machine = {
        **{"cpu": "C", "cores": 2, "ram_gib": 4, "system": "Linux"},
        **{"python": "3.11", "torch": "2", "transformers": "5"},
    }
    records = [_record("q", 0.1), _record("v", 0.3), _record("embedding, read", 0.9)]
    stamp = {"date": "2026-01-02", "commit": "abc1234", "machine": machine}
    write_tables({**stamp, "records": records}, tmp_path)
    page, results = (tmp_path / "benchmarks.md").read_text(), tmp_path / "results"
    spectra = " | ".join(["20.0 (50.0)"] * 3)
    assert f"| sft | {spectra} | 20.00% | 50.0% | 0.20 / 2.00 | 8.00 |" in page
    kinds = (results / "spectra-components.csv").read_text().splitlines()
    assert kinds[3].startswith('sft,"embedding, read",90.0 (50.0),')
    assert "33.3%" in (results / "spectra-entries.csv").read_text()


def _record(kind, share):
    view = {
        "rank90": share, "white": {"rank90": 0.5}, "top1": 0.1, "decay": 1.0, "spikes": 2,
        "spike_energy": 0.5, "energy": 1.0, "common_shift": 0.5, "lowrank_bits": (0.2, 2.0),
        "dense_bits": (0.3, 3.0),
    }  # fmt: skip
    entries = {
        "still_rows": 0.0, "kurtosis": 0.0, "largest1": 0.1, "row10": 0.1, "column10": 0.1,
    }  # fmt: skip
    views = {"plain": view, "inputs": view, "outputs": view}
    own = {"pair": "sft", "kind": kind, "norm": share, "unchanged": 0.5, "exact_bits": 8.0}
    return {**own, "entries": entries, "views": views}


def _half(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.sqrt()) @ vectors.T
