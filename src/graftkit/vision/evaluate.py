"""Evaluate a network: accuracy, parameters, multiply-accumulates, bytes, latency and memory.

Everything that is reported of a network is measured on the ONNX file that would be deployed.
The curve has the cost of every cut of a donor, beside the accuracy of its linear probe.
"""

import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.utils import Extractor
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graftkit.errors import ImagesError, RootstockError
from graftkit.files import replaced_file
from graftkit.progress import Progress, silent
from graftkit.vision.donor import Donor
from graftkit.vision.export import (
    build_model,
    describe,
    export_onnx,
    quantize_onnx,
    strip,
    write_model,
)
from graftkit.vision.images import ImageSet, LabeledImages
from graftkit.vision.predict import Predictor
from graftkit.vision.probe import FeatureTable, LinearProbe, cache_key
from graftkit.vision.rootstock import Rootstock, fold_rootstock, grow

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


Z = 1.959964  # of a two-sided 95 % interval
CALIBRATION_IMAGES = 256  # of training, for the ranges of int8


@dataclass(frozen=True)
class Scores:
    """How well a network names some images.

    Attributes:
        accuracy, interval: share of images that are named rightly, and its 95 % interval (Wilson).
        loss: mean cross-entropy, nats.
        recall: by class, the share of its images that are named rightly; None for a class without
            images.
        confusion: counts, by true class and then by predicted class.
        logits: (n, classes), float32.
        right: bool (n,), which images are named rightly.
    """

    accuracy: float
    interval: tuple[float, float]
    loss: float
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    logits: Tensor
    right: np.ndarray


