"""`graftkit distill`: the stages in order. Each writes files into one folder.

    sample  samples.jsonl    answers of the sources
    score   scores.jsonl     scores of the answers
    select  sft.jsonl, pairs.jsonl, data_card.md
    probe   distributions/   what the sources predict in the rows (explicit transfer only)
    sft     sft/             the target after supervised fine-tuning
    dpo     tuned/           the target after preference optimisation
    pack    skill.skillpack, README.md

A finished stage is repeated when its settings or inputs have changed. Sampling is repeated only
after samples.jsonl was deleted, because answers may have cost money.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftkit.distill.config import DistillConfig
from graftkit.distill.estimate import estimate
from graftkit.distill.steps import WORK
from graftkit.distill.workspace import (
    StageLog,
    Workspace,
    exclusive_run,
    file_digest,
    is_main,
    processes,
    stage_key,
)
from graftkit.errors import ConfigError, OutputError
from graftkit.progress import Progress, silent


def run_distill(
    config_file: str | Path,
    folder: str | Path,
    only: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run all stages that are not finished, or one stage.

    Args:
        config_file: a TOML file, see `DistillConfig`.
        folder: for results and unfinished work; new, empty, or made by an earlier call.
        only: name of the one stage to run; the stages before it must be finished.
        progress: called with (step, done, total).
    Returns: by stage, seconds and counts.
    Raises: ConfigError, RowsError, CheckpointError, SourceError, SelectionError, BudgetError,
        OutputError. Finished work stays, and the same call continues there.
    """
    space = _open(Path(config_file), Path(folder), progress or silent)
    stages = stages_of(space.config)
    if only is not None and only not in stages:
        raise ConfigError(f"stage {only!r} is none of {', '.join(stages)}, which this run has")
    if processes() > 1 and only not in ("sft", "dpo"):
        raise ConfigError(
            f"{processes()} processes were launched, but only sft and dpo share their work; run "
            "the other stages without a launcher, and these with --only"
        )
    with exclusive_run(space.folder, [config_file, *space.inputs]):
        book = StageLog(space.folder)
        for stage in stages if only is None else (only,):
            _run_stage(stage, space, book)
    return book.entries


def estimate_run(config_file: str | Path) -> dict[str, Any]:
    """What a run will take; see `estimate`.

    Raises: ConfigError, RowsError, CheckpointError for a configuration, prompts or models that
        cannot be used.
    """
    with TemporaryDirectory(prefix="graftkit-") as folder:
        space = _open(Path(config_file), Path(folder), silent)
        return estimate(space.config, space.target, space.prompts.prompts, space.config_folder)


def stages_of(config: DistillConfig) -> tuple[str, ...]:
    """The stages of this configuration, in order."""
    absent = {"dpo"} if config.dpo is None else set()
    if config.transfer is None or config.transfer.kl_weight == 0:
        absent.add("probe")
    return tuple(stage for stage in WORK if stage not in absent)


def _open(file: Path, folder: Path, progress: Progress) -> Workspace:
    return Workspace(DistillConfig.read_toml(file), folder, file.parent, progress)


def _run_stage(stage: str, space: Workspace, book: StageLog) -> None:
    """Run one stage, unless it is finished. Raises: ConfigError where an earlier one is missing."""
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


def _check_samples(file: Path, key: str, book: StageLog) -> None:
    """Raises: ConfigError for samples of other settings, which may have cost money."""
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
    """A digest of what determines the stage's outputs: settings, files and earlier stages."""
    config = space.config
    settings = config.model_dump(mode="json")

    def file(name: str) -> str:
        return file_digest(space.folder / f"{name}.jsonl")

    def prompts() -> list[Any]:
        return [settings["prompts"], file_digest(space.config_folder / config.prompts.file)]

    def sources() -> list[Any]:
        return [space.source_identity(source) for source in config.sources]

    target = space.target_identity
    parts: Callable[[], list[Any]] = {
        "sample": lambda: [prompts(), sources(), config.seed],
        "score": lambda: [settings["scores"], prompts(), file("samples")],
        "select": lambda: [
            *(
                settings["selection"],
                settings["sft"]["max_tokens"],
                config.dpo is None,
                config.seed,
            ),
            *(config.dpo and config.dpo.max_tokens, config.prompts.chat, target()),
            *(file("samples"), file("scores")),
        ],
        "probe": lambda: [settings["transfer"], file("sft"), sources(), target()],
        "sft": lambda: [settings["sft"], settings["transfer"], file("sft"), target(), config.seed],
        "dpo": lambda: [settings["dpo"], file("pairs"), _key("sft", space)],
        "pack": lambda: [
            settings["pack"],
            file("sft"),
            _key("dpo" if config.dpo else "sft", space),
        ],
    }[stage]
    return stage_key(stage, parts())
