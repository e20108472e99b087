"""`graftkit merge`, `fuse` and `interference`: several packs of one target."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import show
from graftkit.progress import Progress

if TYPE_CHECKING:
    from graftkit.fuse.interference import PackPair

app = typer.Typer()

# How packs are combined; `merge` and `fuse` take the same options.
PackFiles = Annotated[list[Path], typer.Argument(help="One or more packs of this target.")]
Weights = Annotated[
    str | None, typer.Option(help="One weight per pack, such as 1,0.5. Default: all 1.")
]
MergeMethod = Annotated[
    str,
    typer.Option(
        help="linear, task_arithmetic, ties, dare, dare_ties, sce, pcb; one by one: opcm, kif."
    ),
]
Lambda = Annotated[
    float | None, typer.Option("--lambda", help="Factor on the merged delta. Default 1.")
]
Density = Annotated[
    float | None,
    typer.Option(help="Share of entries kept. Default 0.2 for ties, 0.5 for dare, dare_ties."),
]
Search = Annotated[
    Path | None, typer.Option(help="Rows: search for the weights that fit them best.")
]
State = Annotated[
    Path | None,
    typer.Option(help="opcm, kif: file that carries the state from run to run."),
]
RowsOfTasks = Annotated[
    list[Path] | None,
    typer.Option("--rows", help="kif: rows of each pack's task; repeat for every pack."),
]


@app.command()
def merge(
    target: show.Target,
    files: PackFiles,
    output: show.FolderOutput,
    weights: Weights = None,
    method: MergeMethod = "task_arithmetic",
    scaling: Lambda = None,
    density: Density = None,
    search: Search = None,
    state: State = None,
    task_rows: RowsOfTasks = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Also copy the target's files of code.")
    ] = False,
    json_output: show.Json = False,
) -> None:
    """Write target + packs as an ordinary Hugging Face checkpoint.

    The target's other files, such as the tokenizer, are copied; files of code are not.
    """
    from graftkit.checkpoint import Checkpoint
    from graftkit.fuse.merge import merge_packs
    from graftkit.fuse.methods import IN_TURN
    from graftkit.fuse.sequential import merge_in_turn
    from graftkit.model_files import code_names
    from graftkit.outputs import check_output

    choice = _read_method(method, weights, state, task_rows, scaling, density)
    check_output(output, folder=True, inputs=[target, *files, *_side_inputs(search, state)])
    with show.progress() as report:
        searched = _search_weights(target, files, choice, search, report)
        run = merge_in_turn if method in IN_TURN else merge_packs
        run(
            target,
            files,
            output,
            progress=report,
            trust_remote_code=trust_remote_code,
            **choice,
        )
    left_out = [] if trust_remote_code else code_names(Checkpoint.open(target).path)
    result = _describe(output, files, choice) | searched | {"left_out": left_out}
    show.json_or(json_output, result, lambda: _print_merged(result))


def _print_merged(result: dict[str, Any]) -> None:
    _print_search(result)
    packs = show.count(len(result["packs"]), "pack")
    show.line(f"{result['output']}: target + {packs}, an ordinary checkpoint")
    if result["left_out"]:
        show.line(f"without {', '.join(result['left_out'])}: --trust-remote-code copies code, too")


@app.command()
def fuse(
    target: show.Target,
    files: PackFiles,
    output: show.PackOutput,
    weights: Weights = None,
    method: MergeMethod = "task_arithmetic",
    scaling: Lambda = None,
    density: Density = None,
    search: Search = None,
    state: State = None,
    task_rows: RowsOfTasks = None,
    budget: show.Budget = None,
    recipe: show.Recipe = "auto",
    calibration: show.Calibration = None,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Make one pack of several packs of one target."""
    from graftkit.fuse.merge import fuse_packs
    from graftkit.fuse.methods import IN_TURN
    from graftkit.fuse.sequential import fuse_in_turn
    from graftkit.outputs import check_output
    from graftkit.skillpack.pack import pack_summary

    choice = _read_method(method, weights, state, task_rows, scaling, density)
    check_output(output, inputs=[target, *files, *_side_inputs(search, state)], force=force)
    with show.progress() as report:
        searched = _search_weights(target, files, choice, search, report)
        run = fuse_in_turn if method in IN_TURN else fuse_packs
        pack = run(
            target,
            files,
            output,
            progress=report,
            budget=budget,
            recipe=recipe,
            calibration=calibration,
            force=force,
            **choice,
        )
    summary = pack_summary(pack) | {"pack_bytes": output.stat().st_size}
    result = _describe(output, files, choice) | searched | summary
    show.json_or(json_output, result, lambda: _print_fused(result))


def _print_fused(result: dict[str, Any]) -> None:
    _print_search(result)
    count = len(result["packs"])
    made = f"{count} packs in one" if result.get("state") is None else f"{count} more in one pack"
    show.line(
        f"{result['output']}: {made}, "
        f"{show.size(result['pack_bytes'])}, {100 * result['ratio']:.2f} % of the target"
    )


