"""Library: packs of one target in a folder, and the model that puts them to use.

library  the public class
folder   library.toml and the files: locked, and changed one step at a time
live     the target in memory, packs beside it under a byte limit, and routers
answers  generation, rows of different packs together, and what routed answers score
audit    what a pack changes, and the proof that nothing of a removed pack stays
"""

from graftkit.library.answers import LibraryAnswer, LibraryScore
from graftkit.library.audit import Audit, Proof
from graftkit.library.folder import PackEntry
from graftkit.library.library import Library

__all__ = ["Audit", "Library", "LibraryAnswer", "LibraryScore", "PackEntry", "Proof"]
