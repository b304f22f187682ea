"""Profiles of moving averages: how much the weights of each step count. Arithmetic only.

An average starts as a copy of the weights and after optimizer step n becomes
`keep * average + (1 - keep) * weights_n`, with `keep` computed here. Both kinds have keep = 0 at
n = 1, so the initial weights do not enter.

The power-function profile is that of EDM2 (arXiv 2312.02696, appendix C): after n steps the weights
of time t count as t^gamma, and the profile's length is its standard deviation relative to n.
With keep = (1 - 1/n)^(gamma + 1) (Eq. 127), step k counts exactly as the integral of the profile
over (k - 1, k], so that results for the continuous profile hold for the average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffmoe.errors import UserError

# Length of the plain mean (gamma = 0). Smaller exponents give no new lengths.
LONGEST = 12**-0.5


class Profile(NamedTuple):
    """A power-function profile of relative length `std` after `steps` optimizer steps."""

    std: float
    steps: int


class Reconstruction(NamedTuple):
    """coefficients: one per stored profile, with sum 1. error: L2 distance between the combined
    profile and the wanted one, relative to the norm of that; 0 is exact.
    """

    coefficients: np.ndarray
    error: float


def constant_keep(decay: float, step: int) -> float:
    """`keep` of the bias-corrected average: weights_k counts as decay^(n - k), normalized.

    This is Adam's bias correction as part of the rate, d (1 - d^(n-1)) / (1 - d^n): 0 at step 1,
    first close to that of a plain mean, in the long run `decay`.
    """
    return 1 - (1 - decay) / (1 - decay**step)


def power_keep(std: float, step: int) -> float:
    """`keep` of the power-function average of relative length `std` (Eq. 127, time in steps)."""
    return (1 - 1 / step) ** (exponent(std) + 1)


def power_prefix(std: float) -> str:
    """Prefix of the power-function average of a relative length in a checkpoint: ema-0.05/NAME."""
    return f"ema-{std}"


def exponent(std: float) -> float:
    """gamma of a relative length: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2 (Eq. 123).

    Raises UserError for a length that no gamma >= 0 has.
    """
    if not 0 < std < LONGEST:
        raise UserError(
            f"std={std}: a relative length lies between 0 and {LONGEST:.4f}, that of the plain "
            "mean; EDM2's are between 0.01 and 0.25"
        )
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def reconstruct(stored: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Combine stored averages into one of another length, by least squares (EDM2, section 3.2).

    Unlike the paper's Algorithm 3, which divides the coefficients by their sum, their sum is
    constrained to 1 by a Lagrange multiplier. Raises UserError if `wanted` is of a later step than
    all that are stored.
    """
    late = max(profile.steps for profile in stored)
    if wanted.steps > late:
        raise UserError(f"step {wanted.steps} lies beyond the newest stored average, step {late}")
    n = len(stored)
    # Gram matrix of the stored profiles, and their products with the wanted one.
    products = _products([*stored, wanted])
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = products[:n, :n]
    system[n, n] = 0
    right = np.append(products[:n, n], 1)
    x = np.linalg.lstsq(system, right, rcond=None)[0][:n]
    difference = np.append(x, -1)
    square = max(0.0, difference @ products @ difference)
    return Reconstruction(x, float(np.sqrt(square / products[n, n])))


def _products(profiles: Sequence[Profile]) -> np.ndarray:
    """Inner products of profiles p(t) = (gamma + 1) t^gamma / n^(gamma + 1) on (0, n] (Eq. 151)."""
    gamma = np.array([exponent(profile.std) for profile in profiles])
    log_n = np.log([profile.steps for profile in profiles])
    log_n -= log_n[-1]  # in units of the last one
    power = gamma[:, None] + gamma + 1
    logs = power * np.minimum(log_n[:, None], log_n)
    logs -= ((gamma + 1) * log_n)[:, None] + (gamma + 1) * log_n
    return (gamma[:, None] + 1) * (gamma + 1) / power * np.exp(logs)
