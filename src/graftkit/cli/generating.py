"""Behind `generate`: one answer per pack, all in one batch."""

from pathlib import Path
from typing import Any

import torch

from graftkit.attach import attached
from graftkit.delta import Checkpoint
from graftkit.errors import AttachError, ConfigError
from graftkit.models.encoding import pad_id, usable_tokenizer
from graftkit.models.loading import load_model
from graftkit.skillpack import SkillPack


def generate_answers(
    target: str, files: list[Path], prompt: str, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers: of the target without packs, else one per pack, in their order.

    Raises: ConfigError for an empty prompt; AttachError for a model that cannot generate.
    """
    packs = [SkillPack.load(file) for file in files]
    checkpoint = Checkpoint.open(target)
    model: Any = load_model(checkpoint)
    if not model.can_generate():
        raise AttachError(f"{target}: {type(model).__name__} does not generate text")
    tokenizer = usable_tokenizer(checkpoint)
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to continue")
    ids = torch.tensor([tokenizer.encode(prompt)])
    count = max(1, len(packs))
    batch = ids.repeat(count, 1)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(batch),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": pad_id(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    output = _generate(model, batch, packs, options)
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    names: list[str | None] = [file.name for file in files] or [None]
    return [{"pack": name, "text": text} for name, text in zip(names, texts, strict=True)]


def _generate(
    model: Any, batch: torch.Tensor, packs: list[SkillPack], options: dict[str, Any]
) -> torch.Tensor:
    tokens: torch.Tensor
    if not packs:
        tokens = model.generate(batch, **options)
        return tokens
    # One pack runs merged, as fast as the target alone; several share the target side by side.
    with attached(model, packs, mode="merged" if len(packs) == 1 else "side") as handle:
        if len(packs) > 1:
            handle.route(list(range(len(packs))))
        tokens = model.generate(batch, **options)
    return tokens
