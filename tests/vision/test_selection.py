"""Which scion a budget gets: all that fits, or what matters most of a deeper cut."""

from collections.abc import Callable

import numpy as np
import pytest

from graftkit.vision.choose import choose_scion, probe_curve
from graftkit.vision.features import FeatureTable, columns_of, scion_of
from graftkit.vision.rootstock import Scion

WIDTHS = (4, 4, 8)  # two poolings of 2, 2 and 4 channels


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def table() -> FeatureTable:
    """Layer 0 says nothing, layer 1 half, and of layer 2 features 9 and 10 say all."""
    draws = np.random.default_rng(0)
    labels = np.arange(240) % 4
    values = draws.normal(0, 1, (240, 16)).astype(np.float16)
    values[:, 5] += 6 * (labels // 2)
    values[:, 9] += 6 * (labels // 2)
    values[:, 10] += 6 * (labels % 2)
    splits = np.repeat(np.array([0, 1, 2], np.int8), [120, 60, 60])
    return FeatureTable(WIDTHS, {0: values}, splits, labels)


def fits(most: int) -> Callable[[Scion], bool]:
    """A price for every layer, and one for every feature."""
    return lambda scion: 100 * scion.cut + scion.features <= most


def test_a_scion_reads_the_columns_it_was_made_of(table: FeatureTable) -> None:
    columns = np.array([1, 5, 7, 9])
    scion = scion_of(table, columns)
    assert scion == Scion(3, {0: (1,), 1: (1, 3), 2: (1,)}, ("mean", "std"))
    np.testing.assert_array_equal(columns_of(table, scion), columns)


def test_columns_of_a_pooling_are_the_halves_of_a_layer(table: FeatureTable) -> None:
    assert table.columns([2], ["mean"]).tolist() == [8, 9, 10, 11]
    assert table.columns([0, 2], ["std"]).tolist() == [2, 3, 12, 13, 14, 15]


def test_without_a_limit_the_best_cut_is_taken_whole(table: FeatureTable) -> None:
    choice = choose_scion(table, probe_curve(table, quiet), fits(10_000))
    assert choice is not None
    assert (choice.scion.cut, choice.rule) == (3, "all")


def test_a_cut_that_does_not_fit_whole_keeps_the_features_that_matter(table: FeatureTable) -> None:
    choice = choose_scion(table, probe_curve(table, quiet), fits(302))
    assert choice is not None
    assert choice.rule in ("l2", "taylor")
    assert 2 in choice.scion.channels[2]
    assert choice.scion.features == 2
    assert choice.probe.val_accuracy > 0.9


def test_a_trunk_that_does_not_fit_is_left_for_a_shallower_one(table: FeatureTable) -> None:
    choice = choose_scion(table, probe_curve(table, quiet), fits(208))
    assert choice is not None
    assert choice.scion.cut == 2


def test_where_nothing_fits_nothing_is_chosen(table: FeatureTable) -> None:
    assert choose_scion(table, probe_curve(table, quiet), fits(100)) is None


@pytest.mark.parametrize("most", [101, 105, 150, 203, 301, 305, 400])
def test_a_choice_keeps_its_limit(table: FeatureTable, most: int) -> None:
    choice = choose_scion(table, probe_curve(table, quiet), fits(most))
    assert choice is not None
    assert fits(most)(choice.scion)
