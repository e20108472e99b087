"""Which images are for training, validation and test, where the user did not say."""

from collections.abc import Sequence

import numpy as np

from graftkit.errors import ImagesError

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)

HELD_OUT = 0.15
"""Share of each class for validation, and again for test."""


def split_images(
    labels: np.ndarray, contents: Sequence[str], classes: Sequence[str], seed: int
) -> np.ndarray:
    """A stratified random split, 70/15/15; int8 (n,), indices into SPLITS.

    Files of equal bytes go together, so that no exact duplicate of a training image is in test;
    files that are equal but labelled differently go with the first of them.

    Args:
        labels: (n,), indices into classes. contents: digest of every file's bytes.

    Raises: ImagesError for a class of fewer than three different images.
    """
    groups: dict[str, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(content, []).append(index)
    splits = np.full(len(labels), TRAIN, dtype=np.int8)
    for label, name in enumerate(classes):
        own = [members for members in groups.values() if labels[members[0]] == label]
        if len(own) < len(SPLITS):
            raise ImagesError(
                f"class {name!r} has {len(own)} different image{'' if len(own) == 1 else 's'}; "
                "train, validation and test need one each: add images or leave the class out"
            )
        held = max(1, round(HELD_OUT * len(own)))
        order = np.random.default_rng([seed, label]).permutation(len(own))
        for place, chosen in enumerate(order[: 2 * held]):
            splits[own[chosen]] = TEST if place < held else VAL
    return splits
