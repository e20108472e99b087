from graftkit.distill.config import Selection
from graftkit.distill.records import ScoredAnswer, SourceAnswer
from graftkit.distill.select import select, split_prompts


def scored(prompt, source, sample, reward, text=None, failed=None) -> ScoredAnswer:
    text = text if text is not None else f"{source} {sample}"
    answer = SourceAnswer(prompt, f"prompt {prompt}", source, sample, text, 3, "stop")
    return ScoredAnswer(answer, failed is None, failed, reward)


def chosen(actual):
    return [(pair.chosen.answer.key, pair.rejected.answer.key) for pair in actual.pairs]


BOTH = {"sft_share": "all"}


def run(answers, graded=True, fits=lambda one: True, **settings):
    return select(answers, Selection(**{**BOTH, **settings}), graded, 0, fits)


def test_the_row_of_a_prompt_is_the_best_passing_answer_of_all_sources():
    answers = [
        scored(0, "a", 0, 0.5),
        scored(0, "a", 1, 0.9, failed="exact"),
        scored(0, "b", 0, 0.6),
    ]
    assert [row.answer.key for row in run(answers).rows] == [(0, "b", 0)]


def test_ties_go_to_the_first_source_and_the_first_sample():
    answers = [scored(0, s, i, 1.0) for s in ("b", "a") for i in (0, 1)]
    assert run(answers).rows[0].answer.key == (0, "b", 0)


def test_a_pair_is_of_one_source_even_where_another_has_a_better_or_worse_answer():
    answers = [
        scored(0, "a", 0, 0.50),
        scored(0, "a", 1, 0.45),
        scored(0, "b", 0, 0.90),
        scored(0, "b", 1, 0.85),
        scored(0, "c", 0, 0.10),
    ]
    assert chosen(run(answers)) == [((0, "b", 0), (0, "b", 1))]


def test_pairs_outside_the_window_of_gaps_are_dropped_and_counted():
    answers = [
        *(scored(0, "a", 0, 0.5), scored(0, "a", 1, 0.495)),
        *(scored(1, "a", 0, 0.9), scored(1, "a", 1, 0.1)),
        *(scored(2, "a", 0, 0.55), scored(2, "a", 1, 0.5)),
    ]
    actual = run(answers, gap=(0.01, 0.1))
    assert chosen(actual) == [((2, "a", 0), (2, "a", 1))]
    assert actual.dropped_pairs == {"gap too small": 1, "gap too large": 1}


def test_a_source_whose_gap_does_not_fit_gives_way_to_one_whose_does():
    answers = [
        *(scored(0, "a", 0, 0.99), scored(0, "a", 1, 0.1)),
        *(scored(0, "b", 0, 0.55), scored(0, "b", 1, 0.5)),
    ]
    assert chosen(run(answers)) == [((0, "b", 0), (0, "b", 1))]


def test_checked_pairs_set_the_best_that_passes_against_the_worst_that_fails():
    answers = [
        scored(0, "a", 0, 0.50),
        scored(0, "a", 1, 0.52),
        scored(0, "a", 2, 0.48, failed="number"),
        scored(0, "a", 3, 0.44, failed="number"),
        scored(0, "a", 4, 0.0, failed="unfinished"),
        scored(0, "a", 5, 0.0, failed="judge: no grade"),
    ]
    assert chosen(run(answers, pairs="checked")) == [((0, "a", 1), (0, "a", 3))]


def test_checked_pairs_need_one_answer_that_passes_and_one_that_fails():
    answers = [
        *(scored(0, "a", 0, 1.0), scored(0, "a", 1, 1.0)),
        *(scored(1, "a", 0, 0.0, failed="exact"), scored(1, "a", 1, 0.0, failed="exact")),
    ]
    actual = run(answers, graded=False, pairs="checked")
    assert not actual.pairs
    assert actual.dropped_pairs == {"all pass": 1, "all fail": 1}


def test_without_graded_scores_the_window_does_not_apply():
    answers = [scored(0, "a", 0, 1.0), scored(0, "a", 1, 0.0, failed="exact")]
    assert chosen(run(answers, graded=False, pairs="checked")) == [((0, "a", 0), (0, "a", 1))]


def test_mixed_pairs_hold_a_sources_best_and_the_targets_own_best_and_worst():
    answers = [
        scored(0, "big", 0, 0.58),
        scored(0, "me", 0, 0.52),
        scored(0, "me", 1, 0.50),
    ]
    actual = run(answers, pairs="mixed", target_source="me")
    assert chosen(actual) == [((0, "big", 0), (0, "me", 1))]
    assert actual.pairs[0].own.answer.key == (0, "me", 0)


def test_two_equal_texts_make_no_pair():
    answers = [scored(0, "a", 0, 0.55, "same"), scored(0, "a", 1, 0.5, "same")]
    assert run(answers).dropped_pairs == {"all alike": 1}


def test_answers_that_do_not_fit_are_dropped_and_counted():
    answers = [scored(0, "a", 0, 0.9, "long"), scored(1, "a", 0, 0.9, "ok")]
    actual = run(answers, fits=lambda one: one.answer.text != "long")
    assert [row.answer.prompt_id for row in actual.rows] == [1]
    assert actual.dropped_rows == {"too long": 1}


def test_a_prompt_whose_answers_all_fail_says_why():
    answers = [scored(0, "a", 0, 0, failed="empty"), scored(0, "a", 1, 0, failed="empty")]
    assert run(answers).dropped_rows == {"no answer passes (empty)": 1}


def test_rewards_below_the_least_are_not_trained_on():
    actual = run([scored(0, "a", 0, 0.2)], least_reward=0.5)
    assert not actual.rows
    assert actual.dropped_rows == {"reward too low": 1}


def test_prompts_are_split_once_by_seed_and_none_serves_both():
    rows, pairs = split_prompts(range(100), 0.4, 7)
    assert len(rows) == 40
    assert set(rows) | set(pairs) == set(range(100))
    assert not set(rows) & set(pairs)
    assert split_prompts(range(100), 0.4, 7) == (rows, pairs)
    assert split_prompts(range(100), 0.4, 8) != (rows, pairs)


def test_the_order_of_answers_of_other_prompts_does_not_matter():
    first = [scored(0, "a", 0, 0.55), scored(0, "a", 1, 0.5)]
    second = [scored(1, "a", 0, 0.65), scored(1, "a", 1, 0.6)]
    together, turned = run(first + second), run(second + first)
    assert set(chosen(together)) == set(chosen(turned))


def test_an_answer_that_a_rule_cannot_judge_is_neither_chosen_nor_rejected():
    answers = [scored(0, "a", 0, 1.0), scored(0, "a", 1, 0.0, failed="error: code: more")]
    actual = run(answers, graded=False, pairs="checked")
    assert [row.answer.key for row in actual.rows] == [(0, "a", 0)]
    assert not actual.pairs
    assert actual.dropped_pairs == {"all pass": 1}
