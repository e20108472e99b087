from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from graftkit.config import BYTE_UNITS, Budget, Settings, parse_amount, parse_hub_id
from graftkit.errors import BudgetError, ConfigError


class Tree(Settings):
    kind: Literal["tree"]
    height: float = Field(gt=0)


class Bush(Settings):
    kind: Literal["bush"]
    stems: int = 3


class Garden(Settings):
    name: str
    owner: str | None = None
    plants: tuple[Annotated[Tree | Bush, Field(discriminator="kind")], ...] = ()


def read(tmp_path, text):
    file = tmp_path / "garden.toml"
    file.write_text(text, encoding="utf-8")
    return Garden.read_toml(file)


def test_settings_come_back_from_the_toml_they_were_written_as(tmp_path):
    garden = Garden(name="ours", plants=(Tree(kind="tree", height=2.5), Bush(kind="bush")))
    assert read(tmp_path, garden.to_toml()) == garden


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Garden(name="ours").name = "theirs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nme = "ours"', "unknown key nme; did you mean name?"),
        ("owner = 'us'", "name: Field required"),
        ("name = 3", "name: Input should be a valid string (found 3)"),
        ('name = "ours', "not TOML"),
        ("name = 1" + 5000 * "0", "not TOML"),
        (
            'name = "ours"\n[[plants]]\nkind = "tree"\nheigth = 1',
            "unknown key plants.0.tree.heigth; did you mean plants.tree.height?",
        ),
        (
            'name = "ours"\n[[plants]]\nkind = "tree"\nheight = 0',
            "plants.0.tree.height: Input should be greater than 0 (found 0)",
        ),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "garden.toml: " in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        Garden.read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("0.6MB", (0.6, "MB")),
        (" 500 kib ", (500.0, "KIB")),
        ("12", None),
        ("MB", None),
        ("1e3MB", None),
        ("-1MB", None),
        ("5 apples", None),
    ],
)
def test_an_amount_is_a_number_and_a_unit(text, amount):
    assert parse_amount(text, BYTE_UNITS) == amount


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5%", 100), ("1.5KB", 1500), ("2KiB", 2048), ("1.0bpp", 125), ("12 mb", 12_000_000)],
)
def test_a_budget_is_a_share_bytes_or_bits_per_parameter(text, nbytes):
    assert Budget.parse(text).to_bytes(target_bytes=2000, parameters=1000) == nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 apples", "not understood"),
        ("2ms", "not understood"),
        ("0%", "is zero"),
        ("101%", "more than the target itself"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("me/base", "me/base", None),
        ("me/base@v1.0", "me/base", "v1.0"),
        ("gpt2@main", "gpt2", "main"),
        ("me/base@", "me/base", None),
        ("me/base@refs/pr/1", "me/base", "refs/pr/1"),
    ],
)
def test_a_hub_id_names_a_repository_and_perhaps_a_revision(text, repository, revision):
    assert parse_hub_id(text) == (repository, revision)
