"""Write what the format's page takes from the code: the JSON schema, and section 6.

python tools/write_schema.py            write both
python tools/write_schema.py --check    exit 1 where a committed file is not current
"""

import json
import sys
from pathlib import Path

from graftkit.compress import entropy, exact
from graftkit.skillpack.manifest import Manifest

DOCS = Path(__file__).parents[1] / "docs"
SCHEMA, PAGE = DOCS / "skillpack-v2.schema.json", DOCS / "skillpack-format.md"
LAYOUTS = {"exact": exact, "codes": entropy}
"""Modules whose docstring is part of the page, by the name of their place in it."""
_HEAD = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Manifest of a SkillPack, version 2",
}


def schema_text() -> str:
    """The schema of the manifest, as it is committed."""
    return json.dumps(_HEAD | {**Manifest.model_json_schema(), **_HEAD}, indent=1) + "\n"


def page_text(page: str) -> str:
    """The format's page with the layouts of section 6 taken from docstrings."""
    for name, module in LAYOUTS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        layout = (module.__doc__ or "").strip()
        page = f"{before}{begin}```text\n{layout}\n```\n{end}{after}"
    return page


def wanted_files() -> dict[Path, str]:
    """Every generated file and the text it should hold."""
    return {SCHEMA: schema_text(), PAGE: page_text(PAGE.read_text(encoding="utf-8"))}


def stale_files() -> list[Path]:
    """Generated files that are missing or not current."""
    return [
        path
        for path, text in wanted_files().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    stale = stale_files()
    if "--check" in arguments:
        for path in stale:
            print(f"{path}: not current; run python tools/write_schema.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in wanted_files().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
