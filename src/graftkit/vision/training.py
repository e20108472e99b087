"""Fine-tune a rootstock on random views of images, from their labels and from soft labels.

    loss = (1 − w) CE(smoothed labels) + w T² KL(softmax(soft / T) ‖ softmax(logits / T))

AdamW with a warm-up and a cosine schedule; the result is a moving average of the weights. Every
draw follows from (seed, epoch, batch), and every epoch ends with a checkpoint: a run that was
killed continues from its last whole epoch, to the same bits on the same machine.
"""

import json
import math
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from graftkit.config import Settings
from graftkit.errors import ConfigError, ImagesError
from graftkit.files import replaced_file
from graftkit.parallel import bfloat16_pays
from graftkit.progress import Progress, silent
from graftkit.vision.evaluate import score
from graftkit.vision.images import ImageSet, LabeledImages
from graftkit.vision.rootstock import Rootstock, insert_norms, logits_of

STEP = "fine-tuning"  # the step that `progress` is called with
CHECKPOINT = "checkpoint.pt"
NORM_IMAGES = 512  # training images that inserted batch normalization is measured on
WARM_UP_SHARE = 0.1  # of all steps
LEAST_AREA = 0.6  # share of the image that a crop shows, at least
MOST_DEGREES = 10.0  # of a rotation to either side
LIGHT = 0.2  # brightness, contrast and saturation are scaled by 1 - LIGHT to 1 + LIGHT
GREY = (0.299, 0.587, 0.114)  # luma of R, G and B, ITU-R BT.601


class TrainingSettings(Settings):
    """How a rootstock, or a baseline, is fine-tuned."""

    epochs: int = Field(default=20, ge=1, le=10_000)
    """Passes over the training images."""
    batch: int = Field(default=64, ge=4, le=65_536)
    """Images of a step, at most; the images are dealt out evenly."""
    learning_rate: float = Field(default=3e-3, gt=0, lt=1)
    """Highest rate of AdamW, reached after a tenth of the steps; the head's."""
    trunk_share: float = Field(default=0.3, ge=0, le=1)
    """The trunk's rate as a share of it: 1 for random weights, 0 leaves its weights alone."""
    weight_decay: float = Field(default=0.02, ge=0, lt=1)
    """Decoupled weight decay of matrices and kernels; norms and biases have none."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of a label that is spread over all classes."""
    distillation: float = Field(default=0.9, ge=0, le=1)
    """Weight w of the divergence from soft labels, where there are any."""
    temperature: float = Field(default=2.0, gt=0, le=100)
    """Temperature T of soft labels."""
    average_epochs: float = Field(default=1.0, ge=0)
    """Horizon of the moving average of weights, in epochs; 0 keeps the last weights."""
    upright: bool = False
    """Whether up matters in the images: mirrored only, not turned by 90 degrees."""
    bfloat16: bool = Field(default_factory=bfloat16_pays)
    """Whether convolutions and dense layers compute in bfloat16 (autocast)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the order of the images, their views and dropout."""


@dataclass(frozen=True)
class Epoch:
    """One pass: the mean training loss, and cross-entropy and accuracy on validation images."""

    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """The epochs of a fine-tuning; `best`, from 0, is the one whose weights are the result."""

    history: tuple[Epoch, ...]
    best: int


@dataclass(frozen=True)
class TrainedNetwork:
    """A rootstock or a baseline, ready to be measured.

    Attributes:
        history: the epochs of its fine-tuning; empty where only the head was fitted.
        draws: test accuracies of the head fitted on other draws of the training images; may be
            empty.
    """

    name: str
    rootstock: Rootstock
    history: tuple[Epoch, ...] = ()
    draws: tuple[float, ...] = ()


class SoftLabels:
    """The logits of the fine-tuned donor for batches of training images, each computed once.

    Networks that are trained with one seed see the same views in the same batches, so only the
    first of them has to wait.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval()
        self._logits: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Logits (n, classes), float32, of images (n, 3, size, size); as autocast computes them."""
        rows = images.movedim(1, -1).contiguous().cpu()  # no copy where channels are last
        key = blake3(rows.numpy().view(np.uint8).data).digest()
        if key not in self._logits:
            self._logits[key] = self.network(images).float()
        return self._logits[key]


