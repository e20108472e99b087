"""The `exact` codec on tensors: float words in blocks, coded against the target's words."""

import struct

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.exact import decode_words, encode_words
from graftkit.delta import tensor_bytes
from graftkit.errors import CorruptPackError

BLOCK_WORDS = 2**22
"""Words per block: bounds working memory, and blocks decode on their own."""

_WORD_DTYPES = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32}
_LENGTH = struct.Struct("<I")


def encode_exact(tuned: Tensor, target: Tensor) -> bytes:
    """Code `tuned` against `target`, two tensors of one shape and float dtype, losslessly."""
    words, context = _words(tuned), _words(target)
    blocks = [
        encode_words(words[start : start + BLOCK_WORDS], context[start : start + BLOCK_WORDS])
        for start in range(0, words.size, BLOCK_WORDS)
    ]
    return b"".join([*(_LENGTH.pack(len(block)) for block in blocks), *blocks])


def decode_exact(payload: memoryview, target: Tensor) -> Tensor:
    """The tuned tensor, of `target`'s shape and dtype. Raises: CorruptPackError."""
    context = _words(target)
    starts = range(0, context.size, BLOCK_WORDS)
    offset = len(starts) * _LENGTH.size
    if offset > len(payload):
        raise CorruptPackError("exact payload ends inside its table of blocks")
    words = np.empty_like(context)
    for i, start in enumerate(starts):
        (length,) = _LENGTH.unpack_from(payload, i * _LENGTH.size)
        if offset + length > len(payload):
            raise CorruptPackError("exact payload ends inside a block")
        block = bytes(payload[offset : offset + length])
        words[start : start + BLOCK_WORDS] = decode_words(
            block, context[start : start + BLOCK_WORDS]
        )
        offset += length
    if offset != len(payload):
        raise CorruptPackError(f"{len(payload) - offset} bytes follow the last exact block")
    return torch.from_numpy(words.view(np.uint8)).view(target.dtype).reshape(target.shape)


def _words(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor_bytes(tensor), dtype=_WORD_DTYPES[tensor.dtype])
