"""What a run found, as the one dictionary that graft.json, the page and the command line read.

What a result says, in sentences: is the rootstock worth it?
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from graftkit.config import VERSION
from graftkit.files import replaced_file
from graftkit.vision.costs import file_latency
from graftkit.vision.donor import Donor
from graftkit.vision.evaluate import Measured, file_scores, inference_rss_bytes, parity
from graftkit.vision.features import POOLINGS
from graftkit.vision.images import ImageSet
from graftkit.vision.int8 import quantize_onnx
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


Result = Mapping[str, Any]
SAME_SIZE = 1.02  # of the rootstock's bytes: equal parameters in a few more nodes count as equal
DONORS = ("fine-tuned donor", "donor, last layer")


@dataclass(frozen=True)
class Verdict:
    """Attributes: pays: every baseline of its size is clearly worse. sentences: for a reader."""

    pays: bool
    sentences: tuple[str, ...]


def judge(result: Result) -> Verdict:
    """Compare the rootstock with the donor, and with every baseline whose file is no larger.

    The best of these decides, by the rootstock's lead in test accuracy: where the lead's 95 %
    interval is above 0 grafting pays, below 0 it does not, and otherwise the question is open.
    """
    own, size = result.get("test_accuracy"), result.get("bytes")
    if own is None or size is None:
        return Verdict(False, ("The rootstock was not measured on test images.",))
    low, high = result.get("test_interval") or (own, own)
    first = (
        f"The rootstock has {megabytes(size)} MB and reaches {percent(own)} % "
        f"[{percent(low)}, {percent(high)}] on the test images{_against_donor(result)}."
    )
    rivals = {
        name: numbers
        for name, numbers in result.get("baselines", {}).items()
        if numbers.get("lead_interval") is not None
        and numbers.get("bytes", float("inf")) <= SAME_SIZE * size
    }
    if not rivals:
        return Verdict(
            False, (first, "No baseline of its size was run: whether grafting pays is open.")
        )
    name, best = min(rivals.items(), key=lambda rival: rival[1]["lead"])
    low, high = best["lead_interval"]
    if low > 0:
        word = "pays here"
    elif high < 0:
        word = "does not pay here"
    else:
        word = "may or may not pay here"
    told = (
        f"Grafting {word}: of the baselines of its size, {name} ({megabytes(best['bytes'])} MB) "
        f"comes nearest with {percent(best['test_accuracy'])} %; the rootstock's lead is "
        f"{100 * best['lead']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]."
    )
    return Verdict(low > 0, (first, told))


def reference_donor(result: Result) -> tuple[str, Result]:
    """Name and numbers of the whole donor's classifier: fine-tuned where it was. Or "" and {}."""
    baselines = result.get("baselines", {})
    name = next((name for name in DONORS if name in baselines), "")
    return name, baselines.get(name, {})


def percent(share: float) -> str:
    """A share between 0 and 1 in per cent, with one digit."""
    return f"{100 * share:.1f}"


def megabytes(count: float) -> str:
    """Bytes in units of 10⁶."""
    return f"{count / 1e6:.2f}"


def _against_donor(result: Result) -> str:
    name, donor = reference_donor(result)
    if donor.get("test_accuracy") is None or donor.get("bytes") is None:
        return ""
    return (
        f"; the {name} of {megabytes(donor['bytes'])} MB reaches "
        f"{percent(donor['test_accuracy'])} %"
    )
