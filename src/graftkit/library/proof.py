"""Does anything of a pack stay behind? Compared with a library that never had it, bit for bit.

One library is made of all packs. It answers with the pack, forgets it, and answers again. Another
one, whose target is loaded anew, is made without the pack. Files, scores, routes, logits and tokens
of the two must be the same.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftkit.errors import ConfigError
from graftkit.library.answers import unanswerable
from graftkit.library.folder import PackFolder
from graftkit.library.index import PACKS, Entry
from graftkit.library.routers import RouterName
from graftkit.route import Route

if TYPE_CHECKING:
    from graftkit.library import Library

NEW_TOKENS = 16
"""Tokens that each prompt is continued by."""


@dataclass(frozen=True)
class Proof:
    """What was compared, and whether it was equal."""

    prompts: int
    """Prompts compared."""
    changed_by_pack: int
    """Prompts whose logits the pack changes while it is there: what the removal has to undo."""
    files: bool
    """The packs' files are the same, byte for byte."""
    routes: bool
    """So are all weights and scores of the router."""
    logits: bool
    """So are the logits of every token of every prompt, bit for bit."""
    tokens: bool
    """So are the tokens that follow."""

    @property
    def holds(self) -> bool:
        """Everything is equal."""
        return self.files and self.routes and self.logits and self.tokens

    def numbers(self) -> dict[str, int | bool]:
        """Everything by name."""
        return asdict(self) | {"holds": self.holds}


def prove_removal(
    folder: PackFolder,
    gone: Sequence[Entry],
    prompts: Sequence[str],
    router: RouterName,
    opened: Callable[[PackFolder], "Library"],
) -> Proof:
    """Remove packs from a copy of a library and compare it with one that never had them.

    Each of the two loads the target, one after the other; files are linked where the disk can.

    Args:
        opened: the library of a folder.
    Raises: ConfigError where no prompt can be answered; as `Library.generate`.
    """
    with TemporaryDirectory(prefix="graftkit-") as place:
        had = opened(folder.copy_to(Path(place) / "had", set()))
        asked = _answerable(had, prompts)
        with_pack = [_logits(had, prompt, {gone[-1]: 1.0}) for prompt in asked]
        for entry in gone:
            had.remove(entry.label)
        after = _outcome(had, asked, router)
        bare = [_logits(had, prompt, {}) for prompt in asked]
        del had
        gc.collect()  # a model and what is attached to it name each other
        never = opened(folder.copy_to(Path(place) / "never", {entry.digest for entry in gone}))
        fresh = _outcome(never, asked, router)
    changed = sum(not torch.equal(*pair) for pair in zip(with_pack, bare, strict=True))
    return Proof(
        prompts=len(asked),
        changed_by_pack=changed,
        files=after.files == fresh.files,
        routes=after.routes == fresh.routes,
        logits=all(map(torch.equal, after.logits, fresh.logits)),
        tokens=after.texts == fresh.texts,
    )


@dataclass(frozen=True)
class _Outcome:
    files: dict[str, bytes]
    routes: list[Route]
    logits: list[Tensor]
    texts: list[str]


def _outcome(library: "Library", prompts: Sequence[str], router: RouterName) -> _Outcome:
    routes = library.route(prompts, router=router)
    return _Outcome(
        files={file.name: file.read_bytes() for file in (library.path / PACKS).iterdir()},
        routes=routes,
        logits=[
            _logits(library, prompt, library.mixture(route))
            for prompt, route in zip(prompts, routes, strict=True)
        ],
        texts=[
            answer.text
            for answer in library.generate(prompts, router=router, max_new_tokens=NEW_TOKENS)
        ],
    )


@torch.no_grad()
def _logits(library: "Library", prompt: str, mixture: Mapping[Entry, float]) -> Tensor:
    """(tokens, vocabulary), of the prompt alone."""
    live = library.live
    live.use(mixture)
    (ids,) = live.encode([prompt])
    logits: Tensor = live.model(input_ids=torch.tensor([ids]).to(live.model.device)).logits[0]
    return logits


def _answerable(library: "Library", prompts: Sequence[str]) -> list[str]:
    """Raises: ConfigError where there are none."""
    tokens = library.live.encode(prompts)
    found = [
        prompt
        for prompt, ids in zip(prompts, tokens, strict=True)
        if unanswerable(library.live, ids) is None
    ]
    if not found:
        raise ConfigError("no prompts to answer; a proof compares what a library says to some")
    return found
