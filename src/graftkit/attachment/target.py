"""The live model as the target of packs.

Which models packs can be attached to, whether the model is the target that a pack was made for, and
where in it each tensor of a pack belongs.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftkit.checkpoint import DTYPE_NAMES, DTYPES, check_digest, narrowed
from graftkit.errors import AttachError, PackMismatchError
from graftkit.models.views import (
    TensorView,
    checkpoint_views,
    find_view,
    is_ignored,
    is_unused,
    live_name,
)
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import TensorRecord

# Where packages keep modules and parameters whose weights are codes instead of numbers.
_QUANTIZED = re.compile(
    r"torch\.ao\.nn\.(quantized|intrinsic\.quantized)|torch\.nn\.quantized|torchao\b|bitsandbytes"
    r"|hqq\b|quanto\b|gptq|awq|aqlm|eetq|compressed_tensors|fbgemm|auto_round|integrations\.finegrained_fp8",
    re.IGNORECASE,
)


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


_lock = threading.Lock()


_attached: WeakSet[nn.Module] = WeakSet()


# Where a model remembers its attachment.
_MARK = "_graftkit_attachment"


class NotCopyable:
    """Belongs to one live model, and is copied or pickled neither with it nor alone."""

    def __deepcopy__(self, memo: object) -> Any:
        raise AttachError(
            "a model with packs beside it is not copied or pickled; detach the packs first, and "
            "attach them to the copy"
        )

    def __reduce__(self) -> Any:
        return self.__deepcopy__(None)


class OpaqueHook(NotCopyable):
    """A hook that torch.compile calls as it is, and does not look into."""

    def __init__(self, hook: Callable[..., Any]):
        is_compiling = "torch._dynamo" in sys.modules
        if is_compiling:
            hook = torch._dynamo.disable(hook)  # type: ignore[no-untyped-call]
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns."""
        return self._hook(*args, **kwargs)


def forget_compiled_code() -> None:
    """Have torch.compile look at a model's hooks anew: it does not notice that they come and go."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def check_model(model: Any) -> None:
    """Refuse what is no plain transformers model, and say what to attach to in its place.

    Raises: AttachError.
    """
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise AttachError(
            "the model is a module of torch.compile; attach to the model inside it (._orig_mod)"
        )
    if kind in _WRAPPERS:
        raise AttachError(f"the model is wrapped in {kind}; attach to the model inside (.module)")
    if not isinstance(model, PreTrainedModel) and not _is_peft(model):
        raise AttachError(
            f"a {kind} is no transformers model; attach to a PreTrainedModel, such as "
            "AutoModelForCausalLM.from_pretrained(...) gives"
        )
    for name, module in model.named_modules():
        _check_module(name, module)
    for name, value in model.state_dict(keep_vars=True).items():
        _check_tensor(name, value)


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _check_module(name: str, module: nn.Module) -> None:
    if _is_peft(module):
        raise AttachError(
            "the model holds a PEFT adapter, so it is not the target alone; call "
            "merge_and_unload() or unload() on the PeftModel and attach to what that gives, or "
            "attach the pack first and add the adapter to the merged model"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise AttachError(f"{name or 'the model'} is compiled by torch.jit; attach before that")
    owner = f"{type(module).__module__}.{type(module).__name__}"
    if _QUANTIZED.search(owner):
        raise AttachError(_quantized(name, owner))
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise AttachError(
            f"{name or 'the model'} was compiled in place (.compile()), so hooks on it would not "
            "run; attach first and compile then, or use torch.compile(model)"
        )


def _check_tensor(name: str, value: Any) -> None:
    plain = isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain:
        owner = f"{type(value).__module__}.{type(value).__name__}"
        raise AttachError(_quantized(name, owner))
    if isinstance(value, nn.Parameter) and not (value.is_floating_point() or value.is_complex()):
        raise AttachError(_quantized(name, str(value.dtype)))
    if value.dtype.itemsize == 1 and value.is_floating_point():
        raise AttachError(_quantized(name, str(value.dtype)))


def _quantized(name: str, owner: str) -> str:
    return (
        f"{name} is quantized or sharded ({owner}), so its weights are not those of the target; "
        "attach to the model as it was loaded, before it was quantized or wrapped"
    )


def attachment_of(model: nn.Module) -> Any:
    """The attachment of a model, None where it has none."""
    return getattr(model, _MARK, None)


@contextmanager
def claimed(model: PreTrainedModel, attachment: object) -> Iterator[None]:
    """Make a model this attachment's own; it is free again if the block fails.

    Raises: AttachError where packs are attached to it, or to another model that shares its weights.
    """
    with _lock:
        if attachment_of(model) is not None:
            raise AttachError("the model has packs attached already; detach them first")
        for other in list(_attached):
            if _storages(other) & _storages(model):
                raise AttachError(
                    f"packs are attached to a {type(other).__name__} that shares weights with this "
                    f"{type(model).__name__}; detach them first"
                )
        _attached.add(model)
        setattr(model, _MARK, attachment)
    try:
        yield
    except BaseException:
        release(model, attachment)
        raise


def release(model: nn.Module, attachment: object) -> None:
    """Let a model go, if it is this attachment's own."""
    with _lock:
        if attachment_of(model) is attachment:
            _attached.discard(model)
            delattr(model, _MARK)


def _storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor.numel()}


@dataclass(frozen=True)
class TensorChange:
    """One record of a pack and its place in the live model.

    Attributes:
        view: where the tuned tensor goes.
        slots: live names (module.attribute) that it sets. A tied parameter has several; those with
            a record of their own are not among them.
        source: where the target tensor lies against which it is coded, None for zeros.
        changed: False where the tuned tensor equals what the live slots hold already.
    """

    record: TensorRecord
    view: TensorView
    slots: tuple[str, ...]
    source: TensorView | None
    changed: bool


