"""Packages of PyPI that store a delta, each used as it is: deltatensors, weightscope and z4ai.

deltatensors 0.2.0 has one lossy form that it recommends (int4: outliers in float16, the rest in
four bits), and it reads and writes folders. weightscope 0.4.3 stores changed words and their
indices; its threshold is set to 0, so that the patch is exact. z4ai 0.2.0 codes the XOR of two byte
strings. Each is imported when it is used: the other baselines need none of them.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from baselines.lossless import all_bytes, restored
from baselines.problem import Pair, Problem


class DeltaTensors:
    """The form that the package recommends, at its own settings. It has one size."""

    name = "deltatensors"
    seeded = own = False

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the package's file."""
        import deltatensors

        pair = problem.pair
        deltatensors.save_delta_from_paths(
            str(file), str(pair.tuned_path), str(pair.target_path), strategy="int4", use_gpu=False
        )
        return None

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """The package's tensors in the target's dtype."""
        import deltatensors

        state = deltatensors.load_delta_from_paths(str(file), str(pair.target_path))
        before = pair.side.before
        return {n: torch.as_tensor(state[n]).to(t.dtype) for n, t in before.items()}


class WeightScope:
    """Changed words and where they are."""

    name = "weightscope"
    seeded = own = False

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the package's patch."""
        import weightscope

        pair = problem.pair
        weightscope.export_patch(
            str(pair.target_path), str(pair.tuned_path), out_path=file, threshold=0.0
        )
        return None

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """Tuned's tensors."""
        import weightscope

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.safetensors"
            weightscope.apply_patch(patch_path=file, base=str(pair.target_path), out_path=out)
            return load_file(out)


class Z4ai:
    """The package's delta mode on all tensors at once."""

    name = "z4ai"
    seeded = own = False

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the package's delta."""
        import z4ai

        pair = problem.pair
        before, after = (all_bytes(pair, tensors) for tensors in (pair.side.before, pair.after))
        file.write_bytes(bytes(z4ai.compress_delta(after, before, dtype="bf16", threads=1)))
        return None

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """Tuned's tensors."""
        import z4ai

        before = all_bytes(pair, pair.side.before)
        after = bytes(z4ai.decompress_delta(file.read_bytes(), before))
        return restored(pair, np.frombuffer(after, np.uint16) ^ np.frombuffer(before, np.uint16))
