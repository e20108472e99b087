"""Images, archives and ONNX files that would fill the memory, or are no such files at all."""

import os
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graftkit.errors import GraftError, ImagesError, RootstockError
from graftkit.vision.images import files
from graftkit.vision.images.files import ImageArchive, decode_image, list_images

onnx = pytest.importorskip("onnx")
predict = pytest.importorskip("graftkit.vision.predict")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
FLOAT = onnx.TensorProto.FLOAT


def png(picture):
    output = BytesIO()
    picture.save(output, "PNG", compress_level=1)
    return output.getvalue()


# Images


def test_an_image_beyond_the_limit_of_pixels_is_refused_by_its_header():
    with pytest.raises(ImagesError, match="9000x9000 pixels, more than 67,108,864"):
        decode_image(png(Image.new("1", (9000, 9000))), 16)


RANDOM = np.random.default_rng(0)
PICTURES = {
    "I;16": Image.fromarray(RANDOM.integers(0, 2**16, (41, 57), np.uint16)),
    "L": Image.fromarray(RANDOM.integers(0, 256, (41, 57), np.uint8)),
    "1": Image.fromarray(RANDOM.integers(0, 2, (41, 57)) > 0),
    "RGB": Image.fromarray(RANDOM.integers(0, 256, (41, 57, 3), np.uint8)),
    "RGBA": Image.fromarray(RANDOM.integers(0, 256, (41, 57, 4), np.uint8), "RGBA"),
    "LA": Image.fromarray(RANDOM.integers(0, 256, (41, 57, 2), np.uint8), "LA"),
    "P": Image.fromarray(RANDOM.integers(0, 256, (41, 57, 3), np.uint8)).quantize(9),
}


@pytest.mark.parametrize("mode", PICTURES)
def test_an_image_converted_in_strips_has_the_same_pixels(mode, monkeypatch):
    content = png(PICTURES[mode])
    for size in (16, 41):
        monkeypatch.setattr(files, "STRIP_PIXELS", 2**20)
        whole = decode_image(content, size)
        monkeypatch.setattr(files, "STRIP_PIXELS", 130)
        assert np.array_equal(decode_image(content, size), whole)


