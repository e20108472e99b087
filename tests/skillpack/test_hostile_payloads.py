"""Payloads under a correct digest that no encoder writes: refused by name, or finite tensors."""

import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skillpack.forge import FOLDER, PACK, ROOT, Forgery, target_of

from graftkit.checkpoint import Checkpoint
from graftkit.compress import factors
from graftkit.compress.entropy import decode_codes, encode_codes
from graftkit.errors import CorruptPackError, PackFault, PackMismatchError
from graftkit.skillpack import SkillPack

DENSE, LOWRANK, STACK = "h.0.attn.v.weight", "h.0.attn.q.weight", "h.0.experts.down"
BITMAP, LISTS, EXACT, GROWN = "lookup.weight", "rare.weight", "h.1.mlp.weight", "embed.weight"
FACTORS, ENTRIES, HYBRID = "h.1.attn.q.weight", "h.1.attn.k.weight", "h.1.attn.o.weight"
STEPS, NOTHING = "h.1.attn.v.weight", "h.0.gate.weight"  # entries with column steps; rank 0
CODED_STACK, MULTIPLIED = "h.1.experts.down", "h.2.attn.q.weight"
TARGET = FOLDER / "target"
FLOAT_NAN, FLOAT_INF = struct.pack("<f", np.nan), struct.pack("<f", np.inf)
HALF_NAN, HALF_INF, HALF_NEGATIVE = (struct.pack("<e", x) for x in (np.nan, np.inf, -1.0))


def with_length(part):
    return struct.pack("<I", len(part)) + part


def put(offset, *parts):
    """Overwrite bytes of a payload."""

    def change(payload):
        new = b"".join(parts)
        return payload[:offset] + new + payload[offset + len(new) :]

    return change


def decode_forged(folder, name, payload):
    forgery = Forgery()
    forgery.set_payload(name, payload)
    pack = forgery.open(folder)
    return pack.decode(name, target_of(pack.record(name)))


