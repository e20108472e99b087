"""How long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much it has in all."""

StepProgress = Callable[[int, int], None]
"""Called with how much of one step is done, and how much it has in all."""


def no_progress(step: str, done: int, total: int) -> None:
    """A `Progress` that reports to nobody."""
