"""The bytes of a pack: a safetensors file with a manifest in its metadata, payloads behind it.

It is written in one stream. When it is read, header, manifest, entries and digests are checked
before a payload is used (docs/skillpack-format.md, sections 1 and 5).
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from graftkit.errors import (
    CorruptPackError,
    OutputError,
    PackFault,
    PackFormatError,
    UnsupportedVersionError,
)
from graftkit.files import mapped_file, replaced_file
from graftkit.skillpack.manifest import (
    FILE_PREFIX,
    FORMAT_VERSION,
    ROUTER_ENTRY,
    Manifest,
    load_json,
    parse_manifest,
)

FORMAT = "skillpack"
"""Value of `format` in the metadata."""
TENSORS_ENTRY = "tensors"
"""The one entry that holds the payloads of all tensors."""

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000
_MAX_MESSAGE = 400
_NUMBER = re.compile("[1-9][0-9]*")  # int() would refuse thousands of digits, and read others
_METADATA_KEYS = {"format", "version", "manifest", "manifest_blake3"}


def payloads_digest(payloads: Iterable[bytes | memoryview]) -> str | None:
    """Digest of all payloads, in the order of the file; None where there are none."""
    hasher, empty = blake3(), True
    for payload in payloads:
        hasher.update(payload)
        empty = False
    return None if empty else hasher.hexdigest()


def build_header(manifest: Manifest, sizes: Mapping[str, int]) -> bytes:
    """Length field and padded header. `sizes`: payload bytes by name of tensor and side file."""
    text = manifest.to_json()
    header: dict[str, object] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(manifest.format_version),
            "manifest": text,
            "manifest_blake3": blake3(text.encode()).hexdigest(),
        }
    }
    offset = 0
    for name, size in _entries(manifest, sizes):
        end = offset + size
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return _LENGTH.pack(len(encoded)) + encoded


def _entries(manifest: Manifest, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Entries of the header and their lengths, in the order of the file."""
    together = sum(sizes[name] for name in manifest.stored_tensors)
    entries = [(TENSORS_ENTRY, together)] if together else []
    return entries + [(name, sizes[name]) for name in manifest.stored_rest]


def write_container(
    path: Path, manifest: Manifest, payload: Callable[[str], bytes | memoryview]
) -> None:
    """Write a pack.

    Args:
        payload: gives a payload by name; called for all of them in the order of the file, first for
            their sizes, then for their bytes.
    Raises: OutputError, also for a pack that a reader would refuse.
    """
    sizes = {name: len(payload(name)) for name in manifest.payload_order}
    parts = (payload(name) for name in manifest.payload_order)
    try:
        header = readable_header(manifest, sizes)
    except PackFormatError as error:
        raise OutputError(
            f"{path}: not written, because a reader would refuse it: {str(error)[:_MAX_MESSAGE]}"
        ) from error
    _write_parts(path, header, parts)


def readable_header(manifest: Manifest, sizes: Mapping[str, int]) -> bytes:
    """`build_header`, after every check that a reader makes before it reads payloads.

    Raises: PackFormatError.
    """
    try:
        header = build_header(manifest, sizes)
    except (UnicodeEncodeError, ValueError) as error:
        raise CorruptPackError(
            f"the manifest cannot be written as JSON in UTF-8 ({error})", PackFault.INVALID_MANIFEST
        ) from error
    text, _, _ = _parse_header(memoryview(header))
    parse_manifest(text)
    stated = {record.name: record.bytes for record in manifest.tensors if record.has_payload}
    stated |= {ROUTER_ENTRY: manifest.router.nbytes} if manifest.router is not None else {}
    for name, size in stated.items():
        if sizes[name] != size:
            raise CorruptPackError(
                f"{name}: {sizes[name]} bytes, the manifest says {size}",
                PackFault.INVALID_OFFSETS,
            )
    return header


