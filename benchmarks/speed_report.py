"""Tables of speed.py: read from records, written into the page."""

from collections.abc import Sequence
from pathlib import Path

from ledger import Record, newest, provenance, table, write_between

KEY = ("task", "case", "recipe", "calibrated", "workers", "budget", "servable", "full_svd")
DEFAULTS: Record = {"budget": "5%", "servable": False, "full_svd": False}  # of older records
GOAL = 5
"""Times that packing with `auto` should be faster than `graftllm` with full decompositions."""
CASES = {
    "nursery": "nursery, 7.9 M parameters",
    "qwen": "Qwen2.5-0.5B's shapes, 494 M, random weights",
    "llama": "one layer of Llama-3.1-8B's shapes, 222 M, random weights",
}
PARTS = ("spectra", "coding in all", "entropy coding", "decoding for the error")
DECODING = {
    "entropy, M symbols/s": "entropy_msymbols",
    "product, GFLOP/s": "product_gflops",
    "plain matmul, GFLOP/s": "matmul_gflops",
    "add and round, GB/s": "add_gbytes",
    "plain copy, GB/s": "copy_gbytes",
    "entropy, s": "entropy_seconds",
    "product, s": "product_seconds",
    "add, s": "add_seconds",
}
STAGES = ("reading", "calibrating", "exact tensors", "measuring", "compressing", "writing")
USES = {
    "load": "load_ms",
    "inspect": "inspect_ms",
    "attach merged": "attach_merged_ms",
    "detach": "detach_merged_ms",
    "attach side": "attach_side_ms",
    "detach side": "detach_side_ms",
    "read tuned, cached": "read_tuned_ms",
    "read tuned, cold": "read_tuned_cold_ms",
}
LLAMA_LAYERS, LLAMA_LAYER_MILLIONS = 32, 218.1


def memory_bound(largest: int) -> int:
    """Most bytes that packing may have resident: 1 GB and six times the largest tensor in fp32."""
    return 10**9 + 6 * 4 * largest


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write everything that `speed` says in docs/benchmarks.md.

    The newest record of every line counts, whatever commit it is from; the commits are named.
    """
    lines = newest([DEFAULTS | record for record in records], KEY)
    if not lines:
        return
    packs = [line for line in lines if line["task"] == "pack"]
    uses = [line for line in lines if line["task"] == "use"]
    parts = [provenance(lines), _load(packs), _verdict(packs)]
    for case, title in CASES.items():
        own = [line for line in packs if line["case"] == case]
        if own:
            parts += [f"#### {title}", _pack_table(own), _ratio(own), _stage_table(own)]
            parts.append(_parts_table(own))
        if case == "llama" and own:
            parts.append(_extrapolated(own))
        used = [line for line in uses if line["case"] == case]
        if used:
            parts += ["Milliseconds, medians:\n\n" + _use_table(used), _against_disk(used)]
        parts.append(
            _decode_table([x for x in lines if (x["task"], x["case"]) == ("decode", case)])
        )
    write_between(docs / "benchmarks.md", "speed", "\n\n".join(part for part in parts if part))


def _name(line: Record) -> str:
    extras = {
        line["budget"]: line["budget"] != DEFAULTS["budget"],
        "servable": line["servable"],
        "full SVDs": line["full_svd"],
        "rows": line["calibrated"],
    }
    return ", ".join([line["recipe"], *(name for name, said in extras.items() if said)])


def _finished(lines: Sequence[Record]) -> list[Record]:
    return [line for line in lines if "seconds" in line]


def _load(packs: Sequence[Record]) -> str:
    """How busy the machine was with other work, which wall times cannot tell apart."""
    loads = [line["load_before"] for line in _finished(packs)]
    if not loads:
        return ""
    return (
        f"Load average when a measurement began: {min(loads):.1f} to {max(loads):.1f}. Where it is "
        "near the number of cores or above, wall times are too long; processor times hold."
    )


def _verdict(packs: Sequence[Record]) -> str:
    """One sentence: does peak memory stay below the bound everywhere."""
    measured = _finished(packs)
    broken = [line for line in measured if line["peak_rss"] > memory_bound(line["largest"])]
    bound = "1 GB + 6 x the largest tensor in fp32"
    if not broken:
        return f"Peak memory: all {len(measured)} packs stayed below {bound}."
    worst = ", ".join(f"{x['case']} {_name(x)} with {x['workers']} workers" for x in broken)
    return f"Peak memory: {len(broken)} of {len(measured)} packs went beyond {bound}: {worst}."


def _pack_table(lines: Sequence[Record]) -> str:
    header = (
        "pack", "workers", "s", "s / M parameters", "CPU s / M", "peak RSS, MB", "bound, MB",
        "RSS / bound", "bytes",
    )  # fmt: skip
    return table(header, [_pack_row(line) for line in lines])


def _pack_row(line: Record) -> list[str]:
    head = [_name(line), str(line["workers"])]
    if "seconds" not in line:
        minutes = line["stopped_after_seconds"] / 60
        return [*head, f"stopped after {minutes:.0f} min", *["–"] * 6]
    bound = memory_bound(line["largest"])
    return [
        *head,
        f"{line['seconds']:.1f}",
        f"{line['seconds_per_million']:.3f}",
        f"{1e6 * line['cpu_seconds'] / line['parameters']:.3f}",
        f"{line['peak_rss'] / 1e6:,.0f}",
        f"{bound / 1e6:,.0f}",
        f"{line['peak_rss'] / bound:.2f}",
        f"{line['bytes']:,}",
    ]


def _stage_table(lines: Sequence[Record]) -> str:
    rows = [
        [_name(x), str(x["workers"]), *(f"{x['stages'].get(s, 0.0):.1f}" for s in STAGES)]
        for x in _finished(lines)
    ]
    steps = "Seconds by step:\n\n" + table(("pack", "workers", *STAGES), rows)
    rows = [
        [_name(x), str(x["workers"]), *(_megabytes(x.get("peaks", {}).get(s)) for s in STAGES)]
        for x in _finished(lines)
    ]
    peaks = "Peak RSS up to the end of each step, MB:\n\n"
    return f"{steps}\n\n{peaks}{table(('pack', 'workers', *STAGES), rows)}"


def _ratio(lines: Sequence[Record]) -> str:
    """Processor time of packing against the paper's recipe with full decompositions."""
    full = [x for x in _finished(lines) if x["full_svd"]]
    if not full:
        return ""
    whole = full[-1]["cpu_seconds"]
    own = [x for x in _finished(lines) if x["recipe"] == "auto"]
    ratios = ", ".join(f"{_name(x)}: {whole / x['cpu_seconds']:.1f}" for x in own)
    reached = all(whole >= GOAL * x["cpu_seconds"] for x in own)
    return (
        f"Times faster per parameter than graftllm with full SVDs, by processor time: {ratios}. "
        f"The goal of {GOAL} is {'reached' if reached else '**not reached**'}."
    )


