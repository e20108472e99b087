"""AP, BWT, FWT and gain of tasks learned one after another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import ConfigError
from graftkit.evaluate import Course

SCORES = st.floats(0, 1)


@st.composite
def courses(draw, least=1):
    count = draw(st.integers(least, 5))
    row = st.lists(SCORES, min_size=count, max_size=count)
    scores = draw(st.lists(row, min_size=count, max_size=count))
    return Course([f"task {i}" for i in range(count)], scores, draw(row), range(count))


def test_the_metrics_of_a_course_worked_out_by_hand():
    scores = [[0.8, 0.1, 0.0], [0.6, 0.9, 0.2], [0.5, 0.7, 0.4]]
    course = Course(["a", "b", "c"], scores, [0.0, 0.1, 0.1], [10, 20, 30])
    assert course.average == pytest.approx(1.6 / 3)
    assert course.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert course.forward_transfer == pytest.approx(((0.1 - 0.1) + (0.2 - 0.1)) / 2)
    assert course.gains == pytest.approx((0.5, 0.6, 0.3))
    assert course.numbers()["bytes"] == 30
    assert course.numbers()["gain"] == pytest.approx(1.4 / 3)


@given(courses())
def test_average_is_the_targets_mean_plus_the_gain(course):
    before = sum(course.before) / len(course.tasks)
    assert course.average == pytest.approx(before + course.numbers()["gain"])


@given(courses(least=2))
def test_average_is_what_was_learned_plus_what_came_back(course):
    """T · AP = Σ_j R[j][j] + (T − 1) · BWT."""
    count = len(course.tasks)
    learned = sum(course.scores[j][j] for j in range(count))
    total = learned + (count - 1) * course.backward_transfer
    assert count * course.average == pytest.approx(total)


@given(courses(least=2), SCORES)
def test_a_task_that_keeps_its_score_is_not_forgotten(course, score):
    """Isolated packs: R[t][j] does not depend on t."""
    rows = [[min(score, column / 5) for column in range(len(course.tasks))]] * len(course.tasks)
    retained = Course(course.tasks, rows, rows[0], course.disk_bytes)
    assert retained.backward_transfer == 0
    assert retained.forward_transfer == 0
    assert set(retained.gains) == {0}


@given(courses(least=2), SCORES)
def test_scores_of_tasks_far_ahead_change_no_metric(course, score):
    rows = [
        [score if column > t + 1 else value for column, value in enumerate(row)]
        for t, row in enumerate(course.scores)
    ]
    other = Course(course.tasks, rows, course.before, course.disk_bytes)
    assert other.numbers() == course.numbers()


def test_one_task_has_no_transfer():
    course = Course(["a"], [[0.5]], [0.25], [7])
    assert (course.backward_transfer, course.forward_transfer) == (None, None)
    assert course.numbers() == {"ap": 0.5, "bwt": None, "fwt": None, "gain": 0.25, "bytes": 7}


@pytest.mark.parametrize(
    ("scores", "before", "sizes", "says"),
    [
        ([[1.0, 1.0]], [0.0, 0.0], [1, 2], "2 x 2"),
        ([[1.0, 1.0], [1.0]], [0.0, 0.0], [1, 2], "2 x 2"),
        ([[1.0, 1.0], [1.0, 1.0]], [0.0], [1, 2], "2 x 2"),
        ([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], [1], "2 x 2"),
        ([[1.0, 1.0], [1.0, math.nan]], [0.0, 0.0], [1, 2], "not finite"),
        ([[1.0, 1.0], [1.0, 1.0]], [math.inf, 0.0], [1, 2], "not finite"),
    ],
)
def test_a_course_that_is_not_whole_is_refused(scores, before, sizes, says):
    with pytest.raises(ConfigError, match=says):
        Course(["a", "b"], scores, before, sizes)


def test_a_course_without_tasks_is_refused():
    with pytest.raises(ConfigError, match="no tasks"):
        Course([], [], [], [])
