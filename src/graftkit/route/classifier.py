"""A trained router, as in GraftLLM: a small feed-forward net on the target's hidden states.

    log p(class | h) = log-softmax(W_2 relu(W_1 (h - m) / s + b_1) + b_2)

There is a class for every pack and one for the target. A row's label is the pack of the lowest loss
on its completion, or the target unless that pack wins by a margin. The rows must be held out: a
pack that was trained on a row knows its answer. The net stores the digests of its packs; when a
pack is added, removed or replaced, it has to be trained again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftkit.attachment import attached
from graftkit.checkpoint import save_tensors
from graftkit.config import Settings
from graftkit.errors import CheckpointError, ConfigError, RowsError
from graftkit.files import replaced_file
from graftkit.models.text import (
    MICRO_BATCH_TOKENS,
    context_length,
    one_thread,
    pad_id,
    tokens_with_logits,
)
from graftkit.route.centroid import layer_count, pooled_states, state_width
from graftkit.route.key import TARGET, Route
from graftkit.rows import Row, batches_by_length, check_answerable, encode_row, pad_batch
from graftkit.skillpack import SkillPack

Labels = Literal["loss", "task"]

MARGIN = 0.5
"""Nats per token by which a pack must beat the target on a row."""
HIDDEN = 64
"""Width of the net's hidden layer."""
STEPS, LEARNING_RATE, WEIGHT_DECAY = 200, 0.01, 0.01
_TENSORS = ("center", "scale", "weight_1", "bias_1", "weight_2", "bias_2")


