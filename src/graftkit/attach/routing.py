"""What the rows of the running batch use, and how to take and put back their part of a call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from graftkit.attach.mixtures import Entries, Rows
from graftkit.errors import AttachError

# Named arguments that count tokens, and may by chance be as long as the batch.
_NOT_ROWS = ("cache_position",)


class Routing:
    """What the rows of the next batches use of the attached packs."""

    def __init__(self) -> None:
        self.batch = 1
        """Entries of the batch that the model is running, for modules that see only one of them."""
        self._rows: Rows | None = None

    @property
    def rows(self) -> Rows:
        """The choice. Raises: AttachError where there is none, or its pack was dropped."""
        if self._rows is None:
            raise AttachError(
                "packs are attached but no row is routed, or a routed pack was dropped; "
                "call route(rows) first"
            )
        return self._rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._rows = rows

    def drop(self, pack: int) -> None:
        """Rows that may use this pack have to be routed again."""
        if self._rows is not None and (self._rows.gate or self._rows.uses(pack)):
            self._rows = None

    def begin(self, batch: int) -> None:
        """Take note of a batch that the model starts on. Raises: AttachError if it does not fit."""
        if batch % len(self.rows):
            raise AttachError(
                f"{len(self.rows)} rows are routed but the batch has {batch}; route every row"
            )
        self.batch = batch

    @contextmanager
    def using(self, rows: Rows) -> Iterator[None]:
        """Another choice for the length of a block."""
        before = self._rows, self.batch
        self._rows = rows
        try:
            yield
        finally:
            self._rows, self.batch = before


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
    """
    if isinstance(whole, Tensor) and isinstance(part, Tensor):
        if not whole.dim():
            return whole
        copy, entries = place(whole)
        copy[entries] = part.to(copy.dtype)
        return copy
    if isinstance(whole, dict) and isinstance(part, dict):
        filled = {key: put(value, part[key], place) for key, value in whole.items()}
        return filled if type(whole) is dict else type(whole)(**filled)
    if isinstance(whole, (list, tuple)) and isinstance(part, (list, tuple)):
        pairs = zip(whole, part, strict=True)
        return type(whole)(put(old, new, place) for old, new in pairs)
    return whole
