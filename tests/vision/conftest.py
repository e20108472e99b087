"""Fixtures of the vision tests."""

from collections.abc import Iterator
from functools import cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def operators_registered_once() -> Iterator[None]:
    """Torch's exporter parses and registers its library of operators for every export, which takes
    most of the time of a tiny network. Here it does so once: only an export with operators of its
    own changes the registry. If torch moves it, tests only take longer.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib))
        )
        yield
