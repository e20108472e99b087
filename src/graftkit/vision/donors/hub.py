"""Networks of transformers and timm as chains of layers."""

import copy
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from graftkit.config import parse_hub_id
from graftkit.errors import ConfigError, DonorError
from graftkit.vision.donor import Chain, Normalization, normalization_of, reason
from graftkit.vision.donors.architectures import module_chain

NamedLayers = list[tuple[str, nn.Module]]

# What from_pretrained raises for a configuration, a file or a tensor it cannot use.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
    HFValidationError,
)


def hub_chain(reference: str, size: int, pretrained: bool) -> Chain:
    """The layers of a model of transformers.

    Args:
        reference: a directory, or a Hub id with or without @revision.
        pretrained: False reads the configuration only and leaves random values.
    Raises: DonorError when it cannot be loaded, lacks weights, or cannot be cut.
    """
    path, revision = (reference, None) if Path(reference).exists() else parse_hub_id(reference)
    try:
        with _without_notices():
            model = _load(path, pretrained, revision)
            settings = _preprocessor(path, revision)
    except _LOAD_ERRORS as error:
        raise DonorError(
            f"{reference}: cannot be loaded ({reason(error)}); give an .npz file, or a directory "
            "or Hub id of a vision model with safetensors"
        ) from error
    chain = model_chain(model, size)
    _refuse_marked(reference, chain)
    return Chain(reference, _normalization(settings), chain.layers, chain.layer_names)


def _load(path: str, pretrained: bool, revision: str | None) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    if not pretrained:
        config = AutoConfig.from_pretrained(path, **options)
        empty: PreTrainedModel = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        return empty
    model, loading = AutoModel.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
    )
    _mark(model, loading["missing_keys"])
    loaded: PreTrainedModel = model
    return loaded


def model_chain(model: nn.Module, size: int) -> Chain:
    """The layers of a live model of transformers, copied; of another family, if it can be traced.

    Raises: DonorError when it cannot be cut.
    """
    if not isinstance(model, PreTrainedModel):
        return module_chain(model, size)
    family = model.config.model_type
    if family not in FAMILIES:
        try:
            return module_chain(model, size)
        except DonorError as error:
            raise DonorError(
                f"{type(model).__name__} is not one of the families of transformers that can be "
                f"cut ({', '.join(FAMILIES)}), and as a module: {error}"
            ) from error
    layers = FAMILIES[family](copy.deepcopy(model.base_model).cpu().float(), size)
    names, modules = zip(*layers, strict=True)
    return Chain(type(model).__name__, None, modules, names)


def timm_chain(name: str, size: int, pretrained: bool) -> Chain:
    """The layers of a model of timm, cut as any module is.

    Raises: ConfigError when timm is not installed; DonorError when it does not have the model, or
        the model cannot be cut.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"the donor timm:{name} needs timm, which is not installed; pip install timm"
        ) from error
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except _LOAD_ERRORS as error:
        raise DonorError(
            f"timm:{name}: cannot be loaded ({reason(error)}); timm.list_models() has the names"
        ) from error
    chain = module_chain(model, size)
    return Chain(f"timm:{name}", chain.normalization, chain.layers, chain.layer_names)


def _resnet(model: Any, size: int) -> NamedLayers:
    layers = [
        (f"stage{i}.{j}", layer)
        for i, stage in enumerate(model.encoder.stages, start=1)
        for j, layer in enumerate(stage.layers)
    ]
    return [("embedder", model.embedder), *layers]


def _mobilenet_v2(model: Any, size: int) -> NamedLayers:
    blocks = [(f"block{i}", layer) for i, layer in enumerate(model.layer, start=1)]
    return [("stem", model.conv_stem), *blocks, ("conv_1x1", model.conv_1x1)]


def _convnext(model: Any, size: int) -> NamedLayers:
    layers: NamedLayers = [("embeddings", model.embeddings)]
    for i, stage in enumerate(model.encoder.stages, start=1):
        first, *others = stage.layers
        layers.append((f"stage{i}.0", nn.Sequential(*stage.downsampling_layer, first)))
        layers += [(f"stage{i}.{j}", layer) for j, layer in enumerate(others, start=1)]
    return layers


@torch.no_grad()
def _vit(model: Any, size: int) -> NamedLayers:
    embeddings = model.embeddings
    if size < embeddings.patch_size:
        raise DonorError(
            f"{type(model).__name__} has patches of {embeddings.patch_size} pixels, but images "
            f"have {size} a side; use at least {embeddings.patch_size}"
        )
    # Interpolated once, here: an exported network then adds a constant.
    patches = (size // embeddings.patch_size) ** 2
    tokens = embeddings.position_embeddings.new_zeros(1, patches + 1, model.config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(tokens, size, size)
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    embeddings.image_size = (size, size)
    blocks = [(f"block{i}", layer) for i, layer in enumerate(model.layers, start=1)]
    return [("embeddings", embeddings), *blocks]


FAMILIES: Mapping[str, Callable[[Any, int], NamedLayers]] = {
    "resnet": _resnet,
    "mobilenet_v2": _mobilenet_v2,
    "convnext": _convnext,
    "vit": _vit,
}
"""How a model of each family is cut; keys are the `model_type` of its configuration."""


@contextmanager
def _without_notices() -> Iterator[None]:
    """Without progress bars and notices of transformers."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    if bars:
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _preprocessor(path: str, revision: str | None) -> Mapping[str, Any]:
    """Settings of the image processor that lies beside a model; empty without one."""
    file = cached_file(
        path,
        "preprocessor_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError) as error:
        raise DonorError(
            f"{path}: preprocessor_config.json cannot be read as JSON ({error}); fetch it again"
        ) from error
    return settings if isinstance(settings, dict) else {}


def _normalization(settings: Mapping[str, Any]) -> Normalization | None:
    rescale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if settings.get("do_normalize") is False:
        settings = {"image_mean": 0.0, "image_std": 1.0}
    return normalization_of(settings, "image_mean", "image_std", rescale)


def _mark(model: nn.Module, names: Iterable[str]) -> None:
    """Fill the weights that a checkpoint lacks with NaN, so that `_refuse_marked` sees them."""
    state = model.state_dict()
    for name in names:
        if state[name].is_floating_point():
            state[name].fill_(torch.nan)


def _refuse_marked(reference: str, chain: Chain) -> None:
    """Refuse weights that a checkpoint lacks; those of a classifier or pooler may be missing."""
    for layer, name in zip(chain.layers, chain.layer_names, strict=True):
        if any(value.isnan().any() for value in layer.state_dict().values()):
            raise DonorError(
                f"{reference}: the checkpoint lacks weights of layer {name}, or they are NaN; "
                "fetch it again, or take the architecture alone (pretrained=False)"
            )
