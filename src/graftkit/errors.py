"""Every exception of graftkit.

GraftError
├── ConfigError              a setting is missing, unknown or contradictory
├── RowsError                a rows.jsonl file is empty, malformed or does not fit the model
├── CheckpointError          a checkpoint on disk cannot be used: missing shard, pickle, NaN
│   └── CheckpointMismatchError   target and tuned are not two states of one model
├── PackFormatError          the file is not a valid SkillPack
│   ├── UnsupportedVersionError   written by a newer graftkit
│   └── CorruptPackError          truncated, edited or damaged
├── PackMismatchError        a valid pack, but made for a different target
├── AttachError              a pack cannot be attached to this model in this way
├── BudgetError              no plan fits the byte budget
└── OutputError              the result cannot be written where it was asked for
"""


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


class PackFormatError(GraftError):
    """The file is not a valid SkillPack."""


class UnsupportedVersionError(PackFormatError):
    """The pack was written by a newer version of graftkit."""


class CorruptPackError(PackFormatError):
    """The pack is truncated, edited or damaged."""


class PackMismatchError(GraftError):
    """The pack is valid, but was made for a different target."""


class AttachError(GraftError):
    """The pack cannot be attached to this model in this way."""


class BudgetError(GraftError):
    """No plan fits the byte budget."""


class OutputError(GraftError):
    """The result cannot be written where it was asked for."""
