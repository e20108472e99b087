"""The manifest: its schema, and every rule that it keeps.

The JSON schema is made from the settings here; docs/skillpack-format.md, section 2, says what the
fields mean. The rules between fields (sections 2, 4 and 5) are about names, shapes, resized
vocabularies, codecs and layouts, bases of added tensors, and digests.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from graftkit.checkpoint import DTYPES, FLOAT_DTYPES, TENSOR_DIGEST_HEX
from graftkit.compress.codecs import TensorLayout
from graftkit.config import SELF, Settings
from graftkit.errors import CorruptPackError, PackFault
from graftkit.model_files import is_side_file

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
    """File name; self for rows that the two models wrote."""
    blake3: Digest
    """Digest of the file, or of the rows that were written."""
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
    """Directions kept in which the prompts differ, or embeddings of prompts."""
    prompts: Count
    """Prompts that the key was fitted on."""
    blake3: Digest
    """Digest of these prompts."""
    encoder: str | None = None
    """Name of the sentence encoder that gave the states; absent for the target itself."""
    method: Literal["nearest"] | None = None
    """How a prompt is compared: with embeddings of prompts; absent for an ellipsoid."""

    @property
    def nbytes(self) -> int:
        """Length of the payload (docs/skillpack-format.md, 3.8)."""
        if self.method == "nearest":
            return 12 + self.components * self.width
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
    def effective_prompt_format(self) -> PromptFormat | None:
        """How prompts are to be given to the model: as `prompt_format` says, else as the rows of
        the calibration were given; None where neither is known. Rows that the models wrote say
        nothing about it."""
        rows = self.calibration
        if self.prompt_format is not None or rows is None or rows.source == SELF:
            return self.prompt_format
        return "raw" if rows.format == "prompt_completion" else None

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


def parse_manifest(text: str) -> Manifest:
    """Manifest from JSON text. Raises: CorruptPackError with the fault of the rule broken."""
    _check_codecs(load_json(text, PackFault.INVALID_MANIFEST))
    try:
        # Strict, as the schema is: "9" and true are no numbers.
        manifest = Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptPackError(
            f"manifest: {place}: {first['msg']}", PackFault.INVALID_MANIFEST
        ) from error
    _check_names(manifest)
    _check_shapes(manifest)
    for record in manifest.tensors:
        _check_record(record)
    _check_bases(manifest)
    _check_payload_digest(manifest)
    return manifest


def load_json(text: str, fault: PackFault = PackFault.INVALID_HEADER) -> Any:
    """JSON without duplicate keys or NaN. Raises: CorruptPackError, with `fault` for bad JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CorruptPackError(f"key {twice!r} stands twice", PackFault.DUPLICATE_KEY)
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptPackError(f"not valid JSON: {error}", fault) from error


def _check_codecs(raw: Any) -> None:
    codecs = get_args(Codec)
    records = raw.get("tensors") if isinstance(raw, dict) else None
    for record in records if isinstance(records, list) else []:
        codec = record.get("codec") if isinstance(record, dict) else None
        if isinstance(codec, str) and codec not in codecs:
            raise CorruptPackError(
                f"tensor {record.get('name')!r} uses codec {codec!r}; known are "
                f"{', '.join(codecs)}",
                PackFault.UNKNOWN_CODEC,
            )


def _check_names(manifest: Manifest) -> None:
    names = [record.name for record in manifest.tensors]
    if names != sorted(set(names)):
        raise CorruptPackError(
            "tensor names are not unique and in order", PackFault.INVALID_MANIFEST
        )
    bad = [name for name in names if name.startswith(FILE_PREFIX) or not name]
    bad += [name for name in names if name == ROUTER_ENTRY and name in manifest.stored_rest]
    if bad:
        raise CorruptPackError(f"name {bad[0]!r} is not allowed", PackFault.INVALID_NAME)
    _check_files(manifest.files)


def _check_files(files: Sequence[FileRecord]) -> None:
    """What records of side files must keep. Raises: CorruptPackError."""
    names = [record.name for record in files]
    bad = [name for name in names if not is_side_file(name)]
    if bad:
        raise CorruptPackError(f"name {bad[0]!r} is not allowed", PackFault.INVALID_NAME)
    if len(set(names)) != len(names):
        raise CorruptPackError("a side file stands twice", PackFault.INVALID_MANIFEST)
    for record in files:
        shared = record.prefix + record.suffix
        if shared > record.bytes or (shared > 0) != (record.target_blake3 is not None):
            raise CorruptPackError(
                f"side file {record.name}: prefix and suffix do not fit",
                PackFault.INVALID_MANIFEST,
            )


