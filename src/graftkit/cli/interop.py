"""Behind `import-lora` and `export`: files and numbers, and what a person sees of them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from graftkit.cli import show
from graftkit.errors import ConfigError
from graftkit.interop import export_lora, import_lora
from graftkit.rows import read_rows
from graftkit.skillpack.pack import pack_summary


def import_adapter(target: str, adapter: Path, output: Path, force: bool) -> dict[str, Any]:
    """Write the pack of an adapter and return its numbers. Raises: OutputError."""
    with show.progress() as report:
        pack = import_lora(target, adapter, output, report, force)
    omitted = [part.model_dump() for part in pack.manifest.omitted]
    return {"output": str(output)} | pack_summary(pack) | {"omitted": omitted}


def export_adapter(
    file: Path, target: str, output: Path, kind: str, rank: int | None, rows: Path | None
) -> dict[str, Any]:
    """Write the adapter of a pack and return its numbers. Raises: ConfigError."""
    if kind != "peft":
        raise ConfigError(f"format {kind!r} is unknown; peft is the one there is")
    read = None if rows is None else read_rows(rows)
    with show.progress() as report:
        return asdict(export_lora(file, target, output, rank, read, report))


def print_import(result: dict[str, Any]) -> None:
    """One line of numbers, and one for each tensor that was rounded."""
    changed = [tensor["codec"] for tensor in result["tensors"] if tensor["codec"] != "zero"]
    show.line(
        f"{result['output']}: {show.size(result['pack_bytes'])}, {changed.count('factors')} "
        f"matrices by their factors, {changed.count('exact')} tensors exactly"
    )
    for part in result["omitted"]:
        show.line(f"{part['name']}: {part['reason']}")


def print_export(result: dict[str, Any]) -> None:
    """What was written and lost in a few lines, and a table of what a LoRA cannot carry."""
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
    table = show.Table()
    for header in ("not carried", "tensors", "share of the energy"):
        table.add_column(header, justify="left" if header == "not carried" else "right")
    for kind, shares in sorted(kinds.items()):
        table.add_row(kind, str(len(shares)), f"{100 * sum(shares):.2f} %")
    if kinds:
        Console().print(table)
