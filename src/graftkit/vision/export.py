"""Export a network to ONNX in float32, and quantize that file to int8.

A file holds weights, normalization and classes. Torch's exporter leaves notes on every node (stack
traces, shapes, names of modules) that take a seventh of a small file. Whatever a runtime does not
read is removed before the file is written.

Quantization is static and measured against the float32 file. The trunk computes in integers (QDQ:
uint8 activations, int8 weights per channel, float32 biases). The head computes in float32 with
weights stored in int8: pooled features differ in range by orders of magnitude, and with one scale
for all of them most images are misclassified. At the end every bias is corrected by the mean error
of its layer's output, from the first layer to the last, which halves the error of the logits.

The weights are scaled so that no processor's kernels overflow. x86 processors without VNNI multiply
uint8 by int8 in pairs and add the two products in 16 bits, which saturate: 255 (a + b) must stay
below 2¹⁵, so two neighbouring codes may add up to 128. A file that exceeds this gives other logits
there than on all other processors.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from graftkit.config import VERSION
from graftkit.errors import OutputError
from graftkit.files import replaced_file

FORMAT = "rootstock"
OPSET = 18  # the lowest that the exporter writes without a conversion
CHECKED_IMAGES = 4  # random images on which the file must compute what the module computes
TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit; float32 differs by some 1e-5."""


def export_onnx(
    module: nn.Module, path: Path, size: int, classes: Sequence[str], donor_name: str
) -> int:
    """Write a network as ONNX in float32, for any number of images in a batch.

    Input `image`: float32 (batch, 3, size, size), RGB 0..255. Output `logits`: float32 (batch,
    classes). Metadata: graftkit_format, graftkit_version, classes (JSON), size, donor, precision.

    Args:
        module: maps such images to logits; it is exported as in eval mode.
        size: pixels of a side.
    Returns: bytes of the file.
    Raises: OutputError when the network cannot be exported, when the exported one computes other
        logits than the module, or when the file cannot be written.
    """
    return write_model(build_model(module, size, classes, donor_name, str(path)), Path(path))


def build_model(
    module: nn.Module, size: int, classes: Sequence[str], donor_name: str, name: str
) -> ModelProto:
    """The ONNX model that `export_onnx` writes.

    Args:
        name: of the network, for error messages.
    Raises: OutputError when the network cannot be exported, or would compute other logits.
    """
    with _in_eval_mode(module):
        model = _trace(module, size, name)
        strip(model)
        describe(model, size, classes, donor_name, "float32")
        _check(module, model, size, name)
    return model


def describe(
    model: ModelProto, size: int, classes: Sequence[str], donor: str, precision: str
) -> None:
    """Set the metadata by which graftkit recognizes a rootstock."""
    entries = {
        "graftkit_format": FORMAT,
        "graftkit_version": VERSION,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "size": str(size),
        "donor": donor,
        "precision": precision,
    }
    helper.set_model_props(model, entries)


def write_model(model: ModelProto, path: Path) -> int:
    """Write a model under a temporary name, then rename it. Returns: bytes of the file.

    Raises: OutputError when the disk refuses, or the model exceeds the 2 GiB of one file.
    """
    with replaced_file(path) as partial:
        return partial.write_bytes(model.SerializeToString())


def strip(model: ModelProto) -> None:
    """Remove what no runtime reads: notes, inner shapes, default attributes, long names, and
    weights and operator sets that nothing uses."""
    graph = model.graph
    domains = {node.domain for node in graph.node}
    for opset in [opset for opset in model.opset_import if opset.domain not in domains]:
        model.opset_import.remove(opset)
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")
    graph.ClearField("value_info")
    for node in graph.node:
        node.ClearField("name")
        explicit = [attribute for attribute in node.attribute if not _is_default(node, attribute)]
        node.ClearField("attribute")
        node.attribute.extend(explicit)
    _shorten_names(graph)
    used = {name for node in graph.node for name in node.input}
    used_initializers = [value for value in graph.initializer if value.name in used]
    graph.ClearField("initializer")
    graph.initializer.extend(used_initializers)


