"""Graft: a donor, images and a budget become a rootstock in ONNX, and a report.

    prepare   read the images, open the donor, measure the accuracy and cost of every cut
    choose    the scion: the layers and features within the budget that validate best
    train     the rootstock, and with `baselines` the networks that it is compared with
    measure   every network, on the ONNX file that would be deployed
    report    graft.json and report.html

Each phase caches what it computes: decoded images, features and costs of every cut, and a
checkpoint for every epoch of a fine-tuning. A run that was killed continues from there.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from torch import nn

from graftkit.config import Settings
from graftkit.errors import ConfigError, OutputError
from graftkit.outputs import own_folder
from graftkit.parallel import kept_memory
from graftkit.progress import Progress, silent
from graftkit.vision.baselines import (
    DRAWS,
    ROOTSTOCK,
    fitted_baselines,
    fitted_network,
    fitted_paper_network,
    trained_baselines,
    trained_donor,
)
from graftkit.vision.choose import (
    CostBudget,
    DonorCuts,
    ScionChoice,
    assemble,
    choose_scion,
    paper_head,
)
from graftkit.vision.donors import open_donor
from graftkit.vision.evaluate import measure, measure_int8
from graftkit.vision.images import open_images
from graftkit.vision.probe import ALL_VIEWS, UPRIGHT_VIEWS
from graftkit.vision.report import write_report
from graftkit.vision.results import (
    MeasuredNetworks,
    cuts_record,
    networks_record,
    warnings_of,
    write_json,
)
from graftkit.vision.rootstock import Rootstock
from graftkit.vision.training import (
    SoftLabels,
    TrainedNetwork,
    Trainer,
    TrainingSettings,
    file_stem,
    seeded,
)

BASELINES = "baselines"
"""The folder of their ONNX files."""


class GraftSettings(Settings):
    """Settings of `graft`: the budget, and how the rootstock is chosen and trained."""

    budget: str
    """Most that the rootstock may cost: 0.6MB (its float32 file), 2ms or 20MMAC."""
    method: Literal["auto", "paper"] = "auto"
    """auto (all depths up to the best cut) or paper (three layers of one stage, 256 hidden)."""
    freeze: bool = False
    """Whether the donor's layers keep their weights: minutes in place of an hour."""
    size: int = Field(default=128, ge=16, le=1024)
    """Pixels of a side that images are scaled to."""
    upright: bool = False
    """Whether up matters in the images: mirrored only, not turned by 90 degrees."""
    epochs: int = Field(default=12, ge=1)
    """Passes over the training images, of the rootstock and of every baseline."""
    baselines: bool = False
    """Whether to train the research baselines too, which takes as long again."""
    seed: int = Field(default=0, ge=0)
    """Draws splits where there are none, views, and random weights."""

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Validate what a user typed. Raises: ConfigError."""
        try:
            return cls(**values)
        except ValidationError as error:
            fault = error.errors()[0]
            reason = fault["msg"][0].lower() + fault["msg"][1:]
            raise ConfigError(f"{fault['loc'][0]} is {fault['input']!r}: {reason}") from error


@kept_memory()
def graft(
    donor: str | Path | nn.Module,
    data: str | Path,
    output: str | Path,
    settings: GraftSettings,
    cache: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Graft features of a donor into a rootstock that keeps a budget, and measure it.

    Writes rootstock.onnx, rootstock.int8.onnx, baselines/*.onnx, graft.json and report.html.

    Args:
        donor: an .npz of MobileNetV2, a directory or Hub id, `timm:NAME`, or a torch module.
        data: a folder or zip with one folder per class, or a CSV of files and classes.
        output: a new or empty folder, or one that an earlier call made.
        cache: folder of everything that another run can use again; default `output`/cache.
        progress: called with the step, how much of it is done, and of how much.
    Returns: what graft.json holds.
    Raises: ImagesError for data, and DonorError for a donor, that cannot be used; BudgetError when
        no rootstock keeps the budget; OutputError when a file cannot be written.
    """
    inputs = [data, *([donor] if isinstance(donor, str | Path) else [])]
    CostBudget.parse(settings.budget)  # one that is not understood leaves no folder behind
    with own_folder(output, "vision graft", inputs) as folder:
        run = GraftRun(settings, Path(cache or folder / "cache"), progress)
        return run.run(donor, Path(data), folder)


