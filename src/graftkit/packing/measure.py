"""What packing learns about the weights before it decides anything: digests, energies, bases."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftkit.checkpoint import FLOAT_DTYPES, Checkpoint, all_finite, difference, tensor_digest
from graftkit.compress.allocate import MatrixFacts, output_energy
from graftkit.compress.codecs import TensorLayout, matrices, matrix_shape
from graftkit.compress.lowrank import eigenbasis, right_rows
from graftkit.compress.quantize import cholesky, feedback_gain
from graftkit.errors import CheckpointError
from graftkit.files import WorkFolder
from graftkit.models.architecture import ModuleKind
from graftkit.models.backward import (
    EMBEDDING_GRADIENT,
    GRADIENT,
    HEAD_COMPLETIONS,
    HEAD_GRADIENT,
    collect_sensitivities,
)
from graftkit.models.calibration import HEAD, CovarianceStore, collect_covariances
from graftkit.packing.pairs import TensorPair
from graftkit.progress import Progress
from graftkit.rows import Row
from graftkit.skillpack.manifest import CalibrationInfo

PRUNE_SHARES = (
    *(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2),
    *(0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 1.0),
)
"""Shares of entries that pruning may keep."""

SHRINKAGE = 0.01
"""Share of the mean eigenvalue mixed into a covariance, so that directions which the calibration
rows never took are not free; GPTQ's damping."""

DATA_FREE_LOGIT_SENSITIVITY = 100.0
"""Weight of a relative error in the logits against one inside a layer, which the residual stream
dilutes, where no calibration tells. Chosen on training rows of the nursery (docs/lab-log.md,
2026-11-22)."""

SENSITIVITY_POWER = 0.7
"""What a sensitivity is raised to before it weighs an error. It is the curvature at the tuned
model, where many answers are certain; larger errors leave that plateau, and differences shrink.
Chosen on training rows of the nursery (docs/lab-log.md, 2026-11-22)."""

UNKNOWN_SENSITIVITY = 0.1
"""Divergence for a relative error of 1 in a module that no gradient reached, such as an expert."""

SMALLEST_DELTA, LARGEST_DELTA = 2.0**-40, 2.0**16
"""Peak of a delta that lossy codecs take; others are stored exactly."""


_SAMPLE = 2**22
_SMALLEST_TRACE = 1e-30
_QUANTILES = 16


@dataclass(frozen=True)
class Scan:
    """Digests and finiteness of one pair.

    changed: any bit differs between the two states. extreme: lossy codecs cannot hold the delta.
    """

    name: str
    target_digest: str
    tuned_digest: str
    changed: bool
    extreme: bool = False


def scan_pair(pair: TensorPair, target: Checkpoint, tuned: Checkpoint) -> Scan:
    """Read both states once.

    Raises: CheckpointError when a weight is NaN or infinite in one state, and not alike in the
        other.
    """
    before, after = pair.read_target(target), tuned.read(pair.tuned.name)
    if before.is_floating_point() and after.is_floating_point():
        _check_finite(pair, (target, before), (tuned, after))
    digests = tensor_digest(before), tensor_digest(after)
    same = digests[0] == digests[1] and before.dtype == after.dtype and not pair.resized
    if not same and pair.tuned.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{tuned.path}: {pair.name} is {pair.tuned.dtype} and differs from the target's; "
            f"expected {', '.join(FLOAT_DTYPES)} for weights that change"
        )
    extreme = not same and pair.lossy and is_extreme(before, after)
    return Scan(pair.name, *digests, changed=not same, extreme=extreme)


def is_extreme(before: Tensor, after: Tensor) -> bool:
    """Whether lossy codecs cannot hold after − before, or its error could leave after's dtype.

    Codecs keep steps in float16 and square deltas in float32. Only rows that both states have are
    looked at.
    """
    most = torch.finfo(after.dtype).max
    rows = min(len(before), len(after))
    old, new = (torch.split(part[:rows].reshape(-1), _SAMPLE) for part in (before, after))
    delta = result = 0.0
    for first, second in zip(old, new, strict=True):
        second = second.float()
        peaks = [(second - first.to(after.dtype)).abs().max(), second.abs().max()]
        delta, result = max(delta, float(peaks[0])), max(result, float(peaks[1]))
        if not peaks[0].isfinite():  # max() above would lose a NaN
            return True
    largest = min(LARGEST_DELTA, most / 8)
    return not (SMALLEST_DELTA <= delta <= largest or delta == 0) or result > most / 2


