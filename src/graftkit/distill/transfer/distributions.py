"""The stage `probe`: what the sources predict at every token of the SFT completions, in a file.

A source reads prompt and completion in its own tokens. Its likeliest tokens are stored in the
target's vocabulary, and all others as one number. Where a source predicts nothing about a target
token, that token has the probability 1, so that the divergence there is a cross-entropy (FuseLLM,
arXiv 2401.10491). Rows are read in shards; a killed run continues, and writes the same bytes.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import cross_entropy

from graftkit.checkpoint import save_tensors
from graftkit.distill.config import ModelSource, Transfer
from graftkit.distill.transfer.alignment import (
    TokenizedText,
    map_vocabulary,
    match_tokens,
    read_as_source,
    tokenize_completion,
)
from graftkit.errors import RowsError
from graftkit.files import WorkFolder, replaced_file
from graftkit.models.backward import visit_logits
from graftkit.models.text import context_length, pad_id, vocabulary_size
from graftkit.progress import StepProgress, silent
from graftkit.rows import EncodedRow, Row, batches_by_length, pad_batch

NEVER = -math.inf  # log-probability of 0
_KEY = "graftkit.distributions"  # of the metadata; one key, because the order of several varies


@dataclass(frozen=True)
class RowDistribution:
    """Distributions at the n completion tokens of one row, with EOS.

    Attributes:
        ids: tokens of the target, int64 (n, k), likeliest first. A shorter list is filled with its
            first token.
        log_probs: their log-probabilities, float32 (n, k), nats; -inf for the filling.
        log_rest: log-probability of all other tokens together, (n,); -inf for none.
        cross_entropy: of the whole completion under the source, nats per *target* token, so that
            sources with different tokenizers can be compared; inf for a row that it could not read.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    cross_entropy: float

    @classmethod
    def certain(cls, ids: Sequence[int]) -> "RowDistribution":
        """The row's own tokens with probability 1, for a row that the source could not read."""
        shape = (len(ids), 1)
        tokens = torch.tensor(ids, dtype=torch.int64).reshape(shape)
        return cls(tokens, torch.zeros(shape), torch.full(shape[:1], NEVER), math.inf)


@dataclass(frozen=True)
class DistributionSummary:
    """Counts of a file.

    Attributes:
        rows, tokens: SFT rows, and completion tokens of the target.
        aligned: tokens that the source predicts.
        too_long: rows beyond the source's context.
    """

    rows: int
    tokens: int
    aligned: int
    too_long: int


class DistributionFile:
    """A file of `collect_distributions`, memory-mapped. A row is read when it is indexed."""

    def __init__(self, file: Path):
        """Open a file. Raises: RowsError for a file that is missing or of another kind."""
        try:
            self._file = _open(file)
            metadata = json.loads(self._file.metadata()[_KEY])
            self.job: str = metadata.pop("job")
            self.summary = DistributionSummary(**metadata)
            self._tokens = self._file.get_tensor("row_tokens").tolist()
            self._entries = self._file.get_tensor("row_entries").tolist()
            self._cross_entropy = self._file.get_tensor("cross_entropy").tolist()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RowsError(
                f"{file}: no distributions of a source ({error}); delete the file and run again"
            ) from error
        self.file = file

    def __len__(self) -> int:
        """Number of rows."""
        return self.summary.rows

    def __getitem__(self, row: int) -> RowDistribution:
        """The distributions of one row."""
        counts = self._slice("counts", self._tokens, row).long()
        log_rest = self._slice("log_rest", self._tokens, row).float()
        listed = torch.arange(int(counts.max()) if len(counts) else 0) < counts[:, None]
        ids = torch.zeros(listed.shape, dtype=torch.int64)
        ids[listed] = self._slice("ids", self._entries, row).long()
        log_probs = torch.full(listed.shape, NEVER)
        log_probs[listed] = self._slice("log_probs", self._entries, row).float()
        # Probabilities rounded to 16 bits do not add up to 1.
        total = torch.cat([log_probs, log_rest[:, None]], dim=1).logsumexp(dim=1)
        return RowDistribution(
            torch.where(listed, ids, ids[:, :1]),
            log_probs - total[:, None],
            log_rest - total,
            self._cross_entropy[row],
        )

    def _slice(self, name: str, offsets: Sequence[int], row: int) -> Tensor:
        part: Tensor = self._file.get_slice(name)[offsets[row] : offsets[row + 1]]
        return part


