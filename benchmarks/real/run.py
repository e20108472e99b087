"""Everything measured on a real model, in one command: python benchmarks/real/run.py

A stage makes one file or folder of the work folder, and is skipped when that is there: an
interrupted run goes on where it stopped. A stage runs in a process of its own, writes under another
name and is renamed at the end. Its settings are in its name, so a changed setting is another stage.
Stages whose settings another stage chooses (the learning rate of LoRA) appear when that is made.

`--list` shows the stages, `--only NAME` runs those whose names match (`lora-*`). The tables are
written at the end, of what there is: `--only report` makes no stage and writes them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from frontier import (
    adapter_stages,
    cell_stages,
    chat_stage,
    first_cells,
    other_cells,
    reference_stages,
)
from report import write_report
from stages import Setup, Stage, run_pending, run_stage
from tasks import (
    BATCH_ROWS,
    DPO_RATE,
    DPO_STEPS,
    FULL_RATE,
    SKILLS,
    TEXT_RATE,
    TEXT_STEPS,
    Pair,
    Skill,
    all_pairs,
    split_documents,
    split_rows,
)

ROOT = Path(__file__).parents[2]
LORA_RATES = (1e-3, 3e-4, 2e-3)
LORA_RATE_FILE = "lora-rate.json"
LORA_CHOICE_RANK = 4
LORA_CHOICE_SKILL = "snips_function_call"
LORA_RANKS = (1, 16, 64)
MORE_LORA_RANKS = (2, 8, 32)


def all_stages(setup: Setup) -> list[Stage]:
    """Every stage whose settings are known by now, in the order in which they run."""
    pairs = all_pairs()
    skills, others = pairs[: len(SKILLS)], pairs[len(SKILLS) :]
    stages = [Stage("target", lambda out: _make_target(setup, out))]
    stages += [_tuned_stage(setup, pair) for pair in skills]
    stages += [chat_stage(setup), *(s for pair in skills for s in reference_stages(setup, pair))]
    stages += _rate_stages(setup)
    stages += _adapter_stages(setup, (LORA_CHOICE_RANK, *LORA_RANKS))
    stages += [_tuned_stage(setup, pair) for pair in others]
    stages += [stage for pair in others for stage in reference_stages(setup, pair)]
    stages += cell_stages(setup, first_cells(setup.tag))
    stages += _adapter_stages(setup, MORE_LORA_RANKS)
    stages += cell_stages(setup, other_cells(setup.tag))
    return stages


def _rate_stages(setup: Setup) -> list[Stage]:
    """LoRA at every learning rate on one skill, and the choice."""
    skill = next(pair.skill for pair in all_pairs() if _is_chooser(pair))
    trials = [_lora_stage(setup, skill, LORA_CHOICE_RANK, rate) for rate in LORA_RATES]
    needs = tuple(trial.name for trial in trials)
    return [*trials, Stage(LORA_RATE_FILE, lambda out: _choose_rate(setup, skill, out), needs)]


def _adapter_stages(setup: Setup, ranks: Sequence[int]) -> list[Stage]:
    """LoRA adapters of all skills at the chosen rate, and their scores; none before the choice."""
    rate = lora_rate(setup.work)
    if rate is None:
        return []
    stages: list[Stage] = []
    for rank in ranks:
        for pair in all_pairs()[: len(SKILLS)]:
            stages.append(_lora_stage(setup, pair.skill, rank, rate))
            stages += adapter_stages(setup, pair, stages[-1].name)
    return stages


def _is_chooser(pair: Pair) -> bool:
    return pair.skill is not None and pair.skill.name == LORA_CHOICE_SKILL


def lora_name(skill: Skill, rank: int, rate: float) -> str:
    """The stage of a LoRA adapter."""
    return f"lora-{skill.short}-r{rank}-{rate:g}"


def lora_rate(work: Path) -> float | None:
    """The learning rate that validation rows chose; None before that."""
    file = work / LORA_RATE_FILE
    return json.loads(file.read_text())["rate"] if file.exists() else None


def _choose_rate(setup: Setup, skill: Skill, out: Path) -> None:
    """The rate with the least loss on validation rows; exact matches are recorded beside it."""
    from measure import LiveModel, lora_state, validation_scores

    live = LiveModel(setup.work / "target")
    rows = split_rows(setup.data, skill).validation
    scores = {}
    for rate in LORA_RATES:
        folder = setup.work / lora_name(skill, LORA_CHOICE_RANK, rate)
        with live.holding(lora_state(live, folder)):
            scores[rate] = validation_scores(live, rows)
    best = min(scores, key=lambda rate: scores[rate]["loss"])
    out.write_text(json.dumps({"rate": best, "scores": scores}, indent=1) + "\n")


def _make_target(setup: Setup, out: Path) -> None:
    import tune

    from graftkit.demo.real import make_chat_model

    if setup.target is None:
        make_chat_model(out)
    else:
        tune.check_target(setup.target)
        out.symlink_to(setup.target.resolve())


def _tuned_stage(setup: Setup, pair: Pair) -> Stage:
    makers = {"dpo": _train_dpo, "text": _train_text}
    make = makers.get(pair.name, _train_full)
    return Stage(pair.tuned, lambda out: make(setup, pair, out), (pair.target,))


def _train_full(setup: Setup, pair: Pair, out: Path) -> None:
    import tune

    skill = pair.skill
    assert skill is not None
    pack = setup.shared and setup.shared / f"{skill.name}.skillpack"
    if pack and pack.is_file():
        command = [sys.executable, "-m", "graftkit", "merge", "--output", str(out)]
        subprocess.run([*command, str(setup.work / pair.target), str(pack)], check=True)
        return
    schedule = tune.Schedule(FULL_RATE, skill.row_count // BATCH_ROWS)
    tune.tune_full(setup.work / pair.target, split_rows(setup.data, skill).train, schedule, out)


def _train_dpo(setup: Setup, pair: Pair, out: Path) -> None:
    import tune

    rows = split_rows(setup.data, pair.skill).unused
    schedule = tune.Schedule(DPO_RATE, DPO_STEPS)
    tune.tune_preferences(setup.work / pair.target, rows, schedule, out)


def _train_text(setup: Setup, pair: Pair, out: Path) -> None:
    import tune

    documents, _ = split_documents(setup.data)
    schedule = tune.Schedule(TEXT_RATE, TEXT_STEPS)
    tune.tune_text(setup.work / pair.target, documents, schedule, out)


def _lora_stage(setup: Setup, skill: Skill, rank: int, rate: float) -> Stage:
    def make(out: Path) -> None:
        import tune

        schedule = tune.Schedule(rate, skill.row_count // BATCH_ROWS)
        settings = tune.LoraSettings(rank, 2 * rank)
        rows = split_rows(setup.data, skill).train
        tune.tune_lora(setup.work / "target", rows, schedule, settings, out)

    return Stage(lora_name(skill, rank, rate), make, ("target",))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    shared = Path(os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "out" / "real")
    parser.add_argument("--shared", type=Path, default=shared, help="folder of the data")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--target", type=Path, help="the target's folder, if it is made already")
    parser.add_argument("--only", default="*", metavar="STAGE", help="a name or a pattern")
    parser.add_argument("--list", action="store_true", help="show the stages and end")
    parser.add_argument("--train-all", action="store_true", help="use no fine-tune that is shared")
    parser.add_argument("--tag", default="", help="names packs of another version of graftkit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    packs = None if options.train_all else options.shared / "real"
    data = options.shared / "data" / "llm"
    setup = Setup(options.work, data, options.target, packs, options.tag)
    if options.child:
        run_stage(setup, all_stages, options.child, options.threads)
        return 0
    if options.list:
        for stage in all_stages(setup):
            print("made   " if (setup.work / stage.name).exists() else "pending", stage.name)
        return 0
    command = [sys.executable, __file__, *arguments]
    failed = run_pending(setup, all_stages, options.only, command)
    for file in write_report(options.work, options.docs):
        print(file, file=sys.stderr)
    for name in failed:
        print(f"not made: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
