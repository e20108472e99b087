"""Packs that are added to a running model, and dropped again."""

import gc
import tracemalloc

import pytest
import torch
from attachment.packs import RANK, empty_pack, exact_pack, low_rank_pack
from attachment.test_attach import bytes_of, logits
from tiny_models import make_pair

from graftkit.attachment import attach, attached
from graftkit.attachment.target import LiveTarget
from graftkit.errors import AttachError, PackMismatchError
from graftkit.models import load_model


def hooks_of(model):
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "mixtral", "bert"])
def test_after_a_drop_all_is_as_if_the_pack_had_never_been_there(pair_of, architecture):
    target, _, exact = pair_of(architecture)
    model, other = load_model(target), low_rank_pack(target, seed=5)
    before, plain = bytes_of(model), logits(model)
    with attached(model, [other], mode="side") as attachment:
        expected, hooks = logits(model), hooks_of(model)
    with attached(model, [], mode="side") as attachment:
        assert torch.equal(logits(model), plain)
        unhooked = hooks_of(model)
        first, second = attachment.add(exact), attachment.add(other)
        assert (first, second, set(attachment.packs)) == (0, 1, {0, 1})
        assert torch.equal(logits(model), plain), "adding a pack routes no row to it"
        attachment.route([first, second, None, second])
        assert not torch.equal(logits(model)[0], expected[0])
        attachment.drop(first)
        attachment.route([second])
        assert torch.equal(logits(model), expected)
        assert hooks_of(model) == hooks
        attachment.drop(second)
        attachment.route([None])
        assert torch.equal(logits(model), plain)
        assert hooks_of(model) == unhooked
        assert attachment.add(other) == 2, "an index is not used again"
    assert not hooks_of(model)
    assert bytes_of(model) == before


@pytest.mark.slow
def test_a_dropped_pack_serves_no_row_any_more(pair_of):
    target, _, exact = pair_of("llama")
    model = load_model(target)
    with attached(model, [exact, low_rank_pack(target)], mode="side") as attachment:
        attachment.route([1, None, 1, None])
        attachment.drop(0)
        expected = logits(model)
        for refused in (
            lambda: attachment.route([0]),
            lambda: attachment.route([{1: 0.5, 0: 0.5}]),
            lambda: attachment.drop(0),
            lambda: attachment.nbytes(0),
        ):
            with pytest.raises(AttachError, match=r"attached"):
                refused()
        assert torch.equal(logits(model), expected)
        attachment.drop(1)
        with pytest.raises(AttachError, match="a routed pack was dropped"):
            logits(model)
        with pytest.raises(AttachError, match="nothing else"):
            attachment.route([1])


def test_packs_come_and_go_only_beside_the_model_and_before_it_is_detached(pair_of):
    target, _, exact = pair_of("llama")
    model = load_model(target)
    with attached(model, exact) as attachment:
        for refused in (attachment.drop, attachment.nbytes):
            with pytest.raises(AttachError, match='mode="side"'):
                refused(0)
        with pytest.raises(AttachError, match='mode="side"'):
            attachment.add(exact)
    attachment = attach(model, exact, mode="side")
    attachment.detach()
    for refused in (lambda: attachment.add(exact), lambda: attachment.route([0])):
        with pytest.raises(AttachError, match="detached"):
            refused()
    assert not hooks_of(model)


@pytest.mark.slow
def test_a_pack_that_fails_half_way_leaves_the_others_as_they_were(tmp_path):
    target, tuned = make_pair(tmp_path, "llama", torch.float32)
    model, good, bad = load_model(target), low_rank_pack(target), exact_pack(target, tuned)
    last = bad.manifest.tensors[-1].name
    delta, decode = bad.delta, bad.decode

    def failing(real):
        def read(name, tensor):
            if name == last:
                raise OSError("the disk is gone")
            return real(name, tensor)

        return read

    with attached(model, good, mode="side") as attachment:
        expected, hooks, taken = logits(model), hooks_of(model), attachment.nbytes(0)
        bad.delta, bad.decode = failing(delta), failing(decode)
        with pytest.raises(OSError, match="gone"):
            attachment.add(bad)
        with pytest.raises(PackMismatchError, match="other values"):
            attachment.add(exact_pack(tuned, target))
        assert (hooks_of(model), attachment.nbytes(0)) == (hooks, taken)
        assert set(attachment.packs) == {0}
        assert torch.equal(logits(model), expected)
        bad.delta, bad.decode = delta, decode
        assert attachment.add(bad) == 1
        assert torch.equal(logits(model), expected)


def test_a_hundred_packs_of_one_target_read_it_once(tmp_path, monkeypatch):
    target, _ = make_pair(tmp_path, "llama")
    model, read = load_model(target), []
    original = LiveTarget.read

    def counting(self, view, dtype):
        read.append(view.name)
        return original(self, view, dtype)

    monkeypatch.setattr(LiveTarget, "read", counting)
    pack = empty_pack(target)
    with attached(model, [pack], mode="side") as attachment:
        for _ in range(99):
            attachment.add(pack)
    assert len(attachment.packs) == 100
    assert sorted(read) == sorted(record.name for record in pack.manifest.tensors)


def test_the_bytes_of_a_pack_are_those_of_its_updates_and_tied_ones_count_once(tmp_path):
    for architecture, embeddings in (("llama_tied", 1), ("llama", 2)):
        folder = tmp_path / architecture
        target, _ = make_pair(folder, architecture, torch.float32)
        with attached(load_model(target), low_rank_pack(target), mode="side") as attachment:
            attention = 2 * (32 + 32) + 2 * (32 + 16)
            layer = RANK * (attention + 3 * (32 + 64)) + 2 * 32
            expected = 2 * layer + 32 + embeddings * RANK * (96 + 32)
            assert attachment.nbytes(0) == 4 * expected
            attachment.add(empty_pack(target))
            assert attachment.nbytes(1) == 0


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_packs_that_come_and_go_leave_nothing_behind(pair_of, count):
    """Eight of them in each round."""
    target, _, _ = pair_of("llama")
    model, packs = load_model(target), [low_rank_pack(target, seed=seed) for seed in (1, 2)]
    before = bytes_of(model)

    def rounds(count):
        for _ in range(count):
            with attached(model, [], mode="side") as attachment:
                for _ in range(4):
                    pair = [attachment.add(pack) for pack in packs]
                    attachment.route([*pair, None, dict.fromkeys(pair, 0.5)])
                    logits(model)
                    attachment.drop(pair[0])
                attachment.route([None])
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        objects, traced = rounds(2)
        objects_after, traced_after = rounds(count)
    finally:
        tracemalloc.stop()
    assert not hooks_of(model)
    assert bytes_of(model) == before
    assert objects_after - objects < 40 + 3 * count
    assert traced_after - traced < 40_000 + 3_000 * count
