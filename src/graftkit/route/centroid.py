"""Routing by the target's own states, where there is no sentence encoder (the fallback).

A prompt is represented by one vector, pooled from the hidden states of the target's first layers:

    h = (mean over tokens t of u_t, u_last)        u_t = x_t / ‖x_t‖,  x_t after layer `layer`

The mean says what a prompt is about, the last token what it asks for (such as "Intent:"). The
states are normalized because a few tokens of most models have states a hundred times as long as the
rest. Attached packs are bypassed: a router always reads the bare target.

Keys (graftkit.route.key) are fitted independently, each to its pack's own prompts. Adding or
removing a pack does not change the scores of the others.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from graftkit.attachment import without_packs
from graftkit.errors import CheckpointError, ConfigError
from graftkit.models.text import (
    MICRO_BATCH_TOKENS,
    context_length,
    one_thread,
    pad_id,
    vocabulary_size,
)
from graftkit.route.key import Route, RouterKey, sample_prompts
from graftkit.rows import batches_by_length, pad_batch

MAX_TOKENS = 128
"""A router reads the last tokens of a prompt, so that routing stays cheap for long prompts."""


def pooled_states(
    model: Any, tokenizer: Any, prompts: Sequence[str], layer: int, tokens_together: int = 1
) -> Tensor:
    """One state per prompt, by the formula above.

    The forward pass stops after `layer`. Of a long prompt the last MAX_TOKENS tokens are read, or
    fewer where the model's context is shorter.

    Args:
        layer: 1 for the output of the first layer, up to `layer_count(model)`.
        tokens_together: padded tokens of one pass, which prompts of similar length share. By
            default each prompt runs alone, so that its state does not depend on the others at all;
            in a shared pass the last bits may differ.
    Returns: (prompts, `state_width(model)`) float32 on the CPU; zeros for a prompt without tokens.
    Raises: CheckpointError for a layer that the model lacks, another model's tokenizer, or states
        that are not finite.
    """
    layers = layer_count(model)
    if not 1 <= layer <= layers:
        raise CheckpointError(
            f"{type(model).__name__} has {layers} layers, asked is a state behind layer {layer}; "
            "use the model that the router was made for"
        )
    encoded = [_encode_prompt(model, tokenizer, prompt) for prompt in prompts]
    states = torch.zeros(len(prompts), state_width(model))
    with torch.no_grad(), without_packs(model):
        for batch in batches_by_length([len(ids) for ids in encoded], tokens_together):
            filled = [index for index in batch if encoded[index]]
            if filled:
                ids, mask = pad_batch([encoded[index] for index in filled], pad_id(tokenizer))
                states[filled] = _pooled(_layer_output(model, layer, ids, mask), mask)
    if not bool(states.isfinite().all()):
        raise CheckpointError(
            f"{type(model).__name__}: states behind layer {layer} are not finite (NaN or infinity) "
            "on the prompts; check the weights"
        )
    return states


def layer_count(model: Any) -> int:
    """Layers of a decoder or encoder."""
    return len(_layers(model))


def state_width(model: Any) -> int:
    """Numbers in a pooled state."""
    return 2 * int(model.config.get_text_config().hidden_size)


def _encode_prompt(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=True) if prompt else []
    if ids and max(ids) >= vocabulary_size(model):
        raise CheckpointError(
            f"the tokenizer gives token {max(ids)}, but {type(model).__name__} has "
            f"{vocabulary_size(model)} embeddings; use the tokenizer that belongs to this model"
        )
    return ids[-min(MAX_TOKENS, context_length(model) or MAX_TOKENS) :]


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    """(rows, tokens, n) -> (rows, 2n) float32; mask (rows, tokens): 1 on real tokens, 0 behind."""
    units = nn.functional.normalize(states.cpu().float(), dim=-1) * mask[..., None]
    counts = mask.sum(dim=1)
    last = units[torch.arange(len(units)), counts - 1]
    return torch.cat([units.sum(dim=1) / counts[:, None], last], dim=1)


class _StopForward(Exception):
    """No error: it ends a forward pass, and never leaves this module."""


def _layer_output(model: Any, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, tokens, width): the output of a layer; no later one runs."""
    outputs: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        raise _StopForward

    # A model that is streamed from disk is on no device, and takes its inputs from the CPU.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    handle = _layers(model)[layer - 1].register_forward_hook(stop)
    try:
        with suppress(_StopForward):
            model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device))
    finally:
        handle.remove()
    return outputs[0]


