"""Every fault of the format page, section 5: what breaks each rule, beside what just keeps it."""

import json
import os
import re
import struct

import pytest
from safetensors.torch import save_file
from skillpack.forge import FOLDER, PACK, ROOT, Forgery, read_everything

from graftkit.checkpoint import Checkpoint
from graftkit.errors import (
    CorruptPackError,
    PackFault,
    PackFormatError,
    PackMismatchError,
    UnsupportedVersionError,
)
from graftkit.skillpack import SkillPack

KINDS = {
    PackFault.NOT_A_SKILLPACK: PackFormatError,
    PackFault.OLDER_VERSION: UnsupportedVersionError,
    PackFault.NEWER_VERSION: UnsupportedVersionError,
}


def fault_of(action):
    """The fault that `action` is accused of, None where it passes; checks the kind of error."""
    try:
        action()
    except PackFormatError as refusal:
        error = refusal
    else:
        return None
    assert type(error) is KINDS.get(error.fault, CorruptPackError)
    assert len(str(error)) < 1000
    return error.fault.value


TARGET = FOLDER / "target"


def written(tmp_path, content):
    path = tmp_path / "hostile.skillpack"
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------ the file as bytes


def with_length(content, length):
    return struct.pack("<Q", length) + content[8:]


def header_only(text):
    encoded = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        pytest.param(None, lambda pack: pack, id="the pack itself"),
        pytest.param("truncated", lambda pack: b"", id="no bytes"),
        pytest.param("truncated", lambda pack: pack[:7], id="seven bytes"),
        pytest.param("truncated", lambda pack: pack[:8], id="a length and no header"),
        pytest.param("truncated", lambda pack: pack[:-1], id="the last byte is missing"),
        pytest.param(
            "truncated", lambda pack: with_length(pack, 100_000_000), id="header up to the limit"
        ),
        pytest.param(
            "header_too_large", lambda pack: with_length(pack, 100_000_001), id="header over it"
        ),
        pytest.param(
            "header_too_large", lambda pack: with_length(pack, 2**64 - 1), id="a huge header"
        ),
        pytest.param("invalid_offsets", lambda pack: pack + b"\0", id="a byte too many"),
        pytest.param("invalid_header", lambda pack: with_length(pack, 0), id="an empty header"),
        pytest.param("invalid_header", lambda pack: header_only(b"\xff\xfe{}"), id="not UTF-8"),
        pytest.param("invalid_header", lambda pack: header_only("\ufeff{}"), id="a BOM"),
        pytest.param("invalid_header", lambda pack: header_only("{"), id="not JSON"),
        pytest.param("invalid_header", lambda pack: header_only("[1]"), id="not an object"),
        pytest.param("invalid_header", lambda pack: header_only('{"a":NaN}'), id="NaN"),
        pytest.param("invalid_header", lambda pack: header_only("[" * 200_000), id="deep lists"),
        pytest.param("invalid_header", lambda pack: header_only('{"a":' * 99_999), id="deep dicts"),
        pytest.param(
            "invalid_header", lambda pack: header_only('{"a":' + "9" * 5000 + "}"), id="long number"
        ),
        pytest.param("not_a_skillpack", lambda pack: header_only("{}"), id="an empty object"),
        pytest.param(
            "duplicate_key",
            lambda pack: pack.replace(b'"format":', b'"version":"1","format":'),
            id="a key twice in the metadata",
        ),
    ],
)
def test_a_file_is_opened_or_refused_by_the_rule_it_breaks(tmp_path, fault, change):
    content = change(PACK.read_bytes())
    if fault == "duplicate_key":
        content = with_length(content, struct.unpack_from("<Q", content)[0] + len('"version":"1",'))
    path = written(tmp_path, content)
    assert fault_of(lambda: read_everything(path)) == fault


def test_a_missing_file_a_folder_and_other_safetensors_are_no_skillpacks(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"w": Checkpoint.open(TARGET).read("embed.weight")}, other)
    for path in (tmp_path / "none.skillpack", tmp_path, other):
        assert fault_of(lambda path=path: SkillPack.load(path)) == "not_a_skillpack"


