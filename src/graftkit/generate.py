"""Greedy generation: the one place where this package continues prompts.

What a model generates depends on more than its weights: sampling settings and penalties in
generation_config.json, the tokens that end a text, the padding of a batch. They are all set here.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftkit.rows import end_of_turn, pad_batch


def end_tokens(generation: Any, tokenizer: Any, chat: bool = False) -> list[int]:
    """Tokens that end a text, by a GenerationConfig and by the tokenizer, in ascending order.

    Args:
        chat: also the token behind an answer in the tokenizer's chat template.
    """
    own = generation.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    if chat:
        ends.add(end_of_turn(tokenizer))
    return sorted(ends - {None})


def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
    settings: Any = None,
    **hooks: Any,
) -> Tensor:
    """Continue prompts by the most likely token at each step, all of them in one batch.

    Args:
        prompts: token ids of every prompt, at least one each.
        max_new_tokens: longest continuation; prompt and continuation must fit into the context.
        eos_token_id: the token, or tokens, that end a continuation; None for no end.
        pad_token_id: fills the batch, where it is masked, and the output behind an end.
        settings: a GenerationConfig whose penalties and the like apply, in place of the model's.
        hooks: `logits_processor` and `stopping_criteria` of transformers.
    Returns: the new tokens, (rows, longest continuation) int64.
    """
    ids, mask = pad_batch(prompts, pad_token_id, left=True)
    # A model that is streamed from disk is on no device, and takes its inputs from the CPU.
    device = "cpu" if model.device.type == "meta" else model.device
    own = model.generation_config
    config = copy.deepcopy(own if settings is None else settings)
    config.update(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    # `generate` fills what `config` leaves open from the model's settings, so they are replaced.
    model.generation_config = config
    try:
        with torch.no_grad():
            output: Tensor = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                **hooks,
            )
    finally:
        model.generation_config = own
    return output[:, ids.shape[1] :]
