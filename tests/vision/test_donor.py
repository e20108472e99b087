"""Donors of every origin: a chain that computes what the network does; bad ones are refused."""

import importlib.util
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from graftkit.errors import ConfigError, DonorError
from graftkit.vision.donor import Donor, Normalization, pool
from graftkit.vision.donors import architectures, open_donor

NPZ = "data/vision/mobilenet_v2_1.0_imagenet_fp16.npz"
SIZE = 32


def image(size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255


def tiny(family: str) -> PreTrainedModel:
    """A small model of a family, with statistics and scales that are not those of a fresh one."""
    torch.manual_seed(0)
    widths = {"hidden_sizes": [8, 12], "depths": [2, 3]}
    models = {
        "resnet": lambda: ResNetModel(
            ResNetConfig(embedding_size=8, layer_type="bottleneck", **widths)
        ),
        "mobilenet_v2": lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35)),
        "convnext": lambda: ConvNextModel(
            ConvNextConfig(num_stages=2, drop_path_rate=0.2, **widths)
        ),
        "vit": lambda: ViTModel(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=24,
                patch_size=8,
            )
        ),
    }
    model = models[family]().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.8, 1.2)
    return model


def trunk_output(model: PreTrainedModel, x: Tensor) -> Tensor:
    """The last map of a model, or its tokens before the last normalization."""
    if model.config.model_type != "vit":
        return model(x).last_hidden_state
    return model(x, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("size", [SIZE, 40])
@pytest.mark.parametrize(
    ("family", "layers"), [("resnet", 6), ("mobilenet_v2", 18), ("convnext", 6), ("vit", 3)]
)
@torch.no_grad()
def test_a_saved_model_opens_as_a_chain_that_computes_what_the_model_computes(
    family: str, layers: int, size: int, tmp_path: Path
) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    donor = open_donor(tmp_path, size)
    outputs = donor(image(size))
    assert len(outputs) == len(donor.layers) == len(set(donor.layer_names)) == layers
    expected = trunk_output(model, donor.normalization.apply(image(size)))
    torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
    assert [tuple(output.shape[1:]) for output in outputs] == list(donor.shapes)
    assert donor.channels == tuple(pool(output).shape[1] for output in outputs)
    assert not donor.folded
    assert not donor.training


def test_a_classifier_opens_without_its_head_and_stays_as_it_was() -> None:
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    )
    donor = open_donor(model, SIZE)
    assert donor.layer_names == ("embedder", "stage1.0", "stage2.0")
    assert model.training
    with torch.no_grad():
        donor.layers[0].embedder.convolution.weight.zero_()
    assert model.resnet.embedder.embedder.convolution.weight.abs().sum() > 0


def test_an_architecture_alone_has_other_values_than_the_checkpoint(tmp_path: Path) -> None:
    tiny("resnet").save_pretrained(tmp_path)
    trained, random = open_donor(tmp_path, SIZE), open_donor(tmp_path, SIZE, pretrained=False)
    assert trained.shapes == random.shapes
    assert trained.digest != random.digest
    assert trained.digest == open_donor(tmp_path, 64).digest


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3}, (127.5, 102, 76.5), 63.75),
        (
            {"image_mean": [127.5] * 3, "image_std": [64] * 3, "do_rescale": False},
            (127.5,) * 3,
            64,
        ),
        (
            {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5},
            (127.5,) * 3,
            127.5,
        ),
        ({"image_mean": [9] * 3, "image_std": [9] * 3, "do_normalize": False}, (0, 0, 0), 255),
    ],
)
def test_images_are_normalized_as_the_preprocessor_says(
    settings: dict, mean: tuple[float, ...], std: float, tmp_path: Path
) -> None:
    tiny("resnet").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    donor = open_donor(tmp_path, SIZE, pretrained=False)
    assert donor.normalization.mean == pytest.approx(mean)
    assert donor.normalization.std == pytest.approx((std,) * 3)
    assert donor.notes == ()


def test_a_normalization_that_had_to_be_assumed_is_noted(tmp_path: Path) -> None:
    tiny("resnet").save_pretrained(tmp_path)
    assert "assumed" in open_donor(tmp_path, SIZE).notes[0]
    own = Normalization((0, 0, 0), (255, 255, 255))
    donor = open_donor(tmp_path, SIZE, normalization=own)
    assert (donor.normalization, donor.notes) == (own, ())


