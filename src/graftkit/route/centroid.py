"""The default router: the pack whose key a prompt fits best, or the target.

Keys are fitted apart from each other, on a pack's own prompts and the target; adding or removing a
pack leaves the scores of the others as they were.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3
from torch import Tensor

from graftkit.errors import ConfigError
from graftkit.models.encoding import MICRO_BATCH_TOKENS, one_thread
from graftkit.route import Route
from graftkit.route.key import MAX_PROMPTS, RouterKey
from graftkit.route.pooling import Reader, layer_count


def fit_key(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    encoder: Reader | None = None,
    seed: int = 0,
) -> RouterKey:
    """The key of the prompts of one skill.

    Args:
        model, tokenizer: the target.
        prompts: 20 or more different ones; of more than 200, a seeded choice.
        encoder: what `load_encoder` gives, to read prompts in place of the target.
    Raises: RowsError for too few prompts; CheckpointError for another model's tokenizer.
    """
    chosen = _choice(prompts, seed)
    reader = encoder or Reader(model, tokenizer)
    with one_thread():
        states = reader.states(chosen, reader.layer, MICRO_BATCH_TOKENS)
    digest = blake3(json.dumps(chosen).encode()).hexdigest()
    return RouterKey.fit(states, reader.layer, digest, reader.encoder)


class CentroidRouter:
    """Routes each prompt to the best of the packs that accept it, or to the target.

    Scores are log-densities per direction (graftkit.route.key). A rejecting pack has one too, and
    it may be the highest.

    Attributes:
        without_key: names of the packs that have no key, and so are never chosen.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        keys: Mapping[str, RouterKey | None],
        *,
        top_k: int = 1,
        encoder: Reader | None = None,
    ):
        """Route to the packs of `keys`.

        Args:
            model, tokenizer: the target of the packs.
            keys: by pack name, None for a pack without one.
            top_k: packs that may share a prompt: those of the highest scores that accept it,
                weighed by the softmax of these scores.
            encoder: the sentence encoder that the keys name, as `load_encoder` gives it.
        Raises: ConfigError for keys of another model or of several encoders, or top_k below 1.
        """
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; at least one pack has to answer")
        self.keys = {name: key for name, key in keys.items() if key is not None}
        self.top_k = top_k
        self._reader = encoder or Reader(model, tokenizer)
        self._check()

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; one without tokens has no scores. Raises: CheckpointError."""
        layers = sorted({key.info.layer for key in self.keys.values()})
        states = {layer: self._reader.states(prompts, layer) for layer in layers}
        return [
            self._choose({layer: of_all[row] for layer, of_all in states.items()})
            for row in range(len(prompts))
        ]

    def _choose(self, states: Mapping[int, Tensor]) -> Route:
        """The route of one prompt from its states by layer."""
        read = {name: states[key.info.layer] for name, key in self.keys.items()}
        far = {name: self.keys[name].distance(state) for name, state in read.items() if state.any()}
        scores = {name: self.keys[name].score(distance) for name, distance in far.items()}
        accepting = [name for name, distance in far.items() if distance <= 1]
        best = sorted(accepting, key=lambda name: (-scores[name], name))[: self.top_k]
        shares = [math.exp(scores[name] - scores[best[0]]) for name in best]
        return Route({n: s / sum(shares) for n, s in zip(best, shares, strict=True)}, scores)

    def _check(self) -> None:
        encoder, width = self._reader.encoder, self._reader.width
        layers = layer_count(self._reader.model)
        for name, key in self.keys.items():
            info = key.info
            if info.encoder != encoder:
                raise ConfigError(
                    f"the router key of {name} is of {info.encoder or 'the target'}, this router "
                    f"reads {encoder or 'the target'}; give all packs keys of one encoder"
                )
            if info.width != width or info.layer > layers:
                raise ConfigError(
                    f"the router key of {name} is of a model of width {info.width} with at least "
                    f"{info.layer} layers, this one has width {width} and {layers} layers; give "
                    "the pack a key of this model"
                )


def _choice(prompts: Sequence[str], seed: int) -> list[str]:
    """Different prompts, in their order, at most MAX_PROMPTS."""
    different = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]
    generator = random.Random(seed)
    keys = [generator.random() for _ in different]
    kept = sorted(range(len(different)), key=keys.__getitem__)[:MAX_PROMPTS]
    return [different[index] for index in sorted(kept)]
