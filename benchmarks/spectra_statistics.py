"""What the inputs and outputs of a tuned model's modules look like on rows of its skill."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from spectra_measures import root
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.models.calibration import (
    HEAD,
    TOKENS,
    CovarianceStore,
    collect_covariances,
    pad_id,
)
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.rows import Row, batches_by_length, encode_row, pad_batch

BATCH_TOKENS = 2_048
LOOKUP = "lookup"


@dataclass(frozen=True)
class Statistics:
    """Roots of covariances by module, `head` and `lookup` (the embedding read by token).

    R Rᵀ = H of the inputs, (n, n); Fᵀ F = G of the gradients of log p at the outputs, (l, m).
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    counts: Tensor
    """How often each token was read, (vocab,)."""


def measure_statistics(checkpoint: Checkpoint, rows: Sequence[Row], modules: Sequence[str]) -> Any:
    """The statistics of linear `modules` of a causal model with one embedding, tied or not."""
    with TemporaryDirectory(prefix="graftkit-spectra-") as folder:
        store = CovarianceStore(Path(folder))
        collect_covariances(checkpoint, rows, modules, store, seed=0)
        inputs = {name: root(store.get(name)) for name in (*modules, HEAD)}
        counts = store.get(TOKENS)
    gradients = _Gradients(load_model(checkpoint, torch.float32), modules)
    gradients.run(load_tokenizer(checkpoint), rows)
    outputs = {name: root(total).T for name, total in gradients.totals.items()}
    outputs[HEAD] = torch.cat(gradients.logits)
    return Statistics(inputs, outputs, counts)


class _Gradients:
    """Sums g gᵀ, g the gradient of log p(label) at a module's output.

    Labels are sampled from the model itself, at the tokens of the completions: then the mean of
    g gᵀ is the curvature of the KL divergence from the model (its Fisher information).
    """

    def __init__(self, model: Any, modules: Sequence[str]):
        self.model = model.requires_grad_(False)
        self.totals: dict[str, Tensor] = {}
        self.logits: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)
        for name in modules:
            model.get_submodule(name).register_forward_hook(self._hook(name))
        model.get_input_embeddings().register_forward_hook(self._hook(LOOKUP))

    def run(self, tokenizer: Any, rows: Sequence[Row]) -> None:
        encoded = [encode_row(tokenizer, row) for row in rows]
        for batch in batches_by_length(list(map(len, encoded)), BATCH_TOKENS):
            ids, mask = pad_batch([encoded[i].ids for i in batch], pad_id(tokenizer))
            scored = mask.bool()
            for place, index in enumerate(batch):
                scored[place, : encoded[index].start] = False
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            chosen = torch.log_softmax(logits[:, :-1][scored[:, 1:]], dim=-1)
            labels = torch.multinomial(chosen.detach().exp(), 1, generator=self.generator)
            gradient = -chosen.detach().exp()
            gradient.scatter_add_(1, labels, torch.ones_like(gradient[:, :1]))
            self.logits.append(gradient)
            chosen.gather(1, labels).sum().backward()

    def _hook(self, name: str) -> Any:
        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2)
            self.totals[name] = self.totals.get(name, 0) + flat.T @ flat

        def after_forward(module: Any, arguments: Any, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()  # the embedding: no parameter asks for gradients
            output.register_hook(add)

        return after_forward
