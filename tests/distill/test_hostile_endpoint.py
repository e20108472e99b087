"""Endpoints that are not trusted: slow, large, talkative, or making no sense."""

import asyncio
import base64
import contextlib
import gzip
import json
import re
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

from graftkit.distill.config import EndpointSource
from graftkit.distill.records import Prompt
from graftkit.distill.select import data_card
from graftkit.distill.sources import endpoint, open_source
from graftkit.distill.sources.endpoint import KeyMask
from graftkit.errors import ConfigError, SourceError

KEY = "sk-0123456789+/abcdefSECRET"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("HOSTILE_KEY", KEY)


def serve(respond) -> str:
    """A server that reads a request and lets `respond(connection, number)` say anything at all."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        for number in range(20):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                _read_request(connection)
                respond(connection, number)

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def _read_request(connection):
    # Whole: closing a socket with unread bytes resets the connection.
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(65536)
    head, _, body = request.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(65536)


def says(content, status="200 OK", **headers):
    """A whole response; content: bytes, or what becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", "Connection": "close", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()
    return lambda connection, number: connection.sendall(head + body)


def completion(text="x", finish="stop", usage=None, **message):
    return {
        "choices": [{"finish_reason": finish, "message": {"content": text, **message}}],
        "usage": usage or {"prompt_tokens": 1, "completion_tokens": 1},
    }


def ask(url, **settings):
    settings = {"samples": 1, "retries": 0, "chat": True, "max_new_tokens": 16, **settings}
    source = open_source(
        EndpointSource(kind="endpoint", name="s", model="m", url=url, **settings), 0, None
    )
    ((_, reply),) = source.answer(dict(enumerate(source.units([Prompt(0, "q")]))))
    return reply


def drip(head):
    def respond(connection, number):
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"a")
            time.sleep(0.05)

    return respond


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Slow: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 307 No\r\nLocation: /v1\r\nContent-Length: 1000\r\n\r\n",
    ],
    ids=["status", "headers", "body", "chunks", "error", "redirect"],
)
def test_the_deadline_holds_for_a_whole_answer_however_slowly_it_comes(head):
    begin = time.monotonic()
    with pytest.raises(SourceError, match=r"no answer within 0.3 s"):
        ask(serve(drip(head)), timeout_seconds=0.3)
    assert time.monotonic() - begin < 2.5


def test_an_answer_within_its_deadline_is_taken_whole_though_it_comes_in_pieces():
    body = json.dumps(completion("late")).encode()

    def respond(connection, number):
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for part in (head, body[:10], body[10:]):
            connection.sendall(part)
            time.sleep(0.05)

    assert ask(serve(respond), timeout_seconds=20).answers[0].text == "late"


BLANKS = b" " * 3_000_000


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (BLANKS, {}),
        (gzip.compress(BLANKS), {"Content_Encoding": "gzip"}),
        (zlib.compress(BLANKS), {"Content_Encoding": "deflate"}),
    ],
    ids=["plain", "gzip", "deflate"],
)
@pytest.mark.parametrize("status", ["200 OK", "500 No", "307 No", "400 No"])
def test_a_body_beyond_its_limit_is_refused_also_where_it_unpacks_to_it(body, headers, status):
    with pytest.raises(SourceError, match=r"the answer is larger than 1,064,960 bytes"):
        ask(serve(says(body, status, Location="/v1", **headers)))


def test_an_endless_body_is_left_early():
    taken = [0]

    def respond(connection, number):
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(400):
            connection.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
            taken[0] += 1

    with pytest.raises(SourceError, match="larger than"):
        ask(serve(respond))
    time.sleep(0.1)
    assert taken[0] < 30


def test_a_compressed_answer_is_read_and_an_unknown_or_broken_packing_is_refused():
    whole = gzip.compress(json.dumps(completion("packed")).encode())
    assert ask(serve(says(whole, Content_Encoding="gzip"))).answers[0].text == "packed"
    for packing, words in (("zstd", r"packed \(zstd\)"), ("gzip", "does not unpack")):
        with pytest.raises(SourceError, match=words):
            ask(serve(says(b"\x28\xb5\x2f\xfd" * 9, Content_Encoding=packing)))


def test_redirects_are_followed_but_not_for_ever():
    def respond(connection, number):
        if number < 2:
            return says(b"", "307 Elsewhere", Location="/v1/there")(connection, number)
        return says(completion("there"))(connection, number)

    assert ask(serve(respond)).answers[0].text == "there"
    with pytest.raises(SourceError, match="more than 5 redirects"):
        ask(serve(says(b"", "307 Elsewhere", Location="/v1/there")))


REPEATED = (
    KEY,
    quote(KEY, safe=""),
    *(base64.b64encode(b"x" * n + KEY.encode() + b"yz").decode() for n in range(3)),
)