@pytest.mark.parametrize(
    ("name", "refused", "change"),
    [
        pytest.param(DENSE, False, lambda p: p, id="dense as it is"),
        pytest.param(DENSE, True, lambda p: p[:2], id="dense without its header"),
        pytest.param(DENSE, True, lambda p: p[:-1], id="dense cut"),
        pytest.param(DENSE, True, lambda p: p + b"\0", id="dense and a byte"),
        pytest.param(DENSE, True, put(0, b"\0"), id="dense of no bits"),
        pytest.param(DENSE, True, put(0, b"\x09"), id="dense of nine bits"),
        pytest.param(DENSE, True, put(1, b"\0\0"), id="dense with groups of nothing"),
        pytest.param(DENSE, True, put(3, HALF_NAN), id="dense scale NaN"),
        pytest.param(DENSE, True, put(5, HALF_INF), id="dense scale infinite"),
        pytest.param(DENSE, True, put(5, HALF_NEGATIVE), id="dense scale negative"),
        pytest.param(DENSE, True, lambda p: p[:-1] + bytes([p[-1] | 0x80]), id="dense padding bit"),
        pytest.param(LOWRANK, False, lambda p: p, id="low-rank as it is"),
        pytest.param(LOWRANK, True, lambda p: p[:2], id="low-rank without its header"),
        pytest.param(LOWRANK, True, lambda p: p[:-1], id="low-rank cut"),
        pytest.param(LOWRANK, True, put(0, b"\0"), id="no tiers"),
        pytest.param(LOWRANK, True, put(0, b"\x09"), id="nine tiers"),
        pytest.param(LOWRANK, True, put(0, b"\xff"), id="tiers behind the end"),
        pytest.param(LOWRANK, True, put(1, b"\0\0"), id="low-rank groups of nothing"),
        pytest.param(LOWRANK, True, put(3, b"\x00"), id="a tier of no bits"),
        pytest.param(LOWRANK, True, put(4, b"\0\0"), id="a tier of no components"),
        pytest.param(LOWRANK, True, put(4, b"\x11\0"), id="rank 21 of a 24 x 20 matrix"),
        pytest.param(LOWRANK, True, put(4, b"\xff\xff"), id="rank 65539"),
        pytest.param(LOWRANK, True, put(12, struct.pack("<f", np.nan)), id="peak NaN"),
        pytest.param(LOWRANK, True, put(12, struct.pack("<f", np.inf)), id="peak infinite"),
        pytest.param(LOWRANK, True, put(16, HALF_NAN), id="singular value NaN"),
        pytest.param(LOWRANK, True, put(26, HALF_INF), id="low-rank scale infinite"),
        pytest.param(FACTORS, False, lambda p: p, id="coded factors as they are"),
        pytest.param(FACTORS, True, lambda p: p[:11], id="coded factors without their header"),
        pytest.param(FACTORS, True, lambda p: p[:13], id="coded factors without their scales"),
        pytest.param(FACTORS, True, lambda p: p[:-1], id="coded factors cut"),
        pytest.param(FACTORS, True, lambda p: p + b"\0", id="coded factors and a byte"),
        pytest.param(FACTORS, True, lambda p: p + b"\1", id="coded factors and another byte"),
        pytest.param(FACTORS, True, put(1, b"\x80"), id="coded factors with an unknown flag"),
        pytest.param(FACTORS, True, put(2, b"\x15\0"), id="21 coded factors of 24 x 20"),
        pytest.param(FACTORS, True, put(2, b"\xff\xff"), id="65535 coded factors"),
        pytest.param(FACTORS, True, put(2, b"\0\0"), id="coded factors called none"),
        pytest.param(FACTORS, True, put(4, FLOAT_NAN), id="input step NaN"),
        pytest.param(FACTORS, True, put(4, FLOAT_INF), id="input step infinite"),
        pytest.param(FACTORS, True, put(4, struct.pack("<f", 0)), id="input step zero"),
        pytest.param(FACTORS, True, put(4, struct.pack("<f", -1)), id="input step negative"),
        pytest.param(FACTORS, True, put(8, FLOAT_NAN), id="peak of coded factors NaN"),
        pytest.param(FACTORS, True, put(12, HALF_NAN), id="component scale NaN"),
        pytest.param(FACTORS, True, put(14, HALF_INF), id="component scale infinite"),
        pytest.param(FACTORS, True, put(24, b"\xff" * 4), id="a part of 2^32 bytes"),
        pytest.param(FACTORS, True, put(24, b"\0" * 4), id="a part of no bytes"),
        pytest.param(NOTHING, False, lambda p: p, id="no coded factors as they are"),
        pytest.param(NOTHING, True, lambda p: p + b"\0", id="no coded factors and a byte"),
        pytest.param(MULTIPLIED, False, lambda p: p, id="multiplied factors as they are"),
        pytest.param(MULTIPLIED, True, lambda p: p[:30], id="multiplied factors cut"),
        pytest.param(ENTRIES, False, lambda p: p, id="coded entries as they are"),
        pytest.param(ENTRIES, True, lambda p: p[:5], id="coded entries without their header"),
        pytest.param(ENTRIES, True, lambda p: p[:6], id="coded entries without codes"),
        pytest.param(ENTRIES, True, lambda p: p[:7], id="coded entries of an empty stream"),
        pytest.param(ENTRIES, True, lambda p: p[:-1], id="coded entries cut"),
        pytest.param(ENTRIES, True, lambda p: p[:-1] + b"\0", id="coded entries ending in zero"),
        pytest.param(ENTRIES, True, lambda p: p + b"\1", id="coded entries and a byte"),
        pytest.param(ENTRIES, True, put(1, b"\x02"), id="coded entries with an unknown flag"),
        pytest.param(ENTRIES, True, put(1, b"\x00"), id="coded entries without their steps"),
        pytest.param(ENTRIES, True, put(2, FLOAT_NAN), id="step NaN"),
        pytest.param(ENTRIES, True, put(2, struct.pack("<f", -1)), id="step negative"),
        pytest.param(ENTRIES, True, put(6, b"\x02"), id="codes of another kind"),
        pytest.param(STEPS, False, lambda p: p, id="column steps as they are"),
        pytest.param(STEPS, True, put(1, b"\x01"), id="column steps taken for codes"),
        pytest.param(STEPS, True, put(6, b"\xff\xff\xff\x7f"), id="column steps of 2^31 bytes"),
        pytest.param(
            STEPS,
            True,
            lambda p: p[:6] + with_length(encode_codes(np.full((1, 150), 121, np.int32))),
            id="column steps 121 half octaves off",
        ),
        pytest.param(HYBRID, False, lambda p: p, id="hybrid as it is"),
        pytest.param(HYBRID, True, lambda p: p[:4], id="hybrid without its lengths"),
        pytest.param(HYBRID, True, lambda p: p[:-1], id="hybrid cut"),
        pytest.param(HYBRID, True, put(0, b"\x01"), id="hybrid of another kind"),
        pytest.param(HYBRID, True, put(1, b"\xff" * 4), id="hybrid with 2^32 bytes of factors"),
        pytest.param(HYBRID, True, put(5, b"\x01"), id="hybrid with factors of another kind"),
        pytest.param(CODED_STACK, False, lambda p: p, id="coded stack as it is"),
        pytest.param(CODED_STACK, True, lambda p: p[:8], id="coded stack without its lengths"),
        pytest.param(CODED_STACK, True, lambda p: p[:-1], id="coded stack cut"),
        pytest.param(CODED_STACK, True, put(1, b"\xff" * 4), id="coded stack of 2^32 bytes"),
        pytest.param(CODED_STACK, True, put(1, b"\0" * 8), id="coded stack of empty matrices"),
        pytest.param(
            CODED_STACK,
            True,
            lambda p: p[:1] + struct.pack("<2I", 5, len(p) - 14) + p[9:],
            id="coded stack cut in the wrong place",
        ),
        pytest.param(STACK, True, lambda p: p[:-1], id="a stack of unequal parts"),
        pytest.param(STACK, True, lambda p: p[:2], id="a stack of single bytes"),
        pytest.param(BITMAP, False, lambda p: p, id="bitmap as it is"),
        pytest.param(BITMAP, True, lambda p: p[:11], id="sparse without its header"),
        pytest.param(BITMAP, True, lambda p: p[:-1], id="sparse cut"),
        pytest.param(BITMAP, True, put(0, b"\x02"), id="sparse of another mode"),
        pytest.param(BITMAP, True, put(0, b"\x01"), id="bitmap called row lists"),
        pytest.param(BITMAP, True, put(1, b"\0"), id="sparse of no bits"),
        pytest.param(BITMAP, True, put(2, b"\0\0"), id="sparse groups of nothing"),
        pytest.param(BITMAP, True, put(4, struct.pack("<Q", 0)), id="nothing kept"),
        pytest.param(BITMAP, True, put(4, struct.pack("<Q", 481)), id="more kept than there is"),
        pytest.param(BITMAP, True, put(4, struct.pack("<Q", 2**64 - 1)), id="2^64 kept"),
        pytest.param(BITMAP, True, put(12, b"\0" * 8), id="bitmap marks too few"),
        pytest.param(LISTS, False, lambda p: p, id="row lists as they are"),
        pytest.param(LISTS, True, put(12, b"\xff"), id="row lists count too many"),
        pytest.param(LISTS, True, put(19, b"\0" * 5), id="row lists out of order"),
        pytest.param(EXACT, False, lambda p: p, id="exact as it is"),
        pytest.param(EXACT, True, lambda p: p[:3], id="exact without its table"),
        pytest.param(EXACT, True, lambda p: p[:-1], id="exact cut"),
        pytest.param(EXACT, True, lambda p: p + b"\0", id="exact and a byte"),
        pytest.param(EXACT, True, put(0, b"\xff\xff\xff\xff"), id="exact block behind the end"),
        pytest.param(EXACT, True, put(0, b"\0\0\0\0"), id="exact block of no bytes"),
        pytest.param(EXACT, True, put(4, b"\x04"), id="exact of another mode"),
        pytest.param(
            EXACT,
            True,
            lambda p: struct.pack("<IBI", 5, 1, 0x7FC00000),
            id="exact words that are NaN",
        ),
        pytest.param(GROWN, False, lambda p: p, id="appended rows as they are"),
        pytest.param(GROWN, True, lambda p: p[:-1], id="appended rows cut"),
    ],
)
def test_a_payload_decodes_or_is_refused_naming_its_tensor(tmp_path, name, refused, change):
    payload = change(Forgery().payloads[name])
    if not refused:
        assert decode_forged(tmp_path, name, payload).isfinite().all()
        return
    with pytest.raises(CorruptPackError, match=f"tensor {name}: ") as refusal:
        decode_forged(tmp_path, name, payload)
    assert refusal.value.fault.value == "invalid_payload"


