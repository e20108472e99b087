"""Attach: reversible use of packs on a live model.

attachment     attach, detach and route
target         which models packs can be attached to, and whether one is the target of a pack
configuration  a tuned config.json, undone with the weights, or refused
merged         one pack in the model's own parameters, originals kept
side           packs beside the model, chosen row by row of a batch
modules        what packs do in one module: factors, rows or dense updates
rows           what every row of a batch uses: the target, a pack, a weighted sum
calls          whether the model reads a weight past its module, and whether it keeps rows apart
"""

from graftkit.attachment.attachment import Attachment, attach, attached, detach, without_packs
from graftkit.attachment.rows import PackChoice

__all__ = ["Attachment", "PackChoice", "attach", "attached", "detach", "without_packs"]
