"""What a change of config.json changes in what a model computes.

No list of keys is exhaustive, so the question goes to the model's own class: two models without
weights are built, one from each configuration, and their modules are compared. A key that leaves
no trace in them can still be read by a forward pass, so the code of the model's classes is
searched for its name as well.

Whether two values of any kind are alike, as far as a forward pass can see.
"""

import inspect
import itertools
import re
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel, cache_utils, masking_utils
from transformers import modeling_rope_utils as rope_utils

from graftkit.errors import GraftError
from graftkit.models.loading import LOAD_ERRORS, silence_transformers

CALLER_KEYS = frozenset(
    {
        "dtype",
        "torch_dtype",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "_experts_implementation_internal",
    }
)
"""Chosen by whoever loads or calls a model: how it runs and what a call returns beside answers."""

# Names, and what the tensors of a pack say themselves: resized vocabularies and labels, own heads.
_SAID_ELSEWHERE = frozenset(
    {
        "model_type",
        "architectures",
        "transformers_version",
        "id2label",
        "label2id",
        "vocab_size",
        "tie_word_embeddings",
    }
)
_ROW_COUNTS = frozenset({"num_embeddings", "out_features", "vocab_size", "num_labels"})
# Dropout, initial weights and losses: training only.
_TRAINING = re.compile(r"drop|initiali[sz]er|_init(_|$)|init_std|loss")

# Rotary embeddings of other types never look at the length of what they embed.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# A configuration comes out of a file that anybody may have made: what is built from it is bounded.
_LARGEST_INTEGER = 2**24
_EXTRA_PARAMETERS = 1_000
_REAL = re.compile(r"theta|base|scal|factor|max_(length|size)")  # reals, and no counts

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
# What the base classes do before and behind a forward pass: load, save, sample. Layers of torch
# are looked at one by one, since what one reads is nothing to another.
_NOT_FORWARD = ("builtins", "torch.", "transformers.modeling_utils", "transformers.generation")
_SET_UP = ("__init__", "_init_weights", "post_init", "extra_repr")


class UnknownEffectError(GraftError):
    """A configuration from which the model's class cannot be built."""


@dataclass
class Differences:
    """Places where two models of one class, built from two configurations, are not alike.

    Attributes:
        attributes: plain attributes, by module and attribute.
        buffers: buffers that are not saved, by module and buffer.
        replaced: modules without weights that are of another class, such as activations.
        structure: modules that differ in their weights or their parts.
    """

    attributes: list[tuple[str, str]] = field(default_factory=list)
    buffers: list[tuple[str, str]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)


def tuned_config(config: PretrainedConfig, settings: dict[str, Any]) -> PretrainedConfig:
    """The configuration that a config.json describes, run as the model of `config` is.

    Raises: UnknownEffectError for settings that the class refuses.
    """
    _check_integers(settings)
    try:
        with silence_transformers():
            tuned: Any = type(config).from_dict(deepcopy(settings))
            tuned._attn_implementation = config._attn_implementation
            tuned._experts_implementation = config._experts_implementation
    except (*LOAD_ERRORS, RecursionError) as error:
        raise UnknownEffectError(f"{type(config).__name__} refuses it: {_reason(error)}") from error
    result: PretrainedConfig = tuned
    return result


def _check_integers(settings: dict[str, Any], path: str = "") -> None:
    """Raises: UnknownEffectError for numbers of layers, labels or positions that no model has."""
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config"):
            _check_integers(value, f"{path}{key}.")
        elif isinstance(value, int) and value > _LARGEST_INTEGER and not _REAL.search(key):
            raise UnknownEffectError(
                f"{path}{key} is {value}; at most {_LARGEST_INTEGER} is supported"
            )


