"""Every exception of graftkit, and what the text of a message needs.

GraftError
├── ConfigError              a setting is missing, unknown or contradictory
├── RowsError                a rows.jsonl file is empty, malformed or does not fit the model
├── CheckpointError          a checkpoint on disk cannot be used: missing shard, pickle, NaN
│   └── CheckpointMismatchError   target and tuned are not two states of one model
├── PackFormatError          the file is not a valid SkillPack
│   ├── UnsupportedVersionError   of another format version than this graftkit reads
│   └── CorruptPackError          truncated, edited or damaged
├── PackMismatchError        a valid pack, but made for a different target
├── AttachError              a pack cannot be attached to this model in this way
├── BudgetError              no plan fits the byte budget
├── SourceError              a source, judge or reward model does not answer
├── SelectionError           no answers are left to train on
├── LibraryError             a library's folder is damaged, or holds no such pack
├── UnknownModelError        a request names a pack that is not served
├── BusyError                too many requests wait, or the server is shutting down
├── ImagesError              a data set of images is empty, broken or lacks a class
├── DonorError               a vision network cannot be read, or cannot be cut
├── RootstockError           an ONNX file is not a rootstock
└── OutputError              the result cannot be written where it was asked for

Messages quote foreign text only in printable form, and name the nearest known word where a name is
misspelled.
"""

import difflib
import re
from collections.abc import Iterable
from enum import StrEnum


class GraftError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits 1."""


class ConfigError(GraftError):
    """A setting is missing, unknown or contradictory."""


class RowsError(GraftError):
    """A rows.jsonl file is empty, malformed or does not fit the model."""


class CheckpointError(GraftError):
    """A checkpoint on disk cannot be used."""


class CheckpointMismatchError(CheckpointError):
    """Target and tuned are not two states of one model."""


class PackFault(StrEnum):
    """The rule that a file breaks; the names are those of docs/skillpack-format.md, section 5."""

    TRUNCATED = "truncated"
    HEADER_TOO_LARGE = "header_too_large"
    NOT_A_SKILLPACK = "not_a_skillpack"
    OLDER_VERSION = "older_version"
    NEWER_VERSION = "newer_version"
    INVALID_HEADER = "invalid_header"
    DUPLICATE_KEY = "duplicate_key"
    MANIFEST_DIGEST = "manifest_digest"
    INVALID_MANIFEST = "invalid_manifest"
    UNKNOWN_CODEC = "unknown_codec"
    INVALID_NAME = "invalid_name"
    SHAPE_TOO_LARGE = "shape_too_large"
    INVALID_OFFSETS = "invalid_offsets"
    PAYLOAD_DIGEST = "payload_digest"
    INVALID_PAYLOAD = "invalid_payload"


class PackFormatError(GraftError):
    """The file is not a valid SkillPack; `fault` is the rule that it breaks."""

    def __init__(self, message: str, fault: PackFault = PackFault.INVALID_PAYLOAD):
        super().__init__(message)
        self.fault = fault


class UnsupportedVersionError(PackFormatError):
    """The pack is of another format version than this graftkit reads."""


class CorruptPackError(PackFormatError):
    """The pack is truncated, edited or damaged."""


class PackMismatchError(GraftError):
    """The pack is valid, but was made for a different target."""


class AttachError(GraftError):
    """The pack cannot be attached to this model in this way."""


class BudgetError(GraftError):
    """No plan fits the byte budget."""


class SourceError(GraftError):
    """A source, judge or reward model does not answer."""


class SelectionError(GraftError):
    """No answers are left to train on."""


class LibraryError(GraftError):
    """A library's folder is damaged, or holds no such pack."""


class UnknownModelError(GraftError):
    """A request names a pack that is not served."""


class BusyError(GraftError):
    """Too many requests wait, or the server is shutting down."""


class ImagesError(GraftError):
    """A data set of images is empty, broken or lacks a class."""


class DonorError(GraftError):
    """A vision network cannot be read, or cannot be cut."""


class RootstockError(GraftError):
    """An ONNX file is not a rootstock."""


class OutputError(GraftError):
    """The result cannot be written where it was asked for."""


# What moves the cursor, changes colours, begins a line, or turns the direction of letters around:
# C0, DEL and C1; line and paragraph separators; bidirectional controls; halves of characters.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, *, keep: str = "") -> str:
    """With escapes, such as \\x1b, in place of control characters, except those in `keep`."""

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else ascii(match[0])[1:-1]

    return _CONTROLS.sub(escaped, text)


def nearest_name(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A hint such as "; did you mean density?" to end a message with, empty where none is near.

    Args:
        name: what was written. names: what may be written there.
        prefix: put in front of the name that is proposed.
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