def test_a_zero_tensor_with_a_payload_of_its_own_is_refused(tmp_path):
    forgery = Forgery()
    forgery.record(GROWN)["codec"] = "zero"
    pack = forgery.open(tmp_path)
    with pytest.raises(CorruptPackError, match="tensor embed"):
        pack.decode(GROWN, target_of(pack.record(GROWN)))


def test_weights_that_leave_the_range_of_their_dtype_are_refused_by_every_door(tmp_path):
    forgery = Forgery()
    payload = bytearray(forgery.payloads["h.0.mlp.weight"])
    payload[12:16] = struct.pack("<f", 1e38)
    payload[16:26] = struct.pack("<e", 60_000) * 5
    forgery.set_payload("h.0.mlp.weight", payload)
    pack = forgery.open(tmp_path)
    target = target_of(pack.record("h.0.mlp.weight"))
    for read in (pack.decode, pack.delta, lambda name, _: pack.factors(name)):
        with pytest.raises(CorruptPackError, match=r"tensor h\.0\.mlp\.weight"):
            read("h.0.mlp.weight", target)


# ------------------------------------------------------------------------ plain factors

PLAIN = factors.store(
    factors.Factors(torch.full((24, 2), 0.01), torch.ones(2, 20, dtype=torch.bfloat16), 0.5)
)


