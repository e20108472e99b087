"""The text of an answer while it grows."""

import pytest

from graftkit.serve.sampling import AnswerText


class Bytes:
    """A tokenizer of one token a byte."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode("utf-8", errors="replace")


def pushed(text, stop=()):
    answer = AnswerText(Bytes(), stop)
    parts = []
    for token in text.encode():
        parts.append(answer.push(token))
        if answer.stopped:
            break
    parts.append(answer.finish())
    return parts, answer


@pytest.mark.parametrize("text", ["plain", "é€😀", "a😀b", ""])
def test_the_parts_are_the_text_and_hold_whole_characters(text):
    parts, _ = pushed(text)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_a_character_that_stays_unfinished_comes_at_the_end():
    answer = AnswerText(Bytes(), ())
    assert [answer.push(token) for token in "a😀".encode()[:3]] == ["a", "", ""]
    assert answer.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("aab", ("ab",), "a"),
        ("one tw", ("two",), "one tw"),
        ("one", ("two", ""), "one"),
    ],
)
def test_a_stop_text_is_cut_off_and_no_part_shows_its_beginning(text, stop, expected):
    parts, answer = pushed(text, stop)
    assert "".join(parts) == expected
    assert answer.stopped == (expected != text)
