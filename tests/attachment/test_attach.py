import hashlib

import pytest
import torch
from attachment.packs import empty_pack, exact_pack, low_rank_pack
from tiny_models import CAUSAL, architectures, inputs, make_pair

from graftkit.attachment import attach, attached, detach
from graftkit.checkpoint import tensor_bytes
from graftkit.errors import AttachError, PackMismatchError
from graftkit.models import load_model

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
FEW = ("llama", "gpt2", "mixtral")


def bytes_of(model):
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or inputs())).logits


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *(pytest.param(*each.values, torch.float32, marks=each.marks) for each in architectures()),
        *(
            pytest.param(*each.values, torch.bfloat16, marks=each.marks)
            for each in architectures(quick=FEW)
        ),
    ],
)
def test_a_merged_exact_pack_is_the_tuned_model(pair_of, architecture, dtype):
    target, tuned, pack = pair_of(architecture, dtype)
    model = load_model(target)
    before, plain = bytes_of(model), logits(model)
    with attached(model, pack):
        assert bytes_of(model) == bytes_of(load_model(tuned))
        assert torch.equal(logits(model), logits(load_model(tuned)))
        assert not torch.equal(logits(model), plain)
    assert bytes_of(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("codec", ["exact", "lowrank"])
@pytest.mark.parametrize("architecture", architectures())
def test_a_pack_beside_the_model_gives_what_it_gives_merged(pair_of, architecture, codec):
    target, _, exact = pair_of(architecture)
    model = load_model(target)
    pack = exact if codec == "exact" else low_rank_pack(target)
    with attached(model, pack):
        expected = logits(model)
    before, plain = bytes_of(model), logits(model)
    with attached(model, pack, mode="side"):
        assert bytes_of(model) == before
        actual = logits(model)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (actual - plain).abs().max() > 100 * (actual - expected).abs().max()
    assert torch.equal(logits(model), plain)
    assert bytes_of(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures())
def test_rows_of_one_batch_use_packs_of_their_own(pair_of, architecture):
    target, _, exact = pair_of(architecture)
    model = load_model(target)
    packs = [low_rank_pack(target, seed=1), exact]
    plain, expected = logits(model), []
    for pack in packs:
        with attached(model, pack):
            expected.append(logits(model))
    with attached(model, packs, mode="side") as attachment:
        for rows in ([0, None, 1, 0], [1, 1, None, None], [None] * 4, [1] * 4):
            attachment.route(rows)
            actual = logits(model)
            for row, pack in enumerate(rows):
                own = plain if pack is None else expected[pack]
                torch.testing.assert_close(actual[row], own[row], rtol=1e-4, atol=1e-5)
            untouched = [row for row, pack in enumerate(rows) if pack is None]
            # Experts multiply the tokens of all rows together, so there the last bit may differ.
            if architecture not in EXPERTS:
                assert torch.equal(actual[untouched], plain[untouched])


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("architecture", architectures(quick=FEW))
def test_an_exception_inside_leaves_every_byte_as_before(pair_of, architecture, mode):
    target, _, pack = pair_of(architecture)
    model = load_model(target)
    before, plain = bytes_of(model), logits(model)
    with pytest.raises(IndexError), attached(model, pack, mode=mode):
        model(input_ids=torch.tensor([[10**6]]))
    assert bytes_of(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(CAUSAL, quick=FEW))
def test_generation_in_a_mixed_batch_says_what_each_pack_says_alone(tmp_path, architecture):
    target, tuned = make_pair(tmp_path, architecture, torch.float32, scale=0.1)
    model = load_model(target)
    packs = [exact_pack(target, tuned), low_rank_pack(target, seed=2, scale=0.3)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = inputs(rows=3)
    expected = [model.generate(**batch, **options)[0]]
    for row, pack in enumerate(packs, start=1):
        with attached(model, pack):
            expected.append(model.generate(**batch, **options)[row])
    with attached(model, packs, mode="side") as attachment:
        attachment.route([None, 0, 1])
        actual = model.generate(**batch, **options)
        assert torch.equal(actual, torch.stack(expected))
        beams = model.generate(**batch, **options, num_beams=2)
        assert beams.shape == actual.shape


@pytest.mark.parametrize("mode", ["merged", "side"])
def test_another_target_is_refused_by_the_first_tensor_that_differs(pair_of, mode):
    _, tuned, pack = pair_of("llama")
    other = load_model(tuned)
    before = bytes_of(other)
    with pytest.raises(PackMismatchError, match=r"lm_head\.weight"):
        attach(other, pack, mode)
    assert bytes_of(other) == before
    with pytest.raises(AttachError, match="nothing is attached"):
        detach(other)


def test_one_changed_bit_is_refused_by_name(pair_of):
    target, _, pack = pair_of("mixtral")
    model = load_model(target)
    words = model.model.layers[1].mlp.experts.down_proj.data.view(torch.int32)
    words[2, 0, 0] ^= 1
    with pytest.raises(PackMismatchError, match=r"layers\.1\.\S*experts\.2\.w2\.weight"):
        attach(model, pack)


def test_a_model_of_another_class_is_refused_by_a_tensor_it_lacks(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    with pytest.raises(PackMismatchError, match=r"lacks tensor lm_head\.weight"):
        attach(model.model, pack)


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "mixtral"])
def test_a_pack_without_changes_changes_nothing(tmp_path, architecture, mode):
    target, _ = make_pair(tmp_path, architecture)
    model = load_model(target)
    plain = logits(model)
    with attached(model, empty_pack(target), mode=mode):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("mode", ["merged", "side"])
def test_a_target_loaded_in_a_wider_dtype_is_the_same_target(tmp_path, mode):
    target, tuned = make_pair(tmp_path, "qwen2")
    model, pack = load_model(target, torch.float32), exact_pack(target, tuned)
    expected = logits(load_model(tuned, torch.float32))
    with attached(model, pack, mode):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.model.norm.weight.data[0] += 1e-6
    with pytest.raises(PackMismatchError, match=r"model\.norm\.weight has values that BF16"):
        attach(model, pack, mode)


def test_a_target_loaded_in_a_narrower_dtype_is_told_the_right_one(tmp_path):
    target, tuned = make_pair(tmp_path, "llama", torch.float32)
    with pytest.raises(PackMismatchError, match=r"dtype=torch\.float32"):
        attach(load_model(target, torch.bfloat16), exact_pack(target, tuned))


def test_a_second_attach_is_refused_until_the_first_is_detached(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    attach(model, pack)
    with pytest.raises(AttachError, match="detach them first"):
        attach(model, pack, mode="side")
    detach(model)
    attach(model, pack, mode="side").detach()
    with pytest.raises(AttachError, match="nothing is attached"):
        detach(model)


def test_several_packs_do_not_fit_into_the_weights(pair_of):
    target, _, pack = pair_of("llama")
    with pytest.raises(AttachError, match='mode="side"'):
        attach(load_model(target), [pack, pack])
    with pytest.raises(AttachError, match="no pack"):
        attach(load_model(target), [])
    with pytest.raises(AttachError, match="expected"):
        attach(load_model(target), pack, mode="beside")


def test_a_failure_half_way_restores_what_was_written(tmp_path, monkeypatch):
    target, tuned = make_pair(tmp_path, "llama")
    model, pack = load_model(target), exact_pack(target, tuned)
    before, last = bytes_of(model), pack.manifest.tensors[-1].name
    decode = pack.decode

    def failing(name, tensor):
        if name == last:
            raise OSError("the disk is gone")
        return decode(name, tensor)

    for mode in ("merged", "side"):
        monkeypatch.setattr(pack, "decode", failing)
        monkeypatch.setattr(pack, "delta", failing)
        with pytest.raises(OSError, match="gone"):
            attach(model, pack, mode)
        assert bytes_of(model) == before
        assert not any(module._forward_hooks for module in model.modules())


def test_an_empty_model_is_refused(pair_of):
    from graftkit.models import empty_model

    target, _, pack = pair_of("llama")
    with pytest.raises(AttachError, match="not in memory"):
        attach(empty_model(target), pack)
