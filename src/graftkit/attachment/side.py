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
from graftkit.attachment.updates import TunedPart, WeightUpdate, make_update
from graftkit.errors import AttachError
from graftkit.skillpack import SkillPack


class SidePacks:
    """Packs beside one model, by index. `apply` begins, `undo` removes every hook.

    Attributes:
        routing: which packs the rows of the next batches use.
    """

    def __init__(self, target: LiveTarget):
        self.routing = Routing()
        self._target = target
        self._separation = RowSeparation(target.model, self.routing)
        self._modules: dict[str, ModuleDeltas] = {}
        self._guard = BatchGuard(target.model, self.routing, self._modules)

    def apply(self) -> None:
        """Begin to watch the batches of the model."""
        self._guard.hook()

    def undo(self) -> None:
        """Remove all hooks; a second call does nothing."""
        with self.routing.lock:
            self._guard.unhook()
            for deltas in self._modules.values():
                deltas.unhook()
            self._modules.clear()

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
                    for deltas in self._modules.values():
                        deltas.hook()
                self._guard.try_pack(index)
            except BaseException:
                self.drop(index)
                raise

    def drop(self, index: int) -> None:
        """Forget a pack, and unhook the modules that no other one changes."""
        with self.routing.lock:
            self.routing.drop(index)
            for name, deltas in list(self._modules.items()):
                if not deltas.drop(index):
                    deltas.unhook()
                    del self._modules[name]

    def route(self, rows: RoutedRows) -> None:
        """Choose for the next batches of this thread.

        Raises: AttachError for rows of different packs where this model does not keep them apart.
        """
        if not rows.is_uniform:
            self._separation.check(self._modules, rows)
        self.routing.rows = rows

    def nbytes(self, index: int) -> int:
        """Bytes that a pack takes in memory; what tied modules share counts once."""
        values = [value for deltas in self._modules.values() for value in deltas.values(index)]
        return sum({id(value): value.nbytes for value in values}.values())

    def _add(self, index: int, pack: SkillPack, change: TensorChange) -> None:
        """Decode one change into the deltas of every module that it sets."""
        record = change.record
        if record.tuned_shape is not None:
            raise AttachError(
                f"{record.name} has {record.tuned_shape[0]} rows in the tuned model and "
                f'{record.shape[0]} in the target; attach with mode="merged"'
            )
        update: WeightUpdate | None = None
        for slot in change.slots:
            name, _, attribute = slot.rpartition(".")
            deltas = self._deltas_of(name)
            if isinstance(deltas, SwappedDeltas):
                deltas.add(index, attribute, self._tuned_part(pack, change))
            elif attribute == "weight":
                assert isinstance(deltas, AddedDeltas)
                # Slots of one change are one tied parameter, and share the memory of its update.
                update = update or self._update(pack, change, slot, deltas.weights.get(index))
                deltas.weights[index] = update
            else:
                assert isinstance(deltas, AddedDeltas)
                deltas.biases[index] = self._delta(pack, change, slot).to(self._live(slot))

    def _deltas_of(self, name: str) -> ModuleDeltas:
        """The deltas of one module, new where no pack changed it before."""
        if name not in self._modules:
            module = self._target.model.get_submodule(name)
            kind: Callable[..., ModuleDeltas] = SwappedDeltas
            if isinstance(module, (nn.Linear, Conv1D)) and _is_plain(module):
                kind = LinearDeltas
            elif isinstance(module, nn.Embedding) and _is_plain(module) and not module.max_norm:
                kind = EmbeddingDeltas
            self._modules[name] = kind(name, module, self.routing)
        return self._modules[name]

    def _update(
        self, pack: SkillPack, change: TensorChange, slot: str, before: WeightUpdate | None
    ) -> WeightUpdate:
        """The delta of a slot's whole weight; `before` holds other parts of the same weight."""
        live = self._live(slot)
        whole = change.view.whole
        is_direct = whole and self._is_coded_against(change, slot)
        factors = pack.factors(change.record.name) if is_direct else None
        if factors is not None:
            return make_update(factors, None, live)
        delta = self._delta(pack, change, slot)
        if not whole:
            part, delta = delta, torch.zeros(live.shape)
            change.view.tensor(delta).copy_(part)
        is_conv = isinstance(self._target.slot(slot)[0], Conv1D)
        matrix = delta.T if is_conv else delta
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

    def _delta(self, pack: SkillPack, change: TensorChange, slot: str) -> Tensor:
        """Tuned minus what the slot holds, float32, in the slot's layout, on the CPU."""
        source = self._target.source(change)
        if self._is_coded_against(change, slot):
            return pack.delta(change.record.name, source)
        original = change.view.tensor(self._live(slot)).cpu().float()
        return pack.decode(change.record.name, source).float() - original

    def _is_coded_against(self, change: TensorChange, slot: str) -> bool:
        """Whether the record is coded against the very parameter that the slot holds."""
        return change.source is not None and slot in change.source.owners

    def _live(self, slot: str) -> Tensor:
        return self._target.state[slot]


def linear_updates(
    target: LiveTarget, pack: SkillPack, selects: Callable[[str], bool]
) -> dict[str, WeightUpdate]:
    """ΔW of the linear modules that `selects` accepts by name, of a checked pack. Hooks nothing.

    Raises: AttachError, CorruptPackError.
    """
    side = SidePacks(target)
    with torch.no_grad():
        for change in find_changes(target, pack):
            if change.changed and any(selects(slot.rpartition(".")[0]) for slot in change.slots):
                side._add(0, pack, change)
    return {
        name: deltas.weights[0]
        for name, deltas in side._modules.items()
        if isinstance(deltas, LinearDeltas) and 0 in deltas.weights and selects(name)
    }


def _is_plain(module: nn.Module) -> bool:
    """Whether the class has the very forward pass of Linear, Conv1D or Embedding."""
    plain = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)
    return type(module).forward in plain
