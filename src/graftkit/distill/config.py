"""The one file that `graftkit distill` reads: sources, scores, selection, training, pack.

Every sentence under a field is its documentation. Paths in the file are relative to the file.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graftkit.config import TRAIN_STEPS, Budget, Recipe
from graftkit.errors import BudgetError, ConfigError
from graftkit.parallel import bfloat16_pays


def located(reference: str, where: Path) -> str:
    """A directory beside the configuration, which lies in `where`, or a Hub id as it stands."""
    return str(where / reference) if (where / reference).exists() else reference


Precision = Literal["float32", "bfloat16"]


def _fastest_precision() -> Precision:
    """Where bfloat16 is emulated, training in it takes ten times as long."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return "bfloat16" if bfloat16_pays(device) else "float32"


class Settings(BaseModel):
    """Frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Prompts(Settings):
    """What the sources are asked."""

    file: str
    """JSON Lines; `prompt` is read, and only what a score compares with beside it."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts used, a seeded choice; none: all."""
    chat: bool = False
    """Whether a prompt is a user's turn, which the target reads in its chat template."""


class Sampling(Settings):
    """How a source answers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name in files and tables."""
    samples: int = Field(default=4, ge=1, le=1024)
    """Answers to each prompt."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the likeliest token, and one sample says all."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Share of the probability that is sampled from."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that occurred become less likely."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer; what is cut there is dropped."""
    chat: bool = False
    """Whether a prompt is sent as a user's turn, in the source's own chat template."""
    licence: str | None = None
    """Licence of the source's answers; lands in the pack's provenance."""


class ModelSource(Sampling):
    """A causal language model, run here."""

    kind: Literal["model"]
    model: str
    """A Hugging Face directory or Hub id[@revision]."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens in work at once, prompts and answers together. Decides the draws: keep it."""


class Endpoint(Settings):
    """A model behind an OpenAI-compatible endpoint, and how it is asked."""

    url: str
    """Base URL, such as http://localhost:8000/v1."""
    model: str
    """The endpoint's name for the model."""
    key_env: str | None = None
    """Environment variable that holds the API key; the key itself is never written."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests in flight."""
    timeout_seconds: float = Field(default=120, gt=0)
    """Longest wait for one answer, from the request to its last byte; anew for every attempt."""
    retries: int = Field(default=8, ge=0)
    """Further attempts of a request, each after a longer wait."""


class EndpointSource(Sampling, Endpoint):
    """Answers of a served model."""

    kind: Literal["endpoint"]
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Most requests a minute."""
    price_per_million: tuple[float, float] = (0.0, 0.0)
    """Price of a million prompt tokens and of a million completion tokens, any currency."""


class AnswersSource(Sampling):
    """Answers that are there already."""

    kind: Literal["answers"]
    file: str
    """JSON Lines of `prompt` and `completion`, several lines to a prompt if there are."""


Source = Annotated[ModelSource | EndpointSource | AnswersSource, Field(discriminator="kind")]


class Rule(Settings):
    """A check that an answer passes or fails; one that fails is never chosen."""


class Graded(Settings):
    """A number for each answer; the sum of them, weighted, is its reward."""

    weight: float = 1.0
    """Share in the reward."""


class ExactRule(Rule):
    """The reference's words: `completion` of the prompts file, blanks at the ends aside."""

    kind: Literal["exact"]


class NumberRule(Rule):
    """The reference's number: the last one in each text, or the one after `####`."""

    kind: Literal["number"]
    tolerance: float = Field(default=1e-6, ge=0)
    """Relative difference that still counts as equal."""


class JsonRule(Rule):
    """The reference's JSON value; order of keys and blanks do not matter."""

    kind: Literal["json"]


class CodeRule(Rule):
    """The `tests` of the prompts file, Python, run behind the answer's code in a sandbox."""

    kind: Literal["code"]
    timeout_seconds: float = Field(default=10, gt=0)
    """Processor and wall time of one answer."""
    memory_bytes: int = Field(default=2**29, ge=2**26)
    """Address space of one answer."""


