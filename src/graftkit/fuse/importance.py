"""How much each tensor of a pack matters for a task: first-order Taylor, on rows of the task.

I(u) = mean over batches of  mean_k |Δ_k g_k|,   g = ∂ (mean −log p of completion tokens) / ∂ w

at target + pack: to first order, |Δ_k g_k| is what the loss changes by when entry k goes back to
the target's (Molchanov et al., arXiv 1611.06440; KIF takes the same product).
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from graftkit.attachment import attached
from graftkit.attachment.check import LiveTarget
from graftkit.delta import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.fuse.search import answering_model, loss_batches, summed_loss
from graftkit.models.encoding import encode_rows, pad_id, usable_tokenizer
from graftkit.rows import Row
from graftkit.skillpack import SkillPack

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
