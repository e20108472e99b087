"""Packs added to a target for good: an ordinary checkpoint comes out.

    θ = θ_target + Σ_i w_i δ_i        (GraftLLM eq. 10 and 11, with weights)

One pack of weight 1 is decoded as it is, so that a lossless pack gives the tuned bytes back.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from graftkit.delta import Checkpoint
from graftkit.errors import ConfigError, OutputError, PackMismatchError
from graftkit.sharded import write_checkpoint
from graftkit.skillpack import SkillPack
from graftkit.threads import in_threads

Progress = Callable[[str, int, int], None]


def merge_packs(
    target: str | Path | Checkpoint,
    packs: str | Path | SkillPack | Sequence[str | Path | SkillPack],
    output_dir: str | Path,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write target + Σ weight · delta as a Hugging Face directory.

    Args:
        target: the target of all packs. packs: one or more.
        output_dir: a new or empty folder; it appears whole or not at all.
        weights: one per pack, default 1 each.
    Returns: output_dir.
    Raises: PackMismatchError when a pack is of another target, or the packs cannot be added;
        ConfigError for wrong weights; OutputError; nothing is written in any of these cases.
    """
    checkpoint = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
    several = packs if isinstance(packs, (list, tuple)) else [packs]
    opened = [p if isinstance(p, SkillPack) else SkillPack.load(p) for p in several]  # type: ignore[arg-type]
    merge = _Merge(checkpoint, opened, _checked_weights(weights, len(opened)))
    for pack in opened:
        where = str(checkpoint.path)
        pack.check_target(checkpoint.read, set(checkpoint.tensors), where)
    output = Path(output_dir)
    written = _fresh_sibling(output)
    try:
        merge.write(written, progress or (lambda step, done, total: None))
        if output.is_dir():
            output.rmdir()
        written.rename(output)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return output


class _Merge:
    """The tensors and files of the result, one at a time."""

    def __init__(self, target: Checkpoint, packs: list[SkillPack], weights: list[float]):
        self.target, self.packs, self.weights = target, packs, weights
        self.alone = len(packs) == 1 and weights[0] == 1.0
        names = {record.name for pack in packs for record in pack.manifest.tensors}
        self.names = sorted(names)
        if not self.alone:
            self._check_addable()

    def write(self, folder: Path, progress: Progress) -> None:
        """Write tensors in shards, then the index and the side files."""
        step_done = partial(self._report, progress)
        results = in_threads(self.tensor, self.names)
        files = self._side_files()
        write_checkpoint(folder, self.names, lambda name: next(results), files, step_done)

    def _report(self, progress: Progress, done: int) -> None:
        progress("merging", done, len(self.names))

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result, in the dtype that the pack (or the target) gives it."""
        if self.alone:
            pack = self.packs[0]
            return pack.rebuild(name, self.target.read)
        result = self.target.read(name)
        total = result.float()
        for pack, weight in zip(self.packs, self.weights, strict=True):
            if pack.record(name).codec != "zero" and weight != 0:
                total.add_(pack.delta(name, result), alpha=weight)
        return total.to(result.dtype) if result.is_floating_point() else result

    def _check_addable(self) -> None:
        for pack in self.packs:
            for record in pack.manifest.tensors:
                if record.tuned_shape is not None or record.base is not None:
                    raise PackMismatchError(
                        f"{record.name}: the pack of {pack.manifest.tuned.name} changes its shape "
                        "or adds it, which cannot be weighted or summed; merge it alone"
                    )

    def _side_files(self) -> dict[str, bytes]:
        files = self.target.side_files()
        return files | self.packs[0].side_files(self.target) if len(self.packs) == 1 else files


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ConfigError("no packs to merge; name at least one")
    result = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(result) != count:
        raise ConfigError(f"{len(result)} weights for {count} packs; give one weight per pack")
    if not all(weight == weight and abs(weight) != float("inf") for weight in result):
        raise ConfigError(f"weights {result} are not finite; give plain numbers")
    return result


def _fresh_sibling(output: Path) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not an empty folder; choose another name")
    partial = output.with_name(f".{output.name}.merging")
    shutil.rmtree(partial, ignore_errors=True)
    return partial
