"""`graftkit library`: a folder of packs of one target, with a router."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import show

if TYPE_CHECKING:
    from graftkit.library import Library, PackEntry
    from graftkit.rows import Row

app = typer.Typer(
    no_args_is_help=True,
    help="Keep packs of one target in a folder, and route prompts to them.",
    rich_markup_mode=None,
)

LibraryFolder = Annotated[Path, typer.Argument(help="The library's folder.")]
Address = Annotated[str, typer.Argument(help="NAME, NAME@VERSION or the start of a digest.")]
Name = Annotated[str, typer.Option("--name", help="Name of the pack.")]
AsUpdate = Annotated[bool, typer.Option("--update", help="Add it as the next version of NAME.")]
RouterOption = Annotated[str, typer.Option(help="keys, spectral or classifier.")]
NamedRows = Annotated[
    list[str],
    typer.Option("--rows", help="NAME=ROWS, once per pack; target=ROWS for no pack."),
]


@app.command()
def init(
    folder: LibraryFolder,
    target: Annotated[
        str, typer.Option("--target", help="A Hugging Face directory or Hub id[@rev].")
    ],
    json_output: show.Json = False,
) -> None:
    """Make an empty library for a target."""
    from graftkit.library import Library

    library = Library.init(folder, target)
    result = {"library": str(folder), "target": library.index.target.model_dump()}
    show.json_or(json_output, result, lambda: show.line(f"{folder}: an empty library for {target}"))


@app.command()
def add(
    folder: LibraryFolder,
    file: Annotated[Path, typer.Argument(help="A .skillpack file.")],
    name: Name,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Rows with 20 or more prompts that the pack should answer."),
    ] = None,
    update: AsUpdate = False,
    json_output: show.Json = False,
) -> None:
    """Copy a pack into the library."""
    from graftkit.library import Library
    from graftkit.rows import read_prompts

    texts = None if prompts is None else read_prompts(prompts)
    entry = Library.open(folder).add(file, name, texts, update)
    show.json_or(json_output, _entry(entry), lambda: _print_added(entry))


@app.command()
def remove(folder: LibraryFolder, name: Address, json_output: show.Json = False) -> None:
    """Delete packs from the library.

    NAME stands for all of its versions, NAME@VERSION or a digest for one pack.
    """
    from graftkit.library import Library

    library = Library.open(folder)
    gone = library.remove(name)
    remains = [str(place) for place in library.remains(gone[0].name)]
    result = {"removed": [_entry(entry) for entry in gone], "remains": remains}
    show.json_or(json_output, result, lambda: _print_removed(gone, remains))


@app.command("list")
def list_(folder: LibraryFolder, json_output: show.Json = False) -> None:
    """List the packs of a library."""
    from graftkit.library import Library

    index = Library.open(folder).index
    result = {
        "target": index.target.model_dump(),
        "packs": [_entry(entry) for entry in index.pack],
    }
    show.json_or(json_output, result, lambda: _print_list(index.target.reference, index.pack))


@app.command()
def route(
    folder: LibraryFolder,
    rows: Annotated[Path, typer.Option("--rows", help="Rows with the prompts to route.")],
    router: RouterOption = "keys",
    json_output: show.Json = False,
) -> None:
    """Show which pack, or the target, should answer each prompt."""
    from graftkit.rows import read_prompts

    prompts = read_prompts(rows)
    library = _open_to_route(folder, router)
    routes = library.route(prompts, router)  # type: ignore[arg-type]
    result = [{"route": each.name, "scores": each.scores} for each in routes]
    show.json_or(json_output, result, lambda: _print_routes(prompts, result))


@app.command()
def evaluate(
    folder: LibraryFolder,
    rows: NamedRows,
    router: RouterOption = "keys",
    json_output: show.Json = False,
) -> None:
    """Compare routed answers with those of the right packs.

    Shows the exact match of the routed packs, of the right packs (oracle) and of the target, and
    where the rows of each pack were routed.
    """
    named = _read_named(rows)
    library = _open_to_route(folder, router)
    with show.progress() as report:
        score = library.evaluate(named, router, report)  # type: ignore[arg-type]
    result = score.numbers() | {"router": router}
    show.json_or(json_output, result, lambda: _print_scores(result))


@app.command()
def learn(
    folder: LibraryFolder,
    config: Annotated[Path, typer.Argument(help="A configuration of graftkit distill.")],
    name: Name,
    update: AsUpdate = False,
    json_output: show.Json = False,
) -> None:
    """Distil a skill and add its pack.

    If it is interrupted, run the same command again. The other packs do not change.
    """
    from graftkit.library import Library

    with show.progress() as report:
        entry = Library.open(folder).learn(config, name, update, report)
    show.json_or(json_output, _entry(entry), lambda: _print_added(entry))


@app.command()
def audit(
    folder: LibraryFolder,
    name: Address,
    prove: Annotated[
        Path | None,
        typer.Option(help="Rows: prove on their prompts that removal is complete."),
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Show what a pack changes, and which other packs are similar."""
    from graftkit.library import Library
    from graftkit.rows import read_prompts

    library = Library.open(folder)
    own = library.index.find(name)
    with show.progress() as report:
        result: dict[str, Any] = {"pack": _entry(own)} | library.audit(name, report).numbers()
    result["remains"] = [str(place) for place in library.remains(own.name)]
    if prove is not None:
        result["proof"] = library.prove_removal(name, read_prompts(prove)).numbers()
    show.json_or(json_output, result, lambda: _print_audit(result))


