"""What users write: settings and their base, amounts with a unit, Hub ids, options of `pack`."""

import math
import re
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftkit.errors import BudgetError, ConfigError, nearest_name

VERSION = "0.1.0"
"""Version of graftkit; packs name it as their generator."""

Recipe = Literal["auto", "graftllm", "lossless"]
RECIPES: tuple[Recipe, ...] = ("auto", "graftllm", "lossless")


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys; the sentence under a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def read_toml(cls, path: str | Path) -> Self:
        """Read a TOML file.

        Raises: ConfigError for a file that cannot be read or is not TOML; for an unknown key, with
            the nearest there is; for a value that does not fit, with the value.
        """
        path = Path(path)
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            raise ConfigError(f"{path}: {cls.explain(error)}") from error
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            raise ConfigError(f"{path}: not TOML ({error})") from error

    def to_toml(self) -> str:
        """The text of a TOML file with these settings; those that are None are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def explain(cls, error: ValidationError) -> str:
        """All faults that pydantic reports, in one line."""
        return "; ".join(cls._explain_one(fault) for fault in error.errors())

    @classmethod
    def _explain_one(cls, fault: Any) -> str:
        location = fault["loc"]
        place = ".".join(map(str, location))
        if fault["type"] == "extra_forbidden":
            names = {name for table in cls._tables_at(location) for name in table.model_fields}
            prefix = "".join(f"{part}." for part in location[:-1] if not isinstance(part, int))
            return f"unknown key {place}{nearest_name(str(location[-1]), names, prefix)}"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] in ("missing", "value_error"):
            return f"{place}: {message}" if place else message
        return f"{place}: {message} (found {fault['input']!r})"

    @classmethod
    def _tables_at(cls, location: tuple[int | str, ...]) -> list[type[BaseModel]]:
        """Settings that a key at this location may belong to."""
        if len(location) == 1:
            return [cls]
        field = cls.model_fields.get(str(location[0]))
        return [] if field is None else list(_tables_inside(field.annotation))


def _tables_inside(annotation: Any) -> Iterator[type[BaseModel]]:
    """Settings that values of this type consist of, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _tables_inside(field.annotation)
    for argument in get_args(annotation):
        yield from _tables_inside(argument)


BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
"""1 MB is 10^6 bytes, as disks and file managers count; 1 MiB is 2^20 bytes."""
_AMOUNT_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+|%)\s*")


def parse_amount(text: str, units: Collection[str]) -> tuple[float, str] | None:
    """Split an amount such as `0.6MB` or `5 %` into its number and its unit in capitals.

    Args:
        units: in capitals; the text may spell them in any case.
    Returns: None where the text is no such amount.
    """
    match = _AMOUNT_PATTERN.fullmatch(text)
    if match is None or match[2].upper() not in units:
        return None
    return float(match[1]), match[2].upper()


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """`user/name` or `user/name@revision` as the repository and the revision; None: its newest."""
    repository, _, revision = text.partition("@")
    return repository, revision or None


_BUDGET_UNITS = frozenset(("%", "BPP", *BYTE_UNITS))


@dataclass(frozen=True)
class Budget:
    """How large the pack file may be: a share of the target, bytes, or bits per parameter."""

    text: str
    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `5%`, `12MB` or `1.0bpp`.

        Raises: BudgetError when the text is none of these, or the amount is not above zero.
        """
        parsed = parse_amount(text, _BUDGET_UNITS)
        if parsed is None:
            raise BudgetError(
                f"budget {text!r} is not understood; write a share of the target's bytes (5%), "
                "a file size (12MB, 800KB) or bits per parameter (1.0bpp)"
            )
        amount, unit = parsed
        if amount <= 0:
            raise BudgetError(f"budget {text!r} is zero; a pack needs at least its manifest")
        if unit == "%" and amount > 100:
            raise BudgetError(
                f"budget {text!r} is more than the target itself; ask for 100% or less, "
                "or use --recipe lossless"
            )
        return cls(text.strip(), amount, unit)

    def to_bytes(self, target_bytes: int, parameters: int) -> int:
        """File bytes allowed, for a target of `target_bytes` bytes and `parameters` weights."""
        if self.unit == "%":
            return math.floor(target_bytes * self.amount / 100)
        if self.unit == "BPP":
            return math.floor(parameters * self.amount / 8)
        return math.floor(self.amount * BYTE_UNITS[self.unit])


SELF = "self"
"""In place of a file of calibration rows: rows that the two models write."""

TRAIN_STEPS, QUICK_STEPS = 100, 25
"""Most steps of code training of a calibrated pack by default, and of a quick one."""


class PackConfig(Settings):
    """Settings of `pack`; they decide every byte of the result."""

    recipe: Recipe = "auto"
    """auto (smallest error per byte), graftllm (the paper's method) or lossless."""
    budget: str | None = None
    """Largest file: 5%, 12MB or 1.0bpp. Default 5% for lossy recipes, none for lossless."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed that picks the calibration rows when there are more than are used."""
    workers: int = Field(default=1, ge=1, le=256)
    """Tensors compressed at the same time; the bytes do not depend on it."""
    servable: bool = False
    """Only factors whose side path stays cheap (recipe auto)."""
    train_steps: int = Field(default=TRAIN_STEPS, ge=0, le=100_000)
    """Most steps of code training after coding (recipe auto with calibration)."""
    licence: str | None = None
    """Licence of the pack, as the manifest names it."""
    provenance: dict[str, str] = {}
    """Sources, data and settings behind the tuned model, for the manifest."""
    prompt_format: Literal["raw", "chat"] | None = None
    """How the skill's prompts were given to the model; default as the calibration rows are."""
    template_blake3: str | None = None
    """Digest of the chat template of prompt format chat, for the manifest."""

    @classmethod
    def checked(
        cls,
        recipe: str,
        budget: str | None,
        seed: int = 0,
        workers: int = 1,
        servable: bool = False,
        train_steps: int = TRAIN_STEPS,
    ) -> "PackConfig":
        """Validate options of the command line. Raises: ConfigError, BudgetError."""
        if recipe not in RECIPES:
            raise ConfigError(f"recipe {recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
        for name, value, least in (
            ("seed", seed, 0),
            ("workers", workers, 1),
            ("train_steps", train_steps, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if servable and recipe != "auto":
            raise ConfigError(f"servable chooses codecs for recipe auto, not for {recipe}")
        if budget is not None:
            Budget.parse(budget)
        return cls(
            recipe=recipe,
            budget=budget,
            seed=seed,
            workers=min(workers, 256),
            servable=servable,
            train_steps=min(train_steps, 100_000),
        )

    @property
    def parsed_budget(self) -> Budget | None:
        """The budget; None for a lossless pack without one."""
        if self.budget is not None:
            return Budget.parse(self.budget)
        return None if self.recipe == "lossless" else Budget.parse("5%")
