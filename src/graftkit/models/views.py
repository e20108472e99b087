"""Where every tensor of a checkpoint lies in the parameters of the live model.

Names and layouts on disk differ from those in memory: a Mixtral checkpoint holds one tensor per
expert, the live model one stack. transformers can turn its parameters back into what it would
save. Here that reversal runs on tensors without values, and every copy on the way is replaced by
an alias, so that each result still says where in which parameter it lies.

Tensors are also found under the names that another class of the same model gives them (the
backbone alone, or with another head). With the views a trained model is written back in the names
and layouts of the checkpoint that it was loaded from.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto import modeling_auto

from graftkit.checkpoint import DTYPES, FLOAT_DTYPES, Checkpoint, write_checkpoint
from graftkit.errors import CheckpointError
from graftkit.files import WorkFolder, writing
from graftkit.model_files import files_beside_weights
from graftkit.models.loading import ConfigKey, silence_transformers


def backbone_name(model: PreTrainedModel, live: str) -> str:
    """A live name as the backbone has it: `layers.0...` in LlamaModel and in LlamaForCausalLM."""
    return live.removeprefix(f"{model.base_model_prefix}.")


def owned_by_sibling(model: PreTrainedModel, name: str) -> bool:
    """Whether some class of this model's configuration has checkpoint tensor `name`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    renamed, _ = rename_source_key(name, renamings, [])
    owned = _names_of_all_classes(ConfigKey(model.config))
    return any(backbone_name(model, candidate) in owned for candidate in (name, renamed))


@lru_cache(maxsize=8)
def _names_of_all_classes(key: ConfigKey) -> frozenset[str]:
    """Names of all parameters of all classes, as the backbone has them."""
    names: set[str] = set()
    for model_class in _classes(str(key.config.model_type)):
        model = _without_weights(model_class, key.config)
        if model is not None:
            names |= {backbone_name(model, live) for live in model.state_dict()}
    return frozenset(names)


def _classes(model_type: str) -> list[type[PreTrainedModel]]:
    """What the Auto classes of transformers know of a model type."""
    listed: set[str] = set()
    for mapping, names in vars(modeling_auto).items():
        if mapping.endswith("_MAPPING_NAMES") and model_type in names:
            entry = names[model_type]
            listed |= {entry} if isinstance(entry, str) else set(entry)
    classes = [getattr(transformers, name, None) for name in sorted(listed)]
    return [cls for cls in classes if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]


def _without_weights(model_class: Any, config: PretrainedConfig) -> PreTrainedModel | None:
    """A model on the meta device; None where this class refuses the configuration."""
    try:
        with silence_transformers(), torch.device("meta"):
            model: PreTrainedModel = model_class(copy.deepcopy(config))
    except Exception:  # whatever a constructor raises: such a class owns nothing here
        return None
    return model


@dataclass(frozen=True)
class TensorView:
    """One checkpoint tensor inside one live parameter.

    Attributes:
        name: tensor name in the checkpoint.
        parameter: live parameter or persistent buffer that holds it.
        owners: every live name of that very parameter, `parameter` included; more than one where
            weights are tied.
        shape: shape in the checkpoint.
        stride, offset: its place in the parameter's storage, in weights.
        whole: the view is the parameter itself, same shape and layout.
    """

    name: str
    parameter: str
    owners: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool

    @property
    def modules(self) -> tuple[str, ...]:
        """Live modules that own the parameter; "" is the model itself."""
        return tuple(owner.rpartition(".")[0] for owner in self.owners)

    def tensor(self, parameter: Tensor) -> Tensor:
        """The view of `parameter`, or of any tensor of its shape: writing to it writes through.

        Raises: CheckpointError when the tensor is not contiguous.
        """
        if self.whole:
            return parameter.detach()
        if not parameter.is_contiguous():
            raise CheckpointError(
                f"{self.parameter} is not contiguous in memory, so {self.name} has no view in it; "
                "call .contiguous() on the parameter first"
            )
        start = parameter.storage_offset() + self.offset
        return parameter.detach().as_strided(self.shape, self.stride, start)


