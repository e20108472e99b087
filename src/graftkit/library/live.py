"""The target of a library in memory, once, with the packs that come and go beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.attach import attach
from graftkit.delta import Checkpoint, fingerprint, tensor_digest
from graftkit.errors import AttachError, PackMismatchError
from graftkit.library.index import Entry, LibraryTarget
from graftkit.library.memory import Mixture, PackMemory
from graftkit.models.encoding import context_length, usable_tokenizer
from graftkit.models.loading import load_model
from graftkit.skillpack import SkillPack


class LiveLibrary:
    """Model, tokenizer and the packs in memory.

    Raises: CheckpointError; AttachError for a model that generates no text.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load: Callable[[Entry], SkillPack],
        memory_bytes: int | None,
    ):
        self.model: Any = load_model(checkpoint)
        if not self.model.can_generate():
            raise AttachError(f"{checkpoint.path}: {type(self.model).__name__} generates no text")
        self.tokenizer: Any = usable_tokenizer(checkpoint)
        self.context: int | None = context_length(self.model)
        self.attachment = attach(self.model, [], mode="side")
        self.memory = PackMemory(self.attachment, load, memory_bytes)

    def use(self, mixture: Mixture) -> None:
        """Have the same packs answer every row from now on."""
        self.memory.hold(mixture)
        self.memory.route([mixture])

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens that an answer to each prompt starts from."""
        return [list(self.tokenizer.encode(prompt)) for prompt in prompts]


def describe_target(reference: str | Path) -> LibraryTarget:
    """Reads every tensor once. Raises: CheckpointError."""
    checkpoint = Checkpoint.open(reference)
    entries = [
        (info.name, info.dtype, info.shape, tensor_digest(checkpoint.read(info.name)))
        for info in checkpoint.tensors.values()
    ]
    if checkpoint.revision is None:
        place = str(checkpoint.path.resolve())
    else:
        place = f"{checkpoint.name}@{checkpoint.revision}"
    return LibraryTarget(
        reference=place, fingerprint=fingerprint(entries), config_blake3=_config(checkpoint)
    )


def open_target(target: LibraryTarget) -> Checkpoint:
    """The target of a library; its tensors are checked when a pack is attached.

    Raises: CheckpointError where it has gone, PackMismatchError where its config has changed.
    """
    checkpoint = Checkpoint.open(target.reference)
    if _config(checkpoint) != target.config_blake3:
        raise PackMismatchError(
            f"{target.reference}: config.json is not what it was when the library was made; put "
            "that one back, or make a new library"
        )
    return checkpoint


def _config(checkpoint: Checkpoint) -> str:
    return blake3(checkpoint.side_file("config.json") or b"").hexdigest()