def _parts_table(lines: Sequence[Record]) -> str:
    found = [line for line in _finished(lines) if "parts" in line]
    if not found:
        return ""
    rows = [
        [_name(x), str(x["workers"]), str(x["rounds"]), *(f"{x['parts'][p]:.1f}" for p in PARTS)]
        for x in found
    ]
    title = "Processor seconds inside some functions, and passes over the tensors to code them:"
    return f"{title}\n\n{table(('pack', 'workers', 'passes', *PARTS), rows)}"


def _against_disk(lines: Sequence[Record]) -> str:
    """Attaching merged against reading the tuned weights from disk."""
    found = [line for line in lines if "disk_mbytes" in line]
    if not found:
        return ""
    ratios = ", ".join(
        f"{_name(x)}: {x['attach_merged_ms'] / x['read_tuned_cold_ms']:.1f} (wall), "
        f"{x['attach_merged_cpu_ms'] / 1e3:.1f} s of processor time"
        for x in found
    )
    speeds = [x["disk_mbytes"] for x in found]
    reached = all(x["attach_merged_ms"] <= x["read_tuned_cold_ms"] for x in found)
    return (
        f"Attaching merged takes so many times as long as reading the tuned checkpoint cold, from "
        f"a disk of {min(speeds):,.0f} to {max(speeds):,.0f} MB/s: {ratios}. The goal of 1 is "
        f"{'reached' if reached else '**not reached**'}."
    )


def _decode_table(lines: Sequence[Record]) -> str:
    if not lines:
        return ""
    rows = [[_name(x), *(f"{x[name]:.1f}" for name in DECODING.values())] for x in lines]
    title = "Decoding the factored tensors on one core, beside what the machine gives there:"
    return f"{title}\n\n{table(('pack', *DECODING), rows)}"


def _use_table(lines: Sequence[Record]) -> str:
    rows = [[_name(x), *(_milliseconds(x.get(name)) for name in USES.values())] for x in lines]
    return table(("pack", *USES), rows)


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _extrapolated(lines: Sequence[Record]) -> str:
    """Time of all layers from the time of one; memory and embeddings are not extrapolated."""
    millions = LLAMA_LAYERS * LLAMA_LAYER_MILLIONS
    rows = []
    for line in _finished(lines):
        minutes = line["seconds_per_million"] * millions / 60
        cpu = line["cpu_seconds"] / line["parameters"] * 1e6 * millions / 60
        rows.append([_name(line), str(line["workers"]), f"{minutes:.0f}", f"{cpu:.0f}"])
    title = (
        f"**Extrapolated** to {LLAMA_LAYERS} layers ({millions / 1e3:.2f} G parameters, embedding "
        "and head left out), from seconds per parameter of the one layer:"
    )
    header = ("pack", "workers", "minutes, extrapolated", "CPU minutes, extrapolated")
    return f"{title}\n\n{table(header, rows)}"