def _is_default(node: NodeProto, attribute: onnx.AttributeProto) -> bool:
    if not onnx.defs.has(node.op_type, node.domain):
        return False
    schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    default: Any = schema.attributes[attribute.name].default_value
    value = helper.get_attribute_value(attribute)
    return bool(default.type and helper.get_attribute_value(default) == value)


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Number the values inside a graph; a name of thirty letters costs ninety bytes."""
    short = {value.name: value.name for value in (*graph.input, *graph.output)}
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                # An empty name says that an optional input is absent.
                names[i] = short.setdefault(name, f"{len(short):x}") if name else ""
    for value in graph.initializer:
        value.name = short.setdefault(value.name, f"{len(short):x}")


def _trace(module: nn.Module, size: int, name: str) -> ModelProto:
    """The graph of a module. Raises: OutputError when the exporter refuses."""
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    # Two images, because the exporter would make a batch of one a constant.
    images = torch.zeros(2, 3, size, size, device=device)
    try:
        with _without_notices(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        model: ModelProto = program.model_proto
    except Exception as error:  # the exporter lets through whatever its parts raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{name}: the network cannot be written as ONNX ({reason}); use layers that "
            "torch.onnx.export knows, and nothing that depends on the values of an image"
        ) from error
    return model


def _check(module: nn.Module, model: ModelProto, size: int, name: str) -> None:
    """Raises: OutputError when the graph is invalid or computes other logits than the module."""
    images = np.random.default_rng(0).integers(0, 256, (CHECKED_IMAGES, 3, size, size))
    try:
        onnx.checker.check_model(model, full_check=True)
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        logits = session.run(["logits"], {"image": images.astype(np.float32)})[0]
    except Exception as error:  # onnx and onnxruntime each have their own, without a common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(f"{name}: the exported network does not run ({reason})") from error
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        expected = module(torch.from_numpy(images).float().to(device)).cpu().numpy()
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise OutputError(
            f"{name}: the exported network answers otherwise than the trained one (logits differ "
            f"by {difference:.3g}); this is a fault of the export, please report the network"
        )


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _without_notices() -> Iterator[None]:
    """The exporter logs packages that are not installed, and warns of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


BATCH = 16
FEW_IMAGES = 64  # at most, for histograms of every activation, which take seconds
PERCENTILE = 99.99  # of an activation's values; what is beyond saturates
METHODS = (CalibrationMethod.MinMax, CalibrationMethod.Percentile)
INTEGER_OPERATORS = ["Conv", "MatMul", "Add", "Clip", "Relu", "MaxPool", "AveragePool"]
LEVELS = 127  # of a symmetric int8 weight
_PAIR = 127.5  # sum of two neighbouring codes before they are rounded, at most


def quantize_onnx(fp32: Path, int8: Path, calibration: np.ndarray) -> int:
    """Write the int8 form of a file of `export_onnx`, with the same inputs, outputs and classes.

    Ranges of the activations come from the calibration images, as minimum and maximum or as a
    percentile: whichever leaves the smaller error of their logits.

    Args:
        calibration: training images, uint8 (n, 3, size, size); a few hundred.
    Returns: bytes of the file.
    Raises: OutputError when the network cannot be quantized or the file cannot be written.
    """
    try:
        metadata = {entry.key: entry.value for entry in onnx.load(fp32).metadata_props}
        with _without_output(), TemporaryDirectory() as folder:
            prepared = _prepare(fp32, Path(folder))
            expected = run(prepared, calibration)
            candidates = [
                _quantize(prepared, calibration, method, Path(folder)) for method in METHODS
            ]
            errors = [np.linalg.norm(run(each, calibration) - expected) for each in candidates]
            best = candidates[int(np.argmin(errors))]
            _correct_biases(best, prepared, calibration)
    except Exception as error:  # onnxruntime's errors have no base of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{int8}: {fp32} cannot be quantized ({reason}); use the float32 file"
        ) from error
    strip(best)
    helper.set_model_props(best, metadata | {"precision": "int8"})
    return write_model(best, int8)


