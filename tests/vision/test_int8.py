"""int8 against float32, both in onnxruntime, on a small network with what makes int8 hard."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from graftkit.errors import OutputError, RootstockError
from graftkit.vision.evaluate import inference_rss_bytes, parity
from graftkit.vision.export import dense_codes, export_onnx, quantize_onnx, safe_ranges
from graftkit.vision.predict import Predictor

SIZE = 24
CLASSES = tuple("abcd")


class WideNet(nn.Module):
    """Channels of very different size, one that never changes, and a head that evens them out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 24, 1)
        self.head = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, len(CLASSES)))
        with torch.no_grad():
            self.stem.weight *= torch.logspace(-0.7, 0.7, 24).view(-1, 1, 1, 1)
            self.stem.weight[0], self.stem.bias[0] = 0, -1.0

    def features(self, x: Tensor) -> Tensor:
        first = self.stem((x - 127.5) / 127.5).clamp(0, 6)
        second = first + self.project(self.depthwise(first).clamp(0, 6))
        return torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def pictures(count: int, seed: int) -> np.ndarray:
    """Blocks of colour: neighbouring pixels agree, as in photographs."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 3, SIZE // 8, SIZE // 8))
    return blocks.repeat(8, 2).repeat(8, 3).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    net = WideNet().eval()
    with torch.no_grad():
        inputs = net.features(torch.from_numpy(pictures(64, 0)).float())
        spread = inputs.std(0).clamp(min=1e-3)  # small features get large weights
        first = net.head[0]
        first.weight /= spread
        first.bias -= first.weight @ inputs.mean(0)
    folder = tmp_path_factory.mktemp("int8")
    fp32, int8 = folder / "rootstock.onnx", folder / "rootstock.int8.onnx"
    export_onnx(net, fp32, SIZE, CLASSES, "wide")
    assert quantize_onnx(fp32, int8, pictures(48, 1)) == int8.stat().st_size
    return fp32, int8


def test_int8_agrees_with_float32_on_images_it_was_not_calibrated_on(
    files: tuple[Path, Path],
) -> None:
    pixels = pictures(100, 2)
    labels = Predictor.open(files[0]).logits(pixels).argmax(1)
    actual = parity(*files, pixels, labels)
    assert actual.accuracy_fp32 == 1.0
    assert actual.accuracy_int8 == actual.agreement
    # With a head in integers 0.54 and 0.48; with biases that are not corrected 0.98 and 0.041.
    assert actual.agreement >= 0.97
    assert 0 < actual.relative_error < 0.035
    assert actual.max_difference > 0


def test_the_mean_logits_of_the_calibration_images_are_those_of_float32(
    files: tuple[Path, Path],
) -> None:
    expected, actual = (Predictor.open(file).logits(pictures(48, 1)) for file in files)
    assert np.abs(actual - expected).max() > 1e-2
    np.testing.assert_allclose(actual.mean(0), expected.mean(0), atol=1e-5)


def test_a_file_is_at_parity_with_itself(files: tuple[Path, Path]) -> None:
    pixels = pictures(20, 3)
    actual = parity(files[0], files[0], pixels, np.zeros(20, np.int64))
    assert (actual.agreement, actual.max_difference, actual.relative_error) == (1.0, 0.0, 0.0)


def test_weights_are_stored_in_eight_bits_and_biases_in_float(files: tuple[Path, Path]) -> None:
    values = onnx.load(files[1]).graph.initializer
    floats = [numpy_helper.to_array(value) for value in values if value.data_type == 1]
    assert max(value.ndim for value in floats if value.size > 3) == 1
    codes = [value for value in values if value.data_type == onnx.TensorProto.INT8]
    shapes = sorted(tuple(value.dims) for value in codes if len(value.dims) > 1)
    assert shapes == [(4, 64), (24, 1, 3, 3), (24, 3, 3, 3), (24, 24, 1, 1), (64, 48)]


def test_neighbouring_codes_of_a_convolution_never_overflow_in_pairs(
    files: tuple[Path, Path],
) -> None:
    values = onnx.load(files[1]).graph.initializer
    codes = [numpy_helper.to_array(value).astype(int) for value in values if len(value.dims) == 4]
    mixing = [each for each in codes if each.shape[1] > 1]
    assert len(mixing) == 2
    for each in mixing:
        for rows in (each.reshape(24, -1), np.moveaxis(each, 1, -1).reshape(24, -1)):
            assert np.abs(rows[:, :-1] + rows[:, 1:]).max() <= 128


def test_integer_kernels_answer_as_the_same_numbers_in_float_do(files: tuple[Path, Path]) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(files[1], options, providers=["CPUExecutionProvider"])
    pixels = pictures(60, 4)
    (expected,) = plain.run(["logits"], {"image": pixels.astype(np.float32)})
    actual = Predictor.open(files[1]).logits(pixels)
    # Where pairs overflow, on a processor without VNNI, 0.37 of the norm.
    assert np.linalg.norm(actual - expected) < 0.01 * np.linalg.norm(expected)


def test_the_head_computes_on_float_features(files: tuple[Path, Path]) -> None:
    graph = onnx.load(files[1]).graph
    maker = {name: node.op_type for node in graph.node for name in node.output}
    dense = [node for node in graph.node if node.op_type == "Gemm"]
    assert [maker[node.input[0]] for node in dense] == ["Concat", "Relu"]
    assert [maker[node.input[1]] for node in dense] == ["DequantizeLinear"] * 2


def test_int8_keeps_classes_and_size_and_opens_as_a_rootstock(files: tuple[Path, Path]) -> None:
    predictor = Predictor.open(files[1])
    assert (predictor.classes, predictor.size) == (CLASSES, SIZE)
    metadata = {entry.key: entry.value for entry in onnx.load(files[1]).metadata_props}
    assert metadata["precision"] == "int8"
    assert predictor.bytes < 0.6 * files[0].stat().st_size  # a network this small is half graph


def test_the_same_images_give_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    quantize_onnx(files[0], again, pictures(48, 1))
    assert again.read_bytes() == files[1].read_bytes()


def test_quantizing_prints_nothing(
    files: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantize_onnx(files[0], tmp_path / "quiet.onnx", pictures(8, 1))
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_network_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(OutputError, match="cannot be quantized"):
        quantize_onnx(tmp_path / "broken.onnx", tmp_path / "int8.onnx", pictures(4, 0))
    assert [file.name for file in tmp_path.iterdir()] == ["broken.onnx"]


@pytest.mark.slow
def test_inference_needs_no_torch_and_little_memory(files: tuple[Path, Path]) -> None:
    # torch alone holds more than this.
    assert 20e6 < inference_rss_bytes(files[1]) < 150e6


@pytest.mark.slow
def test_memory_of_a_file_that_is_no_rootstock_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(RootstockError, match="no such file"):
        inference_rss_bytes(tmp_path / "missing.onnx")


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0, 1]),
    st.floats(-6, 6),
)
def test_a_stored_weight_is_at_most_half_a_step_off(
    seed: int, rows: int, columns: int, axis: int, magnitude: float
) -> None:
    drawn = np.random.default_rng(seed).normal(size=(rows, columns)) * 10**magnitude
    weight = drawn.astype(np.float32)
    weight.flat[0] = 0.0
    codes, scale = dense_codes(weight, axis)
    assert codes.dtype == np.int8
    assert scale.shape == (weight.shape[axis],)
    step = np.expand_dims(scale, 1 - axis)
    assert (np.abs(codes * step - weight) <= 0.5001 * step).all()
    assert np.abs(codes.astype(int)).max(initial=0) <= 127


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.floats(-4, 4))
def test_codes_in_a_safe_range_add_up_to_at_most_128_and_none_is_coarser_than_needed(
    seed: int, rows: int, columns: int, magnitude: float
) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, columns)) * 10**magnitude
    ranges = safe_ranges(weight)
    codes = np.round(127 * weight / ranges[:, None]).astype(int)
    pairs = np.abs(codes[:, :-1] + codes[:, 1:]).max(1, initial=0)
    assert (255 * pairs < 2**15).all()
    assert ((np.abs(codes).max(1) == 127) | (pairs >= 127)).all()


def test_weights_of_every_order_in_which_a_kernel_may_read_them_count() -> None:
    weight = np.array([[1.0, 0.0, 1.0, 0.0]])
    assert safe_ranges(weight) == 1
    assert safe_ranges(weight, weight[:, [0, 2, 1, 3]]) > 1.9
