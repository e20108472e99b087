"""What the `model` of a request names, and the packs that are loaded and unloaded by name.

NAME of the target, or "target"    no pack
auto                               the pack that the router chooses for the prompt
math                               one pack
math+code                          both with equal shares, which sum to 1
math:0.7+code:0.3                  weights
"""

import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftkit.errors import ConfigError, printable
from graftkit.route import TARGET, Route, Router
from graftkit.route.nearest import AnyKey, KeyRouter, read_key
from graftkit.serve.engine import Engine
from graftkit.skillpack import SkillPack

AUTO = "auto"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_PACKS = 8
_LARGEST_WEIGHT = 16.0


@dataclass(frozen=True)
class ResolvedModel:
    """The packs of a request.

    Attributes:
        route: the router's choice; None where the request named its packs.
    """

    weights: Mapping[str, float]
    route: Route | None = None


class ServedModels:
    """Names of everything that an engine serves.

    Args:
        target_name: of the target in requests.
        folder: where packs may be loaded from by request; None for nowhere.
    """

    def __init__(self, engine: Engine, target_name: str, folder: Path | None = None):
        self.engine = engine
        self.target_name = target_name
        self._folder = None if folder is None else folder.resolve()
        self._lock = threading.Lock()  # of the keys and the router
        self._keys: dict[str, AnyKey | None] = {}
        self._router: Router | None = None

    def load(self, name: str, pack: SkillPack, replace: bool = False) -> None:
        """Serve a pack under a name. Raises: ConfigError, and as `Engine.load` does."""
        if not _NAME.fullmatch(name) or name in (AUTO, TARGET, self.target_name):
            raise ConfigError(
                f"{printable(name[:80])!r} is no name for a pack; use letters, digits, '.', '_' "
                f"and '-', and not {AUTO}, {TARGET} or the target's name"
            )
        key = read_key(pack)
        self.engine.load(name, pack, replace)
        with self._lock:
            self._keys[name] = key
            self._router = None

    def load_file(self, name: str, file: str, replace: bool = False) -> None:
        """Load NAME.skillpack, or a file of this name, of the allow-listed folder.

        Raises: ConfigError for a path, a link out of the folder, or a file that is not there.
        """
        if self._folder is None:
            raise ConfigError("no folder of packs is allowed; start the server with --pack-folder")
        own = Path(file).name.removesuffix(".skillpack")
        if not _NAME.fullmatch(own) or file not in (own, f"{own}.skillpack"):
            raise ConfigError("lora_path is a file's name in the folder of packs, never a path")
        path = (self._folder / f"{own}.skillpack").resolve()
        if path.parent != self._folder or not path.is_file():
            raise ConfigError(f"no pack {own!r} is in the folder of packs")
        self.load(name, SkillPack.load(path), replace)

    def unload(self, name: str) -> None:
        """Raises: UnknownModelError."""
        self.engine.unload(name)
        with self._lock:
            self._keys.pop(name, None)
            self._router = None

    def resolve(self, model: str, prompt: str) -> ResolvedModel:
        """The packs that a request's `model` names.

        Raises: ConfigError for a mixture that is not understood; whether packs of these names are
            served shows when they are leased.
        """
        if model in (TARGET, self.target_name):
            return ResolvedModel({})
        if model == AUTO:
            route = self._route(prompt)
            return ResolvedModel(route.weights, route)
        return ResolvedModel(parse_mixture(model))

    def _route(self, prompt: str) -> Route:
        # The router reads with the model, so it runs in the engine's thread.
        return self.engine.call(lambda: self._make_router().route([prompt])[0])

    def _make_router(self) -> Router:
        with self._lock:
            if self._router is None:
                engine = self.engine
                self._router = KeyRouter(engine.model, engine.tokenizer, dict(self._keys))
            return self._router


def parse_mixture(text: str) -> dict[str, float]:
    """Weights by name of `math`, `math+code` or `math:0.7+code:0.3`. Raises: ConfigError."""
    parts = [part.partition(":") for part in text.split("+")]
    names = [name for name, _, _ in parts]
    weighted = {bool(colon) for _, colon, _ in parts}
    if len(parts) > _MOST_PACKS or len(set(names)) < len(names) or len(weighted) > 1:
        raise ConfigError(
            f"a mixture names at most {_MOST_PACKS} different packs, all with a weight or none, "
            "as in math:0.7+code:0.3"
        )
    if not all(_NAME.fullmatch(name) for name in names):
        raise ConfigError(f"model {printable(text[:80])!r} is no name; /v1/models lists them")
    if weighted == {False}:
        return dict.fromkeys(names, 1.0 / len(names))
    return {name: _parse_weight(weight) for name, _, weight in parts}


def _parse_weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= _LARGEST_WEIGHT:
        raise ConfigError(
            f"weight {printable(text[:40])!r} is no number from -{_LARGEST_WEIGHT:g} to "
            f"{_LARGEST_WEIGHT:g}"
        )
    return weight
