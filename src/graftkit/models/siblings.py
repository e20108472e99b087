"""Other classes of the same model: the backbone alone, and the backbone with other heads."""

import copy
import json
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto

from graftkit.models.loading import quiet


def backbone_name(model: PreTrainedModel, live: str) -> str:
    """A live name as the backbone has it: `layers.0...` in LlamaModel and in LlamaForCausalLM."""
    return live.removeprefix(f"{model.base_model_prefix}.")


def owned_by_sibling(model: PreTrainedModel, name: str) -> bool:
    """Whether some class of this model's configuration has checkpoint tensor `name`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    renamed, _ = rename_source_key(name, renamings, [])
    owned = _names(_Key(model.config))
    return any(backbone_name(model, candidate) in owned for candidate in (name, renamed))


class _Key:
    """A configuration that is equal to one with the same content, so that results are kept."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self._text = json.dumps(config.to_dict(), sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=8)
def _names(key: _Key) -> frozenset[str]:
    """Names of all parameters of all classes, as the backbone has them."""
    names: set[str] = set()
    for model_class in _classes(str(key.config.model_type)):
        model = _without_weights(model_class, key.config)
        if model is not None:
            names |= {backbone_name(model, live) for live in model.state_dict()}
    return frozenset(names)


def _classes(model_type: str) -> list[type[PreTrainedModel]]:
    """What the Auto classes of transformers know of a model type."""
    listed: set[str] = set()
    for mapping, classes in vars(modeling_auto).items():
        if mapping.endswith("_MAPPING_NAMES") and model_type in classes:
            entry = classes[model_type]
            listed |= {entry} if isinstance(entry, str) else set(entry)
    found = [getattr(transformers, name, None) for name in sorted(listed)]
    return [item for item in found if isinstance(item, type) and issubclass(item, PreTrainedModel)]


def _without_weights(model_class: Any, config: PretrainedConfig) -> PreTrainedModel | None:
    """A model on the meta device; None where this class refuses the configuration."""
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = model_class(copy.deepcopy(config))
    except Exception:  # whatever a constructor raises: such a class owns nothing here
        return None
    return model
