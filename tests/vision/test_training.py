"""Fine-tuning: random views, the loss, checkpoints, and what a killed run goes on to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from vision.tiny_networks import CLASSES, SIZE, colored, tiny_donor, tiny_rootstock

from graftkit.errors import ConfigError, ImagesError, OutputError
from graftkit.vision.baselines import donor_classifier
from graftkit.vision.evaluate import Scores, accuracy_lead, score, wilson_interval
from graftkit.vision.images import LabeledImages
from graftkit.vision.rootstock import Rootstock, insert_norms, logits_of
from graftkit.vision.training import (
    CHECKPOINT,
    LIGHT,
    SoftLabels,
    TrainingResult,
    TrainingSettings,
    augment,
    fine_tune,
    learning_rate,
    loss_of,
    parameter_groups,
)

SIDE = 24


def split_images(count: int) -> torch.Tensor:
    """A bright upper half over a dark lower one."""
    pixels = torch.full((count, 3, SIDE, SIDE), 40, dtype=torch.uint8)
    pixels[:, :, : SIDE // 2] = 200
    return pixels


def bright_sides(views: torch.Tensor) -> set[str]:
    """The brightest side of each view, by the mean of its outermost quarter."""
    quarter = SIDE // 4
    sides = {
        "top": views[:, :, :quarter],
        "bottom": views[:, :, -quarter:],
        "left": views[:, :, :, :quarter],
        "right": views[:, :, :, -quarter:],
    }
    means = torch.stack([side.mean((1, 2, 3)) for side in sides.values()])
    return {list(sides)[index] for index in means.argmax(dim=0).tolist()}


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 99), st.integers(0, 99)))
def test_seed_epoch_and_batch_decide_a_view_and_nothing_else_does(
    numbers: tuple[int, int, int],
) -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    first = augment(pixels, *numbers)
    state = torch.get_rng_state()
    assert torch.equal(augment(pixels, *numbers), first)
    assert torch.equal(torch.get_rng_state(), state)
    for index in range(3):
        other = list(numbers)
        other[index] += 1
        assert not torch.equal(augment(pixels, *other), first)


def test_views_are_floats_of_the_same_range_and_shape() -> None:
    pixels = torch.randint(0, 2, (64, 3, SIDE, SIDE), dtype=torch.uint8) * 255
    views = augment(pixels, 0, 0, 0)
    assert views.shape == pixels.shape
    assert views.dtype == torch.float32
    assert views.min() == 0
    assert views.max() == 255


def test_an_image_of_one_grey_stays_of_one_grey_and_about_as_bright() -> None:
    views = augment(torch.full((200, 3, SIDE, SIDE), 100, dtype=torch.uint8), 0, 0, 0)
    levels = views.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(views, levels.expand_as(views), atol=1e-2, rtol=0)
    assert levels.min() >= 100 * (1 - LIGHT) - 1e-2
    assert levels.max() <= 100 * (1 + LIGHT) + 1e-2
    assert levels.max() - levels.min() > 30


def test_contrast_keeps_the_mean_grey_apart_from_brightness() -> None:
    """A view's mean over its spread tells contrast; its mean alone tells brightness."""
    views = augment(split_images(200), 0, 0, 0, upright=True)
    spread = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
    assert spread.min() < 130
    assert spread.max() > 190
    assert (views.mean((1, 2, 3)) / 120).max() < 1.5


@pytest.mark.parametrize(
    ("upright", "sides"), [(True, {"top"}), (False, {"top", "bottom", "left", "right"})]
)
def test_upright_images_are_not_turned_and_the_others_are(upright: bool, sides: set[str]) -> None:
    assert bright_sides(augment(split_images(200), 0, 0, 0, upright=upright)) == sides


