"""Features of every layer: what the cache holds, which view is which, which columns are whose."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vision.pictures import write_pictures
from vision.tiny_networks import SIZE, as_images, tiny_donor

from graftkit.vision.donor import pool
from graftkit.vision.images import ImageSet, open_images
from graftkit.vision.probe import (
    ALL_VIEWS,
    POOLINGS,
    FeatureTable,
    pooled_outputs,
    read_features,
    turned,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    data = write_pictures(folder / "data", {"train": 8, "val": 4, "test": 3}, size=SIZE)
    return open_images(data, SIZE, folder / "cache")


@pytest.fixture(scope="module")
def table(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> FeatureTable:
    return read_features(tiny_donor(), images, tmp_path_factory.mktemp("features"), (0, 1, 4))


def test_a_table_holds_the_pooled_outputs_of_every_layer(
    images: ImageSet, table: FeatureTable
) -> None:
    outputs = tiny_donor()(as_images(images.pixels))
    for layer, output in enumerate(outputs):
        for pooling in POOLINGS:
            actual = table.views[0][:, table.columns([layer], [pooling])]
            expected = pool(output, [pooling]).detach().numpy()
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)


def test_other_views_leave_the_test_images_out(images: ImageSet, table: FeatureTable) -> None:
    assert len(table.views[0]) == 45
    assert len(table.views[1]) == len(table.views[4]) == 36
    mirrored = np.flip(images.pixels[images.splits != 2], axis=-1)
    np.testing.assert_array_equal(table.views[4][:32], pooled_outputs(tiny_donor(), mirrored[:32]))


def test_the_eight_views_of_a_square_are_its_symmetries() -> None:
    square = torch.arange(9.0).view(1, 1, 3, 3)
    views = {tuple(turned(square, view).flatten().tolist()) for view in ALL_VIEWS}
    assert len(views) == 8
    assert torch.equal(turned(square, 0), square)
    assert torch.equal(turned(square, 4), square.flip(-1))


def test_features_of_a_split_come_with_its_labels_once_for_each_view(table: FeatureTable) -> None:
    columns = table.columns([1])
    features, labels = table.of("train", columns, (0, 4))
    assert features.shape == (48, 16)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [0] * 8 + [1] * 8 + [2] * 8
    one, _ = table.of("train", columns, (4,))
    assert torch.equal(features[24:], one)
    assert len(table.of("val", columns)[1]) == 12


def test_a_second_reading_does_not_run_the_donor(images: ImageSet, tmp_path: Path) -> None:
    donor = tiny_donor()
    first = read_features(donor, images, tmp_path, (0, 4))
    steps: list[str] = []
    second = read_features(donor, images, tmp_path, (0, 4), lambda step, *_: steps.append(step))
    assert not any(step.startswith("view") for step in steps)
    np.testing.assert_array_equal(first.views[4], second.views[4])


def test_an_interrupted_pass_goes_on_and_a_damaged_file_is_made_again(
    images: ImageSet, tmp_path: Path
) -> None:
    def stop(step: str, done: int, _total: int) -> None:
        if step.startswith("view 4") and done > 31:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_features(tiny_donor(), images, tmp_path, (0, 4), stop)
    assert [file.name[-6:] for file in tmp_path.iterdir()] == ["-0.npy"]
    whole = read_features(tiny_donor(), images, tmp_path, (0, 4))
    expected = np.array(whole.views[4])
    file = next(tmp_path.glob("*-4.npy"))
    file.write_bytes(file.read_bytes()[:100])
    again = read_features(tiny_donor(), images, tmp_path, (0, 4))
    np.testing.assert_array_equal(again.views[4], expected)


def test_another_donor_has_features_of_its_own(images: ImageSet, tmp_path: Path) -> None:
    read_features(tiny_donor(0), images, tmp_path, (0,))
    read_features(tiny_donor(1), images, tmp_path, (0,))
    assert len(list(tmp_path.glob("*.npy"))) == 2


@given(st.integers(0, 2**32 - 1))
def test_a_redrawn_table_keeps_the_test_images_and_the_counts_of_every_class(seed: int) -> None:
    labels = np.array([0] * 7 + [1] * 6 + [2] * 3)
    splits = np.array([0, 0, 0, 0, 1, 1, 2, 0, 0, 1, 2, 2, 0, 0, 1, 2], dtype=np.int8)
    table = FeatureTable((2,), {0: np.zeros((16, 2), np.float16)}, splits, labels)
    drawn = table.redrawn(seed)
    np.testing.assert_array_equal(drawn.splits == 2, splits == 2)
    for label in range(3):
        for split in range(3):
            mine = (labels == label) & (drawn.splits == split)
            assert mine.sum() == ((labels == label) & (splits == split)).sum()
    np.testing.assert_array_equal(drawn.splits, table.redrawn(seed).splits)
