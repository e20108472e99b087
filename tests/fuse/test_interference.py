"""How packs get along, in numbers and as a picture."""

import builtins

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import ConfigError, OutputError
from graftkit.fuse.interference import (
    Interference,
    compare_deltas,
    draw_interference,
    measure_interference,
)


def draw(seed, shape=(20, 10)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.floats(2**-10, 2**10))
def test_a_delta_agrees_with_itself_at_any_scale(seed, factor):
    delta = draw(seed)
    interference = compare_deltas(delta, factor * delta)
    assert interference.cosine == pytest.approx(1)
    assert (interference.sign_conflicts, interference.top_overlap) == (0, 1)
    assert interference.weighted_conflicts == pytest.approx(0, abs=1e-6)
    opposed = compare_deltas(delta, -delta)
    assert opposed.cosine == pytest.approx(-1)
    assert (opposed.sign_conflicts, opposed.top_overlap) == (1, 1)
    assert opposed.weighted_conflicts == pytest.approx(1)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_interference_is_mutual(first, second):
    a, b = draw(first), draw(second) * 3
    assert compare_deltas(a, b).numbers() == compare_deltas(b, a).numbers()


def test_unrelated_deltas_have_what_chance_gives():
    interference = compare_deltas(draw(1, (400, 400)), draw(2, (400, 400)))
    assert interference.numbers() == pytest.approx(
        {"cosine": 0, "sign_conflicts": 0.5, "weighted_conflicts": 0.5, "top_overlap": 0.1},
        abs=0.01,
    )


def test_small_numbers_by_hand():
    a, b = torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.tensor([1.0, -1.0, 5.0, -1.0])
    interference = compare_deltas(a, b)
    assert interference.cosine == pytest.approx(0 / (6 * 28) ** 0.5)
    assert interference.sign_conflicts == pytest.approx(1 / 3)
    assert interference.weighted_conflicts == pytest.approx(2 / 4)
    assert interference.top_overlap == 0


@given(st.integers(0, 1000), st.integers(1, 199))
def test_sums_over_two_tensors_are_those_of_both_together(seed, cut):
    a, b = draw(seed).reshape(-1), draw(seed + 1).reshape(-1)
    parts = compare_deltas(a[:cut], b[:cut]) + compare_deltas(a[cut:], b[cut:])
    whole = compare_deltas(a, b)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.sign_conflicts == whole.sign_conflicts
    assert parts.weighted_conflicts == pytest.approx(whole.weighted_conflicts)


def test_zeros_are_nobodys_largest_entries_and_have_no_direction():
    zeros = torch.zeros(20, 10)
    assert set(compare_deltas(zeros, draw(0)).numbers().values()) == {None}
    sparse = torch.zeros(20, 10)
    sparse[0, :3] = 1.0
    assert compare_deltas(sparse, sparse).top == 3
    assert Interference().cosine is None


def test_every_pair_is_measured_on_every_tensor(skills):
    steps = []
    pairs = measure_interference(skills.target, skills.exact, lambda *step: steps.append(step))
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(len(pair.tensors) == len(steps) for pair in pairs)
    for pair in pairs:
        assert set(pair.by_kind()) == {"attention", "embedding", "head", "mlp", "norm"}
        assert pair.total.dot == pytest.approx(sum(x.dot for x in pair.by_kind().values()))


def test_a_pack_agrees_with_itself_in_every_tensor(skills):
    [pair] = measure_interference(skills.target, [skills.lossy[0]] * 2)
    assert all(interference.cosine == pytest.approx(1) for interference in pair.tensors.values())


def test_one_pack_has_nobody_to_compare_with(skills):
    with pytest.raises(ConfigError, match="at least two"):
        measure_interference(skills.target, skills.exact[:1])


@pytest.mark.slow
def test_the_picture_is_a_png(skills, tmp_path):
    pairs = measure_interference(skills.target, skills.exact)
    draw_interference(pairs, ["a", "b", "c"], tmp_path / "i.png")
    assert (tmp_path / "i.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError):
        draw_interference(pairs, ["a", "b", "c"], tmp_path / "absent" / "i.png")


def test_without_matplotlib_a_line_says_what_to_install(skills, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    pairs = measure_interference(skills.target, skills.exact[:2])
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"graftkit\[report\]"):
        draw_interference(pairs, ["a", "b"], tmp_path / "i.png")
    assert list(tmp_path.iterdir()) == []
