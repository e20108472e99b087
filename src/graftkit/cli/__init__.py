"""The command line: it translates and prints; everything else is done below.

Heavy libraries are imported inside the commands, so that `graftkit --help` is quick.
"""

from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli import library as library_commands
from graftkit.cli import show
from graftkit.cli import vision as vision_commands
from graftkit.config import VERSION

app = typer.Typer(
    name="graftkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # square brackets of the help are square brackets
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(library_commands.app, name="library")
app.add_typer(vision_commands.app, name="vision")

Target = Annotated[str, typer.Argument(help="Target: a Hugging Face directory or Hub id[@rev].")]
Tuned = Annotated[str, typer.Argument(help="Tuned model: a directory or Hub id[@revision].")]
PackFile = Annotated[Path, typer.Argument(help="A .skillpack file.")]
PackFiles = Annotated[list[Path], typer.Argument(help="One or more packs of this target.")]

# How packs are mixed; `merge` and `fuse` take the same options.
Weights = Annotated[
    str | None, typer.Option(help="One weight per pack, such as 1,0.5. Default all 1.")
]
MergeMethod = Annotated[
    str,
    typer.Option(
        help="linear, task_arithmetic, ties, dare, dare_ties, sce, pcb; in turn: opcm, kif."
    ),
]
Lambda = Annotated[
    float | None, typer.Option("--lambda", help="Multiplies the merged delta. Default 1.")
]
Density = Annotated[float | None, typer.Option(help="Share of entries kept: ties 0.2, dare_* 0.5.")]
Search = Annotated[
    Path | None, typer.Option(help="rows.jsonl: search the weights that answer it best.")
]
State = Annotated[
    Path | None, typer.Option(help="opcm, kif: what packs so far left behind; read and written.")
]
TaskRows = Annotated[
    list[Path] | None,
    typer.Option("--rows", help="kif: rows.jsonl of each pack's task, once for every pack."),
]


def _version(value: bool) -> None:
    if value:
        show.line(f"graftkit {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Keep what a fine-tune learned in one small file, and attach it when it is wanted."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for packs and results.")] = Path(
        "graftkit-demo"
    ),
) -> None:
    """The whole story on embedded data: pack three skills, attach, detach, mix. Offline."""
    from graftkit.demo import run_demo

    run_demo(out)


