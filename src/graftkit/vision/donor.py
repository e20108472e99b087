"""Donor: a pretrained network as a chain of layers, whose outputs a rootstock can read.

Knowledge Grafting (arXiv 2507.19261) takes feature maps from inside a large network. So a donor
is neither a classifier nor an architecture here: it is a list of layers that can be cut anywhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain as joined
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from graftkit.errors import ConfigError, DonorError
from graftkit.vision.donors import mobilenet_npz, modules, vgg
from graftkit.vision.donors.chain import IMAGENET, Chain, Normalization, run_layer

__all__ = ["POOLINGS", "Donor", "Normalization", "open_donor", "pool"]

POOLINGS = ("mean", "std", "max")

_ASSUMED_NORMALIZATION = (
    "The donor does not say how it wants its images; ImageNet's mean and standard deviation are "
    "assumed."
)
_VARIANCE_FLOOR = 1e-5  # keeps the gradient of a square root finite where a map is constant


class Donor(nn.Module):
    """A chain of layers, in eval mode. Made by `open_donor`.

    name: for reports. size: pixels of a side. normalization: of the images; `forward` applies it.
    layers: layer 0 takes the normalized image, every other the output of the one before.
    shapes: of every layer's output for one image, (channels, height, width) or (tokens, channels).
    folded: batch normalization is folded into the convolutions. notes: sentences for the report.
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
        """The same donor with other modules in the place of its first layers, and none behind."""
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

        Size and normalization are not in it: two donors of one digest may see images differently.
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
        """Run one black image, and see that the layers are a chain of maps."""
        x = self.normalization.apply(torch.zeros(1, 3, self.size, self.size))
        outputs: list[tuple[Tensor, int]] = []
        for layer, name in zip(self.layers, self.layer_names, strict=True):
            x = run_layer(layer, name, x)
            if not isinstance(x, Tensor) or x.ndim not in (3, 4) or 0 in x.shape:
                found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise DonorError(
                    f"layer {name} of {self.name} gives {found}; expected one map (n, C, H, W) or "
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


def open_donor(
    reference: str | Path | nn.Module,
    size: int,
    pretrained: bool = True,
    normalization: Normalization | None = None,
) -> Donor:
    """Open a network as a chain of layers.

    Args:
        reference: an .npz file of MobileNetV2; a directory or Hub id[@revision] of a ResNet,
            MobileNetV2, ConvNeXt or ViT; `timm:NAME`; `vgg16`; or any torch module, which is
            copied. Code that a model brings along is never run.
        size: pixels of a side that the donor will be used at.
        pretrained: False takes the architecture only, with random values. A torch module is taken
            as it is either way.
        normalization: of the images, where the donor does not say it or says it wrongly.
    Raises: DonorError when the donor cannot be read, cannot be cut, or does not take this size;
        ConfigError for a size below one pixel, or for `timm:` without timm.
    """
    if size < 1:
        raise ConfigError(f"a donor needs images of at least one pixel a side, found {size}")
    chain = _read_chain(reference, size, pretrained)
    if normalization is not None:
        chain = replace(chain, normalization=normalization)
    return Donor(chain, size)


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
        found = dict(zip(("mean", "std"), _MeanAndStd.apply(output, over), strict=True))  # type: ignore[no-untyped-call]
    else:
        found = {}
    statistics = [
        found[pooling] if pooling in found else _statistic(output, pooling, over)
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
    """Both statistics and their gradient in one pass each: large maps cost more to read than to
    convolve, and plain operations read them eleven times.

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


def _read_chain(reference: str | Path | nn.Module, size: int, pretrained: bool) -> Chain:
    if isinstance(reference, nn.Module) and not hasattr(reference, "base_model_prefix"):
        return modules.module_chain(reference, size)
    if str(reference) == "vgg16":
        return vgg.vgg16_chain(pretrained)
    if str(reference).endswith(".npz"):
        return mobilenet_npz.read_chain(Path(str(reference)), size, pretrained)
    from graftkit.vision.donors import hub  # transformers takes seconds to import

    if isinstance(reference, nn.Module):
        return hub.model_chain(reference, size)
    if str(reference).startswith("timm:"):
        return hub.timm_chain(str(reference).removeprefix("timm:"), size, pretrained)
    return hub.hub_chain(str(reference), size, pretrained)
