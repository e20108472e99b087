"""Which entries of a batch use which pack, and how to take and put back their part of a call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graftkit.errors import AttachError

Entries = slice | Tensor
"""Entries along dimension 0: one range, or their indices."""

# Named arguments that count tokens, and may by chance be as long as the batch.
_NOT_ROWS = ("cache_position",)


class Routing:
    """The pack of every row, None for the plain target.

    A module sees as many entries along dimension 0 as there are rows, or k times as many: each row
    owns k consecutive ones (tokens of flattened batches, beams).
    """

    def __init__(self, packs: int):
        self._packs = packs
        self._rows: tuple[int | None, ...] | None = (0,) if packs == 1 else None
        self._groups: dict[tuple[int, str], list[tuple[int, Entries]]] = {}
        self.batch = 1
        """Entries of the batch that the model is running, for modules that see only one of them."""

    def choose(self, rows: Sequence[int | None]) -> None:
        """Set the pack of each row. Raises: AttachError for an empty list or an unknown pack."""
        if not rows:
            raise AttachError("no rows to route; pass one pack index or None for each row")
        for row in rows:
            known = row is None or (type(row) is int and 0 <= row < self._packs)
            if not known:
                raise AttachError(
                    f"row is routed to pack {row!r}; expected None or 0 to {self._packs - 1}"
                )
        self._rows = tuple(rows)
        self._groups.clear()

    @property
    def rows(self) -> tuple[int | None, ...]:
        """The choice. Raises: AttachError when several packs wait for one."""
        if self._rows is None:
            raise AttachError(
                f"{self._packs} packs are attached and no row is routed; call route(rows) first"
            )
        return self._rows

    @property
    def is_uniform(self) -> bool:
        """Whether all rows use the same pack, or none uses any."""
        return len(set(self.rows)) == 1

    def begin(self, batch: int) -> None:
        """Take note of a batch that the model starts on. Raises: AttachError if it does not fit."""
        if batch % len(self.rows):
            raise AttachError(
                f"{len(self.rows)} rows are routed but the batch has {batch}; route every row"
            )
        self.batch = batch

    def groups(self, entries: int, device: torch.device) -> list[tuple[int, Entries]]:
        """(pack, its entries) for every pack in use, of a tensor with that many entries.

        Raises: AttachError when they cannot be dealt out to the rows evenly.
        """
        rows = self.rows
        key = (entries, str(device))
        if key not in self._groups:
            if entries % len(rows):
                raise AttachError(
                    f"a module sees {entries} entries for {len(rows)} rows; "
                    "route every row of the batch"
                )
            self._groups[key] = _groups(rows, entries // len(rows), device)
        return self._groups[key]

    @contextmanager
    def only(self, pack: int) -> Iterator[None]:
        """Every entry belongs to one pack: for running a module again on that pack's part."""
        before = self._rows, self._groups, self.batch
        self._rows, self._groups = (pack,), {}
        try:
            yield
        finally:
            self._rows, self._groups, self.batch = before


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


def _groups(
    rows: tuple[int | None, ...], repeat: int, device: torch.device
) -> list[tuple[int, Entries]]:
    owners = [row for row in rows for _ in range(repeat)]
    groups: list[tuple[int, Entries]] = []
    for pack in sorted({row for row in rows if row is not None}):
        places = [place for place, owner in enumerate(owners) if owner == pack]
        if places[-1] - places[0] + 1 == len(places):
            groups.append((pack, slice(places[0], places[-1] + 1)))
        else:
            groups.append((pack, torch.tensor(places, device=device)))
    return groups
