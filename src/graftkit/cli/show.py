"""What all commands share: options, one-line messages, tables, JSON, and progress on stderr."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from graftkit.errors import printable
from graftkit.progress import Progress

Target = Annotated[str, typer.Argument(help="Target: a Hugging Face directory or Hub id[@rev].")]
Tuned = Annotated[str, typer.Argument(help="Tuned model: a directory or Hub id[@rev].")]
PackFile = Annotated[Path, typer.Argument(help="A .skillpack file.")]
PackOutput = Annotated[Path, typer.Option("-o", "--output", help="The .skillpack file to write.")]
FolderOutput = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
Budget = Annotated[
    str | None,
    typer.Option(help="Largest file: 5%, 12MB or 1.0bpp. Default 5%; lossless: none."),
]
Recipe = Annotated[str, typer.Option(help="auto, graftllm (the paper's method) or lossless.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Rows (docs/rows.md) of the task to measure activations on, or self: rows that the "
        "two models write. Default: use no data."
    ),
]
MadeFor = Annotated[str, typer.Option("--target", help="The target that the pack was made for.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

WIDE = 200
"""Columns of a table whose names must not be cut on a narrow terminal."""


def line(text: str, *, error: bool = False) -> None:
    """One line on stdout, or on stderr; control characters in it are escaped."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def paragraph(text: str) -> None:
    """Text on stdout with its own line breaks and tabs; other control characters are escaped."""
    print(printable(text, keep="\n\t"), flush=True)


class Table(RichTable):
    """A table without borders. Cells are shown as they are: brackets are no markup.

    Args:
        headers: of the columns. right: those whose cells are aligned right.
        whole: no cell is wrapped; `show` then takes as much width as the cells need.
    """

    def __init__(self, *headers: str, right: tuple[str, ...] = (), whole: bool = False):
        super().__init__(box=None, header_style="bold", pad_edge=False)
        self._whole = whole
        for header in headers:
            justify: Any = "right" if header in right else "left"
            self.add_column(header, justify=justify, no_wrap=whole)

    def add_row(self, *cells: Any, **style: Any) -> None:
        """One row of texts."""
        super().add_row(*(Text(printable(str(cell))) for cell in cells), **style)

    def show(self) -> None:
        """Print it on stdout."""
        console = Console()
        if self._whole:
            console = Console(width=max(WIDE, console.width))
        console.print(self)


def json_or(
    as_json: bool, result: dict[str, Any] | list[Any], otherwise: Callable[[], None]
) -> None:
    """Print one JSON value, or call `otherwise`, which prints for people."""
    if as_json:
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
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as ProgressBar

    bar = ProgressBar(
        TextColumn("{task.description:>20}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    tasks: dict[str, Any] = {}

    def report(step: str, done: int, total: int) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(printable(step), total=total)
        bar.update(tasks[step], completed=done, total=total)

    with bar:
        yield report


def size(count: int) -> str:
    """Bytes in decimal units, as in budgets."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def number(value: float | None) -> str:
    """Three decimals, or a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def count(number: int, thing: str, things: str | None = None) -> str:
    """`1 pack`, `2 packs`; `things` is an irregular plural."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
