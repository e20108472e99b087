"""Write a Hugging Face directory tensor by tensor, never more than a shard in memory."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graftkit.side_files import written_config

SHARD_BYTES = 2 * 10**9
"""Tensors are collected up to this size before a file is written: the peak of memory."""


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, as readable as any other new file.

    Raises: OSError, also where safetensors calls it otherwise.
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
        (folder / name).write_bytes(written_config(content, weights) if is_config else content)
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
