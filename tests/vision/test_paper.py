"""The paper's networks, to the parameter, and its choice of layers for other donors."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from graftkit.errors import BudgetError, ConfigError
from graftkit.vision.choose import PaperRootstock, paper_donor, paper_scion, reads_of_one_stage
from graftkit.vision.costs import layer_costs, module_cost
from graftkit.vision.donor import Donor
from graftkit.vision.donors import open_donor

NPZ = "data/vision/mobilenet_v2_1.0_imagenet_fp16.npz"
MIB = 2**20


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_donor_and_rootstock_have_the_parameters_of_the_paper() -> None:
    donor, rootstock = paper_donor(9), PaperRootstock(9)
    assert parameters(donor) == 16_880_201
    assert parameters(rootstock) == 1_934_665
    assert parameters(rootstock.trunk) == 1_735_488
    assert round(parameters(donor) * 4 / MIB, 3) == 64.393
    assert round(parameters(rootstock) * 4 / MIB, 3) == 7.380
    assert round(1 - parameters(rootstock) / parameters(donor), 4) == 0.8854


def test_the_rootstock_saves_far_fewer_multiplications_than_parameters() -> None:
    trunk = open_donor("vgg16", 128, pretrained=False)
    macs = [cost.macs for cost in layer_costs(trunk)]
    assert round(sum(macs) / 1e9, 2) == 5.01
    assert round(sum(macs[:7]) / 1e9, 2) == 3.05
    head = 768 * 256 + 256 * 9
    assert module_cost(PaperRootstock(9), 128).macs == sum(macs[:7]) + head


@torch.no_grad()
def test_the_rootstock_reads_the_three_convolutions_of_block_3() -> None:
    rootstock = PaperRootstock(5)
    donor = open_donor("vgg16", 32, pretrained=False)
    assert paper_scion(donor) == (7, (4, 5, 6))
    assert [donor.layer_names[i] for i in (4, 5, 6)] == [f"block3_conv{i}" for i in (1, 2, 3)]
    donor.layers[:7].load_state_dict(rootstock.trunk.state_dict())
    x = torch.rand(2, 3, 32, 32) * 255
    read = [output.mean((2, 3)) for output in donor(x)[4:7]]
    expected = rootstock.head(torch.cat(read, dim=1))
    torch.testing.assert_close(rootstock(donor.normalization.apply(x)), expected)


def test_the_donor_gives_a_score_for_every_class() -> None:
    with torch.no_grad():
        assert paper_donor(4, size=32)(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(ConfigError, match="needs 32 pixels, found 31"):
        paper_donor(4, size=31)


@pytest.mark.parametrize(
    ("limit", "scion"),
    [
        (None, (11, (8, 9, 10))),
        (534_464, (14, (11, 12, 13))),
        (534_463, (11, (8, 9, 10))),
        (10_000_000, (17, (14, 15, 16))),
        (20_000, (4, (2, 3))),
    ],
)
def test_the_choice_for_mobilenet_is_the_last_three_blocks_of_a_stage(
    limit: int | None, scion: tuple, mobilenet: Donor
) -> None:
    assert paper_scion(mobilenet, limit) == scion


def test_a_stage_may_be_read_before_its_end(mobilenet: Donor) -> None:
    reads = reads_of_one_stage(mobilenet)
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
    assert paper_scion(donor, trunk) == (5, (2, 3, 4))


def test_a_limit_that_no_stage_meets_names_the_smallest(mobilenet: Donor) -> None:
    with pytest.raises(BudgetError, match="within 800 parameters") as caught:
        paper_scion(mobilenet, 800)
    smallest = int(re.findall(r"has ([\d,]+)", str(caught.value))[0].replace(",", ""))
    assert paper_scion(mobilenet, smallest)[0] >= 1
    with pytest.raises(BudgetError):
        paper_scion(mobilenet, smallest - 1)
