"""The router that was told: one pack, by name, for every prompt."""

from collections.abc import Iterable, Sequence

from graftkit.errors import ConfigError
from graftkit.route import TARGET, Route


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
