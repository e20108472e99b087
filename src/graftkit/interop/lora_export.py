"""From a pack to a LoRA adapter that PEFT and vLLM load, with a measure of the loss.

1. `loadable_modules` finds the layers whose adapter PEFT loads, by loading one onto an empty model.
   PEFT rewrites some adapters: on models whose experts transformers stacks, targets called
   gate_proj, up_proj or down_proj become parameters of the experts, even where a dense layer has
   that name; on Mamba models it refuses out_proj. It says so in a warning at most. And where
   another module reads the weight of a layer, the adapter of that layer has no effect.
2. `truncate` finds the best factors of a given rank, δ ≈ B A.
3. `export_lora` writes them, and measures what is lost and what a LoRA cannot carry.
"""

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graftkit.attachment import attached
from graftkit.attachment.calls import ChangedWeight, ReadTracker
from graftkit.attachment.separation import TrialBatch, TrialError
from graftkit.checkpoint import DTYPES, Checkpoint, save_tensors
from graftkit.compress.codecs import TensorLayout, matrices
from graftkit.compress.lowrank import eigenbasis, left_vectors
from graftkit.errors import ConfigError
from graftkit.evaluate import TokenFidelity, token_fidelity
from graftkit.files import writing
from graftkit.fuse.merge import config_changes
from graftkit.interop.adapter import CONFIG, KEY_PREFIX, WEIGHTS
from graftkit.interop.lora_import import read_lora
from graftkit.models.architecture import ModuleKind, tensor_roles
from graftkit.models.loading import empty_model, load_model, silence_transformers
from graftkit.models.text import usable_tokenizer
from graftkit.outputs import claimed
from graftkit.progress import Progress, silent
from graftkit.rows import Row
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import TensorRecord


@dataclass(frozen=True)
class Components:
    """The largest components of a matrix: δ ≈ left @ right.

    Attributes:
        left: (out, k). right: (k, in). Both float32, largest first, ‖left_k‖ = ‖right_k‖.
        energies: all squared singular values of δ, descending, float64.
    """

    left: Tensor
    right: Tensor
    energies: Tensor


