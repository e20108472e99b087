"""Does a pack beside the model reach every weight that it changes?

A side path adds to what a module returns when it is called. A weight that another module reads
directly (a head tied by hand, a fused kernel, experts read by their block) is not reached that way,
and the answers would be the target's. So reads are watched: every operation on a changed weight has
to happen while a module that owns the weight is being called.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from graftkit.errors import AttachError


@dataclass(frozen=True)
class ChangedWeight:
    """A parameter or buffer of a module that packs beside the model change."""

    name: str
    tensor: Tensor
    module: nn.Module


class ReadWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation between `start` and `stop`.

    Attributes:
        missed: the changed weights that were read while none of their modules was being called.
    """

    def __init__(self, weights: Sequence[ChangedWeight]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.missed: list[str] = []
        self._weights = weights
        self._calls: Counter[nn.Module] = Counter()
        self._handles: list[RemovableHandle] = []
        self._by_storage: dict[int, list[tuple[range, ChangedWeight]]] = {}
        for weight in weights:
            place = weight.tensor.untyped_storage()._cdata
            self._by_storage.setdefault(place, []).append((_bytes_of(weight.tensor), weight))

    def start(self) -> None:
        """Begin to watch."""
        for module in {weight.module for weight in self._weights}:
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Watch no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        while self._handles:
            self._handles.pop().remove()

    def check(self) -> None:
        """Raises: AttachError naming a weight that was missed."""
        if self.missed:
            raise AttachError(
                f"{self.missed[0]} is read without its module being called, so a pack beside the "
                'model would change nothing there; attach with mode="merged"'
            )

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._calls[module] += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls[module] -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _reads_no_values(func):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._check(value)
        return func(*args, **kwargs)

    def _check(self, value: Tensor) -> None:
        owners = self._by_storage.get(value.untyped_storage()._cdata, [])
        place = _bytes_of(value) if owners else range(0)
        # A tied weight stands here once for each of its modules; any of them may read it.
        touched = [w for span, w in owners if span.start < place.stop and place.start < span.stop]
        if touched and not any(self._calls[weight.module] for weight in touched):
            self.missed += [weight.name for weight in touched if weight.name not in self.missed]


def _reads_no_values(func: Any) -> bool:
    """Views, and new tensors that only take over a shape."""
    name = func._schema.name.removeprefix("aten::")
    return bool(func.is_view) or name.endswith("_like") or name.startswith("new_")


def _bytes_of(tensor: Tensor) -> range:
    """The bytes of its storage that a tensor spans."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    if not tensor.numel():
        return range(start, start)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((extent - 1) * stride for extent, stride in steps)
    return range(start, start + (last + 1) * size)
