"""Models: the one place that knows architectures and transformers.

loading       a checkpoint as a live model, whole, streamed from disk, or without weights
architecture  what every tensor on disk is for: embedding, attention, mlp, ...
views         every tensor on disk as a view into the live model's own parameters
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
