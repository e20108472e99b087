"""What code training minimizes: the packed model's distance from the tuned model on rows.

    KL(tuned ‖ packed) + w Σ_layers E‖h − h'‖² / ‖h'‖²

A few hundred rows say little about a model's answers and much about its hidden states h, so both
count. The teacher may run in one thread while the student runs in another.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftkit.models.backward import BACKWARD_TOKENS, backward_batches, layer_outputs, visit_logits
from graftkit.models.text import scored_tokens
from graftkit.packing.student import Student
from graftkit.rows import EncodedRow, pad_batch

HIDDEN_WEIGHT = 20.0  # nats for a relative squared error of 1 in the hidden states of one layer
LIKELY = 256  # tokens of a position whose probabilities are compared one by one


@dataclass(frozen=True)
class AnsweredRows:
    """Rows of one pass and the tuned model's answers.

    ids, mask, scored: (rows, tokens). tokens: (n, k), the likeliest at each of n scored positions.
    probabilities: theirs. states: outputs of the layers, (rows, tokens, hidden) each; empty where
    only answers are compared.
    """

    ids: Tensor
    mask: Tensor
    scored: Tensor
    tokens: Tensor
    probabilities: Tensor
    states: tuple[Tensor, ...]


class Distillation:
    """Teacher and student on the same rows; both report the outputs of their layers."""

    def __init__(self, teacher: Any, student: Student, pad: int, stack: ExitStack):
        self.teacher, self.student, self.pad = teacher, student, pad
        self.teacher_states = stack.enter_context(layer_outputs(teacher))
        self.student_states = stack.enter_context(layer_outputs(student.model))

    def count(self, rows: Sequence[EncodedRow]) -> int:
        """Positions whose logits count."""
        return int(scored_tokens(self.teacher, rows, self._inputs(rows)[1]).sum())

    def answered(self, rows: Sequence[EncodedRow], states: bool = True) -> list[AnsweredRows]:
        """Run the teacher on rows, in one or more passes. states: keep those of its layers."""
        answered = (self._answer(batch) for batch in self._batches(rows))
        return [part if states else replace(part, states=()) for part in answered]

    def divergence(self, batches: Sequence[AnsweredRows]) -> float:
        """KL(tuned ‖ packed), mean over the scored tokens."""
        counts = _counts(batches)
        return (
            sum(self._run_student(batch, counts, backward=False) for batch in batches) / counts[0]
        )

    def accumulate(self, batches: Sequence[AnsweredRows]) -> None:
        """Add the gradient of the whole loss to the student's parameters."""
        for batch in batches:
            self._run_student(batch, _counts(batches), backward=True)

    def _batches(self, rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
        lengths = list(map(len, rows))
        for batch in backward_batches(self.student.model, lengths, BACKWARD_TOKENS):
            yield [rows[index] for index in batch]

    def _answer(self, rows: Sequence[EncodedRow]) -> AnsweredRows:
        """Run the teacher."""
        ids, mask = self._inputs(rows)
        scored = scored_tokens(self.teacher, rows, mask)
        parts: list[tuple[Tensor, Tensor]] = []

        def visit(logits: Tensor, span: slice) -> None:
            parts.append(logits.softmax(dim=1).topk(min(LIKELY, logits.shape[1])))

        self.teacher_states.clear()
        visit_logits(self.teacher, ids, mask, scored, visit, backward=False)
        probabilities, tokens = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return AnsweredRows(ids, mask, scored, tokens, probabilities, tuple(self.teacher_states))

    def _run_student(self, batch: AnsweredRows, counts: tuple[int, int], backward: bool) -> float:
        """Σ KL of one pass. counts: scored tokens and tokens of all passes of this step."""
        real, total = batch.mask.bool(), 0.0

        def visit(logits: Tensor, span: slice) -> Tensor:
            nonlocal total
            answers = batch.tokens[span], batch.probabilities[span]
            divergence, gradient = _divergence(logits, *answers)
            total += divergence
            return gradient.div_(counts[0])

        def hidden_loss() -> Tensor:
            layers = zip(self.student_states, batch.states, strict=True)
            parts = [relative_error(student[real], teacher[real]) for student, teacher in layers]
            weight = HIDDEN_WEIGHT * int(real.sum()) / counts[1]
            return weight * torch.stack(parts or [torch.zeros(())]).sum()

        self.student_states.clear()
        inputs = self.student.model, batch.ids, batch.mask, batch.scored
        visit_logits(*inputs, visit, backward=backward, extra_loss=hidden_loss)
        return total

    def _inputs(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
        return pad_batch([row.ids for row in rows], self.pad)


def _counts(batches: Sequence[AnsweredRows]) -> tuple[int, int]:
    """Scored tokens and real tokens of all passes of one step."""
    return sum(int(b.scored.sum()) for b in batches), sum(int(b.mask.sum()) for b in batches)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """E‖h − h'‖² / ‖h'‖² over tokens, (n, hidden) each. All tokens count alike, whatever ‖h'‖."""
    error = (student.float() - teacher.float()).square().sum(dim=1)
    return (error / teacher.float().square().sum(dim=1).clamp(min=1e-30)).mean()


def _divergence(logits: Tensor, tokens: Tensor, probabilities: Tensor) -> tuple[float, Tensor]:
    """Σ KL(p ‖ q) and its gradient by the logits; all but the likeliest tokens count as one.

        KL = Σ_k p_k log(p_k / q_k) + p_r log(p_r / q_r),   ∂KL/∂z = q − p_k  or  q (1 − p_r / q_r)

    Args:
        logits: (n, vocabulary) float32, of q. tokens, probabilities: (n, k), of p.
    """
    rest = 1 - probabilities.sum(dim=1)
    rest = torch.where(rest < 1e-6, 0.0, rest)  # the rounding error of the sum is no probability
    log_q = logits.log_softmax(dim=1)
    likely = log_q.gather(1, tokens)
    q = log_q.exp()
    rest_q = q.scatter(1, tokens, 0.0).sum(dim=1).clamp(min=1e-30)
    # A probability of 0 adds nothing, also if the logit is -inf.
    crossed = torch.where(probabilities > 0, probabilities * likely, 0.0)
    divergence = torch.xlogy(probabilities, probabilities) - crossed
    tail = torch.xlogy(rest, rest) - rest * rest_q.log()
    gradient = q * (1 - rest / rest_q)[:, None]
    gradient.scatter_(1, tokens, likely.exp() - probabilities)
    return float(divergence.sum() + tail.sum()), gradient
