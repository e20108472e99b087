"""Donors as chains of layers: any torch module, and two architectures that graftkit builds itself.

A torch module is an nn.Sequential or whatever torch.fx can trace. It is cut at every value on which
alone everything behind it depends: the articulation points of the data flow between image and
output.

MobileNetV2 1.0 (arXiv 1801.04381, table 2) comes from an .npz file, its batch normalization folded.
The file holds float16 arrays in torch's shapes: `f.0` is the stem, `f.1` to `f.17` are inverted
residuals, `f.18` is the last 1x1 convolution; `fc`, the classifier, is checked and left out.

VGG16 (arXiv 1409.1556, table 1, column D) is the donor of the Knowledge Grafting paper; it comes
without weights.
"""

import copy
import inspect
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from graftkit.errors import DonorError
from graftkit.vision.donor import (
    IMAGENET,
    Chain,
    Normalization,
    normalization_of,
    reason,
    run_layer,
)


def traced_segments(module: nn.Module, image: Tensor) -> list[tuple[str, nn.Module]]:
    """Names and modules between the cuts; run one after the other they compute what `module` does.

    What follows the last cut is left out.

    Args:
        image: one image (1, 3, size, size); its run shows which values are tensors.
    Raises: DonorError when the module cannot be traced, or does not take the image.
    """
    traced = _trace(module)
    nodes = list(traced.graph.nodes)
    carriers = _carriers(nodes)
    tensors = _tensors(traced, image)
    cuts = [index for index in _sole_carriers(nodes, carriers) if nodes[index] in tensors]
    segments = []
    start = next(index for index, node in enumerate(nodes) if node.op == "placeholder")
    for cut in cuts:
        between = [node for node in nodes[start + 1 : cut + 1] if node in carriers]
        segments.append((_common_path(between), _graph_between(traced, nodes[start], between)))
        start = cut
    return segments


class _Tracer(fx.Tracer):
    """Takes a part that cannot be traced as a leaf, such as one that branches on its map's size."""

    def __init__(self, opaque: dict[nn.Module, bool]):
        super().__init__()
        self.opaque = opaque  # by part that was tried: whether it cannot be traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if m not in self.opaque:
            try:
                _Tracer(self.opaque).trace(m)
            # Foreign code runs with stand-ins for tensors, and may raise anything.
            except Exception:
                self.opaque[m] = True
            else:
                self.opaque[m] = False
        return self.opaque[m]


def _trace(module: nn.Module) -> fx.GraphModule:
    _, *others = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.default is not inspect.Parameter.empty}
    try:
        try:
            graph = fx.Tracer().trace(module, concrete_args=defaults)
        except Exception:
            graph = _Tracer({}).trace(module, concrete_args=defaults)
    except Exception as error:
        raise DonorError(
            f"{type(module).__name__} cannot be traced to find where it can be cut "
            f"({reason(error)}); give an nn.Sequential of its stages instead"
        ) from error
    return fx.GraphModule(module, graph)


