"""Every rule that a manifest keeps (docs/skillpack-format.md, sections 2, 4 and 5).

The schema is `manifest`; here are the rules between fields: names, shapes, resized vocabularies,
codecs and layouts, bases of added tensors, digests.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from graftkit.checkpoint import DTYPES, FLOAT_DTYPES
from graftkit.errors import CorruptPackError, PackFault
from graftkit.side_files import is_side_file
from graftkit.skillpack.manifest import (
    FILE_PREFIX,
    MAX_NUMEL,
    ROUTER_ENTRY,
    Codec,
    FileRecord,
    Manifest,
    TensorRecord,
    largest_vocabulary,
)


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
