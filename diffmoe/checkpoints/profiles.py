"""How much each step's weights count in a moving average: the profiles, as numbers alone.

An average starts as a copy of the weights and after optimizer step n becomes
`keep * average + (1 - keep) * weights_n`, with `keep` from here. Both kinds keep nothing at n = 1,
so the initial weights have no part in them.

The power-function profile is that of EDM2 (arXiv 2312.02696, appendix C): after n steps the weights
of time t count as t^gamma, and its length is the standard deviation of that profile relative to
n. Keeping `(1 - 1/n)^(gamma + 1)` (Eq. 127) gives step k exactly the integral of the profile over
(k - 1, k], so that what holds for the continuous profile holds for the average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffmoe.errors import UserError

# The profile of exponent 0, a plain mean. Below that exponent lengths repeat.
LONGEST = 12**-0.5


class Profile(NamedTuple):
    """A power-function profile of relative length `std`, seen after `steps` optimizer steps."""

    std: float
    steps: int


class Reconstruction(NamedTuple):
    """coefficients: of each stored profile, with the sum 1. error: of the combination as a profile,
    in L2, relative to the wanted one; 0 is exact."""

    coefficients: np.ndarray
    error: float


def constant_keep(decay: float, step: int) -> float:
    """Of the average without bias: after n steps, weights_k counts as decay^(n - k), normalized.

    This is Adam's correction, put into the rate: d (1 - d^(n-1)) / (1 - d^n). It grows from 0 at
    step 1 through a plain mean towards `decay`.
    """
    return 1 - (1 - decay) / (1 - decay**step)


def power_keep(std: float, step: int) -> float:
    """Of the power-function average of relative length `std` (Eq. 127, the clock in steps)."""
    return (1 - 1 / step) ** (exponent(std) + 1)


def power_prefix(std: float) -> str:
    """Where a checkpoint keeps the power-function average of a relative length: ema-0.05/NAME."""
    return f"ema-{std}"


def exponent(std: float) -> float:
    """gamma of a relative length: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2 (Eq. 123)."""
    if not 0 < std < LONGEST:
        raise UserError(
            f"std={std}: a relative length lies between 0 and {LONGEST:.4f}, the plain mean of all "
            "steps; EDM2's are between 0.01 and 0.25"
        )
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def reconstruct(stored: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Combine stored averages into one of another length: least squares (EDM2, section 3.2).

    Unlike the paper's Algorithm 3 the sum of the coefficients is held at 1 inside the problem, by a
    Lagrange multiplier, instead of being divided out.
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
