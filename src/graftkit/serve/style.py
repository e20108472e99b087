"""How the target, or a pack, reads prompts and generates text."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graftkit.attachment.configuration import (
    check_tokenizer,
    reads_chat,
    tuned_generation_config,
    tuned_tokenizer,
)
from graftkit.checkpoint import Checkpoint
from graftkit.models.text import end_tokens
from graftkit.rows import encode_question, template_digest
from graftkit.skillpack import SkillPack


@dataclass(frozen=True)
class GenerationStyle:
    """How one model generates text; rows of equal styles can share a batch.

    Attributes:
        tokenizer: writes prompts, and decodes what was generated. generation: a GenerationConfig.
        ends: the tokens that end a text. settings: `generation` as text.
        template: digest of the chat template in which prompts are given; None for raw prompts.
    """

    tokenizer: Any = field(compare=False)
    generation: Any = field(compare=False)
    ends: tuple[int, ...]
    settings: str
    template: str | None

    @classmethod
    def of(cls, tokenizer: Any, generation: Any, chat: bool) -> "GenerationStyle":
        """Of a tokenizer and a GenerationConfig. chat: give prompts in the chat template."""
        return cls(
            tokenizer,
            generation,
            tuple(end_tokens(generation, tokenizer, chat)),
            generation.to_json_string(use_diff=True),
            template_digest(tokenizer) if chat else None,
        )

    def raw(self) -> "GenerationStyle":
        """The same with raw prompts."""
        return self if self.template is None else self.of(self.tokenizer, self.generation, False)

    def encode(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids from which a prompt is answered. Raises: RowsError, as `encode_question`."""
        return encode_question(self.tokenizer, prompt, self.template is not None, system)


def pack_style(
    checkpoint: Checkpoint, model: Any, tokenizer: Any, pack: SkillPack
) -> GenerationStyle:
    """The style of a pack; of the target where it brings nothing of its own.

    Args:
        checkpoint, model, tokenizer: the target.
    Raises: PackMismatchError for a skill that was trained in another chat template, or a tokenizer
        that gives a text other tokens.
    """
    if pack.manifest.files:
        check_tokenizer(checkpoint, pack)
        tokenizer = tuned_tokenizer(checkpoint, pack)
    settings = tuned_generation_config(model, pack)
    return GenerationStyle.of(tokenizer, settings, reads_chat(tokenizer, pack))


class SettingsProcessors:
    """The penalties and suppressed tokens of generation settings, as `generate` applies them."""

    def __init__(self, model: Any):
        self._model = model
        self._without: set[str] = set()  # settings that have none, as text

    def of(self, style: GenerationStyle, ids: Sequence[int]) -> Any:
        """The logits processors of an answer to a prompt; None where there are none."""
        if style.settings in self._without:
            return None
        config = copy.deepcopy(style.generation)
        config.update(do_sample=False, eos_token_id=list(style.ends) or None, pad_token_id=0)
        device = self._model.device
        self._model._prepare_special_tokens(config, True, device=device)
        made = self._model._get_logits_processor(
            config,
            input_ids_seq_length=len(ids),
            encoder_input_ids=torch.tensor([list(ids)], device=device),
            device=device,
        )
        if not made:
            self._without.add(style.settings)
        return made or None
