"""Classifying with an ONNX file: the predictor, and `graftkit vision predict`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result
from vision.pictures import CLASSES, encoded, picture, write_pictures

from graftkit.cli.vision import app
from graftkit.errors import ConfigError, GraftError, ImagesError, RootstockError
from graftkit.vision.images import Skipped
from graftkit.vision.predict import Arrivals, Prediction, Predictor, find_images, softmax

SIZE = 16
METADATA = {
    "graftkit_format": "rootstock",
    "graftkit_version": "0.1.0",
    "classes": json.dumps(CLASSES),
    "size": str(SIZE),
    "donor": "tiny",
    "precision": "float32",
}
RUN = "from graftkit.cli.vision import app; app()"


def rootstock_model(
    metadata: dict[str, str] | None = None,
    batch: str | int = "batch",
    size: int = SIZE,
    outputs: int = 3,
    scale: float = 0.05,
) -> onnx.ModelProto:
    """The brightest of three colours names the class; `scale` multiplies its mean."""
    weights = np.where(np.eye(3, outputs) == 1, scale, 0).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "rootstock",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, outputs])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, METADATA if metadata is None else metadata)
    return model


def write_rootstock(file: Path, **options: Any) -> Path:
    onnx.save(rootstock_model(**options), file)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rootstock(tmp_path_factory.mktemp("model") / "rootstock.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 15)


def predict(*arguments: object) -> Result:
    """One command in this process; a GraftError is its exception."""
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


# The predictor


def test_a_predictor_names_the_classes_of_images(model: Path, folder: Path) -> None:
    predictor = Predictor.open(model, threads=1)
    assert (predictor.classes, predictor.size) == (CLASSES, SIZE)
    assert predictor.bytes == model.stat().st_size
    actual = predictor.predict(find_images([folder]))  # more than one batch
    assert len(actual) == 45
    for prediction in actual:
        assert isinstance(prediction, Prediction)
        assert prediction.label == Path(prediction.name).parent.name
        assert prediction.confidence == max(prediction.scores.values())
        assert sum(prediction.scores.values()) == pytest.approx(1)


def test_logits_are_those_of_the_network_for_any_number_of_images(model: Path) -> None:
    predictor = Predictor.open(model)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, SIZE, SIZE), dtype=np.uint8)
    logits = predictor.logits(pixels)
    assert logits.dtype == np.float32
    assert np.allclose(logits, 0.05 * pixels.mean((2, 3)), atol=1e-4)
    assert predictor.logits(pixels[:0]).shape == (0, 3)


def test_a_broken_image_is_told_apart_and_the_rest_goes_on(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"broken")
    whole = folder / "moss/000.png"
    actual = Predictor.open(model).predict([broken, whole, tmp_path, tmp_path / "absent.png"])
    assert [isinstance(each, Skipped) for each in actual] == [True, False, True, True]
    assert actual[1].label == "moss"
    assert actual[3].reason == "cannot be read: No such file or directory"


def test_folders_are_searched_and_sorted(folder: Path) -> None:
    actual = find_images([folder / "moss/001.jpg", folder])
    assert actual[0] == folder / "moss/001.jpg"
    assert actual[1:] == sorted(actual[1:])
    assert len(actual) == 46


@given(arrays(np.float32, (2, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_probabilities_sum_to_one_however_large_the_logits(logits: np.ndarray) -> None:
    actual = softmax(logits)
    assert np.allclose(actual.sum(-1), 1, atol=1e-5)
    best = logits.argmax(-1)[:, None]
    assert np.array_equal(np.take_along_axis(actual, best, -1)[:, 0], actual.max(-1))
    assert np.allclose(actual, softmax(logits + 64), atol=1e-2)


def test_latency_is_measured_and_in_order(model: Path, folder: Path) -> None:
    measured = Predictor.open(model, 1).measure_latency(folder / "moss/000.png", runs=20)
    assert 0 < measured.min_ms <= measured.p50_ms <= measured.p95_ms
    assert measured.preprocessing_ms > 0


# Files that are no rootstock


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {}}, "no rootstock"),
        ({"metadata": METADATA | {"graftkit_format": "scion"}}, "no rootstock"),
        ({"metadata": METADATA | {"classes": "["}}, "classes or its size are missing"),
        ({"metadata": METADATA | {"classes": "[1, 2, 3]"}}, "not a list of two or more"),
        ({"metadata": METADATA | {"classes": '["a", "a", "b"]'}}, "not a list of two or more"),
        ({"metadata": METADATA | {"classes": "[" * 100_000}}, "classes or its size are missing"),
        ({"metadata": METADATA | {"size": "large"}}, "classes or its size are missing"),
        ({"metadata": METADATA | {"size": "32"}}, r"expected image \(batch, 3, 32, 32\)"),
        ({"outputs": 2}, r"expected .* logits \(batch, 3\)"),
        ({"batch": 1}, "expected image"),
    ],
)
def test_an_onnx_of_another_kind_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_rootstock(tmp_path / "x.onnx", **options)
    with pytest.raises(RootstockError, match=message):
        Predictor.open(file)


def test_a_missing_file_or_one_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not an ONNX")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("absent.onnx", "text.onnx", "empty.onnx"):
        with pytest.raises(RootstockError, match=name):
            Predictor.open(tmp_path / name)


def test_a_truncated_file_is_refused_wherever_it_ends(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    file = tmp_path / "x.onnx"
    for length in range(0, len(content), 23):
        file.write_bytes(content[:length])
        with pytest.raises(RootstockError):
            Predictor.open(file)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = write_rootstock(tmp_path / "x.onnx", scale=float("inf"))
    with pytest.raises(RootstockError, match="not finite"):
        Predictor.open(file).logits(np.zeros((1, 3, SIZE, SIZE), np.uint8))


def test_images_of_another_size_are_refused(model: Path) -> None:
    with pytest.raises(RootstockError, match="cannot run"):
        Predictor.open(model).logits(np.zeros((1, 3, 8, 8), np.uint8))


# The command


def test_the_command_prints_a_table_of_files_and_classes(model: Path, folder: Path) -> None:
    result = predict(model, folder / "moss", "--threads", 1)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["file", "class", "confidence"]
    assert len(lines) == 16
    assert lines[1].split()[:2] == [str(folder / "moss/000.png"), "moss"]


def test_top_shows_more_classes_of_each_image(model: Path, folder: Path) -> None:
    lines = predict(model, folder / "fern/000.png", "--top", 3).stdout.splitlines()
    assert {line.split()[-2] for line in lines[1:]} == set(CLASSES)
    confidences = [float(line.split()[-1]) for line in lines[1:]]
    assert confidences == sorted(confidences, reverse=True)


def test_json_holds_every_score(model: Path, folder: Path) -> None:
    actual = json.loads(predict(model, folder / "fern/000.png", "--json").stdout)
    assert [record["label"] for record in actual] == ["fern"]
    assert actual[0]["file"] == str(folder / "fern/000.png")
    assert actual[0]["scores"].keys() == set(CLASSES)


def test_a_broken_image_ends_the_command_with_an_error_after_the_rest(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "[red]\x1b[31m.jpg"
    broken.write_bytes(b"broken")
    result = predict(model, broken, folder / "fern/000.png")
    assert isinstance(result.exception, ImagesError)
    assert str(result.exception).startswith("1 of 2 images cannot be read")
    assert "\x1b" not in result.stdout + str(result.exception)
    assert "[red]" in result.stdout.splitlines()[1]
    assert "fern" in result.stdout.splitlines()[2]
    actual = json.loads(predict(model, broken, folder / "fern/000.png", "--json").stdout)
    assert [record.get("label") for record in actual] == [None, "fern"]
    assert "not an image" in actual[0]["reason"]


def test_latency_of_the_command_is_one_json_object(model: Path, folder: Path) -> None:
    actual = json.loads(predict(model, folder, "--latency", "--json").stdout)
    assert actual["bytes"] == model.stat().st_size
    assert actual["peak_rss_bytes"] > 10**7
    assert 0 < actual["min_ms"] <= actual["p50_ms"] <= actual["p95_ms"]
    assert " ms" in predict(model, folder, "--latency").stdout


def test_questions_that_make_no_sense_are_refused(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    file = folder / "fern/000.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for arguments, kind in (
        ((folder, "--watch", "--latency"), ConfigError),
        ((file, "--watch"), ConfigError),
        ((folder, folder, "--watch"), ConfigError),
        ((tmp_path / "empty",), ImagesError),
        ((broken, "--latency"), ImagesError),
    ):
        result = predict(model, *arguments)
        assert isinstance(result.exception, kind), arguments
        assert isinstance(result.exception, GraftError)
        assert result.stdout == ""


# Watching a folder


def write_later(file: Path, content: bytes) -> None:
    """Writes with a time that differs from the last, whatever the clock's resolution."""
    file.write_bytes(content)
    write_later.ticks += 1  # type: ignore[attr-defined]
    os.utime(file, ns=(0, write_later.ticks * 10**9))  # type: ignore[attr-defined]


