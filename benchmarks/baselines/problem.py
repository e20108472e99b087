"""What a baseline is given: two states of one model, and rows to measure activations and KL on."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.embedding import encode_embedding
from graftkit.checkpoint import Checkpoint
from graftkit.compress.lowrank import eigenbasis, left_vectors
from graftkit.evaluate import token_fidelity
from graftkit.models.architecture import ModuleKind, tensor_roles
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.rows import Row, encode_row, pad_batch

CHOICE_ROWS = 64
"""Calibration rows on which candidates are compared."""

BATCH_ROWS = 32
DAMPING = 0.01  # of the mean diagonal of H, GPTQ's value


class TargetSide:
    """All that a decoder knows beside the file: the target's tensors, and which is of what kind."""

    def __init__(self, target: Path):
        checkpoint = Checkpoint.open(target)
        roles = tensor_roles(checkpoint)
        self.before = {name: checkpoint.read(name) for name in checkpoint.tensors}
        self.nbytes = checkpoint.nbytes
        gathered = (ModuleKind.EMBEDDING, ModuleKind.HEAD)
        self.linears = [n for n, r in roles.items() if r.linear and r.kind not in gathered]
        embeddings = [name for name, role in roles.items() if role.kind in gathered]
        if len(embeddings) > 1:
            raise ValueError(f"{target}: {len(embeddings)} embeddings; expected one, tied")
        self.embedding = embeddings[0] if embeddings else None
        self.vectors = [name for name in roles if name not in {*self.linears, *embeddings}]

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a matrix."""
        rows, columns = self.before[name].shape
        return rows, columns


class Pair:
    """Target and tuned, and what of them costs time to compute."""

    def __init__(self, target: Path, tuned: Path):
        self.target_path, self.tuned_path = target, tuned
        self.side = TargetSide(target)
        checkpoint = Checkpoint.open(tuned)
        self.after = {name: checkpoint.read(name) for name in checkpoint.tensors}
        self._embeddings: dict[int, bytes] = {}
        self.kept: dict[Any, Any] = {}  # what a method wants to compute once

    @cached_property
    def deltas(self) -> dict[str, Tensor]:
        """δ of every linear matrix, float32."""
        before = self.side.before
        return {n: self.after[n].float() - before[n].float() for n in self.side.linears}

    @cached_property
    def svds(self) -> dict[str, tuple[Tensor, Tensor]]:
        """U (m, k) and S (k,) of every δ."""
        spectra = {}
        for name, delta in self.deltas.items():
            energies, basis = eigenbasis(delta, None)
            spectra[name] = left_vectors(delta, basis, len(energies)), energies.sqrt()
        return spectra

    def embedding(self, budget_bytes: int) -> bytes:
        """The embedding's payload, made once for each budget."""
        if self.side.embedding is None or budget_bytes <= 1:
            return b""
        if budget_bytes not in self._embeddings:
            name = self.side.embedding
            before, after = self.side.before[name], self.after[name]
            self._embeddings[budget_bytes] = encode_embedding(before, after, budget_bytes)
        return self._embeddings[budget_bytes]

    @cached_property
    def tokenizer(self) -> Any:
        """The tuned model's tokenizer."""
        return load_tokenizer(self.tuned_path)

    @cached_property
    def live(self) -> Any:
        """The target as a live model, float32; states are written into it and taken out again."""
        return load_model(self.target_path, torch.float32)

    @cached_property
    def tuned(self) -> Any:
        """The live tuned model, float32; asked the same for every candidate, it remembers."""
        return remembering(load_model(self.tuned_path, torch.float32))

    @contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[Any]:
        """The live model with the tensors of `state` in place of the target's."""
        with torch.no_grad():
            places = {name: self.live.get_parameter(name) for name in state}
            for name, place in places.items():
                place.copy_(state[name])
            try:
                yield self.live
            finally:
                for name, place in places.items():
                    place.copy_(self.side.before[name])


class Problem:
    """A pair and one draw of calibration rows; without rows everything is data-free."""

    def __init__(self, pair: Pair, rows: Sequence[Row], seed: int, rows_file: Path | None = None):
        self.pair, self.rows, self.seed, self.rows_file = pair, tuple(rows), seed, rows_file
        self.hints: dict[str, tuple[int, int]] = {}

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Token ids and masks of the calibration rows, in the order of the draw."""
        tokenizer = self.pair.tokenizer
        encoded = [encode_row(tokenizer, row).ids for row in self.rows]
        return [
            pad_batch(encoded[start : start + BATCH_ROWS], tokenizer.pad_token_id or 0)
            for start in range(0, len(encoded), BATCH_ROWS)
        ]

    @cached_property
    def covariances(self) -> dict[str, Tensor | None]:
        """H of every linear's inputs in the tuned model; None without rows."""
        if not self.rows:
            return dict.fromkeys(self.pair.side.linears)
        model = load_model(self.pair.tuned_path, torch.float32)
        with torch.no_grad(), collecting(model, self.pair.side.linears) as inputs:
            for ids, mask in self.batches:
                inputs.mask = mask.bool()
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        return {name: inputs.damped(name) for name in self.pair.side.linears}

    def score(self, state: Mapping[str, Tensor]) -> float:
        """What choices are made by: KL to tuned on a part of the rows, or the squared error."""
        pair = self.pair
        if not self.rows:
            errors = [(state[n].float() - pair.after[n].float()).square().sum() for n in state]
            return float(sum(errors))
        with pair.holding(state) as model:
            rows = self.rows[:CHOICE_ROWS]
            return token_fidelity(pair.tuned, model, pair.tokenizer, rows).kl_mean


class Inputs:
    """Sums of x xᵀ by matrix name. mask: real tokens of the batch that runs next."""

    def __init__(self) -> None:
        self.mask = torch.empty(0, dtype=torch.bool)
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, inputs: Tensor) -> None:
        """Add the inputs (rows, tokens, in) of one pass."""
        # q, k and v are fed one tensor: its product is computed once.
        if self._last is None or self._last[0] is not inputs:
            values = inputs[self.mask]
            self._last = inputs, values.T @ values
        product = self._last[1]
        self._sums[name] = self._sums[name] + product if name in self._sums else product

    def damped(self, name: str) -> Tensor:
        """H with mean diagonal 1 + DAMPING."""
        total = self._sums[name]
        scaled = total / total.diagonal().mean().clamp(min=1e-30)
        scaled.diagonal().add_(DAMPING)
        return scaled


@contextmanager
def collecting(model: Any, names: Sequence[str]) -> Iterator[Inputs]:
    """Measure the inputs of the modules whose weights are `names`."""
    inputs = Inputs()

    def hook(name: str) -> Any:
        return lambda module, args: inputs.add(name, args[0])

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(name))
        for name in names
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def remembering(model: Any) -> Any:
    """The model, its logits kept by the ids it was given."""
    known: dict[tuple[Any, ...], Any] = {}
    forward = model.forward

    @functools.wraps(forward)
    def remembered(*, input_ids: Any, **options: Any) -> Any:
        key = (tuple(input_ids.shape), input_ids.numpy().tobytes())
        if key not in known:
            known[key] = forward(input_ids=input_ids, **options)
        return known[key]

    model.forward = remembered
    return model
