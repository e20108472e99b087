"""Routing by the packs' weights alone: whose delta answers what the target makes of a prompt?

The scores are those of graftkit.route.responses.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftkit.attachment.check import LiveTarget, check_packs
from graftkit.errors import AttachError
from graftkit.models.encoding import context_length
from graftkit.route import Route
from graftkit.route.pooling import MAX_TOKENS
from graftkit.route.responses import Responses, sketch_pack
from graftkit.skillpack import SkillPack

THRESHOLD = 2.25
"""Standard deviations above neutral text from which on a pack is chosen (docs/adr/0013)."""

# Projections to keys recognize inputs: their deltas tell skills apart far better than those of
# modules that learn what to answer (docs/adr/0013).
_KEYS = re.compile(r"(^|\.)(k_proj|key)$")


class SpectralRouter:
    """Gives a prompt to the pack that answers it most, or to the target where none does enough.

        score_i = mean over modules m of (mean over tokens of log ρ_im - μ_im) / σ_im

    with μ and σ of neutral text. The modules are a pack's key projections, or all of its linear
    modules where it changes no keys. A pack that changes no linear module has no score and is never
    chosen. Every prompt runs alone, so that its route does not depend on the others by a bit.
    """

    def __init__(self, model: Any, tokenizer: Any, packs: Mapping[str, SkillPack]):
        """Read the packs' deltas, and measure them on neutral text.

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
        found: dict[str, list[float]] = {}
        for by_pack in (self._responses.of_row(ids) if ids else {}).values():
            for name, score in by_pack.items():
                found.setdefault(name, []).append(score)
        scores = {name: sum(values) / len(values) for name, values in found.items()}
        best = _clear_best(scores)
        return Route({} if best is None else {best: 1.0}, scores)


def _prompt_tokens(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """What a router reads of a prompt: its first tokens, none of an empty one."""
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
            module: {name: found[module] for name, found in by_pack.items() if module in found}
            for module in modules
        },
    )


def _is_key(name: str) -> bool:
    return _KEYS.search(name) is not None


def _is_any(name: str) -> bool:
    return True