def _check_finite(
    pair: TensorPair, target: tuple[Checkpoint, Tensor], tuned: tuple[Checkpoint, Tensor]
) -> None:
    """Weights that are NaN or infinite must be the same in both states: they are unchanged."""
    odd = [not all_finite(target[1]), not all_finite(tuned[1])]
    if not any(odd):
        return
    before, after, added = target[1].to(tuned[1].dtype), tuned[1], tuned[1].new_zeros(0)
    if pair.resized:
        rows = pair.common_rows
        before, after, added = before[:rows], after[:rows], after[rows:]
    places = ~(before.isfinite() & after.isfinite())
    alike = tensor_digest(before[places]) == tensor_digest(after[places])
    if alike and all_finite(added):
        return
    checkpoint = target[0] if odd[0] and not odd[1] else tuned[0]
    raise CheckpointError(
        f"{checkpoint.path}: {pair.name} holds NaN or infinite weights that the other model has "
        "not; train or save the model again"
    )


@dataclass(frozen=True)
class CalibrationStatistics:
    """What the tuned model did on the calibration rows.

    covariances: Σ x xᵀ of inputs over `tokens` tokens. sensitivities: see models/backward.py;
    None for a recipe that weighs no errors.
    """

    covariances: CovarianceStore
    sensitivities: CovarianceStore | None
    tokens: int


@dataclass(frozen=True)
class CalibrationRows:
    """Rows to measure activations on, and what the manifest says of their file."""

    rows: Sequence[Row]
    source: str
    digest: str


def collect_statistics(
    tuned: Checkpoint,
    calibration: CalibrationRows,
    modules: Sequence[str],
    seed: int,
    folder: Path,
    weighing: bool,
    progress: Progress,
) -> tuple[CalibrationStatistics, CalibrationInfo]:
    """Run the tuned model on the rows; its statistics go to `folder`.

    weighing: measure sensitivities too, which takes a backward pass.
    """
    rows, covariances = calibration.rows, CovarianceStore(folder / "activations")
    step = partial(progress, "calibrating")
    summary = collect_covariances(tuned, rows, modules, covariances, seed, step)
    sensitivities = None
    if weighing:
        sensitivities, step = CovarianceStore(folder / "gradients"), partial(progress, "weighing")
        collect_sensitivities(tuned, rows, modules, sensitivities, seed, step)
    info = CalibrationInfo(
        source=calibration.source,
        blake3=calibration.digest,
        rows=summary.rows,
        tokens=summary.tokens,
        seed=seed,
    )
    return CalibrationStatistics(covariances, sensitivities, summary.tokens), info


@dataclass(frozen=True)
class ErrorMetric:
    """How the error of one tensor is measured.

    covariance: H of the inputs, (n, n), normalized to trace n and shrunk; None where unknown.
    weight: divergence for a squared error of 1 under it, in nats; None where unknown.
    """

    covariance: Tensor | None = None
    weight: float | None = None


@dataclass(frozen=True)
class TensorFlags:
    """logits: the tensor makes the logits. calibrated: other tensors weigh in nats.
    trainable: its factors can be trained."""

    logits: bool
    calibrated: bool
    trainable: bool


def metric_of(pair: TensorPair, activity: CalibrationStatistics | None, tied: bool) -> ErrorMetric:
    """The metric of one tensor; tied: an embedding that is the output head too."""
    if activity is None or pair.layout.startswith("stack"):
        return ErrorMetric()
    head = pair.role.kind is ModuleKind.HEAD or tied
    known = activity.sensitivities
    if known is None or HEAD_COMPLETIONS not in known:
        key = HEAD if head else pair.role.module
        linear = head or pair.role.linear
        found = linear and key in activity.covariances
        return _metric(pair, activity.covariances.get(key) if found else None, None)
    if head or pair.role.kind is ModuleKind.EMBEDDING:
        return _vocabulary_metric(pair, known, head, tied or not head)
    key, module = f"{GRADIENT}{pair.role.module}", pair.role.module
    if key not in known or module not in activity.covariances or not pair.role.linear:
        return ErrorMetric()
    return _metric(pair, activity.covariances.get(module) / activity.tokens, known.get(key))


def _vocabulary_metric(
    pair: TensorPair, known: CovarianceStore, head: bool, lookup: bool
) -> ErrorMetric:
    """Errors of a row count where its token is read, and where it gets a logit."""
    covariance = torch.zeros(0)
    if head:
        chances = known.get(HEAD_GRADIENT)
        covariance = known.get(HEAD_COMPLETIONS) * float(chances.mean())
    if lookup and EMBEDDING_GRADIENT in known:
        columns = matrix_shape(pair.common_shape, pair.layout)[1][1]
        read = torch.eye(columns) * float(known.get(EMBEDDING_GRADIENT).mean())
        covariance = covariance + read if head else read
    return _metric(pair, covariance, torch.ones(1))