def truncate(delta: Tensor, rank: int) -> Components:
    """Best approximation of δ (m, n) float32 in the Frobenius norm (Eckart–Young).

    δ_r = U Uᵀ δ,   ‖δ − δ_r‖² = Σ_{k>r} s_k²
    """
    # By a power of two, which changes no digit: squares of any delta then fit float32.
    half = max(-50, min(50, math.frexp(float(delta.abs().max()))[1] // 2))
    delta = delta * 4.0**-half
    energies, basis = eigenbasis(delta, None)
    # Where δ has a lower rank, the left vectors of rounding noise are not orthogonal to the others.
    left = torch.linalg.qr(left_vectors(delta, basis, rank).double())[0].float()
    balanced = _balance(left, left.T @ delta, energies.double() * 16.0**half)
    return Components(balanced.left * 2.0**half, balanced.right * 2.0**half, balanced.energies)


def truncate_factors(left: Tensor, right: Tensor, rank: int) -> Components:
    """`truncate` for δ = left @ right, left (m, r), right (r, n), without computing δ.

    left = Q₁ R₁, rightᵀ = Q₂ R₂: the singular values of δ are those of R₁ R₂ᵀ.
    """
    first, upper = torch.linalg.qr(left.double())
    second, lower = torch.linalg.qr(right.T.double())
    inner, values, outer = torch.linalg.svd(upper @ lower.T)
    rows = (values[:, None] * outer[: len(values)] @ second.T)[:rank]
    columns = (first @ inner[:, : len(values)])[:, :rank]
    balanced = _balance(columns, rows, values.square())
    return Components(balanced.left.float(), balanced.right.float(), balanced.energies)


def smallest_rank(energies: Sequence[Tensor], ranks: Sequence[int], share: float) -> int:
    """The first rank at which all matrices together keep `share` of their energy, else the last.

    Args:
        energies: squared singular values of each matrix, descending. ranks: ascending.
    """
    total = sum(float(part.double().sum()) for part in energies)
    for rank in ranks:
        if sum(float(part[:rank].double().sum()) for part in energies) >= share * total:
            return rank
    return ranks[-1]


def pad_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Append components of zero up to a rank; the product does not change."""
    missing = rank - right.shape[0]
    return (
        torch.cat([left, left.new_zeros(left.shape[0], missing)], dim=1),
        torch.cat([right, right.new_zeros(missing, right.shape[1])]),
    )


def _balance(left: Tensor, right: Tensor, energies: Tensor) -> Components:
    """Split the norm of each component evenly between left (unit columns) and right."""
    root = right.norm(dim=1).sqrt()
    return Components(left * root, right / root.clamp(min=1e-30)[:, None], energies)


def loadable_modules(
    target: Checkpoint, modules: Iterable[str], config: dict[str, Any]
) -> set[str]:
    """The live modules whose LoRA weights PEFT loads, and which the model then uses.

    Args:
        config: of the adapter; its target_modules are replaced.
    Raises: ConfigError where PEFT is not installed.
    """
    model = _weightless(deepcopy(empty_model(target)))
    names = sorted(set(modules) - _read_without_call(model, modules))
    loaded = _loaded(target, names, config)
    if loaded is None:
        # PEFT refuses some of them, by the last part of their names: try each part alone.
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.rpartition(".")[2], []).append(name)
        parts = [_loaded(target, group, config) or set() for group in groups.values()]
        loaded = set().union(*parts)
    # What PEFT loads alone, it must load together with the others, too.
    while loaded and (again := _loaded(target, sorted(loaded), config) or set()) != loaded:
        loaded = again
    return loaded


def _read_without_call(model: Any, modules: Iterable[str]) -> set[str]:
    """Modules whose weights the model reads without calling them, found with random inputs."""
    watched = {name: model.get_submodule(name) for name in modules}
    tracker = ReadTracker(
        [ChangedWeight(name, module.weight, module) for name, module in watched.items()]
    )
    try:
        batch = TrialBatch(model)
        tracker.start()
        try:
            batch.run(0)
        finally:
            tracker.stop()
    except TrialError:
        return set()
    return set(tracker.direct_reads)


def _loaded(target: Checkpoint, names: list[str], config: dict[str, Any]) -> set[str] | None:
    """The modules of a random adapter whose weights PEFT has loaded; None if it refuses."""
    try:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ConfigError(
            "an exported adapter is checked by loading it in PEFT, which is not installed; "
            "pip install peft"
        ) from error
    model = _weightless(deepcopy(empty_model(target)))
    written = {name: _random_factors(model.get_submodule(name)) for name in names}
    tensors = {
        f"{KEY_PREFIX}{name}.lora_{letter}.weight": value
        for name, factors in written.items()
        for letter, value in zip("AB", factors, strict=True)
    }
    with TemporaryDirectory(prefix="graftkit-") as folder:
        save_file(tensors, Path(folder) / WEIGHTS)
        settings = {**config, "r": 1, "lora_alpha": 1, "target_modules": names}
        (Path(folder) / CONFIG).write_text(json.dumps(settings))
        try:
            with silence_transformers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError):
            return None
    loaded = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            loaded[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    return {name for name, factors in written.items() if _same(factors, loaded.get(name))}


def _weightless(model: Any) -> Any:
    """Give the model weights of zero that take no memory: PEFT needs the device of each layer."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)
    return model


def _random_factors(module: Any) -> tuple[Tensor, Tensor]:
    rows, columns = module.weight.shape
    if not hasattr(module, "out_features"):  # Conv1D holds (in, out)
        rows, columns = columns, rows
    return torch.randn(1, columns), torch.randn(rows, 1)


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None) -> bool:
    return other is not None and all(
        not b.is_meta and a.shape == b.shape and torch.equal(a, b.float())
        for a, b in zip(one, other, strict=True)
    )


RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that are tried by default: those that serving engines support."""
ENERGY = 0.99
"""Share of the linear deltas' energy that the default rank has to keep."""


@dataclass(frozen=True)
class ExportedModule:
    """One linear layer of the adapter."""

    name: str
    """Tensor name in the checkpoint."""
    module: str
    """Live module."""
    own_factors: bool
    """Whether these are the pack's own factors, not a truncation."""
    relative_error: float
    """‖δ − B A‖_F / ‖δ‖_F with B and A as they are stored."""
    energy_share: float
    """‖δ‖² over that of the whole pack."""


@dataclass(frozen=True)
class LeftOut:
    """One tensor whose change a LoRA cannot carry."""

    name: str
    """Tensor name in the checkpoint."""
    kind: str
    """Module kind."""
    energy_share: float
    """‖δ‖² over that of the whole pack."""


@dataclass(frozen=True)
class LoraExport:
    """An adapter on disk and its loss."""

    output: str
    """Its directory."""
    rank: int
    """Rank of every module."""
    adapter_bytes: int
    """Bytes of the weight file."""
    modules: tuple[ExportedModule, ...]
    """The layers that it changes."""
    left_out: tuple[LeftOut, ...]
    """The tensors that it leaves unchanged."""
    relative_error: float
    """‖δ − B A‖ / ‖δ‖ over the layers that it changes."""
    relative_error_overall: float
    """The same over all tensors of the pack, including those left out."""
    fidelity: TokenFidelity | None
    """Distance of target + LoRA from target + pack; None without rows."""


def export_lora(
    pack: str | Path | SkillPack,
    target: str | Path | Checkpoint,
    directory: str | Path,
    rank: int | None = None,
    rows: Sequence[Row] | None = None,
    progress: Progress | None = None,
) -> LoraExport:
    """Write the linear deltas of a pack as a PEFT LoRA adapter of one rank, α = r.

    Every nn.Linear and Conv1D that PEFT loads on this model, except the output head, gets the best
    approximation of its delta of that rank in the Frobenius norm. Factors that the pack itself
    stores are written as they are where their rank allows it, with the scale in B (in float32 where
    B's dtype cannot hold it). Changes that PEFT would not load are left out and listed.

    Args:
        directory: a new or empty folder; it is written completely or not at all.
        rank: by default that of the pack where it stores only LoRA factors, else the smallest of 8,
            16, 32, 64, 128, 256 that keeps 99 % of the linear deltas' energy (else 256).
        rows: measure KL(target + pack || target + LoRA) per token on these rows, in float32.
    Raises: PackMismatchError for another target; ConfigError where nothing can be exported, or for
        a rank below 1; CorruptPackError; RowsError; OutputError. Nothing is written then.
    Source: Eckart–Young; LoRA (arXiv 2106.09685) 4.1.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    report = progress or silent
    inputs = [
        pack.digest if isinstance(pack, SkillPack) else pack,
        target.path if isinstance(target, Checkpoint) else target,
    ]
    with claimed(directory, ["export", *inputs, rank], folder=True, inputs=inputs) as claim:
        opened = pack if isinstance(pack, SkillPack) else SkillPack.load(pack)
        checkpoint = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
        opened.check_target(checkpoint.read, set(checkpoint.tensors), str(checkpoint.path))
        export = _Export(opened, checkpoint, rank)
        claim.open_work()
        with writing(claim.path):
            claim.result.mkdir()
            result = export.write(claim.result, str(directory), report)
        if rows is None:
            return result
        return _measured(result, opened, checkpoint, claim.result, rows, report)


class _Export:
    """The export of one pack."""

    def __init__(self, pack: SkillPack, target: Checkpoint, rank: int | None):
        self.pack, self.target, self.fixed_rank = pack, target, rank
        self.roles = tensor_roles(target)
        changed = [r for r in pack.manifest.tensors if r.codec != "zero" or r.appended_bytes]
        linear = {r.name: self.roles[r.name].module for r in changed if self._is_carried(r)}
        loadable = loadable_modules(target, linear.values(), self._config(linear)) if linear else ()
        self.linear = [record for record in changed if linear.get(record.name) in loadable]
        self.rest = [record for record in changed if linear.get(record.name) not in loadable]
        keys = config_changes(pack, target)
        if keys:
            raise ConfigError(
                f"config.json of {pack.manifest.tuned.name} has another {', '.join(keys)}, which "
                "changes what the model computes, and a LoRA cannot carry that; use graftkit merge"
            )
        if not self.linear:
            raise ConfigError(
                f"the pack of {pack.manifest.tuned.name} changes no linear layer that PEFT would "
                f"load ({len(linear)} linear layers in all), and a LoRA carries nothing else; use "
                "graftkit merge"
            )

    def write(self, folder: Path, output: str, progress: Progress) -> LoraExport:
        """Write the adapter into the folder."""
        steps = len(self.linear) + len(self.rest)
        components: dict[str, Components] = {}
        for done, record in enumerate(self.linear):
            progress("factoring", done, steps)
            components[record.name] = self._components(record)
        energies = {name: float(part.energies.double().sum()) for name, part in components.items()}
        for done, record in enumerate(self.rest, start=len(self.linear)):
            progress("factoring", done, steps)
            energies[record.name] = float(self._delta(record).double().square().sum())
        progress("factoring", steps, steps)
        total = sum(energies.values()) or 1.0
        rank = self._rank(list(components.values()))
        tensors: dict[str, Tensor] = {}
        modules = []
        for record in self.linear:
            own, left, right = self._factors(record, components.pop(record.name), rank)
            if not bool(left.isfinite().all() and right.isfinite().all()):
                raise ConfigError(
                    f"{record.name}: its factors are beyond what {record.dtype} holds; merge the "
                    "pack, or use it as it is"
                )
            role = self.roles[record.name]
            tensors[f"{KEY_PREFIX}{role.module}.lora_A.weight"] = right.contiguous()
            tensors[f"{KEY_PREFIX}{role.module}.lora_B.weight"] = left.contiguous()
            error = math.sqrt(self._lost(record, left, right) / (energies[record.name] or 1.0))
            share = energies[record.name] / total
            modules.append(ExportedModule(record.name, role.module, own, error, share))
        _save(folder, tensors, self._config([record.name for record in self.linear], rank))
        lost = sum(part.relative_error**2 * part.energy_share for part in modules)
        carried = sum(part.energy_share for part in modules)
        left_out = [LeftOut(r.name, r.kind, energies[r.name] / total) for r in self.rest]
        return LoraExport(
            output=output,
            rank=rank,
            adapter_bytes=(folder / WEIGHTS).stat().st_size,
            modules=tuple(modules),
            left_out=tuple(left_out),
            relative_error=math.sqrt(lost / (carried or 1.0)),
            relative_error_overall=math.sqrt(lost + sum(part.energy_share for part in left_out)),
            fidelity=None,
        )

    def _is_carried(self, record: TensorRecord) -> bool:
        role = self.roles.get(record.name)
        plain = record.base is None and record.tuned_shape is None
        return plain and role is not None and role.linear and role.kind is not ModuleKind.HEAD

    def _delta(self, record: TensorRecord) -> Tensor:
        """The delta of one tensor in its stored shape, float32."""
        if record.target_name is not None:
            return self.pack.delta(record.name, self.target.read(record.target_name))
        zeros = torch.zeros(record.shape, dtype=DTYPES[record.dtype])
        return self.pack.delta(record.name, zeros)

    def _matrix(self, record: TensorRecord) -> Tensor:
        """The delta of a linear layer, (out, in)."""
        layout: TensorLayout = "transposed" if self.roles[record.name].transposed else "matrix"
        [matrix] = matrices(self._delta(record), layout)
        return matrix

    def _components(self, record: TensorRecord) -> Components:
        rank = self.fixed_rank or RANKS[-1]
        factors = self.pack.factors(record.name)
        if factors is not None:
            return truncate_factors(*factors, rank)
        return truncate(self._matrix(record), rank)

    def _rank(self, components: Sequence[Components]) -> int:
        if self.fixed_rank is not None:
            return self.fixed_rank
        own = [self.pack.plain_factors(record.name) for record in self.linear]
        ranks = [factors.right.shape[0] for factors in own if factors is not None]
        if len(ranks) == len(own):
            return max(ranks)
        return smallest_rank([part.energies for part in components], RANKS, ENERGY)

    def _factors(
        self, record: TensorRecord, components: Components, rank: int
    ) -> tuple[bool, Tensor, Tensor]:
        """Whether the factors are the pack's own, then B and A of one layer as stored."""
        plain = self.pack.plain_factors(record.name)
        if plain is not None and plain.right.shape[0] <= rank:
            scaled, _ = plain.scaled()
            left = scaled.to(plain.left.dtype)
            exact = torch.equal(left.float(), scaled)
            return True, *pad_rank(left if exact else scaled, plain.right, rank)
        factors = self.pack.factors(record.name)
        own = factors is not None and factors[1].shape[0] <= rank
        truncated = components.left[:, :rank], components.right[:rank]
        left, right = factors if factors and own else truncated
        dtype = DTYPES[record.dtype]
        return own, *pad_rank(left.to(dtype), right.to(dtype), rank)

    def _lost(self, record: TensorRecord, left: Tensor, right: Tensor) -> float:
        """‖δ − B A‖²."""
        error = torch.addmm(self._matrix(record), left.float(), right.float(), alpha=-1)
        return float(error.double().square().sum())

    def _config(self, names: Iterable[str], rank: int = 1) -> dict[str, Any]:
        """adapter_config.json for some tensors of the checkpoint."""
        modules = sorted(self.roles[name].module for name in names)
        generates = empty_model(self.target).can_generate()
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if generates else None,
            "base_model_name_or_path": self.target.name,
            "revision": self.target.revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(self.roles[name].transposed for name in names),
            "init_lora_weights": True,
            "target_modules": modules,
            "modules_to_save": None,
        }


def _measured(
    result: LoraExport,
    pack: SkillPack,
    target: Checkpoint,
    folder: Path,
    rows: Sequence[Row],
    progress: Progress,
) -> LoraExport:
    """The result with the distance of target + LoRA, read back from disk, from target + pack."""
    lora = read_lora(target, folder, progress)
    tokenizer = usable_tokenizer(target)
    packed, approximate = (load_model(target, torch.float32) for _ in range(2))
    with attached(packed, pack), attached(approximate, lora):
        step = partial(progress, "comparing")
        fidelity = token_fidelity(packed, approximate, tokenizer, rows, step)
    return replace(result, fidelity=fidelity)


def _save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
