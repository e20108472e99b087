"""Weighted sums of packs' deltas, beside the model and row by row."""

import functools

import pytest
import torch
from attachment.packs import low_rank_pack
from attachment.test_attach import EXPERTS, FEW, bytes_of, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CAUSAL, architectures, inputs

from graftkit.attachment import attached, without_packs
from graftkit.errors import AttachError
from graftkit.models import load_model

weights = st.floats(-1.5, 1.5).filter(lambda weight: weight == 0 or abs(weight) > 1e-3)
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def skills_of(pair_of):
    """Target folder, an exact and a low-rank pack, the state of the target and with each pack."""

    @functools.cache
    def skills(architecture):
        target, _, exact = pair_of(architecture)
        packs = [exact, low_rank_pack(target, seed=4)]
        model = load_model(target)
        states = [copy_of(model)]
        for pack in packs:
            with attached(model, pack):
                states.append(copy_of(model))
        return target, packs, states

    return skills


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def merged_logits(target, states, mixture):
    """Of a model whose every tensor is θ + Σ w (θ_i - θ)."""
    model, plain = load_model(target), states[0]
    mixed = {
        name: value + sum(w * (states[1 + pack][name] - value) for pack, w in mixture.items())
        for name, value in plain.items()
    }
    model.load_state_dict(mixed)
    return logits(model)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(quick=FEW))
@settings(max_examples=3, database=None)
@given(first=weights, second=weights)
def test_a_mixture_beside_the_model_is_the_model_merged_by_task_arithmetic(
    skills_of, architecture, first, second
):
    target, packs, states = skills_of(architecture)
    mixture = {0: first, 1: second}
    expected = merged_logits(target, states, mixture)
    with attached(load_model(target), packs, mode="side") as attachment:
        attachment.route([mixture])
        uniform = logits(attachment.model)
        attachment.route([None, mixture, 0, mixture])
        mixed = logits(attachment.model)
    torch.testing.assert_close(uniform, expected, rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(mixed[[1, 3]], expected[[1, 3]], rtol=2e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures())
def test_a_rows_mixture_does_not_depend_on_the_mixtures_of_other_rows(skills_of, architecture):
    target, packs, _ = skills_of(architecture)
    with attached(load_model(target), packs, mode="side") as attachment:
        results = []
        for others in (None, 1, {0: 0.5, 1: 0.5}, {0: 0.3, 1: 0.7}, {0: -1.0}):
            attachment.route([{0: 0.3, 1: 0.7}, others, {1: 0.4}, others])
            results.append(logits(attachment.model)[[0, 2]])
    for actual in results[1:]:
        torch.testing.assert_close(actual, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures())
def test_weight_nought_is_the_target_and_weight_one_the_pack_bit_for_bit(skills_of, architecture):
    target, packs, _ = skills_of(architecture)
    model = load_model(target)
    plain = logits(model)
    with attached(model, packs, mode="side") as attachment:
        for nothing in ([{}], [{0: 0.0, 1: -0.0}], [{0: 0}, None, {}, {1: 0.0}]):
            attachment.route(nothing)
            assert torch.equal(logits(model), plain)
        attachment.route([0, None, 1, 0])
        expected = logits(model)
        attachment.route([{0: 1.0, 1: 0.0}, {}, {1: 1}, {0: 1}])
        assert torch.equal(logits(model), expected)
        assert not torch.equal(expected, plain)


@pytest.mark.parametrize("architecture", architectures(CAUSAL, quick=FEW))
def test_generation_with_mixtures_says_what_each_says_alone(skills_of, architecture):
    target, packs, _ = skills_of(architecture)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mixtures = [{0: 0.5, 1: 0.5}, None, {0: 2.0}]
    batch = inputs(rows=3)
    with attached(load_model(target), packs, mode="side") as attachment:
        alone = []
        for row, mixture in enumerate(mixtures):
            attachment.route([mixture])
            alone.append(attachment.model.generate(**batch, **options)[row])
        attachment.route(mixtures)
        assert torch.equal(attachment.model.generate(**batch, **options), torch.stack(alone))


@pytest.mark.parametrize(
    "wrong",
    [{2: 1.0}, {-1: 1.0}, {True: 1.0}, {"0": 1.0}, {0: float("nan")}, {0: float("inf")}, {0: "1"}],
)
def test_a_mixture_of_unknown_packs_or_wrong_weights_is_refused(skills_of, wrong):
    target, packs, _ = skills_of("llama")
    with attached(load_model(target), packs, mode="side") as attachment:
        attachment.route([1])
        expected = logits(attachment.model)
        with pytest.raises(AttachError, match="expected"):
            attachment.route([0, wrong])
        assert torch.equal(logits(attachment.model), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_the_bare_target_is_seen_behind_packs_beside_it(skills_of, architecture):
    target, packs, _ = skills_of(architecture)
    model = load_model(target)
    assert architecture not in EXPERTS
    before, plain = bytes_of(model), logits(model)
    with without_packs(model):
        assert torch.equal(logits(model), plain)
    with attached(model, packs, mode="side") as attachment:
        with without_packs(model):
            assert torch.equal(logits(model), plain)
        attachment.route([0, 1])
        with_packs = logits(model, **inputs(rows=2))
        with pytest.raises(IndexError), without_packs(model):
            model(input_ids=torch.tensor([[10**6]]))
        assert torch.equal(logits(model, **inputs(rows=2)), with_packs)
    with (
        attached(model, packs[0]),
        pytest.raises(AttachError, match="hides the target"),
        without_packs(model),
    ):
        pass
    assert bytes_of(model) == before


def test_stacked_factors_answer_as_packs_one_by_one(pair_of):
    target, *_ = pair_of("llama")
    model = load_model(target)
    packs = [low_rank_pack(target, seed=seed) for seed in range(3)]
    choices = [None, 0, 1, 2, {0: 0.5, 2: -1.0}, 1]
    batch = inputs(rows=6)
    with attached(model, packs, mode="side") as attachment, torch.no_grad():
        for rows in (choices, choices[:3] * 2, choices[::-1]):
            attachment.route(rows)
            expected = model(**batch).logits
            attachment.route(rows, stacked=True)
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        attachment.drop(1)
        attachment.route([0, 2] * 3, stacked=True)
        dropped = model(**batch).logits
        attachment.route([0, 2] * 3)
        torch.testing.assert_close(dropped, model(**batch).logits, atol=1e-4, rtol=1e-4)
