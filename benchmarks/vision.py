"""Features of a big vision network in a small one: python benchmarks/vision.py

Grafts the shared MobileNetV2 into rootstocks for the shared plant seedlings, frozen and fine-tuned,
by our method and the paper's, with every baseline, and compares cuts, poolings and views. Writes
the tables of docs/benchmarks.md; every run leaves its own page beside its networks.
"""

import argparse
import copy
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ledger import Ledger, Record, command_line
from vision_report import write_report

from graftkit.parallel import kept_memory
from graftkit.vision.baselines import PAPER_SCION, ROOTSTOCK, paper_network, trained_donor
from graftkit.vision.evaluate import Measurement, accuracy_lead, measure, score
from graftkit.vision.graft import GraftRun, GraftSettings, graft
from graftkit.vision.probe import ALL_VIEWS, FeatureTable, fit_probe
from graftkit.vision.training import SoftLabels

EPOCHS = 12
TUNED = "fine-tuned, 0.6 MiB"
RUNS: dict[str, dict[str, Any]] = {
    "frozen, 0.6 MB": {"budget": "0.6MB", "freeze": True, "baselines": True},
    "frozen, 2.25 MB": {"budget": "2.25MB", "freeze": True, "baselines": True},
    "paper's method, frozen, 2.5 MB": {
        "budget": "2.5MB",
        "freeze": True,
        "method": "paper",
        "baselines": True,
    },
    TUNED: {"budget": "0.6MiB", "epochs": EPOCHS, "baselines": True},
    "paper's method, fine-tuned, 2.5 MB": {"budget": "2.5MB", "epochs": EPOCHS, "method": "paper"},
}
MARGIN = "margin"
ORDERS = (0, 1, 2)  # seeds of a fine-tuning: the order of the images, and how they are turned
POOLED = {"mean": ("mean",), "mean and std": ("mean", "std")}
VIEWS = {"1": (0,), "2": (0, 4), "8": ALL_VIEWS}
CUTS = (8, 11, 14, 19)
QUICK_IMAGES = 5  # of every class and split
QUICK = {"epochs": 1, "baselines": False, "size": 64}


def run(options: argparse.Namespace, ledger: Ledger) -> None:
    """Measure what the ledger lacks."""
    images = options.shared / "data" / "vision" / "plant_seedlings_128.zip"
    donor = options.shared / "data" / "vision" / "mobilenet_v2_1.0_imagenet_fp16.npz"
    cache = options.work / "cache"
    if options.quick:
        images = few_images(images, options.work / "images")
    quick = QUICK if options.quick else {}
    for name in options.runs:
        settings = GraftSettings.checked(**(RUNS[name] | quick))
        key = {"run": name, "settings": settings.model_dump(), "quick": options.quick}
        if not ledger.has(key):
            folder = options.work / name.replace(" ", "-").replace(",", "").replace("'", "")
            result = graft(donor, images, folder, settings, cache, print_progress)
            ledger.add(key, {k: v for k, v in result.items() if k not in ("mistakes", "curve")})
            print(
                name, result["val_accuracy"], result["test_accuracy"], file=sys.stderr, flush=True
            )
    settings = GraftSettings.checked(**(RUNS[TUNED] | quick))
    key = {"run": MARGIN, "settings": settings.model_dump(), "quick": options.quick}
    if options.margin and not ledger.has(key):
        orders = ORDERS[:1] if options.quick else ORDERS
        ledger.add(key, margin(donor, images, settings, cache, orders))
    key = {"run": "features", "quick": options.quick}
    if options.features and not ledger.has(key):
        cache.mkdir(parents=True, exist_ok=True)
        run = GraftRun(GraftSettings(budget="1MB"), cache, print_progress)
        cuts = run.prepare(donor, images)
        ledger.add(key, {"lines": features(cuts.table, len(cuts.images.classes))})