def fine_tune(
    module: Rootstock,
    train: LabeledImages,
    val: LabeledImages,
    settings: TrainingSettings,
    folder: Path,
    soft_labels: SoftLabels | None = None,
    progress: Progress = silent,
) -> TrainingResult:
    """Train `module` in place; it ends in eval mode with the weights of its best epoch.

    The best epoch has the lowest validation cross-entropy. Accuracy moves in steps of one image
    and would be decided by chance on a few hundred images.

    Args:
        module: on the device that it is to be trained on.
        folder: of the checkpoint. The same call continues from it; any other starts anew.
        soft_labels: of the views that `module` sees; None learns from the labels alone.
        progress: called at every step.
    Raises: ImagesError for too few images; ConfigError when the loss is not finite or the
        checkpoint cannot be read; OutputError when it cannot be written.
    """
    _check_parts(train, val)
    key = _digest(module, train, val, settings, soft_labels)
    run = _NetworkTraining(module, train, val, settings, soft_labels)
    file = Path(folder) / CHECKPOINT
    run.resume(file, key)
    for epoch in range(len(run.history), settings.epochs):
        started = time.monotonic()
        with seeded(settings.seed, epoch):
            train_loss = run.train_epoch(epoch, progress)
        run.close_epoch(train_loss, started)
        run.write(file, key)
    module.load_state_dict(run.best_weights)
    module.eval()
    return TrainingResult(tuple(run.history), run.best)


def learning_rate(step: int, steps: int) -> float:
    """Share of the highest rate: linear up to 1, then a cosine down to 0."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def loss_of(
    logits: Tensor, labels: Tensor, soft: Tensor | None, settings: TrainingSettings
) -> Tensor:
    """The loss at the top of this file, a mean over rows.

    Args:
        logits, soft: (n, classes), float. labels: (n,), int64. soft: None takes w = 0.
    """
    plain = functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    if soft is None:
        return plain
    heat = settings.temperature
    divergence = functional.kl_div(
        functional.log_softmax(logits / heat, dim=1),
        functional.log_softmax(soft / heat, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - settings.distillation) * plain + settings.distillation * heat**2 * divergence


def parameter_groups(module: Rootstock, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups for AdamW: trunk and head by rate, kernels with weight decay, vectors without."""
    groups = []
    for part, rate in (
        (module.trunk, settings.trunk_share * settings.learning_rate),
        (module.head, settings.learning_rate),
    ):
        weights = list(part.parameters())
        kernels = [weight for weight in weights if weight.ndim > 1]
        vectors = [weight for weight in weights if weight.ndim <= 1]
        for members, decay in ((kernels, settings.weight_decay), (vectors, 0.0)):
            groups.append({"params": members, "highest": rate, "weight_decay": decay})
    return groups


