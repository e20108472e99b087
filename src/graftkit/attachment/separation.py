"""May rows of one batch use different packs on this model?

Only where every module with a pack sees the rows in order, each as often as the others, and where
no state goes from one row's pass to another's. Class names do not tell: experts repeat tokens
expert by expert, windows are cut out of images, recurrent layers write into tensors of their
caller. So a short batch is tried: rows of different packs together have to answer as each does
alone, and every module with a pack has to read the same for them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftkit.attachment.mixtures import Choice, Rows, choose_rows
from graftkit.attachment.modules import ModulePath
from graftkit.attachment.probe import ROWS, Outputs, Probe, Unrunnable, distances
from graftkit.attachment.routing import Routing
from graftkit.errors import AttachError

# Weights of a pack to try, until its effect stands out from rounding.
_WEIGHTS = (1.0, 16.0, 256.0)
# The least effect, as a share of what the target answers, and the largest error as a share of the
# effect: by whether the model computes in float32.
_LEAST_EFFECT = {True: 1e-3, False: 0.2}
_LARGEST_ERROR = {True: 0.02, False: 0.5}
# How far a row's inputs may differ between the batch and the row alone, relative to their RMS:
# inside a module that runs again they are the target's at first. Another row's differ by over 1.
_LARGEST_DRIFT = 0.3

Reads = dict[str, list[Tensor | None]]


class RowSeparation:
    """What was tried on one model with packs beside it.

    Attributes:
        keeps_rows: by the name of a module, whether it sees the rows in order; modules that no
            probe reached are not there.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing):
        self._model = model
        self._routing = routing
        self._exact = model.dtype in (torch.float32, torch.float64)
        self._tried: set[str] = set()
        self.keeps_rows: dict[str, bool] = {}

    def check(self, paths: Mapping[str, ModulePath], rows: Rows) -> None:
        """Try what was not tried before of the modules that the packs of these rows change.

        Raises: AttachError where the rows would not answer as each does alone, or where that
            cannot be tried.
        """
        used = {name: path for name, path in paths.items() if path.serves(rows.packs)}
        while new := used.keys() - self._tried:
            pack, names = _best_pack(rows.packs, used, new)
            try:
                with self._routing.lock:
                    self._try(pack)
            except Unrunnable as error:
                raise AttachError(
                    f"it is unknown whether {type(self._model).__name__} keeps the rows of a batch "
                    f"apart, for {error}; run the rows of each pack in a batch of their own"
                ) from error
            self._tried |= names
        for name in used:
            used[name].keeps_rows = self.keeps_rows.get(name)
            if used[name].keeps_rows is False:
                used[name].check()

    def _try(self, pack: int) -> None:
        """Rows with and without a pack, together and alone. Raises: AttachError, Unrunnable."""
        probe = Probe(self._model)
        bare = [self._run(probe, [None], row) for row in range(ROWS)]
        weight, first = self._telling_weight(probe, pack, bare[0][0])
        choices: list[Choice] = [{pack: weight}, None, {pack: -weight / 2}]
        alone = [first, bare[1], self._run(probe, choices[2:], 2)]
        together, reads = self._run(probe, choices, None)
        for name in reads:
            apart = [calls.get(name, []) for _, calls in alone]
            self.keeps_rows[name] = _keeps_rows(reads[name], apart)
        effects = [_largest(distances(bare[r][0], alone[r][0]), self._exact) for r in (0, 2)]
        for row, (outputs, _) in enumerate(alone):
            own = [None if tensor is None else tensor[row : row + 1] for tensor in together]
            error = _largest(distances(own, outputs), self._exact)
            if not error <= _LARGEST_ERROR[self._exact] * max(effects) + 1e-6:
                raise AttachError(
                    f"{type(self._model).__name__} does not keep the rows of a batch apart: row "
                    f"{row} of a tried batch answered otherwise than alone; run the rows of each "
                    "pack in a batch of their own"
                )

    def _telling_weight(
        self, probe: Probe, pack: int, target: Outputs
    ) -> tuple[float, tuple[Outputs, Reads]]:
        """A weight at which a pack changes the answers to row 0 by more than rounding does, and
        that row with it."""
        values = [tensor.float().flatten() for tensor in target if tensor is not None]
        scale = float(torch.cat(values).std()) if values else 0.0
        best = _WEIGHTS[0], self._run(probe, [{pack: _WEIGHTS[0]}], 0)
        for weight in _WEIGHTS:
            run = best[1] if weight == best[0] else self._run(probe, [{pack: weight}], 0)
            effect = _largest(distances(run[0], target), self._exact)
            if not effect < float("inf"):
                break
            best = weight, run
            if effect >= _LEAST_EFFECT[self._exact] * scale:
                break
        return best

    def _run(
        self, probe: Probe, choices: Sequence[Choice], row: int | None
    ) -> tuple[Outputs, Reads]:
        """What the model answers, and what its modules with packs read."""
        packs = {pack for choice in choices if isinstance(choice, Mapping) for pack in choice}
        rows = choose_rows(packs, choices)
        reads: Reads = {}

        def record(name: str, inputs: Tensor | None) -> None:
            # A module that runs again for some of the rows is not read again.
            if self._routing.rows is rows:
                reads.setdefault(name, []).append(None if inputs is None else inputs.clone())

        before, self._routing.recorder = self._routing.recorder, record
        try:
            with self._routing.using(rows):
                return probe.run(row), reads
        finally:
            self._routing.recorder = before


def _best_pack(
    packs: Iterable[int], paths: Mapping[str, ModulePath], new: set[str]
) -> tuple[int, set[str]]:
    """The pack that changes most of some modules, and the modules that it changes."""
    names = {pack: {name for name, path in paths.items() if path.serves([pack])} for pack in packs}
    best = max(names, key=lambda pack: (len(names[pack] & new), -pack))
    return best, names[best]


def _keeps_rows(
    together: Sequence[Tensor | None], alone: Sequence[Sequence[Tensor | None]]
) -> bool:
    """Whether every call reads of each row what the row alone reads, in order."""
    if any(len(calls) != len(together) for calls in alone):
        return False
    for call, batch in enumerate(together):
        for row, calls in enumerate(alone):
            own = calls[call]
            if batch is None or own is None:
                return False
            # An input of one entry, such as positions, stands for all rows.
            part = batch if batch.shape[0] == 1 else _part(batch, row, own.shape[0])
            if part.shape != own.shape or not _is_near(part, own):
                return False
    return True


def _part(batch: Tensor, row: int, entries: int) -> Tensor:
    fits = batch.shape[0] == ROWS * entries
    return batch[row * entries : (row + 1) * entries] if fits else batch[:0]


def _is_near(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = other.float().square().mean().sqrt()
    difference = (one.float() - other.float()).square().mean(-1).sqrt().flatten()
    return float(difference.median()) <= _LARGEST_DRIFT * float(scale) + 1e-6


def _largest(parts: Sequence[Tensor], exact: bool) -> float:
    """The largest distance; in half precision, where single tokens take other experts, the median.

    NaN where there is nothing to compare.
    """
    if not parts:
        return float("nan")
    values = torch.cat(list(parts))
    return float(values.max() if exact else values.median())
