import pytest
import tiny_models
import torch
from tiny_models import save_tokenizer, stream_all

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models import backward, calibration, load_model, tensor_roles
from graftkit.models.backward import collect_sensitivities
from graftkit.models.calibration import CovarianceStore, collect_covariances
from graftkit.models.text import encode_rows, usable_tokenizer
from graftkit.rows import Row

ROWS = [Row(f"{a}{b} ", f" {b}{a * n}") for n, a in enumerate("abcdefg", 1) for b in "xyz"]


def save_model(folder, architecture="llama", dtype=torch.float32, scale=0.1):
    tiny_models.build(architecture, dtype, scale=scale).save_pretrained(folder)
    save_tokenizer(folder)
    return Checkpoint.open(folder)


def linear_modules(checkpoint):
    return [role.module for role in tensor_roles(checkpoint).values() if role.linear]


def collect(checkpoint, folder, rows=ROWS, modules=None, seed=0, **options):
    store = CovarianceStore(folder)
    modules = linear_modules(checkpoint) if modules is None else modules
    return store, collect_sensitivities(checkpoint, rows, modules, store, seed, **options)


def tokens_of(checkpoint, model, rows):
    tokenizer = usable_tokenizer(checkpoint)
    return encode_rows(tokenizer, rows, 10**6, 0, model, "tuned")


def fixed_answer(logits):
    """The likeliest token, in place of a draw."""
    return logits.argmax(dim=-1)


def take_fixed_answers(monkeypatch):
    def sample(self, logits, span):
        expected = torch.nn.functional.one_hot(fixed_answer(logits), logits.shape[1])
        return expected - logits.softmax(dim=1)

    monkeypatch.setattr(backward._SensitivityCollector, "_sample", sample)


def reference(checkpoint, modules):
    """The same sums by plain autograd, row by row through the whole model."""
    model, sums, outputs = load_model(checkpoint), {}, {}
    for name in modules:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
    count = 0
    for row in tokens_of(checkpoint, model, ROWS):
        logits = model(torch.tensor([row.ids])).logits[0]
        if model.can_generate():
            logits = logits[row.start - 1 : len(row) - 1]
        count += len(logits)
        score = logits.log_softmax(dim=1).gather(1, fixed_answer(logits)[:, None]).sum()
        actual = torch.autograd.grad(score, [outputs[name] for name in modules])
        for name, gradient in zip(modules, actual, strict=True):
            squares = gradient.double().square().reshape(-1, gradient.shape[-1]).sum(dim=0)
            sums[name] = sums.get(name, 0) + squares
    return {name: value / count for name, value in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "gpt_neox", "mixtral", "bert"])
def test_streamed_padded_batches_give_the_gradients_of_plain_autograd(
    tmp_path, monkeypatch, architecture
):
    monkeypatch.setattr(backward, "_CHUNK_BYTES", 4 * tiny_models.VOCABULARY * 5)
    take_fixed_answers(monkeypatch)
    stream_all(monkeypatch)
    checkpoint = save_model(tmp_path / "tuned", architecture)
    head = load_model(checkpoint).get_output_embeddings()
    live = dict(load_model(checkpoint).named_modules())
    modules = [n for n in linear_modules(checkpoint) if live[n].weight.shape != head.weight.shape]
    store, summary = collect(checkpoint, tmp_path / "store", modules=modules)
    assert summary.rows == len(ROWS)
    assert summary.scored > 0
    for name, vector in reference(checkpoint, modules).items():
        actual = store.get(f"gradient:{name}")
        assert actual.dtype == torch.float32
        assert torch.dist(actual, vector) <= 1e-4 * vector.norm(), name


