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

from speed_stages import Parts, decode_stages, use_full_svd

from graftkit.attachment import attach
from graftkit.checkpoint import Checkpoint
from graftkit.models.loading import load_model
from graftkit.packing import pack_delta
from graftkit.skillpack import SkillPack


class StageClock:
    """Seconds of every step that `pack_delta` reports, by its progress callback.

    peaks: highest resident memory of the process up to the end of each step.
    starts: how often each step began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.step, self.since = "reading", time.perf_counter()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Count the time since the last call for the step that was under way."""
        now = time.perf_counter()
        self.seconds[self.step] = self.seconds.get(self.step, 0.0) + now - self.since
        self.peaks[self.step] = _peak_bytes()
        self.step, self.since = step, now
        self.starts[step] = self.starts.get(step, 0) + (done == 0)


def pack(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds, stages, bytes and peak memory of one call of `pack_delta`."""
    target = Checkpoint.open(spec["target"])
    before, load = _peak_bytes(), os.getloadavg()[0]
    if spec["full_svd"]:
        use_full_svd()
    clock, parts = StageClock(), Parts()
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
        "parts": {part: round(value, 3) for part, value in parts.seconds.items()},
        "rounds": clock.starts.get("compressing", 0),
        "peaks": clock.peaks,
        "bytes": Path(spec["pack"]).stat().st_size,
        "parameters": target.parameters,
        "largest": max(info.numel for info in target.tensors.values()),
        "peak_rss": _peak_bytes(),
        "rss_imports": before,
    }


def use(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds to open a pack, to attach and detach it, and to read tuned instead."""
    model: Any = load_model(spec["target"])
    tuned = Checkpoint.open(spec["tuned"])
    load = os.getloadavg()[0]
    found = {"read_tuned_cold_ms": _milliseconds(lambda: _read_into(model, tuned, cold=True))}
    disk = tuned.nbytes / found["read_tuned_cold_ms"] / 1e3
    found |= {"disk_mbytes": disk, "load_before": load}
    # The model now holds the tuned weights; the target's come back the same way.
    found["read_tuned_ms"] = _median(lambda: _read_into(model, tuned), spec["repeats"])
    _read_into(model, Checkpoint.open(spec["target"]))
    file = spec["pack"]
    found["load_ms"] = _median(lambda: SkillPack.load(file), spec["repeats"])
    opened = SkillPack.load(file)
    names = [record.name for record in opened.manifest.tensors]
    found["inspect_ms"] = _median(lambda: [opened.describe(n) for n in names], spec["repeats"])
    for mode in ("merged", "side"):
        attached, detached, busy = [], [], []
        for _ in range(spec["repeats"]):
            start, busy_start = time.perf_counter(), time.process_time()
            attachment = attach(model, opened, mode=mode)  # type: ignore[arg-type]
            busy.append(1e3 * (time.process_time() - busy_start))
            attached.append(1e3 * (time.perf_counter() - start))
            detached.append(_milliseconds(attachment.detach))
        found[f"attach_{mode}_ms"] = statistics.median(attached)
        found[f"detach_{mode}_ms"] = statistics.median(detached)
        found[f"attach_{mode}_cpu_ms"] = statistics.median(busy)
    return found


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """Rates of the stages of decoding, beside those of the machine."""
    opened = SkillPack.load(spec["pack"])
    return {"load_before": os.getloadavg()[0]} | decode_stages(
        opened, Checkpoint.open(spec["target"])
    )


def build(spec: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint of real shapes."""
    import synthetic

    synthetic.build(spec["case"], Path(spec["folder"]), Path(spec["tokenizer"]))
    return {"peak_rss": _peak_bytes()}


def _read_into(model: Any, checkpoint: Checkpoint, cold: bool = False) -> None:
    """Overwrite every weight of a live model from disk: what switching costs without packs."""
    for file in {info.file for info in checkpoint.tensors.values()} if cold else ():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    weights = dict(model.named_parameters())
    for name in checkpoint.tensors:
        weights[name].data.copy_(checkpoint.read(name))


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _median(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(_milliseconds(work) for _ in range(repeats))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(
        json.dumps(
            {"pack": pack, "use": use, "decode": decode, "build": build}[asked["task"]](asked)
        )
    )