def test_a_checkpoint_that_lacks_a_layers_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny("convnext").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.stages.1.layers.0.pwconv1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DonorError, match=r"lacks weights of layer stage2\.0"):
        open_donor(tmp_path, SIZE)


def test_a_checkpoint_without_the_pooler_is_whole_and_opens_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    ViTForImageClassification(tiny("vit").config).save_pretrained(tmp_path)
    capfd.readouterr()
    assert len(open_donor(tmp_path, 24).layers) == 3
    assert capfd.readouterr() == ("", "")


def test_a_family_that_cannot_be_cut_is_refused_with_those_that_can() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    with pytest.raises(DonorError, match="resnet, mobilenet_v2, convnext, vit"):
        open_donor(BertModel(config), SIZE)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nonsense"}'])
def test_a_directory_without_a_model_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DonorError, match="cannot be loaded") as caught:
        open_donor(tmp_path, SIZE)
    assert "\n" not in str(caught.value)


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(DonorError, match="patches of 8 pixels"):
        open_donor(tiny("vit"), 6)


@pytest.mark.slow
@given(st.integers(0, 99), st.sampled_from([(2, 3, 4, 5), (2, 6, 3)]))
@settings(max_examples=10)
def test_mean_and_spread_that_are_trained_have_the_values_and_gradients_of_their_equations(
    seed: int, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    poolings = ("std", "max", "mean")
    with torch.no_grad():
        expected = pool(x, poolings)
    torch.testing.assert_close(pool(x, poolings), expected)
    assert torch.autograd.gradcheck(lambda x: pool(x, ("mean", "std")), (x,))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_timm_donor_without_timm_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match="pip install timm"):
        open_donor("timm:resnet18", SIZE)


def test_vgg16_brings_no_weights() -> None:
    with pytest.raises(DonorError, match="pretrained=False"):
        open_donor("vgg16", SIZE)


def test_a_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one pixel"):
        open_donor("vgg16", 0, pretrained=False)


def test_a_donor_that_holds_nan_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    nn.init.constant_(net[1].bias, torch.nan)
    with pytest.raises(DonorError, match="layer 1 of Sequential holds NaN"):
        open_donor(net, SIZE)


# Pooling


@given(
    shape=st.sampled_from([(2, 3, 1, 1), (2, 3, 4, 5), (1, 1, 7, 1)]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_maps_and_their_values_as_tokens_are_pooled_alike(
    shape: tuple[int, ...], scale: float, seed: int
) -> None:
    drawn = np.random.default_rng(seed).normal(size=shape) * scale
    output = torch.from_numpy(drawn)
    pooled = pool(output, ("mean", "std", "max"))
    flat = drawn.reshape(*shape[:2], -1)
    expected = [flat.mean(2), np.sqrt(flat.var(2) + 1e-5), flat.max(2)]
    np.testing.assert_allclose(pooled.numpy(), np.concatenate(expected, axis=1), rtol=1e-9)
    tokens = output.flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool(tokens, ("mean", "std", "max")), pooled)


def test_gradients_of_the_deviation_are_finite_where_a_map_is_constant() -> None:
    output = torch.ones(1, 2, 4, 4, requires_grad=True)
    pool(output, ("std",)).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("poolings", [(), ("mean", "median")])
def test_a_pooling_of_another_name_is_refused(poolings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="mean, std, max"):
        pool(torch.zeros(1, 2, 3, 3), poolings)


# The .npz of MobileNetV2


@pytest.fixture(scope="module")
def npz_arrays() -> dict[str, np.ndarray]:
    """Names and shapes of the file with random values."""
    generator = np.random.default_rng(0)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in architectures._named_parameters(architectures._layers(SIZE))
    }
    shapes |= {"fc.weight": (1001, 1280), "fc.bias": (1001,)}
    return {
        name: (generator.standard_normal(shape, np.float32) * 0.05).astype(np.float16)
        for name, shape in shapes.items()
    }


