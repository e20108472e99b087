"""The schema of the manifest: frozen settings, from which the JSON schema is made.

docs/skillpack-format.md, section 2, says what the fields mean.
"""

import json
import math
from typing import Annotated, Literal

from pydantic import Field

from graftkit.checkpoint import TENSOR_DIGEST_HEX
from graftkit.compress.codecs import TensorLayout
from graftkit.config import Settings

FORMAT_VERSION: Literal[2] = 2
"""The one version that this package writes and reads."""
FILE_PREFIX = "file:"
ROUTER_ENTRY = "router"
"""Name of the payload that holds the router key."""
MAX_NUMEL = 2**40

_MAX_FILE_BYTES = 2**30

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TensorDigest = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{TENSOR_DIGEST_HEX}}}$")]
Extent = Annotated[int, Field(ge=0, le=MAX_NUMEL)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TensorKind = Literal["attention", "mlp", "embedding", "head", "norm", "bias", "router", "other"]
RowFormat = Literal["prompt_completion", "messages", "text"]
PromptFormat = Literal["raw", "chat"]
Codec = Literal["zero", "exact", "sparse", "lowrank", "dense", "hybrid", "factors"]


def largest_vocabulary(rows: int) -> int:
    """Most rows to which training may grow a vocabulary: twice as many, or 65,536 more."""
    return max(2 * rows, rows + 65_536)


class TargetInfo(Settings):
    """The target a pack was made for."""

    name: str
    """Directory name or Hub id."""
    revision: str | None = None
    """Hub commit, where known."""
    config_blake3: Digest
    """Digest of config.json."""
    fingerprint: Digest
    """One digest over all tensors (Checkpoint.fingerprint)."""
    bytes: Count
    """Bytes of all weights: the 100 % of a budget."""
    parameters: Count
    """Number of all weights."""


class TunedInfo(Settings):
    """The tuned model the pack was made from."""

    name: str
    """Directory name or Hub id."""
    revision: str | None = None
    """Hub commit, where known."""


class CalibrationInfo(Settings):
    """The rows on which activations were measured."""

    source: str
    """File name."""
    blake3: Digest
    """Digest of the file."""
    rows: Count
    """Rows used."""
    tokens: Count
    """Tokens used."""
    seed: Count
    """Seed that chose the rows."""
    format: RowFormat = "prompt_completion"
    """Format of the rows."""


class Omission(Settings):
    """A change that was left out on purpose."""

    name: str
    """Tensor or file."""
    reason: str
    """Why."""


class FileRecord(Settings):
    """A side file that the tuned model changed."""

    name: str
    """One of the names that section 4 allows."""
    bytes: Annotated[int, Field(ge=0, le=_MAX_FILE_BYTES)]
    """Length of the file."""
    blake3: Digest
    """Digest of the file."""
    prefix: Count = 0
    """Leading bytes shared with the target's file."""
    suffix: Count = 0
    """Trailing bytes shared with the target's file."""
    target_blake3: Digest | None = None
    """Digest of the target's file where bytes are shared."""


class RouterInfo(Settings):
    """Description of a router key, by which a router chooses packs for a prompt."""

    layer: Annotated[int, Field(ge=1, le=65_535)]
    """Layers of the target (or encoder) behind which a prompt's states are pooled."""
    width: Annotated[int, Field(ge=1, le=65_535)]
    """Numbers in a pooled state."""
    components: Annotated[int, Field(ge=0, le=255)]
    """Directions kept in which the prompts differ."""
    prompts: Count
    """Prompts that the key was fitted on."""
    blake3: Digest
    """Digest of these prompts."""
    encoder: str | None = None
    """Name of the sentence encoder that gave the states; absent for the target itself."""

    @property
    def nbytes(self) -> int:
        """Length of the payload (docs/skillpack-format.md, 3.8)."""
        return 4 + 2 * self.width + self.components * (4 + self.width)


class TensorRecord(Settings):
    """One tensor: what the target must hold, and how the tuned one is rebuilt."""

    name: str
    """Tensor name in the checkpoint."""
    kind: TensorKind
    """Module kind."""
    dtype: str = "BF16"
    """safetensors dtype of the target's tensor."""
    shape: tuple[Extent, ...]
    """Shape of the target's tensor."""
    blake3: TensorDigest
    """First digits of the digest of the target's tensor."""
    codec: Codec
    """How the delta is written."""
    layout: TensorLayout = "matrix"
    """How the stored tensor becomes (out, in) matrices."""
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Relative Frobenius error of the delta."""
    tuned_dtype: str | None = None
    """dtype of the tuned tensor where it is another."""
    tuned_shape: tuple[Extent, ...] | None = None
    """Shape of the tuned tensor where the vocabulary was resized."""
    appended_bytes: Count = 0
    """Trailing payload bytes that hold rows the target lacks."""
    base: str | None = None
    """Target tensor that an added tensor is coded against; empty text for zeros."""
    bytes: Count = 0
    """Length of the payload."""

    @property
    def target_name(self) -> str | None:
        """The target tensor that this record needs, None where it is coded against zeros."""
        return self.name if self.base is None else self.base or None

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of the tuned tensor."""
        return self.shape if self.tuned_shape is None else self.tuned_shape

    @property
    def result_dtype(self) -> str:
        """dtype of the tuned tensor."""
        return self.tuned_dtype or self.dtype

    @property
    def numel(self) -> int:
        """Weights of the tuned tensor."""
        return math.prod(self.result_shape)

    @property
    def has_payload(self) -> bool:
        """Whether anything is stored for this tensor."""
        return self.bytes > 0


class Manifest(Settings):
    """The manifest of a pack."""

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    """Version of the format."""
    generator: str
    """Name and version of the writer."""
    target: TargetInfo
    """The target the pack was made for."""
    tuned: TunedInfo
    """The model it was made from."""
    recipe: str
    """Recipe of the writer."""
    budget: str | None = None
    """Budget that was set, as text."""
    budget_bytes: Count | None = None
    """Budget in bytes of the file."""
    calibration: CalibrationInfo | None = None
    """Rows on which activations were measured; absent for a data-free pack."""
    bound_bits_per_parameter: Finite | None = None
    """Reverse water-filling rate at the distortion reached."""
    prompt_format: PromptFormat | None = None
    """How the skill's prompts were given to the model: as they are, or in its chat template."""
    template_blake3: Digest | None = None
    """Digest of that chat template."""
    omitted: tuple[Omission, ...] = ()
    """What was left out and why."""
    licence: str | None = None
    """Licence of the pack."""
    provenance: dict[str, str] = Field(default={})
    """Sources, data and settings behind the tuned model."""
    evaluation: dict[str, Finite] = Field(default={})
    """Results of evaluations by name."""
    files: tuple[FileRecord, ...] = ()
    """Side files that the tuned model changed."""
    tensors: tuple[TensorRecord, ...]
    """One record per tensor, in the order of their names."""
    payload_blake3: Digest | None = None
    """Digest of all payloads, one behind the other; absent where nothing is stored."""
    router: RouterInfo | None = None
    """Description of the router key; absent where there is none."""

    def to_json(self) -> str:
        """Compact JSON without defaults; the same manifest gives the same text."""
        return json.dumps(
            self.model_dump(mode="json", exclude_defaults=True)
            | {"format_version": self.format_version},
            separators=(",", ":"),
            sort_keys=True,
            ensure_ascii=False,
        )

    @property
    def answers(self) -> PromptFormat | None:
        """How prompts are to be given to the model: as `prompt_format` says, else as the rows of
        the calibration were given; None where neither is known."""
        rows = self.calibration
        if self.prompt_format is None and rows is not None and rows.format == "prompt_completion":
            return "raw"
        return self.prompt_format

    @property
    def stored_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that have a payload, in the order of the file."""
        return tuple(record.name for record in self.tensors if record.has_payload)

    @property
    def stored_files(self) -> tuple[str, ...]:
        """Names of the payloads of side files, in the order of the file."""
        return tuple(
            FILE_PREFIX + record.name
            for record in self.files
            if record.prefix + record.suffix < record.bytes
        )

    @property
    def payload_order(self) -> tuple[str, ...]:
        """Names of all payloads, in the order of the file."""
        return self.stored_tensors + self.stored_rest

    @property
    def stored_rest(self) -> tuple[str, ...]:
        """Names of the payloads behind those of tensors, in the order of the file."""
        return self.stored_files + ((ROUTER_ENTRY,) if self.router is not None else ())
