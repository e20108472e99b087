"""One measurement in a process of its own: takes a task as JSON, prints its result as JSON.

Peak memory belongs to a process, so no two measurements may share one.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftkit.attachment import attach
from graftkit.checkpoint import Checkpoint
from graftkit.models.loading import load_model
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack


class StageClock:
    """Seconds of every step that `pack_delta` reports, by its progress callback.

    peaks: highest resident memory of the process up to the end of each step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.step, self.since = "reading", time.perf_counter()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Count the time since the last call for the step that was under way."""
        now = time.perf_counter()
        self.seconds[self.step] = self.seconds.get(self.step, 0.0) + now - self.since
        self.peaks[self.step] = _peak_bytes()
        self.step, self.since = step, now


def pack(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds, stages, bytes and peak memory of one call of `pack_delta`."""
    target = Checkpoint.open(spec["target"])
    before, load = _peak_bytes(), os.getloadavg()[0]
    clock = StageClock()
    start = time.perf_counter()
    made = pack_delta(
        spec["target"],
        spec["tuned"],
        budget=spec["budget"],
        recipe=spec["recipe"],
        servable=spec["servable"],
        calibration=spec["rows"],
        workers=spec["workers"],
        progress=clock,
    )
    clock("writing", 0, 1)
    made.save(spec["pack"])
    clock("done", 1, 1)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_seconds": sum(os.times()[:2]),
        "load_before": load,
        "seconds_per_million": seconds / target.parameters * 1e6,
        "stages": {step: round(value, 3) for step, value in clock.seconds.items()},
        "peaks": clock.peaks,
        "bytes": Path(spec["pack"]).stat().st_size,
        "parameters": target.parameters,
        "largest": max(info.numel for info in target.tensors.values()),
        "peak_rss": _peak_bytes(),
        "rss_imports": before,
    }


def use(spec: dict[str, Any]) -> dict[str, Any]:
    """Processor milliseconds to open a pack, to attach and detach it, and to read tuned instead."""
    model: Any = load_model(spec["target"])
    tuned, repeats, file = Checkpoint.open(spec["tuned"]), spec["repeats"], spec["pack"]
    times = {"load_before": os.getloadavg()[0]}
    times["read_tuned_ms"] = _median(lambda: _read_into(model, tuned), repeats)
    # The model now holds the tuned weights; the target's come back the same way.
    _read_into(model, Checkpoint.open(spec["target"]))
    times["load_ms"] = _median(lambda: SkillPack.load(file), repeats)
    opened = SkillPack.load(file)
    for mode in ("merged", "side"):
        attached, detached = [], []
        for _ in range(repeats):
            start = time.process_time()
            attachment = attach(model, opened, mode=mode)  # type: ignore[arg-type]
            attached.append(1e3 * (time.process_time() - start))
            detached.append(_milliseconds(attachment.detach))
        times[f"attach_{mode}_ms"] = statistics.median(attached)
        times[f"detach_{mode}_ms"] = statistics.median(detached)
    return times


def build(spec: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint of real shapes."""
    import synthetic

    synthetic.build(spec["case"], Path(spec["folder"]), Path(spec["tokenizer"]))
    return {"peak_rss": _peak_bytes()}


def _read_into(model: Any, checkpoint: Checkpoint) -> None:
    """Overwrite every weight of a live model: what switching costs without packs."""
    weights = dict(model.named_parameters())
    for name in checkpoint.tensors:
        weights[name].data.copy_(checkpoint.read(name))


def _milliseconds(work: Callable[[], object]) -> float:
    """Of processor time, which other work on the machine hardly moves."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def _median(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(_milliseconds(work) for _ in range(repeats))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps({"pack": pack, "use": use, "build": build}[task["task"]](task)))
