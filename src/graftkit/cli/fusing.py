"""Behind `merge`, `fuse` and `interference`: files, settings and numbers, and what is shown."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from graftkit.checkpoint import Checkpoint
from graftkit.cli import show
from graftkit.cli.packing import parse_weights
from graftkit.errors import ConfigError
from graftkit.fuse.interference import Pair, draw_interference, measure_interference
from graftkit.fuse.merge import fuse_packs, merge_packs
from graftkit.fuse.methods import IN_TURN, check_weights, find_method
from graftkit.fuse.search import search_weights
from graftkit.fuse.sequential import fuse_in_turn, merge_in_turn
from graftkit.outputs import check_output, claimed
from graftkit.progress import Progress
from graftkit.rows import read_rows
from graftkit.side_files import code_names
from graftkit.skillpack.pack import pack_summary


def merge_files(
    target: str,
    files: list[Path],
    output: Path,
    choice: dict[str, Any],
    search: Path | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge into a folder; `choice` is what `mixing` gives."""
    read = [file for file in (search, choice.get("state")) if file is not None]
    check_output(output, folder=True, inputs=[target, *files, *read])
    with show.progress() as report:
        found = _searched(target, files, choice, search, report)
        merge = merge_in_turn if choice["method"] in IN_TURN else merge_packs
        merge(
            target,
            files,
            output,
            progress=report,
            trust_remote_code=trust_remote_code,
            **choice,
        )
    left = [] if trust_remote_code else code_names(Checkpoint.open(target).path)
    return _result(output, files, choice) | found | {"left_out": left}


def fuse_files(
    target: str,
    files: list[Path],
    output: Path,
    choice: dict[str, Any],
    search: Path | None,
    **packing: Any,
) -> dict[str, Any]:
    """Fuse into one pack; `choice` is what `mixing` gives, `packing` goes to `fuse_packs`."""
    read = [file for file in (search, choice.get("state")) if file is not None]
    check_output(output, inputs=[target, *files, *read], force=packing.get("force", False))
    with show.progress() as report:
        found = _searched(target, files, choice, search, report)
        fuse = fuse_in_turn if choice["method"] in IN_TURN else fuse_packs
        pack = fuse(target, files, output, progress=report, **choice, **packing)
    summary = pack_summary(pack) | {"pack_bytes": output.stat().st_size}
    return _result(output, files, choice) | found | summary


def mixing(
    method: str,
    weights: str | None,
    state: Path | None,
    task_rows: list[Path] | None,
    **settings: Any,
) -> dict[str, Any]:
    """The method and what it takes, as `merge_packs` or `merge_in_turn` want it.

    Settings that are None were not given. Raises: ConfigError for options of another method;
    RowsError.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if method not in IN_TURN:
        if state is not None or task_rows:
            raise ConfigError(f"--state and --rows go with {' and '.join(IN_TURN)}, not {method}")
        return {"method": method, "weights": parse_weights(weights), "settings": given}
    if weights is not None or given:
        raise ConfigError(
            f"{method} takes packs in turn, without weights or settings; leave them out"
        )
    rows = [read_rows(file) for file in task_rows] if task_rows else None
    return {"method": method, "state": state, "rows": rows}


def interference_of(
    target: str, files: list[Path], figure: Path | None, force: bool
) -> dict[str, Any]:
    """Every pair of packs, by tensor, by kind and together; draws the figure where it is asked."""
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
    return {
        "packs": [str(file) for file in files],
        "figure": None if figure is None else str(figure),
        "pairs": [_numbers(pair, names) for pair in pairs],
    }


def print_merged(result: dict[str, Any]) -> None:
    """After `merge`."""
    _print_search(result)
    show.merged(Path(result["output"]), len(result["packs"]))
    if result["left_out"]:
        show.line(f"without {', '.join(result['left_out'])}: --trust-remote-code copies code, too")


def print_fused(result: dict[str, Any]) -> None:
    """After `fuse`."""
    _print_search(result)
    count = len(result["packs"])
    made = f"{count} packs in one" if result.get("state") is None else f"{count} more in one pack"
    show.line(
        f"{result['output']}: {made}, "
        f"{show.size(result['pack_bytes'])}, {100 * result['ratio']:.2f} % of the target"
    )


def print_interference(result: dict[str, Any]) -> None:
    """One line per pair, and one per kind of module below it."""
    table = show.Table()
    headers = ("packs", "modules", "cosine", "sign conflicts", "weighted", "top 10 % shared")
    for header in headers:
        table.add_column(header, justify="left" if header in headers[:2] else "right")
    for pair in result["pairs"]:
        table.add_row(" and ".join(pair["packs"]), "all", *_cells(pair["total"]))
        for kind, numbers in pair["kinds"].items():
            table.add_row("", kind, *_cells(numbers))
    Console().print(table)
    if result["figure"] is not None:
        show.line(f"{result['figure']}: every tensor of every pair")


def _searched(
    target: str,
    files: list[Path],
    choice: dict[str, Any],
    rows: Path | None,
    report: Progress,
) -> dict[str, Any]:
    """Put the best weights for the rows into `choice`; without rows nothing is searched."""
    if rows is None:
        return {}
    if choice["method"] in IN_TURN:
        raise ConfigError(f"{choice['method']} has no weights to search; leave out --search")
    found = search_weights(
        target,
        files,
        read_rows(rows),
        progress=report,
        **choice,
    )
    choice["weights"] = list(found.weights)
    choice["settings"] = choice["settings"] | {"scaling": found.scaling}
    losses = {"loss": found.loss, "loss_given": found.loss_given, "loss_target": found.loss_target}
    return {"search": losses | {"evaluations": found.evaluations, "rows": str(rows)}}


def _result(output: Path, files: list[Path], choice: dict[str, Any]) -> dict[str, Any]:
    told = {
        "output": str(output),
        "packs": [str(file) for file in files],
        "method": choice["method"],
    }
    if choice["method"] in IN_TURN:
        return told | {"state": None if choice["state"] is None else str(choice["state"])}
    method = find_method(choice["method"], choice["settings"])
    return told | {
        "weights": check_weights(method, choice["weights"], len(files)),
        "settings": method.model_dump(),
    }


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


def _labels(files: list[Path]) -> list[str]:
    """File names without their ending; whole paths where two are called alike."""
    counts = Counter(file.stem for file in files)
    return [file.stem if counts[file.stem] == 1 else str(file) for file in files]


def _numbers(pair: Pair, names: list[str]) -> dict[str, Any]:
    return {
        "packs": [names[pair.first], names[pair.second]],
        "total": pair.total.numbers(),
        "kinds": {kind: found.numbers() for kind, found in pair.by_kind().items()},
        "tensors": {name: found.numbers() for name, found in pair.tensors.items()},
    }


def _cells(numbers: dict[str, float | None]) -> list[str]:
    return ["–" if value is None else f"{value:.3f}" for value in numbers.values()]
