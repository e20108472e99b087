"""Truncated SVD in bf16: δ ≈ (U √S)(√S Vh), both factors rounded to bf16, nothing calibrated.

Our re-implementation of the classical baseline (Eckart-Young) that Delta-CoMe, arXiv 2406.08903
section 4, calls low-rank: no equation of it is special. Ranks follow the energy of the components.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.problem import Problem, TargetSide
from baselines.protocol import UnreachableError, join_parts, parts_overhead, split_parts

_RANK = struct.Struct("<H")


class TruncatedSvd:
    """Variants: whose energy counts.

    absolute: squared singular values as they are, per byte; relative: the same as shares of each
    matrix's own; even: one share of the full rank for every matrix.
    """

    name = "svd"
    takes_rest = False
    draft = None

    def variants(self) -> Sequence[str]:
        """Ways to spread ranks."""
        return ("absolute", "relative", "even")

    def encode(self, problem: Problem, room: int, variant: str, embedding: bytes) -> bytes:
        """Ranks by energy per byte, largest first, until the room is full."""
        pair = problem.pair
        names = pair.side.linears
        room -= parts_overhead(len(names)) + len(names) * _RANK.size
        ranks = _ranks(problem, room, variant)
        parts = []
        for name in names:
            left, values = (part[..., : ranks[name]] for part in pair.svds[name])
            root = values.clamp(min=1e-30).sqrt()
            right = (left.T @ pair.deltas[name]) / root[:, None]
            factors = torch.cat([(left * root).reshape(-1), right.reshape(-1)]).bfloat16()
            parts.append(_RANK.pack(ranks[name]) + factors.view(torch.uint8).numpy().tobytes())
        return join_parts(parts)

    def decode(self, side: TargetSide, payload: bytes) -> dict[str, Tensor]:
        """left @ right."""
        result = {}
        for name, part in zip(side.linears, split_parts(payload), strict=True):
            rows, columns = side.shape(name)
            (rank,) = _RANK.unpack_from(part)
            body = bytearray(part[_RANK.size :])
            if not rank:
                result[name] = torch.zeros(rows, columns)
                continue
            factors = torch.frombuffer(body, dtype=torch.bfloat16).float()
            left, right = factors.split([rows * rank, rank * columns])
            result[name] = left.reshape(rows, rank) @ right.reshape(rank, columns)
        return result


def _ranks(problem: Problem, room: int, variant: str) -> dict[str, int]:
    """Components of each matrix: the best in energy per byte that fit together."""
    pair = problem.pair
    worth, costs, owners = [], [], []
    for index, name in enumerate(pair.side.linears):
        values = pair.svds[name][1].double()
        cost = 2 * sum(pair.side.shape(name))
        energy = values.square()
        if variant == "relative":
            energy = energy / energy.sum().clamp(min=1e-30)
        if variant == "even":
            energy = cost * (1 - torch.arange(len(values)) / len(values))
        worth.append(energy / cost)
        costs.append(torch.full((len(values),), cost))
        owners.append(torch.full((len(values),), index))
    order = torch.cat(worth).argsort(descending=True, stable=True)
    spent = torch.cat(costs)[order].cumsum(0)
    kept = int((spent <= room).sum())
    if kept == 0:
        raise UnreachableError(f"one rank of one matrix does not fit into {room:,} bytes")
    counts = torch.bincount(torch.cat(owners)[order[:kept]], minlength=len(pair.side.linears))
    return dict(zip(pair.side.linears, counts.tolist(), strict=True))
