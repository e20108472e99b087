import json
import math

import pytest
import torch
from interop.adapters import CONFIG, WEIGHTS, logits, make_adapter, peft_model, tensors_of
from safetensors.torch import load_file, save_file
from tiny_models import architectures, build, lossless_pack, make_pair, perturb, save_tokenizer

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.compress.factors import Factors, store
from graftkit.errors import ConfigError, OutputError, PackMismatchError, RowsError
from graftkit.fuse import merge_packs
from graftkit.interop import export_lora, import_lora
from graftkit.interop.lora_import import read_lora
from graftkit.models import load_model, tensor_roles
from graftkit.rows import Row
from graftkit.skillpack import SkillPack
from graftkit.skillpack.container import payloads_digest

ROWS = [Row("abc", " def"), Row("hello", " you"), Row("12", " 34 5")]


def products(adapter):
    """Scaled A B products by module."""
    settings = json.loads((adapter / CONFIG).read_text())
    stored = tensors_of(adapter)
    stems = [name.removesuffix("lora_A.weight") for name in stored if "lora_A" in name]
    scale = settings["lora_alpha"] / settings["r"]
    return {
        stem: scale
        * stored[stem + "lora_B.weight"].double()
        @ stored[stem + "lora_A.weight"].double()
        for stem in stems
    }


def linear_pair(folder, architecture, dtype=torch.float32):
    """A target, and a tuned copy of which only the linear layers inside moved."""
    model = build(architecture, dtype)
    model.save_pretrained(folder / "target")
    roles = tensor_roles(Checkpoint.open(folder / "target"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    perturb(model, seed=1, scale=0.02)
    kept = {role.parameter for role in roles.values() if role.linear and role.kind != "head"}
    model.load_state_dict({n: v for n, v in before.items() if n not in kept}, strict=False)
    model.save_pretrained(folder / "tuned")
    return folder / "target", folder / "tuned"


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    architectures(
        ["llama", "llama_tied", "gpt2", "gpt_neox", "phi3", "bert"], quick=("llama", "gpt2", "phi3")
    ),
)
def test_peft_loads_a_lora_of_full_rank_as_the_tuned_model(tmp_path, architecture):
    target, tuned = linear_pair(tmp_path, architecture)
    pack = lossless_pack(target, tuned)
    result = export_lora(pack, target, tmp_path / "lora", rank=32)
    assert result.left_out == ()
    assert result.relative_error < 1e-4
    actual, expected = logits(peft_model(target, tmp_path / "lora")), logits(load_model(tuned))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert (expected - logits(load_model(target))).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lora_comes_out_as_it_went_in(tmp_path, dtype):
    target, adapter = make_adapter(tmp_path, "llama", r=4, lora_alpha=8)
    save = {name: tensor.to(dtype) for name, tensor in tensors_of(adapter).items()}
    save_file(save, adapter / WEIGHTS)
    first = import_lora(target, adapter, tmp_path / "1.skillpack")
    result = export_lora(first, target, tmp_path / "lora")
    assert (result.rank, result.relative_error) == (4, pytest.approx(0, abs=1e-6))
    assert all(module.own_factors for module in result.modules)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "lora").values()} == {dtype}
    second = import_lora(target, tmp_path / "lora", tmp_path / "2.skillpack")
    before, after = products(adapter), products(tmp_path / "lora")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for record in second.manifest.tensors:
        weight = Checkpoint.open(target).read(record.name)
        assert torch.equal(first.decode(record.name, weight), second.decode(record.name, weight))


