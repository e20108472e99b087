"""Export a network to ONNX: one float32 file with its weights, its normalization and its classes.

Torch's exporter leaves notes on every node (stack traces, shapes, names of modules) that take a
seventh of a small file. Whatever a runtime does not read is removed before the file is written.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto, NodeProto, helper
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