class LiveTarget:
    """A live model read by the names of its checkpoint.

    Raises: AttachError when its weights are not in memory.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = type(model).__name__
        self.views = checkpoint_views(model)
        self.state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.verified: set[tuple[str, str, tuple[int, ...], str]] = set()
        """Name, dtype, shape and digest of tensors that were found to be as a pack expects them."""
        for name, value in self.state.items():
            if value.is_meta:
                raise AttachError(
                    f"{name} is not in memory (offloaded or empty model); load the whole model"
                )

    def find(self, name: str) -> TensorView | None:
        """The view of a checkpoint tensor, None where the model has none."""
        return find_view(self.model, self.views, name)

    def live(self, view: TensorView) -> Tensor:
        """The tensor behind a view, in the model's own dtype; writing to it changes the model."""
        return view.tensor(self.state[view.parameter])

    def read(self, view: TensorView, dtype: str) -> Tensor:
        """The tensor behind a view as the checkpoint holds it: on the CPU, in its dtype.

        Raises: PackMismatchError when the live dtype cannot hold that of the checkpoint, or holds
            values that the checkpoint's dtype does not have.
        """
        value, wanted = self.live(view), DTYPES[dtype]
        if value.dtype == wanted:
            return value.cpu()
        if torch.promote_types(value.dtype, wanted) != value.dtype:
            raise PackMismatchError(
                f"{self.name}: {view.name} is loaded as {_dtype_name(value)}, but the pack was "
                f"made for {dtype}; load the model with dtype={wanted!s}"
            )
        narrow = narrowed(value, wanted)
        if not torch.equal(narrow.to(value.dtype).nan_to_num(), value.nan_to_num()):
            raise PackMismatchError(
                f"{self.name}: {view.name} has values that {dtype} does not hold, so it is not the "
                "target this pack was made for; use that target, or pack again for this one"
            )
        return narrow.cpu()

    def source(self, change: TensorChange) -> Tensor:
        """The target tensor that a record is coded against, in checkpoint layout and dtype."""
        record = change.record
        if change.source is None:
            return torch.zeros(record.shape, dtype=DTYPES[record.dtype])
        return self.read(change.source, record.dtype)

    def slot(self, name: str) -> tuple[nn.Module, str]:
        """Module and attribute of a live name."""
        path, _, attribute = name.rpartition(".")
        return self.model.get_submodule(path), attribute


def check_packs(target: LiveTarget, packs: Sequence[SkillPack]) -> None:
    """Refuse the model unless it is the target of every pack; each tensor is read once.

    What was verified is remembered with the target: any number of packs of one target, checked
    together or one after another, read it once.

    Raises: PackMismatchError naming the first tensor that is missing or differs; AttachError for
        one that has no place of its own in memory.
    """
    for pack in packs:
        for record in pack.manifest.tensors:
            expected = (record.dtype, record.shape, record.blake3)
            if record.base is not None or (record.name, *expected) in target.verified:
                continue
            view = target.find(record.name)
            if view is None and _may_lack(target.model, record):
                continue
            if view is None and live_name(target.model, record.name) is not None:
                raise AttachError(
                    f"{record.name} is split or permuted when {target.name} is loaded, so a pack "
                    "is not attached to it; merge the pack into a checkpoint (graftkit merge)"
                )
            if view is None:
                raise PackMismatchError(
                    f"{target.name} lacks tensor {record.name}; "
                    f"the pack was made for {pack.manifest.target.name}, load that model"
                )
            if view.shape != record.shape:
                raise PackMismatchError(
                    f"{target.name}: {record.name} is {list(view.shape)}, but the pack was made "
                    f"for {list(record.shape)}; use {pack.manifest.target.name}"
                )
            check_digest(record.name, target.read(view, record.dtype), expected, target.name)
            target.verified.add((record.name, *expected))


def _may_lack(model: PreTrainedModel, record: TensorRecord) -> bool:
    """Whether the model of this class answers the same without the tensor of a record.

    Such are ignored buffers, and what only another class has where the pack does not change it: the
    causal head of a target whose pack makes it a classifier.
    """
    unchanged = record.codec == "zero" and not record.appended_bytes
    return is_ignored(model, record.name) or (unchanged and is_unused(model, record.name))


def find_changes(target: LiveTarget, pack: SkillPack) -> list[TensorChange]:
    """Every record of a checked pack with its place.

    Raises: AttachError when the pack adds a tensor for which this class has no place.
    """
    places = []
    for record in pack.manifest.tensors:
        view = target.find(record.name)
        if view is None and record.base is None and record.codec == "zero":
            continue
        if view is None and is_ignored(target.model, record.name):
            continue
        if view is None:
            raise AttachError(
                f"{target.name} has no place for tensor {record.name} of "
                f"{pack.manifest.tuned.name}; load the model by a class that has it"
            )
        places.append((record, view))
    taken = {view.parameter for _, view in places}
    changes = []
    for record, view in places:
        slots = tuple(
            owner for owner in view.owners if owner == view.parameter or owner not in taken
        )
        needs = view if record.base is None else target.find(record.base) if record.base else None
        changes.append(TensorChange(record, view, slots, needs, _is_changed(record, view, needs)))
    return changes


def _is_changed(record: TensorRecord, view: TensorView, source: TensorView | None) -> bool:
    resized = record.tuned_shape is not None or record.tuned_dtype is not None
    moved = source is None or source.owners != view.owners
    return record.codec != "zero" or resized or moved


def _dtype_name(tensor: Tensor) -> str:
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
