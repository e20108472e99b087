"""Code training: the codes of a compressed delta, trained against the tuned model.

    min  KL(tuned ‖ packed) + w Σ_layers E‖h − h'‖² / ‖h'‖² + λ bits

Compression rounds the factors of each layer separately. Training sees the effect on the whole
model (packing/loss.py). λ follows from the room that the payloads have. Prompts are augmented by
token replacement: the tuned model supplies the answers there too.

`train_packed_codes` is the step of a packing job, `train_codes` the training itself. Its state is
saved from time to time, so that a killed job continues in the middle.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from graftkit.checkpoint import Checkpoint, write_checkpoint
from graftkit.compress.coded import CodedFactors
from graftkit.errors import RowsError
from graftkit.files import WorkFolder
from graftkit.models.backward import prepare_backward
from graftkit.models.loading import load_model, load_or_stream
from graftkit.models.text import encode_rows, one_thread, pad_id, usable_tokenizer
from graftkit.packing.loss import AnsweredRows, Distillation
from graftkit.packing.student import Student
from graftkit.progress import StepProgress, silent
from graftkit.rows import EncodedRow, Row
from graftkit.skillpack import SkillPack

STEP_TOKENS = 256  # tokens of one step: many noisy steps beat few
CODE_RATE, MOST_CODE_RATE = 0.32, 0.08  # codes per step: for a divergence of 1 nat, and at most
SCALE_SHARE = 0.25  # learning rate of the logarithms of scales, over that of codes
BETAS, WARM_UP_STEPS = (0.9, 0.99), 5
FALL = 0.5  # share of the steps, the last ones, over which the learning rates fall to 0
MEASURED_STEPS = 25  # steps between two measurements of the held-out divergence
TRIAL_STEPS, LOWER_RATE = 10, 0.25  # a divergence that is higher then means: anew, at lower rates
FALLEN, FLAT = 0.5, 0.97  # training ends early at this share of the first and of the last one
MOST_REPLACED = 0.6  # largest probability that a token of a prompt is replaced
TEMPLATE_SHARE = 0.9  # a token in more than this share of the prompts belongs to their template
HELD_OUT, HELD_OUT_TOKENS = 5, 2_048  # every fifth row, up to that many tokens, is not trained on
RATE_STEPS = 10  # most steps between two updates of λ, of which a training has ten at least
LEAST_RATE, MOST_RATE = 0.01, 10_000.0  # λ over its first value
FLOAT32_BYTES = 2**28  # a model of at most this size in float32 runs in float32
SAVE_SECONDS = 120.0  # of work that a killed run may lose
_RESULT = "trained.json"


@dataclass(frozen=True)
class TrainingPlan:
    """steps: gradient steps. room: bytes that all trained payloads may take together."""

    seed: int
    steps: int
    room: int


@dataclass(frozen=True)
class TrainedCodes:
    """Payloads by module; none if training does not lower the divergence.

    kl_before, kl_after: KL(tuned ‖ packed) per completion token on held-out rows, in nats. It is a
    lower bound, because all but the likeliest tokens count as one.
    """

    payloads: Mapping[str, bytes]
    kl_before: float
    kl_after: float


def train_packed_codes(
    pack: SkillPack,
    modules: Mapping[str, str],
    states: tuple[Checkpoint, Checkpoint],
    rows: Sequence[Row],
    plan: TrainingPlan,
    work: WorkFolder,
    progress: StepProgress,
) -> dict[str, str]:
    """Train the codes of a pack; a resumed job reads the result from the work folder.

    Args:
        pack: with every tensor encoded. modules: live module by the name of its weight.
        states: target and tuned.
        work: where the payloads are written.
    Returns: the payload's file in `work` by tensor name; empty if training does not lower the
        divergence on held-out rows.
    Raises: CheckpointError, RowsError, OutputError.
    """
    files: dict[str, str] | None = work.read_json(_RESULT)
    if files is None:
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
        files = {}
        for i, (name, module) in enumerate(modules.items()):
            if module in result.payloads:
                files[name] = f"trained-{i}.bin"
                work.write(files[name], result.payloads[module])
        work.write_json(_RESULT, files)
    return files


def _write_packed(
    pack: SkillPack, apart: set[str], states: tuple[Checkpoint, Checkpoint], folder: Path
) -> None:
    """Write the packed model as a checkpoint, without the deltas of `apart`."""
    target, tuned = states

    def tensor(name: str) -> torch.Tensor:
        return target.read(name) if name in apart else pack.rebuild(name, target.read)

    names = [record.name for record in pack.manifest.tensors]
    write_checkpoint(folder, names, tensor, tuned.side_files(), lambda done: None)


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

    The same inputs and seed give the same result. It is empty if the divergence on rows that are
    not trained on does not fall.

    Args:
        packed: the target with every delta merged except those of `factors`.
        teacher: the tuned model. factors: by module.
        rows: a seeded choice of them is used.
        work: holds unfinished training; the same call continues there.
    Raises: CheckpointError for a missing module or tokenizer; RowsError.
    """
    report = progress or silent
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="models-", dir=work.path)))
        tokenizer = usable_tokenizer(teacher)
        tuned = _load(teacher, folder / "teacher")
        student = Student(_load(packed, folder / "packed"), factors, packed)
        del factors  # the student has all of them, four bytes a code
        distillation = Distillation(tuned, student, pad_id(tokenizer), stack)
        tokens = plan.steps * STEP_TOKENS + HELD_OUT * HELD_OUT_TOKENS
        encoded = encode_rows(tokenizer, rows, tokens, plan.seed, tuned, teacher.name)
        learned, rows_held_out = _split([row for row in encoded if distillation.count([row])])
        held_out = distillation.answered(rows_held_out, states=False)
        before = distillation.divergence(held_out)
        if learned and student.latents:
            _Training(distillation, learned, held_out, plan, before, work).run(report)
            payloads = student.fit(plan.room)
            if payloads is not None:
                after = distillation.divergence(held_out)
                if after < before:
                    return TrainedCodes(payloads, before, after)
    return TrainedCodes({}, before, before)


