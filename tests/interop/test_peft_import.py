import json
import re
import shutil

import jsonschema
import pytest
import torch
from interop.adapters import (
    CONFIG,
    WEIGHTS,
    changed,
    logits,
    make_adapter,
    peft_model,
    tensors_of,
)
from safetensors.torch import save_file
from skillpack.forge import ROOT
from tiny_models import ARCHITECTURES, DIFFERENT, architectures, build, save_tokenizer

from graftkit.attachment import attached
from graftkit.attachment.updates import LowRankUpdate
from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, CheckpointMismatchError, OutputError
from graftkit.fuse import merge_packs
from graftkit.interop import import_lora
from graftkit.models import load_model
from graftkit.skillpack import SkillPack

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
TIED_CASES = {
    "head and embedding saved": {"modules_to_save": ["embed_tokens", "lm_head"], **ATTENTION},
    "embedding saved": {"modules_to_save": ["embed_tokens"], **ATTENTION},
    "both saved, still tied": {
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
        **ATTENTION,
    },
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of both": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
    },
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
}
# PEFT's all-linear means the stacked experts of mixtral and qwen3_moe too.
CASES = {name: (name, {}) for name in ARCHITECTURES}
CASES |= {
    "router": ("mixtral", {"target_parameters": ["gate.weight"], **ATTENTION}),
    "stacks of experts": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {r"layers\.1\..*gate_up_proj": 11},
        },
    ),
    "rank of each module": (
        "llama",
        {
            "target_modules": ["q_proj", "lm_head", "embed_tokens"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {r"layers\.1\..*q_proj": 11},
        },
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn", "wte"], "bias": "all"}),
    "positions": ("gpt2", {"target_modules": ["c_attn", "wpe"], "bias": "lora_only"}),
    "encoder": ("bert", {"target_modules": ["query", "word_embeddings"], "bias": "all"}),
}
CASES |= {f"tied, {name}": ("llama_tied", options) for name, options in TIED_CASES.items()}


QUICK = {*CASES} - {*ARCHITECTURES} | {*DIFFERENT}


@pytest.mark.slow
@pytest.mark.parametrize("case", architectures(CASES, quick=QUICK))
def test_target_and_pack_answer_as_peft_does(tmp_path, case):
    architecture, options = CASES[case]
    target, adapter = make_adapter(tmp_path, architecture, **options)
    model, pack = load_model(target), import_lora(target, adapter, tmp_path / "x.skillpack")
    before, expected = logits(model), logits(peft_model(target, adapter))
    assert (expected - before).abs().max() > 0.1
    for mode in ("merged", "side"):
        with attached(model, pack, mode=mode):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)
    merged = load_model(merge_packs(target, pack, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    architectures(["llama", "gpt2", "gpt_neox", "bert"], quick=("gpt2", "gpt_neox")),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_peft_within_rounding(tmp_path, architecture, dtype):
    target, adapter = make_adapter(tmp_path, architecture, dtype)
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    actual = load_model(merge_packs(target, pack, tmp_path / "merged")).state_dict()
    # PEFT rounds the product, then the sum; in float32 it rounds as finely as we do.
    expected = peft_model(target, adapter, torch.float32).merge_and_unload().state_dict()
    assert actual.keys() == expected.keys()
    step = torch.finfo(dtype).eps
    for name, value in actual.items():
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_factor_is_in_the_pack_word_for_word(tmp_path, dtype):
    target, adapter = make_adapter(tmp_path, "gpt2", target_modules=["c_attn", "c_fc", "wte"])
    narrow = {name: tensor.to(dtype) for name, tensor in tensors_of(adapter).items()}
    adapter = changed(adapter, tmp_path / "narrow", tensors=narrow)
    import_lora(target, adapter, tmp_path / "x.skillpack")
    pack = SkillPack.load(tmp_path / "x.skillpack")
    stored = tensors_of(adapter)
    for i in range(2):
        for module in ("attn.c_attn", "mlp.c_fc"):
            stem = f"base_model.model.transformer.h.{i}.{module}."
            factors = pack.plain_factors(f"transformer.h.{i}.{module}.weight")
            assert torch.equal(factors.left, stored[stem + "lora_B.weight"])
            assert torch.equal(factors.right, stored[stem + "lora_A.weight"])
            assert (factors.left.dtype, factors.right.dtype) == (dtype, dtype)
            assert factors.scale == 5 / 3
    table = pack.plain_factors("transformer.wte.weight")
    stem = "base_model.model.transformer.wte.lora_embedding_"
    assert torch.equal(table.left, stored[stem + "A"].T)
    assert torch.equal(table.right, stored[stem + "B"].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_runs_unmerged_by_its_factors(tmp_path, dtype):
    target, adapter = make_adapter(tmp_path, "llama", dtype, target_modules=["q_proj", "lm_head"])
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    model = load_model(target)
    with attached(model, pack, mode="side") as attachment:
        modules = attachment._backend._modules
        updates = {name: deltas.weights[0] for name, deltas in modules.items()}
        assert set(updates) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {"lm_head"}
        assert all(isinstance(update, LowRankUpdate) for update in updates.values())
        assert updates["lm_head"].nbytes == 3 * (96 + 32) * dtype.itemsize


@pytest.mark.slow
def test_adapters_of_single_experts_are_read_as_peft_reads_them(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "target")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, expert in [(i, j) for i in range(2) for j in range(4)]:
        for name, (rows, columns) in {"w1": (64, 32), "w2": (32, 64), "w3": (64, 32)}.items():
            module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            for part, shape in {"A": (3, columns), "B": (rows, 3)}.items():
                noise = torch.randn(shape, generator=generator) * 0.1
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = noise
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (adapter / CONFIG).write_text(json.dumps(config))
    pack = import_lora(tmp_path / "target", adapter, tmp_path / "x.skillpack")
    model, expected = (
        load_model(tmp_path / "target"),
        logits(peft_model(tmp_path / "target", adapter)),
    )
    for mode in ("merged", "side"):
        with attached(model, pack, mode=mode):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_model_without_its_head_finds_its_modules(tmp_path):
    target, adapter = make_adapter(tmp_path, "llama", **ATTENTION)
    stored = tensors_of(adapter)
    renamed = {name.replace("model.model.model.", "model.model."): t for name, t in stored.items()}
    short = changed(adapter, tmp_path / "short", tensors=dict.fromkeys(stored) | renamed)
    file = tmp_path / "x.skillpack"
    pack, same = (import_lora(target, a, file, force=True) for a in (adapter, short))
    assert not renamed.keys() & stored.keys()
    assert pack.manifest.tensors == same.manifest.tensors


def test_what_rounds_a_saved_module_is_listed_as_left_out(tmp_path):
    options = {"modules_to_save": ["lm_head", "norm"], **ATTENTION}
    target, adapter = make_adapter(tmp_path, "llama", torch.bfloat16, **options)
    wide = {name: tensor.float() for name, tensor in tensors_of(adapter).items()}
    exact = import_lora(target, changed(adapter, tmp_path / "wide", tensors=wide), tmp_path / "x")
    assert exact.manifest.omitted == ()
    assert exact.record("lm_head.weight").codec == "exact"
    wide["base_model.model.lm_head.weight"] = wide["base_model.model.lm_head.weight"] * 1.001
    finer = import_lora(target, changed(adapter, tmp_path / "finer", tensors=wide), tmp_path / "y")
    [omission] = finer.manifest.omitted
    assert omission.name == "lm_head.weight"
    assert omission.reason == "trained in float32, rounded to bfloat16 of the target"


def test_a_saved_module_that_the_targets_dtype_cannot_hold_is_refused(tmp_path):
    options = {"modules_to_save": ["norm"], **ATTENTION}
    target, adapter = make_adapter(tmp_path, "llama", torch.float16, **options)
    large = {"base_model.model.model.norm.weight": torch.full((32,), 1e5)}
    wrong = changed(adapter, tmp_path / "loud", tensors=large)
    assert "beyond torch.float16, the target's dtype" in refusal(tmp_path, target, wrong)


def test_the_manifest_says_where_the_pack_comes_from_and_fits_the_schema(tmp_path):
    target, adapter = make_adapter(tmp_path, "llama_tied", **TIED_CASES["factors of the head"])
    adapter = changed(adapter, tmp_path / "named", {"base_model_name_or_path": "user/base"})
    manifest = import_lora(target, adapter, tmp_path / "x.skillpack").manifest
    assert (manifest.recipe, manifest.tuned.name) == ("lora", "named")
    assert manifest.provenance["base_model"] == "user/base"
    assert len(manifest.provenance["adapter_blake3"]) == 64
    assert [file.name for file in manifest.files] == ["config.json"]
    assert SkillPack.load(tmp_path / "x.skillpack").manifest == manifest
    schema = json.loads((ROOT / "docs" / "skillpack-v2.schema.json").read_text("utf-8"))
    jsonschema.validate(json.loads(manifest.to_json()), schema)


def test_a_tokenizer_that_the_adapter_changed_is_in_the_pack_and_one_saved_again_is_not(tmp_path):
    target, adapter = make_adapter(tmp_path, "llama", **ATTENTION)
    save_tokenizer(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        same = json.loads((target / name).read_text())
        (adapter / name).write_text(json.dumps(same, indent=7))
    (adapter / "config.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    assert [file.name for file in pack.manifest.files] == ["chat_template.jinja"]
    files = pack.side_files(Checkpoint.open(target))
    assert files == {"chat_template.jinja": b"{{ messages }}"}


def test_the_pack_of_an_adapter_is_hardly_larger_than_the_adapter(tmp_path):
    target, adapter = make_adapter(tmp_path, "llama", r=16)
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    factors = sum(tensor.nbytes for tensor in tensors_of(adapter).values())
    stored = sum(len(pack.payload(record.name)) for record in pack.manifest.tensors)
    assert stored == factors + 12 * 14
    assert (tmp_path / "x.skillpack").stat().st_size < (adapter / WEIGHTS).stat().st_size + 6000


# ------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A target and a plain adapter of it; never written."""
    return make_adapter(tmp_path_factory.mktemp("plain"), "llama", **ATTENTION)


Q = "base_model.model.model.layers.0.self_attn.q_proj."


def refusal(tmp_path, target, adapter, error=CheckpointError):
    """The one line with which an import is refused; nothing may be written."""
    with pytest.raises(error) as raised:
        import_lora(target, adapter, tmp_path / "refused.skillpack")
    assert not list(tmp_path.glob("*refused*"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA is read; merge the adapter"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"use_something_new": {"a": 1}}, "use_something_new is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"r": 4}, "has factors of rank 3, but adapter_config.json makes it 4"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": "three"}, "r: Input should be a valid integer"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"rank_pattern": {"q_proj": 2}}, "makes it 2"),
        ({"alpha_pattern": {"(": 2}}, "a pattern: "),
    ],
)
def test_settings_of_anything_but_a_plain_lora_are_refused(tmp_path, plain, settings, words):
    target, adapter = plain
    wrong = changed(adapter, tmp_path / "wrong", settings)
    assert words in refusal(tmp_path, target, wrong)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({Q + "lora_A.weight": None}, "has no counterpart"),
        ({Q + "lora_magnitude_vector": torch.ones(32)}, "is no part of a plain LoRA"),
        ({Q + "lora_B.bias": torch.ones(32)}, "is no part of a plain LoRA"),
        ({Q + "lora_A.weight": torch.full((3, 32), torch.nan)}, "NaN or infinite"),
        ({Q + "lora_B.weight": torch.ones(32, 3, 1, 1)}, "B [32, 3, 1, 1]"),
        ({Q + "lora_B.weight": torch.ones(32, 3, dtype=torch.int8)}, "is I8; expected one of BF16"),
        ({Q + "base_layer.weight": torch.ones(32, 32)}, "both change model.layers.0.self_attn"),
        ({"base_model.model.model.norm.weight": torch.ones(32).double()}, "is F64"),
        ({"base_model.model.model.norm.weight": torch.ones(31)}, "[31], in the target"),
        ({"base_model.model.nothing.weight": torch.ones(3)}, "changes nothing.weight, which"),
        ({Q + "lora_A.weight": torch.ones(3, 31)}, "(out, in) = [32, 31], in the target"),
    ],
)
def test_tensors_of_anything_but_a_plain_lora_of_this_target_are_refused(
    tmp_path, plain, tensors, words
):
    target, adapter = plain
    wrong = changed(adapter, tmp_path / "wrong", tensors=tensors)
    assert words in refusal(tmp_path, target, wrong)


def test_a_base_weight_saved_beside_its_factors_must_be_the_targets(tmp_path, plain):
    target, adapter = plain
    weight = load_model(target).state_dict()["model.layers.0.self_attn.q_proj.weight"]
    same = changed(adapter, tmp_path / "same", tensors={Q + "base_layer.weight": weight})
    pack = import_lora(target, same, tmp_path / "x.skillpack")
    assert pack.record("model.layers.0.self_attn.q_proj.weight").codec == "factors"


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_factors_that_fit_no_stack_of_experts_are_refused(tmp_path, architecture):
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    target, adapter = make_adapter(tmp_path, architecture, **options)
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    short = changed(adapter, tmp_path / "short", tensors={key: tensors_of(adapter)[key][1:]})
    words = refusal(tmp_path, target, short, CheckpointMismatchError)
    assert re.search(r"mlp\.experts, which has no weight of its own .* stack of experts", words)


def test_every_expert_has_its_own_words_of_the_stack(tmp_path):
    target, adapter = make_adapter(tmp_path, "mixtral")
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    stored, stem = tensors_of(adapter), "base_model.model.model.layers.1.mlp.experts."
    by_rows = {stored[stem + part + "lora_B.weight"].shape[0]: part for part in ("", "base_layer.")}
    left = stored[f"{stem}{by_rows[128]}lora_B.weight"].reshape(128, -1, 4)
    right = stored[f"{stem}{by_rows[128]}lora_A.weight"].reshape(4, -1, 32)
    for expert in range(4):
        for name, rows in {"w1": slice(0, 64), "w3": slice(64, 128)}.items():
            record = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            factors = pack.plain_factors(record)
            assert torch.equal(factors.left, left[rows, :, expert])
            assert torch.equal(factors.right, right[expert])


def test_an_adapter_of_another_architecture_is_refused(tmp_path, plain):
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    words = refusal(tmp_path, tmp_path / "gpt2", plain[1], CheckpointMismatchError)
    assert "use the model that the adapter was trained on" in words


def test_pickles_missing_files_and_damaged_ones_are_refused(tmp_path, plain):
    target, adapter = plain
    assert "expected the directory of a PEFT adapter" in refusal(tmp_path, target, tmp_path / "no")
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    assert "pickle can run code" in refusal(tmp_path, target, pickled)
    (pickled / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:100])
    assert "not a complete safetensors file" in refusal(tmp_path, target, pickled)
    (pickled / CONFIG).write_text("[" * 100_000)
    assert "cannot be read as JSON" in refusal(tmp_path, target, pickled)
    empty = changed(adapter, tmp_path / "empty", tensors=dict.fromkeys(tensors_of(adapter)))
    assert "holds no tensors" in refusal(tmp_path, target, empty)


def test_a_pack_that_cannot_be_written_leaves_nothing(tmp_path, plain):
    with pytest.raises(OutputError, match="cannot be written"):
        import_lora(*plain, tmp_path / "missing" / "x.skillpack")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_sums_leave_the_targets_dtype_is_refused(tmp_path):
    target, adapter = make_adapter(tmp_path, "llama", torch.float16, **ATTENTION)
    large = changed(adapter, tmp_path / "large", {"lora_alpha": 1e7})
    words = refusal(tmp_path, target, large)
    assert "q_proj.weight: target + adapter is beyond what F16 holds" in words
