"""Files of rows: JSON Lines, Parquet, and the folders of data sets.

A folder is one that `save_to_disk` or `load_dataset` of the library datasets wrote, or a repository
of the Hub: files .jsonl, .parquet or .arrow, whose names or folders name the split. FOLDER/SPLIT is
the split of a folder that has several. Nothing is fetched.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.errors import RowsError
from graftkit.rows.row import Row, RowFormat

FIELDS = ("prompt", "completion", "messages", "tools", "text", "tests")
"""The columns that are read of a table."""

_ENDINGS = (".jsonl", ".parquet", ".arrow")
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev)(?=[-_./]|$)")
_EXPECTED = '{"prompt": "...", "completion": "..."}'


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """Read every row of a file or a data set folder; other keys and blank lines are ignored.

    The first row decides the format: prompt and completion, else messages, else text.

    Raises: RowsError with file and line (of a table, the row) when the file is missing, empty,
        damaged or not UTF-8, a line is no JSON object, a field is missing or of a wrong type, or a
        row has another format than the first.
    """
    rows: list[Row] = []
    for record, origin in read_records(path):
        rows.append(row_of_record(record, origin))
        if rows[-1].format != rows[0].format:
            raise RowsError(
                f"{origin}: a row of {_named(rows[-1].format)}, and the first row is of "
                f"{_named(rows[0].format)}; put rows of one format into a file"
            )
    if not rows:
        raise RowsError(
            f"{path}: the file holds no rows; expected one JSON object a line, {_EXPECTED}"
        )
    return tuple(rows)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a file or data set folder; rows without a completion will do.

    Of messages the prompt is the user's last turn, as plain text.

    Raises: RowsError as `read_rows` does, and for rows that have no prompt.
    """
    prompts = tuple(
        prompt_of_record(record, origin).prompt for record, origin in read_records(path)
    )
    if not prompts:
        raise RowsError(f'{path}: the file holds no rows; expected one {{"prompt": "..."}} a line')
    return prompts


def row_of_record(record: dict[str, Any], origin: str) -> Row:
    """A row of any format. Raises: RowsError for a field that is missing or of a wrong type."""
    if not (_has(record, "prompt") and _has(record, "completion")):
        if _has(record, "messages"):
            return Row.of_messages(record["messages"], record.get("tools"), origin)
        if "text" in record and "prompt" not in record and "completion" not in record:
            return Row.of_text(text_field(record, "text", origin), origin)
    return Row(
        text_field(record, "prompt", origin), text_field(record, "completion", origin), origin
    )


def prompt_of_record(record: dict[str, Any], origin: str) -> Row:
    """A row that may have no completion. Raises: RowsError for a row without a prompt."""
    if _has(record, "messages") and not _has(record, "prompt"):
        row = Row.of_messages(record["messages"], record.get("tools"), origin, answered=False)
        if not any(turn["role"] == "user" for turn in row.turns):
            raise RowsError(f"{origin}: no message of the user; expected one, as the prompt")
        return row
    completion = record.get("completion")
    return Row(
        text_field(record, "prompt", origin),
        completion if isinstance(completion, str) else "",
        origin,
    )


