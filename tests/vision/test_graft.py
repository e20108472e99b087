"""From a donor, images and a budget to a rootstock, what it was compared with, and a report."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from torch import nn
from transformers import ResNetConfig, ResNetModel
from vision.pictures import write_pictures
from vision.tiny_networks import CLASSES, SIZE, as_images, colored, tiny_donor, wide_donor

from graftkit.errors import BudgetError, ConfigError, OutputError
from graftkit.vision.baselines import (
    BEST_LAYER,
    DONOR,
    DRAWS,
    LAST_LAYER,
    NO_PAPER_SCION,
    PAPER_SCION,
    PRUNED,
    RANDOM_FEATURES,
    RANDOM_TRUNK,
    STUDENT,
)
from graftkit.vision.choose import CostBudget, CostModel, assemble, thinned_candidates
from graftkit.vision.evaluate import measure
from graftkit.vision.export import export_onnx
from graftkit.vision.graft import GraftRun, GraftSettings, graft
from graftkit.vision.predict import Prediction, Predictor
from graftkit.vision.rootstock import Scion, fold_rootstock, grow
from graftkit.vision.thinning import hidden_channels

COUNTS = {"train": 12, "val": 6, "test": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"), COUNTS, size=SIZE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings_for(budget: str, **other: Any) -> GraftSettings:
    return GraftSettings.checked(budget=budget, size=SIZE, **other)


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    return nn.Sequential(*tiny_donor().layers)


@pytest.fixture(scope="module")
def frozen(
    donor: nn.Module, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("frozen")
    return graft(donor, data, output, settings_for("6KB", freeze=True), cache), output


@pytest.fixture(scope="module")
def compared(
    donor: nn.Module, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("compared")
    return graft(donor, data, output, settings_for("6KB", freeze=True, baselines=True), cache)


def test_a_run_leaves_two_networks_a_page_and_its_numbers(
    frozen: tuple[dict[str, Any], Path],
) -> None:
    result, output = frozen
    names = {file.name for file in output.iterdir()}
    assert {"rootstock.onnx", "rootstock.int8.onnx", "graft.json", "report.html"} <= names
    assert json.loads((output / "graft.json").read_text()) == result
    assert result["bytes"] == (output / "rootstock.onnx").stat().st_size <= 6000
    assert result["int8_bytes"] == (output / "rootstock.int8.onnx").stat().st_size
    assert set(result) >= {"val_accuracy", "test_accuracy", "val_loss", "parameters"}
    assert set(result) >= {"trunk_parameters", "macs", "p50_ms", "baselines"}


def test_without_the_option_no_baseline_is_trained_and_the_page_says_so(
    frozen: tuple[dict[str, Any], Path],
) -> None:
    result, output = frozen
    assert result["baselines"] == {}
    assert result["baselines_trained"] is False
    assert not list((output / "baselines").iterdir())
    page = (output / "report.html").read_text()
    assert "No baseline of its size was trained (--baselines trains them)" in page
    assert "reduction, %" not in page


@pytest.mark.slow
def test_with_the_option_a_frozen_rootstock_comes_with_baselines(compared: dict[str, Any]) -> None:
    names = set(compared["baselines"])
    assert names - {PAPER_SCION} == {LAST_LAYER, BEST_LAYER, RANDOM_FEATURES}
    assert (NO_PAPER_SCION in compared["warnings"]) == (PAPER_SCION not in names)
    assert len(compared["draws"]) == DRAWS


def test_accuracies_are_those_of_the_file_on_disk(
    frozen: tuple[dict[str, Any], Path], data: Path
) -> None:
    result, output = frozen
    files = sorted(data.glob("test/*/*"))
    actual = Predictor.open(output / "rootstock.onnx").predict(files)
    right = [
        isinstance(answer, Prediction) and answer.label == file.parent.name
        for answer, file in zip(actual, files, strict=True)
    ]
    assert result["test_accuracy"] == pytest.approx(sum(right) / len(files))
    assert result["test_accuracy"] > 0.8


@pytest.mark.slow
def test_the_lead_over_a_baseline_is_the_difference_of_accuracies_with_an_image_for_each(
    compared: dict[str, Any],
) -> None:
    images = compared["images"]["test"]
    for baseline in compared["baselines"].values():
        difference = compared["test_accuracy"] - baseline["test_accuracy"]
        low, high = baseline["lead_interval"]
        assert low < baseline["lead"] < high
        assert baseline["lead"] * (images + 2) == pytest.approx(difference * images)


@pytest.mark.slow
def test_another_run_finds_features_and_costs_in_the_cache(
    frozen: tuple[dict[str, Any], Path], donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    steps: list[str] = []

    def progress(step: str, _done: int, _total: int) -> None:
        steps.append(step)

    again = graft(donor, data, tmp_path, settings_for("6KB", freeze=True), cache, progress)
    assert not {"cost of every cut", "view 0: images", "probes, layers"} & set(steps)
    assert again["test_accuracy"] == frozen[0]["test_accuracy"]
    assert (tmp_path / "rootstock.onnx").read_bytes() == (frozen[1] / "rootstock.onnx").read_bytes()


@pytest.mark.slow
def test_a_fine_tuned_rootstock_comes_with_baselines_of_no_more_parameters(
    donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    result = graft(donor, data, tmp_path, settings_for("9KB", epochs=2, baselines=True), cache)
    others = dict(result["baselines"])
    assert {DONOR, LAST_LAYER, RANDOM_TRUNK} <= set(others)
    assert len(result["history"]) == 2
    for name in (PAPER_SCION, STUDENT, RANDOM_TRUNK, PRUNED):
        if name in others:
            assert others[name]["parameters"] <= result["parameters"]
    assert result["bytes"] <= 9000


@pytest.mark.slow
def test_a_killed_fine_tuning_goes_on_to_the_same_file(
    donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    settings = settings_for("9KB", epochs=2, seed=1)

    def stop(step: str, done: int, total: int) -> None:
        if step == "fine-tuning: rootstock" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graft(donor, data, tmp_path / "a", settings, cache, stop)
    assert not (tmp_path / "a" / "rootstock.onnx").exists()
    graft(donor, data, tmp_path / "a", settings, cache)
    shutil.rmtree(cache / "training")
    graft(donor, data, tmp_path / "b", settings, cache)
    first, second = ((tmp_path / name / "rootstock.onnx").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False])
def test_the_papers_method_reads_averages_of_one_stage_with_a_hidden_layer(
    freeze: bool, donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    settings = settings_for("60KB", method="paper", freeze=freeze, epochs=1)
    result = graft(donor, data, tmp_path, settings, cache)
    read = [row for row in result["scion"] if row["kept"]]
    assert result["rule"] == "paper"
    assert all(row["kept"] == row["channels"] // 2 for row in read)  # the means, not the spreads
    hidden = sum(row["kept"] for row in read) * 256 + 256 + 256 * 3 + 3
    assert result["parameters"] - result["trunk_parameters"] == hidden


def test_channels_that_nobody_reads_are_dropped_and_the_answers_stay() -> None:
    donor = tiny_donor()
    scion = Scion(4, {1: (0, 3, 9), 3: (2, 5, 14)}, ("mean", "std"))
    torch.manual_seed(0)
    head = nn.Linear(6, 3)
    whole, cut = grow(donor, scion, CLASSES, head), assemble(donor, scion, CLASSES, head)
    images = as_images(colored(5).pixels)
    with torch.no_grad():
        torch.testing.assert_close(cut(images), whole(images))
    assert cut.scion.channels[3] == (0, 1, 2)  # means of 2 and 5, the spread of 2
    count, fewer = (sum(w.numel() for w in one.trunk.parameters()) for one in (whole, cut))
    assert fewer == count - 10 * (8 + 1)


@pytest.mark.parametrize(
    "channels",
    [
        {0: (1, 2, 9), 3: (0, 5, 7, 20)},
        pytest.param({0: tuple(range(16)), 1: (3,), 2: (0, 1)}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_expected_bytes_of_a_file_are_close_to_its_bytes(
    channels: dict[int, tuple[int, ...]], donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    cuts = GraftRun(settings_for("6KB"), cache).prepare(donor, data)
    model = CostModel(CostBudget.parse("6KB"), cuts.donor, CLASSES, cuts.curve)
    scion = Scion(max(channels) + 1, channels, ("mean", "std"))
    rootstock = assemble(cuts.donor, scion, CLASSES, nn.Linear(scion.features, 3))
    folded = fold_rootstock(rootstock)
    size = export_onnx(folded, tmp_path / "one.onnx", folded.size, CLASSES, "tiny")
    assert size <= model.cost(scion) <= size + 1500


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["6KB", "0.06MMAC"])
def test_a_cut_that_does_not_fit_whole_is_thinned_until_it_does(
    budget: str, data: Path, tmp_path: Path
) -> None:
    run = GraftRun(settings_for(budget), tmp_path)
    cuts = run.prepare(nn.Sequential(*wide_donor().layers), data)
    model = CostModel(run.budget, cuts.donor, CLASSES, cuts.curve)
    candidates = thinned_candidates(cuts, model, lambda *_: None)
    assert [choice.scion.cut for choice in candidates] == [3]
    for choice in candidates:
        assert not model.fits(choice.scion)
        rootstock = assemble(choice.donor, choice.scion, CLASSES, choice.probe.head())
        measured = measure(rootstock, cuts.images, tmp_path / "one.onnx", "wide")
        cost = {"bytes": measured.bytes, "macs": measured.macs}[model.budget.kind]
        assert cost <= model.budget.amount
        assert sum(hidden_channels(choice.donor)) < sum(hidden_channels(cuts.donor))


@pytest.mark.slow
def test_a_trained_rootstock_takes_the_fine_tuned_donors_layers_and_tells_what_is_left(
    data: Path, tmp_path: Path
) -> None:
    settings = settings_for("6KB", epochs=2)
    result = graft(nn.Sequential(*wide_donor().layers), data, tmp_path, settings)
    assert result["bytes"] <= 6000
    assert all(0 <= row["hidden_kept"] <= row["hidden"] for row in result["scion"])
    assert [row["hidden"] for row in result["scion"][1:]] == [24, 24][: len(result["scion"]) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["6KB", "0.02MMAC", "1000ms"])
def test_budgets_of_every_kind_are_kept(
    budget: str, donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    result = graft(donor, data, tmp_path, settings_for(budget, freeze=True), cache)
    kind = {"bytes": "bytes", "macs": "macs", "ms": "p50_ms"}[result["budget"]["kind"]]
    assert result[kind] <= result["budget"]["amount"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "unit", "method"),
    [
        ("100B", "KB", "auto"),
        ("10MAC", "MMAC", "auto"),
        ("0.0001ms", "ms", "auto"),
        ("100B", "KB", "paper"),
    ],
)
def test_a_budget_that_nothing_meets_names_the_smallest_that_can(
    budget: str, unit: str, method: str, donor: nn.Module, data: Path, cache: Path, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"method": method, "freeze": True}
    with pytest.raises(BudgetError, match=rf"the smallest needs [\d.]+{unit}") as refused:
        graft(donor, data, tmp_path, settings_for(budget, **plain), cache)
    least = re.search(rf"[\d.]+{unit}", str(refused.value))
    assert least is not None
    if unit != "ms":  # the clock may say otherwise the next time
        enough = GraftRun(settings_for(least[0], **plain), cache)
        assert enough.choose(enough.prepare(donor, data)).scion.features > 0
    assert not list(tmp_path.glob("*.tmp"))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="method is 'best': input should be 'auto' or 'paper'"):
        settings_for("1MB", method="best")
    with pytest.raises(ConfigError, match="epochs is 0: input should be greater"):
        settings_for("1MB", epochs=0)


def test_a_folder_that_cannot_be_made_is_refused(
    donor: nn.Module, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        graft(donor, data, tmp_path / "file", settings_for("6KB"))


@pytest.mark.slow
def test_the_command_prints_json_or_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "data", COUNTS, size=SIZE)
    (data / "train" / "daisy" / "torn.png").write_bytes(b"torn")
    small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(small).save_pretrained(tmp_path / "donor")
    words = ["vision", "graft", tmp_path / "donor", "--data", data, "--budget", "60KB", "--freeze"]
    words += ["--upright", "--size", "32", "--cache", tmp_path / "cache"]
    capsys.readouterr()
    assert run(*words, "-o", tmp_path / "a", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trunk_parameters"] < result["parameters"] < 15_000
    assert run(*words, "-o", tmp_path / "b") == 0
    text = capsys.readouterr().out
    assert re.search(r"rootstock: [\d,]+ of 60,000 bytes", text)
    assert "note: 1 file left out, such as train/daisy/torn.png (not an image" in text
    assert "look at report.html" in text


def test_a_donor_or_data_that_are_none_are_told_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for donor, images in ((tmp_path / "no.npz", data), ("vgg16", tmp_path / "empty")):
        words = ["vision", "graft", donor, "--data", images, "--budget", "1MB", "-o", tmp_path]
        assert run(*words) == 1
        assert capsys.readouterr().err.count("\n") == 1
