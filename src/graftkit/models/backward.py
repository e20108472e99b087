"""Logits at chosen positions, and gradients through them, of a model that may lie on disk.

A decoder layer keeps nothing but its input and runs again when its gradient is wanted, so that
the weights of one layer are in memory at a time. The output head sees the chosen positions only, a
few at a time: at (tokens, vocabulary) the logits would be the largest tensor of the pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from graftkit.models.encoding import LOGITS_BYTES, skips_logits, vocabulary_size
from graftkit.rows import batches_by_length

BACKWARD_TOKENS = 2_048  # padded tokens of one pass: inputs of 32 layers of width 4,096 are 1 GB
_CHUNK_BYTES = 2**26  # float32 logits of one chunk; a backward pass holds about five copies

Visit = Callable[[Tensor, slice], Tensor | None]
"""Given float32 logits (n, vocabulary) and their place among the scored positions, returns the
gradient with respect to them, in their shape; asked for only in a backward pass."""


def prepare_backward(model: Any) -> None:
    """Freeze a model and let its layers run again in the backward pass; for good.

    The layers of a model whose class marks none keep their weights until the backward pass.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    for layer in _outermost_layers(model):
        layer.forward = _recomputed(layer.forward)


def backward_batches(model: Any, lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of one pass of at most `tokens` padded tokens, similar lengths together."""
    if not skips_logits(model):
        tokens = max(1, min(tokens, LOGITS_BYTES // (4 * vocabulary_size(model))))
    return batches_by_length(lengths, tokens)


def visit_logits(
    model: Any, ids: Tensor, mask: Tensor, scored: Tensor, visit: Visit, *, backward: bool
) -> None:
    """Run a batch forward and, with `backward`, back again from the gradients `visit` returns.

    Args:
        ids, mask, scored: (rows, tokens); `scored` is true where logits are wanted. They are
            visited row by row, in chunks.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.set_grad_enabled(backward):
        if not skips_logits(model):
            _visit(model(**inputs).logits[scored], slice(0, int(scored.sum())), visit, backward)
            return
        output = model.base_model(**inputs)
        hidden = output[0][scored]
        leaf = hidden.detach().requires_grad_(backward)
        size = max(1, _CHUNK_BYTES // (4 * vocabulary_size(model)))
        for start in range(0, len(leaf), size):
            span = slice(start, min(start + size, len(leaf)))
            given = type(output)(**{**output, "last_hidden_state": leaf[None, span]})
            # The class's own forward: some scale or cap what the head gives.
            with _gives(model.base_model, given):
                logits = model(input_ids=ids[:1, :1]).logits[0]
            _visit(logits, span, visit, backward)
        if backward and leaf.grad is not None and hidden.requires_grad:
            torch.autograd.backward(hidden, leaf.grad)


def _visit(logits: Tensor, span: slice, visit: Visit, backward: bool) -> None:
    gradient = visit(logits.detach().float(), span)
    if backward and gradient is not None:
        torch.autograd.backward(logits, gradient.to(logits.dtype))


def _outermost_layers(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost_layers(child)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Stopped early, the second run would leave the weights that its last module read in place.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

    return run


@contextmanager
def _gives(module: nn.Module, output: Any) -> Iterator[None]:
    """The module answers `output` to anything, without running."""
    own: Any = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
