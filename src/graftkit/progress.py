"""Callbacks through which long work reports its progress; `cli.show` draws it as a bar."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the units of it that are done, and the units in all."""

StepProgress = Callable[[int, int], None]
"""Called with the units done and the units in all of one step, which the caller names."""


def silent(*progress: object) -> None:
    """A `Progress` or `StepProgress` that reports nothing: the default."""
