"""The result of a run: the dictionary in graft.json, which the page and the command line show.

`judge` decides whether grafting paid off, and says so in sentences.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from graftkit.config import VERSION
from graftkit.files import replaced_file
from graftkit.vision.baselines import DONOR, LAST_LAYER, ROOTSTOCK
from graftkit.vision.choose import CostBudget, DonorCuts, ScionChoice
from graftkit.vision.evaluate import Measurement, accuracy_lead
from graftkit.vision.images import SPLITS, ImageSet
from graftkit.vision.probe import POOLINGS
from graftkit.vision.thinning import hidden_channels
from graftkit.vision.training import TrainedNetwork

Result = Mapping[str, Any]
MeasuredNetworks = dict[str, tuple[TrainedNetwork, Measurement]]
"""By name: the rootstock, and what it is compared with."""
SHOWN_MISTAKES = 24
INT8_DROP = 0.01  # of validation accuracy, above which the report warns
SAME_SIZE = 1.02  # of the rootstock's bytes: equal parameters in a few more nodes count as equal
REFERENCE_DONORS = (DONOR, LAST_LAYER)


def cuts_record(cuts: DonorCuts, choice: ScionChoice, budget: CostBudget) -> dict[str, Any]:
    """The donor, the images, the budget and the scion that was chosen."""
    images = cuts.images
    counts = np.bincount(images.splits, minlength=len(SPLITS)).tolist()
    return {
        "donor": cuts.donor.name,
        "classes": list(images.classes),
        "images": dict(zip(SPLITS, counts, strict=True)),
        "skipped": [asdict(skipped) for skipped in images.skipped],
        "budget": asdict(budget),
        "rule": choice.rule,
        "scion": _scion_record(choice, cuts),
        "curve": [asdict(point) for point in cuts.curve],
        "versions": {"graftkit": VERSION}
        | {name: version(name) for name in ("torch", "onnxruntime")},
    }


def networks_record(measured: MeasuredNetworks, images: ImageSet) -> dict[str, Any]:
    """The rootstock's numbers, and under `baselines` the others' with its lead over them."""
    network, rootstock = measured[ROOTSTOCK]
    records = {
        name: one.to_record(images.classes) | {"draws": list(trained.draws)}
        for name, (trained, one) in measured.items()
    }
    own = records.pop(ROOTSTOCK)
    for name, record in records.items():
        lead, interval = accuracy_lead(rootstock.test.right, measured[name][1].test.right)
        record |= {"lead": lead, "lead_interval": list(interval)}
    return {
        **own,
        "confusion": [list(row) for row in rootstock.test.confusion],
        "baselines": records,
        "mistakes": _mistakes(rootstock, images),
        "history": [asdict(epoch) for epoch in network.history],
    }


def warnings_of(result: Result, budget: CostBudget, rootstock: Measurement) -> list[str]:
    """Sentences about a missed budget and about what int8 costs."""
    warnings = []
    # Milliseconds are measured once for the choice and once at the end.
    cost = {"bytes": rootstock.bytes, "ms": rootstock.p50_ms, "macs": rootstock.macs}[budget.kind]
    if cost > budget.amount:
        warnings.append(
            f"The rootstock came out at {budget.format(cost)}, over the budget of {budget.text}."
        )
    drop = result["val_accuracy"] - result["int8"]["val_accuracy"]
    if drop > INT8_DROP:
        warnings.append(
            f"int8 names {100 * drop:.1f} % fewer validation images rightly than float32."
        )
    return warnings


def _scion_record(choice: ScionChoice, cuts: DonorCuts) -> list[dict[str, Any]]:
    """For every layer of the trunk: its pooled features, and which of them the head reads.

    `read` holds runs [first, behind the last] of features; all channels of the first pooling come
    before those of the next. Hidden channels are those inside the layer that could be removed.
    """
    donor, scion = cuts.donor, choice.scion
    before, after = hidden_channels(donor), hidden_channels(choice.donor)
    return [
        {
            "layer": donor.layer_names[index],
            "index": index,
            "channels": donor.channels[index] * len(POOLINGS),
            "kept": len(scion.channels.get(index, ())),
            "read": _runs(scion.channels.get(index, ())),
            "hidden": before[index],
            "hidden_kept": after[index],
        }
        for index in range(scion.cut)
    ]


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs [first, behind the last]."""
    if not numbers:
        return []
    parts = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(part[0]), int(part[-1]) + 1] for part in parts]


