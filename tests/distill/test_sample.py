"""The sampling stage: prompts, files, and runs that are killed and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distill.server import CompletionServer, Fault, Reply, echo
from distill.tiny import tiny_llama, write_jsonl
from killing import Forked

from graftkit.distill.config import DistillConfig, Prompts
from graftkit.distill.records import Prompt, read_lines
from graftkit.distill.sample import read_prompts, read_summaries, sample_answers
from graftkit.distill.sources import endpoint
from graftkit.errors import OutputError, RowsError, SourceError

SRC = Path(__file__).parents[2] / "src"
PROMPTS = tuple(Prompt(number, f"prompt {number}") for number in range(12))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(endpoint, "MOST_WAIT_SECONDS", 0.02)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def configuration(*sources, seed=0):
    defaults = {
        "model": {"samples": 2, "max_new_tokens": 16, "batch_tokens": 1},
        "endpoint": {"model": "big", "samples": 2, "retries": 1, "concurrency": 2},
        "answers": {},
    }
    sources = [{"name": s["kind"], **defaults[s["kind"]], **s} for s in sources]
    values = {"target": "t", "prompts": {"file": "p"}, "scores": [{"kind": "likelihood"}]}
    return DistillConfig.model_validate({**values, "seed": seed, "sources": sources})


def served(server, **settings):
    return {"kind": "endpoint", "url": server.url, **settings}


def sample(config, folder, progress=lambda step, done, total: None, config_folder=None):
    return sample_answers(config, PROMPTS, folder, config_folder or folder, progress).read_bytes()


# Prompts


def prompts_of(folder, records, seed=0, reference=False, tests=False, **settings):
    write_jsonl(folder / "prompts.jsonl", records)
    return read_prompts(Prompts(file="prompts.jsonl", **settings), seed, reference, tests, folder)


def test_prompts_are_numbered_by_line_and_the_dropped_are_counted(tmp_path):
    texts = ["a", "  ", "b", "a", "c", " b\n", ""]
    actual = prompts_of(tmp_path, [{"prompt": text, "completion": 4} for text in texts])
    assert actual.prompts == (Prompt(0, "a"), Prompt(2, "b"), Prompt(4, "c"))
    assert actual.dropped == {"empty": 2, "repeated": 2, "over the limit": 0}


def test_what_a_rule_compares_with_is_read_only_when_asked(tmp_path):
    records = [{"prompt": "a", "completion": " 4", "tests": "assert f()"}]
    assert prompts_of(tmp_path, records).prompts == (Prompt(0, "a"),)
    both = prompts_of(tmp_path, records, reference=True, tests=True).prompts
    assert both == (Prompt(0, "a", " 4", "assert f()"),)


def turns(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def test_messages_of_one_turn_are_a_prompt_and_its_reference(tmp_path):
    actual = prompts_of(tmp_path, [turns("a", "4"), turns("b", "5")], reference=True)
    assert actual.prompts == (Prompt(0, "a", "4"), Prompt(1, "b", "5"))
    assert prompts_of(tmp_path, [turns("a")]).prompts == (Prompt(0, "a"),)


def test_a_data_set_folder_is_a_prompts_file(tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"prompt": "a"}])
    assert read_prompts(Prompts(file="set"), 0, False, False, tmp_path).prompts == (Prompt(0, "a"),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (turns("a", "4", "b"), "the turns user, assistant, user; expected one prompt"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no message of the user"),
        ({"text": "a"}, 'key "prompt" is missing'),
    ],
)
def test_what_is_no_single_prompt_is_refused_with_its_line(tmp_path, record, message):
    with pytest.raises(RowsError, match=rf"prompts\.jsonl:1: .*{message}|:1: {message}"):
        prompts_of(tmp_path, [record])


def test_a_limit_is_a_seeded_choice_in_the_order_of_the_file(tmp_path):
    records = [{"prompt": f"p{number}"} for number in range(50)]
    actual = prompts_of(tmp_path, records, limit=10)
    assert [prompt.text for prompt in actual.prompts] == [f"p{p.id}" for p in actual.prompts]
    numbers = [prompt.id for prompt in actual.prompts]
    assert numbers == sorted(numbers)
    assert actual.dropped["over the limit"] == 40
    assert prompts_of(tmp_path, records, limit=10) == actual
    assert prompts_of(tmp_path, records, limit=10, seed=1) != actual


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt': 1}", r"prompts\.jsonl:3: not JSON .*expected"),
        (b'{"prompt": "\xff"}', r"prompts\.jsonl:3: byte 13 is not UTF-8"),
        (b"[" * 100_000, r"prompts\.jsonl:3: not JSON"),
        (b'["a"]', r"prompts\.jsonl:3: list found; expected"),
        (b"{}", r'prompts\.jsonl:3: key "prompt" is missing'),
        (b'{"prompt": null}', r'prompts\.jsonl:3: "prompt" is NoneType; expected a string'),
        (b'{"prompt": "a"}', r'prompts\.jsonl:3: key "completion" is missing'),
        (b'{"prompt": "a", "completion": "b"}', r'prompts\.jsonl:3: key "tests" is missing'),
        (b'{"prompt": "\\ud800"}', r'prompts\.jsonl:3: "prompt" holds half of a surrogate pair'),
    ],
)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path, line, message):
    good = b'{"prompt": "x", "completion": "y", "tests": "z"}\n\n'
    (tmp_path / "prompts.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(RowsError, match=message) as caught:
        read_prompts(Prompts(file="prompts.jsonl"), 0, True, True, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts_or_no_file_is_refused(tmp_path):
    with pytest.raises(RowsError, match="no prompts; expected one JSON object a line"):
        prompts_of(tmp_path, [{"prompt": " "}])
    with pytest.raises(RowsError, match=r"absent\.jsonl: cannot be read"):
        read_prompts(Prompts(file="absent.jsonl"), 0, False, False, tmp_path)


# Whole runs


@pytest.mark.slow
def test_answers_are_sorted_by_prompt_then_source_then_sample(tmp_path, tiny):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "prompt 3", "completion": "x"}])
    with CompletionServer() as server:
        config = configuration(
            served(server, name="z"),
            {"kind": "answers", "name": "a", "file": "a.jsonl"},
            {"kind": "model", "name": "m", "model": str(tiny)},
        )
        seen = []
        sample(config, tmp_path, lambda *progress: seen.append(progress))
    records = list(read_lines(tmp_path / "samples.jsonl"))
    keys = [(record["prompt_id"], record["source"], record["sample"]) for record in records]
    assert keys[:5] == [(0, "z", 0), (0, "z", 1), (0, "a", 0), (0, "m", 0), (0, "m", 1)]
    assert [key[0] for key in keys] == sorted(key[0] for key in keys)
    assert len(keys) == len(set(keys)) == 12 * 5
    assert [step for step in seen if step[1] == step[2]] == [
        ("sample z", 24, 24),
        ("sample a", 12, 12),
        ("sample m", 24, 24),
    ]
    assert not (tmp_path / "samples.partial").exists()


def test_a_summary_counts_answers_refusals_tokens_and_cost(tmp_path):
    def answer(request):
        return Reply(None if request.prompt == "prompt 1" else "x", "length", 10, 4)

    def fault(number, request):
        return Fault(400, "too rude") if request.prompt == "prompt 2" else None

    with CompletionServer(answer, fault) as server:
        sample(configuration(served(server, price_per_million=(2.0, 10.0))), tmp_path)
    (summary,) = read_summaries(tmp_path)
    assert (summary.source, summary.answers, summary.cut) == ("endpoint", 20, 20)
    assert summary.refused == {"no text (finish_reason length)": 2, "400 too rude": 2}
    assert (summary.tokens_in, summary.tokens_out) == (220, 88)
    assert summary.cost == pytest.approx((220 * 2 + 88 * 10) / 1e6)


def test_reasons_beyond_the_commonest_are_counted_together(tmp_path):
    with CompletionServer(fault=lambda number, r: Fault(400, f"no {r.prompt}")) as server:
        sample(configuration(served(server)), tmp_path)
    (summary,) = read_summaries(tmp_path)
    assert len(summary.refused) == 11
    assert summary.refused["other reasons"] == 4


def test_a_server_that_dies_and_comes_back_leaves_the_data_of_an_undisturbed_run(tmp_path):
    with CompletionServer() as server:
        expected = sample(configuration(served(server)), tmp_path / "whole")
        port = server.port

    def dying(request):
        if len(server.requests) > 9:
            server.stop()
        return echo(request)

    server = CompletionServer(dying, port=port).__enter__()
    with pytest.raises(SourceError, match="run the same command to go on"):
        sample(configuration(served(server)), tmp_path / "broken")
    assert not (tmp_path / "broken" / "samples.jsonl").exists()
    kept = len((tmp_path / "broken/samples.partial/endpoint.jsonl").read_bytes().splitlines()) - 1
    assert 4 <= kept <= 10
    with CompletionServer(port=port) as server:
        # How it is asked and what it costs may change on the way.
        changed = served(server, concurrency=5, retries=7, licence="MIT", timeout_seconds=9)
        assert sample(configuration(changed), tmp_path / "broken") == expected
        assert len(server.requests) == 24 - kept


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    def interrupt(step, done, total):
        if done == 7:
            raise KeyboardInterrupt

    with CompletionServer() as server:
        config = configuration(served(server, concurrency=1))
        expected = sample(config, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            sample(config, tmp_path / "broken", interrupt)
        before = len(server.requests)
        assert sample(config, tmp_path / "broken") == expected
        assert len(server.requests) - before == 24 - 7


@pytest.mark.slow
def test_a_journal_with_a_torn_last_line_goes_on(tmp_path):
    def interrupt(step, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with CompletionServer() as server:
        config = configuration(served(server))
        expected = sample(config, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            sample(config, tmp_path / "broken", interrupt)
        journal = tmp_path / "broken" / "samples.partial" / "endpoint.jsonl"
        content = journal.read_bytes()
        for length in (0, 3, len(content) - 1, len(content) - 20):
            journal.parent.mkdir(exist_ok=True)
            journal.write_bytes(content[:length])
            assert sample(config, tmp_path / "broken") == expected


@pytest.mark.parametrize("change", ["temperature", "seed", "prompts"])
def test_a_journal_of_something_else_is_not_continued(tmp_path, change):
    def interrupt(step, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with CompletionServer() as server:
        with pytest.raises(KeyboardInterrupt):
            sample(configuration(served(server)), tmp_path, interrupt)
        settings = {"temperature": 0.1} if change == "temperature" else {}
        config = configuration(served(server, **settings), seed=int(change == "seed"))
        prompts = PROMPTS[:-1] if change == "prompts" else PROMPTS
        with pytest.raises(OutputError, match=r"endpoint\.jsonl: unfinished answers of other"):
            sample_answers(config, prompts, tmp_path, tmp_path, lambda *progress: None)
        (tmp_path / "samples.partial" / "endpoint.jsonl").unlink()
        sample_answers(config, prompts, tmp_path, tmp_path, lambda *progress: None)


def test_the_key_is_in_no_file_that_a_run_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", "sk-very-secret")
    fault = Fault(400, "sk-very-secret is fine, but this prompt is not")

    def stop(step, done, total):
        if done == 20:
            raise KeyboardInterrupt

    with CompletionServer(fault=lambda number, _: fault if number % 3 else None) as server:
        config = configuration(served(server, key_env="SERVED_KEY"))
        with pytest.raises(KeyboardInterrupt):
            sample(config, tmp_path, stop)
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        sample(config, tmp_path)
    content = [file.read_bytes() for file in [*files, *tmp_path.glob("*")] if file.is_file()]
    assert any(b"*** is fine" in each for each in content)
    assert not any(b"very-secret" in each for each in content)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tmp_path, tiny):
    config = configuration({"kind": "model", "model": str(tiny), "max_new_tokens": 32})
    expected = sample(config, tmp_path / "whole")
    folder = tmp_path / "killed"
    journal = folder / "samples.partial" / "model.jsonl"
    killed = Forked(lambda: len(sample(config, folder)) and None)
    while not (journal.exists() and journal.stat().st_size > 400):
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.end() == -signal.SIGKILL
    kept = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    assert 1 < len(kept) < 13
    assert sample(config, folder) == expected


@pytest.mark.slow
def test_the_stage_loads_neither_transformers_nor_openai_before_a_source_needs_them():
    code = "import sys, graftkit.distill.sample; print({'transformers', 'openai'} & {*sys.modules})"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == "set()"
