"""Sources: a local model, an endpoint over real HTTP, and a file of answers."""

import json
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import tiny_models
import torch
from distill.server import CompletionServer, Fault, Reply, model_answers
from distill.tiny import CHAT, tiny_llama, write_jsonl
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from graftkit.distill.config import AnswersSource, EndpointSource, ModelSource
from graftkit.distill.records import Prompt
from graftkit.distill.sources import derive_seed, endpoint, open_source
from graftkit.distill.sources.local import Sampler
from graftkit.errors import CheckpointError, ConfigError, RowsError, SourceError
from graftkit.models import load_model, load_tokenizer

TEXTS = ("a", "What is 2+2?", "name a river", "b b b", "one more, and a longer one than others")
PROMPTS = tuple(Prompt(number, text) for number, text in enumerate(TEXTS))


def ask(source, prompts=PROMPTS):
    """All answers by prompt and sample."""
    replies = source.answer(dict(enumerate(source.units(prompts))))
    answers = [answer for _, reply in replies for answer in reply.answers]
    return {(answer.prompt_id, answer.sample): answer for answer in answers}


# A model that is run here


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("chat"), chat=True)


def model_source(folder, seed=0, **settings):
    defaults = {"samples": 3, "max_new_tokens": 12, "batch_tokens": 256}
    settings = {**defaults, "name": "tiny", "model": str(folder), **settings}
    return open_source(ModelSource(kind="model", **settings), seed, folder)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 2.0, "top_p": 1.0}, {"top_p": 0.5, "repetition_penalty": 1.3}],
)
def test_the_log_likelihood_is_that_of_the_plain_model_on_the_drawn_tokens(tiny, settings):
    source = model_source(tiny, **settings)
    (unit,) = source.units(PROMPTS[1:2])
    encoded = [source._encode(prompt) for prompt in unit.prompts]
    sampler = source._generate(encoded, seed=3)
    model = load_model(tiny, torch.float32)
    drawn = torch.stack(sampler._steps, dim=1)
    for row, tokens in enumerate(drawn):
        tokens = tokens[tokens >= 0]
        ids = torch.cat([torch.tensor(encoded[0]), tokens])[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(encoded[0]) - 1 : -1]
        expected = logits.log_softmax(dim=-1)[torch.arange(len(tokens)), tokens].sum()
        assert sampler.log_likelihood[row] == pytest.approx(float(expected), abs=1e-3)
        assert sampler.tokens[row] == len(tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "top_p"), [(3.0, 0.8), (0.2, 0.9), (1.0, 1.0), (3.0, 0.01)])
def test_draws_follow_temperature_and_top_p(spread, top_p):
    rows, vocabulary = 20_000, 300
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1)) * spread
    filters = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    expected = filters(None, logits.clone()).softmax(dim=-1)[0]
    settings = ModelSource(kind="model", name="a", model="a", temperature=0.8, top_p=top_p)
    sampler = Sampler(settings, [], torch.ones(rows, 1), seed=5)
    sampler(torch.zeros(rows, 1, dtype=torch.int64), logits.repeat(rows, 1))
    actual = sampler._steps[0].bincount(minlength=vocabulary) / rows
    assert not actual[expected == 0].any()
    # Five standard deviations of a binomial share.
    assert ((actual - expected).abs() <= 5 * (expected / rows).sqrt() + 1e-6).all()