def _metric(pair: TensorPair, covariance: Tensor | None, sensitivity: Tensor | None) -> ErrorMetric:
    columns = matrix_shape(pair.common_shape, pair.layout)[1][1]
    if covariance is None or covariance.shape != (columns, columns):
        return ErrorMetric()
    trace = float(covariance.diagonal().sum())
    if not _SMALLEST_TRACE < trace < math.inf:
        return ErrorMetric()  # no input of note: its directions are rounding errors
    covariance = covariance * ((1 - SHRINKAGE) * columns / trace)
    covariance.diagonal().add_(SHRINKAGE)
    if sensitivity is None:
        return ErrorMetric(covariance)
    divergence = 0.5 * float(sensitivity.mean()) * trace / columns
    return ErrorMetric(covariance, divergence**SENSITIVITY_POWER)


def known_facts(work: WorkFolder, index: int) -> MatrixFacts | None:
    """What `measure_pair` left in the work folder, or None."""
    known = work.read_json(_facts_name(index))
    if known is None:
        return None
    return MatrixFacts(
        shape=(known["shape"][0], known["shape"][1]),
        count=known["count"],
        energies=np.array(known["energies"]),
        norms=np.array(known["norms"]),
        gain=known["gain"],
        kept_energy=tuple((share, kept) for share, kept in known["kept"]),
        weight=known["weight"],
        spread=np.array(known["spread"]),
        trainable=known["trainable"],
    )


def basis_name(index: int) -> str:
    """File of a tensor's bases in the work folder, (matrices, side, k) float32."""
    return f"basis-{index}.npy"


def measure_pair(
    pair: TensorPair,
    states: tuple[Tensor, Tensor],
    metric: ErrorMetric,
    flags: TensorFlags,
    work: WorkFolder,
    index: int,
) -> None:
    """Energies of the delta's components, and the bases needed to encode it, to the work folder.

    Args:
        metric: how energies are taken; an empty one takes those of the delta itself.
    """
    before, after = states
    covariance = metric.covariance
    delta = difference(after, before)
    layout: TensorLayout = pair.layout
    count, shape = matrix_shape(pair.common_shape, layout)
    energies, norms = np.zeros(min(shape)), np.zeros(min(shape))
    bases = []
    for matrix in matrices(delta, layout):
        values, basis = eigenbasis(matrix, covariance)
        energies += values.numpy()
        norms += values.numpy() if covariance is None else _squared_norms(matrix, basis)
        bases.append(basis)
    work.write_array(basis_name(index), torch.stack(bases).numpy())
    finite = after if all_finite(after) else after.nan_to_num(0.0, 0.0, 0.0)
    output = sum(output_energy(part, covariance) for part in matrices(finite, layout))
    facts = {
        "shape": shape,
        "count": count,
        "energies": energies.tolist(),
        "norms": norms.tolist(),
        "gain": feedback_gain(covariance),
        "kept": _kept_energy(delta) if pair.gathered else [],
        "weight": metric.weight or (_sensitivity(flags) / output if output else 1.0),
        "trainable": flags.trainable,
        "spread": _spread(matrices(delta, layout)[0], covariance),
    }
    work.write_json(_facts_name(index), facts)


def _spread(delta: Tensor, covariance: Tensor | None) -> list[float]:
    """Energies of entries over their mean, from quantiles of the energies of rows and columns."""
    seen = delta if covariance is None else delta @ cholesky(covariance)
    squares = seen.square()
    quantiles = (torch.arange(_QUANTILES, dtype=torch.float32) + 0.5) / _QUANTILES
    sides = [squares.mean(dim=side).quantile(quantiles) for side in (0, 1)]
    grid = (sides[0][:, None] * sides[1]).reshape(-1).double()
    return (grid / grid.mean().clamp(min=1e-300)).tolist()


def _facts_name(index: int) -> str:
    return f"measure-{index}.json"


def _sensitivity(flags: TensorFlags) -> float:
    if flags.calibrated:
        return float(UNKNOWN_SENSITIVITY**SENSITIVITY_POWER)
    return DATA_FREE_LOGIT_SENSITIVITY if flags.logits else 1.0


def _squared_norms(delta: Tensor, basis: Tensor) -> np.ndarray:
    """‖s_k u_k v_kᵀ‖² of every component."""
    return right_rows(delta, basis).square().sum(dim=1).double().numpy()


def _kept_energy(delta: Tensor) -> list[tuple[float, float]]:
    """Share of the energy in the largest entries, estimated on an evenly spaced sample."""
    flat = delta.reshape(-1)
    squares = flat[:: max(1, flat.numel() // _SAMPLE)].double().square()
    ordered = squares.sort(descending=True).values.cumsum(0)
    total = float(ordered[-1])
    if total <= 0:
        return []
    last = ordered.numel() - 1
    return [
        (share, float(ordered[min(last, round(share * last))]) / total) for share in PRUNE_SHARES
    ]


def job_key(scans: list[Scan], settings: Mapping[str, object]) -> str:
    """What decides every byte of the result; a work folder of another key is not continued."""
    tensors = [(scan.name, scan.target_digest, scan.tuned_digest) for scan in scans]
    return json.dumps({"settings": settings, "tensors": tensors}, sort_keys=True)
