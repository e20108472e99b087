"""Fixtures of the tests of distillation."""

import ssl
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_certificates() -> Iterator[None]:
    """Servers of tests speak plain HTTP; certificates cost each client 40 ms of processor time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
        yield