def _write_parts(path: Path, header: bytes, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all, one part behind the other. Raises: OutputError."""
    with replaced_file(path) as partial, partial.open("wb") as file:
        file.write(header)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def read_container(path: Path) -> tuple[Manifest, dict[str, memoryview], int]:
    """Open and check a pack: manifest, payloads by name (mapped, not copied), size of the file.

    Raises: PackFormatError, UnsupportedVersionError, CorruptPackError; each names the path.
    """
    with _reading(path) as view:
        manifest, payloads = parse_pack(view)
    return manifest, payloads, len(view)


@contextmanager
def _reading(path: Path) -> Iterator[memoryview]:
    """The mapped bytes of a file; errors of the block are raised again with the path in front.

    Raises: PackFormatError, UnsupportedVersionError, CorruptPackError.
    """
    try:
        yield mapped_file(path)
    except OSError as error:
        raise PackFormatError(
            f"{path}: cannot be read ({error.strerror or error})", PackFault.NOT_A_SKILLPACK
        ) from error
    except PackFormatError as error:
        # Names in a hostile file can be as long as the file.
        raise type(error)(f"{path}: {str(error)[:_MAX_MESSAGE]}", error.fault) from error


def parse_pack(view: memoryview) -> tuple[Manifest, dict[str, memoryview]]:
    """Manifest and payloads by name of a pack in memory, after all checks.

    Raises: PackFormatError, UnsupportedVersionError, CorruptPackError.
    """
    text, header, data = _parse_header(view)
    manifest = parse_manifest(text)
    return manifest, _payloads(manifest, header, data)


def _parse_header(view: memoryview) -> tuple[str, dict[str, object], memoryview]:
    """The manifest's text, checked against its digest; entries; what follows the header.

    Raises: PackFormatError, UnsupportedVersionError, CorruptPackError.
    """
    if len(view) < _LENGTH.size:
        raise CorruptPackError(
            f"{len(view)} bytes are too few for a SkillPack", PackFault.TRUNCATED
        )
    (length,) = _LENGTH.unpack(view[: _LENGTH.size])
    if length > _MAX_HEADER:
        raise CorruptPackError(
            f"a header of {length} bytes is too large; this is no SkillPack",
            PackFault.HEADER_TOO_LARGE,
        )
    start = _LENGTH.size + length
    if start > len(view):
        raise CorruptPackError(
            f"the header takes {length} bytes, the file ends before", PackFault.TRUNCATED
        )
    try:
        text = bytes(view[_LENGTH.size : start]).decode()
    except UnicodeDecodeError as error:
        raise CorruptPackError("the header is not UTF-8", PackFault.INVALID_HEADER) from error
    header = load_json(text)
    if not isinstance(header, dict):
        raise CorruptPackError("the header is not a JSON object", PackFault.INVALID_HEADER)
    metadata = header.pop("__metadata__", None)
    return _manifest_text(metadata), header, view[start:]


def _manifest_text(metadata: object) -> str:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise PackFormatError(
            f"not a SkillPack (no format={FORMAT} in its metadata)",
            PackFault.NOT_A_SKILLPACK,
        )
    version = metadata.get("version")
    if version in [str(older) for older in range(1, FORMAT_VERSION)]:
        raise UnsupportedVersionError(
            f"format version {version}; this graftkit reads version {FORMAT_VERSION}, "
            "pack the models again",
            PackFault.OLDER_VERSION,
        )
    is_expected = version == str(FORMAT_VERSION)
    if isinstance(version, str) and _NUMBER.fullmatch(version) and not is_expected:
        raise UnsupportedVersionError(
            f"format version {version}; this graftkit reads up to {FORMAT_VERSION}, "
            "upgrade graftkit",
            PackFault.NEWER_VERSION,
        )
    wrong = set(metadata) != _METADATA_KEYS or not is_expected
    if wrong or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptPackError(
            f"metadata is not that of version {FORMAT_VERSION}", PackFault.INVALID_HEADER
        )
    text: str = metadata["manifest"]
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise CorruptPackError("the manifest is not UTF-8", PackFault.INVALID_HEADER) from error
    if blake3(encoded).hexdigest() != metadata["manifest_blake3"]:
        raise CorruptPackError("the manifest does not match its digest", PackFault.MANIFEST_DIGEST)
    return text


def _payloads(
    manifest: Manifest, header: dict[str, object], data: memoryview
) -> dict[str, memoryview]:
    """Payloads by name, after all checks of entries and digests."""
    sizes = {record.name: record.bytes for record in manifest.tensors if record.has_payload}
    together = sum(sizes.values())
    order = ((TENSORS_ENTRY,) if together else ()) + manifest.stored_rest
    payloads = _cut_entries(order, header, data)
    tensors = payloads.pop(TENSORS_ENTRY, memoryview(b""))
    if len(tensors) != together:
        raise CorruptPackError(
            f"entry {TENSORS_ENTRY!r} has {len(tensors)} bytes, the records say {together}",
            PackFault.INVALID_OFFSETS,
        )
    key = payloads.get(ROUTER_ENTRY, memoryview(b""))
    if manifest.router is not None and len(key) != manifest.router.nbytes:
        raise CorruptPackError(
            f"entry {ROUTER_ENTRY!r} has {len(key)} bytes, its description says "
            f"{manifest.router.nbytes}",
            PackFault.INVALID_OFFSETS,
        )
    if payloads_digest([data] if len(data) else []) != manifest.payload_blake3:
        raise CorruptPackError("the payloads do not match their digest", PackFault.PAYLOAD_DIGEST)
    offset = 0
    for name, size in sizes.items():
        payloads[name] = tensors[offset : offset + size]
        offset += size
    return payloads


def _cut_entries(
    order: tuple[str, ...], header: Mapping[str, object], data: memoryview
) -> dict[str, memoryview]:
    """The bytes of every entry. `order`: names of the required entries, in the order of the file.

    Raises: CorruptPackError.
    """
    if set(order) != header.keys():
        different = sorted(set(order) ^ header.keys())[0]
        raise CorruptPackError(
            f"entry {different!r} is in the header or in the manifest, not in both",
            PackFault.INVALID_OFFSETS,
        )
    parts, offset = {}, 0
    for name in order:
        end = _entry_end(name, header[name], offset, len(data))
        parts[name] = data[offset:end]
        offset = end
    if offset != len(data):
        raise CorruptPackError(
            f"{len(data) - offset} bytes follow the last payload", PackFault.INVALID_OFFSETS
        )
    return parts


def _entry_end(name: str, entry: object, offset: int, size: int) -> int:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys or entry["dtype"] != "U8":
        raise CorruptPackError(f"entry {name!r} is not U8 bytes", PackFault.INVALID_OFFSETS)
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers, count in ((shape, 1), (offsets, 2)):
        whole = isinstance(numbers, list) and len(numbers) == count
        if not whole or not all(type(number) is int for number in numbers):
            raise CorruptPackError(f"entry {name!r} has no offsets", PackFault.INVALID_OFFSETS)
    if offsets[0] != offset or offsets[1] - offset != shape[0] or shape[0] < 1:
        raise CorruptPackError(
            f"entry {name!r} should start at {offset}, has {offsets}", PackFault.INVALID_OFFSETS
        )
    if offsets[1] > size:
        raise CorruptPackError(f"the file ends inside entry {name!r}", PackFault.TRUNCATED)
    end: int = offsets[1]
    return end


def file_entry(name: str) -> str:
    """Payload entry of a side file."""
    return FILE_PREFIX + name