write_later.ticks = 0  # type: ignore[attr-defined]


def test_an_image_counts_as_arrived_once_it_stops_growing(tmp_path: Path) -> None:
    write_later(tmp_path / "old.jpg", b"old")
    arrivals = Arrivals(tmp_path)
    new = tmp_path / "new.jpg"
    assert arrivals.poll() == []
    write_later(new, b"")
    assert arrivals.poll() == arrivals.poll() == []  # made, but nothing in it yet
    write_later(new, b"12")
    assert arrivals.poll() == []
    write_later(new, b"1234")
    assert arrivals.poll() == []
    assert arrivals.poll() == [new]
    assert arrivals.poll() == []


def test_an_image_that_changes_or_comes_again_has_arrived_again(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path)
    file = tmp_path / "latest.jpg"
    for content in (b"first", b"second"):
        write_later(file, content)
        assert arrivals.poll() == []
        assert arrivals.poll() == [file]
    file.unlink()
    assert arrivals.poll() == []
    write_later(file, b"third")
    assert arrivals.poll() == []
    assert arrivals.poll() == [file]


def test_a_folder_that_goes_away_is_waited_for(tmp_path: Path) -> None:
    camera = tmp_path / "camera"
    camera.mkdir()
    arrivals = Arrivals(camera)
    camera.rmdir()
    assert arrivals.poll() == []
    camera.mkdir()
    write_later(camera / "x.jpg", b"x")
    assert arrivals.poll() == []
    assert arrivals.poll() == [camera / "x.jpg"]


