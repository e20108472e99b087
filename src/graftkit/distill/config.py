"""The configuration of `graftkit distill`: sources, scores, selection, training and pack.

One TOML file holds all of it. The sentence under a field is its documentation. Paths in the file
are relative to the folder of the file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftkit.config import TRAIN_STEPS, Budget, Recipe, Settings
from graftkit.errors import BudgetError


def resolve_model(reference: str, folder: Path) -> str:
    """The path of a model directory, if `reference` is one relative to `folder`; else a Hub id."""
    return str(folder / reference) if (folder / reference).exists() else reference


ComputeDtype = Literal["float32", "bfloat16"]


def _fastest_precision() -> ComputeDtype:
    """bfloat16 where the device multiplies in it; emulated, it takes ten times as long."""
    import torch  # here, so that settings are read without it

    from graftkit.parallel import bfloat16_pays

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return "bfloat16" if bfloat16_pays(device) else "float32"


class Prompts(Settings):
    """The prompts that the sources answer."""

    file: str
    """JSON Lines with `prompt`; rules also read `completion` or `tests`."""
    limit: int | None = Field(default=None, ge=1)
    """Number of prompts, chosen with the seed. Default: all."""
    chat: bool = False
    """Whether the target reads a prompt as a user's turn, in its chat template."""


class Sampling(Settings):
    """How a source samples its answers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the source in files and tables."""
    samples: int = Field(default=4, ge=1, le=1024)
    """Number of answers to each prompt."""
    temperature: float = Field(default=0.8, ge=0)
    """Sampling temperature. 0 is greedy, with one answer to each prompt."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling: the likeliest tokens that together have this probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that occurred before become less likely (CTRL)."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer; an answer that is cut here is dropped."""
    chat: bool = False
    """Whether the source reads a prompt as a user's turn, in its own chat template."""
    licence: str | None = None
    """Licence of the source's answers, for the pack's manifest."""


class ModelSource(Sampling):
    """A causal language model that runs on this machine."""

    kind: Literal["model"]
    model: str
    """A Hugging Face directory or Hub id[@revision]."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of a batch, prompts and answers together. Another value samples other answers."""


class Endpoint(Settings):
    """A model behind an OpenAI-compatible endpoint, and how requests are sent to it."""

    url: str
    """Base URL, such as http://localhost:8000/v1."""
    model: str
    """The endpoint's name for the model."""
    key_env: str | None = None
    """Environment variable that holds the API key; the key itself is never written."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests at the same time."""
    timeout_seconds: float = Field(default=120, gt=0)
    """Longest time of one attempt, from the request to the last byte of the response."""
    retries: int = Field(default=8, ge=0)
    """Further attempts after a failed request, each after a longer wait."""


class EndpointSource(Sampling, Endpoint):
    """Answers of a served model."""

    kind: Literal["endpoint"]
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Largest number of requests in a minute. Default: no limit."""
    price_per_million: tuple[float, float] = (0.0, 0.0)
    """Price of a million prompt tokens and of a million completion tokens, in any currency."""


class AnswersSource(Sampling):
    """A file of finished answers."""

    kind: Literal["answers"]
    file: str
    """JSON Lines of `prompt` and `completion`; each line of a prompt is one of its answers."""


Source = Annotated[ModelSource | EndpointSource | AnswersSource, Field(discriminator="kind")]


class Rule(Settings):
    """A check that an answer passes or fails; only answers that pass become training rows."""


class Graded(Settings):
    """A number for each answer. The weighted sum of these numbers is the answer's reward."""

    weight: float = 1.0
    """Factor of this number in the sum."""


class ExactRule(Rule):
    """The answer equals `completion` of the prompts file, up to blanks at the ends."""

    kind: Literal["exact"]


class NumberRule(Rule):
    """The answer's number equals that of `completion`: the first after `####`, else the last."""

    kind: Literal["number"]
    tolerance: float = Field(default=1e-6, ge=0)
    """Relative difference that still counts as equal."""


class JsonRule(Rule):
    """The answer is the same JSON value as `completion`; key order and blanks do not matter."""

    kind: Literal["json"]


class CodeRule(Rule):
    """The answer's Python code passes the `tests` of the prompts file, in a sandbox."""

    kind: Literal["code"]
    timeout_seconds: float = Field(default=10, gt=0)
    """Longest processor time and wall time of one answer with its tests."""
    memory_bytes: int = Field(default=2**29, ge=2**26)
    """Largest address space of each process."""


class RewardScore(Graded):
    """A reward model: a sequence classifier with one label, whose logit is the number."""

    kind: Literal["reward"]
    model: str
    """A Hugging Face directory or Hub id[@revision]."""
    chat: bool = True
    """Whether prompt and answer are written in its chat template."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one batch."""


class JudgeScore(Graded, Endpoint):
    """A language model behind an endpoint grades from 0 to 10; the number is a tenth of it."""

    kind: Literal["judge"]
    instruction: str = "Grade the answer for being correct, helpful and clear."
    """What the judge should grade."""


