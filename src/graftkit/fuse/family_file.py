"""The family file: one shared part and the private part of every skill (docs/family-format.md)."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from graftkit.compress.codes import decode_codes, encode_codes
from graftkit.errors import CorruptPackError, FamilyError, PackFault, PackFormatError
from graftkit.skillpack import SkillPack
from graftkit.skillpack.container import (
    Kind,
    cut_entries,
    header_bytes,
    parse_header,
    payloads_digest,
    reading,
    write_parts,
)
from graftkit.skillpack.manifest import (
    Count,
    Digest,
    FileRecord,
    Finite,
    Manifest,
    Part,
    TargetInfo,
    TunedInfo,
)
from graftkit.skillpack.rules import check_files, load_json

FAMILY_VERSION = 1
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Names of skills, as those of packs in a library."""

_KIND = Kind("skillfamily", "family of packs", FAMILY_VERSION)
_SHARED = "shared"
_COUNT = struct.Struct("<I")  # of places
_PLACE = struct.Struct("<fI")  # scale, and bytes of the mask behind all places

Content = Sequence[bytes | memoryview]
"""One entry of the file, in pieces."""


class Member(Part):
    """One skill of a family."""

    name: Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")]
    """What the skill is called."""
    tuned: TunedInfo
    """The tuned model of its pack."""
    pack_blake3: Digest
    """Digest of the pack it was made from."""
    licence: str | None = None
    """Licence of that pack."""
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Relative Frobenius error of its delta against that of the pack."""
    files: tuple[FileRecord, ...] = ()
    """Side files that its pack changes, and that are not those of the shared part."""

    @property
    def stored_files(self) -> tuple[str, ...]:
        """Side files that have bytes of their own in the family."""
        return tuple(f.name for f in self.files if f.prefix + f.suffix < f.bytes)


class FamilyManifest(Part):
    """Everything a family says about itself."""

    format_version: Annotated[int, Field(ge=FAMILY_VERSION, le=FAMILY_VERSION)] = FAMILY_VERSION
    """Version of the format."""
    generator: str
    """Name and version of the writer."""
    target: TargetInfo
    """The target of every skill."""
    method: Literal["emr", "tall", "twin"]
    """How private parts are to be read: masks, or for twin packs."""
    settings: dict[str, Finite]
    """Settings of the method."""
    budget: str | None = None
    """Budget asked, as text."""
    budget_bytes: Count | None = None
    """Budget in bytes of the file."""
    payload_blake3: Digest
    """Digest of everything behind the header."""
    skills: Annotated[tuple[Member, ...], Field(min_length=2)]
    """The skills, in the order of the packs."""

    def to_json(self) -> str:
        """Compact JSON without defaults; the same manifest gives the same text."""
        told = self.model_dump(mode="json", exclude_defaults=True)
        told |= {"format_version": self.format_version}
        return json.dumps(told, separators=(",", ":"), sort_keys=True, ensure_ascii=False)

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entries, in the order of the file."""
        names = [_SHARED]
        for skill in self.skills:
            names.append(skill_entry(skill.name))
            names += [file_entry(skill.name, name) for name in skill.stored_files]
        return tuple(names)


def skill_entry(skill: str) -> str:
    """Name of the entry with a skill's private part."""
    return f"skill/{skill}"


def file_entry(skill: str, name: str) -> str:
    """Name of the entry with a side file of a skill."""
    return f"skill/{skill}/{name}"


class Masks:
    """Masks and scales of one skill, for the tensors that the shared part changes."""

    def __init__(self, content: memoryview, names: Sequence[str]):
        """Raises: CorruptPackError for anything but one place and one mask for each name."""
        self.nbytes = len(content)
        start = _COUNT.size + len(names) * _PLACE.size
        if len(content) < start or _COUNT.unpack_from(content) != (len(names),):
            raise CorruptPackError(f"the masks are not those of {len(names)} tensors")
        self._places: dict[str, tuple[float, memoryview]] = {}
        for name, (scale, size) in zip(
            names, _PLACE.iter_unpack(content[_COUNT.size : start]), strict=True
        ):
            if not np.isfinite(scale):
                raise CorruptPackError(f"tensor {name}: the scale of its mask is {scale}")
            self._places[name] = scale, content[start : start + size]
            start += size
        if start != len(content):
            raise CorruptPackError(f"masks take {start} bytes, found {len(content)}")

    @staticmethod
    def encode(masks: Sequence[tuple[bytes, float]]) -> bytes:
        """The bytes of coded masks with their scales, in the order of tensors."""
        places = [_PLACE.pack(scale, len(mask)) for mask, scale in masks]
        return b"".join([_COUNT.pack(len(masks)), *places, *(mask for mask, _ in masks)])

    def apply(self, name: str, shared: Tensor) -> Tensor:
        """s M ⊙ τ̂ of one tensor, float32. Raises: CorruptPackError."""
        if name not in self._places:
            return torch.zeros_like(shared)
        scale, payload = self._places[name]
        return apply_mask(decode_mask(payload, shared), scale, shared)


def apply_mask(mask: Tensor, scale: float, shared: Tensor) -> Tensor:
    """s M ⊙ τ̂, with s rounded to float32 as the file keeps it."""
    return (shared * mask).mul_(float(np.float32(scale)))


