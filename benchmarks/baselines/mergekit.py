"""LoRA extraction by mergekit: its own command, in its own process and its own environment.

mergekit (LGPL-3.0) is run as it is and nothing of it is imported or copied. The adapter file that
it writes is the file that counts; the rank is the largest whose file fits the budget.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from baselines.problem import Pair, Problem
from baselines.protocol import UnreachableError

VERSION = "mergekit==0.1.5"
OPTIONS = {
    # A tied head would be stored a second time.
    "linears and norms": ("-e", "embed_tokens", "-e", "lm_head"),
    "embedding too": ("--embed-lora", "-e", "lm_head"),
}
_PREFIX = "base_model.model."


class MergekitLora:
    """Both ways to treat the embedding are tried; the calibration rows choose."""

    name = "mergekit-lora"
    seeded = False
    own = False

    def __init__(self, environment: Path):
        self.environment = environment

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the adapter. Raises: UnreachableError."""
        pair, best = problem.pair, None
        room = budget_bytes or 0
        for option in OPTIONS:
            content, rank = self._largest(pair, option, room)
            if content is None:
                continue
            file.write_bytes(content)
            score = problem.score(self.unpack(pair, file))
            if best is None or score < best[0]:
                best = score, content, {"option": option, "rank": rank}
        if best is None:
            raise UnreachableError(f"an adapter of rank 1 is larger than {room:,} bytes")
        file.write_bytes(best[1])
        return best[2]

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """W + B A in float32, then the target's dtype; alpha equals the rank."""
        before = pair.side.before
        adapter = {k.removeprefix(_PREFIX): v for k, v in load_file(file).items()}
        state = {name: tensor for name, tensor in adapter.items() if name in before}
        for name, left in adapter.items():
            if name.endswith(".lora_B.weight"):
                weight = name.replace(".lora_B.weight", ".weight")
                delta = left.float() @ adapter[name.replace("lora_B", "lora_A")].float()
            elif name.endswith(".lora_embedding_B"):
                weight = name.replace(".lora_embedding_B", ".weight")
                right = adapter[name.replace("embedding_B", "embedding_A")]
                delta = (left.float() @ right.float()).T
            else:
                continue
            state[weight] = (before[weight].float() + delta).to(before[weight].dtype)
        return state

    def _largest(self, pair: Pair, option: str, room: int) -> tuple[bytes | None, int]:
        """The adapter of the largest rank that fits. Sizes are a line in the rank."""
        small, large = (len(self._extract(pair, option, rank)) for rank in (1, 2))
        rank = 1 + (room - small) // (large - small)
        while rank >= 1:
            content = self._extract(pair, option, rank)
            if len(content) <= room:
                return content, rank
            rank -= 1
        return None, 0

    def _extract(self, pair: Pair, option: str, rank: int) -> bytes:
        key = ("mergekit", option, rank)
        if key not in pair.kept:
            with tempfile.TemporaryDirectory() as folder:
                pair.kept[key] = self._run(pair, OPTIONS[option], rank, Path(folder))
        content: bytes = pair.kept[key]
        return content

    def _run(self, pair: Pair, options: tuple[str, ...], rank: int, folder: Path) -> bytes:
        command = [str(self._command()), "--model", str(pair.tuned_path.resolve())]
        command += ["--base-model", str(pair.target_path.resolve()), "--out-path", str(folder)]
        command += ["--max-rank", str(rank), "--quiet", *options]
        # Behind the adapter it writes a model card, for which it asks the Hub; offline it fails
        # there, with the adapter complete.
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **quiet}, check=False
        )
        adapter = folder / "adapter_model.safetensors"
        if not adapter.is_file():
            raise RuntimeError(f"mergekit wrote no adapter: {run.stderr.strip()[-400:]}")
        return adapter.read_bytes()

    def _command(self) -> Path:
        """mergekit's command, installed on first use."""
        command = self.environment / "bin" / "mergekit-extract-lora"
        if not command.is_file():
            pip = [str(self.environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            torch_version = re.sub(r"\+.*", "", torch.__version__)
            subprocess.run([sys.executable, "-m", "venv", str(self.environment)], check=True)
            # torch first and as here, so that mergekit does not pull in another build of it.
            subprocess.run([*pip, f"torch=={torch_version}"], check=True)
            subprocess.run([*pip, VERSION], check=True)
        return command
