"""How one module serves rows of several packs.

The packs' deltas are added to the module's output where it is a linear layer or an embedding. Any
other module runs with tuned parameters in place of the target's, once for each kind of row, or once
for all where it only scales its inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftkit.attachment.rows import (
    EntryIndex,
    PackShare,
    RoutedRows,
    Routing,
    WeightsByPack,
    first_tensor,
    put_entries,
    take_entries,
)
from graftkit.attachment.target import NotCopyable, OpaqueHook
from graftkit.attachment.updates import (
    LowRankUpdate,
    StackedUpdates,
    TunedPart,
    WeightUpdate,
)
from graftkit.errors import AttachError


class ModuleDeltas(NotCopyable, ABC):
    """All packs' deltas in one module, and the hooks that apply them.

    Attributes:
        keeps_rows: whether a trial batch showed the rows of a batch in order along dimension 0 of
            the module's input; None where no trial batch reached the module.
    """

    def __init__(self, name: str, module: nn.Module, routing: Routing):
        self.name = name
        self.module = module
        self.routing = routing
        self.keeps_rows: bool | None = None
        self._handles: list[RemovableHandle] = []

    def hook(self) -> None:
        """Install the hooks on the module, once."""
        if not self._handles:
            self._handles = self._install()

    def unhook(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def restore(self) -> None:
        """Bring the module to its state between two calls, after a call that never ended."""

    @abstractmethod
    def values(self, pack: int) -> list[WeightUpdate | Tensor]:
        """Everything in memory for a pack."""

    def serves(self, packs: Iterable[int]) -> bool:
        """Whether any of these packs changes the module."""
        return any(self.values(pack) for pack in packs)

    @abstractmethod
    def drop(self, pack: int) -> bool:
        """Forget a pack; returns whether any other pack is left."""

    @abstractmethod
    def _install(self) -> list[RemovableHandle]:
        """Register the hooks."""

    def shares(self, output: Tensor) -> list[PackShare]:
        """The packs' shares in an output, along dimension 0.

        Raises: AttachError where rows of different packs reach a module that may mix them.
        """
        rows = self.routing.rows
        if not rows.is_uniform and self.serves(rows.packs):
            self.check()
        return rows.shares(output.shape[0], output.device)

    @property
    @abstractmethod
    def attributes(self) -> set[str]:
        """Parameters and buffers of the module that packs change."""

    def check(self) -> None:
        """Refuse rows of different packs unless a trial showed that the module keeps them apart.

        Raises: AttachError.
        """
        if self.routing.recorder is None and not self.keeps_rows:
            why = "was not reached when that was tried" if self.keeps_rows is None else "does not"
            raise AttachError(
                f"rows of several packs need modules that see them one by one, and {self.name} "
                f"{why}; run the rows of each pack in a batch of their own"
            )

    def record(self, inputs: Tensor | None) -> None:
        """Show a trial batch what the module reads."""
        if self.routing.recorder is not None:
            self.routing.recorder(self.name, inputs)

    def spread(self, tensor: Tensor) -> Tensor:
        """A tensor that stands for the whole batch, such as positions, repeated for every row."""
        if tensor.shape[0] == 1 and self.routing.batch > 1 and not self.routing.rows.is_uniform:
            return tensor.expand(self.routing.batch, *tensor.shape[1:]).clone()
        return tensor


class AddedDeltas(ModuleDeltas):
    """Deltas that one forward hook adds to the module's output."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.weights: dict[int, WeightUpdate] = {}
        self.biases: dict[int, Tensor] = {}

    def values(self, pack: int) -> list[WeightUpdate | Tensor]:
        """The pack's update and bias."""
        both: tuple[Mapping[int, WeightUpdate | Tensor], ...] = (self.weights, self.biases)
        return [values[pack] for values in both if pack in values]

    def drop(self, pack: int) -> bool:
        """Forget the pack's update and bias."""
        self.weights.pop(pack, None)
        self.biases.pop(pack, None)
        return bool(self.weights or self.biases)

    def _install(self) -> list[RemovableHandle]:
        # Before the hooks of others, which may want to see the tuned output.
        hook = OpaqueHook(self._add)
        return [self.module.register_forward_hook(hook, prepend=True, with_kwargs=True)]

    @property
    def attributes(self) -> set[str]:
        """The weight, the bias, or both."""
        both = {"weight": self.weights, "bias": self.biases}
        return {name for name, values in both.items() if values}

    @abstractmethod
    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """The output plus the deltas of all packs in use."""


