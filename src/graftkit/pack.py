"""Pack: two states of one model become a SkillPack.

Here are the public function and what it reads. The steps over all tensors are in graftkit.packing,
which knows no router: the function that fits a router key is handed to it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from graftkit.checkpoint import Checkpoint
from graftkit.config import SELF, TRAIN_STEPS, PackConfig
from graftkit.errors import CheckpointError, ConfigError
from graftkit.files import WorkFolder
from graftkit.models.loading import stream_model
from graftkit.models.text import usable_tokenizer
from graftkit.packing.job import PackingJob, RouterPrompts
from graftkit.packing.measure import CalibrationRows
from graftkit.packing.pairs import match_tensors
from graftkit.packing.sampled import sampled_calibration
from graftkit.progress import Progress, silent
from graftkit.route.nearest import fit_default_key
from graftkit.rows import read_prompts, read_rows, rows_digest, template_digest
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import PromptFormat, RouterInfo


def pack_delta(
    target: str | Path,
    tuned: str | Path,
    *,
    budget: str | None = None,
    recipe: str = "auto",
    calibration: str | Path | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    servable: bool = False,
    train_steps: int | None = None,
    licence: str | None = None,
    provenance: Mapping[str, str] | None = None,
    prompt_format: str | None = None,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> SkillPack:
    """Compress what `tuned` learned beyond `target`.

    Args:
        target, tuned: Hugging Face directories or Hub ids of the two states of one model.
        budget: largest file: 5%, 12MB or 1.0bpp; default 5% (lossless: none).
        recipe: auto, graftllm or lossless.
        calibration: file or data set folder of rows (`graftkit.rows.read_rows`), or "self" for
            rows that the two models write; activations are measured on them. None: without data.
        prompts: 20 or more prompts of the skill, or a file or folder with them. The pack then has a
            key by which a router finds it, which counts in the budget.
        seed: picks calibration rows and prompts if there are more than are used, and samples rows.
        workers: tensors in work at once, default one per core; the bytes do not depend on it.
        servable: use only factors whose side path adds at most a quarter of a matrix's
            multiply-accumulates (recipe auto).
        train_steps: most steps of code training (recipe auto, with rows), default 100; 0 for none.
        licence, provenance: where the skill comes from, for the manifest; they count in the budget.
        prompt_format: how the skill's prompts were given in training, and are to be given when it
            is asked: raw, or chat for the chat template of `tuned`. Default: as the calibration
            rows of a file are (messages: chat; prompt and completion: raw), else not recorded.
        work_dir: folder of finished steps; a later call with the same inputs continues there.
            It stays after success, and is removed if the inputs are refused.
        progress: called with (step, done, total).
    Returns: the pack; `save` writes it.
    Raises: CheckpointError for an unreadable checkpoint; CheckpointMismatchError for two models;
        RowsError; ConfigError; BudgetError where nothing fits; OutputError for the work folder.
    """
    config = PackConfig.checked(
        recipe,
        budget,
        seed,
        (os.cpu_count() or 1) if workers is None else workers,
        servable,
        TRAIN_STEPS if train_steps is None else train_steps,
    ).model_copy(update={"licence": licence, "provenance": dict(provenance or {})})
    rows = _read_calibration(calibration)
    router = RouterPrompts(_read_prompts(prompts), _fit_router_key)
    with _work_folder(work_dir) as work:
        states = Checkpoint.open(target), Checkpoint.open(tuned)
        config = config.model_copy(update=_prompt_record(prompt_format, rows, recipe, states[1]))
        if calibration == SELF:
            rows = _sample_calibration(*states, config, progress or silent)
        return PackingJob(*states, config, rows, router, work, progress or silent).run()


@contextmanager
def _work_folder(folder: str | Path | None) -> Iterator[WorkFolder]:
    """The work folder of a call; a temporary one without a name."""
    if folder is not None:
        yield WorkFolder(Path(folder))
        return
    with TemporaryDirectory(prefix="graftkit-") as temporary:
        yield WorkFolder(Path(temporary) / "work")


def _read_calibration(calibration: str | Path | None) -> CalibrationRows | None:
    """The rows of a file; None without data, and for rows that are still to be sampled."""
    if calibration is None or calibration == SELF:
        return None
    file = Path(calibration)
    name = f"./{file.name}" if file.name == SELF else file.name
    return CalibrationRows(read_rows(file), name, rows_digest(file))


def _sample_calibration(
    target: Checkpoint, tuned: Checkpoint, config: PackConfig, progress: Progress
) -> CalibrationRows | None:
    """Rows that the models write; none for a lossless pack, which measures no activations."""
    if config.recipe == "lossless":
        return None
    match_tensors(target, tuned)  # two models that do not match are refused before the work
    return sampled_calibration(target, tuned, config.seed, progress)


def _prompt_record(
    prompt_format: str | None, rows: CalibrationRows | None, recipe: str, tuned: Checkpoint
) -> dict[str, str | None]:
    """What the manifest says of prompts: their format, and the digest of the chat template.

    Raises: ConfigError for an unknown format, or one that the rows contradict; CheckpointError for
        a tokenizer that has no chat template, where one is needed.
    """
    chosen = _check_format(prompt_format, rows, recipe)
    template = _template_digest(tuned) if chosen == "chat" else None
    return {"prompt_format": chosen, "template_blake3": template}


def _check_format(
    prompt_format: str | None, rows: CalibrationRows | None, recipe: str
) -> str | None:
    """The prompt format to record, unless the record of the calibration implies it.

    Raises: ConfigError for an unknown format, or one that the rows contradict.
    """
    if prompt_format not in (None, *get_args(PromptFormat)):
        names = " or ".join(get_args(PromptFormat))
        raise ConfigError(f"prompt_format {prompt_format!r} is unknown; choose {names}")
    given = None if rows is None else rows.rows[0].format
    if given == "prompt_completion" and prompt_format is None:
        return "raw" if recipe == "lossless" else None  # which records no calibration
    if rows is None or given != "messages":
        return prompt_format
    if prompt_format == "raw":
        raise ConfigError(
            f"{rows.source}: its rows are messages, which the model reads in its chat template, so "
            "prompt_format cannot be raw; leave it out, or give prompts and completions"
        )
    return "chat"


def _template_digest(tuned: Checkpoint) -> str:
    """The digest of a chat template. Raises: CheckpointError where there is none."""
    digest = template_digest(usable_tokenizer(tuned))
    if digest is None:
        raise CheckpointError(
            f"{tuned.path}: the tokenizer has no chat template, which messages and prompt_format "
            "chat need; add chat_template.jinja, or give prompts and completions"
        )
    return digest


def _read_prompts(prompts: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(prompts, str | Path):
        return read_prompts(prompts)
    return tuple(prompts or ())


def _fit_router_key(
    target: Checkpoint, prompts: Sequence[str], seed: int, offload: Path
) -> tuple[RouterInfo, bytes]:
    """Description and payload of the router key of the prompts; the target streams from disk.

    Raises: RowsError, CheckpointError.
    """
    model, tokenizer = stream_model(target, offload), usable_tokenizer(target)
    key = fit_default_key(model, tokenizer, prompts, seed)
    return key.info, key.to_bytes()
