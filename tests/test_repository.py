"""Rules of the house that a tool can check."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import graftkit
from graftkit import config, errors

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src/graftkit").rglob("*.py"))
HARD_LIMIT_LINES = 600
FUNCTION_LIMIT_LINES = 60


def test_the_public_names_are_all_there() -> None:
    assert all(hasattr(graftkit, name) for name in graftkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = graftkit.nonsense


IMPORTS = """
import json, sys, types
import graftkit
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
import graftkit.skillpack
read = "transformers" in sys.modules
names = [name for name in graftkit.__all__ if name != "__version__"]
for name in names:
    getattr(graftkit, name)
hidden = [name for name in names if isinstance(getattr(graftkit, name), types.ModuleType)]
print(json.dumps({"heavy": heavy, "transformers": read, "hidden": hidden}))
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, object]:
    """What a fresh process sees that imports graftkit, then its reader, then every public name."""
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_graftkit_loads_no_heavy_library(imports) -> None:
    assert imports["heavy"] == []


def test_a_pack_is_read_without_transformers(imports) -> None:
    assert imports["transformers"] is False


def test_no_public_name_is_hidden_by_a_module_of_its_name(imports) -> None:
    assert imports["hidden"] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_short(source: Path) -> None:
    text = source.read_text()
    assert text.count("\n") <= HARD_LIMIT_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LIMIT_LINES, node.name


def test_two_classes_never_share_a_name() -> None:
    files: dict[str, list[str]] = {}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef):
                files.setdefault(node.name, []).append(source.name)
    assert {name: where for name, where in files.items() if len(where) > 1} == {}


def test_every_error_is_a_graft_error_and_is_raised_somewhere() -> None:
    names = [name for name, value in vars(errors).items() if isinstance(value, type)]
    kinds = [name for name in names if name.endswith("Error") and name != "GraftError"]
    code = "\n".join(file.read_text() for file in SOURCES if file.name != "errors.py")
    for name in kinds:
        assert issubclass(getattr(errors, name), errors.GraftError)
        assert re.search(rf"raise {name}\(|= {name}\(", code), f"{name} is never raised"
        assert name in (errors.__doc__ or "")


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == config.VERSION == graftkit.__version__
    assert f"## {config.VERSION}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_setting_is_described() -> None:
    for name, field in config.PackConfig.model_fields.items():
        assert field.description, name


PAGES = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGE_LIMIT_LINES = 350
"""Of docs/benchmarks.md: one table a question; long tables are in docs/results/."""


@pytest.mark.parametrize("page", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    for link, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if not re.match(r"[a-z]+:", link):
            file = page.parent / link if link else page
            assert file.exists(), link
            assert not heading or heading in _anchors(file), f"{link}#{heading}"


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_of_code_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)(?:::\w+)?`", page.read_text())
    for file in named:
        assert any((root / file).exists() for root in (ROOT, ROOT / "src/graftkit")), file


def test_the_page_of_results_stays_short_and_leads_to_every_raw_table() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert page.count("\n") <= PAGE_LIMIT_LINES
    for file in sorted((ROOT / "docs/results").iterdir()):
        assert f"(results/{file.name})" in page, file.name


def test_the_map_in_the_readme_has_every_folder_and_file_of_the_package() -> None:
    tree = re.search(r"```\nsrc/graftkit/(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    named = set(re.findall(r"^[├└]── (\w+)/", tree[1], re.MULTILINE))
    source = ROOT / "src/graftkit"
    assert named == {file.parent.name for file in source.glob("*/__init__.py")}
    files = re.findall(r"^[├└]── ((?:\w+ )+) ", tree[1], re.MULTILINE)
    names = {file.stem for file in source.glob("*.py") if not file.stem.startswith("__")}
    assert set(" ".join(files).split()) == names


def test_every_benchmark_is_listed_with_what_it_needs() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    for file in (ROOT / "benchmarks").glob("*.py"):
        if 'if __name__ == "__main__"' in file.read_text() and file.name != "speed_child.py":
            assert f"`{file.name}`" in page, file.name


def test_the_paper_map_names_functions_and_tests_that_exist() -> None:
    page = (ROOT / "docs/paper-map.md").read_text()
    code = "\n".join(file.read_text() for file in SOURCES)
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for module, name in re.findall(r"`([a-z_/]+\.py)::(\w+)`", page):
        where = tests if module.startswith("tests/") else code
        assert re.search(rf"(def|class) {name}\b|^{name}\b", where, re.MULTILINE), name
        assert (ROOT / module).exists() or (ROOT / "src/graftkit" / module).exists(), module


def test_the_commands_in_the_readme_exist() -> None:
    from typer.main import get_group

    from graftkit.cli import app

    known = set(get_group(app).commands)
    readme = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL))
    used = set(re.findall(r"^graftkit ([\w-]+)", blocks, re.MULTILINE))
    used |= set(re.findall(r"`graftkit ([\w-]+)", readme))
    assert used
    assert used <= known
