"""Routing by the packs' weights alone."""

import copy

import pytest
import torch
from attachment.packs import empty_pack, exact_pack, low_rank_pack
from attachment.test_attach import bytes_of, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import architectures, make_pair, save_tokenizer

from graftkit.attachment import attached
from graftkit.attachment.updates import LowRankUpdate, make_update
from graftkit.errors import AttachError, PackMismatchError
from graftkit.models import load_model, load_tokenizer
from graftkit.route import TARGET, spectral
from graftkit.route.spectral import (
    THRESHOLD,
    Background,
    NeutralStatistics,
    SpectralRouter,
    log_rho,
    module_inputs,
    neutral_tokens,
    sketch_update,
)

PROMPTS = ["abc", "Hello there", "", "xyzzy 123", "abc"]
K_PROJ = "model.layers.{}.self_attn.k_proj.weight"


def pack_for(model, tokenizer, target, prompt):
    """A pack whose keys answer the inputs that one prompt gives them, and little else."""
    pack = low_rank_pack(target, seed=len(prompt))
    names = [K_PROJ.format(layer).removesuffix(".weight") for layer in range(2)]
    inputs = module_inputs(model, torch.tensor([tokenizer.encode(prompt)]), names)
    for name in names:
        x = inputs[name][0]
        directions = torch.linalg.qr((x - x.mean(0)).T).Q[:, :3].T
        pack.low_rank[f"{name}.weight"] = (torch.eye(16)[:, :3], directions.contiguous())
    return pack


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """Target folder, model, tokenizer, packs for two prompts, and the target's own text."""
    target, _ = make_pair(tmp_path_factory.mktemp("spectral"), "llama", torch.float32)
    save_tokenizer(target)
    model, tokenizer = load_model(target), load_tokenizer(target)
    packs = {
        "first": pack_for(model, tokenizer, target, "abcabcabc"),
        "second": pack_for(model, tokenizer, target, "98765 43210"),
    }
    return target, model, tokenizer, packs, neutral_tokens(model)


@pytest.fixture
def text_once(monkeypatch, skills):
    """The target's own text is written once for all routers of it."""
    model, tokens = skills[1], skills[4]
    monkeypatch.setattr(spectral, "neutral_tokens", lambda other: {model: tokens}[other])


@settings(database=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3))
def test_rho_is_the_normed_energy_of_the_answer_at_any_scale(seed, rows, columns, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    x = torch.randn(5, columns, generator=generator)
    expected = columns * (x @ matrix.T).square().sum(-1)
    expected /= matrix.square().sum() * x.square().sum(-1)
    factors = (matrix, torch.eye(columns))
    low_rank = torch.randn(9, 1, generator=generator), torch.randn(1, 9, generator=generator)
    for update in (make_update(None, scale * matrix, x), make_update(factors, None, x)):
        sketch = sketch_update(update)
        assert sketch.shape[0] <= rows
        torch.testing.assert_close(
            log_rho(sketch, x), expected.clamp_min(1e-6).log(), rtol=1e-3, atol=1e-3
        )
    update, x = make_update(low_rank, None, x), torch.randn(5, 9, generator=generator)
    sketch, answer = sketch_update(update), (x @ low_rank[1].T @ low_rank[0].T).square().sum(-1)
    whole = (low_rank[0] @ low_rank[1]).square().sum()
    expected = (9 * answer / (whole * x.square().sum(-1))).clamp_min(1e-6).log()
    torch.testing.assert_close(log_rho(sketch, x), expected, rtol=1e-3, atol=1e-3)


def test_an_input_unrelated_to_a_delta_gives_rho_near_one():
    generator = torch.Generator().manual_seed(0)
    update = make_update(None, torch.randn(40, 300, generator=generator), torch.ones(1))
    rho = log_rho(sketch_update(update), torch.randn(500, 300, generator=generator)).exp()
    assert abs(float(rho.mean()) - 1) < 0.05


def test_a_delta_of_zeros_has_no_sketch_and_an_input_of_zeros_a_finite_rho():
    assert sketch_update(make_update(None, torch.zeros(3, 4), torch.ones(1))) is None
    sketch = sketch_update(make_update(None, torch.ones(3, 4), torch.ones(1)))
    assert log_rho(sketch, torch.zeros(2, 4)).isfinite().all()


def test_the_background_is_the_mean_and_the_widest_directions():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q[:2]
    noise = torch.randn(800, 200, generator=generator)
    wide = torch.randn(800, 2, generator=generator) * 50
    x = 7 + noise + wide @ axes
    background = Background.of(x)
    assert background.directions.shape == (2, 200)
    assert background.remove(x).std() < 1.1
    assert (background.remove(7 + 30 * axes)).norm() < 0.1 * 30
    before = torch.random.get_rng_state()
    torch.testing.assert_close(Background.of(x).directions, background.directions)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_neutral_deviations_are_never_zero():
    neutral = NeutralStatistics.of(torch.ones(3, 2))
    assert neutral.std > 0
    spread = NeutralStatistics.of(torch.tensor([[0.0, 2.0], [2.0, 4.0]]))
    assert (spread.mean, spread.std) == (2.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    architectures(["llama", "gemma", "gpt_oss", "mixtral"], quick=("llama", "gpt_oss")),
)
def test_a_decoder_writes_neutral_text_of_its_own(tmp_path, architecture):
    target, _ = make_pair(tmp_path, architecture, torch.float32)
    model = load_model(target)
    tokens = neutral_tokens(model)
    assert tokens.shape == (128, 32)
    assert torch.equal(tokens, neutral_tokens(model))
    assert len(tokens.unique()) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    architectures(["gpt2", "qwen3_moe", "phi3", "gpt_neox"], quick=("gpt2", "qwen3_moe")),
)
def test_packs_of_every_architecture_are_scored(tmp_path, architecture):
    target, tuned = make_pair(tmp_path, architecture, torch.float32)
    save_tokenizer(target)
    model, tokenizer = load_model(target), load_tokenizer(target)
    packs = {"exact": exact_pack(target, tuned), "low": low_rank_pack(target)}
    before, plain = bytes_of(model), logits(model)
    router = SpectralRouter(model, tokenizer, packs)
    (route,) = router.route(["Hello there"])
    assert set(route.scores) == {"exact", "low"}
    assert all(abs(score) < 50 for score in route.scores.values())
    assert bytes_of(model) == before
    assert torch.equal(logits(model), plain)
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.usefixtures("text_once")
def test_a_prompt_goes_to_the_pack_that_answers_it_and_others_to_the_target(skills):
    _, model, tokenizer, packs, _ = skills
    router = SpectralRouter(model, tokenizer, packs)
    routes = router.route(["abcabcabc", "98765 43210", "!!??##", ""])
    assert [route.name for route in routes] == ["first", "second", TARGET, TARGET]
    assert routes[0].weights == {"first": 1.0}
    assert routes[2].weights == {}
    assert max(routes[2].scores.values()) < THRESHOLD
    assert routes[3].scores == {}


