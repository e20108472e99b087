"""`graftkit vision`: graft a rootstock, and classify images with it."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from graftkit.cli import show
from graftkit.errors import printable

if TYPE_CHECKING:
    from graftkit.vision.images.files import Skipped
    from graftkit.vision.predict import Prediction, Predictor

app = typer.Typer(
    no_args_is_help=True, help="Small image classifiers, cut out of big vision networks."
)

POLL_SECONDS = 0.5
"""Between two looks into a watched folder."""


@app.callback()
def main() -> None:
    """Small image classifiers, cut out of big vision networks."""


@app.command()
def graft(
    donor: Annotated[
        str,
        typer.Argument(help="An .npz of MobileNetV2, a directory or Hub id, or timm:NAME."),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="Folder or zip with a folder per class, or a CSV.")
    ],
    budget: Annotated[str, typer.Option(help="Largest cost: 0.6MB of file, 2ms or 20MMAC.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    method: Annotated[str, typer.Option(help="How the scion is chosen: auto or paper.")] = "auto",
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Train the head only, in minutes.")
    ] = False,
    upright: Annotated[
        bool, typer.Option("--upright", help="Up matters in the images: mirror them, do not turn.")
    ] = False,
    size: Annotated[int, typer.Option(help="Pixels of a side of the images.")] = 128,
    epochs: Annotated[int, typer.Option(help="Epochs of every fine-tuning.")] = 12,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Train the research baselines too, to compare with."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of splits, views and random weights.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that later runs read again. Default: OUTPUT/cache."),
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Cut a small classifier out of a big vision network, within a budget, and measure it."""
    from graftkit.vision.graft import GraftSettings
    from graftkit.vision.graft import graft as run_graft

    settings = GraftSettings.checked(
        budget=budget, method=method, freeze=freeze, upright=upright, size=size, epochs=epochs,
        baselines=baselines, seed=seed,
    )  # fmt: skip
    with show.progress() as progress:
        result = run_graft(donor, data, output, settings, cache, progress)
    show.json_or(json_output, result, lambda: _print_graft(result, output))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A rootstock.onnx, float32 or int8.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Classes shown for each image.")] = 1,
    watch: Annotated[
        bool, typer.Option("--watch", help="Classify new images in one folder until Ctrl-C.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Print latency and peak memory of the first image.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of one inference. Default: one for each core."),
    ] = None,
    json_output: show.Json = False,
) -> None:
    """Classify images with a rootstock, without torch."""
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
    for name, numbers in {"rootstock": result, **result["baselines"]}.items():
        low, high = numbers["test_interval"]
        table.add_row(
            name,
            show.size(numbers["bytes"]),
            f"{numbers['parameters']:,}",
            f"{numbers['macs'] / 1e6:.1f}",
            f"{numbers['p50_ms']:.2f}",
            f"{numbers['val_accuracy']:.3f}",
            f"{numbers['test_accuracy']:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{numbers['lead']:+.3f}" if "lead" in numbers else "",
        )
    Console(width=max(120, Console().width)).print(table)
    budget, int8 = result["budget"], result["int8"]
    if budget["kind"] == "bytes":
        show.line(f"rootstock: {result['bytes']:,} of {round(budget['amount']):,} bytes")
    show.line(
        f"int8: {show.size(result['int8_bytes'])}, test {int8['test_accuracy']:.3f}, "
        f"{int8['p50_ms']:.2f} ms"
    )
    for warning in (*_skipped_files(result["skipped"]), *result["warnings"]):
        show.line(f"note: {warning}")
    show.line(f"{output}: rootstock.onnx, rootstock.int8.onnx, graft.json; look at report.html")


def _skipped_files(skipped: list[dict[str, str]]) -> list[str]:
    if not skipped:
        return []
    first, count = skipped[0], len(skipped)
    files = "file" if count == 1 else "files"
    return [f"{count} {files} left out, such as {first['name']} ({first['reason']})."]


def _predict(predictor: "Predictor", places: list[Path], top: int, json_output: bool) -> None:
    from graftkit.errors import ImagesError
    from graftkit.vision.images.files import Skipped

    results = predictor.predict(_find(places))
    show.json_or(
        json_output, [_record(each) for each in results], lambda: _print_table(results, top)
    )
    broken = [each for each in results if isinstance(each, Skipped)]
    if broken:
        raise ImagesError(
            f"{len(broken)} of {len(results)} images cannot be read, the first is "
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
            for result in predictor.predict(arrivals.poll()):
                line = show.json_text(_record(result)) if json_output else _line(result, top)
                show.line(line)
    except KeyboardInterrupt:
        return


def _measure(predictor: "Predictor", model: Path, places: list[Path], json_output: bool) -> None:
    from graftkit.parallel import peak_rss_bytes

    measured = predictor.measure_latency(_find(places)[0])
    memory = {"bytes": predictor.bytes, "peak_rss_bytes": peak_rss_bytes()}
    result = {"model": str(model)} | asdict(measured) | memory
    text = (
        f"{model}: {show.size(predictor.bytes)}, one image p50 {measured.p50_ms:.2f} ms, "
        f"p95 {measured.p95_ms:.2f} ms, least {measured.min_ms:.2f} ms; reading it "
        f"{measured.preprocessing_ms:.2f} ms; peak memory {show.size(memory['peak_rss_bytes'])}"
    )
    show.json_or(json_output, result, lambda: show.line(text))


def _find(places: list[Path]) -> list[Path]:
    from graftkit.errors import ImagesError
    from graftkit.vision.predict import find_images

    files = find_images(places)
    if not files:
        raise ImagesError(f"no images in {', '.join(map(str, places))}; name images or folders")
    return files


def _record(result: "Prediction | Skipped") -> dict[str, Any]:
    record = asdict(result)
    return {"file": record.pop("name")} | record


def _print_table(results: "Sequence[Prediction | Skipped]", top: int) -> None:
    table = show.Table()
    for header in ("file", "class", "confidence"):
        right = header == "confidence"
        table.add_column(header, justify="right" if right else "left", no_wrap=True)
    for result in results:
        name = result.name
        for label, confidence in _top_classes(result, top):
            table.add_row(name, label, confidence)
            name = ""
    # A narrow terminal must not cut the names that a reader looks for.
    Console(width=max(200, Console().width)).print(table)


def _line(result: "Prediction | Skipped", top: int) -> str:
    classes = ", ".join(f"{label} {confidence}" for label, confidence in _top_classes(result, top))
    return f"{result.name}  {classes}"


def _top_classes(result: "Prediction | Skipped", top: int) -> list[tuple[str, str]]:
    """The most likely classes and their probabilities, or the reason why there are none."""
    from graftkit.vision.images.files import Skipped

    if isinstance(result, Skipped):
        return [(result.reason, "–")]
    best = sorted(result.scores.items(), key=lambda score: -score[1])[:top]
    return [(label, f"{score:.3f}") for label, score in best]
