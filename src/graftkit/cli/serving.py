"""`graftkit serve`: the OpenAI API over one target and its packs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli import show

if TYPE_CHECKING:
    from graftkit.checkpoint import Checkpoint
    from graftkit.skillpack import SkillPack

API_KEY, ADMIN_KEY = "GRAFTKIT_API_KEY", "GRAFTKIT_ADMIN_KEY"

app = typer.Typer()


@app.command()
def serve(
    target: Annotated[
        str | None, typer.Argument(help="Target: a Hugging Face directory or Hub id[@rev].")
    ] = None,
    packs: Annotated[
        list[str] | None, typer.Option("--pack", help="NAME=FILE, once per pack.")
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="A library's folder, in place of TARGET and --pack.")
    ] = None,
    pack_folder: Annotated[
        Path | None, typer.Option(help="The one folder that packs may be loaded from by request.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option(help="Most answers at a time.", min=1)] = 16,
    queue: Annotated[int, typer.Option(help="Most answers that wait.", min=1)] = 256,
) -> None:
    """Serve the target and its packs by the OpenAI API, each request with its own pack.

    The keys are read from GRAFTKIT_API_KEY, for every route, and GRAFTKIT_ADMIN_KEY, to load and
    unload packs.
    """
    from graftkit.errors import ConfigError
    from graftkit.models.loading import load_model
    from graftkit.models.text import usable_tokenizer
    from graftkit.serve.answering import AnswerLimits
    from graftkit.serve.engine import Engine
    from graftkit.serve.guard import GuardSettings
    from graftkit.serve.models import ServedModels

    try:
        from graftkit.serve.server import PackServer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; install graftkit[serve] to serve"
        ) from error
    checkpoint, loaded = _read_packs(target, packs or [], library)
    engine = Engine(
        load_model(checkpoint), usable_tokenizer(checkpoint), checkpoint, slots=slots, queue=queue
    )
    with engine:
        models = ServedModels(engine, checkpoint.path.name, pack_folder)
        for name, pack in loaded.items():
            models.load(name, pack)
        keys = GuardSettings(os.environ.get(API_KEY) or None, os.environ.get(ADMIN_KEY) or None)
        server = PackServer(models, keys, AnswerLimits(), host, port)
        names = ", ".join([models.target_name, *loaded, "auto"])
        show.line(f"http://{host}:{port}/v1 serves {names}")
        server.run()


def _read_packs(
    target: str | None, packs: list[str], library: Path | None
) -> tuple["Checkpoint", dict[str, "SkillPack"]]:
    """The target and its packs by name. Raises: ConfigError for other options than these."""
    from graftkit.checkpoint import Checkpoint
    from graftkit.errors import ConfigError
    from graftkit.library import Library
    from graftkit.skillpack import SkillPack

    if library is not None and target is None and not packs:
        own = Library.open(library)
        return own.checkpoint(), {name: own.load(name) for name in own.index.newest}
    if target is None or library is not None:
        raise ConfigError("name a target, with or without packs, or a library")
    named: dict[str, SkillPack] = {}
    for text in packs:
        name, is_named, file = text.partition("=")
        if not is_named or name in named:
            raise ConfigError(f"--pack {text}: expected NAME=FILE, each name once")
        named[name] = SkillPack.load(Path(file))
    return Checkpoint.open(target), named
