"""What the sources say about SFT rows: tensors of distributions and hidden states for a batch.

Hidden states are compared where both tokenizers cut the text: at the end of the prompt, whose state
decides how an answer begins, and over the spans of the completion between common borders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftkit.distill.config import ModelSource, Transfer
from graftkit.distill.transfer.alignment import (
    UNKNOWN,
    read_as_source,
    span_pools,
    tokenize_completion,
)
from graftkit.distill.transfer.distributions import DistributionFile, distribution_batch
from graftkit.distill.transfer.losses import (
    layer_pairs,
    pool,
)
from graftkit.models.encoding import context_length, pad_id, vocabulary_size
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
