"""A PEFT LoRA adapter on disk, and the tensors of a target's checkpoint that it changes.

Adapter  reads adapter_config.json and adapter_model.safetensors. Only plain LoRA is read,
         W + scale · B A, with whole tensors trained beside it. A setting that is not known to be
         harmless is refused.
TensorMap  finds the tensors on disk. Adapters name modules of the live model. On disk, their
         weights have other names where a class renames them, one name for two modules where they
         are tied, and no name of their own where they are part of a stack of experts.
ExpertStack  splits the factors of a stack of experts. PEFT stores the factors of all E experts of
         one 3-D parameter in two matrices; a checkpoint stores the parameter as one stack, or as
         one or two tensors per expert:

    ΔW_e = scale · B_e A_e,   B (out, r · E) = [out, r, E],   A (r · E, in) = [E, r, in]
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftkit.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from graftkit.compress.factors import MAX_RANK, Factors
from graftkit.errors import CheckpointError
from graftkit.models.architecture import ModuleKind, TensorRole, tensor_roles, tied_names
from graftkit.models.loading import empty_model, input_embeddings, output_embeddings
from graftkit.models.views import TensorView, checkpoint_views, find_views, live_names
from graftkit.packing.pairs import TensorPair

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

# Settings that do not change what a trained adapter computes, or that are read below.
_READABLE = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config"),
    *(
        "base_model_name_or_path",
        "revision",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
    ),
    *("target_parameters", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("init_lora_weights", "ensure_weight_tying", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    "qalora_group_size",
}
# The other ways to start an adapter change the weights beside it (PiSSA, OLoRA, CorDA, LoftQ, ...).
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
INSTEAD = "merge the adapter with PEFT (merge_and_unload), save the model, and pack that"

# A, B of a linear layer; of an embedding, B and A transposed: (r, rows) and (columns, r).
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")

# PEFT saves a module that it trained whole up to three times where embeddings are saved too.
_COPIES = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module)\.")

_Positive = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class LoraSettings(BaseModel):
    """The settings that decide rank and scale of every module."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    r: _Positive
    """Rank of modules without one in rank_pattern."""
    lora_alpha: _Number
    """Alpha of modules without one in alpha_pattern."""
    use_rslora: bool | None = False
    """Scale alpha / √r in place of alpha / r."""
    rank_pattern: dict[str, _Positive] | None = None
    """Ranks by module name or regular expression."""
    alpha_pattern: dict[str, _Number] | None = None
    """Alphas by module name or regular expression."""
    base_model_name_or_path: str | None = None
    """Model that the adapter was trained on."""
    task_type: str | None = None
    """Task that PEFT loads the adapter for."""

    target_parameters: list[str] | None = None
    """Suffixes of the names of parameters that have factors of their own."""

    def rank(self, module: str) -> int:
        """Rank of a module, or of a parameter of `target_parameters` by its full name."""
        return int(_by_pattern(self.rank_pattern, self._key(module), self.r))

    def scale(self, module: str) -> float:
        """α / r, or α / √r (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, self._key(module), self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _key(self, module: str) -> str:
        """The name that PEFT matches patterns with: a targeted parameter, else the module."""
        weight = f"{module}.weight"
        named = any(f".{weight}".endswith(f".{end}") for end in self.target_parameters or ())
        return weight if named else module


@dataclass(frozen=True)
class Adapter:
    """A checked adapter; only its headers are read.

    Attributes:
        weights: its tensors by their own names.
        modules: for every module with factors, the names of B and A, and whether they belong to an
            embedding.
        whole: from the name of a parameter in the model to the adapter's tensor that replaces it.
        digest: BLAKE3 of the weight file.
    """

    path: Path
    settings: LoraSettings
    weights: Checkpoint
    modules: dict[str, tuple[str, str, bool]]
    whole: dict[str, str]
    digest: str

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a directory. Raises: CheckpointError for anything but a plain LoRA."""
        path = Path(folder)
        settings = _read_settings(path / CONFIG)
        weights = _open_weights(path)
        modules, whole = _sort_keys(weights)
        digest = blake3().update_mmap(path / WEIGHTS).hexdigest()
        return cls(path, settings, weights, modules, whole, digest)

    def matrices(self, module: str) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in) of a module, unchanged.

        Raises: CheckpointError where their shapes do not fit, or a number is not finite.
        """
        left_name, right_name, embedding = self.modules[module]
        left, right = self.read(left_name), self.read(right_name)
        if embedding:
            left, right = right.T, left.T
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise CheckpointError(
                f"{self.path}: {module} has B {list(left.shape)} and A {list(right.shape)}, "
                "expected (out, r) and (r, in); save the adapter again"
            )
        return left.contiguous(), right.contiguous()

    def factors(self, module: str, left: Tensor, right: Tensor) -> Factors:
        """B, A and the scale of a module. Raises: CheckpointError for another rank."""
        rank = self.settings.rank(module)
        if right.shape[0] != rank:
            raise CheckpointError(
                f"{self.path}: {module} has factors of rank {right.shape[0]}, but {CONFIG} makes "
                f"it {rank}; save the adapter again"
            )
        return Factors(left, right, self.settings.scale(module))

    def read(self, name: str) -> Tensor:
        """One tensor. Raises: CheckpointError where a number is NaN or infinite."""
        tensor = self.weights.read(name)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{self.path}: {name} holds NaN or infinite numbers; train the adapter again"
            )
        return tensor


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name, or a part of it behind a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default


def _read_settings(file: Path) -> LoraSettings:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as JSON ({error}); expected the directory of a PEFT adapter "
            f"with {CONFIG} and {WEIGHTS}"
        ) from error
    if not isinstance(raw, dict) or str(raw.get("peft_type")).upper() != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(f"{file}: peft_type is {kind}; only LORA is read; {INSTEAD}")
    for key, value in raw.items():
        if key not in _READABLE and value:
            raise CheckpointError(
                f"{file}: {key} is set, but only plain LoRA (W + scale B A) is read; {INSTEAD}"
            )
    start = raw.get("init_lora_weights")
    if start not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which changes the weights beside the "
            "adapter; save it with path_initial_model_for_weight_conversion first"
        )
    try:
        settings = LoraSettings.model_validate(raw)
        for key in (*(settings.rank_pattern or ()), *(settings.alpha_pattern or ())):
            re.compile(key)
    except (ValidationError, re.error) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
        place = ".".join(map(str, reason.get("loc", ("a pattern",))))
        raise CheckpointError(
            f"{file}: {place}: {reason['msg']}; save the adapter again"
        ) from error
    return settings


def _open_weights(folder: Path) -> Checkpoint:
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no {WEIGHTS} here; an adapter saved as a pickle can run code and is not "
            "read, save it again with safe_serialization=True"
        )
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            tensors = {
                name: TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), file)
                for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); fetch it again"
        ) from error
    for info in tensors.values():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{file}: {info.name} is {info.dtype}; expected one of {', '.join(FLOAT_DTYPES)}"
            )
    return Checkpoint(folder, folder.resolve().name, None, dict(sorted(tensors.items())))


def _sort_keys(weights: Checkpoint) -> tuple[dict[str, tuple[str, str, bool]], dict[str, str]]:
    """Modules with factors, and whole tensors."""
    modules: dict[str, tuple[str, str, bool]] = {}
    whole = {}
    for key in weights.tensors:
        name = key.removeprefix(KEY_PREFIX)
        if _COPIES.sub(".", key) != key and _COPIES.sub(".", key) in weights.tensors:
            continue
        kinds = [pair for pair in (_LINEAR, _EMBEDDING) if name.endswith(pair)]
        if kinds:
            [(right, left)] = kinds
            stem = key.removesuffix(right).removesuffix(left)
            if not {stem + left, stem + right} <= weights.tensors.keys():
                raise CheckpointError(f"{weights.path}: {key} has no counterpart; fetch it again")
            module = stem.removeprefix(KEY_PREFIX)
            modules[module] = (stem + left, stem + right, kinds[0] is _EMBEDDING)
        elif ".lora_" in name:
            raise CheckpointError(
                f"{weights.path}: {key} is no part of a plain LoRA (W + scale B A); {INSTEAD}"
            )
        else:
            whole[name.replace(".base_layer.", ".")] = key
    if not modules and not whole:
        raise CheckpointError(f"{weights.path}: {WEIGHTS} holds no tensors; save the adapter again")
    return modules, whole


@dataclass(frozen=True)
class ExpertStack:
    """A live parameter of E matrices (out, in), and the tensors on disk that are parts of it."""

    parameter: str
    experts: int
    rows: int
    columns: int
    transposed: bool
    views: dict[str, TensorView]

    def fits(self, left: Tensor, right: Tensor) -> bool:
        """Whether B and A have the shapes of this parameter's factors."""
        inner = left.shape[1]
        sides = (left.shape[0], right.shape[1]) == (self.rows, self.columns)
        return sides and inner == right.shape[0] and inner > 0 and inner % self.experts == 0

    def pieces(self) -> "dict[str, ExpertRows] | None":
        """The rows that each tensor on disk holds; None where one is not a band of rows."""
        pieces = {name: self._piece(view) for name, view in self.views.items()}
        bands = {name: piece for name, piece in pieces.items() if piece is not None}
        return bands if len(bands) == len(pieces) else None

    def _piece(self, view: TensorView) -> "ExpertRows | None":
        if view.whole:
            return ExpertRows(range(self.experts), slice(0, self.rows))
        expert, rest = divmod(view.offset, self.rows * self.columns)
        first, shift = divmod(rest, self.columns)
        band = len(view.shape) == 2 and view.shape[1] == self.columns and shift == 0
        if self.transposed or not band or view.stride != (self.columns, 1):
            return None
        return ExpertRows(range(expert, expert + 1), slice(first, first + view.shape[0]))


