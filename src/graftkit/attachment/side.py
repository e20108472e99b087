"""The batches that a model runs with packs beside it: one at a time, each kind watched once.

Packs beside the model: forward hooks add each pack's part for the rows that use it.

The target's bytes are never touched. What a hook can add to a module's output is added; any other
module runs again, with the tuned parameter in place, on the rows that use the pack.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftkit.attachment.calls import ChangedWeight, Probe, ReadWatch, RowSeparation, Unrunnable
from graftkit.attachment.modules import (
    AddedPath,
    EmbeddingPath,
    LinearPath,
    ModulePath,
    RerunPath,
    TunedPart,
    Update,
    make_update,
)
from graftkit.attachment.rows import Routing, Rows, choose_rows, first_tensor
from graftkit.attachment.target import (
    Change,
    LiveTarget,
    OpaqueHook,
    Uncopied,
    find_changes,
    forget_compiled_code,
)
from graftkit.errors import AttachError
from graftkit.skillpack import SkillPack

# Arguments of a model whose dimension 0 is the batch, asked first: positions may have one row only.
_BATCHES = ("input_ids", "inputs_embeds", "attention_mask")

Call = tuple[Any, ...]
"""How a model is called: which of its modules, with which arguments, one token or several."""


@dataclass(frozen=True)
class _Running:
    """A call of the model that has not ended. watch: of its reads, where it is of a new kind."""

    thread: int
    module: nn.Module
    call: Call | None
    watch: ReadWatch | None


class Batches(Uncopied):
    """Hooks on the model itself, around every forward pass.

    A module holds the parameters of one batch at a time, so other threads wait for a batch to end.
    The first call of each kind is watched: a pack that it would not reach is refused.

    Args:
        paths: by name, the modules that packs change now.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing, paths: Mapping[str, ModulePath]):
        self._model = model
        self._routing = routing
        self._paths = paths
        self._handles: list[RemovableHandle] = []
        self._running: list[_Running] = []
        self._seen_calls: set[Call] = set()
        self._seen_modules: set[str] = set()

    def hook(self) -> None:
        """Begin to watch the model."""
        forget_compiled_code()
        for module in {self._model, self._model.base_model}:
            begin = module.register_forward_pre_hook(
                OpaqueHook(self._begin), prepend=True, with_kwargs=True
            )
            # After an exception too: other threads wait for this batch to end.
            end = module.register_forward_hook(
                OpaqueHook(self._end), with_kwargs=True, always_call=True
            )
            self._handles += [begin, end]

    def unhook(self) -> None:
        """Remove the hooks; the caller holds the lock."""
        self._abandon()
        while self._handles:
            self._handles.pop().remove()
        forget_compiled_code()

    def renew(self, pack: int) -> None:
        """Try a new pack on a few random tokens, so that what it would not reach is refused before
        it is used; what random tokens do not reach is watched when it is first called.

        Raises: AttachError naming a weight that is read past its module.
        """
        if self._paths.keys() <= self._seen_modules:
            return
        self._seen_calls.clear()
        forget_compiled_code()
        try:
            probe = Probe(self._model)
            with self._routing.using(choose_rows([pack], [pack])):
                probe.run(0)
        except Unrunnable:
            return

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._routing.lock.acquire()
        try:
            if any(running.module is module for running in self._running):
                self._abandon()
            call, watch = None, None
            batch = first_tensor([args, [kwargs.get(name) for name in _BATCHES], kwargs])
            if batch is not None:
                self._routing.begin(batch.shape[0])
                call = _describe_call(module, args, kwargs, batch)
                watch = self._watch(call)
            self._running.append(_Running(threading.get_ident(), module, call, watch))
        except BaseException:
            self._routing.lock.release()
            raise

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = self._running[-1] if self._running else None
        # Where `_begin` refused a batch, this thread has nothing running.
        if (
            running is None
            or running.module is not module
            or running.thread != threading.get_ident()
        ):
            return
        self._running.pop()
        try:
            if running.watch is not None:
                running.watch.stop()
            # Without an output an exception is on its way: it says more.
            if running.watch is not None and output is not None:
                running.watch.check()
                self._seen_calls.add(running.call or ())
                self._seen_modules.update(self._paths)
        finally:
            self._routing.lock.release()

    def _watch(self, call: Call) -> ReadWatch | None:
        """Watch the reads of an outermost call, where none like it was seen with these modules."""
        if self._running or call in self._seen_calls or not self._routing.rows.packs:
            return None
        changed = {
            id(getattr(path.module, attribute)): f"{name}.{attribute}"
            for name, path in self._paths.items()
            for attribute in path.attributes
        }
        # A tied weight may be read in every module that owns it, also where it is not changed.
        watch = ReadWatch(
            [
                ChangedWeight(changed[id(value)], value, module)
                for module in self._model.modules()
                for value in (*module._parameters.values(), *module._buffers.values())
                if value is not None and id(value) in changed
            ]
        )
        watch.start()
        return watch

    def _abandon(self) -> None:
        """Leave calls of this thread that an interruption (Ctrl-C) ended."""
        while self._running:
            running = self._running.pop()
            if running.watch is not None:
                running.watch.stop()
            self._routing.lock.release()
        for path in self._paths.values():
            path.restore()


