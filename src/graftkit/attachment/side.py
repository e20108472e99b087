"""Packs beside the model: forward hooks add each pack's deltas for the rows that use it.

The target's bytes are never touched. What a hook can add to a module's output is added; any other
module runs again, with the tuned parameter in place, on the rows that use the pack.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftkit.attachment.calls import BatchGuard
from graftkit.attachment.modules import (
    AddedDeltas,
    EmbeddingDeltas,
    LinearDeltas,
    ModuleDeltas,
    SwappedDeltas,
)
from graftkit.attachment.rows import RoutedRows, Routing
from graftkit.attachment.separation import RowSeparation
from graftkit.attachment.target import (
    LiveTarget,
    TensorChange,
    find_changes,
)
from graftkit.attachment.updates import TunedPart, Update, make_update
from graftkit.errors import AttachError
from graftkit.skillpack import SkillPack


class SidePacks:
    """The hooks of packs on one model; `undo` removes them.

    Attributes:
        routing: what the rows of the next batches use.
    """

    def __init__(self, target: LiveTarget):
        self.routing = Routing()
        self._target = target
        self._separation = RowSeparation(target.model, self.routing)
        self._paths: dict[str, ModuleDeltas] = {}
        self._batches = BatchGuard(target.model, self.routing, self._paths)

    def apply(self) -> None:
        """Begin to watch the batches of the model."""
        self._batches.hook()

    def undo(self) -> None:
        """Remove all hooks; a second call does nothing."""
        with self.routing.lock:
            self._batches.unhook()
            for path in self._paths.values():
                path.unhook()
            self._paths.clear()

    def add(self, index: int, pack: SkillPack) -> None:
        """Decode every changed tensor of a checked pack and hook its modules.

        Raises: AttachError, also for a weight that is read past its module; CorruptPackError.
            Nothing of the pack is then left.
        """
        with self.routing.lock:
            try:
                with torch.no_grad():
                    for change in find_changes(self._target, pack):
                        if change.changed:
                            self._add(index, pack, change)
                    for path in self._paths.values():
                        path.hook()
                self._batches.renew(index)
            except BaseException:
                self.drop(index)
                raise

    def drop(self, index: int) -> None:
        """Forget a pack, and unhook the modules that no other one changes."""
        with self.routing.lock:
            self.routing.drop(index)
            for name, path in list(self._paths.items()):
                if not path.drop(index):
                    path.unhook()
                    del self._paths[name]

    def route(self, rows: RoutedRows) -> None:
        """Choose for the next batches of this thread.

        Raises: AttachError for rows of different packs where this model does not keep them apart.
        """
        if not rows.is_uniform:
            self._separation.check(self._paths, rows)
        self.routing.rows = rows

    def nbytes(self, index: int) -> int:
        """Bytes that a pack takes in memory; what tied modules share counts once."""
        kept = [value for path in self._paths.values() for value in path.values(index)]
        return sum({id(value): value.nbytes for value in kept}.values())

    def _add(self, index: int, pack: SkillPack, change: TensorChange) -> None:
        record = change.record
        if record.tuned_shape is not None:
            raise AttachError(
                f"{record.name} has {record.tuned_shape[0]} rows in the tuned model and "
                f'{record.shape[0]} in the target; attach with mode="merged"'
            )
        update: Update | None = None
        for slot in change.slots:
            name, _, attribute = slot.rpartition(".")
            path = self._path(name)
            if isinstance(path, SwappedDeltas):
                path.add(index, attribute, self._tuned_part(pack, change))
            elif attribute == "weight":
                assert isinstance(path, AddedDeltas)
                # Slots of one change are one tied parameter, and share the memory of its update.
                update = update or self._update(pack, change, slot, path.weights.get(index))
                path.weights[index] = update
            else:
                assert isinstance(path, AddedDeltas)
                path.biases[index] = self._moved(pack, change, slot).to(self._live(slot))

    def _path(self, name: str) -> ModuleDeltas:
        if name not in self._paths:
            module = self._target.model.get_submodule(name)
            kind: Callable[..., ModuleDeltas] = SwappedDeltas
            if isinstance(module, (nn.Linear, Conv1D)) and _is_plain(module):
                kind = LinearDeltas
            elif isinstance(module, nn.Embedding) and _is_plain(module) and not module.max_norm:
                kind = EmbeddingDeltas
            self._paths[name] = kind(name, module, self.routing)
        return self._paths[name]

    def _update(
        self, pack: SkillPack, change: TensorChange, slot: str, before: Update | None
    ) -> Update:
        """The delta of a slot's whole weight; `before` holds other parts of the same weight."""
        live = self._live(slot)
        whole = change.view.whole
        factors = pack.factors(change.record.name) if whole and self._codes(change, slot) else None
        if factors is not None:
            return make_update(factors, None, live)
        moved = self._moved(pack, change, slot)
        if not whole:
            part, moved = moved, torch.zeros(live.shape)
            change.view.tensor(moved).copy_(part)
        is_conv = isinstance(self._target.slot(slot)[0], Conv1D)
        matrix = moved.T if is_conv else moved
        return make_update(None, matrix if before is None else matrix + before.dense().cpu(), live)

    def _tuned_part(self, pack: SkillPack, change: TensorChange) -> TunedPart:
        record, live = change.record, self._target.live(change.view)
        factors = pack.factors(record.name)
        if factors is not None:
            update = make_update(factors, None, live)
            if update.nbytes < live.nbytes:
                return TunedPart(change.view, update, record.layout.endswith("transposed"))
        tuned = pack.decode(record.name, self._target.source(change))
        return TunedPart(change.view, tuned.to(live.device, live.dtype), False)

    def _moved(self, pack: SkillPack, change: TensorChange, slot: str) -> Tensor:
        """Tuned minus what the slot holds, float32, in the slot's layout, on the CPU."""
        source = self._target.source(change)
        if self._codes(change, slot):
            return pack.delta(change.record.name, source)
        held = change.view.tensor(self._live(slot)).cpu().float()
        return pack.decode(change.record.name, source).float() - held

    def _codes(self, change: TensorChange, slot: str) -> bool:
        """Whether the record is coded against the very parameter that the slot holds."""
        return change.source is not None and slot in change.source.owners

    def _live(self, slot: str) -> Tensor:
        return self._target.state[slot]


def linear_updates(
    target: LiveTarget, pack: SkillPack, wanted: Callable[[str], bool]
) -> dict[str, Update]:
    """ΔW of the linear modules whose names are wanted, of a checked pack; nothing is hooked.

    Raises: AttachError, CorruptPackError.
    """
    paths = SidePacks(target)
    with torch.no_grad():
        for change in find_changes(target, pack):
            if change.changed and any(wanted(slot.rpartition(".")[0]) for slot in change.slots):
                paths._add(0, pack, change)
    return {
        name: path.weights[0]
        for name, path in paths._paths.items()
        if isinstance(path, LinearDeltas) and 0 in path.weights and wanted(name)
    }


def _is_plain(module: nn.Module) -> bool:
    """The forward pass of the class is the one of Linear, Conv1D or Embedding."""
    plain = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)
    return type(module).forward in plain