@app.command()
def train_router(folder: LibraryFolder, rows: NamedRows, json_output: show.Json = False) -> None:
    """Train the router `classifier` on held-out rows.

    It needs rows of every pack, and rows of no pack under the name target.
    """
    from graftkit.library import Library

    library = Library.open(folder)
    library.train_router(_read_named(rows))
    result = {"library": str(folder), "packs": list(library.index.newest)}
    show.json_or(
        json_output, result, lambda: show.line(f"{folder}: the router classifier is trained")
    )


def _open_to_route(folder: Path, router: str) -> "Library":
    """Open a library, and warn on stderr about packs that the router cannot choose."""
    from graftkit.library import Library

    library = Library.open(folder)
    keyless = [name for name, entry in library.index.newest.items() if not entry.has_key]
    if router == "keys":
        lines = library.routing_warnings()
        if keyless:
            lines.insert(
                0,
                f"{', '.join(keyless)} without a router key, so never chosen; add again with "
                "--prompts and --update",
            )
        for line in lines:
            show.line(f"graftkit: {line}", error=True)
    return library


def _read_named(named: list[str]) -> dict[str, tuple["Row", ...]]:
    """Rows by name. Raises: ConfigError, RowsError."""
    from graftkit.errors import ConfigError
    from graftkit.rows import read_rows

    rows: dict[str, tuple[Row, ...]] = {}
    for text in named:
        name, separator, path = text.partition("=")
        if not name or not separator or not path:
            raise ConfigError(f"--rows {text!r} is not NAME=FILE; write --rows math=rows.jsonl")
        rows[name] = rows.get(name, ()) + read_rows(path)
    return rows


def _entry(entry: "PackEntry") -> dict[str, Any]:
    return entry.model_dump(mode="json")


def _print_added(entry: "PackEntry") -> None:
    key = "with a router key" if entry.has_key else "without a router key (--prompts gives it one)"
    show.line(f"{entry.label}: {show.size(entry.bytes)}, digest {entry.digest[:12]}, {key}")


def _print_removed(gone: "list[PackEntry]", remains: list[str]) -> None:
    show.line(f"removed {', '.join(entry.label for entry in gone)}")
    for place in remains:
        show.line(f"{place}: the answers and the tuned model it was made from are still here")


