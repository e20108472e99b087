"""Write tests/golden: one tiny pack of the current version, its target and its decoded tensors.

Run once per format version; the files are never made anew, so this refuses to replace them.
"""

import json
import sys
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import Tensor

from graftkit.checkpoint import (
    DTYPE_NAMES,
    DTYPES,
    TENSOR_DIGEST_HEX,
    Checkpoint,
    fingerprint,
    tensor_digest,
)
from graftkit.compress.codecs import (
    CodedDense,
    CodedHybrid,
    CodedLowRank,
    Dense,
    LowRankTiers,
    Precision,
    Sparse,
    Statistics,
    TensorLayout,
    decode_delta,
    encode_matrix,
    join_payloads,
    matrices,
)
from graftkit.compress.exact import encode_exact
from graftkit.compress.lowrank import Tier, eigenbasis
from graftkit.skillpack import SkillPack
from graftkit.skillpack.container import file_entry, payloads_digest
from graftkit.skillpack.manifest import (
    FORMAT_VERSION,
    CalibrationInfo,
    Manifest,
    Omission,
    TargetInfo,
    TensorRecord,
    TunedInfo,
)
from graftkit.skillpack.pack import encode_file

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TIERS = LowRankTiers((Tier(8, 1), Tier(4, 2), Tier(2, 2)))
LEVEL = 0.004  # about half of what a weight changes by: codes of one digit
COARSE = 10.0  # every code is zero, and every component is dropped
CONFIG = b'{"model_type": "tiny", "vocab_size": %d, "hidden_size": 16}\n'
FILES = {  # name: (target's, tuned model's)
    "config.json": (CONFIG % 10, CONFIG % 13),
    "generation_config.json": (b'{"eos": 2, "top_k": 50}\n', b'{"eos": 2}\n'),
    "chat_template.jinja": (None, b"{% for m in messages %}<s>{{ m }}</s>{% endfor %}\n"),
}

# name: (dtype, shape, kind, layout, precision); None is codec `exact`, "zero" is unchanged.
TENSORS: dict[str, tuple[str, tuple[int, ...], str, TensorLayout, Precision | str | None]] = {
    "embed.weight": ("BF16", (10, 16), "embedding", "matrix", Dense(4)),
    "h.0.attn.q.weight": ("BF16", (24, 20), "attention", "matrix", TIERS),
    "h.0.attn.v.weight": ("BF16", (5, 150), "attention", "matrix", Dense(3)),
    "h.0.conv.weight": ("F32", (4, 3, 2), "other", "matrix", Dense(8)),
    "h.0.experts.down": ("BF16", (2, 12, 16), "mlp", "stack", TIERS),
    "h.0.experts.up": ("F16", (2, 16, 12), "mlp", "stack_transposed", Dense(5)),
    "h.0.gate.weight": ("BF16", (6, 12), "router", "matrix", CodedLowRank(2, COARSE)),
    "h.0.mlp.weight": ("F16", (20, 24), "mlp", "transposed", TIERS),
    "h.0.norm.weight": ("BF16", (16,), "norm", "matrix", None),
    "h.0.position_ids": ("I64", (1, 6), "other", "matrix", "zero"),
    "h.1.attn.k.weight": ("BF16", (18, 20), "attention", "matrix", CodedDense(LEVEL)),
    "h.1.attn.o.weight": ("BF16", (20, 24), "attention", "matrix", CodedHybrid(2, LEVEL)),
    "h.1.attn.q.weight": ("BF16", (24, 20), "attention", "matrix", CodedLowRank(6, LEVEL)),
    "h.1.attn.v.weight": ("F32", (5, 150), "attention", "matrix", CodedDense(LEVEL)),
    "h.1.experts.down": ("BF16", (2, 12, 16), "mlp", "stack", CodedLowRank(5, LEVEL)),
    "h.1.experts.up": ("F16", (3, 16, 12), "mlp", "stack_transposed", CodedDense(LEVEL)),
    "h.1.mlp.weight": ("F32", (12, 12), "mlp", "matrix", None),
    "h.1.norm.weight": ("F32", (16,), "norm", "matrix", "zero"),
    "h.2.attn.o.weight": ("F16", (12, 14), "attention", "transposed", CodedHybrid(2, LEVEL)),
    "h.2.attn.q.weight": ("F16", (14, 12), "attention", "transposed", CodedLowRank(6, LEVEL)),
    "lookup.weight": ("BF16", (30, 16), "embedding", "matrix", Sparse(130)),
    "rare.weight": ("BF16", (8, 64), "embedding", "matrix", Sparse(6)),
    "vocabulary.bias": ("BF16", (12,), "bias", "matrix", None),
}
CALIBRATED = {"h.1.attn.q.weight", "h.1.attn.v.weight", "h.1.experts.up", "h.2.attn.o.weight"}
RESIZED = {"embed.weight": 13, "vocabulary.bias": 9}
TUNED_DTYPE = {"vocabulary.bias": "F32"}


