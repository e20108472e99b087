"""Routing from the packs' weights alone: the pack whose delta responds most to a prompt's states.

    ρ = d_in ‖ΔW x‖² / (‖ΔW‖_F² ‖x‖²)          x (d_in,): the input of a linear module, one token

SpectR (arXiv 2504.03454) scores by ‖ΔW x‖, the norm of the delta's output. Dividing by the norms of
ΔW and x removes the scale of the pack; an x that is independent of the pack gives ρ ≈ 1. The inputs
of a module have much in common, whatever the text. So their mean and first principal directions are
removed first (all-but-the-top, arXiv 1702.01417), and log ρ is measured in standard deviations
above its value on neutral text, module by module. The target generates that text itself: no prompts
of any pack are needed.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.attachment import without_packs
from graftkit.attachment.rows import first_tensor
from graftkit.attachment.side import linear_updates
from graftkit.attachment.target import LiveTarget, check_packs
from graftkit.attachment.updates import LowRankUpdate, WeightUpdate
from graftkit.errors import AttachError, CheckpointError
from graftkit.models.text import context_length, vocabulary_size
from graftkit.route.centroid import MAX_TOKENS
from graftkit.route.key import Route
from graftkit.skillpack import SkillPack

THRESHOLD = 2.25
"""Standard deviations above neutral text from which on a pack is chosen (docs/adr/0013)."""

NEUTRAL_ROWS, NEUTRAL_TOKENS, NEUTRAL_SEED = 128, 32, 0
_BACKGROUND_ROWS = 32  # of the neutral ones: a thousand tokens show mean and first directions
_ROWS_TOGETHER = 16  # in one pass: their inputs of all modules are in memory at once
_WIDTH_PER_DIRECTION = 100  # directions taken out: width / 100, the rule of arXiv 1702.01417
_LEAST_RHO = 1e-6  # of an input that a delta maps to zero
_LEAST_STD = 1e-6

# Projections to keys recognize inputs: their deltas tell skills apart far better than those of
# modules that learn what to answer (docs/adr/0013).
_KEYS = re.compile(r"(^|\.)(k_proj|key)$")

Sketches = Mapping[str, Mapping[str, Tensor]]
"""By module, then by pack."""


def sketch_update(update: WeightUpdate) -> Tensor | None:
    """S (k, in) with ‖S x‖² = in · ‖ΔW x‖² / ‖ΔW‖_F², float32; None where ΔW is zero.

    S is R of the QR decomposition of ΔW, scaled: rotating the outputs does not change their norm.
    """
    if isinstance(update, LowRankUpdate):
        outer = torch.linalg.qr(update.left.float(), mode="r").R
        sketch = outer @ update.right.float()
    else:
        matrix = update.dense()
        tall = matrix.shape[0] > matrix.shape[1]
        sketch = torch.linalg.qr(matrix, mode="r").R if tall else matrix
    peak = float(sketch.abs().max()) if sketch.numel() else 0.0
    # By a power of two, which changes no digit: squares of any delta then fit float32.
    sketch = sketch * 2.0 ** -max(-100, min(100, math.frexp(peak)[1]))
    norm = torch.linalg.matrix_norm(sketch)
    return sketch * (sketch.shape[1] ** 0.5 / norm) if norm > 0 else None


def log_rho(sketch: Tensor, x: Tensor) -> Tensor:
    """log ρ of every input x (..., in): (...), float32."""
    x = x.float()
    energy = (x @ sketch.T).square().sum(-1)
    return (energy / x.square().sum(-1).clamp_min(1e-30)).clamp_min(_LEAST_RHO).log()


@dataclass(frozen=True)
class Background:
    """What the inputs of one module have in common, whatever the text.

    Attributes:
        mean: (in,). directions: (k, in), orthonormal.
    """

    mean: Tensor
    directions: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Background":
        """From inputs (n, in): their mean and first in / 100 principal directions."""
        x = x.float()
        mean = x.mean(0)
        count = min(x.shape[1] // _WIDTH_PER_DIRECTION, len(x) - 1)
        # The decomposition starts from random vectors; seeded, it gives the same directions.
        with torch.random.fork_rng():
            torch.manual_seed(NEUTRAL_SEED)
            _, _, directions = torch.svd_lowrank(x - mean, q=min(count + 8, *x.shape), niter=4)
        return cls(mean, directions.T[:count])

    def remove(self, x: Tensor) -> Tensor:
        """Inputs x (..., in) without what they have in common, float32."""
        x = x.float() - self.mean
        return x - (x @ self.directions.T) @ self.directions


@dataclass(frozen=True)
class NeutralStatistics:
    """log ρ of one pack in one module on neutral text.

    Attributes:
        mean: over all tokens. std: of the means of the rows.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, values: Tensor) -> "NeutralStatistics":
        """From log ρ of every token of several rows, (rows, tokens)."""
        std = float(values.mean(1).std(correction=0))
        return cls(float(values.mean()), max(std, _LEAST_STD))


