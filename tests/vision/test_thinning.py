"""Channels that are removed: unread ones of the last layer, and hidden ones inside layers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from vision.tiny_networks import SIZE, colored, inverted_residual, tiny_donor, wide_donor

from graftkit.vision.donor import Chain, Donor, Normalization
from graftkit.vision.donors import open_donor
from graftkit.vision.donors.architectures import InvertedResidual, _block
from graftkit.vision.thinning import (
    LEAST_SHARE,
    Thinner,
    drop_unread_channels,
    find_hidden,
    hidden_channels,
    narrow,
)

WIDTH = 6


def sequential() -> nn.Module:
    layer = nn.Sequential(
        nn.MaxPool2d(2), nn.Conv2d(WIDTH, 7, 3, padding=1), nn.BatchNorm2d(7), nn.SiLU()
    )
    layer[2].running_mean.uniform_(-1, 1)
    layer[2].running_var.uniform_(0.5, 2)
    nn.init.uniform_(layer[2].weight)
    return layer


LAYERS = {
    "with skip": lambda: _block(WIDTH, WIDTH, 6, 1, 8),
    "under stride": lambda: _block(WIDTH, 9, 6, 2, 8),
    "not expanded": lambda: _block(WIDTH, 4, 1, 1, 8),
    "sequential": sequential,
    "convolution alone": lambda: nn.Conv2d(WIDTH, 5, 3),
    "without bias": lambda: nn.Sequential(nn.Conv2d(WIDTH, 5, 1, bias=False), nn.ReLU()),
}


@pytest.mark.slow
@given(data=st.data(), kind=st.sampled_from(sorted(LAYERS)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_kept_channels_stay_and_the_others_are_gone(
    data: st.DataObject, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    first, last = nn.Conv2d(3, WIDTH, 3, padding=1), LAYERS[kind]().eval()
    x = torch.randn(2, 3, 8, 8)
    before = last(first(x))
    width = before.shape[1]
    chosen = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))
    keep = sorted(chosen)
    pruned = drop_unread_channels((first, last), keep)
    assert pruned.dropped == width - len(keep)
    assert pruned.layers[0] is first
    after = pruned.layers[1](first(x))
    torch.testing.assert_close(after, before[:, keep], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last(first(x)), before, rtol=0, atol=0)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (pruned.layers[1], last)]
    assert sizes[0] < sizes[1]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


@pytest.mark.parametrize(
    ("layer", "keep", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), [0], "grouped"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)), [0], "ends in GroupNorm"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), Opaque()), [0], "ends in Opaque"),
        (Opaque(), [0], "ends in Opaque"),
        (nn.Sequential(nn.ReLU()), [0], "no convolution"),
        (nn.Conv2d(4, 4, 3), [0, 1, 2, 3], "every channel is read"),
        (nn.Conv2d(4, 4, 3), [], "no channel is read"),
    ],
)
def test_what_is_not_simple_is_left_as_it_is_and_says_why(
    layer: nn.Module, keep: list[int], reason: str
) -> None:
    pruned = drop_unread_channels([layer], keep)
    assert pruned.layers == (layer,)
    assert pruned.dropped == 0
    assert reason in pruned.reason


def test_a_pruned_layer_still_learns() -> None:
    donor = open_donor(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()), 8)
    pruned = drop_unread_channels(tuple(donor.layers), [1, 3]).layers[-1]
    pruned(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_a_skip_passes_on_the_kept_channels_only() -> None:
    block = _block(WIDTH, WIDTH, 1, 1, 8)
    nn.init.zeros_(block.body[-1].weight)
    nn.init.zeros_(block.body[-1].bias)
    pruned = drop_unread_channels([block], [4, 5]).layers[0]
    assert isinstance(pruned, InvertedResidual)
    x = torch.randn(1, WIDTH, 8, 8)
    torch.testing.assert_close(pruned(x), x[:, 4:])


PIXELS = colored(24).pixels


class Shuffled(nn.Module):
    """A block that shuffles its channels where no module shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.second(functional.relu(self.first(x)).flip(1))
        return changed


class Attended(nn.Module):
    """Hidden channels that are also read by a sum that no module does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        changed: Tensor = self.second(hidden) + hidden
        return changed


class Softened(nn.Sequential):
    """Hidden channels that depend on one another."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 16, 1), nn.Softmax(dim=1), nn.Conv2d(16, 8, 1))


