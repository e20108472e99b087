"""Weights of packs, searched without derivatives for the least cross-entropy of given rows.

    min over w (and λ) of  mean −log p(token | target + λ rule(Δ; w))  over the completions' tokens

The idea is LoRAHub's (arXiv 2307.13269), on whole deltas and with any merge rule. The search is
direct: random directions, a step that grows with success and shrinks without (probabilistic
descent, Gratton et al. 2015).

How much each tensor of a pack matters for a task: first-order Taylor, on rows of the task.

I(u) = mean over batches of  mean_k |Δ_k g_k|,   g = ∂ (mean −log p of completion tokens) / ∂ w

at target + pack: to first order, |Δ_k g_k| is what the loss changes by when entry k goes back to
the target's (Molchanov et al., arXiv 1611.06440; KIF takes the same product).
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
from graftkit.models.encoding import (
    EncodedRow,
    encode_rows,
    pad_id,
    scored_tokens,
    tokens_with_logits,
    usable_tokenizer,
)
from graftkit.models.loading import load_model
from graftkit.parallel import in_threads
from graftkit.progress import Progress
from graftkit.rows import Row, batches_by_length, pad_batch
from graftkit.skillpack import SkillPack

EVALUATIONS = 60
"""Mixtures that a search tries unless told otherwise."""
MAX_WEIGHT = 2.0
"""Largest weight, and largest λ, that a search tries; the smallest is 0."""
_FIRST_STEP, _SMALLEST_STEP = 0.25, 0.01
_GROWTH, _SHRINKAGE = 1.5, 0.6
_BATCH_TOKENS = 2_048  # padded tokens of one pass


@dataclass(frozen=True)
class SearchedWeights:
    """What a search found; losses are nats per completion token on the given rows."""

    weights: tuple[float, ...]
    """One per pack, in the packs' order."""
    scaling: float
    """λ."""
    loss: float
    """Of the target with these weights."""
    loss_given: float
    """Of the weights that the search began with."""
    loss_target: float
    """Of the target alone."""
    evaluations: int
    """Mixtures tried."""


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
    """The weights (and, where a rule averages, λ) of least cross-entropy on rows.

    In memory are the target, in float32, and of the packs the tensors in work, decoded anew for
    every mixture. The same call gives the same weights on the same machine; their loss is never
    above that of the weights it began with, which are the given ones cut to 0..2.

    Args:
        target, packs, weights, method, settings: as in `merge_packs`; the search begins there.
        rows: what the merged model is to answer. Not those it is measured on later.
        evaluations: mixtures to try, at least 2. seed: of the directions tried.
    Raises: as `merge_packs`; RowsError for rows that do not fit; ConfigError for a target that
        does not predict tokens, or too few evaluations.
    """
    if evaluations < 2:
        raise ConfigError(f"evaluations is {evaluations}; a search needs at least 2")
    mixture = open_merge(target, packs, weights, method, settings)
    loss_of = LiveLoss(mixture, rows)
    loss_target = loss_of.measure()
    averages = mixture.method.averages
    given = np.array([*mixture.weights, *([mixture.method.scaling] if averages else [])])
    tried: list[float] = []

    def loss(point: np.ndarray) -> float:
        chosen, scaling = _split(mixture, point)
        try:
            tried.append(loss_of(chosen, scaling))
        except (CheckpointError, ConfigError):
            if not tried:
                raise
            tried.append(math.inf)  # beyond what the dtype holds: no place to go on from
        if progress is not None:
            progress("searching weights", len(tried), evaluations)
        return tried[-1]

    point, least = minimize(loss, np.clip(given, 0, MAX_WEIGHT), evaluations, seed)
    chosen, scaling = _split(mixture, point)
    return SearchedWeights(tuple(chosen), scaling, least, tried[0], loss_target, len(tried))


