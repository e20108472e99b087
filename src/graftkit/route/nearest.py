"""The default router: the pack whose prompts a prompt is most likely one of, or the target.

A key holds embeddings of its pack's prompts (graftkit.route.encoder). With s(x, S) the mean cosine
of x to its 3 nearest prompts of a set S,

    p(x) = sigmoid(a · s(x, own prompts) + b · s(x, general prompts) + c)

is the probability that x is a prompt of the pack and not a general one. a, b and c are fitted by
logistic regression (Platt scaling of a nearest-neighbour score) to every own prompt and every
general prompt, each left out of its own set. General prompts that are nearer to the pack's prompts
than half of these are to each other say nothing against the pack and are left out.

A key depends only on the pack's own prompts, the encoder and the general prompts. Adding or
removing a pack does not change the scores of the others.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn

from graftkit.errors import ConfigError, CorruptPackError, RowsError
from graftkit.models.text import MICRO_BATCH_TOKENS, one_thread
from graftkit.route.centroid import CentroidRouter, fit_key, pooled_states
from graftkit.route.encoder import INSTALL, SentenceEncoder, find_encoder, general_prompts
from graftkit.route.key import MIN_PROMPTS, Route, RouterKey, sample_prompts
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import RouterInfo

NEIGHBOURS = 3
KEPT_PROMPTS = 160
"""Most prompts in a key: 61 kB at a width of 384."""
FOREIGN_ODDS = 3
"""General prompts for each own one that a probability assumes. Few prompts (fewer than
MANY_PROMPTS) do not show a skill's extent; FEW_ODDS then keeps foreign prompts out."""
FEW_ODDS, MANY_PROMPTS = 6, 100
RIDGE, NEWTON_STEPS = 0.01, 25
ALIKE = 0.999
"""Cosine from which on two prompts are one to the encoder."""


@dataclass(frozen=True, eq=False)
class NearestKey:
    """The key of one pack, in the precision in which it is stored.

    Attributes:
        info: encoder, width and number of prompts, as in the manifest.
        prompts: embeddings times 127 over their largest entry, (prompts, width) int8.
        coefficients: a, b and c, (3,) float32.
    """

    info: RouterInfo
    prompts: Tensor
    coefficients: Tensor

    @classmethod
    def fit(cls, encoder: SentenceEncoder, prompts: Sequence[str], seed: int = 0) -> Self:
        """Fit a key to the prompts of one skill.

        Args:
            prompts: 20 or more different ones; of more than KEPT_PROMPTS, a seeded choice is used.
        Raises: RowsError for too few prompts, or prompts that are all alike.
        """
        chosen = sample_prompts(prompts, seed, KEPT_PROMPTS)
        if len(chosen) < MIN_PROMPTS:
            raise RowsError(
                f"{len(chosen)} different prompts found; a router key needs at least {MIN_PROMPTS}"
            )
        with one_thread():
            embeddings = encoder.embed(chosen, MICRO_BATCH_TOKENS)
            codes = (embeddings / embeddings.abs().amax(dim=1, keepdim=True) * 127).round()
            own = nn.functional.normalize(codes, dim=1)
            if float(_left_out(own, own).median()) >= ALIKE:
                raise RowsError(
                    "the prompts are all alike to the encoder; give prompts that differ"
                )
            coefficients = _calibrate(own, encoder.general)
        info = RouterInfo(
            layer=encoder.layers,
            width=encoder.width,
            components=len(chosen),
            prompts=len(chosen),
            blake3=blake3(json.dumps(chosen).encode()).hexdigest(),
            encoder=encoder.label,
            method="nearest",
        )
        return cls(info, codes.to(torch.int8), coefficients.float())

    @classmethod
    def from_bytes(cls, info: RouterInfo, content: bytes | memoryview) -> Self:
        """Read a payload (docs/skillpack-format.md, 3.8). Raises: CorruptPackError."""
        if len(content) != info.nbytes:
            raise CorruptPackError(
                f"the router key has {len(content)} bytes, its description says {info.nbytes}"
            )
        coefficients = torch.from_numpy(np.frombuffer(content, "<f4", 3).astype(np.float32))
        codes = np.frombuffer(content, np.int8, offset=12).reshape(info.components, info.width)
        prompts = torch.from_numpy(codes.copy())
        if not bool(coefficients.isfinite().all()) or not bool(prompts.any(dim=1).all()):
            raise CorruptPackError("the router key holds a number that is not finite, or no prompt")
        return cls(info, prompts, coefficients)

    def to_bytes(self) -> bytes:
        """The payload (docs/skillpack-format.md, 3.8)."""
        return self.coefficients.numpy().astype("<f4").tobytes() + self.prompts.numpy().tobytes()

    @property
    def encoder_digest(self) -> str:
        """Of the encoder that gave the embeddings; a name before it may differ."""
        return (self.info.encoder or "").rpartition(" ")[2]

    def into(self, pack: SkillPack) -> SkillPack:
        """The pack with this key in place of its own."""
        return pack.with_router_key(self.info, self.to_bytes())

    @cached_property
    def own(self) -> Tensor:
        """Embeddings of length 1."""
        return nn.functional.normalize(self.prompts.float(), dim=1)

    def foreign(self, general: Tensor) -> Tensor:
        """Those of the general prompts that say something against the pack."""
        return general[_foreign(self.own, general)]

    def probabilities(self, embeddings: Tensor, foreign: Tensor) -> Tensor:
        """p of embeddings (n, width): (n,) float64. foreign: from `foreign`."""
        scores = torch.stack([_nearest(embeddings, self.own), _nearest(embeddings, foreign)], dim=1)
        return _logits(scores, self.coefficients.double()).sigmoid()

    def own_accepted(self, foreign: Tensor) -> float:
        """Share of its own prompts, each left out in turn, that a key accepts."""
        scores = torch.stack([_left_out(self.own, self.own), _nearest(self.own, foreign)], dim=1)
        return float((_logits(scores, self.coefficients.double()) >= 0).double().mean())

    def shared(self, other: "NearestKey") -> float:
        """Share of the prompts that are also prompts of another key."""
        return float(((self.own @ other.own.T).amax(dim=1) >= ALIKE).double().mean())