PEAK = """
import resource, sys
from graftkit.vision.images.files import decode_image
content = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode_image(content, 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "bytes_a_pixel"), [("I;16", 4), ("RGBA", 10)])
def test_a_large_image_takes_few_bytes_a_pixel(tmp_path, mode, bytes_a_pixel):
    file, side = tmp_path / "large.png", 3500
    file.write_bytes(png(Image.new(mode, (side, side))))
    command = [sys.executable, "-c", PEAK, str(file)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < bytes_a_pixel * side**2 / 2**20 + 30


# Archives


def archive(file, count=3):
    with zipfile.ZipFile(file, "w") as output:
        for index in range(count):
            output.writestr(f"{'ab'[index % 2]}/{index}.png", b"x")
    return file


@pytest.mark.parametrize("zip64", [False, True])
def test_an_archive_with_a_huge_list_of_files_is_refused_before_it_is_read(
    tmp_path, monkeypatch, zip64
):
    if zip64:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    file = archive(tmp_path / "a.zip", 40)
    assert len(ImageArchive(file).names()) == 40
    monkeypatch.setattr(files, "DIRECTORY_LIMIT_BYTES", 1000)
    with pytest.raises(ImagesError, match=r"lists files in 2,\d\d\d bytes, more than 1,000"):
        ImageArchive(file)


def test_a_member_that_unpacks_to_more_than_it_declares_is_cut_at_that(tmp_path):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as output:
        output.writestr("a/0.png", bytes(10_000_000))
        output.writestr("b/0.png", b"x")
    content = file.read_bytes().replace((10_000_000).to_bytes(4, "little"), b"\x10\0\0\0")
    file.write_bytes(content)
    with (
        ImageArchive(file).opened() as read,
        pytest.raises(ImagesError, match="cannot be unpacked: Bad CRC"),
    ):
        read("a/0.png")


@pytest.mark.parametrize("name", ["data.zip", "data.csv", "data"])
def test_a_pipe_in_place_of_a_data_set_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImagesError, match="no ordinary file"):
        list_images(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfef\0i\0l\0e\0",
        b"file,class\na,b,c,d\n",
        b"file,class\n\0,a\n",
        b'file,class\n"a' + b"x" * 200_000,
        b"\xef\xbb\xbffile,class\n/etc,a\n..,b\n",
        b"file,class\n" + b"a" * 5000 + b",b\nc,d\n",
        b"file,file\na,b\n",
    ],
    ids=range(8),
)
def test_odd_lists_of_images_are_refused(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ImagesError):
        list_images(tmp_path / "a.csv")


# ONNX


def model(nodes=(), initializers=(), result="logits", metadata=None, size=8):
    """A rootstock that averages channels; what `nodes` make as "more" is added to its logits."""
    image = helper.make_tensor_value_info("image", FLOAT, ["batch", 3, size, size])
    out = helper.make_tensor_value_info("logits", FLOAT, ["batch", 2])
    plain = [
        helper.make_node("GlobalAveragePool", ["image"], ["p"]),
        helper.make_node("Flatten", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "w"], ["plain" if nodes else "logits"]),
    ]
    if nodes:
        plain.append(helper.make_node("Add", ["plain", "more"], ["logits"]))
    weights = [numpy_helper.from_array(np.ones((3, 2), np.float32), "w"), *initializers]
    graph = helper.make_graph([*nodes, *plain], "g", [image], [out], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    entries = {"graftkit_format": "rootstock", "classes": '["a","b"]', "size": str(size)}
    for key, value in (entries | (metadata or {})).items():
        entry = made.metadata_props.add()
        entry.key, entry.value = key, value
    return made


def constant(values, name="shape"):
    tensor = numpy_helper.from_array(np.array(values, np.int64))
    return helper.make_node("Constant", [], [name], value=tensor)


def summed(*nodes):
    return [*nodes, helper.make_node("ReduceSum", ["big"], ["more"], keepdims=1)]


HUGE = 1_600_000_000
TALL = numpy_helper.from_array(np.ones((40_000, 1), np.float32), "tall")
WIDE = numpy_helper.from_array(np.ones((1, 40_000), np.float32), "wide")
BOMBS = {
    "constant of shape": model(
        summed(constant([HUGE]), helper.make_node("ConstantOfShape", ["shape"], ["big"]))
    ),
    "expand": model(
        summed(constant([HUGE]), helper.make_node("Expand", ["one", "shape"], ["big"])),
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    ),
    "tile": model(
        summed(constant([HUGE]), helper.make_node("Tile", ["one", "shape"], ["big"])),
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    ),
    "outer product": model(
        summed(helper.make_node("MatMul", ["tall", "wide"], ["big"])), [TALL, WIDE]
    ),
    "broadcast": model(summed(helper.make_node("Add", ["tall", "wide"], ["big"])), [TALL, WIDE]),
}
OPENED = """
import resource, sys
import numpy as np
from graftkit.errors import RootstockError
from graftkit.vision.predict import Predictor
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    try:
        Predictor.open(file).logits(np.zeros((1, 3, 8, 8), np.uint8))
        print("ran")
    except RootstockError as error:
        print(file if file in str(error) and "cannot run" in str(error) else error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_tensors_that_operators_make_come_out_of_limited_memory(tmp_path):
    files = []
    for name, bomb in BOMBS.items():
        files.append(str(tmp_path / f"{name}.onnx"))
        Path(files[-1]).write_bytes(bomb.SerializeToString())
    command = [sys.executable, "-c", OPENED, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    *refused, peak = done.stdout.splitlines()
    assert refused == files
    assert int(peak) < 300


def lying(change):
    made = model()
    change(made)
    return made


def outside(made):
    weights = made.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def sparse():
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    return helper.make_sparse_tensor(values, places, [HUGE])


LOOP = helper.make_node("If", ["c"], ["more"], then_branch=model().graph, else_branch=model().graph)
LIES = {
    "more elements than bytes": (
        lying(lambda made: made.graph.initializer[0].dims.append(HUGE)),
        "elements in",
    ),
    "a constant with more elements than bytes": (
        lying(
            lambda made: made.graph.node.append(
                helper.make_node(
                    "Constant", [], ["x"], value=onnx.TensorProto(dims=[HUGE], data_type=1)
                )
            )
        ),
        "elements in",
    ),
    "negative dimensions": (
        lying(lambda made: made.graph.initializer[0].dims.__setitem__(0, -5)),
        "elements in",
    ),
    "weights in another file": (lying(outside), "weights in other files"),
    "sparse weights": (
        lying(lambda made: made.graph.sparse_initializer.append(sparse())),
        "sparse tensors",
    ),
    "a sparse constant": (
        model(summed(helper.make_node("Constant", [], ["big"], sparse_value=sparse()))),
        "sparse tensors",
    ),
    "graphs in nodes": (model([LOOP]), "graphs or sparse tensors"),
    "functions": (
        lying(lambda made: made.functions.append(onnx.FunctionProto(name="f", domain="d"))),
        "functions",
    ),
    "a side that is too long": (model(size=100_000), "100000 pixels a side"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_rootstock_does_not_have_is_refused_naming_the_file(tmp_path, lie):
    made, words = LIES[lie]
    file = tmp_path / "lie.onnx"
    file.write_bytes(made.SerializeToString())
    with pytest.raises(RootstockError, match=rf"lie\.onnx: .*{words}"):
        predict.Predictor.open(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'["a","b"]', b'["\xda","b"]'),
        (b"graftkit_format", b"graftkit_forma\xff"),
        (b"\x05image", b"\x05ima\xffe"),
        (b"GlobalAveragePool", b"GlobalAveragePo\xffl"),
        (b"\x06logits", b"\x06logi\xfes"),
    ],
)
def test_text_that_is_not_utf_8_is_refused_naming_the_file(tmp_path, old, new):
    file = tmp_path / "odd.onnx"
    file.write_bytes(model().SerializeToString().replace(old, new))
    with pytest.raises(RootstockError, match=r"odd\.onnx"):
        predict.Predictor.open(file)


@pytest.mark.slow
def test_damage_anywhere_is_a_rootstock_or_an_error_of_ours(tmp_path):
    content, random = model().SerializeToString(), np.random.default_rng(1)
    file = tmp_path / "damaged.onnx"
    opened, refusals = 0, []
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), random.integers(1, 4)):
            damaged[place] = random.integers(256)
        end = len(content) if random.integers(2) else random.integers(1, len(content))
        file.write_bytes(bytes(damaged[:end]))
        try:
            predictor = predict.Predictor.open(file)
            images = np.zeros((1, 3, predictor.size, predictor.size), np.uint8)
            logits = predictor.logits(images)
        except GraftError as error:
            refusals.append(str(error))
        else:
            assert logits.shape == (1, len(predictor.classes))
            assert np.isfinite(logits).all()
            opened += 1
    assert opened > 0
    assert len(refusals) > 0
    assert all(str(file) in message for message in refusals)


def test_a_large_file_and_a_message_of_endless_fields_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.onnx"
    file.write_bytes(b"\x08\x01" * 3000)
    monkeypatch.setattr("graftkit.vision.predict.FIELD_LIMIT", 2000)
    with pytest.raises(RootstockError, match="more than 2,000 fields"):
        predict.Predictor.open(file)
    monkeypatch.setattr(predict, "FILE_LIMIT_BYTES", 5000)
    with pytest.raises(RootstockError, match="6,000 bytes, more than 5,000"):
        predict.Predictor.open(file)


def test_large_images_come_in_smaller_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "SIDE_OF_WHOLE_BATCHES", 4)
    (tmp_path / "a.onnx").write_bytes(model().SerializeToString())
    opened, batches = predict.Predictor.open(tmp_path / "a.onnx"), []
    run = opened._run
    monkeypatch.setattr(opened, "_run", lambda images: batches.append(len(images)) or run(images))
    assert opened.logits(np.zeros((20, 3, 8, 8), np.uint8)).shape == (20, 2)
    assert batches == [8, 8, 4]
