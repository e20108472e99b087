"""A tuned checkpoint, read by the names and layouts that the target's tensors have on disk.

Two folders of one model may call a tensor differently, hold another class of it (the backbone, or
another head), or keep experts one by one where the other stacks them. transformers maps both into
live parameters; so a tensor of the target is found in the tuned folder through the live parameter
that it belongs to.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from graftkit.checkpoint import DTYPE_NAMES, DTYPES, FLOAT_DTYPES, Checkpoint, TensorInfo
from graftkit.errors import CheckpointError, CheckpointMismatchError
from graftkit.models.loading import empty_model, refuse_quantized, unwrapped_name
from graftkit.models.views import (
    TensorView,
    backbone_name,
    checkpoint_views,
    find_views,
    is_unused,
    live_names,
)


class AlignedCheckpoint(Checkpoint):
    """A tuned checkpoint by the target's tensor names.

    Attributes:
        new: names of tensors for which only the tuned model's class has a place, such as a head.
    """

    def __init__(self, tuned: Checkpoint, sources: Mapping[str, "_Source"], new: Iterable[str]):
        tensors = {name: sources[name].info(name) for name in sorted(sources)}
        super().__init__(tuned.path, tuned.name, tuned.revision, tensors)
        self.new = frozenset(new)
        self._sources = sources

    def read(self, name: str) -> Tensor:
        """One tensor in the layout that the target has on disk."""
        return self._sources[name].read()


def align(target: Checkpoint, tuned: Checkpoint) -> AlignedCheckpoint:
    """The tuned checkpoint by the target's tensor names.

    A tensor that transformers ignores, and one for which only the target's class has a place (a
    head), is the target's own unless the tuned folder has it too. Tensors for which only the tuned
    model's class has a place keep their names. What the tuned model lacks although its class has a
    place for it is absent.

    Raises: CheckpointMismatchError for models of two types; CheckpointError for a quantized
        checkpoint or an unknown architecture.
    """
    if isinstance(tuned, AlignedCheckpoint):
        return tuned
    for checkpoint in (target, tuned):
        refuse_quantized(checkpoint)
        _refuse_peft(checkpoint)
    types = [checkpoint.config.get("model_type") for checkpoint in (target, tuned)]
    if types[0] != types[1]:
        raise CheckpointMismatchError(
            f"{tuned.path}: a {types[1]} model, but the target {target.path} is {types[0]}; "
            "a pack needs two states of one model"
        )
    if _alike(target, tuned):
        return AlignedCheckpoint(tuned, {name: _OnDisk(tuned, name) for name in tuned.tensors}, ())
    before, after = _Layout(target), _Layout(tuned)
    sources: dict[str, _Source] = {}
    for name in before.files:
        source = _source(name, before, after)
        if source is not None:
            sources[name] = source
    used = {own for source in sources.values() for own in source.names}
    rest = [name for name in after.files if after.files[name] not in used and after.claims(name)]
    sources |= {name: _OnDisk(tuned, after.files[name]) for name in rest if name not in sources}
    live = {name: after.live[name] for name in rest}
    new = [name for name in rest if live[name] and after.key(str(live[name])) not in before.keys]
    return AlignedCheckpoint(tuned, sources, new)


def _refuse_peft(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError for the state of a PeftModel, whose weights are not merged."""
    for name in checkpoint.tensors:
        if name.startswith("base_model.model.") or ".lora_A." in name or ".base_layer." in name:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} is of a PeftModel that was not merged; save the "
                "result of merge_and_unload, or import its adapter with graftkit import-lora"
            )


class _Layout:
    """Where the tensors of a checkpoint belong in the model of its class.

    Attributes:
        files: tensor name without wrappers -> name on disk. live: the live parameter of each, None
            where no module owns it. views: its place there, None where it is made of several.
        keys: names of all live parameters, as the backbone has them.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.model = checkpoint, empty_model(checkpoint)
        names = list(checkpoint.tensors)
        owned = live_names(self.model, names)
        wrapped = {unwrapped_name(name): name for name in names if owned[name] is None}
        self.files = wrapped | {name: name for name in names if owned[name] is not None}
        self.live = live_names(self.model, list(self.files))
        self.views = find_views(self.model, checkpoint_views(self.model), list(self.files))
        self.shapes = {
            self.key(name): tuple(value.shape) for name, value in self.model.state_dict().items()
        }
        self._pieces: dict[str, list[tuple[str, TensorView]]] = {}
        for name, view in self.views.items():
            for owner in view.owners if view is not None else ():
                first = view is not None and owner == view.parameter
                place = self._pieces.setdefault(self.key(owner), [])
                if view is not None:
                    place.insert(0 if first else len(place), (self.files[name], view))

    def key(self, live: str) -> str:
        """A live name as every class of the model has it."""
        return backbone_name(self.model, live)

    @property
    def keys(self) -> Iterable[str]:
        """Live names of all parameters and buffers, as every class has them."""
        return self.shapes.keys()

    def claims(self, name: str) -> bool:
        """Whether a tensor counts: transformers loads it, or nobody knows what it is."""
        return self.live[name] is not None or not is_unused(self.model, name)

    def pieces(self, key: str) -> list[tuple[str, TensorView]]:
        """Names on disk and places of the tensors that make up a live parameter."""
        found = self._pieces.get(key, [])
        own = [(name, view) for name, view in found if self.key(view.parameter) == key]
        return own or found


class _Source(Protocol):
    """Where a tensor is read from. names: the tensors on disk that it takes."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def info(self, name: str) -> TensorInfo:
        """What `Checkpoint.tensors` says of it."""

    def read(self) -> Tensor:
        """The tensor."""


