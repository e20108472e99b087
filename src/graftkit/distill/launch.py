"""Which of several processes this one is, as `accelerate launch` and `torchrun` say it."""

import os


def processes() -> int:
    """Processes of the launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files."""
    return int(os.environ.get("RANK", "0")) == 0