def test_errors_name_the_file(tmp_path):
    path = written(tmp_path, b"123")
    with pytest.raises(CorruptPackError, match=r"hostile\.skillpack: 3 bytes"):
        SkillPack.load(path)


# ------------------------------------------------------------------------ the header


def edit_metadata(**changes):
    def change(header):
        header["__metadata__"].update(changes)

    return change


def first_entry(header):
    return next(name for name in header if name != "__metadata__")


def edit_first(**changes):
    """Change the first entry; a function gets its length, and returns the new value."""

    def change(header):
        entry = header[first_entry(header)]
        size = entry["shape"][0]
        entry.update({key: v(size) if callable(v) else v for key, v in changes.items()})

    return change


def swap_entries(header):
    names = [name for name in header if name != "__metadata__"]
    first, second = header[names[0]], header[names[1]]
    header[names[0]], header[names[1]] = second, first


def entry_twice(header):
    start = f'"{first_entry(header)}": {{'
    return json.dumps(header).replace(start, f"{start}}}, {start}", 1)


def text_with(old, new):
    return lambda header: json.dumps(header).replace(old, new, 1)


LAST = "file:chat_template.jinja"
FIRST = "embed.weight"


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        pytest.param(None, lambda header: None, id="nothing"),
        pytest.param(None, lambda header: json.dumps(header, indent=2), id="white space"),
        pytest.param(
            None,
            lambda header: json.dumps(dict(reversed(header.items()))),
            id="entries in another order of keys",
        ),
        pytest.param(
            "not_a_skillpack", lambda header: header.pop("__metadata__") and None, id="no metadata"
        ),
        pytest.param(
            "not_a_skillpack",
            lambda header: header.update(__metadata__="skillpack"),
            id="metadata is text",
        ),
        pytest.param("not_a_skillpack", edit_metadata(format="pt"), id="another format"),
        pytest.param("not_a_skillpack", edit_metadata(format=["skillpack"]), id="format a list"),
        pytest.param("older_version", edit_metadata(version="1"), id="version 1"),
        pytest.param("newer_version", edit_metadata(version="3"), id="version 3"),
        pytest.param(
            "newer_version", edit_metadata(version="9" * 5000, manifest="?"), id="version 999…"
        ),
        pytest.param("invalid_header", edit_metadata(version="0"), id="version 0"),
        pytest.param("invalid_header", edit_metadata(version="²"), id="version ²"),
        pytest.param("invalid_header", edit_metadata(version="one"), id="version one"),
        pytest.param("invalid_header", edit_metadata(version=1), id="version a number"),
        pytest.param("invalid_header", edit_metadata(manifest={}), id="manifest an object"),
        pytest.param("invalid_header", edit_metadata(more="x"), id="one more key"),
        pytest.param(
            "invalid_header",
            lambda header: header["__metadata__"].pop("manifest_blake3") and None,
            id="one key less",
        ),
        pytest.param(
            "invalid_header", edit_metadata(manifest="\ud800"), id="manifest with half a character"
        ),
        pytest.param("manifest_digest", edit_metadata(manifest_blake3="0" * 64), id="other digest"),
        pytest.param("manifest_digest", edit_metadata(manifest="{}"), id="other manifest"),
        pytest.param(
            "duplicate_key",
            text_with('"dtype": "U8"', '"dtype": "U8", "dtype": "U8"'),
            id="a key twice in an entry",
        ),
        pytest.param(
            "duplicate_key",
            entry_twice,
            id="an entry twice",
        ),
        pytest.param(
            "invalid_offsets", lambda header: header.pop(LAST) and None, id="an entry missing"
        ),
        pytest.param(
            "invalid_offsets", lambda header: header.update(more=header[LAST]), id="a surplus entry"
        ),
        pytest.param("invalid_offsets", edit_first(dtype="I8"), id="another dtype"),
        pytest.param("invalid_offsets", edit_first(dtype=None), id="no dtype"),
        pytest.param("invalid_offsets", edit_first(more=1), id="a surplus field"),
        pytest.param("invalid_offsets", edit_first(shape=lambda n: [1, n]), id="two dimensions"),
        pytest.param("invalid_offsets", edit_first(shape=lambda n: n), id="shape a number"),
        pytest.param("invalid_offsets", edit_first(shape=lambda n: [float(n)]), id="shape a float"),
        pytest.param(
            "invalid_offsets", edit_first(shape=lambda n: [n - 1]), id="shape and offsets"
        ),
        pytest.param("invalid_offsets", edit_first(data_offsets=[0]), id="one offset"),
        pytest.param(
            "invalid_offsets",
            edit_first(data_offsets=lambda n: [False, n]),
            id="an offset that is false",
        ),
        pytest.param("invalid_offsets", edit_first(data_offsets=[0, 0], shape=[0]), id="no bytes"),
        pytest.param(
            "invalid_offsets",
            edit_first(data_offsets=lambda n: [1, n], shape=lambda n: [n - 1]),
            id="a gap at the start",
        ),
        pytest.param(
            "invalid_offsets",
            edit_first(data_offsets=lambda n: [0, n + 1], shape=lambda n: [n + 1]),
            id="an overlap",
        ),
        pytest.param(
            "invalid_offsets",
            edit_first(data_offsets=[0, -1], shape=[-1]),
            id="a negative length",
        ),
        pytest.param("invalid_offsets", swap_entries, id="entries swapped"),
        pytest.param(
            "truncated",
            edit_first(data_offsets=[0, 2**70], shape=[2**70]),
            id="an end behind the file",
        ),
    ],
)
def test_a_header_is_accepted_or_refused_by_the_rule_it_breaks(tmp_path, fault, change):
    forgery = Forgery()
    header = forgery.header()
    header = change(header) or header
    assert fault_of(lambda: forgery.open(tmp_path, header)) == fault