@dataclass(frozen=True)
class _OnDisk:
    """A tensor of a checkpoint as it is."""

    checkpoint: Checkpoint
    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def info(self, name: str) -> TensorInfo:
        return replace(self.checkpoint.tensors[self.name], name=name)

    def read(self) -> Tensor:
        return self.checkpoint.read(self.name)


class _OfTarget(_OnDisk):
    """A tensor of the target that stands in for the tuned model's."""

    @property
    def names(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class _Part:
    """A part of a live parameter that one tensor on disk holds whole."""

    checkpoint: Checkpoint
    name: str
    view: TensorView

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def info(self, name: str) -> TensorInfo:
        return replace(self.checkpoint.tensors[self.name], name=name, shape=self.view.shape)

    def read(self) -> Tensor:
        """Only the rows of the first extent in which the part lies are read."""
        whole = self.checkpoint.tensors[self.name]
        row = whole.numel // whole.shape[0]
        first, last = self.view.offset // row, _end(self.view) // row
        rows = self.checkpoint.read_rows(self.name, first, last + 1)
        start = rows.storage_offset() + self.view.offset - first * row
        return rows.as_strided(self.view.shape, self.view.stride, start).clone(
            memory_format=torch.contiguous_format
        )


@dataclass(frozen=True)
class _Assembled:
    """A part of a live parameter, put together from the tensors on disk that make it up."""

    checkpoint: Checkpoint
    pieces: tuple[tuple[str, TensorView], ...]
    view: TensorView
    whole: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.pieces)

    def info(self, name: str) -> TensorInfo:
        first = self.checkpoint.tensors[self.pieces[0][0]]
        dtype = DTYPE_NAMES[self._dtype()]
        return TensorInfo(name, dtype, self.view.shape, first.file)

    def read(self) -> Tensor:
        parameter = torch.empty(self.whole, dtype=self._dtype())
        start, end = self.view.offset, _end(self.view)
        for name, view in self.pieces:
            if view.offset <= end and _end(view) >= start:
                view.tensor(parameter).copy_(self.checkpoint.read(name))
        return self.view.tensor(parameter).contiguous()

    def _dtype(self) -> torch.dtype:
        dtypes = [DTYPES[self.checkpoint.tensors[name].dtype] for name, _ in self.pieces]
        return reduce(torch.promote_types, dtypes)


def _source(name: str, before: _Layout, after: _Layout) -> "_Source | None":
    """Where the tuned model has the target's tensor `name`; None where it lacks it."""
    view, own = before.views[name], after.files.get(name)
    followed = _OfTarget(before.checkpoint, before.files[name])
    if before.live[name] is None or view is None:
        same = own is not None and _same_kind(
            before.checkpoint.tensors[before.files[name]], after.checkpoint.tensors[own]
        )
        if own is not None and (same or before.live[name] is not None):
            return _OnDisk(after.checkpoint, own)
        return followed if before.live[name] is None else None
    key = before.key(view.parameter)
    if key not in after.keys:
        return _OnDisk(after.checkpoint, own) if own is not None else followed
    pieces = after.pieces(key)
    if own is not None and any(piece == own for piece, _ in pieces):
        pieces = [piece for piece in pieces if piece[0] == own] + pieces
    for piece, place in pieces:
        if (view.whole and place.whole) or _geometry(view) == _geometry(place):
            return _OnDisk(after.checkpoint, piece)
    if before.shapes[key] != after.shapes[key] or not pieces:
        return None
    whole = next((piece for piece, place in pieces if place.whole), None)
    if whole is not None:
        return _Part(after.checkpoint, whole, view)
    covered = sum(after.checkpoint.tensors[piece].numel for piece, _ in pieces)
    if covered != math.prod(after.shapes[key]):
        return None
    return _Assembled(after.checkpoint, tuple(pieces), view, after.shapes[key])


def _alike(target: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether both files hold float tensors of the same names, shapes and class, which pair."""
    classes = [checkpoint.config.get("architectures") for checkpoint in (target, tuned)]
    if classes[0] != classes[1] or target.tensors.keys() != tuned.tensors.keys():
        return False
    return all(_same_kind(info, tuned.tensors[name]) for name, info in target.tensors.items())


def _same_kind(first: TensorInfo, second: TensorInfo) -> bool:
    floats = all(info.dtype in FLOAT_DTYPES for info in (first, second))
    return floats and first.shape == second.shape


def _geometry(view: TensorView) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return view.shape, view.stride, view.offset


def _end(view: TensorView) -> int:
    """The last place of a view in its parameter."""
    steps = zip(view.shape, view.stride, strict=True)
    return view.offset + sum((extent - 1) * stride for extent, stride in steps)