@pytest.mark.slow
def test_scales_and_ranks_of_single_modules_go_into_b_and_zeros(tmp_path):
    options = {"r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"q_proj": 7}}
    target, adapter = make_adapter(tmp_path, "llama", torch.bfloat16, **options)
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    result = export_lora(pack, target, tmp_path / "lora")
    assert (result.rank, result.relative_error) == (7, pytest.approx(0, abs=1e-6))
    stored = tensors_of(tmp_path / "lora")
    assert {min(tensor.shape) for tensor in stored.values()} == {7}
    actual, expected = (
        logits(peft_model(target, a, torch.float32)) for a in (tmp_path / "lora", adapter)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_factors_above_the_rank_asked_are_cut_to_the_best_of_that_rank(tmp_path):
    target, adapter = make_adapter(tmp_path, "llama", r=8, lora_alpha=8)
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    result = export_lora(pack, target, tmp_path / "lora", rank=2)
    assert not any(module.own_factors for module in result.modules)
    after = products(tmp_path / "lora")
    for name, delta in products(adapter).items():
        least = torch.linalg.svdvals(delta)[2:].square().sum().sqrt()
        assert float((delta - after[name]).norm()) <= float(least) * 1.0001
    errors = [module.relative_error for module in result.modules]
    assert 0 < min(errors) <= result.relative_error <= max(errors) < 1


def test_everything_is_carried_or_listed_with_its_share(tmp_path):
    target, tuned = make_pair(tmp_path, "mixtral")
    pack = lossless_pack(target, tuned)
    result = export_lora(pack, target, tmp_path / "lora", rank=4)
    names = [*(part.name for part in result.modules), *(part.name for part in result.left_out)]
    assert sorted(names) == [record.name for record in pack.manifest.tensors]
    assert {part.kind for part in result.left_out} == {"embedding", "head", "mlp", "norm", "router"}
    shares = [part.energy_share for part in (*result.modules, *result.left_out)]
    assert math.isclose(sum(shares), 1, rel_tol=1e-6)
    assert min(shares) > 0
    lost = sum(part.energy_share for part in result.left_out)
    assert math.sqrt(lost) < result.relative_error_overall < 1
    head = next(part for part in result.left_out if part.kind == "head")
    weights = [
        Checkpoint.open(folder).read("lm_head.weight").double() for folder in (target, tuned)
    ]
    layer = next(part for part in result.modules if part.name.endswith("0.self_attn.q_proj.weight"))
    other = [Checkpoint.open(folder).read(layer.name).double() for folder in (target, tuned)]
    ratio = float((weights[1] - weights[0]).square().sum() / (other[1] - other[0]).square().sum())
    assert head.energy_share / layer.energy_share == pytest.approx(ratio, rel=1e-4)


def test_the_error_quoted_is_that_of_the_factors_on_disk(tmp_path):
    target, tuned = make_pair(tmp_path, "gpt2")
    pack = lossless_pack(target, tuned)
    result = export_lora(pack, target, tmp_path / "lora", rank=4)
    stored = products(tmp_path / "lora")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "lora").values()} == {torch.bfloat16}
    before, after = Checkpoint.open(target), Checkpoint.open(tuned)
    for module in result.modules:
        delta = (after.read(module.name).double() - before.read(module.name).double()).T
        lost = delta - stored[f"base_model.model.{module.module}."]
        assert module.relative_error == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)
    assert result.adapter_bytes == (tmp_path / "lora" / WEIGHTS).stat().st_size


def test_a_pack_of_low_rank_gives_its_own_factors(tmp_path):
    target, _ = make_pair(tmp_path, "llama", torch.float32)
    pack = _spiked(target, rank=5)
    result = export_lora(pack, target, tmp_path / "lora", rank=6)
    assert all(module.own_factors for module in result.modules)
    assert result.relative_error < 1e-6


@pytest.mark.slow
def test_the_default_rank_is_the_smallest_that_keeps_the_energy(tmp_path):
    target, tuned = linear_pair(tmp_path, "llama")
    flat = lossless_pack(target, tuned)
    assert export_lora(flat, target, tmp_path / "flat").rank == 32
    [fast, slow] = (_spiked(target, rank=12, decay=decay) for decay in (0.1, 1.0))
    for pack, rank in ((fast, 12), (slow, 12)):
        assert export_lora(pack, target, tmp_path / f"own-{id(pack)}").rank == rank
    merged = _tuned_from(fast, target, tmp_path)
    assert export_lora(merged, target, tmp_path / "loud").rank == 8
    merged = _tuned_from(slow, target, tmp_path)
    assert export_lora(merged, target, tmp_path / "quiet").rank == 16


def _tuned_from(pack, target, folder):
    """A lossless pack of what another pack makes of the target."""
    merged = merge_packs(target, pack, folder / f"merged-{id(pack)}")
    return lossless_pack(target, merged)


