"""The demo: three skills of one tiny target are packed, measured, attached and mixed, offline.

story  the files that a run reads and writes, its results, and what is printed
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftkit.attachment import attached
from graftkit.checkpoint import fingerprint, tensor_digest
from graftkit.demo.story import (
    SKILLS,
    DemoFolder,
    DemoResult,
    DemoSkill,
    MixedAnswer,
    SkillResult,
    Story,
    budgets_line,
    explore_commands,
)
from graftkit.errors import GraftError
from graftkit.evaluate import SLACK_TOKENS, exact_match
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.models.text import generate_greedy, pad_id
from graftkit.outputs import own_folder
from graftkit.pack import pack_delta
from graftkit.progress import Progress, silent
from graftkit.rows import Row, encode_prompt, read_rows
from graftkit.skillpack import SkillPack

__all__ = ["DemoResult", "MixedAnswer", "SkillResult", "run_demo"]


def run_demo(
    out: str | Path,
    *,
    console: Console | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Pack three skills of a built-in model, measure them, and leave everything in `out`.

    Offline; about a minute of one core. A later run replaces the demo's own files.

    Args:
        out: folder for checkpoints, packs, rows and demo.json: new, empty, or made by an earlier
            run.
        console: where the story is printed; default standard output.
        progress: called with (step, done, total).
    Raises: OutputError; GraftError when a checkpoint is not rebuilt exactly, or detaching leaves
        other bytes behind.
    """
    report = progress or silent
    with own_folder(out, "demo"):
        folder, story = DemoFolder(Path(out)), Story(console or Console())
        rebuild_models(folder, story, report)
        pack_skills(folder, story, report)
        target = MeasuredTarget(folder, story, report)
        results = target.measure()
        mixed = target.mix()
        result = DemoResult(results, mixed, bytes_restored=True, commands=_commands(folder))
        folder.write_json(json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n")
        story.explore(result, folder)
    return result


def rebuild_models(folder: DemoFolder, story: Story, report: Progress) -> None:
    """Write target and tuned checkpoints as ordinary directories."""
    story.step(
        "Rebuild three tuned models",
        "Each comes as a lossless pack, about 60% of a checkpoint's bytes. Merged into the "
        "target, every tensor has the digest of the original.",
    )
    folder.fill()
    for done, skill in enumerate(SKILLS):
        report("rebuilding", done, len(SKILLS))
        folder.rebuild(skill)
        story.say(f"   {folder.tuned(skill)}: {skill.title}, exact", wrap=False)
    report("rebuilding", len(SKILLS), len(SKILLS))


def pack_skills(folder: DemoFolder, story: Story, report: Progress) -> None:
    """Write one small pack for each skill, under its budget."""
    story.step("Pack what each of them learned", budgets_line())
    for skill in SKILLS:
        pack = pack_delta(
            folder.target,
            folder.tuned(skill),
            budget=skill.budget,
            calibration=folder.calibration_rows(skill),
            progress=_prefixed(report, skill),
        )
        file = folder.pack(skill)
        pack.save(file)
        story.say(f"   {file}: {file.stat().st_size:,} bytes", wrap=False)


class CheckedTarget:
    """A live target, to which packs are attached; its bytes are checked after every detach."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.model: Any = load_model(folder, dtype)
        self.tokenizer: Any = load_tokenizer(folder)
        self.digest = _live_digest(self.model)

    def check_restored(self, after: str) -> None:
        """Raises: GraftError where a byte is another than before."""
        actual = _live_digest(self.model)
        if actual != self.digest:
            raise GraftError(
                f"after {after} the target has digest {actual[:16]} instead of {self.digest[:16]}; "
                "detaching should restore every byte, so report this with your versions"
            )


class MeasuredTarget(CheckedTarget):
    """The target of the demo, on which every pack is measured."""

    def __init__(self, folder: DemoFolder, story: Story, report: Progress):
        # float32, as in `compare`: the rounding of activations is no part of the comparison.
        super().__init__(folder.target, torch.float32)
        self.folder, self.story, self.report = folder, story, report

    def measure(self) -> tuple[SkillResult, ...]:
        """Exact match of target, tuned and target + pack; the target's bytes after detaching."""
        self.story.step(
            "Measure, attach, measure, detach",
            "Each pack is attached to the same live target, and detached again.",
        )
        results = tuple(self._measure(skill) for skill in SKILLS)
        self.story.table(results, len(self._test_rows(SKILLS[0])))
        self.story.say(
            f"BLAKE3 of all parameters before and after {len(SKILLS)} packs: "
            f"{self.digest[:16]}, the same bytes."
        )
        return results

    def mix(self) -> tuple[MixedAnswer, ...]:
        """One batch, every row with its own pack."""
        self.story.step(
            "Three skills in one batch",
            "All packs beside the target at once: in one generate call, each row uses its own.",
        )
        rows = [read_rows(self.folder.test_rows(skill))[skill.shown] for skill in SKILLS]
        packs = [SkillPack.load(self.folder.pack(skill)) for skill in SKILLS]
        with attached(self.model, packs, mode="side") as attachment:
            attachment.route([None] * len(rows))
            before = self._answers(rows)
            attachment.route(range(len(rows)))
            after = self._answers(rows)
        self.check_restored("the mixed batch")
        answers = tuple(
            MixedAnswer(skill.name, row.prompt, row.completion.strip(), plain, packed)
            for skill, row, plain, packed in zip(SKILLS, rows, before, after, strict=True)
        )
        self.story.mixed(answers)
        self.story.say(f"Detached: {self.digest[:16]} again.")
        return answers

    def _measure(self, skill: DemoSkill) -> SkillResult:
        target = self._score(self.model, skill, "target")
        tuned_folder, file = self.folder.tuned(skill), self.folder.pack(skill)
        tuned = self._score(load_model(tuned_folder, torch.float32), skill, "tuned")
        with attached(self.model, SkillPack.load(file)):
            packed = self._score(self.model, skill, "target + pack")
        self.check_restored(skill.name)
        if tuned <= target:
            raise GraftError(
                f"{skill.name}: tuned answers {tuned:.3f} of the rows and the target {target:.3f}; "
                "the demo expects a skill that was learned, so report this with your versions"
            )
        return SkillResult(
            skill=skill.name,
            target=target,
            tuned=tuned,
            packed=packed,
            recovered=(packed - target) / (tuned - target),
            budget=skill.budget,
            tuned_bytes=(tuned_folder / "model.safetensors").stat().st_size,
            pack_bytes=file.stat().st_size,
        )

    def _score(self, model: Any, skill: DemoSkill, which: str) -> float:
        report = _prefixed(self.report, skill)
        rows = self._test_rows(skill)
        return exact_match(
            model,
            self.tokenizer,
            rows,
            lambda done, total: report(f"measuring {which}", done, total),
        )

    def _test_rows(self, skill: DemoSkill) -> Sequence[Row]:
        return read_rows(self.folder.test_rows(skill))

    def _answers(self, rows: Sequence[Row]) -> list[str]:
        """Greedy answers to all prompts, generated as one batch."""
        longest = max(len(self.tokenizer.encode(row.completion)) for row in rows)
        output = generate_greedy(
            self.model,
            [encode_prompt(self.tokenizer, row) for row in rows],
            longest + SLACK_TOKENS,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=pad_id(self.tokenizer),
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _commands(folder: DemoFolder) -> tuple[str, ...]:
    """How to go on, with the first skill."""
    row = read_rows(folder.test_rows(SKILLS[0]))[SKILLS[0].shown]
    return explore_commands(folder, SKILLS[0], row)


def _prefixed(report: Progress, skill: DemoSkill) -> Progress:
    return lambda step, done, total: report(f"{skill.name}: {step}", done, total)


def _live_digest(model: Any) -> str:
    """One digest over the bytes of all parameters of a live model."""
    return fingerprint(
        (name, str(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor))
        for name, tensor in model.named_parameters()
    )
