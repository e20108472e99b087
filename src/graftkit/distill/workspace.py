"""The folder of a run: which stages are finished there, and what all stages need."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import DistillConfig, ModelSource, Source, resolve_model
from graftkit.distill.sample import WITHOUT_EFFECT_ON_ANSWERS, PromptSet, read_prompts
from graftkit.distill.scores import needed_fields
from graftkit.distill.select import Template
from graftkit.errors import OutputError, RowsError
from graftkit.files import replaced_file
from graftkit.models.loading import empty_model
from graftkit.models.text import usable_tokenizer
from graftkit.outputs import own_folder
from graftkit.progress import Progress
from graftkit.rows import rows_digest


class Workspace:
    """One configuration in one folder.

    Args:
        config_folder: folder of the configuration, to which its paths are relative.
    """

    def __init__(
        self, config: DistillConfig, folder: Path, config_folder: Path, progress: Progress
    ):
        self.config, self.progress = config, progress
        self.folder, self.config_folder = folder, config_folder

    @cached_property
    def prompts(self) -> PromptSet:
        """The prompts that the sources answer."""
        reference, tests = needed_fields(self.config)
        settings = self.config.prompts
        return read_prompts(settings, self.config.seed, reference, tests, self.config_folder)

    @cached_property
    def target(self) -> Checkpoint:
        """The model to train."""
        return Checkpoint.open(resolve_model(self.config.target, self.config_folder))

    @cached_property
    def template(self) -> Template:
        """Prompts and answers as the target reads them."""
        config = self.config
        longest = min(t.max_tokens for t in (config.sft, config.dpo) if t)
        tokenizer, model = usable_tokenizer(self.target), empty_model(self.target)
        return Template(tokenizer, model, config.prompts.chat, longest)

    @property
    def inputs(self) -> list[str | Path]:
        """Files and models that the configuration names."""
        config = self.config
        inputs: list[str | Path] = [self.config_folder / config.prompts.file]
        inputs.append(resolve_model(config.target, self.config_folder))
        for source in config.sources:
            if isinstance(source, ModelSource):
                inputs.append(resolve_model(source.model, self.config_folder))
            elif source.kind == "answers":
                inputs.append(self.config_folder / source.file)
        return inputs

    @property
    def models(self) -> list[ModelSource]:
        """The sources that run on this machine."""
        return [source for source in self.config.sources if isinstance(source, ModelSource)]

    @property
    def probed(self) -> list[ModelSource]:
        """The sources whose distributions are learned."""
        transfer = self.config.transfer
        return self.models if transfer and transfer.kl_weight > 0 else []

    @property
    def after_sft(self) -> Path:
        """The model directory that SFT writes."""
        return self.folder / ("sft" if self.config.dpo else "tuned")

    def distributions(self, source: ModelSource) -> Path:
        """The file of a source's distributions for the SFT rows."""
        return self.folder / "distributions" / f"{source.name}.safetensors"

    def target_identity(self) -> list[Any]:
        """What distinguishes targets, without their weights."""
        config = file_digest(self.target.path / "config.json")
        return [self.config.target, self.target.revision, self.target.nbytes, config]

    def source_identity(self, source: Source) -> dict[str, Any]:
        """What determines a source's answers."""
        settings = source.model_dump(mode="json", exclude=WITHOUT_EFFECT_ON_ANSWERS)
        if source.kind == "answers":
            settings["digest"] = rows_file_digest(self.config_folder / source.file)
        return settings


class StageLog:
    """The file stages.json: by stage, the digest of its inputs (key), its seconds and counts."""

    def __init__(self, folder: Path):
        self.path = folder / "stages.json"
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
        """Whether the stage was finished for this key, and its outputs exist."""
        same = self.entries.get(stage, {}).get("key") == key
        return same and all(path.exists() for path in outputs)

    def begun(self, stage: str) -> str | None:
        """The key for which a stage was begun and not finished."""
        return self.entries.get(stage, {}).get("begun")

    def begin(self, stage: str, key: str) -> None:
        """Record that a stage begins. Raises: OutputError."""
        self._write(stage, {"begun": key})

    def finish(self, stage: str, key: str, seconds: float, result: dict[str, Any]) -> None:
        """Record a finished stage. Raises: OutputError."""
        self._write(stage, {"key": key, "seconds": round(seconds, 2), **result})

    def _write(self, stage: str, entry: dict[str, Any]) -> None:
        self.entries[stage] = entry
        with replaced_file(self.path) as partial:
            partial.write_text(json.dumps(self.entries, indent=1), encoding="utf-8")


@contextmanager
def exclusive_run(folder: Path, inputs: Sequence[str | Path] = ()) -> Iterator[None]:
    """Lock the folder of a run. The processes of one launcher count as one run.

    inputs: what the run reads; none of it may lie in the folder.
    Raises: OutputError for a folder with other files, with an input, or of a run at work.
    """
    if not is_main():
        yield
        return
    with own_folder(folder, "distill", inputs):
        yield


def stage_key(*parts: Any) -> str:
    """A digest of settings, digests and keys."""
    return blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest(length=16)


def file_digest(path: Path) -> str:
    """A digest of a file's bytes; "" for a missing file."""
    if not path.is_file():
        return ""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest(length=16)


def rows_file_digest(path: Path) -> str:
    """A digest of a file, or of a data set folder, of rows; "" for a missing one."""
    if path.is_file():
        return file_digest(path)
    try:
        return rows_digest(path)
    except RowsError:
        return ""


def processes() -> int:
    """Number of processes that `accelerate launch` or `torchrun` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the one process that writes files."""
    return int(os.environ.get("RANK", "0")) == 0
