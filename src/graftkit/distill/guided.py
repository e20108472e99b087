"""SFT with more than text: sources' distributions and hidden states beside every row.

    L = a · CE + b · KL(source, target) + c · distance of hidden states

Cross-entropy and divergence are means over completion tokens, the distance is one over rows.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from graftkit.distill.config import Transfer
from graftkit.distill.distributions import Distributions, distribution_batch
from graftkit.distill.hidden import HiddenSource
from graftkit.distill.losses import distribution_loss, hidden_batch_loss, make_projections
from graftkit.distill.trainers import RowTrainer
from graftkit.errors import ConfigError
from graftkit.rows import Row

IGNORED = -100  # label of a token that is not learned


class Guide:
    """What the sources say about the rows of an SFT set.

    Args:
        files: what each source expects in the rows. hidden: the source whose states count.
        asked: the rows with their prompts as they were asked, for sources to read.
    """

    def __init__(
        self,
        settings: Transfer,
        files: Sequence[Distributions],
        hidden: HiddenSource | None,
        asked: Sequence[Row],
    ):
        self.settings, self.files, self.hidden, self.asked = settings, files, hidden, asked

    def batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors for a batch of examples with their `row`, `input_ids` and `labels`."""
        indices = [example["row"] for example in examples]
        encoded = [(e["input_ids"], e["labels"].count(IGNORED)) for e in examples]
        found: dict[str, Tensor] = {}
        if self.files:
            found |= distribution_batch(self.files, indices, encoded, self.settings.fusion)
        if self.hidden:
            found |= self.hidden.batch([self.asked[index] for index in indices], encoded)
        return found


class GuidedTrainer(RowTrainer):
    """SFT towards a guide."""

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
            # A part of the model, so that it is trained and lies in the checkpoints.
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
        """The weighted sum; a mean over the tokens of the whole step."""
        guide, settings, labels = self.guide, self.guide.settings, inputs["labels"][:, 1:]
        found = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=guide.hidden is not None,
            use_cache=False,
        )
        learned = labels != IGNORED
        tokens = learned.sum() if num_items_in_batch is None else num_items_in_batch
        summed = {
            "lm": cross_entropy(
                found.logits[:, :-1][learned].float(), labels[learned], reduction="sum"
            )
        }
        loss = settings.lm_weight * summed["lm"]
        if guide.files:
            summed["kl"] = self._divergence(found.logits, inputs)
            loss = loss + settings.kl_weight * summed["kl"]
        loss = loss / tokens
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean
        if guide.hidden:
            distance = self._distance(model, found.hidden_states, inputs)
            self._told("hidden", distance)
            loss = loss + settings.hidden_weight * distance / self._steps(num_items_in_batch)
        for name, value in summed.items():
            self._told(name, value / learned.sum().clamp(min=1))
        return (loss, found) if return_outputs else loss

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
        """Passes of one optimizer step, where the trainer does not divide by them itself."""
        return 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps

    def _told(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(value.item())


class _GuidedCollator:
    def __init__(self, rows: Any, guide: Guide):
        self.rows, self.guide = rows, guide

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The rows' own batch, and the guide's."""
        batch: dict[str, Tensor] = self.rows(examples)
        return batch | self.guide.batch(examples)
