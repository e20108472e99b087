"""Weights on disk: a checkpoint is read one tensor at a time and never loaded whole.

The delta of a tensor is `tuned - target` in float32. A target is known by its fingerprint: a
BLAKE3 digest of every tensor's bytes and one digest over all of them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftkit.errors import CheckpointError, PackMismatchError
from graftkit.side_files import HUB_PATTERNS, SIDE_FILES

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = ("BF16", "F16", "F32")

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# 64 bits tell a tensor from another by accident; the digest over all tensors keeps the full 256.
TENSOR_DIGEST_HEX = 16


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is the safetensors name, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * DTYPES[self.dtype].itemsize


class Checkpoint:
    """The tensors and side files of one Hugging Face directory (safetensors, maybe sharded)."""

    def __init__(self, path: Path, name: str, revision: str | None, tensors: dict[str, TensorInfo]):
        self.path = path
        self.name = name
        self.revision = revision
        self.tensors = tensors

    @classmethod
    def open(cls, reference: str | Path) -> Self:
        """Open a local directory or a Hub id (`user/repo` or `user/repo@revision`).

        Raises: CheckpointError for a missing directory or shard, a pickle checkpoint, or an
            unreadable file.
        """
        path, name, revision = _locate(str(reference))
        tensors: dict[str, TensorInfo] = {}
        for file, expected in _weight_files(path).items():
            found = _read_header(file)
            missing = (expected or set()) - found.keys()
            if missing:
                raise CheckpointError(
                    f"{file}: tensor {min(missing)} is listed in {_INDEX} but not in this shard; "
                    "download the checkpoint again"
                )
            for info in found.values():
                if info.name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {info.name} is in {tensors[info.name].file.name} and in "
                        f"{file.name}; keep one of them"
                    )
                tensors[info.name] = info
        if not tensors:
            raise CheckpointError(f"{path}: the checkpoint holds no tensors")
        return cls(path, name, revision, dict(sorted(tensors.items())))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises: CheckpointError when it is missing or malformed."""
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be read as JSON ({error}); a model directory needs its config.json"
            ) from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: expected a JSON object")
        return config

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, the 100 % of a budget."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        return sum(info.numel for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype; the file is closed again, nothing else stays in memory."""
        info = self.tensors[name]
        try:
            with safe_open(info.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{info.file}: cannot read {name}: {error}") from error

    def side_file(self, name: str) -> bytes | None:
        """Bytes of a side file, or None where the directory lacks it."""
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def side_files(self) -> dict[str, bytes]:
        """Contents of the `SIDE_FILES` that the directory has, by name."""
        found = {name: self.side_file(name) for name in SIDE_FILES}
        return {name: content for name, content in found.items() if content is not None}


def count_weights(infos: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Number of weights by dtype, as torch calls it, of (safetensors dtype, weights) pairs.

    Of floating dtypes only, where there are any.
    """
    counts: Counter[str] = Counter()
    for dtype, numel in infos:
        counts[str(DTYPES[dtype]).removeprefix("torch.")] += numel
    floats = {name: n for name, n in counts.items() if getattr(torch, name).is_floating_point}
    return floats or dict(counts)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_digest(tensor: Tensor) -> str:
    """BLAKE3 of the tensor's bytes, 64 hexadecimal digits."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def fingerprint(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """One digest over (name, dtype, shape, full tensor digest) of every tensor, in name order."""
    lines = [
        f"{name}\t{dtype}\t{'x'.join(map(str, shape))}\t{digest}\n"
        for name, dtype, shape, digest in sorted(entries)
    ]
    return blake3("".join(lines).encode()).hexdigest()


def check_digest(
    name: str, tensor: Tensor, expected: tuple[str, tuple[int, ...], str], where: str
) -> None:
    """Refuse a tensor that is not the one a pack was made for.

    Args:
        expected: dtype, shape and digest (any prefix of the 64 digits) from the manifest.
    Raises: PackMismatchError naming the tensor.
    """
    dtype, shape, digest = expected
    found = (DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
    if found != (dtype, shape):
        raise PackMismatchError(
            f"{where}: {name} is {found[0]} {list(found[1])}, but the pack was made for "
            f"{dtype} {list(shape)}; use the target that the pack names"
        )
    if not tensor_digest(tensor).startswith(digest):
        raise PackMismatchError(
            f"{where}: {name} has other values than the target this pack was made for; "
            "use that target, or pack again for this one"
        )


def _locate(reference: str) -> tuple[Path, str, str | None]:
    """Local directory of a reference, its name, and the Hub commit if it came from there."""
    path = Path(reference)
    if path.is_dir():
        return path, path.resolve().name, None
    repository, _, revision = reference.partition("@")
    if path.exists() or repository.count("/") > 1 or reference.startswith((".", "/", "~")):
        kind = "a file" if path.exists() else "missing"
        raise CheckpointError(
            f"{reference}: {kind}; expected a Hugging Face model directory or a Hub id (user/name)"
        )
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.safetensors", _INDEX, *HUB_PATTERNS],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{reference}: no such directory here, and the Hub gave no such model ({reason})"
        ) from error
    return Path(folder), repository, Path(folder).name


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Every weight file of a directory with the tensors its index promises (None: no index)."""
    index, single = path / _INDEX, path / _SINGLE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                shards.setdefault(path / Path(file).name, set()).add(name)  # type: ignore[union-attr]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from error
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(
                    f"{shard}: this shard is listed in {_INDEX} but missing; download it again"
                )
        return shards
    if single.is_file():
        return {single: None}
    loose = sorted(path.glob("*.safetensors"))
    if loose:
        return {file: None for file in loose}
    pickles = sorted(file for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{pickles[0]}: a pickle checkpoint can run code and is not read; save the model "
            "as safetensors first (model.save_pretrained)"
        )
    raise CheckpointError(f"{path}: no {_SINGLE} here; expected a Hugging Face model directory")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as handle:
            infos = {}
            for name in handle.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = handle.get_slice(name)
                infos[name] = TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); download it again"
        ) from error
    for info in infos.values():
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {info.name} has dtype {info.dtype}; expected one of {', '.join(DTYPES)}"
            )
    return infos
