"""What every tensor of a checkpoint is for. The classes of the modules that own it tell."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models.loading import (
    SAVED_WRAPPED,
    empty_model,
    input_embeddings,
    output_embeddings,
    refuse_quantized,
    unwrapped_name,
)
from graftkit.models.views import checkpoint_views, converted_names, is_unused, live_names

# Class names, nearest module first; attention before mlp, for BertSelfOutput is both.
_NORM = re.compile(r"Norm")
_ATTENTION = re.compile(r"Attention|Attn")
_ROUTER = re.compile(r"Router|TopKGate|MoEGate|MoeGate")
_EXPERTS = re.compile(r"Experts|ModuleList")
_MOE = re.compile(r"Moe|MoE|MOE|Sparse")
_MLP = re.compile(r"M[Ll][Pp]|Experts|Mo[eE]|MOE|Intermediate|Output$|FeedForward|FFN|DenseAct")


class ModuleKind(StrEnum):
    """What a tensor does in its model."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    MLP = "mlp"
    ROUTER = "router"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"


@dataclass(frozen=True)
class TensorRole:
    """One tensor of a checkpoint and its place in the live model.

    Attributes:
        name: tensor name in the checkpoint on disk.
        kind: what it does.
        module: live module that owns the parameter; "" for a tensor the model does not use, such
            as the attention masks in old GPT-2 files.
        parameter: live parameter that holds it, alone or stacked with others; "" as above.
        transposed: stored (in, out): Conv1D, and expert stacks (experts, in, out).
        linear: the weight of one nn.Linear or Conv1D, whole: forward hooks on `module` see its
            inputs.
    """

    name: str
    kind: ModuleKind
    module: str
    parameter: str
    transposed: bool
    linear: bool


def tensor_roles(
    checkpoint: Checkpoint, names: Sequence[str] | None = None
) -> dict[str, TensorRole]:
    """The role of every tensor on disk, or of `names`, in the checkpoint's order; reads no weights.

    Raises: CheckpointError naming the first tensor that no module of the architecture owns, or
        whose shape differs from what config.json announces; for a quantized checkpoint.
    """
    refuse_quantized(checkpoint)
    model = empty_model(checkpoint)
    state = model.state_dict(keep_vars=True)
    roles = {}
    chosen = list(checkpoint.tensors) if names is None else list(names)
    for name, parameter in live_names(model, chosen).items():
        if parameter is not None:
            roles[name] = _role(model, name, parameter, state[parameter])
        elif is_unused(model, name):
            roles[name] = TensorRole(name, ModuleKind.OTHER, "", "", False, False)
        else:
            raise CheckpointError(_unowned(checkpoint, model, name))
    # Forward hooks do not see what a tensor in another layout on disk would be multiplied with.
    for name in converted_names(model, chosen) & roles.keys():
        roles[name] = replace(roles[name], linear=False)
    for name, role in roles.items():
        expected = tuple(state[role.parameter].shape) if role.linear else ()
        if role.linear and checkpoint.tensors[name].shape != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {list(checkpoint.tensors[name].shape)} on disk, but "
                f"config.json makes it {list(expected)}; correct config.json"
            )
    return roles


def _unowned(checkpoint: Checkpoint, model: PreTrainedModel, name: str) -> str:
    """What to do about a tensor that no module owns."""
    plain = unwrapped_name(name)
    if plain != name:
        return f"{checkpoint.path}: tensor {name} {SAVED_WRAPPED}"
    return (
        f"{checkpoint.path}: no module of {type(model).__name__} owns tensor {name}; "
        "correct architectures in config.json, or remove the tensor"
    )


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Alias -> owner for tensors that share one parameter, in the checkpoint's names.

    Such as {"lm_head.weight": "model.embed_tokens.weight"}; empty unless the config ties.
    Raises: CheckpointError when the architecture is unknown.
    """
    model = empty_model(checkpoint)
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    saved_as = {view.parameter: name for name, view in checkpoint_views(model).items()}
    on_disk = live_names(model, list(checkpoint.tensors))
    saved_as |= {live: name for name, live in on_disk.items() if live is not None}
    return {
        saved_as[alias]: saved_as[owner]
        for alias, owner in tied.items()
        if alias in saved_as and owner in saved_as
    }


def _role(model: PreTrainedModel, name: str, parameter: str, value: Tensor) -> TensorRole:
    path, _, attribute = parameter.rpartition(".")
    module = model.get_submodule(path)
    conv = isinstance(module, Conv1D)
    linear = attribute == "weight" and (
        conv or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)
    )
    stacked = value.dim() == 3 and bool(getattr(module, "is_transposed", False))
    kind = _kind(model, path, module, attribute, value.dim())
    return TensorRole(name, kind, path, parameter, (conv and linear) or stacked, linear)


def _kind(
    model: PreTrainedModel, path: str, module: nn.Module, attribute: str, dims: int
) -> ModuleKind:
    if _NORM.search(type(module).__name__):
        return ModuleKind.NORM
    # A stack of experts keeps one bias per expert, so that biases can have two dimensions.
    if dims <= 1 or attribute.endswith("bias"):
        return ModuleKind.BIAS
    if module is input_embeddings(model) or isinstance(module, nn.Embedding):
        return ModuleKind.EMBEDDING
    if module is output_embeddings(model):
        return ModuleKind.HEAD
    ancestors = list(_ancestors(model, path))
    if _is_router(module, ancestors):
        return ModuleKind.ROUTER
    names = [type(ancestor).__name__ for ancestor in (module, *ancestors[:-1])]
    if any(_ATTENTION.search(name) for name in names):
        return ModuleKind.ATTENTION
    if any(_MLP.search(name) for name in names):
        return ModuleKind.MLP
    # A linear layer of the model itself is what it answers with: a classifier's score.
    if isinstance(module, nn.Linear) and len(ancestors) == 1:
        return ModuleKind.HEAD
    return ModuleKind.OTHER


def _is_router(module: nn.Module, ancestors: list[nn.Module]) -> bool:
    """A router class, or a linear layer right beside the experts of a MoE block."""
    if _ROUTER.search(type(module).__name__):
        return True
    if not ancestors:
        return False
    block = ancestors[0]
    beside = any(_EXPERTS.search(type(child).__name__) for child in block.children())
    return isinstance(module, nn.Linear) and beside and bool(_MOE.search(type(block).__name__))


def _ancestors(model: PreTrainedModel, path: str) -> Iterator[nn.Module]:
    """Modules above `path`, nearest first; the last one is the model."""
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)
