"""Commands as a user gives them, in this process."""

import sys

from graftkit.__main__ import main


def run(*arguments: object) -> int:
    """Exit code of one command in this process."""
    before = sys.argv
    sys.argv = ["graftkit", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
