"""The batches that a model runs with packs beside it: one at a time, each kind watched once."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from graftkit.attachment.coverage import ChangedWeight, ReadWatch
from graftkit.attachment.live import OpaqueHook, Uncopied, forget_compiled_code
from graftkit.attachment.mixtures import choose_rows
from graftkit.attachment.modules import ModulePath
from graftkit.attachment.probe import Probe, Unrunnable
from graftkit.attachment.routing import Routing, first_tensor

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
