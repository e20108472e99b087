"""Channels nobody reads: they go, and what is read stays the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graftkit.vision.donors import open_donor
from graftkit.vision.donors.architectures import InvertedResidual, _block
from graftkit.vision.thinning import drop_dead_channels

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
    kept = sorted(chosen)
    pruned = drop_dead_channels((first, last), kept)
    assert pruned.dropped == width - len(kept)
    assert pruned.layers[0] is first
    after = pruned.layers[1](first(x))
    torch.testing.assert_close(after, before[:, kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last(first(x)), before, rtol=0, atol=0)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (pruned.layers[1], last)]
    assert sizes[0] < sizes[1]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


@pytest.mark.parametrize(
    ("layer", "kept", "reason"),
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
    layer: nn.Module, kept: list[int], reason: str
) -> None:
    pruned = drop_dead_channels([layer], kept)
    assert pruned.layers == (layer,)
    assert pruned.dropped == 0
    assert reason in pruned.reason


def test_a_pruned_layer_still_learns() -> None:
    donor = open_donor(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()), 8)
    pruned = drop_dead_channels(tuple(donor.layers), [1, 3]).layers[-1]
    pruned(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_a_skip_passes_on_the_kept_channels_only() -> None:
    block = _block(WIDTH, WIDTH, 1, 1, 8)
    nn.init.zeros_(block.body[-1].weight)
    nn.init.zeros_(block.body[-1].bias)
    pruned = drop_dead_channels([block], [4, 5]).layers[0]
    assert isinstance(pruned, InvertedResidual)
    x = torch.randn(1, WIDTH, 8, 8)
    torch.testing.assert_close(pruned(x), x[:, 4:])
