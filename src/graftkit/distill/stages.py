"""Which stages of a folder are done, and whether what they were made from is still the same."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.distill.launch import is_main
from graftkit.errors import OutputError
from graftkit.files import replaced_file
from graftkit.outputs import own_folder

FILE = "stages.json"


class StageBook:
    """stages.json: by stage, the key it was made for, its seconds and counts."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.entries: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.entries = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise OutputError(
                    f"{self.path}: not JSON ({error}); delete it to redo every stage"
                ) from error
            entries: Any = self.entries
            if not isinstance(entries, dict) or not all(
                isinstance(entry, dict) for entry in entries.values()
            ):
                raise OutputError(
                    f"{self.path}: holds no stages by name; delete it to redo every stage"
                )

    def done(self, stage: str, key: str, outputs: Iterable[Path]) -> bool:
        """Whether the stage was finished for this key and its outputs are there."""
        same = self.entries.get(stage, {}).get("key") == key
        return same and all(path.exists() for path in outputs)

    def begun(self, stage: str) -> str | None:
        """The key that a stage was begun for and not finished."""
        return self.entries.get(stage, {}).get("begun")

    def begin(self, stage: str, key: str) -> None:
        """Note that a stage begins. Raises: OutputError."""
        self._write(stage, {"begun": key})

    def finish(self, stage: str, key: str, seconds: float, result: dict[str, Any]) -> None:
        """Note a finished stage. Raises: OutputError."""
        self._write(stage, {"key": key, "seconds": round(seconds, 2), **result})

    def _write(self, stage: str, entry: dict[str, Any]) -> None:
        self.entries[stage] = entry
        with replaced_file(self.path) as partial:
            partial.write_text(json.dumps(self.entries, indent=1), encoding="utf-8")


@contextmanager
def only_run(folder: Path, inputs: Sequence[str | Path] = ()) -> Iterator[None]:
    """A folder that is ours, without a second run in it; the processes of one launch are one run.

    inputs: what the run reads, none of which may lie in the folder.
    Raises: OutputError as `own_folder`.
    """
    if not is_main():
        yield
        return
    with own_folder(folder, "distill", inputs):
        yield


def key_of(*parts: Any) -> str:
    """A digest of settings, digests and keys."""
    return blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest(length=16)


def digest_of(path: Path) -> str:
    """A digest of a file's bytes; of nothing where there is no file."""
    if not path.is_file():
        return ""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest(length=16)
