"""Side files in a pack: the middle part that differs from the target's file, deflated."""

import zlib

import numpy as np
from blake3 import blake3

from graftkit.delta import Checkpoint
from graftkit.errors import CorruptPackError, PackFault, PackMismatchError
from graftkit.side_files import SIDE_FILES, carried_names, is_side_file
from graftkit.skillpack.manifest import FileRecord

# Read where a pack is attached: a live model has no folder in which the target's file would be.
_STORED_WHOLE = ("config.json", "generation_config.json")


def changed_files(target: Checkpoint, tuned: Checkpoint) -> list[tuple[FileRecord, bytes]]:
    """Records and payloads of the side files that `tuned` has otherwise than `target`."""
    changed = []
    others = [name for name in carried_names(tuned.path) if is_side_file(name)]
    for name in dict.fromkeys((*SIDE_FILES, *others)):
        new, old = tuned.side_file(name), target.side_file(name)
        if new is not None and new != old:
            changed.append(encode_file(name, new, None if name in _STORED_WHOLE else old))
    return changed


def encode_file(name: str, new: bytes, old: bytes | None) -> tuple[FileRecord, bytes]:
    """Record and payload of one file; what it shares with `old` at both ends is not stored."""
    prefix = suffix = 0
    if old:
        prefix = _shared_length(new, old)
        suffix = _shared_length(new[prefix:][::-1], old[prefix:][::-1])
    middle = new[prefix : len(new) - suffix]
    shared = old is not None and prefix + suffix > 0
    record = FileRecord(
        name=name,
        bytes=len(new),
        blake3=blake3(new).hexdigest(),
        prefix=prefix,
        suffix=suffix,
        target_blake3=blake3(old).hexdigest() if shared and old is not None else None,
    )
    return record, zlib.compress(middle, 9) if middle else b""


def decode_file(record: FileRecord, payload: memoryview, old: bytes | None) -> bytes:
    """The tuned model's file. Raises: CorruptPackError, PackMismatchError (other target file)."""
    shared = record.prefix + record.suffix
    if shared and (old is None or blake3(old).hexdigest() != record.target_blake3):
        raise PackMismatchError(
            f"the target's {record.name} is not the one this pack was made for; use that target"
        )
    if old is not None and shared > len(old):
        raise CorruptPackError(f"side file {record.name}: shares more than the target's file holds")
    middle = _inflate(record, payload, record.bytes - shared)
    head = old[: record.prefix] if old else b""
    tail = old[len(old) - record.suffix :] if old and record.suffix else b""
    content = head + middle + tail
    if blake3(content).hexdigest() != record.blake3:
        raise CorruptPackError(
            f"side file {record.name} does not match its digest", PackFault.PAYLOAD_DIGEST
        )
    return content


def _shared_length(first: bytes, second: bytes) -> int:
    """Length of the common beginning."""
    size = min(len(first), len(second))
    differs = np.frombuffer(first, np.uint8, size) != np.frombuffer(second, np.uint8, size)
    return int(differs.argmax()) if differs.any() else size


def _inflate(record: FileRecord, payload: memoryview, size: int) -> bytes:
    if size == 0:
        return b""
    stream = zlib.decompressobj()
    try:
        middle = stream.decompress(payload, size)
        rest = stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise CorruptPackError(f"side file {record.name}: {error}") from error
    if len(middle) != size or rest or not stream.eof or stream.unused_data:
        raise CorruptPackError(f"side file {record.name} does not inflate to {size} bytes")
    return middle
