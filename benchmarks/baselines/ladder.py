"""Delta-CoMe: singular components in fixed tiers of 8, 3 and 2 bits, GPTQ of Vh, then of U.

Our re-implementation of Delta-CoMe, arXiv 2406.08903, equations 4 to 6: of the first components 2
have 8 bits, 32 have 3 and 968 (attention) or 1,428 (MLP) have 2, scaled here to the rank that fits.
V̂h = argmin ‖Vh x − V̂h x‖², Û = argmin ‖U (S V̂h x) − Û (S V̂h x)‖², groups of 128.

Variant "published" repeats its released code's calibration: inputs and outputs of a layer are
swapped inside the loop over tiers, so that each layer is applied once for every tier, later tiers
are measured on the layer's own output, and all later layers on activations that never occur.
Variant "fixed" measures every layer's inputs in the tuned model and refits U to V̂h.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baselines.factors import decode_tiers, encode_tier, tiers_bytes
from baselines.problem import Pair, Problem, TargetSide, collecting
from baselines.protocol import UnreachableError, join_parts, parts_overhead, split_parts
from graftkit.compress import lowrank
from graftkit.compress.codecs import decode_matrix
from graftkit.compress.lowrank import Tier
from graftkit.models.loading import load_model

COLUMNS = (2, 32, 968)  # at 8, 3 and 2 bits, of width 4,096
BITS = (8, 3, 2)
MLP_RANK_FACTOR = 1462 / 1002  # rank of an MLP matrix over that of attention, at width 4,096
_STEPS = 400
_BATCHES = 4  # 128 sequences, as in the paper


class DeltaCome:
    """One ladder for all layers; `published` tells which calibration."""

    takes_rest = False

    def __init__(self, published: bool):
        self.published = published
        self.name = "deltacome-published" if published else "deltacome-fixed"
        # Its pass over the layers is slow: shares are compared on the fixed variant.
        self.draft = DeltaCome(False) if published else None

    def variants(self) -> Sequence[None]:
        """Nothing is free but the rank, which follows the budget."""
        return (None,)

    def encode(self, problem: Problem, room: int, variant: None, embedding: bytes) -> bytes:
        """The largest ladder that fits."""
        size = tiers_bytes if self.published else lowrank.payload_bytes
        tiers = _fit(problem.pair.side, room, size)
        if self.published:
            return join_parts(_published(problem, tiers))
        parts = []
        for name, delta in problem.pair.deltas.items():
            rank = sum(tier.rank for tier in tiers[name])
            left = problem.pair.svds[name][0][:, :rank]
            parts.append(lowrank.encode(delta, left, problem.covariances[name], tiers[name]))
        return join_parts(parts)

    def decode(self, side: TargetSide, payload: bytes) -> dict[str, Tensor]:
        """The sum of all tiers."""
        parts = zip(side.linears, split_parts(payload), strict=True)
        if self.published:
            return {name: decode_tiers(part, side.shape(name)) for name, part in parts}
        return {
            name: decode_matrix("lowrank", memoryview(p), side.shape(name)) for name, p in parts
        }


def _fit(side: TargetSide, room: int, payload_bytes: Any) -> dict[str, tuple[Tier, ...]]:
    """Tiers of every matrix at the largest share of the rank that fits."""
    room -= parts_overhead(len(side.linears))
    best = None
    for step in range(1, _STEPS + 1):
        share = (step / _STEPS) ** 2
        tiers = {name: _tiers(side.shape(name), share, "mlp" in name) for name in side.linears}
        size = sum(payload_bytes(side.shape(name), tiers[name]) for name in side.linears)
        if size > room:
            break
        best = tiers
    if best is None:
        raise UnreachableError(
            f"one component a matrix, which has 8 bits, takes {size:,} of {room:,} bytes"
        )
    return best


def _tiers(shape: tuple[int, int], share: float, mlp: bool) -> tuple[Tier, ...]:
    full = min(shape)
    rank = max(1, min(full, round(full * share * (MLP_RANK_FACTOR if mlp else 1.0))))
    total = sum(COLUMNS)
    high = max(1, round(rank * COLUMNS[0] / total))
    middle = min(rank - high, round(rank * COLUMNS[1] / total))
    counts = (high, middle, rank - high - middle)
    return tuple(Tier(bits, count) for bits, count in zip(BITS, counts, strict=True) if count)


def _published(problem: Problem, tiers: dict[str, tuple[Tier, ...]]) -> list[bytes]:
    """Tier by tier, layer by layer, with the swap inside the loop over tiers."""
    pair = problem.pair
    model = load_model(pair.target_path, torch.float32)
    with torch.no_grad():
        for name, tensor in pair.after.items():
            if name not in pair.side.linears:
                model.get_parameter(name).copy_(tensor)
        states = _first_inputs(model, problem)
        coded: dict[str, list[bytes]] = {name: [] for name in pair.side.linears}
        for index, layer in enumerate(_layers(model)):
            names = [name for name in pair.side.linears if f".{index}." in name]
            for step in range(len(BITS)):
                with collecting(model, names) as inputs:
                    _run(layer, states, inputs)
                for name in names:
                    _add_tier(pair, model, name, tiers[name], step, inputs.damped(name), coded)
                # The mistake: it belongs behind this loop.
                _run(layer, states, None, swap=True)
    return [b"".join(parts) for parts in coded.values()]


def _add_tier(
    pair: Pair, model: Any, name: str, tiers: tuple[Tier, ...], step: int, h: Tensor, coded: Any
) -> None:
    """Quantize one tier of one matrix and fold it into the running weight."""
    if step >= len(tiers):
        return
    start = sum(tier.rank for tier in tiers[:step])
    span = slice(start, start + tiers[step].rank)
    left = pair.svds[name][0][:, span]
    payload, delta = encode_tier(left, left.T @ pair.deltas[name], tiers[step].bits, h)
    coded[name].append(payload)
    model.get_parameter(name).add_(delta)


def _layers(model: Any) -> Any:
    """The decoder layers: the only list of modules directly below the base model."""
    return next(m for m in model.base_model.children() if isinstance(m, torch.nn.ModuleList))


def _first_inputs(model: Any, problem: Problem) -> list[dict[str, Any]]:
    """What the first layer is called with, for every batch."""
    states: list[dict[str, Any]] = []

    def capture(module: Any, args: Any, kwargs: Any, mask: Tensor) -> None:
        states.append({"hidden": args[0], "options": dict(kwargs), "mask": mask.bool()})

    for ids, mask in problem.batches[:_BATCHES]:
        hook = partial(capture, mask=mask)
        handle = _layers(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        handle.remove()
    return states


def _run(layer: Any, states: list[dict[str, Any]], inputs: Any, swap: bool = False) -> None:
    for state in states:
        if inputs is not None:
            inputs.mask = state["mask"]
        output = layer(state["hidden"], **state["options"])
        if swap:
            state["hidden"] = output[0] if isinstance(output, tuple) else output
