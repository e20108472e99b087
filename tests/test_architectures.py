"""The architecture sweep of benchmarks/architectures.py in small."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Chosen for what is special in each: fused or repeated experts, states, convolutions, windows,
# weights that are read without a call, tied or renamed tensors, two inputs, another encoder.
# What bert, gpt2, llama, mixtral and phi3 show is tested one by one, in attachment/ and interop/.
TYPES = (
    *("afmoe", "bloom", "clip", "deepseek_v3", "detr", "gemma3", "jetmoe", "llama4_text"),
    *("llava", "mamba", "mobilebert", "resnet", "rwkv", "segformer", "swin", "t5"),
    *("wav2vec2", "whisper", "xlnet"),
)


@pytest.fixture(autouse=True)
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_architecture_is_right_or_refused_in_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the script sets it
    from architectures import main

    options = ["--json", "--quick", "--types", ",".join(TYPES)]
    main([*options, "--out", str(tmp_path), "--docs", str(tmp_path)])
    lines = capfd.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert {record["type"] for record in records} == set(TYPES)
    faults = [
        (record["type"], name, cell["detail"])
        for record in records
        for name, cell in record.get("cells", {"": {"verdict": "CRASH", "detail": record}}).items()
        if cell["verdict"] in ("WRONG", "CRASH")
    ]
    assert faults == []
    packed = [record for record in records if record["cells"]["pack"]["verdict"] == "right"]
    assert len(packed) >= len(TYPES) - 2


def test_every_parameter_of_a_tiny_model_is_random_and_its_rows_are_answered():
    from tiny_architectures import class_names, tiny_model
    from tiny_inputs import answers, find_inputs

    model = tiny_model("vit", class_names("vit")[0])
    assert all(value.std() > 0 for value in model.parameters() if value.numel() > 1)
    assert sum(value.numel() for value in model.parameters()) < 1_000_000
    answered = answers(model, find_inputs(model))
    assert answered["logits"].shape[0] == 3


def test_a_distance_is_a_share_of_the_way_from_the_target_to_the_tuned_model():
    from architecture_checks import far

    base, want = {"logits": torch.zeros(3, 2)}, {"logits": torch.ones(3, 2)}
    got = {"logits": torch.tensor([[1.0, 1.0], [0.5, 1.0], [1.0, 1.0]])}
    assert far(got, want, base) == 0.5
    assert far(got, want, base, [0]) == 0
    assert far({"logits": got["logits"][:2]}, want, base) == float("inf")


def test_the_sweep_writes_a_row_a_type_and_counts_verdicts(tmp_path):
    from architectures_report import write_report

    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- architectures:begin -->\n<!-- architectures:end -->\n")
    folder = "/somewhere/architecture-ab12"
    refusal = f"CheckpointError: {folder}/target: a.b.c.weight is refused; do this"
    stamp = {"date": "2026-01-01", "commit": "abc", "machine": MACHINE, "quick": True}
    cells = {"pack": {"verdict": "refused", "detail": refusal}}
    built = {"class": "BertModel", "parameters": 7, "inputs": ["input_ids"], "cells": cells}
    records = [{**stamp, "type": "bert", **built}, {**stamp, "type": "x", "unbuilt": "no class"}]
    write_report(records, tmp_path)
    table = (tmp_path / "results" / "architectures.csv").read_text().splitlines()
    assert table[1].startswith("bert,BertModel,7,input_ids,refused,")
    assert table[2].startswith("x,,,,not built,")
    assert "architecture-ab12" not in "".join(table) + page.read_text()
    assert "1 of 2 model types were built and checked" in page.read_text()
    assert "| *pack*: packed without loss | 0 | 1 | 0 | 0 |" in page.read_text()


MACHINE = {
    **{"cpu": "C", "cores": 2, "ram_gib": 4, "system": "Linux"},
    **{"python": "3.11", "torch": "2", "transformers": "5"},
}
