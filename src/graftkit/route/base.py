"""What a router is: prompts in, packs and their weights out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from graftkit.errors import ConfigError

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
