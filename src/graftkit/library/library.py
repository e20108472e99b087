"""The library: packs of one target in a folder, answered by a router.

library = Library.init("skills", target="base/")
library.add("math.skillpack", name="math", prompts=[...])
library.generate("2 + 2 =").text
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import ParamSpec, Self, TypedDict, TypeVar, Unpack, get_args, overload

from graftkit.attachment.configuration import check_tokenizer
from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import DistillConfig, resolve_model
from graftkit.distill.pipeline import run_distill
from graftkit.errors import ConfigError, LibraryError, PackMismatchError
from graftkit.fuse.merge import config_changes
from graftkit.library.answers import (
    LibraryAnswer,
    LibraryScore,
    MixMode,
    PreparedPrompt,
    generate_texts,
    prepare_prompt,
    score_library,
    unanswerable,
)
from graftkit.library.audit import Audit, Proof, audit_pack, prove_removal
from graftkit.library.folder import LEARNING, LibraryIndex, PackEntry, PackFolder
from graftkit.library.live import (
    EntryWeights,
    LiveLibrary,
    RouterName,
    describe_target,
    make_router,
    open_target,
    parse_memory,
)
from graftkit.models.loading import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.progress import Progress
from graftkit.route import TARGET, Route, Router
from graftkit.route.classifier import train_classifier
from graftkit.route.nearest import KeyRouter, fit_default_key
from graftkit.rows import Row
from graftkit.skillpack import SkillPack

_Options = ParamSpec("_Options")
_Result = TypeVar("_Result")


class AnswerOptions(TypedDict, total=False):
    """The options of `Library.generate`."""

    route: str
    router: RouterName
    top_k: int
    mix: MixMode
    max_new_tokens: int
    raw: bool
    system: str | None


def _in_turn(method: Callable[_Options, _Result]) -> Callable[_Options, _Result]:
    """Let one thread at a time run the methods of a Library."""

    @wraps(method)
    def alone(*args: _Options.args, **options: _Options.kwargs) -> _Result:
        with args[0]._lock:  # type: ignore[attr-defined]
            return method(*args, **options)

    return alone


class Library:
    """Packs of one target, and the target that answers with them.

    A pack's address is NAME (its newest version), NAME@VERSION, or eight or more first digits of
    its digest. Changes by another process are seen by the next call. The target and the packs are
    loaded when they are first needed. Threads may share an object: calls that need the model wait
    for each other.

    Args:
        memory: most bytes of attached packs, such as "2GB"; None for no limit.
    """

    def __init__(self, folder: PackFolder, memory: str | int | None = None):
        self._lock = RLock()
        self._folder = folder
        self._memory = parse_memory(memory)
        self._live: LiveLibrary | None = None
        self._routers: dict[tuple[str, int], Router] = {}
        self._last_index = folder.read()

    @classmethod
    def init(cls, path: str | Path, target: str | Path) -> Self:
        """Make an empty library for a target, in a new or empty folder; reads every tensor once.

        Raises: CheckpointError, LibraryError, OutputError.
        """
        return cls(PackFolder.create(Path(path), describe_target(target)))

    @classmethod
    def open(cls, path: str | Path, memory: str | int | None = None) -> Self:
        """Open a library; nothing but library.toml is read. Raises: LibraryError, ConfigError."""
        return cls(PackFolder(Path(path)), memory)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def index(self) -> LibraryIndex:
        """The content of library.toml, read anew. Raises: LibraryError."""
        return self._refresh()

    @property
    def live(self) -> LiveLibrary:
        """The target in memory. Raises: CheckpointError, PackMismatchError."""
        with self._lock:
            if self._live is None:
                self._live = LiveLibrary(self.checkpoint(), self._folder.load, self._memory)
            return self._live

    def checkpoint(self) -> Checkpoint:
        """The target on disk. Raises: CheckpointError, PackMismatchError."""
        return open_target(self.index.target)

    def packs(self) -> tuple[PackEntry, ...]:
        """All packs, in the order in which they were added."""
        return self.index.pack

    def load(self, address: str) -> SkillPack:
        """Read one pack. Raises: LibraryError where it is unknown, missing or not the same file."""
        return self._folder.load(self.index.find(address))

    @_in_turn
    def add(
        self,
        file: str | Path,
        name: str,
        prompts: Sequence[str] | None = None,
        update: bool = False,
    ) -> PackEntry:
        """Copy a pack into the library.

        Args:
            prompts: 20 or more prompts that the pack should answer. A router key is fitted to them
                and replaces the pack's own.
            update: allow a name that is taken; the pack becomes its next version.
        Raises: PackFormatError; PackMismatchError for a pack of another target, or one that
            changes the size of the vocabulary, how text is split into tokens, or settings of
            config.json that change what the model computes; ConfigError for an invalid or taken
            name; RowsError for too few prompts; LibraryError, OutputError. The library is then
            unchanged.
        """
        file = Path(file)
        self.index.next_version(name, update)  # before the work of fitting a key
        pack = SkillPack.load(file)
        self._check_servable(pack, file)
        if prompts is None:
            return self._folder.add(file, name, pack.router_key is not None, update)
        key = fit_default_key(self.live.model, self.live.tokenizer, prompts)
        with TemporaryDirectory(prefix="graftkit-") as folder:
            keyed = Path(folder) / file.name
            key.into(pack).save(keyed)
            return self._folder.add(keyed, name, True, update)

    @_in_turn
    def remove(self, address: str) -> list[PackEntry]:
        """Delete packs: every version of NAME, or the one pack of another address. A trained
        classifier is deleted too; the routes of the other packs do not change.

        Raises: LibraryError, OutputError.
        """
        gone = self._folder.remove(address)
        self._refresh()
        return gone

    def remains(self, name: str) -> list[Path]:
        """Folders that `learn` made packs of this name from; `remove` does not delete them."""
        learning = self.path / LEARNING
        folders = (learning / name, *learning.glob(f"{name}@*"))
        return sorted(folder for folder in folders if folder.is_dir())

    @_in_turn
    def route(
        self, prompts: Sequence[str], router: RouterName = "keys", top_k: int = 1
    ) -> list[Route]:
        """Choose packs, by name, for each prompt. `keys` never chooses a pack without a key.

        Raises: ConfigError for an unknown router, or a classifier that is missing or out of date;
            CheckpointError for a target that the router cannot read.
        """
        return self._router(router, top_k).route(list(prompts))

    @_in_turn
    def routing_warnings(self, unread_only: bool = False) -> list[str]:
        """What to know before relying on the default router, one line each.

        Args:
            unread_only: only of packs whose key this machine's encoder cannot read.
        Raises: ConfigError, CheckpointError, as `route`.
        """
        router = self._router("keys", 1)
        if not isinstance(router, KeyRouter):
            return []
        return router.unread if unread_only else list(router.warnings)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompts: str, **options: Unpack[AnswerOptions]
    ) -> LibraryAnswer: ...
    @overload
    def generate(
        self, prompts: Sequence[str], **options: Unpack[AnswerOptions]
    ) -> list[LibraryAnswer]: ...

    @_in_turn
    def generate(
        self,
        prompts: str | Sequence[str],
        route: str = "auto",
        router: RouterName = "keys",
        top_k: int = 1,
        mix: MixMode = "deltas",
        max_new_tokens: int = 128,
        raw: bool = False,
        system: str | None = None,
    ) -> LibraryAnswer | list[LibraryAnswer]:
        """Answer prompts greedily, each with its own packs.

        The target answers what no pack accepts. A prompt without tokens, or as long as the
        target's context, gets an empty answer whose note says why. Routers read a prompt as it is.
        A pack reads it as `graftkit.attachment.configuration.reads_chat` says, the target in its
        chat template where it has one; packs that differ answer together in the target's way.

        Args:
            prompts: one, or several for a list of answers.
            route: "auto", a pack's address, or "target" for no pack.
            router, top_k: as in `route`, where route is "auto".
            mix: "deltas" adds the deltas of a prompt's packs in one pass; "probabilities" runs one
                pass per pack and averages the next-token probabilities.
            raw: give every prompt as it is, without a chat template.
            system: text of a system turn, in a chat template; a prompt that is given raw then gets
                an empty answer with a note.
        Raises: LibraryError for an unknown pack; ConfigError for an unknown option; CheckpointError
            for a target that the router cannot read.
        """
        _check_options(mix, max_new_tokens)
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = [
            LibraryAnswer(prompt, "", Route({}, {}), unanswerable(self.live, ids))
            for prompt, ids in zip(several, self.live.encode(several), strict=True)
        ]
        rows = [row for row, answer in enumerate(answers) if answer.note is None]
        chosen = self._choose([several[row] for row in rows], route, router, top_k)
        routed = dict(zip(rows, chosen, strict=True))
        prepared: dict[int, PreparedPrompt] = {}
        for row, (_, mixture) in routed.items():
            made = prepare_prompt(self.live, several[row], mixture, max_new_tokens, raw, system)
            if isinstance(made, PreparedPrompt):
                prepared[row] = made
            else:
                answers[row] = LibraryAnswer(several[row], "", Route({}, {}), made)
        texts = generate_texts(self.live, list(prepared.values()), mix)
        for row, text in zip(prepared, texts, strict=True):
            answers[row] = LibraryAnswer(several[row], text, routed[row][0])
        return answers[0] if isinstance(prompts, str) else answers

    def mixture(self, route: Route) -> dict[PackEntry, float]:
        """The packs that a route names, with their weights."""
        return {self.index.find(name): weight for name, weight in route.weights.items()}

    @_in_turn
    def evaluate(
        self,
        rows: Mapping[str, Sequence[Row]],
        router: RouterName = "keys",
        progress: Progress | None = None,
    ) -> LibraryScore:
        """Compare routed answers with those of the right pack and of the target alone.

        Args:
            rows: by the name of the pack that should answer them; "target" for rows of no pack.
        Raises: LibraryError for a name without a pack; ConfigError without rows; RowsError for a
            row that is too long or has an empty prompt.
        """
        if not rows or not all(rows.values()):
            raise ConfigError("no rows; name a pack and rows that it should answer")
        packs = {name: {entry: 1.0} for name, entry in self.index.newest.items()}
        for name in rows.keys() - packs.keys() - {TARGET}:
            raise LibraryError(
                f"rows are given for {name!r}; the packs are {', '.join(packs) or 'none'}, and "
                f"{TARGET!r} stands for no pack"
            )
        mixtures: dict[str, dict[PackEntry, float]] = {TARGET: {}, **packs}
        return score_library(self.live, self._router(router, 1), rows, mixtures, progress)

    @_in_turn
    def learn(
        self,
        config: str | Path,
        name: str,
        update: bool = False,
        progress: Progress | None = None,
    ) -> PackEntry:
        """Distil a skill in learning/NAME and add its pack; the other packs do not change.

        If it is interrupted, the same call continues. Where there are enough training prompts, a
        router key is fitted to them.

        Args:
            config: a configuration of `graftkit distill`; its target must be the library's.
        Raises: PackMismatchError for another target; ConfigError for the configuration or the
            name; LibraryError, OutputError; the errors of `run_distill`.
        """
        version = self.index.next_version(name, update)
        target = resolve_model(DistillConfig.read_toml(config).target, Path(config).parent)
        if describe_target(target).fingerprint != self.index.target.fingerprint:
            raise PackMismatchError(
                f"{config}: target {target} is not the library's, {self.index.target.reference}; "
                "learn with that one"
            )
        folder = self.path / LEARNING / (name if version == 1 else f"{name}@{version}")
        run_distill(config, folder, progress=progress)
        return self.add(folder / "skill.skillpack", name, update=update)

    @_in_turn
    def train_router(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Train the router `classifier` for the present packs.

        Args:
            rows: held out, by the name of the pack that should answer them; under "target" rows of
                no pack.
        Raises: ConfigError for rows of an unknown pack; RowsError without rows of no pack;
            CheckpointError where logits are not finite; OutputError.
        """
        self._live = None  # training attaches the packs itself, to a target of its own
        checkpoint = self.checkpoint()
        packs = {name: self._folder.load(entry) for name, entry in self.index.newest.items()}
        classifier = train_classifier(
            load_model(checkpoint), usable_tokenizer(checkpoint), packs, rows
        )
        self._folder.save_classifier(classifier)
        self._routers.clear()

    @_in_turn
    def audit(self, address: str, progress: Progress | None = None) -> Audit:
        """Measure what a pack changes, and how similar the other packs are.

        Raises: LibraryError for an unknown pack; CheckpointError, CorruptPackError.
        """
        own = self.index.find(address)
        others = {
            entry.label: self._folder.load(entry)
            for name, entry in self.index.newest.items()
            if name != own.name
        }
        return audit_pack(self.checkpoint(), self._folder.load(own), others, progress)

    def prove_removal(
        self, address: str, prompts: Sequence[str], router: RouterName = "keys"
    ) -> Proof:
        """Compare a copy of this library after `remove(address)` with one that never had those
        packs. The library itself does not change.

        Raises: LibraryError; ConfigError where no prompt can be answered.
        """
        gone = self.index.find_all(address)
        return prove_removal(self._folder, gone, prompts, router, type(self))

    def _refresh(self) -> LibraryIndex:
        """Read library.toml; packs that it no longer lists are detached."""
        index = self._folder.read()
        if index is not self._last_index:
            self._last_index = index
            self._routers.clear()
            if self._live is not None:
                self._live.memory.keep({entry.digest for entry in index.pack})
        return index

    def _choose(
        self, prompts: Sequence[str], route: str, router: RouterName, top_k: int
    ) -> list[tuple[Route, EntryWeights]]:
        """The route of each prompt, and its packs with their weights."""
        if route == "auto":
            return [(each, self.mixture(each)) for each in self.route(prompts, router, top_k)]
        if route == TARGET:
            return [(Route({}, {}), {}) for _ in prompts]
        entry = self.index.find(route)
        return [(Route({entry.name: 1.0}, {}), {entry: 1.0}) for _ in prompts]

    def _router(self, name: str, top_k: int) -> Router:
        entries = self.index.newest
        if (name, top_k) not in self._routers:
            self._routers[name, top_k] = make_router(
                name, top_k, self.live, entries, self._folder.load, self.path
            )
        return self._routers[name, top_k]

    def _check_servable(self, pack: SkillPack, file: Path) -> None:
        """Raises: PackMismatchError for a pack that cannot serve beside others of this target."""
        own, made_for = self.index.target, pack.manifest.target
        if made_for.fingerprint != own.fingerprint:
            raise PackMismatchError(
                f"{file}: made for {made_for.name} (fingerprint {made_for.fingerprint[:12]}), this "
                f"library is for {own.reference} ({own.fingerprint[:12]}); add it to a library of "
                "its own target"
            )
        for record in pack.manifest.tensors:
            if record.tuned_shape is not None:
                raise PackMismatchError(
                    f"{file}: changes the shape of {record.name}, so it cannot serve beside other "
                    "packs; attach or merge it alone"
                )
        if not pack.manifest.files:
            return
        checkpoint = self.checkpoint()
        check_tokenizer(checkpoint, pack)
        keys = config_changes(pack, checkpoint)
        if keys:
            raise PackMismatchError(
                f"{file}: config.json of {pack.manifest.tuned.name} has another "
                f"{', '.join(keys)}, which changes what every row of a batch computes, so it "
                "cannot serve beside other packs; attach or merge it alone"
            )


def _check_options(mix: str, max_new_tokens: int) -> None:
    """Raises: ConfigError."""
    if mix not in get_args(MixMode):
        raise ConfigError(f"mix is {mix!r}; choose one of {', '.join(get_args(MixMode))}")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
