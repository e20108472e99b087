"""Behind `generate`: one answer per pack, all in one batch, or the answer of a routed pack."""

from pathlib import Path
from typing import Any

import torch

from graftkit.attachment import attached
from graftkit.attachment.configuration import tuned_tokenizer
from graftkit.checkpoint import Checkpoint
from graftkit.errors import AttachError, ConfigError
from graftkit.library import Library
from graftkit.models.encoding import pad_id, usable_tokenizer
from graftkit.models.loading import load_model
from graftkit.route import TARGET, Route, Router
from graftkit.route.base import FixedRouter
from graftkit.route.centroid import CentroidRouter
from graftkit.route.key import RouterKey
from graftkit.side_files import is_template
from graftkit.skillpack import SkillPack


def answer_prompt(
    target: str | None,
    files: list[Path],
    library: Path | None,
    route: str | None,
    prompt: str,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Greedy answers of a library, or of a target and packs. Raises: ConfigError."""
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to continue")
    if library is None and target is not None:
        return generate_answers(target, files, prompt, max_new_tokens, route)
    if library is None or target is not None or files:
        raise ConfigError("name a target, with or without packs, or a library")
    answer = Library.open(library).generate(
        prompt, route=route or "auto", max_new_tokens=max_new_tokens
    )
    if answer.note is not None:
        raise ConfigError(answer.note)
    return [{"pack": _pack_name(answer.route), "text": answer.text}]


def generate_answers(
    target: str, files: list[Path], prompt: str, max_new_tokens: int, route: str | None = None
) -> list[dict[str, Any]]:
    """Greedy answers: of the target without packs, else one per pack, in their order.

    Each answers as its merged checkpoint would: packs that bring a tokenizer or settings of their
    own run alone, all others in one batch.

    Args:
        route: "auto", a file's name without its ending, or "target": only what it chooses answers.
    Raises: ConfigError for a route that cannot be; AttachError for a model that cannot generate.
    """
    packs = [SkillPack.load(file) for file in files]
    checkpoint = Checkpoint.open(target)
    model: Any = load_model(checkpoint)
    if not model.can_generate():
        raise AttachError(f"{target}: {type(model).__name__} does not generate text")
    tokenizer = usable_tokenizer(checkpoint)
    if route is not None:
        chosen = _chosen(model, tokenizer, files, packs, route, prompt)
        files, packs = [files[i] for i in chosen], [packs[i] for i in chosen]
    if not packs:
        [text] = _texts(model, tokenizer, [], prompt, max_new_tokens)
        return [{"pack": None, "text": text}]
    together = [i for i, pack in enumerate(packs) if _is_weights_only(pack)]
    texts: dict[int, str] = {}
    if together:
        chosen_packs = [packs[i] for i in together]
        found = _texts(model, tokenizer, chosen_packs, prompt, max_new_tokens)
        texts = dict(zip(together, found, strict=True))
    for i in set(range(len(packs))) - texts.keys():
        own = tuned_tokenizer(checkpoint, packs[i])
        [texts[i]] = _texts(model, own, [packs[i]], prompt, max_new_tokens)
    return [{"pack": file.name, "text": texts[i]} for i, file in enumerate(files)]


def _texts(
    model: Any, tokenizer: Any, packs: list[SkillPack], prompt: str, max_new_tokens: int
) -> list[str]:
    """One answer for each pack, or that of the target, in one batch."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    batch = ids.repeat(max(1, len(packs)), 1)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(batch),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": pad_id(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    output = _generate(model, batch, packs, options)
    texts: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def _is_weights_only(pack: SkillPack) -> bool:
    """Whether a pack has the target's tokenizer and settings: only then it can share a batch."""
    return all(is_template(file.name) for file in pack.manifest.files)


def _chosen(
    model: Any, tokenizer: Any, files: list[Path], packs: list[SkillPack], route: str, prompt: str
) -> list[int]:
    """The index of the pack that a route chooses; none for the target. Raises: ConfigError."""
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"two packs are called {max(names, key=names.count)}; rename one file")
    if route != "auto":
        router: Router = FixedRouter(route, names)
    else:
        keys = {name: RouterKey.of(pack) for name, pack in zip(names, packs, strict=True)}
        if all(key is None for key in keys.values()):
            raise ConfigError("no pack carries a router key; pack it again with --prompts")
        router = CentroidRouter(model, tokenizer, keys)
    name = _pack_name(router.route([prompt])[0])
    return [] if name is None else [names.index(name)]


def _pack_name(route: Route) -> str | None:
    return None if route.name == TARGET else route.name


def _generate(
    model: Any, batch: torch.Tensor, packs: list[SkillPack], options: dict[str, Any]
) -> torch.Tensor:
    tokens: torch.Tensor
    if not packs:
        tokens = model.generate(batch, **options)
        return tokens
    # One pack runs merged, as fast as the target alone; several share the target side by side.
    with attached(model, packs, mode="merged" if len(packs) == 1 else "side") as handle:
        if len(packs) > 1:
            handle.route(list(range(len(packs))))
        tokens = model.generate(batch, **options)
    return tokens
