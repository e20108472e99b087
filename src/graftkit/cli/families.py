"""`graftkit family`: several packs of one target as one file. Commands, and what is shown."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graftkit.cli import show

app = typer.Typer(
    no_args_is_help=True, help="Several packs as one file: a shared part, a private one for each."
)

FamilyFile = Annotated[Path, typer.Argument(help="A .skillfamily file.")]


@app.command()
def make(
    target: Annotated[str, typer.Argument(help="Target: directory or Hub id[@revision].")],
    files: Annotated[list[Path], typer.Argument(help="Two or more packs of this target.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .skillfamily to write.")],
    method: Annotated[
        str, typer.Option(help="emr, tall (shared part and masks) or twin (and packed rests).")
    ],
    budget: Annotated[
        str | None, typer.Option(help="Largest file, as in pack. Default 10% for every pack.")
    ] = None,
    scaling: Annotated[
        float | None,
        typer.Option(help="Shared part = this times the sum. tall: 1; twin: 1 / packs."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="tall: larger masks keep fewer entries. Default 0.4.")
    ] = None,
    names: Annotated[
        str | None, typer.Option(help="Names of the skills, a,b,... Default: the files' names.")
    ] = None,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Write several packs of one target as one file."""
    from graftkit.fuse.family_making import make_family

    settings = {"scaling": scaling, "threshold": threshold}
    given = {name: value for name, value in settings.items() if value is not None}
    called = None if names is None else names.split(",")
    with show.progress() as report:
        family = make_family(target, files, output, method, given, budget, called, report, force)
    result = {"output": str(output)} | family.summary()
    show.json_or(json_output, result, lambda: _print_family(result, output))


@app.command()
def inspect(file: FamilyFile, json_output: show.Json = False) -> None:
    """What a family holds. Needs no model."""
    from graftkit.fuse.family import Family

    result = Family.open(file).summary()
    show.json_or(json_output, result, lambda: _print_family(result, file))


@app.command()
def unfold(
    file: FamilyFile,
    skill: Annotated[str, typer.Option("--skill", help="Name of the skill.")],
    target: Annotated[str, typer.Option("--target", help="The target of the family.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .skillpack to write.")],
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Write one skill as an ordinary lossless pack, which every other command takes."""
    from graftkit.fuse.family import Family
    from graftkit.outputs import claimed

    job = ["unfold", file, skill, target]
    with (
        show.progress() as report,
        claimed(output, job, inputs=[file, target], force=force) as claim,
    ):
        Family.open(file).pack(skill, target, report, claim.open_work()).save(claim.result)
    result = {"output": str(output), "skill": skill, "pack_bytes": output.stat().st_size}
    show.json_or(json_output, result, lambda: _print_unfolded(result))


def _print_family(result: dict[str, Any], file: Path) -> None:
    manifest = result["manifest"]
    settings = "".join(f", {name} {value:g}" for name, value in manifest["settings"].items())
    show.line(
        f"{file}: {manifest['method']}{settings}, {show.size(result['bytes'])}, "
        f"{100 * result['ratio']:.2f} % of the target {manifest['target']['name']}"
    )
    table = show.Table()
    for header in ("part", "bytes", "error", "pack"):
        table.add_column(header, justify="right" if header in ("bytes", "error") else "left")
    table.add_row("shared", f"{result['shared_bytes']:,}", "", "")
    for skill in result["skills"]:
        pack = f"{skill['tuned']['name']}, digest {skill['pack_blake3'][:12]}"
        table.add_row(skill["name"], f"{skill['bytes']:,}", f"{skill['error']:.3f}", pack)
    Console().print(table)


def _print_unfolded(result: dict[str, Any]) -> None:
    show.line(f"{result['output']}: {result['skill']}, {show.size(result['pack_bytes'])}, lossless")
