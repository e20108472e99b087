"""The command `distill`: a run or its estimate, and what it prints."""

from pathlib import Path
from typing import Any

from rich.console import Console

from graftkit.cli import show
from graftkit.distill.pipeline import estimate_run, run_distill


def distill_into(config: Path, folder: Path, only: str | None, dry_run: bool) -> dict[str, Any]:
    """Run the stages, or estimate what they would take."""
    if dry_run:
        return estimate_run(config)
    with show.progress() as report:
        stages = run_distill(config, folder, only, report)
    return {"output": str(folder), "stages": stages}


def print_run(result: dict[str, Any]) -> None:
    """Print every stage with its seconds and counts."""
    table = show.Table()
    for header in ("stage", "seconds", "result"):
        table.add_column(header, justify="right" if header == "seconds" else "left")
    for stage, entry in result["stages"].items():
        table.add_row(stage, f"{entry['seconds']:,.1f}", _counts(entry))
    Console().print(table)
    show.line(f"{result['output']}: done")


def print_estimate(estimate: dict[str, Any]) -> None:
    """Print counts, memory, disk and time of a run that has not begun."""
    show.line(f"{estimate['prompts']:,} prompts, {estimate['prompt_tokens']:,} tokens")
    table = show.Table()
    headers = ("stage", "rows", "steps", "tokens", "memory", "time", "cost")
    for header in headers:
        table.add_column(header, justify="left" if header == "stage" else "right")
    for stage, entry in estimate["stages"].items():
        table.add_row(
            stage,
            f"{entry.get('answers', entry.get('rows')):,}",
            f"{entry['steps']:,}" if "steps" in entry else "",
            f"{entry['tokens']:,}",
            show.size(entry["memory_bytes"]),
            _time(entry["seconds"]),
            f"{entry['cost']:,.2f}" if entry.get("cost") else "",
        )
    Console().print(table)
    show.line(
        f"disk: {show.size(estimate['disk_bytes'])}. Tokens, time, cost and disk are for answers "
        "of maximal length; time is that of the arithmetic, memory is without activations"
    )


def _counts(entry: dict[str, Any]) -> str:
    parts = []
    for name, value in entry.items():
        if name == "loss":
            parts.append(
                f"loss {value['first']:.3f} to {value['last']:.3f}, {value['steps']} steps"
            )
        elif isinstance(value, (int, float)) and name != "seconds" and value:
            parts.append(f"{name.replace('_', ' ')} {value:,}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
