import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest
from distill.sandboxed import require_sandbox
from distill.server import CompletionServer, Fault

import graftkit
from graftkit.distill.config import DistillConfig
from graftkit.distill.records import Prompt, SourceAnswer, answer_record, write_lines
from graftkit.distill.scores import needed_fields, read_scored, score_answers
from graftkit.errors import RowsError, SourceError

EXACT, NUMBER, CODE = {"kind": "exact"}, {"kind": "number"}, {"kind": "code"}
LIKELIHOOD, AGREEMENT = {"kind": "likelihood"}, {"kind": "agreement"}
SRC = str(Path(graftkit.__file__).parents[1])
PROMPTS = (
    Prompt(0, "1+1=", "2", "assert answer == 2"),
    Prompt(3, "2+2=", "4", "assert answer == 4"),
)


def configured(*scores: dict) -> DistillConfig:
    sources = [
        {"kind": "answers", "name": "mini", "file": "mini.jsonl"},
        {"kind": "answers", "name": "other", "file": "other.jsonl"},
    ]
    return DistillConfig.model_validate(
        {
            "target": "target",
            "prompts": {"file": "prompts.jsonl"},
            "sources": sources,
            "scores": list(scores),
        }
    )


def judge(url: str, **more) -> dict:
    return {"kind": "judge", "url": url, "model": "judge", "retries": 0, "concurrency": 1, **more}


def said(
    text, prompt=0, sample=0, source="mini", finish="stop", log_likelihood=-1.0
) -> SourceAnswer:
    requested = PROMPTS[prompt]
    return SourceAnswer(
        requested.id, requested.text, source, sample, text, 3, finish, log_likelihood
    )


ANSWERS = (
    said("2"),
    said("3", sample=1),
    said("2", source="other", log_likelihood=-0.5),
    said("4", prompt=1),
    said("", prompt=1, sample=1),
    said("4", prompt=1, source="other", finish="length"),
    said("", prompt=1, sample=1, source="other", finish="refused"),
)


def run(folder: Path, *scores: dict, answers=ANSWERS, progress=lambda *_: None):
    folder.mkdir(exist_ok=True)
    write_lines(folder / "samples.jsonl", map(answer_record, answers))
    file = score_answers(configured(*scores), PROMPTS, folder, folder, progress)
    assert file == folder / "scores.jsonl"
    return read_scored(folder)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([EXACT], (True, False)),
        ([{"kind": "json"}, LIKELIHOOD], (True, False)),
        ([CODE], (False, True)),
        ([NUMBER, CODE], (True, True)),
        ([LIKELIHOOD, AGREEMENT], (False, False)),
    ],
)
def test_the_rules_say_what_they_read_of_the_prompts_file(scores, expected):
    assert needed_fields(configured(*scores)) == expected


def test_where_there_are_rules_only_the_reward_says_whether_they_pass(tmp_path):
    scored = run(tmp_path, EXACT)
    assert [one.answer for one in scored] == list(ANSWERS)
    assert [one.passed for one in scored] == [True, False, True, True, False, False, False]
    assert [one.reward for one in scored] == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    reasons = [None, "exact", None, None, "empty", "unfinished", "refused"]
    assert [one.failed for one in scored] == reasons
    assert all(one.scores == {} for one in scored)


def test_the_reward_is_the_weighted_sum_and_a_failed_rule_leaves_it(tmp_path):
    scored = run(tmp_path, EXACT, {**LIKELIHOOD, "weight": 0.5}, {**AGREEMENT, "weight": 2.0})
    assert scored[0].scores == {"likelihood": -1.0, "agreement": 0.0}
    assert [one.reward for one in scored[:3]] == [-0.5, -0.5, -0.25]
    assert [one.passed for one in scored[:3]] == [True, False, True]
    assert [(one.reward, one.scores) for one in scored[4:]] == [(0.0, {})] * 3


def test_the_first_rule_that_fails_is_named_and_two_of_a_kind_are_told_apart(tmp_path):
    scored = run(tmp_path, NUMBER, EXACT, answers=[said("so 2"), said("none", sample=1)])
    assert [one.failed for one in scored] == ["exact", "number: no number"]
    scored = run(tmp_path, AGREEMENT, {**AGREEMENT, "of": "number"}, answers=[said("2")])
    assert list(scored[0].scores) == ["agreement", "agreement_2"]


def test_an_answer_that_cannot_be_graded_fails_with_that_reason(tmp_path):
    answers = [said("3", log_likelihood=None), said("2", sample=1)]
    scored = run(tmp_path, EXACT, LIKELIHOOD, AGREEMENT, answers=answers)
    assert [one.failed for one in scored] == ["likelihood: unknown", None]
    assert (scored[0].reward, scored[0].scores) == (0.0, {"agreement": 0.0})


def test_one_line_an_answer_is_written_in_order(tmp_path):
    run(tmp_path, EXACT)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "prompt_id": 0,
        "source": "mini",
        "sample": 1,
        "passed": False,
        "failed": "exact",
        "reward": 0.0,
        "scores": {},
    }
    assert len(lines) == len(ANSWERS)


def test_no_samples_at_all_are_no_scores(tmp_path):
    require_sandbox()
    assert run(tmp_path, EXACT, CODE, answers=[]) == []


def test_only_whole_answers_go_to_a_judge_and_equal_ones_once(tmp_path):
    seen = []
    with CompletionServer(lambda request: f"Grade: {3 + request.prompt.count('1+1')}") as server:
        scored = run(tmp_path, judge(server.url), progress=lambda *call: seen.append(call))
    assert len(server.requests) == 3
    assert [one.reward for one in scored] == [0.4, 0.4, 0.4, 0.3, 0.0, 0.0, 0.0]
    assert seen == [("scoring: judge", done, 3) for done in range(4)]
    assert not (tmp_path / "scores.partial").exists()