@pytest.mark.parametrize("shown", REPEATED, ids=["plain", "percent", "base64", "shift1", "shift2"])
@pytest.mark.parametrize(
    "respond",
    [
        lambda k: says(completion(f"take {k} now")),
        lambda k: says(completion(None, refusal=f"not for {k}")),
        lambda k: says(completion(None, refusal={"why": [k]})),
        lambda k: says(completion("x", finish=f"stop {k}")),
        lambda k: says({"error": {"message": f"bad {k}"}}, "400 No"),
        lambda k: says({"error": {"message": {"deep": k}}}, "401 No"),
        lambda k: says(f"<html>{k}</html>".encode(), "404 No"),
        lambda k: says({"error": {"message": k}}, "503 No"),
        lambda k: says(b"", "307 No", Location=f"http://{k[:9]}.invalid/{k}"),
    ],
    ids=["text", "refusal", "nested", "finish", "400", "401", "404", "503", "location"],
)
def test_a_key_that_a_server_repeats_stands_in_no_field_and_no_message(respond, shown):
    try:
        said = repr(ask(serve(respond(shown)), key_env="HOSTILE_KEY"))
    except SourceError as error:
        said = f"{error} {error.__cause__!r}"
    for piece in ("abcdefSECRET", shown, shown[8:24]):
        assert piece not in said


def test_a_short_key_is_masked_in_messages_and_left_in_answers():
    mask = KeyMask("EMPTY")
    assert mask.answer("an EMPTY list") == "an EMPTY list"
    assert mask.message("bad key EMPTY") == "bad key ***"
    assert KeyMask(None).message("as it is") == "as it is"


@pytest.mark.parametrize(
    "url",
    [
        f"http://localhost/v1?key={KEY}",
        "http://user:password@localhost/v1",
        f"http://localhost/{KEY}/v1",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ConfigError, match="holds a password, a query or the key") as caught:
        ask(url, key_env="HOSTILE_KEY")
    assert "SECRET" not in str(caught.value)
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "https:///v1", "ftp://localhost"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="expected a base URL"):
        ask(url)


@pytest.mark.parametrize(
    "count", ["1" + "0" * 400, "-1", "1e400", "true", '"many"', "[1]", "null", "NaN"]
)
def test_counts_of_tokens_that_mean_nothing_are_no_counts(count):
    body = json.dumps(completion()).replace(
        '"completion_tokens": 1', f'"completion_tokens": {count}'
    )
    reply = ask(serve(says(body.encode())))
    assert (reply.tokens_in, reply.tokens_out, reply.answers[0].tokens) == (1, 0, 0)


NONSENSE = [
    b"",
    b"\xff\xfe",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"choices": {"0": 1}}',
    b'{"choices": [null]}',
    b'{"choices": [[]]}',
    b'{"choices": [{"message": "text", "finish_reason": "stop"}]}',
    b'{"choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}]}',
    b'{"choices": [{"message": {"content": "a"}, "finish_reason": 1}]}',
    b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": [1]}',
    b'{"choices": [{"message": {"content": 1%s}, "finish_reason": "stop"}]}' % (b"0" * 5000),
]


@pytest.mark.parametrize("body", NONSENSE, ids=range(len(NONSENSE)))
def test_what_is_no_completion_is_a_failure_in_one_line(body):
    with pytest.raises(SourceError, match="holds no completion") as caught:
        ask(serve(says(body)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "respond",
    [
        says(b"[" * 100_000, "500 No"),
        says(b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}", "500 No"),
        says(b"abc", "500 No", Content_Type="text/plain; charset=hex"),
        says(b"abc", "500 No", Content_Type="text/plain; charset=utf-7"),
        says(b"abc", "429 No", Retry_After="1e400"),
        says(b"abc", "429 No", Retry_After="Mon, 01 Jan 99999999999 00:00:00 GMT"),
        says(b"abc", "999 No"),
        says(b"abc", "200 OK", X_Bad="a\x00b"),
        says(b"", "307 No", Location="http://[::1"),
        lambda connection, number: connection.sendall(b"\x16\x03\x01" * 100),
        lambda connection, number: connection.sendall(b"HTTP/1.1 200 OK\r\n" * 9000),
        lambda connection, number: connection.sendall(b"HTTP/1.1 2\r\nContent-Length: x\r\n\r\n"),
        lambda connection, number: connection.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500_000),
        lambda connection, number: connection.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        ),
    ],
    ids=range(14),
)
def test_what_is_no_http_or_no_error_is_a_failure_in_one_line(respond):
    with pytest.raises(SourceError) as caught:
        ask(serve(respond), timeout_seconds=5)
    assert "\n" not in str(caught.value)


def test_a_servers_words_are_no_markup_of_the_data_card():
    words = "<script>x</script> `code` ![a](http://b) | \x1b[2J"
    answers = dict(answers=1, passed=1, mean_reward=0.0, tokens_in=1, tokens_out=1, cost=0.0)
    text = data_card(
        {
            "prompts": {"file": "p", "used": 1, "dropped": {}},
            "seed": 0,
            "answers": {"s": answers | {"refused": {words: 2}, "failed": {}}},
            "sft": {"rows": 1, "dropped": {}},
            "pairs": {"pairs": 0, "dropped": {}},
            "sources": [],
            "scores": [],
        }
    )
    line = r"s: refused: `<script>x</script> 'code' ![a](http://b) | \x1b[2J` 2."
    assert line in text.splitlines()


@pytest.mark.slow
def test_first_requests_of_many_threads_share_one_event_loop():
    async def running_loop():
        return asyncio.get_running_loop()

    def first(_):
        together.wait(timeout=10)
        return endpoint.finish_within(10, running_loop())

    for _ in range(20):
        together = threading.Barrier(8)
        endpoint._start_loop.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(first, range(8)))) == 1
