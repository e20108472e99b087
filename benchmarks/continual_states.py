"""What continual.py trains and merges, each made once and found again on disk.

A state is what a method has after learning skills in an order, named by them: a+b.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from continual_training import tune_adapter, tune_weights

from graftkit.checkpoint import Checkpoint
from graftkit.fuse import merge_packs
from graftkit.fuse.search import search_weights
from graftkit.fuse.sequential import merge_in_turn
from graftkit.models import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.pack import pack_delta
from graftkit.route.centroid import fit_key
from graftkit.rows import Row, read_rows
from graftkit.skillpack import SkillPack

EMBEDDING_SHARES = {"cmudict_g2p": 1.0}  # the others: as the nursery's README says
EMBEDDING_SHARE = 0.03
BUDGET = "5%"

Skills = tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        steps, batch: of every fine-tuning, rows of one step.
        code_steps: of a pack's codes; None packs data-free.
        calibration_rows: training rows that a pack, a router key or an importance is measured on.
        search_rows, search_tries: of every seen skill; mixtures tried.
        test_rows: of every skill.
    """

    steps: int
    batch: int
    code_steps: int | None
    calibration_rows: int
    search_rows: int
    search_tries: int
    test_rows: int


class States:
    """The states of all methods, in folders below `work`."""

    def __init__(self, shared: Path, work: Path, size: Size):
        self.target, self.work, self.size = shared / "nursery" / "target", work, size
        self._data = shared / "data" / "llm"

    def rows(self, skill: str) -> list[Row]:
        """Its training rows, no more than one fine-tuning sees."""
        file = self._data / skill / "train.jsonl"
        return list(read_rows(file)[: self.size.steps * self.size.batch])

    def few_rows(self, skill: str) -> Path:
        """A file of the training rows that packs, keys and importances are measured on."""
        file = self.work / "rows" / f"{skill}.jsonl"
        if not file.exists():
            lines = (self._data / skill / "train.jsonl").read_text(encoding="utf-8").splitlines()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines[: self.size.calibration_rows]) + "\n", encoding="utf-8")
        return file

    def tuned(self, learned: Skills) -> Path:
        """All weights, fine-tuned on one skill after another."""
        start = self.tuned(learned[:-1]) if len(learned) > 1 else self.target
        return self._made("tuned", learned, lambda folder: self._tune(start, learned[-1], folder))

    def joint(self, skills: Skills) -> Path:
        """All weights, fine-tuned on all skills at once, with the steps of all."""
        size = self.size
        rows = [
            row
            for skill in skills
            for row in islice(cycle(self.rows(skill)), size.steps * size.batch)
        ]
        steps = size.steps * len(skills)
        share = max(EMBEDDING_SHARES.get(skill, EMBEDDING_SHARE) for skill in skills)
        return self._made(
            "joint",
            skills,
            lambda folder: tune_weights(self.target, rows, steps, size.batch, share, folder),
        )

    def adapter(self, learned: Skills) -> Path:
        """One LoRA, trained on one skill after another."""
        previous = self.adapter(learned[:-1]) if len(learned) > 1 else None
        size, rows = self.size, self.rows(learned[-1])
        return self._made(
            "adapter",
            learned,
            lambda folder: tune_adapter(
                self.target, previous, rows, size.steps, size.batch, folder
            ),
        )

    def pack_file(self, skill: str) -> Path:
        """The pack of a skill learned alone, with its router key."""
        file = self.work / "packs" / f"{skill}.skillpack"
        if not file.exists():
            few, tuned = self.few_rows(skill), self.tuned((skill,))
            steps = self.size.code_steps
            rows = None if steps is None else few
            pack = pack_delta(
                self.target, tuned, budget=BUDGET, calibration=rows, train_steps=steps
            )
            key = fit_key(*self.live_target, [row.prompt for row in read_rows(few)])
            file.parent.mkdir(parents=True, exist_ok=True)
            key.into(pack).save(file)
        return file

    def merged(self, method: str, settings: dict[str, Any], learned: Skills) -> Path:
        """The packs of these skills, merged by a rule."""
        packs = [self.pack_file(skill) for skill in learned]
        name = "-".join([method, *(f"{key}{value}" for key, value in settings.items())])
        return self._made(
            name,
            learned,
            lambda folder: merge_packs(
                self.target, packs, folder, method=method, settings=settings
            ),
        )

    def searched(self, learned: Skills) -> Path:
        """The packs of these skills, summed with the weights of least loss on their rows."""
        packs = [self.pack_file(skill) for skill in learned]
        rows = [row for s in learned for row in self.rows(s)[: self.size.search_rows]]

        def make(folder: Path) -> None:
            start = [1 / len(packs)] * len(packs)
            actual = search_weights(
                self.target, packs, rows, start, evaluations=self.size.search_tries
            )
            merge_packs(self.target, packs, folder, actual.weights)

        return self._made("searched", learned, make)

    def turn(self, method: str, learned: Skills, *, trained_on: bool = False) -> Path:
        """Packs merged in turn by a rule with a memory: `model` and `state` in one folder.

        Args:
            trained_on: each skill is learned from the merged model before it and enters as a
                lossless pack, as in KIF's paper; else its own 5 % pack enters.
        """
        skill, previous = learned[-1], None
        if len(learned) > 1:
            previous = self.turn(method, learned[:-1], trained_on=trained_on)

        def make(folder: Path) -> None:
            folder.mkdir(parents=True)
            state = folder / "state"
            if previous is not None:
                shutil.copyfile(previous / "state", state)
            rows = [read_rows(self.few_rows(skill))] if method == "kif" else None
            pack = (
                self._lossless(previous, skill, folder / "tuned")
                if trained_on
                else self.pack_file(skill)
            )
            merge_in_turn(self.target, [pack], folder / "model", method, state, rows)

        return self._made(f"{method}-trained" if trained_on else method, learned, make)

    @cached_property
    def live_target(self) -> tuple[Any, Any]:
        """The target in float32 and its tokenizer."""
        checkpoint = Checkpoint.open(self.target)
        return load_model(checkpoint, torch.float32), usable_tokenizer(checkpoint)

    def _tune(self, start: Path, skill: str, folder: Path) -> Path:
        size, share = self.size, EMBEDDING_SHARES.get(skill, EMBEDDING_SHARE)
        return tune_weights(start, self.rows(skill), size.steps, size.batch, share, folder)

    def _lossless(self, previous: Path | None, skill: str, folder: Path) -> SkillPack:
        """What the skill adds to the target when it is learned from a merged model."""
        if previous is None:
            return pack_delta(self.target, self.tuned((skill,)), recipe="lossless")
        tuned = self._tune(previous / "model", skill, folder)
        pack = pack_delta(self.target, tuned, recipe="lossless")
        shutil.rmtree(tuned)
        return pack

    def _made(self, kind: str, skills: Skills, make: Callable[[Path], Any]) -> Path:
        """The folder of a state; made under a name of its own first, so that it is there whole.

        Two processes may make the same state: both are the same, and the first stays.
        """
        folder = self.work / kind / "+".join(skills)
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            make(partial)
            if folder.exists():
                shutil.rmtree(partial)
            else:
                partial.rename(folder)
        return folder
