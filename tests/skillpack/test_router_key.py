"""The router key in the file: beside the same tensors, checked before it is read."""

import json

import jsonschema
import pytest
from skillpack.forge import PACK, ROOT, Forgery, read_everything

from graftkit.errors import ConfigError, CorruptPackError, PackFormatError
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import RouterInfo

INFO = RouterInfo(layer=2, width=6, components=2, prompts=30, blake3="0" * 64)
KEY = bytes(range(1, INFO.nbytes + 1))


@pytest.fixture
def pack():
    return SkillPack.load(PACK).with_router_key(INFO, KEY)


@pytest.fixture
def forgery(pack, tmp_path):
    """A pack with a key, taken apart."""
    forged = Forgery()
    forged.manifest["router"] = INFO.model_dump(mode="json", exclude_defaults=True)
    forged.payloads["router"] = KEY
    assert forged.open(tmp_path).router_key == (INFO, KEY)
    return forged


def test_a_key_travels_in_the_file_beside_the_same_tensors(pack, tmp_path):
    file = tmp_path / "with-key.skillpack"
    pack.save(file)
    again = SkillPack.load(file)
    info, content = again.router_key
    assert (info, bytes(content)) == (INFO, KEY)
    assert again.pack_bytes == pack.pack_bytes == file.stat().st_size
    decoded, files = read_everything(file)
    plain, plain_files = read_everything(PACK)
    assert all(decoded[name].equal(plain[name]) for name in plain)
    assert files == plain_files
    schema = json.loads((ROOT / "docs/skillpack-v2.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(pack.manifest.to_json()))


def test_a_pack_without_a_key_has_none_and_its_bytes_do_not_change(tmp_path):
    pack = SkillPack.load(PACK)
    assert pack.router_key is None
    assert "router" not in pack.manifest.to_json().replace('"kind":"router"', "")
    pack.save(tmp_path / "again.skillpack")
    assert (tmp_path / "again.skillpack").read_bytes() == PACK.read_bytes()


def test_a_new_key_takes_the_place_of_the_old_one(pack, tmp_path):
    info = INFO.model_copy(update={"components": 0, "encoder": "tiny"})
    pack.with_router_key(info, KEY[: info.nbytes]).save(tmp_path / "new.skillpack")
    actual, content = SkillPack.load(tmp_path / "new.skillpack").router_key
    assert (actual, bytes(content)) == (info, KEY[: info.nbytes])


def test_the_digest_of_a_pack_is_that_of_its_file(pack, tmp_path):
    from blake3 import blake3

    pack.save(tmp_path / "a.skillpack")
    assert pack.digest == blake3((tmp_path / "a.skillpack").read_bytes()).hexdigest()
    assert pack.digest != SkillPack.load(PACK).digest


def test_a_key_of_another_size_than_its_description_is_not_put_in():
    with pytest.raises(CorruptPackError, match="its description says"):
        SkillPack.load(PACK).with_router_key(INFO, KEY + b"\0")


def test_a_pack_with_a_tensor_of_the_keys_name_takes_no_key(tmp_path):
    forgery = Forgery()
    forgery.record("h.1.norm.weight")["name"] = "router"  # without a payload
    forgery.manifest["tensors"].sort(key=lambda record: record["name"])
    with pytest.raises(ConfigError, match="named router takes no router key"):
        forgery.open(tmp_path).with_router_key(INFO, KEY)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        pytest.param(
            "invalid_offsets", lambda f: f.payloads.update(router=KEY[:-1]), id="a byte less"
        ),
        pytest.param(
            "invalid_offsets", lambda f: f.payloads.update(router=KEY + b"\0"), id="a byte more"
        ),
        pytest.param("invalid_offsets", lambda f: f.payloads.pop("router"), id="no payload"),
        pytest.param("invalid_offsets", lambda f: f.manifest.pop("router"), id="no description"),
        pytest.param(
            "invalid_offsets",
            lambda f: f.manifest["router"].update(width=65_535),
            id="a huge width",
        ),
        pytest.param(
            "invalid_manifest", lambda f: f.manifest["router"].update(width=2**40), id="too wide"
        ),
        pytest.param("invalid_manifest", lambda f: f.manifest["router"].update(width=0), id="none"),
        pytest.param(
            "invalid_manifest", lambda f: f.manifest["router"].update(layer=0), id="layer 0"
        ),
        pytest.param(
            "invalid_manifest", lambda f: f.manifest["router"].update(blake3="x"), id="no digest"
        ),
        pytest.param(
            "invalid_manifest", lambda f: f.manifest["router"].update(more=1), id="a surplus key"
        ),
        pytest.param(
            "invalid_manifest", lambda f: f.manifest["router"].update(encoder=7), id="no name"
        ),
    ],
)
def test_a_key_that_does_not_fit_its_description_is_refused(forgery, tmp_path, fault, change):
    change(forgery)
    with pytest.raises(PackFormatError) as error:
        forgery.open(tmp_path)
    assert error.value.fault == fault


def test_a_key_that_was_edited_is_found(forgery, tmp_path):
    forgery.header()  # digests of the right key
    forgery.sealed = False
    forgery.payloads["router"] = KEY[::-1]
    with pytest.raises(CorruptPackError) as error:
        forgery.open(tmp_path)
    assert error.value.fault == "payload_digest"


def test_no_tensor_may_take_the_name_of_the_keys_payload(forgery, tmp_path):
    [*_, last] = forgery.manifest["tensors"]
    name = last["name"]
    last["name"] = "router"
    forgery.manifest["tensors"].sort(key=lambda record: record["name"])
    assert name != "router"
    with pytest.raises(CorruptPackError) as error:
        forgery.open(tmp_path)
    assert error.value.fault == "invalid_name"