def test_upright_images_are_mirrored_about_half_of_the_time() -> None:
    pixels = split_images(200).transpose(2, 3).contiguous()
    views = augment(pixels, 0, 0, 0, upright=True)
    assert bright_sides(views) == {"left", "right"}
    left = (views[..., : SIDE // 2].mean((1, 2, 3)) > views[..., SIDE // 2 :].mean((1, 2, 3))).sum()
    assert 70 < left < 130


TRAIN, VAL = colored(60), colored(30, seed=1)
SETTINGS = TrainingSettings(epochs=3, batch=16, learning_rate=3e-2)
EMPTY = LabeledImages((), np.zeros(0, np.int64), np.zeros((0, 3, SIZE, SIZE), np.uint8))


class Killed(Exception):
    """The run ends here."""


def start() -> Rootstock:
    """The same rootstock with inserted norms every time."""
    rootstock = tiny_rootstock()
    insert_norms(rootstock, TRAIN.pixels)
    return rootstock


def train(
    folder: Path,
    settings: TrainingSettings = SETTINGS,
    die_at: int = -1,
    rootstock: Rootstock | None = None,
    **more: Any,
) -> tuple[Rootstock, TrainingResult, list[int]]:
    """Fine-tune, and the steps that were reported; `die_at` kills the run in that step."""
    steps: list[int] = []

    def progress(step: str, done: int, total: int) -> None:
        assert total == 4 * settings.epochs
        steps.append(done)
        if done == die_at:
            raise Killed

    rootstock = rootstock or start()
    training = fine_tune(rootstock, TRAIN, VAL, settings, folder, progress=progress, **more)
    return rootstock, training, steps


def scores(module: nn.Module, part: LabeledImages, batch: int = 64) -> Scores:
    """What `module` answers on the images of `part`."""
    return score(logits_of(module, part.pixels, batch), part.labels)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rootstock, TrainingResult]:
    """A folder with the checkpoint of a whole run, and what it gave."""
    folder = tmp_path_factory.mktemp("finished")
    rootstock, training, _ = train(folder)
    return folder, rootstock, training


@pytest.mark.slow
def test_a_rootstock_learns_to_tell_colours(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 8})
    before = scores(start(), VAL)
    rootstock, training, steps = train(tmp_path, settings)
    after = scores(rootstock, VAL)
    assert steps == list(range(1, 33))
    assert len(training.history) == 8
    assert after.accuracy > max(0.9, before.accuracy)
    assert training.history[-1].train_loss < training.history[0].train_loss
    assert not rootstock.training


@pytest.mark.slow
@pytest.mark.parametrize(("step", "bfloat16"), [(9, True), (11, False), (12, True)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, step: int, bfloat16: bool) -> None:
    settings = SETTINGS.model_copy(update={"bfloat16": bfloat16})
    straight, training, _ = train(tmp_path / "straight", settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed", settings, die_at=step)
    resumed, again, steps = train(tmp_path / "killed", settings)
    assert steps == list(range(9, 13))
    assert same_weights(straight, resumed)
    assert [(e.train_loss, e.val_loss, e.val_accuracy) for e in training.history] == [
        (e.train_loss, e.val_loss, e.val_accuracy) for e in again.history
    ]
    assert training.best == again.best


def test_a_finished_run_is_not_repeated(
    finished: tuple[Path, Rootstock, TrainingResult],
) -> None:
    folder, first, training = finished
    second, again, steps = train(folder)
    assert steps == []
    assert again == training
    assert same_weights(first, second)


def test_without_soft_labels_their_settings_do_not_count(tmp_path: Path) -> None:
    once = SETTINGS.model_copy(update={"epochs": 1, "distillation": 0.5})
    train(tmp_path, once)
    again = train(tmp_path, once.model_copy(update={"distillation": 0.9, "temperature": 3.0}))
    assert again[2] == []  # every step was done before


@pytest.mark.parametrize("change", ["settings", "images", "weights", "soft labels"])
def test_the_checkpoint_of_another_run_is_not_gone_on_with(tmp_path: Path, change: str) -> None:
    train(tmp_path, SETTINGS.model_copy(update={"epochs": 1}))
    settings, images, rootstock, soft = (
        SETTINGS.model_copy(update={"epochs": 1}),
        TRAIN,
        start(),
        None,
    )
    if change == "settings":
        settings = settings.model_copy(update={"seed": 1})
    elif change == "images":
        pixels = TRAIN.pixels.copy()
        pixels[0, 0, 0, 0] ^= 1
        images = LabeledImages(TRAIN.names, TRAIN.labels, pixels)
    elif change == "weights":
        with torch.no_grad():
            next(rootstock.parameters()).add_(1e-3)
    else:
        soft = SoftLabels(NextColor())
    steps: list[int] = []
    fine_tune(
        rootstock,
        images,
        VAL,
        settings,
        tmp_path,
        soft,
        lambda step, done, total: steps.append(done),
    )
    assert steps == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_named_and_not_trained_over(
    finished: tuple[Path, Rootstock, TrainingResult], tmp_path: Path
) -> None:
    whole = (finished[0] / CHECKPOINT).read_bytes()
    file = tmp_path / CHECKPOINT
    for damage in (b"", b"no checkpoint", whole[:-200]):
        file.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"checkpoint\.pt: no checkpoint of a training"):
            train(tmp_path)
        assert file.read_bytes() == damage


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"key": Path}, tmp_path / CHECKPOINT)
    with pytest.raises(ConfigError, match="delete it and run again"):
        train(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"checkpoint\.pt: cannot be written"):
        train(tmp_path / "file")
    train(tmp_path / "folder", SETTINGS.model_copy(update={"epochs": 1}))
    assert [file.name for file in (tmp_path / "folder").iterdir()] == [CHECKPOINT]


