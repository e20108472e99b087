"""Mixtures of packs by their next-token distributions, beside those by their deltas.

    p(token) = Σ_i w_i p_i(token)        p_i of target + pack i, or of the target alone

Every row runs once for each pack that it weighs, all in one batch of the side path, and the copies
of a row share one choice of token. A mixture of deltas runs once, but is another model: the logits
are not linear in the weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from graftkit.attachment import Attachment
from graftkit.errors import AttachError, ConfigError

Weights = Mapping[int | None, float]
"""Of one row, by the index of a pack, None for the target; at least 0, and 1 together."""

_SUM_TOLERANCE = 1e-5  # a float32 softmax over a few packs sums to 1 within this


@dataclass(frozen=True)
class Copies:
    """The rows of a batch, each repeated for the packs that it weighs.

    Attributes:
        packs: of every copy. rows: its row. log_weights: the logarithm of its weight.
        counts: copies of every row; they stand one behind the other.
    """

    packs: list[int | None]
    rows: list[int]
    log_weights: list[float]
    counts: list[int]

    @classmethod
    def of(cls, weights: Sequence[Weights]) -> "Copies":
        """Copies for the weights above 0 of every row.

        Raises: ConfigError where there are no rows, or the weights of one are no shares of 1.
        """
        if not weights:
            raise ConfigError("no rows to average for; give one row of weights for each prompt")
        used = [_check_weights(row, place) for place, row in enumerate(weights)]
        return cls(
            packs=[pack for row in used for pack in row],
            rows=[place for place, row in enumerate(used) for _ in row],
            log_weights=[math.log(weight) for row in used for weight in row.values()],
            counts=[len(row) for row in used],
        )

    def mix(self, logits: Tensor) -> Tensor:
        """log Σ_i w_i softmax(logits_i) of every row, as log-sum-exp: (copies, ...) -> (rows, ...).

        Raises: AttachError when there are not as many logits as copies.
        """
        if len(logits) != len(self.rows):
            raise AttachError(
                f"{len(logits)} sequences are in the batch for {len(self.rows)} copies of rows; "
                "beam search cannot share the choice of a token"
            )
        weights = torch.tensor(self.log_weights, device=logits.device)
        log_p = logits.float().log_softmax(dim=-1)
        log_p += weights.reshape(-1, *[1] * (logits.dim() - 1))
        return torch.stack([row.logsumexp(dim=0) for row in torch.split(log_p, self.counts)])


def generate_averaged(
    model: Any,
    attachment: Attachment,
    ids: Tensor,
    mask: Tensor,
    weights: Sequence[Weights],
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """`model.generate`, every token chosen by the averaged distribution of its row.

    The most likely token is taken, or with `generator` one drawn from p; sampling settings of the
    model have no say in it. Beams are refused.

    Args:
        attachment: of `model`, mode "side"; it stays routed to the copies of these rows.
        ids, mask: (rows, tokens), padded on the left. weights: of every row.
        options: of `model.generate`, such as max_new_tokens.
    Returns: prompts with their continuations, (rows, longest), on the device of `ids`.
    Raises: ConfigError for weights that do not sum to 1; AttachError as `Attachment.route`.
    """
    copies = Copies.of(weights)
    attachment.route(copies.packs)
    output: Tensor = model.generate(
        input_ids=ids[copies.rows],
        attention_mask=mask[copies.rows],
        logits_processor=LogitsProcessorList([_SharedToken(copies, generator)]),
        **options,
    )
    firsts = [copies.rows.index(row) for row in range(len(copies.counts))]
    return output[firsts]


class _SharedToken(LogitsProcessor):
    """Chooses one token for all copies of a row, and leaves `generate` no other."""

    def __init__(self, copies: Copies, generator: torch.Generator | None):
        self.copies = copies
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (copies, vocabulary) that are 0 for the choice and -∞ for all other tokens."""
        log_p = self.copies.mix(scores)
        if self.generator is None:
            tokens = log_p.argmax(dim=-1, keepdim=True)
        else:
            tokens = torch.multinomial(log_p.exp(), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[self.copies.rows], 0.0)


def _check_weights(weights: Weights, row: int) -> dict[int | None, float]:
    total = sum(weights.values())
    in_range = all(weight >= 0 for weight in weights.values())
    if not in_range or not abs(total - 1) <= _SUM_TOLERANCE:
        raise ConfigError(
            f"the weights of row {row} are {dict(weights)}, together {total:g}; "
            "expected shares of at least 0 that sum to 1, the target's under None"
        )
    return {pack: weight for pack, weight in weights.items() if weight}
