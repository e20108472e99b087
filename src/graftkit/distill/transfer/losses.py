"""Losses of explicit transfer, as functions of tensors.

A distribution is a list of likely tokens and one number for all others. Hidden states are means
over spans of text, so that sequences of two tokenizers can be compared. Half precision is computed
in float32. Every loss is one number per token or row, which the caller adds up.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from graftkit.errors import ConfigError


def distribution_loss(
    logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_rest: Tensor,
    divergence: Literal["forward", "reverse"] = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """Divergence of the target from a source at n tokens, nats, (n,).

        forward  KL(p ‖ q) = Σ_k p_k log(p_k / q_k) + p_r log(p_r / q_r)
        reverse  KL(q ‖ p), with the same k and r

    p is the source's distribution, q the target's, r all tokens that are not listed. The sum is a
    lower bound of the divergence over all tokens, and zero if q equals p in every listed token.
    Where p gives nothing to r (its token is certain) the reverse divergence is infinite, and the
    cross-entropy is used, which is the forward divergence there.

    Args:
        logits: of the target, (n, vocabulary), before the temperature.
        ids, log_probs: (n, k), and log_rest: (n,), as in `RowDistribution`, at `temperature`,
            because log_rest at another temperature cannot be computed from it.
        temperature: divides the logits; the result is multiplied by its square, which preserves
            the size of the gradient (Hinton et al., arXiv 1503.02531, section 2).
    """
    precision = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(precision) / temperature
    total = logits.logsumexp(dim=1)
    # A finite number instead of -inf, whose logsumexp has no gradient.
    others = logits.scatter(1, ids, torch.finfo(precision).min)
    log_q = torch.cat([logits.gather(1, ids), others.logsumexp(dim=1, keepdim=True)], dim=1)
    log_q = log_q - total[:, None]
    log_p = torch.cat([log_probs, log_rest[:, None]], dim=1).to(precision)
    possible = log_p > -torch.inf
    log_p = log_p.masked_fill(~possible, 0.0)
    difference = (log_p - log_q).masked_fill(~possible, 0.0)
    forward = (log_p.exp() * difference).sum(dim=1)
    if divergence == "forward":
        return temperature**2 * forward
    reverse = -(log_q.exp() * difference).sum(dim=1)
    return temperature**2 * torch.where(possible[:, -1], reverse, forward)


def pool(states: Tensor, index: Tensor, spans: int) -> Tensor:
    """Mean of the states of every span, float32 (rows, spans, width); zero for a missing span.

    Args:
        states: (rows, tokens, width). index: (rows, tokens), the span of each token, -1 for none.
    """
    # A matrix product, because scattered sums differ from run to run on a GPU.
    member = (index[..., None] == torch.arange(spans, device=index.device)).float()
    tokens = member.sum(dim=1).clamp(min=1)
    return member.transpose(1, 2) @ states.float() / tokens[..., None]


def hidden_loss(
    target: Tensor,
    source: Tensor,
    mask: Tensor,
    kind: Literal["cosine", "mse", "gram"],
    projection: nn.Module | None = None,
) -> Tensor:
    """Distance of one layer's pooled states from the source's, (rows,): the mean over spans.

        cosine  1 − cos(P h, s)
        mse     ‖P h − s‖²
        gram    mean over the row's spans j of (cos(h, h_j) − cos(s, s_j))²

    h and s are scaled to norm 1 first, because the norms of two models' states differ by a factor
    of ten. P maps to the source's width, not from it: otherwise the target could reduce the loss by
    making its states constant. gram compares any two widths; it is zero for a row of one span.

    Args:
        target: h, (rows, spans, width). source: s, (rows, spans, source width).
        mask: (rows, spans), true where there is a span. projection: P; None for the identity.
    Raises: ConfigError for different widths without a projection.
    """
    target, source = normalize(target.float(), dim=2), normalize(source.float(), dim=2)
    real = mask.float()
    count = real.sum(dim=1).clamp(min=1)
    if kind == "gram":
        gap = (target @ target.transpose(1, 2) - source @ source.transpose(1, 2)).square()
        distance = (gap * real[:, None]).sum(dim=2) / count[:, None]
        return (distance * real).sum(dim=1) / count
    if projection is not None:
        target = projection(target)
    if target.shape[-1] != source.shape[-1]:
        raise ConfigError(
            f"hidden states are {target.shape[-1]} wide and the source's {source.shape[-1]}; "
            "give a projection, or choose hidden = gram"
        )
    if kind == "mse":
        distance = (target - source).square().sum(dim=2)
    else:
        distance = 1 - (normalize(target, dim=2) * source).sum(dim=2)
    return (distance * real).sum(dim=1) / count


def layer_pairs(source_layers: int, target_layers: int) -> list[tuple[int, int]]:
    """For every layer of the target, the layer of the source at the same relative depth.

    Returns: pairs (source, target), counted from 1 as in `hidden_states`, where 0 is the embedding.
    """
    return [
        (max(1, round(layer * source_layers / target_layers)), layer)
        for layer in range(1, target_layers + 1)
    ]


def make_projections(
    layers: int, target_width: int, source_width: int, seed: int
) -> nn.ModuleList | None:
    """One linear map from the target's width to the source's for each layer; None for equal widths.

    The maps are trained with the target, and are no part of the tuned model.
    """
    if target_width == source_width:
        return None
    generator = torch.Generator().manual_seed(seed)
    maps = [nn.Linear(target_width, source_width, bias=False) for _ in range(layers)]
    for linear in maps:
        nn.init.normal_(linear.weight, std=target_width**-0.5, generator=generator)
    return nn.ModuleList(maps)


def hidden_batch_loss(
    hidden_states: Sequence[Tensor],
    source_states: Sequence[Tensor],
    batch: dict[str, Tensor],
    kind: Literal["cosine", "mse", "gram"],
    pairs: Sequence[tuple[int, int]],
    projections: nn.ModuleList | None = None,
) -> Tensor:
    """The hidden loss of every row, (rows,), the mean over layers.

    Args:
        hidden_states: of the target, embedding first, (rows, tokens, width) each.
        source_states, batch, pairs: from `HiddenSource`.
    """
    index, mask = batch["hidden_index"], batch["hidden_mask"]
    losses = []
    for place, (source, (_, layer)) in enumerate(zip(source_states, pairs, strict=True)):
        states = pool(hidden_states[layer], index, mask.shape[1])
        projection = projections[place] if projections is not None else None
        losses.append(hidden_loss(states, source, mask, kind, projection))
    return torch.stack(losses).mean(dim=0)
