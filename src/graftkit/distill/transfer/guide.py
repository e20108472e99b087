"""SFT with more than text: sources' distributions and hidden states beside every row.

    L = a · CE + b · KL(source, target) + c · distance of hidden states

Cross-entropy and divergence are means over completion tokens, the distance is one over rows.
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
from graftkit.rows import Row, pad_batch

IGNORED = -100  # label of a token that is not learned


class HiddenSource:
    """Pooled hidden states of a source, for batches of rows.

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
        """model, tokenizer: of the source; the model is frozen for good."""
        self.source, self.tokenizer, self.target = source, tokenizer, target_tokenizer
        self.model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.width: int = config.hidden_size
        self.pairs = layer_pairs(config.num_hidden_layers, target_layers)

    def batch(
        self, rows: Sequence[Row], encoded: Sequence[tuple[Sequence[int], int]]
    ) -> dict[str, Tensor]:
        """What a pass over some rows needs, for a collator; the model does not run.

        Args:
            rows: prompts as they were asked. encoded: the same rows from
                `graftkit.rows.encode_row` with the target's tokenizer: ids and the completion's
                start.
        Returns: hidden_ids, hidden_attention (rows, source tokens), what the source reads;
            hidden_source_index, of the same shape, and hidden_index (rows, target tokens): the
            span of each token, -1 for none; hidden_mask (rows, spans): where there is one. A row
            beyond the source's context has none.
        """
        read, source_spans, target_spans = [], [], []
        for row, (ids, start) in zip(rows, encoded, strict=True):
            tokens, own, others = self._row(row, start)
            read.append(tokens)
            source_spans.append(own)
            target_spans.append(others + [UNKNOWN] * (len(ids) - len(others)))
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
        found = self.model(
            input_ids=batch["hidden_ids"].to(device),
            attention_mask=batch["hidden_attention"].to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        index, spans = batch["hidden_source_index"].to(device), batch["hidden_mask"].shape[1]
        return [pool(found[layer], index, spans) for layer, _ in self.pairs]

    def _row(self, row: Row, start: int) -> tuple[list[int], list[int], list[int]]:
        """What the source reads, and the spans of its tokens and of the target's."""
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
    """What the sources say about the rows of an SFT set.

    Args:
        files: what each source expects in the rows. hidden: the source whose states count.
        asked: the rows with their prompts as they were asked, for sources to read.
    """

    def __init__(
        self,
        settings: Transfer,
        files: Sequence[DistributionFile],
        hidden: HiddenSource | None,
        asked: Sequence[Row],
    ):
        self.settings, self.files, self.hidden, self.asked = settings, files, hidden, asked

    def batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors for a batch of examples with their `row`, `input_ids` and `labels`."""
        indices = [example["row"] for example in examples]
        encoded = [(e["input_ids"], e["labels"].count(IGNORED)) for e in examples]
        found: dict[str, Tensor] = {}
        if self.files:
            found |= distribution_batch(self.files, indices, encoded, self.settings.fusion)
        if self.hidden:
            found |= self.hidden.batch([self.asked[index] for index in indices], encoded)
        return found


def _shift(numbers: Sequence[int], by: int) -> list[int]:
    return [number + by if number != UNKNOWN else UNKNOWN for number in numbers]
