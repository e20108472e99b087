"""`graftkit pack`, `inspect`, `verify`, `compare`, `import-lora` and `export`: one pack.

A pack is made of a target and a tuned model, or of a LoRA adapter; a LoRA adapter of a pack.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import show
from graftkit.progress import Progress

if TYPE_CHECKING:
    from graftkit.checkpoint import Checkpoint
    from graftkit.outputs import Claim
    from graftkit.skillpack import SkillPack


app = typer.Typer()


HowAsked = Annotated[
    str | None,
    typer.Option(
        "--prompt-format",
        help="How the skill's prompts were given in training, and are when it is asked: raw, or "
        "chat for the chat template. Default: as the calibration rows are.",
    ),
]


@app.command()
def pack(
    target: show.Target,
    tuned: show.Tuned,
    output: show.PackOutput,
    budget: show.Budget = None,
    recipe: show.Recipe = "auto",
    calibration: show.Calibration = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Rows whose prompts routers should send to this pack.")
    ] = None,
    prompt_format: HowAsked = None,
    seed: Annotated[int, typer.Option(help="Seed that picks or samples the calibration rows.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Tensors compressed at once. Default: one per core.")
    ] = None,
    servable: Annotated[
        bool,
        typer.Option("--servable", help="Use only factors that are cheap to serve unmerged."),
    ] = False,
    train_steps: Annotated[
        int | None,
        typer.Option(help="Most steps of code training on the rows. Default 100; 0 turns it off."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of the steps of code training.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything except write the file.")
    ] = False,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Compress what TUNED learned beyond TARGET into one file.

    If it is interrupted, run the same command again: finished steps are kept in OUTPUT.partial.
    """
    from graftkit.config import QUICK_STEPS

    summary = pack_to_file(
        target,
        tuned,
        output,
        dry_run,
        force,
        budget=budget,
        recipe=recipe,
        calibration=calibration,
        prompts=prompts,
        prompt_format=prompt_format,
        seed=seed,
        workers=workers,
        servable=servable,
        train_steps=QUICK_STEPS if quick and train_steps is None else train_steps,
    )
    show.json_or(json_output, summary, lambda: _print_pack(summary, output, dry_run))


def pack_to_file(
    target: str, tuned: str, output: Path, dry_run: bool, force: bool, **options: Any
) -> dict[str, Any]:
    """Pack into `output` (nothing is written on a dry run) and return the numbers.

    force: a file that is there may be replaced.
    """
    from graftkit.config import SELF
    from graftkit.outputs import check_output, claimed
    from graftkit.pack import pack_delta
    from graftkit.parallel import peak_rss_bytes
    from graftkit.skillpack.pack import pack_summary

    started = time.perf_counter()
    rows = [options.get(name) for name in ("calibration", "prompts")]
    inputs = [target, tuned, *(file for file in rows if file and file != SELF)]
    with show.progress() as report:
        if dry_run:
            check_output(output, inputs=inputs, force=True)
            pack = pack_delta(target, tuned, progress=report, **options)
        else:
            job = ["pack", target, tuned, options]
            with claimed(output, job, inputs=inputs, force=force, resumable=True) as claim:
                pack = pack_delta(target, tuned, work_dir=claim.work, progress=report, **options)
                _save(pack, claim)
    summary = pack_summary(pack)
    if not dry_run:
        # The size quoted is the size of the file.
        summary["pack_bytes"] = output.stat().st_size
    measured = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
    return {"output": None if dry_run else str(output)} | summary | measured


def _save(pack: "SkillPack", claim: "Claim") -> None:
    """Write the pack and put it in place; where that fails, nothing stays. Raises: OutputError."""
    from graftkit.errors import OutputError
    from graftkit.files import WorkFolder

    try:
        pack.save(claim.result)
        claim.commit()
    except OutputError:
        WorkFolder(claim.work).remove()
        raise