def minimize(
    loss: Callable[[np.ndarray], float], start: np.ndarray, evaluations: int, seed: int
) -> tuple[np.ndarray, float]:
    """A point of the box 0..MAX_WEIGHT with a loss of at most that of `start`, and that loss.

    Tries ±step along random orthogonal directions; a step that lowers the loss is taken and the
    next is longer, a round of directions without one makes it shorter. Ends after `evaluations`
    calls of `loss`, or when the step is below 0.01.
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
                found = loss(point)
                if found < least:
                    best, least, improved = point, found, True
                    break
        step *= _GROWTH if improved else _SHRINKAGE
    return best, least


class LiveLoss:
    """Cross-entropy of rows under a live target whose weights are mixed anew for every call."""

    def __init__(self, mixture: PackMerge, rows: Sequence[Row]):
        mixture.check_addable()
        self._mixture = mixture
        self._model: Any = answering_model(mixture.target)
        where = str(mixture.target.path)
        self._live = LiveTarget(self._model)
        self._tokenizer = usable_tokenizer(mixture.target)
        self._rows = encode_rows(self._tokenizer, rows, sys.maxsize, 0, self._model, where)
        self._names = [name for name in mixture.names if mixture.changes(name)]

    def __call__(self, weights: Sequence[float], scaling: float) -> float:
        """Nats per completion token of the target with this mixture."""
        mixture = self._mixture.reweighted(weights, scaling)
        # As a merge writes them: rounded to the checkpoint's dtype.
        merged = in_threads(mixture.tensor, self._names)
        with torch.no_grad():
            for name, tensor in zip(self._names, merged, strict=True):
                view = self._live.find(name)
                if view is not None:
                    self._live.live(view).copy_(tensor)
        return self.measure()

    @torch.no_grad()
    def measure(self) -> float:
        """Nats per completion token of the model as it stands."""
        total, count = 0.0, 0
        for batch in loss_batches(self._model, self._rows):
            rows = [self._rows[index] for index in batch]
            found, scored = summed_loss(self._model, rows, pad_id(self._tokenizer))
            total, count = total + float(found), count + scored
        if not math.isfinite(total):
            raise CheckpointError("the logits are not finite on the rows; check weights and packs")
        return total / count


def answering_model(target: Checkpoint) -> Any:
    """The target in float32. Raises: CheckpointError; ConfigError if it predicts no tokens."""
    model: Any = load_model(target, torch.float32)
    if not model.can_generate():
        raise ConfigError(f"{target.path}: {type(model).__name__} does not predict next tokens")
    return model


def loss_batches(model: Any, rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Rows of one pass each, by index. Raises: RowsError where nothing can be scored."""
    if not any(len(row) > max(row.start, 1) for row in rows):
        raise RowsError("no row has a completion, and only completions are scored; add some")
    tokens = tokens_with_logits(model, _BATCH_TOKENS)
    return batches_by_length([len(row) for row in rows], tokens)


def summed_loss(model: Any, rows: Sequence[EncodedRow], pad: int) -> tuple[Tensor, int]:
    """Σ −log p over the completions' tokens of one batch, nats, and how many there are."""
    ids, mask = pad_batch([row.ids for row in rows], pad)
    scored = scored_tokens(model, rows, mask)
    if not scored.any():
        return torch.zeros(()), 0
    options = {}
    if "use_cache" in signature(model.forward).parameters:
        options["use_cache"] = False
    logits = model(input_ids=ids, attention_mask=mask, **options).logits
    wanted = ids[:, 1:][scored[:, :-1]]
    loss = torch.nn.functional.cross_entropy(logits[scored].float(), wanted, reduction="sum")
    return loss, len(wanted)


def _split(mixture: PackMerge, point: np.ndarray) -> tuple[list[float], float]:
    """Weights and λ of a point of the search."""
    values = [float(value) for value in point]
    if mixture.method.averages:
        return values[:-1], values[-1]
    return values, mixture.method.scaling


TOKENS = 8_192  # of the rows given, a choice: as for the sensitivities of a calibration
_SEED = 0  # of that choice


def measure_importances(
    target: Checkpoint, pack: SkillPack, rows: Sequence[Row]
) -> dict[str, float]:
    """I of every tensor that the pack changes and the model has.

    In memory are the model and one gradient, both float32.
    Raises: RowsError for rows that do not fit or have no completion; CheckpointError where there is
        no tokenizer or a gradient is not finite; ConfigError for a target that does not predict
        tokens; PackMismatchError.
    """
    model: Any = answering_model(target)
    tokenizer = usable_tokenizer(target)
    encoded = encode_rows(tokenizer, rows, TOKENS, _SEED, model, str(target.path))
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
    """mean |Δ g| of one tensor; 0 where no gradient reached it."""
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