def checkpoint_views(model: PreTrainedModel) -> dict[str, TensorView]:
    """A view for every tensor this model would save, tied aliases and persistent buffers included.

    Works on a model without weights too. A tensor on disk that is put together from several live
    parameters has no view and is left out.

    Raises: CheckpointError when transformers cannot revert the model's layout (quantized weights).
    """
    state = model.state_dict(keep_vars=True)
    blanks = {name: _blank(value, "meta") for name, value in state.items()}
    try:
        with torch.no_grad(), _KeepViews():  # type: ignore[no-untyped-call]
            reverted = revert_weight_conversion(model, blanks)
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"{type(model).__name__}: transformers cannot give its weights in the layout of the "
            f"checkpoint ({str(error).splitlines()[0]}); load the model unquantized"
        ) from error
    by_storage = {_storage(blank): name for name, blank in blanks.items()}
    places = {
        name: (by_storage[_storage(tensor)], tensor)
        for name, tensor in reverted.items()
        if _storage(tensor) in by_storage
    }
    lost = reverted.keys() - places.keys()
    if lost:
        placed = {parameter for parameter, _ in places.values()}
        places |= _trace_indices(model, state, state.keys() - placed, lost)
    owners = _owners(state)
    return {
        name: _view(name, parameter, owners[parameter], tensor, state[parameter].shape)
        for name, (parameter, tensor) in places.items()
    }


def find_view(
    model: PreTrainedModel, views: Mapping[str, TensorView], name: str
) -> TensorView | None:
    """The view of one checkpoint tensor. See `find_views`."""
    return find_views(model, views, [name])[name]


def find_views(
    model: PreTrainedModel, views: Mapping[str, TensorView], names: Sequence[str]
) -> dict[str, TensorView | None]:
    """The views of checkpoint tensors, also of those that another class or version saved.

    GPT2Model saves `h.0...`, GPT2LMHeadModel `transformer.h.0...`; both load into the other. Old
    names (`gamma` for `weight`) are known as well, and names of the live model (experts stacked
    in one tensor). None for a tensor that the model does not have.
    """
    prefix = f"{model.base_model_prefix}."

    def saved(name: str) -> TensorView | None:
        candidates = (name, prefix + name, name.removeprefix(prefix))
        return next((views[other] for other in candidates if other in views), None)

    by_name = {name: saved(name) for name in names}
    unknown = [name for name, view in by_name.items() if view is None]
    if unknown:
        state = model.state_dict(keep_vars=True)
        owners = _owners(state)
        for name, (live, converted) in _resolve(model, state, unknown).items():
            if live is not None and not converted:
                whole = _blank(state[live], "meta")
                by_name[name] = _view(name, live, owners[live], whole, whole.shape)
    return by_name


def live_name(model: PreTrainedModel, name: str) -> str | None:
    """The live parameter into which checkpoint tensor `name` is loaded, or None."""
    return live_names(model, [name])[name]


def live_names(model: PreTrainedModel, names: list[str]) -> dict[str, str | None]:
    """`live_name` of many tensors at once."""
    state = model.state_dict(keep_vars=True)
    return {name: live for name, (live, _) in _resolve(model, state, names).items()}


def converted_names(model: PreTrainedModel, names: list[str]) -> set[str]:
    """The tensors that transformers does not load as they are: split, joined or permuted."""
    state = model.state_dict(keep_vars=True)
    resolved = _resolve(model, state, names)
    return {name for name, (_, is_converted) in resolved.items() if is_converted}


def _resolve(
    model: PreTrainedModel, state: dict[str, Tensor], names: list[str]
) -> dict[str, tuple[str | None, bool]]:
    """The live parameter of every tensor, and whether transformers converts it on the way."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def resolve(name: str) -> tuple[str | None, bool]:
        for rules in ((renamings, converters), ([], [])):
            renamed, converter = rename_source_key(name, *rules, prefix, state)
            if renamed in state:
                return renamed, converter is not None
        return None, False

    return {name: resolve(name) for name in names}


def is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether tensor `name`, which no module owns, is a buffer or layer that the class left out."""
    patterns = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
        r"\.(attn|attention)\.(masked_)?bias$",  # causal masks of GPT-2 and its relatives
    }
    return any(re.search(pattern, name) for pattern in patterns)