def _spiked(target, rank, decay=0.5):
    """A pack that adds orthogonal factors of this rank to every linear layer."""
    checkpoint = Checkpoint.open(target)
    generator = torch.Generator().manual_seed(0)
    pack = lossless_pack(target, target)
    roles, records, payloads = tensor_roles(checkpoint), [], {}
    for record in pack.manifest.tensors:
        role = roles[record.name]
        if role.linear and role.kind != "head":
            rows, columns = record.shape
            left = torch.linalg.qr(torch.randn(rows, rank, generator=generator))[0]
            right = torch.linalg.qr(torch.randn(columns, rank, generator=generator))[0].T
            left = (left * decay ** torch.arange(rank)).contiguous()
            payloads[record.name] = memoryview(store(Factors(left, right.contiguous(), 0.5)))
            fields = {"codec": "factors", "bytes": len(payloads[record.name])}
            record = record.model_copy(update=fields)
        records.append(record)
    fields = {"tensors": tuple(records), "payload_blake3": payloads_digest(payloads.values())}
    return SkillPack(pack.manifest.model_copy(update=fields), payloads)


@pytest.mark.slow
def test_the_divergence_is_that_of_the_adapter_on_disk_from_the_pack(tmp_path):
    target, tuned = make_pair(tmp_path, "llama")
    save_tokenizer(target)
    save_tokenizer(tuned)
    pack = lossless_pack(target, tuned)
    coarse, fine = (
        export_lora(pack, target, tmp_path / f"{rank}", rank, ROWS).fidelity for rank in (1, 32)
    )
    assert coarse.kl_mean > fine.kl_mean > 1e-6
    assert coarse.tokens == 16
    _, adapter = make_adapter(tmp_path, "llama")
    lora = import_lora(target, adapter, tmp_path / "x.skillpack")
    same = export_lora(lora, target, tmp_path / "same", rows=ROWS).fidelity
    assert same.kl_mean < 1e-9
    assert same.top1_agreement == 1


@pytest.mark.slow
def test_what_is_read_back_answers_as_peft_does(tmp_path):
    target, tuned = make_pair(tmp_path, "qwen3", torch.float32)
    pack = lossless_pack(target, tuned)
    export_lora(pack, target, tmp_path / "lora", rank=3)
    model = load_model(target)
    with attached(model, read_lora(target, tmp_path / "lora")):
        actual = logits(model)
    expected = logits(peft_model(target, tmp_path / "lora"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ refusals


@pytest.mark.slow
def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    target, tuned = make_pair(tmp_path, "llama")
    pack = lossless_pack(target, tuned)
    unchanged = lossless_pack(target, target)
    files = {*tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="rank is 0; it must be at least 1"):
        export_lora(pack, target, tmp_path / "lora", rank=0)
    with pytest.raises(ConfigError, match="changes no linear layer"):
        export_lora(unchanged, target, tmp_path / "lora")
    with pytest.raises(PackMismatchError, match="other values"):
        export_lora(pack, tuned, tmp_path / "lora")
    with pytest.raises(OutputError, match="not an empty folder"):
        export_lora(pack, target, target)
    save_tokenizer(target)
    with pytest.raises(RowsError, match="shorten the row"):
        export_lora(pack, target, tmp_path / "lora", 2, [Row("a" * 80, " b")])
    assert {*tmp_path.iterdir()} == files


def test_an_empty_folder_is_filled_and_holds_the_two_files_of_an_adapter(tmp_path):
    target, tuned = make_pair(tmp_path, "gpt2")
    pack = lossless_pack(target, tuned)
    (tmp_path / "lora").mkdir()
    export_lora(pack, target, tmp_path / "lora", rank=2)
    assert {file.name for file in (tmp_path / "lora").iterdir()} == {CONFIG, WEIGHTS}
    settings = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["fan_in_fan_out"]) == (2, 2, True)
    assert settings["task_type"] == "CAUSAL_LM"
    stored = load_file(tmp_path / "lora" / WEIGHTS)
    assert len(stored) == 2 * len(settings["target_modules"]) == 16


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_deltas_of_any_size_are_exported(tmp_path, scale):
    target, tuned = linear_pair(tmp_path, "llama")
    weights = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    states = {"target": torch.zeros_like(weights[name]), "tuned": scale * weights[name]}
    for folder, value in states.items():
        save_file(weights | {name: value}, tmp_path / folder / "model.safetensors")
    pack = lossless_pack(target, tuned)
    result = export_lora(pack, target, tmp_path / "lora", rank=64)
    [module] = [module for module in result.modules if module.name == name]
    assert module.relative_error < 1e-3
