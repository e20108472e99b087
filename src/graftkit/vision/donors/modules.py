"""Any torch module as a chain of layers: an nn.Sequential, or whatever torch.fx can cut."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graftkit.errors import DonorError
from graftkit.vision.donors.chain import Chain, Normalization, normalization_of, run_layer
from graftkit.vision.donors.traced import traced_pieces

LARGEST_STEP = 3
"""Pixels of a side that a convolution with a stride may still make one of."""


class Piece(NamedTuple):
    """A part of a network that comes before or behind a cut."""

    name: str
    module: nn.Module
    reshapes: bool = False
    """The output has another shape than the input."""

    @property
    def weighs(self) -> bool:
        """It has a weight matrix or kernel; normalization and PReLU have vectors only."""
        return any(parameter.ndim > 1 for parameter in self.module.parameters())


def module_chain(module: nn.Module, size: int) -> Chain:
    """Cut a copy of `module` wherever a single map, or a single set of tokens, passes on.

    What has no weight matrix joins a layer that has: activation, normalization and dropout the one
    before; pooling, padding and whatever else changes the shape the one behind. The classifier,
    from the global pooling or the flattening on, is left out.

    Raises: DonorError when there are fewer than two layers, the module cannot be traced, or it
    does not take images of this size.
    """
    copied = copy.deepcopy(module).cpu().float().eval()
    for part in copied.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # type: ignore[assignment]  # the layer before keeps its output
    image = torch.zeros(1, 3, size, size)
    if _is_sequential(copied):
        pieces = _units(copied)
    else:
        pieces = [Piece(name, part) for name, part in traced_pieces(copied, image)]
    layers = _joined(_trunk(pieces, image))
    kind = type(module).__name__
    if len(layers) < 2:
        raise DonorError(
            f"{kind} has {len(layers)} layers to cut between, expected 2 or more; what it does "
            "must be a chain, such as an nn.Sequential of its stages without the classifier"
        )
    names = _unique([_name(pieces) for pieces in layers])
    return Chain(kind, _normalization(module), tuple(map(_module, layers)), names)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _units(module: nn.Module, prefix: str = "") -> list[Piece]:
    """Children of nested Sequentials, in order."""
    units: list[Piece] = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        units += _units(child, f"{path}.") if _is_sequential(child) else [Piece(path, child)]
    return units


def _trunk(pieces: list[Piece], image: Tensor) -> list[Piece]:
    """The pieces before the classifier: it begins where a map becomes one value."""
    trunk = []
    x = image
    for piece in pieces:
        output = run_layer(piece.module, piece.name, x)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            break
        to_one_value = output.shape[2:] == (1, 1) and x.shape[2:] != (1, 1)
        # Weights that do so are a dense layer over the whole map, or a last step of a tiny one.
        if to_one_value and (not piece.weighs or max(x.shape[2:]) > LARGEST_STEP):
            break
        trunk.append(piece._replace(reshapes=output.shape[1:] != x.shape[1:]))
        x = output
    return trunk


def _joined(pieces: list[Piece]) -> list[list[Piece]]:
    """Layers: pieces with weights, each with those that belong to it."""
    layers: list[list[Piece]] = []
    complete = True  # the last layer has weights, so that another may begin
    for piece in pieces:
        if complete and (piece.weighs or piece.reshapes or not layers):
            layers.append([])
            complete = False
        layers[-1].append(piece)
        complete = complete or piece.weighs
    return layers if complete else layers[:-1]  # pooling or padding that no layer reads


def _name(pieces: list[Piece]) -> str:
    return next(piece.name for piece in pieces if piece.weighs)


def _module(pieces: list[Piece]) -> nn.Module:
    return nn.Sequential(*(p.module for p in pieces)) if len(pieces) > 1 else pieces[0].module


def _unique(names: list[str]) -> tuple[str, ...]:
    """A transformer block that is cut between attention and MLP gives two layers of one name."""
    return tuple(
        f"{name}#{names[:index].count(name) + 1}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    )


def _normalization(module: nn.Module) -> Normalization | None:
    """What timm writes on its models: mean and std of RGB values of 0..1."""
    settings = getattr(module, "pretrained_cfg", None)
    return normalization_of(settings, "mean", "std", 1 / 255) if settings else None
