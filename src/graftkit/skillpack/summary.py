"""What a pack holds, in numbers: for `pack --json`, `inspect` and tables."""

from typing import Any

from graftkit.skillpack import SkillPack


def tensor_summaries(pack: SkillPack) -> list[dict[str, Any]]:
    """One entry per tensor: name, kind, codec, rank, shape, bytes, bits per parameter, error."""
    rows = []
    for record in pack.manifest.tensors:
        nbytes = len(pack.payload(record.name))
        details = pack.describe(record.name)
        rows.append(
            {
                "name": record.name,
                "kind": record.kind,
                "codec": record.codec,
                "rank": details.pop("rank", None),
                "shape": list(record.result_shape),
                "bytes": nbytes,
                "bits_per_parameter": _rounded(8 * nbytes / max(1, record.numel)),
                "relative_error": record.error,
                **details,
            }
        )
    return rows


def pack_summary(pack: SkillPack) -> dict[str, Any]:
    """The numbers of the whole pack; `ratio` is pack bytes over target bytes."""
    manifest = pack.manifest
    size = pack.pack_bytes
    return {
        "pack_bytes": size,
        "target_bytes": manifest.target.bytes,
        "ratio": size / max(1, manifest.target.bytes),
        "bits_per_parameter": 8 * size / max(1, manifest.target.parameters),
        "bound_bits_per_parameter": manifest.bound_bits_per_parameter,
        "recipe": manifest.recipe,
        "budget_bytes": manifest.budget_bytes,
        "target": manifest.target.name,
        "tuned": manifest.tuned.name,
        "tensors": tensor_summaries(pack),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
