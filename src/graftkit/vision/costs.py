"""What a network costs: parameters, multiply-accumulates, and milliseconds by the clock.

Accuracy against cost: every cut of a donor as a rootstock that reads all its features.
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
import onnx
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.utils import Extractor
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graftkit.files import replaced_file
from graftkit.vision.donor import Donor
from graftkit.vision.export import describe, export_onnx, strip, write_model
from graftkit.vision.features import FeatureTable, cache_key, scion_of
from graftkit.vision.images import ImageSet, Report
from graftkit.vision.predict import Predictor
from graftkit.vision.probe import Probe
from graftkit.vision.rootstock import fold_rootstock, grow

_WARM_UP = 3  # runs before the clock starts: memory is allocated, kernels are chosen


@dataclass(frozen=True)
class Cost:
    """Parameters (values that training changes) and multiply-accumulates of one image."""

    parameters: int
    macs: int


def layer_costs(donor: Donor) -> tuple[Cost, ...]:
    """The cost of each layer of a donor alone, for one image at its size."""
    x = donor.normalization.apply(torch.zeros(1, 3, donor.size, donor.size))
    costs = []
    for layer in donor.layers:
        cost, x = _run_counted(layer, x)
        costs.append(cost)
    return tuple(costs)


def module_cost(module: nn.Module, size: int) -> Cost:
    """The cost of a module for one image (1, 3, size, size), as it is in eval mode.

    Counted are convolutions, matrix products and attention, as torch's flop counter does it, and
    one multiplication with one addition is one. Normalization, activation and pooling are free.
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


@torch.no_grad()
def _run_counted(module: nn.Module, x: Tensor) -> tuple[Cost, Tensor]:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # A copy: eval mode is set part by part, and could not be taken back as it was.
    counted = copy.deepcopy(module).cpu().eval()
    # The counter does not know attention's fused kernel for the processor.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output: Tensor = counted(x)
    return Cost(parameters, counter.get_total_flops() // 2), output


@dataclass(frozen=True)
class Point:
    """A rootstock cut after `cut` layers, with a linear head on all their features, frozen.

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


def measure_points(
    donor: Donor,
    table: FeatureTable,
    probes: Sequence[Probe],
    images: ImageSet,
    cache: Path,
    report: Report = lambda *_: None,
) -> list[Point]:
    """One point for each probe; measured once and kept in `cache`.

    Raises: OutputError when the donor cannot be exported, or the cache cannot be written.
    """
    file = cache / f"curve-{cache_key(donor, images)}.json"
    with suppress(OSError, ValidationError):
        return TypeAdapter(list[Point]).validate_json(file.read_bytes())
    report("cost of every cut", 0, len(probes))
    whole = scion_of(table, table.columns(range(len(probes))))
    uncut = fold_rootstock(grow(donor, whole, images.classes, probes[-1].head()))
    macs = list(accumulate(cost.macs for cost in layer_costs(donor)))
    with TemporaryDirectory(prefix="graftkit-") as folder:
        export_onnx(uncut, Path(folder) / "uncut.onnx", donor.size, images.classes, donor.name)
        model = onnx.load(Path(folder) / "uncut.onnx")
    points = []
    for cut, probe in enumerate(probes, start=1):
        cut_model = cut_graph(model, cut, probe.head())
        describe(cut_model, donor.size, images.classes, donor.name, "float32")
        trunk = sum(weights.numel() for weights in uncut.trunk[:cut].parameters())
        size, p50 = _file_cost(cut_model, images.pixels[:1])
        head = probe.weight.numel() + probe.bias.numel()
        points.append(
            Point(
                cut=cut,
                layer=donor.layer_names[cut - 1],
                parameters=trunk + head,
                trunk_parameters=trunk,
                macs=macs[cut - 1] + probe.weight.numel(),
                bytes=size,
                p50_ms=p50,
                val_accuracy=probe.val_accuracy,
                val_loss=probe.val_loss,
            )
        )
        report("cost of every cut", cut, len(probes))
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
    """A graph of the first layers of a rootstock that reads all of them.

    Exporting each cut anew would take seconds for every layer.

    Args:
        model: of a rootstock with a linear head on all features of all layers.
        head: of the cut one.
    """
    shortened = ModelProto()
    shortened.CopyFrom(model)
    producers = {name: node for node in shortened.graph.node for name in node.output}
    gemm = producers["logits"]
    join: NodeProto = producers[gemm.input[0]]
    del join.input[cut:]
    constants = {constant.name: constant for constant in shortened.graph.initializer}
    for name, value in zip(gemm.input[1:], (head.weight, head.bias), strict=True):
        values = value.detach().numpy().astype(np.float32)
        constants[name].CopyFrom(numpy_helper.from_array(values, name))
    # Their recorded shape is the uncut one's.
    shortened.graph.ClearField("value_info")
    found: ModelProto = Extractor(shortened).extract_model(["image"], ["logits"])
    strip(found)
    return found


REPEATS = 100


def file_latency(file: Path, image: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds that one image takes, (1, 3, size, size).

    On one thread: a small network gains little by more, and what else the machine does then
    disturbs it less.
    """
    predictor = Predictor.open(file, threads=1)
    return median_ms(lambda: predictor.logits(image), REPEATS)
