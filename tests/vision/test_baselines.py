"""Baselines: their sizes, their random weights, and the channels that pruning leaves."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from vision.tiny_networks import CLASSES, SIZE, as_images, colored, tiny_donor, tiny_rootstock

from graftkit.errors import BudgetError, ConfigError, DonorError
from graftkit.vision.baselines import donor_classifier, pruned_donor, random_trunk, student
from graftkit.vision.donor import pool
from graftkit.vision.donors import open_donor
from graftkit.vision.rootstock import Rootstock, exported_parameters, hidden_head, insert_norms
from graftkit.vision.training import TrainingSettings, fine_tune

IMAGES = as_images(colored(4).pixels)


def small_head(features: int, classes: int) -> nn.Module:
    return hidden_head(features, 8, classes)


def kernels(rootstock: Rootstock) -> list[torch.Tensor]:
    return [weights for weights in rootstock.parameters() if weights.ndim > 1]


def test_a_donor_classifier_reads_all_of_the_donors_last_layer() -> None:
    donor = tiny_donor()
    classifier = donor_classifier(donor, CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(classifier.features(IMAGES), pool(donor(IMAGES)[-1]))
        assert classifier(IMAGES).shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("parameters", "head"), [(6_000, small_head), (143_724, nn.Linear)])
def test_a_student_comes_just_under_its_number_of_parameters(
    parameters: int, head: type[nn.Linear]
) -> None:
    actual = student(CLASSES, parameters, 32, head)
    count = exported_parameters(actual)
    assert 0.9 * parameters < count <= parameters
    assert actual(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.slow
def test_a_student_of_more_parameters_is_wider() -> None:
    widths = [student(CLASSES, parameters, SIZE).scion.features for parameters in (20_000, 80_000)]
    assert widths[0] < widths[1]


def test_a_student_of_fewer_parameters_than_any_has_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"at most 100 parameters .* the narrowest has"):
        student(CLASSES, 100, SIZE)


@pytest.mark.slow
def test_seeds_decide_the_weights_of_students_heads_and_random_trunks() -> None:
    rootstock = tiny_rootstock()
    for make in (
        lambda seed: student(CLASSES, 20_000, SIZE, seed=seed),
        lambda seed: donor_classifier(tiny_donor(), CLASSES, seed=seed),
        lambda seed: random_trunk(rootstock, seed),
    ):
        one, same, other = (kernels(make(seed)) for seed in (0, 0, 1))
        assert all(map(torch.equal, one, same))
        assert not all(map(torch.equal, one, other))


def test_a_random_trunk_keeps_nothing_but_the_architecture() -> None:
    rootstock = tiny_rootstock()
    insert_norms(rootstock, colored(30).pixels)
    before = copy.deepcopy(rootstock)
    fresh = random_trunk(rootstock)
    assert fresh.scion == rootstock.scion
    assert not any(map(torch.equal, kernels(fresh), kernels(rootstock)))
    for norm in fresh.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert not norm.running_mean.any()
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert all(map(torch.equal, rootstock.parameters(), before.parameters()))


def test_a_random_trunk_forgets_weights_that_belong_to_no_layer() -> None:
    rootstock = tiny_rootstock()
    rootstock.trunk[0].token = nn.Parameter(torch.full((1, 1, 500), 7.0))
    token = random_trunk(rootstock).get_parameter("trunk.0.token")
    assert 0.015 < float(token.detach().std()) < 0.025


@pytest.mark.slow
@pytest.mark.parametrize("normed", [False, True])
def test_a_pruned_donor_comes_just_under_its_number_of_parameters(normed: bool) -> None:
    pytest.importorskip("torch_pruning")
    classifier = donor_classifier(tiny_donor(channels=(16, 24, 32)), CLASSES, small_head)
    if normed:
        insert_norms(classifier, colored(8).pixels)
    before = copy.deepcopy(classifier)
    parameters = exported_parameters(classifier) // 4
    pruned = pruned_donor(classifier, parameters)
    assert 0.6 * parameters < exported_parameters(pruned) <= parameters
    assert pruned(IMAGES).shape == (4, 3)
    assert pruned.scion.features == pruned.features(IMAGES).shape[1] < 32
    assert all(map(torch.equal, classifier.parameters(), before.parameters()))


def test_pruning_keeps_the_channels_of_the_largest_weights() -> None:
    pytest.importorskip("torch_pruning")
    classifier = donor_classifier(tiny_donor(channels=(8, 16, 16)), CLASSES)
    conv, head = classifier.trunk[3][0], classifier.head
    with torch.no_grad():
        for channel in range(0, 16, 2):
            conv.weight[channel] = 0.001
            head.weight[:, channel] = 0.001
    pruned = pruned_donor(classifier, int(0.6 * exported_parameters(classifier)))
    keep = pruned.head.weight.abs().amax(dim=0)
    assert 8 <= len(keep) < 16
    assert (keep > 0.002).sum() == 8


def test_a_pruned_donor_is_fine_tuned_like_any_rootstock(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    pruned = pruned_donor(donor_classifier(tiny_donor(), CLASSES), 300)
    settings = TrainingSettings(epochs=1, batch=16)
    before = [weights.detach().clone() for weights in kernels(pruned)]
    fine_tune(pruned, colored(20), colored(9), settings, tmp_path)
    assert not any(map(torch.equal, before, kernels(pruned)))


def test_pruning_to_less_than_a_channel_a_layer_is_refused() -> None:
    pytest.importorskip("torch_pruning")
    with pytest.raises(BudgetError, match="at most 10 parameters"):
        pruned_donor(donor_classifier(tiny_donor(), CLASSES), 10)


def test_a_donor_that_the_pruner_cannot_take_is_refused() -> None:
    pytest.importorskip("torch_pruning")
    classifier = donor_classifier(tiny_donor(), CLASSES)
    classifier.trunk[1] = EightChannels()
    with pytest.raises(DonorError, match="cannot be pruned"):
        pruned_donor(classifier, 200)


class EightChannels(nn.Module):
    """A layer of a fixed width that no weight tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones(1, 8, 1, 1)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigError, match="pip install torch-pruning"):
        pruned_donor(donor_classifier(tiny_donor(), CLASSES), 200)


@pytest.mark.slow
def test_the_real_donor_is_pruned_to_the_size_of_a_rootstock(shared: Path) -> None:
    pytest.importorskip("torch_pruning")
    donor = open_donor(shared / "data/vision/mobilenet_v2_1.0_imagenet_fp16.npz", 64)
    pruned = pruned_donor(donor_classifier(donor, CLASSES), 150_000)
    assert 140_000 < exported_parameters(pruned) <= 150_000
    assert pruned(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
