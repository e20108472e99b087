from pathlib import Path

import pytest
from distill.test_pipeline import CONFIG, WORDS
from distill.tiny import tiny_llama, write_jsonl
from library.conftest import NAMES, prompts_of

from graftkit.demo.story import SKILLS, TARGET
from graftkit.errors import ConfigError, LibraryError, PackMismatchError
from graftkit.library import Library
from graftkit.library.answers import score_library
from graftkit.route import Route, Router
from graftkit.rows import Row, read_rows

SKILLED = {skill.name: skill for skill in SKILLS[:2]}


class FirstWord:
    """A router that goes by the first word of a prompt."""

    def __init__(self, **names: str):
        self.names = names

    def route(self, prompts):
        actual = [self.names.get(prompt.split(":")[0]) for prompt in prompts]
        return [Route({name: 1.0} if name else {}, {}) for name in actual]


RIGHT = FirstWord(Utterance="clinc150_intent", Description="nl_regex")
SWAPPED = FirstWord(Utterance="nl_regex", Description="clinc150_intent", User="nl_regex")


@pytest.fixture(scope="module")
def skilled(tmp_path_factory) -> Library:
    """Two skills of the demo, which answer for real."""
    library = Library.init(tmp_path_factory.mktemp("skilled") / "library", TARGET)
    for name, skill in SKILLED.items():
        library.add(skill.lossless, name)
    return library


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    """A few rows of each skill, and of a third one that the library lacks."""
    actual = {name: list(read_rows(skill.test_rows)[:4]) for name, skill in SKILLED.items()}
    return actual | {"target": list(read_rows(SKILLS[2].test_rows)[:1])}


def scored(library: Library, router: Router, rows: dict[str, list[Row]]):
    mixtures = {name: {entry: 1.0} for name, entry in library.index.newest.items()}
    return score_library(library.live, router, rows, {**mixtures, "target": {}})


@pytest.fixture(scope="module")
def right(skilled, rows):
    return scored(skilled, RIGHT, rows)


@pytest.fixture(scope="module")
def swapped(skilled, rows):
    return scored(skilled, SWAPPED, rows)


def matches(library: Library, rows: list[Row], route: str) -> float:
    """Exact match, by what the library says."""
    answers = library.generate([row.prompt for row in rows], route=route, max_new_tokens=64)
    pairs = zip(answers, rows, strict=True)
    return sum(answer.text.strip() == row.completion.strip() for answer, row in pairs) / len(rows)


def test_oracle_and_target_are_what_the_library_answers(skilled, rows, right):
    for name in SKILLED:
        assert right.skills[name].oracle == matches(skilled, rows[name], name) >= 0.5
        assert right.skills[name].target == matches(skilled, rows[name], "target") == 0


def test_a_router_that_is_always_right_answers_as_the_oracle(right):
    assert right.accuracy == 1
    assert right.false_acceptance == 0
    assert all(score.routed == score.oracle for score in right.skills.values())
    assert right.mean("regret") == 0


def test_a_router_that_is_always_wrong_is_charged_for_it(skilled, rows, right, swapped):
    assert swapped.accuracy == 0
    assert swapped.false_acceptance == 1
    for name, other in zip(SKILLED, reversed(SKILLED), strict=True):
        score = swapped.skills[name]
        assert score.routed == matches(skilled, rows[name], other) == 0
        assert score.oracle == right.skills[name].oracle == score.regret
    assert swapped.mean("routed") == 0
    assert swapped.mean("oracle") == right.mean("oracle") > 0.5


def test_the_confusion_counts_where_every_row_went(swapped):
    assert swapped.confusion == {
        "clinc150_intent": {"nl_regex": 4},
        "nl_regex": {"clinc150_intent": 4},
        "target": {"nl_regex": 1},
    }


def test_rows_of_a_pack_that_is_not_here_are_refused(skilled, rows):
    with pytest.raises(LibraryError, match="rows are given for 'nobody'; the packs are clinc150"):
        skilled.evaluate({"nobody": rows["target"]})
    with pytest.raises(ConfigError, match="no rows"):
        skilled.evaluate({"nl_regex": []})


@pytest.mark.slow
def test_a_trained_router_serves_until_a_pack_changes(folder):
    library = Library.open(folder)
    rows = {name: [Row(prompt, " 0") for prompt in prompts_of(name, 30, seed=7)] for name in NAMES}
    rows["target"] = [Row(prompt, " 0") for prompt in ["!?;" * 3, "<>" * 4, "::" * 5] * 10]
    library.train_router(rows)
    assert (folder / "classifier.safetensors").is_file()
    assert library.route(["0123"], router="classifier")[0].scores.keys() == set(NAMES)
    library.remove("lower")
    with pytest.raises(ConfigError, match="no classifier here yet"):
        library.route(["0123"], router="classifier")


def test_the_spectral_router_needs_no_keys(folder, world):
    library = Library.open(folder)
    library.add(world.plain, "plain")
    scores = library.route(["0123", "KLM"], router="spectral")[0].scores
    assert scores.keys() == {*NAMES, "plain"}


# Learning.


@pytest.fixture
def lesson(tmp_path) -> Path:
    """A configuration, and a library of its target with one pack."""
    tiny_llama(tmp_path / "target")
    words = [f"{word}{number}" for word in WORDS for number in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}:"} for word in words])
    answers = [
        {"prompt": f"say {word}:", "completion": text}
        for word in words
        for text in (f" {word}!", f" {word}!", " no")
    ]
    write_jsonl(tmp_path / "answers.jsonl", answers)
    config = CONFIG.replace("[dpo]", "[unused]")
    config = config[: config.index("[unused]")] + config[config.index("[pack]") :]
    (tmp_path / "run.toml").write_text("dpo = false\n" + config.replace("epochs = 2", "epochs = 1"))
    return tmp_path


@pytest.mark.slow
def test_a_learned_skill_joins_the_library_and_leaves_the_others_alone(lesson):
    library = Library.init(lesson / "library", lesson / "target")
    first = library.learn(lesson / "run.toml", "words")
    assert first.has_key
    before = (library.path / first.file).read_bytes()
    config = (lesson / "run.toml").read_text()
    (lesson / "run.toml").write_text(config.replace("1e-2", "2e-2"))
    second = library.learn(lesson / "run.toml", "words", update=True)
    assert (second.label, library.load("words@2").manifest.target.name) == ("words@2", "target")
    assert (library.path / first.file).read_bytes() == before
    assert [place.name for place in library.remains("words")] == ["words", "words@2"]
    route = library.route(["say one1:"])[0]
    assert route.name == "words"


def test_a_lesson_for_another_target_is_refused_before_it_begins(lesson, world):
    library = Library.init(lesson / "library", world.target)
    with pytest.raises(PackMismatchError, match="is not the library's"):
        library.learn(lesson / "run.toml", "words")
    assert not (library.path / "learning").exists()


def test_a_taken_name_is_refused_before_the_lesson_begins(folder, lesson):
    with pytest.raises(ConfigError, match="digits is here already"):
        Library.open(folder).learn(lesson / "run.toml", "digits")
    assert not (folder / "learning").exists()
