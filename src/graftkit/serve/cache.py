"""A key/value cache of slots: each running request has one, with a length of its own.

A cache of transformers gives all rows of a batch the same length, and pads the shorter ones. Here
a row's token at position p lies at place p of its slot. Places behind a row's last token hold what
an earlier request or padding left there; masks hide them until they are written again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FIRST_TOKENS = 256  # places of a slot at first; they double when a row needs more


class SlotCache:
    """Keys and values of all layers; attention layers call `update` as on a cache of transformers.

    Sliding-window layers keep every token too; their masks hide those outside the window.

    Args:
        slots: most rows at a time.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self._layers: dict[int, list[Tensor]] = {}
        self._rows: slice | Tensor = slice(0)
        self._places: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._length = 0

    def begin(self, slots: Sequence[int], positions: Tensor) -> None:
        """Say which rows the next pass holds.

        Args:
            slots: of each row, ascending.
            positions: (rows, tokens) of the tokens of the pass.
        """
        index = torch.tensor(slots, device=positions.device)
        is_range = slots[-1] - slots[0] + 1 == len(slots)
        self._rows = slice(slots[0], slots[-1] + 1) if is_range else index
        self._places = index.unsqueeze(1), positions
        self._length = int(positions.max()) + 1

    @property
    def length(self) -> int:
        """Places of each slot that the pass reads: the key/value length of its masks."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(buffer.nbytes for layer in self._layers.values() for buffer in layer)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (rows, heads, tokens, size) of the pass.

        Returns: keys and values of its rows from their first token on, (rows, heads, length, size).
        """
        layer = self._layers.setdefault(layer_idx, [keys.new_empty(0), values.new_empty(0)])
        for place, new in enumerate((keys, values)):
            layer[place] = self._grown(layer[place], new)
            slots, positions = self._places
            layer[place][slots, :, positions] = new.transpose(1, 2)
        return layer[0][self._rows, :, : self._length], layer[1][self._rows, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of the pass; models ask only where no positions are given."""
        return 0

    def _grown(self, buffer: Tensor, new: Tensor) -> Tensor:
        """The buffer, or a copy with room for the pass."""
        places = buffer.shape[2] if buffer.dim() == 4 else 0
        if places >= self._length:
            return buffer
        places = max(self._length, 2 * places, _FIRST_TOKENS)
        # Zeros: what is masked is multiplied by 0, and must be finite.
        larger = new.new_zeros(self.slots, new.shape[1], places, new.shape[3])
        if buffer.dim() == 4:
            larger[:, :, : buffer.shape[2]] = buffer
        return larger
