"""One forward pass of a decoder over rows of different lengths, and the check that it is right.

A pass holds, for each of some rows, the next tokens of this row: one while it generates, a chunk
of its prompt before. Shorter chunks are padded behind their end, where no real token looks.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftkit.errors import AttachError
from graftkit.models.text import context_length, vocabulary_size
from graftkit.serve.cache import SlotCache

_KINDS = {"full_attention", "sliding_attention"}
# Rotary embeddings that depend on the longest row of a batch: rows would change each other.
_SHARED_ROPE = ("dynamic", "longrope")
_TRIAL_TOKENS = 80  # longest row of the trial
_TRIAL_ERROR = {True: 1e-3, False: 0.1}  # RMS, relative to the logits' spread; True for float32


@dataclass(frozen=True)
class PassRow:
    """The part of a pass that belongs to one row.

    Attributes:
        start: position of the first token. tokens: at least one.
    """

    slot: int
    start: int
    tokens: Sequence[int]


class Decoder:
    """A model with a slot cache.

    Raises: AttachError for a model whose layers keep another state than keys and values, or whose
        answers with slots are not those that it gives alone.
    """

    def __init__(self, model: Any, slots: int):
        self.model = model
        self.cache = SlotCache(slots)
        self.context = context_length(model)
        self._windows = _windows(model)
        arguments = inspect.signature(model.forward).parameters
        if "position_ids" not in arguments or "logits_to_keep" not in arguments:
            raise AttachError(
                f"{type(model).__name__} is no decoder that takes positions; it cannot be served"
            )
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"
        self._check()

    @torch.no_grad()
    def run(self, rows: Sequence[PassRow]) -> Tensor:
        """Run a pass. Rows in the order of their slots.

        Returns: logits of the last token of each row, (rows, vocabulary), float32.
        """
        width = max(len(row.tokens) for row in rows)
        device = self.model.device
        ids = torch.tensor([[*r.tokens, *[0] * (width - len(r.tokens))] for r in rows]).to(device)
        starts = torch.tensor([row.start for row in rows], device=device)
        positions = starts.unsqueeze(1) + torch.arange(width, device=device)
        self.cache.begin([row.slot for row in rows], positions)
        lasts = [len(row.tokens) - 1 for row in rows]
        kept = sorted(set(lasts))
        # Positions behind the context belong to padding; a table of positions has no row for them.
        limit = self.context or int(positions.max()) + 1
        output = self.model(
            input_ids=ids,
            attention_mask=self._masks(positions),
            position_ids=positions.clamp(max=limit - 1),
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=device),
            **{self._cache_argument: self.cache},
        )
        places = torch.tensor([kept.index(last) for last in lasts], device=device)
        logits: Tensor = output.logits[torch.arange(len(rows), device=device), places]
        return logits.float()

    def _masks(self, positions: Tensor) -> Tensor | dict[str, Tensor]:
        masks = {kind: self._mask(positions, window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """Added to attention scores: (rows, 1, tokens, length), 0 or the lowest number."""
        keys = torch.arange(self.cache.length, device=positions.device)
        distance = positions.unsqueeze(-1) - keys
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        dtype = self.model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)

    @torch.no_grad()
    def _check(self) -> None:
        """Continue random rows in chunks, together, and compare with the model alone."""
        windows = [window for window in self._windows.values() if window is not None]
        longest = min(max([12, *(window + 4 for window in windows)]), _TRIAL_TOKENS)
        longest = min(longest, self.context or longest)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary_size(self.model), (3, longest), generator=generator)
        rows = rows[: min(3, self.cache.slots)]
        lengths = [longest, longest // 2, longest - 1][: len(rows)]
        try:
            output = self._run_in_chunks(rows.tolist(), lengths)
            expected = torch.stack(
                [
                    self.model(row[:length].unsqueeze(0).to(self.model.device)).logits[0, -1]
                    for row, length in zip(rows, lengths, strict=True)
                ]
            ).float()
        except AttachError:
            raise
        except Exception as error:  # foreign code, on a cache that it may not be made for
            reason = " ".join(str(error).split())[:160]
            raise AttachError(
                f"{type(self.model).__name__} does not run on a cache of slots ({reason}); it "
                "cannot be served"
            ) from error
        difference = (output - expected).square().mean().sqrt()
        allowed = _TRIAL_ERROR[self.model.dtype == torch.float32] * expected.std()
        if not difference <= allowed + 1e-6:
            raise AttachError(
                f"{type(self.model).__name__} answers otherwise on a cache of slots than alone; "
                "it cannot be served"
            )

    def _run_in_chunks(self, rows: list[list[int]], lengths: Sequence[int]) -> Tensor:
        """Chunks of 5 tokens, then one token at a time for the last two."""
        logits: dict[int, Tensor] = {}
        done = [0] * len(rows)
        while any(place < length for place, length in zip(done, lengths, strict=True)):
            active = [row for row in range(len(rows)) if done[row] < lengths[row]]
            sizes = {row: max(1, min(5, lengths[row] - 2 - done[row])) for row in active}
            passed = [
                PassRow(row, done[row], rows[row][done[row] : done[row] + sizes[row]])
                for row in active
            ]
            output = self.run(passed)
            for place, row in enumerate(active):
                done[row] += sizes[row]
                logits[row] = output[place]
        return torch.stack([logits[row] for row in range(len(rows))])


def _windows(model: Any) -> dict[str, int | None]:
    """The window of each kind of layer, None for full attention.

    Raises: AttachError for a kind of layer, or of positions, that cannot be served.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or not model.can_generate():
        raise AttachError(f"{type(model).__name__} is no decoder; it cannot be served")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") in _SHARED_ROPE:
            raise AttachError(
                f"{type(model).__name__} has rotary embeddings of type {rope['rope_type']}, which "
                "depend on the longest row of a batch; it cannot be served"
            )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    if kinds - _KINDS:
        raise AttachError(
            f"{type(model).__name__} has layers of {', '.join(sorted(kinds - _KINDS))}; served are "
            "decoders of full and sliding-window attention"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