class LinearDeltas(AddedDeltas):
    """y += Σ_i w_i (x ΔW_iᵀ + Δb_i) on a Linear or Conv1D."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._stack: StackedUpdates | None = None

    def drop(self, pack: int) -> bool:
        """Forget the pack's update and bias."""
        self._stack = None
        return super().drop(pack)

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = first_tensor([args, kwargs])
        assert x is not None
        self.record(x)
        shares = self.shares(output)
        stack = self._stack_of(shares)
        done: tuple[int, ...] = ()
        if stack is not None:
            done = stack.packs
            table = self.routing.rows.table(done, output.shape[0], output.device)
            output += stack.project(x, table).to(output.dtype)
        for share in shares:
            part = None
            if share.pack in self.weights and share.pack not in done:
                part = self.weights[share.pack].project(x[share.entries])
            if share.pack in self.biases:
                bias = self.biases[share.pack]
                part = bias.expand_as(output[share.entries]) if part is None else part.add_(bias)
            if part is not None:
                _accumulate(output, share, part)
        return output

    def _stack_of(self, shares: Sequence[PackShare]) -> StackedUpdates | None:
        """The factors of these packs, or of at most twice as many, where rows are to be stacked."""
        if not self.routing.rows.is_stacked:
            return None
        updates = {share.pack: self.weights.get(share.pack) for share in shares}
        low_rank = {
            pack: update for pack, update in updates.items() if isinstance(update, LowRankUpdate)
        }
        if len(low_rank) < 2:
            return None
        stack = self._stack
        fits = stack is not None and low_rank.keys() <= set(stack.packs)
        if stack is None or not fits or len(stack.packs) > 2 * len(low_rank):
            stack = self._stack = StackedUpdates(low_rank)
        return stack


class EmbeddingDeltas(AddedDeltas):
    """y += Σ_i w_i ΔW_i[ids] on an Embedding."""

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        ids = first_tensor([args, kwargs])
        assert ids is not None
        self.record(ids)
        output, ids = self.spread(output), self.spread(ids)
        for share in self.shares(output):
            if share.pack in self.weights:
                part = self.weights[share.pack].look_up(ids[share.entries])
                _accumulate(output, share, part)
        return output