@kept_memory()
def margin(
    donor: Path, images: Path, settings: GraftSettings, cache: Path, orders: Sequence[int]
) -> Record:
    """The rootstock and the paper's scion of equal size, each fine-tuned in several orders.

    All learn from one fine-tuned donor. The lead's interval is over test images, of which each
    counts with the share of the orders that answer it rightly.
    """
    run = GraftRun(settings, cache, print_progress)
    pretrained = run.prepare(donor, images)
    tuned = trained_donor(run.trainer(pretrained), pretrained.donor, pretrained.images)
    cuts = pretrained.after_fine_tuning(tuned.rootstock, cache, print_progress)
    rootstock = run.assemble(cuts, run.choose(cuts, thin=True))
    paper = paper_network(cuts, rootstock)
    assert paper is not None  # the paper's shallowest scion is smaller than this budget
    untrained = {ROOTSTOCK: rootstock, PAPER_SCION: paper}
    measured: dict[str, list[Measurement]] = {name: [] for name in untrained}
    for seed in orders:
        folder = cache if seed == settings.seed else cache / f"order-{seed}"
        ordered = GraftRun(settings.model_copy(update={"seed": seed}), folder, print_progress)
        trainer, soft_labels = ordered.trainer(cuts), SoftLabels(tuned.rootstock)
        for name, start in untrained.items():
            network = trainer.tune(name, copy.deepcopy(start), soft_labels).rootstock
            file = cache / "margin.onnx"
            measured[name].append(measure(network, cuts.images, file, cuts.donor.name))
            print(seed, name, measured[name][-1].test.accuracy, file=sys.stderr, flush=True)
    shares = [np.mean([one.test.right for one in every], axis=0) for every in measured.values()]
    lead, interval = accuracy_lead(*shares)
    lines = {
        name: [
            {"val": one.val.accuracy, "test": one.test.accuracy, "bytes": one.bytes}
            for one in every
        ]
        for name, every in measured.items()
    }
    return {"lines": lines, "lead": lead, "lead_interval": list(interval)}


def features(table: FeatureTable, classes: int) -> list[Record]:
    """Accuracy of frozen features by cut, pooling and the views of the training images."""
    lines = []
    for cut in CUTS:
        for pooled, poolings in POOLED.items():
            columns = table.columns(range(cut), poolings)
            val, (test, labels) = table.of("val", columns), table.of("test", columns)
            for views, chosen in VIEWS.items():
                probe = fit_probe(table.of("train", columns, chosen), val, classes)
                scores = score(probe.logits(test), labels.numpy())
                line = {"cut": cut, "pooled": pooled, "views": views}
                accuracies = {"val": probe.val_accuracy, "test": scores.accuracy}
                lines.append(line | {"features": len(columns)} | accuracies)
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def few_images(archive: Path, folder: Path) -> Path:
    """The first images of every class and split of a zip, as a folder."""
    counts: dict[str, int] = {}
    with zipfile.ZipFile(archive) as source:
        for name in sorted(source.namelist()):
            place = name.rpartition("/")[0]
            counts[place] = counts.get(place, 0) + 1
            if name.endswith(".jpg") and counts[place] <= QUICK_IMAGES:
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(source.read(name))
    return folder


def print_progress(step: str, done: int, total: int) -> None:
    """Progress of a long step, a line at its end."""
    if done == total:
        print(f"{step}: {total}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--runs", nargs="*", default=tuple(RUNS), choices=tuple(RUNS))
    parser.add_argument("--quick", action="store_true", help="a few small images and one epoch")
    parser.add_argument("--no-features", dest="features", action="store_false")
    parser.add_argument("--no-margin", dest="margin", action="store_false")
    options = parser.parse_args(arguments)
    options.work = options.out / ("vision-quick" if options.quick else "vision")
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    ledger = Ledger(options.out / "vision.jsonl", "vision.py", given, options.fresh)
    if not options.report_only:
        run(options, ledger)
    write_report([record for record in ledger.records if not record["quick"]], options.docs)


if __name__ == "__main__":
    main()
