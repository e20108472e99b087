"""How good answers are: accuracy with its interval, cross-entropy, recall of every class."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from graftkit.errors import ImagesError

Z = 1.959964  # of a two-sided 95 % interval
BATCH = 64


@dataclass(frozen=True)
class Scores:
    """What a network answers on some images.

    Attributes:
        accuracy, interval: share of right answers, and its 95 % interval after Wilson.
        loss: mean cross-entropy, nats.
        recall: of every class, the share of its images that are answered with it; None where it
            has no image.
        confusion: counts, by true class and then by answer.
        logits: (n, classes), float32.
        right: bool (n,), which images are answered rightly.
    """

    accuracy: float
    interval: tuple[float, float]
    loss: float
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    logits: Tensor
    right: np.ndarray


def score(logits: Tensor, labels: np.ndarray) -> Scores:
    """Scores of logits (n, classes) against labels (n,). Raises: ImagesError where n is 0."""
    if len(labels) == 0:
        raise ImagesError("there is no image to score; give this split at least one")
    classes = logits.shape[1]
    answers = logits.argmax(dim=1).numpy()
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, answers), 1)
    hits, counts = confusion.diagonal(), confusion.sum(axis=1)
    right = int(hits.sum())
    return Scores(
        accuracy=right / len(labels),
        interval=wilson_interval(right, len(labels)),
        loss=float(functional.cross_entropy(logits, torch.from_numpy(np.array(labels)))),
        recall=tuple(
            int(hit) / int(count) if count else None
            for hit, count in zip(hits, counts, strict=True)
        ),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        logits=logits,
        right=answers == np.asarray(labels),
    )


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), with p = right / count and n = count.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n)
    """
    share, scale = right / count, 1 + Z**2 / count
    center = (share + Z**2 / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def lead(own: np.ndarray, other: np.ndarray) -> tuple[float, tuple[float, float]]:
    """How far one network's accuracy is above another's on the same images, and its 95 % interval.

    Paired, so that images which both find easy or hard do not widen it: d̄ ± z √(var(d) / m), where
    d are the differences of n images and one more image for each of the two, m = n + 2; that is
    the adjusted Wald interval of Bonett and Price (2012).

    Args:
        own, other: (n,), whether an image is answered rightly, or the share of several networks.
    """
    differences = np.concatenate([own.astype(float) - other.astype(float), [1.0, -1.0]])
    mean = float(differences.mean())
    half = Z * float(differences.std()) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


@torch.inference_mode()
def logits_of(
    module: nn.Module, pixels: np.ndarray, batch: int = BATCH, bfloat16: bool = False
) -> Tensor:
    """Logits (n, classes) of images as they are, in eval mode; float32, on the CPU.

    Args:
        pixels: uint8 (n, 3, size, size), RGB.
        bfloat16: compute so, for speed (autocast).
    """
    device = next(module.parameters()).device
    training = module.training
    module.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        found = [module(images.to(device)).float().cpu() for images in batches(pixels, batch)]
    module.train(training)
    return torch.cat(found) if found else torch.empty(0, 0)


def batches(pixels: np.ndarray, batch: int = BATCH) -> Iterator[Tensor]:
    """Images, uint8 (n, 3, size, size), as networks take them: float32, channels last."""
    for start in range(0, len(pixels), batch):
        rows = torch.from_numpy(np.array(pixels[start : start + batch]))
        yield rows.float().contiguous(memory_format=torch.channels_last)
