"""Whether packs beside a model reach what it computes, in every way it can be called."""

import threading

import pytest
import torch
import transformers
from attachment.packs import exact_pack
from attachment.test_attach import bytes_of, logits
from tiny_models import ONE_LAYER, inputs, perturb
from torch import nn

from graftkit.attachment import attach, attached
from graftkit.attachment.calls import ChangedWeight, ReadTracker
from graftkit.errors import AttachError
from graftkit.models import load_model

SMALL = {
    **ONE_LAYER,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def states(folder, model, only="", scale=0.05):
    """Save a model and a copy of it with some parameters moved; returns both folders."""
    torch.manual_seed(0)
    perturb(model.eval(), seed=3, scale=0.05)
    model.save_pretrained(folder / "target")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if only in name:
                value += torch.randn(value.shape, generator=generator) * scale
    model.save_pretrained(folder / "tuned")
    return folder / "target", folder / "tuned"


def mobilebert():
    return transformers.MobileBertForMaskedLM(
        transformers.MobileBertConfig(
            **SMALL, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=1
        )
    )


@pytest.mark.slow
def test_a_head_that_is_read_without_a_call_is_refused_when_it_is_attached(tmp_path):
    target, tuned = states(tmp_path, mobilebert(), "predictions.dense")
    model = load_model(target)
    before = bytes_of(model)
    with pytest.raises(AttachError, match=r"predictions\.dense\.weight is read without its module"):
        attach(model, exact_pack(target, tuned), mode="side")
    assert bytes_of(model) == before
    assert not model.cls.predictions.dense._forward_hooks


def test_a_convolution_whose_weight_the_decoding_step_reads_is_refused(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4, conv_kernel=3
    )
    target, tuned = states(tmp_path, transformers.MambaForCausalLM(config), "conv1d")
    with pytest.raises(AttachError, match=r"conv1d.* is read without its module being called"):
        attach(load_model(target), exact_pack(target, tuned), mode="side")


def test_attention_that_reads_the_weights_of_its_projection_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    block = Block().eval()
    projection = block.attention.out_proj
    watch = ReadTracker([ChangedWeight("out_proj.weight", projection.weight, projection)])
    watch.start()
    with torch.no_grad():
        block(torch.ones(2, 3, 4))
    watch.stop()
    with pytest.raises(AttachError, match=r"out_proj\.weight is read"):
        watch.check()


def test_reads_inside_the_module_its_shape_and_its_views_are_no_reads_past_it():
    linear, other = nn.Linear(4, 4), nn.Linear(4, 4)
    watch = ReadTracker([ChangedWeight("weight", linear.weight, linear)])
    watch.start()
    with torch.no_grad():
        linear(torch.ones(1, 4).to(linear.weight.dtype))
        other(torch.zeros_like(linear.weight))
        view = linear.weight.T
    watch.stop()
    watch.check()
    assert view.shape == (4, 4)
    watch.start()
    with torch.no_grad():
        torch.ones(1, 4) @ view
    watch.stop()
    with pytest.raises(AttachError):
        watch.check()


def test_what_random_tokens_do_not_reach_is_refused_at_its_first_call(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)

    def by_hand(mask, **more):
        return model.lm_head.weight[: mask.shape[0]].sum() + model.base_model(**more)[0]

    with attached(model, pack, mode="side"):
        logits(model)
        model.forward = by_hand
        with pytest.raises(AttachError, match=r"lm_head\.weight is read"):
            model(mask=torch.ones(1, 4), **inputs(rows=1))


@pytest.mark.slow
def test_a_model_that_was_compiled_before_answers_with_its_packs(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1})
    target, tuned = states(tmp_path, transformers.LlamaForCausalLM(config))
    model, expected = load_model(target), logits(load_model(tuned))
    plain = logits(model)
    fast = torch.compile(model, backend="eager")
    assert torch.equal(logits(fast), plain)
    with attached(model, exact_pack(target, tuned), mode="side") as attachment:
        torch.testing.assert_close(logits(fast), expected, rtol=1e-4, atol=1e-4)
        attachment.route([None, 0, None, 0])
        actual = logits(fast)
        torch.testing.assert_close(actual[1::2], expected[1::2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual[::2], plain[::2], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(fast), plain)


def llama4():
    options = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 64}
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**options, **experts))


def rwkv():
    options = {"vocab_size": 96, "hidden_size": 32, "attention_hidden_size": 32}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**options, num_hidden_layers=2))


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama4, rwkv])
def test_rows_of_several_packs_are_refused_where_the_model_mixes_rows(tmp_path, make):
    target, tuned = states(tmp_path, make())
    model, expected = load_model(target), logits(load_model(tuned))
    plain, before = logits(model), bytes_of(model)
    with attached(model, exact_pack(target, tuned), mode="side") as attachment:
        with pytest.raises(AttachError, match="batch of their own"):
            attachment.route([0, None, 0, None])
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
        attachment.route([None])
        assert torch.equal(logits(model), plain)
    assert bytes_of(model) == before


