"""SkillPack: the target's tensors and side files in, the tuned model's out.

A pack is in memory or mapped from a file, and knows nothing of live models. Of a side file it holds
the middle part that differs from the target's, deflated. `pack_summary` gives its sizes and errors
for tables and `--json`.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from blake3 import blake3
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from graftkit.checkpoint import DTYPES, Checkpoint, check_digest, difference
from graftkit.compress.codecs import (
    add_delta,
    decode_delta,
    decode_factors,
    describe_payload,
    matrix_shape,
)
from graftkit.compress.coded import CodedFactors, load_factors
from graftkit.compress.exact import decode_exact
from graftkit.compress.factors import Factors
from graftkit.compress.factors import load as load_plain_factors
from graftkit.config import parse_hub_id
from graftkit.errors import ConfigError, CorruptPackError, GraftError, PackFault, PackMismatchError
from graftkit.model_files import SIDE_FILES, copied_names, is_side_file
from graftkit.skillpack.container import (
    build_header,
    file_entry,
    parse_pack,
    payloads_digest,
    read_container,
    readable_header,
    write_container,
)
from graftkit.skillpack.manifest import (
    ROUTER_ENTRY,
    FileRecord,
    Manifest,
    RouterInfo,
    TensorRecord,
)

PACK_FILE_NAME = "skill.skillpack"
"""Name of the pack in a Hub repository."""


class SkillPack:
    """A manifest and its payloads, in memory or mapped from a file."""

    def __init__(self, manifest: Manifest, payloads: Mapping[str, memoryview]):
        self.manifest = manifest
        self._payloads = payloads
        self._records = {record.name: record for record in manifest.tensors}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a file; everything is checked, nothing is decoded.

        Raises: PackFormatError, UnsupportedVersionError, CorruptPackError.
        """
        manifest, payloads, _ = read_container(Path(path))
        return cls(manifest, payloads)

    @classmethod
    def parse(cls, content: memoryview) -> Self:
        """A pack in memory, such as one inside another file; checked as `load` checks a file.

        Raises: PackFormatError, UnsupportedVersionError, CorruptPackError.
        """
        return cls(*parse_pack(content))

    @classmethod
    def from_pretrained(cls, reference: str, filename: str = PACK_FILE_NAME) -> Self:
        """Open a pack from a Hub repository (`user/repo` or `user/repo@revision`)."""
        repository, revision = parse_hub_id(reference)
        try:
            path = hf_hub_download(repository, filename, revision=revision)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise GraftError(
                f"{reference}: the Hub gave no {filename} ({str(error).splitlines()[0]})"
            ) from error
        return cls.load(path)

    def save(self, path: str | Path) -> None:
        """Write the file: to a temporary name first, then renamed. Raises: OutputError."""
        write_container(Path(path), self.manifest, lambda name: self._payloads[name])

    def push_to_hub(
        self, repository: str, filename: str = PACK_FILE_NAME, private: bool = False
    ) -> str:
        """Upload to a Hub model repository, made if it is missing. Returns the commit's address."""
        api = HfApi()
        readable_header(self.manifest, {n: len(p) for n, p in self._payloads.items()})
        content = b"".join(self.parts())
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_file(
                path_or_fileobj=content,
                path_in_repo=filename,
                repo_id=repository,
                commit_message=f"Add {filename}",
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise GraftError(
                f"{repository}: upload failed ({str(error).splitlines()[0]})"
            ) from error
        return str(commit.commit_url)

    def __copy__(self) -> Self:
        """Another object with the same manifest and payloads."""
        return type(self)(self.manifest, self._payloads)

    def __deepcopy__(self, memo: object) -> Self:
        """The pack itself: nothing in it ever changes."""
        return self

    def __reduce__(self) -> tuple[Callable[[bytes], "SkillPack"], tuple[bytes]]:
        """Pickled as the bytes of its file, which are checked again when they are read."""
        return _unpickled, (b"".join(self.parts()),)

    @property
    def pack_bytes(self) -> int:
        """Bytes of the file."""
        return len(self._header()) + sum(map(len, self._payloads.values()))

    @property
    def digest(self) -> str:
        """BLAKE3 of the file, 64 digits."""
        hasher = blake3()
        for part in self.parts():
            hasher.update(part)
        return hasher.hexdigest()

    def parts(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file: its header, and every payload."""
        yield self._header()
        yield from (self._payloads[name] for name in self.manifest.payload_order)

    def payload(self, name: str) -> memoryview:
        """Raw payload of a tensor; empty where nothing is stored."""
        return self._payloads.get(name, memoryview(b""))

    def record(self, name: str) -> TensorRecord:
        """The record of a tensor. Raises: PackMismatchError for an unknown name."""
        if name not in self._records:
            raise PackMismatchError(f"the pack knows no tensor {name}")
        return self._records[name]

    def describe(self, name: str) -> dict[str, object]:
        """Rank, bits or entries kept of one tensor. Raises: CorruptPackError."""
        record = self.record(name)
        body, _ = self._parts(record)
        with _naming(record):
            return describe_payload(record.codec, body, self._common_shape(record), record.layout)

    def decode(self, name: str, target: Tensor) -> Tensor:
        """Rebuild the tuned model's tensor.

        Args:
            target: the target's tensor of that name (or of `record.base`), in the checkpoint's
                layout and dtype; zeros of the record's shape where `base` is empty.
        Returns: the tuned tensor in the tuned dtype and shape.
        Raises: CorruptPackError, PackMismatchError for another shape.
        """
        record = self.record(name)
        weight = self._weight(record, target)
        with _naming(record):
            common = self._decode_common(record, weight)
            if not record.appended_bytes:
                return common if record.codec == "zero" else _finite(common, weight)
            extra = record.result_shape[0] - record.shape[0]
            zeros = torch.zeros((extra, *record.shape[1:]), dtype=weight.dtype)
            added = _finite(decode_exact(self._parts(record)[1], zeros))
            return torch.cat([_finite(common, weight), added])

    def rebuild(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """`decode` against what `read` gives for the target tensor that the record needs."""
        record = self.record(name)
        if record.target_name is not None:
            return self.decode(name, read(record.target_name))
        return self.decode(name, torch.zeros(record.shape, dtype=DTYPES[record.dtype]))

    def delta(self, name: str, target: Tensor) -> Tensor:
        """Tuned minus target in float32, in the tuned shape; appended rows count in full."""
        record = self.record(name)
        weight = self._weight(record, target)
        if record.codec not in ("exact", "zero") and not record.appended_bytes:
            with _naming(record):
                body, _ = self._parts(record)
                shape = tuple(weight.shape)
                return _finite(decode_delta(record.codec, body, shape, record.layout))
        tuned = self.decode(name, target)
        if not record.appended_bytes:
            return difference(tuned, weight)
        common = difference(tuned[: weight.shape[0]], weight)
        return torch.cat([common, tuned[weight.shape[0] :].float()])

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """left (out, r) and right (r, in), δ = left @ right in (out, in) orientation, float32.

        None where the tensor is not one low-rank matrix.
        """
        record = self.record(name)
        factored = record.codec in ("lowrank", "factors")
        if not factored or record.layout.startswith("stack") or record.appended_bytes:
            return None
        _, shape = matrix_shape(self._common_shape(record), record.layout)
        with _naming(record):
            left, right = decode_factors(self._parts(record)[0], shape, record.codec)
            return _finite(left), _finite(right)

    def plain_factors(self, name: str) -> Factors | None:
        """The factors of codec `factors` as they are stored, None for any other codec.

        Raises: CorruptPackError.
        """
        record = self.record(name)
        if record.codec != "factors" or record.layout.startswith("stack"):
            return None
        _, shape = matrix_shape(self._common_shape(record), record.layout)
        with _naming(record):
            return load_plain_factors(self._parts(record)[0], shape)

    def coded_factors(self, name: str) -> CodedFactors:
        """The codes of a tensor that is one entropy-coded low-rank matrix.

        Raises: CorruptPackError.
        """
        record = self.record(name)
        body, _ = self._parts(record)
        _, shape = matrix_shape(self._common_shape(record), record.layout)
        with _naming(record):
            return load_factors(body, shape)

    def side_files(self, target: Checkpoint) -> dict[str, bytes]:
        """Contents of the side files that the tuned model changed, by name."""
        return {
            record.name: self._side_file(record, target.side_file(record.name))
            for record in self.manifest.files
        }

    def side_file(self, name: str, old: Callable[[], bytes | None]) -> bytes | None:
        """Content of one side file of the tuned model, None where it is the target's.

        Args:
            old: gives the target's file of that name; called where the pack holds a part only.
        Raises: CorruptPackError; PackMismatchError for a file of another target.
        """
        for record in self.manifest.files:
            if record.name == name:
                shared = record.prefix + record.suffix > 0
                return self._side_file(record, old() if shared else None)
        return None

    @property
    def router_key(self) -> tuple[RouterInfo, memoryview] | None:
        """Description and bytes of the router key of this pack, None where it has none.

        `graftkit.route.key.RouterKey.from_bytes` reads them.
        """
        router = self.manifest.router
        return None if router is None else (router, self._payloads[ROUTER_ENTRY])

    def with_router_key(self, info: RouterInfo, content: bytes) -> Self:
        """The same pack with this router key in place of its own.

        Raises: ConfigError for a target whose tensor takes the name of the key's payload;
            CorruptPackError for bytes that the description does not fit.
        """
        if ROUTER_ENTRY in self._records:
            raise ConfigError(f"a pack with a tensor named {ROUTER_ENTRY} takes no router key")
        if len(content) != info.nbytes:
            raise CorruptPackError(
                f"a router key of {len(content)} bytes, its description says {info.nbytes}"
            )
        manifest = self.manifest.model_copy(update={"router": info})
        payloads = {**self._payloads, ROUTER_ENTRY: memoryview(content)}
        digest = payloads_digest(payloads[name] for name in manifest.payload_order)
        return type(self)(manifest.model_copy(update={"payload_blake3": digest}), payloads)

    def check_target(
        self, read: Callable[[str], Tensor], names: set[str], where: str, digests: bool = True
    ) -> None:
        """Refuse any model but the pack's own target.

        Args:
            read: gives a tensor of the candidate by name. names: all its tensor names.
            where: how messages call the candidate. digests: also compare the values.
        Raises: PackMismatchError naming the first tensor, in the order of names, that differs.
        """
        own = {record.name: record for record in self.manifest.tensors if record.base is None}
        for name in sorted(own.keys() | names):
            if name not in names or name not in own:
                lacks = where if name not in names else "the pack's target"
                raise PackMismatchError(
                    f"{where}: {lacks} lacks tensor {name}; the pack was made for "
                    f"{self.manifest.target.name}"
                )
            if digests:
                record = own[name]
                expected = (record.dtype, record.shape, record.blake3)
                check_digest(name, read(name), expected, where)

    def _decode_common(self, record: TensorRecord, weight: Tensor) -> Tensor:
        body, _ = self._parts(record)
        if record.codec == "exact":
            return decode_exact(body, weight)
        if record.codec == "zero":
            if body:
                raise CorruptPackError(f"codec zero takes no payload, found {len(body)} bytes")
            return weight.clone()
        return add_delta(record.codec, body, weight, record.layout)

    def _side_file(self, record: FileRecord, old: bytes | None) -> bytes:
        payload = self._payloads.get(file_entry(record.name), memoryview(b""))
        return decode_file(record, payload, old)

    def _header(self) -> bytes:
        return build_header(self.manifest, {n: len(p) for n, p in self._payloads.items()})

    def _parts(self, record: TensorRecord) -> tuple[memoryview, memoryview]:
        payload = self.payload(record.name)
        cut = len(payload) - record.appended_bytes
        return payload[:cut], payload[cut:]

    def _common_shape(self, record: TensorRecord) -> tuple[int, ...]:
        if record.tuned_shape is None:
            return record.shape
        return (min(record.shape[0], record.tuned_shape[0]), *record.shape[1:])

    def _weight(self, record: TensorRecord, target: Tensor) -> Tensor:
        """W of the format's section 3: cast to the tuned dtype, cut to the common rows."""
        if tuple(target.shape) != record.shape:
            raise PackMismatchError(
                f"{record.name}: the pack holds {list(record.shape)}, the target has "
                f"{list(target.shape)}; use the target that the pack names"
            )
        weight = target.detach().to(DTYPES[record.result_dtype])
        return weight if record.tuned_shape is None else weight[: self._common_shape(record)[0]]


def _finite(tensor: Tensor, target: Tensor | None = None) -> Tensor:
    """The tensor, with the target's weights where those are NaN or infinite.

    Raises: CorruptPackError for NaN or infinite weights where the target's are finite.
    """
    if not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
        return tensor
    if target is None or not bool((tensor.isfinite() | ~target.isfinite()).all()):
        raise CorruptPackError("the payload decodes to NaN or infinite weights")
    return torch.where(target.isfinite(), tensor, target)


@contextmanager
def _naming(record: TensorRecord) -> Iterator[None]:
    """Name the tensor in the error of a damaged payload."""
    try:
        yield
    except CorruptPackError as error:
        raise CorruptPackError(f"tensor {record.name}: {error}", error.fault) from error


def _unpickled(content: bytes) -> SkillPack:
    return SkillPack.parse(memoryview(content))


# Read where a pack is attached: a live model has no folder in which the target's file would be.
_STORED_WHOLE = ("config.json", "generation_config.json")


def changed_files(target: Checkpoint, tuned: Checkpoint) -> list[tuple[FileRecord, bytes]]:
    """Records and payloads of the side files of `tuned` that `target` lacks or that differ."""
    changed = []
    others = [name for name in copied_names(tuned.path) if is_side_file(name)]
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


def tensor_summaries(pack: SkillPack) -> list[dict[str, Any]]:
    """One entry per tensor: name, kind, codec, rank, shape, bytes, bits per parameter, error."""
    rows = []
    for record in pack.manifest.tensors:
        nbytes = len(pack.payload(record.name))
        details = pack.describe(record.name)
        rows.append(
            {
                "name": record.name,
                "kind": record.kind,
                "codec": record.codec,
                "rank": details.pop("rank", None),
                "shape": list(record.result_shape),
                "bytes": nbytes,
                "bits_per_parameter": _rounded(8 * nbytes / max(1, record.numel)),
                "relative_error": record.error,
                **details,
            }
        )
    return rows


def pack_summary(pack: SkillPack) -> dict[str, Any]:
    """The numbers of the whole pack; `ratio` is pack bytes over target bytes."""
    manifest = pack.manifest
    size = pack.pack_bytes
    return {
        "pack_bytes": size,
        "target_bytes": manifest.target.bytes,
        "ratio": size / max(1, manifest.target.bytes),
        "bits_per_parameter": 8 * size / max(1, manifest.target.parameters),
        "bound_bits_per_parameter": manifest.bound_bits_per_parameter,
        "recipe": manifest.recipe,
        "budget_bytes": manifest.budget_bytes,
        "target": manifest.target.name,
        "tuned": manifest.tuned.name,
        "tensors": tensor_summaries(pack),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
