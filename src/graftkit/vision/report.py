"""The report page: the verdict first, then the numbers that it rests on.

The page is one file without scripts and without anything from elsewhere. Every text of a result is
escaped: names of classes and of files may be hostile. Figures are SVG, drawn by matplotlib.
"""

import base64
import html
import io
import string
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from graftkit.errors import printable
from graftkit.files import replaced_file
from graftkit.vision.results import Result, judge, megabytes, percent, reference_donor

ABSENT = "–"
_COSTS = ("parameters", "bytes", "macs", "p50_ms")
SETTINGS: Any = {  # matplotlib types every key
    "svg.fonttype": "none",  # text stays text: class names in any script, and a smaller file
    "svg.hashsalt": "graftkit",  # the same result gives the same bytes
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}
PANELS = (
    ("bytes", "size of the float32 file, MB", 1e6),
    ("macs", "multiply-accumulates of one image, M", 1e6),
    ("p50_ms", "median latency of one image, ms", 1.0),
)
MARKERS = "osD^vP<>Xhp*"
SHORT_RANGE = 50.0  # of costs, highest over lowest, below which axes have more than powers of ten
OWN_COLOR, LINE_COLOR = "#2e7d32", "#8a8f98"


def write_report(result: Result, path: Path) -> None:
    """Write a result as one HTML page, light or dark as the browser asks, and printable.

    Args:
        result: what `graft` returns and graft.json holds; the page omits missing parts.
    Raises: OutputError when the file cannot be written; an older file is then unchanged.
    """
    with replaced_file(path) as partial:
        partial.write_text(render_page(result), encoding="utf-8")


def render_page(result: Result) -> str:
    """The page as text."""
    template = files("graftkit.vision").joinpath("report_page.html").read_text(encoding="utf-8")
    title = f"Rootstock of {result.get('donor', 'a donor')}"
    body = "\n".join([_verdict(result, title), *(_section(*part, result) for part in _SECTIONS)])
    return string.Template(template).substitute(title=_text(title), body=body)


def _verdict(result: Result, title: str) -> str:
    verdict = judge(result)
    doubt = "" if verdict.pays else " doubt"
    sentences = " ".join(_text(sentence) for sentence in verdict.sentences)
    return f'<h1>{_text(title)}</h1>\n<p class="verdict{doubt}">{sentences}</p>'


def _section(title: str, draw: Callable[[Result], str], result: Result) -> str:
    content = draw(result)
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _warnings(result: Result) -> str:
    skipped = [f"{entry['name']}: {entry['reason']}" for entry in result.get("skipped", ())]
    note = f"<p>{len(skipped)} files could not be read:</p>" if skipped else ""
    return _list(result.get("warnings", ())) + note + _list(skipped)


def _headline(result: Result) -> str:
    note = _note("MB are 10⁶ bytes of the ONNX file; latency is of one image in onnxruntime.")
    header, *rows = headline(result)
    return _table(header, rows) + note


def headline(result: Result) -> list[tuple[str, ...]]:
    """Donor and rootstock in the layout of the paper's table, with the costs that it omits.

    Returns: a header and rows; two columns where there is no donor to compare with, else four.
    """
    name, donor = reference_donor(result)
    rows: list[tuple[str, ...]] = []
    for label, key, show in (
        ("parameters", "parameters", _count),
        ("size, MB", "bytes", megabytes),
        ("validation accuracy, %", "val_accuracy", percent),
        ("validation loss", "val_loss", _decimals),
        ("test accuracy, %", "test_accuracy", percent),
        ("multiply-accumulates, M", "macs", _millions),
        ("latency p50, ms", "p50_ms", _decimals),
    ):
        before, after = donor.get(key), result.get(key)
        cut = percent(1 - after / before) if key in _COSTS and before and after else ""
        rows.append((label, _shown(before, show), _shown(after, show), cut))
    table: list[tuple[str, ...]] = [("", name, "rootstock", "reduction, %"), *rows]
    return table if name else [(row[0], row[2]) for row in table]


