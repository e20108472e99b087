"""Packs judged by rows: weights of least loss, and importances of tensors.

    min over w (and λ) of  mean −log p(token | target + λ rule(Δ; w))  over the completions' tokens

`search_weights` solves this without derivatives. The idea is LoRAHub's (arXiv 2307.13269), here on
whole deltas and with any merge rule. The search is direct, along random directions. Its step grows
after a success and shrinks otherwise (probabilistic descent, Gratton et al. 2015).

`measure_importances` says how much every tensor of a pack matters on rows, for the rule KIF.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.attachment import attached
from graftkit.attachment.target import LiveTarget
from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, ConfigError, RowsError
from graftkit.fuse.merge import PackMerge, Packs, open_merge
from graftkit.models.loading import load_model
from graftkit.models.text import (
    encode_rows,
    pad_id,
    scored_tokens,
    tokens_with_logits,
    usable_tokenizer,
)
from graftkit.parallel import in_threads
from graftkit.progress import Progress
from graftkit.rows import EncodedRow, Row, batches_by_length, pad_batch
from graftkit.skillpack import SkillPack

EVALUATIONS = 60
"""Points that a search tries by default."""
MAX_WEIGHT = 2.0
"""Largest weight and largest λ that a search tries; the smallest is 0."""
_FIRST_STEP, _SMALLEST_STEP = 0.25, 0.01
_GROWTH, _SHRINKAGE = 1.5, 0.6
_BATCH_TOKENS = 2_048  # padded tokens of one pass
_IMPORTANCE_TOKENS = 8_192  # of the rows, a seeded choice: as for sensitivities in calibration
_IMPORTANCE_SEED = 0


@dataclass(frozen=True)
class SearchedWeights:
    """The result of a search; losses are nats per completion token on the rows."""

    weights: tuple[float, ...]
    """One per pack, in the packs' order."""
    scaling: float
    """λ."""
    loss: float
    """Loss of the target with these weights."""
    loss_given: float
    """Loss of the weights that the search starts from."""
    loss_target: float
    """Loss of the target alone."""
    evaluations: int
    """Points tried."""


def search_weights(
    target: str | Path,
    packs: Packs,
    rows: Sequence[Row],
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    method: str = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    evaluations: int = EVALUATIONS,
    seed: int = 0,
) -> SearchedWeights:
    """The weights of least cross-entropy on rows; also λ, for a rule that averages.

    In memory are the target in float32, and the tensors in work, which are decoded for every point.
    The same call gives the same weights on the same machine. Their loss is never above that of the
    given weights, clipped to 0..2.

    Args:
        target: the target of all packs. packs: one or more.
        rows: with completions. Measure the merged model on other rows than these.
        weights: where the search starts, one per pack, default 1 each.
        method: a name of `graftkit.fuse.methods.METHODS`.
        settings: values of its fields. The search starts from their λ.
        evaluations: points to try, at least 2. seed: of the directions tried.
    Raises: PackMismatchError for packs of another target or that cannot be merged; ConfigError for
        wrong weights or settings, a target that does not predict tokens, or too few evaluations;
        RowsError; CheckpointError for logits that are not finite.
    """
    if evaluations < 2:
        raise ConfigError(f"evaluations is {evaluations}; a search needs at least 2")
    merge = open_merge(target, packs, weights, method, settings)
    live_loss = LiveLoss(merge, rows)
    loss_target = live_loss.measure()
    averages = merge.method.averages
    start = np.array([*merge.weights, *([merge.method.scaling] if averages else [])])
    losses: list[float] = []

    def loss(point: np.ndarray) -> float:
        try:
            losses.append(live_loss(*_split(merge, point)))
        except (CheckpointError, ConfigError):
            if not losses:
                raise
            losses.append(math.inf)  # beyond what the dtype holds: the search turns back
        if progress is not None:
            progress("searching weights", len(losses), evaluations)
        return losses[-1]

    point, least = minimize(loss, np.clip(start, 0, MAX_WEIGHT), evaluations, seed)
    best, scaling = _split(merge, point)
    return SearchedWeights(tuple(best), scaling, least, losses[0], loss_target, len(losses))


def minimize(
    loss: Callable[[np.ndarray], float], start: np.ndarray, evaluations: int, seed: int
) -> tuple[np.ndarray, float]:
    """The best point of a direct search in the box 0..MAX_WEIGHT, and its loss.

    Each round tries ±step along random orthogonal directions, and takes every step that lowers the
    loss. After a round with such a step, the step grows; otherwise it shrinks. The search ends
    after `evaluations` calls of `loss`, or when the step is below 0.01.
    """
    generator = np.random.default_rng(seed)
    best, least = start, loss(start)
    left, step = evaluations - 1, _FIRST_STEP
    while left > 0 and step >= _SMALLEST_STEP:
        directions = np.linalg.qr(generator.standard_normal((start.size, start.size)))[0]
        improved = False
        for direction in directions:
            for sign in (1, -1):
                point = np.clip(best + sign * step * direction, 0, MAX_WEIGHT)
                if left == 0 or np.array_equal(point, best):
                    continue
                left -= 1
                value = loss(point)
                if value < least:
                    best, least, improved = point, value, True
                    break
        step *= _GROWTH if improved else _SHRINKAGE
    return best, least