def test_the_repetition_penalty_ignores_padding():
    ids = torch.tensor([[0, 0, 7], [3, 7, 9]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    settings = ModelSource(kind="model", name="a", model="a", repetition_penalty=1.5)
    actual = Sampler(settings, [], mask, seed=0)._penalized(logits, ids, mask.bool())
    theirs = RepetitionPenaltyLogitsProcessor(1.5)
    assert torch.equal(actual[:1], theirs(ids[:1, 2:], logits[:1].clone()))
    assert torch.equal(actual[1:], theirs(ids[1:], logits[1:].clone()))


def recurrent():
    """A model whose cache is no keys and values, half of it."""
    options = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return tiny_models._decoder("FalconH1", **options)()


def sliding():
    """A model that looks back four tokens."""
    return tiny_models._decoder("Mistral", sliding_window=4)()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", sliding, recurrent])
def test_answers_in_a_padded_batch_are_those_of_each_prompt_alone(architecture, tmp_path):
    build = tiny_models.build if isinstance(architecture, str) else lambda build, scale: build()
    model = build(architecture, scale=0.3)
    model.save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path)
    greedy = model_source(tmp_path, temperature=0, batch_tokens=10_000)
    # As good as greedy, but with samples, which share what is read of the prompts.
    sharp = model_source(tmp_path, top_p=1e-6, samples=2, batch_tokens=10_000)
    assert len(greedy.units(PROMPTS)) == len(sharp.units(PROMPTS)) == 1
    answers, sampled = ask(greedy), ask(sharp)
    assert (len(answers), len(sampled)) == (len(PROMPTS), 2 * len(PROMPTS))
    for prompt in PROMPTS:
        ids = torch.tensor([greedy.tokenizer.encode(prompt.text)])
        output = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected = greedy.tokenizer.decode(output, skip_special_tokens=True).strip()
        assert answers[prompt.id, 0].text == expected
        assert [sampled[prompt.id, number].text for number in (0, 1)] == [expected, expected]


@pytest.mark.slow
def test_a_batch_draws_the_same_whatever_else_is_asked(tiny):
    source = model_source(tiny)
    units = dict(enumerate(source.units(PROMPTS)))
    assert len(units) > 2
    everything = dict(source.answer(units))
    assert dict(model_source(tiny).answer({2: units[2]})) == {2: everything[2]}
    assert dict(model_source(tiny, seed=1).answer({2: units[2]})) != {2: everything[2]}


def test_samples_of_one_prompt_differ(tiny):
    answers = ask(model_source(tiny, samples=4, temperature=1.5))
    assert len({answers[0, sample].text for sample in range(4)}) == 4


def test_a_prompt_beyond_the_context_is_refused_and_one_at_its_edge_is_cut(tmp_path):
    tiny_models.build("gpt2").save_pretrained(tmp_path)  # positions end at 64, and it would crash
    tiny_models.save_tokenizer(tmp_path)
    prompts = [Prompt(n, "x" * length) for n, length in enumerate((3, 62, 63, 64, 200))]
    answers = ask(model_source(tmp_path, samples=2, temperature=2.0), prompts)
    assert [answers[n, 1].finish for n in (3, 4)] == ["refused", "refused"]
    assert answers[3, 0].reason == "the prompt fills the context of 64 tokens"
    assert answers[1, 0].tokens <= 2
    assert answers[2, 0].tokens == 1
    assert answers[0, 0].finish in ("stop", "length")


def test_a_prompt_without_tokens_is_refused_and_its_neighbours_are_not(tiny, monkeypatch):
    source = model_source(tiny)
    encode = source._encode
    monkeypatch.setattr(source, "_encode", lambda prompt: encode(prompt) if prompt.id else [])
    answers = ask(source)
    assert answers[0, 0].reason == "the prompt has no tokens"
    assert answers[1, 0].finish != "refused"


def test_an_end_token_stops_an_answer_and_is_no_part_of_it(tiny, tmp_path):
    source = model_source(tiny, temperature=0, max_new_tokens=4)
    first = ask(source, PROMPTS[:1])[0, 0]
    drawn = source._generate([source._encode(PROMPTS[0])], seed=0).drawn()[0]
    assert (first.finish, first.tokens, len(drawn)) == ("length", 4, 4)
    model = load_model(tiny)
    model.generation_config.eos_token_id = [1, drawn[2]]
    model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    stopped = ask(model_source(tmp_path, temperature=0, max_new_tokens=4), PROMPTS[:1])[0, 0]
    end = drawn.index(drawn[2])
    assert (stopped.finish, stopped.tokens) == ("stop", end + 1)
    assert stopped.text == source.tokenizer.decode(drawn[:end]).strip()


@pytest.mark.slow
def test_the_models_own_generation_settings_are_not_used(tiny, tmp_path):
    model = load_model(tiny)
    model.generation_config.update(suppress_tokens=list(range(5, 200)), no_repeat_ngram_size=1)
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny).save_pretrained(tmp_path)
    assert ask(model_source(tmp_path)) == ask(model_source(tiny))


def test_a_chat_prompt_is_put_into_the_sources_own_template(tiny_chat):
    chat = ask(model_source(tiny_chat, temperature=0, chat=True), PROMPTS[:1])[0, 0]
    turned = Prompt(0, f"<|bos|><user>{PROMPTS[0].text}<|end|><assistant>")
    plain = ask(model_source(tiny_chat, temperature=0), [turned])[0, 0]
    assert (chat.text, chat.log_likelihood) == (plain.text, plain.log_likelihood)
    assert chat.prompt == PROMPTS[0].text


