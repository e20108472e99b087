"""The search of weights: on functions whose minimum is known, and on a live target."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import lossless_pack, make_pair, save_tokenizer

from graftkit.errors import CheckpointError, ConfigError, PackMismatchError, RowsError
from graftkit.fuse import merge_packs
from graftkit.fuse.merge import open_merge
from graftkit.fuse.search import MAX_WEIGHT, LiveLoss, minimize, search_weights
from graftkit.models.loading import load_model
from graftkit.rows import Row

ROWS = [Row("ask ", " one two"), Row("what is ", " it"), Row("x", " yes and no")]


@given(
    st.lists(st.floats(0, MAX_WEIGHT), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(0, 1000),
)
def test_a_search_never_leaves_its_box_nor_its_number_of_tries(goal, evaluations, seed):
    tried = []

    def loss(point):
        assert ((point >= 0) & (point <= MAX_WEIGHT)).all()
        tried.append(float(np.square(point - goal).sum()))
        return tried[-1]

    point, least = minimize(loss, np.ones(len(goal)), evaluations, seed)
    assert len(tried) <= evaluations
    assert least == min(tried) == float(np.square(point - goal).sum())


def test_a_search_finds_the_minimum_of_a_tilted_bowl():
    goal, form = np.array([0.3, 1.7, 0.0, 0.9]), np.diag([1, 3, 9, 1]) + 0.5
    point, _ = minimize(lambda p: float((p - goal) @ form @ (p - goal)), np.ones(4), 300, 0)
    assert np.abs(point - goal).max() < 0.05


def test_a_search_is_the_same_for_the_same_seed():
    runs = [minimize(lambda p: float(np.sin(5 * p).sum()), np.ones(3), 50, s) for s in (1, 1, 2)]
    assert np.array_equal(runs[0][0], runs[1][0])
    assert not np.array_equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_loss_of_a_mixture_is_that_of_the_merged_checkpoint(method, skills, tmp_path):
    merge = open_merge(skills.target, skills.lossy, [1, 0.5, 0.25], method, {"scaling": 0.7})
    loss_of = LiveLoss(merge, ROWS)
    before = loss_of.measure()
    loss = loss_of(merge.weights, 0.7)
    output = merge_packs(
        skills.target, skills.lossy, tmp_path / "m", [1, 0.5, 0.25], None, method, {"scaling": 0.7}
    )
    merged = LiveLoss(open_merge(skills.target, skills.lossy, None, method, None), ROWS)
    merged._model.load_state_dict(load_model(output, torch.float32).state_dict())
    assert loss == merged.measure()
    assert loss != before
    assert loss_of([0, 0, 0], 1.0) == before


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.slow
def test_found_weights_are_no_worse_than_the_given_ones_and_repeatable(method, skills):
    options = {"weights": [1, 1, 1], "method": method, "evaluations": 12, "seed": 3}
    steps = []
    result = search_weights(
        skills.target, skills.lossy, ROWS, progress=lambda *step: steps.append(step), **options
    )
    assert result.loss <= result.loss_given
    assert result.evaluations == len(steps) <= 12
    assert len(result.weights) == 3
    assert (result.scaling == 1) == (method == "task_arithmetic")
    merge = open_merge(skills.target, skills.lossy, result.weights, method, None)
    assert LiveLoss(merge, ROWS)(result.weights, result.scaling) == result.loss
    assert search_weights(skills.target, skills.lossy, ROWS, **options) == result


@pytest.mark.slow
def test_a_search_finds_the_pack_that_the_rows_were_made_with(skills, tmp_path):
    """Rows whose completions the first tuned model generates are best answered by its pack."""
    model = load_model(skills.tuned[0], torch.float32)
    merge = open_merge(skills.target, skills.exact, [0, 0, 0], "task_arithmetic", None)
    tokenizer = LiveLoss(merge, ROWS)._tokenizer
    rows = []
    for letter in "abcdefgh":
        ids = torch.tensor([tokenizer.encode(letter)])
        made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        rows.append(Row(letter, tokenizer.decode(made[0, ids.shape[1] :])))
    result = search_weights(skills.target, skills.exact, rows, [0.5] * 3, evaluations=30)
    assert result.loss < result.loss_given
    assert result.loss < result.loss_target
    assert result.weights[0] == max(result.weights)


def test_rows_without_a_completion_are_refused(skills, tmp_path):
    with pytest.raises(RowsError, match="no row has a token"):
        search_weights(skills.target, skills.exact, [])
    # Without an end of text an empty completion has no token at all.
    endless = tmp_path / "endless"
    shutil.copytree(skills.target, endless)
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(RowsError, match="no row has a completion"):
        search_weights(endless, skills.exact, [Row("abc", "")])


def test_too_few_evaluations_are_refused(skills):
    with pytest.raises(ConfigError, match="at least 2"):
        search_weights(skills.target, skills.exact, ROWS, evaluations=1)


def test_a_target_that_does_not_generate_is_refused(tmp_path):
    target, tuned = make_pair(tmp_path, "bert")
    pack = lossless_pack(target, tuned)
    with pytest.raises(ConfigError, match="does not predict next tokens"):
        search_weights(target, pack, ROWS)


def test_a_target_without_a_tokenizer_is_refused(tmp_path):
    target, tuned = make_pair(tmp_path, "llama")
    pack = lossless_pack(target, tuned)
    with pytest.raises(CheckpointError, match="tokenizer"):
        search_weights(target, pack, ROWS)


def test_a_pack_that_adds_rows_cannot_be_weighted(tmp_path):
    target, tuned = make_pair(tmp_path, "llama_tied")
    for folder in (target, tuned):
        save_tokenizer(folder)
    model = load_model(tuned)
    model.resize_token_embeddings(100)
    grown = tmp_path / "grown"
    shutil.copytree(tuned, grown)
    model.save_pretrained(grown)
    pack = lossless_pack(target, grown)
    with pytest.raises(PackMismatchError, match="changes its shape"):
        search_weights(target, pack, ROWS)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
@pytest.mark.slow
def test_every_architecture_can_be_searched(architecture, tmp_path):
    target, tuned = make_pair(tmp_path, architecture, scale=0.1)
    for folder in (target, tuned):
        save_tokenizer(folder)
    pack = lossless_pack(target, tuned)
    loss_of = LiveLoss(open_merge(target, pack, None, "linear", None), ROWS)
    alone = LiveLoss(open_merge(tuned, pack_of_nothing(tuned), None, "linear", None), ROWS)
    assert loss_of([1.0], 1.0) == pytest.approx(alone.measure(), rel=1e-5)
    assert loss_of([1.0], 0.0) != pytest.approx(alone.measure(), rel=1e-3)


def pack_of_nothing(folder):
    return lossless_pack(folder, folder)
