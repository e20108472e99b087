"""Rootstocks and baselines that are fine-tuned: one recipe, the same epochs, views and seed.

The fully fine-tuned donor comes first. All others learn from the labels and from its answers.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import nn

from graftkit.errors import BudgetError, ConfigError, DonorError
from graftkit.vision.baselines import donor_classifier, pruned_donor, random_trunk, student
from graftkit.vision.donor import Donor
from graftkit.vision.images import ImageSet, Report
from graftkit.vision.measuring import Network, file_stem
from graftkit.vision.norms import exported_parameters, insert_norms
from graftkit.vision.rootstock import Rootstock
from graftkit.vision.soft_labels import SoftLabels
from graftkit.vision.training import TrainingSettings, fine_tune

DONOR, ROOTSTOCK = "fine-tuned donor", "rootstock"
STUDENT = "distilled student"
RANDOM_TRUNK, PRUNED = "random weights", "pruned donor"
MEASURED_IMAGES = 512  # training images that inserted batch normalization is measured on


class Trainer:
    """Fine-tunes one network after another in the same way; each resumes in a folder of its own.

    Networks without batch normalization get it where the donor has its own folded away.
    """

    def __init__(
        self,
        images: ImageSet,
        folded: bool,
        settings: TrainingSettings,
        folder: Path,
        report: Report,
    ):
        self.train, self.val = images.part("train"), images.part("val")
        self.folded, self.settings = folded, settings
        self.folder, self.report = folder, report

    def tune(
        self, name: str, rootstock: Rootstock, soft_labels: SoftLabels | None, random: bool = False
    ) -> Network:
        """Fine-tune `rootstock` in place.

        Args:
            random: its trunk begins with random weights and learns as fast as its head.
        """
        has_norms = any(isinstance(part, nn.BatchNorm2d) for part in rootstock.trunk.modules())
        if self.folded and not has_norms:
            chosen = np.random.default_rng(self.settings.seed).permutation(len(self.train.labels))
            insert_norms(rootstock, self.train.pixels[np.sort(chosen[:MEASURED_IMAGES])])
        settings = self.settings.model_copy(update={"trunk_share": 1.0} if random else {})
        folder = self.folder / file_stem(name)

        def report(_step: str, done: int, total: int) -> None:
            self.report(f"fine-tuning: {name}", done, total)

        done = fine_tune(rootstock, self.train, self.val, settings, folder, soft_labels, report)
        return Network(name, rootstock, done.history)


def tune_donor(trainer: Trainer, donor: Donor, images: ImageSet) -> Network:
    """All layers of the donor with a linear head on the last: what a rootstock is held against."""
    seed = trainer.settings.seed
    return trainer.tune(DONOR, donor_classifier(donor, images.classes, seed=seed), None)


def tune_baselines(
    trainer: Trainer, donor: Rootstock, rootstock: Rootstock, soft_labels: SoftLabels
) -> Iterator[Network | str]:
    """Networks of at most the parameters of `rootstock`, one by one.

    Args:
        donor: fine-tuned. rootstock: before its own fine-tuning. soft_labels: of the donor.
    Yields: what was trained, or a sentence that says why one could not be.
    """
    seed, parameters = trainer.settings.seed, exported_parameters(rootstock)
    classes, size = rootstock.classes, rootstock.size
    makers: tuple[tuple[str, Callable[[], Rootstock], bool], ...] = (
        (STUDENT, lambda: student(classes, parameters, size, seed=seed), True),
        (RANDOM_TRUNK, lambda: random_trunk(rootstock, seed), True),
        (PRUNED, lambda: pruned_donor(donor, parameters), False),
    )
    for name, make, random in makers:
        try:
            network = make()
        except (BudgetError, ConfigError, DonorError) as error:
            yield f"Left out, {name}: {error}"
        else:
            yield trainer.tune(name, network, soft_labels, random)
