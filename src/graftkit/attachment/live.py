"""Which live models packs can be attached to, and which of them have packs now."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftkit.errors import AttachError

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


class Uncopied:
    """Belongs to one live model, and is copied or pickled neither with it nor alone."""

    def __deepcopy__(self, memo: object) -> Any:
        raise AttachError(
            "a model with packs beside it is not copied or pickled; detach the packs first, and "
            "attach them to the copy"
        )

    def __reduce__(self) -> Any:
        return self.__deepcopy__(None)


class OpaqueHook(Uncopied):
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