@dataclass(frozen=True)
class ExpertRows:
    """A band of rows of some experts of a stack."""

    experts: range
    rows: slice

    def cut(
        self, stack: ExpertStack, left: Tensor, right: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """B_e (rows, r) and A_e (r, in) of each expert, from PEFT's B and A of all."""
        all_left = left.reshape(stack.rows, -1, stack.experts)
        all_right = right.reshape(stack.experts, -1, stack.columns)
        for expert in self.experts:
            yield all_left[self.rows, :, expert].contiguous(), all_right[expert].contiguous()


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of the model: on disk under `name`, or an alias of the tensor `base` there."""

    name: str
    base: str | None = None


class TensorMap:
    """Finds the tensors of a target that an adapter names.

    Attributes:
        tied: alias -> owner for names that share a parameter; an alias may be on disk too.
    Raises: CheckpointError for a checkpoint whose tensors do not fit its model class.
    """

    def __init__(self, target: Checkpoint):
        self.target, self.tied = target, tied_names(target)
        self._roles, self._model = tensor_roles(target), empty_model(target)
        self._by_parameter: dict[str, list[str]] = {}
        for name, role in self._roles.items():
            self._by_parameter.setdefault(role.parameter, []).append(name)

    def find(self, parameters: list[str]) -> dict[str, TensorPlace | None]:
        """The tensor of every parameter that an adapter names, None where there is none."""
        live = live_names(self._model, parameters)
        return {name: self._place(name, live[name]) for name in parameters}

    def place(self, name: str) -> TensorPlace:
        """The place of a tensor on disk, or of an alias."""
        return TensorPlace(name, None if name in self.target.tensors else self.tied[name])

    def pair(self, place: TensorPlace) -> TensorPair:
        """The tensor in the target and in the result, which have one dtype and one shape."""
        info = self.target.tensors[place.base or place.name]
        return TensorPair(place.name, self._role(place), info, info, place.base)

    def vocabulary(self) -> list[str]:
        """Tensors on disk with a row for every token: the input embedding and the head."""
        modules = (input_embeddings(self._model), output_embeddings(self._model))
        ids = {id(module.weight) for module in modules if module is not None}
        state = self._model.state_dict(keep_vars=True)
        return [name for name, role in self._roles.items() if id(state.get(role.parameter)) in ids]

    def stacks(self, module: str) -> list[ExpertStack]:
        """The 3-D parameters of a live module, where each part of them is one tensor on disk."""
        stacks = []
        for parameter, names in self._by_parameter.items():
            shape = self._shapes.get(parameter, ())
            if parameter.rpartition(".")[0] != module or len(shape) != 3:
                continue
            transposed = self._roles[names[0]].transposed
            experts, rows, columns = shape
            sides = (columns, rows) if transposed else (rows, columns)
            views = find_views(self._model, self._views, names)
            placed = {name: view for name, view in views.items() if view is not None}
            if len(placed) == len(names):
                stacks.append(ExpertStack(parameter, experts, *sides, transposed, placed))
        return stacks

    @cached_property
    def _views(self) -> dict[str, TensorView]:
        return checkpoint_views(self._model)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        state = self._model.state_dict(keep_vars=True)
        return {name: tuple(parameter.shape) for name, parameter in state.items()}

    def _place(self, name: str, live: str | None) -> TensorPlace | None:
        if name in self.target.tensors or name in self.tied:
            return self.place(name)
        names = self._by_parameter.get(live or "", [])
        return TensorPlace(names[0]) if len(names) == 1 else None

    def _role(self, place: TensorPlace) -> TensorRole:
        if place.base is None:
            return self._roles[place.name]
        owner = self._roles[place.base]
        head = owner.kind is ModuleKind.EMBEDDING
        return replace(owner, name=place.name, kind=ModuleKind.HEAD if head else owner.kind)