def decode_plain(folder, payload, name=LOWRANK):
    """What a payload of codec `factors` makes of a tensor, by every door."""
    forgery = Forgery()
    forgery.record(name)["codec"] = "factors"
    forgery.set_payload(name, payload)
    pack = forgery.open(folder)
    target = target_of(pack.record(name))
    pack.describe(name)
    pack.delta(name, target)
    return pack.decode(name, target)


@pytest.mark.parametrize(
    ("refused", "change"),
    [
        pytest.param(False, lambda p: p, id="as they are"),
        pytest.param(True, lambda p: p[:11], id="without their header"),
        pytest.param(True, lambda p: p[:12], id="without numbers"),
        pytest.param(True, lambda p: p[:-1], id="cut"),
        pytest.param(True, lambda p: p + b"\0", id="and a byte"),
        pytest.param(True, put(0, b"\0"), id="of no dtype"),
        pytest.param(True, put(1, b"\x04"), id="of an unknown dtype"),
        pytest.param(True, put(0, b"\x02"), id="of a narrower dtype"),
        pytest.param(True, put(2, b"\0\0"), id="of rank 0"),
        pytest.param(True, put(2, b"\xff\xff"), id="of rank 65535"),
        pytest.param(True, put(4, struct.pack("<d", np.nan)), id="scale NaN"),
        pytest.param(True, put(4, struct.pack("<d", np.inf)), id="scale infinite"),
        pytest.param(True, put(4, struct.pack("<d", 1e300)), id="scale beyond float32"),
        pytest.param(True, put(12, FLOAT_NAN), id="B NaN"),
        pytest.param(True, put(len(PLAIN) - 2, b"\x80\x7f"), id="A infinite"),
    ],
)
def test_plain_factors_decode_or_are_refused_naming_their_tensor(tmp_path, refused, change):
    if not refused:
        assert decode_plain(tmp_path, change(PLAIN)).isfinite().all()
        return
    with pytest.raises(CorruptPackError, match=f"tensor {LOWRANK}: ") as refusal:
        decode_plain(tmp_path, change(PLAIN))
    assert refusal.value.fault.value == "invalid_payload"


def test_plain_factors_of_a_stack_are_one_payload_for_each_matrix(tmp_path):
    parts = [
        factors.store(factors.Factors(torch.full((12, 1), value), torch.ones(1, 16), 2.0))
        for value in (0.25, 0.5)
    ]
    target = target_of(SkillPack.load(PACK).record(STACK))
    moved = decode_plain(tmp_path, b"".join(parts), STACK).float() - target.float()
    for matrix, value in zip(moved, (0.5, 1.0), strict=True):
        torch.testing.assert_close(matrix, torch.full((12, 16), value), rtol=0, atol=0.01)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(PLAIN) - 1), value=st.integers(0, 255), noise=st.binary(max_size=9))