class InPlace(nn.Module):
    """Convolution, normalization and an activation that overwrites its input, and tokens behind."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 6, 1, bias=False),
        )
        self.dense = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.convolutions(x).flatten(2).transpose(1, 2)
        return tokens + self.dense(tokens)


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def image(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def parameters(donor: Donor) -> int:
    return sum(weights.numel() for weights in donor.parameters())


def test_the_channels_inside_an_inverted_residual_are_hidden() -> None:
    (hidden,) = find_hidden(inverted_residual(), image())
    assert (hidden.producer, hidden.consumer, hidden.channels) == ("body.0", "body.4", 24)
    # 8 weights and a bias, 9 weights and a bias, and 8 weights of the projection.
    assert hidden.parameters == 8 + 1 + 9 + 1 + 8


def test_multiply_accumulates_of_a_channel_are_counted_at_every_position() -> None:
    (hidden,) = find_hidden(inverted_residual(), image()[:1])
    assert hidden.macs == (8 + 9 + 8) * SIZE * SIZE


def test_channels_of_convolutions_with_normalization_and_of_dense_layers_are_hidden() -> None:
    actual = find_hidden(seeded(InPlace), image())
    assert [(h.producer, h.consumer, h.channels) for h in actual] == [
        ("convolutions.0", "convolutions.3", 12),
        ("dense.0", "dense.2", 10),
    ]


@pytest.mark.parametrize("make", [Shuffled, Attended, Softened])
def test_channels_that_do_not_keep_apart_are_not_hidden(make: type[nn.Module]) -> None:
    assert find_hidden(seeded(make), image()) == []


@pytest.mark.parametrize("make", [InPlace, inverted_residual])
def test_a_narrowed_layer_answers_as_with_zeros_in_place_of_what_went(make: type) -> None:
    layer = make().eval()
    for hidden in find_hidden(layer, image()):
        narrowed, silenced = copy.deepcopy(layer), copy.deepcopy(layer)
        consumer = silenced.get_submodule(hidden.consumer)
        assert isinstance(consumer, nn.Conv2d | nn.Linear)
        with torch.no_grad():
            consumer.weight[:, [0, 3]] = 0
        keep = [channel for channel in range(hidden.channels) if channel not in (0, 3)]
        narrow(narrowed, hidden, keep)
        torch.testing.assert_close(narrowed(image()), silenced(image()), atol=1e-5, rtol=1e-4)
        assert sum(map(torch.numel, narrowed.parameters())) < sum(
            map(torch.numel, layer.parameters())
        )


def test_a_channel_that_goes_leaves_its_mean() -> None:
    layer = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    with torch.no_grad():
        layer[0].weight[1] = 0  # the channel is constant, 3
        layer[0].bias[1] = 3
    (hidden,) = find_hidden(layer, image())
    before = layer(image())
    narrow(layer, hidden, [0, 2, 3], torch.tensor([0.0, 3.0, 0.0, 0.0]))
    torch.testing.assert_close(layer(image()), before, atol=1e-5, rtol=1e-4)


def test_what_carries_least_goes_first() -> None:
    donor = wide_donor()
    thinner = Thinner(donor, PIXELS, "parameters")
    whole = parameters(donor)
    thinned = thinner.thin(3, lambda actual: parameters(actual) <= whole - 12 * 27)
    assert thinned is not None
    assert hidden_channels(donor) == [0, 24, 24]
    assert hidden_channels(thinned)[1] < hidden_channels(thinned)[2]
    images = torch.from_numpy(PIXELS.copy()).float()
    for actual, expected in zip(thinned(images), donor(images), strict=True):
        assert float(((actual - expected).norm() / expected.norm()).detach()) < 0.01


def test_no_more_channels_go_than_the_limit_asks_for() -> None:
    donor = wide_donor()
    thinner = Thinner(donor, PIXELS, "macs")
    most = parameters(donor.with_layers(list(donor.layers)[:2])) - 100
    thinned = thinner.thin(2, lambda actual: parameters(actual) <= most)
    assert thinned is not None
    assert len(thinned.layers) == 2
    assert most - 27 < parameters(thinned) <= most
    assert parameters(donor) == parameters(wide_donor())  # the donor itself is as it was


def test_a_tenth_of_the_channels_stays() -> None:
    donor = wide_donor()
    thinner = Thinner(donor, PIXELS, "parameters")
    assert thinner.thin(3, lambda actual: parameters(actual) < 300) is None
    least = thinner.thin(3, lambda actual: hidden_channels(actual) <= [0, 3, 3])
    assert least is not None
    assert min(hidden_channels(least)[1:]) >= LEAST_SHARE * 24


def test_channels_in_whole_blocks_stay_in_whole_blocks() -> None:
    stem, block = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 48, 1), nn.Conv2d(48, 8, 1))
    grey = Normalization((127.5,) * 3, (127.5,) * 3)
    donor = Donor(Chain("blocks", grey, (stem, block), ("a", "b"), folded=True), SIZE)
    thinner = Thinner(donor, PIXELS, "parameters")
    left = set()
    for spared in (1, 17 * 16, 17 * 17, 17 * 32):
        most = parameters(donor) - spared
        thinned = thinner.thin(2, lambda actual, most=most: parameters(actual) <= most)
        assert thinned is not None
        left.add(hidden_channels(thinned)[1])
    assert left == {16, 32}


def test_a_donor_with_nothing_hidden_is_not_thinned() -> None:
    donor = tiny_donor()
    assert Thinner(donor, PIXELS, "parameters").thin(4, lambda _: True) is None
