"""Run a source over the rows that the target is trained on, and write down what it expects.

The source reads prompt and completion in its own tokens; `alignment` says which of its positions
stand at a token of the target, and what its likeliest tokens are there. Rows are read in shards: a
killed run goes on, and writes the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import cross_entropy

from graftkit.distill.alignment import Cut, cut, map_vocabulary, match_tokens, read_as_source
from graftkit.distill.config import ModelSource, Transfer
from graftkit.distill.distributions import (
    NEVER,
    Distributions,
    RowDistribution,
    Summary,
    merge_duplicates,
    pack_rows,
    write_distributions,
)
from graftkit.errors import RowsError
from graftkit.files import WorkFolder
from graftkit.models.backward import visit_logits
from graftkit.models.encoding import context_length, pad_id, vocabulary_size
from graftkit.rows import Row, batches_by_length, pad_batch

SHARD_ROWS = 256  # rows that a killed run reads again, at most

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


def collect_distributions(
    source: ModelSource,
    model: Any,
    tokenizer: Any,
    target_tokenizer: Any,
    rows: Sequence[Row],
    config: Transfer,
    file: Path,
    progress: Progress | None = None,
) -> Summary:
    """Write what one source expects in `rows`, in their order, to a safetensors file.

    A finished file of the same job is kept. Probabilities are taken at `config.temperature`, and
    the cross-entropy at 1.

    Args:
        model, tokenizer: of the source; a causal language model in memory, on any device.
        rows: prompts as they were asked, without a chat template.
    Raises: RowsError without rows; CheckpointError for a tokenizer that cannot be used;
        OutputError.
    """
    if not rows:
        raise RowsError("no rows to read; expected the rows that the target is trained on")
    job = _job(source, [tokenizer, target_tokenizer], _end_tokens(model), rows, config)
    if file.is_file() and (finished := Distributions(file)).job == job:
        return finished.summary
    with closing(WorkFolder(file.with_name(file.name + ".partial"))) as work:
        work.open(job)
        reader = _Reader(source, model, tokenizer, target_tokenizer, config)
        shards = _read_shards(reader, rows, work, progress or (lambda done, total: None))
        seen = torch.stack([shard.pop("seen") for shard in shards]).sum(dim=0)
        aligned, too_long = seen.tolist()
        tokens = sum(len(shard["counts"]) for shard in shards)
        summary = Summary(len(rows), tokens, aligned, too_long)
        write_distributions(shards, summary, job, file)
        work.remove()
    return summary


def _read_shards(
    reader: "_Reader", rows: Sequence[Row], work: WorkFolder, progress: Progress
) -> list[dict[str, Tensor]]:
    """What the source expects in the rows, shard by shard; finished shards are not read again."""
    starts = range(0, len(rows), SHARD_ROWS)
    for start in starts:
        if work.read(str(start)) is None:
            work.write(str(start), save(reader.read(rows[start : start + SHARD_ROWS])))
        progress(min(start + SHARD_ROWS, len(rows)), len(rows))
    return [load(work.read(str(start)) or b"") for start in starts]


def _job(
    source: ModelSource,
    tokenizers: Sequence[Any],
    ends: Sequence[int],
    rows: Sequence[Row],
    config: Transfer,
) -> str:
    """Digest of what decides the file."""
    asked = [source.model, source.chat, source.batch_tokens, config.top_k, config.temperature]
    tokens = [[sorted(t.get_vocab().items()), t.eos_token_id] for t in tokenizers]
    texts = [[row.prompt, row.completion] for row in rows]
    return blake3(json.dumps([asked, tokens, ends, texts]).encode()).hexdigest()


class _Expected(NamedTuple):
    """The likeliest tokens of a source at the m completion tokens that it predicts.

    ids, log_probs: (m, k). log_rest, surprise: (m,), the surprise of its own next token.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    surprise: Tensor


