"""Models: the one place that knows architectures and transformers.

loading        a checkpoint as a live model: whole, streamed from disk, or without weights
views          where every tensor on disk lies in the live model's parameters; writing it back
architecture   what every tensor on disk is for: embedding, attention, mlp, ...
aligned        a tuned checkpoint by the target's names and layouts
configuration  what a changed config.json changes in what a model computes
text           rows as the tokens that a model reads, and continuations of prompts
calibration    covariances of the inputs of linear modules
backward       backward passes, and the output sensitivities they give
"""

from graftkit.models.architecture import ModuleKind, TensorRole, tensor_roles, tied_names
from graftkit.models.loading import empty_model, load_model, load_tokenizer, stream_model
from graftkit.models.views import TensorView, checkpoint_views, find_view

__all__ = [
    "ModuleKind",
    "TensorRole",
    "TensorView",
    "checkpoint_views",
    "empty_model",
    "find_view",
    "load_model",
    "load_tokenizer",
    "stream_model",
    "tensor_roles",
    "tied_names",
]
