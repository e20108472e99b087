"""Packs to attach: real lossless ones, and low-rank ones whose factors lie in memory."""

from types import SimpleNamespace

import torch
from tiny_models import lossless_pack

from graftkit.checkpoint import TENSOR_DIGEST_HEX, Checkpoint, tensor_digest
from graftkit.models import ModuleKind, tensor_roles
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import TensorRecord

RANK = 3
_MATRICES = (ModuleKind.ATTENTION, ModuleKind.MLP, ModuleKind.EMBEDDING, ModuleKind.HEAD)


class MemoryPack(SkillPack):
    """A pack with the real manifest records, and without codecs."""

    def __init__(self, records, name="target"):
        self.manifest = SimpleNamespace(
            tensors=tuple(records),
            target=SimpleNamespace(name=name),
            tuned=SimpleNamespace(name="tuned"),
            files=(),
        )
        self._records = {record.name: record for record in records}
        self.tuned = {}
        self.low_rank = {}

    def __copy__(self):
        other = MemoryPack.__new__(MemoryPack)
        other.__dict__.update(self.__dict__)
        return other

    def decode(self, name, target):
        if name in self.tuned:
            return self.tuned[name].clone()
        if name in self.low_rank:
            return (target.float() + self.delta(name, target)).to(target.dtype)
        return target.clone()

    def delta(self, name, target):
        if name not in self.low_rank:
            return self.decode(name, target).float() - target.float()
        left, right = self.low_rank[name]
        transposed = self._records[name].layout == "transposed"
        return (left @ right).T if transposed else left @ right

    def factors(self, name):
        return self.low_rank.get(name)


def record_of(checkpoint, name, role, codec="exact", **more):
    tensor = checkpoint.read(name)
    layout = "transposed" if role.transposed and tensor.dim() == 2 else "matrix"
    return TensorRecord(
        name=name,
        kind=role.kind.value,
        dtype=checkpoint.tensors[name].dtype,
        shape=tuple(tensor.shape),
        blake3=tensor_digest(tensor)[:TENSOR_DIGEST_HEX],
        codec=codec,
        layout=layout,
        **more,
    )


def exact_pack(target_dir, tuned_dir):
    """A real pack that holds the tuned checkpoint exactly."""
    return lossless_pack(target_dir, tuned_dir)


def low_rank_pack(target_dir, seed=0, scale=0.05):
    """Seeded factors for every matrix, small dense changes for every other tensor."""
    target = Checkpoint.open(target_dir)
    generator = torch.Generator().manual_seed(seed)
    records, tuned, factors = [], {}, {}
    for name, role in tensor_roles(target).items():
        tensor = target.read(name)
        if role.kind in _MATRICES and tensor.dim() == 2:
            rows, columns = tensor.T.shape if role.transposed else tensor.shape
            left = torch.randn(rows, RANK, generator=generator) * scale
            factors[name] = left, torch.randn(RANK, columns, generator=generator) * scale
            records.append(record_of(target, name, role, "lowrank"))
        else:
            noise = torch.randn(tensor.shape, generator=generator) * scale
            tuned[name] = (tensor.float() + noise).to(tensor.dtype)
            records.append(record_of(target, name, role))
    pack = MemoryPack(records)
    pack.tuned, pack.low_rank = tuned, factors
    return pack


def empty_pack(target_dir):
    """Every tensor known, none changed."""
    target = Checkpoint.open(target_dir)
    roles = tensor_roles(target)
    return MemoryPack([record_of(target, name, role, "zero") for name, role in roles.items()])
