"""Attach packs to a live model, choose among them row by row, and detach.

`attach` returns an `Attachment`, which delegates to one of two backends: `MergedWeights` writes one
pack into the model's parameters and keeps the original bytes aside, `SidePacks` keeps any number
beside the model. The package's docstring follows a row of a batch to its pack.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftkit.attachment.configuration import TunedConfiguration, check_configuration
from graftkit.attachment.rows import PackChoice, choose_rows
from graftkit.attachment.side import SidePacks
from graftkit.attachment.target import (
    LiveTarget,
    NotCopyable,
    TensorChange,
    attachment_of,
    check_model,
    check_packs,
    find_changes,
    registered,
    release,
)
from graftkit.checkpoint import DTYPE_NAMES
from graftkit.errors import AttachError
from graftkit.models.loading import input_embeddings
from graftkit.parallel import in_threads
from graftkit.skillpack import SkillPack

# Attributes in which a module or configuration repeats the first extent of its weight.
_ROW_COUNTS = ("num_embeddings", "out_features", "vocab_size")


class MergedWeights:
    """One pack's tuned tensors in place of the target's; `undo` puts every original byte back."""

    def __init__(self, target: LiveTarget, pack: SkillPack):
        self._target = target
        self._pack = pack
        self._undo: list[Callable[[], None]] = []
        self._written: list[tuple[str, Tensor]] = []
        self._versions: list[int] = []

    def apply(self) -> None:
        """Write all changed tensors. Raises: AttachError; call `undo` then."""
        configuration = TunedConfiguration(self._target.model, self._pack)
        self._undo.append(configuration.undo)
        configuration.apply()
        changes = find_changes(self._target, self._pack)
        split = _split_from_owner(changes)
        with torch.no_grad():
            # A tensor that leaves a tied parameter is decoded while its target is still there.
            still_tied: dict[str, tuple[str, ...]] = {}
            for change, owner in split:
                if not self._untie(change, owner):
                    name = owner.record.name
                    still_tied[name] = still_tied.get(name, ()) + change.slots
            done = {id(change) for change, _ in split}
            rest = [change for change in changes if change.changed and id(change) not in done]
            for change, tuned in zip(rest, in_threads(self._decode, rest), strict=True):
                self._write(change, change.slots + still_tied.get(change.record.name, ()), tuned)
        self._versions = [place._version for _, place in self._written]

    def undo(self) -> None:
        """Restore everything, last change first; a second call does nothing.

        Warns where tensors of the pack were written to since (training): that is undone as well.
        """
        changed = [
            name
            for (name, place), version in zip(self._written, self._versions, strict=False)
            if place._version != version
        ]
        self._written.clear()
        if changed:
            warnings.warn(
                f"{changed[0]} and {len(changed) - 1} more tensors were changed (trained?) while a "
                "pack was merged into them; detaching takes that back with the pack. To keep it, "
                "save the model before, or train a model of its own: merge_packs writes one",
                stacklevel=4,
            )
        with torch.no_grad():
            while self._undo:
                self._undo.pop()()

    @torch.no_grad()
    def _decode(self, change: TensorChange) -> Tensor:
        tuned = self._pack.decode(change.record.name, self._target.source(change))
        live = self._target.live(change.view)
        if torch.promote_types(tuned.dtype, live.dtype) != live.dtype:
            raise AttachError(
                f"{change.record.name} is {DTYPE_NAMES[tuned.dtype]} in the tuned model, which "
                f"{live.dtype} would round; load the target with dtype={tuned.dtype}"
            )
        return tuned

    def _write(self, change: TensorChange, slots: tuple[str, ...], tuned: Tensor) -> None:
        place = self._target.live(change.view)
        if tuned.shape != place.shape:
            self._replace(change, slots, tuned)
            return
        original = place.clone()
        self._undo.append(lambda: _copy(place, original))
        place.copy_(tuned)
        self._written.append((change.record.name, place))

    def _untie(self, change: TensorChange, owner: TensorChange) -> bool:
        """Give the slots of `change` a parameter of their own, unless it equals its owner's."""
        tuned, shared = self._decode(change), self._decode(owner)
        if tuned.shape == shared.shape and torch.equal(tuned, shared):
            return False
        self._replace(change, change.slots, tuned)
        config = self._target.model.config
        if getattr(config, "tie_word_embeddings", False):
            self._set(config, "tie_word_embeddings", False)
        return True

    def _replace(self, change: TensorChange, slots: tuple[str, ...], tuned: Tensor) -> None:
        """Give `slots` a new parameter; set the row counts of their modules and of the config."""
        live = self._target.state[change.view.parameter]
        if not change.view.whole:
            raise AttachError(
                f"{change.record.name} is {list(tuned.shape)} in the tuned model, but only a part "
                f"of {change.view.parameter} here; merge it into a checkpoint instead"
            )
        value = tuned.to(live.device, live.dtype)
        replacement: Tensor = value
        if isinstance(live, nn.Parameter):
            replacement = nn.Parameter(value, requires_grad=live.requires_grad)
        rows = (live.shape[0], tuned.shape[0])
        for slot in slots:
            module, attribute = self._target.slot(slot)
            self._set(module, attribute, replacement)
            self._resize(module, *rows)
        if rows[0] != rows[1]:
            self._resize_config(self._target.model, slots, *rows)

    def _resize(self, module: nn.Module, before: int, after: int) -> None:
        for attribute in _ROW_COUNTS if before != after else ():
            if getattr(module, attribute, None) == before:
                self._set(module, attribute, after)

    def _resize_config(
        self, model: PreTrainedModel, slots: tuple[str, ...], before: int, after: int
    ) -> None:
        embedding = input_embeddings(model)
        if embedding not in [self._target.slot(slot)[0] for slot in slots]:
            return
        for owner in (model, model.base_model, model.config, model.config.get_text_config()):
            if getattr(owner, "vocab_size", None) == before:
                self._set(owner, "vocab_size", after)

    def _set(self, owner: object, attribute: str, value: object) -> None:
        original = getattr(owner, attribute)
        self._undo.append(lambda: setattr(owner, attribute, original))
        setattr(owner, attribute, value)


