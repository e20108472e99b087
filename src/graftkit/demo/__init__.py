"""The whole story on embedded data: three skills of one tiny target, packed, measured, attached.

embedded  the target, the tuned models as lossless packs, the rows
folder    what is written below OUT
result    what was found
story     what is printed
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftkit.attachment import attached
from graftkit.checkpoint import fingerprint, tensor_digest
from graftkit.demo.embedded import SKILLS, TRAIN_STEPS, DemoSkill
from graftkit.demo.folder import DemoFolder
from graftkit.demo.result import DemoResult, MixedAnswer, SkillResult
from graftkit.demo.story import Story, budgets_line, explore_commands
from graftkit.errors import GraftError
from graftkit.evaluate import SLACK_TOKENS, exact_match
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.outputs import own_folder
from graftkit.pack import pack_delta
from graftkit.progress import Progress, silent
from graftkit.rows import Row, encode_prompt, pad_batch, read_rows
from graftkit.skillpack import SkillPack

__all__ = ["DemoResult", "MixedAnswer", "SkillResult", "run_demo"]


def run_demo(
    out: str | Path,
    *,
    console: Console | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Pack three skills of an embedded model, measure them, and leave everything in `out`.

    Offline; 20 seconds of one core. A later run replaces the demo's own files.

    Args:
        out: folder for checkpoints, packs, rows and demo.json: a new or empty one, or one that an
            earlier run made.
        console: where the story is printed; default standard output.
        progress: called with (step, done, total).
    Raises: OutputError; GraftError when a promise does not hold: a checkpoint is not rebuilt
        exactly, or detaching leaves other bytes behind.
    """
    with own_folder(out, "demo"):
        demo = _Demo(DemoFolder(Path(out)), Story(console or Console()), progress)
        demo.rebuild()
        demo.pack()
        results = demo.measure()
        mixed = demo.mix()
        result = DemoResult(results, mixed, bytes_restored=True, commands=demo.commands())
        demo.folder.write_json(json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n")
        demo.story.explore(result, demo.folder)
    return result


class _Demo:
    """The steps, in order; each prints what it does."""

    def __init__(self, folder: DemoFolder, story: Story, progress: Progress | None):
        self.folder = folder
        self.story = story
        self.progress = progress or silent

    def rebuild(self) -> None:
        """Target and tuned checkpoints as ordinary directories."""
        self.story.step(
            "Rebuild three tuned models",
            "Each travels as a lossless pack, about 60% of a checkpoint's bytes. Merged into the "
            "target, every tensor has the digest of the original.",
        )
        self.folder.fill()
        for done, skill in enumerate(SKILLS):
            self.progress("rebuilding", done, len(SKILLS))
            self.folder.rebuild(skill)
            self.story.say(f"   {self.folder.tuned(skill)}: {skill.title}, exact", wrap=False)
        self.progress("rebuilding", len(SKILLS), len(SKILLS))

    def pack(self) -> None:
        """One small pack a skill, under a budget."""
        self.story.step("Pack what each of them learned", budgets_line())
        for skill in SKILLS:
            pack = pack_delta(
                self.folder.target,
                self.folder.tuned(skill),
                budget=skill.budget,
                calibration=self.folder.calibration_rows(skill),
                train_steps=TRAIN_STEPS,
                progress=self._prefixed(skill.name),
            )
            file = self.folder.pack(skill)
            pack.save(file)
            self.story.say(f"   {file}: {file.stat().st_size:,} bytes", wrap=False)

    def measure(self) -> tuple[SkillResult, ...]:
        """Exact match of target, tuned and target + pack; the target's bytes after detaching."""
        self.story.step(
            "Measure, attach, measure, detach",
            "Each pack is attached to the same live target, and detached again.",
        )
        # float32, as in `compare`: the rounding of activations is no part of the comparison.
        self.model: Any = load_model(self.folder.target, torch.float32)
        self.tokenizer: Any = load_tokenizer(self.folder.target)
        self.digest = _live_digest(self.model)
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
        self._check_restored("the mixed batch")
        answers = tuple(
            MixedAnswer(skill.name, row.prompt, row.completion.strip(), plain, packed)
            for skill, row, plain, packed in zip(SKILLS, rows, before, after, strict=True)
        )
        self.story.mixed(answers)
        self.story.say(f"Detached: {self.digest[:16]} again.")
        return answers

    def commands(self) -> tuple[str, ...]:
        """How to go on, with the first skill."""
        row = read_rows(self.folder.test_rows(SKILLS[0]))[SKILLS[0].shown]
        return explore_commands(self.folder, SKILLS[0], row)

    def _measure(self, skill: DemoSkill) -> SkillResult:
        target = self._score(self.model, skill, "target")
        tuned_folder, file = self.folder.tuned(skill), self.folder.pack(skill)
        tuned = self._score(load_model(tuned_folder, torch.float32), skill, "tuned")
        with attached(self.model, SkillPack.load(file)):
            packed = self._score(self.model, skill, "target + pack")
        self._check_restored(skill.name)
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
        tell = self._prefixed(skill.name)
        rows = self._test_rows(skill)
        return exact_match(
            model, self.tokenizer, rows, lambda done, total: tell(f"measuring {which}", done, total)
        )

    def _test_rows(self, skill: DemoSkill) -> Sequence[Row]:
        return read_rows(self.folder.test_rows(skill))

    def _check_restored(self, after: str) -> None:
        found = _live_digest(self.model)
        if found != self.digest:
            raise GraftError(
                f"after {after} the target has digest {found[:16]} instead of {self.digest[:16]}; "
                "detaching should restore every byte, so report this with your versions"
            )

    def _answers(self, rows: Sequence[Row]) -> list[str]:
        """Greedy answers to all prompts, generated as one batch."""
        prompts = [encode_prompt(self.tokenizer, row) for row in rows]
        ids, mask = pad_batch(prompts, self.tokenizer.pad_token_id, left=True)
        longest = max(len(self.tokenizer.encode(row.completion)) for row in rows)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=longest + SLACK_TOKENS,
            )
        texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prefixed(self, name: str) -> Progress:
        return lambda step, done, total: self.progress(f"{name}: {step}", done, total)


def _live_digest(model: Any) -> str:
    """One digest over the bytes of all parameters of a live model."""
    return fingerprint(
        (name, str(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor))
        for name, tensor in model.named_parameters()
    )
