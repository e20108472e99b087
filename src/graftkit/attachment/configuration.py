"""What a pack changes beside the weights: config.json, generation_config.json and the tokenizer.

config.json decides what a model computes beside its weights: the base of its rotary embedding, the
epsilon of its norms, its activation. Classes read it when they are built and when they run. What
a class made of it is found by building the class twice (graftkit.models.configuration), and set on
the live modules; what it reads later is set in the live configuration. All of it can be undone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from graftkit.checkpoint import Checkpoint
from graftkit.errors import AttachError, CheckpointError, CorruptPackError, PackMismatchError
from graftkit.model_files import is_template, is_tokenizer_file
from graftkit.models.configuration import (
    Differences,
    UnknownEffectError,
    changed_keys,
    compare_models,
    effective_keys,
    holds_no_values,
    plain_attributes,
    possibly_effective_keys,
    skeletons,
    tuned_config,
    volatile_buffers,
)
from graftkit.models.loading import LOAD_ERRORS
from graftkit.models.text import usable_tokenizer
from graftkit.rows import template_digest
from graftkit.skillpack import SkillPack

CONFIG, GENERATION = "config.json", "generation_config.json"


TargetFile = Callable[[str], bytes | None]
"""Gives a side file of the target by name."""


_MISSING: Any = object()


def effective_config_keys(
    model: PreTrainedModel, pack: SkillPack, target_file: TargetFile | None = None
) -> list[str]:
    """Keys of the pack's config.json that change, or may change, what the model computes.

    Args:
        model: the target; it may be without weights. target_file: default the files of the folder
            that the model was loaded from.
    Raises: AttachError where the pack's config.json cannot be read; CorruptPackError.
    """
    settings = _settings(model, pack, CONFIG, target_file)
    if settings is None:
        return []
    tuned = _configuration(model, pack, settings)
    try:
        return effective_keys(type(model), model.config, tuned)
    except UnknownEffectError:
        return possibly_effective_keys(model.config, tuned)


def check_configuration(model: PreTrainedModel, pack: SkillPack) -> None:
    """Refuse a pack whose config.json changes the computation, which no single row can follow.

    Raises: AttachError naming the keys, or where config.json cannot be read; CorruptPackError.
    """
    keys = effective_config_keys(model, pack)
    if keys:
        raise AttachError(
            f"{CONFIG} of {pack.manifest.tuned.name} has another {', '.join(keys)}, which changes "
            "what every row of a batch computes, so the pack cannot be attached beside the model; "
            'attach with mode="merged", or merge it into a checkpoint'
        )


def tuned_generation_config(
    model: PreTrainedModel, pack: SkillPack, tuned: PretrainedConfig | None = None
) -> Any:
    """The generation settings of the merged checkpoint; the model's own object where equal.

    Args:
        tuned: the tuned configuration, which makes the settings where the pack has no
            generation_config.json.
    Raises: AttachError, CorruptPackError.
    """
    own = model.generation_config
    settings = _settings(model, pack, GENERATION, None)
    make: Any = GenerationConfig
    try:
        if settings is not None:
            return make.from_dict(settings)
        from_config = tuned is not None and getattr(own, "_from_model_config", False)
        return make.from_model_config(tuned) if from_config else own
    except LOAD_ERRORS as error:
        raise AttachError(
            f"{GENERATION} of {pack.manifest.tuned.name} cannot be used "
            f"({' '.join(str(error).split())}); pack the model again"
        ) from error


class TunedConfiguration:
    """What config.json and generation_config.json of a pack change in a live model."""

    def __init__(self, model: PreTrainedModel, pack: SkillPack):
        self._model, self._pack = model, pack
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> None:
        """Make the changes. Raises: AttachError naming the keys, CorruptPackError; call `undo`."""
        settings = _settings(self._model, self._pack, CONFIG, None)
        tuned = None if settings is None else _configuration(self._model, self._pack, settings)
        if tuned is not None:
            self._apply_configuration(tuned)
        self._apply_generation(tuned)

    def undo(self) -> None:
        """Restore everything, last change first; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _apply_configuration(self, tuned: PretrainedConfig) -> None:
        live = self._model.config
        keys = possibly_effective_keys(live, tuned)
        if not keys:
            self._set_configuration(live, live, tuned)
            return
        try:
            base, built = skeletons(type(self._model), live, tuned)
            differences = compare_models(base, built)
            if differences.structure or tuned.model_type != live.model_type:
                self._refuse(effective_keys(type(self._model), live, tuned) or keys)
        except UnknownEffectError as error:
            self._refuse(keys, f" ({error})")
        with torch.no_grad():
            self._apply_differences(differences, base, built, keys)
        seen: set[int] = set()
        for places in _configurations(self._model, base, built):
            if id(places[0]) not in seen:
                seen.add(id(places[0]))
                self._set_configuration(*places)

    def _refuse(self, keys: Sequence[str], why: str = "") -> None:
        raise AttachError(
            f"{CONFIG} of {self._pack.manifest.tuned.name} has another {', '.join(keys)}, which "
            f"makes another model of {type(self._model).__name__}{why}; merge the pack into a "
            "checkpoint instead"
        )

    def _apply_differences(
        self, differences: Differences, base: nn.Module, built: nn.Module, keys: Sequence[str]
    ) -> None:
        """Set on the live modules what the class makes of the tuned configuration."""
        for path in differences.replaced:
            parent, name = self._submodule(path.rpartition(".")[0], keys), path.rpartition(".")[2]
            device = next(self._model.parameters()).device
            self._set_entry(parent._modules, name, built.get_submodule(path).to(device))
        touched = {path for path, _ in (*differences.attributes, *differences.buffers)}
        for path in sorted(touched):
            self._restore_on_undo(self._submodule(path, keys))
        for path, name in differences.attributes:
            value = plain_attributes(built.get_submodule(path)).get(name, _MISSING)
            if holds_no_values(value):
                self._refuse(keys, f" ({path}.{name} cannot be made without weights)")
            self._set_entry(vars(self._submodule(path, keys)), name, value)
        for path, name in differences.buffers:
            module = self._submodule(path, keys)
            self._set_buffer(module, name, base.get_submodule(path), built.get_submodule(path))

    def _restore_on_undo(self, module: nn.Module) -> None:
        """Restore a whole module on `undo`: its forward pass may overwrite what is changed here.

        A rotary embedding of dynamic length writes its frequencies and their length when it runs.
        """
        attributes, buffers = plain_attributes(module), dict(volatile_buffers(module))
        is_leaf = not module._parameters and not module._modules

        def restore() -> None:
            for name in plain_attributes(module).keys() - attributes.keys() if is_leaf else ():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.update(buffers)

        self._undo.append(restore)
        module._buffers.update({name: value.clone() for name, value in buffers.items()})

    def _set_buffer(self, module: nn.Module, name: str, base: nn.Module, built: nn.Module) -> None:
        live, old, new = (owner._buffers.get(name) for owner in (module, base, built))
        if new is not None and live is not None:
            cast = old is not None and old.dtype != live.dtype and new.is_floating_point()
            new = new.to(live.device, live.dtype if cast else new.dtype)
        self._set_entry(module._buffers, name, _MISSING if new is None else new)

    def _set_configuration(
        self, live: PretrainedConfig, base: PretrainedConfig, tuned: PretrainedConfig
    ) -> None:
        """Every key that differs, in one configuration object and those inside it."""
        for path, key in list(changed_keys(base, tuned)):
            owner, source = live, tuned
            for step in path.split(".")[:-1]:
                owner, source = getattr(owner, step), getattr(source, step)
            self._set_entry(vars(owner), key, vars(source).get(key, _MISSING))

    def _apply_generation(self, tuned: PretrainedConfig | None) -> None:
        own = getattr(self._model, "generation_config", None)
        if own is None:
            return
        made = tuned_generation_config(self._model, self._pack, tuned)
        if made is not own:
            self._set_entry(vars(self._model), "generation_config", made)

    def _submodule(self, path: str, keys: Sequence[str]) -> nn.Module:
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            self._refuse(keys, f" (the live model has no {path})")
            raise

    def _set_entry(self, owner: dict[str, Any], name: str, value: Any) -> None:
        """Set or, for `_MISSING`, delete one entry; `undo` puts back the very object."""
        original = owner.get(name, _MISSING)
        self._undo.append(lambda: _put(owner, name, original))
        _put(owner, name, value)


