"""TRL's trainers for rows that are tokens already, with two learning rates, transfer, and WRPO."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from graftkit.distill.transfer.guide import IGNORED, Guide
from graftkit.distill.transfer.losses import distribution_loss, hidden_batch_loss, make_projections
from graftkit.errors import ConfigError
from graftkit.rows import pad_batch


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
