"""Where the time goes inside packing and inside decoding, for speed_child.py.

Seconds are processor time of the thread that does the work, so that other load counts little.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.compress import codecs, coded
from graftkit.packing import encode, measure
from graftkit.skillpack import SkillPack

REPEATS = 3


class Parts:
    """Processor seconds spent inside some functions of the package, over all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._watch(measure, "eigenbasis", "spectra")
        self._watch(coded, "encode_codes", "entropy coding")
        self._watch(encode, "_lost_energies", "decoding for the error")
        self._watch(encode, "encode_matrix", "coding in all")

    def _watch(self, module: ModuleType, name: str, part: str) -> None:
        original: Callable[..., Any] = getattr(module, name)
        self.seconds[part] = 0.0

        def timed(*given: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return original(*given, **named)
            finally:
                self.seconds[part] += time.thread_time() - start

        setattr(module, name, timed)


def use_full_svd() -> None:
    """Make packing take a full singular value decomposition of every delta."""

    def full_svd(delta: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
        if covariance is not None:
            raise ValueError("the full decomposition is measured data-free only")
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        if delta.shape[0] <= delta.shape[1]:
            return values.square(), left
        return values.square(), right.T / values.clamp(min=1e-6 * float(values[0]))

    measure.eigenbasis = full_svd


def decode_stages(pack: SkillPack, target: Checkpoint) -> dict[str, float]:
    """Rates of each stage of decoding all factors of a pack on one core, and the machine's own."""
    torch.set_num_threads(1)
    total = dict.fromkeys(("entropy", "product", "add", "matmul", "copy"), 0.0)
    symbols = operations = moved = copied = 0
    for record in pack.manifest.tensors:
        if record.codec != "lowrank" or record.layout != "matrix":
            continue
        weight = target.read(record.name)
        payload, shape = pack.payload(record.name), (weight.shape[0], weight[0].numel())
        start = time.thread_time()
        left, right = codecs.decode_factors(payload, shape)
        total["entropy"] += time.thread_time() - start
        symbols += left.numel() + right.numel()
        operations += 2 * left.numel() * shape[1]
        product, add = _sum_blocks(left, right, weight)
        total["product"] += product
        total["add"] += add
        moved += weight.numel() * (4 + 2 * weight.itemsize)
        total["matmul"] += _plain_matmul(left, right)
        total["copy"] += _fastest(weight.clone)
        copied += 2 * weight.nbytes
    seconds = {f"{name}_seconds": value for name, value in total.items()}
    return seconds | {
        "symbols": symbols,
        "entropy_msymbols": symbols / total["entropy"] / 1e6,
        "product_gflops": operations / total["product"] / 1e9,
        "matmul_gflops": operations / total["matmul"] / 1e9,
        "add_gbytes": moved / total["add"] / 1e9,
        "copy_gbytes": copied / total["copy"] / 1e9,
    }


def _sum_blocks(left: Tensor, right: Tensor, weight: Tensor) -> tuple[float, float]:
    """Seconds of the product and of the sums, in the blocks of `codecs.add_delta`."""
    product = add = 0.0
    result = torch.empty_like(weight)
    for block in codecs.row_blocks((weight.shape[0], right.shape[1])):
        start = time.thread_time()
        part = left[block] @ right
        middle = time.thread_time()
        result[block] = part.add_(weight[block])
        product += middle - start
        add += time.thread_time() - middle
    return product, add


def _plain_matmul(left: Tensor, right: Tensor) -> float:
    """Seconds of the product of contiguous factors into memory that is there already."""
    rows = min(left.shape[0], 8192)  # the limit of an embedding's is that of a part of it
    made, part = torch.zeros(rows, right.shape[1]), left[:rows].contiguous()
    return _fastest(lambda: torch.mm(part, right, out=made)) * left.shape[0] / rows


def _fastest(work: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)
