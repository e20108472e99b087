"""Tiny models of every architecture that transformers knows, made from their configuration classes.

Sizes are recognized by the names of a configuration's fields; what that does not fit stands in
`OVERRIDES`. Every parameter is random, norms and biases too, so that no loss of one goes unnoticed.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
HIDDEN, HEADS = 32, 4
IMAGE = 32
# Kinds of heads in the order in which one is chosen for a type; the model without a head is last.
HEAD_KINDS = (
    *("SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT"),
    *("MULTIMODAL_LM", "CAUSAL_LM", "CTC", "RNNT", "TDT", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    *("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION"),
    *("SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "OBJECT_DETECTION"),
    *("ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION"),
    *("MASK_GENERATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION"),
    *("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "TIME_SERIES_PREDICTION", "IMAGE_TO_IMAGE"),
    *("TEXT_RECOGNITION", "TABLE_RECOGNITION", "IMAGE_MATTING", "VISUAL_QUESTION_ANSWERING"),
    *("PRETRAINING", "SEQUENCE_CLASSIFICATION", "BACKBONE"),
)


class NotBuilt(Exception):
    """transformers makes no tiny model of this type here; the message says why."""


def model_types() -> list[str]:
    """Every model type that has a model, those of causal language models first."""
    mappings = [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    mappings += [_mapping(kind) for kind in HEAD_KINDS]
    return list(dict.fromkeys(name for names in mappings for name in names)) + [
        name for name in modeling_auto.MODEL_MAPPING_NAMES if not any(name in m for m in mappings)
    ]


def class_names(name: str) -> list[str]:
    """The classes of a model type in the order in which they are tried."""
    entries = [mapping[name] for kind in HEAD_KINDS if name in (mapping := _mapping(kind))]
    entries += [modeling_auto.MODEL_MAPPING_NAMES.get(name, [])]
    flat = [[entry] if isinstance(entry, str) else list(entry) for entry in entries]
    return list(dict.fromkeys(item for entry in flat for item in entry))


def _mapping(kind: str) -> Mapping[str, Any]:
    mapping: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    return mapping


# What a field's name says about its size: the first pattern that matches the whole name decides.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size", 2),
    (r".*vocab_size|vocab_size.*|num_embeddings|codebook_size", VOCABULARY),
    (r"(moe|expert|shared)_.*(intermediate|ffn|hidden)_?(size|dim)", 32),
    (r".*(intermediate|inner)_(size|dim)|.*ffn_(size|dim)|d_ff|ffn_hidden_size|n_inner", 64),
    (r"mlp_(dim|hidden_size)|dim_feedforward|.*feedforward_dim|ffn_dim.*", 64),
    (r"num_.*(key_value|kv)_heads.*|num_kv_heads|.*_key_value_heads|n_kv_heads?|num_key_heads", 2),
    (r"(linear_)?num_key_heads", 2),
    (r"(.*_)?num_.*heads|.*attention_heads|n_heads?|num_heads.*|.*_n_heads|.*num_heads", HEADS),
    (r".*nope_head_dim|.*rope_head_dim|v_head_dim|d_kv|kv_channels|index_head_dim", 8),
    (r".*head_(dim|size)|attention_(key|value)_.*|d_head|.*_head_dim", HIDDEN // HEADS),
    (r"rotary_dim|mm_tokens_per_image", 4),
    (r".*n_groups", 2),
    (r"upsample_groups", HIDDEN),
    (r".*lora_rank.*|.*low_rank.*|lora_r", 16),
    (r"(num|n)_(routed_|local_|.*)?experts|moe_num_experts|.*_num_experts", 4),
    (r"(num_)?experts_per_tok(en)?|.*num_experts_per_tok|moe_top_?k|moe_k|top_?k(_experts)?", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*layer_(period|freq)|.*_interval|sliding_window_pattern|.*_layer_frequency", 2),
    (r".*layer_offset", 1),
    (r"num_.*_?(layers|blocks)|n_layers?|.*num_layers|(en|de)coder_layers|layers|depth", 2),
    (r"num_hidden_layers|.*_num_hidden_layers|resampler_depth|.*_depth|num_stages", 2),
    (r"sliding_window|attention_window", 4),
    (r"image_size|img_size|pretrain_image_size|input_size|spec_size|crop_size", IMAGE),
    (
        r"max_.*positions?(_embeddings)?|n_positions|max_seq_len.*|.*max_length|n_ctx|seq_length",
        128,
    ),
    (r"context_length|max_.*position_embeddings|context_size", 64),
    (r"num_queries|num_query_tokens|num_denoising|.*num_latents|query_length", 8),
    (r"num_mel_bins|n_mels|num_mel_filters", 32),
    (
        r"d_model|n_embd|hidden_size|embed_dim|hidden_dim|embedding_size|emb_dim|embedding_dim",
        HIDDEN,
    ),
    (
        r".*_(hidden|embed|embedding)_(size|dim)|.*_hidden_sizes?|.*proj(ection|ector)?_(dim|size)",
        HIDDEN,
    ),
    (r".*(channels|_dim|_width|_dims|_planes|_filters|embedding_size|classifier_proj_size)", 32),
    (r"dim|width|size|d_state|ssm_state_size|state_size|mamba_d_state|.*_state_size", 32),
)
_KEPT = re.compile(
    r"num_channels|in_channels|in_chans|audio_channels|.*_token_(id|index)|temporal_.*|out_channels"
    r"|input_channels|.*_in_channels_list|.*kernel.*|.*stride.*|num_labels|pad_token_id"
)


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a type with small sizes."""
    return _shrunk(CONFIG_MAPPING[name], {}, name)


