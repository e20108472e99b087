"""What a network is worth and costs, measured on the file that would be deployed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftkit.vision.costs import median_ms, module_cost
from graftkit.vision.export import export_onnx
from graftkit.vision.images import ImageSet, Part
from graftkit.vision.norms import fold_rootstock
from graftkit.vision.predict import Predictor
from graftkit.vision.rootstock import Rootstock
from graftkit.vision.scoring import Scores, score
from graftkit.vision.training import Epoch

REPEATS = 100


@dataclass(frozen=True)
class Network:
    """A rootstock or a baseline, ready to be measured.

    Attributes:
        history: of its fine-tuning, empty where its trunk is the donor's.
        draws: test accuracies with other draws of the training images, where they were taken.
    """

    name: str
    rootstock: Rootstock
    history: tuple[Epoch, ...] = ()
    draws: tuple[float, ...] = ()


def file_stem(name: str) -> str:
    """Letters and digits of a name, other characters as hyphens: paper-s-scion."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


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


def file_latency(file: Path, image: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds that one image takes, (1, 3, size, size).

    On one thread: a small network gains little by more, and what else the machine does then
    disturbs it less.
    """
    predictor = Predictor.open(file, threads=1)
    return median_ms(lambda: predictor.logits(image), REPEATS)
