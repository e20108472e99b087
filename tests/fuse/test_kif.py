"""KIF: importances of skill units and what they do to a merge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftkit.checkpoint import Checkpoint
from graftkit.errors import RowsError
from graftkit.fuse.continual import RETENTION, Kif, TaskDelta, energy, new_share, normalized
from graftkit.fuse.search import measure_importances
from graftkit.models import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.rows import Row, encode_row

UNITS = ("a", "b", "c")
importances = st.fixed_dictionaries({name: st.floats(0, 1e6) for name in UNITS})
shares = st.floats(0, 1)


def deltas(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=generator) for name in UNITS}


@given(importances, st.floats(0.001, 1e3))
def test_normalised_importances_span_0_to_1_and_know_no_scale(given_importances, factor):
    result = normalized(given_importances, ())
    values = set(given_importances.values())
    assert all(0 <= value <= 1 for value in result.values())
    if len(values) > 1:
        assert {min(result.values()), max(result.values())} == {0, 1}
    scaled = {name: factor * value for name, value in given_importances.items()}
    # Numbers near the least float are rounded to it, or to nothing.
    exact = all(value == 0 or value > 1e-300 for value in scaled.values())
    if exact and len(set(scaled.values())) == len(values):
        assert normalized(scaled, ()) == pytest.approx(result, abs=1e-6)


def test_equal_importances_are_all_or_nothing():
    assert normalized({"a": 3.0, "b": 3.0}, ()) == {"a": 1, "b": 1}
    assert normalized({"a": 0.0, "b": 0.0}, ()) == {"a": 0, "b": 0}
    assert normalized({}, ()) == {}


def test_a_vector_does_not_set_the_scale_of_matrices():
    rule = Kif()
    rule.add(
        TaskDelta({"norm": torch.full((3,), 100.0), "a": torch.ones(2, 2), "b": torch.zeros(2, 2)})
    )
    assert rule.statistics == {"norm": 1, "a": 1, "b": 0}
    rule.add(
        TaskDelta({"norm": torch.full((3,), 100.0), "b": torch.ones(2, 2), "a": torch.zeros(2, 2)})
    )
    assert rule.statistics == {"norm": 1, "a": 1, "b": 0}


@given(shares, shares)
def test_the_shares_of_old_and_new_are_one_together(before, new):
    assert 0 < new_share(before, new) < 1
    assert new_share(before, new) + new_share(new, before) == pytest.approx(1)
    assert new_share(before, before) == 0.5


def test_what_matters_to_one_side_only_is_nearly_its_own():
    assert new_share(1.0, 0.0) == pytest.approx(0.018, abs=1e-3)
    assert new_share(0.0, 1.0) == pytest.approx(0.982, abs=1e-3)


def test_a_rule_takes_its_first_pack_as_it_is():
    rule, first = Kif(), deltas(0)
    rule.add(TaskDelta(first))
    for name in UNITS:
        assert torch.equal(rule.delta(name), first[name])


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=4), importances)
def test_the_same_delta_again_and_again_stays_itself(seeds, given_importances):
    rule, one = Kif(), deltas(seeds[0])
    for _ in seeds:
        rule.add(TaskDelta(one, importances=given_importances))
    for name in UNITS:
        torch.testing.assert_close(rule.delta(name), one[name])


@given(st.lists(importances, min_size=2, max_size=4))
def test_every_entry_lies_between_those_of_the_packs(tasks):
    rule, packs = Kif(), [deltas(seed) for seed in range(len(tasks))]
    for pack, task in zip(packs, tasks, strict=True):
        rule.add(TaskDelta(pack, importances=task))
    for name in UNITS:
        stack = torch.stack([pack[name] for pack in packs])
        assert (rule.delta(name) <= stack.amax(dim=0) + 1e-5).all()
        assert (rule.delta(name) >= stack.amin(dim=0) - 1e-5).all()
    assert rule.is_sound()


def test_units_are_fused_by_the_importances_of_both_sides():
    before, after = deltas(0), deltas(1)
    rule = Kif()
    rule.add(TaskDelta(before, importances={"a": 2.0, "b": 1.0, "c": 0.0}))
    rule.add(TaskDelta(after, importances={"a": 0.0, "b": 5.0, "c": 10.0}))
    remaining = {"a": 1 - new_share(1.0, 0.0), "b": 0.5, "c": 1 - new_share(0.0, 1.0)}
    for name, share in remaining.items():
        expected = share * before[name] + (1 - share) * after[name]
        torch.testing.assert_close(rule.delta(name), expected)
    mixed = {"a": RETENTION, "b": 0.5, "c": 1 - RETENTION}
    assert rule.statistics == pytest.approx(normalized(mixed, ()))


def test_a_unit_that_one_pack_leaves_alone_counts_as_zero_there():
    rule = Kif()
    rule.add(TaskDelta({"a": torch.ones(2), "b": torch.ones(2)}, importances={"a": 1.0, "b": 0.0}))
    rule.add(TaskDelta({"c": torch.ones(2)}, importances={"c": 1.0}))
    assert rule.delta("a")[0] == pytest.approx(1 - new_share(1.0, 0.0))
    assert rule.delta("b")[0] == pytest.approx(0.5)
    assert rule.delta("c")[0] == pytest.approx(new_share(0.0, 1.0))
    assert rule.statistics.keys() == {"a", "b", "c"}


def test_without_rows_the_energy_per_weight_decides():
    assert energy(torch.tensor([1.0, -3.0])) == 5
    assert energy(torch.zeros(0)) == 0
    rule = Kif()
    rule.add(TaskDelta({"large": 3 * torch.ones(10), "small": torch.ones(1000)}))
    assert rule.statistics == {"large": 1, "small": 0}


ROWS = [Row(f"{a} ", f" {b}{a}") for a in "abcd" for b in "xyz"]


def test_importances_are_the_mean_product_of_delta_and_gradient(skills):
    target, pack = Checkpoint.open(skills.target), skills.exact[0]
    measured = measure_importances(target, pack, ROWS)
    tuned = load_model(skills.tuned[0], torch.float32)
    tokenizer, losses = usable_tokenizer(target), []
    for row in ROWS:
        encoded = encode_row(tokenizer, row)
        ids, start = encoded.ids, encoded.start
        logits = tuned(torch.tensor([ids])).logits[0, start - 1 : -1]
        labels = torch.tensor(ids[start:])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    torch.cat(losses).mean().backward()  # these few rows are one batch
    parameters = dict(tuned.named_parameters())
    assert measured.keys() == {r.name for r in pack.manifest.tensors if r.codec != "zero"}
    for name, importance in measured.items():
        delta = parameters[name].detach() - target.read(name)
        expected = float((delta * parameters[name].grad).abs().mean())
        assert importance == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_measuring_importances_leaves_no_trace(skills):
    target, pack = Checkpoint.open(skills.target), skills.exact[0]
    assert measure_importances(target, pack, ROWS) == measure_importances(target, pack, ROWS)


def test_rows_without_tokens_are_refused(skills):
    with pytest.raises(RowsError, match="no row has a token"):
        measure_importances(Checkpoint.open(skills.target), skills.exact[0], [])
