"""Backward passes through a model that may lie on disk, and the output sensitivities they give.

A decoder layer that is streamed from disk stores nothing but its input and runs again for its
gradient, so that the weights of one layer are in memory at a time. The output head sees the scored
positions only, a few at a time: at (tokens, vocabulary) the logits would be the largest tensor of
the pass.

Output sensitivities of the tuned model tell what an error in a layer's output does to the answer:

    KL(tuned ‖ tuned + E) ≈ ½ mean(s) tr(E H Eᵀ),   s_o = 1/N Σ_t g_to²,   H = mean of x xᵀ

for an error E (out, in) in the weight of one linear module, with g_t the gradient of log p(y) by
the module's output at token t, N completion tokens, and y drawn from the model itself at each of
them: the Fisher information, which a reference answer would not give. Divergences are per
completion token, H is that of all tokens (models/calibration.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models.calibration import CovarianceStore, job_digest, prepared_for_rows
from graftkit.models.loading import is_streamed, output_embeddings, token_embedding
from graftkit.models.text import (
    real_tokens,
    scored_tokens,
    skips_logits,
    submodule,
    tokens_with_logits,
    vocabulary_size,
)
from graftkit.progress import StepProgress, silent
from graftkit.rows import EncodedRow, Row, batches_by_length, pad_batch

BACKWARD_TOKENS = 2_048  # padded tokens of one pass: inputs of 32 layers of width 4,096 are 1 GB
KEPT_TOKENS = 512  # the same where every layer keeps all its activations
_CHUNK_BYTES = 2**25  # float32 logits of one chunk; a backward pass holds about five copies

LogitsVisitor = Callable[[Tensor, slice], Tensor | None]
"""Given float32 logits (n, vocabulary) and their place among the scored positions, returns the
gradient with respect to them, in their shape; None or unused where there is no backward pass."""


def prepare_backward(model: Any) -> None:
    """Freeze a model; layers that are streamed from disk run again in the backward pass. For good.

    The layers of a model whose class marks none keep their weights until the backward pass.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    for layer in _outermost_layers(model) if is_streamed(model) else ():
        layer.forward = _recomputed(layer.forward)