def test_a_run_that_lost_its_judge_goes_on_where_it_stopped(tmp_path):
    answers = [said(f"{n}", sample=n) for n in range(6)]

    def grade(request):
        return f"Grade: {request.prompt.count('3') % 10}"

    def lost(number, request):
        return Fault(401) if number >= 4 else None

    with CompletionServer(grade) as server:
        run(tmp_path / "whole", judge(server.url), LIKELIHOOD, answers=answers)
    with CompletionServer(grade, lost) as server, pytest.raises(SourceError):
        run(tmp_path / "cut", judge(server.url), LIKELIHOOD, answers=answers)
    assert not (tmp_path / "cut" / "scores.jsonl").exists()
    with CompletionServer(grade, port=server.port) as server:
        # Another pace and weight do not throw grades away.
        changed = judge(server.url, timeout_seconds=30, concurrency=2)
        run(tmp_path / "cut", changed, LIKELIHOOD, answers=answers)
        assert len(server.requests) == 2
    files = [tmp_path / name / "scores.jsonl" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("change", ["instruction", "samples"])
def test_verdicts_of_other_work_are_not_continued(tmp_path, change):
    answers = [said(f"{n}", sample=n) for n in range(3)]

    def lost(number, request):
        return Fault(401) if number == 2 else None

    with CompletionServer(lambda _: "Grade: 5", lost) as server, pytest.raises(SourceError):
        run(tmp_path, judge(server.url), answers=answers)
    with CompletionServer(lambda _: "Grade: 6", port=server.port) as server:
        more = {"instruction": "Be strict."} if change == "instruction" else {}
        others = [said("other"), *answers[1:]] if change == "samples" else answers
        scored = run(tmp_path, judge(server.url, **more), answers=others)
    assert [one.reward for one in scored] == [0.6] * 3


SCRIPT = """
import json, sys
from pathlib import Path
from graftkit.distill.config import DistillConfig
from graftkit.distill.records import Prompt
from graftkit.distill.scores import score_answers
folder = Path(sys.argv[1])
config = DistillConfig.model_validate_json(sys.argv[2])
prompts = [Prompt(*parts) for parts in json.loads(sys.argv[3])]
score_answers(config, prompts, folder, folder, lambda *_: None)
"""


def test_an_answer_that_its_tests_cannot_judge_is_an_error(tmp_path):
    require_sandbox()
    (scored,) = run(tmp_path, CODE, answers=[said("class P: pass\nanswer = P()")])
    assert not scored.passed
    assert scored.failed == "error: code: the tests use more of the answer than plain values"


@pytest.mark.slow
def test_a_killed_run_of_code_ends_with_the_same_bytes(tmp_path):
    require_sandbox()
    answers = [said(f"answer = {n}", sample=n) for n in range(20)]
    run(tmp_path / "whole", CODE, answers=answers)
    cut = tmp_path / "cut"
    cut.mkdir()
    write_lines(cut / "samples.jsonl", map(answer_record, answers))
    journal = cut / "scores.partial" / "code.jsonl"
    environment = {**os.environ, "PYTHONPATH": SRC, "TMPDIR": str(tmp_path)}
    prompts = json.dumps([astuple(prompt) for prompt in PROMPTS])
    command = [sys.executable, "-c", SCRIPT, str(cut), configured(CODE).model_dump_json(), prompts]
    with subprocess.Popen(command, env=environment) as killed:
        while killed.poll() is None and _lines(journal) < 4:
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
    assert 4 <= _lines(journal) < 21
    kept = journal.read_text().splitlines()[1:]
    seen = []
    run(cut, CODE, answers=answers, progress=lambda *call: seen.append(call))
    assert seen[0][1] >= len(kept) - 1
    assert (cut / "scores.jsonl").read_bytes() == (tmp_path / "whole/scores.jsonl").read_bytes()
    assert [one.passed for one in read_scored(cut)] == [n == 2 for n in range(20)]


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_fault_of_the_prompts_file_is_found_before_a_judge_is_asked(tmp_path):
    with CompletionServer(lambda _: "Grade: 5") as server:
        write_lines(tmp_path / "samples.jsonl", map(answer_record, ANSWERS))
        config = configured(judge(server.url), NUMBER)
        prompts = [Prompt(0, "1+1=", "two"), PROMPTS[1]]
        with pytest.raises(RowsError, match=r"prompt 0 .*expected a number"):
            score_answers(config, prompts, tmp_path, tmp_path, lambda *_: None)
        assert not server.requests


def test_samples_of_other_prompts_are_refused(tmp_path):
    write_lines(tmp_path / "samples.jsonl", map(answer_record, ANSWERS))
    for prompts in ([PROMPTS[0]], [PROMPTS[0], Prompt(3, "other", "4")]):
        with pytest.raises(RowsError, match=r"other prompts .*first: prompt 3\); delete it and"):
            score_answers(configured(EXACT), prompts, tmp_path, tmp_path, lambda *_: None)


def test_samples_that_are_no_answers_are_refused(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [{"prompt": "1+1="}])
    with pytest.raises(RowsError, match=r"samples\.jsonl: no answers"):
        score_answers(configured(EXACT), PROMPTS, tmp_path, tmp_path, lambda *_: None)


def test_scores_that_do_not_belong_to_the_samples_are_refused(tmp_path):
    run(tmp_path, EXACT)
    for others in (ANSWERS[:-1], (ANSWERS[1], ANSWERS[0], *ANSWERS[2:])):
        write_lines(tmp_path / "samples.jsonl", map(answer_record, others))
        with pytest.raises(RowsError, match=r"not the scores of the samples\.jsonl beside it"):
            read_scored(tmp_path)