def _describe_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Tensor
) -> Call:
    names = sorted(name for name, value in kwargs.items() if value is not None)
    is_one_token = batch.dim() > 1 and batch.shape[1] == 1
    return (id(module), len(args), *names, is_one_token, module.training)


class SidePaths:
    """The hooks of packs on one model; `undo` removes them.

    Attributes:
        routing: what the rows of the next batches use.
    """

    def __init__(self, target: LiveTarget):
        self.routing = Routing()
        self._target = target
        self._separation = RowSeparation(target.model, self.routing)
        self._paths: dict[str, ModulePath] = {}
        self._batches = Batches(target.model, self.routing, self._paths)

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

    def route(self, rows: Rows) -> None:
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

    def _add(self, index: int, pack: SkillPack, change: Change) -> None:
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
            if isinstance(path, RerunPath):
                path.add(index, attribute, self._tuned_part(pack, change))
            elif attribute == "weight":
                assert isinstance(path, AddedPath)
                # Slots of one change are one tied parameter, and share the memory of its update.
                update = update or self._update(pack, change, slot, path.weights.get(index))
                path.weights[index] = update
            else:
                assert isinstance(path, AddedPath)
                path.biases[index] = self._moved(pack, change, slot).to(self._live(slot))

    def _path(self, name: str) -> ModulePath:
        if name not in self._paths:
            module = self._target.model.get_submodule(name)
            kind: Callable[..., ModulePath] = RerunPath
            if isinstance(module, (nn.Linear, Conv1D)) and _is_plain(module):
                kind = LinearPath
            elif isinstance(module, nn.Embedding) and _is_plain(module) and not module.max_norm:
                kind = EmbeddingPath
            self._paths[name] = kind(name, module, self.routing)
        return self._paths[name]

    def _update(self, pack: SkillPack, change: Change, slot: str, before: Update | None) -> Update:
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

    def _tuned_part(self, pack: SkillPack, change: Change) -> TunedPart:
        record, live = change.record, self._target.live(change.view)
        factors = pack.factors(record.name)
        if factors is not None:
            update = make_update(factors, None, live)
            if update.nbytes < live.nbytes:
                return TunedPart(change.view, update, record.layout.endswith("transposed"))
        tuned = pack.decode(record.name, self._target.source(change))
        return TunedPart(change.view, tuned.to(live.device, live.dtype), False)

    def _moved(self, pack: SkillPack, change: Change, slot: str) -> Tensor:
        """Tuned minus what the slot holds, float32, in the slot's layout, on the CPU."""
        source = self._target.source(change)
        if self._codes(change, slot):
            return pack.delta(change.record.name, source)
        held = change.view.tensor(self._live(slot)).cpu().float()
        return pack.decode(change.record.name, source).float() - held

    def _codes(self, change: Change, slot: str) -> bool:
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
    paths = SidePaths(target)
    with torch.no_grad():
        for change in find_changes(target, pack):
            if change.changed and any(wanted(slot.rpartition(".")[0]) for slot in change.slots):
                paths._add(0, pack, change)
    return {
        name: path.weights[0]
        for name, path in paths._paths.items()
        if isinstance(path, LinearPath) and 0 in path.weights and wanted(name)
    }


def _is_plain(module: nn.Module) -> bool:
    """The forward pass of the class is the one of Linear, Conv1D or Embedding."""
    plain = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)
    return type(module).forward in plain
