import json

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer, stream_all

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, OutputError, RowsError
from graftkit.models import calibration, load_model, tensor_roles, text
from graftkit.models.calibration import CovarianceStore, collect_covariances
from graftkit.rows import Row, encode_row, read_rows

ROWS = [Row("ab", " cde"), Row("hello there", " x"), Row("q", " r"), Row("abcdefgh", " ijklmnop")]


def save_model(folder, architecture="llama", tokenizer=True):
    tiny_models.build(architecture).save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return Checkpoint.open(folder)


def linear_modules(checkpoint):
    return [role.module for role in tensor_roles(checkpoint).values() if role.linear]


def collect(checkpoint, folder, rows=ROWS, modules=None, seed=0, **options):
    store = CovarianceStore(folder)
    modules = linear_modules(checkpoint) if modules is None else modules
    return store, collect_covariances(checkpoint, rows, modules, store, seed, **options)


def reference(checkpoint, modules):
    """Σ x xᵀ of every module, one row at a time through the whole model: nothing is padded."""
    model, tokenizer = load_model(checkpoint), calibration.usable_tokenizer(checkpoint)
    sums = {}

    def hook(name):
        def add(module, args):
            values = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + values.T @ values

        return add

    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    model.get_output_embeddings().register_forward_pre_hook(hook("head"))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([encode_row(tokenizer, row).ids]))
    return sums


@pytest.mark.parametrize("architecture", tiny_models.architectures())
def test_padded_batches_give_the_covariances_of_single_rows(tmp_path, architecture):
    checkpoint = save_model(tmp_path / "tuned", architecture)
    modules = linear_modules(checkpoint)
    store, summary = collect(checkpoint, tmp_path / "store")
    expected = reference(checkpoint, modules)
    assert set(expected) == {*modules, "head"}
    for name, matrix in expected.items():
        actual = store.get(name)
        assert actual.dtype == torch.float32
        assert torch.dist(actual, matrix) <= 1e-4 * matrix.norm(), name
    assert summary.rows == len(ROWS)
    tokenizer = calibration.usable_tokenizer(checkpoint)
    assert summary.tokens == sum(len(encode_row(tokenizer, row)) for row in ROWS)


def test_token_counts_are_those_of_the_rows(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")
    counts = collect(checkpoint, tmp_path / "store", [Row("aa", " b")])[0].get("tokens")
    assert counts.shape == (tiny_models.VOCABULARY,)
    actual = {token: int(counts[token]) for token in counts.nonzero().flatten().tolist()}
    assert actual == {2: 1, 4: 1, 4 + 65: 2, 4 + 66: 1}


def test_modules_fed_the_same_tensor_share_one_file(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")
    store, _ = collect(checkpoint, tmp_path / "store")
    # Two layers with q/k/v, o, gate/up and down; the head; the token counts.
    assert len(list((tmp_path / "store").glob("*.npy"))) == 2 * 4 + 2
    layer = "model.layers.0."
    assert torch.equal(store.get(layer + "self_attn.q_proj"), store.get(layer + "self_attn.v_proj"))
    assert not torch.equal(
        store.get(layer + "self_attn.q_proj"), store.get(layer + "self_attn.o_proj")
    )


def test_a_causal_model_never_computes_its_logits(tmp_path, monkeypatch):
    checkpoint = save_model(tmp_path / "tuned")
    names = linear_modules(checkpoint)
    assert "lm_head" in names

    def refuse(self, input_ids=None, logits_to_keep=0):
        raise AssertionError("the whole model ran")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", refuse)
    store, _ = collect(checkpoint, tmp_path / "store", modules=names)
    assert torch.equal(store.get("lm_head"), store.get("head"))


def test_two_runs_write_the_same_bytes_whatever_the_threads(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")
    threads = torch.get_num_threads()
    collect(checkpoint, tmp_path / "one")
    torch.set_num_threads(2)
    try:
        collect(checkpoint, tmp_path / "two")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_model_streamed_from_disk_gives_the_bytes_of_one_in_memory(tmp_path, monkeypatch):
    checkpoint = save_model(tmp_path / "tuned")
    collect(checkpoint, tmp_path / "whole")
    stream_all(monkeypatch)
    collect(checkpoint, tmp_path / "streamed")
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()


def test_a_finished_calibration_is_reused(tmp_path, monkeypatch):
    checkpoint = save_model(tmp_path / "tuned")
    store, summary = collect(checkpoint, tmp_path / "store")
    monkeypatch.setattr(calibration, "load_or_stream", None)
    again, reused = collect(checkpoint, tmp_path / "store")
    assert reused == summary
    assert torch.equal(again.get("head"), store.get("head"))


@pytest.mark.parametrize("change", ["seed", "rows", "modules", "weights", "unfinished"])
def test_a_calibration_of_another_job_is_redone(tmp_path, change):
    checkpoint = save_model(tmp_path / "tuned")
    collect(checkpoint, tmp_path / "store", rows=ROWS[:3])
    stale = tmp_path / "store" / "stale.npy"
    stale.touch()
    options = {"rows": ROWS[:3]}
    if change == "seed":
        options["seed"] = 1
    elif change == "rows":
        options["rows"] = ROWS
    elif change == "modules":
        options["modules"] = ["lm_head"]
    elif change == "weights":
        tiny_models.build("llama", seed=1).save_pretrained(tmp_path / "tuned")
        checkpoint = Checkpoint.open(tmp_path / "tuned")
    else:
        (tmp_path / "store" / "calibration.json").unlink()
        assert "head" not in CovarianceStore(tmp_path / "store")
    collect(checkpoint, tmp_path / "store", **options)
    assert not stale.exists()


def test_an_interrupted_calibration_leaves_no_marker(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(checkpoint, tmp_path / "store", progress=interrupt)
    assert list((tmp_path / "store").iterdir()) == []


def test_more_rows_than_needed_are_sampled_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 40)
    checkpoint = save_model(tmp_path / "tuned")
    rows = [Row(chr(65 + index), " same") for index in range(26)]
    first, summary = collect(checkpoint, tmp_path / "first", rows)
    assert (summary.rows, summary.tokens, summary.seed) == (5, 35, 0)
    second, _ = collect(checkpoint, tmp_path / "second", rows, seed=1)
    assert not torch.equal(first.get("tokens"), second.get("tokens"))


def test_rows_longer_than_a_micro_batch_are_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MICRO_BATCH_TOKENS", 8)
    _, summary = collect(save_model(tmp_path / "tuned"), tmp_path / "store")
    assert summary.rows_cut == 2
    assert summary.tokens == 7 + 8 + 4 + 8


def test_progress_counts_the_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MICRO_BATCH_TOKENS", 20)
    seen = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    collect(save_model(tmp_path / "tuned"), tmp_path / "store", progress=report)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_an_encoder_without_output_head_is_calibrated_on_its_last_hidden_state(tmp_path):
    folder = tmp_path / "tuned"
    transformers.BertModel(tiny_models.build("bert").config).save_pretrained(folder)
    save_tokenizer(folder)
    store, _ = collect(Checkpoint.open(folder), tmp_path / "store")
    assert store.get("head").shape == (32, 32)


def test_a_model_without_calibratable_modules_still_gets_head_and_tokens(tmp_path):
    store, _ = collect(save_model(tmp_path / "tuned"), tmp_path / "store", modules=[])
    assert "head" in store
    assert "tokens" in store


def test_an_activation_that_is_not_finite_is_refused_by_module(tmp_path):
    folder = tmp_path / "tuned"
    save_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tuned: the input of model\.layers\.1\.mlp\.gate"):
        collect(Checkpoint.open(folder), tmp_path / "store")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "bert"])
def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, architecture):
    checkpoint = save_model(tmp_path / "tuned", architecture, tokenizer=False)
    with pytest.raises(CheckpointError, match=r"tokenizer.* save the tokenizer into the model"):
        collect(checkpoint, tmp_path / "store")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")
    save_tokenizer(tmp_path / "tuned", size=99)
    with pytest.raises(CheckpointError, match="gives token 97, but the model has 96 embeddings"):
        collect(checkpoint, tmp_path / "store", [Row("a}", "")])


