"""Random work for ten minutes, with kills: is an answer wrong, a file lost, anything left behind?

    python benchmarks/soak.py [--minutes 10] [--seed 0] [--json]

Every operation is drawn from its own seed, which a finding names (`--seed N --operations 1` repeats
it). Commands run in processes of their own, some of them killed before a random change of files,
and two at a time on one output; what they leave has to be what an undisturbed run leaves, after the
same command has run again. Batches whose rows use different packs are compared with the rows one by
one.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from ledger import commit, machine
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny_models import ARCHITECTURES, CAUSAL, inputs, make_pair, perturb, save_tokenizer

from graftkit import Library, SkillPack, attached, pack_delta
from graftkit.errors import GraftError
from graftkit.models.loading import load_model

CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree")
LATEST_CHANGE = 60  # kills come before one of so many changes of files
TUNED = ("one", "two", "three")
TIMEOUT_SECONDS = 180
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["graftkit.cli.packing", "graftkit.cli.fusing", "graftkit.cli.library", "transformers"]
SHARE = 0.02  # largest error of a row, as a share of what its pack changes


class Finding(Exception):
    """Something is wrong; the message says what was seen."""


class Child:
    """A `graftkit` command in a process of its own, forked from one that has computed nothing.

    Args:
        kill_at: the process is killed before its so many-th change of files; None for never.
    """

    def __init__(self, arguments: Sequence[object], kill_at: int | None, place: Path):
        words = [str(argument) for argument in arguments]
        self._process = FORKS.Process(target=_run_command, args=(words, kill_at, place))
        self._process.start()

    def wait(self) -> int:
        """Exit status, negative for a signal. Raises: Finding when it does not end."""
        self._process.join(TIMEOUT_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise Finding(f"a command does not end within {TIMEOUT_SECONDS} s")
        return self._process.exitcode


def _run_command(arguments: list[str], kill_at: int | None, place: Path) -> None:
    from graftkit.__main__ import main

    os.chdir(place)
    torch.set_num_threads(1)
    sys.argv = ["graftkit", *arguments]
    text = io.StringIO()
    if kill_at is not None:
        sys.addaudithook(_killer(kill_at))
    try:
        with redirect_stdout(text), redirect_stderr(text):
            main()
    except Exception:
        traceback.print_exc(file=text)
        raise
    finally:
        with Path("log").open("a") as file:
            file.write(text.getvalue())


def _killer(count: int) -> Callable[[str, tuple[object, ...]], None]:
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int)
        writes = opened and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))  # type: ignore[operator]
        if event in CHANGES or writes:
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def small_llama() -> LlamaForCausalLM:
    """A random model whose matrices are large enough for lossy codecs."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, eos_token_id=2, **sizes))
    perturb(model, seed=0, scale=0.05)
    return model.eval()


@dataclass
class World:
    """A tiny target, its tuned states, and what undisturbed commands make of them."""

    folder: Path
    expected: dict[str, dict[str, bytes]] = field(default_factory=dict)
    pairs: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    def build(self) -> None:
        """Make the models and run every command once, undisturbed."""
        model = small_llama()
        model.save_pretrained(self.folder / "target")
        save_tokenizer(self.folder / "target")
        for seed, name in enumerate(TUNED, start=1):
            tuned = small_llama()
            perturb(tuned, seed=seed, scale=0.05)
            tuned.save_pretrained(self.folder / name)
            save_tokenizer(self.folder / name)
            prompts = "".join(
                json.dumps({"prompt": f"{name} {i} {i * seed}"}) + "\n" for i in range(24)
            )
            (self.folder / f"{name}.jsonl").write_text(prompts)
        for name in TUNED:
            self.reference(f"pack {name}", self.pack(name, "out.skillpack"))
            shutil.copy(self.folder / f"pack {name}" / "out.skillpack", self.pack_file(name))
            self.reference(f"merge {name}", self.merge(name, "out"))
            self.reference(f"fuse {name}", self.fuse(name, "out.skillpack"))

    def reference(self, key: str, arguments: Sequence[object]) -> None:
        """Run a command undisturbed in a folder of its own, and keep what it leaves."""
        place = self.folder / key
        place.mkdir()
        run_all(place, [(arguments, None)], [0])
        self.expected[key] = contents(place)

    def pack_file(self, name: str) -> Path:
        """An undisturbed pack."""
        return self.folder / f"{name}.skillpack"

    def pack(self, name: str, output: str) -> list[object]:
        """The command that packs a tuned state."""
        states = [self.folder / "target", self.folder / name]
        return ["pack", *states, "-o", output, "--budget", "60%", "--workers", "1"]

    def merge(self, name: str, output: str) -> list[object]:
        """The command that merges a pack."""
        return ["merge", self.folder / "target", self.pack_file(name), "-o", output]

    def fuse(self, name: str, output: str) -> list[object]:
        """The command that fuses a pack with the first one, lossless."""
        packs = [self.pack_file(TUNED[0]), self.pack_file(name)]
        return ["fuse", self.folder / "target", *packs, "--recipe", "lossless", "-o", output]

    def pair(self, architecture: str) -> tuple[Path, Path]:
        """Target and tuned folder of an architecture."""
        if architecture not in self.pairs:
            place = self.folder / architecture
            self.pairs[architecture] = make_pair(place, architecture, torch.float32)
        return self.pairs[architecture]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the log."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name != "log"}


