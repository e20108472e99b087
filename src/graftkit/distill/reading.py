"""Read the configuration of `graftkit distill`, and say plainly what is wrong with it."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graftkit.config import Budget
from graftkit.distill.config import (
    AgreementScore,
    AnswersSource,
    CodeRule,
    DistillConfig,
    Dpo,
    EndpointSource,
    ExactRule,
    JsonRule,
    JudgeScore,
    LikelihoodScore,
    Lora,
    ModelSource,
    NumberRule,
    Pack,
    Prompts,
    RewardScore,
    Selection,
    Settings,
    Sft,
    Transfer,
)
from graftkit.errors import BudgetError, ConfigError


def read_config(path: str | Path) -> DistillConfig:
    """Read a file. Raises: ConfigError with the key, what was found, and the nearest name."""
    path = Path(path)
    try:
        config = DistillConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        if config.pack.budget is not None:
            Budget.parse(config.pack.budget)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except BudgetError as error:
        raise ConfigError(f"{path}: pack.budget: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ConfigError(f"{path}: not TOML ({error})") from error
    return config


_TABLES: dict[str, tuple[type[Settings], ...]] = {
    "": (DistillConfig,),
    "prompts": (Prompts,),
    "sources": (ModelSource, EndpointSource, AnswersSource),
    "selection": (Selection,),
    "sft": (Sft, Lora),
    "dpo": (Dpo, Lora),
    "transfer": (Transfer,),
    "pack": (Pack,),
    "scores": (
        *(ExactRule, NumberRule, JsonRule, CodeRule),
        *(RewardScore, JudgeScore, AgreementScore, LikelihoodScore),
    ),
}


def _explain(error: ValidationError) -> str:
    """Every fault of a file in one line; an unknown key with the nearest that there is."""
    return "; ".join(map(_explain_one, error.errors()))


def _explain_one(fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place}{_nearest(fault['loc'])}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("missing", "value_error"):
        return f"{place}: {message}" if place else message
    return f"{place}: {message} (found {fault['input']!r})"


def _nearest(place: tuple[int | str, ...]) -> str:
    tables = _TABLES.get(str(place[0]) if len(place) > 1 else "", ())
    known = sorted({name for table in tables for name in table.model_fields})
    close = difflib.get_close_matches(str(place[-1]), known, n=1)
    prefix = ".".join(str(part) for part in place[:-1] if not isinstance(part, int))
    if not close:
        return ""
    return f"; did you mean {prefix}.{close[0]}?" if prefix else f"; did you mean {close[0]}?"