class Responses:
    """log ρ of several packs on the bare target, in standard deviations above neutral text.

    A pack's numbers depend only on the pack, the target and the text.
    """

    def __init__(self, model: Any, sketches: Sketches):
        """Generate neutral text and measure it.

        Args:
            sketches: by module, then by pack, from `sketch_pack`.
        """
        self._model = model
        rows = neutral_tokens(model)
        inputs: dict[str, list[Tensor]] = {}
        for batch in torch.split(rows[:_BACKGROUND_ROWS], _ROWS_TOGETHER):
            for module, x in module_inputs(model, batch, sketches).items():
                inputs.setdefault(module, []).append(x.flatten(0, 1))
        self._backgrounds = {module: Background.of(torch.cat(x)) for module, x in inputs.items()}
        # A head does not run where nothing is predicted.
        self._sketches = {module: sketches[module] for module in self._backgrounds}
        values: dict[tuple[str, str], list[Tensor]] = {}
        for batch in torch.split(rows, _ROWS_TOGETHER):
            for module, x in module_inputs(model, batch, self._sketches).items():
                for pack, log_ratio in self._log_rho(module, x).items():
                    values.setdefault((module, pack), []).append(log_ratio)
        self._neutral = {
            place: NeutralStatistics.of(torch.cat(parts)) for place, parts in values.items()
        }

    def of_row(self, ids: Sequence[int]) -> dict[str, dict[str, float]]:
        """By module and pack: the mean over one row's tokens, in deviations of neutral rows."""
        scores = {}
        tokens = torch.tensor([ids])
        for module, x in module_inputs(self._model, tokens, self._sketches).items():
            means = {
                pack: float(values.mean()) for pack, values in self._log_rho(module, x).items()
            }
            neutral = {pack: self._neutral[module, pack] for pack in means}
            scores[module] = {
                pack: (mean - neutral[pack].mean) / neutral[pack].std
                for pack, mean in means.items()
            }
        return scores

    def _log_rho(self, module: str, x: Tensor) -> dict[str, Tensor]:
        centred = self._backgrounds[module].remove(x)
        return {pack: log_rho(sketch, centred) for pack, sketch in self._sketches[module].items()}


