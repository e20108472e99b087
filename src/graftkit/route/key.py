"""What a router is, and the router key of a pack.

A router takes prompts and returns packs with their weights. The router key of a pack is a Gaussian
(an ellipsoid) fitted to the states of its prompts.

    d²(h) = Σ_k (v_k·(h − μ))² / λ_k + (‖h − μ‖² − Σ_k (v_k·(h − μ))²) / λ_0

This is the Mahalanobis distance of a probabilistic PCA (Tipping & Bishop 1999, section 3.2): μ is
the mean state, v_k are the r principal directions, λ_k their variances, and λ_0 is the variance of
every other direction. The variances are scaled, by cross-validation, so that a pack accepts the
states with d² <= 1. Of the packs that accept a prompt, the one of the highest log-density wins, so
that a narrow skill is preferred to a broad one:

    score(h) = −(d²(h) + (1/w) Σ_j log λ_j) / 2        over all w directions

Up to a constant, w · score is the log-density of a Gaussian with variances λ / w, whose typical
states lie at d² = 1. A key depends only on the target and the pack's own prompts, and its scores
can be compared between packs.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.errors import ConfigError, CorruptPackError, RowsError
from graftkit.models.text import one_thread
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import RouterInfo

TARGET = "target"
"""The name that stands for no pack; no pack may have it."""


@dataclass(frozen=True)
class Route:
    """The packs chosen for one prompt.

    Attributes:
        weights: by pack name, each above 0, together at most 1; the rest is the target's.
        scores: by pack name; higher is better, the scale depends on the router.
    """

    weights: dict[str, float]
    scores: dict[str, float]

    @property
    def name(self) -> str:
        """The pack of the largest weight, or TARGET."""
        return max(self.weights, key=self.weights.__getitem__, default=TARGET)


class Router(Protocol):
    """Chooses packs for prompts.

    A prompt's route does not depend on the other prompts of a call, nor a pack's score on the other
    packs. A prompt without tokens goes to the target.
    """

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt, in their order."""


class FixedRouter:
    """Sends every prompt, except an empty one, to one pack or to the target.

    Raises: ConfigError for a name that is neither in `packs` nor "target".
    """

    def __init__(self, name: str, packs: Iterable[str]):
        names = [*sorted(packs), TARGET]
        if name not in names:
            raise ConfigError(f"no pack is called {name!r}; there are {', '.join(names)}")
        self.name = name

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; the score of the pack is 1."""
        chosen = {} if self.name == TARGET else {self.name: 1.0}
        return [Route(dict(chosen if prompt else {}), dict(chosen)) for prompt in prompts]


MIN_PROMPTS, MAX_PROMPTS = 20, 200
"""Least and most different prompts that a key is fitted to."""
COMPONENTS = 8
"""Principal directions in a key."""
SHRINKAGE = 0.3
"""Share of the mean variance mixed into every variance: few prompts estimate a variance poorly."""
FOLDS = 5
ACCEPTED = 0.95
"""Quantile of the held-out distances that serves as the unit of distance."""
REACH = 1.5
"""Largest d² that is accepted, in that unit. Chosen on training rows (docs/adr/0012)."""
GENERAL_ACCEPTED = 0.01
"""Largest share of general prompts inside the border of a key that is set against them."""
_DTYPES = ("<f4", "<f2", "i1")  # of variances, mean and directions, in the order of the payload


@dataclass(frozen=True, eq=False)
class RouterKey:
    """The key of one pack, in the precision in which it is stored.

    Attributes:
        info: layer, width and number of prompts, as in the manifest.
        mean: μ, (width,) float16. directions: v_k times any length, (components, width) int8.
        variances: λ_0, λ_1, …, (components + 1,) float32.
    """

    info: RouterInfo
    mean: Tensor
    directions: Tensor
    variances: Tensor

    @classmethod
    def fit(cls, states: Tensor, layer: int, blake3: str) -> Self:
        """Fit a key to the states of prompts.

        Args:
            states: of the prompts after `layer`, (prompts, width), of a norm near 1.
            blake3: digest of the prompts.
        Raises: RowsError for fewer than MIN_PROMPTS states, states that are all alike, or states
            whose key cannot be stored.
        """
        if len(states) < MIN_PROMPTS:
            raise RowsError(
                f"{len(states)} different prompts found; a router key needs at least {MIN_PROMPTS}"
            )
        with one_thread():
            states = states.double()
            mean, directions, variances = _ellipsoid(states)
            variances = variances * (_held_out_distance(states) * REACH)
        if not variances.isfinite().all() or not variances.min() > 0:
            raise RowsError("the prompts are all alike to the target; give prompts that differ")
        info = RouterInfo(
            layer=layer,
            width=states.shape[1],
            components=len(directions),
            prompts=len(states),
            blake3=blake3,
        )
        largest = directions.abs().amax(dim=1, keepdim=True)
        codes = (directions / largest * 127).round().to(torch.int8).contiguous()
        key = cls(info, mean.half(), codes, variances.float())
        try:
            return cls.from_bytes(info, key.to_bytes())
        except CorruptPackError as error:
            raise RowsError(
                f"no router key can be kept of these prompts ({error}); give prompts that differ"
            ) from error

    def rejecting(self, general: Tensor) -> Self:
        """This key with a border that at most GENERAL_ACCEPTED of these states lie inside.

        Args:
            general: states of prompts of no skill, (prompts, width).
        """
        distances = torch.tensor([self.distance(state) for state in general])
        border = float(distances.quantile(GENERAL_ACCEPTED))
        return replace(self, variances=self.variances * border) if 0 < border < 1 else self

    def into(self, pack: SkillPack) -> SkillPack:
        """The pack with this key in place of its own."""
        return pack.with_router_key(self.info, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The payload (docs/skillpack-format.md, 3.8)."""
        parts = (self.variances, self.mean, self.directions)
        return b"".join(
            part.numpy().astype(dtype).tobytes() for part, dtype in zip(parts, _DTYPES, strict=True)
        )

    @classmethod
    def from_bytes(cls, info: RouterInfo, content: bytes | memoryview) -> Self:
        """Read a payload. Raises: CorruptPackError for a wrong length, NaN or a scale of zero."""
        if len(content) != info.nbytes:
            raise CorruptPackError(
                f"the router key has {len(content)} bytes, its description says {info.nbytes}"
            )
        count, width = info.components, info.width
        variances, rest = _read_tensor(content, _DTYPES[0], (count + 1,))
        mean, rest = _read_tensor(rest, _DTYPES[1], (width,))
        directions, _ = _read_tensor(rest, _DTYPES[2], (count, width))
        scaled = bool((variances > 0).all()) and bool(directions.any(dim=1).all())
        if not scaled or not variances.isfinite().all() or not mean.isfinite().all():
            raise CorruptPackError("the router key holds a number that is no scale, or not finite")
        return cls(info, mean, directions, variances)

    def distance(self, state: Tensor) -> float:
        """d² of a state (width,); the pack accepts it where d² <= 1."""
        moved = state.double() - self.mean.double()
        return float(_distances(moved[None], self._axes, self.variances.double()))

    def score(self, distance: float) -> float:
        """Log-density per direction of a state at this d²; comparable between packs."""
        return -(distance + self._log_volume) / 2

    @cached_property
    def _axes(self) -> Tensor:
        return nn.functional.normalize(self.directions.double(), dim=1)

    @cached_property
    def _log_volume(self) -> float:
        logs, width = self.variances.double().log(), self.info.width
        return float((logs[1:].sum() + (width - self.info.components) * logs[0]) / width)


