"""Probes: what is minimised, what validation chooses, and which features matter."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from graftkit.vision.probe import (
    UNSEEN_LOGIT,
    LinearProbe,
    fit_hidden,
    fit_probe,
    l2_relevance,
    read_probes,
    taylor_relevance,
    write_probes,
)
from graftkit.vision.rootstock import fold_head


def blobs(count: int, classes: int = 3, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes around points of their own; the last feature says nothing, the first ones do."""
    draws = torch.Generator().manual_seed(seed)
    centers = torch.zeros(classes, features)
    centers[torch.arange(classes), torch.arange(classes)] = 3.0
    labels = torch.arange(count) % classes
    return centers[labels] + torch.randn(count, features, generator=draws), labels


def objective(weight: Tensor, bias: Tensor, scaled: Tensor, labels: Tensor, decay: float) -> Tensor:
    return (
        functional.cross_entropy(scaled @ weight.T + bias, labels)
        + decay / 2 * weight.square().sum()
    )


def test_a_probe_is_a_minimum_of_its_penalised_loss() -> None:
    train, val = blobs(90), blobs(30, seed=1)
    probe = fit_probe(train, val, 3, [0.01])
    weight, bias = probe.weight.requires_grad_(), probe.bias.requires_grad_()
    objective(weight, bias, probe.standardized(train[0]), train[1], 0.01).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-3


def test_validation_chooses_the_penalty_and_ties_go_to_the_stronger() -> None:
    train = blobs(60)
    probe = fit_probe(train, train, 3, [1000.0, 0.003, 0.001])
    accuracies = [fit_probe(train, train, 3, [d]).val_accuracy for d in (1000.0, 0.003, 0.001)]
    assert probe.val_accuracy == max(accuracies)
    assert probe.decay == (1000.0, 0.003, 0.001)[accuracies.index(max(accuracies))]


def test_the_head_answers_as_the_probe_does() -> None:
    train, val = blobs(60), blobs(30, seed=1)
    probe = fit_probe(train, val, 3)
    torch.testing.assert_close(probe.head()(val[0]), probe.logits(val[0]), atol=1e-4, rtol=1e-4)


def test_probes_on_disk_are_those_that_were_written(tmp_path: Path) -> None:
    train, val, file = blobs(60), blobs(30, seed=1), tmp_path / "probes.safetensors"
    probes = [fit_probe((train[0][:, :k], train[1]), (val[0][:, :k], val[1]), 3) for k in (2, 5)]
    write_probes(probes, file)
    actual = read_probes(file, 2)
    assert actual is not None
    for probe, other in zip(probes, actual, strict=True):
        for field in fields(LinearProbe):
            value, same = getattr(probe, field.name), getattr(other, field.name)
            assert torch.equal(value, same) if isinstance(value, Tensor) else value == same


def test_probes_that_are_damaged_too_few_or_fitted_otherwise_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "probes.safetensors"
    assert read_probes(file, 1) is None
    write_probes([fit_probe(blobs(60), blobs(30, seed=1), 3)], file)
    assert read_probes(file, 2) is None
    with monkeypatch.context() as other:
        other.setattr("graftkit.vision.probe._CACHE_METADATA", {"fitted": "otherwise"})
        assert read_probes(file, 1) is None
    file.write_bytes(file.read_bytes()[:-10])
    assert read_probes(file, 1) is None


def test_the_head_to_train_is_the_same_function_and_folds_into_one_layer() -> None:
    train, val = blobs(60), blobs(30, seed=1)
    train[0][:, 4] *= 100
    probe = fit_probe(train, val, 3)
    head = probe.trainable_head()
    folded = fold_head(head)
    assert len(list(folded.parameters())) == 2
    for actual in (head(val[0]), folded(val[0])):
        torch.testing.assert_close(actual, probe.logits(val[0]), atol=1e-3, rtol=1e-3)


def test_two_classes_give_two_rows() -> None:
    train, val = blobs(40, classes=2), blobs(20, classes=2, seed=1)
    probe = fit_probe(train, val, 2)
    assert probe.weight.shape == (2, 5)
    assert probe.val_accuracy > 0.9


def test_a_class_without_training_images_is_never_named() -> None:
    features, labels = blobs(60)
    keep = labels != 1
    probe = fit_probe((features[keep], labels[keep]), blobs(30, seed=1), 3)
    assert probe.bias[1] == UNSEEN_LOGIT
    assert not (probe.logits(features).argmax(dim=1) == 1).any()


def test_a_constant_feature_does_no_harm() -> None:
    features, labels = blobs(60)
    features[:, 4] = 7.0
    probe = fit_probe((features, labels), blobs(30, seed=1), 3)
    assert probe.head().weight.isfinite().all()


@pytest.mark.parametrize("rule", ["l2", "taylor"])
def test_features_that_tell_the_classes_matter_more_than_noise(rule: str) -> None:
    train = blobs(300)
    probe = fit_probe(train, blobs(60, seed=1), 3)
    actual = l2_relevance(probe) if rule == "l2" else taylor_relevance(probe, train)
    assert actual[:3].min() > 2 * actual[3:].max()


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_taylor_relevance_is_the_mean_of_feature_times_gradient(seed: int) -> None:
    train = blobs(12, seed=seed)
    probe = fit_probe(blobs(60), blobs(30, seed=1), 3)
    scaled = probe.standardized(train[0]).requires_grad_()
    loss = functional.cross_entropy(scaled @ probe.weight.T + probe.bias, train[1], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, scaled)
    expected = (scaled * gradient).abs().mean(dim=0).detach()
    torch.testing.assert_close(taylor_relevance(probe, train), expected, atol=1e-5, rtol=1e-4)


def test_a_hidden_head_learns_what_a_line_cannot() -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.rand(400, 2, generator=draws) * 2 - 1
    labels = ((features[:, 0] * features[:, 1]) > 0).long()
    train, val = (features[:300], labels[:300]), (features[300:], labels[300:])
    head = fit_hidden(train, val, 2, 32, seed=0)
    answers = head(val[0]).argmax(dim=1)
    assert (answers == val[1]).float().mean() > 0.8
    assert fit_probe(train, val, 2).val_accuracy < 0.7
