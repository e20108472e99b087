"""What the rows of the running batch use, and how to take and put back their part of a call."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from graftkit.attachment.mixtures import Entries, Rows
from graftkit.errors import AttachError

# Named arguments that count tokens, and may by chance be as long as the batch.
_NOT_ROWS = ("cache_position",)


class Routing:
    """What the rows of the next batches use of the attached packs.

    Every thread that routes has rows of its own. A thread that never routed uses those of the one
    thread that did, as long as that choice never changed: afterwards nobody could say for which of
    its batches a choice was meant, and it is refused.

    Attributes:
        lock: held while the model runs; modules hold the parameters of one batch at a time.
        batch: entries of the batch that runs, for modules that see only one of them.
        recorder: while a probe runs, called with the name and the input of every module that has a
            path.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.batch = 1
        self.recorder: Callable[[str, Any], None] | None = None
        self._rows: WeakKeyDictionary[threading.Thread, Rows | None] = WeakKeyDictionary()
        self._default: Rows | None = None
        self._routes = 0
        self._override = threading.local()

    @property
    def rows(self) -> Rows:
        """The choice for this thread.

        Raises: AttachError where there is none, its pack was dropped, or several threads chose.
        """
        override: Rows | None = getattr(self._override, "rows", None)
        if override is not None:
            return override
        thread = threading.current_thread()
        rows = self._rows[thread] if thread in self._rows else self._borrow()
        if rows is None:
            raise AttachError(
                "packs are attached but no row is routed, or a routed pack was dropped; "
                "call route(rows) first"
            )
        return rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._routes += 1
        self._rows[threading.current_thread()] = rows

    def set_default(self, rows: Rows) -> None:
        """What serves every thread until one routes."""
        self._default = rows

    def drop(self, pack: int) -> None:
        """Rows that may use this pack have to be routed again."""
        for thread, rows in list(self._rows.items()):
            if rows is not None and rows.uses(pack):
                self._rows[thread] = None
        if self._default is not None and self._default.uses(pack):
            self._default = None

    def begin(self, batch: int) -> None:
        """Take note of a batch that the model starts on. Raises: AttachError if it does not fit."""
        if batch % len(self.rows):
            raise AttachError(
                f"{len(self.rows)} rows are routed but the batch has {batch}; route every row"
            )
        self.batch = batch

    @contextmanager
    def using(self, rows: Rows) -> Iterator[None]:
        """Another choice for this thread, for the length of a block."""
        before, batch = getattr(self._override, "rows", None), self.batch
        self._override.rows = rows
        try:
            yield
        finally:
            self._override.rows, self.batch = before, batch

    def _borrow(self) -> Rows | None:
        """The default, or the only choice that any thread made."""
        if not self._routes:
            return self._default
        if self._routes > 1 or not self._rows:
            raise AttachError(
                "rows were routed by other threads, and never in this one; call route(rows) in "
                "the thread that runs the model"
            )
        return next(iter(self._rows.values()))


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor with a dimension in nested arguments, in their order."""
    if isinstance(values, Tensor):
        return values if values.dim() else None
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            found = first_tensor(value)
            if found is not None:
                return found
    return None


def take(values: Any, length: int, entries: Entries) -> Any:
    """Nested arguments with every tensor of `length` entries cut to `entries`."""
    if isinstance(values, Tensor):
        return values[entries] if values.dim() and values.shape[0] == length else values
    if isinstance(values, dict):
        return {
            key: value if key in _NOT_ROWS else take(value, length, entries)
            for key, value in values.items()
        }
    if type(values) in (list, tuple):
        return type(values)(take(value, length, entries) for value in values)
    return values


def put(whole: Any, part: Any, place: Callable[[Tensor], tuple[Tensor, Entries]]) -> Any:
    """`whole` with a part of every tensor replaced; values that are no tensors are kept.

    Args:
        place: for a tensor of `whole` a copy that may be written to, and the entries of `part`.
    Raises: AttachError where a part has another shape than its place.
    """
    if isinstance(whole, Tensor) and isinstance(part, Tensor):
        if not whole.dim():
            return whole
        copy, entries = place(whole)
        if copy[entries].shape != part.shape:
            raise AttachError(
                "a module's answer to a row depends on the other rows of the batch (its shape "
                f"{list(part.shape)} alone, {list(copy[entries].shape)} in the batch); run the "
                "rows of each pack in a batch of their own"
            )
        copy[entries] = part.to(copy.dtype)
        return copy
    if isinstance(whole, dict) and isinstance(part, dict):
        filled = {key: put(value, part[key], place) for key, value in whole.items()}
        return filled if type(whole) is dict else type(whole)(**filled)
    if isinstance(whole, (list, tuple)) and isinstance(part, (list, tuple)):
        pairs = zip(whole, part, strict=True)
        return type(whole)(put(old, new, place) for old, new in pairs)
    return whole