def divergence(model, other, rows):
    """KL(model ‖ other), mean over the completions' tokens."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        span = slice(row.start - 1, len(row) - 1)
        with torch.no_grad():
            p, q = (m(ids).logits[0, span].double().log_softmax(dim=1) for m in (model, other))
        total += float((p.exp() * (p - q)).sum())
        count += p.shape[0]
    return total / count


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A checkpoint with its sensitivities and covariances."""
    folder = tmp_path_factory.mktemp("measured")
    checkpoint = save_model(folder / "tuned", scale=0.2)
    modules = linear_modules(checkpoint)
    store, _ = collect(checkpoint, folder / "sensitivities")
    inputs = CovarianceStore(folder / "covariances")
    collect_covariances(checkpoint, ROWS, modules, inputs, 0)
    return checkpoint, store, inputs


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "lm_head"]
)
def test_the_predicted_divergence_of_a_small_error_is_about_the_measured_one(measured, name):
    checkpoint, store, inputs = measured
    model, other = load_model(checkpoint), load_model(checkpoint)
    weight = other.get_submodule(name).weight.data
    error = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    weight += error
    head = name == "lm_head"
    tokens = inputs.get("tokens").sum()
    covariance = store.get("head:completions") if head else inputs.get(name) / tokens
    energies = ((error @ covariance) * error).sum(dim=1)
    predicted = 0.5 * float(store.get(f"gradient:{name}").mean() * energies.sum())
    measured_kl = divergence(model, other, tokens_of(checkpoint, model, ROWS))
    assert predicted / 2 < measured_kl < 2 * predicted


def test_the_embedding_answers_for_the_tokens_that_were_read(measured):
    checkpoint, store, _ = measured
    vector = store.get("gradient:embedding")
    read = torch.zeros_like(vector)
    for row in tokens_of(checkpoint, load_model(checkpoint), ROWS):
        read[row.ids[:-1]] = 1  # EOS predicts nothing
    assert vector.shape == (tiny_models.VOCABULARY,)
    assert torch.equal(vector > 0, read > 0)


def test_the_head_is_measured_where_logits_count(measured):
    checkpoint, store, _ = measured
    model, inputs, probabilities = load_model(checkpoint), [], []
    model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for row in tokens_of(checkpoint, model, ROWS):
        span = slice(row.start - 1, len(row) - 1)
        with torch.no_grad():
            probabilities.append(model(torch.tensor([row.ids])).logits[0, span].softmax(dim=1))
        inputs[-1] = inputs[-1][span]
    p, x = torch.cat(probabilities), torch.cat(inputs)
    assert torch.allclose(store.get("gradient:head"), (p * (1 - p)).mean(dim=0), atol=1e-6)
    assert torch.allclose(store.get("gradient:lm_head"), store.get("gradient:head"))
    assert torch.allclose(store.get("head:completions"), x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_no_weight_stays_in_memory_after_a_pass(tmp_path, monkeypatch):
    stream_all(monkeypatch)
    models = []
    stream = calibration.load_or_stream
    monkeypatch.setattr(
        calibration, "load_or_stream", lambda *args: models.append(stream(*args)) or models[0]
    )
    collect(save_model(tmp_path / "tuned"), tmp_path / "store")
    assert {value.device.type for value in models[0].parameters()} == {"meta"}
    assert not any(value.grad is not None for value in models[0].parameters())


def test_bfloat16_gives_about_the_sensitivities_of_float32(tmp_path):
    checkpoints = [
        save_model(tmp_path / str(dtype), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    stores = [collect(c, tmp_path / f"store{i}")[0] for i, c in enumerate(checkpoints)]
    for name in linear_modules(checkpoints[0]):
        whole, half = (float(store.get(f"gradient:{name}").mean()) for store in stores)
        assert half == pytest.approx(whole, rel=0.2)


@pytest.mark.slow
def test_a_finished_store_is_kept_and_another_seed_fills_it_anew(tmp_path, monkeypatch):
    checkpoint = save_model(tmp_path / "tuned")
    name = "gradient:model.layers.0.mlp.up_proj"
    store, summary = collect(checkpoint, tmp_path / "store")
    first = store.get(name)
    other, _ = collect(checkpoint, tmp_path / "store", seed=1)
    assert not torch.equal(first, other.get(name))
    again, _ = collect(checkpoint, tmp_path / "store")
    assert torch.equal(first, again.get(name))
    monkeypatch.setattr(calibration, "load_or_stream", None)
    assert collect(checkpoint, tmp_path / "store")[1] == summary


def test_a_module_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="module nowhere is not in LlamaForCausalLM"):
        collect(save_model(tmp_path / "tuned"), tmp_path / "store", modules=["nowhere"])