@pytest.mark.slow
def test_the_command_watches_until_it_is_interrupted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(encoded(picture(0, 0)))
    # Whoever runs the tests may ignore Ctrl-C, and a child inherits that.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {RUN}"
    command = [sys.executable, "-c", code, "predict", str(model), str(tmp_path)]
    command += ["--watch", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert "watching" in process.stderr.readline()
            (tmp_path / "fern.png").write_bytes(encoded(picture(1, 1)))
            assert json.loads(process.stdout.readline())["label"] == "fern"
            (tmp_path / "broken.png").write_bytes(b"broken")
            assert "not an image" in json.loads(process.stdout.readline())["reason"]
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
            assert (process.returncode, rest, errors) == (0, "", "")
        finally:
            process.kill()


# What it needs


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [(), ("--latency",)])
def test_nothing_on_the_way_to_a_prediction_loads_torch(
    options: tuple[str, ...], model: Path, folder: Path
) -> None:
    code = (
        "import sys\nfrom graftkit.cli.vision import app\n"
        "try:\n    app()\nfinally:\n"
        "    print([m for m in ('torch', 'transformers', 'onnx', 'sklearn') if m in sys.modules])"
    )
    done = run_python(code, "predict", model, folder / "fern", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("missing", ["onnxruntime", "PIL"])
def test_a_missing_library_is_named_with_the_way_to_install_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import graftkit.vision.predict"
    done = run_python(code)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError" in last
    assert "pip install 'graftkit[vision]'" in last
