"""Names of tensors without what compilers and wrappers put into them."""

import re

# What torch.compile, DataParallel, FSDP and activation checkpointing put into names.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|^(?:module\.|_forward_module\.)+"
)


SAVED_WRAPPED = (
    "has the prefix of a compiled or wrapped model, and transformers does not load it; save the "
    "model inside (for torch.compile, model._orig_mod.save_pretrained)"
)
"""What to do about such a name, in a message."""


def unwrapped_name(name: str) -> str:
    """A tensor's name without the prefixes of compilers and wrappers."""
    return _WRAPPERS.sub("", name)