def _mistakes(rootstock: Measurement, images: ImageSet) -> list[dict[str, Any]]:
    """Test images that are named wrongly, the most confident first."""
    test = images.subset("test")
    probabilities = torch.softmax(rootstock.test.logits, dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = np.flatnonzero(predicted.numpy() != test.labels)
    order = wrong[np.argsort(-confidence.numpy()[wrong], kind="stable")][:SHOWN_MISTAKES]
    return [
        {
            "name": test.names[index],
            "label": images.classes[test.labels[index]],
            "predicted": images.classes[int(predicted[index])],
            "confidence": float(confidence[index]),
            "thumbnail": _thumbnail(test.pixels[index]),
        }
        for index in order
    ]


def write_json(result: Result, file: Path) -> None:
    """Write a result, whole or not at all. Raises: OutputError."""
    with replaced_file(file) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _thumbnail(pixels: np.ndarray) -> str:
    """JPEG of an image (3, size, size), base64."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class GraftVerdict:
    """Whether grafting pays here: every baseline of the rootstock's size is clearly worse.

    Attributes:
        sentences: for a reader.
    """

    pays: bool
    sentences: tuple[str, ...]


def judge(result: Result) -> GraftVerdict:
    """Compare the rootstock with the donor, and with every baseline whose file is no larger.

    The best of these baselines decides, by the rootstock's lead in test accuracy: grafting pays
    where the lead's 95 % interval is above 0, does not pay where it is below 0, and otherwise the
    question is open.
    """
    accuracy, size = result.get("test_accuracy"), result.get("bytes")
    if accuracy is None or size is None:
        return GraftVerdict(False, ("The rootstock was not measured on test images.",))
    low, high = result.get("test_interval") or (accuracy, accuracy)
    first = (
        f"The rootstock has {megabytes(size)} MB and reaches {percent(accuracy)} % "
        f"[{percent(low)}, {percent(high)}] on the test images{_donor_clause(result)}."
    )
    rivals = {
        name: numbers
        for name, numbers in result.get("baselines", {}).items()
        if numbers.get("lead_interval") is not None
        and numbers.get("bytes", float("inf")) <= SAME_SIZE * size
    }
    if not rivals:
        reason = "No baseline of its size was trained"
        if not result.get("baselines_trained", True):
            reason += " (--baselines trains them)"
        return GraftVerdict(False, (first, f"{reason}: whether grafting pays is open."))
    name, best = min(rivals.items(), key=lambda rival: rival[1]["lead"])
    low, high = best["lead_interval"]
    if low > 0:
        word = "pays here"
    elif high < 0:
        word = "does not pay here"
    else:
        word = "may or may not pay here"
    second = (
        f"Grafting {word}: of the baselines of its size, {name} ({megabytes(best['bytes'])} MB) "
        f"comes nearest with {percent(best['test_accuracy'])} %; the rootstock's lead is "
        f"{100 * best['lead']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]."
    )
    return GraftVerdict(low > 0, (first, second))


def reference_donor(result: Result) -> tuple[str, Result]:
    """Name and numbers of the whole donor's classifier: fine-tuned where it was. Or "" and {}."""
    baselines = result.get("baselines", {})
    name = next((name for name in REFERENCE_DONORS if name in baselines), "")
    return name, baselines.get(name, {})


def percent(share: float) -> str:
    """A share between 0 and 1 in per cent, with one digit."""
    return f"{100 * share:.1f}"


def megabytes(count: float) -> str:
    """Bytes in units of 10⁶."""
    return f"{count / 1e6:.2f}"


def _donor_clause(result: Result) -> str:
    name, donor = reference_donor(result)
    if donor.get("test_accuracy") is None or donor.get("bytes") is None:
        return ""
    return (
        f"; the {name} of {megabytes(donor['bytes'])} MB reaches "
        f"{percent(donor['test_accuracy'])} %"
    )
