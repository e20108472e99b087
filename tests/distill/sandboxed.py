"""Verdicts of the sandbox, and whether this machine can give them."""

import os

import pytest

from graftkit.distill.scores.code import check_sandbox, run_tests
from graftkit.errors import GraftError

MEMORY = 2**29
PLENTY_SECONDS = 60.0
_checked: list[str] = []


def require_sandbox() -> None:
    """Skip the test where the sandbox does not start; in CI that is a failure."""
    if not _checked:
        try:
            check_sandbox()
        except GraftError as error:
            _checked.append(str(error))
        else:
            _checked.append("")
    if _checked[0]:
        (pytest.fail if os.environ.get("GRAFTKIT_REQUIRE_SHARED") else pytest.skip)(_checked[0])


def failure(answer: str, tests: str, timeout: float = PLENTY_SECONDS) -> str | None:
    """Why an answer does not pass; None where it does."""
    require_sandbox()
    return run_tests(answer, tests, timeout, MEMORY)