def test_a_chat_without_a_working_template_is_refused(tiny, tiny_chat, tmp_path):
    with pytest.raises(CheckpointError, match="no chat template; use an instruct model"):
        model_source(tiny, chat=True)
    tokenizer = load_tokenizer(tiny_chat)
    tokenizer.chat_template = CHAT + "{{ raise_exception('no user turns') }}"
    load_model(tiny_chat).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"chat template fails \(no user turns"):
        model_source(tmp_path, chat=True).units(PROMPTS)


def test_a_model_that_does_not_continue_text_is_refused(tmp_path):
    tiny_models.build("bert").save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="expected a causal language model"):
        model_source(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tiny_models.build("llama").save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path, size=120)
    with pytest.raises(CheckpointError, match=r"gives token 11\d, but the model has 96"):
        model_source(tmp_path).units([Prompt(0, chr(32 + 112))])


def test_logits_that_are_not_finite_are_refused(tiny, tmp_path):
    model = load_model(tiny)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        ask(model_source(tmp_path))


def test_a_gpu_that_is_too_small_is_reported_with_what_to_lower(tiny, monkeypatch):
    def full(**options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    source = model_source(tiny, batch_tokens=10_000)
    monkeypatch.setattr(source._loaded[0], "generate", full)
    with pytest.raises(SourceError, match=r"15 answers at once .*lower batch_tokens = 10000"):
        ask(source)


@pytest.mark.slow
def test_the_nursery_source_answers_in_its_own_words(shared):
    rows = (shared / "data/llm/clinc150_intent/train.jsonl").read_text().splitlines()[:20]
    rows = [json.loads(row) for row in rows]
    prompts = [Prompt(number, row["prompt"]) for number, row in enumerate(rows)]
    source = model_source(shared / "nursery" / "source", temperature=0, batch_tokens=4096)
    answers = ask(source, prompts)
    right = [answers[n, 0].text == row["completion"].strip() for n, row in enumerate(rows)]
    assert sum(right) >= 15
    assert all(-3 < answer.log_likelihood <= 0 for answer in answers.values())


# A model behind an endpoint


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(endpoint, "MOST_WAIT_SECONDS", 0.05)


def endpoint_source(url, seed=0, **settings):
    settings = {"samples": 2, "name": "served", "model": "big", "retries": 3, **settings}
    return open_source(EndpointSource(kind="endpoint", url=url, **settings), seed, None)


def test_a_request_says_all_that_decides_the_answer():
    with CompletionServer() as server:
        plain = ask(endpoint_source(server.url, top_p=0.9, max_new_tokens=7), PROMPTS[:1])
        ask(endpoint_source(server.url, chat=True, repetition_penalty=1.1), PROMPTS[:1])
    seed = derive_seed(0, "served", 0, 1)
    requests = {request.body["seed"]: request for request in server.requests[:2]}
    assert requests[seed].path == "/v1/completions"
    assert requests[seed].body == {
        **{"model": "big", "prompt": "a", "seed": seed},
        **{"temperature": 0.8, "top_p": 0.9, "max_tokens": 7},
    }
    assert plain[0, 1].text == f"a #{seed}"
    assert (plain[0, 1].tokens, plain[0, 1].log_likelihood) == (3, None)
    chat = server.requests[2]
    assert chat.path == "/v1/chat/completions"
    assert chat.messages == [{"role": "user", "content": "a"}]
    assert chat.body["repetition_penalty"] == 1.1


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.slow
def test_a_served_model_answers_as_the_same_model_run_here(tiny_chat, chat):
    local = ask(model_source(tiny_chat, temperature=0, chat=chat))
    with CompletionServer(model_answers(tiny_chat)) as server:
        remote = ask(endpoint_source(server.url, temperature=0, max_new_tokens=12, chat=chat))
        sampled = [ask(endpoint_source(server.url, max_new_tokens=12)) for _ in range(2)]
    assert {key: (a.text, a.tokens, a.finish) for key, a in remote.items()} == {
        key: (a.text, a.tokens, a.finish) for key, a in local.items()
    }
    assert sampled[0] == sampled[1]


def test_every_sample_has_a_seed_of_its_own():
    with CompletionServer() as server:
        ask(endpoint_source(server.url))
        ask(endpoint_source(server.url, seed=1))
        assert len({request.body["seed"] for request in server.requests}) == 20
        ask(endpoint_source(server.url, temperature=0))
        assert len(server.requests) == 25  # one sample says all


FAULTS = {
    "too many requests": Fault(429),
    "an internal error": Fault(500),
    "an overloaded server": Fault(503, headers={"Retry-After": "soon"}),
    "a dropped connection": Fault(drop=True),
    "a late answer": Fault(delay_seconds=0.6),
    "a page instead of an answer": Fault(raw=b"<html>starting</html>"),
    "half an answer": Fault(raw=b'{"choices": [{"text": "abc'),
    "no answer": Fault(raw=b'{"choices": []}'),
    "a list": Fault(raw=b"[1]"),
    "a number for a text": Fault(raw=b'{"choices": [{"text": 1, "finish_reason": "stop"}]}'),
    "a list for a finish": Fault(raw=b'{"choices": [{"text": "", "finish_reason": []}]}'),
    "nothing but brackets": Fault(raw=b"[" * 100_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_passes_is_tried_again_and_changes_no_answer(fault):
    with CompletionServer() as server:
        expected = ask(endpoint_source(server.url))
    with CompletionServer(fault=lambda number, _: fault if number in (1, 2, 5) else None) as server:
        patience = 0.4 if fault.delay_seconds else 30.0
        assert ask(endpoint_source(server.url, timeout_seconds=patience)) == expected
        assert len(server.requests) == 13


@pytest.mark.parametrize("date", [False, True])
@pytest.mark.slow
def test_retry_after_is_waited_for(date):
    def fault(number, request):
        until = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return None if number else Fault(429, headers={"Retry-After": until if date else "0.3"})

    with CompletionServer(fault=fault) as server:
        ask(endpoint_source(server.url, samples=1), PROMPTS[:1])
    first, second = (request.seconds for request in server.requests)
    assert second - first >= (0.9 if date else 0.3)  # a date has whole seconds


def test_a_server_that_asks_to_wait_for_hours_ends_the_run_with_its_words():
    fault = Fault(429, "daily quota is used up", headers={"Retry-After": "7200"})
    with (
        CompletionServer(fault=lambda *_: fault) as server,
        pytest.raises(SourceError, match=r"daily quota is used up .*asks to wait 7200 s.*go on"),
    ):
        ask(endpoint_source(server.url, concurrency=1))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "check the key in SERVED_KEY"),
        (403, "check the key in SERVED_KEY"),
        (404, "expected an OpenAI-compatible server with a model 'big'"),
    ],
)
def test_a_wrong_key_or_model_ends_the_run_at_once(monkeypatch, status, advice):
    monkeypatch.setenv("SERVED_KEY", "sk-very-secret")
    fault = Fault(status, "bad\nkey sk-very-secret given")
    with (
        CompletionServer(fault=lambda *_: fault) as server,
        pytest.raises(SourceError, match=advice) as caught,
    ):
        ask(endpoint_source(server.url, concurrency=1, key_env="SERVED_KEY"))
    assert len(server.requests) == 1
    assert "what is finished is kept; run the same command to go on" in str(caught.value)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "very-secret" not in str(caught.value)
    assert server.requests[0].headers["authorization"] == "Bearer sk-very-secret"


