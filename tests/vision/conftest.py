"""Fixtures of the vision tests."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def operators_parsed_once() -> Iterator[None]:
    """Torch's exporter parses its library of operators for every export, which takes half of the
    time of a tiny network. Here it does so once; if torch moves it, tests only take longer.
    """
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis
    except ImportError:
        yield
        return

    @cache
    def get_torchlib_ops() -> Any:
        return type(onnxscript_apis).__getattr__(onnxscript_apis, "get_torchlib_ops")()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(onnxscript_apis.__dict__, "get_torchlib_ops", get_torchlib_ops)
        yield
