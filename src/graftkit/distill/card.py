"""Data card, model card, and the provenance of the pack."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftkit.config import VERSION
from graftkit.distill.config import DistillConfig, ModelSource, Source
from graftkit.distill.records import ScoredAnswer
from graftkit.distill.sample import PromptSet, SourceSummary
from graftkit.distill.select import SelectedData
from graftkit.text import printable

Card = dict[str, Any]
"""Counts and settings, as JSON."""


def make_card(
    config: DistillConfig,
    prompts: PromptSet,
    sampled: Sequence[SourceSummary],
    scored: Sequence[ScoredAnswer],
    chosen: SelectedData,
) -> Card:
    """Counts of everything from prompts to pairs, and the settings behind them."""
    answers = {
        one.source: asdict(one)
        | _answer_counts([s for s in scored if s.answer.source == one.source])
        for one in sampled
    }
    return {
        "seed": config.seed,
        "target": config.target,
        "prompts": {
            "file": Path(config.prompts.file).name,
            "used": len(prompts.prompts),
            "dropped": prompts.dropped,
        },
        "answers": answers,
        "sft": {
            "rows": len(chosen.rows),
            "dropped": dict(chosen.dropped_rows),
        },
        "pairs": {"pairs": len(chosen.pairs), "dropped": dict(chosen.dropped_pairs)},
        "sources": [source_card(source) for source in config.sources],
        "scores": [score.model_dump(mode="json", exclude_none=True) for score in config.scores],
    }


def source_card(source: Source) -> Card:
    """A source by name, place, licence and sampling settings, without its API key's variable."""
    if source.kind == "answers":
        shown = {"name", "kind", "file", "licence"}
    else:
        hidden = {"key_env", "concurrency", "requests_per_minute", "timeout_seconds", "retries"}
        shown = set(type(source).model_fields) - hidden
    return source.model_dump(mode="json", exclude_none=True, include=shown)


def provenance(config: DistillConfig, card: Card) -> dict[str, str]:
    """Sources, data and settings in short lines, for the pack's manifest."""
    lines = {
        "made_by": f"graftkit {VERSION} distill",
        "prompts": f"{card['prompts']['file']}, {card['prompts']['used']}",
        "scores": ", ".join(score.kind for score in config.scores),
        "sft": f"{card['sft']['rows']} rows, {config.sft.epochs:g} epochs",
        "seed": str(config.seed),
    }
    if config.dpo:
        pairs = card["pairs"]["pairs"]
        lines["dpo"] = f"{pairs} pairs, {config.dpo.loss}, beta {config.dpo.beta:g}"
    if config.transfer:
        lines["transfer"] = f"{config.transfer.fusion}, kl {config.transfer.kl_weight:g}"
    for source in config.sources:
        lines[f"source {source.name}"] = _source_line(source)
    return lines


def licence(config: DistillConfig) -> str | None:
    """Licences of the sources' answers, joined; None where no source names one."""
    named = sorted({source.licence for source in config.sources if source.licence})
    return " AND ".join(named) or None


def data_card(card: Card) -> str:
    """The data card as Markdown."""
    prompts, sft, pairs = card["prompts"], card["sft"], card["pairs"]
    answers = list(card["answers"].items())
    parts = [
        "# Data card",
        f"Prompts: `{prompts['file']}`, {prompts['used']:,} used. Seed {card['seed']}.",
        _dropped("Prompts left out", prompts["dropped"]),
        "## Answers",
        _table(
            ("source", "answers", "passed", "mean reward", "tokens read", "tokens written", "cost"),
            [
                (
                    *(name, a["answers"], a["passed"], f"{a['mean_reward']:.3f}"),
                    *(a["tokens_in"], a["tokens_out"], f"{a['cost']:.2f}"),
                )
                for name, a in answers
            ],
        ),
        *(
            _dropped(f"{name}: refused", _quoted(a["refused"]))
            for name, a in card["answers"].items()
        ),
        *(_dropped(f"{name}: did not pass", a["failed"]) for name, a in card["answers"].items()),
        "## Rows for SFT",
        f"{sft['rows']:,} rows.",
        _dropped("Prompts that gave none", sft["dropped"]),
        "## Pairs",
        f"{pairs['pairs']:,} pairs.",
        _dropped("Prompts that gave none", pairs["dropped"]),
        "## Sources",
        *(_settings(source) for source in card["sources"]),
        "## Scores",
        *(_settings(score) for score in card["scores"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(config: DistillConfig, card: Card, losses: Mapping[str, Card]) -> str:
    """The README of the tuned model and its pack, with front matter for the Hub."""
    target = _public(config.target)
    front = ["---", f"base_model: {_yaml(target)}", "library_name: transformers"]
    licences = licence(config)
    front += [f"license_name: {_yaml(licences)}", "license: other"] if licences else []
    front += ["tags: [graftkit, sft" + (", dpo]" if config.dpo else "]"), "---"]
    lines = [f"- {key}: {value}" for key, value in provenance(config, card).items()]
    curves = [
        f"- {stage}: loss {loss['first']:.4f} at the first step, {loss['last']:.4f} at the last, "
        f"{loss['steps']} steps"
        for stage, loss in losses.items()
    ]
    body = [
        f"# A skill for {Path(target).name}",
        f"`{target}` trained on answers of {_names(config)}. The delta is "
        "`skill.skillpack`; the whole model is `tuned/`.",
        "## Where it comes from",
        "\n".join(lines),
        "## Training",
        "\n".join(curves),
        "Counts, drops and sampling settings: `data_card.md`. The answers' licence is that of "
        "their sources; the target's own licence holds as well.",
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"


def _answer_counts(scored: Sequence[ScoredAnswer]) -> dict[str, Any]:
    passed = [one for one in scored if one.passed]
    rewards = [one.reward for one in passed]
    return {
        "passed": len(passed),
        "mean_reward": sum(rewards) / len(rewards) if rewards else 0.0,
        "failed": dict(Counter(one.failed for one in scored if one.failed)),
    }


def _names(config: DistillConfig) -> str:
    return ", ".join(source.name for source in config.sources)


def _source_line(source: Source) -> str:
    if source.kind == "answers":
        return Path(source.file).name
    name = Path(source.model).name if isinstance(source, ModelSource) else source.model
    drawn = f"T {source.temperature:g}, p {source.top_p:g}"
    return f"{name}, {source.samples} samples, {drawn}"


def _quoted(counts: Mapping[str, int]) -> dict[str, int]:
    """Reasons in a server's words, quoted so that they are no markup of the card."""
    return {f"`{printable(why).replace('`', chr(39))}`": count for why, count in counts.items()}


def _dropped(title: str, counts: Mapping[str, int]) -> str:
    present = {reason: count for reason, count in counts.items() if count}
    if not present:
        return ""
    ordered = sorted(present.items(), key=lambda item: (-item[1], item[0]))
    return f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in ordered) + "."


def _settings(values: Mapping[str, Any]) -> str:
    name = values.get("name", values["kind"])
    rest = {key: value for key, value in values.items() if key not in ("name", "kind")}
    text = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"**{name}** ({values['kind']}): {text or 'no settings'}."


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _public(reference: str) -> str:
    """A Hub id as it is; of a local directory the name only, because its path is private."""
    return Path(reference).name if reference.startswith((".", "/", "~")) else reference


def _yaml(text: str | None) -> str:
    return '"' + printable(str(text)).replace("\\", "\\\\").replace('"', '\\"') + '"'
