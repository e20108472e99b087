import functools

import pytest
import torch
from attachment.packs import exact_pack
from tiny_models import make_pair


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """Target folder, tuned folder and exact pack of an architecture, made once; never written."""

    @functools.cache
    def pair(architecture, dtype=torch.float32):
        folder = tmp_path_factory.mktemp(architecture)
        target, tuned = make_pair(folder, architecture, dtype)
        return target, tuned, exact_pack(target, tuned)

    return pair
