"""`graftkit distill`: the stages in order, and what each does. Each writes files into one folder.

    sample  samples.jsonl    answers of the sources
    score   scores.jsonl     scores of the answers
    select  sft.jsonl, pairs.jsonl, data_card.md
    probe   distributions/   what the sources predict in the rows (explicit transfer only)
    sft     sft/             the target after supervised fine-tuning
    dpo     tuned/           the target after preference optimisation
    pack    skill.skillpack, README.md

A finished stage is repeated when its settings or inputs have changed. Sampling is repeated only
after samples.jsonl was deleted, because answers may have cost money. The function of a stage
returns the counts that `stages.json` records.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from graftkit.checkpoint import Checkpoint
from graftkit.distill import select as cards
from graftkit.distill.config import DistillConfig, Graded, resolve_model
from graftkit.distill.estimate import estimate
from graftkit.distill.records import ScoredAnswer, read_lines, write_lines
from graftkit.distill.sample import read_summaries, sample_answers
from graftkit.distill.scores import read_scored, score_answers
from graftkit.distill.select import PreferencePair, SelectedData, Template
from graftkit.distill.select import select as select_answers
from graftkit.distill.workspace import (
    StageLog,
    Workspace,
    exclusive_run,
    file_digest,
    is_main,
    processes,
    rows_file_digest,
    stage_key,
)
from graftkit.errors import ConfigError, OutputError, SelectionError
from graftkit.files import WorkFolder, replaced_file
from graftkit.models.loading import empty_model, load_model
from graftkit.models.text import usable_tokenizer
from graftkit.progress import Progress, silent
from graftkit.route.key import MIN_PROMPTS
from graftkit.rows import Row, read_rows


def sample(space: Workspace) -> dict[str, Any]:
    """Let the sources answer the prompts."""
    prompts = space.prompts.prompts
    # The file exists where a run was killed after its last answer, before stages.json was written.
    if (space.folder / "samples.jsonl").exists():
        shutil.rmtree(space.folder / "samples.partial", ignore_errors=True)
    else:
        sample_answers(space.config, prompts, space.folder, space.config_folder, space.progress)
    summaries = read_summaries(space.folder)
    return {
        "answers": sum(summary.answers for summary in summaries),
        "refused": sum(sum(summary.refused.values()) for summary in summaries),
        "tokens_out": sum(summary.tokens_out for summary in summaries),
        "cost": sum(summary.cost for summary in summaries),
    }


def score(space: Workspace) -> dict[str, Any]:
    """Score the answers."""
    prompts = space.prompts.prompts
    score_answers(space.config, prompts, space.folder, space.config_folder, space.progress)
    passed = sum(one.passed for one in read_scored(space.folder))
    return {"passed": passed}


def select(space: Workspace) -> dict[str, Any]:
    """Choose rows and pairs. Raises: SelectionError where none are left."""
    scored, config = read_scored(space.folder), space.config
    template = space.template
    graded = any(isinstance(score, Graded) for score in config.scores)
    settings = config.selection
    if config.dpo is None:
        settings = settings.model_copy(update={"sft_share": 1.0})
    chosen = select_answers(scored, settings, graded, config.seed, template.fits)
    _check_enough(chosen, config.dpo is not None)
    rows = [_row_record(one, template) for one in chosen.rows]
    card = cards.make_card(config, space.prompts, read_summaries(space.folder), scored, chosen)
    if config.dpo:
        pairs = [_pair_record(pair, template) for pair in chosen.pairs]
        write_lines(space.folder / "pairs.jsonl", pairs)
    with replaced_file(space.folder / "data_card.md") as partly:
        partly.write_text(cards.data_card(card), encoding="utf-8")
    write_lines(space.folder / "data_card.json", [card])
    write_lines(space.folder / "sft.jsonl", rows)
    return {"rows": len(chosen.rows), "pairs": len(chosen.pairs)}


def probe(space: Workspace) -> dict[str, Any]:
    """Write what the sources predict in the rows."""
    from graftkit.distill.transfer.distributions import collect_distributions

    assert space.config.transfer is not None
    rows, tokenizer, aligned, tokens = _source_rows(space), usable_tokenizer(space.target), 0, 0
    for source in space.probed:
        file = space.distributions(source)
        file.parent.mkdir(exist_ok=True)
        checkpoint = Checkpoint.open(resolve_model(source.model, space.config_folder))
        model, own = load_model(checkpoint, torch.float32), usable_tokenizer(checkpoint)
        report = partial(space.progress, f"probe {source.name}")
        transfer = space.config.transfer
        part = collect_distributions(source, model, own, tokenizer, rows, transfer, file, report)
        aligned, tokens = aligned + part.aligned, tokens + part.tokens
    return {"aligned": aligned, "tokens": tokens}


def _guide(space: Workspace) -> Any:
    """The sources' signals for SFT; None without explicit transfer."""
    from graftkit.distill.transfer.distributions import DistributionFile
    from graftkit.distill.transfer.losses import Guide, HiddenSource

    transfer = space.config.transfer
    if transfer is None:
        return None
    files = [DistributionFile(space.distributions(source)) for source in space.probed]
    hidden = None
    if transfer.hidden_weight:
        source = space.models[0]
        checkpoint = Checkpoint.open(resolve_model(source.model, space.config_folder))
        layers = empty_model(space.target).config.get_text_config().num_hidden_layers
        hidden = HiddenSource(
            source,
            load_model(checkpoint, torch.float32),
            usable_tokenizer(checkpoint),
            usable_tokenizer(space.target),
            layers,
        )
    return Guide(transfer, files, hidden, _source_rows(space))