def run_all(
    place: Path,
    commands: Sequence[tuple[Sequence[object], int | None]],
    allowed: Sequence[int] = (0, 1, -9),
) -> list[int]:
    """Run commands at once in a folder. Raises: Finding for a traceback or another status."""
    children = [Child(arguments, kill_at, place) for arguments, kill_at in commands]
    statuses = [child.wait() for child in children]
    log = (place / "log").read_text() if (place / "log").exists() else ""
    if "Traceback" in log or any(status not in allowed for status in statuses):
        raise Finding(f"exit {statuses} of {commands[0][0][0]}: {log.strip()[-400:]}")
    return statuses


class Soak:
    """One operation after another. counts: what happened, by name."""

    def __init__(self, world: World, scratch: Path):
        self.world, self.scratch = world, scratch
        self.counts: Counter[str] = Counter()

    def run(self, seed: int) -> None:
        """One operation. Raises: Finding."""
        draw = random.Random(seed)
        place = self.scratch / str(seed)
        place.mkdir()
        work = draw.choice(
            (self.output, self.output, self.state, self.library, self.batch, self.batch)
        )
        self.counts[work.__name__] += 1
        work(draw, place)
        shutil.rmtree(place)

    def output(self, draw: random.Random, place: Path) -> None:
        """Commands with one output, killed or two at a time; then the same again, in peace."""
        kind = draw.choice(("pack", "pack", "merge", "fuse"))
        names = draw.sample(TUNED, 2)
        output = "out" if kind == "merge" else "out.skillpack"
        make = getattr(self.world, kind)
        mine = place / "out.skillpack.notes"
        mine.mkdir()
        (mine / "thesis.txt").write_text("mine")
        commands = [
            (make(name, output), draw.randrange(1, LATEST_CHANGE) if draw.random() < 0.6 else None)
            for name in names[: draw.choice((1, 2))]
        ]
        statuses = run_all(place, commands)
        self.counts["kills"] += statuses.count(-9)
        self.counts["refused"] += statuses.count(1)
        if len(statuses) == 2 and statuses.count(1) == 2:
            raise Finding(f"{kind}: both of two runs are refused")
        if not (place / output).exists() or statuses[0] == -9:
            again = run_all(place, [(make(names[0], output), None)], [0, 1])
            self.counts["refused"] += again.count(1)
        own = [self.world.expected[f"{kind} {name}"] for name in names]
        left = {k: v for k, v in contents(place).items() if not k.startswith(mine.name)}
        if (mine / "thesis.txt").read_text() != "mine":
            raise Finding(f"{kind}: a file of somebody else is gone")
        if left not in own:
            strays = sorted(left.keys() - own[0].keys())
            what = f"strays {strays}" if strays else "the output is that of no run"
            raise Finding(f"{kind} {names}, exit {statuses}: {what}")

    def state(self, draw: random.Random, place: Path) -> None:
        """Packs merged in turn with a state, one of the runs killed: as undisturbed afterwards."""
        order = draw.sample(TUNED, 3)
        expected = place / "expected"
        for folder in (expected, place / "killed"):
            folder.mkdir()
        for turn, name in enumerate(order):
            options = ["--method", "opcm", "--state", "state"]
            arguments = [*self.world.merge(name, f"out{turn}"), *options]
            run_all(expected, [(arguments, None)], [0])
            if draw.random() < 0.7:
                [status] = run_all(place / "killed", [(arguments, draw.randrange(1, 40))])
                self.counts["kills"] += status == -9
                if status == 0:
                    continue
            # Killed behind its last step it was done, and the same again finds its own result.
            run_all(place / "killed", [(arguments, None)], [0, 1])
        if contents(place / "killed") != contents(expected):
            names = contents(place / "killed").keys() ^ contents(expected).keys()
            raise Finding(f"state of {order}: other files than undisturbed ({sorted(names)})")

    def library(self, draw: random.Random, place: Path) -> None:
        """Packs come and go by two processes, some of them killed; the index says what is there."""
        library = Library.init(place / "library", self.world.folder / "target")
        for _ in range(3):
            commands: list[tuple[list[object], int | None]] = []
            for name in draw.sample(TUNED, 2):
                there = name in library.index.newest
                file = [self.world.pack_file(name), "--name", name]
                change = ["remove", "library", name] if there else ["add", "library", *file]
                killed = draw.randrange(1, 30) if draw.random() < 0.5 else None
                commands.append((["library", *change], killed))
            before = set(library.index.newest)
            statuses = run_all(place, commands)
            self.counts["kills"] += statuses.count(-9)
            library = Library.open(place / "library")
            for (arguments, _), status in zip(commands, statuses, strict=True):
                name = str(arguments[3] if arguments[1] == "remove" else arguments[-1])
                is_there = name in library.index.newest
                if status == 0 and is_there == (name in before):
                    raise Finding(f"library {arguments[1]} {name}: done, and not to be seen")
                if (
                    is_there
                    and library.load(name).digest
                    != SkillPack.load(self.world.pack_file(name)).digest
                ):
                    raise Finding(f"library: {name} is another pack")
        run_all(place, [(["library", "list", "library"], None)], [0])

    def batch(self, draw: random.Random, place: Path) -> None:
        """Rows of different packs against the rows one by one; the bytes are back afterwards."""
        architecture = draw.choice(tuple(ARCHITECTURES))
        target, tuned = self.world.pair(architecture)
        pack = pack_delta(target, tuned, recipe="lossless", workers=1)
        model, other = load_model(target), load_model(tuned)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batch = inputs(rows=4, length=draw.randrange(3, 9), seed=draw.randrange(1000))
        rows = [draw.choice((None, 0, {0: 0.5})) for _ in range(4)]
        with torch.no_grad():
            plain, learned = model(**batch).logits, other(**batch).logits
            with attached(model, pack, mode="side") as attachment:
                try:
                    attachment.route(rows)
                except GraftError:
                    self.counts["refused"] += 1
                    rows = [0] * 4
                    attachment.route(rows)
                results: list[torch.Tensor] = []
                self._in_threads(attachment, rows, lambda: results.append(model(**batch).logits))
                for row, choice in enumerate(rows):
                    attachment.route([choice])
                    alone = model(**{name: value[row : row + 1] for name, value in batch.items()})
                    self._compare(
                        results, row, alone.logits[0], float((learned - plain).abs().max())
                    )
                if architecture in CAUSAL:
                    self._generate(attachment, model, batch, rows)
        after = model.state_dict()
        if any(not torch.equal(after[name], value) for name, value in before.items()):
            raise Finding(f"{architecture}: the target's bytes are not back")
        self.counts["rows"] += len(rows)

    def _in_threads(self, attachment, rows, work) -> None:  # type: ignore[no-untyped-def]
        """Two threads that route alike and run at once."""

        def run() -> None:
            attachment.route(rows)
            with torch.no_grad():
                work()

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _compare(
        self, results: list[torch.Tensor], row: int, alone: torch.Tensor, effect: float
    ) -> None:
        for actual in results:
            error = float((actual[row] - alone).abs().max())
            if len(results) != 2 or error > SHARE * effect:
                raise Finding(f"row {row} is {error / effect:.0%} of the pack's effect away")

    def _generate(self, attachment, model, batch, rows) -> None:  # type: ignore[no-untyped-def]
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        attachment.route(rows)
        together = model.generate(**batch, **options)
        for row, choice in enumerate(rows):
            attachment.route([choice])
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            said = model.generate(**alone, **options)[0]
            if not torch.equal(together[row, : len(said)], said):
                raise Finding(f"row {row} generates other tokens in a batch than alone")


def main() -> None:
    """Run, and print what was found; exit 1 for any finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--operations", type=int, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first operation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FORKS.set_forkserver_preload(PRELOADED)
    findings: list[str] = []
    started = time.monotonic()
    done = 0
    with TemporaryDirectory(prefix="soak-") as folder:
        world = World(Path(folder))
        world.build()
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        soak = Soak(world, scratch)
        while time.monotonic() - started < 60 * options.minutes and done != options.operations:
            seed = options.seed + done
            try:
                soak.run(seed)
            except Finding as finding:
                findings.append(f"seed {seed}: {finding}")
            except Exception as error:
                findings.append(f"seed {seed}: {type(error).__name__}: {error}")
            with suppress(OSError):
                shutil.rmtree(scratch / str(seed))
            done += 1
    result = {
        "commit": commit(),
        "machine": machine(),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "operations": done,
        "counts": dict(sorted(soak.counts.items())),
        "findings": findings,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        counts = ", ".join(f"{count} {name}" for name, count in result["counts"].items())
        print(f"{done} operations in {result['minutes']} minutes: {counts}")
        print("\n".join(findings) or "nothing wrong, nothing lost, nothing left behind")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
