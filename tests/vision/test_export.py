"""What leaves as ONNX answers as the module does, and holds no more than a runtime reads."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from graftkit.errors import OutputError
from graftkit.vision import export
from graftkit.vision.export import export_onnx

SIZE = 16
CLASSES = ("<b>weed</b>", "Löwenzahn", "麦")


class SmallNet(nn.Module):
    """As a rootstock of MobileNetV2: TensorFlow's padding, ReLU6, a residual, pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(
            nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, len(CLASSES))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 127.5) / 127.5
        first = self.norm(self.stem(pad(x, (0, 1, 0, 1)))).clamp(0, 6)
        second = first + self.project(self.depthwise(first).clamp(0, 6))
        logits: Tensor = self.head(torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1))
        return logits


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    net = SmallNet()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture(scope="module")
def file(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "rootstock.onnx"
    size = export_onnx(module, path, SIZE, CLASSES, "small <net>")
    assert size == path.stat().st_size
    return path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_file_answers_as_the_module_for_any_number_of_images(
    module: nn.Module, file: Path, count: int
) -> None:
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    actual = session.run(["logits"], {"image": images(count)})[0]
    with torch.no_grad():
        expected = module(torch.from_numpy(images(count))).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_the_file_says_what_it_is(file: Path) -> None:
    model = onnx.load(file)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["graftkit_format"] == "rootstock"
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert (metadata["size"], metadata["donor"], metadata["precision"]) == (
        "16",
        "small <net>",
        "float32",
    )
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_value or side.dim_param for side in shape] == ["batch", 3, SIZE, SIZE]


def test_padding_and_batch_normalization_are_folded_into_the_convolutions(file: Path) -> None:
    nodes = onnx.load(file).graph.node
    assert {"Pad", "BatchNormalization", "Constant", "Dropout"}.isdisjoint(
        node.op_type for node in nodes
    )
    stem = next(node for node in nodes if node.op_type == "Conv")
    pads = next(given.ints for given in stem.attribute if given.name == "pads")
    assert list(pads) == [0, 0, 1, 1]


def test_the_graph_costs_two_kilobytes_beside_the_weights(module: nn.Module, file: Path) -> None:
    weights = 4 * sum(values.numel() for values in module.parameters())
    assert file.stat().st_size - weights < 2000


def test_the_file_holds_no_path_and_no_trace_of_the_code(file: Path) -> None:
    content = file.read_bytes()
    assert not re.search(rb"\.py|forward|aten|stack_trace|SmallNet", content)
    assert list(file.parent.iterdir()) == [file]  # no data in a file of its own, nothing left over


@pytest.mark.slow
def test_a_module_in_training_gives_the_same_bytes_and_stays_in_training(
    module: nn.Module, file: Path, tmp_path: Path
) -> None:
    module.train()
    try:
        export_onnx(module, tmp_path / "training.onnx", SIZE, CLASSES, "small <net>")
        assert module.training
    finally:
        module.eval()
    assert (tmp_path / "training.onnx").read_bytes() == file.read_bytes()


class TinyNet(nn.Module):
    """As little as an exporter takes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Undecided(nn.Module):
    """Depends on the values of the image, which a graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if bool(x.sum() > 0) else x.amax((2, 3))


@pytest.mark.slow
def test_a_network_that_has_no_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written as ONNX") as refused:
        export_onnx(Undecided(), tmp_path / "odd.onnx", SIZE, CLASSES, "odd")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(OutputError, match="answers otherwise"):
        export_onnx(TinyNet(), tmp_path / "rootstock.onnx", SIZE, CLASSES, "tiny")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_reported(file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        export.write_model(onnx.load(file), tmp_path / "nowhere" / "rootstock.onnx")