def _source_rows(space: Workspace) -> list[Row]:
    """The SFT rows with prompts as the sources read them, without the target's chat template."""
    lines = read_lines(space.folder / "sft.jsonl")
    return [Row(line.get("asked", line["prompt"]), line["completion"]) for line in lines]


def sft(space: Workspace) -> dict[str, Any]:
    """Train the target on the rows."""
    log = _training().train_rows(
        space.target,
        read_rows(space.folder / "sft.jsonl"),
        space.config.sft,
        space.config.seed,
        space.after_sft,
        partial(space.progress, "sft"),
        _guide(space),
    )
    return _logged(space, "sft", log)


def dpo(space: Workspace) -> dict[str, Any]:
    """Train the model after SFT on the pairs."""
    assert space.config.dpo is not None
    log = _training().train_pairs(
        space.target,
        Checkpoint.open(space.after_sft),
        list(read_lines(space.folder / "pairs.jsonl")),
        space.config.dpo,
        space.config.seed,
        space.folder / "tuned",
        partial(space.progress, "dpo"),
    )
    return _logged(space, "dpo", log)


def pack(space: Workspace) -> dict[str, Any]:
    """Compress the delta of the tuned model, and write the model card."""
    from graftkit.pack import pack_delta

    config, settings = space.config, space.config.pack
    card = next(read_lines(space.folder / "data_card.json"))
    sft_rows = list(read_lines(space.folder / "sft.jsonl"))
    rows = sft_rows[: settings.calibration_rows]
    calibration = space.folder / "calibration.jsonl"
    write_lines(calibration, rows)
    work = WorkFolder(space.folder / "skill.partial")
    packed = pack_delta(
        space.target.path,
        space.folder / "tuned",
        budget=settings.budget,
        recipe=settings.recipe,
        calibration=calibration if rows and settings.recipe != "lossless" else None,
        prompts=_router_prompts(sft_rows),
        seed=config.seed,
        train_steps=settings.train_steps,
        licence=cards.licence(config),
        provenance=cards.provenance(config, card),
        prompt_format="chat" if config.prompts.chat else "raw",
        work_dir=work.path,
        progress=lambda step, done, total: space.progress(f"pack: {step}", done, total),
    )
    file = space.folder / "skill.skillpack"
    packed.save(file)
    work.remove()
    stages = ("sft", "dpo") if config.dpo else ("sft",)
    curves = {stage: _ends(list(read_lines(_log_file(space, stage)))) for stage in stages}
    readme = cards.model_card(config, card, curves)
    with replaced_file(space.folder / "README.md") as partly:
        partly.write_text(readme, encoding="utf-8")
    return {"pack_bytes": file.stat().st_size, "file": str(file)}


