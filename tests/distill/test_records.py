import json

import pytest

from graftkit.distill.records import Journal, read_lines, write_lines
from graftkit.errors import OutputError, RowsError


def test_a_journal_forgets_a_torn_last_line_and_goes_on_behind_the_last_whole_one(tmp_path):
    journal = Journal(tmp_path / "new" / "units.jsonl")
    journal.append({"unit": 1})
    journal.append({"unit": 2, "text": "é\n"})
    with journal.path.open("ab") as file:
        file.write(b'{"unit": 3, "te')
    assert [record["unit"] for record in journal.read()] == [1, 2]
    journal.append({"unit": 3})
    assert [record["unit"] for record in journal.read()] == [1, 2, 3]


def test_a_journal_damaged_in_the_middle_is_refused_by_name(tmp_path):
    (tmp_path / "units.jsonl").write_bytes(b'{"unit": 1}\n{"uni\n{"unit": 3}\n')
    with pytest.raises(OutputError, match=r"units\.jsonl: damaged .*; delete it"):
        Journal(tmp_path / "units.jsonl").read()


def test_lines_appear_whole_or_not_at_all(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_lines(file, [{"a": 1}])

    def broken():
        yield {"a": 2}
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_lines(file, broken())
    assert list(read_lines(file)) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [file]


def test_a_broken_line_is_named_by_its_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"a": 1}) + "\n{oops\n")
    with pytest.raises(RowsError, match=r"rows\.jsonl:2: not JSON"):
        list(read_lines(file))
