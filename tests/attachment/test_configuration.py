"""A tuned config.json: attached it computes what the merged checkpoint does, or it is refused."""

import json
from copy import deepcopy

import pytest
import torch
import transformers as T
from tiny_models import VOCABULARY, architectures, build, inputs, lossless_pack, perturb

from graftkit.attachment import attach, attached
from graftkit.errors import AttachError
from graftkit.fuse.merge import merge_packs
from graftkit.models.configuration import effective_keys, tuned_config
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack

CHANGES = {
    "gpt2": ("activation_function", {"activation_function": "relu"}),
    "gpt_neox": ("use_parallel_residual", {"use_parallel_residual": False}),
    "mistral": ("sliding_window", {"sliding_window": 3}),
    "qwen3": ("rms_norm_eps", {"rms_norm_eps": 0.5}),
    "llama": ("rope_parameters", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "mixtral": ("num_experts_per_tok", {"num_experts_per_tok": 1}),
    "bert": ("layer_norm_eps", {"layer_norm_eps": 0.5}),
    "gemma2": ("final_logit_softcapping", {"final_logit_softcapping": 2.0}),
    "gemma2 attention": ("attn_logit_softcapping", {"attn_logit_softcapping": 0.05}),
}


def target_model(architecture):
    if not architecture.startswith("gemma2"):
        return build(architecture)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = T.Gemma2Config(vocab_size=VOCABULARY, **sizes, **heads)
    model = T.Gemma2ForCausalLM(config).eval()
    perturb(model, seed=0, scale=0.3)
    return model


def save_pair(folder, model, **settings):
    """The model, and one whose weights moved and whose config.json has other settings."""
    model.save_pretrained(folder / "target")
    tuned = deepcopy(model)
    perturb(tuned, seed=1, scale=0.02)
    tuned.save_pretrained(folder / "tuned")
    change_json(folder / "tuned" / "config.json", **settings)
    return folder / "target", folder / "tuned"


def change_json(file, **settings):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings, indent=2))


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


def load(model, folder):
    return type(model).from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", architectures(CHANGES, quick=("gpt2", "llama", "mistral", "mixtral"))
)
def test_a_changed_computation_is_attached_as_it_is_merged_and_undone(architecture, tmp_path):
    key, settings = CHANGES[architecture]
    target, tuned = save_pair(tmp_path, target_model(architecture), **settings)
    pack = lossless_pack(target, tuned)
    model = load(target_model(architecture), target)
    before = logits(model)
    expected = logits(load(model, merge_packs(target, pack, tmp_path / "merged")))
    with pytest.raises(KeyboardInterrupt), attached(model, pack):  # noqa: PT012
        actual = logits(model)
        raise KeyboardInterrupt
    assert torch.equal(actual, expected)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(before, expected)
    with pytest.raises(AttachError, match=key):
        attach(model, pack, mode="side")
    assert torch.equal(logits(model), before)


@pytest.mark.slow
def test_everything_of_a_model_is_as_before_after_detach(tmp_path):
    settings = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    target, tuned = save_pair(
        tmp_path, build("llama"), rope_parameters=settings, hidden_act="gelu", foo=[1]
    )
    pack = lossless_pack(target, tuned)
    model = load(build("llama"), target)
    config, states = deepcopy(vars(model.config)), parts_of(model)
    with attached(model, pack):
        assert model.config.foo == [1]
        long = torch.randint(3, VOCABULARY, (1, 200))
        with torch.no_grad():
            model(input_ids=long)  # beyond the context: dynamic frequencies are written
    assert vars(model.config) == config
    assert_same_parts(parts_of(model), states)


def parts_of(model):
    """Plain attributes and buffers of every module."""
    return {
        name: (
            type(module),
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            {k: v.clone() for k, v in module._buffers.items() if v is not None},
        )
        for name, module in model.named_modules()
    }


def assert_same_parts(actual, expected):
    assert actual.keys() == expected.keys()
    for name, (kind, attributes, buffers) in expected.items():
        assert actual[name][0] is kind
        assert actual[name][1].keys() == attributes.keys()
        assert all(
            actual[name][1][k] is v or actual[name][1][k] == v for k, v in attributes.items()
        )
        assert actual[name][2].keys() == buffers.keys()
        assert all(torch.equal(actual[name][2][k], v) for k, v in buffers.items())