def test_a_missing_key_is_found_before_any_request(monkeypatch):
    monkeypatch.delenv("SERVED_KEY", raising=False)
    with CompletionServer() as server, pytest.raises(ConfigError, match="no SERVED_KEY; set it"):
        endpoint_source(server.url, key_env="SERVED_KEY")
    assert not server.requests


def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("SERVED_KEY", "geheim\u00e9")
    with pytest.raises(ConfigError, match="characters that no key has") as caught:
        endpoint_source("http://localhost/v1", key_env="SERVED_KEY")
    assert "geheim" not in str(caught.value)


def test_without_key_env_no_key_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with CompletionServer() as server:
        ask(endpoint_source(server.url))
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer none"}


def test_a_missing_openai_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "graftkit.distill.sources.endpoint")
    with pytest.raises(ConfigError, match=r"pip install 'graftkit\[distill\]'"):
        endpoint_source("http://localhost/v1")


def test_a_url_without_http_is_refused():
    with pytest.raises(ConfigError, match="expected a base URL such as http://localhost"):
        endpoint_source("localhost:8000/v1")


def test_a_server_that_is_not_there_ends_the_run_after_all_attempts():
    server = CompletionServer()
    server._server.server_close()
    with pytest.raises(
        SourceError, match=rf"{server.url}: .*refused .attempt 4.; see that .*go on"
    ):
        ask(endpoint_source(server.url, concurrency=2))


