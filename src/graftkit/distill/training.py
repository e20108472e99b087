"""SFT and DPO on TRL: rows or pairs in, an ordinary model directory out; a killed run continues.

Both start from a model directory and end in one whose files are the target's own but for the
weights. The reference of DPO is an argument, never inferred: the directory after SFT.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from graftkit.distill.config import Dpo, Sft, Training
from graftkit.distill.guided import Guide, GuidedTrainer
from graftkit.distill.launch import is_main, processes
from graftkit.distill.trainers import PairTrainer, RowTrainer, WrpoTrainer
from graftkit.errors import ConfigError, OutputError
from graftkit.files import WorkFolder
from graftkit.models.encoding import usable_tokenizer
from graftkit.models.loading import load_model, silence_transformers
from graftkit.models.views import CheckpointWriter
from graftkit.rows import Row, encode_row

Progress = Callable[[int, int], None]
"""Called with (optimizer steps done, steps in all)."""
Log = list[dict[str, float]]
"""Loss, learning rate and what else the trainer says, by step."""

LOGS = 200  # points of a loss curve, at most


def train_rows(
    target: Checkpoint,
    rows: Sequence[Row],
    settings: Sft,
    seed: int,
    folder: Path,
    progress: Progress,
    guide: Guide | None = None,
) -> Log:
    """Supervised fine-tuning on completions; writes `folder`, a model directory.

        L = −Σ log p(completion, EOS | prompt) / tokens

    Args:
        guide: what sources say about these rows, for explicit transfer (see `guided`).
    Raises: CheckpointError, ConfigError, OutputError; RowsError for a row beyond the context.
    """
    tokenizer = usable_tokenizer(target)
    records = [_row_record(tokenizer, row, settings.max_tokens) for row in rows]
    options: dict[str, Any] = {}
    if guide is not None:
        records = [record | {"row": index} for index, record in enumerate(records)]
        options = {"guide": guide, "seed": seed}
    stage = _Stage(target, target, settings, folder, progress)
    own = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = stage.arguments(SFTConfig, len(records), seed, own)
    trainer = RowTrainer if guide is None else GuidedTrainer
    return stage.train(trainer, arguments, records, tokenizer, options)


def train_pairs(
    target: Checkpoint,
    reference: Checkpoint,
    pairs: Sequence[Mapping[str, str]],
    settings: Dpo,
    seed: int,
    folder: Path,
    progress: Progress,
) -> Log:
    """Preference optimisation from `reference` on; writes `folder`, a model directory.

        sigmoid       L = −log σ(β (s_c − s_r)),            s = log π(y|x) − log π_ref(y|x)
        sigmoid_norm  L = −log σ(β (s_c / n_c − s_r / n_r))                 n tokens of the answer
        wrpo          L = −log σ(β (α s_c + (1 − α) s_t − s_r))    t: the target's own (2412.03187)

    The loss of the first step is log 2 by definition.

    Args:
        reference: π_ref and the start: the model after SFT.
        pairs: prompt, chosen, rejected, and chosen_target for wrpo.
    Raises: CheckpointError, ConfigError, OutputError; RowsError for a pair beyond the context.
    """
    tokenizer = usable_tokenizer(reference)
    records = [_pair_record(tokenizer, pair, settings.max_tokens) for pair in pairs]
    stage = _Stage(target, reference, settings, folder, progress)
    wrpo = settings.loss == "wrpo"
    kind = "sigmoid" if wrpo else settings.loss
    own = {"max_length": None, "beta": settings.beta, "loss_type": [kind]}
    arguments = stage.arguments(DPOConfig, len(records), seed, own)
    options: dict[str, Any] = {"alpha": settings.wrpo_alpha} if wrpo else {}
    if settings.lora is None:
        options["ref_model"] = load_model(reference, torch.float32)
    trainer = WrpoTrainer if wrpo else PairTrainer
    return stage.train(trainer, arguments, records, tokenizer, options)


class _Stage:
    """What both trainings share: arguments, the checkpoints between, the directory at the end."""

    def __init__(
        self,
        target: Checkpoint,
        start: Checkpoint,
        settings: Training,
        folder: Path,
        progress: Progress,
    ):
        self.target, self.start, self.settings, self.folder = target, start, settings, folder
        self.progress = progress
        self.partial = folder.with_name(folder.name + ".partial")

    def arguments(self, kind: Any, rows: int, seed: int, own: Mapping[str, Any]) -> Any:
        """The trainer's settings, for so many rows; own: what only this kind of trainer knows."""
        s, world = self.settings, processes()
        micro = min(s.micro_batch_size or s.batch_size, max(1, s.batch_size // world))
        if s.batch_size % (micro * world):
            raise ConfigError(
                f"batch_size {s.batch_size} is no multiple of {world} processes x {micro} rows; "
                "choose a micro_batch_size that divides it"
            )
        steps = max(1, round(s.epochs * rows / s.batch_size))
        shared = {
            "output_dir": str(self.partial),
            "seed": seed,
            "num_train_epochs": s.epochs,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": s.batch_size // (micro * world),
            "learning_rate": s.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": int(s.warmup_share * steps),
            "weight_decay": s.weight_decay,
            "bf16": s.precision == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": s.gradient_checkpointing,
            "save_strategy": "steps",
            "save_steps": s.checkpoint_steps,
            "save_total_limit": 2,
            "logging_steps": max(1, steps // LOGS),
            "logging_first_step": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
        }
        with silence_transformers():
            return kind(**shared, **own)

    def train(
        self,
        trainer_class: Any,
        arguments: Any,
        records: list[dict[str, Any]],
        tokenizer: Any,
        options: dict[str, Any],
    ) -> Log:
        """Train from the start or the last whole checkpoint, and write the directory."""
        with closing(WorkFolder(self.partial)) as work:
            if is_main():
                work.open(self._job(arguments, records))
            log = self._train(trainer_class, arguments, records, tokenizer, options)
            if is_main():
                work.remove()
        return log

    def _train(
        self,
        trainer_class: Any,
        arguments: Any,
        records: list[dict[str, Any]],
        tokenizer: Any,
        options: dict[str, Any],
    ) -> Log:
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
                callbacks=[_Report(self.progress)],
                embedding_rate=self.settings.embedding_rate,
                **options,
            )
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            # Nobody looks for checkpoints before the main process has thrown away those of others.
            trainer.accelerator.wait_for_everyone()
            with _plain_full_disk(self.partial):
                trainer.train(resume_from_checkpoint=last_checkpoint(self.partial))
        state = self._state(trainer)
        if is_main():
            writer.write(state, self.folder)
        trainer.accelerator.wait_for_everyone()
        return list(trainer.state.log_history)

    def _job(self, arguments: Any, records: list[dict[str, Any]]) -> str:
        """What decides every step; checkpoints of anything else are not continued."""
        said = {k: v for k, v in arguments.to_dict().items() if k not in ("output_dir", "run_name")}
        data = blake3(json.dumps(records).encode()).hexdigest()
        settings = self.settings.model_dump(mode="json")
        return json.dumps([str(said), data, settings, self.start.name], sort_keys=True)

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


class _Report(TrainerCallback):
    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Tell how far it is."""
        self.progress(state.global_step, state.max_steps)


@contextmanager
def _plain_full_disk(folder: Path) -> Iterator[None]:
    """OutputError for a checkpoint that cannot be written, in whose words ever it is said."""
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
    found = sorted(folder.glob("checkpoint-*"), key=lambda c: int(c.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
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
