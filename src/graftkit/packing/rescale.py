"""Scale distillation: a few multipliers of a compressed delta, trained against the tuned model.

    δ̂ = diag(exp(row)) left diag(exp(component)) right diag(exp(column)),
    min KL(tuned ‖ target + δ̂)

Compression chose every factor for its own layer; the multipliers see what the whole model makes of
them. They are a few numbers a layer, so that a few hundred rows decide them.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.compress.coded import stored_multipliers
from graftkit.delta import Checkpoint
from graftkit.errors import RowsError
from graftkit.models.backward import (
    BACKWARD_TOKENS,
    Visit,
    backward_batches,
    prepare_backward,
    visit_logits,
)
from graftkit.models.encoding import (
    EncodedRow,
    encode_rows,
    one_thread,
    pad_id,
    scored_tokens,
    submodule,
    usable_tokenizer,
)
from graftkit.models.loading import load_model, stream_model
from graftkit.rows import Row, pad_batch

DISTILL_TOKENS = 16_384  # tokens of the rows used, held-out ones included
STEP_TOKENS = 256  # tokens of one step: more, noisier steps beat fewer
LEARNING_RATE, BETAS, WARM_UP_STEPS = 0.03, (0.9, 0.99), 5
MOST_LEARNING_RATE = 0.02
HELD_OUT = 5  # every fifth row is measured on and not trained on
LIKELY = 256  # tokens whose probability is kept for each position; the rest share one
RESIDENT_BYTES = 2**28  # a model below this size in float32 is loaded whole

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class Factors:
    """One low-rank delta, left @ right, of a module that the packed checkpoint has without it.

    Attributes:
        module: name of a Linear or Conv1D in the live model, y = x Wᵀ with W (out, in).
        left: (out, r). right: (r, in). They may be mapped from disk.
    """

    module: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class ScaleResult:
    """Logarithms of the multipliers of each module, zeros where they would not help.

    Attributes:
        component: (r,), row: (out,) and column: (in,) for each module.
        kl_before, kl_after: KL(tuned ‖ packed) per completion token on held-out rows, nats;
            a lower bound, for all but the likeliest tokens count as one.
    """

    component: dict[str, Tensor]
    row: dict[str, Tensor]
    column: dict[str, Tensor]
    kl_before: float
    kl_after: float


def distill_scales(
    packed: Checkpoint,
    teacher: Checkpoint,
    factors: Sequence[Factors],
    rows: Sequence[Row],
    seed: int,
    steps: int,
    train_sides: bool,
    progress: Progress | None = None,
) -> ScaleResult:
    """Train the multipliers of `factors` so that the packed model answers as the tuned one.

    The same inputs and seed give the same result; where the divergence on rows that were not
    trained on does not fall, all logarithms are zero.

    Args:
        packed: the target with every delta merged except those of `factors`.
        teacher: the tuned model. rows: a seeded choice of them is used.
        steps: gradient steps. train_sides: train one for each output and each input as well.
    Raises: CheckpointError for a missing module or tokenizer; RowsError.
    """
    report = progress or (lambda done, total: None)
    with one_thread(), TemporaryDirectory(prefix="graftkit-") as folder:
        goals, pad = _read_goals(teacher, rows, seed, Path(folder) / "teacher")
        student = _Student(packed, Path(folder) / "packed", factors, train_sides, pad)
        held = goals[HELD_OUT - 1 :: HELD_OUT] or goals[-1:]
        learned = [goal for goal in goals if not any(goal is other for other in held)]
        before = student.divergence(held)
        if learned and student.parameters:
            # A divergence is quadratic in the multipliers: their distance from the best ones, and
            # with it Adam's step, goes with its root.
            rate = min(MOST_LEARNING_RATE, LEARNING_RATE * math.sqrt(max(before, 0.0)))
            _train(student, learned, seed, (steps, rate), report)
            student.round()
        after = student.divergence(held)
    return student.result(before, after)


@dataclass(frozen=True)
class _Goal:
    """What the tuned model says at the scored positions of one row.

    Attributes:
        tokens: (n, k) likeliest tokens. chances: (n, k) their probabilities, float32.
    """

    row: EncodedRow
    tokens: Tensor
    chances: Tensor


class _Student:
    """The packed model with multipliers to train."""

    def __init__(
        self,
        packed: Checkpoint,
        folder: Path,
        factors: Sequence[Factors],
        train_sides: bool,
        pad: int,
    ):
        self.model, self.pad = _load(packed, folder), pad
        self.component = {f.module: torch.zeros(f.right.shape[0]) for f in factors}
        self.row = {f.module: torch.zeros(f.left.shape[0]) for f in factors}
        self.column = {f.module: torch.zeros(f.right.shape[1]) for f in factors}
        sides = (*self.row.values(), *self.column.values()) if train_sides else ()
        self.parameters = [*self.component.values(), *sides]
        for parameter in self.parameters:
            parameter.requires_grad_()
        for part in factors:
            module = submodule(self.model, part.module, packed.name)
            module.register_forward_hook(self._hook(part))

    def divergence(self, goals: Sequence[_Goal]) -> float:
        """KL(tuned ‖ packed), mean over the scored tokens of the goals."""
        return self._run(goals, backward=False)

    def accumulate(self, goals: Sequence[_Goal]) -> float:
        """The same, and its gradient is added to the parameters'."""
        return self._run(goals, backward=True)

    def round(self) -> None:
        """Multipliers of outputs and inputs as the file will hold them."""
        for value in (*self.row.values(), *self.column.values()):
            value.detach().copy_(stored_multipliers(value.detach()))

    def result(self, before: float, after: float) -> ScaleResult:
        """What was trained, or the identity where it does not pay."""
        pays = after < before
        component, row, column = (
            {
                name: value.detach() if pays else torch.zeros(value.shape)
                for name, value in d.items()
            }
            for d in (self.component, self.row, self.column)
        )
        return ScaleResult(component, row, column, before, after if pays else before)

    def _run(self, goals: Sequence[_Goal], backward: bool) -> float:
        count = sum(len(goal.tokens) for goal in goals)
        total = 0.0
        lengths = [len(goal.row) for goal in goals]
        for batch in backward_batches(self.model, lengths, BACKWARD_TOKENS):
            chosen = [goals[index] for index in batch]
            tokens = torch.cat([goal.tokens for goal in chosen])
            chances = torch.cat([goal.chances for goal in chosen])

            def visit(logits: Tensor, span: slice, p: Any = (tokens, chances)) -> Tensor:
                nonlocal total
                divergence, gradient = _divergence(logits, p[0][span], p[1][span])
                total += divergence
                return gradient.div_(count)

            rows = [goal.row for goal in chosen]
            # Gradients in half precision are several times faster; what is reported is not rounded.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
                _visit_rows(self.model, rows, self.pad, visit, backward=backward)
        return total / count

    def _hook(self, part: Factors) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        component, row = self.component[part.module], self.row[part.module]
        column = self.column[part.module]

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x: Tensor = args[0]
            left, right = part.left.to(x.dtype), part.right.to(x.dtype)
            inner = ((x * column.exp().to(x.dtype)) @ right.T) * component.exp().to(x.dtype)
            return output + (inner @ left.T) * row.exp().to(x.dtype)

        return add