class _NetworkTraining:
    """Weights, their average, the optimizer's state, the history and the best weights so far."""

    def __init__(
        self,
        module: Rootstock,
        train: LabeledImages,
        val: LabeledImages,
        settings: TrainingSettings,
        soft_labels: SoftLabels | None,
    ):
        self.module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train, self.val = train, val
        self.settings, self.soft_labels = settings, soft_labels
        self.device = next(module.parameters()).device
        self.steps = math.ceil(len(train.labels) / settings.batch)  # of an epoch
        self.average = AveragedModel(
            module, multi_avg_fn=_moving_average(settings, self.steps), use_buffers=True
        )
        self.optimizer = torch.optim.AdamW(parameter_groups(module, settings))
        self.history: list[Epoch] = []
        self.best = -1
        self.best_weights: dict[str, Tensor] = {}

    def train_epoch(self, epoch: int, progress: Progress) -> float:
        """One pass over the training images; their mean loss."""
        self.module.train()
        order = torch.randperm(len(self.train.labels)).numpy()
        total = 0.0
        for index, rows in enumerate(np.array_split(order, self.steps)):
            step = epoch * self.steps + index
            total += len(rows) * self._step(step, epoch, index, np.sort(rows))
            progress(STEP, step + 1, self.steps * self.settings.epochs)
        return total / len(order)

    def _step(self, step: int, epoch: int, index: int, rows: np.ndarray) -> float:
        """One update of the weights from the images `rows`; its loss."""
        settings = self.settings
        pixels = torch.from_numpy(self.train.pixels[rows]).to(self.device)
        labels = torch.from_numpy(self.train.labels[rows]).to(self.device)
        images = augment(pixels, settings.seed, epoch, index, settings.upright)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bfloat16):
            logits = self.module(images).float()
            soft = self.soft_labels.of(images) if self.soft_labels else None
        loss = loss_of(logits, labels, soft, settings)
        value = loss.item()
        if not math.isfinite(value):
            raise ConfigError(
                f"the loss became {value} in epoch {epoch + 1}, step {index + 1}; lower "
                f"learning_rate (it is {settings.learning_rate}) or set bfloat16 to false"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * learning_rate(step, self.steps * settings.epochs)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.average.update_parameters(self.module)
        return value

    def close_epoch(self, train_loss: float, started: float) -> None:
        """Score the average on validation images, and remember it when it is the best so far."""
        network = self.average.module
        settings = self.settings
        logits = logits_of(network, self.val.pixels, settings.batch, settings.bfloat16)
        scores = score(logits, self.val.labels)
        seconds = time.monotonic() - started
        self.history.append(Epoch(train_loss, scores.loss, scores.accuracy, seconds))
        if self.best < 0 or scores.loss < self.history[self.best].val_loss:
            self.best = len(self.history) - 1
            self.best_weights = {k: v.clone() for k, v in network.state_dict().items()}

    def write(self, file: Path, key: str) -> None:
        """The state after a whole epoch, whole or not at all. Raises: OutputError."""
        state = {
            "key": key,
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
            "best": self.best,
            "best_weights": self.best_weights,
        }
        with replaced_file(file) as partial:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # how torch's writer reports a full disk
                raise OSError(str(error)) from error

    def resume(self, file: Path, key: str) -> None:
        """Go on from `file` where it is of the same call. Raises: ConfigError if it is damaged."""
        if not file.exists():
            return
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
            if state["key"] != key:
                return
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = [Epoch(**epoch) for epoch in state["history"]]
            self.best, self.best_weights = state["best"], state["best_weights"]
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.PickleError) as e:
            raise ConfigError(
                f"{file}: no checkpoint of a training ({e}); delete it and run again"
            ) from e


def _moving_average(settings: TrainingSettings, steps: int) -> Callable[..., None]:
    """average <- average + share (weights - average), for AveragedModel."""
    horizon = settings.average_epochs * steps
    share = 1 - math.exp(-1 / horizon) if horizon else 1.0

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], _count: Tensor) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, share)
        else:  # counters and indices are no averages
            torch._foreach_copy_(averages, current)

    return update


def _check_parts(train: LabeledImages, val: LabeledImages) -> None:
    if len(train.labels) < 2:
        raise ImagesError(
            f"{len(train.labels)} image is there to train on; batch normalization needs two"
        )
    if len(val.labels) == 0:
        raise ImagesError(
            "there is no image for validation, which picks the best epoch; give at least one"
        )