class RewardScore(Graded):
    """A reward model: sequence classification with one label."""

    kind: Literal["reward"]
    model: str
    """A Hugging Face directory or Hub id[@revision]."""
    chat: bool = True
    """Whether prompt and answer are put into its chat template."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens in one pass."""


class JudgeScore(Graded, Endpoint):
    """A judge behind an endpoint, asked for a grade from 0 to 10 (here divided by ten)."""

    kind: Literal["judge"]
    instruction: str = "Grade the answer for being correct, helpful and clear."
    """What the judge should look at."""


class AgreementScore(Graded):
    """Self-consistency: the share of the source's other samples that give the same answer."""

    kind: Literal["agreement"]
    of: Literal["text", "number", "json"] = "text"
    """What is compared: the whole text, the last number, or the JSON value."""


class LikelihoodScore(Graded):
    """Mean log-probability of the answer's tokens under its own source, nats."""

    kind: Literal["likelihood"]


Score = Annotated[
    ExactRule
    | NumberRule
    | JsonRule
    | CodeRule
    | RewardScore
    | JudgeScore
    | AgreementScore
    | LikelihoodScore,
    Field(discriminator="kind"),
]


class Selection(Settings):
    """Which answers are trained on."""

    pairs: Literal["best_worst", "checked", "mixed"] = "best_worst"
    """best_worst: best and worst passing answer of one source (FuseChat-3.0). checked: best that
    passes the rules against the worst that fails. mixed: a source's best against the target's own
    worst, with the target's best beside it (WRPO); the target must be among the sources."""
    target_source: str | None = None
    """For mixed pairs: the name of the source that is the target itself."""
    gap: tuple[float, float] = (0.01, 0.1)
    """Pairs whose rewards differ by less or by more are dropped."""
    sft_share: Annotated[float, Field(ge=0, le=1)] | Literal["all"] = 0.4
    """Share of the prompts for SFT, the rest for pairs; all: every prompt serves both."""
    least_reward: float | None = None
    """Answers below it are not trained on in SFT."""

    @model_validator(mode="after")
    def _gap_is_a_window(self) -> Self:
        if self.gap[0] > self.gap[1]:
            raise ValueError(f"gap {list(self.gap)} is empty; write [least, most]")
        if (self.pairs == "mixed") != (self.target_source is not None):
            raise ValueError("target_source belongs to pairs = mixed, and to nothing else")
        return self


class Lora(Settings):
    """Train a low-rank adapter, which is merged afterwards."""

    rank: int = Field(default=16, ge=1)
    """Rank of every adapted matrix."""
    alpha: int = Field(default=32, ge=1)
    """Scale: alpha / rank multiplies the product."""


class Training(Settings):
    """What SFT and DPO share."""

    epochs: float = Field(default=1, gt=0)
    """Passes over the data."""
    learning_rate: float = Field(gt=0)
    """Peak of the schedule."""
    embedding_rate: float = Field(default=1.0, ge=0)
    """Learning rate of embeddings and head, as a share of the others'."""
    batch_size: int = Field(default=128, ge=1)
    """Rows or pairs of one optimizer step, over all devices."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one pass on one device; none: the whole batch. Divides batch_size."""
    warmup_share: float = Field(default=0.1, ge=0, le=1)
    """Steps with a rising rate, as a share of all; then a cosine."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    max_tokens: int = Field(default=2048, ge=2)
    """Longer rows are dropped and counted."""
    precision: Precision = Field(default_factory=_fastest_precision)
    """Of the computation; weights and optimizer are float32. Bfloat16 where the GPU, or without one
    the processor, multiplies in it, unless told otherwise."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between two checkpoints that a killed run continues from."""
    lora: Lora | None = None
    """Train an adapter instead of all weights."""


