"""`graftkit import-lora` and `export`: packs and LoRA adapters, each made of the other."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from graftkit.cli import show

app = typer.Typer()


@app.command()
def import_lora(
    target: show.Target,
    adapter: Annotated[Path, typer.Argument(help="A PEFT LoRA directory of this target.")],
    output: show.PackOutput,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Turn a LoRA adapter into a pack, every A and B bit for bit."""
    from graftkit.interop import import_lora as write_pack
    from graftkit.skillpack.pack import pack_summary

    with show.progress() as report:
        pack = write_pack(target, adapter, output, report, force)
    omitted = [part.model_dump() for part in pack.manifest.omitted]
    result = {"output": str(output)} | pack_summary(pack) | {"omitted": omitted}
    show.json_or(json_output, result, lambda: print_import(result))


def print_import(result: dict[str, Any]) -> None:
    """One line of numbers, and one for each tensor that was rounded."""
    codecs = [tensor["codec"] for tensor in result["tensors"]]
    show.line(
        f"{result['output']}: {show.size(result['pack_bytes'])}, "
        f"{show.count(codecs.count('factors'), 'matrix', 'matrices')} by their factors"
        + (f", {show.count(codecs.count('exact'), 'tensor')} exactly" if "exact" in codecs else "")
    )
    for part in result["omitted"]:
        show.line(f"{part['name']}: {part['reason']}")


@app.command()
def export(
    file: show.PackFile,
    target: show.MadeFor,
    output: show.FolderOutput,
    format_: Annotated[str, typer.Option("--format", help="peft, a LoRA adapter.")] = "peft",
    rank: Annotated[
        int | None,
        typer.Option(help="Rank. Default: the smallest of 8 to 256 that keeps 99 % of the energy."),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows to measure the loss on, as KL per token.")
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Write a pack as a LoRA adapter for PEFT and vLLM.

    Says how much the rank loses, and which changes a LoRA cannot carry.
    """
    from graftkit.errors import ConfigError
    from graftkit.interop import export_lora
    from graftkit.rows import read_rows

    if format_ != "peft":
        raise ConfigError(f"format {format_!r} is unknown; peft is the one there is")
    texts = None if rows is None else read_rows(rows)
    with show.progress() as report:
        result = asdict(export_lora(file, target, output, rank, texts, report))
    show.json_or(json_output, result, lambda: print_export(result))


def print_export(result: dict[str, Any]) -> None:
    """What was written and lost, and a table of what a LoRA cannot carry."""
    show.line(
        f"{result['output']}: rank {result['rank']}, {show.size(result['adapter_bytes'])}, "
        f"{len(result['modules'])} layers, relative error {result['relative_error']:.4f}; "
        f"{result['relative_error_overall']:.4f} with what a LoRA cannot carry"
    )
    fidelity = result["fidelity"]
    if fidelity is not None:
        show.line(
            f"target + LoRA against target + pack: KL {fidelity['kl_mean']:.5f} mean, "
            f"{fidelity['kl_p99']:.4f} at the 99th percentile, top-1 agreement "
            f"{100 * fidelity['top1_agreement']:.2f} %, {fidelity['tokens']} tokens"
        )
    kinds: dict[str, list[float]] = {}
    for part in result["left_out"]:
        kinds.setdefault(part["kind"], []).append(part["energy_share"])
    columns = ("tensors", "share of the energy")
    table = show.Table("not carried", *columns, right=columns)
    for kind, shares in sorted(kinds.items()):
        table.add_row(kind, len(shares), f"{100 * sum(shares):.2f} %")
    if kinds:
        table.show()