def _check_shapes(manifest: Manifest) -> None:
    own = 0
    for record in manifest.tensors:
        size = _bounded_product(record.shape)
        if max(size, _bounded_product(record.result_shape)) > MAX_NUMEL:
            raise CorruptPackError(
                f"{record.name}: shape {list(record.shape)} is too large",
                PackFault.SHAPE_TOO_LARGE,
            )
        if record.base is None:
            own += size
    if own != manifest.target.parameters:
        raise CorruptPackError(
            f"shapes add up to {own} weights, the target has {manifest.target.parameters}",
            PackFault.SHAPE_TOO_LARGE,
        )
    for record in manifest.tensors:
        first, after = record.shape[:1], (record.tuned_shape or record.shape)[:1]
        if after > first and after[0] > largest_vocabulary(first[0]):
            raise CorruptPackError(
                f"{record.name}: vocabulary grows from {first[0]} to {after[0]}",
                PackFault.SHAPE_TOO_LARGE,
            )
        if record.base == "" and record.numel > max(own, 1):
            raise CorruptPackError(
                f"{record.name}: larger than the whole target", PackFault.SHAPE_TOO_LARGE
            )


def _bounded_product(extents: Iterable[int]) -> int:
    """Their product, or any number above the limit: a million extents must not take minutes."""
    product = 1
    for extent in extents:
        product = min(product * extent, MAX_NUMEL**2)
    return product


def _check_bases(manifest: Manifest) -> None:
    """An added tensor's record describes the target tensor that it is coded against."""
    own = {record.name: record for record in manifest.tensors if record.base is None}
    for record in manifest.tensors:
        if not record.base:
            continue
        base = own.get(record.base)
        if base is None or any(
            getattr(base, field) != getattr(record, field) for field in ("dtype", "shape", "blake3")
        ):
            raise CorruptPackError(
                f"{record.name}: does not describe its base {record.base}",
                PackFault.INVALID_MANIFEST,
            )


def _check_payload_digest(manifest: Manifest) -> None:
    if (manifest.payload_blake3 is not None) != bool(manifest.payload_order):
        raise CorruptPackError(
            "payload_blake3 and what is stored do not fit", PackFault.INVALID_MANIFEST
        )


def _check_record(record: TensorRecord) -> None:
    problem = _resize_problem(record) or _layout_problem(record)
    if problem:
        raise CorruptPackError(f"{record.name}: {problem}", PackFault.INVALID_MANIFEST)


def _resize_problem(record: TensorRecord) -> str | None:
    """What is wrong with dtypes, the tuned shape and what is appended."""
    floats = record.codec == "zero" or record.dtype in FLOAT_DTYPES
    before, after = record.shape, record.result_shape
    grown = after[:1] > before[:1]
    if record.dtype not in DTYPES or not floats:
        return f"dtype {record.dtype} cannot be used with codec {record.codec}"
    if record.tuned_dtype is not None and record.tuned_dtype not in FLOAT_DTYPES:
        return f"tuned_dtype {record.tuned_dtype} is not a float dtype"
    if len(before) != len(after) or after[1:] != before[1:]:
        return f"shape {list(before)} cannot be resized to {list(after)}"
    if grown and record.result_dtype not in FLOAT_DTYPES:
        return f"rows of dtype {record.result_dtype} cannot be appended"
    if grown != (record.appended_bytes > 0):
        return "appended_bytes and tuned_shape do not fit"
    if (record.codec != "zero" or grown) != record.has_payload:
        return f"codec {record.codec} and whether there is a payload do not fit"
    if record.appended_bytes > record.bytes:
        return "appended rows are longer than the payload"
    return None


def _layout_problem(record: TensorRecord) -> str | None:
    """What keeps the common rows from being the matrices that codec and layout need."""
    shape = list(record.shape)
    empty = 0 in record.shape or 0 in record.result_shape
    if record.layout.startswith("stack") and (len(shape) != 3 or empty):
        return f"layout {record.layout} needs three extents, found {shape}"
    if record.codec not in ("zero", "exact") and (len(shape) < 2 or empty):
        return f"codec {record.codec} needs a matrix, found {shape}"
    if record.layout == "transposed" and len(shape) != 2:
        return f"layout transposed needs two extents, found {shape}"
    return None