class _Description(Settings):
    """What the file says beside its tensors."""

    model_config = ConfigDict(strict=True)

    format: Literal["graftkit classifier 1"] = "graftkit classifier 1"
    layer: int = Field(ge=1)
    packs: dict[str, str]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained net.

    Attributes:
        layer: of the target, whose output is pooled.
        packs: digests by name, in the order of the classes; the first class is the target.
        tensors: center and scale (width,), weight_1 (hidden, width), bias_1, weight_2
            (classes, hidden), bias_2; float32.
    """

    layer: int
    packs: dict[str, str]
    tensors: dict[str, Tensor]

    def log_odds(self, state: Tensor) -> Tensor:
        """log p(pack) - log p(target) of a state (width,), (packs,)."""
        logits = _logits(self.tensors, state)
        return logits[1:] - logits[0]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically. Raises: OutputError."""
        description = _Description(layer=self.layer, packs=self.packs).model_dump_json()
        with replaced_file(Path(path)) as partial:
            save_tensors(self.tensors, partial, {"classifier": description})

    @classmethod
    def load(cls, path: str | Path, packs: Mapping[str, str]) -> Self:
        """Read the file.

        Args:
            packs: digests of the present packs, by name.
        Raises: ConfigError where the file is missing, damaged, or was trained for other packs.
        """
        if not Path(path).exists():
            raise ConfigError(
                f"{path}: no classifier here yet; `graftkit library train-router` trains one"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies, for where a mapped tensor lies would change the last bit of a sum.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            description = _Description.model_validate_json(metadata.get("classifier", ""))
        except (OSError, SafetensorError, ValidationError) as error:
            raise ConfigError(f"{path}: no router of graftkit; train it again") from error
        _check_tensors(tensors, 1 + len(description.packs), path)
        _check_packs(description.packs, packs, path)
        return cls(description.layer, description.packs, tensors)


def train_classifier(
    model: Any,
    tokenizer: Any,
    packs: Mapping[str, SkillPack],
    rows: Mapping[str, Sequence[Row]],
    *,
    labels: Labels = "loss",
    seed: int = 0,
) -> Classifier:
    """Train a router for these packs.

    Args:
        model, tokenizer: the target, nothing attached.
        rows: held-out rows by the name of the pack that should answer them; under "target", rows of
            no skill, which the net has to learn too.
        labels: "loss" for the pack that answers a row best, "task" for the name of the rows.
        seed: of the initial weights; the same call gives the same net.
    Raises: ConfigError for rows of an unknown pack; RowsError where the target has no row, or a row
        is a text, which has no prompt;
        CheckpointError where logits are not finite.
    """
    unknown = sorted(rows.keys() - packs.keys() - {TARGET})
    if unknown:
        raise ConfigError(f"rows are given for {unknown[0]}, but no pack is called so")
    every = [row for some in rows.values() for row in some]
    named = [name for name, some in rows.items() for _ in some]
    for row in every:
        check_answerable(row)
    row_labels = label_rows(model, tokenizer, packs, every) if labels == "loss" else named
    if TARGET not in row_labels:
        raise RowsError(
            "no row is best left to the target; give rows of no skill under the name target, or "
            "the router would send every prompt to some pack"
        )
    layer = max(1, layer_count(model) // 2)
    classes = [TARGET, *packs]
    with one_thread():
        prompts = [row.prompt for row in every]
        states = pooled_states(model, tokenizer, prompts, layer, MICRO_BATCH_TOKENS)
        tensors = _train(states, [classes.index(name) for name in row_labels], len(classes), seed)
    return Classifier(layer, {name: pack.digest for name, pack in packs.items()}, tensors)


def label_rows(
    model: Any, tokenizer: Any, packs: Mapping[str, SkillPack], rows: Sequence[Row]
) -> list[str]:
    """The pack of the lowest loss on each row's completion, or the target.

    The target keeps a row unless a pack's loss is lower by MARGIN nats per token.
    Raises: RowsError for a row beyond the model's context; PackMismatchError, AttachError.
    """
    names = [TARGET, *packs]
    losses = [completion_losses(model, tokenizer, rows) - MARGIN]
    for pack in packs.values():
        with attached(model, pack):
            losses.append(completion_losses(model, tokenizer, rows))
    for name, own in zip(names, losses, strict=True):
        if bool(own.isnan().any()):  # argmin would take it for the least
            raise CheckpointError(
                f"{name}: the logits are not finite (NaN or infinity) on the rows; check the "
                "weights and the packs"
            )
    return [names[best] for best in torch.stack(losses).argmin(dim=0).tolist()]


def completion_losses(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    """Mean -log p of the scored tokens of each row, (rows,) float32.

    Raises: RowsError for a row that is too long, or has no prompt or no completion.
    """
    encoded = [encode_row(tokenizer, row, context_length(model)) for row in rows]
    for row, tokens_of_row in zip(rows, encoded, strict=True):
        if not 0 < tokens_of_row.start < len(tokens_of_row):
            raise RowsError(f"{row.origin}: needs a prompt and a completion to learn a route from")
    losses = torch.zeros(len(rows))
    tokens = tokens_with_logits(model, MICRO_BATCH_TOKENS)
    with torch.no_grad():
        for batch in batches_by_length(list(map(len, encoded)), tokens):
            ids, mask = pad_batch([encoded[index].ids for index in batch], pad_id(tokenizer))
            output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            surprise = nn.functional.cross_entropy(
                output.logits[:, :-1].float().transpose(1, 2).cpu(), ids[:, 1:], reduction="none"
            )
            for place, index in enumerate(batch):
                scored = torch.tensor(encoded[index].scored[1:])
                losses[index] = surprise[place, : len(scored)][scored].mean()
    return losses


class ClassifierRouter:
    """Routes each prompt to the most likely pack, or to the target.

    A pack's score is its log-odds against the target.
    """

    def __init__(self, model: Any, tokenizer: Any, classifier: Classifier):
        """Use a trained net on its target. Raises: ConfigError for a net of another width."""
        width = state_width(model)
        if len(classifier.tensors["center"]) != width:
            raise ConfigError(
                f"the classifier was trained on states of width {len(classifier.tensors['center'])}"
                f", the target's have {width}; train it again"
            )
        self._model, self._tokenizer, self._classifier = model, tokenizer, classifier

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; one without tokens has no scores. Raises: CheckpointError."""
        states = pooled_states(self._model, self._tokenizer, prompts, self._classifier.layer)
        return [self._choose(state) if state.any() else Route({}, {}) for state in states]

    def _choose(self, state: Tensor) -> Route:
        odds = self._classifier.log_odds(state).tolist()
        scores = dict(zip(self._classifier.packs, odds, strict=True))
        best = max(scores, key=scores.__getitem__, default=TARGET)
        return Route({best: 1.0} if scores and scores[best] > 0 else {}, scores)


def _logits(tensors: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Logits (.., classes) of states (.., width)."""
    inputs = (states - tensors["center"]) / tensors["scale"]
    inner = nn.functional.linear(inputs, tensors["weight_1"], tensors["bias_1"]).relu()
    logits: Tensor = nn.functional.linear(inner, tensors["weight_2"], tensors["bias_2"])
    return logits


def _train(states: Tensor, labels: Sequence[int], classes: int, seed: int) -> dict[str, Tensor]:
    """Fit the net to states (rows, width) and their labels; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    width, goal = states.shape[1], torch.tensor(labels)

    def layer(size: int, inputs: int) -> Tensor:
        weight: Tensor = torch.randn(size, inputs, generator=generator) * (2 / inputs) ** 0.5
        return weight.requires_grad_()

    spread = states.std(dim=0) if len(states) > 1 else torch.zeros(width)
    tensors = {
        "center": states.mean(dim=0),
        "scale": spread + spread.mean() + torch.finfo(spread.dtype).tiny,
        "weight_1": layer(HIDDEN, width),
        "bias_1": torch.zeros(HIDDEN, requires_grad=True),
        "weight_2": layer(classes, HIDDEN),
        "bias_2": torch.zeros(classes, requires_grad=True),
    }
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(_logits(tensors, states), goal))
        optimizer.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_tensors(tensors: Mapping[str, Tensor], classes: int, path: str | Path) -> None:
    width = tensors["center"].numel() if "center" in tensors else 0
    shapes = ((width,), (width,), (HIDDEN, width), (HIDDEN,), (classes, HIDDEN), (classes,))
    expected = dict(zip(_TENSORS, shapes, strict=True))
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    finite = all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values())
    if actual != expected or not width or not finite or not bool((tensors["scale"] > 0).all()):
        raise ConfigError(f"{path}: the tensors of the router are damaged; train it again")


def _check_packs(trained: Mapping[str, str], present: Mapping[str, str], path: str | Path) -> None:
    changed = sorted(
        name for name in trained.keys() | present.keys() if trained.get(name) != present.get(name)
    )
    if changed:
        raise ConfigError(
            f"{path}: the router was trained for other packs ({changed[0]} is new, gone or "
            "changed); train it again"
        )
