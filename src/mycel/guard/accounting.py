"""How much privacy a run has spent, by the accountants of ``opacus``.

Every release is a Gaussian mechanism: what one protected unit can change by at most ``S`` has noise of standard
deviation ``z S`` added, and the unit takes part with odds ``q``. Releases compose; the accountant turns the history of
(z, q, steps) into epsilon for a delta.

``rdp`` follows Mironov et al. 2019 (Renyi divergence), ``prv`` Gopi et al. 2021 (numerical composition), which is
tighter and takes a second or two. Both hold for units that come or go and are drawn independently.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mycel.errors import ExtraMissing, RecipeError

Method = Literal["rdp", "prv"]


@dataclass(frozen=True, order=True)
class Releases:
    """So many releases of one kind.

    Attributes
    ----------
    noise : float
        Standard deviation over sensitivity, above 0.
    odds : float
        Chance of a unit to take part in one of them, above 0 and at most 1.
    steps : int
        How many there were.
    """

    noise: float
    odds: float
    steps: int


def epsilon(history: Iterable[Releases], delta: float, method: Method = "rdp") -> float:
    """Return the epsilon that a history of releases comes to; 0 for an empty one.

    Raises
    ------
    RecipeError
        When delta does not lie between 0 and 1, or a release has no noise.
    """
    if not 0 < delta < 1:
        raise RecipeError(
            f"guard.delta is {delta}: it lies above 0 and below 1, well below one over the protected units"
        )
    spent = tuple(sorted(release for release in history if release.steps))
    for release in spent:
        if not release.noise > 0 or not 0 < release.odds <= 1:
            raise RecipeError(f"a release with noise {release.noise} and odds {release.odds} spends without bound")
    return _epsilon(spent, delta, method) if spent else 0.0


def calibrate(wanted: float, delta: float, odds: float, steps: int) -> float:
    """Return the least noise multiplier (to 0.1 %) with which ``steps`` releases cost at most ``wanted`` epsilon.

    Raises
    ------
    RecipeError
        When epsilon is not above 0, or no noise up to 1e5 is enough.
    """
    if not wanted > 0:
        raise RecipeError(
            f"guard.epsilon is {wanted}: privacy that is measured at all costs more than 0; 1 to 10 is usual"
        )
    low, high = 1e-2, 1.0
    while epsilon([Releases(high, odds, steps)], delta) > wanted:
        low, high = high, 2 * high
        if high > 1e5:
            raise RecipeError(f"guard.epsilon is {wanted}, which no noise reaches over {steps} releases: ask for more")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon([Releases(middle, odds, steps)], delta) > wanted else (low, middle)
    return high


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Releases, ...], delta: float, method: Method) -> float:
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise ExtraMissing("opacus", "privacy") from error
    accountant = PRVAccountant() if method == "prv" else RDPAccountant()
    accountant.history = [(release.noise, release.odds, release.steps) for release in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order lies at the edge: the bound stays one
        return float(accountant.get_epsilon(delta=delta, **({"eps_error": 0.002} if method == "prv" else {})))