def make_states(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Seeded tensors of the target, and a small change of each."""
    generator = torch.Generator().manual_seed(seed)
    target, tuned = {}, {}
    for name, (dtype, shape, *_, precision) in TENSORS.items():
        if dtype == "I64":
            target[name] = tuned[name] = torch.arange(6).reshape(shape)
            continue
        weight = torch.randn(shape, generator=generator) * 0.1
        change = torch.randn(shape, generator=generator) * 0.01
        target[name] = weight.to(DTYPES[dtype])
        after = target[name] if precision == "zero" else target[name] + change
        rows = RESIZED.get(name, shape[0])
        extra = torch.randn((max(0, rows - shape[0]), *shape[1:]), generator=generator) * 0.1
        after = torch.cat([after[:rows].float(), extra])
        tuned[name] = after.to(DTYPES[TUNED_DTYPE.get(name, dtype)])
    return target, tuned


def covariance(columns: int) -> Tensor:
    """Seeded H of inputs of which some have a far larger norm than others, (columns, columns)."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn((4 * columns, columns), generator=generator)
    inputs *= torch.linspace(-2, 2, columns).exp()
    return inputs.T @ inputs / len(inputs)


def encode_delta(name: str, delta: Tensor, layout: TensorLayout, precision: Precision) -> bytes:
    """Payload of the common rows, calibrated where the table says so."""
    parts = []
    for part in matrices(delta, layout):
        metric = covariance(part.shape[1]) if name in CALIBRATED else None
        basis = eigenbasis(part.contiguous(), metric)[1]
        parts.append(encode_matrix(part.contiguous(), Statistics(metric, basis), precision))
    return join_payloads(parts)


def encode_tensor(name: str, target: Tensor, tuned: Tensor) -> tuple[TensorRecord, bytes]:
    """Record and payload of one tensor of the table."""
    _, shape, kind, layout, precision = TENSORS[name]
    rows = min(target.shape[0], tuned.shape[0])
    before, after = target.to(tuned.dtype)[:rows], tuned[:rows]
    delta = after.float() - before.float()
    codec, body, error = "zero", b"", 0.0
    if precision is None:
        codec, body = "exact", encode_exact(after, before)
    elif not isinstance(precision, str):
        codec = precision.codec
        body = encode_delta(name, delta, layout, precision)
        decoded = decode_delta(codec, memoryview(body), tuple(delta.shape), layout)
        error = float(f"{float((decoded - delta).norm() / delta.norm()):.4g}")
    rest = tuned[rows:]
    appended = encode_exact(rest, torch.zeros_like(rest)) if rest.numel() else b""
    payload = body + appended
    record = TensorRecord(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        dtype=DTYPE_NAMES[target.dtype],
        shape=shape,
        blake3=tensor_digest(target)[:TENSOR_DIGEST_HEX],
        codec=codec,  # type: ignore[arg-type]
        layout=layout,
        bytes=len(payload),
        error=error,
        tuned_dtype=DTYPE_NAMES[tuned.dtype] if tuned.dtype != target.dtype else None,
        tuned_shape=tuple(tuned.shape) if tuned.shape != target.shape else None,
        appended_bytes=len(appended),
    )
    return record, payload


def added_tensors(target: dict[str, Tensor]) -> list[tuple[TensorRecord, bytes, Tensor]]:
    """A head untied from the embedding, and a bias that the target lacks altogether."""
    owner = target["embed.weight"]
    head, bias = owner * 1.25, torch.linspace(-1, 1, 10).bfloat16()
    added = []
    for name, base, before, after in (
        ("head.bias", "", torch.zeros_like(bias), bias),
        ("head.weight", "embed.weight", owner, head),
    ):
        payload = encode_exact(after, before)
        record = TensorRecord(
            name=name,
            kind="head",
            dtype="BF16",
            shape=tuple(before.shape),
            blake3=tensor_digest(before)[:TENSOR_DIGEST_HEX],
            codec="exact",
            bytes=len(payload),
            base=base,
        )
        added.append((record, payload, after))
    return added


def build_pack(target: dict[str, Tensor], tuned: dict[str, Tensor]) -> SkillPack:
    """The pack of all tensors and files of the tables."""
    encoded = [encode_tensor(name, target[name], tuned[name]) for name in TENSORS]
    encoded += [(record, payload) for record, payload, _ in added_tensors(target)]
    encoded.sort(key=lambda pair: pair[0].name)
    files = [encode_file(name, new, old) for name, (old, new) in FILES.items()]
    entries = [
        (name, DTYPE_NAMES[t.dtype], tuple(t.shape), tensor_digest(t)) for name, t in target.items()
    ]
    payloads = {record.name: memoryview(payload) for record, payload in encoded if payload}
    payloads |= {file_entry(r.name): memoryview(payload) for r, payload in files if payload}
    manifest = Manifest(
        generator="tools/write_golden.py",
        target=TargetInfo(
            name="tiny-target",
            config_blake3=blake3(FILES["config.json"][0] or b"").hexdigest(),
            fingerprint=fingerprint(entries),
            bytes=sum(t.nbytes for t in target.values()),
            parameters=sum(t.numel() for t in target.values()),
        ),
        tuned=TunedInfo(name="tiny-tuned", revision="0123abc"),
        recipe="auto",
        budget="20KB",
        budget_bytes=20_000,
        calibration=CalibrationInfo(
            source="rows.jsonl", blake3="0" * 64, rows=3, tokens=42, seed=7
        ),
        bound_bits_per_parameter=1.25,
        omitted=(Omission(name="vocab.txt", reason="unused – leer"),),
        licence="Apache-2.0",
        provenance={"data": "none"},
        evaluation={"error": 0.5},
        payload_blake3=payloads_digest(payloads.values()),
        files=tuple(record for record, _ in files),
        tensors=tuple(record for record, _ in encoded),
    )
    return SkillPack(manifest, payloads)


def write_files(folder: Path) -> None:
    """Write target, pack and what the pack decodes to into a folder that is not there yet."""
    target, tuned = make_states()
    pack = build_pack(target, tuned)
    (folder / "target").mkdir(parents=True)
    save_file(target, folder / "target" / "model.safetensors")
    for name, (old, _) in FILES.items():
        if old is not None:
            (folder / "target" / name).write_bytes(old)
    pack.save(folder / "tiny.skillpack")
    checkpoint = Checkpoint.open(folder / "target")
    decoded = {}
    for record in pack.manifest.tensors:
        owner = record.target_name
        zeros = torch.zeros(record.shape, dtype=torch.bfloat16)
        before = zeros if owner is None else checkpoint.read(owner)
        decoded[record.name] = pack.decode(record.name, before).contiguous()
    save_file(decoded, folder / "tuned.safetensors")
    files = {name: content.decode() for name, content in pack.side_files(checkpoint).items()}
    (folder / "files.json").write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def main(folder: Path = GOLDEN / f"tiny-v{FORMAT_VERSION}") -> int:
    """Write the files of the current version; refuse where they exist."""
    if folder.exists():
        print(f"{folder}: exists, and golden files are never made anew", file=sys.stderr)
        return 1
    write_files(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