def test_a_file_of_version_1_is_refused_with_both_versions_named(tmp_path):
    forgery = Forgery()
    header = forgery.header()
    header["__metadata__"]["version"] = "1"
    expected = "format version 1; this graftkit reads version 2, pack the models again"
    with pytest.raises(UnsupportedVersionError, match=expected):
        forgery.open(tmp_path, header)


# ------------------------------------------------------------------------ the manifest


def edit_record(name, **changes):
    return lambda forgery: forgery.record(name).update(changes)


def drop_field(name, field):
    return lambda forgery: forgery.record(name).pop(field)


def change_digest(name):
    """Another digest of the same length."""

    def change(forgery):
        record = forgery.record(name)
        record["blake3"] = "0" * len(record["blake3"])

    return change


def edit_file(**changes):
    return lambda forgery: forgery.manifest["files"][0].update(changes)


def edit_manifest(**changes):
    return lambda forgery: forgery.manifest.update(changes)


def edit_target(**changes):
    return lambda forgery: forgery.manifest["target"].update(changes)


def rename(name, new):
    """A tensor under another name, in the right place of the order."""

    def change(forgery):
        forgery.record(name)["name"] = new
        forgery.manifest["tensors"].sort(key=lambda record: record["name"])
        payload = forgery.payloads.pop(name)
        files = {n: p for n, p in forgery.payloads.items() if n.startswith("file:")}
        tensors = {n: p for n, p in forgery.payloads.items() if n not in files}
        forgery.payloads = dict(sorted({**tensors, new: payload}.items())) | files

    return change


def reshape(name, *shape, **fields):
    return lambda forgery: forgery.change_shape(name, shape, **fields)


def manifest_text(edit):
    def change(forgery):
        forgery.manifest_text = edit(json.dumps(forgery.manifest))

    return change


def add_record(forgery):
    forgery.manifest["tensors"].append(dict(forgery.manifest["tensors"][-1]))


def swap_records(forgery):
    forgery.manifest["tensors"].reverse()


