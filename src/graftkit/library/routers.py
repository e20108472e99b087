"""The routers of a library, made from what its packs carry."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from graftkit.errors import ConfigError
from graftkit.library.folder import CLASSIFIER
from graftkit.library.index import Entry
from graftkit.library.live import LiveLibrary
from graftkit.route import Router
from graftkit.route.centroid import CentroidRouter
from graftkit.route.classifier import Classifier, ClassifierRouter
from graftkit.route.key import RouterKey
from graftkit.route.spectral import SpectralRouter
from graftkit.skillpack import SkillPack

RouterName = Literal["centroid", "spectral", "classifier"]


def make_router(
    name: str,
    top_k: int,
    live: LiveLibrary,
    entries: Mapping[str, Entry],
    load: Callable[[Entry], SkillPack],
    folder: Path,
) -> Router:
    """A router over the newest version of every pack.

    Args:
        top_k: packs that a prompt may be given to, more than one by `centroid` only.
        entries: by name. load: reads one from disk. folder: the library's.
    Raises: ConfigError for a router that there is not; as the routers themselves.
    """
    if name not in get_args(RouterName):
        names = ", ".join(get_args(RouterName))
        raise ConfigError(f"router {name!r} is unknown; choose one of {names}")
    if top_k > 1 and name != "centroid":
        raise ConfigError(f"router {name} chooses one pack, asked are {top_k}; use centroid")
    if name == "centroid":
        keys = {
            label: RouterKey.of(load(entry)) for label, entry in entries.items() if entry.has_key
        }
        return CentroidRouter(live.model, live.tokenizer, keys, top_k=top_k)
    packs = {label: load(entry) for label, entry in entries.items()}
    if name == "spectral":
        return SpectralRouter(live.model, live.tokenizer, packs)
    digests = {label: pack.digest for label, pack in packs.items()}
    classifier = Classifier.load(folder / CLASSIFIER, digests)
    return ClassifierRouter(live.model, live.tokenizer, classifier)
