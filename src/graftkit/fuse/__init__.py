"""Fuse: several packs of one target become one checkpoint or one pack.

methods       merge rules on the deltas of one tensor, by name, with their settings
merge         target + packs as a checkpoint, or as one pack
search        weights of least loss on rows; importances of tensors on rows
continual     rules that take one pack after another: OPCM and KIF
sequential    merges by these rules, with a state file between calls
interference  how similar and how contrary packs are, as numbers and as a picture
"""

from graftkit.fuse.merge import merge_packs

__all__ = ["merge_packs"]