def tiny_model(name: str, class_name: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode whose every parameter is random. Raises: NotBuilt."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise NotBuilt(f"transformers has no class {class_name}")
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            count = sum(value.numel() for value in model_class(tiny_config(name)).parameters())
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    if count > 8_000_000:
        raise NotBuilt(f"{count:,} parameters")
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config).float().eval()
    move(model, seed, 0.05)
    return model


def move(model: PreTrainedModel, seed: int, scale: float, only: str | None = None) -> None:
    """Add seeded Gaussian noise to every parameter, or to the one named `only`."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if only in (None, name) and value.is_floating_point():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                value.add_(torch.randn(value.shape, generator=generator) * scale)


def _shrunk(
    config_class: type[PreTrainedConfig], given: Mapping[str, Any], name: str
) -> PreTrainedConfig:
    """A configuration with small sizes; `given` are the values that its owner gives it."""
    specs = getattr(config_class, "sub_configs_defaults", None) or {}
    fields = {field.name: _default(field) for field in dataclasses.fields(config_class)}
    defaults = {**fields, **given}
    values = {key: _small(key, value) for key, value in defaults.items() if key not in specs}
    for key, spec in specs.items():
        own = hasattr(spec.config_class, "sub_configs_defaults")
        part = spec.config_class if own else spec.get_config_class(spec.model_type)
        values[key] = _shrunk(part, spec.init_kwargs, f"{name}.{key}")
    values |= _layers(config_class, defaults, given)
    for key, value in _ABSENT.items():
        if key in values and values[key] is None:
            values[key] = value
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()):
        values["rope_parameters"] = {**_ROPE, **(values.get("rope_parameters") or {})}
        values["rope_parameters"]["mrope_section"] = [2, 1, 1]
    values |= OVERRIDES.get(config_class.model_type, {})
    values |= OVERRIDES.get(name, {})
    return config_class(**values)


# What some classes leave to be derived, and some forget to.
_ABSENT = {
    "head_dim": HIDDEN // HEADS,
    "num_key_value_heads": HEADS,
    "prediction_length": 4,
    "vocab_size": VOCABULARY,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _layers(
    config_class: type[PreTrainedConfig], defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """As many layers as there are kinds of them, and of every list by layer the same part."""
    if "num_hidden_layers" not in defaults:
        return {}
    features = defaults.get("out_indices") or defaults.get("out_features")
    if features and "depths" not in defaults:
        count = max(2, len(features))
        stages = list(range(count - len(features) + 1, count + 1))
        overrides: dict[str, Any] = {"num_hidden_layers": count, "out_indices": stages}
        return overrides | {"out_features": [f"stage{stage}" for stage in stages]}
    try:
        whole = config_class(**{k: v for k, v in given.items() if not isinstance(v, dict)})
    except Exception:
        return {}
    count = defaults["num_hidden_layers"]
    lists = {
        key: value
        for key, value in vars(whole).items()
        if isinstance(value, (list, tuple)) and len(value) == count and count
    }
    kinds: dict[Any, int] = {}
    for index in range(count or 0):
        words = (value[index] for value in lists.values() if isinstance(value[index], str))
        kinds.setdefault(tuple(words), index)
    picked = sorted(kinds.values())[:4]
    picked = picked if len(picked) > 1 else [0, 1]
    overrides = {
        key: [value[index] for index in picked] for key, value in lists.items() if count > 1
    }
    overrides = {
        key: value
        for key, value in overrides.items()
        if key in defaults and (defaults[key] is not None or isinstance(value[0], str))
    }
    return {"num_hidden_layers": len(picked), **overrides}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if re.fullmatch(r".*_token_(id|index)|.*_id", name) and isinstance(value, int):
        return _token(name, value)
    if _KEPT.fullmatch(name):
        return value
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return type(value)(_small_item(name, index, v) for index, v in enumerate(value))
    if type(value) is int:
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        if name == "patch_size":
            return min(value, 8)
        return value if size is None else min(value, size)
    return value


def _small_item(name: str, index: int, value: int) -> int:
    if re.fullmatch(r"depths?|.*_depths?|layers|.*num_blocks", name):
        return min(value, 1)
    if re.fullmatch(r".*heads.*", name):
        return min(value, 2)
    if re.fullmatch(r".*(size|sizes|dims?|channels|widths?)(_per_stage)?", name) and value > 16:
        return min(value, 16 * 2 ** min(index, 2))
    return value


_SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}


def _token(name: str, value: int) -> int:
    """An id below the vocabulary's size, for one name always the same."""
    if value < 0:
        return value
    for word, number in _SPECIAL.items():
        if name.startswith(word):
            return number
    return 100 + zlib.crc32(name.replace("index", "id").encode()) % 28


_WINDOWS = {"window_size": 2, "image_size": 64}
# By model type, or by the place of a part in a type (`llava.vision_config`).
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 4, "embedding_size": 16},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1},
    "donut-swin": _WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
    "esm": {
        "vocab_size": VOCABULARY,
        "mask_token_id": 32,
        "pad_token_id": 0,
        "position_embedding_type": "rotary",
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "maskformer-swin": _WINDOWS,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "is_decoder": False,
        "attn_layers": ["local", "local"],
    },
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
}
