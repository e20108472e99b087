"""`graftkit distill`: from the answers of source models to a pack."""

from pathlib import Path
from typing import Annotated, Any

import typer

from graftkit.cli import show

app = typer.Typer()


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A configuration, see configs/.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for every stage.")],
    only: Annotated[
        str | None,
        typer.Option(help="One stage: sample, score, select, probe, sft, dpo or pack."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate counts, memory, disk and time; no run.")
    ] = False,
    json_output: show.Json = False,
) -> None:
    """Train a target on source models' answers and pack the delta.

    Sources -> answers -> scores -> SFT set and pairs -> SFT -> DPO -> pack. If it is interrupted,
    run the same command again: finished stages are not repeated.
    """
    from graftkit.distill.pipeline import estimate_run, run_distill

    if dry_run:
        estimate = estimate_run(config)
        show.json_or(json_output, estimate, lambda: print_estimate(estimate))
        return
    with show.progress() as report:
        stages = run_distill(config, output, only, report)
    result = {"output": str(output), "stages": stages}
    show.json_or(json_output, result, lambda: print_run(result))


def print_run(result: dict[str, Any]) -> None:
    """Every stage with its seconds and counts."""
    table = show.Table("stage", "seconds", "result", right=("seconds",))
    for stage, record in result["stages"].items():
        table.add_row(stage, f"{record['seconds']:,.1f}", _counts(record))
    table.show()
    show.line(f"{result['output']}: done")


def print_estimate(estimate: dict[str, Any]) -> None:
    """Counts, memory, disk and time of a run that has not begun."""
    show.line(f"{estimate['prompts']:,} prompts, {estimate['prompt_tokens']:,} tokens")
    columns = ("rows", "steps", "tokens", "memory", "time", "cost")
    table = show.Table("stage", *columns, right=columns)
    for stage, record in estimate["stages"].items():
        table.add_row(
            stage,
            f"{record.get('answers', record.get('rows')):,}",
            f"{record['steps']:,}" if "steps" in record else "",
            f"{record['tokens']:,}",
            show.size(record["memory_bytes"]),
            _time(record["seconds"]),
            f"{record['cost']:,.2f}" if record.get("cost") else "",
        )
    table.show()
    show.line(
        f"disk: {show.size(estimate['disk_bytes'])}. Tokens, time, cost and disk assume answers of "
        "maximal length; time counts the arithmetic only, memory leaves out activations"
    )


def _counts(record: dict[str, Any]) -> str:
    parts = []
    for name, value in record.items():
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
