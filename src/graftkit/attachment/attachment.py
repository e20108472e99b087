"""Attach: reversible use of packs on a live model.

live        which models packs can be attached to
check       is this model the target, and where does each tensor belong
configuration  a tuned config.json, undone with the weights, or refused
tokenizers  the tokenizer of a tuned model, out of its pack
merged      one pack in the model's own parameters, originals kept
side        packs beside the model, chosen row by row of a batch
modules     what packs do in one module
updates     one matrix of a delta at run time: factors, rows or dense
mixtures    what every row of a batch uses: the target, a pack, a weighted sum
routing     the choice for the batch that runs
batches     one batch at a time, each kind of call watched once
coverage    whether the model reads a weight past its module
separation  whether rows of one batch may use different packs
probe       short random batches to find out
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformers import PreTrainedModel

from graftkit.attachment.configuration import check_configuration
from graftkit.attachment.merged import MergedPack
from graftkit.attachment.rows import PackChoice, choose_rows
from graftkit.attachment.side import SidePacks
from graftkit.attachment.target import (
    LiveTarget,
    NotCopyable,
    attachment_of,
    check_model,
    check_packs,
    claimed,
    release,
)
from graftkit.errors import AttachError
from graftkit.skillpack import SkillPack

__all__ = ["Attachment", "Mode", "PackChoice", "attach", "attached", "detach", "without_packs"]

Mode = Literal["merged", "side"]


class Attachment(NotCopyable):
    """Packs in use on a model, until `detach`.

    Attributes:
        packs: by their index in `route`.
        mode: "merged" or "side".
    """

    def __init__(self, model: PreTrainedModel, packs: Sequence[SkillPack], mode: Mode):
        check_model(model)
        self.model = model
        self.packs: dict[int, SkillPack] = {}
        self.mode = mode
        self._next = 0
        with claimed(model, self):
            self._target = LiveTarget(model)
            check_packs(self._target, packs)
            self._applied: MergedPack | SidePacks = (
                MergedPack(self._target, packs[0]) if mode == "merged" else SidePacks(self._target)
            )
            self._apply(packs)

    def __deepcopy__(self, memo: object) -> None:
        """None for a merged pack: a copy of its model is one of its own, with the tuned weights.

        Raises: AttachError for packs beside the model.
        """
        if self.mode == "side":
            super().__deepcopy__(memo)

    def __reduce__(self) -> Any:
        """As `__deepcopy__`, for pickle."""
        self.__deepcopy__(None)
        return type(None), ()

    def add(self, pack: SkillPack) -> int:
        """Load one more pack beside the model; the rows routed so far stay as they are.

        The target is not read again where an earlier pack was of the same one.
        Returns: the pack's index, one that no pack had before.
        Raises: AttachError in merged mode, or as `attach`; all is then as before.
        """
        paths = self._side_paths()
        check_packs(self._target, [pack])
        check_configuration(self.model, pack)
        paths.add(self._next, pack)
        self.packs[self._next] = pack
        self._next += 1
        return self._next - 1

    def drop(self, index: int) -> None:
        """Forget a pack and free its memory. Rows that use it have to be routed again.

        Raises: AttachError in merged mode, or for an index without a pack.
        """
        paths = self._side_paths()
        self._check_index(index)
        paths.drop(index)
        del self.packs[index]

    def nbytes(self, index: int) -> int:
        """Bytes that a pack takes in memory. Raises: AttachError as `drop`."""
        paths = self._side_paths()
        self._check_index(index)
        return paths.nbytes(index)

    def route(self, rows: Sequence[PackChoice]) -> None:
        """Choose the packs of every row of the next batches.

        A row uses the target (None, or no weight but 0), one pack (its index), or a mixture

            W + Σ_i w_i ΔW_i          (an index → weight mapping; every tensor alike)

        A batch may hold each row k times in a row, as beam search makes it.

        Raises: AttachError in merged mode, or for an index without a pack.
        """
        paths = self._side_paths("a merged pack serves every row")
        paths.route(choose_rows(self.packs, rows))

    def detach(self) -> None:
        """Leave the model as it was before, bit for bit; a second call does nothing.

        What was trained in a merged pack's tensors meanwhile is undone too, with a warning.
        """
        self._applied.undo()
        release(self.model, self)

    def _apply(self, packs: Sequence[SkillPack]) -> None:
        try:
            self._applied.apply()
            if isinstance(self._applied, MergedPack):
                self.packs = dict(enumerate(packs))
                return
            for pack in packs:
                self.add(pack)
            if len(packs) < 2:
                default = choose_rows(self.packs, [0 if packs else None])
                self._applied.routing.set_default(default)
        except BaseException:
            self._applied.undo()
            raise

    def _side_paths(self, why: str = "the packs of a merged attachment are fixed") -> SidePacks:
        if not isinstance(self._applied, SidePacks):
            raise AttachError(f'{why}; attach with mode="side"')
        if attachment_of(self.model) is not self:
            raise AttachError("this attachment was detached; attach the packs again")
        return self._applied

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
    """`attach` for the length of a block; detached afterwards, also after an exception."""
    attachment = attach(model, packs, mode)
    try:
        yield attachment
    finally:
        attachment.detach()


@contextmanager
def without_packs(model: PreTrainedModel) -> Iterator[None]:
    """The target alone for the length of a block, whatever packs are attached beside it.

    Raises: AttachError for a pack that is merged into the weights.
    """
    attachment = attachment_of(model)
    if attachment is None:
        yield
        return
    paths = attachment._side_paths("a merged pack hides the target")
    with paths.routing.using(choose_rows((), [None])):
        yield