def drop_defaults(forgery):
    forgery.manifest.pop("format_version")


ZERO, NORM = "h.1.norm.weight", "h.0.norm.weight"
STACK = "h.0.experts.down"


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        pytest.param(None, lambda forgery: None, id="nothing"),
        pytest.param(None, drop_defaults, id="a default left out"),
        pytest.param(None, edit_record(FIRST, layout="matrix"), id="a default written out"),
        pytest.param(None, edit_manifest(evaluation={"a": 1}), id="a whole number for a float"),
        pytest.param("invalid_manifest", edit_manifest(unknown=1), id="an unknown key"),
        pytest.param("invalid_manifest", edit_manifest(**{"\ud800": 1}), id="half a character"),
        pytest.param("invalid_manifest", edit_manifest(format_version=3), id="format_version 3"),
        pytest.param(
            "invalid_manifest", edit_manifest(format_version=True), id="format_version true"
        ),
        pytest.param("invalid_manifest", edit_manifest(tensors=None), id="no tensors"),
        pytest.param("invalid_manifest", edit_manifest(tensors={}), id="tensors an object"),
        pytest.param("invalid_manifest", edit_manifest(tensors=[1, "x"]), id="tensors of numbers"),
        pytest.param("invalid_manifest", edit_manifest(budget_bytes="9"), id="a number as text"),
        pytest.param("invalid_manifest", edit_manifest(budget_bytes=9.0), id="bytes as a float"),
        pytest.param("invalid_manifest", edit_manifest(budget_bytes=True), id="bytes as true"),
        pytest.param("invalid_manifest", edit_manifest(budget_bytes=-1), id="negative bytes"),
        pytest.param("invalid_manifest", edit_manifest(budget_bytes=10**30), id="huge bytes"),
        pytest.param("invalid_manifest", edit_manifest(recipe=7), id="a recipe that is a number"),
        pytest.param(
            "invalid_manifest", edit_target(fingerprint="A" * 64), id="a digest in capitals"
        ),
        pytest.param("invalid_manifest", edit_record(FIRST, error=-0.1), id="a negative error"),
        pytest.param("invalid_manifest", edit_record(FIRST, kind="brain"), id="an unknown kind"),
        pytest.param("invalid_manifest", edit_record(FIRST, blake3="0" * 64), id="a long digest"),
        pytest.param("invalid_manifest", edit_record(FIRST, shape="ab"), id="a shape of letters"),
        pytest.param("invalid_manifest", edit_record(FIRST, shape=[10, -16]), id="negative shape"),
        pytest.param("invalid_manifest", edit_record(FIRST, dtype="F8_E4M3"), id="unknown dtype"),
        pytest.param("invalid_manifest", edit_record(FIRST, dtype="I64"), id="a delta of integers"),
        pytest.param("invalid_manifest", edit_record(FIRST, tuned_dtype="I8"), id="tuned to I8"),
        pytest.param("invalid_manifest", drop_field(FIRST, "codec"), id="no codec"),
        pytest.param("invalid_manifest", edit_record(FIRST, codec=["dense"]), id="codec a list"),
        pytest.param("invalid_manifest", edit_record(NORM, codec="dense"), id="a dense vector"),
        pytest.param(
            "invalid_manifest", edit_record(NORM, layout="transposed"), id="a transposed vector"
        ),
        pytest.param("invalid_manifest", edit_record(NORM, layout="stack"), id="a stacked vector"),
        pytest.param("invalid_manifest", edit_record(NORM, layout="pile"), id="unknown layout"),
        pytest.param("invalid_manifest", add_record, id="a record twice"),
        pytest.param("invalid_manifest", swap_records, id="records in another order"),
        pytest.param(
            "invalid_manifest", drop_field(FIRST, "appended_bytes"), id="rows appended from nowhere"
        ),
        pytest.param(
            "invalid_manifest", edit_record(NORM, appended_bytes=3), id="appended without growth"
        ),
        pytest.param(
            "invalid_manifest",
            edit_record(FIRST, appended_bytes=2**40),
            id="more appended than there is",
        ),
        pytest.param(
            "invalid_manifest",
            edit_record("vocabulary.bias", tuned_shape=[9, 2]),
            id="resized to more dimensions",
        ),
        pytest.param(
            "invalid_manifest",
            edit_record("vocabulary.bias", tuned_shape=[]),
            id="resized to no dimension",
        ),
        pytest.param(
            "invalid_manifest",
            edit_record("lookup.weight", tuned_shape=[30, 8]),
            id="resized in the second extent",
        ),
        pytest.param(
            "invalid_manifest", edit_record(STACK, tuned_shape=[0, 12, 16]), id="an emptied stack"
        ),
        pytest.param(
            "invalid_manifest",
            edit_record("h.0.position_ids", tuned_shape=[2, 6], appended_bytes=5),
            id="integers that grow",
        ),
        pytest.param(
            "invalid_manifest", edit_record("head.weight", base="nowhere"), id="a base that is not"
        ),
        pytest.param(
            "invalid_manifest", edit_record("head.weight", base="head.bias"), id="an added base"
        ),
        pytest.param("invalid_manifest", change_digest("head.weight"), id="another base"),
        pytest.param("invalid_manifest", edit_file(prefix=99), id="prefix over the length"),
        pytest.param("invalid_manifest", edit_file(prefix=-1), id="negative prefix"),
        pytest.param(
            "invalid_manifest",
            (lambda forgery: forgery.manifest["files"][0].pop("target_blake3")),
            id="shared with nothing",
        ),
        pytest.param(
            "invalid_manifest",
            lambda forgery: forgery.manifest["files"].append(dict(forgery.manifest["files"][1])),
            id="a side file twice",
        ),
        pytest.param("invalid_manifest", manifest_text(lambda text: "[]"), id="a list"),
        pytest.param("invalid_manifest", manifest_text(lambda text: "{"), id="not JSON"),
        pytest.param("invalid_manifest", manifest_text(lambda text: "{} {}"), id="two objects"),
        pytest.param(
            "invalid_manifest", manifest_text(lambda text: '{"a":' * 99_999), id="deep nesting"
        ),
        pytest.param(
            "invalid_manifest",
            manifest_text(lambda text: re.sub(r'"error": 0[.0-9]+', '"error": NaN', text, count=1)),
            id="an error that is NaN",
        ),
        pytest.param(
            "invalid_manifest",
            manifest_text(
                lambda text: re.sub(r'"error": 0[.0-9]+', '"error": 1e999', text, count=1)
            ),
            id="an error that is infinite",
        ),
        pytest.param(
            "duplicate_key",
            manifest_text(lambda text: text.replace('"recipe"', '"recipe": "auto", "recipe"')),
            id="a key twice in the manifest",
        ),
        pytest.param(
            "duplicate_key",
            manifest_text(lambda text: text.replace('"kind"', '"kind": "mlp", "kind"', 1)),
            id="a key twice in a record",
        ),
        pytest.param("unknown_codec", edit_record(FIRST, codec="jpeg"), id="an unknown codec"),
        pytest.param("unknown_codec", edit_record(FIRST, codec=""), id="a codec without a name"),
        pytest.param("invalid_name", rename(NORM, "file:config.json"), id="a tensor named file:"),
        pytest.param("invalid_name", rename(NORM, ""), id="a tensor without a name"),
        pytest.param("invalid_name", edit_file(name="../../etc/passwd"), id="../../etc/passwd"),
        pytest.param("invalid_name", edit_file(name="/etc/passwd"), id="an absolute path"),
        pytest.param("invalid_name", edit_file(name="modeling.py"), id="code"),
        pytest.param("invalid_name", edit_file(name="config.json\0.py"), id="a name with a zero"),
        pytest.param("invalid_name", edit_file(name="CONFIG.JSON"), id="a name in capitals"),
        pytest.param("shape_too_large", edit_target(parameters=1), id="another parameter count"),
        pytest.param("shape_too_large", edit_record(ZERO, shape=[17]), id="a longer vector"),
        pytest.param("shape_too_large", reshape(ZERO, 2**40, 2), id="2^41 weights"),
        pytest.param(None, reshape(ZERO, 2**40), id="2^40 weights, and nothing stored"),
        pytest.param("shape_too_large", reshape(ZERO, *[2**40] * 8), id="2^320 weights"),
        pytest.param(None, reshape(ZERO, *[2**40] * 8, 0), id="2^320 times nothing"),
        pytest.param(
            "shape_too_large", edit_record(FIRST, tuned_shape=[65_547, 16]), id="a vocabulary bomb"
        ),
        pytest.param(
            "shape_too_large", edit_record("head.bias", shape=[2**20]), id="an added tensor bomb"
        ),
    ],
)
def test_a_manifest_is_accepted_or_refused_by_the_rule_it_breaks(tmp_path, fault, change):
    forgery = Forgery()
    change(forgery)
    assert fault_of(lambda: forgery.open(tmp_path)) == fault


