"""Scale distillation of a pack that is coded already: which multipliers its factors get.

The multipliers have room in the payloads from the start, so that the file keeps its size.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from graftkit.compress.coded import Multipliers
from graftkit.delta import Checkpoint
from graftkit.packing.job import WorkFolder
from graftkit.packing.rescale import Factors, distill_scales
from graftkit.rows import Row
from graftkit.sharded import write_checkpoint
from graftkit.skillpack import SkillPack

_RESULT = "multipliers.json"


def correct_scales(
    pack: SkillPack,
    modules: Mapping[str, str],
    states: tuple[Checkpoint, Checkpoint],
    training: tuple[Sequence[Row], int, int, bool],
    work: WorkFolder,
    progress: Callable[[int, int], None],
) -> dict[str, Multipliers]:
    """Train the multipliers of the factors of `modules` against the tuned model.

    Args:
        pack: everything coded. modules: live module by the name of its weight.
        states: target and tuned. training: rows, seed, steps, and
            whether outputs and inputs have multipliers.
        work: where the result is kept, and found by a resumed job.
    Returns: multipliers by tensor name, none where they do not pay on rows not trained on.
    """
    known = work.read_json(_RESULT)
    if known is None:
        folder = work.path / "packed"
        work.remove_folder("packed")
        _write_packed(pack, set(modules), states, folder)
        factors = []
        for name, module in modules.items():
            found = pack.factors(name)
            if found is not None and found[1].shape[0]:
                factors.append(Factors(module, *found))
        result = distill_scales(Checkpoint.open(folder), states[1], factors, *training, progress)
        work.remove_folder("packed")
        known = {}
        if result.kl_after < result.kl_before:
            known = {
                name: [
                    part[module].tolist() for part in (result.component, result.row, result.column)
                ]
                for name, module in modules.items()
                if module in result.component
            }
        work.write_json(_RESULT, known)
    return {
        name: Multipliers(*(torch.tensor(part) for part in parts)) for name, parts in known.items()
    }


def _write_packed(
    pack: SkillPack, apart: set[str], states: tuple[Checkpoint, Checkpoint], folder: Path
) -> None:
    """The packed model as a checkpoint, but for the deltas of `apart`."""
    target, tuned = states

    def tensor(name: str) -> torch.Tensor:
        return target.read(name) if name in apart else pack.rebuild(name, target.read)

    names = [record.name for record in pack.manifest.tensors]
    write_checkpoint(folder, names, tensor, tuned.side_files(), lambda done: None)
