"""Keys of a sentence encoder: probabilities, what is refused, and what people are warned of."""

import importlib.util

import pytest
import torch
from tiny_models import build, save_tokenizer
from transformers import BertModel

from graftkit.errors import ConfigError, CorruptPackError, RowsError
from graftkit.models.loading import load_tokenizer
from graftkit.route import encoder as encoders
from graftkit.route.centroid import pooled_states
from graftkit.route.encoder import SentenceEncoder, find_encoder, general_prompts
from graftkit.route.key import MIN_PROMPTS, RouterKey
from graftkit.route.nearest import KeyRouter, NearestKey, fit_default_key, last_user_turn

TINY_GENERAL = tuple(f"{word} {number}" for word in ("say", "tell", "why") for number in range(20))


def encoder_folder(folder, seed=5):
    torch.manual_seed(seed)
    BertModel(build("bert", seed=seed, scale=0.3).config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny encoder of random weights, and few general prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "general_prompts", lambda: TINY_GENERAL)
        encoder = SentenceEncoder(encoder_folder(tmp_path_factory.mktemp("encoder")), "tiny")
        assert len(encoder.general) == len(TINY_GENERAL)
        yield encoder


def sums(count):
    return [f"{number} + {number * 7 % 90} =" for number in range(10, 10 + count)]


@pytest.fixture(scope="module")
def key(tiny):
    return NearestKey.fit(tiny, sums(40))


def test_a_key_comes_back_from_its_bytes_with_the_same_probabilities(tiny, key):
    again = NearestKey.from_bytes(key.info, key.to_bytes())
    vectors, foreign = tiny.embed(["12 + 3 =", "why 4"]), key.foreign(tiny.general)
    assert torch.equal(again.probabilities(vectors, foreign), key.probabilities(vectors, foreign))
    assert len(key.to_bytes()) == key.info.nbytes == 12 + 40 * tiny.width


def test_a_key_of_another_length_or_with_nan_is_refused(key):
    with pytest.raises(CorruptPackError, match="its description says"):
        NearestKey.from_bytes(key.info, key.to_bytes()[:-1])
    content = b"\x00\x00\xc0\x7f" + key.to_bytes()[4:]
    with pytest.raises(CorruptPackError, match="not finite"):
        NearestKey.from_bytes(key.info, content)


def test_probabilities_do_not_depend_on_other_packs_or_prompts(tiny, key):
    other = NearestKey.fit(tiny, [f"say {n} times" for n in range(30)])
    prompts = ["33 + 5 =", "why 3", "say 11 times", ""]
    alone = KeyRouter(None, None, {"sums": key}, encoder=tiny)
    both = KeyRouter(None, None, {"sums": key, "say": other}, encoder=tiny)
    for first, second in zip(alone.route(prompts), both.route(prompts), strict=True):
        assert first.scores.get("sums") == second.scores.get("sums")
    assert alone.route(prompts) == [alone.route([prompt])[0] for prompt in prompts]
    assert all(0 <= p <= 1 for route in both.route(prompts) for p in route.scores.values())


def test_a_prompt_without_words_goes_to_the_target(tiny, key):
    for route in KeyRouter(None, None, {"sums": key}, encoder=tiny).route(["", " \n "]):
        assert (route.name, route.scores) == ("target", {})


def test_twenty_copies_of_one_prompt_are_no_key(tiny):
    with pytest.raises(RowsError, match=f"1 different prompts found; .* at least {MIN_PROMPTS}"):
        NearestKey.fit(tiny, ["what is my balance?"] * 20)


def test_different_prompts_that_are_one_to_the_encoder_are_no_key(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "embed", lambda prompts, *_: torch.ones(len(prompts), tiny.width))
    with pytest.raises(RowsError, match="all alike to the encoder"):
        NearestKey.fit(tiny, sums(20))


def test_two_packs_with_the_same_prompts_are_named(tiny, key):
    router = KeyRouter(None, None, {"sums": key, "copy": key}, encoder=tiny)
    assert any("sums and copy have the same prompts" in line for line in router.warnings)


def test_a_key_that_cannot_tell_its_prompts_from_general_ones_is_named(tiny):
    vague = NearestKey.fit(tiny, [f"{text} " for text in TINY_GENERAL])
    router = KeyRouter(None, None, {"vague": vague}, encoder=tiny)
    assert any("vague: its key cannot tell" in line for line in router.warnings)


def test_a_key_of_another_encoder_is_ignored_by_name(key, tmp_path, monkeypatch):
    other = SentenceEncoder(encoder_folder(tmp_path, seed=9), "other")
    router = KeyRouter(None, None, {"sums": key}, encoder=other)
    assert router.route(["12 + 3 ="])[0].name == "target"
    (line,) = router.warnings
    assert "sums is never chosen" in line
    assert "this machine's is other" in line
    monkeypatch.setenv(encoders.VARIABLE, "none")
    (line,) = KeyRouter(None, None, {"sums": key}).warnings
    assert "needs the sentence encoder tiny" in line
    assert "the fallback are keys of the target's own states" in line


def test_without_an_encoder_keys_are_of_the_targets_states(tmp_path, monkeypatch):
    monkeypatch.setenv(encoders.VARIABLE, "none")
    save_tokenizer(tmp_path)
    model, tokenizer = build("llama", scale=0.3), load_tokenizer(tmp_path)
    fitted = fit_default_key(model, tokenizer, sums(30))
    assert isinstance(fitted, RouterKey)
    states = pooled_states(model, tokenizer, general_prompts(), fitted.info.layer, 512)
    inside = sum(fitted.distance(state) <= 1 for state in states)
    assert inside <= 0.02 * len(states)
    (line,) = KeyRouter(model, tokenizer, {"sums": fitted}).warnings
    assert "the target's own states, the fallback" in line


def test_at_least_one_pack_has_to_be_allowed(key, tiny):
    with pytest.raises(ConfigError, match="top_k is 0"):
        KeyRouter(None, None, {"sums": key}, top_k=0, encoder=tiny)


class ChatTokenizer:
    chat_template = "chatml"

    def apply_chat_template(self, turns, tokenize):
        lines = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns]
        return "<|im_start|>system\nBe kind.<|im_end|>\n" + "".join(lines)


def test_text_in_the_chat_template_is_read_as_the_last_turn_of_the_user():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "block my card\nplease"},
    ]
    text = ChatTokenizer().apply_chat_template(turns, False) + "<|im_start|>assistant\n"
    assert last_user_turn(ChatTokenizer(), text) == "block my card\nplease"
    assert last_user_turn(ChatTokenizer(), "block my card") == "block my card"
    assert last_user_turn(None, text) == text


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(encoders.PACKAGE) is None,
    reason="the weights of the sentence encoder are not installed (graftkit[router])",
)
def test_the_real_encoder_leaves_chat_to_the_target(monkeypatch):
    monkeypatch.delenv(encoders.VARIABLE, raising=False)
    encoder = find_encoder()
    bank = [f"what is the {what} of my {card} card" for what in WHAT for card in CARDS]
    router = KeyRouter(None, None, {"bank": NearestKey.fit(encoder, bank)}, encoder=encoder)
    routes = router.route(["tell me the limit of my gold card", "Who painted the Night Watch?"])
    assert [route.name for route in routes] == ["bank", "target"]
    assert len(general_prompts()) > 500


WHAT = ("limit", "balance", "interest rate", "PIN", "expiry date", "fee")
CARDS = ("credit", "debit", "gold", "travel", "student")