class LiveLoss:
    """Cross-entropy of rows under a live target, into which every call merges other weights.

    Raises: PackMismatchError, CheckpointError, ConfigError, RowsError.
    """

    def __init__(self, merge: PackMerge, rows: Sequence[Row]):
        merge.check_addable()
        self._merge = merge
        self._model: Any = load_causal_model(merge.target)
        where = str(merge.target.path)
        self._live = LiveTarget(self._model)
        self._tokenizer = usable_tokenizer(merge.target)
        self._rows = encode_rows(self._tokenizer, rows, sys.maxsize, 0, self._model, where)
        self._names = [name for name in merge.names if merge.changes(name)]

    def __call__(self, weights: Sequence[float], scaling: float) -> float:
        """Nats per completion token of the target with these weights.

        Raises: ConfigError for values beyond the target's dtype; CheckpointError for logits that
            are not finite.
        """
        merge = self._merge.reweighted(weights, scaling)
        # Rounded to the checkpoint's dtype, as a merge writes them.
        merged = in_threads(merge.tensor, self._names)
        with torch.no_grad():
            for name, tensor in zip(self._names, merged, strict=True):
                view = self._live.find(name)
                if view is not None:
                    self._live.live(view).copy_(tensor)
        return self.measure()

    @torch.no_grad()
    def measure(self) -> float:
        """Nats per completion token with the weights of the last call, or of the target alone.

        Raises: CheckpointError for logits that are not finite.
        """
        total, count = 0.0, 0
        for batch in loss_batches(self._model, self._rows):
            rows = [self._rows[index] for index in batch]
            loss, scored = summed_loss(self._model, rows, pad_id(self._tokenizer))
            total, count = total + float(loss), count + scored
        if not math.isfinite(total):
            raise CheckpointError("the logits are not finite on the rows; check weights and packs")
        return total / count


def _split(merge: PackMerge, point: np.ndarray) -> tuple[list[float], float]:
    """Weights and λ of a point of the search."""
    values = [float(value) for value in point]
    if merge.method.averages:
        return values[:-1], values[-1]
    return values, merge.method.scaling


def measure_importances(
    target: Checkpoint, pack: SkillPack, rows: Sequence[Row]
) -> dict[str, float]:
    """How much every tensor that the pack changes matters for a task: first-order Taylor.

        I(u) = mean over batches of  mean_k |Δ_k g_k|,   g = ∂ L / ∂ w

    L is the mean −log p of completion tokens, at target + pack. To first order, |Δ_k g_k| is the
    change of the loss when entry k returns to the target's value (Molchanov et al., arXiv
    1611.06440; KIF uses the same product). In memory are the model and one gradient, in float32.

    Args:
        rows: of the task.
    Raises: RowsError for rows that do not fit or have no completion; CheckpointError for a missing
        tokenizer or a gradient that is not finite; ConfigError for a target that does not predict
        tokens; PackMismatchError for a pack of another target.
    """
    model: Any = load_causal_model(target)
    tokenizer = usable_tokenizer(target)
    encoded = encode_rows(
        tokenizer, rows, _IMPORTANCE_TOKENS, _IMPORTANCE_SEED, model, str(target.path)
    )
    names = [record.name for record in pack.manifest.tensors if record.codec != "zero"]
    sums = dict.fromkeys(names, 0.0)
    batches = loss_batches(model, encoded)
    with attached(model, pack):
        live = LiveTarget(model)
        for batch in batches:
            loss, count = summed_loss(model, [encoded[i] for i in batch], pad_id(tokenizer))
            if count == 0:
                continue
            torch.autograd.backward(loss / count)
            for name in names:
                sums[name] += _taylor(live, target, name)
            model.zero_grad(set_to_none=True)
    return {name: total / len(batches) for name, total in sums.items()}


def _taylor(live: LiveTarget, target: Checkpoint, name: str) -> float:
    """mean |Δ g| of one tensor; 0 if no gradient reaches it. Raises: CheckpointError."""
    view = live.find(name)
    gradient = None if view is None else live.state[view.parameter].grad
    if view is None or gradient is None:
        return 0.0
    delta = live.live(view) - target.read(name)
    mean = float((view.tensor(gradient) * delta).abs().mean(dtype=torch.float64))
    if not mean < sys.float_info.max:
        raise CheckpointError(
            f"{name}: its gradient is not finite on the rows; check the weights and the rows"
        )
    return mean


def load_causal_model(target: Checkpoint) -> Any:
    """The target in float32. Raises: CheckpointError; ConfigError if it predicts no tokens."""
    model: Any = load_model(target, torch.float32)
    if not model.can_generate():
        raise ConfigError(f"{target.path}: {type(model).__name__} does not predict next tokens")
    return model


def loss_batches(model: Any, rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Batches of rows, by index. Raises: RowsError if no row has a completion."""
    if not any(len(row) > max(row.start, 1) for row in rows):
        raise RowsError("no row has a completion, and only completions are scored; add some")
    tokens = tokens_with_logits(model, _BATCH_TOKENS)
    return batches_by_length([len(row) for row in rows], tokens)


def summed_loss(model: Any, rows: Sequence[EncodedRow], pad: int) -> tuple[Tensor, int]:
    """Σ −log p over the tokens of completions of one batch, in nats, and their number."""
    ids, mask = pad_batch([row.ids for row in rows], pad)
    scored = scored_tokens(model, rows, mask)
    if not scored.any():
        return torch.zeros(()), 0
    options = {}
    if "use_cache" in signature(model.forward).parameters:
        options["use_cache"] = False
    logits = model(input_ids=ids, attention_mask=mask, **options).logits
    labels = ids[:, 1:][scored[:, :-1]]
    loss = torch.nn.functional.cross_entropy(logits[scored].float(), labels, reduction="sum")
    return loss, len(labels)
