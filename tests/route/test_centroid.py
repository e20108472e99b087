"""The default router: per prompt, independent of other prompts and other packs."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build, save_tokenizer

from graftkit.errors import CheckpointError, ConfigError, RowsError
from graftkit.models.loading import load_tokenizer
from graftkit.route import TARGET
from graftkit.route.centroid import CentroidRouter, fit_key
from graftkit.route.key import MAX_PROMPTS, RouterKey

SKILLS = {
    "digits": ("Add: ", "0123456789", "="),
    "upper": ("Spell ", "ABCDEFG", "?"),
    "lower": ("", "abcdefg", "!"),
}
FOREIGN = ("Who is ", "#$%&()*", ".")


def prompts_of(skill, count, seed):
    before, alphabet, behind = skill
    generator = random.Random(seed)
    lengths = [generator.randrange(6, 20) for _ in range(count)]
    return [before + "".join(generator.choices(alphabet, k=length)) + behind for length in lengths]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model():
    return build("llama", scale=0.3)


@pytest.fixture(scope="module")
def keys(model, tokenizer):
    return {
        name: fit_key(model, tokenizer, prompts_of(skill, 80, seed=0))
        for name, skill in SKILLS.items()
    }


@pytest.fixture(scope="module")
def mixed():
    """Prompts of every skill, of none, and empty ones."""
    rows = [prompts_of(skill, 15, seed=1) for skill in (*SKILLS.values(), FOREIGN)]
    return ["", *(prompt for some in rows for prompt in some), ""]


def test_prompts_go_to_their_own_pack(model, tokenizer, keys):
    router = CentroidRouter(model, tokenizer, keys)
    for name, skill in SKILLS.items():
        routes = router.route(prompts_of(skill, 40, seed=2))
        assert sum(route.name == name for route in routes) >= 36


@pytest.mark.slow
def test_a_route_is_the_same_alone_and_in_any_batch(model, tokenizer, keys, mixed):
    router = CentroidRouter(model, tokenizer, keys, top_k=2)
    routes = router.route(mixed)
    assert [router.route([prompt])[0] for prompt in mixed] == routes
    assert router.route(mixed[::-1]) == routes[::-1]


def test_the_side_of_the_padding_does_not_matter(model, tokenizer, keys, mixed):
    routes = CentroidRouter(model, tokenizer, keys).route(mixed)
    side = tokenizer.padding_side
    try:
        tokenizer.padding_side = "left" if side == "right" else "right"
        assert CentroidRouter(model, tokenizer, keys).route(mixed) == routes
    finally:
        tokenizer.padding_side = side


def test_adding_and_removing_a_pack_leaves_the_scores_of_the_others(model, tokenizer, keys, mixed):
    whole = CentroidRouter(model, tokenizer, keys).route(mixed)
    fewer = {name: key for name, key in keys.items() if name != "upper"}
    for before, after in zip(
        whole, CentroidRouter(model, tokenizer, fewer).route(mixed), strict=True
    ):
        assert after.scores == {n: s for n, s in before.scores.items() if n != "upper"}
        assert after.name == before.name or before.name == "upper"


def test_prompts_without_tokens_and_a_library_without_packs_leave_all_to_the_target(
    model, tokenizer, keys
):
    for route in CentroidRouter(model, tokenizer, keys).route(["", ""]):
        assert (route.name, route.weights, route.scores) == (TARGET, {}, {})
    for route in CentroidRouter(model, tokenizer, {}).route(["Add 1 2", ""]):
        assert (route.name, route.weights) == (TARGET, {})
    assert CentroidRouter(model, tokenizer, keys).route([]) == []


@given(prompt=st.text(max_size=40), top_k=st.integers(1, 4))
def test_weights_are_shares_of_the_packs_that_accept(model, tokenizer, keys, prompt, top_k):
    [route] = CentroidRouter(model, tokenizer, keys, top_k=top_k).route([prompt])
    assert set(route.weights) <= set(route.scores) <= set(keys)
    assert len(route.weights) <= top_k
    assert all(weight > 0 for weight in route.weights.values())
    assert sum(route.weights.values()) == pytest.approx(1 if route.weights else 0)
    if route.weights:
        assert route.scores[route.name] == max(route.scores[name] for name in route.weights)


def test_several_packs_share_a_prompt_that_they_accept(model, tokenizer, keys):
    twins = {"one": keys["digits"], "two": keys["digits"], "other": keys["upper"]}
    for route in CentroidRouter(model, tokenizer, twins, top_k=3).route(
        prompts_of(SKILLS["digits"], 2, seed=3)
    ):
        assert route.weights == {"one": pytest.approx(0.5), "two": pytest.approx(0.5)}
        assert route.name == "one"


def test_packs_without_a_key_are_never_chosen(model, tokenizer, keys, mixed):
    router = CentroidRouter(model, tokenizer, {**keys, "plain": None, "bare": None})
    assert router.route(mixed) == CentroidRouter(model, tokenizer, keys).route(mixed)


def test_the_same_prompts_give_the_same_key_whatever_else_they_hold(model, tokenizer):
    prompts = prompts_of(SKILLS["digits"], 60, seed=0)
    key = fit_key(model, tokenizer, prompts)
    again = fit_key(model, tokenizer, ["", *prompts, prompts[3], "   "])
    assert (again.info, again.to_bytes()) == (key.info, key.to_bytes())
    assert (key.info.prompts, key.info.layer) == (len(set(prompts)), 1)


def test_of_many_prompts_a_seeded_choice_is_taken(model, tokenizer):
    prompts = prompts_of(SKILLS["digits"], 300, seed=0)
    one, two = (fit_key(model, tokenizer, prompts, seed=seed) for seed in (0, 1))
    assert one.info.prompts == two.info.prompts == MAX_PROMPTS
    assert one.info.blake3 != two.info.blake3
    assert fit_key(model, tokenizer, prompts, seed=1).to_bytes() == two.to_bytes()


def test_fewer_than_twenty_different_prompts_are_refused(model, tokenizer):
    prompts = prompts_of(SKILLS["digits"], 19, seed=0)
    with pytest.raises(RowsError, match="19 different prompts"):
        fit_key(model, tokenizer, prompts * 3)


def test_keys_of_another_model_are_refused(model, tokenizer, keys):
    wide = build("llama")
    wide.config.hidden_size = 64
    with pytest.raises(ConfigError, match="width 64 with at least 1 layers"):
        CentroidRouter(wide, tokenizer, keys)
    key = keys["digits"]
    deep = RouterKey.from_bytes(key.info.model_copy(update={"layer": 3}), key.to_bytes())
    with pytest.raises(ConfigError, match="at least 3 layers"):
        CentroidRouter(model, tokenizer, {"digits": deep})


def test_at_least_one_pack_has_to_be_allowed(model, tokenizer, keys):
    with pytest.raises(ConfigError, match="top_k is 0"):
        CentroidRouter(model, tokenizer, keys, top_k=0)


def test_a_prompt_of_tokens_that_the_model_lacks_is_refused(model, keys, tmp_path):
    save_tokenizer(tmp_path, size=2_000)
    router = CentroidRouter(model, load_tokenizer(tmp_path), keys)
    with pytest.raises(CheckpointError, match="tokenizer that belongs to this model"):
        router.route(["привет"])


@pytest.mark.slow
def test_half_precision_finds_the_same_packs(tokenizer, keys):
    half = build("llama", torch.bfloat16, scale=0.3)
    router = CentroidRouter(half, tokenizer, keys)
    for name, skill in SKILLS.items():
        routes = router.route(prompts_of(skill, 40, seed=2))
        assert sum(route.name == name for route in routes) >= 36
