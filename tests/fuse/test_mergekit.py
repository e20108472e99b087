"""mergekit's own results on the same models (tools/make_mergekit_golden.py wrote them)."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import lossless_pack

from graftkit.fuse import merge_packs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/mergekit"
CASES = json.loads((GOLDEN / "cases.json").read_text())
OUR_NAMES = {"lambda": "scaling", "select_topk": "select"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The golden target as a checkpoint, and lossless packs of its tuned copies."""
    folders = []
    for name in ("target", "tuned-0", "tuned-1", "tuned-2"):
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(GOLDEN / "config.json", folder)
        shutil.copy(GOLDEN / f"{name}.safetensors", folder / "model.safetensors")
        folders.append(folder)
    target, *tuned = folders
    return target, [lossless_pack(target, path) for path in tuned]


def ours(case, models, folder):
    """What graftkit makes of a case of mergekit's."""
    chosen = CASES[case]
    settings = {OUR_NAMES.get(name, name): value for name, value in chosen["settings"].items()}
    weights = chosen["weights"] if chosen["method"] != "sce" else None
    target, packs = models
    merge_packs(target, packs, folder, weights, None, chosen["method"], settings)
    return load_file(folder / "model.safetensors")


def difference(a, b):
    """Largest distance of two states, relative to the largest change from the target."""
    target = load_file(GOLDEN / "target.safetensors")
    change = max(float((b[name] - target[name]).abs().max()) for name in target)
    return max(float((a[name] - b[name]).abs().max()) for name in target) / change


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("sce")])
def test_linear_task_arithmetic_and_ties_are_mergekits(case, models, tmp_path):
    merged = ours(case, models, tmp_path / "m")
    assert difference(merged, load_file(GOLDEN / f"{case}.safetensors")) < 1e-5


def test_sce_is_mergekits_where_everything_is_selected(models, tmp_path):
    merged = ours("sce_all", models, tmp_path / "m")
    assert difference(merged, load_file(GOLDEN / "sce_all.safetensors")) < 1e-5


def test_where_a_tenth_is_selected_mergekit_merges_that_tenth_and_sce_everything(models, tmp_path):
    """FuseChat's own code takes the selection for the weights only, mergekit for the deltas."""
    merged, theirs = ours("sce", models, tmp_path / "m"), load_file(GOLDEN / "sce.safetensors")
    target = load_file(GOLDEN / "target.safetensors")
    changed = [
        sum(int((state[name] != target[name]).sum()) for name in target)
        for state in (merged, theirs)
    ]
    count = sum(weight.numel() for weight in target.values())
    assert changed[0] > 0.99 * count
    assert changed[1] <= 0.1 * count
    assert difference(merged, theirs) > 0.1


def test_the_golden_files_are_small_and_never_made_anew(capsys):
    assert all(file.stat().st_size < 20_000 for file in GOLDEN.iterdir())
    specification = importlib.util.spec_from_file_location(
        "make_mergekit_golden", ROOT / "tools/make_mergekit_golden.py"
    )
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    before = {file: file.read_bytes() for file in GOLDEN.iterdir()}
    assert tool.main(Path("mergekit-yaml")) == 1
    assert "never made anew" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in GOLDEN.iterdir()} == before


def test_the_golden_deltas_have_no_equal_entries(models):
    """Of equal entries mergekit and graftkit may trim different ones."""
    target, packs = models
    state = load_file(target / "model.safetensors")
    for name, before in state.items():
        magnitude = packs[0].delta(name, before).abs()
        assert torch.unique(magnitude).numel() == magnitude.numel()