def backward_batches(model: Any, lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of one pass of at most `tokens` padded tokens, similar lengths together."""
    if not skips_logits(model):
        tokens = tokens_with_logits(model, tokens)
    return batches_by_length(lengths, tokens)


def visit_logits(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    scored: Tensor,
    visit: LogitsVisitor,
    *,
    backward: bool,
    extra_loss: Callable[[], Tensor] | None = None,
) -> None:
    """Run a batch forward and, with `backward`, back again from the gradients `visit` returns.

    Args:
        ids, mask, scored: (rows, tokens); `scored` is true at the positions whose logits are
            visited, row by row, in chunks.
        extra_loss: one more loss of the same pass, a scalar, called in a backward pass only.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.set_grad_enabled(backward):
        if not skips_logits(model):
            logits = model(**inputs).logits[scored]
            gradient = visit(logits.detach().float(), slice(0, len(logits)))
            gradient = None if gradient is None else gradient.to(logits.dtype)
            _backward((logits, gradient), backward, extra_loss)
            return
        output = model.base_model(**inputs)
        hidden = output[0][scored]
        leaf = hidden.detach().requires_grad_(backward)
        _visit_chunks(model, output, leaf, ids[:1, :1], visit, backward)
        _backward((hidden, leaf.grad), backward, extra_loss)


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
    model: Any, output: Any, leaf: Tensor, token: Tensor, visit: LogitsVisitor, backward: bool
) -> None:
    """Logits of the hidden states `leaf` (n, hidden), a few at a time; leaf.grad adds up."""
    size = max(1, _CHUNK_BYTES // (4 * vocabulary_size(model)))
    for start in range(0, len(leaf), size):
        span = slice(start, min(start + size, len(leaf)))
        # Cut before the batch dimension is added: of another stride, torch would copy the head's
        # whole weight for the product.
        chunk = type(output)(**{**output, "last_hidden_state": leaf[span][None]})
        # The class's own forward, because some classes scale or cap the logits of the head.
        with _fixed_output(model.base_model, chunk):
            logits = model(input_ids=token).logits[0]
        gradient = visit(logits.detach().float(), span)
        if backward and gradient is not None:
            torch.autograd.backward(logits, gradient.to(logits.dtype))


def _backward(
    root: tuple[Tensor, Tensor | None], backward: bool, extra_loss: Callable[[], Tensor] | None
) -> None:
    """One backward pass from a tensor with its gradient and from a further loss."""
    if not backward:
        return
    roots: list[tuple[Tensor, Tensor | None]] = [root] if root[1] is not None else []
    if extra_loss is not None:
        roots.append((extra_loss(), None))
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
def _fixed_output(module: nn.Module, output: Any) -> Iterator[None]:
    """The module returns `output` for any arguments, without running."""
    own: Any = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


SENSITIVITY_TOKENS = 8_192  # a backward pass costs three forward ones; sums need fewer than H does
GRADIENT = "gradient:"  # prefix of the store keys of vectors
EMBEDDING_GRADIENT, HEAD_GRADIENT = f"{GRADIENT}embedding", f"{GRADIENT}head"
HEAD_COMPLETIONS = "head:completions"  # store key: H of the head's input where logits count


@dataclass(frozen=True)
class SensitivitySummary:
    """What was measured."""

    rows: int
    """Rows used; a seeded choice when the file holds more than are needed."""
    tokens: int
    """Tokens read, padding not counted."""
    scored: int
    """Tokens of completions, whose logits count; 0 where the model gives no logits."""
    seed: int


def collect_sensitivities(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    modules: Sequence[str],
    store: CovarianceStore,
    seed: int,
    progress: StepProgress | None = None,
) -> SensitivitySummary:
    """Run the model of `checkpoint` forward and back on prompt + completion and fill `store`.

    Keys, all float32: `gradient:<module>` (out,) for each linear module of `modules` that a
    gradient reaches: s above. `gradient:embedding` (vocabulary,): 1/N Σ |g|² / hidden over the
    positions of each token, g by the embedding's output. `gradient:head` (vocabulary,): mean of
    p (1 − p) over completion tokens. `head:completions` (hidden, hidden): mean of x xᵀ of the
    head's input over them. A model without an output head has no keys.

    A finished store of the same job is kept; give another folder than the covariances'.
    Raises: CheckpointError when the tokenizer is missing or does not fit, a module is missing or
        a gradient is not finite; RowsError for a row beyond the model's context; OutputError.
    """
    job = "sensitivities " + job_digest(checkpoint, rows, modules, [SENSITIVITY_TOKENS, seed])
    finished = store.finished(job)
    if finished is not None:
        return SensitivitySummary(**finished)
    store.clear()
    report = progress or silent
    with prepared_for_rows(checkpoint, rows, SENSITIVITY_TOKENS, seed, store) as prepared:
        model, encoded, pad = prepared
        collector = _SensitivityCollector(model, modules, seed, checkpoint.name)
        tokens = BACKWARD_TOKENS if is_streamed(model) else KEPT_TOKENS
        batches = backward_batches(model, list(map(len, encoded)), tokens)
        if output_embeddings(model) is None:
            batches = []
        for done, batch in enumerate(batches):
            report(done, len(batches))
            collector.run([encoded[index] for index in batch], pad)
        collector.save(store)
    tokens = sum(map(len, encoded))
    summary = SensitivitySummary(len(encoded), tokens, collector.scored_tokens, seed)
    store.finish(job, asdict(summary))
    report(len(batches), len(batches))
    return summary


class _SensitivityCollector:
    """Sums of squared gradients, taken by hooks on the outputs of modules during backward passes.

    A hook also runs when a layer runs again for its backward pass, but no gradient ever comes to
    the outputs of that second run.
    """

    def __init__(self, model: Any, modules: Sequence[str], seed: int, where: str):
        self.model, self.where = model, where
        self.generator = torch.Generator().manual_seed(seed)
        self.sums: dict[str, Tensor] = {}
        self.scored_tokens = 0
        self.ids = self.scored = torch.empty(0)
        prepare_backward(model)
        self.head = output_embeddings(model)
        self.head_names = []
        token_embedding(model).register_forward_hook(self._start)
        for name in modules:
            module = submodule(model, name, where)
            if module is self.head:
                self.head_names.append(name)
            else:
                module.register_forward_hook(self._watch(name))
        if self.head is not None:
            self.head.register_forward_pre_hook(self._add_head_input)

    def run(self, rows: Sequence[EncodedRow], pad: int) -> None:
        """One batch, forward and back."""
        self.ids, mask = pad_batch([row.ids for row in rows], pad)
        self.scored = scored_tokens(self.model, rows, mask)
        self.scored_tokens += int(self.scored.sum())
        if self.scored.any():
            visit_logits(self.model, self.ids, mask, self.scored, self._sample, backward=True)

    def save(self, store: CovarianceStore) -> None:
        """Write every sum as a mean over the scored tokens."""
        for key, total in self.sums.items():
            mean = (total / self.scored_tokens).float()
            if not mean.isfinite().all():
                raise CheckpointError(
                    f"{self.where}: {key} is not finite (NaN or infinity) on the calibration rows; "
                    "check the weights of the model"
                )
            store.put(key, mean)
        for name in self.head_names:
            if HEAD_GRADIENT in store:
                store.alias(GRADIENT + name, HEAD_GRADIENT)

    def _sample(self, logits: Tensor, span: slice) -> Tensor:
        """∂ log p(y) / ∂ logits = [v = y] − p_v, with y drawn from p. Raises: CheckpointError."""
        probabilities = logits.softmax(dim=1)
        if not probabilities.isfinite().all():
            raise CheckpointError(
                f"{self.where}: the logits are not finite (NaN or infinity) on the calibration "
                "rows; check the weights of the model, or pack without rows"
            )
        self._add(HEAD_GRADIENT, (probabilities * (1 - probabilities)).sum(dim=0))
        # One random number a token: the draw does not depend on how the logits are cut in chunks.
        uniform = torch.rand((len(probabilities), 1), generator=self.generator)
        cumulative = probabilities.cumsum(dim=1)
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
        gradient = probabilities.neg_()
        return gradient.scatter_add_(1, tokens, torch.ones_like(uniform))

    def _start(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Let gradients reach the embedding's output; all before it is frozen."""
        if not torch.is_grad_enabled() or output.shape[:2] != self.ids.shape:
            return None
        start = output.detach().requires_grad_()
        start.register_hook(self._add_embedding)  # type: ignore[no-untyped-call]
        return start.clone()  # a model may add to it in place

    def _add_embedding(self, gradient: Tensor) -> None:
        squares = gradient.float().square().mean(dim=-1).reshape(-1)
        total = torch.zeros(vocabulary_size(self.model))
        self._add(EMBEDDING_GRADIENT, total.index_add_(0, self.ids.reshape(-1), squares))

    def _watch(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            squares = gradient.float().square().reshape(-1, gradient.shape[-1])
            self._add(GRADIENT + name, squares.sum(dim=0))

        def after_forward(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return after_forward

    def _add_head_input(self, module: nn.Module, args: Any) -> None:
        """Inputs of the head, which sees the scored tokens only unless it cannot do without all."""
        inputs = args[0].detach()
        values = real_tokens(inputs, self.scored).float()
        self._add(HEAD_COMPLETIONS, values.T @ values)

    def _add(self, key: str, part: Tensor) -> None:
        """Sum in float64: many small squares."""
        self.sums[key] = self.sums[key].add_(part) if key in self.sums else part.double()
