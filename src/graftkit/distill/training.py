"""SFT and DPO on TRL: rows or pairs in, an ordinary model directory out; a killed run continues.

Both start from a model directory and end in one whose files are the target's own but for the
weights. The reference of DPO is an argument, never inferred: the directory after SFT.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, SFTConfig

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import Dpo, Sft, TrainerSettings
from graftkit.distill.trainers import GuidedTrainer, PairTrainer, RowTrainer, WrpoTrainer
from graftkit.distill.transfer.guide import Guide
from graftkit.distill.workspace import is_main, processes
from graftkit.errors import ConfigError, OutputError
from graftkit.files import WorkFolder
from graftkit.models.encoding import usable_tokenizer
from graftkit.models.loading import load_model, silence_transformers
from graftkit.models.views import CheckpointWriter
from graftkit.progress import StepProgress
from graftkit.rows import Row, encode_row

TrainingLog = list[dict[str, float]]
"""Loss, learning rate and the trainer's other numbers, by step."""

LOG_POINTS = 200  # of a loss curve, at most


def train_rows(
    target: Checkpoint,
    rows: Sequence[Row],
    settings: Sft,
    seed: int,
    folder: Path,
    progress: StepProgress,
    guide: Guide | None = None,
) -> TrainingLog:
    """Supervised fine-tuning on completions; writes `folder`, a model directory.

        L = −Σ log p(completion, EOS | prompt) / tokens

    Args:
        progress: called with optimizer steps.
        guide: what the sources say about these rows, for explicit transfer (see `Guide`).
    Raises: CheckpointError, ConfigError, OutputError; RowsError for a row beyond the context.
    """
    tokenizer = usable_tokenizer(target)
    records = [_row_record(tokenizer, row, settings.max_tokens) for row in rows]
    trainer: type[RowTrainer] = RowTrainer
    options: dict[str, Any] = {}
    if guide is not None:
        records = [record | {"row": index} for index, record in enumerate(records)]
        trainer, options = GuidedTrainer, {"guide": guide, "seed": seed}
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = _trainer_arguments(SFTConfig, settings, len(records), seed, folder, **own)
    run = _TrainingRun(target, target, settings, folder, progress)
    return run.train(trainer, arguments, records, tokenizer, options)


def train_pairs(
    target: Checkpoint,
    reference: Checkpoint,
    pairs: Sequence[Mapping[str, str]],
    settings: Dpo,
    seed: int,
    folder: Path,
    progress: StepProgress,
) -> TrainingLog:
    """Preference optimisation from `reference` on; writes `folder`, a model directory.

        sigmoid       L = −log σ(β (s_c − s_r)),            s = log π(y|x) − log π_ref(y|x)
        sigmoid_norm  L = −log σ(β (s_c / n_c − s_r / n_r))                 n tokens of the answer
        wrpo          L = −log σ(β (α s_c + (1 − α) s_t − s_r))    t: the target's own (2412.03187)

    The loss of the first step is log 2 by definition.

    Args:
        reference: π_ref and the start: the model after SFT.
        pairs: prompt, chosen, rejected, and chosen_target for wrpo.
        progress: called with optimizer steps.
    Raises: CheckpointError, ConfigError, OutputError; RowsError for a pair beyond the context.
    """
    tokenizer = usable_tokenizer(reference)
    records = [_pair_record(tokenizer, pair, settings.max_tokens) for pair in pairs]
    trainer: type[PairTrainer] = PairTrainer
    options: dict[str, Any] = {}
    own: dict[str, Any] = {"beta": settings.beta, "loss_type": [settings.loss]}
    if settings.loss == "wrpo":
        trainer, options = WrpoTrainer, {"alpha": settings.wrpo_alpha}
        own["loss_type"] = ["sigmoid"]  # WrpoTrainer has its own loss; TRL does not know it
    if settings.lora is None:
        options["ref_model"] = load_model(reference, torch.float32)
    arguments = _trainer_arguments(DPOConfig, settings, len(records), seed, folder, **own)
    run = _TrainingRun(target, reference, settings, folder, progress)
    return run.train(trainer, arguments, records, tokenizer, options)


