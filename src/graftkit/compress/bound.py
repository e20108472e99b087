"""How few bits any code could have used, under a model of the delta.

The model: the rows of a delta are independent Gaussians with a common covariance whose
eigenvalues are the squared singular values divided by the number of rows. Under it, reverse
water-filling (Cover & Thomas, theorem 10.3.3) gives the least rate at a mean squared error:

    R(θ) = (1/n) Σ_j ½ log2⁺(λ_j / θ)   bits per parameter,   D(θ) = (1/n) Σ_j min(θ, λ_j)

It is a bound for codes that treat deltas as such Gaussians and is no guarantee for one matrix.
"""

import numpy as np


def waterfilling_bits(energies: np.ndarray, columns: int, distortion: float) -> float:
    """Bits per parameter at a relative distortion.

    Args:
        energies: squared singular values (k,), any common scale.
        columns: number of eigenvalues n >= k; the missing ones are zero.
        distortion: ‖δ − δ̂‖² / ‖δ‖², in [0, 1]; clipped from below at 1e-12.
    """
    eigenvalues = np.asarray(energies, dtype=np.float64)
    total = float(eigenvalues.sum())
    if total <= 0 or distortion >= 1:
        return 0.0
    goal = max(distortion, 1e-12) * total
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(100):
        level = (low + high) / 2
        if float(np.minimum(eigenvalues, level).sum()) > goal:
            high = level
        else:
            low = level
    above = eigenvalues[eigenvalues > high]
    return float(0.5 * np.log2(above / high).sum() / columns)
