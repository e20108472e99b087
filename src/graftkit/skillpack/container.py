"""The file around the manifest: written in one stream, read with every check before any use."""

import json
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from graftkit.errors import (
    CorruptPackError,
    OutputError,
    PackFault,
    PackFormatError,
    UnsupportedVersionError,
)
from graftkit.skillpack.manifest import (
    FILE_PREFIX,
    FORMAT_VERSION,
    PAYLOAD_DIGEST_HEX,
    Manifest,
    load_json,
    parse_manifest,
)

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000
_MAX_MESSAGE = 400
_NEWER = re.compile("[1-9][0-9]*")  # int() would refuse thousands of digits, and read others
_METADATA_KEYS = {"format", "version", "manifest", "manifest_blake3"}


def payload_digest(payload: bytes | memoryview) -> str:
    """Digest of a payload as the manifest holds it."""
    return blake3(payload).hexdigest()[:PAYLOAD_DIGEST_HEX]


def build_header(manifest: Manifest, sizes: Mapping[str, int]) -> bytes:
    """Length field and padded header. `sizes`: payload bytes by entry name."""
    text = manifest.to_json()
    header: dict[str, object] = {
        "__metadata__": {
            "format": "skillpack",
            "version": str(FORMAT_VERSION),
            "manifest": text,
            "manifest_blake3": blake3(text.encode()).hexdigest(),
        }
    }
    offset = 0
    for name in manifest.payload_order:
        end = offset + sizes[name]
        header[name] = {"dtype": "U8", "shape": [sizes[name]], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return _LENGTH.pack(len(encoded)) + encoded


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes otherwise.

    Raises: OutputError when the disk refuses (full, read-only, no such folder).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_container(
    path: Path, manifest: Manifest, payload: Callable[[str], bytes | memoryview]
) -> None:
    """Write a pack. `payload(name)` is called once per entry, in the order of the file, twice
    over: for the sizes and for the bytes. Raises: OutputError."""
    sizes = {name: len(payload(name)) for name in manifest.payload_order}
    with replaced_file(path) as partial, partial.open("wb") as file:
        file.write(build_header(manifest, sizes))
        for name in manifest.payload_order:
            file.write(payload(name))
        file.flush()
        os.fsync(file.fileno())


def read_container(path: Path) -> tuple[Manifest, dict[str, memoryview], int]:
    """Open and check a pack: manifest, payloads by entry name (mapped, not copied), file bytes.

    Raises: PackFormatError and its kinds; the message starts with the path.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _LENGTH.size:
                raise CorruptPackError(
                    f"{size} bytes are too few for a SkillPack", PackFault.TRUNCATED
                )
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        manifest, payloads = _parse(view)
    except OSError as error:
        raise PackFormatError(
            f"{path}: cannot be read ({error.strerror or error})", PackFault.NOT_A_SKILLPACK
        ) from error
    except PackFormatError as error:
        # What a hostile file names can be as long as the file.
        raise type(error)(f"{path}: {str(error)[:_MAX_MESSAGE]}", error.fault) from error
    return manifest, payloads, size


def _parse(view: memoryview) -> tuple[Manifest, dict[str, memoryview]]:
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
    manifest = parse_manifest(_manifest_text(header.pop("__metadata__", None)))
    return manifest, _payloads(manifest, header, view[start:])


def _manifest_text(metadata: object) -> str:
    if not isinstance(metadata, dict) or metadata.get("format") != "skillpack":
        raise PackFormatError(
            "not a SkillPack (no format=skillpack in its metadata)", PackFault.NOT_A_SKILLPACK
        )
    version = metadata.get("version")
    if isinstance(version, str) and _NEWER.fullmatch(version) and version != str(FORMAT_VERSION):
        raise UnsupportedVersionError(
            f"format version {version}; this graftkit reads up to {FORMAT_VERSION}, "
            "upgrade graftkit",
            PackFault.NEWER_VERSION,
        )
    wrong = set(metadata) != _METADATA_KEYS or version != str(FORMAT_VERSION)
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
    order = manifest.payload_order
    if set(order) != header.keys():
        different = sorted(set(order) ^ header.keys())[0]
        raise CorruptPackError(
            f"entry {different!r} is in the header or in the manifest, not in both",
            PackFault.INVALID_OFFSETS,
        )
    payloads, offset = {}, 0
    for name in order:
        end = _entry_end(name, header[name], offset, len(data))
        payloads[name] = data[offset:end]
        offset = end
    if offset != len(data):
        raise CorruptPackError(
            f"{len(data) - offset} bytes follow the last payload", PackFault.INVALID_OFFSETS
        )
    _check_digests(manifest, payloads)
    return payloads


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


def _check_digests(manifest: Manifest, payloads: Mapping[str, memoryview]) -> None:
    for record in manifest.tensors:
        if record.payload_blake3 is None:
            continue
        payload = payloads[record.name]
        if payload_digest(payload) != record.payload_blake3:
            raise CorruptPackError(
                f"tensor {record.name} does not match its digest", PackFault.PAYLOAD_DIGEST
            )
        if record.appended_bytes > len(payload):
            raise CorruptPackError(
                f"tensor {record.name}: appended rows are longer than its payload",
                PackFault.INVALID_MANIFEST,
            )


def file_entry(name: str) -> str:
    """Payload entry of a side file."""
    return FILE_PREFIX + name