def _router_prompts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The different prompts of the rows; none where they are too few for a router key.

    A router reads prompts without a chat template.
    """
    asked = [row.get("asked", row["prompt"]) for row in rows]
    prompts = list(dict.fromkeys(prompt for prompt in asked if prompt.strip()))
    return prompts if len(prompts) >= MIN_PROMPTS else []


def _training() -> Any:
    """The module that trains. Raises: ConfigError where its libraries are missing."""
    try:
        return import_module("graftkit.distill.training")
    except ImportError as error:
        raise ConfigError(
            f"training needs TRL and its companions ({error}); pip install 'graftkit[distill]'"
        ) from error


def _logged(space: Workspace, stage: str, log: list[dict[str, float]]) -> dict[str, Any]:
    """Write the loss curve; return its ends."""
    if is_main():
        write_lines(_log_file(space, stage), log)
    return {"loss": _ends(log)}


def _log_file(space: Workspace, stage: str) -> Path:
    return space.folder / f"{stage}_log.jsonl"


def _ends(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    losses = [entry["loss"] for entry in log if "loss" in entry]
    steps = max((int(entry["step"]) for entry in log if "step" in entry), default=0)
    return {"first": losses[0], "last": losses[-1], "steps": steps}


def _check_enough(chosen: SelectedData, needs_pairs: bool) -> None:
    if not chosen.rows:
        raise SelectionError(
            f"no answer is left for SFT ({_join(chosen.dropped_rows)}); look at scores.jsonl, and "
            "loosen the rules or take a better source"
        )
    if needs_pairs and not chosen.pairs:
        raise SelectionError(
            f"no pair is left for DPO ({_join(chosen.dropped_pairs)}); widen selection.gap, draw "
            "more samples, or set dpo = false"
        )


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts.items()) or "no prompts"


def _row_record(one: ScoredAnswer, template: Template) -> dict[str, Any]:
    row = template.row(one.answer.prompt, one.answer.text)
    record: dict[str, Any] = {"prompt": row.prompt, "completion": row.completion}
    if row.prompt != one.answer.prompt:
        record["asked"] = one.answer.prompt  # without the chat template
    origin = {"prompt_id": one.answer.prompt_id, "source": one.answer.source}
    return record | origin | {"reward": one.reward}


def _pair_record(pair: PreferencePair, template: Template) -> dict[str, Any]:
    answer = pair.chosen.answer
    chosen = template.row(answer.prompt, answer.text)
    record: dict[str, Any] = {
        "prompt": chosen.prompt,
        "chosen": chosen.completion,
        "rejected": template.row(answer.prompt, pair.rejected.answer.text).completion,
    }
    if pair.own is not None:
        record["chosen_target"] = template.row(answer.prompt, pair.own.answer.text).completion
    rewards = {"chosen_reward": pair.chosen.reward, "rejected_reward": pair.rejected.reward}
    return record | {"prompt_id": answer.prompt_id, "source": answer.source} | rewards


WORK: Mapping[str, Callable[[Workspace], dict[str, Any]]] = {
    "sample": sample,
    "score": score,
    "select": select,
    "probe": probe,
    "sft": sft,
    "dpo": dpo,
    "pack": pack,
}


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
        return [settings["prompts"], rows_file_digest(space.config_folder / config.prompts.file)]

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
