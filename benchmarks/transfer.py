"""What a target learns from a source, by training method: python benchmarks/transfer.py

The nursery's source is a GPT-2-style model with another tokenizer. The target is trained on its
answers by SFT, by SFT then DPO, by SFT of a low-rank adapter whose file is as large as the pack,
and by SFT with the source's distributions or hidden states beside the text. All methods of one seed
use the same prompts and answers. Writes the table of docs/benchmarks.md.
"""

import argparse
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from ledger import ROOT, Ledger, Record, command_line
from transfer_report import write_report

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.distill.pipeline import run_distill
from graftkit.evaluate import exact_match
from graftkit.models import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.outputs import MARKER
from graftkit.rows import read_rows
from graftkit.skillpack import SkillPack

SKILL = "clinc150_intent"
OTHERS = ("sms_spam", "scan_actions", "zh_pinyin", "addition_synth")  # skills of the target
TEST_ROWS, OTHER_ROWS = 400, 100
PROMPTS, EPOCHS = 4000, 3
CODE_STEPS = 100  # of the pack
SEEDS = (0, 1, 2)
LORA_RANK = 14  # 54,272 bytes a rank in bfloat16: 14 of them are 5 % of the target

WAYS: dict[str, dict[str, Any]] = {
    "sft": {"dpo": False},
    "sft + dpo": {},
    "lora": {"dpo": False, "sft": {"lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK}}},
    "sft + kl": {
        "dpo": False,
        "transfer": {"lm_weight": 0.5, "kl_weight": 0.5, "divergence": "reverse"},
    },
    "sft + hidden": {
        "dpo": False,
        "transfer": {"lm_weight": 1.0, "kl_weight": 0.0, "hidden_weight": 1.0},
    },
}
LORA_RATE = 4e-3


def settings(shared: Path, seed: int, way: str) -> dict[str, Any]:
    """The configuration of one run: the nursery's with fewer prompts, changed by the method."""
    with (ROOT / "configs" / "nursery.toml").open("rb") as file:
        config = tomllib.load(file)
    config |= {"seed": seed, "target": str(shared / "nursery" / "target")}
    config["prompts"] |= {
        "file": str(shared / "data" / "llm" / SKILL / "train.jsonl"),
        "limit": PROMPTS,
    }
    config["sources"][0]["model"] = str(shared / "nursery" / "source")
    config["sft"]["epochs"] = EPOCHS
    config["pack"]["train_steps"] = CODE_STEPS
    for name, value in WAYS[way].items():
        config[name] = (
            config[name] | value if isinstance(config.get(name), dict) and value else value
        )
    if way == "lora":
        config["sft"]["learning_rate"] = LORA_RATE
    return config


class Bench:
    """The rows on which target, source and tuned models are measured."""

    def __init__(self, shared: Path):
        data = shared / "data" / "llm"
        self.target = Checkpoint.open(shared / "nursery" / "target")
        self.source = Checkpoint.open(shared / "nursery" / "source")
        self.rows = read_rows(data / SKILL / "test.jsonl")[:TEST_ROWS]
        self.others = {name: read_rows(data / name / "test.jsonl")[:OTHER_ROWS] for name in OTHERS}

    def scores(self, model: Any, checkpoint: Checkpoint) -> Record:
        """Exact matches on the skill and on the other skills of the target."""
        tokenizer = usable_tokenizer(checkpoint)
        others = {name: exact_match(model, tokenizer, rows) for name, rows in self.others.items()}
        mean = sum(others.values()) / len(others)
        return {"skill": exact_match(model, tokenizer, self.rows), "others": mean, **others}

    def untouched(self) -> Record:
        """The scores of target and source before training."""
        source = load_model(self.source, torch.float32)
        own = exact_match(source, usable_tokenizer(self.source), self.rows)
        return {**self.scores(load_model(self.target, torch.float32), self.target), "source": own}

    def measure(self, folder: Path) -> Record:
        """The scores of a finished run's tuned model, and of the target with its pack."""
        tuned = self.scores(load_model(folder / "tuned", torch.float32), self.target)
        file = folder / "skill.skillpack"
        model = load_model(self.target, torch.float32)
        with attached(model, SkillPack.load(file)):
            packed = self.scores(model, self.target)
        return {
            **tuned,
            "packed_skill": packed["skill"],
            "packed_others": packed["others"],
            "pack_bytes": file.stat().st_size,
        }


def run_way(options: argparse.Namespace, seed: int, way: str) -> tuple[Path, Record]:
    """Run one method with the answers and scores of its seed."""
    draw = options.work / f"draw-{seed}"
    folder = options.work / f"{way.replace(' + ', '-')}-{seed}"
    for place in (draw, folder):
        place.mkdir(parents=True, exist_ok=True)
        config = settings(options.shared, seed, way)
        _config_of(place).write_text(tomli_w.dumps(config), encoding="utf-8")
    for stage in ("sample", "score"):
        run_distill(_config_of(draw), draw, stage)
    for name in (MARKER, "samples.jsonl", "samples.summary.jsonl", "scores.jsonl"):
        shutil.copyfile(draw / name, folder / name)
    if not (folder / "stages.json").exists():
        shutil.copyfile(draw / "stages.json", folder / "stages.json")
        _take_sft(options.work / f"sft-{seed}", folder, way)
    started = sum(os.times()[:4])
    stages = run_distill(_config_of(folder), folder)
    cpu = sum(os.times()[:4]) - started
    seconds = {stage: entry["seconds"] for stage, entry in stages.items()}
    return folder, {"cpu_seconds": round(cpu, 1), "stage_seconds": seconds, **_counts(stages)}


def _config_of(folder: Path) -> Path:
    """The configuration beside the folder, because a run writes into the folder."""
    return folder.with_name(f"{folder.name}.toml")


def _take_sft(done: Path, folder: Path, way: str) -> None:
    """Start DPO from the model of the method `sft`, if that was run before."""
    if way == "sft + dpo" and (done / "skill.skillpack").exists():
        shutil.copytree(done / "tuned", folder / "sft", dirs_exist_ok=True)
        for name in ("sft_log.jsonl", "stages.json"):
            shutil.copyfile(done / name, folder / name)


def _counts(stages: Record) -> Record:
    return {name: stages["select"][name] for name in ("rows", "pairs")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not in the ledger, then write the table."""
    parser = command_line(__doc__)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.work = options.out / "transfer"
    words = sys.argv[1:] if arguments is None else list(arguments)
    ledger = Ledger(options.out / "transfer.jsonl", "transfer.py", words, options.fresh)
    if not options.report_only:
        run(options, ledger)
    write_report(ledger.records, options.docs)


def run(options: argparse.Namespace, ledger: Ledger) -> None:
    """Run all methods of one seed before the next seed."""
    bench = Bench(options.shared)
    if not ledger.has({"way": "target"}):
        ledger.add({"way": "target", "seed": None}, bench.untouched())
    for seed in options.seeds:
        for way in options.ways:
            key = {"way": way, "seed": seed, "prompts": PROMPTS, "epochs": EPOCHS}
            if ledger.has(key):
                continue
            started = time.perf_counter()
            folder, costs = run_way(options, seed, way)
            record = {**costs, **bench.measure(folder)}
            record["seconds"] = round(time.perf_counter() - started, 1)
            ledger.add(key, record)
            print(seed, way, f"skill {record['skill']:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
