"""Fuse: packs added up for good.

methods       what several deltas of one tensor become: pure maths, by name, with settings
merge         target + packs as a checkpoint, tensor by tensor, or as one pack
search        weights of least loss on rows, and how much each tensor matters there
sequential    one pack after another, with a memory in a file
continual     the methods for that: OPCM and KIF
interference  how packs get in each other's way, and its picture
"""

from graftkit.fuse.merge import merge_packs

__all__ = ["merge_packs"]
