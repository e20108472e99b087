"""Records of benchmarks: JSON lines that grow, short tables in a page, raw tables as CSV.

Imports neither torch nor graftkit: the parent of a memory measurement must stay small (speed.py).
"""

import argparse
import csv
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header and its rows, every cell as text."""


class Ledger:
    """A file of JSON lines: one record for every measurement, appended as soon as it is made."""

    def __init__(self, path: Path, script: str, arguments: Sequence[str], fresh: bool = False):
        self.path, self.fresh = path, fresh
        self.stamp = {
            "commit": commit(),
            "machine": machine(),
            "command": published_command(script, arguments),
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def records(self) -> list[Record]:
        """Everything in the file by now, another process's records too."""
        return read_records(self.path)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether this commit's record of `key` is there; changed sources never count as one."""
        return self.find(key) is not None

    def find(self, key: Mapping[str, Any]) -> Record | None:
        """This commit's newest record of `key`, None where it must be measured."""
        if self.fresh or self.stamp["commit"].endswith("-dirty"):
            return None
        expected = {**key, "commit": self.stamp["commit"]}
        matches = [r for r in self.records if all(r.get(k) == v for k, v in expected.items())]
        return matches[-1] if matches else None

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Append one record."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = {**self.stamp, "date": date, **key, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def command_line(page: str) -> argparse.ArgumentParser:
    """The options that every benchmark of the nursery has; `page`: a module's docstring."""
    parser = argparse.ArgumentParser(description=page.splitlines()[0])
    shared = os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the nursery")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure again what this commit has")
    parser.add_argument(
        "--report-only", action="store_true", help="write the page, measure nothing"
    )
    return parser


def read_records(path: Path) -> list[Record]:
    """Every record of a file, oldest first; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def newest(records: Iterable[Record], key: Sequence[str]) -> list[Record]:
    """The last record of every key, in the order in which the keys first appeared."""
    latest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        latest[tuple(record.get(name) for name in key)] = record
    return list(latest.values())


def commit() -> str:
    """The last commit that touched the package; -dirty where the package differs from it."""
    named = _git("log", "-1", "--format=%h", "--", "src/graftkit") or "unknown"
    return f"{named}-dirty" if _git("status", "--porcelain", "--", "src/graftkit") else named


def machine() -> dict[str, Any]:
    """Hardware and versions that timings depend on."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_gib": round(pages / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def published_command(script: str, arguments: Sequence[str]) -> str:
    """The command as it may be published: folders of this machine are left out."""
    return shlex.join([f"benchmarks/{script}", *_without_paths(arguments)])


def provenance(records: Sequence[Record]) -> str:
    """One line: when, on what and from which commits the records were measured."""
    dates = sorted(record["date"][:10] for record in records)
    commits = ", ".join(sorted({record["commit"] for record in records}))
    machines = {json.dumps(record["machine"], sort_keys=True) for record in records}
    hardware = "; ".join(_machine_line(json.loads(text)) for text in sorted(machines))
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"Measured {days} at commit {commits} on {hardware}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(docs: Path, name: str, text: str, raw: Mapping[str, Table]) -> None:
    """Put `text` between the markers `name` of docs/benchmarks.md, and raw tables beside it.

    Args:
        raw: by name of the file without its ending: `frontier-means` becomes
            docs/results/frontier-means.csv. Tables without rows are not written.

    Raises: ValueError when the page lacks the markers; then nothing is written.
    """
    write_between(docs / "benchmarks.md", name, text)
    for stem, (header, rows) in raw.items():
        if rows:
            write_csv(docs / "results" / f"{stem}.csv", header, rows)


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as CSV; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- name:begin --> and <!-- name:end -->, markers kept.

    Raises: ValueError when the page lacks the markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise ValueError(f"{page.name}: expected {begin} and {end}, once and in this order")
    page.write_text(pattern.sub(lambda m: f"{m[1]}{text.strip()}\n{m[2]}", old), encoding="utf-8")


def _machine_line(host: Mapping[str, Any]) -> str:
    return (
        f"{host['cpu']}, {host['cores']} cores, {host['ram_gib']} GiB RAM, {host['system']}, "
        f"Python {host['python']}, torch {host['torch']}, transformers {host['transformers']}"
    )


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']})" if "cpu family" in fields else name


def _without_paths(arguments: Sequence[str]) -> list[str]:
    public, skip = [], False
    for argument in arguments:
        names_folder = argument.split("=")[0] in ("--shared", "--out", "--docs", "--work")
        if not skip and not names_folder:
            public.append(argument)
        skip = names_folder and "=" not in argument
    return public


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()
