"""Library: packs of one target in a folder, and the model that puts them to use.

library  the public class
folder   library.toml and the packs on disk
live     the target in memory, the packs beside it under a byte limit, and routers
answers  generation, with rows of different packs in a batch; how good routed answers are
audit    what a pack changes, and the proof that its removal is complete
"""

from graftkit.library.answers import LibraryAnswer, LibraryScore
from graftkit.library.audit import Audit, Proof
from graftkit.library.folder import PackEntry
from graftkit.library.library import Library

__all__ = ["Audit", "Library", "LibraryAnswer", "LibraryScore", "PackEntry", "Proof"]