def sample_prompts(prompts: Sequence[str], seed: int, most: int = MAX_PROMPTS) -> list[str]:
    """Different prompts, in their order, at most so many."""
    different = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]
    generator = random.Random(seed)
    keys = [generator.random() for _ in different]
    picked = sorted(range(len(different)), key=keys.__getitem__)[:most]
    return [different[index] for index in sorted(picked)]


def _ellipsoid(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (width,), directions (r, width) and variances (r + 1,), λ_0 first; float64.

    λ = (1 - SHRINKAGE) · observed + SHRINKAGE · mean variance of all directions
    """
    count, width = states.shape
    mean = states.mean(dim=0)
    _, singular, directions = torch.linalg.svd(states - mean, full_matrices=False)
    observed = singular.square() / (count - 1)
    rank = min(COMPONENTS, count - 2, width - 1)
    rest = observed[rank:].sum() / (width - rank)
    variances = torch.cat([rest[None], observed[:rank]])
    average = observed.sum() / width
    return mean, directions[:rank], torch.lerp(variances, average, SHRINKAGE)


def _distances(moved: Tensor, directions: Tensor, variances: Tensor) -> Tensor:
    """d² of h - μ (n, width): (n,)."""
    along = (moved @ directions.T).square()
    rest = (moved.square().sum(dim=1) - along.sum(dim=1)).clamp_min(0)
    return (along / variances[1:]).sum(dim=1) + rest / variances[0]


def _held_out_distance(states: Tensor) -> Tensor:
    """The ACCEPTED quantile of the distances of prompts to keys fitted without them."""
    fold = torch.arange(len(states)) % FOLDS
    distances = []
    for number in range(FOLDS):
        mean, directions, variances = _ellipsoid(states[fold != number])
        distances.append(_distances(states[fold == number] - mean, directions, variances))
    return torch.cat(distances).quantile(ACCEPTED)


def _read_tensor(
    content: bytes | memoryview, dtype: str, shape: tuple[int, ...]
) -> tuple[Tensor, bytes | memoryview]:
    """Read the first tensor of the bytes; returns it and the bytes behind it."""
    count = math.prod(shape)
    numbers = np.frombuffer(content, dtype, count).astype(np.dtype(dtype).newbyteorder("="))
    return torch.from_numpy(numbers).reshape(shape), content[numbers.nbytes :]
