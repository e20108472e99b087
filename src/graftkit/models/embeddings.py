"""Input embedding and output head of a model, where it has one of them."""

from typing import Any

from torch import nn

from graftkit.errors import CheckpointError


def input_embeddings(model: Any) -> nn.Module | None:
    """The module that turns token ids into states; None for models of images, sound, two towers."""
    return _module(model.get_input_embeddings)


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
    return _module(model.get_output_embeddings)


def _module(get: Any) -> nn.Module | None:
    # transformers raises what it likes for a model without one.
    try:
        module = get()
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None