def _print_pack(summary: dict[str, Any], output: Path, dry_run: bool) -> None:
    """One line of numbers, and a table of the tensors summed by kind and codec."""
    name = f"{output} (not written)" if dry_run else str(output)
    limit = summary["budget_bytes"]
    of = f" of {show.size(limit)} allowed" if limit else ""
    show.line(
        f"{name}: {show.size(summary['pack_bytes'])}{of}, {100 * summary['ratio']:.2f} % of the "
        f"target, {summary['bits_per_parameter']:.3f} bits/parameter, "
        f"{summary['seconds']:.1f} s, peak memory {show.size(summary['peak_rss_bytes'])}"
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tensor in summary["tensors"]:
        groups.setdefault((tensor["kind"], tensor["codec"]), []).append(tensor)
    numbers = ("tensors", "bytes", "mean error")
    table = show.Table("kind", "codec", *numbers, right=numbers)
    for (kind, codec), members in sorted(groups.items()):
        error = sum(tensor["relative_error"] for tensor in members) / len(members)
        size = sum(tensor["bytes"] for tensor in members)
        table.add_row(kind, codec, len(members), f"{size:,}", f"{error:.3f}")
    table.show()


@app.command()
def inspect(file: show.PackFile, json_output: show.Json = False) -> None:
    """Show what a pack holds, tensor by tensor. Needs no model."""
    from graftkit.skillpack import SkillPack
    from graftkit.skillpack.pack import pack_summary

    opened = SkillPack.load(file)
    summary = pack_summary(opened)
    summary["manifest"] = opened.manifest.model_dump(mode="json", exclude={"tensors"})
    show.json_or(json_output, summary, lambda: _print_contents(summary, file))


def _print_contents(summary: dict[str, Any], file: Path) -> None:
    """What the pack says of itself, then every tensor."""
    for key, value in _facts(summary, file).items():
        show.line(f"{key:>15}  {value}")
    right = ("shape", "bytes", "bits/par.", "error")
    table = show.Table(
        "tensor", "kind", "shape", "codec", "detail", *right[1:], right=right, whole=True
    )
    for tensor in summary["tensors"]:
        table.add_row(
            tensor["name"],
            tensor["kind"],
            "x".join(map(str, tensor["shape"])),
            tensor["codec"],
            tensor.get("tiers") or _detail(tensor),
            f"{tensor['bytes']:,}",
            f"{tensor['bits_per_parameter']:.3f}",
            f"{tensor['relative_error']:.4f}",
        )
    table.show()


def _facts(summary: dict[str, Any], file: Path) -> dict[str, str]:
    manifest = summary["manifest"]
    bound = summary["bound_bits_per_parameter"]
    calibration = manifest["calibration"]
    return {
        "file": f"{file}, {show.size(summary['pack_bytes'])} ({100 * summary['ratio']:.2f} % of "
        f"the target), format {manifest['format_version']}, by {manifest['generator']}",
        "target": f"{summary['target']}, fingerprint {manifest['target']['fingerprint'][:16]}…",
        "tuned": summary["tuned"],
        "recipe": summary["recipe"],
        "calibration": f"{calibration['rows']} rows, {calibration['tokens']} tokens of "
        f"{calibration['source']} ({calibration['format'].replace('_', ' and ')})"
        if calibration
        else "none (data-free)",
        "prompts": _prompt_format(manifest),
        "bits/parameter": f"{summary['bits_per_parameter']:.3f}"
        + (f", model bound {bound:.3f}" if bound is not None else ""),
        "files": ", ".join(record["name"] for record in manifest["files"]) or "none changed",
    }


def _prompt_format(manifest: dict[str, Any]) -> str:
    from graftkit.config import SELF

    template = manifest["template_blake3"]
    rows = manifest["calibration"] or {"source": SELF}
    implied = "raw" if rows["source"] != SELF and rows["format"] == "prompt_completion" else None
    given = manifest["prompt_format"] or implied or "not recorded"
    return f"{given}, template {template[:16]}…" if template else given


def _detail(tensor: dict[str, Any]) -> str:
    if "kept" in tensor:
        return f"{tensor['kept']:,} kept, {tensor['positions']}"
    if tensor.get("coded"):
        return f"rank {tensor['rank']}, coded" if tensor["rank"] is not None else "coded"
    if "dtypes" in tensor:
        return f"rank {tensor['rank']}, {', '.join(tensor['dtypes'])}"
    return f"{tensor['bits']} bits" if "bits" in tensor else ""


@app.command()
def verify(
    file: show.PackFile,
    target: show.MadeFor,
    full: Annotated[
        bool, typer.Option("--full", help="Also decode every tensor and look for NaN.")
    ] = False,
    json_output: show.Json = False,
) -> None:
    """Check a pack's format, its digests and its target."""
    with show.progress() as report:
        result = verify_file(file, target, full, report)
    show.json_or(json_output, result, lambda: _print_verified(result, file, target))


def verify_file(file: Path, target: str, full: bool, progress: Progress) -> dict[str, Any]:
    """Check format, digests and target; with `full`, decode every tensor.

    Raises: PackFormatError, PackMismatchError, CorruptPackError for a tensor that is not finite.
    """
    from graftkit.checkpoint import Checkpoint
    from graftkit.skillpack import SkillPack

    pack = SkillPack.load(file)
    checkpoint = Checkpoint.open(target)
    progress("checking the target", 0, 1)
    pack.check_target(checkpoint.read, set(checkpoint.tensors), str(checkpoint.path))
    progress("checking the target", 1, 1)
    if full:
        pack.side_files(checkpoint)
        for done, record in enumerate(pack.manifest.tensors):
            progress("decoding", done, len(pack.manifest.tensors))
            _check_finite(pack, record.name, checkpoint)
    return {
        "ok": True,
        "format_version": pack.manifest.format_version,
        "pack_bytes": file.stat().st_size,
        "tensors": len(pack.manifest.tensors),
        "fingerprint": pack.manifest.target.fingerprint,
        "decoded": full,
    }


def _check_finite(pack: "SkillPack", name: str, target: "Checkpoint") -> None:
    """Raises: CorruptPackError for NaN or infinity where the target has a finite number."""
    from graftkit.checkpoint import all_finite
    from graftkit.errors import CorruptPackError, PackFault

    tensor, base = pack.rebuild(name, target.read), pack.record(name).target_name
    if not tensor.is_floating_point() or all_finite(tensor):
        return
    odd = ~tensor.isfinite()
    if base is not None:  # what the target has so is unchanged
        before = target.read(base).isfinite()
        before, odd = before.reshape(-1, *before.shape[1:]), odd.reshape(-1, *odd.shape[1:])
        rows = min(before.shape[0], odd.shape[0])
        odd[:rows] &= before[:rows]
    if bool(odd.any()):
        raise CorruptPackError(
            f"tensor {name} decodes to NaN or infinite weights; pack the model again",
            PackFault.INVALID_PAYLOAD,
        )


def _print_verified(result: dict[str, Any], file: Path, target: str) -> None:
    more = ", every tensor decodes to finite weights" if result["decoded"] else ""
    show.line(
        f"{file}: sound (format {result['format_version']}, {result['tensors']} tensors, "
        f"{show.size(result['pack_bytes'])}), made for {target}{more}"
    )


@app.command()
def compare(
    target: show.Target,
    tuned: show.Tuned,
    file: show.PackFile,
    rows: Annotated[Path, typer.Option("--rows", help="Rows to measure on.")],
    json_output: show.Json = False,
) -> None:
    """Compare target + pack with the tuned model on rows.

    Measures the KL divergence per token, how often both find the same token most likely, and the
    share of rows answered word for word.
    """
    from dataclasses import asdict

    from graftkit.evaluate import compare as compare_models
    from graftkit.rows import read_rows

    texts = read_rows(rows)
    with show.progress() as report:
        measured = compare_models(
            target, tuned, file, texts, lambda done, total: report("comparing", done, total)
        )
    result = asdict(measured)
    show.json_or(json_output, result, lambda: _print_comparison(result, file))


def _print_comparison(result: dict[str, Any], file: Path) -> None:
    show.line(
        f"{file}: {result['rows']} rows, {result['tokens']} tokens: "
        f"KL {result['kl_mean']:.5f} mean, {result['kl_p99']:.4f} at the 99th percentile, "
        f"top-1 agreement {100 * result['top1_agreement']:.2f} %"
    )
    if result["exact_match_tuned"] is None:
        return
    columns = ("target", "tuned", "target + pack", "recovered")
    table = show.Table("", *columns, right=columns)
    shares = [result[f"exact_match_{model}"] for model in ("target", "tuned", "packed")]
    table.add_row("exact match", *map(show.number, (*shares, result["recovered"])))
    table.show()


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
