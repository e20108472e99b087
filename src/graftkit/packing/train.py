"""Code training: the codes of a compressed delta, trained against the tuned model.

    min  KL(tuned ‖ packed) + w Σ_layers E‖h − h'‖² / ‖h'‖² + λ bits

Compression rounded every factor for its own layer; training sees what the whole model makes of
them. λ follows from the room that the payloads have. A few hundred rows say little of a model's
answers and much of its hidden states h, on prompts with words exchanged at random too: the tuned
model says what is right there.

Code training on disk from time to time, so that a killed packing goes on in the middle of it.

Code training of a pack that is coded already; what comes out has room in the file.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from graftkit.checkpoint import Checkpoint, write_checkpoint
from graftkit.compress.coded import CodedFactors
from graftkit.errors import RowsError
from graftkit.files import WorkFolder
from graftkit.models.backward import (
    BACKWARD_TOKENS,
    backward_batches,
    layer_outputs,
    prepare_backward,
    visit_logits,
)
from graftkit.models.encoding import (
    EncodedRow,
    encode_rows,
    one_thread,
    pad_id,
    scored_tokens,
    usable_tokenizer,
)
from graftkit.models.loading import load_model, stream_model
from graftkit.packing.student import Student
from graftkit.progress import StepProgress, silent
from graftkit.rows import Row, pad_batch
from graftkit.skillpack import SkillPack

STEP_TOKENS = 256  # tokens of one step: more, noisier steps beat fewer
CODE_RATE, MOST_CODE_RATE = 0.08, 0.02  # codes a step: for a divergence of 1 nat, and at most
SCALE_SHARE = 0.25  # of that rate, for the logarithms of scales
BETAS, WARM_UP_STEPS = (0.9, 0.99), 5
HIDDEN_WEIGHT = 20.0  # nats for a relative squared error of 1 in the hidden states of one layer
MOST_EXCHANGED = 0.6  # of a prompt's words, at most
TEMPLATE_SHARE = 0.9  # a token of so many prompts is a part of their template
HELD_OUT, HELD_OUT_TOKENS = 5, 4_096  # every fifth row is measured on and not trained on
PRICE_STEPS = 10  # steps between two looks at the bytes
LEAST_PRICE, MOST_PRICE = 0.01, 10_000.0  # λ over what a bit is worth on average at first
LIKELY = 256  # tokens whose probability is kept for each position; the rest share one
RESIDENT_BYTES = 2**28  # a model below this size in float32 is loaded whole


@dataclass(frozen=True)
class TrainingPlan:
    """seed; steps: gradient steps; room: bytes that all trained payloads may take together."""

    seed: int
    steps: int
    room: int


@dataclass(frozen=True)
class TrainedCodes:
    """Payloads by module; none where training does not pay.

    kl_before, kl_after: KL(tuned ‖ packed) per completion token on held-out rows, nats; a lower
    bound, for all but the likeliest tokens count as one.
    """

    payloads: Mapping[str, bytes]
    kl_before: float
    kl_after: float


def train_codes(
    packed: Checkpoint,
    teacher: Checkpoint,
    factors: Mapping[str, CodedFactors],
    rows: Sequence[Row],
    plan: TrainingPlan,
    work: WorkFolder,
    progress: StepProgress | None = None,
) -> TrainedCodes:
    """Train `factors` so that the packed model answers as the tuned one.

    The same inputs and seed give the same result. Nothing comes back where the divergence on rows
    that were not trained on does not fall.

    Args:
        packed: the target with every delta merged except those of `factors`, which are by module.
        teacher: the tuned model. rows: a seeded choice of them is used.
        work: keeps unfinished training; the same call goes on there.
    Raises: CheckpointError for a missing module or tokenizer; RowsError.
    """
    report = progress or silent
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="models-", dir=work.path)))
        tokenizer = usable_tokenizer(teacher)
        live = _load(teacher, folder / "teacher")
        student = Student(_load(packed, folder / "packed"), factors, packed)
        del factors  # the student has all of them, four bytes a code
        pupil = _Distillation(live, student, pad_id(tokenizer), stack)
        tokens = plan.steps * STEP_TOKENS + HELD_OUT * HELD_OUT_TOKENS
        encoded = encode_rows(tokenizer, rows, tokens, plan.seed, live, teacher.name)
        learned, held = _split([row for row in encoded if pupil.count([row])])
        before = after = pupil.divergence(held)
        if learned and student.latents:
            _train(pupil, learned, plan, max(before, 1e-12), work, report)
            if student.fit(plan.room):
                after = pupil.divergence(held)
    if after < before:
        return TrainedCodes(student.payloads(), before, after)
    return TrainedCodes({}, before, before)


def _split(rows: Sequence[EncodedRow]) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Rows to train on, and rows to measure on. Raises: RowsError where there are none."""
    if not rows:
        raise RowsError("no row has a completion; codes are trained where one is predicted")
    held, tokens = set(), 0
    for index in range(HELD_OUT - 1, len(rows), HELD_OUT):
        if tokens < HELD_OUT_TOKENS:
            held.add(index)
            tokens += len(rows[index])
    held = held or {len(rows) - 1}
    learned = [row for index, row in enumerate(rows) if index not in held]
    return learned, [rows[index] for index in sorted(held)]


