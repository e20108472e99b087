"""A library in memory: the target, loaded once, the packs attached beside it, and its routers.

The packs may take a limited number of bytes; when it is reached, the least recently used ones are
detached.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from blake3 import blake3

from graftkit.attachment import Attachment, attach
from graftkit.attachment.configuration import reads_chat
from graftkit.checkpoint import Checkpoint
from graftkit.config import Budget
from graftkit.errors import AttachError, BudgetError, ConfigError, PackMismatchError
from graftkit.library.folder import CLASSIFIER, LibraryTarget, PackEntry
from graftkit.models.loading import load_model
from graftkit.models.text import context_length, usable_tokenizer
from graftkit.route import Router
from graftkit.route.classifier import Classifier, ClassifierRouter
from graftkit.route.nearest import KeyRouter, read_key
from graftkit.route.spectral import SpectralRouter
from graftkit.serve.style import GenerationStyle, pack_style
from graftkit.skillpack import SkillPack

EntryWeights = Mapping[PackEntry, float]
"""The packs of one row and their weights; empty for the target alone."""


class PackMemory:
    """The packs that are attached now; the least recently used are detached above a limit.

    A pack's size is known once it has been loaded. When it is loaded for the first time, memory
    exceeds the limit by this one pack until others are detached.

    Args:
        attachment: in side mode. load: reads a pack from disk.
        limit_bytes: of all attached packs together, None for no limit.
    """

    def __init__(
        self,
        attachment: Attachment,
        load: Callable[[PackEntry], SkillPack],
        limit_bytes: int | None,
    ):
        self._attachment = attachment
        self._read = load
        self._limit = limit_bytes
        self._sizes: dict[str, int] = {}  # of every pack that was ever loaded
        self._indices: OrderedDict[str, int] = OrderedDict()  # least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes of all packs in memory."""
        return sum(self._sizes[digest] for digest in self._indices)

    @property
    def digests(self) -> list[str]:
        """Digests of the packs in memory, the least recently used first."""
        return list(self._indices)

    def parts(self, mixtures: Sequence[EntryWeights]) -> Iterator[list[int]]:
        """Split rows into parts; the packs of a part are attached while the caller works on it.

        Raises: ConfigError where the packs of one row alone are larger than the limit.
        """
        part: list[int] = []
        packs: set[PackEntry] = set()
        for row in sorted(range(len(mixtures)), key=lambda row: _labels(mixtures[row])):
            needed = set(mixtures[row])
            if part and not self._try_load(packs | needed):
                yield part
                part, packs = [], set()
            if not part:
                self.load(needed)
            part.append(row)
            packs |= needed
        if part:
            yield part

    def load(self, entries: Iterable[PackEntry]) -> None:
        """Attach these packs together. Raises: ConfigError where they do not fit."""
        needed = set(entries)
        if not self._try_load(needed):
            raise ConfigError(
                f"{' and '.join(_labels(needed))} do not fit into {self._limit:,} bytes of memory "
                "for packs; allow more"
            )

    def route(self, mixtures: Sequence[EntryWeights]) -> None:
        """Choose the packs of every row of the next batches; they must be in memory."""
        self._attachment.route(
            [{self.index(entry): weight for entry, weight in row.items()} for row in mixtures]
        )

    def keep(self, digests: set[str]) -> None:
        """Detach every pack but these."""
        for digest in set(self._indices) - digests:
            self._drop(digest)

    def index(self, entry: PackEntry) -> int:
        """The attachment's index of a pack in memory."""
        return self._indices[entry.digest]

    def _try_load(self, needed: set[PackEntry]) -> bool:
        """Attach these packs if they fit together; others may be detached for them."""
        if self._is_over(sum(self._sizes.get(entry.digest, 0) for entry in needed)):
            return False
        digests = {entry.digest for entry in needed}
        for entry in sorted(needed, key=lambda entry: entry.label):
            if entry.digest in self._indices:
                self._indices.move_to_end(entry.digest)
                continue
            self._make_room(digests, self._sizes.get(entry.digest, 0))
            index = self._attachment.add(self._read(entry))
            self._indices[entry.digest] = index
            self._sizes[entry.digest] = self._attachment.nbytes(index)
            self._make_room(digests, 0)
            if self._is_over(self.nbytes):
                self._drop(entry.digest)
                return False
        return True

    def _make_room(self, needed: set[str], nbytes: int) -> None:
        """Detach packs that are not needed until so many more bytes fit."""
        for digest in [digest for digest in self._indices if digest not in needed]:
            if not self._is_over(self.nbytes + nbytes):
                return
            self._drop(digest)

    def _is_over(self, nbytes: int) -> bool:
        return self._limit is not None and nbytes > self._limit

    def _drop(self, digest: str) -> None:
        self._attachment.drop(self._indices.pop(digest))


