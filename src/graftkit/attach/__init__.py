"""Attach: reversible use of packs on a live model.

check     is this model the target, and where does each tensor belong
merged    one pack in the model's own parameters, originals kept
side      packs beside the model, chosen row by row of a batch
updates   one matrix of a delta at run time: factors, rows or dense
routing   which entries of a batch use which pack
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedModel

from graftkit.attach.check import LiveTarget, check_packs
from graftkit.attach.merged import MergedWeights
from graftkit.attach.routing import Routing
from graftkit.attach.side import SidePaths
from graftkit.errors import AttachError
from graftkit.skillpack import SkillPack

__all__ = ["Attachment", "Mode", "attach", "attached", "detach"]

Mode = Literal["merged", "side"]

# Where a model remembers its attachment.
_MARK = "_graftkit_attachment"


class Attachment:
    """Packs in use on a model, until `detach`.

    Attributes:
        packs: in the order of their indices in `route`.
        mode: "merged" or "side".
    """

    def __init__(
        self, model: PreTrainedModel, packs: tuple[SkillPack, ...], mode: Mode, target: LiveTarget
    ):
        self.model = model
        self.packs = packs
        self.mode = mode
        self._routing = Routing(len(packs))
        self._applied: MergedWeights | SidePaths = (
            MergedWeights(target, packs[0])
            if mode == "merged"
            else SidePaths(target, packs, self._routing)
        )

    def route(self, rows: Sequence[int | None]) -> None:
        """Choose the pack of every row of the next batches; None leaves a row to the target.

        A batch may hold each row k times in a row, as beam search makes it.
        Raises: AttachError in merged mode, or for an index without a pack.
        """
        if self.mode == "merged":
            raise AttachError('a merged pack serves every row; attach with mode="side" to route')
        self._routing.choose(rows)

    def detach(self) -> None:
        """Leave the model as it was before, bit for bit; a second call does nothing."""
        self._applied.undo()
        if getattr(self.model, _MARK, None) is self:
            delattr(self.model, _MARK)

    def _apply(self) -> None:
        try:
            self._applied.apply()
        except BaseException:
            self._applied.undo()
            raise
        setattr(self.model, _MARK, self)


def attach(
    model: PreTrainedModel, packs: SkillPack | Sequence[SkillPack], mode: Mode = "merged"
) -> Attachment:
    """Put packs to use on a live model, reversibly.

    "merged" copies one pack's tuned tensors into the model: full speed, one pack for every row.
    "side" leaves the target's bytes alone and adds each pack's part to the activations: any number
    of packs, each row of a batch its own.

    Raises: PackMismatchError when the model is not the target of every pack, CorruptPackError for
        a damaged pack, AttachError for what cannot be attached in this way. The model is then
        unchanged.
    """
    chosen = (packs,) if isinstance(packs, SkillPack) else tuple(packs)
    if mode not in ("merged", "side"):
        raise AttachError(f'mode is {mode!r}; expected "merged" or "side"')
    if getattr(model, _MARK, None) is not None:
        raise AttachError("the model has packs attached already; detach them first")
    if not chosen:
        raise AttachError("no pack was given; pass one SkillPack or several")
    if mode == "merged" and len(chosen) > 1:
        raise AttachError(
            f'{len(chosen)} packs cannot share the weights; attach with mode="side", or merge them '
            "into one checkpoint"
        )
    target = LiveTarget(model)
    check_packs(target, chosen)
    attachment = Attachment(model, chosen, mode, target)
    attachment._apply()
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`, bit for bit. Raises: AttachError when nothing is attached."""
    attachment = getattr(model, _MARK, None)
    if attachment is None:
        raise AttachError("nothing is attached to this model; attach a pack first")
    attachment.detach()


@contextmanager
def attached(
    model: PreTrainedModel, packs: SkillPack | Sequence[SkillPack], mode: Mode = "merged"
) -> Iterator[Attachment]:
    """`attach` for the length of a block; detached afterwards, also after an exception."""
    attachment = attach(model, packs, mode)
    try:
        yield attachment
    finally:
        attachment.detach()
