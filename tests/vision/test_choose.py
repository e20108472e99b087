"""Which scion a budget gets, and the choice of the paper for any donor."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel
from vision.tiny_networks import tiny_donor

from graftkit.errors import BudgetError
from graftkit.vision.choose import (
    CostBudget,
    ScionChoice,
    cut_candidates,
    layers_of_one_stage,
    paper_layers,
    probe_cuts,
)
from graftkit.vision.donor import Donor, pool
from graftkit.vision.donors import open_donor
from graftkit.vision.donors.architectures import vgg16_chain
from graftkit.vision.evaluate import layer_costs, module_cost
from graftkit.vision.probe import FeatureTable
from graftkit.vision.rootstock import Scion


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("0.6MB", "bytes", 600_000),
        ("500KiB", "bytes", 512_000),
        (" 12 b ", "bytes", 12),
        ("1gib", "bytes", 2**30),
        ("2ms", "ms", 2),
        ("0.5 MS", "ms", 0.5),
        ("20MMAC", "macs", 20_000_000),
        ("1.5GMAC", "macs", 1_500_000_000),
        ("7mac", "macs", 7),
    ],
)
def test_bytes_milliseconds_and_multiply_accumulates_are_understood(
    text: str, kind: str, amount: float
) -> None:
    budget = CostBudget.parse(text)
    assert (budget.kind, budget.amount, budget.text) == (kind, amount, text.strip())


@pytest.mark.parametrize(
    "text", ["", "MB", "0.6", "5%", "1bpp", "-1MB", "1e3MB", "2s", "20MACs", ".5MB", "nanMB", "٣MB"]
)
def test_anything_else_is_refused_with_what_would_be_understood(text: str) -> None:
    with pytest.raises(BudgetError, match=r"0\.6MB.*2ms.*20MMAC"):
        CostBudget.parse(text)


@pytest.mark.parametrize(("text", "fault"), [("0.0MB", "zero"), ("9" * 400 + "ms", "infinite")])
def test_an_amount_that_bounds_nothing_is_refused(text: str, fault: str) -> None:
    with pytest.raises(BudgetError, match=fault):
        CostBudget.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_positive_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = CostBudget.parse(text)
    except BudgetError:
        return
    assert budget.amount > 0


WIDTHS = (4, 4, 8)  # two poolings of 2, 2 and 4 channels


@pytest.fixture
def table() -> FeatureTable:
    """Layer 0 says nothing, layer 1 half, and of layer 2 features 9 and 10 say all."""
    draws = np.random.default_rng(0)
    labels = np.arange(240) % 4
    values = draws.normal(0, 1, (240, 16)).astype(np.float16)
    values[:, 5] += 6 * (labels // 2)
    values[:, 9] += 6 * (labels // 2)
    values[:, 10] += 6 * (labels % 2)
    splits = np.repeat(np.array([0, 1, 2], np.int8), [120, 60, 60])
    return FeatureTable(WIDTHS, {0: values}, splits, labels)


def fits(most: int) -> Callable[[Scion], bool]:
    """A cost for every layer, and one for every feature."""
    return lambda scion: 100 * scion.cut + scion.features <= most


def best_choice(table: FeatureTable, fits: Callable[[Scion], bool]) -> ScionChoice | None:
    """The best candidate of a donor with this table."""
    probes = probe_cuts(table, lambda *_: None)
    candidates = cut_candidates(tiny_donor(), table, probes, fits)
    return max(candidates, key=lambda choice: choice.rank, default=None)


def test_a_scion_reads_the_columns_it_was_made_of(table: FeatureTable) -> None:
    columns = np.array([1, 5, 7, 9])
    scion = table.scion(columns)
    assert scion == Scion(3, {0: (1,), 1: (1, 3), 2: (1,)}, ("mean", "std"))
    np.testing.assert_array_equal(table.columns_of(scion), columns)


def test_columns_of_a_pooling_are_the_halves_of_a_layer(table: FeatureTable) -> None:
    assert table.columns([2], ["mean"]).tolist() == [8, 9, 10, 11]
    assert table.columns([0, 2], ["std"]).tolist() == [2, 3, 12, 13, 14, 15]


def test_without_a_limit_the_best_cut_is_taken_whole(table: FeatureTable) -> None:
    choice = best_choice(table, fits(10_000))
    assert choice is not None
    assert (choice.scion.cut, choice.rule) == (3, "all")


def test_a_cut_that_does_not_fit_whole_keeps_the_features_that_matter(table: FeatureTable) -> None:
    choice = best_choice(table, fits(302))
    assert choice is not None
    assert choice.rule in ("l2", "taylor")
    assert 2 in choice.scion.channels[2]
    assert choice.scion.features == 2
    assert choice.probe.val_accuracy > 0.9


def test_a_trunk_that_does_not_fit_is_left_for_a_shallower_one(table: FeatureTable) -> None:
    choice = best_choice(table, fits(208))
    assert choice is not None
    assert choice.scion.cut == 2


def test_where_nothing_fits_nothing_is_chosen(table: FeatureTable) -> None:
    assert best_choice(table, fits(100)) is None


@pytest.mark.parametrize("most", [101, 105, 150, 203, 301, 305, 400])
def test_a_choice_keeps_its_limit(table: FeatureTable, most: int) -> None:
    choice = best_choice(table, fits(most))
    assert choice is not None
    assert fits(most)(choice.scion)


HIDDEN = 256  # units of the paper's dense layers
READ = (4, 5, 6)  # the convolutions of VGG16's third block


class PaperRootstock(nn.Module):
    """The rootstock of the Knowledge Grafting paper (arXiv 2507.19261), as far as its abstract and
    its number of parameters tell: VGG16 up to block 3, global averages, two dense layers."""

    def __init__(self, classes: int):
        super().__init__()
        self.trunk = nn.ModuleList(vgg16_chain(pretrained=False).layers[: max(READ) + 1])
        self.head = nn.Sequential(
            nn.Linear(256 * len(READ), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of normalized images (n, 3, size, size)."""
        averages = []
        for index, layer in enumerate(self.trunk):
            x = layer(x)
            if index in READ:
                averages.append(pool(x))
        logits: Tensor = self.head(torch.cat(averages, dim=1))
        return logits


