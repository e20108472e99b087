"""Which packs every row of a batch uses: none, one, or a weighted sum of several.

`choose_rows` checks a choice and puts it in one form, `RoutedRows`. `Routing` holds the choice for
the batches of each thread. `take_entries` and `put_entries` cut the rows of one kind out of a
module's arguments and put their results back into the whole output.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from graftkit.errors import AttachError

PackChoice = int | None | Mapping[int, float]
"""What one row uses: a pack (its index), the plain target (None), or weights of packs."""

WeightsByPack = tuple[tuple[int, float], ...]
"""The same in one form: (pack, weight) in the order of packs, no weight 0. () is the target."""

EntryIndex = slice | Tensor
"""Entries along dimension 0 of a tensor: one range, or their indices."""


@dataclass(frozen=True)
class PackShare:
    """A pack's share in some entries: y[entries] += weight · part.

    Attributes:
        weight: one for all entries, or a tensor (entries,) with one for each.
    """

    pack: int
    entries: EntryIndex
    weight: float | Tensor

    def scale(self, part: Tensor) -> Tensor:
        """weight · part; the part itself at weight 1."""
        if isinstance(self.weight, Tensor):
            return part * self.weight.reshape(-1, *[1] * (part.dim() - 1))
        return part if self.weight == 1 else part * self.weight


class RoutedRows:
    """What every row of a batch uses.

    Rows that choose alike are of one kind. A module sees as many entries along dimension 0 as there
    are rows, or k times as many: each row owns k consecutive ones (tokens of flattened batches,
    beams).

    Args:
        kinds: the kind of each row, an index into `weights`.
        weights: the packs' weights of each kind.
        is_stacked: whether linear layers add the packs of all rows in two products.
    """

    def __init__(
        self,
        kinds: tuple[int, ...],
        weights: Sequence[WeightsByPack],
        is_stacked: bool = False,
    ):
        self.kinds = kinds
        self.weights = weights
        self.is_stacked = is_stacked
        self.is_uniform = len(set(kinds)) == 1
        self._groups: dict[tuple[int, torch.device], list[tuple[int, EntryIndex]]] = {}
        self._shares: dict[tuple[int, torch.device], list[PackShare]] = {}
        self._tables: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def packs(self) -> list[int]:
        """Every pack that any row uses, in order."""
        return sorted({pack for weights in self.weights for pack, _ in weights})

    def uses(self, pack: int) -> bool:
        """Whether any row uses a pack."""
        return pack in self.packs

    def only(self, kind: int) -> "RoutedRows":
        """One row of this kind, for running a module again on the entries of its rows."""
        return RoutedRows((kind,), self.weights)

    def groups(self, length: int, device: torch.device) -> list[tuple[int, EntryIndex]]:
        """(kind, its entries) for every kind, of a tensor with `length` entries.

        Raises: AttachError when they cannot be dealt out to the rows evenly.
        """
        key = (length, device)
        if key not in self._groups:
            self._groups[key] = [
                (kind, self._entries([k == kind for k in self.kinds], length, device))
                for kind in sorted(set(self.kinds))
            ]
        return self._groups[key]

    def shares(self, length: int, device: torch.device) -> list[PackShare]:
        """The packs' shares in a tensor with `length` entries.

        Raises: AttachError when they cannot be dealt out to the rows evenly.
        """
        key = (length, device)
        if key not in self._shares:
            weights = [dict(self.weights[kind]) for kind in self.kinds]
            packs = sorted({pack for row in weights for pack in row})
            self._shares[key] = [
                self._share(pack, [row.get(pack, 0.0) for row in weights], length, device)
                for pack in packs
            ]
        return self._shares[key]

    def table(self, packs: tuple[int, ...], length: int, device: torch.device) -> Tensor:
        """The weight of every pack in each entry of a tensor, (length, packs)."""
        key = (packs, length, device)
        if key not in self._tables:
            rows = [dict(self.weights[kind]) for kind in self.kinds]
            table = torch.tensor([[row.get(pack, 0.0) for pack in packs] for row in rows])
            self._tables[key] = table.repeat_interleave(length // len(self), dim=0).to(device)
        return self._tables[key]

    def _share(
        self, pack: int, weights: list[float], length: int, device: torch.device
    ) -> PackShare:
        entries = self._entries([bool(weight) for weight in weights], length, device)
        used = [weight for weight in weights if weight]
        if len(set(used)) == 1:
            return PackShare(pack, entries, used[0])
        repeated = torch.tensor(used, device=device).repeat_interleave(length // len(self))
        return PackShare(pack, entries, repeated)

    def _entries(self, rows: list[bool], length: int, device: torch.device) -> EntryIndex:
        """The entries of the rows that are marked, at least one."""
        if all(rows):
            return slice(None)
        if length % len(rows):
            raise AttachError(
                f"a module sees {length} entries for {len(rows)} rows, so it does not keep them "
                "apart; run the rows of each pack in a batch of their own"
            )
        repeat = length // len(rows)
        marked = [row for row, is_marked in enumerate(rows) if is_marked]
        if marked[-1] - marked[0] + 1 == len(marked):
            return slice(marked[0] * repeat, (marked[-1] + 1) * repeat)
        places = [row * repeat + place for row in marked for place in range(repeat)]
        return torch.tensor(places, device=device)


def choose_rows(
    packs: Iterable[int], rows: Sequence[PackChoice], stacked: bool = False
) -> RoutedRows:
    """Check a choice of packs and put it in one form.

    Args:
        packs: indices of the attached packs. rows: the choice of each row.
        stacked: as in `Attachment.route`.
    Raises: AttachError for an empty list, a pack that is not attached, or a weight that is not
        finite.
    """
    if not rows:
        raise AttachError("no rows to route; pass one pack, None or weights for each row")
    attached = set(packs)
    weights = [_pack_weights(choice, attached) for choice in rows]
    kinds = list(dict.fromkeys(weights))
    return RoutedRows(tuple(kinds.index(own) for own in weights), kinds, stacked)


def _pack_weights(choice: PackChoice, attached: set[int]) -> WeightsByPack:
    if choice is None:
        return ()
    weights = choice if isinstance(choice, Mapping) else {choice: 1.0}
    for pack, weight in weights.items():
        if type(pack) is not int or pack not in attached:
            raise AttachError(
                f"a row is routed to pack {pack!r}, which is not attached; expected None or "
                f"{_listed(attached)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise AttachError(f"pack {pack} has weight {weight!r}; expected a finite number")
    return tuple(sorted((pack, float(weight)) for pack, weight in weights.items() if weight))


def _listed(packs: set[int]) -> str:
    shown = [str(pack) for pack in sorted(packs)]
    return ", ".join(shown[:8] + (["..."] if len(shown) > 8 else [])) or "nothing else"


# Named arguments that count tokens, and may by chance be as long as the batch.
_NOT_ROWS = ("cache_position",)


class Routing:
    """Which packs the rows of the next batches use, in every thread.

    Every thread that routes has rows of its own. A thread that never routed uses those of the one
    thread that did, as long as that choice never changed. After a second choice it is unknown which
    of them its batches should use, and they are refused.

    Attributes:
        lock: held while the model runs; modules hold the parameters of one batch at a time.
        batch: entries of the batch that runs, for modules that see only one of them.
        recorder: while a trial batch runs, called with the name and the input of every module that
            packs change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.batch = 1
        self.recorder: Callable[[str, Any], None] | None = None
        self._rows: WeakKeyDictionary[threading.Thread, RoutedRows | None] = WeakKeyDictionary()
        self._default: RoutedRows | None = None
        self._routes = 0
        self._override = threading.local()

    @property
    def rows(self) -> RoutedRows:
        """The choice for this thread.

        Raises: AttachError where there is none, its pack was dropped, or several threads chose.
        """
        override: RoutedRows | None = getattr(self._override, "rows", None)
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
    def rows(self, rows: RoutedRows) -> None:
        self._routes += 1
        self._rows[threading.current_thread()] = rows

    def set_default(self, rows: RoutedRows) -> None:
        """Use these rows in every thread until one routes."""
        self._default = rows

    def drop(self, pack: int) -> None:
        """Rows that may use this pack have to be routed again."""
        for thread, rows in list(self._rows.items()):
            if rows is not None and rows.uses(pack):
                self._rows[thread] = None
        if self._default is not None and self._default.uses(pack):
            self._default = None

    def begin(self, batch: int) -> None:
        """Begin a batch. Raises: AttachError where its size does not fit the routed rows."""
        if batch % len(self.rows):
            raise AttachError(
                f"{len(self.rows)} rows are routed but the batch has {batch}; route every row"
            )
        self.batch = batch

    @contextmanager
    def using(self, rows: RoutedRows) -> Iterator[None]:
        """Another choice for this thread, for the length of a block."""
        before, batch = getattr(self._override, "rows", None), self.batch
        self._override.rows = rows
        try:
            yield
        finally:
            self._override.rows, self.batch = before, batch

    def _borrow(self) -> RoutedRows | None:
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
            tensor = first_tensor(value)
            if tensor is not None:
                return tensor
    return None


def take_entries(values: Any, length: int, entries: EntryIndex) -> Any:
    """Nested arguments with every tensor of `length` entries cut to `entries`."""
    if isinstance(values, Tensor):
        return values[entries] if values.dim() and values.shape[0] == length else values
    if isinstance(values, dict):
        return {
            key: value if key in _NOT_ROWS else take_entries(value, length, entries)
            for key, value in values.items()
        }
    if type(values) in (list, tuple):
        return type(values)(take_entries(value, length, entries) for value in values)
    return values


def put_entries(whole: Any, part: Any, place: Callable[[Tensor], tuple[Tensor, EntryIndex]]) -> Any:
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
        filled = {key: put_entries(value, part[key], place) for key, value in whole.items()}
        return filled if type(whole) is dict else type(whole)(**filled)
    if isinstance(whole, (list, tuple)) and isinstance(part, (list, tuple)):
        pairs = zip(whole, part, strict=True)
        return type(whole)(put_entries(old, new, place) for old, new in pairs)
    return whole