def _train(
    student: _Student,
    goals: Sequence[_Goal],
    seed: int,
    schedule: tuple[int, float],
    report: Progress,
) -> None:
    """Adam over shuffled batches; the rate rises for a few steps and falls with a cosine.

    schedule: steps and the highest rate.
    """
    steps, highest = schedule
    optimizer = torch.optim.Adam(student.parameters, lr=highest, betas=BETAS)
    batches = _endless_batches(goals, seed)
    for step in range(steps):
        report(step, steps)
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        rate = highest * min(1.0, (step + 1) / WARM_UP_STEPS) * fall
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        student.accumulate(next(batches))
        optimizer.step()
    report(steps, steps)


def _endless_batches(goals: Sequence[_Goal], seed: int) -> Iterator[list[_Goal]]:
    """Batches of about STEP_TOKENS tokens, in a new order every epoch."""
    generator = random.Random(seed)
    batch: list[_Goal] = []
    while True:
        # random() is promised to stay the same between Python versions, shuffle() is not.
        keys = [generator.random() for _ in goals]
        for index in sorted(range(len(goals)), key=keys.__getitem__):
            batch.append(goals[index])
            if sum(len(goal.row) for goal in batch) >= STEP_TOKENS:
                yield batch
                batch = []
        if batch and sum(len(goal.row) for goal in goals) < STEP_TOKENS:
            yield batch
            batch = []


