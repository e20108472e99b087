"""The command line: one file for each group of commands, with options, call and printed output.

packing     pack, inspect, verify, compare, import-lora, export
fusing      merge, fuse, interference
generating  generate
serving     serve
distilling  distill
library     library init, add, remove, list, route, evaluate, learn, audit, train-router
vision      vision graft, predict
show        what they share: options, tables, progress

Heavy libraries are imported inside the functions, so that `--help` and wrong options answer at
once.
"""

from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli import distilling, fusing, generating, library, packing, serving, show, vision

app = typer.Typer(
    name="graftkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # square brackets of the help are square brackets
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from graftkit.config import VERSION

        show.line(f"graftkit {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compress what a fine-tune learned into one small file, and attach it to the target."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for packs and results.")] = Path(
        "graftkit-demo"
    ),
    real: Annotated[
        Path | None,
        typer.Option(help="Folder of packs for a real chat model, which comes from PyPI (93 MB)."),
    ] = None,
) -> None:
    """Pack, attach and mix three built-in skills, offline.

    Every step says what it does; the packs and the numbers stay in the folder.
    """
    if real is not None:
        from graftkit.demo.real import run_real_demo

        run_real_demo(out, real)
        return
    from graftkit.demo import run_demo

    run_demo(out)


for group in (packing, fusing, generating, serving, distilling):
    app.add_typer(group.app)
app.add_typer(library.app, name="library")
app.add_typer(vision.app, name="vision")
