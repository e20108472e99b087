"""Library: packs of one target in a folder, and the model that puts them to use.

library  the public class
folder   library.toml and the packs on disk
live     the target in memory, the packs beside it under a byte limit, and routers
answers  generation; rows of different packs share a batch
scores   routed answers compared with those of the right pack and of the target
audit    what a pack changes, and the proof that its removal is complete
"""

from graftkit.library.answers import LibraryAnswer
from graftkit.library.audit import Audit, Proof
from graftkit.library.folder import PackEntry
from graftkit.library.library import Library
from graftkit.library.scores import LibraryScore

__all__ = ["Audit", "Library", "LibraryAnswer", "LibraryScore", "PackEntry", "Proof"]
