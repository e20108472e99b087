"""Fuse: packs added up for good.

rules         what several deltas of one tensor become, pure maths
methods       the rules by name, with their settings
merging       target + packs as a checkpoint, tensor by tensor
packing       packs as one pack
search        weights of least loss on rows
in_turn       one pack after another, with a memory: opcm and kif on running, memory its file
importance    how much each tensor of a pack matters on rows
interference  how packs get in each other's way, and its picture
"""

from graftkit.fuse.merging import merge_packs

__all__ = ["merge_packs"]
