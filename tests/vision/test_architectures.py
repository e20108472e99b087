"""Any torch module as a donor: where it is cut, and why it is not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graftkit.errors import DonorError
from graftkit.vision.donors import open_donor

SIZE = 16


def image(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 255


class Block(nn.Module):
    """A residual block, with squeeze and excitation."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.gate = nn.Linear(width, width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.norm(self.conv1(x))))
        out = out * self.gate(out.mean((2, 3))).sigmoid()[:, :, None, None]
        out += x
        return self.relu(out)


class Shuffle(nn.Module):
    """Splits its channels: between the halves no single tensor passes."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return torch.cat((left, self.conv(right)), dim=1)


class Residual(nn.Module):
    """As classifiers are mostly written, with an argument that has a default."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.offset = nn.Parameter(torch.rand(8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def trunk(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2) + self.offset
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        x = self.trunk(x)
        if features:
            return x
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Patches(nn.Module):
    """A transformer on patches: attention and MLP are two residual branches of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.rand(1, 1, 8))
        self.positions = nn.Parameter(torch.rand(1, 17, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return x + self.mlp(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)[:, 0])


def residual(seed: int, kinds: tuple[type, ...]) -> Residual:
    torch.manual_seed(seed)
    return Residual([kind(8) for kind in kinds]).eval()


@pytest.mark.slow
@given(
    kinds=st.lists(st.sampled_from([Block, Shuffle]), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
@settings(max_examples=12, deadline=None)
def test_the_layers_of_a_traced_network_compute_its_trunk(kinds: list[type], seed: int) -> None:
    net = residual(seed, tuple(kinds))
    donor = open_donor(net, SIZE)
    with torch.no_grad():
        outputs = donor(image(seed))
        expected = net.trunk(donor.normalization.apply(image(seed)))
    # The stem, the offset with the pooling before it, and the blocks.
    assert len(outputs) == len(kinds) + 2
    torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=0)


def test_the_layers_of_a_traced_transformer_compute_its_trunk() -> None:
    torch.manual_seed(0)
    net = Patches().eval()
    donor = open_donor(net, SIZE)
    with torch.no_grad():
        outputs = donor(image())
        expected = net.trunk(donor.normalization.apply(image()))
    torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=0)
    assert donor.shapes[0] == (8, 4, 4)
    assert donor.shapes[-1] == (17, 8)


class AskingItsSize(nn.Module):
    """A dense layer over the whole map, written as a convolution that looks at the map first."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(8, 16, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) if x.shape[-1] >= SIZE else x


class Asking(nn.Module):
    """A part that cannot be traced between two that can, and another one in the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Sized(), Block(8))
        self.classifier = AskingItsSize()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


class Sized(nn.Module):
    """A convolution, and a pooling where the map is large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2) if x.shape[-1] > 64 else self.conv(x)


def test_a_part_that_cannot_be_traced_is_one_layer_and_the_classifier_is_none() -> None:
    torch.manual_seed(0)
    net = Asking().eval()
    donor = open_donor(net, SIZE)
    with torch.no_grad():
        outputs = donor(image())
        expected = net.features(donor.normalization.apply(image()))
    assert donor.layer_names[:2] == ("features.0", "features.1")
    assert donor.shapes[-1] == (8, SIZE, SIZE)
    torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=0)


def test_an_early_output_is_not_changed_by_the_layers_behind_it() -> None:
    donor = open_donor(residual(0, (Block, Block)), SIZE)
    x = donor.normalization.apply(image())
    with torch.no_grad():
        outputs = donor(image())
        for layer, output in zip(donor.layers, outputs, strict=True):
            x = layer(x.clone())
            torch.testing.assert_close(output, x, rtol=0, atol=0)


def stages() -> nn.Sequential:
    features = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3), nn.PReLU(), nn.Dropout(0.5)),
        Block(6),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(features, classifier)


def test_a_sequential_is_cut_behind_activations_and_before_pooling() -> None:
    donor = open_donor(stages(), SIZE)
    kinds = [[type(part).__name__ for part in layer.children()] for layer in donor.layers[:2]]
    assert kinds == [
        ["BatchNorm2d", "Conv2d", "BatchNorm2d", "ReLU"],
        ["MaxPool2d", "ZeroPad2d", "Conv2d", "PReLU", "Dropout"],
    ]
    assert donor.layer_names == ("0.1", "0.5.1", "0.6")
    assert donor.shapes == ((4, 16, 16), (6, 8, 8), (6, 8, 8))


def test_a_sequential_computes_its_trunk() -> None:
    net = stages().eval()
    donor = open_donor(net, SIZE)
    with torch.no_grad():
        expected = net[0][:-1](donor.normalization.apply(image()))
        torch.testing.assert_close(donor(image())[-1], expected, rtol=0, atol=0)


def test_a_sequential_with_a_forward_of_its_own_is_one_unit() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3))
    donor = open_donor(net, SIZE)
    with torch.no_grad():
        expected = net(donor.normalization.apply(image()))
        torch.testing.assert_close(donor(image())[-1], expected, rtol=0, atol=0)
    assert donor.layer_names == ("0", "1")


def test_the_normalization_of_timm_is_read_from_the_module() -> None:
    net = stages()
    net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    donor = open_donor(net, SIZE)
    assert donor.normalization.mean == pytest.approx((127.5,) * 3)
    assert donor.normalization.std == pytest.approx((63.75,) * 3)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Dense(nn.Module):
    """Every layer reads all those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((x, self.first(x)), 1)
        return torch.cat((x, self.second(y)), 1)


class Overwriting(nn.Module):
    """A layer that writes into its input, without a module that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mul_(2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "control flow on data": (Branching, "cannot be traced.*control flow"),
    "dense connections": (Dense, "Dense has 1 layers"),
    "one convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "has 1 layers"),
    "no weights": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), "has 0 layers"),
    "no module": (lambda: nn.Sequential(), "has 0 layers"),
    "a classifier alone": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 9)), "has 0 layers"),
    "other images": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)),
        r"layer 0 does not take an input of \(1, 3, 16, 16\)",
    ),
    "too small": (lambda: residual(0, (nn.MaxPool2d,)), "does not take an image"),
    "in-place": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Overwriting()), "overwritten"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_module_that_cannot_be_cut_is_refused(make: Callable, message: str) -> None:
    with pytest.raises(DonorError, match=message) as caught:
        open_donor(make(), SIZE)
    assert "\n" not in str(caught.value)
