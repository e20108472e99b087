"""`graftkit distill`: stage after stage, each a file in one folder, each done once.

    sample  samples.jsonl    what the sources answer
    score   scores.jsonl     what the answers are worth
    select  sft.jsonl, pairs.jsonl, data_card.md
    probe   distributions/   what sources find likely in the rows (explicit transfer only)
    sft     sft/             the target after supervised fine-tuning
    dpo     tuned/           and after preference optimisation
    pack    skill.skillpack, README.md

A stage is done again when its settings or what it was made from have changed; sampling never is
without being asked, for answers may have cost money.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftkit.distill.config import DistillConfig, read_config
from graftkit.distill.estimate import estimate
from graftkit.distill.steps import WORK
from graftkit.distill.workspace import (
    StageBook,
    Workspace,
    digest_of,
    is_main,
    key_of,
    only_run,
    processes,
)
from graftkit.errors import ConfigError, OutputError
from graftkit.progress import Progress, no_progress


def run_distill(
    config_file: str | Path,
    folder: str | Path,
    only: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every stage that is not done yet, or one.

    Args:
        config_file: see `DistillConfig`.
        folder: of results and what is unfinished; new, empty, or made by an earlier call.
        only: one stage; those before it must be done.
        progress: called with (step, done, total).
    Returns: by stage, seconds and counts.
    Raises: ConfigError, RowsError, CheckpointError, SourceError, SelectionError, BudgetError,
        OutputError. What is finished stays; the same call goes on from there.
    """
    space = _open(Path(config_file), Path(folder), progress or no_progress)
    stages = stages_of(space.config)
    if only is not None and only not in stages:
        raise ConfigError(f"stage {only!r} is none of {', '.join(stages)}, which this run has")
    if processes() > 1 and only not in ("sft", "dpo"):
        raise ConfigError(
            f"{processes()} processes were launched, but only sft and dpo share their work; run "
            "the other stages without a launcher, and these with --only"
        )
    with only_run(space.folder, [config_file, *space.inputs]):
        book = StageBook(space.folder)
        for stage in stages if only is None else (only,):
            _do(stage, space, book)
    return book.entries


def estimate_run(config_file: str | Path) -> dict[str, Any]:
    """What a run will take; see `estimate`. Raises: as `run_distill` before its first stage."""
    with TemporaryDirectory(prefix="graftkit-") as folder:
        space = _open(Path(config_file), Path(folder), no_progress)
        return estimate(space.config, space.target, space.prompts.prompts, space.config_folder)


def stages_of(config: DistillConfig) -> tuple[str, ...]:
    """The stages of this configuration, in order."""
    absent = {"dpo"} if config.dpo is None else set()
    if config.transfer is None or config.transfer.kl_weight == 0:
        absent.add("probe")
    return tuple(stage for stage in WORK if stage not in absent)


def _open(file: Path, folder: Path, progress: Progress) -> Workspace:
    return Workspace(read_config(file), folder, file.parent, progress)


def _do(stage: str, space: Workspace, book: StageBook) -> None:
    """One stage, unless it is done. Raises: ConfigError where an earlier one is missing."""
    for needed in _inputs(stage, space):
        if not needed.exists():
            raise ConfigError(
                f"{needed}: missing, and stage {stage} needs it; run the stages before it first"
            )
    key, outputs = _key(stage, space), _outputs(stage, space)
    if book.done(stage, key, outputs):
        space.progress(stage, 1, 1)
        return
    if stage == "sample":
        _check_samples(outputs[0], key, book)
    started = time.perf_counter()
    try:
        result = WORK[stage](space)
    except OSError as error:
        raise OutputError(
            f"{space.folder}: stage {stage} cannot go on ({error}); free some space and run the "
            "same command again"
        ) from error
    if is_main():
        book.finish(stage, key, time.perf_counter() - started, result)


def _check_samples(file: Path, key: str, book: StageBook) -> None:
    """Raises: ConfigError where sampling would write over answers that may have cost money."""
    if not file.exists():
        book.begin("sample", key)
    elif book.begun("sample") != key:
        raise ConfigError(
            f"{file} was sampled with other sources, prompts or seed; delete it to sample again, "
            "or choose another folder"
        )


def _outputs(stage: str, space: Workspace) -> list[Path]:
    if stage == "probe":
        return [space.distributions(source) for source in space.probed]
    if stage == "sft":
        return [space.after_sft]
    names = {
        "sample": ["samples.jsonl"],
        "score": ["scores.jsonl"],
        "select": ["sft.jsonl", "data_card.json"],
        "dpo": ["tuned"],
        "pack": ["skill.skillpack", "README.md"],
    }[stage]
    if stage == "select" and space.config.dpo:
        names = [*names, "pairs.jsonl"]
    return [space.folder / name for name in names]


def _inputs(stage: str, space: Workspace) -> list[Path]:
    before = {
        "sample": (),
        "score": ("sample",),
        "select": ("sample", "score"),
        "probe": ("select",),
        "sft": ("select", "probe"),
        "dpo": ("select", "sft"),
        "pack": ("select", "dpo" if space.config.dpo else "sft"),
    }[stage]
    return [path for needed in before for path in _outputs(needed, space)]


def _key(stage: str, space: Workspace) -> str:
    """What decides the stage's outputs: settings, and the files and stages it is made from."""
    config = space.config
    said = config.model_dump(mode="json")

    def file(name: str) -> str:
        return digest_of(space.folder / f"{name}.jsonl")

    def prompts() -> list[Any]:
        return [said["prompts"], digest_of(space.config_folder / config.prompts.file)]

    def sources() -> list[Any]:
        return [space.source_identity(source) for source in config.sources]

    target = space.target_identity
    parts: Callable[[], list[Any]] = {
        "sample": lambda: [prompts(), sources(), config.seed],
        "score": lambda: [said["scores"], prompts(), file("samples")],
        "select": lambda: [
            *(said["selection"], said["sft"]["max_tokens"], config.dpo is None, config.seed),
            *(config.dpo and config.dpo.max_tokens, config.prompts.chat, target()),
            *(file("samples"), file("scores")),
        ],
        "probe": lambda: [said["transfer"], file("sft"), sources(), target()],
        "sft": lambda: [said["sft"], said["transfer"], file("sft"), target(), config.seed],
        "dpo": lambda: [said["dpo"], file("pairs"), _key("sft", space)],
        "pack": lambda: [said["pack"], file("sft"), _key("dpo" if config.dpo else "sft", space)],
    }[stage]
    return key_of(stage, parts())