def _split_from_owner(changes: list[TensorChange]) -> list[tuple[TensorChange, TensorChange]]:
    """Records that share a live parameter with the record of its first owner, and that record."""
    owners = {
        change.view.owners[0]: change
        for change in changes
        if len(change.view.owners) > 1 and change.view.owners[0] in change.slots
    }
    return [
        (change, owners[change.view.owners[0]])
        for change in changes
        if change.view.owners[0] in owners and change is not owners[change.view.owners[0]]
    ]


def _copy(place: Tensor, original: Tensor) -> None:
    place.copy_(original)


Mode = Literal["merged", "side"]


class Attachment(NotCopyable):
    """Packs in use on a model, until `detach`. Made by `attach`.

    Attributes:
        model: the live model.
        packs: by the index that `route` takes.
        mode: "merged" or "side".
    """

    def __init__(self, model: PreTrainedModel, packs: Sequence[SkillPack], mode: Mode):
        check_model(model)
        self.model = model
        self.packs: dict[int, SkillPack] = {}
        self.mode = mode
        self._next_index = 0
        with registered(model, self):
            self._target = LiveTarget(model)
            check_packs(self._target, packs)
            self._backend: MergedWeights | SidePacks = (
                MergedWeights(self._target, packs[0])
                if mode == "merged"
                else SidePacks(self._target)
            )
            self._apply(packs)

    def __deepcopy__(self, memo: object) -> None:
        """None for a merged pack: a copy of the model keeps the tuned weights as its own.

        Raises: AttachError for packs beside the model.
        """
        if self.mode == "side":
            super().__deepcopy__(memo)

    def __reduce__(self) -> Any:
        """None for a merged pack, as in a copy. Raises: AttachError for packs beside the model."""
        self.__deepcopy__(None)
        return type(None), ()

    def add(self, pack: SkillPack) -> int:
        """Load one more pack beside the model; the rows routed so far stay as they are.

        Tensors of the target that an earlier pack verified are not read again.

        Returns: the pack's index. An index is never used again.
        Raises: AttachError in merged mode, or for a pack that cannot be attached beside the model;
            PackMismatchError when the model is not its target; CorruptPackError. Nothing of the
            pack is then attached.
        """
        side = self._require_side()
        check_packs(self._target, [pack])
        check_configuration(self.model, pack)
        index = self._next_index
        side.add(index, pack)
        self.packs[index] = pack
        self._next_index += 1
        return index

    def drop(self, index: int) -> None:
        """Forget a pack and free its memory. Rows that use it have to be routed again.

        Raises: AttachError in merged mode, or for an index without a pack.
        """
        side = self._require_side()
        self._check_index(index)
        side.drop(index)
        del self.packs[index]

    def nbytes(self, index: int) -> int:
        """Bytes that a pack takes in memory.

        Raises: AttachError in merged mode, or for an index without a pack.
        """
        side = self._require_side()
        self._check_index(index)
        return side.nbytes(index)

    def route(self, rows: Sequence[PackChoice], stacked: bool = False) -> None:
        """Choose the packs of every row of the next batches.

        A row uses the target (None, or no weight but 0), one pack (its index), or a mixture

            W + Σ_i w_i ΔW_i          (an index → weight mapping; every tensor alike)

        A batch may hold each row k times in a row, as beam search makes it.

        The choice holds for batches that this thread runs; a thread that never routed uses the only
        choice that any thread made, and is refused once there was a second one.

        Args:
            rows: the choice of each row.
            stacked: linear layers multiply all rows by the factors of all their packs at once, and
                mask what is not a row's own. It is faster where rows have one token each; a copy of
                the factors is kept, and the rounding of a row depends on the others' packs.
        Raises: AttachError in merged mode, for no rows, an index without a pack, a weight that is
            not finite, or rows of different packs on a model that does not keep rows apart.
        """
        side = self._require_side("a merged pack serves every row")
        side.route(choose_rows(self.packs, rows, stacked))

    def detach(self) -> None:
        """Leave the model as it was before, bit for bit; a second call does nothing.

        What was trained in a merged pack's tensors meanwhile is undone too, with a warning.
        """
        self._backend.undo()
        release(self.model, self)

    def _apply(self, packs: Sequence[SkillPack]) -> None:
        try:
            self._backend.apply()
            if isinstance(self._backend, MergedWeights):
                self.packs = dict(enumerate(packs))
                return
            for pack in packs:
                self.add(pack)
            if len(packs) < 2:
                only = choose_rows(self.packs, [0 if packs else None])
                self._backend.routing.set_default(only)
        except BaseException:
            self._backend.undo()
            raise

    def _require_side(self, why: str = "the packs of a merged attachment are fixed") -> SidePacks:
        if not isinstance(self._backend, SidePacks):
            raise AttachError(f'{why}; attach with mode="side"')
        if attachment_of(self.model) is not self:
            raise AttachError("this attachment was detached; attach the packs again")
        return self._backend

    def _check_index(self, index: int) -> None:
        if index not in self.packs:
            raise AttachError(f"no pack {index!r} is attached; it may have been dropped before")


