"""Batch normalization in and out of a network: the function in eval mode stays."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vision.tiny_networks import SIZE, as_images, colored, tiny_rootstock

from graftkit.errors import ImagesError
from graftkit.vision.rootstock import exported_parameters, fold_norms, fold_rootstock, insert_norms


def norms_in(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


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
