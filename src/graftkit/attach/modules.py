"""How one module serves rows of several packs: by addition to its output, or by running again."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftkit.attach.routing import Entries, Routing, first_tensor, put, take
from graftkit.attach.updates import Update
from graftkit.errors import AttachError
from graftkit.models.views import View


@dataclass(frozen=True)
class TunedPart:
    """One tuned tensor inside a parameter: the tensor itself, or an update to the target's.

    Attributes:
        transposed: the checkpoint holds the transpose of the update's (out, in).
    """

    view: View
    value: Tensor | Update
    transposed: bool

    def write(self, parameter: Tensor) -> None:
        """Put the tuned values into a copy of the target's parameter."""
        place = self.view.tensor(parameter)
        if isinstance(self.value, Tensor):
            place.copy_(self.value)
            return
        delta = self.value.dense()
        place.copy_((delta.T if self.transposed else delta).reshape(place.shape).add_(place))


class ModulePath(ABC):
    """What all packs change in one module."""

    def __init__(self, name: str, module: nn.Module, routing: Routing, sees_rows: bool):
        self.name = name
        self.module = module
        self.routing = routing
        self._sees_rows = sees_rows

    @abstractmethod
    def hook(self) -> list[RemovableHandle]:
        """Install the hooks on the module."""

    def groups(self, tensor: Tensor) -> list[tuple[int, Entries]]:
        """(pack, entries) along dimension 0 of a tensor that the module sees or gives.

        Raises: AttachError where rows of several packs meet in a module that does not keep them
            apart.
        """
        if self.routing.is_uniform:
            pack = self.routing.rows[0]
            return [] if pack is None else [(pack, slice(None))]
        if not self._sees_rows:
            raise AttachError(
                f"{self.name} does not see the rows of a batch one by one; "
                "run the rows of each pack in a batch of their own"
            )
        return self.routing.groups(tensor.shape[0], tensor.device)

    def spread(self, tensor: Tensor) -> Tensor:
        """An output that stands for the whole batch, such as positions, once for each row."""
        if tensor.shape[0] == 1 and self.routing.batch > 1 and not self.routing.is_uniform:
            return tensor.expand(self.routing.batch, *tensor.shape[1:]).clone()
        return tensor


class LinearPath(ModulePath):
    """y += x ΔWᵀ + Δb on a Linear or Conv1D."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.weights: dict[int, Update] = {}
        self.biases: dict[int, Tensor] = {}

    def hook(self) -> list[RemovableHandle]:
        """One forward hook, before those of others."""
        hook = self.module.register_forward_hook(self._add, prepend=True, with_kwargs=True)
        return [hook]

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = first_tensor([args, kwargs])
        assert x is not None
        for pack, entries in self.groups(output):
            part = None
            if pack in self.weights:
                part = self.weights[pack].project(x[entries])
            if pack in self.biases:
                bias = self.biases[pack]
                part = bias.expand_as(output[entries]) if part is None else part.add_(bias)
            if part is not None:
                _accumulate(output, entries, part)
        return output


class EmbeddingPath(ModulePath):
    """y += ΔW[ids] on an Embedding."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.weights: dict[int, Update] = {}

    def hook(self) -> list[RemovableHandle]:
        """One forward hook, before those of others."""
        hook = self.module.register_forward_hook(self._add, prepend=True, with_kwargs=True)
        return [hook]

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        ids = first_tensor([args, kwargs])
        assert ids is not None
        output, ids = self.spread(output), self.spread(ids)
        for pack, entries in self.groups(output):
            if pack in self.weights:
                _accumulate(output, entries, self.weights[pack].look_up(ids[entries]))
        return output