def _methods(result: Result) -> dict[str, Result]:
    """Rootstock, its int8 form, and the baselines."""
    int8 = dict(result.get("int8") or {})
    if int8:
        same = ("parameters", "trunk_parameters", "macs")
        int8 |= {key: result.get(key) for key in same} | {"bytes": result.get("int8_bytes")}
    own = {"rootstock": result} | ({"rootstock, int8": int8} if int8 else {})
    return {**own, **result.get("baselines", {})}


def _frontier(result: Result) -> str:
    methods = {printable(name): numbers for name, numbers in _methods(result).items()}
    measured = [each for each in methods.values() if each.get("test_accuracy") is not None]
    curve = result.get("curve", ())
    if not measured and not curve:
        return ""
    note = _note("Points are test accuracies with 95 % intervals; up and to the left is better.")
    return _figure(frontier(methods, curve), "accuracy against bytes, operations and time") + note


def _all_methods(result: Result) -> str:
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "parameters": ("parameters", _count),
        "trunk_parameters": ("of the trunk", _count),
        "bytes": ("MB", megabytes),
        "macs": ("MMAC", _millions),
        "p50_ms": ("p50, ms", _decimals),
        "val_accuracy": ("validation, %", percent),
        "val_loss": ("validation loss", _decimals),
        "test_accuracy": ("test, %", percent),
        "test_interval": ("95 % interval", _interval),
        "lead": ("lead, points", _points),
        "lead_interval": ("95 % interval", _interval),
    }
    rows = [
        (name, *(_shown(numbers.get(key), show) for key, (_, show) in columns.items()))
        for name, numbers in _methods(result).items()
    ]
    note = _note(
        "Lead: by how much the rootstock's test accuracy is above; its interval is paired, image "
        "by image."
    )
    table = _table(("", *(label for label, _ in columns.values())), rows, own=2)
    return table + note + _spread(result)


def _spread(result: Result) -> str:
    """How often int8 agrees with float32, and the spread over other draws of the images."""
    sentences = []
    agreement, draws = (result.get("int8") or {}).get("agreement"), result.get("draws") or ()
    if agreement is not None:
        sentences.append(f"int8 names the same class as float32 on {percent(agreement)} %.")
    if len(draws) > 1:
        sentences.append(
            f"The rootstock's head fitted on {len(draws)} other draws of training and validation "
            f"images: test mean {percent(fmean(draws))} %, standard deviation "
            f"{percent(stdev(draws))}."
        )
    return _note(" ".join(sentences)) if sentences else ""


def _recall(result: Result) -> str:
    recall = result.get("recall") or {}
    _, donor = reference_donor(result)
    others = donor.get("recall") or {}
    rows = [
        (name, _shown(share, percent), _shown(others.get(name), percent), _Bar(share or 0.0))
        for name, share in recall.items()
    ]
    return _table(("class", "rootstock, %", "donor, %", ""), rows) if rows else ""


