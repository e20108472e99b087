"""`graftkit vision`: rootstocks. Commands, and what a person sees of them."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from graftkit.cli import show
from graftkit.text import printable

if TYPE_CHECKING:
    from graftkit.vision.images.files import Skipped
    from graftkit.vision.predict import Prediction, Predictor

app = typer.Typer(no_args_is_help=True, help="Features of a big network, grafted into a small one.")

POLL_SECONDS = 0.5
"""Between two looks into a camera's folder."""


@app.callback()
def main() -> None:
    """Features of a big network, grafted into a small one."""


@app.command()
def graft(
    donor: Annotated[
        str,
        typer.Argument(help="An .npz of MobileNetV2, a directory or Hub id, or timm:NAME."),
    ],
    data: Annotated[Path, typer.Option("--data", help="Folder per class, a zip of it, or a CSV.")],
    budget: Annotated[str, typer.Option(help="Most it may cost: 0.6MB, 2ms or 20MMAC.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of all results.")],
    method: Annotated[str, typer.Option(help="auto or paper.")] = "auto",
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Leave the donor's layers as they are: minutes.")
    ] = False,
    upright: Annotated[
        bool, typer.Option("--upright", help="Up matters in the images: mirror, do not turn.")
    ] = False,
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 128,
    epochs: Annotated[int, typer.Option(help="Of every fine-tuning.")] = 12,
    baselines: Annotated[
        bool, typer.Option(help="Train what the rootstock is held against.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of splits, views and random weights.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="What other runs can use again. Default: OUTPUT/cache.")
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Cut features out of a big network, grow a small classifier on them, and compare it."""
    from graftkit.vision.graft import GraftSettings
    from graftkit.vision.graft import graft as run

    settings = GraftSettings.checked(
        budget=budget, method=method, freeze=freeze, upright=upright, size=size, epochs=epochs,
        baselines=baselines, seed=seed,
    )  # fmt: skip
    with show.progress() as report:
        result = run(donor, data, output, settings, cache, report)
    show.json_or(json_output, result, lambda: _print_graft(result, output))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A rootstock.onnx, float32 or int8.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes shown of each image.")] = 1,
    watch: Annotated[
        bool, typer.Option("--watch", help="Classify what appears in one folder, until Ctrl-C.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time the first image instead: p50, p95, memory.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of one inference. Default: one for each core.")
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Classify images with a rootstock, in onnxruntime alone."""
    from graftkit.errors import ConfigError
    from graftkit.vision.predict import Predictor

    if watch and latency:
        raise ConfigError("--watch and --latency exclude each other; give one of them")
    predictor = Predictor.open(model, threads)
    if watch:
        _watch(predictor, images, top, json_output)
    elif latency:
        _measure(predictor, model, images, json_output)
    else:
        _predict(predictor, images, top, json_output)


def _print_graft(result: dict[str, Any], output: Path) -> None:
    table = show.Table()
    for header in ("", "bytes", "parameters", "MMAC", "ms", "validation", "test", "95 %", "lead"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for name, found in {"rootstock": result, **result["baselines"]}.items():
        low, high = found["test_interval"]
        table.add_row(
            name,
            show.size(found["bytes"]),
            f"{found['parameters']:,}",
            f"{found['macs'] / 1e6:.1f}",
            f"{found['p50_ms']:.2f}",
            f"{found['val_accuracy']:.3f}",
            f"{found['test_accuracy']:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{found['lead']:+.3f}" if "lead" in found else "",
        )
    Console(width=max(120, Console().width)).print(table)
    int8 = result["int8"]
    show.line(
        f"int8: {show.size(result['int8_bytes'])}, test {int8['test_accuracy']:.3f}, "
        f"{int8['p50_ms']:.2f} ms"
    )
    for warning in (*_left_out(result["skipped"]), *result["warnings"]):
        show.line(f"note: {warning}")
    show.line(f"{output}: rootstock.onnx, rootstock.int8.onnx, graft.json; look at report.html")


def _left_out(skipped: list[dict[str, str]]) -> list[str]:
    if not skipped:
        return []
    first, count = skipped[0], len(skipped)
    files = "file" if count == 1 else "files"
    return [f"{count} {files} left out, such as {first['name']} ({first['reason']})."]


def _predict(predictor: "Predictor", places: list[Path], top: int, json_output: bool) -> None:
    from graftkit.errors import ImagesError
    from graftkit.vision.images.files import Skipped

    found = predictor.predict(_find(places))
    show.json_or(json_output, [_record(each) for each in found], lambda: _print_table(found, top))
    broken = [each for each in found if isinstance(each, Skipped)]
    if broken:
        raise ImagesError(
            f"{len(broken)} of {len(found)} images cannot be read, the first is "
            f"{printable(broken[0].name)} ({broken[0].reason})"
        )


def _watch(predictor: "Predictor", places: list[Path], top: int, json_output: bool) -> None:
    from graftkit.errors import ConfigError
    from graftkit.vision.predict import Arrivals

    if len(places) != 1 or not places[0].is_dir():
        raise ConfigError("--watch takes one folder; name the folder that the camera writes to")
    arrivals = Arrivals(places[0])
    show.line(f"graftkit: watching {places[0]}, Ctrl-C ends", error=True)
    try:
        while True:
            time.sleep(POLL_SECONDS)
            for found in predictor.predict(arrivals.poll()):
                line = show.json_text(_record(found)) if json_output else _line(found, top)
                show.line(line)
    except KeyboardInterrupt:
        return


def _measure(predictor: "Predictor", model: Path, places: list[Path], json_output: bool) -> None:
    from graftkit.parallel import peak_rss_bytes

    measured = predictor.measure_latency(_find(places)[0])
    memory = {"bytes": predictor.bytes, "peak_rss_bytes": peak_rss_bytes()}
    result = {"model": str(model)} | asdict(measured) | memory
    told = (
        f"{model}: {show.size(predictor.bytes)}, one image p50 {measured.p50_ms:.2f} ms, "
        f"p95 {measured.p95_ms:.2f} ms, least {measured.min_ms:.2f} ms; reading it "
        f"{measured.preprocessing_ms:.2f} ms; peak memory {show.size(memory['peak_rss_bytes'])}"
    )
    show.json_or(json_output, result, lambda: show.line(told))


def _find(places: list[Path]) -> list[Path]:
    from graftkit.errors import ImagesError
    from graftkit.vision.predict import find_images

    files = find_images(places)
    if not files:
        raise ImagesError(f"no images in {', '.join(map(str, places))}; name images or folders")
    return files


def _record(found: "Prediction | Skipped") -> dict[str, Any]:
    record = asdict(found)
    return {"file": record.pop("name")} | record


def _print_table(results: "Sequence[Prediction | Skipped]", top: int) -> None:
    table = show.Table()
    for header in ("file", "class", "confidence"):
        right = header == "confidence"
        table.add_column(header, justify="right" if right else "left", no_wrap=True)
    for found in results:
        name = found.name
        for label, told in _answers(found, top):
            table.add_row(name, label, told)
            name = ""
    # A narrow terminal must not cut the names that a reader looks for.
    Console(width=max(200, Console().width)).print(table)


def _line(found: "Prediction | Skipped", top: int) -> str:
    answers = ", ".join(f"{label} {told}" for label, told in _answers(found, top))
    return f"{found.name}  {answers}"


def _answers(found: "Prediction | Skipped", top: int) -> list[tuple[str, str]]:
    """The most likely classes and their probabilities, or why there are none."""
    from graftkit.vision.images.files import Skipped

    if isinstance(found, Skipped):
        return [(found.reason, "–")]
    best = sorted(found.scores.items(), key=lambda score: -score[1])[:top]
    return [(label, f"{score:.3f}") for label, score in best]
