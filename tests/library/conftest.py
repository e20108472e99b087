"""A tiny target, packs of it with router keys, and a pack of another target; made once."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build, lossless_pack, perturb, save_tokenizer

from graftkit.checkpoint import Checkpoint
from graftkit.library import Library
from graftkit.models.loading import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.pack import pack_delta
from graftkit.route.centroid import fit_key

NAMES = ("digits", "upper", "lower")
_LETTERS = {"digits": "0123456789", "upper": "ABCDEFGHIJ", "lower": "klmnopqrst"}


def prompts_of(name: str, count: int = 30, seed: int = 0) -> list[str]:
    """Prompts that a tiny model can tell from the other packs': they share no character."""
    generator = torch.Generator().manual_seed(1000 * seed + NAMES.index(name))
    letters = _LETTERS[name]
    return [
        "".join(letters[place] for place in torch.randint(10, (12,), generator=generator))
        for _ in range(count)
    ]


def _tune(folder: Path, seed: int) -> Path:
    model = build("llama", torch.float32)
    perturb(model, seed=seed, scale=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """target, packs by name (with keys), plain (a pack without a key), foreign (of another)."""
    folder = tmp_path_factory.mktemp("library")
    target = folder / "target"
    build("llama", torch.float32).save_pretrained(target)
    save_tokenizer(target)
    checkpoint = Checkpoint.open(target)
    model, tokenizer = load_model(checkpoint), usable_tokenizer(checkpoint)
    packs = {}
    for seed, name in enumerate(NAMES, start=1):
        pack = pack_delta(target, _tune(folder / name, seed), recipe="lossless", workers=1)
        packs[name] = folder / f"{name}.skillpack"
        fit_key(model, tokenizer, prompts_of(name)).into(pack).save(packs[name])
    plain = folder / "plain.skillpack"
    pack_delta(target, _tune(folder / "plain", 9), recipe="lossless", workers=1).save(plain)
    other, foreign = folder / "other", folder / "foreign.skillpack"
    build("llama", torch.float32, seed=7).save_pretrained(other)
    lossless_pack(other, folder / "digits").save(foreign)
    return SimpleNamespace(target=target, packs=packs, plain=plain, foreign=foreign)


@pytest.fixture(scope="session")
def full(world, tmp_path_factory) -> Path:
    """The folder of a library of all packs; never written."""
    folder = tmp_path_factory.mktemp("full") / "library"
    library = Library.init(folder, world.target)
    for name, file in world.packs.items():
        library.add(file, name)
    return folder


@pytest.fixture
def folder(full, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(full, tmp_path / "library"))


@pytest.fixture
def library(folder) -> Library:
    """A library of all packs."""
    return Library.open(folder)
