"""Each baseline's file is within its budget and is all that is needed beside the target."""

from pathlib import Path

import pytest
import torch
from tiny_models import inputs, make_pair

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("scipy", reason="the programme of PrinMix needs scipy")
METHODS = ("svd", "pruning", "deltacome-fixed", "deltacome-published", "prinmix", "bitdelta")


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """A tiny tied pair without rows; its batches are random tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from baselines.problem import Pair, Problem

        target, tuned = make_pair(tmp_path_factory.mktemp("pair"), "llama_tied")
        problem = Problem(Pair(target, tuned), (), seed=0)
        batch = inputs()
        problem.__dict__["batches"] = [(batch["input_ids"], batch["attention_mask"])]
        yield problem


def make(name, problem, folder, budget):
    """The packer, its file, and the tensors read back from it by a pair that knows no tuned."""
    from baselines.problem import Pair
    from baselines.registry import packer

    method, file = packer(name, folder), folder / "packed"
    method.pack(problem, file, budget)
    alone = Pair(problem.pair.target_path, problem.pair.target_path)
    return file, method.unpack(alone, file)


def squared_error(problem, state):
    return sum(
        float((state[name].float() - tensor.float()).square().sum())
        for name, tensor in problem.pair.after.items()
    )


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *((method, 20_000) for method in METHODS),
        *(pytest.param(method, 6_000, marks=pytest.mark.slow) for method in ("svd", "pruning")),
    ],
)
@pytest.mark.slow
def test_a_file_is_within_its_budget_and_nearer_to_tuned_than_the_target(
    name, budget, problem, tmp_path
):
    file, state = make(name, problem, tmp_path, budget)
    assert file.stat().st_size <= budget
    assert state.keys() == problem.pair.after.keys()
    assert squared_error(problem, state) < squared_error(problem, problem.pair.side.before)


@pytest.mark.parametrize("name", ["svd", "bitdelta"])
def test_norms_are_exact(name, problem, tmp_path):
    _, state = make(name, problem, tmp_path, 20_000)
    for vector in problem.pair.side.vectors:
        assert torch.equal(state[vector], problem.pair.after[vector])


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_out_of_reach_is_refused(name, problem, tmp_path):
    from baselines.protocol import UnreachableError

    with pytest.raises(UnreachableError, match=r"\d"):
        make(name, problem, tmp_path, 150)


@pytest.mark.parametrize("name", ["XOR + zstd", "ZipNN"])
def test_a_lossless_file_restores_every_bit(name, problem, tmp_path):
    pytest.importorskip({"XOR + zstd": "zstandard", "ZipNN": "zipnn"}[name])
    _, state = make(name, problem, tmp_path, None)
    assert all(torch.equal(state[n], tensor) for n, tensor in problem.pair.after.items())


def test_pruned_positions_come_back_in_every_form(problem):
    import numpy as np
    from baselines.pruning import _read_positions, _rice_encode

    index = np.flatnonzero(np.random.default_rng(0).random(5_000) < 0.05)
    for rice in range(6):
        coded = _rice_encode(np.diff(index, prepend=-1) - 1, rice)
        assert np.array_equal(_read_positions(coded, rice, index.size), index)


def test_the_programme_spends_bits_on_the_components_that_need_them(problem):
    import numpy as np
    from baselines.prinmix import F_MAX, WIDTHS, choose_bits

    energy = 4.0 ** -np.arange(20)
    errors = energy[:, None] * np.array([1.0, *(4.0**-bits for bits in WIDTHS)])
    costs = np.array([0.0, *WIDTHS])
    bits = choose_bits(errors, costs, 40)
    assert bits.sum() <= 40
    assert (np.diff(bits) <= 0).all()
    assert len(set(bits) - {0}) <= F_MAX


def test_a_curve_is_read_between_neighbours_that_were_measured(problem):
    from frontier_report import bytes_at, frontier

    points = [(100, 1.0), (200, 1.1), (400, 0.1), (1_000, 0.09)]
    assert frontier(points) == [(100, 1.0), (400, 0.1), (1_000, 0.09)]
    assert bytes_at(points, 10**-0.5) == pytest.approx(200)
    assert bytes_at(points, 0.001) is None
