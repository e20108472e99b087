"""`graftkit library`: packs of one target in a folder. Commands, and what a person sees of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from graftkit.cli import show

if TYPE_CHECKING:
    from graftkit.library import Library, PackEntry
    from graftkit.rows import Row

app = typer.Typer(
    no_args_is_help=True, help="Packs of one target in a folder, and who answers what."
)

Folder = Annotated[Path, typer.Argument(help="The library's folder.")]
Address = Annotated[str, typer.Argument(help="NAME, NAME@VERSION or a digest's first digits.")]
Name = Annotated[str, typer.Option("--name", help="What the pack is called.")]
Update = Annotated[bool, typer.Option("--update", help="Make it the next version of its name.")]
RouterOption = Annotated[str, typer.Option(help="centroid, spectral or classifier.")]
NamedRows = Annotated[
    list[str],
    typer.Option("--rows", help="NAME=rows.jsonl, once per pack; target=rows.jsonl for no pack."),
]


@app.command()
def init(
    folder: Folder,
    target: Annotated[str, typer.Option("--target", help="Directory or Hub id[@revision].")],
    json_output: show.Json = False,
) -> None:
    """Make an empty library for a target."""
    from graftkit.library import Library

    library = Library.init(folder, target)
    result = {"library": str(folder), "target": library.index.target.model_dump()}
    show.json_or(json_output, result, lambda: show.line(f"{folder}: an empty library for {target}"))


@app.command()
def add(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="A .skillpack file.")],
    name: Name,
    prompts: Annotated[
        Path | None,
        typer.Option(help="rows.jsonl: 20 or more prompts that the pack should answer."),
    ] = None,
    update: Update = False,
    json_output: show.Json = False,
) -> None:
    """Copy a pack into the library."""
    from graftkit.library import Library
    from graftkit.rows import read_prompts

    texts = None if prompts is None else read_prompts(prompts)
    entry = Library.open(folder).add(file, name, texts, update)
    show.json_or(json_output, _entry(entry), lambda: _print_added(entry))


@app.command()
def remove(folder: Folder, name: Address, json_output: show.Json = False) -> None:
    """Delete a pack: every version of NAME, or the one that NAME@VERSION or a digest says."""
    from graftkit.library import Library

    library = Library.open(folder)
    gone = library.remove(name)
    remains = [str(place) for place in library.remains(gone[0].name)]
    result = {"removed": [_entry(entry) for entry in gone], "remains": remains}
    show.json_or(json_output, result, lambda: _print_removed(gone, remains))


@app.command("list")
def list_(folder: Folder, json_output: show.Json = False) -> None:
    """What a library holds."""
    from graftkit.library import Library

    index = Library.open(folder).index
    result = {
        "target": index.target.model_dump(),
        "packs": [_entry(entry) for entry in index.pack],
    }
    show.json_or(json_output, result, lambda: _print_list(index.target.reference, index.pack))


@app.command()
def route(
    folder: Folder,
    rows: Annotated[Path, typer.Option("--rows", help="rows.jsonl; its prompts are routed.")],
    router: RouterOption = "centroid",
    json_output: show.Json = False,
) -> None:
    """Which pack should answer each prompt, or the target."""
    from graftkit.rows import read_prompts

    library = _open_to_route(folder, router)
    prompts = read_prompts(rows)
    routes = library.route(prompts, router)  # type: ignore[arg-type]
    result = [{"route": found.name, "scores": found.scores} for found in routes]
    show.json_or(json_output, result, lambda: _print_routes(prompts, result))


@app.command()
def evaluate(
    folder: Folder,
    rows: NamedRows,
    router: RouterOption = "centroid",
    json_output: show.Json = False,
) -> None:
    """Exact match of routed answers, of the right packs, and of the target; who took whose rows."""
    library = _open_to_route(folder, router)
    given = _read_named(rows)
    with show.progress() as report:
        found = library.evaluate(given, router, report)  # type: ignore[arg-type]
    result = found.numbers() | {"router": router}
    show.json_or(json_output, result, lambda: _print_scores(result))


@app.command()
def learn(
    folder: Folder,
    config: Annotated[Path, typer.Argument(help="A configuration of graftkit distill.")],
    name: Name,
    update: Update = False,
    json_output: show.Json = False,
) -> None:
    """Distil a skill and add its pack; the other packs stay as they are.

    Interrupted, the same command goes on where it stopped.
    """
    from graftkit.library import Library

    with show.progress() as report:
        entry = Library.open(folder).learn(config, name, update, report)
    show.json_or(json_output, _entry(entry), lambda: _print_added(entry))


@app.command()
def audit(
    folder: Folder,
    name: Address,
    prove: Annotated[
        Path | None,
        typer.Option(help="rows.jsonl: show on its prompts that removing the pack leaves nothing."),
    ] = None,
    json_output: show.Json = False,
) -> None:
    """What a pack changes, which others lean the same way, and what removing it leaves."""
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
def train_router(folder: Folder, rows: NamedRows, json_output: show.Json = False) -> None:
    """Train the router `classifier` on held-out rows of every pack, and of none."""
    from graftkit.library import Library

    library = Library.open(folder)
    library.train_router(_read_named(rows))
    result = {"library": str(folder), "packs": list(library.index.newest)}
    show.json_or(
        json_output, result, lambda: show.line(f"{folder}: the router classifier is trained")
    )


def _open_to_route(folder: Path, router: str) -> "Library":
    """A library, and a word on stderr about packs that the router cannot choose."""
    from graftkit.library import Library

    library = Library.open(folder)
    keyless = [name for name, entry in library.index.newest.items() if not entry.has_key]
    if router == "centroid" and keyless:
        show.line(
            f"graftkit: {', '.join(keyless)} without a router key, never chosen; add with "
            "--prompts and --update",
            error=True,
        )
    return library


def _read_named(named: list[str]) -> dict[str, tuple["Row", ...]]:
    """Rows by name. Raises: ConfigError, RowsError."""
    from graftkit.errors import ConfigError
    from graftkit.rows import read_rows

    given: dict[str, tuple[Row, ...]] = {}
    for text in named:
        name, separator, path = text.partition("=")
        if not name or not separator or not path:
            raise ConfigError(f"--rows {text!r} is not NAME=FILE; write --rows math=rows.jsonl")
        given[name] = given.get(name, ()) + read_rows(path)
    return given


def _entry(entry: "PackEntry") -> dict[str, Any]:
    return entry.model_dump(mode="json")


def _print_added(entry: "PackEntry") -> None:
    told = "with a router key" if entry.has_key else "without a router key (--prompts gives it one)"
    show.line(f"{entry.label}: {show.size(entry.bytes)}, digest {entry.digest[:12]}, {told}")


def _print_removed(gone: "list[PackEntry]", remains: list[str]) -> None:
    show.line(f"removed {', '.join(entry.label for entry in gone)}")
    for place in remains:
        show.line(f"{place}: the answers and the tuned model it was made from are still here")


def _print_list(target: str, packs: "tuple[PackEntry, ...]") -> None:
    show.line(f"target {target}")
    table = _table("pack", "size", "digest", "added", "router key", right=("size",))
    for entry in packs:
        added = f"{entry.added:%Y-%m-%d %H:%M}"
        key = "yes" if entry.has_key else "no"
        table.add_row(entry.label, show.size(entry.bytes), entry.digest[:12], added, key)
    Console().print(table)


def _print_routes(prompts: Sequence[str], routes: list[dict[str, Any]]) -> None:
    table = _table("route", "scores", "prompt")
    for prompt, found in zip(prompts, routes, strict=True):
        best = sorted(found["scores"].items(), key=lambda score: -score[1])[:3]
        scores = ", ".join(f"{name} {value:.2f}" for name, value in best)
        table.add_row(found["route"], scores, " ".join(prompt.split())[:60])
    Console().print(table)


def _print_scores(result: dict[str, Any]) -> None:
    columns = ("rows", "routed right", "routed", "oracle", "target", "regret")
    table = _table("rows of", *columns, "went to", right=columns)
    for name, score in result["skills"].items():
        went = ", ".join(f"{where} {count}" for where, count in result["confusion"][name].items())
        shares = [f"{score[key]:.3f}" for key in ("accuracy", *columns[2:])]
        table.add_row(name, str(score["rows"]), *shares, went)
    Console().print(table)
    foreign = result["false_acceptance"]
    told = "" if foreign is None else f", {100 * foreign:.1f} % of foreign rows accepted"
    show.line(
        f"{100 * result['accuracy']:.1f} % of the rows routed right{told}, "
        f"{result['milliseconds_per_prompt']:.1f} ms a prompt"
    )


def _print_audit(result: dict[str, Any]) -> None:
    pack = result["pack"]
    show.line(f"{pack['name']}@{pack['version']}: {show.size(pack['bytes'])}")
    columns = ("tensors", "weights", "changed", "energy", "relative norm")
    table = _table("where", *columns, right=columns)
    for kind, change in result["kinds"].items():
        table.add_row(kind, *_change(change))
    for layer, change in result["layers"].items():
        table.add_row(f"layer {layer}" if layer else "outside of layers", *_change(change))
    Console().print(table)
    for name, rows in result["vocabulary"].items():
        show.line(
            f"{name}: {rows['moved']} of {rows['rows']} rows move, {rows['most']} of them hold "
            "90 % of the energy"
        )
    leans = _table("other pack", "cosine", "largest tenth shared", right=("cosine",))
    for label, lean in result["leans"].items():
        told = f"{label} (fused from this pack)" if lean["contains"] else label
        leans.add_row(told, _number(lean["cosine"]), _number(lean["top_overlap"]))
    if result["leans"]:
        Console().print(leans)
    for place in result["remains"]:
        show.line(f"{place}: stays when the pack is removed")
    if "proof" in result:
        _print_proof(result["proof"])


def _print_proof(proof: dict[str, Any]) -> None:
    same = [what for what in ("files", "routes", "logits", "tokens") if proof[what]]
    show.line(
        f"without the pack, on {proof['prompts']} prompts ({proof['changed_by_pack']} of them "
        f"answered otherwise by it): {', '.join(same) or 'nothing'} equal to those of a library "
        f"that never had it, bit for bit{'' if proof['holds'] else '; the rest is NOT'}"
    )


def _change(change: dict[str, Any]) -> list[str]:
    return [
        str(change["tensors"]),
        f"{change['parameters']:,}",
        f"{change['moved']:,}",
        f"{100 * change['energy_share']:.2f} %",
        _number(change["relative_norm"]),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(*headers: str, right: tuple[str, ...] = ()) -> show.Table:
    table = show.Table()
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left")
    return table