def attach(
    model: PreTrainedModel, packs: SkillPack | Sequence[SkillPack], mode: Mode = "merged"
) -> Attachment:
    """Put packs to use on a live model, reversibly.

    "merged" copies one pack's tuned tensors into the model: full speed, one pack for every row.
    "side" leaves the target's bytes alone and adds each pack's part to the activations: any number
    of packs, none included, each row of a batch its own. One pack serves every row until others
    are routed; none leaves them to the target; several wait for `route`.

    Raises: PackMismatchError when the model is not the target of every pack, CorruptPackError for
        a damaged pack, AttachError for what cannot be attached in this way. The model is then
        unchanged.
    """
    chosen = (packs,) if isinstance(packs, SkillPack) else tuple(packs)
    if mode not in ("merged", "side"):
        raise AttachError(f'mode is {mode!r}; expected "merged" or "side"')
    if mode == "merged" and not chosen:
        raise AttachError('no pack was given; pass one SkillPack, or attach with mode="side"')
    if mode == "merged" and len(chosen) > 1:
        raise AttachError(
            f'{len(chosen)} packs cannot share the weights; attach with mode="side", or merge them '
            "into one checkpoint"
        )
    return Attachment(model, chosen, mode)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`, bit for bit. Raises: AttachError when nothing is attached."""
    attachment = attachment_of(model)
    if attachment is None:
        raise AttachError("nothing is attached to this model; attach a pack first")
    attachment.detach()


@contextmanager
def attached(
    model: PreTrainedModel, packs: SkillPack | Sequence[SkillPack], mode: Mode = "merged"
) -> Iterator[Attachment]:
    """Attach packs for the length of a block; they are detached also after an exception.

    Raises: PackMismatchError, CorruptPackError or AttachError, and leaves the model unchanged.
    """
    attachment = attach(model, packs, mode)
    try:
        yield attachment
    finally:
        attachment.detach()


@contextmanager
def without_packs(model: PreTrainedModel) -> Iterator[None]:
    """The model runs as the plain target for the length of a block, also with packs beside it.

    Raises: AttachError for a pack that is merged into the weights.
    """
    attachment = attachment_of(model)
    if attachment is None:
        yield
        return
    side = attachment._require_side("a merged pack hides the target")
    with side.routing.using(choose_rows((), [None])):
        yield
