"""Write tests/golden/mergekit: a tiny target, tuned copies, and what mergekit makes of them.

mergekit (LGPL-3.0) is run as a process of its own; nothing of it is imported or copied:

    python tools/make_mergekit_golden.py PATH/TO/mergekit-yaml

The files are never made anew, so this refuses to replace them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mergekit"
TUNED = 3
WEIGHTS = (1.0, 0.5, 0.25)
CASES: dict[str, tuple[str, dict[str, float]]] = {  # name: (method, settings)
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.7}),
    "ties": ("ties", {"density": 0.3}),
    "ties_scaled": ("ties", {"density": 0.5, "lambda": 0.5}),
    "sce": ("sce", {"select_topk": 0.1}),
    "sce_all": ("sce", {"select_topk": 1.0}),
}


def make_models(folder: Path) -> None:
    """A seeded one-layer target and tuned copies whose every weight moved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    target = LlamaForCausalLM(config).float()
    target.save_pretrained(folder / "target")
    weights = load_file(folder / "target" / "model.safetensors")
    for index in range(TUNED):
        tuned = folder / f"tuned-{index}"
        shutil.copytree(folder / "target", tuned)
        moved = {name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}
        save_file(moved, tuned / "model.safetensors", {"format": "pt"})


def configuration(folder: Path, method: str, settings: dict[str, float]) -> str:
    """A merge in mergekit's own words; JSON is YAML."""
    weighted = method != "sce"
    models = [
        {
            "model": str(folder / f"tuned-{index}"),
            "parameters": {"weight": weight} if weighted else {},
        }
        for index, weight in enumerate(WEIGHTS)
    ]
    merge = {"merge_method": method, "models": models, "dtype": "float32", "parameters": settings}
    if method != "linear":
        merge["base_model"] = str(folder / "target")
    return json.dumps(merge)


def run_mergekit(command: Path, folder: Path, name: str) -> Path:
    """Run one case; returns the folder of the merged model."""
    method, settings = CASES[name]
    file = folder / f"{name}.yaml"
    file.write_text(configuration(folder, method, settings), encoding="utf-8")
    output = folder / f"merged-{name}"
    subprocess.run([command, file, output, "--no-copy-tokenizer"], check=True)
    return output


def main(command: Path) -> int:
    """Write models and results; refuse where they exist."""
    if GOLDEN.exists():
        print(f"{GOLDEN}: exists, and golden files are never made anew", file=sys.stderr)
        return 1
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder)
        results = {name: run_mergekit(command, folder, name) for name in CASES}
        GOLDEN.mkdir(parents=True)
        shutil.copy(folder / "target" / "config.json", GOLDEN / "config.json")
        for name in ["target", *(f"tuned-{index}" for index in range(TUNED))]:
            results[name] = folder / name
        for name, source in results.items():
            save_file(load_file(source / "model.safetensors"), GOLDEN / f"{name}.safetensors")
    cases = {
        name: {"method": method, "settings": settings, "weights": WEIGHTS}
        for name, (method, settings) in CASES.items()
    }
    (GOLDEN / "cases.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
