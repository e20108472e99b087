"""What a network costs: parameters, multiply-accumulates, and milliseconds by the clock."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graftkit.vision.donor import Donor

_WARM_UP = 3  # runs before the clock starts: memory is allocated, kernels are chosen


@dataclass(frozen=True)
class Cost:
    """Parameters (values that training changes) and multiply-accumulates of one image."""

    parameters: int
    macs: int


def layer_costs(donor: Donor) -> tuple[Cost, ...]:
    """The cost of each layer of a donor alone, for one image at its size."""
    x = donor.normalization.apply(torch.zeros(1, 3, donor.size, donor.size))
    costs = []
    for layer in donor.layers:
        cost, x = _run_counted(layer, x)
        costs.append(cost)
    return tuple(costs)


def module_cost(module: nn.Module, size: int) -> Cost:
    """The cost of a module for one image (1, 3, size, size), as it is in eval mode.

    Counted are convolutions, matrix products and attention, as torch's flop counter does it, and
    one multiplication with one addition is one. Normalization, activation and pooling are free.
    """
    return _run_counted(module, torch.zeros(1, 3, size, size))[0]


def median_ms(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 95th percentile of the time `run` takes, in milliseconds."""
    for _ in range(_WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    p50, p95 = np.percentile(times, [50, 95])
    return float(p50), float(p95)


@torch.no_grad()
def _run_counted(module: nn.Module, x: Tensor) -> tuple[Cost, Tensor]:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # A copy: eval mode is set part by part, and could not be taken back as it was.
    counted = copy.deepcopy(module).cpu().eval()
    # The counter does not know attention's fused kernel for the processor.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output: Tensor = counted(x)
    return Cost(parameters, counter.get_total_flops() // 2), output
