"""Donor: a pretrained network as a chain of layers, whose outputs a rootstock can read.

Knowledge Grafting (arXiv 2507.19261) takes feature maps from inside a large network. So a donor
is neither a classifier nor an architecture here: it is a list of layers that can be cut anywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from graftkit.errors import ConfigError, DonorError


@dataclass(frozen=True)
class Normalization:
    """The input of a network: (x − mean) / std, for RGB values x of 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, image: Tensor) -> Tensor:
        """Normalize images (n, 3, size, size), float, RGB 0..255."""
        mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation of ImageNet's training images, as torchvision publishes them."""


@dataclass(frozen=True)
class Chain:
    """A donor before it is opened at a size: layer i maps the output of layer i - 1 to its own.

    Attributes:
        normalization: None where the network does not state it.
        folded: batch normalization is folded into the convolutions.
    """

    name: str
    normalization: Normalization | None
    layers: tuple[nn.Module, ...]
    layer_names: tuple[str, ...]
    folded: bool = False


def normalization_of(
    settings: Mapping[str, Any], mean: str, std: str, rescale: float
) -> Normalization | None:
    """The normalization written in a preprocessor's settings; None where there is none.

        (rescale · x − mean) / std = (x − mean / rescale) / (std / rescale)

    Args:
        settings: of a preprocessor's file.
        mean, std: keys of the three numbers for red, green and blue.
        rescale: what RGB values of 0..255 are multiplied with before; mostly 1/255.
    Raises: DonorError for numbers that cannot be a mean and a standard deviation.
    """
    if settings.get(mean) is None or settings.get(std) is None:
        return None
    try:
        shift, scale = (_three(settings[key], rescale) for key in (mean, std))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise DonorError(
            f"the donor's {mean} and {std} must be three numbers each, found {settings[mean]!r} "
            f"and {settings[std]!r}; correct its preprocessor settings"
        ) from error
    return Normalization(shift, scale)


def _three(values: float | Iterable[float], rescale: float) -> tuple[float, float, float]:
    listed = [values] * 3 if isinstance(values, int | float) else list(values)
    red, green, blue = (float(value) / rescale for value in listed)
    return red, green, blue


