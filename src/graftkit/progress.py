"""How long work tells its caller where it stands; the command line draws it (`cli.show`)."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the units of it that are done, and the units in all."""

StepProgress = Callable[[int, int], None]
"""Called with the units done and the units in all of one step, which the caller names."""


def silent(*progress: object) -> None:
    """A `Progress` or `StepProgress` that reports nothing: the default."""
