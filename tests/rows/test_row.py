import json
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import RowsError
from graftkit.rows import (
    EncodedRow,
    Row,
    batches_by_length,
    encode_prompt,
    encode_row,
    pad_batch,
    read_prompts,
    read_rows,
    rows_digest,
    sample_rows,
)


class CharacterTokenizer:
    """One id a character, 1 before a text with special tokens, 2 as EOS."""

    def __init__(self, eos_token_id=2):
        self.eos_token_id = eos_token_id

    def encode(self, text, *, add_special_tokens):
        return [1] * add_special_tokens + [ord(character) for character in text]


def write(folder, data):
    file = folder / "rows.jsonl"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


GOOD = '{"prompt": "2+2=", "completion": " 4"}\n'


def test_rows_come_back_in_the_order_of_the_file(tmp_path):
    file = write(tmp_path, GOOD + '{"completion": " 6", "prompt": "3+3=", "id": 7}')
    assert read_rows(file) == (Row("2+2=", " 4"), Row("3+3=", " 6"))


def test_a_row_knows_the_line_it_was_read_from(tmp_path):
    file = write(tmp_path, "\n \r\n" + GOOD)
    assert [row.origin for row in read_rows(file)] == [f"{file}:3"]


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    text = 'one\u2028two\x85three"'
    line = json.dumps({"prompt": text, "completion": " x"}, ensure_ascii=False)
    assert read_rows(write(tmp_path, line + "\r\n"))[0].prompt == text


def test_a_byte_order_mark_is_ignored(tmp_path):
    assert len(read_rows(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()))) == 1


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_any_text_survives_the_file(tmp_path_factory, pairs):
    lines = [
        json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs
    ]
    file = write(tmp_path_factory.mktemp("rows"), "\n".join(lines))
    assert [(row.prompt, row.completion) for row in read_rows(file)] == pairs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", r"rows\.jsonl:2: not JSON .*expected one object a line"),
        ("[" * 100_000, r"rows\.jsonl:2: not JSON"),
        ('["a", "b"]', r"rows\.jsonl:2: list found; expected a JSON object"),
        ('{"prompt": "a"}', r'rows\.jsonl:2: key "completion" is missing .*prompt.*add it'),
        ('{"a\\nb": 1}', r"\(keys found: 'a\\nb'\)"),
        ("{}", r'rows\.jsonl:2: key "prompt" is missing \(keys found: none\)'),
        ('{"prompt": "a", "completion": 4}', r'rows\.jsonl:2: "completion" is int; expected'),
        ('{"prompt": null, "completion": ""}', r'rows\.jsonl:2: "prompt" is NoneType'),
        ('{"prompt": "\\ud800", "completion": ""}', r"rows\.jsonl:2: .*surrogate"),
        (b'{"prompt": "\xff", "completion": ""}', r"rows\.jsonl:2: byte 13 is not UTF-8"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(RowsError, match=message) as caught:
        read_rows(write(tmp_path, GOOD.encode() + line + b"\n"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    with pytest.raises(RowsError, match="the file holds no rows; expected one JSON object a line"):
        read_rows(write(tmp_path, content))


@pytest.mark.parametrize("function", [read_rows, rows_digest])
def test_a_missing_file_and_a_directory_are_refused(tmp_path, function):
    with pytest.raises(RowsError, match=r"absent\.jsonl: cannot be read .*expected a rows.jsonl"):
        function(tmp_path / "absent.jsonl")
    with pytest.raises(RowsError, match=r"a directory; expected a rows\.jsonl"):
        function(tmp_path)


def test_the_digest_is_that_of_the_bytes(tmp_path):
    content = b"\xef\xbb\xbf" + GOOD.encode()
    assert rows_digest(write(tmp_path, content)) == blake3(content).hexdigest()


def test_a_row_is_prompt_with_special_tokens_then_completion_then_eos():
    assert encode_row(CharacterTokenizer(), Row("ab", " c")) == EncodedRow(
        [1, 97, 98, 32, 99, 2], 3
    )


def test_a_tokenizer_without_eos_adds_none():
    assert encode_row(CharacterTokenizer(None), Row("a", "b")) == EncodedRow([1, 97, 98], 2)


def test_a_generation_starts_from_the_ids_that_the_completion_follows():
    row = Row("ab", " c")
    encoded = encode_row(CharacterTokenizer(), row)
    ids, start = encoded.ids, encoded.start
    assert encode_prompt(CharacterTokenizer(), row) == ids[:start]


def test_a_text_is_scored_whole_and_ends_with_eos_once():
    encoded = encode_row(CharacterTokenizer(), Row.of_text("ab"))
    assert encoded == EncodedRow([1, 97, 98, 2], 0)
    assert encoded.scored == [True] * 4
    assert encode_row(CharacterTokenizer(98), Row.of_text("ab")).ids == [1, 97, 98]
    with pytest.raises(RowsError, match=r"r:3: a text has no prompt to answer"):
        encode_prompt(CharacterTokenizer(), Row.of_text("ab", "r:3"))


def test_a_cut_row_keeps_its_marks():
    row = EncodedRow(list(range(10)), 2, skipped=((4, 6), (8, 10)))
    assert row.answer == (6, 8)
    for count in range(11):
        cut = row.first_tokens(count)
        assert cut.scored == row.scored[:count]
        assert cut.was_cut == (count < 10)


def test_a_row_longer_than_the_context_is_refused_with_its_lengths():
    row = Row("abcd", " efg", "rows.jsonl:9")
    assert len(encode_row(CharacterTokenizer(), row, max_tokens=10)) == 10
    with pytest.raises(RowsError, match=r"rows\.jsonl:9: .*10 tokens \(5 .*at most 9; shorten"):
        encode_row(CharacterTokenizer(), row, max_tokens=9)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 400),
    st.integers(0, 2**63 - 1),
)
def test_a_sample_is_a_deterministic_ordered_choice_within_the_limit(lengths, limit, seed):
    items = list(enumerate(lengths))
    chosen = sample_rows(items, limit, seed, lambda item: item[1])
    assert chosen == sample_rows(items, limit, seed, lambda item: item[1])
    assert chosen == sorted(set(chosen))
    assert sum(length for _, length in chosen) <= limit or len(chosen) == 1
    if sum(lengths) <= limit:
        assert chosen == items


def test_another_seed_chooses_other_rows():
    items = list(range(1000))
    assert sample_rows(items, 20, 0, lambda _: 1) != sample_rows(items, 20, 1, lambda _: 1)


def test_rows_that_are_not_used_are_not_measured():
    measured = []
    sample_rows(list(range(1000)), 20, 0, lambda item: measured.append(item) or 1)
    assert len(measured) == 21


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_limit(lengths, limit):
    batches = batches_by_length(lengths, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= limit or len(batch) == 1


def test_padding_goes_to_the_side_that_was_asked_and_is_masked():
    ids, mask = pad_batch([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad_batch([[5, 6, 7], [8]], pad_id=9, left=True)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_prompts_are_read_from_rows_without_completions_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "completion": " c"}\n')
    assert read_prompts(file) == ("a", "b")
    file.write_text("\n")
    with pytest.raises(RowsError, match="holds no rows; expected one"):
        read_prompts(file)