def test_positions_relative_to_a_token_are_no_rows(tmp_path):
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    target, tuned = states(tmp_path, model, "relative_attention_bias", 0.5)
    with (
        attached(load_model(target), exact_pack(target, tuned), mode="side") as attachment,
        pytest.raises(AttachError, match="batch of their own"),
    ):
        attachment.route([0, None])


@pytest.mark.slow
def test_a_model_of_images_keeps_its_rows_apart(tmp_path):
    config = transformers.ViTConfig(**ONE_LAYER, image_size=16, patch_size=8)
    target, tuned = states(tmp_path, transformers.ViTForImageClassification(config))
    images = {"pixel_values": torch.randn(3, 3, 16, 16)}
    model = load_model(target)
    plain, expected = model(**images).logits, load_model(tuned)(**images).logits
    with attached(model, exact_pack(target, tuned), mode="side") as attachment:
        attachment.route([0, None, 0])
        actual = model(**images).logits
    torch.testing.assert_close(actual[0::2], expected[0::2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(actual[1], plain[1], rtol=1e-3, atol=1e-4)


def test_trying_a_model_leaves_no_trace(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = bytes_of(model)
    torch.manual_seed(7)
    numbers = torch.rand(3)
    torch.manual_seed(7)
    with attached(model, pack, mode="side") as attachment:
        attachment.route([0, None])
        assert torch.equal(torch.rand(3), numbers)
        assert [module.training for module in model.modules()] == modes
    assert bytes_of(model) == before


@pytest.mark.slow
def test_an_interruption_in_a_batch_leaves_every_byte_and_lets_others_run(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    plain, before = logits(model), bytes_of(model)

    def interrupt(module, args):
        raise KeyboardInterrupt

    for rows in ([0], [0, None, 0, None]):
        with attached(model, pack, mode="side") as attachment:
            attachment.route(rows)
            packed = logits(model)
            handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                logits(model)
            handle.remove()
            assert torch.equal(logits(model), packed)
            handle = model.model.norm.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                logits(model)
            handle.remove()
        assert bytes_of(model) == before
        assert torch.equal(logits(model), plain)


def in_threads(*works):
    """Run all at once; returns what each gave, or its exception."""
    results = [None] * len(works)
    together = threading.Barrier(len(works))

    def run(place, work):
        together.wait()
        try:
            results[place] = work()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_attach_to_one_model_take_turns_or_are_refused(pair_of):
    target, _, pack = pair_of("llama")
    model = load_model(target)
    before = bytes_of(model)

    def work():
        with attached(model, pack):
            return "attached"

    for _ in range(3):
        results = in_threads(work, work, work)
        assert "attached" in results
        assert all(r == "attached" or "attached already" in str(r) for r in results)
        assert bytes_of(model) == before


@pytest.mark.slow
def test_threads_that_route_one_model_get_their_own_rows(pair_of):
    target, tuned, pack = pair_of("llama")
    model, expected = load_model(target), logits(load_model(tuned))
    plain = logits(model)
    with attached(model, pack, mode="side") as attachment:

        def work(rows, expected):
            for _ in range(8):
                attachment.route(rows)
                torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
            return True

        mixed = torch.stack([expected[0], plain[1], expected[2], plain[3]])
        results = in_threads(
            lambda: work([0], expected),
            lambda: work([None], plain),
            lambda: work([0, None, 0, None], mixed),
        )
        assert results == [True] * 3


def test_a_thread_uses_the_only_choice_there_is_and_no_other(pair_of):
    target, tuned, pack = pair_of("llama")
    model, expected = load_model(target), logits(load_model(tuned))
    with attached(model, pack, mode="side") as attachment:
        for _ in range(2):
            (actual,) = in_threads(lambda: logits(model))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            attachment.route([0])
        attachment.route([None])
        (actual,) = in_threads(lambda: logits(model))
        assert isinstance(actual, AttachError)
        assert "in the thread that runs the model" in str(actual)


@pytest.mark.slow
def test_answers_that_compare_rows_with_each_other_are_refused_for_rows_of_several_packs(tmp_path):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 4
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 96, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    target, tuned = states(tmp_path, transformers.CLIPModel(config))
    with (
        attached(load_model(target), exact_pack(target, tuned), mode="side") as attachment,
        pytest.raises(AttachError, match="batch of their own"),
    ):
        attachment.route([0, None, 0])
