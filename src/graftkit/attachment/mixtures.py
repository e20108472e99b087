"""What every row of a batch uses: the target, one pack, or a weighted sum of packs' deltas."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from graftkit.errors import AttachError

Choice = int | None | Mapping[int, float]
"""Of one row: a pack, the plain target, or weights of packs."""

Mixture = tuple[tuple[int, float], ...]
"""The same in one form: (pack, weight) in the order of packs, no weight 0; () is the target."""

Entries = slice | Tensor
"""Entries along dimension 0: one range, or their indices."""


@dataclass(frozen=True)
class Share:
    """A pack's share in some entries: y[entries] += weight · part.

    Attributes:
        weight: one for all entries, or a tensor (entries,) with one for each.
    """

    pack: int
    entries: Entries
    weight: float | Tensor

    def scale(self, part: Tensor) -> Tensor:
        """weight · part; the part itself at weight 1."""
        if isinstance(self.weight, Tensor):
            return part * self.weight.reshape(-1, *[1] * (part.dim() - 1))
        return part if self.weight == 1 else part * self.weight


class Rows:
    """The choice of every row.

    Rows that choose alike are of one kind. A module sees as many entries along dimension 0 as there
    are rows, or k times as many: each row owns k consecutive ones (tokens of flattened batches,
    beams).

    Args:
        kinds: of each row.
        mixtures: of each kind.
    """

    def __init__(self, kinds: tuple[int, ...], mixtures: Sequence[Mixture]):
        self.kinds = kinds
        self.mixtures = mixtures
        self.is_uniform = len(set(kinds)) == 1
        self._groups: dict[tuple[int, torch.device], list[tuple[int, Entries]]] = {}
        self._shares: dict[tuple[int, torch.device], list[Share]] = {}

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def packs(self) -> list[int]:
        """Every pack that any row uses, in order."""
        return sorted({pack for mixture in self.mixtures for pack, _ in mixture})

    def uses(self, pack: int) -> bool:
        """Whether any row uses a pack."""
        return pack in self.packs

    def only(self, kind: int) -> "Rows":
        """One row of this kind, for running a module again on the entries of its rows."""
        return Rows((kind,), self.mixtures)

    def groups(self, length: int, device: torch.device) -> list[tuple[int, Entries]]:
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

    def shares(self, length: int, device: torch.device) -> list[Share]:
        """The packs' shares in a tensor with `length` entries. Raises: AttachError as `groups`."""
        key = (length, device)
        if key not in self._shares:
            weights = [dict(self.mixtures[kind]) for kind in self.kinds]
            packs = sorted({pack for row in weights for pack in row})
            self._shares[key] = [
                self._share(pack, [row.get(pack, 0.0) for row in weights], length, device)
                for pack in packs
            ]
        return self._shares[key]

    def _share(self, pack: int, weights: list[float], length: int, device: torch.device) -> Share:
        entries = self._entries([bool(weight) for weight in weights], length, device)
        used = [weight for weight in weights if weight]
        if len(set(used)) == 1:
            return Share(pack, entries, used[0])
        repeated = torch.tensor(used, device=device).repeat_interleave(length // len(self))
        return Share(pack, entries, repeated)

    def _entries(self, rows: list[bool], length: int, device: torch.device) -> Entries:
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


def choose_rows(packs: Iterable[int], rows: Sequence[Choice]) -> Rows:
    """Check a choice of packs and put it in one form.

    Args:
        packs: those attached. rows: as in `Attachment.route`.
    Raises: AttachError for an empty list, a pack that is not attached, or a weight that is not
        finite.
    """
    if not rows:
        raise AttachError("no rows to route; pass one pack, None or weights for each row")
    known = set(packs)
    mixtures = [_mixture(choice, known) for choice in rows]
    kinds = list(dict.fromkeys(mixtures))
    return Rows(tuple(kinds.index(mixture) for mixture in mixtures), kinds)


def _mixture(choice: Choice, known: set[int]) -> Mixture:
    if choice is None:
        return ()
    weights = choice if isinstance(choice, Mapping) else {choice: 1.0}
    for pack, weight in weights.items():
        if type(pack) is not int or pack not in known:
            raise AttachError(
                f"a row is routed to pack {pack!r}, which is not attached; expected None or "
                f"{_listed(known)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise AttachError(f"pack {pack} has weight {weight!r}; expected a finite number")
    return tuple(sorted((pack, float(weight)) for pack, weight in weights.items() if weight))


def _listed(known: set[int]) -> str:
    shown = [str(pack) for pack in sorted(known)]
    return ", ".join(shown[:8] + (["..."] if len(shown) > 8 else [])) or "nothing else"
