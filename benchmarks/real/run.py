"""Everything measured on a real model, in one command: python benchmarks/real/run.py

A stage makes one file or folder of the work folder, and is skipped when that is there: an
interrupted run goes on where it stopped. A stage runs in a process of its own, writes under another
name and is renamed at the end. Its settings are in its name, so a changed setting is another stage.
Stages whose settings another stage chooses (the learning rate of LoRA) appear once that one is made.

`--list` shows the stages, `--only NAME` runs those whose names match (`lora-*`).
"""

import argparse
import fcntl
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
ALLOCATOR = {
    # Freed memory is kept for the next step instead of returned to the system.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
}


@dataclass(frozen=True)
class Setup:
    """Where things are. shared: fine-tunes that need not be trained anew, None to train them."""

    work: Path
    data: Path
    target: Path | None
    shared: Path | None


@dataclass(frozen=True)
class Stage:
    """One output in the work folder, and what makes it (a function of the path to write)."""

    name: str
    make: Callable[[Path], None]
    needs: tuple[str, ...] = ()


def all_stages(setup: Setup) -> list[Stage]:
    """Every stage whose settings are known by now, in the order in which they run."""
    return training_stages(setup)


def training_stages(setup: Setup) -> list[Stage]:
    """The target, and every model that is trained from it."""
    chooser = next(skill for skill in SKILLS if skill.name == LORA_CHOICE_SKILL)
    trials = [_lora_stage(setup, chooser, LORA_CHOICE_RANK, rate) for rate in LORA_RATES]
    choice = Stage(
        LORA_RATE_FILE, lambda out: _choose_rate(setup, chooser, out), tuple(t.name for t in trials)
    )
    tuned = [_tuned_stage(setup, pair) for pair in all_pairs()]
    stages = [Stage("target", lambda out: _make_target(setup, out))]
    stages += [*tuned[: len(SKILLS)], *trials, choice]
    rate = lora_rate(setup.work)
    if rate is not None:
        others = [skill for skill in SKILLS if skill is not chooser]
        stages += [_lora_stage(setup, skill, LORA_CHOICE_RANK, rate) for skill in others]
        stages += [_lora_stage(setup, s, rank, rate) for rank in LORA_RANKS for s in SKILLS]
    stages += tuned[len(SKILLS) :]
    if rate is not None:
        stages += [_lora_stage(setup, s, rank, rate) for rank in MORE_LORA_RANKS for s in SKILLS]
    return stages


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

    if setup.target is None:
        tune.make_target(out)
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


def run_pending(setup: Setup, pattern: str, arguments: Sequence[str]) -> list[str]:
    """Run what is not there yet, each stage in a process. Returns: the stages that failed."""
    failed: list[str] = []
    while True:
        pending = [
            stage
            for stage in all_stages(setup)
            if fnmatch.fnmatchcase(stage.name, pattern)
            and stage.name not in failed
            and not (setup.work / stage.name).exists()
        ]
        ready = [s for s in pending if all((setup.work / n).exists() for n in s.needs)]
        if not ready:
            return [*failed, *(stage.name for stage in pending)]
        name, began = ready[0].name, time.perf_counter()
        print(f"[{time.strftime('%H:%M:%S')}] {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *arguments, "--child", name]
        environment = {**os.environ, **ALLOCATOR}
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
        seconds = time.perf_counter() - began
        state = "failed after" if name in failed else "took"
        print(f"{name} {state} {seconds:.0f} s", file=sys.stderr, flush=True)


def run_stage(setup: Setup, name: str, threads: int) -> None:
    """Make one stage in this process: under another name, then renamed. One at a time."""
    import torch

    torch.set_num_threads(threads)
    stage = next(stage for stage in all_stages(setup) if stage.name == name)
    partial = setup.work / f".partial-{name}"
    with (setup.work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (setup.work / name).exists():
            return  # another run made it while this one waited
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
        stage.make(partial)
        partial.rename(setup.work / name)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    shared = Path(os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "out" / "real")
    parser.add_argument("--shared", type=Path, default=shared, help="folder of the data")
    parser.add_argument("--target", type=Path, help="the target's folder, if it is made already")
    parser.add_argument("--only", default="*", metavar="STAGE", help="a name or a pattern")
    parser.add_argument("--list", action="store_true", help="show the stages and end")
    parser.add_argument("--train-all", action="store_true", help="use no fine-tune that is shared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    packs = None if options.train_all else options.shared / "real"
    setup = Setup(options.work, options.shared / "data" / "llm", options.target, packs)
    if options.child:
        run_stage(setup, options.child, options.threads)
        return 0
    if options.list:
        for stage in all_stages(setup):
            print("made   " if (setup.work / stage.name).exists() else "pending", stage.name)
        return 0
    failed = run_pending(setup, options.only, arguments)
    for name in failed:
        print(f"not made: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