@pytest.mark.slow
def test_the_epoch_of_the_lowest_validation_loss_is_kept(tmp_path: Path) -> None:
    settings = TrainingSettings(epochs=5, batch=16, learning_rate=0.3, bfloat16=False)
    rootstock, training, _ = train(tmp_path, settings)
    losses = [epoch.val_loss for epoch in training.history]
    assert training.best == losses.index(min(losses))
    assert scores(rootstock, VAL).loss == pytest.approx(min(losses), rel=1e-4)


def test_counters_are_copied_and_not_averaged(
    finished: tuple[Path, Rootstock, TrainingResult],
) -> None:
    _, rootstock, training = finished
    counters = [part for name, part in rootstock.named_buffers() if name.endswith("tracked")]
    assert len(counters) == 5
    assert all(counter == 4 * (training.best + 1) for counter in counters)


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    rootstock = start()
    with torch.no_grad():
        next(rootstock.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"nan in epoch 1, step 1; lower learning_rate"):
        train(tmp_path, rootstock=rootstock)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "val", "words"),
    [(TRAIN, EMPTY, "no image for validation"), (colored(1), VAL, "needs two")],
)
def test_too_few_images_are_refused(
    images: LabeledImages, val: LabeledImages, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ImagesError, match=words):
        fine_tune(start(), images, val, SETTINGS, tmp_path)


def test_a_single_image_beyond_full_batches_is_trained_on_too(tmp_path: Path) -> None:
    settings = TrainingSettings(epochs=1, batch=16)
    steps: list[int] = []
    fine_tune(
        start(),
        colored(17),
        VAL,
        settings,
        tmp_path,
        None,
        lambda step, done, all_: steps.append(all_),
    )
    assert steps == [2, 2]


class NextColor(nn.Module):
    """Names the class behind that of the strongest colour, and remembers what it was shown."""

    inputs: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.inputs = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images)
        answers = 2 - images.mean((2, 3)).argmax(dim=1)
        return 9 * functional.one_hot((answers + 1) % 3, 3).float()


@pytest.mark.slow
def test_soft_labels_are_of_the_views_that_are_trained_on(tmp_path: Path) -> None:
    guide = NextColor()
    settings = SETTINGS.model_copy(update={"epochs": 8, "distillation": 1.0})
    shifted = LabeledImages(VAL.names, (VAL.labels + 1) % 3, VAL.pixels)
    rootstock = start()
    fine_tune(rootstock, TRAIN, shifted, settings, tmp_path, SoftLabels(guide))
    assert len(guide.inputs) == 32
    assert not torch.equal(guide.inputs[0], guide.inputs[4])
    assert scores(rootstock, shifted).accuracy > 0.9


@pytest.mark.slow
def test_who_learns_second_finds_the_soft_labels_that_the_first_waited_for(
    tmp_path: Path,
) -> None:
    guide, other = NextColor(), NextColor()
    soft_labels = SoftLabels(guide)
    train(tmp_path / "first", soft_labels=soft_labels, rootstock=tiny_rootstock(seed=1))
    count = len(guide.inputs)
    actual, _, _ = train(tmp_path / "second", soft_labels=soft_labels)
    alone, _, _ = train(tmp_path / "alone", soft_labels=SoftLabels(other))
    assert count == len(guide.inputs) == len(other.inputs) == 12
    assert same_weights(actual, alone)


