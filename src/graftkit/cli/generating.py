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
    prompt: Annotated[str, typer.Option("--prompt", help="Text to answer or to continue.")],
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
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it is, without a chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system text, for the chat template.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    json_output: show.Json = False,
) -> None:
    """Answer a prompt, with or without packs attached.

    Several packs give one answer each, unless --route picks one of them. The prompt is given as a
    user's turn in the chat template of the target, or of the pack that brings its own; a model
    without a template continues it as it is, and so does a pack whose skill was trained on plain
    prompts and completions (`graftkit inspect` shows it).
    """
    from graftkit.errors import ConfigError

    files = packs or []
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to continue")
    if raw and system is not None:
        raise ConfigError("--system writes a turn of the chat template; leave out --raw")
    if library is None and target is not None:
        answers = generate_answers(target, files, prompt, max_new_tokens, route, raw, system)
    elif library is not None and target is None and not files:
        answers = _ask_library(library, prompt, max_new_tokens, route, raw, system)
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
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    route: str | None,
    raw: bool,
    system: str | None,
) -> list[dict[str, Any]]:
    """The answer of a library. Raises: ConfigError for a prompt that cannot be continued."""
    from graftkit.errors import ConfigError
    from graftkit.library import Library

    library = Library.open(folder)
    if (route or "auto") == "auto":
        for line in library.routing_warnings(unread_only=True):
            show.line(f"graftkit: {line}", error=True)
    answer = library.generate(
        prompt, route=route or "auto", max_new_tokens=max_new_tokens, raw=raw, system=system
    )
    if answer.note is not None:
        raise ConfigError(answer.note)
    return [{"pack": _pack_name(answer.route), "text": answer.text}]


def generate_answers(
    target: str,
    files: list[Path],
    prompt: str,
    max_new_tokens: int,
    route: str | None = None,
    raw: bool = False,
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers: of the target without packs, else one per pack, in their order.

    Each answers as its merged checkpoint would: packs that bring a tokenizer or settings of their
    own run alone, all others in one batch.

    Args:
        route: "auto", a file's name without its ending, or "target": only that one answers.
        raw: give the prompt as it is; otherwise `reads_chat` decides for each pack.
        system: text of a system turn, in a chat template.
    Raises: ConfigError for a route that cannot be, or a system text for a raw prompt; RowsError
        where the chat template fails; AttachError for a model that cannot generate.
    """
    from graftkit.attachment.configuration import tuned_tokenizer
    from graftkit.checkpoint import Checkpoint
    from graftkit.errors import AttachError
    from graftkit.models.loading import load_model
    from graftkit.models.text import usable_tokenizer
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

    def given(reader: Any, pack: SkillPack | None) -> tuple[list[int], list[int]]:
        """Token ids to start from, and the tokens that end the answer."""
        return _encode_given(model, reader, pack, prompt, raw, system)

    if not packs:
        [text] = _generate_texts(model, tokenizer, [], [given(tokenizer, None)], max_new_tokens)
        return [{"pack": None, "text": text}]
    readers = [tuned_tokenizer(checkpoint, p) if p.manifest.files else tokenizer for p in packs]
    starts = [given(*both) for both in zip(readers, packs, strict=True)]
    # Only packs with the target's tokenizer and settings, and one end, can share a batch.
    batches: dict[Any, list[int]] = {}
    for i, pack in enumerate(packs):
        key = tuple(starts[i][1]) if _is_weights_only(pack) else f"alone {i}"
        batches.setdefault(key, []).append(i)
    texts: dict[int, str] = {}
    for batch in batches.values():
        attached, own = [packs[i] for i in batch], [starts[i] for i in batch]
        answers = _generate_texts(model, readers[batch[0]], attached, own, max_new_tokens)
        texts |= dict(zip(batch, answers, strict=True))
    return [{"pack": file.name, "text": texts[i]} for i, file in enumerate(files)]


def _encode_given(
    model: Any,
    tokenizer: Any,
    pack: "SkillPack | None",
    prompt: str,
    raw: bool,
    system: str | None,
) -> tuple[list[int], list[int]]:
    """A prompt as a pack, or the target, is to read it, and the tokens that end its answer."""
    from graftkit.attachment.configuration import reads_chat, tuned_generation_config
    from graftkit.errors import ConfigError
    from graftkit.models.text import end_tokens
    from graftkit.rows import encode_question

    chat = not raw and reads_chat(tokenizer, pack)
    if system is not None and not chat:
        who = "the target" if pack is None else f"the pack of {pack.manifest.tuned.name}"
        raise ConfigError(f"--system needs a chat template, and {who} is asked without one")
    config = model.generation_config if pack is None else tuned_generation_config(model, pack)
    ids = encode_question(tokenizer, prompt, chat, system)
    return ids, end_tokens(config, tokenizer, chat)


def _is_weights_only(pack: "SkillPack") -> bool:
    from graftkit.model_files import is_template

    return all(is_template(file.name) for file in pack.manifest.files)


def _choose_pack(
    model: Any, tokenizer: Any, files: list[Path], packs: list["SkillPack"], route: str, prompt: str
) -> list[int]:
    """The index of the pack that a route chooses; none for the target. Raises: ConfigError."""
    from graftkit.errors import ConfigError
    from graftkit.route import FixedRouter, Router
    from graftkit.route.nearest import KeyRouter, read_key

    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"two packs are called {max(names, key=names.count)}; rename one file")
    router: Router
    if route != "auto":
        router = FixedRouter(route, names)
    else:
        keys = {name: read_key(pack) for name, pack in zip(names, packs, strict=True)}
        if all(key is None for key in keys.values()):
            raise ConfigError("no pack carries a router key; pack it again with --prompts")
        router = key_router = KeyRouter(model, tokenizer, keys)
        for line in key_router.unread:
            show.line(f"graftkit: {line}", error=True)
    name = _pack_name(router.route([prompt])[0])
    return [] if name is None else [names.index(name)]


def _pack_name(route: "Route") -> str | None:
    from graftkit.route import TARGET

    return None if route.name == TARGET else route.name


def _generate_texts(
    model: Any,
    tokenizer: Any,
    packs: list["SkillPack"],
    starts: list[tuple[list[int], list[int]]],
    max_new_tokens: int,
) -> list[str]:
    """One answer for each pack, or that of the target, in one batch.

    Args:
        starts: of each answer, the token ids before it and the tokens that end it, which are those
            of all.
    """
    from graftkit.attachment import attached
    from graftkit.models.text import generate_greedy, pad_id

    ends = starts[0][1]

    def answer() -> list[str]:
        output = generate_greedy(
            model,
            [ids for ids, _ in starts],
            max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad_id(tokenizer),
        )
        texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
        return texts

    if not packs:
        return answer()
    if len(packs) == 1:  # merged, it is as fast as the target alone
        with attached(model, packs, mode="merged"):
            return answer()
    with attached(model, packs, mode="side") as attachment:
        attachment.route(list(range(len(packs))))
        return answer()
