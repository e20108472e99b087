"""What a network costs: parameters, multiply-accumulates, bytes and milliseconds.

The curve has the cost of every cut of a donor, beside the accuracy of its linear probe.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.utils import Extractor
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graftkit.files import replaced_file
from graftkit.progress import Progress, silent
from graftkit.vision.donor import Donor
from graftkit.vision.export import build_model, describe, strip, write_model
from graftkit.vision.images import ImageSet
from graftkit.vision.predict import Predictor
from graftkit.vision.probe import FeatureTable, LinearProbe, cache_key
from graftkit.vision.rootstock import fold_rootstock, grow

_WARM_UP = 3  # runs before the clock starts: memory is allocated, kernels are chosen
REPEATS = 100
"""Timed runs of one image."""


@dataclass(frozen=True)
class Cost:
    """Parameters (values that training changes) and multiply-accumulates of one image."""

    parameters: int
    macs: int


def layer_costs(donor: Donor) -> tuple[Cost, ...]:
    """The cost of each layer of a donor, for one image at its size."""
    x = donor.normalization.apply(torch.zeros(1, 3, donor.size, donor.size))
    costs = []
    for layer in donor.layers:
        cost, x = _run_counted(layer, x)
        costs.append(cost)
    return tuple(costs)


def module_cost(module: nn.Module, size: int) -> Cost:
    """The cost of a module in eval mode for one image (1, 3, size, size).

    Torch's flop counter counts convolutions, matrix products and attention; one multiplication
    with one addition counts as one. Normalization, activation and pooling count as nothing.
    """
    return _run_counted(module, torch.zeros(1, 3, size, size))[0]


def median_ms(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 95th percentile of the time `run` takes, in milliseconds."""
    for _ in range(_WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    p50, p95 = np.percentile(times, [50, 95])
    return float(p50), float(p95)


def file_latency(file: Path, image: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds that one image takes.

    Measured on one thread: more gain little for a small network, and one is less disturbed by
    what else the machine does.

    Args:
        image: uint8 (1, 3, size, size).
    """
    predictor = Predictor.open(file, threads=1)
    return median_ms(lambda: predictor.logits(image), REPEATS)


@torch.no_grad()
def _run_counted(module: nn.Module, x: Tensor) -> tuple[Cost, Tensor]:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # A copy, because eval mode is set for every part and the parts may differ.
    counted = copy.deepcopy(module).cpu().eval()
    # The counter does not know the fused attention kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output: Tensor = counted(x)
    return Cost(parameters, counter.get_total_flops() // 2), output


@dataclass(frozen=True)
class CurvePoint:
    """A rootstock cut after `cut` layers, frozen, with a linear head on all their features.

    Attributes:
        parameters, trunk_parameters: with batch normalization folded away.
        macs: multiply-accumulates of one image, without those of pooling.
        bytes: of its ONNX file. p50_ms: median of one image in onnxruntime, on one thread.
    """

    cut: int
    layer: str
    parameters: int
    trunk_parameters: int
    macs: int
    bytes: int
    p50_ms: float
    val_accuracy: float
    val_loss: float


def measure_curve(
    donor: Donor,
    table: FeatureTable,
    probes: Sequence[LinearProbe],
    images: ImageSet,
    cache: Path,
    progress: Progress = silent,
) -> list[CurvePoint]:
    """One point for each probe, measured once and cached in `cache`.

    Raises: OutputError when the donor cannot be exported, or the cache cannot be written.
    """
    file = cache / f"curve-{cache_key(donor, images)}.json"
    with suppress(OSError, ValidationError):
        return TypeAdapter(list[CurvePoint]).validate_json(file.read_bytes())
    progress("cost of every cut", 0, len(probes))
    scion = table.scion(table.columns(range(len(probes))))
    uncut = fold_rootstock(grow(donor, scion, images.classes, probes[-1].head()))
    macs = list(accumulate(cost.macs for cost in layer_costs(donor)))
    model = build_model(uncut, donor.size, images.classes, donor.name, donor.name)
    points = []
    for cut, probe in enumerate(probes, start=1):
        cut_model = cut_graph(model, cut, probe.head())
        describe(cut_model, donor.size, images.classes, donor.name, "float32")
        trunk = sum(weights.numel() for weights in uncut.trunk[:cut].parameters())
        size, p50 = _file_cost(cut_model, images.pixels[:1])
        points.append(
            CurvePoint(
                cut=cut,
                layer=donor.layer_names[cut - 1],
                parameters=trunk + probe.weight.numel() + probe.bias.numel(),
                trunk_parameters=trunk,
                macs=macs[cut - 1] + probe.weight.numel(),
                bytes=size,
                p50_ms=p50,
                val_accuracy=probe.val_accuracy,
                val_loss=probe.val_loss,
            )
        )
        progress("cost of every cut", cut, len(probes))
    with replaced_file(file) as partial:
        partial.write_text(json.dumps([asdict(point) for point in points], indent=1))
    return points


def _file_cost(model: ModelProto, image: np.ndarray) -> tuple[int, float]:
    """Bytes and median milliseconds of a model as a file."""
    with TemporaryDirectory(prefix="graftkit-") as folder:
        file = Path(folder) / "cut.onnx"
        size = write_model(model, file)
        p50, _ = file_latency(file, image)
    return size, p50


def cut_graph(model: ModelProto, cut: int, head: nn.Linear) -> ModelProto:
    """The graph of a rootstock's first layers, extracted from the graph of the whole rootstock.

    Exporting each cut by itself would take seconds for every layer.

    Args:
        model: of a rootstock with a linear head on all features of all layers.
        cut: layers that stay.
        head: on all features of these layers.
    """
    shortened = ModelProto()
    shortened.CopyFrom(model)
    producers = {name: node for node in shortened.graph.node for name in node.output}
    gemm = producers["logits"]
    concat: NodeProto = producers[gemm.input[0]]
    del concat.input[cut:]
    constants = {constant.name: constant for constant in shortened.graph.initializer}
    for name, value in zip(gemm.input[1:], (head.weight, head.bias), strict=True):
        values = value.detach().numpy().astype(np.float32)
        constants[name].CopyFrom(numpy_helper.from_array(values, name))
    # Their recorded shape is the uncut one's.
    shortened.graph.ClearField("value_info")
    extracted: ModelProto = Extractor(shortened).extract_model(["image"], ["logits"])
    strip(extracted)
    return extracted
