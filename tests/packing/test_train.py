"""Codes of a compressed delta, trained against the tuned model."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tiny_models import build, save_tokenizer, stream_all

from graftkit.checkpoint import Checkpoint
from graftkit.compress.coded import CodedFactors, encode_factors, load_factors, store_factors
from graftkit.compress.lowrank import eigenbasis, leading_rows
from graftkit.errors import CheckpointError, RowsError
from graftkit.files import WorkFolder
from graftkit.models import tensor_roles
from graftkit.models.text import EncodedRow
from graftkit.packing import loss, student, train
from graftkit.packing.student import Student
from graftkit.packing.train import TokenReplacement, TrainedCodes, TrainingPlan, train_codes
from graftkit.rows import Row

RANK, STEPS = 4, 150
LETTERS = "abcdefghij"
ROWS = [Row(f"{a}{b}", f" {b}{a}{b}") for a in LETTERS for b in LETTERS]

Case = tuple[Checkpoint, Checkpoint, dict[str, CodedFactors]]


def make_case(folder: Path, architecture: str) -> Case:
    """A target, a tuned model that moved by low-rank deltas, and these deltas, coarsely coded."""
    model = build(architecture, scale=0.2)
    model.save_pretrained(folder / "target")
    save_tokenizer(folder / "target")
    target = Checkpoint.open(folder / "target")
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for role in tensor_roles(target).values():
        if role.linear or role.kind.value == "embedding":
            weight = model.get_submodule(role.module).weight.data
            rows, columns = weight.T.shape if role.transposed else weight.shape
            left = 0.5 * torch.randn(rows, RANK, generator=generator)
            delta = left @ torch.randn(RANK, columns, generator=generator) * columns**-0.5
            weight += delta.T if role.transposed else delta
            leading = leading_rows(delta, eigenbasis(delta, None)[1], RANK, None)
            factors[role.module] = encode_factors(delta, leading, None, 0.35)
    model.save_pretrained(folder / "tuned")
    save_tokenizer(folder / "tuned")
    return target, Checkpoint.open(folder / "tuned"), factors


def nbytes(payloads: dict[str, bytes]) -> int:
    return sum(map(len, payloads.values()))


def stored(factors: dict[str, CodedFactors]) -> dict[str, bytes]:
    return {name: store_factors(coded) for name, coded in factors.items()}


def loaded(result: TrainedCodes, factors: dict[str, CodedFactors]) -> dict[str, CodedFactors]:
    shapes = {n: (f.left.shape[0], f.right.shape[1]) for n, f in factors.items()}
    return {n: load_factors(memoryview(p), shapes[n]) for n, p in result.payloads.items()}


def trained(
    case: Case,
    factors: dict[str, CodedFactors] | None = None,
    steps: int = STEPS,
    rows: list[Row] = ROWS,
    room: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    work: WorkFolder | None = None,
) -> TrainedCodes:
    factors = case[2] if factors is None else factors
    plan = TrainingPlan(0, steps, nbytes(stored(factors)) if room is None else room)
    with TemporaryDirectory() as folder:
        own = work or WorkFolder(Path(folder))
        return train_codes(case[0], case[1], factors, rows, plan, own, progress)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_trained_codes_diverge_less_on_rows_held_out_and_fit_their_room(
    tmp_path: Path, architecture: str
) -> None:
    case = make_case(tmp_path, architecture)
    result = trained(case)
    assert result.kl_after < 0.9 * result.kl_before
    assert 0 < nbytes(result.payloads) <= nbytes(stored(case[2]))
    now = loaded(result, case[2])
    moved = [n for n, f in now.items() if not torch.equal(f.left, case[2][n].left)]
    assert len(moved) > len(case[2]) / 2


def test_a_tied_embedding_is_trained_as_a_lookup_and_as_a_head(tmp_path: Path) -> None:
    target, _, factors = make_case(tmp_path, "llama_tied")
    only = {name: f for name, f in factors.items() if "embed" in name}
    assert len(only) == 1
    (name,) = only
    model = train._load(target, tmp_path / "unused")
    student_model = Student(model, only, target)
    left, right = only[name].factors()
    weight = model.get_submodule(name).weight
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        state = model.base_model(ids).last_hidden_state
        added = model(ids).logits
        weight += left @ right
        for latent in student_model.latents.values():
            latent.component.fill_(-1e9)  # nothing is added any more
        assert torch.allclose(model.base_model(ids).last_hidden_state, state, atol=1e-5)
        assert torch.allclose(model(ids).logits, added, atol=1e-5)


@pytest.mark.slow
def test_less_room_than_the_codes_took_is_met(llama: Case) -> None:
    room = int(0.98 * nbytes(stored(llama[2])))
    result = trained(llama, room=room)
    assert 0 < nbytes(result.payloads) <= room
    assert result.kl_after < result.kl_before


@pytest.mark.slow
def test_what_cannot_fit_stays_as_it_was(llama: Case) -> None:
    result = trained(llama, steps=2, room=10)
    assert not result.payloads
    assert result.kl_after == result.kl_before > 0


@pytest.mark.slow
def test_a_delta_that_coding_left_nothing_of_is_left_out(llama: Case) -> None:
    (empty, coded), *_ = llama[2].items()
    none = replace(
        coded, left=coded.left[:, :0], component=coded.component[:0], right=coded.right[:0]
    )
    result = trained(llama, {**llama[2], empty: none}, steps=12)
    assert result.payloads.keys() == llama[2].keys() - {empty}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_codes_on_any_number_of_threads(llama: Case) -> None:
    first = trained(llama, steps=12)
    torch.set_num_threads(2)
    second = trained(llama, steps=12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2
    assert first.kl_after == second.kl_after < first.kl_before
    assert first.payloads == second.payloads


@pytest.mark.slow
def test_a_model_streamed_from_disk_learns_as_much(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(llama, steps=12)
    stream_all(monkeypatch)
    monkeypatch.setattr(train, "FLOAT32_BYTES", 0)
    streamed = trained(llama, steps=12)
    assert streamed.kl_after == pytest.approx(whole.kl_after, rel=0.02)


@pytest.mark.slow
def test_too_many_codes_are_left_alone_and_their_scales_trained(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "most_codes", lambda checkpoint: 0)
    scaled = {name: replace(f, component=1.3 * f.component) for name, f in llama[2].items()}
    result = trained(llama, scaled)
    assert result.kl_after < result.kl_before
    for name, value in loaded(result, scaled).items():
        assert torch.equal(value.left, scaled[name].left)
        assert not torch.equal(value.component, scaled[name].component)


def test_only_words_of_prompts_are_replaced_and_never_their_template() -> None:
    rows = [EncodedRow([1, 10 + i, 20 + i, 2, 90 + i], 4, False) for i in range(8)]
    replace_tokens = TokenReplacement(rows, random.Random(0))
    augmented = [replace_tokens(row) for row in rows for _ in range(50)]
    assert {(row.ids[0], row.ids[3]) for row in augmented} == {(1, 2)}
    assert all(new.ids[4] == rows[i // 50].ids[4] for i, new in enumerate(augmented))
    words = [word for row in augmented for word in row.ids[1:3]]
    assert set(words) == {*range(10, 18), *range(20, 28)}
    unchanged = [new.ids[1] == rows[i // 50].ids[1] for i, new in enumerate(augmented)]
    assert 0.5 * len(unchanged) < sum(unchanged) < 0.9 * len(unchanged)


def test_the_divergence_of_a_vocabulary_cut_to_its_likeliest_tokens_has_the_right_gradient() -> (
    None
):
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(5, 30, generator=generator)).softmax(dim=1)
    top, tokens = p.topk(6)
    logits = torch.randn(5, 30, generator=generator, requires_grad=True)
    q = logits.softmax(dim=1)
    likely, rest, rest_p = (
        q.gather(1, tokens),
        q.scatter(1, tokens, 0.0).sum(1),
        1 - top.sum(1),
    )
    expected = (top * (top / likely).log()).sum() + (rest_p * (rest_p / rest).log()).sum()
    expected.backward()
    result, gradient = loss._divergence(logits.detach(), tokens, top)
    assert result == pytest.approx(expected.item(), rel=1e-5)
    assert logits.grad is not None
    assert torch.allclose(gradient, logits.grad, atol=1e-6)


def test_a_hidden_state_of_any_size_counts_the_same() -> None:
    teacher = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    near = teacher * torch.tensor([[1.1], [1.2]])
    assert loss.relative_error(near, teacher).item() == pytest.approx((0.01 + 0.04) / 2, rel=1e-4)


@pytest.mark.slow
def test_progress_is_reported_step_by_step(llama: Case) -> None:
    steps: list[tuple[int, int]] = []
    trained(llama, steps=2, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_one_row_is_too_few_to_train_and_to_measure(llama: Case) -> None:
    result = trained(llama, rows=ROWS[:1])
    assert result.kl_after == result.kl_before > 0


def test_rows_without_completion_and_unknown_modules_are_refused(llama: Case) -> None:
    lost = {"model.nowhere": next(iter(llama[2].values()))}
    with pytest.raises(CheckpointError, match=r"module model\.nowhere is not in Llama"):
        trained(llama, lost)
    with pytest.raises(RowsError, match="no row has a token"):
        trained(llama, rows=[])


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_training_that_is_killed_goes_on_to_the_same_payloads(llama, tmp_path, monkeypatch):
    whole = trained(llama, steps=40)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    work, computed = WorkFolder(tmp_path), []

    def killed_at(step: int) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if done == step:
                raise Killed

        return report

    for step in (17, 31):
        with pytest.raises(Killed):
            trained(llama, steps=40, work=work, progress=killed_at(step))
        assert work.read_json("training.json")["step"] == step
    accumulate = loss.Distillation.accumulate
    monkeypatch.setattr(
        loss.Distillation,
        "accumulate",
        lambda self, batches: computed.append(batches) or accumulate(self, batches),
    )
    again = trained(llama, steps=40, work=work)
    assert len(computed) == 40 - 31
    assert again.payloads == whole.payloads
    assert list(tmp_path.iterdir()) == []


def test_training_ends_early_where_the_divergence_is_flat(llama, monkeypatch):
    monkeypatch.setattr(train, "MEASURED_STEPS", 4)
    monkeypatch.setattr(train, "FALLEN", math.inf)
    monkeypatch.setattr(train, "FLAT", 0.0)
    steps: list[tuple[int, int]] = []
    trained(llama, steps=40, progress=lambda done, total: steps.append((done, total)))
    assert (steps[0], steps[-1]) == ((0, 40), (8, 8))  # flat after 4, and as many for the fall


@pytest.mark.slow
def test_first_steps_that_raise_the_divergence_are_done_again_at_lower_rates(llama, monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: rates.append(self.param_groups[0]["lr"]) or step(self),
    )
    result = trained(llama, steps=40)
    assert len(rates) == train.TRIAL_STEPS + 40
    assert max(rates[train.TRIAL_STEPS :]) == train.LOWER_RATE * max(rates[: train.TRIAL_STEPS])
    assert result.kl_after < result.kl_before


def test_a_token_of_probability_zero_counts_nothing_in_the_divergence():
    logits = torch.tensor([[1.0, 2.0, float("-inf")]])
    probabilities, tokens = logits.softmax(dim=1).topk(3)
    divergence, gradient = loss._divergence(logits, tokens, probabilities)
    assert divergence == pytest.approx(0.0, abs=1e-6)
    assert gradient.isfinite().all()