def _read_method(
    method: str,
    weights: str | None,
    state: Path | None,
    task_rows: list[Path] | None,
    scaling: float | None,
    density: float | None,
) -> dict[str, Any]:
    """The arguments of `merge_packs`, or of `merge_in_turn` for a method that takes packs in turn.

    Raises: ConfigError for options of another method; RowsError.
    """
    from graftkit.errors import ConfigError
    from graftkit.fuse.methods import IN_TURN
    from graftkit.rows import read_rows

    options = {"scaling": scaling, "density": density}
    settings = {name: value for name, value in options.items() if value is not None}
    if method not in IN_TURN:
        if state is not None or task_rows:
            raise ConfigError(f"--state and --rows go with {' and '.join(IN_TURN)}, not {method}")
        return {"method": method, "weights": _parse_weights(weights), "settings": settings}
    if weights is not None or settings:
        raise ConfigError(
            f"{method} takes packs in turn, without weights or settings; leave them out"
        )
    rows = [read_rows(file) for file in task_rows] if task_rows else None
    return {"method": method, "state": state, "rows": rows}


def _parse_weights(text: str | None) -> list[float] | None:
    """`1,0.5` as numbers. Raises: ConfigError."""
    from graftkit.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"weights {text!r} are not numbers; write one per pack, such as 1,0.5"
        ) from error


def _side_inputs(*files: Path | None) -> list[Path]:
    """Files beside target and packs that the output must not replace."""
    return [file for file in files if file is not None]


def _search_weights(
    target: str,
    files: list[Path],
    choice: dict[str, Any],
    rows: Path | None,
    report: Progress,
) -> dict[str, Any]:
    """Put the best weights for the rows into `choice`; without rows nothing is searched."""
    from graftkit.errors import ConfigError
    from graftkit.fuse.methods import IN_TURN
    from graftkit.fuse.search import search_weights
    from graftkit.rows import read_rows

    if rows is None:
        return {}
    if choice["method"] in IN_TURN:
        raise ConfigError(f"{choice['method']} has no weights to search; leave out --search")
    best = search_weights(target, files, read_rows(rows), progress=report, **choice)
    choice["weights"] = list(best.weights)
    choice["settings"] = choice["settings"] | {"scaling": best.scaling}
    losses = {"loss": best.loss, "loss_given": best.loss_given, "loss_target": best.loss_target}
    return {"search": losses | {"evaluations": best.evaluations, "rows": str(rows)}}


def _print_search(result: dict[str, Any]) -> None:
    if "search" not in result:
        return
    search, settings = result["search"], result["settings"]
    weights = ", ".join(f"{weight:.3f}" for weight in result["weights"])
    show.line(
        f"weights {weights}, lambda {settings['scaling']:.3f}: {search['loss']:.4f} nats per token "
        f"on the rows ({search['loss_given']:.4f} where the search began, "
        f"{search['loss_target']:.4f} with the target alone; {search['evaluations']} tries)"
    )


def _describe(output: Path, files: list[Path], choice: dict[str, Any]) -> dict[str, Any]:
    """Output, packs and method with all of its settings, as `--json` prints them."""
    from graftkit.fuse.methods import IN_TURN, check_weights, find_method

    result = {
        "output": str(output),
        "packs": [str(file) for file in files],
        "method": choice["method"],
    }
    if choice["method"] in IN_TURN:
        return result | {"state": None if choice["state"] is None else str(choice["state"])}
    method = find_method(choice["method"], choice["settings"])
    return result | {
        "weights": check_weights(method, choice["weights"], len(files)),
        "settings": method.model_dump(),
    }


@app.command()
def interference(
    target: show.Target,
    files: Annotated[list[Path], typer.Argument(help="Two or more packs of this target.")],
    figure: Annotated[
        Path | None, typer.Option(help="A PNG to draw (needs the extra report).")
    ] = None,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Measure how much packs of one target conflict.

    Shows the cosine, the sign conflicts and the shared large entries of every pair.
    """
    from graftkit.fuse.interference import draw_interference, measure_interference
    from graftkit.outputs import claimed

    names = _labels(files)
    inputs: list[str | Path] = [target, *files]
    with show.progress() as report:
        if figure is None:
            pairs = measure_interference(target, files, report)
        else:
            job = ["interference", *inputs]
            with claimed(figure, job, inputs=inputs, force=force) as claim:
                pairs = measure_interference(target, files, report)
                claim.open_work()
                draw_interference(pairs, names, claim.result)
    result = {
        "packs": [str(file) for file in files],
        "figure": None if figure is None else str(figure),
        "pairs": [_describe_pair(pair, names) for pair in pairs],
    }
    show.json_or(json_output, result, lambda: _print_interference(result))


def _labels(files: list[Path]) -> list[str]:
    """File names without their ending; whole paths where two are called alike."""
    counts = Counter(file.stem for file in files)
    return [file.stem if counts[file.stem] == 1 else str(file) for file in files]


def _describe_pair(pair: "PackPair", names: list[str]) -> dict[str, Any]:
    return {
        "packs": [names[pair.first], names[pair.second]],
        "total": pair.total.numbers(),
        "kinds": {kind: sums.numbers() for kind, sums in pair.by_kind().items()},
        "tensors": {name: sums.numbers() for name, sums in pair.tensors.items()},
    }


def _print_interference(result: dict[str, Any]) -> None:
    """One line for each pair, and one for each kind of module below it."""
    columns = ("cosine", "sign conflicts", "weighted", "top 10 % shared")
    table = show.Table("packs", "modules", *columns, right=columns, whole=True)
    for pair in result["pairs"]:
        table.add_row(" and ".join(pair["packs"]), "all", *map(show.number, pair["total"].values()))
        for kind, numbers in pair["kinds"].items():
            table.add_row("", kind, *map(show.number, numbers.values()))
    table.show()
    if result["figure"] is not None:
        show.line(f"{result['figure']}: every tensor of every pair")