@app.command()
def pack(
    target: Target,
    tuned: Tuned,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .skillpack to write.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Largest file: 5%, 12MB or 1.0bpp. Default 5%; lossless: none."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="auto, graftllm (the paper's method) or lossless.")
    ] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(help="rows.jsonl to measure activations on; without it, data-free."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="rows.jsonl whose prompts a router shall send to this pack."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Picks the calibration rows.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Tensors in work at once. Default: one per core.")
    ] = None,
    servable: Annotated[
        bool,
        typer.Option("--servable", help="Only factors that are cheap in the side path."),
    ] = False,
    train_steps: Annotated[
        int | None,
        typer.Option(help="Steps of code training on the rows. Default 400; 0: none."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write the file.")
    ] = False,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Compress what TUNED learned beyond TARGET into one file.

    Interrupted, the same command goes on where it stopped (finished steps lie in OUTPUT.partial).
    """
    from graftkit.cli.packing import pack_to_file

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
        seed=seed,
        workers=workers,
        servable=servable,
        train_steps=train_steps,
    )
    show.json_or(json_output, summary, lambda: show.pack_result(summary, output, dry_run))


@app.command()
def inspect(file: PackFile, json_output: show.Json = False) -> None:
    """What a pack holds, tensor by tensor. Needs no model."""
    from graftkit.skillpack import SkillPack
    from graftkit.skillpack.pack import pack_summary

    opened = SkillPack.load(file)
    summary = pack_summary(opened)
    summary["manifest"] = opened.manifest.model_dump(mode="json", exclude={"tensors"})
    show.json_or(json_output, summary, lambda: show.pack_table(summary, file))


@app.command()
def verify(
    file: PackFile,
    target: Annotated[str, typer.Option("--target", help="The target it was made for.")],
    full: Annotated[
        bool, typer.Option("--full", help="Also decode every tensor and look for NaN.")
    ] = False,
    json_output: show.Json = False,
) -> None:
    """Check a pack: format, digests, and that TARGET is the target it was made for."""
    from graftkit.cli.packing import verify_file

    with show.progress() as report:
        result = verify_file(file, target, full, report)
    show.json_or(json_output, result, lambda: show.verified(result, file, target))


@app.command()
def compare(
    target: Target,
    tuned: Tuned,
    file: PackFile,
    rows: Annotated[Path, typer.Option("--rows", help='rows.jsonl: {"prompt", "completion"}.')],
    json_output: show.Json = False,
) -> None:
    """How close target + pack is to the tuned model: KL per token, agreement, exact match."""
    from dataclasses import asdict

    from graftkit.evaluate import compare as run_compare
    from graftkit.rows import read_rows

    with show.progress() as report:
        result = asdict(
            run_compare(
                target,
                tuned,
                file,
                read_rows(rows),
                lambda done, total: report("comparing", done, total),
            )
        )
    show.json_or(json_output, result, lambda: show.comparison(result, file))


@app.command()
def merge(
    target: Target,
    files: PackFiles,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    weights: Weights = None,
    method: MergeMethod = "task_arithmetic",
    scaling: Lambda = None,
    density: Density = None,
    search: Search = None,
    state: State = None,
    task_rows: TaskRows = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Also copy the target's files of code.")
    ] = False,
    json_output: show.Json = False,
) -> None:
    """Write target + packs as an ordinary Hugging Face checkpoint.

    Every file of the target that is neither weight nor code comes along.
    """
    from graftkit.cli.fusing import merge_files, mixing, print_merged

    choice = mixing(method, weights, state, task_rows, scaling=scaling, density=density)
    result = merge_files(target, files, output, choice, search, trust_remote_code)
    show.json_or(json_output, result, lambda: print_merged(result))


@app.command()
def fuse(
    target: Target,
    files: PackFiles,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .skillpack to write.")],
    weights: Weights = None,
    method: MergeMethod = "task_arithmetic",
    scaling: Lambda = None,
    density: Density = None,
    search: Search = None,
    state: State = None,
    task_rows: TaskRows = None,
    budget: Annotated[str | None, typer.Option(help="Largest file, as in pack.")] = None,
    recipe: Annotated[str, typer.Option(help="auto, graftllm or lossless.")] = "auto",
    calibration: Annotated[
        Path | None, typer.Option(help="rows.jsonl of the packs' tasks; without it, data-free.")
    ] = None,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Make one pack of several packs of one target."""
    from graftkit.cli.fusing import fuse_files, mixing, print_fused

    choice = mixing(method, weights, state, task_rows, scaling=scaling, density=density)
    packing = {"budget": budget, "recipe": recipe, "calibration": calibration, "force": force}
    result = fuse_files(target, files, output, choice, search, **packing)
    show.json_or(json_output, result, lambda: print_fused(result))


@app.command()
def interference(
    target: Target,
    files: Annotated[list[Path], typer.Argument(help="Two or more packs of this target.")],
    figure: Annotated[
        Path | None, typer.Option(help="A PNG to draw (needs the extra report).")
    ] = None,
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Do packs get in each other's way? Cosine, sign conflicts and overlap of every pair."""
    from graftkit.cli.fusing import interference_of, print_interference

    result = interference_of(target, files, figure, force)
    show.json_or(json_output, result, lambda: print_interference(result))


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    target: Annotated[
        str | None, typer.Argument(help="Target: a Hugging Face directory or Hub id[@rev].")
    ] = None,
    packs: Annotated[
        list[Path] | None,
        typer.Option("--pack", help="A pack to attach; give several to hear each answer."),
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="A library's folder, in place of TARGET and --pack.")
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(help="One answer: auto (by router keys), a pack's name, or target."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    json_output: show.Json = False,
) -> None:
    """Continue a prompt with the target, or with packs attached (one answer per pack)."""
    from graftkit.cli.generating import answer_prompt

    answers = answer_prompt(target, packs or [], library, route, prompt, max_new_tokens)
    show.json_or(json_output, {"prompt": prompt, "answers": answers}, lambda: show.answers(answers))


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A configuration, see configs/.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for every stage.")],
    only: Annotated[
        str | None,
        typer.Option(help="One stage: sample, score, select, probe, sft, dpo or pack."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Counts, tokens, memory, disk and time; no run.")
    ] = False,
    json_output: show.Json = False,
) -> None:
    """Teach a target what source models answer, and pack what it learned.

    Sources -> answers -> scores -> SFT set and pairs -> SFT -> DPO -> pack. Interrupted, the same
    command goes on where it stopped; finished stages are not done again.
    """
    from graftkit.cli.distilling import distill_into, print_estimate, print_run

    result = distill_into(config, output, only, dry_run)
    show.json_or(json_output, result, lambda: (print_estimate if dry_run else print_run)(result))


@app.command()
def import_lora(
    target: Target,
    adapter: Annotated[Path, typer.Argument(help="A PEFT LoRA directory of this target.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .skillpack to write.")],
    force: show.Force = False,
    json_output: show.Json = False,
) -> None:
    """Turn a LoRA adapter into a pack, every A and B word for word."""
    from graftkit.cli.interop import import_adapter, print_import

    result = import_adapter(target, adapter, output, force)
    show.json_or(json_output, result, lambda: print_import(result))


@app.command()
def export(
    file: PackFile,
    target: Annotated[str, typer.Option("--target", help="The target it was made for.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    format_: Annotated[str, typer.Option("--format", help="peft, a LoRA adapter.")] = "peft",
    rank: Annotated[
        int | None,
        typer.Option(help="Rank. Default: the smallest of 8 to 256 that keeps 99 % of the energy."),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="rows.jsonl to measure the loss on, as KL per token.")
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Write a pack as a LoRA adapter that PEFT and vLLM load, and say what that loses."""
    from graftkit.cli.interop import export_adapter, print_export

    result = export_adapter(file, target, output, format_, rank, rows)
    show.json_or(json_output, result, lambda: print_export(result))