class _Distillation:
    """Teacher and student on the same rows."""

    def __init__(self, teacher: Any, student: Student, pad: int, stack: ExitStack):
        self.teacher, self.student, self.pad = teacher, student, pad
        self.wanted = stack.enter_context(layer_outputs(teacher))
        self.found = stack.enter_context(layer_outputs(student.model))

    def count(self, rows: Sequence[EncodedRow]) -> int:
        """Positions whose logits count."""
        return int(scored_tokens(self.teacher, rows, self._inputs(rows)[1]).sum())

    def divergence(self, rows: Sequence[EncodedRow]) -> float:
        """KL(tuned ‖ packed), mean over the scored tokens."""
        return self._run(rows, backward=False)

    def accumulate(self, rows: Sequence[EncodedRow]) -> float:
        """The same; the gradient of the whole loss is added to the student's."""
        return self._run(rows, backward=True)

    def _run(self, rows: Sequence[EncodedRow], backward: bool) -> float:
        total, counts = 0.0, (self.count(rows), sum(map(len, rows)))
        for batch in backward_batches(self.student.model, list(map(len, rows)), BACKWARD_TOKENS):
            total += self._run_batch([rows[index] for index in batch], counts, backward)
        return total / counts[0]

    def _run_batch(
        self, rows: Sequence[EncodedRow], counts: tuple[int, int], backward: bool
    ) -> float:
        """Σ KL of one pass. counts: scored tokens and tokens of all passes of this step."""
        ids, mask = self._inputs(rows)
        scored, real = scored_tokens(self.teacher, rows, mask), mask.bool()
        tokens, chances = self._answers(ids, mask, scored)
        total = 0.0

        def visit(logits: Tensor, span: slice) -> Tensor:
            nonlocal total
            divergence, gradient = _divergence(logits, tokens[span], chances[span])
            total += divergence
            return gradient.div_(counts[0])

        def hidden() -> Tensor:
            pairs = zip(self.found, self.wanted, strict=True)
            parts = [relative_error(found[real], wanted[real]) for found, wanted in pairs]
            weight = HIDDEN_WEIGHT * int(real.sum()) / counts[1]
            return weight * torch.stack(parts or [torch.zeros(())]).sum()

        self.found.clear()
        model = self.student.model
        visit_logits(model, ids, mask, scored, visit, backward=backward, also=hidden)
        return total

    def _inputs(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
        return pad_batch([row.ids for row in rows], self.pad)

    def _answers(self, ids: Tensor, mask: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Likeliest tokens (n, k) of the teacher and their probabilities; fills `wanted`."""
        parts: list[tuple[Tensor, Tensor]] = []

        def visit(logits: Tensor, span: slice) -> None:
            parts.append(logits.softmax(dim=1).topk(min(LIKELY, logits.shape[1])))

        self.wanted.clear()
        visit_logits(self.teacher, ids, mask, scored, visit, backward=False)
        chances, tokens = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return tokens, chances


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """E‖h − h'‖² / ‖h'‖² over tokens, (n, hidden) each: a token with a huge state counts as one."""
    error = (found.float() - wanted.float()).square().sum(dim=1)
    return (error / wanted.float().square().sum(dim=1).clamp(min=1e-30)).mean()


def _train(
    pupil: _Distillation,
    rows: Sequence[EncodedRow],
    plan: TrainingPlan,
    before: float,
    work: WorkFolder,
    report: StepProgress,
) -> None:
    """Adam over shuffled batches; the rates rise for a few steps and fall with a cosine.

    before: divergence at first. How far codes must go goes with its root.
    """
    student, steps = pupil.student, plan.steps
    highest = min(MOST_CODE_RATE, CODE_RATE * math.sqrt(before))
    optimizer = torch.optim.Adam(
        [{"params": student.codes, "share": 1.0}, {"params": student.scales, "share": SCALE_SHARE}],
        betas=BETAS,
    )
    generator = random.Random(plan.seed)
    exchange, batches = TokenReplacement(rows, generator), _endless_batches(rows, generator)
    price = _RateLambda(before / (8 * plan.room), plan.room)
    state, done = TrainingState(work, optimizer), 0
    if (known := state.load()) is not None:
        done, price.factor = known
    for step in range(steps):
        report(step, steps)
        drawn = [exchange(row) for row in next(batches)]
        if step < done:
            continue  # drawn all the same, so that the next draws are those of an unbroken run
        rise, fall = (step + 1) / WARM_UP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * highest * min(1.0, rise) * fall
        optimizer.zero_grad()
        pupil.accumulate(drawn)
        if step % PRICE_STEPS == 0:
            price.follow(student.nbytes())
        student.add_rate(price.nats_per_bit)
        optimizer.step()
        state.save(step + 1, price.factor)
    state.finish()
    report(steps, steps)


class _RateLambda:
    """λ: rises while the codes take more bytes than there is room for, falls while they do not."""

    def __init__(self, worth: float, room: int):
        """worth: nats per scored token that a bit saves on average."""
        self.worth, self.room, self.factor = worth, room, 1.0

    @property
    def nats_per_bit(self) -> float:
        return self.worth * self.factor

    def follow(self, nbytes: int) -> None:
        over = 10 * (nbytes / max(1, self.room) - 1)
        factor = self.factor * math.exp(max(-1.0, min(1.0, over)))
        self.factor = max(LEAST_PRICE, min(MOST_PRICE, factor))


class TokenReplacement:
    """Rows with some of their prompt's tokens exchanged for those of other prompts."""

    def __init__(self, rows: Sequence[EncodedRow], generator: random.Random):
        prompts = [row.ids[: row.start] for row in rows]
        seen = Counter(token for prompt in prompts for token in set(prompt))
        self.template = {t for t, count in seen.items() if count > TEMPLATE_SHARE * len(rows)}
        self.pool = [t for prompt in prompts for t in prompt if t not in self.template]
        self.generator = generator

    def __call__(self, row: EncodedRow) -> EncodedRow:
        """A row of the same length; template and completion stay."""
        chance = MOST_EXCHANGED * self.generator.random()
        return replace(row, ids=[self._token(i, t, row, chance) for i, t in enumerate(row.ids)])

    def _token(self, index: int, token: int, row: EncodedRow, chance: float) -> int:
        if index >= row.start or token in self.template or self.generator.random() >= chance:
            return token
        # random() is promised to stay the same between Python versions, choice() is not.
        return self.pool[int(self.generator.random() * len(self.pool))]


def _endless_batches(
    rows: Sequence[EncodedRow], generator: random.Random
) -> Iterator[list[EncodedRow]]:
    """Batches of about STEP_TOKENS tokens, in a new order every epoch."""
    batch: list[EncodedRow] = []
    while True:
        keys = [generator.random() for _ in rows]
        for index in sorted(range(len(rows)), key=keys.__getitem__):
            batch.append(rows[index])
            if sum(map(len, batch)) >= STEP_TOKENS:
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
    # A chance of 0 counts nothing, also where the logit is -inf.
    crossed = torch.where(chances > 0, chances * likely, 0.0)
    divergence = torch.xlogy(chances, chances) - crossed
    tail = torch.xlogy(rest, rest) - rest * rest_q.log()
    gradient = q * (1 - rest / rest_q)[:, None]
    gradient.scatter_(1, tokens, likely.exp() - chances)
    return float(divergence.sum() + tail.sum()), gradient


def _load(checkpoint: Checkpoint, folder: Path) -> Any:
    """A frozen model: a small one in memory and in float32, any other streamed from disk."""
    if 4 * checkpoint.parameters <= RESIDENT_BYTES:
        model: Any = load_model(checkpoint, torch.float32)
        model.config.use_cache = False
        return model.requires_grad_(False)
    model = stream_model(checkpoint, folder)
    prepare_backward(model)
    return model


SAVE_SECONDS = 120.0  # of work that a killed run may lose
_FILE = "training.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Step, price, trained values and Adam's moments, each an array of the work folder."""

    def __init__(self, work: WorkFolder, optimizer: torch.optim.Adam):
        self.work, self.optimizer = work, optimizer
        self.saved = time.monotonic()

    def load(self) -> tuple[int, float] | None:
        """Put values and moments back. Returns: steps done and the price's factor, or None."""
        known: dict[str, Any] | None = self.work.read_json(_FILE)
        if known is None:
            return None
        for index, value in enumerate(self._values):
            parts = [self._read(known["step"], index, name) for name in ("value", *_MOMENTS)]
            with torch.no_grad():
                value.copy_(parts[0])
            moments = dict(zip(_MOMENTS, parts[1:], strict=True))
            self.optimizer.state[value] = {"step": torch.tensor(float(known["step"])), **moments}
        return known["step"], known["factor"]

    def save(self, step: int, factor: float) -> None:
        """Keep what `step` steps led to, if it is time; then forget what was kept before.

        Raises: OutputError.
        """
        if time.monotonic() - self.saved < SAVE_SECONDS:
            return
        before: dict[str, Any] | None = self.work.read_json(_FILE)
        for index, value in enumerate(self._values):
            state = self.optimizer.state[value]
            for name, part in (("value", value), *((n, state[n]) for n in _MOMENTS)):
                self.work.write_array(_name(step, index, name), part.detach().numpy())
        self.work.write_json(_FILE, {"step": step, "factor": factor})
        if before is not None:
            self._forget(before["step"])
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Forget everything."""
        known = self.work.read_json(_FILE)
        self.work.remove_file(_FILE)
        if known is not None:
            self._forget(known["step"])

    @property
    def _values(self) -> Sequence[Tensor]:
        return [value for group in self.optimizer.param_groups for value in group["params"]]

    def _read(self, step: int, index: int, name: str) -> Tensor:
        array = self.work.read_array(_name(step, index, name))
        assert array is not None  # the step is named last, when its arrays are there
        return torch.from_numpy(array)

    def _forget(self, step: int) -> None:
        for index in range(len(self._values)):
            for name in ("value", *_MOMENTS):
                self.work.remove_file(_name(step, index, name))


def _name(step: int, index: int, name: str) -> str:
    return f"training-{step}-{index}-{name}.npy"


_RESULT = "trained.json"


def train_packed_codes(
    pack: SkillPack,
    modules: Mapping[str, str],
    states: tuple[Checkpoint, Checkpoint],
    rows: Sequence[Row],
    plan: TrainingPlan,
    work: WorkFolder,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Train the factors of `modules` against the tuned model.

    Args:
        pack: everything coded. modules: live module by the name of its weight.
        states: target and tuned.
        work: where the payloads are kept, and found by a resumed job.
    Returns: the payload's file in `work` by tensor name; nothing where training does not pay on
        rows not trained on.
    """
    known: dict[str, str] | None = work.read_json(_RESULT)
    if known is None:
        folder = work.path / "packed"
        work.remove_folder("packed")
        _write_packed(pack, set(modules), states, folder)
        result = train_codes(
            Checkpoint.open(folder),
            states[1],
            {module: pack.coded_factors(name) for name, module in modules.items()},
            rows,
            plan,
            work,
            progress,
        )
        work.remove_folder("packed")
        known = {}
        for i, (name, module) in enumerate(modules.items()):
            if module in result.payloads:
                known[name] = f"trained-{i}.bin"
                work.write(known[name], result.payloads[module])
        work.write_json(_RESULT, known)
    return known


def _write_packed(
    pack: SkillPack, apart: set[str], states: tuple[Checkpoint, Checkpoint], folder: Path
) -> None:
    """The packed model as a checkpoint, but for the deltas of `apart`."""
    target, tuned = states

    def tensor(name: str) -> torch.Tensor:
        return target.read(name) if name in apart else pack.rebuild(name, target.read)

    names = [record.name for record in pack.manifest.tensors]
    write_checkpoint(folder, names, tensor, tuned.side_files(), lambda done: None)