def _put(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        owner.pop(name, None)
    else:
        owner[name] = value


def _configurations(
    live: nn.Module, base: nn.Module, built: nn.Module
) -> Iterator[tuple[PretrainedConfig, PretrainedConfig, PretrainedConfig]]:
    """Every configuration that a live module holds, with what it is in the two built models."""
    modules = [dict(model.named_modules()) for model in (live, base, built)]
    for path, module in modules[1].items():
        owners = [part.get(path) for part in modules]
        for name, value in vars(module).items():
            if isinstance(value, PretrainedConfig):
                same = [vars(owner).get(name) for owner in owners if owner is not None]
                if len(same) == 3 and all(isinstance(one, PretrainedConfig) for one in same):
                    yield same[0], same[1], same[2]  # type: ignore[misc]


def _configuration(
    model: PreTrainedModel, pack: SkillPack, settings: dict[str, Any]
) -> PretrainedConfig:
    """The tuned configuration. Raises: AttachError."""
    try:
        return tuned_config(model.config, settings)
    except UnknownEffectError as error:
        raise AttachError(
            f"{CONFIG} of {pack.manifest.tuned.name}: {error}; use a transformers that knows it"
        ) from error


def _settings(
    model: PreTrainedModel, pack: SkillPack, name: str, target_file: TargetFile | None
) -> dict[str, Any] | None:
    """A JSON file of the pack, None where it is the target's."""
    read = target_file or (lambda name: _loaded_file(model, name))
    try:
        content = pack.side_file(name, lambda: read(name))
    except PackMismatchError as error:
        raise AttachError(
            f"the pack of {pack.manifest.tuned.name} holds only what its {name} has otherwise than "
            "the target's, and the target's was not found; load the model from the target's "
            "folder, or pack again"
        ) from error
    return None if content is None else parse_settings(name, content)


def parse_settings(name: str, content: bytes | None) -> dict[str, Any]:
    """The object in a JSON file of a pack. Raises: CorruptPackError."""
    try:
        settings = json.loads(content or b"")
    except (ValueError, RecursionError) as error:
        raise CorruptPackError(f"side file {name} is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise CorruptPackError(f"side file {name} is not a JSON object")
    return dict(settings)


def _loaded_file(model: PreTrainedModel, name: str) -> bytes | None:
    """A file of the folder or cached repository that a model was loaded from."""
    origin = str(getattr(model.config, "_name_or_path", "") or "")
    if not origin:
        return None
    file = Path(origin) / name
    if not file.is_file():
        revision = getattr(model.config, "_commit_hash", None)
        try:
            cached = try_to_load_from_cache(origin, name, revision=revision)
        except ValueError:
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    try:
        return file.read_bytes()
    except OSError:
        return None


_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
# The parts of tokenizer.json that decide about tokens; padding and truncation differ by call.
_MEANING = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens")
_SAMPLE_TEXT = "Straße 12,5 %\n\tdef f(x):  return 'naïve' + 日本 \N{GRINNING FACE}"


def tuned_tokenizer(target: Checkpoint, pack: SkillPack) -> Any:
    """The tokenizer of the checkpoint that merging the pack would write.

    Raises: CheckpointError where there is no usable one; PackMismatchError for another target.
    """
    if not _tokenizer_files(pack) and not any(is_template(f.name) for f in pack.manifest.files):
        return usable_tokenizer(target)
    with TemporaryDirectory(prefix="graftkit-") as folder:
        for name, content in (target.side_files() | pack.side_files(target)).items():
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        try:
            return usable_tokenizer(Checkpoint(Path(folder), target.name, None, {}))
        except CheckpointError as error:
            raise CheckpointError(
                f"the tokenizer of {pack.manifest.tuned.name} cannot be read from its pack; merge "
                "the pack into a checkpoint"
            ) from error


def reads_chat(tokenizer: Any, pack: SkillPack | None = None) -> bool:
    """Whether a prompt is given in the chat template, and not as it is.

    A pack's prompts are given as its manifest says its skill's were. Those of a pack that does not
    say, and those of the target, are given in the template where there is one.

    Args:
        tokenizer: of the target, or of the pack (`tuned_tokenizer`).
    Raises: PackMismatchError where the skill's prompts were given in another template.
    """
    template = template_digest(tokenizer)
    if pack is None or pack.manifest.effective_prompt_format is None:
        return template is not None
    if pack.manifest.effective_prompt_format == "raw":
        return False
    if template is None or pack.manifest.template_blake3 not in (None, template):
        raise PackMismatchError(
            f"the skill of {pack.manifest.tuned.name} was trained in a chat template (digest "
            f"{(pack.manifest.template_blake3 or 'unknown')[:16]}), and the one here is "
            f"{'none' if template is None else 'of digest ' + template[:16]}; put back the "
            "target's chat template, or give prompts raw"
        )
    return True


def check_tokenizer(target: Checkpoint, pack: SkillPack) -> None:
    """Refuse a pack whose tokenizer gives texts other tokens than the target's.

    Another end of text, or another name of a token, is no such difference.

    Raises: PackMismatchError naming the file; CheckpointError where a tokenizer is unusable.
    """
    changed = _tokenizer_files(pack)
    if changed and _meaning(tuned_tokenizer(target, pack)) != _meaning(usable_tokenizer(target)):
        raise PackMismatchError(
            f"{changed[0]}: {pack.manifest.tuned.name} turns text into other tokens than the "
            "target, so it cannot answer beside other packs; merge it into a checkpoint"
        )


def _tokenizer_files(pack: SkillPack) -> list[str]:
    """Tokenizer files that the pack changes, those that decide about tokens first."""
    names = [file.name for file in pack.manifest.files]
    return sorted(name for name in names if is_tokenizer_file(name)) + [
        name for name in names if name in _TOKENIZER_SETTINGS
    ]


def _meaning(tokenizer: Any) -> list[Any]:
    """What decides which tokens a text becomes, and which text tokens become."""
    meaning: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.encode(_SAMPLE_TEXT)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        tokens = [[token["id"], token["content"]] for token in parts.pop("added_tokens", [])]
        meaning += [tokens, *(parts.get(name) for name in _MEANING)]
    return meaning
