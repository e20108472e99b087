"""What the stages of one run share: the configuration, the folder, and what both refer to."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import DistillConfig, ModelSource, Source, located
from graftkit.distill.sampling import INDIFFERENT, PromptSet, read_prompts
from graftkit.distill.scoring import wants
from graftkit.distill.stages import digest_of
from graftkit.distill.template import Template
from graftkit.models.encoding import usable_tokenizer
from graftkit.models.loading import empty_model

Progress = Callable[[str, int, int], None]
"""Called with (step, done, total)."""


class Workspace:
    """One configuration in one folder.

    Args:
        where: the folder that relative paths in the configuration refer to.
    """

    def __init__(self, config: DistillConfig, folder: Path, where: Path, progress: Progress):
        self.config, self.folder, self.where, self.progress = config, folder, where, progress

    @cached_property
    def prompts(self) -> PromptSet:
        """What the sources are asked."""
        reference, tests = wants(self.config)
        settings = self.config.prompts
        return read_prompts(settings, self.config.seed, reference, tests, self.where)

    @cached_property
    def target(self) -> Checkpoint:
        """The model that learns."""
        return Checkpoint.open(located(self.config.target, self.where))

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
        named: list[str | Path] = [self.where / config.prompts.file]
        named.append(located(config.target, self.where))
        for source in config.sources:
            if isinstance(source, ModelSource):
                named.append(located(source.model, self.where))
            elif source.kind == "answers":
                named.append(self.where / source.file)
        return named

    @property
    def models(self) -> list[ModelSource]:
        """The sources that are run here."""
        return [source for source in self.config.sources if isinstance(source, ModelSource)]

    @property
    def probed(self) -> list[ModelSource]:
        """The sources whose distributions are used."""
        transfer = self.config.transfer
        return self.models if transfer and transfer.kl_weight > 0 else []

    @property
    def after_sft(self) -> Path:
        """The model directory that SFT writes."""
        return self.folder / ("sft" if self.config.dpo else "tuned")

    def distributions(self, source: ModelSource) -> Path:
        """What a source expects in the SFT rows."""
        return self.folder / "distributions" / f"{source.name}.safetensors"

    def target_identity(self) -> list[Any]:
        """What tells one target from another without reading its weights."""
        config = digest_of(self.target.path / "config.json")
        return [self.config.target, self.target.revision, self.target.nbytes, config]

    def source_identity(self, source: Source) -> dict[str, Any]:
        """What decides a source's answers."""
        said = source.model_dump(mode="json", exclude=INDIFFERENT)
        if source.kind == "answers":
            said["digest"] = digest_of(self.where / source.file)
        return said
