import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from distill.server import CompletionServer, Fault, Reply
from distill.tiny import byte_tokenizer, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from graftkit.distill.config import (
    AgreementScore,
    ExactRule,
    JsonRule,
    JudgeScore,
    LikelihoodScore,
    NumberRule,
    RewardScore,
)
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.distill.scores import finished, open_scorer, why_unusable
from graftkit.distill.scores.graders import (
    find_number,
    json_form,
    question,
    read_grade,
    same_number,
)
from graftkit.errors import CheckpointError, ConfigError, RowsError, SourceError


def said(text: str, sample: int = 0, prompt_id: int = 0, **more) -> SourceAnswer:
    more = {"source": "mini", "tokens": 3, "finish": "stop", **more}
    return SourceAnswer(prompt_id, f"Question {prompt_id}?", sample=sample, text=text, **more)


def verdicts(settings, answers, reference=None, config_folder=Path(), done=()):
    prompts = {a.prompt_id: Prompt(a.prompt_id, a.prompt, reference) for a in answers}
    return dict(open_scorer(settings, config_folder).score(answers, prompts, done))


def verdict(settings, text, reference):
    return verdicts(settings, [said(text)], reference)[0]


# Which answers are scored at all.


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("4"), None),
        (said("4", finish="length"), "unfinished"),
        (said("4", finish="refused", reason="too long"), "refused"),
        (said(" \n"), "empty"),
    ],
)
def test_an_answer_that_is_not_whole_is_not_scored(answer, reason):
    assert why_unusable(answer) == reason
    assert len(list(finished([answer]))) == (reason is None)


# exact


def test_the_exact_rule_forgives_blanks_at_the_ends_only():
    rule = ExactRule(kind="exact")
    assert verdict(rule, "two words", " two words\n") == 1.0
    assert verdict(rule, "two  words", "two words") == ""
    assert verdict(rule, "Two words", "two words") == ""


@pytest.mark.parametrize("kind", [ExactRule(kind="exact"), NumberRule(kind="number")])
def test_a_prompt_without_a_reference_is_named(kind):
    with pytest.raises(RowsError, match=r"prompt 0 \(from 0\): reference none; expected a comp"):
        verdict(kind, "4", None)


# number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", 42),
        ("3 + 4 = 7", 7),
        ("#### 12 apples, 3 each", 12),
        ("#### 1\nno: #### 2", 2),
        ("5 is wrong ####", None),
        ("$1,234,567.50", 1234567.5),
        ("1,2,3", 3),
        ("1,2345", 2345),
        ("x=-3", -3),
        ("10-3", 3),
        ("(2)-3", 3),
        ("it is −7", -7),
        ("-$5", -5),
        ("+6", 6),
        (".5", 0.5),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        ("on 12/25/2024", 2024),
        ("1/0", None),
        ("50%", 0.5),
        ("50 %", 0.5),
        (r"$50\%$", 0.5),
        ("1.5e3", 1500),
        ("2E-2", 0.02),
        ("5 eggs", 5),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(text, value):
    actual = find_number(text)
    assert (None if actual is None else actual.value) == (value if value is None else float(value))


@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(["{:,.6f}", "{!r}"])
)
def test_any_number_is_found_behind_any_words(value, form):
    written = form.format(value)
    actual = find_number(f"so 3 and 4 make {written}")
    assert actual is not None
    assert math.isclose(actual.value, float(written.replace(",", "")), rel_tol=1e-12)


@given(st.text())
def test_any_text_has_a_finite_number_or_none(text):
    actual = find_number(text)
    assert actual is None or math.isfinite(actual.value)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_are_the_same_only_where_they_are_equal(one, other):
    numbers = find_number(f"{one:,}"), find_number(f"{other}.0")
    assert same_number(*numbers, 1e-12) == (one == other)


def test_the_number_rule_compares_with_its_tolerance():
    assert verdict(NumberRule(kind="number"), "about 0.3333333", "1/3") == 1.0
    assert verdict(NumberRule(kind="number"), "about 0.333", "1/3") == ""
    assert verdict(NumberRule(kind="number", tolerance=0.01), "about 0.333", "1/3") == 1.0
    assert verdict(NumberRule(kind="number"), "no idea", "1/3") == "no number"