def _open(file: Path) -> Any:
    return safe_open(str(file), framework="pt")


def pack_rows(rows: Sequence[RowDistribution]) -> dict[str, Tensor]:
    """Rows as flat tensors: the listed ids of all tokens of all rows, with their counts."""
    listed = [row.log_probs > NEVER for row in rows]
    return {
        "ids": torch.cat([row.ids[mask] for row, mask in zip(rows, listed, strict=True)]).int(),
        "log_probs": torch.cat(
            [row.log_probs[mask] for row, mask in zip(rows, listed, strict=True)]
        ).half(),
        "counts": torch.cat([mask.sum(dim=1) for mask in listed]).to(torch.uint16),
        "log_rest": torch.cat([row.log_rest for row in rows]).half(),
        "row_tokens": torch.tensor([len(row.ids) for row in rows]),
        "row_entries": torch.tensor([int(mask.sum()) for mask in listed]),
        "cross_entropy": torch.tensor([row.cross_entropy for row in rows]),
    }


def write_distributions(
    shards: Sequence[dict[str, Tensor]], summary: DistributionSummary, job: str, file: Path
) -> None:
    """Write the packed rows of all shards as one file. Raises: OutputError."""
    tensors = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    if summary.tokens and int(tensors["ids"].max()) < 2**16:
        tensors["ids"] = tensors["ids"].to(torch.uint16)
    for name in ("row_tokens", "row_entries"):
        tensors[name] = torch.cat([torch.zeros(1, dtype=torch.int64), tensors[name].cumsum(0)])
    metadata = {_KEY: json.dumps({"job": job, **asdict(summary)})}
    with replaced_file(file) as partial:
        save_tensors(tensors, partial, metadata)


