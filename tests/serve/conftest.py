"""A tiny target and four packs of it, made once."""

import functools
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, _decoder, lossless_pack, perturb, save_tokenizer

WINDOWED = {
    "mistral_windowed": _decoder("Mistral", sliding_window=6),
    "gemma2": _decoder("Gemma2", sliding_window=6, tie_word_embeddings=True),
}
NAMES = ("math", "code", "poem", "chat")


@pytest.fixture(scope="session")
def world_of(tmp_path_factory):
    """target (a folder) and packs by name, of an architecture."""

    @functools.cache
    def world(architecture="llama"):
        folder = tmp_path_factory.mktemp(architecture)
        target = folder / "target"
        _made(architecture).save_pretrained(target)
        save_tokenizer(target)
        packs = {}
        for seed, name in enumerate(NAMES, start=1):
            model = _made(architecture)
            perturb(model, seed=seed, scale=0.05)
            if seed % 2:  # half of the packs leave norms and biases alone
                model.load_state_dict(_vectors(_made(architecture)), strict=False)
            model.save_pretrained(folder / name)
            packs[name] = lossless_pack(target, folder / name)
        return SimpleNamespace(target=target, packs=packs)

    return world


def _made(architecture):
    torch.manual_seed(0)
    model = {**ARCHITECTURES, **WINDOWED}[architecture]().eval()
    perturb(model, seed=0, scale=0.1)
    return model


def _vectors(model):
    return {name: value for name, value in model.state_dict().items() if value.dim() < 2}
