"""The OpenAI client, and raw requests, against a real server in a thread."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch

from graftkit.checkpoint import Checkpoint
from graftkit.errors import ConfigError
from graftkit.models.loading import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.route.centroid import fit_key
from graftkit.serve.answering import AnswerLimits
from graftkit.serve.engine import Engine
from graftkit.serve.guard import GuardSettings
from graftkit.serve.models import ServedModels, parse_mixture
from graftkit.serve.server import PackServer

KEY, ADMIN = "a-key-of-users", "a-key-of-admins"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
LETTERS = {"math": "0123456789", "code": "ABCDEFGHIJ"}


def key_prompts(name):
    generator = torch.Generator().manual_seed(len(name))
    letters = LETTERS[name]
    draws = [torch.randint(10, (12,), generator=generator).tolist() for _ in range(30)]
    return ["".join(letters[place] for place in draw) for draw in draws]


@contextmanager
def server_of(world, folder=None, keys=None, limits=None, names=("math", "code"), queue=64):
    checkpoint = Checkpoint.open(world.target)
    model, tokenizer = load_model(checkpoint, torch.float32), usable_tokenizer(checkpoint)
    tokenizer.chat_template = TEMPLATE
    packs = {
        name: fit_key(model, tokenizer, key_prompts(name)).into(world.packs[name]) for name in names
    }
    engine = Engine(model, tokenizer, checkpoint, queue=queue)
    models = ServedModels(engine, "target-model", folder)
    for name, pack in packs.items():
        models.load(name, pack)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = GuardSettings(KEY, ADMIN) if keys is None else keys
    server = PackServer(models, keys, limits or AnswerLimits(), port=port, grace=2.0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def folder(world_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    world_of().packs["poem"].save(folder / "poem.skillpack")
    (folder.parent / "outside.skillpack").write_bytes((folder / "poem.skillpack").read_bytes())
    (folder / "link.skillpack").symlink_to(folder.parent / "outside.skillpack")
    return folder


@pytest.fixture(scope="module")
def server(world_of, folder):
    with server_of(world_of(), folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def call(server, method, path, key=KEY, **options):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **options)


def test_the_client_lists_the_target_the_packs_and_auto(client):
    models = {model.id: model for model in client.models.list()}
    assert {"target-model", "math", "code", "auto"} <= models.keys()
    assert models["math"].parent == "target-model"
    assert client.models.retrieve("code").id == "code"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_a_completion_is_the_packs_and_streams_as_the_same_text(client):
    texts = {}
    for model in ("target-model", "math", "code", "math+code", "math:0.7+code:0.3"):
        options = {"model": model, "prompt": "abcd", "max_tokens": 12, "temperature": 0}
        answer = client.completions.create(**options)
        texts[model] = answer.choices[0].text
        stream = client.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        pieces = list(stream)
        streamed = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        assert streamed == answer.choices[0].text
        assert pieces[-1].usage == answer.usage
        assert answer.usage.prompt_tokens == 4
        assert answer.choices[0].finish_reason in ("stop", "length")
    assert len(set(texts.values())) >= 4


def test_a_chat_is_given_in_the_template_and_has_log_probabilities(client):
    answer = client.chat.completions.create(
        model="math",
        messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "abc"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        n=2,
    )
    assert answer.usage.prompt_tokens == len("[s]be[u]abc[a]")
    assert answer.choices[0].message.content == answer.choices[1].message.content
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    plain = client.completions.create(
        model="math", prompt="[s]be[u]abc[a]", max_tokens=4, temperature=0
    )
    assert plain.choices[0].text == answer.choices[0].message.content


def test_a_chat_streams_with_one_role_for_each_answer(client):
    stream = client.chat.completions.create(
        model="code", messages=[{"role": "user", "content": "x"}], max_tokens=5, n=2, stream=True
    )
    pieces = [choice for piece in stream for choice in piece.choices]
    assert sum(piece.delta.role is not None for piece in pieces) == 2
    assert sum(piece.finish_reason is not None for piece in pieces) == 2


def test_the_responses_route_answers_whole_and_in_events(client):
    options = {"model": "math", "input": "abc", "temperature": 0, "max_output_tokens": 6}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert whole.output_text == text != ""
    assert events[-1].response.output_text == text
    assert whole.usage.output_tokens <= 6


def test_auto_takes_the_pack_of_the_prompt_and_says_so(client):
    for name in ("math", "code"):
        prompt = key_prompts(name)[3]
        options = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        answer = client.completions.create(model="auto", **options)
        assert answer.route["packs"] == {name: 1.0}
        assert answer.route["scores"].keys() >= {"math", "code"}
        named = client.completions.create(model=name, **options)
        assert answer.choices[0].text == named.choices[0].text


def test_many_clients_at_once_get_what_one_alone_gets(client):
    questions = [
        (model, prompt)
        for model in ("target-model", "math", "code", "math+code")
        for prompt in ("abc", "hello there", "0", "WXYZ" * 5)
    ]

    def ask(question):
        model, prompt = question
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=10, temperature=0)
        return answer.choices[0].text

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_every_route_needs_the_key(server):
    routes = [
        (method.upper(), path.replace("{name}", "math"))
        for path, methods in call(server, "GET", "/openapi.json").json()["paths"].items()
        for method in methods
    ]
    assert len(routes) >= 10
    for method, path in [*routes, ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/nothing")]:
        for key in (None, "wrong", KEY[:-1], KEY + "x"):
            answer = call(server, method, path, key=key)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "authentication_error"
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong")]
    assert httpx.get(f"{server.url}/health", headers=twice).status_code == 401


def test_packs_are_loaded_and_unloaded_with_the_admin_key_alone(server, client):
    body = {"lora_name": "poem", "lora_path": "poem.skillpack"}
    assert call(server, "POST", "/v1/load_lora_adapter", json=body).status_code == 403
    assert call(server, "POST", "/v1/load_lora_adapter/", json=body).status_code in (403, 404)
    assert call(server, "POST", "/v1/load_lora_adapter", ADMIN, json=body).status_code == 200
    again = call(server, "POST", "/v1/load_lora_adapter", ADMIN, json=body)
    assert again.status_code == 400
    in_place = call(
        server, "POST", "/v1/load_lora_adapter", ADMIN, json=body | {"load_inplace": True}
    )
    assert in_place.status_code == 200
    assert client.completions.create(model="poem", prompt="abc", max_tokens=3).choices[0].text
    gone = {"lora_name": "poem"}
    assert call(server, "POST", "/v1/unload_lora_adapter", ADMIN, json=gone).status_code == 200
    assert call(server, "POST", "/v1/unload_lora_adapter", ADMIN, json=gone).status_code == 404
    with pytest.raises(openai.NotFoundError, match="poem"):
        client.completions.create(model="poem", prompt="abc", max_tokens=3)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.skillpack",
        "../outside",
        "/etc/passwd",
        "link.skillpack",
        "nothing",
        "a/../poem",
        "poem.skillpack/",
        "..",
        "poem\x00",
    ],
)
def test_a_pack_comes_from_the_allowed_folder_alone(server, path):
    body = {"lora_name": "evil", "lora_path": path}
    answer = call(server, "POST", "/v1/load_lora_adapter", ADMIN, json=body)
    assert answer.status_code == 400
    assert "/" not in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["auto", "target", "target-model", "a b", "a+b", "../x", "a:1"])
def test_a_pack_has_a_name_of_its_own(server, name):
    body = {"lora_name": name, "lora_path": "poem.skillpack"}
    assert call(server, "POST", "/v1/load_lora_adapter", ADMIN, json=body).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "math"}',
        b'{"model": "math", "prompt": 7}',
        b'{"model": "math", "prompt": ""}',
        b'{"model": "math", "prompt": []}',
        b'{"model": "math", "prompt": [99999]}',
        b'{"model": "math", "prompt": "x", "temperature": -1}',
        b'{"model": "math", "prompt": "x", "max_tokens": 0}',
        b'{"model": "math", "prompt": "x", "n": 1000}',
        b'{"model": "math", "prompt": "x", "echo": true}',
        b'{"model": "math+math", "prompt": "x"}',
        b'{"model": "math:0.5+code", "prompt": "x"}',
        b'{"model": "math:nan", "prompt": "x"}',
        b'{"model": "../math", "prompt": "x"}',
        b"\xff\xfe",
    ],
)
def test_a_malformed_request_is_refused_and_harms_nobody(server, client, body):
    answer = call(server, "POST", "/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.completions.create(model="math", prompt="x", max_tokens=1).choices


def test_a_body_that_is_too_large_or_too_slow_is_refused(world_of):
    keys = GuardSettings(KEY, None, body_bytes=1000, body_seconds=0.3)
    with server_of(world_of(), keys=keys, names=("math",)) as server:
        body = {"model": "math", "prompt": "x" * 2000}
        assert call(server, "POST", "/v1/completions", json=body).status_code == 413
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            slow.sendall(head.encode() + b"Content-Length: 500\r\n\r\n{")
            assert b" 408 " in slow.recv(1000).splitlines()[0]
        denied = {"lora_name": "x", "lora_path": "x"}
        assert call(server, "POST", "/v1/load_lora_adapter", json=denied).status_code == 403


def test_a_full_queue_answers_429_with_a_time_to_wait(world_of):
    with server_of(world_of(), names=("math",), queue=1) as server:
        gate = threading.Event()
        engine = server._engine
        held = threading.Thread(target=engine.call, args=(gate.wait,))
        held.start()
        time.sleep(0.1)
        body = {"model": "math", "prompt": ["a", "b"], "max_tokens": 1}
        answer = call(server, "POST", "/v1/completions", json=body)
        gate.set()
        held.join()
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


def test_a_client_that_goes_away_ends_its_answer(world_of):
    with server_of(world_of(), names=("math",)) as server:
        engine = server._engine
        run = engine.decoder.run
        engine.decoder.run = lambda rows: (time.sleep(0.05), run(rows))[1]
        with httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}
        ) as client:
            body = {"model": "math", "prompt": "abc", "max_tokens": 50}
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
            body["stream"] = True
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        deadline = time.monotonic() + 5
        while engine.load_counts != (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_signal_ends_streams_with_done(world_of):
    with server_of(world_of(), names=("math",)) as server:
        run = server._engine.decoder.run
        server._engine.decoder.run = lambda rows: (time.sleep(0.1), run(rows))[1]
        body = {"model": "math", "prompt": "abc", "max_tokens": 60, "stream": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{server.url}/v1/completions"
        lines = []
        with httpx.stream("POST", url, json=body, headers=headers, timeout=30) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                server.should_exit = True
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert not server._engine.is_running


def test_metrics_count_requests_tokens_and_packs(server, client):
    client.completions.create(model="auto", prompt=key_prompts("math")[0], max_tokens=2)
    text = call(server, "GET", "/metrics").text
    assert 'graftkit_requests_total{route="/v1/completions",status="200"}' in text
    assert 'graftkit_routed_total{pack="math"}' in text
    assert 'graftkit_pack_bytes{pack="code"}' in text
    assert "graftkit_request_seconds_bucket" in text
    assert 'graftkit_tokens_total{kind="answer"}' in text
    assert KEY not in text
    assert call(server, "GET", "/health").json()["status"] == "ok"
    assert call(server, "GET", "/ready").json() == {"ready": True}


def test_keys_are_never_shown(server):
    assert KEY not in repr(GuardSettings(KEY, ADMIN))
    answer = call(server, "GET", "/openapi.json")
    assert KEY not in json.dumps(answer.json())


def test_an_address_that_others_reach_needs_a_key(server):
    with pytest.raises(ConfigError, match="API key"):
        PackServer(None, GuardSettings(), AnswerLimits(), host="0.0.0.0")


def test_mixtures_are_read():
    assert parse_mixture("math") == {"math": 1.0}
    assert parse_mixture("math+code") == {"math": 0.5, "code": 0.5}
    assert parse_mixture("math:0.7+code:-0.3") == {"math": 0.7, "code": -0.3}