def encode_mask(mask: Tensor, shared: Tensor) -> bytes:
    """The mask where the shared part is not zero, entropy-coded; nothing where it is all zero.

    Codes are 1 where an entry is dropped: most are kept, and the coder expects small codes.
    """
    dropped = (~mask[shared != 0]).to(torch.int32).numpy()
    return encode_codes(dropped.reshape(1, -1)) if dropped.size else b""


def decode_mask(payload: memoryview, shared: Tensor) -> Tensor:
    """Inverse of `encode_mask`, bool in the shared part's shape. Raises: CorruptPackError."""
    where = shared != 0
    count = int(where.count_nonzero())
    if count == 0 and len(payload):
        raise CorruptPackError(f"a mask of {len(payload)} bytes over nothing")
    mask = torch.zeros(shared.shape, dtype=torch.bool)
    if count:
        codes = decode_codes(payload, (1, count))[0]
        if codes.min() < 0 or codes.max() > 1:
            raise CorruptPackError("a mask holds a number that is neither 0 nor 1")
        mask[where] = torch.from_numpy(codes == 0)
    return mask


@dataclass(frozen=True)
class FamilyParts:
    """A family as it was read.

    Attributes:
        private: per skill, masks, or for twin the pack of its rest. files: payloads of its own
            side files, by name of skill and file.
    """

    manifest: FamilyManifest
    nbytes: int
    shared: SkillPack
    private: Mapping[str, Masks | SkillPack]
    files: Mapping[str, Mapping[str, memoryview]]


def family_header(manifest: FamilyManifest, sizes: Sequence[int]) -> bytes:
    """Length field and header. `sizes`: bytes of every entry, in the order of the file."""
    entries = zip(manifest.entries, sizes, strict=True)
    return header_bytes(_KIND.format, FAMILY_VERSION, manifest.to_json(), entries)


def write_family(path: Path, manifest: FamilyManifest, contents: Sequence[Content]) -> None:
    """Write a family; the digest of `contents`, one per entry, is put in. Raises: OutputError."""
    digest = payloads_digest(piece for content in contents for piece in content)
    sealed = manifest.model_copy(update={"payload_blake3": digest})
    header = family_header(sealed, [sum(map(len, content)) for content in contents])
    write_parts(path, header, (piece for content in contents for piece in content))


def read_family(path: Path) -> FamilyParts:
    """Open a family and check all of it: digests, both kinds of parts, one target for all.

    Raises: FamilyError, whose message starts with the path.
    """
    try:
        with reading(path, _KIND) as view:
            return _parse(view)
    except PackFormatError as error:
        raise FamilyError(str(error)) from error


def _parse(view: memoryview) -> FamilyParts:
    text, _, header, data = parse_header(view, _KIND)
    manifest = _parse_manifest(text)
    entries = cut_entries(manifest.entries, header, data)
    if payloads_digest([data]) != manifest.payload_blake3:
        raise CorruptPackError("the parts do not match their digest", PackFault.PAYLOAD_DIGEST)
    shared = SkillPack.parse(entries[_SHARED])
    _check_part(shared, shared, manifest, "the shared part")
    private: dict[str, Masks | SkillPack] = {}
    for skill in manifest.skills:
        content = entries[skill_entry(skill.name)]
        if manifest.method == "twin":
            rest = SkillPack.parse(content)
            _check_part(rest, shared, manifest, f"the part of {skill.name}")
            private[skill.name] = rest
        else:
            private[skill.name] = Masks(content, masked_names(shared))
    files = {
        skill.name: {name: entries[file_entry(skill.name, name)] for name in skill.stored_files}
        for skill in manifest.skills
    }
    return FamilyParts(manifest, len(view), shared, private, files)


def masked_names(shared: SkillPack) -> list[str]:
    """Tensors that have masks: those that the shared part changes."""
    return [record.name for record in shared.manifest.tensors if record.codec != "zero"]


def _parse_manifest(text: str) -> FamilyManifest:
    load_json(text, PackFault.INVALID_MANIFEST)  # duplicate keys, which pydantic lets pass
    try:
        manifest = FamilyManifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CorruptPackError(
            f"manifest: {place}: {first['msg']}", PackFault.INVALID_MANIFEST
        ) from error
    names = [skill.name for skill in manifest.skills]
    if len(set(names)) != len(names):
        raise CorruptPackError("a skill stands twice", PackFault.INVALID_MANIFEST)
    for skill in manifest.skills:
        check_files(skill.files)
    return manifest


def _check_part(part: SkillPack, shared: SkillPack, family: FamilyManifest, what: str) -> None:
    """A pack inside the family is of the family's target and changes no shape."""
    manifest = part.manifest
    if not isinstance(manifest, Manifest) or manifest.target != family.target:
        raise CorruptPackError(f"{what} is not of the family's target")
    whole = [(r.name, r.dtype, r.shape, r.blake3) for r in shared.manifest.tensors]
    if whole != [(r.name, r.dtype, r.shape, r.blake3) for r in manifest.tensors]:
        raise CorruptPackError(f"{what} has other tensors than the shared part")
    for record in manifest.tensors:
        if record.base is not None or record.tuned_shape is not None:
            raise CorruptPackError(f"{what} changes the shape of {record.name} or adds it")