def test_a_prompt_that_the_server_does_not_want_is_refused_and_the_rest_goes_on():
    def fault(number, request):
        return Fault(400, "prompt\tis too long") if request.prompt == TEXTS[4] else None

    with CompletionServer(fault=fault) as server:
        answers = ask(endpoint_source(server.url))
    refused = {key for key, answer in answers.items() if answer.finish == "refused"}
    assert refused == {(4, 0), (4, 1)}
    assert answers[4, 0].reason == "400 prompt is too long"
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    ("reply", "finish", "text", "reason"),
    [
        (Reply(" yes \n"), "stop", "yes", None),
        (Reply("and so", "length"), "length", "and so", None),
        (Reply(""), "stop", "", None),
        (Reply(None), "refused", "", "no text (finish_reason stop)"),
        (Reply("a", "content_filter"), "refused", "", "no text (finish_reason content_filter)"),
        (Reply("half \ud83d"), "stop", "half \ufffd", None),
        (Reply("whole \ud83d\ude00"), "stop", "whole \U0001f600", None),
    ],
)
def test_the_finish_of_an_answer_is_the_servers(reply, finish, text, reason):
    with CompletionServer(lambda request: reply) as server:
        answer = ask(endpoint_source(server.url, chat=True))[0, 0]
    assert (answer.finish, answer.text, answer.reason) == (finish, text, reason)


def test_requests_run_at_once_but_no_more_than_allowed():
    with CompletionServer(fault=lambda *_: Fault(delay_seconds=0.05)) as server:
        ask(endpoint_source(server.url, concurrency=4))
    assert server.most_at_once == 4


def test_requests_keep_to_their_number_a_minute():
    with CompletionServer() as server:
        source = endpoint_source(server.url, requests_per_minute=1200, samples=1)
        begin = time.monotonic()
        ask(source)
    # Not from the first request on, which may come late on a machine that is busy.
    assert max(request.seconds for request in server.requests) - begin >= 4 * 60 / 1200


def test_requests_under_way_when_one_fails_still_come_back():
    arrived = threading.Barrier(4)

    def fault(number, request):
        arrived.wait(timeout=10)
        return Fault(401) if request.prompt == TEXTS[0] else Fault(delay_seconds=0.1)

    with CompletionServer(fault=fault) as server:
        source = endpoint_source(server.url, concurrency=4, samples=1)
        units, kept = dict(enumerate(source.units(PROMPTS))), []
        with pytest.raises(SourceError):
            kept.extend(number for number, _ in source.answer(units))
    assert sorted(kept) == [1, 2, 3]


def test_leaving_early_begins_no_further_attempt():
    def fault(number, request):
        return None if request.prompt == TEXTS[0] else Fault(500)

    with CompletionServer(fault=fault) as server:
        source = endpoint_source(server.url, concurrency=2, samples=1, retries=10_000)
        replies = source.answer(dict(enumerate(source.units(PROMPTS))))
        next(replies)
        replies.close()
        seen = len(server.requests)
        time.sleep(0.15)
        assert len(server.requests) == seen


# Answers that are there already


def answers_source(folder, records):
    write_jsonl(folder / "answers.jsonl", records)
    settings = AnswersSource(kind="answers", name="file", file="answers.jsonl")
    return open_source(settings, 0, folder)


def test_answers_may_be_messages_of_one_turn(tmp_path):
    turns = [{"role": "user", "content": "b b b"}, {"role": "assistant", "content": "first"}]
    answers = ask(answers_source(tmp_path, [{"messages": turns}]))
    assert answers[3, 0].text == "first"
    with pytest.raises(RowsError, match=r"answers\.jsonl:1: a text; expected one prompt"):
        answers_source(tmp_path, [{"text": "b b b"}])


def test_lines_are_matched_by_their_prompt_and_counted_as_samples(tmp_path):
    records = [
        {"prompt": "b b b\n", "completion": " first "},
        {"prompt": "of nobody", "completion": "x"},
        {"prompt": "b b b", "completion": "second"},
    ]
    answers = ask(answers_source(tmp_path, records))
    assert [answers[3, sample].text for sample in (0, 1)] == ["first", "second"]
    assert (answers[3, 0].finish, answers[3, 0].log_likelihood) == ("stop", None)
    assert (answers[0, 0].finish, answers[0, 0].reason) == ("refused", "no answer in the file")
    assert len(answers) == len(PROMPTS) + 1


def test_a_malformed_line_is_reported_with_file_and_line(tmp_path):
    with pytest.raises(RowsError, match=r'answers\.jsonl:2: key "completion" is missing'):
        answers_source(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