def run(model: ModelProto, pixels: np.ndarray) -> np.ndarray:
    """Logits of every image, float32 (n, classes)."""
    return np.concatenate([logits for (logits,) in _batches(model, pixels, ["logits"])])


def _means(model: ModelProto, pixels: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """For values (n, channels, ...) of a graph: every channel's mean over images and positions."""
    sums: list[Any] = [0.0] * len(names)
    for values in _batches(model, pixels, names):
        for index, value in enumerate(values):
            others = tuple(range(2, value.ndim))
            sums[index] = sums[index] + value.mean(others, dtype=np.float64).sum(0)
    return [total / len(pixels) for total in sums]


def _batches(
    model: ModelProto, pixels: np.ndarray, names: Sequence[str]
) -> Iterator[list[np.ndarray]]:
    """Values of a graph, batch by batch; they need not be its outputs."""
    outputs = {value.name for value in model.graph.output}
    model = copy.deepcopy(model)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in outputs
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # weights that int8 has replaced are removed at the end
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for images in iter(_Images(pixels).get_next, None):
        yield session.run(names, images)


class _Images:
    """Batches of images, in the interface of onnxruntime's CalibrationDataReader.

    Its quantizer takes a range of batches at a time; a range of one bounds the histograms' memory.
    """

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels
        self._left = iter(range(len(self)))

    def __len__(self) -> int:
        return -(-len(self._pixels) // BATCH)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, np.ndarray] | None:
        index = next(self._left, None)
        if index is None:
            return None
        pixels = self._pixels[index * BATCH : (index + 1) * BATCH]
        return {"image": pixels.astype(np.float32)}


def _prepare(fp32: Path, folder: Path) -> ModelProto:
    """The float32 graph, simplified, with shapes, and with a name for every node."""
    file = folder / "prepared.onnx"
    quant_pre_process(fp32, file, skip_symbolic_shape=True)
    model = onnx.load(file)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def _quantize(
    prepared: ModelProto, calibration: np.ndarray, method: CalibrationMethod, folder: Path
) -> ModelProto:
    """Trunk in integers, head with int8 weights."""
    file = folder / f"{method.name}.onnx"
    options: dict[str, Any] = {
        # onnxruntime quantizes a bias by itself as it loads; stored, its scales cost 8 bytes each.
        "QuantizeBias": False,
        "MatMulConstBOnly": True,
        "CalibPercentile": PERCENTILE,
        "CalibStridedMinMax": 1,
        "TensorQuantOverrides": weight_overrides(prepared),
    }
    quantize_static(
        copy.deepcopy(prepared),
        file,
        _Images(_few(calibration)),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=INTEGER_OPERATORS,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=_float_nodes(prepared),
        calibrate_method=method,
        extra_options=options,
    )
    model = onnx.load(file)
    for node in [node for node in model.graph.node if node.op_type == "Gemm"]:
        _quantize_dense(model, node)
    return model


def _few(calibration: np.ndarray) -> np.ndarray:
    return calibration[:: -(-len(calibration) // FEW_IMAGES)]


def _float_nodes(model: ModelProto) -> list[str]:
    """Nodes that stay in float32: what works on features, and sums with constants.

    A feature or a logit has two dimensions, (batch, features); maps and tokens have more.
    """
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*model.graph.value_info, *model.graph.output)
    }
    constants = {value.name for value in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if ranks.get(node.output[0], 0) <= 2
        or (node.op_type == "Add" and not constants.isdisjoint(node.input))
    ]


def _quantize_dense(model: ModelProto, node: NodeProto) -> None:
    """Store a dense layer's weights in int8.

        Ŵ_ij = s_j round(W_ij / s_j),  s_j = max_i |W_ij| / 127

    One scale for each input, as the weights of a feature are large where its values are small.
    """
    values = {value.name: value for value in model.graph.initializer}
    if node.input[1] not in values:
        return  # not a dense layer with constants
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    inputs = 1 if transposed else 0
    codes, scale = dense_codes(numpy_helper.to_array(values[node.input[1]]), inputs)
    name = f"{node.name}_weight"
    for suffix, value in (("codes", codes), ("scale", scale)):
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}_{suffix}"))
    position = list(model.graph.node).index(node)
    dense = helper.make_node(
        "DequantizeLinear", [f"{name}_codes", f"{name}_scale"], [name], axis=inputs
    )
    model.graph.node.insert(position, dense)
    model.graph.node[position + 1].input[1] = name


def _correct_biases(model: ModelProto, prepared: ModelProto, calibration: np.ndarray) -> None:
    """Correct every bias by the mean error of its layer's output, in the order of the layers.

        b ← b + E[W x + b − (Ŵ x̂ + b)]

    over calibration images, where x̂ is the quantized layers' input: bias correction of Nagel et al.
    (arXiv 1906.04721, section 4.2), with images in place of statistics.
    """
    constants = {value.name: value for value in model.graph.initializer}
    layers = [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in constants
    ]
    outputs = {node.name: node.output[0] for node in prepared.graph.node}
    few, places = _few(calibration), [outputs[node.name] for node in layers]
    for node, expected in zip(layers, _means(prepared, few, places), strict=True):
        (actual,) = _means(model, few, [node.output[0]])
        bias = numpy_helper.to_array(constants[node.input[2]]) + (expected - actual)
        name = f"{node.name}_bias"
        model.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), name))
        node.input[2] = name


