"""Route: which packs answer a prompt, or none of them.

pooling     a prompt as one vector: what the target makes of it
key         what a pack carries so that prompts find it
centroid    the pack whose key a prompt fits best, or the target
classifier  a small trained net; labels are the packs of lowest loss
fixed       by name
spectral    from the packs' weights alone
responses   how strongly packs' deltas answer what a target's modules read
averaging   several packs for one prompt, by their next-token distributions

The router that was told: one pack, by name, for every prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from graftkit.errors import ConfigError

TARGET = "target"
"""The name of "no pack"; no pack may be called so."""


@dataclass(frozen=True)
class Route:
    """What was chosen for one prompt.

    Attributes:
        weights: by pack name, above 0 and at most 1 together; what is missing to 1 is the target's.
        scores: of every pack considered; higher fits better, the scale is the router's.
    """

    weights: dict[str, float]
    scores: dict[str, float]

    @property
    def name(self) -> str:
        """The pack of the largest weight, TARGET where there is none."""
        return max(self.weights, key=self.weights.__getitem__, default=TARGET)


class Router(Protocol):
    """Chooses packs for prompts.

    A prompt's route does not depend on the other prompts of a call, nor a pack's score on the other
    packs. A prompt without tokens is the target's.
    """

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt, in their order."""


class FixedRouter:
    """Sends every prompt but an empty one to one pack, or to the target.

    Raises: ConfigError for a name that is none of `packs`, nor "target".
    """

    def __init__(self, name: str, packs: Iterable[str]):
        known = sorted(packs)
        if name not in (*known, TARGET):
            raise ConfigError(
                f"no pack is called {name!r}; there are {', '.join([*known, TARGET])}"
            )
        self.name = name

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; the score of the pack is 1."""
        chosen = {} if self.name == TARGET else {self.name: 1.0}
        return [Route(dict(chosen if prompt else {}), dict(chosen)) for prompt in prompts]