def _confusion(result: Result) -> str:
    counts, classes = result.get("confusion"), result.get("classes", ())
    if not counts or not classes:
        return ""
    head = "".join(f"<th>{_text(name)}</th>" for name in classes)
    rows = []
    for true, (name, row) in enumerate(zip(classes, counts, strict=True)):
        total = max(1, sum(row))
        cells = (
            f'<td style="background: rgba(var(--{"strong" if true == predicted else "wrong"}), '
            f'{min(1.0, count / total):.2f})">{count or ""}</td>'
            for predicted, count in enumerate(row)
        )
        rows.append(f"<tr><th>{_text(name)}</th>{''.join(cells)}</tr>")
    note = _note("Rows are the true classes, columns the predicted ones, on the test images.")
    return (
        '<div class="wide"><table class="confusion"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _scion(result: Result) -> str:
    rows = [
        (
            layer["layer"],
            f"{layer['kept']:,} of {layer['channels']:,}",
            _Stripes(layer.get("read", ()), layer["channels"]),
            *_share(layer.get("hidden_kept", 0), layer.get("hidden", 0)),
        )
        for layer in result.get("scion", ())
    ]
    note = _note(
        "Read: features that the head reads, of all pooled features of the layer; a stripe for "
        "each, the means of all channels left, their spreads right. Hidden: channels inside the "
        "layer that were left, of those that could be removed."
    )
    return _table(("layer", "read", "", "hidden", ""), rows) + note if rows else ""


def _share(part: int, whole: int) -> tuple[str, "_Bar | str"]:
    return (f"{part:,} of {whole:,}", _Bar(part / whole)) if whole else ("", "")


def _mistakes(result: Result) -> str:
    figures = []
    for entry in result.get("mistakes", ()):
        image = _image(entry.get("thumbnail"), entry["name"])
        confidence = percent(entry["confidence"])
        figures.append(
            f"<figure>{image}<figcaption>{_text(entry['predicted'])} ({confidence} %), but "
            f"{_text(entry['label'])}<br>{_text(entry['name'])}</figcaption></figure>"
        )
    return f'<div class="mistakes">{"".join(figures)}</div>' if figures else ""


def _training(result: Result) -> str:
    history = result.get("history")
    return _figure(training_curves(history), "loss and accuracy by epoch") if history else ""


def _making(result: Result) -> str:
    images = result.get("images") or {}
    budget, rss = result.get("budget") or {}, result.get("peak_rss_bytes")
    facts = {
        "donor": result.get("donor"),
        "method": result.get("method"),
        "trunk": {True: "frozen", False: "fine-tuned"}.get(result.get("frozen")),  # type: ignore[arg-type]
        "budget": _budget(budget),
        "images": ", ".join(f"{count:,} {split}" for split, count in images.items()),
        "image size": f"{result['size']} × {result['size']}" if "size" in result else None,
        "epochs": result.get("epochs"),
        "seed": result.get("seed"),
        "seconds": result.get("seconds"),
        "peak memory of inference, MB": None if rss is None else f"{rss / 1e6:.0f}",
        **(result.get("versions") or {}),
    }
    return _table(("", ""), [(name, str(value)) for name, value in facts.items() if value])


_SECTIONS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("Donor and rootstock", _headline),
    ("Frontier", _frontier),
    ("All methods", _all_methods),
    ("Recall by class", _recall),
    ("Confusion", _confusion),
    ("The scion", _scion),
    ("What it gets wrong", _mistakes),
    ("Training", _training),
    ("What to know of the data", _warnings),
    ("How it was made", _making),
)


class _Bar(float):
    """A share between 0 and 1, drawn as a bar."""


@dataclass(frozen=True)
class _Stripes:
    """Some of `total` things in a row, drawn as stripes; runs are [first, behind the last]."""

    runs: Sequence[Sequence[int]]
    total: int


_Cell = str | _Bar | _Stripes