def more_bytes(name, more):
    """A record that says more than is stored for its tensor, or less."""

    def change(forgery):
        forgery.record(name)["bytes"] += more

    return change


def unsealed(**changes):
    """Another digest of the payloads."""

    def change(forgery):
        forgery.sealed = False
        forgery.manifest.update(changes)

    return change


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        pytest.param(None, edit_record(FIRST, dtype="BF16"), id="the default dtype written out"),
        pytest.param("invalid_manifest", edit_manifest(format_version=1), id="format_version 1"),
        pytest.param("invalid_manifest", drop_field(NORM, "bytes"), id="no payload"),
        pytest.param("invalid_manifest", edit_record(NORM, bytes=0), id="a payload of no bytes"),
        pytest.param("invalid_manifest", edit_record(NORM, bytes=-1), id="negative bytes"),
        pytest.param("invalid_manifest", edit_record(NORM, bytes=True), id="bytes that are true"),
        pytest.param("invalid_manifest", edit_record(NORM, bytes=9.0), id="bytes with a point"),
        pytest.param("invalid_manifest", edit_record(NORM, bytes=2**70), id="2^70 bytes"),
        pytest.param("invalid_offsets", edit_record(NORM, bytes=2**62), id="2^62 bytes"),
        pytest.param("invalid_offsets", more_bytes(NORM, 1), id="a byte more than is stored"),
        pytest.param("invalid_offsets", more_bytes(NORM, -1), id="a byte less than is stored"),
        pytest.param("invalid_manifest", edit_record(ZERO, bytes=5), id="zero with a payload"),
        pytest.param(
            "invalid_manifest",
            edit_record(FIRST, payload_blake3="0" * 16),
            id="a digest of its own",
        ),
        pytest.param("invalid_manifest", edit_record(FIRST, blake3="0" * 32), id="a long digest"),
        pytest.param("invalid_manifest", edit_record(NORM, codec="hybrid"), id="a hybrid vector"),
        pytest.param("invalid_manifest", edit_record(NORM, codec="factors"), id="factored vector"),
        pytest.param(
            "invalid_manifest",
            lambda forgery: forgery.manifest.pop("payload_blake3"),
            id="payloads without a digest",
        ),
        pytest.param("invalid_manifest", unsealed(payload_blake3="0" * 63), id="63 digits"),
        pytest.param("payload_digest", unsealed(payload_blake3="0" * 64), id="another digest"),
    ],
)
def test_a_record_and_its_payload_keep_the_rules_of_the_page(tmp_path, fault, change):
    forgery = Forgery()
    change(forgery)
    assert fault_of(lambda: forgery.open(tmp_path)) == fault