def is_unused(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers leaves tensor `name` alone when it loads a model of this class.

    Such are buffers of old checkpoints, and what other classes of the same model have: the file of
    bert-base-uncased holds a head and a pooler that BertForMaskedLM has not.
    """
    return is_ignored(model, name) or owned_by_sibling(model, name)


class _KeepViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces copies by aliases, so that slices and transposes stay views of their source.

    Where an alias cannot be reshaped as the copy could, the copy is made after all: the result
    then belongs to no parameter, and `checkpoint_views` traces it by its indices.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.clone.default and args[0].device.type == "meta":
            return torch.ops.aten.alias.default(args[0])
        try:
            return func(*args, **kwargs)
        except (RuntimeError, ValueError):
            first, *rest = args
            copy = torch.empty_like(first, memory_format=torch.contiguous_format)
            return func(copy, *rest, **kwargs)


def _trace_indices(
    model: PreTrainedModel, state: Mapping[str, Tensor], parameters: set[str], names: set[str]
) -> dict[str, tuple[str, Tensor]]:
    """Places of the tensors that aliasing lost, found by reverting the index of every weight.

    Each parameter takes its own range of integers. The reverted tensor names, weight by weight,
    where it came from; it has a view when these places are one range with constant strides.
    """
    starts: dict[str, int] = {}
    index: dict[str, Tensor] = {}
    total = 0
    for name, value in state.items():
        if name in parameters:
            starts[name] = total
            index[name] = torch.arange(total, total + value.numel()).view(value.shape)
            total += value.numel()
        else:
            index[name] = _blank(value, "meta")
    with torch.no_grad():
        reverted = revert_weight_conversion(model, index)
    places = {}
    for name in names:
        index_of = reverted[name]
        if index_of.is_meta or index_of.dtype != torch.int64 or not index_of.numel():
            continue
        first = int(index_of.flatten()[0])
        parameter = max((start, owner) for owner, start in starts.items() if start <= first)[1]
        view = _affine(index_of - starts[parameter], _blank(state[parameter], "meta"))
        if view is not None:
            places[name] = (parameter, view)
    return places


def _affine(index: Tensor, blank: Tensor) -> Tensor | None:
    """The view of `blank` that picks `index` (places in its storage), if strides can say it."""
    offset = int(index.flatten()[0])
    strides = [
        int(index.select(dim, 1).flatten()[0]) - offset if extent > 1 else 1
        for dim, extent in enumerate(index.shape)
    ]
    expected = torch.full_like(index, offset)
    for dim, (extent, stride) in enumerate(zip(index.shape, strides, strict=True)):
        steps = torch.arange(extent) * stride
        expected += steps.view([-1 if other == dim else 1 for other in range(index.dim())])
    inside = int(index.min()) >= 0 and int(index.max()) < blank.numel()
    if not inside or min(strides, default=1) < 0 or not torch.equal(expected, index):
        return None
    return blank.as_strided(index.shape, strides, offset)


def _view(
    name: str, parameter: str, owners: tuple[str, ...], place: Tensor, whole: torch.Size
) -> TensorView:
    is_whole = place.shape == whole and place.is_contiguous()
    shape, stride = tuple(place.shape), place.stride()
    return TensorView(name, parameter, owners, shape, stride, int(place.storage_offset()), is_whole)


def _owners(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Live name -> every live name of the same parameter, in the model's order."""
    shared: dict[int, list[str]] = {}
    for name, value in state.items():
        shared.setdefault(id(value), []).append(name)
    return {name: tuple(shared[id(value)]) for name, value in state.items()}


def _blank(value: Tensor, device: str) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=device)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class CheckpointWriter:
    """Writes weights of a model with the names, layouts, dtypes and side files of `origin`.

    Args:
        model: loaded from `origin`; only its names and shapes are looked at, so that it may be
            sharded or wrapped afterwards.
    """

    def __init__(self, model: Any, origin: Checkpoint):
        self.model, self.origin = model, origin
        self.views = find_views(model, checkpoint_views(model), list(origin.tensors))

    def write(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write a folder; it appears whole or not at all, and takes the place of an older one.

        Args:
            state: parameters and buffers by the model's own names, whole.
        Raises: CheckpointError where a tensor on disk is put together from several; OutputError.
        """
        work = WorkFolder(folder.with_name(f"{folder.name}.writing"))
        names = sorted(self.origin.tensors)
        called = self.origin.name
        note = f"Trained by graftkit from {called}. What follows is the card of {called}."
        files = files_beside_weights(self.origin.path, {}, note)
        work.open_empty()
        result = work.path / "result"
        try:
            with writing(folder):
                write_checkpoint(result, names, lambda n: self._tensor(n, state), files, _nothing)
                if folder.exists():  # at no time half of it is there
                    os.replace(folder, work.path / "replaced")
                os.replace(result, folder)
        finally:
            work.remove()

    def _tensor(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        view = self.views[name]
        dtype = self.origin.tensors[name].dtype
        if view is None:
            if not is_unused(self.model, name):
                raise CheckpointError(
                    f"{self.origin.path}: {name} is no part of one parameter of "
                    f"{type(self.model).__name__}, so what it learned cannot be written; save the "
                    "model with a current transformers first"
                )
            return self.origin.read(name)
        tensor = view.tensor(state[view.parameter]).cpu()
        return tensor.to(DTYPES[dtype]) if dtype in FLOAT_DTYPES else self.origin.read(name)


def _nothing(done: int) -> None:
    pass
