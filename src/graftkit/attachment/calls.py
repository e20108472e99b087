"""Calls of a model that has packs beside it: one batch at a time, each kind of call checked once.

A side delta is added to what a module returns when it is called. A weight that another module reads
directly (a head tied by hand, a fused kernel, experts read by their block) is not reached that way,
and the answers would be the target's. So the reads of the first call of each kind are tracked:
every operation on a changed weight has to happen while a module that owns the weight is called.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from graftkit.attachment.modules import ModuleDeltas
from graftkit.attachment.rows import Routing, choose_rows, first_tensor
from graftkit.attachment.separation import TrialBatch, TrialError
from graftkit.attachment.target import (
    NotCopyable,
    OpaqueHook,
    forget_compiled_code,
)
from graftkit.errors import AttachError


@dataclass(frozen=True)
class ChangedWeight:
    """A parameter or buffer of a module that packs beside the model change."""

    name: str
    tensor: Tensor
    module: nn.Module


class ReadTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation between `start` and `stop`.

    Attributes:
        missed: the changed weights that were read while none of their modules was being called.
    """

    def __init__(self, weights: Sequence[ChangedWeight]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.direct_reads: list[str] = []
        self._weights = weights
        self._calls: Counter[nn.Module] = Counter()
        self._handles: list[RemovableHandle] = []
        self._by_storage: dict[int, list[tuple[range, ChangedWeight]]] = {}
        for weight in weights:
            place = weight.tensor.untyped_storage()._cdata
            self._by_storage.setdefault(place, []).append((_bytes_of(weight.tensor), weight))

    def start(self) -> None:
        """Begin to watch."""
        for module in {weight.module for weight in self._weights}:
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Watch no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        while self._handles:
            self._handles.pop().remove()

    def check(self) -> None:
        """Raises: AttachError naming a weight that was missed."""
        if self.direct_reads:
            raise AttachError(
                f"{self.direct_reads[0]} is read without its module being called, so a pack beside "
                'the model would change nothing there; attach with mode="merged"'
            )

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._calls[module] += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls[module] -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _reads_no_values(func):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._check(value)
        return func(*args, **kwargs)

    def _check(self, value: Tensor) -> None:
        owners = self._by_storage.get(value.untyped_storage()._cdata, [])
        place = _bytes_of(value) if owners else range(0)
        # A tied weight stands here once for each of its modules; any of them may read it.
        touched = [w for span, w in owners if span.start < place.stop and place.start < span.stop]
        if touched and not any(self._calls[weight.module] for weight in touched):
            self.direct_reads += [
                weight.name for weight in touched if weight.name not in self.direct_reads
            ]


def _reads_no_values(func: Any) -> bool:
    """Views, and new tensors that only take over a shape."""
    name = func._schema.name.removeprefix("aten::")
    return bool(func.is_view) or name.endswith("_like") or name.startswith("new_")


def _bytes_of(tensor: Tensor) -> range:
    """The bytes of its storage that a tensor spans."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    if not tensor.numel():
        return range(start, start)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((extent - 1) * stride for extent, stride in steps)
    return range(start, start + (last + 1) * size)


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
    watch: ReadTracker | None


class BatchGuard(NotCopyable):
    """Hooks on the model itself, around every forward pass.

    A module holds the parameters of one batch at a time, so other threads wait for a batch to end.
    The first call of each kind is watched: a pack that it would not reach is refused.

    Args:
        paths: by name, the modules that packs change now.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing, paths: Mapping[str, ModuleDeltas]):
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
            probe = TrialBatch(self._model)
            with self._routing.using(choose_rows([pack], [pack])):
                probe.run(0)
        except TrialError:
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

    def _watch(self, call: Call) -> ReadTracker | None:
        """Watch the reads of an outermost call, where none like it was seen with these modules."""
        if self._running or call in self._seen_calls or not self._routing.rows.packs:
            return None
        changed = {
            id(getattr(path.module, attribute)): f"{name}.{attribute}"
            for name, path in self._paths.items()
            for attribute in path.attributes
        }
        # A tied weight may be read in every module that owns it, also where it is not changed.
        watch = ReadTracker(
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