def paper_donor(classes: int, size: int = 128) -> nn.Sequential:
    """The donor of the paper: VGG16, its map flattened, and three dense layers."""
    side = size // 32
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512 * side * side, HIDDEN), nn.ReLU()]
    head += [nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)]
    return nn.Sequential(*vgg16_chain(pretrained=False).layers, *head)


NPZ = "data/vision/mobilenet_v2_1.0_imagenet_fp16.npz"
MIB = 2**20


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_donor_and_rootstock_have_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):  # shapes without values
        donor, rootstock = paper_donor(9), PaperRootstock(9)
    assert parameters(donor) == 16_880_201
    assert parameters(rootstock) == 1_934_665
    assert parameters(rootstock.trunk) == 1_735_488
    assert round(parameters(donor) * 4 / MIB, 3) == 64.393
    assert round(parameters(rootstock) * 4 / MIB, 3) == 7.380
    assert round(1 - parameters(rootstock) / parameters(donor), 4) == 0.8854


@pytest.mark.slow
def test_the_rootstock_saves_far_fewer_multiplications_than_parameters() -> None:
    trunk = open_donor("vgg16", 128, pretrained=False)
    macs = [cost.macs for cost in layer_costs(trunk)]
    assert round(sum(macs) / 1e9, 2) == 5.01
    assert round(sum(macs[:7]) / 1e9, 2) == 3.05
    head = 768 * 256 + 256 * 9
    assert module_cost(PaperRootstock(9), 128).macs == sum(macs[:7]) + head


@pytest.mark.slow
@torch.no_grad()
def test_the_rootstock_reads_the_three_convolutions_of_block_3() -> None:
    rootstock = PaperRootstock(5)
    donor = open_donor("vgg16", 32, pretrained=False)
    share = sum(cost.parameters for cost in layer_costs(donor)) / 8  # 0.118 in the paper
    assert paper_layers(donor, [share]) == [(4, 5, 6)]
    assert [donor.layer_names[i] for i in (4, 5, 6)] == [f"block3_conv{i}" for i in (1, 2, 3)]
    donor.layers[:7].load_state_dict(rootstock.trunk.state_dict())
    x = torch.rand(2, 3, 32, 32) * 255
    read = [output.mean((2, 3)) for output in donor(x)[4:7]]
    expected = rootstock.head(torch.cat(read, dim=1))
    torch.testing.assert_close(rootstock(donor.normalization.apply(x)), expected)


def test_the_donor_gives_a_score_for_every_class() -> None:
    with torch.device("meta"), torch.no_grad():
        assert paper_donor(4, size=32)(torch.rand(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize(
    ("limit", "layers"),
    [
        (534_464, (11, 12, 13)),
        (534_463, (8, 9, 10)),
        (10_000_000, (14, 15, 16)),
        (20_000, (2, 3)),
    ],
)
def test_the_choice_for_mobilenet_is_the_last_three_blocks_of_a_stage(
    limit: int, layers: tuple, mobilenet: Donor
) -> None:
    assert paper_layers(mobilenet, [limit]) == [layers]


def test_the_choice_for_mobilenet_at_the_share_of_the_paper(mobilenet: Donor) -> None:
    share = sum(cost.parameters for cost in layer_costs(mobilenet)) / 8
    assert paper_layers(mobilenet, [share]) == [(8, 9, 10)]


def test_a_stage_may_be_read_before_its_end(mobilenet: Donor) -> None:
    reads = layers_of_one_stage(mobilenet)
    assert len(reads) == len(mobilenet.layers)
    assert (reads[7], reads[8], reads[10]) == ((7,), (7, 8), (8, 9, 10))


@pytest.fixture(scope="module")
def mobilenet(shared: Path) -> Donor:
    return open_donor(shared / NPZ, 32)


def test_of_tokens_any_three_layers_in_a_row_will_do() -> None:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=5,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    donor = open_donor(ViTModel(config), 16)
    trunk = sum(cost.parameters for cost in layer_costs(donor)[:5])
    assert paper_layers(donor, [trunk]) == [(2, 3, 4)]


def test_a_limit_that_no_stage_meets_gives_no_layers(mobilenet: Donor) -> None:
    first = layer_costs(mobilenet)[0].parameters  # the first stage is one layer
    assert paper_layers(mobilenet, [800, first - 1, first]) == [None, None, (0,)]
