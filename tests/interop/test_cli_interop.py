import json

import pytest
import torch
from interop.adapters import changed, make_adapter
from test_cli import refused, run
from tiny_models import make_pair, save_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target with a tokenizer, an adapter of it, and a tuned copy; never written."""
    folder = tmp_path_factory.mktemp("models")
    target, tuned = make_pair(folder, "llama", torch.bfloat16)
    for model in (target, tuned):
        save_tokenizer(model)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    return target, make_adapter(folder, "llama", **options)[1], tuned


@pytest.mark.slow
def test_an_adapter_becomes_a_pack_that_is_verified_and_used(tmp_path, models, capsys):
    target, adapter, _ = models
    file = tmp_path / "x.skillpack"
    assert run("import-lora", target, adapter, "-o", file, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pack_bytes"] == file.stat().st_size
    assert result["recipe"] == "lora"
    codecs = {tensor["name"]: tensor["codec"] for tensor in result["tensors"]}
    assert codecs["model.layers.1.self_attn.q_proj.weight"] == "factors"
    assert codecs["lm_head.weight"] == "exact"
    assert run("verify", file, "--target", target, "--full") == 0
    assert run("inspect", file) == 0
    assert run("generate", target, "--pack", file, "--prompt", "abc", "--max-new-tokens", 3) == 0
    assert run("import-lora", target, adapter, "-o", file, "--force") == 0
    assert "2 matrices by their factors, 1 tensor exactly" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pack_becomes_an_adapter_with_its_loss_on_rows(tmp_path, models, capsys):
    target, _, tuned = models
    file, rows = tmp_path / "x.skillpack", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "abc", "completion": " def"}\n')
    assert run("pack", target, tuned, "-o", file, "--recipe", "lossless") == 0
    capsys.readouterr()
    options = ("export", file, "--target", target, "--format", "peft", "--rows", rows)
    assert run(*options, "--rank", 4, "-o", tmp_path / "lora", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rank"], result["output"]) == (4, str(tmp_path / "lora"))
    assert result["fidelity"]["kl_mean"] > 0
    assert {part["kind"] for part in result["left_out"]} == {"embedding", "head", "norm"}
    assert run(*options, "-o", tmp_path / "wide") == 0
    text = capsys.readouterr().out
    assert "rank 32" in text
    assert "target + LoRA against target + pack: KL" in text
    assert "embedding" in text
    assert run("import-lora", target, tmp_path / "lora", "-o", tmp_path / "again.skillpack") == 0


def test_refusals_are_one_line_and_leave_nothing(tmp_path, models, capsys):
    target, adapter, tuned = models
    dora = changed(adapter, tmp_path / "dora", {"use_dora": True})
    file = tmp_path / "x.skillpack"
    assert "use_dora is set" in refused(capsys, "import-lora", target, dora, "-o", file)
    assert "is a folder" in refused(capsys, "import-lora", target, adapter, "-o", tmp_path)
    missing = tmp_path / "no" / "x.skillpack"
    assert "make it first" in refused(capsys, "import-lora", target, adapter, "-o", missing)
    assert run("import-lora", target, adapter, "-o", file, "--force") == 0
    to = ("-o", tmp_path / "lora")
    line = refused(capsys, "export", file, "--target", target, "--format", "gguf", *to)
    assert "format 'gguf' is unknown" in line
    assert "other values" in refused(capsys, "export", file, "--target", tuned, *to)
    rows = ("--rows", tmp_path / "none.jsonl")
    assert "none.jsonl" in refused(capsys, "export", file, "--target", target, *rows, *to)
    assert {path.name for path in tmp_path.iterdir()} == {"dora", "x.skillpack"}