def test_a_tensor_has_no_entry_of_its_own(tmp_path):
    forgery = Forgery()
    header = forgery.header()
    header[FIRST] = dict(header["tensors"])
    assert fault_of(lambda: forgery.open(tmp_path, header)) == "invalid_offsets"


def test_a_damaged_side_file_is_found_when_the_pack_is_opened(tmp_path):
    content = bytearray(PACK.read_bytes())
    content[-1] ^= 1
    path = written(tmp_path, content)
    assert fault_of(lambda: SkillPack.load(path)) == "payload_digest"


@pytest.mark.slow
@pytest.mark.timeout(20)
def test_a_product_of_a_million_extents_is_refused_at_once(tmp_path):
    forgery = Forgery()
    forgery.record(ZERO)["shape"] = [2**40] * 1_000_000
    assert fault_of(lambda: forgery.open(tmp_path)) == "shape_too_large"


@pytest.mark.slow
@pytest.mark.timeout(20)
def test_a_repeated_key_among_many_others_is_found_at_once(tmp_path):
    keys = ",".join(f'"{i}":0' for i in range(300_000))
    path = written(tmp_path, header_only(f'{{{keys},"299999":0}}'))
    assert fault_of(lambda: SkillPack.load(path)) == "duplicate_key"


def test_every_fault_of_the_page_has_a_test_and_the_page_names_every_fault():
    page = (ROOT / "docs" / "skillpack-format.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if "PackError |" in line]
    rows += ["not_a_skillpack", "older_version", "newer_version"]
    assert set(rows) == {fault.value for fault in PackFault}
    tests = "".join(
        path.read_text() for path in sorted((ROOT / "tests" / "skillpack").glob("*.py"))
    )
    assert [fault.value for fault in PackFault if f'"{fault.value}"' not in tests] == []


def test_a_pack_for_another_target_is_refused_and_the_first_differing_tensor_named():
    pack, target = SkillPack.load(PACK), Checkpoint.open(TARGET)
    names = set(target.tensors)
    pack.check_target(target.read, names, "here")

    def altered(name):
        tensor = target.read(name)
        return tensor + 1 if name.startswith("h.1") else tensor

    with pytest.raises(PackMismatchError, match=r"h\.1\.attn\.k\.weight has other values"):
        pack.check_target(altered, names, "here")
    with pytest.raises(PackMismatchError, match=r"lacks tensor a\.new"):
        pack.check_target(altered, names | {"a.new"}, "here")
    with pytest.raises(PackMismatchError, match=r"here lacks tensor embed\.weight"):
        pack.check_target(altered, names - {"embed.weight"}, "here")


# ------------------------------------------------------------------------ damage anywhere


def small_pack():
    """A whole pack of four tensors and one side file, small enough to be damaged everywhere."""
    forgery = Forgery()
    kept = ("h.0.conv.weight", NORM, ZERO, "rare.weight", "file:config.json")
    forgery.manifest["tensors"] = [forgery.record(name) for name in kept[:-1]]
    forgery.manifest["tensors"].sort(key=lambda record: record["name"])
    forgery.manifest["files"] = forgery.manifest["files"][:1]
    forgery.payloads = {name: p for name, p in forgery.payloads.items() if name in kept}
    forgery.manifest["target"]["parameters"] = 24 + 16 + 16 + 512
    return forgery


def test_a_pack_cut_at_any_length_is_reported_as_damaged(tmp_path):
    path = written(tmp_path, small_pack().build())
    faults = set()
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        faults.add(fault_of(lambda: SkillPack.load(path)))
    assert faults == {"truncated"}


@pytest.mark.slow
def test_every_flipped_bit_is_reported(tmp_path):
    content, path = small_pack().build(), tmp_path / "flipped.skillpack"
    path.write_bytes(content)
    target = Checkpoint.open(TARGET)
    files = SkillPack.load(path).side_files(target)
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(content)):
            at, was = bit // 8, content[bit // 8]
            file.seek(at)
            file.write(bytes([was ^ 1 << bit % 8]))
            fault = fault_of(lambda: SkillPack.load(path).side_files(target) != files and 1 / 0)
            assert fault is not None, (at, bit % 8)
            file.seek(at)
            file.write(bytes([was]))
