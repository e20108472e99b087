"""Commands as a user gives them, in this process."""

import functools
import sys
from unittest.mock import patch

import typer.main

from graftkit.__main__ import main

_command_of = functools.cache(typer.main.get_command)


def run(*arguments: object) -> int:
    """Exit code of one command in this process."""
    before = sys.argv
    sys.argv = ["graftkit", *map(str, arguments)]
    try:
        # The options of all commands are read once, and not for every command: 60 ms each time.
        with patch("typer.main.get_command", _command_of):
            main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