def _table(headers: Sequence[str], rows: Iterable[Sequence[_Cell]], own: int = 0) -> str:
    """Args: own: how many of the first rows are the rootstock's."""
    head = "".join(f"<th>{_text(header)}</th>" for header in headers)
    lines = []
    for index, row in enumerate(rows):
        mark = ' class="own"' if index < own else ""
        lines.append(f"<tr{mark}>{''.join(map(_cell, row))}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: _Cell) -> str:
    if isinstance(value, _Stripes):
        path = "".join(f"M{int(a)} 0H{int(b)}V1H{int(a)}z" for a, b in value.runs)
        box = f"0 0 {int(value.total)} 1"
        return (
            f'<td class="bar"><svg viewBox="{box}" preserveAspectRatio="none">'
            f'<path d="{path}"></path></svg></td>'
        )
    if isinstance(value, _Bar):
        return f'<td class="bar"><div style="width: {100 * min(1.0, value):.1f}%"></div></td>'
    return f"<td>{_text(value)}</td>"


def _list(entries: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(entry)}</li>" for entry in entries)
    return f"<ul>{items}</ul>" if items else ""


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _figure(source: str, description: str) -> str:
    return f'<img class="figure" src="{source}" alt="{_text(description)}">'


def _image(thumbnail: str | None, name: str) -> str:
    """A JPEG in base64; anything else is left out."""
    try:
        jpeg = base64.b64decode(thumbnail or "", validate=True)
    except ValueError:
        return ""
    source = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{source}" alt="{_text(name)}">' if jpeg else ""


def _text(value: str) -> str:
    return html.escape(printable(value))


def _budget(budget: Mapping[str, Any]) -> str | None:
    if budget.get("kind") == "bytes" and "text" in budget:
        return f"{budget['text']} ({round(budget['amount']):,} bytes)"
    return budget.get("text")


def _shown(value: Any, show: Callable[[Any], str]) -> str:
    return ABSENT if value is None else show(value)


def _count(value: int) -> str:
    return f"{value:,}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f}"


def _decimals(value: float) -> str:
    return f"{value:.3f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _interval(value: Sequence[float]) -> str:
    return f"{percent(value[0])} – {percent(value[1])}"


def frontier(methods: Mapping[str, Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy against bytes, multiply-accumulates and milliseconds.

    Args:
        methods: by name, the rootstock first: `test_accuracy`, `test_interval` and its costs. One
            without a cost is left out of that panel.
        curve: points of the frozen probes, drawn as a line of their validation accuracy.
    Returns: a data URI.
    """
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (cost, label, unit) in zip(panels, PANELS, strict=True):
            _draw_curve(axes, curve, cost, unit)
            for index, (name, numbers) in enumerate(methods.items()):
                if numbers.get(cost) and numbers.get("test_accuracy") is not None:
                    _draw_method(axes, index, name, numbers, numbers[cost] / unit)
            _scale(axes)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("accuracy, %")
        labelled: dict[str, Any] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            labelled |= dict(zip(labels, handles, strict=True))
        figure.legend(
            list(labelled.values()),
            list(labelled),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        return _as_uri(figure)


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Losses and validation accuracy by epoch. Returns: a data URI."""
    epochs = range(1, len(history) + 1)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
        for key, label, color in (
            ("train_loss", "training", LINE_COLOR),
            ("val_loss", "validation", OWN_COLOR),
        ):
            losses.plot(
                epochs, [epoch.get(key) for epoch in history], ".-", color=color, label=label
            )
        losses.set_ylabel("loss")
        losses.legend(frameon=False)
        shares = [100 * epoch["val_accuracy"] for epoch in history]
        accuracy.plot(epochs, shares, ".-", color=OWN_COLOR)
        accuracy.set_ylabel("validation accuracy, %")
        for axes in (losses, accuracy):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        return _as_uri(figure)


def _draw_curve(axes: Any, curve: Sequence[Mapping[str, Any]], cost: str, unit: float) -> None:
    points = sorted((p[cost] / unit, 100 * p["val_accuracy"]) for p in curve if p.get(cost))
    if points:
        label = "every cut, frozen (validation)"
        axes.plot(*zip(*points, strict=True), ".-", color=LINE_COLOR, lw=1, ms=3, label=label)


def _draw_method(axes: Any, index: int, name: str, numbers: Mapping[str, Any], cost: float) -> None:
    share = 100 * numbers["test_accuracy"]
    low, high = numbers.get("test_interval") or (numbers["test_accuracy"],) * 2
    axes.errorbar(
        [cost],
        [share],
        yerr=[[max(0.0, share - 100 * low)], [max(0.0, 100 * high - share)]],
        fmt=MARKERS[index % len(MARKERS)],
        color=OWN_COLOR if index == 0 else f"C{(index - 1) % 10}",
        ms=8 if index == 0 else 5,
        capsize=2,
        lw=1,
        label=name,
        zorder=3,
    )


def _scale(axes: Any) -> None:
    """A logarithmic axis with labels that are numbers, more of them on a short one."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low > SHORT_RANGE else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _as_uri(figure: Figure) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Browsers have the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