def skeletons(
    model_class: type[PreTrainedModel], before: PretrainedConfig, after: PretrainedConfig
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of one class, the second built within bounds that the first one sets.

    Raises: UnknownEffectError.
    """
    base = skeleton(model_class, before)
    most = 2 * sum(1 for _ in base.parameters()) + _EXTRA_PARAMETERS
    return base, skeleton(model_class, after, most)


def skeleton(
    model_class: type[PreTrainedModel], config: PretrainedConfig, most: int = sys.maxsize
) -> PreTrainedModel:
    """A model of that configuration whose parameters are empty and whose buffers have values.

    Args:
        most: parameters that it may have.
    Raises: UnknownEffectError.
    """
    thread = threading.get_ident()
    room = itertools.count()

    def empty(module: nn.Module, name: str, parameter: Any) -> Any:
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        if next(room) >= most:
            raise ValueError(f"it has more than {most} parameters")
        return nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)
    try:
        # Initial weights draw numbers where a buffer is random; the caller's are not disturbed.
        with (
            silence_transformers(),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.device("cpu"),
        ):
            built: Any = model_class
            model: PreTrainedModel = built(deepcopy(config)).eval()
    except (*LOAD_ERRORS, ArithmeticError, AssertionError, LookupError) as error:
        name = model_class.__name__
        raise UnknownEffectError(f"{name} cannot be built: {_reason(error)}") from error
    finally:
        handle.remove()
    return model


def compare_models(before: nn.Module, after: nn.Module) -> Differences:
    """All places where two models of one class differ; values of weights are not looked at."""
    differences = Differences()
    _compare(differences, "", before, after)
    return differences


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters, buffers, modules, hooks and configurations."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES
        and name not in ("generation_config", "name_or_path", "warnings_issued")
        and not isinstance(value, PretrainedConfig)
    }


def volatile_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's own buffers that no checkpoint holds."""
    kept = module._non_persistent_buffers_set
    return {
        name: value for name, value in module._buffers.items() if name in kept and value is not None
    }


def changed_keys(
    before: PretrainedConfig, after: PretrainedConfig, path: str = ""
) -> Iterator[tuple[str, str]]:
    """(path of the configuration, key) of all that differs but for `CALLER_KEYS`."""
    one, other = vars(before), vars(after)
    for key in sorted(one.keys() | other.keys()):
        old, new = one.get(key), other.get(key)
        if isinstance(old, PretrainedConfig) and isinstance(new, PretrainedConfig):
            yield from changed_keys(old, new, f"{path}{key}.")
        elif key not in CALLER_KEYS and not is_same(old, new):
            yield path, key


def effective_keys(
    model_class: type[PreTrainedModel], before: PretrainedConfig, after: PretrainedConfig
) -> list[str]:
    """The changed keys that change, or may change, what a model in eval mode computes.

    Keys of resized vocabularies and labels and of tied weights are not among them: the tensors of
    a pack say what they say.

    Raises: UnknownEffectError where the class cannot be built.
    """
    if before.model_type != after.model_type:
        return ["model_type"]
    changed = [pair for pair in changed_keys(before, after) if not _is_inert(pair[1])]
    if not changed:
        return []
    base, tuned = skeletons(model_class, before, after)
    names = _names_read(base) | _names_read(tuned)
    built = _computes(compare_models(base, tuned), base, names)
    found = [
        path + key
        for path, key in changed
        if key in names or (built and _shows(model_class, base, after, path, key, names))
    ]
    # Keys that have their effect only together are named together.
    return found or ([path + key for path, key in changed] if built else [])


def possibly_effective_keys(before: PretrainedConfig, after: PretrainedConfig) -> list[str]:
    """The changed keys but for those that compute nothing in any model."""
    keys = [path + key for path, key in changed_keys(before, after) if not _is_inert(key)]
    return keys if before.model_type == after.model_type else ["model_type", *keys]


def differing_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """`possibly_effective_keys` of two config.json whose architecture is not known here."""
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [key for key in keys if key not in CALLER_KEYS and not _is_inert(key)]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_inert(key: str) -> bool:
    return key in _SAID_ELSEWHERE or _TRAINING.search(key) is not None


def _shows(
    model_class: type[PreTrainedModel],
    base: PreTrainedModel,
    after: PretrainedConfig,
    path: str,
    key: str,
    names: set[str],
) -> bool:
    """Whether a key alone makes another model, or none."""
    config: Any = deepcopy(base.config)
    part, source = config, after
    for step in path.split(".")[:-1]:
        part, source = getattr(part, step), getattr(source, step)
    if key in vars(source):
        vars(part)[key] = deepcopy(vars(source)[key])
    else:
        vars(part).pop(key, None)
    try:
        alone = skeleton(model_class, config)
    except UnknownEffectError:
        return True
    return _computes(compare_models(base, alone), base, names)


def _computes(differences: Differences, base: nn.Module, names: set[str]) -> bool:
    """Whether a forward pass meets one of the differences."""
    if differences.buffers or differences.replaced or differences.structure:
        return True
    return any(
        _is_read(base.get_submodule(path), attribute, names)
        for path, attribute in differences.attributes
    )


def _is_read(module: nn.Module, attribute: str, names: set[str]) -> bool:
    """Whether a forward pass in eval mode may read an attribute of a module."""
    if attribute in _ROW_COUNTS or _TRAINING.search(attribute):
        return False
    # An embedding looks at its padding_idx in the backward pass, dropout at its p in training.
    if attribute == "padding_idx" and isinstance(module, nn.Embedding):
        return attribute in names and type(module) is not nn.Embedding
    if attribute == "p" and isinstance(module, nn.modules.dropout._DropoutNd):
        return False
    classes = [cls for cls in type(module).__mro__ if _is_of_torch(cls)]
    own = [_names_of(value) for cls in classes for value in vars(cls).values()]
    return attribute in names.union(*own)


def _names_read(model: PreTrainedModel) -> set[str]:
    """Every attribute that the code of a forward pass may read of a module or configuration."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    owned = [cls for cls in classes if not cls.__module__.startswith(_NOT_FORWARD)]
    sources = {inspect.getmodule(cls) for cls in owned} | {masking_utils, cache_utils}
    kinds = [vars(module).get("rope_type") for module in model.modules()]
    if any(kind in str(found) for kind in _LENGTH_DEPENDENT_ROPE for found in kinds):
        sources.add(rope_utils)
    functions = [value for cls in owned for value in vars(cls).values()]
    for source in sources - {None}:
        functions += _own_functions(source)  # type: ignore[arg-type]
    names: set[str] = set()
    for function in functions:
        names |= _names_of(function)
    return names


def _is_of_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.") and cls is not nn.Module


def _own_functions(module: ModuleType) -> list[Any]:
    """Functions of a module, and those of its classes where it is one of helpers only."""
    own = [
        value
        for value in vars(module).values()
        if getattr(value, "__module__", "") == module.__name__
    ]
    functions = [value for value in own if isinstance(value, FunctionType)]
    if module in (masking_utils, cache_utils):
        classes = [value for value in own if isinstance(value, type)]
        functions += [value for cls in classes for value in vars(cls).values()]
    return functions


def _names_of(function: Any) -> set[str]:
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if isinstance(function, property):
        function = function.fget
    if not callable(function) or isinstance(function, type):
        return set()
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType):
        return set()
    is_set_up = plain.__name__ in _SET_UP and "Cache" not in plain.__qualname__
    return set() if is_set_up else set(_code_names(plain.__code__))


def _code_names(code: CodeType) -> Iterator[str]:
    """Attributes, and texts that `getattr` may be called with."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _compare(differences: Differences, path: str, before: nn.Module, after: nn.Module) -> None:
    if type(before) is not type(after):
        weightless = not before.state_dict() and not after.state_dict()
        (differences.replaced if weightless else differences.structure).append(path)
        return
    present = [
        {name for name, value in owner.items() if value is not None}
        for module in (before, after)
        for owner in (module._parameters, module._modules)
    ]
    if present[:2] != present[2:]:
        differences.structure.append(path)
        return
    one, other = plain_attributes(before), plain_attributes(after)
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or not is_same(one[name], other[name]):
            differences.attributes.append((path, name))
    old, new = volatile_buffers(before), volatile_buffers(after)
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or not is_same(old[name], new[name]):
            differences.buffers.append((path, name))
    for name, child in before._modules.items():
        if child is not None:
            below = f"{path}.{name}" if path else name
            _compare(differences, below, child, after.get_submodule(name))


def is_same(one: Any, other: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Equality by content: of tensors, containers, functions and objects of any class.

    Modules and configurations count as alike: who compares models looks at them one by one. Empty
    tensors have no values to differ in.
    """
    if one is other or id(one) in seen or isinstance(one, (nn.Module, PretrainedConfig)):
        return type(one) is type(other)
    if type(one) is not type(other):
        return False
    seen = seen | {id(one)}
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and (one.is_meta or other.is_meta or torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k], seen) for k in one)
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(is_same(a, b, seen) for a, b in pairs)
    inside = _inside(one)
    if inside is not None:
        return is_same(inside, _inside(other), seen)
    return bool(one == other) or repr(one) == repr(other)


def holds_no_values(value: Any) -> bool:
    """Whether a value is, or holds, an empty tensor or a module, so that it is of no use alone."""
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, dict):
        return any(map(holds_no_values, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(holds_no_values, value))
    return isinstance(value, nn.Module)


def _inside(value: Any) -> Any:
    """The parts that make a function or an object what it is; None for plain values."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, value.__defaults__, cells]
    if isinstance(value, MethodType):
        return [value.__func__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (type, str, bytes, int, float, complex, torch.dtype, torch.device)):
        return None
    own = getattr(value, "__dict__", None)
    return dict(own) if own else None
