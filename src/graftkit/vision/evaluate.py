"""How good answers are: accuracy with its interval, cross-entropy, recall of every class.

What a network is worth and costs, measured on the file that would be deployed.

What int8 changes, and what inference holds in memory; both on the files, in onnxruntime.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graftkit.errors import ImagesError, RootstockError
from graftkit.vision.costs import file_latency, module_cost
from graftkit.vision.export import export_onnx
from graftkit.vision.images import ImageSet, Part
from graftkit.vision.predict import Predictor
from graftkit.vision.rootstock import Rootstock, fold_rootstock

Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Scores:
    """What a network answers on some images.

    Attributes:
        accuracy, interval: share of right answers, and its 95 % interval after Wilson.
        loss: mean cross-entropy, nats.
        recall: of every class, the share of its images that are answered with it; None where it
            has no image.
        confusion: counts, by true class and then by answer.
        logits: (n, classes), float32.
        right: bool (n,), which images are answered rightly.
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
    answers = logits.argmax(dim=1).numpy()
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, answers), 1)
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
        right=answers == np.asarray(labels),
    )


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), with p = right / count and n = count.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n)
    """
    share, scale = right / count, 1 + Z**2 / count
    center = (share + Z**2 / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def lead(own: np.ndarray, other: np.ndarray) -> tuple[float, tuple[float, float]]:
    """How far one network's accuracy is above another's on the same images, and its 95 % interval.

    Paired, so that images which both find easy or hard do not widen it: d̄ ± z √(var(d) / m), where
    d are the differences of n images and one more image for each of the two, m = n + 2; that is
    the adjusted Wald interval of Bonett and Price (2012).

    Args:
        own, other: (n,), whether an image is answered rightly, or the share of several networks.
    """
    differences = np.concatenate([own.astype(float) - other.astype(float), [1.0, -1.0]])
    mean = float(differences.mean())
    half = Z * float(differences.std()) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


@dataclass(frozen=True)
class Measured:
    """One network: what its ONNX file answers on validation and test, and what it costs.

    Attributes:
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

    def numbers(self, classes: Sequence[str]) -> dict[str, Any]:
        """For a report."""
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


def measure(rootstock: Rootstock, images: ImageSet, file: Path, donor_name: str) -> Measured:
    """Export a network to `file`, and measure that file.

    Raises: OutputError when it cannot be exported or written.
    """
    folded = fold_rootstock(rootstock)
    size = export_onnx(folded, file, folded.size, images.classes, donor_name)
    predictor = Predictor.open(file)
    p50, p95 = file_latency(file, images.pixels[:1])
    return Measured(
        file,
        file_scores(predictor, images.part("val")),
        file_scores(predictor, images.part("test")),
        sum(weights.numel() for weights in folded.parameters()),
        sum(weights.numel() for weights in folded.trunk.parameters()),
        module_cost(folded, folded.size).macs,
        size,
        p50,
        p95,
    )


def file_scores(predictor: Predictor, part: Part) -> Scores:
    """What an ONNX file answers on the images of one split."""
    return score(torch.from_numpy(predictor.logits(part.pixels)), part.labels)


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
    Raises: RootstockError for a file that is none.
    """
    expected, found = (Predictor.open(file).logits(pixels) for file in (fp32, int8))
    first, second = expected.argmax(1), found.argmax(1)
    return Parity(
        float((first == labels).mean()),
        float((second == labels).mean()),
        float((first == second).mean()),
        float(np.abs(found - expected).max()),
        float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
    )


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
    """Most memory of a new process that opens a rootstock and classifies one image, on one thread.

    It holds Python, NumPy and onnxruntime, some 60 MB, and no torch.
    Raises: RootstockError when the file cannot be used.
    """
    done = subprocess.run(
        [sys.executable, "-c", _INFERENCE, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RootstockError(f"{path}: cannot be run in a process of its own ({reason})")
    return int(done.stdout)
