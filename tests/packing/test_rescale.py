"""Multipliers of a compressed delta, trained against the tuned model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build, save_tokenizer
from torch import Tensor

from graftkit.compress.coded import stored_multipliers
from graftkit.delta import Checkpoint
from graftkit.errors import CheckpointError, RowsError
from graftkit.models import tensor_roles
from graftkit.packing import rescale
from graftkit.packing.rescale import Factors, ScaleResult, distill_scales
from graftkit.rows import Row

RANK, STEPS = 4, 80
LETTERS = "abcdefghij"
ROWS = [Row(f"{a}{b}", f" {b}{a}{b}") for a in LETTERS for b in LETTERS[:4]]

Case = tuple[Checkpoint, Checkpoint, list[Factors]]


def make_case(folder: Path, architecture: str) -> Case:
    """A target, a tuned model that moved by low-rank deltas, and these deltas."""
    model = build(architecture, scale=0.2)
    model.save_pretrained(folder / "target")
    save_tokenizer(folder / "target")
    target = Checkpoint.open(folder / "target")
    generator = torch.Generator().manual_seed(1)
    factors = []
    for role in tensor_roles(target).values():
        if role.linear and role.module != "lm_head":
            weight = model.get_submodule(role.module).weight.data
            rows, columns = weight.T.shape if role.transposed else weight.shape
            left = 0.5 * torch.randn(rows, RANK, generator=generator)
            right = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            delta = left @ right
            weight += delta.T if role.transposed else delta
            factors.append(Factors(role.module, left, right))
    model.save_pretrained(folder / "tuned")
    save_tokenizer(folder / "tuned")
    return target, Checkpoint.open(folder / "tuned"), factors


def wrong(factors: list[Factors]) -> tuple[list[Factors], dict[str, Tensor]]:
    """Factors whose components are scaled wrongly, and the logarithms that put them right."""
    generator = torch.Generator().manual_seed(2)
    errors = {f.module: 0.5 * torch.randn(RANK, generator=generator) for f in factors}
    scaled = [Factors(f.module, f.left * errors[f.module].exp(), f.right) for f in factors]
    return scaled, {name: -error for name, error in errors.items()}


def distil(
    case: Case,
    factors: list[Factors],
    steps: int = STEPS,
    rows: list[Row] = ROWS,
    train_rows: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ScaleResult:
    return distill_scales(case[0], case[1], factors, rows, 0, steps, train_rows, progress)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_wrong_scales_are_put_right_and_the_held_out_divergence_falls(
    tmp_path: Path, architecture: str
) -> None:
    case = make_case(tmp_path, architecture)
    factors, remedy = wrong(case[2])
    result = distil(case, factors)
    assert result.kl_after < 0.5 * result.kl_before
    found = torch.cat([result.component[name] for name in remedy])
    assert torch.corrcoef(torch.stack([found, torch.cat([*remedy.values()])]))[0, 1] > 0.5


def test_right_scales_stay_as_they_are(llama: Case) -> None:
    result = distil(llama, llama[2], steps=3)
    assert result.kl_before < 1e-5
    assert result.kl_after == result.kl_before
    assert not any(value.any() for value in [*result.component.values(), *result.row.values()])


def test_the_same_seed_gives_the_same_scales_on_any_number_of_threads(llama: Case) -> None:
    factors, _ = wrong(llama[2])
    first = distil(llama, factors, steps=3)
    torch.set_num_threads(2)
    second = distil(llama, factors, steps=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2
    assert first.kl_after == second.kl_after < first.kl_before
    for name, value in first.component.items():
        assert torch.equal(value, second.component[name])


def test_a_model_streamed_from_disk_learns_the_same_scales(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors, _ = wrong(llama[2])
    whole = distil(llama, factors, steps=3)
    monkeypatch.setattr(rescale, "RESIDENT_BYTES", 0)
    streamed = distil(llama, factors, steps=3)
    for name, value in whole.component.items():
        assert torch.allclose(value, streamed.component[name], atol=1e-3)


def test_outputs_are_scaled_only_where_that_is_asked_for(llama: Case) -> None:
    factors, _ = wrong(llama[2])
    without, with_rows = (distil(llama, factors, train_rows=rows) for rows in (False, True))
    assert not any(value.any() for value in without.row.values())
    assert any(value.any() for value in with_rows.row.values())
    # What is measured is what the file will hold: eighths of an octave.
    for value in (*with_rows.row.values(), *with_rows.column.values()):
        assert torch.equal(value, stored_multipliers(value))


def test_the_divergence_of_a_vocabulary_cut_to_its_likeliest_tokens_has_the_right_gradient() -> (
    None
):
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(5, 30, generator=generator)).softmax(dim=1)
    chances, tokens = p.topk(6)
    logits = torch.randn(5, 30, generator=generator, requires_grad=True)
    q = logits.softmax(dim=1)
    likely, rest, rest_p = q.gather(1, tokens), q.scatter(1, tokens, 0.0).sum(1), 1 - chances.sum(1)
    wanted = (chances * (chances / likely).log()).sum() + (rest_p * (rest_p / rest).log()).sum()
    wanted.backward()
    found, gradient = rescale._divergence(logits.detach(), tokens, chances)
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    assert logits.grad is not None
    assert torch.allclose(gradient, logits.grad, atol=1e-6)


def test_progress_is_reported_step_by_step(llama: Case) -> None:
    seen: list[tuple[int, int]] = []
    distil(llama, llama[2], steps=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_one_row_is_too_few_to_train_and_to_measure(llama: Case) -> None:
    factors, _ = wrong(llama[2])
    result = distil(llama, factors, rows=ROWS[:1])
    assert result.kl_after == result.kl_before > 0


def test_rows_without_completion_and_unknown_modules_are_refused(
    llama: Case, tmp_path: Path
) -> None:
    lost = [Factors("model.nowhere", torch.ones(2, 1), torch.ones(1, 2))]
    with pytest.raises(CheckpointError, match=r"module model\.nowhere is not in Llama"):
        distil(llama, lost)
    with pytest.raises(RowsError, match="no row has a token"):
        distil(llama, llama[2], rows=[])