class RerunPath(ModulePath):
    """Any other module: tuned parameters stand in for the target's while it runs.

    Where all rows use one pack they do so during the module's own forward pass. Otherwise the
    target's pass serves the rows without a pack, and the module runs again for each pack on its
    rows. Cached keys and values are then those of the first pass: they come out of the module's
    children, which serve every row with its own pack already.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._parts: dict[int, dict[str, list[TunedPart]]] = {}
        self._originals: list[dict[str, Tensor]] = []
        self._taps: list[list[_CacheTap]] = []

    def add(self, pack: int, attribute: str, part: TunedPart) -> None:
        """Take up one tuned tensor of a pack."""
        self._parts.setdefault(pack, {}).setdefault(attribute, []).append(part)

    def hook(self) -> list[RemovableHandle]:
        """Hooks around the forward pass; the second runs after an exception too."""
        before = self.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = self.module.register_forward_hook(
            self._leave, prepend=True, with_kwargs=True, always_call=True
        )
        return [before, after]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        taps: list[_CacheTap] = []
        originals: dict[str, Tensor] = {}
        if self.routing.is_uniform:
            pack = self.routing.rows[0]
            if pack in self._parts:
                originals = self._swap(self._tuned(pack))
        else:
            args, kwargs = _tap_caches(args, taps), _tap_caches(kwargs, taps)
        self._originals.append(originals)
        self._taps.append(taps)
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # After an exception before `_enter` there is nothing to put back.
        if not self._originals:
            return output
        self._swap(self._originals.pop())
        taps = self._taps.pop()
        x = first_tensor([args, kwargs])
        if x is None or output is None or self.routing.is_uniform:
            return output
        entering = self.groups(x) if x.shape[0] > 1 else []
        inputs = dict(entering)
        for pack in sorted({row for row in self.routing.rows if row in self._parts}):
            entries = inputs.get(pack, slice(None))
            part = self._run(pack, args, kwargs, x.shape[0], entries)
            output = put(output, part, partial(self._place, pack))
        for tap in taps:
            tap.replay = None
        return output

    def _run(self, pack: int, args: Any, kwargs: Any, length: int, entries: Entries) -> Any:
        """The module's output for one pack's entries, without the hooks of this module."""
        args, kwargs = take(args, length, entries), take(kwargs, length, entries)
        for tap in _taps_in([args, kwargs]):
            tap.start_replay(length, entries)
        originals = self._swap(self._tuned(pack))
        try:
            with self.routing.only(pack):
                return self.module.forward(*args, **kwargs)
        finally:
            self._swap(originals)

    def _place(self, pack: int, whole: Tensor) -> tuple[Tensor, Entries]:
        copy = self.spread(whole)
        copy = copy.clone() if copy is whole else copy
        return copy, dict(self.groups(copy))[pack]

    def _tuned(self, pack: int) -> dict[str, Tensor]:
        """The pack's parameters of this module, made of the target's where only a part changed."""
        tuned = {}
        for attribute, parts in self._parts[pack].items():
            first = parts[0]
            if len(parts) == 1 and first.view.whole and isinstance(first.value, Tensor):
                tuned[attribute] = first.value
                continue
            parameter = getattr(self.module, attribute).detach().clone()
            for part in parts:
                part.write(parameter)
            tuned[attribute] = parameter
        return tuned

    def _swap(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors in place of parameters or buffers; returns what was there."""
        originals: dict[str, Tensor] = {}
        for attribute, value in values.items():
            own: Any = self.module._parameters
            if attribute not in own:
                own = self.module._buffers
            originals[attribute] = own[attribute]
            own[attribute] = value
        return originals


class _CacheTap:
    """Stands in for a key/value cache: remembers what it gave, and gives it again in a replay."""

    def __init__(self, cache: Any):
        self._cache = cache
        self._given: list[Any] = []
        self.replay: Iterator[Any] | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values; in a replay, give what the first pass was given."""
        if self.replay is not None:
            return next(self.replay)
        self._given.append(self._cache.update(*args, **kwargs))
        return self._given[-1]

    def start_replay(self, length: int, entries: Entries) -> None:
        """From now on give the entries of what was given before, in the same order."""
        self.replay = iter([take(given, length, entries) for given in self._given])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("update"):
            raise AttachError(
                "this layer keeps a state that rows of several packs cannot share; "
                "run the rows of each pack in a batch of their own"
            )
        return getattr(self._cache, name)


def _tap_caches(values: Any, taps: list[_CacheTap]) -> Any:
    """Top-level arguments with every cache behind a tap."""

    def tap(value: Any) -> Any:
        if hasattr(value, "update") and hasattr(value, "get_seq_length"):
            taps.append(_CacheTap(value))
            return taps[-1]
        return value

    if isinstance(values, dict):
        return {key: tap(value) for key, value in values.items()}
    return tuple(tap(value) for value in values)


def _taps_in(values: list[Any]) -> list[_CacheTap]:
    args, kwargs = values
    return [value for value in (*args, *kwargs.values()) if isinstance(value, _CacheTap)]


def _accumulate(output: Tensor, entries: Entries, part: Tensor) -> None:
    """output[entries] += part, in place: the output belongs to nobody else yet."""
    part = part.to(output.dtype)
    if isinstance(entries, slice):
        output[entries] += part
    else:
        output.index_add_(0, entries, part)
