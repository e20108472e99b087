"""Lossless forms that anyone can have: XOR and zstd, and ZipNN; restored and compared each time.

XOR of the bf16 words of target and tuned, high bytes of all tensors first, then low bytes (the idea
of BitX, arXiv 2505.06252), through zstd. ZipNN, arXiv 2411.05239: its delta mode, and its bf16 mode
on the XOR; the package is used as it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.problem import Pair, Problem
from graftkit.checkpoint import tensor_bytes

LEVELS = (19, 22)


class XorZstd:
    """The better of two levels and of three arrangements of the bytes."""

    name = "XOR + zstd"
    seeded = own = False

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the smallest form: a byte that names the arrangement, then one zstd frame."""
        import zstandard

        planes = _planes(_xor(problem.pair))
        best, choice = b"", {}
        for level in LEVELS:
            settings = zstandard.ZstdCompressionParameters.from_level(level, window_log=25)
            coder = zstandard.ZstdCompressor(compression_params=settings)
            for arrangement, content in enumerate(planes):
                if best and level != LEVELS[0] and arrangement != best[0]:
                    continue  # the slow level is for the arrangement that won at the fast one
                parts = [coder.compress(part) for part in content]
                coded = bytes([arrangement]) + len(parts[0]).to_bytes(4, "little") + b"".join(parts)
                if not best or len(coded) < len(best):
                    best, choice = coded, {"level": level, "arrangement": arrangement}
        file.write_bytes(best)
        return choice

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """Tuned's tensors."""
        import zstandard

        coded, coder = file.read_bytes(), zstandard.ZstdDecompressor()
        first = int.from_bytes(coded[1:5], "little")
        parts = [coder.decompress(coded[5 : 5 + first])]
        if coded[0] == 1:
            parts.append(coder.decompress(coded[5 + first :]))
        return restored(pair, _joined(coded[0], parts))


class ZipNN:
    """`zipnn` in delta mode, and in bf16 mode on the XOR; the smaller one is written."""

    name = "ZipNN"
    seeded = own = False

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the smaller form behind a byte that names it."""
        pair = problem.pair
        before, after = (all_bytes(pair, tensors) for tensors in (pair.side.before, pair.after))
        forms: dict[str, Callable[[], bytes]] = {
            "delta": lambda: self._delta(pair).compress(after, delta_second_data=before),
            "bf16 of the XOR": lambda: self._plain().compress(_xor(pair).tobytes()),
        }
        sizes = {name: bytes(form()) for name, form in forms.items()}
        choice = min(sizes, key=lambda name: len(sizes[name]))
        file.write_bytes(bytes([list(forms).index(choice)]) + sizes[choice])
        return {"mode": choice, "bytes": {name: len(form) + 1 for name, form in sizes.items()}}

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """Tuned's tensors."""
        coded = file.read_bytes()
        if coded[0] == 0:
            before = all_bytes(pair, pair.side.before)
            plain = bytes(self._delta(pair).decompress(coded[1:], delta_second_data=before))
            words = np.frombuffer(plain, np.uint16) ^ np.frombuffer(before, np.uint16)
        else:
            words = np.frombuffer(bytes(self._plain().decompress(coded[1:])), np.uint16)
        return restored(pair, words)

    def _delta(self, pair: Pair) -> Any:
        import zipnn

        return zipnn.ZipNN(
            bytearray_dtype="bfloat16", delta_compressed_type="byte", input_format="byte"
        )

    def _plain(self) -> Any:
        import zipnn

        return zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte")


def all_bytes(pair: Pair, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of all tensors in the order of their names."""
    return b"".join(bytes(tensor_bytes(tensors[name])) for name in sorted(pair.side.before))


def _xor(pair: Pair) -> np.ndarray:
    before, after = (
        np.frombuffer(all_bytes(pair, tensors), np.uint16)
        for tensors in (pair.side.before, pair.after)
    )
    return before ^ after


def _planes(words: np.ndarray) -> tuple[list[bytes], ...]:
    """As they are; high and low bytes apart; high bytes behind low ones in one stream."""
    pairs = words.view(np.uint8).reshape(-1, 2)
    high, low = pairs[:, 1].tobytes(), pairs[:, 0].tobytes()
    return [words.tobytes()], [high, low], [high + low]


def _joined(arrangement: int, parts: list[bytes]) -> np.ndarray:
    if arrangement == 0:
        return np.frombuffer(parts[0], np.uint16)
    both = np.frombuffer(b"".join(parts), np.uint8).reshape(2, -1)
    return np.ascontiguousarray(both[::-1].T).view(np.uint16).reshape(-1)


def restored(pair: Pair, xor: np.ndarray) -> dict[str, Tensor]:
    """Tuned's tensors from the XOR of all bf16 words with the target's."""
    before = np.frombuffer(all_bytes(pair, pair.side.before), np.uint16)
    flat = torch.from_numpy((before ^ xor).view(np.int16)).view(torch.bfloat16)
    names = sorted(pair.side.before)
    shapes = [pair.side.before[name].shape for name in names]
    parts = flat.split([shape.numel() for shape in shapes])
    return {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
