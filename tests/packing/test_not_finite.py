"""Weights that are NaN or infinite in both states alike are unchanged; any others are refused."""

import math
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint, tensor_digest
from graftkit.errors import CheckpointError
from graftkit.fuse import merge_packs
from graftkit.models import load_model
from graftkit.pack import pack_delta
from graftkit.packing import pairs

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def put(folder: Path, name: str, value: float, place: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][place] = value  # type: ignore[index]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("recipe", ["lossless", "auto"])
def test_a_row_that_is_not_finite_in_both_states_travels_as_it_is(
    recipe: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "SMALLEST_LOSSY", 256)
    target, tuned = make_pair(tmp_path, "llama")
    for folder in (target, tuned):
        put(folder, EMBEDDING, value, 90)
        put(folder, UP, value, (3, 4))
    pack = pack_delta(target, tuned, recipe=recipe, budget=None if recipe == "lossless" else "90%")
    pack.save(tmp_path / "x.skillpack")
    run("verify", tmp_path / "x.skillpack", "--target", target, "--full")
    merge_packs(target, pack, tmp_path / "merged")
    merge_packs(target, pack, tmp_path / "half", weights=[0.5])
    before, after, merged, half = (
        Checkpoint.open(tmp_path / name) for name in ("target", "tuned", "merged", "half")
    )
    for name, place in ((EMBEDDING, 90), (UP, (3, 4))):
        for result in (merged, half):
            assert tensor_digest(result.read(name)[place]) == tensor_digest(
                before.read(name)[place]
            )
        places = before.read(name).isfinite()
        assert torch.equal(places, merged.read(name).isfinite())
        assert torch.equal(places, half.read(name).isfinite())
        delta = (after.read(name).float() - before.read(name).float())[places]
        error = (merged.read(name).float() - after.read(name).float())[places]
        assert error.norm() <= (0 if recipe == "lossless" else 0.5 * delta.norm())
        assert pack.delta(name, before.read(name)).isfinite().all()


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_such_a_target_is_recognized_live_in_any_wider_dtype(tmp_path: Path, dtype: object) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    for folder in (target, tuned):
        put(folder, EMBEDDING, math.nan, 90)
    pack = pack_delta(target, tuned, recipe="lossless")
    live = load_model(target, dtype)  # type: ignore[arg-type]
    with attached(live, pack):
        expected = load_model(tuned, dtype).state_dict()  # type: ignore[arg-type]
        for name, value in live.state_dict().items():
            assert torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7))


@pytest.mark.parametrize("holder", ["target", "tuned"])
def test_a_weight_that_is_not_finite_in_one_state_only_is_refused(
    tmp_path: Path, holder: str
) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    put(tmp_path / holder, UP, math.nan, (3, 4))
    with pytest.raises(CheckpointError, match=rf"{holder}: {UP} holds NaN"):
        pack_delta(target, tuned, recipe="lossless")


def test_infinities_of_two_signs_are_not_alike(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    put(target, UP, math.inf, (3, 4))
    put(tuned, UP, -math.inf, (3, 4))
    with pytest.raises(CheckpointError, match="that the other model has not"):
        pack_delta(target, tuned, recipe="lossless")
