"""Pieces of the nursery's base text, which no skill was trained on."""

import gzip
from collections.abc import Iterator
from pathlib import Path


def pieces(file: Path, count: int, length: int) -> Iterator[tuple[str, str]]:
    """`count` pieces of `length` characters, evenly spread over a text, and where each begins."""
    text = gzip.decompress(file.read_bytes()).decode()
    step = len(text) // (count + 1)
    for start in range(step, step * count + 1, step):
        yield text[start : start + length], f"{file.name}:{start}"