class GraftRun:
    """The phases of one `graft`, each a method.

    Args:
        cache: folder of everything that another run can use again.
    """

    def __init__(self, settings: GraftSettings, cache: Path, progress: Progress = silent) -> None:
        self.settings, self.cache, self.progress = settings, cache, progress
        self.budget = CostBudget.parse(settings.budget)
        self.started = time.monotonic()

    def run(self, donor: str | Path | nn.Module, data: Path, output: Path) -> dict[str, Any]:
        """All phases, into the folder `output`. Returns: what graft.json holds."""
        _make_folders(self.cache, output / BASELINES)
        cuts = self.prepare(donor, data)
        # An impossible budget is refused here, before an hour of training.
        choice = self.choose(cuts)
        if self.settings.freeze:
            networks = self.fit(cuts, choice)
        else:
            tuned = trained_donor(self.trainer(cuts), cuts.donor, cuts.images)
            pretrained = cuts
            cuts = pretrained.after_fine_tuning(tuned.rootstock, self.cache, self.progress)
            choice = self.choose(cuts, thin=True)
            networks = self.train(cuts, choice, tuned, pretrained)
        measured, notes = self.measure(networks, cuts, output)
        int8 = self.quantize(measured, cuts, output)
        return self.report(cuts, choice, measured, int8, notes, output)

    def prepare(self, donor: str | Path | nn.Module, data: Path) -> DonorCuts:
        """Read the images, open the donor, and measure the accuracy and cost of every cut."""
        settings = self.settings
        images = open_images(data, settings.size, self.cache, settings.seed, self.progress)
        opened = open_donor(donor, settings.size)
        views = UPRIGHT_VIEWS if settings.upright else ALL_VIEWS
        return DonorCuts.measure(images, opened, views, self.cache, self.progress)

    def choose(self, cuts: DonorCuts, thin: bool = False) -> ScionChoice:
        """The scion within the budget. Raises: BudgetError where no rootstock keeps it."""
        return choose_scion(cuts, self.budget, self.settings.method, thin, self.progress)

    def fit(self, cuts: DonorCuts, choice: ScionChoice) -> Iterator[TrainedNetwork | str]:
        """Train heads on frozen features: the rootstock's, then those of the baselines."""
        settings = self.settings
        if settings.method == "paper":
            rootstock = fitted_paper_network(ROOTSTOCK, cuts, choice.scion, settings.seed)
        else:
            draws = DRAWS if settings.baselines else 0
            rootstock = fitted_network(ROOTSTOCK, cuts, choice.scion, draws)
        yield rootstock
        if settings.baselines:
            yield from fitted_baselines(cuts, rootstock.rootstock, settings.seed, self.progress)

    def train(
        self, cuts: DonorCuts, choice: ScionChoice, tuned: TrainedNetwork, pretrained: DonorCuts
    ) -> Iterator[TrainedNetwork | str]:
        """Fine-tune the rootstock, then the baselines; all learn from the fine-tuned donor.

        Args:
            cuts: of the fine-tuned donor `tuned`. pretrained: of the donor before that.
        """
        yield tuned
        trainer, soft_labels = self.trainer(cuts), SoftLabels(tuned.rootstock)
        yield trainer.tune(ROOTSTOCK, self.assemble(cuts, choice), soft_labels)
        if self.settings.baselines:
            untrained = self.assemble(cuts, choice)
            yield from trained_baselines(
                trainer, cuts, pretrained, untrained, tuned.rootstock, soft_labels
            )

    def trainer(self, cuts: DonorCuts) -> Trainer:
        """Fine-tunes all networks of this run in the same way."""
        settings = self.settings
        training = TrainingSettings(
            epochs=settings.epochs, upright=settings.upright, seed=settings.seed
        )
        folder = self.cache / "training"
        return Trainer(cuts.images, cuts.donor.folded, training, folder, self.progress)

    def assemble(self, cuts: DonorCuts, choice: ScionChoice) -> Rootstock:
        """The chosen rootstock before its training, with the head that the method gives it."""
        classes = cuts.images.classes
        if self.settings.method == "paper":
            with seeded(self.settings.seed):
                head = paper_head(choice.scion.features, len(classes))
        else:
            head = choice.probe.trainable_head()
        return assemble(choice.donor, choice.scion, classes, head)

    def measure(
        self, networks: Iterable[TrainedNetwork | str], cuts: DonorCuts, output: Path
    ) -> tuple[MeasuredNetworks, list[str]]:
        """Export every network as soon as it is trained, and measure its ONNX file.

        Returns: the networks by name, and sentences about those that were left out.
        """
        measured: MeasuredNetworks = {}
        notes: list[str] = []
        for network in networks:
            if isinstance(network, str):
                notes.append(network)
                continue
            if network.name == ROOTSTOCK:
                file = output / "rootstock.onnx"
            else:
                file = output / BASELINES / f"{file_stem(network.name)}.onnx"
            measurement = measure(network.rootstock, cuts.images, file, cuts.donor.name)
            measured[network.name] = network, measurement
        return measured, notes

    def quantize(self, measured: MeasuredNetworks, cuts: DonorCuts, output: Path) -> dict[str, Any]:
        """Quantize the rootstock into rootstock.int8.onnx, and measure that file."""
        fp32 = measured[ROOTSTOCK][1].file
        return measure_int8(fp32, cuts.images, output / "rootstock.int8.onnx")

    def report(
        self,
        cuts: DonorCuts,
        choice: ScionChoice,
        measured: MeasuredNetworks,
        int8: dict[str, Any],
        notes: list[str],
        output: Path,
    ) -> dict[str, Any]:
        """Write graft.json and report.html. Returns: what graft.json holds."""
        settings = self.settings
        result = {
            "method": settings.method,
            "frozen": settings.freeze,
            "size": settings.size,
            "epochs": 0 if settings.freeze else settings.epochs,
            "seed": settings.seed,
            "baselines_trained": settings.baselines,
            **cuts_record(cuts, choice, self.budget),
            **networks_record(measured, cuts.images),
            **int8,
        }
        warnings = warnings_of(result, self.budget, measured[ROOTSTOCK][1])
        result["warnings"] = [*cuts.images.warnings, *cuts.donor.notes, *notes, *warnings]
        result["seconds"] = round(time.monotonic() - self.started, 1)
        write_json(result, output / "graft.json")
        write_report(result, output / "report.html")
        return result


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made ({error}); choose another place"
            ) from error