class AgreementScore(Graded):
    """Self-consistency: the share of the source's other answers that are the same."""

    kind: Literal["agreement"]
    of: Literal["text", "number", "json"] = "text"
    """What is compared: the whole text, the number, or the JSON value."""


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
    """Which answers become training rows and preference pairs."""

    pairs: Literal["best_worst", "checked", "mixed"] = "best_worst"
    """best_worst: best and worst passing answer of one source (FuseChat-3.0). checked: best that
    passes the rules against the worst that fails. mixed: a source's best against the target's own
    worst, with the target's best beside it (WRPO); the target must be among the sources."""
    target_source: str | None = None
    """For mixed pairs: the name of the source that is the target itself."""
    gap: tuple[float, float] = (0.01, 0.1)
    """Smallest and largest difference of a pair's rewards; other pairs are dropped."""
    sft_share: Annotated[float, Field(ge=0, le=1)] | Literal["all"] = 0.4
    """Share of the prompts for SFT; the others are for pairs. all: every prompt is for both."""
    least_reward: float | None = None
    """Answers with a smaller reward are not used for SFT. Default: no limit."""

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


class TrainerSettings(Settings):
    """Settings that SFT and DPO share."""

    epochs: float = Field(default=1, gt=0)
    """Passes over the data."""
    learning_rate: float = Field(gt=0)
    """Largest learning rate of the schedule."""
    embedding_rate: float = Field(default=1.0, ge=0)
    """Learning rate of the embeddings and the head, as a share of that of other weights."""
    batch_size: int = Field(default=128, ge=1)
    """Rows or pairs of one optimizer step, on all devices together."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward pass on one device; divides batch_size. Default: the whole batch."""
    warmup_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises; then it falls as a cosine."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_tokens: int = Field(default=2048, ge=2)
    """Longest row, prompt and answer together; longer rows are dropped and counted."""
    precision: ComputeDtype = Field(default_factory=_fastest_precision)
    """Precision of the computation; weights and optimizer are float32. Default: bfloat16 where the
    GPU, or without one the processor, multiplies in it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Optimizer steps between two checkpoints, from which a killed run continues."""
    lora: Lora | None = None
    """Train an adapter instead of all weights."""


class Sft(TrainerSettings):
    """Supervised fine-tuning on the chosen answers; the loss counts their tokens only."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the data."""
    learning_rate: float = Field(default=5e-6, gt=0)
    """Largest learning rate of the schedule."""


class Dpo(TrainerSettings):
    """Preference optimisation on pairs; the reference is the model after SFT."""

    learning_rate: float = Field(default=8e-7, gt=0)
    """Largest learning rate of the schedule."""
    loss: Literal["sigmoid_norm", "sigmoid", "wrpo"] = "sigmoid_norm"
    """sigmoid_norm divides log-probabilities by the answers' lengths; wrpo is for mixed pairs."""
    beta: float = Field(default=10.0, gt=0)
    """Strength of the preference: about 10 for sigmoid_norm, 0.01 to 0.1 for sigmoid and wrpo."""
    wrpo_alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight of the source's answer in the last step of WRPO; it rises linearly from 0."""


class Transfer(Settings):
    """Explicit transfer during SFT: distributions and hidden states beside the text."""

    lm_weight: float = Field(default=0.9, ge=0)
    """Weight of the cross-entropy of the answers' tokens."""
    kl_weight: float = Field(default=0.1, ge=0)
    """Weight of the divergence from the sources' distributions."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance of hidden states from the first source's."""
    top_k: int = Field(default=10, ge=1, le=256)
    """Number of log-probabilities that are stored for each token."""
    fusion: Literal["min_ce", "average_ce"] = "min_ce"
    """With several sources: the one that predicts the row best, or a weighted mean (FuseLLM)."""
    divergence: Literal["forward", "reverse"] = "forward"
    """KL(source ‖ target), or KL(target ‖ source)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions."""
    hidden: Literal["cosine", "mse", "gram"] = "gram"
    """How hidden states are compared. They are means over spans that both tokenizers cut alike."""


class Pack(Settings):
    """How the pack is made; see `graftkit pack --help`."""

    budget: str | None = None
    """Largest file: 5%, 12MB or 1.0bpp. Default 5% for lossy recipes, none for lossless."""
    recipe: Recipe = "auto"
    """auto, graftllm or lossless."""
    calibration_rows: int = Field(default=256, ge=0)
    """Number of SFT rows to calibrate on; 0 packs without data."""
    train_steps: int = Field(default=TRAIN_STEPS, ge=0)
    """Steps in which the codes of the pack are trained."""

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                Budget.parse(text)
        except BudgetError as error:
            raise ValueError(str(error)) from error
        return text


class DistillConfig(Settings):
    """All settings of a run from sources to a pack."""

    target: str
    """The model to train: a Hugging Face directory or Hub id[@revision]."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of all random choices."""
    prompts: Prompts
    """The prompts that the sources answer."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Who answers the prompts."""
    scores: tuple[Score, ...] = Field(min_length=1)
    """How the answers are scored."""
    selection: Selection = Selection()
    """Which answers become training rows and preference pairs."""
    sft: Sft = Field(default_factory=Sft)
    """Supervised fine-tuning."""
    dpo: Dpo | None = Field(default_factory=Dpo)
    """Preference optimisation; `dpo = false` leaves it out."""
    transfer: Transfer | None = None
    """Explicit transfer during SFT; needs a source of kind model."""
    pack: Pack = Pack()
    """How the pack is made."""

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