def _split(rows: Sequence[EncodedRow]) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Rows to train on, and rows to measure on. Raises: RowsError for no rows."""
    if not rows:
        raise RowsError("no row has a completion; codes are trained where one is predicted")
    held_out, tokens = set(), 0
    for index in range(HELD_OUT - 1, len(rows), HELD_OUT):
        if tokens < HELD_OUT_TOKENS:
            held_out.add(index)
            tokens += len(rows[index])
    held_out = held_out or {len(rows) - 1}
    learned = [row for index, row in enumerate(rows) if index not in held_out]
    return learned, [rows[index] for index in sorted(held_out)]


class _Training:
    """Adam over shuffled batches. The learning rates rise, stay, and fall to 0 in the last steps.

    Training ends early where the held-out divergence is flat: then the rates begin to fall. Where
    the first steps raise it, training starts anew with lower rates.

    Args:
        held_out: measured every MEASURED_STEPS steps. divergence: at first; the distance that codes
            have to go grows with its root.
    """

    def __init__(
        self,
        distillation: Distillation,
        rows: Sequence[EncodedRow],
        held_out: Sequence[AnsweredRows],
        plan: TrainingPlan,
        divergence: float,
        work: WorkFolder,
    ):
        self.distillation, self.student = distillation, distillation.student
        self.rows, self.held_out, self.plan = rows, held_out, plan
        divergence = max(divergence, 1e-12)
        self.highest = min(MOST_CODE_RATE, CODE_RATE * math.sqrt(divergence))
        student = self.student
        groups = (student.codes, 1.0), (student.scales, SCALE_SHARE)
        self.optimizer = torch.optim.Adam(
            [{"params": values, "share": share} for values, share in groups], betas=BETAS
        )
        self.rate = _RateLambda(divergence / (8 * plan.room), plan.room)
        self.bytes_per_estimate = student.nbytes() / max(1.0, student.entropy_bytes())
        self.state = TrainingState(work, self.optimizer)
        self.steps, self.before, self.divergence = plan.steps, divergence, divergence
        self.lowered = False

    def run(self, report: StepProgress) -> None:
        """All steps that are not done yet."""
        done = 0
        if (saved := self.state.load()) is not None:
            done, self.rate.factor, self.highest = saved["step"], saved["factor"], saved["highest"]
            self.steps, self.divergence = saved["steps"], saved["divergence"]
        start = [] if done else [value.detach().clone() for value in self._values]
        while not self._run(done, report):
            self.highest, self.lowered, self.rate.factor = LOWER_RATE * self.highest, True, 1.0
            self.optimizer.state.clear()
            with torch.no_grad():
                for value, before in zip(self._values, start, strict=True):
                    value.copy_(before)
        self.state.finish()
        report(self.steps, self.steps)

    def _run(self, done: int, report: StepProgress) -> bool:
        """The steps behind `done`. Returns: False where the first of them raise the divergence."""
        for step, batches in enumerate(self._answered_ahead(done), start=done):
            if step == self.steps:
                break
            report(step, self.steps)
            if step == TRIAL_STEPS and not self.lowered:
                if self.distillation.divergence(self.held_out) > self.before:
                    return False
            elif step and step % MEASURED_STEPS == 0:
                self._measure(step)
            self._step(step, batches)
            if step >= TRIAL_STEPS:  # what is saved is not started anew
                self._save(step + 1)
        return True

    def _answered_ahead(self, done: int) -> Iterator[list[AnsweredRows]]:
        """The batches of the steps behind `done`; the teacher is one step ahead, in a thread."""
        generator = random.Random(self.plan.seed)
        replace_tokens = TokenReplacement(self.rows, generator)
        draws = _endless_batches(self.rows, generator)
        steps = ([replace_tokens(row) for row in rows] for rows in draws)
        waiting = None
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # What was done is drawn all the same: later draws are those of an unbroken run.
            for rows in islice(steps, done, self.plan.steps):
                ahead = pool.submit(self.distillation.answered, rows)
                if waiting is not None:
                    yield waiting.result()
                waiting = ahead
            if waiting is not None:
                yield waiting.result()

    def _save(self, step: int) -> None:
        numbers = {
            "factor": self.rate.factor,
            "highest": self.highest,
            "steps": self.steps,
            "divergence": self.divergence,
        }
        self.state.save(step, numbers)

    @property
    def _values(self) -> list[Tensor]:
        return [*self.student.codes, *self.student.scales]

    def _measure(self, step: int) -> None:
        """Let the rates fall from here where the held-out divergence has fallen and is flat now."""
        last, self.divergence = self.divergence, self.distillation.divergence(self.held_out)
        falling = step >= (1 - FALL) * self.steps
        if not falling and FLAT * last < self.divergence < FALLEN * self.before:
            self.steps = min(self.plan.steps, round(step / (1 - FALL)))

    def _step(self, step: int, batches: Sequence[AnsweredRows]) -> None:
        rise, fall = (step + 1) / WARM_UP_STEPS, (self.steps - step) / (FALL * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.highest * min(1.0, rise, fall)
        self.optimizer.zero_grad()
        self.distillation.accumulate(batches)
        if step % max(1, min(RATE_STEPS, self.plan.steps // 10)) == 0:
            self.rate.update(self.bytes_per_estimate * self.student.entropy_bytes())
        self.student.add_rate(self.rate.nats_per_bit)
        self.optimizer.step()


class _RateLambda:
    """λ: rises while the codes take more bytes than there is room for, and falls otherwise."""

    def __init__(self, first: float, room: int):
        """first: λ at first, the nats per scored token that a bit saves on average."""
        self.first, self.room, self.factor = first, room, 1.0

    @property
    def nats_per_bit(self) -> float:
        return self.first * self.factor

    def update(self, nbytes: float) -> None:
        excess = 10 * (nbytes / max(1, self.room) - 1)
        factor = self.factor * math.exp(max(-1.0, min(1.0, excess)))
        self.factor = max(LEAST_RATE, min(MOST_RATE, factor))


class TokenReplacement:
    """Augments rows: tokens of a prompt are replaced by random tokens of all prompts.

    The template, which is the tokens that nearly all prompts have, and completions stay.
    """

    def __init__(self, rows: Sequence[EncodedRow], generator: random.Random):
        prompts = [row.ids[: row.start] for row in rows]
        counts = Counter(token for prompt in prompts for token in set(prompt))
        self.template = {t for t, count in counts.items() if count > TEMPLATE_SHARE * len(rows)}
        self.pool = [t for prompt in prompts for t in prompt if t not in self.template]
        self.generator = generator

    def __call__(self, row: EncodedRow) -> EncodedRow:
        """A row of the same length."""
        probability = MOST_REPLACED * self.generator.random()
        ids = [self._token(i, token, row, probability) for i, token in enumerate(row.ids)]
        return replace(row, ids=ids)

    def _token(self, index: int, token: int, row: EncodedRow, probability: float) -> int:
        if index >= row.start or token in self.template or self.generator.random() >= probability:
            return token
        # random() gives the same numbers in every Python version, choice() may not.
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


def _load(checkpoint: Checkpoint, folder: Path) -> Any:
    """A frozen model, in memory if two of its size fit there."""
    model: Any = (
        load_model(checkpoint, torch.float32)
        if 4 * checkpoint.parameters <= FLOAT32_BYTES
        else load_or_stream(checkpoint, folder, models=2)
    )
    prepare_backward(model)
    return model


_FILE = "training.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Numbers of the schedule, trained values and Adam's moments, as files of the work folder."""

    def __init__(self, work: WorkFolder, optimizer: torch.optim.Adam):
        self.work, self.optimizer = work, optimizer
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Restore values and moments. Returns: what `save` was given, or None."""
        saved: dict[str, Any] | None = self.work.read_json(_FILE)
        if saved is None:
            return None
        for index, value in enumerate(self._values):
            parts = [self._read(saved["step"], index, name) for name in ("value", *_MOMENTS)]
            with torch.no_grad():
                value.copy_(parts[0])
            moments = dict(zip(_MOMENTS, parts[1:], strict=True))
            self.optimizer.state[value] = {"step": torch.tensor(float(saved["step"])), **moments}
        return saved

    def save(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the state after `step` steps, if it is time, and remove the one before.

        Raises: OutputError.
        """
        if time.monotonic() - self.saved < SAVE_SECONDS:
            return
        before: dict[str, Any] | None = self.work.read_json(_FILE)
        for index, value in enumerate(self._values):
            state = self.optimizer.state[value]
            for name, part in (("value", value), *((n, state[n]) for n in _MOMENTS)):
                self.work.write_array(_name(step, index, name), part.detach().numpy())
        self.work.write_json(_FILE, {"step": step, **numbers})
        if before is not None:
            self._remove(before["step"])
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Remove the saved state."""
        saved = self.work.read_json(_FILE)
        self.work.remove_file(_FILE)
        if saved is not None:
            self._remove(saved["step"])

    @property
    def _values(self) -> Sequence[Tensor]:
        return [value for group in self.optimizer.param_groups for value in group["params"]]

    def _read(self, step: int, index: int, name: str) -> Tensor:
        array = self.work.read_array(_name(step, index, name))
        assert array is not None  # the step is written after its arrays
        return torch.from_numpy(array)

    def _remove(self, step: int) -> None:
        for index in range(len(self._values)):
            for name in ("value", *_MOMENTS):
                self.work.remove_file(_name(step, index, name))


def _name(step: int, index: int, name: str) -> str:
    return f"training-{step}-{index}-{name}.npy"
