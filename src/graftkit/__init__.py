"""graftkit stores the weight delta of a fine-tune in one small file and attaches it on demand.

pack = graftkit.pack_delta("base/", "tuned/", budget="5%", calibration="rows.jsonl")
pack.save("math.skillpack")
with graftkit.attached(model, graftkit.SkillPack.load("math.skillpack")):
    model.generate(...)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftkit.attachment import Attachment, attach, attached, detach
    from graftkit.distill.config import DistillConfig
    from graftkit.distill.pipeline import run_distill
    from graftkit.evaluate import Comparison, compare
    from graftkit.fuse import merge_packs
    from graftkit.fuse.merge import fuse_packs
    from graftkit.fuse.search import search_weights
    from graftkit.fuse.sequential import fuse_in_turn, merge_in_turn
    from graftkit.interop import export_lora, import_lora
    from graftkit.library import Library
    from graftkit.pack import pack_delta
    from graftkit.skillpack import SkillPack
    from graftkit.vision.graft import GraftSettings, graft
    from graftkit.vision.predict import Predictor


# In pipeline order. Each is imported when it is first used: `import graftkit` stays quick.
_PUBLIC = {
    "pack_delta": "graftkit.pack",
    "SkillPack": "graftkit.skillpack",
    "attach": "graftkit.attachment",
    "detach": "graftkit.attachment",
    "attached": "graftkit.attachment",
    "Attachment": "graftkit.attachment",
    "merge_packs": "graftkit.fuse",
    "compare": "graftkit.evaluate",
    "Comparison": "graftkit.evaluate",
    "DistillConfig": "graftkit.distill.config",
    "run_distill": "graftkit.distill.pipeline",
    "fuse_packs": "graftkit.fuse.merge",
    "search_weights": "graftkit.fuse.search",
    "merge_in_turn": "graftkit.fuse.sequential",
    "fuse_in_turn": "graftkit.fuse.sequential",
    "Library": "graftkit.library",
    "import_lora": "graftkit.interop",
    "export_lora": "graftkit.interop",
    "graft": "graftkit.vision.graft",
    "GraftSettings": "graftkit.vision.graft",
    "Predictor": "graftkit.vision.predict",
}

__all__ = [
    "Attachment",
    "Comparison",
    "DistillConfig",
    "GraftSettings",
    "Library",
    "Predictor",
    "SkillPack",
    "__version__",
    "attach",
    "attached",
    "compare",
    "detach",
    "export_lora",
    "fuse_in_turn",
    "fuse_packs",
    "graft",
    "import_lora",
    "merge_in_turn",
    "merge_packs",
    "pack_delta",
    "run_distill",
    "search_weights",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("graftkit.config").VERSION
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'graftkit' has no attribute {name!r}")
