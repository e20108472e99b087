"""Probes on disk, so that another budget does not fit those of every cut again."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graftkit.files import replaced_file
from graftkit.vision.probe import DECAYS, ITERATIONS, Probe

_FIELDS = tuple(field.name for field in fields(Probe))
_FITTED = {"fitted": json.dumps([DECAYS, ITERATIONS])}


def write_probes(probes: Sequence[Probe], file: Path) -> None:
    """Write probes, in their order, whole or not at all. Raises: OutputError."""
    values = {
        f"{index}.{name}": _as_tensor(getattr(probe, name))
        for index, probe in enumerate(probes)
        for name in _FIELDS
    }
    with replaced_file(file) as partial:
        partial.write_bytes(save(values, metadata=_FITTED))


def read_probes(file: Path, count: int) -> list[Probe] | None:
    """The first `count` probes; None where they are not there, damaged, or fitted otherwise."""
    try:
        with safe_open(file, framework="pt") as found:
            if found.metadata() != _FITTED:
                return None
            values = [
                {name: found.get_tensor(f"{index}.{name}") for name in _FIELDS}
                for index in range(count)
            ]
    except (OSError, SafetensorError):
        return None
    return [
        Probe(**{name: value if value.ndim else value.item() for name, value in of.items()})
        for of in values
    ]


def _as_tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.tensor(value, dtype=torch.float64)