def _work_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _trainer_arguments(
    kind: Any, settings: TrainerSettings, rows: int, seed: int, folder: Path, **own: Any
) -> Any:
    """TRL's settings of the class `kind`, for so many rows.

    own: settings that only this class has.
    Raises: ConfigError for a batch that the processes cannot share.
    """
    world = processes()
    micro = min(
        settings.micro_batch_size or settings.batch_size, max(1, settings.batch_size // world)
    )
    if settings.batch_size % (micro * world):
        raise ConfigError(
            f"batch_size {settings.batch_size} is no multiple of {world} processes x {micro} rows; "
            "choose a micro_batch_size that divides it"
        )
    steps = max(1, round(settings.epochs * rows / settings.batch_size))
    with silence_transformers():
        return kind(
            output_dir=str(_work_folder(folder)),
            seed=seed,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=settings.batch_size // (micro * world),
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(settings.warmup_share * steps),
            weight_decay=settings.weight_decay,
            max_length=None,
            bf16=settings.precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=settings.gradient_checkpointing,
            save_strategy="steps",
            save_steps=settings.checkpoint_steps,
            save_total_limit=2,
            logging_steps=max(1, steps // LOG_POINTS),
            logging_first_step=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            **own,
        )


class _TrainingRun:
    """One training: the checkpoints on the way, and the directory at the end."""

    def __init__(
        self,
        target: Checkpoint,
        start: Checkpoint,
        settings: TrainerSettings,
        folder: Path,
        progress: StepProgress,
    ):
        self.target, self.start, self.settings, self.folder = target, start, settings, folder
        self.progress = progress
        self.partial = _work_folder(folder)

    def train(
        self,
        trainer_class: Any,
        arguments: Any,
        records: list[dict[str, Any]],
        tokenizer: Any,
        options: dict[str, Any],
    ) -> TrainingLog:
        """Train from the start or the last whole checkpoint, and write the directory."""
        with closing(WorkFolder(self.partial)) as work:
            if is_main():
                work.open(self._job(arguments, records))
            model: Any = load_model(self.start, torch.float32)
            model.config.use_cache = False
            writer = CheckpointWriter(model, self.start)
            with silence_transformers():
                trainer = trainer_class(
                    model=model,
                    args=arguments,
                    train_dataset=Dataset.from_list(records),
                    processing_class=tokenizer,
                    peft_config=self._lora(),
                    callbacks=[_ReportSteps(self.progress)],
                    embedding_rate=self.settings.embedding_rate,
                    **options,
                )
                self._run(trainer)
            state = self._state(trainer)
            if is_main():
                writer.write(state, self.folder)
            trainer.accelerator.wait_for_everyone()
            if is_main():
                work.remove()
        return list(trainer.state.log_history)

    def _run(self, trainer: Any) -> None:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        # Nobody looks for checkpoints before the main process has thrown away those of others.
        trainer.accelerator.wait_for_everyone()
        with _full_disk_as_output_error(self.partial):
            trainer.train(resume_from_checkpoint=last_checkpoint(self.partial))

    def _job(self, arguments: Any, records: list[dict[str, Any]]) -> str:
        """What decides every step; checkpoints of anything else are not continued."""
        places = ("output_dir", "run_name")
        decisive = {k: v for k, v in arguments.to_dict().items() if k not in places}
        data = blake3(json.dumps(records).encode()).hexdigest()
        settings = self.settings.model_dump(mode="json")
        return json.dumps([str(decisive), data, settings, self.start.name], sort_keys=True)

    def _lora(self) -> LoraConfig | None:
        lora = self.settings.lora
        if lora is None:
            return None
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def _state(self, trainer: Any) -> dict[str, Tensor]:
        """Whole weights by the names of the model as it was loaded."""
        if self.settings.lora is not None:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            return dict(merged.state_dict())
        return dict(trainer.accelerator.get_state_dict(trainer.model))


class _ReportSteps(TrainerCallback):
    def __init__(self, progress: StepProgress):
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Report an optimizer step."""
        self.progress(state.global_step, state.max_steps)


@contextmanager
def _full_disk_as_output_error(folder: Path) -> Iterator[None]:
    """OutputError for a checkpoint that cannot be written, whichever library reports it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise OutputError(
            f"{folder}: a checkpoint cannot be written ({reason}); free some space and run the "
            "same command to go on"
        ) from error


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; the main process deletes the others."""
    checkpoints = folder.glob("checkpoint-*")
    for checkpoint in sorted(checkpoints, key=lambda c: -int(c.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if is_main():
                shutil.rmtree(checkpoint, ignore_errors=True)
            continue
        return str(checkpoint)
    return None


def _row_record(tokenizer: Any, row: Row, limit: int) -> dict[str, Any]:
    ids, start = encode_row(tokenizer, row, limit)
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def _pair_record(tokenizer: Any, pair: Mapping[str, str], limit: int) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key in ("chosen", "rejected", "chosen_target"):
        if key in pair:
            ids, start = encode_row(tokenizer, Row(pair["prompt"], pair[key]), limit)
            record["prompt_ids"], record[f"{key}_ids"] = ids[:start], ids[start:]
    return record
