"""What packing measures before it decides anything.

scan         digests of both states; weights that are not finite
calibration  what the tuned model does on rows, and the error metric of every tensor that follows
facts        energies of a delta's components, and the basis that encoding uses
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
"""Share of the mean eigenvalue mixed into a covariance (GPTQ's damping). Without it, errors along
directions that no calibration row takes would cost nothing."""

DATA_FREE_LOGIT_SENSITIVITY = 100.0
"""Weight of a relative error in the logits, without calibration. An error inside a layer has weight
1: the residual stream dilutes it. Chosen on training rows of the nursery (docs/lab-log.md,
2026-11-22)."""

SENSITIVITY_POWER = 0.7
"""Exponent of a sensitivity before it weighs an error. A sensitivity is the curvature at the tuned
model, where many answers are certain. Larger errors leave that plateau, and the differences between
modules shrink. Chosen on training rows of the nursery (docs/lab-log.md, 2026-11-22)."""

UNKNOWN_SENSITIVITY = 0.1
"""Divergence, in nats, for a relative error of 1 in a module that no gradient reaches, such as an
expert."""

SMALLEST_DELTA, LARGEST_DELTA = 2.0**-40, 2.0**16
"""Least and largest peak of a delta that lossy codecs encode; any other is stored exactly."""


_SAMPLE = 2**22
_CACHED = 2**16  # weights whose float32 stays in a core's cache
_SMALLEST_TRACE = 1e-30
_QUANTILES = 16


@dataclass(frozen=True)
class Scan:
    """Digests and finiteness of one pair.

    Attributes:
        target_digest, tuned_digest: BLAKE3 of both states.
        changed: any bit differs between them. extreme: lossy codecs cannot hold the delta.
    """

    name: str
    target_digest: str
    tuned_digest: str
    changed: bool
    extreme: bool = False


def scan_pair(pair: TensorPair, target: Checkpoint, tuned: Checkpoint) -> Scan:
    """Read both states once.

    Raises: CheckpointError for a weight that is NaN or infinite and not the same in both states, or
        for integers that differ.
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
    """Whether lossy codecs cannot hold after − before, or an error could leave after's dtype.

    Codecs store steps in float16 and square deltas in float32. Only rows that both states have
    count.
    """
    dtype_max = torch.finfo(after.dtype).max
    rows = min(len(before), len(after))
    blocks = (torch.split(part[:rows].reshape(-1), _CACHED) for part in (before, after))
    delta_peak = result_peak = 0.0
    for old, new in zip(*blocks, strict=True):
        new = new.float()
        delta = _peak(new - old.to(after.dtype).float())
        if not math.isfinite(delta):  # max() below would lose a NaN
            return True
        delta_peak = max(delta_peak, delta)
        result_peak = max(result_peak, _peak(new))
    largest = min(LARGEST_DELTA, dtype_max / 8)
    codable = delta_peak == 0 or SMALLEST_DELTA <= delta_peak <= largest
    return not codable or result_peak > dtype_max / 2


def _peak(values: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _check_finite(
    pair: TensorPair, target: tuple[Checkpoint, Tensor], tuned: tuple[Checkpoint, Tensor]
) -> None:
    """Weights that are NaN or infinite must have the same bits in both states.

    Raises: CheckpointError.
    """
    damaged = [not all_finite(target[1]), not all_finite(tuned[1])]
    if not any(damaged):
        return
    before, after, added = target[1].to(tuned[1].dtype), tuned[1], tuned[1].new_zeros(0)
    if pair.resized:
        rows = pair.common_rows
        before, after, added = before[:rows], after[:rows], after[rows:]
    places = ~(before.isfinite() & after.isfinite())
    alike = tensor_digest(before[places]) == tensor_digest(after[places])
    if alike and all_finite(added):
        return
    checkpoint = target[0] if damaged[0] and not damaged[1] else tuned[0]
    raise CheckpointError(
        f"{checkpoint.path}: {pair.name} holds NaN or infinite weights that the other model has "
        "not; train or save the model again"
    )


@dataclass(frozen=True)
class CalibrationRows:
    """Rows to measure activations on, with the name and the digest of their file."""

    rows: Sequence[Row]
    source: str
    digest: str


@dataclass(frozen=True)
class CalibrationStatistics:
    """What the tuned model does on the calibration rows.

    Attributes:
        covariances: Σ x xᵀ of the inputs of modules, over `tokens` tokens.
        sensitivities: those of models/backward.py; None for a recipe that does not weigh errors.
        info: what the manifest says of the calibration.
    """

    covariances: CovarianceStore
    sensitivities: CovarianceStore | None
    tokens: int
    info: CalibrationInfo


def collect_statistics(
    tuned: Checkpoint,
    calibration: CalibrationRows,
    modules: Sequence[str],
    seed: int,
    folder: Path,
    weighing: bool,
    progress: Progress,
) -> CalibrationStatistics:
    """Run the tuned model on the rows.

    Args:
        modules: names of the linear modules whose inputs are measured.
        folder: where the statistics are written; a later call with the same folder reads them.
        weighing: measure sensitivities too, which takes a backward pass.
    Raises: CheckpointError, RowsError, OutputError.
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
        format=rows[0].format,
    )
    return CalibrationStatistics(covariances, sensitivities, summary.tokens, info)


@dataclass(frozen=True)
class ErrorMetric:
    """How the error of one tensor is measured.

    Attributes:
        covariance: H of the inputs, (n, n), normalized to trace n and shrunk; None if unknown.
        weight: divergence for a squared error of 1 under H, in nats; None if unknown.
    """

    covariance: Tensor | None = None
    weight: float | None = None


def error_metric(
    pair: TensorPair, statistics: CalibrationStatistics | None, tied: bool
) -> ErrorMetric:
    """The metric of one tensor; tied: an embedding that is the output head too."""
    if statistics is None or pair.layout.startswith("stack"):
        return ErrorMetric()
    head = pair.role.kind is ModuleKind.HEAD or tied
    module, sensitivities = pair.role.module, statistics.sensitivities
    if sensitivities is None or HEAD_COMPLETIONS not in sensitivities:
        key = HEAD if head else module
        measured = (head or pair.role.linear) and key in statistics.covariances
        return _metric(pair, statistics.covariances.get(key) if measured else None, None)
    if head or pair.role.kind is ModuleKind.EMBEDDING:
        return _vocabulary_metric(pair, sensitivities, head, tied or not head)
    key = f"{GRADIENT}{module}"
    if key not in sensitivities or module not in statistics.covariances or not pair.role.linear:
        return ErrorMetric()
    covariance = statistics.covariances.get(module) / statistics.tokens
    return _metric(pair, covariance, sensitivities.get(key))


def _vocabulary_metric(
    pair: TensorPair, sensitivities: CovarianceStore, head: bool, lookup: bool
) -> ErrorMetric:
    """Errors of a row count where its token is read (lookup), and where it gets a logit (head)."""
    covariance = torch.zeros(0)
    if head:
        probabilities = sensitivities.get(HEAD_GRADIENT)
        covariance = sensitivities.get(HEAD_COMPLETIONS) * float(probabilities.mean())
    if lookup and EMBEDDING_GRADIENT in sensitivities:
        columns = matrix_shape(pair.common_shape, pair.layout)[1][1]
        read = torch.eye(columns) * float(sensitivities.get(EMBEDDING_GRADIENT).mean())
        covariance = covariance + read if head else read
    return _metric(pair, covariance, torch.ones(1))


def _metric(pair: TensorPair, covariance: Tensor | None, sensitivity: Tensor | None) -> ErrorMetric:
    """Normalize and shrink H, (n, n); weigh it by the sensitivities of outputs, (m,)."""
    columns = matrix_shape(pair.common_shape, pair.layout)[1][1]
    if covariance is None or covariance.shape != (columns, columns):
        return ErrorMetric()
    trace = float(covariance.diagonal().sum())
    if not _SMALLEST_TRACE < trace < math.inf:
        return ErrorMetric()  # inputs of almost zero: their directions are rounding errors
    covariance = covariance * ((1 - SHRINKAGE) * columns / trace)
    covariance.diagonal().add_(SHRINKAGE)
    if sensitivity is None:
        return ErrorMetric(covariance)
    divergence = 0.5 * float(sensitivity.mean()) * trace / columns
    return ErrorMetric(covariance, divergence**SENSITIVITY_POWER)


@dataclass(frozen=True)
class TensorFlags:
    """What decides the weight of a tensor without a measured one, and whether it is trained.

    Attributes:
        logits: the tensor makes the logits. calibrated: the weights of other tensors are in nats.
        trainable: its factors can be trained. pruned: the recipe keeps only its largest entries.
    """

    logits: bool
    calibrated: bool
    trainable: bool
    pruned: bool


def measure_tensor(
    pair: TensorPair, states: tuple[Tensor, Tensor], metric: ErrorMetric, flags: TensorFlags
) -> tuple[MatrixFacts, Tensor]:
    """What allocation needs to know of a delta, and the bases that encode it.

    Args:
        states: common rows of the target (in the tuned dtype) and of the tuned model.
        metric: of the energies; an empty one measures the delta itself.
    Returns: the facts, and the bases, (matrices, side, k) float32.
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
    finite = after if all_finite(after) else after.nan_to_num(0.0, 0.0, 0.0)
    output = sum(output_energy(part, covariance) for part in matrices(finite, layout))
    facts = MatrixFacts(
        shape=shape,
        count=count,
        energies=energies,
        norms=norms,
        gain=feedback_gain(covariance),
        kept_energy=tuple(_kept_energy(delta)) if flags.pruned else (),
        weight=metric.weight or (_default_weight(flags) / output if output else 1.0),
        spread=_spread(matrices(delta, layout)[0], covariance),
        trainable=flags.trainable,
    )
    return facts, torch.stack(bases)


def _spread(delta: Tensor, covariance: Tensor | None) -> np.ndarray:
    """Energies of entries over their mean, from quantiles of the energies of rows and columns."""
    weighted = delta if covariance is None else delta @ cholesky(covariance)
    squares = weighted.square()
    quantiles = (torch.arange(_QUANTILES, dtype=torch.float32) + 0.5) / _QUANTILES
    sides = [squares.mean(dim=side).quantile(quantiles) for side in (0, 1)]
    grid = (sides[0][:, None] * sides[1]).reshape(-1).double()
    return (grid / grid.mean().clamp(min=1e-300)).numpy()


def _default_weight(flags: TensorFlags) -> float:
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


def save_measured(work: WorkFolder, index: int, facts: MatrixFacts, bases: Tensor) -> None:
    """Write what `measure_tensor` returns; the facts last, so that they imply the bases.

    Raises: OutputError.
    """
    work.write_array(_bases_name(index), bases.numpy())
    content = asdict(facts) | {
        name: getattr(facts, name).tolist() for name in ("energies", "norms", "spread")
    }
    work.write_json(_facts_name(index), content)


def load_facts(work: WorkFolder, index: int) -> MatrixFacts | None:
    """The facts of a tensor that was measured earlier, or None."""
    content = work.read_json(_facts_name(index))
    if content is None:
        return None
    arrays = {name: np.array(content[name]) for name in ("energies", "norms", "spread")}
    kept_energy = tuple((share, energy) for share, energy in content["kept_energy"])
    fields = {"shape": tuple(content["shape"]), "kept_energy": kept_energy}
    return MatrixFacts(**(content | arrays | fields))


def load_bases(work: WorkFolder, index: int) -> Tensor | None:
    """The bases of a tensor that was measured earlier, or None."""
    bases = work.read_array(_bases_name(index))
    return None if bases is None else torch.from_numpy(bases)


def _facts_name(index: int) -> str:
    return f"measure-{index}.json"


def _bases_name(index: int) -> str:
    return f"basis-{index}.npy"