def dense_codes(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of a float32 matrix, and one scale for each index along `axis`.

    W ≈ scale · codes, codes between -127 and 127; a row of zeros has the scale 1.
    """
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.where(largest > 0, largest / LEVELS, 1).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale.squeeze(1 - axis)


@contextmanager
def _without_output() -> Iterator[None]:
    """Silence onnxruntime's quantizer, which prints progress where a command prints JSON."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def safe_ranges(*orders: np.ndarray) -> np.ndarray:
    """The smallest r of each row for which no two neighbouring codes round(127 w / r) exceed 128.

        r = max(max |w_k|, 127 / 127.5 max |w_k + w_k+1|, both of one sign)

    Args:
        orders: the same rows (n, k), in every order in which a kernel may read them.
    Returns: (n,).
    """
    ranges: np.ndarray = np.abs(orders[0]).max(1)
    for rows in orders:
        for part in (rows.clip(min=0), (-rows).clip(min=0)):
            pairs = (part[:, :-1] + part[:, 1:]).max(1, initial=0)
            ranges = np.maximum(ranges, LEVELS / _PAIR * pairs)
    return ranges


def weight_overrides(model: ModelProto) -> dict[str, list[dict[str, Any]]]:
    """The range of every channel, as onnxruntime's quantizer takes it (TensorQuantOverrides)."""
    values = {value.name: value for value in model.graph.initializer}
    overrides = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul") or node.input[1] not in values:
            continue
        weight = numpy_helper.to_array(values[node.input[1]])
        if node.op_type == "MatMul":
            axis, orders = 1, [weight.T]
        elif _is_depthwise(node, weight):
            continue  # its kernels widen before they multiply
        else:
            axis, orders = 0, [weight, np.moveaxis(weight, 1, -1)]
        ranges = safe_ranges(*(rows.reshape(len(rows), -1) for rows in orders))
        overrides[node.input[1]] = [{"axis": axis, "rmin": -r, "rmax": r} for r in ranges]
    return overrides


def _is_depthwise(node: NodeProto, weight: np.ndarray) -> bool:
    groups = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "group"), 1)
    return bool(groups == len(weight) and weight.shape[1] == 1)
