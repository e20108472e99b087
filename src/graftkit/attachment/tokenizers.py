"""The tokenizer that a tuned model has: the target's files, and those that the pack changes."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftkit.delta import Checkpoint
from graftkit.errors import CheckpointError, PackMismatchError
from graftkit.models.encoding import usable_tokenizer
from graftkit.side_files import is_tokenizer_file
from graftkit.skillpack import SkillPack

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
# Padding and truncation are chosen for each call.
_MEANING = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens")
_PROBE = "Straße 12,5 %\n\tdef f(x):  return 'naïve' + 日本 \N{GRINNING FACE}"


def tuned_tokenizer(target: Checkpoint, pack: SkillPack) -> Any:
    """The tokenizer of the checkpoint that merging the pack would write.

    Raises: CheckpointError where there is no usable one; PackMismatchError for another target.
    """
    if not _changed(pack):
        return usable_tokenizer(target)
    with TemporaryDirectory(prefix="graftkit-") as folder:
        for name, content in (target.side_files() | pack.side_files(target)).items():
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        try:
            return usable_tokenizer(Checkpoint(Path(folder), target.name, None, {}))
        except CheckpointError as error:
            raise CheckpointError(
                f"the tokenizer of {pack.manifest.tuned.name} cannot be read from its pack; merge "
                "the pack into a checkpoint"
            ) from error


def check_tokenizer(target: Checkpoint, pack: SkillPack) -> None:
    """Refuse a pack whose tokenizer gives texts other tokens than the target's.

    Another end of text, or another name of a token, is no such difference.
    Raises: PackMismatchError naming the file; as `tuned_tokenizer`.
    """
    changed = _changed(pack)
    if changed and _meaning(tuned_tokenizer(target, pack)) != _meaning(usable_tokenizer(target)):
        raise PackMismatchError(
            f"{changed[0]}: {pack.manifest.tuned.name} turns text into other tokens than the "
            "target, so it cannot answer beside other packs; merge it into a checkpoint"
        )


def _changed(pack: SkillPack) -> list[str]:
    names = [file.name for file in pack.manifest.files]
    return sorted(name for name in names if is_tokenizer_file(name)) + [
        name for name in names if name in _SETTINGS
    ]


def _meaning(tokenizer: Any) -> list[Any]:
    """What decides which tokens a text becomes, and which text tokens become."""
    found: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.encode(_PROBE)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        tokens = [[token["id"], token["content"]] for token in parts.pop("added_tokens", [])]
        found += [tokens, *(parts.get(name) for name in _MEANING)]
    return found
