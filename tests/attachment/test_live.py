"""Which models packs can be attached to, and what copies of them are."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers
from attachment.test_attach import bytes_of, logits
from tiny_models import ARCHITECTURES, make_pair
from torch import nn

from graftkit.attachment import attach, attached, detach
from graftkit.errors import AttachError, GraftError
from graftkit.models import load_model
from graftkit.skillpack import SkillPack


def assert_refused(model, pack, match):
    for mode in ("merged", "side"):
        with pytest.raises(AttachError, match=match):
            attach(model, pack, mode=mode)


def test_wrappers_are_refused_with_what_to_attach_to(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    assert_refused(torch.compile(model, backend="eager"), pack, "_orig_mod")
    assert_refused(nn.DataParallel(model), pack, r"\.module")
    assert_refused(nn.Linear(2, 2), pack, "no transformers model")
    assert_refused(torch.jit.script(nn.Linear(2, 2)), pack, "no transformers model")


def test_a_model_compiled_in_place_is_refused(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    model.model.layers[0].compile(backend="eager")
    assert_refused(model, pack, "compiled in place")


def test_quantized_weights_are_refused_by_name(pair_of):
    target, _, pack = pair_of("llama")
    int8 = torch.ao.quantization.quantize_dynamic(
        load_model(target), {nn.Linear}, dtype=torch.qint8
    )
    assert_refused(int8, pack, r"q_proj.*quantized")

    codes = load_model(target)
    weight = codes.lm_head.weight
    codes.lm_head.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)
    assert_refused(codes, pack, r"lm_head.weight is quantized.*int8")

    class Packed(torch.Tensor):
        """As packages do that keep codes in a tensor of their own kind."""

    subclass = load_model(target)
    subclass.lm_head.weight = nn.Parameter(weight.detach().as_subclass(Packed))
    assert_refused(subclass, pack, r"lm_head.weight is quantized.*Packed")

    eighth = load_model(target)
    eighth.lm_head.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert_refused(eighth, pack, r"lm_head.weight is quantized.*float8")


def test_an_adapter_is_refused_inside_and_outside_its_peft_model(pair_of):
    peft = pytest.importorskip("peft")
    target, _, pack = pair_of("llama")
    adapted = peft.get_peft_model(
        load_model(target), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    assert_refused(adapted, pack, "PEFT adapter")
    assert_refused(adapted.base_model.model, pack, "PEFT adapter")
    plain = adapted.unload()
    with attached(plain, pack):
        pass


def test_two_models_that_share_weights_have_packs_one_at_a_time(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    before = bytes_of(model)
    with attached(model, pack), pytest.raises(AttachError, match="shares weights"):
        attach(model.model, pack)
    with attached(model.model, [], mode="side"), pytest.raises(AttachError, match="shares weights"):
        attach(model, pack)
    assert bytes_of(model) == before
    with attached(model, pack):
        pass


@pytest.mark.slow
def test_a_model_that_is_dropped_with_its_packs_is_forgotten(pair_of):
    target, _, pack = pair_of("llama")
    gone = weakref.ref(attach(load_model(target), pack).model)
    gc.collect()
    assert gone() is None
    with attached(load_model(target), pack):
        pass


def test_a_pack_is_copied_and_pickled_as_itself(pair_of, tmp_path):
    pack = pair_of("llama")[2]
    assert copy.deepcopy(pack) is pack
    again = pickle.loads(pickle.dumps(pack))
    assert again.digest == pack.digest
    pack.save(tmp_path / "p.skillpack")
    opened = SkillPack.load(tmp_path / "p.skillpack")
    assert pickle.loads(pickle.dumps([opened]))[0].digest == pack.digest
    read, (content,) = pack.__reduce__()
    with pytest.raises(GraftError):
        read(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_copy_of_a_model_with_a_merged_pack_is_the_tuned_model_for_good(pair_of):
    target, tuned, pack = pair_of("llama")
    model, expected = load_model(target), logits(load_model(tuned))
    plain = logits(model)
    file = io.BytesIO()
    with attached(model, pack):
        twin = copy.deepcopy(model)
        torch.save(model, file)
    file.seek(0)
    for copied in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(logits(copied), expected)
        with pytest.raises(AttachError, match="nothing is attached"):
            detach(copied)
    assert torch.equal(logits(model), plain)


def test_a_model_with_packs_beside_it_is_neither_copied_nor_pickled(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    with attached(model, pack, mode="side") as attachment:
        for work in (
            lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model),
            lambda: copy.deepcopy(model.model.layers[0]),
            lambda: copy.deepcopy(attachment),
        ):
            with pytest.raises(AttachError, match="detach the packs first"):
                work()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_training_in_a_merged_pack_is_undone_with_a_warning(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    before = bytes_of(model)
    attachment = attach(model, pack)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="detaching takes that back"):
        attachment.detach()
    assert bytes_of(model) == before


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen2"])
def test_a_merged_pack_that_nobody_trained_leaves_without_a_word(tmp_path, architecture, recwarn):
    target, tuned = make_pair(tmp_path, architecture)
    from attachment.packs import exact_pack

    with attached(load_model(target), exact_pack(target, tuned)):
        pass
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_every_architecture_of_these_tests_is_a_plain_model():
    for name, build in ARCHITECTURES.items():
        model = build()
        assert isinstance(model, transformers.PreTrainedModel), name
        with attached(model, [], mode="side"):
            pass
