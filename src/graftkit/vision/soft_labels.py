"""What the fine-tuned donor says of training images: the soft labels of all that learn from it."""

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn


class SoftLabels:
    """A network's logits for batches of images, each batch computed once.

    Networks that are trained with one seed see the same views in the same batches, so only the
    first of them waits for the answers.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval()
        self._known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Logits (n, classes), float32, of images (n, 3, size, size); as autocast computes them."""
        rows = images.movedim(1, -1).contiguous().cpu()  # no copy where channels are last
        key = blake3(rows.numpy().view(np.uint8).data).digest()
        if key not in self._known:
            self._known[key] = self.network(images).float()
        return self._known[key]
