"""Attach packs to a live model, choose among them row by row, and detach.

`attach` returns an `Attachment`, which delegates to one of two backends: `MergedWeights` writes one
pack into the model's parameters, `SidePacks` keeps any number beside the model. The package's
docstring follows a row of a batch to its pack.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformers import PreTrainedModel

from graftkit.attachment.configuration import check_configuration
from graftkit.attachment.merged import MergedWeights
from graftkit.attachment.rows import PackChoice, choose_rows
from graftkit.attachment.side import SidePacks
from graftkit.attachment.target import (
    LiveTarget,
    NotCopyable,
    attachment_of,
    check_model,
    check_packs,
    registered,
    release,
)
from graftkit.errors import AttachError
from graftkit.skillpack import SkillPack

__all__ = ["Attachment", "Mode", "PackChoice", "attach", "attached", "detach", "without_packs"]

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

    def route(self, rows: Sequence[PackChoice]) -> None:
        """Choose the packs of every row of the next batches.

        A row uses the target (None, or no weight but 0), one pack (its index), or a mixture

            W + Σ_i w_i ΔW_i          (an index → weight mapping; every tensor alike)

        A batch may hold each row k times in a row, as beam search makes it.

        The choice holds for batches that this thread runs; a thread that never routed uses the only
        choice that any thread made, and is refused once there was a second one.

        Raises: AttachError in merged mode, for no rows, an index without a pack, a weight that is
            not finite, or rows of different packs on a model that does not keep rows apart.
        """
        side = self._require_side("a merged pack serves every row")
        side.route(choose_rows(self.packs, rows))

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
