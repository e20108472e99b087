from pathlib import Path

import pytest
import torch
from distill.foreign import byte_level, gpt2
from distill.tiny import tiny_llama, write_jsonl

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import Lora, ModelSource, Sft, Transfer
from graftkit.distill.pipeline import run_distill
from graftkit.distill.training import train_rows
from graftkit.distill.transfer.distributions import DistributionFile, collect_distributions
from graftkit.distill.transfer.losses import Guide, HiddenSource
from graftkit.errors import ConfigError
from graftkit.models.text import usable_tokenizer
from graftkit.rows import Row

ROWS = [Row(f"say {word}:", f" {word} and {word}!") for word in ("one", "two", "three") * 4]
SOURCE = ModelSource(kind="model", name="source", model="source")
THEIRS = byte_level(90)
FAST = {"batch_size": 4, "precision": "float32", "warmup_share": 0.0, "learning_rate": 1e-2}
LAYERS = 2


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("target")))


def guide(target, folder: Path, **settings) -> Guide:
    transfer, model = Transfer(**settings), gpt2(THEIRS, 128)
    ours, files, hidden = usable_tokenizer(target), [], None
    if transfer.kl_weight:
        file = folder / "source.safetensors"
        collect_distributions(SOURCE, model, THEIRS, ours, ROWS, transfer, file)
        files = [DistributionFile(file)]
    if transfer.hidden_weight:
        hidden = HiddenSource(SOURCE, model, THEIRS, ours, LAYERS)
    return Guide(transfer, files, hidden, ROWS)


def curve(log, name):
    return [entry[name] for entry in log if name in entry]


def train(target, folder, sft, guided):
    return train_rows(target, ROWS, sft, 0, folder, lambda done, total: None, guided)


@pytest.mark.parametrize(
    "hidden", ["mse", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cosine", "gram"))]
)
def test_distributions_and_hidden_states_are_learned_beside_the_text(target, tmp_path, hidden):
    guided = guide(target, tmp_path, lm_weight=0.5, kl_weight=0.5, hidden_weight=1.0, hidden=hidden)
    log = train(target, tmp_path / "sft", Sft(epochs=8, **FAST), guided)
    for name in ("lm", "kl", "hidden"):
        values = curve(log, name)
        assert values[-1] < 0.9 * values[0], name
    assert "graft_projections" not in str(Checkpoint.open(tmp_path / "sft").tensors.keys())


@pytest.mark.slow
@pytest.mark.parametrize("only", ["lm_weight", "kl_weight", "hidden_weight"])
def test_every_loss_alone_moves_the_target(target, tmp_path, only):
    weights = {"lm_weight": 0.0, "kl_weight": 0.0, "hidden_weight": 0.0} | {only: 1.0}
    train(target, tmp_path / "sft", Sft(epochs=1, **FAST), guide(target, tmp_path, **weights))
    after, name = Checkpoint.open(tmp_path / "sft"), "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after.read(name), target.read(name))


@pytest.mark.slow
def test_with_the_text_alone_the_loss_is_that_of_plain_sft(target, tmp_path):
    plain = train(target, tmp_path / "plain", Sft(epochs=2, **FAST), None)
    settings = {"lm_weight": 1.0, "kl_weight": 0.0}
    guided = train(
        target, tmp_path / "same", Sft(epochs=2, **FAST), guide(target, tmp_path, **settings)
    )
    torch.testing.assert_close(curve(guided, "loss"), curve(plain, "loss"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_batches_of_several_passes_give_the_same_loss(target, tmp_path):
    settings = {"lm_weight": 0.5, "kl_weight": 0.5, "hidden_weight": 1.0, "hidden": "gram"}
    guided = guide(target, tmp_path, **settings)
    whole = train(target, tmp_path / "whole", Sft(epochs=1, **FAST), guided)
    sft = Sft(epochs=1, micro_batch_size=2, **FAST)
    split = train(target, tmp_path / "split", sft, guided)
    torch.testing.assert_close(curve(split, "loss"), curve(whole, "loss"), rtol=1e-2, atol=1e-3)


def test_an_adapter_has_no_place_for_a_projection(target, tmp_path):
    guided = guide(target, tmp_path, hidden_weight=1.0, hidden="cosine")
    guided.hidden.width += 1
    with pytest.raises(ConfigError, match="which an adapter has no place for; choose gram"):
        train(target, tmp_path / "sft", Sft(lora=Lora(rank=2), **FAST), guided)


@pytest.mark.slow
def test_a_run_with_explicit_transfer_probes_its_sources(target, tmp_path):
    THEIRS.save_pretrained(tmp_path / "source")
    gpt2(THEIRS, 128).save_pretrained(tmp_path / "source")
    said = [{"prompt": f"say {n}:", "completion": f" {n}!"} for n in range(6)]
    write_jsonl(tmp_path / "prompts.jsonl", said)
    (tmp_path / "run.toml").write_text(
        f"""
target = "{target.path}"
dpo = false
[prompts]
file = "prompts.jsonl"
[[sources]]
kind = "answers"
name = "book"
file = "prompts.jsonl"
[[sources]]
kind = "model"
name = "big"
model = "source"
samples = 1
max_new_tokens = 4
[[scores]]
kind = "exact"
[sft]
batch_size = 4
[transfer]
hidden_weight = 1.0
[pack]
recipe = "lossless"
"""
    )
    stages = run_distill(tmp_path / "run.toml", tmp_path / "out")
    assert stages["select"]["rows"] == 6
    assert stages["probe"]["tokens"] == 6 * 4  # blank, digit, exclamation mark, end
    assert 0 < stages["probe"]["aligned"] <= 24
    assert len(DistributionFile(tmp_path / "out" / "distributions" / "big.safetensors")) == 6
