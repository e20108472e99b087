import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import ConfigError, LibraryError
from graftkit.library.folder import LibraryIndex, LibraryTarget, PackEntry, check_name, file_of

TARGET = LibraryTarget(reference="base", fingerprint="0" * 64, config_blake3="1" * 64)
WHEN = datetime(2026, 11, 23, 4, 5, 6, tzinfo=UTC)


def entry(name: str = "math", version: int = 1, digest: str = "a" * 64, **changes) -> PackEntry:
    values = {
        "name": name,
        "version": version,
        "digest": digest,
        "file": file_of(name, version, digest),
        "bytes": 7,
        "added": WHEN,
        "has_key": True,
    }
    return PackEntry(**{**values, **changes})


def index_of(*entries: PackEntry) -> LibraryIndex:
    return LibraryIndex(format=1, target=TARGET, pack=entries)


def digest(start: str) -> str:
    return start + "f" * (64 - len(start))


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
    lambda name: name != "target"
)
digests = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")
indices = st.lists(
    st.tuples(names, st.integers(1, 99), digests),
    max_size=6,
    unique_by=(lambda item: item[:2], lambda item: item[2]),
).map(lambda items: index_of(*(entry(*item) for item in items)))


@given(indices)
def test_what_is_written_is_read_again(index):
    assert LibraryIndex.parse(index.to_toml(), "library.toml") == index


@given(indices)
def test_every_pack_is_found_by_its_label_and_its_digest(index):
    for pack in index.pack:
        assert index.find(pack.label) == pack
        if pack.digest not in index.newest:
            assert index.find(pack.digest) == pack


def test_a_name_means_its_newest_version():
    old, new = entry(version=1, digest=digest("1")), entry(version=2, digest=digest("2"))
    index = index_of(new, old)
    assert index.find("math") == new
    assert index.find("math@1") == old
    assert index.newest == {"math": new}
    assert index.find_all("math") == [new, old]


def test_a_digest_is_named_by_eight_digits_or_more():
    one, two = entry("a", digest=digest("0123456789")), entry("b", digest=digest("0123456780"))
    index = index_of(one, two)
    assert index.find("0123456789") == one
    with pytest.raises(LibraryError, match="digest 01234567 fits a@1, b@1; write more digits"):
        index.find("01234567")
    with pytest.raises(LibraryError, match="no pack with digest 99999999"):
        index.find("99999999")
    with pytest.raises(LibraryError, match="no pack '0123456' here; the packs are a, b"):
        index.find("0123456")


def test_a_name_comes_before_a_digest_that_begins_alike():
    named, other = entry("deadbeef", digest=digest("1")), entry("b", digest=digest("deadbeef"))
    assert index_of(other, named).find("deadbeef") == named


def test_an_empty_library_says_so():
    with pytest.raises(LibraryError, match="no pack 'math' here; the library is empty"):
        index_of().find("math")


@pytest.mark.parametrize(
    "name", ["", "a/b", "../a", ".hidden", "a b", "a@1", "ä", "a" * 65, "a\n", "a\\b"]
)
def test_a_name_that_could_be_a_path_is_refused(name):
    with pytest.raises(ConfigError, match="is no name for a pack"):
        check_name(name)


def test_target_is_no_name_for_a_pack():
    with pytest.raises(ConfigError, match="'target' stands for no pack at all"):
        check_name("target")


def test_a_taken_name_is_refused_unless_it_is_an_update():
    index = index_of(entry(version=3))
    with pytest.raises(ConfigError, match=r"math is here already \(version 3\).*--update"):
        index.next_version("math", update=False)
    assert index.next_version("math", update=True) == 4
    assert index.next_version("law", update=False) == 1


GOOD = index_of(entry()).to_toml()
DAMAGED = {
    "not TOML": ("format = 1", "format = = 1", "it is not TOML"),
    "nested without end": ("format = 1", "format = " + "[" * 3000, "it is not TOML"),
    "no format": ("format = 1", "", "format is missing"),
    "format is text": ("format = 1", 'format = "1"', "format: input should be a valid integer"),
    "format 0": ("format = 1", "format = 0", "format: input should be greater"),
    "newer": ("format = 1", "format = 2", "format 2; this graftkit reads up to 1, upgrade"),
    "unknown key": ("format = 1", "format = 1\nspeed = 3", "unknown key speed"),
    "unknown key of a pack": ("version = 1", "version = 1\nowner = 3", "unknown key pack.0.owner"),
    "no target": (GOOD[GOOD.index("[target]") : GOOD.index("[[pack]]")], "", "target is missing"),
    "no name": ('name = "math"\n', "", "pack.0.name is missing"),
    "path": ('file = "packs/math', 'file = "../../math', "lies in '../../math"),
    "file of another": ("-1-aaaaaaaaaaaa.", "-1-bbbbbbbbbbbb.", "expected 'packs/math-1-aaaaaaa"),
    "bytes as text": ("bytes = 7", 'bytes = "7"', "pack.0.bytes: input should be a valid integer"),
    "no bytes at all": ("bytes = 7", "bytes = 0", "pack.0.bytes: input should be greater"),
    "key as a number": ("has_key = true", "has_key = 1", "pack.0.has_key: input should be a valid"),
    "short digest": ("a" * 64, "a" * 63, "pack.0.digest: string should match"),
    "name with a slash": ('name = "math"', 'name = "a/b"', "pack.0.name: string should match"),
    "version 0": ("version = 1", "version = 0", "pack.0.version: input should be greater"),
    "packs are a table": ("[[pack]]", "[pack]", "pack: input should be a valid tuple"),
    "a key twice": ("version = 1", "version = 1\nversion = 2", "it is not TOML"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_list_is_refused_and_the_fault_is_named(case):
    old, new, message = DAMAGED[case]
    assert old in GOOD
    with pytest.raises(LibraryError, match=f"^library.toml: .*{re.escape(message)}"):
        LibraryIndex.parse(GOOD.replace(old, new), "library.toml")


def test_two_packs_of_one_name_and_version_are_refused():
    twice = index_of(entry(digest=digest("1")), entry(digest=digest("2")))
    with pytest.raises(LibraryError, match="math@1 is listed twice"):
        LibraryIndex.parse(twice.to_toml(), "library.toml")


def test_one_digest_under_two_names_is_refused():
    twice = index_of(entry("a"), entry("b"))
    with pytest.raises(LibraryError, match="aaaa is listed twice"):
        LibraryIndex.parse(twice.to_toml(), "library.toml")


def test_a_listed_pack_called_target_is_refused():
    with pytest.raises(LibraryError, match="a pack is called target"):
        LibraryIndex.parse(index_of(entry("target")).to_toml(), "library.toml")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_plainly(text):
    with pytest.raises(LibraryError, match=r"^library\.toml: "):
        LibraryIndex.parse(text, "library.toml")