def test_a_row_beyond_the_context_and_rows_without_text_are_refused(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")
    with pytest.raises(RowsError, match=r"a row: the row has 102 tokens .* at most 64"):
        collect(checkpoint, tmp_path / "store", [Row("a" * 100, "b")])
    with pytest.raises(RowsError, match="no row has a token"):
        collect(checkpoint, tmp_path / "store", [])


def test_a_module_that_is_not_in_the_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"module model\.nothing is not in LlamaFor"):
        collect(save_model(tmp_path / "tuned"), tmp_path / "store", modules=["model.nothing"])


def test_an_encoder_decoder_model_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "tuned")
    save_tokenizer(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="an encoder-decoder model"):
        collect(Checkpoint.open(tmp_path / "tuned"), tmp_path / "store", modules=[])


def test_a_module_that_shares_its_input_only_sometimes_is_refused(tmp_path):
    checkpoint = save_model(tmp_path / "tuned")
    model = load_model(checkpoint)
    store = CovarianceStore(tmp_path / "store")
    collector = calibration._CovarianceCollector(model, [], store, "tuned")
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    collector._add(["a"], one)
    collector._add(["b"], one)
    with pytest.raises(CheckpointError, match="b shares its input with a in one pass"):
        collector._add(["b"], other)


def test_a_store_returns_what_was_put_whatever_the_key(tmp_path):
    store = CovarianceStore(tmp_path)
    store.put("../a/b\n", torch.eye(3))
    store.alias("other", "../a/b\n")
    assert torch.equal(store.get("other"), torch.eye(3))
    assert [file.parent for file in tmp_path.iterdir()] == [tmp_path]


def test_a_store_that_cannot_be_written_or_read_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: cannot be created .* needs a folder"):
        CovarianceStore(tmp_path / "file")
    store = CovarianceStore(tmp_path / "store")
    store.put("a", torch.eye(3))
    (file,) = (tmp_path / "store").glob("*.npy")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(OutputError, match=r"cannot be read .*; delete .*store and run again"):
        store.get("a")
    file.unlink()
    (tmp_path / "store").rmdir()
    with pytest.raises(OutputError, match=r"cannot be written .* free disk space"):
        store.put("a", torch.eye(3))


@pytest.mark.slow
def test_the_nursery_is_calibrated_on_16_thousand_tokens(tmp_path, shared):
    checkpoint = Checkpoint.open(shared / "nursery" / "clinc150_intent")
    rows = read_rows(shared / "data" / "llm" / "clinc150_intent" / "train.jsonl")
    store, summary = collect(checkpoint, tmp_path, rows)
    assert 16_000 < summary.tokens <= 16_384
    assert int(store.get("tokens").sum()) == summary.tokens
    assert json.loads((tmp_path / "calibration.json").read_text())["summary"]["rows"] > 500
