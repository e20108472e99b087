import math
import os
import signal
from pathlib import Path

import pytest
import torch
from distill.tiny import tiny_llama
from killing import Forked
from safetensors.torch import load_file

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import Dpo, Lora, Sft
from graftkit.distill.training import last_checkpoint, train_pairs, train_rows
from graftkit.errors import ConfigError, RowsError
from graftkit.models import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.rows import Row, encode_row

ROWS = [Row(f"say {word}:", f" {word}!") for word in ("one", "two", "three", "four") * 4]
PAIRS = [
    {"prompt": f"say {word}:", "chosen": f" {word}!", "rejected": " no"}
    for word in ("one", "two", "three", "four") * 2
]
FAST = {"batch_size": 4, "precision": "float32", "warmup_share": 0.0}


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("target")))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_sft_lowers_the_loss_and_keeps_names_dtypes_and_files_of_the_target(target, tmp_path):
    sft = Sft(epochs=6, learning_rate=1e-2, **FAST)
    log = train_rows(target, ROWS, sft, 0, tmp_path / "sft", nothing)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    before, after = weights(target.path), weights(tmp_path / "sft")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert Checkpoint.open(tmp_path / "sft").side_files() == target.side_files()
    assert not (tmp_path / "sft.partial").exists()


@pytest.mark.slow
def test_the_loss_counts_completions_and_their_end_alone(target, tmp_path):
    log = train_rows(
        target, ROWS[:4], Sft(epochs=1, learning_rate=1e-9, **FAST), 0, tmp_path / "a", nothing
    )
    model = load_model(target, torch.float32)
    tokenizer, total, count = usable_tokenizer(target), 0.0, 0
    for row in ROWS[:4]:
        encoded = encode_row(tokenizer, row)
        ids, start = encoded.ids, encoded.start
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))
        count += len(ids) - start
    assert log[0]["loss"] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid_norm", "sigmoid", "wrpo"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_the_first_loss_of_preference_optimisation_is_log_2(target, tmp_path, loss, lora):
    pairs = [pair | {"chosen_target": " yes"} for pair in PAIRS] if loss == "wrpo" else PAIRS
    beta = 10.0 if loss == "sigmoid_norm" else 0.1
    dpo = Dpo(epochs=3, learning_rate=1e-2, loss=loss, beta=beta, lora=lora, **FAST)
    log = train_pairs(target, target, pairs, dpo, 0, tmp_path / "tuned", nothing)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_reference_is_the_model_after_sft_and_not_the_target(target, tmp_path):
    train_rows(
        target, ROWS, Sft(epochs=4, learning_rate=1e-2, **FAST), 0, tmp_path / "sft", nothing
    )
    after = Checkpoint.open(tmp_path / "sft")
    log = train_pairs(
        target, after, PAIRS, Dpo(learning_rate=1e-4, **FAST), 0, tmp_path / "t", nothing
    )
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_low_rank_adapter_is_merged_into_a_whole_model(target, tmp_path):
    sft = Sft(epochs=4, learning_rate=1e-2, lora=Lora(rank=2), **FAST)
    train_rows(target, ROWS, sft, 0, tmp_path / "sft", nothing)
    before, after = weights(target.path), weights(tmp_path / "sft")
    assert before.keys() == after.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    delta = (after[name].float() - before[name].float()).double()
    values = torch.linalg.svdvals(delta)
    assert values[0] > 0
    assert values[2] < 0.1 * values[0]  # rounding to bfloat16 is all that is beyond rank 2
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])


@pytest.mark.slow
def test_embeddings_learn_at_their_own_rate(target, tmp_path):
    sft = Sft(epochs=2, learning_rate=1e-2, embedding_rate=0.0, **FAST)
    train_rows(target, ROWS, sft, 0, tmp_path / "sft", nothing)
    before, after = weights(target.path), weights(tmp_path / "sft")
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["model.embed_tokens.weight"]


def train_stage(stage: str, target: Checkpoint, folder: Path, stop: int | None = None) -> None:
    """Twenty-four steps of SFT, or twelve of DPO; killed after step `stop`."""

    def report(done: int, total: int) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    if stage == "sft":
        settings = Sft(epochs=6, learning_rate=1e-2, checkpoint_steps=5, **FAST)
        train_rows(target, ROWS, settings, 0, folder, report)
    else:
        settings = Dpo(epochs=6, learning_rate=1e-3, checkpoint_steps=5, **FAST)
        train_pairs(target, target, PAIRS, settings, 0, folder, report)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_killed_training_ends_in_the_same_bytes(target, tmp_path, stage):
    train_stage(stage, target, tmp_path / "whole")
    killed = Forked(lambda: train_stage(stage, target, tmp_path / "killed", stop=8))
    assert killed.end() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    torn = tmp_path / "killed.partial" / "checkpoint-7"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    train_stage(stage, target, tmp_path / "killed")
    whole, continued = (tmp_path / n / "model.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == continued.read_bytes()


def test_a_checkpoint_without_its_end_is_deleted(tmp_path):
    for step, content in ((5, "{}"), (10, "{")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_row_beyond_the_limit_is_refused_by_its_place(target, tmp_path):
    with pytest.raises(RowsError, match="at most 10"):
        train_rows(target, ROWS, Sft(max_tokens=10), 0, tmp_path / "sft", nothing)
    assert not (tmp_path / "sft").exists()


def test_a_batch_that_processes_cannot_share_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="batch_size 4 is no multiple of 3 processes"):
        train_rows(target, ROWS, Sft(**FAST), 0, tmp_path / "sft", nothing)
