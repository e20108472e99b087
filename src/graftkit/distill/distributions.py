"""What sources expect at every token of the target's completions: a file, and batches of it.

The likeliest tokens are kept, in the target's vocabulary, and all others are one number. A token
that a source says nothing about is certain to be the target's own, so that the divergence there is
a cross-entropy (FuseLLM, arXiv 2401.10491). `collecting` writes the file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftkit.checkpoint import save_tensors
from graftkit.errors import RowsError
from graftkit.files import replaced_file

NEVER = -math.inf  # log-probability of what cannot be
_KEY = "graftkit.distributions"  # of the file's only metadata; several would come in any order


@dataclass(frozen=True)
class RowDistribution:
    """What is expected at the n completion tokens of one row, EOS among them.

    Attributes:
        ids: tokens of the target, int64 (n, k), likeliest first; a short list repeats its first.
        log_probs: their log-probabilities, float32 (n, k), nats; -inf for what is repeated.
        log_rest: log of what all other tokens have together, (n,); -inf: nothing is left for them.
        cross_entropy: of the whole completion under the source, nats per target token, so that
            sources of any tokenizer compare; infinite where the source could not read the row.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    cross_entropy: float

    @classmethod
    def certain(cls, ids: Sequence[int]) -> "RowDistribution":
        """The row's own tokens and nothing else: what is known where no source could read it."""
        shape = (len(ids), 1)
        tokens = torch.tensor(ids, dtype=torch.int64).reshape(shape)
        return cls(tokens, torch.zeros(shape), torch.full(shape[:1], NEVER), math.inf)


@dataclass(frozen=True)
class Summary:
    """What a file holds.

    rows, tokens: of the target. aligned: tokens that the source says something about.
    too_long: rows beyond the source's context.
    """

    rows: int
    tokens: int
    aligned: int
    too_long: int


class Distributions:
    """A file of `collect_distributions`, memory-mapped; rows are read when they are asked for."""

    def __init__(self, file: Path):
        """Open a file. Raises: RowsError when it is missing or of another kind."""
        try:
            self._file = _open(file)
            said = json.loads(self._file.metadata()[_KEY])
            self.job: str = said.pop("job")
            self.summary = Summary(**said)
            self._tokens = self._file.get_tensor("row_tokens").tolist()
            self._entries = self._file.get_tensor("row_entries").tolist()
            self._cross_entropy = self._file.get_tensor("cross_entropy").tolist()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RowsError(
                f"{file}: no distributions of a source ({error}); delete the file and run again"
            ) from error
        self.file = file

    def __len__(self) -> int:
        """Rows."""
        return self.summary.rows

    def __getitem__(self, row: int) -> RowDistribution:
        """What the source expects in one row, by its index."""
        counts = self._slice("counts", self._tokens, row).long()
        log_rest = self._slice("log_rest", self._tokens, row).float()
        listed = torch.arange(int(counts.max()) if len(counts) else 0) < counts[:, None]
        ids = torch.zeros(listed.shape, dtype=torch.int64)
        ids[listed] = self._slice("ids", self._entries, row).long()
        log_probs = torch.full(listed.shape, NEVER)
        log_probs[listed] = self._slice("log_probs", self._entries, row).float()
        # What was rounded to 16 bits adds up to 1 no longer.
        total = torch.cat([log_probs, log_rest[:, None]], dim=1).logsumexp(dim=1)
        return RowDistribution(
            torch.where(listed, ids, ids[:, :1]),
            log_probs - total[:, None],
            log_rest - total,
            self._cross_entropy[row],
        )

    def _slice(self, name: str, offsets: Sequence[int], row: int) -> Tensor:
        found: Tensor = self._file.get_slice(name)[offsets[row] : offsets[row + 1]]
        return found


def _open(file: Path) -> Any:
    return safe_open(str(file), framework="pt")


def pack_rows(rows: Sequence[RowDistribution]) -> dict[str, Tensor]:
    """Rows as flat tensors: for each row its tokens, for each token its listed ids."""
    listed = [row.log_probs > NEVER for row in rows]
    return {
        "ids": torch.cat([row.ids[kept] for row, kept in zip(rows, listed, strict=True)]).int(),
        "log_probs": torch.cat(
            [row.log_probs[kept] for row, kept in zip(rows, listed, strict=True)]
        ).half(),
        "counts": torch.cat([kept.sum(dim=1) for kept in listed]).to(torch.uint16),
        "log_rest": torch.cat([row.log_rest for row in rows]).half(),
        "row_tokens": torch.tensor([len(row.ids) for row in rows]),
        "row_entries": torch.tensor([int(kept.sum()) for kept in listed]),
        "cross_entropy": torch.tensor([row.cross_entropy for row in rows]),
    }