def _divergence(logits: Tensor, tokens: Tensor, chances: Tensor) -> tuple[float, Tensor]:
    """Σ KL(p ‖ q) and its gradient by the logits; all but the likeliest tokens count as one.

        KL = Σ_k p_k log(p_k / q_k) + p_r log(p_r / q_r),   ∂KL/∂z = q − p_k  or  q (1 − p_r / q_r)

    Args:
        logits: (n, vocabulary) float32, of q. tokens, chances: (n, k), of p.
    """
    rest = 1 - chances.sum(dim=1)
    rest = torch.where(rest < 1e-6, 0.0, rest)  # what float32 leaves of a sum of all is no chance
    log_q = logits.log_softmax(dim=1)
    likely = log_q.gather(1, tokens)
    q = log_q.exp()
    rest_q = q.scatter(1, tokens, 0.0).sum(dim=1).clamp(min=1e-30)
    divergence = torch.xlogy(chances, chances) - chances * likely
    tail = torch.xlogy(rest, rest) - rest * rest_q.log()
    gradient = q * (1 - rest / rest_q)[:, None]
    gradient.scatter_(1, tokens, likely.exp() - chances)
    return float(divergence.sum() + tail.sum()), gradient


def _read_goals(
    teacher: Checkpoint, rows: Sequence[Row], seed: int, folder: Path
) -> tuple[list[_Goal], int]:
    """The tuned model's answers to a choice of rows, in file order, and the padding token."""
    tokenizer = usable_tokenizer(teacher)
    model, pad = _load(teacher, folder), pad_id(tokenizer)
    encoded = encode_rows(tokenizer, rows, DISTILL_TOKENS, seed, model, teacher.name)
    goals: dict[int, _Goal] = {}
    for batch in backward_batches(model, list(map(len, encoded)), BACKWARD_TOKENS):
        chosen = [encoded[index] for index in batch]
        likely: list[tuple[Tensor, Tensor]] = []

        def visit(logits: Tensor, span: slice, into: list[Any] = likely) -> None:
            into.append(logits.softmax(dim=1).topk(min(LIKELY, logits.shape[1])))

        counts = _visit_rows(model, chosen, pad, visit, backward=False)
        if likely:
            chances, tokens = (
                torch.split(torch.cat(parts), counts) for parts in zip(*likely, strict=True)
            )
            parts = zip(batch, chosen, tokens, chances, strict=True)
            goals |= {index: _Goal(row, t, p) for index, row, t, p in parts if len(t)}
    if not goals:
        raise RowsError("no row has a completion; scales are trained where one is predicted")
    return [goals[index] for index in sorted(goals)], pad


def _visit_rows(
    model: Any, rows: Sequence[EncodedRow], pad: int, visit: Visit, *, backward: bool
) -> list[int]:
    """`visit_logits` of the scored tokens of some rows; returns how many each row has."""
    ids, mask = pad_batch([row.ids for row in rows], pad)
    scored = scored_tokens(model, rows, mask)
    visit_logits(model, ids, mask, scored, visit, backward=backward)
    counts: list[int] = scored.sum(dim=1).tolist()
    return counts


def _load(checkpoint: Checkpoint, folder: Path) -> Any:
    """A frozen model: a small one in memory and in float32, any other streamed from disk."""
    if 4 * checkpoint.parameters <= RESIDENT_BYTES:
        model: Any = load_model(checkpoint, torch.float32)
        model.config.use_cache = False
        return model.requires_grad_(False)
    model = stream_model(checkpoint, folder)
    prepare_backward(model)
    return model
