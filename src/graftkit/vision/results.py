"""What a run found, as the one dictionary that graft.json, the page and the command line read."""

import base64
import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from graftkit.config import VERSION
from graftkit.files import replaced_file
from graftkit.vision.donor import Donor
from graftkit.vision.features import POOLINGS
from graftkit.vision.images import ImageSet
from graftkit.vision.int8 import quantize_onnx
from graftkit.vision.measuring import Measured, file_latency, file_scores
from graftkit.vision.parity import inference_rss_bytes, parity
from graftkit.vision.predict import Predictor
from graftkit.vision.rootstock import Scion
from graftkit.vision.thinning import hidden_channels

CALIBRATION_IMAGES = 256  # of training, for the ranges of int8
SHOWN_MISTAKES = 24
DROP = 0.01  # of validation accuracy by int8, above which the report warns


def deployed(main: Measured, images: ImageSet, int8: Path) -> dict[str, Any]:
    """Quantize the rootstock, and measure both files as they would run on a device."""
    train = images.part("train").pixels
    chosen = np.linspace(0, len(train) - 1, min(CALIBRATION_IMAGES, len(train))).astype(int)
    int8_bytes = quantize_onnx(main.file, int8, train[chosen])
    val = images.part("val")
    same = parity(main.file, int8, val.pixels, val.labels)
    test = file_scores(Predictor.open(int8), images.part("test"))
    p50, p95 = file_latency(int8, images.pixels[:1])
    return {
        "int8_bytes": int8_bytes,
        "int8": {
            "val_accuracy": same.accuracy_int8,
            "test_accuracy": test.accuracy,
            "test_interval": list(test.interval),
            "p50_ms": p50,
            "p95_ms": p95,
            "agreement": same.agreement,
        },
        "peak_rss_bytes": inference_rss_bytes(main.file),
    }


def doubts_of_int8(result: dict[str, Any]) -> list[str]:
    """What a reader should know of the int8 file."""
    drop = result["val_accuracy"] - result["int8"]["val_accuracy"]
    if drop <= DROP:
        return []
    return [f"int8 names {100 * drop:.1f} % fewer validation images rightly than float32."]


def scion_rows(scion: Scion, taken: Donor, donor: Donor) -> list[Any]:
    """Of every layer that is kept: its pooled features, and which of them the head reads.

    `read` holds runs [first, behind the last] of features; all channels of the first pooling come
    before those of the next. Hidden channels are those inside the layer that could be taken out.

    Args:
        taken: whose layers the rootstock has, thinned perhaps. donor: before that.
    """
    hidden, left = hidden_channels(donor), hidden_channels(taken)
    return [
        {
            "layer": donor.layer_names[index],
            "index": index,
            "channels": donor.channels[index] * len(POOLINGS),
            "kept": len(scion.channels.get(index, ())),
            "read": runs(scion.channels.get(index, ())),
            "hidden": hidden[index],
            "hidden_kept": left[index],
        }
        for index in range(scion.cut)
    ]


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs [first, behind the last]."""
    if not numbers:
        return []
    parts = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(part[0]), int(part[-1]) + 1] for part in parts]


def mistakes(main: Measured, images: ImageSet) -> list[dict[str, Any]]:
    """Test images that are named wrongly, the most confident first."""
    part = images.part("test")
    shares = torch.softmax(main.test.logits, dim=1)
    confidence, answers = shares.max(dim=1)
    wrong = np.flatnonzero(answers.numpy() != part.labels)
    order = wrong[np.argsort(-confidence.numpy()[wrong], kind="stable")][:SHOWN_MISTAKES]
    return [
        {
            "name": part.names[index],
            "label": images.classes[part.labels[index]],
            "predicted": images.classes[int(answers[index])],
            "confidence": float(confidence[index]),
            "thumbnail": _thumbnail(part.pixels[index]),
        }
        for index in order
    ]


def versions() -> dict[str, str]:
    """Of graftkit and of what it computes with."""
    return {"graftkit": VERSION} | {name: version(name) for name in ("torch", "onnxruntime")}


def write_json(result: dict[str, Any], file: Path) -> None:
    """Write a result, whole or not at all. Raises: OutputError."""
    with replaced_file(file) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _thumbnail(pixels: np.ndarray) -> str:
    """JPEG of an image (3, size, size), base64."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
