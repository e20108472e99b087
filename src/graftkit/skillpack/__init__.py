"""SkillPack: what a tuned model learned beyond its target, as one file (docs/skillpack-format.md).

pack       a pack in memory or mapped from a file: tensors out, file in and out
manifest   what a pack says about itself, as pydantic models
container  the bytes of the file: a safetensors header, checked before anything is read
validate   the rules that a manifest and its payloads keep
"""

from graftkit.skillpack.pack import SkillPack

__all__ = ["SkillPack"]