class SwappedDeltas(ModuleDeltas):
    """Any other module runs with θ + Σ_i w_i (θ_i - θ) in place of the target's θ.

    Where all rows choose alike this happens in the module's own forward pass. Otherwise that pass
    serves the rows without a pack, and the module runs again for each kind of row on the entries of
    these rows. Cached keys and values are then those of the first pass: they come out of the
    module's children, which serve every row with its own packs already.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._parts: dict[int, dict[str, list[TunedPart]]] = {}
        self._originals: list[dict[str, Tensor]] = []
        self._taps: list[list[_CacheTap] | None] = []  # None where each row has its own weight
        self._scales_rows: bool | None = None  # None until it is seen
        self._row_weights: tuple[RoutedRows, torch.Size, Tensor] | None = None

    def add(self, pack: int, attribute: str, part: TunedPart) -> None:
        """Add one tuned tensor of a pack."""
        self._parts.setdefault(pack, {}).setdefault(attribute, []).append(part)

    def values(self, pack: int) -> list[WeightUpdate | Tensor]:
        """The pack's tuned tensors."""
        return [part.value for parts in self._parts.get(pack, {}).values() for part in parts]

    def drop(self, pack: int) -> bool:
        """Forget the pack's tuned tensors."""
        self._parts.pop(pack, None)
        self._row_weights = None
        return bool(self._parts)

    @property
    def attributes(self) -> set[str]:
        """Every attribute that a pack has a part of."""
        return {attribute for parts in self._parts.values() for attribute in parts}

    def restore(self) -> None:
        """Put back the parameters that an interruption (Ctrl-C) left tuned."""
        while self._originals:
            self._swap(self._originals.pop())
        self._taps.clear()

    def _install(self) -> list[RemovableHandle]:
        before = self.module.register_forward_pre_hook(OpaqueHook(self._enter), with_kwargs=True)
        # After an exception too: the target's tensors have to come back.
        after = self.module.register_forward_hook(
            OpaqueHook(self._leave), prepend=True, with_kwargs=True, always_call=True
        )
        return [before, after]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        taps: list[_CacheTap] = []
        runs_once = False
        originals: dict[str, Tensor] = {}
        rows = self.routing.rows
        x = first_tensor([args, kwargs])
        if rows.is_uniform:
            originals = self._swap(self._tuned(rows.kinds[0]))
        elif self._scales_rows and x is not None and x.shape[0] % len(rows) == 0:
            originals, runs_once = self._swap({"weight": self._weight_of_rows(x)}), True
        else:
            args, kwargs = _tap_caches(args, taps), _tap_caches(kwargs, taps)
        self._originals.append(originals)
        self._taps.append(None if runs_once else taps)
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # After an exception before `_enter` there is nothing to put back.
        if not self._originals:
            return output
        self._swap(self._originals.pop())
        taps = self._taps.pop()
        x = first_tensor([args, kwargs])
        self.record(x)
        rows = self.routing.rows
        kinds = [] if rows.is_uniform else [k for k in sorted(set(rows.kinds)) if self._weights(k)]
        if output is None or not kinds:
            return output
        self.check()
        if taps is None:
            return output
        if x is None:
            raise AttachError(
                f"{self.name} reads no tensor, so it cannot serve rows of several packs; run the "
                "rows of each pack in a batch of their own"
            )
        inputs = dict(rows.groups(x.shape[0], x.device)) if x.shape[0] > 1 else {}
        for kind in kinds:
            part = self._run(kind, args, kwargs, x.shape[0], inputs.get(kind, slice(None)))
            output = put_entries(output, part, partial(self._place, kind))
        for tap in taps:
            tap.replay = None
        if self._scales_rows is None:
            self._scales_rows = self._try_row_weights(x, output)
        return output

    def _try_row_weights(self, x: Tensor, output: Any) -> bool:
        """Whether the module gives the same in one pass with a weight for each row."""
        own = [*self.module.named_parameters(), *self.module.named_buffers()]
        if [(name, value.dim()) for name, value in own] != [("weight", 1)]:
            return False
        if x.dim() < 3 or x.shape[0] % len(self.routing.rows) or not isinstance(output, Tensor):
            return False
        originals = self._swap({"weight": self._weight_of_rows(x)})
        try:
            return torch.equal(self.module.forward(x), output)
        except RuntimeError:  # a kernel that takes one weight
            return False
        finally:
            self._swap(originals)

    def _weight_of_rows(self, x: Tensor) -> Tensor:
        """The tuned weight of every entry of x (entries, ..., size): (entries, 1, ..., size)."""
        rows = self.routing.rows
        if self._row_weights is not None:
            known, shape, weights = self._row_weights
            if known is rows and (shape[0], len(shape)) == (x.shape[0], x.dim()):
                return weights
        own = self.module.get_parameter("weight").detach()
        tuned = {kind: self._tuned(kind).get("weight", own) for kind in sorted(set(rows.kinds))}
        stacked = torch.stack([tuned[kind] for kind in rows.kinds])
        weights = stacked.repeat_interleave(x.shape[0] // len(rows), dim=0)
        weights = weights.reshape(x.shape[0], *[1] * (x.dim() - 2), -1)
        self._row_weights = rows, x.shape, weights
        return weights

    def _run(self, kind: int, args: Any, kwargs: Any, length: int, entries: EntryIndex) -> Any:
        """The module's output for the entries of one kind, without the hooks of this module."""
        args = take_entries(args, length, entries)
        kwargs = take_entries(kwargs, length, entries)
        for tap in _taps_in([args, kwargs]):
            tap.start_replay(length, entries)
        originals = self._swap(self._tuned(kind))
        try:
            with self.routing.using(self.routing.rows.only(kind)):
                return self.module.forward(*args, **kwargs)
        finally:
            self._swap(originals)

    def _place(self, kind: int, whole: Tensor) -> tuple[Tensor, EntryIndex]:
        copy = self.spread(whole)
        copy = copy.clone() if copy is whole else copy
        return copy, dict(self.routing.rows.groups(copy.shape[0], copy.device))[kind]

    def _weights(self, kind: int) -> WeightsByPack:
        """The weights that a kind of row gives to the packs that change this module."""
        weights = self.routing.rows.weights[kind]
        return tuple((pack, weight) for pack, weight in weights if pack in self._parts)

    def _tuned(self, kind: int) -> dict[str, Tensor]:
        """The changed parameters for one kind of row: θ + Σ_i w_i (θ_i - θ)."""
        weights = self._weights(kind)
        if len(weights) == 1 and weights[0][1] == 1:
            return self._tuned_by(weights[0][0])
        sums: dict[str, Tensor] = {}
        for pack, weight in weights:
            for attribute, tuned in self._tuned_by(pack).items():
                own = getattr(self.module, attribute).detach().float()
                sums[attribute] = sums.get(attribute, own) + weight * (tuned.float() - own)
        return {name: sums[name].to(getattr(self.module, name).dtype) for name in sums}

    def _tuned_by(self, pack: int) -> dict[str, Tensor]:
        """One pack's tuned parameters; unchanged parts of them come from the target."""
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
    """Stands in for a key/value cache: records what it returns, and repeats that in a replay."""

    def __init__(self, cache: Any):
        self._cache = cache
        self._returned: list[Any] = []
        self.replay: Iterator[Any] | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values; in a replay, return what the first pass got."""
        if self.replay is not None:
            return next(self.replay)
        self._returned.append(self._cache.update(*args, **kwargs))
        return self._returned[-1]

    def start_replay(self, length: int, entries: EntryIndex) -> None:
        """From now on return these entries of what was returned before, in the same order."""
        self.replay = iter([take_entries(value, length, entries) for value in self._returned])

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


def _accumulate(output: Tensor, share: PackShare, part: Tensor) -> None:
    """output[entries] += weight · part, in place: the output belongs to nobody else yet."""
    part = share.scale(part).to(output.dtype)
    if isinstance(share.entries, slice):
        output[share.entries] += part
    else:
        output.index_add_(0, share.entries, part)
