"""Donors by origin: each module turns one kind of network into a chain of layers.

architectures   MobileNetV2 from an .npz file, its batch normalization folded; VGG16
hub             ResNet, MobileNetV2, ConvNeXt and ViT of transformers; models of timm
modules         any torch module: an nn.Sequential, or whatever torch.fx can trace
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from graftkit.errors import ConfigError
from graftkit.vision.donor import Chain, Donor, Normalization
from graftkit.vision.donors import architectures


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
            copied. Code that comes with a model is never run.
        size: pixels of a side that the donor will be used at.
        pretrained: False takes the architecture only, with random values; of a torch module the
            values are taken either way.
        normalization: of the images, in place of the one that the donor states, if any.
    Raises: DonorError when the donor cannot be read, cannot be cut, or does not take this size;
        ConfigError for a size below one pixel, or for `timm:` without timm.
    """
    if size < 1:
        raise ConfigError(f"a donor needs images of at least one pixel a side, found {size}")
    chain = _read_chain(reference, size, pretrained)
    if normalization is not None:
        chain = replace(chain, normalization=normalization)
    return Donor(chain, size)


def _read_chain(reference: str | Path | nn.Module, size: int, pretrained: bool) -> Chain:
    if isinstance(reference, nn.Module) and not hasattr(reference, "base_model_prefix"):
        return architectures.module_chain(reference, size)
    if str(reference) == "vgg16":
        return architectures.vgg16_chain(pretrained)
    if str(reference).endswith(".npz"):
        return architectures.mobilenet_chain(Path(str(reference)), size, pretrained)
    from graftkit.vision.donors import hub  # transformers takes seconds to import

    if isinstance(reference, nn.Module):
        return hub.model_chain(reference, size)
    if str(reference).startswith("timm:"):
        return hub.timm_chain(str(reference).removeprefix("timm:"), size, pretrained)
    return hub.hub_chain(str(reference), size, pretrained)
