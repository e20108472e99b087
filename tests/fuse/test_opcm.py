"""OPCM: projections, the running sum, its scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.fuse.continual import TAKEN_SHARE, Opcm, TaskDelta, project_out

LAYOUTS = {"matrix": "matrix"}
extents = st.integers(1, 7)
seeds = st.integers(0, 10**6)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def pairs(draw):
    """A delta and a merged delta of any rank, 0 included."""
    rows, columns, seed = draw(extents), draw(extents), draw(seeds)
    rank = draw(st.integers(0, min(rows, columns)))
    merged = drawn(seed, rows, rank) @ drawn(seed + 1, rank, columns)
    return drawn(seed + 2, rows, columns), merged


def full_size_projection(delta, merged, share):
    """The definition, with square U and V in float64."""
    delta, merged = delta.double(), merged.double()
    U, S, Vh = torch.linalg.svd(merged)
    rank = int(torch.linalg.matrix_rank(merged.float()))
    P = U.T @ delta @ Vh.T
    taken = 0
    while taken < rank and S[: taken + 1].sum() <= share * S[:rank].sum():
        taken += 1
    P[:taken, :taken] = 0
    P.diagonal()[:rank] = 0
    return (U @ P @ Vh).float()


@given(pairs())
def test_what_is_left_is_orthogonal_to_the_merged_delta_and_each_of_its_directions(pair):
    delta, merged = pair
    left = project_out(delta, merged)
    scale = float(delta.norm() * merged.norm())
    assert abs(float((left * merged).sum())) <= 1e-4 * scale
    U, _, Vh = torch.linalg.svd(merged, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(merged))
    along = (U.T @ left @ Vh.T).diagonal()[:rank]
    assert float(along.abs().sum()) <= 1e-4 * float(delta.norm())
    assert left.norm() <= delta.norm() * (1 + 1e-5)


@given(pairs(), st.sampled_from([0.3, TAKEN_SHARE, 0.9]))
def test_thin_factors_give_what_square_ones_give(pair, share):
    delta, merged = pair
    expected = full_size_projection(delta, merged, share)
    torch.testing.assert_close(project_out(delta, merged, share), expected, atol=1e-4, rtol=1e-4)


@given(pairs(), st.sampled_from([0.01, 1.0, 50.0]))
def test_the_projection_knows_directions_and_no_sizes(pair, factor):
    delta, merged = pair
    left = project_out(delta, merged)
    close = {"atol": 1e-4 * max(1, factor), "rtol": 1e-3}
    torch.testing.assert_close(project_out(delta, factor * merged), left, **close)
    torch.testing.assert_close(project_out(factor * delta, merged), factor * left, **close)
    torch.testing.assert_close(project_out(delta.T, merged.T), left.T, **close)


def test_nothing_is_left_in_the_span_of_the_first_directions():
    merged = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    left = project_out(torch.ones(4, 4), merged, share=0.7)
    expected = torch.ones(4, 4) - torch.eye(4)
    expected[:2, :2] = 0  # 4 + 3 are 70 % of 10
    torch.testing.assert_close(left, expected)


def test_a_rule_takes_its_first_pack_as_it_is():
    deltas = {"matrix": drawn(0, 5, 3), "vector": drawn(1, 4)}
    rule = Opcm()
    rule.add(TaskDelta(deltas, LAYOUTS))
    for name, delta in deltas.items():
        assert torch.equal(rule.delta(name), delta)


def test_the_same_pack_again_changes_nothing():
    skill = TaskDelta({"matrix": drawn(0, 5, 3)}, LAYOUTS)
    rule = Opcm()
    rule.add(skill)
    rule.add(skill)
    torch.testing.assert_close(rule.delta("matrix"), skill.deltas["matrix"])


@settings(max_examples=20)
@given(st.lists(seeds, min_size=1, max_size=4))
def test_the_merged_delta_is_as_long_as_the_packs_are_on_average(chosen):
    rule, norms = Opcm(), []
    for place, seed in enumerate(chosen):
        deltas = {"matrix": (place + 1) * drawn(seed, 6, 4), "vector": drawn(seed + 1, 5)}
        norms.append(torch.cat([delta.flatten() for delta in deltas.values()]).norm())
        rule.add(TaskDelta(deltas, LAYOUTS))
    merged = torch.cat([rule.delta(name).flatten() for name in ("matrix", "vector")])
    torch.testing.assert_close(merged.norm(), torch.stack(norms).mean())


def test_the_running_sum_is_the_recursion_of_the_paper():
    """Δ ← (λ_{t−1} Δ + Δ'_t) / λ_t, with λ_t such that ‖Δ‖ is the mean norm."""
    packs = [{"matrix": drawn(s, 6, 4), "vector": drawn(s + 9, 5)} for s in range(3)]
    rule, merged, factor, norms = Opcm(), None, 1.0, []
    for deltas in packs:
        rule.add(TaskDelta(deltas, LAYOUTS))
        norms.append(torch.cat([delta.flatten() for delta in deltas.values()]).norm())
        if merged is None:
            merged = dict(deltas)
            continue
        new = project_out(deltas["matrix"], merged["matrix"])
        raw = {
            "matrix": factor * merged["matrix"] + new,
            "vector": factor * merged["vector"] + deltas["vector"],
        }
        length = torch.cat([tensor.flatten() for tensor in raw.values()]).norm()
        factor = float(length / torch.stack(norms).mean())
        merged = {name: tensor / factor for name, tensor in raw.items()}
    for name, expected in merged.items():
        torch.testing.assert_close(rule.delta(name), expected, atol=1e-5, rtol=1e-4)


def test_what_is_no_linear_map_is_summed():
    one, two = {"embedding": drawn(0, 6, 4)}, {"embedding": drawn(1, 6, 4)}
    rule = Opcm()
    for deltas in (one, two):
        rule.add(TaskDelta(deltas, LAYOUTS))
    torch.testing.assert_close(rule.total["embedding"], one["embedding"] + two["embedding"])


def test_every_expert_of_a_stack_is_projected_for_itself():
    one, two = drawn(0, 3, 5, 4), drawn(1, 3, 5, 4)
    rule = Opcm()
    for stack in (one, two):
        rule.add(TaskDelta({"experts": stack}, {"experts": "stack_transposed"}))
    expected = torch.stack([a + project_out(b, a) for a, b in zip(one, two, strict=True)])
    torch.testing.assert_close(rule.total["experts"], expected, atol=1e-5, rtol=1e-4)


def test_the_order_of_packs_matters():
    skills = [TaskDelta({"matrix": drawn(s, 6, 4)}, LAYOUTS) for s in range(2)]
    results = []
    for order in (skills, skills[::-1]):
        rule = Opcm()
        for skill in order:
            rule.add(skill)
        results.append(rule.delta("matrix"))
    assert not torch.allclose(*results, atol=1e-3)


@pytest.mark.parametrize("opposite", [False, True])
def test_packs_that_cancel_or_are_empty_leave_the_target(opposite):
    rule = Opcm()
    rule.add(TaskDelta({"vector": torch.ones(3)} if opposite else {"vector": torch.zeros(3)}))
    rule.add(TaskDelta({"vector": -torch.ones(3)} if opposite else {"vector": torch.zeros(3)}))
    assert torch.equal(rule.delta("vector"), torch.zeros(3))
