"""Calibrated packs end to end: sensitivities weigh, training moves codes within the budget."""

import json

import pytest
import torch
from tiny_models import make_pair, save_tokenizer

from graftkit.checkpoint import Checkpoint
from graftkit.compress.coded import load_factors
from graftkit.errors import ConfigError
from graftkit.pack import pack_delta
from graftkit.packing import pairs
from graftkit.skillpack import SkillPack

LETTERS = "abcdefghij"
OPTIONS = {"budget": "90%", "workers": 1, "train_steps": 40, "servable": True}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folders(request, tmp_path_factory):
    """Target, tuned and rows."""
    folder = tmp_path_factory.mktemp(request.param)
    target, tuned = make_pair(folder, request.param, torch.bfloat16)
    rows = folder / "rows.jsonl"
    texts = [{"prompt": f"{a}{b}", "completion": f" {b}{a}{b}"} for a in LETTERS for b in LETTERS]
    rows.write_text("\n".join(json.dumps(text) for text in texts))
    for path in (target, tuned):
        save_tokenizer(path)
    return target, tuned, rows


@pytest.fixture(autouse=True, scope="module")
def _lossy_from_tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SMALLEST_LOSSY", 256)
        yield


def packed(folders, **options) -> SkillPack:
    target, tuned, rows = folders
    return pack_delta(target, tuned, calibration=rows, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def trained(folders, _lossy_from_tiny) -> SkillPack:
    return packed(folders)


def factored(pack):
    """Decoded factors of every low-rank matrix, by name."""
    factors = {}
    for record in pack.manifest.tensors:
        if record.codec == "lowrank":
            rows, columns = record.shape
            shape = (columns, rows) if record.layout == "transposed" else (rows, columns)
            factors[record.name] = load_factors(pack.payload(record.name), shape)
    return factors


@pytest.mark.slow
def test_training_changes_codes_and_keeps_to_the_budget(folders, trained):
    coded = packed(folders, train_steps=0)
    assert max(coded.pack_bytes, trained.pack_bytes) <= trained.manifest.budget_bytes
    before, after = factored(coded), factored(trained)
    assert [r.codec for r in coded.manifest.tensors] == [r.codec for r in trained.manifest.tensors]
    moved = [n for n in after if not torch.equal(before[n].component, after[n].component)]
    assert moved


@pytest.mark.slow
def test_the_error_quoted_is_that_of_the_trained_delta(folders, trained):
    before, after = (Checkpoint.open(path) for path in folders[:2])
    for name in factored(trained):
        delta = after.read(name).float() - before.read(name).float()
        lost = (trained.delta(name, before.read(name)) - delta).norm() / delta.norm()
        assert float(lost) == pytest.approx(trained.record(name).error, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["weighing", "training codes"])
def test_an_interrupted_training_goes_on_and_gives_the_same_bytes(folders, trained, step, tmp_path):
    def interrupt(at, done, total):
        if at == step and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(folders, work_dir=tmp_path / "work", progress=interrupt)
    resumed = packed(folders, work_dir=tmp_path / "work", workers=2)
    trained.save(tmp_path / "a")
    resumed.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_servable_is_for_auto_only(folders):
    with pytest.raises(ConfigError, match="servable"):
        packed(folders, recipe="graftllm", servable=True)


@pytest.mark.slow
def test_a_servable_pack_adds_a_bounded_share_of_multiplications(trained):
    assert {r.codec for r in trained.manifest.tensors} <= {"zero", "exact", "lowrank"}
    for factors in factored(trained).values():
        (rows, rank), columns = factors.left.shape, factors.right.shape[1]
        assert rank * (rows + columns) <= 0.25 * rows * columns


def test_negative_steps_are_refused(folders):
    with pytest.raises(ConfigError, match="train_steps"):
        packed(folders, train_steps=-1)
