"""SFT and DPO on TRL: rows or pairs in, an ordinary model directory out; a killed run continues.

Both start from a model directory and end in one whose files are the target's own but for the
weights. The reference of DPO is an argument, never inferred: the directory after SFT. TRL's
trainers are extended for rows that are tokens already, two learning rates, explicit transfer, and
WRPO.
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import Dpo, Sft, TrainerSettings
from graftkit.distill.transfer.losses import (
    IGNORED,
    Guide,
    distribution_loss,
    hidden_batch_loss,
    make_projections,
)
from graftkit.distill.workspace import is_main, processes
from graftkit.errors import ConfigError, OutputError
from graftkit.files import WorkFolder
from graftkit.models.loading import load_model, silence_transformers
from graftkit.models.text import usable_tokenizer
from graftkit.models.views import CheckpointWriter
from graftkit.progress import StepProgress
from graftkit.rows import Row, encode_row, pad_batch


class _EmbeddingRate:
    """A trainer mixin: embeddings and head have a share of the learning rate of other weights."""

    def __init__(self, *arguments: Any, embedding_rate: float = 1.0, **options: Any):
        self.embedding_rate = embedding_rate
        super().__init__(*arguments, **options)

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's optimizer, with groups of their own for embeddings and head."""
        optimizer = super().create_optimizer(*([] if model is None else [model]))  # type: ignore[misc]
        if self.embedding_rate != 1.0:
            slow = {id(parameter) for parameter in _embeddings(self.model)}  # type: ignore[attr-defined]
            for group in list(optimizer.param_groups):
                embeddings = [p for p in group["params"] if id(p) in slow]
                if embeddings:
                    group["params"] = [p for p in group["params"] if id(p) not in slow]
                    rate = group["lr"] * self.embedding_rate
                    optimizer.add_param_group({**group, "params": embeddings, "lr": rate})
        return optimizer


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    """Input embedding and output head, once where they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    weights = [module.weight for module in modules if module is not None]
    return list(dict.fromkeys(weights))


class RowTrainer(_EmbeddingRate, SFTTrainer):  # type: ignore[misc]
    """SFT on tokenized rows."""


class GuidedTrainer(RowTrainer):
    """SFT with explicit transfer.

        L = a · CE + b · KL(source, target) + c · distance of hidden states

    Cross-entropy and divergence are means over completion tokens, the distance is one over rows.
    """

    def __init__(self, *arguments: Any, guide: Guide, seed: int, **options: Any):
        self.guide, hidden = guide, guide.hidden
        if hidden and guide.settings.hidden != "gram":
            model = options["model"]
            width = model.config.get_text_config().hidden_size
            maps = make_projections(len(hidden.pairs), width, hidden.width, seed)
            if maps is not None and options.get("peft_config") is not None:
                raise ConfigError(
                    f"transfer.hidden = {guide.settings.hidden} needs a projection from width "
                    f"{width} to {hidden.width}, which an adapter has no place for; choose gram"
                )
            # A module of the model, so that it is trained and stored in the checkpoints.
            model.graft_projections = maps
        super().__init__(*arguments, **options)
        self.data_collator: Any = _GuidedCollator(self.data_collator, guide)
        if hidden:
            hidden.model.to(self.accelerator.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the losses, as a mean over the tokens of the optimizer step."""
        guide, settings, labels = self.guide, self.guide.settings, inputs["labels"][:, 1:]
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=guide.hidden is not None,
            use_cache=False,
        )
        learned = labels != IGNORED
        tokens = learned.sum() if num_items_in_batch is None else num_items_in_batch
        summed = {
            "lm": cross_entropy(
                output.logits[:, :-1][learned].float(), labels[learned], reduction="sum"
            )
        }
        loss = settings.lm_weight * summed["lm"]
        if guide.files:
            summed["kl"] = self._divergence(output.logits, inputs)
            loss = loss + settings.kl_weight * summed["kl"]
        loss = loss / tokens
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean
        if guide.hidden:
            distance = self._distance(model, output.hidden_states, inputs)
            self._log_metric("hidden", distance)
            loss = loss + settings.hidden_weight * distance / self._steps(num_items_in_batch)
        for name, value in summed.items():
            self._log_metric(name, value / learned.sum().clamp(min=1))
        return (loss, output) if return_outputs else loss

    def _divergence(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        mask, settings = inputs["kl_mask"], self.guide.settings
        divergence = distribution_loss(
            logits[mask],
            inputs["kl_ids"][mask],
            inputs["kl_log_probs"][mask],
            inputs["kl_log_rest"][mask],
            settings.divergence,
            settings.temperature,
        )
        return divergence.sum()

    def _distance(self, model: Any, states: Sequence[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.guide.hidden
        assert hidden is not None
        maps = getattr(self.accelerator.unwrap_model(model), "graft_projections", None)
        source, kind = hidden.states(inputs), self.guide.settings.hidden
        return hidden_batch_loss(states, source, inputs, kind, hidden.pairs, maps).mean()

    def _steps(self, num_items_in_batch: Any) -> int:
        """Passes per optimizer step to divide by; 1 where the trainer divides itself."""
        return 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps

    def _log_metric(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(value.item())


class _GuidedCollator:
    def __init__(self, rows: Any, guide: Guide):
        self.rows, self.guide = rows, guide

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of the rows, with the guide's tensors."""
        batch: dict[str, Tensor] = self.rows(examples)
        return batch | self.guide.batch(examples)


class PairTrainer(_EmbeddingRate, DPOTrainer):  # type: ignore[misc]
    """DPO on tokenized pairs."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        # TRL would tokenize prompt + answer together, which may merge tokens across the border.
        return dataset


class WrpoTrainer(PairTrainer):
    """Weighted-reward preference optimisation (arXiv 2412.03187)."""

    def __init__(self, *arguments: Any, alpha: float, **options: Any):
        self.alpha = alpha
        super().__init__(*arguments, **options)
        self.data_collator: Any = _Triples(pad_token_id=self._tokenizer.pad_token_id)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        """−log σ(β (α s_c + (1 − α) s_t − s_r)); α rises linearly from 0."""
        scores = self._log_probs(model, inputs) - self._reference(model, inputs)
        chosen, own, rejected = scores.chunk(3)
        alpha = self.alpha * self.state.global_step / max(1, self.state.max_steps)
        margin = alpha * chosen + (1 - alpha) * own - rejected
        loss = -logsigmoid(self.beta * margin).mean()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/margins"].append((self.beta * margin).mean().item())
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def _reference(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if self.ref_model is not None:
            return self._log_probs(self.ref_model, inputs)
        with self.accelerator.unwrap_model(model).disable_adapter():
            return self._log_probs(model, inputs)

    @staticmethod
    def _log_probs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """log π(y|x), one for each row of the batch."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        per_row: Tensor = output.log_probs.sum(dim=1)
        return per_row


class _Triples(DataCollatorForPreference):  # type: ignore[misc]
    """Batches of chosen, the target's own, and rejected answers, one block after the other."""

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of 3 n rows."""
        keys = ("chosen_ids", "chosen_target_ids", "rejected_ids")
        rows = [(e["prompt_ids"], e[key]) for key in keys for e in examples]
        ids, mask = pad_batch([[*prompt, *answer] for prompt, answer in rows], self.pad_token_id)
        prompts = torch.tensor([len(prompt) for prompt, _ in rows])
        positions = torch.arange(ids.shape[1])
        answers = (positions >= prompts[:, None]) & mask.bool()
        return {"input_ids": ids, "attention_mask": mask, "completion_mask": answers.long()}


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
    encoded = encode_row(tokenizer, row, limit)
    labels = [i if scored else -100 for i, scored in zip(encoded.ids, encoded.scored, strict=True)]
    return {"input_ids": encoded.ids, "labels": labels}


def _pair_record(tokenizer: Any, pair: Mapping[str, str], limit: int) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key in ("chosen", "rejected", "chosen_target"):
        if key in pair:
            encoded = encode_row(tokenizer, Row(pair["prompt"], pair[key]), limit)
            ids, start = encoded.ids, encoded.start
            record["prompt_ids"], record[f"{key}_ids"] = ids[:start], ids[start:]
    return record
