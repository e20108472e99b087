"""A tuned model with more tokens, fewer tokens, an untied head or another chat template."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build, make_pair, perturb

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint, tensor_digest
from graftkit.fuse import merge_packs
from graftkit.models.loading import load_model
from graftkit.pack import pack_delta
from graftkit.packing import pairs


def save_side_files(target: Path, tuned: Path) -> None:
    """A tokenizer whose middle changed, a chat template that only the tuned model has."""
    vocabulary = {f"token{i}": i for i in range(500)}
    for folder, extra in ((target, {}), (tuned, {"<tool>": 500, "<end>": 501})):
        content = {"version": "1.0", "added": extra, "model": {"vocab": vocabulary}}
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=1))
    (tuned / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lossless", "auto", "graftllm"])
@pytest.mark.parametrize(
    ("architecture", "tokens"), [("llama_tied", 101), ("llama", 104), ("llama", 90), ("bert", 99)]
)
def test_a_resized_vocabulary_travels_in_the_pack(
    recipe: str,
    architecture: str,
    tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "SMALLEST_LOSSY", 256)
    target, tuned = tmp_path / "target", tmp_path / "tuned"
    model = build(architecture, torch.bfloat16)
    model.save_pretrained(target)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    perturb(model, seed=5, scale=0.02)
    model.save_pretrained(tuned)
    save_side_files(target, tuned)
    pack = pack_delta(target, tuned, recipe=recipe, budget="90%" if recipe != "lossless" else None)
    merge_packs(target, pack, tmp_path / "merged")
    merged, expected = Checkpoint.open(tmp_path / "merged"), Checkpoint.open(tuned)
    assert {n: i.shape for n, i in merged.tensors.items()} == {
        n: i.shape for n, i in expected.tensors.items()
    }
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        assert merged.side_file(name) == expected.side_file(name)
    for name, info in expected.tensors.items():
        rows = slice(96, None) if info.shape[0] == tokens else slice(None)
        same = tensor_digest(merged.read(name)[rows]) == tensor_digest(expected.read(name)[rows])
        assert same or (recipe != "lossless" and rows == slice(None))
    assert load_model(tmp_path / "merged").config.vocab_size == tokens


@pytest.mark.slow
def test_new_tokens_work_on_a_live_target_and_leave_with_the_pack(tmp_path: Path) -> None:
    target, tuned = tmp_path / "target", tmp_path / "tuned"
    model = build("llama_tied", torch.float32)
    model.save_pretrained(target)
    model.resize_token_embeddings(101, mean_resizing=False)
    perturb(model, seed=5, scale=0.02)
    model.save_pretrained(tuned)
    pack = pack_delta(target, tuned, recipe="lossless")
    live, ids = load_model(target), torch.tensor([[3, 98, 100]])
    with attached(live, pack), torch.no_grad():
        assert torch.equal(live(ids).logits, load_model(tuned)(ids).logits)
    assert live.get_input_embeddings().weight.shape[0] == 96


def test_what_a_tokenizer_shares_with_the_targets_is_not_stored(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    save_side_files(target, tuned)
    pack = pack_delta(target, tuned, recipe="lossless")
    record = next(record for record in pack.manifest.files if record.name == "tokenizer.json")
    assert record.bytes - record.prefix - record.suffix < 100
    assert (
        pack.side_files(Checkpoint.open(target))["tokenizer.json"]
        == (tuned / "tokenizer.json").read_bytes()
    )


@pytest.mark.slow
def test_a_head_that_training_untied_comes_back_bit_for_bit(tmp_path: Path) -> None:
    target, tuned = tmp_path / "target", tmp_path / "tuned"
    model = build("llama_tied", torch.bfloat16)
    model.save_pretrained(target)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    perturb(model, seed=3, scale=0.02)
    model.save_pretrained(tuned)
    assert "lm_head.weight" in Checkpoint.open(tuned).tensors
    pack = pack_delta(target, tuned, recipe="lossless")
    assert pack.record("lm_head.weight").base == "model.embed_tokens.weight"
    merge_packs(target, pack, tmp_path / "merged")
    ids = torch.tensor([[3, 9, 17]])
    with torch.no_grad():
        logits = [load_model(folder)(ids).logits for folder in (tmp_path / "merged", tuned)]
    assert torch.equal(*logits)