def test_garbled_plain_factors_give_a_finite_tensor_or_a_refusal(tmp_path, at, value, noise):
    payload = bytearray(PLAIN)
    payload[at] = value
    try:
        decoded = decode_plain(tmp_path, noise + bytes(payload)[len(noise) :])
    except CorruptPackError as refusal:
        assert LOWRANK in str(refusal)  # noqa: PT017
        return
    assert decoded.isfinite().all()


GARBLED = [DENSE, LOWRANK, STACK, BITMAP, LISTS, EXACT, GROWN]
GARBLED += [FACTORS, ENTRIES, HYBRID, STEPS, NOTHING, CODED_STACK, MULTIPLIED]


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", GARBLED)
def test_garbage_under_a_correct_digest_gives_a_finite_tensor_or_a_refusal(tmp_path, name, data):
    payload = bytearray(Forgery().payloads[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    noise = data.draw(st.one_of(st.just(b""), st.binary(max_size=40)))
    payload = data.draw(st.sampled_from([bytes(payload), noise + payload[len(noise) :], noise]))
    if not payload:
        return
    try:
        decoded = decode_forged(tmp_path, name, payload)
    except CorruptPackError as error:
        refusal = error
    else:
        assert decoded.isfinite().all()
        assert tuple(decoded.shape) == SkillPack.load(PACK).record(name).result_shape
        return
    assert name in str(refusal)
    assert refusal.fault in (PackFault.INVALID_PAYLOAD, PackFault.INVALID_MANIFEST)


_MEASURE = """
import resource, struct, sys, torch
from graftkit.compress.codecs import decode_delta, describe_payload
from graftkit.errors import CorruptPackError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
wide = struct.pack("<BH", 1, 65535) + b"\\0\\0" * 4000 + b"\\0" * 500 + b"\\0" * 4000
tiers = struct.pack("<BHBHf", 1, 65535, 1, 8, 1.0) + b"\\0" * (16 + 2 * (16 + 1)) + b"\\0" * 4008
before = peak()
decode_delta("dense", memoryview(wide), (4000, 8), "matrix")
for codec, payload, shape, layout in (
    ("lowrank", tiers, (4000, 8), "matrix"),
    ("dense", b"", (2**30, 1, 1), "stack"),
    ("sparse", struct.pack("<BBHQ", 0, 4, 128, 2**39), (2**20, 2**20), "matrix"),
    ("lowrank", struct.pack("<BHBH", 1, 128, 8, 65535), (2**20, 2**20), "matrix"),
    ("dense", struct.pack("<BH", 8, 128), (2**20, 2**20), "matrix"),
    ("dense", struct.pack("<BBf", 0, 1, 1.0) + b"\\0" + b"\\1" * 99, (2**20, 2**20), "matrix"),
    ("dense", struct.pack("<BBfI", 0, 0, 1.0, 9) + b"\\0" + b"\\1" * 99, (1, 2**40), "matrix"),
    ("dense", b"\\xff", (2**40, 1, 1), "stack"),
    ("lowrank", struct.pack("<BBHff", 0, 1, 999, 1, 1) + b"\\1" * 3000, (2**20, 2**20), "matrix"),
    ("hybrid", struct.pack("<BI", 0, 2**31) + b"\\1" * 99, (2**20, 2**20), "matrix"),
    ("factors", struct.pack("<BBHd", 1, 1, 65535, 1) + b"\\1" * 99, (2**20, 2**20), "matrix"),
    ("factors", struct.pack("<BBHd", 1, 1, 1, 1) * 4, (2**30, 2, 2), "stack"),
):
    for act in (decode_delta, describe_payload):
        try:
            act(codec, memoryview(payload), shape, layout)
        except CorruptPackError:
            pass
print(peak() - before)
"""


@pytest.mark.slow
def test_no_payload_makes_its_reader_allocate_far_more_than_the_tensor():
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "src"))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]
    assert int(done.stdout) < 50_000_000