def _carriers(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on the image; all others are constants of the network."""
    carriers = {next(node for node in nodes if node.op == "placeholder")}
    for node in nodes:
        if carriers.intersection(node.all_input_nodes):
            carriers.add(node)
    return carriers


def _sole_carriers(nodes: list[fx.Node], carriers: set[fx.Node]) -> list[int]:
    """Positions after which the value of the node there is the only one that is still needed."""
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=0) for node in nodes}
    alive: set[fx.Node] = set()
    sole = []
    for index, node in enumerate(nodes):
        if node in carriers:
            alive = {other for other in (*alive, node) if last_use[other] > index}
            if alive == {node} and node.op != "placeholder":
                sole.append(index)
    return sole


class _TensorRecorder(fx.Interpreter):
    """Runs a graph and records which nodes compute a tensor."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.tensors: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.tensors.add(n)
        return value


@torch.no_grad()
def _tensors(traced: fx.GraphModule, image: Tensor) -> set[fx.Node]:
    recorder = _TensorRecorder(traced)
    try:
        recorder.run(image)
    except Exception as error:
        raise DonorError(
            f"the donor does not take an image of {tuple(image.shape)} ({reason(error)}); "
            "use the size that it was made for, or a larger one"
        ) from error
    return recorder.tensors


def _common_path(nodes: list[fx.Node]) -> str:
    """The longest path that the modules between two cuts have in common."""
    paths = [str(node.target).split(".") for node in nodes if node.op == "call_module"]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or nodes[-1].name


def _graph_between(traced: fx.GraphModule, start: fx.Node, nodes: list[fx.Node]) -> nn.Module:
    """The module that computes the value of the last of `nodes` from that of `start`."""
    only = nodes[0]
    if len(nodes) == 1 and only.op == "call_module" and only.args == (start,) and not only.kwargs:
        return traced.get_submodule(str(only.target))
    graph = fx.Graph()
    copied = {start: graph.placeholder("x")}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copied:  # a constant comes along where it is used
            copied[node] = graph.node_copy(node, copy_of)
        return copied[node]

    for node in nodes:
        copy_of(node)
    graph.output(copied[nodes[-1]])
    return fx.GraphModule(traced, graph)


LARGEST_STEP = 3
"""Pixels of a side that a convolution with a stride may still make one of."""


class Segment(NamedTuple):
    """A part of a network between two cuts."""

    name: str
    module: nn.Module
    reshapes: bool = False
    """The output has another shape than the input."""

    @property
    def has_kernel(self) -> bool:
        """Whether it has a weight matrix or kernel; normalization and PReLU have vectors only."""
        return any(parameter.ndim > 1 for parameter in self.module.parameters())


def module_chain(module: nn.Module, size: int) -> Chain:
    """Cut a copy of `module` wherever a single map, or a single set of tokens, is passed on.

    A segment without a weight matrix joins a layer that has one: activation, normalization and
    dropout the layer before; pooling, padding and whatever else changes the shape the layer
    behind. The classifier, from the global pooling or the flattening on, is left out.

    Raises: DonorError when there are fewer than two layers, the module cannot be traced, or it
    does not take images of this size.
    """
    copied = copy.deepcopy(module).cpu().float().eval()
    for part in copied.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # type: ignore[assignment]  # must not overwrite another output
    image = torch.zeros(1, 3, size, size)
    if _is_sequential(copied):
        segments = _units(copied)
    else:
        segments = [Segment(name, part) for name, part in traced_segments(copied, image)]
    layers = _joined(_trunk(segments, image))
    kind = type(module).__name__
    if len(layers) < 2:
        raise DonorError(
            f"{kind} has {len(layers)} layers to cut between, expected 2 or more; what it does "
            "must be a chain, such as an nn.Sequential of its stages without the classifier"
        )
    names = _unique([_layer_name(segments) for segments in layers])
    return Chain(kind, _normalization(module), tuple(map(_layer_module, layers)), names)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _units(module: nn.Module, prefix: str = "") -> list[Segment]:
    """Children of nested Sequentials, in order."""
    units: list[Segment] = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        units += _units(child, f"{path}.") if _is_sequential(child) else [Segment(path, child)]
    return units


def _trunk(segments: list[Segment], image: Tensor) -> list[Segment]:
    """The segments before the classifier: it begins where a map becomes one value."""
    trunk = []
    x = image
    for segment in segments:
        output = run_layer(segment.module, segment.name, x)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            break
        to_one_value = output.shape[2:] == (1, 1) and x.shape[2:] != (1, 1)
        # Weights that do so are a dense layer over the whole map, or a last step of a tiny one.
        if to_one_value and (not segment.has_kernel or max(x.shape[2:]) > LARGEST_STEP):
            break
        trunk.append(segment._replace(reshapes=output.shape[1:] != x.shape[1:]))
        x = output
    return trunk


def _joined(segments: list[Segment]) -> list[list[Segment]]:
    """Layers: segments with weights, each with those that belong to it."""
    layers: list[list[Segment]] = []
    complete = True  # the last layer has weights, so that another may begin
    for segment in segments:
        if complete and (segment.has_kernel or segment.reshapes or not layers):
            layers.append([])
            complete = False
        layers[-1].append(segment)
        complete = complete or segment.has_kernel
    return layers if complete else layers[:-1]  # pooling or padding that no layer reads


def _layer_name(segments: list[Segment]) -> str:
    return next(segment.name for segment in segments if segment.has_kernel)


def _layer_module(segments: list[Segment]) -> nn.Module:
    return nn.Sequential(*(p.module for p in segments)) if len(segments) > 1 else segments[0].module


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


STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, number of blocks, stride of the first one."""
STEM, LAST = 32, 1280
"""Channels of the first convolution and of the last."""
NORMALIZATION = Normalization((127.5,) * 3, (127.5,) * 3)
"""x / 127.5 − 1."""
_OUTPUTS = 1001

_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, and add the input where the shapes allow it.

    Attributes:
        body: the convolutions with their activations. skip: applied to what is added; None adds
            nothing.
    """

    def __init__(self, body: nn.Sequential, skip: nn.Module | None):
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        """Output of the block for a map (n, C, H, W)."""
        out: Tensor = self.body(x)
        return out if self.skip is None else out + self.skip(x)


def mobilenet_chain(path: Path, size: int, pretrained: bool) -> Chain:
    """The 19 layers of the file, for images of `size` pixels a side.

    Args:
        pretrained: False leaves random values.
    Raises: DonorError for a file that is missing, damaged, or not this network.
    """
    layers = _layers(size)
    parameters = dict(_named_parameters(layers))
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    classifier = {"fc.weight": (_OUTPUTS, LAST), "fc.bias": (_OUTPUTS,)}
    try:
        _check_headers(path, shapes | classifier)
        with np.load(path, allow_pickle=False) as archive:
            values = {name: archive[name] for name in shapes}
    except _UNREADABLE as error:
        raise DonorError(
            f"{path}: cannot be read as an .npz file ({reason(error)}); fetch it again"
        ) from error
    if pretrained:
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.from_numpy(values[name]))
    names = tuple(f"f.{index}" for index in range(len(layers)))
    return Chain(path.stem, NORMALIZATION, tuple(layers), names, folded=True)