def reference_network(arrays: dict[str, np.ndarray]) -> MobileNetV2Model:
    """The same network of transformers: normalization that does nothing but add the bias."""
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=True)).eval()
    units = [part for part in model.modules() if hasattr(part, "convolution")]
    names = [name for name in arrays if name.endswith("conv.weight")]
    for unit, name in zip(units, names, strict=True):
        unit.convolution.weight.data.copy_(torch.from_numpy(arrays[name]))
        norm = unit.normalization
        norm.eps = 0.0
        norm.bias.data.copy_(torch.from_numpy(arrays[name.replace("weight", "bias")]))
    return model


@pytest.mark.parametrize("size", [64, 50])
@torch.no_grad()
def test_the_npz_network_is_mobilenet_v2_with_the_padding_of_tensorflow(
    size: int, npz_arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.savez(tmp_path / "net.npz", **npz_arrays)
    donor = open_donor(tmp_path / "net.npz", size)
    assert (donor.folded, len(donor.layers), donor.name) == (True, 19, "net")
    x = image(size)
    result = reference_network(npz_arrays)(x / 127.5 - 1, output_hidden_states=True)
    ours = donor(x)
    # The first two layers of the file are the stem there, which is not among the hidden states.
    for output, expected in zip(ours[2:-1], result.hidden_states, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[-1], result.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_the_shared_donor_opens_and_its_values_are_those_of_the_file(shared: Path) -> None:
    donor = open_donor(shared / NPZ, 64)
    with np.load(shared / NPZ) as archive:
        stem = archive["f.0.conv.weight"]
    np.testing.assert_array_equal(donor.layers[0][1].weight.detach().numpy(), stem)
    assert donor.notes == ()
    random = open_donor(shared / NPZ, 64, pretrained=False)
    assert random.digest != donor.digest


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "cannot be read"),
        ("text", "cannot be read"),
        ("truncated", "cannot be read"),
        ("short array", "cannot be read"),
        ("lacks", r"lacks f\.7\.b\.2\.conv\.bias"),
        ("extra", "also holds g.0"),
        ("shape", r"f\.0\.conv\.bias is float16 \(31,\)"),
        ("dtype", r"f\.0\.conv\.bias is float32"),
        ("huge", r"f\.0\.conv\.bias is float16 \(1000000000000,\)"),
        ("nan", "holds NaN"),
        ("pickle", "f.0.conv.bias is object"),
    ],
)
def test_a_damaged_or_hostile_npz_is_refused(
    damage: str, message: str, npz_arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "net.npz"
    arrays = dict(npz_arrays)
    bias = arrays["f.0.conv.bias"]
    changed = {
        "lacks": lambda: arrays.pop("f.7.b.2.conv.bias"),
        "extra": lambda: arrays.update({"g.0": bias}),
        "shape": lambda: arrays.update({"f.0.conv.bias": bias[:-1]}),
        "dtype": lambda: arrays.update({"f.0.conv.bias": bias.astype(np.float32)}),
        "nan": lambda: arrays.update({"f.0.conv.bias": bias * np.nan}),
    }
    if damage in changed:
        changed[damage]()
    if damage in ("pickle", "huge", "short array"):
        del arrays["f.0.conv.bias"]
    np.savez(path, **arrays)
    write_special(path, damage, tmp_path / "touched")
    with pytest.raises(DonorError, match=message):
        open_donor(path, SIZE)
    assert not (tmp_path / "touched").exists()


def write_special(path: Path, damage: str, touched: Path) -> None:
    """Damage that numpy does not write by itself."""
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage in ("pickle", "huge", "short array"):
        shape = {"huge": (10**12,), "short array": (32,), "pickle": ()}[damage]
        descr = "|O" if damage == "pickle" else "<f2"
        with zipfile.ZipFile(path, "a") as archive, archive.open("f.0.conv.bias.npy", "w") as file:
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(pickle.dumps(Evil(touched)) if damage == "pickle" else b"\0" * 4)


def test_donors_are_told_apart_by_one_value() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    first: Donor = open_donor(net, SIZE)
    assert first.digest == open_donor(net, SIZE).digest
    net[1].running_mean[2] += 1
    assert first.digest != open_donor(net, SIZE).digest