def write_distributions(
    shards: Sequence[dict[str, Tensor]], summary: Summary, job: str, file: Path
) -> None:
    """Write packed rows, one shard behind the other, as one file. Raises: OutputError."""
    tensors = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    if summary.tokens and int(tensors["ids"].max()) < 2**16:
        tensors["ids"] = tensors["ids"].to(torch.uint16)
    for name in ("row_tokens", "row_entries"):
        tensors[name] = torch.cat([torch.zeros(1, dtype=torch.int64), tensors[name].cumsum(0)])
    metadata = {_KEY: json.dumps({"job": job, **asdict(summary)})}
    with replaced_file(file) as partial:
        save_tensors(tensors, partial, metadata)


def merge_duplicates(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Add up what the same id has in a list, likeliest first; ids and log_probs (n, m).

    Returns: (n, k) each; shorter lists repeat their first id at -inf.
    """
    order = ids.argsort(dim=1, stable=True)
    ids, chances = ids.gather(1, order), log_probs.double().exp().gather(1, order)
    group = torch.zeros_like(ids)
    group[:, 1:] = (ids[:, 1:] != ids[:, :-1]).cumsum(dim=1)
    chances = torch.zeros_like(chances).scatter_add_(1, group, chances)
    ids = torch.zeros_like(ids).scatter_(1, group, ids)
    order = chances.argsort(dim=1, descending=True, stable=True)
    ids, chances = ids.gather(1, order), chances.gather(1, order)
    longest = int((chances > 0).sum(dim=1).max()) if len(ids) else 0
    ids = torch.where(chances > 0, ids, ids[:, :1])
    return ids[:, :longest], chances.log().float()[:, :longest]


def fuse_distributions(
    rows: Sequence[RowDistribution], fusion: Literal["min_ce", "average_ce"]
) -> RowDistribution:
    """One distribution of several sources' for the same row (FuseLLM, section 3.2).

    min_ce: that of the source with the least cross-entropy, the first of equals. average_ce: the
    mean, weighted with softmax(exp(-cross_entropy)). Sources that could not read the row are left
    out while another could.
    """
    able = [row for row in rows if math.isfinite(row.cross_entropy)]
    if not able:
        return rows[0]
    if fusion == "min_ce" or len(able) == 1:
        return min(able, key=lambda row: row.cross_entropy)
    rewards = torch.tensor([-row.cross_entropy for row in able]).exp()
    weights = rewards.softmax(dim=0)
    shares = list(zip(able, weights.log(), strict=True))
    ids, log_probs = merge_duplicates(
        torch.cat([row.ids for row in able], dim=1),
        torch.cat([row.log_probs + share for row, share in shares], dim=1),
    )
    log_rest = torch.stack([row.log_rest + share for row, share in shares]).logsumexp(dim=0)
    mean = sum(float(weight) * row.cross_entropy for row, weight in zip(able, weights, strict=True))
    return RowDistribution(ids, log_probs, log_rest, mean)


def distribution_batch(
    sources: Sequence[Distributions],
    indices: Sequence[int],
    encoded: Sequence[tuple[Sequence[int], int]],
    fusion: Literal["min_ce", "average_ce"],
) -> dict[str, Tensor]:
    """What the sources expect in a batch of rows, at the places of the target's logits.

    Args:
        indices: of the rows, in the files. encoded: the same rows from
            `graftkit.rows.encode_row` with the target's tokenizer: ids and the completion's start.
    Returns: for T tokens of the longest row, padded on the right as input_ids are:
        kl_mask (rows, T) bool, where logits predict a completion token;
        kl_ids, kl_log_probs (rows, T, k), kl_log_rest (rows, T), to be read where it is true.
    Raises: RowsError where a file is of other rows than these.
    """
    found = []
    for index, (ids, start) in zip(indices, encoded, strict=True):
        rows = [source[index] for source in sources]
        for source, row in zip(sources, rows, strict=True):
            if len(row.ids) != len(ids) - start:
                raise RowsError(
                    f"{source.file}: row {index} has {len(row.ids)} completion tokens, but the "
                    f"target's has {len(ids) - start}; delete the file and run again"
                )
        found.append(fuse_distributions(rows, fusion))
    shape = (len(found), max(len(ids) for ids, _ in encoded))
    longest = max(row.ids.shape[1] for row in found)
    batch = {
        "kl_mask": torch.zeros(shape, dtype=torch.bool),
        "kl_ids": torch.zeros((*shape, longest), dtype=torch.int64),
        "kl_log_probs": torch.full((*shape, longest), NEVER),
        "kl_log_rest": torch.full(shape, NEVER),
    }
    for line, (row, (ids, start)) in enumerate(zip(found, encoded, strict=True)):
        first = max(0, start - 1)  # nothing predicts a row's first token
        places, tokens = slice(first, len(ids) - 1), slice(first + 1 - start, None)
        width = row.ids.shape[1]
        batch["kl_mask"][line, places] = True
        batch["kl_ids"][line, places] = row.ids[tokens, :1]  # beyond `width` the first again
        batch["kl_ids"][line, places, :width] = row.ids[tokens]
        batch["kl_log_probs"][line, places, :width] = row.log_probs[tokens]
        batch["kl_log_rest"][line, places] = row.log_rest[tokens]
    return batch