def _layers(size: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Sequential(*_convolution(3, STEM, 3, 2, side=size), nn.ReLU6())]
    side, width = -(-size // 2), STEM
    for expansion, channels, blocks, first_stride in STAGES:
        for number in range(blocks):
            stride = first_stride if number == 0 else 1
            layers.append(_block(width, channels, expansion, stride, side))
            side, width = -(-side // stride), channels
    layers.append(nn.Sequential(*_convolution(width, LAST), nn.ReLU6()))
    return layers


def _block(inputs: int, outputs: int, expansion: int, stride: int, side: int) -> InvertedResidual:
    wide = inputs * expansion
    expand = [*_convolution(inputs, wide), nn.ReLU6()] if expansion > 1 else []
    depthwise = [*_convolution(wide, wide, 3, stride, wide, side), nn.ReLU6()]
    body = nn.Sequential(*expand, *depthwise, *_convolution(wide, outputs))
    return InvertedResidual(body, nn.Identity() if stride == 1 and inputs == outputs else None)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, side: int = 1
) -> list[nn.Module]:
    """A convolution padded as TensorFlow's SAME does it for a map of `side` pixels.

    An even side under stride 2 is padded on the right and at the bottom only.
    """
    lopsided = stride == 2 and side % 2 == 0
    padding = 0 if lopsided else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
    return [nn.ZeroPad2d((0, 1, 0, 1)), conv] if lopsided else [conv]


def _named_parameters(layers: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its name in the file."""
    for index, layer in enumerate(layers):
        convolutions = [part for part in layer.modules() if isinstance(part, nn.Conv2d)]
        for number, conv in enumerate(convolutions):
            unit = f"b.{number}.conv" if isinstance(layer, InvertedResidual) else "conv"
            for kind, parameter in conv.named_parameters():
                yield f"f.{index}.{unit}.{kind}", parameter


def _check_headers(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the file holds these arrays in float16, before any of their bytes is read."""
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        odd = sorted(names ^ expected.keys())
        if odd:
            state = "lacks" if odd[0] in expected else "also holds"
            raise DonorError(
                f"{path}: {state} {odd[0]} and is not the MobileNetV2 1.0 that graftkit reads; "
                f"expected {len(expected)} arrays, f.0.conv.weight to fc.bias"
            )
        for name, shape in expected.items():
            with archive.open(f"{name}.npy") as file:
                header = _header(file)
            if header != (shape, np.dtype(np.float16)):
                raise DonorError(
                    f"{path}: {name} is {header[1]} {header[0]}, expected float16 {shape}; this "
                    "is not the MobileNetV2 1.0 that graftkit reads"
                )


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of the 3x3 convolutions of each block; a max-pooling ends a block."""


def vgg16_chain(pretrained: bool) -> Chain:
    """The 13 convolution layers. A block's pooling opens the first layer of the next block.

    So the output of a layer is that of its convolution and ReLU, as the paper reads it.
    Raises: DonorError when `pretrained`: no weights come with graftkit.
    """
    if pretrained:
        raise DonorError(
            "graftkit brings no weights of VGG16; use timm:vgg16, a module of your own, or the "
            "architecture without weights (pretrained=False)"
        )
    layers: list[nn.Module] = []
    names = []
    width = 3
    for block, (channels, depth) in enumerate(BLOCKS, start=1):
        for number in range(1, depth + 1):
            opening = [nn.MaxPool2d(2)] if number == 1 and block > 1 else []
            layers.append(nn.Sequential(*opening, _vgg_convolution(width, channels), nn.ReLU()))
            names.append(f"block{block}_conv{number}")
            width = channels
    return Chain("vgg16", IMAGENET, tuple(layers), tuple(names))


def _vgg_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    # torch's default is too small for thirteen layers without normalization (arXiv 1502.01852).
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
