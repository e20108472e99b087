"""BitDelta: one sign a weight and one scale a matrix, the scales distilled.

Our re-implementation of BitDelta, arXiv 2402.10193: δ̂ = α · sign(δ) with α = mean|δ| (eq. 1 to 3),
then α* = argmin Σ ‖z_tuned(x) − z_packed(x; α)‖² over the calibration rows (eq. 4): 100 steps of
AdamW, learning rate 1e-4 falling along a cosine, batches of about 512 tokens. sign(0) = +1.
It has one size for the matrices, 1 bit a weight, so what a budget leaves goes to the embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from baselines.embedding import decode_embedding
from baselines.problem import Problem, TargetSide
from baselines.protocol import UnreachableError
from graftkit.compress.quantize import packed_bytes

STEPS = 100
RATES = (1e-4, 3e-4, 1e-3, 0.0)
"""Learning rates compared on the calibration rows, the paper's first; 0 leaves the means as they
are. Deltas of the nursery are larger than those of the paper, and so are their best rates."""

_BATCH_ROWS = 20


class BitDelta:
    """Variants: the learning rate."""

    name = "bitdelta"
    takes_rest = True
    draft = None

    def variants(self) -> Sequence[float]:
        """Learning rates, the cheapest last."""
        return RATES

    def encode(self, problem: Problem, room: int, variant: float, embedding: bytes) -> bytes:
        """float32 scales, then the signs of each matrix."""
        size = linears_bytes(problem.pair.side)
        if room < size:
            raise UnreachableError(f"1 bit a weight takes {size:,} bytes, and {room:,} are left")
        deltas = problem.pair.deltas
        scales = torch.stack([delta.abs().mean() for delta in deltas.values()])
        if variant and problem.rows:
            scales = distil(problem, scales, variant, embedding)
        signs = [
            np.packbits((delta >= 0).reshape(-1).numpy()).tobytes() for delta in deltas.values()
        ]
        return scales.numpy().tobytes() + b"".join(signs)

    def decode(self, side: TargetSide, payload: bytes) -> dict[str, Tensor]:
        """Scale times sign."""
        count, deltas = len(side.linears), {}
        scales = np.frombuffer(payload, "<f4", count)
        offset = 4 * count
        for name, scale in zip(side.linears, scales, strict=True):
            rows, columns = side.shape(name)
            size = packed_bytes(rows * columns, 1)
            bits = np.unpackbits(
                np.frombuffer(payload, np.uint8, size, offset), count=rows * columns
            )
            signs = torch.from_numpy(bits).float().mul_(2).sub_(1).reshape(rows, columns)
            deltas[name] = signs * float(scale)
            offset += size
        return deltas


def linears_bytes(side: TargetSide) -> int:
    """Bytes of all scales and signs."""
    return sum(4 + packed_bytes(side.before[name].numel(), 1) for name in side.linears)


def distil(problem: Problem, scales: Tensor, rate: float, embedding: bytes) -> Tensor:
    """Scales whose logits are nearest to the tuned model's."""
    pair, names = problem.pair, problem.pair.side.linears
    fixed = {name: pair.after[name].float() for name in pair.side.vectors}
    if pair.side.embedding is not None:
        before = pair.side.before[pair.side.embedding]
        fixed[pair.side.embedding] = decode_embedding(embedding, before).float()
    before = {name: pair.side.before[name].float() for name in names}
    signs = {name: torch.where(pair.deltas[name] >= 0, 1.0, -1.0) for name in names}
    learned = [scale.clone().requires_grad_() for scale in scales]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )
    batches = _goals(problem)
    for step in range(STEPS):
        ids, mask, goal = batches[step % len(batches)]
        weights: dict[str, Any] = {
            name: before[name] + scale * signs[name]
            for name, scale in zip(names, learned, strict=True)
        }
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        logits = functional_call(pair.live, {**fixed, **weights}, (), inputs).logits
        loss = (logits[mask.bool()] - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return torch.stack([scale.detach() for scale in learned])


def _goals(problem: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, mask and the tuned model's logits of batches of rows; made once a draw."""
    key = ("bitdelta", problem.seed)
    if key not in problem.pair.kept:
        goals = []
        for ids, mask in problem.batches:
            for start in range(0, len(ids), _BATCH_ROWS):
                part, own = ids[start : start + _BATCH_ROWS], mask[start : start + _BATCH_ROWS]
                longest = int(own.sum(dim=1).max())
                part, own = part[:, :longest].contiguous(), own[:, :longest]
                with torch.no_grad():
                    logits = problem.pair.tuned(
                        input_ids=part, attention_mask=own, use_cache=False
                    ).logits
                goals.append((part, own, logits[own.bool()].float()))
        problem.pair.kept[key] = goals
    deltas: list[tuple[Tensor, Tensor, Tensor]] = problem.pair.kept[key]
    return deltas
