"""Packs in memory beside one live model, at most so many bytes; the least recently used leave."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from graftkit.attachment import Attachment
from graftkit.config import Budget
from graftkit.errors import BudgetError, ConfigError
from graftkit.library.index import Entry
from graftkit.skillpack import SkillPack

Mixture = Mapping[Entry, float]
"""The packs of one row and their weights; empty for the target alone."""


class PackMemory:
    """The packs that are attached now.

    A pack's bytes are known once it was loaded: the first time, memory is above the limit by this
    one pack until others have left.

    Args:
        attachment: in side mode. load: reads a pack from disk. limit_bytes: of all updates
            together, None for no limit.
    """

    def __init__(
        self,
        attachment: Attachment,
        load: Callable[[Entry], SkillPack],
        limit_bytes: int | None,
    ):
        self._attachment = attachment
        self._load = load
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

    def parts(self, mixtures: Sequence[Mixture]) -> Iterator[list[int]]:
        """Rows in parts whose packs are in memory together while the caller works on a part.

        Raises: ConfigError where the packs of one row alone are larger than the limit.
        """
        part: list[int] = []
        held: set[Entry] = set()
        for row in sorted(range(len(mixtures)), key=lambda row: _labels(mixtures[row])):
            needed = set(mixtures[row])
            if part and not self._hold(held | needed):
                yield part
                part, held = [], set()
            if not part:
                self.hold(needed)
            part.append(row)
            held |= needed
        if part:
            yield part

    def hold(self, entries: Iterable[Entry]) -> None:
        """Have these packs in memory together. Raises: ConfigError where they do not fit."""
        wanted = set(entries)
        if not self._hold(wanted):
            raise ConfigError(
                f"{' and '.join(_labels(wanted))} do not fit into {self._limit:,} bytes of memory "
                "for packs; allow more"
            )

    def route(self, mixtures: Sequence[Mixture]) -> None:
        """Choose the packs of every row of the next batches; they must be in memory."""
        self._attachment.route(
            [{self.index(entry): weight for entry, weight in row.items()} for row in mixtures]
        )

    def keep(self, digests: set[str]) -> None:
        """Forget every pack but these."""
        for digest in set(self._indices) - digests:
            self._drop(digest)

    def index(self, entry: Entry) -> int:
        """The attachment's index of a pack in memory."""
        return self._indices[entry.digest]

    def _hold(self, wanted: set[Entry]) -> bool:
        """Whether these packs fit together; then they are there. Others may have left."""
        if self._is_over(sum(self._sizes.get(entry.digest, 0) for entry in wanted)):
            return False
        kept = {entry.digest for entry in wanted}
        for entry in sorted(wanted, key=lambda entry: entry.label):
            if entry.digest in self._indices:
                self._indices.move_to_end(entry.digest)
                continue
            self._make_room(kept, self._sizes.get(entry.digest, 0))
            index = self._attachment.add(self._load(entry))
            self._indices[entry.digest] = index
            self._sizes[entry.digest] = self._attachment.nbytes(index)
            self._make_room(kept, 0)
            if self._is_over(self.nbytes):
                self._drop(entry.digest)
                return False
        return True

    def _make_room(self, kept: set[str], coming: int) -> None:
        for digest in [digest for digest in self._indices if digest not in kept]:
            if not self._is_over(self.nbytes + coming):
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


def _labels(entries: Iterable[Entry]) -> list[str]:
    return sorted(entry.label for entry in entries)
