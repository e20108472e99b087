"""Factors codec: δ = scale · B A, with every word of B and A; the delta of a LoRA as it is.

LoRA (arXiv 2106.09685) section 4.1: h = W₀ x + (α / r) B A x; rsLoRA (2312.03732): α / √r.
"""

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftkit.checkpoint import DTYPE_NAMES, tensor_bytes
from graftkit.errors import CorruptPackError

MAX_RANK = 2**16 - 1

_HEAD = struct.Struct("<BBHd")  # dtypes of B and A, rank, scale
_DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_MARKS = {dtype: mark for mark, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Factors:
    """δ = scale · left @ right; left is B (out, r), right is A (r, in), each in its own dtype."""

    left: Tensor
    right: Tensor
    scale: float

    def scaled(self) -> tuple[Tensor, Tensor]:
        """left with the scale in it, and right, float32."""
        return self.left.float() * self.scale, self.right.float()


def store(factors: Factors) -> bytes:
    """The payload, as docs/skillpack-format.md lays it out.

    Raises: ValueError for a dtype other than float32, float16 and bfloat16, or a rank outside
        1 to 65535.
    """
    left, right, rank = factors.left, factors.right, factors.right.shape[0]
    if not {left.dtype, right.dtype} <= _MARKS.keys() or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"factors of {left.dtype} and {right.dtype}, rank {rank}")
    head = _HEAD.pack(_MARKS[left.dtype], _MARKS[right.dtype], rank, factors.scale)
    return b"".join((head, tensor_bytes(left), tensor_bytes(right)))


def load(payload: memoryview, shape: tuple[int, int]) -> Factors:
    """Inverse of `store` for a matrix of this shape.

    Raises: CorruptPackError for anything but a whole payload of finite numbers.
    """
    left_dtype, right_dtype, rank, scale = _read_head(payload)
    rows, columns = shape
    cut = _HEAD.size + rows * rank * left_dtype.itemsize
    size = cut + rank * columns * right_dtype.itemsize
    if len(payload) != size:
        raise CorruptPackError(
            f"factors of rank {rank} take {size} bytes for {list(shape)}, found {len(payload)}"
        )
    left = _read_matrix(payload[_HEAD.size : cut], left_dtype, rank)
    right = _read_matrix(payload[cut:], right_dtype, columns)
    if not all(bool(part.isfinite().all()) for part in (left, right)):
        raise CorruptPackError("a factor holds NaN or infinite numbers")
    return Factors(left, right, scale)


def describe(payload: memoryview, shape: tuple[int, int]) -> dict[str, object]:
    """Rank, dtypes and scale, for `inspect`."""
    left_dtype, right_dtype, rank, scale = _read_head(payload)
    names = sorted({DTYPE_NAMES[left_dtype], DTYPE_NAMES[right_dtype]})
    return {"rank": rank, "dtypes": names, "scale": scale}


def _read_head(payload: memoryview) -> tuple[torch.dtype, torch.dtype, int, float]:
    if len(payload) < _HEAD.size:
        raise CorruptPackError("factors end inside their header")
    left, right, rank, scale = _HEAD.unpack_from(payload, 0)
    if left not in _DTYPES or right not in _DTYPES or rank == 0 or not math.isfinite(scale):
        raise CorruptPackError(
            f"the header of factors names dtypes {left} and {right}, rank {rank}, scale {scale}"
        )
    return _DTYPES[left], _DTYPES[right], rank, scale


def _read_matrix(part: memoryview, dtype: torch.dtype, columns: int) -> Tensor:
    # A copy: the mapped file is read-only, and its offsets fit no alignment.
    words = torch.from_numpy(np.frombuffer(part, np.uint8).copy())
    return words.view(dtype).reshape(-1, columns)