@pytest.mark.timeout(20)
def test_a_stream_that_ends_early_is_refused_before_the_rest_is_made_up():
    stream = encode_codes(np.zeros((4, 1000), np.int32))
    with pytest.raises(CorruptPackError):
        decode_codes(memoryview(stream), (4000, len(stream) * 100))
    started = time.perf_counter()
    with pytest.raises(CorruptPackError, match="ends before its last code"):
        decode_codes(memoryview(b"\0" + b"\x55" * 200), (20_000, 5_000))
    assert time.perf_counter() - started < 2


@given(noise=st.binary(max_size=60), rows=st.integers(1, 9), columns=st.integers(1, 40))
def test_any_bytes_are_codes_or_refused(noise, rows, columns):
    try:
        codes = decode_codes(memoryview(noise), (rows, columns))
    except CorruptPackError:
        return
    assert codes.shape == (rows, columns)


# ------------------------------------------------------------------------ side files

TEMPLATE = "chat_template.jinja"


def side_files(folder, name, payload, **fields):
    forgery = Forgery()
    record = next(record for record in forgery.manifest["files"] if record["name"] == name)
    record.update(fields)
    forgery.payloads["file:" + name] = payload
    return forgery.open(folder).side_files(Checkpoint.open(TARGET))


def described(content):
    return {"bytes": len(content), "blake3": blake3(content).hexdigest()}


def test_a_side_file_with_its_own_digest_is_read(tmp_path):
    content = b"{{ x }}" * 1000
    files = side_files(tmp_path, TEMPLATE, zlib.compress(content), **described(content))
    assert files[TEMPLATE] == content


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        pytest.param(zlib.compress(bytes(200_000_000)), 50, id="a bomb"),
        pytest.param(zlib.compress(b"x" * 51), 50, id="a byte too many"),
        pytest.param(zlib.compress(b"x" * 49), 50, id="a byte too few"),
        pytest.param(zlib.compress(b"x" * 50) + b"!", 50, id="bytes behind the stream"),
        pytest.param(zlib.compress(b"x" * 50)[:-1], 50, id="a stream without its end"),
        pytest.param(b"x" * 50, 50, id="no stream"),
        pytest.param(zlib.compress(b"x" * 50), 2**30, id="a size of 2^30"),
    ],
)
def test_a_side_file_that_inflates_to_another_size_is_refused(tmp_path, payload, size):
    with pytest.raises(CorruptPackError, match=TEMPLATE) as refusal:
        side_files(tmp_path, TEMPLATE, payload, bytes=size)
    assert refusal.value.fault.value == "invalid_payload"


def test_a_side_file_may_not_declare_more_than_a_gibibyte(tmp_path):
    with pytest.raises(CorruptPackError) as refusal:
        side_files(tmp_path, TEMPLATE, zlib.compress(b"x" * 50), bytes=2**30 + 1)
    assert refusal.value.fault.value == "invalid_manifest"


def test_a_side_file_with_other_content_is_refused_by_its_digest(tmp_path):
    with pytest.raises(CorruptPackError, match="digest") as refusal:
        side_files(tmp_path, TEMPLATE, zlib.compress(b"x" * 50))
    assert refusal.value.fault.value == "payload_digest"


def test_a_side_file_that_shares_more_than_the_target_has_is_refused(tmp_path):
    old = (TARGET / "config.json").read_bytes()
    claim = {"bytes": 1001, "prefix": 1000, "suffix": 0, "blake3": blake3(old + b"x").hexdigest()}
    with pytest.raises(CorruptPackError, match=r"config\.json"):
        side_files(tmp_path, "config.json", zlib.compress(b"x"), **claim)


def test_a_side_file_made_for_another_target_is_refused(tmp_path):
    with pytest.raises(PackMismatchError, match=r"config\.json"):
        side_files(tmp_path, "config.json", zlib.compress(b"x"), target_blake3="0" * 64)


def test_a_tensor_of_another_shape_than_the_record_is_refused():
    with pytest.raises(PackMismatchError, match=r"\[10, 16\], the target has \[10, 8\]"):
        SkillPack.load(PACK).decode(GROWN, torch.zeros(10, 8))
