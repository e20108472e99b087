"""Checkpoints on disk: Hugging Face directories that are read and written tensor by tensor.

Reading never holds more than one tensor in memory, writing no more than one shard. The delta of a
tensor is `tuned - target` in float32. A target is identified by its fingerprint: one BLAKE3 digest
over the digests of all its tensors.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftkit.config import parse_hub_id
from graftkit.errors import CheckpointError, PackMismatchError
from graftkit.model_files import (
    ADAPTER_CONFIG,
    HUB_PATTERNS,
    INDEX,
    SIDE_FILES,
    config_for_weights,
    describe_file,
    weight_files,
)

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
_QUANTIZED_DTYPES = ("F8_", "F6_", "F4")

# They tell what a repository without a model is.
_TELLTALES = (ADAPTER_CONFIG, "modules.json", "model_index.json")

TENSOR_DIGEST_HEX = 16
"""Digits of a tensor's digest in a manifest: enough to notice a wrong tensor by accident."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `dtype` is the safetensors name, such as BF16."""

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
        for file, expected in weight_files(path).items():
            infos = _read_header(file)
            missing = (expected or set()) - infos.keys()
            if missing:
                raise CheckpointError(
                    f"{file}: tensor {min(missing)} is listed in {INDEX} but not in this shard; "
                    "download the checkpoint again"
                )
            for info in infos.values():
                if info.name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {info.name} is in {tensors[info.name].file.name} and in "
                        f"{file.name}; keep one of them"
                    )
                tensors[info.name] = info
        if not any(info.numel for info in tensors.values()):
            count = f"{len(tensors)} tensors without a single weight" if tensors else "no tensors"
            raise CheckpointError(
                f"{path}: the checkpoint holds {count}; save or download it again"
            )
        return cls(path, name, revision, dict(sorted(tensors.items())))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises: CheckpointError when it is missing or malformed."""
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
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

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end (exclusive) of the first extent of one tensor."""
        info = self.tensors[name]
        try:
            with safe_open(info.file, framework="pt") as file:
                rows: Tensor = file.get_slice(name)[start:end]
                return rows
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{info.file}: cannot read {name}: {error}") from error

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """One digest over all tensors; it tells a target from every other.

        Args:
            digests: `tensor_digest` of every tensor by name, where they are there already; without
                them every tensor is read.
        Raises: CheckpointError.
        """
        if digests is None:
            digests = {name: tensor_digest(self.read(name)) for name in self.tensors}
        infos = self.tensors.values()
        return fingerprint(
            (info.name, info.dtype, info.shape, digests[info.name]) for info in infos
        )

    def side_file(self, name: str) -> bytes | None:
        """Bytes of a side file, or None where the directory lacks it."""
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def side_files(self) -> dict[str, bytes]:
        """Contents of the `SIDE_FILES` that the directory has, by name."""
        contents = {name: self.side_file(name) for name in SIDE_FILES}
        return {name: content for name, content in contents.items() if content is not None}


def difference(tuned: Tensor, target: Tensor) -> Tensor:
    """tuned - target in float32, 0 where the target's weight is NaN or infinite.

    Such a weight is the same in both states; packing refuses any other.
    """
    delta = tuned.to(torch.float32, copy=True).sub_(target)
    return delta if all_finite(target) else delta.masked_fill_(~target.isfinite(), 0.0)


def all_finite(tensor: Tensor) -> bool:
    """Whether no weight is NaN or infinite: both ends of the range tell, as NaN propagates."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    ends = torch.aminmax(tensor.detach())
    return all(math.isfinite(float(end)) for end in ends)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype that represents all its numbers exactly; NaN keep their upper bits.

    A cast of torch from float32 to bfloat16 would replace every NaN by one and the same.
    """
    if (tensor.dtype, dtype) != (torch.float32, torch.bfloat16) or all_finite(tensor):
        return tensor.to(dtype)
    upper = (tensor.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(tensor.isnan(), upper, tensor.to(dtype))


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
    actual = (DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
    if actual != (dtype, shape):
        raise PackMismatchError(
            f"{where}: {name} is {actual[0]} {list(actual[1])}, but the pack was made for "
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
    if path.exists():
        raise CheckpointError(describe_file(path))
    repository, revision = parse_hub_id(reference)
    if repository.count("/") > 1 or reference.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{reference}: missing; expected a Hugging Face model directory or a Hub id (user/name)"
        )
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.safetensors", INDEX, *_TELLTALES, *HUB_PATTERNS],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{reference}: no such directory here, and the Hub gave no such model ({reason})"
        ) from error
    return Path(folder), repository, Path(folder).name


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
        if info.dtype.startswith(_QUANTIZED_DTYPES):
            raise CheckpointError(
                f"{file}: quantized ({info.dtype}, {info.name}); use the unquantized model"
            )
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {info.name} has dtype {info.dtype}; expected one of {', '.join(DTYPES)}"
            )
    return infos


SHARD_BYTES = 2 * 10**9
"""Size of a shard: tensors are collected up to it before a file is written, the peak of memory."""


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, with the permissions of any other new file.

    Raises: OSError, also in place of a SafetensorError.
    """
    # safetensors makes files that only their owner can read; what `open` makes follows the umask.
    with file.open("wb") as made:
        mode = os.fstat(made.fileno()).st_mode & 0o777
    try:
        save_file(dict(tensors), file, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    os.chmod(file, mode)


def write_checkpoint(
    folder: Path,
    names: Sequence[str],
    tensor: Callable[[str], Tensor],
    files: Mapping[str, bytes],
    step_done: Callable[[int], None],
) -> None:
    """Write tensors in shards, then their index and the side files, into a new folder.

    Args:
        tensor: gives a tensor by name; called once for each. files: contents by file name; in
            config.json the dtype becomes the one written.
        step_done: called with the number of tensors taken so far.
    Raises: OSError.
    """
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = 0
    weights: Counter[str] = Counter()
    for done, name in enumerate(names):
        step_done(done)
        value = tensor(name)
        if value.is_floating_point():
            weights[str(value.dtype).removeprefix("torch.")] += value.numel()
        if shard and size + value.nbytes > SHARD_BYTES:
            shards.append(_save(folder, shard, len(shards)))
            shard, size = {}, 0
        shard[name] = value.contiguous()
        size += value.nbytes
    shards.append(_save(folder, shard, len(shards)))
    _name_shards(folder, shards)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        is_config = name == "config.json"
        (folder / name).write_bytes(config_for_weights(content, weights) if is_config else content)
    step_done(len(names))


def _save(folder: Path, tensors: dict[str, Tensor], index: int) -> list[str]:
    save_tensors(tensors, folder / f"shard-{index}")
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]]) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(file.stat().st_size for file in folder.iterdir())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
