"""Rootstocks: what they read, their heads, and batch normalization put in and folded away."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vision.tiny_networks import CLASSES, SIZE, as_images, colored, tiny_donor, tiny_rootstock

from graftkit.errors import DonorError, ImagesError
from graftkit.vision.donor import pool
from graftkit.vision.rootstock import (
    Scion,
    exported_parameters,
    fold_head,
    fold_norms,
    fold_rootstock,
    grow,
    hidden_head,
    insert_norms,
    linear_head,
)

IMAGES = as_images(colored(4).pixels)


@settings(max_examples=20, deadline=None)
@given(
    reads=st.dictionaries(
        st.integers(0, 3), st.lists(st.integers(0, 7), max_size=8), min_size=1, max_size=4
    ).filter(lambda reads: any(reads.values())),
    poolings=st.sampled_from([("mean",), ("mean", "std"), ("max",)]),
)
def test_features_are_the_donors_by_layer_and_then_by_channel(
    reads: dict[int, list[int]], poolings: tuple[str, ...]
) -> None:
    donor = tiny_donor()
    scion = Scion(4, {layer: tuple(channels) for layer, channels in reads.items()}, poolings)
    rootstock = grow(donor, scion, CLASSES, nn.Identity())
    with torch.no_grad():
        outputs = donor(IMAGES)
        expected = [
            pool(outputs[layer], poolings)[:, channel]
            for layer in sorted(reads)
            for channel in sorted(set(reads[layer]))
        ]
        actual = rootstock.features(IMAGES)
    assert actual.shape[1] == scion.features
    torch.testing.assert_close(actual, torch.stack(expected, dim=1))


def test_a_rootstock_keeps_no_layer_behind_its_cut() -> None:
    donor = tiny_donor()
    rootstock = grow(donor, Scion(2, {1: (0,)}), CLASSES, nn.Linear(1, 3))
    parameters = sum(weights.numel() for weights in rootstock.trunk.parameters())
    assert parameters == sum(weights.numel() for weights in donor.layers[:2].parameters())


def test_training_a_rootstock_leaves_the_donor_as_it_was() -> None:
    donor = tiny_donor()
    before = donor.digest
    rootstock = grow(donor, Scion(2, {1: (0,)}), CLASSES, nn.Linear(1, 3))
    with torch.no_grad():
        for weights in rootstock.parameters():
            weights.add_(1)
    assert donor.digest == before


@pytest.mark.parametrize(
    ("scion", "words"),
    [
        (Scion(5, {1: (0,)}), "has 4 layers, but the scion keeps 5"),
        (Scion(0, {0: (0,)}), "keep 1 to 4"),
        (Scion(2, {2: (0,)}), "reads layer 2, but keeps layers 0 to 1"),
        (Scion(2, {-1: (0,)}), "reads layer -1"),
        (Scion(2, {1: ()}), "reads no channel"),
        (Scion(2, {1: (3, 8)}), "layer 1 has 8 pooled features, but the scion reads number 8"),
        (Scion(2, {1: (-1, 3)}), "number -1"),
    ],
)
def test_a_scion_that_the_donor_cannot_give_is_refused(scion: Scion, words: str) -> None:
    with pytest.raises(DonorError, match=words):
        grow(tiny_donor(), scion, CLASSES, nn.Linear(1, 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 4))
def test_a_linear_head_is_the_regression_on_standardised_features(
    seed: int, features: int, classes: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, features, generator=draws)
    bias, mean = torch.randn(classes, generator=draws), torch.randn(features, generator=draws)
    std = torch.rand(features, generator=draws) + 0.1
    x = mean + std * torch.randn(5, features, generator=draws)
    expected = (x - mean) / std @ weight.T + bias
    torch.testing.assert_close(
        linear_head(weight, bias, mean, std)(x), expected, atol=1e-4, rtol=1e-4
    )


def test_a_feature_that_never_varies_adds_nothing_to_a_linear_head() -> None:
    mean, std = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    head = linear_head(torch.ones(1, 2), torch.zeros(1), mean, std)
    torch.testing.assert_close(head(torch.tensor([[3.0, 5.0]])), torch.tensor([[2.0]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_a_folded_head_answers_as_the_head_does_in_eval_mode(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = hidden_head(6, 5, 3)
        nn.init.normal_(head[0].weight)
        nn.init.normal_(head[0].bias)
        for _ in range(3):
            head(2 + 3 * torch.randn(16, 6))
        x = torch.randn(7, 6)
    folded = fold_head(head.eval())
    assert [type(layer) for layer in folded] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(folded(x), head(x), atol=1e-4, rtol=1e-4)


def test_a_rootstock_takes_images_of_its_donors_size() -> None:
    rootstock = tiny_rootstock()
    assert rootstock.size == SIZE
    assert rootstock.eval()(IMAGES).shape == (4, 3)


def norms_in(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70))
def test_inserted_norms_leave_the_function_as_it_is(seed: int, count: int) -> None:
    rootstock = tiny_rootstock(seed)
    images = as_images(colored(5, seed=1).pixels)
    before = rootstock(images)
    insert_norms(rootstock, colored(count, seed).pixels)
    assert len(norms_in(rootstock)) == 4
    torch.testing.assert_close(rootstock(images), before, atol=1e-4, rtol=1e-4)


def test_inserted_norms_hold_the_moments_of_the_images() -> None:
    rootstock = tiny_rootstock()
    part = colored(100)
    conv = copy.deepcopy(rootstock.trunk[0][0])
    insert_norms(rootstock, part.pixels)
    norm = norms_in(rootstock)[0]
    with torch.no_grad():
        output = conv((as_images(part.pixels) - 127.5) / 127.5)
    torch.testing.assert_close(norm.running_mean, output.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, output.var((0, 2, 3), correction=0))


def test_a_training_step_right_after_the_insertion_sees_almost_the_same_function() -> None:
    rootstock = tiny_rootstock()
    part = colored(60)
    insert_norms(rootstock, part.pixels)
    images = as_images(part.pixels)
    with torch.no_grad():
        before = rootstock.eval().features(images)
        rootstock.trunk.train()
        torch.testing.assert_close(rootstock.features(images), before, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_folding_trained_norms_leaves_function_and_parameters_of_the_donor(seed: int) -> None:
    rootstock = tiny_rootstock(seed)
    names = dict(rootstock.trunk.named_parameters()).keys()
    insert_norms(rootstock, colored(12, seed).pixels)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for norm in norms_in(rootstock):
            for value in (norm.weight, norm.bias, norm.running_mean):
                value.add_(0.3 * torch.randn_like(value))
    images = as_images(colored(5, seed=1).pixels)
    before = rootstock(images)
    fold_norms(rootstock, SIZE)
    assert norms_in(rootstock) == []
    assert dict(rootstock.trunk.named_parameters()).keys() == names
    torch.testing.assert_close(rootstock(images), before, atol=1e-4, rtol=1e-4)


class Native(nn.Module):
    """Norms of its own: behind a convolution without bias, before one, and after a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(6)  # registered out of order
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.before = nn.BatchNorm2d(6)
        self.after_sum = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return self.after_sum(y + self.before(torch.relu(y)))


