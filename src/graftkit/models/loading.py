"""A checkpoint as a live model: whole, streamed from disk layer by layer, or without weights.

Everything goes through transformers, whose errors come out as one line that names the checkpoint.
Checkpoints that cannot be used are recognized here: quantized ones, and those saved from a compiled
or wrapped model. So are the input embedding and the output head of a model.
"""

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from graftkit.checkpoint import DTYPES, FLOAT_DTYPES, Checkpoint
from graftkit.errors import CheckpointError

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    StrictDataclassError,
)
"""What from_pretrained raises for a configuration, a file or a tensor it cannot use."""

_RESIDENT_BYTES, _RESIDENT_BYTES_PER_WEIGHT = 2**28, 20
# Empty models that stay in memory: a command works on a target and a tuned model, seldom on more.
_EMPTY_MODELS = 4


def load_model(
    reference: str | Path | Checkpoint, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """The model of a checkpoint, whole in memory, in eval mode.

    The class is the first of the config's `architectures`, so that every tensor on disk has its
    place; code that a checkpoint brings along is never run.

    Args:
        dtype: "auto" keeps every weight exact: the narrowest dtype that holds all those on disk.
    Raises: CheckpointError when the checkpoint is unreadable, of an unknown architecture, or lacks
        a tensor that its own class needs.
    """
    checkpoint = _open(reference)
    return _from_pretrained(checkpoint, dtype=_dtype(checkpoint) if dtype == "auto" else dtype)


def stream_model(reference: str | Path | Checkpoint, offload_dir: str | Path) -> PreTrainedModel:
    """The same model with its weights left on disk: each layer is read when it runs.

    Peak memory is about one layer. What lies on disk in another layout than the live model needs
    (per-expert tensors) is saved again into `offload_dir`.

    Raises: CheckpointError when the checkpoint is unreadable, of an unknown architecture, or lacks
        a tensor that its own class needs.
    """
    checkpoint = _open(reference)
    Path(offload_dir).mkdir(parents=True, exist_ok=True)
    return _from_pretrained(
        checkpoint,
        dtype=_dtype(checkpoint),
        device_map={"": "disk"},
        offload_folder=str(offload_dir),
    )


def load_or_stream(
    reference: str | Path | Checkpoint, offload_dir: str | Path, models: int = 1
) -> PreTrainedModel:
    """The model in memory if `models` of its size fit there while a pack is made, else streamed.

    Both compute alike. Packing may use 24 bytes for each weight of the largest tensor
    (docs/benchmarks.md); 20 of them may hold models that run.

    Raises: CheckpointError as `stream_model` does.
    """
    checkpoint = _open(reference)
    largest = max(info.numel for info in checkpoint.tensors.values())
    room = max(_RESIDENT_BYTES, _RESIDENT_BYTES_PER_WEIGHT * largest)
    if models * checkpoint.parameters * _dtype(checkpoint).itemsize <= room:
        return load_model(checkpoint)
    return stream_model(checkpoint, offload_dir)


def is_streamed(model: nn.Module) -> bool:
    """Whether the model reads its weights from disk as it runs."""
    return any(value.is_meta for value in model.parameters())


def empty_model(reference: str | Path | Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint on the meta device: names, shapes and classes, no weights.

    Checkpoints of equal configurations share one model, which is built once. Do not change it;
    change a deepcopy.

    Raises: CheckpointError when the architecture is unknown.
    """
    checkpoint = _open(reference)
    config, model_class = _model_class(checkpoint)
    with _one_line_errors(checkpoint):
        return _build_empty_model(model_class, ConfigKey(config))


class ConfigKey:
    """A configuration that equals every other of the same content: a key for caches."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        content = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        self._text = json.dumps(content, sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=_EMPTY_MODELS)
def _build_empty_model(model_class: Any, key: ConfigKey) -> PreTrainedModel:
    config = copy.deepcopy(key.config)
    with silence_transformers(), torch.device("meta"):
        model: Any = (
            model_class.from_config(config)
            if hasattr(model_class, "from_config")
            else model_class(config)
        )
        model.tie_weights()
    empty: PreTrainedModel = model.eval()
    return empty


def class_name(checkpoint: Checkpoint) -> str:
    """Name of the class that the checkpoint is loaded by. Raises: CheckpointError."""
    return type(empty_model(checkpoint)).__name__


def load_tokenizer(reference: str | Path | Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or Hub id.

    Raises: CheckpointError when there is none, or it needs code of its own.
    """
    path = reference.path if isinstance(reference, Checkpoint) else reference
    try:
        with silence_transformers():
            return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{path}: no usable tokenizer ({_first_line(error)}); "
            "save the tokenizer into the model directory"
        ) from error


def _open(reference: str | Path | Checkpoint) -> Checkpoint:
    return reference if isinstance(reference, Checkpoint) else Checkpoint.open(reference)


def _model_class(checkpoint: Checkpoint) -> tuple[PretrainedConfig, Any]:
    """Config and class: the named architecture, else what the Auto classes know of it."""
    names = checkpoint.config.get("architectures") or []
    with _one_line_errors(checkpoint), silence_transformers():
        config = transformers.AutoConfig.from_pretrained(
            str(checkpoint.path), trust_remote_code=False
        )
    named = getattr(transformers, str(names[0]), None) if names else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return config, named
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return config, auto
    raise CheckpointError(
        f"{checkpoint.path}: architecture {names[0] if names else config.model_type} is not in "
        f"transformers {transformers.__version__}; install a version that has it"
    )


def _from_pretrained(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    _, model_class = _model_class(checkpoint)
    with _one_line_errors(checkpoint), silence_transformers():
        model, report = model_class.from_pretrained(
            str(checkpoint.path),
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    wrapped = [key for key in report["unexpected_keys"] if unwrapped_name(key) != key]
    if report["missing_keys"] and wrapped:
        raise CheckpointError(f"{checkpoint.path}: tensor {min(wrapped)} {SAVED_WRAPPED}")
    if report["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.path}: {min(report['missing_keys'])} is missing, and "
            f"{type(model).__name__} needs it; save the whole model, or correct architectures in "
            "config.json"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The narrowest float dtype that holds every float tensor on disk exactly.

    The `dtype` of the config does not count: where it is narrower than the file, weights would be
    rounded and no pack would recognize its target.
    """
    names = {info.dtype for info in checkpoint.tensors.values()} & {*FLOAT_DTYPES, "F64"}
    dtypes = [DTYPES[name] for name in sorted(names)] or [torch.float32]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


@contextmanager
def silence_transformers() -> Iterator[None]:
    """No progress bars, notices or warnings of transformers and accelerate."""
    accelerate = logging.getLogger("accelerate")
    level, verbosity = accelerate.level, hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    accelerate.setLevel(logging.ERROR)
    hf_logging.set_verbosity(logging.ERROR)
    if bars:
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        accelerate.setLevel(level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _one_line_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot load it ({_first_line(error)}); "
            "check config.json and the weight files"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# What torch.compile, DataParallel, FSDP and activation checkpointing put into names.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|^(?:module\.|_forward_module\.)+"
)


SAVED_WRAPPED = (
    "has the prefix of a compiled or wrapped model, and transformers does not load it; save the "
    "model inside (for torch.compile, model._orig_mod.save_pretrained)"
)
"""End of an error message about a tensor whose name has such a prefix."""


def unwrapped_name(name: str) -> str:
    """A tensor's name without the prefixes of compilers and wrappers."""
    return _WRAPPERS.sub("", name)


def input_embeddings(model: Any) -> nn.Module | None:
    """The module that embeds token ids; None for a model of images or sound, or of two towers."""
    return _module_or_none(model.get_input_embeddings)


def token_embedding(model: Any) -> Any:
    """The input embedding. Raises: CheckpointError for a model that does not read tokens."""
    module = input_embeddings(model)
    if module is None or not hasattr(module, "weight"):
        raise CheckpointError(
            f"{type(model).__name__} has no input embedding, so it reads no rows of text; use a "
            "language model, or do without rows"
        )
    return module


def output_embeddings(model: Any) -> nn.Module | None:
    """The module that turns states into logits over the vocabulary; None where there is none."""
    return _module_or_none(model.get_output_embeddings)


def _module_or_none(get: Any) -> nn.Module | None:
    # transformers raises different errors for models without one.
    try:
        module = get()
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None


# Names that GPTQ, AWQ, EETQ, compressed-tensors, fp8 and bitsandbytes give to their tensors.
_QUANTIZED_NAMES = {
    r"\.(qweight|qzeros)$": "gptq or awq",
    r"\.(weight_packed|weight_scale|weight_zero_point|weight_shape)$": "compressed-tensors",
    r"\.(weight_scale_inv|input_scale)$": "fp8",
    r"\.(SCB|weight_format|absmax|quant_map|quant_state\.\S+)$": "bitsandbytes",
}
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_CODE_DTYPES = ("I8", "U8")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError for a quantized checkpoint, naming the method."""
    method = quantization_method(checkpoint)
    if method is not None:
        raise CheckpointError(f"{checkpoint.path}: quantized ({method}); use the unquantized model")


def quantization_method(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantized, None where they are not."""
    config = checkpoint.config
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in _QUANTIZATION_KEYS:
            if isinstance(part.get(key), dict):
                return _method(part[key], key)
    for name, info in checkpoint.tensors.items():
        for pattern, method in _QUANTIZED_NAMES.items():
            if re.search(pattern, name):
                return method
        if info.dtype in _CODE_DTYPES and len(info.shape) == 2 and name.endswith(".weight"):
            return f"{info.dtype.lower()} weights"
    return None


def _method(settings: dict[str, Any], key: str) -> str:
    named = settings.get("quant_method") or settings.get("quant_algo")
    if isinstance(named, str):
        return " ".join(named.split())[:40]
    return "compressed-tensors" if key == "compression_config" else "method unknown"
