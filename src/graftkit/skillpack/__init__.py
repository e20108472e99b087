"""SkillPack: the delta of a tuned model as one file (docs/skillpack-format.md).

From the file to a tensor:

container  the bytes of the file: header and entries, checked before a payload is read
manifest   the schema of the manifest, and every rule between its fields
pack       `SkillPack`: the target's tensors and side files in, the tuned model's out

The payloads themselves are checked where they are decoded, in `graftkit.compress`.
"""

from graftkit.skillpack.pack import SkillPack

__all__ = ["SkillPack"]
