import json

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skillpack.forge import PACKS, ROOT, VERSIONS, Forgery, load_tool
from tiny_models import make_pair

from graftkit.errors import CorruptPackError, PackFormatError
from graftkit.packing import pack_delta
from graftkit.skillpack import SkillPack
from graftkit.skillpack.rules import parse_manifest

SCHEMAS = {
    version: json.loads((ROOT / "docs" / f"skillpack-v{version}.schema.json").read_text("utf-8"))
    for version in VERSIONS
}
VALIDATORS = {
    version: jsonschema.Draft202012Validator(schema) for version, schema in SCHEMAS.items()
}


def test_the_committed_schema_and_layouts_of_the_page_are_current():
    assert load_tool("write_schema").stale_files() == []


def test_checking_names_the_file_that_is_not_current(monkeypatch, capsys):
    tool = load_tool("write_schema")
    monkeypatch.setattr(tool, "schema_text", lambda: "{}")
    assert tool.main(["--check"]) == 1
    assert "skillpack-v2.schema.json: not current" in capsys.readouterr().err


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_is_one(version):
    rules = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
    assert list(rules.iter_errors(SCHEMAS[version])) == []


def test_a_manifest_that_packing_writes_fits_the_schema(tmp_path):
    pack = pack_delta(*make_pair(tmp_path, "llama"), recipe="lossless", workers=1)
    text = pack.manifest.to_json()
    VALIDATORS[2].validate(json.loads(text))
    assert parse_manifest(text) == pack.manifest


@pytest.mark.parametrize("version", VERSIONS)
def test_a_manifest_fits_its_schema_with_and_without_its_defaults(version):
    manifest = SkillPack.load(PACKS[version]).manifest
    VALIDATORS[version].validate(json.loads(manifest.to_json()))
    VALIDATORS[version].validate(manifest.model_dump(mode="json"))
    assert parse_manifest(manifest.to_json(), version) == manifest
    assert parse_manifest(manifest.model_dump_json(), version) == manifest


@pytest.mark.parametrize("version", VERSIONS)
def test_a_manifest_is_none_of_the_other_version(version):
    text = SkillPack.load(PACKS[version]).manifest.to_json()
    assert not VALIDATORS[3 - version].is_valid(json.loads(text))
    with pytest.raises(CorruptPackError):
        parse_manifest(text, 3 - version)


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


PLACES = {
    version: [path for path in places(Forgery(version).manifest) if path] for version in VERSIONS
}


@st.composite
def mutations(draw, version):
    """A place of the manifest, and what happens there."""
    path = draw(st.sampled_from(PLACES[version]))
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


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("version", VERSIONS)
def test_a_changed_manifest_means_what_it_says_or_is_refused(tmp_path, version, data):
    forgery = Forgery(version)
    for change in data.draw(st.lists(mutations(version), min_size=1, max_size=3)):
        mutate(forgery.manifest, change)
    try:
        pack = forgery.open(tmp_path)
    except PackFormatError:
        return
    VALIDATORS[version].validate(forgery.manifest)
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


@settings(max_examples=60, deadline=None)
@given(st.recursive(VALUES, lambda part: st.lists(part) | st.dictionaries(st.text(), part)))
def test_any_json_is_refused_as_a_manifest(value):
    for version in VERSIONS:
        with pytest.raises(PackFormatError):
            parse_manifest(json.dumps(value), version)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_refused_as_a_manifest(text):
    with pytest.raises(PackFormatError):
        parse_manifest(text)
