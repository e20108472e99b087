"""Explicit transfer: what the sources say about SFT rows, and the losses that compare it.

Hidden states are compared where both tokenizers cut the text: at the end of the prompt, whose state
decides how an answer begins, and over the spans of the completion between common borders.

A distribution is a list of likely tokens and one number for all others. Hidden states are means
over spans of text, so that sequences of two tokenizers can be compared. Half precision is computed
in float32. Every loss is one number per token or row, which the caller adds up.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from graftkit.distill.config import ModelSource, Transfer
from graftkit.distill.transfer.alignment import (
    UNKNOWN,
    read_as_source,
    span_pools,
    tokenize_completion,
)
from graftkit.distill.transfer.distributions import DistributionFile, distribution_batch
from graftkit.errors import ConfigError
from graftkit.models.text import context_length, pad_id, vocabulary_size
from graftkit.rows import EncodedRow, Row, pad_batch

IGNORED = -100  # label of a token that is not learned


class HiddenSource:
    """A frozen source and its pooled hidden states, for batches of rows.

    Attributes:
        pairs: (source layer, target layer), from `layer_pairs`.
        width: of the source's states.
    """

    def __init__(
        self,
        source: ModelSource,
        model: Any,
        tokenizer: Any,
        target_tokenizer: Any,
        target_layers: int,
    ):
        """model, tokenizer: of the source; the model stays frozen."""
        self.source, self.tokenizer, self.target = source, tokenizer, target_tokenizer
        self.model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.width: int = config.hidden_size
        self.pairs = layer_pairs(config.num_hidden_layers, target_layers)

    def batch(self, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Tokens and spans of some rows, for a collator; the model does not run.

        Args:
            rows: as the source reads them. encoded: the same rows from
                `graftkit.rows.encode_row` with the target's tokenizer.
        Returns: hidden_ids and hidden_attention, (rows, source tokens), the source's input;
            hidden_source_index, of the same shape, and hidden_index, (rows, target tokens): the
            span of each token, -1 for none; hidden_mask, (rows, spans): where there is a span.
            A row beyond the source's context has no spans.
        """
        read, source_spans, target_spans = [], [], []
        for row, whole in zip(rows, encoded, strict=True):
            tokens, own, others = self._row(row, whole.start)
            read.append(tokens)
            source_spans.append(own)
            target_spans.append(others + [UNKNOWN] * (len(whole) - len(others)))
        hidden_ids, attention = pad_batch(read, pad_id(self.tokenizer))
        source_index, _ = pad_batch(source_spans, UNKNOWN)
        index, _ = pad_batch(target_spans, UNKNOWN)
        spans = index.max(dim=1).values + 1
        return {
            "hidden_ids": hidden_ids,
            "hidden_attention": attention,
            "hidden_source_index": source_index,
            "hidden_index": index,
            "hidden_mask": torch.arange(int(spans.max())) < spans[:, None],
        }

    @torch.no_grad()
    def states(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Pooled states of the source's layers in `pairs`, float32 (rows, spans, width) each."""
        device = self.model.device
        hidden_states = self.model(
            input_ids=batch["hidden_ids"].to(device),
            attention_mask=batch["hidden_attention"].to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        index, spans = batch["hidden_source_index"].to(device), batch["hidden_mask"].shape[1]
        return [pool(hidden_states[layer], index, spans) for layer, _ in self.pairs]

    def _row(self, row: Row, start: int) -> tuple[list[int], list[int], list[int]]:
        """The source's tokens, and the spans of its tokens and of the target's."""
        size = vocabulary_size(self.model)
        prompt, completion = read_as_source(self.tokenizer, row, self.source.chat, size)
        target = tokenize_completion(self.target, row.completion)
        ids = prompt + completion.ids
        limit = context_length(self.model) or len(ids)
        if len(ids) > limit or not ids:
            return ids[:1] or [pad_id(self.tokenizer)], [UNKNOWN], []
        both = bool(prompt and start)
        pools = span_pools(completion.spans, target.spans)
        source_index, target_index = (
            [UNKNOWN] * (length - 1) + [0 if both else UNKNOWN] * bool(length) + _shift(pool, both)
            for length, pool in zip((len(prompt), start), pools, strict=True)
        )
        source_index += [UNKNOWN] * (len(ids) - len(source_index))
        return ids, source_index, target_index


class Guide:
    """The sources' signals for the rows of an SFT set.

    Args:
        files: the distributions of each source.
        hidden: the source whose hidden states are learned.
        source_rows: the rows as the sources read them, without the target's chat template.
    """

    def __init__(
        self,
        settings: Transfer,
        files: Sequence[DistributionFile],
        hidden: HiddenSource | None,
        source_rows: Sequence[Row],
    ):
        self.settings, self.source_rows = settings, source_rows
        self.files, self.hidden = files, hidden

    def batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors for a batch of examples with `row` (its index), `input_ids` and `labels`."""
        indices = [example["row"] for example in examples]
        encoded = [EncodedRow(e["input_ids"], e["labels"].count(IGNORED)) for e in examples]
        batch: dict[str, Tensor] = {}
        if self.files:
            batch |= distribution_batch(self.files, indices, encoded, self.settings.fusion)
        if self.hidden:
            batch |= self.hidden.batch([self.source_rows[index] for index in indices], encoded)
        return batch


def _shift(numbers: Sequence[int], by: int) -> list[int]:
    return [number + by if number != UNKNOWN else UNKNOWN for number in numbers]


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
