"""Costs against numbers worked out by hand."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from graftkit.vision.donors import open_donor
from graftkit.vision.evaluate import Cost, layer_costs, median_ms, module_cost

NPZ = "data/vision/mobilenet_v2_1.0_imagenet_fp16.npz"


def test_convolutions_and_dense_layers_are_counted_as_by_hand() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        depthwise,
        nn.Flatten(),
        nn.Linear(8 * 25, 7),
    )
    assert module_cost(net, 10) == Cost(
        parameters=3 * 8 * 9 + 16 + (72 + 8) + (8 * 25 * 7 + 7),
        macs=25 * 3 * 8 * 9 + 25 * 8 * 9 + 8 * 25 * 7,
    )


def test_attention_is_counted() -> None:
    tokens, width, wide = 10, 16, 24  # nine patches of 8 pixels and the class token
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=wide,
        image_size=24,
        patch_size=8,
    )
    embeddings, *blocks = layer_costs(open_donor(ViTModel(config), 24))
    assert embeddings.macs == 9 * 3 * 64 * width
    by_hand = tokens * (4 * width * width + 2 * width * wide) + 2 * tokens * tokens * width
    assert [block.macs for block in blocks] == [by_hand] * 2


def test_the_layers_of_a_donor_add_up_to_the_whole() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3))
    costs = layer_costs(open_donor(net, 12))
    assert [cost.parameters for cost in costs] == [112, 185]
    assert sum(cost.macs for cost in costs) == module_cost(net, 12).macs


@pytest.mark.parametrize(
    ("cut", "parameters", "mega_macs"),
    [(8, 74_336, 39.5), (11, 234_656, 49.6), (14, 534_464, 68.5), (19, 2_206_816, 97.8)],
)
def test_cuts_of_mobilenet_cost_what_is_known(
    cut: int, parameters: int, mega_macs: float, mobilenet: tuple[Cost, ...]
) -> None:
    assert sum(cost.parameters for cost in mobilenet[:cut]) == parameters
    macs = list(accumulate(cost.macs for cost in mobilenet))[cut - 1]
    assert round(macs / 1e6, 1) == mega_macs


@pytest.fixture(scope="module")
def mobilenet(shared: Path) -> tuple[Cost, ...]:
    return layer_costs(open_donor(shared / NPZ, 128))


def test_counting_leaves_a_module_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[1].eval()
    before = net[1].running_mean.clone()
    module_cost(net, 8)
    assert [part.training for part in net.modules()] == [True, True, False]
    torch.testing.assert_close(net[1].running_mean, before)


def test_the_median_of_few_slow_runs_is_that_of_the_quick_ones() -> None:
    calls = []

    def run() -> None:
        calls.append(0)
        if len(calls) == 8:
            torch.rand(400, 400) @ torch.rand(400, 400)

    p50, p95 = median_ms(run, repeats=5)
    assert len(calls) == 8  # three of them before the clock starts
    assert 0 < p50 < p95