def score(logits: Tensor, labels: np.ndarray) -> Scores:
    """Scores of logits (n, classes) against labels (n,). Raises: ImagesError where n is 0."""
    if len(labels) == 0:
        raise ImagesError("there is no image to score; give this split at least one")
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1).numpy()
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, counts = confusion.diagonal(), confusion.sum(axis=1)
    right = int(hits.sum())
    return Scores(
        accuracy=right / len(labels),
        interval=wilson_interval(right, len(labels)),
        loss=float(functional.cross_entropy(logits, torch.from_numpy(np.array(labels)))),
        recall=tuple(
            int(hit) / int(count) if count else None
            for hit, count in zip(hits, counts, strict=True)
        ),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        logits=logits,
        right=predicted == np.asarray(labels),
    )


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), with p = right / count and n = count.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n)
    """
    share, scale = right / count, 1 + Z**2 / count
    center = (share + Z**2 / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def accuracy_lead(own: np.ndarray, other: np.ndarray) -> tuple[float, tuple[float, float]]:
    """How far one network's accuracy is above another's on the same images, and its 95 % interval.

    The interval is paired, so that images which both find easy or hard do not widen it:

        d̄ ± z √(var(d) / m),   m = n + 2

    where d are the differences on n images and on one more image that each of the two wins; this
    is the adjusted Wald interval of Bonett and Price (2012).

    Args:
        own, other: (n,), whether each image is answered rightly, or the share of several networks.
    """
    differences = np.concatenate([own.astype(float) - other.astype(float), [1.0, -1.0]])
    mean = float(differences.mean())
    half = Z * float(differences.std()) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


@dataclass(frozen=True)
class Measurement:
    """Scores of a network's ONNX file on validation and test images, and its costs.

    Attributes:
        file: the ONNX file. val, test: scores on these images.
        parameters, trunk_parameters: with batch normalization folded away, as in the file.
        macs: multiply-accumulates of one image. bytes: of the file.
        p50_ms, p95_ms: of one image in onnxruntime, on one thread.
    """

    file: Path
    val: Scores
    test: Scores
    parameters: int
    trunk_parameters: int
    macs: int
    bytes: int
    p50_ms: float
    p95_ms: float

    def to_record(self, classes: Sequence[str]) -> dict[str, Any]:
        """The numbers of one network in graft.json."""
        return {
            "val_accuracy": self.val.accuracy,
            "val_loss": self.val.loss,
            "test_accuracy": self.test.accuracy,
            "test_interval": list(self.test.interval),
            "parameters": self.parameters,
            "trunk_parameters": self.trunk_parameters,
            "bytes": self.bytes,
            "macs": self.macs,
            "p50_ms": self.p50_ms,
            "p95_ms": self.p95_ms,
            "recall": dict(zip(classes, self.test.recall, strict=True)),
        }


def measure(rootstock: Rootstock, images: ImageSet, file: Path, donor_name: str) -> Measurement:
    """Export a network to `file`, and measure that file.

    Raises: OutputError when it cannot be exported or written.
    """
    folded = fold_rootstock(rootstock)
    size = export_onnx(folded, file, folded.size, images.classes, donor_name)
    predictor = Predictor.open(file)
    p50, p95 = file_latency(file, images.pixels[:1])
    return Measurement(
        file,
        file_scores(predictor, images.subset("val")),
        file_scores(predictor, images.subset("test")),
        sum(weights.numel() for weights in folded.parameters()),
        sum(weights.numel() for weights in folded.trunk.parameters()),
        module_cost(folded, folded.size).macs,
        size,
        p50,
        p95,
    )


def file_scores(predictor: Predictor, images: LabeledImages) -> Scores:
    """Scores of an ONNX file on the images of one split."""
    return score(torch.from_numpy(predictor.logits(images.pixels)), images.labels)


@dataclass(frozen=True)
class Parity:
    """Two files of one network on the same images.

    Attributes:
        accuracy_fp32, accuracy_int8: share of the images that each names rightly.
        agreement: share on which both name the same class.
        max_difference: largest difference of a logit.
        relative_error: ‖logits_int8 − logits_fp32‖ / ‖logits_fp32‖, Frobenius.
    """

    accuracy_fp32: float
    accuracy_int8: float
    agreement: float
    max_difference: float
    relative_error: float


def parity(fp32: Path, int8: Path, pixels: np.ndarray, labels: np.ndarray) -> Parity:
    """Compare two rootstocks on images.

    Args:
        pixels: uint8 (n, 3, size, size). labels: int64 (n,), indices of the classes.
    Raises: RootstockError for a file that is no rootstock.
    """
    exact, quantized = (Predictor.open(file).logits(pixels) for file in (fp32, int8))
    first, second = exact.argmax(1), quantized.argmax(1)
    return Parity(
        float((first == labels).mean()),
        float((second == labels).mean()),
        float((first == second).mean()),
        float(np.abs(quantized - exact).max()),
        float(np.linalg.norm(quantized - exact) / np.linalg.norm(exact)),
    )


def measure_int8(fp32: Path, images: ImageSet, int8: Path) -> dict[str, Any]:
    """Quantize a rootstock into the file `int8`, and measure both as they run on a device.

    Returns: the entries of graft.json for the int8 file and for the memory of inference.
    Raises: OutputError when the network cannot be quantized or the file cannot be written.
    """
    train, val = images.subset("train").pixels, images.subset("val")
    rows = np.linspace(0, len(train) - 1, min(CALIBRATION_IMAGES, len(train))).astype(int)
    int8_bytes = quantize_onnx(fp32, int8, train[rows])
    compared = parity(fp32, int8, val.pixels, val.labels)
    test = file_scores(Predictor.open(int8), images.subset("test"))
    p50, p95 = file_latency(int8, images.pixels[:1])
    return {
        "int8_bytes": int8_bytes,
        "int8": {
            "val_accuracy": compared.accuracy_int8,
            "test_accuracy": test.accuracy,
            "test_interval": list(test.interval),
            "p50_ms": p50,
            "p95_ms": p95,
            "agreement": compared.agreement,
        },
        "peak_rss_bytes": inference_rss_bytes(fp32),
    }


_INFERENCE = """
import sys
from pathlib import Path
import numpy as np
from graftkit.parallel import peak_rss_bytes
from graftkit.vision.predict import Predictor
predictor = Predictor.open(Path(sys.argv[1]), threads=1)
predictor.logits(np.zeros((1, 3, predictor.size, predictor.size), np.uint8))
print(peak_rss_bytes())
"""


def inference_rss_bytes(path: Path) -> int:
    """Peak memory of a new process that opens a rootstock and classifies one image on one thread.

    Python, NumPy and onnxruntime take some 60 MB of it; torch is not loaded.
    Raises: RootstockError when the file cannot be used.
    """
    done = subprocess.run(
        [sys.executable, "-c", _INFERENCE, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RootstockError(f"{path}: cannot be run in a process of its own ({reason})")
    return int(done.stdout)
