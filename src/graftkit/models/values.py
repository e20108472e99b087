"""Whether two values of any kind are alike, as far as a forward pass can see."""

from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


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