def _print_list(target: str, packs: "tuple[PackEntry, ...]") -> None:
    show.line(f"target {target}")
    table = show.Table("pack", "size", "digest", "added", "router key", right=("size",))
    for entry in packs:
        added = f"{entry.added:%Y-%m-%d %H:%M}"
        key = "yes" if entry.has_key else "no"
        table.add_row(entry.label, show.size(entry.bytes), entry.digest[:12], added, key)
    table.show()


def _print_routes(prompts: Sequence[str], routes: list[dict[str, Any]]) -> None:
    table = show.Table("route", "scores", "prompt", whole=True)
    for prompt, routed in zip(prompts, routes, strict=True):
        best = sorted(routed["scores"].items(), key=lambda score: -score[1])[:3]
        scores = ", ".join(f"{name} {value:.2f}" for name, value in best)
        table.add_row(routed["route"], scores, " ".join(prompt.split())[:60])
    table.show()


def _print_scores(result: dict[str, Any]) -> None:
    columns = ("rows", "routed right", "95 %", "routed", "oracle", "target", "regret")
    table = show.Table("rows of", *columns, "routed to", right=columns)
    for name, score in result["skills"].items():
        routed = ", ".join(f"{where} {count}" for where, count in result["confusion"][name].items())
        low, high = score["interval"]
        shares = [f"{score[key]:.3f}" for key in columns[3:]]
        right = (f"{score['accuracy']:.3f}", f"{low:.3f}–{high:.3f}")
        table.add_row(name, str(score["rows"]), *right, *shares, routed)
    table.show()
    foreign = result["false_acceptance"]
    accepted = (
        "" if foreign is None else f", {100 * foreign:.1f} % of the rows of no pack accepted by one"
    )
    show.line(
        f"{100 * result['accuracy']:.1f} % of the rows routed right{accepted}, "
        f"{result['milliseconds_per_prompt']:.1f} ms a prompt"
    )


def _print_audit(result: dict[str, Any]) -> None:
    pack = result["pack"]
    show.line(f"{pack['name']}@{pack['version']}: {show.size(pack['bytes'])}")
    columns = ("tensors", "weights", "changed", "energy", "relative norm")
    table = show.Table("where", *columns, right=columns)
    for kind, change in result["kinds"].items():
        table.add_row(kind, *_change(change))
    for layer, change in result["layers"].items():
        table.add_row(f"layer {layer}" if layer else "outside layers", *_change(change))
    table.show()
    for name, rows in result["vocabulary"].items():
        show.line(
            f"{name}: {rows['moved']} of {rows['rows']} rows move, {rows['most']} of them hold "
            "90 % of the energy"
        )
    numbers = ("cosine", "top 10 % shared")
    overlaps = show.Table("other pack", *numbers, right=numbers)
    for label, overlap in result["leans"].items():
        name = f"{label} (fused from this pack)" if overlap["contains"] else label
        overlaps.add_row(name, show.number(overlap["cosine"]), show.number(overlap["top_overlap"]))
    if result["leans"]:
        overlaps.show()
    for place in result["remains"]:
        show.line(f"{place}: remains when the pack is removed")
    if "proof" in result:
        _print_proof(result["proof"])


def _print_proof(proof: dict[str, Any]) -> None:
    parts = ("files", "routes", "logits", "tokens")
    equal = [part for part in parts if proof[part]]
    different = [part for part in parts if not proof[part]]
    show.line(
        f"after removal, on {show.count(proof['prompts'], 'prompt')} (the pack changed the logits "
        f"of {proof['changed_by_pack']}): {', '.join(equal) or 'nothing'} equal to those of a "
        "library that never had it, bit for bit"
        + (f"; NOT equal: {', '.join(different)}" if different else "")
    )


def _change(change: dict[str, Any]) -> list[str]:
    return [
        str(change["tensors"]),
        f"{change['parameters']:,}",
        f"{change['moved']:,}",
        f"{100 * change['energy_share']:.2f} %",
        show.number(change["relative_norm"]),
    ]
