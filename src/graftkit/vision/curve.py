"""Accuracy against cost: every cut of a donor as a rootstock that reads all its features."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from graftkit.errors import OutputError
from graftkit.vision.costs import module_cost
from graftkit.vision.donor import Donor
from graftkit.vision.export import export_onnx
from graftkit.vision.features import FeatureTable, Report, cache_key
from graftkit.vision.images import ImageSet
from graftkit.vision.measuring import file_latency
from graftkit.vision.norms import fold_rootstock
from graftkit.vision.predict import Predictor
from graftkit.vision.probe import Probe
from graftkit.vision.rootstock import grow
from graftkit.vision.selection import scion_of


@dataclass(frozen=True)
class Point:
    """A rootstock cut after `cut` layers, with a linear head on all their features, frozen.

    Attributes:
        parameters, trunk_parameters: with batch normalization folded away.
        macs: multiply-accumulates of one image. bytes: of its ONNX file.
        p50_ms: median milliseconds of one image in onnxruntime.
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

    Raises: OutputError when a cut cannot be exported, or the cache cannot be written.
    """
    file = cache / f"curve-{cache_key(donor, images)}-{os.cpu_count()}.json"
    reader = TypeAdapter(list[Point])
    with suppress(OSError, ValidationError):
        return reader.validate_json(file.read_bytes())
    points = []
    for index, probe in enumerate(probes):
        report("cost of every cut", index, len(probes))
        points.append(_point(donor, table, index + 1, probe, images, cache))
    report("cost of every cut", len(probes), len(probes))
    partial = file.with_suffix(".partial")
    try:
        partial.write_text(json.dumps([asdict(point) for point in points], indent=1))
        partial.replace(file)
    except OSError as error:
        raise OutputError(
            f"{file}: cannot be written ({error}); free some space or name another --cache"
        ) from error
    return points


def _point(
    donor: Donor, table: FeatureTable, cut: int, probe: Probe, images: ImageSet, cache: Path
) -> Point:
    scion = scion_of(table, table.columns(range(cut)))
    folded = fold_rootstock(grow(donor, scion, images.classes, probe.head()))
    file = cache / "cut.onnx"
    size = export_onnx(folded, file, donor.size, images.classes, donor.name)
    p50, _ = file_latency(Predictor.open(file), images.pixels[:1])
    file.unlink()
    return Point(
        cut,
        donor.layer_names[cut - 1],
        sum(weights.numel() for weights in folded.parameters()),
        sum(weights.numel() for weights in folded.trunk.parameters()),
        module_cost(folded, donor.size).macs,
        size,
        p50,
        probe.val_accuracy,
        probe.val_loss,
    )