def _layers(model: Any) -> nn.ModuleList:
    """The layers of a model, in the order they run. Raises: CheckpointError."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(
        f"{type(model).__name__} has no list of {count or 'hidden'} layers; a router reads "
        "transformers only"
    )


def fit_key(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
) -> RouterKey:
    """Fit a router key to the prompts of one skill.

    Args:
        model, tokenizer: the target.
        prompts: 20 or more different ones; of more than 200, a seeded choice is used.
    Raises: RowsError for too few prompts; CheckpointError for another model's tokenizer.
    """
    chosen = sample_prompts(prompts, seed)
    layer = max(1, layer_count(model) // 2)
    with one_thread():
        states = pooled_states(model, tokenizer, chosen, layer, MICRO_BATCH_TOKENS)
    digest = blake3(json.dumps(chosen).encode()).hexdigest()
    return RouterKey.fit(states, layer, digest)


class CentroidRouter:
    """Routes each prompt to the best of the packs that accept it, or to the target.

    Scores are log-densities per direction (graftkit.route.key). A pack that rejects a prompt has a
    score too, which may be the highest.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        keys: Mapping[str, RouterKey | None],
        *,
        top_k: int = 1,
    ):
        """Make a router over the packs of `keys`.

        Args:
            model, tokenizer: the target of the packs.
            keys: by pack name; None for a pack without a key, which is never chosen.
            top_k: most packs for one prompt. The packs of the highest scores that accept it are
                weighted by the softmax of these scores.
        Raises: ConfigError for keys of another model, or top_k below 1.
        """
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; at least one pack has to answer")
        self.keys = {name: key for name, key in keys.items() if key is not None}
        self.top_k = top_k
        self._model, self._tokenizer = model, tokenizer
        self._check_keys()

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """One route for each prompt; one without tokens has no scores. Raises: CheckpointError."""
        layers = sorted({key.info.layer for key in self.keys.values()})
        states = {
            layer: pooled_states(self._model, self._tokenizer, prompts, layer) for layer in layers
        }
        return [
            self._choose({layer: of_all[row] for layer, of_all in states.items()})
            for row in range(len(prompts))
        ]

    def _choose(self, states: Mapping[int, Tensor]) -> Route:
        """The route of one prompt, from its states by layer."""
        by_pack = {name: states[key.info.layer] for name, key in self.keys.items()}
        distances = {
            name: self.keys[name].distance(state) for name, state in by_pack.items() if state.any()
        }
        scores = {name: self.keys[name].score(distance) for name, distance in distances.items()}
        accepting = [name for name, distance in distances.items() if distance <= 1]
        best = sorted(accepting, key=lambda name: (-scores[name], name))[: self.top_k]
        shares = [math.exp(scores[name] - scores[best[0]]) for name in best]
        return Route({n: s / sum(shares) for n, s in zip(best, shares, strict=True)}, scores)

    def _check_keys(self) -> None:
        if not self.keys:
            return
        width, layers = state_width(self._model), layer_count(self._model)
        for name, key in self.keys.items():
            info = key.info
            if info.width != width or info.layer > layers:
                raise ConfigError(
                    f"the router key of {name} is of a model of width {info.width} with at least "
                    f"{info.layer} layers, this one has width {width} and {layers} layers; give "
                    "the pack a key of this model"
                )
