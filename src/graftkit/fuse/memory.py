"""The file in which a running merge waits for the next pack: its memory between two calls.

A safetensors file: the running tensors in float32 under the names of the target's, and in
`__metadata__` one entry, `graftkit-running-merge`: the digest of header and tensors, a blank, and
the header as JSON. One, because safetensors writes several in any order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftkit.delta import Checkpoint, tensor_bytes
from graftkit.errors import CheckpointError
from graftkit.sharded import save_tensors

FORMAT = "graftkit-running-merge"
VERSION = 1

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Part(BaseModel):
    """Common rules: frozen, no unknown keys, no guessed types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Taken(Part):
    """One pack that was merged: the name of its tuned model, its digest and its licence."""

    name: str
    digest: Digest
    licence: str | None


class Header(Part):
    """Everything but the tensors; `files` are the side files that every pack changed alike."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    method: Literal["opcm", "kif"]
    target: Digest
    packs: Annotated[tuple[Taken, ...], Field(min_length=1, strict=False)]
    files: dict[str, Digest]
    statistics: dict[str, Annotated[float, Field(allow_inf_nan=False, strict=False)]]


def write_memory(file: Path, header: Header, tensors: dict[str, Tensor]) -> None:
    """Write a file. Raises: OSError."""
    text = header.model_dump_json()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, file, {FORMAT: f"{_digest(text, contiguous)} {text}"})


def read_memory(file: Path, target: Checkpoint) -> tuple[Header, dict[str, Tensor]]:
    """Open a file and check all of it: digest, and that its tensors are those of the target.

    Raises: CheckpointError for anything that `write_memory` did not write for this target.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            entry = (handle.metadata() or {}).get(FORMAT)
            if entry is None:
                raise CheckpointError(
                    f"{file}: not the state of a running merge; name a file that --state wrote, or "
                    "a new one"
                )
            names = sorted(handle.keys())
            for name in names:
                _check_place(file, name, handle.get_slice(name), target)
            # A copy of its own: a mapped tensor may start anywhere, and its alignment can decide
            # the last bit of a product.
            tensors = {name: handle.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a safetensors file ({error}); begin again without it"
        ) from error
    digest, _, text = entry.partition(" ")
    if digest != _digest(text, tensors):
        raise CheckpointError(
            f"{file}: the file is damaged, it does not match its digest; begin again without it"
        )
    try:
        return Header.model_validate_json(text), tensors
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{file}: {where} of its header is not as expected ({first['msg']}); use the version "
            "of graftkit that wrote it"
        ) from error


def _check_place(file: Path, name: str, found: object, target: Checkpoint) -> None:
    info = target.tensors.get(name)
    shape, dtype = tuple(found.get_shape()), found.get_dtype()  # type: ignore[attr-defined]
    if info is None or shape != info.shape or dtype != "F32":
        expected = "no such tensor" if info is None else f"F32 {list(info.shape)}"
        raise CheckpointError(
            f"{file}: it holds {name} as {dtype} {list(shape)}, the target asks for {expected}; "
            "use the target that the state was begun with"
        )


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = blake3(text.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensor_bytes(tensors[name]))
    return hasher.hexdigest()
