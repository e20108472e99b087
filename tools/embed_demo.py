"""Turn the demo weights into the data that the package carries along.

Usage: `python tools/embed_demo.py --weights weights`, on the output of `make_demo_weights.py`. A
tuned model becomes a lossless pack: about 60 % of its bytes, and equal to the last bit when merged.
"""

import argparse
import shutil
from pathlib import Path

from graftkit.checkpoint import Checkpoint
from graftkit.demo.story import DATA, SKILLS
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack

TARGET_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def embed_target(weights: Path) -> None:
    """Copy the target's directory."""
    (DATA / "target").mkdir(parents=True, exist_ok=True)
    for name in TARGET_FILES:
        shutil.copyfile(weights / "target" / name, DATA / "target" / name)


def embed_skills(weights: Path) -> None:
    """Write the lossless pack and the rows of each skill."""
    for folder in ("tuned", "rows"):
        (DATA / folder).mkdir(exist_ok=True)
    for skill in SKILLS:
        tuned = weights / skill.name
        pack = pack_delta(weights / "target", tuned, recipe="lossless")
        # What the demo compares the rebuilt checkpoint with, and whose data it learned from.
        provenance = {
            "tuned_fingerprint": Checkpoint.open(tuned).fingerprint(),
            "training_data": skill.attribution,
        }
        manifest = pack.manifest.model_copy(update={"provenance": provenance})
        payloads = {name: pack.payload(name) for name in manifest.payload_order}
        SkillPack(manifest, payloads).save(skill.lossless)
        for rows in (skill.test_rows, skill.calibration_rows):
            shutil.copyfile(weights / "rows" / rows.name, rows)


def main() -> None:
    """Write everything except NOTICE.md, which is kept by hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="what make_demo_weights wrote")
    weights = parser.parse_args().weights
    embed_target(weights)
    embed_skills(weights)
    print(f"{DATA}: {sum(f.stat().st_size for f in DATA.rglob('*') if f.is_file()):,} bytes")


if __name__ == "__main__":
    main()
