"""Fixtures for every test. The nursery is found by one setting, GRAFTKIT_SHARED."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# One thread per test process: results and timings do not depend on what else the machine does.
torch.set_num_threads(1)
# Timing is no test: a machine that does other work too is slow, and not wrong.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile("quick")  # `make test-slow` passes --hypothesis-profile thorough
# Tiny targets have prompts of random letters: their keys are of the target's states, with or
# without the sentence encoder's package. Tests of the encoder choose their own.
os.environ["GRAFTKIT_ENCODER"] = "none"


SLOW_FIXTURES = {"demo", "stubbed", "run_frontier", "quick_run", "records"}
"""What takes half a minute to make: the tests that look at it are slow ones."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    # The longest tests first, so that at the end no worker waits for another.
    items.sort(key=lambda item: -_time_limit(item))


def _time_limit(item: pytest.Item) -> float:
    """Seconds that a test allows itself, 0 where it says nothing."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the nursery and data; tests that need it skip in a clone that lacks it."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("GRAFTKIT_SHARED", default))
    if not (folder / "nursery").is_dir():
        if os.environ.get("GRAFTKIT_REQUIRE_SHARED"):
            pytest.fail(f"GRAFTKIT_SHARED={folder} holds no nursery")
        pytest.skip(f"{folder} holds no nursery; set GRAFTKIT_SHARED to run this test")
    return folder
