"""What a person sees: tables and lines on stdout, progress on stderr."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from graftkit.progress import Progress
from graftkit.text import printable

Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def line(text: str, *, error: bool = False) -> None:
    """One line on stdout, or on stderr; what foreign names hold neither ends it nor controls it."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


class Table(RichTable):
    """A table without lines. Cells are shown as they are: brackets are no markup."""

    def __init__(self, *, title: str | None = None):
        super().__init__(box=None, header_style="bold", pad_edge=False, title=title)

    def add_row(self, *cells: Any, **style: Any) -> None:
        """One row of texts."""
        super().add_row(*(Text(printable(str(cell))) for cell in cells), **style)


def json_or(
    wanted: bool, result: dict[str, Any] | list[Any], otherwise: Callable[[], None]
) -> None:
    """One JSON value on stdout, or what `otherwise` prints."""
    if wanted:
        print(json_text(result))
    else:
        otherwise()


def json_text(value: Any) -> str:
    """One line of JSON; numbers that are not finite, which JSON does not have, are null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar per step on stderr; silent when stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>20}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
    )
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = ProgressBar(*columns, *times, console=console, disable=not sys.stderr.isatty())
    tasks: dict[str, Any] = {}

    def report(step: str, done: int, total: int) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(printable(step), total=total)
        bar.update(tasks[step], completed=done, total=total)

    with bar:
        yield report


def pack_result(summary: dict[str, Any], output: Path, dry_run: bool) -> None:
    """After `pack`: one line of numbers and a table by kind."""
    name = f"{output} (not written)" if dry_run else str(output)
    limit = summary["budget_bytes"]
    of = f" of {size(limit)} allowed" if limit else ""
    line(
        f"{name}: {size(summary['pack_bytes'])}{of}, {100 * summary['ratio']:.2f} % of the "
        f"target, {summary['bits_per_parameter']:.3f} bits/parameter, "
        f"{summary['seconds']:.1f} s, peak memory {size(summary['peak_rss_bytes'])}"
    )
    Console().print(_kinds(summary["tensors"]))


def pack_table(summary: dict[str, Any], file: Path) -> None:
    """`inspect`: what the pack says of itself, then every tensor."""
    manifest = summary["manifest"]
    bound = summary["bound_bits_per_parameter"]
    calibration = manifest["calibration"]
    rows = {
        "file": f"{file}, {size(summary['pack_bytes'])} ({100 * summary['ratio']:.2f} % of the "
        f"target), format {manifest['format_version']}, by {manifest['generator']}",
        "target": f"{summary['target']}, fingerprint {manifest['target']['fingerprint'][:16]}…",
        "tuned": summary["tuned"],
        "recipe": summary["recipe"],
        "calibration": f"{calibration['rows']} rows, {calibration['tokens']} tokens of "
        f"{calibration['source']}"
        if calibration
        else "none (data-free)",
        "bits/parameter": f"{summary['bits_per_parameter']:.3f}"
        + (f", model bound {bound:.3f}" if bound is not None else ""),
        "files": ", ".join(record["name"] for record in manifest["files"]) or "none changed",
    }
    for key, value in rows.items():
        line(f"{key:>15}  {value}")
    table = Table()
    for header, justify in _COLUMNS:
        table.add_column(header, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for tensor in summary["tensors"]:
        detail = tensor.get("tiers") or _detail(tensor)
        table.add_row(
            tensor["name"],
            tensor["kind"],
            "x".join(map(str, tensor["shape"])),
            tensor["codec"],
            detail,
            f"{tensor['bytes']:,}",
            f"{tensor['bits_per_parameter']:.3f}",
            f"{tensor['relative_error']:.4f}",
        )
    # A narrow terminal must not cut the names that a reader looks for.
    Console(width=max(200, Console().width)).print(table)


_COLUMNS = (
    ("tensor", "left"),
    ("kind", "left"),
    ("shape", "right"),
    ("codec", "left"),
    ("detail", "left"),
    ("bytes", "right"),
    ("bits/par.", "right"),
    ("error", "right"),
)


def verified(result: dict[str, Any], file: Path, target: str) -> None:
    """After `verify`."""
    more = ", every tensor decodes to finite weights" if result["decoded"] else ""
    line(
        f"{file}: sound (format {result['format_version']}, {result['tensors']} tensors, "
        f"{size(result['pack_bytes'])}), made for {target}{more}"
    )


def comparison(result: dict[str, Any], file: Path) -> None:
    """After `compare`."""
    line(
        f"{file}: {result['rows']} rows, {result['tokens']} tokens: "
        f"KL {result['kl_mean']:.5f} mean, {result['kl_p99']:.4f} at the 99th percentile, "
        f"top-1 agreement {100 * result['top1_agreement']:.2f} %"
    )
    if result["exact_match_tuned"] is None:
        return
    table = Table()
    for header in ("exact match", "target", "tuned", "target + pack", "recovered"):
        table.add_column(header, justify="right" if header != "exact match" else "left")
    recovered = result["recovered"]
    table.add_row(
        "",
        *(f"{result[f'exact_match_{who}']:.3f}" for who in ("target", "tuned", "packed")),
        "–" if recovered is None else f"{recovered:.3f}",
    )
    Console().print(table)


def merged(output: Path, count: int) -> None:
    """After `merge`."""
    line(f"{output}: target + {count} pack{'s' if count > 1 else ''}, an ordinary checkpoint")


def answers(found: list[dict[str, Any]]) -> None:
    """After `generate`: the text alone, or labelled where there are several."""
    for answer in found:
        text = answer["text"] if len(found) == 1 else f"[{answer['pack']}] {answer['text']}"
        print(printable(text, keep="\n\t"))


def _kinds(tensors: list[dict[str, Any]]) -> Table:
    """Tensors summed by kind and codec."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tensor in tensors:
        groups.setdefault((tensor["kind"], tensor["codec"]), []).append(tensor)
    table = Table()
    for header in ("kind", "codec", "tensors", "bytes", "mean error"):
        table.add_column(header, justify="left" if header in ("kind", "codec") else "right")
    for (kind, codec), members in sorted(groups.items()):
        error = sum(tensor["relative_error"] for tensor in members) / len(members)
        size = sum(tensor["bytes"] for tensor in members)
        table.add_row(kind, codec, str(len(members)), f"{size:,}", f"{error:.3f}")
    return table


def _detail(tensor: dict[str, Any]) -> str:
    if "kept" in tensor:
        return f"{tensor['kept']:,} kept, {tensor['positions']}"
    if tensor.get("coded"):
        return f"rank {tensor['rank']}, coded" if tensor["rank"] is not None else "coded"
    if "dtypes" in tensor:
        return f"rank {tensor['rank']}, {', '.join(tensor['dtypes'])}"
    return f"{tensor['bits']} bits" if "bits" in tensor else ""


def size(count: int) -> str:
    """Decimal units, as in budgets."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