class Sft(Training):
    """Supervised fine-tuning on the chosen answers, loss on their tokens alone."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the data."""
    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak of the schedule."""


class Dpo(Training):
    """Preference optimisation on pairs; the reference is the model after SFT."""

    learning_rate: float = Field(default=8e-7, gt=0)
    """Peak of the schedule."""
    loss: Literal["sigmoid_norm", "sigmoid", "wrpo"] = "sigmoid_norm"
    """sigmoid_norm divides by the answers' lengths; wrpo is for mixed pairs."""
    beta: float = Field(default=10.0, gt=0)
    """About 10 for sigmoid_norm, 0.01 to 0.1 for sigmoid and wrpo."""
    wrpo_alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight that the source's answer has at the end of WRPO; it rises from 0."""


class Transfer(Settings):
    """Explicit transfer during SFT: distributions and hidden states beside the text."""

    lm_weight: float = Field(default=0.9, ge=0)
    """Weight of the cross-entropy of the answers' tokens."""
    kl_weight: float = Field(default=0.1, ge=0)
    """Weight of the divergence from the sources' distributions."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance of hidden states from the first source's."""
    top_k: int = Field(default=10, ge=1, le=256)
    """Log-probabilities kept for each position."""
    fusion: Literal["min_ce", "average_ce"] = "min_ce"
    """Of several sources: the one that predicts the row best, or a weighted mean (FuseLLM)."""
    divergence: Literal["forward", "reverse"] = "forward"
    """KL(source ‖ target), or KL(target ‖ source)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions."""
    hidden: Literal["cosine", "mse", "gram"] = "gram"
    """How hidden states are compared, pooled over the spans of text that both tokenizers cut."""


class Pack(Settings):
    """The last stage; see `graftkit pack --help`."""

    budget: str | None = None
    """Largest file: 5%, 12MB or 1.0bpp. Default 5% for lossy recipes, none for lossless."""
    recipe: Recipe = "auto"
    """auto, graftllm or lossless."""
    calibration_rows: int = Field(default=256, ge=0)
    """Rows of the SFT set to calibrate on; 0: data-free."""
    train_steps: int = Field(default=TRAIN_STEPS, ge=0)
    """Steps of code training."""


class DistillConfig(Settings):
    """From sources to a pack."""

    target: str
    """The model that learns: a Hugging Face directory or Hub id[@revision]."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides every draw."""
    prompts: Prompts
    """What the sources are asked."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Who answers."""
    scores: tuple[Score, ...] = Field(min_length=1)
    """How answers are judged."""
    selection: Selection = Selection()
    """Which of them are trained on."""
    sft: Sft = Field(default_factory=Sft)
    """Supervised fine-tuning."""
    dpo: Dpo | None = Field(default_factory=Dpo)
    """Preference optimisation; `dpo = false` leaves it out."""
    transfer: Transfer | None = None
    """Explicit transfer beside SFT; sources must be models, run here."""
    pack: Pack = Pack()
    """The pack."""

    @model_validator(mode="before")
    @classmethod
    def _false_leaves_a_stage_out(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("dpo") is False:
            return {**values, "dpo": None}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [source.name for source in self.sources]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are called {min(twice)}; give each its own name")
        own = self.selection.target_source
        if own is not None and own not in names:
            raise ValueError(f"selection.target_source {own!r} is none of {', '.join(names)}")
        if self.dpo and (self.dpo.loss == "wrpo") != (self.selection.pairs == "mixed"):
            raise ValueError("dpo.loss = wrpo and selection.pairs = mixed belong together")
        rules = any(isinstance(score, Rule) for score in self.scores)
        if self.selection.pairs == "checked" and not rules:
            raise ValueError("selection.pairs = checked needs a rule among the scores")
        if self.transfer and not any(isinstance(s, ModelSource) for s in self.sources):
            raise ValueError("transfer needs a source of kind model; no other shows its states")
        for training in (self.sft, *([self.dpo] if self.dpo else [])):
            micro = training.micro_batch_size
            if micro is not None and training.batch_size % micro:
                raise ValueError(f"micro_batch_size {micro} does not divide {training.batch_size}")
        return self


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