def test_percent_may_be_left_out_on_one_side():
    rule = NumberRule(kind="number")
    assert [verdict(rule, text, "25%") for text in ("25%", "25", "0.25")] == [1.0, 1.0, 1.0]
    assert [verdict(rule, "25%", text) for text in ("25", "0.25")] == [1.0, 1.0]
    assert verdict(rule, "0.25%", "25%") == ""
    assert verdict(rule, "0.25", "25") == ""


def test_a_reference_without_a_number_is_named():
    with pytest.raises(RowsError, match="reference 'many'; expected a number in the completion"):
        verdict(NumberRule(kind="number"), "4", "many")


# json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def typed(value):
    """A value that == tells apart where JSON does: true is not 1."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return ("bool", value) if isinstance(value, bool) else value


def shuffled(value):
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(VALUES)
def test_order_of_keys_and_blanks_do_not_matter_in_json(value):
    text = json.dumps(shuffled(value), indent=3, ensure_ascii=False)
    assert json_form(text) == json_form(json.dumps(value)) is not None


@given(VALUES, VALUES)
def test_json_values_are_the_same_only_where_they_are_equal(one, other):
    alike = json_form(json.dumps(one)) == json_form(json.dumps(other))
    assert alike == (typed(one) == typed(other))


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("1", "1.0"),
        ("1e2", "100"),
        ('{"a": 1, "b": [2]}', '{"b":[2.0],"a":1}'),
        ('```json\n{"a": 1}\n```', '{"a": 1}'),
        ("```\n[1]\n```", "[1]"),
        (r'"\u00e9"', '"é"'),
        ("-0.0", "0"),
    ],
)
def test_json_that_is_the_same(text, other):
    assert verdict(JsonRule(kind="json"), text, other) == 1.0


@pytest.mark.parametrize(
    ("text", "other"),
    [("true", "1"), ("null", "0"), ("[1, 2]", "[2, 1]"), ('"1"', "1"), ("0.1", "0.10000001")],
)
def test_json_that_is_not_the_same(text, other):
    assert verdict(JsonRule(kind="json"), text, other) == ""


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "-Infinity",
        "1e999",
        '{"a": 1, "a": 1}',
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 5_000 + "1" + "}" * 5_000,
        "9" * 10_000,
        "{'a': 1}",
        "Sure! [1]",
        "```json\n[1]\n```\n```json\n[2]\n```",
        "",
    ],
)
def test_what_is_no_json_fails(text):
    assert json_form(text) is None
    assert verdict(JsonRule(kind="json"), text or "-", "[1]") == "no JSON"


def test_a_reference_that_is_no_json_is_named():
    with pytest.raises(RowsError, match=r"reference '\[1'; expected a JSON value"):
        verdict(JsonRule(kind="json"), "[1]", "[1")


# agreement and likelihood


def agreement(texts, of="text"):
    answers = [said(text, sample) for sample, text in enumerate(texts)]
    actual = verdicts(AgreementScore(kind="agreement", of=of), answers)
    return [actual[index] for index in range(len(texts))]


def test_agreement_is_the_share_of_the_other_samples():
    assert agreement(["a b", " a  b", "a b\n", "c", "d"]) == [0.5, 0.5, 0.5, 0, 0]
    assert agreement(["so 0.50", "1/2", "2"], of="number") == [0.5, 0.5, 0]
    assert agreement(['{"a": 1}', '{"a":1.0}', "[]"], of="json") == [0.5, 0.5, 0]


def test_a_single_sample_and_samples_that_say_nothing_do_not_agree():
    assert agreement(["a"]) == [0.0]
    assert agreement(["no number", "none either"], of="number") == [0.0, 0.0]


def test_unfinished_samples_disagree_and_other_sources_and_prompts_do_not_count():
    answers = [
        said("a", 0),
        said("a", 1),
        said("a", 2, finish="length"),
        said("", 3, finish="refused"),
        said("a", 0, source="other"),
        said("a", 0, prompt_id=1),
    ]
    actual = verdicts(AgreementScore(kind="agreement"), answers)
    assert actual == {0: 1 / 3, 1: 1 / 3, 4: 0.0, 5: 0.0}


def test_the_likelihood_is_what_the_source_said():
    answers = [said("a", log_likelihood=-0.25), said("b", 1)]
    actual = verdicts(LikelihoodScore(kind="likelihood"), answers)
    assert actual == {0: -0.25, 1: "unknown"}


# reward


def reward_model(folder: Path, family: str = "Llama", labels: int = 1, chat: bool = False) -> Path:
    """A random classifier with a tokenizer of one token a byte; its GPT-2 has no padding token."""
    tokenizer = byte_tokenizer(folder, chat)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "num_labels": labels}
    padding = {"pad_token_id": None if family == "GPT2" else 0}
    config = getattr(transformers, f"{family}Config")(**sizes, **limits, **padding)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def reward_of(folder: Path, chat: bool = False, batch_tokens: int = 4096) -> RewardScore:
    return RewardScore(kind="reward", model=folder.name, chat=chat, batch_tokens=batch_tokens)


ANSWERS = [said(text, i) for i, text in enumerate(["a", "bb", "cc", "dddd", "ee", "f" * 60])]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert"])
def test_a_reward_does_not_depend_on_the_company(tmp_path, family):
    settings = reward_of(reward_model(tmp_path / "reward", family))
    together = verdicts(settings, ANSWERS, config_folder=tmp_path)
    alone = [verdicts(settings, [answer], config_folder=tmp_path)[0] for answer in ANSWERS]
    assert [together[i] for i in range(len(ANSWERS))] == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 4) for value in alone}) == len(ANSWERS)


def test_a_reward_is_the_logit_of_the_whole_row(tmp_path):
    folder = reward_model(tmp_path / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer.encode("Question 0? a"), tokenizer.eos_token_id]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits)
    actual = verdicts(reward_of(folder), ANSWERS[:1], config_folder=tmp_path)
    assert actual[0] == pytest.approx(expected, abs=1e-5)


def test_a_continued_reward_has_the_same_bits(tmp_path):
    settings = reward_of(reward_model(tmp_path / "reward"), batch_tokens=40)
    whole = verdicts(settings, ANSWERS, config_folder=tmp_path)
    rest = verdicts(settings, ANSWERS, config_folder=tmp_path, done={1, 3})
    assert rest == {index: whole[index] for index in (0, 2, 4, 5)}


def test_a_chat_template_changes_what_the_reward_model_reads(tmp_path):
    folder = reward_model(tmp_path / "reward", chat=True)
    plain = verdicts(reward_of(folder), ANSWERS, config_folder=tmp_path)
    chat = verdicts(reward_of(folder, chat=True), ANSWERS, config_folder=tmp_path)
    assert all(abs(plain[i] - chat[i]) > 1e-4 for i in plain)


def test_an_answer_beyond_the_context_has_no_reward(tmp_path):
    settings = reward_of(reward_model(tmp_path / "reward"))
    actual = verdicts(settings, [said("a"), said("b" * 200, 1)], config_folder=tmp_path)
    assert isinstance(actual[0], float)
    assert actual[1] == "longer than the context"


def test_a_reward_that_is_no_number_is_a_failure(tmp_path):
    folder = reward_model(tmp_path / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.fill_(math.inf)
    model.save_pretrained(folder)
    assert verdicts(reward_of(folder), ANSWERS[:1], config_folder=tmp_path) == {0: "not finite"}


def test_models_that_are_no_reward_models_are_refused(tmp_path):
    two = reward_model(tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match="two has 2 labels; expected a reward model"):
        open_scorer(reward_of(two), tmp_path)
    causal = tiny_llama(tmp_path / "causal")
    with pytest.raises(ConfigError, match="causal is a LlamaForCausalLM; expected a reward model"):
        open_scorer(reward_of(causal), tmp_path)
    with pytest.raises(CheckpointError, match="has no chat template; turn chat off"):
        open_scorer(reward_of(reward_model(tmp_path / "plain"), chat=True), tmp_path)


def test_an_unknown_architecture_is_the_loaders_error(tmp_path):
    folder = reward_model(tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["ArmoRM"], "model_type": "armorm"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_scorer(reward_of(folder), tmp_path)


# judge


def judge_at(url: str, **more) -> JudgeScore:
    return JudgeScore(kind="judge", url=url, model="judge", **{"retries": 1, **more})


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\nGrade: 7", 7),
        ("Grade: 10\n", 10),
        ("0", 0),
        ("**Grade: 8**", 8),
        ("Grade: **8**/10", None),
        ("grade: 9/10.", 9),
        ("Grade: 11", None),
        ("Grade: -1", None),
        ("Grade: 7.5", None),
        ("Grade: 7\nI hope that helps", None),
        ("Grade 7", None),
        ("7 of 10", None),
        ("", None),
    ],
)
def test_a_grade_is_the_whole_last_line(text, grade):
    assert read_grade(text) == grade


def test_a_judge_grades_every_answer_from_zero_to_one(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with CompletionServer(lambda r: "Well.\nGrade: " + ("9" if "good" in r.prompt else "2")) as s:
        settings = judge_at(s.url, key_env="JUDGE_KEY", instruction="Look at style.")
        actual = verdicts(settings, [said("good"), said("bad", 1), said("good", 2)], done={2})
    assert actual == {0: 0.9, 1: 0.2}
    sent = [{name.lower(): value for name, value in r.headers.items()} for r in s.requests]
    assert {headers["authorization"] for headers in sent} == {"Bearer s3cret"}
    assert all(r.body["temperature"] == 0 and r.body["model"] == "judge" for r in s.requests)
    assert all("Look at style." in r.prompt and "Question 0?" in r.prompt for r in s.requests)


def test_a_judge_that_gives_no_grade_is_asked_once_more():
    def answer(request):
        if "nothing but that last line" in request.prompt:
            return "Grade: 4" if "slow" in request.prompt else "I cannot say"
        return "Hm."

    with CompletionServer(answer) as server:
        actual = verdicts(judge_at(server.url), [said("slow"), said("never", 1)])
    assert actual == {0: 0.4, 1: "no grade"}
    assert len(server.requests) == 4


def test_an_answer_that_the_judge_refuses_fails_alone():
    def fault(number, request):
        return Fault(400, "too long") if "long" in request.prompt else None

    with CompletionServer(lambda request: Reply("Grade: 5"), fault) as server:
        actual = verdicts(judge_at(server.url), [said("long"), said("fine", 1)])
    assert actual == {0: "refused", 1: 0.5}


@pytest.mark.slow
def test_a_busy_judge_is_asked_again_after_the_time_that_it_names():
    def fault(number, request):
        return Fault(429, headers={"Retry-After": "0.7"}) if number == 0 else None

    with CompletionServer(lambda request: "Grade: 5", fault) as server:
        assert verdicts(judge_at(server.url), [said("a")]) == {0: 0.5}
    assert server.requests[1].seconds - server.requests[0].seconds > 0.7


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_judge_that_refuses_the_run_ends_it(status):
    with CompletionServer(fault=lambda *_: Fault(status)) as server:
        with pytest.raises(SourceError, match="what is finished is kept; run the same command"):
            verdicts(judge_at(server.url), [said("a")])
        assert len(server.requests) == 1


def test_a_judge_that_is_not_there_ends_the_run():
    with CompletionServer() as server:
        url = server.url
    with pytest.raises(SourceError, match="what is finished is kept; run the same command"):
        verdicts(judge_at(url), [said("a")])


def test_a_missing_key_is_found_before_the_first_request(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with CompletionServer() as server:
        with pytest.raises(ConfigError, match="JUDGE_KEY"):
            open_scorer(judge_at(server.url, key_env="JUDGE_KEY"), Path())
        assert not server.requests


@given(st.text(), st.text())
def test_an_answer_cannot_close_its_own_frame(prompt, answer):
    text = question("Look.", prompt, answer)
    mark = text.split('"question ')[1].split(" ")[0]
    assert mark not in prompt + answer
    assert text.index(f"answer {mark} begins\n{answer}\nanswer {mark} ends") > text.index(prompt)


def test_braces_in_answers_are_text():
    assert "{answer} {0} {mark}" in question("Look.", "{prompt}", "{answer} {0} {mark}")