class _Reader:
    """A source that reads rows and tells what it expects, in the target's tokens."""

    def __init__(
        self,
        source: ModelSource,
        model: Any,
        tokenizer: Any,
        target_tokenizer: Any,
        config: Transfer,
    ):
        self.model, self.tokenizer, self.target = model.eval(), tokenizer, target_tokenizer
        self.source, self.config = source, config
        size = vocabulary_size(model)
        self.vocabulary = map_vocabulary(tokenizer, target_tokenizer, size, _end_tokens(model))

    def read(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Packed rows, and `seen`: target tokens aligned, rows beyond the context."""
        size = len(self.vocabulary)
        read = [read_as_source(self.tokenizer, row, self.source.chat, size) for row in rows]
        prompts, cuts = [prompt for prompt, _ in read], [completion for _, completion in read]
        targets = [cut(self.target, row.completion) for row in rows]
        found = [RowDistribution.certain(target.ids) for target in targets]
        lengths = [len(p) + len(c.ids) for p, c in zip(prompts, cuts, strict=True)]
        limit = context_length(self.model) or max(lengths)
        # Of a row without a prompt nothing predicts the first token.
        unread = [0 if prompt else 1 for prompt in prompts]
        readable = [
            index
            for index, length in enumerate(lengths)
            if length <= limit and len(cuts[index].ids) > unread[index]
        ]
        aligned = 0
        for batch in batches_by_length([lengths[i] for i in readable], self.source.batch_tokens):
            chosen = [readable[place] for place in batch]
            passed = self._run([prompts[i] for i in chosen], [cuts[i] for i in chosen])
            for index, expected in zip(chosen, passed, strict=True):
                pairs = match_tokens(cuts[index], targets[index], self.vocabulary)
                pairs -= unread[index]
                found[index], count = self._translate(expected, pairs, targets[index].ids)
                aligned += count
        too_long = sum(length > limit for length in lengths)
        return {**pack_rows(found), "seen": torch.tensor([aligned, too_long])}

    def _run(self, prompts: Sequence[list[int]], cuts: Sequence[Cut]) -> Iterator[_Expected]:
        """What is expected in each row of one pass."""
        rows = [prompt + tokens.ids for prompt, tokens in zip(prompts, cuts, strict=True)]
        ids, mask = pad_batch(rows, pad_id(self.tokenizer))
        scored = torch.zeros_like(mask, dtype=torch.bool)
        for index, prompt in enumerate(prompts):
            scored[index, max(0, len(prompt) - 1) : len(rows[index]) - 1] = True
        own = ids.roll(-1, dims=1)[scored]
        parts: list[_Expected] = []

        def visit(logits: Tensor, span: slice) -> None:
            parts.append(self._likeliest(logits, own[span]))

        device = self.model.device
        visit_logits(
            self.model, ids.to(device), mask.to(device), scored.to(device), visit, backward=False
        )
        counts = scored.sum(dim=1).tolist()
        joined = _Expected(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return map(_Expected, *(torch.split(column, counts) for column in joined))

    def _likeliest(self, logits: Tensor, own: Tensor) -> _Expected:
        """logits (m, vocabulary) float32; own (m,), the tokens that came."""
        surprise = cross_entropy(logits, own.to(logits.device), reduction="none")
        logits = logits / self.config.temperature
        total = logits.logsumexp(dim=1)
        likely, ids = logits.topk(min(self.config.top_k, logits.shape[1]), dim=1)
        rest = logits.scatter(1, ids, NEVER).logsumexp(dim=1)
        return _Expected(
            ids.cpu(), (likely - total[:, None]).cpu(), (rest - total).cpu(), surprise.cpu()
        )

    def _translate(
        self, expected: _Expected, pairs: np.ndarray, target: Sequence[int]
    ) -> tuple[RowDistribution, int]:
        """One row in the target's tokens, and how many of them the source says something about.

        pairs: for every token of the target the one of the source at its place, or below 0.
        """
        certain = RowDistribution.certain(target)
        chosen = torch.from_numpy(np.flatnonzero(pairs >= 0))
        at = torch.from_numpy(pairs)[chosen]
        mapped = torch.from_numpy(self.vocabulary)[expected.ids[at]]
        usable = (mapped >= 0).any(dim=1)
        chosen, at, mapped = chosen[usable], at[usable], mapped[usable]
        # What is likely but no token of the target joins the rest.
        lost = expected.log_probs[at].masked_fill(mapped >= 0, NEVER).logsumexp(dim=1)
        ids, log_probs = merge_duplicates(
            mapped, expected.log_probs[at].masked_fill(mapped < 0, NEVER)
        )
        width = max(1, ids.shape[1])
        row = RowDistribution(
            certain.ids.repeat(1, width),
            torch.full((len(target), width), NEVER),
            certain.log_rest,
            float(expected.surprise.double().sum()) / max(1, len(target)),
        )
        row.log_probs[:, 0] = 0.0
        row.ids[chosen, : ids.shape[1]] = ids
        row.log_probs[chosen, : ids.shape[1]] = log_probs
        row.log_rest[chosen] = torch.logaddexp(expected.log_rest[at], lost)
        return row, len(chosen)


def _end_tokens(model: Any) -> list[int]:
    """Tokens of a source that end its answer; a chat model often has several."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        return []
    return [int(token) for token in (named if isinstance(named, list) else [named])]