def reason(error: BaseException) -> str:
    """The first line of a foreign error's message, for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@torch.no_grad()
def run_layer(layer: nn.Module, name: str, x: Tensor) -> Any:
    """Output of one layer; DonorError where it does not take what comes before it."""
    try:
        return layer(x)
    # A foreign network may raise anything.
    except Exception as error:
        raise DonorError(
            f"layer {name} does not take an input of {tuple(x.shape)} ({reason(error)}); "
            "use the size that the donor was made for, or a larger one"
        ) from error


POOLINGS = ("mean", "std", "max")

_ASSUMED_NORMALIZATION = (
    "The donor does not say how it wants its images; ImageNet's mean and standard deviation are "
    "assumed."
)
_VARIANCE_FLOOR = 1e-5  # keeps the gradient of a square root finite where a map is constant


class Donor(nn.Module):
    """A chain of layers, in eval mode; `open_donor` makes one.

    Attributes:
        name: for reports. size: pixels of a side.
        normalization: of the images; `forward` applies it.
        layers: layer 0 takes the normalized image, every other the output of the one before.
        shapes: of every layer's output for one image, (channels, height, width) or (tokens,
            channels).
        folded: batch normalization is folded into the convolutions.
        notes: sentences for the report.
    """

    def __init__(self, chain: Chain, size: int):
        super().__init__()
        self.name, self.size = chain.name, size
        self.layers = nn.ModuleList(chain.layers).float()
        self.layer_names, self.folded = chain.layer_names, chain.folded
        self.normalization = chain.normalization or IMAGENET
        self.notes = () if chain.normalization else (_ASSUMED_NORMALIZATION,)
        self.eval()
        self._check_values()
        self.shapes = self._checked_shapes()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of all layers for images (n, 3, size, size), float, RGB 0..255."""
        outputs = []
        x = self.normalization.apply(x)
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def with_layers(self, layers: Sequence[nn.Module]) -> "Donor":
        """The donor that consists of these modules, in place of as many of its first layers."""
        names = self.layer_names[: len(layers)]
        chain = Chain(self.name, self.normalization, tuple(layers), names, self.folded)
        return Donor(chain, self.size)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every layer's output: the width of `pool(output)`."""
        return tuple(shape[0] if len(shape) == 3 else shape[-1] for shape in self.shapes)

    @property
    def digest(self) -> str:
        """BLAKE3 over names and values of all parameters and buffers, as they are now.

        Size and normalization are not part of it.
        """
        digest = blake3()
        for name, tensor in joined(self.layers.named_parameters(), self.layers.named_buffers()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def _check_values(self) -> None:
        for name, value in self.layers.state_dict().items():
            if not value.isfinite().all():
                layer = self.layer_names[int(name.partition(".")[0])]
                raise DonorError(
                    f"layer {layer} of {self.name} holds NaN or infinity; a donor needs weights "
                    "that are numbers: fetch or train it again"
                )

    def _checked_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Run one black image, and check that the layers are a chain of maps."""
        x = self.normalization.apply(torch.zeros(1, 3, self.size, self.size))
        outputs: list[tuple[Tensor, int]] = []
        for layer, name in zip(self.layers, self.layer_names, strict=True):
            x = run_layer(layer, name, x)
            if not isinstance(x, Tensor) or x.ndim not in (3, 4) or 0 in x.shape:
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise DonorError(
                    f"layer {name} of {self.name} gives {shape}; expected one map (n, C, H, W) or "
                    f"tokens (n, T, C). Cut the donor before it, or use more than {self.size} "
                    "pixels of a side"
                )
            outputs.append((x, x._version))
        for (output, version), name in zip(outputs, self.layer_names, strict=True):
            if output._version != version:
                raise DonorError(
                    f"the output of layer {name} of {self.name} is overwritten by the layer behind "
                    "it; use operations that are not in-place there"
                )
        return tuple(tuple(output.shape[1:]) for output, _ in outputs)


def pool(output: Tensor, poolings: Sequence[str] = ("mean",)) -> Tensor:
    """Statistics of every channel over the map or over the tokens: the features of one layer.

        mean = Σ x / N,   std = √(Σ (x − mean)² / N + 1e-5),   max = max x

    Args:
        output: of a layer, (n, C, H, W), or (n, T, C) for tokens.
        poolings: "mean" (global average pooling, as in the paper), "std", "max".
    Returns: (n, C · len(poolings)): all channels of the first pooling, then of the second.
    Raises: ConfigError for no pooling, or one of another name.
    """
    if not poolings or not set(poolings) <= set(POOLINGS):
        raise ConfigError(f"poolings are some of {', '.join(POOLINGS)}; found {list(poolings)}")
    over = (2, 3) if output.ndim == 4 else (1,)
    if "std" in poolings and output.requires_grad:
        trained = dict(zip(("mean", "std"), _MeanAndStd.apply(output, over), strict=True))  # type: ignore[no-untyped-call]
    else:
        trained = {}
    statistics = [
        trained[pooling] if pooling in trained else _statistic(output, pooling, over)
        for pooling in poolings
    ]
    return torch.cat(statistics, dim=1)


def _statistic(output: Tensor, pooling: str, over: tuple[int, ...]) -> Tensor:
    if pooling == "max":
        return output.amax(over)
    if pooling == "mean":
        return output.mean(over)
    centred = output - output.mean(over, keepdim=True)
    return (centred.square().mean(over) + _VARIANCE_FLOOR).sqrt()


class _MeanAndStd(torch.autograd.Function):
    """Mean and standard deviation, with one pass over the map for each direction.

    Large maps take longer to read than to convolve, and plain operations read them eleven times.

        ∂L/∂x = (∂L/∂mean + ∂L/∂std (x − mean) / std) / N
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        std = (var + _VARIANCE_FLOOR).sqrt()
        ctx.save_for_backward(x, mean, std)
        return mean.squeeze(over), std.squeeze(over)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, mean, std = ctx.saved_tensors
        of_mean, of_std = (gradient.view_as(mean) for gradient in gradients)
        count = x.numel() // mean.numel()
        slope = of_std / (std * count)
        return (x * slope).add_(of_mean / count - slope * mean), None
