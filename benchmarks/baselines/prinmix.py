"""PrinMix: an integer programme picks the bits of every singular rank, then U is refitted.

Our re-implementation of PrinMix (earlier DeltaMix, ADAMIX), arXiv 2506.11087. Error of row i of Vh
at b bits: e_ib = s_i² · ΔV_i XXᵀ ΔV_iᵀ. Per matrix, x_ib and y_b in {0, 1}:

    min Σ e_ib x_ib,   Σ_b x_ib = 1,   Σ c_ib x_ib <= budget,   x_ib <= y_b,   Σ_b y_b <= f_max

with 0 bits = dropped and c_ib the bytes of both factors. Then reconstruction target correction,
Ũ = argmin ‖U S Vh X − Ũ S V̂h X‖, and GPTQ of Ũ: graftkit's `lowrank.encode` computes just these.
Every matrix gets the same bits per parameter.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from baselines.problem import Problem, TargetSide
from baselines.protocol import UnreachableError, join_parts, parts_overhead, split_parts
from graftkit.compress import lowrank
from graftkit.compress.codecs import decode_matrix
from graftkit.compress.lowrank import Tier
from graftkit.compress.quantize import GROUP_SIZE, inverse_factor, quantize_rows, rows_bytes

WIDTHS = (2, 3, 4, 5, 6, 8)
F_MAX = 3
_TIME_LIMIT_SECONDS = 30.0  # a programme takes 0.01 to 0.6; a limit that is hit is not repeatable
_GAP = 1e-3


class PrinMix:
    """No variants: widths are what the programme chooses."""

    name = "prinmix"
    takes_rest = False
    draft = None

    def variants(self) -> Sequence[None]:
        """Nothing is free."""
        return (None,)

    def encode(self, problem: Problem, room: int, variant: None, embedding: bytes) -> bytes:
        """One programme for each matrix, its budget by its share of the parameters."""
        side = problem.pair.side
        room -= parts_overhead(len(side.linears))
        parameters = sum(side.before[name].numel() for name in side.linears)
        parts = []
        for name in side.linears:
            # What one matrix could not use goes to those behind it.
            own = room * side.before[name].numel() // parameters
            parts.append(self._matrix(problem, name, own))
            room -= len(parts[-1])
            parameters -= side.before[name].numel()
        if not any(parts):
            raise UnreachableError(f"no component of any matrix fits into {room:,} bytes")
        return join_parts(parts)

    def decode(self, side: TargetSide, payload: bytes) -> dict[str, Tensor]:
        """U S Vh of the decoded factors."""
        result = {}
        for name, part in zip(side.linears, split_parts(payload), strict=True):
            shape = side.shape(name)
            codec = "lowrank" if part else "zero"
            result[name] = decode_matrix(codec, memoryview(part), shape)
        return result

    def _matrix(self, problem: Problem, name: str, room: int) -> bytes:
        shape = problem.pair.side.shape(name)
        head = lowrank.payload_bytes(shape, ()) + 3 * F_MAX
        bits = choose_bits(_errors(problem, name), _costs(shape), room - head)
        tiers = tuple(
            Tier(b, int((bits == b).sum())) for b in reversed(WIDTHS) if (bits == b).any()
        )
        if not tiers:
            return b""
        order = np.concatenate([np.flatnonzero(bits == tier.bits) for tier in tiers])
        left = problem.pair.svds[name][0][:, torch.from_numpy(order)]
        delta = problem.pair.deltas[name]
        return lowrank.encode(delta, left, problem.covariances[name], tiers)


def choose_bits(errors: np.ndarray, costs: np.ndarray, room: int) -> np.ndarray:
    """Bits of each of k components under `room` bytes; 0 drops one.

    Args:
        errors: (k, 1 + widths), dropped first. costs: (1 + widths,) bytes, 0 first.
    """
    count, options = errors.shape
    if room < costs[1]:
        return np.zeros(count, int)
    # Of more components than fit at the cheapest width, those that would be missed least stay out.
    count = min(count, int(room // costs[1]) + 8)
    order = np.argsort(-errors[:, 0], kind="stable")[:count]
    errors, total = errors[order], len(errors)
    x = np.arange(count * options).reshape(count, options)
    y = count * options + np.arange(options - 1)
    size = x.size + y.size
    rows, columns, values = [], [], []

    def add(row: np.ndarray, column: np.ndarray, value: np.ndarray | float) -> None:
        rows.append(row.ravel())
        columns.append(column.ravel())
        values.append(np.broadcast_to(value, column.shape).ravel())

    each = np.arange(count)
    add(np.repeat(each, options), x, 1.0)
    add(np.full(x.shape, count), x, np.broadcast_to(costs, x.shape))
    add(np.full(y.shape, count + 1), y, 1.0)
    link = count + 2 + np.arange(count * (options - 1)).reshape(count, options - 1)
    add(link, x[:, 1:], 1.0)
    add(link, np.broadcast_to(y, link.shape), -1.0)
    height = count + 2 + link.size
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (height, size)
    )
    low = np.full(height, -np.inf)
    low[:count] = 1.0
    high = np.concatenate([np.ones(count), [room, F_MAX], np.zeros(link.size)])
    goal = np.concatenate([errors.ravel(), np.zeros(y.size)]) / max(errors.max(), 1e-30)
    result = milp(
        goal,
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        bounds=Bounds(0, 1),
        integrality=np.ones(size),
        options={"time_limit": _TIME_LIMIT_SECONDS, "mip_rel_gap": _GAP},
    )
    chosen = np.zeros(total, int)
    if result.x is not None:
        picks = result.x[: x.size].reshape(count, options).argmax(axis=1)
        chosen[order] = np.array((0, *WIDTHS))[picks]
    return chosen


def _costs(shape: tuple[int, int]) -> np.ndarray:
    """Bytes of one component at each width, rounded up as in a tier of its own."""
    sizes = [sum(rows_bytes(1, side, b, GROUP_SIZE) for side in shape) + 2 for b in WIDTHS]
    return np.array([0, *sizes], float)


def _errors(problem: Problem, name: str) -> np.ndarray:
    """e_ib of every component at every width, the dropped one first; computed once."""
    key = ("prinmix", problem.seed, name)
    if key not in problem.pair.kept:
        left, _ = problem.pair.svds[name]
        right = left.T @ problem.pair.deltas[name]
        covariance = problem.covariances[name]
        feedback = None if covariance is None else inverse_factor(covariance)
        metric = torch.eye(right.shape[1]) if covariance is None else covariance
        norms = right.norm(dim=1, keepdim=True).clamp(min=1e-30)
        columns = [((right @ metric) * right).sum(dim=1)]
        for bits in WIDTHS:
            error = quantize_rows(right / norms, bits, feedback).dequantize() * norms - right
            columns.append(((error @ metric) * error).sum(dim=1))
        problem.pair.kept[key] = torch.stack(columns, dim=1).double().numpy()
    result: np.ndarray = problem.pair.kept[key]
    return result
