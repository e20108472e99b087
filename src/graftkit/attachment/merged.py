"""One pack written into the model's own parameters, with the original bytes kept aside."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftkit.attachment.configuration import TunedConfiguration
from graftkit.attachment.target import LiveTarget, TensorChange, find_changes
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
