import json
import re
import shutil

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skillpack.forge import PACK, ROOT, Forgery, load_tool
from tiny_models import make_pair

from graftkit.errors import CorruptPackError, PackFormatError
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import parse_manifest

SCHEMA = json.loads((ROOT / "docs" / "skillpack-v2.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_committed_schema_and_layouts_of_the_page_are_current():
    assert load_tool("write_schema").stale_files() == []


def test_checking_names_the_file_that_is_not_current(monkeypatch, capsys):
    tool = load_tool("write_schema")
    monkeypatch.setattr(tool, "schema_text", lambda: "{}")
    assert tool.main(["--check"]) == 1
    assert "skillpack-v2.schema.json: not current" in capsys.readouterr().err


def test_the_example_of_the_page_lists_the_tensors_of_a_pack(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "skillpack-format.md").read_text("utf-8")
    [example] = re.findall("```python\n(.*?)```", page, re.DOTALL)
    shutil.copy(PACK, tmp_path / "skill.skillpack")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    pack = SkillPack.load(PACK)
    assert capsys.readouterr().out.splitlines() == [
        f"{r.name} {r.codec} {list(r.shape)} {len(pack.payload(r.name))}"
        for r in pack.manifest.tensors
    ]


def test_the_schema_is_one():
    rules = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
    assert list(rules.iter_errors(SCHEMA)) == []


def test_a_manifest_that_packing_writes_fits_the_schema(tmp_path):
    pack = pack_delta(*make_pair(tmp_path, "llama"), recipe="lossless", workers=1)
    text = pack.manifest.to_json()
    VALIDATOR.validate(json.loads(text))
    assert parse_manifest(text) == pack.manifest


def test_a_manifest_fits_its_schema_with_and_without_its_defaults():
    manifest = SkillPack.load(PACK).manifest
    VALIDATOR.validate(json.loads(manifest.to_json()))
    VALIDATOR.validate(manifest.model_dump(mode="json"))
    assert parse_manifest(manifest.to_json()) == manifest
    assert parse_manifest(manifest.model_dump_json()) == manifest


# ------------------------------------------------------------------------ mutated manifests

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**40, 2**63, 10**40, 1.0, -0.5, 1e300, "1", [], {}, [[]], [1, 2], ["a"]]),
    st.text(max_size=5),
    st.sampled_from(["zero", "exact", "dense", "stack", "BF16", "F32", "config.json", "file:x"]),
)


def places(value, path=()):
    """Every place in a JSON value, as the path of keys and indices to it."""
    yield path
    items = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else items:
        yield from places(part, (*path, key))


PLACES = [path for path in places(Forgery().manifest) if path]


@st.composite
def mutations(draw):
    """A place of the manifest, and what happens there."""
    path = draw(st.sampled_from(PLACES))
    return path, draw(st.sampled_from(["set", "drop", "add", "copy"])), draw(VALUES)


def mutate(manifest, mutation):
    (*path, last), action, value = mutation
    for key in path:
        try:
            manifest = manifest[key]
        except (KeyError, IndexError, TypeError):
            return  # an earlier mutation took this place away
    if not isinstance(manifest, dict if isinstance(last, str) else list):
        return
    if action == "add":
        manifest.append(value) if isinstance(manifest, list) else manifest.update({str(value): 1})
    elif isinstance(manifest, list) and last >= len(manifest):
        return
    elif action == "set":
        manifest[last] = value
    elif action == "copy" and isinstance(manifest, list):
        manifest.append(manifest[last])
    elif isinstance(manifest, list) or last in manifest:
        del manifest[last]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_manifest_means_what_it_says_or_is_refused(tmp_path, data):
    forgery = Forgery()
    for change in data.draw(st.lists(mutations(), min_size=1, max_size=3)):
        mutate(forgery.manifest, change)
    try:
        pack = forgery.open(tmp_path)
    except PackFormatError:
        return
    VALIDATOR.validate(forgery.manifest)
    kept = json.loads(pack.manifest.model_dump_json())
    assert says(kept, forgery.manifest)
    for record in pack.manifest.tensors:
        look_at(pack, record.name)


def says(kept, written):
    """Everything written was kept as it was; what was left out has its default."""
    if isinstance(written, dict):
        return all(key in kept and says(kept[key], value) for key, value in written.items())
    if isinstance(written, list):
        return len(kept) == len(written) and all(map(says, kept, written))
    return kept == (float(written) if isinstance(kept, float) else written)


def look_at(pack, name):
    try:
        pack.describe(name)
        pack.factors(name)
    except CorruptPackError as error:
        assert name in str(error)  # noqa: PT017


@given(st.recursive(VALUES, lambda part: st.lists(part) | st.dictionaries(st.text(), part)))
def test_any_json_is_refused_as_a_manifest(value):
    with pytest.raises(PackFormatError):
        parse_manifest(json.dumps(value))


@given(st.text())
def test_any_text_is_refused_as_a_manifest(text):
    with pytest.raises(PackFormatError):
        parse_manifest(text)
