"""Cut a traced module: at every value that alone carries the image on to what follows.

In the graph of the data flow these are the articulation points between image and output.
"""

import inspect
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftkit.errors import DonorError
from graftkit.vision.donors.chain import reason


def traced_pieces(module: nn.Module, image: Tensor) -> list[tuple[str, nn.Module]]:
    """Names and modules between the cuts, in order; run one after the other they are `module`.

    What follows the last cut is left out.

    Args:
        image: one image (1, 3, size, size) to run, so that cuts are at tensors.
    Raises: DonorError when the module cannot be traced, or does not take the image.
    """
    traced = _trace(module)
    nodes = list(traced.graph.nodes)
    carriers = _carriers(nodes)
    tensors = _tensors(traced, image)
    cuts = [index for index in _sole_carriers(nodes, carriers) if nodes[index] in tensors]
    pieces = []
    start = next(index for index, node in enumerate(nodes) if node.op == "placeholder")
    for cut in cuts:
        between = [node for node in nodes[start + 1 : cut + 1] if node in carriers]
        pieces.append((_name(between), _module(traced, nodes[start], between)))
        start = cut
    return pieces


class _Tracer(fx.Tracer):
    """Takes a part that cannot be traced as one piece, such as one that asks for its map's size."""

    def __init__(self, opaque: dict[nn.Module, bool]):
        super().__init__()
        self.opaque = opaque  # which parts cannot be traced, as far as they were tried

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if m not in self.opaque:
            try:
                _Tracer(self.opaque).trace(m)
            # A module's own code runs with stand-ins for tensors, and that may raise anything.
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
    """Nodes whose value depends on the image; the others are constants of the network."""
    carriers = {next(node for node in nodes if node.op == "placeholder")}
    for node in nodes:
        if carriers.intersection(node.all_input_nodes):
            carriers.add(node)
    return carriers


def _sole_carriers(nodes: list[fx.Node], carriers: set[fx.Node]) -> list[int]:
    """Positions after which one value, that of the node there, is all that is still needed."""
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


class _Watch(fx.Interpreter):
    """Runs a graph and remembers which nodes gave a tensor."""

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
    watch = _Watch(traced)
    try:
        watch.run(image)
    except Exception as error:
        raise DonorError(
            f"the donor does not take an image of {tuple(image.shape)} ({reason(error)}); "
            "use the size that it was made for, or a larger one"
        ) from error
    return watch.tensors


def _name(nodes: list[fx.Node]) -> str:
    """The longest path that the modules between two cuts have in common."""
    paths = [str(node.target).split(".") for node in nodes if node.op == "call_module"]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or nodes[-1].name


def _module(traced: fx.GraphModule, start: fx.Node, nodes: list[fx.Node]) -> nn.Module:
    """What leads from the value of `start` to that of the last of `nodes`."""
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