def _digest(
    module: Rootstock,
    train: LabeledImages,
    val: LabeledImages,
    settings: TrainingSettings,
    soft_labels: SoftLabels | None,
) -> str:
    """All that decides the result: settings, images, first weights, architecture, soft labels."""
    digest = blake3()
    unused = {"distillation", "temperature"} if soft_labels is None else None
    relevant = settings.model_dump_json(exclude=unused)
    for text in (relevant, json.dumps(module.describe()), repr(module)):
        digest.update(text.encode())
    for part in (train, val):
        digest.update(part.labels.tobytes())
        digest.update(np.ascontiguousarray(part.pixels).data)
    states = [module.state_dict()]
    if soft_labels:
        states.append(soft_labels.network.state_dict())
    for state in states:
        for name, value in state.items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_stem(name: str) -> str:
    """Letters and digits of a name, other characters as hyphens: paper-s-scion."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


class Trainer:
    """Fine-tunes one network after another in the same way; each has a folder for its checkpoint.

    Args:
        folded: whether the donor's batch normalization is folded into its convolutions; networks
            without batch normalization then get it for the training.
    """

    def __init__(
        self,
        images: ImageSet,
        folded: bool,
        settings: TrainingSettings,
        folder: Path,
        progress: Progress,
    ):
        self.train, self.val = images.subset("train"), images.subset("val")
        self.folded, self.settings = folded, settings
        self.folder, self.progress = folder, progress

    def tune(
        self, name: str, rootstock: Rootstock, soft_labels: SoftLabels | None, random: bool = False
    ) -> TrainedNetwork:
        """Fine-tune `rootstock` in place.

        Args:
            random: its trunk begins with random weights and learns as fast as its head.
        """
        has_norms = any(isinstance(part, nn.BatchNorm2d) for part in rootstock.trunk.modules())
        if self.folded and not has_norms:
            order = np.random.default_rng(self.settings.seed).permutation(len(self.train.labels))
            insert_norms(rootstock, self.train.pixels[np.sort(order[:NORM_IMAGES])])
        settings = self.settings.model_copy(update={"trunk_share": 1.0} if random else {})
        folder = self.folder / file_stem(name)

        def progress(_step: str, done: int, total: int) -> None:
            self.progress(f"fine-tuning: {name}", done, total)

        trained = fine_tune(
            rootstock, self.train, self.val, settings, folder, soft_labels, progress
        )
        return TrainedNetwork(name, rootstock, trained.history)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed torch's random numbers with `numbers` inside the block, and restore them afterwards."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    with torch.random.fork_rng():
        torch.manual_seed(int(seed[0]))
        yield


def augment(pixels: Tensor, seed: int, epoch: int, batch: int, upright: bool = False) -> Tensor:
    """A random view of every image: symmetry, crop, small rotation and light.

    Everything geometric is one affine map and is sampled once; everything of colour is one 3 x 3
    matrix and an offset.

    Args:
        pixels: (n, 3, size, size), uint8, RGB.
        seed, epoch, batch: decide every draw.
        upright: whether up matters: mirrored only, not turned by 90 degrees.
    Returns: the same shape, float32, 0..255.
    """
    with seeded(seed, epoch, batch):
        maps = _geometry(len(pixels), upright).to(pixels.device)
        matrix, contrast = (part.to(pixels.device) for part in _light(len(pixels)))
    images = pixels.float()
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    images = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return _apply_light(images, matrix, contrast)


def _geometry(count: int, upright: bool) -> Tensor:
    """Affine maps (count, 2, 3) from the view's coordinates to the image's, both -1 to 1."""
    angle = torch.deg2rad((2 * torch.rand(count) - 1) * MOST_DEGREES)
    if not upright:
        angle = angle + torch.randint(4, (count,)) * (math.pi / 2)
    side = torch.sqrt(LEAST_AREA + (1 - LEAST_AREA) * torch.rand(count))
    mirrored = 1 - 2 * torch.randint(2, (count,)).float()
    center = (2 * torch.rand(count, 2) - 1) * (1 - side)[:, None]
    cosine, sine = side * torch.cos(angle), side * torch.sin(angle)
    rows = [cosine * mirrored, -sine, center[:, 0], sine * mirrored, cosine, center[:, 1]]
    return torch.stack(rows, dim=1).view(count, 2, 3)


def _light(count: int) -> tuple[Tensor, Tensor]:
    """Colour matrices (count, 3, 3), and the contrasts in them, (count, 1, 1)."""
    brightness, contrast, saturation = 1 + LIGHT * (2 * torch.rand(3, count, 1, 1) - 1)
    grey = torch.tensor(GREY).expand(3, 3)
    return brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey), contrast


def _apply_light(images: Tensor, matrix: Tensor, contrast: Tensor) -> Tensor:
    """matrix · x + offset, the offset such that contrast leaves every image's mean grey unchanged.

    Saturation leaves grey as it is, so the mean grey g of matrix · x is brightness · contrast · g.
    """
    flat = images.flatten(2)
    colored = matrix @ flat
    grey = torch.tensor(GREY, device=images.device)
    mean = torch.einsum("c,ncp->n", grey, colored)[:, None, None] / flat.shape[2]
    return (colored + (1 / contrast - 1) * mean).clamp_(0, 255).view_as(images)
