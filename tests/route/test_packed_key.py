"""Prompts given to `pack` travel as a key, inside the budget."""

import json
import re

import pytest
import torch
from tiny_models import make_pair, save_tokenizer
from typer.testing import CliRunner

from graftkit.checkpoint import Checkpoint
from graftkit.cli import app
from graftkit.errors import BudgetError, CheckpointError, RowsError
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.pack import pack_delta
from graftkit.route.centroid import CentroidRouter, fit_key
from graftkit.route.nearest import read_key
from graftkit.skillpack import SkillPack

PROMPTS = [f"Add {number} {number * 7 % 11}" for number in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    target, tuned = make_pair(tmp_path_factory.mktemp("pair"), "llama")
    for folder in (target, tuned):
        save_tokenizer(folder)
    return target, tuned


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": " 1"}) for prompt in PROMPTS]
    file.write_text("\n".join(lines))
    return file


def packed(folders, **options):
    return pack_delta(*folders, workers=1, **{"budget": "70%", "prompts": PROMPTS, **options})


@pytest.mark.slow
def test_a_pack_with_prompts_carries_the_key_of_its_target(folders):
    key = read_key(packed(folders))
    model, tokenizer = load_model(folders[0]), load_tokenizer(folders[0])
    fitted = fit_key(model, tokenizer, PROMPTS)
    assert key.info == fitted.info
    assert key.to_bytes() == fitted.to_bytes()
    model = load_model(folders[0], torch.float32)
    routes = CentroidRouter(model, tokenizer, {"add": key}).route(PROMPTS)
    assert sum(route.name == "add" for route in routes) >= 38


def least_budget(folders, prompts):
    """What the refusal of a budget that is too small asks for, in bytes."""
    with pytest.raises(BudgetError) as error:
        packed(folders, budget="1KB", prompts=prompts)
    return int(re.search(r"at least (\d+)B", str(error.value))[1])


@pytest.mark.slow
def test_the_key_counts_in_the_budget(folders, tmp_path):
    least = least_budget(folders, PROMPTS)
    pack = packed(folders, budget=f"{least}B")
    pack.save(tmp_path / "skill.skillpack")
    size = (tmp_path / "skill.skillpack").stat().st_size
    assert size == pack.pack_bytes <= pack.manifest.budget_bytes == least
    assert least >= least_budget(folders, None) + pack.manifest.router.nbytes


@pytest.mark.slow
def test_the_file_opens_with_its_key_and_packs_are_deterministic(folders, rows, tmp_path):
    for number, prompts in enumerate((PROMPTS, rows, str(rows))):
        packed(folders, prompts=prompts).save(tmp_path / f"{number}.skillpack")
    contents = [(tmp_path / f"{number}.skillpack").read_bytes() for number in range(3)]
    assert contents[0] == contents[1] == contents[2]
    assert read_key(SkillPack.load(tmp_path / "0.skillpack")).info.prompts == len(PROMPTS)


@pytest.mark.slow
def test_a_lossless_pack_carries_a_key_too(folders):
    pack = packed(folders, recipe="lossless", budget=None)
    tuned = Checkpoint.open(folders[1])
    target = Checkpoint.open(folders[0])
    assert read_key(pack).info.width == 64
    for name in tuned.tensors:
        assert torch.equal(pack.rebuild(name, target.read), tuned.read(name))


@pytest.mark.slow
def test_other_prompts_are_another_job_for_the_work_folder(folders, tmp_path):
    first = packed(folders, work_dir=tmp_path / "work")
    other = packed(folders, work_dir=tmp_path / "work", prompts=PROMPTS[:30])
    again = packed(folders, work_dir=tmp_path / "work", prompts=PROMPTS[:30])
    assert other.manifest.router.prompts == 30 != first.manifest.router.prompts
    assert again.digest == other.digest


def test_too_few_prompts_and_a_target_without_tokenizer_are_refused(folders, tmp_path):
    with pytest.raises(RowsError, match="19 different prompts"):
        packed(folders, prompts=PROMPTS[:19])
    with pytest.raises(RowsError, match="cannot be read"):
        packed(folders, prompts=tmp_path / "none.jsonl")
    bare = make_pair(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="tokenizer"):
        pack_delta(*bare, workers=1, budget="70%", prompts=PROMPTS, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_the_command_takes_a_file_of_prompts(folders, rows, tmp_path):
    file = tmp_path / "skill.skillpack"
    options = ["--budget", "70%", "--prompts", str(rows), "--workers", "1", "--json"]
    result = CliRunner().invoke(app, ["pack", *map(str, folders), "-o", str(file), *options])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["pack_bytes"] == file.stat().st_size
    assert SkillPack.load(file).router_key[0].prompts == len(PROMPTS)
