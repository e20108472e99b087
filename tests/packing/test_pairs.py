"""Two folders of one model that name, cut or stack their tensors differently."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import architectures, build, inputs, make_pair, perturb, save_tokenizer

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.errors import AttachError, CheckpointError, CheckpointMismatchError
from graftkit.evaluate import compare
from graftkit.fuse import merge_packs
from graftkit.models import load_model
from graftkit.models.aligned import align
from graftkit.pack import pack_delta
from graftkit.rows import Row
from graftkit.skillpack import SkillPack

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    contiguous = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})


def as_live(folder: Path) -> None:
    """Names and stacks of the model in memory."""
    state = load_model(folder).state_dict()
    rewrite(folder, lambda tensors: state)


def answers(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs())
    return output.logits if "logits" in output else output.last_hidden_state


def assert_travels(target: Path, tuned: Path, folder: Path) -> SkillPack:
    """Packed, merged and attached, all as transformers loads the tuned folder by its class."""
    pack = pack_delta(target, tuned, recipe="lossless")
    tuned_model = load_model(tuned)
    expected, cls = answers(tuned_model), type(tuned_model)
    merge_packs(target, pack, folder / "merged")
    assert torch.equal(answers(cls.from_pretrained(folder / "merged").eval()), expected)
    live = cls.from_pretrained(target).eval()
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with attached(live, pack):
        assert torch.allclose(answers(live), expected, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in live.state_dict().items())
    return pack


@pytest.mark.parametrize(
    "architecture", architectures(["qwen3_moe", "mixtral"], quick=("mixtral",))
)
@pytest.mark.parametrize("stacked", ["target", "tuned"])
@pytest.mark.slow
def test_stacked_experts_pair_with_separate_ones(
    architecture: str, stacked: str, tmp_path: Path
) -> None:
    target, tuned = make_pair(tmp_path, architecture, torch.float32)
    as_live(tmp_path / stacked)
    names = Checkpoint.open(target).tensors.keys(), Checkpoint.open(tuned).tensors.keys()
    assert names[0] != names[1]
    assert_travels(target, tuned, tmp_path)


def test_of_a_stack_only_the_expert_that_is_compared_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, tuned = make_pair(tmp_path, "qwen3_moe")
    as_live(tuned)
    rows: list[int] = []
    read_rows = Checkpoint.read_rows

    def counted(self: Checkpoint, name: str, start: int, end: int) -> torch.Tensor:
        rows.append(end - start)
        return read_rows(self, name, start, end)

    monkeypatch.setattr(Checkpoint, "read_rows", counted)
    aligned = align(Checkpoint.open(target), Checkpoint.open(tuned))
    value = aligned.read("model.layers.1.mlp.experts.3.up_proj.weight")
    assert rows == [1]
    live = load_model(tuned).state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(value, live[3, 16:])


@pytest.mark.slow
def test_names_of_the_hub_and_mask_buffers_pair_with_what_is_saved_today(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "gpt2", torch.float32)
    masks = {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    rewrite(target, lambda old: {n.removeprefix("transformer."): v for n, v in old.items()} | masks)
    pack = assert_travels(target, tuned, tmp_path)
    assert pack.record("h.0.attn.masked_bias").codec == "zero"


@pytest.mark.slow
@pytest.mark.parametrize("holder", ["target", "tuned", "both"])
def test_buffers_that_transformers_ignores_follow_the_target(holder: str, tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "gpt_neox", torch.float32)
    name = "gpt_neox.layers.0.attention.rotary_emb.inv_freq"
    for folder, size in ((target, 4), (tuned, 8)):
        if holder in (folder.name, "both"):
            rewrite(folder, lambda old, size=size: old | {name: torch.arange(float(size))})
    assert_travels(target, tuned, tmp_path)
    merged = Checkpoint.open(tmp_path / "merged")
    assert (name in merged.tensors) == (holder != "tuned")


@pytest.mark.slow
def test_the_first_bert_files_pair_with_a_classifier_saved_today(tmp_path: Path) -> None:
    config = build("bert").config
    torch.manual_seed(0)
    first = transformers.BertForPreTraining(config).eval()
    first.config.architectures = ["BertForMaskedLM"]
    tuned = transformers.BertForSequenceClassification(config).eval()
    tuned.bert.load_state_dict(first.bert.state_dict())
    perturb(tuned, seed=3, scale=0.05)
    first.save_pretrained(tmp_path / "target")
    tuned.save_pretrained(tmp_path / "tuned")
    config_file = tmp_path / "target/config.json"
    settings = json.loads(config_file.read_text()) | {"architectures": ["BertForMaskedLM"]}
    config_file.write_text(json.dumps(settings))

    def aged(tensors: Tensors) -> Tensors:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        named = {
            next((n.replace(new, was) for new, was in old.items() if new in n), n): value
            for n, value in tensors.items()
        }
        return named | {"bert.embeddings.position_ids": torch.arange(64)[None]}

    rewrite(tmp_path / "target", aged)
    assert "cls.seq_relationship.weight" in Checkpoint.open(tmp_path / "target").tensors
    pack = assert_travels(tmp_path / "target", tmp_path / "tuned", tmp_path)
    assert pack.record("classifier.weight").base == ""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
@pytest.mark.parametrize("whole", ["target", "tuned"])
def test_a_backbone_pairs_with_a_causal_model(
    architecture: str, whole: str, tmp_path: Path
) -> None:
    target, tuned = make_pair(tmp_path, architecture, torch.float32)
    part = target if whole == "tuned" else tuned
    small = transformers.AutoModel.from_pretrained(part)
    (part / "model.safetensors").unlink()
    small.save_pretrained(part)
    assert load_model(part).config.architectures == ["LlamaModel"]
    assert_travels(target, tuned, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_score_head_over_a_causal_target_is_an_added_tensor(
    architecture: str, tmp_path: Path
) -> None:
    target, tuned = make_pair(tmp_path, architecture, torch.float32)
    causal = load_model(tuned)
    family = type(causal).__name__.removesuffix("ForCausalLM")
    scored = getattr(transformers, f"{family}ForSequenceClassification")(causal.config).eval()
    scored.model.load_state_dict(causal.model.state_dict())
    scored.score.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    (tuned / "model.safetensors").unlink()
    scored.save_pretrained(tuned)
    pack = assert_travels(target, tuned, tmp_path)
    assert pack.record("score.weight").base == ""
    with (
        pytest.raises(AttachError, match=r"no place for tensor score\.weight"),
        attached(load_model(target), pack),
    ):
        pass


def test_rows_are_refused_for_two_classes_and_both_are_named(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama_tied")
    small = transformers.AutoModel.from_pretrained(target)
    small.save_pretrained(target)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n')
    with pytest.raises(CheckpointMismatchError, match=r"a LlamaForCausalLM.*a LlamaModel"):
        pack_delta(target, tuned, calibration=rows, budget="90%")


def test_answers_of_two_classes_are_not_compared(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama_tied")
    small = transformers.AutoModel.from_pretrained(tuned)
    small.save_pretrained(tuned)
    pack = pack_delta(target, tuned, recipe="lossless")
    rows = [Row("a", " b")]
    with pytest.raises(CheckpointMismatchError, match=r"a LlamaModel.*a LlamaForCausalLM"):
        compare(target, tuned, pack, rows)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_from_the_tuned_model(
    prefix: str, tmp_path: Path
) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    expected = load_file(tuned / "model.safetensors")
    rewrite(tuned, lambda old: {prefix + name: value for name, value in old.items()})
    merge_packs(target, pack_delta(target, tuned, recipe="lossless"), tmp_path / "merged")
    merged = Checkpoint.open(tmp_path / "merged")
    assert merged.tensors.keys() == expected.keys()
    assert all(torch.equal(merged.read(name), value) for name, value in expected.items())
    # transformers would load nothing of such a target, nor of what is merged into it.
    with pytest.raises(CheckpointError, match=rf"{prefix}\S+ has the prefix of a compiled"):
        pack_delta(tuned, target, recipe="lossless")


def test_a_tensor_of_the_tuned_model_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    rewrite(tuned, lambda old: old | {"v_head.summary.weight": torch.ones(1, 32)})
    with pytest.raises(CheckpointError, match=r"owns tensor v_head\.summary\.weight"):
        pack_delta(target, tuned, recipe="lossless")


@pytest.mark.parametrize("side", ["target", "tuned"])
def test_the_state_of_a_peft_model_is_refused_with_what_to_do(side: str, tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    rewrite(tmp_path / side, lambda old: {f"base_model.model.{n}": v for n, v in old.items()})
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        pack_delta(target, tuned, recipe="lossless")


def test_rows_cannot_run_through_a_checkpoint_with_prefixes(tmp_path: Path) -> None:
    _, tuned = make_pair(tmp_path, "llama")
    rewrite(tuned, lambda old: {f"_orig_mod.{name}": value for name, value in old.items()})
    with pytest.raises(CheckpointError, match=r"_orig_mod\.\S+ has the prefix of a compiled"):
        load_model(tuned)


def test_prefixes_inside_names_are_stripped_too(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    expected = load_file(tuned / "model.safetensors")
    rewrite(
        tuned,
        lambda old: {n.replace(".self_attn.", "._orig_mod.self_attn."): v for n, v in old.items()},
    )
    aligned = align(Checkpoint.open(target), Checkpoint.open(tuned))
    assert all(torch.equal(aligned.read(name), value) for name, value in expected.items())


def test_an_expert_that_is_missing_from_one_folder_is_refused(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "mixtral")
    as_live(target)
    lost = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    rewrite(tuned, lambda old: {name: value for name, value in old.items() if name != lost})
    with pytest.raises(CheckpointMismatchError, match=r"lacks tensor .*experts\.gate_up_proj"):
        pack_delta(target, tuned, recipe="lossless")


def _resnet() -> transformers.PreTrainedModel:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def _whisper() -> transformers.PreTrainedModel:
    layers = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=96,
            num_mel_bins=8,
            d_model=16,
            max_source_positions=8,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **layers,
        )
    )


def _siglip() -> transformers.PreTrainedModel:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={**tower, "vocab_size": 96},
            vision_config={**tower, "image_size": 16, "patch_size": 8},
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [_resnet, _whisper, _siglip], ids=["resnet", "whisper", "siglip"])
def test_models_without_one_input_embedding_are_packed_and_merged(
    make: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "target")
    perturb(model, seed=1, scale=0.02)
    model.save_pretrained(tmp_path / "tuned")
    pack = pack_delta(tmp_path / "target", tmp_path / "tuned", recipe="lossless")
    merge_packs(tmp_path / "target", pack, tmp_path / "merged")
    merged, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "tuned"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_a_model_of_images_takes_no_rows_and_no_prompts(tmp_path: Path) -> None:
    target, tuned = tmp_path / "target", tmp_path / "tuned"
    for folder in (target, tuned):
        _resnet().save_pretrained(folder)
        save_tokenizer(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n')
    with pytest.raises(CheckpointError, match="has no input embedding"):
        pack_delta(target, tuned, calibration=rows, budget="100%")
    with pytest.raises(CheckpointError, match="has no list of hidden layers"):
        pack_delta(target, tuned, recipe="lossless", prompts=[f"prompt {i}" for i in range(20)])
