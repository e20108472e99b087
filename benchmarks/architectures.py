"""Is every architecture of transformers right or refused? python benchmarks/architectures.py

Builds a tiny model of every model type, moves all its weights, and looks at what graftkit does
with the two: pack without loss and merge, attach (merged, beside, rows of one batch by different
models), export to PEFT. Each type has a process of its own. Writes docs/results/architectures.csv
and the tables of docs/benchmarks.md.
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from architecture_checks import check_type
from architectures_report import write_report
from ledger import ROOT, Ledger, Record
from tiny_architectures import NotBuilt, model_types

# Limits of one process: seconds on the processor and on the clock, memory that it may address.
CPU_SECONDS, SECONDS, GIB = 120, 900, 8
# Every type's process is a fork of one that has imported everything and run nothing: a fork of a
# process whose threads hash (BLAKE3 keeps some) would wait for threads that it does not have.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["peft", "transformers.models.auto.modeling_auto", "graftkit.attachment", "graftkit.pack"]
)


def check_all(names: list[str], jobs: int = 1, quick: bool = False) -> Iterator[Record]:
    """One record a type, in the order in which they end; each in a process with limits.

    A record holds `type`, `seconds`, and `cells`, `unbuilt` (a reason) or `ended` (an exit status).
    """
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            reader, process = _started(waiting[0], quick)
            running[reader] = (waiting.pop(0), process, time.time())
        ready = wait(list(running), timeout=1)
        for reader, (name, process, since) in list(running.items()):
            late = time.time() - since > SECONDS
            if reader not in ready and not late:
                continue
            if late:
                process.kill()
            record = _received(reader)
            process.join()
            if record is None:
                record = {"ended": "out of time" if late else _end(process.exitcode)}
            del running[reader]
            yield {"type": name, **record, "seconds": round(time.time() - since, 1)}


def _end(status: int) -> str:
    return "out of time" if status == -signal.SIGXCPU else f"exit {status}"


def _started(name: str, quick: bool) -> tuple[Connection, Any]:
    reader, writer = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_check_one, args=(name, quick, writer), daemon=True)
    process.start()
    writer.close()
    return reader, process


def _received(reader: Connection) -> Record | None:
    try:
        record: Record | None = reader.recv() if reader.poll() else None
    except (EOFError, OSError):
        record = None
    reader.close()
    return record


def _check_one(name: str, quick: bool, writer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="architecture-"))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    try:
        writer.send(check_type(name, folder, quick))
    except NotBuilt as error:
        writer.send({"unbuilt": " ".join(str(error).split())[:300]})
    except BaseException as error:
        writer.send({"ended": f"{type(error).__name__}: {error}"[:300]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check what the ledger lacks, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="comma-separated; default: every one")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--quick", action="store_true", help="leave out the single matrices")
    parser.add_argument("--fresh", action="store_true", help="check again what this commit has")
    parser.add_argument("--json", action="store_true", help="print every record as a line of JSON")
    parser.add_argument("--report-only", action="store_true", help="write the page, check nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    names = options.types.split(",") if options.types else model_types()
    if unknown := sorted(set(names) - set(model_types())):
        parser.error(f"transformers has no model of type {', '.join(unknown)}")
    ledger = Ledger(options.out / "architectures.jsonl", "architectures.py", given, options.fresh)
    done = [r for name in names if (r := ledger.find({"type": name, "quick": options.quick}))]
    left = [name for name in names if name not in {record["type"] for record in done}]
    if options.report_only:
        left = []
    for record in check_all(left, options.jobs, options.quick):
        key = {"type": record.pop("type"), "quick": options.quick}
        ledger.add(key, record)
        print(json.dumps(key | record) if options.json else _line(key["type"], record), flush=True)
    if not options.types:
        write_report([r for r in ledger.records if r["quick"] == options.quick], options.docs)


def _line(name: str, record: Record) -> str:
    cells = record.get("cells")
    if cells is None:
        return f"{name}: {record.get('unbuilt') or record.get('ended')}"
    words = " ".join(f"{cell}={result['verdict']}" for cell, result in cells.items())
    return f"{name} ({record['seconds']} s): {words}"


if __name__ == "__main__":
    main()