@pytest.mark.usefixtures("text_once")
def test_a_route_depends_on_nothing_but_prompt_target_and_the_packs_weights(skills):
    target, model, tokenizer, packs, _ = skills
    router = SpectralRouter(model, tokenizer, packs)
    routes = router.route(PROMPTS)
    for prompt, expected in zip(PROMPTS, routes, strict=True):
        assert router.route([prompt]) == [expected]
    assert routes[0] == routes[-1]
    only = SpectralRouter(model, tokenizer, {"second": packs["second"]}).route(PROMPTS)
    more = SpectralRouter(model, tokenizer, {**packs, "third": low_rank_pack(target, seed=9)})
    assert [r.scores.get("second") for r in only] == [r.scores.get("second") for r in routes]
    for route, wider in zip(routes, more.route(PROMPTS), strict=True):
        assert {name: wider.scores[name] for name in route.scores} == route.scores


@pytest.mark.slow
def test_packs_attached_beside_the_model_change_no_route(skills):
    _, model, tokenizer, packs, _ = skills
    expected = SpectralRouter(model, tokenizer, packs).route(PROMPTS)
    with attached(model, list(packs.values()), mode="side") as attachment:
        attachment.route([0, 1])
        router = SpectralRouter(model, tokenizer, packs)
        assert router.route(PROMPTS) == expected
        attachment.drop(0)
        assert router.route(PROMPTS) == expected


@pytest.mark.usefixtures("text_once")
@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_a_route_does_not_depend_on_a_packs_scale(skills, scale):
    _, model, tokenizer, packs, _ = skills
    scaled = {name: copy.copy(pack) for name, pack in packs.items()}
    scaled["first"].low_rank = {
        name: (left * scale, right) for name, (left, right) in packs["first"].low_rank.items()
    }
    expected = SpectralRouter(model, tokenizer, packs).route(PROMPTS)
    for route, actual in zip(
        expected, SpectralRouter(model, tokenizer, scaled).route(PROMPTS), strict=True
    ):
        assert actual.name == route.name
        assert actual.scores == pytest.approx(route.scores, rel=1e-3, abs=1e-3)


@pytest.mark.usefixtures("text_once")
def test_a_pack_without_linear_changes_has_no_score_and_one_without_keys_its_other_modules(skills):
    target, model, tokenizer, packs, _ = skills
    others = copy.copy(packs["first"])
    others.low_rank = {
        name: factors for name, factors in packs["first"].low_rank.items() if "k_proj" not in name
    }
    router = SpectralRouter(
        model, tokenizer, {"none": empty_pack(target), "others": others, **packs}
    )
    (route,) = router.route(["abcabcabc"])
    assert set(route.scores) == {"first", "second", "others"}
    assert SpectralRouter(model, tokenizer, {}).route(["abc"])[0].name == TARGET


def test_a_model_that_writes_no_text_or_another_target_is_refused(tmp_path, skills):
    _, model, tokenizer, packs, _ = skills
    encoder, _ = make_pair(tmp_path / "encoder", "bert", torch.float32)
    with pytest.raises(AttachError, match="writes no text"):
        SpectralRouter(load_model(encoder), tokenizer, {})
    other, _ = make_pair(tmp_path / "other", "llama", torch.float32, seed=5)
    with pytest.raises(PackMismatchError):
        SpectralRouter(load_model(other), tokenizer, packs)
    with attached(model, packs["first"]), pytest.raises((AttachError, PackMismatchError)):
        SpectralRouter(model, tokenizer, packs)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_score_does_not_depend_on_the_size_of_a_delta(scale):
    left, right = torch.randn(6, 2), torch.randn(2, 5)
    plain = sketch_update(LowRankUpdate(left, right))
    scaled = sketch_update(LowRankUpdate(left * scale, right))
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