def test_norms_are_folded_by_what_they_read_and_the_others_stay() -> None:
    network = Native()
    with torch.no_grad():
        for norm in norms_in(network):
            norm.running_mean.normal_()
            norm.weight.normal_()
    images = torch.rand(2, 3, SIZE, SIZE)
    before = network.eval()(images)
    fold_norms(network, SIZE)
    assert isinstance(network.second, nn.Identity)
    assert norms_in(network) == [network.before, network.after_sum]
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)


def test_a_folded_rootstock_answers_alike_with_fewer_parameters() -> None:
    rootstock = tiny_rootstock()
    plain = sum(weights.numel() for weights in rootstock.parameters())
    insert_norms(rootstock, colored(12).pixels)
    images = as_images(colored(5, seed=1).pixels)
    folded = fold_rootstock(rootstock)
    torch.testing.assert_close(folded(images), rootstock(images), atol=1e-4, rtol=1e-4)
    # The head's own normalization goes too: two values for each of 11 features.
    assert exported_parameters(rootstock) == plain - 2 * 11
    assert len(norms_in(rootstock)) == 4


def test_norms_cannot_be_measured_on_no_image() -> None:
    with pytest.raises(ImagesError, match="no image"):
        insert_norms(tiny_rootstock(), np.zeros((0, 3, SIZE, SIZE), dtype=np.uint8))