def _nearest(embeddings: Tensor, prompts: Tensor) -> Tensor:
    """s(x, prompts) of every x: (n,)."""
    if not len(prompts):
        return torch.zeros(len(embeddings))
    cosines = embeddings @ prompts.T
    return cosines.topk(min(NEIGHBOURS, len(prompts)), dim=1).values.mean(dim=1)


def _left_out(embeddings: Tensor, prompts: Tensor) -> Tensor:
    """s(x, prompts without x), for prompts of one set."""
    cosines = (embeddings @ prompts.T).fill_diagonal_(-torch.inf)
    return cosines.topk(min(NEIGHBOURS, len(prompts) - 1), dim=1).values.mean(dim=1)


def _foreign(own: Tensor, general: Tensor) -> Tensor:
    """Which general prompts are farther from the own ones than half of these from each other."""
    return _nearest(general, own) < _left_out(own, own).median()


def _calibrate(own: Tensor, general: Tensor) -> Tensor:
    """a, b and c, float64: weighted logistic regression by Newton's method."""
    kept = general[_foreign(own, general)]
    of_own = torch.stack([_left_out(own, own), _nearest(own, kept)], dim=1)
    of_general = torch.stack([_nearest(kept, own), _left_out(kept, kept)], dim=1)
    x = torch.cat([of_own, of_general]).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    labels = torch.cat([torch.ones(len(own)), torch.zeros(len(kept))]).double()
    weights = torch.where(labels == 1, 300 / len(own), 300 / max(1, len(kept)))
    ridge = torch.tensor([RIDGE, RIDGE, RIDGE / 10], dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        p = (x @ theta).sigmoid()
        gradient = x.T @ (weights * (p - labels)) + ridge * theta
        hessian = (x.T * (weights * p * (1 - p))) @ x + ridge.diag()
        theta = theta - torch.linalg.solve(hessian, gradient)
    theta[2] -= math.log(FOREIGN_ODDS if len(own) >= MANY_PROMPTS else FEW_ODDS)
    return theta


def _logits(scores: Tensor, coefficients: Tensor) -> Tensor:
    return scores.double() @ coefficients[:2] + coefficients[2]


AnyKey = NearestKey | RouterKey
"""The key of a pack: of a sentence encoder, or of the target's states."""


def read_key(pack: SkillPack) -> AnyKey | None:
    """The key of a pack, None where it has none. Raises: CorruptPackError."""
    stored = pack.router_key
    if stored is None:
        return None
    return (NearestKey if stored[0].method == "nearest" else RouterKey).from_bytes(*stored)


def fit_default_key(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int = 0) -> AnyKey:
    """A key of the sentence encoder, or of the target's states where there is no encoder.

    Raises: RowsError for too few prompts, or prompts that are all alike; CheckpointError.
    """
    encoder = find_encoder()
    prompts = [last_user_turn(tokenizer, prompt) for prompt in prompts]
    if encoder is None:
        key = fit_key(model, tokenizer, prompts, seed=seed)
        with one_thread():
            general = pooled_states(
                model, tokenizer, general_prompts(), key.info.layer, MICRO_BATCH_TOKENS
            )
        return key.rejecting(general)
    return NearestKey.fit(encoder, prompts, seed)


class KeyRouter:
    """Routes each prompt by the packs' keys: the most probable pack that accepts it, or the target.

    A pack accepts a prompt from a probability of one half on. Keys of the target's states are asked
    where no key of the encoder accepts. Text in the target's chat template is read as the last turn
    of the user.

    Attributes:
        warnings: one line for every pack that is never chosen, or not told from others.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        keys: Mapping[str, AnyKey | None],
        *,
        top_k: int = 1,
        encoder: SentenceEncoder | None = None,
    ):
        """Make a router over the packs of `keys`.

        Args:
            model, tokenizer: the target of the packs.
            keys: by pack name; None for a pack without a key, which is never chosen.
            top_k: most packs for one prompt, weighted by their probabilities.
            encoder: this machine's by default; looked for only where a key needs one.
        Raises: ConfigError for keys of another target, or top_k below 1; CheckpointError.
        """
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; at least one pack has to answer")
        nearest = {name: key for name, key in keys.items() if isinstance(key, NearestKey)}
        states = {name: key for name, key in keys.items() if isinstance(key, RouterKey)}
        self._encoder = (encoder or find_encoder()) if nearest else None
        digest = None if self._encoder is None else self._encoder.digest
        self._keys = {name: key for name, key in nearest.items() if key.encoder_digest == digest}
        self._unread = {name: key for name, key in nearest.items() if name not in self._keys}
        self._states = CentroidRouter(model, tokenizer, states, top_k=top_k)
        self._tokenizer, self._top_k = tokenizer, top_k

    @property
    def unread(self) -> list[str]:
        """One line for every pack whose key this machine's encoder cannot read."""
        return [_unread_line(name, key, self._encoder) for name, key in self._unread.items()]

    @cached_property
    def warnings(self) -> list[str]:
        """What a person should know before relying on the routes."""
        lines = self.unread
        if self._states.keys:
            lines.append(
                f"{', '.join(self._states.keys)}: routed by the target's own states, the fallback, "
                "which tell prompts apart poorly; for the sentence encoder "
                f"{INSTALL}, then add again with --prompts and --update"
            )
        if self._encoder is not None:
            lines += _weak_lines(self._keys, self._foreign)
        return lines

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; one without words has no scores. Raises: CheckpointError."""
        texts = [last_user_turn(self._tokenizer, prompt) for prompt in prompts]
        routes = [Route({}, {}) for _ in texts]
        if self._encoder is not None and self._keys:
            embeddings = self._encoder.embed(texts)
            routes = [self._choose(embedding) for embedding in embeddings]
        if not self._states.keys:
            return routes
        others = self._states.route(texts)
        return [
            Route(first.weights or second.weights, {**first.scores, **second.scores})
            for first, second in zip(routes, others, strict=True)
        ]

    @cached_property
    def _foreign(self) -> dict[str, Tensor]:
        """By pack: the general prompts that say something against it."""
        assert self._encoder is not None
        return {name: key.foreign(self._encoder.general) for name, key in self._keys.items()}

    def _choose(self, embedding: Tensor) -> Route:
        if not bool(embedding.any()):
            return Route({}, {})
        scores = {
            name: float(key.probabilities(embedding[None], self._foreign[name]))
            for name, key in self._keys.items()
        }
        accepting = [name for name, score in scores.items() if score >= 0.5]
        best = sorted(accepting, key=lambda name: (-scores[name], name))[: self._top_k]
        total = sum(scores[name] for name in best)
        return Route({name: scores[name] / total for name in best}, scores)


def _unread_line(name: str, key: NearestKey, encoder: SentenceEncoder | None) -> str:
    if encoder is None:
        return (
            f"{name} is never chosen: its router key needs the sentence encoder "
            f"{key.info.encoder}, which is not here; {INSTALL}. Without it, add the pack again "
            "with --prompts and --update: the fallback are keys of the target's own states"
        )
    return (
        f"{name} is never chosen: its router key is of encoder {key.info.encoder}, this machine's "
        f"is {encoder.label}; use that one, or add the pack again with --prompts and --update"
    )


WEAK, SAME = 0.8, 0.5


def _weak_lines(keys: Mapping[str, NearestKey], foreign: Mapping[str, Tensor]) -> list[str]:
    """Packs that are not told from general prompts, and pairs not told from each other."""
    lines = []
    for name, key in keys.items():
        share = key.own_accepted(foreign[name])
        if share < WEAK:
            lines.append(
                f"{name}: its key cannot tell {100 * (1 - share):.0f} % of its own prompts from "
                "general ones, which go to the target; give more prompts, or name the pack"
            )
    names = list(keys)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            if min(keys[first].shared(keys[second]), keys[second].shared(keys[first])) >= SAME:
                lines.append(
                    f"{first} and {second} have the same prompts and cannot be told apart; give "
                    "them different ones, or name the pack"
                )
    return lines


def last_user_turn(tokenizer: Any, prompt: str) -> str:
    """The text of the last turn of the user, where a prompt is written in the chat template."""
    marks = _turn_marks(tokenizer)
    if marks is None or marks[0] not in prompt:
        return prompt
    return prompt.rpartition(marks[0])[2].partition(marks[1])[0]


def _turn_marks(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template writes before and after a turn of the user; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "QQ1"), ("assistant", "QQ2"), ("user", "QQ3"))
    ]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program and may raise anything
        return None
    between = text.partition("QQ2")[2].partition("QQ3")[0]
    before, _, after = text.partition("QQ1")
    common = 0
    while common < min(len(before), len(between)) and before[-1 - common] == between[-1 - common]:
        common += 1
    opening, closing = before[len(before) - common :], after.partition("QQ2")[0]
    end = closing.strip().split("\n")[0]
    return (opening, end) if opening.strip() and end else None
