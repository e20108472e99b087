"""Code training on disk from time to time, so that a killed packing goes on in the middle of it."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftkit.packing.job import WorkFolder

SAVE_SECONDS = 120.0  # of work that a killed run may lose
_FILE = "training.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Step, price, trained values and Adam's moments, each an array of the work folder."""

    def __init__(self, work: WorkFolder, optimizer: torch.optim.Adam):
        self.work, self.optimizer = work, optimizer
        self.saved = time.monotonic()

    def load(self) -> tuple[int, float] | None:
        """Put values and moments back. Returns: steps done and the price's factor, or None."""
        known: dict[str, Any] | None = self.work.read_json(_FILE)
        if known is None:
            return None
        for index, value in enumerate(self._values):
            parts = [self._read(known["step"], index, name) for name in ("value", *_MOMENTS)]
            with torch.no_grad():
                value.copy_(parts[0])
            moments = dict(zip(_MOMENTS, parts[1:], strict=True))
            self.optimizer.state[value] = {"step": torch.tensor(float(known["step"])), **moments}
        return known["step"], known["factor"]

    def save(self, step: int, factor: float) -> None:
        """Keep what `step` steps led to, if it is time; then forget what was kept before.

        Raises: OutputError.
        """
        if time.monotonic() - self.saved < SAVE_SECONDS:
            return
        before: dict[str, Any] | None = self.work.read_json(_FILE)
        for index, value in enumerate(self._values):
            state = self.optimizer.state[value]
            for name, part in (("value", value), *((n, state[n]) for n in _MOMENTS)):
                self.work.write_array(_name(step, index, name), part.detach().numpy())
        self.work.write_json(_FILE, {"step": step, "factor": factor})
        if before is not None:
            self._forget(before["step"])
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Forget everything."""
        known = self.work.read_json(_FILE)
        self.work.remove_file(_FILE)
        if known is not None:
            self._forget(known["step"])

    @property
    def _values(self) -> Sequence[Tensor]:
        return [value for group in self.optimizer.param_groups for value in group["params"]]

    def _read(self, step: int, index: int, name: str) -> Tensor:
        array = self.work.read_array(_name(step, index, name))
        assert array is not None  # the step is named last, when its arrays are there
        return torch.from_numpy(array)

    def _forget(self, step: int) -> None:
        for index in range(len(self._values)):
            for name in ("value", *_MOMENTS):
                self.work.remove_file(_name(step, index, name))


def _name(step: int, index: int, name: str) -> str:
    return f"training-{step}-{index}-{name}.npy"
