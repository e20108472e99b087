"""graftkit's own recipes as rows of the frontier, and graftllm given our embedding codec."""

import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from baselines.coded_embedding import decode_best, encode_best
from baselines.problem import Pair, Problem
from baselines.protocol import EMBEDDING_SHARES, UnreachableError
from graftkit.errors import BudgetError
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class GraftkitPack:
    """One recipe of `pack_delta`; with or without rows, or with many; steps: of code training."""

    name: str
    recipe: str
    rows: bool = False
    servable: bool = False
    many: bool = False
    steps: int | None = None

    own = True

    @property
    def seeded(self) -> bool:
        """Only rows are drawn."""
        return self.rows

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the pack. Raises: UnreachableError."""
        rows = problem.rows_file if self.rows else None
        if rows is not None and self.many:
            rows = many_rows(rows)
        pair = problem.pair
        options: dict[str, Any] = {"recipe": self.recipe, "servable": self.servable}
        if self.steps is not None:
            options["train_steps"] = self.steps
        pack = _packed(pair.target_path, pair.tuned_path, budget_bytes, rows, problem, options)
        pack.save(file)
        return None

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """Every tensor as the pack knows it."""
        return _decoded(SkillPack.load(file), pair)


class GraftllmEmbedding:
    """recipe graftllm for the matrices, the embedding by the codec that `auto` has for it.

    The pack is made for a target that has tuned's embedding already, so that no byte of it goes
    there and the activations are still tuned's; the embedding's payload stands behind it.
    """

    name = "graftllm+embedding"
    seeded = True
    own = True

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """The share of the embedding is chosen without rows, then packed with them."""
        pair, room = problem.pair, (budget_bytes or 0) - _LENGTH.size
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / pair.target_path.name
            _with_embedding(pair, target)
            scores = {}
            for share in EMBEDDING_SHARES:
                try:
                    content = self._content(problem, target, room, share, None)
                except UnreachableError as error:
                    reason = error
                    continue
                file.write_bytes(content)
                scores[share] = problem.score(self.unpack(pair, file))
            if not scores:
                raise reason
            share = min(scores, key=lambda s: scores[s])
            file.write_bytes(self._content(problem, target, room, share, problem.rows_file))
        return {"embedding_share": share}

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """The pack's tensors, and the embedding from what stands behind the pack."""
        content = file.read_bytes()
        (length,) = _LENGTH.unpack_from(content)
        body = _LENGTH.size + length
        inner = file.with_suffix(".inner")
        inner.write_bytes(content[_LENGTH.size : body])
        state = _decoded(SkillPack.load(inner), pair)
        name = pair.side.embedding
        if name is not None:
            state[name] = decode_best(content[body:], pair.side.before[name])
        return state

    def _content(
        self, problem: Problem, target: Path, room: int, share: float, rows: Path | None
    ) -> bytes:
        embedding = _embedding(problem.pair, int(share * room))
        left, tuned = room - len(embedding), problem.pair.tuned_path
        pack = _packed(target, tuned, left, rows, problem, {"recipe": "graftllm"})
        file = target.parent / "inner.skillpack"
        pack.save(file)
        inner = file.read_bytes()
        return _LENGTH.pack(len(inner)) + inner + embedding


def many_rows(file: Path) -> Path:
    """Where a larger draw of rows lies, beside the rows of a problem."""
    return file.with_suffix(".many.jsonl")


def _embedding(pair: Pair, budget_bytes: int) -> bytes:
    """Made once for each budget."""
    name = pair.side.embedding
    if name is None or budget_bytes <= 1:
        return b""
    key = ("graftllm+embedding", budget_bytes)
    if key not in pair.kept:
        pair.kept[key] = encode_best(pair.side.before[name], pair.after[name], budget_bytes)
    payload: bytes = pair.kept[key]
    return payload


def _packed(
    target: Path,
    tuned: Path,
    budget: int | None,
    rows: Path | None,
    problem: Problem,
    options: dict[str, Any],
) -> SkillPack:
    try:
        return pack_delta(
            target,
            tuned,
            budget=None if budget is None else f"{budget}B",
            calibration=rows,
            seed=problem.seed,
            workers=1,
            **options,
        )
    except BudgetError as error:
        raise UnreachableError(str(error)) from error


def _decoded(pack: SkillPack, pair: Pair) -> dict[str, Tensor]:
    return {name: pack.decode(name, tensor) for name, tensor in pair.side.before.items()}


def _with_embedding(pair: Pair, folder: Path) -> None:
    """A copy of the target that has tuned's embedding."""
    folder.mkdir()
    for file in pair.target_path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    tensors = dict(pair.side.before)
    if pair.side.embedding is not None:
        tensors[pair.side.embedding] = pair.after[pair.side.embedding]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
