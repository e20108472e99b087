"""Text in and out of one model: rows as the tokens that it reads, and continuations of prompts.

Rows say which tokens are real and which are completions. Prompts are continued here alone.

What a model generates depends on more than its weights: sampling settings and penalties in
generation_config.json, the tokens that end a text, the padding of a batch. They are all set here.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, RowsError
from graftkit.models.loading import load_tokenizer, token_embedding
from graftkit.rows import (
    EncodedRow,
    Row,
    batches_by_length,
    encode_row,
    end_of_turn,
    pad_batch,
    sample_rows,
)

MICRO_BATCH_TOKENS = 4_096  # padded tokens in one pass: activations of one layer stay below 1 GB
LOGITS_BYTES = 2**28  # float32 logits of one pass, (tokens, vocabulary)


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], tokens_limit: int, seed: int, model: Any, where: str
) -> list[EncodedRow]:
    """A seeded choice of rows of at most `tokens_limit` tokens together, in file order.

    Raises: RowsError when no row has a token, one is beyond the model's context, or the tokenizer's
        chat template cannot write one; CheckpointError when the tokenizer gives a token that the
        model lacks.
    """
    context = context_length(model)

    @cache
    def encoded(row: Row) -> EncodedRow:
        return encode_row(tokenizer, row, context).first_tokens(MICRO_BATCH_TOKENS)

    chosen = sample_rows(rows, tokens_limit, seed, lambda row: len(encoded(row)))
    rows_with_tokens = [encoded(row) for row in chosen if len(encoded(row))]
    if not rows_with_tokens:
        raise RowsError("no row has a token; calibration needs at least one row with text")
    check_vocabulary(rows_with_tokens, model, where)
    return rows_with_tokens


def usable_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint.

    Raises: CheckpointError when there is none. For some architectures transformers then makes one
        up that knows its special tokens only and gives every text the same ids.
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer here; save the tokenizer into the model directory"
        )
    return tokenizer


def context_length(model: Any) -> int | None:
    """Most tokens that the model reads at once, None where its config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def pad_id(tokenizer: Any) -> int:
    """Token that fills a batch; it is masked, so any id of the vocabulary will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def vocabulary_size(model: Any) -> int:
    """Rows of the input embedding. Raises: CheckpointError where there is none."""
    size: int = token_embedding(model).weight.shape[0]
    return size


def submodule(model: Any, name: str, where: str) -> nn.Module:
    """A module of a live model. Raises: CheckpointError where there is none of that name."""
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"{where}: module {name} is not in {type(model).__name__}; expected the name of a "
            "linear module of this model"
        ) from error
    return module


def skips_logits(model: Any) -> bool:
    """Whether the output head reads the last hidden state as it is (true of causal models)."""
    return "logits_to_keep" in signature(model.forward).parameters and model.base_model is not model


def tokens_with_logits(model: Any, tokens: int) -> int:
    """At most `tokens`, and so few that their logits over the vocabulary fit LOGITS_BYTES."""
    return max(1, min(tokens, LOGITS_BYTES // (4 * vocabulary_size(model))))


def pass_batches(model: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of one forward pass each, similar lengths together."""
    tokens = MICRO_BATCH_TOKENS
    if not skips_logits(model):
        tokens = tokens_with_logits(model, tokens)
    return batches_by_length(lengths, tokens)


def real_tokens(inputs: Tensor, mask: Tensor) -> Tensor:
    """Inputs (.., in) -> (n, in), without padding; mask (rows, tokens) is true on real tokens.

    Inputs of other leading sizes (one vector a row, or tokens that a router chose) are taken whole.
    """
    if inputs.shape[:-1] == mask.shape:
        return inputs[mask]
    if inputs.shape[:-1] == (mask.numel(),):
        return inputs[mask.reshape(-1)]
    return inputs.reshape(-1, inputs.shape[-1])


def scored_tokens(model: Any, batch: Sequence[EncodedRow], mask: Tensor) -> Tensor:
    """Positions whose logits count, (rows, tokens) bool: those that predict a scored token.

    Of a model that does not predict the next token, such as an encoder, every real token.
    """
    if not model.can_generate():
        return mask.bool()
    scored = torch.zeros_like(mask, dtype=torch.bool)
    for index, row in enumerate(batch):
        scored[index, : max(0, len(row) - 1)] = torch.tensor(row.scored[1:], dtype=torch.bool)
    return scored


@contextmanager
def one_thread() -> Iterator[None]:
    """Sum in one order on every machine; the number of threads is process wide, so restore it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_vocabulary(encoded: Sequence[EncodedRow], model: Any, where: str) -> None:
    """Raises: CheckpointError where rows hold a token that the model has no embedding of."""
    largest, vocabulary = max(max(row.ids, default=0) for row in encoded), vocabulary_size(model)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{where}: the tokenizer gives token {largest}, but the model has {vocabulary} "
            "embeddings; use the tokenizer that belongs to this model"
        )


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
    config = copy.deepcopy(model.generation_config if settings is None else settings)
    config.update(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    return _generate(model, prompts, config, **hooks)


def generate_sampled(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int,
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
    suppress_tokens: list[int] | None = None,
) -> Tensor:
    """Continue prompts by tokens drawn from the model's own probabilities, at temperature 1.

    Other settings of the model do not apply. The random state of the caller stays as it is.

    Args:
        model: on the CPU, or streamed from disk.
        prompts: token ids of every prompt, at least one each.
        max_new_tokens: longest continuation; prompt and continuation must fit into the context.
        seed: of the draws; the tokens of a prompt also depend on its batch.
        eos_token_id: the token, or tokens, that end a continuation; None for no end.
        pad_token_id: fills the batch, where it is masked, and the output behind an end.
        suppress_tokens: tokens that are never drawn.
    Returns: the new tokens, (rows, longest continuation) int64.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        suppress_tokens=suppress_tokens or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also sets those of GPUs
        return _generate(model, prompts, config)


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, **hooks: Any
) -> Tensor:
    """The tokens behind the prompts, (rows, longest continuation), by this configuration alone."""
    ids, mask = pad_batch(prompts, config.pad_token_id, left=True)
    # A model that is streamed from disk is on no device, and takes its inputs from the CPU.
    device = "cpu" if model.device.type == "meta" else model.device
    own = model.generation_config
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
