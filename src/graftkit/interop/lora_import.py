"""From a LoRA adapter to a pack: its factors and whole tensors are stored bit for bit."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.checkpoint import DTYPES, FLOAT_DTYPES, Checkpoint, tensor_digest
from graftkit.compress.codecs import join_payloads, matrix_shape
from graftkit.compress.factors import store
from graftkit.errors import CheckpointError, CheckpointMismatchError, CorruptPackError
from graftkit.interop.adapter import INSTEAD, Adapter, TensorMap, TensorPlace
from graftkit.outputs import claimed
from graftkit.packing.encode import (
    GENERATOR,
    TensorTask,
    draft_record,
    encode_added_rows,
    encode_lossless,
    target_info,
)
from graftkit.packing.measure import Scan
from graftkit.packing.pairs import TensorPair
from graftkit.parallel import in_threads
from graftkit.progress import Progress, silent
from graftkit.skillpack import SkillPack
from graftkit.skillpack.container import file_entry, payloads_digest
from graftkit.skillpack.manifest import FileRecord, Manifest, Omission, TensorRecord, TunedInfo
from graftkit.skillpack.pack import changed_files, encode_file

RECIPE = "lora"
"""Recipe that the manifest of an imported adapter names."""

# These files in an adapter's directory describe its base model, not what it learned.
_NOT_LEARNED = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class _Edit:
    """The change of one tensor; without factors or whole it has a record but no change.

    source: the adapter's name of the change. factors: payload of the factors that are added.
    whole: the adapter's tensor that replaces it.
    """

    place: TensorPlace
    source: str = ""
    factors: bytes = b""
    whole: str | None = None


def import_lora(
    target: str | Path | Checkpoint,
    adapter: str | Path,
    file: str | Path,
    progress: Progress | None = None,
    force: bool = False,
) -> SkillPack:
    """Write a PEFT LoRA adapter of `target` as a pack (see `read_lora`).

    Args:
        file: the .skillpack to write. force: replace an existing file.
    Returns: the pack.
    Raises: CheckpointError for anything but a plain LoRA; CheckpointMismatchError for an adapter
        of another model; OutputError. Nothing is written then.
    """
    inputs = [target.path if isinstance(target, Checkpoint) else target, adapter]
    with claimed(file, ["import-lora", *inputs], inputs=inputs, force=force) as claim:
        pack = read_lora(target, adapter, progress)
        claim.open_work()
        pack.save(claim.result)
    return pack


def read_lora(
    target: str | Path | Checkpoint, adapter: str | Path, progress: Progress | None = None
) -> SkillPack:
    """A PEFT LoRA adapter of `target` as a pack in memory.

        W' = W + (scale · B) A,   scale = α / r, or α / √r where the adapter uses rsLoRA

    A and B are stored bit for bit. modules_to_save and biases are stored exactly in the target's
    dtype, in which PEFT loads them; rounding is listed under `omitted`.

    Args:
        adapter: a directory with adapter_config.json and adapter_model.safetensors.
    Raises: CheckpointError for anything but a plain LoRA; CheckpointMismatchError for an adapter
        of another model.
    Source: LoRA (arXiv 2106.09685) 4.1; rsLoRA (arXiv 2312.03732); keys and settings as PEFT
        0.21 saves and loads them.
    """
    checkpoint = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
    job = _Import(checkpoint, Adapter.open(adapter))
    return job.run(progress or silent)


class _Import:
    """The import of one adapter."""

    def __init__(self, target: Checkpoint, adapter: Adapter):
        self.target, self.adapter, self.places = target, adapter, TensorMap(target)
        self.omitted: list[Omission] = []
        self.edits = self._find_edits()
        self.untied = self._untie()
        self.tokens = self._find_vocabulary()

    def run(self, progress: Progress) -> SkillPack:
        """Digest the target, encode every edit, and put the pack together."""
        digests = dict(self._digests(progress))
        scans = [Scan(name, digest, digest, changed=False) for name, digest in digests.items()]
        by_name = {scan.name: scan for scan in scans}
        names = sorted({*self.target.tensors, *self.edits})
        encoded = [self._encode(name, by_name) for name in names]
        files = self._files()
        payloads = {record.name: payload for record, payload in encoded if payload}
        payloads |= {file_entry(record.name): payload for record, payload in files if payload}
        manifest = Manifest(
            generator=GENERATOR,
            target=target_info(self.target, scans),
            tuned=TunedInfo(name=self.adapter.weights.name),
            recipe=RECIPE,
            omitted=tuple(self.omitted),
            provenance=self._provenance(),
            payload_blake3=payloads_digest(payloads.values()),
            files=tuple(record for record, _ in files),
            tensors=tuple(record for record, _ in encoded),
        )
        pack = SkillPack(manifest, {name: memoryview(part) for name, part in payloads.items()})
        self._check_sums(pack, progress)
        return pack

    def _check_sums(self, pack: SkillPack, progress: Progress) -> None:
        """Check that target + factors is finite. Raises: CheckpointError."""
        records = [record for record in pack.manifest.tensors if record.codec == "factors"]
        for done, record in enumerate(records):
            progress("checking", done, len(records))
            try:
                pack.rebuild(record.name, self.target.read)
            except CorruptPackError as error:
                raise CheckpointError(
                    f"{self.adapter.path}: {record.name}: target + adapter is beyond what "
                    f"{record.result_dtype} holds; use the target in float32"
                ) from error

    def _find_edits(self) -> dict[str, _Edit]:
        """Every change, by the name of its tensor; all shapes are checked."""
        weights = {module: f"{module}.weight" for module in self.adapter.modules}
        places = self.places.find([*weights.values(), *self.adapter.whole])
        edits: dict[str, _Edit] = {}
        for module, parameter in weights.items():
            pieces = [] if places[parameter] else self._expert_edits(module)
            if not pieces:
                pieces = [self._module_edit(self._existing(places[parameter], module), module)]
            for edit in pieces:
                self._add(edits, edit)
        for parameter, key in self.adapter.whole.items():
            place = self._existing(places[parameter], parameter)
            if not self._is_target(place, key):
                self._add(edits, _Edit(place, key, whole=key))
        return edits

    def _module_edit(self, place: TensorPlace, module: str) -> _Edit:
        """Factors of one matrix."""
        left, right = self.adapter.matrices(module)
        pair, shape = self.places.pair(place), (left.shape[0], right.shape[1])
        _, expected = matrix_shape(pair.target.shape, pair.layout)
        if pair.gathered and shape[0] != expected[0] and shape[1] == expected[1]:
            raise CheckpointMismatchError(
                f"{self.adapter.path}: {module} has factors for a vocabulary of {shape[0]} tokens, "
                f"the target {self.target.path} has {expected[0]} (it was resized); {INSTEAD}"
            )
        if len(pair.target.shape) != 2 or shape != expected:
            raise CheckpointMismatchError(
                f"{self.adapter.path}: {module} is (out, in) = {list(shape)}, in the target "
                f"{self.target.path} it is {list(expected)}; use the model that the adapter was "
                "trained on"
            )
        return _Edit(place, module, store(self.adapter.factors(module, left, right)))

    def _expert_edits(self, module: str) -> list[_Edit]:
        """Factors of a stack of experts, for each of its tensors on disk; else empty.

        PEFT wraps a module once for each parameter that it adapts, so names end in base_layer.
        """
        left, right = self.adapter.matrices(module)
        stacks = self.places.stacks(module.replace(".base_layer", ""))
        fitting = [stack for stack in stacks if stack.fits(left, right)]
        pieces = fitting[0].pieces() if len(fitting) == 1 else None
        edits = []
        for name, piece in (pieces or {}).items():
            parts = piece.cut(fitting[0], left, right)
            stored = [store(self.adapter.factors(fitting[0].parameter, *part)) for part in parts]
            edits.append(
                _Edit(self._existing(TensorPlace(name), module), module, join_payloads(stored))
            )
        return edits

    def _existing(self, place: TensorPlace | None, name: str) -> TensorPlace:
        """The place of `name`, if it exists and is float. Raises: CheckpointMismatchError."""
        if place is None:
            raise CheckpointMismatchError(
                f"{self.adapter.path}: changes {name}, which has no weight of its own in "
                f"{self.target.path} (another model, or a stack of experts); use the model that "
                "the adapter was trained on, or merge with PEFT and pack the result"
            )
        info = self.places.pair(place).target
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointMismatchError(
                f"{self.target.path}: {info.name} is {info.dtype}; expected one of "
                f"{', '.join(FLOAT_DTYPES)} (dequantize the model first)"
            )
        return place

    def _add(self, edits: dict[str, _Edit], edit: _Edit) -> None:
        earlier = edits.setdefault(edit.place.name, edit)
        if earlier is not edit:
            ways = f"{earlier.source} and {edit.source}"
            raise CheckpointMismatchError(
                f"{self.adapter.path}: {ways} both change {edit.place.name}; use the model that "
                "the adapter was trained on"
            )

    def _is_target(self, place: TensorPlace, key: str) -> bool:
        """Whether a whole tensor equals the target's."""
        pair = self._whole_pair(place, key)
        if pair.resized:
            return False
        return _same_bits(self._whole(place, key), self.target.read(pair.target.name))

    def _whole_pair(self, place: TensorPlace, key: str) -> TensorPair:
        """The target's tensor and its replacement, which may have more or fewer tokens.

        Raises: CheckpointMismatchError for any other shape.
        """
        pair, shape = self.places.pair(place), self.adapter.weights.tensors[key].shape
        pair = replace(pair, tuned=replace(pair.tuned, shape=shape))
        if pair.resized and not pair.resizes_vocabulary:
            raise CheckpointMismatchError(
                f"{self.adapter.path}: {key} is {list(shape)}, in the target {self.target.path} it "
                f"is {list(pair.target.shape)}; use the model that the adapter was trained on"
            )
        return pair

    def _find_vocabulary(self) -> int | None:
        """Size of a vocabulary that was resized for the adapter; None where it was not.

        Raises: CheckpointMismatchError where embedding and head do not have the same tokens.
        """
        sizes = {
            name: pair.tuned.shape[0]
            for name, edit in self.edits.items()
            if edit.whole and (pair := self._whole_pair(edit.place, edit.whole)).resized
        }
        if not sizes:
            return None
        parts = [*self.places.vocabulary(), *(self.places.tied if self.untied else ())]
        missing = [name for name in parts if name not in sizes]
        if missing or len(set(sizes.values())) != 1:
            raise CheckpointMismatchError(
                f"{self.adapter.path}: the vocabulary was resized ({min(sizes)}), but "
                f"{(missing or sorted(sizes)[1:])[0]} does not have the same rows; {INSTEAD}"
            )
        return next(iter(sizes.values()))

    def _whole(self, place: TensorPlace, key: str) -> Tensor:
        """A whole tensor in the target's dtype. Raises: CheckpointError where that overflows."""
        own, dtype = self.adapter.read(key), DTYPES[self.places.pair(place).target.dtype]
        cast = own.to(dtype)
        if not bool(cast.isfinite().all()):
            raise CheckpointError(
                f"{self.adapter.path}: {key} holds numbers beyond {dtype}, the target's dtype; "
                "use the target in float32"
            )
        return cast

    def _untie(self) -> bool:
        """Whether names that share a parameter get different values.

        All of them then get records of their own.
        """
        untied = any(
            (alias in self.edits or owner in self.edits) and not self._same_whole(alias, owner)
            for alias, owner in self.places.tied.items()
        )
        for alias in self.places.tied:
            if untied:
                self.edits.setdefault(alias, _Edit(self.places.place(alias)))
            elif alias not in self.target.tensors:
                self.edits.pop(alias, None)
        return untied

    def _same_whole(self, first: str, second: str) -> bool:
        """Whether one whole tensor replaces both."""
        edits = [self.edits.get(name) for name in (first, second)]
        values = [self._whole(edit.place, edit.whole) for edit in edits if edit and edit.whole]
        return len(values) == 2 and _same_bits(*values)

    def _digests(self, progress: Progress) -> Iterator[tuple[str, str]]:
        names = list(self.target.tensors)
        digests = in_threads(lambda name: tensor_digest(self.target.read(name)), names)
        for done, (name, digest) in enumerate(zip(names, digests, strict=True), start=1):
            progress("reading the target", done, len(names))
            yield name, digest

    def _encode(self, name: str, scans: dict[str, Scan]) -> tuple[TensorRecord, bytes]:
        """Record and payload of one tensor."""
        edit = self.edits.get(name) or _Edit(TensorPlace(name))
        pair = self.places.pair(edit.place)
        scan = scans[pair.target.name]
        if edit.whole is not None:
            pair, whole = (
                self._whole_pair(edit.place, edit.whole),
                self._whole(edit.place, edit.whole),
            )
            self._note_rounding(edit, whole)
            before, added = self.target.read(pair.target.name), b""
            if pair.resized:
                rows = pair.common_rows
                added = encode_added_rows(whole[rows:]) if whole.shape[0] > rows else b""
                before, whole = before[:rows], whole[:rows]
            encoded = encode_lossless(TensorTask(pair, scan, added), (before, whole))
            return encoded.record, encoded.payload
        codec = "factors" if edit.factors else "zero"
        draft = draft_record(TensorTask(pair, scan), codec, len(edit.factors))
        return draft.model_copy(update={"error": 0.0}), edit.factors

    def _note_rounding(self, edit: _Edit, stored: Tensor) -> None:
        own = self.adapter.read(edit.whole or "")
        if not torch.equal(stored.to(own.dtype), own):
            reason = f"trained in {own.dtype}, rounded to {stored.dtype} of the target"
            self.omitted.append(Omission(name=edit.place.name, reason=reason.replace("torch.", "")))

    def _files(self) -> list[tuple[FileRecord, bytes]]:
        """Tokenizer files that the adapter changed, and config.json where it has to change."""
        files = [
            (record, payload)
            for record, payload in changed_files(self.target, self.adapter.weights)
            if record.name not in _NOT_LEARNED and not self._equals_as_json(record.name)
        ]
        if self.untied or self.tokens is not None:
            text = json.dumps(self._changed_config(), indent=2, sort_keys=True) + "\n"
            files.insert(0, encode_file("config.json", text.encode(), None))
        return files

    def _changed_config(self) -> dict[str, Any]:
        """config.json where tied tensors are untied or the vocabulary was resized.

        Raises: CheckpointMismatchError where it has no place for the number of tokens.
        """
        config = copy.deepcopy(self.target.config)
        if self.untied:
            config["tie_word_embeddings"] = False
        if self.tokens is not None:
            nested = config.get("text_config")
            holders = [part for part in (config, nested) if isinstance(part, dict)]
            sized = [part for part in holders if "vocab_size" in part]
            if not sized:
                raise CheckpointMismatchError(
                    f"{self.adapter.path}: the vocabulary was resized to {self.tokens} tokens, but "
                    f"config.json of {self.target.path} has no vocab_size; {INSTEAD}"
                )
            for part in sized:
                part["vocab_size"] = self.tokens
        return config

    def _equals_as_json(self, name: str) -> bool:
        """Whether a JSON file differs in formatting only, as after loading and saving it."""
        states = self.target.side_file(name), self.adapter.weights.side_file(name)
        try:
            old, new = (json.loads(content or b"") for content in states)
        except (ValueError, RecursionError):
            return False
        return bool(old == new)

    def _provenance(self) -> dict[str, str]:
        settings = self.adapter.settings
        entries = {
            "adapter": "PEFT LoRA",
            "adapter_blake3": self.adapter.digest,
            "base_model": settings.base_model_name_or_path,
        }
        return {key: value for key, value in entries.items() if value}


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return tensor_digest(first) == tensor_digest(second)
