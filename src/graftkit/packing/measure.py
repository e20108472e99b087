"""What packing learns about the weights before it decides anything: digests, energies, bases."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.allocate import MatrixFacts
from graftkit.compress.codecs import Layout, matrices, matrix_shape
from graftkit.compress.energy import output_energy
from graftkit.compress.lowrank import eigenbasis, right_rows
from graftkit.compress.quantize import feedback_gain
from graftkit.delta import Checkpoint, tensor_digest
from graftkit.errors import CheckpointError
from graftkit.models.architecture import ModuleKind
from graftkit.models.calibration import HEAD, CovarianceStore
from graftkit.packing.job import WorkFolder
from graftkit.packing.pairs import Pair

PRUNE_SHARES = (
    *(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2),
    *(0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 1.0),
)
"""Shares of entries that pruning may keep."""

SHRINKAGE = 0.01
"""Share of the mean eigenvalue mixed into a covariance, so that directions which the calibration
rows never took are not free; GPTQ's damping."""

TIED_SHRINKAGE = 0.5
"""The same for an embedding that is also the head: the head's covariance says nothing about
what the lookup needs."""

LOGIT_SENSITIVITY, DATA_FREE_LOGIT_SENSITIVITY = 30.0, 100.0
"""Weight of a relative error in the logits against one inside a layer, which the residual stream
dilutes. Without calibration the errors inside are overestimated (inputs take few directions), so
that the logits weigh more. Chosen on training rows of the nursery (docs/lab-log.md, 2026-11-22)."""

_SAMPLE = 2**22


@dataclass(frozen=True)
class Scan:
    """Digests and finiteness of one pair; changed: any bit differs between the two states."""

    name: str
    target_digest: str
    tuned_digest: str
    changed: bool


def scan_pair(pair: Pair, target: Checkpoint, tuned: Checkpoint) -> Scan:
    """Read both states once. Raises: CheckpointError when a weight is NaN or infinite."""
    before, after = target.read(pair.target.name), tuned.read(pair.tuned.name)
    for checkpoint, tensor in ((target, before), (tuned, after)):
        if tensor.is_floating_point() and not _all_finite(tensor):
            raise CheckpointError(
                f"{checkpoint.path}: {pair.name} holds NaN or infinite weights; "
                "train or save the model again"
            )
    digests = tensor_digest(before), tensor_digest(after)
    same = digests[0] == digests[1] and before.dtype == after.dtype and not pair.resized
    if not same and not before.is_floating_point():
        raise CheckpointError(
            f"{tuned.path}: {pair.name} is not a float tensor and differs from the target's; "
            "graftkit moves float weights only"
        )
    return Scan(pair.name, *digests, changed=not same)


def covariance_of(pair: Pair, store: CovarianceStore | None, tied: bool) -> Tensor | None:
    """H = E[x xᵀ] of a layer's inputs, normalized to trace n and shrunk; None where unknown.

    The scale does not matter to any codec; relative errors are taken in the same metric.
    """
    if store is None or pair.layout.startswith("stack"):
        return None
    head = pair.role.kind is ModuleKind.HEAD or tied
    key = HEAD if head else pair.role.module
    if key not in store or not (head or pair.role.linear):
        return None
    covariance = store.get(key)
    columns = matrix_shape(pair.common_shape, pair.layout)[1][1]
    trace = float(covariance.diagonal().sum())
    if covariance.shape[0] != columns or trace <= 0:
        return None
    covariance.mul_(columns / trace)
    shrinkage = TIED_SHRINKAGE if tied else SHRINKAGE
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage)
    return covariance


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
    )


def basis_name(index: int) -> str:
    """File of a tensor's bases in the work folder, (matrices, side, k) float32."""
    return f"basis-{index}.npy"


def measure_pair(
    pair: Pair,
    states: tuple[Tensor, Tensor],
    metric: Tensor | None,
    logits: bool,
    work: WorkFolder,
    index: int,
) -> None:
    """Energies of the delta's components, and the bases needed to encode it, to the work folder.

    Args:
        metric: H in which energies are taken, (n, n), or None for those of the delta itself.
        logits: the tensor makes the logits.
    """
    before, after = states
    delta = after.to(torch.float32, copy=True).sub_(before)
    layout: Layout = pair.layout
    count, shape = matrix_shape(pair.common_shape, layout)
    energies, norms = np.zeros(min(shape)), np.zeros(min(shape))
    bases = []
    for matrix in matrices(delta, layout):
        values, basis = eigenbasis(matrix, metric)
        energies += values.numpy()
        norms += values.numpy() if metric is None else _squared_norms(matrix, basis)
        bases.append(basis)
    work.write_array(basis_name(index), torch.stack(bases).numpy())
    output = sum(output_energy(part, metric) for part in matrices(after, layout))
    facts = {
        "shape": shape,
        "count": count,
        "energies": energies.tolist(),
        "norms": norms.tolist(),
        "gain": feedback_gain(metric),
        "kept": _kept_energy(delta) if pair.gathered else [],
        "weight": _sensitivity(logits, metric) / output if output > 0 else 1.0,
    }
    work.write_json(_facts_name(index), facts)


def _facts_name(index: int) -> str:
    return f"measure-{index}.json"


def _sensitivity(logits: bool, covariance: Tensor | None) -> float:
    if not logits:
        return 1.0
    return DATA_FREE_LOGIT_SENSITIVITY if covariance is None else LOGIT_SENSITIVITY


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


def _all_finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in torch.split(flat, _SAMPLE))


def job_key(scans: list[Scan], settings: Mapping[str, object]) -> str:
    """What decides every byte of the result; a work folder of another key is not continued."""
    tensors = [(scan.name, scan.target_digest, scan.tuned_digest) for scan in scans]
    return json.dumps({"settings": settings, "tensors": tensors}, sort_keys=True)
