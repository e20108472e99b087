"""Files of text that anybody may write or damage: what is wrong with them, in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from graftkit import Library
from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import DistillConfig
from graftkit.distill.records import Journal, read_lines
from graftkit.distill.workspace import StageLog, exclusive_run
from graftkit.errors import GraftError
from graftkit.rows import read_rows

CONTENTS = {
    "nothing": b"",
    "utf-16": "{}".encode("utf-16"),
    "NUL": b"\0\0\0",
    "no UTF-8": b"\xff\xfe\xfa",
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "toml brackets": b"a = " + b"[" * 100_000,
    "null": b"null",
    "a list": b"[1]",
    "a number": b"1",
    "a text": b'"\\ud800"',
    "digits": b"1" * 5000,
    "toml digits": b"seed = " + b"1" * 5000,
    "infinite": b'{"a": 1e400}',
    "cut": b'{"a":',
}


def config(folder):
    return Checkpoint.open(str(folder)).config


READERS = {
    "rows.jsonl": read_rows,
    "c.toml": DistillConfig.read_toml,
    "samples.jsonl": lambda file: list(read_lines(file)),
    "journal.jsonl": lambda file: Journal(file).read(),
    "stages.json": lambda file: StageLog(file.parent).begun("sft"),
    "library.toml": lambda file: Library.open(file.parent),
    "config.json": lambda file: config(file.parent),
    "model.safetensors.index.json": lambda file: Checkpoint.open(str(file.parent)),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("name", READERS)
def test_damage_is_read_or_refused_in_one_line_naming_the_file(tmp_path, name, content):
    if name == "config.json":
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    try:
        READERS[name](tmp_path / name)
    except GraftError as error:
        said = str(error)
    else:
        said = str(tmp_path)
    assert str(tmp_path) in said
    assert "\n" not in said


@pytest.mark.parametrize("name", [".graftkit", ".lock"])
def test_a_marker_or_lock_that_is_a_folder_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(GraftError), exclusive_run(tmp_path):
        pass


def test_whole_files_are_still_read(tmp_path):
    (tmp_path / "stages.json").write_text(json.dumps({"sft": {"begun": "k"}}))
    assert StageLog(tmp_path).begun("sft") == "k"
    (tmp_path / "j.jsonl").write_text('{"unit": 0}\n{"unit": 1')
    assert Journal(tmp_path / "j.jsonl").read() == [{"unit": 0}]
