"""The target of a library in memory, once, with the packs that come and go beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.attachment import attach
from graftkit.attachment.configuration import tuned_generation
from graftkit.attachment.tokenizers import check_tokenizer, tuned_tokenizer
from graftkit.delta import Checkpoint, fingerprint, tensor_digest
from graftkit.errors import AttachError, PackMismatchError
from graftkit.library.index import Entry, LibraryTarget
from graftkit.library.memory import Mixture, PackMemory
from graftkit.models.encoding import context_length, usable_tokenizer
from graftkit.models.loading import load_model
from graftkit.side_files import is_template
from graftkit.skillpack import SkillPack


@dataclass(frozen=True)
class Voice:
    """How one model ends and writes its texts; equal where `end` and `settings` are.

    Attributes:
        tokenizer: reads what was generated. generation: defaults of `generate`.
        end: the token that ends a text. settings: `generation` as text.
    """

    tokenizer: Any = field(compare=False)
    generation: Any = field(compare=False)
    end: int | None
    settings: str

    @classmethod
    def of(cls, tokenizer: Any, generation: Any) -> "Voice":
        """Of a tokenizer and a GenerationConfig."""
        settings = generation.to_json_string(use_diff=True)
        return cls(tokenizer, generation, tokenizer.eos_token_id, settings)


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
        self._checkpoint, self._load = checkpoint, load
        self._own_voice = Voice.of(self.tokenizer, self.model.generation_config)
        self._voices: dict[str, Voice] = {}
        self.context: int | None = context_length(self.model)
        self.attachment = attach(self.model, [], mode="side")
        self.memory = PackMemory(self.attachment, load, memory_bytes)

    def use(self, mixture: Mixture) -> None:
        """Have the same packs answer every row from now on."""
        self.memory.hold(mixture)
        self.memory.route([mixture])

    def voice(self, mixture: Mixture) -> Voice:
        """How the packs of a row end and write their texts: the target's way where they differ."""
        voices = {self._voice_of(entry) for entry in mixture}
        return voices.pop() if len(voices) == 1 else self._own_voice

    def _voice_of(self, entry: Entry) -> Voice:
        if entry.digest not in self._voices:
            pack, voice = self._load(entry), self._own_voice
            if any(not is_template(file.name) for file in pack.manifest.files):
                check_tokenizer(self._checkpoint, pack)
                tokenizer = tuned_tokenizer(self._checkpoint, pack)
                voice = Voice.of(tokenizer, tuned_generation(self.model, pack))
            self._voices[entry.digest] = voice
        return self._voices[entry.digest]

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