def merge_duplicate_tokens(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the probabilities of equal ids in every list; ids and log_probs are (n, m).

    Returns: ids and log_probs, (n, k), likeliest first; shorter lists are filled with their first
        id at -inf.
    """
    order = ids.argsort(dim=1, stable=True)
    ids, probabilities = ids.gather(1, order), log_probs.double().exp().gather(1, order)
    group = torch.zeros_like(ids)
    group[:, 1:] = (ids[:, 1:] != ids[:, :-1]).cumsum(dim=1)
    probabilities = torch.zeros_like(probabilities).scatter_add_(1, group, probabilities)
    ids = torch.zeros_like(ids).scatter_(1, group, ids)
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    ids, probabilities = ids.gather(1, order), probabilities.gather(1, order)
    longest = int((probabilities > 0).sum(dim=1).max()) if len(ids) else 0
    ids = torch.where(probabilities > 0, ids, ids[:, :1])
    return ids[:, :longest], probabilities.log().float()[:, :longest]


def fuse_distributions(
    rows: Sequence[RowDistribution], fusion: Literal["min_ce", "average_ce"]
) -> RowDistribution:
    """One distribution from those of several sources for the same row (FuseLLM, section 3.2).

    min_ce: that of the source with the smallest cross-entropy, the first of equals. average_ce: the
    mean, weighted with softmax(exp(-cross_entropy)). Sources that could not read the row count only
    if none could.
    """
    readable = [row for row in rows if math.isfinite(row.cross_entropy)]
    if not readable:
        return rows[0]
    if fusion == "min_ce" or len(readable) == 1:
        return min(readable, key=lambda row: row.cross_entropy)
    rewards = torch.tensor([-row.cross_entropy for row in readable]).exp()
    weights = rewards.softmax(dim=0)
    shares = list(zip(readable, weights.log(), strict=True))
    ids, log_probs = merge_duplicate_tokens(
        torch.cat([row.ids for row in readable], dim=1),
        torch.cat([row.log_probs + share for row, share in shares], dim=1),
    )
    log_rest = torch.stack([row.log_rest + share for row, share in shares]).logsumexp(dim=0)
    mean = sum(
        float(weight) * row.cross_entropy for row, weight in zip(readable, weights, strict=True)
    )
    return RowDistribution(ids, log_probs, log_rest, mean)


def distribution_batch(
    sources: Sequence[DistributionFile],
    indices: Sequence[int],
    encoded: Sequence[EncodedRow],
    fusion: Literal["min_ce", "average_ce"],
) -> dict[str, Tensor]:
    """The fused distributions of a batch of rows, at the positions of the target's logits.

    Args:
        indices: of the rows, in the files.
        encoded: the same rows from `graftkit.rows.encode_row` with the target's tokenizer.
    Returns: for T tokens of the longest row, padded on the right as input_ids are:
        kl_mask (rows, T) bool, where logits predict a completion token;
        kl_ids, kl_log_probs (rows, T, k) and kl_log_rest (rows, T), valid where kl_mask is true.
    Raises: RowsError for a file of other rows.
    """
    fused = []
    for index, whole in zip(indices, encoded, strict=True):
        rows = [source[index] for source in sources]
        for source, row in zip(sources, rows, strict=True):
            if len(row.ids) != len(whole) - whole.start:
                raise RowsError(
                    f"{source.file}: row {index} has {len(row.ids)} completion tokens, but the "
                    f"target's has {len(whole) - whole.start}; delete the file and run again"
                )
        fused.append(fuse_distributions(rows, fusion))
    shape = (len(fused), max(map(len, encoded)))
    longest = max(row.ids.shape[1] for row in fused)
    batch = {
        "kl_mask": torch.zeros(shape, dtype=torch.bool),
        "kl_ids": torch.zeros((*shape, longest), dtype=torch.int64),
        "kl_log_probs": torch.full((*shape, longest), NEVER),
        "kl_log_rest": torch.full(shape, NEVER),
    }
    for line, (row, whole) in enumerate(zip(fused, encoded, strict=True)):
        first = max(0, whole.start - 1)  # no logits predict a row's first token
        places, tokens = slice(first, len(whole) - 1), slice(first + 1 - whole.start, None)
        width = row.ids.shape[1]
        batch["kl_mask"][line, places] = True
        batch["kl_ids"][line, places] = row.ids[tokens, :1]  # beyond `width` the first again
        batch["kl_ids"][line, places, :width] = row.ids[tokens]
        batch["kl_log_probs"][line, places, :width] = row.log_probs[tokens]
        batch["kl_log_rest"][line, places] = row.log_rest[tokens]
    return batch


SHARD_ROWS = 256  # a killed run reads at most so many rows again


def collect_distributions(
    source: ModelSource,
    model: Any,
    tokenizer: Any,
    target_tokenizer: Any,
    rows: Sequence[Row],
    config: Transfer,
    file: Path,
    progress: StepProgress | None = None,
) -> DistributionSummary:
    """Write the distributions of one source for `rows`, in their order, to a safetensors file.

    A finished file of the same rows, models and settings is not written again. Probabilities are
    those at `config.temperature`; the cross-entropy is that at temperature 1.

    Args:
        model, tokenizer: of the source; a causal language model in memory, on any device.
        rows: as the source reads them, without a chat template.
    Raises: RowsError without rows; CheckpointError for a tokenizer that cannot be used;
        OutputError.
    """
    if not rows:
        raise RowsError("no rows to read; expected the rows that the target is trained on")
    job = _job(source, [tokenizer, target_tokenizer], _end_tokens(model), rows, config)
    if file.is_file() and (finished := DistributionFile(file)).job == job:
        return finished.summary
    with closing(WorkFolder(file.with_name(file.name + ".partial"))) as work:
        work.open(job)
        reader = _SourceReader(source, model, tokenizer, target_tokenizer, config)
        shards = _read_shards(reader, rows, work, progress or silent)
        counts = torch.stack([shard.pop("seen") for shard in shards]).sum(dim=0)
        aligned, too_long = counts.tolist()
        tokens = sum(len(shard["counts"]) for shard in shards)
        summary = DistributionSummary(len(rows), tokens, aligned, too_long)
        write_distributions(shards, summary, job, file)
        work.remove()
    return summary


def _read_shards(
    reader: "_SourceReader", rows: Sequence[Row], work: WorkFolder, progress: StepProgress
) -> list[dict[str, Tensor]]:
    """The packed rows of every shard; finished shards are loaded, not computed again."""
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
    """A digest of everything that determines the file."""
    settings = [source.model, source.chat, source.batch_tokens, config.top_k, config.temperature]
    tokens = [[sorted(t.get_vocab().items()), t.eos_token_id] for t in tokenizers]
    texts = [[row.prompt, row.completion] for row in rows]
    return blake3(json.dumps([settings, tokens, ends, texts]).encode()).hexdigest()


class _Predictions(NamedTuple):
    """A source's distributions at the m completion tokens that it predicts, in its own tokens.

    ids, log_probs: (m, k). log_rest: (m,). surprise: (m,), −log p of the token that follows.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    surprise: Tensor


class _SourceReader:
    """A source that reads rows; its predictions are translated to the target's tokens."""

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
        """Packed rows, and `seen`: the number of aligned tokens and of rows beyond the context."""
        size = len(self.vocabulary)
        read = [read_as_source(self.tokenizer, row, self.source.chat, size) for row in rows]
        prompts, cuts = [prompt for prompt, _ in read], [completion for _, completion in read]
        targets = [tokenize_completion(self.target, row.completion) for row in rows]
        distributions = [RowDistribution.certain(target.ids) for target in targets]
        lengths = [len(p) + len(c.ids) for p, c in zip(prompts, cuts, strict=True)]
        limit = context_length(self.model) or max(lengths)
        # Without a prompt, no position predicts the first token.
        unpredicted = [0 if prompt else 1 for prompt in prompts]
        readable = [
            index
            for index, length in enumerate(lengths)
            if length <= limit and len(cuts[index].ids) > unpredicted[index]
        ]
        aligned = 0
        for batch in batches_by_length([lengths[i] for i in readable], self.source.batch_tokens):
            chosen = [readable[place] for place in batch]
            predictions = self._run([prompts[i] for i in chosen], [cuts[i] for i in chosen])
            for index, expected in zip(chosen, predictions, strict=True):
                pairs = match_tokens(cuts[index], targets[index], self.vocabulary)
                pairs -= unpredicted[index]
                distributions[index], count = self._translate(expected, pairs, targets[index].ids)
                aligned += count
        too_long = sum(length > limit for length in lengths)
        return {**pack_rows(distributions), "seen": torch.tensor([aligned, too_long])}

    def _run(
        self, prompts: Sequence[list[int]], cuts: Sequence[TokenizedText]
    ) -> Iterator[_Predictions]:
        """The predictions for each row of one batch."""
        rows = [prompt + tokens.ids for prompt, tokens in zip(prompts, cuts, strict=True)]
        ids, mask = pad_batch(rows, pad_id(self.tokenizer))
        scored = torch.zeros_like(mask, dtype=torch.bool)
        for index, prompt in enumerate(prompts):
            scored[index, max(0, len(prompt) - 1) : len(rows[index]) - 1] = True
        own = ids.roll(-1, dims=1)[scored]
        parts: list[_Predictions] = []

        def visit(logits: Tensor, span: slice) -> None:
            parts.append(self._likeliest(logits, own[span]))

        device = self.model.device
        visit_logits(
            self.model, ids.to(device), mask.to(device), scored.to(device), visit, backward=False
        )
        counts = scored.sum(dim=1).tolist()
        joined = _Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return map(_Predictions, *(torch.split(column, counts) for column in joined))

    def _likeliest(self, logits: Tensor, own: Tensor) -> _Predictions:
        """logits (m, vocabulary) float32; own (m,), the tokens that follow."""
        surprise = cross_entropy(logits, own.to(logits.device), reduction="none")
        logits = logits / self.config.temperature
        total = logits.logsumexp(dim=1)
        likely, ids = logits.topk(min(self.config.top_k, logits.shape[1]), dim=1)
        rest = logits.scatter(1, ids, NEVER).logsumexp(dim=1)
        return _Predictions(
            ids.cpu(), (likely - total[:, None]).cpu(), (rest - total).cpu(), surprise.cpu()
        )

    def _translate(
        self, expected: _Predictions, pairs: np.ndarray, target: Sequence[int]
    ) -> tuple[RowDistribution, int]:
        """One row in the target's tokens, and the number of tokens that the source predicts.

        pairs: for every target token the index of the aligned source token, or below 0.
        """
        certain = RowDistribution.certain(target)
        chosen = torch.from_numpy(np.flatnonzero(pairs >= 0))
        at = torch.from_numpy(pairs)[chosen]
        mapped = torch.from_numpy(self.vocabulary)[expected.ids[at]]
        usable = (mapped >= 0).any(dim=1)
        chosen, at, mapped = chosen[usable], at[usable], mapped[usable]
        # The probability of tokens that the target lacks joins the rest.
        lost = expected.log_probs[at].masked_fill(mapped >= 0, NEVER).logsumexp(dim=1)
        ids, log_probs = merge_duplicate_tokens(
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
    """Tokens of a source that end its answer; chat models often have several."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        return []
    return [int(token) for token in (named if isinstance(named, list) else [named])]
