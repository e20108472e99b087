"""Rows in the files and folders that people have, and what is wrong with them in one line."""

import json
from pathlib import Path

import pytest

from graftkit.errors import RowsError
from graftkit.rows import Row, data_files, read_prompts, read_rows, rows_digest

PAIR = {"prompt": "2+2=", "completion": " 4"}
CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
}
TEXT = {"text": "2+2 is 4"}
FORMATS = {"prompt_completion": PAIR, "messages": CHAT, "text": TEXT}


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path, *records):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def arrow(path, *records):
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(list(records))
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    return path


WRITERS = {"a.jsonl": lines, "a.parquet": parquet, "a.arrow": arrow}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_every_format_is_read_from_every_file(tmp_path, name, row_format):
    file = WRITERS[name](tmp_path / name, FORMATS[row_format], FORMATS[row_format] | {"id": 1})
    rows = read_rows(file)
    assert [row.format for row in rows] == [row_format] * 2
    assert [row.origin for row in rows] == [f"{file}:1", f"{file}:2"]
    assert rows == read_rows(lines(tmp_path / "same.jsonl", *[FORMATS[row_format]] * 2))


def test_calls_of_a_table_have_no_fields_of_other_calls(tmp_path):
    def row(name, **arguments):
        call = {"function": {"name": name, "arguments": arguments}}
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": turns}

    records = [row("add", a=1), row("play", song="x")]
    assert read_rows(parquet(tmp_path / "a.parquet", *records)) == read_rows(
        lines(tmp_path / "a.jsonl", *records)
    )


def test_prompts_are_the_users_last_words(tmp_path):
    more = {"messages": [*CHAT["messages"], {"role": "user", "content": "3+3?"}]}
    assert read_prompts(lines(tmp_path / "a.jsonl", CHAT, more)) == ("2+2?", "3+3?")
    with pytest.raises(RowsError, match=r'a\.jsonl:1: key "prompt" is missing'):
        read_prompts(lines(tmp_path / "a.jsonl", TEXT))
    silent = {"messages": [{"role": "system", "content": "s"}]}
    with pytest.raises(RowsError, match="no message of the user"):
        read_prompts(lines(tmp_path / "a.jsonl", silent))


@pytest.mark.parametrize("other", [CHAT, TEXT])
def test_formats_are_not_mixed(tmp_path, other):
    file = lines(tmp_path / "a.jsonl", PAIR, other)
    with pytest.raises(RowsError, match=r"a\.jsonl:2: a row of (messages|text), and the first row"):
        read_rows(file)


def test_columns_that_are_null_are_refused_with_the_row(tmp_path):
    file = parquet(tmp_path / "a.parquet", PAIR, {"prompt": "x", "completion": None})
    with pytest.raises(RowsError, match=r'a\.parquet:2: "completion" is NoneType'):
        read_rows(file)
    file = parquet(tmp_path / "b.parquet", {"prompt": {"a": 1}, "completion": "x"})
    with pytest.raises(RowsError, match=r'b\.parquet:1: "prompt" is dict; expected a string'):
        read_rows(file)


def test_a_table_without_such_columns_says_which_it_has(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"question": "x", "answer": "y"})
    with pytest.raises(RowsError, match=r"none of the columns .*\(columns found: 'question', "):
        read_rows(file)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("size", [0, 3, 40, 300])
def test_a_table_that_was_cut_is_refused_in_one_line(tmp_path, name, size):
    file = WRITERS[name](tmp_path / name, *[PAIR] * 50)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(RowsError, match=name) as caught:
        read_rows(file)
    assert "\n" not in str(caught.value)


def test_parquet_is_known_by_its_content(tmp_path):
    file = parquet(tmp_path / "a.parquet", PAIR).rename(tmp_path / "rows")
    assert read_rows(file) == (Row("2+2=", " 4"),)


def test_a_table_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    file = parquet(tmp_path / "a.parquet", PAIR)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RowsError, match=r"need pyarrow .*pip install 'graftkit\[parquet\]'"):
        read_rows(file)


def test_folders_as_the_library_datasets_saves_them_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([PAIR] * 3)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    assert read_rows(tmp_path / "one") == (Row("2+2=", " 4"),) * 3
    both = datasets.DatasetDict(train=one, test=datasets.Dataset.from_list([CHAT]))
    both.save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "both" / "test")[0].format == "messages"
    with pytest.raises(RowsError, match=r"both: holds the splits train, test; name one"):
        read_rows(tmp_path / "both")


def test_folders_as_on_the_hub_are_read_by_split(tmp_path):
    folder = tmp_path / "set"
    parquet(folder / "data" / "train-00000-of-00002.parquet", PAIR)
    parquet(folder / "data" / "train-00001-of-00002.parquet", PAIR | {"prompt": "second"})
    (folder / "README.md").write_text("card")
    assert [row.prompt for row in read_rows(folder)] == ["2+2=", "second"]
    lines(folder / "data" / "test.jsonl", PAIR | {"prompt": "test"})
    lines(folder / ".cache" / "train.jsonl", PAIR)
    with pytest.raises(RowsError, match=r"set: holds the splits test, train; name one"):
        read_rows(folder)
    assert [row.prompt for row in read_rows(folder / "train")] == ["2+2=", "second"]
    assert [row.prompt for row in read_rows(folder / "test")] == ["test"]
    with pytest.raises(RowsError, match=r"dev: no such split; the folder's splits are test, train"):
        read_rows(folder / "dev")


def test_several_data_sets_in_a_folder_are_not_read_as_one(tmp_path):
    for name in ("main", "other"):
        lines(tmp_path / name / "train.jsonl", PAIR)
    with pytest.raises(RowsError, match=r"holds several data sets \(main, other\)"):
        read_rows(tmp_path)
    assert len(read_rows(tmp_path / "main")) == 1


@pytest.mark.parametrize("state", [b"", b"[1]", b'{"_data_files": [{"filename": "../x.arrow"}]}'])
def test_a_damaged_description_of_a_folder_is_refused_or_not_needed(tmp_path, state):
    (tmp_path / "state.json").write_bytes(state)
    with pytest.raises(RowsError) as caught:
        read_rows(tmp_path)
    assert "\n" not in str(caught.value)
    assert all(file.parent == tmp_path for file in data_files(tmp_path)) if b"x" in state else True


def test_the_digest_of_a_folder_follows_its_rows(tmp_path):
    folder = tmp_path / "set"
    lines(folder / "train.jsonl", PAIR)
    before = rows_digest(folder)
    assert before == rows_digest(folder)
    lines(folder / "train.jsonl", TEXT)
    assert rows_digest(folder) != before


def test_a_conversation_of_several_turns_is_no_single_prompt():
    assert Row.of_messages(CHAT["messages"][1:]).single_turn() == ("2+2?", "4")
    with pytest.raises(RowsError, match="the turns system, user, assistant; expected one prompt"):
        Row.of_messages(CHAT["messages"]).single_turn()
    with pytest.raises(RowsError, match="a text; expected one prompt"):
        Row.of_text("x").single_turn()


def test_the_cache_of_load_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = lines(tmp_path / "rows.jsonl", CHAT, CHAT)
    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    folder = Path(loaded.cache_files[0]["filename"]).parent
    assert (folder / "dataset_info.json").is_file()
    assert read_rows(folder) == read_rows(file)