def parse_memory(text: str | int | None) -> int | None:
    """Bytes of `2GB` or 2000000000; None for no limit. Raises: ConfigError."""
    if text is None or isinstance(text, int):
        return text
    try:
        size = Budget.parse(text)
    except BudgetError as error:
        raise ConfigError(f"memory {text!r} is not understood; write 500MB or 2GB") from error
    if size.unit in ("%", "BPP"):
        raise ConfigError(f"memory {text!r} is no number of bytes; write 500MB or 2GB")
    return size.to_bytes(0, 0)


def _labels(entries: Iterable[PackEntry]) -> list[str]:
    return sorted(entry.label for entry in entries)


class LiveLibrary:
    """Model, tokenizer and the packs in memory.

    Raises: CheckpointError; AttachError for a model that generates no text.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load: Callable[[PackEntry], SkillPack],
        memory_bytes: int | None,
    ):
        self.model: Any = load_model(checkpoint)
        if not self.model.can_generate():
            raise AttachError(f"{checkpoint.path}: {type(self.model).__name__} generates no text")
        self.tokenizer: Any = usable_tokenizer(checkpoint)
        self._checkpoint, self._load = checkpoint, load
        self._target_style = GenerationStyle.of(
            self.tokenizer, self.model.generation_config, reads_chat(self.tokenizer)
        )
        self._styles: dict[str, GenerationStyle] = {}
        self.context: int | None = context_length(self.model)
        self.attachment = attach(self.model, [], mode="side")
        self.memory = PackMemory(self.attachment, load, memory_bytes)

    def use(self, mixture: EntryWeights) -> None:
        """Route every row to the same packs from now on."""
        self.memory.load(mixture)
        self.memory.route([mixture])

    def style(self, mixture: EntryWeights) -> GenerationStyle:
        """How the packs of a row read prompts and generate; where they differ, the target's way.

        Raises: PackMismatchError for a skill that was trained in another chat template.
        """
        styles = {self._pack_style(entry) for entry in mixture}
        return styles.pop() if len(styles) == 1 else self._target_style

    def _pack_style(self, entry: PackEntry) -> GenerationStyle:
        if entry.digest not in self._styles:
            self._styles[entry.digest] = pack_style(
                self._checkpoint, self.model, self.tokenizer, self._load(entry)
            )
        return self._styles[entry.digest]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each raw prompt."""
        return [list(self.tokenizer.encode(prompt)) for prompt in prompts]


def describe_target(reference: str | Path) -> LibraryTarget:
    """The place of a checkpoint and its digests; reads every tensor. Raises: CheckpointError."""
    checkpoint = Checkpoint.open(reference)
    if checkpoint.revision is None:
        place = str(checkpoint.path.resolve())
    else:
        place = f"{checkpoint.name}@{checkpoint.revision}"
    return LibraryTarget(
        reference=place,
        fingerprint=checkpoint.fingerprint(),
        config_blake3=_config_digest(checkpoint),
    )


def open_target(target: LibraryTarget) -> Checkpoint:
    """The target's checkpoint; its tensors are checked when a pack is attached.

    Raises: CheckpointError where it is missing, PackMismatchError where its config has changed.
    """
    checkpoint = Checkpoint.open(target.reference)
    if _config_digest(checkpoint) != target.config_blake3:
        raise PackMismatchError(
            f"{target.reference}: config.json is not what it was when the library was made; put "
            "that one back, or make a new library"
        )
    return checkpoint


def _config_digest(checkpoint: Checkpoint) -> str:
    return blake3(checkpoint.side_file("config.json") or b"").hexdigest()


RouterName = Literal["keys", "spectral", "classifier"]


def make_router(
    name: str,
    top_k: int,
    live: LiveLibrary,
    entries: Mapping[str, PackEntry],
    load: Callable[[PackEntry], SkillPack],
    folder: Path,
) -> Router:
    """A router over the newest version of every pack.

    Args:
        top_k: most packs for one prompt; more than one by `keys` only.
        entries: by name. load: reads one from disk. folder: the library's.
    Raises: ConfigError for an unknown router, or a classifier that is missing or out of date;
        CheckpointError for a target that no router can read.
    """
    if name not in get_args(RouterName):
        names = ", ".join(get_args(RouterName))
        raise ConfigError(f"router {name!r} is unknown; choose one of {names}")
    if top_k > 1 and name != "keys":
        raise ConfigError(f"router {name} chooses one pack, asked are {top_k}; use keys")
    if name == "keys":
        keys = {label: read_key(load(entry)) for label, entry in entries.items() if entry.has_key}
        return KeyRouter(live.model, live.tokenizer, keys, top_k=top_k)
    packs = {label: load(entry) for label, entry in entries.items()}
    if name == "spectral":
        return SpectralRouter(live.model, live.tokenizer, packs)
    digests = {label: pack.digest for label, pack in packs.items()}
    classifier = Classifier.load(folder / CLASSIFIER, digests)
    return ClassifierRouter(live.model, live.tokenizer, classifier)
