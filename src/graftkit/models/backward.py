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
    model: Any,
    ids: Tensor,
    mask: Tensor,
    scored: Tensor,
    visit: Visit,
    *,
    backward: bool,
    also: Callable[[], Tensor] | None = None,
) -> None:
    """Run a batch forward and, with `backward`, back again from the gradients `visit` returns.

    Args:
        ids, mask, scored: (rows, tokens); `scored` is true where logits are wanted. They are
            visited row by row, in chunks.
        also: one more loss of the same pass, a scalar, asked for in a backward pass only.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.set_grad_enabled(backward):
        if not skips_logits(model):
            logits = model(**inputs).logits[scored]
            given = visit(logits.detach().float(), slice(0, len(logits)))
            gradient = None if given is None else given.to(logits.dtype)
            _backward((logits, gradient), backward, also)
            return
        output = model.base_model(**inputs)
        hidden = output[0][scored]
        leaf = hidden.detach().requires_grad_(backward)
        _visit_chunks(model, output, leaf, ids[:1, :1], visit, backward)
        _backward((hidden, leaf.grad), backward, also)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every pass appends the outputs of the model's layers to; empty it before one.

    It stays empty for a model whose class marks no layers.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in _outermost_layers(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _visit_chunks(
    model: Any, output: Any, leaf: Tensor, token: Tensor, visit: Visit, backward: bool
) -> None:
    """Logits of the hidden states `leaf` (n, hidden), a few at a time; leaf.grad adds up."""
    size = max(1, _CHUNK_BYTES // (4 * vocabulary_size(model)))
    for start in range(0, len(leaf), size):
        span = slice(start, min(start + size, len(leaf)))
        given = type(output)(**{**output, "last_hidden_state": leaf[None, span]})
        # The class's own forward: some scale or cap what the head gives.
        with _gives(model.base_model, given):
            logits = model(input_ids=token).logits[0]
        gradient = visit(logits.detach().float(), span)
        if backward and gradient is not None:
            torch.autograd.backward(logits, gradient.to(logits.dtype))


def _backward(
    root: tuple[Tensor, Tensor | None], backward: bool, also: Callable[[], Tensor] | None
) -> None:
    """One backward pass from a tensor with its gradient and from a further loss."""
    if not backward:
        return
    roots: list[tuple[Tensor, Tensor | None]] = [root] if root[1] is not None else []
    if also is not None:
        roots.append((also(), None))
    tensors = [tensor for tensor, _ in roots if tensor.requires_grad]
    gradients = [gradient for tensor, gradient in roots if tensor.requires_grad]
    if tensors:
        torch.autograd.backward(tensors, gradients)


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