@pytest.mark.slow
def test_settings_that_compute_nothing_are_no_obstacle_beside_the_model(tmp_path):
    harmless = {
        "max_position_embeddings": 128,
        "pad_token_id": 5,
        "eos_token_id": [2, 7],
        "transformers_version": "4.0.0",
        "architectures": ["Qwen2ForCausalLM"],
        "use_cache": False,
        "attention_dropout": 0.3,
        "unsloth_version": "2025.1",
        "torch_dtype": "float16",
    }
    target, tuned = save_pair(tmp_path, build("qwen2"), **harmless)
    pack = lossless_pack(target, tuned)
    model = load(build("qwen2"), target)
    expected = logits(load(model, tuned))
    with attached(model, pack, mode="side"):
        assert torch.allclose(logits(model), expected, atol=1e-4)


def test_a_configuration_that_makes_other_parts_is_refused_by_its_key(tmp_path):
    target, tuned = save_pair(tmp_path, build("llama"), num_hidden_layers=3)
    model = load(build("llama"), target)
    before = logits(model)
    with pytest.raises(AttachError, match="num_hidden_layers"):
        attach(model, forged(target, tuned))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**5},
        {"max_position_embeddings": 10**12},
        {"hidden_act": "no such function"},
        {"hidden_size": "wide"},
    ],
)
def test_a_hostile_configuration_is_refused_in_one_line(settings, tmp_path):
    target, tuned = save_pair(tmp_path, build("llama"), **settings)
    model, pack = load(build("llama"), target), forged(target, tuned)
    for mode in ("merged", "side"):
        with pytest.raises(AttachError, match=r"config\.json") as caught:
            attach(model, pack, mode=mode)
        assert "\n" not in str(caught.value)


def forged(target, tuned):
    """A pack with the tuned folder's config.json, which packing itself may refuse."""
    config = (tuned / "config.json").read_bytes()
    (tuned / "config.json").write_bytes((target / "config.json").read_bytes())
    pack = lossless_pack(target, tuned)
    pack.side_file = lambda name, old: config if name == "config.json" else None
    return pack


@pytest.mark.slow
def test_a_pack_of_an_older_writer_is_read_with_the_targets_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr("graftkit.skillpack.pack._STORED_WHOLE", ())
    target, tuned = save_pair(tmp_path, build("gpt2"), activation_function="relu")
    pack = pack_delta(target, tuned, recipe="lossless", workers=1)
    assert pack.manifest.files[0].prefix > 0
    model = load(build("gpt2"), target)
    with attached(model, pack):
        assert torch.equal(logits(model), logits(load(model, tuned)))
    with pytest.raises(AttachError, match=r"config\.json.*pack again"):
        attach(build("gpt2"), pack)


def test_a_pack_is_attached_to_a_model_that_was_never_on_disk(tmp_path):
    target, tuned = save_pair(tmp_path, build("gpt2"), activation_function="relu")
    lossless_pack(target, tuned).save(tmp_path / "x.skillpack")
    model, expected = build("gpt2"), logits(load(build("gpt2"), tuned))
    with attached(model, SkillPack.load(tmp_path / "x.skillpack")):
        assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_generation_settings_are_those_of_the_merged_checkpoint(tmp_path):
    target, tuned = save_pair(tmp_path, build("llama"))
    change_json(tuned / "generation_config.json", eos_token_id=[2, 9], repetition_penalty=1.7)
    pack = lossless_pack(target, tuned)
    model = load(build("llama"), target)
    own = model.generation_config
    with attached(model, pack):
        assert model.generation_config.eos_token_id == [2, 9]
        ids = model.generate(inputs()["input_ids"], max_new_tokens=9, do_sample=False)
    merged = load(model, merge_packs(target, pack, tmp_path / "merged"))
    assert torch.equal(
        ids, merged.generate(inputs()["input_ids"], max_new_tokens=9, do_sample=False)
    )
    assert model.generation_config is own


def test_the_padding_of_a_classifier_is_a_change_of_what_it_computes():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = T.LlamaConfig(vocab_size=96, intermediate_size=64, pad_token_id=0, **sizes)
    tuned = tuned_config(config, config.to_dict() | {"pad_token_id": 5})
    assert effective_keys(T.LlamaForSequenceClassification, config, tuned) == ["pad_token_id"]
    assert effective_keys(T.LlamaForCausalLM, config, tuned) == []
    scaled = T.Gemma2Config(vocab_size=96, pad_token_id=0, **sizes)
    tuned = tuned_config(scaled, scaled.to_dict() | {"pad_token_id": 5})
    assert effective_keys(T.Gemma2ForCausalLM, scaled, tuned) == []


def test_comparing_configurations_leaves_the_random_numbers_alone():
    config = T.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4)
    tuned = tuned_config(config, config.to_dict() | {"activation_function": "relu"})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert effective_keys(T.GPT2LMHeadModel, config, tuned) == ["activation_function"]
    assert torch.equal(torch.rand(4), expected)
