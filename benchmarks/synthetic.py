"""Checkpoints of real shapes with random weights, written tensor by tensor.

Weights are normal · 0.02. The delta is what fine-tuning leaves: of low norm and of a spectrum that
decays. Quality means nothing on such a model; time and memory do.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARDS = 4
WEIGHT_STD = 0.02
DELTA_NORM = 0.02  # ‖delta‖ / ‖weight‖: full fine-tunes of large models move by a few percent
DELTA_RANK = 128
DELTA_DECAY = 0.7  # singular value i of the delta falls as i^-0.7
BLOCK_ROWS = 8_192  # rows made at a time, so that an embedding needs no float32 copy

_COMMON = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "hidden_act": "silu", "use_cache": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": _COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}


def build(case: str, folder: Path, tokenizer: Path) -> None:
    """Write target and tuned of one case into `folder`, with the tokenizer of another model."""
    config = CONFIGS[case]
    for state in ("target", "tuned"):
        (folder / state).mkdir(parents=True, exist_ok=True)
        (folder / state / "config.json").write_text(json.dumps(config, indent=1))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / state / name)
        _write_shards(_tensors(config, state == "tuned"), config, folder / state)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order of the layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    actual: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        actual[f"{at}.input_layernorm.weight"] = (hidden,)
        actual[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", key_value), ("v", key_value)):
            actual[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                actual[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        actual[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        actual[f"{at}.mlp.gate_proj.weight"] = (inner, hidden)
        actual[f"{at}.mlp.up_proj.weight"] = (inner, hidden)
        actual[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    return actual | {"model.norm.weight": (hidden,)}


def _tensors(config: dict[str, Any], tuned: bool) -> Iterator[tuple[str, Tensor]]:
    for seed, (name, shape) in enumerate(shapes(config).items()):
        yield (
            name,
            _vector(seed, name, shape, tuned) if len(shape) == 1 else _matrix(seed, shape, tuned),
        )


def _vector(seed: int, name: str, shape: tuple[int, ...], tuned: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = float("norm" in name)
    weight = start + WEIGHT_STD * torch.randn(shape, generator=generator)
    moved = DELTA_NORM * WEIGHT_STD * torch.randn(shape, generator=generator)
    return (weight + moved if tuned else weight).bfloat16()


def _matrix(seed: int, shape: tuple[int, ...], tuned: bool) -> Tensor:
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    rank = min(DELTA_RANK, rows, columns)
    sigma = torch.arange(1, rank + 1).float() ** -DELTA_DECAY
    # Rows of U and V have variance 1, so an entry of U diag(sigma) V has variance ‖sigma‖².
    sigma *= DELTA_NORM * WEIGHT_STD / sigma.norm()
    right = sigma[:, None] * torch.randn(rank, columns, generator=generator)
    made = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - start)
        weight = WEIGHT_STD * torch.randn(count, columns, generator=generator)
        left = torch.randn(count, rank, generator=generator)
        made[start : start + count] = weight.addmm_(left, right) if tuned else weight
    return made


def _write_shards(
    tensors: Iterator[tuple[str, Tensor]], config: dict[str, Any], folder: Path
) -> None:
    """Shards of about the same size and their index; one shard is in memory at a time."""
    total = sum(2 * math.prod(shape) for shape in shapes(config).values())
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = 1
    for name, tensor in tensors:
        shard[name] = tensor
        places[name] = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        full = sum(t.nbytes for t in shard.values()) >= total / SHARDS
        if full and number < SHARDS:
            save_file(shard, folder / places[name], metadata={"format": "pt"})
            shard, number = {}, number + 1
    if not shard:
        raise ValueError("the last shard would be empty; choose fewer shards")
    save_file(shard, folder / f"model-{number:05}-of-{SHARDS:05}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