def read_records(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file or data set folder, each with its place, such as rows.jsonl:12.

    Raises: RowsError with file and line when a file is missing, damaged or not UTF-8, or a line is
        no JSON object.
    """
    for file in data_files(path):
        head = _read_head(file)
        if head == b"PAR1" or file.suffix == ".parquet" or file.suffix == ".arrow":
            yield from _read_table(file, parquet=file.suffix != ".arrow")
        else:
            yield from _read_lines(file)


def rows_digest(path: str | Path) -> str:
    """BLAKE3 of the bytes of a file, or of the digests of a folder's files; 64 digits.

    Raises: RowsError where a file cannot be read.
    """
    files = data_files(path)
    digests = [blake3(_read_bytes(file)) for file in files]
    if files == [Path(path)]:
        return digests[0].hexdigest()
    return blake3(b"".join(digest.digest() for digest in digests)).hexdigest()


def data_files(path: str | Path) -> list[Path]:
    """The files that hold the rows of a path, in their order.

    Raises: RowsError for a folder without such files, or with several splits or data sets.
    """
    path = Path(path)
    if path.is_dir():
        return _files_of_folder(path, None)
    if not path.exists() and path.parent.is_dir() and _SPLIT.fullmatch(path.name):
        return _files_of_folder(path.parent, path.name)
    return [path]


def text_field(record: dict[str, Any], key: str, origin: str) -> str:
    """A string of a record. Raises: RowsError where it is missing or no text."""
    if key not in record:
        keys = ", ".join(map(repr, sorted(record)[:5])) or "none"
        raise RowsError(
            f'{origin}: key "{key}" is missing (keys found: {keys}); add it, or give messages or '
            "text in place of prompt and completion"
        )
    text = record[key]
    if not isinstance(text, str):
        raise RowsError(f'{origin}: "{key}" is {type(text).__name__}; expected a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowsError(
            f'{origin}: "{key}" holds half of a surrogate pair at character {error.start + 1}; '
            "write the whole character"
        ) from error
    return text


def _has(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _named(row_format: RowFormat) -> str:
    return row_format.replace("_", " and ")


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The data files of one split; the only one where none is named."""
    saved = _json_object(folder / "dataset_dict.json").get("splits")
    if isinstance(saved, list) and split is None:
        return _files_of_folder(folder / _only(folder, list(map(str, saved))), None)
    listed = _json_object(folder / "state.json").get("_data_files")
    if isinstance(listed, list) and split is None:
        return [folder / Path(str(each.get("filename"))).name for each in listed]
    by_split: dict[str, list[Path]] = {}
    for file in _walk(folder):
        found = _SPLIT.search(file.relative_to(folder).as_posix())
        by_split.setdefault(found[1] if found else "", []).append(file)
    if not by_split:
        raise RowsError(
            f"{folder}: a directory; expected a rows.jsonl file, or the folder of a data set with "
            ".jsonl, .parquet or .arrow files"
        )
    if split is not None and split not in by_split:
        names = ", ".join(filter(None, sorted(by_split))) or "none"
        raise RowsError(f"{folder / split}: no such split; the folder's splits are {names}")
    files = by_split[_only(folder, sorted(by_split)) if split is None else split]
    places = sorted({file.parent.relative_to(folder).as_posix() for file in files})
    if len(places) > 1:
        raise RowsError(
            f"{folder}: holds several data sets ({', '.join(places[:5])}); name the folder of one"
        )
    return files


def _only(folder: Path, splits: Sequence[str]) -> str:
    if len(splits) != 1:
        names = ", ".join(name or "files of no split" for name in splits) or "none"
        raise RowsError(f"{folder}: holds the splits {names}; name one, such as {folder}/train")
    return splits[0]


def _walk(folder: Path) -> Iterator[Path]:
    """Data files in and below a folder, without hidden ones and those of caches."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts) or file.name.startswith("cache-")
        if not hidden and file.suffix in _ENDINGS and file.is_file():
            yield file


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON file of a data set folder; empty where it is missing or something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects of JSON Lines, without the byte order mark that some editors write."""
    content = _read_bytes(file).removeprefix(b"\xef\xbb\xbf")
    # Only LF ends a line of JSON Lines; str.splitlines would also cut inside a string at U+2028.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            origin = f"{file}:{number}"
            yield _parse_line(line, origin), origin


def _read_table(file: Path, parquet: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a Parquet or Arrow file, counted from 1. Raises: RowsError."""
    try:
        import pyarrow
    except ImportError as error:
        raise RowsError(
            f"{file}: Parquet and Arrow files need pyarrow ({error}); "
            "pip install 'graftkit[parquet]'"
        ) from error
    number = 0
    try:
        for batch in _parquet_batches(file) if parquet else _arrow_batches(file):
            for record in batch.to_pylist():
                number += 1
                yield {key: _without_nulls(v) for key, v in record.items()}, f"{file}:{number}"
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = "Parquet" if parquet else "Arrow"
        raise RowsError(
            f"{file}: cannot be read behind row {number} ({reason}); expected a whole {kind} file"
        ) from error


def _parquet_batches(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        columns = _columns(file, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=1_000, columns=columns)


def _arrow_batches(file: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(file)) as source:
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        with ipc.open_file(source) if whole else ipc.open_stream(source) as reader:
            columns = _columns(file, reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
            for batch in batches:
                yield batch.select(columns)


def _columns(file: Path, names: Sequence[str]) -> list[str]:
    columns = [name for name in names if name in FIELDS]
    if not columns:
        present = ", ".join(map(repr, names[:5])) or "none"
        raise RowsError(
            f"{file}: none of the columns prompt, completion, messages and text (columns found: "
            f"{present}); rename the columns"
        )
    return columns


def _without_nulls(value: Any) -> Any:
    """A value of a table without the null fields that its type gives to every struct."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _read_head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(4)
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> RowsError:
    return RowsError(f"{file}: cannot be read ({error.strerror}); expected a rows.jsonl file")


def _parse_line(line: bytes, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowsError(
            f"{origin}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RowsError(
            f"{origin}: not JSON ({error}); expected one object a line, {_EXPECTED}"
        ) from error
    if not isinstance(record, dict):
        raise RowsError(f"{origin}: {type(record).__name__} found; expected a JSON object")
    return record
