"""The table of transfer.py: the skill's gain, the part of it that a pack keeps, other skills."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ledger import Record, newest, provenance, table, write_between

KEY = ("way", "seed", "prompts", "epochs")


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write the part `transfer` of docs/benchmarks.md, from the newest record of every run."""
    lines = newest(records, KEY)
    before = [line for line in lines if line["way"] == "target"]
    runs = [line for line in lines if line["way"] != "target"]
    if not before or not runs:
        return
    parts = [provenance(lines), _untouched(before[-1]), _table(runs, before[-1])]
    write_between(docs / "benchmarks.md", "transfer", "\n\n".join(parts))


def _untouched(line: Record) -> str:
    others = ", ".join(
        f"{name} {line[name]:.2f}"
        for name in ("sms_spam", "scan_actions", "zh_pinyin", "addition_synth")
    )
    return (
        f"Exact match of the source on the skill: {line['source']:.3f}; of the target: "
        f"{line['skill']:.3f}, and on what it knows {line['others']:.3f} ({others})."
    )


def _table(runs: Sequence[Record], before: Record) -> str:
    header = (
        *("way", "draws", "tuned, skill", "lowest to highest", "of the source's"),
        *(
            "pack keeps of the gain",
            "pack, KB",
            "others, tuned",
            "others, packed",
            "CPU s, at most",
        ),
    )
    ways = list(dict.fromkeys(line["way"] for line in runs))
    return table(header, [_row(way, runs, before) for way in ways])


def _row(way: str, runs: Sequence[Record], before: Record) -> list[str]:
    lines = [line for line in runs if line["way"] == way]
    skill = [line["skill"] for line in lines]
    gains = [line["skill"] - before["skill"] for line in lines]
    kept = [
        (line["packed_skill"] - before["skill"]) / gain
        for line, gain in zip(lines, gains, strict=True)
        if gain > 0
    ]
    return [
        way,
        str(len(lines)),
        f"{mean(skill):.3f}",
        f"{min(skill):.3f} to {max(skill):.3f}",
        f"{mean(skill) / before['source']:.2f}",
        f"{mean(kept):.3f}" if kept else "–",
        f"{mean(line['pack_bytes'] for line in lines) / 1000:,.0f}",
        f"{mean(line['others'] for line in lines):.3f}",
        f"{mean(line['packed_others'] for line in lines):.3f}",
        # A continued run counts only its own seconds.
        f"{max(line['cpu_seconds'] for line in lines):,.0f}",
    ]
