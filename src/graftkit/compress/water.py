"""Which codec and how many components at one water level: expected error against expected bytes.

One level c for all tensors is one Lagrange multiplier for the pack: where every coded value is
rounded with the same step in the unit that errors are added in, no byte saves more error in one
tensor than in another (reverse water-filling).
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from graftkit.compress.allocate import MatrixFacts
from graftkit.compress.codecs import Entries, Factored, Hybrid, Precision, Zero
from graftkit.compress.codes import LARGEST_CODE
from graftkit.compress.rates import coding

COMPONENT_BITS = 24.0
"""Scales that a component takes beside its codes."""
MATRIX_BITS = 400.0
"""Header, column steps and ends of streams."""
SERVABLE_SHARE = 0.25
"""Multiply-accumulates that a servable pack may add to those of a matrix."""

UNTRAINED = 2.0
"""How much more an error counts that code training cannot lower afterwards."""
FACTORS_BYTES, FACTORS_ERROR = 0.88, 0.75
"""What coded factors took of a Gaussian's bytes and error on the nursery: their entries have
heavier tails, and the refit of U takes back a part of what V lost."""
_LARGEST = LARGEST_CODE / 4  # code of a typical entry; what is louder has coarser steps


@dataclass(frozen=True)
class Choice:
    """One way to code a tensor, with the bytes and the weighted error to expect."""

    precision: Precision
    nbytes: float
    error: float

    def cost(self, level: float) -> float:
        """Error and bytes in one number, by the multiplier of the level."""
        return self.error + multiplier(level) * 8 * self.nbytes


def multiplier(level: float) -> float:
    """Weighted error that one bit must save at this level: −dD/dR = ln 2 / 6 · c²."""
    return math.log(2) / 6 * level**2


def finest(facts: MatrixFacts) -> float:
    """The lowest level of use to a tensor: the loudest component's codes fill their range."""
    loudest = math.sqrt(facts.weight * float(facts.energies[0]) / facts.count)
    return loudest / math.sqrt(min(facts.shape)) / _LARGEST


def choices(facts: MatrixFacts, level: float, servable: bool = False) -> list[Choice]:
    """Sound choices for one tensor at one level: nothing, and at most one of each codec.

    Args:
        level: c in the weighted unit; the tensor's own step is c / √weight.
        servable: factors only, of a rank that keeps the side path cheap.
    """
    nothing = Choice(Zero(), 0.0, facts.weight * float(facts.energies.sum()))
    if nothing.error <= 0:
        return [nothing]
    own = level / math.sqrt(facts.weight)
    bits, error = _components(facts, own)
    found = [nothing, *_factors(facts, own, level, servable, (bits, error))]
    if not servable:
        others = _entries_and_hybrid(facts, own, level, (bits, error))
        found += [replace(c, error=UNTRAINED * c.error) if facts.trainable else c for c in others]
    return found


def _components(facts: MatrixFacts, own: float) -> tuple[np.ndarray, np.ndarray]:
    """Bits and error of coding each component of one matrix of the stack."""
    loudness = np.sqrt(facts.energies / facts.count) / own
    bits, error = np.full_like(loudness, COMPONENT_BITS), np.zeros_like(loudness)
    for side in facts.shape:
        ratio = loudness / math.sqrt(side)
        of_side = coding(ratio)
        bits += side * of_side[0]
        error += side * of_side[1]
    return bits, np.minimum(error * own**2, facts.energies / facts.count)


def _factors(
    facts: MatrixFacts,
    own: float,
    level: float,
    servable: bool,
    components: tuple[np.ndarray, np.ndarray],
) -> list[Choice]:
    bits, error = components
    saved = facts.energies / facts.count - error
    rank = int((facts.weight * saved > multiplier(level) * bits).sum())
    if servable:
        rows, columns = facts.shape
        rank = min(rank, int(SERVABLE_SHARE * rows * columns / (rows + columns)))
    if rank == 0:
        return []
    total = facts.count * (float(bits[:rank].sum()) + MATRIX_BITS)
    left = facts.count * float(error[:rank].sum()) + float(facts.energies[rank:].sum())
    nbytes, lost = FACTORS_BYTES * total / 8, FACTORS_ERROR * facts.weight * left
    return [Choice(Factored(rank, own), nbytes, lost)]


def _entries_and_hybrid(
    facts: MatrixFacts, own: float, level: float, components: tuple[np.ndarray, np.ndarray]
) -> list[Choice]:
    """All entries alone, and behind a few components: those far louder than the flat rest.

    The entries code what the components leave, their own rounding included.
    """
    component_bits, lost = components
    ranks = [0, *(rank for rank in (2, 4, 8, 16, 32) if rank < min(facts.shape) // 2)]
    rest = [facts.energies[rank:].sum() + facts.count * lost[:rank].sum() for rank in ranks]
    energies = np.array(rest, dtype=np.float64)
    bits, error = _flat(facts, energies, own)
    found = [Choice(Entries(own), float(bits[0]) / 8, facts.weight * float(error[0]))]
    hybrids = []
    for i, rank in enumerate(ranks[1:], start=1):
        total = facts.count * (float(component_bits[:rank].sum()) + MATRIX_BITS) + float(bits[i])
        hybrids.append(Choice(Hybrid(rank, own), total / 8, facts.weight * float(error[i])))
    return found + ([min(hybrids, key=lambda choice: choice.cost(level))] if hybrids else [])


def _flat(facts: MatrixFacts, energies: np.ndarray, own: float) -> tuple[np.ndarray, np.ndarray]:
    """Bits and error of entries whose energy is spread as rows and columns spread it."""
    values = facts.shape[0] * facts.shape[1]
    ratio = np.sqrt(energies[:, None] / facts.count / values * facts.spread) / own
    of_value = [table.mean(axis=1) for table in coding(ratio)]
    bits = facts.count * (values * of_value[0] + MATRIX_BITS)
    return bits, facts.count * values * of_value[1] * own**2
