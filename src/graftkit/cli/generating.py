"""`graftkit generate`: one answer per pack, all in one batch, or the answer of a routed pack."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import show

if TYPE_CHECKING:
    from graftkit.route import Route
    from graftkit.skillpack import SkillPack

app = typer.Typer()


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    target: Annotated[
        str | None, typer.Argument(help="Target: a Hugging Face directory or Hub id[@rev].")
    ] = None,
    packs: Annotated[
        list[Path] | None,
        typer.Option("--pack", help="A pack to attach; repeat it for one answer per pack."),
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="A library's folder, in place of TARGET and --pack.")
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(help="One answer: auto (by router keys), a pack's name, or target."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    json_output: show.Json = False,
) -> None:
    """Continue a prompt, with or without packs attached.

    Several packs give one answer each, unless --route picks one of them.
    """
    from graftkit.errors import ConfigError

    files = packs or []
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to continue")
    if library is None and target is not None:
        answers = generate_answers(target, files, prompt, max_new_tokens, route)
    elif library is not None and target is None and not files:
        answers = _ask_library(library, prompt, max_new_tokens, route)
    else:
        raise ConfigError("name a target, with or without packs, or a library")
    show.json_or(
        json_output, {"prompt": prompt, "answers": answers}, lambda: print_answers(answers)
    )


def print_answers(answers: list[dict[str, Any]]) -> None:
    """The text alone, or labelled by its pack where there are several."""
    for answer in answers:
        text = answer["text"] if len(answers) == 1 else f"[{answer['pack']}] {answer['text']}"
        show.paragraph(text)


def _ask_library(
    folder: Path, prompt: str, max_new_tokens: int, route: str | None
) -> list[dict[str, Any]]:
    """The answer of a library. Raises: ConfigError for a prompt that cannot be continued."""
    from graftkit.errors import ConfigError
    from graftkit.library import Library

    library = Library.open(folder)
    answer = library.generate(prompt, route=route or "auto", max_new_tokens=max_new_tokens)
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
        route: "auto", a file's name without its ending, or "target": only that one answers.
    Raises: ConfigError for a route that cannot be; AttachError for a model that cannot generate.
    """
    from graftkit.attachment.configuration import tuned_tokenizer
    from graftkit.checkpoint import Checkpoint
    from graftkit.errors import AttachError
    from graftkit.models.encoding import usable_tokenizer
    from graftkit.models.loading import load_model
    from graftkit.skillpack import SkillPack

    packs = [SkillPack.load(file) for file in files]
    checkpoint = Checkpoint.open(target)
    model: Any = load_model(checkpoint)
    if not model.can_generate():
        raise AttachError(f"{target}: {type(model).__name__} does not generate text")
    tokenizer = usable_tokenizer(checkpoint)
    if route is not None:
        chosen = _choose_pack(model, tokenizer, files, packs, route, prompt)
        files, packs = [files[i] for i in chosen], [packs[i] for i in chosen]
    if not packs:
        [text] = _generate_texts(model, tokenizer, [], prompt, max_new_tokens)
        return [{"pack": None, "text": text}]
    # Only packs with the target's tokenizer and settings can share a batch.
    alone = [i for i, pack in enumerate(packs) if not _is_weights_only(pack)]
    shared = [i for i in range(len(packs)) if i not in alone]
    texts: dict[int, str] = {}
    for batch in filter(None, [shared, *([i] for i in alone)]):
        reader = tuned_tokenizer(checkpoint, packs[batch[0]]) if batch[0] in alone else tokenizer
        attached = [packs[i] for i in batch]
        answers = _generate_texts(model, reader, attached, prompt, max_new_tokens)
        texts |= dict(zip(batch, answers, strict=True))
    return [{"pack": file.name, "text": texts[i]} for i, file in enumerate(files)]


def _is_weights_only(pack: "SkillPack") -> bool:
    from graftkit.model_files import is_template

    return all(is_template(file.name) for file in pack.manifest.files)


def _choose_pack(
    model: Any, tokenizer: Any, files: list[Path], packs: list["SkillPack"], route: str, prompt: str
) -> list[int]:
    """The index of the pack that a route chooses; none for the target. Raises: ConfigError."""
    from graftkit.errors import ConfigError
    from graftkit.route import FixedRouter, Router
    from graftkit.route.centroid import CentroidRouter
    from graftkit.route.key import RouterKey

    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"two packs are called {max(names, key=names.count)}; rename one file")
    router: Router
    if route != "auto":
        router = FixedRouter(route, names)
    else:
        keys = {name: RouterKey.of(pack) for name, pack in zip(names, packs, strict=True)}
        if all(key is None for key in keys.values()):
            raise ConfigError("no pack carries a router key; pack it again with --prompts")
        router = CentroidRouter(model, tokenizer, keys)
    name = _pack_name(router.route([prompt])[0])
    return [] if name is None else [names.index(name)]


def _pack_name(route: "Route") -> str | None:
    from graftkit.route import TARGET

    return None if route.name == TARGET else route.name


def _generate_texts(
    model: Any, tokenizer: Any, packs: list["SkillPack"], prompt: str, max_new_tokens: int
) -> list[str]:
    """One answer for each pack, or that of the target, in one batch."""
    from graftkit.attachment import attached
    from graftkit.generate import generate_greedy
    from graftkit.models.encoding import pad_id

    ids = tokenizer.encode(prompt)

    def answer(rows: int) -> list[str]:
        output = generate_greedy(
            model,
            [ids] * rows,
            max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id(tokenizer),
        )
        texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
        return texts

    if not packs:
        return answer(1)
    if len(packs) == 1:  # merged, it is as fast as the target alone
        with attached(model, packs, mode="merged"):
            return answer(1)
    with attached(model, packs, mode="side") as attachment:
        attachment.route(list(range(len(packs))))
        return answer(len(packs))