def test_without_instructions_for_bfloat16_training_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for actual, expected in (({"avx2": True}, False), ({"avx2": True, "amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda actual=actual: actual)
        assert TrainingSettings().bfloat16 is expected


def test_trunk_and_head_have_their_own_rates_and_vectors_do_not_decay() -> None:
    rootstock = start()
    settings = TrainingSettings(learning_rate=0.1, trunk_share=0.5, weight_decay=0.01)
    groups = parameter_groups(rootstock, settings)
    named = {weights: name for name, weights in rootstock.named_parameters()}
    for group in groups:
        for weights in group["params"]:
            trunk = named.pop(weights).startswith("trunk")
            assert group["highest"] == (0.05 if trunk else 0.1)
            assert group["weight_decay"] == (0.01 if weights.ndim > 1 else 0)
    assert named == {}


def test_a_trunk_of_share_zero_keeps_its_weights(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"trunk_share": 0.0, "epochs": 1})
    rootstock, _, _ = train(tmp_path, settings)
    before = dict(start().named_parameters())
    for name, weights in rootstock.named_parameters():
        assert torch.equal(weights, before[name]) == name.startswith("trunk"), name


@given(st.integers(1, 500))
def test_the_rate_rises_for_a_tenth_of_the_steps_and_falls_to_nothing(steps: int) -> None:
    rates = [learning_rate(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == 1
    assert all(0 < rate <= 1 for rate in rates)
    assert abs(top + 1 - steps / 10) <= 1.5
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_loss_mixes_labels_and_soft_labels_as_its_equation_says() -> None:
    logits, soft = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    settings = TrainingSettings(label_smoothing=0, distillation=0.25, temperature=2)
    target, actual = torch.softmax(soft / 2, 1), torch.softmax(logits / 2, 1)
    divergence = float((target * (target / actual).log()).sum())
    plain = float(-torch.log_softmax(logits, 1)[0, 0])
    labels = torch.tensor([0])
    mixed = loss_of(logits, labels, soft, settings)
    assert float(mixed) == pytest.approx(0.75 * plain + 0.25 * 4 * divergence)
    assert float(loss_of(logits, labels, None, settings)) == pytest.approx(plain)


def test_unknown_and_impossible_settings_are_refused() -> None:
    for wrong in ({"epoch": 3}, {"batch": 3}, {"learning_rate": 0}, {"distillation": 1.1}):
        with pytest.raises(ValidationError):
            TrainingSettings(**wrong)  # type: ignore[arg-type]
    assert all(field.description for field in TrainingSettings.model_fields.values())


@pytest.mark.slow
def test_a_donor_classifier_is_fine_tuned_by_the_same_call(tmp_path: Path) -> None:
    classifier = donor_classifier(tiny_donor(), CLASSES)
    train(tmp_path, SETTINGS.model_copy(update={"epochs": 8}), rootstock=classifier)
    assert scores(classifier, VAL).accuracy > 0.6


def scored(answers: list[int], labels: list[int]) -> Scores:
    return score(5 * functional.one_hot(torch.tensor(answers), 3).float(), np.array(labels))


def test_scores_count_by_class_and_say_where_a_class_is_missing() -> None:
    actual = scored([0, 1, 1, 0], [0, 0, 1, 1])
    assert actual.accuracy == 0.5
    assert actual.recall == (0.5, 0.5, None)
    assert actual.confusion == ((1, 1, 0), (1, 1, 0), (0, 0, 0))
    rows = torch.tensor([5.0, 0.0, 0.0]), torch.tensor([0.0, 5.0, 0.0])
    losses = [-torch.log_softmax(row, 0)[0] for row in rows]
    assert actual.loss == pytest.approx(float(sum(losses)) / 2)


def test_nothing_is_scored_on_no_image() -> None:
    with pytest.raises(ImagesError, match="no image to score"):
        scores(start(), EMPTY)


def test_scoring_in_small_batches_changes_nothing_and_keeps_the_mode() -> None:
    rootstock = start().train()
    whole, small = scores(rootstock, VAL), scores(rootstock, VAL, batch=7)
    torch.testing.assert_close(whole.logits, small.logits, atol=1e-4, rtol=1e-4)
    assert rootstock.training


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_solves_wilsons_equation(counts: tuple[int, int]) -> None:
    right, count = counts
    low, high = wilson_interval(right, count)
    share = right / count
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for edge in (low, high):
        assert (share - edge) ** 2 == pytest.approx(
            1.959964**2 * edge * (1 - edge) / count, abs=1e-9
        )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_interval_of_a_lead_turns_with_its_sides_and_holds_the_lead(
    answers: list[tuple[bool, bool]],
) -> None:
    own, other = np.array(answers).T
    ahead, (low, high) = accuracy_lead(own, other)
    assert low < ahead < high
    assert accuracy_lead(other, own) == (pytest.approx(-ahead), pytest.approx((-high, -low)))


def test_the_interval_of_a_lead_is_narrower_where_both_err_on_the_same_images() -> None:
    own = np.arange(200) < 180
    same, others = np.arange(200) < 170, np.arange(200) >= 30
    ahead, (low, _) = accuracy_lead(own, same)
    assert ahead == pytest.approx(10 / 202)
    assert low > 0
    assert accuracy_lead(own, others)[0] == pytest.approx(ahead)
    assert accuracy_lead(own, others)[1][0] < 0


def test_a_test_with_a_single_image_leaves_a_lead_open() -> None:
    _, (low, high) = accuracy_lead(np.array([True]), np.array([False]))
    assert low < 0 < high