def sketch_pack(
    target: LiveTarget, pack: SkillPack, selects: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Sketches of a checked pack's deltas in the linear modules whose names `selects` accepts."""
    updates = linear_updates(target, pack, selects)
    sketches = {name: sketch_update(update) for name, update in updates.items()}
    return {name: sketch for name, sketch in sketches.items() if sketch is not None}


def neutral_tokens(model: Any) -> Tensor:
    """Text that the target generates after one random token: (rows, tokens), seeded."""
    generator = torch.Generator().manual_seed(NEUTRAL_SEED)
    last = torch.randint(vocabulary_size(model), (NEUTRAL_ROWS, 1), generator=generator)
    tokens, past = [last], None
    with torch.no_grad(), without_packs(model):
        for _ in range(NEUTRAL_TOKENS - 1):
            output = model(input_ids=last.to(model.device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            p = output.logits[:, -1].float().softmax(-1).cpu()
            if not bool(p.isfinite().all()):
                raise CheckpointError(
                    f"{type(model).__name__}: the logits are not finite (NaN or infinity) on text "
                    "of its own; check the weights"
                )
            last = torch.multinomial(p, 1, generator=generator)
            tokens.append(last)
    return torch.cat(tokens, dim=1)


def module_inputs(model: Any, ids: Tensor, modules: Iterable[str]) -> dict[str, Tensor]:
    """Inputs of modules while the bare target runs on ids (rows, tokens): (rows, tokens, in).

    Heads do not run. A module that sees only some of the tokens, such as an expert, is left out.
    """
    inputs: dict[str, Tensor] = {}

    def read(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor([args, kwargs])
        if x is not None and x.shape[:-1].numel() == ids.numel():
            inputs[name] = x.reshape(*ids.shape, -1).clone()

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(read, name), with_kwargs=True)
        for name in modules
    ]
    try:
        with torch.no_grad(), without_packs(model):
            model.base_model(input_ids=ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


class SpectralRouter:
    """Routes a prompt to the pack whose delta responds most, or to the target below THRESHOLD.

        score_i = mean over modules m of (mean over tokens of log ρ_im - μ_im) / σ_im

    with μ and σ of neutral text. The modules are the key projections that a pack changes, or all of
    its linear modules where it changes none. A pack that changes no linear module has no score and
    is never chosen. Every prompt runs alone, so that its route does not depend on the others.
    """

    def __init__(self, model: Any, tokenizer: Any, packs: Mapping[str, SkillPack]):
        """Sketch the packs' deltas, and measure them on neutral text.

        Args:
            model, tokenizer: the target of the packs; any packs may be attached beside it.
        Raises: AttachError for a model that writes no text; PackMismatchError, CorruptPackError.
        """
        self._model, self._tokenizer = model, tokenizer
        target = _checked_target(model, packs)
        self._responses = _measure(
            model,
            {
                name: sketch_pack(target, pack, _is_key) or sketch_pack(target, pack, _is_any)
                for name, pack in packs.items()
            },
        )

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; one without tokens has no scores."""
        return [self._route(_prompt_tokens(self._model, self._tokenizer, p)) for p in prompts]

    def _route(self, ids: list[int]) -> Route:
        by_name: dict[str, list[float]] = {}
        for by_pack in (self._responses.of_row(ids) if ids else {}).values():
            for name, score in by_pack.items():
                by_name.setdefault(name, []).append(score)
        scores = {name: sum(values) / len(values) for name, values in by_name.items()}
        best = _clear_best(scores)
        return Route({} if best is None else {best: 1.0}, scores)


def _prompt_tokens(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The first tokens of a prompt, which the router reads."""
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=True) if prompt else []
    return ids[: min(MAX_TOKENS, context_length(model) or MAX_TOKENS)]


def _checked_target(model: Any, packs: Mapping[str, SkillPack]) -> LiveTarget:
    if not model.can_generate():
        raise AttachError(
            f"{type(model).__name__} writes no text to compare prompts with; expected a causal "
            "language model"
        )
    target = LiveTarget(model)
    check_packs(target, list(packs.values()))
    return target


def _clear_best(scores: Mapping[str, float]) -> str | None:
    best = max(sorted(scores), key=scores.__getitem__, default=None)
    return best if best is not None and scores[best] >= THRESHOLD else None


def _measure(model: Any, by_pack: Mapping[str, Mapping[str, Tensor]]) -> Responses:
    modules = dict.fromkeys(module for sketches in by_pack.values() for module in sketches)
    return Responses(
        model,
        {
            module: {name: own[module] for name, own in by_pack.items() if module in own}
            for module in modules
        },
    )


def _is_key(name: str) -> bool:
    return _KEYS.search(name) is not None


def _is_any(name: str) -> bool:
    return True
