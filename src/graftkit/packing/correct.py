"""Code training of a pack that is coded already; what comes out has room in the file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from graftkit.delta import Checkpoint
from graftkit.packing.job import WorkFolder
from graftkit.packing.train import Plan, train_codes
from graftkit.rows import Row
from graftkit.sharded import write_checkpoint
from graftkit.skillpack import SkillPack

_RESULT = "trained.json"


def correct_codes(
    pack: SkillPack,
    modules: Mapping[str, str],
    states: tuple[Checkpoint, Checkpoint],
    rows: Sequence[Row],
    plan: Plan,
    work: WorkFolder,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Train the factors of `modules` against the tuned model.

    Args:
        pack: everything coded. modules: live module by the name of its weight.
        states: target and tuned.
        work: where the payloads are kept, and found by a resumed job.
    Returns: the payload's file in `work` by tensor name; nothing where training does not pay on
        rows not trained on.
    """
    known: dict[str, str] | None = work.read_json(_RESULT)
    if known is None:
        folder = work.path / "packed"
        work.remove_folder("packed")
        _write_packed(pack, set(modules), states, folder)
        result = train_codes(
            Checkpoint.open(folder),
            states[1],
            {module: pack.coded_factors(name) for name, module in modules.items()},
            rows,
            plan,
            work,
            progress,
        )
        work.remove_folder("packed")
        known = {}
        for i, (name, module) in enumerate(modules.items()):
            if module in result.payloads:
                known[name] = f"trained-{i}.bin"
                work.write(known[name], result.payloads[module])
        work.write_json(_RESULT, known)
    return known


def _write_packed(
    pack: SkillPack, apart: set[str], states: tuple[Checkpoint, Checkpoint], folder: Path
) -> None:
    """The packed model as a checkpoint, but for the deltas of `apart`."""
    target, tuned = states

    def tensor(name: str) -> torch.Tensor:
        return target.read(name) if name in apart else pack.rebuild(name, target.read)

    names = [record.name for record in pack.manifest.tensors]
    write_checkpoint(folder, names, tensor, tuned.side_files(), lambda done: None)
